"""Trains and measures the artifact detector of losses.py on clean pictures with drawn faults, one at a time.

    python train.py --detector --data wallpapers --val held_out     # trains it; this file does the work
    python detect.py held_out                                       # measures weights/detector.safetensors

Needs torch, numpy, pillow, safetensors and losses.py, degrade.py, data.py, tile.py, demo.py, clean.py beside it.
"""
import argparse
import io
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import degrade
from losses import CLASSES, ArtifactDetector, dirt, load_detector, save_detector
from images import PictureError, atomic_path, composite, find_pictures, printable, read_picture

SIDES, VERSIONS, SEEN = (128, 256, 512), 4, 0.3
LEAST = 32      # pixels a side, of a picture to have faults drawn into it
HARD = [CLASSES.index(kind) for kind in ("banding", "oversharp", "seam")]     # drawn twice as often


def visible(hr, out, window=16):
    """How much of a fault can be seen where it shows most: slopes of the error over those of the picture, which hide
    it, in levels of 8 bits, means over a window. (3, H, W) twice -> float; a flat colour turned into another is 0."""
    def slopes(x):
        d = (x[:, 1:, :-1] - x[:, :-1, :-1]).abs() + (x[:, :-1, 1:] - x[:, :-1, :-1]).abs()
        return F.avg_pool2d(255 * d.mean(0, keepdim=True), window, window // 2)
    return (slopes(out - hr) / (1 + slopes(hr))).max().item()


class Faults(torch.utils.data.Dataset):
    """faults[step] -> (pictures (4 B, 3, side, side), targets (4 B, 8), probabilities).

    Of every crop of batches[step] four versions in a row: clean; with a fault; with more of it; with another fault. A
    fault that cannot be seen is drawn again, one that hardly can may be taken for clean in part. What is drawn is clear
    at first and fainter later: an untrained detector learns nothing from faint faults."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, step):
        _, hr = self.batches[step]
        rng, x, targets, kinds = np.random.default_rng((self.batches.seed, step, 7)), [], [], []
        least = 0.05 + 0.35 * (1 - step / len(self)) ** 2
        for clean in hr:
            clean = varied(clean, rng)
            x, targets = [*x, clean], [*targets, target(0, 0)]
            for both in (True, False):
                for _ in range(6):
                    kinds = kinds or rng.permutation([*range(1, len(CLASSES)), *HARD]).tolist()
                    kind, seed = kinds.pop(), int(rng.integers(2 ** 31))
                    strength = np.clip(rng.normal(0.5, 0.12) if rng.random() < 0.6 else rng.uniform(least, 1), least, 1)
                    out = degrade.artifact(clean[None], CLASSES[kind], strength, [seed])[0]
                    if visible(clean, out) > SEEN:
                        break
                if both:
                    weaker = max(least, strength * rng.uniform(0.1, 0.9))
                    less = degrade.artifact(clean[None], CLASSES[kind], weaker, [seed])[0]
                    x, targets = [*x, less], [*targets, target(kind, visible(clean, less))]
                x, targets = [*x, out], [*targets, target(kind, visible(clean, out))]
        return torch.stack(x), torch.stack(targets)


def varied(x, rng):
    """Another clean picture of the same lines: colours exchanged; in every other crop less contrast; three in ten are
    sharpened a little, as painters and programs do before they show a picture."""
    x = x[rng.permutation(3)]
    if rng.random() < 0.5:
        grey = rng.random()
        x = grey + (x - grey) * rng.uniform(0.4, 1)
    if rng.random() < 0.3:
        x = degrade.unsharp(x, rng.uniform(0.6, 1.6), rng.uniform(0, 0.5))
    return degrade.to_8_bit(x)


def target(kind, seen):
    sure = min(1.0, seen / (2 * SEEN))
    t = torch.zeros(len(CLASSES))
    t[kind] += sure
    t[0] += 1 - sure
    return t


def learn(detector, x, targets):
    """The loss of a batch of Faults: cross-entropy, and a crop's versions in the wrong order (softplus)."""
    logits = detector(x.contiguous(memory_format=torch.channels_last))
    d = dirt(logits).view(-1, VERSIONS)
    order = F.softplus(torch.stack([d[:, 0] - d[:, 1], d[:, 1] - d[:, 2], d[:, 0] - d[:, 3]])).mean()
    return F.cross_entropy(logits, targets) + 0.5 * order


def readable(paths, say=True):
    """(number, path, picture (3, H, W) on white) of those that can be read; the others are named, unless say is False."""
    for k, path in enumerate(paths):
        try:
            yield k, path, composite(read_picture(path), 1.0)
        except PictureError as e:
            if say:
                print(f"skipped: {e}", file=sys.stderr)


def held_out(paths, side=128, count=4, seed=1):
    """Of each picture count crops (3, side, side), each the busiest of eight random ones."""
    crops = []
    for k, _, rgb in readable(paths):
        rng = np.random.default_rng((seed, k))
        for _ in range(count if min(rgb.shape[1:]) >= side else 0):
            some = [rgb[:, y:y + side, x:x + side] for y, x in
                    (rng.random((8, 2)) * (np.array(rgb.shape[1:]) - side + 1)).astype(int)]
            crops.append(max(some, key=lambda c: data.detail((c * 255).byte().permute(1, 2, 0).numpy())).clone())
    if not crops:
        raise ValueError(f"no picture to measure on has {side} pixels a side; name larger ones")
    return crops


@torch.inference_mode()
def confusion(detector, pictures, strength=0.5, seed=12345):
    """(8, 8) counts over pictures (3, H, W): row, what was drawn; column, what the detector says. A fault that cannot
    be seen in a picture is not counted."""
    table, device = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long), next(detector.parameters()).device
    for k, clean in enumerate(pictures):
        for kind, name in enumerate(CLASSES):
            x = degrade.artifact(clean[None], name, strength, [seed + k])[0] if kind else clean
            if not kind or visible(clean, x) > SEEN:
                table[kind, detector(x[None].to(device)).argmax().item()] += 1
    return table


def shown(table):
    """The lines of a confusion table, with shares."""
    lines = [f"{'':>10}" + "".join(f"{c[:9]:>10}" for c in CLASSES)]
    lines += [f"{c:>10}" + "".join(f"{n:>10}" for n in row) + f"{row[i] / max(1, sum(row)):>9.1%}"
              for i, (c, row) in enumerate(zip(CLASSES, table.tolist()))]
    return "\n".join(lines)


def shares(table):
    """(share of right answers, share of clean ones called clean)"""
    return (table.diagonal().sum() / table.sum()).item(), (table[0, 0] / table[0].sum()).item()


@torch.inference_mode()
def scores(detector, picture):
    """(3, H, W) -> {"jpeg": dirt as JPEG of quality 90, 60 and 30, "blur": under Gaussians of sigma 0.5, 1 and 2}."""
    device = next(detector.parameters()).device
    worse = dict(jpeg=[degrade.compress(picture, "jpeg", q) for q in (90, 60, 30)],
                 blur=[degrade.to_8_bit(degrade.gaussian_blur(picture, sigma)) for sigma in (0.5, 1.0, 2.0)])
    return {kind: [dirt(detector(x[None].to(device))).item() for x in some] for kind, some in worse.items()}


def train_detector(args, files, patch_shares, state, anew):
    """train.py --detector: learns from patch files, from as large crops as they hold, writes into the run folder, goes on
    from state (None: anew, which anew() prepares the folder for). With args.weights, and in its last third, the batch norms
    stay as they are: measured is what is learned."""
    out, began, total = Path(args.out), time.time(), 0.0
    paths = find_pictures([args.val])
    crops = held_out(paths, count=max(1, 24 // max(1, len(paths))))
    torch.manual_seed(args.seed)
    detector = load_detector(args.weights) if args.weights else ArtifactDetector()
    detector = detector.requires_grad_(True).to(args.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(detector.parameters(), lr=args.lr, weight_decay=1e-2)
    step = 0
    if state:
        detector.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    else:
        anew()
    first = shown_at = step
    held = min(data.read_header(f)[2] for f in files)
    sides = [side for side in SIDES if side <= max(held, SIDES[0])]
    faults = Faults(data.Batches(files, args.steps, max(1, args.batch // VERSIONS), sides, 1, "bicubic", args.seed,
                                 args.busiest, patch_shares))
    print(f"{sum(p.numel() for p in detector.parameters()):,} parameters, crops of {', '.join(map(str, sides))}, "
          f"{len(crops)} held-out ones", flush=True)
    for x, targets in data.loader(faults, step, args.workers):
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min((step + 1) / max(1, args.warmup), 0.505 + 0.495 * math.cos(math.pi * step / args.steps))
        detector.train(not args.weights and 3 * step < 2 * args.steps)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp == "bf16"):
            loss = learn(detector, x.to(args.device), targets.to(args.device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimiser.step()
        step, total = step + 1, total + loss.item()
        if step % args.every == 0 or step == args.steps:
            table = confusion(detector.eval(), crops)
            left, mean = int((args.steps - step) * (time.time() - began) / (step - first)), total / (step - shown_at)
            right, recall = shares(table)
            print(f"step {step}/{args.steps}  loss {mean:.4f}  {left // 60}m{left % 60:02d}s left  right {right:.1%}, "
                  f"clean recall {recall:.1%}", flush=True)
            total, shown_at, buffer = 0.0, step, io.BytesIO()
            torch.save(dict(model=detector.state_dict(), optimiser=optimiser.state_dict(), step=step), buffer)
            with atomic_path(out / "state.pt") as part:
                part.write_bytes(buffer.getvalue())
    table = confusion(detector.eval(), crops)
    print(shown(table))
    with atomic_path(out / "confusion.csv") as part:
        part.write_text("\n".join(["drawn\\said," + ",".join(CLASSES), *(
            ",".join([c, *map(str, row)]) for c, row in zip(CLASSES, table.tolist()))]) + "\n")
    save_detector(detector, out / "detector.safetensors", dict(data=[Path(f).name for f in files], steps=args.steps,
                                                               batch=args.batch, seed=args.seed))
    print(f"done: {out / 'detector.safetensors'}; to use it: --detector FILE, or put it into weights/")


def main():
    if hasattr(sys.stdout, "reconfigure"):      # a log in cp1252, a name in Japanese
        sys.stdout.reconfigure(errors="backslashreplace")
    p = argparse.ArgumentParser(
        description="Measures the artifact detector on clean pictures it did not learn from: what it says of them and "
        "of faults drawn into them, whole and in crops of 128x128; and whether more of a fault gets a higher score.",
        epilog="example: python detect.py held_out --detector runs/detector/detector.safetensors")
    p.add_argument("folder", metavar="FOLDER", help="clean pictures")
    p.add_argument("--detector", metavar="FILE", help="its weights (default: weights/detector.safetensors)")
    p.add_argument("--strength", type=float, default=0.5, help="of the faults, 0 to 1 (default: 0.5)")
    p.add_argument("--seed", type=int, default=12345, help="of the faults (default: 12345)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    args = p.parse_args()
    try:
        detector = load_detector(args.detector).to(args.device)
        paths = find_pictures([args.folder])
        crops, whole = held_out(paths), torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
        wrong, judged = dict(jpeg=[], blur=[]), 0
        for k, path, rgb in readable(paths, say=False):      # held_out named those already
            if min(rgb.shape[1:]) < LEAST:
                print(f"skipped: {printable(path)} is smaller than {LEAST}x{LEAST}", file=sys.stderr)
                continue
            table = confusion(detector, [rgb], args.strength, args.seed + k)
            whole, judged = whole + table, judged + 1
            found = scores(detector, rgb)
            for kind, (weak, middle, strong) in found.items():
                wrong[kind] += [printable(path.name)] * (not weak < middle < strong)
            missed = [f"{CLASSES[i]} called {CLASSES[j]}" for i, j in table.nonzero().tolist() if i != j]
            print(f"{printable(path.name)}: " + (", ".join(missed) or "all right"), flush=True)
        for what, table in (("whole pictures", whole), (f"{len(crops)} crops of 128x128",
                                                        confusion(detector, crops, args.strength, args.seed))):
            print(f"\n{what}: {{:.1%}} right, {{:.1%}} of the clean ones called clean".format(*shares(table)))
            print(shown(table), flush=True)
        for kind, what in (("jpeg", "JPEG 90 < 60 < 30"), ("blur", "blur 0.5 < 1 < 2")):
            print(f"{what} in {judged - len(wrong[kind])} of {judged} pictures"
                  + (f", not in {', '.join(wrong[kind])}" if wrong[kind] else ""))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, AssertionError) as e:        # the last two: a device that is not there
        print(f"error: {str(e).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
