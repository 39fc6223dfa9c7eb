"""demo.py: draws wallpaper-like pictures from nothing but a seed, to try training on before there are real ones.

    python data.py demo FOLDER

Line art with varying stroke, gradients, glow, stars, foliage, screentone and text-like strokes, in four scenes: a meadow,
a portrait, a city at night, a manga page. No two pictures are the same. Needs numpy and Pillow; copied alone it works.
"""
import os
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# ---------------------------------------------------------------------------------------------------------------------
# First the brushes, then the scenes made with them.
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


def draw_demo(folder, seed=0, train=28, val=6, progress=None):
    """Draws that many pictures, none twice, into folder/train and folder/val: PNG of 640x384 to 768x512.

    progress(what, done, total, start) after every picture. The folder is complete or absent. FileExistsError if it is
    there already, OSError if it cannot be written.
    """
    folder, scenes = Path(folder), (meadow, portrait, city, page)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists; use it, or remove it to draw again")
    part, start = folder.with_name(f"{folder.name}.{os.getpid()}.part"), time.time()
    try:
        for k, (name, count) in enumerate(dict(train=train, val=val).items()):
            (part / name).mkdir(parents=True)
            for i in range(count):
                rng, scene = np.random.default_rng((seed, k, i)), scenes[i % 4]
                picture = scene(Canvas(*((640, 384), (704, 448), (768, 512))[i % 3]), rng)
                picture.save(part / name / f"{i:03}_{scene.__name__}.png")
                if progress:
                    progress(f"drawing {name}", i + 1, count, start)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
