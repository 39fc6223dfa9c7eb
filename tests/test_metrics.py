"""metrics.py: against slow restatements in float64 and scikit-image; each metric moves the right way for its fault and
stays put for the faithful picture; golden figures; NIQE's model fitted, saved, read; the command.

    python tests/test_metrics.py            # writes golden_metrics.json again
"""
import io
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import metrics

GOLDEN = Path(__file__).with_name("golden_metrics.json")


def drawing(h=220, w=301):
    """A drawing by formula: soft sky, an even area, slanted and round lines, shading, stars."""
    y, x = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    picture = torch.stack([20 + 60 * y / h + 0 * x, 30 + 50 * y / h + 10 * x / w, 90 + 80 * y / h + 0 * x])
    hill = y > 0.62 * h + 18 * torch.sin(x / 37)
    picture = torch.where(hill, torch.tensor([96.0, 150, 84])[:, None, None], picture)
    grass = (torch.sin(x * 1.7 + y * 0.9) + torch.sin(x * 0.8 - y * 2.1)) * 14
    picture = picture + grass * (hill & (y > 0.86 * h))
    for row, column, radius in ((0.3, 0.3, 34), (0.55, 0.72, 27), (0.8, 0.35, 22)):
        r = ((y - row * h) ** 2 + (x - column * w) ** 2).sqrt()
        cover = (radius - r).clamp(0, 1)
        inside = torch.tensor([230.0, 190, 160])[:, None, None] - 70 * (x > column * w + radius / 4)
        picture = picture * (1 - cover) + inside * cover
        picture = picture * (1 - 0.9 * (1.7 - (r - radius).abs()).clamp(0, 1))
    for slope in (0.45, -0.8):
        picture = picture * (1 - 0.85 * (1.2 - ((y - 0.7 * h) - slope * (x - 0.6 * w)).abs()).clamp(0, 1))
    for k in range(24):
        row, column = 6 + k * 37 % int(0.4 * h), 8 + k * 89 % (w - 16)
        picture[:, row:row + 2, column:column + 1 + k % 2] += 130
    return metrics.to_8_bit(picture / 255)


def through(x, taps):
    """Separable filter of odd length, border repeated."""
    g = torch.tensor(taps, dtype=torch.float32)
    g, r = g / g.sum(), len(taps) // 2
    x = F.pad(x[:, None], (r, r, r, r), "replicate")
    return F.conv2d(F.conv2d(x, g[None, None, :, None]), g[None, None, None])[:, 0].clamp(0, 1)


def blur(x, sigma):
    return through(x, [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-9, 10)])


def sinc(x, cutoff):
    return through(x, [np.sinc(i * cutoff) for i in range(-12, 13)])


def noise(x, levels):
    return (x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * levels / 255).clamp(0, 1)


def jpeg(x, quality):
    file = io.BytesIO()
    Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


def bands(x, levels):
    return (x * 255 / levels).round() * levels / 255


def hue(x, levels):
    return (x + torch.tensor([levels, -levels, 0])[:, None, None] / 255).clamp(0, 1)


def half(x):
    return metrics.to_8_bit(F.interpolate(x[None], (x.shape[1] // 2, x.shape[2] // 2), mode="bicubic",
                                          antialias=True)[0])


def double(x, mode="bicubic"):
    return F.interpolate(x[None], scale_factor=2, mode=mode)[0].clamp(0, 1)


def no_stars(x):
    """Bright spots of up to 4 pixels are gone (opening)."""
    return F.max_pool2d(-F.max_pool2d(-x[None], 5, 1, 2), 5, 1, 2)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Slow restatements, float64
# ---------------------------------------------------------------------------------------------------------------------


def slow_plane(x, y=True):
    """(3, H, W) on 8-bit levels -> float64 (H, W) Y, or a list of three (H, W), 0 to 255."""
    r, g, b = np.rint(x.double().numpy() * 255)
    return 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255 if y else [r, g, b]


def slow_similarity(a, b):
    """-> luminance, and contrast times structure, of every 11x11 window."""
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(g, g) / g.sum() ** 2
    a, b = (np.lib.stride_tricks.sliding_window_view(v, (11, 11)) for v in (a, b))
    ma, mb = ((v * window).sum((2, 3)) for v in (a, b))
    va = ((a - ma[..., None, None]) ** 2 * window).sum((2, 3))
    vb = ((b - mb[..., None, None]) ** 2 * window).sum((2, 3))
    vab = ((a - ma[..., None, None]) * (b - mb[..., None, None]) * window).sum((2, 3))
    return ((2 * ma * mb + 2.55 ** 2) / (ma ** 2 + mb ** 2 + 2.55 ** 2),
            (2 * vab + 7.65 ** 2) / (va + vb + 7.65 ** 2))


def slow_ms_ssim(a, b):
    index = 1.0
    for k, weight in enumerate([0.0448, 0.2856, 0.3001, 0.2363, 0.1333]):
        light, structure = slow_similarity(a, b)
        index *= (light * structure if k == 4 else structure).mean() ** weight
        smaller = []
        for v in (a, b):
            v = np.pad(v, [(0, s % 2) for s in v.shape], "edge")
            smaller.append((v[::2, ::2] + v[1::2, ::2] + v[::2, 1::2] + v[1::2, 1::2]) / 4)
        a, b = smaller
    return index


def slow_aggd(v):
    v, gamma = v.ravel(), math.gamma
    left, right = math.sqrt(np.mean(v[v < 0] ** 2)), math.sqrt(np.mean(v[v > 0] ** 2))
    g = left / right
    wanted = np.mean(np.abs(v)) ** 2 / np.mean(v ** 2) * (g ** 3 + 1) * (g + 1) / (g * g + 1) ** 2
    alphas = np.arange(0.2, 10.0005, 0.001)
    alpha = min((abs(gamma(2 / a) ** 2 / (gamma(1 / a) * gamma(3 / a)) - wanted), a) for a in alphas)[1]
    size = math.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return alpha, left * size, right * size, (right - left) * size * gamma(2 / alpha) / gamma(1 / alpha)


def slow_halving(n):
    """MATLAB's imresize by 1/2 along one side, as a matrix (n/2, n)."""
    matrix = np.zeros((n // 2, n))
    for i in range(n // 2):
        centre = (i + 0.5) / 0.5 - 0.5
        for j in range(math.floor(centre) - 6, math.floor(centre) + 8):
            d = abs(centre - j) * 0.5
            weight = 1.5 * d ** 3 - 2.5 * d ** 2 + 1 if d <= 1 else -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2
            weight *= d < 2
            mirrored = j % (2 * n)
            matrix[i, mirrored if mirrored < n else 2 * n - 1 - mirrored] += weight
    return matrix / matrix.sum(1, keepdims=True)


def slow_niqe(y, mean, covariance):
    g = np.exp(-0.5 * ((np.arange(7) - 3) / (7 / 6)) ** 2)
    window = np.outer(g, g) / g.sum() ** 2
    y = np.rint(y)[:y.shape[0] // 96 * 96, :y.shape[1] // 96 * 96]
    rows = []
    for side in (96, 48):
        around = np.lib.stride_tricks.sliding_window_view(np.pad(y, 3, "edge"), (7, 7))
        mu = (around * window).sum((2, 3))
        deviation = np.sqrt(((around - mu[..., None, None]) ** 2 * window).sum((2, 3)))
        n, found = (y - mu) / (deviation + 1), []
        for i in range(0, y.shape[0], side):
            for j in range(0, y.shape[1], side):
                block = n[i:i + side, j:j + side]
                alpha, left, right, _ = slow_aggd(block)
                features = [alpha, (left + right) / 2]
                for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
                    alpha, left, right, middle = slow_aggd(block * np.roll(block, shift, (0, 1)))
                    features += [alpha, middle, left, right]
                found.append(features)
        rows.append(np.array(found))
        y = slow_halving(y.shape[0]) @ y @ slow_halving(y.shape[1]).T
    rows = np.concatenate(rows, 1)
    off = rows.mean(0) - mean
    return math.sqrt(off @ np.linalg.pinv((np.cov(rows.T) + covariance) / 2) @ off)


def textured(h, w, seed=0):
    """No place of it is even, so that NIQE's slow restatement has nothing to divide by zero."""
    return metrics.to_8_bit(noise(blur(torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)), 1.1), 2))


@pytest.mark.parametrize("y", [True, False])
def test_psnr_and_ssim_against_slow_sums(y):
    hr, sr = drawing(60, 71), metrics.to_8_bit(jpeg(drawing(60, 71), 60))
    a, b = slow_plane(sr, y), slow_plane(hr, y)
    a, b = (v if y else np.stack(v) for v in (a, b))
    assert abs(metrics.psnr(sr, hr, luma=y) - 10 * math.log10(255 ** 2 / np.mean((a - b) ** 2))) < 1e-4
    planes = [(a, b)] if y else zip(a, b)
    wanted = np.mean([np.mean(np.prod(slow_similarity(*pair), 0)) for pair in planes])
    assert abs(metrics.ssim(sr, hr, luma=y) - wanted) < 1e-5


@pytest.mark.parametrize("y", [True, False])
def test_psnr_and_ssim_agree_with_scikit_image(y):
    theirs = pytest.importorskip("skimage.metrics")
    hr, sr = drawing(90, 121), metrics.to_8_bit(jpeg(drawing(90, 121), 60))
    a, b = (metrics.luma(v.double())[0].numpy() if y else v.double().permute(1, 2, 0).numpy() for v in (sr, hr))
    assert abs(metrics.psnr(sr, hr, luma=y) - theirs.peak_signal_noise_ratio(b, a, data_range=1)) < 1e-4
    full = theirs.structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                        data_range=1, full=True, channel_axis=None if y else 2)[1]
    assert abs(metrics.ssim(sr, hr, luma=y) - full[5:-5, 5:-5].mean()) < 1e-4


@pytest.mark.parametrize("size", [(176, 192), (181, 207)])
def test_ms_ssim_against_slow_sums(size):
    hr, sr = drawing(*size), metrics.to_8_bit(blur(noise(drawing(*size) * 0.7, 9), 1))
    assert abs(metrics.ms_ssim(sr, hr) - slow_ms_ssim(slow_plane(sr), slow_plane(hr))) < 1e-5
    wanted = np.mean([slow_ms_ssim(p, q) for p, q in zip(slow_plane(sr, False), slow_plane(hr, False))])
    assert abs(metrics.ms_ssim(sr, hr, luma=False) - wanted) < 1e-5


def test_ms_ssim_says_how_large_a_picture_must_be():
    x = torch.rand(3, 178, 400)
    assert metrics.ms_ssim(x, x, border=1) == pytest.approx(1)
    with pytest.raises(ValueError, match="176 pixels a side inside the border, not 396x174"):
        metrics.ms_ssim(x, x, border=2)


def test_niqe_against_slow_sums():
    x, model = textured(200, 196), metrics.load_niqe()
    wanted = slow_niqe(slow_plane(x), model.mean.numpy(), model.covariance.numpy())
    assert abs(metrics.niqe(x, model) - wanted) < 1e-6 * wanted


# ---------------------------------------------------------------------------------------------------------------------
# Each metric and its fault
# ---------------------------------------------------------------------------------------------------------------------

FAULTS = [                                  # metric, the lesser fault, the greater one
    ("psnr_y", lambda x: noise(x, 2), lambda x: noise(x, 5)),
    ("ssim_y", lambda x: blur(x, 0.6), lambda x: blur(x, 1)),
    ("psnr_rgb", lambda x: hue(x, 2), lambda x: hue(x, 6)),
    ("ssim_rgb", lambda x: jpeg(x, 80), lambda x: jpeg(x, 40)),
    ("ms_ssim_y", lambda x: blur(x, 1), lambda x: blur(x, 2)),
    ("ms_ssim_rgb", lambda x: noise(x, 5), lambda x: noise(x, 15)),
    ("edge_psnr", lambda x: blur(x, 0.6), lambda x: blur(x, 1)),
    ("faithfulness", lambda x: x, lambda x: blur(x, 1)),
    ("faithfulness", lambda x: x, lambda x: hue(x, 3)),
    ("faithfulness", lambda x: x, lambda x: x.roll(1, 2)),
    ("flat_noise", lambda x: noise(x, 2), lambda x: noise(x, 5)),
    ("flat_noise", lambda x: jpeg(x, 90), lambda x: jpeg(x, 40)),
    ("ringing", lambda x: blur(x, 1), lambda x: sinc(x, 0.6)),
    ("ringing", lambda x: sinc(x, 0.6), lambda x: sinc(x, 0.4)),
    ("banding", lambda x: x, lambda x: bands(x, 8)),
    ("banding", lambda x: bands(x, 4), lambda x: bands(x, 8)),
    ("blocking", lambda x: x, lambda x: jpeg(x, 90)),
    ("blocking", lambda x: jpeg(x, 90), lambda x: jpeg(x, 40)),
    ("highlights", lambda x: blur(x, 0.4), lambda x: blur(x, 1)),
    ("highlights", lambda x: x, no_stars),
]


def run(name, sr, hr):
    return metrics.METRICS[name].run(sr, hr, half(hr), 2, 2)


@pytest.mark.parametrize("name, lesser, greater", FAULTS, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(FAULTS)])
def test_metric_worsens_with_its_fault(name, lesser, greater):
    hr = drawing(220, 302)
    before, after = run(name, metrics.to_8_bit(lesser(hr)), hr), run(name, metrics.to_8_bit(greater(hr)), hr)
    if metrics.METRICS[name].better == "lower":
        before, after = -before, -after
    assert before > after + 0.01 * abs(after), (before, after)


def test_the_true_picture_is_perfect():
    hr = drawing(220, 302)
    expected = dict(psnr_y=math.inf, ssim_y=1, psnr_rgb=math.inf, ssim_rgb=1, ms_ssim_y=1, ms_ssim_rgb=1,
                    edge_psnr=math.inf, faithfulness=math.inf, flat_noise=0, ringing=0, highlights=1, banding=0)
    for name, value in expected.items():
        assert run(name, hr, hr) == pytest.approx(value, abs=1e-9), name
    assert abs(run("blocking", hr, hr) - 1) < 0.1
    assert abs(metrics.blocking(hr, 3, offset=5) - 1) < 0.1


def test_faults_that_a_metric_must_not_see():
    hr = drawing(220, 302)
    assert metrics.edge_psnr(hue(hr, 1), hr) > 40 > metrics.edge_psnr(blur(hr, 1), hr)
    assert metrics.flat_noise(hue(hr, 6), hr) < 0.01                    # an even change of colour
    assert metrics.ringing(blur(hr, 1), hr) < 0.02
    assert metrics.highlight_recall(hue(hr, 6), hr) == 1
    assert metrics.banding(noise(bands(hr, 8), 2)) < 0.01               # grain over the bands: no contour is seen
    flat = torch.full((3, 64, 64), 0.5)
    flat[:, :, 30:] += 8 / 255
    assert metrics.banding(flat) == 0                                   # the border of two even tones
    panels = (torch.arange(200) // 20 * 5 + 100) / 255
    assert metrics.banding(panels.expand(3, 40, 200)) > 0.9
    panels[19::20] = 90 / 255                                           # the same tones, with lines between: drawn so
    assert metrics.banding(panels.expand(3, 40, 200)) == 0
    lines = torch.full((3, 64, 64), 0.2)
    lines[:, 20] = lines[:, :, 40] = 1
    assert math.isnan(metrics.highlight_recall(lines, lines))           # lines are no stars


def test_nan_where_there_is_nothing_to_measure():
    even = torch.full((3, 200, 200), 0.4)
    rough = textured(200, 200)
    for value in (metrics.edge_psnr(rough, even), metrics.ringing(rough, even), metrics.highlight_recall(rough, even),
                  metrics.flat_noise(even, rough), metrics.banding(even), metrics.blocking(even),
                  metrics.niqe(even, metrics.load_niqe()), metrics.seam(even, rough, 999)):
        assert math.isnan(value)
    for side in (1, 3, 8):
        small = torch.rand(3, side, side)
        for name in ("flat_noise", "highlights"):
            assert math.isnan(metrics.METRICS[name].run(small, small, None, 2, 0))
        for name in ("banding", "blocking", "ringing", "edge_psnr"):
            metrics.METRICS[name].run(small, small, None, 2, 0)
        assert metrics.error_map(small, small).shape == (side, side)


def test_blocking_finds_the_grid():
    hr = drawing(224, 304)
    bad = jpeg(hr, 40)
    assert metrics.blocking(bad) > 1.3 and abs(metrics.blocking(bad, offset=2) - 1) < 0.15
    assert metrics.blocking(bad[:, 3:, 3:], offset=5) > 1.3             # its lines at 5, 13, ... after the cut
    assert metrics.blocking(bad, border=3) > 1.3
    large, clean = double(jpeg(half(hr), 40), "bilinear"), double(half(hr), "bilinear")
    assert metrics.blocking(large, period=16) > 1.4 * metrics.blocking(clean, period=16)
    assert abs(metrics.blocking(clean) - 1) < 0.1               # enlarging marks each second line: that is no grid


def test_seam_where_all_is_flat_along_the_borders():
    x = torch.full((3, 64, 64), 0.5)
    x[:, 10:20, 10:20] = 0.8
    assert metrics.seam(x, x, 32) == 1.0


def test_seam():
    whole = drawing(128, 192)
    tiled = whole.clone()
    tiled[:, :, 64:128] += 6 / 255
    assert metrics.seam(whole, whole, 64) == 1
    assert metrics.seam(tiled, whole, 64) > 1.2
    assert metrics.seam(tiled, whole, 64) == metrics.seam(tiled, whole, ([64], [64, 128]))
    assert metrics.seam(tiled, whole, ([], [64, 128])) > metrics.seam(tiled, whole, 64)
    assert metrics.seam(tiled, whole, 64, offset=30) < 1
    assert metrics.seam(tiled[:, :, 10:], whole[:, :, 10:], ([], [54, 118])) == pytest.approx(
        metrics.seam(tiled, whole, ([], [64, 128])), rel=0.05)
    with pytest.raises(ValueError, match=r"two pictures .* not \(3, 128, 192\) and \(3, 128, 128\)"):
        metrics.seam(whole, whole[..., :128], 64)


def test_highlights_one_by_one():
    hr = torch.full((3, 60, 200), 0.1)
    for k in range(9):
        hr[:, 30, 10 + 20 * k] = 0.1 + 0.09 * (k + 1)                   # 20 to 177 levels of Y above the ground
    seen = [metrics.highlight_recall(hr[..., 20 * k:20 * k + 20], hr[..., 20 * k:20 * k + 20]) for k in range(9)]
    assert math.isnan(seen[0]) and seen[1:] == [1] * 8
    for share, kept in ((0.6, 1), (0.4, 0)):
        assert metrics.highlight_recall(0.1 + (hr - 0.1) * share, hr) == kept
    assert metrics.highlight_recall(hr.roll(1, 2), hr) == 1 and metrics.highlight_recall(hr.roll(2, 2), hr) == 0


def test_ringing_in_levels():
    hr = torch.full((3, 40, 60), 100 / 255)
    hr[..., 30:] = 200 / 255
    sr = hr.clone()
    sr[..., 26:28] -= 11 / 255                                          # of RGB; 219 / 255 of that in Y
    # an edge 2 wide (Sobel), 6 more on both sides: 14 columns, 2 of them beyond by 11 * 219 / 255 - 1 levels
    assert metrics.ringing(sr, hr) == pytest.approx((11 * 219 / 255 - 1) * 2 / 14, abs=1e-3)


def test_flat_noise_in_levels():
    hr = torch.full((3, 90, 90), 100 / 255)
    sr = hr.clone()
    sr[:, ::2] += 4 / 255                                               # half of the rows: 5 or 4 of each 9
    assert metrics.flat_noise(sr, hr) == pytest.approx(4 * math.sqrt(20) / 9, abs=1e-3)


def test_faithfulness_against_pillow():
    lr = drawing(60, 70)
    sr = double(lr)
    pixels = Image.fromarray(sr.mul(255).round().byte().permute(1, 2, 0).numpy())
    again = np.asarray(pixels.resize((70, 60), Image.Resampling.BICUBIC)).astype(float)
    wanted = 10 * math.log10(255 ** 2 / np.mean((again - lr.permute(1, 2, 0).numpy() * 255) ** 2))
    assert metrics.faithfulness(sr, lr, 2) == pytest.approx(wanted, abs=0.1)
    assert metrics.faithfulness(sr + 0.4 / 255 * (sr < 0.9), lr, 2) == metrics.faithfulness(
        metrics.to_8_bit(sr + 0.4 / 255 * (sr < 0.9)), lr, 2)
    with pytest.raises(ValueError, match=r"\(3, 120, 140\) is not 3 times one \(3, 60, 70\)"):
        metrics.faithfulness(sr, lr, 3)


def test_error_map():
    hr = drawing(80, 90)
    sr = hr.clone()
    sr[:, 20:40, 30:50] += 0.06
    found = metrics.error_map(sr, hr)
    assert found.shape == (80, 90) and found.min() >= 0 and found.max() <= 1
    assert metrics.error_map(hr, hr).max() == 0
    assert found[25:35, 35:45].min() > 0.1 and found[60:].max() == 0
    even = torch.full((3, 40, 40), 0.4)
    error = 5 * 219 / 255                                               # of Y
    assert metrics.error_map(even + 5 / 255, even).mean().item() == pytest.approx(error / (error + 4), abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

OURS = [name for name in metrics.METRICS if name not in ("lpips", "dists", "maniqa", "clipiqa", "musiq")]


def golden():
    hr = drawing(220, 302)
    made = dict(blurred=blur(hr, 0.8), ringing=sinc(hr, 0.5), banded=bands(hr, 8), enlarged=double(half(hr)))
    return {label: {name: run(name, metrics.to_8_bit(sr), hr) for name in OURS} for label, sr in made.items()}


def test_golden_figures():
    expected = json.loads(GOLDEN.read_text())
    found = golden()
    assert found.keys() == expected.keys()
    for label, row in expected.items():
        assert found[label].keys() == row.keys()
        for name, value in row.items():
            assert found[label][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (label, name)


def test_table_is_whole():
    for name, metric in metrics.METRICS.items():
        assert metric.better in ("higher", "lower") and metric.needs in ("hr", "lr", "") and metric.digits >= 0, name
    assert len({metric.head for metric in metrics.METRICS.values()}) == len(metrics.METRICS)


@pytest.mark.parametrize("name", OURS)
def test_needs_and_batches(name):
    """What is not needed may be None; a batch gives the mean of its pictures; odd shapes a ValueError."""
    metric, hr = metrics.METRICS[name], torch.stack([drawing(200, 210), textured(200, 210)])
    sr = torch.stack([metrics.to_8_bit(blur(x, 0.8)) for x in hr])
    lr = torch.stack([half(x) for x in hr])
    given = [hr if metric.needs == "hr" else None, lr if metric.needs == "lr" else None]
    each = [metric.run(sr[i], *(x if x is None else x[i] for x in given), 2, 2) for i in range(2)]
    each = [v for v in each if not math.isnan(v)]
    assert metric.run(sr, *given, 2, 2) == pytest.approx(np.mean(each), rel=1e-5)
    with pytest.raises(ValueError) as e:
        metric.run(sr[:, :2], *given, 2, 2)
    assert "\n" not in str(e.value)


def test_chosen():
    assert metrics.chosen(" niqe,psnr_y, niqe ,") == ["niqe", "psnr_y"]
    with pytest.raises(ValueError, match="no metric 'psnr', 'Niqe'; there are psnr_y, ssim_y, .*musiq$"):
        metrics.chosen("psnr,Niqe,ssim_y")
    with pytest.raises(ValueError, match="there are psnr_y"):
        metrics.chosen(" , ")


def test_pyiqa(monkeypatch):
    x = drawing(32, 40)
    metrics._pyiqa_metric.cache_clear()
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(metrics.MissingPackage, match="^lpips needs pyiqa: pip install pyiqa .*non-commercial"):
        metrics.METRICS["lpips"].run(x, x, None, 2, 2)

    def create_metric(name, device):
        if name == "musiq":
            raise OSError("cannot reach\n the hub")
        return lambda *pictures: torch.tensor([[sum(p.sum() for p in pictures) * (-1) ** (name == "dists")]])
    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    assert metrics.METRICS["lpips"].run(x, x, None, 2, 2) == pytest.approx(2 * x.sum().item())
    assert metrics.METRICS["dists"].run(x, x, None, 2, 2) == pytest.approx(-2 * x.sum().item())
    assert metrics.METRICS["clipiqa"].run(x, None, None, 2, 2) == pytest.approx(x.sum().item())
    with pytest.raises(ValueError, match="^musiq of pyiqa failed: cannot reach the hub$"):
        metrics.METRICS["musiq"].run(x, None, None, 2, 2)
    metrics._pyiqa_metric.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# NIQE's model
# ---------------------------------------------------------------------------------------------------------------------


def test_shipped_model():
    model = metrics.load_niqe()
    assert model.mean.shape == (36,) and model.covariance.shape == (36, 36) and model.mean.dtype == torch.float64
    assert torch.equal(model.covariance, model.covariance.T) and torch.linalg.eigvalsh(model.covariance).min() > -1e-6
    from safetensors import safe_open
    with safe_open(Path(metrics.__file__).parent / "weights/niqe-anime.safetensors", "pt") as f:
        about = json.loads(f.metadata()["kabegami"])
    assert about["kind"] == "niqe" and about["pictures"] == 162 and "CC BY" in about["note"]


def test_fitted_model_knows_its_pictures():
    pictures = [drawing(288, 300 + 50 * k) for k in range(4)] + [textured(480, 480, seed=k) for k in range(2)]
    model = metrics.fit_niqe(pictures, sharpness=0.3)
    for fault in (lambda x: blur(x, 1.5), lambda x: noise(x, 10)):
        for x in pictures[-3:]:
            assert metrics.niqe(x, model) < metrics.niqe(fault(x), model)


def test_fit_counts_groups_and_pictures_alike():
    a, b = textured(480, 480, seed=1), metrics.to_8_bit(blur(textured(480, 480, seed=2), 1))
    one = metrics.fit_niqe([a], [b])
    for other in (metrics.fit_niqe([a, a, a], [b]), metrics.fit_niqe([b], iter([a])), metrics.fit_niqe([a, b])):
        assert torch.allclose(one.mean, other.mean) and torch.allclose(one.covariance, other.covariance)
    uneven = metrics.fit_niqe([a, a, b])
    assert not torch.allclose(one.mean, uneven.mean)
    features, sharp = metrics.niqe_features(metrics.luma(a)[0])
    assert features.shape == (25, 36)
    alone = metrics.fit_niqe([a, textured(960, 400, seed=3)], sharpness=0)
    both = torch.cat([features.mean(0, keepdim=True),
                      metrics.niqe_features(metrics.luma(textured(960, 400, seed=3))[0])[0].mean(0, keepdim=True)])
    assert torch.allclose(alone.mean, both.mean(0))
    soft = a.clone()
    soft[:, :, 240:] = blur(a, 4)[:, :, 240:]                   # of its blocks only the sharp half is taken
    soft[:, :100] = 0.5                                         # without texture: no feature of it is a number
    assert metrics.fit_niqe([soft], [a], [a], sharpness=-1).mean.isfinite().all()
    sharp_only = metrics.niqe_features(metrics.luma(soft)[0])[0].reshape(5, 5, 36)[1:, :2].flatten(0, 1).mean(0)
    assert torch.allclose(metrics.fit_niqe([soft], [a], [a]).mean, (sharp_only + 2 * features.mean(0)) / 3)
    with pytest.raises(ValueError, match="^0 sharp blocks of 96x96 are too few"):
        metrics.fit_niqe([torch.rand(3, 95, 400)], [])


def test_save_and_load(tmp_path):
    model = metrics.fit_niqe([textured(672, 672)])
    path = tmp_path / "清 い.safetensors"
    metrics.save_niqe(model, path, dict(note="壁紙"))
    again = metrics.load_niqe(path)
    assert torch.equal(again.mean, model.mean.float().double())
    assert torch.equal(again.covariance, model.covariance.float().double())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    public = tmp_path / "pris.npz"
    np.savez(public, mu_pris_param=model.mean.numpy()[None], cov_pris_param=model.covariance.numpy(),
             gaussian_window=np.ones((7, 7)))
    x = textured(300, 300, seed=5)
    assert metrics.niqe(x, metrics.load_niqe(str(public))) == pytest.approx(metrics.niqe(x, model), rel=1e-9)


def test_bad_models_get_one_line(tmp_path):
    (tmp_path / "rubbish.safetensors").write_bytes(b"no" * 50)
    (tmp_path / "rubbish.npz").write_bytes(b"no" * 50)
    from safetensors.torch import save_file
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(tmp_path / "small.npz", mu_pris_param=np.zeros(3), cov_pris_param=np.zeros((3, 3)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "small.npz").read_bytes()[:-40])
    (tmp_path / "empty.npz").touch()
    (tmp_path / "line\nbreak.npz").touch()
    (tmp_path / "folder.safetensors").mkdir()
    np.savez(tmp_path / "pickle.npz", mu_pris_param=np.array([{}]), cov_pris_param=np.zeros((36, 36)))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match="is no NIQE model") as e:
            metrics.load_niqe(path)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no NIQE model .*absent.safetensors'; make one: python metrics.py fit-niqe"):
        metrics.load_niqe(tmp_path / "absent.safetensors")


def test_niqe_small_and_even():
    model = metrics.load_niqe()
    with pytest.raises(ValueError, match="96 pixels a side, not 95x300"):
        metrics.niqe(torch.rand(3, 300, 95), model)
    x = textured(288, 288)
    x[:, :100] = 0.3                            # three even blocks, left out: not as if they had some texture
    features, _ = metrics.niqe_features(metrics.luma(x)[0])
    gone = features.isnan().any(1)
    assert gone.tolist() == [True, True, True] + [False] * 6
    assert math.isfinite(metrics.niqe(x, model))


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["metrics.py", "fit-niqe", *map(str, args)])
    metrics.main()


def test_command(tmp_path, monkeypatch, capsys):
    folders = []
    for k in range(2):
        folders.append(tmp_path / f"絵 {k}")
        folders[k].mkdir()
        pixels = textured(480, 576, k).mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folders[k] / "a b.png")
    (folders[0] / "broken.png").write_bytes(b"x" * 30)
    Image.new("RGB", (95, 200)).save(folders[0] / "small.png")
    out = tmp_path / "model.safetensors"
    command(monkeypatch, *folders, "-o", out, "--note", "mine")
    said = capsys.readouterr()
    assert "2 pictures" in said.out and "skipped: " in said.err and "broken.png" in said.err and "small.png" in said.err
    wanted = metrics.fit_niqe([textured(480, 576, 0)], [textured(480, 576, 1)])
    assert torch.allclose(metrics.load_niqe(out).mean, wanted.mean, atol=1e-6)
    for args, line in ((["-o", out], "exists already; choose another name, or give --overwrite"),
                       (["-o", tmp_path / "x.pth"], "ends in .safetensors"),
                       (["-o", tmp_path / "absent" / "x.safetensors"], "absent: no such file or directory")):
        with pytest.raises(SystemExit) as e, monkeypatch.context() as patch:
            patch.setattr(metrics, "fit_niqe", None)    # known before anything is read
            command(patch, *folders, *args)
        said = capsys.readouterr().err.splitlines()
        assert e.value.code == 2 and said[-1].startswith("error: ") and line in said[-1]
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, tmp_path / "nowhere", "-o", tmp_path / "y.safetensors")
    assert e.value.code == 2 and "nowhere: no such file or folder" in capsys.readouterr().err
    command(monkeypatch, *folders, "-o", out, "--overwrite")

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(metrics, "fit_niqe", interrupted)
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, *folders, "-o", tmp_path / "z.safetensors")
    assert e.value.code == 130 and not (tmp_path / "z.safetensors").exists()


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
