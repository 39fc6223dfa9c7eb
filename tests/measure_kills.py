"""Kill a training run at random moments, and compare the result with an undisturbed run. Not run by pytest.

    python tests/measure_kills.py                   # 50 kills, about 8 minutes on one core
    python tests/measure_kills.py --kills 5 --stage 3

After every kill, the run folder must hold the last step that was reported. In the end, model, averaged weights,
optimizers and log must equal those of the undisturbed run to the bit; otherwise the exit code is 1.
"""
import argparse
import random
import re
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
from test_train import assert_same_run, flags, rows, start              # noqa: E402


def reported_step(output):
    """Return the last step that the output of train.py reports, or 0."""
    return max(map(int, re.findall(r"^step (\d+)", output, re.MULTILINE)), default=0)


def kept_step(run):
    """Return the step in the state of a run folder, or 0."""
    state = run / "state.pt"
    return torch.load(state, weights_only=True)["progress"]["step"] if state.exists() else 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        settings = dict(stage=args.stage, steps=10 * args.kills, val_every=2, patch="8,16", grad_accum=2, val_count=1,
                        tile_size=8, tile_pad=4, weights=folder / "start.safetensors")

        began = time.time()
        undisturbed = start(flags(folder / "data", folder / "undisturbed", **settings), folder)
        _, errors = undisturbed.communicate()
        assert undisturbed.returncode == 0, errors
        training = float(rows(folder / "undisturbed")[-1]["seconds"])
        startup = time.time() - began - training
        print(f"undisturbed: {settings['steps']} steps in {time.time() - began:.0f} s", flush=True)

        kills, runs = 0, 0
        while kills < args.kills:       # a run may end before all kills are used; then another one begins
            runs += 1
            run, reported = folder / f"run{runs}", 0
            command = flags(folder / "data", run, **settings)
            while True:
                process, began = start(command, folder), time.time()
                try:
                    moment = startup + rng.uniform(-1, 2 * training / args.kills)
                    _, errors = process.communicate(timeout=moment if kills < args.kills else None)
                    assert process.returncode == 0, errors
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    output, _ = process.communicate()
                kills += 1
                reported, kept = max(reported, reported_step(output)), kept_step(run)
                assert kept >= reported, f"kill {kills}: step {reported} was reported, step {kept} is kept"
                if rows(run):
                    load(run / "last.safetensors")
                print(f"kill {kills} after {time.time() - began:.1f} s: step {reported} reported, step {kept} kept",
                      flush=True)
            assert_same_run(folder / "undisturbed", run)
        print(f"{kills} kills in {runs} runs of stage {args.stage}; the results equal the undisturbed run to the bit")


if __name__ == "__main__":
    main()
