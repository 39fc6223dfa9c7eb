"""clean.py: which pictures of a collection are worth training on, and smaller copies of those that are.

    python data.py clean DOWNLOADS -o CLEAN
    python data.py multiscale CLEAN/pictures -o CLEAN/smaller

Every picture is looked at once, and what was found is a row of CLEAN/scan.csv; the decisions are made from these rows
alone, so trying another threshold takes seconds. What stays is linked (or copied) into CLEAN/pictures, broken files
into CLEAN/quarantine, and CLEAN/report.csv says what became of each file and why. The given folders are never changed.

Needs torch, numpy, Pillow, and tile.py beside it.
"""
import contextlib
import csv
import errno
import functools
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

import images

# Thresholds, chosen on 58 openly licensed drawings and paintings (python tests/measure_data.py thresholds). Of their
# centre crops they drop, in percent, as upscaled | as JPEG:
#   as they are 2 | 0 (of 174 whole pictures 1 | 0)      blurred, sigma 0.5 2, 0.7 22, 1.0 100 | 0
#   enlarged 2x bicubic 97, bilinear 93, Lanczos 100; 1.5x 66, 53, 86 | 0, but 5 of Lanczos 2x
#   JPEG of quality 30, 60 0 | 100, 85 0 | 83, 90 2 | 38, 95 2 | 2
# What a network enlarged, or a JPEG that was rescaled afterwards, they do not see.
SHARPNESS = -18.0       # dB; the fine detail of pictures below this was not in the file, it was enlarged or is blurred
BLOCKS = 1.0            # dB; a grid of 8 pixels that shows more than this
QUALITY = 88            # of a JPEG file, told by its own quantisation table
DISTANCE = 6            # bits of 64: rescaled and recompressed copies differ by 0 to 4, others by 14 and more

# ---------------------------------------------------------------------------------------------------------------------
# Work on many pictures
# ---------------------------------------------------------------------------------------------------------------------


def progress(what, done, total, start, unit="pictures"):
    """One line that is written over on a terminal, gone at the end; elsewhere a line every 500."""
    terminal, rate = sys.stderr.isatty(), max(done, 1) / (time.time() - start + 1e-9)
    line = f"{what} {done}/{total}  {rate:.1f} {unit}/s  {(total - done) / rate:.0f} s left"
    if terminal:
        print("\r\033[K" + line * (done < total), end="", file=sys.stderr, flush=True)
    elif done % 500 == 499:
        print(line, file=sys.stderr, flush=True)


def quiet_worker(_):
    torch.set_num_threads(1)
    for which in signal.SIGINT, signal.SIGTERM:         # Ctrl-C and a shutdown are for the main process, which then ends us
        signal.signal(which, signal.SIG_IGN)

    def orphaned():
        multiprocessing.parent_process().join()
        os._exit(1)     # a worker with results that nobody fetches would wait for ever
    threading.Thread(target=orphaned, daemon=True).start()


class Failed:
    """What a job raised, on its way out of a worker; raised there it would keep the other workers alive for ever."""

    def __init__(self, error):
        try:
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:
            self.error = RuntimeError(f"{type(error).__name__}: {error}")


class Jobs(torch.utils.data.Dataset):
    def __init__(self, function, jobs):
        self.function, self.jobs = function, jobs

    def __len__(self):
        return len(self.jobs)

    def __getitem__(self, i):
        try:
            return self.function(self.jobs[i])
        except Exception as e:
            return Failed(e)


def as_it_is(result):
    return result


def in_parallel(function, jobs, workers, what):
    """Yields (job, function(job)) for a list of jobs, in order, with progress on stderr. workers: processes that do
    them, 0 for none; a few results each wait in memory. RuntimeError when a worker dies (it says of which signal)."""
    start, loader = time.time(), torch.utils.data.DataLoader(
        Jobs(function, jobs), batch_size=None, collate_fn=as_it_is, num_workers=min(workers, len(jobs)),
        worker_init_fn=quiet_worker)
    for i, (job, result) in enumerate(zip(jobs, loader)):
        progress(what, i, len(jobs), start)
        if isinstance(result, Failed):
            raise result.error
        yield job, result
    images.ProgressLine.clear()


@contextlib.contextmanager
def alone(path):
    """path, made if need be, open for reading and appending in one process at a time: others wait for it to close, or
    for the process to end, however it ends. (On Windows, which has no fcntl, and on disks without locks nobody waits.)"""
    while True:
        file = open(path, "a+b")
        with contextlib.suppress(ImportError):
            import fcntl
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)       # not flock: worker processes would inherit it
            except (BlockingIOError, PermissionError):
                print(f"{images.printable(path)}: another process is at work here, waiting for it", file=sys.stderr)
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError as e:        # some network file systems have no locks
                if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()        # the one we waited for was done with it and removed it
    with file:
        yield file


def listing(folders, without=()):
    """Folders and files -> {path: name}, the name relative to its folder and led by the folder's number, so that
    moving a folder changes nothing. Whatever lies below one of the folders `without` is left out.
    ValueError: no such folder, one that cannot be listed, no picture at all."""
    folders, names = images.as_paths(folders), {}
    real, barred = functools.lru_cache(None)(Path.resolve), [Path(w).resolve() for w in without]
    for k, folder in enumerate(folders):
        if any(real(folder).is_relative_to(w) for w in barred):
            raise ValueError(f"{images.printable(folder)} lies where the results go; choose another --out")
        for path in images.find_pictures([folder]):
            if not any(real(path.parent).is_relative_to(w) for w in barred):
                names.setdefault(path, f"{k}/{path.relative_to(folder).as_posix() if folder.is_dir() else path.name}")
    if not names:
        raise ValueError(f"no picture in {', '.join(map(images.printable, folders))}; give a folder of PNG, JPEG or WebP")
    return names


@contextlib.contextmanager
def replacing(path):
    """A temporary name beside path; becomes path if the block ends well, disappears if it does not."""
    part = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.part")     # the same after a kill: no litter
    try:
        part.unlink(missing_ok=True)
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# One picture
# ---------------------------------------------------------------------------------------------------------------------

KINDS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "AVIF": ".avif", "BMP": ".bmp", "TIFF": ".tif",
         "GIF": ".gif"}


def look(path):
    """The head of a picture file, without decoding it -> (Pillow's name of the format, width, height, quality of a JPEG
    or None). Raises nearly anything for broken files."""
    if not Path(path).is_file():
        raise ValueError("not a file")      # a pipe would keep us waiting
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as im:
            quality = None
            if im.format in ("JPEG", "MPO") and im.quantization:
                # The IJG library scales the table of ITU-T T.81, annex K, whose 64 numbers add up to 3688.
                percent = 100 * sum(im.quantization[min(im.quantization)]) / 3688
                quality = round(100 - percent / 2 if percent <= 100 else 5000 / percent)
            return im.format, *im.size, quality


def eight_bit(x):
    """(C, H, W) float in [0, 1] -> uint8 (H, W, C), a strip at a time to spare memory."""
    pixels = np.empty((*x.shape[1:], len(x)), np.uint8)
    for y in range(0, len(pixels), 256):
        pixels[y:y + 256] = images.quantize(x[:, y:y + 256], 8)
    return pixels


@functools.lru_cache(maxsize=8)
def srgb_transform(icc, mode):
    """ICC profile, "RGB" or "L" -> Pillow's transform to sRGB, or None where it is broken or would change nothing."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    probe = Image.fromarray(probe).convert(mode)
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, 0x2000)     # with black point compensation
        after = ImageCms.applyTransform(probe, transform)
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError, TypeError):
        return None
    change = np.abs(np.int16(after) - np.int16(probe.convert("RGB"))).max()
    return transform if change > 2 else None        # sRGB by any name, rounded


def in_srgb(picture):
    """images.Picture -> the same with its colours in sRGB, by its ICC profile if it has one (8 bits per sample then)."""
    mode = "L" if images.color_space(picture.icc) == b"GRAY" else "RGB"
    transform = srgb_transform(picture.icc, mode) if picture.icc and (mode == "RGB" or picture.grey) else None
    if transform is None:
        return replace(picture, icc=None)
    rgb = torch.empty_like(picture.rgb)
    for y in range(0, rgb.shape[1], 256):
        strip = Image.fromarray(eight_bit(picture.rgb[:, y:y + 256])).convert(mode)
        strip = np.array(ImageCms.applyTransform(strip, transform))
        rgb[:, y:y + 256] = torch.from_numpy(strip).permute(2, 0, 1).float().div_(255)
    return replace(picture, rgb=rgb, icc=None)


def read(path):
    """File -> images.Picture in sRGB, of an animation its first frame. Raises images.PictureError."""
    return in_srgb(images.read_picture(path))


def detail(pixels):
    """How busy uint8 (H, W, 3) is: the mean step between neighbours."""
    p = pixels.astype(np.int16)
    return np.abs(np.diff(p, axis=0)).mean() + np.abs(np.diff(p, axis=1)).mean()


def busiest(pixels, count=24, side=128):
    """The luma of the squares with most detail: uint8 (H, W, 3) -> float32 (n, side, side), n at most count. They lie
    on a grid of `side` pixels; plain ones are left out, so n is 0 for an empty sheet."""
    places = [(detail(pixels[y:y + side, x:x + side, 1:2]), y, x) for y in range(0, pixels.shape[0] - side + 1, side)
              for x in range(0, pixels.shape[1] - side + 1, side)]
    chosen = [(y, x) for d, y, x in sorted(places, key=lambda p: (-p[0], p[1:]))[:count] if d > 0.5]
    squares = np.array([pixels[y:y + side, x:x + side] for y, x in chosen], np.float32).reshape(-1, side, side, 3)
    return squares @ np.array([0.299, 0.587, 0.114], np.float32)


def sharpness(squares):
    """Luma (n, side, side) -> how much power lies in 0.3..0.5 cycles per pixel against 0.1..0.2, in dB; None without
    squares. Drawings that fill their resolution have -7 to -16; enlarging by 2 leaves the upper band nearly empty, -20
    to -30. The upper quartile of the squares: a painting is soft in most places but rarely in all of them."""
    if not len(squares):
        return None
    side = squares.shape[1]
    window = np.hanning(side + 1)[:side].astype(np.float32)
    squares = (squares - squares.mean((1, 2), keepdims=True)) * window * window[:, None]
    power = np.abs(np.fft.fft2(squares)) ** 2
    along = (power.sum(1) + power.sum(2))[:, :side // 2]
    f = np.arange(side // 2) / side
    high, low = along[:, f >= 0.3].mean(1), along[:, (f >= 0.1) & (f < 0.2)].mean(1)
    return float(np.quantile(10 * np.log10((high + 1e-6) / (low + 1e-6)), 0.75))


def blockiness(squares, jpeg=False):
    """Luma (n, side, side), side a multiple of 8 -> how much an 8-pixel grid shows, in dB; None without squares.

    JPEG cuts a picture into blocks of 8x8 and drops the finest waves of each. So the three highest frequencies of
    8-sample DCTs are weak where these sit on the grid of an earlier JPEG, wherever that begins: the weakest of the 8
    offsets against their median, columns and rows averaged. About 0 without JPEG, 0.5 at quality 95, 6 at 30.
    jpeg: the file is a JPEG, so offset 0 is the file's own grid and counts half."""
    if not len(squares):
        return None
    waves = np.cos(np.pi * np.outer(np.arange(5, 8), 2 * np.arange(8) + 1) / 16) / 2
    length, found = squares.shape[1] - 8, []
    for lines in (squares, squares.transpose(0, 2, 1)):
        strength = sum(np.abs(sum(float(w) * lines[..., i:i + length] for i, w in enumerate(wave))) for wave in waves)
        offsets = np.minimum(strength, 20).sum((0, 1)).reshape(-1, 8).sum(0)       # a hard edge counts no more than 20
        weakness = 10 * np.log10((np.median(offsets) + 1e-3) / (offsets + 1e-3))
        weakness[0] /= 1 + jpeg
        found.append(weakness.max())
    return float(np.mean(found))


def perceptual_hash(pixels):
    """uint8 (H, W, 3) -> 64 bits that survive rescaling and compression (pHash: Zauner 2010): which of the 8x8 lowest
    frequencies of a 32x32 copy are above their median."""
    small = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.BOX), float)
    waves = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)
    low = (waves @ small @ waves.T).round(3).ravel()
    return int("".join("01"[bit] for bit in (low > np.median(low)).tolist()), 2)


FIELDS = ("name", "bytes", "mtime", "problem", "note", "format", "width", "height", "quality", "content", "hash",
          "sharpness", "blocks")


def examine(job, max_pixels=None):
    """(path, name) -> a row of scan.csv: {field: text}, empty where it does not apply. content is a hash of the pixels
    as training sees them. Pictures of more than max_pixels are not decoded: their row has only their size."""
    path, name = job
    row = dict.fromkeys(FIELDS, "") | dict(name=name)
    try:
        row |= dict(zip(("bytes", "mtime"), stamp(path)))
        row["format"], width, height, quality = look(path)
        row |= dict(width=width, height=height, quality=quality or "")
        if max_pixels and width * height > max_pixels:
            return text(row)
    except Exception:       # read names the reason
        pass
    try:
        picture = read(path)
    except images.PictureError as error:
        return text(row | dict(problem=str(error).removeprefix(f"{images.printable(path)}: ")))
    row |= dict(note=picture.note, height=picture.rgb.shape[1], width=picture.rgb.shape[2])
    planes = picture.rgb if picture.alpha is None else torch.cat([picture.rgb, picture.alpha])
    pixels = eight_bit(planes)
    row["content"] = hashlib.blake2b(pixels, key=str(pixels.shape).encode(), digest_size=8).hexdigest()
    if picture.alpha is not None:
        pixels = eight_bit(images.composite(picture, 0.5))
    squares = busiest(pixels)
    figures = sharpness(squares), blockiness(squares, row["format"] in ("JPEG", "MPO"))
    row["hash"] = f"{perceptual_hash(pixels):016x}"
    row["sharpness"], row["blocks"] = ("" if figure is None else f"{figure:.2f}" for figure in figures)
    return text(row)


def text(row):
    return {field: str(value) for field, value in row.items()}


def stamp(path):
    """What tells that a file has not changed since: its size and time, as text; of a missing one nothing."""
    try:
        status = os.stat(path)
        return str(status.st_size), str(status.st_mtime_ns)
    except OSError:
        return "", ""


# ---------------------------------------------------------------------------------------------------------------------
# Decisions, from rows alone
# ---------------------------------------------------------------------------------------------------------------------


class Near:
    """Finds 64-bit hashes that differ from a given one in at most 7 bits: then one of four 16-bit bands differs in at
    most one bit, so 68 look-ups are enough, however many hashes there are."""

    def __init__(self):
        self.bands = {}

    def add(self, code, value):
        for band in range(4):
            self.bands.setdefault((band, code >> 16 * band & 0xffff), []).append((code, value))

    def find(self, code, distance):
        for band in range(4):
            part = code >> 16 * band & 0xffff
            for flip in (0, *(1 << bit for bit in range(16))):
                for other, value in self.bands.get((band, part ^ flip), ()):
                    if (other ^ code).bit_count() <= distance:
                        return value


def decide(rows, naming="hash", min_side=256, max_mp=None, min_sharpness=SHARPNESS, max_blocks=BLOCKS,
           min_quality=QUALITY, distance=DISTANCE):
    """Rows of scan.csv -> a row for each, by name: dict(name, verdict, why, kept_as). Their order plays no part.

    verdict: kept, broken, small, large, jpeg, upscaled, duplicate. Of pictures with the same pixels, or hashes at most
    distance bits apart, the largest of those that are otherwise good stays. kept_as is the name without suffix: the
    content's hash, or with naming "id" the digits that the file's name begins with, if it does."""
    verdicts, good = {}, []
    for row in rows:
        width, height = int(row["width"] or 0), int(row["height"] or 0)
        sharp, blocks = float(row["sharpness"] or 0), float(row["blocks"] or 0)
        if row["problem"]:
            verdict = "broken", row["problem"]
        elif max_mp and width * height > max_mp * 1e6:
            verdict = "large", f"{width}x{height}, {width * height / 1e6:.1f} megapixels of at most {max_mp:g}"
        elif min(width, height) < min_side:
            verdict = "small", f"{width}x{height}, a side below {min_side}"
        elif row["quality"] and int(row["quality"]) < min_quality:
            verdict = "jpeg", f"JPEG of quality {row['quality']}, below {min_quality}"
        elif row["blocks"] and blocks > max_blocks:
            verdict = "jpeg", f"blocks of an earlier JPEG: {blocks:.1f} dB, above {max_blocks:g}"
        elif row["sharpness"] and sharp < min_sharpness:
            verdict = "upscaled", f"no fine detail: {sharp:.1f} dB, below {min_sharpness:g}"
        else:
            good.append((-width * height, blocks, row["content"], row["name"], row))
            continue
        verdicts[row["name"]] = verdict
    near, seen, taken, kept = Near(), {}, set(), {}
    for *_, content, name, row in sorted(good, key=lambda g: g[:4]):
        code = int(row["hash"], 16)
        twin = seen.get(content) or near.find(code, distance)
        if twin:
            verdicts[name] = "duplicate", f"{'same pixels as' if content in seen else 'nearly the same as'} {twin}"
        else:
            seen[content] = name
            near.add(code, name)
            kept[name] = content
    for name, content in sorted(kept.items()):
        number = re.match("[0-9]*", name.rsplit("/", 1)[-1])[0][:60] if naming == "id" else ""
        if number in taken or not number:
            number = f"{number}_{content}".strip("_")
        taken.add(number)
        kept[name] = number
    decisions = [dict(name=n, verdict=v, why=why, kept_as="") for n, (v, why) in verdicts.items()]
    decisions += [dict(name=n, verdict="kept", why="", kept_as=k) for n, k in kept.items()]
    return sorted(decisions, key=lambda d: d["name"])


# ---------------------------------------------------------------------------------------------------------------------
# clean and multiscale
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(file, fields):
    """An open CSV of ours -> its rows; a last line cut short by a kill, or a file with fields of an older version, is cut off.
    ValueError: it is not ours."""
    file.seek(0)
    content = file.read()
    ours(file.name, content, fields)
    whole = content[:content.rfind(b"\n") + 1]
    try:
        rows = list(csv.reader(io.StringIO(whole.decode("utf-8", "replace"), newline="")))
    except csv.Error as e:
        raise ValueError(f"{images.printable(file.name)} is damaged ({e}); remove it, and every picture is looked at again") from None
    if not rows or tuple(rows[0]) != fields:
        rows, whole = [], b""
    if len(whole) < len(content):
        file.truncate(len(whole))
    if not rows:
        file.write(lines([fields]))
    return [dict(zip(fields, row)) for row in rows[1:] if len(row) == len(fields)]


def ours(path, content, fields):
    """ValueError where the CSV path, with these bytes, does not begin as ours do, or those of an older version."""
    header = ",".join(fields).encode()
    if not header.startswith(content) and content.split(b",", 2)[:2] != header.split(b",", 2)[:2]:
        raise ValueError(f"{images.printable(path)} is not from here; choose an empty --out")


def lines(rows):
    memory = io.StringIO()
    csv.writer(memory, lineterminator="\n").writerows(rows)
    return memory.getvalue().encode()


def place(source, target, copy):
    """Puts a link to source, or a copy, at target, unless it is there already."""
    source = os.path.abspath(source)
    if os.path.islink(target):
        there = not copy and os.readlink(target) == source
    else:
        there = target.exists() and stamp(target) == stamp(source)
    if there:
        return
    with replacing(target) as part:
        with contextlib.suppress(OSError):      # links are not allowed everywhere, as on Windows
            if not copy:
                os.symlink(source, part)
        if not os.path.islink(part):
            shutil.copy2(source, part)


def clean(folders, out, copy=False, workers=0, log=print, **rules):
    """Sorts the pictures of folders (files too, folders recursively) -> list of decisions, see decide for the rules.

    out: a folder that gets pictures/ (links, or copies), quarantine/ (what cannot be read), report.csv (a line per
    file) and scan.csv (a line per file as it is looked at). Started again it goes on where it was; files that have not
    changed are not looked at twice. With other rules or pictures, what no longer belongs goes from pictures/ again;
    files that it did not put there stay. workers: processes that read pictures; each holds one in memory.
    ValueError: no picture, or out cannot be used. OSError: cannot write.
    """
    out, folders = Path(out), images.as_paths(folders)
    if not -1 <= rules.get("distance", 0) <= 7:
        raise ValueError(f"--distance goes from -1 to 7; it is {rules['distance']}")
    if any(f.resolve() == out.resolve() for f in folders):
        raise ValueError(f"{images.printable(out)} is the folder of the pictures themselves; choose another --out")
    paths = {}          # names on one line each, so that a line of our files is a row
    for path, name in listing(folders, [out / "pictures", out / "quarantine"]).items():
        paths[images.printable(name.replace("\\", "\\\\"))] = path
    for folder in ("pictures", "quarantine"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    limit = rules.get("max_mp") and rules["max_mp"] * 1e6
    with alone(out / "scan.csv") as file:
        known = {(row["name"], row["bytes"], row["mtime"]): row for row in rows_of(file, FIELDS)}
        rows, todo = [], []
        for name, path in paths.items():
            row = known.get((name, *stamp(path)))
            # What could not be read may be readable now; what was too large to decode, within a new limit.
            if row and (row["content"] or limit and int(row["width"] or 0) * int(row["height"] or 0) > limit):
                rows.append(row)
            else:
                todo.append((path, name))
        if rows:
            log(f"{len(rows)} of {len(paths)} pictures were looked at before")
        for _, row in in_parallel(functools.partial(examine, max_pixels=limit), todo, workers, "looking at"):
            rows.append(row)
            if known.get((row["name"], row["bytes"], row["mtime"])) != row:
                file.write(lines([row.values()]))
                file.flush()
            if row["note"] or row["problem"]:
                images.ProgressLine.clear()
                log(f"{row['name']}: {row['note'] or row['problem']}")

        decisions, formats = decide(rows, **rules), {row["name"]: row["format"] for row in rows}
        for row in decisions:
            path = paths[row["name"]]
            if row["verdict"] == "kept":
                row["kept_as"] = f"pictures/{row['kept_as']}{KINDS.get(formats[row['name']], path.suffix.lower())}"
            elif row["verdict"] == "broken":
                row["kept_as"] = f"quarantine/{zlib.crc32(row['name'].encode()):08x} {images.printable(path.name)[-50:]}"
        report, fields = out / "report.csv", ("name", "verdict", "why", "kept_as")
        before = {}
        if report.exists():
            content = report.read_bytes()
            ours(report, content, fields)
            before = {row["kept_as"]: row["name"] for row in csv.DictReader(io.StringIO(content.decode(errors="replace")))
                      if re.fullmatch("(pictures|quarantine)/[^/]+", row.get("kept_as") or "")}
        targets = {row["kept_as"]: row["name"] for row in decisions if row["kept_as"]}
        strange = [t for t in targets if t not in before and os.path.lexists(out / t)]
        if strange:
            raise ValueError(f"{images.printable(out / strange[0])} is not from here; choose an empty --out")
        going = [t for t in before if t not in targets]
        # A number may be another picture's now; a hash is the same pixels, whatever their file is called.
        taken = [t for t in before if t in targets and targets[t] != before[t]] if rules.get("naming") == "id" else []
        for target in going + taken:
            there, given = out / target, [paths.get(before[target]), paths.get(targets.get(target))]
            is_copy = target.startswith("pictures") and there.is_file() and not there.is_symlink()
            if is_copy and stamp(there) not in [stamp(path) for path in given if path]:
                raise ValueError(f"{images.printable(there)} is a copy of a picture that is not given this time, perhaps the "
                                 "last; choose an empty --out")
        for target, name in targets.items():
            there, newer = out / target, int(stamp(out / target)[1] or 0) - int(stamp(paths[name])[1] or 0)
            if newer > 2e9 and not there.is_symlink() and stamp(there) not in {key[1:] for key in known}:   # 2 s: FAT
                raise ValueError(f"{images.printable(there)} was edited since it was put there; move it away, or to "
                                 f"{images.printable(paths[name])}")
        if going:
            log(f"{len(going)} pictures of an earlier run go from {images.printable(out)}")
        # In this order whatever lies in pictures/ is named in the report at any time, so the next run knows it as ours.
        for target in going:
            (out / target).unlink(missing_ok=True)
        with replacing(report) as part:
            part.write_bytes(lines([fields, *([row[f] for f in fields] for row in decisions)]))
        start = time.time()
        for i, (target, name) in enumerate(targets.items()):
            progress("copying" if copy else "linking", i, len(targets), start)
            try:
                place(paths[name], out / target, copy)
            except OSError:
                if target.startswith("pictures"):
                    raise           # of what cannot be read, the line in the report is enough
        images.ProgressLine.clear()
    counts = Counter(row["verdict"] for row in decisions)
    dropped = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()) if verdict != "kept")
    log(f"{images.printable(out / 'pictures')}: {counts['kept']} of {len(rows)} pictures; dropped: {dropped or 'none'}")
    return decisions


SCALES = {"075": 3 / 4, "050": 1 / 2, "033": 1 / 3}        # Real-ESRGAN's, and the shortest side 400
SHORTEST = 400


def smaller(job, min_side):
    """(path, target without its ending) -> how many copies were made, or the exception that says why none were."""
    path, stem = job
    picture = None
    try:
        try:
            width, height = look(path)[1:3]
        except Exception:       # read says what is wrong
            picture = read(path)
            height, width = picture.rgb.shape[1:]
        short = min(width, height)
        factors = {**SCALES, str(SHORTEST): SHORTEST / short}
        factors = {f"{stem}_{ending}.png": f for ending, f in factors.items() if f < 1 and round(short * f) >= min_side}
        changed = max(os.stat(path).st_mtime_ns, os.lstat(path).st_ctime_ns)      # an older picture may take its place
        todo = {Path(t): f for t, f in factors.items()      # clocks tick slowly: of one age may be of the one before
                if not os.path.exists(t) or os.stat(t).st_mtime_ns <= changed}
        if not todo:
            return 0
        picture = picture or read(path)
        planes = picture.rgb if picture.alpha is None else torch.cat([picture.rgb, picture.alpha])
        image = Image.fromarray(eight_bit(planes))
        for target, factor in todo.items():
            memory = io.BytesIO()
            size = [max(1, round(side * factor)) for side in image.size]
            image.resize(size, Image.Resampling.LANCZOS).save(memory, "PNG", compress_level=3)     # 6: thrice the time
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as part:
                part.write_bytes(memory.getbuffer())
        return len(todo)
    except (images.PictureError, OSError) as error:
        return error


def multiscale(folders, out, min_side=128, workers=0, log=print):
    """Smaller copies of pictures, antialiased (Lanczos), sRGB PNG -> how many were made. NAME becomes NAME_075.png,
    NAME_050.png, NAME_033.png and NAME_400.png (shortest side 400) in the same sub-folders of out; none is larger than
    its picture or has a side below min_side. Copies that are there and younger than their picture are not made again.
    ValueError: no picture, two of one name. OSError: cannot write."""
    stems = {}
    for path, name in listing(folders, [out]).items():
        name = name.split("/", 1)[1]
        stem = name[:len(name) - len(path.suffix)]
        if len(os.fsencode(path.name)) > 240:      # too long a name with our ending
            stem = f"{stem[:len(stem) - len(path.stem) + 40]}_{zlib.crc32(os.fsencode(name)):08x}"
        other = stems.setdefault(str(Path(out) / stem), path)
        if other != path:
            raise ValueError(f"{images.printable(other)} and {images.printable(path)} would have copies of the same name; "
                             "rename one, or clean the pictures first, which names them apart")
    made = bad = 0
    jobs = [(path, stem) for stem, path in stems.items()]
    for (path, _), result in in_parallel(functools.partial(smaller, min_side=min_side), jobs, workers, "reducing"):
        if isinstance(result, images.PictureError):
            images.ProgressLine.clear()
            log(f"skipped: {result}")
            bad += 1
        elif isinstance(result, OSError):
            raise result
        else:
            made += result
    log(f"{images.printable(out)}: {made} copies made of {len(jobs)} pictures; {bad} unreadable")
    copies = {f"{stem}_{ending}.png" for stem in stems for ending in (*SCALES, SHORTEST)}
    others = [p for p in images.find_pictures([Path(out)]) if str(p) not in copies] if Path(out).is_dir() else []
    if others:
        log(f"{len(others)} pictures in {images.printable(out)} are copies of none of these, as {images.printable(others[0])}; "
            "training reads them too, so delete what is not wanted")
    return made
