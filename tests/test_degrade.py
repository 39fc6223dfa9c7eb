"""degrade.py: resampling against Pillow and PyTorch, operations against plain formulas, fixed results of recipes, the
same bits in any batch, thread, and process, artifacts, the command."""
import hashlib
import io
import math
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
    kernel = degrade.sinc_kernel(9, cutoff)
    for y, x in ((0, 0), (0, 1), (2, 3), (-4, 1), (4, 4)):
        one = np.cos(u * x + v * y)[disc].sum() / disc.sum()
        assert abs(kernel[4 + y, 4 + x] / kernel[4, 4] - one) < 5e-3
    assert math.isclose(kernel.sum(), 1)
    wide = np.abs(np.fft.fft2(degrade.sinc_kernel(101, cutoff)))[0, :51]
    frequency = 2 * np.pi * np.arange(51) / 101
    assert wide[frequency < 0.8 * cutoff].min() > 0.9 and wide[frequency > min(1.25 * cutoff, 3)].max() < 0.1


def apply(op, x, seed=0, sizes=None, **entry):
    return degrade.OPERATIONS[op](x, np.random.default_rng(seed), sizes, **entry)


def test_unsharp():
    x = smooth(1, 3, 20, 30)[0]
    soft = degrade.gaussian_blur(x, 1.3)
    assert torch.allclose(degrade.unsharp(x, 1.3, 0.7), 1.7 * x - 0.7 * soft, atol=1e-6)
    assert torch.allclose(degrade.unsharp(x, 1.3, -1.0), soft, atol=1e-6)


def test_noise_has_its_strength():
    def noise(kind, strength, gray, seed=7):
        return degrade.noise(x, np.random.default_rng(seed), kind, strength, gray) - x
    x = torch.tensor([0.3, 0.5, 0.7])[:, None, None].repeat(1, 200, 200)
    for gray in (False, True):
        field = noise("gaussian", 12.0, gray)
        assert abs(field.std() * 255 - 12) < 0.3 and abs(field.mean() * 255) < 0.3
        assert torch.allclose(field[0], field[1], atol=1e-6) == gray
    x[1], x[:, :100] = 0.7, 0.2                             # three levels, so that 4 photons make full white
    field = noise("poisson", 0.6, False)
    for channel, level in enumerate((0.3, 0.7, 0.7)):
        for part, mean in ((field[channel, :100], 0.2), (field[channel, 100:], level)):
            assert abs(part.std() / (0.6 * math.sqrt(mean / 4)) - 1) < 0.05 and abs(part.mean()) < 0.01
    assert torch.equal(noise("poisson", 0.6, False), field)
    assert not torch.equal(noise("poisson", 0.6, False, seed=8), field)
    gray = noise("poisson", 0.6, True)
    assert torch.allclose(gray[0], gray[2], atol=1e-6) and gray.std() > 0.05


def test_grain_has_its_amplitude():
    x = torch.full((3, 200, 200), 0.5)
    field = apply("grain", x, amplitude=(4, 4), sigma=(0.5, 0.5), brush=1.0, brush_length=(2.5, 2.5)) - x
    assert abs(field.std() * 255 - 4) < 0.4 and torch.allclose(field[0], field[2], atol=1e-6)


def test_rescale_sizes():
    x, sizes = smooth(1, 3, 40, 60)[0], dict(hr=(40, 60), lr=(20, 30))
    entry = dict(kernel=dict(area=1.0), aliased=0.0)
    for base, size in (("hr", (40, 60)), ("lr", (20, 30))):
        y = apply("rescale", x, sizes=sizes, base=base, direction=dict(keep=1.0), factor=(1, 1), **entry)
        assert torch.equal(y, degrade.resize(x, size, "area"))
    for name, low, high in (("up", 1, 1.5), ("down", 0.2, 1)):
        widths = [apply("rescale", x, n, sizes, base="hr", direction={name: 1}, factor=(0.2, 1.5), **entry).shape[2]
                  for n in range(50)]
        assert low * 60 - 1 <= min(widths) < low * 60 + 4 and high * 60 - 4 < max(widths) <= high * 60


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
    colorful = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    error = {c: (degrade.compress(colorful, "jpeg", 95, c) - colorful).abs().mean() for c in ("4:2:0", "4:4:4")}
    assert error["4:4:4"] < 0.3 * error["4:2:0"]
    assert degrade.compress(torch.full((3, 1, 1), 0.5), "jpeg", 90, offset=(15, 15)).shape == (3, 1, 1)


# ---- recipes

def recorded(monkeypatch, recipe, count):
    """LR pictures of a recipe without codecs, and the arguments of compress()."""
    calls = []
    monkeypatch.setattr(degrade, "compress", lambda x, *arguments: calls.append(arguments) or x)
    return degrade.degrade(smooth(1, 3, 32, 48).expand(count, 3, 32, 48), recipe, 2, range(count)), calls


@pytest.mark.parametrize("recipe, result", [
    ("web", "44c2345d481d"), ("light", "0a1261f08aa9"), ("real", "f4f2d52ace99"), ("soft", "a02830770934")])
def test_results_never_change(recipe, result, monkeypatch):
    """A resumed training run sees the same LR pictures."""
    lr, calls = recorded(monkeypatch, recipe, 30)
    calls = [(codec, quality, chroma if codec == "jpeg" else "4:2:0", list(map(int, offset)))
             for codec, quality, chroma, offset in calls]
    data = lr.mul(255).round().byte().numpy().tobytes() + repr(calls).encode()
    assert hashlib.sha256(data).hexdigest()[:12] == result


def test_arguments_of_compress(monkeypatch):
    _, calls = recorded(monkeypatch, "web", 1500)
    codecs, qualities, chromas, offsets = zip(*calls)
    assert abs(len(calls) / 1500 - 0.9 * 0.95) < 0.03 and abs(codecs.count("jpeg") / len(calls) - 0.85) < 0.03
    assert {q for q, codec in zip(qualities, codecs) if codec == "jpeg"} == set(range(85, 96))
    assert {q for q, codec in zip(qualities, codecs) if codec == "webp"} == set(range(80, 96))
    assert abs(chromas.count("4:2:0") / len(calls) - 0.8) < 0.03
    assert {int(n) for offset in offsets for n in offset} == set(range(16))
    assert {tuple(offset) for *_, offset in recorded(monkeypatch, "gallery", 50)[1]} == {(0, 0)}


def test_clean_uses_several_kernels():
    hr = smooth(1, 3, 32, 48)
    lr = degrade.degrade(hr.expand(1000, 3, 32, 48), "clean", 2, range(1000))
    for kernel, probability in dict(bicubic=0.55, lanczos=0.2, area=0.15, bilinear=0.1).items():
        expected = degrade.to_8_bit(degrade.resize(hr, (16, 24), kernel))
        assert abs((lr == expected).flatten(1).all(1).float().mean() - probability) < 0.05


def test_real_begins_as_real_esrgan():
    """The numbers are those of the authors' options/train_realesrgan_x2plus.yml, not of our table."""
    blur, rescale, noise, jpeg, second_blur, second_rescale, second_noise = degrade.RECIPES["real"]["chain"][:7]
    assert (blur["sigma"], blur["sinc"], blur["size"]) == ((0.2, 3), 0.1, (7, 21))
    assert (rescale["direction"], rescale["factor"]) == (dict(up=0.2, down=0.7, keep=0.1), (0.15, 1.5))
    assert (noise["gaussian"], noise["poisson"], noise["gray"]) == ((1, 30), (0.05, 3), 0.4)
    assert jpeg["quality"] == dict(jpeg=(30, 95)) and second_blur["sigma"] == (0.2, 1.5) and second_blur["p"] == 0.8
    assert (second_rescale["direction"], second_rescale["factor"]) == (dict(up=0.3, down=0.4, keep=0.3), (0.3, 1.2))
    assert (second_noise["gaussian"], second_noise["poisson"]) == ((1, 25), (0.05, 2.5))


DOWN = dict(op="downscale", kernel=dict(bicubic=1.0))


def test_a_new_recipe_is_one_entry(monkeypatch):
    monkeypatch.setitem(degrade.RECIPES, "mine", dict(chain=[dict(op="blur", sigma=(2.0, 2.0)), DOWN]))
    hr = smooth(1, 3, 32, 48)
    expected = degrade.resize(degrade.gaussian_blur(hr[0], 2.0).clamp(0, 1), (16, 24))
    assert torch.equal(degrade.degrade(hr, "mine", 2, [0])[0], degrade.to_8_bit(expected))


def test_a_recipe_that_does_not_end_at_the_lr_size(monkeypatch):
    entry = dict(op="rescale", base="hr", factor=(1, 1), aliased=0, direction=dict(keep=1), kernel=dict(area=1))
    monkeypatch.setitem(degrade.RECIPES, "mine", dict(chain=[DOWN, entry]))
    with pytest.raises(ValueError, match="mine.*downscale"):
        degrade.degrade(torch.zeros(1, 3, 8, 8), "mine", 2, [0])


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


@pytest.mark.parametrize("recipe", [r for r in degrade.RECIPES if r not in ("bicubic", "clean")])
def test_seeds_differ(recipe):
    lr = degrade.degrade(smooth(1, 3, 64, 64).expand(8, -1, -1, -1), recipe, 2, range(8))
    assert len({x.numpy().tobytes() for x in lr}) >= 5


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


def test_banding_leaves_few_colors_and_keeps_detail():
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
    soft = degrade.gaussian_blur(edge[0], degrade.ARTIFACTS["blur"][1]["sigma"][2])
    assert torch.equal(degrade.artifact(edge, "blur", 1.0, [0, 1])[0], degrade.to_8_bit(soft))
    halo = degrade.artifact(edge, "oversharp", 1.0, [0, 1])
    assert (halo[..., 32] == 1).all() and (halo[..., 31] == 0).all() and (halo[..., :8] - 0.3).abs().max() < 2 / 255
    grain = degrade.artifact(torch.full((8, 3, 64, 64), 0.5), "noise", 0.5, range(8)) - 0.5
    assert abs(grain.std() * 255 - degrade.ARTIFACTS["noise"][1]["sigma"][1]) < 0.5
    assert 0 < sum(torch.equal(g[0], g[1]) for g in grain) < 8                          # gray and colored


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


def test_adding_a_picture_changes_no_other(folder, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, capsys, folder, tmp_path / "one")[0] == 0
    Image.new("RGB", (20, 20), "red").save(folder / "0 first.png")
    assert command(monkeypatch, capsys, folder, tmp_path / "two")[0] == 0
    for path in (tmp_path / "one").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_two_pictures_with_one_result(tmp_path, monkeypatch, capsys):
    (tmp_path / "hr").mkdir()
    for name, color in (("a.jpg", "red"), ("a.png", "blue"), ("b.png", "blue")):
        Image.new("RGB", (20, 20), color).save(tmp_path / "hr" / name)
    for more in ((), ("--overwrite",)):
        code, out, err = command(monkeypatch, capsys, tmp_path / "hr", tmp_path / "lr", "--recipe", "clean", *more)
        assert code == 0 and "2 pictures" in out and "1 skipped" in out and "a.png" in err
    assert Image.open(tmp_path / "lr" / "a.png").getpixel((0, 0))[0] > 250


def test_no_file_is_overwritten_without_the_flag(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr" / "photo.png").write_bytes(b"mine")
    code, _, err = command(monkeypatch, capsys, folder, tmp_path / "lr")
    assert code == 2 and "photo.png" in err and (tmp_path / "lr" / "photo.png").read_bytes() == b"mine"
    assert command(monkeypatch, capsys, folder, tmp_path / "lr", "--overwrite")[0] == 0
    assert (tmp_path / "lr" / "photo.png").read_bytes() != b"mine"


def test_sheet(tmp_path, monkeypatch, capsys):
    picture, out = tmp_path / "a b.png", tmp_path / "new" / "sheet.png"
    images.save_picture(picture, images.Picture(rgb=smooth(1, 3, 130, 200)[0]))
    assert command(monkeypatch, capsys, picture, "--sheet", out, "--seed", 3)[0] == 0
    page, crop = images.read_picture(out).rgb, images.read_picture(picture).rgb[None, :, :, 35:165]
    assert page.shape == (3, 154 * 2, 130 * 4) and torch.equal(page[:, 24:154, :130], crop[0])
    for i, name in enumerate(degrade.RECIPES, 1):
        lr, top, left = degrade.degrade(crop, name, 2, [3])[0], i // 4 * 154 + 24, i % 4 * 130
        cell = page[:, top:top + 130, left:left + 130]
        assert torch.equal(cell, lr.repeat_interleave(2, 1).repeat_interleave(2, 2))
    for wrong in ((picture, "--sheet", out), (tmp_path, "--sheet", tmp_path / "b.png")):
        code, _, err = command(monkeypatch, capsys, *wrong)
        assert code == 2 and "error: " in err
    assert not (tmp_path / "b.png").exists()


def test_mistakes_of_the_user(folder, tmp_path, monkeypatch, capsys):
    for args, word in (((folder, tmp_path / "lr", "--recipe", "wep"), "wep"), ((folder,), "--sheet"),
                       ((tmp_path / "none", tmp_path / "lr"), "none"), ((folder, tmp_path / ("x" * 300)), "xxx")):
        code, _, err = command(monkeypatch, capsys, *args)
        assert code == 2 and "error: " in err.splitlines()[-1] and word in err.splitlines()[-1]
    assert not (tmp_path / "lr").exists()


def test_a_mistake_in_the_code_shows_its_traceback(folder, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise ValueError("shapes differ")
    monkeypatch.setattr(degrade, "to_8_bit", broken)
    with pytest.raises(ValueError, match="shapes differ"):
        command(monkeypatch, capsys, folder, tmp_path / "lr")
