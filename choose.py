"""Choose the shipped weights for a picture: those that also repair damage, or those that only enlarge.

    repair, plain = SHIPPED             # paths of weights files; `plain` only enlarges, with sharper results
    weights = plain if is_undamaged(model.load(repair), rgb) else repair

Needs torch, a model such as those of model.py, and the weights files in weights/.
"""
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

MIN_FIDELITY = 59.5     # dB, for kabegami-low; docs/upscaling.md has the scores of drawings
SHIPPED = [Path(__file__).parent / "weights" / f"{name}-low.safetensors" for name in ("kabegami", "clean")]


def detail_map(x):
    """Squared difference of each pixel from the mean of 3x3 pixels: (n, 3, h, w) -> (n, 1, h, w)."""
    return (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).square().mean(1, keepdim=True)


def detailed_crops(rgb, side):
    """Up to eight square crops from the most detailed third of rgb (3, H, W): (n, 3, side, side)."""
    cells = []
    for y in range(0, rgb.shape[1] - side + 1, side):       # row by row, to save memory
        row = F.avg_pool2d(detail_map(rgb[None, :, y:y + side]), side).flatten()
        cells += [(detail, y, side * i) for i, detail in enumerate(row.tolist())]
    cells.sort(reverse=True)
    ranks = sorted({k * len(cells) // 24 for k in range(8)})
    return torch.stack([rgb[:, y:y + side, x:x + side] for _, y, x in (cells[rank] for rank in ranks)])


@torch.inference_mode()
def is_undamaged(repair_model, rgb):
    """Whether repair_model, an nn.Module, has nothing to repair in rgb (3, H, W), in [0, 1], on the CPU.

    Enlarge eight detailed crops, downscale them, and compare them with the input. The score of a crop is
    10 log10(d / r^2), where r is the mean squared difference and d the mean detail of the input. Undamaged if
    the median score is above MIN_FIDELITY. A picture with a side of less than 32 pixels counts as damaged."""
    side = min(48, *rgb.shape[1:]) // 16 * 16
    if side < 32:
        return False
    crops = detailed_crops(rgb, side)
    device = next(repair_model.parameters()).device
    repaired = repair_model(crops.to(device)).float().clamp(0, 1).cpu()
    # on the CPU, because some versions have no antialiased bicubic for MPS
    downscaled = F.interpolate(repaired, size=side, mode="bicubic", antialias=True)
    r = (downscaled - crops)[..., 4:-4, 4:-4].square().mean((1, 2, 3)).clamp_min(1e-7)
    score = 10 * torch.log10(detail_map(crops).mean((1, 2, 3)) / r ** 2)
    return median(score.tolist()) > MIN_FIDELITY
