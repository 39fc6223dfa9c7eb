"""Write a page that compares pictures of several methods; it opens from disk without a network or a server.

    from report import Column, Report
    page = Report(Path("page"), "2x, recipe web", [Column("psnr_y", "PSNR-Y, dB", "higher", 2)])
    page.add("girl.png", {"bicubic": a, "ours": b, "HR": c}, {"ours": {"psnr_y": 33.5}}, reference="HR")
    print(page.finish())        # page/index.html; its pictures are in page/report-files

The page has a table of means, crops of the largest errors, a slider between any two methods with zoom, heat
maps and a table per figure. report.html is its template. Needs numpy, Pillow and our images.py.
"""
import html
import io
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from images import UserError, printable, write_atomic

TEMPLATE = Path(__file__).with_name("report.html")
FILES_FOLDER = "report-files"       # beside index.html
CROP_SIDE = 96                      # pixels
HEAT_WHITE = 24                     # a difference of so many levels of Y is shown as white
MAX_HEAT_SIDE = 1024                # pixels of a heat map, and at most half of the picture
MAX_WEBP_SIDE = 16383


class Column(NamedTuple):
    """A figure of the tables."""
    key: str                        # in the figures that Report.add gets
    head: str                       # text over the column, with the unit
    better: str = ""                # "higher", "lower", or "" where neither is better
    digits: int = 2
    mean: Callable = statistics.fmean       # over the pictures


class Cell(NamedTuple):
    """One formatted figure. Figures that look the same as the best one are best too."""
    value: float
    text: str
    best: bool


class Report:
    """A page in `folder`.

    columns: list of Column, the figures of the tables. crops: number of places per picture to show as crops.
    overwrite: remove index.html and the pictures of an old report; other files stay.
    Raises UserError if the folder cannot be made, or if it is not empty and overwrite is not set.
    """

    def __init__(self, folder, title, columns, note="", crops=3, overwrite=False):
        self.folder, self.files = Path(folder), Path(folder) / FILES_FOLDER
        self.title, self.columns, self.note, self.crops = title, list(columns), note, crops
        self.pictures = []          # per picture the data for the script of the page
        self.figures = []           # per picture {method: {key: figure}}
        try:
            in_use = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
            if in_use and not overwrite:
                raise UserError(f"{printable(folder)} is not an empty folder; "
                                "choose another one or give --overwrite")
            self.files.mkdir(parents=True, exist_ok=True)
            for old in (self.folder / "index.html", *self.files.glob("[0-9][0-9][0-9][0-9]-*")):
                old.unlink(missing_ok=True)
        except OSError as e:
            raise UserError(f"cannot write to {printable(folder)}: {e.strerror}") from None

    def add(self, name, pictures, figures, reference=None, heat=None):
        """Add one picture and write its files.

        pictures: {method: (H, W, 3) uint8}, all of one size, in the order of the page.
        figures: {method: {key: number}}; nan or absent where there is no figure.
        reference: the key of the true picture, or None.
        heat: {method: {title: (h, w) float in [0, 1]}}, drawn over the whole picture.
        Raises UserError if a file cannot be written, ValueError for pictures of another type or size.
        """
        kinds = {(x.shape, str(x.dtype)) for x in pictures.values()}
        shape, dtype = next(iter(kinds), ((), ""))
        if len(kinds) != 1 or dtype != "uint8" or len(shape) != 3 or shape[2] != 3:
            raise ValueError(f"{name}: need uint8 pictures (H, W, 3) of one size, not {sorted(kinds)}")
        if reference is not None and reference not in pictures:
            raise ValueError(f"{name}: there is no picture of the reference {reference}")
        height, width, _ = shape
        number = f"{len(self.pictures) + 1:04d}"
        side = min(CROP_SIDE, height, width)
        errors = error_maps(pictures, reference)
        heat = {method: dict(maps) for method, maps in (heat or {}).items()}
        if reference is not None:
            for method, error in errors.items():
                heat[method] = {f"difference to {reference}": error / HEAT_WHITE, **heat.get(method, {})}

        layers = []
        for i, (method, pixels) in enumerate(pictures.items()):
            maps = [[title, self.write_heat(f"{number}-{i}-{k}", values, max(height, width))]
                    for k, (title, values) in enumerate(heat.get(method, {}).items())]
            layers.append(dict(label=method, file=self.write_picture(f"{number}-{i}", pixels),
                               figure=self.first_figure(figures.get(method)), heat=maps))
        regions, rows = [], []
        windows = {method: worst_windows(error * error, side) for method, error in reversed(errors.items())}
        for method, y, x in pick_windows(windows, side, self.crops):
            crops = {key: pixels[y:y + side, x:x + side] for key, pixels in pictures.items()}
            psnrs = crop_psnrs(crops, reference)
            regions.append(dict(x=x, y=y, method=method, best=[cell.best for cell in psnrs],
                                psnr=["" if math.isnan(cell.value) else f"{cell.text} dB" for cell in psnrs]))
            rows.append(np.concatenate(list(crops.values()), 1))

        picture = dict(name=name, width=width, height=height, reference=reference, layers=layers, side=side,
                       regions=regions)
        if rows:
            picture["crops"] = self.write_picture(f"{number}-crops", np.concatenate(rows))
        self.pictures.append(picture)
        self.figures.append(figures)

    def finish(self):
        """Write index.html with the pictures added so far and return its path. More pictures may follow."""
        values = dict(
            title=html.escape(self.title), note=html.escape(self.note), heat_white=str(HEAT_WHITE),
            first_column=html.escape(self.columns[0].head if self.columns else ""),
            summary=self.summary_table(), each=self.picture_tables(), data=to_script_json(self.pictures))
        template = TEMPLATE.read_text(encoding="utf-8")
        page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
        self.write(self.folder / "index.html", page.encode("utf-8", "replace"))
        return self.folder / "index.html"

    # ---- tables

    def first_figure(self, figures):
        """The text beside the name of a method in the corner of the viewer; figures {key: number} or None."""
        if not self.columns or figures is None:
            return ""
        return format_figure(figures.get(self.columns[0].key, math.nan), self.columns[0].digits)

    def figures_of(self, column):
        """{method: [figure per picture, nan where there is none]} of one column."""
        methods = dict.fromkeys(method for figures in self.figures for method in figures)
        return {method: [figures.get(method, {}).get(column.key, math.nan) for figures in self.figures]
                for method in methods}

    def summary_table(self):
        """The table of means as HTML. A head names the number of pictures where it is not all of them."""
        heads, rows, total = [], {}, len(self.figures)
        for column in self.columns:
            means, count = common_means(self.figures_of(column), column.mean)
            note = f" ({count} of {total} pictures)" if means and count < total else ""
            heads.append((column.head + note, column.better))
            for method, cell in zip(means, format_cells(means.values(), column)):
                rows.setdefault(method, []).append(cell)
        return html_table("method", heads, [(html.escape(method), row) for method, row in rows.items()])

    def picture_tables(self):
        """One table per column, pictures by methods, as HTML. The page shows one of them at a time."""
        tables = []
        for column in self.columns:
            figures = self.figures_of(column)
            rows = []
            for i, picture in enumerate(self.pictures):
                link = f'<a href="#{i + 1}">{html.escape(picture["name"])}</a>'
                rows.append((link, format_cells([values[i] for values in figures.values()], column)))
            table = html_table("picture", [(method, column.better) for method in figures], rows)
            hidden = " hidden" if tables else ""
            tables.append(f'<div class="each" data-head="{html.escape(column.head)}"{hidden}>{table}</div>')
        return "\n".join(tables)

    # ---- files

    def write(self, path, data):
        """Write bytes to a file that is either complete or absent. Raises UserError."""
        try:
            write_atomic(path, data)
        except OSError as e:
            raise UserError(f"cannot write {printable(path)}: {e.strerror}") from None

    def write_picture(self, name, pixels):
        """Save (H, W, 3) uint8 without loss and return its URL: WebP, which is smaller than PNG and faster to
        write, or PNG where a side is too long for WebP."""
        memory = io.BytesIO()
        if max(pixels.shape) <= MAX_WEBP_SIDE:
            name += ".webp"
            Image.fromarray(pixels).save(memory, "webp", lossless=True, method=1, quality=0)
        else:
            name += ".png"
            Image.fromarray(pixels).save(memory, "png")
        self.write(self.files / name, memory.getbuffer())
        return f"{FILES_FOLDER}/{name}"

    def write_heat(self, name, values, longest_side):
        """Save (h, w) in [0, 1] as a PNG of 16 colors, transparent to red, yellow, white; return its URL."""
        max_side = min(MAX_HEAT_SIDE, max(longest_side // 2, 1))
        small = Image.fromarray((np.nan_to_num(values).clip(0, 1) * 255).round().astype(np.uint8))
        small = np.asarray(small.reduce(math.ceil(max(small.size) / max_side)))
        picture = Image.fromarray(((small.astype(np.uint16) * 15 + 127) // 255).astype(np.uint8))
        level = np.linspace(0, 1, 16)[:, None]
        palette = np.clip(3 * level - [0, 1, 2], 0, 1)
        picture.putpalette((palette * 255).round().astype(np.uint8).tobytes())
        opacity = bytes([0, *np.linspace(40, 255, 15).astype(int).tolist()])
        memory = io.BytesIO()
        picture.save(memory, "png", bits=4, transparency=opacity)
        self.write(self.files / f"{name}.png", memory.getbuffer())
        return f"{FILES_FOLDER}/{name}.png"


# ----------------------------------------------------------------------------------------------------
# Figures and tables
# ----------------------------------------------------------------------------------------------------


def common_means(figures, mean=statistics.fmean):
    """Average {method: [figure per picture]} -> ({method: mean}, number of pictures).

    The mean goes over the pictures for which every method has a figure, so that all methods are compared on
    the same pictures. A method without any figure is ignored, and its mean is nan.
    """
    measured = [values for values in figures.values() if not all(math.isnan(v) for v in values)]
    count = max(map(len, figures.values()), default=0)
    common = [i for i in range(count) if not any(math.isnan(values[i]) for values in measured)]
    means = {method: mean([values[i] for i in common]) if common else math.nan
             for method, values in figures.items()}
    return means, len(common)


def format_figure(value, digits):
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def format_cells(values, column):
    """Format the figures of one column as [Cell]."""
    values = list(values)
    known = [value for value in values if not math.isnan(value)]
    best = None
    if known and column.better:
        best = format_figure(max(known) if column.better == "higher" else min(known), column.digits)
    texts = [format_figure(value, column.digits) for value in values]
    return [Cell(value, text, text == best) for value, text in zip(values, texts)]


def html_table(corner, heads, rows):
    """heads [(text, better)], rows [(HTML of the first cell, [Cell])] -> HTML."""
    arrows = dict(higher=' <abbr title="higher is better">↑</abbr>',
                  lower=' <abbr title="lower is better">↓</abbr>')
    head = f'<th scope="col" data-first="ascending"><button>{corner}</button></th>'
    for text, better in heads:
        first = "ascending" if better == "lower" else "descending"
        text = html.escape(text) + arrows.get(better, "")
        head += f'<th scope="col" data-first="{first}"><button>{text}</button></th>'
    body = ""
    for name, cells in rows:
        body += f'<tr><th scope="row">{name}</th>'
        for cell in cells:
            value = "" if math.isnan(cell.value) else cell.value
            body += f'<td data-value="{value}"{" class=best" if cell.best else ""}>{cell.text}</td>'
        body += "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def to_script_json(data):
    """JSON that may stand inside <script> whatever the names are: plain ASCII without <."""
    return json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")


# ----------------------------------------------------------------------------------------------------
# Where the pictures differ
# ----------------------------------------------------------------------------------------------------


def luma(pixels):
    """(H, W, 3) uint8 -> (H, W) float32, Y of BT.601 in 16 to 235."""
    r, g, b = (pixels[..., c].astype(np.float32) for c in range(3))
    return (65.481 * r + 128.553 * g + 24.966 * b) / 255 + 16


def box_mean(y):
    """(H, W) -> (H, W), the mean of 3x3 pixels: noise counts less than a wrong line."""
    y = np.pad(y, 1, mode="edge")
    y = y[:-2] + y[1:-1] + y[2:]
    return (y[:, :-2] + y[:, 1:-1] + y[:, 2:]) / 9


def error_maps(pictures, reference):
    """Return {method: absolute difference of Y to the reference, (H, W) in levels}. Without a reference:
    {"": range of Y over all methods}, or {} for a single method."""
    smooth = {method: box_mean(luma(pixels)) for method, pixels in pictures.items()}
    if reference is not None:
        return {method: np.abs(y - smooth[reference]) for method, y in smooth.items() if method != reference}
    if len(smooth) < 2:
        return {}
    stack = np.stack(list(smooth.values()))
    return {"": stack.max(0) - stack.min(0)}


def crop_psnrs(crops, reference):
    """{method: (h, w, 3) uint8} -> [Cell] of PSNR-Y in dB; nan for the reference and where there is none."""
    values = []
    for method, pixels in crops.items():
        if reference in (None, method):
            values.append(math.nan)
            continue
        mse = np.square(luma(pixels) - luma(crops[reference]), dtype=np.float64).mean()
        values.append(10 * math.log10(255**2 / mse) if mse else math.inf)
    return format_cells(values, Column("psnr", "PSNR-Y, dB", "higher", 1))


def worst_windows(error, side):
    """(H, W) -> [(top, left)] of square windows, a quarter of `side` apart, largest sum first, without those
    of no error."""
    sums = np.pad(error.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    tops, lefts = (sorted({*range(0, n - side + 1, max(side // 4, 1)), n - side}) for n in error.shape)
    y, x = np.array(tops)[:, None], np.array(lefts)
    total = sums[y + side, x + side] - sums[y, x + side] - sums[y + side, x] + sums[y, x]
    order = np.argsort(-total, None, "stable")
    return [(tops[i // len(lefts)], lefts[i % len(lefts)]) for i in order if total.flat[i] > 1e-3]


def pick_windows(windows, side, count):
    """{method: sorted windows} -> at most `count` (method, top, left): the worst window of each method in
    turn, at least half a side apart."""
    picked, remaining = [], {method: iter(places) for method, places in windows.items()}

    def is_free(y, x):
        return all(max(abs(y - top), abs(x - left)) >= 1.5 * side for _, top, left in picked)

    while remaining and len(picked) < count:
        for method, places in list(remaining.items()):
            place = next(((y, x) for y, x in places if is_free(y, x)), None)
            if place is None:
                del remaining[method]
            elif len(picked) < count:
                picked.append((method, *place))
    return picked
