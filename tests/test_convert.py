"""convert.py: weights files in and out; what becomes of models of other kinds is in test_rivals.py."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
import degrade
import demo
from model import WeightsError, load, save
from test_model import same_picture, tiny       # noqa: F401; a fixture

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
def test_plain_hat_opens_in_spandrel(tiny, tmp_path, suffix):
    spandrel = pytest.importorskip("spandrel")
    convert.export_hat(tiny, tmp_path / f"hat{suffix}")
    assert suffix != ".pth" or list(torch.load(tmp_path / "hat.pth")) == ["params_ema"]       # as HAT's own options have it
    theirs = spandrel.ModelLoader().load_from_file(tmp_path / f"hat{suffix}")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert theirs.scale == 2 and (theirs.model.eval()(x) - tiny.hat_model(x)).abs().max() < 1e-5
    assert same_picture(tiny.hat_model, load(tmp_path / f"hat{suffix}"))


def test_find_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert, "__file__", str(tmp_path / "convert.py"))
    with pytest.raises(WeightsError, match="train.py"):
        convert.find_weights()
    for i, run in enumerate(("old", "new")):
        (tmp_path / "runs" / run).mkdir(parents=True)
        save(tiny, tmp_path / "runs" / run / "best.safetensors")
        os.utime(tmp_path / "runs" / run / "best.safetensors", (i, i))
    assert convert.find_weights().parent.name == "new"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "niqe-anime.safetensors").write_bytes(b"no model")
    assert convert.find_weights().parent.name == "new"
    for name in ("clean-low", "web-low"):
        save(tiny, tmp_path / "weights" / f"{name}.safetensors")
    assert convert.find_weights().name == "web-low.safetensors"
    assert convert.find_sharp(convert.find_weights()).name == "clean-low.safetensors"
    (tmp_path / "weights" / "clean-low.safetensors").unlink()
    assert convert.find_sharp(convert.find_weights()) is None
    assert convert.find_sharp(tmp_path / "runs" / "new" / "best.safetensors") is None


def test_undamaged_pictures_are_told_from_damaged_ones():
    both = [convert.load_any(ROOT / "weights" / f"{name}-low.safetensors") for name in ("web", "clean")]
    for k, scene in enumerate((demo.meadow, demo.portrait)):
        hr = scene(demo.Canvas(640, 384), np.random.default_rng(k))
        hr = torch.from_numpy(np.array(hr)).permute(2, 0, 1)[None] / 255
        lr = degrade.degrade(hr, "bicubic", 2, [0])[0]
        assert convert.undamaged(*both, lr)
        assert not convert.undamaged(*both, degrade.compress(lr, "jpeg", 85))
        assert not convert.undamaged(*both, degrade.to_8_bit(degrade.gaussian_blur(lr, 0.8)))
    assert convert.undamaged(*both, degrade.compress(lr, "jpeg", 85), least=(math.inf, -math.inf))      # its own threshold
    soft = degrade.to_8_bit(degrade.gaussian_blur(lr, 0.6))
    anything = -math.inf, -math.inf
    assert not convert.undamaged(*both, soft, least=anything)           # by the detail that web-low gives back
    assert convert.undamaged(*both, soft, least=anything, most=math.inf)
    assert not convert.undamaged(*both, lr[..., :31])
    assert not convert.undamaged(*both, torch.full((3, 40, 40), 0.5))


def test_the_grid_of_jpeg_is_found_wherever_it_lies():
    for k, scene in enumerate((demo.meadow, demo.portrait)):
        hr = torch.from_numpy(np.array(scene(demo.Canvas(640, 384), np.random.default_rng(k)))).permute(2, 0, 1) / 255
        lr = degrade.degrade(hr[None], "bicubic", 2, [0])[0]
        soft = degrade.to_8_bit(degrade.gaussian_blur(lr, 0.7))
        tone = degrade.to_8_bit(0.4 + 0.3 * lr)
        for rgb in (lr, soft, tone, degrade.compress(lr, "webp", 90)):
            assert not convert.jpeg_grid(rgb[None])
        for rgb in (degrade.compress(lr, "jpeg", 60), degrade.compress(lr, "jpeg", 95), degrade.compress(soft, "jpeg", 85),
                    degrade.compress(lr, "jpeg", 90)[:, 3:, 5:]):
            assert convert.jpeg_grid(rgb[None])
    assert not convert.jpeg_grid(torch.full((1, 3, 64, 64), 0.5)) and not convert.jpeg_grid(torch.ones(1, 3, 32, 32))


def test_command_line(tiny, tmp_path, monkeypatch, capsys):
    save(tiny, tmp_path / "w.safetensors", dict(stage=1))
    done = subprocess.run([sys.executable, "convert.py", tmp_path / "w.safetensors", tmp_path / "new/hat.pth"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout[:done.stdout.rindex("}") + 1])["stage"] == 1
    assert same_picture(tiny.hat_model, load(tmp_path / "new/hat.pth"))

    before = (tmp_path / "w.safetensors").read_bytes()
    for out, flags, reason in (("new/hat.pth", [], "--overwrite"), ("w.safetensors", ["--overwrite"], "lose its refiner"),
                               ("hat.onnx", ["--overwrite"], "ends in .pth")):
        monkeypatch.setattr(sys, "argv", ["convert.py", str(tmp_path / "w.safetensors"), str(tmp_path / out), *flags])
        with pytest.raises(SystemExit) as refused:
            convert.main()
        said = capsys.readouterr().err
        assert refused.value.code == 2 and said.count("\n") == 1 and reason in said
        assert (tmp_path / "w.safetensors").read_bytes() == before and not (tmp_path / "hat.onnx").exists()
