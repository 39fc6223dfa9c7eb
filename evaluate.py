"""Compare models and other programs' results on pictures: one table, and with --report one page.

    python evaluate.py --data HR --recipe web --weights runs/mine/best.safetensors
    python evaluate.py --data HR --lr-dir LR --sr waifu2x=FOLDER --weights a.safetensors rival.pth
    python evaluate.py --lr-dir LR --metrics niqe,banding,artifact      # without HR pictures

The methods of the table: bicubic, Lanczos, other programs' results (--sr) and models (--weights). All
methods are measured on the same pictures, rounded to 8 bits, without --border pixels on each side.
metrics.py defines the metrics.
"""
import argparse
import csv
import io
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import degrade
import images
import losses
import metrics
import tile
from convert import load_any
from metrics import Metric
from model import WeightsError
from pairs import match_pairs, read_pairs, report_skipped
from report import Column, Report, common_means, format_cells

try:
    import fast
except ModuleNotFoundError:     # fast.py is optional
    fast = None

TILE_PIXELS = 2**20             # run LR pictures above this number of pixels in tiles
TILE_SIZE = {"cpu": 384}        # default of --tile-size, 512 on other devices
PATCH = 128                     # pixels a side of what the detector sees at once
CLEAN = losses.CLASSES.index("clean")
RESERVED = ("bicubic", "lanczos", "HR", "LR")       # names that --sr and --weights cannot have
WITH_HR = "psnr_y,ssim_y,psnr_rgb,ssim_rgb,edge_psnr,faithfulness,seconds"
WITHOUT_HR = "niqe,banding,blocking,faithfulness,seconds"

# the metrics of metrics.py, and three that need more than pictures: measure() computes those
COLUMNS = metrics.METRICS | {
    "artifact": Metric("Clean", "higher", 3, "detector", None),     # probability of the class `clean`
    "seam": Metric("Seam", "lower", 3, "model", None),              # tiled against untiled output
    "seconds": Metric("s/MP", "", 3, "model", None),                # per megapixel of SR
}
NEEDS = {"hr": "HR pictures (--data)", "lr": "LR pictures (--lr-dir or --recipe)",
         "model": "a model (--weights)", "detector": "a detector (--detector)"}


class MethodError(images.UserError):
    """A model cannot process a picture. The table of the pictures before it is still printed."""


@dataclass
class Setup:
    """Everything that is the same for all pictures."""
    device: torch.device
    amp: torch.dtype | None
    tiler: tile.Tiler
    always_tile: bool
    jobs: list                          # see pairs.match_pairs
    notes: list[str]
    models: dict                        # {label: model}
    plain_model: object                 # None, or replaces the only model on undamaged pictures
    scale: int
    border: int                         # pixels
    recipe: str | None
    description: str                    # of the LR pictures, for people
    columns: list[Column]
    detector: losses.ArtifactDetector | None


# ----------------------------------------------------------------------------------------------------
# setup


def prepare(args):
    """Load and check everything that the arguments name and return a Setup."""
    check(args)
    device, amp = tile.pick_device(args.device, args.amp)
    others = parse_results(args.sr or [])
    sides = {"HR": args.data, "LR": args.lr_dir, **others}
    jobs, notes = match_pairs({side: path for side, path in sides.items() if path})

    models, plain_model = load_models(args, (*RESERVED, *others), device)
    scales = {model.scale for model in models.values()} | ({args.scale} if args.scale else set())
    if len(scales) > 1:
        raise images.UserError(f"models and --scale need one common scale, not {sorted(scales)}")
    scale = next(iter(scales), 2)
    border = scale if args.border is None else args.border
    recipe = args.recipe
    if models and not recipe and not args.lr_dir:
        if not args.data:
            raise images.UserError("models need LR pictures; give --lr-dir or --data")
        recipe = "bicubic"
    has_lr = bool(recipe or args.lr_dir)

    names = metrics.parse_metrics(args.metrics or (WITH_HR if args.data else WITHOUT_HR), COLUMNS)
    detector = load_detector(args, names, device)
    inputs = {"hr": args.data, "lr": has_lr, "model": models, "detector": detector}
    names = available_columns(names, {name for name, value in inputs.items() if value}, bool(args.metrics))

    description = "no LR"
    if has_lr:
        source = f"recipe {recipe}" if recipe else f"LR from {images.printable(args.lr_dir)}"
        description = f"{source}, {scale}x"
    if not args.data:
        description += ", no HR"
    tile_size = args.tile_size or TILE_SIZE.get(device.type, 512)
    return Setup(
        device=device, amp=amp, tiler=tile.Tiler(tile_size, args.tile_pad),
        always_tile=bool(args.tile_size) or "seam" in names,
        jobs=jobs, notes=notes, models=models, plain_model=plain_model,
        scale=scale, border=border, recipe=recipe, description=description,
        columns=[make_column(name) for name in names], detector=detector)


def check(args):
    """Raise UserError for arguments that do not go together."""
    if not (args.data or args.lr_dir or args.sr):
        raise images.UserError("--data is missing: the folder of HR pictures (or give --lr-dir or --sr)")
    if args.recipe and args.lr_dir:
        raise images.UserError("--recipe and --lr-dir exclude each other; give one")
    if args.recipe and not args.data:
        raise images.UserError("--recipe makes LR pictures from HR pictures; give --data too")
    if args.recipe:
        degrade.parse_recipe(args.recipe)
    for path in filter(None, (args.csv, args.json)):
        if path.exists() and not args.overwrite:
            raise images.UserError(f"{path} exists; choose another name or give --overwrite")


def parse_results(texts):
    """['waifu2x=folder'] of --sr -> {'waifu2x': Path('folder')}. Raises UserError."""
    results = {}
    for text in texts:
        label, _, folder = text.partition("=")
        if not label or not folder:
            raise images.UserError(f"--sr {text}: write NAME=FOLDER, for example waifu2x=results/waifu2x")
        if label in results or label in RESERVED:
            raise images.UserError(f"--sr {label}=...: the name {label} is taken; choose another one")
        results[label] = Path(folder)
    return results


def load_models(args, reserved, device):
    """Return ({label: model}, plain_model).

    Without --weights and --sr these are the models that tile.py uses: one for all pictures, and
    plain_model, or None, for the undamaged ones. `reserved` are labels that are taken."""
    if args.weights or args.sr:
        files = args.weights or []
        labels = short_names(files, reserved)
        return {label: load_model(file, device) for label, file in zip(labels, files)}, None
    import choose
    file = choose.default_weights()
    companion = choose.companion_weights(file)
    if companion is None:
        label, = short_names([file], reserved)
        return {label: load_model(file, device)}, None
    label = f"{file.stem} or {companion.stem}"
    return {label: load_model(file, device)}, load_model(companion, device)


def load_model(path, device):
    """Load weights of any architecture, with the faster forward of fast.py where there is one."""
    model = load_any(path, device)
    if fast:
        fast.prepare(model)
    return model


def short_names(paths, reserved):
    """Labels of weights files: the name of the file, or of the run for runs/NAME/best.safetensors; the
    path where that is not unique. Raises UserError for a file given twice."""
    names = []
    for path in map(Path, paths):
        of_run = {"best": path.parent.name, "last": f"{path.parent.name}/last"}
        names.append(of_run.get(path.stem, path.stem))
    labels = []
    for name, path in zip(names, paths):
        unique = name and names.count(name) == 1 and name not in reserved
        labels.append(name if unique else str(path))
        if labels.count(labels[-1]) > 1:
            raise images.UserError(f"--weights names {path} twice")
    return labels


def load_detector(args, names, device):
    """The artifact detector, or None if it is not needed or not there. The metric `artifact` and the heat
    maps of the page need it."""
    if "artifact" not in names and not args.report:
        return None
    try:
        return losses.load_detector(args.detector, device)
    except losses.LossError:
        if args.detector:
            raise
        return None


def available_columns(names, inputs, explain):
    """The names that can be measured with these inputs, a set of keys of NEEDS.

    explain: print the others with a reason. Raises UserError if no name is left."""
    available = []
    for name in names:
        reason = reason_missing(name, inputs)
        if not reason:
            available.append(name)
        elif explain:
            print(f"left out: {name}: {reason}", file=sys.stderr)
    if not available:
        raise images.UserError(f"no metric can be measured; {names[0]}: {reason_missing(names[0], inputs)}")
    return available


def reason_missing(name, inputs):
    """Why a column cannot be measured, in one line, or None. Tries it on a random picture, because some
    metrics need a package or a file."""
    metric = COLUMNS[name]
    if metric.needs and metric.needs not in inputs:
        return f"it needs {NEEDS[metric.needs]}"
    if metric.run:
        x = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
        try:
            metric.run(x, x.flip(2), x[:, ::2, ::2], 2, 0)
        except metrics.MetricError as e:
            return str(e)
    return None


def make_column(name):
    """The Column of a metric. The mean of times is the median, because the first run is slower."""
    metric = COLUMNS[name]
    mean = statistics.median if name == "seconds" else statistics.fmean
    return Column(name, metric.head, metric.better, metric.digits, mean)


# ----------------------------------------------------------------------------------------------------
# one picture


def upscale(setup, label, lr, whole=False):
    """Upscale lr (3, h, w) by a model, in tiles if it is large. whole: never in tiles. Raises MethodError."""
    model = setup.models[label]
    whole = whole or (not setup.always_tile and lr[0].numel() <= TILE_PIXELS)
    tiler = tile.Tiler(max(lr.shape[-2:]), 0, align=1) if whole else setup.tiler
    try:
        if setup.plain_model:
            import choose
            if choose.is_undamaged(model, setup.plain_model, lr):
                model = setup.plain_model
        return tile.upscale(model, lr, setup.scale, tiler, setup.device, setup.amp)
    except FloatingPointError as e:
        raise MethodError(f"{label}: {e}; leave it out") from None
    except (RuntimeError, MemoryError) as e:
        if not tile.out_of_memory(e):
            raise
        raise MethodError(f"{label}: out of memory; give --tile-size 64 or another --device") from None


def run_methods(setup, lr, others):
    """Yield (method, SR picture (3, H, W), seconds) in the order of the table. seconds is nan for the
    results of other programs."""
    if lr is not None:
        size = lr.shape[-2] * setup.scale, lr.shape[-1] * setup.scale
        for kernel in ("bicubic", "lanczos"):
            start = time.perf_counter()
            sr = degrade.resize(lr, size, kernel).clamp(0, 1)
            yield kernel, sr, time.perf_counter() - start
    for label, sr in others.items():
        yield label, sr, math.nan
    for label in setup.models:
        start = time.perf_counter()
        sr = upscale(setup, label, lr)
        yield label, sr, time.perf_counter() - start


def measure(setup, method, sr, hr, lr, seconds, clean):
    """The figures {column: number} of one SR picture. clean: probability by the detector, or nan."""
    figures = {}
    for name in (column.key for column in setup.columns):
        if name == "seconds":
            figures[name] = seconds / (sr[0].numel() / 1e6)
        elif name == "artifact":
            figures[name] = clean
        elif name == "seam":
            figures[name] = measure_seam(setup, method, sr, lr)
        else:
            figures[name] = COLUMNS[name].run(sr, hr, lr, setup.scale, setup.border)
    return figures


def measure_seam(setup, method, sr, lr):
    """metrics.seam of a model's tiled picture; nan for other methods and for a single tile."""
    lines = setup.tiler.seams(*lr.shape[-2:], setup.scale)
    if method not in setup.models or not any(lines):
        return math.nan
    return metrics.seam(sr, upscale(setup, method, lr, whole=True), lines)


@torch.inference_mode()
def detect_artifacts(detector, rgb):
    """Run the detector on all patches of rgb (3, H, W).

    Returns the mean probability of the class `clean`, and a heat map (H, W): 1 - probability of `clean`."""
    height, width = rgb.shape[-2:]
    tops, lefts = ([*range(0, max(n - PATCH, 0), PATCH), max(n - PATCH, 0)] for n in (height, width))
    device = next(detector.parameters()).device
    probabilities, heat = [], torch.zeros(height, width)
    for top in tops:
        row = torch.stack([rgb[:, top:top + PATCH, left:left + PATCH] for left in lefts]).to(device)
        logits, logit_map, _ = detector(row, return_features=True)
        probabilities.append(logits.softmax(1)[:, CLEAN].cpu())
        artifacts = 1 - logit_map.softmax(1)[:, CLEAN:CLEAN + 1]
        artifacts = F.interpolate(artifacts, size=row.shape[-2:], mode="bilinear")[:, 0].cpu()
        for left, values in zip(lefts, artifacts):
            heat[top:top + PATCH, left:left + PATCH] = values
    return torch.cat(probabilities).mean().item(), heat.numpy()


def evaluate_picture(setup, lr, hr, others):
    """Run and measure all methods on one picture.

    Returns {method: figures}, and for the page {method: (H, W, 3) uint8} and {method: {title: heat map}}.
    Raises MethodError, and MetricError if the picture is too small for a metric."""
    figures, pictures, heat = {}, {}, {}
    for method, sr, seconds in run_methods(setup, lr, others):
        clean = math.nan
        if setup.detector:
            clean, artifacts = detect_artifacts(setup.detector, sr)
            heat[method] = {"artifacts": artifacts}
        figures[method] = measure(setup, method, sr, hr, lr, seconds, clean)
        pictures[method] = images.to_uint8(sr)
    if hr is not None:
        pictures["HR"] = images.to_uint8(hr)
    return figures, pictures, heat


# ----------------------------------------------------------------------------------------------------
# table and files


def mean_figures(results, columns):
    """Average the rows of all pictures -> {method: {column: mean}}. See report.common_means."""
    means = {row["method"]: {} for row in results}
    for column in columns:
        figures = {method: [] for method in means}
        for row in results:
            figures[row["method"]].append(row[column.key])
        for method, mean in common_means(figures, column.mean)[0].items():
            means[method][column.key] = mean
    return means


def format_table(means, columns, bold_best=False):
    """{method: {column: figure}} -> the lines of the table. bold_best: escape codes of a terminal."""
    label_width = max(map(len, means)) + 2
    head = " " * label_width
    lines = {method: f"{images.printable(method):<{label_width}}" for method in means}
    for column in columns:
        width = max(10, len(column.head) + 2)
        head += f"{column.head:>{width}}"
        cells = format_cells([figures[column.key] for figures in means.values()], column)
        for method, cell in zip(means, cells):
            text = f"{cell.text:>{width}}"
            lines[method] += f"\033[1m{text}\033[0m" if bold_best and cell.best else text
    return [head, *lines.values()]


def csv_text(results):
    """One line per picture and method; empty where there is no figure."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(results[0])
    for row in results:
        values = [f"{value:.6f}" if isinstance(value, float) else value for value in row.values()]
        writer.writerow(["" if value == "nan" else value for value in values])
    return text.getvalue()


def to_json(x):
    """Replace nan by None and infinity by "inf" in nested lists and dicts, as JSON knows neither."""
    if isinstance(x, dict):
        return {key: to_json(value) for key, value in x.items()}
    if isinstance(x, list):
        return [to_json(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else str(x)
    return x


def write_text(path, text):
    """Write a file that is complete or absent. Raises UserError."""
    try:
        images.write_atomic(path, text.encode("utf-8", "surrogateescape"))
    except OSError as e:
        raise images.UserError(f"cannot write {path}: {e.strerror}") from None


# ----------------------------------------------------------------------------------------------------
# the command


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", nargs="+", metavar="FILE",
                   help="model files; the package spandrel adds other architectures (default: the choice of "
                        "tile.py; with --sr none)")
    g = p.add_argument_group("pictures")
    g.add_argument("--data", type=Path, help="folder of HR pictures, or one picture")
    g.add_argument("--recipe", help="make LR pictures from --data: "
                                    f"{', '.join(degrade.RECIPES)} or a mix (default: bicubic)")
    g.add_argument("--lr-dir", type=Path, help="folder of LR pictures, instead of --recipe")
    g.add_argument("--sr", action="append", metavar="NAME=FOLDER",
                   help="results of another program; repeatable. Only pictures that all folders have count")
    g.add_argument("--crop", action="store_true",
                   help="crop pictures of slightly different sizes to their common top left part")
    g.add_argument("--scale", type=int, help="scale factor if there is no model (default: 2)")
    g.add_argument("--limit", type=int, help="stop after this many pictures")
    g.add_argument("--seed", type=int, default=0, help="seed of the recipe (default: 0)")
    g = p.add_argument_group("models")
    g.add_argument("--tile-size", type=int,
                   help="run in tiles of this many input pixels (default: in tiles of 512, on CPU 384, above "
                        "1 megapixel of LR)")
    g.add_argument("--tile-pad", type=int, default=32, help="context of a tile on each side (default: 32)")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best available)")
    g.add_argument("--amp", choices=["bf16", "fp16", "off"],
                   help="autocast precision (default: bf16 where the device has it, else off)")
    g = p.add_argument_group("figures and files")
    g.add_argument("--metrics", help=f"comma-separated: {', '.join(COLUMNS)} (default: {WITH_HR}; without "
                                     f"--data: {WITHOUT_HR})")
    g.add_argument("--border", type=int, help="pixels to ignore on each side (default: the scale)")
    g.add_argument("--detector", metavar="FILE",
                   help="for `artifact` and the page (default: weights/detector.safetensors)")
    g.add_argument("--csv", type=Path, metavar="FILE", help="write the figures of every picture and method")
    g.add_argument("--json", type=Path, metavar="FILE", help="write the same and the means as JSON")
    g.add_argument("--report", type=Path, metavar="DIR", help="write a page with the pictures side by side")
    g.add_argument("--overwrite", action="store_true", help="replace existing results")
    return p.parse_args()


def run(args):
    """Evaluate what the parsed arguments name; print the table and write the files."""
    if fast:
        fast.keep_freed_memory()
    setup = prepare(args)
    page = None
    if args.report:
        note = "; ".join([f"border {setup.border}", *setup.notes])
        page = Report(args.report, setup.description, setup.columns, note, overwrite=args.overwrite)
    results, skipped, failure = [], [], None
    done, start, progress = 0, time.time(), images.ProgressLine()
    pairs = read_pairs(setup.jobs, setup.scale, setup.recipe, args.seed, args.limit, args.crop, skipped)
    try:
        for name, lr, hr, others in pairs:
            try:
                figures, pictures, heat = evaluate_picture(setup, lr, hr, others)
            except metrics.MetricError as e:
                report_skipped(name, e, skipped)
                continue
            if page:
                page.add(name, pictures, figures, None if hr is None else "HR", heat)
            for method, row in figures.items():
                height, width, _ = pictures[method].shape
                results.append({"picture": name, "method": method, "width": width, "height": height, **row})
            done += 1
            total = len(setup.jobs) - len(skipped)
            progress(progress_text(done, min(total, args.limit or total), time.time() - start))
    except MethodError as e:
        failure = f"{images.printable(name)}, {e}"
    finally:
        if page and results:
            page.finish()
    images.ProgressLine.clear()
    if not results:
        raise images.UserError(failure or "no picture could be used; see the lines above")

    print(f"{done} pictures{f' ({len(skipped)} skipped)' if skipped else ''}, {setup.description}, "
          f"border {setup.border}", *setup.notes, sep="\n")
    means = mean_figures(results, setup.columns)
    print(*format_table(means, setup.columns, bold_best=sys.stdout.isatty()), sep="\n")
    if args.csv:
        write_text(args.csv, csv_text(results))
    if args.json:
        content = {"measured": setup.description, "scale": setup.scale, "border": setup.border,
                   "pictures": done, "skipped": skipped, "notes": setup.notes, "means": means,
                   "each": results}
        write_text(args.json, json.dumps(to_json(content), indent=1))
    if page:
        print(f"page: {images.printable(args.report / 'index.html')}")
    if failure:
        raise images.UserError(f"{failure}; the table has the pictures before it")


def progress_text(done, total, seconds):
    left = int(seconds / done * (total - done))
    return f"{done}/{total} pictures  {seconds / done:.1f} s each  {left // 60}:{left % 60:02d} left"


def main():
    if hasattr(sys.stdout, "reconfigure"):      # the console of Windows cannot print every file name
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse()
    try:
        run(args)
    except (images.UserError, WeightsError, losses.LossError, degrade.RecipeError, metrics.MetricError) as e:
        images.fail(images.printable(e))
    except KeyboardInterrupt:
        images.ProgressLine.clear()
        print("stopped; there is no table, and the page has the pictures so far", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
