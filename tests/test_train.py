import csv
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from model import HATRefiner, load, save

ROOT = Path(__file__).parent.parent


def draw(path, seed, size=(112, 96)):
    """Soft blobs under sharp lines."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    picture = np.array(blobs)
    y, x = np.mgrid[:size[1], :size[0]]
    for _ in range(6):
        a, b, c = rng.normal(size=2).tolist() + [rng.uniform(10, 60)]
        picture[np.abs(a * x + b * y - c) < 1.5] = rng.integers(0, 256, 3)
    Image.fromarray(picture).save(path)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("絵 and spaces")
    for name, seeds in (("train", range(6)), ("val", range(10, 12))):
        (folder / name).mkdir()
        for seed in seeds:
            draw(folder / name / f"壁紙 {seed}.png", seed)
    return folder


def flags(drawings, out, **more):
    known = dict(stage=1, preset="tiny", patch=16, batch=2, steps=12, every=3, workers=0, amp="off", device="cpu",
                 data=drawings / "train", val=drawings / "val", out=out) | more
    return [s for k, v in known.items() for s in ([f"--{k.replace('_', '-')}"] if v is True else
                                                  [f"--{k.replace('_', '-')}", str(v)])]


def start(args, cwd, **how):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, ROOT / "train.py", *args], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=env, **how)


def run_here(monkeypatch, capsys, cwd, args):
    """train.py's main() in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    code = 0
    try:
        train.main()
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    return code, said.out, said.err


def rows(out):
    path = Path(out) / "log.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def same_run(a, b):
    """Weights, averaged weights and the optimiser's state, to the bit."""
    one, two = (torch.load(p / "state.pt", weights_only=True) for p in (a, b))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    for k, moments in one["optimiser"]["state"].items():
        assert all(torch.equal(v, two["optimiser"]["state"][k][n]) for n, v in moments.items())
    assert (a / "last.safetensors").read_bytes() == (b / "last.safetensors").read_bytes()
    assert [(r["step"], r["pix"], r["psnr_y"]) for r in rows(a)] == [(r["step"], r["pix"], r["psnr_y"]) for r in rows(b)]


@pytest.fixture(scope="module")
def whole(drawings, tmp_path_factory):
    """A run nobody disturbed."""
    cwd = tmp_path_factory.mktemp("whole")
    p = start(flags(drawings, cwd / "run"), cwd)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    return cwd, cwd / "run", out


def test_the_run_folder(whole):
    cwd, run, out = whole
    assert {p.name for p in run.iterdir()} == {"args.json", "log.csv", "curves.png", "samples", "last.safetensors",
                                               "best.safetensors", "state.pt"}
    assert [r["step"] for r in rows(run)] == ["3", "6", "9", "12"]
    assert set(rows(run)[0]) >= {"step", "pix", "pix_grad", "lr", "patches_per_s", "psnr_y", "ssim_y"}
    assert all(float(r["pix_grad"]) > 0 for r in rows(run))
    strip = Image.open(run / "samples" / "step_000012.png")
    assert strip.size == (3 * 112, 2 * 100)
    assert Image.open(run / "curves.png").size[0] > 300
    header = load(run / "last.safetensors").header
    assert (header["preset"], header["scale"], header["stage"], header["step"], header["recipe"]) == (
        "tiny", 2, 1, 12, "bicubic")


def test_the_commands_it_names_run_as_printed(whole):
    cwd, run, out = whole
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  python ")]
    assert [c[1] for c in commands] == ["tile.py", "evaluate.py"]
    for c in commands:
        done = subprocess.run([sys.executable, ROOT / c[1], *c[2:]], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (cwd / "upscaled").iterdir()) == ["壁紙 10.png", "壁紙 11.png"]
    assert Image.open(cwd / "upscaled" / "壁紙 10.png").size == (224, 192)
    assert "bicubic" in done.stdout


def test_it_learns(drawings, tmp_path, monkeypatch, capsys):
    args = flags(drawings, tmp_path / "run", init="plain", steps=80, every=20, batch=4)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    psnr = [float(r["psnr_y"]) for r in rows(tmp_path / "run")]
    assert code == 0 and psnr == sorted(psnr) and psnr[-1] > psnr[0] + 5, psnr


def test_stage_1_is_plain_hat(whole):
    net = load(whole[1] / "last.safetensors")
    fresh = HATRefiner.from_preset("tiny")
    assert not net.refine and net.out_conv.weight.abs().max() == 0
    assert not torch.equal(net.hat_model.conv_first.weight, fresh.hat_model.conv_first.weight)


@pytest.mark.parametrize("trial", range(2))
def test_killed_and_resumed_is_the_same_to_the_bit(whole, drawings, tmp_path, trial):
    """SIGKILL at any moment after the first report, then the same command again. Longer steps than the whole run's are
    not needed: the kill may fall into a step, a validation or a save."""
    args, run = flags(drawings, tmp_path / "run"), tmp_path / "run"
    p = start(args, tmp_path)
    while not rows(run) and p.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    p.kill()
    p.communicate()
    p = start(args, tmp_path)
    assert p.wait(120) == 0, p.stderr.read()
    same_run(run, whole[1])
    assert not list(run.glob(".*.tmp"))


def test_ctrl_c_keeps_the_step_and_goes_on(whole, drawings, tmp_path):
    args, run = flags(drawings, tmp_path / "run", workers=1), tmp_path / "run"
    p = start(args, tmp_path)
    while not rows(run) and p.poll() is None:
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    if p.returncode:      # it may have been done already
        assert p.returncode == 130 and "goes on from there" in err and "Traceback" not in err
        kept = torch.load(run / "state.pt", weights_only=True)["step"]
        assert f"stopped at step {kept}" in err
    p = start(args, tmp_path)
    assert p.wait(120) == 0
    same_run(run, whole[1])


def test_a_finished_run_says_so_again(whole, drawings, monkeypatch, capsys):
    cwd, run, out = whole
    before = (run / "state.pt").read_bytes()
    code, again, err = run_here(monkeypatch, capsys, cwd, flags(drawings, run))
    assert code == 0 and again.splitlines()[-3:] == out.splitlines()[-3:] and (run / "state.pt").read_bytes() == before


def test_other_settings_are_refused_and_overwrite_starts_anew(whole, drawings, tmp_path, monkeypatch, capsys):
    args = flags(drawings, tmp_path / "run", steps=2, every=1)
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    args = flags(drawings, tmp_path / "run", steps=3, every=1)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 2 and "--steps 2" in err and err.count("\n") == 1
    assert run_here(monkeypatch, capsys, tmp_path, [*args, "--overwrite"])[0] == 0
    assert [r["step"] for r in rows(tmp_path / "run")] == ["1", "2", "3"]


def test_stages_2_and_3(whole, drawings, tmp_path, monkeypatch, capsys):
    """Stage 2 moves HAT and refiner; stage 3 leaves every byte of HAT as it is and moves the refiner."""
    more = dict(patch=48, tile_size=16, tile_pad=8, steps=3, every=3, lr=1e-3)
    weights, files = whole[1] / "last.safetensors", [load_file(whole[1] / "last.safetensors")]
    for stage in (2, 3):
        args = flags(drawings, tmp_path / f"s{stage}", stage=stage, weights=weights, **more)
        code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
        assert code == 0, err
        weights = tmp_path / f"s{stage}" / "last.safetensors"
        files.append(load_file(weights))

    def moved(a, b, part):
        return any(not torch.equal(a[k], b[k]) for k in a if k.startswith(part))
    one, two, three = files
    assert moved(one, two, "hat_model.conv_first") and moved(one, two, "out_conv")
    assert not moved(two, three, "hat_model") and moved(two, three, "out_conv") and moved(two, three, "residual_block")


def test_weights_start_a_run(whole, drawings, tmp_path, monkeypatch, capsys):
    args = flags(drawings, tmp_path / "run", steps=1, every=1, lr=1e-12, weights=whole[1] / "last.safetensors")
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    a, b = load_file(whole[1] / "last.safetensors"), load_file(tmp_path / "run" / "last.safetensors")
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-6) for k in a)


def test_a_gradient_that_is_never_finite_ends_the_run(drawings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Charbonnier, "forward", lambda self, sr, hr: (sr * float("nan")).mean())
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", steps=20, every=20))
    assert code == 2 and "not finite" in err and not (tmp_path / "run" / "last.safetensors").exists()


def test_full_disk_while_saving(whole, drawings, tmp_path):
    """A file may not grow past a limit, as on a full disk: one line, nothing half-written; with room again the same
    command ends as if nothing had happened."""
    args, run = flags(drawings, tmp_path / "run"), tmp_path / "run"
    assert start(flags(drawings, tmp_path / "packed", steps=1), tmp_path).wait(120) == 0      # so the patches are there
    limit = (whole[1] / "last.safetensors").stat().st_size + 1000      # the weights fit, the state does not
    p = start(args, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    out, err = p.communicate(timeout=120)
    assert p.returncode == 2 and err.count("\n") == 1 and str(run) in err and "Traceback" not in err
    assert not list(run.glob(".*.tmp")) and not (run / "state.pt").exists()
    load(run / "last.safetensors")
    assert start(args, tmp_path).wait(120) == 0
    same_run(run, whole[1])


# ----------------------------------------------------------------------------------------------------------------------
# mistakes


def mistake(kind, drawings, tmp_path, whole):
    """(flags, words of the error)."""
    run, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    if kind == "no such folder":
        return flags(drawings, run, data=tmp_path / "nowhere"), "nowhere"
    if kind == "no picture":
        return flags(drawings, run, data=empty), "no picture"
    if kind == "only a text file named .jpg":
        (empty / "a.jpg").write_text("hello")
        return flags(drawings, run, data=empty), "none of 1 pictures is usable"
    if kind == "only pictures smaller than the patch":
        draw(empty / "small.png", 1, (30, 30))
        return flags(drawings, run, data=empty), "side below 32"
    if kind == "no validation picture":
        return flags(drawings, run, val=empty), "no usable picture in"
    if kind == "patch off the window":
        return flags(drawings, run, patch=18), "multiple of its window, 4"
    if kind == "patch below the window":
        return flags(drawings, run, patch=2), "multiple of its window, 4"
    if kind == "tile off the window":
        return flags(drawings, run, stage=2, tile_size=10, weights=whole[1] / "last.safetensors"), "--tile-size 10"
    if kind == "unknown recipe":
        return flags(drawings, run, recipe="nonsense"), "no recipe 'nonsense'"
    if kind == "data without val":
        args = flags(drawings, run)
        i = args.index("--val")
        return args[:i] + args[i + 2:], "--val"
    if kind == "stage 2 from nothing":
        return flags(drawings, run, stage=2), "--weights"
    if kind == "no such weights":
        return flags(drawings, run, weights=tmp_path / "gone.safetensors"), "gone.safetensors"
    if kind == "weights of another preset":
        save(HATRefiner.from_preset("low"), tmp_path / "low.safetensors")
        return flags(drawings, run, weights=tmp_path / "low.safetensors"), "it is low 2x"
    if kind == "weights of another scale":
        save(HATRefiner.from_preset("tiny", 3), tmp_path / "x3.safetensors")
        return flags(drawings, run, weights=tmp_path / "x3.safetensors"), "it is tiny 3x"
    if kind == "weights cut short":
        (tmp_path / "cut.safetensors").write_bytes((whole[1] / "last.safetensors").read_bytes()[:5000])
        return flags(drawings, run, weights=tmp_path / "cut.safetensors"), "cut short"
    if kind == "state cut short":
        run.mkdir()
        (run / "state.pt").write_bytes((whole[1] / "state.pt").read_bytes()[:5000])
        return flags(drawings, run), "state.pt cannot be read"
    if kind == "run folder is a file":
        run.write_text("")
        return flags(drawings, run), "run"
    if kind == "run folder cannot be made":
        return flags(drawings, "/proc/run"), "/proc/run"
    if kind == "no steps":
        return flags(drawings, run, steps=0), "--steps"


@pytest.mark.parametrize("kind", (
    "no such folder", "no picture", "only a text file named .jpg", "only pictures smaller than the patch",
    "no validation picture", "patch off the window", "patch below the window", "tile off the window", "unknown recipe",
    "data without val", "stage 2 from nothing", "no such weights", "weights of another preset", "weights of another scale",
    "weights cut short", "state cut short", "run folder is a file", "run folder cannot be made", "no steps"))
def test_a_mistake_is_one_line(kind, drawings, tmp_path, whole, monkeypatch, capsys):
    args, words = mistake(kind, drawings, tmp_path, whole)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    errors = [line for line in err.splitlines() if not line.startswith("skipped")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], err


def test_bad_pictures_are_named_and_skipped(drawings, tmp_path, monkeypatch, capsys):
    (tmp_path / "pictures").mkdir()
    draw(tmp_path / "pictures" / "good.png", 1)
    draw(tmp_path / "pictures" / "small.png", 1, (20, 90))
    (tmp_path / "pictures" / "text.jpg").write_text("hello")
    png = (drawings / "train" / "壁紙 1.png").read_bytes()
    (tmp_path / "pictures" / "cut.png").write_bytes(png[:len(png) // 2])
    args = flags(drawings, tmp_path / "run", data=tmp_path / "pictures", steps=1, every=1)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and all(name in out + err for name in ("small.png", "text.jpg", "cut.png"))
    assert "2 unreadable and 1 small" in out + err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse(["--help"])
    assert e.value.code == 0 and "example: python train.py" in capsys.readouterr().out


def test_args_json_holds_every_flag(whole):
    assert set(json.loads((whole[1] / "args.json").read_text())) >= {"stage", "patch", "lr", "steps", "batch", "seed", "recipe"}
