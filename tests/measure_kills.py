"""Kills a training run at random moments, again and again, and compares what comes of it with a run left in peace.

    python tests/measure_kills.py                   # 50 kills, about 8 minutes on one core
    python tests/measure_kills.py --kills 5 --stage 3

After every kill the run folder must hold the last report that it told of, its files whole; in the end model, averaged
weights, optimiser and log must equal those of the undisturbed run to the bit. Not run by pytest; exit code 1 if not so.
"""
import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import demo                                                             # noqa: E402
from model import HATRefiner, load, save                                # noqa: E402
from test_train import flags, rows, same_run, start                     # noqa: E402


def main():
    p = argparse.ArgumentParser(description="Kills a training run again and again and compares the result.",
                                epilog="example: python tests/measure_kills.py --kills 5")
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--stage", type=int, choices=(1, 2, 3), default=1)
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        demo.draw_demo(folder / "drawn", train=4, val=1)
        for path in (folder / "drawn").rglob("*.png"):
            small = folder / "data" / path.relative_to(folder / "drawn")
            small.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).crop((200, 200, 296, 296)).save(small)
        save(HATRefiner.from_preset("tiny"), folder / "start.safetensors")
        steps = 10 * args.kills
        said = dict(stage=args.stage, steps=steps, every=2, patch="8,16", accum=2, val_count=1, tile_size=8, tile_pad=4,
                    weights=folder / "start.safetensors")
        begun = time.time()
        calm = start(flags(folder / "data", folder / "calm", **said), folder)
        _, err = calm.communicate()
        assert calm.returncode == 0, err
        training = float(rows(folder / "calm")[-1]["seconds"])
        opening = time.time() - begun - training
        print(f"undisturbed: {steps} steps in {time.time() - begun:.0f} s", flush=True)
        kills, runs = 0, 0
        while kills < args.kills:       # a run that ends before its share of kills is followed by another
            runs += 1
            run, told = folder / f"run{runs}", 0
            command = flags(folder / "data", run, **said)
            while True:
                process, begun = start(command, folder), time.time()
                try:
                    moment = opening + rng.uniform(-1, 2 * training / args.kills)
                    out, err = process.communicate(timeout=moment if kills < args.kills else None)
                    assert process.returncode == 0, err
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    out, _ = process.communicate()
                kills += 1
                told = max([told, *(int(line.split("/")[0][5:]) for line in out.splitlines() if line.startswith("step "))])
                state = run / "state.pt"
                kept = torch.load(state, weights_only=True)["now"]["step"] if state.exists() else 0
                assert kept >= told, f"kill {kills}: step {told} was reported, step {kept} is kept"
                if rows(run):
                    load(run / "last.safetensors")
                print(f"kill {kills} after {time.time() - begun:.1f} s: step {told} told, step {kept} kept", flush=True)
            same_run(folder / "calm", run)
        print(f"{kills} kills in {runs} runs of stage {args.stage}, nothing lost; the results equal the undisturbed run's to the bit")


if __name__ == "__main__":
    main()
