"""Degrade clean pictures (HR) into low-resolution pictures (LR) by a recipe.

    lr = degrade(hr, "web", scale=2, seeds=[0, 1])      # hr (2, 3, H, W) in [0, 1] -> lr (2, 3, H/2, W/2)
    lr = degrade(hr, "web:0.7,bicubic:0.3", 2, seeds)   # a mix: each picture draws one of the recipes

    python degrade.py HR_FOLDER LR_FOLDER --recipe web --scale 2
    python degrade.py picture.png --sheet sheet.png     # one picture through every recipe, to look at

A recipe is an entry of RECIPES: a chain of operations with ranges for their arguments. The arguments are
drawn for each picture from its own seed. So the result depends on the picture, recipe, scale, and seed, but
not on the batch or the number of worker processes. To keep it the same to the bit, pixel arithmetic is
element by element: matrix products and library convolutions sum in an order that depends on the shape.

artifact() applies one artifact of a given strength, to train an artifact detector.

Needs torch, numpy, and Pillow; video codecs need PyAV. Works when copied alone; the command needs images.py.
"""
import argparse
import functools
import hashlib
import io
import math
import sys
import textwrap
import time
from fractions import Fraction
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

# ---- recipes
#
# To add a recipe, add an entry to RECIPES. An operation that does not exist yet takes one function and one
# entry in OPERATIONS.
#
#   clean       chance of bicubic downscaling and nothing else, so that a model learns to keep grain and stars
#   chain       the operations in their order
#   last_early  chance that the last operation comes before the two operations in front of it
#
# In the chain:
#   op                a name of OPERATIONS
#   p                 chance that the operation is applied; without p it always is
#   (low, high)       a range; a value is drawn uniformly; both ends of a range of whole numbers are included
#   {name: chance}    one name is drawn; the chances need not sum to 1
#   {name: range}     the range for each name
#
# Lengths are in pixels of the picture at that place of the chain: LR pixels after `downscale`.

ANY_KERNEL = dict(bicubic=0.7, lanczos=0.1, bilinear=0.1, area=0.1)
REAL_KERNEL = dict(area=1 / 3, bilinear=1 / 3, bicubic=1 / 3)
WEB_CHROMA = {"4:2:0": 0.8, "4:4:4": 0.2}       # of JPEG; other codecs always use 4:2:0
MIXED_CHROMA = {"4:2:0": 0.7, "4:4:4": 0.3}
ANY_OFFSET = (0, 15)        # the 8 and 16 pixel blocks of a codec begin anywhere, as in a cropped picture
REAL_SHAPE = {"iso": 0.45, "aniso": 0.25, "generalized iso": 0.12, "generalized aniso": 0.03,
              "plateau iso": 0.12, "plateau aniso": 0.03}
REAL_BETA = dict(generalized=(0.5, 4.0), plateau=(1.0, 2.0))            # half of the draws lie below 1
REAL_CUTOFF = {0: (math.pi / 3, math.pi), 13: (math.pi / 5, math.pi)}   # {kernels from this size on: range}
REAL_JPEG = dict(op="compress", p=1.0, codec=dict(jpeg=1.0), quality=dict(jpeg=(30, 95)),
                 chroma={"4:2:0": 1.0}, offset=ANY_OFFSET)

RECIPES = {
    "bicubic": dict(clean=1.0, chain=[]),

    # A picture on its way to a gallery site: downscaled, a little soft, compressed once, perhaps cropped.
    "web": dict(clean=0.1, chain=[
        dict(op="downscale", kernel=ANY_KERNEL),
        dict(op="blur", p=0.9, sigma=(0.2, 0.8)),
        dict(op="compress", p=0.95, codec=dict(jpeg=0.85, webp=0.15),
             quality=dict(jpeg=(85, 95), webp=(80, 95)), chroma=WEB_CHROMA, offset=ANY_OFFSET),
    ]),

    # The same without cropping: the blocks of the codec begin at the corner.
    "gallery": dict(clean=0.1, chain=[
        dict(op="downscale", kernel=ANY_KERNEL),
        dict(op="blur", p=0.9, sigma=(0.2, 0.8)),
        dict(op="compress", p=0.95, codec=dict(jpeg=0.85, webp=0.15),
             quality=dict(jpeg=(85, 95), webp=(80, 95)), chroma=WEB_CHROMA, offset=(0, 0)),
    ]),

    # Compression only, from hardly visible to a thumbnail's.
    "jpeg": dict(clean=0.1, chain=[
        dict(op="downscale", kernel=ANY_KERNEL),
        dict(op="compress", p=0.3, codec=dict(jpeg=1.0), quality=dict(jpeg=(50, 95)), chroma=MIXED_CHROMA,
             offset=ANY_OFFSET),
        dict(op="compress", p=1.0, codec=dict(jpeg=1.0), quality=dict(jpeg=(30, 95)), chroma=MIXED_CHROMA,
             offset=ANY_OFFSET),
    ]),

    # A drawing that was posted again: compressed, badly resized, soft, ringing, and compressed once more.
    "light": dict(clean=0.1, chain=[
        dict(op="compress", p=0.7, codec=dict(jpeg=0.85, webp=0.15),
             quality=dict(jpeg=(70, 95), webp=(70, 95)), chroma=MIXED_CHROMA, offset=ANY_OFFSET),
        dict(op="rescale", p=0.6, base="lr", direction=dict(up=0.4, down=0.6), factor=(0.6, 1.6),
             kernel=dict(bicubic=0.4, bilinear=0.3, lanczos=0.1, area=0.2), aliased=0.5),
        dict(op="downscale", kernel=dict(bicubic=0.4, bilinear=0.2, lanczos=0.2, area=0.2)),
        dict(op="blur", p=0.6, sigma=(0.2, 0.8)),
        dict(op="sinc", p=0.5, size=(7, 21), cutoff={0: (math.pi / 2, math.pi)}),
        dict(op="compress", p=0.9, codec=dict(jpeg=0.85, webp=0.15),
             quality=dict(jpeg=(60, 95), webp=(60, 95)), chroma=MIXED_CHROMA, offset=ANY_OFFSET),
    ]),

    # The second-order chain of Real-ESRGAN (Wang et al. 2021) with the ranges of its x2plus model.
    "real": dict(clean=0.1, last_early=0.5, chain=[
        dict(op="kernel_blur", p=1.0, size=(7, 21), sinc=0.1, cutoff=REAL_CUTOFF, shape=REAL_SHAPE,
             sigma=(0.2, 3.0), beta=REAL_BETA),
        dict(op="rescale", base="hr", direction=dict(up=0.2, down=0.7, keep=0.1),
             factor=(0.15, 1.5), kernel=REAL_KERNEL, aliased=1.0),
        dict(op="noise", p=1.0, kind=dict(gaussian=0.5, poisson=0.5),
             strength=dict(gaussian=(1.0, 30.0), poisson=(0.05, 3.0)), gray=0.4),
        REAL_JPEG,
        dict(op="kernel_blur", p=0.8, size=(7, 21), sinc=0.1, cutoff=REAL_CUTOFF, shape=REAL_SHAPE,
             sigma=(0.2, 1.5), beta=REAL_BETA),
        dict(op="rescale", base="lr", direction=dict(up=0.3, down=0.4, keep=0.3),
             factor=(0.3, 1.2), kernel=REAL_KERNEL, aliased=1.0),
        dict(op="noise", p=1.0, kind=dict(gaussian=0.5, poisson=0.5),
             strength=dict(gaussian=(1.0, 25.0), poisson=(0.05, 2.5)), gray=0.4),
        dict(op="rescale", base="lr", direction=dict(keep=1.0), factor=(1.0, 1.0),
             kernel=REAL_KERNEL, aliased=1.0),
        dict(op="sinc", p=0.8, size=(7, 21), cutoff={0: (math.pi / 3, math.pi)}),
        REAL_JPEG,
    ]),

    # A wallpaper that is clean but soft: grain, light compression, and the blur last. Never motion blur.
    "soft": dict(clean=0.1, chain=[
        dict(op="downscale", kernel=dict(bicubic=0.4, lanczos=0.2, bilinear=0.2, area=0.2)),
        dict(op="grain", p=0.5, amplitude=(1.0, 5.0), sigma=(0.3, 0.6), brush=0.5, brush_length=(0.8, 2.5)),
        dict(op="compress", p=0.7, codec=dict(jpeg=0.8, webp=0.2),
             quality=dict(jpeg=(85, 97), webp=(85, 97)), chroma=MIXED_CHROMA, offset=ANY_OFFSET),
        dict(op="kernel_blur", p=0.95, size=(5, 11), sinc=0.25, cutoff={0: (math.pi / 2.5, math.pi / 1.25)},
             shape={"iso": 0.5, "generalized iso": 0.5}, sigma=(0.3, 1.1), beta=dict(generalized=(0.5, 1.0))),
    ]),

    # After AWM: one of the downscaling kernels, a median outside of lines, sharpening, JPEG 85.
    "awm2x": dict(clean=0.1, chain=[
        dict(op="downscale", kernel=dict(bicubic=1 / 3, area=1 / 6, bilinear=1 / 6, lanczos=1 / 3)),
        dict(op="median", p=0.9, edge=(0.08, 0.16)),
        dict(op="blur", p=0.8, sigma=(0.3, 0.5)),
        dict(op="unsharp", p=0.9, sigma=(0.8, 1.2), amount=(0.3, 0.7)),
        dict(op="compress", p=1.0, codec=dict(jpeg=1.0), quality=dict(jpeg=(85, 85)), chroma=MIXED_CHROMA,
             offset=ANY_OFFSET),
    ]),

    # The same, but stronger.
    "awm4x": dict(clean=0.1, chain=[
        dict(op="downscale", kernel=dict(bicubic=1 / 3, area=1 / 6, bilinear=1 / 6, lanczos=1 / 3)),
        dict(op="median", p=0.9, edge=(0.16, 0.32)),
        dict(op="blur", p=0.8, sigma=(0.4, 0.8)),
        dict(op="unsharp", p=0.9, sigma=(0.8, 1.6), amount=(0.5, 1.2)),
        dict(op="compress", p=1.0, codec=dict(jpeg=1.0), quality=dict(jpeg=(85, 85)), chroma=MIXED_CHROMA,
             offset=ANY_OFFSET),
    ]),

    # The traces of a diffusion model's VAE: weak fine detail, a faint 8-pixel grid, shifted colors.
    "diffusion": dict(clean=0.1, chain=[
        dict(op="downscale", kernel=dict(bicubic=0.6, lanczos=0.2, area=0.2)),
        dict(op="unsharp", p=0.95, sigma=(0.8, 1.6), amount=(-0.7, -0.2)),
        dict(op="vae_grid", p=0.8, amplitude=(0.5, 2.0)),
        dict(op="color_shift", p=0.8, gain=(0.97, 1.03), shift=(-0.012, 0.012)),
        dict(op="compress", p=0.3, codec=dict(jpeg=0.7, webp=0.3),
             quality=dict(jpeg=(88, 97), webp=(88, 97)), chroma=MIXED_CHROMA, offset=ANY_OFFSET),
    ]),

    # Frames of animation, after APISR (Wang et al. 2024): compressed as a picture, downscaled, compressed as
    # a frame of video. The quality of a video codec is its quantizer: lower is better.
    "line": dict(clean=0.1, chain=[
        dict(op="compress", p=0.8, codec=dict(jpeg=0.5, webp=0.5),
             quality=dict(jpeg=(20, 95), webp=(20, 95)), chroma=MIXED_CHROMA, offset=ANY_OFFSET),
        dict(op="kernel_blur", p=0.5, size=(7, 13), sinc=0.2, cutoff=REAL_CUTOFF, shape=REAL_SHAPE,
             sigma=(0.2, 1.2), beta=REAL_BETA),
        dict(op="downscale", kernel=dict(bicubic=0.4, bilinear=0.3, area=0.3)),
        dict(op="compress", p=1.0, chroma=MIXED_CHROMA, offset=ANY_OFFSET,
             codec=dict(jpeg=0.2, webp=0.2, avif=0.2, mpeg2=0.1, mpeg4=0.1, h264=0.1, h265=0.1),
             quality=dict(jpeg=(20, 95), webp=(20, 95), avif=(20, 95), mpeg2=(8, 31), mpeg4=(8, 31),
                          h264=(23, 38), h265=(28, 42))),
    ]),
}

# {codec: its replacement on a machine that cannot write it}. AVIF needs Pillow 11.3, video codecs need PyAV.
FALLBACK = dict(webp="jpeg", avif="webp", mpeg2="jpeg", mpeg4="jpeg", h264="webp", h265="avif")
CODECS = ("jpeg", *FALLBACK)
VIDEO = dict(mpeg2=("mpeg2video", "mpeg2video"), mpeg4=("mpeg4", "mpeg4"), h264=("libx264", "h264"),
             h265=("libx265", "hevc"))          # FFmpeg's (encoder, decoder)
WEBP_MAX_SIDE = 16383                           # pixels; video codecs are limited to it as well


class RecipeError(ValueError):
    """An unknown recipe or a wrong entry in RECIPES. The message is one line."""


# ---- resampling

def cubic(x):
    """Keys 1981, a = -0.5."""
    x = abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def lanczos(x):
    """Duchon 1979, three lobes."""
    return np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def triangle(x):
    return np.maximum(1 - abs(x), 0.0)


KERNELS = dict(bicubic=(cubic, 2.0), lanczos=(lanczos, 3.0), bilinear=(triangle, 1.0), area=(None, 0.5))


@functools.lru_cache(maxsize=256)
def resampling_weights(n, out, kernel, antialias):
    """Return (index, weight), both (taps, out): output pixel i is sum(x[index[:, i]] * weight[:, i])."""
    function, radius = KERNELS[kernel]
    ratio = n / out                                 # input pixels per output pixel
    stretch = max(ratio, 1.0) if antialias else 1.0
    if kernel == "area":
        stretch = ratio
    center = (np.arange(out) + 0.5) * ratio - 0.5
    first = np.floor(center - radius * stretch).astype(np.int64)
    index = first[None] + np.arange(math.ceil(2 * radius * stretch) + 2)[:, None]
    if kernel == "area":                            # the part of each input pixel inside the output pixel
        right, left = np.minimum(index + 0.5, center + ratio / 2), np.maximum(index - 0.5, center - ratio / 2)
        weight = (right - left).clip(0)
    else:
        weight = function((index - center) / stretch)
    weight = weight / weight.sum(0)
    used = np.abs(weight).max(1) > 1e-9
    index, weight = index[used] % (2 * n), weight[used]
    index = np.where(index < n, index, 2 * n - 1 - index)       # symmetric border: 1 0 | 0 1 ... n-1 | n-1
    return torch.from_numpy(index), torch.from_numpy(weight.astype(np.float32))


def resize_rows(x, out, kernel, antialias):
    """Resample (..., H, W) to (..., out, W)."""
    index, weight = resampling_weights(x.shape[-2], out, kernel, antialias)
    index, weight = index.to(x.device), weight.to(x.device, x.dtype)[:, :, None]
    strip = max(1, 2**18 * x.shape[-2] // x.numel())            # so many rows fit into the cache: 4x faster
    parts = []
    for i in range(0, out, strip):
        total = None
        for rows, row_weights in zip(index[:, i:i + strip], weight[:, i:i + strip]):
            term = x.index_select(-2, rows).mul_(row_weights)
            total = term if total is None else total.add_(term)
        parts.append(total)
    return torch.cat(parts, -2)


def resize(x, size, kernel="bicubic", antialias=True):
    """Resample (..., H, W) to size (h, w), with half-pixel centers and a symmetric border, as MATLAB does.

    kernel: bicubic (a = -0.5), lanczos (3 lobes), bilinear, or area (mean over the output pixel).
    antialias=False does not stretch the kernel for a reduction, which causes jagged lines; area is always
    antialiased. Differentiable. Bicubic and lanczos overshoot; the result is not clamped.
    """
    h, w = size
    rows_first = h * x.shape[-1] <= w * x.shape[-2]             # the stronger reduction first saves work
    if rows_first and h != x.shape[-2]:
        x = resize_rows(x, h, kernel, antialias)
    if w != x.shape[-1]:
        x = resize_rows(x.transpose(-1, -2).contiguous(), w, kernel, antialias).transpose(-1, -2).contiguous()
    if not rows_first and h != x.shape[-2]:
        x = resize_rows(x, h, kernel, antialias)
    return x


# ---- operations on one picture x (3, H, W); degrade() clamps their results to [0, 1]

def to_8_bit(x):
    """Clamp x to [0, 1] and round it to the 256 levels of an 8-bit file."""
    return x.clamp(0, 1).mul(255).round().div(255)


def to_gray(x):
    """(3, H, W) -> (1, H, W), luma of BT.601 in full range."""
    return 0.299 * x[:1] + 0.587 * x[1:2] + 0.114 * x[2:]


def downscale(x, size, kernel):
    """Resize to (h, w), antialiased, and round to 8 bits."""
    return to_8_bit(resize(x, size, kernel))


def convolve(x, kernel):
    """Correlate (C, H, W) with a kernel (k, k), k odd; the border is repeated.

    Where the kernel is symmetric, add the pixels of equal weight first, which halves the multiplications.
    """
    r, (h, w) = len(kernel) // 2, x.shape[-2:]
    kernel = kernel.astype(np.float32)
    symmetric = np.array_equal(kernel, kernel[::-1]) and np.array_equal(kernel, kernel[:, ::-1])
    padded = np.pad(x.numpy(), ((0, 0), (r, r), (r, r)), "edge")
    out = np.zeros(x.shape, np.float32)
    strip = max(1, 2**15 // w)                      # rows at a time, so that a strip stays in the cache
    taps = range(r + 1 if symmetric else 2 * r + 1)
    for top in range(0, h, strip):
        total = out[:, top:top + strip]
        n, term = total.shape[1], np.empty_like(total)
        for i in taps:
            rows = padded[:, top + i:top + i + n]
            if symmetric and i < r:
                rows = rows + padded[:, top + 2 * r - i:top + 2 * r - i + n]
            for j in taps:
                if abs(kernel[i, j]) < 1e-6:
                    continue
                columns = rows[..., j:j + w]
                if symmetric and j < r:
                    columns = np.add(columns, rows[..., 2 * r - j:2 * r - j + w], out=term)
                np.multiply(columns, kernel[i, j], out=term)
                total += term
    return torch.from_numpy(out)


def blur_kernel(size, shape="iso", sigma=(1.0, 1.0), angle=0.0, beta=1.0, cutoff=math.pi):
    """Return a kernel (size, size) with sum 1; size is odd.

    With d, the squared distance in units of sigma (pixels) along axes turned by angle (radians):
    iso, aniso: exp(-d / 2). generalized iso, generalized aniso: exp(-d^beta / 2). plateau iso, plateau aniso:
    1 / (1 + d^beta). Source: Liu et al. 2020, as used in Real-ESRGAN. sinc: a circular low-pass filter of
    this cutoff (radians per pixel), truncated to the kernel.
    """
    x, y = np.meshgrid(*[np.arange(size) - size // 2] * 2)
    if shape == "sinc":
        distance = np.hypot(x, y)
        distance[size // 2, size // 2] = 1.0        # avoids 0 / 0
        bessel = torch.special.bessel_j1(torch.from_numpy(cutoff * distance)).numpy()
        kernel = cutoff * bessel / (2 * np.pi * distance)
        kernel[size // 2, size // 2] = cutoff ** 2 / (4 * np.pi)
        return kernel / kernel.sum()
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    d = ((along / sigma[0]) ** 2 + (across / sigma[1]) ** 2) ** beta
    kernel = 1 / (1 + d) if "plateau" in shape else np.exp(-0.5 * d)
    return kernel / kernel.sum()


def kernel_blur(x, **kernel):
    """Filter with blur_kernel(**kernel)."""
    return convolve(x, blur_kernel(**kernel))


def gaussian_blur(x, sigma):
    """Gaussian blur of (C, H, W), sigma in pixels; the border is repeated. Sigma 0 changes nothing."""
    r = math.ceil(4 * sigma)
    if r == 0:
        return x
    kernel = np.exp(-0.5 * (np.arange(-r, r + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32).tolist()
    h, w = x.shape[-2:]
    padded = F.pad(x, (0, 0, r, r), mode="replicate")
    x = sum(padded[:, k:k + h] * weight for k, weight in enumerate(kernel))
    padded = F.pad(x, (r, r, 0, 0), mode="replicate")
    return sum(padded[..., k:k + w] * weight for k, weight in enumerate(kernel))


def unsharp(x, sigma, amount):
    """Unsharp mask: x + amount * (x - blurred x). A negative amount removes detail."""
    return x + amount * (x - gaussian_blur(x, sigma))


def noise(x, kind, strength, gray, seed):
    """Add noise, equal in all channels if gray.

    gaussian: strength is the standard deviation, 0 to 255. poisson: shot noise times strength; the number of
    photons at full brightness is the number of levels, rounded up to a power of two, as in Real-ESRGAN.
    """
    rng = np.random.default_rng(seed)
    base = to_8_bit(to_gray(x) if gray else x).double().numpy()
    if kind == "gaussian":
        field = rng.standard_normal(base.shape, np.float32) * np.float32(strength / 255)
    else:
        photons = 2.0 ** np.ceil(np.log2(len(np.unique(base))))
        field = ((rng.poisson(base * photons) / photons - base) * strength).astype(np.float32)
    return x + torch.from_numpy(field)


def grain(x, amplitude, sigma, angle, seed):
    """Add a texture of paper or brush: gray noise, blurred by two sigmas (pixels) along axes turned by angle.

    amplitude: standard deviation, 0 to 255.
    """
    field = np.random.default_rng(seed).standard_normal((1, *x.shape[1:]), np.float32)
    kernel = blur_kernel(2 * math.ceil(3 * max(sigma)) + 1, "aniso", sigma, angle)
    return x + convolve(torch.from_numpy(field), kernel * (amplitude / 255 / math.sqrt((kernel ** 2).sum())))


def median(x, edge):
    """Median of 3x3, except within a pixel of lines, where the gray gradient (Sobel) is above edge."""
    padded = np.pad(x.numpy(), ((0, 0), (1, 1), (1, 1)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).reshape(*x.shape, 9)
    medians = torch.from_numpy(np.partition(windows, 4, -1)[..., 4])
    return torch.where(line_mask(x, edge), x, medians)


def line_mask(x, edge):
    """(3, H, W) -> mask (1, H, W) of the pixels within a pixel of a gray gradient (Sobel) above edge."""
    gray = F.pad(to_gray(x), (1, 1, 1, 1), mode="replicate")
    dx, dy = gray[..., 2:] - gray[..., :-2], gray[:, 2:] - gray[:, :-2]
    dx = dx[:, :-2] + 2 * dx[:, 1:-1] + dx[:, 2:]
    dy = dy[..., :-2] + 2 * dy[..., 1:-1] + dy[..., 2:]
    line = ((dx * dx + dy * dy).sqrt() / 4 > edge).float()
    return F.max_pool2d(line, 3, 1, 1) > 0


def vae_grid(x, amplitude, offset, seed):
    """Add the grid of a latent model: one 8x8 pattern, repeated with a random strength for each cell.

    amplitude: standard deviation, 0 to 255. offset: (rows, columns) cut from the first cell.
    """
    rng, (h, w), (dy, dx) = np.random.default_rng(seed), x.shape[-2:], offset
    pattern = rng.standard_normal((3, 8, 8)) + 2 * rng.standard_normal((1, 8, 8))       # mostly gray
    pattern = sum(np.roll(pattern, (i, j), (1, 2)) for i in (0, 1) for j in (0, 1))     # 2 pixels wide
    pattern = (pattern - pattern.mean()) / pattern.std() * (amplitude / 255)
    strength = rng.uniform(0.5, 1.5, (h // 8 + 2, w // 8 + 2)).repeat(8, 0).repeat(8, 1)
    field = np.tile(pattern, (1, h // 8 + 2, w // 8 + 2)) * strength
    return x + torch.from_numpy(field[:, dy:dy + h, dx:dx + w].astype(np.float32))


def color_shift(x, gain, shift):
    """Multiply each channel by its gain and add its shift (3 numbers each)."""
    return x * x.new_tensor(gain)[:, None, None] + x.new_tensor(shift)[:, None, None]


# ---- codecs

@functools.lru_cache(maxsize=None)
def can_write(codec):
    """Whether this machine has the codec: Pillow for pictures, PyAV for video."""
    if codec not in VIDEO:
        Image.init()
        return codec.upper() in Image.SAVE
    try:
        import av
    except ImportError:
        return False
    return VIDEO[codec][0] in av.codecs_available


def code_frame(pixels, codec, quality):
    """Encode (H, W, 3) uint8 as one key frame of a video codec and decode it. quality: quantizer or CRF."""
    import av
    h, w = pixels.shape[:2]
    frame = np.pad(pixels, ((0, max(64 - h, h % 2)), (0, max(64 - w, w % 2)), (0, 0)), "edge")
    encoder_name, decoder_name = VIDEO[codec]
    encoder, decoder = av.CodecContext.create(encoder_name, "w"), av.CodecContext.create(decoder_name, "r")
    encoder.height, encoder.width = frame.shape[:2]
    encoder.pix_fmt, encoder.time_base, encoder.framerate = "yuv420p", Fraction(1, 25), 25
    encoder.thread_count = decoder.thread_count = 1
    keys = ("qmin", "qmax") if "mpeg" in codec else ("crf",)
    encoder.options = dict.fromkeys(keys, str(quality))
    if codec == "h265":
        encoder.options |= {"x265-params": "log-level=none:pools=1:frame-threads=1"}
    # SWS flags: bilinear, full chroma, accurate rounding. Without the last one all levels are 1 too low.
    exact = dict(interpolation=2 | 0x2000 | 0x40000)
    picture = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv420p", **exact)
    packets = [*encoder.encode(picture), *encoder.encode(None), None]       # None flushes
    frames = [decoded for packet in packets for decoded in decoder.decode(packet)]
    return frames[0].reformat(format="rgb24", **exact).to_ndarray()[:h, :w]


def compress(x, codec, quality, chroma="4:2:0", offset=(0, 0)):
    """Encode and decode with a real codec.

    codec: jpeg, webp, avif, or one of VIDEO. quality: 1 to 100, or the quantizer of a video codec.
    chroma: 4:2:0 or 4:4:4 (JPEG only). offset: (rows, columns) of mirrored picture in front of the first
    pixel while it is encoded, so that the blocks of the codec begin elsewhere, as in a cropped picture.
    Raises ValueError for a codec that this machine cannot write.
    """
    if codec not in CODECS or not can_write(codec):
        raise ValueError(f"no codec '{codec}'; there are {', '.join(filter(can_write, CODECS))}")
    dy, dx = offset
    pixels = to_8_bit(x).mul(255).byte().permute(1, 2, 0).numpy()
    pixels = np.pad(pixels, ((dy, 0), (dx, 0), (0, 0)), "symmetric")
    if max(pixels.shape) > WEBP_MAX_SIDE and codec != "jpeg":
        codec, quality = "jpeg", 60 if codec in VIDEO else quality
    if codec in VIDEO:
        pixels = code_frame(pixels, codec, quality)
    else:
        file = io.BytesIO()
        options = dict(jpeg=dict(subsampling=chroma), webp={}, avif=dict(speed=8, max_threads=1))[codec]
        Image.fromarray(pixels).save(file, codec.upper(), quality=quality, **options)
        with Image.open(file) as picture:
            pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels[dy:, dx:]).permute(2, 0, 1).float().div(255)


# ---- drawing the arguments: (rng, entry of a chain, HR size, LR size) -> arguments of the operation

def pick(rng, chances):
    """Draw a name from {name: chance}."""
    point = rng.random() * sum(chances.values())
    for name, chance in chances.items():
        point -= chance
        if point < 0:
            return name
    return name     # rounding left a little


def draw_int(rng, limits):
    """Draw a whole number between two limits, both included."""
    return int(rng.integers(limits[0], limits[1] + 1))


def draw_seed(rng):
    return int(rng.integers(2**63))


def draw_ranges(rng, entry, hr_size, lr_size):
    """For operations whose arguments are all ranges."""
    return {name: rng.uniform(*limits) for name, limits in entry.items() if name not in ("op", "p")}


def draw_downscale(rng, entry, hr_size, lr_size):
    return dict(size=lr_size, kernel=pick(rng, entry["kernel"]))


def draw_rescale(rng, entry, hr_size, lr_size):
    low, high = entry["factor"]
    factors = dict(up=rng.uniform(1.0, high), down=rng.uniform(low, 1.0), keep=1.0)
    factor = factors[pick(rng, entry["direction"])]
    base = hr_size if entry["base"] == "hr" else lr_size
    return dict(size=tuple(max(1, int(n * factor)) for n in base), kernel=pick(rng, entry["kernel"]),
                antialias=bool(rng.random() >= entry["aliased"]))


def draw_kernel_blur(rng, entry, hr_size, lr_size):
    low, high = entry["size"]
    size = 2 * draw_int(rng, (low // 2, high // 2)) + 1         # odd
    if rng.random() < entry["sinc"]:
        start = max(start for start in entry["cutoff"] if start <= size)
        return dict(size=size, shape="sinc", cutoff=rng.uniform(*entry["cutoff"][start]))
    shape = pick(rng, entry["shape"])
    sigma = across = rng.uniform(*entry["sigma"])
    angle, beta = 0.0, 1.0
    if "aniso" in shape:
        across, angle = rng.uniform(*entry["sigma"]), rng.uniform(-math.pi, math.pi)
    if " " in shape:
        low, high = entry["beta"][shape.split()[0]]
        beta = rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)
    return dict(size=size, shape=shape, sigma=(sigma, across), angle=angle, beta=beta)


def draw_sinc(rng, entry, hr_size, lr_size):
    return draw_kernel_blur(rng, entry | dict(sinc=1.0), hr_size, lr_size)


def draw_noise(rng, entry, hr_size, lr_size):
    kind = pick(rng, entry["kind"])
    return dict(kind=kind, strength=rng.uniform(*entry["strength"][kind]),
                gray=bool(rng.random() < entry["gray"]), seed=draw_seed(rng))


def draw_grain(rng, entry, hr_size, lr_size):
    sigma, length = rng.uniform(*entry["sigma"]), rng.uniform(*entry["brush_length"])
    amplitude = rng.uniform(*entry["amplitude"])
    along = length if rng.random() < entry["brush"] else sigma
    return dict(amplitude=amplitude, sigma=(along, sigma), angle=rng.uniform(0, math.pi), seed=draw_seed(rng))


def draw_vae_grid(rng, entry, hr_size, lr_size):
    amplitude, offset = rng.uniform(*entry["amplitude"]), (draw_int(rng, (0, 7)), draw_int(rng, (0, 7)))
    return dict(amplitude=amplitude, offset=offset, seed=draw_seed(rng))


def draw_color_shift(rng, entry, hr_size, lr_size):
    return dict(gain=rng.uniform(*entry["gain"], 3).tolist(), shift=rng.uniform(*entry["shift"], 3).tolist())


def draw_compress(rng, entry, hr_size, lr_size):
    codec = pick(rng, entry["codec"])
    while not can_write(codec):
        codec = FALLBACK[codec]
    quality = draw_int(rng, entry["quality"][codec])
    chroma = pick(rng, entry["chroma"])
    low, high = entry["offset"]
    offset = tuple(int(n) for n in rng.integers(low, high + 1, 2))
    return dict(codec=codec, quality=quality, chroma=chroma if codec == "jpeg" else "4:2:0", offset=offset)


CHANCE, RANGE, RANGES = "a chance from 0 to 1", "a range (low, high)", "a dictionary {name: (low, high)}"
BASE = "'hr' or 'lr'"


class Operation(NamedTuple):
    apply: Callable         # (x (3, H, W), **arguments) -> (3, h, w)
    draw: Callable          # (rng, entry of a chain, HR size, LR size) -> arguments
    parameters: dict        # of an entry: {name: CHANCE, RANGE, RANGES, BASE, or the names in {name: chance}}


OPERATIONS = {
    "downscale": Operation(downscale, draw_downscale, dict(kernel=KERNELS)),
    "rescale": Operation(resize, draw_rescale, dict(
        base=BASE, direction=("up", "down", "keep"), factor=RANGE, kernel=KERNELS, aliased=CHANCE)),
    "blur": Operation(gaussian_blur, draw_ranges, dict(sigma=RANGE)),
    "kernel_blur": Operation(kernel_blur, draw_kernel_blur, dict(
        size=RANGE, sinc=CHANCE, cutoff=RANGES, shape=REAL_SHAPE, sigma=RANGE, beta=RANGES)),
    "sinc": Operation(kernel_blur, draw_sinc, dict(size=RANGE, cutoff=RANGES)),
    "unsharp": Operation(unsharp, draw_ranges, dict(sigma=RANGE, amount=RANGE)),
    "median": Operation(median, draw_ranges, dict(edge=RANGE)),
    "noise": Operation(noise, draw_noise, dict(kind=("gaussian", "poisson"), strength=RANGES, gray=CHANCE)),
    "grain": Operation(grain, draw_grain, dict(
        amplitude=RANGE, sigma=RANGE, brush=CHANCE, brush_length=RANGE)),
    "vae_grid": Operation(vae_grid, draw_vae_grid, dict(amplitude=RANGE)),
    "color_shift": Operation(color_shift, draw_color_shift, dict(gain=RANGE, shift=RANGE)),
    "compress": Operation(compress, draw_compress, dict(
        codec=CODECS, quality=RANGES, chroma=("4:2:0", "4:4:4"), offset=RANGE)),
}


def is_valid(value, expected):
    """Whether a value of an entry is as Operation.parameters says."""
    if expected == CHANCE:
        return isinstance(value, (int, float)) and 0 <= value <= 1
    if expected == RANGE:
        return isinstance(value, (tuple, list)) and len(value) == 2 and value[0] <= value[1]
    if expected == BASE:
        return value in ("hr", "lr")
    if expected == RANGES:
        return isinstance(value, dict) and all(is_valid(limits, RANGE) for limits in value.values())
    return isinstance(value, dict) and bool(value) and set(value) <= set(expected)


def check_recipe(name):
    """Raise RecipeError for a wrong entry in RECIPES[name]."""
    recipe = RECIPES[name]
    for key in recipe.keys() - {"chain", "clean", "last_early"}:
        raise RecipeError(f"recipe '{name}': no key '{key}'; there are chain, clean, and last_early")
    if "chain" not in recipe:
        raise RecipeError(f"recipe '{name}' has no chain")
    for number, entry in enumerate(recipe["chain"], 1):
        op = entry.get("op")
        place = f"recipe '{name}', entry {number} of the chain ({op})"
        if op not in OPERATIONS:
            raise RecipeError(f"{place}: op must be one of {', '.join(OPERATIONS)}")
        parameters = {"p": CHANCE, **OPERATIONS[op].parameters}
        for key in entry.keys() - parameters.keys() - {"op"}:
            raise RecipeError(f"{place}: no parameter {key}; there are {', '.join(parameters)}")
        for key, expected in parameters.items():
            if key == "p" and "p" not in entry:
                continue
            if key not in entry:
                raise RecipeError(f"{place}: the parameter {key} is missing")
            if not is_valid(entry[key], expected):
                kind = expected if isinstance(expected, str) else f"{{name: chance}} of {', '.join(expected)}"
                raise RecipeError(f"{place}: {key} is {entry[key]!r}; it must be {kind}")
        for choice, ranges in (("codec", "quality"), ("kind", "strength")):
            missing = entry.get(choice, {}).keys() - entry.get(ranges, {}).keys()
            if missing:
                raise RecipeError(f"{place}: {ranges} has no range for {', '.join(missing)}")


# ---- degrading a batch

def parse_recipe(text):
    """'web:3,bicubic' -> {'web': 0.75, 'bicubic': 0.25}: the share of each recipe, 1 where none is given.

    Raises RecipeError for an unknown recipe, a wrong share, or a wrong entry in RECIPES.
    """
    shares = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition(":"))
        if name not in RECIPES:
            raise RecipeError(f"no recipe '{name}'; there are {', '.join(RECIPES)}, and mixes such as "
                              "web:0.7,bicubic:0.3")
        check_recipe(name)
        try:
            share = float(number or 1)
        except ValueError:
            share = math.nan
        if not 0 <= share < math.inf:
            raise RecipeError(f"'{part.strip()}' in recipe '{text}': a share is a number of 0 or more")
        shares[name] = shares.get(name, 0.0) + share
    total = sum(shares.values())
    if total == 0:
        raise RecipeError(f"all shares of recipe '{text}' are 0")
    return {name: share / total for name, share in shares.items()}


def draw(shares, seed, size, scale):
    """Draw the operations for one picture of HR size (h, w): [(function, arguments)], in their order.

    shares: what parse_recipe() returns.
    """
    seed = int(seed) % 2**64
    lr_size = size[0] // scale, size[1] // scale
    name = next(iter(shares))
    if len(shares) > 1:
        name = pick(np.random.default_rng((seed, 1)), shares)
    recipe, rng = RECIPES[name], np.random.default_rng(seed)
    if rng.random() < recipe.get("clean", 0):
        return [(downscale, dict(size=lr_size, kernel="bicubic"))]
    chain = list(recipe["chain"])
    if "last_early" in recipe and rng.random() < recipe["last_early"]:
        chain.insert(-2, chain.pop())
    operations = []
    for entry in chain:
        if "p" not in entry or rng.random() < entry["p"]:
            operation = OPERATIONS[entry["op"]]
            operations.append((operation.apply, operation.draw(rng, entry, size, lr_size)))
    return operations


@torch.no_grad()
def degrade(hr, recipe, scale, seeds):
    """Make the LR pictures of a batch of HR pictures.

    hr: (B, 3, H, W) float in [0, 1] on the CPU; H and W are multiples of scale, a whole number. recipe: a
    name of RECIPES or a mix such as "web:0.7,bicubic:0.3"; each picture draws one. seeds: B integers.
    Returns (B, 3, H/scale, W/scale) float32 in [0, 1], on the levels of 8 bits. Raises RecipeError, and
    ValueError for a wrong shape.
    """
    h, w = hr.shape[-2:]
    if hr.ndim != 4 or hr.shape[1] != 3 or h % scale or w % scale:
        raise ValueError(f"hr must be (B, 3, H, W), H and W multiples of {scale}, not {tuple(hr.shape)}")
    if len(seeds) != len(hr):
        raise ValueError(f"{len(seeds)} seeds for {len(hr)} pictures")
    shares = parse_recipe(recipe)
    lr = hr.new_empty(len(hr), 3, h // scale, w // scale, dtype=torch.float32)
    for i, seed in enumerate(seeds):
        x = hr[i].detach().float()
        for apply, arguments in draw(shares, seed, (h, w), scale):
            x = apply(x, **arguments).clamp(0, 1)
        if x.shape != lr[i].shape:
            raise RecipeError(f"recipe '{recipe}' does not end at the LR size; add op='downscale'")
        lr[i] = x
    return to_8_bit(lr)


def picture_seed(name, seed=0):
    """Return the seed of a picture from its relative name, so that a new picture changes no other."""
    data = f"{seed}:{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


# ---- artifacts of a given strength, to train a detector

def add_blocking(x, rng, jpeg_quality, webp_quality, webp_chance, chroma_420_chance):
    """Compression blocks with a random offset. All WebP has 4:2:0 chroma, visible at any quality."""
    codec, quality = "jpeg", jpeg_quality
    if rng.random() < webp_chance:
        codec, quality = "webp", webp_quality
    chroma = "4:2:0" if rng.random() < chroma_420_chance else "4:4:4"
    return compress(x, codec, round(quality), chroma, (draw_int(rng, ANY_OFFSET), draw_int(rng, ANY_OFFSET)))


def add_ringing(x, rng, cutoff, amount):
    """Mix in a low-pass filter, cutoff in radians per pixel: circular, or separable with Lanczos window."""
    if rng.random() < 0.5:
        kernel = blur_kernel(21, "sinc", cutoff=cutoff)
    else:
        t = np.arange(-10, 11)
        row = np.sinc(t * cutoff / np.pi) * np.sinc(t / 11)
        kernel = np.outer(row, row) / row.sum() ** 2
    return x + amount * (convolve(x, kernel) - x)


def add_banding(x, rng, levels):
    """Round each channel to few levels with a random phase, where there is no fine detail."""
    base, phase = gaussian_blur(x, 1.0), torch.from_numpy(rng.random((3, 1, 1), np.float32))
    detail = gaussian_blur((x - base).abs().mean(0, keepdim=True), 1.5)
    smooth = (1.5 - detail / 0.008).clamp(0, 1)
    return x + smooth * (((base * levels + phase).round() - phase) / levels - x)


def shift_picture(x, dy, dx):
    """Move (C, H, W) by fractions of a pixel, bilinear; the border is repeated."""
    r, (h, w) = math.ceil(max(abs(dy), abs(dx))) + 1, x.shape[-2:]
    p = F.pad(x, (r, r, r, r), mode="replicate")
    i, j = math.floor(dy), math.floor(dx)
    p = p[:, r + i:r + i + h] * (1 - dy + i) + p[:, r + i + 1:r + i + 1 + h] * (dy - i)
    return p[..., r + j:r + j + w] * (1 - dx + j) + p[..., r + j + 1:r + j + 1 + w] * (dx - j)


def add_seam(x, rng, color, sigma, shift):
    """Change the color, blur, or position of one or two tiles that follow the first one."""
    vertical = rng.random() < 0.5
    x = x.transpose(1, 2).contiguous() if vertical else x
    n = x.shape[1]
    borders = sorted(draw_int(rng, (8, n - 8)) for _ in range(1 + (n >= 96 and rng.random() < 0.3)))
    out = x.clone()
    for top, bottom in zip(borders, borders[1:] + [n]):
        changes = rng.random(3) < 0.5
        changes[rng.integers(3)] = True
        shifted, blurred, colored = changes
        size, angle, tile = rng.uniform(0.7, 1.3), rng.uniform(0, 2 * math.pi), x
        if shifted:
            tile = shift_picture(tile, shift * size * math.sin(angle), shift * size * math.cos(angle))
        if blurred:
            tile = gaussian_blur(tile, sigma * size)
        if colored:
            # One sign for all channels: most tiles are lighter or darker.
            change = np.sign(rng.uniform(-1, 1)) * rng.uniform(0.6, 1.0, (3, 1, 1))
            tile = tile + torch.from_numpy((change * color * size / 255).astype(np.float32))
        out[:, top:bottom] = tile[:, top:bottom]
    return out.transpose(1, 2) if vertical else out


class Artifact(NamedTuple):
    apply: Callable         # (x (3, H, W), rng, **arguments) -> (3, H, W)
    arguments: dict         # {name: its values at strength 0 (hardly visible), 0.5 (clear), and 1 (extreme)}


ARTIFACTS = {
    "blocking": Artifact(add_blocking, dict(jpeg_quality=(98, 30, 5), webp_quality=(98, 15, 0),
                                            webp_chance=(0, 0.3, 0.3), chroma_420_chance=(0, 0.7, 0.7))),
    "ringing": Artifact(add_ringing, dict(cutoff=(3.0, 1.9, 1.0), amount=(0.15, 1, 1))),
    "banding": Artifact(add_banding, dict(levels=(128, 22, 7))),
    "blur": Artifact(lambda x, rng, sigma: gaussian_blur(x, sigma), dict(sigma=(0.2, 1.2, 3.5))),
    "oversharp": Artifact(lambda x, rng, amount: unsharp(x, rng.uniform(0.8, 1.6), amount),
                          dict(amount=(0.1, 1.2, 6.0))),
    "noise": Artifact(lambda x, rng, sigma: noise(x, "gaussian", sigma, rng.random() < 0.5, draw_seed(rng)),
                      dict(sigma=(1, 12, 45))),         # 0 to 255
    "seam": Artifact(add_seam, dict(color=(0.5, 5, 20), sigma=(0.1, 0.7, 2.0), shift=(0.05, 1.0, 3.5))),
}


@torch.no_grad()
def artifact(hr, kind, strength, seeds):
    """Add one artifact to each picture of a batch.

    hr: (B, 3, H, W) float in [0, 1] on the CPU, H and W at least 32. kind: a name of ARTIFACTS or a list of
    them. strength: 0 (hardly visible) to 1 (extreme), or a list. seeds: B integers. Returns (B, 3, H, W)
    float32 in [0, 1], on the levels of 8 bits.
    """
    kinds = [kind] * len(hr) if isinstance(kind, str) else kind
    strengths = np.broadcast_to(np.asarray(strength, float), len(hr))
    out = torch.empty(hr.shape)
    for i, (name, s, seed) in enumerate(zip(kinds, strengths, seeds, strict=True)):
        rng = np.random.default_rng(int(seed) % 2**64)
        apply, values = ARTIFACTS[name]
        arguments = {key: float(np.interp(s, (0, 0.5, 1), points)) for key, points in values.items()}
        out[i] = apply(hr[i].detach().float(), rng, **arguments)
    return to_8_bit(out)


# ---- the sheet: one picture through several recipes

def describe(operations):
    """Operations in words: 'downscale 192 192 area, gaussian_blur 0.53, compress jpeg 84 4:2:0'."""
    lines = []
    for function, arguments in operations:
        words = [function.__name__]
        for name, value in arguments.items():
            if name not in ("seed", "offset", "gray", "antialias"):
                values = value if isinstance(value, (tuple, list)) else [value]
                words += [f"{v:.2g}" if isinstance(v, float) else str(v) for v in values]
        lines.append(" ".join(words))
    return ", ".join(lines)


def crop_details(hr, side):
    """Return the square of (3, H, W) with the largest mean gradient, among positions on a coarse grid."""
    h, w = hr.shape[-2:]
    step = max(16, (max(h, w) - side) // 8)
    crops = [hr[:, y:y + side, x:x + side] for y in range(0, h - side + 1, step)
             for x in range(0, w - side + 1, step)]
    return max(crops, key=lambda c: c.diff(dim=1).abs().mean() + c.diff(dim=2).abs().mean())


def draw_sheet(hr, scale, names, seed):
    """Draw a crop of hr (3, H, W) and its LR pictures by the recipes, enlarged to one size -> Pillow image.

    Each recipe shows its first draw from seed on that is not a clean one.
    """
    side = min(*hr.shape[-2:], 384) // scale * scale
    crop = crop_details(hr, side)
    cells = [("HR", f"{side}x{side}", crop)]
    clean = [(downscale, dict(size=(side // scale, side // scale), kernel="bicubic"))]
    for name in names:
        draws = [draw(parse_recipe(name), n, (side, side), scale) for n in range(seed, seed + 100)]
        k = next((k for k, operations in enumerate(draws) if operations != clean), 0)
        lr = degrade(crop[None], name, scale, [seed + k])[0]
        cells.append((name, describe(draws[k]), lr.repeat_interleave(scale, 1).repeat_interleave(scale, 2)))

    columns, label = min(4, len(cells)), 72
    rows = math.ceil(len(cells) / columns)
    page = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + label) + 8), "white")
    pen = ImageDraw.Draw(page)
    for n, (title, details, x) in enumerate(cells):
        left, top = 8 + n % columns * (side + 8), 4 + n // columns * (side + label)
        lines = textwrap.wrap(details, max(12, side // 5), max_lines=4, placeholder=" ...")
        pen.text((left, top), title, "black", font_size=16)
        pen.text((left, top + 20), "\n".join(lines), "#555", font_size=10)
        pixels = to_8_bit(x).mul(255).byte().permute(1, 2, 0).numpy()
        page.paste(Image.fromarray(pixels), (left, top + label - 4))
    return page


# ---- the command

def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Write an LR picture for each HR picture of a folder, as PNG with the same name. "
                    "A picture is cropped to a multiple of --scale first. Transparent areas become white.",
        epilog=f"recipes: {', '.join(RECIPES)}, or a mix such as soft:0.5,light:0.3,bicubic:0.2. "
               "Example: python degrade.py wallpapers/ wallpapers_lr/ --recipe web --scale 2")
    parser.add_argument("hr", type=Path, help="folder of HR pictures, with subfolders; a picture for --sheet")
    parser.add_argument("lr", type=Path, nargs="?", help="folder to write the LR pictures to")
    parser.add_argument("--recipe", help="a recipe or a mix (default: web; for --sheet: all recipes)")
    parser.add_argument("--scale", type=int, default=2, help="scale factor, a whole number (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: 0)")
    parser.add_argument("--sheet", type=Path, metavar="FILE",
                        help="draw one picture and its LR picture by every recipe, to look at")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    if args.scale < 1:
        parser.error("--scale must be 1 or more")
    if not args.lr and not args.sheet:
        parser.error("give a folder for the LR pictures, or --sheet FILE")
    return args


def read_hr(path, scale):
    """Read a picture and crop it to a multiple of scale -> (rgb (3, H, W), Picture). Raises PictureError."""
    import images
    picture = images.read_picture(path)
    rgb = images.composite(picture, 1.0)
    h, w = (n // scale * scale for n in rgb.shape[-2:])
    if min(h, w) == 0:
        raise images.PictureError(f"{images.printable(path)}: smaller than the scale {scale}")
    return rgb[:, :h, :w], picture


def write_sheet(args):
    """--sheet: one picture in, one out."""
    import images
    names = list(parse_recipe(args.recipe) if args.recipe else RECIPES)
    if args.sheet.exists() and not args.overwrite:
        raise images.UserError(f"{args.sheet} exists; choose another name or give --overwrite")
    page = np.array(draw_sheet(read_hr(args.hr, args.scale)[0], args.scale, names, args.seed))
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    images.save_picture(args.sheet, images.Picture(rgb=torch.from_numpy(page).permute(2, 0, 1) / 255))
    print(f"{len(names)} recipes of {images.printable(args.hr)} in {images.printable(args.sheet)}")


def plan_files(args):
    """Return {path of the LR picture: path of the HR picture}. Raises UserError."""
    import images
    if not args.hr.is_dir():
        raise images.UserError(f"{args.hr} is not a folder")
    if args.lr.resolve().is_relative_to(args.hr.resolve()):
        raise images.UserError(f"{args.lr} lies inside {args.hr}; choose a folder beside it")
    jobs = {}
    for path in images.find_pictures([args.hr]):
        lr_path = args.lr / path.relative_to(args.hr).with_suffix(".png")
        if lr_path in jobs:
            raise images.UserError(f"{jobs[lr_path]} and {path} would both become {lr_path}")
        if lr_path.exists() and not args.overwrite:
            raise images.UserError(f"{lr_path} exists; choose another folder or give --overwrite")
        jobs[lr_path] = path
    return jobs


def write_folder(args):
    """Write the LR picture of each HR picture. Bad pictures are named and skipped."""
    import images
    recipe = args.recipe or "web"
    parse_recipe(recipe)
    jobs = plan_files(args)
    progress, start, written = images.ProgressLine(), time.time(), 0
    for count, (lr_path, path) in enumerate(jobs.items(), 1):
        try:
            hr, picture = read_hr(path, args.scale)
        except images.PictureError as error:
            progress.clear()
            print(f"skipped: {error}", file=sys.stderr)
            continue
        seed = picture_seed(path.relative_to(args.hr).as_posix(), args.seed)
        lr = degrade(hr[None], recipe, args.scale, [seed])[0]
        lr_path.parent.mkdir(parents=True, exist_ok=True)
        gray = picture.gray and images.color_space(picture.icc) == b"GRAY"      # it needs gray pixels
        images.save_picture(lr_path, images.Picture(rgb=lr, icc=picture.icc, gray=gray))
        written += 1
        rate = count / (time.time() - start + 1e-9)
        progress(f"{count}/{len(jobs)}  {rate:.1f} pictures/s  {(len(jobs) - count) / rate:.0f} s left")
    progress.clear()
    if not written:
        raise images.UserError(f"none of the {len(jobs)} pictures in {args.hr} could be used")
    print(f"{written} pictures in {images.printable(args.lr)}, recipe {recipe}, scale {args.scale}; "
          f"{len(jobs) - written} skipped")


def main():
    import images
    args = parse_arguments()
    sys.stdout.reconfigure(errors="backslashreplace")       # a console may be unable to show a Japanese name
    try:
        write_sheet(args) if args.sheet else write_folder(args)
    except (RecipeError, images.UserError) as error:
        images.fail(images.printable(error))
    except OSError as error:
        images.fail(f"cannot write {images.printable(args.sheet or args.lr)}: {error}")


if __name__ == "__main__":
    main()
