"""Draw demo pictures from a seed: wallpaper scenes for first training runs, and textures.

    python demo.py runs/demo                        # 28 + 6 scenes in runs/demo/train and runs/demo/val
    python demo.py runs/textures --textures 36      # stars, screentone, hatching, grain, dithering, text, ...

To add a scene, write a function (canvas, rng) -> PIL image like `meadow`, and add it to SCENES. This changes
the demo pictures of every seed. To add a texture, write a function (rng, height, width) -> uint8 (H, W) or
(H, W, 3) like `hatching`, and add it to TEXTURES.
Needs numpy and Pillow; copy this file and it works alone.
"""
import argparse
import contextlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Everywhere: coordinates in pixels of the finished picture, colors (r, g, b) or (r, g, b, alpha) in 0..255.

SUPER = 3       # scenes are drawn this many times too large and averaged down, for clean antialiased lines
WHITE = np.full(3, 255.0)
CIRCLE = np.linspace(0, 2 * np.pi, 40, endpoint=False)
SKIES = {       # zenith, middle, horizon, light, land
    "day": ((38, 98, 196), (104, 176, 238), (222, 241, 250), (255, 252, 240), (74, 142, 62)),
    "dawn": ((84, 108, 176), (214, 160, 190), (255, 226, 190), (255, 238, 214), (92, 122, 84)),
    "dusk": ((52, 40, 104), (196, 84, 104), (255, 190, 110), (255, 214, 150), (92, 88, 66)),
    "night": ((8, 12, 40), (24, 42, 98), (86, 104, 160), (214, 228, 255), (30, 62, 64))}


# ------------------------------------------------------------------ colors, curves, noise

def mix(a, b, t):
    """Blend color a with color b; t in [0, 1] is the share of b, one number or (n,) for n colors."""
    t = np.asarray(t, float)[..., None]
    return np.asarray(a, float) * (1 - t) + np.asarray(b, float) * t


def vivid(rng, n=1, strength=0.75):
    """Draw n bright colors (n, 3) with full saturation times `strength`."""
    hue = np.abs((rng.random((n, 1)) * 6 + (0, 4, 2)) % 6 - 3) - 1
    return mix(WHITE, hue.clip(0, 1) * 255, strength) * rng.uniform(0.6, 1, (n, 1))


def curve(rng, start, end, bend=0.0):
    """Draw cubic Bezier control points (n, 4, 2) from start to end, each (2,) or (n, 2).

    The two middle points move by a random offset with standard deviation `bend`, one number or (n,).
    """
    start, end = np.broadcast_arrays(np.atleast_2d(start).astype(float), np.atleast_2d(end).astype(float))
    offset = rng.normal(0, 1, (2, len(start), 2)) * np.reshape(bend, (-1, 1))
    return np.stack([start, mix(start, end, 1 / 3) + offset[0], mix(start, end, 2 / 3) + offset[1], end], 1)


def cloud_noise(rng, height, width, cell, stretch=1):
    """Draw noise (height, width) in about [0, 1], a sum of octaves.

    The largest spots are `cell` pixels high and cell * stretch wide.
    """
    total, weight = np.zeros((height, width)), 0.5
    while cell >= 3:
        grid = rng.random((int(height / cell) + 3, int(width / cell / stretch) + 3), np.float32)
        total += weight * np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC))
        cell, weight = cell / 2, weight / 2
    return total


# ------------------------------------------------------------------ the canvas

class Canvas:
    """A picture that is drawn SUPER times too large."""

    def __init__(self, width, height):
        self.w, self.h, self.size = width, height, np.array([width, height])
        self.image = Image.new("RGB", (width * SUPER, height * SUPER))
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def fill(self, shapes, colors):
        """Fill closed polygons: one (k, 2), or many (n, k, 2)."""
        shapes = np.asarray(shapes, float) * SUPER
        shapes = shapes.reshape(-1, shapes.shape[-2] * 2).tolist()
        colors = np.clip(colors, 0, 255).astype(int)
        colors = np.broadcast_to(colors, (len(shapes), colors.shape[-1])).tolist()
        for shape, color in zip(shapes, colors):
            self.pen.polygon(shape, fill=tuple(color))

    def box(self, x, y, w, h, color):
        self.fill([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], color)

    def discs(self, xy, radius, colors, squash=1.0):
        """Fill ellipses with a horizontal radius, and a vertical one that is `squash` times as large."""
        ring = np.stack([np.cos(CIRCLE), np.sin(CIRCLE) * squash], 1)
        self.fill(np.atleast_2d(xy)[:, None] + ring * np.reshape(radius, (-1, 1, 1)), colors)

    def strokes(self, curves, width, colors, edge=None, tip=False, line=1.0):
        """Draw brush strokes along cubic curves (n, 4, 2).

        A stroke is thickest in the middle, or with `tip` at its root. Leaves, petals and locks of hair are
        short or thick strokes. edge: color of an outline of `line` pixels.
        """
        t = np.linspace(0, 1, 14)[None, :, None]
        a, b, c, d = (curves[:, i, None] for i in range(4))
        path = a * (1 - t) ** 3 + 3 * b * t * (1 - t) ** 2 + 3 * c * t ** 2 * (1 - t) + d * t ** 3
        along = np.gradient(path, axis=1)
        across = along[..., ::-1] * (-1, 1) / (np.linalg.norm(along, axis=2, keepdims=True) + 1e-6)
        profile = np.minimum(1, 1.25 * (1 - t) ** 0.8) if tip else np.sin(np.pi * t.clip(0.02, 0.98)) ** 0.75
        half = across * profile * np.reshape(width, (-1, 1, 1)) / 2
        shapes = np.concatenate([path + half, (path - half)[:, ::-1]], 1)
        if edge is not None:        # outline and stroke alternate, so each stroke covers the previous ones
            outlines = shapes + np.concatenate([across, -across[:, ::-1]], 1) * line
            colors = np.broadcast_to(colors, (len(shapes), 3))
            colors = np.stack([np.broadcast_to(edge, colors.shape), colors], 1).reshape(-1, 3)
            shapes = np.stack([outlines, shapes], 1)
        self.fill(shapes, colors)

    def wash(self, mask, color):
        """Blend a color over the picture. mask: opacity in [0, 1], of any resolution."""
        mask = np.uint8(np.clip(mask, 0, 1) * 255)
        mask = Image.fromarray(mask).resize(self.image.size, Image.BILINEAR)
        self.image.paste(tuple(int(v) for v in color), (0, 0), mask)

    def gradient(self, *stops):
        """Cover the picture with a vertical gradient through the colors of `stops`."""
        y = np.linspace(0, len(stops) - 1, self.h)
        rows = np.stack([np.interp(y, range(len(stops)), np.asarray(stops)[:, i]) for i in range(3)], 1)
        self.image.paste(Image.fromarray(np.uint8(rows)[:, None]).resize(self.image.size, Image.BILINEAR))

    def finish(self, rng, bloom=0.5):
        """Return the finished picture: averaged down, with glow around light parts and faint paper grain."""
        small = self.image.reduce(SUPER)
        bright = Image.eval(small, lambda v: max(0, v - 170) * 3)
        glow = sum(np.asarray(bright.filter(ImageFilter.GaussianBlur(r)), np.float32) for r in (5, 22)) / 510
        pixels = 1 - (1 - np.asarray(small, np.float32) / 255) * (1 - bloom * 0.5 * glow)
        pixels += 0.02 * (cloud_noise(rng, self.h, self.w, 6, 5)[..., None] - 0.5)
        return Image.fromarray(np.uint8(pixels.clip(0, 1) * 255 + 0.5))


# ------------------------------------------------------------------ parts of scenes

def draw_sky(canvas, rng, *times):
    """Draw the sky of one of `times`, keys of SKIES. Returns its five colors."""
    time = rng.choice(times)
    top, middle, low, light, land = (np.array(v, float) for v in SKIES[time])
    canvas.gradient(mix(top, rng.integers(0, 255, 3), 0.08), middle, low, low)
    if time in ("night", "dusk"):
        draw_stars(canvas, rng)

    # sun or moon with a halo
    at = rng.uniform((0.15, 0.12), (0.85, 0.4)) * canvas.size
    r = rng.uniform(18, 46)
    yy, xx = np.mgrid[0:canvas.h:2, 0:canvas.w:2]
    canvas.wash(0.7 * np.exp(-((xx - at[0]) ** 2 + (yy - at[1]) ** 2) / (18 * r ** 2)), light)
    canvas.discs(at, r, light)
    if time == "night":
        canvas.discs(rng.normal(at, r / 3, (7, 2)), rng.uniform(2, r / 4, 7), mix(light, middle, 0.3))

    # thin streaks, then heaped clouds
    height, width = canvas.h // 2, canvas.w // 2
    streaks = 2.5 * cloud_noise(rng, height, width, 40, 5) - np.linspace(1.55, 1.1, height)[:, None]
    canvas.wash(streaks, mix(light, WHITE, 0.3))
    tones = mix(middle, low, 0.75), mix(low, light, 0.45), mix(light, low if time == "night" else WHITE, 0.5)
    for _ in range(rng.integers(1, 5)):
        draw_cloud(canvas, rng, tones)
    return top, middle, low, light, land


def draw_stars(canvas, rng):
    """Draw small stars, and some with cross-shaped glints."""
    n = int(rng.integers(250, 500))
    size = (0.45 + rng.pareto(3, n) * 0.5).clip(0, 2.2)
    at = rng.random((n, 2)) * canvas.size * (1, 0.7)
    canvas.discs(at, size, mix((150, 180, 255), (255, 250, 235), rng.random(n)))
    for s in rng.uniform(4, 16, 14):
        at = rng.random(2) * canvas.size * (1, 0.6)
        arms = np.array([(1, 0), (0, 1.4), (0.35, 0.35), (0.35, -0.35)]) * s
        canvas.strokes(curve(rng, at - arms, at + arms), 0.5 + s * 0.12, WHITE)


def draw_cloud(canvas, rng, tones):
    """Draw a heap of 130 puffs from back to front, each in three tones."""
    n = 130
    at, size = rng.uniform((0, 0.35), (1, 0.6)) * canvas.size, rng.uniform(60, 190)
    dx = rng.normal(0, 0.5, n)
    up = np.sort(rng.random(n))[::-1] * np.exp(-dx ** 2 * 2) * 0.8
    r = size * (0.05 + 0.17 * rng.random(n)) * np.exp(-dx ** 2)
    xy = np.c_[at[0] + dx * size, at[1] - up * size]
    xy = np.stack([xy - step * r[:, None] * (0.1, 0.2) for step in range(3)], 1).reshape(-1, 2)
    canvas.discs(xy, np.outer(r, (1, 0.92, 0.74)).ravel(), np.tile(tones, (n, 1)), 0.85)


def draw_water(canvas, rng, shore, deep, light):
    """Turn everything below y = shore into rippled water that mirrors what is above."""
    above, s = np.asarray(canvas.image), int(shore * SUPER)
    rows = np.arange(len(above) - s)
    jerks = rng.normal(0, 5, len(rows) // 12 + 1).repeat(12)[:len(rows)]
    shift = np.sin(rows / (4 + rows / 25) + rng.random() * 6) * (3 + rows / 25) + jerks
    columns = (np.arange(above.shape[1]) + shift[:, None].astype(int)).clip(0, above.shape[1] - 1)
    below = above[(s - 1 - rows * 1.2).astype(int).clip(0)[:, None], columns]
    canvas.image.paste(Image.fromarray(np.uint8(mix(below, deep, 0.42))), (0, s))

    near = np.sort(rng.random(420))     # ripples
    start = np.c_[rng.random(420) * canvas.w, shore + 2 + near * (canvas.h - shore)]
    end = start + np.c_[(8 + near * 60) * rng.uniform(0.3, 1, 420), 0 * near]
    ripples = curve(rng, start, end, 0.7)
    canvas.strokes(ripples, 0.5 + near * 2.4, np.c_[mix(deep, light, rng.random(420)), 60 + near * 160])


def draw_leaves(canvas, rng, at, spread, n, dark, light, size=7.0):
    """Draw a clump of n leaves, the light ones on top and towards the upper left."""
    offset = rng.normal(0, 1, (n, 2)).clip(-1.8, 1.8)
    lit = (0.5 - 0.25 * offset.sum(1) + rng.normal(0, 0.2, n)).clip(0, 1)
    start = offset[np.argsort(lit)] * spread + at
    lit = np.sort(lit)
    angle = rng.normal(0.6, 0.9, n)
    length = size * rng.uniform(0.6, 1.4, n)
    end = start + np.c_[length * np.cos(angle), length * np.sin(angle)]
    canvas.strokes(curve(rng, start, end, 0.6), length * 0.45, mix(dark, light, lit))


def draw_flowers(canvas, rng, xy, size, color):
    """Draw blossoms of five petals with veins and stamens. size: radius in pixels, (n,)."""
    for at, s in zip(xy, size):
        angle = rng.random() * 7 + np.arange(5) * 2 * np.pi / 5
        tips = np.c_[np.cos(angle), np.sin(angle) * 0.8] * s
        tints = mix(color, WHITE, rng.uniform(0.1, 0.6, 5))
        edge = mix(color, (90, 20, 60), 0.35)
        canvas.strokes(curve(rng, at, at + tips, s * 0.06), s * 0.75, tints, edge, line=0.5)
        canvas.strokes(curve(rng, at, at + tips * 0.75), 0.6, mix(color, (160, 30, 80), 0.4))
        canvas.discs(at + tips * 0.35, s * 0.05, (250, 220, 120))


def draw_glyphs(canvas, rng, x, y, size, color, columns=1, rows=4):
    """Draw meaningless vertical writing: signs of six brush strokes, in columns from right to left."""
    for i, j in np.ndindex(columns, rows):
        ends = np.sort(rng.choice(6, (6, 2))) / 6
        lane = rng.choice(6, 6) / 6
        vertical = rng.random((6, 1)) < 0.5
        at = (x - i * size * 1.2, y + j * size * 1.12)
        start, end = (np.where(vertical, np.c_[lane, e], np.c_[e, lane]) * size + at for e in ends.T)
        strokes = curve(rng, start, end, size * rng.choice([0.02, 0.02, 0.25]))
        canvas.strokes(strokes, size * rng.uniform(0.09, 0.15), color)


# ------------------------------------------------------------------ a head

class Head:
    """A face with hair and shoulders. Coordinates are relative to the center; the head is about 2 units high.

    r: pixels per unit. The colors are those of hair, skin, iris and ink (the outlines).
    """

    def __init__(self, canvas, rng, center, r, hair, skin, iris, ink):
        self.canvas, self.rng, self.center, self.r = canvas, rng, center, r
        self.hair, self.skin, self.iris, self.ink = hair, skin, iris, ink
        tilt = rng.normal(0, 0.12)
        self.line = max(0.8, r * 0.018)         # line width in pixels
        self.cloth = vivid(rng, strength=0.5)[0] * rng.uniform(0.4, 1)
        self.rotation = np.array([(np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))]) * r

    def point(self, p):
        """Convert coordinates to pixels."""
        return np.asarray(p, float) @ self.rotation + self.center

    def oval(self, x, y, rx, ry, color):
        self.canvas.fill(self.point(np.c_[x + np.cos(CIRCLE) * rx, y + np.sin(CIRCLE) * ry]), color)

    def lines(self, start, end, bend, width, color, edge=None, tip=False, line=1.0):
        curves = curve(self.rng, self.point(start), self.point(end), bend * self.r)
        self.canvas.strokes(curves, width, color, edge, tip, line)

    def hair_tones(self, n, most):
        """Draw n hair colors, mixed with ink or white up to the share `most`."""
        other = np.where(self.rng.random((n, 1)) < 0.5, self.ink, WHITE)
        return mix(self.hair, other, self.rng.uniform(0, most, n))

    def draw(self):
        length = self.draw_back_hair()
        body = self.draw_shoulders()
        self.draw_face()
        for side in (-1, 1):
            self.draw_clothes(side, body)
            self.draw_blush(side)
            self.draw_eye(side)
        self.lines((0.02, 0.58), (-0.02, 0.65), 0, self.line * 1.6, mix(self.skin, self.ink, 0.5))      # nose
        lip = mix(self.ink, (190, 40, 60), 0.35)
        self.lines((-0.14, 0.8), (0.14, 0.8), 0.03, self.line * 1.8, lip)
        self.draw_front_hair(length)

    def draw_back_hair(self):
        """Draw the hair behind the head. Returns its length."""
        rng, n = self.rng, 46
        length = rng.uniform(1.3, 3.2)
        root = rng.uniform(-0.6, 0.6, n)
        end = np.c_[rng.normal(0, 0.75, n), length + rng.normal(0, 0.3, n)]
        bend = rng.uniform(0.05, 0.22)
        width = self.r * rng.uniform(0.15, 0.5, n)
        color = mix(self.hair_tones(n, 0.3), self.ink, 0.25)
        start, end = np.c_[root, np.full(n, -0.7)], np.c_[root * 1.6, np.zeros(n)] + end
        self.lines(start, end, bend, width, color, self.ink, tip=True, line=self.line)
        edge = self.line / self.r
        self.oval(0, -0.25, 0.93 + edge, 0.88 + edge, self.ink)
        self.oval(0, -0.25, 0.93, 0.88, mix(self.hair, self.ink, 0.15))
        return length

    def draw_shoulders(self):
        """Draw neck and shoulders. Returns the right outline of the body."""
        neck = [(-0.24, 0.8), (0.24, 0.8), (0.3, 1.6), (-0.3, 1.6)]
        self.canvas.fill(self.point(neck), mix(self.skin, self.ink, 0.18))
        body = np.array([(0.3, 1.35), (1.15, 1.65), (1.5, 2.4), (1.7, 6)])
        self.canvas.fill(self.point(np.r_[body, body[::-1] * (-1, 1), [(0, 1.95)]]), self.cloth)
        return body

    def draw_face(self):
        half = np.array([(0.8, -0.1), (0.8, 0.2), (0.7, 0.55), (0.45, 0.86), (0.14, 1.04), (0, 1.06)])
        forehead = np.c_[-np.cos(CIRCLE[:21]) * 0.8, -0.1 - np.sin(CIRCLE[:21]) * 0.9]
        face = np.r_[half, half[::-1] * (-1, 1), forehead]
        self.canvas.fill(self.point(face * (1 + self.line / self.r)), self.ink)
        self.canvas.fill(self.point(face), self.skin)

    def draw_clothes(self, side, body):
        """Draw collar and folds. side: 1 for the right half, -1 mirrors it."""
        rng, mirror = self.rng, (side, 1)
        collar = np.array([(0.28, 1.3), (0.95, 1.75), (0.75, 2.3), (0, 2.05)])
        self.canvas.fill(self.point(collar * mirror), mix(self.cloth, WHITE, 0.55))
        start = np.c_[rng.uniform(0.2, 1.5, 16), rng.uniform(1.9, 3.2, 16)]
        end = start + np.c_[rng.uniform(-0.25, 0.15, 16), rng.uniform(0.3, 1.1, 16)]
        width = self.line * rng.uniform(0.8, 4, 16)
        self.lines(start * mirror, end * mirror, 0.08, width, mix(self.cloth, self.ink, 0.45))
        self.lines(body[:-1] * mirror, body[1:] * mirror, 0.02, self.line * 1.6, self.ink)

    def draw_blush(self, side):
        self.oval(0.5 * side, 0.57, 0.2, 0.1, (*mix(self.skin, (240, 90, 90), 0.35), 130))
        start = np.c_[0.5 * side + np.linspace(-0.1, 0.1, 4), np.full(4, 0.6)]
        self.lines(start, start + (0.05, -0.08), 0, self.line * 0.8, mix(self.skin, (210, 60, 70), 0.6))

    def draw_eye(self, side):
        """Draw an eye with lid, lashes and brow."""
        line, iris, ink, x, mirror = self.line, self.iris, self.ink, 0.38 * side, (side, 1)
        self.oval(x, 0.24, 0.22, self.rng.uniform(0.2, 0.24), mix(WHITE, ink, 0.02))
        for k, dark in ((1, 0.8), (0.9, 0.45), (0.72, 0)):
            self.oval(x, 0.25 + (1 - k) * 0.22, 0.155 * k, 0.21 * k, mix(iris, ink, dark))
        self.oval(x, 0.36, 0.085, 0.06, mix(iris, WHITE, 0.55))
        rays = np.stack([np.cos(CIRCLE[1:20:2]), np.sin(CIRCLE[1:20:2])], 1)
        self.lines((x, 0.27) + rays * 0.08, (x, 0.27) + rays * 0.15, 0, line * 0.6, mix(iris, WHITE, 0.4))
        self.oval(x, 0.22, 0.06, 0.085, mix(iris, ink, 0.9))
        self.oval(x - 0.06, 0.14, 0.052, 0.062, WHITE)
        lid = np.array([[(0.13, 0.14), (0.26, -0.06), (0.52, -0.08), (0.65, 0.2)]]) * mirror
        self.canvas.strokes(self.point(lid), self.r * 0.1, ink)
        self.canvas.strokes(self.point(lid - (0, 0.1)), line, mix(self.skin, ink, 0.6))
        lashes = np.array([(0.58, 0.06), (0.61, 0.12), (0.63, 0.17)])
        self.lines(lashes * mirror, (lashes + (0.11, -0.05)) * mirror, 0.01, line * 2.2, ink, tip=True)
        self.lines((0.26 * side, 0.47), (0.56 * side, 0.43), 0.02, line * 1.1, ink)
        brow = mix(self.hair, ink, 0.5)
        self.lines((0.18 * side, -0.22), (0.6 * side, -0.24), 0.04, line * 2.4, brow)

    def draw_front_hair(self, length):
        """Draw the fringe, locks at the sides, single hairs and a ring of light."""
        rng, line = self.rng, self.line
        n = int(rng.integers(9, 14))
        ends = np.linspace(-0.95, 0.95, n)
        ends = ends[np.argsort(-np.abs(np.linspace(-1, 1, n)) + rng.normal(0, 0.2, n))]
        drop = 0.05 + 0.55 * np.abs(ends) ** 3 + rng.normal(0, 0.09, n) + length * 0.45 * (np.abs(ends) > 0.7)
        x = np.outer(ends, (0.4, 1.1, 1.12, 1))
        y = np.c_[-1.02 + 0.1 * ends ** 2, np.full(n, -0.85), np.full(n, -0.3), drop]
        locks = np.stack([x, y], 2)
        width = self.r * rng.uniform(0.28, 0.42, n)
        self.canvas.strokes(self.point(locks), width, self.hair_tones(n, 0.12), self.ink, tip=True, line=line)

        hairs = locks[rng.integers(0, n, 150)]
        hairs[..., 0] += np.outer(rng.normal(0, 0.055, 150), (0.6, 1, 1, 0.3))
        width = line * rng.uniform(0.3, 1.1, 150)
        self.canvas.strokes(self.point(hairs), width, self.hair_tones(150, 0.55))

        angle = np.linspace(-1, 1, 60) + rng.normal(0, 0.02, 60)
        start = np.c_[np.sin(angle * 1.05) * 0.88, -0.1 - np.cos(angle) * 0.62]
        end = start + np.c_[np.sin(angle) * 0.06, -rng.uniform(0.06, 0.2, 60)]
        self.lines(start, end, 0, line * 2, (*mix(self.hair, WHITE, 0.75), 190))


# ------------------------------------------------------------------ scenes

def meadow(canvas, rng):
    """Draw hills, a tree in blossom and grass with flowers."""
    top, middle, low, light, land = draw_sky(canvas, rng, "day", "dawn", "dusk")
    horizon = canvas.h * rng.uniform(0.55, 0.7)
    crown = rng.uniform((0.1, 0.28), (0.9, 0.34)) * canvas.size
    for k in range(4):      # hills
        ridge = horizon + k * 14 - (145 - 32 * k) * cloud_noise(rng, 3, canvas.w + 8, 160 - 30 * k)[1]
        shape = np.r_[np.c_[np.arange(-4, canvas.w + 4), ridge], [(canvas.w + 4, canvas.h), (-4, canvas.h)]]
        canvas.fill(shape, mix(middle, land, 0.35 + 0.2 * k))

    bark, root = mix(land, (60, 30, 20), 0.7), (crown[0] + rng.normal(0, 25), canvas.h * 0.86)
    trunk = curve(rng, rng.normal(root, 5, (30, 2)), crown, 12)
    width = rng.uniform(2, 22, 30)
    canvas.strokes(trunk, width, mix(bark, light, rng.random(30) * 0.25), tip=True)
    tint = vivid(rng)[0]
    for at in sorted(rng.normal(crown, (85, 55), (22, 2)), key=lambda p: -p[1]):
        canvas.strokes(curve(rng, crown + (0, 60), at, 14), 7, bark, tip=True)
        draw_leaves(canvas, rng, at, (40, 24), 240, mix(land, top, 0.55) * 0.7, mix(land, light, 0.6))
        draw_flowers(canvas, rng, rng.normal(at, (30, 20), (3, 2)), rng.uniform(3, 9, 3), tint)

    n = 3200                # blades of grass
    depth = np.sort(rng.random(n)) ** 1.4
    base = np.c_[rng.random(n) * canvas.w, horizon + 30 + depth * (canvas.h - horizon)]
    height = 4 + 38 * depth
    shade = mix(land * 0.55, land, rng.random(n))
    shade = mix(shade, mix(land, light, 0.65), (rng.random(n) * 0.9) ** 2)
    tips = base + np.c_[rng.normal(0.2, 0.3, n) * height, -height]
    canvas.strokes(curve(rng, base, tips, height * 0.12), 0.6 + 2.6 * depth, shade, tip=True)
    depth = np.sort(rng.random(60))
    at = np.c_[rng.random(60) * canvas.w, horizon + 36 + depth * (canvas.h - horizon - 30)]
    draw_flowers(canvas, rng, at, 1.5 + 8 * depth, tint)
    return canvas.finish(rng)


def portrait(canvas, rng):
    """Draw a head in front of a sky or a gradient, with blurred lights, foliage and petals."""
    a, b, hair, iris = vivid(rng, 4, rng.uniform(0.3, 0.9))
    if rng.random() < 0.5:
        draw_sky(canvas, rng, *SKIES)
    else:
        canvas.gradient(mix(a, WHITE, 0.2), mix(a, b, 0.5), mix(b, WHITE, 0.5))
    for r in rng.uniform(15, 50, 40):       # lights out of focus
        at = rng.random(2) * canvas.size
        color = mix(vivid(rng)[0], (255, 240, 220), 0.5)
        canvas.discs(at, r, (*mix(color, WHITE, 0.3), rng.integers(30, 90)))
        canvas.discs(at, r * 0.93, (*color, rng.integers(20, 60)))
    foliage = (canvas.w * rng.random(), canvas.h)
    draw_leaves(canvas, rng, foliage, (canvas.w * 0.4, 50), 900, b * 0.4, mix(b, (200, 255, 150), 0.5), 15)
    draw_flowers(canvas, rng, rng.uniform((0, 0.7), (1, 1), (26, 2)) * canvas.size, rng.uniform(6, 20, 26), a)
    hair = hair * rng.uniform(0.3, 1)
    skin = mix((255, 232, 216), (226, 180, 150), rng.random())
    ink = mix(hair, (22, 14, 34), 0.85)
    center = rng.uniform((0.3, 0.4), (0.7, 0.48)) * canvas.size
    Head(canvas, rng, center, canvas.h * rng.uniform(0.2, 0.3), hair, skin, iris * 0.8, ink).draw()
    start = rng.random((60, 2)) * canvas.size       # petals in the wind
    size = rng.uniform(3, 11, (60, 1))
    tints = mix((255, 180, 200), WHITE, rng.random(60))
    canvas.strokes(curve(rng, start, start + rng.normal(0, 1, (60, 2)) * size, 1), size * 0.6, tints)
    return canvas.finish(rng)


def city(canvas, rng):
    """Draw a city at the water by night, with lit windows, neon signs and wires."""
    top, middle, low, light, _ = draw_sky(canvas, rng, "night", "dusk")
    shore = canvas.h * rng.uniform(0.66, 0.8)
    for layer in range(3):
        x = -20.0
        while x < canvas.w:
            width = rng.uniform(28, 80) * (1 + layer * 0.4)
            height = shore * rng.uniform(0.2, 0.75) * (1 - 0.15 * layer)
            wall = mix(mix(low, middle, 0.5), top * 0.55, 0.35 + 0.3 * layer)
            draw_house(canvas, rng, x, shore, width, height, wall, layer)
            if layer == 2 and rng.random() < 0.7:       # a neon sign
                s, sx, sy = rng.uniform(12, 19), x + width * 0.6, shore - height + rng.uniform(8, 30)
                canvas.box(sx - 3, sy - 3, s + 6, s * 4.6 + 6, top * 0.4)
                draw_glyphs(canvas, rng, sx, sy, s, mix(vivid(rng, 1, 0.9)[0], WHITE, 0.35))
            x += width * rng.uniform(0.8, 1.15)
    draw_water(canvas, rng, shore, top, light)
    for y in rng.uniform(0.02, 0.3, 5) * canvas.h:      # wires
        wire = [(-9, y), (canvas.w * 0.3, y + 60), (canvas.w * 0.7, y + 40), (canvas.w + 9, y - 20)]
        canvas.strokes(np.array([wire]), 1.4, top * 0.3)
    return canvas.finish(rng, 0.8)


def draw_house(canvas, rng, x, shore, width, height, wall, layer):
    """Draw a house of the color `wall` with windows and an antenna; layer 0 is the farthest."""
    y = shore - height
    canvas.box(x, y, width, canvas.h, wall)
    canvas.box(x, y, width * 0.22, canvas.h, wall * 0.75)
    step = rng.uniform(4, 6) + 2 * layer
    lamp = mix((255, 214, 130), (190, 225, 255), rng.random())
    panes = np.mgrid[x + width * 0.28:x + width - step:step, y + 5:shore - 4:step * 1.3]
    panes = panes.reshape(2, -1).T[:, None]
    lit = rng.random((len(panes), 1)) < rng.uniform(0.25, 0.6)
    color = np.where(lit, lamp * rng.uniform(0.6, 1, (len(panes), 1)), wall * 0.7)
    canvas.fill(panes + np.array([(0, 0), (0.6, 0), (0.6, 0.75), (0, 0.75)]) * step, color)
    antenna = curve(rng, (x + width / 2, y + 2), (x + width / 2, y - height * 0.16))
    canvas.strokes(antenna, 1.5, wall * 0.6)


def page(canvas, rng):
    """Draw a comic page of six gray panels."""
    canvas.image.paste((250, 249, 246), (0, 0, *canvas.image.size))
    ink, gap = np.array((18, 16, 22.0)), 9
    xs = np.array([0, rng.uniform(0.3, 0.45), rng.uniform(0.6, 0.72), 1]) * (canvas.w - gap)
    ys = np.stack([np.zeros(3), rng.uniform(0.4, 0.6, 3), np.ones(3)]) * (canvas.h - gap)
    for i, k in np.ndindex(3, 2):
        x, y = int(xs[i]) + gap, int(ys[k, i]) + gap
        panel = Canvas(int(xs[i + 1]) - x, int(ys[k + 1, i]) - y)
        draw_panel(panel, rng, ink, always_head=k > 0)
        canvas.box(x - 1.5, y - 1.5, panel.w + 3, panel.h + 3, ink)
        canvas.image.paste(panel.image.convert("L"), (x * SUPER, y * SUPER))
    return canvas.finish(rng, 0)


def draw_panel(panel, rng, ink, always_head):
    """Draw speed lines, or screentone and hatching, then foliage, a head and a speech balloon."""
    panel.gradient(*(mix(WHITE, ink, v) for v in rng.uniform(0, 0.5, 2)))
    kind = rng.integers(0, 3)       # 0 speed lines, 1 screentone, 2 screentone and foliage
    if kind == 0:
        angle = rng.random(240) * 2 * np.pi
        middle = panel.size * rng.uniform(0.3, 0.7, 2)
        ray = np.c_[np.cos(angle), np.sin(angle)] * panel.size.max()
        near = middle + ray * rng.uniform(0.2, 0.5, (240, 1))
        panel.strokes(curve(rng, middle + ray, near), rng.uniform(1, 9, 240), ink, tip=True)
    else:       # dots that are larger where a cloudy tone is darker
        angle = rng.uniform(0.3, 1.2)
        pitch = rng.uniform(3.2, 6) * SUPER / (2 * np.pi)
        yy, xx = np.mgrid[0:panel.h * SUPER, 0:panel.w * SUPER].astype(np.float32) / pitch
        u, v = xx * np.cos(angle) + yy * np.sin(angle), yy * np.cos(angle) - xx * np.sin(angle)
        tone = np.float32(cloud_noise(rng, panel.h, panel.w, 120) * 1.6 - 0.6)
        tone = Image.fromarray(tone).resize(panel.image.size, Image.BILINEAR)
        dots = np.uint8((np.cos(u) + np.cos(v)) / 2 > 1.05 - np.asarray(tone)) * 255
        panel.image.paste(tuple(ink.astype(int)), (0, 0), Image.fromarray(dots))
        start = rng.uniform((0, 0.7), (1, 1), (110, 2)) * panel.size
        panel.strokes(curve(rng, start, start + (22, -30), 1), 1.2, ink)
    if kind == 2:
        for at in rng.uniform((0, 0.4), (1, 1), (9, 2)) * panel.size:
            draw_leaves(panel, rng, at, (34, 22), 150, ink, np.full(3, 235.0))
    if kind < 2 or always_head:
        center = rng.uniform((0.35, 0.45), (0.65, 0.5)) * panel.size
        r = panel.size.min() * rng.uniform(0.24, 0.34)
        hair, skin, iris = np.full(3, rng.choice([30.0, 130, 235])), np.full(3, 250.0), np.full(3, 110.0)
        Head(panel, rng, center, r, hair, skin, iris, ink).draw()
    s = rng.uniform(8, 12)
    at = panel.size * (rng.choice([0.17, 0.83]), 0.1) + (0, 30)
    panel.discs(at, s * 3.1, ink, 1.15)
    panel.discs(at, s * 3.1 - 1.3, WHITE, 1.15)
    draw_glyphs(panel, rng, at[0] + s * 0.8, at[1] - s * 2, s, ink, 3, 4)


SCENES = (meadow, portrait, city, page)


# ------------------------------------------------------------------ textures

def two_colors(rng):
    """Draw a dark and a light color; black and white in half of the calls."""
    if rng.random() < 0.5:
        return np.zeros(3), WHITE
    return vivid(rng)[0] * 0.25, mix(vivid(rng)[0], WHITE, 0.6)


def shade(height, width, angle):
    """Return a linear ramp (height, width) from 0 to 1 in the direction of `angle`, in radians."""
    yy, xx = np.mgrid[0:height, 0:width]
    ramp = xx * np.cos(angle) + yy * np.sin(angle)
    return (ramp - ramp.min()) / np.ptp(ramp)


def panels(height, width, rows=2, columns=3):
    """Yield the slices (y, x) of a table of panels."""
    for i, j in np.ndindex(rows, columns):
        yield (slice(i * height // rows, (i + 1) * height // rows),
               slice(j * width // columns, (j + 1) * width // columns))


def rotated_grid(height, width, pitch, angle):
    """Return the phases (u, v), each (height, width), of a grid of this pitch that is rotated by `angle`."""
    yy, xx = np.mgrid[0:height, 0:width] * (2 * np.pi / pitch)
    return xx * np.cos(angle) + yy * np.sin(angle), yy * np.cos(angle) - xx * np.sin(angle)


def stars(rng, height, width):
    """Draw a star field: single pixels of random brightness on a dark gradient."""
    top, bottom = vivid(rng, 2) * rng.uniform(0.02, 0.25, (2, 1))
    pixels = mix(top, bottom, shade(height, width, np.pi / 2))
    n = int(height * width * rng.uniform(0.0005, 0.01))
    y, x = rng.integers(0, height, n), rng.integers(0, width, n)
    brightness = rng.uniform(0.2, 1, n) ** 1.5
    pixels[y, x] = mix(pixels[y, x], mix(WHITE, vivid(rng, n), rng.uniform(0, 0.4, n)), brightness)
    return np.uint8(pixels + 0.5)


def screentone(rng, height, width):
    """Draw panels of dots that grow along a ramp, with a pitch of 2 to 6 pixels, at several angles."""
    dark, light = two_colors(rng)
    pixels = np.empty((height, width, 3))
    for area in panels(height, width):
        h, w = pixels[area].shape[:2]
        u, v = rotated_grid(h, w, rng.uniform(2, 6), np.deg2rad(rng.choice([0, 15, 30, 45, 60, 75])))
        coverage = rng.uniform(0, 0.4) + 0.6 * shade(h, w, rng.uniform(0, 7))
        edge = rng.choice([0.02, 0.4])          # hard or antialiased
        dots = ((np.cos(u) + np.cos(v)) / 2 - (1 - 2 * coverage)) / edge + 0.5
        pixels[area] = mix(light, dark, dots.clip(0, 1))
    return np.uint8(pixels + 0.5)


def hatching(rng, height, width):
    """Draw panels of parallel lines, some of them crossed, 2 to 8 pixels apart."""
    dark, light = two_colors(rng)
    pixels = np.empty((height, width, 3))
    for area in panels(height, width):
        h, w = pixels[area].shape[:2]
        u, v = rotated_grid(h, w, rng.uniform(2, 8), rng.uniform(0, np.pi))
        coverage = rng.uniform(0.1, 0.5)
        lines = np.cos(u)
        if rng.random() < 0.4:
            lines = np.maximum(lines, np.cos(v))
        edge = rng.choice([0.02, 0.5])
        pixels[area] = mix(light, dark, ((lines - np.cos(np.pi * coverage)) / edge + 0.5).clip(0, 1))
    return np.uint8(pixels + 0.5)


def grain(rng, height, width):
    """Draw paper: fine noise with a few coarse spots on a soft gradient."""
    a, b = mix(vivid(rng, 2), WHITE, rng.uniform(0.3, 0.9))
    base = mix(a, b, shade(height, width, rng.uniform(0, 7)))
    relief = rng.normal(0, 0.4, (height, width)) + 2 * (cloud_noise(rng, height, width, 8) - 0.5)
    return np.uint8((base + relief[..., None] * rng.uniform(4, 24)).clip(0, 255) + 0.5)


BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])     # for ordered dithering


def dithering(rng, height, width):
    """Draw panels of gradients with few levels per channel, dithered by a 4x4 Bayer matrix."""
    pixels = np.empty((height, width, 3))
    threshold = np.tile((BAYER + 0.5) / 16, (height // 4 + 1, width // 4 + 1))[:height, :width, None]
    for area in panels(height, width):
        h, w = pixels[area].shape[:2]
        a, b = vivid(rng, 2)
        smooth = mix(a * 0.2, mix(b, WHITE, 0.5), shade(h, w, rng.uniform(0, 7))) / 255
        steps = rng.integers(1, 6)
        pixels[area] = np.floor(smooth * steps + threshold[area]).clip(0, steps) / steps * 255
    return np.uint8(pixels + 0.5)


def line_art(rng, height, width):
    """Draw outlines in pure black and white without antialiasing."""
    image = Image.new("L", (width, height), 255)
    pen = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        rx, ry = rng.uniform(4, 90, 2)
        line = int(rng.integers(1, 4))
        pen.arc((x - rx, y - ry, x + rx, y + ry), *rng.uniform(0, 360, 2), fill=0, width=line)
        pen.line((x, y, x + 2 * rx, y + ry), fill=0, width=line)
    return np.array(image)


def text(rng, height, width):
    """Draw lines of random words in several sizes, black on white or colored."""
    dark, light = (tuple(int(v) for v in color) for color in two_colors(rng))
    image = Image.new("RGB", (width, height), light)
    pen = ImageDraw.Draw(image)
    letters = list("aaabcdeeefghiijklmnooopqrstuuvwxyzABDEGHKMNRST0123456789.,!?")
    y = 6
    while y < height:
        size = int(rng.choice([9, 11, 14, 18, 26, 40]))
        words = ["".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(3 * width // (4 * size) + 2)]
        pen.text((6, y), " ".join(words), fill=dark, font=ImageFont.load_default(size))
        y += int(size * 1.4)
    return np.array(image)


TEXTURES = (stars, screentone, hatching, grain, dithering, line_art, text)


# ------------------------------------------------------------------ folders of pictures

@contextlib.contextmanager
def complete_folder(folder):
    """Give a temporary folder that becomes `folder` at the end of the block, and is removed after an error.

    Raises FileExistsError if `folder` exists.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists; use it, or remove it to draw again")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def draw_demo(folder, seed=0, train=28, val=6):
    """Draw scenes into folder/train and folder/val, all different: PNG of 640x384 to 768x512 pixels.

    The folder is complete or absent. Raises FileExistsError if it exists.
    """
    with complete_folder(folder) as part:
        for k, (name, count) in enumerate((("train", train), ("val", val))):
            (part / name).mkdir()
            for i in range(count):
                rng, scene = np.random.default_rng((seed, k, i)), SCENES[i % len(SCENES)]
                width, height = ((640, 384), (704, 448), (768, 512))[i % 3]
                picture = scene(Canvas(width, height), rng)
                picture.save(part / name / f"{i:03}_{scene.__name__}.png")


def draw_textures(folder, count, seed=0, height=384, width=512):
    """Draw textures into a folder, all different, each of TEXTURES in turn: PNG.

    The folder is complete or absent. Raises FileExistsError if it exists.
    """
    with complete_folder(folder) as part:
        for i in range(count):
            texture = TEXTURES[i % len(TEXTURES)]
            pixels = texture(np.random.default_rng((seed, 2, i)), height, width)
            Image.fromarray(pixels).save(part / f"{i:03}_{texture.__name__}.png")


def main():
    parser = argparse.ArgumentParser(description="Draw demo pictures.",
                                     epilog="example: python demo.py runs/demo --train 10")
    parser.add_argument("folder", metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--train", type=int, default=28, help="number of scenes in DIR/train (default: 28)")
    parser.add_argument("--val", type=int, default=6, help="number of scenes in DIR/val (default: 6)")
    parser.add_argument("--textures", type=int, metavar="N", help="draw N textures into DIR, and no scenes")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures (default: 0)")
    args = parser.parse_args()
    try:
        if args.textures is None:
            draw_demo(args.folder, args.seed, args.train, args.val)
        else:
            draw_textures(args.folder, args.textures, args.seed)
    except OSError as error:
        print(f"error: cannot write {args.folder}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
