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
import convert
import evaluate
import losses
import metrics
import model
import pairs
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
    assert torch.allclose(metrics.luma(colours)[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("y", [True, False])
@pytest.mark.parametrize("border", [0, 3])
def test_metrics_by_plain_sums(y, border):
    hr = (smooth(23, 27) * 255).round().permute(1, 2, 0).numpy()
    sr = (noisy(smooth(23, 27), 0.05) * 255).round().permute(1, 2, 0).numpy()
    a, b = (slow_planes(p, y)[border:23 - border, border:27 - border] for p in (sr, hr))
    expected = 10 * np.log10(255 ** 2 / np.mean((a - b) ** 2))
    assert abs(metrics.psnr(as_tensor(sr), as_tensor(hr), border, luma=y) - expected) < 1e-4
    assert abs(metrics.ssim(as_tensor(sr), as_tensor(hr), border, luma=y) - slow_ssim(a, b)) < 1e-5


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
    theirs_of = pytest.importorskip("skimage.metrics")
    hr = smooth(90, 120)
    sr = degrade.to_8_bit(noisy(hr, 0.03))
    how = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, full=True)
    a, b = (metrics.luma(x.double())[0].numpy() for x in (sr, hr))
    theirs = theirs_of.structural_similarity(a, b, **how)[1][5:-5, 5:-5].mean()
    assert abs(metrics.ssim(sr, hr) - theirs) < 1e-5
    assert abs(metrics.psnr(sr, hr) - theirs_of.peak_signal_noise_ratio(b, a, data_range=1)) < 1e-4
    a, b = (x.double().permute(1, 2, 0).numpy() for x in (sr, hr))
    theirs = theirs_of.structural_similarity(a, b, channel_axis=2, **how)[1][5:-5, 5:-5].mean()
    assert abs(metrics.ssim(sr, hr, luma=False) - theirs) < 1e-5
    assert abs(metrics.psnr(sr, hr, luma=False) - theirs_of.peak_signal_noise_ratio(b, a, data_range=1)) < 1e-4


def test_rounded_to_8_bits_and_clamped_first():
    hr = smooth(20, 20)
    assert metrics.psnr(hr + 0.001, hr) == float("inf")
    assert metrics.ssim(hr - 0.001, hr) == pytest.approx(1, abs=1e-6)
    white = torch.ones(3, 20, 20)
    assert metrics.psnr(white * 1.7, white) == float("inf")
    assert metrics.psnr(white - 1 / 255, white, luma=False) == pytest.approx(20 * np.log10(255), abs=1e-4)


def test_only_the_inside_of_the_border_counts():
    hr = smooth(24, 24)
    sr = hr.clone()
    sr[:, :4], sr[:, -4:], sr[..., :4], sr[..., -4:] = 0, 1, 0, 1
    assert metrics.psnr(sr, hr, 4) == float("inf") and metrics.ssim(sr, hr, 4) == pytest.approx(1, abs=1e-6)
    assert metrics.psnr(sr, hr, 3) < 40 and metrics.ssim(sr, hr, 3) < 0.999


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
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
    assert metrics.ssim(a, b, luma=False) == pytest.approx((2 * p * q + 1e-4) / (p * p + q * q + 1e-4), abs=1e-4)


def test_metric_errors():
    with pytest.raises(ValueError, match="equal shape"):
        metrics.psnr(torch.zeros(3, 20, 20), torch.zeros(3, 20, 21))
    with pytest.raises(ValueError, match="border"):
        metrics.psnr(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), 4)
    with pytest.raises(ValueError, match="11 pixels a side inside the border, not 20x10"):
        metrics.ssim(torch.zeros(3, 14, 24), torch.zeros(3, 14, 24), 2)


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
    got = {name: (lr, hr) for name, lr, hr in pairs.pairs(hr_folder, "web", 2, seed=5, skipped=skipped)}
    assert set(got) == {"a.png", "b c/空.png", "see through.png"}
    assert len(skipped) == 1 and "broken.png" in skipped[0] and "skipped: " in capsys.readouterr().err
    assert torch.equal(got["a.png"][1], smooth(41, 36, 1)[:, :40])
    rgb, alpha = smooth(32, 32, 3), smooth(32, 32, 4)[:1]
    assert torch.allclose(got["see through.png"][1], rgb * alpha + 1 - alpha, atol=1e-6)
    monkeypatch.setattr(sys, "argv", ["degrade.py", str(hr_folder), str(tmp_path / "lr"), "--seed", "5"])
    degrade.main()
    (hr_folder / "broken.png").unlink()
    for name, lr, hr, _ in taken(HR=hr_folder, LR=tmp_path / "lr"):
        assert torch.equal(lr, got[name][0]) and torch.equal(hr, got[name][1])
        assert hr.shape[-2:] == (lr.shape[-2] * 2, lr.shape[-1] * 2)


def test_pairs_limit_files_and_errors(hr_folder):
    assert [n for n, *_ in pairs.pairs([hr_folder], "bicubic", 2, limit=2)] == ["a.png", "b c/空.png"]
    assert [n for n, *_ in pairs.pairs([hr_folder / "b c" / "空.png"], "bicubic", 3)] == ["空.png"]
    with pytest.raises(ValueError, match="there are bicubic, web"):
        pairs.pairs(hr_folder, "wep", 2)                     # at once, not at the first picture
    with pytest.raises(ValueError, match="no such file"):
        pairs.pairs(hr_folder / "none", "web", 2)
    skipped = []
    assert not list(pairs.pairs(hr_folder / "a.png", "web", 60, skipped=skipped)) and "36x41" in skipped[0]


def taken(skipped=None, crop=False, **sides):
    """[(name, lr, hr, others)] of folders by kind, at 2x."""
    jobs, _ = pairs.paired(sides)
    return list(pairs.pictures(jobs, 2, crop=crop, skipped=skipped))


def test_hr_and_lr_must_pair(hr_folder, tmp_path):
    (hr_folder / "broken.png").unlink()
    lr = tmp_path / "lr"
    save(lr / "a.jpg", smooth(20, 18))                          # another suffix is fine
    save(lr / "b c" / "空.png", smooth(20, 24))                 # one column short
    save(lr / "stray.png", smooth(16, 16))
    with pytest.raises(ValueError, match=r"1 only in .*hr \(see through\); 1 only in .*lr \(stray\)"):
        taken(HR=hr_folder, LR=lr)
    (lr / "stray.png").rename(lr / "see through.png")
    skipped = []
    assert [n for n, *_ in taken(skipped, HR=hr_folder, LR=lr)] == ["a.png", "see through.png"]
    assert len(skipped) == 1
    assert "空.png: its LR picture is 24x20, but 25x20 belongs to it at 2x: 1 pixel narrower; --crop" in skipped[0]
    save(lr / "a.png", smooth(20, 18))
    with pytest.raises(ValueError, match="differ only in their suffix"):
        taken(HR=hr_folder, LR=lr)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no picture in"):
        taken(HR=hr_folder, LR=tmp_path / "nothing")


def test_results_of_others_may_lack_some_pictures(hr_folder, tmp_path):
    (hr_folder / "broken.png").unlink()
    some, few = tmp_path / "some", tmp_path / "few"
    save(some / "a.webp", smooth(41, 36, 5))
    save(some / "b c" / "空.png", smooth(40, 50, 6))
    save(few / "b c" / "空.png", smooth(40, 50, 7))
    save(few / "of another set.png", smooth(40, 50, 7))
    jobs, notes = pairs.paired(dict(HR=hr_folder, some=some, few=few))
    assert [name for name, _ in jobs] == ["b c/空.png"] and list(jobs[0][1]) == ["HR", "some", "few"]
    assert len(notes) == 3 and "2 only in" in notes[1] and "a, see through" in notes[1] and "another set" in notes[2]
    (name, lr, hr, others), = pairs.pictures(jobs, 2)
    assert lr is None and hr.shape == (3, 40, 50) and list(others) == ["some", "few"]
    assert torch.equal(others["few"], smooth(40, 50, 7))
    jobs, notes = pairs.paired(dict(HR=hr_folder / "a.png", some=some / "b c" / "空.png"))     # two files by name
    assert not notes and jobs == [("a.png", dict(HR=hr_folder / "a.png", some=some / "b c" / "空.png"))]
    (few / "b c" / "空.png").unlink()
    with pytest.raises(ValueError, match="do not pair: .*see through.*another set"):
        pairs.paired(dict(HR=hr_folder, few=few))


def test_sizes_are_told_and_cropped_on_demand(tmp_path):
    hr, lr, sr = tmp_path / "hr", tmp_path / "lr", tmp_path / "sr"
    save(hr / "a.png", smooth(41, 37, 1))
    save(lr / "a.png", smooth(20, 18, 2))
    save(sr / "a.png", smooth(41, 37, 3))                       # as large as HR itself: cut like it
    (_, small, true, others), = taken(HR=hr, LR=lr, mine=sr)
    assert small.shape == (3, 20, 18) and true.shape == others["mine"].shape == (3, 40, 36)
    save(sr / "a.png", smooth(39, 38, 3))
    skipped = []
    assert not taken(skipped, HR=hr, LR=lr, mine=sr)
    assert "its mine picture is 38x39, but 36x40 belongs to it at 2x: 2 pixels wider, 1 pixel lower; " in skipped[0]
    (_, small, true, others), = taken(crop=True, HR=hr, LR=lr, mine=sr)
    assert torch.equal(small, smooth(20, 18, 2)[:, :19]) and torch.equal(true, smooth(41, 37, 1)[:, :38, :36])
    assert torch.equal(others["mine"], smooth(39, 38, 3)[:, :38, :36])
    save(sr / "a.png", smooth(82, 74, 3))                       # another scale is no border
    assert not taken(skipped, crop=True, HR=hr, LR=lr, mine=sr) and "more than --crop cuts" in skipped[-1]


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
    for name, lr, hr in pairs.pairs(hr_folder, "web", 2):
        made = dict(bicubic=degrade.resize(lr, hr.shape[-2:]), lanczos=degrade.resize(lr, hr.shape[-2:], "lanczos"))
        for label, path in zip(("one", "mine"), files):
            with torch.no_grad():
                made[label] = model.load(path)(lr[None])[0]
        for method, sr in made.items():
            row = rows[name, method]
            assert (int(row["width"]), int(row["height"])) == (hr.shape[-1], hr.shape[-2])
            assert float(row["edge_psnr"]) == pytest.approx(metrics.edge_psnr(sr, hr, 2), abs=5e-3)
            assert float(row["faithfulness"]) == pytest.approx(metrics.faithfulness(sr, lr, 2), abs=5e-3)
            assert float(row["seconds"]) > 0
            for key, value in evaluate.score(sr, hr, 2).items():
                assert float(row[key]) == pytest.approx(value, abs=2e-3 if "psnr" in key else 1e-4)
                mean.setdefault((method, key), []).append(value)
    last = out.split("border 2\n")[1]
    for method in ("bicubic", "lanczos", "one", "mine"):
        figures = [float(f) for f in re.search(rf"^{method} +(.*)$", last, re.M)[1].split()]
        for key, figure in zip(("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"), figures):
            assert figure == pytest.approx(np.mean(mean[method, key]), abs=0.008 if "psnr" in key else 2e-4)
    assert out.count("bicubic") == 4 and "\033[1m" not in out    # three blocks and the mean; no bold in a pipe


def test_the_best_of_each_column_is_bold(hr_folder, tmp_path, monkeypatch, capsys):
    row = dict(psnr_y=30.0, ssim_y=0.9, seconds=np.nan)
    line = evaluate.make_row("mine", row, 8, list(row), ["ssim_y"])
    assert line.count("\033[1m") == 1 and "\033[1m    0.9000\033[0m" in line and line.endswith("         -")
    rows = dict(a=dict(psnr_y=30.001, niqe=5.0, seconds=1.0), b=dict(psnr_y=29.999, niqe=4.0, seconds=2.0),
                c=dict(psnr_y=20.0, niqe=np.nan, seconds=np.nan))
    results = [("x", "a", dict(niqe=1.0)), ("x", "b", dict(niqe=np.nan)), ("x", "c", dict(niqe=np.nan)),
               ("y", "a", dict(niqe=2.0)), ("y", "b", dict(niqe=3.0)), ("y", "c", dict(niqe=np.nan))]
    means = evaluate.mean_rows(results, ["niqe"])               # over y alone, and c has none
    assert means["a"]["niqe"] == 2 and means["b"]["niqe"] == 3 and np.isnan(means["c"]["niqe"])
    assert evaluate.best_of(rows, list(rows["a"])) == dict(psnr_y="30.00", niqe="4.000")    # a and b tie as shown
    (hr_folder / "broken.png").unlink()
    save(tmp_path / "same" / "a.png", smooth(41, 36, 1))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, out, _ = command(monkeypatch, capsys, "--data", hr_folder, "--sr", f"same={tmp_path / 'same'}", "--recipe",
                        "bicubic", "--metrics", "psnr_y,ssim_y")
    assert re.search(r"^same +\033\[1m +inf\033\[0m\033\[1m +1.0000\033\[0m$", out, re.M)


def test_results_of_others_beside_a_model(hr_folder, tmp_path, monkeypatch, capsys):
    (hr_folder / "broken.png").unlink()
    file, theirs = weights(tmp_path / "one.safetensors"), tmp_path / "their\nresults"
    sr = {"a.png": noisy(smooth(41, 36, 1), 0.02), "b c/空.png": noisy(smooth(40, 50, 2), 0.04)}
    for name, x in sr.items():
        save(theirs / name.replace(".png", ".bmp"), degrade.to_8_bit(x))
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--recipe", "web", "--sr", f"other={theirs}",
                             "--weights", file, "--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json", "--metrics",
                             "psnr_rgb,highlights,seconds,seam", "--tile-size", "16", "--tile-pad", "0")
    assert code == 0 and "2 pictures, recipe web, 2x, border 2" in out and r"left out: 1 only in" in out, err
    assert "see through" in out and out.count("\n") == 3 + 4
    rows = {(r["picture"], r["method"]): r for r in csv.DictReader(open(tmp_path / "t.csv", encoding="utf-8"))}
    assert len(rows) == 2 * 4
    trues = {name: hr for name, _, hr in pairs.pairs(hr_folder, "web", 2)}
    for name, x in sr.items():
        row = rows[name, "other"]
        hr = trues[name]
        expected = metrics.psnr(x[:, :hr.shape[-2], :hr.shape[-1]], hr, 2, luma=False)
        assert float(row["psnr_rgb"]) == pytest.approx(expected, abs=2e-3)
        assert row["seconds"] == row["seam"] == ""
        assert float(rows[name, "one"]["seam"]) > 1.0 and rows[name, "bicubic"]["seam"] == ""
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["pictures"] == found["scale"] == 2 and list(found["means"]) == ["bicubic", "lanczos", "other", "one"]
    assert found["means"]["other"]["seconds"] is None and len(found["each"]) == 8
    mean = np.mean([float(rows[name, "other"]["psnr_rgb"]) for name in sr])
    assert found["means"]["other"]["psnr_rgb"] == pytest.approx(mean, abs=1e-5)


def test_a_results_own_size(hr_folder, tmp_path, monkeypatch, capsys):
    (hr_folder / "broken.png").unlink()
    save(tmp_path / "sr" / "a.png", smooth(41, 36, 1))
    save(tmp_path / "sr" / "b c" / "空.png", smooth(38, 50, 2))
    save(tmp_path / "sr" / "see through.png", smooth(32, 32, 3))
    given = ("--data", hr_folder, "--sr", f"x={tmp_path / 'sr'}", "--metrics", "psnr_y", "--csv", tmp_path / "t.csv",
             "--overwrite")
    code, out, err = command(monkeypatch, capsys, *given)
    assert code == 0 and "2 pictures (1 skipped), no LR" in out
    assert "空.png: its x picture is 50x38, but 50x40 belongs to it: 2 pixels lower; --crop cuts" in err
    code, out, err = command(monkeypatch, capsys, *given, "--crop")
    assert code == 0 and not err and "3 pictures, no LR" in out
    rows = {r["picture"]: r for r in csv.DictReader(open(tmp_path / "t.csv", encoding="utf-8"))}
    assert float(rows["a.png"]["psnr_y"]) == float("inf") and rows["b c/空.png"]["height"] == "38"


def test_without_true_pictures(hr_folder, tmp_path, monkeypatch, capsys):
    file, lr = weights(tmp_path / "one.safetensors"), tmp_path / "lr"
    for name, x, _ in pairs.pairs(hr_folder, "web", 2):
        save(lr / name, x)
    code, out, err = command(monkeypatch, capsys, "--lr", lr, "--weights", file, "--metrics",
                             "psnr_y,banding,faithfulness,seconds", "--csv", tmp_path / "t.csv")
    assert code == 0 and "left out: psnr_y; it needs the true pictures" in err and ", 2x, no HR, border 2\n" in out
    rows = list(csv.DictReader(open(tmp_path / "t.csv", encoding="utf-8")))
    assert list(rows[0])[4:] == ["banding", "faithfulness", "seconds"]
    assert [r["method"] for r in rows[:3]] == ["bicubic", "lanczos", "one"] and len(rows) == 9
    code, out, err = command(monkeypatch, capsys, "--sr", f"one={lr}", "--metrics", "banding,faithfulness")
    assert code == 0 and "3 pictures, no LR, no HR" in out and "left out: faithfulness; it needs LR" in err
    assert re.search(r"^one +\d\.\d+$", out, re.M) and "bicubic" not in out
    for args, says in ((("--lr", lr, "--metrics", "psnr_y"), "psnr_y cannot be measured: it needs the true"),
                       (("--sr", f"one={lr}", "--weights", file), "models need LR pictures"),
                       (("--lr", lr, "--recipe", "web"), "exclude"),
                       (("--sr", f"one={lr}", "--recipe", "web"), "--data")):
        code, out, err = command(monkeypatch, capsys, *args)
        assert code == 2 and says in err.splitlines()[-1], err


def test_what_a_metric_lacks_is_told_once_and_the_rest_goes_on(hr_folder, tmp_path, monkeypatch, capsys):
    (hr_folder / "broken.png").unlink()
    file = weights(tmp_path / "one.safetensors")
    metrics._pyiqa_metric.cache_clear()
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setattr(losses, "__file__", str(tmp_path / "losses.py"))
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--weights", file, "--metrics",
                             "artifact,lpips,psnr_y", "--csv", tmp_path / "t.csv", "--report", tmp_path / "page")
    assert code == 0 and err.count("left out: lpips; ") == err.count("left out: artifact; ") == 1 and "pyiqa" in err
    assert list(next(csv.DictReader(open(tmp_path / "t.csv", encoding="utf-8"))))[4:] == ["psnr_y"]
    assert "LPIPS" not in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    code, _, err = command(monkeypatch, capsys, "--data", hr_folder, "--weights", file, "--metrics", "lpips")
    assert code == 2 and err.startswith("error: lpips cannot be measured") and err.count("\n") == 1


def test_detector_and_page(hr_folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    detector = losses.ArtifactDetector().eval()
    losses.save_detector(detector, tmp_path / "d.safetensors")
    file, page = weights(tmp_path / "one.safetensors"), tmp_path / "page"
    seen, real = [], evaluate.Report.add

    def add(self, *what):
        seen.append(what)
        real(self, *what)
    monkeypatch.setattr(evaluate.Report, "add", add)
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--weights", file, "--metrics",
                             "psnr_y,artifact", "--detector", tmp_path / "d.safetensors", "--report", page, "--csv",
                             tmp_path / "t.csv")
    assert code == 0 and f"page: {page / 'index.html'}" in out, err
    html = (page / "index.html").read_text(encoding="utf-8")
    assert "空.png" in html and "PSNR-Y" in html and "Clean" in html
    name, images, figures, reference, heat = seen[0]
    assert name == "a.png" and list(images) == ["bicubic", "lanczos", "one", "HR"] and reference == "HR"
    _, lr, hr = next(pairs.pairs(hr_folder / "a.png", "bicubic", 2))
    assert (images["HR"] == (hr * 255).round().byte().permute(1, 2, 0).numpy()).all()
    small = degrade.resize(lr, hr.shape[-2:]).clamp(0, 1)
    with torch.no_grad():
        clean = detector(small[None]).softmax(1)[0, 0].item()
    assert figures["bicubic"]["artifact"] == pytest.approx(clean, abs=1e-4)
    assert heat["one"]["artifacts"].shape == hr.shape[-2:] and 0 <= heat["one"]["artifacts"].min() <= 1
    row = next(csv.DictReader(open(tmp_path / "t.csv", encoding="utf-8")))
    assert float(row["artifact"]) == pytest.approx(clean, abs=1e-4)


def test_stopped_early_the_page_holds_what_was_done(hr_folder, tmp_path, monkeypatch, capsys):
    file, real, done = weights(tmp_path / "one.safetensors"), metrics.METRICS["psnr_y"], []

    def tired(*what):
        done.append(what)
        if len(done) > 4:
            raise KeyboardInterrupt
        return real.run(*what)
    monkeypatch.setitem(evaluate.COLUMNS, "psnr_y", real._replace(run=tired))
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--weights", file, "--metrics", "psnr_y",
                             "--report", tmp_path / "page", "--csv", tmp_path / "t.csv")
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert code == 130 and "stopped" in err and not (tmp_path / "t.csv").exists()
    assert "a.png" in html and "空" not in html


def test_a_seam_is_seen(tmp_path, monkeypatch, capsys):
    """Tiles without overlap show; with one hardly."""
    file, figures = weights(tmp_path / "w.safetensors"), {}
    save(tmp_path / "a.png", smooth(160, 192, 8))
    for pad in 0, 16:
        code, _, err = command(monkeypatch, capsys, "--data", tmp_path / "a.png", "--weights", file, "--metrics",
                               "psnr_y,seam", "--tile-size", "16", "--tile-pad", pad, "--csv", tmp_path / "t.csv",
                               "--overwrite")
        assert code == 0, err
        rows = list(csv.DictReader(open(tmp_path / "t.csv", encoding="utf-8")))
        figures[pad] = float(next(r["seam"] for r in rows if r["method"] == "w"))
    assert figures[0] > 1.5 and abs(figures[16] - 1) < 0.05, figures
    code, out, _ = command(monkeypatch, capsys, "--data", tmp_path / "a.png", "--weights", file, "--metrics", "seam")
    assert code == 0 and re.search("^w +-$", out, re.M)         # a single tile has none


def test_lr_folder_border_and_tiles(hr_folder, tmp_path, monkeypatch, capsys):
    (hr_folder / "broken.png").unlink()
    file, lr = weights(tmp_path / "one.safetensors"), tmp_path / "lr"
    for name, x, _ in pairs.pairs(hr_folder, "bicubic", 2):
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
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "page.html").write_text("mine")
    for args, says in ((("--weights", file, three), "different scales"),
                       (("--weights", cut), "cut.safetensors"),
                       (("--weights", tmp_path / "none.safetensors"), "none.safetensors"),
                       (("--weights", bad), "NaN"),
                       (("--weights", file, "--recipe", "wep"), "there are bicubic, web"),
                       (("--weights", file, "--recipe", "web", "--lr", hr_folder), "exclude each other"),
                       (("--weights", file, "--whole", "--tile-size", "64"), "--whole excludes"),
                       (("--weights", file, "--tile-size", "7"), "tile size"),
                       (("--weights", file, "--border", "-1"), "--border"),
                       (("--weights", file, "--limit", "0"), "--limit"),
                       (("--weights", file, "--lr", tmp_path / "empty"), "no picture in"),
                       (("--weights", file, file), "twice"),
                       (("--weights", file, "--metrics", "psnr_y,psnr"), "no metric 'psnr'; there are psnr_y, ssim_y"),
                       (("--weights", file, "--detector", tmp_path / "none", "--report", tmp_path / "p"), "no detec"),
                       (("--sr", hr_folder), "write it as NAME=FOLDER"),
                       (("--sr", f"a={hr_folder}", "--sr", f"a={hr_folder}"), "that name is taken"),
                       (("--sr", f"HR={hr_folder}"), "that name is taken"),
                       (("--sr", f"a={tmp_path / 'empty'}"), "no picture in"),
                       (("--sr", f"a={hr_folder}", "--metrics", "seconds"), "seconds cannot be measured: it needs LR"),
                       (("--weights", file, "--scale", "3"), "different scales"),
                       (("--weights", file, "--scale", "0"), "--scale"),
                       (("--weights", file, "--whole", "--metrics", "seam"), "excludes"),
                       (("--weights", file, "--report", tmp_path / "full"), "not an empty folder"),
                       (("--weights", file, "--json", table), "exists already"),
                       (("--weights", file, "--border", "30"), "none of the pictures"),
                       (("--weights", file, "--csv", table), "exists already"),
                       (("--weights", file, "--csv", tmp_path / "t", "--json", tmp_path / "t"), "are both"),
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


@pytest.mark.parametrize("what", ("loading", "the network", "a metric"))
def test_out_of_memory_is_one_line(hr_folder, tmp_path, monkeypatch, capsys, what):
    """Without LR pictures too, and with numpy's error as with torch's."""
    def full(*_, **__):
        raise MemoryError if what == "a metric" else RuntimeError("DefaultCPUAllocator: can't allocate memory")
    if what == "a metric":
        monkeypatch.setattr(evaluate, "COLUMNS", evaluate.COLUMNS | {"psnr_y": evaluate.COLUMNS["psnr_y"]._replace(run=full)})
        args, says = ("--sr", f"theirs={hr_folder}"), "at theirs"
    elif what == "loading":
        monkeypatch.setattr(evaluate, "load_any", full)
        args, says = ("--weights", weights(tmp_path / "w.safetensors")), "another --device"
    else:
        monkeypatch.setattr(model.HAT, "forward", full)
        args, says = ("--weights", weights(tmp_path / "w.safetensors")), "--tile-size 64"
    code, _, err = command(monkeypatch, capsys, "--data", hr_folder, "--metrics", "psnr_y", *args)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: out of memory") and says in last


def test_what_was_measured_before_memory_ran_out_is_told(hr_folder, tmp_path, monkeypatch, capsys):
    real, calls = evaluate.COLUMNS["psnr_y"].run, []

    def full(*of, **how):
        calls.append(1)
        if len(calls) > 3:      # bicubic, Lanczos and the model on the first picture
            raise MemoryError
        return real(*of, **how)
    monkeypatch.setattr(evaluate, "COLUMNS", evaluate.COLUMNS | {"psnr_y": evaluate.COLUMNS["psnr_y"]._replace(run=full)})
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--recipe", "bicubic", "--metrics", "psnr_y",
                             "--weights", weights(tmp_path / "w.safetensors"), "--csv", tmp_path / "t.csv", "--limit", 3)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: out of memory") and "above is what was measured before" in last
    assert out.startswith("1 pictures") and (tmp_path / "t.csv").read_text().count("\n") > 1


def test_time_left_with_skipped_pictures(tmp_path, monkeypatch, capsys):
    """With --limit 2 and one broken picture it counted 3 of 2."""
    shown = []
    monkeypatch.setattr(evaluate, "show_progress", lambda count, total, *_: shown.append((count, total)))
    (tmp_path / "some").mkdir()
    for name in "123":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / f"some/{name}.png")
    (tmp_path / "some" / "0.png").write_bytes(b"broken")
    code, _, err = command(monkeypatch, capsys, "--data", tmp_path / "some", "--recipe", "bicubic", "--metrics", "psnr_y",
                           "--weights", weights(tmp_path / "w.safetensors"), "--limit", "2")
    assert code == 0 and "0.png" in err and shown == [(1, 2), (2, 2)]


def test_no_weights_anywhere(hr_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "__file__", str(tmp_path / "convert.py"))
    monkeypatch.chdir(tmp_path)
    code, _, err = command(monkeypatch, capsys, "--data", hr_folder)
    assert code == 2 and err.startswith("error: no weights") and "train.py" in err
    weights(tmp_path / "runs" / "newest" / "best.safetensors")
    code, out, _ = command(monkeypatch, capsys, "--data", hr_folder)
    assert code == 0 and re.search("^newest ", out, re.M)


def test_without_weights_it_measures_what_tile_chooses(hr_folder, tmp_path, monkeypatch, capsys):
    files = dict(web=weights(tmp_path / "web-low.safetensors"), clean=weights(tmp_path / "clean-low.safetensors", spoil=0.02))
    monkeypatch.setattr(evaluate, "find_weights", lambda: files["web"])
    table = tmp_path / "table.csv"

    def measured(*flags):
        code, _, _ = command(monkeypatch, capsys, "--data", hr_folder, "--csv", table, "--overwrite", *flags)
        assert code == 0
        with open(table, newline="", encoding="utf-8") as file:
            return {(r["picture"], r["method"]): r["psnr_y"] for r in csv.DictReader(file)}
    each = measured("--weights", *files.values())
    assert all(each[name, "web-low"] != each[name, "clean-low"] for name, _ in each)
    names = sorted({name for name, _ in each})
    sharp = next(lr for name, lr, _ in pairs.pairs(hr_folder, "bicubic", 2) if name == names[0])
    monkeypatch.setattr(evaluate, "undamaged", lambda network, plain, rgb: torch.equal(rgb, sharp))
    chosen = measured()
    assert {m for _, m in chosen} == {"bicubic", "lanczos", "web-low or clean-low"}
    for name in names:
        assert chosen[name, "web-low or clean-low"] == each[name, "clean-low" if name == names[0] else "web-low"]


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
    assert re.search(r"^a +20 +9 +29.50 +0.9100 +- +- +30.00 +10 ", said, re.M)      # the last row's, and the best
    assert "31.25" in said and "lr=0.1" in said and "lr=0.2" in said and "seed" not in said
    picture = Image.open(tmp_path / "c.png")
    assert picture.size == (720, 3 * 220)         # PSNR, pix, adv
    pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    assert all((pixels == colour).all(1).any() for colour in ((200, 40, 90), (30, 90, 200)))
    with pytest.raises(SystemExit) as e:
        evaluate.main()
    assert e.value.code == 2 and "exists already" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "compare", str(a), str(b), "--curves", str(tmp_path / "new/d.png")])
    evaluate.main()
    assert capsys.readouterr().out == said.replace("c.png", "new/d.png")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "compare", str(a), str(b), "--csv", str(tmp_path / "t.csv")])
    with pytest.raises(SystemExit) as e:
        evaluate.main()
    assert e.value.code == 2 and "--csv has no effect beside training runs" in capsys.readouterr().err


@pytest.mark.parametrize("text", (None, "step,psnr_y,seconds\n", "step,psnr_y,seconds\n1,x,2\n", "a,b\n1,2\n",
                                  "step,psnr_y,seconds\n1,30,2,4\n", "step,psnr_y,seconds\n1,30," + "2" * 200000))
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


def test_curves_of_large_numbers_and_odd_settings(tmp_path, capsys, monkeypatch):
    (tmp_path / "log.csv").write_text("step,psnr_y,seconds,d\n1,30,2,2e7\n")     # one value: no range to draw in
    (tmp_path / "args.json").write_text("[1]")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), "--curves", str(tmp_path / "c.png")])
    evaluate.main()
    assert "30.00" in capsys.readouterr().out and Image.open(tmp_path / "c.png").size[0] == 720


# ---- blending

def test_blend(tmp_path, monkeypatch, capsys):
    a, b = weights(tmp_path / "a.safetensors", seed=1), weights(tmp_path / "b b.safetensors", seed=2)
    model.save(model.load(a), a, dict(licence="CC0", recipe="bicubic", step=70))
    model.save(model.load(b), b, dict(licence="CC0", recipe="web", step=70))
    for alpha in "0", "0.3", "1":
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "blend", str(a), str(b), "--alpha", alpha, "-o",
                                          str(tmp_path / f"{alpha}.safetensors")])
        evaluate.main()
    one, two, none, some, full = (model.read_weights(tmp_path / f"{name}.safetensors")
                                  for name in ("a", "b b", "0", "0.3", "1"))
    for key, x in one[0].items():
        assert torch.equal(none[0][key], x) and torch.equal(full[0][key], two[0][key])
        expected = (0.7 * x.double() + 0.3 * two[0][key].double()).to(x.dtype) if x.is_floating_point() else x
        assert torch.allclose(some[0][key], expected, atol=1e-7)
    assert none[0].keys() == one[0].keys()
    made_of = some[1]["blend"]
    assert [(m["file"], round(m["share"], 6)) for m in made_of] == [("a.safetensors", 0.7), ("b b.safetensors", 0.3)]
    assert made_of[0]["header"]["scale"] == some[1]["scale"] == 2 and made_of[1]["header"]["step"] == 70
    assert some[1]["licence"] == "CC0" and "step" not in some[1] and "recipe" not in some[1]
    assert "b b" in capsys.readouterr().out
    network = model.load(tmp_path / "0.3.safetensors")
    assert network(torch.rand(1, 3, 8, 8)).shape == (1, 3, 16, 16)


def test_a_blend_takes_a_trained_refiner_along(tmp_path):
    torch.manual_seed(0)
    network = model.HATRefiner.from_preset("tiny")
    model.save(network, tmp_path / "plain.safetensors", {})
    network.out_conv.bias.data += 0.1
    model.save(network, tmp_path / "refined.safetensors", {})
    made = evaluate.blend([tmp_path / "plain.safetensors", tmp_path / "refined.safetensors"], [0, 0.5])
    assert not made[0].refine and made[0.5].refine and made[0.5].out_conv.bias[0].item() == pytest.approx(0.05)


def test_sweep(hr_folder, tmp_path, monkeypatch, capsys):
    (hr_folder / "broken.png").unlink()
    a, b = weights(tmp_path / "a.safetensors", seed=1), weights(tmp_path / "b.safetensors", seed=2)
    network = model.load(b)
    network.hat_model.conv_last.bias.data += 0.05       # b is brighter, and nothing else is known of it
    model.save(network, b, {})
    strip = tmp_path / "strip.png"
    code, out, err = command(monkeypatch, capsys, "blend", a, b, "--sweep", "1,0,0.5", "--data", hr_folder, "-o", strip,
                             "--csv", tmp_path / "t.csv", "--metrics", "psnr_y")
    assert code == 0 and f"strip: {strip}" in out, err
    assert re.findall(r"^alpha \S+", out, re.M) == ["alpha 0", "alpha 0.5", "alpha 1"]
    shown = np.asarray(Image.open(strip)).astype(float)
    side = (shown.shape[1] + 4) // 4 - 4                # three shares and HR
    means = [shown[20:, i * (side + 4):i * (side + 4) + side].mean() for i in range(4)]
    assert means[1] - means[0] > 3 and means[2] - means[1] > 3      # 0.025 of 255, less what is clipped
    code, _, err = command(monkeypatch, capsys, "blend", a, b, "--sweep", "0,1", "--data", hr_folder, "-o", strip)
    assert code == 2 and "exists already" in err


def test_mistakes_in_blending(tmp_path, monkeypatch, capsys):
    a, b = weights(tmp_path / "a.safetensors"), weights(tmp_path / "b.safetensors", scale=3)
    torch.manual_seed(0)
    model.save(model.HATRefiner.from_preset("tiny", depths=(2, 1)), tmp_path / "c.safetensors", {})
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "alien.pth")
    out = tmp_path / "out.safetensors"
    for args, says in (((a, b, "--alpha", "0.5", "-o", out), "network: hat_model.upsample.0.bias is (256,) and (576,)"),
                       ((a, tmp_path / "c.safetensors", "--alpha", "0.5", "-o", out), "a.safetensors only"),
                       ((tmp_path / "alien.pth", a, "--alpha", "0.5", "-o", out), "no HAT"),
                       ((a, tmp_path / "none.safetensors", "--alpha", "0.5", "-o", out), "no weights file"),
                       ((a, a, "--alpha", "1.5", "-o", out), "0 to 1"), ((a, a, "-o", out), "--alpha or --sweep"),
                       ((a, a, "--alpha", "0.5", "--sweep", "0,1", "-o", out), "--alpha or --sweep"),
                       ((a, a, "--sweep", "0,x", "-o", tmp_path / "s.png"), "write it as"),
                       ((a, a, "--sweep", "0", "-o", tmp_path / "s.png"), "two or more"),
                       ((a, a, "--sweep", "0,1", "-o", tmp_path / "s.png"), "--data is missing"),
                       ((a, a, "--alpha", "0.5", "--data", tmp_path, "-o", out), "--data goes with --sweep"),
                       ((a, a, "--alpha", "0.5", "--csv", tmp_path / "t.csv", "-o", out), "--csv goes with --sweep"),
                       ((a, a, "--alpha", "0.5", "-o", tmp_path / "x.png"), "must end in .safetensors"),
                       ((a, a, "--alpha", "0.5", "-o", a), "exists already"),
                       ((a, a, "--alpha", "0.5", "-o", tmp_path / "no" / "x.safetensors"), "cannot write")):
        code, _, err = command(monkeypatch, capsys, "blend", *args)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err, (args, err)
    assert not out.exists()
