"""Find, read, and save pictures. Alpha, gray, 16 bit, ICC profile, EXIF, XMP, and PNG text are kept.

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
from PIL import Image, PngImagePlugin

READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
WRITE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
MAX_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383, "AVIF": 32768}      # pixels
MAX_JPEG_EXIF, MAX_JPEG_XMP = 65533, 65504  # bytes; each must fit into one JPEG segment
ORIENTATION = 0x0112                        # EXIF tag
BITS_PER_SAMPLE = 258                       # TIFF tag
TIFF_TAGS = {270, 305, 306, 315, 33432}     # description, software, date, artist, copyright
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_XMP = "XML:com.adobe.xmp"               # keyword of the PNG text that holds XMP

PngImagePlugin.MAX_TEXT_CHUNK = 2**26       # bytes; by default Pillow rejects text and profiles above 1 MiB


class UserError(ValueError):
    """A mistake of the user, such as a wrong path. Commands print it as one line and exit with code 2."""


class PictureError(UserError):
    """A picture cannot be read or saved. The message is one line and names the file."""


@dataclass
class Picture:
    """A picture and everything that its file is to keep.

    rgb: (3, H, W) float32 in [0, 1], orientation applied. alpha: (1, H, W) in [0, 1] or None.
    gray, depth (8 or 16): how the file stores the pixels. icc, exif, xmp: raw bytes or None.
    note: what reading changed or left behind. text: PNG text by keyword, such as Author.
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


# ------------------------------------------------------------------ paths

def printable(path):
    """Return a path as one line of text: line breaks and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def as_paths(paths):
    """Convert one path or a list of paths to a list of Path."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    return [Path(path) for path in paths]


def find_pictures(paths):
    """Return the sorted paths of all pictures in files and folders, each once.

    Search folders recursively for READ_SUFFIXES, follow links, and skip hidden names. Accept a file with any
    suffix. Raises PictureError for a path that does not exist or a folder that cannot be listed.
    """
    def refuse(error):
        raise PictureError(f"{printable(error.filename)}: {error.strerror}")

    pictures, visited = set(), set()
    for path in as_paths(paths):
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise PictureError(f"{printable(path)}: no such file or folder")
            pictures.add(path)
            continue
        for folder, subfolders, names in os.walk(path, followlinks=True, onerror=refuse):
            real = os.path.realpath(folder)
            if real in visited:         # a link to a folder that was searched already
                subfolders.clear()
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in names:
                if not name.startswith(".") and Path(name).suffix.lower() in READ_SUFFIXES:
                    pictures.add(Path(folder, name))
    return sorted(pictures)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path; rename it to `path` if the block succeeds, delete it otherwise."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomic(path, data):
    """Write bytes to a file that is complete or absent, and create its folder. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())     # else a power failure can leave an empty file under the new name


# ------------------------------------------------------------------ reading

def read_picture(path, srgb=False):
    """Read PNG, JPEG, WebP, AVIF, BMP, TIFF, or GIF (first frame) -> Picture.

    srgb=True converts 8-bit colors to sRGB by the ICC profile; otherwise the profile is kept. CMYK is always
    converted. Raises PictureError if the file is missing, damaged, no picture, or above Pillow's pixel limit.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        if path.stat().st_size == 0:
            raise ValueError("empty file (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels, orientation, picture = decode_or_repair(path, srgb)
    except Image.UnidentifiedImageError:
        raise PictureError(f"{printable(path)}: not a picture, or a format that Pillow cannot read") from None
    except Exception as error:      # a broken file can make Pillow raise nearly any exception
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{printable(path)}: {reason}") from error

    x = to_tensor(apply_orientation(pixels, orientation))
    picture.alpha = x[-1:].clone() if len(x) in (2, 4) else None
    picture.rgb = x[:1].repeat(3, 1, 1) if picture.gray else x[:3]
    return picture


def decode_or_repair(path, srgb):
    """Decode a file; if that fails and the file is a PNG, decode it without its optional chunks."""
    first_error = None
    for file, note in readable_copies(path):
        try:
            pixels, orientation, picture = decode(file, srgb)
            picture.note = "; ".join(filter(None, (note, picture.note)))
            return pixels, orientation, picture
        except Exception as error:
            first_error = first_error or error
    raise first_error


def readable_copies(path):
    """Yield (file, note): the path itself, then, for a PNG, copies in memory without optional chunks.

    Pillow rejects the whole file for one optional chunk (text, profile) that is damaged or too large.
    """
    yield path, ""
    with open(path, "rb") as file:
        if file.read(8) != PNG_SIGNATURE:
            return
        data = PNG_SIGNATURE + file.read()
    for keep in ({b"tRNS", b"gAMA", b"sRGB", b"iCCP", b"eXIf"}, {b"tRNS"}, set()):
        parts, dropped, start = [PNG_SIGNATURE], [], 8
        while start + 8 <= len(data):
            length, name = struct.unpack(">I4s", data[start:start + 8])
            optional = name[0] & 32         # PNG: a lower-case first letter
            if optional and name not in keep:
                dropped.append(name.decode("latin-1"))
            else:
                parts.append(data[start:start + 12 + length])
            start += 12 + length
        names = printable(", ".join(sorted(set(dropped))))
        yield io.BytesIO(b"".join(parts)), f"damaged or oversized metadata left behind: PNG chunks {names}"


def decode(file, srgb):
    """Decode a path or BytesIO -> (pixels (H, W, C) uint8 or uint16, orientation, Picture without pixels)."""
    notes = []
    with Image.open(file) as im:
        if im.format == "EPS":      # Pillow would start Ghostscript
            raise ValueError("PostScript is not supported")
        if im.mode == "CMYK":
            converted = convert_to_srgb(im, im.info.get("icc_profile"))
            pixels = np.asarray(converted[0]) if converted else read_samples(im, file)
            icc = None
            how = f"by its profile {converted[1]}" if converted else "without profile"
            notes.append(f"CMYK converted to sRGB {how}")
        else:
            pixels = read_samples(im, file)
            icc = im.info.get("icc_profile")
            if color_space(icc) not in (b"RGB ", b"GRAY"):
                icc = None
        orientation, exif = read_exif(im)
        xmp, text = read_text(im, orientation)
        bits = max(im.tag_v2.get(BITS_PER_SAMPLE, (8,))) if im.format == "TIFF" else 8
        if bits == 16 and pixels.dtype == np.uint8:
            notes.append("16-bit TIFF read as 8 bit")
        if getattr(im, "n_frames", 1) > 1:
            notes.append(f"first of {im.n_frames} frames")
    if srgb and icc:
        pixels, icc, note = pixels_to_srgb(pixels, icc)
        notes.append(note)
    depth = 16 if pixels.dtype == np.uint16 else 8
    picture = Picture(None, None, pixels.shape[2] < 3, depth, icc, exif, "; ".join(notes), xmp, text)
    return pixels, orientation, picture


def read_samples(im, file):
    """Decode an open Pillow image -> (H, W, C) uint8 or uint16. C: 1 gray, 2 gray + alpha, 3 RGB, 4 RGBA."""
    png_tile = im.tile[0] if im.format == "PNG" and im.tile else [None]
    layout = png_tile[-1]           # how a PNG stores its samples, such as "RGB;16B"
    im.load()
    has_transparent_color = "transparency" in im.info
    if has_transparent_color and layout in ("L;2", "L;4"):
        # Pillow scales the pixels to 8 bits, but not the transparent level.
        im.info["transparency"] *= 85 if layout == "L;2" else 17

    if layout in ("RGB;16B", "RGBA;16B", "LA;16B"):
        pixels = read_16_bit_png(im, file, png_tile)
    elif im.mode.startswith("I"):
        if im.mode == "I" and im.getextrema()[1] > 65535:
            raise ValueError("32-bit samples have no standard range; save it as 8 or 16 bit")
        pixels = np.asarray(im).clip(0, 65535).astype(np.uint16)[..., None]
    elif im.mode == "F":
        raise ValueError("floating-point samples have no standard range; save it as 8 or 16 bit")
    else:
        gray = im.mode in ("1", "L", "LA", "La")
        alpha = has_transparent_color or im.mode in ("LA", "La", "RGBA", "RGBa", "PA")
        mode = ("L" if gray else "RGB") + ("A" if alpha else "")
        if has_transparent_color and gray:
            im = im.convert("RGBA")     # a direct conversion to LA loses the transparent color
        pixels = np.asarray(im if im.mode == mode else im.convert(mode))
        return pixels if pixels.ndim == 3 else pixels[..., None]

    if has_transparent_color:
        opaque = (pixels != np.array(im.info["transparency"], np.uint16)).any(-1, keepdims=True)
        pixels = np.concatenate([pixels, opaque.astype(np.uint16) * 65535], -1)
    return pixels


def read_16_bit_png(im, file, png_tile):
    """Decode a 16-bit color PNG -> (H, W, C) uint16. Pillow keeps the high bytes only, so decode it twice."""
    *position, layout = png_tile
    with Image.open(file) as again:
        if layout == "LA;16B":      # read as RGBA, it gives all four bytes of a pixel
            again.tile = [(*position, "RGBA")]
            samples = np.asarray(again).astype(np.uint16)
            return samples[..., 0::2] << 8 | samples[..., 1::2]
        again.tile = [(*position, layout.replace("16B", "16L"))]    # read as little-endian: the low bytes
        low = np.asarray(again).astype(np.uint16)
    return np.asarray(im).astype(np.uint16) << 8 | low


def read_exif(im):
    """Read EXIF of a loaded image -> (orientation 1..8, EXIF bytes with orientation 1, or None if invalid).

    Keep only TIFF_TAGS of a TIFF, since most of its tags describe the pixel layout.
    """
    orientation = 1
    try:
        tags = im.getexif()
        orientation = tags.get(ORIENTATION, 1)
        if im.format == "TIFF":
            kept = Image.Exif()
            kept.update({tag: tags[tag] for tag in TIFF_TAGS & tags.keys()})
            return orientation, kept.tobytes() if kept else None
        exif = im.info.get("exif")
        if orientation != 1 and exif:
            tags[ORIENTATION] = 1
            exif = tags.tobytes()
        return orientation, b"Exif\0\0" + exif.removeprefix(b"Exif\0\0") if exif else None
    except Exception:       # invalid EXIF can make Pillow raise nearly any exception
        return orientation, None


def read_text(im, orientation):
    """Read text of a loaded image -> (XMP bytes with orientation 1, or None; {keyword: PNG text})."""
    xmp = im.info.get("xmp") or im.info.get(PNG_XMP)
    if isinstance(xmp, str):
        xmp = xmp.encode()
    if xmp and orientation != 1:
        xmp = re.sub(rb'(tiff:Orientation(?:="|>))[2-8]', rb"\g<1>1", xmp)
    text = im.text if im.format == "PNG" else {}
    return xmp or None, {keyword: str(value) for keyword, value in text.items() if keyword != PNG_XMP}


def apply_orientation(pixels, orientation):
    """Turn or mirror pixels (H, W, C) as the EXIF orientation 1..8 says."""
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    quarter_turns = {3: 2, 4: 2, 6: 3, 7: 2, 8: 1}.get(orientation, 0)      # counterclockwise
    pixels = np.rot90(pixels, quarter_turns)
    return pixels[:, ::-1] if orientation in (2, 4) else pixels


def to_tensor(pixels):
    """Convert (H, W, C) uint8 or uint16 to (C, H, W) float32 in [0, 1]; row blocks bound the memory."""
    height, width, channels = pixels.shape
    x = torch.empty(channels, height, width)
    for y in range(0, height, 256):
        rows = torch.from_numpy(pixels[y:y + 256].astype(np.float32, order="C"))
        x[:, y:y + 256] = rows.permute(2, 0, 1) / (65535 if pixels.dtype == np.uint16 else 255)
    return x


def picture_size(path):
    """Return (height, width) of a picture, orientation applied, from its header; (0, 0) if not readable."""
    if not os.path.isfile(path):
        return 0, 0
    for file, _ in readable_copies(path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(file) as im:
                    # PngImageFile.getexif() decodes the whole picture; the one of the base class does not.
                    orientation = Image.Image.getexif(im).get(ORIENTATION, 1)
                    turned = orientation in (5, 6, 7, 8) and im.format != "TIFF"    # Pillow turns TIFF itself
                    return im.size if turned else im.size[::-1]
        except Exception:       # read_picture() reports the reason
            continue
    return 0, 0


# ------------------------------------------------------------------ color

def color_space(icc):
    """Return the color space of a raw ICC profile: b"RGB ", b"GRAY", b"CMYK", ...; b"" without a profile."""
    return (icc or b"")[16:20]


def convert_to_srgb(im, icc):
    """Convert an 8-bit Pillow image (gray, RGB, CMYK) by its ICC profile -> (sRGB image, profile name).

    Return None if the profile is invalid or this Pillow cannot convert.
    """
    try:
        from PIL import ImageCms
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc or b""))
        if im.mode == "L" and color_space(icc) == b"RGB ":
            im = im.convert("RGB")
        name = " ".join(ImageCms.getProfileDescription(profile).split())
        return ImageCms.profileToProfile(im, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"), name
    except Exception:       # the color engine has its own exception classes
        return None


def pixels_to_srgb(pixels, icc):
    """Convert 8-bit pixels (H, W, C) to sRGB -> (pixels, None or the profile that still applies, note)."""
    if pixels.dtype != np.uint8:
        return pixels, icc, "profile kept, 16 bit"
    channels = 1 if pixels.shape[2] < 3 else 3      # without alpha
    colors = np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels[..., :3])
    converted = convert_to_srgb(Image.fromarray(colors), icc)
    if not converted:
        return pixels, icc, "profile kept, it is invalid"
    im, name = converted
    pixels = np.concatenate([np.asarray(im)[..., :channels], pixels[..., channels:]], -1)
    return pixels, None, f"{name} converted to sRGB"


def composite(picture, background):
    """Blend a Picture over a background (a number, (r, g, b), or (3, H, W), in [0, 1]) -> (3, H, W)."""
    if picture.alpha is None:
        return picture.rgb
    background = torch.as_tensor(background, dtype=picture.rgb.dtype)
    if background.ndim < 3:
        background = background.reshape(-1, 1, 1)
    return picture.rgb * picture.alpha + background * (1 - picture.alpha)


# ------------------------------------------------------------------ saving

def save_picture(path, picture, quality=95):
    """Save a Picture to a file. See save_strips()."""
    planes = [picture.rgb] if picture.alpha is None else [picture.rgb, picture.alpha]
    size = picture.rgb.shape[1:]
    strips = (torch.cat([plane[:, y:y + 256] for plane in planes]) for y in range(0, size[0], 256))
    save_strips(path, strips, size, picture, quality)


def save_strips(path, strips, size, picture, quality=95, dither=False):
    """Save strips (3 or, with alpha, 4, h, W), top to bottom, as a file of size (H, W), complete or absent.

    The suffix selects the format (WRITE_FORMATS). `picture` gives everything but the pixels; left_behind()
    lists what the format cannot hold. PNG is written strip by strip. JPEG has no alpha, so the picture is
    blended over white. quality: 1..100 for JPEG (always 4:4:4, for thin colored lines), WebP, and AVIF.
    dither: see quantize(). Raises PictureError if the format is unknown or too small for the picture, and
    OSError if the file cannot be written.
    """
    path = Path(path)
    format = WRITE_FORMATS.get(path.suffix.lower())
    if format is None:
        raise PictureError(f"{printable(path)}: cannot save as {path.suffix or 'a file without suffix'}; "
                           f"use one of {' '.join(WRITE_FORMATS)}")
    Image.init()
    if format not in Image.SAVE:
        raise PictureError(f"{printable(path)}: this Pillow cannot write {format}; save as .png")
    if max(size) > MAX_SIDE[format]:
        raise PictureError(f"{printable(path)}: {format} holds at most {MAX_SIDE[format]} pixels a side; "
                           "save as .png")
    gray = stored_gray(picture, format)
    alpha = picture.alpha is not None and format != "JPEG"
    depth = 16 if picture.depth == 16 and format == "PNG" else 8
    channels = (1 if gray else 3) + alpha
    rows = quantized_rows(strips, gray, alpha, depth, dither)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        if format == "PNG":
            write_png(file, rows, size, channels, depth, stored_metadata(picture, format), picture.text)
        else:
            write_with_pillow(file, path, rows, size, channels, quality, stored_metadata(picture, format))


def stored_gray(picture, format):
    """Whether a file of this format stores the picture as gray. An RGB profile needs RGB pixels."""
    return picture.gray and format in ("PNG", "JPEG") and color_space(picture.icc) != b"RGB "


def stored_metadata(picture, format):
    """The icc, exif, and xmp (bytes or None) that a file of this format can hold -> dict."""
    icc, exif, xmp = picture.icc, picture.exif, picture.xmp
    if color_space(icc) != (b"GRAY" if stored_gray(picture, format) else b"RGB "):
        icc = None
    if format == "JPEG" and len(exif or b"") > MAX_JPEG_EXIF:
        exif = None
    if format == "JPEG" and len(xmp or b"") > MAX_JPEG_XMP:
        xmp = None
    return {"icc": icc, "exif": exif, "xmp": xmp}


def left_behind(picture, path):
    """Return what a file with the suffix of `path` cannot hold of the picture, as a list of phrases."""
    format = WRITE_FORMATS[Path(path).suffix.lower()]
    stored = stored_metadata(picture, format)
    phrases = []
    if format == "JPEG" and picture.alpha is not None:
        phrases.append("transparency blended over white")
    if format != "PNG" and picture.depth == 16:
        phrases.append("16 bit reduced to 8")
    for name, label in (("icc", "ICC profile"), ("exif", "EXIF"), ("xmp", "XMP")):
        if getattr(picture, name) and not stored[name]:
            phrases.append(f"{label} left behind")
    if format != "PNG" and picture.text:
        phrases.append(f"PNG text left behind: {printable(', '.join(picture.text))}")
    return phrases


def quantized_rows(strips, gray, alpha, depth, dither):
    """Convert strips (3 or 4, h, W) to arrays (h, W, C) of uint8 or uint16 with at most 16 rows each."""
    y = 0
    for strip in strips:
        for rows in strip.split(16, 1):
            rgb, a = rows[:3], rows[3:]
            if len(a) and not alpha:
                rgb, a = rgb * a + 1 - a, a[:0]
            if gray:
                rgb = rgb.mean(0, keepdim=True)
            rgb = quantize(rgb, depth, y if dither and depth == 8 else None)
            yield np.concatenate([rgb, quantize(a, depth)], -1)
            y += rows.shape[1]
        del strip, rows, a      # free the strip before the next one is computed


def quantize(x, depth, dither_row=None):
    """Convert (C, h, W) float in [0, 1] to (h, W, C) uint8 (depth 8) or uint16 (depth 16).

    Round to the nearest level. With dither_row (the row of the picture at which x begins), add interleaved
    gradient noise (Jimenez, SIGGRAPH 2014) instead, so that soft gradients show no bands. Exact levels do not
    change.
    """
    x = x.detach().float().cpu().permute(1, 2, 0).clamp(0, 1).mul(2**depth - 1).numpy()
    if dither_row is None:
        x = x.round()
    else:
        rows, columns, channels = np.ogrid[dither_row:dither_row + x.shape[0], :x.shape[1], :x.shape[2]]
        phase = (columns + 5.588238 * channels) * 0.06711056
        noise = (52.9829189 * ((phase + rows * 0.00583715) % 1) % 1).astype(np.float32)
        x = np.floor(x + noise * 0.999 + 0.0005)    # the margins absorb rounding errors of exact levels
    return x.astype(np.uint16 if depth == 16 else np.uint8)


def to_uint8(x):
    """Convert (3, H, W) float in [0, 1] to a uint8 array (H, W, 3)."""
    return quantize(x, 8)


def write_with_pillow(file, path, rows, size, channels, quality, metadata):
    """Write rows (h, W, C) as JPEG, WebP, or AVIF with metadata. Raises PictureError and OSError."""
    format = WRITE_FORMATS[path.suffix.lower()]
    pixels, y = np.empty((*size, channels), np.uint8), 0
    for array in rows:
        pixels[y:y + len(array)] = array
        y += len(array)
    options = {"JPEG": {"subsampling": 0}, "AVIF": {"subsampling": "4:4:4"}}.get(format, {})
    for key, data in (("icc_profile", metadata["icc"]), ("exif", metadata["exif"]), ("xmp", metadata["xmp"])):
        if data:
            options[key] = data
    memory = io.BytesIO()       # when Pillow writes to a full disk itself, the reason is lost
    try:
        im = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
        im.save(memory, format, quality=quality, **options)
    except (OSError, ValueError, KeyError) as error:
        raise PictureError(f"{printable(path)}: Pillow cannot write this {format}: {error}") from error
    file.write(memory.getbuffer())


def write_png(file, rows, size, channels, depth, metadata, text):
    """Write arrays (h, W, C) of uint8 or uint16 as PNG, a few rows at a time.

    Pillow needs the whole picture at once and writes 16 bit for gray only.
    """
    def write_chunk(name, data):
        checksum = zlib.crc32(name + data)
        file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum))

    height, width = size
    color_type = (0, 4, 2, 6)[channels - 1]
    file.write(PNG_SIGNATURE)
    write_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    if metadata["icc"]:
        write_chunk(b"iCCP", b"ICC\0\0" + zlib.compress(metadata["icc"]))
    if metadata["exif"]:
        write_chunk(b"eXIf", metadata["exif"].removeprefix(b"Exif\0\0"))
    if metadata["xmp"]:
        write_chunk(b"iTXt", PNG_XMP.encode() + b"\0\0\0\0\0" + metadata["xmp"])
    for keyword, value in text.items():
        keyword = keyword.encode("latin-1", "replace")[:79]
        try:
            write_chunk(b"tEXt", keyword + b"\0" + value.encode("latin-1"))
        except UnicodeEncodeError:
            write_chunk(b"iTXt", keyword + b"\0\0\0\0\0" + value.encode("utf-8", "replace"))

    compressor, above = zlib.compressobj(6), np.zeros((1, width * channels * depth // 8), np.int16)
    for array in rows:
        samples = array.astype(f">u{depth // 8}").reshape(-1, width * channels)     # PNG is big-endian
        samples = samples.view(np.uint8).astype(np.int16)
        compressed = compressor.compress(filter_png_rows(samples, above, channels * depth // 8).tobytes())
        if compressed:
            write_chunk(b"IDAT", compressed)
        above = samples[-1:]
    write_chunk(b"IDAT", compressor.flush())
    write_chunk(b"IEND", b"")


def filter_png_rows(rows, above, pixel_bytes):
    """Filter rows of bytes (h, n) int16 after the row `above` (1, n) -> (h, 1 + n) uint8, filter type first.

    Choose Sub, Up, or Paeth for each row: the one with the smallest sum of residuals.
    """
    up = np.concatenate([above, rows[:-1]])
    left, corner = (np.pad(a, ((0, 0), (pixel_bytes, 0)))[:, :rows.shape[1]] for a in (rows, up))
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    paeth = np.where(to_up <= to_corner, up, corner)
    paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, paeth)
    residuals = np.stack([(rows - guess).astype(np.uint8) for guess in (left, up, paeth)])
    best = np.minimum(residuals, -residuals).sum(2, dtype=np.int64).argmin(0)
    filter_types = np.uint8([1, 2, 4])[best][:, None]
    return np.concatenate([filter_types, residuals[best, np.arange(len(rows))]], 1)


# ------------------------------------------------------------------ terminal

class ProgressLine:
    """Show progress on stderr: one line that is rewritten in a terminal, else a line every 30 seconds."""

    def __init__(self):
        self.last_time = time.time()

    def __call__(self, text):
        terminal, now = sys.stderr.isatty(), time.time()
        if now - self.last_time < (0.1 if terminal else 30):
            return
        self.last_time = now
        line = f"\r\033[K\033[?7l{text}\033[?7h" if terminal else text
        print(line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    @staticmethod
    def clear():
        """Erase the line, so that a message can be printed."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def fail(message):
    """Print one line on stderr and exit with code 2."""
    ProgressLine.clear()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
