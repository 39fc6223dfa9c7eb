"""Upscale pictures of any size with a model, tile by tile, without seams.

    python tile.py wallpaper.jpg                            # writes wallpaper-2x.png beside it
    python tile.py folder more/pictures -o big --weights runs/NAME/best.safetensors
    python tile.py folder -o 4k --fit 3840x2160 --crop focus
    torchrun --nproc_per_node 4 tile.py folder -o big       # four processes share the folder

    sr = Tiler(tile_size=64, tile_pad=32)(forward, lr, 2)   # forward: (b, 3, h, w) -> (b, 3, 2 * h, 2 * w)

Needs torch, numpy, and Pillow. Works when copied alone, except for the command, which is in upscale.py.
"""
import contextlib
import itertools
import math
import os
import random
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

try:
    import images
except ModuleNotFoundError:     # copied alone
    images = None

CPU_TILE_SIZE, CUDA_TILE_SIZE = 384, 512    # larger tiles are hardly faster
LOCK_SIGMA = 8              # --low-freq-lock: standard deviation of the Gaussian, input pixels
FLAT_REACH = 4              # keep_flat_levels(): input pixels on each side
ROUGH_TILES = 64            # --sync rough: number of tiles
POOL_TOLERANCE = 1e-3       # --sync exact: stop at a smaller change of the means, relative to the largest


class TileError(images.UserError if images else ValueError):
    """A tile size, tile pad, or device that cannot be used. The message is one line."""


# ------------------------------------------------------------------ the tiler

def round_up(n, step):
    """The smallest multiple of step that is at least n."""
    return -(-n // step) * step


@dataclass
class Span:
    """One tile along one axis: where its input starts, the output pixels start..stop that it adds to, and its
    weights there. Once it is added, the output before final_stop is complete."""
    input_start: int
    start: int
    stop: int
    final_stop: int
    weight: torch.Tensor


class Tiler:
    """Run a forward tile by tile: tiler(forward, x, scale) is forward(x) without seams. Gradients flow.

    Neighboring tiles start at most tile_size input pixels apart and overlap by 2 * tile_pad. The outer
    quarter of the overlap is dropped on each side, since a model is least accurate at the border of its
    input. The middle half is a linear crossfade. A forward that looks at most tile_pad / 2 pixels far gives
    the exact output.

    All tiles have the same size and start at multiples of `align`, the window of the model, so that windows
    lie as without tiles. Sides that are no multiples of align are extended by mirroring, and the output is
    cropped. batch: tiles per call of forward. Raises TileError for values that do not fit together.
    """
    def __init__(self, tile_size=64, tile_pad=32, batch=1, align=16):
        if align < 1 or tile_size < align or tile_size % align:
            raise TileError(f"tile size {tile_size} does not fit the model; use a multiple of {align}")
        if tile_pad < 0 or 2 * tile_pad % align:
            raise TileError(f"tile pad {tile_pad} does not fit the model; use a multiple of {align / 2:g}")
        self.tile_size, self.tile_pad, self.batch, self.align = tile_size, tile_pad, batch, align

    def spans(self, side, scale):
        """Lay out tiles along an axis of `side` input pixels -> (tile width, list of Span).

        Ramp k rises from 0 to 1 in the middle half of the overlap of tiles k - 1 and k. Tile k has the
        weight ramp k minus ramp k + 1. So the weights add up to 1, even where three tiles overlap because
        the last one has moved back to end at the border.
        """
        padded = round_up(side, self.align)
        inner = max(padded - 2 * self.tile_pad, 1)      # the sum of all steps from tile to tile
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
            weight, position = torch.ones(stop - start), torch.arange(start, stop) + 0.5
            if fade:
                weight = ((position - rise) / fade).clamp(max=1) - ((position - fall) / fade).clamp(min=0)
            spans.append(Span(input_start, start, stop, fall, weight))
        return width, spans

    def seams(self, height, width, scale):
        """Output (rows, columns) where a seam would show: a crossfade begins, is halfway, or ends."""
        fade = self.tile_pad * scale
        return [[span.start + offset for span in self.spans(side, scale)[1][1:]
                 for offset in (0, fade // 2, fade)] for side in (height, width)]

    def count(self, height, width):
        """The number of tiles of a picture."""
        return len(self.spans(height, 1)[1]) * len(self.spans(width, 1)[1])

    def cores(self, side):
        """Divide an axis among the tiles -> list of (input_start, start, stop), the last two relative to the
        tile. The cores cover the picture and its mirrored extension exactly once."""
        width, spans = self.spans(side, 1)
        cuts = [0, *(span.start + self.tile_pad // 2 for span in spans[1:]), spans[-1].input_start + width]
        return [(span.input_start, a - span.input_start, b - span.input_start)
                for span, a, b in zip(spans, cuts, cuts[1:])]

    def smaller(self):
        """A Tiler that needs about half of the memory, or None if the tiles cannot become much smaller."""
        if self.batch > 1:
            return Tiler(self.tile_size, self.tile_pad, self.batch // 2, self.align)
        if self.tile_size < 2 * max(self.align, self.tile_pad):
            return None
        return Tiler(self.tile_size // 2 // self.align * self.align, self.tile_pad, 1, self.align)

    def strips(self, forward, x, scale, progress=None):
        """Yield the output for x (B, 3, H, W) in strips (B, 3, h, W * scale), top to bottom. Only one row of
        tiles is in memory. progress(done, total) gets numbers of tiles."""
        tile_h, rows = self.spans(x.shape[2], scale)
        tile_w, columns = self.spans(x.shape[3], scale)

        def tiles_of_row(number, row):
            strip = mirrored_slice(x, 2, row.input_start, tile_h)
            top, bottom = row.start - row.input_start * scale, row.stop - row.input_start * scale
            for k in range(0, len(columns), self.batch):
                batch = columns[k:k + self.batch]
                tiles = [mirrored_slice(strip, 3, span.input_start, tile_w) for span in batch]
                y = forward(torch.cat(tiles))
                if y.shape[-2:] != (tile_h * scale, tile_w * scale):
                    raise ValueError(f"{tuple(y.shape)} is not {scale} times a tile of {tile_h}x{tile_w}")
                if progress:
                    progress(number * len(columns) + k + len(batch), len(rows) * len(columns))
                for span, tile in zip(batch, y.split(len(x))):
                    left, right = span.start - span.input_start * scale, span.stop - span.input_start * scale
                    yield tile[:, :, top:bottom, left:right]

        joined_rows = (torch.cat(list(crossfade(tiles_of_row(number, row), columns, 3)), 3)
                       for number, row in enumerate(rows))
        yield from crossfade(joined_rows, rows, 2)

    def __call__(self, forward, x, scale):
        """Apply forward, (b, 3, h, w) -> (b, 3, h * scale, w * scale), to x (B, 3, H, W)."""
        return torch.cat(list(self.strips(forward, x, scale)), 2)


def mirrored_slice(x, dim, start, length):
    """Take `length` pixels of x from start on along dim. Beyond its end, x is mirrored at the last pixel, as
    often as necessary; a single pixel is repeated."""
    side = x.shape[dim]
    if start + length <= side:
        return x.narrow(dim, start, length)
    index = torch.arange(start, start + length, device=x.device) % max(2 * side - 2, 1)
    return x.index_select(dim, torch.minimum(index, 2 * side - 2 - index))


def crossfade(pieces, spans, dim):
    """Weight successive pieces by their spans, and add them where they overlap along dim.

    Yields the complete part after each piece.
    """
    pieces, tail = iter(pieces), None
    for span in spans:
        shape = [1] * 4
        shape[dim] = -1
        piece = next(pieces)
        piece = piece * span.weight.to(piece.device).view(shape)
        if tail is not None:
            piece.narrow(dim, 0, tail.shape[dim]).add_(tail)
        complete = span.final_stop - span.start
        yield piece.narrow(dim, 0, complete)
        tail = piece.narrow(dim, complete, piece.shape[dim] - complete).clone()
        del piece       # free a whole strip before the next one is computed


# ------------------------------------------------------------------ channel attention over the whole picture

class StopForward(Exception):
    """Ends a forward after its last global pool, since the rest is not needed."""


class SharedPools:
    """Give the channel attention of every tile the means over the whole picture.

    For modules with an attribute `global_pool`, to be set to a callable (b, h, w, c) -> (b, c); others do not
    change. A mean is the sum over the cores of all tiles. The means of a layer depend on those of the
    layers before, so n layers need n passes over the tiles to be exact. In HAT two or three passes suffice,
    since channel attention has a small weight.
    """
    def __init__(self, network):
        modules = network.modules() if isinstance(network, torch.nn.Module) else ()
        self.layers = [module for module in modules if getattr(module, "global_pool", 0) is None]
        self.means, self.sums, self.view, self.mask = {}, {}, 0, None

    def __enter__(self):
        for i, layer in enumerate(self.layers):
            layer.global_pool = partial(self.pool, i)

    def __exit__(self, *_):
        for layer in self.layers:
            layer.global_pool = None

    def pool(self, i, x):
        """Pool x (b, h, w, c) for layer i. If self.mask is set, add up, and stop at the last layer."""
        key = self.view, i
        if self.mask is not None:
            self.sums[key] = self.sums.get(key, 0) + torch.einsum("bhwc,bhw->c", x.float(), self.mask)
            if i + 1 == len(self.layers):
                raise StopForward
        mean = self.means.get(key)
        return x.mean((1, 2)) if mean is None else mean.to(x.dtype).expand(len(x), -1)

    def measure(self, run, x, tiler, sync):
        """Measure the means over x (B, 3, H, W) and yield (tiles done, expected total).

        run(tiles, mask) is the forward; mask (b, h, w) is 1 in the core of a tile. sync "rough": one pass
        over ROUGH_TILES random tiles. "exact": passes over all tiles until the means are constant.
        """
        if not self.layers:
            return
        cores = list(itertools.product(tiler.cores(x.shape[2]), tiler.cores(x.shape[3])))
        height, width = tiler.spans(x.shape[2], 1)[0], tiler.spans(x.shape[3], 1)[0]
        if sync == "rough" and len(cores) > ROUGH_TILES:
            cores = random.Random(0).sample(cores, ROUGH_TILES)
        for step in range(len(self.layers) if sync == "exact" else 1):
            self.sums, area = {}, 0
            for k in range(0, len(cores), tiler.batch):
                batch = cores[k:k + tiler.batch]
                tiles = [mirrored_slice(mirrored_slice(x, 2, row, height), 3, column, width)
                         for (row, *_), (column, *_) in batch]
                mask = x.new_zeros(len(batch), len(x), height, width)
                for m, ((_, top, bottom), (_, left, right)) in zip(mask, batch):
                    m[:, top:bottom, left:right] = 1
                area += mask.sum().item()
                run(torch.cat(tiles), mask.flatten(0, 1))
                done = step * len(cores) + k + len(batch)
                yield done, len(cores) * max(step + 1, 3 if sync == "exact" else 1)
            previous = self.means
            finite = {key: s for key, s in self.sums.items() if s.isfinite().all()}     # fp16 can overflow
            self.means = {key: s / area for key, s in finite.items()}
            if previous.keys() == self.means.keys() and all(
                    (self.means[key] - mean).abs().max() <= POOL_TOLERANCE * mean.abs().max()
                    for key, mean in previous.items()):
                break


# ------------------------------------------------------------------ one batch of tiles

def flip_rotate(x, view):
    """One of the eight flips and rotations of x (..., h, w), view 0..7."""
    return (x.flip(-1) if view > 3 else x).rot90(view % 4, (-2, -1))


def undo_flip_rotate(x, view):
    x = x.rot90(-(view % 4), (-2, -1))
    return x.flip(-1) if view > 3 else x


def run_views(body, pools, views, tiles, mask=None):
    """Average the outputs of body for the first `views` flips and rotations of tiles, with shared pools."""
    out = 0
    with pools:
        for view in range(views):
            pools.view, pools.mask = view, None if mask is None else flip_rotate(mask, view)
            with contextlib.suppress(StopForward):
                out = out + undo_flip_rotate(body(flip_rotate(tiles, view)), view) / views
    return out


def run_checked(function, device, amp, tiles):
    """Run function on tiles (b, 3, h, w) under autocast, and on those with a broken output again in fp32."""
    tiles = tiles.to(device)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        out = function(tiles).float()
    broken = broken_outputs(out, tiles)
    if broken.any():
        out[broken] = function(tiles[broken]).float()
        if broken_outputs(out, tiles).any():
            raise FloatingPointError("the output of the model is NaN, infinite, or black, in fp32 too")
    return out.cpu()


def broken_outputs(out, tiles):
    """Which outputs (b, 3, H, W) of tiles (b, 3, h, w) are not finite, or black while the tile is not."""
    black = (out.flatten(1).amax(1) <= 0) & (tiles.flatten(1).mean(1) > 0.02)
    return black | ~out.isfinite().flatten(1).all(1)


# ------------------------------------------------------------------ a whole picture in bounded memory

@torch.inference_mode()
def upscale_strips(forward, rgb, scale, tiler, device="cpu", amp=None, progress=None, sync="off", tta=False,
                   strength=1.0, low_freq_lock=False):
    """Upscale rgb (3, H, W) -> generator of strips (3, h, W * scale), top to bottom, float32 in [0, 1], CPU.

    The device holds one batch of tiles, the CPU the picture and one row of tiles. A HATRefiner runs in two
    steps: its hat_model on the tiles, then its refiner on the joined picture. Raises FloatingPointError if
    the output is NaN or black, see run_checked().
        amp: dtype of autocast, or None
        progress: called with (tiles done, total) after each batch
        sync: "off", "rough", or "exact", see SharedPools
        tta: average the outputs for eight flips and rotations, at eight times the cost
        strength: from 0 (Lanczos) to 1 (the model)
        low_freq_lock: see lock_low_frequencies()
    """
    device, (height, width) = torch.device(device), rgb.shape[1:]
    is_hat = hasattr(forward, "hat_model")
    body, views = forward.hat_model if is_hat else forward, 8 if tta else 1
    pools = SharedPools(body if sync != "off" else None)
    total, pool_tiles = tiler.count(height, width), 0
    progress = progress or (lambda done, total: None)

    def measure(tiles, mask):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            run_views(body, pools, views, tiles.to(device), mask.to(device))

    for pool_tiles, expected in pools.measure(measure, rgb[None], tiler, sync):
        progress(pool_tiles, expected + total)
    run_tiles = partial(run_checked, partial(run_views, body, pools, views), device, amp)
    strips = tiler.strips(run_tiles, rgb[None], scale,
                          lambda done, total: progress(pool_tiles + done, pool_tiles + total))
    strips = (strip[0] for strip in strips)
    if is_hat and forward.use_refiner:
        pieces = Tiler(512, 2 * forward.refiner_reach, align=1)
        run_refiner = partial(run_checked, forward.refine, device, amp)
        strips = with_halo(strips, lambda x, top: pieces(run_refiner, x[None], 1)[0],
                           round_up(forward.refiner_reach, scale), height * scale)
    if low_freq_lock:
        strips = with_halo(strips, lambda x, top: lock_low_frequencies(x, rgb, scale, top),
                           (3 * LOCK_SIGMA + 1) * scale, height * scale)
    y = 0
    for strip in strips:
        for rows in strip.split(32 * scale, 1):
            stop = y + rows.shape[1]
            rows = keep_flat_levels(rows.clamp(0, 1), rgb, scale, y)
            if strength < 1:
                rows = lanczos(rgb, (height * scale, width * scale), y, stop).lerp(rows, strength)
            yield rows
            y = stop
        del strip       # free it before the next one is computed


def upscale(forward, rgb, scale, tiler, device="cpu", amp=None, progress=None, **options):
    """Upscale rgb (3, H, W) -> (3, H * scale, W * scale) float32 in [0, 1], CPU. See upscale_strips()."""
    result, y = torch.empty(3, rgb.shape[1] * scale, rgb.shape[2] * scale), 0
    for strip in upscale_strips(forward, rgb, scale, tiler, device, amp, progress, **options):
        result[:, y:y + strip.shape[1]] = strip
        y += strip.shape[1]
    return result


# ------------------------------------------------------------------ operations on strips

def with_halo(strips, function, halo, height):
    """Apply function(x, top), which looks `halo` rows up and down, to a picture in strips (C, h, W).

    height: of the picture. top: the row of the picture at which x begins; a multiple of n if halo and the
    heights of all strips are. Yields the output in strips.
    """
    x, top, context = None, 0, 0        # context: rows at the top of x that are done already
    for strip in strips:
        x = strip if x is None else torch.cat([x, strip], 1)
        del strip
        ready = x.shape[1] - (halo if top + x.shape[1] < height else 0)
        if ready > context:
            yield function(x, top)[:, context:ready]
            drop = max(ready - halo, 0)
            x, top, context = x[:, drop:].clone(), top + drop, ready - drop


def lanczos(x, size, start=0, stop=None, top=0, height=None):
    """Rows start..stop (default: all) of x (C, h, w) resized to (H, W) by antialiased Lanczos, in [0, 1].

    x may be only the rows from `top` on of a picture of this height, if it holds all rows that are needed.
    """
    (H, W), height = size, height or x.shape[1]
    stop, step = H if stop is None else stop, height / H
    reach = 3 * max(step, 1) + 1
    first, last = max(int(start * step - reach), top), min(math.ceil(stop * step + reach), top + x.shape[1])
    box = 0, start * step - first, x.shape[2], min(stop * step - first, last - first)
    planes = [Image.fromarray(plane.numpy()).resize((W, stop - start), Image.Resampling.LANCZOS, box=box)
              for plane in x[:, first - top:last - top]]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).clamp_(0, 1)


def lock_low_frequencies(sr, rgb, scale, top):
    """Give sr (3, h * scale, W * scale) the low frequencies of the input rgb (3, H, W): no color shift.

    sr begins at row `top` of the output. Low frequencies: a Gaussian blur with LOCK_SIGMA.
    """
    top //= scale
    difference = rgb[:, top:top + sr.shape[1] // scale] - F.avg_pool2d(sr, scale)
    reach = 3 * LOCK_SIGMA
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / LOCK_SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    difference = F.pad(difference[None], (reach,) * 4, mode="replicate")
    difference = F.conv2d(F.conv2d(difference, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    return sr + F.interpolate(difference, scale_factor=scale, mode="bilinear")[0]


def keep_flat_levels(sr, rgb, scale, top):
    """Set sr (3, h * scale, W * scale) to 0 or 1 where a channel of the input rgb (3, H, W) is 0 or 1 in all
    pixels within FLAT_REACH. sr begins at row `top` of the output.

    Models are off by about a level there, and a background of 254 is visible on a white page.
    """
    top, rows = top // scale, sr.shape[1] // scale
    first = max(top - FLAT_REACH, 0)
    x, side = rgb[:, first:top + rows + FLAT_REACH], 2 * FLAT_REACH + 1

    def local_maximum(x):
        x = F.max_pool2d(x, (1, side), 1, (0, FLAT_REACH))
        x = F.max_pool2d(x, (side, 1), 1, (FLAT_REACH, 0))[:, top - first:top - first + rows]
        return x.repeat_interleave(scale, 1).repeat_interleave(scale, 2)

    return sr.masked_fill(local_maximum(x) <= 0, 0).masked_fill(local_maximum(-x) <= -1, 1)


# ------------------------------------------------------------------ device and memory

def pick_device(name=None, amp=None):
    """Choose (torch.device, dtype for autocast or None). Raises TileError for a device that does not work.

    name: such as "cuda:1", or None for the best device. amp: "bf16", "fp16", "off", or None: bf16 if native.
    Under torchrun, each process gets its own GPU.
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
    """Whether the hardware of this torch.device computes in bf16; an emulation would be slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def out_of_memory(error):
    """Whether an exception means that memory ran out, by its class or by the words of PyTorch's libraries."""
    words = "out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed"
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def memory_peak(device):
    """Peak memory in bytes: on CUDA since the last call, on a CPU since the process began; 0 if unknown."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        import resource     # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.inference_mode()
def auto_tile_size(forward, device, amp, tiler):
    """Choose the tile size for the pad, batch, and align of a Tiler: CPU_TILE_SIZE, or on CUDA up to
    CUDA_TILE_SIZE, as far as it fits into half of the free memory. Measured with one small tile."""
    align = tiler.align
    if device.type != "cuda":
        return CPU_TILE_SIZE // align * align
    side, before = round_up(128, align), torch.cuda.memory_allocated(device)
    memory_peak(device)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        forward(torch.rand(1, 3, side, side, device=device))
    bytes_per_pixel = max(memory_peak(device) - before, 1) / side**2
    free = torch.cuda.mem_get_info(device)[0]
    fits = (free / 2 / bytes_per_pixel / tiler.batch) ** 0.5 - 2 * tiler.tile_pad
    return max(min(int(fits), CUDA_TILE_SIZE) // align * align, round_up(32, align))


def main():
    """Run the upscaling command."""
    import upscale
    upscale.main()


if __name__ == "__main__":
    main()
