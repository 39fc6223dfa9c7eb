"""evaluate.py: metrics against plain sums, golden figures and scikit-image; pairs against degrade.py's command; the
table and the CSV against scores computed here."""
import csv
import errno
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import degrade
import evaluate
import model
import tile


def smooth(h, w, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(1, 3, h // 6 + 2, w // 6 + 2, generator=g), (h, w), mode="bicubic")[0]
    return degrade.to_8_bit(x)


def noisy(x, amount, seed=1):
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def pattern(h, w):
    """The same picture everywhere, without a random generator: levels of a small formula, 0 to 255."""
    y, x, c = np.meshgrid(np.arange(h), np.arange(w), np.arange(3), indexing="ij")
    return (x * x * 3 + y * 7 + x * y * (c + 1) + 40 * c) % 256


def as_tensor(pixels):
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def slow_planes(a, y):
    """uint8-valued (H, W, 3) -> float64 (H, W, 1 or 3) of 0 to 255."""
    a = a.astype(np.float64)
    return (a @ np.array([65.481, 128.553, 24.966]) / 255 + 16)[..., None] if y else a


def slow_ssim(a, b):
    """SSIM by definition: a loop over windows, float64, range 255."""
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(g, g) / g.sum() ** 2
    values = []
    for c in range(a.shape[2]):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i:i + 11, j:j + 11, c], b[i:i + 11, j:j + 11, c]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp ** 2 + mq ** 2 + c1) * (vp + vq + c2)))
    return np.mean(values)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def test_luma_of_known_colours():
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).float().T[:, None, :]
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966]) / 255
    assert torch.allclose(evaluate.luma(colours)[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("y", [True, False])
@pytest.mark.parametrize("border", [0, 3])
def test_metrics_by_plain_sums(y, border):
    hr = (smooth(23, 27) * 255).round().permute(1, 2, 0).numpy()
    sr = (noisy(smooth(23, 27), 0.05) * 255).round().permute(1, 2, 0).numpy()
    a, b = (slow_planes(p, y)[border:23 - border, border:27 - border] for p in (sr, hr))
    expected = 10 * np.log10(255 ** 2 / np.mean((a - b) ** 2))
    assert abs(evaluate.psnr(as_tensor(sr), as_tensor(hr), border, luma=y) - expected) < 1e-4
    assert abs(evaluate.ssim(as_tensor(sr), as_tensor(hr), border, luma=y) - slow_ssim(a, b)) < 1e-5


def test_golden_figures():
    hr = pattern(30, 25)
    sr = np.clip(hr + (hr * 13 % 151) - 75, 0, 255)
    figures = evaluate.score(as_tensor(sr), as_tensor(hr), 2)
    # from slow_planes and slow_ssim; scikit-image 0.26 gives the same SSIM
    expected = dict(psnr_y=20.680665, ssim_y=0.849644, psnr_rgb=15.882803, ssim_rgb=0.867870)
    assert figures.keys() == expected.keys()
    for key in expected:
        assert abs(figures[key] - expected[key]) < 1e-4, (key, figures[key])


def test_metrics_agree_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    hr = smooth(90, 120)
    sr = degrade.to_8_bit(noisy(hr, 0.03))
    how = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, full=True)
    a, b = (evaluate.luma(x.double())[0].numpy() for x in (sr, hr))
    theirs = metrics.structural_similarity(a, b, **how)[1][5:-5, 5:-5].mean()
    assert abs(evaluate.ssim(sr, hr) - theirs) < 1e-5
    assert abs(evaluate.psnr(sr, hr) - metrics.peak_signal_noise_ratio(b, a, data_range=1)) < 1e-4
    a, b = (x.double().permute(1, 2, 0).numpy() for x in (sr, hr))
    theirs = metrics.structural_similarity(a, b, channel_axis=2, **how)[1][5:-5, 5:-5].mean()
    assert abs(evaluate.ssim(sr, hr, luma=False) - theirs) < 1e-5
    assert abs(evaluate.psnr(sr, hr, luma=False) - metrics.peak_signal_noise_ratio(b, a, data_range=1)) < 1e-4


def test_rounded_to_8_bits_and_clamped_first():
    hr = smooth(20, 20)
    assert evaluate.psnr(hr + 0.001, hr) == float("inf")
    assert evaluate.ssim(hr - 0.001, hr) == pytest.approx(1, abs=1e-6)
    white = torch.ones(3, 20, 20)
    assert evaluate.psnr(white * 1.7, white) == float("inf")
    assert evaluate.psnr(white - 1 / 255, white, luma=False) == pytest.approx(20 * np.log10(255), abs=1e-4)


def test_only_the_inside_of_the_border_counts():
    hr = smooth(24, 24)
    sr = hr.clone()
    sr[:, :4], sr[:, -4:], sr[..., :4], sr[..., -4:] = 0, 1, 0, 1
    assert evaluate.psnr(sr, hr, 4) == float("inf") and evaluate.ssim(sr, hr, 4) == pytest.approx(1, abs=1e-6)
    assert evaluate.psnr(sr, hr, 3) < 40 and evaluate.ssim(sr, hr, 3) < 0.999


@pytest.mark.parametrize("metric", [evaluate.psnr, evaluate.ssim])
@pytest.mark.parametrize("luma", [True, False])
def test_a_batch_gives_the_mean(metric, luma):
    hr = torch.stack([smooth(20, 30, seed=i) for i in range(3)])
    sr = torch.stack([noisy(x, 0.02 * (i + 1)) for i, x in enumerate(hr)])
    alone = [metric(a, b, 2, luma=luma) for a, b in zip(sr, hr)]
    assert metric(sr, hr, 2, luma=luma) == pytest.approx(sum(alone) / 3, abs=1e-5) and max(alone) - min(alone) > 1e-3


def test_ssim_of_flat_pictures_is_exact_enough():
    # variances are zero here, so nothing but rounding is left of them
    a, b = torch.full((3, 40, 40), 250 / 255), torch.full((3, 40, 40), 251 / 255)
    p, q = 250 / 255, 251 / 255
    assert evaluate.ssim(a, b, luma=False) == pytest.approx((2 * p * q + 1e-4) / (p * p + q * q + 1e-4), abs=1e-4)


def test_metric_errors():
    with pytest.raises(ValueError, match="equal shape"):
        evaluate.psnr(torch.zeros(3, 20, 20), torch.zeros(3, 20, 21))
    with pytest.raises(ValueError, match="border"):
        evaluate.psnr(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), 4)
    with pytest.raises(ValueError, match="11 pixels a side inside the border, not 20x10"):
        evaluate.ssim(torch.zeros(3, 14, 24), torch.zeros(3, 14, 24), 2)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


def save(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)


@pytest.fixture
def hr_folder(tmp_path):
    folder = tmp_path / "hr"
    save(folder / "a.png", smooth(41, 36, 1))
    save(folder / "b c" / "空.png", smooth(40, 50, 2))
    save(folder / "see through.png", torch.cat([smooth(32, 32, 3), smooth(32, 32, 4)[:1]]))
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


def test_pairs_are_what_the_command_of_degrade_writes(hr_folder, tmp_path, monkeypatch, capsys):
    skipped = []
    got = {name: (lr, hr) for name, lr, hr in evaluate.pairs(hr_folder, "web", 2, seed=5, skipped=skipped)}
    assert set(got) == {"a.png", "b c/空.png", "see through.png"}
    assert len(skipped) == 1 and "broken.png" in skipped[0] and "skipped: " in capsys.readouterr().err
    assert torch.equal(got["a.png"][1], smooth(41, 36, 1)[:, :40])
    rgb, alpha = smooth(32, 32, 3), smooth(32, 32, 4)[:1]
    assert torch.allclose(got["see through.png"][1], rgb * alpha + 1 - alpha, atol=1e-6)
    monkeypatch.setattr(sys, "argv", ["degrade.py", str(hr_folder), str(tmp_path / "lr"), "--seed", "5"])
    degrade.main()
    (hr_folder / "broken.png").unlink()
    for name, lr, hr in evaluate.pairs_from(hr_folder, tmp_path / "lr", 2):
        assert torch.equal(lr, got[name][0]) and torch.equal(hr, got[name][1])
        assert hr.shape[-2:] == (lr.shape[-2] * 2, lr.shape[-1] * 2)


def test_pairs_limit_files_and_errors(hr_folder):
    assert [n for n, *_ in evaluate.pairs([hr_folder], "bicubic", 2, limit=2)] == ["a.png", "b c/空.png"]
    assert [n for n, *_ in evaluate.pairs([hr_folder / "b c" / "空.png"], "bicubic", 3)] == ["空.png"]
    with pytest.raises(ValueError, match="there are bicubic, web"):
        evaluate.pairs(hr_folder, "wep", 2)                     # at once, not at the first picture
    with pytest.raises(ValueError, match="no such file"):
        evaluate.pairs(hr_folder / "none", "web", 2)
    skipped = []
    assert not list(evaluate.pairs(hr_folder / "a.png", "web", 60, skipped=skipped)) and "36x41" in skipped[0]


def test_pairs_from_says_what_is_odd(hr_folder, tmp_path):
    (hr_folder / "broken.png").unlink()
    lr = tmp_path / "lr"
    save(lr / "a.jpg", smooth(20, 18))                          # another suffix is fine
    save(lr / "b c" / "空.png", smooth(20, 24))                 # one column short
    save(lr / "stray.png", smooth(16, 16))
    with pytest.raises(ValueError, match=r"1 only in .*hr \(see through\); 1 only in .*lr \(stray\)"):
        evaluate.pairs_from(hr_folder, lr, 2)
    (lr / "stray.png").rename(lr / "see through.png")
    skipped = []
    assert [n for n, *_ in evaluate.pairs_from(hr_folder, lr, 2, skipped=skipped)] == ["a.png", "see through.png"]
    assert len(skipped) == 1 and "空.png: its LR picture is 24x20, but 25x20 belongs to it at 2x" in skipped[0]
    save(lr / "a.png", smooth(20, 18))
    with pytest.raises(ValueError, match="differ only in their suffix"):
        evaluate.pairs_from(hr_folder, lr, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *args):
    """(exit code, stdout, stderr) of the command, in this process, on the CPU in fp32."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args), "--device", "cpu", "--amp", "off"])
    code = 0
    try:
        evaluate.main()
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


def weights(path, scale=2, seed=0, spoil=None):
    torch.manual_seed(seed)
    network = model.HATRefiner.from_preset("tiny", scale=scale)
    if spoil is not None:
        network.hat_model.conv_last.weight.data[0] = spoil
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(network, path, {})
    return path


def test_command(hr_folder, tmp_path, monkeypatch, capsys):
    files = weights(tmp_path / "one.safetensors"), weights(tmp_path / "runs" / "mine" / "best.safetensors", seed=1)
    table = tmp_path / "table.csv"
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--recipe", "web", "--weights", *files,
                             "--csv", table, "--each")
    assert code == 0 and "broken.png" in err and "3 pictures (1 skipped), recipe web, 2x, border 2" in out
    with open(table, newline="", encoding="utf-8") as file:
        rows = {(r["picture"], r["method"]): r for r in csv.DictReader(file)}
    assert len(rows) == 3 * 4 and {m for _, m in rows} == {"bicubic", "lanczos", "one", "mine"}
    mean = {}
    for name, lr, hr in evaluate.pairs(hr_folder, "web", 2):
        made = dict(bicubic=degrade.resize(lr, hr.shape[-2:]), lanczos=degrade.resize(lr, hr.shape[-2:], "lanczos"))
        for label, path in zip(("one", "mine"), files):
            with torch.no_grad():
                made[label] = model.load(path)(lr[None])[0]
        for method, sr in made.items():
            row = rows[name, method]
            assert (int(row["width"]), int(row["height"])) == (hr.shape[-1], hr.shape[-2])
            for key, value in evaluate.score(sr, hr, 2).items():
                assert float(row[key]) == pytest.approx(value, abs=2e-3 if "psnr" in key else 1e-4)
                mean.setdefault((method, key), []).append(value)
    last = out.split("border 2\n")[1]
    for method in ("bicubic", "lanczos", "one", "mine"):
        figures = [float(f) for f in re.search(rf"^{method} +(.*)$", last, re.M)[1].split()]
        for key, figure in zip(("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"), figures):
            assert figure == pytest.approx(np.mean(mean[method, key]), abs=0.008 if "psnr" in key else 2e-4)
    assert out.count("bicubic") == 4 and "\033[1m" not in out    # three blocks and the mean; no bold in a pipe


def test_best_is_bold():
    row = dict(psnr_y=30.0, ssim_y=0.9, psnr_rgb=29.0, ssim_rgb=0.8, seconds_per_mp=1.0)
    line = evaluate.make_row("mine", row, 8, ["ssim_y"])
    assert line.count("\033[1m") == 1 and "\033[1m    0.9000\033[0m" in line
    assert len(evaluate.make_row("mine", row, 8)) == 8 + 10 * len(evaluate.COLUMNS)


def test_lr_folder_border_and_tiles(hr_folder, tmp_path, monkeypatch, capsys):
    (hr_folder / "broken.png").unlink()
    file, lr = weights(tmp_path / "one.safetensors"), tmp_path / "lr"
    for name, x, _ in evaluate.pairs(hr_folder, "bicubic", 2):
        save(lr / name, x)
    made = {}
    for how in ((), ("--whole",), ("--tile-size", "16", "--tile-pad", "0"), ("--border", "5"), ("--limit", "2")):
        code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--lr", lr, "--weights", file, *how,
                                 "--csv", tmp_path / "t.csv", "--overwrite")
        assert code == 0, err
        assert f"border {5 if '--border' in how else 2}" in out
        rows = list(csv.DictReader(open(tmp_path / "t.csv", encoding="utf-8")))
        made[how] = [r["psnr_y"] for r in rows if r["method"] == "one"]
    assert made[()] == made["--whole",] and made["--limit", "2"] == made[()][:2]
    assert made["--border", "5"] != made[()] and made["--tile-size", "16", "--tile-pad", "0"] != made[()]


def test_above_the_limit_pictures_are_tiled(hr_folder, tmp_path, monkeypatch, capsys):
    file, seen = weights(tmp_path / "one.safetensors"), []
    real = tile.upscale

    def watched(forward, rgb, scale, tiler, *rest):
        seen.append((rgb.shape[-2] * rgb.shape[-1], tiler.count(*rgb.shape[-2:])))
        return real(forward, rgb, scale, tiler, *rest)
    monkeypatch.setattr(tile, "upscale", watched)
    monkeypatch.setattr(evaluate, "WHOLE_LIMIT", 300)
    save(hr_folder / "wide.png", smooth(32, 2000))
    assert command(monkeypatch, capsys, "--data", hr_folder, "--weights", file)[0] == 0
    assert max(seen) == (16 * 1000, 3)
    assert command(monkeypatch, capsys, "--data", hr_folder, "--weights", file, "--whole")[0] == 0
    assert [tiles for _, tiles in seen[4:]] == [1] * 4


def test_a_picture_too_small_to_measure_is_skipped(hr_folder, tmp_path, monkeypatch, capsys):
    save(hr_folder / "small.png", smooth(12, 30))
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--weights", weights(tmp_path / "w.safetensors"))
    assert code == 0 and "3 pictures (2 skipped)" in out and "small.png: SSIM needs 11 pixels" in err


def test_users_mistakes(hr_folder, tmp_path, monkeypatch, capsys):
    file, bad = weights(tmp_path / "w.safetensors"), weights(tmp_path / "bad.safetensors", spoil=float("nan"))
    three, cut = weights(tmp_path / "x3.safetensors", scale=3), tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    table = tmp_path / "t.csv"
    table.write_text("mine")
    for args, says in ((("--weights", file, three), "different scales"),
                       (("--weights", cut), "cut.safetensors"),
                       (("--weights", tmp_path / "none.safetensors"), "none.safetensors"),
                       (("--weights", bad), "NaN"),
                       (("--weights", file, "--recipe", "wep"), "there are bicubic, web"),
                       (("--weights", file, "--recipe", "web", "--lr", hr_folder), "exclude each other"),
                       (("--weights", file, "--whole", "--tile-size", "64"), "exclude each other"),
                       (("--weights", file, "--tile-size", "7"), "tile size"),
                       (("--weights", file, "--border", "-1"), "--border"),
                       (("--weights", file, "--limit", "0"), "--limit"),
                       (("--weights", file, "--lr", tmp_path / "empty"), "do not pair"),
                       (("--weights", file, "--border", "30"), "none of the pictures"),
                       (("--weights", file, "--csv", table), "exists already"),
                       (("--weights", file, "--csv", tmp_path / "no" / "t.csv"), "cannot write")):
        code, out, err = command(monkeypatch, capsys, "--data", hr_folder, *args)
        last = err.splitlines()[-1]
        assert code == 2 and last.startswith("error: ") and says in last and not out, (args, err)
    assert table.read_text() == "mine"
    for data, says in ((tmp_path / "empty", "no picture"), (tmp_path / "none", "no such file")):
        code, _, err = command(monkeypatch, capsys, "--data", data, "--weights", file)
        assert code == 2 and says in err
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", str(hr_folder), "--device", "quantum"])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2 and "--device quantum" in capsys.readouterr().err


def test_no_weights_anywhere(hr_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    monkeypatch.chdir(tmp_path)
    code, _, err = command(monkeypatch, capsys, "--data", hr_folder)
    assert code == 2 and err.startswith("error: no weights") and "train.py" in err
    weights(tmp_path / "runs" / "newest" / "best.safetensors")
    code, out, _ = command(monkeypatch, capsys, "--data", hr_folder)
    assert code == 0 and re.search("^newest ", out, re.M)


def test_full_disk_leaves_no_half_table(hr_folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    file = weights(tmp_path / "w.safetensors")
    monkeypatch.setattr(tile.os, "replace", full)
    (tmp_path / "tables").mkdir()
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--weights", file,
                             "--csv", tmp_path / "tables" / "t.csv")
    assert code == 2 and "No space left on device" in err.splitlines()[-1] and "bicubic" in out
    assert not list((tmp_path / "tables").iterdir())


# ---- runs side by side

def log_of(folder, rows, **settings):
    folder.mkdir(parents=True)
    names = list(dict.fromkeys(k for row in rows for k in row))
    (folder / "log.csv").write_text("\n".join([",".join(names), *(",".join(str(r.get(k, "")) for k in names) for r in rows)]))
    (folder / "args.json").write_text(json.dumps(settings))
    return folder


def test_runs_are_laid_side_by_side(tmp_path, capsys, monkeypatch):
    a = log_of(tmp_path / "a", [dict(step=10, pix=0.2, seconds=5, psnr_y=30.0, ssim_y=0.9),
                                dict(step=20, pix=0.1, adv=0.5, seconds=9, psnr_y=29.5, ssim_y=0.91)], lr=0.1, seed=0)
    b = log_of(tmp_path / "ラン", [dict(step=20, pix=0.3, seconds=8, psnr_y=31.25, ssim_y=0.92)], lr=0.2, seed=0)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(a), str(b), "--curves", str(tmp_path / "c.png")])
    evaluate.main()
    said = capsys.readouterr().out
    assert "30.00" in said and "31.25" in said and "lr=0.1" in said and "lr=0.2" in said and "seed" not in said
    picture = Image.open(tmp_path / "c.png")
    assert picture.size == (720, 3 * 220)         # PSNR, pix, adv
    pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    assert all((pixels == colour).all(1).any() for colour in ((200, 40, 90), (30, 90, 200)))
    with pytest.raises(SystemExit) as e:
        evaluate.main()
    assert e.value.code == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("text", (None, "step,psnr_y,seconds\n", "step,psnr_y,seconds\n1,x,2\n", "a,b\n1,2\n"))
def test_a_folder_that_is_no_run(tmp_path, capsys, monkeypatch, text):
    if text is not None:
        (tmp_path / "log.csv").write_text(text)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), "--curves", str(tmp_path / "c.png")])
    with pytest.raises(SystemExit) as e:
        evaluate.main()
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_without_data_or_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(SystemExit) as e:
        evaluate.main()
    assert e.value.code == 2 and "--data is missing" in capsys.readouterr().err
