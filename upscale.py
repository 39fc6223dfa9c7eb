"""The command of tile.py: upscale pictures and folders of pictures, with alpha, exact sizes, and metadata.

    python tile.py wallpaper.jpg            # the same as: python upscale.py wallpaper.jpg

Needs images.py, tile.py, model.py, convert.py, and choose.py beside it; fast.py makes it faster.
"""
import argparse
import errno
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F

import choose
import convert
import images
from model import WeightsError
from tile import CPU_TILE_SIZE, Tiler, auto_tile_size, lanczos, out_of_memory, pick_device, upscale_strips

try:
    import fast
except ModuleNotFoundError:     # fast.py is optional
    fast = None


# ------------------------------------------------------------------ alpha, size, and crop

def upscale_picture_strips(forward, picture, scale, tiler, size=None, **options):
    """Upscale an images.Picture -> generator of strips (3 or, with alpha, 4, h, W) of size (H, W).

    Alpha is resized by Lanczos, and so is the output if size is not scale times the picture. See
    tile.upscale_strips().
    """
    height, width = picture.rgb.shape[1:]
    size = size or (height * scale, width * scale)
    rgb = picture.rgb if picture.alpha is None else bleed_colors(picture.rgb, picture.alpha)
    strips = upscale_strips(forward, rgb, scale, tiler, **options)
    if size != (height * scale, width * scale):
        strips = resize_strips(strips, height * scale, size)
    y = 0
    for strip in strips:
        stop = y + strip.shape[1]
        if picture.alpha is not None:
            strip = torch.cat([strip, lanczos(picture.alpha, size, y, stop)])
        yield strip
        y = stop


def resize_strips(strips, height, size):
    """Resize a picture of this height, in strips (C, h, W), to size (H, W) by Lanczos; yield it in strips."""
    x, top, start, step = None, 0, 0, height / size[0]
    reach = 3 * max(step, 1) + 1
    for strip in strips:
        x = strip if x is None else torch.cat([x, strip], 1)
        del strip
        end = top + x.shape[1]
        stop = size[0] if end == height else int((end - reach) / step)
        if stop > start:
            yield lanczos(x, size, start, stop, top, height)
            drop = max(int(stop * step - reach) - top, 0)
            x, top, start = x[:, drop:].clone(), top + drop, stop


def crop_to_aspect(picture, size, where="center"):
    """Crop an images.Picture to the largest part with the aspect ratio of size (H, W).

    where: "center", "top" (if columns are removed: center), or "focus", the part with the most detail.
    """
    height, width = picture.rgb.shape[1:]
    h = min(height, max(round(width * size[0] / size[1]), 1))
    w = min(width, max(round(height * size[1] / size[0]), 1))
    rows_removed, spare = h < height, max(height - h, width - w)        # only one of the axes is cropped
    start = 0 if where == "top" and rows_removed else spare // 2
    if where == "focus" and spare and min(height, width) > 1:
        preview_size = [max(side * 256 // max(height, width), 2) for side in (height, width)]
        x = F.adaptive_avg_pool2d(images.composite(picture, 0.5), preview_size)
        detail = ((x[:, 1:, 1:] - x[:, :-1, 1:]).abs() + (x[:, 1:, 1:] - x[:, 1:, :-1]).abs()).sum(0)
        profile = detail.sum(1 if rows_removed else 0)
        length = max(round(len(profile) * (h / height if rows_removed else w / width)), 1)
        detail_inside = profile.unfold(0, length, 1).sum(1)
        start = round(detail_inside.argmax().item() / max(len(detail_inside) - 1, 1) * spare)
    top, left = (start, 0) if rows_removed else (0, start)
    part = slice(None), slice(top, top + h), slice(left, left + w)
    alpha = None if picture.alpha is None else picture.alpha[part]
    return replace(picture, rgb=picture.rgb[part], alpha=alpha)


def bleed_colors(rgb, alpha):
    """Spread the visible colors of rgb (3, H, W) into pixels whose alpha (1, H, W) is 0 -> (3, H, W).

    Files store any color there, often black, which would leave a fringe at the edges. Downscale by 2 until
    all pixels have a color, then fill the gaps from coarse to fine.
    """
    visible = alpha > 0
    if visible.all() or not visible.any():
        return rgb
    sums, weights = [rgb[None] * alpha], [alpha[None]]
    while not (weights[-1] > 0).all():
        sums.append(F.avg_pool2d(sums[-1], 2, ceil_mode=True))
        weights.append(F.avg_pool2d(weights[-1], 2, ceil_mode=True))
    fill = sums[-1] / weights[-1]
    for total, weight in zip(sums[-2::-1], weights[-2::-1]):
        fill = F.interpolate(fill, scale_factor=2, mode="bilinear")[:, :, :total.shape[2], :total.shape[3]]
        fill = torch.where(weight > 0, total / weight.clamp(min=1e-8), fill)
    return torch.where(visible, rgb, fill[0])


# ------------------------------------------------------------------ flags and files

def width_by_height(text):
    width, height = map(int, text.lower().split("x"))
    return height, width


def parse():
    p = argparse.ArgumentParser(
        description="Upscale pictures. Alpha, gray, 16 bit, and metadata are kept if the format holds them.",
        epilog="Exit code: 0 all done, 1 some pictures failed (they are named), 2 nothing was done.")
    p.add_argument("inputs", nargs="+", metavar="IN", help="pictures, or folders of pictures")
    p.add_argument("-o", "--out", type=Path, help="file, or folder of the results (default: beside IN)")
    p.add_argument("--weights", help="model file (default: weights/web-low, weights/clean-low for undamaged "
                                     "pictures, or the newest runs/*/best.safetensors)")

    g = p.add_argument_group("result")
    size = g.add_mutually_exclusive_group()
    size.add_argument("--fit", type=width_by_height, metavar="WxH", help="exactly this size, by cropping")
    size.add_argument("--scale", type=float, help="scale factor, such as 1.5 (default: that of the model)")
    g.add_argument("--crop", default="center", choices=["center", "top", "focus"],
                   help="part that --fit keeps; focus: the part with the most detail (default: center)")
    g.add_argument("--format", default="png", choices=["png", "webp", "avif", "jpg", "keep"],
                   help="of results in a folder; keep: as the input (default: png)")
    g.add_argument("--quality", type=int, default=95, help="of JPEG, WebP, and AVIF, 1 to 100 (default: 95)")
    g.add_argument("--depth", type=int, choices=[8, 16], help="bits; 16 for PNG only (default: as the input)")
    g.add_argument("--dither", action="store_true", help="no bands in soft gradients at 8 bit; larger files")
    g.add_argument("--overwrite", action="store_true", help="replace results that exist (default: skip them)")

    g = p.add_argument_group("model")
    g.add_argument("--strength", type=float, default=1.0, help="from 0 (Lanczos) to 1 (the model; default)")
    g.add_argument("--low-freq-lock", action="store_true", help="keep the low frequencies: no color shift")
    g.add_argument("--tta", action="store_true", help="average 8 flips and rotations: 8 times slower")
    g.add_argument("--tile-size", type=int, help="input pixels from tile to tile; halved if memory runs out "
                                                 f"(default: by free memory on CUDA, else {CPU_TILE_SIZE})")
    g.add_argument("--tile-pad", type=int, help="input pixels that a tile extends further on each side "
                                                "(default: two windows of the model)")
    g.add_argument("--sync", default="off", choices=["off", "rough", "exact"],
                   help="share the channel attention of the whole picture among tiles (default: off)")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best available)")
    g.add_argument("--amp", choices=["bf16", "fp16", "off"], help="precision (default: bf16 if native)")
    return p.parse_args()


def result_path(source, given, out, suffix, tag):
    """The path of the result for a picture that was found in `given`, a file or a folder. See plan_jobs()."""
    suffix = suffix or (source.suffix if source.suffix.lower() in images.WRITE_FORMATS else ".png")
    if os.path.isdir(given):
        folder = out or Path(f"{os.path.abspath(given)}-{tag}")
        return folder / source.relative_to(given).with_suffix(suffix)
    if out is None:
        return source.with_name(f"{source.stem}-{tag}{suffix}")
    return out / Path(source.name).with_suffix(suffix)


def plan_jobs(inputs, out, suffix, tag):
    """Choose the paths of the results -> ([(source, target)], [a line for each picture that is left out]).

    out: a file, a folder, or None: NAME becomes NAME-tag beside itself. suffix: of the results in a folder,
    or None to keep those of the sources. Raises UserError if there is nothing to do.
    """
    # folder/* names caption files too; a picture takes the result path first.
    inputs = sorted(images.as_paths(inputs), key=lambda path: path.suffix.lower() not in images.READ_SUFFIXES)
    to_file = out and out.suffix and not os.path.isdir(out)
    if to_file and (len(inputs) > 1 or os.path.isdir(inputs[0])):
        if out.suffix.lower() in images.READ_SUFFIXES:
            raise images.UserError(f"{images.printable(out)} is a file name; give a folder for the results")
        to_file = False
    pairs = []
    for given in inputs:
        for source in images.find_pictures(given):
            if out and given in out.parents and out in source.parents:
                continue        # a result of an earlier run
            pairs.append((source, out if to_file else result_path(source, given, out, suffix, tag)))
    results = {target for _, target in pairs}

    jobs, problems = {}, []
    for source, target in pairs:
        if out is None and source in results:
            continue            # a result of an earlier run
        other = jobs.get(target, source)
        if target.exists() and os.path.samefile(source, target):
            problems.append(f"{source}: the result would replace the picture; choose another --out")
        elif other == source:
            jobs[target] = source
        elif source.suffix.lower() in images.READ_SUFFIXES:
            problems.append(f"{source}: the result would replace that of {other}; use --format keep")
    if not jobs:
        no_picture = f"no picture in {', '.join(map(str, inputs))}"
        raise images.UserError(images.printable(problems[0] if problems else no_picture))
    return [(source, target) for target, source in jobs.items()], list(map(images.printable, problems))


# ------------------------------------------------------------------ one picture after another

@dataclass
class Setup:
    """What all pictures have in common. A smaller tiler replaces `tiler` when memory runs out."""
    args: argparse.Namespace
    device: torch.device
    amp: torch.dtype | None
    network: torch.nn.Module
    plain_network: torch.nn.Module | None       # for undamaged pictures
    tiler: Tiler


def set_up(args, rank):
    """Load the models and choose device and tile size -> Setup. Raises UserError."""
    device, amp = pick_device(args.device, args.amp)
    path = Path(args.weights or choose.default_weights())
    plain_path = None if args.weights else choose.companion_weights(path)
    try:
        network = convert.load_any(path, device)
        plain_network = convert.load_any(plain_path, device) if plain_path else None
    except WeightsError as error:
        raise images.UserError(images.printable(error)) from None
    if fast:
        fast.keep_freed_memory()
        fast.prepare(network)
        fast.prepare(plain_network)

    align = network.hat_model.window if hasattr(network, "hat_model") else 16
    tiler = Tiler(args.tile_size or align, 2 * align if args.tile_pad is None else args.tile_pad, align=align)
    if args.tile_size is None:
        tiler.tile_size = auto_tile_size(network, device, amp, tiler)
    if rank == 0:
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[amp]
        plain = f"; undamaged pictures by {plain_path.stem}" if plain_path else ""
        print(f"{images.printable(path)}: {network.scale}x on {device}, {precision}, "
              f"tiles of {tiler.tile_size}{plain}", flush=True)
    return Setup(args, device, amp, network, plain_network, tiler)


class TileProgress:
    """Show the number of tiles, the speed, and the time left for one picture."""
    def __init__(self, label, pixels):
        self.label, self.pixels, self.start, self.line = label, pixels, time.time(), images.ProgressLine()

    def __call__(self, done, total):
        rate = done / (time.time() - self.start)
        left = int((total - done) / rate)
        self.line(f"tile {done}/{total}  {rate * self.pixels / total / 1e6:.3f} Mpixel/s  "
                  f"{left // 60}:{left % 60:02d} left  {self.label}")


def upscale_file(setup, source, target, label):
    """Read, upscale, and save one picture -> (a line about it, pixels of the result)."""
    args, start = setup.args, time.time()
    picture = images.read_picture(source)
    if images.color_space(picture.icc) == b"GRAY" and target.suffix.lower() in (".webp", ".avif"):
        picture = images.read_picture(source, srgb=True)        # these formats hold no gray profile
    picture.depth = args.depth or picture.depth
    height, width = picture.rgb.shape[1:]
    network, notes = setup.network, [picture.note]
    if setup.plain_network and choose.is_undamaged(network, setup.plain_network, picture.rgb):
        network = setup.plain_network
        notes.append("undamaged")

    size = height * network.scale, width * network.scale
    if args.fit:
        size, picture = args.fit, crop_to_aspect(picture, args.fit, args.crop)
    elif args.scale:
        size = max(round(height * args.scale), 1), max(round(width * args.scale), 1)
    strips = upscale_picture_strips(
        network, picture, network.scale, setup.tiler, size, device=setup.device, amp=setup.amp,
        progress=TileProgress(label, size[0] * size[1]) if label else None,
        sync=args.sync, tta=args.tta, strength=args.strength, low_freq_lock=args.low_freq_lock)
    target.parent.mkdir(parents=True, exist_ok=True)
    images.save_strips(target, strips, size, picture, args.quality, args.dither)

    line = f"{images.printable(target)}  {width}x{height} -> {size[1]}x{size[0]}  {time.time() - start:.1f} s"
    notes = "; ".join(filter(None, notes + images.left_behind(picture, target)))
    return line + (f"  ({notes})" if notes else ""), size[0] * size[1]


def upscale_file_in_memory(setup, source, target, label):
    """Call upscale_file(), with smaller and smaller tiles while memory runs out."""
    while True:
        try:
            return upscale_file(setup, source, target, label)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Here the exception is gone, and with it all tensors that its frames refer to.
        smaller = setup.tiler.smaller()
        if smaller is None:
            raise images.PictureError(f"{images.printable(source)}: out of memory")
        setup.tiler = smaller
        images.ProgressLine.clear()
        print(f"out of memory; continuing with tiles of {smaller.tile_size}", file=sys.stderr, flush=True)
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()


def upscale_files(setup, jobs, show_progress):
    """Upscale all jobs; name and skip a picture that fails -> (done, skipped, failed, pixels)."""
    done, skipped, failed, pixels = 0, 0, 0, 0
    for number, (source, target) in enumerate(jobs, 1):
        if not setup.args.overwrite and images.picture_size(target) != (0, 0):
            skipped += 1
            continue
        label = f"{number}/{len(jobs)} {images.printable(source.name)}" if show_progress else None
        problem = None
        try:
            line, made = upscale_file_in_memory(setup, source, target, label)
        except images.PictureError as error:
            problem = str(error)
        except FloatingPointError as error:
            problem = f"{images.printable(source)}: {error}"
        except OSError as error:
            problem = f"cannot write {images.printable(target)}: {error.strerror or error}"
            if error.errno == errno.ENOSPC:
                raise images.UserError(f"{problem}; finished pictures are kept") from None
        images.ProgressLine.clear()
        if problem:
            print(problem, file=sys.stderr, flush=True)
            failed += 1
        else:
            print(line, flush=True)
            done, pixels = done + 1, pixels + made
    return done, skipped, failed, pixels


def run(args):
    """Run the command -> exit code."""
    rank, ranks, start = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), time.time()
    setup = set_up(args, rank)
    tag = f"{args.fit[1]}x{args.fit[0]}" if args.fit else f"{args.scale or setup.network.scale:g}x"
    suffix = None if args.format == "keep" else f".{args.format}"
    jobs, problems = plan_jobs(args.inputs, args.out, suffix, tag)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))    # all wait for the slowest

    counts = torch.tensor(upscale_files(setup, jobs[rank::ranks], show_progress=rank == 0))
    if ranks > 1:
        torch.distributed.all_reduce(counts)
        torch.distributed.destroy_process_group()
    done, skipped, failed, pixels = counts.tolist()
    failed += len(problems)
    if rank == 0:
        for problem in problems:
            print(problem, file=sys.stderr)
        reason = " (results exist; --overwrite replaces them)" if skipped else ""
        print(f"{done} done, {skipped} skipped{reason}, {failed} failed, {pixels / 1e6:.1f} Mpixel, "
              f"{time.time() - start:.1f} s")
    return 1 if failed else 0


def main():
    args = parse()
    sys.stdout.reconfigure(errors="backslashreplace")       # for terminals without Japanese letters
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # clean up as after Ctrl-C
    try:
        sys.exit(run(args))
    except images.UserError as error:
        images.fail(error)
    except KeyboardInterrupt:
        images.ProgressLine.clear()
        print("interrupted; finished pictures are kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
