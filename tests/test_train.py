import csv
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes started here have: runs are compared to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def test_killed_and_resumed_is_the_same_to_the_bit(whole, drawings, tmp_path, monkeypatch, capsys, trial):
    """SIGKILL at any moment after the first report, then the same command again. Longer steps than the whole run's are
    not needed: the kill may fall into a step, a validation or a save."""
    args, run = flags(drawings, tmp_path / "run"), tmp_path / "run"
    p = start(args, tmp_path)
    while not rows(run) and p.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    p.kill()
    p.communicate()
    (run / ".log.csv.1.tmp").write_text("a save may have been killed, too")
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0, err
    same_run(run, whole[1])
    assert not list(run.glob(".*.tmp"))


def test_ctrl_c_keeps_the_step_and_goes_on(whole, drawings, tmp_path, monkeypatch, capsys):
    args, run = flags(drawings, tmp_path / "run", workers=1), tmp_path / "run"
    p = start(args, tmp_path)
    while not rows(run) and p.poll() is None:
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    if p.returncode:      # it may have been done already
        assert p.returncode == 130 and "goes on from there" in err and "Traceback" not in err
        kept = torch.load(run / "state.pt", weights_only=True)["now"]["step"]
        assert f"stopped at step {kept}" in err
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    same_run(run, whole[1])


def test_a_finished_run_says_so_again(whole, drawings, monkeypatch, capsys):
    cwd, run, out = whole
    before = (run / "state.pt").read_bytes()
    code, again, err = run_here(monkeypatch, capsys, cwd, flags(drawings, run))
    assert code == 0 and again.splitlines()[-3:] == out.splitlines()[-3:] and (run / "state.pt").read_bytes() == before


def test_other_settings_are_refused_and_overwrite_starts_anew(whole, drawings, tmp_path, monkeypatch, capsys):
    args = flags(drawings, tmp_path / "run", steps=4, every=2, keep=3)
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    args = flags(drawings, tmp_path / "run", steps=3, every=1, keep=2)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 2 and "--steps 4" in err and err.count("\n") == 1
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", steps=4, every=2, keep=3, conv_lr=0.5))
    assert code == 2 and "--conv-lr 0.3" in err
    assert run_here(monkeypatch, capsys, tmp_path, [*args, "--overwrite"])[0] == 0
    assert [r["step"] for r in rows(tmp_path / "run")] == ["1", "2", "3"]
    # of the old run nothing stays, whose step 4 would count as the newest
    assert sorted(p.name for p in (tmp_path / "run").glob("step_*")) == ["step_000002.safetensors", "step_000003.safetensors"]
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == [f"step_00000{k}.png" for k in (1, 2, 3)]


def test_a_run_may_start_anew_from_its_own_weights(whole, drawings, tmp_path, monkeypatch, capsys):
    """The old ones were gone before they were read; and a mistake cost the old run, too."""
    out = tmp_path / "run"
    shutil.copytree(whole[0] / "run", out)
    best, old = (out / "best.safetensors").read_bytes(), sorted(p.name for p in out.iterdir())
    args = [*flags(drawings, out, weights=out / "best.safetensors"), "--overwrite"]
    for wrong in ["--train", "hat_modle"], ["--val", "nowhere"], ["--weights", "none"]:
        assert run_here(monkeypatch, capsys, tmp_path, [*args, *wrong])[0] == 2
        assert sorted(p.name for p in out.iterdir()) == old and (out / "best.safetensors").read_bytes() == best
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    assert len(rows(out)) == 4 and (out / "best.safetensors").read_bytes() != best


def test_a_mistake_at_the_start_does_not_bind(drawings, tmp_path, monkeypatch, capsys):
    """And without --overwrite nothing goes that was in the folder."""
    args = flags(drawings, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.safetensors").write_text("somebody's")
    assert run_here(monkeypatch, capsys, tmp_path, [*args, "--train", "hat_modle"])[0] == 2
    code, _, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and (tmp_path / "run" / "mine.safetensors").read_text() == "somebody's", err


def test_how_to_go_on_after_overwrite(drawings, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "rate", stop)
    for more, words in ([], "the same command goes on"), (["--overwrite"], "the same command, without --overwrite, goes on"):
        code, _, err = run_here(monkeypatch, capsys, tmp_path, [*flags(drawings, tmp_path / "run"), *more])
        assert code == 130 and words in err


def test_val_inside_data_is_not_trained_on(drawings, tmp_path, monkeypatch, capsys):
    inside = tmp_path / "all"
    shutil.copytree(drawings / "train", inside)
    shutil.copytree(drawings / "val", inside / "held")
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", data=inside, val=inside / "held"))
    assert code == 0 and "of --val lie in --data too" in out, err
    packed, = (tmp_path / "patches").glob("all-*.safetensors")
    names = str(train.data.read_header(packed))
    assert "held" not in names and run_here(monkeypatch, capsys, tmp_path, flags(
        drawings, tmp_path / "run", data=inside, val=inside / "held"))[0] == 0      # goes on


@pytest.mark.parametrize("spelled", ("otherwise", "through links"))
def test_val_inside_data_under_another_name(drawings, tmp_path, monkeypatch, capsys, spelled):
    """It was found there, but trained on: names were compared as they were typed, and links as what they lead to."""
    inside = tmp_path / "all"
    for name in ("train", "val"):
        (inside / name).mkdir(parents=True)
        for picture in (drawings / name).iterdir():
            if spelled == "otherwise":
                shutil.copy(picture, inside / name)
            else:
                (inside / name / picture.name).symlink_to(picture)
    where = dict(data=inside, val=inside / "val") if spelled == "through links" else dict(data="all", val=inside / "val")
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", **where))
    assert code == 0 and "2 pictures of --val lie in --data too" in out, err
    packed, = (tmp_path / "patches").glob("all-*.safetensors")
    names = train.data.read_tensor(packed, "names").tobytes().decode().split()
    assert names and not [n for n in names if "val" in n]


def test_a_folder_with_weights_but_no_state_is_not_written_over(whole, drawings, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole[0] / "run", out)
    (out / "state.pt").unlink()         # the largest, so it is deleted first
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    code, _, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, out))
    assert code == 2 and "no state.pt to go on from" in err and err.count("\n") == 1
    assert before == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert run_here(monkeypatch, capsys, tmp_path, [*flags(drawings, out, lr=0.01), "--overwrite"])[0] == 0


@pytest.mark.parametrize("flag, value", (("ema", "nan"), ("ema", 5), ("conv_lr", "nan"), ("conv_lr", -1), ("lr", "inf"), ("r1", -1),
                                         ("sharpen_until", 5), ("seed", 99999999999999999999)))
def test_figures_that_make_no_sense(drawings, tmp_path, monkeypatch, capsys, flag, value):
    code, _, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", **{flag: value}))
    assert code == 2 and f"--{flag.replace('_', '-')}" in err and err.count("\n") <= 2 and not (tmp_path / "patches").exists()


def test_settings_that_cannot_be_read(whole, drawings, tmp_path, monkeypatch, capsys):
    for content in (b"", b"[]x", b"[1]", b"null"):
        shutil.copytree(whole[0] / "run", tmp_path / "run", dirs_exist_ok=True)
        (tmp_path / "run/args.json").write_bytes(content)
        code, _, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run"))
        assert code == 2 and "args.json" in err and err.count("\n") == 1


def test_a_blank_validation_picture_is_left_out(drawings, tmp_path, monkeypatch, capsys):
    """Bicubic meets it exactly: one infinite PSNR hid all others."""
    shutil.copytree(drawings / "val", tmp_path / "val")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "val" / "blank.png")
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", val=tmp_path / "val"))
    assert code == 0 and "blank.png" in err and "inf" not in out
    assert float(rows(tmp_path / "run")[-1]["psnr_y"]) < 60


def test_drop_path_resumes_to_the_bit(drawings, tmp_path, monkeypatch, capsys):
    """A new loader draws a seed: from the generator that draws drop-path's masks, if it is not given one."""
    args = dict(drop_path=0.5, steps=4, every=2)
    assert run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "once", **args))[0] == 0
    reports, log = [], train.write_log

    def killed(*a):
        reports.append(1)
        if len(reports) == 2:
            raise KeyboardInterrupt
        log(*a)
    with monkeypatch.context() as m:
        m.setattr(train, "write_log", killed)
        assert run_here(m, capsys, tmp_path, flags(drawings, tmp_path / "twice", **args))[0] == 130
    assert run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "twice", **args))[0] == 0
    assert (tmp_path / "once/last.safetensors").read_bytes() == (tmp_path / "twice/last.safetensors").read_bytes()


def test_a_preset_keeps_its_name(drawings, tmp_path, monkeypatch, capsys):
    """hat and high are of one size; what was trained as hat has to be found as hat."""
    monkeypatch.setitem(train.PRESETS, "alias", train.PRESETS["tiny"])
    args = train.parse(flags(drawings, tmp_path / "run"))
    args.preset = "alias"
    monkeypatch.setattr(train, "parse", lambda: args)
    assert run_here(monkeypatch, capsys, tmp_path, [])[0] == 0
    assert train.read_weights(tmp_path / "run" / "best.safetensors", header_only=True)[1]["preset"] == "alias"


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


def test_stage_2_finds_the_newest_run_of_stage_1(whole, drawings, tmp_path, monkeypatch, capsys):
    for name, seconds in ("older", 1000), ("newer", 2000):
        (tmp_path / "runs" / name).mkdir(parents=True)
        file = tmp_path / "runs" / name / "best.safetensors"
        file.write_bytes((whole[1] / "best.safetensors").read_bytes())
        os.utime(file, (seconds, seconds))
    save(HATRefiner.from_preset("low"), tmp_path / "runs" / "low.safetensors")       # no best of a run: not considered
    args = flags(drawings, tmp_path / "two", stage=2, patch=32, tile_size=16, tile_pad=8, steps=1, every=1)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and "starts from runs/newer/best.safetensors" in out, err
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)      # the same command again, with a newer run there
    assert code == 0


@pytest.mark.skipif(os.name == "nt", reason="process groups")
def test_a_shutdown_that_ends_every_process_of_it(whole, drawings, tmp_path):
    """SIGTERM to the workers too, as when a machine goes down: the step at hand is finished and kept."""
    args, run = flags(drawings, tmp_path / "run", workers=2, every=1000, steps=1000, patch=8), tmp_path / "run"
    p = start(args, tmp_path, start_new_session=True)
    for _ in range(600):
        time.sleep(0.1)
        if (run / "state.pt").exists():
            break
    time.sleep(3)
    os.killpg(p.pid, signal.SIGTERM)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "stopped at step" in err and "Traceback" not in err, err
    assert torch.load(run / "state.pt", weights_only=True)["now"]["step"] > 0


def test_a_disk_that_is_full_while_saving(whole, drawings, tmp_path, monkeypatch, capsys):
    """A file may not grow past a limit, as on a full disk: one line, nothing half-written; with room again the same
    command ends as if nothing had happened."""
    args, run = flags(drawings, tmp_path / "run"), tmp_path / "run"
    packed = flags(drawings, tmp_path / "packed", steps=1)
    assert run_here(monkeypatch, capsys, tmp_path, packed)[0] == 0      # so the patches are there
    limit = (whole[1] / "last.safetensors").stat().st_size + 1000      # the weights fit, the state does not
    p = start(args, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    out, err = p.communicate(timeout=120)
    assert p.returncode == 2 and err.count("\n") == 1 and str(run) in err and "Traceback" not in err
    assert not list(run.glob(".*.tmp")) and not (run / "state.pt").exists()
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    same_run(run, whole[1])


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it and nothing is saved."""


def killed_in_step(m, number):
    steps, real = iter(range(100)), train.rate
    m.setattr(train, "rate", lambda *a: real(*a) if next(steps) < number else (_ for _ in ()).throw(Killed))


def killed_and_resumed(monkeypatch, capsys, cwd, args, number):
    with monkeypatch.context() as m:
        killed_in_step(m, number)
        with pytest.raises(Killed):
            run_here(monkeypatch, capsys, cwd, args)
    assert run_here(monkeypatch, capsys, cwd, args)[0] == 0


ODD = dict(patch="16,24", accum=2, batch=3, steps=7, every=2, ema=0.9)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_every_stage_resumes_to_the_bit(whole, drawings, tmp_path, monkeypatch, capsys, stage):
    """Mixed patches, accumulation, EMA; killed in the middle of a step or of writing a file, then started again."""
    more = dict(stage=stage, tile_size=8, tile_pad=4, lr=1e-3, **ODD)
    if stage > 1:
        more["weights"] = whole[1] / "last.safetensors"
    assert run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "undisturbed", **more))[0] == 0
    for where in ("in a step", "in a save"):
        args = flags(drawings, tmp_path / where, **more)
        with monkeypatch.context() as m:
            if where == "in a step":
                killed_in_step(m, 5)
            else:
                real, calls = os.replace, iter(range(100))

                def half_written(src, dst):
                    if str(dst).endswith("state.pt") and next(calls) == 2:
                        raise Killed
                    real(src, dst)
                m.setattr(os, "replace", half_written)
            with pytest.raises(Killed):
                run_here(monkeypatch, capsys, tmp_path, args)
        assert 0 < len(rows(tmp_path / where)) < 4
        assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
        same_run(tmp_path / "undisturbed", tmp_path / where)


@pytest.mark.parametrize("shape", [(24, 16), (16, 40), (8, 4, 3, 3)])
def test_muon_makes_steps_orthogonal(shape):
    """Momentum of two steps, looked ahead, its singular values brought near 1; and like PyTorch's own, which works in bf16."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(2)]
    ours = [torch.nn.Parameter(start.clone()) for _ in range(2)]        # two of one shape go through together
    muon = train.Muon([dict(params=ours, share=1.0)], lr=0.01)
    for grad in grads:
        before = ours[0].detach().clone()
        ours[0].grad, ours[1].grad = grad.clone(), -grad
        muon.step()
    average = 0.95 * 0.05 * grads[0] + 0.05 * grads[1]
    ahead = (0.05 * grads[1] + 0.95 * average).flatten(1)
    u, _, v = torch.linalg.svd(ahead, full_matrices=False)
    step = (before - ours[0].detach()).flatten(1) / (0.002 * max(ahead.shape) ** 0.5)
    values = torch.linalg.svdvals(step)
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.allclose(u.T @ step @ v.T, torch.diag(torch.diag(u.T @ step @ v.T)), atol=2e-3)      # the same directions
    assert torch.allclose(ours[1] - start, start - ours[0], atol=1e-6)
    if len(shape) == 2 and hasattr(torch.optim, "Muon"):
        theirs = torch.nn.Parameter(start.clone())
        other = torch.optim.Muon([theirs], 0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        for grad in grads:
            theirs.grad = grad.clone()
            other.step()
        assert (theirs - ours[0]).norm() < 0.05 * (start - ours[0]).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_replayed_graphs_are_the_network_as_it_now_is():
    """Same pictures, same gradients, for both shapes and after the weights have changed."""
    torch.manual_seed(0)
    model = HATRefiner.from_preset("tiny", drop_path=0.0).cuda().train()
    model.refine = False
    shapes = [(2, 3, 16, 16), (1, 3, 24, 24)]
    replayed = train.replayed(model, shapes)
    for shape in shapes * 2:
        lr, seen = torch.rand(shape, device="cuda"), []
        for net in model, replayed:
            model.zero_grad(set_to_none=True)
            sr = net(lr)
            sr.square().mean().backward()
            seen.append([sr.detach().clone(), *(p.grad.clone() for p in model.hat_model.parameters())])
        for a, b in zip(*seen):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
    with pytest.raises(KeyError):
        replayed(torch.rand(1, 3, 16, 16, device="cuda"))


def test_a_gpu_that_cannot_record_says_so(monkeypatch):
    def fail(*a, **k):
        raise RuntimeError(said)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    said = "operation not permitted when stream is capturing\nCUDA kernel errors might be ..."
    with pytest.raises(train.UserError, match=r"--no-graphs .* \(operation not permitted when stream is capturing\)$"):
        train.replayed(torch.nn.Linear(2, 2), [(1, 2)])
    said = "CUDA out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        train.replayed(torch.nn.Linear(2, 2), [(1, 2)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_run_by_graphs_is_the_run_without(drawings, tmp_path, monkeypatch, capsys):
    args = flags(drawings, tmp_path / "run", device="cuda", patch="16,32", optimiser="muon", seed=3)
    losses = []
    for more in ["--overwrite"], ["--overwrite", "--no-graphs"]:
        assert run_here(monkeypatch, capsys, tmp_path, args + more)[0] == 0
        losses.append([float(row["pix"]) for row in rows(tmp_path / "run")])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_muon_run_resumes_to_the_bit(drawings, tmp_path, monkeypatch, capsys):
    args = [flags(drawings, tmp_path / name, optimiser="muon", **ODD) for name in ("a", "b")]
    assert run_here(monkeypatch, capsys, tmp_path, args[0])[0] == 0
    killed_and_resumed(monkeypatch, capsys, tmp_path, args[1], 5)
    same_run(tmp_path / "a", tmp_path / "b")


def test_muon_takes_the_matrices_alone(whole, drawings, tmp_path, monkeypatch, capsys):
    """And Adam all the others; where no matrix learns it says that it does nothing."""
    seen = {}
    real = train.Muon.__init__
    monkeypatch.setattr(train.Muon, "__init__", lambda self, groups, lr: (seen.update(groups[0]), real(self, groups, lr))[1])
    start = whole[1] / "last.safetensors"
    args = flags(drawings, tmp_path / "run", optimiser="muon", lr=1e-3, ema=0.0, weights=start)
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    assert {p.ndim for p in seen["params"]} == {2} and min(min(p.shape) for p in seen["params"]) >= 16
    before, after = load_file(start), load_file(tmp_path / "run" / "last.safetensors")
    assert any(n.endswith("qkv.weight") for n in after)
    assert not [n for n in after if n.startswith("hat_model.") and n.endswith("weight") and torch.equal(before[n], after[n])]
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(
        drawings, tmp_path / "refiner", optimiser="muon", stage=3, tile_size=8, tile_pad=4, weights=start))
    assert code == 0 and "--optimiser muon does nothing here" in out + err


# ----------------------------------------------------------------------------------------------------------------------
# steps that go wrong


def poison(monkeypatch, at, value):
    """The loader's batches of these numbers carry a bad pixel in LR."""
    real = train.data.loader

    def loader(batches, begin, workers):
        for i, (lr, hr) in enumerate(real(batches, begin, workers), begin):
            if i in at:
                lr = lr.clone()
                lr[0, 0, 0, 0] = value
            yield lr, hr
    monkeypatch.setattr(train.data, "loader", loader)


def test_a_trained_refiner_that_does_not_learn_stays_on_when_resumed(whole, drawings, tmp_path, monkeypatch, capsys):
    """It was judged before its weights were back, taken for untrained and left out."""
    model = load(whole[1] / "last.safetensors")
    torch.nn.init.normal_(model.out_conv.weight, std=0.01)
    save(model, tmp_path / "start.safetensors")
    args = [flags(drawings, tmp_path / name, weights=tmp_path / "start.safetensors", steps=4, every=2) for name in ("a", "b")]
    assert run_here(monkeypatch, capsys, tmp_path, args[0])[0] == 0
    killed_and_resumed(monkeypatch, capsys, tmp_path, args[1], 3)
    same_run(tmp_path / "a", tmp_path / "b")


def test_the_averages_have_no_history(drawings, tmp_path, monkeypatch, capsys):
    """It grew by a node for every tensor and step: 2 GB in 13,000 steps of `low`."""
    seen, real = [], train.save
    monkeypatch.setattr(train, "save", lambda model, *a: seen.extend(p.grad_fn for p in model.parameters()) or real(model, *a))
    args = flags(drawings, tmp_path / "run", steps=2, every=2, patch=8, batch=1)
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    assert seen and set(seen) == {None}


def test_eps_glides(drawings, tmp_path, monkeypatch, capsys):
    """By the same factor each step, in the loss that is trained with; --rmse is its too."""
    seen, real = [], train.SRLoss.terms
    monkeypatch.setattr(train.SRLoss, "terms", lambda self, *a: seen.append(self.pix.eps * self.pix.rmse) or real(self, *a))
    args = [*flags(drawings, tmp_path / "run", steps=5, every=5, eps=0.1, eps_end=0.001, patch=8, batch=1), "--rmse"]
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    assert np.allclose(seen[:5], 0.1 * 0.01 ** (np.arange(5) / 4))
    assert train.rounding(0.7, train.parse(flags(drawings, tmp_path, eps=0.02))) == 0.02


def by_the_clock(args):
    for name in "--steps", "--every":
        del args[args.index(name):args.index(name) + 2]
    return args


def test_minutes_end_a_run_by_the_clock(drawings, tmp_path, monkeypatch, capsys):
    """It takes that long, reports at each tenth, its rate falls to the end; given again it does nothing more, cut short it goes on."""
    args = by_the_clock(flags(drawings, tmp_path / "run", patch=8, batch=1, warmup=1, minutes=0.06))
    began = time.time()
    code, out, _ = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and 3.6 < time.time() - began < 30
    log = rows(tmp_path / "run")
    rates = [float(r["lr"]) for r in log]
    assert 2 < len(log) <= 11 and rates == sorted(rates, reverse=True) and rates[-1] < 0.02 * 1e-3 < rates[0]
    assert 3 <= int(log[-1]["seconds"]) < 20 and " 0m00s left" in out
    before = (tmp_path / "run" / "state.pt").read_bytes()
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    assert len(rows(tmp_path / "run")) == len(log) and (tmp_path / "run" / "state.pt").read_bytes() == before
    for more, said in (["--steps", "3"], "in place of --steps"), (["--overwrite", "--minutes", "0"], "--minutes 0"), (
            ["--detector"], "--detector trains in one process, for --steps"):
        code, out, err = run_here(monkeypatch, capsys, tmp_path, args + more)
        assert code == 2 and said in err
    with monkeypatch.context() as m:
        m.setattr(train, "rate", lambda *a: time.sleep(1) or os.kill(os.getpid(), signal.SIGINT) or 1e-3)
        assert run_here(m, capsys, tmp_path, args + ["--overwrite"])[0] == 130
    code, out, _ = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and "going on at step 1" in out and int(rows(tmp_path / "run")[-1]["seconds"]) >= 3
    assert int(re.findall(r"0m0(\d)s left", out)[0]) <= 2, out      # of 3.6 s one was gone
    code, out, _ = run_here(monkeypatch, capsys, tmp_path, args + ["--dry-run", "--minutes", "3", "--out", str(tmp_path / "dry")])
    assert code == 0 and re.search(r"\d steps with 10 validations: about (2m5\d|3m00)s", out)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_poisoned_batch_is_skipped(drawings, tmp_path, monkeypatch, capsys, value):
    poison(monkeypatch, {2, 5}, value)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run"))
    assert code == 0 and rows(tmp_path / "run")[-1]["skipped"] == "2" and "2 steps skipped" in out
    assert all(v.isfinite().all() for v in load_file(tmp_path / "run" / "last.safetensors").values())


def test_a_poisoned_gradient_is_skipped(drawings, tmp_path, monkeypatch, capsys):
    real, calls = torch.nn.utils.clip_grad_norm_, iter(range(100))

    def clip(parameters, most):
        parameters = list(parameters)
        if next(calls) in (3, 4):
            parameters[0].grad.fill_(float("nan"))
        return real(parameters, most)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run"))
    assert code == 0 and rows(tmp_path / "run")[-1]["skipped"] == "2"
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert all(v.isfinite().all() for part in ("model", "ema") for v in state[part].values())


def test_ten_bad_steps_in_a_row_roll_back(drawings, tmp_path, monkeypatch, capsys):
    """Batches 8 to 39 are poisoned until the rate has been halved twice; skipped steps count, and reports go on."""
    real, seen = train.data.loader, []

    def loader(batches, begin, workers):
        seen.append(begin)
        for i, (lr, hr) in enumerate(real(batches, begin, workers), begin):
            yield (lr * float("nan") if 8 <= i < 40 and len(seen) < 3 else lr), hr
    monkeypatch.setattr(train.data, "loader", loader)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", steps=48, every=6))
    assert code == 0 and seen == [0, 12, 18], (seen, err)
    assert out.count("ten bad steps in a row (not finite)") == 2 and "rate times 0.25" in out
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["now"]["slow"] == 0.25


def test_a_learning_rate_of_10_rolls_back(drawings, tmp_path, monkeypatch, capsys):
    args = flags(drawings, tmp_path / "run", lr=10, warmup=0, steps=30, every=30, batch=1)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and "back to step 0 with the rate times 0.5" in out
    assert all(v.isfinite().all() for v in load_file(tmp_path / "run" / "last.safetensors").values())


def test_a_run_that_nothing_helps_ends(drawings, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(1000), float("nan"))
    args = flags(drawings, tmp_path / "run", steps=20, every=20, patch=8, batch=1)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 2 and "nothing helps" in err and not (tmp_path / "run" / "last.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# switches


def test_stage_2_reaches_hat_from_every_tile():
    torch.manual_seed(0)
    model, tiler = HATRefiner.from_preset("tiny"), train.Tiler(16, 8, align=4)
    outputs, hat = [], model.hat_model

    def forward(x):
        outputs.append(hat(x))
        outputs[-1].retain_grad()
        return outputs[-1]
    sr = tiler(forward, torch.rand(1, 3, 40, 56), 2)
    sr = sr + model.out_conv(model.residual_block(sr))
    ((sr - 0.5) ** 2).mean().backward(retain_graph=True)
    assert len(outputs) == tiler.count(40, 56) > 4
    total = 0
    for y in outputs:
        (g,) = torch.autograd.grad(y, hat.conv_first.weight, y.grad, retain_graph=True)
        assert y.grad.abs().max() > 0 and g.abs().max() > 0
        total = total + g
    assert torch.allclose(total, hat.conv_first.weight.grad, atol=1e-6, rtol=1e-3)


def test_stage_3_keeps_no_graph_through_hat():
    """Bytes that backward would need, at one patch: under a third of stage 2's."""
    def kept(learn):
        model = HATRefiner.from_preset("tiny")
        train.choose(model, learn, "")
        size = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: size.__setitem__(t.untyped_storage().data_ptr(),
                                                                                t.untyped_storage().nbytes()) or t, lambda t: t):
            sr = model(torch.rand(1, 3, 128, 128), train.Tiler(16, 8, align=4))
        for name, p in model.named_parameters():
            assert (p.requires_grad and sr.requires_grad) == name.startswith(tuple(learn.split(",")))
        return sum(size.values())
    assert kept("residual_block,out_conv") < kept("hat_model,residual_block,out_conv") / 3


def test_modules_freeze_by_name(drawings, tmp_path, monkeypatch, capsys, whole):
    args = flags(drawings, tmp_path / "run", steps=2, every=2, weights=whole[1] / "last.safetensors", lr=1e-3,
                 freeze="hat_model.layers.0,hat_model.conv_first")
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    a, b = load_file(whole[1] / "last.safetensors"), load_file(tmp_path / "run" / "last.safetensors")
    still = {k for k in a if torch.equal(a[k], b[k])}
    assert {k for k in a if "layers.0." in k or "conv_first" in k} <= still
    assert not any("layers.1." in k and k.endswith("weight") for k in still)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "c", freeze="hat"))
    assert code == 2 and "no module 'hat'" in err and "hat_model, " in err and "residual_block" in err
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "d", freeze="hat_model"))
    assert code == 2 and "nothing is left to learn" in err


def test_flags_override_the_stage():
    of = dict(stage="2", patch="32", tile_size="16", tile_pad="8", lr="0.5", train="out_conv", batch="3", steps="7")
    args = train.parse(["--no-tiling", *(s for k, v in of.items() for s in (f"--{k.replace('_', '-')}", v))])
    assert {k: str(getattr(args, k)) for k in of} == of and args.use_tiling is False
    assert train.parse(["--stage", "1", "--use-tiling"]).use_tiling is True
    stages = [train.parse(["--stage", str(i), "--device", "cpu"]) for i in (1, 2, 3)]
    assert [a.patch for a in stages] == ["64", "128", "256"] and [a.use_tiling for a in stages] == [False, True, True]
    assert [a.train for a in stages] == ["hat_model", "hat_model,residual_block,out_conv", "residual_block,out_conv"]
    assert [a.lr for a in stages][1:] == [2e-5, 1e-5]


def test_a_gpu_has_long_runs_on_ones_own_pictures_only(monkeypatch):
    """Without --data the first command is to end within minutes there too."""
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(*shape))
    for flags, steps in (([], "400"), (["--data", "a"], "50000"), (["--steps", "7"], "7")):
        args = train.parse(["--stage", "1", "--device", "mps", *flags])
        assert (str(args.steps), args.batch) == (steps, 16)


def test_tiling_and_patches_reach_the_network(drawings, tmp_path, monkeypatch, capsys):
    seen = []
    real = train.HATRefiner.forward

    def forward(self, lr, tiler=None):
        if self.training:
            seen.append((tuple(lr.shape), tiler and (tiler.tile_size, tiler.tile_pad)))
        return real(self, lr, tiler)
    monkeypatch.setattr(train.HATRefiner, "forward", forward)
    args = flags(drawings, tmp_path / "run", patch="16,32", batch=4, steps=8, every=8, tile_size=8, tile_pad=4)
    assert run_here(monkeypatch, capsys, tmp_path, [*args, "--use-tiling"])[0] == 0
    assert set(seen) == {((4, 3, 16, 16), (8, 4)), ((1, 3, 32, 32), (8, 4))}


def test_patience_and_keep(drawings, tmp_path, monkeypatch, capsys):
    args = flags(drawings, tmp_path / "run", steps=40, every=2, lr=1e-12, patience=2, keep=2)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and "has not risen for 2 reports" in out and len(rows(tmp_path / "run")) < 20
    kept = sorted((tmp_path / "run").glob("step_*.safetensors"))
    assert len(kept) == 2 and kept[-1].name == f"step_{int(rows(tmp_path / 'run')[-1]['step']):06d}.safetensors"
    before = (tmp_path / "run" / "log.csv").read_bytes()
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)      # it is over, and stays so
    assert code == 0 and "has not risen for 2 reports" in out and (tmp_path / "run" / "log.csv").read_bytes() == before


def test_a_report_is_told_once_it_is_kept(drawings, tmp_path, monkeypatch, capsys):
    told, real = [], train.write_state

    def write(path, state):
        told.append(capsys.readouterr().out)
        assert f"step {state['now']['step']}/" not in "".join(told)
        real(path, state)
    monkeypatch.setattr(train, "write_state", write)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", steps=6, every=3))
    assert code == 0 and len(told) == 3 and "step 3/6" in told[2] and "step 6/6" in out


def test_without_val_some_pictures_are_set_aside(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for i in range(21):     # a grey level for each picture, so that patches tell where they come from
        Image.fromarray(np.random.default_rng(i).integers(10 * i, 10 * i + 9, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"in/{i}.png")
    args = flags(tmp_path, tmp_path / "run", data=tmp_path / "in", steps=2, every=2)
    args = args[:args.index("--val")] + args[args.index("--val") + 2:]
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and "2 pictures of --data are set aside" in out, err
    folder = next((tmp_path / "patches").glob("val-*"))
    held = {int(np.asarray(Image.open(p)).mean() // 10) for p in folder.iterdir()}
    pack = train.data.read_tensor(next((tmp_path / "patches").glob("in-*.safetensors")), "patches")
    learned = {int(np.asarray(p, np.float32).mean() // 10) for p in pack}
    assert len(held) == 2 and held | learned == set(range(21)) and not held & learned
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0 and len(list((tmp_path / "patches").glob("val-*"))) == 1
    for i in range(21, 60):     # more pictures; what was set aside for this run stays so
        Image.new("RGB", (64, 64)).save(tmp_path / f"in/{i}.png")
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and "set aside" not in out, err


def test_shares_of_folders(drawings, tmp_path, monkeypatch, capsys):
    other = tmp_path / "b"
    other.mkdir()
    Image.new("RGB", (96, 96), (255, 0, 0)).save(other / "red.png")
    seen = []
    real = train.data.loader

    def loader(*a):
        for lr, hr in real(*a):
            seen.extend((hr[:, 0].amin((1, 2)) > 0.99).tolist())
            yield lr, hr
    monkeypatch.setattr(train.data, "loader", loader)
    args = flags(drawings, tmp_path / "run", batch=10, steps=10, every=10)
    i = args.index("--data")
    args[i + 2:i + 2] = [f"{other}@0.3"]
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0
    assert len(seen) == 100 and 15 <= sum(seen) <= 45
    for bad, words in (f"{other}@2", "shares"), (f"{other}@x", "share such as 0.3"):
        args[i + 2] = bad
        code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
        assert code == 2 and words in err


def test_patch_files_are_taken_as_they_are(drawings, tmp_path, monkeypatch, capsys):
    file = train.data.pack(drawings / "train", tmp_path / "mine.safetensors", size=64, min_side=32, log=lambda _: None)
    before = file.read_bytes()
    for name, given in ("a", [str(file)]), ("b", [f"{file}@0.5", str(drawings / "train")]), ("c", [str(file), str(drawings / "train")]):
        args = flags(drawings, tmp_path / name, steps=2, every=2)
        i = args.index("--data")
        args[i + 1:i + 2] = given
        for more in (["--dry-run"], []):
            code, out, err = run_here(monkeypatch, capsys, tmp_path, [*args, *more])
            assert code == 0, err
    assert file.read_bytes() == before
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "d", data=file, patch=64))
    assert code == 2 and "holds patches of 64" in err


def test_fp16_trains(drawings, tmp_path, monkeypatch, capsys):
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", amp="fp16"))
    assert code == 0 and float(rows(tmp_path / "run")[-1]["psnr_y"]) > 15, err


def test_dry_run(drawings, tmp_path, monkeypatch, capsys):
    args = [*flags(drawings, tmp_path / "runs" / "mine", steps=1000), "--dry-run"]
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and "going on at step 2" in out and "s a step, 1000 steps" in out and "parameters" in out, err
    assert re.search(r"patches/ about [1-9][\d,]* MiB more", out)
    assert list((tmp_path / "runs").iterdir()) == [] and not (tmp_path / "patches").exists()


def test_a_dry_run_on_demo_pictures(drawings, tmp_path, monkeypatch, capsys):
    shutil.copytree(drawings, tmp_path / "demo")        # as if drawn before
    args = flags(drawings, tmp_path / "run")
    args = [a for a, flag in zip(args, ["", *args]) if not {a, flag} & {"--data", "--val"}]
    code, out, err = run_here(monkeypatch, capsys, tmp_path, [*args, "--dry-run"])
    assert code == 0 and "it works" in out, err


def test_a_dry_run_counts_the_wait_for_batches(drawings, tmp_path, monkeypatch, capsys):
    batch = train.data.Batches.__getitem__

    def slow(self, step):
        time.sleep(0.3)
        return batch(self, step)
    monkeypatch.setattr(train.data.Batches, "__getitem__", slow)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, [*flags(drawings, tmp_path / "run", workers=0), "--dry-run"])
    assert code == 0 and float(re.search(r"([\d.]+) s a step", out)[1]) >= 0.3, err


def test_a_dry_run_takes_pictures_that_are_large_enough(tmp_path, monkeypatch, capsys):
    """Where few are: it took a spread of any and refused a folder that training accepts."""
    folder = tmp_path / "data"
    for name in ("train", "val"):
        (folder / name).mkdir(parents=True)
    for i in range(13):
        picture = Image.effect_noise((64, 64) if i == 5 else (24, 24), 60).convert("RGB")
        picture.save(folder / "train" / f"{i:02}.png")
    picture.save(folder / "val" / "a.png")
    code, out, err = run_here(monkeypatch, capsys, tmp_path, [*flags(folder, tmp_path / "run", patch="32", val_count=1), "--dry-run"])
    assert code == 0 and "it works" in out, err


def test_a_dry_run_is_for_one_process(drawings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(train.UserError, match="one process"):
        train.check(train.parse([*flags(drawings, tmp_path / "run"), "--dry-run"]))


@pytest.mark.parametrize("kind", ("no such folder", "no validation picture", "patch below the window", "tile off the window",
                                  "weights of another preset", "no room on the disk"))
def test_a_dry_run_finds_mistakes(kind, drawings, tmp_path, whole, monkeypatch, capsys):
    if kind == "no room on the disk":
        monkeypatch.setattr(train.shutil, "disk_usage", lambda p: type("usage", (), dict(free=10 ** 5)))
        args, words = flags(drawings, tmp_path / "run"), "MiB free"
    else:
        args, words = mistake(kind, drawings, tmp_path, whole)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, [*args, "--dry-run"])
    assert code == 2 and words in err and "step " not in out


# ----------------------------------------------------------------------------------------------------------------------
# losses


GAN = dict(loss="pix,freq=0.3,edge,lock,texture,adv=0.05", gan_after=3, d_features=4, steps=8, every=4)


def test_a_gan_run_resumes_to_the_bit(drawings, tmp_path, monkeypatch, capsys):
    args = [flags(drawings, tmp_path / name, **GAN) for name in ("a", "b")]
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args[0])
    assert code == 0, err
    first, last = rows(tmp_path / "a")
    terms = {"pix", "freq", "edge", "lock", "texture"}
    assert terms | {f"{t}_grad" for t in terms} <= set(first) and float(first["d_acc"]) >= 0
    assert all(0 < float(last[k]) < 100 for k in ("adv", "adv_grad", "d", "d_acc", "freq_grad", "edge_grad"))
    best = load(tmp_path / "a" / "best.safetensors").header["step"]     # the newest, though PSNR falls under a GAN
    assert best == int(last["step"])
    killed_and_resumed(monkeypatch, capsys, tmp_path, args[1], 6)
    same_run(tmp_path / "a", tmp_path / "b")
    one, two = (torch.load(tmp_path / n / "state.pt", weights_only=True)["critic"] for n in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_the_discriminator_waits_and_then_moves(drawings, tmp_path, monkeypatch, capsys):
    seen = []
    real = train.discriminator_loss
    monkeypatch.setattr(train, "discriminator_loss", lambda d, *a: seen.append(
        torch.cat([p.detach().flatten().clone() for p in d.parameters()])) or real(d, *a))
    assert run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", **GAN))[0] == 0
    assert len(seen) == 5 and not any(torch.equal(a, b) for a, b in zip(seen, seen[1:]))


def test_every_second_target_is_line_enhanced_until_its_share_is_over(drawings, tmp_path, monkeypatch, capsys):
    calls, real = [], train.enhance_lines
    monkeypatch.setattr(train, "enhance_lines", lambda hr: calls.append(1) or real(hr))
    args = flags(drawings, tmp_path / "run", steps=10, every=10, sharpen_until=0.8)
    assert run_here(monkeypatch, capsys, tmp_path, args)[0] == 0 and len(calls) == 4


@pytest.mark.parametrize("more, words", ((dict(loss="pix,nonsense"), "no loss 'nonsense'; there are pix"),
                                         (dict(loss="pix,perc"), "--vgg-weights"),
                                         (dict(loss="pix,perc", perceptual="anime"), "--anime-weights"),
                                         (dict(loss="pix,art_cls", detector="gone.safetensors"), "gone.safetensors"),
                                         (dict(loss="pix,edge", edge_kernel=2), "odd number"),
                                         (dict(loss="adv", gan_after=3), "add pix"),
                                         (dict(train="residual_block"), "add out_conv"),
                                         (dict(device="abacus"), "--device abacus"),
                                         (dict(patience=-1), "--patience -1 does not work; use 0 or more"),
                                         (dict(seed=-1), "--seed -1"), (dict(clip=0), "--clip 0"),
                                         (dict(loss="pix,adv", d_features=0), "--d-features 0")))
def test_losses_that_cannot_be(drawings, tmp_path, monkeypatch, capsys, more, words):
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", **more))
    assert code == 2 and words in err and err.count("\n") == 1, err


# ----------------------------------------------------------------------------------------------------------------------
# several processes


def torchrun(args, cwd, ranks=2):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}",
                             ROOT / "train.py", *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=env, start_new_session=True)


def test_two_ranks_are_one_with_twice_the_batch(drawings, tmp_path, monkeypatch, capsys):
    more = dict(steps=20, every=4, val_count=1)
    p = torchrun(flags(drawings, tmp_path / "two", batch=2, **more), tmp_path)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    assert run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "one", batch=4, **more))[0] == 0
    one, two = ([float(r["pix"]) for r in rows(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 5 and max(abs(a - b) / a for a, b in zip(one, two)) < 1e-4


def test_two_ranks_go_by_one_clock(drawings, tmp_path):
    """Or one would report while the other still learns, and both would wait for ever."""
    p = torchrun(by_the_clock(flags(drawings, tmp_path / "run", patch=8, batch=1, warmup=1, minutes=0.05)), tmp_path)
    out, err = p.communicate(timeout=120)
    log = rows(tmp_path / "run")
    assert p.returncode == 0 and len(log) > 2 and float(log[-1]["lr"]) < 0.02 * 1e-3, err


def test_a_lost_rank_ends_the_run_and_it_resumes(drawings, tmp_path, monkeypatch, capsys):
    args, run = flags(drawings, tmp_path / "run", steps=400, every=5, val_count=1), tmp_path / "run"
    p = torchrun(args, tmp_path)
    while not rows(run) and p.poll() is None:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, err = p.communicate(timeout=60)
    assert p.returncode != 0
    step = torch.load(run / "state.pt", weights_only=True)["now"]["step"]
    assert step >= 5
    monkeypatch.setattr(train, "rate", lambda *a: os.kill(os.getpid(), signal.SIGINT) or 1e-3)     # stops at the next step
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 130 and f"going on at step {step}" in out and "made by 2 processes and goes on with 1" in out


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
        return flags(drawings, run, stage=2), "builds on stage 1"
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


def test_mistakes_that_showed_late(drawings, tmp_path, monkeypatch, capsys):
    """After all pictures were packed, or when the discriminator began."""
    (tmp_path / "a.safetensors").write_bytes(b"")
    for more, words in ((dict(val=tmp_path / "a.safetensors"), "no folder"), (dict(loss="pix,adv", patch=8), "HR patches of 32")):
        code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run", **more))
        assert code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_bad_pictures_are_named_and_skipped(drawings, tmp_path, monkeypatch, capsys):
    (tmp_path / "pictures").mkdir()
    draw(tmp_path / "pictures" / "good.png", 1)
    draw(tmp_path / "pictures" / "small.png", 1, (20, 90))
    (tmp_path / "pictures" / "text.jpg").write_text("hello")
    (tmp_path / "val").mkdir()
    draw(tmp_path / "val" / "good.png", 2)
    draw(tmp_path / "val" / "icon.png", 2, (12, 12))
    png = (drawings / "train" / "壁紙 1.png").read_bytes()
    (tmp_path / "pictures" / "cut.png").write_bytes(png[:len(png) // 2])
    args = flags(drawings, tmp_path / "run", data=tmp_path / "pictures", val=tmp_path / "val", steps=1, every=1)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, args)
    assert code == 0 and all(name in out + err for name in ("small.png", "text.jpg", "cut.png", "icon.png")), err
    assert "2 unreadable and 1 small" in out + err


@pytest.mark.parametrize("error, words", ((torch.OutOfMemoryError("CUDA out of memory"), "smaller --batch"),
                                          (RuntimeError("DataLoader worker (pid 5) is killed by signal"), "--workers 0")))
def test_want_of_memory_is_one_line(drawings, tmp_path, monkeypatch, capsys, error, words):
    def train_without(*args, **more):
        raise error
    monkeypatch.setattr(train, "train", train_without)
    monkeypatch.setattr(train.os, "_exit", sys.exit)
    code, out, err = run_here(monkeypatch, capsys, tmp_path, flags(drawings, tmp_path / "run"))
    assert code == 2 and words in err and err.count("\n") == 1


def test_flags_without_effect_are_told(drawings, tmp_path, capsys):
    train.parse(flags(drawings, tmp_path, loss="pix,edge", edge_kernel=5, gan_after=5, r1=0))
    assert capsys.readouterr().err == "note: --gan-after does nothing without adv in --loss\n"
    train.parse(flags(drawings, tmp_path, loss="freq", eps=0.01, eps_end=0.001))
    said = capsys.readouterr().err
    assert all(f"--{name} does nothing without pix or luma or art_cls or art_feat in --loss" in said for name in ("eps", "eps-end")), said
    for terms in "luma=0.5", "freq,art_cls":    # art_* is cut to the length of pix, whose eps it is
        train.parse(flags(drawings, tmp_path, loss=terms, eps=0.01, eps_end=0.001))
        assert not capsys.readouterr().err
    train.parse([*flags(drawings, tmp_path, loss="pix", detector="mine"), "--mask"])
    said = capsys.readouterr().err
    assert "--mask does nothing without edge or adv" in said and "--detector does nothing without art_cls or art_feat" in said
    train.parse(["--detector", "--data", str(drawings)])
    assert not capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse(["--help"])
    assert e.value.code == 0 and "example: python train.py" in capsys.readouterr().out


def test_args_json_holds_every_flag(whole):
    assert set(json.loads((whole[1] / "args.json").read_text())) >= {"stage", "patch", "lr", "steps", "batch", "seed", "recipe"}


def test_beside_a_gpu_a_few_threads_are_enough():
    before = torch.get_num_threads()
    try:
        for device, threads, want in (("cuda:1", 16, 4), ("cuda", 2, 2), ("mps", 9, 4), ("cpu", 16, 16)):
            torch.set_num_threads(threads)
            train.few_threads(device)
            assert torch.get_num_threads() == want
    finally:
        torch.set_num_threads(before)
