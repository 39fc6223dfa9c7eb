"""Any picture, any size, through a model without seams. Three rooms: pictures in and out (the only place where
they are opened and saved), the tiler, the upscaling command.

    python tile.py wallpaper.png -o bigger.png
    python tile.py folder more/pictures -o big --weights runs/NAME/best.safetensors

Needs torch, numpy, Pillow. Copied alone it works with any forward(x) that makes (b, 3, h, w) scale times larger;
only the command wants model.py beside it.
"""
import argparse
import contextlib
import ctypes
import io
import os
import struct
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

READS = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
WRITES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
LONGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65535, "WEBP": 16383, "AVIF": 65536}
ORIENTATION = 0x0112  # the EXIF tag


# ------------------------------------------------------------------ pictures in and out

class PictureError(ValueError):
    """A picture that cannot be read or saved: one line that names the file."""


@dataclass
class Picture:
    """rgb (3, H, W) float32 in [0, 1], its orientation applied. alpha (1, H, W) in [0, 1] or None. grey and depth
    (8 or 16) say how it was stored and will be stored. icc and exif are the raw profiles or None."""
    rgb: torch.Tensor
    alpha: torch.Tensor | None = None
    grey: bool = False
    depth: int = 8
    icc: bytes | None = None
    exif: bytes | None = None


def printable(path):
    """A file name fit for one line: line breaks and broken bytes escaped, Japanese left alone."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def find_pictures(paths):
    """Files and folders (a Path, or a list) -> sorted list of Paths, each once. Folders are searched to the bottom for
    the suffixes in READS, through links but never in circles; hidden files are passed over; a file named outright
    is taken whatever its suffix. Raises PictureError for a path that does not exist or cannot be listed."""
    def refuse(error):
        raise PictureError(f"{printable(error.filename)}: {error.strerror}")

    found, visited = set(), set()
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if not path.is_dir():
            if not path.exists():
                raise PictureError(f"{printable(path)}: no such file or folder")
            found.add(path)
            continue
        for folder, below, names in os.walk(path, followlinks=True, onerror=refuse):
            real = os.path.realpath(folder)
            if real in visited:
                below.clear()
                continue
            visited.add(real)
            below.sort()
            found.update(Path(folder, n) for n in names if Path(n).suffix.lower() in READS and n[0] != ".")
    return sorted(found)


def samples(im, path):
    """An open Pillow image -> uint8 or uint16 array (H, W, C): C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    tile = im.tile[0] if im.format == "PNG" and im.tile else (None,) * 4
    im.load()
    see_through = "transparency" in im.info
    if tile[3] in ("RGB;16B", "RGBA;16B", "LA;16B"):
        # Pillow keeps the high bytes only. Read once more, telling it to unpack the low ones (big-endian samples
        # taken for little-endian), or for grey and alpha all four bytes of a pixel.
        with Image.open(path) as again:
            again.tile = [(*tile[:3], "RGBA" if tile[3] == "LA;16B" else tile[3].replace("16B", "16L"))]
            low = np.asarray(again).astype(np.uint16)
        if tile[3] == "LA;16B":
            return low[..., 0::2] << 8 | low[..., 1::2]
        pixels = np.asarray(im).astype(np.uint16) << 8 | low
    elif im.mode[0] == "I":  # I;16 and its byte orders; I in older Pillows
        pixels = np.asarray(im).clip(0, 65535).astype(np.uint16)[..., None]
    elif im.mode == "F":
        raise ValueError("floating-point samples have no agreed range; save it as 8 or 16 bit")
    else:
        grey = im.mode in ("1", "L", "LA", "La")
        clear = see_through or im.mode in ("LA", "La", "RGBA", "RGBa", "PA")
        mode = ("LA" if clear else "L") if grey else ("RGBA" if clear else "RGB")
        if see_through and grey:
            im = im.convert("RGBA")  # straight to LA Pillow forgets the transparent colour
        pixels = np.asarray(im if im.mode == mode else im.convert(mode))
        return pixels if pixels.ndim == 3 else pixels[..., None]
    if see_through:  # 16 bit: one colour stands for transparent
        opaque = (pixels != np.array(im.info["transparency"], np.uint16)).any(-1, keepdims=True)
        pixels = np.concatenate([pixels, opaque.astype(np.uint16) * 65535], -1)
    return pixels


def exif_of(im):
    """-> (orientation 1..8, EXIF bytes with the orientation reset, or None). EXIF that makes no sense is dropped."""
    try:
        tags, exif = im.getexif(), im.info.get("exif")
        orientation = tags.get(ORIENTATION, 1)
        if orientation != 1 and exif:
            tags[ORIENTATION] = 1
            exif = tags.tobytes()
        return orientation, exif or None
    except Exception:  # again, nearly anything
        return 1, None


def turned(pixels, orientation):
    """(H, W, C) as stored -> as it is meant to be seen (EXIF orientation 1..8)."""
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    turns = {3: 2, 4: 2, 6: 3, 7: 2, 8: 1}.get(orientation, 0)  # quarter turns, counterclockwise
    pixels = np.rot90(pixels, turns)
    return pixels[:, ::-1] if orientation in (2, 4) else pixels


def read_picture(path):
    """File -> Picture: PNG, JPEG, WebP, AVIF, BMP, TIFF, GIF (first frame), whatever their mode; 16-bit PNGs at full
    depth. A profile that does not fit RGB or grey (CMYK's, say) is left behind, the rest are kept as they are.
    Raises PictureError when the file is missing, cut short, not a picture, or larger than Pillow's bomb limit."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        if path.stat().st_size == 0:
            raise ValueError("an empty file (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as im:
                pixels = samples(im, path)
                icc = im.info.get("icc_profile") or b""
                orientation, exif = exif_of(im)
    except Image.UnidentifiedImageError:
        raise PictureError(f"{printable(path)}: not a picture, or of a kind that Pillow cannot read") from None
    except Exception as e:  # broken files make Pillow raise nearly anything
        reason = getattr(e, "strerror", None) or " ".join(str(e).split()) or type(e).__name__
        raise PictureError(f"{printable(path)}: {reason}") from e
    depth = 16 if pixels.dtype == np.uint16 else 8
    pixels = np.ascontiguousarray(turned(pixels, orientation).transpose(2, 0, 1))
    x = torch.from_numpy(pixels.astype(np.float32)).div_(65535 if depth == 16 else 255)
    grey, alpha = len(x) < 3, x[-1:].clone() if len(x) in (2, 4) else None
    rgb = x[:1].repeat(3, 1, 1) if grey else x[:3]
    return Picture(rgb, alpha, grey, depth, icc if icc[16:20] in (b"RGB ", b"GRAY") else None, exif)


def composite(picture, ground):
    """Picture over a ground: a number, an (r, g, b), or a (3, H, W) tensor, in [0, 1] -> (3, H, W)."""
    if picture.alpha is None:
        return picture.rgb
    ground = torch.as_tensor(ground, dtype=picture.rgb.dtype)
    ground = ground.reshape(-1, 1, 1) if ground.ndim < 3 else ground
    return picture.rgb * picture.alpha + ground * (1 - picture.alpha)


@contextlib.contextmanager
def replacing(path):
    """A temporary name beside path; becomes path if the block ends well, disappears if it does not."""
    part = path.with_name(f".{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def save_picture(path, picture, quality=95):
    """Picture -> file, its format by the suffix: .png .jpg .jpeg .webp .avif; complete or not at all.

    PNG keeps 16 bit, PNG and JPEG keep grey, all but JPEG keep alpha: there the picture is laid on white. quality is
    for JPEG (always 4:4:4, thin coloured lines need it), WebP and AVIF. Raises PictureError for what the format
    cannot hold, OSError when the file cannot be written."""
    path = Path(path)
    kind = WRITES.get(path.suffix.lower())
    if kind is None:
        raise PictureError(f"{printable(path)}: cannot save as {path.suffix or 'a file without suffix'}; "
                           f"use one of {' '.join(WRITES)}")
    if max(picture.rgb.shape) > LONGEST_SIDE[kind]:
        raise PictureError(f"{printable(path)}: {kind} holds at most {LONGEST_SIDE[kind]} pixels a side; save as .png")
    grey = picture.grey and kind in ("PNG", "JPEG")
    rgb, alpha = (composite(picture, 1.0), None) if kind == "JPEG" else (picture.rgb, picture.alpha)
    rgb = rgb.mean(0, keepdim=True) if grey else rgb
    depth = 16 if picture.depth == 16 and kind == "PNG" else 8
    pixels = quantised([rgb] if alpha is None else [rgb, alpha], depth)
    icc = picture.icc if picture.icc and picture.icc[16:20] == (b"GRAY" if grey else b"RGB ") else None
    exif = picture.exif if kind != "JPEG" or len(picture.exif or b"") < 65534 else None  # one JPEG segment
    memory = io.BytesIO()  # in memory first: Pillow writing straight to a full disk loses the reason
    if depth == 16:
        write_png16(memory, pixels, icc, exif)
    else:
        extra = {"JPEG": {"subsampling": 0}, "PNG": {}}.get(kind, {})
        extra |= {k: v for k, v in (("icc_profile", icc), ("exif", exif)) if v}
        try:
            Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
                memory, kind, quality=quality, **extra)
        except (OSError, ValueError, KeyError) as e:
            raise PictureError(f"{printable(path)}: Pillow cannot write this {kind}: {e}") from e
    with replacing(path) as part:
        part.write_bytes(memory.getbuffer())


def quantised(planes, depth):
    """List of (c, H, W) in [0, 1] -> array (H, W, sum of c) of uint8 or uint16, a strip at a time to spare memory."""
    height, width = planes[0].shape[1:]
    pixels = np.empty((height, width, sum(len(p) for p in planes)), np.uint16 if depth == 16 else np.uint8)
    for y in range(0, height, 256):
        strip = torch.cat([p[:, y:y + 256].detach().float().cpu() for p in planes]).permute(1, 2, 0)
        pixels[y:y + 256] = strip.clamp(0, 1).mul(2**depth - 1).round().numpy()
    return pixels


def write_png16(file, pixels, icc, exif):
    """uint16 array (H, W, 1..4) as PNG, every row Paeth-filtered: Pillow writes 16 bit for grey only."""
    def chunk(kind, data):
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    height, width, channels = pixels.shape
    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0))
    if icc:
        chunk(b"iCCP", b"ICC\0\0" + zlib.compress(icc))
    if exif:
        chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    packer = zlib.compressobj(6)
    above = np.zeros((1, width * channels * 2), np.int16)
    for y in range(0, height, 64):
        rows = pixels[y:y + 64].astype(">u2").reshape(-1, width * channels).view(np.uint8).astype(np.int16)
        up = np.concatenate([above, rows[:-1]])
        left, corner = (np.pad(a, ((0, 0), (channels * 2, 0)))[:, :rows.shape[1]] for a in (rows, up))
        to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
        guess = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
        filtered = np.pad((rows - guess).astype(np.uint8), ((0, 0), (1, 0)), constant_values=4)  # 4 = Paeth
        chunk(b"IDAT", packer.compress(filtered.tobytes()))
        above = rows[-1:]
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


# ------------------------------------------------------------------ the tiler

@dataclass
class Span:
    """One tile along one axis. It reads input from `start`; of its output, pixels start..stop of the whole result are
    used, with these weights; after it, everything before `ready` is final."""
    read: int
    start: int
    stop: int
    ready: int
    weight: torch.Tensor


class Tiler:
    """tiler(forward, x, scale) = forward(x), tile by tile; gradients flow.

    Tiles advance by tile_size and see tile_pad more on either side, so all are tile_size + 2 * tile_pad wide (less only
    where the picture itself is). They start on multiples of `align`, the model's window, so that windows fall where
    they do in the whole picture; a picture that is no multiple of align is mirrored out to one and the result cropped;
    the last tile moves back to fit. Of the 2 * tile_pad that neighbours share, each one's outer quarter is dropped (a
    model is at its worst there) and the middle half is a linear crossfade: a forward that reaches no further than
    tile_pad / 2 gives exactly the untiled result. Pixels are input pixels; batch is tiles per forward.
    """
    def __init__(self, tile_size=64, tile_pad=32, batch=1, align=16):
        if align < 1 or tile_size < align or tile_size % align:
            raise ValueError(f"tile size {tile_size} does not work; use a multiple of {align}")
        if tile_pad < 0 or 2 * tile_pad % align:
            raise ValueError(f"tile pad {tile_pad} does not work; use 0 or a multiple of {align / 2:g}")
        if batch < 1:
            raise ValueError(f"a batch of {batch} tiles does not work; use 1 or more")
        self.tile_size, self.tile_pad, self.batch, self.align = tile_size, tile_pad, batch, align

    def spans(self, side, scale):
        """Layout along an axis of `side` input pixels -> (tile width, list of Span).

        Crossfade k is a ramp 0..1 in the middle of what tiles k - 1 and k share, and tile k weighs ramp k - ramp k+1:
        however many tiles meet (the last one may have moved far back), the weights add up to one by themselves."""
        padded = -(-side // self.align) * self.align
        width = min(self.tile_size + 2 * self.tile_pad, padded)
        reads = [*range(0, padded - width, self.tile_size), padded - width]
        fade = self.tile_pad * scale
        starts = [(a + width + b - self.tile_pad) // 2 * scale for a, b in zip(reads, reads[1:])]
        starts, stops = [0, *starts], [*(s + fade for s in starts), side * scale]
        spans = []
        for k, (read, start, stop) in enumerate(zip(reads, starts, stops)):
            stop = min(stop, side * scale)  # a crossfade may end in the mirrored margin
            weight, at = torch.ones(stop - start), torch.arange(start, stop) + 0.5
            if k > 0 and fade:
                weight = ((at - start) / fade).clamp(max=1)
            if k + 1 < len(reads) and fade:
                weight = weight - ((at - starts[k + 1]) / fade).clamp(min=0)
            spans.append(Span(read, start, stop, starts[k + 1] if k + 1 < len(reads) else stop, weight))
        return width, spans

    def count(self, height, width):
        """Tiles for a picture of this size."""
        return len(self.spans(height, 1)[1]) * len(self.spans(width, 1)[1])

    def strips(self, forward, x, scale):
        """Yields the result of forward on x (B, 3, H, W) from top to bottom as finished strips (B, 3, h, W * scale).
        Holds one row of tiles at a time; x may lie elsewhere than forward's device if forward carries the tiles."""
        tile_h, rows = self.spans(x.shape[2], scale)
        tile_w, columns = self.spans(x.shape[3], scale)

        def row_of_tiles(row):
            strip = window(x, 2, row.read, tile_h)
            for k in range(0, len(columns), self.batch):
                some = columns[k:k + self.batch]
                y = forward(torch.cat([window(strip, 3, c.read, tile_w) for c in some]))
                if y.shape[-2:] != (tile_h * scale, tile_w * scale):
                    raise ValueError(f"a {tile_w}x{tile_h} tile became {y.shape[-1]}x{y.shape[-2]}, not {scale} times")
                for column, tile in zip(some, y.split(len(x))):
                    yield tile[:, :, row.start - row.read * scale:row.stop - row.read * scale,
                               column.start - column.read * scale:column.stop - column.read * scale]

        yield from crossfaded((torch.cat(list(crossfaded(row_of_tiles(row), columns, 3)), 3) for row in rows), rows, 2)

    def __call__(self, forward, x, scale):
        """forward: any callable (b, 3, h, w) -> (b, 3, h * scale, w * scale); x (B, 3, H, W) -> the same, tiled."""
        return torch.cat(list(self.strips(forward, x, scale)), 2)


def window(x, dim, start, length):
    """length pixels of x from start along dim; beyond the end x is mirrored, its edge pixel not doubled, as often as
    it takes (and a single pixel repeated)."""
    side = x.shape[dim]
    if start + length <= side:
        return x.narrow(dim, start, length)
    at = torch.arange(start, start + length, device=x.device) % max(2 * side - 2, 1)
    return x.index_select(dim, torch.minimum(at, (2 * side - 2 - at).abs()))


def crossfaded(pieces, spans, dim):
    """Weigh successive pieces and add them where they overlap along dim; yields the finished stretches in order."""
    tail = None
    for piece, span in zip(pieces, spans):
        shape = [1] * piece.ndim
        shape[dim] = -1
        piece = piece * span.weight.to(piece.device).view(shape)
        if tail is not None and tail.shape[dim]:
            shared = tail.shape[dim]
            rest = piece.narrow(dim, shared, piece.shape[dim] - shared)
            piece = torch.cat([piece.narrow(dim, 0, shared) + tail, rest], dim)
        done = span.ready - span.start
        yield piece.narrow(dim, 0, done)
        tail = piece.narrow(dim, done, piece.shape[dim] - done)


# ------------------------------------------------------------------ a whole picture, in bounded memory

@torch.inference_mode()
def upscale(forward, rgb, scale, tiler, device="cpu", amp=None, progress=None):
    """(3, H, W) -> (3, H * scale, W * scale) float32 in [0, 1] on the CPU, strip by strip: the device holds one batch
    of tiles, the CPU both pictures and one row of tiles.

    amp: a dtype for autocast, or None for the forward's own. progress(done, total) after every batch of tiles.
    A tile whose output is not finite is done again without autocast; FloatingPointError if that does not help."""
    device = torch.device(device)
    done, total = 0, tiler.count(*rgb.shape[1:])

    def careful(tiles):
        nonlocal done
        tiles = tiles.to(device)
        with torch.autocast(device.type, amp) if amp else contextlib.nullcontext():
            out = forward(tiles).float()
        bad = ~out.isfinite().flatten(1).all(1)
        if bad.any():
            out[bad] = forward(tiles[bad]).float()
            if not out.isfinite().all():
                raise FloatingPointError("the model gives NaN or infinite values here, in fp32 too; nothing is saved")
        done += len(tiles)
        if progress:
            progress(done, total)
        return out.cpu()

    result = torch.empty(3, rgb.shape[1] * scale, rgb.shape[2] * scale)
    y = 0
    for strip in tiler.strips(careful, rgb[None], scale):
        torch.clamp(strip[0], 0, 1, out=result[:, y:y + strip.shape[2]])
        y += strip.shape[2]
    return result


def upscale_picture(forward, picture, scale, tiler, **how):
    """Picture -> Picture scale times larger; how: see upscale. Colour goes through forward, alpha through Lanczos."""
    if picture.alpha is None:
        return replace(picture, rgb=upscale(forward, picture.rgb, scale, tiler, **how))
    height, width = picture.alpha.shape[1:]
    alpha = Image.fromarray(picture.alpha[0].numpy()).resize((width * scale, height * scale), Image.Resampling.LANCZOS)
    return replace(picture, rgb=upscale(forward, bled(picture.rgb, picture.alpha), scale, tiler, **how),
                   alpha=torch.from_numpy(np.array(alpha))[None].clamp_(0, 1))


def bled(rgb, alpha):
    """Colours spread from where they show into fully transparent pixels, where files keep black, white or rubbish that
    would fringe the edges. (3, H, W), (1, H, W) -> (3, H, W). Halves until all has a colour, then fills upwards."""
    if bool((alpha > 0).all()) or not bool((alpha > 0).any()):
        return rgb
    sums, weights = [rgb[None] * alpha], [alpha[None]]
    while not bool((weights[-1] > 0).all()):
        sums.append(F.avg_pool2d(sums[-1], 2, ceil_mode=True))
        weights.append(F.avg_pool2d(weights[-1], 2, ceil_mode=True))
    fill = sums[-1] / weights[-1]
    for total, weight in zip(sums[-2::-1], weights[-2::-1]):
        fill = F.interpolate(fill, scale_factor=2, mode="bilinear")[:, :, :total.shape[2], :total.shape[3]]
        fill = torch.where(weight > 0, total / weight.clamp(min=1e-8), fill)
    return torch.where(alpha > 0, rgb, fill[0])


# ------------------------------------------------------------------ the command

def bf16_is_native(device):
    """Whether bf16 is done in hardware on this torch.device, not slowly imitated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asks)


def keep_freed_memory():
    """Tells glibc to keep what is freed for the next tile, or training step: giving it back to Linux and fetching it again,
    page by page, takes up to half of the time on a CPU. Where there is no glibc it does nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)              # M_MMAP_MAX: no mapping of its own for any block
        mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass


def plan(inputs, out, suffix):
    """Which picture goes where -> list of (source, target). suffix None keeps the source's where it can be written.
    Raises PictureError if there is nothing to do, or if two pictures or a picture and its source would collide."""
    inputs, out = [Path(p) for p in inputs], Path(out)
    to_file = len(inputs) == 1 and not inputs[0].is_dir() and not out.is_dir() and out.suffix.lower() in READS
    if to_file and out.suffix.lower() not in WRITES:
        raise PictureError(f"{printable(out)}: cannot save as {out.suffix}; use one of {' '.join(WRITES)}")
    jobs = {}
    for given in inputs:
        for source in find_pictures(given):
            if given.is_dir() and out.resolve() != given.resolve() and out.resolve() in source.resolve().parents:
                continue  # our own results of an earlier run
            ending = suffix or (source.suffix if source.suffix.lower() in WRITES else ".png")
            name = source.relative_to(given) if given.is_dir() else Path(source.name)
            target = out if to_file else out / name.with_suffix(ending)
            if jobs.setdefault(target, source) != source:
                raise PictureError(f"{printable(jobs[target])} and {printable(source)} would both become "
                                   f"{printable(target)}; rename one, or try --format keep")
    sources = {source.resolve() for source in jobs.values()}
    for target, source in jobs.items():
        if target.resolve() in sources:
            raise PictureError(f"{printable(target)} is itself one of the pictures; choose another --out")
    if not jobs:
        raise PictureError(f"no picture in {', '.join(printable(p) for p in inputs)}; "
                           f"looked for {' '.join(sorted(READS))}")
    return [(source, target) for target, source in jobs.items()]


class Progress:
    """One line on a terminal, rewritten; otherwise a line every half minute."""
    def __init__(self, label, pixels):
        self.label, self.pixels = label, pixels
        self.begun = self.shown = time.time()

    def __call__(self, done, total):
        now, tty = time.time(), sys.stderr.isatty()
        if now - self.shown < (0.1 if tty else 30):
            return
        self.shown, rate = now, done / (now - self.begun)
        left = int((total - done) / rate)
        line = (f"{self.label}  tile {done}/{total}  {rate * self.pixels / total / 1e6:.3f} Mpixel/s  "
                f"{left // 60}:{left % 60:02d} left")
        print(f"\r\033[K{line}" if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True)

    @staticmethod
    def clear():
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def fail(message):
    Progress.clear()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    p = argparse.ArgumentParser(
        description="Upscale pictures. Alpha, grey, 16 bit (PNG), colour profile and EXIF are kept.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tile.py wallpaper.jpg -o wallpaper-2x.png\n  python tile.py pictures -o upscaled\n\n"
               "exit code: 0 all done, 1 some pictures failed (named), 2 nothing could be done as asked")
    p.add_argument("inputs", nargs="+", metavar="IN", help="pictures, or folders of them (whole trees)")
    p.add_argument("-o", "--out", required=True, help="folder for the results; a file name when IN is one picture")
    p.add_argument("--weights", help="model file (default: one of weights/, else the newest runs/*/best.safetensors)")
    p.add_argument("--format", default="png", choices=["png", "webp", "jpg", "keep"],
                   help="of results in a folder; keep: as the input, where it can be written (default: png)")
    p.add_argument("--quality", type=int, default=95, help="of JPEG, WebP and AVIF, 1..100 (default: 95)")
    p.add_argument("--tile-size", type=int, help="input pixels from tile to tile (default: 256; 128 on the CPU)")
    p.add_argument("--tile-pad", type=int, default=32, help="pixels more that a tile sees on each side (default: 32)")
    p.add_argument("--batch", type=int, default=1, help="tiles at once (default: 1)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    p.add_argument("--amp", choices=["bf16", "fp16", "off"], help="precision (default: bf16 if native, else off)")
    p.add_argument("--overwrite", action="store_true", help="replace results that exist (default: they are skipped)")
    args = p.parse_args()
    try:
        run(args)
    except KeyboardInterrupt:
        Progress.clear()
        print("interrupted; finished pictures are kept", file=sys.stderr)
        sys.exit(130)


def run(args):
    """The command, its arguments parsed. Ends the process with the exit code."""
    keep_freed_memory()
    try:
        jobs = plan(args.inputs, args.out, None if args.format == "keep" else f".{args.format}")
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = torch.device(args.device or best)
        torch.empty(1, device=device)
        tiler = Tiler((128 if device.type == "cpu" else 256) if args.tile_size is None else args.tile_size,
                      args.tile_pad, args.batch)
        if not 1 <= args.quality <= 100:
            raise ValueError(f"--quality {args.quality} does not work; use 1 to 100")
    except ValueError as e:  # PictureError is one
        fail(e)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {args.device}: {str(e).splitlines()[0]}")
    amp = args.amp or ("bf16" if bf16_is_native(device) else "off")
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    top = Path(args.out) if jobs[0][1] != Path(args.out) else jobs[0][1].parent
    try:
        top.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=top).close()
    except OSError as e:
        fail(f"cannot write to {printable(top)}: {e.strerror}; choose another --out")

    todo = []
    for source, target in jobs:
        if args.overwrite or not target.exists():
            todo.append((source, target))
        else:
            print(f"{printable(target)} exists, skipped (--overwrite replaces it)")
    done, failed, begun = 0, 0, time.time()
    if todo:
        try:
            import model
            weights = args.weights or model.find_weights()
            network = model.load(weights, device)
        except ModuleNotFoundError as e:
            fail(f"{e}; the command needs model.py beside tile.py and the packages of requirements.txt")
        except (ValueError, OSError) as e:  # WeightsError is the first
            fail(e)
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[amp]
        print(f"{printable(weights)}: {network.scale}x on {device}, {precision}", flush=True)
    for number, (source, target) in enumerate(todo, 1):
        start = time.time()
        try:
            picture = read_picture(source)
            height, width = picture.rgb.shape[1:]
            progress = Progress(f"{number}/{len(todo)} {printable(source.name)}", height * width * network.scale**2)
            result = upscale_picture(network, picture, network.scale, tiler, device=device, amp=amp, progress=progress)
            target.parent.mkdir(parents=True, exist_ok=True)
            save_picture(target, result, args.quality)
        except (PictureError, FloatingPointError) as e:
            Progress.clear()
            failed += 1
            print(e if isinstance(e, PictureError) else f"{printable(source)}: {e}", file=sys.stderr, flush=True)
            continue
        except torch.cuda.OutOfMemoryError:
            fail(f"{printable(source)}: out of memory; use a --tile-size below {tiler.tile_size} or a smaller --batch")
        except OSError as e:
            fail(f"cannot write {printable(target)}: {e.strerror or e}; {done} pictures done so far are kept")
        done += 1
        Progress.clear()
        print(f"{printable(target)}  {width}x{height} -> {result.rgb.shape[2]}x{result.rgb.shape[1]}  "
              f"{time.time() - start:.1f} s", flush=True)
    print(f"{done} done, {len(jobs) - len(todo)} skipped, {failed} failed, {time.time() - begun:.1f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
