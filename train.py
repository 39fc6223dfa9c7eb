"""Train HAT and its refiner in three stages.

    python train.py                                             # stage 1 on demo pictures that it draws
    python train.py --stage 1 --patch 64 --data wallpapers --out runs/mine
    python train.py --stage 2 --data wallpapers --weights runs/mine/best.safetensors
    python train.py --data wallpapers --compile --minutes 30    # half an hour on a GPU
    torchrun --nproc_per_node=2 train.py --data wallpapers      # one process for each GPU

    stage 1, foundation          HAT learns on patches
    stage 2, tiling adaptation   HAT runs tile by tile; HAT and the refiner learn
    stage 3, refiner             HAT is frozen; the refiner learns

One run is one folder (see runs.py). The same command again resumes it, to the bit on one machine in fp32.
"""
import argparse
import copy
import datetime
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import degrade
import demo
import pairs
from images import ProgressLine, UserError, fail, find_pictures, to_uint8
from losses import LossError, MultiScaleDiscriminator, SRLoss, discriminator_loss, parse_loss
from metrics import score
from model import PRESETS, HATRefiner, WeightsError, fit_weights, read_weights, save
from optim import build_optimizers, learning_rate, set_learning_rate
from runs import Progress, Run, clock, newest_run, progress_text
from tile import Tiler, pick_device

try:
    import fast         # optional: the same results in less time
except ImportError:
    fast = None

# the defaults of each stage; on CUDA and MPS those of GPU replace some of them
STAGES = {
    1: dict(patch=[64], batch=2, steps=560, use_tiling=False, freeze="residual_block,out_conv", lr=2e-3),
    2: dict(patch=[128], batch=1, steps=200, use_tiling=True, freeze="", lr=2e-5),
    3: dict(patch=[256], batch=1, steps=200, use_tiling=True, freeze="hat_model", lr=1e-5),
}
GPU = {1: dict(batch=16, steps=50000), 2: dict(batch=8, steps=10000),
       3: dict(batch=4, steps=5000, patch=[256, 384, 512])}
CONV_LR_SCALE = {1: 0.3, 2: 1.0, 3: 1.0}    # by stage: factor on the learning rate of 3x3 convolutions
WARMUP = 20                     # steps over which the learning rate rises
MAX_GRAD_NORM = 0.5
CALM_FRACTION = 2 / 3           # after this part of the run, half as many crop candidates: more flat areas
LR_DISCRIMINATOR = 1e-4
MAX_GRAD_NORM_DISCRIMINATOR = 10.0
MAX_BAD_STEPS = 10              # steps in a row whose loss or gradient is not finite; then the run stops
STATE_SECONDS = 600             # state.pt is saved at least this often
REPORTS = 10                    # validations in a run; with --steps and tiling, which is slow, half as many
MANY_STEPS = 10 ** 8            # value of --steps in a run with --minutes
DEMO = Path("demo")
PATCHES = Path("patches")       # packed patch files


# ------------------------------------------------------------------ flags

def sides(text):        # "256,384" -> [256, 384]
    return [int(side) for side in text.split(",")]


def parse(argv=None):
    p = argparse.ArgumentParser(
        description="Train HAT and its refiner. Without --data it draws demo pictures and trains on those.",
        epilog="example: python train.py --stage 1 --patch 64 --data wallpapers --out runs/mine")
    a = p.add_argument_group("data").add_argument
    path = os.path.normpath     # removes a slash at the end, so that resuming compares equal paths
    a("--data", nargs="+", action="extend", type=path, metavar="DIR", help="folders of HR pictures, or patch "
      "files of data.py; DIR@0.3 takes 30%% of the patches from there (default: demo pictures)")
    a("--val", type=path, metavar="DIR", help="validation pictures, or a folder with hr/ and lr/ (default: a "
      "tenth of --data, at most 8 pictures, is held out)")
    a("--val-count", type=int, default=8, metavar="N", help="use at most N of them, or 0: all (default: 8)")
    a("--recipe", default="bicubic", help=f"degradation: {', '.join(degrade.RECIPES)}, or a mix such as "
      "web:0.7,bicubic:0.3 (default: bicubic)")
    a("--crop-candidates", type=int, default=4, metavar="N", help="each patch is the most detailed of N "
      "random crops; half as many in the last third of the run (default: 4)")
    a("--workers", type=int, metavar="N", help="processes that make batches (default: 1; GPU: up to 8)")
    a = p.add_argument_group("model").add_argument
    a("--preset", choices=PRESETS, default="low", help="network size (default: low)")
    a("--scale", type=int, choices=(2, 3, 4), default=2, help="scale factor (default: 2)")
    a("--weights", metavar="FILE", help="start from this file (default in stages 2 and 3: the newest run of "
      "the stage before)")
    a("--freeze", metavar="NAMES", help="modules that do not learn, such as hat_model.layers.0 (default by "
      "stage: residual_block,out_conv; none; hat_model)")
    a = p.add_argument_group("schedule").add_argument
    a("--stage", type=int, choices=STAGES, default=1, help="1 foundation, 2 tiling, 3 refiner (default: 1)")
    a("--patch", type=sides, metavar="N", help="side of the LR patches, or sides such as 256,384,512; each "
      "step draws one (default by stage: 64, 128, 256; on a GPU in stage 3: 256,384,512)")
    a("--steps", type=int, help="optimizer steps (default by stage: 560, 200, 200; on a GPU with --data: "
      "50000, 10000, 5000)")
    a("--minutes", type=float, help="train for this long, instead of --steps")
    a("--batch", type=int, help="patches per process and batch; fewer if --patch draws a larger side "
      "(default by stage: 2, 1, 1; GPU: 16, 8, 4)")
    a("--grad-accum", type=int, default=1, metavar="N", help="batches per step (default: 1)")
    a("--lr", type=float, help="peak learning rate (default by stage: 2e-3, with adam 1e-3; 2e-5; 1e-5)")
    a("--optimizer", choices=("muon", "adam"), default="muon", help="muon: Muon for the matrices of "
      "attention and MLP, Adam for the rest (default: muon)")
    a("--ema", type=float, default=0.999, help="decay of the average, which is saved (default: 0.999)")
    a("--val-every", type=int, metavar="STEPS", help="steps between validations (default: a run "
      "has 10 validations; 5 with tiling and --steps)")
    a = p.add_argument_group("loss").add_argument
    a("--loss", default="rmse,luma", help="terms and weights, such as rmse=1,luma=1,edge=0.5; losses.py "
      "lists them (default: rmse,luma)")
    a("--gan-after", type=int, default=0, metavar="STEP", help="first step of the term adv; its "
      "discriminator learns from the start (default: 0)")
    a("--vgg-weights", metavar="FILE", help="VGG19 for the term perc")
    a("--anime-weights", metavar="FILE", help="ResNet50 trained on Danbooru tags, for the term perc")
    a("--detector", metavar="FILE", help="artifact detector for the terms art_cls and art_feat (default: "
      "weights/detector.safetensors)")
    a = p.add_argument_group("tiling").add_argument
    a("--use-tiling", action=argparse.BooleanOptionalAction, help="run HAT in tiles (default: stages 2, 3)")
    a("--tile-size", type=int, default=64, help="distance of the tiles in LR pixels (default: 64)")
    a("--tile-pad", type=int, default=32, help="LR pixels that a tile adds on each side (default: 32)")
    a = p.add_argument_group("speed").add_argument
    a("--device", help="cuda, mps or cpu (default: the best available)")
    a("--amp", choices=("bf16", "fp16", "off"), help="precision (default: bf16 if the device has it)")
    a("--compile", action="store_true", help="torch.compile for HAT: slow start, faster steps")
    a("--grad-checkpoint", action="store_true", help="recompute activations: slower, less memory")
    a = p.add_argument_group("run folder").add_argument
    a("--out", metavar="DIR", help="run folder (default: runs/stageN-PRESET-SCALEx)")
    a("--overwrite", action="store_true", help="start again in an existing run folder")
    a("--seed", type=int, default=0, help="seed of weights, crops and degradations (default: 0)")
    return complete(p.parse_args(argv))


def complete(args):
    """Check the flags. Set the defaults that depend on the stage and the device.
    Raises UserError, LossError, RecipeError."""
    degrade.parse_recipe(args.recipe)
    data.split_shares(args.data or [])
    if args.minutes and args.steps:
        raise UserError("give --minutes or --steps, not both")
    on_gpu = pick_device(args.device, args.amp)[0].type != "cpu"
    defaults = {**STAGES[args.stage], **(GPU[args.stage] if on_gpu else {})}
    if not args.data:
        defaults["steps"] = STAGES[args.stage]["steps"]         # more steps gain little on demo pictures
    if args.stage == 1 and args.optimizer == "adam":
        defaults["lr"] = 1e-3
    defaults["workers"] = min(8, os.cpu_count() or 1) if on_gpu else 1
    defaults["out"] = f"runs/stage{args.stage}-{args.preset}-{args.scale}x"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.val_every = args.val_every or max(1, args.steps // (REPORTS // 2 if args.use_tiling else REPORTS))
    if args.minutes:
        args.steps = MANY_STEPS
    if "adv" in parse_loss(args.loss) and args.gan_after >= args.steps:
        raise UserError(f"--gan-after {args.gan_after} is not below --steps {args.steps}: adv never begins")
    return args


# ------------------------------------------------------------------ setup

def init_distributed(device):
    """Return (rank, number of ranks): those of torchrun, or (0, 1). Only rank 0 prints."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:       # a long timeout, because rank 0 packs the pictures while the others wait
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
        if device.type == "cuda":
            torch.cuda.set_device(device)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, ranks


def choose_validation(args):
    """Set args.val, and args.held_out: the pictures of --data that are never trained on. Raises UserError."""
    folders, args.held_out = [folder for folder, _ in data.split_shares(args.data or [])], []
    if not folders:
        args.val = args.val or str(DEMO / "val")
    elif args.val:
        roots = [Path(folder).resolve() for folder in folders]
        args.held_out = [str(path) for path in find_pictures([args.val])
                         if any(path.resolve().is_relative_to(root) for root in roots)]
        if args.held_out:
            print(f"{len(args.held_out)} pictures of --val are also in --data; they are not trained on")
    elif all(folder.endswith(".safetensors") for folder in folders):
        raise UserError("--data has only patch files: give validation pictures by --val")
    else:
        folder, held_out = data.hold_out(folders, PATCHES, args.val_count or math.inf)
        args.val, args.held_out = str(folder), [str(path) for path in held_out]
        print(f"no --val: {len(held_out)} pictures of --data are held out, with smaller copies; see {folder}")


class Learner:
    """All objects that a training step changes: networks, averaged weights, optimizers, loss scaler.
    lr_shapes: the shapes of the LR batches. Raises UserError, WeightsError, LossError."""

    def __init__(self, args, device, amp, ranks, lr_shapes):
        self.args, self.device, self.amp = args, device, amp
        torch.manual_seed(args.seed)
        self.model = HATRefiner.from_preset(args.preset, args.scale)
        if args.weights:
            state = read_weights(args.weights)[0]
            misfits = fit_weights(self.model, state, args.weights, strict=False)
            if misfits:
                print(f"{args.weights}: {len(misfits)} tensors do not fit: {', '.join(misfits)}")
            if len(misfits) > len(state) / 2:
                raise UserError(f"{args.weights} does not fit preset {args.preset}")
        for name in filter(None, args.freeze.split(",")):
            try:
                self.model.get_submodule(name).requires_grad_(False)
            except AttributeError as e:
                raise UserError(f"--freeze {name}: {e}") from None
        out = self.model.out_conv
        self.model.use_refiner = bool(out.weight.requires_grad or out.weight.any() or out.bias.any())
        self.model.hat_model.grad_checkpoint = args.grad_checkpoint
        self.model.to(device, memory_format=torch.channels_last).train()
        window = self.model.hat_model.window
        self.tiler = Tiler(args.tile_size, args.tile_pad, align=window) if args.use_tiling else None

        # ---- averaged weights, optimizers
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.learning = [p for p in self.model.parameters() if p.requires_grad]
        self.averages = [a for a, p in zip(self.ema.parameters(), self.model.parameters()) if p.requires_grad]
        self.optimizers = build_optimizers(self.model, args.optimizer, CONV_LR_SCALE[args.stage])
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 12, enabled=amp == torch.float16)
        self.parts = dict(model=self.model, ema=self.ema, scaler=self.scaler, **self.optimizers)

        # ---- loss, discriminator
        self.loss = SRLoss(args.loss, vgg_weights=args.vgg_weights, anime_weights=args.anime_weights,
                           detector=args.detector).to(device)
        self.loss_weights = dict(self.loss.weights)
        self.discriminator, self.all_optimizers = None, [*self.optimizers.values()]
        if "adv" in self.loss_weights:
            self.discriminator = MultiScaleDiscriminator(64 if device.type != "cpu" else 16).to(device)
            self.all_optimizers.append(torch.optim.Adam(
                self.discriminator.parameters(), lr=LR_DISCRIMINATOR, betas=(0.9, 0.99), fused=True))
            self.parts.update(discriminator=self.discriminator,
                              discriminator_optimizer=self.all_optimizers[-1])

        # ---- compiled code, several processes, CUDA graphs
        if fast:
            fast.prepare(self.ema)
        if args.compile:
            self.model.hat_model.compile_blocks()
        self.ddp_model, self.ddp_discriminator, self.graphs = self.model, self.discriminator, None
        if ranks > 1:
            self.ddp_model = DistributedDataParallel(self.model, broadcast_buffers=False)
            if self.discriminator:
                self.ddp_discriminator = DistributedDataParallel(self.discriminator, broadcast_buffers=False)
        # a recorded backward overwrites the gradients, so gradient accumulation cannot use it
        can_capture = not (args.use_tiling or args.grad_checkpoint or args.grad_accum > 1 or ranks > 1)
        if fast and can_capture and device.type == "cuda":
            with torch.autocast("cuda", amp, enabled=amp is not None, cache_enabled=False):
                self.graphs = fast.capture_training_graphs(self.model, lr_shapes)

    def autocast(self):
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def state_dict(self):
        state = {name: part.state_dict() for name, part in self.parts.items()}
        return {**state, "rng": torch.get_rng_state()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            if state[name]:     # a loss scaler that was off saves nothing
                part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])


class BatchStream:
    """The batches of a run, in the order of the steps."""

    def __init__(self, args, files, shares, rank, ranks):
        self.args, self.position = args, None
        self.batches = data.Batches(files, args.steps * args.grad_accum, args.batch, args.patch, args.scale,
                                    args.recipe, args.seed, args.crop_candidates, shares, rank, ranks)
        size = self.batches.batch_size
        self.lr_shapes = [(size(side), 3, side, side) for side in self.batches.patches]

    def next_step(self, step, fraction):
        """Return the batches of a step, a list of (lr, hr). fraction: the finished part of the run."""
        calm = fraction >= CALM_FRACTION
        if self.position != (step, calm):       # the first step, or the first calm step
            self.batches.crop_candidates = math.ceil(self.args.crop_candidates / (2 if calm else 1))
            start = step * self.args.grad_accum
            self.loader = iter(data.make_loader(self.batches, start, self.args.workers))
        self.position = step + 1, calm
        return [next(self.loader) for _ in range(self.args.grad_accum)]


def set_up(args, device, amp, rank, ranks):
    """Find the data, build the networks, resume or start. -> (run, validation, stream, learner, progress)"""
    run = Run(args.out, args.overwrite)
    if args.stage > 1 and not args.weights:
        before = run.settings().get("weights")
        args.weights = before or newest_run(args.stage - 1, args.preset, args.scale)
        print(f"stage {args.stage} starts from {args.weights}")
    if rank > 0:
        dist.barrier()          # rank 0 draws and packs first
    choose_validation(args)
    settings = {**vars(args), "ranks": ranks}
    run.check_settings(settings)
    if not args.data and not (DEMO / "val").is_dir():
        print(f"no --data: drawing demo pictures into {DEMO}")
        demo.draw_demo(DEMO)
    folders, sides = args.data or [str(DEMO / "train")], [side * args.scale for side in args.patch]
    files, shares = data.pack_folders(folders, sides, args.held_out, PATCHES)
    if rank == 0 and ranks > 1:
        dist.barrier()
    validation = Validation(args, rank, ranks)
    stream = BatchStream(args, files, shares, rank, ranks)
    learner = Learner(args, device, amp, ranks, stream.lr_shapes)

    state, progress = run.load_state(), Progress()
    if state:
        learner.load_state_dict(state)
        progress = state["progress"]
    if ranks > 1:
        dist.barrier()          # all ranks have read the state
    if rank == 0:
        run.start(settings)
    parameters = sum(p.numel() for p in learner.learning)
    print(f"{args.preset} {args.scale}x, {parameters:,} parameters learn, stage {args.stage}, "
          f"{f'{ranks} x ' if ranks > 1 else ''}{device} {str(amp or 'fp32').removeprefix('torch.')}, "
          f"{validation.count} validation pictures, bicubic {validation.bicubic['psnr_y']:.2f} dB")
    if state:
        print(f"resumed at step {progress.step}")
    return run, validation, stream, learner, progress


# ------------------------------------------------------------------ one training step

def backward(learner, batches, adversarial, measure_gradients):
    """Run forward and backward for the batches of one step. The parameters accumulate the gradients.

    batches: list of (lr (B, 3, h, w), hr (B, 3, h * scale, w * scale)). adversarial: False leaves out the
    term adv; the discriminator learns in any case.
    Returns ({loss: unweighted value}, {loss: norm of its weighted gradient at the last SR, if measured})."""
    loss, scaler, discriminator = learner.loss, learner.scaler, learner.discriminator
    loss.weights = {name: w for name, w in learner.loss_weights.items() if name != "adv" or adversarial}
    losses = {}
    for lr, hr in batches:
        lr, hr = (x.to(learner.device, non_blocking=True) for x in (lr, hr))
        with learner.autocast():
            sr = learner.graphs(lr) if learner.graphs else learner.ddp_model(lr, learner.tiler)
            total, terms = loss(sr, hr, lr, discriminator)
        scaler.scale(total / len(batches)).backward()
        if discriminator:
            with learner.autocast():
                d_loss, d_statistics = discriminator_loss(learner.ddp_discriminator, sr, hr)
            scaler.scale(d_loss / len(batches)).backward()
            terms.update(d=d_loss, **d_statistics)
        for name, value in terms.items():
            losses[name] = losses.get(name, 0.0) + value.detach() / len(batches)
    return losses, loss.gradient_norms(sr, hr, lr, discriminator) if measure_gradients else {}


def clip_gradients(learner):
    """Undo the loss scaling and clip the gradients. Returns the norm before, summed over the networks."""
    for optimizer in learner.all_optimizers:
        learner.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(learner.learning, MAX_GRAD_NORM)
    if learner.discriminator:
        parameters = learner.discriminator.parameters()
        norm = norm + torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM_DISCRIMINATOR)
    return norm


def update(learner, step, finite):
    """If `finite`, update the weights and their averages. Clear the gradients."""
    for optimizer in learner.all_optimizers:
        if finite:
            learner.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    learner.scaler.update()
    if finite:
        decay = min(learner.args.ema, (step + 1) / (step + 10))     # a short average in the first steps
        with torch.no_grad():
            torch._foreach_lerp_(learner.averages, learner.learning, 1 - decay)


def mean_over_ranks(scalars, device, ranks):
    """{name: number or tensor} -> {name: float}, the mean over all ranks.
    Reading a value synchronizes the GPU, so all scalars of a step are read here, once."""
    if ranks > 1:
        values = [float(value) / ranks for value in scalars.values()]
        values = torch.tensor(values, dtype=torch.float64, device=device)       # seconds need more than fp32
        dist.all_reduce(values)
        return dict(zip(scalars, values.tolist()))
    return {name: float(value) for name, value in scalars.items()}


# ------------------------------------------------------------------ validation

class Validation:
    """Validation pictures and their bicubic scores. The LR pictures are made once, with a fixed seed."""

    def __init__(self, args, rank, ranks):
        self.scale, self.ranks, self.pictures, scores = args.scale, ranks, [], []
        folders = {"HR": Path(args.val, "hr"), "LR": Path(args.val, "lr")}
        self.recipe = None if all(folder.is_dir() for folder in folders.values()) else args.recipe
        jobs, _ = pairs.match_pairs({"HR": args.val} if self.recipe else folders)
        count = args.val_count or len(jobs)
        if len(jobs) > count:           # from all parts of the list
            jobs = [jobs[i * len(jobs) // count] for i in range(count)]
        for name, lr, hr, _ in pairs.read_pairs(jobs[rank::ranks], args.scale, self.recipe):
            bicubic = degrade.resize(lr, hr.shape[-2:])
            no_detail = torch.allclose(bicubic, hr, rtol=0, atol=1 / 255)       # its PSNR may be infinite
            if min(hr.shape[1:]) < 11 + 2 * self.scale or no_detail:      # SSIM's window is 11
                pairs.report_skipped(name, "too small or without detail: nothing to measure")
                continue
            self.pictures.append((lr, hr))
            scores.append(score(bicubic, hr, self.scale))
        self.bicubic, self.count = self.mean(scores)
        if not self.count:
            raise UserError(f"no usable picture in {args.val}")

    def mean(self, scores):
        """Return (mean of the scores of all ranks, number of scores)."""
        if self.ranks > 1:
            gathered = [None] * self.ranks
            dist.all_gather_object(gathered, scores)
            scores = [s for part in gathered for s in part]
        return {k: sum(s[k] for s in scores) / len(scores) for k in (scores or [{}])[0]}, len(scores)

    @torch.inference_mode()
    def run(self, learner):
        """Return (mean scores of the averaged weights, list of sample strips)."""
        scores, strips = [], []
        for lr, hr in self.pictures:
            tiler = Tiler(256, 32) if lr[0].numel() > 2 ** 19 else learner.tiler        # bounds the memory
            with learner.autocast():
                sr = learner.ema(lr[None].to(learner.device), tiler)
            sr = sr[0].float().clamp(0, 1).cpu()
            scores.append(score(sr, hr, self.scale))
            if len(strips) < 4:
                strips.append(sample_strip(lr, sr, hr))
        return self.mean(scores)[0], strips


def sample_strip(lr, sr, hr, side=192):
    """Return bicubic | SR | HR of the center, each at most side x side, as one uint8 array (h, 3 * w, 3)."""
    h, w = min(side, hr.shape[1]), min(side, hr.shape[2])
    y, x = (hr.shape[1] - h) // 2, (hr.shape[2] - w) // 2
    bicubic = degrade.resize(lr, hr.shape[-2:]).clamp(0, 1)
    return to_uint8(torch.cat([p[:, y:y + h, x:x + w] for p in (bicubic, sr, hr)], 2))


def report(args, run, learner, validation, progress, gradients, rate, patch_rate, rank):
    """Validate; save weights, samples, log and state. Returns text for the terminal."""
    scores, strips = validation.run(learner)
    adversarial = learner.discriminator and progress.step > args.gan_after
    better = adversarial or scores["psnr_y"] > progress.best_psnr       # a GAN may lower PSNR
    progress.best_psnr = scores["psnr_y"] if better else progress.best_psnr
    progress.rows.append(dict(
        step=progress.step, **{name: f"{value:.6g}" for name, value in progress.mean_losses().items()},
        **{f"{name}_grad": f"{value:.3e}" for name, value in gradients.items()},
        lr=f"{rate:.3e}", patches_per_s=f"{patch_rate:.2f}", seconds=round(progress.seconds),
        memory_mib=round(torch.cuda.max_memory_allocated() / 2 ** 20), skipped=progress.skipped_steps,
        **{name: round(value, 4) for name, value in scores.items()}))
    progress.loss_sums = {}
    if rank == 0:
        header = dict(
            preset=args.preset, recipe=args.recipe, stage=args.stage, seed=args.seed, loss=args.loss,
            data=[Path(folder).name for folder in args.data or ["demo"]], step=progress.step,
            psnr_y=round(scores["psnr_y"], 3), bicubic_psnr_y=round(validation.bicubic["psnr_y"], 3))
        save(learner.ema, run.folder / "last.safetensors", header)
        if better:
            save(learner.ema, run.folder / "best.safetensors", header)
        run.save_samples(progress.step, strips)
        run.save_log(progress.rows)
        run.save_state(learner.state_dict(), progress)
    gain = scores["psnr_y"] - validation.bicubic["psnr_y"]
    return f"validation {scores['psnr_y']:.2f} dB ({gain:+.2f} over bicubic), SSIM {scores['ssim_y']:.4f}"


# ------------------------------------------------------------------ the loop

def catch_signals():
    """Return a list that collects SIGINT and SIGTERM. A second Ctrl-C raises KeyboardInterrupt."""
    received = []

    def handler(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return received


def finished_fraction(args, progress):
    """Return the finished part of the run, 0 to 1, by steps or by the clock."""
    return progress.seconds / 60 / args.minutes if args.minutes else progress.step / args.steps


def train(args):
    """Train until the schedule ends. SIGINT and SIGTERM save the state and exit with code 130."""
    device, amp = pick_device(args.device, args.amp)
    rank, ranks = init_distributed(device)
    run, validation, stream, learner, progress = set_up(args, device, amp, rank, ranks)
    signals, line, bad_steps, patches, stop = catch_signals(), ProgressLine(), 0, 0, False
    if not progress.rows:
        if rank == 0:           # from now on the run can be resumed
            run.save_state(learner.state_dict(), progress)
        print(f"step 0  {report(args, run, learner, validation, progress, {}, 0.0, 0.0, rank)}")
    began = saved = progress.seconds
    step_began, fraction = time.time(), finished_fraction(args, progress)
    while fraction < 1 and not stop:
        # ---- batches, learning rate, gradients
        step = progress.step
        batches = stream.next_step(step, fraction)
        rate = learning_rate(step, fraction, args.lr, WARMUP)
        set_learning_rate(learner.optimizers, rate)
        report_due = (step + 1) % args.val_every == 0 or step + 1 == args.steps
        if args.minutes:
            report_due = len(progress.rows) <= REPORTS * fraction
        losses, gradients = backward(learner, batches, step >= args.gan_after, report_due)
        grad_norm = clip_gradients(learner)

        # ---- all ranks get the same numbers
        seconds, step_began = progress.seconds + time.time() - step_began, time.time()
        scalars = dict(losses, stop=len(signals) > 0, seconds=seconds, grad_norm=grad_norm)
        scalars = mean_over_ranks(scalars, device, ranks)
        stop, progress.seconds = scalars.pop("stop"), scalars.pop("seconds")
        finite = all(map(math.isfinite, scalars.values()))

        # ---- update
        update(learner, step, finite)
        progress.record({name: scalars[name] for name in losses}, finite)
        bad_steps = 0 if finite else bad_steps + 1
        if bad_steps == MAX_BAD_STEPS:
            raise UserError(f"loss or gradient not finite in {bad_steps} steps in a row; start a run with "
                            f"--weights {run.folder}/last.safetensors and a lower --lr")
        progress.step += 1

        # ---- report and save
        fraction = finished_fraction(args, progress)
        patches += sum(len(lr) for lr, _ in batches) * ranks
        patch_rate = patches / (progress.seconds - began)
        text = progress_text(progress, None if args.minutes else args.steps, fraction, patch_rate)
        if rank == 0:
            line(text)
        if report_due or fraction >= 1:
            scores = report(args, run, learner, validation, progress, gradients, rate, patch_rate, rank)
            line.clear()
            print(f"{text}  {scores}")
        if rank == 0 and (stop or progress.seconds - saved > STATE_SECONDS):
            run.save_state(learner.state_dict(), progress)
            saved = progress.seconds

    if ranks > 1:
        dist.destroy_process_group()
        time.sleep(0.1)     # a thread of gloo aborts if Python exits before it has freed its tensors
    if fraction < 1:
        print(f"stopped at step {progress.step}; the same command resumes"
              + (" (leave out --overwrite)" if args.overwrite else ""))
        sys.exit(130)
    paths = run.folder / "best.safetensors", args.val, args.recipe, run.folder / "upscaled"
    file, folder, recipe, out = (shlex.quote(str(path)) for path in paths)
    pictures = f"{folder} --recipe {recipe}" if validation.recipe else f"{folder}/hr --lr-dir {folder}/lr"
    small = folder if validation.recipe else f"{folder}/lr"
    print(f"done in {clock(progress.seconds)}: {file}, validation {progress.best_psnr:.2f} dB PSNR-Y, "
          f"{progress.best_psnr - validation.bicubic['psnr_y']:+.2f} dB over bicubic\n"
          f"next:\n  python tile.py {small} -o {out} --weights {file} --overwrite\n"
          f"  python evaluate.py --data {pictures} --weights {file}")


def main():
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")      # a console may lack a letter
    if fast:
        fast.keep_freed_memory()
    try:
        train(parse())
    except (UserError, WeightsError, LossError, degrade.RecipeError, KeyboardInterrupt) as e:
        fail(e)


if __name__ == "__main__":
    main()
