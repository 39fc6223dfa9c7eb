"""pairs.py: pictures that belong together: HR, LR, and what other programs made of them.

    for name, lr, hr in pairs("wallpapers", "web", 2): ...                  # the LR pictures made by a recipe
    jobs, notes = paired({"HR": "hr", "LR": "lr", "waifu2x": "theirs"})     # by name
    for name, lr, hr, found in pictures(jobs, 2): ...                       # found["waifu2x"]

Needs our tile.py and degrade.py.
"""
import os
import sys
import unicodedata
from pathlib import Path

import degrade
import images


def listed(paths):
    """Files and folders -> [(name, path)]; a name is relative to the folder it was found in, or the file's own."""
    found = []
    for place in images.as_paths(paths):
        for path in images.find_pictures([place]):
            found.append((path.relative_to(place).as_posix() if place.is_dir() else path.name, path))
    return found


def paired(sides):
    """{kind: file or folder} -> ([(name, {kind: path})], notes). Kinds: HR, LR, or a label for another program's
    results. Pictures pair by relative name, whatever the suffix, and carry the first kind's; single files belong
    together whatever their names. HR and LR must pair wholly; a program may lack some pictures: those that all have are
    taken, and the notes say what is left out. Raises ValueError that lists the odd ones."""
    files = {kind: listed(place) for kind, place in sides.items()}
    for kind, place in sides.items():
        if not files[kind]:
            raise ValueError(f"no picture in {place}; give a folder with some")
    first, *others = sides
    if all(Path(place).is_file() for place in sides.values()):
        return [(files[first][0][0], {kind: own[0][1] for kind, own in files.items()})], []
    if not others:
        return [(name, {first: path}) for name, path in files[first]], []
    stems = {kind: {} for kind in sides}
    for kind in sides:
        for name, path in files[kind]:
            stem = unicodedata.normalize("NFC", os.path.splitext(name)[0])  # é may be one character or two
            twin = stems[kind].setdefault(stem, (name, path))
            if twin[1] != path:
                raise ValueError(f"{images.printable(twin[1])} and {images.printable(path)} differ only in their suffix, "
                                 "so they cannot be paired; move one away")
    base, strict, notes = stems[first], [], []
    common = {stem for stem in base if all(stem in own for own in stems.values())}
    for kind in others:
        for lone, place in (base.keys() - stems[kind], sides[first]), (stems[kind].keys() - base, sides[kind]):
            if lone:
                some = ", ".join(sorted(lone)[:3]) + ", ..." * (len(lone) > 3)
                said = images.printable(f"{len(lone)} only in {place} ({some})")
                (strict if (first, kind) == ("HR", "LR") else notes).append(said)
    if strict:
        raise ValueError(f"the folders do not pair: {'; '.join(strict)}; every HR picture needs an LR picture of its "
                         "name")
    if not common:
        raise ValueError(f"the folders do not pair: {'; '.join(notes)}; a result needs the name of its picture")
    jobs = [(name, {kind: own[stem][1] for kind, own in stems.items()}) for stem, (name, _) in base.items() if stem in common]
    return jobs, [f"left out: {note}" for note in notes]


def fitted(found, scale, crop=False):
    """{kind: (3, H, W)} of one name -> the same, LR of h x w and all others of scale times that: HR (or whatever is
    first) loses what is over at its right and bottom, the others must fit. crop: all are cut to the top left that they
    have in common. Raises ValueError that says by how much they differ."""
    size = {kind: tuple(n * scale if kind == "LR" else n for n in x.shape[-2:]) for kind, x in found.items()}
    first = next(iter(size.values()))
    h, w = (n // scale * scale for n in (map(min, zip(*size.values())) if crop else first))
    if min(h, w) == 0:
        raise ValueError(f"{first[1]}x{first[0]} is smaller than the scale {scale}")
    result = {}
    for kind, x in found.items():
        k, (height, width) = scale if kind == "LR" else 1, size[kind]
        if crop and max(height / h, width / w) > 1.25 or not crop and size[kind] not in (first, (h, w)):
            by = [f"{abs(n)} pixel{'s' * (abs(n) > 1)} {more if n > 0 else less}" for n, more, less in
                  ((x.shape[-1] - w // k, "wider", "narrower"), (x.shape[-2] - h // k, "higher", "lower")) if n]
            raise ValueError(
                f"its {images.printable(kind)} picture is {x.shape[-1]}x{x.shape[-2]}, but {w // k}x{h // k} belongs to "
                f"it{f' at {scale}x' if 'LR' in found else ''}: {', '.join(by)}; "
                + ("that is more than --crop cuts" if crop else "--crop cuts all to what they share"))
        result[kind] = x[:, :h // k, :w // k].contiguous()
    return result


def pictures(jobs, scale, recipe=None, seed=0, limit=None, crop=False, skipped=None):
    """Jobs of paired -> iterator of (name, lr, hr, {label: sr}), float32 in [0, 1]; lr and hr (3, h, w) or None.

    Transparent parts become white; sizes as fitted says. With a recipe, lr is what degrade.py's command makes of the
    same folder, recipe, scale and seed. A bad picture is named on stderr, added to the list `skipped` if given, and
    left out; limit counts the good ones."""
    count = 0
    for name, paths in jobs:
        if count == limit:
            return
        try:
            found = {kind: images.composite(images.read_picture(path), 1.0) for kind, path in paths.items()}
            found = fitted(found, scale if recipe or "LR" in found else 1, crop)
            hr, lr = found.pop("HR", None), found.pop("LR", None)
            if recipe:
                lr = degrade.degrade(hr[None], recipe, scale, [degrade.picture_seed(name, seed)])[0]
        except (ValueError, OSError) as e:
            report_skipped(name, e, skipped)
            continue
        count += 1
        yield name, lr, hr, found


def report_skipped(name, error, skipped):
    """One line on stderr that names the picture, kept in the list `skipped` too unless that is None."""
    line = str(error) if isinstance(error, images.PictureError) else f"{images.printable(name)}: {error}"
    say(f"skipped: {line}")
    if skipped is not None:
        skipped.append(line)


def say(line):
    images.ProgressLine.clear()
    print(line, file=sys.stderr)


def pairs(hr_paths, recipe, scale, seed=0, limit=None, skipped=None):
    """HR files or folders -> iterator of (name, lr (3, h, w), hr (3, h*scale, w*scale)), as pictures makes them. Raises
    ValueError before the first picture."""
    degrade.shares(recipe)
    jobs = [(name, {"HR": path}) for name, path in listed(hr_paths)]
    return (found[:3] for found in pictures(jobs, scale, recipe, seed, limit, skipped=skipped))
