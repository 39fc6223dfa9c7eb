"""Trains HAT and its refiner, in three stages:

    python train.py --stage 1 --patch 64                                    # draws demo pictures and learns from them
    python train.py --stage 1 --data wallpapers --val held_out --preset low --out runs/mine
    python train.py --stage 2 --data wallpapers --val held_out --weights runs/mine/best.safetensors

Stage 1, foundation: HAT alone on patches. Stage 2, tiling adaptation: HAT tile by tile and the refiner, gradients through
both. Stage 3, artifact removal: HAT frozen, the refiner alone learns what tiles leave behind.
    torchrun --nproc_per_node=2 train.py --stage 1 ...                      # several GPUs, or one process for each CPU core

One run is one folder; the same command again goes on where it stopped, to the bit (same machine, CPU, fp32).
Needs torch, numpy, pillow and every other file of this folder but scrape.py.
"""
import argparse
import csv
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import data
import degrade
import evaluate
from demo import draw_demo
from losses import Charbonnier
from model import PRESETS, HATRefiner, load_into, save, write_atomic
from tile import Tiler, bf16_is_native, find_pictures, keep_freed_memory

STAGES = {   # what a stage sets where no flag says otherwise
    1: dict(patch=64, tiling=False, lr=1e-3, conv_lr=0.3, train=("hat_model",)),
    2: dict(patch=128, tiling=True, lr=2e-5, conv_lr=1.0, train=("hat_model", "residual_block", "out_conv")),
    3: dict(patch=256, tiling=True, lr=1e-5, conv_lr=1.0, train=("residual_block", "out_conv")),
}
# Adam moves every weight by the learning rate, so a sum over n inputs moves by n times as much. A 3x3 convolution of HAT
# sums over some 550 inputs, a linear layer over 60: at one rate for all the convolutions throw the picture about.
DEMO = Path("demo")
MAY_CHANGE = {"device", "workers", "compile", "checkpoint", "every", "val_count", "overwrite", "ranks"}   # when a run is resumed


class UserError(ValueError):
    """A mistake in what was asked for; the message is one line."""


def parse(argv=None):
    p = argparse.ArgumentParser(
        description="Trains HAT and its refiner. With no --data it draws demo pictures and learns from those.",
        epilog="example: python train.py --stage 1 --patch 64 --data wallpapers --val held_out --out runs/mine",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    a = p.add_argument
    a("--stage", type=int, choices=STAGES, required=True, help="1 foundation, 2 tiling adaptation, 3 refiner only")
    a("--patch", type=int, help="side of an LR patch [64, 128, 256 by stage]", default=argparse.SUPPRESS)
    a("--data", nargs="+", help="folders of HR pictures [drawn demo pictures]", default=argparse.SUPPRESS)
    a("--val", help="folder of HR pictures to validate on, never trained on", default=argparse.SUPPRESS)
    a("--recipe", default="bicubic", help=f"degradation: {', '.join(degrade.RECIPES)}, or a mix such as web:0.7,bicubic:0.3")
    a("--preset", choices=PRESETS, default="low", help="size of the network")
    a("--scale", type=int, choices=(2, 3, 4), default=2, help="scale factor")
    a("--init", choices=("warm", "plain"), default="warm", help="warm: start as an interpolation; plain: HAT's usual start")
    a("--weights", help="start from this file (stages 2 and 3: the stage before)", default=argparse.SUPPRESS)
    a("--steps", type=int, help="optimiser steps [400 on a CPU, 50000 on a GPU]", default=argparse.SUPPRESS)
    a("--batch", type=int, help="patches per step and process [4 on a CPU, 16 on a GPU]", default=argparse.SUPPRESS)
    a("--busiest", type=int, default=1, help="each patch is the one with the most detail of so many random ones")
    a("--lr", type=float, help="learning rate at its highest [1e-3, 2e-5, 1e-5 by stage]", default=argparse.SUPPRESS)
    a("--conv-lr", type=float, help="learning rate of the 3x3 convolutions, as a share of --lr [0.3, 1, 1 by stage]",
      default=argparse.SUPPRESS)
    a("--warmup", type=int, default=20, help="steps over which the learning rate rises")
    a("--eps", type=float, default=0.1, help="Charbonnier's: errors below it count by their square. Near 0 it is L1, under "
      "which a hair of wrong colour in flat areas drowns what lines and texture teach")
    a("--clip", type=float, default=0.5, help="largest norm of the gradient")
    a("--ema", type=float, default=0.999, help="decay of the averaged weights, which are the ones saved")
    a("--tile-size", type=int, default=64, help="LR pixels a tile advances (stages 2 and 3)")
    a("--tile-pad", type=int, default=32, help="LR pixels a tile sees around that")
    a("--amp", choices=("bf16", "off"), help="precision [bf16 where the device has it]", default=argparse.SUPPRESS)
    a("--compile", action="store_true", help="compile HAT's blocks: slow to start, then faster")
    a("--checkpoint", action="store_true", help="recompute activations in backward: slower, far less memory")
    a("--workers", type=int, default=1, help="processes that make batches")
    a("--every", type=int, help="steps between reports [a tenth of the run]", default=argparse.SUPPRESS)
    a("--val-count", type=int, default=8, help="validation pictures to use at most, 0 for all")
    a("--out", help="run folder [runs/stageN-PRESET-SCALEx]", default=argparse.SUPPRESS)
    a("--seed", type=int, default=0, help="of weights, patches, crops and degradations")
    a("--device", help="cuda, mps or cpu [the best there is]", default=argparse.SUPPRESS)
    a("--overwrite", action="store_true", help="start anew in a run folder that is there")
    args = p.parse_args(argv)

    def default(name, value):
        if not hasattr(args, name):
            setattr(args, name, value)
    stage = STAGES[args.stage]
    default("device", "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    cpu = args.device == "cpu"
    amp = "bf16" if bf16_is_native(torch.device(args.device)) else "off"
    for name, value in dict(patch=stage["patch"], lr=stage["lr"], conv_lr=stage["conv_lr"], steps=400 if cpu else 50000, batch=4 if cpu else 16,
                            data=None, val=None, weights=None, amp=amp,
                            out=f"runs/stage{args.stage}-{args.preset}-{args.scale}x").items():
        default(name, value)
    default("every", max(1, args.steps // 10))
    return args


def check(args):
    """The mistakes that can be seen before anything is read."""
    window = PRESETS[args.preset]["window"]
    if args.patch < window or args.patch % window:
        raise UserError(f"--patch {args.patch} does not fit preset {args.preset}: take a multiple of its window, {window}")
    if STAGES[args.stage]["tiling"] and args.tile_size % window:
        raise UserError(f"--tile-size {args.tile_size} is no multiple of the window of preset {args.preset}, {window}")
    for name in ("steps", "batch", "every", "busiest"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.stage > 1 and not args.weights:
        raise UserError(f"stage {args.stage} builds on the stage before: name its file with --weights")
    if args.data and not args.val:
        raise UserError("--data without --val: name a folder of pictures that are not trained on")
    for folder in [*(args.data or []), *([args.val] if args.val else [])]:
        if not Path(folder).is_dir():
            raise UserError(f"no folder {folder}")
    degrade.shares(args.recipe)


# ----------------------------------------------------------------------------------------------------------------------
# the run folder


def open_run(args, rank, ranks):
    """Makes or reopens the run folder (rank 0 of ranks). Returns what state.pt holds, or None for a fresh run."""
    if rank:
        dist.barrier()
        return read_state(Path(args.out))
    out = Path(args.out)
    asked = {**vars(args), "ranks": ranks}
    if (out / "args.json").exists() and not args.overwrite:
        was = json.loads((out / "args.json").read_text())
        changed = [k for k in asked if asked[k] != was.get(k) and k not in MAY_CHANGE]
        if was.get("ranks", 1) != ranks:
            print(f"{out} was made by {was.get('ranks', 1)} processes and goes on with {ranks}: the batch is {ranks} x "
                  f"{args.batch} patches now, and the result another than that of an unbroken run")
        if changed:
            raise UserError(f"{out} was made with other settings ({', '.join(f'--{k} {was.get(k)}' for k in changed)}); "
                            "name another folder with --out, or start anew in it with --overwrite")
    elif out.exists() and args.overwrite:
        for name in ("state.pt", "best.safetensors", "last.safetensors", "log.csv", "curves.png"):
            (out / name).unlink(missing_ok=True)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    write_atomic(out / "args.json", json.dumps(asked, indent=1).encode())
    state = read_state(out)
    if ranks > 1:
        dist.barrier()
    return state


def read_state(out):
    if not (out / "state.pt").exists():
        return None
    try:
        return torch.load(out / "state.pt", map_location="cpu", weights_only=True)
    except Exception as e:
        raise UserError(f"{out / 'state.pt'} cannot be read ({type(e).__name__}); --overwrite starts anew") from None


def write_state(path, state):
    buffer = io.BytesIO()       # torch.save to a full disk raises what nobody understands; this raises OSError
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def write_png(path, picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def write_log(out, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "log.csv", text.getvalue().encode())
    write_png(out / "curves.png", draw_curves(rows))


def draw_curves(rows):
    """Loss and validation PSNR over steps, one under the other, as a Pillow picture."""
    w, h, left, top = 720, 240, 70, 24
    picture = Image.new("RGB", (w, 2 * h), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, title) in enumerate((("pix", "loss (pix)"), ("psnr_y", "validation PSNR-Y, dB"))):
        xs, ys = [r["step"] for r in rows], [float(r[name]) for r in rows]
        lo, hi = min(ys), max(ys)
        hi = hi if hi > lo else lo + 1e-9

        def at(x, y):
            return (left + (w - left - 20) * x / max(xs[-1], 1), i * h + h - top - (h - 2 * top) * (y - lo) / (hi - lo))
        for k in range(5):
            y = lo + (hi - lo) * k / 4
            draw.line([at(0, y), at(xs[-1], y)], fill=(225, 225, 225))
            draw.text((4, at(0, y)[1] - 6), f"{y:.4g}", fill="black")
            x = xs[-1] * k / 4
            draw.text((at(x, lo)[0] - 8, at(x, lo)[1] + 6), f"{x:.0f}", fill="black")
        draw.text((left, i * h + 4), title, fill="black")
        draw.line([at(x, y) for x, y in zip(xs, ys)] * (2 if len(xs) == 1 else 1), fill=(200, 40, 90), width=2)
    return picture


# ----------------------------------------------------------------------------------------------------------------------
# validation


class Validation:
    """Whole pictures, degraded once; bicubic's figures beside the model's. Several ranks share them out."""

    def __init__(self, args, paths, rank=0, ranks=1):
        if args.val_count and len(paths) > args.val_count:      # spread over the folder
            paths = [paths[i * len(paths) // args.val_count] for i in range(args.val_count)]
        self.pictures = list(evaluate.pairs(paths[rank::ranks], args.recipe, args.scale, args.seed))
        self.ranks, self.scale, self.device = ranks, args.scale, args.device
        bicubic = self.everyones([self.score(degrade.resize(lr[None], hr.shape[-2:])[0], hr) for _, lr, hr in self.pictures])
        self.count = len(bicubic)
        if not bicubic:
            raise UserError(f"no usable picture in {args.val}")
        self.bicubic = self.mean(bicubic)

    def everyones(self, scores):
        parts = [scores]
        if self.ranks > 1:
            parts = [None] * self.ranks
            dist.all_gather_object(parts, scores)
        return [s for part in parts for s in part]

    def score(self, sr, hr):
        return evaluate.score(sr, hr, self.scale)

    @staticmethod
    def mean(scores):
        return {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}

    @torch.inference_mode()
    def run(self, model, amp):
        """Mean scores of a model, and a sample strip: LR bicubic | SR | HR of the busiest corner of some of its pictures
        (None without pictures)."""
        model.eval()
        scores, strips = [], []
        for _, lr, hr in self.pictures:
            x = lr[None].to(self.device)
            tiler = Tiler(256, 32) if x.shape[-1] * x.shape[-2] > 2 ** 19 else None
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                sr = model(x, tiler)[0].float().clamp(0, 1).cpu()
            scores.append(self.score(sr, hr))
            if len(strips) < 4:
                strips.append(self.strip(lr, sr, hr))
        model.train()
        scores = self.mean(self.everyones(scores))
        if not strips:
            return scores, None
        width = max(s.shape[1] for s in strips)
        return scores, Image.fromarray(np.concatenate([np.pad(
            s, ((0, 4), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]))

    def strip(self, lr, sr, hr, side=192):
        detail = (hr[:, 1:, 1:] - hr[:, :-1, :-1]).abs().mean(0)
        h, w = min(side, hr.shape[1]), min(side, hr.shape[2])
        busy = torch.nn.functional.avg_pool2d(detail[None], (max(1, h - 1), max(1, w - 1)), stride=16)[0]
        y, x = divmod(busy.argmax().item(), busy.shape[1])
        up = degrade.resize(lr[None], hr.shape[-2:])[0].clamp(0, 1)
        row = torch.cat([p[:, y * 16:y * 16 + h, x * 16:x * 16 + w] for p in (up, sr, hr)], 2)
        return (row.permute(1, 2, 0) * 255).round().byte().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def rate(step, args):
    """Learning rate: a linear rise, then half a cosine down to a hundredth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    t = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * t)))


def clock(seconds):
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}h{m % 60:02d}m" if m >= 60 else f"{m}m{s:02d}s"


def ranks_here(args):
    """(rank, number of ranks), those of torchrun if it started us; args.device becomes this rank's own."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    return rank, ranks


def train(args, rank, ranks):
    state = open_run(args, rank, ranks)
    say = print if rank == 0 else lambda *a, **k: None
    out, stage = Path(args.out), STAGES[args.stage]
    folders, val = args.data or [str(DEMO / "train")], args.val or str(DEMO / "val")
    if ranks > 1 and rank:
        dist.barrier()      # rank 0 draws and packs, the others find it done
    if not args.data and not (DEMO / "val").is_dir():
        print(f"no --data: drawing demo pictures into {DEMO}")
        draw_demo(DEMO, progress=data.progress)
    side = args.patch * args.scale
    size = max(256, -(-side * 3 // 2 // 64) * 64)       # room for a random crop in every patch
    name = f"{Path(folders[0]).name}-{zlib.crc32(json.dumps([str(Path(f).resolve()) for f in folders]).encode()):08x}-{size}"
    patches = data.pack(folders, Path("patches") / f"{name}.safetensors", size, min_side=side, log=say)
    if ranks > 1 and not rank:
        dist.barrier()
    validation = Validation(args, find_pictures([val]), rank, ranks)

    torch.manual_seed(args.seed)
    model = HATRefiner.from_preset(args.preset, args.scale, init=args.init)
    if args.weights and not state:
        load_into(model, args.weights)
    for name, part in model.named_children():
        part.requires_grad_(name in stage["train"])
    model.refine = args.stage > 1      # in stage 1 the model is plain HAT
    model.hat_model.checkpoint = args.checkpoint
    model.to(args.device, memory_format=torch.channels_last).train()
    ema = HATRefiner.from_preset(args.preset, args.scale)
    ema.load_state_dict(model.state_dict())
    ema.refine = model.refine
    ema.to(args.device, memory_format=torch.channels_last).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    averaged = [a for a, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    convs = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)}
    optimiser = torch.optim.Adam([dict(params=[p for p in trained if id(p) not in convs], share=1.0),
                                  dict(params=[p for p in trained if id(p) in convs], share=args.conv_lr)],
                                 lr=args.lr, betas=(0.9, 0.99), fused=True)
    step, best, rows, spent, total, count = 0, -1.0, [], 0.0, 0.0, 0        # total, count: of the loss since the last report
    if state:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        step, best, rows, spent, total, count = (state[k] for k in ("step", "best", "rows", "spent", "total", "count"))
    if args.compile:
        model.hat_model.compile_blocks()
    with warnings.catch_warnings():     # newer versions want the flag under another name
        warnings.simplefilter("ignore", FutureWarning)
        net = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if ranks > 1 else model

    amp = args.amp == "bf16"
    tiler = Tiler(args.tile_size, args.tile_pad) if stage["tiling"] else None
    loss_fn = Charbonnier(args.eps)
    header = dict(recipe=args.recipe, stage=args.stage, data=[Path(f).name for f in folders], seed=args.seed)

    def keep():
        if rank:
            return
        write_state(out / "state.pt", dict(
            step=step, best=best, rows=rows, spent=spent + time.time() - began, total=total, count=count,
            model=model.state_dict(),
            ema=ema.state_dict(), optimiser=optimiser.state_dict(), rng=torch.get_rng_state()))

    stop = []
    signals = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    say(f"{args.preset} {args.scale}x, {sum(p.numel() for p in trained):,} parameters trained, stage {args.stage}, "
        f"{f'{ranks} x ' if ranks > 1 else ''}{args.device} "
        f"{'bf16' if amp else 'fp32'}, {validation.count} validation pictures, "
        f"bicubic {validation.bicubic['psnr_y']:.2f} dB" + (f", going on at step {step}" if step else ""), flush=True)
    batches = data.Batches([patches], args.steps, args.batch, args.patch, args.scale, args.recipe, args.seed,
                           args.busiest, rank=rank, ranks=ranks)
    began = last = time.time()
    first, skipped, live = step, 0, sys.stderr.isatty() and not rank
    for lr, hr in data.loader(batches, step, args.workers):
        lr, hr = lr.to(args.device, non_blocking=True), hr.to(args.device, non_blocking=True)
        for group in optimiser.param_groups:
            group["lr"] = rate(step, args) * group["share"]
        with torch.autocast(lr.device.type, torch.bfloat16, enabled=amp):
            sr = net(lr, tiler)
        pix = loss_fn(sr, hr)
        report = (step + 1) % args.every == 0 or step + 1 == args.steps
        at_picture = torch.autograd.grad(pix, sr, retain_graph=True)[0].norm().item() if report else 0
        optimiser.zero_grad(set_to_none=True)
        pix.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        if torch.isfinite(norm):
            skipped = 0
            optimiser.step()
            decay = min(args.ema, (step + 1) / (step + 10))        # a short memory while the weights still run
            torch._foreach_lerp_(averaged, trained, 1 - decay)
        else:
            skipped += 1
            if skipped == 10:
                raise UserError(f"the gradient is not finite ten steps in a row, at step {step}; the last report's "
                                "state is kept: try a lower --lr or --amp off")
        step, total, count = step + 1, total + pix.item(), count + 1
        now = time.time()
        speed = (step - first) / (now - began)
        stopping = len(stop)
        if ranks > 1:       # all stop together, and the loss of a report is everyone's
            told = torch.tensor([stopping, total / ranks], dtype=torch.float64).to(args.device, torch.float32)
            dist.all_reduce(told)
            stopping, total = told[0].item() > 0, told[1].item() if report else total
        line = f"step {step}/{args.steps}  loss {total / count:.5f}  {speed * args.batch * ranks:.1f} patches/s  " \
               f"{clock((args.steps - step) / speed)} left"
        if live and now - last > 0.5:
            print(f"\r{line}   ", end="", file=sys.stderr, flush=True)
            last = now
        if report:
            scores, strip = validation.run(ema, amp)
        if report and rank:
            total, count = 0.0, 0
        elif report:
            rows.append(dict(step=step, pix=f"{total / count:.6f}", pix_grad=f"{at_picture:.3e}", lr=f"{rate(step - 1, args):.3e}",
                             patches_per_s=f"{speed * args.batch * ranks:.2f}", seconds=round(spent + now - began),
                             **{k: round(v, 4) for k, v in scores.items()}))
            gain = scores["psnr_y"] - validation.bicubic["psnr_y"]
            print(f"{chr(13) if live else ''}{line}  validation {scores['psnr_y']:.2f} dB ({gain:+.2f} over bicubic), "
                  f"SSIM {scores['ssim_y']:.4f}", flush=True)
            header.update(step=step, psnr_y=round(scores["psnr_y"], 3), bicubic_psnr_y=round(validation.bicubic["psnr_y"], 3))
            save(ema, out / "last.safetensors", header)
            if scores["psnr_y"] > best:
                best = scores["psnr_y"]
                save(ema, out / "best.safetensors", header)
            write_png(out / "samples" / f"step_{step:06d}.png", strip)
            write_log(out, rows)
            total, count = 0.0, 0
            keep()
        elif stopping:
            keep()
        if stopping:
            say(f"\nstopped at step {step}; the same command goes on from there", file=sys.stderr)
            sys.exit(130)
    for s, handler in signals.items():
        signal.signal(s, handler)
    final = validation.bicubic["psnr_y"]
    weights, val, recipe = (shlex.quote(str(x)) for x in (out / "best.safetensors", val, args.recipe))
    say(f"\ndone in {clock(spent + time.time() - began)}: {weights}, validation {best:.2f} dB PSNR-Y, "
          f"{best - final:+.2f} dB over bicubic ({final:.2f})\nnext:\n"
          f"  python tile.py {val} -o upscaled --weights {weights}\n"
          f"  python evaluate.py --data {val} --recipe {recipe} --weights {weights}")


def main():
    args = parse()
    keep_freed_memory()
    try:
        check(args)
        train(args, *ranks_here(args))
    except ValueError as e:     # UserError, WeightsError, PictureError, and what data and degrade say
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"error: {e.filename or args.out}: {e.strerror or e}; what was saved before is whole", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if not dist.is_initialized() or not any(w in str(e) for w in ("gloo", "NCCL", "Connection", "connection")):
            raise
        print(f"error: another process of this run is gone ({str(e).splitlines()[0][:200]}); start the same command again "
              "to go on from the last report", file=sys.stderr)
        os._exit(2)     # the communication library may hang in its own clean-up
    except KeyboardInterrupt:
        print("\nstopped before the first step", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
