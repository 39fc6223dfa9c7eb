"""Measure models on drawn textures, which a model easily takes for damage.

    python tests/measure_textures.py --weights weights/clean-low.safetensors weights/web-low.safetensors

Prints the PSNR of RGB in dB for each kind of texture, for LR pictures without loss and as JPEG 95 and 90, minus the
PSNR of Lanczos. `lowest` is the worst single picture. --seed must differ from that of the training pictures.
"""
import argparse
import io
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import convert                                                          # noqa: E402
import degrade                                                          # noqa: E402
import demo                                                             # noqa: E402
import fast                                                             # noqa: E402
import images                                                           # noqa: E402
import metrics                                                          # noqa: E402
import tile                                                             # noqa: E402


def jpeg(lr, quality):
    """Compress lr (3, h, w) as JPEG with chroma 4:2:0. quality None: unchanged."""
    if quality is None:
        return lr
    file = io.BytesIO()
    Image.fromarray(images.to_uint8(lr)).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255


def draw(count, seed):
    """Return a list of (kind, hr (3, 256, 256)), `count` textures of demo.py."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, "textures")
        demo.draw_textures(folder, count, seed)
        return [(path.stem.split("_", 1)[1], images.composite(images.read_picture(path), 1.0)[:, :256, :256])
                for path in images.find_pictures(folder)]


def gain(model, hr, quality, amp=None):
    """PSNR of the model's result minus PSNR of Lanczos, in dB."""
    lr = jpeg(degrade.resize(hr, (hr.shape[1] // 2, hr.shape[2] // 2)).clamp(0, 1), quality)
    lanczos = degrade.resize(lr, hr.shape[1:], "lanczos").clamp(0, 1)
    sr = tile.upscale(model, lr, 2, tile.Tiler(256, 32), amp=amp)
    return metrics.psnr(sr, hr, 4, luma=False) - metrics.psnr(lanczos, hr, 4, luma=False)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--weights", nargs="+", required=True)
    p.add_argument("--count", type=int, default=21)
    p.add_argument("--seed", type=int, default=977)
    args = p.parse_args()
    models = {Path(file).stem: convert.load_any(file) for file in args.weights}
    for model in models.values():
        fast.prepare(model)
    pictures, (_, amp) = draw(args.count, args.seed), tile.pick_device("cpu")
    for quality in (None, 95, 90):
        print(f"\n| {'lossless' if quality is None else f'JPEG {quality}'} | "
              + " | ".join(f"{name}, mean | lowest" for name in models) + " |\n|" + "---|" * (1 + 2 * len(models)))
        for kind in dict.fromkeys(kind for kind, _ in pictures):
            gains = [[gain(model, hr, quality, amp) for k, hr in pictures if k == kind] for model in models.values()]
            print(f"| {kind} | " + " | ".join(f"{statistics.fmean(v):+.2f} | {min(v):+.2f}" for v in gains) + " |",
                  flush=True)


if __name__ == "__main__":
    main()
