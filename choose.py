"""Choose the shipped weights for a picture: those that also repair damage, or those that only enlarge.

    path = default_weights()            # weights/kabegami-low.safetensors: repairs and enlarges
    plain = companion_weights(path)     # weights/clean-low.safetensors: only enlarges, with sharper results
    if is_undamaged(repair_model, plain_model, rgb):    # then use plain_model

Needs torch; copy this file and it works alone.
"""
import math
import re
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

# Thresholds of is_undamaged(), in dB. Scores of 34 drawings with weights/kabegami-low as repair_model:
#   first score: 62 to 82 after bicubic or Lanczos downscaling, 54 to 79 after area; at most 52 after a blur
#       of sigma 0.6, at most 57 after JPEG of quality 90 or 95; 40 to 59 after WebP of quality 80 to 95 (24
#       drawings).
#   second score: below 0.9 after downscaling, at least 3.9 after the blur.
# Of 24 other drawings, 23 pass undamaged; with blur and JPEG none passes.
MIN_FIDELITY_DB = 56.0
MIN_FIDELITY_DB_JPEG = 62.0     # where has_jpeg_grid() finds JPEG blocks
MAX_GAIN_DB = 1.5


def default_weights():
    """Path of the weights to use if none are given: the shipped file beside this script, or if it is missing,
    the newest runs/*/best.safetensors if there is one."""
    shipped = Path(__file__).parent / "weights" / "kabegami-low.safetensors"
    runs = sorted(Path("runs").glob("*/best.safetensors"), key=lambda path: path.stat().st_mtime)
    return runs[-1] if runs and not shipped.exists() else shipped


def companion_weights(path):
    """Path of the clean-* file beside a web-* or kabegami-* file, or None."""
    path = Path(path)
    companion = path.with_name(re.sub("^(web|kabegami)-", "clean-", path.name))
    return companion if companion != path and companion.exists() else None


def has_jpeg_grid(crops):
    """Whether crops (n, 3, h, w) in [0, 1] of one picture were compressed as JPEG and not resized since.
    Their positions in the picture must differ by multiples of 8.

    JPEG rounds the DCT coefficients of 8x8 blocks to multiples of a step, so few small values remain (Fan and
    de Queiroz, 2003). For each of the 64 possible positions of the block grid, compute the fraction of
    coefficients below 2.6 gray levels among those above 1.2. The smallest fraction over the median one is at
    least 0.81 on 54 undamaged drawings, and at most 0.53 after JPEG of quality 85 to 97, in high or in middle
    frequencies. It does not find WebP."""
    k = torch.arange(8, device=crops.device)
    dct = torch.cos((2 * k + 1) * k[:, None] * (math.pi / 16)) / 2
    dct[0] /= math.sqrt(2)
    basis = (dct[:, None, :, None] * dct[None, :, None, :]).flatten(0, 1)[:, None]      # 64 patterns of 8x8
    order = (k[:, None] + k).flatten()
    gray = 255 * (0.299 * crops[:, :1] + 0.587 * crops[:, 1:2] + 0.114 * crops[:, 2:])
    saturated = ((crops < 1 / 255) | (crops > 254 / 255)).float().amax(1, keepdim=True)
    saturated = F.max_pool2d(saturated, 8, 1) > 0       # blocks whose coefficients are not those JPEG stored

    for frequencies in (order > 4) & (order < 8), order > 7:
        coefficients = F.conv2d(gray, basis[frequencies]).abs().masked_fill(saturated, 0)
        positions = [coefficients[:, :, i::8, j::8] for i in range(8) for j in range(8)]
        nonzero = torch.stack([(c > 1.2).float().sum() for c in positions])
        small = torch.stack([((c > 1.2) & (c < 2.6)).float().sum() for c in positions])
        fractions = small / nonzero.clamp_min(1)
        if nonzero.median() >= 50 and fractions.min() < 0.67 * fractions.median():
            return True
    return False


def detail_map(x):
    """Squared difference of each pixel from the mean of 3x3 pixels: (n, 3, h, w) -> (n, 1, h, w)."""
    return (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).square().mean(1, keepdim=True)


def detailed_crops(rgb, side):
    """Four square crops from the most detailed quarter of rgb (3, H, W): (up to 4, 3, side, side)."""
    cells = []
    for y in range(0, rgb.shape[1] - side + 1, side):       # row by row, to save memory
        row = F.avg_pool2d(detail_map(rgb[None, :, y:y + side]), side).flatten()
        cells += [(detail, y, side * i) for i, detail in enumerate(row.tolist())]
    cells.sort(reverse=True)
    ranks = sorted({k * len(cells) // 12 for k in range(4)})
    return torch.stack([rgb[:, y:y + side, x:x + side] for _, y, x in (cells[rank] for rank in ranks)])


@torch.inference_mode()
def is_undamaged(repair_model, plain_model, rgb):
    """Whether a model that also repairs finds nothing to repair in rgb (3, H, W), [0, 1], on the CPU.

    Two tests on four detailed crops, each on the median over the crops:
    1. Downscale repair_model's output and compare it with the input. The score is 10 log10(d / r^2), where r
    is the mean squared difference and d the mean detail of the input. Damaged if it is below MIN_FIDELITY_DB.
    2. Compare with plain_model's output. Damaged if repair_model's output has more detail by MAX_GAIN_DB: the
    model is deblurring.
    A picture with a side of less than 32 pixels counts as damaged."""
    side = min(96, *rgb.shape[1:]) // 16 * 16
    if side < 32:
        return False
    crops = detailed_crops(rgb, side)
    device = next(repair_model.parameters()).device

    def enlarge(model):     # resized on the CPU: some versions have no antialiased bicubic for MPS
        return model(crops.to(device)).float().clamp(0, 1).cpu()

    repaired = enlarge(repair_model)
    downscaled = F.interpolate(repaired, size=side, mode="bicubic", antialias=True)
    r = (downscaled - crops)[..., 4:-4, 4:-4].square().mean((1, 2, 3)).clamp_min(1e-7)
    fidelity = torch.log10(detail_map(crops).mean((1, 2, 3)) / r ** 2)
    if 10 * median(fidelity.tolist()) <= (MIN_FIDELITY_DB_JPEG if has_jpeg_grid(crops) else MIN_FIDELITY_DB):
        return False
    plain_detail = detail_map(enlarge(plain_model)).mean((1, 2, 3)).clamp_min(1e-9)
    gain = torch.log10(detail_map(repaired).mean((1, 2, 3)) / plain_detail)
    return 10 * median(gain.tolist()) < MAX_GAIN_DB
