"""Draw demo pictures from a seed: landscapes for a first training run, and textures.

    python demo.py runs/demo                        # 28 + 6 landscapes in runs/demo/train and runs/demo/val
    python demo.py runs/textures --textures 35      # stars, screentone, hatching, grain, dithering, text, ...

To add a texture, write a function (rng, height, width) such as `hatching` that returns pixels
(H, W) or (H, W, 3) from 0 to 255, and add it to TEXTURES. Needs numpy and Pillow.
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Coordinates are pixels (x, y) of the finished picture. Colors are (r, g, b), 0 to 255.

SIZE = 768, 512         # width and height of a landscape
SUPER = 3               # supersampling factor: landscapes are drawn SUPER times larger, then reduced
WHITE = np.full(3, 255.0)
CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 40)), np.sin(np.linspace(0, 2 * np.pi, 40))], 1)
SKIES = {               # zenith, middle, horizon, light, land
    "day": ((38, 98, 196), (104, 176, 238), (222, 241, 250), (255, 252, 240), (74, 142, 62)),
    "dawn": ((84, 108, 176), (214, 160, 190), (255, 226, 190), (255, 238, 214), (92, 122, 84)),
    "dusk": ((52, 40, 104), (196, 84, 104), (255, 190, 110), (255, 214, 150), (92, 88, 66)),
    "night": ((8, 12, 40), (24, 42, 98), (86, 104, 160), (214, 228, 255), (30, 62, 64))}


# ---- colors, curves, patterns

def mix(a, b, t):
    """Blend color a with color b. t: the share of b in [0, 1], one number or one per color."""
    t = np.asarray(t, float)[..., None]
    return np.asarray(a, float) * (1 - t) + np.asarray(b, float) * t


def vivid(rng, n=1):
    """Draw n random saturated colors (n, 3)."""
    hue = np.abs((rng.random((n, 1)) * 6 + (0, 4, 2)) % 6 - 3) - 1
    return mix(WHITE, hue.clip(0, 1) * 255, 0.75) * rng.uniform(0.6, 1, (n, 1))


def curve(rng, start, end, bend=0.0):
    """Return n cubic Bezier curves (n, 4, 2). bend: random offset of the two middle points in pixels."""
    start, end = np.broadcast_arrays(np.atleast_2d(start).astype(float), np.atleast_2d(end).astype(float))
    middle = [mix(start, end, t) + rng.normal(0, 1, start.shape) * bend for t in (1 / 3, 2 / 3)]
    return np.stack([start, *middle, end], 1)


def cloud_noise(rng, height, width, cell):
    """Return noise (height, width), about 0 to 1: a sum of octaves. cell: side of the largest spots."""
    total, weight = np.zeros((height, width)), 0.5
    while cell >= 3:
        grid = rng.random((int(height / cell) + 3, int(width / cell) + 3), np.float32)
        total += weight * np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC))
        cell, weight = cell / 2, weight / 2
    return total


def ramp(rng, height, width):
    """Return a linear ramp (height, width) from 0 to 1 in a random direction."""
    share = rng.random()
    return np.add.outer(np.linspace(0, share, height), np.linspace(0, 1 - share, width))


def screen(rng, height, width, pitch, shape, edge):
    """Return the opacity (height, width) of a halftone screen that grows denser along a ramp.
    pitch: distance of the elements in pixels. shape: dots, lines, crossed. edge: softness of the borders."""
    angle = np.deg2rad(15 * rng.integers(12))
    yy, xx = np.mgrid[0:height, 0:width] * (2 * np.pi / pitch)
    u, v = np.cos(xx * np.cos(angle) + yy * np.sin(angle)), np.cos(yy * np.cos(angle) - xx * np.sin(angle))
    wave = dict(dots=(u + v) / 2, lines=u, crossed=np.maximum(u, v))[shape]
    coverage = rng.uniform(0, 0.4) + 0.6 * ramp(rng, height, width)
    return ((wave - (1 - 2 * coverage)) / edge + 0.5).clip(0, 1)


# ---- the canvas

class Canvas:
    """A picture that is drawn SUPER times larger than its final size."""

    def __init__(self, width, height):
        self.w, self.h, self.size = width, height, np.array([width, height])
        self.image = Image.new("RGB", (width * SUPER, height * SUPER))
        self.pen = ImageDraw.Draw(self.image)

    def fill(self, shapes, colors):
        """Fill one polygon (k, 2) or n polygons (n, k, 2) with one color (3,) or n colors (n, 3)."""
        shapes = SUPER * np.asarray(shapes, float)
        shapes = shapes.reshape(-1, shapes.shape[-2] * 2).tolist()
        colors = np.clip(colors, 0, 255).astype(int)
        for shape, color in zip(shapes, np.broadcast_to(colors, (len(shapes), 3)).tolist()):
            self.pen.polygon(shape, fill=tuple(color))

    def discs(self, xy, radius, colors, squash=1.0):
        """Fill ellipses. radius: horizontal. The vertical radius is radius * squash."""
        ring = CIRCLE * (1, squash)
        self.fill(np.atleast_2d(xy)[:, None] + ring * np.reshape(radius, (-1, 1, 1)), colors)

    def strokes(self, curves, width, colors, tip=False):
        """Draw brush strokes along cubic curves (n, 4, 2). Both ends taper, or only the last with `tip`."""
        t = np.linspace(0, 1, 14)[None, :, None]
        a, b, c, d = (curves[:, i, None] for i in range(4))
        path = a * (1 - t) ** 3 + 3 * b * t * (1 - t) ** 2 + 3 * c * t ** 2 * (1 - t) + d * t ** 3
        along = np.gradient(path, axis=1)
        across = along[..., ::-1] * (-1, 1) / (np.linalg.norm(along, axis=2, keepdims=True) + 1e-6)
        profile = np.minimum(1, 1.25 * (1 - t) ** 0.8) if tip else np.sin(np.pi * t.clip(0.02, 0.98)) ** 0.75
        half = across * profile * np.reshape(width, (-1, 1, 1)) / 2
        self.fill(np.concatenate([path + half, (path - half)[:, ::-1]], 1), colors)

    def wash(self, mask, color):
        """Blend a color over the picture. mask: opacity in [0, 1], of any resolution."""
        mask = Image.fromarray(np.uint8(np.clip(mask, 0, 1) * 255)).resize(self.image.size, Image.BILINEAR)
        self.image.paste(tuple(int(v) for v in color), (0, 0), mask)

    def gradient(self, *colors):
        """Cover the picture with a vertical gradient through these colors."""
        column = Image.fromarray(np.uint8(colors)[:, None])
        self.image.paste(column.resize(self.image.size, Image.BILINEAR))

    def finish(self, rng):
        """Return the picture at its final size, with glow around light areas and faint paper grain."""
        small = self.image.reduce(SUPER)
        bright = Image.eval(small, lambda v: max(0, v - 170) * 3)
        glow = sum(np.asarray(bright.filter(ImageFilter.GaussianBlur(r)), np.float32) for r in (5, 22)) / 510
        pixels = 1 - (1 - np.asarray(small, np.float32) / 255) * (1 - 0.25 * glow)
        pixels += 0.02 * (cloud_noise(rng, self.h, self.w, 6)[..., None] - 0.5)
        return Image.fromarray(np.uint8(pixels.clip(0, 1) * 255 + 0.5))


# ---- parts of the landscape

def draw_sky(canvas, rng, time):
    """Draw the sky at a time of day, a key of SKIES. Returns its five colors."""
    top, middle, low, light, land = (np.array(v, float) for v in SKIES[time])
    canvas.gradient(top, middle, low)
    if time in ("dusk", "night"):
        at = rng.random((350, 2)) * canvas.size * (1, 0.7)
        canvas.discs(at, 0.45 + rng.pareto(4, 350) * 0.5, mix(light, WHITE, rng.random(350)))
        for arm in ((12, 0), (0, 16)):      # glints
            arm = rng.uniform(0.3, 1, (14, 1)) * arm
            canvas.strokes(curve(rng, at[:14] - arm, at[:14] + arm), 2, WHITE)

    # sun or moon with a halo
    at, r = rng.uniform((0.15, 0.12), (0.85, 0.4)) * canvas.size, rng.uniform(18, 46)
    yy, xx = np.mgrid[0:canvas.h, 0:canvas.w]
    canvas.wash(0.7 * np.exp(-((xx - at[0]) ** 2 + (yy - at[1]) ** 2) / (18 * r ** 2)), light)
    canvas.discs(at, r, light)

    tones = mix(middle, low, 0.75), mix(low, light, 0.45), light
    for _ in range(rng.integers(1, 5)):     # clouds: heaps of discs in three tones
        at, size = rng.uniform((0, 0.35), (1, 0.6)) * canvas.size, rng.uniform(60, 190)
        x = rng.normal(0, 0.5, 130)
        xy = np.c_[x, -0.8 * rng.random(130) * np.exp(-2 * x ** 2)] * size + at
        r = size * rng.uniform(0.05, 0.22, 130) * np.exp(-x ** 2)
        for k, tone in enumerate(tones):
            canvas.discs(xy - np.outer(r, (0.1, 0.2)) * k, r * (1 - 0.13 * k), tone, 0.85)
    return top, middle, low, light, land


def draw_leaves(canvas, rng, at, spread, n, dark, light, size=7):
    """Draw n leaves around `at`, from dark to light: the light ones are at the upper left, in front."""
    offset = rng.normal(0, 1, (n, 2)).clip(-1.8, 1.8)
    lit = (0.5 - 0.25 * offset.sum(1) + rng.normal(0, 0.2, n)).clip(0, 1)
    start = offset[np.argsort(lit)] * spread + at
    angle, length = rng.normal(0.6, 0.9, (n, 1)), size * rng.uniform(0.6, 1.4, (n, 1))
    leaves = curve(rng, start, start + np.c_[np.cos(angle), np.sin(angle)] * length, 0.6)
    canvas.strokes(leaves, length * 0.45, mix(dark, light, np.sort(lit)))


# ---- the landscape

def meadow(canvas, rng):
    """Draw hills, a tree in blossom, and grass with flowers."""
    top, middle, low, light, land = draw_sky(canvas, rng, rng.choice(list(SKIES)))
    horizon, tint = canvas.h * rng.uniform(0.55, 0.7), vivid(rng)[0]
    for k in range(4):      # hills
        ridge = horizon + k * 14 - (145 - 32 * k) * cloud_noise(rng, 3, canvas.w + 1, 160 - 30 * k)[1]
        shape = np.r_[np.c_[np.arange(canvas.w + 1), ridge], [canvas.size, (0, canvas.h)]]
        canvas.fill(shape, mix(middle, land, 0.35 + 0.2 * k))

    crown = rng.uniform((0.1, 0.28), (0.9, 0.34)) * canvas.size
    clumps = rng.normal(crown, (85, 55), (30, 2))
    bark = mix(mix(land, (60, 30, 20), 0.7), light, rng.random(30) * 0.25)
    branches = curve(rng, rng.normal((crown[0], canvas.h * 0.86), 5, (30, 2)), clumps, 12)
    canvas.strokes(branches, rng.uniform(4, 20, 30), bark, tip=True)
    for at in clumps:
        draw_leaves(canvas, rng, at, (40, 24), 180, mix(land, top, 0.55) * 0.7, mix(land, light, 0.6))
        draw_leaves(canvas, rng, at, (30, 20), 15, tint, mix(tint, WHITE, 0.6), 12)

    depth = np.sort(rng.random((3200, 1)), 0) ** 1.4        # blades of grass, the far ones first
    base = np.c_[rng.random(3200) * canvas.w, horizon + 30 + depth * (canvas.h - horizon)]
    tips = base + np.c_[rng.normal(0.2, 0.3, (3200, 1)), np.full(3200, -1)] * (4 + 38 * depth)
    tones = mix(land * 0.55, mix(land, light, 0.65), rng.random(3200) ** 2)
    canvas.strokes(curve(rng, base, tips, 1 + 4 * depth), 0.6 + 2.6 * depth, tones, tip=True)
    canvas.discs(tips[::50], 1 + 4 * depth[::50], mix(tint, WHITE, rng.random(64)), 0.7)
    return canvas.finish(rng)


# ---- textures: (rng, height, width) -> pixels (H, W) or (H, W, 3) from 0 to 255

def random_paper(rng):
    """Return a light color, white in half of the calls."""
    return mix(WHITE, vivid(rng)[0], rng.choice([0, 0.4]))


def stars(rng, height, width):
    """Draw a star field: single pixels of random brightness on a dark gradient."""
    top, bottom = vivid(rng, 2) * rng.uniform(0.02, 0.25, (2, 1))
    pixels = mix(top, bottom, ramp(rng, height, width))
    n = int(height * width * rng.uniform(0.0005, 0.01))
    y, x = rng.integers(0, height, n), rng.integers(0, width, n)
    pixels[y, x] = mix(pixels[y, x], mix(WHITE, vivid(rng, n), 0.2), rng.uniform(0.2, 1, n) ** 1.5)
    return pixels


def screentone(rng, height, width):
    """Draw dots with a pitch of 2 to 6 pixels, with hard or antialiased edges."""
    dots = screen(rng, height, width, rng.uniform(2, 6), "dots", rng.choice([0.02, 0.4]))
    return mix(random_paper(rng), np.zeros(3), dots)


def hatching(rng, height, width):
    """Draw parallel or crossed lines, 2 to 8 pixels apart, with hard or antialiased edges."""
    shape, edge = rng.choice(["lines", "crossed"]), rng.choice([0.02, 0.5])
    return mix(random_paper(rng), np.zeros(3), screen(rng, height, width, rng.uniform(2, 8), shape, edge))


def grain(rng, height, width):
    """Draw paper: fine noise with a few coarse spots on a soft gradient."""
    a, b = mix(vivid(rng, 2), WHITE, rng.uniform(0.3, 0.9))
    relief = rng.normal(0, 0.4, (height, width)) + 2 * (cloud_noise(rng, height, width, 8) - 0.5)
    return mix(a, b, ramp(rng, height, width)) + relief[..., None] * rng.uniform(4, 24)


def dithering(rng, height, width):
    """Draw a gradient with few levels per channel, by ordered dithering with a 4x4 Bayer matrix."""
    bayer = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
    threshold = np.tile((bayer + 0.5) / 16, (height // 4 + 1, width // 4 + 1))[:height, :width, None]
    a, b = vivid(rng, 2)
    smooth = mix(a * 0.2, mix(b, WHITE, 0.5), ramp(rng, height, width)) / 255
    steps = rng.integers(1, 6)
    return np.floor(smooth * steps + threshold).clip(0, steps) / steps * 255


def line_art(rng, height, width):
    """Draw outlines in pure black and white without antialiasing."""
    image = Image.new("L", (width, height), 255)
    pen = ImageDraw.Draw(image)
    for _ in range(20):
        x, y, rx, ry = *rng.uniform(0, (width, height)), *rng.uniform(4, 90, 2)
        line = int(rng.integers(1, 4))
        pen.arc((x - rx, y - ry, x + rx, y + ry), *rng.uniform(0, 360, 2), fill=0, width=line)
        pen.line((x, y, x + 2 * rx, y + ry), fill=0, width=line)
    return np.array(image)


def text(rng, height, width):
    """Draw lines of random letters in several sizes."""
    image = Image.new("RGB", (width, height), tuple(np.int64(random_paper(rng))))
    letters = list("aaabcdeeefghiijklmnooopqrstuuvwxyzABDEGHKMNRST0123456789.,!?    ")
    pen, y = ImageDraw.Draw(image), 4
    while y < height:
        size = int(rng.choice([9, 11, 14, 18, 26, 40]))
        line = "".join(rng.choice(letters, 2 * width // size))
        pen.text((4, y), line, fill="black", font=ImageFont.load_default(size))
        y += int(size * 1.4)
    return np.array(image)


TEXTURES = (stars, screentone, hatching, grain, dithering, line_art, text)


# ---- folders of pictures

def save_pictures(folder, pictures):
    """Save (name, image) pairs into a new folder. If this fails, there is no folder. Raises OSError."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it to draw again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
        part = Path(temporary, "part")
        for name, image in pictures:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(part / name)
        part.rename(folder)


def draw_demo(folder, seed=0, train=28, val=6):
    """Draw landscapes as PNG files into folder/train and folder/val. All pictures are different."""
    def pictures():
        for k, name, i in [(0, "train", i) for i in range(train)] + [(1, "val", i) for i in range(val)]:
            yield f"{name}/{i:03}.png", meadow(Canvas(*SIZE), np.random.default_rng((seed, k, i)))
    save_pictures(folder, pictures())


def draw_textures(folder, count, seed=0, height=384, width=512):
    """Draw `count` textures as PNG files, all kinds in turn. height and width: even numbers."""
    def pictures():
        for i in range(count):
            rng, texture = np.random.default_rng((seed, 2, i)), TEXTURES[i % len(TEXTURES)]
            a, b, c, d = (texture(rng, height // 2, width // 2) for _ in range(4))      # four panels
            pixels = np.vstack([np.hstack([a, b]), np.hstack([c, d])])
            yield f"{i:03}_{texture.__name__}.png", Image.fromarray(np.uint8(pixels.clip(0, 255) + 0.5))
    save_pictures(folder, pictures())


def main():
    parser = argparse.ArgumentParser(description="Draw demo landscapes, or textures.")
    parser.add_argument("folder", metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--textures", type=int, metavar="N", help="draw N textures into DIR instead")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    try:
        if args.textures is None:
            draw_demo(args.folder, args.seed)
        else:
            draw_textures(args.folder, args.textures, args.seed)
    except OSError as error:
        parser.error(f"cannot write {args.folder}: {error.strerror or error}")


if __name__ == "__main__":
    main()
