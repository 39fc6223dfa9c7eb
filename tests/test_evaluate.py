"""evaluate.py: the table, the files and the page against values computed here; mistakes of the user."""
import csv
import errno
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import choose
import degrade
import evaluate
import images
import metrics
import model
import pairs
import tile


def smooth(h, w, seed=0):
    """A soft random picture (3, h, w) of 8-bit levels."""
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(1, 3, h // 6 + 2, w // 6 + 2, generator=g), (h, w), mode="bicubic")[0]
    return round_to_8_bits(x)


def noisy(x, amount, seed=1):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return round_to_8_bits(x + amount * noise)


def round_to_8_bits(x):
    return x.clamp(0, 1).mul(255).round() / 255


def save(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)


@pytest.fixture
def hr_folder(tmp_path):
    folder = tmp_path / "hr"
    save(folder / "a.png", smooth(41, 36, 1))
    save(folder / "b c" / "空.png", smooth(40, 50, 2))
    save(folder / "see through.png", torch.cat([smooth(32, 32, 3), smooth(32, 32, 4)[:1]]))
    return folder


def add_broken(folder):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])


def weights(path, scale=2, seed=0, spoil=None):
    """Save a tiny untrained model and return its path. spoil: a value for some weights of its last layer."""
    torch.manual_seed(seed)
    network = model.HATRefiner.from_preset("tiny", scale=scale)
    if spoil is not None:
        network.hat_model.conv_last.weight.data[0] = spoil
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(network, path, {})
    return path


def command(monkeypatch, capsys, *args):
    """Run the command in this process, on the CPU in fp32. Returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args), "--device", "cpu", "--amp", "off"])
    code = 0
    try:
        evaluate.main()
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_pairs(hr, recipe):
    """[(name, lr, hr)] at 2x."""
    jobs, _ = pairs.match_pairs({"HR": hr})
    return [pair[:3] for pair in pairs.read_pairs(jobs, 2, recipe)]


# ----------------------------------------------------------------------------------------------------
# values


def test_table_and_csv_match_values_computed_here(hr_folder, tmp_path, monkeypatch, capsys):
    expected = read_pairs(hr_folder, "web")
    add_broken(hr_folder)
    files = (weights(tmp_path / "one.safetensors"),
             weights(tmp_path / "runs" / "mine" / "best.safetensors", seed=1))
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--recipe", "web", "--weights", *files,
                             "--csv", tmp_path / "t.csv")
    assert code == 0 and "broken.png" in err and "3 pictures (1 skipped), recipe web, 2x, border 2" in out
    rows = {(row["picture"], row["method"]): row for row in read_csv(tmp_path / "t.csv")}
    assert len(rows) == 3 * 4 and {m for _, m in rows} == {"bicubic", "lanczos", "one", "mine"}
    sums = {}
    for name, lr, hr in expected:
        made = {"bicubic": degrade.resize(lr, hr.shape[-2:]), "lanczos": degrade.resize(lr, hr.shape[-2:], "lanczos")}
        for label, path in zip(("one", "mine"), files):
            with torch.no_grad():
                made[label] = model.load(path)(lr[None])[0]
        for method, sr in made.items():
            row = rows[name, method]
            assert float(row["edge_psnr"]) == pytest.approx(metrics.edge_psnr(sr, hr, 2), abs=5e-3)
            assert float(row["faithfulness"]) == pytest.approx(metrics.faithfulness(sr, lr, 2), abs=5e-3)
            assert float(row["seconds"]) > 0
            psnr, ssim = metrics.psnr(sr, hr, 2), metrics.ssim(sr, hr, 2)
            assert float(row["psnr_y"]) == pytest.approx(psnr, abs=2e-3)
            assert float(row["ssim_y"]) == pytest.approx(ssim, abs=1e-4)
            sums.setdefault(method, []).append((psnr, ssim))
    for method, values in sums.items():
        shown = re.search(rf"^{method} +(\S+) +(\S+)", out, re.M).groups()
        psnr, ssim = np.mean(values, 0)
        assert float(shown[0]) == pytest.approx(psnr, abs=0.008)
        assert float(shown[1]) == pytest.approx(ssim, abs=2e-4)


def test_a_method_without_values():
    rows = [{method: {"niqe": niqe} for method, niqe in zip("ab", (2.0001, float("nan")))}]
    lines = evaluate.format_table(rows, [evaluate.Column("niqe", "NIQE", "lower", 3)])
    assert [line.split() for line in lines] == [["NIQE"], ["a", "2.000"], ["b", "-"]]


def test_results_of_others_beside_a_model(hr_folder, tmp_path, monkeypatch, capsys):
    theirs = tmp_path / "their\nresults"
    given = {"a.png": noisy(smooth(41, 36, 1), 0.02), "b c/空.png": noisy(smooth(40, 50, 2), 0.04)}
    for name, x in given.items():
        save(theirs / name.replace(".png", ".bmp"), x)
    code, out, err = command(
        monkeypatch, capsys, "--data", hr_folder, "--recipe", "web", "--sr", f"other={theirs}",
        "--weights", weights(tmp_path / "one.safetensors"), "--csv", tmp_path / "t.csv",
        "--metrics", "psnr_rgb,highlights,seconds")
    assert code == 0 and "2 pictures, recipe web, 2x, border 2" in out and "see through" in out, err
    rows = {(row["picture"], row["method"]): row for row in read_csv(tmp_path / "t.csv")}
    assert len(rows) == 2 * 4
    references = {name: hr for name, _, hr in read_pairs(hr_folder, "web")}
    for name, x in given.items():
        row, hr = rows[name, "other"], references[name]
        expected = metrics.psnr(x[:, :hr.shape[-2], :hr.shape[-1]], hr, 2, luma=False)
        assert float(row["psnr_rgb"]) == pytest.approx(expected, abs=2e-3)
        assert row["seconds"] == "" and float(rows[name, "one"]["seconds"]) > 0
    assert re.search(r"^other +[\d.]+ +\S+ +-$", out, re.M)


def test_results_of_another_size_are_skipped(hr_folder, tmp_path, monkeypatch, capsys):
    save(tmp_path / "sr" / "a.png", smooth(41, 36, 1))
    save(tmp_path / "sr" / "b c" / "空.png", smooth(38, 50, 2))
    save(tmp_path / "sr" / "see through.png", smooth(32, 32, 3))
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--sr", f"x={tmp_path / 'sr'}",
                             "--metrics", "psnr_y", "--csv", tmp_path / "t.csv")
    assert code == 0 and "2 pictures (1 skipped), no LR" in out and "空.png" in err
    rows = {row["picture"]: row for row in read_csv(tmp_path / "t.csv")}
    assert float(rows["a.png"]["psnr_y"]) == float("inf")


def test_without_hr_pictures(hr_folder, tmp_path, monkeypatch, capsys):
    lr_folder = tmp_path / "lr"
    for name, lr, _ in read_pairs(hr_folder, "web"):
        save(lr_folder / name, lr)
    code, out, err = command(monkeypatch, capsys, "--lr-dir", lr_folder, "--weights",
                             weights(tmp_path / "one.safetensors"), "--csv", tmp_path / "t.csv",
                             "--metrics", "blocking,faithfulness,seconds")
    assert code == 0 and ", 2x, no HR, border 2\n" in out, err
    rows = read_csv(tmp_path / "t.csv")
    assert list(rows[0])[2:] == ["blocking", "faithfulness", "seconds"]
    assert [row["method"] for row in rows[:3]] == ["bicubic", "lanczos", "one"] and len(rows) == 9
    code, out, err = command(monkeypatch, capsys, "--sr", f"one={lr_folder}", "--metrics", "blocking")
    assert code == 0 and "3 pictures, no LR, 2x, no HR" in out, err
    assert re.search(r"^one +\d\.\d+$", out, re.M) and "bicubic" not in out


def test_page(hr_folder, tmp_path, monkeypatch, capsys):
    seen, add = [], evaluate.Report.add

    def spy(self, *args):
        seen.append(args)
        add(self, *args)
    monkeypatch.setattr(evaluate.Report, "add", spy)
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--weights",
                             weights(tmp_path / "one.safetensors"), "--report", tmp_path / "page")
    assert code == 0 and f"page: {tmp_path / 'page' / 'index.html'}" in out, err
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "空.png" in html and "PSNR-Y" in html
    name, pictures, values, reference = seen[0]
    assert name == "a.png" and list(pictures) == ["bicubic", "lanczos", "one", "HR"] and reference == "HR"
    assert list(values) == ["bicubic", "lanczos", "one"]
    hr = read_pairs(hr_folder / "a.png", "bicubic")[0][2]
    assert (pictures["HR"] == (hr * 255).round().byte().permute(1, 2, 0).numpy()).all()


def test_every_metric_of_the_table_runs(hr_folder, tmp_path, monkeypatch, capsys):
    save(tmp_path / "large" / "a.png", smooth(200, 240))
    names = [name for name in metrics.METRICS if name != "feat"]       # feat needs optional packages
    code, out, err = command(monkeypatch, capsys, "--data", tmp_path / "large", "--recipe", "bicubic", "--weights",
                             weights(tmp_path / "one.safetensors"), "--metrics", ",".join(names))
    assert code == 0 and not err and re.search("^one ", out, re.M), err


def test_lr_folder_border_limit_and_tiles(hr_folder, tmp_path, monkeypatch, capsys):
    for name, lr, _ in read_pairs(hr_folder, "bicubic"):
        save(tmp_path / "lr" / name, lr)
    file, psnrs = weights(tmp_path / "one.safetensors"), {}
    for flags in ((), ("--tile-size", "16"), ("--border", "5"), ("--limit", "2")):
        code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--lr-dir", tmp_path / "lr", "--weights",
                                 file, *flags, "--csv", tmp_path / "t.csv", "--overwrite")
        assert code == 0, err
        assert f"border {5 if '--border' in flags else 2}" in out
        psnrs[flags] = [float(row["psnr_y"]) for row in read_csv(tmp_path / "t.csv") if row["method"] == "one"]
    whole, tiled, border, limit = psnrs.values()
    assert len(whole) == 3 and limit == whole[:2] and border != whole and tiled == pytest.approx(whole, abs=0.1)


def test_large_pictures_run_in_tiles(hr_folder, tmp_path, monkeypatch, capsys):
    seen, real = [], tile.upscale

    def spy(forward, rgb, scale, tiler, *args):
        seen.append((rgb.shape[-2] * rgb.shape[-1], tiler.count(*rgb.shape[-2:])))
        return real(forward, rgb, scale, tiler, *args)
    monkeypatch.setattr(tile, "upscale", spy)
    monkeypatch.setattr(evaluate, "TILE_PIXELS", 400)
    monkeypatch.setattr(tile, "TILE_SIZE", 384)
    save(hr_folder / "wide.png", smooth(32, 2000))
    args = "--data", hr_folder, "--weights", weights(tmp_path / "one.safetensors")
    assert command(monkeypatch, capsys, *args)[0] == 0
    assert max(seen) == (16 * 1000, 3) and (16 * 16, 1) in seen


# ----------------------------------------------------------------------------------------------------
# the default models


def test_missing_default_weights(hr_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choose, "SHIPPED", [tmp_path / "absent.safetensors"])
    code, _, err = command(monkeypatch, capsys, "--data", hr_folder)
    assert code == 2 and err.startswith("error: ") and "absent.safetensors" in err


def test_default_weights_are_those_of_tile(hr_folder, tmp_path, monkeypatch, capsys):
    web, clean = weights(tmp_path / "web-low.safetensors"), weights(tmp_path / "clean-low.safetensors")
    monkeypatch.setattr(choose, "SHIPPED", [web, clean])
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder)
    assert code == 0 and re.search("^web-low .*\nclean-low ", out, re.M), err


# ----------------------------------------------------------------------------------------------------
# mistakes and failures


def test_a_picture_too_small_for_a_metric_is_skipped(hr_folder, tmp_path, monkeypatch, capsys):
    save(hr_folder / "small.png", smooth(12, 30))
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--weights", weights(tmp_path / "w.safetensors"))
    assert code == 0 and "3 pictures (1 skipped)" in out and "small.png" in err


def test_mistakes_of_the_user_are_one_line(hr_folder, tmp_path, monkeypatch, capsys):
    file, bad = weights(tmp_path / "w.safetensors"), weights(tmp_path / "bad.safetensors", spoil=float("nan"))
    scale_3, cut = weights(tmp_path / "x3.safetensors", scale=3), tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.csv").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "page.html").write_text("mine")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    data, use = ("--data", hr_folder), ("--weights", file)
    assert command(monkeypatch, capsys, *data, "--sr", hr_folder)[0] == 2
    for args, says in (((), "--data"),
                       ((*data, "--weights", file, scale_3), "[2, 3]"),
                       ((*data, *use, "--scale", 3), "[2, 3]"),
                       ((*data, "--weights", cut), "cut.safetensors"),
                       ((*data, "--weights", tmp_path / "none.safetensors"), "none.safetensors"),
                       ((*data, "--weights", bad), "no picture"),
                       ((*data, *use, "--recipe", "wep"), "wep"),
                       ((*data, *use, "--recipe", "web", "--lr-dir", hr_folder), "--lr-dir"),
                       ((*data, *use, "--tile-size", 7), "7"),
                       ((*data, *use, "--lr-dir", tmp_path / "empty"), "empty"),
                       ((*data, *use, "--metrics", "psnr_y,psnr"), "psnr_y, ssim_y"),
                       ((*data, *use, "--report", tmp_path / "full"), "full"),
                       ((*data, *use, "--csv", tmp_path / "file.csv"), "file.csv"),
                       ((*data, *use, "--csv", tmp_path / "file.csv" / "t.csv"), "t.csv"),
                       ((*data, "--sr", f"a={hr_folder}", "--sr", f"a={hr_folder}"), "same name"),
                       ((*data, "--sr", f"HR={hr_folder}"), "same name"),
                       ((*data, "--sr", f"a={tmp_path / 'empty'}"), "empty"),
                       ((*data, "--sr", f"a={hr_folder}", "--metrics", "seconds"), "seconds"),
                       ((*data, *use, "--metrics", "feat"), "feat"),
                       (("--data", tmp_path / "none"), "none"),
                       (("--sr", f"a={hr_folder}", *use), "--lr-dir"),
                       (("--sr", f"a={hr_folder}", "--recipe", "web"), "--data")):
        code, out, err = command(monkeypatch, capsys, *args)
        last = err.splitlines()[-1]
        assert code == 2 and last.startswith("error: ") and says in last, (args, err)
    assert (tmp_path / "file.csv").read_text() == "mine"


def test_a_mistake_in_the_code_shows_its_traceback(hr_folder, tmp_path, monkeypatch, capsys):
    def wrong(*args):
        raise TypeError("a mistake")
    monkeypatch.setitem(evaluate.COLUMNS, "psnr_y", evaluate.COLUMNS["psnr_y"]._replace(run=wrong))
    with pytest.raises(TypeError, match="a mistake"):
        command(monkeypatch, capsys, "--data", hr_folder, "--weights", weights(tmp_path / "w.safetensors"))


def test_a_picture_that_a_model_cannot_process_is_skipped(hr_folder, tmp_path, monkeypatch, capsys):
    real, calls = tile.upscale, []

    def not_finite(*args):
        calls.append(args)
        if len(calls) == 2:
            raise FloatingPointError("NaN")
        return real(*args)
    monkeypatch.setattr(tile, "upscale", not_finite)
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--metrics", "psnr_y", "--weights",
                             weights(tmp_path / "w.safetensors"), "--csv", tmp_path / "t.csv")
    assert code == 0 and "空.png: w: NaN" in err and out.startswith("2 pictures (1 skipped)")
    assert {row["picture"] for row in read_csv(tmp_path / "t.csv")} == {"a.png", "see through.png"}


def test_an_interrupted_page_has_the_pictures_before(hr_folder, tmp_path, monkeypatch, capsys):
    real, calls = tile.upscale, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(tile, "upscale", interrupted)
    code, _, err = command(monkeypatch, capsys, "--data", hr_folder, "--metrics", "psnr_y", "--weights",
                           weights(tmp_path / "w.safetensors"), "--csv", tmp_path / "t.csv", "--report", tmp_path / "page")
    assert code == 2 and err.endswith("error: interrupted\n")
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert not (tmp_path / "t.csv").exists()
    assert "a.png" in html and "空" not in html


def test_a_full_disk_leaves_no_half_table(hr_folder, tmp_path, monkeypatch, capsys):
    file = weights(tmp_path / "w.safetensors")

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(images.os, "replace", full_disk)
    (tmp_path / "tables").mkdir()
    code, out, err = command(monkeypatch, capsys, "--data", hr_folder, "--weights", file,
                             "--csv", tmp_path / "tables" / "t.csv")
    assert code == 2 and "t.csv: No space left on device" in err.splitlines()[-1] and "bicubic" in out
    assert not list((tmp_path / "tables").iterdir())
