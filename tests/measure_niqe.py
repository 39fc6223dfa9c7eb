"""Measure whether NIQE is lower for clean drawings than for their blurred, compressed, and noisy versions. Not run
by pytest.

    python tests/measure_niqe.py --data CLEAN_FOLDER                                # our model
    python tests/measure_niqe.py --data CLEAN_FOLDER --models niqe_pris_params.npz  # and the model of photographs

Prints Markdown: a row per picture for our model, then the number of correct comparisons of each model.
"""
import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import degrade                                                          # noqa: E402
import images                                                           # noqa: E402
import metrics                                                          # noqa: E402


def blurred(x, sigma):
    r = round(4 * sigma)
    g = np.exp(-0.5 * (np.arange(-r, r + 1) / sigma) ** 2)
    return degrade.convolve(x, np.outer(g, g) / g.sum() ** 2)


def compressed(x, quality):
    file = io.BytesIO()
    Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


def noisy(x, levels):
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * levels / 255


ARTIFACTS = [(f"{name} {strength}", artifact, strength) for name, artifact, strengths in (
    ("blur", blurred, (1, 1.5, 2.5)), ("JPEG", compressed, (75, 50, 25)), ("noise", noisy, (5, 10, 20)))
    for strength in strengths]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", required=True, help="clean pictures")
    p.add_argument("--models", nargs="*", default=[], help="NIQE models to compare ours with, .safetensors or .npz")
    args = p.parse_args()
    models = {"ours": metrics.load_niqe(), **{Path(m).stem: metrics.load_niqe(m) for m in args.models}}
    heads = [head for head, *_ in ARTIFACTS]
    correct = {name: dict.fromkeys(heads + ["all"], 0) for name in models}
    print(f"| picture | clean | {' | '.join(heads)} |\n|" + "---|" * (len(heads) + 2))
    paths = images.find_pictures(args.data)
    for path in paths:
        x = degrade.to_8_bit(images.composite(images.read_picture(path), 1.0))
        versions = [x, *(artifact(x, strength) for _, artifact, strength in ARTIFACTS)]
        for name, model in models.items():
            clean, *others = (metrics.niqe(y, model) for y in versions)
            for head, other in zip(heads, others):
                correct[name][head] += clean < other
            correct[name]["all"] += all(clean < other for other in others)
            if name == "ours":
                cells = [f"{other:.2f}" if clean < other else f"**{other:.2f}**" for other in others]
                print(f"| {images.printable(path.stem)} | {clean:.2f} | {' | '.join(cells)} |", flush=True)
    print(f"\n| of {len(paths)} | {' | '.join(heads)} | all of them |\n|" + "---|" * (len(heads) + 2))
    for name, row in correct.items():
        print(f"| {name} | {' | '.join(map(str, row.values()))} |")


if __name__ == "__main__":
    main()
