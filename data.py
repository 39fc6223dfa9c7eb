"""data.py: folders of pictures -> one file of patches -> batches.

    python data.py demo runs/demo                         # 28 + 6 drawn wallpapers in runs/demo/train and runs/demo/val
    python data.py pack PICTURES MORE -o patches.safetensors --size 256

Decoding a picture to cut one crop out of it costs many times more than the crop is worth, so every picture is decoded
once, cut into square patches, and all patches lie in one memory-mapped safetensors file. A batch is a pure function
of (seed, step), whatever the number of worker processes; that is what makes resuming exact.

Needs torch, numpy, Pillow, and degrade.py, tile.py and demo.py beside it.
"""
import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import degrade
import tile
from demo import draw_demo

# ---------------------------------------------------------------------------------------------------------------------
# Patches: pictures cut up into one safetensors file, {"patches": uint8 (N, size, size, 3)}
# ---------------------------------------------------------------------------------------------------------------------

HEADER = 16384      # bytes kept for the header: it holds the number of patches, known only when all are written


def progress(what, done, total, start):
    """One line that is written over on a terminal, gone at the end; elsewhere a line every 500."""
    terminal, rate = sys.stderr.isatty(), max(done, 1) / (time.time() - start + 1e-9)
    line = f"{what} {done}/{total}  {rate:.1f} pictures/s  {(total - done) / rate:.0f} s left"
    if terminal:
        print("\r\033[K" + line * (done < total), end="", file=sys.stderr, flush=True)
    elif done % 500 == 499:
        print(line, file=sys.stderr, flush=True)


def read_header(path):
    """-> (metadata, N, size, byte where the pixels begin) of a patch file. ValueError if it is none, or cut short."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(length) if length <= HEADER else b"")
        meta, (n, size, _, _) = head["__metadata__"], head["patches"]["shape"]
        meta["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a patch file; make one with: python data.py pack FOLDER -o FILE") from None
    if os.path.getsize(path) != 8 + length + n * size * size * 3:
        raise ValueError(f"{path} is cut short or overlong; delete it and pack its pictures again")
    return meta, n, size, 8 + length


def ground(name, height, width):
    """What lies behind a transparent picture: (3, H, W) in [0, 1], plain, a gradient or soft lumps, drawn by name."""
    rng = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogateescape")))
    cells = rng.choice([1, 2, int(rng.integers(4, 12))])
    grid = rng.integers(0, 256, 3) + rng.normal(0, 45 if cells > 1 else 0, (cells, cells, 3))
    image = Image.fromarray(np.uint8(grid.clip(0, 255))).resize((width, height), Image.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def cut(rgb, size):
    """All of a picture as squares: (3, H, W) in [0, 1] -> uint8 (n, size, size, 3), overlapping no more than needed."""
    pixels = (rgb.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    h, w = pixels.shape[:2]
    pixels = np.pad(pixels, ((0, max(0, size - h)), (0, max(0, size - w)), (0, 0)), "symmetric")
    starts = [np.linspace(0, side - size, -(-side // size)).round().astype(int) for side in pixels.shape[:2]]
    return np.stack([pixels[y:y + size, x:x + size] for y in starts[0] for x in starts[1]])


def pack(folders, out, size=256, seed=0, min_side=128, log=print, overwrite=False):
    """Packs every picture of folders (files too, folders recursively) into the patch file out; -> Path(out).

    size: side of a patch. Pictures with a side below min_side (the HR patch that training cuts) are skipped, those
    between min_side and size are mirrored outwards; unreadable ones are named, counted and skipped. seed varies the
    grounds behind transparent pictures. An out made from the same pictures is reused, one made from others rebuilt;
    any other file there is left alone unless overwrite. One picture is in memory at a time.
    ValueError: no such folder, no picture in it, none usable, min_side above size. OSError: cannot write.
    """
    folders, out = [Path(f) for f in ([folders] if isinstance(folders, (str, Path)) else folders)], Path(out)
    if not 1 <= min_side <= size:
        raise ValueError(f"pictures of side {min_side} do not fit patches of size {size}; raise the size")
    names = {}      # a path once, under its name relative to the folder given: moving the folder changes nothing
    for k, folder in enumerate(folders):
        for path in tile.find_pictures([folder]):
            names.setdefault(path, f"{k}/{path.relative_to(folder) if folder.is_dir() else path.name}")
    if not names:
        raise ValueError(f"no picture in {', '.join(map(tile.printable, folders))}; give a folder of PNG, JPEG or WebP")

    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for path, name in names.items() if path.exists()]
    key = json.dumps([size, seed, min_side, stats])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    if out.exists() and not overwrite:
        try:
            meta, n, _, _ = read_header(out)
            if meta["fingerprint"] == fingerprint:
                log(f"{out}: {n} patches, packed before")
                return out
            log(f"{out}: its pictures have changed, packing again")
        except ValueError as error:
            if "cut short" not in str(error):
                raise ValueError(f"{out} exists and is not a patch file; choose another name or --overwrite") from None
            log(f"{out} was cut short, packing again")

    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f"{out.name}.*.part"):       # left behind by a killed run
        if time.time() - old.stat().st_mtime > 3600:
            old.unlink()
    part, n, small, bad, start = out.with_name(f"{out.name}.{os.getpid()}.part"), 0, [], [], time.time()

    def skip(which, name, why):
        which.append(tile.printable(name))
        tile.Progress.clear()
        log(f"skipped: {why}")

    try:
        with open(part, "wb") as file:
            file.seek(8 + HEADER)
            for i, (path, name) in enumerate(names.items()):
                progress("packing", i, len(names), start)
                try:
                    picture = tile.read_picture(path)
                except tile.PictureError as error:
                    skip(bad, name, error)
                    continue
                h, w = picture.rgb.shape[1:]
                if min(h, w) < min_side:
                    skip(small, name, f"{tile.printable(path)}: {w}x{h}, a side below {min_side}")
                    continue
                rgb = picture.rgb
                if picture.alpha is not None:
                    rgb = tile.composite(picture, ground(f"{seed}/{name}", h, w))
                patches = cut(rgb, size)
                file.write(patches)
                n += len(patches)
            tile.Progress.clear()
            if not n:
                raise ValueError(f"none of {len(names)} pictures is usable ({len(bad)} unreadable, {len(small)} with a "
                                 f"side below {min_side}); give larger pictures or train with a smaller patch")
            meta = dict(fingerprint=fingerprint, pictures=len(names) - len(bad) - len(small),
                        too_small=len(small), unreadable=len(bad), skipped=", ".join(small + bad)[:1000])
            head = {"__metadata__": {k: str(v) for k, v in meta.items()},
                    "patches": dict(dtype="U8", shape=[n, size, size, 3], data_offsets=[0, n * size * size * 3])}
            file.seek(0)
            file.write(HEADER.to_bytes(8, "little") + json.dumps(head).encode().ljust(HEADER))
        os.replace(part, out)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    log(f"{out}: {n} patches of {size}x{size} from {meta['pictures']} pictures in {time.time() - start:.0f} s"
        + (f"; skipped {len(bad)} unreadable and {len(small)} small" if bad or small else ""))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class Batches(torch.utils.data.Dataset):
    """batches[step] -> (lr (B, 3, p, p), hr (B, 3, p * scale, p * scale)), float32 in [0, 1].

    patch_files: one path or several. patch: side p of the LR crop, or several, of which every step draws one; B is
    batch for the smallest and less for larger ones, in proportion to their area. recipe: a name or mix that
    degrade.degrade knows. Every patch is seen once an epoch, in an order of its own (with shares: each file's share of
    the places, its patches at random); of each a random crop, flipped and turned one of 8 ways. busiest n: each place
    of the batch goes to the one of n crops (of n patches) that has the most detail.
    What a step holds depends on (seed, step) alone. With several ranks each makes its share: rank r of n the r-th of n
    parts of what one rank would make of batch * n. ValueError: a broken patch file, patches too small for the crop.
    """

    def __init__(self, patch_files, steps, batch, patch, scale, recipe, seed, busiest=1, shares=None, rank=0, ranks=1):
        self.files = [Path(f) for f in ([patch_files] if isinstance(patch_files, (str, Path)) else patch_files)]
        self.patches = [patch] if isinstance(patch, int) else sorted(patch)
        self.steps, self.batch, self.scale, self.recipe, self.seed = steps, batch, scale, recipe, seed
        self.busiest, self.shares, self.rank, self.ranks = busiest, shares, rank, ranks
        self.maps, self.order = None, (None, None)
        heads, largest = [read_header(f) for f in self.files], self.patches[-1]
        for file, (_, _, size, _) in zip(self.files, heads):
            if size < largest * scale:
                raise ValueError(f"{file} holds patches of {size}, but LR crops of {largest} at scale {scale} need "
                                 f"{largest * scale}; pack again with a larger size or train with a smaller patch")
        self.places = [(at, (n, size, size, 3)) for _, n, size, at in heads]
        self.ends = np.cumsum([n for _, n, _, _ in heads])

    def __len__(self):
        return self.steps

    def __getstate__(self):     # to a worker process: the paths go along, the open files do not
        return {**self.__dict__, "maps": None}

    def shuffled(self, epoch):
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng((self.seed, epoch, 1)).permutation(self.ends[-1])
        return self.order[1]

    def __getitem__(self, step):
        if not 0 <= step < self.steps:
            raise IndexError(step)
        if self.maps is None:
            self.maps = [np.memmap(f, np.uint8, "r", at, shape) for f, (at, shape) in zip(self.files, self.places)]
        rng, n, count = np.random.default_rng((self.seed, step)), self.busiest, int(self.ends[-1])
        patch = self.patches[rng.integers(len(self.patches)) if len(self.patches) > 1 else 0]
        batch, side = max(1, round(self.batch * (self.patches[0] / patch) ** 2)), patch * self.scale
        every, mine = batch * self.ranks, slice(self.rank * batch, (self.rank + 1) * batch)
        if self.shares is None:
            first = step * self.batch * self.ranks * n
            places = [divmod(first + k, count) for k in range(every * n)]
            places = np.array([self.shuffled(epoch)[k] for epoch, k in places])
        else:
            file = rng.choice(len(self.files), every * n, p=np.array(self.shares) / sum(self.shares))
            lengths = np.diff(self.ends, prepend=0)
            places = self.ends[file] - 1 - (rng.random(every * n) * lengths[file]).astype(int)
        corners, turns = rng.random((every, n, 2)), rng.integers(8, size=every)[mine]
        seeds = rng.integers(0, 2 ** 31, every)[mine].tolist()
        hr = np.empty((batch, side, side, 3), np.uint8)
        for b, (where, at) in enumerate(zip(places.reshape(every, n)[mine], corners[mine])):
            crops = []
            for k, corner in zip(where, at):
                file = int(np.searchsorted(self.ends, k, "right"))
                whole = self.maps[file][k - self.ends[file]]    # counted from the file's end: negative, as Python likes
                y, x = (corner * (whole.shape[0] - side + 1)).astype(int)
                crops.append(whole[y:y + side, x:x + side])
            crop = np.rot90(max(crops, key=detail) if n > 1 else crops[0], turns[b] % 4)
            hr[b] = crop[:, ::-1] if turns[b] > 3 else crop
        hr = torch.from_numpy(hr).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return degrade.degrade(hr, self.recipe, self.scale, seeds), hr


def detail(pixels):
    """How busy uint8 (H, W, 3) is: the mean step between neighbours."""
    p = pixels.astype(np.int16)
    return np.abs(np.diff(p, axis=0)).mean() + np.abs(np.diff(p, axis=1)).mean()


def _quiet_worker(_):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the main process, which then ends us


def loader(batches, start, workers):
    """Batches from step start on, in order, read and degraded by that many worker processes (0: in this one)."""
    return torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(start, len(batches)),
                                       num_workers=workers, worker_init_fn=_quiet_worker,
                                       persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
                                       pin_memory=torch.cuda.is_available())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description="Draw demo pictures, or pack pictures into the one file that training reads.",
        epilog="examples:\n  python data.py demo runs/demo\n  python data.py pack wallpapers -o patches/w.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|pack")
    p = commands.add_parser("demo", help="draw wallpapers into OUT/train and OUT/val")
    p.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    p.add_argument("--train", type=int, default=28, help="how many to train on (default: 28)")
    p.add_argument("--val", type=int, default=6, help="how many to judge by (default: 6)")
    p.add_argument("--seed", type=int, default=0, help="another number, other pictures (default: 0)")
    p = commands.add_parser("pack", help="cut pictures into patches, all in one file")
    p.add_argument("data", nargs="+", metavar="DIR", help="folders of pictures, read through all sub-folders")
    p.add_argument("-o", "--out", required=True, help="the patch file; reused if its pictures have not changed")
    p.add_argument("--size", type=int, default=256, help="side of a patch in pixels (default: 256)")
    p.add_argument("--min-side", type=int, default=128, help="skip pictures with a smaller side (default: 128)")
    p.add_argument("--seed", type=int, default=0, help="varies the grounds behind transparent pictures (default: 0)")
    p.add_argument("--overwrite", action="store_true", help="pack again, whatever OUT holds now")
    args = parser.parse_args()
    try:
        if args.seed < 0:
            raise ValueError(f"--seed must not be negative; it is {args.seed}")
        if args.command == "demo":
            draw_demo(args.out, args.seed, args.train, args.val, progress)
            print(f"{args.train} + {args.val} pictures in {args.out}")
        else:
            pack(args.data, args.out, args.size, args.seed, args.min_side, overwrite=args.overwrite)
    except (ValueError, FileExistsError) as error:
        tile.fail(error)
    except OSError as error:
        tile.fail(f"cannot write {args.out}: {error.strerror or error}; free some space or choose another place")
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
