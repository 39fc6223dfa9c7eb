"""Compare models and other programs' results on pictures: one table, and with --report one page.

    python evaluate.py --data HR --recipe web --weights runs/mine/best.safetensors
    python evaluate.py --data HR --lr-dir LR --sr waifu2x=FOLDER --weights a.safetensors rival.pth
    python evaluate.py --lr-dir LR --metrics niqe,banding       # without HR pictures

The methods of the table: bicubic, Lanczos, other programs' results (--sr), and models (--weights). All
methods are measured on the same pictures, rounded to 8 bits, after --border pixels are removed on each side.
metrics.py defines the metrics.
"""
import argparse
import csv
import io
import math
import statistics
import sys
import time
from dataclasses import dataclass
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
except ModuleNotFoundError:     # fast.py is optional
    fast = None

TILE_PIXELS = 2**20             # run LR pictures above this number of pixels in tiles
TILE_SIZE = {"cpu": 384}        # default of --tile-size, 512 on other devices
TILE_PAD = 32                   # context of a tile on each side, input pixels
RESERVED = ("bicubic", "lanczos", "HR", "LR")       # names that --sr and --weights cannot have
WITH_HR = "psnr_y,ssim_y,psnr_rgb,ssim_rgb,edge_psnr,faithfulness,seconds"
WITHOUT_HR = "niqe,banding,blocking,faithfulness,seconds"

# the metrics of metrics.py, and the time, measured in evaluate_picture()
COLUMNS = metrics.METRICS | {"seconds": Metric("s/MP", "", 3, "model", None)}      # per megapixel of SR
NEEDS = {"hr": "HR pictures (--data)", "lr": "LR pictures (--lr-dir or --recipe)",
         "model": "a model (--weights)"}


class ModelError(images.UserError):
    """A model cannot process a picture."""


@dataclass
class Setup:
    """Everything that is the same for all pictures."""
    device: torch.device
    amp: torch.dtype | None
    tile_size: int | None               # None: see TILE_PIXELS and TILE_SIZE
    models: dict                        # {label: model}
    scale: int
    border: int                         # pixels
    recipe: str | None
    columns: list[Column]
    jobs: list                          # see pairs.match_pairs()
    notes: list[str]
    description: str                    # description of the LR pictures, shown to the user


# ---- setup

def prepare(args):
    """Check the arguments and load models and lists of pictures. Return a Setup."""
    if not (args.data or args.lr_dir or args.sr):
        raise images.UserError("--data is missing: the folder of HR pictures (or give --lr-dir or --sr)")
    if args.recipe and (args.lr_dir or not args.data):
        raise images.UserError("--recipe makes LR pictures from --data; give no --lr-dir with it")
    if args.csv and args.csv.exists() and not args.overwrite:
        raise images.UserError(f"{args.csv} exists; choose another name or give --overwrite")
    device, amp = tile.pick_device(args.device, args.amp)
    if args.tile_size:
        tile.Tiler(args.tile_size, TILE_PAD)        # raises TileError for a size that does not fit
    results = parse_results(args.sr or [])
    sides = {"HR": args.data, "LR": args.lr_dir, **results}
    jobs, notes = match_pairs({side: path for side, path in sides.items() if path})

    models = load_models(args.weights or ([] if args.sr else default_weights()), device, results)
    scales = {model.scale for model in models.values()} | ({args.scale} if args.scale else set())
    if len(scales) > 1:
        raise images.UserError(f"models and --scale need one common scale, not {sorted(scales)}")
    scale = next(iter(scales), 2)
    recipe = args.recipe
    if models and not recipe and not args.lr_dir:
        if not args.data:
            raise images.UserError("models need LR pictures; give --lr-dir or --data")
        recipe = "bicubic"
    if recipe:
        degrade.parse_recipe(recipe)        # raises RecipeError

    description = "no LR"
    if recipe or args.lr_dir:
        description = f"recipe {recipe}" if recipe else f"LR from {images.printable(args.lr_dir)}"
        description += f", {scale}x"
    if not args.data:
        description += ", no HR"
    inputs = {"hr": args.data, "lr": recipe or args.lr_dir, "model": models}
    return Setup(device, amp, args.tile_size, models, scale, scale if args.border is None else args.border,
                 recipe, choose_columns(args, inputs), jobs, notes, description)


def parse_results(texts):
    """Convert ['waifu2x=folder'] of --sr to {'waifu2x': Path('folder')}. Raises UserError."""
    results = {}
    for text in texts:
        label, _, folder = text.partition("=")
        if not label or not folder:
            raise images.UserError(f"--sr {text}: write NAME=FOLDER, for example waifu2x=results/waifu2x")
        if label in results or label in RESERVED:
            raise images.UserError(f"--sr {text}: the name {label} is already used; choose another one")
        results[label] = Path(folder)
    return results


def default_weights():
    """Return the shipped weights between which tile.py chooses, or the newest run."""
    import choose
    file = choose.default_weights()
    return [path for path in (file, choose.companion_weights(file)) if path]


def load_models(files, device, results):
    """Load weights of any architecture -> {label: model}.

    A label is the name of the file, or of the run for runs/NAME/best.safetensors, or the path if the name is
    not unique or already used: one of RESERVED or a key of `results`.
    """
    names = []
    for path in map(Path, files):
        run_label = {"best": path.parent.name, "last": f"{path.parent.name}/last"}
        names.append(run_label.get(path.stem, path.stem))
    models = {}
    for name, file in zip(names, files):
        unique = name and names.count(name) == 1 and name not in (*RESERVED, *results)
        model = models[name if unique else str(file)] = load_any(file, device)
        if fast:
            fast.prepare(model)
    return models


def choose_columns(args, inputs):
    """Return the columns of --metrics, or the default columns without those that lack an input.

    inputs: {key of NEEDS: true if given}. Raises UserError for a missing input, and MetricError for a missing
    package or file.
    """
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
        # times are averaged by the median, because the first run is slower
        mean = statistics.median if name == "seconds" else statistics.fmean
        columns.append(Column(name, metric.head, metric.better, metric.digits, mean))
    return columns


# ---- one picture

def upscale(setup, label, lr):
    """Upscale lr (3, h, w) by a model, in tiles if it is large. Raises ModelError."""
    tiler = tile.Tiler(max(lr.shape[-2:]), 0, align=1)
    if setup.tile_size or lr[0].numel() > TILE_PIXELS:
        tiler = tile.Tiler(setup.tile_size or TILE_SIZE.get(setup.device.type, 512), TILE_PAD)
    try:
        return tile.upscale(setup.models[label], lr, setup.scale, tiler, setup.device, setup.amp)
    except FloatingPointError as e:
        raise ModelError(f"{label}: {e}; remove it from --weights") from None
    except RuntimeError as e:
        if not tile.out_of_memory(e):
            raise
        raise ModelError(f"{label}: out of memory; give --tile-size 64 or another --device") from None


def run_methods(setup, lr, results):
    """Yield (method, SR picture (3, H, W), seconds) in the order of the table. seconds is nan for the
    results of other programs."""
    if lr is not None:
        size = lr.shape[-2] * setup.scale, lr.shape[-1] * setup.scale
        for kernel in ("bicubic", "lanczos"):
            start = time.perf_counter()
            sr = degrade.resize(lr, size, kernel).clamp(0, 1)
            yield kernel, sr, time.perf_counter() - start
    for label, sr in results.items():
        yield label, sr, math.nan
    for label in setup.models:
        start = time.perf_counter()
        sr = upscale(setup, label, lr)
        yield label, sr, time.perf_counter() - start


def evaluate_picture(setup, lr, hr, results):
    """Run and measure all methods on one picture.

    Returns {method: {column: value}}, and for the page {method: (H, W, 3) uint8}. Raises ModelError, and
    MetricError if the picture is too small for a metric."""
    values, pictures = {}, {}
    for method, sr, seconds in run_methods(setup, lr, results):
        values[method] = {}
        for column in setup.columns:
            if column.key == "seconds":
                value = seconds / (sr[0].numel() / 1e6)
            else:
                value = COLUMNS[column.key].run(sr, hr, lr, setup.scale, setup.border)
            values[method][column.key] = value
        pictures[method] = images.to_uint8(sr)
    if hr is not None:
        pictures["HR"] = images.to_uint8(hr)
    return values, pictures


# ---- the table

def format_table(rows, columns, bold_best=False):
    """Format the means of rows [{method: {column: value}}] as lines. bold_best: use escape codes of a
    terminal."""
    methods = list(rows[0])
    label_width = max(map(len, methods)) + 2
    head = " " * label_width
    lines = {method: f"{images.printable(method):<{label_width}}" for method in methods}
    for column in columns:
        width = max(10, len(column.head) + 2)
        head += f"{column.head:>{width}}"
        for method, (text, best) in average(rows, column)[0].items():
            text = f"{text:>{width}}"
            lines[method] += f"\033[1m{text}\033[0m" if bold_best and best else text
    return [head, *lines.values()]


def csv_text(names, rows, columns):
    """Format a line for each picture and method as CSV. A missing value is an empty cell."""
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
                   help="model files; the package spandrel adds other architectures (default: the weights "
                        "between which tile.py chooses; no model if --sr is given)")
    g = p.add_argument_group("pictures")
    g.add_argument("--data", type=Path, help="folder of HR pictures, or one picture")
    g.add_argument("--recipe", help="make LR pictures from --data: "
                                    f"{', '.join(degrade.RECIPES)}, or a mix (default: bicubic)")
    g.add_argument("--lr-dir", type=Path, help="folder of LR pictures, instead of --recipe")
    g.add_argument("--sr", action="append", metavar="NAME=FOLDER",
                   help="results of another program; repeatable. Pictures missing from a folder are ignored")
    g.add_argument("--scale", type=int, help="scale factor if there is no model (default: 2)")
    g.add_argument("--limit", type=int, help="stop after this many pictures")
    g.add_argument("--seed", type=int, default=0, help="seed of the recipe (default: 0)")
    g = p.add_argument_group("models")
    g.add_argument("--tile-size", type=int,
                   help="tile size in input pixels (default: no tiles up to 1 megapixel; above it 512, or "
                        "384 on CPU)")
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
    setup = prepare(args)
    page = None
    if args.report:
        note = "; ".join([f"border {setup.border}", *setup.notes])
        page = Report(args.report, setup.description, setup.columns, note, overwrite=args.overwrite)
    names, rows, skipped = [], [], []
    start, progress = time.time(), images.ProgressLine()
    pairs = read_pairs(setup.jobs, setup.scale, setup.recipe, args.seed, args.limit, skipped=skipped)
    try:
        for name, lr, hr, results in pairs:
            try:
                values, pictures = evaluate_picture(setup, lr, hr, results)
            except (metrics.MetricError, ModelError) as e:
                report_skipped(name, e, skipped)
                continue
            if page:
                page.add(name, pictures, values, None if hr is None else "HR")
            names.append(name)
            rows.append(values)
            total = len(setup.jobs) - len(skipped)
            progress(progress_text(len(rows), min(total, args.limit or total), time.time() - start))
    finally:
        if page and rows:
            page.finish()
    images.ProgressLine.clear()
    if not rows:
        raise images.UserError("no picture could be used; see the lines above")

    print(f"{len(rows)} pictures{f' ({len(skipped)} skipped)' if skipped else ''}, {setup.description}, "
          f"border {setup.border}", *setup.notes, sep="\n")
    print(*format_table(rows, setup.columns, bold_best=sys.stdout.isatty()), sep="\n")
    if args.csv:
        write_file(args.csv, csv_text(names, rows, setup.columns).encode("utf-8", "surrogateescape"))
    if page:
        print(f"page: {images.printable(args.report / 'index.html')}")


def progress_text(done, total, seconds):
    left = int(seconds / done * (total - done))
    return f"{done}/{total} pictures  {seconds / done:.1f} s each  {left // 60}:{left % 60:02d} left"


def main():
    if hasattr(sys.stdout, "reconfigure"):      # the console of Windows cannot print every file name
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse()
    try:
        run(args)
    except (images.UserError, WeightsError, degrade.RecipeError, metrics.MetricError) as e:
        images.fail(images.printable(e))
    except KeyboardInterrupt:
        images.ProgressLine.clear()
        print("stopped; no table was printed; the page contains the finished pictures", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
