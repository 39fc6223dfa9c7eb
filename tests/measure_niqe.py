"""Measure whether NIQE is lower for clean drawings than for their blurred, compressed, and noisy versions. Not run
by pytest.

    python tests/measure_niqe.py --data CLEAN_FOLDER                            # our model
    python tests/measure_niqe.py --data CLEAN_FOLDER --fit model.safetensors    # fit one; folders weigh the same

Prints Markdown: a row per picture for our model, then the number of correct comparisons of each model.
"""
import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

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


def fit_niqe(*groups, sharpness=0.75):
    """Fit a NiqeModel to groups (iterables) of clean pictures (3, H, W).

    Takes the blocks sharper than this part of the picture's sharpest block. Each group has the same weight,
    and each picture within its group. Raises metrics.MetricError for too few blocks or a side below 96 pixels.
    """
    features, weights = [torch.zeros(0, 36, dtype=torch.float64)], []
    for pictures in groups:
        counts = []
        for x in pictures:
            found, sharp = metrics.niqe_features(metrics.prepare(x, 0, True)[0, 0])
            found = found[(sharp > sharpness * sharp.max()) & ~found.isnan().any(1)]
            if len(found):
                features.append(found)
                counts.append(len(found))
        weights += [1 / (n * len(counts)) for n in counts for _ in range(n)]
    features, weights = torch.cat(features), torch.tensor(weights, dtype=torch.float64)
    if len(features) < 37:
        raise metrics.MetricError(f"{len(features)} sharp blocks of 96x96 are too few for NIQE's 36 features")
    mean = weights @ features / weights.sum()
    covariance = (features - mean).T @ ((features - mean) * weights[:, None]) / weights.sum()
    return metrics.NiqeModel(mean, covariance)


def clean_pictures(folder):
    for path in images.find_pictures([folder]):
        x = images.composite(images.read_picture(path), 1.0)
        if min(x.shape[-2:]) >= metrics.NIQE_BLOCK:
            yield x


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", required=True, help="clean pictures")
    p.add_argument("--models", nargs="*", default=[], help="NIQE models to compare with ours")
    p.add_argument("--fit", metavar="FILE", help="fit a NIQE model to the folders of --data and save it")
    args = p.parse_args()
    if args.fit:
        model = fit_niqe(*(clean_pictures(folder) for folder in args.data))
        save_file({name: x.float().contiguous() for name, x in model._asdict().items()}, args.fit)
        return
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
