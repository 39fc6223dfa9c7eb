"""The run folder of train.py: settings, training state, log, curves; with a command that compares runs.

    python runs.py runs/a runs/b                        # a table, and curves.png of both

    runs/NAME/args.json           settings                    log.csv     one row per report
              best.safetensors    see below                   curves.png  validation and losses over the steps
              last.safetensors    weights of the last report  samples/    bicubic | SR | HR
              state.pt            everything needed to resume

best.safetensors holds the weights with the best validation PSNR-Y. While the loss term adv is used, it holds
the weights of the last report, because a GAN may lower PSNR.
Every file is written completely or not at all: it is written under a temporary name and then renamed.
"""
import argparse
import csv
import io
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from images import UserError, atomic_path, fail, printable, write_atomic

# settings that may change when a run resumes
FREE_SETTINGS = {"amp", "compile", "device", "grad_checkpoint", "out", "overwrite", "val_every", "workers"}
NOT_LOSSES = {"step", "lr", "patches_per_s", "seconds", "memory_mib", "skipped", "ssim_y"}
COLORS = [(200, 40, 90), (30, 90, 200), (20, 140, 70), (200, 120, 0), (120, 60, 180), (0, 140, 160)]
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP = 720, 220, 70, 24     # size and margins of a panel, in pixels


@dataclass
class Progress:
    """The scalars of a run that state.pt keeps."""
    step: int = 0                           # finished optimizer steps
    best_psnr: float = -1.0                 # best validation PSNR-Y so far, dB
    seconds: float = 0.0                    # training time so far
    skipped_steps: int = 0                  # steps whose loss or gradient was not finite
    rows: list = field(default_factory=list)            # rows of log.csv
    loss_sums: dict = field(default_factory=dict)       # since the last report: {name: (sum, count)}

    def record(self, losses, finite):
        """Count one step. losses: {name: float}."""
        self.skipped_steps += not finite
        for name, value in losses.items() if finite else ():
            total, count = self.loss_sums.get(name, (0.0, 0))
            self.loss_sums[name] = total + value, count + 1

    def mean_losses(self):
        return {name: total / count for name, (total, count) in self.loss_sums.items()}


# ------------------------------------------------------------------ one run folder

class Run:
    """A run folder. Only start() and the save methods write files."""

    def __init__(self, folder, overwrite=False):
        self.folder, self.overwrite = Path(folder), overwrite

    def settings(self):
        """Read args.json. Returns the settings of the run that is resumed, or {} for a new run."""
        if self.overwrite or not (self.folder / "state.pt").exists():
            return {}
        return json.loads((self.folder / "args.json").read_text())

    def check_settings(self, settings):
        """Raise UserError if `settings` differ from those in args.json, or if weights would be overwritten.
        Settings that args.json lacks, such as a new flag, are not compared."""
        before = self.settings()
        changed = [name for name, value in settings.items()
                   if name in before and before[name] != value and name not in FREE_SETTINGS]
        if changed:
            old = ", ".join(f"--{name.replace('_', '-')} {before[name]}" for name in changed)
            raise UserError(f"{self.folder} was made with other settings ({old}); choose another folder "
                            "with --out, or start again in this one with --overwrite")
        weights = [p.name for p in self.folder.glob("*.safetensors")]
        if not before and weights and not self.overwrite:
            raise UserError(f"{self.folder} holds {weights[0]} but no state.pt; choose another folder with "
                            "--out, or replace its files with --overwrite")

    def load_state(self):
        """Read state.pt. Returns the saved dict with its Progress, or None for a new run."""
        if not self.settings():
            return None
        state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
        return {**state, "progress": Progress(**state["progress"])}

    def start(self, settings):
        """Create the folder and write args.json. Remove the files of an older run that is not resumed."""
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        if not self.settings():
            for pattern in "state.pt", "best.safetensors", "last.safetensors", "log.csv", "samples/step_*":
                for path in self.folder.glob(pattern):
                    path.unlink()
        write_atomic(self.folder / "args.json", json.dumps(settings, indent=1).encode())

    def save_state(self, state, progress):
        """Write state.pt. state: dict of state dicts. progress: Progress."""
        with atomic_path(self.folder / "state.pt") as part:
            torch.save({**state, "progress": asdict(progress)}, part)

    def save_log(self, rows):
        """Write log.csv and curves.png. Rows may have different columns."""
        text = io.StringIO()
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.folder / "log.csv", text.getvalue().encode())
        save_png(self.folder / "curves.png", draw_curves({self.folder.name: rows}))

    def save_samples(self, step, strips):
        """Save strips, a list of uint8 (h, w, 3), below each other in one PNG."""
        width = max((s.shape[1] for s in strips), default=0)
        padding = [((0, 4), (0, width - s.shape[1]), (0, 0)) for s in strips]
        rows = [np.pad(s, p, constant_values=255) for s, p in zip(strips, padding)]
        if rows:        # rank 0 has no picture if all its validation pictures are bad
            save_png(self.folder / "samples" / f"step_{step:06d}.png", Image.fromarray(np.concatenate(rows)))


def save_png(path, image):
    with atomic_path(path) as part:
        image.save(part, "PNG")


def newest_run(stage, preset, scale, folder="runs"):
    """Return the path of best.safetensors in the newest run of this stage. Raises UserError."""
    found = []
    for path in Path(folder).glob("*/args.json"):
        settings, best = json.loads(path.read_text()), path.with_name("best.safetensors")
        same = [settings.get(name) for name in ("stage", "preset", "scale")] == [stage, preset, scale]
        if same and best.exists():
            found.append(best)
    if not found:
        raise UserError(f"{folder}/ has no run of stage {stage} ({preset}, {scale}x): train that first, or "
                       "name a file with --weights")
    return str(max(found, key=lambda path: path.stat().st_mtime))


def clock(seconds):
    """Format a duration: 65 -> "1m05s", 3700 -> "1h01m"."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


def progress_text(progress, steps, fraction, patch_rate):
    """Return one line: step, losses, speed, time left.
    steps: number of steps of the run, or None. fraction: the finished part of the run, above 0."""
    losses = "  ".join(f"{name} {value:.5f}" for name, value in progress.mean_losses().items())
    left = clock(progress.seconds * max(0, 1 - fraction) / fraction)
    count = f"{progress.step}/{steps}" if steps else f"{progress.step}"
    return f"step {count}  {losses}  {patch_rate:.1f} patches/s  {left} left"


# ------------------------------------------------------------------ runs side by side

def read_log(folder):
    """Return the rows of log.csv as [{column: float}], without empty values. Raises UserError."""
    try:
        with open(Path(folder) / "log.csv", newline="") as file:
            return [{name: float(value) for name, value in row.items() if value}
                    for row in csv.DictReader(file)]
    except OSError as e:
        raise UserError(f"{printable(folder)} has no log.csv: {e.strerror}") from None


def draw_curves(runs):
    """Draw {name: rows of log.csv}: one panel for validation PSNR-Y and each loss, one line per run."""
    runs = {name: [{k: float(v) for k, v in row.items()} for row in rows] for name, rows in runs.items()}
    columns = [c for rows in runs.values() for row in rows for c in row
               if c not in NOT_LOSSES and not c.endswith("_grad")]
    columns = list(dict.fromkeys(["psnr_y", *columns]))
    image = Image.new("RGB", (PANEL_WIDTH, len(columns) * PANEL_HEIGHT), "white")
    for i, column in enumerate(columns):
        draw_panel(ImageDraw.Draw(image), i * PANEL_HEIGHT, column, runs)
    return image


def draw_panel(draw, top, column, runs):
    """Draw one panel of draw_curves(), from pixel row `top` on."""
    curves = {name: [(row["step"], row[column]) for row in rows if math.isfinite(row.get(column, math.nan))]
              for name, rows in runs.items()}
    values = [value for points in curves.values() for _, value in points]
    last_step = max([1, *(row["step"] for rows in runs.values() for row in rows)])
    low, high = min(values, default=0), max(values, default=1)
    high = high if high > low else low + 1e-9 * max(1, abs(low))

    def place(step, value):
        x = LEFT + (PANEL_WIDTH - LEFT - 20) * step / last_step
        y = top + PANEL_HEIGHT - TOP - (PANEL_HEIGHT - 2 * TOP) * (value - low) / (high - low)
        return x, y

    for k in range(5):
        value, step = low + (high - low) * k / 4, last_step * k / 4
        draw.line([place(0, value), place(last_step, value)], fill=(225, 225, 225))
        draw.text((4, place(0, value)[1] - 6), f"{value:.4g}", fill="black")
        draw.text((place(step, low)[0] - 8, place(step, low)[1] + 6), f"{step:.0f}", fill="black")
    title = "validation PSNR-Y, dB" if column == "psnr_y" else f"loss: {column}"
    draw.text((LEFT, top + 4), title, fill="black")
    for j, (name, points) in enumerate(curves.items()):
        color = COLORS[j % len(COLORS)]
        if points:
            draw.line([place(*p) for p in (points if len(points) > 1 else points * 2)], fill=color, width=2)
        if len(curves) > 1:
            draw.text((LEFT + 190 + 130 * (j % 3), top + 4 + 11 * (j // 3)), name[-20:], fill=color)


def compare(folders):
    """Print one line per run: length, last and best validation, settings that differ. Draw curves.png."""
    logs = {folder: read_log(folder) for folder in folders}
    settings = {folder: json.loads(Path(folder, "args.json").read_text()) for folder in logs}
    names = sorted({name for own in settings.values() for name in own} - FREE_SETTINGS - {"held_out"})
    width = max(map(len, logs)) + 2
    print(f"{'':{width}}{'steps':>8}{'seconds':>9}{'PSNR-Y':>9}{'SSIM-Y':>9}{'best':>9}{'at step':>9}"
          "  settings that differ")
    for folder, rows in logs.items():
        best, last = max(rows, key=lambda row: row["psnr_y"]), rows[-1]
        differences = [f"{name}={settings[folder].get(name)}" for name in names
                       if any(own.get(name) != settings[folder].get(name) for own in settings.values())]
        print(f"{printable(folder):{width}}{last['step']:8.0f}{last['seconds']:9.0f}{last['psnr_y']:9.2f}"
              f"{last['ssim_y']:9.4f}{best['psnr_y']:9.2f}{best['step']:9.0f}  {' '.join(differences)}")
    save_png("curves.png", draw_curves(logs))
    print("curves: curves.png")


def main():
    p = argparse.ArgumentParser(description="Compare training runs: a table, and their curves in curves.png.",
                                epilog="example: python runs.py runs/a runs/b")
    p.add_argument("folders", nargs="+", metavar="RUN", help="run folders")
    try:
        compare(p.parse_args().folders)
    except UserError as e:
        fail(e)


if __name__ == "__main__":
    main()
