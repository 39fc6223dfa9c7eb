"""evaluate.py: how good is a model, in figures and side by side.

    python evaluate.py --data HR_FOLDER --recipe bicubic --weights runs/mine/best.safetensors
    python evaluate.py --data HR --lr LR --sr waifu2x=FOLDER --weights a.safetensors rival.pth --report page
    python evaluate.py --lr LR --metrics niqe,banding,artifact             # where nobody has the true pictures
    python evaluate.py blend a.safetensors b.safetensors --alpha 0.3 -o c.safetensors
    python evaluate.py compare runs/a runs/b                               # training runs side by side

A table with bicubic and Lanczos beside the models, and beside what other programs made of the same pictures (--sr):
metrics.py says what the figures are, by default PSNR and SSIM on luma (Y) and on RGB, PSNR along edges, how well the
result, reduced again, matches the LR picture, and seconds per megapixel produced. Conventions: rounded to 8 bits,
--border pixels cut off each side (default: the scale). Every figure of a table is taken over the same pictures.
Needs torch, numpy, Pillow and our model.py, convert.py, tile.py, degrade.py, pairs.py, losses.py, metrics.py, report.py.
"""
import argparse
import csv
import json
import math
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw

import degrade
import losses
import metrics
import images
import tile
from convert import blend, find_sharp, find_weights, load_any, undamaged
from metrics import Metric, psnr, ssim
from model import save
from pairs import paired, pictures, report_skipped, say
from report import Column, Report, common_means

WHOLE_LIMIT = 2 ** 20       # LR pixels: above this a picture is taken tile by tile unless --whole
COLUMNS = {**metrics.METRICS,                                   # and what takes more than a picture:
           "artifact": Metric("Clean", "higher", 3, "", None),  # a detector's mean probability of `clean`
           "seam": Metric("Seam", "lower", 3, "lr", None),      # the network once more, untiled
           "seconds": Metric("s/MP", "", 3, "lr", None)}        # a clock
WITH_HR = "psnr_y,ssim_y,psnr_rgb,ssim_rgb,edge_psnr,faithfulness,seconds"
WITHOUT_HR = "niqe,banding,blocking,faithfulness,seconds"
RESERVED = "bicubic", "lanczos", "HR", "LR"


def score(sr, hr, border):
    """PSNR and SSIM, of Y and of RGB, of one picture (3, H, W), or their means over a batch."""
    return dict(psnr_y=psnr(sr, hr, border), ssim_y=ssim(sr, hr, border),
                psnr_rgb=psnr(sr, hr, border, luma=False), ssim_rgb=ssim(sr, hr, border, luma=False))


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def chosen(text, hr, lr, timed):
    """'psnr_y,niqe' -> the names of COLUMNS that can be measured where there are HR and LR pictures or not; a line on
    stderr for each that cannot. None takes the usual ones. Raises ValueError that lists the names there are."""
    names = metrics.chosen(text or (WITH_HR if hr else WITHOUT_HR), COLUMNS)
    for name in list(names):
        needs, lacking = COLUMNS[name].needs, None
        if needs == "hr" and not hr:
            lacking = "the true pictures; give --data"
        elif needs == "lr" and not lr:
            lacking = "LR pictures; give --lr or --recipe"
        elif name in ("seconds", "seam") and not timed:
            lacking = "a model to run; give --weights"
        if lacking:
            leave_out(names, name, f"it needs {lacking}", quietly=not text)
    return names


def leave_out(names, name, why, quietly=False):
    """Goes on without a metric. Raises ValueError where it is the last one."""
    if names == [name]:
        raise ValueError(f"{name} cannot be measured: {why}")
    names.remove(name)
    if not quietly:
        say(f"left out: {name}; {why}")


def labels(paths, taken=RESERVED):
    """Weights files -> short names for the table: of the file, or of the run where the file is a run's best. Raises
    ValueError for a file named twice."""
    names = [p.parent.name if p.stem == "best" else f"{p.parent.name}/last" if p.stem == "last" else p.stem
             for p in map(Path, paths)]
    names = [name if names.count(name) == 1 and name and name not in taken else str(path)
             for name, path in zip(names, paths)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--weights names {name} twice; once is enough")
    return names


def results_of(given):
    """['waifu2x=folder'] of --sr -> {'waifu2x': Path('folder')}. Raises ValueError."""
    found = {}
    for text in given or []:
        label, _, folder = text.partition("=")
        if not label or not folder:
            raise ValueError(f"--sr {text}: write it as NAME=FOLDER, waifu2x=results/waifu2x say")
        if label in found or label in RESERVED:
            raise ValueError(f"--sr {label}=...: that name is taken; choose another")
        found[label] = Path(folder)
    return found


def cell(value, digits):
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def make_row(label, row, width, names, best=()):
    """One line of the table; the columns named in best in bold."""
    line = f"{images.printable(label):<{width}}"
    for name in names:
        text = f"{cell(row[name], COLUMNS[name].digits):>{max(10, len(COLUMNS[name].head) + 2)}}"
        line += f"\033[1m{text}\033[0m" if name in best else text
    return line


def middle(name):
    """How a figure of all pictures is made of theirs: the mean, of times the median, which a slow start does not move."""
    return statistics.median if name == "seconds" else statistics.fmean


def mean_rows(results, names):
    """[(picture, method, row)], every picture by every method -> {method: row of means}, see report.common_means."""
    rows = {method: {} for _, method, _ in results}
    for name in names:
        figures = {label: [row[name] for _, method, row in results if method == label] for label in rows}
        for label, value in common_means(figures, middle(name))[0].items():
            rows[label][name] = value
    return rows


def best_of(rows, names):
    """{method: row} -> {name: the best figure as far as is shown}"""
    best = {}
    for name in names:
        values = [row[name] for row in rows.values() if not math.isnan(row[name])]
        if values and COLUMNS[name].better:
            best[name] = cell((max if COLUMNS[name].better == "higher" else min)(values), COLUMNS[name].digits)
    return best


def write_csv(path, results, names):
    """A row per picture and method; whole or not at all. Raises OSError."""
    with images.atomic_path(path) as part, open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "method", "width", "height", *names])
        for picture, method, row in results:
            figures = ("" if math.isnan(row[name]) else f"{row[name]:.6f}" for name in names)
            writer.writerow([picture, method, row["width"], row["height"], *figures])


def write_json(path, results, means, about):
    """What the CSV has, the means, and what was measured; null where there is no figure. Raises OSError."""
    def plain(row):
        return {k: (None if math.isnan(v) else str(v) if math.isinf(v) else v) for k, v in row.items()}
    found = dict(about, means={method: plain(row) for method, row in means.items()},
                 each=[dict(picture=picture, method=method, **plain(row)) for picture, method, row in results])
    with images.atomic_path(path) as part:
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")      # ASCII: any name comes through


# ---------------------------------------------------------------------------------------------------------------------
# Two models' weights, blended
# ---------------------------------------------------------------------------------------------------------------------


class Strip:
    """Watches a sweep: keeps the crop where its two ends differ most, of all pictures, and draws it for every alpha."""
    side, zoom = 160, 2

    def __init__(self, labels):
        self.labels, self.most, self.crops = labels, -1, {}

    def __call__(self, hr, made):
        far = (made[self.labels[0]] - made[self.labels[-1]]).abs().mean(0, keepdim=True)
        side = min(self.side, *far.shape[1:])
        step = max(side // 4, 1)
        average = F.avg_pool2d(far, side, step)[0]
        if average.max() > self.most:
            self.most = average.max()
            y, x = (i * step for i in divmod(average.argmax().item(), average.shape[1]))
            shown = {label: made[label] for label in self.labels} | ({} if hr is None else {"HR": hr})
            self.crops = {label: images.quantize(sr[:, y:y + side, x:x + side], 8) for label, sr in shown.items()}

    def draw(self):
        side = next(iter(self.crops.values())).shape[0] * self.zoom
        picture = Image.new("RGB", ((side + 4) * len(self.crops) - 4, side + 20), "white")
        draw = ImageDraw.Draw(picture)
        for i, (label, crop) in enumerate(self.crops.items()):
            draw.text((i * (side + 4) + 4, 4), label, fill="black")
            picture.paste(Image.fromarray(crop).resize((side, side), Image.Resampling.NEAREST), (i * (side + 4), 20))
        return picture


# ---------------------------------------------------------------------------------------------------------------------
# Training runs side by side
# ---------------------------------------------------------------------------------------------------------------------


def read_run(folder):
    """The rows of a run folder's log.csv, as {column: float}, without the columns that are empty. Raises ValueError."""
    try:
        with open(Path(folder) / "log.csv", newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error) as e:    # TypeError: a row longer than the head
        raise ValueError(f"{folder} is no run with a log.csv that can be read ({e})") from None
    if not rows or not all({"step", "psnr_y", "seconds"} <= row.keys() for row in rows):
        raise ValueError(f"{folder}/log.csv holds no report yet")
    return rows


def draw_curves(runs):
    """{name: rows of a log} -> a Pillow picture: validation PSNR-Y and every loss term over the steps, a panel each, a
    line per run."""
    w, h, left, top = 720, 220, 70, 24
    colours = [(200, 40, 90), (30, 90, 200), (20, 140, 70), (200, 120, 0), (120, 60, 180), (0, 140, 160)]
    runs = {name: [{k: float(v) for k, v in row.items()} for row in rows] for name, rows in runs.items()}
    other = {"step", "lr", "patches_per_s", "seconds", "memory_mib", "skipped", "ssim_y", "psnr_rgb", "ssim_rgb"}
    names = dict.fromkeys(k for rows in runs.values() for row in rows for k in row
                          if k not in other and not k.endswith("_grad"))
    names = ["psnr_y", *(n for n in names if n != "psnr_y")]
    picture = Image.new("RGB", (w, len(names) * h), "white")
    draw = ImageDraw.Draw(picture)
    most = max(row["step"] for rows in runs.values() for row in rows)
    for i, name in enumerate(names):
        values = [row[name] for rows in runs.values() for row in rows if name in row and math.isfinite(row[name])]
        lo, hi = min(values, default=0), max(values, default=1)
        hi = hi if hi > lo else lo + 1e-9 * max(1, abs(lo))

        def at(x, y):
            return (left + (w - left - 20) * x / max(most, 1), i * h + h - top - (h - 2 * top) * (y - lo) / (hi - lo))
        for k in range(5):
            y, x = lo + (hi - lo) * k / 4, most * k / 4
            draw.line([at(0, y), at(most, y)], fill=(225, 225, 225))
            draw.text((4, at(0, y)[1] - 6), f"{y:.4g}", fill="black")
            draw.text((at(x, lo)[0] - 8, at(x, lo)[1] + 6), f"{x:.0f}", fill="black")
        draw.text((left, i * h + 4), "validation PSNR-Y, dB" if name == "psnr_y" else f"loss: {name}", fill="black")
        for j, (run, rows) in enumerate(runs.items()):
            points = [at(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
            colour = colours[j % len(colours)]
            if points:
                draw.line(points * (2 if len(points) == 1 else 1), fill=colour, width=2)
            if len(runs) > 1:
                label = run.encode("latin-1", "replace").decode("latin-1")[-20:]       # Pillow's own letters are Latin only
                draw.text((left + 190 + 130 * (j % 3), i * h + 4 + 11 * (j // 3)), label, fill=colour)
    return picture


def compare(folders, out, overwrite):
    """Prints a table of training runs and writes their curves into the PNG `out`. Raises ValueError."""
    runs = dict(zip((Path(f).resolve().name for f in folders), map(read_run, folders)))
    if len(runs) < len(folders):
        runs = dict(zip(map(str, folders), map(read_run, folders)))
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; choose another name with --curves, or give --overwrite")
    settings = []
    for folder in folders:
        try:
            settings.append(dict(json.loads((Path(folder) / "args.json").read_text())))
        except (OSError, ValueError, TypeError):
            settings.append({})
    width = max(map(len, runs)) + 2
    final = "psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"
    print(" " * width + f"{'steps':>8}{'seconds':>9}" + "".join(f"{COLUMNS[n].head:>10}" for n in final)
          + f"{'best':>9}{'at step':>9}  differs in")
    keys = sorted({k for s in settings for k in s} - {"out", "overwrite", "every", "workers", "held_out"})
    for (name, rows), own in zip(runs.items(), settings):
        best, last = max(rows, key=lambda row: row["psnr_y"]), rows[-1]
        differs = [f"{k}={own.get(k)}" for k in keys if any(s.get(k) != own.get(k) for s in settings)]
        print(f"{images.printable(name):<{width}}{last['step']:>8.0f}{last['seconds']:>9.0f}"
              + "".join(f"{cell(last.get(n, math.nan), COLUMNS[n].digits):>10}" for n in final)
              + f"{best['psnr_y']:>9.2f}{best['step']:>9.0f}  {' '.join(differs)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with images.atomic_path(out) as part:
        draw_curves(runs).save(part, "PNG")
    print(f"curves: {out}")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def measuring_options(p):
    g = p.add_argument_group("what is measured")
    g.add_argument("--data", type=Path, help="folder of HR pictures, or one picture")
    g.add_argument("--recipe", help=f"make the LR pictures: {', '.join(degrade.RECIPES)}, mixes (default: bicubic)")
    g.add_argument("--lr", type=Path, help="take the LR pictures from this folder instead, by name; without --data too")
    g.add_argument("--sr", action="append", metavar="NAME=FOLDER",
                   help="what another program made, by name; may be given more than once. Pictures that one of them "
                        "lacks are left out of the whole table")
    g.add_argument("--crop", action="store_true", help="cut pictures of different sizes to the top left they share")
    g.add_argument("--scale", type=int, help="where no model says it (default: 2)")
    g.add_argument("--limit", type=int, help="stop after this many pictures")
    g.add_argument("--seed", type=int, default=0, help="of the recipe's draws (default: 0)")
    g = p.add_argument_group("how the models run")
    g.add_argument("--whole", action="store_true", help="never in tiles (default: in tiles above 1 megapixel of LR)")
    g.add_argument("--tile-size", type=int, help="in tiles always; input pixels from tile to tile (512; CPU 384)")
    g.add_argument("--tile-pad", type=int, default=32, help="pixels more that a tile sees on each side (default: 32)")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    g.add_argument("--amp", choices=["bf16", "fp16", "off"], help="precision (default: bf16 where native, else off)")
    g = p.add_argument_group("figures")
    g.add_argument("--metrics", help=f"any of {', '.join(COLUMNS)} (default: {WITH_HR}; without --data {WITHOUT_HR})")
    g.add_argument("--border", type=int, help="pixels cut off each side before measuring (default: the scale)")
    g.add_argument("--detector", metavar="FILE",
                   help="for artifact and the page (default: weights/detector.safetensors)")
    g.add_argument("--each", action="store_true", help="a block per picture too")
    g.add_argument("--csv", type=Path, metavar="FILE", help="write every figure of every picture and method there")
    g.add_argument("--json", type=Path, metavar="FILE", help="the same and the means as JSON")
    g.add_argument("--report", type=Path, metavar="DIR", help="make a page there that lays the pictures side by side")
    g.add_argument("--overwrite", action="store_true", help="replace what is there already")


def main():
    if hasattr(sys.stdout, "reconfigure"):      # a log in cp1252, a name in Japanese
        sys.stdout.reconfigure(errors="backslashreplace")
    task = sys.argv[1] if sys.argv[1:2] in (["blend"], ["compare"]) else None
    p = argparse.ArgumentParser(prog=f"evaluate.py {task}" if task else None,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    if task == "blend":
        p.description = "Blends the weights of two models of one network: (1 - alpha) * A + alpha * B."
        p.epilog = ("examples:\n"
                    "  python evaluate.py blend clean.safetensors web.safetensors --alpha 0.3 -o mine.safetensors\n"
                    "  python evaluate.py blend clean.safetensors web.safetensors --sweep 0,0.5,1 --data hr/ -o strip.png")
        p.add_argument("files", nargs=2, metavar="FILE", help="A and B")
        p.add_argument("--alpha", type=float, help="the share of B, 0 to 1; the blend is written to --out")
        p.add_argument("--sweep", metavar="N,...", help="measure these shares instead, a crop of each drawn to --out")
        p.add_argument("-o", "--out", type=Path, required=True, help="a .safetensors file; with --sweep a .png")
    else:
        p.description = "Models and other programs' results beside bicubic and Lanczos, over a folder of pictures."
        p.epilog = ("examples:\n"
                    "  python evaluate.py --data wallpapers/ --recipe web --weights runs/mine/best.safetensors\n"
                    "  python evaluate.py --data hr/ --lr lr/ --sr waifu2x=theirs/ --weights mine.safetensors --report page\n"
                    "  python evaluate.py --lr lr/ --metrics niqe,banding --weights a.safetensors b.safetensors\n"
                    "  python evaluate.py blend --help\n  python evaluate.py compare runs/a runs/b")
        p.add_argument("runs", nargs="*", type=Path, help="training runs to lay side by side, instead of all below")
        p.add_argument("--curves", type=Path, default=Path("curves.png"), help="where their curves go (curves.png)")
        p.add_argument("--weights", nargs="+", metavar="FILE",
                       help="model files, of any architecture with the package spandrel (default: for each picture the "
                            "one of weights/ that tile.py chooses, else the newest runs/*/best.safetensors; beside --sr none)")
    measuring_options(p)
    args = p.parse_args(sys.argv[2:] if task else None)
    try:
        if task == "blend":
            run_blend(args)
        elif args.runs or task == "compare":
            if args.data or not args.runs:
                raise ValueError("give training runs to compare, or --data to measure models on, one of them")
            refuse_measuring(args, "has no effect beside training runs; measure models in a command of its own")
            compare(args.runs, args.curves, args.overwrite)
        else:
            run(args)
    except ValueError as e:     # a user's mistake: PictureError and WeightsError are two of them
        images.fail(images.printable(e))
    except (RuntimeError, MemoryError) as e:
        if not tile.out_of_memory(e):
            raise
        images.fail("out of memory; give fewer --weights, --tile-size 64 or another --device")
    except OSError as e:
        at = e.filename2 or e.filename
        images.fail(images.printable(f"cannot write{f' {at}' if at else ''}: {e.strerror}; free some room or choose "
                                 "another place"))
    except KeyboardInterrupt:
        say("stopped; no table was written, and a page holds what was done")
        sys.exit(130)


def run_blend(args):
    ending = ".png" if args.sweep else ".safetensors"
    if (args.alpha is None) == (not args.sweep):
        raise ValueError("give --alpha or --sweep, one of them")
    if args.alpha is not None:
        refuse_measuring(args, "goes with --sweep; measure the blend in a second step")
    try:
        alphas = [args.alpha] if args.alpha is not None else sorted({float(s) for s in args.sweep.split(",")})
    except ValueError:
        raise ValueError(f"--sweep {args.sweep} does not work; write it as 0,0.25,0.5,0.75,1") from None
    if not all(0 <= alpha <= 1 for alpha in alphas) or args.sweep and len(alphas) < 2:
        raise ValueError("shares must lie in 0 to 1" + ", and a sweep takes two or more" * bool(args.sweep))
    if args.out.suffix != ending:
        raise ValueError(f"--out must end in {ending} here, not {args.out.name}")
    writable(args.out, args.overwrite)
    if not args.sweep:
        made = blend(args.files, alphas)[args.alpha]
        save(made, args.out, made.header)
        print(f"{args.out}: {1 - args.alpha:g} of {args.files[0]}, {args.alpha:g} of {args.files[1]}")
        return
    device, _ = tile.device_of(args)
    networks = {f"alpha {alpha:g}": network.to(device) for alpha, network in blend(args.files, alphas).items()}
    strip = Strip(list(networks))
    run(args, networks, strip)
    with images.atomic_path(args.out) as part:
        strip.draw().save(part, "PNG")
    print(f"strip: {args.out}")


def refuse_measuring(args, why):
    """Raises ValueError, "--csv" and why, for flags that would have no effect."""
    for name in "data", "lr", "sr", "recipe", "metrics", "csv", "json", "report":
        if getattr(args, name):
            raise ValueError(f"--{name} {why}")


def writable(path, overwrite):
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; choose another name or give --overwrite")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write to {path.parent}; choose another place for {path.name}")


def check(args):
    """Raises ValueError for arguments that make no sense, alone or together."""
    if not (args.data or args.lr or args.sr):
        raise ValueError("--data is missing: the folder of HR pictures to measure on (or --lr or --sr without it, or "
                         "training runs to compare)")
    if args.lr and args.recipe:
        raise ValueError("--lr and --recipe exclude each other; give one")
    if args.recipe:
        degrade.shares(args.recipe)
        if not args.data:
            raise ValueError("--recipe makes LR pictures of HR ones; give them with --data")
    if args.whole and (args.tile_size is not None or "seam" in (args.metrics or "")):
        raise ValueError("--whole excludes --tile-size and the metric seam; give one")
    if args.border is not None and args.border < 0:
        raise ValueError(f"--border {args.border} does not work; use 0 or more")
    for flag, value in ("--limit", args.limit), ("--scale", args.scale):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value} does not work; use 1 or more")
    if args.csv and args.json and os.path.realpath(args.csv) == os.path.realpath(args.json):
        raise ValueError(f"--csv and --json are both {args.csv}; give them names of their own")
    for path in filter(None, (args.csv, args.json)):
        writable(path, args.overwrite)


def scale_of(networks, given):
    """The one scale of all, or --scale, or 2. Raises ValueError where they differ."""
    scales = {label: network.scale for label, network in networks.items()} | ({"--scale": given} if given else {})
    if len(set(scales.values())) > 1:
        raise ValueError(f"these models have different scales ({', '.join(f'{k} {v}x' for k, v in scales.items())}); "
                         "evaluate them apart")
    return next(iter(scales.values()), 2)


def show_progress(count, total, begun, shown):
    """A line on stderr, at most every half minute where that is no terminal -> when the last one was shown."""
    now = time.time()
    left = int((now - begun) / count * (total - count))
    line = f"{count}/{total} pictures  {(now - begun) / count:.1f} s each  {left // 60}:{left % 60:02d} left"
    if sys.stderr.isatty():
        print(f"\r{line}", end="", file=sys.stderr, flush=True)
    elif now - shown > 30:
        print(line, file=sys.stderr, flush=True)
    else:
        return shown
    return now


def run(args, networks=None, watch=None):
    """Measures what the parsed arguments say and prints it. networks {label: network} are taken instead of
    args.weights; watch(hr, {label: sr}) sees every picture. Raises ValueError for what one line can say."""
    tile.keep_freed_memory()
    check(args)
    device, amp = tile.device_of(args)
    tiled = tile.Tiler((384 if device.type == "cpu" else 512) if args.tile_size is None else args.tile_size,
                       args.tile_pad)
    theirs = results_of(args.sr)
    jobs, notes = paired({kind: place for kind, place in {"HR": args.data, "LR": args.lr, **theirs}.items() if place})
    sharper = None
    if networks is None and (args.weights or theirs):
        files = args.weights or []
        networks = dict(zip(labels(files, (*RESERVED, *theirs)), [load_any(f, device) for f in files]))
    elif networks is None:      # what tile.py would take
        file = find_weights()
        sharp = find_sharp(file)
        label, = [f"{file.stem} or {sharp.stem}"] if sharp else labels([file])
        networks = {label: load_any(file, device)}
        sharper = sharp and load_any(sharp, device)
    scale = scale_of(networks, args.scale)
    border = scale if args.border is None else args.border
    recipe = args.recipe or ("bicubic" if networks and args.data and not args.lr else None)
    if networks and not recipe and not args.lr:
        raise ValueError("models need LR pictures; give --lr, or --data to make them of")
    names = chosen(args.metrics, args.data, recipe or args.lr, networks)
    detector = None
    if "artifact" in names or args.report:
        try:
            detector = losses.load_detector(args.detector, device)
        except losses.LossError as e:
            if args.detector:
                raise
            if "artifact" in names:
                leave_out(names, "artifact", e)
    for name in [n for n in names if n in ("niqe", *metrics.PYIQA)]:
        try:
            metrics.load_niqe() if name == "niqe" else metrics.pyiqa_for(name)
        except ValueError as e:
            leave_out(names, name, e)
    where = f"recipe {recipe}, {scale}x" if recipe else f"LR from {args.lr}, {scale}x" if args.lr else "no LR"
    where = images.printable(where) + ("" if args.data else ", no HR")
    page = args.report and Report(
        args.report, where, [Column(n, *COLUMNS[n][:3], middle(n)) for n in names],
        "; ".join([f"border {border}", *notes]), overwrite=args.overwrite)

    def upscale(network, lr, whole=None):
        if whole is None:
            whole = args.whole or "seam" not in names and args.tile_size is None and lr[0].numel() <= WHOLE_LIMIT
        tiler = tile.Tiler(max(lr.shape[-2:]), 0, align=1) if whole else tiled
        if sharper and undamaged(network, sharper, lr):
            network = sharper
        return tile.upscale(network, lr, scale, tiler, device, amp)

    def methods(lr, given):
        """method -> its SR picture, or a function that makes it"""
        if lr is not None:
            size = lr.shape[-2] * scale, lr.shape[-1] * scale
            yield "bicubic", lambda: degrade.resize(lr, size).clamp(0, 1)
            yield "lanczos", lambda: degrade.resize(lr, size, "lanczos").clamp(0, 1)
        yield from given.items()
        for label, network in networks.items():
            yield label, partial(upscale, network, lr)

    def seam(network, sr, lr):
        lines = tiled.seams(*lr.shape[-2:], scale)
        return metrics.seam(sr, upscale(network, lr, True), lines) if any(lines) else math.nan

    def figures(method, sr, hr, lr, seconds, patches):
        row = dict(width=sr.shape[-1], height=sr.shape[-2])
        for name in names:
            if name == "artifact":
                row[name] = patches[:, losses.CLASSES.index("clean")].mean().item()
            elif name == "seam":
                row[name] = seam(networks[method], sr, lr) if method in networks else math.nan
            elif name == "seconds":
                row[name] = seconds / (sr[0].numel() / 1e6)
            else:
                row[name] = COLUMNS[name].run(sr, hr, lr, scale, border)
        return row

    skipped, results, done = [], [], 0
    width, begun = max(map(len, [*networks, *theirs, "bicubic"])) + 2, time.time()
    shown, broken = begun, None
    try:
        for name, lr, hr, given in pictures(jobs, scale, recipe, args.seed, args.limit, args.crop, skipped):
            rows, made, heat, method = {}, {}, {}, "LR"
            try:
                for method, sr in methods(lr, given):
                    started, timed = time.perf_counter(), callable(sr)
                    sr = sr() if timed else sr
                    seconds = time.perf_counter() - started if timed else math.nan
                    patches, _, dirt = losses.inspect(detector, sr) if detector else (None, None, None)
                    rows[method] = figures(method, sr, hr, lr, seconds, patches)
                    if page or watch:
                        made[method] = sr
                        heat[method] = {"artifacts": dirt.numpy()} if detector else {}
            except FloatingPointError as e:
                broken = f"{method} on {images.printable(name)}: {e}; its weights are broken, leave it out"
                break
            except ValueError as e:         # too small for the window of SSIM
                report_skipped(name, e, skipped)
                continue
            except (RuntimeError, MemoryError) as e:
                if not tile.out_of_memory(e):
                    raise
                way = "give --tile-size 64 or another --device" if method in networks else "leave it out, or try with --limit"
                broken = f"out of memory at {images.printable(method)} on {images.printable(name)}; {way}"
                break
            if watch:
                watch(hr, made)
            if page:
                reference = None if hr is None else "HR"
                pictures_shown = made if hr is None else made | {reference: hr}
                page.add(name, {m: images.quantize(x, 8) for m, x in pictures_shown.items()}, rows, reference, heat)
            results += [(name, method, row) for method, row in rows.items()]
            done += 1
            images.ProgressLine.clear()
            if args.each:
                print(images.printable(name), *(make_row(m, row, width, names) for m, row in rows.items()), sep="\n",
                      flush=True)
            to_do = len(jobs) - len(skipped)
            shown = show_progress(done, min(to_do, args.limit or to_do), begun, shown)
    finally:
        if page and done:
            page.finish()
    images.ProgressLine.clear()
    if not done:
        raise ValueError(broken or f"none of the pictures in {args.data or args.lr or ', '.join(args.sr)} could be used; "
                         "the reasons stand above")

    print(f"{done} pictures{f' ({len(skipped)} skipped)' if skipped else ''}, {where}, border {border}", *notes,
          sep="\n")
    means = mean_rows(results, names)
    best = best_of(means, names) if sys.stdout.isatty() else {}
    print(" " * width + "".join(f"{COLUMNS[n].head:>{max(10, len(COLUMNS[n].head) + 2)}}" for n in names))
    for method, row in means.items():
        print(make_row(method, row, width, names, [n for n in best if cell(row[n], COLUMNS[n].digits) == best[n]]))
    if args.csv:
        write_csv(args.csv, results, names)
    if args.json:
        write_json(args.json, results, means, dict(measured=where, scale=scale, border=border, pictures=done,
                                                   skipped=skipped, notes=notes))
    if page:
        print(f"page: {args.report / 'index.html'}")
    if broken:
        raise ValueError(f"{broken}; above is what was measured before")


if __name__ == "__main__":
    main()
