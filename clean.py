"""Choose which pictures and patches are worth training on.

    python clean.py clean downloads -o cleaned                  # cleaned/pictures, cleaned/report.csv
    python clean.py multiscale cleaned/pictures -o smaller      # smaller copies
    python clean.py mine cleaned/pictures smaller -o mined.safetensors      # the most detailed patches
    python clean.py stats cleaned/pictures mined.safetensors --sheet sheet.png

`clean` examines every picture once and stores the measurements as a row of scan.csv. It decides from these
rows alone, so another threshold takes seconds. It never changes the input folders.
Needs torch, numpy, Pillow, and data.py with its imports beside it.
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import images

# Thresholds, chosen on 58 openly licensed drawings and paintings with `tests/measure_data.py thresholds`.
# Share of their center crops that is dropped, in percent:
#                                                 as upscaled       as JPEG
#   unchanged                                     2                 0       (whole pictures: 1 and 0 of 174)
#   blurred, sigma 0.5, 0.7, 1.0                  2, 22, 100        0
#   upscaled 2x by bicubic, bilinear, Lanczos     97, 93, 100       0, 0, 5
#   upscaled 1.5x by the same                     66, 53, 86        0
#   JPEG quality 30, 60, 85, 90, 95               0, 0, 0, 2, 2     100, 100, 83, 38, 2
# They do not detect pictures upscaled by a network, or JPEG files that were resized later.
MIN_SHARPNESS = -18.0   # dB; below it the picture is upscaled or blurred
MAX_BLOCKS = 1.0        # dB; strength of an 8-pixel grid
MIN_QUALITY = 88        # of a JPEG file, from its quantization table
MAX_DISTANCE = 6        # of 64 hash bits; resized or recompressed copies differ by 0 to 4, others by >= 14

MIN_DETAIL = 0.02       # patches with less detail have one color and teach nothing
CELL = 160              # pixels of a picture on the sheet of `stats`


# ------------------------------------------------------------------ measurements of one picture

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "AVIF": ".avif", "BMP": ".bmp",
            "TIFF": ".tif", "GIF": ".gif"}
FIELDS = ("name", "bytes", "mtime", "problem", "note", "format", "width", "height", "quality", "content",
          "hash", "sharpness", "blocks")            # of scan.csv
REPORT_FIELDS = ("name", "verdict", "why", "kept_as")


def file_format(path):
    """Return (Pillow's format name, JPEG quality or None) of a readable picture file."""
    with Image.open(path) as im:
        if im.format not in ("JPEG", "MPO") or not im.quantization:
            return im.format, None
        # libjpeg scales the luma table of ITU-T T.81, annex K. The 64 numbers of that table add up to 3688.
        percent = 100 * sum(im.quantization[min(im.quantization)]) / 3688
        return im.format, round(100 - percent / 2 if percent <= 100 else 5000 / percent)


def busy_squares(pixels, count=24, side=128):
    """Return the luma of the squares with most detail: uint8 (H, W, 3) -> float32 (n, side, side).

    The squares lie on a grid. Plain squares are left out, so n is between 0 and `count`.
    """
    h, w = pixels.shape[:2]
    corners = [(y, x) for y in range(0, h - side + 1, side) for x in range(0, w - side + 1, side)]
    ranked = sorted((-data.detail(pixels[y:y + side, x:x + side, 1:2]), y, x) for y, x in corners)[:count]
    squares = [pixels[y:y + side, x:x + side] for negative_detail, y, x in ranked if negative_detail < -0.5]
    squares = np.array(squares, np.float32).reshape(-1, side, side, 3)
    return squares @ np.array([0.299, 0.587, 0.114], np.float32)


def sharpness(squares):
    """Return the power at 0.3 to 0.5 cycles per pixel relative to 0.1 to 0.2, in dB; None without squares.

    squares: luma (n, side, side). Drawings at their true resolution have -7 to -16 dB, pictures upscaled by 2
    have -20 to -30 dB. The upper quartile of the squares counts, because a painting is soft in most places.
    """
    if not len(squares):
        return None
    side = squares.shape[1]
    window = np.hanning(side + 1)[:side].astype(np.float32)
    squares = (squares - squares.mean((1, 2), keepdims=True)) * window * window[:, None]
    power = np.abs(np.fft.fft2(squares)) ** 2
    spectrum = (power.sum(1) + power.sum(2))[:, :side // 2]
    f = np.arange(side // 2) / side
    high, low = spectrum[:, f >= 0.3].mean(1), spectrum[:, (f >= 0.1) & (f < 0.2)].mean(1)
    return float(np.quantile(10 * np.log10((high + 1e-6) / (low + 1e-6)), 0.75))


def blockiness(squares, jpeg=False):
    """Return how strongly a JPEG grid of 8 pixels shows, in dB; None without squares.

    squares: luma (n, side, side), side a multiple of 8. JPEG removes the highest frequencies of each block.
    So the three highest frequencies of an 8-sample DCT are weak where it meets the grid. The result is the
    weakest of the 8 offsets relative to their median: about 0 without JPEG, 0.5 for quality 95, 6 for 30.
    jpeg: the file itself is a JPEG, so offset 0 counts half.
    """
    if not len(squares):
        return None
    waves = np.cos(np.pi * np.outer(np.arange(5, 8), 2 * np.arange(8) + 1) / 16) / 2
    length, results = squares.shape[1] - 8, []
    for lines in (squares, squares.transpose(0, 2, 1)):
        products = [sum(float(w) * lines[..., i:i + length] for i, w in enumerate(wave)) for wave in waves]
        strength = np.minimum(sum(np.abs(product) for product in products), 20)     # limits hard edges
        offsets = strength.sum((0, 1)).reshape(-1, 8).sum(0)
        weakness = 10 * np.log10((np.median(offsets) + 1e-3) / (offsets + 1e-3))
        weakness[0] /= 1 + jpeg
        results.append(weakness.max())
    return float(np.mean(results))


def perceptual_hash(pixels):
    """Return a 64-bit hash of uint8 (H, W, 3) that survives resizing and compression (pHash, Zauner 2010).

    Each bit tells whether one of the 8x8 lowest frequencies of a 32x32 copy is above their median.
    """
    small = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.BOX), float)
    waves = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)
    low = (waves @ small @ waves.T).round(3).ravel()
    return int("".join("01"[bit] for bit in (low > np.median(low)).tolist()), 2)


def file_stamp(path):
    """Return (size, modification time) of a file as text; two empty strings for a missing file."""
    try:
        status = os.stat(path)
        return str(status.st_size), str(status.st_mtime_ns)
    except OSError:
        return "", ""


def examine(job, max_pixels=None):
    """Measure one picture. job: (path, name). Returns a row of scan.csv: {field: text}.

    "content" is a hash of the sRGB pixels. A picture with more than max_pixels is not decoded, so its row has
    only the size. "problem" is the reason why a picture is unreadable.
    """
    path, name = job
    size, mtime = file_stamp(path)
    height, width = images.picture_size(path)
    row = dict.fromkeys(FIELDS, "") | {"name": name, "bytes": size, "mtime": mtime, "width": str(width),
                                       "height": str(height)}
    if max_pixels and height * width > max_pixels:
        return row
    try:
        picture = images.read_picture(path, srgb=True)
    except images.PictureError as error:
        return row | {"problem": str(error).removeprefix(f"{images.printable(path)}: ")}
    row["format"], quality = file_format(path)
    row["quality"] = str(quality or "")
    row["note"] = picture.note
    planes = picture.rgb if picture.alpha is None else torch.cat([picture.rgb, picture.alpha])
    pixels = np.ascontiguousarray(images.to_uint8(planes))
    row["content"] = hashlib.blake2b(pixels, key=str(pixels.shape).encode(), digest_size=8).hexdigest()
    pixels = np.ascontiguousarray(images.to_uint8(images.composite(picture, 0.5)))
    squares = busy_squares(pixels)
    if len(squares):
        row["sharpness"] = f"{sharpness(squares):.2f}"
        row["blocks"] = f"{blockiness(squares, row['format'] in ('JPEG', 'MPO')):.2f}"
    row["hash"] = f"{perceptual_hash(pixels):016x}"
    return row


# ------------------------------------------------------------------ decisions, from the rows alone

@dataclass
class Rules:
    """Thresholds of `decide`. naming: "hash" names kept pictures by their pixels, "id" by the number at the
    beginning of their file name. distance: up to 7; -1 finds duplicates by equal pixels only."""
    naming: str = "hash"
    min_side: int = 256
    max_mp: float | None = None
    min_quality: int = MIN_QUALITY
    max_blocks: float = MAX_BLOCKS
    min_sharpness: float = MIN_SHARPNESS
    distance: int = MAX_DISTANCE


BIT_COUNTS = np.array([value.bit_count() for value in range(2**16)], np.uint8)


def find_near(codes, code, distance):
    """Return the index of the first of `codes` (uint64) that differs from `code` in few bits, or None."""
    difference = codes ^ np.uint64(code)
    bits = BIT_COUNTS[difference.view(np.uint16).reshape(-1, 4)].sum(1)
    near = np.flatnonzero(bits <= distance)
    return int(near[0]) if len(near) else None


def defect(row, rules):
    """Return (verdict, reason) for a picture that is dropped without comparison to others, or None."""
    width, height = int(row["width"] or 0), int(row["height"] or 0)
    if row["problem"]:
        return "broken", row["problem"]
    if rules.max_mp and width * height > rules.max_mp * 1e6:
        return "large", f"{width}x{height}, {width * height / 1e6:.1f} megapixels, above {rules.max_mp:g}"
    if min(width, height) < rules.min_side:
        return "small", f"{width}x{height}, a side is below {rules.min_side}"
    if row["quality"] and int(row["quality"]) < rules.min_quality:
        return "jpeg", f"JPEG of quality {row['quality']}, below {rules.min_quality}"
    if row["blocks"] and float(row["blocks"]) > rules.max_blocks:
        return "jpeg", f"traces of JPEG blocks: {float(row['blocks']):.1f} dB, above {rules.max_blocks:g}"
    if row["sharpness"] and float(row["sharpness"]) < rules.min_sharpness:
        return "upscaled", f"sharpness {float(row['sharpness']):.1f} dB, below {rules.min_sharpness:g}"
    return None


def decide(rows, rules):
    """Decide about each picture. Returns a list of {name, verdict, why, kept_as}, sorted by name.

    rows: rows of scan.csv; their order does not matter. verdict: kept, broken, small, large, jpeg, upscaled
    or duplicate. The largest of several duplicates stays. kept_as: a new file name without suffix.
    """
    dropped, good = {}, []
    for row in rows:
        verdict = defect(row, rules)
        if verdict:
            dropped[row["name"]] = verdict
        else:
            good.append(row)

    codes, kept, name_of_content = np.zeros(len(good), np.uint64), {}, {}

    def best_first(row):
        return -int(row["width"]) * int(row["height"]), float(row["blocks"] or 0), row["content"], row["name"]

    for row in sorted(good, key=best_first):
        name, content, code = row["name"], row["content"], int(row["hash"], 16)
        twin = name_of_content.get(content)
        near = None if twin else find_near(codes[:len(kept)], code, rules.distance)
        if twin:
            dropped[name] = "duplicate", f"same pixels as {twin}"
        elif near is not None:
            dropped[name] = "duplicate", f"nearly the same as {list(kept)[near]}"
        else:
            codes[len(kept)] = code
            kept[name] = content
            name_of_content[content] = name

    new_names = set()
    for name, content in sorted(kept.items()):
        number = re.match("[0-9]*", name.rsplit("/", 1)[-1])[0][:60] if rules.naming == "id" else ""
        if not number or number in new_names:
            number = f"{number}_{content}".strip("_")
        new_names.add(number)
        kept[name] = number
    decisions = [(name, verdict, why, "") for name, (verdict, why) in dropped.items()]
    decisions += [(name, "kept", "", number) for name, number in kept.items()]
    return [dict(zip(REPORT_FIELDS, decision)) for decision in sorted(decisions)]


# ------------------------------------------------------------------ clean

def csv_bytes(rows):
    memory = io.StringIO()
    csv.writer(memory, lineterminator="\n").writerows(rows)
    return memory.getvalue().encode()


def read_table(path, fields):
    """Read a CSV file as a list of {field: text}; [] if it is missing. Raises UserError for other fields."""
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8", "replace")
    complete = text[:text.rfind("\n") + 1]      # an interrupted run may leave half a line
    header, *rows = csv.reader(io.StringIO(complete, newline=""))
    if tuple(header) != fields:
        raise images.UserError(f"{images.printable(path)} has other columns; choose an empty --out")
    return [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]


def scan(paths, file, max_pixels, workers, log):
    """Examine pictures and append the rows to a CSV file. Files with a row in it are not examined again.

    paths: {name: path}. Returns one row per picture.
    """
    old_rows = read_table(file, FIELDS)
    known = {(row["name"], row["bytes"], row["mtime"]): row for row in old_rows}
    rows, jobs = [], []
    for name, path in paths.items():
        row = known.get((name, *file_stamp(path)))
        if row and row["content"]:      # not for pictures that were unreadable or too large
            rows.append(row)
        else:
            jobs.append((path, name))
    if rows:
        log(f"{len(rows)} of {len(paths)} pictures have been examined already")
    images.write_atomic(file, csv_bytes([FIELDS, *(row.values() for row in old_rows)]))
    with open(file, "ab") as table:
        examine_job = functools.partial(examine, max_pixels=max_pixels)
        for _, row in data.run_parallel(examine_job, jobs, workers, "examining"):
            rows.append(row)
            if known.get((row["name"], row["bytes"], row["mtime"])) != row:
                table.write(csv_bytes([row.values()]))
                table.flush()
            if row["note"] or row["problem"]:
                images.ProgressLine.clear()
                log(f"{row['name']}: {row['note'] or row['problem']}")
    return rows


def place(source, target, copy):
    """Put a link to `source`, or a copy of it, at `target`, unless it is there already."""
    source = os.path.abspath(source)
    if os.path.islink(target):
        up_to_date = not copy and os.readlink(target) == source
    else:
        up_to_date = target.exists() and file_stamp(target) == file_stamp(source)
    if up_to_date:
        return
    with images.atomic_path(target) as part:
        if not copy:
            with contextlib.suppress(OSError):      # Windows may not allow links
                os.symlink(source, part)
        if not os.path.islink(part):
            shutil.copy2(source, part)


def clean(folders, out, rules=None, copy=False, workers=None, log=print):
    """Sort the pictures of folders (with subfolders) and files. Returns the decisions, see `decide`.

    The folder `out` gets pictures/ (links or copies of the kept pictures), report.csv (a line per file) and
    scan.csv. An interrupted call continues. Pictures that an earlier report.csv lists and that are not kept
    now are removed from `out`. Raises images.UserError for a wrong folder, and OSError.
    """
    out, rules = Path(out), rules or Rules()
    inputs = data.list_inputs(folders, exclude=[out / "pictures"])
    paths = {images.printable(name.replace("\\", "\\\\")): path for path, name in inputs.items()}
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    rows = scan(paths, out / "scan.csv", rules.max_mp and rules.max_mp * 1e6, workers, log)
    decisions, formats = decide(rows, rules), {row["name"]: row["format"] for row in rows}
    targets = {}
    for row in decisions:
        if row["verdict"] == "kept":
            path = paths[row["name"]]
            suffix = SUFFIXES.get(formats[row["name"]], path.suffix.lower())
            row["kept_as"] = f"pictures/{row['kept_as']}{suffix}"
            targets[row["kept_as"]] = path

    report = out / "report.csv"
    previous = {row["kept_as"] for row in read_table(report, REPORT_FIELDS)
                if re.fullmatch("pictures/[^/]+", row["kept_as"])}
    unknown = [target for target in targets if target not in previous and os.path.lexists(out / target)]
    if unknown:
        raise images.UserError(f"{images.printable(out / unknown[0])} is in the way; choose an empty --out")
    for target in previous - targets.keys():
        (out / target).unlink(missing_ok=True)
    images.write_atomic(report, csv_bytes([REPORT_FIELDS, *(row.values() for row in decisions)]))
    for target, path in targets.items():
        place(path, out / target, copy)

    counts = Counter(row["verdict"] for row in decisions)
    dropped = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()) if verdict != "kept")
    log(f"{images.printable(out / 'pictures')}: {counts['kept']} of {len(rows)} pictures; "
        f"dropped: {dropped or 'none'}")
    return decisions


# ------------------------------------------------------------------ multiscale

def copy_job(job, min_side):
    """Make the smaller copies of one picture. job: (path, target without suffix).

    Returns the number of new copies, or the PictureError of an unreadable picture.
    """
    path, stem = job
    try:
        short = min(images.picture_size(path)) or min(images.read_picture(path, srgb=True).rgb.shape[1:])
        factors = {**data.COPY_SCALES, data.COPY_SHORT_SIDE: data.COPY_SHORT_SIDE / short}
        changed = max(os.stat(path).st_mtime_ns, os.lstat(path).st_ctime_ns)
        todo = {}
        for suffix, factor in factors.items():
            target = Path(f"{stem}_{suffix}.png")
            # mtime is coarse; equal timestamps may be stale, so rebuild.
            current = target.exists() and target.stat().st_mtime_ns > changed
            if not current and factor < 1 and round(short * factor) >= min_side:
                todo[target] = factor
        if not todo:
            return 0
        picture = images.read_picture(path, srgb=True)
    except images.PictureError as error:
        return error
    planes = picture.rgb if picture.alpha is None else torch.cat([picture.rgb, picture.alpha])
    image = Image.fromarray(images.to_uint8(planes))
    for target, factor in todo.items():
        size = [max(1, round(side * factor)) for side in image.size]
        memory = io.BytesIO()
        copy = image.resize(size, Image.Resampling.LANCZOS)
        copy.save(memory, "PNG", compress_level=3)      # level 6 takes three times longer
        images.write_atomic(target, memory.getbuffer())
    return len(todo)


def multiscale(folders, out, min_side=128, workers=None, log=print):
    """Make smaller copies of pictures: sRGB PNG, resized with Lanczos. Returns the number of new copies.

    NAME becomes NAME_075.png, NAME_050.png, NAME_033.png and NAME_400.png (shorter side 400) in the same
    subfolder of `out`. No copy is larger than its picture or has a side below min_side. A copy that is newer
    than its picture is not made again. Raises images.UserError, as for two pictures of one name, and OSError.
    """
    stems = {}
    for path, name in data.list_inputs(folders, exclude=[out]).items():
        _, name = name.split("/", 1)
        other = stems.setdefault(str(Path(out) / name.removesuffix(path.suffix)), path)
        if other != path:
            names = f"{images.printable(other)} and {images.printable(path)}"
            raise images.UserError(f"{names} would have copies of one name; rename one, or run clean first")
    made = unreadable = 0
    jobs = [(path, stem) for stem, path in stems.items()]
    job = functools.partial(copy_job, min_side=min_side)
    for _, result in data.run_parallel(job, jobs, workers, "resizing"):
        if isinstance(result, images.PictureError):
            images.ProgressLine.clear()
            log(f"skipped: {result}")
            unreadable += 1
        else:
            made += result
    log(f"{images.printable(out)}: {made} copies made of {len(jobs)} pictures; {unreadable} unreadable")
    return made


# ------------------------------------------------------------------ mine

def select_patches(details, count, calm_share, rng):
    """Select patches by their detail. Returns at most `count` sorted indices.

    Most of them are the patches with most detail. A share `calm_share` is drawn from the calmer half of the
    others, so that the model also sees skies and blur. Patches up to MIN_DETAIL are never selected.
    """
    details = np.asarray(details, np.float32)
    order = np.argsort(-details, kind="stable")
    order = order[details[order] > MIN_DETAIL]
    count = min(count, len(order))
    calm_count = round(count * calm_share)
    busy, others = order[:count - calm_count], order[count - calm_count:]
    calm = others[min(len(others) // 2, len(others) - calm_count):]
    return np.sort(np.concatenate([busy, rng.permutation(calm)[:calm_count]]))


def select_of_picture(details, name, per_picture, calm_share, seed):
    """Select the patches of one picture, see select_patches."""
    rng = data.rng_of(f"{seed}/{images.printable(name)}")
    return select_patches(details, per_picture, calm_share, rng)


def mine(inputs, out, size=data.PATCH_SIZE, keep=0.5, per_picture=32, calm_share=0.1, seed=0,
         min_side=data.MIN_SIDE, log=print, overwrite=False, lr_dir=None, workers=None):
    """Write the patches with most detail, from folders of pictures or from patch files, to one patch file.

    At most per_picture patches of each picture are candidates; the share `keep` of all candidates stays. Both
    steps follow select_patches. For the other arguments see data.pack; a patch file has its own patch size.
    Returns Path(out). Raises images.UserError, also for inputs that do not fit together, and OSError.
    """
    inputs, out = images.as_paths(inputs), Path(out)
    files = [path for path in inputs if data.is_patch_file(path)]
    folders = [path for path in inputs if not data.is_patch_file(path)]
    if not (0 < keep <= 1 and 0 <= calm_share <= 1 and per_picture >= 1):
        raise images.UserError("--keep and --calm-share are between 0 and 1, --per-picture is at least 1")
    if out.resolve() in [f.resolve() for f in files]:
        raise images.UserError(f"{out} is an input; choose another --out")
    headers = [data.read_header(f) for f in files]
    fingerprints = [metadata["fingerprint"] for metadata, _, _ in headers]
    kinds = {(patch_size, int(metadata.get("scale", 0))) for metadata, _, patch_size in headers}
    if folders:
        selection = per_picture, calm_share
        _, scale, folder_fingerprint = data.plan_pack(folders, size, seed, min_side, lr_dir, selection, ())
        fingerprints.append(folder_fingerprint)
        kinds.add((size, scale if lr_dir else 0))
    if len(kinds) > 1:
        raise images.UserError("all inputs need the same patch size, and pairs of one scale or no pairs")
    key = json.dumps(["mined", keep, per_picture, calm_share, seed, fingerprints])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    if data.is_packed(out, fingerprint, overwrite, log):
        return out
    candidate_file = out.with_name(out.name + ".candidates")
    if folders:
        select = functools.partial(select_of_picture, per_picture=per_picture, calm_share=calm_share,
                                   seed=seed)
        data.pack(folders, candidate_file, size, seed, min_side, log, lr_dir=lr_dir, workers=workers,
                  select=select, selection=selection)
        files.append(candidate_file)
    write_mined(files, out, *kinds.pop(), fingerprint, keep, per_picture, calm_share, seed, log)
    if folders:
        candidate_file.unlink()
    return out


def write_mined(files, out, size, scale, fingerprint, keep, per_picture, calm_share, seed, log):
    """Select the patches of patch files and write them to `out`. For the arguments see `mine`."""
    pictures, details = [], []      # per picture: (file number, name, patch numbers), details of patches
    tensors = [(data.read_tensor(file, "patches"), data.read_tensor(file, "lr")) for file in files]
    for k, file in enumerate(files):
        picture, detail = data.read_tensor(file, "picture"), data.read_tensor(file, "detail")
        names = data.read_tensor(file, "names").tobytes().decode().split("\n")
        ends = np.searchsorted(picture, np.arange(picture[-1] + 2))
        for name, begin, end in zip(names, ends[:-1], ends[1:]):
            numbers = begin + select_of_picture(detail[begin:end], name, per_picture, calm_share, seed)
            pictures.append((k, name, numbers))
            details.append(detail[numbers])
    counts, details = [len(d) for d in details], np.concatenate(details)
    count = max(1, round(keep * len(details)))
    chosen = select_patches(details, count, calm_share, np.random.default_rng(seed))
    if not len(chosen):
        raise images.UserError("no patch has any detail; give other pictures")

    with data.PatchWriter(out, size, scale or None, fingerprint) as writer:
        end = 0
        for (k, name, numbers), count in zip(pictures, counts):
            begin, end = end, end + count
            own = chosen[(chosen >= begin) & (chosen < end)]
            if len(own):
                patches, lr_patches = tensors[k]
                rows = numbers[own - begin]
                lr_rows = None if lr_patches is None else lr_patches[rows]
                writer.add(name, patches[rows], lr_rows, details[own])
        writer.finish()
    total = sum(len(patches) for patches, _ in tensors)
    log(f"{out}: {len(chosen)} of {total} patches, from {len(writer.names)} pictures")


# ------------------------------------------------------------------ stats

def quantiles(values, digits=0):
    """Return minimum, 5%, median, 95% and maximum as text."""
    return "  ".join(f"{v:.{digits}f}" for v in np.quantile(values, [0, 0.05, 0.5, 0.95, 1]))


def spaced(n, count):
    """Return at most `count` evenly spaced indices below n."""
    return np.linspace(0, n - 1, min(n, count)).astype(int)


def thumbnail_job(path):
    """Return (mean detail of the patches, thumbnail, file name), or None for an unreadable picture."""
    try:
        rgb = images.composite(images.read_picture(path, srgb=True), 1.0)
    except images.PictureError:
        return None
    image = Image.fromarray(images.to_uint8(rgb))
    image.thumbnail((CELL, CELL), Image.Resampling.BOX)
    return np.mean([data.detail(patch) for patch in data.cut_patches(rgb, 256)]), np.asarray(image), path.name


def stats(inputs, sheet=None, sample=192, log=print, workers=None):
    """Report number, size and detail of pictures (in folders) and patches (in patch files).

    sheet: a PNG to write, with 48 patches of each file and 48 pictures, sorted by detail. The sizes of all
    pictures are read, and `sample` pictures are decoded. Raises images.UserError and OSError.
    """
    inputs, cells = images.as_paths(inputs), []
    for file in (path for path in inputs if data.is_patch_file(path)):
        metadata, n, size = data.read_header(file)
        patches, picture = data.read_tensor(file, "patches"), data.read_tensor(file, "picture")
        details = data.read_tensor(file, "detail")
        pairs = f" with LR patches at scale 1/{metadata['scale']}" if "scale" in metadata else ""
        log(f"{file}: {n} patches of {size}x{size}{pairs} from {metadata['pictures']} pictures, "
            f"{file.stat().st_size / 1e9:.2f} GB")
        log(f"  per picture      {quantiles(np.unique(picture, return_counts=True)[1])}")
        log(f"  detail           {quantiles(details, 1)}")
        order = np.argsort(details, kind="stable")
        cells += [(f"{details[i]:.1f}", np.array(patches[i])) for i in order[spaced(n, 48)]]

    folders = [path for path in inputs if not data.is_patch_file(path)]
    if folders:
        paths = list(data.list_inputs(folders))
        sizes = [size for _, size in data.run_parallel(images.picture_size, paths, workers, "reading sizes")]
        sizes = np.array([size for size in sizes if min(size)])
        chosen = [paths[i] for i in spaced(len(paths), sample)]
        results = [result for _, result in data.run_parallel(thumbnail_job, chosen, workers, "reading")]
        results = sorted(filter(None, results), key=lambda result: (result[0], result[2]))
        if not results:
            raise images.UserError(f"no picture in {', '.join(map(images.printable, folders))} can be read")
        log(f"{', '.join(map(images.printable, folders))}: {len(sizes)} pictures, "
            f"{len(paths) - len(sizes)} unreadable")
        megapixels = sizes.prod(1) / 1e6
        log(f"  megapixels       {quantiles(megapixels, 2)}   total {megapixels.sum():.0f}")
        log(f"  shorter side     {quantiles(sizes.min(1))}")
        log(f"  longer side      {quantiles(sizes.max(1))}")
        log(f"  detail of {len(results):<6} {quantiles([mean for mean, _, _ in results], 1)}")
        for i in spaced(len(results), 48):
            mean, pixels, name = results[i]
            cells.append((f"{mean:.1f} {name[:18]}".encode("ascii", "replace").decode(), pixels))
    if sheet:
        draw_sheet(Path(sheet), cells)
        log(f"{sheet}: {len(cells)} pictures, sorted by detail")


def draw_sheet(path, cells):
    """Write a PNG with a table of pictures, 8 per row. cells: [(label, uint8 (h, w, 3))]."""
    sheet = Image.new("RGB", (8 * (CELL + 8), -(-len(cells) // 8) * (CELL + 24)), (40, 40, 40))
    for i, (label, pixels) in enumerate(cells):
        x, y = i % 8 * (CELL + 8) + 4, i // 8 * (CELL + 24) + 4
        image = Image.fromarray(pixels)
        image.thumbnail((CELL, CELL), Image.Resampling.BOX)
        sheet.paste(image, (x, y))
        ImageDraw.Draw(sheet).text((x, y + CELL + 2), label, (255, 255, 255))
    memory = io.BytesIO()
    sheet.save(memory, "PNG")
    images.write_atomic(path, memory.getbuffer())


# ------------------------------------------------------------------ command

def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name, text, inputs="folders of pictures"):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("data", nargs="+", metavar="IN", help=f"{inputs}, with their subfolders")
        return command.add_argument

    add = add_command("clean", "sort out broken, small, JPEG-damaged, upscaled and duplicate pictures")
    add("--out", "-o", required=True, help="folder for pictures/, report.csv and scan.csv")
    add("--name", default="hash", choices=("hash", "id"),
        help="name pictures by a hash of their pixels, or by the number at the beginning of their file name "
             "(default: hash)")
    add("--copy", action="store_true", help="copy pictures (default: link them)")
    add("--min-side", type=int, default=256, help="shortest side allowed (default: 256)")
    add("--max-mp", type=float, help="most megapixels allowed, such as 25.6 (default: no limit)")
    add("--min-quality", type=int, default=MIN_QUALITY,
        help="lowest quality of JPEG files; 0: any (default: %(default)s)")
    add("--max-blocks", type=float, default=MAX_BLOCKS,
        help="strongest traces of JPEG blocks in dB; inf: any (default: %(default)s)")
    add("--min-sharpness", type=float, default=MIN_SHARPNESS,
        help="lowest sharpness in dB; =-inf: any (default: %(default)s)")
    add("--distance", type=int, default=MAX_DISTANCE, choices=range(-1, 8), metavar="N",
        help="near-duplicates differ in at most N of 64 hash bits, -1 to 7; -1: equal pixels (default: 6)")
    add("--workers", type=int, metavar="N", help=data.WORKERS_HELP)

    add = add_command("multiscale", "make copies at 3/4, 1/2, 1/3 and with shorter side 400")
    add("--out", "-o", required=True, help="folder for the copies")
    add("--min-side", type=int, default=128, help="make no copy with a shorter side (default: 128)")
    add("--workers", type=int, metavar="N", help=data.WORKERS_HELP)

    add = add_command("mine", "write the patches with most detail to a patch file",
                      "folders of pictures, or patch files")
    data.add_pack_flags(add)
    add("--keep", type=float, default=0.5, help="share of the patches to keep (default: 0.5)")
    add("--per-picture", type=int, default=32, help="most patches of one picture (default: 32)")
    add("--calm-share", type=float, default=0.1, help="share of calm patches (default: 0.1)")

    add = add_command("stats", "report number, size and detail", "folders of pictures, or patch files")
    add("--sheet", metavar="PNG", help="write 48 pictures of each input, sorted by detail")
    add("--overwrite", action="store_true", help="replace the sheet")
    add("--workers", type=int, metavar="N", help=data.WORKERS_HELP)
    return parser.parse_args()


def run(args):
    if args.command == "clean":
        rules = Rules(args.name, args.min_side, args.max_mp, args.min_quality, args.max_blocks,
                      args.min_sharpness, args.distance)
        clean(args.data, args.out, rules, args.copy, args.workers)
    elif args.command == "multiscale":
        multiscale(args.data, args.out, args.min_side, args.workers)
    elif args.command == "mine":
        mine(args.data, args.out, args.size, args.keep, args.per_picture, args.calm_share, args.seed,
             args.min_side, overwrite=args.overwrite, lr_dir=args.lr_dir, workers=args.workers)
    else:
        if args.sheet and os.path.exists(args.sheet) and not args.overwrite:
            raise images.UserError(f"{images.printable(args.sheet)} exists; replace it with --overwrite")
        stats(args.data, args.sheet, workers=args.workers)


def main():
    args = parse()
    sys.stdout.reconfigure(errors="backslashreplace")       # a console may be unable to show a Japanese name
    try:
        run(args)
    except images.UserError as error:
        images.fail(error)
    except OSError as error:
        out = args.sheet if args.command == "stats" else args.out
        images.fail(f"cannot write {images.printable(out)}: {error.strerror or error}")


if __name__ == "__main__":
    main()
