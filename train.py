"""Trains HAT and its refiner, in three stages:

    python train.py --stage 1 --patch 64                                    # draws demo pictures and learns from them
    python train.py --stage 1 --data wallpapers --val held_out --preset low --out runs/mine
    python train.py --stage 1 --data wallpapers --compile --minutes 30       # a GPU that is yours for half an hour
    python train.py --detector --data wallpapers --val held_out              # the artifact detector of the losses
    python train.py --stage 2 --data wallpapers --val held_out --weights runs/mine/best.safetensors

Stage 1, foundation: HAT alone on patches. Stage 2, tiling adaptation: HAT tile by tile and the refiner, gradients through
both. Stage 3, artifact removal: HAT frozen, the refiner alone learns what tiles leave behind.
    torchrun --nproc_per_node=2 train.py --stage 1 ...                      # several GPUs, or one process for each CPU core

One run is one folder; the same command again goes on where it stopped, to the bit (same machine, CPU, fp32).
Needs torch, numpy, pillow, einops, safetensors and every other file of this folder but scrape.py.
"""
import argparse
import contextlib
import copy
import csv
import datetime
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import data
import degrade
import detect
import evaluate
import pairs
from losses import GANS, WEIGHTS, MultiScaleDiscriminator, SRLoss, discriminator_loss, enhance_lines, parse_weights
from model import PRESETS, HATRefiner, WeightsError, fit, read_weights, save, write_atomic
from images import find_pictures, picture_size
from tile import Tiler, bf16_is_native, keep_freed_memory, memory_peak, out_of_memory

STAGES = {   # what a stage sets where no flag says otherwise; of two: on a CPU, on a GPU
    1: dict(patch=("64", "64"), batch=(4, 16), steps=(400, 50000), use_tiling=False, lr=1e-3, conv_lr=0.3, train="hat_model"),
    2: dict(patch=("128", "128"), batch=(1, 8), steps=(200, 10000), use_tiling=True, lr=2e-5, conv_lr=1.0,
            train="hat_model,residual_block,out_conv"),
    3: dict(patch=("256", "256,384,512"), batch=(1, 4), steps=(200, 5000), use_tiling=True, lr=1e-5, conv_lr=1.0,
            train="residual_block,out_conv"),
}
# Adam moves every weight by the learning rate, so a sum over n inputs moves by n times as much. A 3x3 convolution of HAT
# sums over some 550 inputs, a linear layer over 60: at one rate for all the convolutions throw the picture about.
SERVES = {("pix", "luma", "art_cls", "art_feat"): ("eps", "eps_end", "rmse"),   # which terms a flag is for
          ("adv",): ("gan_after", "gan", "lr_d", "d_features", "r1"), ("edge", "adv"): ("mask",),
          ("art_cls", "art_feat"): ("detector",),
          ("edge",): ("edge_kernel",), ("perc",): ("perceptual", "vgg_weights", "anime_weights")}
DEMO = Path("demo")
FIRST = os.environ.get("RANK", "0") == "0"      # of torchrun's processes the one that speaks
MAY_CHANGE = {"device", "workers", "compile", "graphs", "checkpoint", "every", "val_count", "overwrite", "ranks", "keep", "patience",
              "tensorboard", "dry_run", "vgg_weights", "anime_weights", "detector"}   # when a run is resumed


class UserError(ValueError):
    """A mistake in what was asked for; the message is one line."""


def parse(argv=None):
    p = argparse.ArgumentParser(
        description="Trains HAT and its refiner. With no --data it draws demo pictures and learns from those.",
        epilog="example: python train.py --stage 1 --patch 64 --data wallpapers --val held_out --out runs/mine",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    a = p.add_argument
    a("--stage", type=int, choices=STAGES, default=argparse.SUPPRESS,
      help="1 foundation, 2 tiling adaptation, 3 refiner only; must be given")
    a("--patch", help="side of an LR patch, or several (256,384,512), one drawn for each step [64, 128, 256 by stage; "
      "on a GPU stage 3 draws from 256,384,512]", default=argparse.SUPPRESS)
    a("--data", nargs="+", action="extend", metavar="DIR", default=argparse.SUPPRESS,
      help="folders of HR pictures, or patch files of data.py; DIR/@0.3 makes 30%% of the patches come from there "
      "[drawn demo pictures]")
    a("--val", help="folder of HR pictures to validate on, never trained on [a tenth of --data, 8 at most, is set aside]",
      default=argparse.SUPPRESS)
    a("--recipe", default="bicubic", help=f"degradation: {', '.join(degrade.RECIPES)}, or a mix such as web:0.7,bicubic:0.3")
    a("--preset", choices=PRESETS, default="low", help="size of the network")
    a("--scale", type=int, choices=(2, 3, 4), default=2, help="scale factor")
    a("--init", choices=("warm", "plain"), default="warm", help="warm: start as an interpolation; plain: HAT's usual start")
    a("--drop-path", type=float, default=0.0, help="stochastic depth of the last block, growing from 0; HAT's authors use 0.1")
    a("--weights", help="start from this file (stages 2 and 3: the stage before)", default=argparse.SUPPRESS)
    a("--steps", type=int, help="optimiser steps [400, 200, 200 by stage; with --data on a GPU 50000, 10000, 5000]", default=argparse.SUPPRESS)
    a("--minutes", type=float, help="in place of --steps: train so long, the rate falling by the clock, and report ten times; "
      "what comes before the first step is not counted")
    a("--batch", type=int, help="patches per step and process, fewer of larger ones [4, 1, 1 by stage; GPU 16, 8, 4]",
      default=argparse.SUPPRESS)
    a("--accum", type=int, default=1, help="batches whose gradients are added up for one step")
    a("--busiest", type=int, default=4, help="each patch is the one with the most detail of so many random ones")
    a("--lr", type=float, help="learning rate at its highest [1e-3, 2e-5, 1e-5 by stage]", default=argparse.SUPPRESS)
    a("--conv-lr", type=float, help="learning rate of the 3x3 convolutions, as a share of --lr [0.3, 1, 1 by stage]",
      default=argparse.SUPPRESS)
    a("--optimiser", choices=("adam", "muon"), default="adam", help="muon: for the matrices of attention and MLP, whose steps "
      "it makes orthogonal; Adam for all else")
    a("--warmup", type=int, default=20, help="steps over which the learning rate rises")
    a("--loss", default="pix", help="terms and weights: pix=1,freq=0.3,edge=1,... of " + ", ".join(WEIGHTS) + "; a name alone gets its usual weight")
    a("--eps", type=float, default=0.1, help="of pix and luma (Charbonnier): errors below it count by their square. Near 0 "
      "it is L1, under which a hair of wrong colour in flat areas drowns what lines and texture teach")
    a("--eps-end", type=float, help="--eps glides to this over the run, by the same factor each step: a fast start and nearly L1 "
      "for the last tenths of a dB")
    a("--rmse", action="store_true", help="pix and luma of each patch's root mean square error, not of each value's: in a patch "
      "large errors count, as in PSNR, and patches alike, flat or not")
    a("--gan-after", type=int, default=0, help="steps before the adversarial term begins")
    a("--gan", choices=GANS, default="ragan", help="kind of adversarial loss")
    a("--lr-d", type=float, default=1e-4, help="learning rate of the discriminator")
    a("--d-features", type=int, help="width of the discriminator [16 on a CPU, 64 on a GPU]", default=argparse.SUPPRESS)
    a("--r1", type=float, default=0.0, help="weight of the discriminator's gradient penalty on real pictures")
    a("--mask", action="store_true", help="less weight of edge and adv where the picture is soft: bokeh, glow, gradients")
    a("--edge-kernel", type=int, default=3, help="side of the derivative filter of the term edge")
    a("--perceptual", choices=("vgg", "anime", "twin"), default="vgg", help="network of the term perc; twin: both")
    a("--sharpen-until", type=float, default=0.0, help="until this share of the steps every second target is line-enhanced")
    a("--vgg-weights", help="VGG19 for the term perc: a file, or torchvision to have it fetched", default=argparse.SUPPRESS)
    a("--anime-weights", help="ResNet50 trained on Danbooru tags, for the term perc", default=argparse.SUPPRESS)
    a("--detector", nargs="?", const="train", default=argparse.SUPPRESS, metavar="FILE", help="artifact detector for art_cls "
      "and art_feat [weights/detector.safetensors]; without FILE: train one, no --stage needed, and unless said otherwise "
      "2200 steps of 32 at --lr 3e-3 on the CPU into runs/detector")
    a("--clip", type=float, default=0.5, help="largest norm of the gradient")
    a("--ema", type=float, default=0.999, help="decay of the averaged weights, which are the ones saved")
    a("--train", help="modules that learn, by name [hat_model | hat_model,residual_block,out_conv | residual_block,out_conv by stage]",
      default=argparse.SUPPRESS)
    a("--freeze", default="", help="modules that do not, by name: hat_model, hat_model.layers.0, ...")
    a("--use-tiling", action="store_true", default=argparse.SUPPRESS, help="run HAT tile by tile [stages 2 and 3]")
    a("--no-tiling", dest="use_tiling", action="store_false", default=argparse.SUPPRESS, help="run HAT over whole patches [stage 1]")
    a("--tile-size", type=int, default=64, help="LR pixels a tile advances")
    a("--tile-pad", type=int, default=32, help="LR pixels a tile sees around that")
    a("--amp", choices=("bf16", "fp16", "off"), help="precision [bf16 where the device has it]", default=argparse.SUPPRESS)
    a("--compile", action="store_true", help="compile HAT's blocks: slow to start, then faster")
    a("--no-graphs", dest="graphs", action="store_false", help="on one NVIDIA GPU, untiled: launch every kernel anew; without this the "
      "network's forward and backward are recorded once and replayed as CUDA graphs")
    a("--checkpoint", action="store_true", help="recompute activations in backward: slower, far less memory")
    a("--workers", type=int, help="processes that make batches [1; on a GPU as many as there are cores, 8 at most]",
      default=argparse.SUPPRESS)
    a("--every", type=int, help="steps between reports [a tenth of the run, a fifth where it is tiled]", default=argparse.SUPPRESS)
    a("--val-count", type=int, default=8, help="validation pictures to use at most, 0 for all")
    a("--patience", type=int, default=0, help="stop after so many reports without a better validation; 0: never")
    a("--keep", type=int, default=0, help="weights of the last so many reports to keep beside best and last")
    a("--tensorboard", action="store_true", help="log there too, if that package is installed")
    a("--dry-run", action="store_true", help="try everything in a minute: data, steps, validation, saving, resuming; "
      "then say what the run would take")
    a("--out", help="run folder [runs/stageN-PRESET-SCALEx]", default=argparse.SUPPRESS)
    a("--seed", type=int, default=0, help="of weights, patches, crops and degradations")
    a("--device", help="cuda, mps or cpu [the best there is]", default=argparse.SUPPRESS)
    a("--overwrite", action="store_true", help="start anew in a run folder that is there; without it the same command goes on")
    args = p.parse_args(argv)
    given = {part.partition("=")[0].strip() for part in args.loss.split(",")}
    for terms, names in SERVES.items():
        for name in names:
            unset = p.get_default(name), "train"        # --detector alone
            if FIRST and not given & {*terms} and getattr(args, name, unset[0]) not in unset:
                print(f"note: --{name.replace('_', '-')} does nothing without {' or '.join(terms)} in --loss", file=sys.stderr)

    def default(name, value):
        if not hasattr(args, name):
            setattr(args, name, value)
    detector = getattr(args, "detector", None) == "train"
    if detector:        # has its own usual values
        for name, value in dict(stage=1, steps=2200, batch=32, lr=3e-3, device="cpu", out="runs/detector").items():
            default(name, value)
    elif not hasattr(args, "stage"):
        p.error("--stage is missing: 1, 2 or 3 (or --detector, to train the artifact detector)")
    stage = STAGES[args.stage]
    default("device", "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    on = args.device != "cpu"
    if args.minutes is not None and not detector:
        if hasattr(args, "steps"):
            p.error("--minutes stands in place of --steps: give one of them")
        default("steps", 10 ** 8)
        default("every", args.steps)
    for name, value in stage.items():       # demo pictures are no food for a long run, on whatever device
        long = on and (name != "steps" or hasattr(args, "data"))
        default(name, value[long] if isinstance(value, tuple) else value)
    own = f":{os.environ['LOCAL_RANK']}" if args.device == "cuda" and "LOCAL_RANK" in os.environ else ""
    try:        # each process on its own GPU, or all of them would hold memory on the first
        torch.zeros(1, device=args.device + own).item()     # of meta there is nothing to be had
    except (RuntimeError, AssertionError) as e:
        p.exit(2, f"error: --device {args.device}: {str(e).splitlines()[0].split('. ')[0]}\n")
    amp = "bf16" if bf16_is_native(torch.device(args.device)) else "off"
    for name, value in dict(data=None, val=None, weights=None, amp=amp, vgg_weights=None, anime_weights=None, detector=None,
                            workers=min(8, os.cpu_count() or 1) if on else 1, d_features=64 if on else 16,
                            out=f"runs/stage{args.stage}-{args.preset}-{args.scale}x").items():
        default(name, value)
    default("every", max(1, args.steps // (5 if args.use_tiling else 10)))     # tiled, a validation costs several times more
    return args


def check(args):
    """The mistakes that can be seen before anything is read."""
    window = PRESETS[args.preset]["window"]
    try:
        patches = [int(p) for p in args.patch.split(",")]
    except ValueError:
        raise UserError(f"--patch {args.patch} is no number and no list such as 256,384,512") from None
    for patch in patches:
        if patch < window or patch % window:
            raise UserError(f"--patch {patch} does not fit preset {args.preset}: take a multiple of its window, {window}")
    if args.use_tiling:
        if args.tile_size % window:
            raise UserError(f"--tile-size {args.tile_size} is no multiple of the window of preset {args.preset}, {window}")
        Tiler(args.tile_size, args.tile_pad, align=window)
    for names, right, said in (
            (("steps", "batch", "every", "busiest", "accum", "d_features"), lambda n: n >= 1, "at least 1"),
            (("seed", "workers", "patience", "keep", "val_count", "warmup", "gan_after"), lambda n: n >= 0, "0 or more"),
            (("clip", "eps", "eps_end", "lr", "conv_lr", "lr_d", "minutes"), lambda n: n is None or 0 < n < math.inf, "above 0, and finite"),
            (("ema", "drop_path"), lambda n: 0 <= n < 1, "0 or more, below 1"), (("seed",), lambda n: n < 2 ** 63, "less"),
            (("r1",), lambda n: 0 <= n < math.inf, "0 or more"), (("sharpen_until",), lambda n: 0 <= n <= 1, "0 to 1")):
        for name in names:
            if not right(getattr(args, name)):
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} does not work; use {said}")
    folders = [f for f, _ in folders_and_shares(args.data or [])]
    if not args.val and any(map(is_patch_file, folders)):
        raise UserError("a patch file without --val: name a folder of pictures that are not in it")
    for folder in [f for f in folders if not is_patch_file(f)] + ([args.val] if args.val else []):
        if not Path(folder).is_dir():
            raise UserError(f"no folder {folder}")
    degrade.shares(args.recipe)
    terms = parse_weights(args.loss)
    if [*terms] == ["adv"] and args.gan_after:
        raise UserError("--loss adv alone leaves nothing to learn before --gan-after: add pix")
    if "adv" in terms and min(patches) * args.scale < 32:
        raise UserError(f"--patch {min(patches)} is too small for --loss adv: its discriminator needs HR patches of 32 pixels")
    if args.detector == "train" and (args.dry_run or args.minutes or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        raise UserError("--detector trains in one process, for --steps, and has no --dry-run")
    if args.dry_run and int(os.environ.get("WORLD_SIZE", 1)) > 1:       # each process would have a folder of its own
        raise UserError("--dry-run is for one process: leave torchrun out")
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise UserError("--tensorboard needs that package: pip install tensorboard") from None


def is_patch_file(path):
    """One that data.py mine or pack has made, which --data takes as well as a folder."""
    return Path(path).suffix == ".safetensors" and Path(path).is_file()


def folders_and_shares(given):
    """["a", "b/@0.3"] -> [("a", None), ("b/", 0.3)]. Raises UserError."""
    found = []
    for text in given:
        folder, at, share = text.rpartition("@")
        if not at or Path(text).exists():
            found.append((text, None))
            continue
        try:
            found.append((folder, float(share)))
        except ValueError:
            raise UserError(f"--data {text}: behind the @ belongs a share such as 0.3") from None
    shares = [s for _, s in found if s is not None]
    if any(not 0 < s <= 1 for s in shares) or sum(shares) > 1 + 1e-9 or (sum(shares) >= 1 and len(shares) < len(found)):
        raise UserError("--data: shares lie between 0 and 1 and leave something for folders without one")
    return found


def stage_before(args):
    """The newest best.safetensors in runs/ of the stage before with this preset and scale. Raises UserError."""
    found = []
    for path in Path("runs").glob("*/best.safetensors"):
        try:
            header = read_weights(path, header_only=True)[1]
        except WeightsError:
            continue
        if (header.get("stage"), header.get("preset"), header.get("scale")) == (args.stage - 1, args.preset, args.scale):
            found.append(path)
    if not found:
        raise UserError(f"stage {args.stage} builds on stage {args.stage - 1}, and runs/ holds no such run of {args.preset} "
                        f"{args.scale}x: train that first, or name a file with --weights")
    return str(max(found, key=lambda p: p.stat().st_mtime))


def choose(model, learn, freeze):
    """Lets the named modules learn and nothing else. Raises UserError that lists the right names."""
    parts = {name: part for name, part in model.named_modules() if name}
    model.requires_grad_(False)
    for names, on in ((learn, True), (freeze, False)):
        for name in filter(None, (n.strip() for n in names.split(","))):
            if name not in parts:
                right = [n for n in parts if n.count(".") < 1 or (n.count(".") == 2 and ".layers." in n)]
                raise UserError(f"no module {name!r}; there are {', '.join(right)}, and what is in them")
            parts[name].requires_grad_(on)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("nothing is left to learn: --train and --freeze leave no parameter")


def refine(model):
    """Leaves the refiner out while it does not learn and has not learned."""
    out = model.out_conv
    model.refine = bool(out.weight.requires_grad or out.weight.any() or out.bias.any())


# ----------------------------------------------------------------------------------------------------------------------
# the run folder


def begun(args):
    """The settings of the run in --out that this command goes on with; {} where it has not come to its first state, and
    with --overwrite."""
    out = Path(args.out)
    if args.overwrite or not (out / "state.pt").exists() or not (out / "args.json").exists():
        return {}
    try:
        return dict(json.loads((out / "args.json").read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{out / 'args.json'} is no list of settings any more; name another folder with --out, and go on from "
                        f"{out / 'best.safetensors'} with --weights") from None


def open_run(args, rank, ranks):
    """Makes or reopens the run folder (rank 0 of ranks). Returns what state.pt holds, or None for a fresh run, for which
    an older one is left as it is: see start_anew."""
    if rank:
        dist.barrier()
        return None if args.overwrite else read_state(Path(args.out))
    out, was = Path(args.out), begun(args)
    asked = {**vars(args), "ranks": ranks}
    if was:
        changed = [k for k in asked if asked[k] != was.get(k) and k not in MAY_CHANGE]
        if was.get("ranks", 1) != ranks:
            print(f"{out} was made by {was.get('ranks', 1)} processes and goes on with {ranks}: the batch is {ranks} x "
                  f"{args.batch} patches now, and the result another than that of an unbroken run")
        if changed:
            said = ["other pictures of --val in --data" if k == "held_out" else f"--{k.replace('_', '-')} {was.get(k)}"
                    for k in changed]
            raise UserError(f"{out} was made with other settings ({', '.join(said)}); "
                            "name another folder with --out, or start anew in it with --overwrite")
    if not args.overwrite and not (out / "state.pt").exists():
        for name in ("best.safetensors", "last.safetensors", "log.csv"):
            if (out / name).exists():
                raise UserError(f"{out} holds a {name} but no state.pt to go on from; name another folder with --out, or "
                                "replace what it holds with --overwrite")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    for path in out.glob(".*.tmp"):     # of a save that was killed
        path.unlink(missing_ok=True)
    state = None if args.overwrite else read_state(out)
    if state:
        write_atomic(out / "args.json", json.dumps(asked, indent=1).encode())
    if ranks > 1:
        dist.barrier()
    return state


def start_anew(args, ranks):
    """The folder of a fresh run, all it needs found and read: with --overwrite what an older run left goes, the settings
    come."""
    out = Path(args.out)
    if args.overwrite:
        for old in ("state.pt", "*.safetensors", "log.csv", "curves.png", "samples/step_*.png", "tensorboard/events.*"):
            for path in [*out.glob(old)]:
                path.unlink()
    write_atomic(out / "args.json", json.dumps({**vars(args), "ranks": ranks}, indent=1).encode())


def without(args):
    """What belongs behind "the same command" where it goes on."""
    return ", without --overwrite," if args.overwrite else ""


def read_state(out):
    if not (out / "state.pt").exists():
        return None
    try:
        return torch.load(out / "state.pt", map_location="cpu", weights_only=True)
    except Exception as e:
        raise UserError(f"{out / 'state.pt'} cannot be read ({type(e).__name__}); go on from its best.safetensors with --weights "
                        "and another --out, or start anew with --overwrite, which deletes both") from None


def checkpoint_bytes(parts):
    """About what state.pt takes: the networks, and up to twice the trained one again for the optimisers."""
    nets = sum(p.numel() * 4 for part in parts.values() if isinstance(part, torch.nn.Module) for p in part.parameters())
    return nets + sum(8 * p.numel() for part in parts.values() if isinstance(part, torch.optim.Optimizer)
                      for group in part.param_groups for p in group["params"])


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
    names = dict.fromkeys(k for row in rows for k in row)       # some terms begin later than others
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "log.csv", text.getvalue().encode())
    write_png(out / "curves.png", evaluate.draw_curves({out.name: rows}))


# ----------------------------------------------------------------------------------------------------------------------
# validation


class Validation:
    """Whole pictures, degraded once; bicubic's figures beside the model's. Several ranks share them out."""

    def __init__(self, args, folder, rank, ranks):
        jobs = [(name, {"HR": path}) for name, path in pairs.listed(folder)]
        if args.val_count and len(jobs) > args.val_count:       # spread over the folder
            jobs = [jobs[i * len(jobs) // args.val_count] for i in range(args.val_count)]
        self.ranks, self.scale, self.device, self.pictures, bicubic = ranks, args.scale, args.device, [], []
        for name, lr, hr, _ in pairs.pictures(jobs[rank::ranks], args.scale, args.recipe, args.seed):
            try:
                score = evaluate.score(degrade.resize(lr[None], hr.shape[-2:])[0], hr, self.scale)
                if not all(map(math.isfinite, score.values())):     # one would make every mean infinite
                    raise ValueError("bicubic alone makes just this picture: nothing to measure")
                bicubic.append(score)
                self.pictures.append((lr, hr))
            except ValueError as e:     # too small
                pairs.report_skipped(name, e, None)
        bicubic = self.everyones(bicubic)
        self.count = len(bicubic)
        if not bicubic:
            raise UserError(f"no usable picture in {folder}")
        self.bicubic = self.mean(bicubic)

    def everyones(self, scores):
        parts = [scores]
        if self.ranks > 1:
            parts = [None] * self.ranks
            dist.all_gather_object(parts, scores)
        return [s for part in parts for s in part]

    @staticmethod
    def mean(scores):
        return {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}

    @torch.inference_mode()
    def run(self, model, amp, tiler):
        """Mean scores of a model, and a sample strip: LR bicubic | SR | HR of the busiest corner of some of its pictures
        (None without pictures)."""
        scores, strips = [], []
        for lr, hr in self.pictures:
            x = lr[None].to(self.device)
            large = x.shape[-1] * x.shape[-2] > 2 ** 19
            with torch.autocast(x.device.type, amp, enabled=amp is not None):
                sr = model(x, tiler or (Tiler(256, 32) if large else None))[0].float().clamp(0, 1).cpu()
            scores.append(evaluate.score(sr, hr, self.scale))
            if len(strips) < 4:
                strips.append(self.strip(lr, sr, hr))
        scores = self.mean(self.everyones(scores))
        if not strips:
            return scores, None
        width = max(s.shape[1] for s in strips)
        return scores, Image.fromarray(np.concatenate([np.pad(
            s, ((0, 4), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]))

    @staticmethod
    def strip(lr, sr, hr, side=192):
        detail = (hr[:, 1:, 1:] - hr[:, :-1, :-1]).abs().mean(0)
        h, w = min(side, hr.shape[1]), min(side, hr.shape[2])
        busy = torch.nn.functional.avg_pool2d(detail[None], (max(1, h - 1), max(1, w - 1)), stride=16)[0]
        y, x = divmod(busy.argmax().item(), busy.shape[1])
        up = degrade.resize(lr[None], hr.shape[-2:])[0].clamp(0, 1)
        return data.eight_bit(torch.cat([p[:, y * 16:y * 16 + h, x * 16:x * 16 + w] for p in (up, sr, hr)], 2))


# ----------------------------------------------------------------------------------------------------------------------
# the loop


class Muon(torch.optim.Optimizer):
    """Steps along the momentum with all its singular values brought near 1, so that what few patches teach moves the weights
    as far as what all do: Jordan et al. 2024, five Newton-Schulz steps.

    params: tensors (n, m, ...) or groups of them, seen as n x m matrices, m all that follows. Root mean square of a step:
    0.2 lr for each weight, about Adam's (Liu et al. 2025). torch.optim.Muon works in bf16 and one matrix at a time: on
    CPUs without bf16 a training step of low took a fifth longer with it than with this one."""

    def __init__(self, params, lr=1e-3, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.shape, p.device), []).append(p)
            for same in alike.values():
                grads, m = [p.grad for p in same], group["momentum"]
                for p in same:
                    if not self.state[p]:
                        self.state[p]["average"] = torch.zeros_like(p)
                averages = [self.state[p]["average"] for p in same]
                torch._foreach_lerp_(averages, grads, 1 - m)
                x = torch.stack(torch._foreach_lerp(grads, averages, m)).flatten(2)     # Nesterov's look ahead
                tall = x.shape[1] > x.shape[2]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    a = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
                    x = torch.baddbmm(x, a, x, beta=3.4445)
                x = (x.mT if tall else x).contiguous()      # for all to be added at once
                far = 0.2 * max(x.shape[1:]) ** 0.5 * group["lr"]
                torch._foreach_add_(same, [by.view_as(p) for p, by in zip(same, x)], alpha=-far)


def rate(step, done, args):
    """Learning rate: a linear rise, then half a cosine down to a hundredth. done: how much of the run is over, 0 to 1."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def rounding(done, args):
    """eps of the pixel loss: from --eps to --eps-end by the same factor each step."""
    return args.eps * ((args.eps_end or args.eps) / args.eps) ** min(1.0, done)


def memory(kind):
    """Most memory ever used, MiB: of the GPU, or of this process."""
    return (torch.cuda.max_memory_allocated() if kind == "cuda" else memory_peak(torch.device(kind))) / 2 ** 20


def few_threads(device):
    """Beside a GPU at most 4 threads: the CPU measures validation pictures, little at a time, and 16 threads of each of three
    runs on 16 cores were still at the first one after 45 s; with 2 threads each they trained by then."""
    if torch.device(device).type != "cpu":
        torch.set_num_threads(min(4, torch.get_num_threads()))


def replayed(net, shapes):
    """net(lr) in training for batches of these shapes alone, its forward and its backward a CUDA graph each (torch's
    make_graphed_callables, under the autocast of now, which must not cache): thousands of small kernels are told to the GPU at
    once. Gradients of parameters lie in the graph's own memory, so the next backward overwrites them. Raises UserError."""
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")      # recording has one of its own
    device = next(net.parameters()).device
    try:        # each shape in a module of its own, whose forward becomes the graph's
        graphs = {shape: torch.cuda.make_graphed_callables(torch.nn.Sequential(net), (torch.zeros(shape, device=device),),
                                                           allow_unused_input=True) for shape in shapes}
    except RuntimeError as e:
        if out_of_memory(e):
            raise
        raise UserError(f"--no-graphs is needed: this GPU cannot record the network ({str(e).splitlines()[0]})") from None
    return lambda lr: graphs[tuple(lr.shape)](lr)


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
        # rank 0 packs the pictures while the others wait
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo", timeout=datetime.timedelta(days=1))
    return rank, ranks


def set_aside(args):
    """Sets args.held_out, the pictures of --data that are validated on and not trained on, and args.val where there is none."""
    args.held_out, was = [], begun(args)
    folders = [f for f, _ in folders_and_shares(args.data or [])]
    if not args.val and was.get("held_out") and was.get("data") == args.data and Path(was["val"]).is_dir():
        args.val, args.held_out = was["val"], was["held_out"]       # as when the run began
    elif folders and not args.val:
        val, held = data.hold_out(folders, "patches")
        args.val, args.held_out = str(val), [str(p) for p in held]
        if FIRST:
            print(f"no --val: {len(held)} pictures of --data are set aside, the busiest parts are in {val}")
    elif folders and Path(args.val).is_dir():       # it may lie inside --data
        above = {Path(f).resolve() for f in folders}
        inside = [data.place_of(p) for p in find_pictures([args.val])]
        args.held_out = [str(p) for p in inside if above & {*p.parents}]
        if args.held_out and FIRST:
            print(f"{len(args.held_out)} pictures of --val lie in --data too; they are not trained on")


def patch_files(args, log, place="patches"):
    """Packs what --data names into the folder place; with no --data draws the demo pictures first. Returns (files, their shares
    or None)."""
    if not args.data and not (DEMO / "val").is_dir():
        print(f"no --data: drawing demo pictures into {DEMO}")
        data.draw_demo(DEMO, progress=data.progress)
    folders = folders_and_shares(args.data or [str(DEMO / "train")])
    sides = [int(p) * args.scale for p in args.patch.split(",")]
    size = max(256, -(-max(sides) * 3 // 2 // 64) * 64)        # room for a random crop in every patch
    shared = any(share is not None for _, share in folders)

    def packed(folders):
        code = zlib.crc32(json.dumps([str(Path(f).resolve()) for f in folders] + args.held_out).encode())
        name = f"{Path(folders[0]).name}-{code:08x}-{size}-{min(sides)}"
        return data.pack(folders, Path(place) / f"{name}.safetensors", size, min_side=min(sides), log=log,
                         without=map(Path, args.held_out))
    ready = [f for f, _ in folders if is_patch_file(f)]
    if not shared:
        rest = [f for f, _ in folders if f not in ready]
        return [Path(f) for f in ready] + ([packed(rest)] if rest else []), None
    files = [Path(f) if f in ready else packed([f]) for f, _ in folders]
    counts = [data.read_header(f)[1] for f in files]
    rest = 1 - sum(s for _, s in folders if s is not None)
    free = sum(n for n, (_, s) in zip(counts, folders) if s is None)
    return files, [rest * n / free if s is None else s for n, (_, s) in zip(counts, folders)]


def train(args, rank, ranks, until=None, place="patches"):
    """Trains to the end, or to step `until`; packs into the folder place. Returns what a dry run wants to know."""
    say = print if rank == 0 else lambda *a, **k: None
    if args.stage > 1 and not args.weights:
        args.weights = begun(args).get("weights") or stage_before(args)
        say(f"stage {args.stage} starts from {args.weights}")
    state = open_run(args, rank, ranks)
    out = Path(args.out)
    if rank:
        dist.barrier()      # rank 0 draws and packs, the others find it done
    files, shares = patch_files(args, say, place)
    if ranks > 1 and not rank:
        dist.barrier()
    val = args.val or str(DEMO / "val")
    validation = Validation(args, val, rank, ranks)

    torch.manual_seed(args.seed)
    model = HATRefiner.from_preset(args.preset, args.scale, init=args.init, drop_path=args.drop_path)
    if args.weights and not state:
        fit(model, read_weights(args.weights)[0], args.weights)
    choose(model, args.train, args.freeze)
    refine(model)
    if not model.refine and not any(p.requires_grad for p in model.hat_model.parameters()):
        raise UserError("behind an out_conv that is zero and does not learn, residual_block cannot learn either: add out_conv to --train")
    model.hat_model.checkpoint = args.checkpoint
    model.to(args.device, memory_format=torch.channels_last).train()
    ema = HATRefiner.from_preset(args.preset, args.scale)
    ema.load_state_dict(model.state_dict())
    ema.refine = model.refine
    ema.to(args.device, memory_format=torch.channels_last).requires_grad_(False).eval()
    learning = [p for p in model.parameters() if p.requires_grad]
    averaged = [a for a, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    convs = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)}
    matrices = {id(p) for p in learning if args.optimiser == "muon" and p.ndim == 2 and min(p.shape) >= 16}
    if args.optimiser == "muon" and not matrices:
        say("note: --optimiser muon does nothing here: no matrix of attention or MLP learns")
    optimisers = dict(optimiser=torch.optim.Adam(
        [dict(params=[p for p in learning if id(p) not in convs | matrices], share=1.0),
         dict(params=[p for p in learning if id(p) in convs], share=args.conv_lr)], lr=args.lr, betas=(0.9, 0.99), fused=True))
    if matrices:
        optimisers["muon"] = Muon([dict(params=[p for p in learning if id(p) in matrices], share=1.0)], args.lr)
    loss_fn = SRLoss(args.loss, args.eps, edge_kernel=args.edge_kernel, perceptual=args.perceptual, vgg_weights=args.vgg_weights,
                     anime_weights=args.anime_weights, detector=args.detector, gan=args.gan, mask=args.mask, rmse=args.rmse).to(args.device)
    weights = dict(loss_fn.weights)
    critic = critic_optimiser = None
    if "adv" in weights:
        critic = MultiScaleDiscriminator(args.d_features).to(args.device)
        critic_optimiser = torch.optim.Adam(critic.parameters(), lr=args.lr_d, betas=(0.9, 0.99), fused=True)
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    kind = torch.device(args.device).type
    scaler, critic_scaler = (torch.amp.GradScaler(kind, init_scale=2.0 ** 12, enabled=args.amp == "fp16") for _ in range(2))

    parts = dict(model=model, ema=ema, scaler=scaler, **optimisers)
    if critic:
        parts.update(critic=critic, critic_optimiser=critic_optimiser, critic_scaler=critic_scaler)
    # spent: seconds before this start. slow: halved at every roll-back. typical: usual distance of SR from HR.
    # sums: name -> (sum, number) of the losses since the last report. flat: reports without a better validation
    now = dict(step=0, best=-1.0, rows=[], spent=0.0, slow=1.0, typical=None, sums={}, flat=0, skipped=0)

    def restore(state):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        refine(model)
        ema.refine = model.refine
        torch.set_rng_state(state["rng"])
        now.update(state["now"])

    def keep():
        if rank == 0:
            write_state(out / "state.pt", dict(
                now={**now, "spent": now["spent"] + time.time() - began}, rng=torch.get_rng_state(),
                **{name: part.state_dict() for name, part in parts.items()}))

    if state:
        restore(state)
    elif rank == 0:
        need, free = 2 * checkpoint_bytes(parts), shutil.disk_usage(out).free     # the old one stays until the new is whole
        if free < need:
            raise UserError(f"{out}: {free / 2 ** 20:.0f} MiB free, but checkpoints take {need / 2 ** 20:.0f}; make room")
    if args.compile:
        model.hat_model.compile_blocks()
    with warnings.catch_warnings():     # newer versions want the flag under another name
        warnings.simplefilter("ignore", FutureWarning)
        share = partial(torch.nn.parallel.DistributedDataParallel, broadcast_buffers=False)
        net, judge = (share(m) if ranks > 1 and m else m for m in (model, critic))
    tiler = Tiler(args.tile_size, args.tile_pad, align=PRESETS[args.preset]["window"]) if args.use_tiling else None
    header = dict(preset=args.preset, recipe=args.recipe, stage=args.stage, seed=args.seed,
                  data=[Path(f).name for f, _ in folders_and_shares(args.data or ["demo"])])
    batches = data.Batches(files, args.steps * args.accum, args.batch, [int(p) for p in args.patch.split(",")], args.scale,
                           args.recipe, args.seed, args.busiest, shares, rank, ranks)
    # capture is no time for the thread that pins batches, so before there is one; summed gradients need memory of their own
    graphs = None
    if kind == "cuda" and args.graphs and ranks == args.accum == 1 and not tiler and not args.checkpoint:
        with torch.autocast(kind, amp, enabled=amp is not None, cache_enabled=False):
            graphs = replayed(model, [(batches.count(patch), 3, patch, patch) for patch in batches.patches])
    stop = []
    signals = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    say(f"{args.preset} {args.scale}x, {sum(p.numel() for p in learning):,} parameters learn, stage {args.stage}, "
        f"{f'{ranks} x ' if ranks > 1 else ''}{args.device} {args.amp if amp else 'fp32'}, {validation.count} validation "
        f"pictures, bicubic {validation.bicubic['psnr_y']:.2f} dB"
        + (f", going on at step {now['step']}" if now["step"] else ""), flush=True)
    began = last = time.time()
    used = done = now["spent"] / 60 / args.minutes if args.minutes else 0.0      # share of --minutes that is over
    first, end, live = now["step"], min(args.steps, until or args.steps), sys.stderr.isatty() and rank == 0
    patches, bad, took, judged = 0, 0, [], 0.0      # seen since this start; bad steps in a row; seconds of each; of a validation

    def flat():
        """Whether --patience has run out, in this run or before the same command was given again."""
        return 0 < args.patience <= now["flat"]

    if not state:
        if rank == 0:
            start_anew(args, ranks)
        keep()              # something to roll back to, and a full disk shows itself now
    board = None
    if args.tensorboard and rank == 0:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(str(out / "tensorboard"))
    while now["step"] < end and not flat() and used < 1:
        # a roll-back comes through here again: its batches begin anew too
        started = time.time()       # the time a step takes is from the end of the one before: its batch has to come, too
        stream = iter(data.loader(batches, now["step"] * args.accum, args.workers))
        for group in zip(*[stream] * args.accum):       # so many successive batches at a time
            step = now["step"]
            final = step + 1 == end or used >= 1
            report = final or (step + 1) % args.every == 0 or args.minutes and int(10 * used) > int(10 * done)
            done = used if args.minutes else step / max(1, args.steps - 1)      # share of the run that is over
            for optimiser in optimisers.values():
                optimiser.zero_grad(set_to_none=True)
                for g in optimiser.param_groups:
                    g["lr"] = rate(step, done, args) * g["share"] * now["slow"]
            loss_fn.pix.eps = rounding(done, args)
            adversarial = critic is not None and step >= args.gan_after
            if adversarial:
                critic_optimiser.zero_grad(set_to_none=True)
            values, distance, grads = {}, 0.0, {}
            loss_fn.weights = {k: w for k, w in weights.items() if k != "adv" or adversarial}
            for i, (lr, hr) in enumerate(group):
                lr, hr = lr.to(args.device, non_blocking=True), hr.to(args.device, non_blocking=True)
                target = hr
                if done < args.sharpen_until and step % 2 == 0:
                    target = enhance_lines(hr)
                together = i + 1 == len(group)      # ranks exchange gradients once a step
                with contextlib.nullcontext() if together or ranks == 1 else net.no_sync():
                    with torch.autocast(kind, amp, enabled=amp is not None):
                        sr = graphs(lr) if graphs else net(lr, tiler)
                        terms = loss_fn.terms(sr, target, lr, critic, hr)
                    if report and together:
                        aside = time.time()
                        grads = loss_fn.gradient_norms(sr, target, lr, critic, hr)
                        started += time.time() - aside
                    scaler.scale(sum(loss_fn.weights[k] * v for k, v in terms.items()) / len(group)).backward()
                    terms = {k: v.detach() for k, v in terms.items()}
                if adversarial:
                    with contextlib.nullcontext() if together or ranks == 1 else judge.no_sync():
                        with torch.autocast(kind, amp, enabled=amp is not None):
                            d_loss, d_stats = discriminator_loss(judge, sr, hr, args.gan, args.r1)
                        critic_scaler.scale(d_loss / len(group)).backward()
                    terms = {**terms, "d": d_loss.detach(), **d_stats}
                for name, value in terms.items():
                    values[name] = values.get(name, 0.0) + value / len(group)
                distance += (sr.detach().float() - hr).abs().mean() / len(group)
                patches += len(lr) * ranks
            for optimiser in optimisers.values():
                scaler.unscale_(optimiser)
            norm = torch.nn.utils.clip_grad_norm_(learning, args.clip)
            used = (now["spent"] + time.time() - began) / 60 / args.minutes if args.minutes else 0.0
            told = [float(len(stop) > 0), used, float(distance), *map(float, values.values())]    # not sooner: a GPU would be waited for
            if ranks > 1:       # all stop together, judge alike, and report everyone's mean
                told = torch.tensor(told, device=args.device) / ranks
                dist.all_reduce(told)
                told = told.tolist()
            stopping, used, distance, values = told[0] > 0, *told[1:3], dict(zip(values, told[3:]))
            finite = bool(torch.isfinite(norm)) and all(map(math.isfinite, told))
            away = finite and now["typical"] is not None and distance > max(8 * now["typical"], 0.1)
            bad = 0 if finite and not away else bad + 1
            if finite:
                for optimiser in optimisers.values():
                    scaler.step(optimiser)
                decay = min(args.ema, (step + 1) / (step + 10))        # a short memory while the weights still run
                with torch.no_grad():       # or every step would hang one more node onto the averages' history
                    torch._foreach_lerp_(averaged, learning, 1 - decay)
                if not away:
                    now["typical"] = distance if step == 0 else 0.98 * (now["typical"] or distance) + 0.02 * distance
                for name, value in values.items():
                    was, n = now["sums"].get(name, (0.0, 0))
                    now["sums"][name] = was + value, n + 1
            else:
                now["skipped"] += 1
            scaler.update()
            if adversarial:
                critic_scaler.unscale_(critic_optimiser)
                if torch.isfinite(torch.nn.utils.clip_grad_norm_(critic.parameters(), 10.0)):
                    critic_scaler.step(critic_optimiser)
                critic_scaler.update()
            if bad == 10:
                saved = read_state(out)
                if ranks > 1:       # all have read it before rank 0 writes it again
                    dist.barrier()
                if saved["now"]["slow"] < 2 ** -20:
                    raise UserError(f"nothing helps: at step {step} the run breaks at every rate; the last report's state is kept")
                spent, skipped = now["spent"], now["skipped"]
                restore(saved)
                bad, now["slow"], now["spent"], now["skipped"] = 0, now["slow"] / 2, spent, skipped
                keep()
                if ranks > 1:
                    dist.barrier()
                say(f"step {step}: ten bad steps in a row ({'it runs away' if away else 'not finite'}); back to step "
                    f"{now['step']} with the rate times {now['slow']:g}", flush=True)
                break
            now["step"] = step = step + 1
            took.append(time.time() - started)
            passed = time.time() - began
            speed = max(1, step - first) / passed
            mean = {name: total / n for name, (total, n) in now["sums"].items()}
            left = 60 * args.minutes * max(0.0, 1 - used) if args.minutes else (args.steps - step) / speed
            line = f"step {step}{'' if args.minutes else f'/{args.steps}'}  {'  '.join(f'{k} {v:.5f}' for k, v in mean.items())}  " \
                   f"{patches / passed:.1f} patches/s  {clock(left)} left"
            if live and time.time() - last > 0.5:
                print(f"\r{line}   ", end="", file=sys.stderr, flush=True)
                last = time.time()
            if report:
                judged = time.time()
                scores, strip = validation.run(ema, amp, tiler)
                judged = time.time() - judged
                better = scores["psnr_y"] > now["best"] or adversarial      # under a GAN PSNR falls while pictures gain
                if better:
                    now["flat"], now["best"] = 0, scores["psnr_y"]
                else:
                    now["flat"] += 1
                gain = scores["psnr_y"] - validation.bicubic["psnr_y"]
                row = dict(step=step, **{k: f"{v:.6g}" for k, v in mean.items()},
                           **{f"{k}_grad": f"{v:.3e}" for k, v in grads.items()},
                           lr=f"{rate(step - 1, done, args) * now['slow']:.3e}", patches_per_s=f"{patches / passed:.2f}",
                           seconds=round(now["spent"] + time.time() - began), memory_mib=round(memory(kind)),
                           skipped=now["skipped"], **{k: round(v, 4) for k, v in scores.items()})
                now["rows"].append(row)
                now["sums"] = {}
            if report and rank == 0:
                header.update(step=step, psnr_y=round(scores["psnr_y"], 3), bicubic_psnr_y=round(validation.bicubic["psnr_y"], 3))
                save(ema, out / "last.safetensors", header)
                if better:
                    save(ema, out / "best.safetensors", header)
                if args.keep:
                    save(ema, out / f"step_{step:06d}.safetensors", header)
                    for old in sorted(out.glob("step_*.safetensors"))[:-args.keep]:
                        old.unlink()
                if strip:
                    write_png(out / "samples" / f"step_{step:06d}.png", strip)
                write_log(out, now["rows"])
                if board:
                    for name, value in row.items():
                        board.add_scalar(name, float(value), step)
            if report or stopping:
                keep()
            if report and rank == 0:        # told once it is kept
                print(f"{chr(13) if live else ''}{line}  validation {scores['psnr_y']:.2f} dB ({gain:+.2f} over bicubic), "
                      f"SSIM {scores['ssim_y']:.4f}" + (f"  {now['skipped']} steps skipped" if now["skipped"] else ""), flush=True)
            if stopping:
                say(f"\nstopped at step {step}; the same command{without(args)} goes on from there", file=sys.stderr)
                sys.exit(130)
            if final or flat():
                break
            started = time.time()
    for s, handler in signals.items():
        signal.signal(s, handler)
    if board:
        board.close()
    if flat():
        say(f"validation has not risen for {args.patience} reports")
    if until:
        return dict(seconds=min(took, default=0.0), learning=sum(p.numel() for p in learning), memory=memory(kind),
                    parameters=sum(p.numel() for p in model.parameters()), judged=judged)
    best, bicubic = now["best"], validation.bicubic["psnr_y"]
    file, val, recipe = (shlex.quote(str(x)) for x in (out / "best.safetensors", val, args.recipe))
    say(f"\ndone in {clock(now['spent'] + time.time() - began)}: {file}, validation {best:.2f} dB PSNR-Y, "
        f"{best - bicubic:+.2f} dB over bicubic ({bicubic:.2f})\nnext:\n"
        f"  python tile.py {val} -o upscaled --weights {file}\n"
        f"  python evaluate.py --data {val} --recipe {recipe} --weights {file}")


def dry_run(args):
    """Three steps, a validation, a save and a resume on a few pictures in a folder that goes away; then the forecast."""
    real = copy.copy(args)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dry_run_", dir=Path(args.out).parent) as folder:
        args.out, args.every, args.val_count, args.overwrite, args.minutes = f"{folder}/run", args.steps, 1, False, None
        every = taken = 0       # pictures of --data, and how many of them are in the sample
        if args.data:       # a spread of a few pictures from each folder that are large enough, under the same shares
            samples, side = [], max(map(int, args.patch.split(","))) * args.scale
            for i, (f, share) in enumerate(folders_and_shares(args.data)):
                if not is_patch_file(f):
                    files = find_pictures([f])
                    step = max(1, len(files) // 6)
                    files = [p for k in range(step) for p in files[k::step]]    # a spread of six first
                    large = [*itertools.islice((p for p in files if min(picture_size(p)) >= side), 6)]
                    some, f = large or files[:6], Path(folder) / f"data{i}"
                    f.mkdir()
                    for k, path in enumerate(some):
                        (f / f"{k}{path.suffix}").symlink_to(path.resolve())
                    every, taken = every + len(files), taken + len(some)
                samples.append(str(f) if share is None else f"{f}@{share}")
            args.data = samples
        begun = time.time()
        args.gan_after = 0      # with all that will take time and memory
        once = train(args, 0, 1, until=2, place=f"{folder}/patches")
        found = train(args, 0, 1, until=3, place=f"{folder}/patches")
        found["seconds"] = once["seconds"]      # the third step waits for new workers
        size = sum(p.stat().st_size for p in Path(args.out).iterdir() if p.is_file()) / 2 ** 20
        packed = sum(p.stat().st_size for p in Path(folder).glob("patches/*.safetensors")) / 2 ** 20
        if taken:
            packed *= every / taken
    val_seconds = found["judged"] * len(find_pictures([real.val or DEMO / "val"])[:real.val_count or None])
    steps, reports = real.steps, real.steps // real.every
    if real.minutes:
        steps, reports = int(max(0.0, 60 * real.minutes - 10 * val_seconds) / found["seconds"]), 10
    total = steps * found["seconds"] + reports * val_seconds
    print(f"\nit works, resumed after 2 steps ({clock(time.time() - begun)} for all this)\n"
          f"{found['parameters']:,} parameters, {found['learning']:,} of them learn; {found['memory']:.0f} MiB at most; "
          f"a run folder takes {size:.0f} MiB and the samples, patches/ about {packed:,.0f} MiB more\n"
          f"{found['seconds']:.2f} s a step, {steps} steps with {reports} validations: about {clock(total)}")


def main():
    if hasattr(sys.stdout, "reconfigure"):      # a log in cp1252, a name in Japanese
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse()
    keep_freed_memory()
    few_threads(args.device)
    try:
        check(args)
        set_aside(args)
        if args.detector == "train":
            args.val = args.val or str(DEMO / "val")        # before the run's settings are compared and kept
            state = open_run(args, 0, 1)
            files, shares = patch_files(args, print)
            detect.train_detector(args, files, shares, state, partial(start_anew, args, 1))
        elif args.dry_run:
            dry_run(args)
        else:
            train(args, *ranks_here(args))
    except ValueError as e:     # UserError, WeightsError, PictureError, and what data and degrade say
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"error: {e.filename or args.out}: {e.strerror or e}; what was saved before is whole", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as e:
        lost = "DataLoader worker" in str(e)
        if out_of_memory(e) or lost:
            what = ("a process that makes batches was killed, most likely for want of memory: give --workers 0" if lost else
                    "out of memory: give a smaller --batch (and --accum in its place), a smaller --patch, or --checkpoint")
            print(f"error: {what}; what was saved before is whole", file=sys.stderr)
            sys.stderr.flush()
            os._exit(2)     # other processes of this run may wait for this one
        if not dist.is_initialized() or not any(w in str(e) for w in ("gloo", "NCCL", "Connection", "connection")):
            raise
        print(f"error: another process of this run is gone ({str(e).splitlines()[0][:200]}); start the same command again"
              f"{without(args)} to go on from the last report", file=sys.stderr)
        os._exit(2)     # the communication library may hang in its own clean-up
    except KeyboardInterrupt:
        print(f"\nstopped; the same command{without(args)} goes on from the last report, if there was one", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
