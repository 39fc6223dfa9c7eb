"""degrade.py: how a clean picture becomes a bad one.

A recipe is a name and a table: its rows are operations in the order in which they happen. For every picture of a
batch a list of steps, operations with their arguments, is drawn from the table by the picture's own seed. So what
happens to a picture depends on nothing but the picture, the recipe, the scale and that seed: not on its neighbours in
the batch, nor on how many worker processes there are. To the bit: arithmetic on pixels is element by element, never a
matrix product or a library convolution, whose order of summing changes with the shape.

    python degrade.py HR_FOLDER LR_FOLDER --recipe web --scale 2
    python degrade.py picture.png --sheet sheet.png         # one picture through every recipe, to look at

`artifact`, at the end, draws one fault at a time, for training a detector of faults. Needs torch, numpy, Pillow; video
codecs only where PyAV is installed. Copied alone it works; only the commands above read pictures through tile.py.
"""
import argparse
import functools
import hashlib
import io
import math
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

# ---------------------------------------------------------------------------------------------------------------------
# The recipes. `p` is the chance that an operation happens at all, a pair is a range drawn from evenly (of whole numbers
# both ends), a dictionary of names holds chances. `clean` is the share of pictures that get the plain bicubic
# downscale and nothing more, so that a model learns to leave grain and stars alone. What follows _ in the name of a row
# only tells it from others. Lengths are pixels of the picture as it is at that point: LR pixels after `downscale`.
# ---------------------------------------------------------------------------------------------------------------------

BICUBIC = dict(clean=1.0)

WEB = dict(     # what a picture goes through on its way to a gallery site: reduced, a little soft, compressed once
    clean=0.1,
    downscale=dict(bicubic=0.7, lanczos=0.1, bilinear=0.1, area=0.1),
    gaussian=dict(p=0.9, sigma=(0.2, 0.8)),
    compress=dict(p=0.95,
                  codec=dict(jpeg=0.85, webp=0.15),
                  quality=dict(jpeg=(85, 95), webp=(80, 95)),
                  chroma={"4:2:0": 0.8, "4:4:4": 0.2},          # JPEG only: every other codec is 4:2:0 here
                  offset=(0, 15)),                              # where the codec's 8 and 16 pixel grid begins
)

GALLERY = WEB | dict(   # the same, and nobody has cropped it since: the codec's grid begins at the corner
    compress=WEB["compress"] | dict(offset=(0, 0)),
)

CHROMA = {"4:2:0": 0.7, "4:4:4": 0.3}

JPEG = dict(    # compression and nothing else, from hardly visible to a thumbnail's
    clean=0.1,
    downscale=dict(bicubic=0.7, lanczos=0.1, bilinear=0.1, area=0.1),
    compress_1=dict(p=0.3, codec=dict(jpeg=1.0), quality=dict(jpeg=(50, 95)), chroma=CHROMA, offset=(0, 15)),
    compress_2=dict(p=1.0, codec=dict(jpeg=1.0), quality=dict(jpeg=(30, 95)), chroma=CHROMA, offset=(0, 15)),
)

LIGHT = dict(   # a drawing that has been passed on: compressed, badly resized, a little soft, ringing, compressed again
    clean=0.1,
    compress_1=dict(p=0.7, codec=dict(jpeg=0.85, webp=0.15), quality=dict(jpeg=(70, 95), webp=(70, 95)), chroma=CHROMA,
                    offset=(0, 15)),
    rescale=dict(p=0.6, of="lr", way=dict(up=0.4, down=0.6), factor=(0.6, 1.6),
                 kernel=dict(bicubic=0.4, bilinear=0.3, lanczos=0.1, area=0.2), aliased=0.5),
    downscale=dict(bicubic=0.4, bilinear=0.2, lanczos=0.2, area=0.2),
    gaussian=dict(p=0.6, sigma=(0.2, 0.8)),
    blur=dict(p=0.5, size=(7, 21), sinc=1.0, cutoff={7: (math.pi / 2, math.pi)}),
    compress_2=dict(p=0.9, codec=dict(jpeg=0.85, webp=0.15), quality=dict(jpeg=(60, 95), webp=(60, 95)), chroma=CHROMA,
                    offset=(0, 15)),
)

KINDS = {"iso": 0.45, "aniso": 0.25, "generalised iso": 0.12, "generalised aniso": 0.03, "plateau iso": 0.12,
         "plateau aniso": 0.03}
BETA = dict(generalised=(0.5, 4.0), plateau=(1.0, 2.0))         # half the draws lie below 1, half above
CUTOFF = {7: (math.pi / 3, math.pi), 13: (math.pi / 5, math.pi)}    # of the sinc filter, from this size of kernel on
AREA_BILINEAR_BICUBIC = dict(area=1 / 3, bilinear=1 / 3, bicubic=1 / 3)
JPEG_30_95 = dict(p=1.0, codec=dict(jpeg=1.0), quality=dict(jpeg=(30, 95)), chroma={"4:2:0": 1.0}, offset=(0, 15))

REAL = dict(    # the second-order chain of Real-ESRGAN (Wang et al. 2021) with the ranges of its x2plus training
    clean=0.1,
    blur_1=dict(p=1.0, size=(7, 21), sinc=0.1, cutoff=CUTOFF, kind=KINDS, sigma=(0.2, 3.0), beta=BETA),
    rescale_1=dict(of="hr", way=dict(up=0.2, down=0.7, keep=0.1), factor=(0.15, 1.5), kernel=AREA_BILINEAR_BICUBIC,
                   aliased=1.0),
    noise_1=dict(p=1.0, gaussian=0.5, sigma=(1.0, 30.0), poisson=(0.05, 3.0), grey=0.4),
    compress_1=JPEG_30_95,
    blur_2=dict(p=0.8, size=(7, 21), sinc=0.1, cutoff=CUTOFF, kind=KINDS, sigma=(0.2, 1.5), beta=BETA),
    rescale_2=dict(of="lr", way=dict(up=0.3, down=0.4, keep=0.3), factor=(0.3, 1.2), kernel=AREA_BILINEAR_BICUBIC,
                   aliased=1.0),
    noise_2=dict(p=1.0, gaussian=0.5, sigma=(1.0, 25.0), poisson=(0.05, 2.5), grey=0.4),
    rescale_3=dict(of="lr", way=dict(keep=1.0), factor=(1.0, 1.0), kernel=AREA_BILINEAR_BICUBIC, aliased=1.0),
    blur_3=dict(p=0.8, size=(7, 21), sinc=1.0, cutoff={7: (math.pi / 3, math.pi)}),
    compress_2=JPEG_30_95,
    early=0.5,                                                  # chance that the last row comes before the last resize
)

SOFT = dict(    # a wallpaper that is clean but soft: grain, light compression, and the blur last. No motion blur
    clean=0.1,
    downscale=dict(bicubic=0.4, lanczos=0.2, bilinear=0.2, area=0.2),
    grain=dict(p=0.5, amplitude=(1.0, 5.0), fine=(0.3, 0.6), brush=0.5, long=(0.8, 2.5)),   # amplitude: of 255
    compress=dict(p=0.7, codec=dict(jpeg=0.8, webp=0.2), quality=dict(jpeg=(85, 97), webp=(85, 97)), chroma=CHROMA,
                  offset=(0, 15)),
    blur=dict(p=0.95, size=(5, 11), sinc=0.25, cutoff={5: (math.pi / 2.5, math.pi / 1.25)},
              kind={"iso": 0.5, "generalised iso": 0.5}, sigma=(0.3, 1.1), beta=dict(generalised=(0.5, 1.0))),
)

AWM2X = dict(   # after AWM: any of three downscalers, smoothed by a median except on lines, sharpened, JPEG 85
    clean=0.1,
    downscale=dict(bicubic=1 / 3, area=1 / 6, bilinear=1 / 6, lanczos=1 / 3),
    median=dict(p=0.9, edge=(0.08, 0.16)),
    gaussian=dict(p=0.8, sigma=(0.3, 0.5)),
    unsharp=dict(p=0.9, sigma=(0.8, 1.2), amount=(0.3, 0.7)),
    compress=dict(p=1.0, codec=dict(jpeg=1.0), quality=dict(jpeg=(85, 85)), chroma=CHROMA, offset=(0, 15)),
)

AWM4X = AWM2X | dict(   # the same, stronger: at 4x there is more to lose
    median=dict(p=0.9, edge=(0.16, 0.32)),
    gaussian=dict(p=0.8, sigma=(0.4, 0.8)),
    unsharp=dict(p=0.9, sigma=(0.8, 1.6), amount=(0.5, 1.2)),
)

DIFFUSION = dict(   # what the VAE of a diffusion model leaves: weak fine detail, a faint 8-pixel grid, colours adrift
    clean=0.1,
    downscale=dict(bicubic=0.6, lanczos=0.2, area=0.2),
    unsharp=dict(p=0.95, sigma=(0.8, 1.6), amount=(-0.7, -0.2)),    # below 0 it takes detail away
    cells=dict(p=0.8, amplitude=(0.5, 2.0)),                        # of 255
    drift=dict(p=0.8, gain=(0.97, 1.03), shift=(-0.012, 0.012)),    # each colour its own
    compress=dict(p=0.3, codec=dict(jpeg=0.7, webp=0.3), quality=dict(jpeg=(88, 97), webp=(88, 97)), chroma=CHROMA,
                  offset=(0, 15)),
)

LINE = dict(    # frames of animation, after APISR (Wang et al. 2024): compressed as a picture, reduced, then as a frame
    clean=0.1,
    compress_1=dict(p=0.8, codec=dict(jpeg=0.5, webp=0.5), quality=dict(jpeg=(20, 95), webp=(20, 95)), chroma=CHROMA,
                    offset=(0, 15)),
    blur=dict(p=0.5, size=(7, 13), sinc=0.2, cutoff=CUTOFF, kind=KINDS, sigma=(0.2, 1.2), beta=BETA),
    downscale=dict(bicubic=0.4, bilinear=0.3, area=0.3),
    compress_2=dict(p=1.0,
                    codec=dict(jpeg=0.2, webp=0.2, avif=0.2, mpeg2=0.1, mpeg4=0.1, h264=0.1, h265=0.1),
                    quality=dict(jpeg=(20, 95), webp=(20, 95), avif=(20, 95), mpeg2=(8, 31), mpeg4=(8, 31),
                                 h264=(23, 38), h265=(28, 42)),     # of the last four the quantiser: lower is better
                    chroma=CHROMA, offset=(0, 15)),
)

RECIPES = dict(bicubic=BICUBIC, web=WEB, jpeg=JPEG, light=LIGHT, real=REAL, soft=SOFT, awm2x=AWM2X, awm4x=AWM4X,
               diffusion=DIFFUSION, line=LINE, gallery=GALLERY)

# What takes the place of a codec that this machine cannot write, with that one's quality: AVIF needs Pillow 11.3 or
# newer, the others PyAV.
STAND_IN = dict(webp="jpeg", avif="webp", mpeg2="jpeg", mpeg4="jpeg", h264="webp", h265="avif")
VIDEO = dict(mpeg2=("mpeg2video", "mpeg2video"), mpeg4=("mpeg4", "mpeg4"), h264=("libx264", "h264"),
             h265=("libx265", "hevc"))                          # FFmpeg's encoder and decoder

# ---------------------------------------------------------------------------------------------------------------------
# Resampling
# ---------------------------------------------------------------------------------------------------------------------


def _cubic(x):      # Keys 1981, a = -0.5
    x = abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))


def _lanczos(x):    # Duchon 1979, three lobes
    return np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _triangle(x):
    return np.maximum(1 - abs(x), 0.0)


KERNELS = dict(bicubic=(_cubic, 2.0), lanczos=(_lanczos, 3.0), bilinear=(_triangle, 1.0), area=(None, 0.5))


@functools.lru_cache(maxsize=256)
def _taps(n, out, kernel, antialias):
    """Which input pixels make each output pixel of one axis, and with what weight: two (taps, out) tensors."""
    function, radius = KERNELS[kernel]
    step = n / out                                              # input pixels per output pixel
    widen = step if kernel == "area" else max(step, 1.0) if antialias else 1.0      # grows with the reduction
    centre = (np.arange(out) + 0.5) * step - 0.5
    first = np.floor(centre - radius * widen).astype(np.int64)
    index = first[None] + np.arange(math.ceil(2 * radius * widen) + 2)[:, None]
    if kernel == "area":                                        # how much of each pixel the footprint covers
        weight = (np.minimum(index + 0.5, centre + step / 2) - np.maximum(index - 0.5, centre - step / 2)).clip(0)
    else:
        weight = function((index - centre) / widen)
    weight = weight / weight.sum(0)
    used = np.abs(weight).max(1) > 1e-9
    index, weight = index[used] % (2 * n), weight[used]         # symmetric border: ... 1 0 | 0 1 ... n-1 | n-1 ...
    index = np.where(index < n, index, 2 * n - 1 - index)
    return torch.from_numpy(index), torch.from_numpy(weight.astype(np.float32))


def _resize_rows(x, out, kernel, antialias):
    """(..., H, W) -> (..., out, W)"""
    index, weight = _taps(x.shape[-2], out, kernel, antialias)
    index, weight = index.to(x.device), weight.to(x.device, x.dtype)[:, :, None]
    strip = max(1, 2 ** 18 * x.shape[-2] // x.numel())          # rows at a time: a strip stays in the cache, 4x faster
    parts = []
    for i in range(0, out, strip):
        y = None
        for k, w in zip(index[:, i:i + strip], weight[:, i:i + strip]):
            term = x.index_select(-2, k).mul_(w)
            y = term if y is None else y.add_(term)
        parts.append(y)
    return torch.cat(parts, -2)


def resize(x, size, kernel="bicubic", antialias=True):
    """Resampling up or down, antialiased after MATLAB's imresize: half-pixel centres, symmetric border.

    x: (..., H, W) float of any range; size: (h, w) of the result, each 1 or more; kernel: bicubic (a = -0.5),
    lanczos (a = 3), bilinear, or area (the exact mean over each output pixel's footprint); antialias=False: the kernel
    stays small however strong the reduction, and jags appear, as careless programs make them (area cannot).
    Differentiable. The result is not clamped: bicubic and lanczos overshoot. Raises ValueError.
    """
    if kernel not in KERNELS:
        raise ValueError(f"no kernel '{kernel}'; there are {', '.join(KERNELS)}")
    if x.ndim < 2 or min(x.shape[-2:]) < 1 or len(size) != 2 or min(size) < 1:
        raise ValueError(f"cannot resize {tuple(x.shape)} to {tuple(size)}; both need at least 1 pixel a side")
    h, w = int(size[0]), int(size[1])
    rows_first = h * x.shape[-1] <= w * x.shape[-2]             # the stronger reduction first: less work afterwards
    if rows_first and h != x.shape[-2]:
        x = _resize_rows(x, h, kernel, antialias)
    if w != x.shape[-1]:
        x = _resize_rows(x.transpose(-1, -2).contiguous(), w, kernel, antialias).transpose(-1, -2).contiguous()
    if not rows_first and h != x.shape[-2]:
        x = _resize_rows(x, h, kernel, antialias)
    return x



# ---------------------------------------------------------------------------------------------------------------------
# Operations on one picture x (3, H, W), values in [0, 1]; what they leave outside is clamped where they are called
# ---------------------------------------------------------------------------------------------------------------------


def to_8_bit(x):
    """(...) in [0, 1] -> the same, clamped and rounded to the 256 levels that a file can hold."""
    return x.clamp(0, 1).mul(255).round().div(255)


def downscale(x, size, kernel):
    """-> (3, h, w) for size (h, w), antialiased, rounded to 8 bits."""
    return to_8_bit(resize(x, size, kernel))


def convolve(x, kernel):
    """x (C, H, W) under a kernel (k, k), k odd, -> the same shape; the border is repeated. Tap by tap; where the kernel
    equals its mirror images, pixels of one weight are added first, which is twice as fast."""
    r, (h, w) = len(kernel) // 2, x.shape[-2:]
    kernel = kernel.astype(np.float32)
    mirrored = np.array_equal(kernel, kernel[::-1]) and np.array_equal(kernel, kernel[:, ::-1])
    padded = np.pad(x.numpy(), ((0, 0), (r, r), (r, r)), "edge")
    out, strip, taps = np.zeros(x.shape, np.float32), max(1, 2 ** 15 // w), range(r + 1 if mirrored else 2 * r + 1)
    for top in range(0, h, strip):
        total = out[:, top:top + strip]
        n, term = total.shape[1], np.empty_like(total)
        for i in taps:
            rows = padded[:, top + i:top + i + n]
            if mirrored and i < r:
                rows = rows + padded[:, top + 2 * r - i:top + 2 * r - i + n]
            for j in taps:
                if abs(kernel[i, j]) < 1e-6:
                    continue
                if mirrored and j < r:
                    np.add(rows[..., j:j + w], rows[..., 2 * r - j:2 * r - j + w], out=term)
                    term *= kernel[i, j]
                else:
                    np.multiply(rows[..., j:j + w], kernel[i, j], out=term)
                total += term
    return torch.from_numpy(out)


def blur_kernel(size, kind="iso", sigma=(1.0, 1.0), angle=0.0, beta=1.0, cutoff=math.pi):
    """-> (size, size) array of sum 1, size odd. d is the squared distance in sigmas (pixels) along axes turned by angle
    (radians). iso, aniso: exp(-d/2); generalised: exp(-d^beta/2); plateau: 1/(1 + d^beta) (Liu et al. 2020, as used in
    Real-ESRGAN). sinc: the circular low-pass of this cutoff, radians a pixel, cut off by the kernel's edge."""
    x, y = np.meshgrid(*[np.arange(size) - size // 2] * 2)
    if kind == "sinc":
        distance = np.hypot(x, y)
        distance[size // 2, size // 2] = 1.0
        kernel = cutoff * torch.special.bessel_j1(torch.from_numpy(cutoff * distance)).numpy() / (2 * np.pi * distance)
        kernel[size // 2, size // 2] = cutoff ** 2 / (4 * np.pi)
    else:
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        d = ((along / sigma[0]) ** 2 + (across / sigma[1]) ** 2) ** beta
        kernel = 1 / (1 + d) if "plateau" in kind else np.exp(-0.5 * d)
    return kernel / kernel.sum()


def blur(x, **kernel):
    """Filtered with blur_kernel(**kernel)."""
    return convolve(x, blur_kernel(**kernel))


def gaussian_blur(x, sigma):
    """(C, H, W) -> the same shape, sigma in pixels; the border is repeated. 0 changes nothing."""
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
    """Unsharp mask: what is finer than sigma (pixels), times 1 + amount. A negative amount takes detail away."""
    return x + amount * (x - gaussian_blur(x, sigma))


def grey_of(x):
    """(3, H, W) -> (1, H, W), luma of BT.601 without its offset."""
    return 0.299 * x[:1] + 0.587 * x[1:2] + 0.114 * x[2:]


def noise(x, kind, strength, grey, seed):
    """gaussian: normal, strength is its sigma, of 255. poisson: the shot noise of a picture with as many photons as it
    has levels (rounded up to a power of two, as in Real-ESRGAN), times strength. grey: the same in R, G and B."""
    rng, base = np.random.default_rng(seed), to_8_bit(grey_of(x) if grey else x).double().numpy()
    if kind == "gaussian":
        field = rng.standard_normal(base.shape, np.float32) * np.float32(strength / 255)
    else:
        photons = 2.0 ** np.ceil(np.log2(len(np.unique(base))))
        field = ((rng.poisson(base * photons) / photons - base) * strength).astype(np.float32)
    return x + torch.from_numpy(field)


def grain(x, amplitude, sigma, angle, seed):
    """Texture of paper or brush: grey normal noise under a Gaussian of two sigmas (pixels), at an angle. amplitude is
    its standard deviation, of 255."""
    field = np.random.default_rng(seed).standard_normal((1, *x.shape[1:]), np.float32)
    kernel = blur_kernel(2 * math.ceil(3 * max(sigma)) + 1, "aniso", sigma, angle)
    return x + convolve(torch.from_numpy(field), kernel * (amplitude / 255 / math.sqrt((kernel ** 2).sum())))


def median_off_lines(x, edge):
    """Median of 3x3, except on lines and beside them: where the grey picture steps (Sobel) by more than edge."""
    h, w = x.shape[-2:]
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    a, b, c = p[:, :-2], p[:, 1:-1], p[:, 2:]                               # columns of three, sorted
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    low, middle, high = (torch.minimum(low, c), torch.maximum(low, torch.minimum(high, c)), torch.maximum(high, c))

    def three(y):
        return y[..., :-2], y[..., 1:-1], y[..., 2:]

    def median(a, b, c):
        return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    low, high = functools.reduce(torch.maximum, three(low)), functools.reduce(torch.minimum, three(high))
    smoothed = median(low, median(*three(middle)), high)
    g = F.pad(grey_of(x), (1, 1, 1, 1), mode="replicate")
    dx, dy = g[..., 2:] - g[..., :-2], g[:, 2:] - g[:, :-2]
    dx, dy = dx[:, :-2] + 2 * dx[:, 1:-1] + dx[:, 2:], dy[..., :-2] + 2 * dy[..., 1:-1] + dy[..., 2:]
    line = F.pad(((dx * dx + dy * dy).sqrt() / 4 > edge).float(), (1, 1, 1, 1))
    line = functools.reduce(torch.maximum, [line[:, i:i + h, j:j + w] for i in range(3) for j in range(3)])
    return torch.where(line > 0, x, smoothed)


def cells(x, amplitude, offset, seed):
    """The grid that a latent model leaves: one 8x8 pattern, repeated, each time at its own strength. amplitude is its
    standard deviation, of 255; offset (rows, columns) is where the grid begins."""
    rng, (h, w), (dy, dx) = np.random.default_rng(seed), x.shape[-2:], offset
    pattern = rng.standard_normal((3, 8, 8)) + 2 * rng.standard_normal((1, 8, 8))       # mostly grey
    pattern = sum(np.roll(pattern, (i, j), (1, 2)) for i in (0, 1) for j in (0, 1))     # no finer than two pixels
    pattern = (pattern - pattern.mean()) / pattern.std() * (amplitude / 255)
    strength = rng.uniform(0.5, 1.5, (h // 8 + 2, w // 8 + 2)).repeat(8, 0).repeat(8, 1)
    field = np.tile(pattern, (1, h // 8 + 2, w // 8 + 2)) * strength
    return x + torch.from_numpy(field[:, dy:dy + h, dx:dx + w].astype(np.float32))


def drift(x, gain, shift):
    """Each colour times its gain, plus its shift."""
    return x * x.new_tensor(gain)[:, None, None] + x.new_tensor(shift)[:, None, None]


@functools.lru_cache(maxsize=None)
def can_write(codec):
    """Whether this machine has the codec: pictures by Pillow's build, video where PyAV is installed."""
    if codec in VIDEO:
        try:
            import av
            return bool(av.codec.Codec(VIDEO[codec][0], "w"))
        except Exception:   # not installed, or built without this encoder
            return False
    Image.init()
    return codec.upper() in Image.SAVE


def through_video(pixels, codec, quality):
    """(H, W, 3) uint8 through one frame of a video codec, a key frame. quality: the quantiser, or CRF of H.264/5."""
    from fractions import Fraction

    import av
    h, w = pixels.shape[:2]
    frame = np.pad(pixels, ((0, max(64 - h, h % 2)), (0, max(64 - w, w % 2)), (0, 0)), "edge")
    encoder, decoder = (av.CodecContext.create(name, mode) for name, mode in zip(VIDEO[codec], "wr"))
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *frame.shape[:2], "yuv420p", Fraction(1, 25)
    encoder.framerate, encoder.thread_count, decoder.thread_count = 25, 1, 1
    encoder.options = dict(qmin=str(quality), qmax=str(quality)) if "mpeg" in codec else dict(crf=str(quality))
    if codec == "h265":
        encoder.options |= {"x265-params": "log-level=none:pools=1:frame-threads=1"}
    how = dict(interpolation=2 | 0x2000 | 0x40000)      # bilinear, whole chroma, exact: else all is a level darker
    picture = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv420p", **how)
    frames = [f for packet in [*encoder.encode(picture), *encoder.encode(None), None] for f in decoder.decode(packet)]
    return frames[0].reformat(format="rgb24", **how).to_ndarray()[:h, :w]


def compress(x, codec, quality, chroma="4:2:0", offset=(0, 0)):
    """Through a real codec and back, by way of 8 bits.

    codec: jpeg, webp, avif or one of VIDEO; quality: 1 to 100, or a video codec's quantiser; chroma: 4:2:0 or 4:4:4
    (jpeg); offset: rows and columns of mirrored picture set before the first, so that the codec's blocks begin
    elsewhere, as they do in a crop. Cut off again. Raises ValueError for a codec that is not there.
    """
    if codec not in ("jpeg", *STAND_IN) or not can_write(codec):
        raise ValueError(f"no codec '{codec}'; there are {', '.join(filter(can_write, ('jpeg', *STAND_IN)))}")
    dy, dx = offset
    pixels = np.pad(to_8_bit(x).mul(255).byte().permute(1, 2, 0).numpy(), ((dy, 0), (dx, 0), (0, 0)), "symmetric")
    if max(pixels.shape) > 16383 and codec != "jpeg":           # more than WebP and video can hold
        codec, quality = "jpeg", 60 if codec in VIDEO else quality
    if codec in VIDEO:
        pixels = through_video(pixels, codec, quality)
    else:
        file = io.BytesIO()
        how = dict(jpeg=dict(subsampling=chroma), webp={}, avif=dict(speed=8, max_threads=1))[codec]
        Image.fromarray(pixels).save(file, codec.upper(), quality=quality, **how)
        with Image.open(file) as picture:
            pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels[dy:, dx:]).permute(2, 0, 1).float().div(255)


# ---------------------------------------------------------------------------------------------------------------------
# From tables to steps: (random generator, a row of a table, HR size, LR size) -> arguments of the operation
# ---------------------------------------------------------------------------------------------------------------------


def pick(rng, chances):
    """A name out of {name: chance}; the chances need not add up to 1."""
    names = list(chances)
    point = rng.random() * sum(chances.values())
    for name in names:
        point -= chances[name]
        if point < 0:
            return name
    return names[-1]


def whole(rng, limits):
    """A whole number between two limits, both included."""
    return int(rng.integers(limits[0], limits[1] + 1))


def new_seed(rng):
    return int(rng.integers(2 ** 63))


def draw_ranges(rng, row, hr, lr):
    return {key: rng.uniform(*limits) for key, limits in row.items() if key != "p"}


def draw_downscale(rng, row, hr, lr):
    return dict(size=lr, kernel=pick(rng, row))


def draw_rescale(rng, row, hr, lr):
    low, high = row["factor"]
    factor = dict(up=rng.uniform(1.0, high), down=rng.uniform(low, 1.0), keep=1.0)[pick(rng, row["way"])]
    return dict(size=tuple(max(1, int(n * factor)) for n in (hr if row["of"] == "hr" else lr)),
                kernel=pick(rng, row["kernel"]), antialias=bool(rng.random() >= row["aliased"]))


def draw_blur(rng, row, hr, lr):
    """A sinc filter or one of the kinds of blur_kernel; the size is odd."""
    size = 2 * whole(rng, (row["size"][0] // 2, row["size"][1] // 2)) + 1
    if rng.random() < row["sinc"]:
        return dict(size=size, kind="sinc",
                    cutoff=rng.uniform(*row["cutoff"][max(n for n in row["cutoff"] if n <= size)]))
    kind, sigma, angle, beta = pick(rng, row["kind"]), rng.uniform(*row["sigma"]), 0.0, 1.0
    across = sigma
    if "aniso" in kind:
        across, angle = rng.uniform(*row["sigma"]), rng.uniform(-math.pi, math.pi)
    if " " in kind:
        low, high = row["beta"][kind.split()[0]]
        beta = rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)
    return dict(size=size, kind=kind, sigma=(sigma, across), angle=angle, beta=beta)


def draw_noise(rng, row, hr, lr):
    kind, strength = ("gaussian", "sigma") if rng.random() < row["gaussian"] else ("poisson", "poisson")
    return dict(kind=kind, strength=rng.uniform(*row[strength]), grey=bool(rng.random() < row["grey"]),
                seed=new_seed(rng))


def draw_grain(rng, row, hr, lr):
    fine, long = rng.uniform(*row["fine"]), rng.uniform(*row["long"])
    return dict(amplitude=rng.uniform(*row["amplitude"]), sigma=(long if rng.random() < row["brush"] else fine, fine),
                angle=rng.uniform(0, math.pi), seed=new_seed(rng))


def draw_cells(rng, row, hr, lr):
    return dict(amplitude=rng.uniform(*row["amplitude"]), offset=(whole(rng, (0, 7)), whole(rng, (0, 7))),
                seed=new_seed(rng))


def draw_drift(rng, row, hr, lr):
    return dict(gain=rng.uniform(*row["gain"], 3).tolist(), shift=rng.uniform(*row["shift"], 3).tolist())


def draw_compress(rng, row, hr, lr):
    codec = pick(rng, row["codec"])
    while not can_write(codec):
        codec = STAND_IN[codec]
    how = dict(codec=codec, quality=whole(rng, row["quality"][codec]), chroma=pick(rng, row["chroma"]),
               offset=tuple(int(o) for o in rng.integers(row["offset"][0], row["offset"][1] + 1, 2)))
    return how if codec == "jpeg" else how | dict(chroma="4:2:0")


OPERATIONS = dict(      # what the rows of a table are called
    downscale=(downscale, draw_downscale), rescale=(resize, draw_rescale), blur=(blur, draw_blur),
    gaussian=(gaussian_blur, draw_ranges), unsharp=(unsharp, draw_ranges), median=(median_off_lines, draw_ranges),
    noise=(noise, draw_noise), grain=(grain, draw_grain), cells=(cells, draw_cells), drift=(drift, draw_drift),
    compress=(compress, draw_compress))


def shares(recipe):
    """'web' -> {'web': 1.0}; 'web:0.7,bicubic:0.3' -> {'web': 0.7, 'bicubic': 0.3}. Raises ValueError, one line."""
    found = {}
    for part in str(recipe).split(","):
        name, _, share = (s.strip() for s in part.partition(":"))
        if name not in RECIPES:
            raise ValueError(f"no recipe '{name}'; there are {', '.join(RECIPES)}, and mixes such as "
                             "web:0.7,bicubic:0.3")
        try:
            share = float(share or 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < math.inf:
            raise ValueError(f"'{part.strip()}' in recipe '{recipe}': a share is a number of 0 or more, as in "
                             "web:0.7,bicubic:0.3")
        found[name] = found.get(name, 0.0) + share
    if not sum(found.values()) > 0:
        raise ValueError(f"recipe '{recipe}' leaves nothing: at least one share must be above 0")
    return {name: share / sum(found.values()) for name, share in found.items()}


def draw(recipe, seed, size, scale):
    """What a picture of this HR size (h, w) goes through: [(operation, its arguments)], in order. Raises ValueError."""
    mix, seed, lr = shares(recipe), int(seed) % 2 ** 64, (size[0] // scale, size[1] // scale)
    name = pick(np.random.default_rng((seed, 1)), mix) if len(mix) > 1 else next(iter(mix))
    table, rng, steps = RECIPES[name], np.random.default_rng(seed), []
    if rng.random() < table["clean"]:
        return [(downscale, dict(size=lr, kernel="bicubic"))]
    rows = [name for name in table if name not in ("clean", "early")]
    if "early" in table and rng.random() < table["early"]:
        rows[-3:] = rows[-1], rows[-3], rows[-2]
    for row in rows:
        if "p" not in table[row] or rng.random() < table[row]["p"]:
            operation, arguments = OPERATIONS[row.split("_")[0]]
            steps.append((operation, arguments(rng, table[row], size, lr)))
    return steps


@torch.no_grad()
def degrade(hr, recipe, scale, seeds):
    """The LR pictures that belong to a batch of HR pictures.

    hr: (B, 3, H, W) float in [0, 1] on the CPU, H and W multiples of scale; recipe: a name of RECIPES or a mix, of
    which each picture draws one part; scale: whole number; seeds: an int per picture. Returns (B, 3, H/scale, W/scale)
    float32 in [0, 1] on 8-bit levels. The same picture, recipe, scale and seed give the same bits in any batch, and a
    picture for which a mix draws `web` gets what `web` alone gives it. Raises ValueError.
    """
    if hr.ndim != 4 or hr.shape[1] != 3:
        raise ValueError(f"hr must be (B, 3, H, W), not {tuple(hr.shape)}")
    if int(scale) != scale or scale < 1:
        raise ValueError(f"scale must be a whole number of 1 or more, not {scale}")
    h, w = hr.shape[-2:]
    if min(h, w) < scale or h % scale or w % scale:
        raise ValueError(f"{w}x{h} does not divide by the scale {scale}; crop it to a multiple first")
    if len(seeds) != len(hr):
        raise ValueError(f"{len(seeds)} seeds for {len(hr)} pictures; give one each")
    shares(recipe)
    lr = hr.new_empty(len(hr), 3, h // scale, w // scale, dtype=torch.float32)
    for i, seed in enumerate(seeds):
        x = hr[i].detach().float()
        for operation, how in draw(recipe, seed, (h, w), scale):
            x = operation(x, **how).clamp(0, 1)
        lr[i] = x
    return to_8_bit(lr)


def picture_seed(name, seed=0):
    """A seed for a picture from its relative name, so that adding a picture to a folder changes no other."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()[:8], "big")


# ---------------------------------------------------------------------------------------------------------------------
# One fault at a time, graded, for training a detector
# ---------------------------------------------------------------------------------------------------------------------

FAULTS = dict(  # what strength 0 (hardly visible), 0.5 (clear to a trained eye) and 1 (gross) mean; between them, lines
    blocking=dict(jpeg=(98, 30, 5), webp=(98, 15, 0), is_webp=(0, 0.3, 0.3), is_420=(0, 0.7, 0.7)),     # quality, share
    ringing=dict(cutoff=(3.0, 1.9, 1.0), share=(0.15, 1, 1)),   # of a low-pass, radians a pixel; how much of it
    banding=dict(levels=(128, 22, 7)),                          # of each colour, in smooth places only
    blur=dict(sigma=(0.2, 1.2, 3.5)),                           # pixels
    oversharp=dict(amount=(0.1, 1.2, 6.0)),                     # of an unsharp mask of sigma 0.8 to 1.6
    noise=dict(sigma=(1, 12, 45)),                              # of 255, normal, grey or coloured
    seam=dict(colour=(0.5, 5, 20), sigma=(0.1, 0.7, 2.0), shift=(0.05, 1.0, 3.5)),      # of 255; pixels; pixels
)
ARTIFACTS = tuple(FAULTS)


def shifted(x, dy, dx):
    """(C, H, W) moved by parts of a pixel, linear in between; the border is repeated."""
    r, (h, w) = math.ceil(max(abs(dy), abs(dx))) + 1, x.shape[-2:]
    p = F.pad(x, (r, r, r, r), mode="replicate")
    i, j = math.floor(dy), math.floor(dx)
    p = p[:, r + i:r + i + h] * (1 - dy + i) + p[:, r + i + 1:r + i + 1 + h] * (dy - i)
    return p[..., r + j:r + j + w] * (1 - dx + j) + p[..., r + j + 1:r + j + 1 + w] * (dx - j)


def blocking(x, rng, jpeg, webp, is_webp, is_420):
    """The grid begins anywhere. Thinned colour, which all WebP has, shows even at the highest quality."""
    codec, chroma = "webp" if rng.random() < is_webp else "jpeg", "4:2:0" if rng.random() < is_420 else "4:4:4"
    return compress(x, codec, round(webp if codec == "webp" else jpeg), chroma,
                    (whole(rng, (0, 15)), whole(rng, (0, 15))))


def ringing(x, rng, cutoff, share):
    """A circular sinc, or the product of two in rows and columns under a wide Lanczos window."""
    if rng.random() < 0.5:
        kernel = blur_kernel(21, "sinc", cutoff=cutoff)
    else:
        t = np.arange(-10, 11)
        row = np.sinc(t * cutoff / np.pi) * np.sinc(t / 11)
        kernel = np.outer(row, row) / row.sum() ** 2
    return x + share * (convolve(x, kernel) - x)


def banding(x, rng, levels):
    """Colours rounded to few levels, each colour's beginning anywhere, where there is no fine detail."""
    base, phase = gaussian_blur(x, 1.0), torch.from_numpy(rng.random((3, 1, 1), np.float32))
    busy = gaussian_blur((x - base).abs().mean(0, keepdim=True), 1.5)
    smooth = (1.5 - busy / 0.008).clamp(0, 1)
    return x + smooth * (((base * levels + phase).round() - phase) / levels - x)


def seam(x, rng, colour, sigma, shift):
    """Two or three tiles side by side or one above the other; all but the first are off in colour, blur or place."""
    upright = rng.random() < 0.5
    x = x.transpose(1, 2).contiguous() if upright else x
    n = x.shape[1]
    cuts = sorted(whole(rng, (8, n - 8)) for _ in range(1 + (n >= 96 and rng.random() < 0.3)))
    out = x.clone()
    for top, bottom in zip(cuts, cuts[1:] + [n]):
        off = rng.random(3) < 0.5
        off[rng.integers(3)] = True
        size, angle, tile = rng.uniform(0.7, 1.3), rng.uniform(0, 2 * math.pi), x
        if off[0]:
            tile = shifted(tile, shift * size * math.sin(angle), shift * size * math.cos(angle))
        if off[1]:
            tile = gaussian_blur(tile, sigma * size)
        if off[2]:
            sign = np.sign(rng.uniform(-1, 1)) * rng.uniform(0.6, 1.0, (3, 1, 1))       # mostly lighter or darker
            tile = tile + torch.from_numpy((sign * colour * size / 255).astype(np.float32))
        out[:, top:bottom] = tile[:, top:bottom]
    return out.transpose(1, 2) if upright else out


DRAWN = dict(       # how each fault is drawn: (x, generator, its values of FAULTS) -> x
    blocking=blocking, ringing=ringing, banding=banding, seam=seam,
    blur=lambda x, rng, sigma: gaussian_blur(x, sigma),
    oversharp=lambda x, rng, amount: unsharp(x, rng.uniform(0.8, 1.6), amount),
    noise=lambda x, rng, sigma: noise(x, "gaussian", sigma, rng.random() < 0.5, new_seed(rng)))


@torch.no_grad()
def artifact(hr, kind, strength, seeds):
    """Clean patches -> the same with one fault each, as FAULTS says.

    hr: (B, 3, H, W) float in [0, 1] on the CPU, H and W at least 32; kind: a name of ARTIFACTS, or a list of B;
    strength: 0 to 1, or a list of B; seeds: an int per picture. Returns (B, 3, H, W) float32 in [0, 1] on 8-bit levels,
    each picture independent of the others. Raises ValueError.
    """
    if hr.ndim != 4 or hr.shape[1] != 3 or min(hr.shape[-2:]) < 32:
        raise ValueError(f"hr must be (B, 3, H, W) with H and W at least 32, not {tuple(hr.shape)}")
    kinds = [kind] * len(hr) if isinstance(kind, str) else list(kind)
    strengths = [float(s) for s in np.broadcast_to(np.asarray(strength, float), len(hr))]
    if not len(kinds) == len(seeds) == len(hr):
        raise ValueError(f"{len(kinds)} kinds and {len(seeds)} seeds for {len(hr)} pictures; give one each")
    out = torch.empty(hr.shape)
    for i, (name, s, seed) in enumerate(zip(kinds, strengths, seeds)):
        if name not in FAULTS or not 0 <= s <= 1:
            raise ValueError(f"no fault '{name}' of strength {s}; there are {', '.join(ARTIFACTS)}, of 0 to 1")
        x, rng = hr[i].detach().float(), np.random.default_rng(int(seed) % 2 ** 64)
        how = {key: float(np.interp(s, (0, 0.5, 1), values)) for key, values in FAULTS[name].items()}
        out[i] = DRAWN[name](x, rng, **how)
    return to_8_bit(out)


# ---------------------------------------------------------------------------------------------------------------------
# The contact sheet
# ---------------------------------------------------------------------------------------------------------------------


def described(steps):
    """Steps in words: 'downscale area, blur iso 7 1.2 1.2, compress jpeg 84 4:2:0'."""
    lines = []
    for operation, how in steps:
        values = [how[key] for key in how if key not in ("seed", "size", "offset", "grey", "antialias")]
        values += [f"{how['size'][1]}x{how['size'][0]}"] if operation is resize else []
        values = [v for value in values for v in (value if isinstance(value, (tuple, list)) else [value])]
        lines.append(" ".join([operation.__name__] + [f"{v:.2g}" if isinstance(v, float) else str(v) for v in values]))
    return ", ".join(lines)


def sheet(hr, scale, names, seed):
    """The busiest part of hr (3, H, W), some 384 pixels wide, and what each recipe makes of it, pixels enlarged scale
    times -> a Pillow picture. A recipe shows the first draw from seed on that is not its clean share's."""
    side = min(*hr.shape[-2:], 384) // scale * scale
    if side == 0:
        raise ValueError(f"{hr.shape[-1]}x{hr.shape[-2]} is smaller than the scale {scale}")
    step = max(16, (max(hr.shape[-2:]) - side) // 8)
    crops = [hr[:, y:y + side, x:x + side] for y in range(0, hr.shape[-2] - side + 1, step)
             for x in range(0, hr.shape[-1] - side + 1, step)]
    crop = max(crops, key=lambda c: ((c[:, 1:] - c[:, :-1]).abs().mean() + (c[..., 1:] - c[..., :-1]).abs().mean()))
    pictures = [("HR", f"{side}x{side}", crop)]
    for name in names:
        plain = draw("bicubic", 0, (side, side), scale)
        number = next((n for n in range(seed, seed + 100) if draw(name, n, (side, side), scale) != plain), seed)
        lr = degrade(crop[None], name, scale, [number])[0]
        pictures.append((name, described(draw(name, number, (side, side), scale)),
                         lr.repeat_interleave(scale, 1).repeat_interleave(scale, 2)))
    columns, text = min(4, len(pictures)), 72
    page = Image.new("RGB", (columns * (side + 8) + 8, -(-len(pictures) // columns) * (side + text) + 8), "white")
    pen = ImageDraw.Draw(page)
    for n, (title, details, x) in enumerate(pictures):
        left, top = 8 + n % columns * (side + 8), 4 + n // columns * (side + text)
        pen.text((left, top), title, "black", font_size=16)
        for k, line in enumerate(textwrap.wrap(details, max(12, side // 5), max_lines=4, placeholder=" ...")):
            pen.text((left, top + 20 + 11 * k), line, "#555", font_size=10)
        pixels = to_8_bit(x).mul(255).byte().permute(1, 2, 0).numpy()
        page.paste(Image.fromarray(pixels), (left, top + text - 4))
    return page


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def plan(pictures, source, target, suffixes):
    """[(relative name, path, path of the LR picture)]; raises ValueError where two would land on one name."""
    jobs, taken = [], {}
    for path in pictures:
        name = Path(path).relative_to(source)
        lr_path = target / (name if name.suffix.lower() in suffixes else name.with_suffix(suffixes[0]))
        if lr_path in taken:
            raise ValueError(f"{taken[lr_path]} and {name} would both become {lr_path.name}; rename one of them")
        taken[lr_path] = name
        jobs.append((name.as_posix(), Path(path), lr_path))
    return jobs


def main():
    if hasattr(sys.stdout, "reconfigure"):      # a log in cp1252, a name in Japanese
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        description="Write the LR picture of every HR picture in a folder, under the same relative names, as PNG.",
        epilog="recipes: " + ", ".join(RECIPES) + ", or a mix such as soft:0.5,light:0.3,bicubic:0.2\n\n"
               "An HR picture whose sides are not multiples of --scale loses up to scale - 1 pixels on the right and\n"
               "at the bottom before it is degraded; the file itself is not touched. Transparent parts become white.\n"
               "The draws depend on --seed and a picture's relative name only.\n\n"
               "examples: python degrade.py wallpapers/ wallpapers_lr/ --recipe web --scale 2\n"
               "          python degrade.py wallpaper.png --sheet sheet.png",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hr_folder", type=Path, help="clean pictures, read through all sub-folders; for --sheet, one")
    parser.add_argument("lr_folder", type=Path, nargs="?", help="where the LR pictures go")
    parser.add_argument("--recipe", help="what happens to them (default: web; for --sheet: every recipe)")
    parser.add_argument("--scale", type=int, default=2, help="how many times smaller, a whole number (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="another number, other draws (default: 0)")
    parser.add_argument("--jpeg", type=int, metavar="QUALITY", help="write JPEG of this quality, such as 85, not PNG")
    parser.add_argument("--sheet", type=Path, metavar="FILE",
                        help="write one picture through every recipe, labelled, side by side, to look at")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    try:
        run(parser.parse_args())
    except KeyboardInterrupt:
        print("\nstopped; what was written stays", file=sys.stderr)
        sys.exit(130)


def write_sheet(args, names):
    """--sheet: one picture in, one out. Raises ValueError and OSError."""
    import images

    if args.lr_folder or args.jpeg is not None:
        raise ValueError("--sheet writes one file and nothing else; leave the second folder and --jpeg out")
    if args.sheet.exists() and not args.overwrite:
        raise ValueError(f"{args.sheet} exists already; choose another name or give --overwrite")
    if not args.hr_folder.is_file():
        raise ValueError(f"{args.hr_folder} is not a picture; give one file")
    page = sheet(images.composite(images.read_picture(args.hr_folder), 1.0), args.scale, names, args.seed)
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    images.save_picture(args.sheet, images.Picture(rgb=torch.from_numpy(np.array(page)).permute(2, 0, 1).float().div(255)))
    print(f"{len(names)} recipes of {images.printable(args.hr_folder)} in {images.printable(args.sheet)}")


def run(args):
    """The command, its arguments parsed; ends the process with 2 where one line says why."""
    import images

    source, target, recipe = args.hr_folder, args.lr_folder, args.recipe or "web"
    try:
        mix = shares(recipe)
        if args.scale < 1:
            raise ValueError(f"--scale must be 1 or more, not {args.scale}")
        if args.sheet:
            return write_sheet(args, tuple(mix if args.recipe else RECIPES))
        if args.jpeg is not None and not 1 <= args.jpeg <= 100:
            raise ValueError(f"--jpeg must be 1 to 100, not {args.jpeg}")
        if target is None:
            raise ValueError("give a folder for the LR pictures too, or --sheet FILE")
        if not source.is_dir():
            raise ValueError(f"{source} is not a folder; give the folder of the HR pictures")
        if target.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{target} lies inside {source}; choose a folder beside it")
        jobs = plan(images.find_pictures([source]), source, target, (".jpg", ".jpeg") if args.jpeg else (".png",))
        if not jobs:
            raise ValueError(f"no picture in {source}; give a folder with some")
        there = [] if args.overwrite else [lr_path for *_, lr_path in jobs if lr_path.exists()]
        if there:
            raise ValueError(f"{there[0]} exists already ({len(there)} of {len(jobs)} do); choose another folder or "
                             "give --overwrite")
    except ValueError as e:
        images.fail(images.printable(e))
    except OSError as e:
        images.fail(f"cannot write {images.printable(args.sheet or target)}: {e.strerror or e}")

    terminal, start, shown, done, cropped, bad = sys.stderr.isatty(), time.time(), time.time(), 0, 0, 0
    for count, (name, path, lr_path) in enumerate(jobs, 1):
        try:
            picture = images.read_picture(path)
            hr = images.composite(picture, 1.0)
            h, w = (side - side % args.scale for side in hr.shape[-2:])
            cropped += (h, w) != tuple(hr.shape[-2:])
            lr = degrade(hr[None, :, :h, :w], recipe, args.scale, [picture_seed(name, args.seed)])[0]
        except (ValueError, OSError) as e:      # a PictureError is a ValueError and names its file
            reason = e if isinstance(e, images.PictureError) else f"{images.printable(name)}: {e}"
            images.ProgressLine.clear()
            print(f"skipped: {reason}", file=sys.stderr)
            bad += 1
            continue
        try:
            lr_path.parent.mkdir(parents=True, exist_ok=True)
            grey = picture.grey and images.color_space(picture.icc) == b"GRAY"     # such a profile fits no other
            images.save_picture(lr_path, images.Picture(rgb=lr, icc=picture.icc, grey=grey), args.jpeg or 95)
        except (OSError, ValueError) as e:
            images.fail(f"cannot write {images.printable(lr_path)}: {getattr(e, 'strerror', None) or e}; free some room "
                      f"or choose another folder ({done} of {len(jobs)} are done)")
        done += 1
        if terminal or time.time() - shown > 10:
            shown, rate = time.time(), count / (time.time() - start + 1e-9)
            line = f"{count}/{len(jobs)}  {rate:.1f} pictures/s  {(len(jobs) - count) / rate:.0f} s left"
            print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    images.ProgressLine.clear()
    if not done:
        images.fail(f"none of the {len(jobs)} pictures in {source} could be used; the reasons stand above")
    print(f"{done} pictures by recipe {recipe}, {args.scale}x smaller, in {target}"
          + (f"; {cropped} cropped to a multiple of {args.scale} first" if cropped else "")
          + (f"; {bad} skipped" if bad else ""))


if __name__ == "__main__":
    main()
