"""Pack pictures into one memory-mapped file of patches, and read training batches from it.

    python data.py pack cleaned/pictures smaller -o patches/all.safetensors
    python data.py pack hr --lr-dir lr -o patches/pairs.safetensors         # with LR pictures of your own

    batches = Batches("patches/all.safetensors", steps=1000, batch=8, patch=64, scale=2, recipe="web", seed=0)
    lr, hr = batches[0]                                         # (8, 3, 64, 64) and (8, 3, 128, 128)

Decoding a whole picture to cut one crop is slow. So `pack` decodes each picture once, cuts it into square
patches, and stores all patches in one file. A batch depends only on (seed, step), so resuming is exact.
Needs torch, numpy, Pillow, and images.py, degrade.py, and pairs.py in the same folder.
"""
import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import degrade
import images
import pairs

PATCH_SIZE = 256        # default side of a patch in pixels
MIN_SIDE = 128          # default: skip pictures whose shorter side is below this
MAX_WORKERS = 8         # each worker process holds one decoded picture in memory
WORKERS_HELP = f"processes that read pictures (default: one per core, at most {MAX_WORKERS})"

# Smaller copies made by `clean.py multiscale`: the factor of the size, and the suffix of the file name.
COPY_SCALES = {3 / 4: "075", 1 / 2: "050", 1 / 3: "033"}
COPY_SHORT_SIDE = 400   # the fourth copy has this shorter side, and this number as its suffix


# ------------------------------------------------------------------ parallel work

def init_worker(*_):
    """Prepare a worker process: ignore Ctrl-C, and exit together with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # only the main process handles Ctrl-C

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def run_job(function, job):
    """Return function(job), or (None, reason) if it raises a UserError."""
    try:
        return function(job)
    except images.UserError as error:
        return None, f"skipped: {error}"


def run_parallel(function, jobs, workers, label, log):
    """Yield function(job) for a list of jobs, in order. Show the progress on stderr.

    function: returns (result, note). The result is yielded, and a note that is not empty is logged. If the
    function raises a UserError, the result is None and the note is the reason.
    workers: number of processes; None: one per CPU core, at most MAX_WORKERS; 0: this process does the work.
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, MAX_WORKERS)
    # With batch_size=None, collate_fn gets one job at a time. Each worker is at most two jobs ahead.
    results = torch.utils.data.DataLoader(
        jobs, batch_size=None, num_workers=min(workers, len(jobs)), worker_init_fn=init_worker,
        collate_fn=functools.partial(run_job, function), generator=torch.Generator())
    progress = images.ProgressLine()
    for result, note in results:
        if note:
            progress.clear()
            log(note)
        yield result
        progress.step("pictures", label, len(jobs))
    progress.clear()


# ------------------------------------------------------------------ pictures

def list_inputs(folders):
    """Find the pictures in files and folders -> {path: name}.

    A name is "K/RELATIVE/PATH" with the folder number K. Raises images.UserError for a missing path, and if
    there is no picture.
    """
    folders, names = images.as_paths(folders), {}
    for k, folder in enumerate(folders):
        for name, path in pairs.list_pictures(folder):
            names.setdefault(path, f"{k}/{name}")
    if not names:
        raise images.UserError(f"no picture in {', '.join(map(images.printable, folders))}")
    return names


def detail(pixels):
    """Return the detail of uint8 pixels (H, W, C): mean absolute difference of vertical neighbors
    plus that of horizontal neighbors."""
    p = pixels.astype(np.int16)
    return np.abs(np.diff(p, axis=0)).mean() + np.abs(np.diff(p, axis=1)).mean()


# ------------------------------------------------------------------ patch files
#
# A patch file is a safetensors file with these tensors:
#   patches  uint8 (N, size, size, 3)
#   lr       uint8 (N, size / scale, size / scale, 3), only in a file of pairs
#   names    uint8, the names of the pictures as text, one per line
#   picture  int32 (N,), the number of the picture that each patch was cut from
#   detail   float32 (N,), the detail of each patch

HEADER_BYTES = 16384    # a fixed size, because the header is written after the patches
DTYPES = {"U8": np.uint8, "I32": np.int32, "F32": np.float32}


def open_patch_file(path):
    """Return (metadata, {tensor name: memory-mapped array}) of a patch file. Raises images.UserError."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, HEADER_BYTES)))
        metadata, arrays = header.pop("__metadata__"), {}
        for name, entry in header.items():
            offset = 8 + length + entry["data_offsets"][0]
            arrays[name] = np.memmap(path, DTYPES[entry["dtype"]], "r", offset, tuple(entry["shape"]))
        metadata["fingerprint"], arrays["patches"], arrays["detail"]        # KeyError if one is missing
    except OSError as error:
        raise images.UserError(f"cannot read {images.printable(path)}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise images.UserError(f"{images.printable(path)} is not a complete patch file; replace it with "
                               "`data.py pack --overwrite`") from None
    return metadata, arrays


def write_patch_file(path, size, scale, fingerprint, pictures):
    """Write a patch file, completely or not at all. Returns (number of patches, number of pictures).

    size: side of a patch. scale: HR size / LR size, or 0 without LR patches. fingerprint: a text that
    identifies the contents. pictures: an iterable of (name, patches, LR patches or None, details).
    Raises images.UserError if there are no patches, and OSError if the file cannot be written.
    """
    names, counts, details = [], [], []
    with (images.atomic_path(path) as part, open(part, "wb") as file,
          tempfile.TemporaryFile(dir=part.parent) as lr_file):
        file.seek(8 + HEADER_BYTES)
        for name, patches, lr_patches, patch_details in pictures:
            file.write(patches)
            if scale:
                lr_file.write(lr_patches)
            names.append(images.printable(name))
            counts.append(len(patches))
            details.extend(patch_details)
        if not details:
            raise images.UserError("no patches: all pictures are broken, too small or held out")

        count = len(details)
        shapes = {"patches": ("U8", [count, size, size, 3])}
        if scale:
            shapes["lr"] = "U8", [count, size // scale, size // scale, 3]
            lr_file.seek(0)
            shutil.copyfileobj(lr_file, file, 2**24)
        text = "\n".join(names).encode()
        text += b"\n" * (-(file.tell() + len(text)) % 4)        # align the next tensor
        picture = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        for content in (text, picture, np.array(details, np.float32)):
            file.write(content)
        shapes |= {"names": ("U8", [len(text)]), "picture": ("I32", [count]), "detail": ("F32", [count])}

        metadata = {"fingerprint": fingerprint} | ({"scale": str(scale)} if scale else {})
        header, end = {"__metadata__": metadata}, 0
        for name, (dtype, shape) in shapes.items():
            begin, end = end, end + int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        file.seek(0)
        file.write(HEADER_BYTES.to_bytes(8, "little") + json.dumps(header).encode().ljust(HEADER_BYTES))
    return len(details), len(names)


# ------------------------------------------------------------------ pictures to patches

def cut_patches(rgb, size, step=1):
    """Cut a whole picture (3, H, W) in [0, 1] into squares: uint8 (n, size, size, 3).

    The squares overlap as little as possible and begin at multiples of `step`; size, H and W are multiples of
    it. A side shorter than `size` is extended by reflection.
    """
    pixels = images.to_uint8(rgb)
    h, w = pixels.shape[:2]
    pixels = np.pad(pixels, ((0, max(0, size - h)), (0, max(0, size - w)), (0, 0)), "symmetric")
    starts = [np.linspace(0, (side - size) // step, -(-side // size)).round().astype(int) * step
              for side in pixels.shape[:2]]
    return np.stack([pixels[y:y + size, x:x + size] for y in starts[0] for x in starts[1]])


def cut_job(job, size, min_side, scale):
    """Read one picture and its LR picture, if there is one, and cut them into patches.

    job: (path, name, LR path or None). Returns ((name, patches, LR patches or None, details), note). Raises
    images.UserError for an unreadable picture or a wrong size.
    """
    path, name, lr_path = job
    hr = images.read_picture(path, srgb=True)
    lr = images.read_picture(lr_path, srgb=True) if lr_path else None
    h, w = hr.rgb.shape[1:]
    if min(h, w) < min_side:
        raise images.UserError(f"{images.printable(path)}: {w}x{h}, a side is below {min_side}")
    if lr:
        lr_h, lr_w = lr.rgb.shape[1:]
        if (h // scale, w // scale) != (lr_h, lr_w):
            raise images.UserError(f"{images.printable(lr_path)}: {lr_w}x{lr_h} is not {w}x{h} / {scale}")
        h, w = lr_h * scale, lr_w * scale
    hr_patches = cut_patches(images.composite(hr, 1.0)[:, :h, :w], size, scale)
    lr_patches = cut_patches(images.composite(lr, 1.0), size // scale) if lr else None
    details = np.array([detail(patch) for patch in hr_patches]).round(3).tolist()
    return (name, hr_patches, lr_patches, details), hr.note and f"{images.printable(path)}: {hr.note}"


def match_lr(folders, lr_dir):
    """Match each HR folder with a folder of LR pictures. Returns ({HR path: LR path}, scale).

    The sizes of the first readable pair give the scale. Raises images.UserError if pictures have no partner.
    """
    folders, lr_dir = images.as_paths(folders), images.as_paths(lr_dir)
    if len(folders) != len(lr_dir):
        raise images.UserError(f"{len(folders)} HR folders but {len(lr_dir)} in --lr-dir; give one for each")
    partners = {}
    for hr_folder, lr_folder in zip(folders, lr_dir):
        jobs, _ = pairs.match_pairs({"HR": hr_folder, "LR": lr_folder})
        partners.update((paths["HR"], paths["LR"]) for _, paths in jobs)
    for path, lr_path in partners.items():
        side, lr_side = max(images.picture_size(path)), max(images.picture_size(lr_path))
        if side and lr_side:
            return partners, max(1, round(side / lr_side))
    raise images.UserError(f"no pair in {images.printable(folders[0])} can be read")


def pack(folders, out, size=PATCH_SIZE, min_side=MIN_SIDE, log=print, overwrite=False, lr_dir=None,
         workers=None, without=()):
    """Pack the pictures of folders (with subfolders) and files into one patch file. Returns Path(out).

    size: side of a patch. Sides below `size` are extended by reflection. Pictures with a side below min_side
    and unreadable pictures are logged and skipped. Colors become sRGB, transparent areas white. lr_dir: one
    folder of LR pictures per folder. workers: see run_parallel. without: paths to leave out.

    A file with the same pictures and settings is reused, another patch file is replaced. `overwrite`: replace
    any file. Raises images.UserError, and OSError if the file cannot be written.
    """
    out, start = Path(out), time.time()
    without = {os.path.realpath(path) for path in without}
    names = list_inputs(folders)
    partners, scale = match_lr(folders, lr_dir) if lr_dir else (dict.fromkeys(names), 1)
    if size % scale:
        raise images.UserError(f"--size {size} is not a multiple of the scale {scale} of the pairs")
    jobs = [(path, name, partners[path]) for path, name in names.items()
            if os.path.realpath(path) not in without]
    stats = [(name, p.stat().st_size, p.stat().st_mtime_ns)
             for path, name, lr_path in jobs for p in (path, lr_path) if p and p.exists()]
    version = 4     # of the patches; change it together with the code that cuts them
    key = json.dumps([version, size, min_side, scale, stats])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    if out.exists() and not overwrite and open_patch_file(out)[0]["fingerprint"] == fingerprint:
        log(f"{out} is packed already")
        return out

    job = functools.partial(cut_job, size=size, min_side=min_side, scale=scale)
    pictures = filter(None, run_parallel(job, jobs, workers, "packing", log))
    patch_count, count = write_patch_file(out, size, scale if lr_dir else 0, fingerprint, pictures)
    log(f"{out}: {patch_count} patches of {size}x{size} from {count} pictures in "
        f"{time.time() - start:.0f} s; {len(jobs) - count} skipped")
    return out


def hold_out(folders, folder, count=8, side=512):
    """Hold out pictures for validation: a tenth of the pictures, at most `count`.

    A hash of the names selects them, so every call selects the same pictures. The square of `side` pixels
    with most detail is cut from each one and saved as PNG in a new folder inside `folder`. Returns (the new
    folder, paths of the pictures and of their smaller copies made by `clean.py multiscale`). Raises
    images.UserError for fewer than 10 pictures.
    """
    names = list_inputs(folders)
    copy_suffix = re.compile(rf"_({'|'.join(COPY_SCALES.values())}|{COPY_SHORT_SIDE})$")
    families = {}       # name without suffixes: [the picture, then its smaller copies]
    for path in sorted(names, key=lambda p: (len(names[p]), names[p])):
        _, name = names[path].split("/", 1)
        families.setdefault(copy_suffix.sub("", str(Path(name).with_suffix(""))), []).append(path)

    squares, held_out = [], []
    for path, *copies in sorted(families.values(), key=lambda f: zlib.crc32(os.fsencode(names[f[0]]))):
        if len(squares) == min(count, len(families) // 10):
            break
        try:
            picture = images.read_picture(path, srgb=True)
        except images.PictureError:
            continue
        h, w = picture.rgb.shape[1:]
        if min(h, w) < 64:      # too small for a validation metric
            continue
        squares.append(max(cut_patches(images.composite(picture, 1.0), min(side, h, w)), key=detail))
        held_out += [path, *copies]
    if not squares:
        raise images.UserError("too few pictures for validation; give at least 10, or a folder with --val")

    code = zlib.crc32(b"".join(square.tobytes() for square in squares))
    val = Path(folder) / f"val-{code:08x}"
    for i, square in enumerate(squares):
        with images.atomic_path(val / f"{i}.png") as part:
            Image.fromarray(square).save(part, "PNG")
    return val, held_out


# ------------------------------------------------------------------ the folders of a training run

def split_shares(folders):
    """Split folders and shares: ["a", "b@0.3"] -> [("a", None), ("b", 0.3)]. Raises images.UserError."""
    found = []
    for text in folders:
        folder, at, share = text.rpartition("@")
        if not at or os.path.exists(text):
            found.append((text, None))
            continue
        try:
            found.append((os.path.normpath(folder), float(share)))
        except ValueError:
            raise images.UserError(f"{text}: write a share after the @, such as 0.3") from None
    if sum(share or 0 for _, share in found) > 1 + 1e-9:
        raise images.UserError("the shares of the folders add up to more than 1")
    return found


def pack_folders(folders, sides, held_out, out, log=print):
    """Pack the folders of a training run into patch files inside the folder `out`.

    folders: folders or patch files, with shares as for split_shares. sides: sides of the HR crops of the
    training. held_out: paths to leave out. Returns (patch files, [share or None]). Raises images.UserError.
    """
    size = max(PATCH_SIZE, math.ceil(max(sides) * 1.5 / 64) * 64)       # larger than a crop: random corners

    def pack_group(group):
        if Path(group[0]).suffix == ".safetensors":
            return Path(group[0])
        key = json.dumps([str(Path(folder).resolve()) for folder in group] + held_out)
        name = f"{Path(group[0]).name}-{zlib.crc32(key.encode()):08x}-{size}-{min(sides)}.safetensors"
        return pack(group, Path(out) / name, size, min_side=min(sides), log=log, without=held_out)

    found = split_shares(folders)
    plain = [folder for folder, share in found if share is None and Path(folder).suffix != ".safetensors"]
    groups = [([folder], share) for folder, share in found if folder not in plain]
    groups += [(plain, None)] if plain else []
    return [pack_group(group) for group, _ in groups], [share for _, share in groups]


# ------------------------------------------------------------------ batches

class Batches(torch.utils.data.Dataset):
    """Training batches: batches[step] -> (lr (B, 3, p, p), hr (B, 3, p * scale, p * scale)) in [0, 1].

    patch_files: one path or several. steps: number of batches. patch: side p of the LR crop, or several
    sides; each step draws one of them. B is `batch` for the smallest side. For a larger side, B is smaller in
    proportion to the area. recipe: a recipe or mix of degrade.py; files of pairs have their own LR patches.

    A crop has a random corner and one of 8 orientations. It is the one with most detail of `crop_candidates`
    crops of one file. shares: the probability of each file, or None; files with None share the rest in
    proportion to their numbers of patches.

    A batch depends only on (seed, step). In distributed training, rank r of `ranks` gets the r-th part of the
    batch that one rank with batch * ranks would get, up to rounding for larger sides. Raises
    images.UserError for a broken file or patches that are too small.
    """

    def __init__(self, patch_files, steps, batch, patch, scale, recipe, seed, crop_candidates=4, shares=None,
                 rank=0, ranks=1):
        self.files = images.as_paths(patch_files)
        self.patches = [patch] if isinstance(patch, int) else sorted(patch)
        self.steps, self.batch, self.scale, self.recipe, self.seed = steps, batch, scale, recipe, seed
        self.crop_candidates, self.rank, self.ranks = crop_candidates, rank, ranks
        self.arrays = None          # memory maps, opened in each worker process
        needed, counts = self.patches[-1] * scale, []
        for file in self.files:
            metadata, arrays = open_patch_file(file)
            count, size = arrays["patches"].shape[:2]
            if int(metadata.get("scale", scale)) != scale:
                raise images.UserError(f"{file} has pairs of scale {metadata['scale']}; use that --scale")
            if size < needed:
                raise images.UserError(f"{file} has patches of {size} pixels, but --patch {self.patches[-1]} "
                                       f"needs {needed}; pack with a larger --size")
            counts.append(count)
        shares = shares or [None] * len(counts)
        free = sum(count for count, share in zip(counts, shares) if share is None)
        rest = 1 - sum(filter(None, shares))
        shares = [rest * count / free if share is None else share for count, share in zip(counts, shares)]
        self.counts, self.shares = np.array(counts), np.array(shares) / sum(shares)

    def __len__(self):
        return self.steps

    def __getstate__(self):
        return {**self.__dict__, "arrays": None}        # pickle would copy the memory maps

    def batch_size(self, patch):
        """Return the number of crops in a batch with LR crops of this side."""
        return max(1, round(self.batch * (self.patches[0] / patch) ** 2))

    def crop(self, file, number, corner, patch):
        """Cut one crop. number: of the patch in the file. corner: (y, x) in [0, 1).
        Returns (hr, lr or None), uint8 (side, side, 3)."""
        patches, lr_patches = self.arrays[file]["patches"], self.arrays[file].get("lr")
        grid = 1 if lr_patches is None else self.scale      # crops of pairs begin at a whole LR pixel
        side = patch * self.scale
        y, x = (corner * ((patches.shape[1] - side) // grid + 1)).astype(int) * grid
        hr = patches[number, y:y + side, x:x + side]
        if lr_patches is None:
            return hr, None
        y, x = y // grid, x // grid
        return hr, lr_patches[number, y:y + patch, x:x + patch]

    def __getitem__(self, step):
        if not 0 <= step < self.steps:
            raise IndexError(step)
        if self.arrays is None:
            self.arrays = [open_patch_file(file)[1] for file in self.files]

        # All random numbers of the step come first, for all ranks, so that every rank draws the same.
        rng = np.random.default_rng((self.seed, step))
        patch = self.patches[rng.integers(len(self.patches))]
        batch = self.batch_size(patch)
        total = batch * self.ranks
        files = rng.choice(len(self.files), total, p=self.shares)       # one for all candidates of a crop
        numbers = (rng.random((total, self.crop_candidates)) * self.counts[files][:, None]).astype(int)
        corners = rng.random((total, self.crop_candidates, 2))
        orientations = rng.integers(8, size=total)
        seeds = rng.integers(0, 2**31, total)

        lr_crops, hr_crops = [], []
        for i in range(self.rank * batch, (self.rank + 1) * batch):
            candidates = [self.crop(files[i], number, corner, patch)
                          for number, corner in zip(numbers[i], corners[i])]
            hr, lr = max(candidates, key=lambda c: detail(c[0]))
            hr = to_tensor([orient(hr, orientations[i])])
            if lr is None:
                lr = degrade.degrade(hr, self.recipe, self.scale, [seeds[i]])
            else:
                lr = to_tensor([orient(lr, orientations[i])])
            lr_crops.append(lr)
            hr_crops.append(hr)
        return torch.cat(lr_crops), torch.cat(hr_crops)


def orient(pixels, orientation):
    """Rotate (H, W, 3) by 90 degrees orientation % 4 times, then mirror it for orientation 4 to 7."""
    pixels = np.rot90(pixels, orientation % 4)
    return pixels[:, ::-1] if orientation > 3 else pixels


def to_tensor(crops):
    """Stack uint8 crops (H, W, 3) into a float tensor (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous().float().div_(255)


def make_loader(batches, start, workers):
    """Return a DataLoader over batches[start:], in order. workers: processes that read and degrade, or 0."""
    return torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(start, len(batches)), num_workers=workers,
        prefetch_factor=4 if workers else None, worker_init_fn=init_worker,
        generator=torch.Generator(),        # do not change the global random state
        pin_memory=torch.cuda.is_available())


# ------------------------------------------------------------------ command

def main():
    parser = argparse.ArgumentParser(
        description="Pack pictures into the patch file that training reads.",
        epilog="example: python data.py pack cleaned/pictures smaller -o patches/all.safetensors")
    parser.add_argument("command", choices=["pack"])
    parser.add_argument("data", nargs="+", metavar="DIR", help="folders of pictures, with their subfolders")
    add = parser.add_argument
    add("--out", "-o", required=True, metavar="FILE", help="the patch file")
    add("--lr-dir", nargs="+", metavar="DIR",
        help="LR pictures with the names of the HR pictures, one folder for each folder of HR pictures")
    add("--size", type=int, default=PATCH_SIZE, help="side of a patch in pixels (default: %(default)s)")
    add("--min-side", type=int, default=MIN_SIDE,
        help="skip pictures with a shorter side (default: %(default)s)")
    add("--workers", type=int, metavar="N", help=WORKERS_HELP)
    add("--overwrite", action="store_true",
        help="replace FILE (default: reuse it for the same pictures and settings)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")       # a console may be unable to print a name
    try:
        pack(args.data, args.out, args.size, args.min_side, overwrite=args.overwrite, lr_dir=args.lr_dir,
             workers=args.workers)
    except (images.UserError, KeyboardInterrupt) as error:
        images.fail(error)


if __name__ == "__main__":
    main()
