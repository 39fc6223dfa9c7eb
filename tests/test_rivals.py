"""Models of other architectures through the commands of tile.py and evaluate.py. Needs the package spandrel."""
import csv
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import convert
import evaluate
import images
import metrics
import model
import pairs
import tile


def make_network(kind, scale, channels=3):
    """A small random network of an architecture that spandrel knows. Its output is scaled to the middle gray of the
    pictures below."""
    pytest.importorskip("spandrel")
    torch.manual_seed(0)
    if kind == "rrdb":
        from spandrel.architectures.ESRGAN import ESRGAN
        net = ESRGAN(in_nc=channels, out_nc=channels, num_filters=8, num_blocks=1, scale=scale)
    elif kind == "unshuffle":       # Real-ESRGAN 2x: 4x on pixel-unshuffled input
        from spandrel.architectures.ESRGAN import ESRGAN
        net = ESRGAN(in_nc=12, num_filters=8, num_blocks=1, scale=2 * scale, shuffle_factor=2)
    elif kind == "dat":
        from spandrel.architectures.DAT import DAT
        net = DAT(embed_dim=16, split_size=[4, 8], depth=[2], num_heads=[2], expansion_factor=2, upscale=scale)
    elif kind == "grl":             # with the window sizes that spandrel assumes: files do not have them
        from spandrel.architectures.GRL import GRL
        net = GRL(embed_dim=16, upscale=scale, upsampler="nearest+conv", depths=[2], num_heads_window=[2],
                  num_heads_stripe=[2], window_size=16, stripe_size=[32, 64], stripe_groups=[None, None],
                  stripe_shift=True, mlp_ratio=2, anchor_window_down_factor=4)
    net.eval()
    last = getattr(net, "conv_last", None) or [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        for _ in range(2):
            y = net(gray_picture(64, 64)[None, :channels])
            last.weight *= 0.01 / y.std()
            last.bias += 0.5 - net(gray_picture(64, 64)[None, :channels]).mean()
    return net


def forward(net, x):
    """The output of the network itself for (C, H, W); the size must be one that the network takes."""
    with torch.no_grad():
        return net(x[None])[0].clamp(0, 1)


def gray_picture(h, w, seed=0):
    """A soft picture (3, h, w) of colors near middle gray, with noise: tile.py would keep flat areas."""
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(1, 3, 4, 5, generator=g), (h, w), mode="bicubic")[0]
    return (0.45 + 0.1 * x + 0.01 * torch.rand(3, h, w, generator=g)).clamp(0, 1).mul(255).round() / 255


def save(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((x.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(path)
    return path


def command(monkeypatch, capsys, module, *args):
    """Run a command in this process. Returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args), "--device", "cpu", "--amp", "off"])
    code = 0
    try:
        module.main()
    except SystemExit as e:
        code = e.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("kind, scale, suffix", [("rrdb", 4, ".pth"), ("unshuffle", 2, ".safetensors"),
                                                 ("dat", 2, ".safetensors"), ("grl", 4, ".pth")])
def test_both_commands(kind, scale, suffix, tmp_path, monkeypatch, capsys):
    net, file = make_network(kind, scale), tmp_path / f"a rival{suffix}"
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    save_file(state, file) if suffix == ".safetensors" else torch.save({"params_ema": state}, file)
    lr = gray_picture(64, 64)
    expected = forward(net, lr)
    code, out, err = command(monkeypatch, capsys, tile, save(tmp_path / "lr" / "a.png", lr), "-o",
                             tmp_path / "a.png", "--weights", file)
    assert code == 0, err
    sr = images.read_picture(tmp_path / "a.png").rgb
    assert expected.std() > 0.005 and (sr - expected).abs().max() < 0.51 / 255 + 1e-5   # equal after rounding

    hr = F.interpolate(lr[None], scale_factor=scale, mode="bicubic")[0].clamp(0, 1)
    save(tmp_path / "hr" / "a.png", hr)
    save(tmp_path / "hr" / "odd.png", gray_picture(37 * scale + 1, 41 * scale))     # not whole windows
    code, out, err = command(monkeypatch, capsys, evaluate, "--data", tmp_path / "hr", "--weights", file,
                             "--csv", tmp_path / "t.csv", "--metrics", "psnr_y,faithfulness,seconds")
    assert code == 0 and "2 pictures," in out, err
    with open(tmp_path / "t.csv", encoding="utf-8") as csv_file:
        rows = {(row["picture"], row["method"]): row for row in csv.DictReader(csv_file)}
    assert {method for _, method in rows} == {"bicubic", "lanczos", "a rival"}
    jobs, _ = pairs.match_pairs({"HR": tmp_path / "hr"})
    for name, small, large, _ in pairs.read_pairs(jobs, scale, "bicubic"):
        if name == "a.png":
            psnr = metrics.psnr(forward(net, small), large, scale)
            assert float(rows[name, "a rival"]["psnr_y"]) == pytest.approx(psnr, abs=2e-3)


def test_tiles_join_and_small_pictures_work(tmp_path):
    torch.save(make_network("rrdb", 2).state_dict(), tmp_path / "r.pth")
    network, lr = convert.load_any(tmp_path / "r.pth"), gray_picture(80, 48)
    whole = tile.upscale(network, lr, 2, tile.Tiler(80, 0, align=1))
    tiled = tile.upscale(network, lr, 2, tile.Tiler(16, 32))     # its receptive field is below 16
    assert (whole - tiled).abs().max() < 1e-5
    one = tile.upscale(network, lr[:, :1, :1], 2, tile.Tiler(16, 0))
    assert one.shape == (3, 2, 2)


def test_other_architectures_run_in_fp32(tmp_path):
    torch.save(make_network("rrdb", 2).state_dict(), tmp_path / "r.pth")
    network, lr = convert.load_any(tmp_path / "r.pth"), gray_picture(16, 16)[None]
    fp32 = network(lr)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp32, network(lr))


def test_gray_models_are_refused(tmp_path):
    torch.save(make_network("rrdb", 2, channels=1).state_dict(), tmp_path / "gray.pth")
    with pytest.raises(model.WeightsError, match="channels"):
        convert.load_any(tmp_path / "gray.pth")


def test_official_hat_files_load_as_our_model(tmp_path):
    torch.manual_seed(0)
    ours = model.HATRefiner.from_preset("tiny")
    model.save(ours, tmp_path / "ours.safetensors", {})
    convert.export_hat(ours, tmp_path / "official.pth")
    for name in ("ours.safetensors", "official.pth"):
        assert isinstance(convert.load_any(tmp_path / name), model.HATRefiner)


def test_spandrel_computes_the_same_hat(tmp_path):
    spandrel = pytest.importorskip("spandrel")
    torch.manual_seed(0)
    ours = model.HATRefiner.from_preset("tiny", window=16, heads=6, embed_dim=24)
    convert.export_hat(ours, tmp_path / "hat.pth")
    theirs = convert.SpandrelModel(spandrel.ModelLoader().load_from_file(tmp_path / "hat.pth"))
    lr = gray_picture(32, 48)
    a, b = (tile.upscale(network, lr, 2, tile.Tiler(48, 0, align=1)) for network in (theirs, ours))
    assert (a - b).abs().max() < 1e-4


def test_unusable_files_are_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("spandrel")
    from spandrel.architectures.ESRGAN import ESRGAN
    picture = save(tmp_path / "a.png", gray_picture(16, 16))
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "unknown.pth")
    torch.save(ESRGAN(num_filters=8, num_blocks=1, scale=1).state_dict(), tmp_path / "once.pth")
    torch.save(ESRGAN(in_nc=4, num_filters=8, num_blocks=1).state_dict(), tmp_path / "four.pth")
    state = ESRGAN(num_filters=8, num_blocks=1).state_dict()
    torch.save({k: v for k, v in state.items() if "conv2.0.bias" not in k}, tmp_path / "holes.pth")
    torch.save({"net": types.SimpleNamespace()}, tmp_path / "pickle.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    for name in "unknown.pth", "once.pth", "four.pth", "holes.pth", "pickle.pth", "cut.safetensors", "none.pth":
        for module, args in ((tile, (picture, "-o", tmp_path / "out")), (evaluate, ("--data", picture))):
            code, out, err = command(monkeypatch, capsys, module, *args, "--weights", tmp_path / name)
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and name in err, err


def test_the_error_names_spandrel_if_it_is_not_installed(tmp_path, monkeypatch, capsys):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "rival.pth")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    picture = save(tmp_path / "a.png", gray_picture(16, 16))
    for module, args in ((tile, (picture, "-o", tmp_path / "out")), (evaluate, ("--data", picture))):
        code, _, err = command(monkeypatch, capsys, module, *args, "--weights", tmp_path / "rival.pth")
        assert code == 2 and err.count("\n") == 1 and "rival.pth" in err and "pip install spandrel" in err
