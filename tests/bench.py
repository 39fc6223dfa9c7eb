"""Measure speed and memory, beside spandrel's HAT with the same sizes and weights.

    python tests/bench.py                           # everything, on this machine's device; half an hour on 2 cores
    python tests/bench.py step infer --presets low --rounds 5
    python tests/bench.py --device cuda

The compared jobs run in turn in one process; the tables (Markdown) hold medians and their ratios.
Parts: peak (matrix products), step (forward, L1, backward, Adam), infer, cunet (beside a network with the layers of
waifu2x's CUNet), command (the same for whole commands), picture (1920x1080 to 3840x2160 with the tiler, beside plain tiles), memory (pictures of 1 to 32
megapixels), loader (training patches). Without spandrel only our own figures are printed.
"""
import argparse
import functools
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data
import demo
import fast
import images
import tile
from model import PRESETS, HATRefiner

WORK = {   # device: {preset: (batch, LR side)}
    "cpu": {"low": (4, 64), "mid": (1, 64), "hat": (1, 32)},
    "cuda": {"low": (8, 48), "mid": (8, 64), "hat": (8, 64)},
}


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_in_turn(jobs, rounds, device):
    """{name: function} -> {name: median seconds}. Each round runs each job once; the first round is not counted."""
    seconds = {name: [] for name in jobs}
    for r in range(rounds + 1):
        for name, job in jobs.items():
            start = clock(device)
            job()
            if r:
                seconds[name].append(clock(device) - start)
    return {name: median(values) for name, values in seconds.items()}


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = open("/proc/cpuinfo").read().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def hat_sizes(preset):
    return {name: value for name, value in PRESETS[preset].items() if name != "refiner_dim"}


def spandrel_hat(ours, preset):
    """spandrel's HAT with the weights of ours, or None without spandrel."""
    try:
        import spandrel                                                 # noqa: F401
    except ImportError:
        return None
    from test_model import official_hat
    return official_hat(ours.cpu(), ours.scale, hat_sizes(preset))


# ------------------------------------------------------------------ training steps and inference

def measure_peak(args):
    """{dtype: TFLOP/s of large matrix products}"""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16) if args.bf16 else (torch.float32,):
        n = 8192 if args.device == "cuda" else 2048
        a = torch.randn(n, n, device=args.device, dtype=dtype)
        rates[dtype] = 2 * n ** 3 / time_in_turn({"mm": lambda: a @ a}, args.rounds, args.device)["mm"] / 1e12
    text = ", ".join(f"{rate:.3g} {str(dtype).removeprefix('torch.')}" for dtype, rate in rates.items())
    print(f"matrix products, TFLOP/s: {text}", flush=True)
    return rates


def count_flops(job):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def make_job(net, lr, hr, amp, training, fused):
    """A function that runs one training step, or one inference."""
    device = lr.device.type
    adam = torch.optim.Adam(net.parameters(), 1e-5, fused=fused)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            sr = net(lr)
        loss = (sr.float() - hr).abs().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    def infer():
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=amp):
            net(lr)

    return step if training else infer


def compare(args, training):
    """One table row per preset: ours and spandrel's, fp32 and bf16."""
    peak, best = measure_peak(args), "bf16" if args.bf16 else "fp32"
    columns = ["training step, seconds" if training else "inference, seconds", "batch x LR side", "spandrel fp32",
               "spandrel bf16", "ours fp32", "ours bf16", f"spandrel fp32 / ours {best}",
               f"spandrel bf16 / ours {best}", f"ours {best}, of matrix peak",
               "patches/s" if training else "s per output megapixel"]
    print(f"\n| {' | '.join(columns)} |\n|" + "---|" * len(columns))
    for preset in args.presets:
        batch, side = WORK[args.device][preset]
        torch.manual_seed(0)
        model = HATRefiner.from_preset(preset).eval()
        theirs = spandrel_hat(model.hat_model, preset)
        model.to(args.device, memory_format=torch.channels_last)
        fast.prepare(model)
        model.hat_model.grad_checkpoint = args.grad_checkpoint
        if args.compile:
            model.hat_model.compile_blocks()
        lr = torch.rand(batch, 3, side, side, device=args.device)
        hr = torch.rand(batch, 3, 2 * side, 2 * side, device=args.device)
        jobs = {}
        for name, net in (("spandrel", theirs), ("ours", model.hat_model)):
            for precision in ("fp32", "bf16")[:1 + args.bf16] if net else ():
                jobs[f"{name} {precision}"] = make_job(net.to(args.device), lr, hr, precision == "bf16", training,
                                                       fused=name == "ours")
        flops = count_flops(jobs[f"ours {best}"])
        t = time_in_turn(jobs, args.rounds, args.device)
        ours = t[f"ours {best}"]
        cells = [f"{t[name]:.3f}" if name in t else "-"
                 for name in ("spandrel fp32", "spandrel bf16", "ours fp32", "ours bf16")]
        cells += [f"{t[name] / ours:.2f}x" if name in t else "-" for name in ("spandrel fp32", "spandrel bf16")]
        cells += [f"{flops / ours / 1e12 / list(peak.values())[-1]:.0%}",
                  f"{batch / ours:.2f}" if training else f"{ours / (batch * 4 * side * side / 1e6):.3f}"]
        print(f"| {preset} | {batch} x {side} | {' | '.join(cells)} |", flush=True)
        if args.device == "cuda" and training:
            for name in (name for name in jobs if name.startswith("ours")):
                torch.cuda.reset_peak_memory_stats()
                jobs[name]()
                print(f"  {preset} {name}: peak {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")


# ------------------------------------------------------------------ beside CUNet

class CUNet(nn.Module):
    """Layers and sizes of waifu2x's CUNet for 2x, with random weights (1,284,598): two U-Nets, the first enlarges
    the picture and the second corrects it. For its time only."""
    def __init__(self):
        super().__init__()

        def pair(c_in, c_middle, c_out, squeeze=True):
            convs = nn.Conv2d(c_in, c_middle, 3), nn.LeakyReLU(0.1), nn.Conv2d(c_middle, c_out, 3), nn.LeakyReLU(0.1)
            gate = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(c_out, c_out // 8, 1), nn.ReLU(),
                    nn.Conv2d(c_out // 8, c_out, 1), nn.Sigmoid())
            return nn.ModuleList([nn.Sequential(*convs), nn.Sequential(*gate) if squeeze else None])

        def down(n):
            return nn.Sequential(nn.Conv2d(n, n, 2, 2), nn.LeakyReLU(0.1))

        def up(n):
            return nn.Sequential(nn.ConvTranspose2d(n, n, 2, 2), nn.LeakyReLU(0.1))

        def last(layer):
            return nn.Sequential(nn.Conv2d(64, 64, 3), nn.LeakyReLU(0.1), layer)

        self.one = nn.ModuleList([pair(3, 32, 64, False), down(64), pair(64, 128, 64), up(64),
                                  last(nn.ConvTranspose2d(64, 3, 4, 2, 3))])
        self.two = nn.ModuleList([pair(3, 32, 64, False), down(64), pair(64, 64, 128), down(128),
                                  pair(128, 256, 128), up(128), pair(128, 64, 64), up(64), last(nn.Conv2d(64, 3, 3))])

    def forward(self, x):
        def run(pair, x):
            y = pair[0](x)
            return y * pair[1](y) if pair[1] else y

        def crop(x, n):
            return x[..., n:-n, n:-n]

        first, down, middle, up, last = self.one
        x = run(first, F.pad(x, (18, 18, 18, 18), mode="reflect"))
        enlarged = last(crop(x, 4) + up(run(middle, down(x))))
        first, down_1, middle_1, down_2, bottom, up_2, middle_2, up_1, last = self.two
        x = run(first, enlarged)
        y = run(middle_1, down_1(x))
        y = up_1(run(middle_2, crop(y, 4) + up_2(run(bottom, down_2(y)))))
        return last(crop(x, 16) + y) + crop(enlarged, 20)


def compare_cunet(args):
    """`low` beside CUNet on one picture of 256x256, without tiles."""
    low = HATRefiner.from_preset("low").eval().to(args.device, memory_format=torch.channels_last)
    fast.prepare(low)
    theirs = CUNet().eval().to(args.device, memory_format=torch.channels_last)
    x, jobs = torch.rand(1, 3, 256, 256, device=args.device), {}
    for precision in ("fp32", "bf16")[:1 + args.bf16]:
        for name, net in (("CUNet", theirs), ("low", low.hat_model)):
            jobs[f"{name} {precision}"] = make_job(net, x, None, precision == "bf16", training=False, fused=True)
    t = time_in_turn(jobs, args.rounds, args.device)
    print("\n| 256x256 to 512x512 | seconds per output megapixel | relative to CUNet fp32 |\n|---|---|---|")
    for name, seconds in t.items():
        print(f"| {name} | {seconds / (4 * 256 ** 2 / 1e6):.2f} | {seconds / t['CUNet fp32']:.2f} |", flush=True)


# ------------------------------------------------------------------ whole commands and pictures

def compare_command(args):
    """Whole commands for five pictures of 512x512: start, reading, enlarging, saving. CUNet runs in fp32, because
    its usual program, on ncnn, does so on a CPU."""
    cunet = f"""
import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import bench, fast, images, torch
fast.keep_freed_memory()
net = bench.CUNet().eval().to({args.device!r}, memory_format=torch.channels_last)
for path in images.find_pictures(sys.argv[1]):
    picture = images.read_picture(path)
    with torch.inference_mode():
        sr = net(picture.rgb[None].to({args.device!r}))[0].cpu().clamp(0, 1)
    images.save_picture(path.parent.parent / "cunet" / path.name, images.Picture(sr))
"""
    with tempfile.TemporaryDirectory() as folder:
        demo.draw_demo(Path(folder) / "demo", train=5, val=1)
        for name in "in", "cunet":
            (Path(folder) / name).mkdir()
        for path in images.find_pictures(Path(folder) / "demo" / "train"):
            rgb = images.read_picture(path).rgb[:, :512, :512]
            images.save_picture(Path(folder) / "in" / path.name, images.Picture(rgb))

        def job(*command):
            run = functools.partial(subprocess.run, capture_output=True, check=True, cwd=ROOT)
            return lambda: run([sys.executable, *command, "--device", args.device, "--overwrite"])

        jobs = {"CUNet's layers": job("-c", cunet, f"{folder}/in")}
        for name in "clean-low", "kabegami-low", "kabegami-fast", "default":
            weights = [] if name == "default" else ["--weights", f"weights/{name}.safetensors"]
            jobs[f"tile.py, {name}"] = job("tile.py", f"{folder}/in", "-o", f"{folder}/{name}", *weights)
        t = time_in_turn(jobs, args.rounds, args.device)
    print("\n| five pictures, 512x512 to 1024x1024 | seconds | relative to CUNet |\n|---|---|---|")
    for name, seconds in t.items():
        print(f"| {name} | {seconds:.1f} | {seconds / t[next(iter(t))]:.2f} |", flush=True)


def hard_tiles(net, x, side=128, pad=32):
    """Tiles with a pad, cropped and put side by side, as in HAT's own code."""
    h, w = x.shape[2:]
    out = x.new_empty(1, 3, 2 * h, 2 * w)
    for top in range(0, h, side):
        for left in range(0, w, side):
            y, x0 = max(top - pad, 0), max(left - pad, 0)
            bottom, right = min(top + side, h), min(left + side, w)
            piece = x[..., y:min(bottom + pad, h), x0:min(right + pad, w)]
            piece = F.pad(piece, (0, -piece.shape[3] % 16, 0, -piece.shape[2] % 16), mode="reflect")
            sr = net(piece)[..., 2 * (top - y):2 * (bottom - y), 2 * (left - x0):2 * (right - x0)]
            out[..., 2 * top:2 * bottom, 2 * left:2 * right] = sr
    return out


def compare_picture(args):
    print("\n| 1920x1080 to 3840x2160, seconds | spandrel fp32, hard tiles | ours | ratio |\n|---|---|---|---|")
    amp = torch.bfloat16 if args.bf16 else None
    for preset in args.presets if args.device == "cuda" else ["low"]:
        ours = HATRefiner.from_preset(preset).eval()
        theirs = spandrel_hat(ours.hat_model, preset)
        ours, x = ours.to(args.device, memory_format=torch.channels_last), torch.rand(3, 1080, 1920)
        fast.prepare(ours)
        window = PRESETS[preset]["window"]
        side = tile.TILE_SIZE // window * window
        tiler = tile.Tiler(side, 2 * window, align=window)
        jobs = {"ours": lambda m=ours, t=tiler: tile.upscale(m, x, 2, t, args.device, amp)}
        if theirs:
            theirs = theirs.to(args.device)
            jobs["spandrel"] = torch.inference_mode()(
                lambda m=theirs, t=tiler: hard_tiles(m, x[None].to(args.device), t.tile_size))
        t = time_in_turn(jobs, 1 if args.device == "cpu" else args.rounds, args.device)
        spandrel_seconds = t.get("spandrel", float("nan"))
        print(f"| {preset} | {spandrel_seconds:.1f} | {t['ours']:.1f} | {spandrel_seconds / t['ours']:.2f}x |",
              flush=True)


def measure_memory(args):
    """Peak memory of processes that enlarge pictures with `tiny`, from /proc: ru_maxrss would include the memory of
    this process, which a child inherits."""
    code = """
import sys, torch, fast, model, tile
side, device, amp = int(sys.argv[1]), sys.argv[2], torch.bfloat16 if sys.argv[3] == "True" else None
fast.keep_freed_memory()
net = model.HATRefiner.from_preset("tiny").eval().to(device)
fast.prepare(net)
tile.upscale(net, torch.rand(3, side, side), 2, tile.Tiler(tile.TILE_SIZE, 8, align=4), device, amp)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
    print("\n| input megapixels | peak MiB | both pictures in fp32, MiB |\n|---|---|---|")
    for megapixels in (1, 4, 16, 32):
        side = int((megapixels * 1e6) ** 0.5)
        done = subprocess.run([sys.executable, "-c", code, str(side), args.device, str(args.bf16)], cwd=ROOT,
                              capture_output=True, text=True, check=True)
        print(f"| {megapixels} | {float(done.stdout) / 1024:.0f} | {side * side * 3 * 4 * 5 / 2 ** 20:.0f} |",
              flush=True)


# ------------------------------------------------------------------ training data

def measure_loader(args):
    print("\n| recipe | workers | patches of 64x64 LR pixels per second |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        demo.draw_demo(Path(folder) / "demo", train=6, val=1)
        file = data.pack([Path(folder) / "demo" / "train"], Path(folder) / "p.safetensors", 256, log=lambda *_: None)
        for recipe in ("bicubic", "web", "soft", "light"):
            for workers in (0, 1, 2):
                batches, count = data.Batches([file], 10 ** 6, 16, 64, 2, recipe, 0), 0
                stream = iter(data.make_loader(batches, 0, workers))
                next(stream)
                start = time.time()
                while time.time() - start < 5:
                    next(stream)
                    count += 16
                print(f"| {recipe} | {workers} | {count / (time.time() - start):.0f} |", flush=True)
                del stream


PARTS = {"peak": measure_peak, "step": lambda args: compare(args, True), "infer": lambda args: compare(args, False),
         "cunet": compare_cunet, "command": compare_command,
         "picture": compare_picture, "memory": measure_memory, "loader": measure_loader}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", choices=[*PARTS, []], help="parts to measure (default: all)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    p.add_argument("--presets", nargs="+", choices=WORK["cpu"], default=["low", "mid", "hat"])
    p.add_argument("--rounds", type=int, default=5, help="number of rounds for each median")
    p.add_argument("--compile", action="store_true", help="compile our blocks")
    p.add_argument("--grad-checkpoint", action="store_true", help="checkpoint our blocks")
    args = p.parse_args()
    args.bf16 = tile.bf16_is_native(torch.device(args.device))      # emulated bf16 is too slow to be of use
    fast.keep_freed_memory()
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    print(f"{machine(args.device)}, torch {torch.__version__}, medians of {args.rounds}\n", flush=True)
    for part in args.parts or PARTS:
        PARTS[part](args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
    print(f"\npeak memory of this process: {peak:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
