"""Match HR pictures with their LR pictures and with the results of other programs, and read them.

    jobs, notes = match_pairs({"HR": "hr", "LR": "lr", "waifu2x": "results"})
    for name, lr, hr, results in read_pairs(jobs, scale=2):                 # results["waifu2x"] is (3, H, W)

Needs images.py and degrade.py in the same folder.
"""
import re
import sys
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F

import degrade
import images

# Limits of check_content(). The correlation of true pairs is about 1. Of 15,051 pairs of different pictures,
# 4 are above 0.8.
MIN_CORRELATION = 0.8
MIN_CONTRAST = 0.08     # standard deviation; below it, the correlation is not meaningful


# ---- matching by name

def list_pictures(place):
    """List a file or folder -> [(name, path)]. A name is relative to the folder, or the name of the file."""
    place = Path(place)
    return [(path.relative_to(place).as_posix() if place.is_dir() else path.name, path)
            for path in images.find_pictures(place)]


def match_pairs(sides):
    """Match pictures by relative name without suffix -> (jobs, notes).

    sides: {side: file or folder}. A side is "HR", "LR", or the label of another program. The name of an LR
    picture may end in x and its scale, as in DIV2K: 0001x2.png belongs to 0001.png. If every side is a single
    file, the names are ignored.
    jobs: [(name of the first side's picture, {side: path})]. notes: messages about pictures without a match.
    Every HR picture needs an LR picture and vice versa; results may be incomplete. Raises images.UserError.
    """
    pictures = {side: list_pictures(place) for side, place in sides.items()}
    first, *others = sides
    if not all(pictures.values()):
        raise images.UserError(f"no picture in one of {', '.join(map(str, sides.values()))}")
    if all(Path(place).is_file() for place in sides.values()):
        return [(pictures[first][0][0], {side: found[0][1] for side, found in pictures.items()})], []
    if not others:
        return [(name, {first: path}) for name, path in pictures[first]], []

    indexes, notes = {first: index_by_stem(pictures[first])}, []
    for side in others:
        indexes[side] = index_by_stem(pictures[side], indexes[first] if side == "LR" else ())
        unmatched = sorted(indexes[first].keys() ^ indexes[side].keys())
        if unmatched:
            some = ", ".join(unmatched[:3])
            notes.append(f"{len(unmatched)} left out, only in {sides[first]} or {sides[side]}: {some}")
            if side == "LR":
                raise images.UserError(f"the folders do not match: {notes[-1]}")
    common = [stem for stem in indexes[first] if all(stem in index for index in indexes.values())]
    if not common:
        raise images.UserError(f"no picture has a partner of the same name: {'; '.join(notes)}")
    return [(indexes[first][stem][0], {side: index[stem][1] for side, index in indexes.items()})
            for stem in common], notes


def index_by_stem(pictures, hr_stems=()):
    """Return {name without suffix: (name, path)}.

    A scale at the end of a name, such as x2 or x4, is removed if the result is one of `hr_stems`.
    """
    index = {}
    for name, path in pictures:
        # Unicode can encode é as one code point, or as e and an accent. NFC converts both to one code point.
        stem = unicodedata.normalize("NFC", Path(name).with_suffix("").as_posix())
        without_scale = re.sub(r"x\d+$", "", stem)
        if stem not in hr_stems and without_scale in hr_stems:
            stem = without_scale
        if stem in index:
            raise images.UserError(f"{index[stem][1]} and {path} have the same name; rename one")
        index[stem] = (name, path)
    return index


# ---- reading

def check_content(hr, lr):
    """Raise UserError if hr (3, H, W) and lr (3, h, w) show different content.

    This happens if the numbers in the names of one folder are shifted by one.
    """
    pair = torch.stack([F.adaptive_avg_pool2d(x.mean(0, keepdim=True), 8).flatten() for x in (hr, lr)])
    correlation = torch.corrcoef(pair)[0, 1]
    if pair.std(1).min() > MIN_CONTRAST and correlation < MIN_CORRELATION:
        raise images.UserError(f"the LR picture shows different content (correlation {correlation:.2f}); "
                               "check the numbers in the names")


def crop_to_match(pictures, scale):
    """Crop the pictures of one job to matching sizes: LR (3, h, w), the others (3, h * scale, w * scale).

    pictures: {side: (3, H, W)}. Crop the first one at the right and bottom to a multiple of `scale`. The
    others must have its original or its cropped size. Raises images.UserError.
    """
    factors = {side: scale if side == "LR" else 1 for side in pictures}
    sizes = {side: [n * factors[side] for n in x.shape[-2:]] for side, x in pictures.items()}
    first = next(iter(sizes.values()))          # all sizes are in HR pixels
    h, w = (n // scale * scale for n in first)
    cropped = {}
    for side, x in pictures.items():
        factor, size = factors[side], sizes[side]
        if size not in (first, [h, w]):
            raise images.UserError(f"its {side} picture is {x.shape[-1]}x{x.shape[-2]} instead of "
                                   f"{w // factor}x{h // factor}")
        cropped[side] = x[:, :h // factor, :w // factor].contiguous()
    return cropped


def read_pairs(jobs, scale, recipe=None, seed=0, limit=None, skipped=None):
    """Read the jobs of match_pairs() -> iterator of (name, lr, hr, {label: sr}).

    Pictures are (3, H, W) float32 in [0, 1] on white, cropped by crop_to_match(). hr and lr may be None. With
    a recipe, lr is made from hr and equals the output of degrade.py for the same folder and seed. If a job
    has several pictures, their colors become sRGB. Unreadable pictures, wrong sizes, and pairs of different
    content are reported and appended to the list `skipped`; they do not count for `limit`.
    """
    count = 0
    for name, paths in jobs:
        if count == limit:
            return
        try:
            pictures = {side: images.read_picture(path, srgb=len(paths) > 1) for side, path in paths.items()}
            pictures = {side: images.composite(picture, 1.0) for side, picture in pictures.items()}
            pictures = crop_to_match(pictures, scale)
            if {"HR", "LR"} <= pictures.keys():
                check_content(pictures["HR"], pictures["LR"])
        except images.UserError as error:
            report_skipped(name, error, skipped)
            continue
        hr, lr = pictures.pop("HR", None), pictures.pop("LR", None)
        if recipe:
            lr = degrade.degrade(hr[None], recipe, scale, [degrade.picture_seed(name, seed)])[0]
        count += 1
        yield name, lr, hr, pictures


def report_skipped(name, error, skipped=None):
    """Print why a picture is skipped, and append the line to the list `skipped`."""
    line = f"{images.printable(name)}: {error}"
    images.ProgressLine.clear()
    print(f"skipped: {line}", file=sys.stderr)
    if skipped is not None:
        skipped.append(line)
