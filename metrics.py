"""metrics.py: how good is a picture, in figures.

    python metrics.py fit-niqe FOLDER... -o weights/niqe-anime.safetensors      # NIQE's model of clean drawings

METRICS at the end lists them all: their heads in a table, which way is better, what they need, how they are called.
Pictures are float RGB (3, H, W) or (B, 3, H, W) in [0, 1]; they are rounded to 8 bits and `border` pixels are cut off
each side. A metric returns one float, the mean over the batch, nan where there is nothing to measure. All raise
ValueError. Y is BT.601 in 16-235; levels are those of 8 bits, 1/255.

Needs torch and safetensors; works alone. lpips, dists, maniqa, clipiqa and musiq need the package pyiqa. The command
reads pictures with our tile.py.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import sys
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

LINE = 12       # levels per pixel: a gradient of Y above it belongs to a line or an edge
FLAT = 2        # levels: where no channel varies by more than that, a drawing is flat
NIQE_BLOCK = 96     # pixels a side


class MissingPackage(ValueError):
    """A metric needs a package that is not installed."""


# ---------------------------------------------------------------------------------------------------------------------
# What metrics share
# ---------------------------------------------------------------------------------------------------------------------


def to_8_bit(x):
    """(...) in [0, 1] -> the same, clamped and rounded to the 256 levels that a file can hold."""
    return x.clamp(0, 1).mul(255).round().div(255)


def luma(x):
    """(..., 3, H, W) RGB in [0, 1] -> (..., 1, H, W), Y of BT.601 in its studio range, 16/255 to 235/255."""
    r, g, b = x.unbind(-3)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255).unsqueeze(-3)


def _prepare(sr, hr, border, y):
    """What every metric compares: (B, 1 or 3, h, w) on 8-bit levels, without the border."""
    if sr.shape != hr.shape or sr.ndim not in (3, 4) or sr.shape[-3] != 3:
        raise ValueError(f"pictures of equal shape (3, H, W) are needed, not {tuple(sr.shape)} and {tuple(hr.shape)}")
    h, w = sr.shape[-2:]
    if min(h, w) <= 2 * border:
        raise ValueError(f"{w}x{h} leaves nothing inside a border of {border}")
    pair = []
    for x in (sr, hr):
        x = to_8_bit(x.detach().float())[..., border:h - border, border:w - border]
        pair.append((luma(x) if y else x).reshape(-1, 1 if y else 3, h - 2 * border, w - 2 * border))
    return pair


def _mean(values):
    """Mean of the numbers that are not nan."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return values[~values.isnan()].mean().item()


def _highest(x, radius):
    """(B, C, H, W) -> the same: maximum of the square around each pixel; inside the picture only."""
    k = 2 * radius + 1
    return F.max_pool2d(F.max_pool2d(x, (1, k), 1, (0, radius)), (k, 1), 1, (radius, 0))


def _lowest(x, radius):
    return -_highest(-x, radius)


def _box(x, radius):
    """(B, C, H, W) -> the same: mean of the square around each pixel; inside the picture only."""
    k = 2 * radius + 1
    x = F.avg_pool2d(x, (1, k), 1, (0, radius), count_include_pad=False)
    return F.avg_pool2d(x, (k, 1), 1, (radius, 0), count_include_pad=False)


def _blocks(x, side):
    """(..., H, W) -> (..., blocks, side, side) without overlap, without what is left over at the right and below."""
    return x.unfold(-2, side, side).unfold(-2, side, side).flatten(-4, -3)


def _edges(y, grow):
    """Y (B, 1, H, W) -> mask: pixels within `grow` of a gradient (Sobel) above LINE levels per pixel."""
    x = F.pad(y * 255, (1, 1, 1, 1), "replicate")
    across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    across = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 8
    down = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 8
    return _highest((across.square() + down.square() > LINE ** 2).float(), grow) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Distance to the true picture
# ---------------------------------------------------------------------------------------------------------------------


def psnr(sr, hr, border=0, luma=True):
    """Peak signal to noise ratio in dB, of Y or of RGB; inf where the pictures are equal."""
    sr, hr = _prepare(sr, hr, border, luma)
    mse = (sr - hr).double().square().mean((1, 2, 3))
    return (-10 * mse.log10()).mean().item()


def _window_mean(x):
    """(..., H, W) -> (..., H-10, W-10): mean under the 11x11 Gaussian window of sigma 1.5."""
    g = [math.exp(-0.5 * ((i - 5) / 1.5) ** 2) for i in range(11)]
    g = [v / sum(g) for v in g]
    x = sum(v * x[..., i:x.shape[-2] - 10 + i, :] for i, v in enumerate(g))
    return sum(v * x[..., i:x.shape[-1] - 10 + i] for i, v in enumerate(g))


def _similarity(a, b, light=True):
    """(B, C, H, W) twice -> (B, C, H-10, W-10): SSIM of each window, without `light` only its contrast and structure.
    In strips, which the processor's cache holds: several times as fast on large pictures."""
    strips, c1, c2 = [], 0.01 ** 2, 0.03 ** 2
    for top in range(0, a.shape[-2] - 10, 64):
        p, q = (x[..., top:top + 74, :] - 0.5 for x in (a, b))      # float32 keeps three digits more of the variances
        mp, mq = _window_mean(p), _window_mean(q)
        vp, vq, vpq = _window_mean(p * p) - mp * mp, _window_mean(q * q) - mq * mq, _window_mean(p * q) - mp * mq
        mp, mq = mp + 0.5, mq + 0.5
        strips.append((2 * mp * mq + c1) * (2 * vpq + c2) / ((mp * mp + mq * mq + c1) * (vp + vq + c2)) if light else
                      (2 * vpq + c2) / (vp + vq + c2))
    return torch.cat(strips, -2)


def ssim(sr, hr, border=0, luma=True):
    """Structural similarity (Wang et al. 2004) of Y, or its mean over R, G and B."""
    a, b = _prepare(sr, hr, border, luma)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs 11 pixels a side inside the border, not {a.shape[-1]}x{a.shape[-2]}")
    return _similarity(a, b).double().mean().item()


def ms_ssim(sr, hr, border=0, luma=True):
    """Multi-scale structural similarity (Wang, Simoncelli, Bovik 2003) of Y, or its mean over R, G and B: contrast and
    structure at five scales, each the 2x2 mean of the one before, luminance at the last."""
    a, b = _prepare(sr, hr, border, luma)
    if min(a.shape[-2:]) < 176:
        raise ValueError(f"MS-SSIM needs 176 pixels a side inside the border, not {a.shape[-1]}x{a.shape[-2]}")
    index = 1
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale:
            odd = (0, a.shape[-1] % 2, 0, a.shape[-2] % 2)
            a, b = (F.avg_pool2d(F.pad(x, odd, "replicate"), 2) for x in (a, b))
        index = index * _similarity(a, b, scale == 4).double().mean((2, 3)).clamp(min=0) ** weight
    return index.mean().item()


def edge_psnr(sr, hr, border=0):
    """PSNR of Y in dB along lines only: within 2 pixels of a gradient of the true picture above LINE levels per
    pixel. Large even areas, which any method gets right, do not dilute it."""
    a, b = _prepare(sr, hr, border, True)
    mask = _edges(b, 2)
    error = ((a - b).double().square() * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    return _mean(-10 * error.log10())


def faithfulness(sr, lr, scale):
    """PSNR of RGB in dB between the picture reduced again (antialiased bicubic, a = -0.5, as Pillow's) and the one it
    was made from, (3, h, w) for (3, h*scale, w*scale). Low where a model invents, thickens or shifts."""
    if lr.ndim not in (3, 4) or sr.shape != (*lr.shape[:-2], lr.shape[-2] * scale, lr.shape[-1] * scale):
        raise ValueError(f"a picture {tuple(sr.shape)} is not {scale} times one {tuple(lr.shape)}")
    again = to_8_bit(sr.detach().float()).reshape(-1, *sr.shape[-3:])
    again = F.interpolate(again, tuple(lr.shape[-2:]), mode="bicubic", antialias=True)
    return psnr(again.reshape(lr.shape), lr, luma=False)


# ---------------------------------------------------------------------------------------------------------------------
# One fault each
# ---------------------------------------------------------------------------------------------------------------------


def flat_noise(sr, hr, border=0):
    """Noise, mosquitoes and halos where the true picture is flat: standard deviation in levels of sr - hr (RGB) inside
    those blocks of 9x9 in which no channel of hr varies by more than FLAT levels. An even change of colour does not
    count."""
    a, b = _prepare(sr, hr, border, False)
    if min(a.shape[-2:]) < 9:
        return math.nan
    a, b = (_blocks(x, 9).flatten(-2) for x in (a, b))                      # (B, 3, blocks, 81)
    flat = (b.amax(-1) - b.amin(-1)).amax(1) * 255 < FLAT + 0.5
    variance = (a - b).mul(255).double().var(-1, correction=0).mean(1)
    return _mean(((variance * flat).sum(1) / flat.sum(1)).sqrt())


def ringing(sr, hr, border=0):
    """Overshoot beside edges in levels of Y: how far sr leaves the range of hr in the 7x7 around a pixel, less 1 level
    for rounding, the mean over all pixels within 6 of an edge of hr (see LINE)."""
    a, b = _prepare(sr, hr, border, True)
    mask = _edges(b, 6)
    beyond = (torch.maximum(a - _highest(b, 3), _lowest(b, 3) - a) * 255 - 1).clamp(min=0)
    return _mean((beyond.double() * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)))


def banding(sr, border=0):
    """False contours in soft gradients, 0 to 1, without a true picture: which share of the change inside smooth parts
    comes in stairs. A stair is a step of 3 to 16 levels (mean of R, G, B) over at most 3 pixels, 4 even pixels on
    both sides, another stair in the same direction within 64 pixels (the border of two even tones is none)."""
    grey = _prepare(sr, sr, border, False)[0].mean(1) * 255                 # (B, H, W)
    stairs, change = torch.zeros(2, len(grey), dtype=torch.float64, device=grey.device)
    for x in (grey, grey.transpose(1, 2)):
        if x.shape[-1] < 10:
            continue
        low, high, mean = -F.max_pool1d(-x, 4, 1), F.max_pool1d(x, 4, 1), F.avg_pool1d(x, 4, 1)     # [i]: i to i + 3
        even, step, slope = high - low < 1.2, mean[..., 6:] - mean[..., :-6], x.diff(dim=-1).abs()
        hit = even[..., :-6] & even[..., 6:] & (step.abs() > 2.5) & (step.abs() < 16.5)
        hit &= F.avg_pool1d(slope, 3, 1)[..., 3:-3] * 3 < step.abs() + 1.5          # no line between them
        found = torch.zeros_like(step)
        for way in (hit & (step > 0), hit & (step < 0)):
            n, run = hit.shape[-1], F.pad(F.pad(way.float().cumsum(-1), (65, 0)), (0, 64), "replicate")
            others = run[..., 129:] - run[..., :n] - run[..., 68:68 + n] + run[..., 61:61 + n]      # 4 to 64 away
            found += way & (others > 0)
        at = F.max_pool1d(F.pad(found, (5, 5)), 3, 1) > 0                           # slopes i + 3 to i + 5 of a hit
        smooth = F.max_pool1d(slope, 9, 1, 4) < 16.5
        stairs += (slope.double() * (at & smooth)).sum((1, 2))
        change += (slope.double() * smooth).sum((1, 2))
    return _mean(stairs / change)


def _jumps(x, most=math.inf):
    """(H, W) -> two vectors, [i]: mean jump of the gradient between rows, or columns, i + 1 and i + 2; a single jump
    counts up to `most`."""
    for x in (x, x.t()):
        slope = x.diff(dim=0)
        yield (slope[1:-1] - (slope[:-2] + slope[2:]) / 2).abs().clamp(max=most).double().mean(1)


def blocking(sr, border=0, period=8, offset=0):
    """Blocks of JPEG, without a true picture: jump of the gradient of Y across the grid over that halfway between its
    lines (after Wang, Sheikh, Bovik 2002), single jumps counted up to 4 levels as edges say nothing; about 1 without
    blocks. period 16 finds those of a JPEG that was enlarged twofold; offset is where the grid begins."""
    values = []
    for y in _prepare(sr, sr, border, True)[0][:, 0]:
        on, between = [], []
        for jump in _jumps(y, 4 / 255):
            at = (torch.arange(len(jump), device=jump.device) + 2 + border - offset) % period
            on.append(jump[at == 0])
            between.append(jump[at == period // 2])
        values.append(torch.cat(on).mean() / torch.cat(between).mean())
    return _mean(values)


def seam(sr, whole, step, offset=0):
    """Seams of tiles: mean jump of the gradient across their borders over the mean elsewhere, divided by the same of
    `whole`, the picture made without tiles (or the true one); 1 where none show, nan without borders. (3, H, W) each,
    not rounded. step: borders every so many pixels from offset on, or (rows, columns): lists of the first pixels after
    a border. Raises ValueError."""
    if sr.shape != whole.shape or sr.ndim != 3:
        raise ValueError(f"two pictures (3, H, W) of a size are needed, not {tuple(sr.shape)} and {tuple(whole.shape)}")
    lines = [range(offset % step, side, step) for side in sr.shape[1:]] if isinstance(step, int) else step
    ratios = []
    for x in (sr, whole):
        on, off = [], []
        for jump, at in zip(_jumps(x.detach().float().mean(0)), lines):
            there = torch.zeros(len(jump), dtype=torch.bool, device=jump.device)
            there[[i - 2 for i in at if 0 <= i - 2 < len(jump)]] = True
            on.append(jump[there])
            off.append(jump[~there])
        ratios.append((torch.cat(on).mean() / (torch.cat(off).mean() + 1e-12)).item())
    return ratios[0] / ratios[1] if ratios[1] else 1.0 if ratios[0] == 0 else math.nan


def highlight_recall(sr, hr, border=0):
    """Share of the stars and glints of the true picture that are kept. A highlight is a pixel of Y brighter than the
    5x5 around it and, by 24 levels, than all of the ring at distance 5, so a line is none. It is kept where the
    brightest of sr's 3x3 there stands out of the mean of sr's ring by half as much as hr's does."""
    a, b = _prepare(sr, hr, border, True)
    rows, columns = (torch.arange(side, device=b.device) for side in b.shape[-2:])
    single = b + 1e-6 * (rows[:, None] % 8 * 8 + columns % 8)       # of equal neighbours one is the brightest
    peak = (single == _highest(single, 2)) & (b - _lowest(b, 5) > 24 / 255)
    for side in peak, peak.transpose(2, 3):
        side[..., :5] = side[..., -5:] = False
    n, _, i, j = peak.nonzero().unbind(1)
    ring = torch.tensor([(y, x) for y in range(-5, 6) for x in range(-5, 6) if max(abs(y), abs(x)) == 5])
    y, x = ring.to(b.device).unbind(1)
    at, ring = (n, 0, i, j), (n[:, None], 0, i[:, None] + y, j[:, None] + x)
    found = b[at] - b[ring].amax(1) > 24 / 255
    kept = found & (_highest(a, 1)[at] - a[ring].mean(1) >= (b[at] - b[ring].mean(1)) / 2)
    return _mean([kept[n == k].sum() / found[n == k].sum() for k in range(len(b))])


def error_map(sr, hr):
    """(3, H, W) twice -> (H, W) in [0, 1], for heat maps: difference of Y under a Gaussian window of sigma 1.5, over
    itself + 4 levels + half the deviation of hr around, as detail hides errors. 0.5 is an error of 4 levels on an even
    ground. Raises ValueError."""
    a, b = _prepare(sr[None], hr[None], 0, True)
    error = _window_mean(F.pad((a - b).abs() * 255, (5, 5, 5, 5), "replicate"))
    deviation = (_box(b * b, 4) - _box(b, 4).square()).clamp(min=0).sqrt() * 255
    return (error / (error + 4 + deviation / 2))[0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# NIQE (Mittal, Soundararajan, Bovik 2013): statistics of the locally normalised Y, against those of clean pictures
# ---------------------------------------------------------------------------------------------------------------------


class NiqeModel(NamedTuple):
    mean: torch.Tensor                  # (36,) float64
    covariance: torch.Tensor            # (36, 36)


ALPHAS = torch.arange(200, 10001, dtype=torch.float64) / 1000
RATIOS = (2 * torch.lgamma(2 / ALPHAS) - torch.lgamma(1 / ALPHAS) - torch.lgamma(3 / ALPHAS)).exp()     # rising


def _aggd(x):
    """(N, K) -> alpha, beta left, beta right (N,) of an asymmetric generalised Gaussian, by moments; nan where a block
    has values on one side only."""
    left = (x.clamp(max=0).square().sum(1) / (x < 0).sum(1)).sqrt()
    right = (x.clamp(min=0).square().sum(1) / (x > 0).sum(1)).sqrt()
    g = left / right
    ratio = x.abs().mean(1).square() / x.square().mean(1) * (g ** 3 + 1) * (g + 1) / (g ** 2 + 1) ** 2
    at = torch.searchsorted(RATIOS, ratio).clamp(1, len(RATIOS) - 1)
    alpha = ALPHAS[at - (ratio - RATIOS[at - 1] < RATIOS[at] - ratio).long()]       # the nearer of two
    beta = ((torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2).exp()
    return alpha, left * beta, right * beta


def _halved(x):
    """(H, W) -> (H/2, W/2), both even: MATLAB's antialiased bicubic (a = -0.5), symmetric border."""
    taps = [((2.5 - 0.5 * t) * t - 4) * t + 2 for t in (1.75, 1.25)]
    taps += [(1.5 * t - 2.5) * t * t + 1 for t in (0.75, 0.25)]
    for _ in range(2):
        x = torch.cat([x[:3].flip(0), x, x[-3:].flip(0)])
        x = sum(v / 2 * x[i:len(x) - 7 + i:2] for i, v in enumerate(taps + taps[::-1])).t()
    return x


def niqe_features(y):
    """Y (H, W) in [0, 1] -> features (blocks, 36) and sharpness (blocks,), float64, of the blocks of 96x96."""
    h, w = (side // NIQE_BLOCK * NIQE_BLOCK for side in y.shape)
    if min(h, w) == 0:
        raise ValueError(f"NIQE needs {NIQE_BLOCK} pixels a side, not {y.shape[1]}x{y.shape[0]}")
    x = y[:h, :w].cpu().double().mul(255).round()
    g = [math.exp(-0.5 * ((i - 3) / (7 / 6)) ** 2) for i in range(7)]
    g = [v / sum(g) for v in g]

    def window_mean(x):
        x = F.pad(x[None], (3, 3, 3, 3), "replicate")[0]
        x = sum(v * x[i:len(x) - 6 + i] for i, v in enumerate(g))
        return sum(v * x[:, i:x.shape[1] - 6 + i] for i, v in enumerate(g))

    features, sharpness = [], None
    for side in (NIQE_BLOCK, NIQE_BLOCK // 2):
        mean = window_mean(x)
        deviation = (window_mean(x * x) - mean * mean).abs().sqrt()
        normal = (x - mean) / (deviation + 1)
        normal[normal.abs() < 1e-6] = 0                 # even ground, but for what float64 leaves of it
        block = _blocks(normal, side)
        if sharpness is None:
            sharpness = _blocks(deviation, side).mean((1, 2))
        alpha, left, right = _aggd(block.flatten(1))
        features += [alpha, (left + right) / 2]
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
            alpha, left, right = _aggd((block * block.roll(shift, (1, 2))).flatten(1))
            middle = (right - left) * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()
            features += [alpha, middle, left, right]
        x = _halved(x)
    return torch.stack(features, 1), sharpness


def niqe(sr, model, border=0):
    """NIQE of a picture, no true one needed; lower is better: distance of the statistics of its blocks from those of
    clean pictures, a NiqeModel. Blocks without any texture are left out; nan where fewer than two are left."""
    values = []
    for y in _prepare(sr, sr, border, True)[0][:, 0]:
        features, _ = niqe_features(y)
        features = features[~features.isnan().any(1)]
        if len(features) < 2:
            values.append(math.nan)
            continue
        off = features.mean(0) - model.mean
        values.append((off @ torch.linalg.pinv((features.T.cov() + model.covariance) / 2) @ off).sqrt().item())
    return _mean(values)


def fit_niqe(*groups, sharpness=0.75):
    """Groups (any iterables) of clean pictures (3, H, W) -> NiqeModel of those of their blocks that are sharper than
    this share of the picture's sharpest. Each group counts the same, and in it each picture. Pictures below 96 pixels a
    side are left out. Raises ValueError."""
    found, weights = [torch.zeros(0, 36, dtype=torch.float64)], []
    for pictures in groups:
        counts = []
        for x in pictures:
            if min(x.shape[-2:]) >= NIQE_BLOCK:
                features, sharp = niqe_features(_prepare(x, x, 0, True)[0][0, 0])
                found.append(features[(sharp > sharpness * sharp.max()) & ~features.isnan().any(1)])
                counts += [len(found[-1])] if len(found[-1]) else []
        weights += [1 / (n * len(counts)) for n in counts for _ in range(n)]
    found, weights = torch.cat(found), torch.tensor(weights, dtype=torch.float64)
    if len(found) < 37:
        raise ValueError(f"{len(found)} sharp blocks of 96x96 are too few for NIQE's 36 features; give more pictures")
    mean = weights @ found / weights.sum()
    return NiqeModel(mean, (found - mean).T @ ((found - mean) * weights[:, None]) / weights.sum())


def save_niqe(model, path, header=None):
    """NiqeModel -> one .safetensors, float32, whole or not at all, with a JSON header. Raises OSError."""
    state = {k: v.float().contiguous() for k, v in model._asdict().items()}
    about = json.dumps({"kind": "niqe", **(header or {})}, ensure_ascii=False)
    path = Path(path)
    part = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        part.write_bytes(to_safetensors(state, {"kabegami": about}))
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@functools.lru_cache
def load_niqe(path=None):
    """A file of save_niqe (default: weights/niqe-anime.safetensors beside this file), or the public pristine parameters
    in .npz (mu_pris_param, cov_pris_param; their gaussian_window is the one used here) -> NiqeModel. Raises
    ValueError."""
    path = Path(path or Path(__file__).parent / "weights/niqe-anime.safetensors")
    try:
        if path.suffix == ".npz":
            import numpy as np
            with np.load(path, allow_pickle=False) as f:
                state = [torch.from_numpy(f[k]) for k in ("mu_pris_param", "cov_pris_param")]
        else:
            with safe_open(path, "pt") as f:
                state = [f.get_tensor(k) for k in NiqeModel._fields]
        return NiqeModel(state[0].double().reshape(36), state[1].double().reshape(36, 36))
    except FileNotFoundError:
        raise ValueError(f"no NIQE model {str(path)!r}; make one: python metrics.py fit-niqe FOLDER -o FILE") from None
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, SafetensorError, zipfile.BadZipFile) as e:
        raise ValueError(f"{str(path)!r} is no NIQE model ({' '.join(str(e).split())})") from None


# ---------------------------------------------------------------------------------------------------------------------
# The table of metrics
# ---------------------------------------------------------------------------------------------------------------------


PYIQA = ("lpips", "dists", "maniqa", "clipiqa", "musiq")


def pyiqa_for(name):
    """The package, for one of PYIQA. Raises MissingPackage."""
    try:
        import pyiqa
    except ImportError:
        raise MissingPackage(f"{name} needs pyiqa: pip install pyiqa (its licence is non-commercial)") from None
    return pyiqa


@functools.lru_cache
def _pyiqa_metric(name, device):
    return pyiqa_for(name).create_metric(name, device=device)


def _pyiqa(name, *pictures):
    """A metric of pyiqa on 8-bit pictures, whole: these do not cut borders."""
    pictures = [to_8_bit(x.detach().float()).reshape(-1, *x.shape[-3:]) for x in pictures]
    try:
        return _pyiqa_metric(name, pictures[0].device)(*pictures).double().mean().item()
    except MissingPackage:
        raise
    except Exception as e:      # weights that cannot be downloaded and sizes that do not suit come as any kind of error
        raise ValueError(f"{name} of pyiqa failed: {' '.join(str(e).split()) or type(e).__name__}") from None


class Metric(NamedTuple):
    head: str                           # over its column
    better: str                         # higher or lower
    digits: int
    needs: str                          # hr, lr, or nothing
    run: Callable                       # (sr, hr, lr, scale, border) -> float


METRICS = dict(
    psnr_y=Metric("PSNR-Y", "higher", 2, "hr", lambda sr, hr, lr, scale, border: psnr(sr, hr, border)),
    ssim_y=Metric("SSIM-Y", "higher", 4, "hr", lambda sr, hr, lr, scale, border: ssim(sr, hr, border)),
    psnr_rgb=Metric("PSNR-RGB", "higher", 2, "hr", lambda sr, hr, lr, scale, border: psnr(sr, hr, border, False)),
    ssim_rgb=Metric("SSIM-RGB", "higher", 4, "hr", lambda sr, hr, lr, scale, border: ssim(sr, hr, border, False)),
    ms_ssim_y=Metric("MS-SSIM-Y", "higher", 4, "hr", lambda sr, hr, lr, scale, border: ms_ssim(sr, hr, border)),
    ms_ssim_rgb=Metric("MS-SSIM-RGB", "higher", 4, "hr",
                       lambda sr, hr, lr, scale, border: ms_ssim(sr, hr, border, False)),
    edge_psnr=Metric("Edge-PSNR", "higher", 2, "hr", lambda sr, hr, lr, scale, border: edge_psnr(sr, hr, border)),
    faithfulness=Metric("Faithful", "higher", 2, "lr", lambda sr, hr, lr, scale, border: faithfulness(sr, lr, scale)),
    flat_noise=Metric("Flat-noise", "lower", 2, "hr", lambda sr, hr, lr, scale, border: flat_noise(sr, hr, border)),
    ringing=Metric("Ringing", "lower", 3, "hr", lambda sr, hr, lr, scale, border: ringing(sr, hr, border)),
    banding=Metric("Banding", "lower", 3, "", lambda sr, hr, lr, scale, border: banding(sr, border)),
    blocking=Metric("Blocking", "lower", 3, "", lambda sr, hr, lr, scale, border: blocking(sr, border)),
    highlights=Metric("Highlights", "higher", 3, "hr",
                      lambda sr, hr, lr, scale, border: highlight_recall(sr, hr, border)),
    niqe=Metric("NIQE-anime", "lower", 3, "", lambda sr, hr, lr, scale, border: niqe(sr, load_niqe(), border)),
    lpips=Metric("LPIPS-alex", "lower", 4, "hr", lambda sr, hr, lr, scale, border: _pyiqa("lpips", sr, hr)),
    dists=Metric("DISTS", "lower", 4, "hr", lambda sr, hr, lr, scale, border: _pyiqa("dists", sr, hr)),
    maniqa=Metric("MANIQA", "higher", 4, "", lambda sr, hr, lr, scale, border: _pyiqa("maniqa", sr)),
    clipiqa=Metric("CLIPIQA", "higher", 4, "", lambda sr, hr, lr, scale, border: _pyiqa("clipiqa", sr)),
    musiq=Metric("MUSIQ", "higher", 2, "", lambda sr, hr, lr, scale, border: _pyiqa("musiq", sr)),
)


def chosen(text, known=METRICS):
    """'psnr_y,ssim_y' -> ['psnr_y', 'ssim_y']. Raises ValueError that lists the names there are."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    odd = [name for name in names if name not in known]
    if odd or not names:
        raise ValueError(f"no metric {', '.join(map(repr, odd)) or 'named'}; there are {', '.join(known)}")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main():
    if hasattr(sys.stdout, "reconfigure"):      # a log in cp1252, a name in Japanese
        sys.stdout.reconfigure(errors="backslashreplace")
    p = argparse.ArgumentParser(description="Fits NIQE's model of what clean pictures look like.")
    p.add_argument("what", choices=["fit-niqe"])
    p.add_argument("data", nargs="+", help="folders of clean pictures; each counts the same, so give one per artist")
    p.add_argument("-o", "--out", type=Path, required=True, help="the file to write, .safetensors")
    p.add_argument("--note", default="", help="a line for its header: whose pictures, which licence")
    p.add_argument("--overwrite", action="store_true")
    args = p.parse_args()
    import images
    used = []

    def read(folder):
        for path in images.find_pictures([folder]):
            try:
                x = images.composite(images.read_picture(path), 1.0)
            except (ValueError, OSError) as e:
                print(f"skipped: {e}", file=sys.stderr)
                continue
            if min(x.shape[-2:]) < NIQE_BLOCK:
                print(f"skipped: {images.printable(path)} is smaller than {NIQE_BLOCK}x{NIQE_BLOCK}", file=sys.stderr)
                continue
            used.append(path)
            yield x
    try:
        if args.out.suffix != ".safetensors":
            raise ValueError(f"a NIQE model's name ends in .safetensors, which {images.printable(args.out)} does not")
        if args.out.exists() and not args.overwrite:
            raise ValueError(f"{images.printable(args.out)} exists already; choose another name, or give --overwrite")
        if not os.access(args.out.parent, os.W_OK):     # now, not after minutes
            raise ValueError(f"cannot write to {images.printable(args.out.parent)}: no such file or directory, or not yours; "
                             "choose another --out")
        model = fit_niqe(*map(read, args.data))
        save_niqe(model, args.out, dict(pictures=len(used), folders=len(args.data), note=args.note))
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    print(f"{images.printable(args.out)}: {len(used)} pictures")


if __name__ == "__main__":
    main()
