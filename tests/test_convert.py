"""convert.py: export, blend and its command. Other architectures are in test_rivals.py."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convert
from model import HATRefiner, WeightsError, load, read_weights, save
from test_model import same_picture, shake, tiny       # noqa: F401

ROOT = Path(__file__).parent.parent


def command(monkeypatch, capsys, *args):
    """(exit code, stdout, stderr) of convert.py in this process."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, args)])
    code = 0
    try:
        convert.main()
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
def test_exported_hat_opens_in_spandrel(tiny, tmp_path, suffix):           # noqa: F811
    spandrel = pytest.importorskip("spandrel")
    convert.export_hat(tiny, tmp_path / f"hat{suffix}")
    assert suffix != ".pth" or list(torch.load(tmp_path / "hat.pth")) == ["params_ema"]     # as in HAT's own files
    theirs = spandrel.ModelLoader().load_from_file(tmp_path / f"hat{suffix}")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert theirs.scale == 2 and (theirs.model.eval()(x) - tiny.hat_model(x)).abs().max() < 1e-5
    assert same_picture(tiny.hat_model, load(tmp_path / f"hat{suffix}"))


def test_a_saved_model_with_an_untrained_refiner_opens_in_spandrel(tmp_path):
    spandrel = pytest.importorskip("spandrel")
    ours = HATRefiner.from_preset("tiny").eval()
    save(ours, tmp_path / "ours.safetensors", dict(stage=1))
    theirs = spandrel.ModelLoader().load_from_file(tmp_path / "ours.safetensors")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert (theirs.model.eval()(x) - ours(x)).abs().max() < 1e-5


def test_onnx_has_free_sides(tiny, tmp_path):                             # noqa: F811
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    convert.export_onnx(tiny, tmp_path / "tiny.onnx")
    session = runtime.InferenceSession(tmp_path / "tiny.onnx")
    for h, w in (29, 38), (16, 16), (4, 37):
        lr = torch.rand(2, 3, h, w)
        with torch.no_grad():
            expected = tiny.hat_model(lr)
        for k in range(2):
            sr, = session.run(None, {"lr": lr[k:k + 1].numpy()})
            assert (torch.from_numpy(sr) - expected[k:k + 1]).abs().max() < 1e-4


# ------------------------------------------------------------------ blend

def test_blend_mixes_weights_and_headers(tiny, tmp_path):                  # noqa: F811
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save(tiny, files[0], dict(licence="CC0", recipe="bicubic", step=70))
    save(shake(tiny), files[1], dict(licence="CC0", recipe="web", step=70))
    a, b = (read_weights(file)[0] for file in files)
    for alpha in 0, 0.3, 1:
        mixed = convert.blend(files, (1 - alpha, alpha))
        for name, v in mixed.state_dict().items():
            expected = (1 - alpha) * a[name] + alpha * b[name] if v.is_floating_point() else a[name]
            assert torch.equal(v, expected) if alpha in (0, 1) else torch.allclose(v, expected, atol=1e-7)
    save(convert.blend(files, (0.7, 0.3)), tmp_path / "c.safetensors", convert.blend(files, (0.7, 0.3)).header)
    header = read_weights(tmp_path / "c.safetensors")[1]
    assert [(part["file"], part["amount"]) for part in header["blend"]] == [("a.safetensors", 0.7), ("b.safetensors", 0.3)]
    assert header["licence"] == "CC0" and "recipe" not in header and "step" not in header
    assert header["blend"][1]["header"]["step"] == 70


def test_blend_of_different_networks_raises(tiny, tmp_path):               # noqa: F811
    save(tiny, tmp_path / "a.safetensors")
    save(HATRefiner.from_preset("tiny", scale=3), tmp_path / "b.safetensors")
    save(HATRefiner.from_preset("tiny", depths=(2, 1)), tmp_path / "c.safetensors")
    save(HATRefiner.from_preset("tiny"), tmp_path / "plain.safetensors")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for other in "b.safetensors", "c.safetensors", "plain.safetensors", "other.pth", "absent.pth":
        with pytest.raises(WeightsError, match=other):
            convert.blend([tmp_path / "a.safetensors", tmp_path / other], (0.5, 0.5))


# ------------------------------------------------------------------ the command

def test_command_as_a_process(tiny, tmp_path):                             # noqa: F811
    save(tiny, tmp_path / "w.safetensors")
    done = subprocess.run([sys.executable, "convert.py", "export", tmp_path / "w.safetensors", tmp_path / "new/hat.pth"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "without the trained refiner" in done.stdout, done.stderr
    assert same_picture(tiny.hat_model, load(tmp_path / "new/hat.pth"))


def test_info_and_blend(tiny, tmp_path, monkeypatch, capsys):              # noqa: F811
    save(tiny, tmp_path / "w.safetensors", dict(stage=1))
    code, out, _ = command(monkeypatch, capsys, "info", tmp_path / "w.safetensors")
    assert code == 0 and json.loads(out[:out.rindex("}") + 1])["stage"] == 1
    code, out, _ = command(monkeypatch, capsys, "blend", tmp_path / "w.safetensors", tmp_path / "w.safetensors",
                           "--alpha", 0.25, "-o", tmp_path / "mixed.safetensors")
    assert code == 0 and "mixed" in out
    assert load(tmp_path / "mixed.safetensors").header["blend"][1]["amount"] == 0.25


def test_mistakes_are_one_line(tiny, tmp_path, monkeypatch, capsys):       # noqa: F811
    file = tmp_path / "w.safetensors"
    save(tiny, file)
    before = file.read_bytes()
    for args, reason in ((("export", file, file), "--overwrite"),
                         (("export", file, tmp_path / "hat.bin"), ".pth or .safetensors"),
                         (("export", tmp_path / "absent.pth", tmp_path / "hat.pth"), "absent.pth"),
                         (("blend", file, file, "-o", tmp_path / "x.pth"), ".safetensors"),
                         (("blend", file, file, "-o", file), "--overwrite"),
                         (("info", tmp_path / "absent.pth"), "absent.pth")):
        code, _, err = command(monkeypatch, capsys, *args)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and reason in err, err
    assert file.read_bytes() == before
