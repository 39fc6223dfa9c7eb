"""Every term's gradient reaches the picture and is the true one; formulas are their papers'; files load or say why."""
import contextlib
import copy
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import losses as L
from losses import (CLASSES, ArtifactDetector, Charbonnier, Edge, FrequencyLock, Laplacian, LossError,
                    MultiScaleDiscriminator, Perceptual, SRLoss, Texture, UNetDiscriminator)

ALL = "pix,freq,edge,texture,lock,perc,art_cls,art_feat,adv,luma"


def picture(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fill(net, seed=0):
    """Random weights that keep the size of what passes through, and batch norms that do something."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in net.state_dict().items():
            if x.ndim == 4:
                x.normal_(0, (2 / x[0].numel()) ** 0.5, generator=g)
            elif name.endswith(("running_var", "weight")) and x.ndim == 1:
                x.uniform_(0.5, 1.5, generator=g)
            elif x.ndim == 1:
                x.normal_(0, 0.1, generator=g)
    return net.eval()


@pytest.fixture(scope="session")
def files():
    """Weights of the right layout and random content (half precision, to save disk), and the networks they are of."""
    from torchvision import models
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        with torch.device("meta"):
            vgg = models.vgg19(weights=None).features
            resnet = models.resnet50(weights=None, num_classes=2)
        vgg = fill(vgg.to_empty(device="cpu")).half().float()
        resnet = fill(resnet.to_empty(device="cpu"), 1).half().float()
        half = {f"features.{k}": v.half() for k, v in vgg.state_dict().items()}
        torch.save({**half, "classifier.0.weight": torch.zeros(2, 2)}, at / "vgg.pth")
        body = nn.Sequential(*list(resnet.children())[:-2]).state_dict()
        body = {k: v.half() for k, v in body.items() if "num_batches" not in k}
        torch.save({**{f"0.{k}": v for k, v in body.items()}, "1.2.weight": torch.zeros(4096)}, at / "fastai.pth")
        save_file({k: v.half() for k, v in resnet.state_dict().items()}, at / "torchvision.safetensors")
        detector = fill(ArtifactDetector(4), 2)
        L.save_detector(detector, at / "detector.safetensors", dict(accuracy=0.5))
        yield dict(at=at, vgg=vgg, resnet=resnet, detector=detector, body=body)


@pytest.fixture(scope="session")
def both(files):
    return Perceptual("twin", files["at"] / "vgg.pth", files["at"] / "fastai.pth")


@pytest.fixture
def small_sum(files, both, monkeypatch):
    """SRLoss with every term, its feature networks read once for all tests."""
    monkeypatch.setattr(L, "load_network", lambda which, path: both.nets[which])
    return lambda weights=ALL, **kw: SRLoss(weights, **{**dict(detector=files["at"] / "detector.safetensors",
                                                              perceptual="twin"), **kw})


@pytest.fixture
def d():
    torch.manual_seed(0)
    return UNetDiscriminator(8)


def slope(f, sr, seed=7):
    """(derivative along a random direction by central differences, the same by autograd, norm of the gradient)"""
    sr = sr.detach().requires_grad_(True)
    g, = torch.autograd.grad(f(sr), sr)
    v = torch.randn(sr.shape, dtype=sr.dtype, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        numeric = (f(sr + 1e-7 * v) - f(sr - 1e-7 * v)) / 2e-7      # small: the terms have kinks
    return numeric.item(), (g * v).sum().item(), g.norm().item()


# ----------------------------------------------------------------------------------------------------------------------
# every term alive


TERMS = {
    "charbonnier": lambda: Charbonnier(), "rounder": lambda: Charbonnier(0.1), "rmse": lambda: Charbonnier(rmse=True), "laplacian": lambda: Laplacian(),
    "highpass": lambda: Laplacian(highpass=True), "texture": lambda: Texture(), "edge": lambda: Edge(),
    "edge1": lambda: Edge(1), "edge5": lambda: Edge(5), "sobel": lambda: Edge(3, 1, 0, 0),
    "canny": lambda: Edge(3, 0, 1, 0), "colour": lambda: Edge(3, 0, 0, 1),
    "luma": lambda: lambda sr, hr: SRLoss("luma").terms(sr, hr)["luma"],
}


@pytest.mark.parametrize("name", TERMS)
def test_gradient_of_picture_terms(name):
    term, hr = TERMS[name](), picture(2, 3, 13, 18, dtype=torch.float64)
    sr = hr + 0.2 * (picture(2, 3, 13, 18, seed=1, dtype=torch.float64) - 0.5)
    numeric, exact, norm = slope(lambda x: term(x, hr), sr)
    assert norm > 1e-4 and abs(numeric - exact) < 1e-5 * norm
    assert term(hr, hr) == 0
    g, = torch.autograd.grad(term(x := sr.float().requires_grad_(True), hr.float()), x)
    assert g.dtype == torch.float32 and g.isfinite().all() and (g != 0).float().mean() > 0.9


def test_gradient_of_the_lock():
    lr, sr = picture(2, 3, 5, 7, dtype=torch.float64), picture(2, 3, 15, 21, seed=1, dtype=torch.float64)
    numeric, exact, norm = slope(lambda x: FrequencyLock()(x, lr), sr)
    assert norm > 1e-4 and abs(numeric - exact) < 1e-5 * norm
    assert FrequencyLock()(lr.repeat_interleave(3, 2).repeat_interleave(3, 3), lr) < 1e-12


@pytest.mark.parametrize("which", ("vgg", "anime"))
def test_gradient_of_the_perceptual_loss(which, both):
    term = copy.deepcopy(both).double()
    del term.nets[{"vgg": "anime", "anime": "vgg"}[which]]
    hr, sr = picture(1, 3, 17, 20, dtype=torch.float64), picture(1, 3, 17, 20, seed=1, dtype=torch.float64)
    numeric, exact, norm = slope(lambda x: term(x, hr), sr)
    assert norm > 1e-3 and abs(numeric - exact) < 1e-4 * norm
    assert term(hr, hr) == 0


@pytest.mark.parametrize("kind", (0, 1))
def test_gradient_of_the_detector_terms(kind, files):
    net = copy.deepcopy(files["detector"]).double()
    hr, sr = picture(2, 3, 20, 17, dtype=torch.float64), picture(2, 3, 20, 17, seed=1, dtype=torch.float64)
    numeric, exact, norm = slope(lambda x: L.artifact_losses(net, x, hr)[kind], sr)
    assert norm > 1e-4 and abs(numeric - exact) < 1e-5 * norm
    cls, feat = L.artifact_losses(net, hr, hr)
    assert feat == 0 and torch.allclose(cls, -net(hr).log_softmax(1)[:, 0].mean())


@pytest.mark.parametrize("kind", L.GANS)
def test_gradient_of_the_adversarial_term(kind, d):
    d = d.double()
    hr, sr = picture(2, 3, 13, 16, dtype=torch.float64), picture(2, 3, 13, 16, seed=1, dtype=torch.float64)
    numeric, exact, norm = slope(lambda x: L.generator_loss(d, x, hr, kind), sr)
    assert norm > 1e-8 and abs(numeric - exact) < 1e-4 * norm
    x = sr.requires_grad_(True)
    g, = torch.autograd.grad(L.generator_loss(d, x, hr, kind), x)
    assert (g.abs().sum(1) > 0).all(), "a pixel, of an odd size too, that the discriminator does not see"


def state_bytes(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_g_and_d_learn_from_their_own_steps_only(d):
    g, hr = nn.Conv2d(3, 3, 3, 1, 1), picture(2, 3, 16, 16, seed=1)
    d.train()
    before = state_bytes(d)
    sr = g(hr)
    L.generator_loss(d, sr, hr).backward(retain_graph=True)
    assert all(p.grad.abs().sum() > 0 for p in g.parameters())
    assert all(p.grad is None for p in d.parameters()) and equal(before, state_bytes(d)), "G's step moved D"
    assert d.training and all(p.requires_grad for p in d.parameters())
    kept = [p.grad.clone() for p in g.parameters()]
    loss, report = L.discriminator_loss(d, sr, hr, r1=1.0)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in d.named_parameters() if n != "conv9.bias")    # RaGAN cancels that
    assert all(torch.equal(a, p.grad) for a, p in zip(kept, g.parameters())), "D's step reached G"
    (sr ** 2).mean().backward()             # and G's graph is still whole
    assert set(report) == {"d_real", "d_fake", "d_acc", "d_r1"} and not any(v.requires_grad for v in report.values())
    with pytest.raises(LossError, match="ragan, vanilla, lsgan, hinge"):
        L.generator_loss(d, hr, hr, "wgan")
    with pytest.raises(LossError, match="ragan, vanilla, lsgan, hinge"):
        L.discriminator_loss(d, hr, hr, "wgan")


def test_a_mistake_in_the_middle_leaves_d_as_it_was(d):
    with pytest.raises(LossError, match="8 pixels"):
        L.generator_loss(d.train(), picture(1, 3, 7, 20), picture(1, 3, 7, 20))
    assert d.training and all(p.requires_grad for p in d.parameters())


def test_nothing_in_the_sum_learns(small_sum, d):
    loss = small_sum().train()
    assert not loss.training and not any(m.training for m in loss.modules())
    g, hr = nn.Conv2d(3, 3, 3, 1, 1), picture(1, 3, 32, 32)
    optimiser, before, d_before = torch.optim.SGD(g.parameters(), 0.01), state_bytes(loss), state_bytes(d)
    start = state_bytes(g)
    for _ in range(2):
        loss.train()
        total, values = loss(g(hr), hr, F.avg_pool2d(hr, 2), d)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    assert len(before) > 300 and equal(before, state_bytes(loss)) and equal(d_before, state_bytes(d))
    assert not equal(start, state_bytes(g)) and all(p.grad is None for p in (*loss.parameters(), *d.parameters()))
    assert set(values) == set(L.WEIGHTS)


# ----------------------------------------------------------------------------------------------------------------------
# formulas


def test_charbonnier():
    sr, hr = picture(1, 3, 8, 8), picture(1, 3, 8, 8, seed=1)
    assert torch.allclose(Charbonnier()(sr, hr), ((sr - hr) ** 2 + 1e-6).sqrt().mean() - 1e-3)
    assert Charbonnier()(hr + 1, hr) == pytest.approx(1 - 1e-3, abs=1e-6)
    assert Charbonnier(0.1)(hr + 0.01, hr) == pytest.approx(0.01 ** 2 / 0.2, rel=0.01)


def test_rmse_counts_pictures_alike_and_within_one_by_squares():
    hr, d = torch.full((2, 3, 8, 8), 0.5), picture(2, 3, 8, 8) * torch.tensor([0.4, 0.04]).view(2, 1, 1, 1)
    x = (hr + d).requires_grad_(True)
    value = Charbonnier(1e-6, rmse=True)(x, hr)
    each = d.square().mean((1, 2, 3)).sqrt()
    assert torch.allclose(value, each.mean(), atol=1e-5)
    g, = torch.autograd.grad(value, x)
    a, b = g.flatten(1).norm(dim=1).tolist()
    assert a == pytest.approx(b, rel=1e-3)                                  # a tenth of the error, the same pull
    assert torch.allclose(g, d / each.view(2, 1, 1, 1) / d.numel(), rtol=1e-3)      # along the error


def test_laplacian_sees_detail_and_not_colour():
    hr = picture(1, 3, 32, 24)
    checks = 0.1 * (-1.0) ** (torch.arange(32)[:, None] + torch.arange(24))
    assert Laplacian()(hr + 0.3, hr) < 1e-6 and Laplacian(highpass=True)(hr + 0.3, hr) < 1e-5
    assert Laplacian(1)(hr + checks, hr) == pytest.approx(0.1, rel=0.02)      # the binomial blurs a checkerboard away
    wave = 0.1 * torch.sin(torch.arange(24) * 2 * torch.pi / 12)
    assert Laplacian(3)(hr + wave, hr) * 3 > 3 * Laplacian(1)(hr + wave, hr)    # coarser levels see coarser detail
    dot = torch.zeros(1, 3, 9, 9)
    dot[0, 0, 4, 4] = 1
    assert Laplacian(highpass=True)(dot, torch.zeros_like(dot)) == pytest.approx(16 / 243)


def test_sobel_is_a_slope_per_pixel():
    ramp = 0.03 * torch.arange(20.0).expand(1, 1, 15, 20) + 0.01 * torch.arange(15.0)[:, None]
    for kernel in (1, 3, 5, 7):
        gx, gy = (g[..., 4:-4, 4:-4] for g in L.sobel(ramp, kernel))
        assert torch.allclose(gx, torch.tensor(0.03), atol=1e-6) and torch.allclose(gy, torch.tensor(0.01), atol=1e-6)
    ndimage = pytest.importorskip("scipy.ndimage")
    y = picture(1, 1, 15, 20)
    for axis, g in ((1, L.sobel(y)[0]), (0, L.sobel(y)[1])):
        assert np.allclose(ndimage.sobel(y[0, 0].numpy(), axis, mode="nearest") / 8, g[0, 0].numpy(), atol=1e-6)
    with pytest.raises(LossError, match="odd"):
        Edge(2)


def test_soft_canny_draws_thin_lines_where_lines_are():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    drawings = {"vertical": (x < 20).float(), "diagonal": (x + y < 40).float(), "horizontal": (y < 20).float()}
    for name, drawn in drawings.items():
        edges = L.soft_canny(drawn[None, None])[0, 0, 5:-5, 5:-5] > 0.4
        per_row = edges.sum(0 if name == "horizontal" else 1)
        assert (per_row >= 1).all() and (per_row <= 2).all(), name
    soft = (x / 400 + y / 500)[None, None]
    assert L.soft_canny(soft).max() < 0.1
    weak = (torch.where(y < 20, 0.22, 0.9) * (x < 20))[None, None]
    kept, lost = (L.soft_canny(weak, low=low)[0, 0, :, 18:22].amax(1) for low in (0.05, 0.1))
    assert (kept[17:19] > 1.5 * lost[17:19]).all() and torch.equal(kept[:15], lost[:15])     # beside a strong one only


def test_texture_is_roughness_not_position():
    flat = torch.full((1, 3, 32, 32), 0.5)
    grain = flat + 0.1 * (picture(1, 3, 32, 32) - 0.5)
    moved = flat + 0.1 * (picture(1, 3, 32, 32, seed=1) - 0.5)
    assert Texture()(flat, grain) > 2 * Texture()(moved, grain)
    assert Charbonnier()(flat, grain) < Charbonnier()(moved, grain)         # which the pixel loss sees the other way
    assert Texture()(flat + 0.2, flat) < 1e-6


def test_lock_sees_colour_and_not_detail():
    lr = 0.3 + 0.4 * picture(1, 3, 12, 10)
    sr = lr.repeat_interleave(4, 2).repeat_interleave(4, 3)
    checks = 0.2 * (-1.0) ** (torch.arange(48)[:, None] + torch.arange(40))
    assert FrequencyLock()(sr, lr) < 1e-6 and FrequencyLock()(sr + checks, lr) < 1e-6
    assert FrequencyLock()(sr + 0.05, lr) == pytest.approx(0.05, abs=1e-5)
    for wrong in (lr[..., :-1], lr[..., :-1, :], picture(1, 3, 96, 80), picture(2, 3, 12, 10)):
        with pytest.raises(LossError, match="whole multiple"):
            FrequencyLock()(sr, wrong)


def drawing(h=64, w=96):
    """Left a sharp dark line on paper, right a glow without any edge."""
    y, x = torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing="ij")
    glow = 0.5 + 0.4 * torch.exp(-((x - 3 * w / 4) ** 2 + (y - h / 2) ** 2) / (2 * 8 ** 2))
    paper = torch.where((x - w / 6).abs() < 1, 0.1, 0.5)
    return torch.where(x < w / 2, paper, glow).expand(1, 3, h, w).clone()


def test_mask_is_low_where_the_picture_is_soft(d):
    hr = drawing()
    mask = L.detail_mask(hr)
    assert mask.shape == (1, 1, 64, 96) and not mask.requires_grad
    assert mask[..., 14:18].min() > 0.9 and mask[..., 50:].max() < 0.26 and mask.min() >= 0.25
    false_line = hr.clone()
    false_line[..., 70:72] -= 0.2
    assert Edge()(false_line, hr, mask) < 0.3 * Edge()(false_line, hr)
    blunt = hr.clone()
    blunt[..., 10:22] = 0.5
    assert Edge()(blunt, hr, mask) > 0.8 * Edge()(blunt, hr)
    quarter = torch.full((1, 1, 64, 96), 0.25)
    for kind in L.GANS:
        assert torch.allclose(L.generator_loss(d, blunt, hr, kind, quarter), L.generator_loss(d, blunt, hr, kind) / 4)
    left = torch.zeros_like(mask)
    left[..., :48] = 1
    sr = blunt.requires_grad_(True)
    g, = torch.autograd.grad(L.generator_loss(d, sr, hr, "hinge", left), sr)
    assert g[..., :30].abs().sum() > 0 and (g[..., 90:] == 0).all()


def test_sum_uses_the_mask(d):
    hr = drawing()
    sr = hr.clone()
    sr[..., 70:72] -= 0.2
    plain, masked = (SRLoss("pix,edge,adv", mask=m)(sr, hr, d=d)[1] for m in (False, True))
    assert masked["pix"] == plain["pix"] and masked["edge"] < 0.3 * plain["edge"] and masked["adv"] < 0.8 * plain["adv"]


# ----------------------------------------------------------------------------------------------------------------------
# discriminators


def test_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNetDiscriminator(64).parameters()) == 4_376_897
        assert sum(p.numel() for p in MultiScaleDiscriminator(64).parameters()) == 3 * 4_376_897


def test_unet_is_real_esrgans(d):
    """Written down once more from the paper's figure, for sides that are multiples of 8."""
    d, x, act = d.eval(), picture(2, 3, 16, 24), lambda t: F.leaky_relu(t, 0.2)
    up = nn.Upsample(scale_factor=2, mode="bilinear")
    sn = {i: c.parametrizations.weight.original for i, c in enumerate((*d.down, *d.up, *d.last), 1)}
    sn = {i: w / torch.linalg.matrix_norm(w.flatten(1), 2) for i, w in sn.items()}
    x0 = act(d.conv0(x))
    x1 = act(F.conv2d(x0, sn[1], None, 2, 1))
    x2 = act(F.conv2d(x1, sn[2], None, 2, 1))
    x3 = act(F.conv2d(x2, sn[3], None, 2, 1))
    x4 = act(F.conv2d(up(x3), sn[4], None, 1, 1)) + x2
    x5 = act(F.conv2d(up(x4), sn[5], None, 1, 1)) + x1
    x6 = act(F.conv2d(up(x5), sn[6], None, 1, 1)) + x0
    want = d.conv9(act(F.conv2d(act(F.conv2d(x6, sn[7], None, 1, 1)), sn[8], None, 1, 1)))
    got = d(x)
    assert want.std() > 1e-4 and (got - want).abs().max() < 0.1 * want.std()    # power iteration is not quite done
    for conv in (*d.down, *d.up, *d.last):
        with torch.no_grad():
            conv.parametrizations.weight.original *= 3          # spectral norm takes any factor out again
    assert torch.allclose(d(x), got, atol=1e-5)


@pytest.mark.parametrize("h,w", ((8, 8), (9, 13), (31, 8), (21, 34)))
def test_any_size_through_the_discriminators(h, w, d):
    assert d(picture(1, 3, h, w)).shape == (1, 1, h, w)
    m = MultiScaleDiscriminator(4)
    if min(h, w) < 32:
        with pytest.raises(LossError, match="32 pixels"):
            m(picture(1, 3, h, w))
    h, w = h + 30, w + 30
    assert [y.shape for y in m(picture(1, 3, h, w))] == [(1, 1, h >> i, w >> i) for i in range(3)]


def test_no_average_touches_the_power_iteration(d):
    """An EMA over parameters(), buffers copied, leaves unit vectors and a spectral norm of about 1."""
    average = copy.deepcopy(d)
    assert not any(n.endswith(("_u", "_v")) for n, _ in d.named_parameters())
    names = [n for n, _ in d.named_buffers()]
    assert len(names) == 16 and all(n.endswith(("_u", "_v")) for n in names)
    for step in range(3):
        with torch.no_grad():
            for p in d.parameters():
                p.add_(0.3 * p.abs().mean() * torch.randn_like(p))
            d.train()(picture(1, 3, 8, 8))
            torch._foreach_lerp_(list(average.parameters()), list(d.parameters()), 0.1)
            for a, b in zip(average.buffers(), d.buffers()):
                a.copy_(b)
    assert all(b.norm().item() == pytest.approx(1, abs=1e-4) for b in average.buffers())


class Taps(nn.Module):
    """A discriminator small enough to calculate by hand: logits are a weighted sum of R, G, B."""

    def __init__(self, *weights):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return (x * self.w.view(1, 3, 1, 1)).sum(1, keepdim=True)


def test_ragan_and_its_siblings():
    d, sr, hr = Taps(3.0, -1.0, 2.0), picture(2, 3, 8, 8), picture(2, 3, 8, 8, seed=1)
    f, r, bce = d(sr), d(hr), lambda x, t: F.binary_cross_entropy_with_logits(x, torch.full_like(x, t))
    want_g = dict(ragan=(bce(r - f.mean(), 0.0) + bce(f - r.mean(), 1.0)) / 2, vanilla=bce(f, 1.0),
                  lsgan=((f - 1) ** 2).mean(), hinge=-f.mean())
    want_d = dict(ragan=(bce(r - f.mean(), 1.0) + bce(f - r.mean(), 0.0)) / 2,
                  vanilla=(bce(r, 1.0) + bce(f, 0.0)) / 2, lsgan=(((r - 1) ** 2).mean() + (f ** 2).mean()) / 2,
                  hinge=((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean()) / 2)
    right = dict(ragan=((r > f.mean()).float().mean() + (f < r.mean()).float().mean()) / 2,
                 vanilla=((r > 0).float().mean() + (f < 0).float().mean()) / 2,
                 lsgan=((r > 0.5).float().mean() + (f < 0.5).float().mean()) / 2)
    right["hinge"] = right["vanilla"]
    for kind in L.GANS:
        assert torch.allclose(L.generator_loss(d, sr, hr, kind), want_g[kind]), kind
        loss, report = L.discriminator_loss(d, sr, hr, kind)
        assert torch.allclose(loss, want_d[kind]), kind
        assert torch.allclose(report["d_real"], r.mean()) and torch.allclose(report["d_fake"], f.mean())
        assert torch.allclose(report["d_acc"], right[kind]), kind
    # the means of the other side are detached in D's step, as written in the formula
    loss, _ = L.discriminator_loss(d, sr, hr)
    want = (bce(r - f.mean().detach(), 1.0) + bce(f - r.mean().detach(), 0.0)) / 2
    assert torch.allclose(torch.autograd.grad(loss, d.w)[0], torch.autograd.grad(want, d.w)[0])


def test_r1_is_the_squared_slope_at_real_pictures():
    d, sr, hr = Taps(3.0, -1.0, 2.0), picture(2, 3, 8, 8), picture(2, 3, 8, 8, seed=1)
    plain, (with_r1, report) = L.discriminator_loss(d, sr, hr)[0], L.discriminator_loss(d, sr, hr, r1=0.5)
    assert report["d_r1"] == pytest.approx((9 + 1 + 4) / 3 / 2)
    assert (with_r1 - plain).item() == pytest.approx(0.5 * 14 / 6, rel=1e-5)
    slopes = torch.autograd.grad(with_r1 - plain, d.w)[0]
    assert torch.allclose(slopes, 0.5 * d.w.detach() / 3, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# outside networks


def by_hand(nets, sr, hr):
    """The perceptual loss with torchvision's networks and forward hooks, after REFERENCE's table."""
    layers = {"vgg": [("2", 0.1), ("7", 0.1), ("16", 1), ("25", 1), ("34", 1)],
              "resnet": [("conv1", 0.1), ("layer1.2.conv3", 20), ("layer2.3.conv3", 25), ("layer3.5.conv3", 1),
                         ("layer4.2.conv3", 1)]}
    about = {"vgg": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
             "resnet": ((0.7137, 0.6628, 0.6519), (0.2970, 0.3017, 0.2979))}
    total = {}
    for kind, net in nets.items():
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in about[kind])
        taken = []
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, _ in layers[kind]:        # clone: torchvision's ReLUs work in place
                hook = net.get_submodule(name).register_forward_hook(lambda m, i, y: taken.append(y.clone()))
                stack.callback(hook.remove)
            for x in (sr, hr):
                net((x - mean) / std)
        n = len(layers[kind])
        total[kind] = sum(w * (a - b).abs().mean() for (_, w), a, b in zip(layers[kind], taken[:n], taken[n:]))
    return total


def test_features_are_torchvisions_before_the_relu(files, both):
    sr, hr = picture(1, 3, 32, 48), picture(1, 3, 32, 48, seed=1)
    want = by_hand(dict(vgg=files["vgg"], resnet=files["resnet"]), sr, hr)
    at = files["at"]
    assert torch.allclose(Perceptual("vgg", at / "vgg.pth")(sr, hr), want["vgg"], rtol=1e-4)
    assert torch.allclose(both(sr, hr), (want["vgg"] + want["resnet"]) / 2, rtol=1e-4)
    save_file(files["body"], at / "body.safetensors")
    for name in ("torchvision.safetensors", "body.safetensors", "fastai.pth"):
        assert torch.allclose(Perceptual("anime", None, at / name)(sr, hr), want["resnet"], rtol=1e-4), name
    assert all((f < 0).float().mean() > 0.1 for f in both.features("vgg", hr).values()), "behind a ReLU"


@pytest.mark.parametrize("which", ("vgg", "anime", "twin"))
def test_absent_weights_name_their_flag(which):
    flag = "--anime-weights" if which == "anime" else "--vgg-weights"
    for path in (None, "", "nowhere.pth"):
        with pytest.raises(LossError, match=flag) as e:
            Perceptual(which, path, path)
        assert "\n" not in str(e.value) and (not path or path in str(e.value))
    with pytest.raises(LossError, match=flag):
        SRLoss("pix,perc", perceptual=which)


def test_weights_of_another_network(files):
    at = files["at"]
    for which, wrong in (("vgg", "fastai.pth"), ("anime", "vgg.pth"), ("vgg", "detector.safetensors"),
                         ("anime", "detector.safetensors")):
        with pytest.raises(LossError, match="does not hold (VGG19|ResNet50): .* more$") as e:
            Perceptual(which, at / wrong, at / wrong)
        assert "\n" not in str(e.value) and len(str(e.value)) < 400
    with pytest.raises(LossError, match="holds no artifact detector"):
        L.load_detector(at / "torchvision.safetensors")
    save_file({"a": torch.zeros(1)}, at / "odd.safetensors", {"kabegami": "[1]"})
    with pytest.raises(LossError, match="cannot be read"):
        L.load_detector(at / "odd.safetensors")
    with pytest.raises(LossError, match="vgg, anime and twin"):
        Perceptual("lpips")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_files_that_cannot_be_read(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = files["at"]
    for source, name in ((at / "vgg.pth", "cut.pth"), (at / "torchvision.safetensors", "cut.safetensors"),
                         (at / "detector.safetensors", "cut2.safetensors")):
        with open(source, "rb") as f:
            (tmp_path / name).write_bytes(f.read(min(source.stat().st_size // 2, 2 ** 20)))
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(), 2))
    torch.save([1, 2], tmp_path / "list.pth")
    for path in sorted(tmp_path.iterdir()):
        for load in (lambda p: Perceptual("vgg", p), lambda p: Perceptual("anime", None, p), L.load_detector):
            with pytest.raises(LossError) as e:
                load(path)
            assert path.name in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "trapped").exists(), "a pickle was run"


def test_without_torchvision(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(LossError, match="pip install torchvision"):
        Perceptual("vgg", files["at"] / "vgg.pth")


def test_torchvision_is_asked_for_vgg_when_told_so(files, monkeypatch):
    from torchvision import models
    state = {f"features.{k}": v for k, v in files["vgg"].state_dict().items()}
    asked = []
    monkeypatch.setattr(models.VGG19_Weights, "get_state_dict", lambda self, **kw: asked.append(kw) or dict(state))
    Perceptual("vgg", "torchvision")
    assert asked == [dict(progress=True, check_hash=True, weights_only=True)]

    def offline(self, **kw):
        raise OSError("no route to host")
    monkeypatch.setattr(models.VGG19_Weights, "get_state_dict", offline)
    with pytest.raises(LossError, match="no route to host.*--vgg-weights"):
        Perceptual("vgg", "torchvision")


# ----------------------------------------------------------------------------------------------------------------------
# the detector


def test_detector_is_small_and_takes_any_size(files):
    net = ArtifactDetector().eval()
    assert sum(p.numel() for p in net.parameters()) == 689_352
    net = files["detector"]
    for h, w in ((1, 1), (3, 5), (64, 41), (40, 64)):
        x = picture(2, 3, h, w)
        logits, places, features = net(x, everything=True)
        assert logits.shape == (2, len(CLASSES)) and logits.isfinite().all() and torch.equal(logits, net(x))
        assert places.shape == (2, len(CLASSES), -(-h // 8), -(-w // 8)) and len(features) == 3
        assert features[0].shape[-2:] == (-(-h // 2), -(-w // 2))
    # where all looks alike, far from the border, the answer is the same
    flat = torch.full((1, 3, 256, 256), 0.4)
    places = net(flat, everything=True)[1][..., 14:18, 14:18]
    assert (places - places[..., :1, :1]).abs().max() < 1e-5
    with torch.no_grad():       # batch of 1 is part of the batch
        x = picture(3, 3, 24, 24)
        assert torch.allclose(net(x)[1:2], net(x[1:2]), atol=1e-5)


def test_map_and_logits_agree():
    """Where every place sees all of the picture it says what the picture does; elsewhere what is around it."""
    net = fill(ArtifactDetector(2))
    with torch.no_grad():
        logits, places, _ = net(picture(2, 3, 32, 24), everything=True)
        assert torch.allclose(places, logits[..., None, None].expand_as(places), atol=1e-4)
        x = picture(1, 3, 32, 256).round()
        x[..., 128:] = 0.5
        places = net(x, everything=True)[1]
    assert (places[..., 27] - places[..., 0]).abs().max() > 0.1 > (places[..., 27] - places[..., 26]).abs().max()


def test_figures_of_features():
    x = picture(2, 3, 20, 30) * 4 - 2
    mean, deviation, top = L.figures(L.moments(x, 4), 4).chunk(3, 1)
    assert torch.allclose(mean, x.mean((2, 3), keepdim=True), atol=1e-5)
    assert torch.allclose(deviation, x.std((2, 3), correction=0, keepdim=True), atol=1e-4)
    want = (4 * x).exp().mean((2, 3)).log() / 4
    assert torch.allclose(top[..., 0, 0], want, atol=1e-5)
    near = L.figures(L.moments(x, 4, (2, 2)), 4)
    assert near.shape == (2, 9, 10, 15)
    assert torch.allclose(near[:, :3, 5, 5], x[..., 2:19, 2:19].mean((2, 3)), atol=1e-5)
    assert L.figures(L.moments(x * 1e4, 4), 4).isfinite().all()


def test_detector_file(files, tmp_path, monkeypatch):
    net, x = files["detector"], picture(1, 3, 32, 32)
    back = L.load_detector(files["at"] / "detector.safetensors")
    assert equal(state_bytes(back), state_bytes(net)) and torch.allclose(back(x), net(x), atol=1e-6)
    assert back.header["accuracy"] == 0.5 and back.header["classes"] == list(CLASSES)
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    with pytest.raises(LossError, match=r"python train.py --detector --data DIR"):
        L.load_detector(tmp_path / "none.safetensors")
    monkeypatch.setattr(L, "__file__", str(tmp_path / "losses.py"))
    with pytest.raises(LossError, match=r"weights.detector.safetensors.*--detector FILE.*python train.py --detector"):
        SRLoss("art_cls")
    (tmp_path / "weights").mkdir()
    L.save_detector(net, tmp_path / "weights" / "detector.safetensors")
    assert equal(state_bytes(SRLoss("art_cls").detector), state_bytes(net))
    save_file(load_file(files["at"] / "detector.safetensors"), tmp_path / "other.safetensors",
              {"kabegami": json.dumps({"classes": ["cat", "dog"]})})
    with pytest.raises(LossError, match="clean, blocking"):
        L.load_detector(tmp_path / "other.safetensors")
    before = (tmp_path / "other.safetensors").read_bytes()

    def full_disk(self, data):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError):
        L.save_detector(net, tmp_path / "other.safetensors")
    assert (tmp_path / "other.safetensors").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_detector_outlives_its_file(tmp_path):
    """It was mapped into memory: a file copied over it in the middle of a run made every step not finite."""
    path = tmp_path / "detector.safetensors"
    L.save_detector(ArtifactDetector(8), path)
    detector, x = L.load_detector(path), torch.rand(1, 3, 40, 40)
    before = detector(x)
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(detector(x), before)


def test_detector_learns_what_it_is_for():
    """A small one tells, at any offset and after a few steps: lines (clean), an 8-pixel grid, steps of one 8-bit level,
    a single seam of 3 levels."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)

    def batch(n=16, side=40):
        at = torch.randint(0, 8, (n,), generator=g)
        kind = torch.arange(n) % 4
        x = 0.2 + 0.6 * torch.rand(n, 3, 1, 1, generator=g).expand(n, 3, side, side).clone()
        i = torch.arange(side)
        for k in range(n):
            line = 8 + at[k]
            if kind[k] == 0:
                x[k, :, :, line:line + 2] = 0.1
            elif kind[k] == 1:
                x[k] += 2 / 255 * ((i + at[k]) // 8 % 2) + 2 / 255 * ((i + at[k]) // 8 % 2)[:, None]
            elif kind[k] == 2:
                x[k] += 1 / 255 * ((i + at[k]) // 5)
            else:
                x[k, :, :, line + 8:] += 3 / 255
        return x, torch.tensor([0, 1, 3, 7])[kind]
    net = ArtifactDetector(8)
    optimiser = torch.optim.Adam(net.parameters())
    for step in range(60):
        x, y = batch()
        optimiser.param_groups[0]["lr"] = 4e-3 * (1 - step / 60)
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    x, y = batch(64)
    with torch.no_grad():
        assert (net.eval()(x).argmax(1) == y).float().mean() > 0.85


# ----------------------------------------------------------------------------------------------------------------------
# the sum


def test_weights_from_a_string():
    assert L.parse_weights("pix=1, freq = 0.25,edge,") == dict(pix=1.0, freq=0.25, edge=L.WEIGHTS["edge"])
    assert L.parse_weights("adv=0,pix=2") == dict(pix=2.0)
    assert list(L.WEIGHTS) == ALL.split(",")
    ranges = dict(pix=(1, 1), perc=(0.5, 1), adv=(0.1, 0.2), freq=(0.2, 0.5), art_cls=(0.05, 0.2), art_feat=(0.5, 1.5),
                  edge=(1, 1))       # the notes' starting weights
    assert all(low <= L.WEIGHTS[k] <= high for k, (low, high) in ranges.items())
    for wrong in ("pixel=1", "pix,ssim"):
        with pytest.raises(LossError, match="pix, freq, edge, texture, lock, perc, art_cls, art_feat, adv"):
            SRLoss(wrong)
    for wrong in ("pix=", "pix=one", "pix=-1", "pix=nan", "pix=inf", "pix=1=2"):
        with pytest.raises(LossError, match="a weight is a number"):
            SRLoss(wrong)
    for wrong in ("", " , ", "pix=0"):
        with pytest.raises(LossError, match="leaves no loss"):
            SRLoss(wrong)
    with pytest.raises(LossError, match="twice"):
        SRLoss("pix,pix=2")
    with pytest.raises(LossError, match="ragan"):
        SRLoss("pix", gan="wgan")


def test_sum_and_gradient_norms(small_sum, files, both, d):
    hr, sr, lr = picture(1, 3, 32, 32), picture(1, 3, 32, 32, seed=1), picture(1, 3, 16, 16, seed=2)
    weights = {name: 0.1 + 0.2 * i for i, name in enumerate(L.WEIGHTS)}
    loss = small_sum(",".join(f"{k}={v}" for k, v in weights.items()), eps=0.1, edge_kernel=5, highpass=True,
                     gan="lsgan", rmse=True)
    x = sr.clone().requires_grad_(True)
    total, values = loss(x, hr, lr, d)
    cls, feat = L.artifact_losses(files["detector"], x, hr)
    alone = dict(pix=Charbonnier(0.1, rmse=True)(x, hr), freq=Laplacian(highpass=True)(x, hr), edge=Edge(5)(x, hr),
                 texture=Texture()(x, hr), lock=FrequencyLock()(x, lr), perc=both(x, hr), art_cls=cls, art_feat=feat,
                 adv=L.generator_loss(d, x, hr, "lsgan"), luma=Charbonnier(0.1, True)(L.luma(x), L.luma(hr)))
    for name, value in alone.items():
        assert torch.allclose(values[name], value) and not values[name].requires_grad, name
    assert torch.allclose(total, sum(weights[k] * v for k, v in alone.items()))
    norms = loss.gradient_norms(x, hr, lr, d)
    for name, value in alone.items():
        counted = alone["pix"] if name.startswith("art") else value         # both are cut to it here
        want = weights[name] * torch.autograd.grad(counted, x, retain_graph=True)[0].norm().item()
        assert 0 < norms[name] == pytest.approx(want, rel=1e-3), name
    total.backward()            # gradient_norms left the graph whole
    assert x.grad.norm() > 0
    with torch.no_grad():       # and works in the middle of a report
        assert loss.gradient_norms(sr, hr, lr, d)["pix"] == pytest.approx(norms["pix"])


@pytest.mark.parametrize("kind", (0, 1))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_detector_does_no_more_than_tip_the_balance(small_sum, files, kind, dtype):
    """Its gradient is as it is, or turned down to that of pix; a picture that is right already is left alone."""
    name, hr = ("art_cls", "art_feat")[kind], picture(3, 3, 32, 32)
    sr = torch.cat([picture(1, 3, 32, 32, seed=1), hr[1:2] + 0.1 * (picture(1, 3, 32, 32, seed=2) - 0.5), hr[2:]]).to(dtype)
    x = sr.detach().float().requires_grad_(True)
    value = L.artifact_losses(files["detector"], x, hr)[kind]
    own, = torch.autograd.grad(value, x)
    pix, = torch.autograd.grad(Charbonnier()(x, hr), x)
    shorter = [(g.norm() / max(1.0, g.norm() / p.norm())).item() for g, p in zip(own[:2], pix)]
    loss = small_sum(f"{name}=0.5")
    for weak in (False, True):
        if weak:        # so that nothing needs to be cut
            loss.pix.forward = lambda a, b: 1e6 * (a - b).abs().mean()
            shorter = [g.norm().item() for g in own[:2]]
        y = sr.detach().requires_grad_(True)
        found = loss.terms(y, hr)[name]
        g, = torch.autograd.grad(3 * found, y)          # as a GradScaler would have it
        near = 1e-4 if dtype == torch.float32 else 1e-2
        assert torch.allclose(found, value, rtol=near)
        for i in (0, 1):
            assert g[i].float().norm().item() == pytest.approx(3 * shorter[i], rel=near)
            assert F.cosine_similarity(g[i].float().flatten(), own[i].flatten(), dim=0) > 1 - near
        assert dtype != torch.float32 or not g[2].any()
    assert shorter[0] > pix[0].norm()


def test_the_discriminator_sees_the_original(d):
    sr, sharp, hr = picture(1, 3, 16, 16), picture(1, 3, 16, 16, seed=1), picture(1, 3, 16, 16, seed=2)
    _, values = SRLoss("pix,adv")(sr, sharp, d=d, real=hr)
    assert values["pix"] == Charbonnier()(sr, sharp)
    assert torch.allclose(values["adv"], L.generator_loss(d, sr, hr))


def test_what_a_term_lacks_is_said():
    x = picture(1, 3, 16, 16)
    for weights in ("lock", "adv"):
        with pytest.raises(LossError, match="LR picture.*discriminator"):
            SRLoss(weights)(x, x)
    for wrong in (picture(1, 3, 16, 15), picture(2, 3, 16, 16), picture(3, 16, 16)):
        with pytest.raises(LossError, match=r"\(B, 3, H, W\)"):
            SRLoss("pix")(wrong, x)
    with pytest.raises(LossError, match=r"\(B, 3, H, W\)"):
        SRLoss("pix")(x[:, :1], x[:, :1])


def test_nan_names_the_terms(small_sum, d, monkeypatch):
    x = picture(1, 3, 32, 32)
    for bad in (float("nan"), float("inf")):
        sr = x.clone()
        sr[0, 0, 5, 5] = bad
        with pytest.raises(LossError) as e:
            small_sum("pix,freq,texture,adv")(sr, x, d=d)
        assert all(name in str(e.value) for name in ("pix", "freq", "texture", "adv", "the prediction itself is not"))
    monkeypatch.setattr(Laplacian, "forward", lambda self, sr, hr: (sr * float("nan")).mean())
    with pytest.raises(LossError) as e:
        small_sum("pix,freq,edge")(x, x)
    assert "not finite: freq;" in str(e.value) and "though the prediction is" in str(e.value)


@pytest.mark.parametrize("h,w", ((1, 1), (2, 3), (5, 1), (9, 40)))
def test_small_pictures(h, w, small_sum, d):
    hr, lr = picture(1, 3, 2 * h, 2 * w), picture(1, 3, h, w, seed=2)
    sr = picture(1, 3, 2 * h, 2 * w, seed=1).requires_grad_(True)
    total, values = small_sum("pix,freq,edge,texture,lock,art_cls,art_feat", mask=True)(sr, hr, lr)
    total.backward()
    assert sr.grad.isfinite().all() and all(v > 0 for v in values.values())
    one = picture(1, 3, 1, 1).requires_grad_(True)
    small_sum("pix,freq,edge,texture,lock,art_cls,art_feat", mask=True)(one, one.detach(), one.detach())[0].backward()
    assert one.grad.isfinite().all()
    for term in ("perc", "adv"):
        with pytest.raises(LossError, match=f"{term}: .* pixels a side or more.*5x6"):
            small_sum(term)(picture(1, 3, 6, 5), picture(1, 3, 6, 5), d=d)


def test_bf16_under_autocast(small_sum, d):
    hr, lr = picture(1, 3, 32, 32), picture(1, 3, 16, 16, seed=2)
    sr = hr + 0.1 * (picture(1, 3, 32, 32, seed=1) - 0.5)
    loss = small_sum()
    exact = loss(sr, hr, lr, d)[1]
    with torch.autocast("cpu", torch.bfloat16):
        x = sr.clone().requires_grad_(True)
        total, values = loss(x, hr, lr, d)
        report = L.discriminator_loss(d.train(), x, hr, r1=1.0)[1]
        half, _ = loss(sr.bfloat16(), hr, lr, d)
    for name in ("pix", "freq", "edge", "texture", "lock", "luma", "art_cls", "art_feat"):  # in fp16 the last two had no gradient
        assert values[name] == exact[name] and values[name].dtype == torch.float32, name
    for name in ("perc", "adv"):
        assert torch.allclose(values[name], exact[name], rtol=0.05) and values[name].dtype == torch.float32, name
    assert total.dtype == torch.float32 and half.isfinite() and all(v.isfinite() for v in report.values())
    total.backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 0
    assert all(b.dtype == torch.float32 for b in d.buffers())
    for f in (L.enhance_lines, L.detail_mask):
        want = f(hr)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(f(hr), want)


# ----------------------------------------------------------------------------------------------------------------------
# line-enhanced targets


def lines_picture():
    """Paper with a gentle gradient, a curved dark line, and a speck."""
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    p = (0.75 + 0.1 * x / 80).expand(3, 60, 80).clone() * torch.tensor([1.0, 0.95, 0.9]).view(3, 1, 1)
    curve = (y - 25 - 8 * torch.sin(x / 12)).abs() < 1
    p[:, curve & (x > 5) & (x < 70)] = 0.2
    p[:, 50:52, 10:12] = 0.2
    return p[None], curve & (x > 5) & (x < 70)


def test_lines_are_enhanced_and_specks_are_not():
    hr, curve = lines_picture()
    out, once = L.enhance_lines(hr), L.usm(hr)
    assert out.shape == hr.shape and not out.requires_grad and out.min() >= 0 and out.max() <= 1
    assert out[0, :, curve].mean() < once[0, :, curve].mean() - 0.05 < hr[0, :, curve].mean() - 0.1
    assert torch.equal(out[..., 44:58, 4:18], once[..., 44:58, 4:18]), "a speck was taken for a line"
    assert (out != once)[0, 0].sum() > 0.9 * curve.sum()
    pair = torch.cat([1 - hr, hr])
    assert torch.allclose(L.enhance_lines(pair)[1:], out, atol=1e-6)
    for blank in (torch.zeros(1, 3, 9, 9), torch.ones(1, 3, 9, 9), torch.full((1, 3, 1, 1), 0.5)):
        assert torch.allclose(L.enhance_lines(blank), blank, atol=1e-5)


def test_lines_agree_with_numpy():
    """APISR's recipe written down once more with scipy and scikit-image."""
    ndimage, measure = pytest.importorskip("scipy.ndimage"), pytest.importorskip("skimage.measure")
    hr, _ = lines_picture()
    hr = 0.7 + torch.linspace(0.1, 1, 80) * (hr - 0.7)          # lines of every strength
    hr = (hr + 0.2 * (picture(1, 3, 60, 80) - 0.5)).clamp(0, 1).double()

    def blur(x, sigma, radius):
        return ndimage.gaussian_filter(x, sigma, mode="nearest", radius=radius, axes=(-2, -1))

    def usm(x):
        rest = x - blur(x, 8, 25)
        soft = blur((np.abs(rest) * 255 > 10).astype(float), 8, 25)
        return soft * np.clip(x + 0.5 * rest, 0, 1) + (1 - soft) * x
    once = usm(hr[0].numpy())
    thrice = usm(usm(once))
    y = np.tensordot([0.299, 0.587, 0.114], thrice, 1)
    dog = blur(y, 0.6, 2) - 0.98 * blur(y, 1.5, 5)
    label = measure.label(dog / dog.max() < -15 / 255, connectivity=2)
    mask = (np.bincount(label.ravel()) >= 32)[label] & (label > 0)
    mask = mask | (ndimage.convolve(mask.astype(int), np.ones((3, 3), int), mode="constant") - mask >= 3)
    assert 0.02 < mask.mean() < 0.5
    assert np.allclose(L.enhance_lines(hr)[0].numpy(), np.where(mask, thrice, once), atol=1e-9)


def test_components_are_exact():
    measure = pytest.importorskip("skimage.measure")
    g = torch.Generator().manual_seed(0)
    masks = [(torch.rand(1, 1, 50, 70, generator=g) < p).float() for p in (0.05, 0.15, 0.25, 0.3, 0.4, 0.9)]
    snake = torch.zeros(1, 1, 50, 70)           # one long line, far longer than 31 steps
    for i in range(0, 50, 4):
        snake[..., i, :] = 1
        snake[..., i:i + 4, 69 if i % 8 == 0 else 0] = 1
    just = torch.zeros(1, 1, 50, 70)
    just[..., 3, 5:37], just[..., 10, 5:36] = 1, 1          # 32 pixels and 31
    masks = torch.cat([*masks, snake, just])
    got = L.drop_small(masks)
    for mask, kept in zip(masks[:, 0].numpy(), got[:, 0].numpy()):
        label = measure.label(mask, connectivity=2)
        want = (np.bincount(label.ravel()) >= 32)[label] & (label > 0)
        assert (kept == want).all()
    assert got[-1].sum() == 32 and torch.equal(got[-2], snake[0])


# ----------------------------------------------------------------------------------------------------------------------
# the command


def command(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["losses.py", *map(str, args)])
    code = 0
    try:
        L.main()
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_command(files, tmp_path, monkeypatch, capsys):
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    pixels = (picture(150, 300, 3) * 255).byte().numpy()
    Image.fromarray(pixels).save("壁 紙.png")
    detector = files["at"] / "detector.safetensors"
    code, out, err = command(monkeypatch, capsys, "壁 紙.png", "--detector", detector)
    assert code == 0, err
    assert "300x150, 6 patches" in out and all(f"\n{kind}" in out for kind in CLASSES)
    assert Image.open("壁 紙-artifacts.png").size == (300, 150)
    for args, said in ((("壁 紙.png", "--detector", detector), "--overwrite"),
                       (("none.png", "--detector", detector), "none.png"),
                       (("壁 紙.png", "--detector", "none.safetensors"), "python train.py --detector --data DIR"),
                       (("壁 紙.png", "--detector", detector, "-o", "壁 紙.png", "--overwrite"), "is the picture itself"),
                       (("壁 紙.png", "--detector", detector, "-o", "a.xyz"), "cannot save so"),
                       (("壁 紙.png", "--detector", detector, "-o", "absent/a.png"), "no folder absent"),
                       (("壁 紙.png", "--detector", detector, "--overwrite", "--device", "gpu9"), "gpu9")):
        code, out, err = command(monkeypatch, capsys, *args)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    assert command(monkeypatch, capsys, "壁 紙.png", "--detector", detector, "-o", "here.png")[0] == 0
    assert (np.asarray(Image.open("壁 紙.png")) == pixels).all()


def test_inspection_covers_the_picture(files):
    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, x, everything):
            places = torch.zeros(len(x), 8, 4, 4)
            places[:, 1] = x.mean((1, 2, 3)).view(-1, 1, 1) * 100
            return places.mean((2, 3)), places, []
    rgb = torch.zeros(3, 200, 130)
    rgb[:, 150:] = 1
    found, corners, heat = L.inspect(Even(), rgb)
    assert sorted(corners) == [(0, 0), (0, 2), (72, 0), (72, 2)] and found.shape == (4, 8)
    assert heat[:72].max() == pytest.approx(7 / 8) and heat[72:].min() > 0.99
    assert L.inspect(files["detector"], picture(3, 5, 9))[2].shape == (5, 9)
