"""Write a page that compares pictures of several methods. The page needs no server and no network.

    from report import Column, Report
    page = Report(Path("page"), "2x, recipe web", [Column("psnr_y", "PSNR-Y, dB", "higher", 2)])
    page.add("girl.png", {"bicubic": a, "ours": b, "HR": c}, {"ours": {"psnr_y": 33.5}}, reference="HR")
    print(page.finish())        # page/index.html; its pictures are in page/report-files

The page has a table of means, crops of the largest errors, a slider between any two methods with zoom, maps
of the difference, and a table per metric. report.html is its template. Needs numpy, Pillow, and images.py.
"""
import html
import io
import itertools
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
FILES_FOLDER = "report-files"       # in the folder of index.html
CROP_SIDE = 96                      # pixels
CROPS = 3                           # places per picture
HEAT_WHITE = 24                     # this difference of Y, in levels, is shown as white
ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


class Column(NamedTuple):
    """A metric of the tables."""
    key: str                        # in the dictionaries passed to Report.add()
    head: str                       # text over the column, with the unit
    better: str = ""                # "higher", "lower", or "" if neither is better
    digits: int = 2
    mean: Callable = statistics.fmean       # over the pictures


class Report:
    """A page in `folder`. columns: list of Column, the metrics of the tables.

    overwrite: replace an old report; other files stay. Raises UserError if the folder is not empty and
    overwrite is False.
    """

    def __init__(self, folder, title, columns, note="", overwrite=False):
        self.folder, self.files = Path(folder), Path(folder) / FILES_FOLDER
        self.title, self.columns, self.note = title, list(columns), note
        self.pictures = []          # data of each picture for the script of the page
        self.rows = []              # {method: {key: value}} of each picture
        if any(self.folder.glob("*")) and not overwrite:
            raise UserError(f"{printable(folder)} is not empty; choose another folder or give --overwrite")
        for old in [*self.folder.glob("index.html"), *self.files.glob("[0-9][0-9][0-9][0-9]-*")]:
            old.unlink()

    def add(self, name, pictures, values, reference=None):
        """Add one picture and write its files. Raises UserError if a file cannot be written.

        pictures: {method: (H, W, 3) uint8}, all of one size, in the order of the page.
        values: {method: {key: number}}; nan or missing if there is no value.
        reference: the key of the true picture, or None.
        """
        height, width, _ = next(iter(pictures.values())).shape
        number = f"{len(self.pictures) + 1:04d}"
        side = min(CROP_SIDE, height, width)
        errors = error_maps(pictures, reference)

        layers = []
        for i, (method, pixels) in enumerate(pictures.items()):
            layers.append(dict(label=method, file=self.write_picture(f"{number}-{i}", pixels), heat=""))
            if method in errors:
                layers[i]["heat"] = self.write_picture(f"{number}-{i}-heat", draw_heat_map(errors[method]))

        regions = worst_cells(errors, side, CROPS)
        rows = [np.concatenate([p[r["y"]:, r["x"]:][:side, :side] for p in pictures.values()], 1)
                for r in regions]
        crops = self.write_picture(f"{number}-crops", np.concatenate(rows)) if rows else ""
        self.pictures.append(dict(name=name, width=width, height=height, reference=reference, layers=layers,
                                  side=side, regions=regions, crops=crops))
        self.rows.append(values)

    def finish(self):
        """Write index.html with the pictures added so far and return its path. add() may be called again."""
        data = json.dumps(self.pictures, separators=(",", ":")).replace("<", r"\u003c")     # safe in <script>
        values = dict(title=html.escape(self.title), note=html.escape(self.note), heat_white=str(HEAT_WHITE),
                      summary=self.summary_table(), each=self.picture_tables(), data=data)
        page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))
        write_file(self.folder / "index.html", page.encode("utf-8", "replace"))
        return self.folder / "index.html"

    def summary_table(self):
        """Return the table of means as HTML. If values are missing, the head names the number of pictures."""
        heads, rows = [], {}
        for column in self.columns:
            cells, count = average(self.rows, column)
            note = f" ({count} of {len(self.rows)} pictures)" if count < len(self.rows) else ""
            heads.append(column.head + note + ARROWS[column.better])
            for method, cell in cells.items():
                rows.setdefault(html.escape(method), []).append(cell)
        return html_table("method", heads, rows.items())

    def picture_tables(self):
        """Return one HTML table per column, with pictures as rows. The page shows one table at a time."""
        links = [f'<a href="#{i}">{html.escape(p["name"])}</a>' for i, p in enumerate(self.pictures, 1)]
        tables = []
        for column in self.columns:
            by_method = values_by_method(self.rows, column)
            rows = [format_cells(values, column) for values in zip(*by_method.values())]
            table = html_table("picture", by_method, zip(links, rows))
            head = html.escape(column.head + ARROWS[column.better])
            tables.append(f'<div class="each" data-head="{head}"{" hidden" if tables else ""}>{table}</div>')
        return "\n".join(tables)

    def write_picture(self, name, pixels):
        """Save (H, W, 3 or 4) uint8 without loss, and return its URL."""
        memory, suffix = io.BytesIO(), "webp" if max(pixels.shape) < 2**14 else "png"      # WebP's limit
        Image.fromarray(pixels).save(memory, suffix, lossless=True, method=1, quality=0)
        write_file(self.files / f"{name}.{suffix}", memory.getbuffer())
        return f"{FILES_FOLDER}/{name}.{suffix}"


def write_file(path, data):
    """Write bytes to a file completely or not at all. Raises UserError."""
    try:
        write_atomic(path, data)
    except OSError as e:
        raise UserError(f"cannot write {printable(path)}: {e.strerror}") from None


# ---- tables

def values_by_method(rows, column):
    """Convert rows [{method: {key: value}}] to {method: [value of each row]}; nan if there is no value."""
    methods = dict.fromkeys(method for row in rows for method in row)
    return {method: [row.get(method, {}).get(column.key, math.nan) for row in rows] for method in methods}


def average(rows, column):
    """Average one column of rows [{method: {key: value}}] -> ({method: (text, is best)}, pictures averaged).

    Only pictures for which every method has a value are averaged, so that all methods are compared on the
    same pictures. A method without any value is ignored, and its text is "-".
    """
    by_method = values_by_method(rows, column)
    measured = [values for values in by_method.values() if not all(map(math.isnan, values))]
    common = [i for i in range(len(rows)) if not any(math.isnan(values[i]) for values in measured)]
    means = [column.mean([v[i] for i in common]) if common else math.nan for v in by_method.values()]
    return dict(zip(by_method, format_cells(means, column))), len(common)


def format_cells(values, column):
    """Format the values of one column -> [(text, is best)]. All texts equal to the best one are best."""
    texts = ["-" if math.isnan(value) else f"{value:.{column.digits}f}" for value in values]
    known = [value for value in values if not math.isnan(value)]
    best = None
    if known and column.better:
        best = texts[values.index(max(known) if column.better == "higher" else min(known))]
    return [(text, text == best) for text in texts]


def html_table(corner, heads, rows):
    """Return a table as HTML. heads: texts. rows: [(HTML of the first cell, [(text, is best)])]."""
    head = "".join(f'<th scope="col"><button>{html.escape(text)}</button></th>' for text in (corner, *heads))
    body = ""
    for name, cells in rows:
        cells = "".join(f'<td{" class=best" if best else ""}>{text}</td>' for text, best in cells)
        body += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# ---- where the pictures differ

def error_maps(pictures, reference):
    """Return {method: |Y - Y of the reference|, (H, W) in levels}. Without a reference: {"": range of Y over
    all methods}. Y is averaged over 3x3 pixels first, so that noise weighs less than a wrong line."""
    smooth = {}
    for method, pixels in pictures.items():
        y = np.pad(pixels @ np.float32((65.481, 128.553, 24.966)) / 255, 1, mode="edge")
        y = y[:-2] + y[1:-1] + y[2:]
        smooth[method] = (y[:, :-2] + y[:, 1:-1] + y[:, 2:]) / 9
    if reference is not None:
        return {method: np.abs(y - smooth[reference]) for method, y in smooth.items() if method != reference}
    return {"": np.ptp(list(smooth.values()), 0)}


def draw_heat_map(error):
    """Draw an error map (H, W) in half its size as RGBA (h, w, 4) uint8: transparent, red, yellow, white for
    rising errors."""
    level = np.asarray(Image.fromarray(error).reduce(2))[..., None] / HEAT_WHITE
    level = np.rint(15 * level.clip(0, 1)) / 15
    color = (3 * level - [0, 1, 2]).clip(0, 1)
    opacity = np.where(level > 0, 0.1 + 0.9 * level, 0)
    return np.rint(255 * np.concatenate([color, opacity], 2)).astype(np.uint8)


def worst_cells(errors, side, count):
    """Return at most `count` squares with the largest errors, as a list of {"method", "x", "y"}.

    The squares lie on a grid of `side` pixels. The methods take turns, and the last method begins; each adds
    the square with its largest sum of squared errors that is not yet in the list. errors: {method: (H, W)}.
    """
    sums, picked = {}, []
    for method, error in errors.items():
        rows, columns = (n // side for n in error.shape)
        cells = error[:rows * side, :columns * side].reshape(rows, side, columns, side)
        sums[method] = np.square(cells).sum((1, 3))
    for method in itertools.islice(itertools.cycle(reversed(errors)), count):
        row, column = map(int, np.unravel_index(sums[method].argmax(), sums[method].shape))
        if sums[method][row, column] > 1e-3:
            picked.append(dict(x=column * side, y=row * side, method=method))
            for cells in sums.values():
                cells[row, column] = 0
    return picked
