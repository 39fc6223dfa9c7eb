"""degrade.py: how a clean picture becomes a bad one.

A recipe is a name, a table of its parameters and a function. Every picture of a batch gets its own random draws from
its own seed, so what happens to a picture depends on nothing but the picture, the recipe, the scale and that seed:
not on its neighbours in the batch, nor on how many worker processes there are. To the bit: arithmetic on pixels is
element by element, never a matrix product or a library convolution, whose order of summing changes with the shape.

    python degrade.py HR_FOLDER LR_FOLDER --recipe web --scale 2

Needs torch, numpy, Pillow. Copied alone it works; only the command above reads pictures through tile.py.
"""
import argparse
import functools
import hashlib
import io
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# ---------------------------------------------------------------------------------------------------------------------
# The tables. `p` is the chance that an operation happens at all, a pair is a range drawn from evenly, a dictionary of
# names holds chances. `clean` is the share of pictures that get the plain bicubic downscale and nothing more.
# ---------------------------------------------------------------------------------------------------------------------

WEB = dict(     # what a picture goes through on its way to a gallery site: reduced, a little soft, compressed once
    clean=0.1,
    downscale=dict(bicubic=0.7, lanczos=0.1, bilinear=0.1, area=0.1),
    blur=dict(p=0.9, sigma=(0.2, 0.8)),                         # Gaussian, in LR pixels
    compress=dict(p=0.95,
                  codec=dict(jpeg=0.85, webp=0.15),
                  quality=dict(jpeg=(85, 95), webp=(80, 95)),   # whole numbers, both ends included
                  chroma={"4:2:0": 0.8, "4:4:4": 0.2},          # JPEG only: lossy WebP is always 4:2:0
                  offset=(0, 15)),                              # where the codec's 8 and 16 pixel grid begins
)

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
def _taps(n, out, kernel):
    """Which input pixels make each output pixel of one axis, and with what weight: two (taps, out) tensors."""
    function, radius = KERNELS[kernel]
    step = n / out                                              # input pixels per output pixel
    widen = step if kernel == "area" else max(step, 1.0)        # antialiasing: the kernel grows with the reduction
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


def _resize_rows(x, out, kernel):
    """(..., H, W) -> (..., out, W)"""
    index, weight = _taps(x.shape[-2], out, kernel)
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


def resize(x, size, kernel="bicubic"):
    """Antialiased resampling up or down, after MATLAB's imresize: half-pixel centres, symmetric border.

    x: (..., H, W) float of any range; size: (h, w) of the result, each 1 or more; kernel: bicubic (a = -0.5),
    lanczos (a = 3), bilinear, or area (the exact mean over each output pixel's footprint). Differentiable. The result
    is not clamped: bicubic and lanczos overshoot. Raises ValueError.
    """
    if kernel not in KERNELS:
        raise ValueError(f"no kernel '{kernel}'; there are {', '.join(KERNELS)}")
    if x.ndim < 2 or min(x.shape[-2:]) < 1 or len(size) != 2 or min(size) < 1:
        raise ValueError(f"cannot resize {tuple(x.shape)} to {tuple(size)}; both need at least 1 pixel a side")
    h, w = int(size[0]), int(size[1])
    rows_first = h * x.shape[-1] <= w * x.shape[-2]             # the stronger reduction first: less work afterwards
    if rows_first and h != x.shape[-2]:
        x = _resize_rows(x, h, kernel)
    if w != x.shape[-1]:
        x = _resize_rows(x.transpose(-1, -2).contiguous(), w, kernel).transpose(-1, -2).contiguous()
    if not rows_first and h != x.shape[-2]:
        x = _resize_rows(x, h, kernel)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Operations: a batch, and one parameter per picture
# ---------------------------------------------------------------------------------------------------------------------


def to_8_bit(x):
    """(...) in [0, 1] -> the same, clamped and rounded to the 256 levels that a file can hold."""
    return x.clamp(0, 1).mul(255).round().div(255)


def downscale(x, scale, kernels):
    """x (B, 3, H, W), a kernel name per picture -> (B, 3, H/scale, W/scale), clamped to [0, 1]."""
    h, w = x.shape[-2] // scale, x.shape[-1] // scale
    out = x.new_empty(*x.shape[:-2], h, w)
    for kernel in sorted(set(kernels)):
        chosen = [i for i, k in enumerate(kernels) if k == kernel]
        out[chosen] = resize(x[chosen], (h, w), kernel)
    return out.clamp_(0, 1)


def gaussian_blur(x, sigmas):
    """x (B, 3, H, W), a sigma in pixels per picture (0: untouched) -> the same shape; the border is repeated."""
    radii = [math.ceil(4 * s) for s in sigmas]
    r = max(radii, default=0)
    if r == 0:
        return x
    t = np.arange(-r, r + 1)
    kernel = np.stack([np.exp(-0.5 * (t / s) ** 2) * (abs(t) <= n) if s > 0 else 1.0 * (t == 0)
                       for s, n in zip(sigmas, radii)])
    kernel = torch.from_numpy((kernel / kernel.sum(1, keepdims=True)).astype(np.float32)).to(x.device)
    h, w = x.shape[-2:]
    padded = F.pad(x, (0, 0, r, r), mode="replicate")
    x = sum(padded[..., k:k + h, :] * kernel[:, k, None, None, None] for k in range(2 * r + 1))
    padded = F.pad(x, (r, r, 0, 0), mode="replicate")
    return sum(padded[..., k:k + w] * kernel[:, k, None, None, None] for k in range(2 * r + 1))


def compress(x, codec, quality, chroma="4:2:0", offset=(0, 0)):
    """One picture (3, H, W) in [0, 1] through a real codec and back, by way of 8 bits.

    codec: jpeg or webp; quality: 1 to 100; chroma: 4:2:0 or 4:4:4 (jpeg); offset: rows and columns of mirrored picture
    set before the first, so that the codec's blocks begin elsewhere, as they do in a crop. Cut off again.
    """
    dy, dx = offset
    pixels = np.pad(to_8_bit(x).mul(255).byte().permute(1, 2, 0).numpy(), ((dy, 0), (dx, 0), (0, 0)), "symmetric")
    if codec == "webp" and max(pixels.shape) > 16383:           # more than WebP can hold
        codec = "jpeg"
    file = io.BytesIO()
    if codec == "jpeg":
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=chroma)
    elif codec == "webp":
        Image.fromarray(pixels).save(file, "WEBP", quality=quality)
    else:
        raise ValueError(f"no codec '{codec}'; there are jpeg, webp")
    with Image.open(file) as picture:
        pixels = np.array(picture.convert("RGB"))[dy:, dx:]
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: (hr (B, 3, H, W), scale, one random generator per picture) -> lr (B, 3, H/scale, W/scale)
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


def bicubic(hr, scale, rngs):
    """Antialiased bicubic, nothing else."""
    return downscale(hr, scale, ["bicubic"] * len(hr))


def draw_web(rng):
    """What one picture goes through, drawn from WEB: kernel, sigma (0: no blur), compress (None, or its arguments)."""
    if rng.random() < WEB["clean"]:
        return dict(kernel="bicubic", sigma=0.0, compress=None)
    kernel = pick(rng, WEB["downscale"])
    sigma = rng.uniform(*WEB["blur"]["sigma"]) if rng.random() < WEB["blur"]["p"] else 0.0
    table, code = WEB["compress"], None
    if rng.random() < table["p"]:
        codec = pick(rng, table["codec"])
        low, high = table["quality"][codec]
        code = dict(codec=codec, quality=int(rng.integers(low, high + 1)), chroma=pick(rng, table["chroma"]),
                    offset=tuple(int(o) for o in rng.integers(table["offset"][0], table["offset"][1] + 1, 2)))
        if codec == "webp":
            code["chroma"] = "4:2:0"
    return dict(kernel=kernel, sigma=sigma, compress=code)


def web(hr, scale, rngs):
    """Downscale, light Gaussian blur, JPEG or WebP: see WEB."""
    drawn = [draw_web(rng) for rng in rngs]
    lr = downscale(hr, scale, [d["kernel"] for d in drawn])
    lr = gaussian_blur(to_8_bit(lr), [d["sigma"] for d in drawn])
    return torch.stack([compress(x, **d["compress"]) if d["compress"] else x for x, d in zip(lr, drawn)])


RECIPES = dict(bicubic=bicubic, web=web)


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
    mix = shares(recipe)
    seeds = [int(s) % 2 ** 64 for s in seeds]
    names = [pick(np.random.default_rng((s, 1)), mix) if len(mix) > 1 else next(iter(mix)) for s in seeds]
    lr = hr.new_empty(len(hr), 3, h // scale, w // scale, dtype=torch.float32)
    for name in sorted(set(names)):
        chosen = [i for i, n in enumerate(names) if n == name]
        part = hr if len(chosen) == len(hr) else hr[chosen]
        lr[chosen] = RECIPES[name](part.float(), scale, [np.random.default_rng(seeds[i]) for i in chosen])
    return to_8_bit(lr)


def picture_seed(name, seed=0):
    """A seed for a picture from its relative name, so that adding a picture to a folder changes no other."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()[:8], "big")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def plan(pictures, source, target):
    """[(relative name, path, path of the LR picture)]; raises ValueError where two would land on one name."""
    jobs, taken = [], {}
    for path in pictures:
        name = Path(path).relative_to(source)
        lr_path = target / (name if name.suffix.lower() == ".png" else name.with_suffix(".png"))
        if lr_path in taken:
            raise ValueError(f"{taken[lr_path]} and {name} would both become {lr_path.name}; rename one of them")
        taken[lr_path] = name
        jobs.append((name.as_posix(), Path(path), lr_path))
    return jobs


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(
        description="Write the LR picture of every HR picture in a folder, under the same relative names, as PNG.",
        epilog="recipes: " + ", ".join(RECIPES) + ", or a mix such as web:0.7,bicubic:0.3\n\n"
               "An HR picture whose sides are not multiples of --scale loses up to scale - 1 pixels on the right and\n"
               "at the bottom before it is degraded; the file itself is not touched. Transparent parts become white.\n"
               "The draws depend on --seed and a picture's relative name only.\n\n"
               "example: python degrade.py wallpapers/ wallpapers_lr/ --recipe web --scale 2",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hr_folder", type=Path, help="clean pictures, read through all sub-folders")
    parser.add_argument("lr_folder", type=Path, help="where the LR pictures go")
    parser.add_argument("--recipe", default="web", help="what happens to them (default: web)")
    parser.add_argument("--scale", type=int, default=2, help="how many times smaller, a whole number (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="another number, other draws (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace LR pictures that are already there")
    try:
        run(parser.parse_args())
    except KeyboardInterrupt:
        print("\nstopped; what was written stays", file=sys.stderr)
        sys.exit(130)


def run(args):
    """The command, its arguments parsed; ends the process with 2 where one line says why."""
    import tile     # opening and saving pictures is its job

    source, target = args.hr_folder, args.lr_folder
    try:
        shares(args.recipe)
        if args.scale < 1:
            raise ValueError(f"--scale must be 1 or more, not {args.scale}")
        if not source.is_dir():
            raise ValueError(f"{source} is not a folder; give the folder of the HR pictures")
        if target.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{target} lies inside {source}; choose a folder beside it")
        jobs = plan(tile.find_pictures([source]), source, target)
        if not jobs:
            raise ValueError(f"no picture in {source}; give a folder with some")
        there = [] if args.overwrite else [lr_path for *_, lr_path in jobs if lr_path.exists()]
        if there:
            raise ValueError(f"{there[0]} exists already ({len(there)} of {len(jobs)} do); choose another folder or "
                             "give --overwrite")
    except ValueError as e:
        fail(tile.printable(e))

    terminal, start, shown, done, cropped, bad = sys.stderr.isatty(), time.time(), time.time(), 0, 0, 0
    for count, (name, path, lr_path) in enumerate(jobs, 1):
        try:
            picture = tile.read_picture(path)
            hr = tile.composite(picture, (1.0, 1.0, 1.0))
            h, w = (side - side % args.scale for side in hr.shape[-2:])
            cropped += (h, w) != tuple(hr.shape[-2:])
            lr = degrade(hr[None, :, :h, :w], args.recipe, args.scale, [picture_seed(name, args.seed)])[0]
        except (ValueError, OSError) as e:      # a PictureError is a ValueError and names its file
            reason = e if isinstance(e, tile.PictureError) else f"{tile.printable(name)}: {e}"
            print(("\r\033[K" if terminal else "") + f"skipped: {reason}", file=sys.stderr)
            bad += 1
            continue
        try:
            lr_path.parent.mkdir(parents=True, exist_ok=True)
            tile.save_picture(lr_path, tile.Picture(rgb=lr, alpha=None, grey=False, depth=8,
                                                    icc=None if picture.grey else picture.icc, exif=None))
        except (OSError, ValueError) as e:
            fail(f"cannot write {tile.printable(lr_path)}: {getattr(e, 'strerror', None) or e}; free some room "
                 f"or choose another folder ({done} of {len(jobs)} are done)")
        done += 1
        if terminal or time.time() - shown > 10:
            shown, rate = time.time(), count / (time.time() - start)
            line = f"{count}/{len(jobs)}  {rate:.1f} pictures/s  {(len(jobs) - count) / rate:.0f} s left"
            print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr)
    if not done:
        fail(f"none of the {len(jobs)} pictures in {source} could be used; the reasons stand above")
    print(f"{done} pictures by recipe {args.recipe}, {args.scale}x smaller, in {target}"
          + (f"; {cropped} cropped to a multiple of {args.scale} first" if cropped else "")
          + (f"; {bad} skipped" if bad else ""))


if __name__ == "__main__":
    main()
