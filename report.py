"""report.py: pictures of several methods side by side on one page that opens from disk, without a network or a server.

    from report import Column, Report
    page = Report(Path("page"), "2x, web pictures", [Column("psnr_y", "PSNR-Y, dB", "higher", 2)])
    page.add("girl.png", {"bicubic": a, "ours": b, "HR": c}, {"ours": {"psnr_y": 33.5}}, reference="HR")
    print(page.finish())        # page/index.html; what belongs to it lies in page/report-files

The page has a table of means, the worst places of each picture as crops, a slider between any two methods with zoom and
pan, heat maps of the difference, and a table per picture. Needs numpy and Pillow; the page is at the end of this file.
"""
import html
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FILES = "report-files"      # the folder of pictures beside index.html
SIDE = 96                   # of a crop, in pixels
HEAT_FULL = 24              # a difference of so many levels of Y has the strongest colour
HEAT_SIDE = 1024            # heat maps are at most so large, and at most half of the picture


class Column(NamedTuple):
    """A figure of the tables: its key in add's figures, its head with the unit, which way is good, decimals shown, and
    how one is made of those of all pictures."""
    key: str
    head: str
    better: str = ""        # "higher", "lower" or "" for neither
    digits: int = 2
    mean: Callable = statistics.fmean


class Report:
    """A page in `folder`, with a column of the tables for each of columns and `crops` worst places per picture.

    Raises ValueError if the folder cannot be made, or holds something and overwrite is not set. With it, index.html and
    the files of an earlier report are replaced and everything else is left alone.
    """

    def __init__(self, folder, title, columns, note="", crops=3, overwrite=False):
        self.folder, self.title, self.columns, self.note, self.crops = Path(folder), title, list(columns), note, crops
        self.files, self.added = self.folder / FILES, []        # (what the page knows of a picture, its figures)
        try:
            if not overwrite and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ValueError(f"{self.folder} is not an empty folder; choose another one, or give --overwrite")
            self.files.mkdir(parents=True, exist_ok=True)
            for old in (self.folder / "index.html", *self.files.glob("[0-9][0-9][0-9][0-9]-*")):
                old.unlink(missing_ok=True)
        except OSError as e:
            raise ValueError(f"cannot write to {self.folder}: {e.strerror}; choose another folder") from None

    def add(self, name, images, figures, reference=None, heat={}):
        """One picture; its files are written before this returns.

        images {label: (H, W, 3) uint8}, all of one size, shown in this order; figures {label: {key: number}}, nan or
        absent where there is none; reference: the label of the true picture; heat {label: {kind: (h, w) float in
        [0, 1]}}, stretched over the picture. Raises ValueError, and OSError where a file cannot be written.
        """
        shapes = {image.shape for image in images.values()}
        if len(shapes) != 1 or any(i.dtype != np.uint8 or i.ndim != 3 or i.shape[2] != 3 for i in images.values()):
            raise ValueError(f"{name}: uint8 pictures (H, W, 3) of one size are needed, not {sorted(shapes)}")
        if reference is not None and reference not in images:
            raise ValueError(f"{name}: no picture of the reference {reference}")
        number, (h, w, _) = f"{len(self.added) + 1:04d}", shapes.pop()
        side = min(SIDE, h, w)
        true = None if reference is None else smoothed(luma(images[reference]))
        layers, ranked, least, most = [], {}, np.inf, -np.inf
        for i, (label, image) in enumerate(images.items()):
            layer = dict(label=label, file=save_lossless(self.files / f"{number}-{i}", image), figure="", heat=[])
            maps = dict(heat.get(label, {}))
            if self.columns and label in figures:
                column = self.columns[0]
                layer["figure"] = shown(figures[label].get(column.key, math.nan), column.digits)
            if true is None:
                y = smoothed(luma(image))
                least, most = np.minimum(least, y), np.maximum(most, y)
            elif label != reference:
                error = smoothed(luma(image)) - true
                ranked[label] = windows(error * error, side)
                maps = {f"difference to {reference}": np.abs(error) / HEAT_FULL, **maps}
            for k, (kind, values) in enumerate(maps.items()):
                layer["heat"].append([kind, save_heat(self.files / f"{number}-{i}-{k}.png", values, max(h, w))])
            layers.append(layer)
        if true is None and len(images) > 1:
            ranked[""] = windows((most - least) ** 2, side)
        picture = dict(name=name, width=w, height=h, reference=reference, layers=layers, side=side, regions=[])
        rows = []
        for label, y, x in spread(dict(reversed(ranked.items())), side, self.crops):
            crops = {key: image[y:y + side, x:x + side] for key, image in images.items()}
            values = [math.nan if reference in (None, k) else psnr(c, crops[reference]) for k, c in crops.items()]
            psnrs = cells(values, Column("psnr", "PSNR-Y, dB", "higher", 1))
            picture["regions"].append(dict(x=x, y=y, worst=label, best=[best for _, _, best in psnrs],
                                           psnr=["" if math.isnan(v) else f"{text} dB" for v, text, _ in psnrs]))
            rows.append(np.concatenate(list(crops.values()), 1))
        if rows:
            picture["crops"] = save_lossless(self.files / f"{number}-crops", np.concatenate(rows))
        self.added.append((picture, figures))

    def finish(self):
        """Writes index.html with the pictures added so far -> its path. Can be called again after more of them."""
        parts = dict(title=html.escape(self.title), note=html.escape(self.note), summary=self.summary(),
                     each=self.each(), full=str(HEAT_FULL), data=embedded([picture for picture, _ in self.added]),
                     first=html.escape(self.columns[0].head if self.columns else ""))
        page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], PAGE)
        write(self.folder / "index.html", page.encode("utf-8", "replace"))
        return self.folder / "index.html"

    def figures(self, column):
        """One column -> {method: a figure for each picture, nan where there is none}."""
        labels = dict.fromkeys(label for _, figures in self.added for label in figures)
        return {label: [float(figures.get(label, {}).get(column.key, math.nan)) for _, figures in self.added]
                for label in labels}

    def summary(self):
        """The table of means; where these do not go over all pictures, their number is in the head."""
        heads, rows, total = [], {}, len(self.added)
        for column in self.columns:
            found, count = common_means(self.figures(column), column.mean)
            heads.append((column.head + (f" ({count} of {total} pictures)" if found and count < total else ""), column.better))
            for label, cell in zip(found, cells(found.values(), column)):
                rows.setdefault(label, []).append(cell)
        return table("method", heads, [(html.escape(label), row) for label, row in rows.items()])

    def each(self):
        """A table per column, pictures by methods; the page shows one at a time."""
        tables = []
        for column in self.columns:
            figures = self.figures(column)
            rows = [(f'<a href="#{i + 1}">{html.escape(picture["name"])}</a>',
                     cells([values[i] for values in figures.values()], column))
                    for i, (picture, _) in enumerate(self.added)]
            tables.append(f'<div class="each" data-head="{html.escape(column.head)}"{" hidden" * bool(tables)}>'
                          f"{table('picture', [(label, column.better) for label in figures], rows)}</div>")
        return "\n".join(tables)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def common_means(figures, mean):
    """{method: a figure for each picture, nan where there is none} -> ({method: their mean}, of how many pictures). A
    method that lacks some pictures would be measured on others than its neighbours: the mean goes over those for which
    every method has a figure that has any at all."""
    measured = [values for values in figures.values() if not all(map(math.isnan, values))]
    common = [i for i in range(max(map(len, figures.values()), default=0))
              if not any(math.isnan(values[i]) for values in measured)]
    return {label: mean([values[i] for i in common]) if common else math.nan for label, values in figures.items()}, len(common)


def shown(value, digits):
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("inf", "∞")


def cells(values, column):
    """Figures of one column -> [(value, text, whether it is the best as far as is shown)]."""
    texts = [shown(value, column.digits) for value in values]
    known = [value for value in values if not math.isnan(value)]
    best = shown((max if column.better == "higher" else min)(known), column.digits) if known and column.better else None
    return [(value, text, text == best) for value, text in zip(values, texts)]


def table(corner, heads, rows):
    """heads [(text, better)], rows [(HTML of the first cell, cells)] -> HTML; a click on a head sorts, best first."""
    arrow = dict(higher=' <abbr title="higher is better">↑</abbr>', lower=' <abbr title="lower is better">↓</abbr>')
    line = [f'<th scope="col" data-first="ascending"><button>{corner}</button></th>']
    for text, better in heads:
        text, first = html.escape(text) + arrow.get(better, ""), "ascending" if better == "lower" else "descending"
        line.append(f'<th scope="col" data-first="{first}"><button>{text}</button></th>')
    body = []
    for name, row in rows:
        data = [f'<td data-value="{"" if math.isnan(v) else v}"{" class=best" * b}>{t}</td>' for v, t, b in row]
        body.append(f'<tr><th scope="row">{name}</th>{"".join(data)}</tr>')
    return f'<table><thead><tr>{"".join(line)}</tr></thead><tbody>{"".join(body)}</tbody></table>'


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: where they differ, and files
# ---------------------------------------------------------------------------------------------------------------------


def luma(image):
    """(H, W, 3) uint8 -> (H, W) float32, Y of BT.601 in its studio range, 16 to 235."""
    r, g, b = (image[..., c].astype(np.float32) for c in range(3))
    return (65.481 * r + 128.553 * g + 24.966 * b) / 255 + 16


def psnr(a, b):
    mse = np.square(luma(a) - luma(b), dtype=np.float64).mean()
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def smoothed(y):
    """(H, W) -> the same, each pixel the mean of its 3x3 neighbours: noise counts for less than a wrong line."""
    y = np.pad(y, 1, mode="edge")
    y = y[:-2] + y[1:-1] + y[2:]
    return (y[:, :-2] + y[:, 1:-1] + y[:, 2:]) / 9


def windows(x, side):
    """(H, W) -> [(top, left)] of windows a quarter of their side apart, largest mean first, no empty ones."""
    sums = np.pad(x.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    ys, xs = (sorted({*range(0, n - side + 1, max(side // 4, 1)), n - side}) for n in x.shape)
    y, x = np.array(ys)[:, None], np.array(xs)
    total = sums[y + side, x + side] - sums[y, x + side] - sums[y + side, x] + sums[y, x]
    return [(ys[i // len(xs)], xs[i % len(xs)]) for i in np.argsort(-total, None, "stable") if total.flat[i] > 1e-3]


def spread(ranked, side, count):
    """{label: windows} -> at most count (label, top, left): the worst of each label in turn, half a side apart."""
    chosen, queues = [], {label: iter(places) for label, places in ranked.items()}
    while queues:
        for label, queue in list(queues.items()):
            if len(chosen) == count:
                return chosen
            place = next(((y, x) for y, x in queue
                          if all(max(abs(y - b), abs(x - c)) >= 1.5 * side for _, b, c in chosen)), None)
            if place is None:
                del queues[label]
            else:
                chosen.append((label, *place))
    return chosen


def write(path, data):
    """Bytes into a file; whole or not at all."""
    part = path.with_name(f".{os.getpid()}-{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_lossless(path, image):
    """uint8 (H, W, 3) -> WebP, or PNG where a side is too long for WebP; its URL in the page. At this effort WebP took
    less time than Pillow's PNG and 16 to 34% less space on four pictures of 2 and 8 megapixels."""
    memory = io.BytesIO()
    kind = "webp" if max(image.shape) <= 16383 else "png"
    Image.fromarray(image).save(memory, kind, **dict(lossless=True, method=1, quality=0) if kind == "webp" else {})
    write(path.with_suffix(f".{kind}"), memory.getbuffer())
    return f"{FILES}/{path.name}.{kind}"


def save_heat(path, values, longest):
    """(h, w) in [0, 1] -> a small PNG of 16 colours, from clear over red and yellow to white; its URL in the page."""
    most = min(HEAT_SIDE, max(longest // 2, 1))
    small = Image.fromarray((np.nan_to_num(values).clip(0, 1) * 255).round().astype(np.uint8))
    small = np.asarray(small.reduce(-(-max(small.size) // most)))
    picture = Image.fromarray(((small.astype(np.uint16) * 15 + 127) // 255).astype(np.uint8))
    t = np.linspace(0, 1, 16)[:, None]
    picture.putpalette((np.clip(3 * t - [0, 1, 2], 0, 1) * 255).round().astype(np.uint8).tobytes())
    memory = io.BytesIO()
    picture.save(memory, "png", bits=4, transparency=bytes([0, *np.linspace(40, 255, 15).astype(int).tolist()]))
    write(path, memory.getbuffer())
    return f"{FILES}/{path.name}"


def embedded(data):
    """JSON that can stand inside <script> whatever the names are: plain ASCII without <."""
    return json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")


# ---------------------------------------------------------------------------------------------------------------------
# The page. Whatever stands in {{ }} is put in by Report.finish.
# ---------------------------------------------------------------------------------------------------------------------

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{title}}</title>
<style>
:root { --paper: #f7f7f6; --ink: #1d1d1f; --soft: #67676c; --line: #d9d9d7; --wall: #e9e9e7;
        --mark: #b3382c; --zoom: 2 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161617; --ink: #e6e6e4; --soft: #98989d; --line: #333336; --wall: #0c0c0d; --mark: #f0806f }
}
* { box-sizing: border-box }
[hidden] { display: none !important }
body { margin: 0 auto; max-width: 1500px; padding: 20px clamp(12px, 2.5vw, 36px) 48px; background: var(--paper);
       color: var(--ink); font: 14px/1.45 system-ui, sans-serif }
h1 { font-size: 20px; font-weight: 600; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 14px; font-weight: 600; margin: 0 }
.note { color: var(--soft); margin: 2px 0 0; overflow-wrap: anywhere }
header .note { white-space: pre-line }
.hint { color: var(--soft); font-size: 12px; margin: 6px 0 0 }
section { margin-top: 22px; border-top: 1px solid var(--line); padding-top: 12px }
.scroll { overflow-x: auto; margin-top: 8px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 3px 14px 3px 0; font-weight: 400; white-space: nowrap }
th:first-child { text-align: left }
tbody th { max-width: 26em; overflow: hidden; text-overflow: ellipsis }
tbody tr { border-top: 1px solid var(--line) }
tbody tr.now { box-shadow: inset 2px 0 var(--mark) }
.now th { padding-left: 8px }
td.best { font-weight: 700 }
thead button { all: unset; cursor: pointer; color: var(--soft) }
[aria-sort] button { color: var(--ink) }
[aria-sort=ascending] button::after { content: " ▴" }
[aria-sort=descending] button::after { content: " ▾" }
abbr { text-decoration: none }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: 3px }
a:hover { text-decoration-color: var(--mark) }
.bar { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: center; margin-top: 8px }
.bar label { color: var(--soft); display: flex; gap: 6px; align-items: center; min-width: 0 }
.bar .end { margin: 0 0 0 auto }
.bar button, select { font: inherit; color: var(--ink); background: none; border: 1px solid var(--line); height: 28px;
                      border-radius: 4px; padding: 0 9px; min-width: 0; max-width: 100% }
.bar button { cursor: pointer; touch-action: none }
.bar button:hover, select:hover { border-color: var(--soft) }
select { background: var(--paper); text-overflow: ellipsis }
#level { min-width: 3.6em; text-align: center }
#picture { max-width: min(34em, 60vw) }
:focus-visible, thead button:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px }
#crops { padding: 2px }
.region { display: flex; gap: 6px; width: max-content; margin-bottom: 10px }
.region > span { width: 84px; flex: none; font-size: 12px; color: var(--soft); overflow-wrap: anywhere }
.crop { all: unset; cursor: zoom-in; font-size: 12px; width: calc(var(--side) * var(--zoom) * 1px) }
.crop i { display: block; aspect-ratio: 1; background-color: var(--wall); image-rendering: pixelated }
.crop:hover i, .crop.now i { box-shadow: 0 0 0 2px var(--mark) }
.crop:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px }
.crop span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--soft) }
.crop b { font-weight: 400 }
.crop b.best { font-weight: 700; color: var(--ink) }
#stage { position: relative; overflow: hidden; width: 100%; min-height: min(320px, 78vh); max-height: 78vh;
         margin-top: 8px; background: var(--wall); cursor: grab; touch-action: none; user-select: none }
#stage:active { cursor: grabbing }
#stage.fit { touch-action: pan-y }
.side, .layer { position: absolute; inset: 0 }
.layer { transform-origin: 0 0 }
.layer img { position: absolute; left: 0; top: 0 }
.pixels .full { image-rendering: pixelated }
.hot .full { filter: grayscale(1) brightness(.45) }
.tag { position: absolute; bottom: 8px; max-width: 42%; padding: 2px 8px; border-radius: 3px; font-size: 12px;
       background: #000a; color: #fff; pointer-events: none; overflow: hidden; text-overflow: ellipsis;
       white-space: nowrap }
#left-tag { left: 8px }
#right-tag { right: 8px }
#slider { position: absolute; top: 0; bottom: 0; width: 30px; margin-left: -15px; cursor: ew-resize;
          touch-action: none }
#slider::before { content: ""; position: absolute; inset: 0 14px; background: #fff; box-shadow: 0 0 0 1px #0006 }
#slider::after { content: "‹ ›"; position: absolute; top: 50%; left: 1px; width: 28px; margin-top: -14px;
                 border-radius: 50%; background: #fff; color: #222; box-shadow: 0 0 3px #0009; text-align: center;
                 font: 600 14px/28px system-ui, sans-serif }
@media (pointer: coarse) {
  .bar button, select { height: 38px }
  #slider { width: 44px; margin-left: -22px }
  #slider::before { inset: 0 21px }
  #slider::after { left: 8px }
}
@media (max-width: 700px) {
  :root { --zoom: 1.25 }
  .bar label { flex: 1 1 40% }
  .bar label select { flex: 1; width: 0 }
  .region { position: relative; padding-top: 19px }
  .region > span { position: absolute; top: 0; width: max-content }
}
</style>
<header><h1>{{title}}</h1><p class="note">{{note}}</p></header>
<section aria-labelledby="h-all"><h2 id="h-all">Mean over <span id="count"></span></h2>
<div class="scroll" id="summary">{{summary}}</div></section>

<section id="viewer" aria-label="Viewer">
<div class="bar">
  <button id="previous" aria-label="previous picture" title="previous picture (p)">‹</button>
  <select id="picture" autocomplete="off" aria-label="picture"></select>
  <button id="next" aria-label="next picture" title="next picture (n)">›</button>
  <span class="note" id="size"></span>
</div>
<div class="scroll" id="crops" role="group" aria-label="the worst places, as crops"></div>
<div class="bar">
  <label>left <select id="left" autocomplete="off"></select></label>
  <label>right <select id="right" autocomplete="off"></select></label>
  <button id="swap" title="while held, left and right change places (f)">hold to swap</button>
  <label>overlay <select id="heat" autocomplete="off"></select></label>
  <span class="bar end">
    <button id="out" aria-label="zoom out" title="zoom out (-)">−</button>
    <output id="level" aria-label="zoom"></output>
    <button id="in" aria-label="zoom in" title="zoom in (+)">+</button>
    <button id="one" title="a picture pixel on a screen pixel (1)">1:1</button>
    <button id="fit" title="the whole picture (0)">fit</button>
  </span>
</div>
<div id="stage" tabindex="0" role="group" aria-label="two pictures on top of each other; arrows move, + and - zoom">
  <div class="side"><div class="layer"></div></div>
  <div class="side"><div class="layer"></div></div>
  <span class="tag" id="left-tag"></span><span class="tag" id="right-tag"></span>
  <div id="slider" tabindex="0" role="slider" aria-label="line between the pictures, in percent"></div>
</div>
<p class="hint" id="legend" hidden>Overlay: clear where there is nothing, then red, yellow, white. A difference is
that of luma, mean of 3x3 pixels; white stands for {{full}} of 255 levels or more.</p>
<p class="hint">Wheel or pinch zooms, dragging moves, the line between the pictures can be dragged. Keys: + and − zoom,
0 fit, 1 pixel for pixel, arrows move (on the line: move it), f swaps while held, n and p next and previous picture.
The figure beside a name in the corner is {{first}}; dB below a crop is PSNR of luma inside it.</p>
</section>

<section aria-labelledby="h-each">
<div class="bar"><h2 id="h-each">Each picture</h2>
  <select id="figure" autocomplete="off" aria-label="figure"></select></div>
<div class="scroll">{{each}}</div></section>

<script type="application/json" id="data">{{data}}</script>
<script>
"use strict";
const pictures = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const clamp = (x, least, most) => Math.min(Math.max(x, least), most);
const make = (tag, properties) => Object.assign(document.createElement(tag), properties);

// ---- tables: a click on a head sorts, figures that are missing stay last
for (const table of document.querySelectorAll("table")) table.tHead.addEventListener("click", event => {
  const head = event.target.closest("th");
  if (!event.target.closest("button")) return;
  const turned = {ascending: "descending", descending: "ascending"}[head.getAttribute("aria-sort")];
  const order = turned || head.dataset.first, sign = order == "ascending" ? 1 : -1;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const value = row => row.cells[head.cellIndex].dataset.value;
  const number = row => Number(value(row).replace("inf", "Infinity"));
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    if (!head.cellIndex) return sign * a.textContent.localeCompare(b.textContent, undefined, {numeric: true});
    if (!value(a) || !value(b)) return !value(a) - !value(b);
    return number(a) == number(b) ? 0 : sign * (number(a) - number(b));     // Infinity - Infinity is NaN
  });
  table.tBodies[0].append(...rows);
});
const each = [...document.querySelectorAll(".each")];
$("figure").append(...each.map(part => make("option", {textContent: part.dataset.head})));
$("figure").hidden = each.length < 2;
$("figure").onchange = () => each.forEach((part, i) => part.hidden = i != $("figure").selectedIndex);
$("count").textContent = pictures.length == 1 ? "1 picture" : `${pictures.length} pictures`;

// ---- the viewer: x, y is the place of the picture in the middle of the stage, zoom is CSS pixels per picture pixel
const stage = $("stage"), slider = $("slider"), sides = [...document.querySelectorAll(".side")];
let index = -1, x = 0, y = 0, zoom = 1, fitted = true, split = 0.5, swapped = false;
const picture = () => pictures[index];
const layer = label => picture().layers.find(layer => layer.label == label);

function draw() {
  const {width, height} = picture(), w = stage.clientWidth, h = stage.clientHeight;
  const whole = Math.min(w / width, h / height);
  zoom = fitted ? whole : clamp(zoom, Math.min(whole, 1), 32);
  const inside = (at, size, half) => size <= 2 * half ? size / 2 : clamp(at, half, size - half);
  x = inside(x, width, w / zoom / 2);
  y = inside(y, height, h / zoom / 2);
  stage.classList.toggle("pixels", zoom * devicePixelRatio >= 2);
  stage.classList.toggle("fit", height * zoom <= h + 1);
  sides.forEach((side, i) => {
    const onTheLeft = (i == 0) != swapped, percent = split * 100;
    side.firstElementChild.style.transform = `translate(${w / 2 - x * zoom}px, ${h / 2 - y * zoom}px) scale(${zoom})`;
    side.style.clipPath = onTheLeft ? `inset(0 ${100 - percent}% 0 0)` : `inset(0 0 0 ${percent}%)`;
  });
  slider.style.left = `${split * 100}%`;
  slider.setAttribute("aria-valuenow", Math.round(split * 100));
  $("level").textContent = `${Math.round(zoom * devicePixelRatio * 100)}%`;
  [[$("left-tag"), swapped], [$("right-tag"), !swapped]].forEach(([tag, right], i) => {
    const {label, figure} = layer($(right ? "right" : "left").value);
    tag.textContent = `${label} ${figure}`;
    tag.hidden = (i == 0 ? split : 1 - split) < 0.08;
  });
}

function load() {           // the full pictures of the two sides, and what lies over them
  let hot = false;
  sides.forEach((side, i) => {
    const {label, file, heat} = layer($(i ? "right" : "left").value), {width, height} = picture();
    const over = heat.find(([kind]) => kind == $("heat").value), place = side.firstElementChild;
    const image = (className, src, alt) => make("img", {className, src, alt, width, height, draggable: false});
    if (place.dataset.file != file) place.replaceChildren(image("full", file, label));  // never the old picture
    place.dataset.file = file;
    place.querySelector(".over")?.remove();
    if (over) place.append(image("over", over[1], over[0]));
    side.classList.toggle("hot", Boolean(over));
    hot ||= Boolean(over);
  });
  $("legend").hidden = !hot;
  draw();
}

function fill(select, options, wanted) {
  select.replaceChildren(...options.map(text => make("option", {textContent: text, value: text})));
  select.value = options.includes(wanted) ? wanted : options[0];
}

function show(i) {
  const before = {left: $("left").value, right: $("right").value, heat: $("heat").value};
  index = i;
  fitted = true;
  const {name, width, height, layers, reference} = picture(), labels = layers.map(layer => layer.label);
  const last = labels.filter(label => label != reference).at(-1) ?? labels[0];
  fill($("left"), labels, before.left);
  fill($("right"), labels, labels.includes(before.right) ? before.right : last);
  fill($("heat"), ["none", ...new Set(layers.flatMap(layer => layer.heat.map(([kind]) => kind)))], before.heat);
  $("picture").value = i;
  stage.style.aspectRatio = `${width} / ${height}`;
  $("size").textContent = `${i + 1} of ${pictures.length}, ${width} × ${height}`;
  document.querySelectorAll(".each tbody tr").forEach(
    row => row.classList.toggle("now", row.querySelector("a").hash == `#${i + 1}`));
  $("crops").replaceChildren(...picture().regions.map((region, row) => cropRow(region, row)));
  load();
}

function cropRow(region, row) {
  const {side, crops, layers, regions} = picture(), line = make("div", {className: "region"});
  line.append(make("span", {textContent: region.worst ? `worst of ${region.worst}` : "most different"}));
  layers.forEach(({label}, i) => {
    const cell = make("button", {className: "crop", title: `${label} at ${region.x}, ${region.y}`});
    const image = document.createElement("i"), text = make("span", {textContent: `${label} `});
    const share = (k, n) => `${100 * k / Math.max(n - 1, 1)}%`;
    cell.style.setProperty("--side", side);
    image.style.background = `url("${crops}") ${share(i, layers.length)} ${share(row, regions.length)} / ` +
      `${100 * layers.length}% ${100 * regions.length}%`;
    text.append(make("b", {textContent: region.psnr[i], className: region.best[i] ? "best" : ""}));
    cell.append(image, text);
    cell.onclick = () => {
      document.querySelectorAll(".crop.now").forEach(old => old.classList.remove("now"));
      cell.classList.add("now");
      if ($("left").value != label) $("right").value = label;
      x = region.x + side / 2;
      y = region.y + side / 2;
      zoom = clamp(stage.clientHeight / side / 2, 1, 4);
      fitted = false;
      load();
      stage.scrollIntoView({block: "nearest"});
      stage.focus({preventScroll: true});
    };
    line.append(cell);
  });
  return line;
}

function zoomAt(factor, clientX, clientY) {     // the place under the pointer stays under it
  const box = stage.getBoundingClientRect(), before = zoom;
  const dx = (clientX ?? box.left + box.width / 2) - box.left - box.width / 2;
  const dy = (clientY ?? box.top + box.height / 2) - box.top - box.height / 2;
  zoom *= factor;
  fitted = false;
  const [oldX, oldY] = [x, y];
  draw();                                       // clamps zoom
  x = oldX + dx / before - dx / zoom;
  y = oldY + dy / before - dy / zoom;
  draw();
}
const move = (dx, dy) => { x += dx / zoom; y += dy / zoom; draw(); };
const fit = () => { fitted = true; draw(); };
const pixelForPixel = () => zoomAt(1 / zoom / devicePixelRatio);
const swap = on => { swapped = on; if (pictures.length) draw(); };
const slide = to => { split = clamp(to, 0, 1); draw(); };
const turn = by => { location.hash = clamp(index + by, 0, pictures.length - 1) + 1; };

stage.addEventListener("wheel", event => {
  event.preventDefault();
  const rate = (event.deltaMode ? 0.05 : 0.002) * (event.ctrlKey ? 4 : 1);  // lines or pixels; touchpad pinch
  zoomAt(Math.exp(-event.deltaY * rate), event.clientX, event.clientY);
}, {passive: false});
stage.ondblclick = event => fitted ? zoomAt(1 / zoom / devicePixelRatio, event.clientX, event.clientY) : fit();

const fingers = new Map();
stage.onpointerdown = event => {
  if (event.button) return;
  stage.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
};
stage.onpointermove = event => {
  const was = fingers.get(event.pointerId), at = [event.clientX, event.clientY];
  if (!was) return;
  const other = [...fingers].find(([id]) => id != event.pointerId)?.[1], part = other ? 0.5 : 1;
  if (!fitted || other) move((was[0] - at[0]) * part, (was[1] - at[1]) * part);
  if (other) {
    const apart = place => Math.max(Math.hypot(place[0] - other[0], place[1] - other[1]), 1);
    zoomAt(apart(at) / apart(was), (at[0] + other[0]) / 2, (at[1] + other[1]) / 2);
  }
  fingers.set(event.pointerId, at);
};
stage.onpointerup = stage.onpointercancel = event => fingers.delete(event.pointerId);
slider.onpointerdown = event => { event.stopPropagation(); slider.setPointerCapture(event.pointerId); };
slider.onpointermove = event => {
  const box = stage.getBoundingClientRect();
  if (slider.hasPointerCapture(event.pointerId)) slide((event.clientX - box.left) / box.width);
};
slider.ondblclick = event => event.stopPropagation();

function run(keys, event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
  keys[event.key]();
  event.preventDefault();
  event.stopPropagation();
}
slider.onkeydown = event => {
  const step = event.shiftKey ? 0.1 : 0.01;
  run({ArrowLeft: () => slide(split - step), ArrowRight: () => slide(split + step),
       Home: () => slide(0), End: () => slide(1)}, event);
};
stage.onkeydown = event => run({ArrowLeft: () => move(-60, 0), ArrowRight: () => move(60, 0),
                                ArrowUp: () => move(0, -60), ArrowDown: () => move(0, 60)}, event);
$("viewer").addEventListener("keydown", event => {
  const zoomIn = () => zoomAt(1.25), zoomOut = () => zoomAt(0.8);
  if (event.target.tagName != "SELECT") run({"+": zoomIn, "=": zoomIn, "-": zoomOut, "0": fit, "1": pixelForPixel,
    f: () => swap(true), n: () => turn(1), p: () => turn(-1)}, event);
});
addEventListener("keyup", event => event.key == "f" && swap(false));
addEventListener("blur", () => swap(false));

$("in").onclick = () => zoomAt(1.25);
$("out").onclick = () => zoomAt(0.8);
$("one").onclick = pixelForPixel;
$("fit").onclick = fit;
$("swap").onpointerdown = () => swap(true);
for (const end of ["pointerup", "pointerleave", "blur", "keyup"]) $("swap").addEventListener(end, () => swap(false));
$("swap").onkeydown = event => run({" ": () => swap(true), Enter: () => swap(true)}, event);
$("next").onclick = () => turn(1);
$("previous").onclick = () => turn(-1);
$("picture").append(...pictures.map(({name}, i) => make("option", {value: i, textContent: name})));
$("picture").onchange = () => { location.hash = Number($("picture").value) + 1; };
$("left").onchange = $("right").onchange = $("heat").onchange = load;
document.querySelectorAll(".each a").forEach(link => link.onclick = () => $("viewer").scrollIntoView());

const chosen = () => show(clamp(Number(location.hash.slice(1)) || 1, 1, pictures.length) - 1);
$("viewer").hidden = !pictures.length;
if (pictures.length) {
  chosen();
  addEventListener("hashchange", chosen);
  new ResizeObserver(draw).observe(stage);
}
</script>
"""
