"""Find which LR picture, and which results of other programs, belong to which HR picture, and read them.

    jobs, notes = match_pairs({"HR": "hr", "LR": "lr", "waifu2x": "results"})
    for name, lr, hr, results in read_pairs(jobs, scale=2):                 # results["waifu2x"] is (3, H, W)
        ...
    jobs = [(name, {"HR": path}) for name, path in list_pictures("hr")]     # LR pictures by a recipe
    for name, lr, hr, _ in read_pairs(jobs, scale=2, recipe="web"):
        ...

Needs images.py and degrade.py beside it.
"""
import os
import re
import sys
import unicodedata
from pathlib import Path

import degrade
import images


class PairError(images.UserError):
    """Pictures do not belong together. The message is one line and names them."""


# ---- matching by name

def list_pictures(paths):
    """Files and folders -> [(name, path)]. A name is relative to its folder, or the name of a given file."""
    pictures = []
    for place in images.as_paths(paths):
        for path in images.find_pictures([place]):
            pictures.append((path.relative_to(place).as_posix() if place.is_dir() else path.name, path))
    return pictures


def match_pairs(sides):
    """Match pictures by relative name without suffix -> (jobs, notes).

    sides: {side: file or folder}. A side is "HR", "LR", or the label of another program. An LR picture may
    be named as in DIV2K: 0001x2.png for 0001.png. Single files match whatever their names are.
    jobs: [(name of the first side's picture, {side: path})]. notes: lines about pictures without partner.
    Every HR picture needs an LR picture and the reverse; results may be incomplete. Raises PairError.
    """
    first, *others = sides
    pictures = {side: list_pictures(place) for side, place in sides.items()}
    for side, place in sides.items():
        if not pictures[side]:
            raise PairError(f"no picture in {place}")
    if all(Path(place).is_file() for place in sides.values()):
        return [(pictures[first][0][0], {side: found[0][1] for side, found in pictures.items()})], []
    if not others:
        return [(name, {first: path}) for name, path in pictures[first]], []

    stems, notes = {first: index_by_stem(pictures[first])}, []
    for side in others:
        stems[side] = index_by_stem(pictures[side], stems[first] if side == "LR" else ())
        lines = [only_in(sides[first], stems[first].keys() - stems[side].keys()),
                 only_in(sides[side], stems[side].keys() - stems[first].keys())]
        lines = [line for line in lines if line]
        if lines and (first, side) == ("HR", "LR"):
            raise PairError(f"the folders do not match: {'; '.join(lines)}")
        notes += lines
    jobs = []
    for stem, (name, _) in stems[first].items():
        if all(stem in index for index in stems.values()):
            jobs.append((name, {side: index[stem][1] for side, index in stems.items()}))
    if not jobs:
        raise PairError(f"no picture has a partner of the same name: {'; '.join(notes)}")
    return jobs, [f"left out: {note}" for note in notes]


def index_by_stem(pictures, hr_stems=()):
    """[(name, path)] -> {name without suffix: (name, path)}.

    hr_stems: HR names, given for LR pictures; there a trailing x2, x3, ... is dropped where it leads to one.
    """
    index = {}
    for name, path in pictures:
        stem = unicodedata.normalize("NFC", os.path.splitext(name)[0])      # é can be one character or two
        without_scale = re.sub(r"x\d+$", "", stem)
        if stem not in hr_stems and without_scale in hr_stems:
            stem = without_scale
        if stem in index and index[stem][1] != path:
            raise PairError(f"{index[stem][1]} and {path} have the same name, so their partner is unclear")
        index.setdefault(stem, (name, path))
    return index


def only_in(place, stems):
    """'3 only in FOLDER (a, b, c)', or None for no stems."""
    if stems:
        names = ", ".join(sorted(stems)[:3]) + (", ..." if len(stems) > 3 else "")
        return images.printable(f"{len(stems)} only in {place} ({names})")


# ---- reading

def crop_to_match(pictures, scale, crop=False):
    """Crop the pictures of one name to matching sizes: LR (3, h, w), the others (3, h * scale, w * scale).

    pictures: {side: (3, H, W)}. The first one may lose less than `scale` pixels at the right and bottom; the
    others must match it then. crop=True crops all to their common upper left part, at most a fifth of a side.
    Raises PairError with the difference of the sizes.
    """
    factors = {side: scale if side == "LR" else 1 for side in pictures}
    sizes = {side: [n * factors[side] for n in x.shape[-2:]] for side, x in pictures.items()}
    first = next(iter(sizes.values()))          # all sizes are in HR pixels
    h, w = map(min, zip(*sizes.values())) if crop else first
    h, w = h // scale * scale, w // scale * scale
    if min(h, w) == 0:
        raise PairError(f"{first[1]}x{first[0]} is smaller than the scale {scale}")
    cropped = {}
    for side, x in pictures.items():
        factor, size = factors[side], sizes[side]
        fits = max(size[0] / h, size[1] / w) <= 1.25 if crop else size in (first, [h, w])
        if not fits:
            advice = "" if crop else "; --crop crops all to one size"
            raise PairError(f"its {images.printable(side)} picture is {x.shape[-1]}x{x.shape[-2]} instead of "
                            f"{w // factor}x{h // factor}{advice}")
        cropped[side] = x[:, :h // factor, :w // factor].contiguous()
    return cropped


def read_pairs(jobs, scale, recipe=None, seed=0, limit=None, crop=False, skipped=None):
    """Read the jobs of match_pairs() -> iterator of (name, lr, hr, {label: sr}).

    Pictures are (3, H, W) float32 in [0, 1], transparent parts white, cropped by crop_to_match(); lr and hr
    may be None. With a recipe, lr is made from hr, equal to the output of degrade.py for the same folder and
    seed. Bad pictures are reported, appended to the list `skipped`, and do not count for `limit`.
    """
    count = 0
    for name, paths in jobs:
        if count == limit:
            return
        try:
            pictures = {side: images.read_picture(path) for side, path in paths.items()}
            pictures = {side: images.composite(picture, 1.0) for side, picture in pictures.items()}
            pictures = crop_to_match(pictures, scale if recipe or "LR" in pictures else 1, crop)
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
    is_named = isinstance(error, images.PictureError)       # its message begins with the path
    line = str(error) if is_named else f"{images.printable(name)}: {error}"
    images.ProgressLine.clear()
    print(f"skipped: {line}", file=sys.stderr)
    if skipped is not None:
        skipped.append(line)
