"""The artifact detector: train it, measure it, and classify the artifacts of pictures.

    python detect.py train --data wallpapers --val held_out     # writes runs/detector/detector.safetensors
    python detect.py measure held_out                           # confusion table
    python detect.py inspect picture.png                        # class probabilities

Training uses clean pictures, and the same pictures with one synthetic artifact each (degrade.artifact).
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors

import data
import degrade
import images
from losses import CLASSES, ArtifactDetector, LossError, artifact_log_odds, load_detector

SIDES = (128, 256)          # of training crops
LR, WARMUP = 3e-3, 20       # peak learning rate, steps of warm-up
REPORTS = 10                # in a training
VISIBLE = 0.3               # an artifact counts as visible if its visibility() is larger
ARTIFACTS = (*CLASSES[1:], "banding", "oversharp", "seam")      # the last three are drawn twice as often


# ---- training data -----------------------------------------------------------------------------------------

def visibility(clean, changed, window=16):
    """Measure how visible a change of a picture (3, H, W) is: the maximum over windows of the gradient of the
    difference / (1 + the gradient of the picture). Gradients are means of a window, in levels (1/255)."""
    def slope(x):
        dy = (x[:, 1:, :-1] - x[:, :-1, :-1]).abs()
        dx = (x[:, :-1, 1:] - x[:, :-1, :-1]).abs()
        return F.avg_pool2d(255 * (dy + dx).mean(0, keepdim=True), window, window // 2)
    return (slope(changed - clean) / (1 + slope(clean))).max().item()


def augment(x, rng):
    """Augment a clean picture (3, H, W): permute the colors, and sometimes reduce the contrast or sharpen."""
    x = x[rng.permutation(3)]
    if rng.random() < 0.5:
        gray = rng.random()
        x = gray + (x - gray) * rng.uniform(0.4, 1)
    if rng.random() < 0.3:
        x = degrade.unsharp(x, rng.uniform(0.6, 1.6), rng.uniform(0, 0.5))
    return degrade.to_8_bit(x)


class ArtifactBatches(data.Batches):
    """Training batches: batches[step] -> (pictures (4 B, 3, side, side), class probabilities (4 B, 8)).

    Each crop gives four versions: clean, with a weak artifact, with the same but stronger, with another. The
    label of a barely visible artifact is partly `clean`. The minimum strength falls during training.
    """

    def __getitem__(self, step):
        _, hr = super().__getitem__(step)
        rng = np.random.default_rng((self.seed, step, 7))
        weakest = 0.05 + 0.35 * (1 - step / len(self)) ** 2
        pictures, targets, one_hot = [], [], dict(zip(CLASSES, torch.eye(len(CLASSES))))
        for clean in hr:
            clean = augment(clean, rng)
            strong, kind, strength, seed = add_artifact(clean, weakest, rng)
            strength = max(weakest, strength * rng.uniform(0.1, 0.9))
            weak = degrade.artifact(clean[None], kind, strength, [seed])[0]
            other, other_kind, _, _ = add_artifact(clean, weakest, rng)
            for x, name in ((clean, "clean"), (weak, kind), (strong, kind), (other, other_kind)):
                certainty = min(1.0, visibility(clean, x) / (2 * VISIBLE))
                targets.append(certainty * one_hot[name] + (1 - certainty) * one_hot["clean"])
                pictures.append(x)
        return torch.stack(pictures), torch.stack(targets)


def add_artifact(clean, weakest, rng):
    """Add a random artifact -> (picture, class, strength, seed). Draw up to six times until it is visible."""
    for _ in range(6):
        kind, seed = rng.choice(ARTIFACTS), int(rng.integers(2 ** 31))
        strength = rng.normal(0.5, 0.12) if rng.random() < 0.6 else rng.uniform(weakest, 1)
        strength = np.clip(strength, weakest, 1)
        changed = degrade.artifact(clean[None], kind, strength, [seed])[0]
        if visibility(clean, changed) > VISIBLE:
            break
    return changed, kind, strength, seed


def detector_loss(detector, pictures, targets):
    """Return the cross-entropy, plus a penalty for log odds against clean < weak < strong, other."""
    logits = detector(pictures)
    clean, weak, strong, other = artifact_log_odds(logits).view(-1, 4).unbind(1)
    order_penalty = F.softplus(torch.stack([clean - weak, weak - strong, clean - other])).mean()
    return F.cross_entropy(logits, targets) + 0.5 * order_penalty


# ---- measuring ---------------------------------------------------------------------------------------------

def read_pictures(paths):
    """Yield (path, rgb (3, H, W) on white). Unreadable pictures are named on stderr and skipped."""
    for path in images.find_pictures(paths):
        try:
            yield path, images.composite(images.read_picture(path), 1.0)
        except images.PictureError as error:
            print(f"skipped: {error}", file=sys.stderr)


@torch.inference_mode()
def confusion(detector, pictures):
    """Return the confusion table (8, 8) of clean pictures (3, H, W), at least 32x32: rows are synthetic
    artifacts of strength 0.5, columns are predictions. Invisible artifacts are not counted."""
    device = next(detector.parameters()).device
    table = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
    for k, clean in enumerate(pictures):
        for i, name in enumerate(CLASSES):
            x = degrade.artifact(clean[None], name, 0.5, [12345 + k])[0] if i else clean
            if i == 0 or visibility(clean, x) > VISIBLE:
                table[i, detector(x[None].to(device)).argmax().item()] += 1
    return table


def print_confusion(table):
    """Print a confusion table with the accuracy of each class and of all classes."""
    print(" " * 10 + "".join(f"{name:>10}" for name in CLASSES))
    for i, (name, row) in enumerate(zip(CLASSES, table.tolist())):
        print(f"{name:>10}" + "".join(f"{n:>10}" for n in row) + f"{row[i] / max(1, sum(row)):>9.1%}")
    print(f"accuracy {(table.diagonal().sum() / table.sum()).item():.1%}", flush=True)


def measure(args):
    """Print the confusion table of clean pictures that the detector was not trained on."""
    detector = load_detector(args.detector, args.device)
    print_confusion(confusion(detector, (rgb for _, rgb in read_pictures(args.pictures))))


@torch.inference_mode()
def inspect(args):
    """Print the class probabilities of pictures, one line each."""
    detector = load_detector(args.detector, args.device)
    for path, rgb in read_pictures(args.pictures):
        values = detector(rgb[None].to(args.device)).softmax(1)[0].tolist()
        print(f"{images.printable(path)}:", *(f"{name} {p:.2f}" for name, p in zip(CLASSES, values)))


# ---- training ----------------------------------------------------------------------------------------------

def train(args):
    """Train a detector on clean pictures with synthetic artifacts; the same command resumes."""
    out, step, settings = Path(args.out), 0, [args.data, args.steps, args.batch, args.seed]
    files, shares = data.pack_folders(args.data, SIDES, [], "patches")
    batches = ArtifactBatches(files, args.steps, args.batch // 4, SIDES, 1, "bicubic", args.seed, 4, shares)
    val = data.to_tensor([max(data.cut_patches(rgb, SIDES[-1]), key=data.detail)
                          for _, rgb in read_pictures(args.val)])

    torch.manual_seed(args.seed)
    detector = ArtifactDetector().to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=1e-2)
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
        if state["settings"] != settings:
            raise images.UserError(f"{out} was started with other settings; choose another --out")
        detector.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    for pictures, targets in data.make_loader(batches, step, args.workers):
        cosine = 0.505 + 0.495 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / WARMUP, cosine)
        # Freeze the batch-norm statistics in the last third, because the finished detector uses them as well.
        detector.train(3 * step < 2 * args.steps)
        loss = detector_loss(detector, pictures.to(args.device), targets.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        step += 1
        if step % max(1, args.steps // REPORTS) == 0 or step == args.steps:
            print(f"step {step}/{args.steps}  loss {loss.item():.4f}")
            print_confusion(confusion(detector.eval(), val))
            with images.atomic_path(out / "state.pt") as part:
                torch.save({"model": detector.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                            "settings": settings}, part)
    state = {name: x.cpu().contiguous() for name, x in detector.state_dict().items()}
    header = {"kabegami": json.dumps({"kind": "detector", "classes": CLASSES})}
    images.write_atomic(out / "detector.safetensors", to_safetensors(state, header))
    print(f"done: {out / 'detector.safetensors'}; use it with --detector FILE")


# ---- command -----------------------------------------------------------------------------------------------

def main():
    sys.stdout.reconfigure(errors="backslashreplace")       # a console may be unable to print a name
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for run in (train, measure, inspect):
        p = commands.add_parser(run.__name__, help=run.__doc__)
        p.set_defaults(run=run)
        p.add_argument("--device", default="cpu", help="cpu, cuda, or mps (default: cpu)")
        if run is not train:
            p.add_argument("pictures", nargs="+", metavar="PICTURE", help="pictures, or folders of pictures")
            p.add_argument("--detector", metavar="FILE", help="default: that in weights/")
    a = commands.choices["train"].add_argument
    a("--data", nargs="+", required=True, metavar="DIR", help="folders of clean pictures, or patch files")
    a("--val", required=True, metavar="DIR", help="pictures to validate on that are not in --data")
    a("--out", "-o", default="runs/detector", metavar="DIR", help="run folder (default: %(default)s)")
    a("--steps", type=int, default=2200, help="optimizer steps (default: %(default)s)")
    a("--batch", type=int, default=32, help="pictures per step, 4 of each crop (default: %(default)s)")
    a("--workers", type=int, default=1, help="processes that add artifacts (default: %(default)s)")
    a("--seed", type=int, default=0, help="for weights, crops, and artifacts (default: 0)")
    args = parser.parse_args()
    try:
        args.run(args)
    except (images.UserError, LossError) as error:
        images.fail(error)


if __name__ == "__main__":
    main()
