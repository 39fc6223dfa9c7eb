"""Compare models and other programs' results on pictures: one table, and with --report one page.

    python evaluate.py --data HR --recipe web --weights runs/mine/best.safetensors
    python evaluate.py --data HR --lr-dir LR --sr waifu2x=FOLDER --weights a.safetensors rival.pth
    python evaluate.py --lr-dir LR --metrics niqe,blocking      # without HR pictures

The methods of the table: bicubic, Lanczos, other programs' results (--sr), and models (--weights). All
methods are measured on the same pictures, rounded to 8 bits, after --border pixels are removed on each side
(not for feat and faithfulness). metrics.py defines the metrics.
"""
import argparse
import csv
import io
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

import degrade
import images
import metrics
import tile
from convert import load_any
from metrics import Metric
from model import WeightsError
from pairs import match_pairs, read_pairs, report_skipped
from report import Column, Report, average, write_file

try:
    import fast
except ImportError:     # fast.py is optional
    fast = None

TILE_PIXELS = 2**20             # LR pictures with more pixels run in tiles
TILE_PAD = 32                   # context of a tile on each side, input pixels
RESERVED = ["bicubic", "lanczos", "HR", "LR"]       # names that --sr and --weights must not use
WITH_HR = "psnr_y,ssim_y,psnr_rgb,ssim_rgb,edge_psnr,faithfulness,seconds"
WITHOUT_HR = "niqe,blocking,faithfulness,seconds"

# the metrics of metrics.py, and the time, measured in evaluate_picture()
COLUMNS = metrics.METRICS | {"seconds": Metric("s/MP", "", 3, "model", None)}      # per megapixel of SR
NEEDS = {"hr": "HR pictures (--data)", "lr": "LR pictures (--lr-dir or --recipe)",
         "model": "a model (--weights)"}


# ---- setup

def prepare(args):
    """Check the arguments, load the models, and find the pictures.

    Sets the defaults of args, and adds: models {label: model}, tiler, columns (a list of report.Column), jobs
    and notes (see pairs.match_pairs()), and description (of the LR pictures). Raises UserError, WeightsError,
    RecipeError, or MetricError.
    """
    if not (args.data or args.lr_dir or args.sr):
        raise images.UserError("--data is missing: the folder of HR pictures (or give --lr-dir or --sr)")
    if args.recipe and (args.lr_dir or not args.data):
        raise images.UserError("--recipe makes LR pictures from --data; give no --lr-dir with it")
    if args.csv and args.csv.exists() and not args.overwrite:
        raise images.UserError(f"{args.csv} exists; choose another name or give --overwrite")
    args.device, args.amp = tile.pick_device(args.device, args.amp)
    args.tiler = tile.Tiler(args.tile_size or tile.TILE_SIZE, TILE_PAD)
    sides = {"HR": args.data, "LR": args.lr_dir, **dict(args.sr)}
    args.jobs, args.notes = match_pairs({side: path for side, path in sides.items() if path})

    if not args.weights and not args.sr:        # the default of tile.py
        import choose
        args.weights = choose.SHIPPED
    args.models = load_models(args.weights or [], args.device)
    labels = RESERVED + [label for label, _ in args.sr] + [*args.models]
    if len(set(labels)) < len(labels):
        raise images.UserError(f"two methods have the same name; choose other names: {', '.join(labels)}")
    scales = {model.scale for model in args.models.values()} | ({args.scale} if args.scale else set())
    if len(scales) > 1:
        raise images.UserError(f"models and --scale need one common scale, not {sorted(scales)}")
    args.scale = next(iter(scales), 2)
    args.border = args.scale if args.border is None else args.border
    if args.models and not args.recipe and not args.lr_dir:
        if not args.data:
            raise images.UserError("models need LR pictures; give --lr-dir or --data")
        args.recipe = "bicubic"
    if args.recipe:
        degrade.parse_recipe(args.recipe)       # raises RecipeError

    lr = f"recipe {args.recipe}" if args.recipe else f"LR from {args.lr_dir}" if args.lr_dir else "no LR"
    args.description = images.printable(f"{lr}, {args.scale}x{'' if args.data else ', no HR'}")
    args.columns = choose_columns(args)


def name_and_folder(text):
    name, folder = text.split("=", 1)
    return name, Path(folder)


def load_models(files, device):
    """Load weights of any architecture -> {label: model}.

    A label is the name of the file, or of the run for runs/NAME/best.safetensors, or the path if two files
    have the same name.
    """
    paths = [Path(file).absolute() for file in files]
    names = [path.parent.name if path.stem == "best" else path.stem for path in paths]
    models = {}
    for name, file in zip(names, files):
        model = models[name if names.count(name) == 1 else str(file)] = load_any(file, device)
        if fast:
            fast.prepare(model)
    return models


def choose_columns(args):
    """Return the columns of --metrics, or the default columns for which all inputs are given.

    Raises UserError if a metric of --metrics lacks an input, and MetricError for a missing package or file.
    """
    inputs = {"hr": args.data, "lr": args.recipe or args.lr_dir, "model": args.models}
    names = metrics.parse_metrics(args.metrics or (WITH_HR if args.data else WITHOUT_HR), COLUMNS)
    columns = []
    x = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    for name in names:
        metric = COLUMNS[name]
        if metric.needs and not inputs[metric.needs]:
            if args.metrics:
                raise images.UserError(f"the metric {name} needs {NEEDS[metric.needs]}")
            continue
        if metric.run:
            metric.run(x, x.flip(2), x[:, ::2, ::2], 2, 0)      # find missing packages and files now
        # the median of the times, because the first run is slower
        mean = statistics.median if name == "seconds" else statistics.fmean
        columns.append(Column(name, metric.head, metric.better, metric.digits, mean))
    return columns


# ---- one picture

def upscale(args, label, lr):
    """Upscale lr (3, h, w) by a model, in tiles if it is large. Raises PictureError."""
    in_tiles = args.tile_size or lr[0].numel() > TILE_PIXELS
    tiler = args.tiler if in_tiles else tile.Tiler(max(lr.shape[-2:]), 0, align=1)
    try:
        return tile.upscale(args.models[label], lr, args.scale, tiler, args.device, args.amp)
    except FloatingPointError as e:
        raise images.PictureError(f"{label}: {e}; remove it from --weights") from None


def evaluate_picture(args, lr, hr, results):
    """Run and measure all methods on one picture, in the order of the table.

    Returns {method: {column: value}}, and for the page {method: (H, W, 3) uint8}. Raises PictureError, and
    MetricError if the picture is too small for a metric.
    """
    methods = {}        # {name: function that returns SR (3, H, W)}
    if lr is not None:
        size = lr.shape[-2] * args.scale, lr.shape[-1] * args.scale
        methods = {kernel: partial(degrade.resize, lr, size, kernel) for kernel in ("bicubic", "lanczos")}
    methods |= {label: sr.clone for label, sr in results.items()}
    methods |= {label: partial(upscale, args, label, lr) for label in args.models}
    values, pictures = {}, {}
    for method, function in methods.items():
        start = time.perf_counter()
        sr = function().clamp(0, 1)
        seconds = math.nan if method in results else time.perf_counter() - start
        values[method] = {}
        for column in args.columns:
            if column.key == "seconds":
                value = seconds / (sr[0].numel() / 1e6)
            else:
                value = COLUMNS[column.key].run(sr, hr, lr, args.scale, args.border)
            values[method][column.key] = value
        pictures[method] = images.to_uint8(sr)
    if hr is not None:
        pictures["HR"] = images.to_uint8(hr)
    return values, pictures


# ---- the table

def format_table(rows, columns):
    """Format the means of rows [{method: {column: value}}] as lines."""
    methods = list(rows[0])
    label_width = max(map(len, methods)) + 2
    head = " " * label_width
    lines = {method: f"{images.printable(method):<{label_width}}" for method in methods}
    for column in columns:
        width = max(10, len(column.head) + 2)
        head += f"{column.head:>{width}}"
        for method, (text, _) in average(rows, column)[0].items():
            lines[method] += f"{text:>{width}}"
    return [head, *lines.values()]


def csv_text(names, rows, columns):
    """Format the values as CSV, one line per picture and method. A missing value is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["picture", "method", *(column.key for column in columns)])
    for name, row in zip(names, rows):
        for method, values in row.items():
            cells = ["" if math.isnan(value) else f"{value:.6f}" for value in values.values()]
            writer.writerow([name, method, *cells])
    return text.getvalue()


# ---- the command

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", nargs="+", metavar="FILE",
                   help="model files; the package spandrel adds other architectures (default: the two "
                        "models of tile.py; with --sr no model)")
    g = p.add_argument_group("pictures")
    g.add_argument("--data", type=Path, help="folder of HR pictures, or one picture")
    g.add_argument("--recipe", help="make LR pictures from --data: "
                                    f"{', '.join(degrade.RECIPES)}, or a mix (default: bicubic)")
    g.add_argument("--lr-dir", type=Path, help="folder of LR pictures, instead of --recipe")
    g.add_argument("--sr", action="append", type=name_and_folder, default=[], metavar="NAME=FOLDER",
                   help="results of another program; repeatable. A picture that a folder lacks is left out")
    g.add_argument("--scale", type=int, help="scale factor if there is no model (default: 2)")
    g.add_argument("--limit", type=int, help="stop after this many pictures")
    g = p.add_argument_group("models")
    g.add_argument("--tile-size", type=int,
                   help="tile size in input pixels (default: no tiles up to 1 megapixel, else as tile.py)")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best available)")
    g.add_argument("--amp", choices=["bf16", "fp16", "off"],
                   help="autocast precision (default: bf16 if the device supports it, else off)")
    g = p.add_argument_group("metrics and output files")
    g.add_argument("--metrics", help=f"comma-separated: {', '.join(COLUMNS)} (default: {WITH_HR}; without "
                                     f"--data: {WITHOUT_HR})")
    g.add_argument("--border", type=int, help="pixels to ignore on each side (default: the scale)")
    g.add_argument("--csv", type=Path, metavar="FILE", help="write the values of every picture and method")
    g.add_argument("--report", type=Path, metavar="DIR", help="write a page with the pictures side by side")
    g.add_argument("--overwrite", action="store_true", help="replace existing results")
    return p.parse_args()


def run(args):
    """Run the command: evaluate, print the table, and write the files."""
    if fast:
        fast.keep_freed_memory()
    prepare(args)
    page = None
    if args.report:
        note = "; ".join([f"border {args.border}", *args.notes])
        page = Report(args.report, args.description, args.columns, note, overwrite=args.overwrite)
    names, rows, skipped = [], [], []
    progress = images.ProgressLine()
    pairs = read_pairs(args.jobs, args.scale, args.recipe, limit=args.limit, skipped=skipped)
    try:
        for name, lr, hr, results in pairs:
            try:
                values, pictures = evaluate_picture(args, lr, hr, results)
            except (metrics.MetricError, images.PictureError) as e:
                report_skipped(name, e, skipped)
                continue
            if page:
                page.add(name, pictures, values, None if hr is None else "HR")
            names.append(name)
            rows.append(values)
            total = min(len(args.jobs) - len(skipped), args.limit or len(args.jobs))
            progress.step("pictures", "", total)
    finally:        # also after Ctrl+C
        if page and rows:
            page.finish()
    images.ProgressLine.clear()
    if not rows:
        raise images.UserError("no picture could be used; see the lines above")

    print(f"{len(rows)} pictures{f' ({len(skipped)} skipped)' if skipped else ''}, {args.description}, "
          f"border {args.border}", *args.notes, sep="\n")
    print(*format_table(rows, args.columns), sep="\n")
    if args.csv:
        write_file(args.csv, csv_text(names, rows, args.columns).encode("utf-8", "surrogateescape"))
    if page:
        print(f"page: {images.printable(args.report / 'index.html')}")


def main():
    sys.stdout.reconfigure(errors="backslashreplace")       # a console may be unable to print a name
    try:
        run(parse())
    except (images.UserError, WeightsError, degrade.RecipeError, metrics.MetricError, KeyboardInterrupt) as e:
        images.fail(images.printable(e))


if __name__ == "__main__":
    main()
