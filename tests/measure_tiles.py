"""Measure what tiling costs: quality against the whole picture, memory and time of large pictures.

    python tests/measure_tiles.py quality --data LR_FOLDER            # PSNR tiled against whole, seams, cost
    python tests/measure_tiles.py quality --data LR_FOLDER --tiles 128 --pads 8 16 32 --limit 4
    python tests/measure_tiles.py refiner --data LR_FOLDER --hr HR_FOLDER --weights stage1 stage2 stage3 --pads 0 8 32
    python tests/measure_tiles.py big                                 # 12,000 x 8,000, peak memory; hours, 20 minutes with tiny weights
    python tests/measure_tiles.py big --limit-gib 4                   # the same with no more memory than that
    python tests/measure_tiles.py picture                             # 1920x1080 by two: seconds, memory, overhead
    python tests/measure_tiles.py fit --data FOLDER --out FOLDER      # every picture to 3840x2160

Prints Markdown. Default of --weights: that of tile.py.
"""
import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import choose                                                           # noqa: E402
import fast                                                             # noqa: E402
import images                                                           # noqa: E402
import metrics                                                          # noqa: E402
import model                                                            # noqa: E402
import pairs                                                            # noqa: E402
import tile                                                             # noqa: E402


def psnr(a, b):
    return -10 * (a.clamp(0, 1) - b.clamp(0, 1)).double().square().mean().log10().item()


def seam(sr, whole, borders):
    """Seams of tiles: mean jump of the gradient at tile borders over the mean elsewhere.

    The ratio is divided by the ratio of `whole`, the picture made without tiles: 1 without seams, nan without
    borders. Both pictures are (3, H, W) and not rounded. borders: (rows, columns), two lists of the first
    pixels behind a border.
    """
    ratios = []
    for x in (sr, whole):
        on_border, elsewhere = [], []
        x = x.detach().float().mean(0)
        for lines, positions in zip((x, x.t()), borders):
            slope = lines.diff(dim=0)
            jump = (slope[1:-1] - (slope[:-2] + slope[2:]) / 2).abs().double().mean(1)
            mask = torch.zeros(len(jump), dtype=torch.bool, device=jump.device)
            mask[[i - 2 for i in positions if 0 <= i - 2 < len(jump)]] = True
            on_border.append(jump[mask])
            elsewhere.append(jump[~mask])
        ratios.append((torch.cat(on_border).mean() / (torch.cat(elsewhere).mean() + 1e-12)).item())
    if ratios[1] == 0:
        return 1.0 if ratios[0] == 0 else math.nan
    return ratios[0] / ratios[1]


def seam_positions(tiler, height, width, scale):
    """Output (rows, columns) where a seam could be visible: begin, middle, and end of each crossfade."""
    fade = tiler.tile_pad * scale
    return [[span.start + offset for span in tiler.spans(side, scale)[1][1:] for offset in (0, fade // 2, fade)]
            for side in (height, width)]


def quality(args, network):
    from bench import hard_tiles
    scale, window = network.scale, network.hat_model.window
    amp = {"bf16": torch.bfloat16, "off": None}[args.amp]
    pictures = [images.composite(images.read_picture(p), 1.0) for p in images.find_pictures(args.data)[:args.limit]]
    pictures = [x[:, :args.side, :args.side].contiguous() if args.side else x for x in pictures]
    wholes, seconds = [], 0
    for x in pictures:
        start = time.time()
        wholes.append(tile.upscale(network, x, scale, tile.Tiler(max(x.shape), 0, align=1), args.device, amp))
        seconds += time.time() - start
    print(f"{len(pictures)} pictures, {args.amp}, whole: {seconds:.1f} s\n")
    print("| tile | pad | how | PSNR to whole, mean | lowest | seam / whole's, mean | worst | seconds / whole |\n|"
          + "---|" * 8)
    for size in args.tiles:
        ways = [(pad, "feathered") for pad in args.pads]
        for pad, how in ways if args.no_hard else [(32, "hard"), *ways]:
            figures, seams, start = [], [], time.time()
            for x, whole in zip(pictures, wholes):
                if how == "hard":
                    with torch.inference_mode():
                        sr = hard_tiles(network, x[None].to(args.device), size, pad)[0].float().clamp(0, 1).cpu()
                    lines = [[i * scale for i in range(size, side, size)] for side in x.shape[1:]]
                else:
                    tiler = tile.Tiler(size, pad, window)
                    sr = tile.upscale(network, x, scale, tiler, args.device, amp)
                    lines = seam_positions(tiler, *x.shape[1:], scale)
                figures.append(psnr(sr, whole))
                if any(lines):
                    seams.append(seam(sr, whole, lines))
            worst = max(seams, key=lambda s: abs(s - 1), default=float("nan"))
            print(f"| {size} | {pad} | {how} | {sum(figures) / len(figures):.2f} | {min(figures):.2f} | "
                  f"{sum(seams) / max(len(seams), 1):.4f} | {worst:.4f} | {(time.time() - start) / seconds:.2f} |",
                  flush=True)


def border_error(sr, whole, lines, reach=2):
    """Mean of |sr - whole| within `reach` pixels of the lines (rows, columns) over its mean everywhere else."""
    error, near = (sr - whole).abs().double().mean(0), torch.zeros(sr.shape[1:], dtype=torch.bool)
    for at in lines[0]:
        near[max(at - reach, 0):at + reach] = True
    for at in lines[1]:
        near[:, max(at - reach, 0):at + reach] = True
    return (error[near].mean() / error[~near].mean()).item()


def refiner(args, networks):
    """Compare models in tiles with themselves without tiles and with HR: the gain of stages 2 and 3."""
    jobs, _ = pairs.match_pairs({"HR": args.hr, "LR": args.data})
    print("| model | pad | PSNR-Y | PSNR-Y untiled | tiled against untiled, dB | error at borders / inside | seam / untiled's |\n|"
          + "---|" * 7)
    for path, network in networks.items():
        scale, window, rows = network.scale, network.hat_model.window, {pad: [] for pad in args.pads}
        for _, lr, hr, _ in pairs.read_pairs(jobs, scale, limit=args.limit):
            lr = lr[:, :args.side, :args.side].contiguous()
            hr = hr[:, :lr.shape[1] * scale, :lr.shape[2] * scale]
            whole = tile.upscale(network, lr, scale, tile.Tiler(max(lr.shape), 0, align=1), args.device)
            for pad in args.pads:
                tiler = tile.Tiler(args.tiles[0], pad, window)
                sr, lines = tile.upscale(network, lr, scale, tiler, args.device), seam_positions(tiler, *lr.shape[1:], scale)
                rows[pad].append([metrics.psnr(sr, hr, 4), metrics.psnr(whole, hr, 4), psnr(sr, whole),
                                  border_error(sr, whole, lines), seam(sr, whole, lines)])
        for pad, figures in rows.items():
            means = torch.tensor(figures).mean(0).tolist()
            print(f"| {path} | {pad} | " + " | ".join(f"{v:.{d}f}" for v, d in zip(means, (3, 3, 1, 2, 4))) + " |", flush=True)


def gradients_and_lines(height, width):
    """Strips (3, 256, width) of a picture with soft gradients and thin slanted lines."""
    x = torch.arange(width) / width
    for top in range(0, height, 256):
        y = torch.arange(top, min(top + 256, height))[:, None] / height
        strip = torch.stack([(x + 0 * y) * 0.8 + 0.1, 0.2 + 0.6 * y + 0 * x, 0.5 + 0.4 * torch.sin(9 * x + 7 * y)])
        yield strip * (1 - 0.9 * ((40 * x + 25 * y) % 1 < 0.08)) * (1 - 0.9 * ((61 * x - 33 * y) % 1 < 0.03))


def command(args, *more, limit=None):
    """Runs tile.py -> (seconds, peak MiB, its output)."""
    def bound():    # of data, not of the address space: torch maps 3 GiB of GPU libraries and never uses them
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    call = [sys.executable, ROOT / "tile.py", *more, "--device", args.device, "--overwrite"]
    call += ["--weights", args.weights] if args.weights else []
    code = ("import resource, subprocess, sys; r = subprocess.run(sys.argv[1:]).returncode; "
            "print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(r)")
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code, *map(str, call)], capture_output=True, text=True,
                          preexec_fn=bound)
    output, _, peak = done.stdout.rpartition("PEAK")
    if done.returncode:
        sys.exit(f"tile.py ended with {done.returncode}: {output}{done.stderr}")
    return time.time() - start, int(peak) / 1024, output + done.stderr


def big(args, network):
    width, height = args.size
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        folder = Path(folder)
        small, large = folder / "small.png", folder / "large.png"
        images.save_strips(small, gradients_and_lines(64, 64), (64, 64), images.Picture(torch.zeros(0)))
        images.save_strips(large, gradients_and_lines(height, width), (height, width), images.Picture(torch.zeros(0)))
        limit = int(args.limit_gib * 2**30) if args.limit_gib else None
        own = command(args, small, "-o", folder / "out.png", "--tile-size", 16)[1]
        seconds, peak, output = command(args, large, "-o", folder / "out.png", "--tile-size", args.tile_size,
                                        limit=limit)
        print(output)
        print("\n| in | limit | s | peak MiB | of that above a 64x64 picture | file MB |\n|" + "---|" * 6)
        print(f"| {width}x{height} | {args.limit_gib or '-'} GiB | {seconds:.0f} | {peak:.0f} | {peak - own:.0f} | "
              f"{(folder / 'out.png').stat().st_size / 1e6:.0f} |")


def picture(args, network):
    """Compare the seconds for 1920x1080 with those of the model alone on the same tiles."""
    device, amp = torch.device(args.device), {"bf16": torch.bfloat16, "off": None}[args.amp]
    window, x = network.hat_model.window, torch.cat(list(gradients_and_lines(1080, 1920)), 1)
    tiler = tile.Tiler(tile.TILE_SIZE, args.pads[0], window)
    (h, rows), (w, columns) = tiler.spans(1080, 1), tiler.spans(1920, 1)
    start = time.time()
    tile.upscale(network, x, network.scale, tiler, device, amp)
    tiled = time.time() - start
    part = torch.rand(1, 3, h, w, device=device)
    with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
        start = time.time()
        for _ in range(len(rows) * len(columns)):
            network(part).float().cpu()
        alone = time.time() - start
    print(f"1920x1080 by {network.scale}, {args.amp}, {len(rows)}x{len(columns)} tiles of {w}x{h} "
          f"({len(rows) * len(columns) * h * w / 1920 / 1080:.2f} times the area): {tiled:.1f} s, the tiles alone "
          f"{alone:.1f} s, so tiling adds {tiled / alone - 1:.1%}; peak "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def fit(args, network):
    out = Path(args.out or "fitted")
    print(command(args, args.data, "-o", out, "--fit", "3840x2160", "--format", "jpg")[2])
    for path in images.find_pictures(out):
        assert images.read_picture(path).rgb.shape == (3, 2160, 3840), path
    print("all 3840x2160")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=["quality", "refiner", "big", "picture", "fit"])
    p.add_argument("--data", help="pictures to enlarge as they are")
    p.add_argument("--out", help="folder for results (default: a temporary one; fit: fitted)")
    p.add_argument("--hr", help="refiner: the true pictures")
    p.add_argument("--weights", nargs="+", help="one file; refiner: one for each stage")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--amp", default="off", choices=["off", "bf16"], help="quality, picture (default: off)")
    p.add_argument("--limit", type=int, help="quality, refiner: so many pictures")
    p.add_argument("--side", type=int, help="quality, refiner: only the first SIDE x SIDE pixels of each")
    p.add_argument("--tiles", type=int, nargs="+", default=[64, 128, 256])
    p.add_argument("--pads", type=int, nargs="+", default=[16])
    p.add_argument("--no-hard", action="store_true", help="quality: leave hard crops out")
    p.add_argument("--size", type=lambda s: tuple(map(int, s.split("x"))), default=(12000, 8000),
                   help="big (default: 12000x8000)")
    p.add_argument("--tile-size", type=int, default=tile.TILE_SIZE, help="big: that of tile.py")
    p.add_argument("--limit-gib", type=float, help="big: memory limit (ulimit -d)")
    args = p.parse_args()
    fast.keep_freed_memory()
    paths = args.weights or [choose.SHIPPED[0]]
    networks = {Path(path).parent.name + "/" + Path(path).stem: model.load(path, args.device) for path in paths}
    if args.part == "refiner":
        return refiner(args, networks)
    network, args.weights = next(iter(networks.values())), paths[0]
    {"quality": quality, "big": big, "picture": picture, "fit": fit}[args.part](args, network)


if __name__ == "__main__":
    main()
