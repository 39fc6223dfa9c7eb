"""Find, read, and save pictures. Alpha, gray, 16 bit, color description, EXIF, XMP, and PNG text are kept.

    picture = read_picture("wallpaper.jpg")         # picture.rgb is (3, H, W) float32 in [0, 1]
    save_picture("copy.png", picture)

Needs torch, numpy, and Pillow. Works when copied alone.
"""
import contextlib
import io
import os
import re
import struct
import sys
import time
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
READ_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
MAX_SIDE = {"JPEG": 65500, "WEBP": 16383, "AVIF": 65535}      # in pixels
WRITE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
SYSTEM_NAME = re.compile(r"(?i)\.|((eh)?thumbs\.db|desktop\.ini|__macosx|\$recycle\.bin|@eadir)$")
GRAY_FORMATS = ("PNG", "JPEG")
QUALITY = 95                                # of saved JPEG, WebP, and AVIF, 1 to 100
MAX_JPEG_SEGMENT = 65500                    # bytes of EXIF or XMP
ORIENTATION = 0x0112                        # EXIF tag
ICC_SPACE = slice(16, 20)                   # color space in an ICC profile, such as b"RGB " or b"GRAY"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_XMP = "XML:com.adobe.xmp"               # keyword of the PNG text that holds XMP
PNG_EXIF = "Raw profile type exif"          # keyword of PNG text with EXIF in older files: 3 lines, hex
COLOR_CHUNKS = (b"cICP", b"mDCV", b"cLLI", b"sRGB", b"gAMA", b"cHRM")
SRGB = (1 / 2.2, 0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)      # gamma; x, y of white and primaries
# EXIF tags and XMP of the size, orientation, subject area, and thumbnail. They are removed.
EXIF_IFD, SIZE_TAGS = 0x8769, {0x0100, 0x0101, ORIENTATION, 0x0201, 0x0202, 0x9214, 0xA002, 0xA003, 0xA214}
SIZE_XMP = re.compile(rb"(?s)<?(tiff:(?:ImageWidth|ImageLength|Orientation)|exif:Pixel[XY]Dimension"
                      rb"""|x[am]p:Thumbnails)(?:\s*=\s*(["']).*?\2|[^>/]*>.*?</\1\s*>)""")

PngImagePlugin.MAX_TEXT_CHUNK = 2**26       # bytes; by default Pillow rejects text and profiles above 1 MiB
warnings.filterwarnings("ignore", module="PIL")     # about damaged metadata and large pictures


class UserError(ValueError):
    """A mistake of the user, such as a wrong path. Commands print it as one line and exit with code 2."""


class PictureError(UserError):
    """A picture cannot be read, upscaled, or saved. The message is one line."""


@dataclass
class Picture:
    """A picture and all data that saving must keep.

    rgb: (3, H, W) float32 in [0, 1], upright, in the colors of `icc` or `color`, otherwise sRGB.
    alpha: (1, H, W) in [0, 1] or None. gray, depth (8 or 16): as in the file. icc, exif, xmp: bytes or None.
    note: changes and losses during reading. text: PNG text by keyword, such as Author.
    color: contents of the PNG chunks COLOR_CHUNKS by name; empty for sRGB. nclx of AVIF is stored as cICP.
    """
    rgb: torch.Tensor
    alpha: torch.Tensor | None = None
    gray: bool = False
    depth: int = 8
    icc: bytes | None = None
    exif: bytes | None = None
    note: str = ""
    xmp: bytes | None = None
    text: dict = field(default_factory=dict)
    color: dict = field(default_factory=dict)


# ------------------------------------------------------------------ paths

def printable(path):
    """Return a path as one line of text: line breaks and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def as_paths(paths):
    """Convert one path or a list of paths to a list of Path."""
    return [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]


def find_pictures(paths):
    """Return the sorted paths of all pictures in the given files and folders, without duplicates.

    A picture has one of READ_SUFFIXES or can be opened. Search folders recursively and follow links. In
    folders, ignore hidden and system files, and print the number of all other files to stderr. A given file
    that is no picture, such as a text file that matches folder/*, is ignored. Raises PictureError for a
    path that does not exist.
    """
    paths, files, visited = as_paths(paths), set(), set()
    for path in paths:
        if not os.path.exists(path):
            raise PictureError(f"{printable(path)}: no such file or folder")
        if not os.path.isdir(path):
            files.add(path)
        for folder, subfolders, names in os.walk(path, followlinks=True):
            if os.path.realpath(folder) in visited:         # a link to a folder that was already searched
                subfolders.clear()
                continue
            visited.add(os.path.realpath(folder))
            subfolders[:] = sorted(name for name in subfolders if not SYSTEM_NAME.match(name))
            files.update(Path(folder, name) for name in names if not SYSTEM_NAME.match(name))
    pictures = {file for file in files if file.suffix.lower() in READ_SUFFIXES or any(picture_size(file))}
    others = sorted(files - pictures - set(paths))
    if others and os.environ.get("RANK", "0") == "0":       # only the first process of torchrun
        first = ", ".join([*map(printable, others[:3]), "..."][:len(others)])
        print(f"{len(others)} left out, not pictures that can be read: {first}", file=sys.stderr)
    return sorted(pictures)


@contextlib.contextmanager
def atomic_path(path):
    """Create the folder of `path`, yield a temporary path, and rename it. On an error, delete it instead."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())     # else a power failure can leave an empty file under the new name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path, data):
    """Write bytes to a file completely or not at all, and create its folder. Raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


# ------------------------------------------------------------------ reading

def read_picture(path, srgb=False):
    """Read PNG, JPEG, WebP, AVIF, BMP, TIFF, or GIF (first frame) -> Picture.

    CMYK becomes sRGB. srgb=True converts ICC colors to sRGB, with 8 bit, and drops the profile. Raises
    PictureError if the file is missing, damaged, not a picture, or larger than Pillow's pixel limit.
    """
    try:
        data = Path(path).read_bytes()
        try:
            return decode(data, srgb)
        except Exception:       # Pillow rejects a whole PNG for one damaged text or profile
            if not data.startswith(PNG_SIGNATURE):
                raise
            kept = [c for c in png_chunks(data) if c[4:8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")]
            return decode(PNG_SIGNATURE + b"".join(kept), srgb, "damaged PNG metadata left behind")
    except Image.UnidentifiedImageError:
        raise PictureError(f"{printable(path)}: not a picture, or a format that Pillow cannot read") from None
    except Exception as error:      # a broken file can make Pillow raise nearly any exception
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{printable(path)}: {reason}") from error


def png_chunks(data):
    """Yield each chunk in the bytes of a PNG file: length, name, contents, and checksum."""
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start:start + 4], "big")
        yield data[start:end]
        start = end


def read_color(im, data):
    """Return Picture.color of an open Pillow image. data: the bytes of its file."""
    color = {}
    if im.format == "PNG":
        color = {chunk[4:8].decode(): chunk[8:-4] for chunk in png_chunks(data) if chunk[4:8] in COLOR_CHUNKS}
    elif im.format == "AVIF" and b"colrnclx" in data and "icc_profile" not in im.info:
        color = {"cICP": data.partition(b"colrnclx")[2][1:4:2] + b"\0\1"}       # primaries, transfer curve
    if "cICP" in color:         # overrides an ICC profile; 1 and 13 are sRGB, 2 is unspecified
        return {} if color["cICP"][0] in (1, 2) and color["cICP"][1] in (2, 13) else color
    values = [im.info.get("gamma", SRGB[0]), *im.info.get("chromaticity", SRGB[1:])]
    srgb = "icc_profile" in im.info or "srgb" in im.info or np.allclose(values, SRGB, rtol=0.02)
    return {} if srgb else color


def decode(data, srgb, note=""):
    """Decode the bytes of a file -> Picture. See read_picture()."""
    if not data:
        raise ValueError("empty file (0 bytes)")
    with Image.open(io.BytesIO(data), formats=READ_FORMATS) as im:
        layout = str(im.tile[0][-1]) if im.format in ("PNG", "TIFF") else ""        # such as "RGB;16B"
        raw_exif, color = load_upright(im), read_color(im, data)
        pixels = read_samples(im, data, layout)
        icc, exif = im.info.get("icc_profile"), remove_size_tags(raw_exif)
        xmp = SIZE_XMP.sub(b"", im.info.get("xmp") or im.info.get(PNG_XMP, "").encode()) or None
        text = {k: str(v) for k, v in getattr(im, "text", {}).items() if k not in (PNG_XMP, PNG_EXIF)}
        frames, is_16_bit = getattr(im, "n_frames", 1), pixels.dtype == np.uint16
        notes = [note,
                 "invalid EXIF left behind" if raw_exif and not exif else "",
                 "CMYK converted to RGB" if im.mode == "CMYK" else "",
                 "TIFF tags left behind" if im.format == "TIFF" else "",
                 "16 bit reduced to 8" if ";16" in layout and not is_16_bit else "",
                 "transparent color left behind" if is_16_bit and "transparency" in im.info else "",
                 f"first of {frames} frames" if frames > 1 else ""]
        if icc and (srgb or im.mode == "CMYK"):
            pixels, note = convert_to_srgb(im, pixels, icc)
            icc, color = None, {}
            notes.append(note)
        if srgb and color:
            notes.append(f"color treated as sRGB, but described by {', '.join(color)}")
    depth = 16 if pixels.dtype == np.uint16 else 8
    x = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div_(2**depth - 1)
    alpha = x[-1:].clone() if len(x) in (2, 4) else None
    rgb = x[:1].repeat(3, 1, 1) if len(x) < 3 else x[:3]
    gray = len(x) < 3 and (icc or b"")[ICC_SPACE] != b"RGB "       # a gray file cannot hold an RGB profile
    return Picture(rgb, alpha, gray, depth, icc, exif, "; ".join(filter(None, notes)), xmp, text, color)


def load_upright(im):
    """Decode an open Pillow image and apply its orientation -> its raw EXIF, b"" if it has none."""
    im.load()
    exif = im.info.get("exif") or bytes.fromhex("".join(im.info.get(PNG_EXIF, "").split("\n")[3:]))
    with contextlib.suppress(Exception):        # invalid EXIF can make Pillow raise nearly any exception
        ImageOps.exif_transpose(im, in_place=True)
    return exif


def remove_size_tags(exif):
    """Remove SIZE_TAGS and the thumbnail from raw EXIF. Returns raw EXIF, or None if it is invalid."""
    exif = bytearray(exif.removeprefix(b"Exif\0\0"))        # WebP and PNG lack this prefix
    order = "<" if exif.startswith(b"II") else ">"
    with contextlib.suppress(struct.error):
        ifds = list(struct.unpack_from(order + "I", exif, 4))
        for start in ifds:
            count, = struct.unpack_from(order + "H", exif, start)
            entries = struct.iter_unpack(order + "HHII", exif[start + 2:start + 2 + 12 * count])
            entries = [entry for entry in entries if entry[0] not in SIZE_TAGS]
            ifds += [value for tag, _, _, value in entries if tag == EXIF_IFD and len(ifds) == 1]
            table = struct.pack(order + "H" + "HHII" * len(entries) + "4x", len(entries), *sum(entries, ()))
            exif[start:start + len(table)] = table      # "4x": no next IFD, which would hold the thumbnail
        return b"Exif\0\0" + bytes(exif)


def read_samples(im, data, layout):
    """Convert a decoded image to (H, W, C) uint8 or uint16. C: 1 gray, 2 gray + alpha, 3 RGB, 4 RGBA."""
    if layout in ("RGB;16B", "RGBA;16B"):
        # Pillow keeps the high byte of each sample. Decode as little-endian to get the low byte.
        with Image.open(io.BytesIO(data)) as low:
            low.tile = [(*low.tile[0][:3], layout.replace("16B", "16L"))]
            load_upright(low)
            return np.asarray(im).astype(np.uint16) << 8 | np.asarray(low)
    if im.mode == "F" or (im.mode == "I" and im.getextrema()[1] > 65535):
        raise ValueError("samples of 32 bits have no standard range; save it with 8 or 16 bit")
    if im.mode.startswith("I"):
        return np.asarray(im).astype(np.uint16)[..., None]
    gray = im.mode in ("1", "L", "LA", "La")
    if gray and "transparency" in im.info:
        im = im.convert("RGBA")     # a direct conversion to LA loses the transparent color
    return np.atleast_3d(im.convert(("L" if gray else "RGB") + ("A" if im.has_transparency_data else "")))


def picture_size(path):
    """Return (height, width) of a picture, orientation applied, from its header; (0, 0) if not readable."""
    try:
        with Image.open(path, formats=READ_FORMATS) as im:
            # PngImageFile.getexif() would decode the picture. Pillow rotates TIFF when it opens the file.
            swapped = Image.Image.getexif(im).get(ORIENTATION, 1) in (5, 6, 7, 8) and im.format != "TIFF"
            return im.size if swapped else im.size[::-1]
    except Exception:       # read_picture() reports the reason
        return 0, 0


def convert_to_srgb(im, pixels, icc):
    """Convert the pixels (H, W, C) of a Pillow image by its ICC profile -> (pixels, note).

    Return the same pixels if the profile is sRGB or invalid, otherwise uint8.
    """
    channels = 1 if pixels.shape[2] < 3 else 3      # without alpha
    pixels8 = np.uint8(pixels >> (8 * pixels.itemsize - 8))
    mode = "CMYK" if im.mode == "CMYK" else "L" if channels == 1 and icc[ICC_SPACE] == b"GRAY" else "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        name = ImageCms.getProfileDescription(profile)
        # "Linear sRGB" and "sRGB-elle-V2-g10" have the primaries of sRGB but another transfer curve.
        if "sRGB" in name and "inear" not in name and "elle" not in name:
            return pixels, ""
        colors = Image.fromarray(pixels8[..., 0] if channels == 1 else pixels8[..., :3])
        if mode == "CMYK":
            colors = im
        colors = ImageCms.profileToProfile(
            colors.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:       # the color engine has its own exception classes
        return pixels, "invalid ICC profile left behind"
    return np.concatenate([np.asarray(colors)[..., :channels], pixels8[..., channels:]], -1), ""


def composite(picture, background):
    """Blend a Picture over a background, a number or a tensor (3, H, W) in [0, 1] -> (3, H, W)."""
    if picture.alpha is None:
        return picture.rgb
    return picture.rgb * picture.alpha + background * (1 - picture.alpha)


# ------------------------------------------------------------------ saving

def save_picture(path, picture):
    """Save a Picture to a file in an existing folder. See save_strips()."""
    planes = [picture.rgb] if picture.alpha is None else [picture.rgb, picture.alpha]
    save_strips(path, [torch.cat(planes)], picture.rgb.shape[1:], picture)


def save_strips(path, strips, size, picture):
    """Save strips (3 or, with alpha, 4, h, W), top to bottom, as one picture of size (H, W).

    The file is written completely or not at all. The suffix selects the format (WRITE_FORMATS). `picture`
    gives all other data; split_metadata() lists what the format cannot hold. PNG is written strip by strip.
    Raises PictureError if the format is unknown or cannot hold the picture, and OSError if the file cannot be
    written.
    """
    path = Path(path)
    format = WRITE_FORMATS.get(path.suffix.lower())
    if format is None:
        raise PictureError(f"{printable(path)}: unknown suffix; use one of {' '.join(WRITE_FORMATS)}")
    if max(size) > MAX_SIDE.get(format, max(size)):
        raise PictureError(f"{printable(path)}: {format} cannot hold {size[1]}x{size[0]} pixels; use PNG")
    gray = picture.gray and format in GRAY_FORMATS
    alpha = picture.alpha is not None and format != "JPEG"
    depth = picture.depth if format == "PNG" else 8
    rows = quantized_rows(strips, gray, alpha, depth)
    metadata, _ = split_metadata(picture, path)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        if format == "PNG":
            write_png(file, rows, size, (1 if gray else 3) + alpha, depth, metadata, picture)
            return
        pixels = np.concatenate(list(rows))
        memory = io.BytesIO()       # Pillow would hide the reason if the disk is full
        try:
            im = Image.fromarray(pixels[..., 0] if gray else pixels)
            im.save(memory, format, quality=QUALITY, subsampling="4:4:4", **metadata)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise PictureError(f"{printable(path)}: Pillow cannot write this {format}: {error}") from error
        file.write(memory.getbuffer())


def split_metadata(picture, path):
    """Return ({Pillow's name: metadata that a file of this suffix can hold}, [phrase about lost data])."""
    format = WRITE_FORMATS[Path(path).suffix.lower()]
    space = b"GRAY" if picture.gray and format in GRAY_FORMATS else b"RGB "
    has_icc = (picture.icc or b"")[ICC_SPACE] == space
    losses = {"transparency blended over white": format == "JPEG" and picture.alpha is not None,
              "16 bit reduced to 8": format != "PNG" and picture.depth == 16,
              f"color description left behind: {', '.join(picture.color)}": format != "PNG" and picture.color,
              f"PNG text left behind: {printable(', '.join(picture.text))}": format != "PNG" and picture.text,
              "ICC profile left behind": picture.icc and not has_icc}
    phrases = [phrase for phrase, lost in losses.items() if lost]
    metadata = {"icc_profile": picture.icc} if has_icc else {}
    for name, data in (("exif", picture.exif), ("xmp", picture.xmp)):
        if data and format == "JPEG" and len(data) > MAX_JPEG_SEGMENT:
            phrases.append(f"{name.upper()} left behind")
        elif data:
            metadata[name] = data
    return metadata, phrases


def quantized_rows(strips, gray, alpha, depth):
    """Convert strips (3 or 4, h, W) to arrays (h, W, C) of uint8 or uint16 with at most 16 rows each."""
    for strip in strips:
        for rows in strip.split(16, 1):
            rgb, a = rows[:3], rows[3:]
            if len(a) and not alpha:
                rgb, a = rgb * a + 1 - a, a[:0]
            if gray:
                rgb = rgb.mean(0, keepdim=True)
            yield np.concatenate([quantize(rgb, depth), quantize(a, depth)], -1)
        del strip, rows, a      # free the strip before the next one is computed


def quantize(x, depth):
    """Convert (C, h, W) float in [0, 1] to (h, W, C) uint8 (depth 8) or uint16 (depth 16), rounded."""
    x = x.detach().float().cpu().permute(1, 2, 0).clamp(0, 1).mul(2**depth - 1).round().numpy()
    return x.astype(np.uint16 if depth == 16 else np.uint8)


def to_uint8(x):
    """Convert (3, H, W) float in [0, 1] to a uint8 array (H, W, 3)."""
    return quantize(x, 8)


def write_png(file, rows, size, channels, depth, metadata, picture):
    """Write arrays (h, W, C) of uint8 or uint16 as PNG, a few rows at a time.

    picture: gives color and text. (Pillow needs the whole picture in memory and has no 16-bit RGB.)
    """
    info = PngImagePlugin.PngInfo()
    for name, contents in picture.color.items():
        info.add(name.encode(), contents)
    if "icc_profile" in metadata:
        info.add(b"iCCP", b"ICC\0\0" + zlib.compress(metadata["icc_profile"]))
    if "exif" in metadata:
        info.add(b"eXIf", metadata["exif"].removeprefix(b"Exif\0\0"))
    if "xmp" in metadata:
        info.add_itxt(PNG_XMP, metadata["xmp"].decode("utf-8", "replace"))
    for keyword, value in picture.text.items():
        info.add_text(keyword, value)

    height, width = size
    color_type = (0, 4, 2, 6)[channels - 1]
    file.write(PNG_SIGNATURE)
    PngImagePlugin.putchunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    for name, data, *_ in info.chunks:
        PngImagePlugin.putchunk(file, name, data)
    compressor, above = zlib.compressobj(4), np.zeros((1, width * channels * depth // 8), np.uint8)
    for array in rows:
        samples = array.astype(f">u{depth // 8}").reshape(-1, width * channels).view(np.uint8)  # big-endian
        residuals = np.diff(np.concatenate([above, samples]), axis=0)       # PNG's filter 2, modulo 256
        filtered = np.pad(residuals, ((0, 0), (1, 0)), constant_values=2)
        compressed = compressor.compress(filtered.tobytes())
        if compressed:
            PngImagePlugin.putchunk(file, b"IDAT", compressed)
        above = samples[-1:]
    PngImagePlugin.putchunk(file, b"IDAT", compressor.flush())
    PngImagePlugin.putchunk(file, b"IEND", b"")


# ------------------------------------------------------------------ terminal

class ProgressLine:
    """Show progress on stderr: one line that is rewritten in a terminal, else a line every 30 seconds."""

    def __init__(self):
        self.start = self.last_time = time.time()
        self.done = 0

    def __call__(self, text):
        terminal, now = sys.stderr.isatty(), time.time()
        if now - self.last_time < (0.1 if terminal else 30):
            return
        self.last_time = now
        line = f"\r\033[K\033[?7l{text}\033[?7h" if terminal else text      # erase the line; no line break
        print(line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def step(self, unit, label, total):
        """Count one step of `total`, and show the number of steps, the speed, and the time left."""
        self.done += 1
        rate = self.done / (time.time() - self.start + 1e-9)
        left = int((total - self.done) / rate)
        self(f"{self.done}/{total} {unit}  {rate:.2f} {unit}/s  {left // 60}:{left % 60:02d} left  {label}")

    @staticmethod
    def clear():
        """Erase the line, so that a message can be printed."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def fail(message):
    """Print one line on stderr and exit with code 2."""
    ProgressLine.clear()
    print(f"error: {str(message) or 'interrupted'}", file=sys.stderr)     # KeyboardInterrupt has no message
    sys.exit(2)
