"""data.py: folders of pictures -> one file of patches -> batches.

    python data.py demo runs/demo                         # 28 + 6 drawn wallpapers in runs/demo/train and runs/demo/val
    python data.py clean DOWNLOADS -o CLEAN               # which are worth it: CLEAN/pictures, CLEAN/report.csv
    python data.py multiscale CLEAN/pictures -o CLEAN/smaller
    python data.py pack CLEAN/pictures CLEAN/smaller -o patches.safetensors --size 256
    python data.py mine CLEAN/pictures CLEAN/smaller -o mined.safetensors          # the detailed part of that
    python data.py stats CLEAN/pictures mined.safetensors --sheet sheet.png

Decoding a picture to cut one crop out of it costs many times more than the crop is worth, so every picture is decoded
once, cut into square patches, and all patches lie in one memory-mapped safetensors file. A batch is a pure function
of (seed, step), whatever the number of worker processes; that is what makes resuming exact. Whatever takes long is
taken up where it was when the same command is started again.

Needs torch, numpy, Pillow, and clean.py, degrade.py, tile.py and demo.py beside it.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import degrade
import images
import tile
from clean import (BLOCKS, DISTANCE, QUALITY, SCALES, SHARPNESS, SHORTEST, alone, clean, detail, eight_bit, in_parallel,
                   listing, look, multiscale, progress, quiet_worker, read, replacing)
from demo import draw_demo

# ---------------------------------------------------------------------------------------------------------------------
# A patch file is a safetensors file of
#   patches  uint8 (N, size, size, 3)
#   lr       uint8 (N, size / scale, size / scale, 3), where pairs were packed
#   names    uint8, the names of the pictures as text, one on a line
#   picture  int32 (N), which of them each patch was cut from, and detail float32 (N), see there
# ---------------------------------------------------------------------------------------------------------------------

HEADER = 16384      # bytes kept for the header: it holds the number of patches, known only when all are written
DTYPES = {"U8": np.uint8, "I32": np.int32, "F32": np.float32}


def read_head(path):
    """-> (metadata, {tensor: (dtype, shape, byte where it begins)}) of a patch file. ValueError if it is none, or cut
    short."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(length) if length <= HEADER else b"")
        meta, end, tensors = head.pop("__metadata__"), 0, {}
        for name, entry in head.items():
            dtype, shape, begin = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"][0]
            tensors[name] = dtype, shape, 8 + length + begin
            end = max(end, 8 + length + begin + int(np.prod(shape)) * dtype.itemsize)
        _, size, _, _ = tensors["patches"][1]
        meta["fingerprint"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a patch file; make one with: python data.py pack FOLDER -o FILE") from None
    if os.path.getsize(path) != end:
        raise ValueError(f"{path} is cut short or overlong; delete it and pack its pictures again")
    return meta, tensors


def read_header(path):
    """-> (metadata, N, size) of a patch file. ValueError if it is none, or cut short."""
    meta, tensors = read_head(path)
    return meta, *tensors["patches"][1][:2]


def read_tensor(path, name):
    """A tensor of a patch file, memory-mapped, or None if it has none of that name. ValueError as read_header."""
    tensors = read_head(path)[1]
    if name not in tensors:
        return None
    dtype, shape, at = tensors[name]
    return np.memmap(path, dtype, "r", at, shape)


def seal(files, size, meta, names, picture, details):
    """Makes a patch file of the first of files, which are open: it holds the patches, after room for the header. If
    there is a second, it holds the LR patches, which are copied over."""
    file, n, scale = files[0], len(picture), int(meta.get("scale", 1))
    shapes = dict(patches=("U8", [n, size, size, 3]))
    file.seek(0, 2)
    if files[1:]:
        files[1].seek(0)
        shutil.copyfileobj(files[1], file, 2 ** 24)
        shapes["lr"] = "U8", [n, size // scale, size // scale, 3]
    names = "\n".join(names).encode()
    names += b"\n" * (-(file.tell() - 8 - HEADER + len(names)) % 4)     # what follows begins at a multiple of 4
    for content in (names, np.asarray(picture, np.int32), np.asarray(details, np.float32)):
        file.write(content)
    shapes |= dict(names=("U8", [len(names)]), picture=("I32", [n]), detail=("F32", [n]))
    head, end = {"__metadata__": {k: str(v) for k, v in meta.items()}}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
        head[name] = dict(dtype=dtype, shape=shape, data_offsets=[begin, end])
    file.seek(0)
    file.write(HEADER.to_bytes(8, "little") + json.dumps(head).encode().ljust(HEADER))


def packed_before(out, fingerprint, overwrite, log):
    """Whether the patch file out is there and made from just this. ValueError: it is something else altogether."""
    if not out.exists() or overwrite:
        return False
    try:
        meta, n, _ = read_header(out)
        if meta["fingerprint"] == fingerprint:
            log(f"{out}: {n} patches, packed before")
            return True
        log(f"{out}: its pictures have changed, packing again")
    except ValueError as error:
        if not str(error).startswith(f"{out} is cut short"):
            raise ValueError(f"{out} exists and is not a patch file; choose another name or --overwrite") from None
        log(f"{out} was cut short, packing again")
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Pictures -> patches
# ---------------------------------------------------------------------------------------------------------------------


def draws(name):
    """Random numbers that a name stands for."""
    return np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogateescape")))


def ground(name, height, width):
    """What lies behind a transparent picture: (3, H, W) in [0, 1], plain, a gradient or soft lumps, drawn by name."""
    rng = draws(name)
    cells = rng.choice([1, 2, int(rng.integers(4, 12))])
    grid = rng.integers(0, 256, 3) + rng.normal(0, 45 if cells > 1 else 0, (cells, cells, 3))
    image = Image.fromarray(np.uint8(grid.clip(0, 255))).resize((width, height), Image.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def cut(rgb, size, step=1):
    """All of a picture as squares: (3, H, W) in [0, 1] -> uint8 (n, size, size, 3), overlapping no more than needed,
    each beginning at a multiple of step (of which size is one, and H and W are)."""
    pixels = eight_bit(rgb)
    h, w = pixels.shape[:2]
    pixels = np.pad(pixels, ((0, max(0, size - h)), (0, max(0, size - w)), (0, 0)), "symmetric")
    starts = [np.linspace(0, (side - size) // step, -(-side // size)).round().astype(int) * step
              for side in pixels.shape[:2]]
    return np.stack([pixels[y:y + size, x:x + size] for y in starts[0] for x in starts[1]])


PLAIN = 0.02        # detail below which a patch is one colour: nothing to learn from


def choose(details, count, soft, rng):
    """Which patches to keep -> count sorted indices, or fewer: those with most detail, and a share `soft` of others
    drawn from the calmer half of what is left, so that skies and blur are not forgotten. Plain ones never."""
    details = np.asarray(details, np.float32)
    order = np.argsort(-details, kind="stable")
    order = order[details[order] > PLAIN]
    count = min(count, len(order))
    calm = round(count * soft)
    busy, others = order[:count - calm], order[count - calm:]
    calmer = others[min(len(others) // 2, len(others) - calm):]
    return np.sort(np.concatenate([busy, rng.permutation(calmer)[:calm]]))


class Unsuitable(ValueError):
    """A picture that can be read, but not be packed."""


def patches_of(job, size, seed, min_side, scale, per_picture, soft):
    """(path, name, path of the LR picture or None) -> (patches, LR patches or None, their details, remark or ""), or
    the exception that says why there are none."""
    path, name, lr_path = job
    try:
        pictures = [read(path)]
        h, w = pictures[0].rgb.shape[1:]
        if min(h, w) < min_side:
            raise Unsuitable(f"{images.printable(path)}: {w}x{h}, a side below {min_side}")
        if lr_path:
            pictures.append(read(lr_path))
            lh, lw = pictures[1].rgb.shape[1:]
            if (h // scale, w // scale) != (lh, lw):
                raise Unsuitable(f"{images.printable(lr_path)}: {lw}x{lh}, but {w}x{h} is to be {scale} times as large")
            h, w = lh * scale, lw * scale
        one_opaque = len({p.alpha is None for p in pictures}) > 1      # laid on white already, as degrade.py does
        rgbs = [p.rgb if p.alpha is None else
                images.composite(p, 1.0 if one_opaque else ground(f"{seed}/{name}", *p.rgb.shape[1:])) for p in pictures]
        hr, lr = cut(rgbs[0][:, :h, :w], size, scale), cut(rgbs[1], size // scale) if lr_path else None
        details = np.array([detail(p) for p in hr]).round(3)
        if per_picture:
            chosen = choose(details, per_picture, soft, draws(f"{seed}/{images.printable(name)}"))
            hr, lr, details = hr[chosen], lr[chosen] if lr_path else None, details[chosen]
    except (images.PictureError, Unsuitable) as error:
        return error
    return hr, lr, details.tolist(), pictures[0].note and f"{images.printable(path)}: {pictures[0].note}"


def partners(names, lr):
    """{path: name}, folders of LR pictures -> {path: the LR picture of that name, whatever its suffix}, the scale."""
    def stem(name):         # é may be one character or two, as on disks of a Mac
        return unicodedata.normalize("NFC", name.rsplit(".", 1)[0])

    by_name, found, scale = {}, {}, None
    for path, name in listing(lr).items():
        by_name.setdefault(stem(name), []).append(path)
    for path, name in names.items():
        there = by_name.get(stem(name))
        if there:
            found[path] = min(there, key=lambda p: (p.suffix != path.suffix, p))
            if not scale:
                with contextlib.suppress(Exception):        # broken ones are named later
                    scale = round(max(look(path)[1:3]) / max(look(found[path])[1:3]))
    if not scale:
        raise ValueError("no LR picture that can be read has the name of one of the others: pairs go by their names")
    return found, scale


def place_of(path):
    """Where a file lies, however its folder is spelled; a link itself, not what it leads to."""
    path = Path(path)
    return path.parent.resolve() / path.name


def planned(folders, size, seed, min_side, lr, per_picture, soft, without):
    """What pack will do -> (jobs for patches_of, scale of pairs or 1, names without a partner, fingerprint)."""
    if not 1 <= min_side <= size:
        raise ValueError(f"pictures of side {min_side} do not fit patches of size {size}; raise the size")
    without = {place_of(path) for path in without}
    names = {path: name for path, name in listing(folders).items() if not without or place_of(path) not in without}
    found, scale = partners(names, lr) if lr else (dict.fromkeys(names), 1)
    if size % scale:
        raise ValueError(f"patches of size {size} cannot be had {scale} times smaller; use a multiple of {scale}")
    jobs = [(path, name, found[path]) for path, name in names.items() if path in found]
    stats = [(name, p.stat().st_size, p.stat().st_mtime_ns) for path, name, other in jobs for p in (path, other)
             if p and p.exists()]
    key = json.dumps([2, size, seed, min_side, scale, per_picture, soft, stats])    # 2: how it is packed
    return jobs, scale, [n for p, n in names.items() if p not in found], hashlib.sha256(key.encode()).hexdigest()


def hold_out(folders, place, count=8, side=512):
    """Sets a tenth of the pictures of folders aside to validate on, `count` at most, chosen by a hash of their names: the
    same whenever it is asked. Of each the square of `side` pixels with most detail becomes a PNG in a folder under place.
    Returns (that folder, the paths of the pictures and of the copies that multiscale made of them). ValueError: fewer
    than 10 pictures that can be read."""
    names, held, family = listing(folders), {}, {}
    for path in sorted(names, key=lambda p: (len(names[p]), names[p])):     # a picture comes before its copies
        stem = str(Path(names[path].split("/", 1)[1]).with_suffix(""))      # without the number of its folder
        family.setdefault(re.sub(rf"_({'|'.join(SCALES)}|{SHORTEST})$", "", stem), []).append(path)
    firsts = {paths[0]: paths for paths in family.values()}
    for path in sorted(firsts, key=lambda p: (zlib.crc32(names[p].encode("utf-8", "surrogateescape")), names[p])):
        if len(held) == min(count, len(firsts) // 10):
            break
        try:
            p = read(path)
        except images.PictureError:
            continue
        if min(p.rgb.shape[1:]) < 64:       # an icon; SSIM needs 11 pixels inside the border
            continue
        rgb = p.rgb if p.alpha is None else images.composite(p, ground(names[path], *p.rgb.shape[1:]))
        held[path] = max(cut(rgb, min(side, *rgb.shape[1:])), key=detail)
    if not held:
        raise ValueError("too few pictures to set some aside for validation; name a folder of others with --val, or give 10")
    code = zlib.crc32(b"".join(square.tobytes() for square in held.values()))
    folder = Path(place) / f"val-{code:08x}"
    folder.mkdir(parents=True, exist_ok=True)
    for i, square in enumerate(held.values()):
        with images.atomic_path(folder / f"{i}.png") as part:
            Image.fromarray(square).save(part, "PNG")
    return folder, [p for path in held for p in firsts[path]]


def pack(folders, out, size=256, seed=0, min_side=128, log=print, overwrite=False, lr=None, per_picture=0, soft=0.1,
         workers=0, without=()):
    """Packs every picture of folders (files too, folders recursively) into the patch file out; -> Path(out).

    size: side of a patch. Pictures with a side below min_side (the HR patch that training cuts) are skipped, those
    between min_side and size are mirrored outwards; unreadable ones are named, counted and skipped. Colours are brought
    to sRGB; of an animation the first frame is taken. seed varies the grounds behind transparent pictures. lr: a folder
    of the same pictures a whole number of times smaller, under the same names (as many folders as there are), whose
    patches are stored along. per_picture: of each picture at most so many patches, see choose. An out made from
    the same pictures is reused, one made from others rebuilt; any other file there is left alone unless overwrite.
    without: paths to leave out. workers: processes that decode; each holds one picture in memory. Stopped or killed, it leaves out.part and
    out.rows.part, and the same call goes on from there. A single patch file in place of folders is returned as it is.
    ValueError: no such folder, no picture in it, none usable, min_side above size. OSError: cannot write.
    """
    folders, out = images.as_paths(folders), Path(out)
    if len(folders) == 1 and folders[0].suffix == ".safetensors" and folders[0].is_file():
        log(f"{folders[0]}: {read_header(folders[0])[1]} patches, taken as they are")
        return folders[0]
    jobs, scale, single, fingerprint = planned(folders, size, seed, min_side, lr, per_picture, soft, without)
    if packed_before(out, fingerprint, overwrite, log):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    part, lr_part, rows_part = (out.with_name(f"{out.name}{ending}.part") for ending in ("", ".lr", ".rows"))
    start, stores = time.time(), [(part, 8 + HEADER, size * size * 3)]      # file, bytes before its patches, bytes of each
    if lr:
        stores.append((lr_part, 0, (size // scale) ** 2 * 3))
    with alone(rows_part) as rows:
        if packed_before(out, fingerprint, overwrite, lambda _: None):      # by the process that we waited for
            rows_part.unlink()
            return out
        # rows: the fingerprint, then a line for each picture that is done: [name, details of its patches, why skipped]
        rows.seek(0)
        length = done = n = 0
        for line in rows:
            if not line.endswith(b"\n") or not length and line.strip() != fingerprint.encode():
                break
            if length:
                done, n = done + 1, n + len(json.loads(line)[1])
            length += len(line)
        if any(n and (not p.exists() or p.stat().st_size < head + n * each) for p, head, each in stores):
            length = done = n = 0
        rows.truncate(length)
        if not length:
            rows.write(fingerprint.encode() + b"\n")
        if done:
            log(f"{out}: going on after {done} of {len(jobs)} pictures")
        if single:
            log(f"skipped: {len(single)} pictures without a partner of the same name, as {images.printable(single[0])}")

        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(p, "r+b" if p.exists() else "w+b")) for p, _, _ in stores]
            for file, (_, head, each) in zip(files, stores):
                file.truncate(head + n * each)
                file.seek(0, 2)
            job = functools.partial(patches_of, size=size, seed=seed, min_side=min_side, scale=scale,
                                    per_picture=per_picture, soft=soft)
            for (path, name, _), result in in_parallel(job, jobs[done:], workers, "packing"):
                details, why = [], ""
                if isinstance(result, Exception):
                    why, remark = "small" if isinstance(result, Unsuitable) else "unreadable", f"skipped: {result}"
                else:
                    *patches, details, remark = result
                    for file, some in zip(files, patches):
                        file.write(some)
                        file.flush()        # before the line that says they are there
                rows.write(json.dumps([images.printable(name), details, why]).encode() + b"\n")
                rows.flush()
                if remark:
                    images.ProgressLine.clear()
                    log(remark)
            rows.seek(0)
            rows.readline()
            done = [(name, np.array(details, np.float32), why) for name, details, why in map(json.loads, rows)]
            small, bad = ([name for name, _, why in done if why == kind] for kind in ("small", "unreadable"))
            counts = [len(details) for _, details, _ in done]
            n = sum(counts)
            if n:
                meta = dict(fingerprint=fingerprint, pictures=len(done) - len(small) - len(bad), too_small=len(small),
                            unreadable=len(bad), skipped=", ".join(small + bad)[:1000], **(dict(scale=scale) if lr else {}))
                seal(files, size, meta, [name for name, _, _ in done], np.repeat(np.arange(len(done)), counts),
                     np.concatenate([details for _, details, _ in done]))
        if n:
            os.replace(part, out)
        for leftover in (part, lr_part, rows_part):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
    if not n:
        raise ValueError(f"none of {len(jobs)} pictures is usable ({len(bad)} unreadable, {len(small)} with a side "
                         f"below {min_side}); give larger pictures or train with a smaller patch")
    log(f"{out}: {n} patches of {size}x{size} from {meta['pictures']} pictures in {time.time() - start:.0f} s"
        + (f"; skipped {len(bad)} unreadable and {len(small)} small" if bad or small else ""))
    return out


def mine(inputs, out, size=256, keep=0.5, per_picture=32, soft=0.1, seed=0, min_side=128, log=print, overwrite=False,
         lr=None, workers=0):
    """The patches worth most, of folders of pictures or of patch files, into the patch file out; -> Path(out).

    Of each picture at most per_picture patches stand for election, and of all these the share keep is taken, both by
    choose: those with most detail, and a share `soft` of calm ones. Pictures give the same result as a patch file of
    them. size, min_side, lr, seed, workers, overwrite: see pack, which is taken up where it was; the rest is copying.
    ValueError: as pack, and for patch files that do not go together. OSError: cannot write.
    """
    inputs, out = images.as_paths(inputs), Path(out)
    if not (0 < keep <= 1 and 0 <= soft <= 1 and per_picture >= 1):
        raise ValueError(f"--keep {keep:g}, --soft {soft:g} and --per-picture {per_picture} do not work; the first two "
                         "are shares, from 0 to 1, the third a whole number")
    files = [f for f in inputs if f.suffix == ".safetensors"]
    folders = [f for f in inputs if f.suffix != ".safetensors"]
    if out.resolve() in [f.resolve() for f in files]:
        raise ValueError(f"{out} is what the patches are taken from; choose another --out")
    heads = [read_header(f) for f in files]
    origins = [meta["fingerprint"] for meta, _, _ in heads]
    kinds = {(side, int(meta.get("scale", 0))) for meta, _, side in heads}
    if folders:
        _, scale, _, fingerprint = planned(folders, size, seed, min_side, lr, per_picture, soft, ())
        origins.append(fingerprint)
        kinds.add((size, scale if lr else 0))
    if len(kinds) > 1:
        raise ValueError("what is given differs in the size of its patches, or only some holds pairs; give one kind")
    size, scale = kinds.pop()
    fingerprint = hashlib.sha256(json.dumps(["mined", keep, per_picture, soft, seed, origins]).encode()).hexdigest()
    if packed_before(out, fingerprint, overwrite, log):
        return out
    candidates, lock = out.with_name(out.name + ".candidates"), out.with_name(out.name + ".mine.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    with alone(lock):
        try:
            if packed_before(out, fingerprint, overwrite, lambda _: None):      # by the process that we waited for
                return out
            if folders:
                files.append(pack(folders, candidates, size, seed, min_side, log, False, lr, per_picture, soft, workers))
            log(elect(files, out, size, scale, fingerprint, keep, per_picture, soft, seed))
            if folders:
                with contextlib.suppress(OSError):
                    candidates.unlink()
        finally:
            with contextlib.suppress(OSError):      # Windows removes nothing that is open
                lock.unlink()
    return out


def elect(files, out, size, scale, fingerprint, keep, per_picture, soft, seed):
    """Writes into the patch file out what mine keeps of those in files -> what it says of that."""
    whole, names, entries, ranks = [], [], [], []       # entries: file, place in it, picture; ranks: their detail
    for k, file in enumerate(files):
        patches, details, picture = (read_tensor(file, name) for name in ("patches", "detail", "picture"))
        whole.append([patches, read_tensor(file, "lr")])
        if picture is None:         # packed by an older version: every patch counts as a picture
            picture, text = np.arange(len(patches)), [f"{file.name} {i}" for i in range(len(patches))]
            details = np.array([detail(p) for p in patches])
        else:
            text = read_tensor(file, "names").tobytes().decode().split("\n")
        starts = np.searchsorted(picture, np.arange(picture[-1] + 2))
        for i, (begin, end) in enumerate(zip(starts, starts[1:])):
            chosen = begin + choose(details[begin:end], per_picture, soft, draws(f"{seed}/{text[i]}"))
            entries.append(np.stack([np.full_like(chosen, k), chosen, np.full_like(chosen, len(names) + i)]))
            ranks.append(np.array(details[chosen]))
        names += text[:picture[-1] + 1]
    entries, ranks = np.concatenate(entries, 1), np.concatenate(ranks)
    chosen = choose(ranks, max(1, round(keep * len(ranks))), soft, np.random.default_rng(seed))
    if not len(chosen):
        raise ValueError("not one patch has any detail; give other pictures")

    start = time.time()
    used, picture = np.unique(entries[2, chosen], return_inverse=True)
    meta = dict(fingerprint=fingerprint, pictures=len(used), too_small=0, unreadable=0, skipped="",
                **(dict(scale=scale) if scale else {}))
    with replacing(out) as part, contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(part, "w+b"))]
        if scale:
            opened.append(stack.enter_context(tempfile.TemporaryFile(dir=out.parent)))
        opened[0].seek(8 + HEADER)
        for i, (k, place) in enumerate(entries[:2, chosen].T):
            progress("mining", i, len(chosen), start, "patches")
            for file, source in zip(opened, whole[k]):
                file.write(source[place])
        images.ProgressLine.clear()
        seal(opened, size, meta, [names[u] for u in used], picture, ranks[chosen])
    return f"{out}: {len(chosen)} of {sum(len(w[0]) for w in whole)} patches, from {len(used)} pictures"


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class Batches(torch.utils.data.Dataset):
    """batches[step] -> (lr (B, 3, p, p), hr (B, 3, p * scale, p * scale)), float32 in [0, 1].

    patch_files: one path or several. patch: side p of the LR crop, or several, of which every step draws one; B is
    batch for the smallest and less for larger ones, in proportion to their area. recipe: a name or mix that
    degrade.degrade knows. Every patch has its turn once an epoch, in an order of its own (a step of larger crops, which are
    fewer, passes the rest of its turns over; with shares: each file's share of
    the places, its patches at random); of each a random crop, flipped and turned one of 8 ways. busiest n: each place
    of the batch goes to the one of n crops (of n patches) that has the most detail. Of files that hold pairs the LR
    is theirs, cut out where it belongs, whatever the recipe; they mix with others.
    What a step holds depends on (seed, step) alone. With several ranks each makes its share: rank r of n the r-th of n
    parts of what one rank would make of batch * n, larger crops to a rounding. ValueError: a broken patch file, patches too
    small for the crop.
    """

    def __init__(self, patch_files, steps, batch, patch, scale, recipe, seed, busiest=1, shares=None, rank=0, ranks=1):
        self.files = images.as_paths(patch_files)
        self.patches = [patch] if isinstance(patch, int) else sorted(patch)
        self.steps, self.batch, self.scale, self.recipe, self.seed = steps, batch, scale, recipe, seed
        self.busiest, self.shares, self.rank, self.ranks = busiest, shares, rank, ranks
        self.maps, self.order = None, (None, None)
        heads, largest = [read_head(f) for f in self.files], self.patches[-1]
        for file, (meta, tensors) in zip(self.files, heads):
            size = tensors["patches"][1][1]
            if "lr" in tensors and int(meta["scale"]) != scale:
                raise ValueError(f"{file} holds pairs of scale {meta['scale']}, not {scale}; train with that scale")
            if size < largest * scale:
                raise ValueError(f"{file} holds patches of {size}, but LR crops of {largest} at scale {scale} need "
                                 f"{largest * scale}; pack again with a larger size or train with a smaller patch")
        self.ends = np.cumsum([tensors["patches"][1][0] for _, tensors in heads])

    def __len__(self):
        return self.steps

    def __getstate__(self):     # to a worker process: the paths go along, the open files do not
        return {**self.__dict__, "maps": None}

    def count(self, patch):
        """How many patches of that side a batch holds."""
        return max(1, round(self.batch * (self.patches[0] / patch) ** 2))

    def shuffled(self, epoch):
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng((self.seed, epoch, 1)).permutation(self.ends[-1])
        return self.order[1]

    def __getitem__(self, step):
        if not 0 <= step < self.steps:
            raise IndexError(step)
        if self.maps is None:
            self.maps = [(read_tensor(f, "patches"), read_tensor(f, "lr")) for f in self.files]
        rng, n, count = np.random.default_rng((self.seed, step)), self.busiest, int(self.ends[-1])
        patch = self.patches[rng.integers(len(self.patches)) if len(self.patches) > 1 else 0]
        batch, side = self.count(patch), patch * self.scale
        every, mine = batch * self.ranks, slice(self.rank * batch, (self.rank + 1) * batch)
        if self.shares is None:
            first = step * self.batch * self.ranks * n
            places = [divmod(first + k, count) for k in range(every * n)]
            places = np.array([self.shuffled(epoch)[k] for epoch, k in places])
        else:
            file = rng.choice(len(self.files), every, p=np.array(self.shares) / sum(self.shares)).repeat(n)
            lengths = np.diff(self.ends, prepend=0)
            places = self.ends[file] - 1 - (rng.random(every * n) * lengths[file]).astype(int)
        corners, turns = rng.random((every, n, 2)), rng.integers(8, size=every)[mine]
        seeds = rng.integers(0, 2 ** 31, every)[mine].tolist()
        hr, lr = np.empty((batch, side, side, 3), np.uint8), np.empty((batch, patch, patch, 3), np.uint8)
        lone = []       # those without an LR picture of their own
        for b, (where, at) in enumerate(zip(places.reshape(every, n)[mine], corners[mine])):
            crops = []
            for k, corner in zip(where, at):
                file = int(np.searchsorted(self.ends, k, "right"))
                whole, small = self.maps[file]
                grid = 1 if small is None else self.scale       # of a pair, crops begin where an LR pixel does
                y, x = (corner * ((whole.shape[1] - side) // grid + 1)).astype(int) * grid
                k = k - self.ends[file]     # counted from the file's end: negative, as Python likes
                crops.append([whole[k, y:y + side, x:x + side]])
                if small is not None:
                    y, x = y // grid, x // grid
                    crops[-1].append(small[k, y:y + patch, x:x + patch])
            crop = max(crops, key=lambda c: detail(c[0])) if n > 1 else crops[0]
            for batch_of, pixels in zip((hr, lr), crop):
                turned = np.rot90(pixels, turns[b] % 4)
                batch_of[b] = turned[:, ::-1] if turns[b] > 3 else turned
            if len(crop) == 1:
                lone.append(b)
        hr, lr = (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().float().div_(255) for x in (hr, lr))
        if lone:
            lr[lone] = degrade.degrade(hr[lone], self.recipe, self.scale, [seeds[b] for b in lone])
        return lr, hr


def loader(batches, start, workers):
    """Batches from step start on, in order, read and degraded by that many worker processes (0: in this one)."""
    return torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(start, len(batches)),
                                       num_workers=workers, worker_init_fn=quiet_worker,
                                       generator=torch.Generator(),     # not the global one: it is the network's
                                       prefetch_factor=4 if workers else None, pin_memory=torch.cuda.is_available())


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a set
# ---------------------------------------------------------------------------------------------------------------------

CELL = 160      # pixels a picture has on the sheet, 8 in a row


def draw_sheet(path, cells):
    """[(label, uint8 (h, w, 3))] -> a PNG that shows them all."""
    sheet = Image.new("RGB", (8 * (CELL + 8), -(-len(cells) // 8) * (CELL + 24)), (40, 40, 40))
    for i, (label, pixels) in enumerate(cells):
        x, y = i % 8 * (CELL + 8) + 4, i // 8 * (CELL + 24) + 4
        image = Image.fromarray(pixels)
        image.thumbnail((CELL, CELL), Image.Resampling.BOX)
        sheet.paste(image, (x, y))
        ImageDraw.Draw(sheet).text((x, y + CELL + 2), label, (255, 255, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        sheet.save(part, "PNG")


def glance(path, whole):
    """Path -> (format, width, height, None or, if whole, (mean detail of its patches, thumbnail)), or None"""
    try:
        head, seen = look(path)[:3], None
        if whole:
            rgb = images.composite(read(path), 1.0)
            image = Image.fromarray(eight_bit(rgb))
            image.thumbnail((CELL, CELL), Image.Resampling.BOX)
            seen = np.mean([detail(p) for p in cut(rgb, 256)]), np.asarray(image)
        return *head, seen
    except Exception:       # broken in one way or another
        return None


def stats(inputs, sheet=None, sample=192, log=print, workers=0, overwrite=True):
    """Says how many, how large and how detailed pictures (in folders) and patches (in patch files) are; figures as
    least, 5%, median, 95% and largest. sheet: a PNG to draw 48 of each on, from calm to busy. The heads of all pictures
    are read, and `sample` of them whole. ValueError: no picture, not a patch file. OSError: cannot write the sheet."""
    def spread(values, form=".0f"):
        return "  ".join(format(v, form) for v in np.quantile(values, [0, 0.05, 0.5, 0.95, 1]))

    def some(n, count):
        return np.linspace(0, n - 1, min(n, count)).astype(int)

    if sheet and Path(sheet).suffix.lower() != ".png":
        raise ValueError(f"{images.printable(sheet)}: the sheet is a PNG; give it a name that ends in .png")
    if sheet and not overwrite and Path(sheet).exists():
        raise ValueError(f"{images.printable(sheet)} is there already; --overwrite replaces it")
    inputs, cells = images.as_paths(inputs), []
    for file in (f for f in inputs if f.suffix == ".safetensors"):
        meta, n, size = read_header(file)
        patches, details, picture = (read_tensor(file, name) for name in ("patches", "detail", "picture"))
        pairs = f" with LR ones {meta['scale']} times smaller" if "scale" in meta else ""
        log(f"{file}: {n} patches of {size}x{size}{pairs} from {meta['pictures']} pictures, "
            f"{file.stat().st_size / 1e9:.2f} GB")
        if picture is not None:
            log(f"  of one picture   {spread(np.unique(picture, return_counts=True)[1])}")
        known = np.arange(n) if details is not None else some(n, 1000)
        details = details if details is not None else np.array([detail(patches[i]) for i in known])
        log(f"  detail           {spread(details, '.1f')}")
        order = np.argsort(details, kind="stable")
        cells += [(f"{details[i]:.1f}", np.array(patches[known[i]])) for i in order[some(len(order), 48)]]
    folders = [f for f in inputs if f.suffix != ".safetensors"]
    if folders:
        paths = list(listing(folders))
        whole = [paths[i] for i in some(len(paths), sample)]
        heads = [h for _, h in in_parallel(functools.partial(glance, whole=False), paths, workers, "looking at") if h]
        seen = [(*head[3], path.name) for path, head in
                in_parallel(functools.partial(glance, whole=True), whole, workers, "reading") if head]
        log(f"{', '.join(map(images.printable, folders))}: {len(heads)} pictures, {len(paths) - len(heads)} unreadable; "
            + ", ".join(f"{n} {kind}" for kind, n in Counter(head[0] for head in heads).most_common()))
        if not seen:
            raise ValueError("not one of them can be read")
        sides = np.array([head[1:3] for head in heads])
        log(f"  megapixels       {spread(sides.prod(1) / 1e6, '.2f')}   {sides.prod(1).sum() / 1e6:.0f} altogether")
        log(f"  shorter side     {spread(sides.min(1))}\n  longer side      {spread(sides.max(1))}")
        seen.sort(key=lambda s: (s[0], s[2]))
        log(f"  detail of {len(seen):<6} {spread([s[0] for s in seen], '.1f')}")
        cells += [(f"{d:.1f} {name[:18]}".encode("ascii", "replace").decode(), pixels)
                  for d, pixels, name in (seen[i] for i in some(len(seen), 48))]
    if sheet:
        draw_sheet(Path(sheet), cells)
        log(f"{sheet}: {len(cells)} of them, from calm to busy")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main():
    if hasattr(sys.stdout, "reconfigure"):      # a log in cp1252, a name in Japanese
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        description="From folders of pictures to the one file that training reads.",
        epilog="examples, in their order:\n  python data.py clean downloads -o set\n"
               "  python data.py multiscale set/pictures -o set/smaller\n"
               "  python data.py mine set/pictures set/smaller -o patches/mined.safetensors\n"
               "  python data.py stats set/pictures patches/mined.safetensors --sheet sheet.png\n\n"
               "A command that was stopped goes on where it was when it is given again.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|clean|multiscale|pack|mine|stats")

    def command(name, what, example, reads=None):
        p = commands.add_parser(name, help=what, description=what, epilog=f"example: python data.py {name} {example}")
        if reads:
            p.add_argument("data", nargs="+", metavar="IN", help=f"{reads}, read through all sub-folders")
            p.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), metavar="N",
                           help="processes that read pictures, each holding one; 0: only this (default: %(default)s)")
        return p.add_argument

    add = command("demo", "draw wallpapers into OUT/train and OUT/val", "runs/demo --train 10")
    add("out", metavar="OUT", help="a folder that does not exist yet")
    add("--train", type=int, default=28, help="how many to train on (default: 28)")
    add("--val", type=int, default=6, help="how many to judge by (default: 6)")
    add("--seed", type=int, default=0, help="another number, other pictures (default: 0)")

    add = command("clean", "sort out broken, small, JPEG-damaged, upscaled and doubled pictures, leaving IN as it is",
                  "downloads -o set --max-mp 25.6", "folders of pictures")
    add("-o", "--out", required=True, help="folder for pictures/, quarantine/, report.csv and scan.csv; what an earlier run put "
        "there and this one does not keep goes")
    add("--name", default="hash", choices=("hash", "id"),
        help="what stays is named by its pixels, or by the number its file name begins with (default: hash)")
    add("--copy", action="store_true", help="copy pictures into OUT (default: link them)")
    add("--min-side", type=int, default=256, help="shortest side allowed (default: 256)")
    add("--max-mp", type=float, help="megapixels allowed, say 25.6; larger ones are not decoded (default: any)")
    add("--min-quality", type=int, default=QUALITY, help="of JPEG files by their tables; 0: any (default: %(default)s)")
    add("--max-blocks", type=float, default=BLOCKS, help="traces of JPEG in dB; inf: any (default: %(default)s)")
    add("--min-sharpness", type=float, default=SHARPNESS,
        help="of the finest detail in dB, lower is taken for upscaled; =-inf: any (default: %(default)s)")
    add("--distance", type=int, default=DISTANCE,
        help="bits of 64 in which near-duplicates differ, at most 7; -1: same pixels only (default: %(default)s)")

    add = command("multiscale", "make copies at 3/4, 1/2, 1/3 and with the shortest side 400",
                  "set/pictures -o set/smaller", "folders of pictures")
    add("-o", "--out", required=True, help="folder for the copies, PNG")
    add("--min-side", type=int, default=128, help="make no copy with a smaller side (default: 128)")

    for name, what, reads in (("pack", "cut pictures into patches, all in one file", "folders of pictures"),
                              ("mine", "the patches with most detail, in a file as pack makes it",
                               "folders of pictures, or patch files")):
        add = command(name, what, "set/pictures set/smaller -o patches/w.safetensors", reads)
        add("-o", "--out", required=True, help="the patch file; reused if pictures and settings have not changed, else made again")
        add("--size", type=int, default=256, help="side of a patch in pixels (default: 256)")
        add("--min-side", type=int, default=128, help="skip pictures with a smaller side (default: 128)")
        add("--lr", nargs="+", metavar="DIR", help="the same pictures smaller, under the same names: packs pairs")
        add("--seed", type=int, default=0, help="of random choices and of what is put behind transparency (default: 0)")
        add("--overwrite", action="store_true", help="make OUT again, whatever it holds now")
    add("--keep", type=float, default=0.5, help="share of the patches that stays (default: 0.5)")
    add("--per-picture", type=int, default=32, help="patches at most of one picture (default: 32)")
    add("--soft", type=float, default=0.1, help="share of calm patches among those that stay (default: 0.1)")

    add = command("stats", "how many, how large, how detailed", "set/pictures patches/w.safetensors --sheet sheet.png",
                  "folders of pictures, or patch files")
    add("--sheet", help="a PNG to draw 48 of each on, from calm to busy")
    add("--overwrite", action="store_true", help="replace the sheet if it is there")
    args = parser.parse_args()
    given = {k: v for k, v in vars(args).items() if k not in ("command", "data")}
    try:
        if min(given.get("seed", 0), given.get("workers", 0)) < 0:
            raise ValueError("--seed and --workers must not be negative")
        for name in ("train", "val", "size", "min_side", "max_mp", "per_picture"):
            if given.get(name) is not None and not given[name] >= (0 if name in ("train", "val") else 1e-9):
                raise ValueError(f"--{name.replace('_', '-')} {given[name]} does not work; use more")
        if args.command == "demo":
            draw_demo(args.out, args.seed, args.train, args.val, progress)
            print(f"{args.train} + {args.val} pictures in {args.out}")
        elif args.command == "clean":
            clean(args.data, naming=given.pop("name"), **given)
        else:
            dict(multiscale=multiscale, pack=pack, mine=mine, stats=stats)[args.command](args.data, **given)
    except ValueError as error:
        images.fail(error)
    except OSError as error:
        if error.errno is None:     # one of ours, with a sentence of its own
            images.fail(error)
        hint = "" if args.command == "demo" else "; the same command then goes on from here"
        images.fail(f"cannot write {getattr(args, 'out', None) or args.sheet}: {error.strerror or error}; free some "
                  f"space or choose another place{hint}")
    except (RuntimeError, MemoryError) as error:
        if tile.out_of_memory(error):
            images.fail("not enough memory for this; take fewer --workers or a smaller --size")
        if "DataLoader worker" not in str(error):
            raise
        images.fail("a worker process was killed, most likely for want of memory; give the command again, --workers 1")
    except KeyboardInterrupt:
        images.ProgressLine.clear()
        hint = "nothing was written" if args.command == "demo" else "the same command goes on from here"
        print(f"interrupted; {hint}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
