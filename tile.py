"""Upscale pictures of any size with a model, tile by tile, without seams.

    python tile.py wallpaper.jpg                            # writes wallpaper-2x.png beside it
    python tile.py folder more/pictures -o big --weights runs/NAME/best.safetensors
    python tile.py folder -o 4k --fit 3840x2160

    sr = Tiler(tile_size=64, tile_pad=32)(forward, lr, 2)   # forward: (B, 3, h, w) -> (B, 3, 2 * h, 2 * w)

Needs torch, numpy, and Pillow. Without its command it works when copied alone. The command needs images.py,
model.py, convert.py, and choose.py beside it. fast.py makes it faster.
"""
import argparse
import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

try:
    import images
except ModuleNotFoundError:     # copied alone
    images = None

TILE_SIZE = 528             # --tile-size; 1920x1080 becomes 4 x 2 tiles that overlap little
FLAT_REACH = 4              # of keep_flat_colors(): input pixels on each side
FLAT_DRIFT = 3 / 255        # of keep_flat_colors(): larger changes of a color are kept
EXTRA_PASS = 1.05           # the model runs again if its output has to grow by more than this


class TileError(images.UserError if images else ValueError):
    """A tile size, tile pad, or device that cannot be used. The message is one line."""


# ------------------------------------------------------------------ the tiler

def round_up(n, step):
    """The smallest multiple of step that is at least n."""
    return -(-n // step) * step


@dataclass
class Span:
    """One tile along one axis."""
    input_start: int        # first input pixel of the tile
    start: int              # first output pixel to which the tile is added
    crop: slice             # the part of the tile's output that is added
    complete: int           # number of pixels of the crop that no later tile changes
    weight: torch.Tensor    # of each pixel of the crop


class Tiler:
    """Apply `forward` in tiles, without seams: tiler(forward, x, scale) is near forward(x). Differentiable.

    A side of a tile has at most tile_size + 2 * tile_pad input pixels. Neighboring tiles overlap by at least
    2 * tile_pad. On each side, the outer quarter of the overlap is dropped, because a model is least accurate
    at the border of its input. The middle half is a linear crossfade. If an output pixel depends on input
    pixels at most tile_pad / 2 away, the output is the same as without tiles.

    All tiles have the same size and start at multiples of `align`, the window of the model, so that the
    windows have the same positions as without tiles. A side that is not a multiple of align is extended by
    mirroring, and the output is cropped. Raises TileError if tile_size or 2 * tile_pad is not a multiple of
    align.
    """
    def __init__(self, tile_size=64, tile_pad=32, align=16):
        if tile_size < 1 or tile_pad < 0 or tile_size % align or 2 * tile_pad % align:
            raise TileError(f"tile size {tile_size} must be a multiple of {align} (the window of the model), "
                            f"and tile pad {tile_pad} a multiple of {align / 2:g}")
        self.tile_size, self.tile_pad, self.align = tile_size, tile_pad, align

    def spans(self, side, scale):
        """Lay out tiles along an axis of `side` input pixels -> (tile width, list of Span).

        Ramp k rises from 0 to 1 in the middle half of the overlap of tiles k - 1 and k. The weight of tile k
        is ramp k minus ramp k + 1, so the weights add up to 1. The last tile is moved back to end at the
        border, so three tiles can overlap there.
        """
        padded = round_up(side, self.align)
        inner = max(padded - 2 * self.tile_pad, 1)      # length without the outer pads
        tiles = math.ceil(inner / self.tile_size)
        step = round_up(math.ceil(inner / tiles), self.align)
        width = min(step + 2 * self.tile_pad, padded)
        input_starts = [*range(0, padded - width, step), padded - width]
        fade, end = self.tile_pad * scale, side * scale
        ramps = [(a + width + b - self.tile_pad) // 2 * scale for a, b in zip(input_starts, input_starts[1:])]
        ramps = [-fade, *ramps, end]        # the first and the last one lie outside of the picture
        spans = []
        for input_start, rise, fall in zip(input_starts, ramps, ramps[1:]):
            start, stop = max(rise, 0), min(fall + fade, end)
            position = torch.arange(start, stop) + 0.5
            weight = ((position - rise) / fade).clamp(max=1) - ((position - fall) / fade).clamp(min=0)
            crop = slice(start - input_start * scale, stop - input_start * scale)
            spans.append(Span(input_start, start, crop, fall - start, weight))
        return width, spans

    def count(self, height, width):
        """The number of tiles of a picture."""
        return len(self.spans(height, 1)[1]) * len(self.spans(width, 1)[1])

    def halve(self):
        """Halve the tile size. Returns False if the tiles cannot become much smaller."""
        if self.tile_size < 2 * max(self.align, self.tile_pad):
            return False
        self.tile_size = self.tile_size // 2 // self.align * self.align
        return True

    def strips(self, forward, x, scale, progress=None):
        """Yield the output for x (B, 3, H, W) in strips (B, 3, h, W * scale), top to bottom. Only one row of
        tiles is in memory. progress() is called after each tile."""
        tile_h, rows = self.spans(x.shape[2], scale)
        tile_w, columns = self.spans(x.shape[3], scale)

        def tiles_of_row(row):
            strip = mirrored_slice(x, 2, row.input_start, tile_h)
            for column in columns:
                y = forward(mirrored_slice(strip, 3, column.input_start, tile_w).contiguous())
                if y.shape[-2:] != (tile_h * scale, tile_w * scale):
                    raise ValueError(f"{tuple(y.shape)} is not {scale} times a tile of {tile_h}x{tile_w}")
                if progress:
                    progress()
                yield y[:, :, row.crop, column.crop]

        joined_rows = (torch.cat(list(crossfade(tiles_of_row(row), columns, 3)), 3) for row in rows)
        yield from crossfade(joined_rows, rows, 2)

    def __call__(self, forward, x, scale):
        """Apply forward, (B, 3, h, w) -> (B, 3, h * scale, w * scale), to x (B, 3, H, W)."""
        return torch.cat(list(self.strips(forward, x, scale)), 2)


def mirrored_slice(x, dim, start, length):
    """Take `length` pixels of x along dim, beginning at `start`. Past the end, x is mirrored at its last
    pixel, as often as necessary. A single pixel is repeated."""
    side = x.shape[dim]
    if start + length <= side:
        return x.narrow(dim, start, length)
    index = torch.arange(start, start + length, device=x.device) % max(2 * side - 2, 1)
    return x.index_select(dim, torch.minimum(index, 2 * side - 2 - index))


def crossfade(pieces, spans, dim):
    """Weight successive pieces (B, 3, h, w) by their spans along dim, 2 or 3, and add them where they
    overlap. Yields the finished parts in order."""
    tail = None
    for span in spans:
        piece = next(pieces)
        weight = span.weight.to(piece.device)
        piece = piece * (weight[:, None] if dim == 2 else weight)
        if tail is not None:
            piece.narrow(dim, 0, tail.shape[dim]).add_(tail)
        yield piece.narrow(dim, 0, span.complete)
        tail = piece.narrow(dim, span.complete, len(weight) - span.complete).clone()
        del piece       # free the memory before the next piece is computed


# ------------------------------------------------------------------ a whole picture in bounded memory

def run_checked(function, device, amp, x):
    """Run function on one tile x (1, 3, h, w) under autocast, and again in fp32 if the output is broken."""
    x = x.to(device, torch.float32)
    for dtype in (amp, None):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = function(x).float()
        is_black = out.amax() <= 0 and x.mean() > 0.02
        if out.isfinite().all() and not is_black:
            return out.cpu()
    raise FloatingPointError("the output of the model is NaN, infinite, or black, even in fp32")


@torch.inference_mode()
def upscale_strips(forward, rgb, scale, tiler, device="cpu", amp=None, progress=None):
    """Upscale rgb (3, H, W) -> generator of strips (3, h, W * scale), top to bottom, float32 in [0, 1], CPU.

    forward is on `device` already, which also holds one tile. The CPU holds rgb and one row of tiles. A
    HATRefiner runs in two steps: its hat_model on the tiles, then its refiner on the joined picture. Flat
    areas keep their color, see keep_flat_colors(). amp: dtype of autocast, or None. progress() is called
    after each tile. Raises FloatingPointError if the output is NaN, infinite, or black, even in fp32.
    """
    device, is_hat = torch.device(device), hasattr(forward, "hat_model")
    run = partial(run_checked, forward.hat_model if is_hat else forward, device, amp)
    strips = (strip[0] for strip in tiler.strips(run, rgb[None], scale, progress))
    if is_hat and forward.use_refiner:
        pieces = Tiler(512, 2 * forward.refiner_reach, align=1)
        run_refiner = partial(run_checked, forward.refine, device, amp)
        halo = round_up(forward.refiner_reach, scale)       # strips must hold whole input rows
        strips = with_halo(strips, lambda x: pieces(run_refiner, x[None], 1)[0], halo, rgb.shape[1] * scale)
    y = 0
    for strip in strips:
        for rows in strip.split(32 * scale, 1):
            yield keep_flat_colors(rows.clamp(0, 1), rgb, scale, y)
            y += rows.shape[1]
        del strip, rows     # free the memory before the next strip is computed


def upscale(forward, rgb, scale, tiler, device="cpu", amp=None, progress=None, dtype=torch.float32):
    """Upscale rgb (3, H, W) -> (3, H * scale, W * scale) in [0, 1], CPU. See upscale_strips()."""
    result, y = torch.empty(3, rgb.shape[1] * scale, rgb.shape[2] * scale, dtype=dtype), 0
    for strip in upscale_strips(forward, rgb, scale, tiler, device, amp, progress):
        result[:, y:y + strip.shape[1]] = strip
        y += strip.shape[1]
    return result


def with_halo(strips, function, halo, height):
    """Apply function to a picture of `height` rows that is given in strips (C, h, W). Yield the output in
    strips. The function needs `halo` rows of context above and below a strip."""
    x, top, context = None, 0, 0    # x begins at row `top` of the picture; its first `context` rows are done
    for strip in strips:
        x = strip if x is None else torch.cat([x, strip], 1)
        del strip
        ready = x.shape[1] - (halo if top + x.shape[1] < height else 0)
        if ready > context:
            yield function(x)[:, context:ready]
            drop = max(ready - halo, 0)
            x, top, context = x[:, drop:].clone(), top + drop, ready - drop


def keep_flat_colors(sr, rgb, scale, top):
    """Restore the color of flat areas in sr (3, h * scale, W * scale), the output from row `top` on.

    A channel of the input rgb (3, H, W) is flat where all pixels within FLAT_REACH have one level. A model
    changes such areas by one or two levels, and a background of 254 is visible on a white page. Changes of
    FLAT_DRIFT or more are kept, because some models change colors by design.
    """
    top, rows = top // scale, sr.shape[1] // scale
    first = max(top - FLAT_REACH, 0)
    x, side = rgb[:, first:top + rows + FLAT_REACH].float(), 2 * FLAT_REACH + 1

    def local_maximum(x):
        x = F.max_pool2d(x, (1, side), 1, (0, FLAT_REACH))
        x = F.max_pool2d(x, (side, 1), 1, (FLAT_REACH, 0))[:, top - first:top - first + rows]
        return x.repeat_interleave(scale, 1).repeat_interleave(scale, 2)

    high, low = local_maximum(x), -local_maximum(-x)
    return torch.where((high == low) & ((sr - high).abs() < FLAT_DRIFT), high, sr)


# ------------------------------------------------------------------ exact size, alpha, crop

def upscale_picture(forward, picture, scale, tiler, size, progress=None, **options):
    """Upscale an images.Picture -> generator of strips (3 or, with alpha, 4, h, W) of size (H, W).

    Run the model again on its output until the output is about as large as `size`, then resize it by Lanczos.
    These outputs are held in memory, as float16 for 8-bit pictures. Alpha is resized by Lanczos.
    progress(total) is called after each tile, with the number of tiles of all runs. options: see
    upscale_strips().
    """
    height, width = picture.rgb.shape[1:]
    passes = 1
    while max(size[0] / height, size[1] / width) > EXTRA_PASS * scale**passes:
        passes += 1
    exact = size == (height * scale**passes, width * scale**passes)
    total = sum(tiler.count(height * scale**k, width * scale**k) for k in range(passes))
    options["progress"] = progress and partial(progress, total)

    rgb = bleed_colors(picture.rgb, picture.alpha)
    dtype = torch.float32 if picture.depth == 16 else torch.float16
    for _ in range(passes - 1 if exact else passes):
        rgb = upscale(forward, rgb, scale, tiler, dtype=dtype, **options)
    if exact:
        strips = upscale_strips(forward, rgb, scale, tiler, **options)
    else:
        strips = (lanczos(rgb, size, y, min(y + 64, size[0])) for y in range(0, size[0], 64))
    y = 0
    for strip in strips:
        stop = y + strip.shape[1]
        if picture.alpha is not None:
            strip = torch.cat([strip, lanczos(picture.alpha, size, y, stop)])
        yield strip
        y = stop


def lanczos(x, size, start=0, stop=None):
    """Rows start..stop (default: all) of x (C, h, w) resized to (H, W) by antialiased Lanczos, in [0, 1]."""
    H, W = size
    stop, step = H if stop is None else stop, x.shape[1] / H
    reach = 3 * max(step, 1) + 1
    first, last = max(int(start * step - reach), 0), min(math.ceil(stop * step + reach), x.shape[1])
    box = 0, start * step - first, x.shape[2], min(stop * step - first, last - first)
    planes = [Image.fromarray(plane.numpy()).resize((W, stop - start), Image.Resampling.LANCZOS, box=box)
              for plane in x[:, first:last].float()]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).clamp_(0, 1)


def crop_to_aspect(picture, size):
    """Crop an images.Picture to its largest central part with the aspect ratio of size (H, W)."""
    height, width = picture.rgb.shape[1:]
    h = min(height, max(round(width * size[0] / size[1]), 1))
    w = min(width, max(round(height * size[1] / size[0]), 1))
    top, left = (height - h) // 2, (width - w) // 2
    rgb, alpha = (x if x is None else x[:, top:top + h, left:left + w] for x in (picture.rgb, picture.alpha))
    return replace(picture, rgb=rgb, alpha=alpha)


def bleed_colors(rgb, alpha):
    """Spread the visible colors of rgb (3, H, W) into pixels whose alpha (1, H, W) is 0 -> (3, H, W).

    The color of these pixels is arbitrary, often black, and would cause a fringe at the edges. Downscale by 2
    until all pixels have a color, then fill the gaps from coarse to fine. alpha may be None.
    """
    if alpha is None or alpha.min() > 0 or alpha.max() == 0:
        return rgb
    sums, weights = [rgb[None] * alpha], [alpha[None]]
    while not (weights[-1] > 0).all():
        sums.append(F.avg_pool2d(sums[-1], 2, ceil_mode=True))
        weights.append(F.avg_pool2d(weights[-1], 2, ceil_mode=True))
    fill = sums[-1] / weights[-1]
    for total, weight in zip(sums[-2::-1], weights[-2::-1]):
        fill = F.interpolate(fill, scale_factor=2, mode="bilinear")[:, :, :total.shape[2], :total.shape[3]]
        fill = torch.where(weight > 0, total / weight.clamp(min=1e-8), fill)
    return torch.where(alpha > 0, rgb, fill[0])


# ------------------------------------------------------------------ device and memory

def pick_device(name=None, amp=None):
    """Choose (torch.device, dtype for autocast or None). Raises TileError for a device that does not work.

    name: such as "cuda:1", or None for the best device. amp: "bf16", "fp16", "off", or None: bf16 if native.
    Under torchrun, process k uses GPU k modulo the number of GPUs.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(torch.cuda.device_count(), 1))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise TileError(f"device {name}: {str(error).splitlines()[0]}") from None
    amp = amp or ("bf16" if bf16_is_native(device) else "off")
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def bf16_is_native(device):
    """Whether the hardware of this torch.device supports bf16. Emulated bf16 is slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def out_of_memory(error):
    """Whether an exception means that memory ran out, judged by its class or its message."""
    words = "out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed"
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


# ------------------------------------------------------------------ the command

def width_by_height(text):
    width, height = map(int, text.lower().split("x"))
    return height, width


def parse():
    p = argparse.ArgumentParser(
        description="Upscale pictures. Alpha, gray, 16 bit, and metadata are kept if the format holds them.",
        epilog="Exit code: 0 no picture failed, 1 some failed (they are named), 2 it could not start.")
    p.add_argument("inputs", nargs="+", metavar="IN", help="pictures, or folders of pictures")
    p.add_argument("-o", "--out", type=Path, help="file, or folder of the results (default: beside IN)")
    p.add_argument("--weights", help="model file (default: weights/kabegami-low, and weights/clean-low for "
                                     "undamaged pictures)")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--fit", type=width_by_height, metavar="WxH", help="exactly this size; cuts off edges")
    size.add_argument("--scale", type=float, help="factor, such as 1.5 or 4 (default: that of the model)")
    p.add_argument("--format", default="png", choices=["png", "webp", "avif", "jpg"],
                   help="of results, unless --out is a file (default: png)")
    p.add_argument("--overwrite", action="store_true", help="replace results that exist (default: skip them)")
    p.add_argument("--tile-size", type=int, help="input pixels from tile to tile; halved if memory runs out "
                                                 f"(default: {TILE_SIZE})")
    p.add_argument("--tile-pad", type=int, help="input pixels that a tile adds on each side "
                                                "(default: two windows of the model)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best available)")
    p.add_argument("--amp", choices=["bf16", "fp16", "off"], help="precision (default: bf16 if native)")
    args = p.parse_args()
    if (args.scale is not None and not 0 < args.scale < math.inf) or min(args.fit or [1]) < 1:
        p.error("--scale and --fit must be positive")
    return args


def plan_jobs(inputs, out, suffix, tag):
    """Choose the paths of the results -> ([(source, target)], [a line for each picture that is left out]).

    out: file, folder, or None: NAME becomes NAME-tag beside itself. Raises UserError if no picture is found.
    """
    jobs, problems, real = {}, [], os.path.realpath
    found = [(given, source) for given in map(Path, inputs) for source in images.find_pictures(given)]
    if out:         # leave out the results of an earlier run
        home = Path(real(out))
        folders = {home, *home.parents} if len(inputs) > 1 else set(home.parents)       # w/* also names w/big
        found = [(given, source) for given, source in found
                 if Path(real(given)) not in folders or home not in Path(real(source)).parents]
    originals = {real(source) for _, source in found}
    for given, source in found:
        if out and out.suffix.lower() in images.READ_SUFFIXES:
            target = out
        elif given.is_dir():
            folder = out or Path(f"{os.path.abspath(given)}-{tag}")
            target = folder / source.relative_to(given).with_suffix(suffix)
        elif out:
            target = out / f"{source.stem}{suffix}"
        else:
            target = source.with_name(f"{source.stem}-{tag}{suffix}")
        if out and real(target) in originals:
            problems.append(f"{source}: the result would replace {target}; choose another --out")
        elif jobs.setdefault(target, source) != source:
            problems.append(f"{source}: the result would replace that of {jobs[target]}")
    if not out:     # leave out the results that an earlier run wrote beside its inputs
        results = set(map(real, jobs))
        jobs = {target: source for target, source in jobs.items() if real(source) not in results}
    if not jobs:
        raise images.UserError([*problems, f"no picture in {', '.join(inputs)}"][0])
    return [(source, target) for target, source in jobs.items()], problems


def load_models(weights, device):
    """Return (path, [model]); the list has a second model for undamaged pictures if no weights are given.

    Raises WeightsError.
    """
    import choose
    import convert
    paths = [weights] if weights else choose.SHIPPED
    models = [convert.load_any(path, device) for path in paths]
    with contextlib.suppress(ImportError):      # fast.py is optional
        import fast
        fast.keep_freed_memory()
        for network in models:
            fast.prepare(network)
    return paths[0], models


def upscale_file(args, models, tiler, source, target, label):
    """Read, upscale, and save one picture -> a line that reports it. models: see load_models().

    If memory runs out, halve the tiles and start again. label: text of the progress line.
    Raises PictureError, FloatingPointError, or OSError.
    """
    start, picture = time.time(), images.read_picture(source)
    height, width = picture.rgb.shape[1:]
    network, notes = models[0], [picture.note]
    if len(models) > 1:
        import choose
        with torch.autocast(args.device.type, args.amp, enabled=args.amp is not None):
            undamaged = choose.is_undamaged(network, bleed_colors(picture.rgb, picture.alpha))
        if undamaged:
            network = models[1]
            notes.append("undamaged")
    scale = args.scale or network.scale
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    if args.fit:
        size, picture = args.fit, crop_to_aspect(picture, args.fit)
    while True:
        progress = partial(images.ProgressLine().step, "tiles", label)
        strips = upscale_picture(network, picture, network.scale, tiler, size, progress,
                                 device=args.device, amp=args.amp)
        try:
            images.save_strips(target, strips, size, picture)
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Outside of the except block, the exception and its tensors are freed.
        if not tiler.halve():
            raise images.PictureError(f"{images.printable(source)}: out of memory")
        images.ProgressLine.clear()
        print(f"out of memory; continuing with tiles of {tiler.tile_size}", file=sys.stderr, flush=True)
    notes = "; ".join(filter(None, notes + images.split_metadata(picture, target)[1]))
    line = f"{images.printable(target)}  {width}x{height} -> {size[1]}x{size[0]}  {time.time() - start:.1f} s"
    return line + (f"  ({notes})" if notes else "")


def is_complete(path):
    """Whether a picture exists and can be decoded to its end."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except Image.DecompressionBombError:        # above Pillow's pixel limit: not decoded
        return True
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def run(args):
    """Upscale all pictures; name and skip those that fail -> exit code."""
    start = time.time()
    args.device, args.amp = pick_device(args.device, args.amp)
    path, models = load_models(args.weights, args.device)
    scale = models[0].scale
    tag = f"{args.fit[1]}x{args.fit[0]}" if args.fit else f"{args.scale or scale:g}x"
    jobs, problems = plan_jobs(args.inputs, args.out, f".{args.format}", tag)
    align = models[0].hat_model.window if hasattr(models[0], "hat_model") else 16
    tile_size = args.tile_size or TILE_SIZE // align * align
    tiler = Tiler(tile_size, 2 * align if args.tile_pad is None else args.tile_pad, align)
    note = "; clean-low for undamaged pictures" if len(models) > 1 else ""
    print(f"{images.printable(path)}: {scale}x on {args.device}{note}", flush=True)

    done = skipped = failed = 0
    for number, (source, target) in enumerate(jobs, 1):
        if not args.overwrite and is_complete(target):
            skipped += 1
            continue
        name = images.printable(source)
        try:
            line = upscale_file(args, models, tiler, source, target, f"{number}/{len(jobs)} {name}")
        except (images.PictureError, FloatingPointError, OSError) as error:
            images.ProgressLine.clear()
            print(error if name in str(error) else f"{name}: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        images.ProgressLine.clear()
        print(line, flush=True)
        done += 1

    for problem in problems:
        print(images.printable(problem), file=sys.stderr)
    print(f"{done} done, {skipped} skipped, {failed + len(problems)} failed, {time.time() - start:.1f} s")
    return 1 if failed or problems else 0


def main():
    from model import WeightsError
    sys.stdout.reconfigure(errors="backslashreplace")       # a console may be unable to print a name
    try:
        sys.exit(run(parse()))
    except (images.UserError, WeightsError, KeyboardInterrupt) as error:
        images.fail(images.printable(error))


if __name__ == "__main__":
    main()
