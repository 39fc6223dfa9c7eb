"""Measure the commands of data.py and clean.py. Not run by pytest; parts:

    python tests/measure_data.py thresholds --data PICTURES     # share of pictures that the thresholds drop
    python tests/measure_data.py bulk --count 10000             # memory, kills, cost per picture
    python tests/measure_data.py path --data PICTURES           # all commands; patch file compared with decoding

thresholds takes a minute, bulk about half an hour on two cores, path a few minutes. Needs Linux (it reads /proc).
"""
import argparse
import filecmp
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import clean                                                            # noqa: E402
import data                                                             # noqa: E402
import images                                                           # noqa: E402


# ------------------------------------------------------------------ thresholds


def add_defects(pixels):
    """Yield (name of a defect, uint8 (H, W, 3)) for uint8 (H, W, 3). Upscaled ones show a part of the picture."""
    image, (h, w) = Image.fromarray(pixels), pixels.shape[:2]
    yield "unchanged", pixels
    for factor in (2, 1.5):
        for kernel in ("bicubic", "lanczos", "bilinear"):
            small = image.crop((0, 0, int(w / factor), int(h / factor)))
            yield f"{kernel} {factor}x", np.asarray(small.resize((w, h), Image.Resampling[kernel.upper()]))
    for sigma in (0.5, 0.7, 1):
        yield f"blur, sigma {sigma}", np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)))
    for quality in (30, 60, 85, 90, 95):
        memory = io.BytesIO()
        image.save(memory, "JPEG", quality=quality)
        yield f"JPEG {quality}", np.asarray(Image.open(memory))[3:, 5:]      # decoded, with the grid at another offset


def thresholds(args):
    paths = data.list_inputs(args.data)
    chosen, results = sorted(paths)[::max(1, len(paths) // 48)], {}
    for path in chosen:
        rgb = images.composite(images.read_picture(path, srgb=True), 0.5)
        y, x = ((side - min(side, 1024)) // 2 for side in rgb.shape[1:])
        for name, pixels in add_defects(images.to_uint8(rgb[:, y:y + 1024, x:x + 1024])):
            squares = clean.detailed_squares(pixels)
            if len(squares):
                results.setdefault(name, []).append((clean.sharpness(squares), clean.blockiness(squares)))
    print(f"{len(chosen)} center crops; minimum, median and maximum\n")
    print("| | sharpness, dB | dropped | blocks, dB | dropped |\n|---|---|---|---|---|")
    for name, rows in results.items():
        sharp, blocks = np.array(rows).T
        cells = [" ".join(f"{v:.1f}" for v in np.quantile(values, [0, 0.5, 1])) for values in (sharp, blocks)]
        print(f"| {name} | {cells[0]} | {np.mean(sharp < clean.MIN_SHARPNESS):.0%} | {cells[1]} | "
              f"{np.mean(blocks > clean.MAX_BLOCKS):.0%} |")


# ------------------------------------------------------------------ bulk


def scene(rng, w, h):
    """Draw a small sharp picture: shapes at twice the size, averaged down, with grain."""
    from PIL import ImageDraw
    image = Image.new("RGB", (2 * w, 2 * h), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(24):
        x, y, r = rng.integers(0, 2 * w), rng.integers(0, 2 * h), rng.integers(8, 120)
        color = tuple(rng.integers(0, 256, 3).tolist())
        if rng.random() < 0.5:
            draw.ellipse((x - r, y - r // 2, x + r, y + r), color, 0, 3)
        else:
            draw.line((x, y, *rng.integers(0, 2 * h, 2).tolist()), color, int(rng.integers(2, 9)))
    pixels = np.asarray(image.resize((w, h), Image.Resampling.BOX)).astype(np.int16)
    return Image.fromarray(np.uint8((pixels + rng.integers(-3, 4, (h, w, 1))).clip(0, 255)))


def draw_many(folder, count):
    """Draw files: of 100, 84 good ones, 4 copies, 3 upscaled, 3 JPEG-damaged, 3 small, 3 broken."""
    for i in range(count):
        path = folder / f"{i // 1000:03d}" / f"{i:06d} 絵.png"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        rng, kind, memory = np.random.default_rng(i), i % 100, io.BytesIO()
        image = scene(np.random.default_rng(i - 50) if 50 <= kind < 54 else rng, 384, 320)
        if 50 <= kind < 54:
            image = image.resize((336, 280), Image.Resampling.LANCZOS)
        elif 60 <= kind < 63:
            image = image.crop((0, 0, 192, 160)).resize((384, 320), Image.Resampling.BICUBIC)
        elif 70 <= kind < 73:
            image.save(memory, "JPEG", quality=50)
            image = Image.open(memory)
        elif 80 <= kind < 83:
            image = image.crop((0, 0, 200, 180))
        memory = io.BytesIO()
        image.save(memory, "PNG", compress_level=1)
        content = memory.getvalue()
        part = path.with_suffix(".part")
        part.write_bytes(content[:len(content) // 2] if 90 <= kind < 93 else content)
        os.replace(part, path)


def memory_of(pid):
    """Return the bytes of a process and its children; shared memory counts once."""
    total, wanted = 0, [pid]
    while wanted:
        pid = wanted.pop()
        try:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                wanted += map(int, (thread / "children").read_text().split())
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))
        except OSError:
            pass
    return total


def run(command, *args, kill_when=None):
    """Run a command of data.py or clean.py and print its last line. Returns (seconds, peak memory in MiB).

    kill_when: a function; the main process is killed when it returns True.
    """
    start, peak = time.time(), 0
    script = "data.py" if command == "pack" else "clean.py"
    process = subprocess.Popen([sys.executable, ROOT / script, command, *map(str, args)], stdout=subprocess.PIPE,
                               text=True)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        if kill_when and kill_when():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return time.time() - start, peak / 2 ** 20
        time.sleep(0.1)
    reader.join()
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    print(f"  {lines[-1].strip()}")
    return time.time() - start, peak / 2 ** 20


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def bulk(args):
    random.seed(args.seed)
    folder, workers = Path(args.work), ("--workers", args.workers)
    pictures = folder / "in"
    draw_many(pictures, args.count)
    print(f"{args.count} files, {sum(p.stat().st_size for p in pictures.glob('*/*')) / 1e6:.0f} MB\n")
    few = folder / "few"
    draw_many(few, args.count // 10)

    for name, source in (("a tenth of them", few), ("all", pictures)):
        out = folder / f"whole {source.name}"
        seconds, peak = run("clean", source, "-o", out, *workers)
        n = len(list(source.glob("*/*")))
        print(f"clean {name}: {seconds:.0f} s, {1000 * seconds / n:.1f} ms a picture, peak {peak:.0f} MiB", flush=True)
        packed = folder / f"{source.name}.safetensors"
        seconds, peak = run("pack", out / "pictures", "-o", packed, "--size", 256, *workers)
        print(f"pack {name}: {seconds:.0f} s, {1000 * seconds / n:.1f} ms a picture, peak {peak:.0f} MiB", flush=True)

    # Kill at a random moment, seen from the size of the growing file.
    whole = folder / "whole in"
    packed, again = folder / "in.safetensors", folder / "again.safetensors"
    part = Path(f"{again}.part")
    pack_again = ("pack", whole / "pictures", "-o", again, "--size", 256, *workers)
    run(*pack_again, kill_when=lambda: size_of(part) > random.uniform(0.2, 0.9) * size_of(packed))
    print(f"pack killed; no file: {not again.exists()}", flush=True)
    run(*pack_again)
    print(f"pack gives the same bytes: {filecmp.cmp(packed, again, shallow=False)}; nothing left over: "
          f"{not list(folder.glob('*.part'))}")


# ------------------------------------------------------------------ path


def path(args):
    work, workers = Path(args.work), ("--workers", args.workers)
    out, mined, packed = work / "set", work / "mined.safetensors", work / "all.safetensors"
    for arguments in (("clean", *args.data, "-o", out), ("multiscale", out / "pictures", "-o", out / "smaller"),
                      ("pack", out / "pictures", out / "smaller", "-o", packed), ("mine", packed, "-o", mined)):
        seconds, peak = run(*arguments, *workers)
        print(f"{arguments[0]}: {seconds:.1f} s, peak {peak:.0f} MiB", flush=True)

    # The same crops from the patch file and from PNG files. Both were read before, so both are in the file cache.
    side, rng = 128, np.random.default_rng(0)
    pngs = work / "png"
    pngs.mkdir(exist_ok=True)
    sources = sorted((out / "pictures").iterdir())[:24]
    for p in sources:
        if not (pngs / f"{p.stem}.png").exists():
            Image.open(p).convert("RGB").save(pngs / f"{p.stem}.png")
    files, start, count = sorted(pngs.iterdir()), time.perf_counter(), 0
    while time.perf_counter() - start < 10:
        with Image.open(files[rng.integers(len(files))]) as image:
            image.load()
            x, y = (int(rng.integers(s - side + 1)) for s in image.size)
            np.array(image.crop((x, y, x + side, y + side)))
        count += 1
    decoded = count / (time.perf_counter() - start)
    batches = data.Batches(packed, 10 ** 6, 16, side, 1, "bicubic", 0)
    patches, start, count = data.open_patch_file(packed)[1]["patches"], time.perf_counter(), 0
    n, size = patches.shape[:2]
    while time.perf_counter() - start < 5:
        k, y, x = rng.integers(n), *rng.integers(size - side + 1, size=2)
        np.array(patches[k, y:y + side, x:x + side])
        count += 1
    mapped = count / (time.perf_counter() - start)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 5:
        batches[count]
        count += 1
    made = 16 * count / (time.perf_counter() - start)
    print(f"crops of {side}x{side} a second, one process: {decoded:.1f} decoding PNG, {mapped:.0f} from the patch file "
          f"({mapped / decoded:.0f} times as many); as whole batches, flipped and turned, in float: {made:.0f}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=("thresholds", "bulk", "path"))
    p.add_argument("--data", nargs="+", help="folders of pictures, for thresholds and path")
    p.add_argument("--count", type=int, default=10000, help="of drawn pictures, for bulk (default: 10000)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    p.add_argument("--work", help="folder to work in, kept (default: a temporary one)")
    p.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    args = p.parse_args()
    if args.part != "bulk" and not args.data:
        sys.exit("error: give --data FOLDER")
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or temporary
        Path(args.work).mkdir(parents=True, exist_ok=True)
        dict(thresholds=thresholds, bulk=bulk, path=path)[args.part](args)


if __name__ == "__main__":
    main()
