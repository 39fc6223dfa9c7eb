"""evaluate.py: how good is a model, in figures.

    python evaluate.py --data HR_FOLDER --recipe bicubic --weights runs/mine/best.safetensors
    python evaluate.py --data HR_FOLDER --lr LR_FOLDER --weights a.safetensors b.safetensors --csv table.csv
    python evaluate.py runs/a runs/b                                       # training runs side by side

A table with bicubic and Lanczos beside the models: PSNR and SSIM, on luma (Y) and on RGB, and seconds per megapixel
produced. Conventions: rounded to 8 bits, --border pixels cut off each side (default: the scale), BT.601 Y in 16-235,
SSIM over an 11x11 Gaussian window of sigma 1.5, valid positions only. Needs torch, numpy, Pillow and our model.py,
tile.py, degrade.py.
"""
import argparse
import csv
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import degrade
import tile
from model import find_weights, load

WHOLE_LIMIT = 2 ** 20       # LR pixels: above this a picture is taken tile by tile unless --whole
COLUMNS = dict(psnr_y="PSNR-Y", ssim_y="SSIM-Y", psnr_rgb="PSNR-RGB", ssim_rgb="SSIM-RGB", seconds_per_mp="s/MP")

# ---------------------------------------------------------------------------------------------------------------------
# Metrics: pictures (3, H, W) or (B, 3, H, W) in [0, 1]; a float, the mean over the batch. All raise ValueError.
# ---------------------------------------------------------------------------------------------------------------------


def luma(x):
    """(..., 3, H, W) RGB in [0, 1] -> (..., 1, H, W), Y of BT.601 in its studio range, 16/255 to 235/255."""
    r, g, b = x.unbind(-3)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255).unsqueeze(-3)


def _prepare(sr, hr, border, y):
    """What every metric compares: (B, 1 or 3, h, w) on 8-bit levels, without the border."""
    if sr.shape != hr.shape or sr.ndim not in (3, 4) or sr.shape[-3] != 3:
        raise ValueError(f"pictures of equal shape (3, H, W) are needed, not {tuple(sr.shape)} and {tuple(hr.shape)}")
    h, w = sr.shape[-2:]
    if min(h, w) <= 2 * border:
        raise ValueError(f"{w}x{h} leaves nothing inside a border of {border}")
    pair = []
    for x in (sr, hr):
        x = degrade.to_8_bit(x.detach().float())[..., border:h - border, border:w - border]
        pair.append((luma(x) if y else x).reshape(-1, 1 if y else 3, h - 2 * border, w - 2 * border))
    return pair


def psnr(sr, hr, border=0, luma=True):
    """Peak signal to noise ratio in dB, of Y or of RGB; inf where the pictures are equal."""
    sr, hr = _prepare(sr, hr, border, luma)
    mse = (sr - hr).double().square().mean((1, 2, 3))
    return (-10 * mse.log10()).mean().item()


def _window_mean(x):
    """(..., H, W) -> (..., H-10, W-10): mean under the 11x11 Gaussian window of sigma 1.5."""
    g = [math.exp(-0.5 * ((i - 5) / 1.5) ** 2) for i in range(11)]
    g = [v / sum(g) for v in g]
    x = sum(v * x[..., i:x.shape[-2] - 10 + i, :] for i, v in enumerate(g))
    return sum(v * x[..., i:x.shape[-1] - 10 + i] for i, v in enumerate(g))


def ssim(sr, hr, border=0, luma=True):
    """Structural similarity (Wang et al. 2004) of Y, or its mean over R, G and B."""
    a, b = _prepare(sr, hr, border, luma)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs 11 pixels a side inside the border, not {a.shape[-1]}x{a.shape[-2]}")
    a, b = a - 0.5, b - 0.5         # variances do not mind, and float32 keeps three digits more of them
    ma, mb = _window_mean(a), _window_mean(b)
    va, vb, vab = _window_mean(a * a) - ma * ma, _window_mean(b * b) - mb * mb, _window_mean(a * b) - ma * mb
    ma, mb = ma + 0.5, mb + 0.5
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    index = (2 * ma * mb + c1) * (2 * vab + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return index.double().mean().item()


def score(sr, hr, border):
    """The four figures of one picture, or their means over a batch."""
    return dict(psnr_y=psnr(sr, hr, border), ssim_y=ssim(sr, hr, border),
                psnr_rgb=psnr(sr, hr, border, luma=False), ssim_rgb=ssim(sr, hr, border, luma=False))


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of pictures
# ---------------------------------------------------------------------------------------------------------------------


def listed(paths):
    """Files and folders -> [(name, path)]; a name is relative to the folder it was found in, or the file's own."""
    found = []
    for place in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        for path in tile.find_pictures([place]):
            found.append((path.relative_to(place).as_posix() if place.is_dir() else path.name, path))
    return found


def _read_pairs(jobs, scale, lr_of, limit, skipped):
    """[(name, HR path)] -> (name, lr, hr) one by one; lr_of(name, hr) makes or reads the LR picture."""
    count = 0
    for name, path in jobs:
        if count == limit:
            return
        try:
            hr = tile.composite(tile.read_picture(path), 1.0)
            h, w = hr.shape[-2] // scale * scale, hr.shape[-1] // scale * scale
            if min(h, w) == 0:
                raise ValueError(f"{hr.shape[-1]}x{hr.shape[-2]} is smaller than the scale {scale}")
            hr = hr[:, :h, :w].contiguous()
            lr = lr_of(name, hr)
        except (ValueError, OSError) as e:
            report_skipped(name, e, skipped)
            continue
        count += 1
        yield name, lr, hr


def report_skipped(name, error, skipped):
    """One line on stderr that names the picture, kept in the list `skipped` too unless that is None."""
    line = str(error) if isinstance(error, tile.PictureError) else f"{tile.printable(name)}: {error}"
    tile.Progress.clear()
    print(f"skipped: {line}", file=sys.stderr)
    if skipped is not None:
        skipped.append(line)


def pairs(hr_paths, recipe, scale, seed=0, limit=None, skipped=None):
    """HR files or folders -> iterator of (name, lr (3, h, w), hr (3, h*scale, w*scale)), float32 in [0, 1].

    Transparent parts become white; HR sides are cropped to multiples of scale; the LR picture is what degrade.py's
    command makes of the same folder, recipe, scale and seed. A bad picture is named on stderr, added to the list
    `skipped` if given, and left out; limit counts the good ones. Raises ValueError before the first picture.
    """
    degrade.shares(recipe)

    def lr_of(name, hr):
        return degrade.degrade(hr[None], recipe, scale, [degrade.picture_seed(name, seed)])[0]
    return _read_pairs(listed(hr_paths), scale, lr_of, limit, skipped)


def pairs_from(hr_folder, lr_folder, scale, limit=None, skipped=None):
    """As pairs, with LR pictures from a folder: the same relative names, whatever their suffixes. Raises ValueError
    that lists the odd ones where the folders do not pair; a pair whose sizes do not fit is a bad picture."""
    sides = []
    for folder in (hr_folder, lr_folder):
        stems = {}
        for name, path in listed(folder):
            stem = os.path.splitext(name)[0]
            if stem in stems:
                raise ValueError(f"{tile.printable(stems[stem][1])} and {tile.printable(path)} differ only in their "
                                 "suffix, so they cannot be paired; move one away")
            stems[stem] = name, path
        sides.append(stems)
    odd = [f"{len(lone)} only in {folder} ({', '.join(tile.printable(s) for s in sorted(lone)[:5])}"
           f"{', ...' if len(lone) > 5 else ''})"
           for folder, lone in zip((hr_folder, lr_folder), (sides[0].keys() - sides[1], sides[1].keys() - sides[0]))
           if lone]
    if odd:
        raise ValueError(f"the folders do not pair: {'; '.join(odd)}; every HR picture needs an LR picture of its name")
    lr_paths = {name: sides[1][stem][1] for stem, (name, _) in sides[0].items()}

    def lr_of(name, hr):
        lr = tile.composite(tile.read_picture(lr_paths[name]), 1.0)
        want = hr.shape[-2] // scale, hr.shape[-1] // scale
        if tuple(lr.shape[-2:]) != want:
            raise ValueError(f"its LR picture is {lr.shape[-1]}x{lr.shape[-2]}, but {want[1]}x{want[0]} "
                             f"belongs to it at {scale}x")
        return lr
    return _read_pairs(list(sides[0].values()), scale, lr_of, limit, skipped)


# ---------------------------------------------------------------------------------------------------------------------
# Training runs side by side
# ---------------------------------------------------------------------------------------------------------------------


def read_run(folder):
    """The rows of a run folder's log.csv, as {column: float}; columns without a value are left out. Raises ValueError."""
    try:
        with open(Path(folder) / "log.csv", newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except (OSError, ValueError, UnicodeDecodeError) as e:
        raise ValueError(f"{folder} is no run with a log.csv that can be read ({e})") from None
    if not rows or not all({"step", "psnr_y", "seconds"} <= row.keys() for row in rows):
        raise ValueError(f"{folder}/log.csv holds no report yet")
    return rows


def draw_curves(runs):
    """{name: rows of a log} -> a Pillow picture: validation PSNR-Y and every loss term over the steps, a panel each, a
    line per run."""
    w, h, left, top = 720, 220, 70, 24
    colours = [(200, 40, 90), (30, 90, 200), (20, 140, 70), (200, 120, 0), (120, 60, 180), (0, 140, 160)]
    runs = {name: [{k: float(v) for k, v in row.items() if v != ""} for row in rows] for name, rows in runs.items()}
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
        hi = hi if hi > lo else lo + 1e-9

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
                draw.text((left + 190 + 130 * (j % 3), i * h + 4 + 11 * (j // 3)), printable_ascii(run), fill=colour)
    return picture


def printable_ascii(text):
    """Pillow's built-in letters are Latin only."""
    return text.encode("latin-1", "replace").decode("latin-1")[-20:]


def compare(folders, out, overwrite=False):
    """Prints a table of training runs and writes their curves into the PNG `out`. Raises ValueError."""
    runs = dict(zip((Path(f).resolve().name for f in folders), map(read_run, folders)))
    if len(runs) < len(folders):
        runs = dict(zip(map(str, folders), map(read_run, folders)))
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; choose another name with --curves, or give --overwrite")
    settings = []
    for folder in folders:
        try:
            settings.append(json.loads((Path(folder) / "args.json").read_text()))
        except (OSError, ValueError):
            settings.append({})
    width = max(map(len, runs)) + 2
    print(" " * width + f"{'steps':>8}{'seconds':>9}{'PSNR-Y':>9}{'SSIM-Y':>9}{'best':>9}{'at step':>9}  differs in")
    keys = sorted({k for s in settings for k in s} - {"out", "overwrite", "every", "workers"})
    for (name, rows), own in zip(runs.items(), settings):
        best, last = max(rows, key=lambda row: row["psnr_y"]), rows[-1]
        differs = [f"{k}={own.get(k)}" for k in keys if any(s.get(k) != own.get(k) for s in settings)]
        print(f"{tile.printable(name):<{width}}{last['step']:>8.0f}{last['seconds']:>9.0f}{last['psnr_y']:>9.2f}"
              f"{last.get('ssim_y', math.nan):>9.4f}{best['psnr_y']:>9.2f}{best['step']:>9.0f}  {' '.join(differs)}")
    with tile.replacing(out) as part:
        draw_curves(runs).save(part, "PNG")
    print(f"curves: {out}")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def labels(paths):
    """Weights files -> short names for the table: of the file, or of the run where the file is a run's best."""
    names = [p.parent.name if p.stem == "best" else f"{p.parent.name}/last" if p.stem == "last" else p.stem
             for p in map(Path, paths)]
    return [name if names.count(name) == 1 and name not in ("bicubic", "lanczos", "") else str(path)
            for name, path in zip(names, paths)]


def make_row(label, row, width, best=()):
    """One line of the table; the columns named in best in bold."""
    cells = []
    for key in COLUMNS:
        cell = f"{row[key]:10.{2 if 'psnr' in key else 3 if key == 'seconds_per_mp' else 4}f}"
        cells.append(f"\033[1m{cell}\033[0m" if key in best else cell)
    return f"{label:<{width}}" + "".join(cells)


def mean_rows(results):
    """[(picture, method, row)] -> {method: row of means}; the time is the median, which a slow start does not move."""
    rows = {}
    for method in dict.fromkeys(m for _, m, _ in results):
        mine = [row for _, m, row in results if m == method]
        rows[method] = {key: (statistics.median if key == "seconds_per_mp" else statistics.fmean)(r[key] for r in mine)
                        for key in COLUMNS}
    return rows


def write_csv(path, results):
    """A row per picture and method; whole or not at all. Raises OSError."""
    with tile.replacing(path) as part, open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "method", "width", "height", *COLUMNS])
        for picture, method, row in results:
            writer.writerow([picture, method, row["width"], row["height"], *(f"{row[key]:.6f}" for key in COLUMNS)])


def main():
    p = argparse.ArgumentParser(
        description="PSNR and SSIM of models beside bicubic and Lanczos, over a folder of pictures.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python evaluate.py --data wallpapers/ --recipe web --weights runs/mine/best.safetensors\n"
               "  python evaluate.py --data hr/ --lr lr/ --weights a.safetensors b.safetensors --each --csv table.csv\n"
               "  python evaluate.py runs/a runs/b")
    p.add_argument("runs", nargs="*", type=Path, help="training runs to lay side by side, instead of everything below")
    p.add_argument("--curves", type=Path, default=Path("curves.png"), help="where their curves go (default: curves.png)")
    p.add_argument("--data", type=Path, help="folder of HR pictures, or one picture")
    p.add_argument("--recipe", help=f"make the LR pictures: {', '.join(degrade.RECIPES)}, mixes (default: bicubic)")
    p.add_argument("--lr", type=Path, help="take the LR pictures from this folder instead, by name")
    p.add_argument("--weights", nargs="+", metavar="FILE",
                   help="model files (default: one of weights/, else the newest runs/*/best.safetensors)")
    p.add_argument("--whole", action="store_true", help="never in tiles (default: in tiles above 1 megapixel of LR)")
    p.add_argument("--tile-size", type=int, help="in tiles always; input pixels from tile to tile (512; CPU 384)")
    p.add_argument("--tile-pad", type=int, default=32, help="pixels more that a tile sees on each side (default: 32)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    p.add_argument("--amp", choices=["bf16", "fp16", "off"], help="precision (default: bf16 where native, else off)")
    p.add_argument("--border", type=int, help="pixels cut off each side before measuring (default: the scale)")
    p.add_argument("--limit", type=int, help="stop after this many pictures")
    p.add_argument("--seed", type=int, default=0, help="of the recipe's draws (default: 0)")
    p.add_argument("--each", action="store_true", help="a block per picture too")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write every figure of every picture and method there")
    p.add_argument("--overwrite", action="store_true", help="replace the --csv file if it exists")
    try:
        run(p.parse_args())
    except ValueError as e:     # a user's mistake: PictureError and WeightsError are two of them
        tile.fail(tile.printable(e))
    except KeyboardInterrupt:
        tile.Progress.clear()
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)


def run(args):
    """The command, its arguments parsed. Raises ValueError for what one line can say."""
    tile.keep_freed_memory()
    if args.runs:
        if args.data:
            raise ValueError("give training runs to compare, or --data to measure models on, not both")
        try:
            return compare(args.runs, args.curves, args.overwrite)
        except OSError as e:
            raise ValueError(f"cannot write {args.curves}: {e.strerror}") from None
    if not args.data:
        raise ValueError("--data is missing: the folder of HR pictures to measure on (or name training runs to compare)")
    if args.lr and args.recipe:
        raise ValueError("--lr and --recipe exclude each other; give one")
    if args.whole and args.tile_size is not None:
        raise ValueError("--whole and --tile-size exclude each other; give one")
    if args.border is not None and args.border < 0:
        raise ValueError(f"--border {args.border} does not work; use 0 or more")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} does not work; use 1 or more")
    if args.csv and args.csv.exists() and not args.overwrite:
        raise ValueError(f"{args.csv} exists already; choose another name or give --overwrite")
    if args.csv and not os.access(args.csv.parent, os.W_OK):
        raise ValueError(f"cannot write to {args.csv.parent}; choose another place for --csv")
    try:
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = torch.device(args.device or best)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {args.device}: {str(e).splitlines()[0]}") from None
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[
        args.amp or ("bf16" if tile.bf16_is_native(device) else "off")]
    tiled = tile.Tiler((384 if device.type == "cpu" else 512) if args.tile_size is None else args.tile_size,
                       args.tile_pad)

    total = len(listed(args.data))
    if not total:
        raise ValueError(f"no picture in {args.data}; give a folder with some")
    total = min(total, args.limit or total)
    files = args.weights or [find_weights()]
    networks = dict(zip(labels(files), [load(f, device) for f in files]))
    scale = next(iter(networks.values())).scale
    if any(network.scale != scale for network in networks.values()):
        raise ValueError("these models have different scales ("
                         + ", ".join(f"{label} {n.scale}x" for label, n in networks.items()) + "); evaluate them apart")
    border, recipe = scale if args.border is None else args.border, args.recipe or "bicubic"
    skipped, results, done = [], [], 0
    source = (pairs_from(args.data, args.lr, scale, args.limit, skipped) if args.lr else
              pairs(args.data, recipe, scale, args.seed, args.limit, skipped))

    def upscalers(lr):
        """method -> a function that makes the SR picture"""
        size = lr.shape[-2] * scale, lr.shape[-1] * scale
        yield "bicubic", lambda: degrade.resize(lr, size).clamp(0, 1)
        yield "lanczos", lambda: degrade.resize(lr, size, "lanczos").clamp(0, 1)
        whole = args.whole or (args.tile_size is None and lr.shape[-2] * lr.shape[-1] <= WHOLE_LIMIT)
        tiler = tile.Tiler(max(lr.shape[-2:]), 0, align=1) if whole else tiled
        for label, network in networks.items():
            yield label, lambda network=network: tile.upscale(network, lr, scale, tiler, device, amp)

    width, start, shown = max(map(len, [*networks, "bicubic"])) + 2, time.time(), time.time()
    for name, lr, hr in source:
        rows = {}
        try:
            for method, upscaler in upscalers(lr):
                begun = time.perf_counter()
                sr = upscaler()
                seconds = time.perf_counter() - begun
                rows[method] = dict(score(sr, hr, border), width=hr.shape[-1], height=hr.shape[-2],
                                    seconds_per_mp=seconds / (hr.shape[-2] * hr.shape[-1] / 1e6))
        except FloatingPointError as e:
            raise ValueError(f"{method} on {tile.printable(name)}: {e}; its weights are broken, leave it out") from None
        except ValueError as e:         # too small for the window of SSIM
            report_skipped(name, e, skipped)
            continue
        except RuntimeError as e:
            if "out of memory" not in str(e) and "allocate memory" not in str(e):
                raise
            raise ValueError(f"out of memory on {tile.printable(name)}, {lr.shape[-1]}x{lr.shape[-2]}; give "
                             "--tile-size 64 or another --device") from None
        results += [(name, method, row) for method, row in rows.items()]
        done += 1
        tile.Progress.clear()
        if args.each:
            print(tile.printable(name), *(make_row(m, row, width) for m, row in rows.items()), sep="\n", flush=True)
        now, count = time.time(), done + len(skipped)
        left = int((now - start) / count * (total - count))
        line = f"{count}/{total} pictures  {(now - start) / count:.1f} s each  {left // 60}:{left % 60:02d} left"
        if sys.stderr.isatty():
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        elif now - shown > 30:
            shown = now
            print(line, file=sys.stderr, flush=True)
    tile.Progress.clear()
    if not done:
        raise ValueError(f"none of the pictures in {args.data} could be used; the reasons stand above")

    print(f"{done} pictures{f' ({len(skipped)} skipped)' if skipped else ''}, "
          f"{f'LR from {args.lr}' if args.lr else f'recipe {recipe}'}, {scale}x, border {border}")
    means = mean_rows(results)
    print(" " * width + "".join(f"{head:>10}" for head in COLUMNS.values()))
    for method, row in means.items():
        bold = [k for k in COLUMNS if k != "seconds_per_mp" and row[k] == max(r[k] for r in means.values())]
        print(make_row(method, row, width, bold if sys.stdout.isatty() else ()))
    if args.csv:
        try:
            write_csv(args.csv, results)
        except OSError as e:
            raise ValueError(f"cannot write {args.csv}: {e.strerror}; free some room or choose another place") from None


if __name__ == "__main__":
    main()
