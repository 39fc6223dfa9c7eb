"""degrade.py: resampling against Pillow and PyTorch, operations against plain formulas, random draws against the
recipes, the same bits in any batch, thread, and process, artifacts, the command."""
import functools
import hashlib
import io
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import degrade
import images
from test_clean import linear_profile

PILLOW = dict(bicubic=Image.Resampling.BICUBIC, lanczos=Image.Resampling.LANCZOS, bilinear=Image.Resampling.BILINEAR)


def smooth(*shape, seed=0):
    """Pictures in [0, 1] with soft shapes and some hard edges."""
    g = torch.Generator().manual_seed(seed)
    b, c, h, w = shape
    x = F.interpolate(torch.rand(b, c, h // 8 + 2, w // 8 + 2, generator=g), (h, w), mode="bicubic")
    return degrade.to_8_bit(torch.where(x > 0.7, x, x * 0.8))


# ---- resampling

@pytest.mark.parametrize("kernel", PILLOW)
@pytest.mark.parametrize("size", [(50, 75), (31, 77), (202, 300), (140, 40)])
def test_resize_equals_pillow_away_from_the_border(kernel, size):
    x = smooth(1, 3, 101, 150)[0]
    theirs = np.stack([Image.fromarray(c.numpy()).resize(size[::-1], PILLOW[kernel]) for c in x])
    ours = degrade.resize(x, size, kernel).numpy()
    my, mx = (math.ceil(4 * max(1, out / n, n / out)) for out, n in zip(size, (101, 150)))
    assert abs(ours - theirs)[:, my:-my, mx:-mx].max() < 2e-6


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_resize_equals_pytorch_away_from_the_border(kernel):
    x = smooth(2, 3, 90, 70)
    for size in ((45, 35), (30, 50), (180, 210)):
        theirs = F.interpolate(x, size, mode=kernel, antialias=True)
        assert (degrade.resize(x, size, kernel) - theirs)[..., 12:-12, 12:-12].abs().max() < 2e-5


def test_area_is_the_mean_over_the_footprint():
    x = smooth(1, 3, 60, 84)
    assert torch.allclose(degrade.resize(x, (20, 21), "area"), F.avg_pool2d(x, (3, 4)), atol=1e-6)
    assert torch.equal(degrade.resize(x, (120, 84), "area"), x.repeat_interleave(2, -2))
    # 5 -> 2: each output pixel covers two whole pixels and half of the middle one
    row = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert torch.allclose(degrade.resize(row, (1, 2), "area"), torch.tensor([[4.5, 10.5]]) / 2.5)


@pytest.mark.parametrize("kernel", degrade.KERNELS)
def test_the_border_is_symmetric(kernel):
    x = smooth(1, 1, 24, 36)[0]
    mirrored = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (24, 24), (36, 36)), "symmetric"))
    for n, d in ((1, 2), (1, 3), (2, 1), (3, 4)):
        size = 24 * n // d, 36 * n // d
        big = degrade.resize(mirrored, (3 * size[0], 3 * size[1]), kernel)
        ours = degrade.resize(x, size, kernel)
        assert torch.allclose(ours, big[:, size[0]:2 * size[0], size[1]:2 * size[1]], atol=1e-6)


def test_bicubic_halving_by_hand():
    # MATLAB's weights for a half: kernel at 0.25, 0.75, 1.25, 1.75, over two
    def keys(t):
        return 1.5 * t ** 3 - 2.5 * t ** 2 + 1 if t < 1 else -0.5 * t ** 3 + 2.5 * t ** 2 - 4 * t + 2
    half = [keys(t) / 2 for t in (1.75, 1.25, 0.75, 0.25)]
    row = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = sum(w * row[5 + i] for i, w in enumerate(half + half[::-1]))
    assert abs(degrade.resize(row.float()[None], (1, 8))[0, 4] - expected) < 1e-6


@pytest.mark.parametrize("kernel", degrade.KERNELS)
@pytest.mark.parametrize("sizes", [((1, 1), (7, 3)), ((7, 3), (1, 1)), ((1, 40), (2, 5)), ((5, 5), (5, 5))])
def test_resize_of_any_size_keeps_a_flat_color(kernel, sizes):
    x = torch.tensor([0.2, 0.5, 0.9])[:, None, None].expand(3, *sizes[0])
    y = degrade.resize(x, sizes[1], kernel)
    assert y.shape == (3, *sizes[1])
    assert torch.allclose(y, x[:, :1, :1].expand_as(y), atol=1e-6)


def test_resize_without_antialiasing_equals_pytorch():
    x = smooth(1, 3, 90, 70)
    for size in ((30, 21), (41, 200)):
        theirs = F.interpolate(x, size, mode="bilinear", align_corners=False)
        assert (degrade.resize(x, size, "bilinear", antialias=False) - theirs).abs().max() < 1e-5
        assert (degrade.resize(x, size, "bilinear") - theirs).abs().max() > 0.02
    assert torch.equal(degrade.resize(x, (30, 21), "area", antialias=False), degrade.resize(x, (30, 21), "area"))


def test_resize_passes_gradients():
    x = smooth(1, 3, 20, 30).requires_grad_()
    degrade.resize(x, (10, 45)).sum().backward()
    assert x.grad.shape == x.shape and (x.grad[..., 4:-4, 4:-4] - 0.75).abs().max() < 1e-3   # area ratio: 450 / 600


# ---- operations

def by_plain_sums(x, kernel):
    """(C, H, W) under a (k, k) kernel with a repeated border, in float64."""
    r, (h, w) = len(kernel) // 2, x.shape[-2:]
    padded = np.pad(x.double().numpy(), ((0, 0), (r, r), (r, r)), "edge")
    return sum(kernel[i, j] * padded[:, i:i + h, j:j + w] for i in range(2 * r + 1) for j in range(2 * r + 1))


def test_gaussian_blur_by_plain_sums():
    x = smooth(1, 3, 9, 11)[0]
    assert torch.equal(degrade.gaussian_blur(x, 0.0), x)
    for sigma in (0.4, 0.8, 2.5):
        r = math.ceil(4 * sigma)
        g = np.exp(-0.5 * (np.arange(-r, r + 1) / sigma) ** 2)
        expected = by_plain_sums(x, np.outer(g, g) / g.sum() ** 2)
        assert abs(degrade.gaussian_blur(x, sigma).numpy() - expected).max() < 1e-6


def test_convolve_by_plain_sums():
    rng = np.random.default_rng(0)
    for size, shape in ((3, (3, 9, 11)), (7, (1, 5, 40)), (21, (3, 30, 13)), (5, (1, 3, 2 ** 15 + 5))):
        x = torch.from_numpy(rng.random(shape, np.float32))
        lopsided = rng.uniform(-1, 1, (size, size)) / size ** 2
        mirrored = lopsided + lopsided[::-1]
        for kernel in (lopsided, mirrored, mirrored + mirrored[:, ::-1]):
            assert abs(degrade.convolve(x, kernel).numpy() - by_plain_sums(x, kernel)).max() < 1e-6


def moments(kernel):
    """Mean and covariance of x and y under a kernel as a distribution."""
    at = np.stack(np.meshgrid(*[np.arange(len(kernel))] * 2)).reshape(2, -1)
    mean = at @ kernel.ravel()
    return mean, (at - mean[:, None]) * kernel.ravel() @ (at - mean[:, None]).T


def test_gaussian_kernels_have_their_sigmas_and_angle():
    t = np.arange(-10, 11)
    g = np.exp(-0.5 * (t / 1.7) ** 2)
    assert np.allclose(degrade.blur_kernel(21, "iso", (1.7, 1.7)), np.outer(g, g) / g.sum() ** 2)
    for kind in ("aniso", "generalized aniso"):
        mean, cov = moments(degrade.blur_kernel(31, kind, (3.0, 1.0), 0.5))
        turn = np.array([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
        assert np.allclose(mean, 15) and np.allclose(cov, turn @ np.diag([9, 1]) @ turn.T, atol=1e-2)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.5])
def test_generalized_and_plateau_kernels_follow_their_formulas(beta):
    sizes, angle = (2.0, 0.7), 0.4
    general = degrade.blur_kernel(9, "generalized aniso", sizes, angle, beta)
    plateau = degrade.blur_kernel(9, "plateau aniso", sizes, angle, beta)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.diag(np.square(sizes)) @ turn.T)
    for row in range(9):
        for column in range(9):
            v = np.array([column - 4, row - 4])
            d = (v @ inverse @ v) ** beta
            assert math.isclose(general[row, column] / general[4, 4], math.exp(-0.5 * d), rel_tol=1e-6)
            assert math.isclose(plateau[row, column] / plateau[4, 4], 1 / (1 + d), rel_tol=1e-6)
    assert math.isclose(general.sum(), 1) and math.isclose(plateau.sum(), 1)


@pytest.mark.parametrize("cutoff", [math.pi / 5, math.pi / 2, 2.5])
def test_sinc_kernel_is_a_circular_low_pass(cutoff):
    # the disc of that radius in the frequency plane, integrated by hand
    step = 0.01
    u, v = np.meshgrid(*[np.arange(-cutoff, cutoff + step, step)] * 2)
    disc = u ** 2 + v ** 2 <= cutoff ** 2
    kernel = degrade.blur_kernel(9, "sinc", cutoff=cutoff)
    for y, x in ((0, 0), (0, 1), (2, 3), (-4, 1), (4, 4)):
        one = np.cos(u * x + v * y)[disc].sum() / disc.sum()
        assert abs(kernel[4 + y, 4 + x] / kernel[4, 4] - one) < 5e-3
    assert math.isclose(kernel.sum(), 1)
    wide = np.abs(np.fft.fft2(degrade.blur_kernel(101, "sinc", cutoff=cutoff)))[0, :51]
    frequency = 2 * np.pi * np.arange(51) / 101
    assert wide[frequency < 0.8 * cutoff].min() > 0.9 and wide[frequency > min(1.25 * cutoff, 3)].max() < 0.1


def test_unsharp_and_color_shift():
    x = smooth(1, 3, 20, 30)[0]
    soft = degrade.gaussian_blur(x, 1.3)
    assert torch.allclose(degrade.unsharp(x, 1.3, 0.7), 1.7 * x - 0.7 * soft, atol=1e-6)
    assert torch.allclose(degrade.unsharp(x, 1.3, -1.0), soft, atol=1e-6)
    y = degrade.color_shift(x, [1.0, 0.9, 1.1], [0.0, 0.1, -0.1])
    assert torch.equal(y[0], x[0]) and torch.allclose(y[1], 0.9 * x[1] + 0.1) and torch.allclose(y[2], 1.1 * x[2] - 0.1)


def test_noise_has_its_strength():
    x = torch.tensor([0.3, 0.5, 0.7])[:, None, None].repeat(1, 200, 200)
    for gray in (False, True):
        field = degrade.noise(x, "gaussian", 12.0, gray, 7) - x
        assert abs(field.std() * 255 - 12) < 0.3 and abs(field.mean() * 255) < 0.3
        assert torch.allclose(field[0], field[1], atol=1e-6) == gray
    x[1], x[:, :100] = 0.7, 0.2                             # three levels in all, so that 4 photons make full white
    field = degrade.noise(x, "poisson", 0.6, False, 7) - x
    for channel, level in enumerate((0.3, 0.7, 0.7)):
        for part, there in ((field[channel, :100], 0.2), (field[channel, 100:], level)):
            assert abs(part.std() / (0.6 * math.sqrt(there / 4)) - 1) < 0.05 and abs(part.mean()) < 0.01
    assert torch.equal(degrade.noise(x, "poisson", 0.6, False, 7), x + field)
    assert not torch.equal(degrade.noise(x, "poisson", 0.6, False, 8), x + field)
    gray = degrade.noise(x, "poisson", 0.6, True, 7) - x
    assert torch.allclose(gray[0], gray[2], atol=1e-6) and gray.std() > 0.05


def test_grain_has_its_amplitude_and_direction():
    x = torch.full((3, 200, 200), 0.5)
    field = degrade.grain(x, 4.0, (2.5, 0.5), math.pi / 2, 3) - x
    assert abs(field.std() * 255 - 4) < 0.4 and torch.allclose(field[0], field[2], atol=1e-6)
    down, across = (field[0, 1:] - field[0, :-1]).abs().mean(), (field[0, :, 1:] - field[0, :, :-1]).abs().mean()
    assert across > 2 * down                                # long strokes from top to bottom


def test_median_keeps_lines_and_removes_specks():
    x = smooth(1, 3, 40, 50)[0] * 0.02 + 0.4                # without lines
    padded = np.pad(x.numpy(), ((0, 0), (1, 1), (1, 1)), "edge")
    windows = np.stack([padded[:, i:i + 40, j:j + 50] for i in range(3) for j in range(3)])
    assert np.array_equal(degrade.median(x, 0.1).numpy(), np.median(windows, 0))
    x[:, :, 25] = 0.9                                       # a thin line: a median alone would remove it
    x[:, 10, 8] += 0.09                                     # a speck, too faint for a line
    y = degrade.median(x, 0.1)
    assert torch.equal(y[:, :, 23:28], x[:, :, 23:28])
    assert (y[:, 10, 8] < 0.43).all() and not torch.equal(y[:, :, :20], x[:, :, :20])
    x = torch.full((3, 20, 30), 0.4)
    x[:, :, 8], x[:, :, 20] = 0.6, 0.7
    y = degrade.median(x, 0.25)                   # a step of 0.3 is a line then, one of 0.2 is not
    assert torch.equal(y[:, :, 14:], x[:, :, 14:]) and (y[:, :, :14] == 0.4).all()


def test_vae_grid_repeats_every_8_pixels():
    x = torch.full((3, 64, 80), 0.5)
    field = degrade.vae_grid(x, 1.5, (3, 6), 5) - x
    assert abs(field.std() * 255 - 1.5) < 0.4 and abs(field.mean() * 255) < 0.3

    def blocks(y, x):
        return field[:, y:y + 56, x:x + 72].unfold(1, 8, 8).unfold(2, 8, 8).reshape(3, 63, 64).double()
    one = F.normalize(blocks(5, 2), dim=2)                  # the first whole cell begins at 8 - 3, 8 - 6
    assert (one[:, :1] * one).sum(2).min() > 0.999          # the same pattern, at many strengths
    strengths = blocks(5, 2).norm(dim=2)[0]
    assert 2 < strengths.max() / strengths.min() < 3.1
    moved = F.normalize(blocks(4, 2), dim=2)
    assert (moved[:, :1] * moved).sum(2).min() < 0.99


def test_compress_equals_pillow_on_a_shifted_grid():
    x = smooth(1, 3, 37, 50)[0]
    pixels = x.mul(255).round().byte().permute(1, 2, 0).numpy()
    for codec, kind, how in (("jpeg", "JPEG", dict(subsampling="4:2:0")), ("webp", "WEBP", {})):
        for dy, dx in ((0, 0), (5, 13)):
            shifted = np.pad(pixels, ((dy, 0), (dx, 0), (0, 0)), "symmetric")
            file = io.BytesIO()
            Image.fromarray(shifted).save(file, kind, quality=85, **how)
            expected = np.array(Image.open(file).convert("RGB"))[dy:, dx:]
            ours = degrade.compress(x, codec, 85, offset=(dy, dx))
            assert np.array_equal(ours.mul(255).round().byte().permute(1, 2, 0).numpy(), expected)
    colourful = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    error = {c: (degrade.compress(colourful, "jpeg", 95, c) - colourful).abs().mean() for c in ("4:2:0", "4:4:4")}
    assert error["4:4:4"] < 0.3 * error["4:2:0"]
    assert degrade.compress(torch.full((3, 1, 1), 0.5), "jpeg", 90, offset=(15, 15)).shape == (3, 1, 1)
    for codec in ("gif", "h266"):
        with pytest.raises(ValueError, match="there are jpeg, webp"):
            degrade.compress(x, codec, 90)


@pytest.mark.parametrize("codec", ["avif", *degrade.VIDEO])
def test_other_codecs(codec):
    if not degrade.can_write(codec):
        with pytest.raises(ValueError, match="there are jpeg, webp"):
            degrade.compress(smooth(1, 3, 9, 9)[0], codec, 30)
        pytest.skip(f"this machine cannot write {codec}")
    x = smooth(1, 1, 65, 90)[0] * 0.7 + torch.tensor([0.2, 0.1, 0.0])[:, None, None]    # thinned colour does not show
    good, bad = dict(avif=(95, 20), mpeg2=(2, 31), mpeg4=(2, 31), h264=(10, 38), h265=(10, 42))[codec]
    y, z = degrade.compress(x, codec, good), degrade.compress(x, codec, bad)
    assert (y - x).abs().mean() < 0.02 and 1.5 * (y - x).abs().mean() < (z - x).abs().mean() < 0.1
    assert (y - x).mean((1, 2)).abs().max() < 0.8 / 255         # no colour is lost on the way
    assert torch.equal(degrade.compress(x, codec, good), y)
    assert not torch.equal(degrade.compress(x, codec, bad, offset=(3, 5)), z)
    for size in ((1, 1), (7, 11)):
        assert degrade.compress(torch.rand(3, *size), codec, bad, offset=(15, 0)).shape == (3, *size)


def test_downscale_is_resize_in_8_bits():
    x = smooth(1, 3, 16, 24)[0]
    for kernel in degrade.KERNELS:
        assert torch.equal(degrade.downscale(x, (8, 12), kernel), degrade.to_8_bit(degrade.resize(x, (8, 12), kernel)))


# ---- recipes

TOLERANCE = 0.03        # three standard deviations of a share of 3000 are less
CLEAN = [(degrade.downscale, dict(size=(40, 60), kernel="bicubic"))]


@functools.lru_cache(maxsize=None)
def draws(recipe):
    """The operations of 3000 pictures of 120x80 at scale 2, without the clean ones."""
    shares = degrade.parse_recipe(recipe)
    every = [degrade.draw(shares, seed, (80, 120), 2) for seed in range(3000)]
    return [operations for operations in every if operations != CLEAN]


def names(operations):
    return "".join(function.__name__ + " " for function, _ in operations)


def arguments(operations, name):
    return [values for function, values in operations if function.__name__ == name]


def spans(values, limits, tolerance=0.05):
    """Whether uniform draws lie within limits and come close to both."""
    low, high = limits
    slack = tolerance * (high - low)
    return low <= min(values) <= low + slack and high - slack <= max(values) <= high


def has_shares(values, chances):
    """Whether names occur as often as their chances say."""
    assert set(values) == {name for name, chance in chances.items() if chance}
    total = sum(chances.values())
    return all(abs(values.count(n) / len(values) - c / total) < TOLERANCE for n, c in chances.items())


ORDER = dict(       # operations in parentheses may be left out
    bicubic="downscale ",
    web="downscale (gaussian_blur )?(compress )?",
    gallery="downscale (gaussian_blur )?(compress )?",
    jpeg="downscale (compress )?compress ",
    light="(compress )?(resize )?downscale (gaussian_blur )?(kernel_blur )?(compress )?",
    real="kernel_blur resize noise compress (kernel_blur )?resize noise "
         "(resize (kernel_blur )?compress |compress resize (kernel_blur )?)",
    soft="downscale (grain )?(compress )?(kernel_blur )?",
    awm2x="downscale (median )?(gaussian_blur )?(unsharp )?compress ",
    awm4x="downscale (median )?(gaussian_blur )?(unsharp )?compress ",
    diffusion="downscale (unsharp )?(vae_grid )?(color_shift )?(compress )?",
    line="(compress )?(kernel_blur )?downscale compress ",
)


@pytest.mark.parametrize("recipe", degrade.RECIPES)
def test_order_and_chances(recipe):
    table = degrade.RECIPES[recipe]
    assert all(re.fullmatch(ORDER[recipe], names(operations)) for operations in draws(recipe))
    if recipe == "bicubic":
        return
    unchanged = math.prod(1 - entry.get("p", 1.0) for entry in table["chain"] if entry["op"] != "downscale")
    assert abs(1 - len(draws(recipe)) / 3000 - table["clean"]) < TOLERANCE / 1.5 + unchanged
    for function in {degrade.OPERATIONS[entry["op"]].apply for entry in table["chain"]}:
        entries = [entry for entry in table["chain"] if degrade.OPERATIONS[entry["op"]].apply is function]
        count = sum(len(arguments(operations, function.__name__)) for operations in draws(recipe))
        assert abs(count / len(draws(recipe)) - sum(entry.get("p", 1.0) for entry in entries)) < TOLERANCE


@pytest.mark.parametrize("op", [op for op, operation in degrade.OPERATIONS.items()
                                if operation.draw is degrade.draw_ranges])
def test_ranges_are_drawn_uniformly(op):
    entry = next(entry for recipe in degrade.RECIPES.values() for entry in recipe["chain"] if entry["op"] == op)
    rng = np.random.default_rng(0)
    values = [degrade.OPERATIONS[op].draw(rng, entry, None, None) for _ in range(1000)]
    for name in degrade.OPERATIONS[op].parameters:
        assert spans([v[name] for v in values], entry[name])


def test_compress_draws_as_its_entry_says():
    entry = degrade.RECIPES["web"]["chain"][2]
    rng = np.random.default_rng(0)
    values = [degrade.draw_compress(rng, entry, None, None) for _ in range(3000)]
    assert has_shares([v["codec"] for v in values], entry["codec"])
    for codec, (low, high) in entry["quality"].items():
        assert {v["quality"] for v in values if v["codec"] == codec} == set(range(low, high + 1))
    assert has_shares([v["chroma"] for v in values if v["codec"] == "jpeg"], entry["chroma"])
    assert {v["chroma"] for v in values if v["codec"] == "webp"} == {"4:2:0"}
    assert {v["offset"][0] for v in values} == {v["offset"][1] for v in values} == set(range(16))


def test_grain_grid_and_colors_draw_as_their_entries_say():
    rng = np.random.default_rng(0)
    entry = degrade.RECIPES["soft"]["chain"][1]
    values = [degrade.draw_grain(rng, entry, None, None) for _ in range(2000)]
    assert spans([v["amplitude"] for v in values], entry["amplitude"])
    assert spans([v["sigma"][1] for v in values], entry["sigma"]) and spans([v["angle"] for v in values], (0, math.pi))
    brush = [v["sigma"][0] for v in values if v["sigma"][0] != v["sigma"][1]]
    assert abs(len(brush) / 2000 - entry["brush"]) < 0.04 and spans(brush, entry["brush_length"])
    entry = degrade.RECIPES["diffusion"]["chain"][2]
    values = [degrade.draw_vae_grid(rng, entry, None, None) for _ in range(1000)]
    assert {v["offset"] for v in values} == {(i, j) for i in range(8) for j in range(8)}
    entry = degrade.RECIPES["diffusion"]["chain"][3]
    values = [degrade.draw_color_shift(rng, entry, None, None) for _ in range(1000)]
    for name in ("gain", "shift"):
        assert all(spans([v[name][channel] for v in values], entry[name]) for channel in range(3))


def check_kernels(values, size, sinc, cutoff, shape=None, sigma=None, beta=None):
    """Compare draws of kernel_blur with its ranges."""
    assert {v["size"] for v in values} == set(range(size[0], size[1] + 1, 2))
    sincs = [v for v in values if v["shape"] == "sinc"]
    assert abs(len(sincs) / len(values) - sinc) < TOLERANCE
    starts = [*sorted(cutoff), 99]
    for start, end in zip(starts, starts[1:]):
        assert spans([v["cutoff"] for v in sincs if start <= v["size"] < end], cutoff[start], 0.1)
    others = [v for v in values if v["shape"] != "sinc"]
    if not others:
        return
    assert has_shares([v["shape"] for v in others], shape) and spans([v["sigma"][0] for v in others], sigma)
    for v in others:
        assert sigma[0] <= v["sigma"][1] <= sigma[1] and abs(v["angle"]) <= math.pi
        if "aniso" not in v["shape"]:
            assert v["sigma"][0] == v["sigma"][1] and v["angle"] == 0.0
        assert v["beta"] == 1.0 or " " in v["shape"]
    for family, limits in beta.items():
        betas = [v["beta"] for v in others if v["shape"].startswith(family)]
        assert spans(betas, limits, 0.1)
        if limits[0] < 1:
            assert abs(sum(b < 1 for b in betas) / len(betas) - 0.5) < 3 / math.sqrt(len(betas))


def test_real_has_the_ranges_of_real_esrgan():
    """The numbers are those of the authors' options/train_realesrgan_x2plus.yml, not of our table."""
    shape = {"iso": .45, "aniso": .25, "generalized iso": .12, "generalized aniso": .03, "plateau iso": .12,
             "plateau aniso": .03}
    cutoff = {0: (math.pi / 3, math.pi), 13: (math.pi / 5, math.pi)}
    every = draws("real")
    early = [bool(re.search("noise compress resize (kernel_blur )?$", names(operations))) for operations in every]
    assert abs(sum(early) / len(every) - 0.5) < TOLERANCE
    firsts = [[values for _, values in operations[:4]] for operations in every]     # blur, resize, noise, compress
    seconds = [operations[4:] for operations in every]
    second_blurs = [s[0][1] for s in seconds if s[0][0] is degrade.kernel_blur]
    assert abs(len(second_blurs) / len(every) - 0.8) < TOLERANCE
    for blurs, sigma in (([f[0] for f in firsts], (0.2, 3)), (second_blurs, (0.2, 1.5))):
        check_kernels(blurs, (7, 21), 0.1, cutoff, shape, sigma, dict(generalized=(0.5, 4), plateau=(1, 2)))
    for sizes, base, (up, down, keep), factor in (
            ([f[1] for f in firsts], 120, (.2, .7, .1), (.15, 1.5)),
            ([arguments(s, "resize")[0] for s in seconds], 60, (.3, .4, .3), (.3, 1.2))):
        widths = [v["size"][1] for v in sizes]
        assert abs(sum(w == base for w in widths) / len(every) - keep) < TOLERANCE + 0.03   # some factors are near 1
        assert abs(sum(w < base for w in widths) / len(every) - down) < TOLERANCE
        assert spans([w / base for w in widths], factor)
        assert has_shares([v["kernel"] for v in sizes], dict(area=1, bilinear=1, bicubic=1))
        assert not any(v["antialias"] for v in sizes)
    for noises, sigma, scale in (([f[2] for f in firsts], (1, 30), (.05, 3)),
                                 ([arguments(s, "noise")[0] for s in seconds], (1, 25), (.05, 2.5))):
        assert has_shares([v["kind"] for v in noises], dict(gaussian=.5, poisson=.5))
        assert spans([v["strength"] for v in noises if v["kind"] == "gaussian"], sigma)
        assert spans([v["strength"] for v in noises if v["kind"] == "poisson"], scale)
        assert abs(sum(v["gray"] for v in noises) / len(noises) - 0.4) < TOLERANCE
    for codes in ([f[3] for f in firsts], [arguments(s, "compress")[0] for s in seconds]):
        assert {v["quality"] for v in codes} == set(range(30, 96))
        assert {(v["codec"], v["chroma"]) for v in codes} == {("jpeg", "4:2:0")}
    assert {arguments(s, "resize")[1]["size"] for s in seconds} == {(40, 60)}


def test_kernels_of_the_other_recipes():
    chain = degrade.RECIPES["soft"]["chain"]
    entry = {name: value for name, value in chain[-1].items() if name not in ("op", "p")}
    check_kernels([v for operations in draws("soft") for v in arguments(operations, "kernel_blur")], **entry)
    last = [arguments(operations, "kernel_blur") for operations in draws("light")]
    check_kernels([v for values in last for v in values], (7, 21), 1.0, {0: (math.pi / 2, math.pi)})


def test_what_the_recipes_are_for():
    assert degrade.RECIPES["soft"]["chain"][-1]["op"] == "kernel_blur"                          # blur comes last
    assert not any("aniso" in shape for shape in degrade.RECIPES["soft"]["chain"][-1]["shape"])  # no motion blur
    for name in ("awm2x", "awm4x"):
        assert degrade.RECIPES[name]["chain"][-1]["quality"] == dict(jpeg=(85, 85))
    assert all(v["amount"] < 0 for operations in draws("diffusion") for v in arguments(operations, "unsharp"))


def test_web_draws_never_change():
    """A resumed training run sees the same LR pictures."""
    words, shares = [], degrade.parse_recipe("web")
    for seed in (0, 1, 2, 3, 10 ** 12, -1, 2 ** 63):
        for function, values in degrade.draw(shares, seed, (64, 64), 2):
            words += [function.__name__]
            words += [f"{v:.9f}" if isinstance(v, float) else str(v) for v in values.values()]
    assert hashlib.sha256(" ".join(words).encode()).hexdigest()[:16] == "6cb8d9a843f1a6dc"


def test_missing_codecs_are_replaced(monkeypatch):
    entry, rng = degrade.RECIPES["line"]["chain"][-1], np.random.default_rng(0)
    for available in (("jpeg",), ("jpeg", "webp"), ("jpeg", "webp", "avif", "h264", "mpeg2")):
        monkeypatch.setattr(degrade, "can_write", lambda codec, available=available: codec in available)
        values = [degrade.draw_compress(rng, entry, None, None) for _ in range(300)]
        assert {v["codec"] for v in values} == set(available)
        for v in values:
            low, high = entry["quality"][v["codec"]]
            assert low <= v["quality"] <= high


DOWN = dict(op="downscale", kernel=dict(bicubic=1.0))


def test_a_new_recipe_is_one_entry(monkeypatch):
    monkeypatch.setitem(degrade.RECIPES, "mine", dict(chain=[dict(op="blur", sigma=(2.0, 2.0)), DOWN]))
    hr = smooth(1, 3, 32, 48)
    lr = degrade.degrade(hr, "mine", 2, [0])
    assert torch.equal(lr[0], degrade.downscale(degrade.gaussian_blur(hr[0], 2.0).clamp(0, 1), (16, 24), "bicubic"))


@pytest.mark.parametrize("recipe, word", [
    (dict(chain=[dict(op="blurr", sigma=(1, 2)), DOWN]), "blurr"),
    (dict(chain=[DOWN, dict(sigma=(1, 2))]), "entry 2"),
    (dict(chain=[dict(op="blur", sigma=1.0), DOWN]), "sigma"),
    (dict(chain=[dict(op="blur", sigma=(2, 1)), DOWN]), "sigma"),
    (dict(chain=[dict(op="blur"), DOWN]), "sigma"),
    (dict(chain=[dict(op="blur", sigma=(1, 2), strength=(1, 2)), DOWN]), "strength"),
    (dict(chain=[dict(op="blur", sigma=(1, 2), p=1.5), DOWN]), "p is 1.5"),
    (dict(chain=[dict(op="downscale", kernel=dict(bicubicc=1.0))]), "bicubicc"),
    (dict(chain=[DOWN, dict(op="compress", codec=dict(webp=1.0), quality=dict(jpeg=(80, 90)),
                            chroma={"4:2:0": 1.0}, offset=(0, 0))]), "webp"),
    (dict(chain=[DOWN], cleann=0.1), "cleann"),
    (dict(clean=0.1), "chain"),
    (dict(chain=[dict(op="blur", sigma=(1, 2))]), "downscale"),
])
def test_a_wrong_entry_is_named(monkeypatch, recipe, word):
    monkeypatch.setitem(degrade.RECIPES, "mine", recipe)
    with pytest.raises(degrade.RecipeError, match=rf"mine.*{re.escape(word)}"):
        degrade.degrade(torch.zeros(1, 3, 8, 8), "mine", 2, [0])


@pytest.mark.parametrize("recipe", degrade.RECIPES)
def test_degrade_applies_what_it_draws(recipe):
    hr = smooth(8, 3, 32, 48)
    seeds = list(range(100, 108))
    lr = degrade.degrade(hr, recipe, 2, seeds)
    changed = 0
    for n, seed in enumerate(seeds):
        x = hr[n]
        for operation, how in degrade.draw(degrade.parse_recipe(recipe), seed, (32, 48), 2):
            x = operation(x, **how).clamp(0, 1)
        assert torch.equal(lr[n], degrade.to_8_bit(x))
        changed += not torch.equal(lr[n], degrade.downscale(hr[n], (16, 24), "bicubic"))
    assert changed >= 5 or recipe == "bicubic"


def test_bicubic_equals_pillow_within_a_level():
    hr = smooth(1, 3, 64, 96)
    ours = degrade.degrade(hr, "bicubic", 2, [0])[0].mul(255).round().permute(1, 2, 0).numpy()
    picture = Image.fromarray(hr[0].mul(255).round().byte().permute(1, 2, 0).numpy())
    theirs = np.array(picture.resize((48, 32), Image.Resampling.BICUBIC), dtype=float)
    assert abs(ours - theirs)[4:-4, 4:-4].max() <= 1
    assert (abs(ours - theirs)[4:-4, 4:-4] == 0).mean() > 0.8


@pytest.mark.parametrize("recipe", [*degrade.RECIPES, "web:0.5,bicubic:0.5"])
@pytest.mark.parametrize("scale", [1, 3])
def test_size_range_and_levels(recipe, scale):
    hr = smooth(5, 3, 7 * scale, 11 * scale)
    before = hr.clone()
    lr = degrade.degrade(hr, recipe, scale, range(5))
    assert lr.shape == (5, 3, 7, 11) and lr.dtype == torch.float32 and torch.equal(hr, before)
    assert lr.min() >= 0 and lr.max() <= 1 and torch.equal(lr, degrade.to_8_bit(lr))
    assert (lr * 255 - (lr * 255).round()).abs().max() < 1e-4


@pytest.mark.parametrize("recipe", [*degrade.RECIPES, "web:0.5,bicubic:0.5"])
def test_a_picture_does_not_depend_on_its_batch(recipe):
    hr = torch.rand(9, 3, 62, 50, generator=torch.Generator().manual_seed(3))
    seeds = [5, 2 ** 63, 7, -1, 123456789, 0, 1, 2, 3]
    whole = degrade.degrade(hr, recipe, 2, seeds)
    order = [4, 0, 8, 2, 6, 1, 3, 7, 5]
    assert torch.equal(degrade.degrade(hr[order], recipe, 2, [seeds[i] for i in order]), whole[order])
    for i in range(9):
        assert torch.equal(degrade.degrade(hr[i:i + 1], recipe, 2, seeds[i:i + 1])[0], whole[i])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert torch.equal(degrade.degrade(hr, recipe, 2, seeds), whole)
    finally:
        torch.set_num_threads(threads)


class Degraded(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return degrade.degrade(smooth(1, 3, 64, 64, seed=i), ",".join(degrade.RECIPES), 2, [i])[0]


def test_any_number_of_workers_gives_the_same_bits():
    alone = [Degraded()[i] for i in range(8)]
    for workers in (2,):
        batches = list(torch.utils.data.DataLoader(Degraded(), batch_size=3, num_workers=workers))
        assert torch.equal(torch.cat(batches), torch.stack(alone))


@pytest.mark.parametrize("recipe", [r for r in degrade.RECIPES if r != "bicubic"])
def test_seeds_differ(recipe):
    hr = smooth(1, 3, 64, 64).expand(8, -1, -1, -1)
    lr = degrade.degrade(hr, recipe, 2, range(8))
    clean = sum(torch.equal(x, degrade.downscale(hr[0], (32, 32), "bicubic")) for x in lr)
    assert len({x.numpy().tobytes() for x in lr}) >= 8 - max(0, clean - 1) >= 5
    assert len({x.numpy().tobytes() for x in degrade.degrade(hr, recipe, 2, [4] * 8)}) == 1


def test_a_mix_draws_one_part_per_picture():
    hr = smooth(400, 3, 16, 16)
    seeds = range(400)
    mixed, web, bicubic = (degrade.degrade(hr, r, 2, seeds) for r in ("web:0.7,bicubic:0.3", "web", "bicubic"))
    equals_web, equals_bicubic = ((mixed == x).flatten(1).all(1) for x in (web, bicubic))
    assert bool((equals_web | equals_bicubic).all())
    also = (web == bicubic).flatten(1).all(1)                   # web's own clean share
    assert abs((equals_web & ~also).sum() / (~also).sum() - 0.7) < 0.08
    assert degrade.parse_recipe(" web : 3 , bicubic:1") == dict(web=0.75, bicubic=0.25)
    assert degrade.parse_recipe("web") == dict(web=1.0)
    assert torch.equal(degrade.degrade(hr[:9], "web:1,bicubic:0", 2, range(9)), web[:9])


def test_wrong_recipes_and_shapes():
    hr = torch.zeros(2, 3, 8, 8)
    for recipe in ("wep", "web:0.5,sof:0.5", "", "web:x", "web:-1", "web:nan", "web:inf", "web:0"):
        with pytest.raises(degrade.RecipeError):
            degrade.parse_recipe(recipe)
    for wrong, seeds in ((hr[:, :, :7], [0, 1]), (hr, [0]), (hr[:, :1], [0, 1])):
        with pytest.raises(ValueError):
            degrade.degrade(wrong, "web", 2, seeds)


# ---- artifacts

@pytest.mark.parametrize("kind", degrade.ARTIFACTS)
def test_an_artifact_grows_with_its_strength(kind):
    hr = smooth(6, 3, 48, 64)
    before, errors = hr.clone(), []
    for s in (0, 0.25, 0.5, 0.75, 1):
        out = degrade.artifact(hr, kind, s, range(6))
        assert out.shape == hr.shape and out.dtype == torch.float32 and torch.equal(out, degrade.to_8_bit(out))
        errors.append((out - hr).abs().mean().item() * 255)
    assert torch.equal(hr, before)
    assert errors[0] < 1.6 and errors == sorted(errors) and errors[4] > 3 * errors[0] and errors[4] > 1.5 * errors[2]
    assert errors[2] > 1 or kind == "banding"
    mixed = degrade.artifact(hr[:2], ["blur", kind], [0.3, 0.8], [7, 3])
    assert torch.equal(mixed[1:], degrade.artifact(hr[1:2], kind, 0.8, [3]))    # independent of the batch
    assert degrade.artifact(hr[:1, :, :32, :32], kind, 1.0, [0]).shape == (1, 3, 32, 32)


def test_blocking_shows_a_grid_that_begins_anywhere():
    ramp = (torch.linspace(0.2, 0.8, 96)[None] + torch.linspace(0, 0.2, 96)[:, None]).expand(12, 3, 96, 96)
    found = set()
    for out in degrade.artifact(ramp, "blocking", 1.0, range(12)):
        steps = (out[..., 1:] - out[..., :-1]).abs().mean((0, 1))
        steps = torch.stack([steps[k::8].mean() for k in range(8)])
        if steps.max() > 2 * steps.median():
            found.add(int(steps.argmax()))
    assert len(found) >= 3


def test_ringing_swings_beside_an_edge():
    edge = torch.full((8, 3, 48, 64), 0.3)
    edge[..., 32:] = 0.7
    for out, levels in zip(degrade.artifact(edge, "ringing", 0.5, range(8)), range(8)):
        beside = out[0, 24, 34:44] - 0.7
        swings = (beside[beside.abs() > 0.5 / 255].sign().diff() != 0).sum()
        assert swings >= 2 and beside.abs().max() > 4 / 255


def test_banding_leaves_few_colours_and_keeps_detail():
    ramp = torch.linspace(0.1, 0.9, 128).expand(4, 3, 64, 128).contiguous()
    ramp[:, :, 40:] = (torch.rand(4, 3, 24, 128, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for s, levels in ((0.5, 22), (1.0, 7)):
        out = degrade.artifact(ramp, "banding", s, range(4))
        for picture in out:
            assert abs(len(picture[0, 10, 8:-8].unique()) - 0.7 * levels) < 3
        assert torch.equal(out[:, :, 50:], degrade.to_8_bit(ramp)[:, :, 50:])
    assert len({p.numpy().tobytes() for p in out}) == 4


def test_blur_oversharp_and_noise():
    edge = torch.full((2, 3, 32, 64), 0.3)
    edge[..., 32:] = 0.7
    soft = degrade.gaussian_blur(edge[0], degrade.ARTIFACTS["blur"].arguments["sigma"][2])
    assert torch.equal(degrade.artifact(edge, "blur", 1.0, [0, 1])[0], degrade.to_8_bit(soft))
    halo = degrade.artifact(edge, "oversharp", 1.0, [0, 1])
    assert (halo[..., 32] == 1).all() and (halo[..., 31] == 0).all() and (halo[..., :8] - 0.3).abs().max() < 2 / 255
    grain = degrade.artifact(torch.full((8, 3, 64, 64), 0.5), "noise", 0.5, range(8)) - 0.5
    assert abs(grain.std() * 255 - degrade.ARTIFACTS["noise"].arguments["sigma"][1]) < 0.5
    assert 0 < sum(torch.equal(g[0], g[1]) for g in grain) < 8                          # gray and coloured


def test_seam_runs_straight_and_leaves_one_side_alone():
    hr, ways, places = smooth(40, 3, 64, 64, seed=5), [0, 0], set()
    for x, out in zip(hr, degrade.artifact(hr, "seam", 0.6, range(40))):
        off = (out - x).abs().amax(0) > 0
        rows, columns = off.any(1).nonzero(), off.any(0).nonzero()
        top, left = int(rows.min()), int(columns.min())
        assert (top > 0) != (left > 0)                      # a line across the whole patch, upright or level
        ways[left > 0] += 1
        places.add(max(top, left))
        assert off[top:, left:].float().mean() > 0.3
    assert min(ways) >= 8 and len(places) > 15 and min(places) >= 8 and max(places) <= 60
    flat = degrade.artifact(torch.full((40, 3, 96, 96), 0.5), "seam", 0.6, range(40))
    assert any(len(p[0, :, 48].unique()) == 3 or len(p[0, 48].unique()) == 3 for p in flat)     # three tiles
    assert abs((flat - 0.5).abs().max() * 255 - 1.3 * 8) < 2.5


# ---- the command

def command(monkeypatch, capsys, *args):
    """(exit code, stdout, stderr) of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["degrade.py", *map(str, args)])
    code = 0
    try:
        degrade.main()
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def folder(tmp_path):
    """Five good pictures, odd sizes and names, and two bad ones."""
    hr = tmp_path / "hr"
    (hr / "空 と 海").mkdir(parents=True)

    def save(name, mode="RGB", size=(33, 26), **how):
        channels = dict(RGB=3, RGBA=4, L=1)[mode]
        x = smooth(1, channels, size[1], size[0], seed=len(name))[0].mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(x.squeeze(-1) if channels == 1 else x).save(hr / name, **how)

    save("a b.png")
    save("空 と 海/壁紙.PNG")
    save("photo.jpg", quality=95)
    save("seen through.png", "RGBA")
    save("gray.png", "L", (40, 40))
    (hr / "cut.png").write_bytes((hr / "a b.png").read_bytes()[:300])
    (hr / "text.jpg").write_text("not a picture")
    return hr


def test_command(folder, tmp_path, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, folder, tmp_path / "lr", "--recipe", "web", "--seed", 3)
    assert code == 0 and "5 pictures" in out and "2 skipped" in out
    assert err.count("skipped:") == 2 and "cut.png" in err and "text.jpg" in err
    written = {p.relative_to(tmp_path / "lr").as_posix() for p in (tmp_path / "lr").rglob("*") if p.is_file()}
    assert written == {"a b.png", "空 と 海/壁紙.png", "photo.png", "seen through.png", "gray.png"}
    for name in ("a b.png", "空 と 海/壁紙.PNG", "photo.jpg", "seen through.png", "gray.png"):
        hr = images.composite(images.read_picture(folder / name), 1.0)
        hr = hr[:, :hr.shape[1] // 2 * 2, :hr.shape[2] // 2 * 2]
        expected = degrade.degrade(hr[None], "web", 2, [degrade.picture_seed(name, 3)])[0]
        lr = images.read_picture(tmp_path / "lr" / name.replace(".jpg", ".png").replace(".PNG", ".png"))
        assert torch.equal(lr.rgb, expected) and lr.alpha is None


def test_the_profile_is_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "hr").mkdir()
    images.save_picture(tmp_path / "hr" / "a.png", images.Picture(torch.rand(3, 32, 32), icc=linear_profile()))
    assert command(monkeypatch, capsys, tmp_path / "hr", tmp_path / "lr")[0] == 0
    assert images.read_picture(tmp_path / "lr" / "a.png").icc == linear_profile()


def test_a_picture_too_wide_for_a_codec_goes_through_jpeg():
    x = torch.rand(3, 8, 16400)
    for codec, quality, expected in (("webp", 70, 70), ("h264", 30, 60)):
        if degrade.can_write(codec):
            assert torch.equal(degrade.compress(x, codec, quality), degrade.compress(x, "jpeg", expected))


def test_adding_a_picture_changes_no_other(folder, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, capsys, folder, tmp_path / "one")[0] == 0
    Image.new("RGB", (20, 20), "red").save(folder / "0 first.png")
    assert command(monkeypatch, capsys, folder, tmp_path / "two")[0] == 0
    for path in (tmp_path / "one").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_no_file_is_overwritten_without_the_flag(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr" / "photo.png").write_bytes(b"mine")
    code, _, err = command(monkeypatch, capsys, folder, tmp_path / "lr")
    assert code == 2 and "photo.png" in err and [p.name for p in (tmp_path / "lr").iterdir()] == ["photo.png"]
    assert command(monkeypatch, capsys, folder, tmp_path / "lr", "--overwrite")[0] == 0
    assert (tmp_path / "lr" / "photo.png").read_bytes() != b"mine"


def test_sheet(tmp_path, monkeypatch, capsys):
    picture, out = tmp_path / "a b.png", tmp_path / "new" / "sheet.png"
    x = smooth(1, 3, 130, 200)[0] * 0.3
    x[:, 0:64, 120:184] = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    images.save_picture(picture, images.Picture(rgb=x))
    assert command(monkeypatch, capsys, picture, "--sheet", out, "--seed", 3)[0] == 0
    page, hr = images.read_picture(out).rgb, images.read_picture(picture).rgb
    side, step, label = 130, 138, 72
    assert page.shape == (3, 3 * (side + label) + 8, 4 * step + 8)
    cells = [page[:, r * (side + label) + label:][:, :side, 8 + c * step:][..., :side]
             for r in range(3) for c in range(4)]
    left = next(left for left in range(71) if torch.equal(cells[0], hr[:, :, left:left + side]))
    assert left >= 120 - 66                                         # the part with most detail
    crop = hr[None, :, :, left:left + side]
    clean = degrade.degrade(crop, "bicubic", 2, [0])
    for cell, name in zip(cells[1:], degrade.RECIPES):
        expected = [degrade.degrade(crop, name, 2, [seed]) for seed in range(3, 9)]
        expected = next((lr for lr in expected if not torch.equal(lr, clean)), clean)[0]
        assert torch.equal(expected.repeat_interleave(2, 1).repeat_interleave(2, 2), cell)
    for wrong in ((picture, "--sheet", out), (tmp_path, "--sheet", tmp_path / "b.png"),
                  (picture, "--sheet", tmp_path / "b.gif"), (picture, "--sheet", tmp_path / "b.png", "--scale", 500)):
        code, _, err = command(monkeypatch, capsys, *wrong)
        assert code == 2 and err.startswith("error: ")
    assert not (tmp_path / "b.png").exists()


def test_users_mistakes(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    lr = tmp_path / "lr"
    for args, word in (((folder, lr, "--recipe", "wep"), "wep"), ((folder, lr, "--scale", "0"), "--scale"),
                       ((tmp_path / "none", lr), "none"), ((tmp_path / "empty", lr), "empty"),
                       ((folder, folder / "lr"), "inside"), ((folder,), "--sheet"),
                       ((folder, lr, "--scale", "100"), "none of the 7")):
        code, _, err = command(monkeypatch, capsys, *args)
        assert code == 2 and "error: " in err.splitlines()[-1] and word in err.splitlines()[-1]
    assert not lr.exists()
    shutil.copy(folder / "photo.jpg", folder / "photo.webp")
    code, _, err = command(monkeypatch, capsys, folder, lr)
    assert code == 2 and "photo.jpg" in err and "photo.webp" in err     # both would become photo.png
    (folder / "photo.webp").unlink()
    code, _, err = command(monkeypatch, capsys, folder, tmp_path / ("x" * 300))
    assert code == 2 and "cannot write" in err


def test_a_mistake_in_the_code_shows_its_traceback(folder, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise ValueError("shapes differ")
    monkeypatch.setattr(degrade, "to_8_bit", broken)
    with pytest.raises(ValueError, match="shapes differ"):
        command(monkeypatch, capsys, folder, tmp_path / "lr")
