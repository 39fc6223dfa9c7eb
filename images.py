"""Find, read and save pictures: one color path for alpha, gray, 16 bit, ICC profiles and EXIF.

    picture = read_picture("wallpaper.png")             # Picture: rgb (3, H, W) float32 in [0, 1], alpha, profile
    save_picture("copy.png", picture)

Needs torch, numpy and Pillow; copy this file and it works alone.
"""
import contextlib
import io
import os
import struct
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
WRITE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
MAX_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383, "AVIF": 32768}
ORIENTATION = 0x0112  # the EXIF tag
TIFF_TAGS = {270, 305, 306, 315, 33432}  # kept of a TIFF's: description, software, date, artist, copyright


# ------------------------------------------------------------------ pictures in and out

class UserError(ValueError):
    """A mistake of the user, such as a wrong path or flag. The message is one line; commands print it without a
    traceback and exit with code 2."""


class PictureError(UserError):
    """A picture that cannot be read or saved: one line that names the file."""


@dataclass
class Picture:
    """rgb (3, H, W) float32 in [0, 1], its orientation applied. alpha (1, H, W) in [0, 1] or None. gray and depth
    (8 or 16) say how it was stored and will be stored. icc and exif are the raw profiles or None. note says what
    reading changed or left behind."""
    rgb: torch.Tensor
    alpha: torch.Tensor | None = None
    gray: bool = False
    depth: int = 8
    icc: bytes | None = None
    exif: bytes | None = None
    note: str = ""


def printable(path):
    """A file name fit for one line: line breaks and broken bytes escaped, Japanese left alone."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def as_paths(given):
    """One path, or several -> [Path]."""
    return [Path(p) for p in ([given] if isinstance(given, (str, os.PathLike)) else given)]


def find_pictures(paths):
    """Files and folders (a Path, or a list) -> sorted list of Paths, each once. Folders are searched to the bottom for
    the suffixes in READ_SUFFIXES, through links but never in circles; hidden files are passed over; a file named outright
    is taken whatever its suffix. Raises PictureError for a path that does not exist or cannot be listed."""
    def refuse(error):
        raise PictureError(f"{printable(error.filename)}: {error.strerror}")

    found, visited = set(), set()
    for path in as_paths(paths):
        if not os.path.isdir(path):  # those of Path raise where a name is too long
            if not os.path.exists(path):
                raise PictureError(f"{printable(path)}: no such file or folder")
            found.add(path)
            continue
        for folder, below, names in os.walk(path, followlinks=True, onerror=refuse):
            real = os.path.realpath(folder)
            if real in visited:
                below.clear()
                continue
            visited.add(real)
            below[:] = sorted(name for name in below if name[0] != ".")
            found.update(Path(folder, n) for n in names if Path(n).suffix.lower() in READ_SUFFIXES and n[0] != ".")
    return sorted(found)


def read_samples(im, path):
    """An open Pillow image -> uint8 or uint16 array (H, W, C): C is 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA."""
    *place, stored = im.tile[0] if im.format == "PNG" and im.tile else [None]  # how a PNG's read_samples lie, to Pillow
    im.load()
    see_through = "transparency" in im.info
    if see_through and stored in ("L;2", "L;4"):  # Pillow stretches the pixels to 8 bits, but not this
        im.info["transparency"] *= 85 if stored == "L;2" else 17
    if stored in ("RGB;16B", "RGBA;16B", "LA;16B"):
        # Pillow keeps the high bytes only. Read once more, telling it to unpack the low ones (big-endian read_samples
        # taken for little-endian), or for gray and alpha all four bytes of a pixel.
        with Image.open(path) as again:
            again.tile = [(*place, "RGBA" if stored == "LA;16B" else stored.replace("16B", "16L"))]
            low = np.asarray(again).astype(np.uint16)
        if stored == "LA;16B":
            return low[..., 0::2] << 8 | low[..., 1::2]
        pixels = np.asarray(im).astype(np.uint16) << 8 | low
    elif im.mode[0] == "I":  # I;16 and its byte orders; I in older Pillows
        if im.mode == "I" and im.getextrema()[1] > 65535:
            raise ValueError("32-bit read_samples have no agreed range; save it as 8 or 16 bit")
        pixels = np.asarray(im).clip(0, 65535).astype(np.uint16)[..., None]
    elif im.mode == "F":
        raise ValueError("floating-point read_samples have no agreed range; save it as 8 or 16 bit")
    else:
        gray = im.mode in ("1", "L", "LA", "La")
        clear = see_through or im.mode in ("LA", "La", "RGBA", "RGBa", "PA")
        mode = ("L" if gray else "RGB") + ("A" if clear else "")
        if see_through and gray:
            im = im.convert("RGBA")  # straight to LA Pillow forgets the transparent color
        pixels = np.asarray(im if im.mode == mode else im.convert(mode))
        return pixels if pixels.ndim == 3 else pixels[..., None]
    if see_through:  # 16 bit: one color stands for transparent
        opaque = (pixels != np.array(im.info["transparency"], np.uint16)).any(-1, keepdims=True)
        pixels = np.concatenate([pixels, opaque.astype(np.uint16) * 65535], -1)
    return pixels


def read_exif(im):
    """-> (orientation 1..8, EXIF bytes with the orientation reset, or None). EXIF that makes no sense is dropped, of
    a TIFF's all but TIFF_TAGS."""
    orientation = 1
    try:
        tags, exif = im.getexif(), im.info.get("exif")
        orientation = tags.get(ORIENTATION, 1)
        if im.format == "TIFF":  # most of its tags say how its pixels lie
            kept = Image.Exif()
            kept.update({tag: tags[tag] for tag in TIFF_TAGS & tags.keys()})
            return orientation, kept.tobytes() if kept else None
        if orientation != 1 and exif:
            tags[ORIENTATION] = 1
            exif = tags.tobytes()
        return orientation, b"Exif\0\0" + exif.removeprefix(b"Exif\0\0") if exif else None  # WebP has it without
    except Exception:  # again, nearly anything; a tag that cannot be written leaves the picture as it stands
        return orientation, None


def apply_orientation(pixels, orientation):
    """(H, W, C) as stored -> as it is meant to be seen (EXIF orientation 1..8)."""
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    turns = {3: 2, 4: 2, 6: 3, 7: 2, 8: 1}.get(orientation, 0)  # quarter turns, counterclockwise
    pixels = np.rot90(pixels, turns)
    return pixels[:, ::-1] if orientation in (2, 4) else pixels


def color_space(icc):
    """What a raw ICC profile (or None) is for: b"RGB ", b"GRAY", b"CMYK"; nonsense of nonsense."""
    return (icc or b"")[16:20]


def convert_to_srgb(im, icc):
    """An 8-bit image, gray, RGB or CMYK, and its profile -> (the image in sRGB, the profile's name), or None where the
    profile makes no sense or this Pillow cannot convert."""
    try:
        from PIL import ImageCms
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if im.mode == "L" and color_space(icc) == b"RGB ":
            im = im.convert("RGB")
        name = " ".join(ImageCms.getProfileDescription(profile).split())
        return ImageCms.profileToProfile(im, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"), name
    except Exception:  # lcms raises its own kinds
        return None


def read_picture(path, srgb=False):
    """File -> Picture: PNG, JPEG, WebP, AVIF, BMP, TIFF, GIF (first frame), whatever their mode; 16-bit PNGs at full
    depth. Colors keep their profile, with srgb they are converted by it (8 bit only); CMYK is always converted.
    Raises PictureError when the file is missing, cut short, not a picture, or larger than Pillow's bomb limit."""
    path, notes = Path(path), []
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        if path.stat().st_size == 0:
            raise ValueError("an empty file (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as im:
                if im.format == "EPS":  # whatever its suffix; Pillow would run Ghostscript on it
                    raise ValueError("PostScript, not a picture")
                cmyk = im.mode == "CMYK"
                by_profile = convert_to_srgb(im, im.info.get("icc_profile") or b"") if cmyk else None
                pixels = np.asarray(by_profile[0]) if by_profile else read_samples(im, path)
                icc = im.info.get("icc_profile") or b""
                orientation, exif = read_exif(im)
                if im.format == "TIFF" and pixels.dtype == np.uint8 and max(im.tag_v2.get(258, (8,))) == 16:
                    notes.append("16-bit TIFF read as 8 bit; PNG keeps them")
                odd = abs(im.info.get("gamma", 1 / 2.2) * 2.2 - 1) > 0.05
                if im.format == "PNG" and odd and not icc and "srgb" not in im.info:
                    notes.append("gamma of the file left behind")
                if getattr(im, "n_frames", 1) > 1:
                    notes.append(f"first of {im.n_frames} frames")
            del im
    except Image.UnidentifiedImageError:
        raise PictureError(f"{printable(path)}: not a picture, or of a kind that Pillow cannot read") from None
    except Exception as e:  # broken files make Pillow raise nearly anything
        reason = getattr(e, "strerror", None) or " ".join(str(e).split()) or type(e).__name__
        raise PictureError(f"{printable(path)}: {reason}") from e
    if cmyk or color_space(icc) not in (b"RGB ", b"GRAY"):
        icc = None
    if cmyk:
        notes.append(f"CMYK converted to sRGB {f'by its profile {by_profile[1]}' if by_profile else 'without profile'}")
    elif srgb and icc:
        n = 1 if pixels.shape[2] < 3 else 3     # without alpha
        colors = np.ascontiguousarray(pixels[..., 0] if n == 1 else pixels[..., :3])
        by_profile = pixels.dtype == np.uint8 and convert_to_srgb(Image.fromarray(colors), icc)
        if by_profile:
            pixels, icc = np.concatenate([np.asarray(by_profile[0])[..., :n], pixels[..., n:]], -1), None
            notes.append(f"{by_profile[1]} converted to sRGB")
        else:
            notes.append("profile kept, " + ("it makes no sense" if pixels.dtype == np.uint8 else "16 bit"))
    depth = 16 if pixels.dtype == np.uint16 else 8
    pixels = apply_orientation(pixels, orientation)
    try:
        x = torch.empty(pixels.shape[2], *pixels.shape[:2])
    except RuntimeError:
        raise PictureError(f"{printable(path)}: {pixels.shape[1]}x{pixels.shape[0]} is too large for the memory there is") from None
    for y in range(0, x.shape[1], 256):
        rows = torch.from_numpy(pixels[y:y + 256].astype(np.float32, order="C"))
        x[:, y:y + 256] = rows.permute(2, 0, 1) / (65535 if depth == 16 else 255)
    gray, alpha = len(x) < 3, x[-1:].clone() if len(x) in (2, 4) else None
    rgb = x[:1].repeat(3, 1, 1) if gray else x[:3]
    return Picture(rgb, alpha, gray, depth, icc, exif, "; ".join(notes))


def picture_size(path):
    """(height, width) of a picture, its orientation applied, from its header alone; (0, 0) where that cannot be read."""
    if not os.path.isfile(path):
        return 0, 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as im:
                orientation = Image.Image.getexif(im).get(ORIENTATION, 1)  # PNG's own getexif decodes the picture
                return im.size if orientation in (5, 6, 7, 8) and im.format != "TIFF" else im.size[::-1]  # Pillow has apply_orientation TIFF's
    except Exception:  # read_picture will say what is wrong
        return 0, 0


def composite(picture, ground):
    """Picture over a ground: a number, an (r, g, b), or a (3, H, W) tensor, in [0, 1] -> (3, H, W)."""
    if picture.alpha is None:
        return picture.rgb
    ground = torch.as_tensor(ground, dtype=picture.rgb.dtype)
    ground = ground.reshape(-1, 1, 1) if ground.ndim < 3 else ground
    return picture.rgb * picture.alpha + ground * (1 - picture.alpha)


@contextlib.contextmanager
def atomic_path(path):
    """A temporary name beside path; becomes path if the block ends well, disappears if it does not."""
    part = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save_picture(path, picture, quality=95):
    """Picture -> file; see save_strips."""
    planes = [picture.rgb] if picture.alpha is None else [picture.rgb, picture.alpha]
    size = picture.rgb.shape[1:]
    save_strips(path, (torch.cat([p[:, y:y + 256] for p in planes]) for y in range(0, size[0], 256)), size, picture,
                quality)


def save_strips(path, strips, size, picture, quality=95, dither=False):
    """Strips (3 or, with alpha, 4, h, W) from top to bottom -> file of this size (H, W), its format by the suffix: .png
    .jpg .jpeg .webp .avif; complete or not at all. What else the file is to hold, picture says (its pixels apart).

    PNG is written strip by strip and keeps 16 bit, PNG and JPEG keep gray, all but JPEG keep alpha: there the picture
    is laid on white. quality is for JPEG (always 4:4:4, thin colored lines need it), WebP and AVIF. dither: 8-bit
    colors are not rounded but scattered between the two nearest levels, so that soft gradients show no bands.
    Raises PictureError for what the format cannot hold, before the first strip is asked for, and OSError when the file
    cannot be written."""
    path, (height, width) = Path(path), size
    kind = WRITE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise PictureError(f"{printable(path)}: cannot save as {path.suffix or 'a file without suffix'}; "
                           f"use one of {' '.join(WRITE_FORMATS)}")
    if max(size) > MAX_SIDE[kind]:
        raise PictureError(f"{printable(path)}: {kind} holds at most {MAX_SIDE[kind]} pixels a side; save as .png")
    gray = picture.gray and kind in ("PNG", "JPEG")
    alpha = picture.alpha is not None and kind != "JPEG"
    depth = 16 if picture.depth == 16 and kind == "PNG" else 8
    icc = picture.icc if color_space(picture.icc) == (b"GRAY" if gray else b"RGB ") else None
    exif = picture.exif if kind != "JPEG" or len(picture.exif or b"") < 65534 else None  # one JPEG segment

    def arrays():
        y = 0
        for strip in strips:
            for rows in strip.split(16, 1):
                rgb, a = rows[:3], rows[3:]
                if len(a) and not alpha:
                    rgb, a = rgb * a + 1 - a, a[:0]
                rgb = quantize(rgb.mean(0, keepdim=True) if gray else rgb, depth, y if dither and depth == 8 else None)
                yield np.concatenate([rgb, quantize(a, depth)], -1)
                y += rows.shape[1]
            del strip, rows, a

    channels = (1 if gray else 3) + alpha
    with atomic_path(path) as part, open(part, "wb") as file:
        if kind == "PNG":
            return write_png_strips(file, arrays(), height, width, channels, depth, icc, exif)
        pixels, y = np.empty((height, width, channels), np.uint8), 0
        for array in arrays():
            pixels[y:y + len(array)] = array
            y += len(array)
        memory = io.BytesIO()  # Pillow writing straight to a full disk loses the reason
        extra = {"JPEG": {"subsampling": 0}, "AVIF": {"subsampling": "4:4:4"}}.get(kind, {})
        extra |= {k: v for k, v in (("icc_profile", icc), ("exif", exif)) if v}
        try:
            im = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
            im.save(memory, kind, quality=quality, **extra)
        except (OSError, ValueError, KeyError) as e:
            raise PictureError(f"{printable(path)}: Pillow cannot write this {kind}: {e}") from e
        file.write(memory.getbuffer())


def quantize(x, depth, dither_at=None):
    """(c, h, w) in [0, 1] -> array (h, w, c) of uint8 or uint16: rounded, or from row dither_at of its picture on
    scattered by interleaved gradient noise (Jimenez, SIGGRAPH 2014), which looks even and depends on the place only;
    whole levels, such as flat black and white, stay as they are."""
    x = x.detach().float().cpu().permute(1, 2, 0).clamp(0, 1).mul(2**depth - 1).numpy()
    if dither_at is None:
        x = x.round()
    else:
        rows, columns, c = np.ogrid[dither_at:dither_at + x.shape[0], :x.shape[1], :x.shape[2]]
        across = (columns + 5.588238 * c) * 0.06711056
        noise = (52.9829189 * ((across + rows * 0.00583715) % 1) % 1).astype(np.float32)
        x = np.floor(x + noise * 0.999 + 0.0005)  # a whole level less some rounding error is one still
    return x.astype(np.uint16 if depth == 16 else np.uint8)


def write_png_strips(file, strips, height, width, channels, depth, icc, exif):
    """Arrays (h, W, 1..4) of uint8 or uint16 as PNG, a few rows at a time as they come; each row filtered by Sub, Up or
    Paeth, whichever leaves least. Pillow would want the whole picture, and writes 16 bit for gray only."""
    def chunk(kind, data):
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, (0, 4, 2, 6)[channels - 1], 0, 0, 0))
    if icc:
        chunk(b"iCCP", b"ICC\0\0" + zlib.compress(icc))
    if exif:
        chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    packer, pixel = zlib.compressobj(6), channels * depth // 8
    above = np.zeros((1, width * pixel), np.int16)
    for rows in strips:
        rows = rows.astype(f">u{depth // 8}").reshape(-1, width * channels).view(np.uint8).astype(np.int16)
        up = np.concatenate([above, rows[:-1]])
        left, corner = (np.pad(a, ((0, 0), (pixel, 0)))[:, :rows.shape[1]] for a in (rows, up))
        to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
        paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
        rests = np.stack([(rows - guess).astype(np.uint8) for guess in (left, up, paeth)])
        best = np.minimum(rests, -rests).sum(2, dtype=np.int64).argmin(0)
        filtered = np.concatenate([np.uint8([1, 2, 4])[best][:, None], rests[best, np.arange(len(rows))]], 1)
        if packed := packer.compress(filtered.tobytes()):
            chunk(b"IDAT", packed)
        above = rows[-1:]
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


def write_atomic(path, data):
    """Write bytes to a file that is either complete or absent; create its folder if needed. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part, open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())     # a power cut must not leave the new name with nothing behind it


def to_uint8(x):
    """Convert (3, H, W) float in [0, 1] to a uint8 array (H, W, 3)."""
    return quantize(x, 8)


class ProgressLine:
    """Show long work on stderr: one line that is rewritten on a terminal, else one line every 30 seconds."""

    def __init__(self):
        self.shown = time.time()

    def __call__(self, text):
        terminal, now = sys.stderr.isatty(), time.time()
        if now - self.shown < (0.1 if terminal else 30):
            return
        self.shown = now
        line = f"\r\033[K\033[?7l{text}\033[?7h" if terminal else text
        print(line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    @staticmethod
    def clear():
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def fail(message):
    """Print one line on stderr and end the process with exit code 2."""
    ProgressLine.clear()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
