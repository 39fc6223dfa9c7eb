import contextlib
import errno
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as M
from model import HAT, PRESETS, HATRefiner, WeightsError, fit, load, pad_to, read_weights, save

HERE = Path(__file__).parent
COUNTS = {  # published parameter counts
    "hat_s": (9_473_471, 9_658_111, 9_621_183),
    "hat": (20_624_795, 20_809_435, 20_772_507),
    "hat_l": (40_698_863, 40_883_503, 40_846_575),
}


def shake(model, std=0.03):
    """Random weights everywhere, so that no part of the network is idle."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * std)
    return model.eval()


def official_hat(ours, scale, sizes):
    """spandrel's HAT with the sizes and weights of ours."""
    hat = pytest.importorskip("spandrel.architectures.HAT").HAT
    theirs = hat(img_size=64, patch_size=1, in_chans=3, embed_dim=sizes["embed_dim"], depths=sizes["depths"],
                 num_heads=[sizes["heads"]] * len(sizes["depths"]), window_size=sizes["window"],
                 compress_ratio=sizes["compress"], squeeze_factor=sizes["squeeze"], conv_scale=0.01, overlap_ratio=0.5,
                 mlp_ratio=2.0, upscale=scale, img_range=1.0, upsampler="pixelshuffle", resi_connection="1conv",
                 num_feat=64)
    own = ours.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in theirs.state_dict().items() if "index" in k)      # before ours replace them
    theirs.load_state_dict(own, strict=True)
    return theirs.eval()


def sizes_of(preset):
    return {k: v for k, v in PRESETS[preset].items() if k != "refiner_dim"}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return shake(HATRefiner.from_preset("tiny", scale=2))


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts_are_the_published_ones(preset):
    with torch.device("meta"):
        counts = tuple(sum(p.numel() for p in HAT(scale, **sizes_of(preset)).parameters()) for scale in (2, 3, 4))
    assert counts == COUNTS[preset]


@pytest.mark.parametrize("scale", (2, 3, 4))
@pytest.mark.parametrize("preset", ("tiny", "low", "hat_s"))
def test_equals_spandrel(preset, scale):
    torch.manual_seed(scale)
    ours = shake(HAT(scale, **sizes_of(preset)), 0.01)
    theirs = official_hat(ours, scale, sizes_of(preset))
    w = ours.window
    for h, wide in ((2 * w, 3 * w), (w + 1, 2 * w - 3), (w - 1, 3)):
        x = torch.rand(1, 3, h, wide)
        with torch.no_grad():
            want = theirs(pad_to(x, w))[..., :h * scale, :wide * scale]
            assert (ours(x) - want).abs().max() < 1e-5


def test_equals_the_golden_picture():
    golden = load_file(HERE / "golden_hat.safetensors")
    x, want = golden.pop("input"), golden.pop("output")
    ours = HAT(scale=2, embed_dim=12, depths=(2, 2), heads=3, window=4, compress=3, squeeze=2)
    assert all(torch.equal(v, golden[k].long()) for k, v in ours.state_dict().items() if "index" in k)
    ours.load_state_dict({k: v.float() if v.is_floating_point() else v.long() for k, v in golden.items()})
    with torch.no_grad():
        got = ours.eval()(x)
    assert want.std() > 0.05 and (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("wrong", (dict(window=6), dict(scale=5)))
def test_sizes_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        HAT(**wrong)


@pytest.mark.parametrize("h,w", ((1, 1), (1, 9), (3, 3), (5, 2), (17, 9)))
@pytest.mark.parametrize("scale", (2, 3, 4))
def test_any_size(h, w, scale):
    sr = HATRefiner.from_preset("tiny", scale)(torch.rand(2, 3, h, w))
    assert sr.shape == (2, 3, scale * h, scale * w) and sr.isfinite().all()


def test_padding_mirrors_as_often_as_it_must():
    x = torch.arange(3.0).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    assert pad_to(x, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert pad_to(x[..., :1], 4)[0, 0, 0].tolist() == [0] * 4
    x = torch.rand(1, 3, 5, 6)
    assert torch.equal(pad_to(x, 4), F.pad(x, (0, 2, 0, 3), mode="reflect"))


@pytest.mark.parametrize("scale", (2, 3, 4))
def test_warm_start_interpolates(scale):
    """A parabola is interpolated exactly by a kernel of three pixels, and much better than by the nearest pixel."""
    torch.manual_seed(0)
    warm = HATRefiner.from_preset("tiny", scale).eval()
    t = torch.linspace(-1, 1, 24 * scale)
    hr = (0.5 + 0.2 * t[:, None] ** 2 - 0.3 * t[None, :] ** 2).expand(1, 3, -1, -1)
    lr = F.avg_pool2d(hr, scale)
    with torch.no_grad():
        inner = (warm(lr) - hr)[..., 4 * scale:-4 * scale, 4 * scale:-4 * scale].abs().max()
        plain = (HATRefiner.from_preset("tiny", scale, init="plain").eval()(lr) - hr).abs().mean()
    assert inner < 0.002 < 0.1 < plain


def test_warm_start_leaves_a_gradient_everywhere_after_one_step():
    torch.manual_seed(0)
    net = HAT(2, **sizes_of("tiny"))
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(3):
        adam.zero_grad()
        (net(torch.rand(2, 3, 8, 8)) - torch.rand(2, 3, 16, 16)).abs().mean().backward()
        adam.step()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("scale", (2, 3, 4))
@pytest.mark.parametrize("shape", ((1, 1, 1), (2, 2, 7), (1, 3, 4), (1, 9, 6)))
def test_the_last_layers_at_once_are_the_layers(scale, shape):
    """The border too, where each layer has its own zeros; in float64, so that nothing hides."""
    torch.manual_seed(scale)
    net = shake(HAT(scale, **sizes_of("tiny"))).double()
    x = torch.randn(shape[0], M.FEATURES, *shape[1:], dtype=torch.float64)
    with torch.no_grad():
        want = net.enlarged(x)
        assert want.std() > 0.1 and torch.allclose(net.enlarged_at_once(x), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("amp", (False, True))
def test_without_gradients_the_picture_is_the_same(tiny, amp):
    """Large enough for what is done otherwise there: windows and rows in parts, the last layers at once."""
    x, calls = torch.rand(1, 3, 70, 90), []
    layers = tiny.hat_model.enlarged_at_once
    tiny.hat_model.enlarged_at_once = lambda x: calls.append(x.shape) or layers(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        want = tiny(x)
        with torch.inference_mode():
            got = tiny(x)
    assert calls == [(1, M.FEATURES, 72, 92)] and got.dtype == torch.float32
    assert (got - want).abs().max() < (0.05 if amp else 1e-4) * want.abs().max()


def test_heads_are_filled_up_to_multiples_of_8(tiny):
    p = torch.randn(12, 30, 5)
    wide = M.wide_heads(p.flatten(0, 1), 12)
    assert wide.shape == (12 * 32, 5)
    assert torch.equal(wide.view(12, 32, 5)[:, :30], p) and not wide.view(12, 32, 5)[:, 30:].any()
    assert torch.equal(M.wide_heads(p.permute(2, 0, 1).flatten(1), 12, 1), wide.T)
    assert torch.equal(M.wide_heads(p[0, :, 0], 1), F.pad(p[0, :, 0], (0, 2)))
    assert torch.equal(M.wide_heads(p[:, :8].flatten(0, 1), 12), p[:, :8].flatten(0, 1))


def test_the_whole_network_is_seen_by_gradients(tiny):
    """Finite differences along a random direction agree with autograd, in float64."""
    net = tiny.hat_model.double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    v, eps = torch.randn_like(x), 1e-5
    net(x).square().mean().backward()
    with torch.no_grad():
        want = (net(x + eps * v).square().mean() - net(x - eps * v).square().mean()) / (2 * eps)
    assert torch.allclose((x.grad * v).sum(), want, rtol=1e-6)


def test_checkpointing_keeps_less_and_changes_nothing(tiny):
    x, kept = torch.rand(1, 3, 24, 24), []

    def keep(saved):
        kept[-1] += saved.nbytes
        return saved
    for tiny.hat_model.checkpoint in False, True:
        kept.append(0)
        tiny.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            loss = tiny(x).sum()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in tiny.named_parameters()}
        want = grads if len(kept) == 1 else want
    assert all(torch.allclose(grad, want[n], atol=1e-5) for n, grad in grads.items())
    assert kept[1] < 0.7 * kept[0]


def test_each_attention_block_is_compiled(tiny, monkeypatch):
    ran, x = [], torch.rand(1, 3, 8, 8)
    want, names = tiny(x), set(tiny.state_dict())
    monkeypatch.setattr(torch, "compile", lambda call, **how: lambda *a: ran.append(call.__self__) or call(*a))
    tiny.hat_model.compile_blocks()
    assert torch.equal(tiny(x), want) and set(tiny.state_dict()) == names
    blocks = [m for m in tiny.modules() if isinstance(m, (M.HAB, M.OCAB))]
    assert len(ran) == len(blocks) > 1 and {*map(id, ran)} == {*map(id, blocks)}


def test_drop_path_drops_whole_pictures_only_in_training():
    torch.manual_seed(0)
    x = torch.ones(1000, 2, 2, 3)
    y = M.drop_path(x, 0.25, True)
    kept = (y != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1)) and 0.7 < kept.all(1).float().mean() < 0.8
    assert abs(y.mean() - 1) < 0.05 and M.drop_path(x, 0.25, False) is x
    deep = HATRefiner.from_preset("low", drop_path=0.11)
    assert np.allclose([m.p for m in deep.modules() if isinstance(m, M.HAB)], np.linspace(0, 0.11, 12))
    block, x = shake(M.HAB(16, 4, 2, 4, 4, 0, 0.9999)).train(), torch.randn(2, 8, 8, 16)       # drops nearly always
    index = M.position_index(4, 4)
    conv, share = block.conv_block(block.norm1(x))
    assert torch.equal(block(x, index, None), x + conv * share)     # what alone is never dropped
    assert not torch.allclose(block.eval()(x, index, None), x + conv * share, atol=0.01)


@pytest.mark.parametrize("value", (0.0, 1.0))
def test_bf16_is_close_and_finite(value):
    low, kinds = HATRefiner.from_preset("low").eval(), set()
    low.hat_model.layers[0].register_forward_hook(lambda m, x, y: kinds.update((x[0].dtype, y.dtype)))
    low.hat_model.conv_last.register_forward_hook(lambda m, x, y: kinds.add(y.dtype))
    for x in (torch.full((1, 3, 16, 16), value), torch.rand(1, 3, 16, 16)):
        with torch.no_grad():
            want = low(x)
            with torch.autocast("cpu", torch.bfloat16):
                got = low(x)
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert -10 * (got - want).square().mean().log10() > 45
    assert kinds == {torch.float32}, "the residual stream and the picture itself"


def test_untrained_refiner_changes_nothing_and_a_trained_one_does():
    net = HATRefiner.from_preset("tiny").eval()
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(net(x), net.hat_model(x))
        net.out_conv.bias.fill_(0.1)
        assert torch.allclose(net(x), net.hat_model(x) + 0.1)
        net.refine = False
        assert torch.equal(net(x), net.hat_model(x))


def test_tiler_gets_hat_and_the_refiner_gets_the_joined_picture(tiny):
    seen = []

    def tiler(forward, x, scale):
        seen.append((forward, tuple(x.shape), scale))
        return torch.zeros(1, 3, 16, 16)
    out = tiny(torch.rand(1, 3, 8, 8), tiler)
    assert seen == [(tiny.hat_model, (1, 3, 8, 8), 2)]
    assert torch.equal(out, tiny.out_conv(tiny.residual_block(torch.zeros(1, 3, 16, 16))))


# ----------------------------------------------------------------------------------------------------------------------
# weights files


def same_picture(a, b):
    x = torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def test_save_and_load(tiny, tmp_path):
    save(tiny, tmp_path / "a b 壁紙.safetensors", dict(recipe="web", stage=2))
    again = load(tmp_path / "a b 壁紙.safetensors")
    assert same_picture(tiny, again) and again.refine and not again.training
    assert {k: again.header[k] for k in ("preset", "scale", "recipe", "stage")} == dict(
        preset="tiny", scale=2, recipe="web", stage=2)
    assert os.listdir(tmp_path) == ["a b 壁紙.safetensors"]


def test_saved_in_bf16_is_half_as_big(tiny, tmp_path):
    save(tiny, tmp_path / "full.safetensors")
    save(tiny, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    assert {v.dtype for v in read_weights(tmp_path / "half.safetensors")[0].values()} == {torch.float32, torch.int64}


def test_an_untrained_refiner_is_left_out(tmp_path):
    save(HATRefiner.from_preset("tiny"), tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").refine is False


@pytest.mark.parametrize("wrap", (None, "params_ema", "params", "state_dict"))
@pytest.mark.parametrize("prefix", ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."))
def test_official_files_load(tiny, tmp_path, wrap, prefix):
    state = {prefix + k: v for k, v in tiny.hat_model.state_dict().items()}
    torch.save({wrap: state} if wrap else state, tmp_path / "HAT.pth")
    again = load(tmp_path / "HAT.pth")
    assert again.header["preset"] == "tiny" and same_picture(tiny.hat_model, again)
    fit(HATRefiner.from_preset("tiny"), again.state_dict(), "")     # its refiner too is of that preset


def test_params_ema_wins_over_params(tiny, tmp_path):
    good = tiny.hat_model.state_dict()
    torch.save({"params": {k: v * 0 for k, v in good.items()}, "params_ema": good}, tmp_path / "HAT.pth")
    assert same_picture(tiny.hat_model, load(tmp_path / "HAT.pth"))


@pytest.mark.parametrize("scale", (3, 4))
def test_sizes_are_read_from_the_file(tmp_path, scale):
    torch.manual_seed(0)
    odd = shake(HATRefiner(scale=scale, embed_dim=20, depths=(2, 4), heads=5, window=8, compress=5, squeeze=4, refiner_dim=7))
    save(odd, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert same_picture(odd, again) and again.header["preset"] is None and again.scale == scale


def broken(tmp_path, kind, tiny):
    path = tmp_path / "w.safetensors"
    save(tiny, path)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "cut to nothing":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not weights")
    elif kind == "other network":
        save_file({"layer.weight": torch.zeros(3)}, path)
    elif kind == "cut pth":
        path = tmp_path / "w.pth"
        torch.save(tiny.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "pickle":
        path = tmp_path / "w.pth"
        path.write_bytes(pickle.dumps(Path))
    elif kind == "no tensors":
        path = tmp_path / "w.pth"
        torch.save({"params": {"epoch": 3}}, path)
    elif kind == "numbered tensors":
        path = tmp_path / "w.pth"
        torch.save({0: torch.zeros(3), 1: torch.zeros(3)}, path)
    elif kind == "absent":
        path.unlink()
    return path


@pytest.mark.parametrize("kind", ("cut short", "cut to nothing", "text", "other network", "cut pth", "pickle", "no tensors",
                                  "numbered tensors", "absent"))
def test_bad_files_are_one_line(tmp_path, kind, tiny):
    path = broken(tmp_path, kind, tiny)
    with pytest.raises(WeightsError) as e:
        load(path)
    assert path.name in str(e.value) and "\n" not in str(e.value)


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"params": Evil()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError):
        load(tmp_path / "w.pth")
    assert not (tmp_path / "owned").exists()


def test_a_strange_header_and_a_layer_without_sides(tiny, tmp_path):
    """A TypeError, both of them."""
    state = tiny.state_dict()
    for header in ("[1]", "3", '"a"', "null"):
        save_file(state, tmp_path / "w.safetensors", {"kabegami": header})
        with pytest.raises(WeightsError) if header != "null" else contextlib.nullcontext():
            load(tmp_path / "w.safetensors")
    state["hat_model.conv_first.weight"] = torch.tensor(1.0)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError):
        load(tmp_path / "w.safetensors")


def test_every_odd_key_is_named(tiny, tmp_path):
    state = tiny.state_dict()
    state["hat_model.surprise"] = state.pop("hat_model.norm.weight")
    state["out_conv.bias"] = torch.zeros(4)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as e:
        fit(HATRefiner.from_preset("tiny"), read_weights(tmp_path / "w.safetensors")[0], "w.safetensors")
    for word in ("missing: hat_model.norm.weight", "unexpected: hat_model.surprise", "out_conv.bias (4,) for (3,)"):
        assert word in str(e.value)


@pytest.mark.parametrize("preset,scale,word", (("low", 2, "tiny 2x"), ("tiny", 3, "tiny 2x")))
def test_another_preset_or_scale_is_refused(tiny, tmp_path, preset, scale, word):
    save(tiny, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=word):
        fit(HATRefiner.from_preset(preset, scale), read_weights(tmp_path / "w.safetensors")[0], "w.safetensors")


def test_full_disk_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    save(tiny, tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(self.name))
    monkeypatch.setattr(M, "open", Full, raising=False)
    with pytest.raises(OSError):
        save(shake(tiny), tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == before and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("rows", (4, 8, 12, 100))
def test_band_by_band_is_the_same(batch, rows, monkeypatch):
    """Without gradients pictures are taken some rows of windows at a time; shifted windows keep their own masks."""
    torch.manual_seed(0)
    net = shake(HAT(2, **sizes_of("tiny")), 0.05)
    x = torch.rand(batch, 3, 20, 28)
    whole, before = net(x), x.clone()
    monkeypatch.setattr(M, "BAND", rows * 28 * batch / torch.get_num_threads())
    with torch.no_grad():
        assert M.band_of(x.permute(0, 2, 3, 1), 4) == rows
        assert (net(x) - whole).abs().max() < 1e-5 and torch.equal(x, before)


def test_attention_without_gradients_and_as_a_gpu_does_it_is_the_same(monkeypatch):
    """By one call, for windows of one bias and of one each."""
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 16, 2, 8), *torch.randn(2, 6, 36, 2, 8)
    for bias in torch.randn(2, 16, 36), torch.randn(3, 2, 16, 36), torch.randn(6, 2, 16, 36):
        want = M.attend(q, k, v, bias, 0.2)
        a = torch.einsum("nqhd,nkhd->nhqk", q, k) * 0.2 + (bias if bias.dim() == 3 else torch.cat([bias] * (6 // len(bias))))
        assert torch.allclose(want, torch.einsum("nhqk,nkhd->nqhd", a.softmax(-1), v).flatten(2), atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(M.attend(q, k, v, bias, 0.2), want, atol=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            assert torch.allclose(M.attend(q, k, v, bias, 0.2), want, atol=1e-5)
