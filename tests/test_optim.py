import pytest
import torch

from model import HATRefiner
from optim import Muon, build_optimizers, learning_rate, orthogonalize, set_learning_rate


@pytest.mark.parametrize("shape", [(24, 16), (16, 40)])
def test_orthogonalize_moves_singular_values_near_one(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(orthogonalize(x).flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.97


def test_muon_step_has_the_rms_of_adam():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(32, 64))
    p.grad = torch.randn(32, 64)
    Muon([p], lr=0.1).step()
    rms = p.detach().square().mean().sqrt()
    assert 0.5 * 0.2 * 0.1 < rms < 1.5 * 0.2 * 0.1


def test_muon_stacks_equal_shapes_without_mixing_them():
    torch.manual_seed(0)
    grads = torch.randn(2, 16, 24)
    together = [torch.nn.Parameter(torch.ones(16, 24)) for _ in range(2)]
    alone = [torch.nn.Parameter(torch.ones(16, 24)) for _ in range(2)]
    for params in (together, alone):
        for p, g in zip(params, grads):
            p.grad = g.clone()
    Muon(together).step()
    for p in alone:
        Muon([p]).step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(together, alone))


def test_every_parameter_is_in_one_group():
    model = HATRefiner.from_preset("tiny")
    model.residual_block.requires_grad_(False)
    optimizers = build_optimizers(model, "muon", conv_lr_scale=0.3)
    params = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in params} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(params) == len({id(p) for p in params})
    assert all(p.ndim == 2 for p in optimizers["muon"].param_groups[0]["params"])
    set_learning_rate(optimizers, 1.0)
    assert [g["lr"] for g in optimizers["adam"].param_groups] == [1.0, 0.3]
    assert "muon" not in build_optimizers(model, "adam")


def test_learning_rate_rises_and_falls():
    assert learning_rate(0, 0.0, 1.0, 10) == 0.1
    assert learning_rate(10, 0.0, 1.0, 10) == 1.0
    assert learning_rate(500, 0.5, 1.0, 10) == pytest.approx(0.505)
    assert learning_rate(1000, 1.0, 1.0, 10) == pytest.approx(0.01)
