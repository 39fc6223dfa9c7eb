"""Tiles, shared channel attention, whole pictures in bounded memory, devices."""
import random

import pytest
import torch
import torch.nn.functional as F

import model
import tile
from measure_tiles import psnr
from metrics import seam
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
        tiler = Tiler(align * chance.randint(1, max(1, 48 // align)), pad, chance.randint(1, 5), align)
        x = torch.rand(chance.choice([1, 2]), 3, chance.randint(1, 90), chance.randint(1, 90), dtype=torch.float64)
        h, w = x.shape[2:]
        assert torch.allclose(tiler(nearest(scale), x, scale), nearest(scale)(x), rtol=0, atol=1e-6)
        for side in (h, w):
            total = torch.zeros(side * scale)
            for span in tiler.spans(side, scale)[1]:
                assert span.input_start % align == 0 and (span.weight > 0).all()
                total[span.start:span.stop] += span.weight
            assert torch.allclose(total, torch.ones(side * scale))
            covered = torch.zeros(-(-side // align) * align)
            for read, start, stop in tiler.cores(side):
                width = tiler.spans(side, scale)[0]
                assert 0 <= start < stop <= width
                assert (start == 0 or start >= pad - 1) and (stop == width or width - stop >= pad - 1)
                covered[read + start:read + stop] += 1
            assert (covered == 1).all()
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

    Tiler(64, 32, batch=3)(forward, torch.rand(1, 3, 333, 450), 2)
    assert {s[1:] for s in seen} == {(3, 128, 128)} and max(s[0] for s in seen) == 3
    assert sum(s[0] for s in seen) == Tiler(64, 32).count(333, 450) == 5 * 7
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
    with pytest.raises(tile.TileError, match="use a multiple of"):
        Tiler(**wrong)


def test_smaller_tiles_come_to_an_end():
    tiler, seen = Tiler(384, 16, 3, 8), []
    while tiler:
        seen.append((tiler.tile_size, tiler.batch))
        tiler = tiler.smaller()
    assert seen == [(384, 3), (384, 1), (192, 1), (96, 1), (48, 1), (24, 1)]


def test_wrong_scale_is_noticed():
    with pytest.raises(ValueError, match="not 2 times"):
        Tiler()(nearest(3), torch.rand(1, 3, 20, 20), 2)


def test_gradients_reach_every_pixel_and_weight():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 12, 3, padding=1).double()
    x = torch.rand(2, 3, 70, 50, dtype=torch.float64, requires_grad=True)
    y = Tiler(16, 8, batch=4)(lambda x: F.pixel_shuffle(conv(x), 2), x, 2)
    y.sum().backward()
    tiled, conv.weight.grad = conv.weight.grad, None
    assert (x.grad != 0).all()
    inner, x.grad = x.grad[:, :, 2:60, 2:40].clone(), None
    F.pixel_shuffle(conv(x), 2).sum().backward()
    assert torch.allclose(inner, x.grad[:, :, 2:60, 2:40], atol=1e-5)
    assert torch.allclose(tiled, conv.weight.grad, rtol=0.05)  # except for the mirrored border


def test_hat_is_the_same_for_any_batch():
    torch.manual_seed(0)
    net = model.HATRefiner.from_preset("tiny", scale=2).eval()
    x = torch.rand(1, 3, 50, 90)
    with torch.no_grad():
        one, five = (net(x, tiler=Tiler(16, 8, batch)) for batch in (1, 5))
        assert one.shape == (1, 3, 100, 180) and (one - five).abs().max() < 1e-5
        assert torch.equal(net(x, tiler=Tiler(96, 32)), net(x, tiler=Tiler(128, 0)))  # one tile holds it all


# ------------------------------------------------------------------ whole pictures

def test_upscale_is_the_tiler_in_strips():
    rgb, calls = torch.rand(3, 75, 100), []
    got = tile.upscale(nearest(3), rgb, 3, Tiler(16, 8, 4), progress=lambda *a: calls.append(a))
    assert torch.allclose(got, nearest(3)(rgb[None])[0], atol=1e-6) and not got.requires_grad
    assert calls[-1] == (4 * 6, 4 * 6) and calls == sorted(calls) and calls[0][0] == 4
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


@pytest.mark.parametrize("batch, tta", [(1, False), (4, False), (2, True)])
def test_shared_channel_attention(coupled, batch, tta):
    """Compare tiles with the whole picture: no seams, rough is much closer than off, exact is almost equal. The sides
    are no multiples of the window, so the mirrored border counts too."""
    lr, tiler = (scene(46, 63), Tiler(16, 16, batch, 4)) if tta else (scene(94, 127), Tiler(32, 16, batch, 4))
    whole = tile.upscale(coupled, lr, 2, Tiler(128, 0, align=4), tta=tta)
    if not tta:
        with torch.no_grad():
            assert (coupled(lr[None])[0].clamp(0, 1) - whole).abs().max() < 1e-5
    lines = tiler.seams(*lr.shape[1:], 2)
    found, calls = {}, []
    for sync in ("off", "rough", "exact"):
        sr = tile.upscale(coupled, lr, 2, tiler, sync=sync, tta=tta, progress=lambda *a: calls.append(a))
        found[sync] = psnr(sr, whole)
        assert 0.98 < seam(sr, whole, lines) < 1.02
        assert calls[-1][0] == calls[-1][1]
    assert found["off"] < 75 and found["rough"] > found["off"] + 25 and found["exact"] > max(found["rough"] + 10, 110)
    assert all(m.global_pool is None for m in coupled.modules() if isinstance(m, model.ChannelAttention))


def test_shared_means_are_those_of_the_whole(coupled):
    lr, tiler, seen = scene(), Tiler(32, 16, align=4), {}
    layers = [m for m in coupled.modules() if isinstance(m, model.ChannelAttention)]

    def watch(i, x):
        seen[0, i] = x.mean((1, 2))[0]
        return x.mean((1, 2))

    for i, layer in enumerate(layers):
        layer.global_pool = lambda x, i=i: watch(i, x)
    with torch.inference_mode():
        coupled(lr[None])
        for layer in layers:
            layer.global_pool = None
        pools = tile.SharedPools(coupled)

        def run(tiles, mask):
            pools.mask = mask
            with pools, pytest.raises(tile.StopForward):
                coupled(tiles)

        list(pools.measure(run, lr[None], tiler, "exact"))
    assert pools.means.keys() == seen.keys() and len(seen) == 4
    for key, mean in seen.items():
        assert (pools.means[key] - mean).abs().max() < 1e-3 * mean.abs().max()


def test_rough_sync_measures_some_of_the_tiles(coupled, monkeypatch):
    monkeypatch.setattr(tile, "ROUGH_TILES", 5)
    calls = []
    tile.upscale(coupled, scene(40, 40), 2, Tiler(8, 4, align=4), sync="rough", progress=lambda *a: calls.append(a))
    assert calls[-1] == (5 + 16, 5 + 16)


def test_sync_does_not_change_other_networks():
    rgb = torch.rand(3, 40, 50)
    for network in (nearest(2), torch.nn.Upsample(scale_factor=2)):
        for sync in ("rough", "exact"):
            got = tile.upscale(network, rgb, 2, Tiler(16, 8), sync=sync)
            assert torch.allclose(got, nearest(2)(rgb[None])[0], atol=1e-6)


def test_flips_and_rotations():
    x = torch.rand(1, 3, 4, 6)
    every = [tile.flip_rotate(x, k) for k in range(8)]
    assert all(torch.equal(tile.undo_flip_rotate(y, k), x) for k, y in enumerate(every))
    assert len({(y.shape, y.flatten().numpy().tobytes()) for y in every}) == 8
    kernel = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 13.5

    def lopsided(x):
        return nearest(2)(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel))

    got = tile.upscale(lopsided, x[0], 2, Tiler(16, 0), tta=True)
    expected = torch.stack([tile.undo_flip_rotate(lopsided(tile.flip_rotate(x, k)), k) for k in range(8)]).mean(0)[0]
    # the mirrored extension of a tile differs from the replicated edge
    assert (got - expected)[:, 2:-2, 2:-2].abs().max() < 1e-5
    assert (expected - lopsided(x)[0]).abs().max() > 0.01


def test_halos():
    """A vertical box filter of 9 rows gives the same for all strips."""
    chance, x = random.Random(0), torch.rand(2, 60, 5)

    def box(x):
        return F.avg_pool2d(F.pad(x, (0, 0, 4, 4), mode="replicate"), (9, 1), stride=1)

    for _ in range(20):
        cuts = sorted(chance.sample(range(0, 30), chance.randint(0, 12)))
        strips = [x[:, 2 * a:2 * b] for a, b in zip([0, *cuts], [*cuts, 30]) if b > a]
        tops = []
        got = list(tile.with_halo(iter(strips), lambda part, top: tops.append(top) or box(part), 4, 60))
        assert torch.equal(torch.cat(got, 1), box(x)) and all(top % 2 == 0 for top in tops)


def test_strength_goes_from_lanczos_to_the_model():
    rgb, tiler = torch.rand(3, 100, 60), Tiler(32, 8, align=8)
    plain, sr = tile.lanczos(rgb, (200, 120)), nearest(2)(rgb[None])[0]
    for strength in (0, 0.3, 1):
        got = tile.upscale(nearest(2), rgb, 2, tiler, strength=strength)
        assert torch.allclose(got, plain + strength * (sr - plain), atol=1e-4)


def test_low_frequencies_are_locked():
    """A model that shifts colors and sharpens: the shift is removed, the sharpness stays, for any tiles."""
    rgb = scene(152, 96) * 0.6 + 0.1

    def drifting(x):
        up = bicubic(2)(x)
        soft = F.avg_pool2d(F.pad(up, (2,) * 4, mode="replicate"), 5, 1)
        return up + 1.5 * (up - soft) + torch.tensor([0.05, -0.03, 0.02]).view(3, 1, 1)

    tiler = Tiler(32, 16, align=8)
    free, held = (tile.upscale(drifting, rgb, 2, tiler, low_freq_lock=lock) for lock in (False, True))
    drift = [(F.avg_pool2d(x, 2) - rgb).mean((1, 2)).abs().min() for x in (free, held)]
    assert drift[0] > 0.015 and drift[1] < 1e-3
    assert (held.diff(dim=2).abs().mean() / free.diff(dim=2).abs().mean() - 1).abs() < 0.02
    other = tile.upscale(drifting, rgb, 2, Tiler(256, 0, align=2), low_freq_lock=True)
    assert (held - other).abs().max() < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_broken_tiles_run_again_in_fp32(batch):
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
        sr = tile.upscale(lambda x, v=value: overflowing(v, x), x, 1, Tiler(16, 8, batch), amp=torch.bfloat16)
        assert sr.isfinite().all() and (sr - x).abs().max() < 0.01
        assert 0 < sum(repeated) < Tiler(16, 8).count(64, 64)
    for broken in (lambda x: x / 0, torch.zeros_like):
        with pytest.raises(FloatingPointError):
            tile.upscale(broken, x, 1, Tiler())
    assert tile.upscale(torch.zeros_like, x * 0, 1, Tiler()).max() == 0      # black stays black


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_flat_black_and_white_keep_their_level(scale):
    """A model that is off by a level: exact 0 and 1 stay, at a distance from other pixels; the rest does not change."""
    x = torch.rand(3, 70, 50) * 0.8 + 0.1
    x[:, :40, :20], x[1:, 50:, 20:], x[:, 10, 10] = 1, 0, 0.5

    def off(x):
        return nearest(scale)(x * 0.98 + 0.01)

    sr = tile.upscale(off, x, scale, Tiler(16, 8))
    level = ((x == 0) | (x == 1)).float()[None]
    far = 1 - F.max_pool2d(1 - level, 9, 1, 4)
    far = F.interpolate(far, scale_factor=scale)[0] > 0
    assert far.sum() > 500 * scale**2 and torch.equal(sr[far], nearest(scale)(x[None])[0][far])
    assert torch.allclose(sr[~far], off(x[None])[0][~far], atol=1e-6)


def test_memory_of_a_strip_is_bounded(monkeypatch):
    """A tall picture: no tensor is larger than a few rows of tiles."""
    x, largest = torch.rand(3, 4000, 64), 0
    for strip in tile.upscale_strips(nearest(2), x, 2, Tiler(32, 16)):
        largest = max(largest, strip.untyped_storage().nbytes())
    assert largest <= 4 * 3 * 128 * 128 * 4


def test_devices(monkeypatch):
    for name in ("abacus", "meta", "cuda:7"):
        with pytest.raises(tile.TileError, match=f"^device {name}: .*$"):
            tile.pick_device(name)
    assert tile.pick_device("cpu", "off") == (torch.device("cpu"), None)
    assert tile.pick_device("cpu", "fp16")[1] is torch.float16
    assert tile.auto_tile_size(None, torch.device("cpu"), None, Tiler(24, 12, align=24)) == 384
    assert tile.out_of_memory(MemoryError()) and not tile.out_of_memory(RuntimeError("shapes"))
    assert tile.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert tile.memory_peak(torch.device("cpu")) > 2**20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tile_size_by_free_memory(monkeypatch):
    network = torch.nn.Upsample(scale_factor=2).cuda()
    sizes = []
    for gib in (0, 0.05, 0.2, 100):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, gib=gib: (int(gib * 2**30), 2**40))
        sizes.append(tile.auto_tile_size(network, torch.device("cuda"), None, Tiler(16, 16)))
    assert sizes == sorted(sizes) and sizes[0] == 32 and sizes[-1] == 512
