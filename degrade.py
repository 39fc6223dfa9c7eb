"""Degrade clean pictures (HR) into low-resolution pictures (LR) by a recipe.

    lr = degrade(hr, "web", scale=2, seeds=[0, 1])      # hr (2, 3, H, W) in [0, 1] -> lr (2, 3, H/2, W/2)
    lr = degrade(hr, "web:0.7,bicubic:0.3", 2, seeds)   # a mix: each picture gets one recipe at random

    python degrade.py HR_FOLDER LR_FOLDER --recipe web --scale 2
    python degrade.py picture.png --sheet sheet.png     # one picture through every recipe

Each picture has its own random seed, so its result does not depend on the batch or the number of workers.
Filters are sums of shifted pictures: in library convolutions, rounding depends on the size of the picture.
Needs torch, numpy, and Pillow. Works when copied alone; only the command needs images.py.
"""
import argparse
import functools
import hashlib
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

# ---- recipes
#   clean                  probability of bicubic downscaling alone, without the chain
#   chain                  list of entries: the operations in their order
#   last_early             probability that the last operation is applied two places earlier
# In an entry:
#   op                     a name of OPERATIONS; the other keys are arguments of its function
#   p                      probability of the operation (default: always applied)
#   (low, high)            uniform distribution; an integer range includes both ends
#   {name: probability}    one name is sampled; the probabilities are normalized
#   {name: range}          the range for each name
# Lengths are in pixels of the input of the operation: LR pixels after `downscale`.

ANY_KERNEL = dict(bicubic=0.7, lanczos=0.1, bilinear=0.1, area=0.1)
ANY_OFFSET = (0, 15)        # of the codec's block grid, in pixels; random, as in a cropped picture
CHROMA = {"4:2:0": 0.7, "4:4:4": 0.3}       # for JPEG; WebP always uses 4:2:0
JPEG, JPEG_WEBP = dict(jpeg=1.0), dict(jpeg=0.85, webp=0.15)

REAL_SHAPE = {"iso": 0.45, "aniso": 0.25, "generalized iso": 0.12, "generalized aniso": 0.03,
              "plateau iso": 0.12, "plateau aniso": 0.03}
REAL_BETA = dict(generalized=(0.5, 4.0), plateau=(1.0, 2.0))    # half of the values are below 1
REAL_CUTOFF = {0: (math.pi / 3, math.pi), 13: (math.pi / 5, math.pi)}   # {smallest kernel size: range}
REAL_BLUR = dict(op="kernel_blur", size=(7, 21), sinc=0.1, cutoff=REAL_CUTOFF, shape=REAL_SHAPE,
                 beta=REAL_BETA)
REAL_RESCALE = dict(op="rescale", kernel=dict(area=1 / 3, bilinear=1 / 3, bicubic=1 / 3), aliased=1.0)
REAL_JPEG = dict(op="compress", p=1.0, codec=JPEG, quality=dict(jpeg=(30, 95)), chroma={"4:2:0": 1.0})


def web(offset):
    """Return the recipe of a picture on an image board: downscaled, slightly blurred, compressed once."""
    return dict(clean=0.1, chain=[
        dict(op="downscale", kernel=ANY_KERNEL),
        dict(op="blur", p=0.9, sigma=(0.2, 0.8)),
        dict(op="compress", p=0.95, codec=JPEG_WEBP, quality=dict(jpeg=(85, 95), webp=(80, 95)),
             chroma={"4:2:0": 0.8, "4:4:4": 0.2}, offset=offset)])


RECIPES = {
    "bicubic": dict(clean=1.0, chain=[]),
    "clean": dict(chain=[
        dict(op="downscale", kernel=dict(bicubic=0.55, lanczos=0.2, area=0.15, bilinear=0.1))]),
    "web": web(offset=ANY_OFFSET),
    "gallery": web(offset=(0, 0)),      # an uncropped picture
    # A reposted drawing: compressed, resized badly, blurred, with ringing, and compressed again.
    "light": dict(clean=0.1, chain=[
        dict(op="compress", p=0.7, codec=JPEG_WEBP, quality=dict(jpeg=(70, 95), webp=(70, 95))),
        dict(op="rescale", p=0.6, base="lr", direction=dict(up=0.4, down=0.6), factor=(0.6, 1.6),
             kernel=dict(bicubic=0.4, bilinear=0.3, lanczos=0.1, area=0.2), aliased=0.5),
        dict(op="downscale", kernel=dict(bicubic=0.4, bilinear=0.2, lanczos=0.2, area=0.2)),
        dict(op="blur", p=0.6, sigma=(0.2, 0.8)),
        dict(op="kernel_blur", p=0.5, size=(7, 21), sinc=1.0, cutoff={0: (math.pi / 2, math.pi)}),
        dict(op="compress", p=0.9, codec=JPEG_WEBP, quality=dict(jpeg=(60, 95), webp=(60, 95))),
    ]),
    # The second-order chain of Real-ESRGAN (Wang et al. 2021) with the ranges of its x2plus model.
    "real": dict(clean=0.1, last_early=0.5, chain=[
        REAL_BLUR | dict(p=1.0, sigma=(0.2, 3.0)),
        REAL_RESCALE | dict(base="hr", direction=dict(up=0.2, down=0.7, keep=0.1), factor=(0.15, 1.5)),
        dict(op="noise", p=1.0, gaussian=(1.0, 30.0), poisson=(0.05, 3.0), gray=0.4),
        REAL_JPEG,
        REAL_BLUR | dict(p=0.8, sigma=(0.2, 1.5)),
        REAL_RESCALE | dict(base="lr", direction=dict(up=0.3, down=0.4, keep=0.3), factor=(0.3, 1.2)),
        dict(op="noise", p=1.0, gaussian=(1.0, 25.0), poisson=(0.05, 2.5), gray=0.4),
        REAL_RESCALE | dict(base="lr", direction=dict(keep=1.0), factor=(1.0, 1.0)),
        dict(op="kernel_blur", p=0.8, size=(7, 21), sinc=1.0, cutoff={0: (math.pi / 3, math.pi)}),
        REAL_JPEG,
    ]),
    # A clean but soft wallpaper: grain, light compression, then blur.
    "soft": dict(clean=0.1, chain=[
        dict(op="downscale", kernel=dict(bicubic=0.4, lanczos=0.2, bilinear=0.2, area=0.2)),
        dict(op="grain", p=0.5, amplitude=(1.0, 5.0), sigma=(0.3, 0.6), brush=0.5, brush_length=(0.8, 2.5)),
        dict(op="compress", p=0.7, codec=dict(jpeg=0.8, webp=0.2),
             quality=dict(jpeg=(85, 97), webp=(85, 97))),
        dict(op="kernel_blur", p=0.95, size=(5, 11), sinc=0.25, cutoff={0: (math.pi / 2.5, math.pi / 1.25)},
             shape={"iso": 0.5, "generalized iso": 0.5}, sigma=(0.3, 1.1), beta=dict(generalized=(0.5, 1.0))),
    ]),
}


class RecipeError(ValueError):
    """An unknown recipe or a wrong mix. The message is one line."""


# ---- resampling

def cubic(x):
    """Return the cubic kernel of Keys (1981) with a = -0.5."""
    x = abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


KERNELS = {             # name: (function, radius)
    "bicubic": (cubic, 2.0),
    "lanczos": (lambda x: np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0), 3.0),
    "bilinear": (lambda x: np.maximum(1 - abs(x), 0.0), 1.0),
    "area": (None, 0.5),
}


@functools.lru_cache(maxsize=256)
def resampling_weights(n, out, kernel, antialias):
    """Return (index, weight), (taps, out): output pixel i is the sum of x[index[:, i]] * weight[:, i]."""
    function, radius = KERNELS[kernel]
    ratio = n / out                                 # input pixels per output pixel
    stretch = ratio if kernel == "area" else max(ratio, 1.0) if antialias else 1.0
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


def resize(x, size, kernel="bicubic", antialias=True):
    """Resample (..., H, W) to size (h, w), with half-pixel centers and a symmetric border, like MATLAB.

    kernel: bicubic (a = -0.5), lanczos (3 lobes), bilinear, or area (mean over the output pixel).
    antialias=False does not widen the kernel when downscaling, except for area. The result is not clamped.
    """
    rows_first = size[0] * x.shape[-1] <= size[1] * x.shape[-2]     # the stronger reduction first: less work
    for axis in (-2, -1) if rows_first else (-1, -2):
        if size[axis] != x.shape[axis]:
            x = x.transpose(axis, -2).contiguous()
            index, weight = resampling_weights(x.shape[-2], size[axis], kernel, antialias)
            index, weight = index.to(x.device), weight.to(x.device, x.dtype)[:, :, None]
            x = sum(x.index_select(-2, rows) * row_weights for rows, row_weights in zip(index, weight))
            x = x.transpose(axis, -2).contiguous()
    return x


# ---- filters of one picture x (3, H, W)

def to_8_bit(x):
    """Clamp x to [0, 1] and round it to the 256 levels of an 8-bit file."""
    return x.clamp(0, 1).mul(255).round().div(255)


def convolve(x, kernel):
    """Correlate x (C, H, W) with a kernel (k, k), k odd; the border is replicated."""
    r, (h, w) = len(kernel) // 2, x.shape[-2:]
    kernel = kernel.astype(np.float32)
    symmetric = np.array_equal(kernel, kernel[::-1]) and np.array_equal(kernel, kernel[:, ::-1])
    padded = np.pad(x.numpy(), ((0, 0), (r, r), (r, r)), "edge")
    total = np.zeros(x.shape, np.float32)
    taps = range(r + 1 if symmetric else 2 * r + 1)
    for i in taps:
        rows = padded[:, i:i + h]
        if symmetric and i < r:         # add pixels of equal weight before multiplying
            rows = rows + padded[:, 2 * r - i:2 * r - i + h]
        for j in taps:
            if abs(kernel[i, j]) < 1e-6:
                continue
            columns = rows[..., j:j + w]
            if symmetric and j < r:
                columns = columns + rows[..., 2 * r - j:2 * r - j + w]
            total += columns * kernel[i, j]
    return torch.from_numpy(total)


def blur_kernel(size, shape, sigma=(1.0, 1.0), angle=0.0, beta=1.0):
    """Return a blur kernel (size, size) with sum 1 (Liu et al. 2020); size is odd.

    d: squared distance from the center in units of sigma (pixels), along axes rotated by angle (radians).
    iso, aniso: exp(-d / 2). generalized: exp(-d^beta / 2). plateau: 1 / (1 + d^beta).
    """
    x, y = np.meshgrid(*[np.arange(size) - size // 2] * 2)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    d = ((along / sigma[0]) ** 2 + (across / sigma[1]) ** 2) ** beta
    kernel = 1 / (1 + d) if "plateau" in shape else np.exp(-0.5 * d)
    return kernel / kernel.sum()


def sinc_kernel(size, cutoff):
    """Return a circular low-pass filter (size, size), cutoff in radians per pixel, truncated, with sum 1."""
    distance = np.hypot(*np.meshgrid(*[np.arange(size) - size // 2] * 2))
    distance[size // 2, size // 2] = 1.0        # avoids 0 / 0
    bessel = torch.special.bessel_j1(torch.from_numpy(cutoff * distance)).numpy()
    kernel = cutoff * bessel / (2 * np.pi * distance)
    kernel[size // 2, size // 2] = cutoff ** 2 / (4 * np.pi)
    return kernel / kernel.sum()


def gaussian_blur(x, sigma):
    """Gaussian blur of (C, H, W), sigma in pixels; the border is replicated. Sigma 0 changes nothing."""
    r = math.ceil(4 * sigma)
    if r == 0:
        return x
    kernel = np.exp(-0.5 * (np.arange(-r, r + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32).tolist()
    for axis, padding in ((1, (0, 0, r, r)), (2, (r, r, 0, 0))):
        n, padded = x.shape[axis], F.pad(x, padding, mode="replicate")
        x = sum(padded.narrow(axis, k, n) * weight for k, weight in enumerate(kernel))
    return x


def unsharp(x, sigma, amount):
    """Unsharp mask: x + amount * (x - blurred x). A negative amount removes detail."""
    return x + amount * (x - gaussian_blur(x, sigma))


def noise(x, rng, kind, strength, gray):
    """Add noise to x (3, H, W). gray: the same noise in all channels.

    gaussian: strength is the standard deviation, 0 to 255. poisson: shot noise times strength. The number of
    photons at full brightness is the number of levels in x, rounded up to a power of two (Real-ESRGAN).
    """
    rng = np.random.default_rng(rng.integers(2**63))     # later draws must not depend on the size of x
    base = 0.299 * x[:1] + 0.587 * x[1:2] + 0.114 * x[2:] if gray else x
    base = to_8_bit(base).double().numpy()
    if kind == "gaussian":
        field = rng.standard_normal(base.shape, np.float32) * np.float32(strength / 255)
    else:
        photons = 2.0 ** np.ceil(np.log2(len(np.unique(base))))
        field = ((rng.poisson(base * photons) / photons - base) * strength).astype(np.float32)
    return x + torch.from_numpy(field)


def compress(x, codec, quality, chroma="4:2:0", offset=(0, 0)):
    """Encode and decode (3, H, W) with a codec: jpeg or webp.

    quality: 1 to 100. chroma: 4:2:0 or 4:4:4 (JPEG only). offset: (rows, columns) of mirrored pixels that are
    added before encoding and removed afterwards, to move the block grid of the codec.
    """
    dy, dx = offset
    pixels = to_8_bit(x).mul(255).byte().permute(1, 2, 0).numpy()
    pixels = np.pad(pixels, ((dy, 0), (dx, 0), (0, 0)), "symmetric")
    options = dict(subsampling=chroma) if codec == "jpeg" else {}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, codec, quality=quality, **options)
    with Image.open(file) as picture:
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels[dy:, dx:]).permute(2, 0, 1).float().div(255)


# ---- operations of recipes: (x (3, H, W), rng, sizes, **arguments of an entry) -> (3, h, w)
# sizes: {"hr": (H, W), "lr": (h, w)}. degrade_picture() clamps the results to [0, 1].

def pick(rng, probabilities):
    """Sample a name from {name: probability}."""
    point = rng.random() * sum(probabilities.values())
    for name, probability in probabilities.items():
        point -= probability
        if point < 0:
            return name
    return name     # after a rounding error


def random_rescale(x, rng, sizes, base, direction, factor, kernel, aliased):
    """Resize to sizes[base] times a random factor. aliased: probability of no antialiasing."""
    factors = dict(up=rng.uniform(1.0, factor[1]), down=rng.uniform(factor[0], 1.0), keep=1.0)
    chosen = factors[pick(rng, direction)]
    size = [max(1, int(n * chosen)) for n in sizes[base]]
    return resize(x, size, pick(rng, kernel), antialias=rng.random() >= aliased)


def random_kernel_blur(x, rng, sizes, size, sinc, cutoff, shape=None, sigma=None, beta=None):
    """Blur with blur_kernel(), or with the probability `sinc` with sinc_kernel()."""
    size = 2 * rng.integers(size[0] // 2, size[1] // 2 + 1) + 1         # odd
    if rng.random() < sinc:
        limits = cutoff[max(smallest for smallest in cutoff if smallest <= size)]
        return convolve(x, sinc_kernel(size, rng.uniform(*limits)))
    shape = pick(rng, shape)
    along = across = rng.uniform(*sigma)
    angle, exponent = 0.0, 1.0
    if "aniso" in shape:
        across, angle = rng.uniform(*sigma), rng.uniform(-math.pi, math.pi)
    if " " in shape:
        low, high = beta[shape.split()[0]]
        exponent = rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)
    return convolve(x, blur_kernel(size, shape, (along, across), angle, exponent))


def random_noise(x, rng, sizes, gaussian, poisson, gray):
    kind, limits = ("gaussian", gaussian) if rng.random() < 0.5 else ("poisson", poisson)
    return noise(x, rng, kind, rng.uniform(*limits), rng.random() < gray)


def random_grain(x, rng, sizes, amplitude, sigma, brush, brush_length):
    """Add paper or brush texture: blurred gray noise. amplitude: standard deviation, 0 to 255."""
    across, along, amplitude = rng.uniform(*sigma), rng.uniform(*brush_length), rng.uniform(*amplitude)
    if rng.random() >= brush:
        along = across
    size = 2 * math.ceil(3 * max(along, across)) + 1
    kernel = blur_kernel(size, "aniso", (along, across), rng.uniform(0, math.pi))
    field = np.random.default_rng(rng.integers(2**63)).standard_normal((1, *x.shape[1:]), np.float32)
    return x + convolve(torch.from_numpy(field), kernel * (amplitude / 255 / math.sqrt((kernel ** 2).sum())))


def random_compress(x, rng, sizes, codec, quality, chroma=CHROMA, offset=ANY_OFFSET):
    codec = pick(rng, codec)
    quality, chroma = int(rng.integers(*quality[codec], endpoint=True)), pick(rng, chroma)
    return compress(x, codec, quality, chroma, rng.integers(*offset, size=2, endpoint=True))


OPERATIONS = {
    "downscale": lambda x, rng, sizes, kernel: to_8_bit(resize(x, sizes["lr"], pick(rng, kernel))),
    "rescale": random_rescale,
    "blur": lambda x, rng, sizes, sigma: gaussian_blur(x, rng.uniform(*sigma)),
    "kernel_blur": random_kernel_blur,
    "noise": random_noise,
    "grain": random_grain,
    "compress": random_compress,
}


# ---- degrading a batch

def parse_recipe(text):
    """Convert 'web:3,bicubic' to probabilities {'web': 0.75, 'bicubic': 0.25}. The default weight is 1."""
    parts = [part.partition(":") for part in text.split(",")]
    try:
        weights = {name.strip(): float(number or 1) for name, _, number in parts}
    except ValueError as error:
        raise RecipeError(f"recipe '{text}': {error}") from None
    unknown = weights.keys() - RECIPES
    if unknown:
        raise RecipeError(f"no recipe '{', '.join(unknown)}'; choose from {', '.join(RECIPES)}")
    total = sum(weights.values())
    if min(weights.values()) < 0 or not 0 < total < math.inf:
        raise RecipeError(f"recipe '{text}': the numbers must be positive")
    return {name: weight / total for name, weight in weights.items()}


def degrade_picture(x, probabilities, scale, seed):
    """Degrade (3, H, W) by one recipe, sampled from {name: probability}. Returns (3, H/scale, W/scale)."""
    h, w = x.shape[-2:]
    sizes = dict(hr=(h, w), lr=(h // scale, w // scale))
    name = pick(np.random.default_rng((seed, 1)), probabilities)
    recipe, rng = RECIPES[name], np.random.default_rng(seed)
    if rng.random() < recipe.get("clean", 0):
        return to_8_bit(resize(x, sizes["lr"]))
    chain = list(recipe["chain"])
    if "last_early" in recipe and rng.random() < recipe["last_early"]:
        chain.insert(-2, chain.pop())
    for entry in chain:
        if "p" not in entry or rng.random() < entry["p"]:
            arguments = {key: value for key, value in entry.items() if key not in ("op", "p")}
            x = OPERATIONS[entry["op"]](x, rng, sizes, **arguments).clamp(0, 1)
    if x.shape[-2:] != sizes["lr"]:
        raise ValueError(f"recipe '{name}' does not end at the LR size; add an entry with op='downscale'")
    return to_8_bit(x)


@torch.no_grad()
def degrade(hr, recipe, scale, seeds):
    """Make LR pictures (B, 3, H/scale, W/scale) float32 in [0, 1], rounded to 8-bit levels.

    hr: (B, 3, H, W) float in [0, 1] on the CPU; H and W are multiples of the integer scale. recipe: a name of
    RECIPES or a mix such as "web:0.7,bicubic:0.3"; one recipe is sampled for each picture. seeds: B integers.
    Raises RecipeError for an unknown recipe.
    """
    if hr.ndim != 4 or hr.shape[1] != 3 or any(n % scale for n in hr.shape[-2:]):
        raise ValueError(f"hr must be (B, 3, H, W), H and W multiples of {scale}, not {tuple(hr.shape)}")
    probabilities = parse_recipe(recipe)
    return torch.stack([degrade_picture(x, probabilities, scale, int(seed) % 2**64)
                        for x, seed in zip(hr.detach().float(), seeds, strict=True)])


def picture_seed(name, seed=0):
    """Return a seed that depends only on the relative name of the picture and on `seed`."""
    data = f"{seed}:{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


# ---- artifacts of a given strength, to train a detector

def add_blocking(x, rng, jpeg_quality, webp_quality, webp_probability, chroma_420_probability):
    """Compress with a random offset of the block grid. WebP always uses 4:2:0."""
    is_webp = rng.random() < webp_probability
    codec, quality = ("webp", webp_quality) if is_webp else ("jpeg", jpeg_quality)
    chroma = "4:2:0" if rng.random() < chroma_420_probability else "4:4:4"
    return compress(x, codec, round(quality), chroma, rng.integers(16, size=2))


def add_ringing(x, rng, cutoff, amount):
    """Blend x with a low-pass filtered copy. The filter is circular, or separable with a Lanczos window."""
    if rng.random() < 0.5:
        kernel = sinc_kernel(21, cutoff)
    else:
        t = np.arange(-10, 11)
        row = np.sinc(t * cutoff / np.pi) * np.sinc(t / 11)
        kernel = np.outer(row, row) / row.sum() ** 2
    return x + amount * (convolve(x, kernel) - x)


def add_banding(x, rng, levels):
    """Quantize each channel to `levels` levels with a random phase, in smooth areas only."""
    base, phase = gaussian_blur(x, 1.0), torch.from_numpy(rng.random((3, 1, 1), np.float32))
    detail = gaussian_blur((x - base).abs().mean(0, keepdim=True), 1.5)
    smooth = (1.5 - detail / 0.008).clamp(0, 1)
    return x + smooth * (((base * levels + phase).round() - phase) / levels - x)


def shift_picture(x, dy, dx):
    """Shift (C, H, W) by a fractional number of pixels, bilinear; the border is replicated."""
    r, (h, w) = math.ceil(max(abs(dy), abs(dx))) + 1, x.shape[-2:]
    p = F.pad(x, (r, r, r, r), mode="replicate")
    i, j = math.floor(dy), math.floor(dx)
    p = p[:, r + i:r + i + h] * (1 - dy + i) + p[:, r + i + 1:r + i + 1 + h] * (dy - i)
    return p[..., r + j:r + j + w] * (1 - dx + j) + p[..., r + j + 1:r + j + 1 + w] * (dx - j)


def add_seam(x, rng, color, sigma, shift):
    """Change the color, sharpness, or position of one or two tiles, as tiles without overlap do."""
    vertical = rng.random() < 0.5
    x = x.transpose(1, 2).contiguous() if vertical else x
    n = x.shape[1]
    borders = sorted(int(rng.integers(8, n - 7)) for _ in range(1 + (n >= 96 and rng.random() < 0.3)))
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
            # one sign for all channels: the tile becomes lighter or darker
            change = np.sign(rng.uniform(-1, 1)) * rng.uniform(0.6, 1.0, (3, 1, 1))
            tile = tile + torch.from_numpy((change * color * size / 255).astype(np.float32))
        out[:, top:bottom] = tile[:, top:bottom]
    return out.transpose(1, 2) if vertical else out


ARTIFACTS = {
    # name: (function, {argument: its values at strength 0 (hardly visible), 0.5 (clear), and 1 (extreme)})
    "blocking": (add_blocking, dict(jpeg_quality=(98, 30, 5), webp_quality=(98, 15, 0),
                                    webp_probability=(0, 0.3, 0.3), chroma_420_probability=(0, 0.7, 0.7))),
    "ringing": (add_ringing, dict(cutoff=(3.0, 1.9, 1.0), amount=(0.15, 1, 1))),    # radians per pixel
    "banding": (add_banding, dict(levels=(128, 22, 7))),
    "blur": (lambda x, rng, sigma: gaussian_blur(x, sigma), dict(sigma=(0.2, 1.2, 3.5))),
    "oversharp": (lambda x, rng, amount: unsharp(x, rng.uniform(0.8, 1.6), amount),
                  dict(amount=(0.1, 1.2, 6.0))),
    "noise": (lambda x, rng, sigma: noise(x, rng, "gaussian", sigma, rng.random() < 0.5),
              dict(sigma=(1, 12, 45))),         # 0 to 255
    "seam": (add_seam, dict(color=(0.5, 5, 20), sigma=(0.1, 0.7, 2.0), shift=(0.05, 1.0, 3.5))),
}


@torch.no_grad()
def artifact(hr, kind, strength, seeds):
    """Add one artifact to each picture of a batch (B, 3, H, W), rounded to 8-bit levels.

    hr: float in [0, 1] on the CPU, H and W at least 32. kind: a name of ARTIFACTS, or one per picture.
    strength: 0 (hardly visible) to 1 (extreme), or one per picture. seeds: B integers.
    """
    kinds = [kind] * len(hr) if isinstance(kind, str) else kind
    strengths = np.broadcast_to(np.asarray(strength, float), len(hr))
    out = torch.empty(hr.shape)
    for i, (name, s, seed) in enumerate(zip(kinds, strengths, seeds, strict=True)):
        function, values = ARTIFACTS[name]
        arguments = {key: float(np.interp(s, (0, 0.5, 1), points)) for key, points in values.items()}
        out[i] = function(hr[i].detach().float(), np.random.default_rng(int(seed) % 2**64), **arguments)
    return to_8_bit(out)


# ---- the command

def draw_sheet(hr, scale, seed, columns=4):
    """Return a Pillow image: the center of hr (3, H, W) and its LR picture of every recipe, in a grid."""
    side = min(*hr.shape[-2:], 256) // scale * scale
    top, left = ((n - side) // 2 for n in hr.shape[-2:])
    crop, names = hr[:, top:top + side, left:left + side], ["HR", *RECIPES]
    page = Image.new("RGB", (columns * side, math.ceil(len(names) / columns) * (side + 24)), "white")
    for i, name in enumerate(names):
        x = crop if name == "HR" else degrade(crop[None], name, scale, [seed])[0]
        pixels = to_8_bit(x).mul(255).byte().permute(1, 2, 0).numpy()
        x, y = i % columns * side, i // columns * (side + 24)
        page.paste(Image.fromarray(pixels).resize((side, side), Image.NEAREST), (x, y + 24))
        ImageDraw.Draw(page).text((x + 4, y + 2), name, "black", font_size=16)
    return page


def write_folder(args):
    """Write the LR picture of each HR picture. Print the names of bad pictures and skip them."""
    import images
    root = args.hr if args.hr.is_dir() else args.hr.parent
    paths, progress, written = images.find_pictures([args.hr]), images.ProgressLine(), set()
    for path in paths:
        name = path.relative_to(root)
        lr_path = (args.lr / name).with_suffix(".png")
        try:
            if lr_path in written:
                raise images.PictureError(f"{path}: {lr_path} is already the result of another picture")
            picture = images.read_picture(path)
        except images.PictureError as error:
            progress.clear()
            print(f"skipped: {error}", file=sys.stderr)
            continue
        if lr_path.exists() and not args.overwrite:
            raise images.UserError(f"{lr_path} exists; choose another folder or give --overwrite")
        hr = images.composite(picture, 1.0)
        h, w = (n // args.scale * args.scale for n in hr.shape[-2:])
        lr = degrade(hr[None, :, :h, :w], args.recipe, args.scale, [picture_seed(name.as_posix(), args.seed)])
        images.save_picture(lr_path, images.Picture(rgb=lr[0], icc=picture.icc, color=picture.color))
        written.add(lr_path)
        progress(f"{len(written)} of {len(paths)} pictures")
    progress.clear()
    print(f"{len(written)} pictures in {images.printable(args.lr)}, {len(paths) - len(written)} skipped")


def main():
    import images
    parser = argparse.ArgumentParser(
        description="Write the LR picture of each HR picture of a folder as PNG. A picture is cropped to a "
                    "multiple of --scale first. Transparent areas become white.",
        epilog=f"recipes: {', '.join(RECIPES)}, or a mix such as soft:0.5,light:0.3,bicubic:0.2")
    parser.add_argument("hr", type=Path, help="folder of HR pictures, with subfolders, or one picture")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("lr", type=Path, nargs="?", help="folder to write the LR pictures to")
    output.add_argument("--sheet", type=Path, metavar="FILE", help="draw one picture through every recipe")
    parser.add_argument("--recipe", default="web", help="a recipe or a mix (default: web)")
    parser.add_argument("--scale", type=int, default=2, help="scale factor, a whole number (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    try:
        if not args.sheet:
            return write_folder(args)
        if args.sheet.exists() and not args.overwrite:
            raise images.UserError(f"{args.sheet} exists; choose another name or give --overwrite")
        hr = images.composite(images.read_picture(args.hr), 1.0)
        with images.atomic_path(args.sheet) as part:
            draw_sheet(hr, args.scale, args.seed).save(part, "PNG")
    except (RecipeError, images.UserError, OSError) as error:
        images.fail(images.printable(error))


if __name__ == "__main__":
    main()
