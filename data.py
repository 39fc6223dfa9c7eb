"""data.py: folders of pictures -> one file of patches -> batches; and drawn pictures to try everything on.

    python data.py demo runs/demo                         # 28 + 6 drawn wallpapers in runs/demo/train and runs/demo/val
    python data.py pack PICTURES MORE -o patches.safetensors --size 256

Decoding a picture to cut one crop out of it costs many times more than the crop is worth, so every picture is decoded
once, cut into square patches, and all patches lie in one memory-mapped safetensors file. A batch is a pure function
of (seed, step), whatever the number of worker processes; that is what makes resuming exact.

Needs torch, numpy, Pillow, and degrade.py and tile.py beside it.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

import degrade
import tile

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
# Demo: drawn pictures in the manner of illustrated wallpapers. First the brushes, then the scenes made with them.
# Everywhere: coordinates in pixels of the finished picture, colours (r, g, b) or (r, g, b, alpha) in 0..255.
# ---------------------------------------------------------------------------------------------------------------------

SUPER = 3       # drawn this many times too large and averaged down: clean antialiased lines
WHITE, ARC = np.full(3, 255.0), np.linspace(0, 2 * np.pi, 40, endpoint=False)
SKIES = dict(   # from the zenith down to the horizon, then the colours of light and land
    day=((38, 98, 196), (104, 176, 238), (222, 241, 250), (255, 252, 240), (74, 142, 62)),
    dawn=((84, 108, 176), (214, 160, 190), (255, 226, 190), (255, 238, 214), (92, 122, 84)),
    dusk=((52, 40, 104), (196, 84, 104), (255, 190, 110), (255, 214, 150), (92, 88, 66)),
    night=((8, 12, 40), (24, 42, 98), (86, 104, 160), (214, 228, 255), (30, 62, 64)))


def mix(a, b, t):
    t = np.asarray(t, float)[..., None]
    return np.asarray(a, float) * (1 - t) + np.asarray(b, float) * t


def vivid(rng, n=1, strength=0.75):
    """n colours (n, 3), bright and full: plain random numbers would make everything grey."""
    hue = np.abs((rng.random((n, 1)) * 6 + (0, 4, 2)) % 6 - 3) - 1
    return mix(WHITE, hue.clip(0, 1) * 255, strength) * rng.uniform(0.6, 1, (n, 1))


def bend(rng, start, end, sag=0.0):
    """Cubic control points (n, 4, 2) from start to end, each (2) or (n, 2), the middle pushed aside by about sag."""
    start, end = np.broadcast_arrays(np.atleast_2d(start).astype(float), np.atleast_2d(end).astype(float))
    push = rng.normal(0, 1, (2, len(start), 2)) * np.reshape(sag, (-1, 1))
    return np.stack([start, mix(start, end, 1 / 3) + push[0], mix(start, end, 2 / 3) + push[1], end], 1)


def fbm(rng, height, width, cell, stretch=1):
    """Cloudy noise (height, width) in about [0, 1]; its largest lumps are cell pixels high and cell * stretch wide."""
    total, weight = np.zeros((height, width)), 0.5
    while cell >= 3:
        grid = rng.random((int(height / cell) + 3, int(width / cell / stretch) + 3), np.float32)
        total += weight * np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC))
        cell, weight = cell / 2, weight / 2
    return total


class Canvas:
    """A picture being drawn, SUPER times too large."""

    def __init__(self, width, height):
        self.w, self.h, self.size = width, height, np.array([width, height])
        self.image = Image.new("RGB", (width * SUPER, height * SUPER))
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def fill(self, shapes, colours):
        """Closed polygons, one (k, 2) or many (n, k, 2)."""
        shapes = np.asarray(shapes, float) * SUPER
        shapes = shapes.reshape(-1, shapes.shape[-2] * 2).tolist()
        colours = np.broadcast_to(np.clip(colours, 0, 255).astype(int), (len(shapes), np.shape(colours)[-1])).tolist()
        for shape, colour in zip(shapes, colours):
            self.pen.polygon(shape, fill=tuple(colour))

    def box(self, x, y, w, h, colour):
        self.fill([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], colour)

    def discs(self, xy, radius, colours, squash=1.0):
        ring = np.stack([np.cos(ARC), np.sin(ARC) * squash], 1)
        self.fill(np.atleast_2d(xy)[:, None] + ring * np.reshape(radius, (-1, 1, 1)), colours)

    def strokes(self, curves, width, colours, edge=None, tip=False, line=1.0):
        """Brush strokes along cubic curves (n, 4, 2): thick in the middle, or with tip thick at the root.

        Leaves, petals and locks of hair are short or fat strokes. edge: colour of an outline, line pixels wide.
        """
        t = np.linspace(0, 1, 14)[None, :, None]
        a, b, c, d = (curves[:, i, None] for i in range(4))
        path = a * (1 - t) ** 3 + 3 * b * t * (1 - t) ** 2 + 3 * c * t ** 2 * (1 - t) + d * t ** 3      # (n, 14, 2)
        along = np.gradient(path, axis=1)
        across = along[..., ::-1] * (-1, 1) / (np.linalg.norm(along, axis=2, keepdims=True) + 1e-6)
        shape = np.minimum(1, 1.25 * (1 - t) ** 0.8) if tip else np.sin(np.pi * t.clip(0.02, 0.98)) ** 0.75
        half = across * shape * np.reshape(width, (-1, 1, 1)) / 2
        shapes = np.concatenate([path + half, (path - half)[:, ::-1]], 1)
        if edge is not None:        # outline and stroke by turns, so that each stroke covers the ones before
            rims = shapes + np.concatenate([across, -across[:, ::-1]], 1) * line
            colours = np.broadcast_to(colours, (len(shapes), 3))
            colours = np.stack([np.broadcast_to(edge, colours.shape), colours], 1).reshape(-1, 3)
            shapes = np.stack([rims, shapes], 1)
        self.fill(shapes, colours)

    def wash(self, mask, colour):
        """Lays a colour over the picture where mask, of any resolution, in 0..1, says."""
        mask = Image.fromarray(np.uint8(np.clip(mask, 0, 1) * 255)).resize(self.image.size, Image.BILINEAR)
        self.image.paste(tuple(int(v) for v in colour), (0, 0), mask)

    def gradient(self, *stops):
        """Covers everything, from the top down through the colours of stops."""
        y = np.linspace(0, len(stops) - 1, self.h)
        rows = np.stack([np.interp(y, range(len(stops)), np.asarray(stops)[:, i]) for i in range(3)], 1)
        self.image.paste(Image.fromarray(np.uint8(rows)[:, None]).resize(self.image.size, Image.BILINEAR))

    def finish(self, rng, bloom=0.5):
        """The finished picture: averaged down, light bleeding into its surroundings, a hint of paper."""
        small = self.image.reduce(SUPER)
        bright = Image.eval(small, lambda v: max(0, v - 170) * 3)
        soft = sum(np.asarray(bright.filter(ImageFilter.GaussianBlur(r)), np.float32) for r in (5, 22)) / 510
        pixels = 1 - (1 - np.asarray(small, np.float32) / 255) * (1 - bloom * 0.5 * soft)
        pixels += 0.02 * (fbm(rng, self.h, self.w, 6, 5)[..., None] - 0.5)
        return Image.fromarray(np.uint8(pixels.clip(0, 1) * 255 + 0.5))


def sky(c, rng, *times):
    """Sky, sun or moon, stars and clouds at one of times; -> its five colours."""
    hour = rng.choice(times)
    top, middle, low, light, land = (np.array(v, float) for v in SKIES[hour])
    c.gradient(mix(top, rng.integers(0, 255, 3), 0.08), middle, low, low)
    if hour in ("night", "dusk"):
        n = int(rng.integers(250, 500))
        size = (0.45 + rng.pareto(3, n) * 0.5).clip(0, 2.2)
        c.discs(rng.random((n, 2)) * c.size * (1, 0.7), size, mix((150, 180, 255), (255, 250, 235), rng.random(n)))
        for s in rng.uniform(4, 16, 14):        # cross glints
            at, arms = rng.random(2) * c.size * (1, 0.6), np.array([(1, 0), (0, 1.4), (0.35, 0.35), (0.35, -0.35)]) * s
            c.strokes(bend(rng, at - arms, at + arms), 0.5 + s * 0.12, WHITE)
    at, r = rng.uniform((0.15, 0.12), (0.85, 0.4)) * c.size, rng.uniform(18, 46)
    yy, xx = np.mgrid[0:c.h:2, 0:c.w:2]
    c.wash(0.7 * np.exp(-((xx - at[0]) ** 2 + (yy - at[1]) ** 2) / (18 * r ** 2)), light)
    c.discs(at, r, light)
    if hour == "night":
        c.discs(rng.normal(at, r / 3, (7, 2)), rng.uniform(2, r / 4, 7), mix(light, middle, 0.3))
    streaks = 2.5 * fbm(rng, c.h // 2, c.w // 2, 40, 5) - np.linspace(1.55, 1.1, c.h // 2)[:, None]
    c.wash(streaks, mix(light, WHITE, 0.3))
    for _ in range(rng.integers(1, 5)):         # heaped clouds: puffs from the back to the front in three tones
        n, at, size = 130, rng.uniform((0, 0.35), (1, 0.6)) * c.size, rng.uniform(60, 190)
        dx = rng.normal(0, 0.5, n)
        up = np.sort(rng.random(n))[::-1] * np.exp(-dx ** 2 * 2) * 0.8
        r = size * (0.05 + 0.17 * rng.random(n)) * np.exp(-dx ** 2)
        tones = mix(middle, low, 0.75), mix(low, light, 0.45), mix(light, low if hour == "night" else WHITE, 0.5)
        xy = np.c_[at[0] + dx * size, at[1] - up * size]
        xy = np.stack([xy - step * r[:, None] * (0.1, 0.2) for step in range(3)], 1).reshape(-1, 2)
        c.discs(xy, np.outer(r, (1, 0.92, 0.74)).ravel(), np.tile(tones, (n, 1)), 0.85)
    return top, middle, low, light, land


def water(c, rng, shore, deep, light):
    """Everything below shore becomes a rippled mirror of what is above it."""
    above, s = np.asarray(c.image), int(shore * SUPER)
    rows = np.arange(len(above) - s)
    jerks = rng.normal(0, 5, len(rows) // 12 + 1).repeat(12)[:len(rows)]
    shift = np.sin(rows / (4 + rows / 25) + rng.random() * 6) * (3 + rows / 25) + jerks
    columns = (np.arange(above.shape[1]) + shift[:, None].astype(int)).clip(0, above.shape[1] - 1)
    below = above[(s - 1 - rows * 1.2).astype(int).clip(0)[:, None], columns]
    c.image.paste(Image.fromarray(np.uint8(mix(below, deep, 0.42))), (0, s))
    near = np.sort(rng.random(420))
    p = np.c_[rng.random(420) * c.w, shore + 2 + near * (c.h - shore)]
    ends = p + np.c_[(8 + near * 60) * rng.uniform(0.3, 1, 420), 0 * near]
    c.strokes(bend(rng, p, ends, 0.7), 0.5 + near * 2.4, np.c_[mix(deep, light, rng.random(420)), 60 + near * 160])


def leaves(c, rng, at, spread, n, dark, light, size=7.0):
    """A clump of foliage, dark leaves below, light ones on top and to the upper left."""
    off = rng.normal(0, 1, (n, 2)).clip(-1.8, 1.8)
    lit = (0.5 - 0.25 * off.sum(1) + rng.normal(0, 0.2, n)).clip(0, 1)
    off, lit, way = off[np.argsort(lit)] * spread + at, np.sort(lit), rng.normal(0.6, 0.9, n)
    s = size * rng.uniform(0.6, 1.4, n)
    c.strokes(bend(rng, off, off + np.c_[s * np.cos(way), s * np.sin(way)], 0.6), s * 0.45, mix(dark, light, lit))


def flowers(c, rng, xy, size, colour):
    """Blossoms of five petals with veins and stamens; size: (n,) pixels."""
    for at, s in zip(xy, size):
        way = rng.random() * 7 + np.arange(5) * 2 * np.pi / 5
        tips, tints = np.c_[np.cos(way), np.sin(way) * 0.8] * s, mix(colour, WHITE, rng.uniform(0.1, 0.6, 5))
        c.strokes(bend(rng, at, at + tips, s * 0.06), s * 0.75, tints, mix(colour, (90, 20, 60), 0.35), line=0.5)
        c.strokes(bend(rng, at, at + tips * 0.75), 0.6, mix(colour, (160, 30, 80), 0.4))
        c.discs(at + tips * 0.35, s * 0.05, (250, 220, 120))


def glyphs(c, rng, x, y, size, colour, columns=1, rows=4):
    """Writing that means nothing: signs of six brushed bars, or of bows, in columns from right to left."""
    for i, j in np.ndindex(columns, rows):
        ends, lane = np.sort(rng.choice(6, (6, 2))) / 6, rng.choice(6, 6) / 6
        down, at = rng.random((6, 1)) < 0.5, (x - i * size * 1.2, y + j * size * 1.12)
        a, b = (np.where(down, np.c_[lane, end], np.c_[end, lane]) * size + at for end in ends.T)
        c.strokes(bend(rng, a, b, size * rng.choice([0.02, 0.02, 0.25])), size * rng.uniform(0.09, 0.15), colour)


def head(c, rng, centre, r, hair, skin, iris, ink):
    """A face, hair and shoulders; r: half the height of the head in pixels. Inside, coordinates are in units of r."""
    tilt, lw, cloth = rng.normal(0, 0.12), max(0.8, r * 0.018), vivid(rng, strength=0.5)[0] * rng.uniform(0.4, 1)
    turn = np.array([(np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))]) * r
    at = lambda p: np.asarray(p, float) @ turn + centre
    oval = lambda x, y, rx, ry, colour: c.fill(at(np.c_[x + np.cos(ARC) * rx, y + np.sin(ARC) * ry]), colour)
    lines = lambda a, b, sag, *how, **more: c.strokes(bend(rng, at(a), at(b), sag * r), *how, **more)
    tones = lambda n, most: mix(hair, np.where(rng.random((n, 1)) < 0.5, ink, WHITE), rng.uniform(0, most, n))

    n, long = 46, rng.uniform(1.3, 3.2)                                             # hair behind
    root, ends = rng.uniform(-0.6, 0.6, n), np.c_[rng.normal(0, 0.75, n), long + rng.normal(0, 0.3, n)]
    lines(np.c_[root, np.full(n, -0.7)], np.c_[root * 1.6, np.zeros(n)] + ends, rng.uniform(0.05, 0.22),
          r * rng.uniform(0.15, 0.5, n), mix(tones(n, 0.3), ink, 0.25), ink, tip=True, line=lw)
    oval(0, -0.25, 0.93 + lw / r, 0.88 + lw / r, ink)
    oval(0, -0.25, 0.93, 0.88, mix(hair, ink, 0.15))
    c.fill(at([(-0.24, 0.8), (0.24, 0.8), (0.3, 1.6), (-0.3, 1.6)]), mix(skin, ink, 0.18))
    body = np.array([(0.3, 1.35), (1.15, 1.65), (1.5, 2.4), (1.7, 6)])
    c.fill(at(np.r_[body, body[::-1] * (-1, 1), [(0, 1.95)]]), cloth)
    half = np.array([(0.8, -0.1), (0.8, 0.2), (0.7, 0.55), (0.45, 0.86), (0.14, 1.04), (0, 1.06)])
    face = np.r_[half, half[::-1] * (-1, 1), np.c_[-np.cos(ARC[:21]) * 0.8, -0.1 - np.sin(ARC[:21]) * 0.9]]
    c.fill(at(face * (1 + lw / r)), ink)
    c.fill(at(face), skin)
    for side in (-1, 1):
        own, e = (side, 1), 0.38 * side         # own mirrors what is written for the right half
        c.fill(at(np.array([(0.28, 1.3), (0.95, 1.75), (0.75, 2.3), (0, 2.05)]) * own), mix(cloth, WHITE, 0.55))
        p = np.c_[rng.uniform(0.2, 1.5, 16), rng.uniform(1.9, 3.2, 16)]             # folds
        lines(p * own, (p + np.c_[rng.uniform(-0.25, 0.15, 16), rng.uniform(0.3, 1.1, 16)]) * own, 0.08,
              lw * rng.uniform(0.8, 4, 16), mix(cloth, ink, 0.45))
        lines(body[:-1] * own, body[1:] * own, 0.02, lw * 1.6, ink)
        oval(0.5 * side, 0.57, 0.2, 0.1, (*mix(skin, (240, 90, 90), 0.35), 130))    # blush
        p = np.c_[0.5 * side + np.linspace(-0.1, 0.1, 4), np.full(4, 0.6)]
        lines(p, p + (0.05, -0.08), 0, lw * 0.8, mix(skin, (210, 60, 70), 0.6))
        oval(e, 0.24, 0.22, rng.uniform(0.2, 0.24), mix(WHITE, ink, 0.02))          # eye
        for k, dark in ((1, 0.8), (0.9, 0.45), (0.72, 0)):
            oval(e, 0.25 + (1 - k) * 0.22, 0.155 * k, 0.21 * k, mix(iris, ink, dark))
        oval(e, 0.36, 0.085, 0.06, mix(iris, WHITE, 0.55))
        rays = np.stack([np.cos(ARC[1:20:2]), np.sin(ARC[1:20:2])], 1)
        lines((e, 0.27) + rays * 0.08, (e, 0.27) + rays * 0.15, 0, lw * 0.6, mix(iris, WHITE, 0.4))
        oval(e, 0.22, 0.06, 0.085, mix(iris, ink, 0.9))
        oval(e - 0.06, 0.14, 0.052, 0.062, WHITE)
        lid = np.array([[(0.13, 0.14), (0.26, -0.06), (0.52, -0.08), (0.65, 0.2)]]) * own
        c.strokes(at(lid), r * 0.1, ink)
        c.strokes(at(lid - (0, 0.1)), lw, mix(skin, ink, 0.6))
        p = np.array([(0.58, 0.06), (0.61, 0.12), (0.63, 0.17)])                    # lashes, brow
        lines(p * own, (p + (0.11, -0.05)) * own, 0.01, lw * 2.2, ink, tip=True)
        lines((0.26 * side, 0.47), (0.56 * side, 0.43), 0.02, lw * 1.1, ink)
        lines((0.18 * side, -0.22), (0.6 * side, -0.24), 0.04, lw * 2.4, mix(hair, ink, 0.5))
    lines((0.02, 0.58), (-0.02, 0.65), 0, lw * 1.6, mix(skin, ink, 0.5))            # nose, mouth
    lines((-0.14, 0.8), (0.14, 0.8), 0.03, lw * 1.8, mix(ink, (190, 40, 60), 0.35))
    n = int(rng.integers(9, 14))                                                    # fringe and locks at the sides
    ends = np.linspace(-0.95, 0.95, n)[np.argsort(-np.abs(np.linspace(-1, 1, n)) + rng.normal(0, 0.2, n))]
    drop = 0.05 + 0.55 * np.abs(ends) ** 3 + rng.normal(0, 0.09, n) + long * 0.45 * (np.abs(ends) > 0.7)
    across = np.outer(ends, (0.4, 1.1, 1.12, 1))
    locks = np.stack([across, np.c_[-1.02 + 0.1 * ends ** 2, np.full(n, -0.85), np.full(n, -0.3), drop]], 2)
    c.strokes(at(locks), r * rng.uniform(0.28, 0.42, n), tones(n, 0.12), ink, tip=True, line=lw)
    hairs = locks[rng.integers(0, n, 150)]                                          # single ones
    hairs[..., 0] += np.outer(rng.normal(0, 0.055, 150), (0.6, 1, 1, 0.3))
    c.strokes(at(hairs), lw * rng.uniform(0.3, 1.1, 150), tones(150, 0.55))
    a = np.linspace(-1, 1, 60) + rng.normal(0, 0.02, 60)                            # the ring of light on them
    p = np.c_[np.sin(a * 1.05) * 0.88, -0.1 - np.cos(a) * 0.62]
    lines(p, p + np.c_[np.sin(a) * 0.06, -rng.uniform(0.06, 0.2, 60)], 0, lw * 2, (*mix(hair, WHITE, 0.75), 190))


def meadow(c, rng):
    top, middle, low, light, land = sky(c, rng, "day", "dawn", "dusk")
    horizon, crown = c.h * rng.uniform(0.55, 0.7), rng.uniform((0.1, 0.28), (0.9, 0.34)) * c.size
    for k in range(4):      # hills
        line = horizon + k * 14 - (145 - 32 * k) * fbm(rng, 3, c.w + 8, 160 - 30 * k)[1]
        shape = np.r_[np.c_[np.arange(-4, c.w + 4), line], [(c.w + 4, c.h), (-4, c.h)]]
        c.fill(shape, mix(middle, land, 0.35 + 0.2 * k))
    bark, root = mix(land, (60, 30, 20), 0.7), (crown[0] + rng.normal(0, 25), c.h * 0.86)
    c.strokes(bend(rng, rng.normal(root, 5, (30, 2)), crown, 12), rng.uniform(2, 22, 30),
              mix(bark, light, rng.random(30) * 0.25), tip=True)
    tint = vivid(rng)[0]
    for at in sorted(rng.normal(crown, (85, 55), (22, 2)), key=lambda p: -p[1]):
        c.strokes(bend(rng, crown + (0, 60), at, 14), 7, bark, tip=True)
        leaves(c, rng, at, (40, 24), 240, mix(land, top, 0.55) * 0.7, mix(land, light, 0.6))
        flowers(c, rng, rng.normal(at, (30, 20), (3, 2)), rng.uniform(3, 9, 3), tint)
    n = 3200                # blades of grass
    depth = np.sort(rng.random(n)) ** 1.4
    base, tall = np.c_[rng.random(n) * c.w, horizon + 30 + depth * (c.h - horizon)], 4 + 38 * depth
    shade = mix(mix(land * 0.55, land, rng.random(n)), mix(land, light, 0.65), (rng.random(n) * 0.9) ** 2)
    tips = base + np.c_[rng.normal(0.2, 0.3, n) * tall, -tall]
    c.strokes(bend(rng, base, tips, tall * 0.12), 0.6 + 2.6 * depth, shade, tip=True)
    depth = np.sort(rng.random(60))
    flowers(c, rng, np.c_[rng.random(60) * c.w, horizon + 36 + depth * (c.h - horizon - 30)], 1.5 + 8 * depth, tint)
    return c.finish(rng)


def portrait(c, rng):
    a, b, hair, iris = vivid(rng, 4, rng.uniform(0.3, 0.9))
    if rng.random() < 0.5:
        sky(c, rng, *SKIES)
    else:
        c.gradient(mix(a, WHITE, 0.2), mix(a, b, 0.5), mix(b, WHITE, 0.5))
    for r in rng.uniform(15, 50, 40):       # lights out of focus
        at, colour = rng.random(2) * c.size, mix(vivid(rng)[0], (255, 240, 220), 0.5)
        c.discs(at, r, (*mix(colour, WHITE, 0.3), rng.integers(30, 90)))
        c.discs(at, r * 0.93, (*colour, rng.integers(20, 60)))
    leaves(c, rng, (c.w * rng.random(), c.h), (c.w * 0.4, 50), 900, b * 0.4, mix(b, (200, 255, 150), 0.5), 15)
    flowers(c, rng, rng.uniform((0, 0.7), (1, 1), (26, 2)) * c.size, rng.uniform(6, 20, 26), a)
    hair = hair * rng.uniform(0.3, 1)
    skin, ink = mix((255, 232, 216), (226, 180, 150), rng.random()), mix(hair, (22, 14, 34), 0.85)
    at, r = rng.uniform((0.3, 0.4), (0.7, 0.48)) * c.size, c.h * rng.uniform(0.2, 0.3)
    head(c, rng, at, r, hair, skin, iris * 0.8, ink)
    at, s = rng.random((60, 2)) * c.size, rng.uniform(3, 11, (60, 1))       # petals in the wind
    tints = mix((255, 180, 200), WHITE, rng.random(60))
    c.strokes(bend(rng, at, at + rng.normal(0, 1, (60, 2)) * s, 1), s * 0.6, tints)
    return c.finish(rng)


def city(c, rng):
    top, middle, low, light, _ = sky(c, rng, "night", "dusk")
    shore = c.h * rng.uniform(0.66, 0.8)
    for layer in range(3):
        x = -20.0
        while x < c.w:
            wide, tall = rng.uniform(28, 80) * (1 + layer * 0.4), shore * rng.uniform(0.2, 0.75) * (1 - 0.15 * layer)
            y, wall = shore - tall, mix(mix(low, middle, 0.5), top * 0.55, 0.35 + 0.3 * layer)
            c.box(x, y, wide, c.h, wall)
            c.box(x, y, wide * 0.22, c.h, wall * 0.75)
            step, lamp = rng.uniform(4, 6) + 2 * layer, mix((255, 214, 130), (190, 225, 255), rng.random())
            panes = np.mgrid[x + wide * 0.28:x + wide - step:step, y + 5:shore - 4:step * 1.3].reshape(2, -1).T[:, None]
            lit = rng.random((len(panes), 1)) < rng.uniform(0.25, 0.6)
            c.fill(panes + np.array([(0, 0), (0.6, 0), (0.6, 0.75), (0, 0.75)]) * step,
                   np.where(lit, lamp * rng.uniform(0.6, 1, (len(panes), 1)), wall * 0.7))
            c.strokes(bend(rng, (x + wide / 2, y + 2), (x + wide / 2, y - tall * 0.16)), 1.5, wall * 0.6)
            if layer == 2 and rng.random() < 0.7:
                s, sx, sy = rng.uniform(12, 19), x + wide * 0.6, y + rng.uniform(8, 30)
                c.box(sx - 3, sy - 3, s + 6, s * 4.6 + 6, top * 0.4)
                glyphs(c, rng, sx, sy, s, mix(vivid(rng, 1, 0.9)[0], WHITE, 0.35))
            x += wide * rng.uniform(0.8, 1.15)
    water(c, rng, shore, top, light)
    for y in rng.uniform(0.02, 0.3, 5) * c.h:       # wires
        c.strokes(np.array([[(-9, y), (c.w * 0.3, y + 60), (c.w * 0.7, y + 40), (c.w + 9, y - 20)]]), 1.4, top * 0.3)
    return c.finish(rng, 0.8)


def page(c, rng):
    """A page of a comic: six grey panels with faces, foliage, speed lines or screentone, hatching, balloons."""
    c.image.paste((250, 249, 246), (0, 0, *c.image.size))
    ink, gap = np.array((18, 16, 22.0)), 9
    xs = np.array([0, rng.uniform(0.3, 0.45), rng.uniform(0.6, 0.72), 1]) * (c.w - gap)
    ys = np.stack([np.zeros(3), rng.uniform(0.4, 0.6, 3), np.ones(3)]) * (c.h - gap)
    for i, k in np.ndindex(3, 2):
        x, y = int(xs[i]) + gap, int(ys[k, i]) + gap
        p = Canvas(int(xs[i + 1]) - x, int(ys[k + 1, i]) - y)
        p.gradient(*(mix(WHITE, ink, v) for v in rng.uniform(0, 0.5, 2)))
        what = rng.integers(0, 3)
        if what == 0:       # speed lines
            a, middle = rng.random(240) * 2 * np.pi, p.size * rng.uniform(0.3, 0.7, 2)
            way = np.c_[np.cos(a), np.sin(a)] * p.size.max()
            near = middle + way * rng.uniform(0.2, 0.5, (240, 1))
            p.strokes(bend(rng, middle + way, near), rng.uniform(1, 9, 240), ink, tip=True)
        else:               # screentone, its dots swelling with the darkness of a cloudy wash; hatching
            turn, step = rng.uniform(0.3, 1.2), rng.uniform(3.2, 6) * SUPER / (2 * np.pi)
            yy, xx = np.mgrid[0:p.h * SUPER, 0:p.w * SUPER].astype(np.float32) / step
            u, v = xx * np.cos(turn) + yy * np.sin(turn), yy * np.cos(turn) - xx * np.sin(turn)
            tone = Image.fromarray(np.float32(fbm(rng, p.h, p.w, 120) * 1.6 - 0.6)).resize(p.image.size, Image.BILINEAR)
            dots = np.uint8((np.cos(u) + np.cos(v)) / 2 > 1.05 - np.asarray(tone)) * 255
            p.image.paste(tuple(ink.astype(int)), (0, 0), Image.fromarray(dots))
            at = rng.uniform((0, 0.7), (1, 1), (110, 2)) * p.size
            p.strokes(bend(rng, at, at + (22, -30), 1), 1.2, ink)
        if what == 2:
            for at in rng.uniform((0, 0.4), (1, 1), (9, 2)) * p.size:
                leaves(p, rng, at, (34, 22), 150, ink, np.full(3, 235.0))
        if what < 2 or k:
            at, r = rng.uniform((0.35, 0.45), (0.65, 0.5)) * p.size, p.size.min() * rng.uniform(0.24, 0.34)
            head(p, rng, at, r, np.full(3, rng.choice([30.0, 130, 235])), np.full(3, 250.0), np.full(3, 110.0), ink)
        s, at = rng.uniform(8, 12), p.size * (rng.choice([0.17, 0.83]), 0.1) + (0, 30)
        p.discs(at, s * 3.1, ink, 1.15)
        p.discs(at, s * 3.1 - 1.3, WHITE, 1.15)
        glyphs(p, rng, at[0] + s * 0.8, at[1] - s * 2, s, ink, 3, 4)
        c.box(x - 1.5, y - 1.5, p.w + 3, p.h + 3, ink)
        c.image.paste(p.image.convert("L"), (x * SUPER, y * SUPER))
    return c.finish(rng, 0)


def draw_demo(folder, seed=0, train=28, val=6):
    """Draws that many pictures, none twice, into folder/train and folder/val: PNG of 640x384 to 768x512.

    The folder is complete or absent. FileExistsError if it is there already, OSError if it cannot be written.
    """
    folder, scenes = Path(folder), (meadow, portrait, city, page)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; use it, or remove it to draw again")
    part, start = folder.with_name(f"{folder.name}.{os.getpid()}.part"), time.time()
    try:
        for k, (name, count) in enumerate(dict(train=train, val=val).items()):
            (part / name).mkdir(parents=True)
            for i in range(count):
                rng, scene = np.random.default_rng((seed, k, i)), scenes[i % 4]
                picture = scene(Canvas(*((640, 384), (704, 448), (768, 512))[i % 3]), rng)
                picture.save(part / name / f"{i:03}_{scene.__name__}.png")
                progress(f"drawing {name}", i + 1, count, start)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
            draw_demo(args.out, args.seed, args.train, args.val)
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
