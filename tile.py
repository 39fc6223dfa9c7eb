"""Any picture, any size, through a model without seams. Four rooms: pictures in and out (the only place where they
are opened and saved), the tiler, a whole picture in bounded memory, the upscaling command.

    python tile.py wallpaper.png -o bigger.png
    python tile.py folder more/pictures -o big --weights runs/NAME/best.safetensors
    python tile.py folder -o 4k --fit 3840x2160 --crop focus --skip-larger
    torchrun --nproc_per_node 4 tile.py folder -o big       # four processes share the folder

Needs torch, numpy, Pillow. Copied alone it works with any forward(x) that makes (b, 3, h, w) scale times larger;
only the command wants model.py and convert.py beside it.
"""
import argparse
import contextlib
import ctypes
import errno
import itertools
import math
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from images import (READ_SUFFIXES, WRITE_FORMATS, PictureError, ProgressLine, fail, color_space, composite, find_pictures, picture_size,
                    printable, read_picture, save_strips)

# ------------------------------------------------------------------ the tiler

def multiple(n, step):
    """The least multiple of step that is no less than n."""
    return -(-n // step) * step


@dataclass
class Span:
    """One tile along one axis. It reads input from `read`; of its output, pixels start..stop of the whole result are
    used, with these weights; after it, everything before `ready` is final."""
    read: int
    start: int
    stop: int
    ready: int
    weight: torch.Tensor


class Tiler:
    """tiler(forward, x, scale) = forward(x), tile by tile; gradients flow.

    Tiles advance by tile_size and see tile_pad more on either side. All are equally large, and no larger than it takes
    to cover the picture with as many of them as tile_size allows. They start on multiples of `align`, the model's
    window, so that windows fall where they do in the whole picture; a picture that is no multiple of align is mirrored
    out to one and the result cropped; the last tile moves back to fit. Of the 2 * tile_pad that neighbours share, each
    one's outer quarter is dropped (a model is at its worst there) and the middle half is a linear crossfade: a forward
    that reaches no further than tile_pad / 2 gives exactly the untiled result. Pixels are input pixels; batch is tiles
    per forward.
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
        padded = multiple(side, self.align)
        inner = max(padded - 2 * self.tile_pad, 1)  # what the tiles have to advance in all
        tiles = math.ceil(inner / self.tile_size)
        advance = multiple(math.ceil(inner / tiles), self.align)
        width = min(advance + 2 * self.tile_pad, padded)
        reads = [*range(0, padded - width, advance), padded - width]
        fade, end = self.tile_pad * scale, side * scale
        ramps = [(a + width + b - self.tile_pad) // 2 * scale for a, b in zip(reads, reads[1:])]
        ramps = [-fade, *ramps, end]  # where they begin; the first and the last lie just outside
        spans = []
        for read, rise, fall in zip(reads, ramps, ramps[1:]):
            start, stop = max(rise, 0), min(fall + fade, end)  # a crossfade may end in the mirrored margin
            weight, at = torch.ones(stop - start), torch.arange(start, stop) + 0.5
            if fade:
                weight = ((at - rise) / fade).clamp(max=1) - ((at - fall) / fade).clamp(min=0)
            spans.append(Span(read, start, stop, fall, weight))
        return width, spans

    def seams(self, height, width, scale):
        """Where a seam would show in the result: (rows, columns) at which a crossfade begins, is in its middle, ends."""
        fade = self.tile_pad * scale
        return [[s.start + at for s in self.spans(side, scale)[1][1:] for at in (0, fade // 2, fade)]
                for side in (height, width)]

    def count(self, height, width):
        """Tiles for a picture of this size."""
        return len(self.spans(height, 1)[1]) * len(self.spans(width, 1)[1])

    def cores(self, side):
        """Along an axis, each tile's own stretch: (read, start, stop), start and stop from the tile's edge. Together
        they cover the picture and its mirrored margin once."""
        width, spans = self.spans(side, 1)
        cuts = [0, *(s.start + self.tile_pad // 2 for s in spans[1:]), spans[-1].read + width]
        return [(s.read, a - s.read, b - s.read) for s, a, b in zip(spans, cuts, cuts[1:])]

    def smaller(self):
        """A Tiler that needs clearly less memory, or None if there is none worth having."""
        if self.batch > 1:
            return Tiler(self.tile_size, self.tile_pad, self.batch // 2, self.align)
        if self.tile_size < 2 * max(self.align, self.tile_pad):
            return None
        return Tiler(self.tile_size // 2 // self.align * self.align, self.tile_pad, 1, self.align)

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
    return x.index_select(dim, torch.minimum(at, 2 * side - 2 - at))


def crossfaded(pieces, spans, dim):
    """Weigh successive pieces and add them where they overlap along dim; yields the finished stretches in order."""
    pieces, tail = iter(pieces), None
    for span in spans:
        shape = [1] * 4
        shape[dim] = -1
        piece = next(pieces)
        piece = piece * span.weight.to(piece.device).view(shape)
        if tail is not None:
            piece.narrow(dim, 0, tail.shape[dim]).add_(tail)
        done = span.ready - span.start
        yield piece.narrow(dim, 0, done)
        tail = piece.narrow(dim, done, piece.shape[dim] - done).clone()
        del piece


# ------------------------------------------------------------------ a whole picture, in bounded memory

class Enough(Exception):
    """Raised in the middle of a forward whose rest nobody needs."""


class SharedPools:
    """Tells every tile what HAT's channel attention would see in the whole picture: the means over the picture of what
    its layers pool. For networks whose modules have an attribute `global_pool`, to be set to a callable
    (b, h, w, c) -> (b, c) on maps as large as the input; on others it has no effect.

    The means are found by running the tiles, summing what each contributes of its own, and running them again with the
    means found so far, till they stay. The first layer's are right after one pass, and with those the second's after
    two: after as many passes as there are layers all are exact, but since channel attention is a small part of HAT, two
    or three do. A pass ends at the last pool, at about three quarters of a forward.
    """
    ROUGH_TILES = 64    # that "rough" looks at, drawn from all
    STEADY = 1e-3       # change of a mean, over the largest of its layer, below which "exact" is done

    def __init__(self, network):
        modules = network.modules() if isinstance(network, torch.nn.Module) else ()
        self.layers = [m for m in modules if getattr(m, "global_pool", 0) is None]
        self.means, self.sums, self.turn, self.mask = {}, {}, 0, None

    def __enter__(self):
        for i, layer in enumerate(self.layers):
            layer.global_pool = partial(self.pool, i)

    def __exit__(self, *_):
        for layer in self.layers:
            layer.global_pool = None

    def pool(self, i, x):
        key = self.turn, i
        if self.mask is not None:
            self.sums[key] = self.sums.get(key, 0) + torch.einsum("bhwc,bhw->c", x.float(), self.mask)
            if i + 1 == len(self.layers):
                raise Enough
        mean = self.means.get(key)
        return x.mean((1, 2)) if mean is None else mean.to(x.dtype).expand(len(x), -1)

    def settle(self, run, x, tiler, sync):
        """Finds the means: sync "rough" in one pass over some of the tiles of x (B, 3, H, W), "exact" in as many passes
        over all as it takes. run(tiles, mask) is the forward; mask (b, h, w) is one where a tile stands for the
        picture. A generator: yields (tiles done, tiles to do as far as one can tell)."""
        if not self.layers:
            return
        places = list(itertools.product(tiler.cores(x.shape[2]), tiler.cores(x.shape[3])))
        height, width = tiler.spans(x.shape[2], 1)[0], tiler.spans(x.shape[3], 1)[0]
        if sync == "rough" and len(places) > self.ROUGH_TILES:
            places = random.Random(0).sample(places, self.ROUGH_TILES)
        for step in range(len(self.layers) if sync == "exact" else 1):
            self.sums, area = {}, 0
            for k in range(0, len(places), tiler.batch):
                some = places[k:k + tiler.batch]
                tiles = [window(window(x, 2, row, height), 3, column, width) for (row, *_), (column, *_) in some]
                mask = x.new_zeros(len(some), len(x), height, width)
                for m, ((_, top, bottom), (_, left, right)) in zip(mask, some):
                    m[:, top:bottom, left:right] = 1
                area += mask.sum().item()
                run(torch.cat(tiles), mask.flatten(0, 1))
                done = step * len(places) + k + len(some)
                yield done, len(places) * max(step + 1, 3 if sync == "exact" else 1)
            means = {key: s / area for key, s in self.sums.items() if s.isfinite().all()}  # fp16 may overflow
            steady = means.keys() == self.means.keys() and all(
                (means[key] - m).abs().max() <= self.STEADY * m.abs().max() for key, m in self.means.items())
            self.means = means
            if steady:
                break


def turn(x, k):
    """One of the eight flips and quarter turns of (..., h, w), k from 0 to 7; turn_back undoes it."""
    return (x.flip(-1) if k > 3 else x).rot90(k % 4, (-2, -1))


def turn_back(x, k):
    x = x.rot90(-(k % 4), (-2, -1))
    return x.flip(-1) if k > 3 else x


def doubtful(out, tiles, scale):
    """Which results (b, 3, h * scale, w * scale) of tiles (b, 3, h, w) cannot be right: not finite, or, averaged over
    16x16 input pixels, too far from the input (a black tile, say) -> (b,) bool."""
    side = min(16, *tiles.shape[2:])
    before, after = F.avg_pool2d(tiles, side), F.avg_pool2d(out, side * scale)
    far = (after - before).abs().flatten(1).mean(1) > 0.02 + 0.2 * before.abs().flatten(1).mean(1)
    return far | ~out.isfinite().flatten(1).all(1)


@torch.inference_mode()
def upscaled(forward, rgb, scale, tiler, device="cpu", amp=None, progress=None, sync="off", tta=False, strength=1.0,
             low_freq_lock=False):
    """(3, H, W) -> generator of strips (3, h, W * scale), top to bottom, float32 in [0, 1] on the CPU. The device holds
    one batch of tiles, the CPU the picture and one row of tiles.

    A forward with a `refined` (our HATRefiner) is taken apart: its hat_model(x) goes tile by tile, refined(sr), which
    looks `reach` pixels far, over the joined picture. amp: a dtype for autocast, or None for the forward's own.
    progress(done, total) after every batch of tiles. sync "rough" or "exact": see SharedPools. tta: the mean of eight
    flips and turns, at eight times the cost. strength 0..1: from plain Lanczos to the model. low_freq_lock: see
    locked. A tile whose output is doubtful is done again without autocast; FloatingPointError if it stays so."""
    device, (height, width) = torch.device(device), rgb.shape[1:]
    body = forward.hat_model if hasattr(forward, "refined") else forward
    pools = SharedPools(body if sync != "off" else None)
    done, before, total = 0, 0, tiler.count(height, width)

    def run(function, amp, *inputs):
        with torch.autocast(device.type, amp) if amp else contextlib.nullcontext():
            return function(*(x.to(device) for x in inputs))

    def turned_forward(tiles, mask=None):
        out, turns = 0, 8 if tta else 1
        with pools:
            for k in range(turns):
                pools.turn, pools.mask = k, None if mask is None else turn(mask, k)
                with contextlib.suppress(Enough):
                    out = out + turn_back(body(turn(tiles, k)), k) / turns
        return out

    def checked(function, scale, tiles):
        tiles = tiles.to(device)
        out = run(function, amp, tiles).float()
        bad = doubtful(out, tiles, scale)
        if bad.any():
            out[bad] = run(function, None, tiles[bad]).float()
            if not out.isfinite().all():
                raise FloatingPointError("the model gives NaN or infinite values here, in fp32 too; nothing is saved")
            if doubtful(out, tiles, scale).any():
                raise FloatingPointError("what the model makes of this has little to do with it, in fp32 too; "
                                         "nothing is saved")
        return out.cpu()

    def counted(tiles):
        nonlocal done
        out = checked(turned_forward, scale, tiles)
        done += len(tiles)
        if progress:
            progress(before + done, before + total)
        return out

    for before, expected in pools.settle(partial(run, turned_forward, amp), rgb[None], tiler, sync):
        if progress:
            progress(before, expected + total)
    strips = map(lambda strip: strip[0], tiler.strips(counted, rgb[None], scale))
    if getattr(forward, "refine", hasattr(forward, "refined")):
        pieces = Tiler(512, 2 * forward.reach, align=1)  # exact, as far as forward.reach is
        strips = with_halo(strips, lambda x, top: pieces(partial(checked, forward.refined, 1), x[None], 1)[0],
                           multiple(forward.reach, scale), height * scale)
    if low_freq_lock:
        strips = with_halo(strips, lambda x, top: locked(x, rgb, scale, top), (3 * LOCK_SIGMA + 1) * scale,
                           height * scale)
    y = 0
    for strip in strips:
        for rows in strip.split(64, 1):
            rows, stop = rows.clamp(0, 1), y + rows.shape[1]
            if strength < 1:
                rows = lanczos(rgb, (height * scale, width * scale), y, stop).lerp(rows, strength)
            yield rows
            y = stop
        del strip  # large in a wide picture, and the next is on its way


def upscale(forward, rgb, scale, tiler, device="cpu", amp=None, progress=None, **how):
    """upscaled, joined: (3, H, W) -> (3, H * scale, W * scale) float32 in [0, 1] on the CPU."""
    result, y = torch.empty(3, rgb.shape[1] * scale, rgb.shape[2] * scale), 0
    for strip in upscaled(forward, rgb, scale, tiler, device, amp, progress, **how):
        result[:, y:y + strip.shape[1]] = strip
        y += strip.shape[1]
    return result


def with_halo(strips, function, halo, height):
    """function(x, top), which looks `halo` rows up and down, over a picture `height` high that arrives in strips
    (C, h, W): yields what it makes of the whole, in strips. top is the row of the picture that x begins with, a
    multiple of anything that halo and all heights are multiples of."""
    x, top, above = None, 0, 0  # above: rows of x that are through and stay as context
    for strip in strips:
        x = strip if x is None else torch.cat([x, strip], 1)
        del strip
        ready = x.shape[1] - (halo if top + x.shape[1] < height else 0)
        if ready > above:
            yield function(x, top)[:, above:ready]
            drop = max(ready - halo, 0)
            x, top, above = x[:, drop:].clone(), top + drop, ready - drop


def lanczos(x, size, start=0, stop=None, top=0, height=None):
    """Rows start..stop (default: all) of x (C, h, w) resized to size (H, W) by Pillow's antialiased Lanczos, in [0, 1].
    x may be but rows of a picture `height` high, from row top on, as far as they are looked at."""
    (H, W), height = size, height or x.shape[1]
    stop, step = H if stop is None else stop, height / H
    reach = 3 * max(step, 1) + 1
    first, last = max(int(start * step - reach), top), min(math.ceil(stop * step + reach), top + x.shape[1])
    box = 0, start * step - first, x.shape[2], min(stop * step - first, last - first)
    planes = [Image.fromarray(plane.numpy()).resize((W, stop - start), Image.Resampling.LANCZOS, box=box)
              for plane in x[:, first - top:last - top]]
    return torch.from_numpy(np.stack([np.asarray(p) for p in planes])).clamp_(0, 1)


def resized(strips, height, size):
    """Strips (C, h, W) of a picture `height` high -> strips of it at size (H, W), as lanczos makes it."""
    x, top, start, step = None, 0, 0, height / size[0]
    reach = 3 * max(step, 1) + 1
    for strip in strips:
        x = strip if x is None else torch.cat([x, strip], 1)
        del strip
        end = top + x.shape[1]
        stop = size[0] if end == height else int((end - reach) / step)
        if stop > start:
            yield lanczos(x, size, start, stop, top, height)
            drop = max(int(stop * step - reach) - top, 0)
            x, top, start = x[:, drop:].clone(), top + drop, stop


LOCK_SIGMA = 8  # input pixels


def locked(sr, rgb, scale, top):
    """sr (3, h * scale, W * scale), rows from top on, with the low frequencies (Gaussian, sigma LOCK_SIGMA) of its
    input rgb (3, H, W): colours and large shades cannot drift."""
    top //= scale
    rest = rgb[:, top:top + sr.shape[1] // scale] - F.avg_pool2d(sr, scale)
    reach = 3 * LOCK_SIGMA
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / LOCK_SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    rest = F.pad(rest[None], (reach,) * 4, mode="replicate")
    rest = F.conv2d(F.conv2d(rest, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    return sr + F.interpolate(rest, scale_factor=scale, mode="bilinear")[0]


def upscaled_picture(forward, picture, scale, tiler, size=None, alpha="lanczos", **how):
    """Picture -> generator of strips (3 or, with alpha, 4, h, W), top to bottom, of size (H, W), by default scale times
    the picture's; the model's result is resized to any other. alpha: "lanczos" or "model", which takes it through
    forward too. how: see upscaled."""
    height, width = picture.rgb.shape[1:]
    native = height * scale, width * scale
    size = size or native

    def through_model(x, **how):
        strips = upscaled(forward, x, scale, tiler, **how)
        return strips if size == native else resized(strips, native[0], size)

    if picture.alpha is None:
        yield from through_model(picture.rgb, **how)
        return
    seen_through = (picture.alpha < 1).any()
    by_model = None
    if alpha == "model" and seen_through:       # in step with the colours, whose progress is that of both
        by_model = through_model(picture.alpha.expand(3, -1, -1), **how | {"progress": None})
    y = 0
    for strip in through_model(bled(picture.rgb, picture.alpha), **how):
        stop = y + strip.shape[1]
        a = next(by_model).mean(0, keepdim=True) if by_model else lanczos(picture.alpha, size, y, stop)
        yield torch.cat([strip, a])
        y = stop


def upscale_picture(forward, picture, scale, tiler, **how):
    """upscaled_picture, joined: Picture -> Picture."""
    x = torch.cat(list(upscaled_picture(forward, picture, scale, tiler, **how)), 1)
    return replace(picture, rgb=x[:3], alpha=None if picture.alpha is None else x[3:])


def cropped(picture, size, where="center"):
    """The largest part of a Picture with the aspect of size (H, W): "center", "top" (if it is cut at the sides, their
    middle) or "focus", where there is most detail."""
    height, width = picture.rgb.shape[1:]
    h, w = min(height, max(round(width * size[0] / size[1]), 1)), min(width, max(round(height * size[1] / size[0]), 1))
    rows_go, spare = h < height, max(height - h, width - w)  # rows are cut off, or columns, never both
    start = 0 if where == "top" and rows_go else spare // 2
    if where == "focus" and spare and min(height, width) > 1:
        shrunk = [max(side * 256 // max(height, width), 2) for side in (height, width)]
        x = F.adaptive_avg_pool2d(composite(picture, 0.5), shrunk)
        detail = ((x[:, 1:, 1:] - x[:, :-1, 1:]).abs() + (x[:, 1:, 1:] - x[:, 1:, :-1]).abs()).sum(0)
        profile = detail.sum(1 if rows_go else 0)
        taken = max(round(len(profile) * (h / height if rows_go else w / width)), 1)
        inside = profile.unfold(0, taken, 1).sum(1)
        start = round(inside.argmax().item() / max(len(inside) - 1, 1) * spare)
    top, left = (start, 0) if rows_go else (0, start)
    part = slice(None), slice(top, top + h), slice(left, left + w)
    return replace(picture, rgb=picture.rgb[part], alpha=None if picture.alpha is None else picture.alpha[part])


def bled(rgb, alpha):
    """Colours spread from where they show into fully transparent pixels, where files keep black, white or rubbish that
    would fringe the edges. (3, H, W), (1, H, W) -> (3, H, W). Halves until all has a colour, then fills upwards."""
    shows = alpha > 0
    if shows.all() or not shows.any():
        return rgb
    sums, weights = [rgb[None] * alpha], [alpha[None]]
    while not (weights[-1] > 0).all():
        sums.append(F.avg_pool2d(sums[-1], 2, ceil_mode=True))
        weights.append(F.avg_pool2d(weights[-1], 2, ceil_mode=True))
    fill = sums[-1] / weights[-1]
    for total, weight in zip(sums[-2::-1], weights[-2::-1]):
        fill = F.interpolate(fill, scale_factor=2, mode="bilinear")[:, :, :total.shape[2], :total.shape[3]]
        fill = torch.where(weight > 0, total / weight.clamp(min=1e-8), fill)
    return torch.where(shows, rgb, fill[0])


# ------------------------------------------------------------------ the command

def bf16_is_native(device):
    """Whether bf16 is done in hardware on this torch.device, not slowly imitated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asks)


def device_of(args):
    """What --device and --amp say, by default the best there is -> (torch.device, dtype for autocast or None); of several
    processes of torchrun each gets a GPU of its own. Raises ValueError for a device that is not there."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(torch.cuda.device_count(), 1))
        torch.zeros(1, device=device).item()        # of meta there is nothing to be had
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0].split('. ')[0]}") from None
    amp = args.amp or ("bf16" if bf16_is_native(device) else "off")
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def keep_freed_memory():
    """Tells glibc to keep what is freed for the next tile, or training step: giving it back to Linux and fetching it
    again, page by page, takes up to half of the time on a CPU. Where there is no glibc it does nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)              # M_MMAP_MAX: no mapping of its own for any block
        mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass


def out_of_memory(error):
    """Whether an exception says that memory ran out, in any of the words that PyTorch and its libraries have for it."""
    words = "out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed"
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def free_memory(device):
    """Bytes still to be had on a torch.device; for a CPU within the limits of process and container, and shared with
    the other processes of torchrun. Where nothing is known, 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        found.append(int(next(x for x in open("/proc/meminfo") if x.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        cache = next(x for x in open(group / "memory.stat") if x.startswith("inactive_file")).split()[1]
        found.append(limit - int((group / "memory.current").read_text()) + int(cache))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    return max(min(found, default=2**32), 0) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_peak(device):
    """Bytes that the process has held at most, on a CPU ever, on CUDA since the last call. 0 if nobody counts them."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return 0


@torch.inference_mode()
def auto_tile_size(forward, device, amp, tiler):
    """The tile size for a forward on this device and a Tiler's pad, batch and align: 384 (512 on CUDA; beyond, the
    overlap hardly matters), or what fits into half of the free memory, by a trial on one small tile."""
    def peak_after(side):
        with torch.autocast(device.type, amp) if amp else contextlib.nullcontext():
            forward(torch.rand(1, 3, side, side, device=device))
        return memory_peak(device)

    align, side, least = tiler.align, multiple(128, tiler.align), multiple(32, tiler.align)
    most = (512 if device.type == "cuda" else 384) // align * align
    try:
        before = peak_after(align)  # libraries loaded, buffers made
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else before
        per_pixel = max((peak_after(side) - before) / side**2, 2048)
    except Exception as e:
        if not out_of_memory(e):
            raise
        return least
    fits = (free_memory(device) / 2 / per_pixel / tiler.batch) ** 0.5 - 2 * tiler.tile_pad
    return max(min(int(fits) // align * align, most), least)


def file_id(path):
    """What tells a file from all others, whatever its name; None where there is none, or the disk does not say."""
    try:
        status = os.stat(path)
        return (status.st_dev, status.st_ino) if status.st_ino else None
    except OSError:
        return None


def plan(inputs, out, suffix):
    """Which picture goes where -> list of (source, target). suffix None keeps the source's where it can be written.
    Raises PictureError if there is nothing to do, or if two pictures or a picture and its source would collide."""
    def real(path):
        return Path(os.path.realpath(path))  # Path.resolve raises where links go in circles

    inputs, out = [Path(p) for p in inputs], Path(out)
    single = len(inputs) == 1 and not os.path.isdir(inputs[0]) and not os.path.isdir(out)
    to_file = single and out.suffix.lower() in {*READ_SUFFIXES, ".jxl", ".heic", ".heif", *Image.registered_extensions()}
    if not to_file and out.suffix.lower() in READ_SUFFIXES and not os.path.isdir(out):
        raise PictureError(f"{printable(out)} is the name of a file; for more than one picture give a folder")
    if to_file and out.suffix.lower() not in WRITE_FORMATS:
        raise PictureError(f"{printable(out)}: cannot save as {out.suffix}; use one of {' '.join(WRITE_FORMATS)}")
    jobs = {}
    inputs.sort(key=lambda p: p.suffix.lower() not in READ_SUFFIXES and not os.path.isdir(p))     # captions, say, come last
    for given in inputs:
        folder = os.path.isdir(given)
        if folder and real(out) == real(given):
            raise PictureError(f"{printable(out)} holds the pictures themselves; choose another --out")
        among = folder and real(given) in real(out).parents
        for source in find_pictures(given):
            if among and real(out) in real(source).parents:
                continue  # our own results of an earlier run
            ending = suffix or (source.suffix if source.suffix.lower() in WRITE_FORMATS else ".png")
            name = source.relative_to(given) if folder else Path(source.name)
            target = out if to_file else out / name.with_suffix(ending)
            if jobs.setdefault(target, source) != source:
                if source.suffix.lower() not in READ_SUFFIXES and jobs[target].suffix.lower() in READ_SUFFIXES:
                    continue
                raise PictureError(f"{printable(jobs[target])} and {printable(source)} would both become "
                                   f"{printable(target)}; rename one, or try --format keep")
    sources = {same for source in jobs.values() for same in (real(source), file_id(source))} - {None}
    for target in jobs:
        if sources & {real(target), file_id(target)}:      # also on a disk that ignores case
            raise PictureError(f"{printable(target)} is itself one of the pictures; choose another --out")
    if not jobs:
        raise PictureError(f"no picture in {', '.join(printable(p) for p in inputs)}; "
                           f"looked for {' '.join(sorted(READ_SUFFIXES))}")
    return [(source, target) for target, source in jobs.items()]


class Progress:
    """Report the tiles of one picture."""
    def __init__(self, label, pixels):
        self.label, self.pixels, self.begun, self.line = label, pixels, time.time(), ProgressLine()

    def __call__(self, done, total):
        rate = done / (time.time() - self.begun)
        left = int((total - done) / rate)
        self.line(f"tile {done}/{total}  {rate * self.pixels / total / 1e6:.3f} Mpixel/s  "
                  f"{left // 60}:{left % 60:02d} left  {self.label}")


def width_by_height(text):
    try:
        width, height = map(int, text.lower().split("x"))
        if min(width, height) > 0:
            return height, width
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is no size; write it as 3840x2160")


def tile_size_or_auto(text):
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no size; give a number of pixels or auto") from None


def main():
    p = argparse.ArgumentParser(
        description="Upscale pictures. Alpha (not in JPEG), grey (PNG, JPEG), 16 bit (PNG), colour profile and EXIF are kept.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python tile.py wallpaper.jpg -o wallpaper-2x.png\n  python tile.py pictures -o upscaled\n"
               "  python tile.py pictures -o 4k --fit 3840x2160 --crop focus --skip-larger\n"
               "  torchrun --nproc_per_node 2 tile.py pictures -o upscaled\n\n"
               "exit code: 0 all done, 1 some pictures failed (named), 2 nothing could be done as asked")
    p.add_argument("inputs", nargs="+", metavar="IN", help="pictures, or folders of them (trees, mirrored in --out)")
    p.add_argument("-o", "--out", required=True, help="folder for the results; a file name when IN is one picture")
    p.add_argument("--weights", help="model file; with the package spandrel of any architecture it knows (default: "
                                     "weights/web-low, clean-low for pictures in which that finds nothing to repair; "
                                     "without them the newest runs/*/best.safetensors)")

    g = p.add_argument_group("the result")
    g.add_argument("--fit", type=width_by_height, metavar="WxH", help="exactly this size; what is too much is cut off")
    g.add_argument("--crop", default="center", choices=["center", "top", "focus"],
                   help="with --fit, which part stays; focus: where there is most detail (default: center)")
    g.add_argument("--scale", type=float, help="times larger, 1.5 say: the model's own scale, then Lanczos")
    g.add_argument("--skip-larger", action="store_true", help="with --fit: leave out what is that large already")
    g.add_argument("--format", choices=["png", "webp", "avif", "jpg", "keep"],
                   help="of results in a folder; keep: as the input, where it can be written (default: png)")
    g.add_argument("--quality", type=int, default=95, help="of JPEG, WebP and AVIF, 1..100 (default: 95); WebP stores colours at "
                                                           "half the resolution whatever it is")
    g.add_argument("--depth", type=int, choices=[8, 16], help="bits; 16 for PNG (default: as the input)")
    g.add_argument("--dither", action="store_true", help="8 bit without bands in soft gradients; larger files")
    g.add_argument("--icc", default="keep", choices=["keep", "srgb"],
                   help="colour profile: kept, or colours of 8 bit converted to sRGB (default: keep)")
    g.add_argument("--overwrite", action="store_true", help="replace results that exist (default: they are skipped)")
    g.add_argument("--skip-existing", action="store_true", help="skip results that exist without naming each")

    g = p.add_argument_group("how the model is used")
    g.add_argument("--strength", type=float, default=1.0, help="0..1, from plain Lanczos to the model (default: 1)")
    g.add_argument("--low-freq-lock", action="store_true", help="keep the large shades of the input: no colour shift")
    g.add_argument("--tta", action="store_true", help="mean of 8 flips and turns: a little better, 8 times slower")
    g.add_argument("--alpha", default="lanczos", choices=["lanczos", "model"], help="enlarged by (default: lanczos)")
    g.add_argument("--tile-size", "--tile", type=tile_size_or_auto, metavar="N|auto",
                   help="input pixels from tile to tile, at most; auto: by free memory. Halved when memory runs out "
                        "all the same (default: auto)")
    g.add_argument("--tile-pad", type=int, help="pixels more that a tile sees on each side (default: two windows; "
                                                "16 for low, 32 for larger models)")
    g.add_argument("--sync", default="off", choices=["off", "rough", "exact"],
                   help="whether tiles share the channel attention of the whole picture (default: off)")
    g.add_argument("--batch", type=int, default=1, help="tiles at once (default: 1)")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    g.add_argument("--amp", choices=["bf16", "fp16", "off"], help="precision (default: bf16 if native, else off)")
    args = p.parse_args()
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # a log in cp1252, a name in Japanese
    for name in ("SIGTERM", "SIGHUP"):  # a polite kill and a closed terminal clean up as Ctrl-C does; nohup stays
        if getattr(signal, name, None) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        run(args)
    except KeyboardInterrupt:
        ProgressLine.clear()
        print("interrupted; finished pictures are kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:     # nobody reads our lines any more, as after head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def refuse_nonsense(args):
    """Raises ValueError for arguments that do not go together."""
    if not 1 <= args.quality <= 100:
        raise ValueError(f"--quality {args.quality} does not work; use 1 to 100")
    if not 0 <= args.strength <= 1:
        raise ValueError(f"--strength {args.strength:g} does not work; use 0 to 1")
    if args.scale is not None and not 0 < args.scale <= 16:
        raise ValueError(f"--scale {args.scale:g} does not work; use more than 0, 16 at most")
    if args.scale and args.fit:
        raise ValueError("--fit and --scale exclude each other; give one")
    if not args.fit and (args.skip_larger or args.crop != "center"):
        raise ValueError("--crop and --skip-larger go with --fit; give the size with it")
    if args.dither and args.depth == 16:
        raise ValueError("--dither is for 8 bit; leave --dither or --depth 16 out")
    if args.skip_existing and args.overwrite:
        raise ValueError("--skip-existing and --overwrite exclude each other; give one")


def one_picture(fitting, source, target, args, tiler, device, amp, label):
    """Reads, upscales, saves -> (a line that says so, pixels made; 0 if it was left out). fitting(rgb) -> the network
    for this picture, and what to say of it."""
    begun = time.time()
    if os.path.exists(target) and not args.overwrite:  # two names in one on a disk that ignores case, say
        raise PictureError(f"{printable(target)} is there by now; --overwrite replaces it")
    if args.skip_larger:
        height, width = picture_size(source)
        if height >= args.fit[0] and width >= args.fit[1]:
            return f"{printable(source)} is {width}x{height}, skipped", 0
    picture, kind = read_picture(source, args.icc == "srgb"), WRITE_FORMATS[target.suffix.lower()]
    if picture.gray and color_space(picture.icc) == b"RGB ":     # such a profile fits no grey file
        picture.gray = False
    if picture.gray and picture.icc and kind in ("WEBP", "AVIF"):  # they hold neither
        picture = read_picture(source, srgb=True)
        if picture.icc:
            picture.icc, picture.note = None, "grey profile left behind"
    height, width = picture.rgb.shape[1:]
    network, note = fitting(picture.rgb)
    notes = [note, picture.note]
    if kind == "JPEG" and picture.alpha is not None:
        notes.append("transparency laid on white")
    if kind != "PNG" and picture.depth == 16 and args.depth != 8:
        notes.append("16 bit became 8")
    scale = network.scale
    size = height * scale, width * scale
    if args.fit:
        size, picture = args.fit, cropped(picture, args.fit, args.crop)
    elif args.scale:
        size = max(round(height * args.scale), 1), max(round(width * args.scale), 1)
    picture.depth = args.depth or picture.depth
    progress = label and Progress(label, size[0] * size[1])
    strips = upscaled_picture(network, picture, scale, tiler, size, args.alpha, device=device, amp=amp,
                              progress=progress, sync=args.sync, tta=args.tta, strength=args.strength,
                              low_freq_lock=args.low_freq_lock)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_strips(target, strips, size, picture, args.quality, args.dither)
    line = f"{printable(target)}  {width}x{height} -> {size[1]}x{size[0]}  {time.time() - begun:.1f} s"
    said = "; ".join(filter(None, notes))
    return line + (f"  ({said})" if said else ""), size[0] * size[1]


def on_device(weights, device, error):
    return f"{printable(weights)} on {device}: {(str(error).splitlines() or [type(error).__name__])[0]}"


def run(args):
    """The command, its arguments parsed. Ends the process with the exit code."""
    keep_freed_memory()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        refuse_nonsense(args)
        jobs = plan(args.inputs, args.out, None if args.format == "keep" else f".{args.format or 'png'}")
        to_file, kinds = jobs[0][1] == Path(args.out), {WRITE_FORMATS[target.suffix.lower()] for _, target in jobs}
        if to_file and args.format and WRITE_FORMATS.get(f".{args.format}") not in kinds:
            raise ValueError(f"--format {args.format} is for results in a folder; {printable(args.out)} says its own")
        if args.depth == 16 and kinds != {"PNG"}:
            raise ValueError("--depth 16 works with PNG only; add --format png")
        Image.init()
        for kind in kinds - {"PNG", *Image.SAVE}:
            raise ValueError(f"this Pillow cannot write {kind}; choose another --format, or pip install -U pillow")
        device, amp = device_of(args)
    except ValueError as e:  # PictureError is one
        fail(e)
    top = Path(args.out).parent if to_file else Path(args.out)
    try:
        top.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=top).close()
    except OSError as e:
        fail(f"cannot write to {printable(top)}: {e.strerror}; choose another --out")
    if ranks > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))  # all wait for the slowest

    todo = []
    for source, target in jobs[rank::ranks]:
        if args.overwrite or not os.path.exists(target):
            todo.append((source, target))
        elif not args.skip_existing:
            print(f"{printable(target)} exists, skipped (--overwrite replaces it)")
    done, pixels, failed, skipped, begun = 0, 0, 0, len(jobs[rank::ranks]) - len(todo), time.time()
    if todo:
        try:
            import convert
            weights = args.weights or convert.find_weights()
            sharper = None if args.weights else convert.find_sharp(weights)
            network, sharp = convert.load_any(weights, device), sharper and convert.load_any(sharper, device)
        except ModuleNotFoundError as e:
            fail(f"{e}; the command needs model.py and convert.py beside tile.py and the packages of requirements.txt")
        except (ValueError, OSError) as e:  # WeightsError is the first
            fail(e)
        except (RuntimeError, MemoryError) as e:
            fail(on_device(weights, device, e))
        if args.sync != "off" and not hasattr(network, "hat_model"):
            fail(f"--sync is for HAT, which {printable(weights)} is not; leave it out")
        align = getattr(getattr(network, "hat_model", None), "window", 16)
        pad = 2 * align if args.tile_pad is None else args.tile_pad
        try:
            tiler = Tiler(align if args.tile_size is None else args.tile_size, pad, args.batch, align)
            if args.tile_size is None:
                tiler.tile_size = auto_tile_size(network, device, amp, tiler)
        except ValueError as e:
            fail(e)
        except (RuntimeError, MemoryError) as e:  # a GPU too old for this torch, say
            fail(on_device(weights, device, e))
        if rank == 0:
            precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[amp]
            print(f"{printable(weights)}: {network.scale}x on {device}, {precision}, tiles of {tiler.tile_size}"
                  + (f"; undamaged pictures by {sharper.stem}" if sharp else ""), flush=True)

    def fitting(rgb):
        found = sharp and convert.undamaged(network, sharp, rgb)
        return (sharp, f"undamaged: {sharper.stem}") if found else (network, "")

    for number, (source, target) in enumerate(todo, 1):
        label = f"{number}/{len(todo)} {printable(source.name)}" if rank == 0 else None
        while True:
            problem = smaller = None
            try:
                line, made = one_picture(fitting, source, target, args, tiler, device, amp, label)
            except PictureError as e:
                problem = str(e)
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT):
                    fail(f"cannot write {printable(target)}: {e.strerror}; {done} pictures done so far are kept")
                problem = f"cannot write {printable(target)}: {e.strerror or e}"
            except Exception as e:  # what the model throws concerns this picture; the next ones may do
                said = " ".join(str(e).split())
                kind = "" if isinstance(e, FloatingPointError) else type(e).__name__ + ": " * bool(said)
                problem = f"{printable(source)}: {kind}{said}"
                smaller = tiler.smaller() if out_of_memory(e) else None
            ProgressLine.clear()
            if not smaller:
                break
            tiler = smaller  # out here the exception has let go of what it held
            print(f"out of memory; going on with tiles of {tiler.tile_size}, {tiler.batch} at once",
                  file=sys.stderr, flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if problem:
            print(problem, file=sys.stderr, flush=True)
            failed += 1
        else:
            print(line, flush=True)
            done += made > 0
            skipped += made == 0
            pixels += made
    if ranks > 1:
        sums = torch.tensor([done, skipped, failed, pixels])
        try:
            torch.distributed.all_reduce(sums)
        except RuntimeError:  # another process has ended, and said why
            sys.exit(2)
        done, skipped, failed, pixels = sums.tolist()
        torch.distributed.destroy_process_group()
    if rank == 0:
        print(f"{done} done, {skipped} skipped, {failed} failed, {pixels / 1e6:.1f} Mpixel, "
              f"{time.time() - begun:.1f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
