"""choose.py: which of the shipped weights a picture needs."""
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import choose
import degrade
import demo
from model import load

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=(demo.meadow, pytest.param(demo.portrait, marks=pytest.mark.slow)))
def scene(request):
    """An undamaged drawing (3, 192, 320)."""
    picture = request.param(demo.Canvas(640, 384), np.random.default_rng(request.param is demo.portrait))
    hr = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    return degrade.degrade(hr, "bicubic", 2, [0])[0]


@pytest.fixture(scope="module")
def models():
    """(repairing, plain)"""
    return [load(ROOT / "weights" / f"{name}-low.safetensors") for name in ("kabegami", "clean")]


def test_default_and_companion_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choose, "__file__", str(tmp_path / "choose.py"))
    assert choose.default_weights() == tmp_path / "weights" / "kabegami-low.safetensors"        # absent, but named
    for i, run in enumerate(("old", "new")):
        path = tmp_path / "runs" / run / "best.safetensors"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (i, i))
    assert choose.default_weights().parent.name == "new"
    (tmp_path / "weights").mkdir()
    for name in ("niqe-anime", "kabegami-low", "clean-low"):
        (tmp_path / "weights" / f"{name}.safetensors").touch()
    assert choose.default_weights().name == "kabegami-low.safetensors"
    assert choose.companion_weights(choose.default_weights()).name == "clean-low.safetensors"
    (tmp_path / "weights" / "clean-low.safetensors").unlink()
    assert choose.companion_weights(choose.default_weights()) is None
    assert choose.companion_weights(tmp_path / "runs" / "new" / "best.safetensors") is None


def test_undamaged_and_damaged_pictures(models, scene):
    assert choose.is_undamaged(*models, scene)
    assert not choose.is_undamaged(*models, degrade.compress(scene, "jpeg", 85))
    assert not choose.is_undamaged(*models, degrade.to_8_bit(degrade.gaussian_blur(scene, 0.8)))


def test_each_threshold_decides(models, scene, monkeypatch):
    monkeypatch.setattr(choose, "MIN_FIDELITY_DB_JPEG", -math.inf)
    assert choose.is_undamaged(*models, degrade.compress(scene, "jpeg", 85))
    monkeypatch.setattr(choose, "MIN_FIDELITY_DB", -math.inf)
    blurred = degrade.to_8_bit(degrade.gaussian_blur(scene, 0.6))
    assert not choose.is_undamaged(*models, blurred)        # repair_model adds detail
    monkeypatch.setattr(choose, "MAX_GAIN_DB", math.inf)
    assert choose.is_undamaged(*models, blurred)


def test_small_and_flat_pictures_count_as_damaged(models):
    assert not choose.is_undamaged(*models, torch.rand(3, 96, 31))
    assert not choose.is_undamaged(*models, torch.full((3, 40, 40), 0.5))


def test_jpeg_grid_is_found_at_any_position(scene):
    blurred = degrade.to_8_bit(degrade.gaussian_blur(scene, 0.7))
    dull = degrade.to_8_bit(0.4 + 0.3 * scene)
    for rgb in (scene, blurred, dull, degrade.compress(scene, "webp", 90)):
        assert not choose.has_jpeg_grid(rgb[None])
    for rgb in (degrade.compress(scene, "jpeg", 60), degrade.compress(scene, "jpeg", 95),
                degrade.compress(blurred, "jpeg", 85), degrade.compress(scene, "jpeg", 90)[:, 3:, 5:]):
        assert choose.has_jpeg_grid(rgb[None])


def test_no_jpeg_grid_in_flat_pictures():
    assert not choose.has_jpeg_grid(torch.full((1, 3, 64, 64), 0.5))
    assert not choose.has_jpeg_grid(torch.ones(1, 3, 32, 32))
