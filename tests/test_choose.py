"""choose.py: which of the shipped weights a picture needs."""
from pathlib import Path

import numpy as np
import pytest
import torch

import choose
import degrade
import demo
from model import load

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=(0, pytest.param(1, marks=pytest.mark.slow)))
def scene(request):
    """An undamaged drawing (3, 192, 320)."""
    picture = demo.meadow(demo.Canvas(640, 384), np.random.default_rng(request.param))
    hr = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    return degrade.degrade(hr, "bicubic", 2, [0])[0]


@pytest.fixture(scope="module")
def model():
    return load(ROOT / "weights" / "kabegami-low.safetensors")


def test_undamaged_and_damaged_pictures(model, scene):
    assert choose.is_undamaged(model, scene)
    assert not choose.is_undamaged(model, degrade.compress(scene, "jpeg", 95))
    assert not choose.is_undamaged(model, degrade.compress(scene, "jpeg", 85, offset=(3, 5)))
    assert not choose.is_undamaged(model, degrade.to_8_bit(degrade.gaussian_blur(scene, 0.6)))


def test_small_and_flat_pictures_count_as_damaged(model):
    assert not choose.is_undamaged(model, torch.rand(3, 96, 31))
    assert not choose.is_undamaged(model, torch.full((3, 40, 40), 0.5))
