"""Tiles, whole pictures in bounded memory, devices."""
import random

import pytest
import torch
import torch.nn.functional as F

import model
import tile
from tile import Tiler


def nearest(scale):
    return lambda x: F.interpolate(x, scale_factor=scale, mode="nearest")


def bicubic(scale):
    return lambda x: F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)


# ------------------------------------------------------------------ tiles

def test_resamplers_tile_exactly():
    """For any size and setting, the weights are positive and add up to 1, and the output is that without tiles."""
    chance = random.Random(1)
    torch.manual_seed(1)
    for _ in range(120):
        align, scale = chance.choice([1, 2, 4, 8, 16]), chance.choice([1, 2, 3, 4])
        pad = chance.randint(0, 64 // align) * align // 2
        pad += pad * 2 % align
        tiler = Tiler(align * chance.randint(1, max(1, 48 // align)), pad, align)
        x = torch.rand(chance.choice([1, 2]), 3, chance.randint(1, 90), chance.randint(1, 90), dtype=torch.float64)
        h, w = x.shape[2:]
        assert torch.allclose(tiler(nearest(scale), x, scale), nearest(scale)(x), rtol=0, atol=1e-6)
        for side in (h, w):
            total = torch.zeros(side * scale)
            for span in tiler.spans(side, scale)[1]:
                assert span.input_start % align == 0 and (span.weight > 0).all()
                total[span.start:span.start + len(span.weight)] += span.weight
            assert torch.allclose(total, torch.ones(side * scale))
        if pad >= 4:
            whole = tile.mirrored_slice(x, 2, 0, tile.round_up(h, align))
            whole = tile.mirrored_slice(whole, 3, 0, tile.round_up(w, align))
            expected = bicubic(scale)(whole)[:, :, :h * scale, :w * scale]
            assert torch.allclose(tiler(bicubic(scale), x, scale), expected, rtol=0, atol=1e-6)


def test_tiles_are_equal_and_on_the_grid():
    seen = []

    def forward(x):
        seen.append(x.shape)
        return nearest(2)(x)

    Tiler(64, 32)(forward, torch.rand(1, 3, 333, 450), 2)
    assert set(seen) == {(1, 3, 128, 128)} and len(seen) == Tiler(64, 32).count(333, 450) == 5 * 7
    assert [s.input_start for s in Tiler(64, 32).spans(333, 2)[1]] == [0, 64, 128, 192, 208]
    for tile_size, side, width, reads in ((384, 1080, 384, [0, 352, 696]), (384, 400, 400, [0]),
                                          (64, 112, 72, [0, 40])):
        got, spans = Tiler(tile_size, 16, align=8).spans(side, 2)
        assert (got, [s.input_start for s in spans]) == (width, reads)


def test_mirroring_beyond_the_side():
    assert tile.mirrored_slice(torch.arange(4), 0, 0, 12).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1]
    assert tile.mirrored_slice(torch.tensor([7]), 0, 0, 4).tolist() == [7, 7, 7, 7]


@pytest.mark.parametrize("wrong", [dict(tile_size=0), dict(tile_size=40), dict(tile_pad=-8), dict(tile_pad=5)])
def test_wrong_tiles_raise(wrong):
    with pytest.raises(tile.TileError, match="must be a multiple of"):
        Tiler(**wrong)


def test_smaller_tiles_come_to_an_end():
    tiler, seen = Tiler(384, 16, 8), []
    while not seen or tiler.halve():
        seen.append(tiler.tile_size)
    assert seen == [384, 192, 96, 48, 24]


def test_wrong_scale_is_noticed():
    with pytest.raises(ValueError, match="not 2 times"):
        Tiler()(nearest(3), torch.rand(1, 3, 20, 20), 2)


def test_gradients_reach_every_pixel_and_weight():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 12, 3, padding=1).double()
    x = torch.rand(2, 3, 70, 50, dtype=torch.float64, requires_grad=True)
    y = Tiler(16, 8)(lambda x: F.pixel_shuffle(conv(x), 2), x, 2)
    y.sum().backward()
    tiled, conv.weight.grad = conv.weight.grad, None
    assert (x.grad != 0).all()
    inner, x.grad = x.grad[:, :, 2:60, 2:40].clone(), None
    F.pixel_shuffle(conv(x), 2).sum().backward()
    assert torch.allclose(inner, x.grad[:, :, 2:60, 2:40], atol=1e-5)
    assert torch.allclose(tiled, conv.weight.grad, rtol=0.05)  # except for the mirrored border


def test_hat_in_one_tile():
    torch.manual_seed(0)
    net = model.HATRefiner.from_preset("tiny", scale=2).eval()
    x = torch.rand(1, 3, 50, 90)
    with torch.no_grad():
        assert torch.equal(net(x, tiler=Tiler(96, 32)), net(x, tiler=Tiler(128, 0)))


# ------------------------------------------------------------------ whole pictures

def test_upscale_is_the_tiler_in_strips():
    rgb, calls = torch.rand(3, 75, 100), []
    got = tile.upscale(nearest(3), rgb, 3, Tiler(16, 8), progress=lambda: calls.append(1))
    assert torch.allclose(got, nearest(3)(rgb[None])[0], atol=1e-6) and not got.requires_grad
    assert len(calls) == 4 * 6
    assert tile.upscale(lambda x: x * 1.2 - 0.1, rgb, 1, Tiler()).aminmax() == (0, 1)
    strips = list(tile.upscale_strips(nearest(3), rgb, 3, Tiler(16, 8)))
    assert len(strips) > 3 and torch.equal(torch.cat(strips, 1), got)


def scene(height=96, width=128):
    """Gradients, a checkerboard that gets stronger to the right, and noise: all tiles differ."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))
    return noise * 0.05 + torch.stack([0.5 + 0.3 * torch.sin(x / 9 + y / 17), 0.2 + 0.6 * x / width,
                                       ((x // 8 + y // 8) % 2) * 0.5 * (x / width) + 0.2])


@pytest.fixture
def coupled(monkeypatch):
    """A tiny model with random weights in which the channel attention and the refiner change the output."""
    monkeypatch.setattr(model, "CONV_SCALE", 0.5)
    torch.manual_seed(0)
    net = model.HATRefiner.from_preset("tiny", scale=2).eval()
    with torch.no_grad():
        net.hat_model.conv_after_body.weight[:3].normal_(0, 0.005)
        net.out_conv.weight.normal_(0, 0.05)
        for m in net.modules():
            if isinstance(m, model.ChannelAttention):
                m.attention[1].weight *= 6
                m.attention[3].weight *= 6
    return net


def test_refiner_runs_on_the_joined_picture(coupled):
    lr, tiler = scene(70, 90), Tiler(16, 8, align=4)
    with torch.no_grad():
        expected, plain = coupled(lr[None], tiler)[0], tiler(coupled.hat_model, lr[None], 2)[0]
    got = tile.upscale(coupled, lr, 2, tiler)
    assert (got - expected.clamp(0, 1)).abs().max() < 1e-5 < 0.01 < (got - plain).abs().max()
    coupled.use_refiner = False
    assert (tile.upscale(coupled, lr, 2, tiler) - plain.clamp(0, 1)).abs().max() < 1e-5
    whole = tile.upscale(coupled.hat_model, lr, 2, tiler)
    assert (whole - plain.clamp(0, 1)).abs().max() < 1e-5


def test_halos():
    """A vertical box filter of 9 rows gives the same for all strips."""
    chance, x = random.Random(0), torch.rand(2, 60, 5)

    def box(x):
        return F.avg_pool2d(F.pad(x, (0, 0, 4, 4), mode="replicate"), (9, 1), stride=1)

    for _ in range(20):
        cuts = sorted(chance.sample(range(0, 30), chance.randint(0, 12)))
        strips = [x[:, 2 * a:2 * b] for a, b in zip([0, *cuts], [*cuts, 30]) if b > a]
        got = list(tile.with_halo(iter(strips), box, 4, 60))
        assert torch.equal(torch.cat(got, 1), box(x))


def test_broken_tiles_run_again_in_fp32():
    """NaN, or black while the tile is not; only those tiles."""
    x, repeated = torch.rand(3, 64, 64), []
    x[0, 0, 0], x[0, 16, 16] = 0.0, 1.0

    def overflowing(value, x):
        if torch.is_autocast_enabled("cpu"):
            broken = x[:, :1, :1, :1] > x[:, :1].amax((2, 3), keepdim=True) - 0.5
            return torch.where(broken, value, x).bfloat16()
        repeated.append(len(x))
        return x

    for value in (torch.nan, torch.inf, 0.0):
        repeated.clear()
        sr = tile.upscale(lambda x, v=value: overflowing(v, x), x, 1, Tiler(16, 8), amp=torch.bfloat16)
        assert sr.isfinite().all() and (sr - x).abs().max() < 0.01
        assert 0 < sum(repeated) < Tiler(16, 8).count(64, 64)
    for broken in (lambda x: x / 0, torch.zeros_like):
        with pytest.raises(FloatingPointError):
            tile.upscale(broken, x, 1, Tiler())
    assert tile.upscale(torch.zeros_like, x * 0, 1, Tiler()).max() == 0      # black stays black


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_flat_areas_keep_their_color(scale):
    """A model that is off by a level: areas of one color stay exact, at a distance from other pixels."""
    x = torch.rand(3, 70, 60)
    flat = torch.zeros(70, 60, dtype=torch.bool)
    for i, level in enumerate((0, 1, 0.3)):
        x[:, 5:35, 20 * i:20 * i + 18] = level
        flat[9:31, 20 * i + (4 if i else 0):20 * i + 14] = True
    x[2, 40:] = 0.7         # flat in one channel

    def off(x):
        return nearest(scale)(x * 0.98 + 0.01)

    sr = tile.upscale(off, x, scale, Tiler(16, 8))
    plain, changed = nearest(scale)(x[None])[0], off(x[None])[0]
    flat = nearest(scale)(flat[None, None].float())[0, 0] > 0
    assert torch.equal(sr[:, flat], plain[:, flat]) and (changed[:, flat] != plain[:, flat]).any()
    assert torch.equal(sr[2, 44 * scale:], plain[2, 44 * scale:])
    assert torch.allclose(sr[:2, 40 * scale:], changed[:2, 40 * scale:], atol=1e-6)


def test_memory_of_a_strip_is_bounded():
    """No strip of a tall picture is larger than a few rows of tiles."""
    x, largest = torch.rand(1, 3, 4000, 64), 0
    for strip in Tiler(32, 16).strips(nearest(2), x, 2):
        largest = max(largest, strip.untyped_storage().nbytes())
    assert largest <= 4 * 3 * 128 * 128 * 4


def test_devices():
    for name in ("abacus", "meta", "cuda:7"):
        with pytest.raises(tile.TileError, match=f"^device {name}: .*$"):
            tile.pick_device(name)
    assert tile.pick_device("cpu", "off") == (torch.device("cpu"), None)
    assert tile.pick_device("cpu", "fp16")[1] is torch.float16
    assert tile.out_of_memory(MemoryError()) and not tile.out_of_memory(RuntimeError("shapes"))
    assert tile.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
