"""Choose which pictures and patches are worth training on.

    python clean.py clean downloads -o cleaned                  # cleaned/pictures, cleaned/report.csv
    python clean.py multiscale cleaned/pictures -o smaller      # smaller copies
    python clean.py mine patches.safetensors -o mined.safetensors       # the most detailed patches of a file

No command changes its input folders.
Needs torch, numpy, Pillow, and data.py and its imports in the same folder.
"""
import argparse
import csv
import functools
import hashlib
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

import data
import images

# Thresholds of `clean`; docs/data.md shows what they drop.
MIN_SHARPNESS = -18.0   # dB; below it the picture is upscaled or blurred
MAX_BLOCKS = 1.0        # dB; strength of an 8-pixel grid
MIN_QUALITY = 88        # of a JPEG file, from its quantization table
# Two pictures are copies if both values are larger; see thumbnails() and similarity().
MIN_LAYOUT, MIN_SIMILARITY = 0.85, 0.55
MAX_TEXT = 0.005        # share of the area; see text_share()
MIN_POWER = 0.64        # mean square of thumbnail pixels; a square with less has no texture

# Settings of `mine`.
MIN_DETAIL = 0.02       # patches with less detail are a single color and useless for training
MAX_PER_PICTURE = 32    # patches of one picture
LOW_DETAIL_SHARE = 0.1  # share of patches with little detail; select_patches() chooses them at random


# ------------------------------------------------------------------ measurements of one picture

def jpeg_quality(path):
    """Estimate the quality of a JPEG file, 1 to 100, from its quantization table. None for other formats."""
    try:
        with Image.open(path, formats=["JPEG"]) as im:
            tables = im.quantization
    except OSError:
        return None
    # libjpeg scales the luma table of ITU-T T.81, annex K. The 64 numbers of that table add up to 3688.
    percent = 100 * sum(tables[min(tables)]) / 3688
    return round(100 - percent / 2 if percent <= 100 else 5000 / percent)


def detailed_squares(pixels, count=24, side=128):
    """Return the luma of the squares with most detail: uint8 (H, W, 3) -> float32 (n, side, side).

    The squares lie on a grid. Squares with almost no detail are left out, so n is between 0 and `count`.
    """
    h, w = pixels.shape[:2]
    corners = [(y, x) for y in range(0, h - side + 1, side) for x in range(0, w - side + 1, side)]
    ranked = sorted((-data.detail(pixels[y:y + side, x:x + side, 1:2]), y, x) for y, x in corners)[:count]
    squares = [pixels[y:y + side, x:x + side] for negative_detail, y, x in ranked if negative_detail < -0.5]
    squares = np.array(squares, np.float32).reshape(-1, side, side, 3)
    return squares @ np.array([0.299, 0.587, 0.114], np.float32)


def sharpness(squares):
    """Return the power at 0.3 to 0.5 cycles per pixel relative to 0.1 to 0.2, in dB.

    squares: luma (n, side, side). Drawings at their true resolution have -7 to -16 dB, pictures upscaled by 2
    have -20 to -30 dB. The result is the upper quartile, because most areas of a painting are soft.
    """
    side = squares.shape[1]
    window = np.hanning(side + 1)[:side].astype(np.float32)
    squares = (squares - squares.mean((1, 2), keepdims=True)) * window * window[:, None]
    power = np.abs(np.fft.fft2(squares)) ** 2
    spectrum = (power.sum(1) + power.sum(2))[:, :side // 2]
    f = np.arange(side // 2) / side
    high, low = spectrum[:, f >= 0.3].mean(1), spectrum[:, (f >= 0.1) & (f < 0.2)].mean(1)
    return float(np.quantile(10 * np.log10((high + 1e-6) / (low + 1e-6)), 0.75))


def blockiness(squares, jpeg=False):
    """Return the strength of an 8-pixel JPEG grid in dB.

    squares: luma (n, side, side), side a multiple of 8. JPEG removes the highest frequencies of each block.
    So the three highest frequencies of an 8-sample DCT are weak where the 8 samples coincide with a block.
    The result is the weakest of the 8 offsets relative to their median: about 0 without JPEG, 0.5 for quality
    95, 6 for 30. jpeg: True if the file is a JPEG; then offset 0 counts half.
    """
    waves = np.cos(np.pi * np.outer(np.arange(5, 8), 2 * np.arange(8) + 1) / 16) / 2
    length, results = squares.shape[1] - 8, []
    for lines in (squares, squares.transpose(0, 2, 1)):
        products = [sum(float(w) * lines[..., i:i + length] for i, w in enumerate(wave)) for wave in waves]
        strength = np.minimum(sum(np.abs(product) for product in products), 20)     # limit hard edges
        offsets = strength.sum((0, 1)).reshape(-1, 8).sum(0)
        weakness = 10 * np.log10((np.median(offsets) + 1e-3) / (offsets + 1e-3))
        weakness[0] /= 1 + jpeg
        results.append(weakness.max())
    return float(np.mean(results))


def thumbnails(pixels):
    """Return two thumbnails of uint8 (H, W, 3): layout, float32 (65,), and texture, int8 (128, 128).

    layout: gray 8x8 minus its mean, then a constant 1, as a unit vector. With the constant, all single-color
    pictures are alike. texture: gray 128x128 minus its blurred copy, times 8.
    """
    small = Image.fromarray(pixels).convert("L").convert("F").resize((128, 128), Image.Resampling.BOX)
    small = np.asarray(small)
    layout = small.reshape(8, 16, 8, 16).mean((1, 3)).ravel()
    layout = np.append(layout - layout.mean(), 1).astype(np.float32)
    blurred = np.lib.stride_tricks.sliding_window_view(np.pad(small, 2, "reflect"), (5, 5)).mean((2, 3))
    texture = (8 * (small - blurred)).round().clip(-127, 127).astype(np.int8)
    return layout / np.linalg.norm(layout), texture


def similarity(texture, other):
    """Return the correlation of two textures: 1 for the same picture, near 0 for different pictures.

    Compute the correlation of 64 squares. Try shifts of up to 2 pixels for each, because a copy may be
    cropped. The result is the lower of two values: the 25% quantile of all squares with texture, and the 10%
    quantile of those with strong texture. Pictures without texture: 1.
    """
    def squares(x):
        return x.astype(np.float32).reshape(8, 16, 8, 16).swapaxes(1, 2).reshape(64, 256)
    a, best = squares(texture), np.full(64, -1.0)
    power = np.square(a).mean(1)
    for dy, dx in np.ndindex(5, 5):
        b = squares(np.roll(other, (dy - 2, dx - 2), (0, 1)))
        scale = np.sqrt(power * np.square(b).mean(1)) + MIN_POWER
        best = np.maximum(best, (a * b).mean(1) / scale)
    power = np.maximum(power, np.square(squares(other)).mean(1))
    if power.max() <= MIN_POWER:
        return 1.0
    strong = power > 0.05 * power.max()
    return float(min(np.quantile(best[power > MIN_POWER], 0.25), np.quantile(best[strong], 0.1)))


def connected_components(mask):
    """Return the 8-connected components of a mask (H, W): int (5, n), top, bottom, left, right, area."""
    y, x = np.nonzero(mask)
    number = np.full((mask.shape[0] + 1, mask.shape[1] + 2), -1)        # of each pixel; -1 outside the mask
    number[y, x + 1] = np.arange(len(y))
    neighbors = np.stack([number[y, x], number[y + 1, x], number[y + 1, x + 1], number[y + 1, x + 2]])
    a, b = np.nonzero(neighbors >= 0)[1], neighbors[neighbors >= 0]     # pairs of pixels that touch
    label, before = np.arange(len(y)), None
    while not np.array_equal(label, before):
        before, lowest = label.copy(), np.minimum(label[a], label[b])
        np.minimum.at(label, before[a], lowest)
        np.minimum.at(label, before[b], lowest)
        label = label[label]
    first, label, area = np.unique(label, return_inverse=True, return_counts=True)
    bottom, left, right = np.zeros_like(first), np.full_like(first, mask.shape[1]), np.zeros_like(first)
    np.maximum.at(bottom, label, y + 1)
    np.minimum.at(left, label, x)
    np.maximum.at(right, label, x + 1)
    return np.stack([y[first], bottom, left, right, area])


def find_letters(components):
    """Return the bounding boxes (n, 4) of the components that are letters of a horizontal line.

    A letter has thin strokes and at least 5 mates: other letters of its line with similar height. The widths
    of the mates differ, and they fill most of the line. This excludes foliage and hatching.
    """
    heights = components[1] - components[0]
    components = components[:, (heights >= 3) & (heights <= 120)].astype(np.float32)
    top, bottom, left, right, area = components
    height, width = bottom - top, right - left
    thin = area / height <= 0.75 * height + 1
    letter = (height >= 6) & (height <= 90) & (width <= 2.5 * height) & thin
    letters = np.flatnonzero(letter)[:2500]
    t, b, l, r, h = (v[letters][:, None] for v in (top, bottom, left, right, height))
    gap = np.maximum(l, left) - np.minimum(r, right)
    overlap = np.minimum(b + h / 4, bottom) - np.maximum(t - h / 4, top)
    in_band = (gap <= 6 * h) & (overlap >= 2)
    aligned = np.minimum(np.abs(b - bottom), np.abs(t - top)) <= 0.1 * h + 0.5
    mates = in_band & aligned & letter & (height >= 0.6 * h) & (0.6 * height <= h)    # and the letter itself
    count = np.maximum(mates.sum(1), 1)
    purity = (mates * height).sum(1) / np.maximum((in_band * height).sum(1), 1)
    mean = mates @ width / count
    variety = np.sqrt(np.maximum(mates @ width**2 / count - mean**2, 0)) / np.maximum(mean, 1)
    fill = area / (height * width)
    mean = mates @ fill / count
    fill_variety = np.sqrt(np.maximum(mates @ fill**2 / count - mean**2, 0))
    adjacent = (mates & (gap <= h)).sum(1)
    found = (count > 5) & (purity >= 0.6) & (variety >= 0.12) & (fill_variety >= 0.06) & (adjacent > 1)
    return components[:4, letters[found]].astype(int).T


def text_share(pixels):
    """Return the share of the area of uint8 (H, W, 3) that is covered by letters in rows or columns."""
    gray = Image.fromarray(pixels).convert("L")
    gray.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
    contrast = np.asarray(gray, np.float32) - np.asarray(gray.filter(ImageFilter.BoxBlur(16)), np.float32)
    covered = np.zeros(contrast.shape, bool)
    for mask in (contrast > 32, contrast < -32):
        components = connected_components(mask)
        for upright, area in ((components, covered), (components[[2, 3, 0, 1, 4]], covered.T)):
            for top, bottom, left, right in find_letters(upright):
                margin = (bottom - top) // 3        # the space between letters
                area[top:bottom, max(0, left - margin):right + margin] = True
    return float(covered.mean())


@dataclass
class Measured:
    """Measurements of one picture file. A picture that cannot be read has only the first three fields.

    problem: why it cannot be read, or "". quality: of a JPEG file, or None. content: a hash of the sRGB
    pixels and the color description. layout, texture: see thumbnails(). sharpness, blocks: in dB, 0 without
    detailed squares. text: see text_share().
    """
    path: Path
    name: str
    problem: str = ""
    quality: int | None = None
    width: int = 0
    height: int = 0
    content: str = ""
    layout: np.ndarray | None = None
    texture: np.ndarray | None = None
    sharpness: float = 0.0
    blocks: float = 0.0
    text: float = 0.0


def stack_planes(picture):
    """Return color and alpha of a Picture as uint8 (H, W, 3 or 4)."""
    planes = picture.rgb if picture.alpha is None else torch.cat([picture.rgb, picture.alpha])
    return np.ascontiguousarray(images.to_uint8(planes))


def examine(job):
    """Measure one picture. job: (path, name). Returns (Measured, note)."""
    path, name = job
    try:
        picture = images.read_picture(path, srgb=True)
    except images.PictureError as error:
        problem = str(error).removeprefix(f"{images.printable(path)}: ")
        return Measured(path, name, problem), f"{name}: {problem}"
    quality, pixels = jpeg_quality(path), stack_planes(picture)
    height, width = pixels.shape[:2]
    content = hashlib.blake2b(b"".join([pixels, *picture.color.values()]), key=str(pixels.shape).encode(),
                              digest_size=8).hexdigest()
    pixels = np.ascontiguousarray(images.to_uint8(images.composite(picture, 0.5)))
    squares = detailed_squares(pixels)
    row = Measured(path, name, "", quality, width, height, content, *thumbnails(pixels))
    row.text = text_share(pixels)
    if len(squares):
        row.sharpness, row.blocks = sharpness(squares), blockiness(squares, jpeg=quality is not None)
    return row, picture.note and f"{name}: {picture.note}"


# ------------------------------------------------------------------ clean

def defect(row, min_side, keep_text):
    """Return (verdict, reason) if the picture itself is unsuitable, else None. row: a Measured."""
    if row.problem:
        return "broken", row.problem
    if min(row.width, row.height) < min_side:
        return "small", f"{row.width}x{row.height}, a side is below {min_side}"
    if row.quality is not None and row.quality < MIN_QUALITY:
        return "jpeg", f"JPEG of quality {row.quality}, below {MIN_QUALITY}"
    if row.blocks > MAX_BLOCKS:
        return "jpeg", f"traces of JPEG blocks: {row.blocks:.1f} dB, above {MAX_BLOCKS:g}"
    if row.sharpness < MIN_SHARPNESS:
        return "upscaled", f"sharpness {row.sharpness:.1f} dB, below {MIN_SHARPNESS:g}"
    if row.text > MAX_TEXT and not keep_text:
        return "text", f"text on {row.text:.1%} of the area, above {MAX_TEXT:.1%}"
    return None


def decide(rows, min_side=256, keep_text=False):
    """Choose a verdict for each Measured; their order does not matter. Returns {name: (verdict, reason)}.

    verdict: kept, broken, small, jpeg, upscaled, text, or duplicate. The reason of a kept picture is its new
    file name, a hash of its pixels. min_side: smallest allowed side. keep_text: do not drop pictures with
    text. Of several duplicates, the largest is kept; of equal sizes, the one with the weakest JPEG blocks.
    Pictures with equal samples but different PNG color chunks are duplicates, because training treats both
    as sRGB.
    """
    verdicts = {row.name: defect(row, min_side, keep_text) for row in rows}
    good = sorted((row for row in rows if not verdicts[row.name]),
                  key=lambda row: (-row.width * row.height, row.blocks, row.content, row.name))
    layouts, kept = np.array([row.layout for row in good]), []
    for i, row in enumerate(good):
        near = [good[kept[j]] for j in np.flatnonzero(layouts[kept] @ row.layout > MIN_LAYOUT)]
        original = next((other for other in near if other.content == row.content
                         or similarity(other.texture, row.texture) > MIN_SIMILARITY), None)
        if original:
            verdicts[row.name] = "duplicate", f"nearly the same as {original.name}"
        else:
            verdicts[row.name] = "kept", f"pictures/{row.content}{row.path.suffix.lower()}"
            kept.append(i)
    return verdicts


def clean(folders, out, min_side=256, workers=None, log=print, keep_text=False):
    """Select the usable pictures in folders (with subfolders) and files. Returns {name: (verdict, reason)}.

    Write pictures/ (hard links to the kept pictures, or copies where links are not possible) and report.csv
    (one line per file) in the folder `out`. For min_side and keep_text see decide(). Raises images.UserError
    for a wrong folder or if pictures/ exists, and OSError.
    """
    out = Path(out)
    if (out / "pictures").exists():
        raise images.UserError(f"{images.printable(out / 'pictures')} exists; choose another --out")
    jobs = [(path, images.printable(name)) for path, name in data.list_inputs(folders).items()]
    out.mkdir(parents=True, exist_ok=True)      # fails now if it fails, not after all pictures are examined
    rows = list(data.run_parallel(examine, jobs, workers, "examining", log))
    verdicts = decide(rows, min_side, keep_text)
    (out / "pictures").mkdir()
    for row in rows:
        verdict, target = verdicts[row.name]
        if verdict == "kept":
            try:
                os.link(os.path.realpath(row.path), out / target)
            except OSError:     # on another disk
                shutil.copy2(row.path, out / target)
    lines = sorted((name, *verdict) for name, verdict in verdicts.items())
    with images.atomic_path(out / "report.csv") as part, open(part, "w", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("name", "verdict", "reason"), *lines])
    counts = Counter(verdict for verdict, _ in verdicts.values())
    log(f"{images.printable(out / 'pictures')}: {', '.join(f'{n} {v}' for v, n in counts.most_common())}")
    return verdicts


# ------------------------------------------------------------------ multiscale

def copy_job(job, min_side):
    """Make the smaller copies of one picture. job: (target without suffix, path).

    Returns (number of copies, note). Raises images.PictureError for an unreadable picture.
    """
    stem, path = job
    picture = images.read_picture(path, srgb=True)
    image = Image.fromarray(stack_planes(picture))
    short, count = min(image.size), 0
    for factor, suffix in {**data.COPY_SCALES, data.COPY_SHORT_SIDE / short: data.COPY_SHORT_SIDE}.items():
        if factor >= 1 or round(short * factor) < min_side:
            continue
        copy = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.LANCZOS)
        target = Path(f"{stem}_{suffix}.png")
        with images.atomic_path(target) as part:
            copy.save(part, "PNG", compress_level=3)        # level 6 takes three times longer
        count += 1
    return count, picture.note and f"{images.printable(path)}: {picture.note}"


def multiscale(folders, out, min_side=128, workers=None, log=print):
    """Make smaller copies of pictures: sRGB PNG, resized with Lanczos. Returns the number of copies.

    NAME becomes NAME_075.png, NAME_050.png, NAME_033.png and NAME_400.png (shorter side 400) in the same
    subfolder of `out`. No copy is larger than its picture or has a side below min_side. If pictures
    in different folders have the same name, only one of them is used. Raises images.UserError and OSError.
    """
    names = data.list_inputs(folders)
    jobs = {str(Path(out) / name.split("/", 1)[1].removesuffix(path.suffix)): path
            for path, name in names.items()}
    job = functools.partial(copy_job, min_side=min_side)
    counts = list(data.run_parallel(job, list(jobs.items()), workers, "resizing", log))
    count = sum(filter(None, counts))
    log(f"{images.printable(out)}: {count} copies of {len(jobs)} pictures; {counts.count(None)} unreadable, "
        f"{len(names) - len(jobs)} with the name of another left out")
    return count


# ------------------------------------------------------------------ mine

def select_patches(details, count, rng):
    """Select patches by their detail. Returns at most `count` sorted indices.

    Most of them are the patches with most detail. A share LOW_DETAIL_SHARE is chosen at random from the less
    detailed half of the rest, so that training includes skies and blur. Patches with a detail of MIN_DETAIL
    or less are never selected.
    """
    details = np.asarray(details, np.float32)
    order = np.argsort(-details, kind="stable")
    order = order[details[order] > MIN_DETAIL]
    count = min(count, len(order))
    low_count = round(count * LOW_DETAIL_SHARE)
    high, others = order[:count - low_count], order[count - low_count:]
    low = others[min(len(others) // 2, len(others) - low_count):]
    return np.sort(np.concatenate([high, rng.permutation(low)[:low_count]]))


def mine(patch_file, out, keep=0.5, seed=0, log=print):
    """Write the patches of a patch file with most detail to the patch file `out`, which is replaced.

    At most MAX_PER_PICTURE patches of each picture are candidates. Of all candidates, the share `keep` is
    written. Both steps use select_patches(). Raises images.UserError and OSError.
    """
    metadata, arrays = data.open_patch_file(patch_file)
    patches, lr_patches, picture = arrays["patches"], arrays.get("lr"), arrays["picture"]
    detail, names = arrays["detail"], arrays["names"].tobytes().decode().split("\n")

    candidates = []
    for rows in np.split(np.arange(len(picture)), np.flatnonzero(np.diff(picture)) + 1):    # of one picture
        rng = np.random.default_rng((seed, picture[rows[0]]))
        candidates.append(rows[select_patches(detail[rows], MAX_PER_PICTURE, rng)])
    candidates = np.concatenate(candidates)
    count = max(1, round(keep * len(candidates)))
    chosen = candidates[select_patches(detail[candidates], count, np.random.default_rng(seed))]

    def pictures():
        for k in np.unique(picture[chosen]):
            rows = chosen[picture[chosen] == k]
            yield names[k], patches[rows], None if lr_patches is None else lr_patches[rows], detail[rows]
    scale = int(metadata.get("scale", 0))
    patch_count, picture_count = data.write_patch_file(out, patches.shape[1], scale, "mined", pictures())
    log(f"{out}: {patch_count} of {len(patches)} patches, from {picture_count} pictures")


# ------------------------------------------------------------------ command

def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name, text):
        add = commands.add_parser(name, help=text, description=text).add_argument
        if name == "mine":
            add("data", metavar="FILE", help="a patch file of `data.py pack`")
        else:
            add("data", nargs="+", metavar="IN", help="folders of pictures, with their subfolders")
            add("--workers", type=int, metavar="N", help=data.WORKERS_HELP)
        return add

    add = add_command("clean", "drop broken, small, JPEG-damaged, upscaled, text, and duplicate pictures")
    add("--out", "-o", required=True, help="new folder for pictures/ and report.csv")
    add("--keep-text", action="store_true", help="keep pictures with much text (default: leave them out)")
    add("--min-side", type=int, default=256, help="smallest allowed shorter side (default: 256)")

    add = add_command("multiscale", "make copies at 3/4, 1/2, 1/3, and with shorter side 400")
    add("--out", "-o", required=True, help="folder for the copies")
    add("--min-side", type=int, default=128, help="smallest shorter side of a copy (default: 128)")

    add = add_command("mine", "write the patches with most detail to a new patch file")
    add("--out", "-o", required=True, help="the new patch file")
    add("--seed", type=int, default=0, help="for random choices (default: 0)")
    add("--keep", type=float, default=0.5, help="share of the patches to keep (default: 0.5)")
    return parser.parse_args()


def main():
    args = parse()
    sys.stdout.reconfigure(errors="backslashreplace")       # a console may be unable to print a name
    try:
        if args.command == "clean":
            clean(args.data, args.out, args.min_side, args.workers, keep_text=args.keep_text)
        elif args.command == "multiscale":
            multiscale(args.data, args.out, args.min_side, args.workers)
        else:
            mine(args.data, args.out, args.keep, args.seed)
    except (images.UserError, KeyboardInterrupt) as error:
        images.fail(error)


if __name__ == "__main__":
    main()
