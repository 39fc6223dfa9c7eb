"""fast.py: the same outputs as the plain forward, and none where the model was edited."""
import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import fast
from model import CAB, HAT, OCAB, RHAG, HATRefiner, load
from test_model import shake, sizes_of, tiny        # noqa: F401

ROOT = Path(__file__).parent.parent


def both(preset, scale=2, std=0.02):
    """The same model twice: plain, and with the fast forward."""
    torch.manual_seed(0)
    plain = shake(HATRefiner.from_preset(preset, scale), std)
    prepared = copy.deepcopy(plain)
    assert fast.prepare(prepared)
    return plain, prepared


@pytest.mark.parametrize("preset, scale, size", [
    ("tiny", 2, (70, 90)), ("tiny", 3, (67, 65)), ("tiny", 4, (65, 81)), ("tiny", 2, (5, 3)),
    ("low", 2, (66, 75)), pytest.param("hat_s", 2, (50, 85), marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", (1, 3))
def test_fast_equals_plain(preset, scale, size, batch):
    plain, prepared = both(preset, scale)
    x = torch.rand(batch, 3, *size)
    before = x.clone()
    with torch.no_grad():
        expected = plain(x)
        actual = prepared(x)
    assert (actual - expected).abs().max() < 1e-5 * max(1, expected.abs().max()) and torch.equal(x, before)
    assert max(size) < 8 or not torch.equal(actual, expected)       # the fast forward ran: it rounds differently


@pytest.mark.parametrize("rows", (4, 8, 12, 100))
@pytest.mark.parametrize("batch", (1, 3))
def test_any_strip_height_gives_the_same(rows, batch, monkeypatch):
    plain, prepared = both("tiny", std=0.05)
    x = torch.rand(batch, 3, 20, 28)
    monkeypatch.setattr(fast, "STRIP_PIXELS", rows * 28 * batch / torch.get_num_threads())
    assert fast.strip_rows(x.permute(0, 2, 3, 1), 4) == rows
    with torch.no_grad():
        expected = plain(x)
        assert (prepared(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_bf16_is_close():
    plain, prepared = both("low")
    x = torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        exact = plain(x)
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = plain(x), prepared(x)
    error = (expected - exact).abs().mean()
    assert actual.dtype == torch.float32 and 0 < (actual - exact).abs().mean() < 1.2 * error


@pytest.mark.parametrize("scale", (2, 3, 4))
@pytest.mark.parametrize("shape", ((1, 1, 1), (2, 2, 7), (1, 3, 4), (1, 9, 6)))
def test_merged_upsampler_equals_its_layers(scale, shape, monkeypatch):
    """Including the border, where each layer pads with zeros; in float64, so that rounding hides nothing."""
    monkeypatch.setattr(fast, "MERGE_PIXELS", 0)
    torch.manual_seed(scale)
    hat = shake(HAT(scale, **sizes_of("tiny"))).double()
    x = torch.randn(shape[0], fast.FEATURES, *shape[1:], dtype=torch.float64)
    with torch.no_grad():
        expected = hat.enlarge(x)
        assert expected.std() > 0.1 and torch.allclose(fast.enlarge(hat, x), expected, rtol=0, atol=1e-10)


def test_gradients_and_training_use_the_plain_forward():
    plain, prepared = both("tiny")
    x = torch.rand(1, 3, 70, 90)
    assert torch.equal(prepared(x), plain(x))
    with torch.no_grad():
        assert torch.equal(prepared.train()(x), plain.train()(x))


def test_new_weights_and_copies_are_used():
    plain, prepared = both("tiny")
    shake(prepared)
    plain.load_state_dict(prepared.state_dict())
    clone = shake(copy.deepcopy(prepared))
    x = torch.rand(1, 3, 66, 70)
    with torch.no_grad():
        assert torch.allclose(prepared(x), plain(x), atol=1e-4)
        plain.load_state_dict(clone.state_dict())
        assert torch.allclose(clone(x), plain(x), atol=1e-4)


@pytest.mark.parametrize("name", ("clean-low", "web-low"))
def test_shipped_weights(name):
    plain = load(ROOT / "weights" / f"{name}.safetensors")
    prepared = copy.deepcopy(plain)
    assert fast.prepare(prepared)
    x = torch.rand(1, 3, 65, 67)
    with torch.no_grad():
        assert (plain(x) - prepared(x)).abs().max() < 1e-5 * plain(x).abs().max()


# ------------------------------------------------------------------ an edited model

def activation_in_the_upsampler(model, monkeypatch):
    model.hat_model.upsample.insert(1, torch.nn.LeakyReLU(0.2))


def a_gate_that_starts_at_zero(model, monkeypatch):
    original = CAB.forward
    for cab in model.modules():
        if isinstance(cab, CAB):
            cab.gate = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(CAB, "forward", lambda self, x: original(self, x) + self.gate * x)


def another_signature(model, monkeypatch):
    original = RHAG.forward
    monkeypatch.setattr(RHAG, "forward", lambda self, x, *rest: original(self, x, *rest[:4]))
    monkeypatch.setattr(HAT, "features", lambda self, x: self.layers[0](
        self.conv_first(x).permute(0, 2, 3, 1), self.relative_position_index_SA, self.relative_position_index_OCA,
        None, False, "new").permute(0, 3, 1, 2))
    for block in model.hat_model.layers[0].residual_group["blocks"]:
        block.shift = 0


def no_mlp_in_ocab(model, monkeypatch):
    for block in model.modules():
        if isinstance(block, OCAB):
            del block.mlp, block.norm2
    monkeypatch.setattr(OCAB, "forward", lambda self, x, index: x)


@pytest.mark.parametrize("edit", (activation_in_the_upsampler, a_gate_that_starts_at_zero, another_signature,
                                  no_mlp_in_ocab))
def test_prepare_steps_aside_for_an_edited_model(edit, monkeypatch, capsys):
    torch.manual_seed(0)
    model = HATRefiner.from_preset("tiny").eval()
    edit(model, monkeypatch)
    x = torch.rand(1, 3, 70, 66)
    with torch.no_grad():
        expected = model(x)
        assert fast.prepare(model) is False
        assert torch.equal(model(x), expected)
    captured = capsys.readouterr()
    assert captured.err.startswith("fast.py is off") and (captured.out + captured.err).count("\n") == 1


def test_an_edit_outside_of_the_replaced_steps_stays_fast(tiny, monkeypatch):      # noqa: F811
    original = HAT.forward
    monkeypatch.setattr(HAT, "forward", lambda self, x: original(self, x) * 2)
    x = torch.rand(1, 3, 70, 66)
    with torch.no_grad():
        expected = tiny(x)
        assert fast.prepare(tiny)
        assert not torch.equal(tiny(x), expected) and (tiny(x) - expected).abs().max() < 2e-5


def test_an_error_of_the_plain_forward_is_shown(tiny, monkeypatch):        # noqa: F811
    monkeypatch.setattr(HAT, "forward", lambda self, x: x.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        fast.prepare(tiny)


def test_other_networks_are_left_alone(capsys):
    assert fast.prepare(torch.nn.Linear(2, 2)) is False and capsys.readouterr().err == ""


def test_prepare_leaves_weights_and_random_state_alone(tiny):          # noqa: F811
    before, state = [p.clone() for p in tiny.parameters()], torch.get_rng_state()
    assert fast.prepare(tiny)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(tiny.parameters(), before))


# ------------------------------------------------------------------ CUDA graphs

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_follow_the_weights():
    """The same pictures and gradients, for two shapes and after the weights have changed."""
    torch.manual_seed(0)
    model = HATRefiner.from_preset("tiny").cuda().train()
    model.use_refiner = False
    shapes = [(2, 3, 16, 16), (1, 3, 24, 24)]
    graphs = fast.capture_training_graphs(model, shapes)
    for shape in shapes * 2:
        lr, results = torch.rand(shape, device="cuda"), []
        for forward in model, graphs:
            model.zero_grad(set_to_none=True)
            sr = forward(lr)
            sr.square().mean().backward()
            results.append([sr.detach().clone(), *(p.grad.clone() for p in model.hat_model.parameters())])
        for a, b in zip(*results):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
    with pytest.raises(KeyError):
        graphs(torch.rand(1, 3, 16, 16, device="cuda"))


@pytest.mark.parametrize("error, raised", [
    (RuntimeError("operation not permitted when stream is capturing\nmore"), nullcontext()),
    (torch.OutOfMemoryError("CUDA out of memory"), pytest.raises(torch.OutOfMemoryError))])
def test_a_model_that_cannot_be_recorded(error, raised, monkeypatch, capsys):
    def fail(*args, **options):
        raise error
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with raised:
        assert fast.capture_training_graphs(torch.nn.Linear(2, 2), [(1, 2)]) is None
        assert capsys.readouterr().err.count("\n") == 1
