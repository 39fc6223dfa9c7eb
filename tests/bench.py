"""How fast, beside spandrel's HAT with the same sizes and weights; A and B in turn in one process, medians and ratios.

    python tests/bench.py                          # everything, for this machine's device: about half an hour on 2 cores
    python tests/bench.py step infer --presets low --rounds 5
    python tests/bench.py --device cuda            # one call for a GPU machine

Parts: peak (matrix products), step (forward, L1, backward, Adam), infer, cunet (beside a network with the layers of
waifu2x's CUNet), picture (1920x1080 by two through the tiler, beside plain hard-cropped tiles), memory (1 to 32 megapixels
in), loader (patches from a patch file, recipe web).
Needs spandrel 0.4 or newer for the comparison; without it only our own figures are printed. Prints Markdown.
"""
import argparse
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data                                                            # noqa: E402
import demo                                                            # noqa: E402
import tile                                                            # noqa: E402
from model import HAT, PRESETS, HATRefiner                              # noqa: E402

PARTS = ("peak", "step", "infer", "cunet", "picture", "memory", "loader")
WORK = {   # device: {preset: (batch, LR side)}
    "cpu": {"low": (4, 64), "mid": (1, 64), "hat": (1, 32)},
    "cuda": {"low": (8, 48), "mid": (8, 64), "hat": (8, 64)},
}


def median(values):
    return sorted(values)[len(values) // 2]


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(jobs, rounds, device):
    """{name: function} -> {name: median seconds}; every round runs every job once, after one round for warming up."""
    seconds = {name: [] for name in jobs}
    for r in range(rounds + 1):
        for name, job in jobs.items():
            begun = clock(device)
            job()
            if r:
                seconds[name].append(clock(device) - begun)
    return {name: median(s) for name, s in seconds.items()}


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"


def spandrel_hat(ours, sizes):
    """spandrel's HAT with the weights of ours, or None where spandrel is not installed."""
    try:
        import spandrel                                                 # noqa: F401
    except ImportError:
        return None
    from test_model import official_hat
    return official_hat(ours.cpu(), ours.scale, sizes)


def peak(args):
    rates = {}
    for dtype in (torch.float32, torch.bfloat16) if args.bf16 else (torch.float32,):
        n = 8192 if args.device == "cuda" else 2048
        a = torch.randn(n, n, device=args.device, dtype=dtype)
        rates[dtype] = 2 * n ** 3 / in_turn({"mm": lambda: a @ a}, args.rounds, args.device)["mm"] / 1e12
    print("matrix products, TFLOP/s: " + ", ".join(f"{r:.3g} {str(k)[6:]}" for k, r in rates.items()), flush=True)
    return rates


def flops(job):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def compare(args, training):
    """Training steps or inference of ours and spandrel's, fp32 and bf16, one table row per preset and precision."""
    rates, best = peak(args), "bf16" if args.bf16 else "fp32"
    name = "training step" if training else "inference"
    print(f"\n| {name}, seconds | batch x LR side | spandrel fp32 | spandrel bf16 | ours fp32 | ours bf16 | "
          f"ours {best} faster than spandrel fp32 | than spandrel bf16 | ours {best}, of matrix peak | " + ("patches/s" if training else "s per MP")
          + " |\n|" + "---|" * 10)
    for preset in args.presets:
        sizes = {k: v for k, v in PRESETS[preset].items() if k != "refiner_dim"}
        batch, side = WORK[args.device][preset]
        torch.manual_seed(0)
        ours = HAT(2, **sizes).eval()
        nets = {"spandrel": spandrel_hat(ours, sizes), "ours": ours}
        lr, hr = torch.rand(batch, 3, side, side), torch.rand(batch, 3, 2 * side, 2 * side)
        lr, hr = lr.to(args.device), hr.to(args.device)
        jobs = {}
        for who, net in nets.items():
            if net is None:
                continue
            net = net.to(args.device)
            if who == "ours":
                net = net.to(memory_format=torch.channels_last)
                net.checkpoint = args.checkpoint
                if args.compile:
                    net.compile_blocks()
            adam = torch.optim.Adam(net.parameters(), 1e-5, fused=who == "ours")
            for kind, amp in (("fp32", False), ("bf16", True))[:1 + args.bf16]:
                def step(net=net, adam=adam, amp=amp):
                    with torch.autocast(args.device, torch.bfloat16, enabled=amp):
                        sr = net(lr)
                    loss = (sr.float() - hr).abs().mean()
                    adam.zero_grad(set_to_none=True)
                    loss.backward()
                    adam.step()

                def infer(net=net, amp=amp):
                    with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=amp):
                        net(lr)
                jobs[f"{who} {kind}"] = step if training else infer
        work = flops(jobs[f"ours {best}"])
        t = in_turn(jobs, args.rounds, args.device)
        mine = t[f"ours {best}"]
        cells = [f"{t[k]:.3f}" if k in t else "-" for k in ("spandrel fp32", "spandrel bf16", "ours fp32", "ours bf16")]
        cells += [f"{t[k] / mine:.2f}x" if k in t else "-" for k in ("spandrel fp32", "spandrel bf16")]
        cells += [f"{work / mine / 1e12 / list(rates.values())[-1]:.0%}",
                  f"{batch / mine:.2f}" if training else f"{mine / (batch * 4 * side * side / 1e6):.3f}"]
        print(f"| {preset} | {batch} x {side} | " + " | ".join(cells) + " |", flush=True)
        if args.device == "cuda" and training:
            for kind in (k for k in jobs if k.startswith("ours")):
                torch.cuda.reset_peak_memory_stats()
                jobs[kind]()
                print(f"  {preset} {kind}: peak {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")


class CUNet(nn.Module):
    """Layers and sizes of waifu2x's CUNet for 2x, two U-Nets of which the first doubles the picture and the second corrects
    it, with random weights (1,284,598): for its time only."""
    def __init__(self):
        super().__init__()

        def pair(into, middle, out, squeeze=True):
            convs = nn.Conv2d(into, middle, 3), nn.LeakyReLU(0.1), nn.Conv2d(middle, out, 3), nn.LeakyReLU(0.1)
            gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(out, out // 8, 1), nn.ReLU(), nn.Conv2d(out // 8, out, 1), nn.Sigmoid()
            return nn.ModuleList([nn.Sequential(*convs), nn.Sequential(*gate) if squeeze else None])

        def down(n):
            return nn.Sequential(nn.Conv2d(n, n, 2, 2), nn.LeakyReLU(0.1))

        def up(n):
            return nn.Sequential(nn.ConvTranspose2d(n, n, 2, 2), nn.LeakyReLU(0.1))

        def last(layer):
            return nn.Sequential(nn.Conv2d(64, 64, 3), nn.LeakyReLU(0.1), layer)
        self.one = nn.ModuleList([pair(3, 32, 64, False), down(64), pair(64, 128, 64), up(64),
                                  last(nn.ConvTranspose2d(64, 3, 4, 2, 3))])
        self.two = nn.ModuleList([pair(3, 32, 64, False), down(64), pair(64, 64, 128), down(128), pair(128, 256, 128), up(128),
                                  pair(128, 64, 64), up(64), last(nn.Conv2d(64, 3, 3))])

    def forward(self, x):
        def run(pair, x):
            y = pair[0](x)
            return y * pair[1](y) if pair[1] else y

        def inner(x, n):
            return x[..., n:-n, n:-n]
        first, down, deep, up, last = self.one
        x = run(first, F.pad(x, (18, 18, 18, 18), mode="reflect"))
        small = last(inner(x, 4) + up(run(deep, down(x))))
        first, down, deep, further, deepest, up, back, out, last = self.two
        x = run(first, small)
        y = run(deep, down(x))
        y = out(run(back, inner(y, 4) + up(run(deepest, further(y)))))
        return last(inner(x, 16) + y) + inner(small, 20)


def cunet(args):
    """`low` beside CUNet on one picture of 256x256, untiled."""
    low, x = HAT(2, **{k: v for k, v in PRESETS["low"].items() if k != "refiner_dim"}), torch.rand(1, 3, 256, 256)
    theirs, low = (net.eval().to(args.device, memory_format=torch.channels_last) for net in (CUNet(), low))
    x, jobs = x.to(args.device), {}
    for name, net, amp in (("CUNet fp32", theirs, False), ("low fp32", low, False),
                           ("CUNet bf16", theirs, True), ("low bf16", low, True)):
        def job(net=net, amp=amp):
            with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=amp):
                net(x)
        if args.bf16 or not amp:
            jobs[name] = job
    t = in_turn(jobs, args.rounds, args.device)
    print("\n| 256x256 by two | seconds per megapixel out | over CUNet fp32 |\n|---|---|---|")
    for name, seconds in t.items():
        print(f"| {name} | {seconds / (4 * 256 ** 2 / 1e6):.2f} | {seconds / t['CUNet fp32']:.2f} |", flush=True)


def hard_tiles(net, x, side=128, pad=32):
    """Tiles cut out with a pad and put side by side, as HAT's own code does it."""
    out = x.new_empty(1, 3, 2 * x.shape[2], 2 * x.shape[3])
    for top in range(0, x.shape[2], side):
        for left in range(0, x.shape[3], side):
            t, le = max(top - pad, 0), max(left - pad, 0)
            b, r = min(top + side + pad, x.shape[2]), min(left + side + pad, x.shape[3])
            piece = F.pad(x[..., t:b, le:r], (0, -(r - le) % 16, 0, -(b - t) % 16), mode="reflect")
            y = net(piece)[..., 2 * (top - t):2 * (min(top + side, x.shape[2]) - t),
                           2 * (left - le):2 * (min(left + side, x.shape[3]) - le)]
            out[..., 2 * top:2 * top + y.shape[2], 2 * left:2 * left + y.shape[3]] = y
    return out


def picture(args):
    print("\n| 1920x1080 -> 3840x2160, seconds | spandrel fp32, hard tiles | ours | faster |\n|---|---|---|---|")
    for preset in args.presets:
        if args.device == "cpu" and preset != "low":
            continue
        sizes = {k: v for k, v in PRESETS[preset].items() if k != "refiner_dim"}
        ours = HATRefiner.from_preset(preset).eval()
        theirs = spandrel_hat(ours.hat_model, sizes)
        ours, x = ours.to(args.device, memory_format=torch.channels_last), torch.rand(3, 1080, 1920)
        pad = 2 * PRESETS[preset]["window"]
        amp = torch.bfloat16 if args.bf16 else None
        small = tile.Tiler(384, pad, align=PRESETS[preset]["window"])
        with torch.inference_mode():
            side = tile.auto_tile_size(ours, torch.device(args.device), amp, small)     # as tile.py's command does it
        tiler = tile.Tiler(side, pad, align=PRESETS[preset]["window"])
        jobs = {"ours": lambda: tile.upscale(ours, x, 2, tiler, args.device, amp)}
        if theirs:
            theirs = theirs.to(args.device)

            def other():
                with torch.inference_mode():
                    hard_tiles(theirs, x[None].to(args.device), tiler.tile_size)
            jobs["spandrel"] = other
        t = in_turn(jobs, 1 if args.device == "cpu" else args.rounds, args.device)
        print(f"| {preset} | {t.get('spandrel', float('nan')):.1f} | {t['ours']:.1f} | "
              f"{t.get('spandrel', float('nan')) / t['ours']:.2f}x |", flush=True)


def memory(args):
    """Peak memory of whole processes that enlarge pictures of growing size with `tiny` (from /proc: ru_maxrss would count
    this process's own memory, which a child inherits). Minutes on a CPU."""
    print("\n| megapixels in | peak MiB | of that the two pictures (fp32) |\n|---|---|---|")
    for mp in (1, 4, 16, 32):
        side = int((mp * 1e6) ** 0.5)
        code = (f"import torch, tile, model; tile.keep_freed_memory(); m = model.HATRefiner.from_preset('tiny').eval().to('{args.device}'); "
                f"tile.upscale(m, torch.rand(3, {side}, {side}), 2, tile.Tiler(384, 8, align=4), '{args.device}', {torch.bfloat16 if args.bf16 else None}); "
                "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        print(f"| {mp} | {float(done.stdout) / 1024:.0f} | {side * side * 3 * 4 * 5 / 2 ** 20:.0f} |", flush=True)


def loader(args):
    with tempfile.TemporaryDirectory() as folder:
        demo.draw_demo(Path(folder) / "demo", train=6, val=1)
        file = data.pack([Path(folder) / "demo" / "train"], Path(folder) / "p.safetensors", 256, log=lambda *_: None)
        print("\n| loader, recipe | workers | patches of 64x64 LR a second |\n|---|---|---|")
        for recipe in ("bicubic", "web", "soft", "light"):
            for workers in (0, 1, 2):
                batches, count = data.Batches([file], 10 ** 6, 16, 64, 2, recipe, 0), 0
                stream = iter(data.loader(batches, 0, workers))
                next(stream)
                begun = time.time()
                while time.time() - begun < 5:
                    next(stream)
                    count += 16
                print(f"| {recipe} | {workers} | {count / (time.time() - begun):.0f} |", flush=True)
                del stream


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to time (default: everything)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    p.add_argument("--presets", nargs="+", choices=WORK["cpu"], default=["low", "mid", "hat"])
    p.add_argument("--rounds", type=int, default=5, help="counted rounds, of which the median is taken")
    p.add_argument("--compile", action="store_true", help="ours with its blocks compiled")
    p.add_argument("--checkpoint", action="store_true", help="ours with activation checkpointing")
    args = p.parse_args()
    args.bf16 = tile.bf16_is_native(torch.device(args.device))      # imitated bf16 is no use to anybody
    tile.keep_freed_memory()
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    print(f"{machine(args.device)}, torch {torch.__version__}, medians of {args.rounds}\n", flush=True)
    for part in args.parts or PARTS:
        {"peak": peak, "step": lambda a: compare(a, True), "infer": lambda a: compare(a, False), "cunet": cunet, "picture": picture,
         "memory": memory, "loader": loader}[part](args)
    print(f"\npeak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
