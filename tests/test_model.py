import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as M
from model import HAT, PRESETS, HATRefiner, WeightsError, fit_weights, load, pad_to, read_weights, save

HERE = Path(__file__).parent
COUNTS = {  # published parameter counts
    "hat_s": (9_473_471, 9_658_111, 9_621_183),
    "hat": (20_624_795, 20_809_435, 20_772_507),
    "hat_l": (40_698_863, 40_883_503, 40_846_575),
}


def shake(model, std=0.03):
    """Add noise to all weights, so that every part of the network has an effect."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * std)
    return model.eval()


def official_hat(ours, scale, sizes):
    """spandrel's HAT with the sizes and weights of ours. Skips the test without spandrel."""
    hat = pytest.importorskip("spandrel.architectures.HAT").HAT
    theirs = hat(img_size=64, patch_size=1, in_chans=3, embed_dim=sizes["embed_dim"], depths=sizes["depths"],
                 num_heads=[sizes["heads"]] * len(sizes["depths"]), window_size=sizes["window"],
                 compress_ratio=sizes["compress"], squeeze_factor=sizes["squeeze"], conv_scale=0.01, overlap_ratio=0.5,
                 mlp_ratio=2.0, upscale=scale, img_range=1.0, upsampler="pixelshuffle", resi_connection="1conv",
                 num_feat=64)
    own = ours.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in theirs.state_dict().items() if "index" in k)
    theirs.load_state_dict(own, strict=True)
    return theirs.eval()


def sizes_of(preset):
    return {k: v for k, v in PRESETS[preset].items() if k != "refiner_dim"}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return shake(HATRefiner.from_preset("tiny", scale=2))


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts_match_the_paper(preset):
    with torch.device("meta"):
        counts = tuple(sum(p.numel() for p in HAT(scale, **sizes_of(preset)).parameters()) for scale in (2, 3, 4))
    assert counts == COUNTS[preset]


@pytest.mark.parametrize("preset, scale", [("tiny", 2), ("tiny", 3), ("tiny", 4), ("low", 2),
                                           pytest.param("hat_s", 2, marks=pytest.mark.slow)])
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


def test_equals_the_stored_output_of_spandrel():
    golden = load_file(HERE / "golden_hat.safetensors")
    x, want = golden.pop("input"), golden.pop("output")
    ours = HAT(scale=2, embed_dim=12, depths=(2, 2), heads=3, window=4, compress=3, squeeze=2)
    assert all(torch.equal(v, golden[k].long()) for k, v in ours.state_dict().items() if "index" in k)
    ours.load_state_dict({k: v.float() if v.is_floating_point() else v.long() for k, v in golden.items()})
    with torch.no_grad():
        got = ours.eval()(x)
    assert want.std() > 0.05 and (got - want).abs().max() < 1e-5


def test_an_unsupported_scale_raises():
    with pytest.raises(ValueError):
        HAT(scale=5)


@pytest.mark.parametrize("scale", (2, 3, 4))
def test_warm_start_interpolates(scale):
    """A kernel of three pixels interpolates a parabola exactly."""
    torch.manual_seed(0)
    t = torch.linspace(-1, 1, 24 * scale)
    hr = (0.5 + 0.2 * t[:, None] ** 2 - 0.3 * t[None, :] ** 2).expand(1, 3, -1, -1)
    with torch.no_grad():
        error = HATRefiner.from_preset("tiny", scale).eval()(F.avg_pool2d(hr, scale)) - hr
    assert error[..., 4 * scale:-4 * scale, 4 * scale:-4 * scale].abs().max() < 0.002


@pytest.mark.parametrize("h,w", ((1, 1), (1, 9), (3, 3), (5, 2), (17, 9)))
@pytest.mark.parametrize("scale", (2, 3, 4))
def test_any_size(h, w, scale):
    sr = HATRefiner.from_preset("tiny", scale)(torch.rand(2, 3, h, w))
    assert sr.shape == (2, 3, scale * h, scale * w) and sr.isfinite().all()


def test_padding_mirrors_repeatedly():
    x = torch.arange(3.0).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    assert pad_to(x, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert pad_to(x[..., :1], 4)[0, 0, 0].tolist() == [0] * 4
    x = torch.rand(1, 3, 5, 6)
    assert torch.equal(pad_to(x, 4), F.pad(x, (0, 2, 0, 3), mode="reflect"))


def test_warm_start_lets_gradients_reach_all_parameters():
    torch.manual_seed(0)
    net = HAT(2, **sizes_of("tiny"))
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(3):
        adam.zero_grad()
        (net(torch.rand(2, 3, 8, 8)) - torch.rand(2, 3, 16, 16)).abs().mean().backward()
        adam.step()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_gradients_match_finite_differences(tiny):
    """Along one random direction, in float64."""
    net = tiny.hat_model.double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    v, eps = torch.randn_like(x), 1e-5
    net(x).square().mean().backward()
    with torch.no_grad():
        want = (net(x + eps * v).square().mean() - net(x - eps * v).square().mean()) / (2 * eps)
    assert torch.allclose((x.grad * v).sum(), want, rtol=1e-6)


@pytest.mark.parametrize("is_cuda", (False, True))
def test_attention_matches_the_formula(is_cuda, monkeypatch):
    """Both code paths, with one bias for all windows, one for each, and one for each window of a picture."""
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 16, 2, 8), *torch.randn(2, 6, 36, 2, 8)
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
    for windows in 1, 3, 6:
        bias = torch.randn(windows, 2, 16, 36)
        weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) * 0.2 + torch.cat([bias] * (6 // windows))).softmax(-1)
        expected = torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2)
        assert torch.allclose(M.attention(q, k, v, bias, 0.2), expected, atol=1e-5)


def test_heads_are_padded_to_multiples_of_8():
    p = torch.randn(12, 30, 5)
    padded = M.pad_heads(p.flatten(0, 1), 12)
    assert torch.equal(padded.view(12, 32, 5)[:, :30], p) and not padded.view(12, 32, 5)[:, 30:].any()
    assert torch.equal(M.pad_heads(p.permute(2, 0, 1).flatten(1), 12, 1), padded.T)
    assert torch.equal(M.pad_heads(p[0, :, 0], 1), F.pad(p[0, :, 0], (0, 2)))
    assert torch.equal(M.pad_heads(p[:, :8].flatten(0, 1), 12), p[:, :8].flatten(0, 1))


def test_grad_checkpoint_saves_memory_and_keeps_the_gradients(tiny):
    x, saved_bytes, gradients = torch.rand(1, 3, 24, 24), [], []

    def count(tensor):
        saved_bytes[-1] += tensor.nbytes
        return tensor

    for tiny.hat_model.grad_checkpoint in False, True:
        saved_bytes.append(0)
        tiny.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = tiny(x).sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in tiny.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))
    assert saved_bytes[1] < 0.7 * saved_bytes[0]


def test_compile_blocks_compiles_each_attention_block(tiny, monkeypatch):
    called, x = [], torch.rand(1, 3, 8, 8)
    expected, names = tiny(x), set(tiny.state_dict())
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda *a: called.append(f.__self__) or f(*a))
    tiny.hat_model.compile_blocks()
    assert torch.equal(tiny(x), expected) and set(tiny.state_dict()) == names
    blocks = [m for m in tiny.modules() if isinstance(m, (M.HAB, M.OCAB))]
    assert len(called) == len(blocks) > 1 and {*map(id, called)} == {*map(id, blocks)}


@pytest.mark.parametrize("value", (0.0, 1.0))
def test_bf16_is_close_and_finite(value):
    low, dtypes = HATRefiner.from_preset("low").eval(), set()
    low.hat_model.layers[0].register_forward_hook(lambda m, x, y: dtypes.update((x[0].dtype, y.dtype)))
    low.hat_model.conv_last.register_forward_hook(lambda m, x, y: dtypes.add(y.dtype))
    for x in (torch.full((1, 3, 16, 16), value), torch.rand(1, 3, 16, 16)):
        with torch.no_grad():
            expected = low(x)
            with torch.autocast("cpu", torch.bfloat16):
                actual = low(x)
        assert actual.dtype == torch.float32 and actual.isfinite().all()
        assert -10 * (actual - expected).square().mean().log10() > 45
    assert dtypes == {torch.float32}, "the residual stream and the picture"


def test_only_a_trained_refiner_changes_the_output():
    net = HATRefiner.from_preset("tiny").eval()
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(net(x), net.hat_model(x))
        net.out_conv.bias.fill_(0.1)
        assert torch.allclose(net(x), net.hat_model(x) + 0.1)
        net.use_refiner = False
        assert torch.equal(net(x), net.hat_model(x))


def test_tiler_runs_hat_and_the_refiner_runs_on_the_whole_picture(tiny):
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
    save(tiny, tmp_path / "new" / "a b 壁紙.safetensors", dict(recipe="web", stage=2))
    again = load(tmp_path / "new" / "a b 壁紙.safetensors")
    assert same_picture(tiny, again) and again.use_refiner and not again.training
    assert {k: again.header[k] for k in ("preset", "scale", "recipe", "stage")} == dict(
        preset="tiny", scale=2, recipe="web", stage=2)
    assert os.listdir(tmp_path / "new") == ["a b 壁紙.safetensors"]


def test_a_file_with_an_untrained_refiner_is_plain_hat(tiny, tmp_path):
    """Also with a refiner of another size than any preset has."""
    tiny = HATRefiner.from_preset("tiny", refiner_dim=5)
    save(tiny, tmp_path / "a.safetensors", dict(stage=1))
    again = load(tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == tiny.hat_model.state_dict().keys()
    assert not again.use_refiner and len(again.residual_block[0].weight) == 5 and again.header["stage"] == 1
    assert same_picture(tiny, again)


@pytest.mark.parametrize("name", ("kabegami-low", "clean-low", "web-low"))
def test_shipped_weights_load(name):
    model = load(HERE.parent / "weights" / f"{name}.safetensors")
    x = torch.linspace(0.3, 0.7, 24).expand(1, 3, 24, 24)
    with torch.no_grad():
        difference = model(x) - F.interpolate(x, scale_factor=2, mode="bicubic")
    assert model.header["preset"] == "low" and not model.use_refiner and difference.abs().mean() < 0.02


def test_a_bf16_file_is_half_as_large(tiny, tmp_path):
    save(tiny, tmp_path / "full.safetensors")
    save(tiny, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    assert {v.dtype for v in read_weights(tmp_path / "half.safetensors")[0].values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("wrap", (None, "params_ema", "params", "state_dict"))
@pytest.mark.parametrize("prefix", ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."))
def test_official_files_load(tiny, tmp_path, wrap, prefix):
    state = {prefix + k: v for k, v in tiny.hat_model.state_dict().items()}
    torch.save({wrap: state} if wrap else state, tmp_path / "HAT.pth")
    again = load(tmp_path / "HAT.pth")
    assert again.header["preset"] == "tiny" and same_picture(tiny.hat_model, again)
    fit_weights(HATRefiner.from_preset("tiny"), again.state_dict(), "")     # the refiner has the preset's size too


def test_params_ema_wins_over_params(tiny, tmp_path):
    good = tiny.hat_model.state_dict()
    torch.save({"params": {k: v * 0 for k, v in good.items()}, "params_ema": good}, tmp_path / "HAT.pth")
    assert same_picture(tiny.hat_model, load(tmp_path / "HAT.pth"))


@pytest.mark.parametrize("scale", (3, 4))
def test_sizes_are_read_from_the_file(tmp_path, scale):
    torch.manual_seed(0)
    odd = shake(HATRefiner(scale=scale, embed_dim=20, depths=(2, 4), heads=5, window=8, compress=5, squeeze=4,
                           refiner_dim=7))
    save(odd, tmp_path / "a.safetensors")
    assert M.infer_sizes(odd.state_dict()) == odd.sizes
    again = load(tmp_path / "a.safetensors")
    assert same_picture(odd, again) and again.header["preset"] is None and again.scale == scale


def broken_file(tmp_path, problem, tiny):
    path = tmp_path / ("w.pth" if problem in ("cut pth", "pickle", "no tensors") else "w.safetensors")
    save(tiny, tmp_path / "w.safetensors")
    if problem == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif problem == "empty":
        path.write_bytes(b"")
    elif problem == "text":
        path.write_text("not weights")
    elif problem == "other network":
        save_file({"layer.weight": torch.zeros(3)}, path)
    elif problem == "cut pth":
        torch.save(tiny.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif problem == "pickle":
        path.write_bytes(pickle.dumps(Path))
    elif problem == "no tensors":
        torch.save({"params": {"epoch": 3}}, path)
    elif problem == "absent":
        path.unlink()
    return path


@pytest.mark.parametrize("problem", ("cut short", "empty", "text", "other network", "cut pth", "pickle", "no tensors",
                                     "absent"))
def test_bad_files_raise_one_line(tmp_path, problem, tiny):
    path = broken_file(tmp_path, problem, tiny)
    with pytest.raises(WeightsError) as e:
        load(path)
    assert path.name in str(e.value) and "\n" not in str(e.value)


def test_no_code_in_a_pickle_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"params": Evil()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError):
        load(tmp_path / "w.pth")
    assert not (tmp_path / "owned").exists()


def test_weights_that_do_not_fit(tiny, tmp_path):
    state = tiny.state_dict()
    state["hat_model.surprise"] = state.pop("hat_model.norm.weight")
    state["out_conv.bias"] = torch.zeros(4)
    odd = ["hat_model.norm.weight", "hat_model.surprise", "out_conv.bias"]      # missing, unknown, another shape
    fresh = HATRefiner.from_preset("tiny")
    before = {name: v.clone() for name, v in fresh.state_dict().items()}
    with pytest.raises(WeightsError) as e:
        fit_weights(fresh, state, "w.safetensors")
    assert all(name in str(e.value) for name in odd)
    assert all(torch.equal(v, before[name]) for name, v in fresh.state_dict().items())
    assert fit_weights(fresh, state, "w.safetensors", strict=False) == odd
    for name, v in fresh.state_dict().items():
        assert torch.equal(v, before[name] if name in odd else state[name])


@pytest.mark.parametrize("preset, scale", (("low", 2), ("tiny", 3)))
def test_another_preset_or_scale_raises(tiny, preset, scale):
    with pytest.raises(WeightsError, match="w.safetensors"):
        fit_weights(HATRefiner.from_preset(preset, scale), tiny.state_dict(), "w.safetensors")


def test_a_full_disk_keeps_the_old_file(tiny, tmp_path, monkeypatch):
    save(tiny, tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        save(shake(tiny), tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == before and len(os.listdir(tmp_path)) == 1
