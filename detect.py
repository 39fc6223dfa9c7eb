"""The artifact detector: train it, measure it, and show the artifacts of a picture.

    python detect.py train --data wallpapers --val held_out     # writes runs/detector/detector.safetensors
    python detect.py measure held_out                           # confusion tables
    python detect.py inspect picture.png                        # writes picture-artifacts.png, a heat map

The network is losses.ArtifactDetector. It is trained on clean pictures, and on the same pictures with one
drawn artifact each (degrade.artifact). The same `train` command resumes from the last report, to the bit.
"""
import argparse
import csv
import io
import json
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors

import data
import degrade
import images
from losses import CLASSES, ArtifactDetector, LossError, artifact_log_odds, load_detector, to_luma

SIDES = (128, 256, 512)     # of training crops; those larger than the patches are left out
PATCH_SIZE = 256            # of the patches that folders of --data are packed into
VERSIONS = 4                # of each crop in a batch, see ArtifactBatches
VISIBLE = 0.3               # visibility() above which an artifact counts as visible
MIN_SIDE = 32               # pixels a side of a picture that artifacts can be drawn into
WARMUP = 20                 # steps
HARD = ("banding", "oversharp", "seam")     # artifacts that are drawn twice as often
# A resumed run may change these.
FREE_SETTINGS = {"out", "device", "amp", "workers", "val_every", "overwrite"}


# ---- training data -----------------------------------------------------------------------------------------


def visibility(clean, changed, window=16):
    """Measure how visible a change of a picture (3, H, W) is at its most visible place.

    The slope of the difference divided by 1 + the slope of the picture, which masks it; both in 8-bit levels,
    averaged over windows. A flat area with another flat color has visibility 0."""
    def slope(x):
        dy = (x[:, 1:, :-1] - x[:, :-1, :-1]).abs()
        dx = (x[:, :-1, 1:] - x[:, :-1, :-1]).abs()
        return F.avg_pool2d(255 * (dy + dx).mean(0, keepdim=True), window, window // 2)
    return (slope(changed - clean) / (1 + slope(clean))).max().item()


def vary(x, rng):
    """Make another clean picture of (3, H, W): permuted colors, often less contrast, sometimes slightly
    sharpened, as artists and programs do before they publish a picture."""
    x = x[rng.permutation(3)]
    if rng.random() < 0.5:
        gray = rng.random()
        x = gray + (x - gray) * rng.uniform(0.4, 1)
    if rng.random() < 0.3:
        x = degrade.unsharp(x, rng.uniform(0.6, 1.6), rng.uniform(0, 0.5))
    return degrade.to_8_bit(x)


def make_target(kind, seen):
    """Return class probabilities (8,): of class number `kind`, and the rest of `clean` where it is barely
    visible."""
    certainty = min(1.0, seen / (2 * VISIBLE))
    target = torch.zeros(len(CLASSES))
    target[kind] += certainty
    target[0] += 1 - certainty
    return target


class ArtifactBatches(torch.utils.data.Dataset):
    """batches[step] -> (pictures (4 B, 3, side, side), class probabilities (4 B, 8)).

    Each crop of the data.Batches gives four versions in a row: clean, a weak artifact, the same artifact
    stronger, another artifact. An invisible artifact is drawn again, up to six times. The weakest strength
    falls during the training, because an untrained detector learns nothing from faint artifacts."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, step):
        _, hr = self.batches[step]
        rng = np.random.default_rng((self.batches.seed, step, 7))
        weakest = 0.05 + 0.35 * (1 - step / len(self)) ** 2
        versions, queue = [], []
        for clean in hr:
            clean = vary(clean, rng)
            strong, kind, strength, seed = self.draw(clean, weakest, queue, rng)
            strength = max(weakest, strength * rng.uniform(0.1, 0.9))
            weak = degrade.artifact(clean[None], CLASSES[kind], strength, [seed])[0]
            other, other_kind, _, _ = self.draw(clean, weakest, queue, rng)
            for x, k in ((clean, 0), (weak, kind), (strong, kind), (other, other_kind)):
                versions.append((x, make_target(k, visibility(clean, x) if k else 0)))
        pictures, targets = zip(*versions)
        return torch.stack(pictures), torch.stack(targets)

    @staticmethod
    def draw(clean, weakest, queue, rng):
        """Draw a visible artifact -> (picture, class number, strength, seed). queue: class numbers to draw
        next."""
        hard = [CLASSES.index(name) for name in HARD]
        for _ in range(6):
            if not queue:
                queue += rng.permutation([*range(1, len(CLASSES)), *hard]).tolist()
            kind, seed = queue.pop(), int(rng.integers(2 ** 31))
            strength = rng.normal(0.5, 0.12) if rng.random() < 0.6 else rng.uniform(weakest, 1)
            strength = np.clip(strength, weakest, 1)
            changed = degrade.artifact(clean[None], CLASSES[kind], strength, [seed])[0]
            if visibility(clean, changed) > VISIBLE:
                break
        return changed, kind, strength, seed


def detector_loss(detector, pictures, targets):
    """Cross-entropy, plus a softplus penalty where the versions of a crop are in the wrong order: clean above
    weak, weak above strong, clean above the other artifact."""
    logits = detector(pictures.contiguous(memory_format=torch.channels_last))
    clean, weak, strong, other = artifact_log_odds(logits).view(-1, VERSIONS).unbind(1)
    order = F.softplus(torch.stack([clean - weak, weak - strong, clean - other])).mean()
    return F.cross_entropy(logits, targets) + 0.5 * order


# ---- measuring ---------------------------------------------------------------------------------------------


def read_pictures(paths):
    """Yield (number, path, rgb (3, H, W) on white). Unreadable pictures are named on stderr and skipped."""
    for k, path in enumerate(paths):
        try:
            yield k, path, images.composite(images.read_picture(path), 1.0)
        except images.PictureError as error:
            print(f"skipped: {error}", file=sys.stderr)


def cut_crops(pictures, side=128, count=4, seed=1):
    """Cut `count` crops (3, side, side) of each (number, path, rgb), each the most detailed of eight random
    ones."""
    def detail(x):
        return data.detail((x * 255).byte().permute(1, 2, 0).numpy())

    crops = []
    for k, _, rgb in pictures:
        rng = np.random.default_rng((seed, k))
        room = np.array(rgb.shape[1:]) - side + 1
        for _ in range(count if room.min() > 0 else 0):
            corners = (rng.random((8, 2)) * room).astype(int)
            candidates = [rgb[:, y:y + side, x:x + side] for y, x in corners]
            crops.append(max(candidates, key=detail).clone())
    return crops


@torch.inference_mode()
def confusion(detector, pictures, strength=0.5, seed=12345):
    """Return counts (8, 8) over pictures (3, H, W): rows are drawn artifacts, columns are answers. An
    artifact that is not visible in a picture is not counted."""
    table = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
    device = next(detector.parameters()).device
    for k, clean in enumerate(pictures):
        for kind, name in enumerate(CLASSES):
            x = clean
            if kind:
                x = degrade.artifact(clean[None], name, strength, [seed + k])[0]
                if visibility(clean, x) <= VISIBLE:
                    continue
            table[kind, detector(x[None].to(device)).argmax().item()] += 1
    return table


def format_confusion(table):
    """Return a confusion table as text, with the share of correct answers of each class."""
    lines = [" " * 10 + "".join(f"{name[:9]:>10}" for name in CLASSES)]
    for i, (name, row) in enumerate(zip(CLASSES, table.tolist())):
        cells = "".join(f"{count:>10}" for count in row)
        lines.append(f"{name:>10}{cells}{row[i] / max(1, sum(row)):>9.1%}")
    return "\n".join(lines)


def accuracy(table):
    """Return (share of correct answers, share of clean pictures called clean) of a confusion table."""
    return (table.diagonal().sum() / table.sum()).item(), (table[0, 0] / table[0].sum()).item()


@torch.inference_mode()
def score_damage(detector, rgb):
    """Return artifact_log_odds() of a picture (3, H, W) with growing damage: {"jpeg": of quality 90, 60 and
    30, "blur": of sigma 0.5, 1 and 2}."""
    device = next(detector.parameters()).device
    damaged = {"jpeg": [degrade.compress(rgb, "jpeg", quality) for quality in (90, 60, 30)],
               "blur": [degrade.to_8_bit(degrade.gaussian_blur(rgb, sigma)) for sigma in (0.5, 1.0, 2.0)]}
    return {kind: [artifact_log_odds(detector(x[None].to(device))).item() for x in pictures]
            for kind, pictures in damaged.items()}


def measure(args):
    """The command `measure`: whole pictures, crops of 128x128, and the order of growing damage."""
    detector = load_detector(args.detector, args.device)
    whole = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
    wrong = {"jpeg": [], "blur": []}
    count, crops = 0, []
    for k, path, rgb in read_pictures(images.find_pictures([args.folder])):
        name = images.printable(path.name)
        if min(rgb.shape[1:]) < MIN_SIDE:
            print(f"skipped: {images.printable(path)} is smaller than {MIN_SIDE}x{MIN_SIDE}", file=sys.stderr)
            continue
        crops += cut_crops([(k, path, rgb)])
        table = confusion(detector, [rgb], args.strength, args.seed + k)
        whole, count = whole + table, count + 1
        for kind, (weak, middle, strong) in score_damage(detector, rgb).items():
            if not weak < middle < strong:
                wrong[kind].append(name)
        errors = [f"{CLASSES[i]} called {CLASSES[j]}" for i, j in table.nonzero().tolist() if i != j]
        print(f"{name}: {', '.join(errors) or 'all correct'}", flush=True)
    if not crops:
        raise images.UserError(f"{args.folder} holds no picture of 128 pixels a side or more")
    small = confusion(detector, crops, args.strength, args.seed)
    for title, table in (("whole pictures", whole), (f"{len(crops)} crops of 128x128", small)):
        correct, recall = accuracy(table)
        print(f"\n{title}: {correct:.1%} correct, {recall:.1%} of the clean ones called clean")
        print(format_confusion(table), flush=True)
    for kind, order in (("jpeg", "JPEG 90 < 60 < 30"), ("blur", "blur 0.5 < 1 < 2")):
        exceptions = f", except {', '.join(wrong[kind])}" if wrong[kind] else ""
        print(f"{order} in {count - len(wrong[kind])} of {count} pictures{exceptions}")


# ---- training ----------------------------------------------------------------------------------------------


def save_detector(detector, path, header=None):
    """Save a detector as .safetensors with CLASSES and `header` as JSON in its metadata. Raises OSError."""
    state = {name: x.detach().cpu().contiguous() for name, x in detector.state_dict().items()}
    header = {"kind": "detector", "classes": CLASSES, **(header or {})}
    images.write_atomic(path, to_safetensors(state, {"kabegami": json.dumps(header)}))


def read_state(out, settings, overwrite):
    """Return the state of the run in folder `out`, or None for a new run. Raises UserError for other
    settings."""
    if overwrite:
        return None
    if not (out / "state.pt").exists():
        if (out / "detector.safetensors").exists():
            raise images.UserError(f"{out} holds a detector but no state.pt; choose another --out")
        return None
    before = json.loads((out / "args.json").read_text())
    changed = [name for name, value in settings.items()
               if name not in FREE_SETTINGS and before.get(name, value) != value]
    if changed:
        raise images.UserError(f"{out} was made with another --{changed[0].replace('_', '-')} "
                               f"({before[changed[0]]}); choose another --out, or give --overwrite")
    return torch.load(out / "state.pt", map_location="cpu", weights_only=True)


def prepare_data(args):
    """Pack the folders of --data -> (patch files, paths of validation pictures)."""
    files = [path for path in args.data if data.is_patch_file(path)]
    folders = [path for path in args.data if path not in files]
    if args.val:
        val_paths = held_out = images.find_pictures([args.val])
    elif files:
        raise images.UserError("a patch file in --data needs --val: a folder of pictures that are not in it")
    else:
        val, held_out = data.hold_out(folders, "patches")
        val_paths = images.find_pictures([val])
        print(f"no --val: {len(held_out)} pictures are set aside; crops of them are in {val}")
    if folders:
        names = [str(Path(path).resolve()) for path in [*folders, *held_out]]
        packed = Path("patches") / f"detector-{zlib.crc32(json.dumps(names).encode()):08x}.safetensors"
        files.append(data.pack(folders, packed, PATCH_SIZE, min_side=SIDES[0], without=held_out))
    return files, val_paths


def train(args):
    """The command `train`. Writes args.json, log.csv, state.pt, confusion.csv and detector.safetensors."""
    out = Path(args.out)
    state = read_state(out, vars(args), args.overwrite)
    files, val_paths = prepare_data(args)
    crops = cut_crops(read_pictures(val_paths), count=max(1, 24 // max(1, len(val_paths))))
    if not crops:
        raise images.UserError("no validation picture of 128 pixels a side or more")

    torch.manual_seed(args.seed)
    detector = load_detector(args.weights) if args.weights else ArtifactDetector()
    detector = detector.requires_grad_(True).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=args.lr, weight_decay=1e-2)
    step, rows = 0, []
    if state:
        detector.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, rows = state["step"], state["rows"]
    else:
        (out / "state.pt").unlink(missing_ok=True)
        images.write_atomic(out / "args.json", json.dumps(vars(args), indent=1).encode())

    patch_size = min(data.read_header(file)[2] for file in files)
    sides = [side for side in SIDES if side <= max(patch_size, SIDES[0])]
    crop_count = max(1, args.batch // VERSIONS)
    batches = ArtifactBatches(data.Batches(files, args.steps, crop_count, sides, 1, "bicubic", args.seed,
                                           args.crop_candidates))
    parameters = sum(p.numel() for p in detector.parameters())
    print(f"{parameters:,} parameters, crops of {', '.join(map(str, sides))} pixels, {len(crops)} validation "
          f"crops, step {step} of {args.steps}", flush=True)
    device, amp = torch.device(args.device).type, args.amp == "bf16"
    first_step, start, loss_sum, loss_count = step, time.time(), 0.0, 0
    for pictures, targets in data.make_loader(batches, step, args.workers):
        cosine = 0.505 + 0.495 * math.cos(math.pi * step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / WARMUP, cosine)
        # Fix the batch norms in the last third, so that validation measures the network that is trained.
        detector.train(not args.weights and 3 * step < 2 * args.steps)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = detector_loss(detector, pictures.to(args.device), targets.to(args.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        step, loss_sum, loss_count = step + 1, loss_sum + loss.detach(), loss_count + 1
        if step % args.val_every == 0 or step == args.steps:
            correct, recall = accuracy(confusion(detector.eval(), crops))
            mean_loss = float(loss_sum) / loss_count
            loss_sum, loss_count = 0.0, 0
            rows.append({"step": step, "loss": mean_loss, "correct": correct, "recall": recall})
            write_report(out, detector, optimizer, rows)
            left = int((args.steps - step) * (time.time() - start) / (step - first_step))
            print(f"step {step}/{args.steps}  loss {mean_loss:.4f}  correct {correct:.1%}, clean recall "
                  f"{recall:.1%}  {left // 60}m{left % 60:02d}s left", flush=True)

    table = confusion(detector.eval(), crops)
    print(format_confusion(table))
    lines = ["drawn\\answer," + ",".join(CLASSES)]
    lines += [",".join([name, *map(str, row)]) for name, row in zip(CLASSES, table.tolist())]
    images.write_atomic(out / "confusion.csv", ("\n".join(lines) + "\n").encode())
    names = [Path(file).name for file in files]
    save_detector(detector, out / "detector.safetensors",
                  {"data": names, "steps": args.steps, "batch": args.batch, "seed": args.seed})
    print(f"done: {out / 'detector.safetensors'}; use it with --detector FILE")


def write_report(out, detector, optimizer, rows):
    """Write log.csv, and state.pt to resume from."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    images.write_atomic(out / "log.csv", text.getvalue().encode())
    buffer = io.BytesIO()
    torch.save({"model": detector.state_dict(), "optimizer": optimizer.state_dict(), "step": rows[-1]["step"],
                "rows": rows}, buffer)
    images.write_atomic(out / "state.pt", buffer.getvalue())


# ---- one picture -------------------------------------------------------------------------------------------


@torch.inference_mode()
def inspect_picture(detector, rgb, patch=128, progress=None):
    """Classify a picture (3, H, W) patch by patch -> (probabilities (N, 8), N corners (y, x), heat map (H, W)
    of 1 - P(clean)). progress: called with (patches done, N)."""
    height, width = rgb.shape[1:]
    ys, xs = (sorted({*range(0, max(n - patch, 0), patch), max(n - patch, 0)}) for n in (height, width))
    corners = [(y, x) for y in ys for x in xs]
    device = next(detector.parameters()).device
    probabilities, heat = [], torch.zeros(height, width)
    for i in range(0, len(corners), 16):
        group = corners[i:i + 16]
        patches = torch.stack([rgb[:, y:y + patch, x:x + patch] for y, x in group]).to(device)
        logits, places, _ = detector(patches, return_features=True)
        probabilities.append(logits.softmax(1).cpu())
        damage = 1 - places.softmax(1)[:, :1]
        damage = F.interpolate(damage, size=patches.shape[-2:], mode="bilinear", align_corners=False)
        for (y, x), part in zip(group, damage[:, 0].cpu()):
            heat[y:y + patch, x:x + patch] = part
        if progress:
            progress(min(i + 16, len(corners)), len(corners))
    return torch.cat(probabilities), corners, heat


def inspect(args):
    """The command `inspect`: print the classes of the patches and save a heat map."""
    detector = load_detector(args.detector, args.device)
    out = args.out or Path(Path(args.picture).stem + "-artifacts.png")
    if out.exists() and (not args.overwrite or out.samefile(args.picture)):
        raise images.UserError(f"{images.printable(out)} exists; choose another --out, or --overwrite")
    rgb = images.composite(images.read_picture(args.picture), 1.0)
    line = images.ProgressLine()
    probabilities, corners, heat = inspect_picture(
        detector, rgb, progress=lambda done, count: line(f"{done}/{count} patches"))
    line.clear()
    print(f"{images.printable(args.picture)}: {rgb.shape[2]}x{rgb.shape[1]}, {len(corners)} patches")
    answers = probabilities.argmax(1)
    for i, name in enumerate(CLASSES):
        highest, where = probabilities[:, i].max(0)
        y, x = corners[where]
        share = (answers == i).float().mean().item()
        print(f"{name:<10}{share:6.0%} of the patches; probability at most {highest:.2f}, at x {x}, y {y}")
    gray = to_luma(rgb[None])[0] * 0.8
    red = torch.tensor([1.0, 0.1, 0.1]).view(3, 1, 1)
    images.save_picture(out, images.Picture(rgb=gray + heat * 0.8 * (red - gray)))
    print(f"heat map: {images.printable(out)}")


# ---- command -----------------------------------------------------------------------------------------------


def strength(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("the strength lies between 0 and 1")
    return value


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: python detect.py measure held_out --detector runs/detector/detector.safetensors")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, description):
        p = commands.add_parser(run.__name__, help=description, description=description + ".")
        p.set_defaults(run=run)
        p.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
        return p

    p = command(train, "train a detector on clean pictures with drawn artifacts")
    p.add_argument("--data", nargs="+", required=True, metavar="DIR",
                   help="folders of clean pictures, or patch files of data.py")
    p.add_argument("--val", metavar="DIR",
                   help="pictures to validate on (default: a tenth of --data, which is then not trained on)")
    p.add_argument("--out", "-o", default="runs/detector", metavar="DIR",
                   help="run folder (default: %(default)s)")
    p.add_argument("--overwrite", action="store_true", help="start again in an existing run folder")
    p.add_argument("--weights", metavar="FILE", help="continue from this detector, with fixed batch norms")
    p.add_argument("--steps", type=int, default=2200, help="optimizer steps (default: %(default)s)")
    p.add_argument("--batch", type=int, default=32,
                   help="pictures per step: 4 versions of each crop (default: %(default)s)")
    p.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    p.add_argument("--crop-candidates", type=int, default=4, metavar="N",
                   help="take the crop with most detail of N (default: %(default)s)")
    p.add_argument("--val-every", type=int, metavar="N",
                   help="steps between reports (default: a tenth of the run)")
    p.add_argument("--workers", type=int, default=1,
                   help="processes that draw artifacts (default: %(default)s)")
    p.add_argument("--amp", choices=("bf16", "off"), default="off", help="precision (default: off, float32)")
    p.add_argument("--seed", type=int, default=0, help="of weights, crops and artifacts (default: 0)")

    p = command(measure, "measure a detector on clean pictures and on drawn artifacts")
    p.add_argument("folder", metavar="DIR", help="clean pictures that the detector was not trained on")
    p.add_argument("--strength", type=strength, default=0.5, help="of the artifacts, 0 to 1 (default: 0.5)")
    p.add_argument("--seed", type=int, default=12345, help="of the artifacts (default: 12345)")
    detector_help = "weights (default: weights/detector.safetensors)"
    p.add_argument("--detector", metavar="FILE", help=detector_help)

    p = command(inspect, "show which artifacts are in a picture, and where")
    p.add_argument("picture", metavar="PICTURE")
    p.add_argument("--detector", metavar="FILE", help=detector_help)
    p.add_argument("--out", "-o", type=Path, help="heat map (default: PICTURE-artifacts.png in this folder)")
    p.add_argument("--overwrite", action="store_true", help="replace the heat map")
    return parser.parse_args(argv)


def main():
    sys.stdout.reconfigure(errors="backslashreplace")       # a console may be unable to show a Japanese name
    args = parse()
    run = args.run
    del args.run            # the other settings are saved as JSON
    if run is train and args.val_every is None:
        args.val_every = max(1, args.steps // 10)
    try:
        run(args)
    except (images.UserError, LossError) as error:
        images.fail(error)
    except OSError as error:
        images.fail(f"{error.filename}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from the last report", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
