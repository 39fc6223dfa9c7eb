import csv
import itertools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from model import HATRefiner, load, save

ROOT = Path(__file__).parent.parent


def draw(path, seed, size=(112, 96)):
    """Draw sharp lines on soft blobs."""
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
    """Runs are compared to the bit, also with those of other processes."""
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
    values = dict(stage=1, preset="tiny", patch=16, batch=2, steps=12, val_every=3, workers=0, amp="off",
                  device="cpu", data=drawings / "train", val=drawings / "val", out=out) | more
    names = {k: f"--{k.replace('_', '-')}" for k in values}
    return [s for k, v in values.items() if v is not None
            for s in ([names[k]] if v is True else [names[k], str(v)])]


def start(args, cwd, script=ROOT / "train.py", **how):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, script, *args], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=env, **how)


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """Call train.main() in this process: (exit code, stdout, stderr)."""
    def call(args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        code = 0
        try:
            train.main()
        except SystemExit as e:
            code = e.code
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return call


def rows(out):
    path = Path(out) / "log.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def state_of(run):
    return torch.load(run / "state.pt", weights_only=True)


def assert_same_run(a, b):
    """Weights, averages and optimizers are equal to the bit."""
    one, two = state_of(a), state_of(b)
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    for part in ("adam", "muon"):
        for k, moments in one.get(part, {"state": {}})["state"].items():
            assert all(torch.equal(v, two[part]["state"][k][n]) for n, v in moments.items())
    assert (a / "last.safetensors").read_bytes() == (b / "last.safetensors").read_bytes()
    keys = ("step", "rmse", "psnr_y")
    assert [[r.get(k) for k in keys] for r in rows(a)] == [[r.get(k) for k in keys] for r in rows(b)]


@pytest.fixture(scope="module")
def whole(drawings, tmp_path_factory):
    """An undisturbed run: (working folder, run folder, stdout)."""
    cwd = tmp_path_factory.mktemp("whole")
    p = start(flags(drawings, cwd / "run"), cwd)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    return cwd, cwd / "run", out


# ---- a run and its folder


def test_run_folder(whole):
    _, run, _ = whole
    assert {p.name for p in run.iterdir()} == {"args.json", "log.csv", "curves.png", "samples",
                                               "last.safetensors", "best.safetensors", "state.pt"}
    assert [r["step"] for r in rows(run)] == ["0", "3", "6", "9", "12"]
    assert set(rows(run)[0]) >= {"step", "rmse", "luma", "rmse_grad", "lr", "patches_per_s", "psnr_y", "ssim_y"}
    assert all(float(r["rmse_grad"]) > 0 for r in rows(run)[1:])
    assert Image.open(run / "samples" / "step_000012.png").size == (3 * 112, 2 * 100)
    header = load(run / "last.safetensors").header
    assert [header[k] for k in ("preset", "scale", "stage", "step", "recipe")] == ["tiny", 2, 1, 12, "bicubic"]


def test_printed_commands_run(whole):
    cwd, _, out = whole
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  python ")]
    assert [c[1] for c in commands] == ["tile.py", "evaluate.py"]
    for c in commands:
        done = subprocess.run([sys.executable, ROOT / c[1], *c[2:]], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert Image.open(cwd / "run" / "upscaled" / "壁紙 10.png").size == (224, 192)
    assert "bicubic" in done.stdout


@pytest.mark.slow
def test_learns(drawings, tmp_path, run_here):
    code, _, _ = run_here(flags(drawings, tmp_path / "run", steps=200, val_every=50, batch=4))
    psnr = [float(r["psnr_y"]) for r in rows(tmp_path / "run")]
    assert code == 0 and psnr[-1] > psnr[0] + 0.5, psnr


def test_stage_1_trains_hat_alone(whole):
    net = load(whole[1] / "last.safetensors")
    fresh = HATRefiner.from_preset("tiny")
    assert not net.use_refiner and net.out_conv.weight.abs().max() == 0
    assert not torch.equal(net.hat_model.conv_first.weight, fresh.hat_model.conv_first.weight)


# ---- resuming


def test_killed_run_resumes_to_the_bit(whole, drawings, tmp_path, run_here):
    """SIGKILL at a random moment after the first report."""
    args, run = flags(drawings, tmp_path / "run"), tmp_path / "run"
    p = start(args, tmp_path)
    while not rows(run) and p.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    p.kill()
    p.communicate()
    assert run_here(args)[0] == 0
    assert_same_run(run, whole[1])


def test_ctrl_c_saves_and_resumes(whole, drawings, tmp_path, run_here):
    args, run = flags(drawings, tmp_path / "run", workers=1), tmp_path / "run"
    p = start(args, tmp_path)
    while len(rows(run)) < 2 and p.poll() is None:
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode in (0, 130) and "Traceback" not in err      # 0: it was finished already
    assert run_here(args)[0] == 0
    assert_same_run(run, whole[1])


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it and nothing is saved."""


def kill_in_step(m, number):
    steps, real = iter(range(100)), train.learning_rate

    def rate(*a):
        if next(steps) >= number:
            raise Killed
        return real(*a)
    m.setattr(train, "learning_rate", rate)


@pytest.mark.parametrize("more", [
    dict(stage=1, optimizer="adam"), pytest.param(dict(stage=2), marks=pytest.mark.slow), dict(stage=3),
    dict(stage=1, loss="rmse,adv", gan_after=2, patch=16)], ids=["adam", "stage 2", "stage 3", "gan"])
def test_resumes_to_the_bit(whole, drawings, tmp_path, run_here, monkeypatch, more):
    """Mixed patches, accumulated gradients, calm crops at the end; killed inside a step, then started again."""
    more = dict(patch="16,24", grad_accum=2, batch=3, steps=7, val_every=2, ema=0.9, tile_size=8, tile_pad=4,
                lr=1e-3) | more
    if more["stage"] > 1:
        more["weights"] = whole[1] / "last.safetensors"
    assert run_here(flags(drawings, tmp_path / "undisturbed", **more))[0] == 0
    args = flags(drawings, tmp_path / "killed", **more)
    with monkeypatch.context() as m:
        kill_in_step(m, 5)
        with pytest.raises(Killed):
            run_here(args)
    assert run_here(args)[0] == 0
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")


def test_state_is_whole_after_a_kill_while_saving(drawings, tmp_path, run_here, monkeypatch, whole):
    real, calls = os.replace, iter(range(100))

    def replace(source, target):
        if str(target).endswith("state.pt") and next(calls) == 2:
            raise Killed
        real(source, target)
    args = flags(drawings, tmp_path / "run")
    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            run_here(args)
    assert run_here(args)[0] == 0
    assert_same_run(tmp_path / "run", whole[1])


def test_state_is_saved_between_reports(drawings, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(train, "STATE_SECONDS", 0)
    kill_in_step(monkeypatch, 2)
    with pytest.raises(Killed):
        run_here(flags(drawings, tmp_path / "run", val_every=100))
    assert state_of(tmp_path / "run")["progress"]["step"] == 2


def test_finished_run_changes_nothing(whole, drawings, run_here):
    _, run, _ = whole
    before = (run / "state.pt").read_bytes()
    code, out, _ = run_here(flags(drawings, run))
    assert code == 0 and "done in" in out and (run / "state.pt").read_bytes() == before


def test_other_settings_are_refused_until_overwrite(drawings, tmp_path, run_here):
    run = tmp_path / "run"
    assert run_here(flags(drawings, run, steps=2, val_every=2))[0] == 0
    code, _, err = run_here(flags(drawings, run, steps=3, val_every=2))
    assert code == 2 and "--steps 2" in err
    assert run_here(flags(drawings, run, steps=3, val_every=2, overwrite=True))[0] == 0
    assert [r["step"] for r in rows(run)] == ["0", "2", "3"] and float(rows(run)[-1]["rmse_grad"]) > 0


def test_another_precision_resumes(drawings, tmp_path, run_here, monkeypatch):
    """Only fp16 has a loss scaler."""
    with monkeypatch.context() as m:
        kill_in_step(m, 4)
        with pytest.raises(Killed):
            run_here(flags(drawings, tmp_path / "run"))
    code, out, err = run_here(flags(drawings, tmp_path / "run", amp="fp16"))
    assert code == 0 and "resumed at step 3" in out, err


def test_run_from_before_a_new_flag_resumes(drawings, tmp_path, run_here, monkeypatch):
    """Settings that args.json does not know are not compared; a slash behind a folder makes no difference."""
    run = tmp_path / "run"
    with monkeypatch.context() as m:
        kill_in_step(m, 4)
        with pytest.raises(Killed):
            run_here(flags(drawings, run))
    settings = json.loads((run / "args.json").read_text())
    del settings["ema"]
    (run / "args.json").write_text(json.dumps(settings))
    code, out, err = run_here(flags(drawings, run, data=f"{drawings}/train/"))
    assert code == 0 and "resumed at step 3" in out, err


def test_weights_without_state_are_not_overwritten(drawings, tmp_path, run_here):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").write_bytes(b"precious")
    assert run_here(flags(drawings, tmp_path / "run"))[0] == 2
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == b"precious"


# ---- starting from weights, stages, frozen modules


def test_stages_2_and_3(whole, drawings, tmp_path, run_here):
    """Stage 3 starts from the newest run of stage 2 and trains the refiner alone."""
    for stage, weights in ((2, whole[1] / "last.safetensors"), (3, None)):
        args = flags(drawings, f"runs/s{stage}", stage=stage, weights=weights, tile_size=8, tile_pad=4, steps=2,
                     val_every=2, lr=1e-3)
        code, _, err = run_here(args)
        assert code == 0, err
    runs = tmp_path / "runs"
    start, two, two_best, three = (load(p).state_dict() for p in (
        whole[1] / "last.safetensors", runs / "s2/last.safetensors", runs / "s2/best.safetensors",
        runs / "s3/last.safetensors"))
    name = "hat_model.layers.0.residual_group.blocks.0.mlp.fc1.weight"
    assert not torch.equal(start[name], two[name]) and torch.equal(two_best[name], three[name])
    assert not torch.equal(two_best["out_conv.weight"], three["out_conv.weight"])


def test_fine_tuning_starts_with_the_weights(whole, drawings, tmp_path, run_here):
    """The start is the first row and the first candidate for best."""
    weights = whole[1] / "best.safetensors"
    run_here(flags(drawings, tmp_path / "run", weights=weights, lr=1e-9, steps=2, val_every=2))
    assert rows(tmp_path / "run")[0]["psnr_y"] == max(r["psnr_y"] for r in rows(whole[1]))


def test_weights_of_another_scale_fit_where_they_can(whole, drawings, tmp_path, run_here):
    code, out, _ = run_here(flags(drawings, tmp_path / "run", scale=3, weights=whole[1] / "best.safetensors",
                                  steps=1, val_every=1))
    assert code == 0 and "upsample.0.weight" in out
    other = tmp_path / "mid.safetensors"
    save(HATRefiner.from_preset("low"), other)
    assert run_here(flags(drawings, tmp_path / "run2", weights=other))[0] == 2


def test_freeze_by_name(drawings, tmp_path, run_here):
    frozen = "residual_block,out_conv,hat_model.layers.0"
    run_here(flags(drawings, tmp_path / "run", freeze=frozen, steps=2, val_every=2))
    torch.manual_seed(0)
    fresh, net = HATRefiner.from_preset("tiny").state_dict(), load(tmp_path / "run/last.safetensors").state_dict()
    moved = {name.split(".")[2] for name in fresh if ".layers." in name and not torch.equal(fresh[name], net[name])}
    assert moved == {"1"}


def learner_of(drawings, tmp_path, **more):
    args = train.parse(flags(drawings, tmp_path / "run", **more))
    return train.Learner(args, torch.device("cpu"), None, 1, [])


def test_stage_2_reaches_hat_from_every_tile(drawings, tmp_path):
    learner = learner_of(drawings, tmp_path, stage=2, tile_size=8, tile_pad=4)
    for top, left in ((0, 0), (0, 50), (50, 50)):
        learner.model.zero_grad()
        sr = learner.model(torch.rand(1, 3, 32, 32), learner.tiler)
        sr[..., top:top + 8, left:left + 8].sum().backward()
        assert learner.model.hat_model.conv_first.weight.grad.abs().sum() > 0


def test_stage_3_keeps_no_graph_through_hat(drawings, tmp_path):
    learner = learner_of(drawings, tmp_path, stage=3, tile_size=8, tile_pad=4)
    sr = learner.model(torch.rand(1, 3, 16, 16), learner.tiler)
    assert sr.requires_grad and all(p.grad is None for p in learner.model.hat_model.parameters())
    hat = learner.tiler(learner.model.hat_model, torch.rand(1, 3, 16, 16), 2)
    assert not hat.requires_grad


def test_defaults_follow_stage_and_device(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = train.parse(["--device", "cpu"])
    assert (args.stage, args.patch, args.steps, args.use_tiling, args.lr) == (1, [64], 560, False, 2e-3)
    assert train.parse(["--device", "cpu", "--stage", "3"]).use_tiling
    assert not train.parse(["--device", "cpu", "--stage", "3", "--no-use-tiling"]).use_tiling
    assert train.parse(["--device", "cpu", "--optimizer", "adam"]).lr == 1e-3
    monkeypatch.setattr(train, "pick_device", lambda *_: (torch.device("cuda"), None))
    assert train.parse(["--data", "x"]).steps == 50000 and train.parse([]).steps == 560


# ---- steps that fail


def test_step_that_is_not_finite_is_skipped(drawings, tmp_path, run_here, monkeypatch):
    real, steps = train.backward, iter(range(100))

    def backward(learner, *a):
        result = real(learner, *a)
        if next(steps) == 3:
            learner.learning[0].grad[0] = float("nan")
        return result
    monkeypatch.setattr(train, "backward", backward)
    assert run_here(flags(drawings, tmp_path / "run"))[0] == 0
    assert rows(tmp_path / "run")[-1]["skipped"] == "1"
    assert all(v.isfinite().all() for v in load(tmp_path / "run/last.safetensors").state_dict().values())


def test_bad_steps_in_a_row_end_the_run(drawings, tmp_path, run_here, monkeypatch):
    real = train.backward

    def backward(learner, *a):
        result = real(learner, *a)
        return {name: value * float("nan") for name, value in result[0].items()}, {}
    monkeypatch.setattr(train, "backward", backward)
    code, _, err = run_here(flags(drawings, tmp_path / "run", steps=18))
    assert code == 2 and "not finite in 10 steps in a row" in err
    assert all(v.isfinite().all() for v in load(tmp_path / "run/last.safetensors").state_dict().values())


def test_editors_mistake_shows_its_traceback(drawings, tmp_path):
    """`a, b = 1, 2, 3` in the loop ends the process with file and line."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "train.py").read_text()
    mark = "        batches = stream.next_step(step, fraction)\n"
    assert mark in text
    (tmp_path / "train.py").write_text(text.replace(mark, mark + "        a, b = 1, 2, 3\n"))
    p = start(flags(drawings, tmp_path / "run", workers=2), tmp_path, tmp_path / "train.py")
    _, err = p.communicate(timeout=60)
    assert p.returncode == 1 and "a, b = 1, 2, 3" in err and "train.py" in err and "ValueError" in err


# ---- data


def test_val_inside_data_is_not_trained_on(drawings, tmp_path, run_here):
    run = tmp_path / "run"
    code, out, _ = run_here(flags(drawings, run, data=drawings, steps=1, val_every=1))
    assert code == 0
    held_out = json.loads((run / "args.json").read_text())["held_out"]
    assert sorted(Path(p).name for p in held_out) == ["壁紙 10.png", "壁紙 11.png"]


def test_validation_files_among_the_data_are_held_out(drawings, tmp_path, run_here):
    files = sorted((drawings / "train").iterdir())
    more = flags(drawings, tmp_path / "run", data=None, val=files[0], steps=1, val_every=1)
    code, out, err = run_here([*more, "--data", *map(str, files)])
    assert code == 0 and "1 pictures of --val are also in --data" in out, err
    code, _, err = run_here([*flags(drawings, tmp_path / "b", data=None, val=None), "--data", "a.safetensors"])
    assert code == 2 and "--val" in err


def test_flat_validation_pictures_are_skipped(drawings, tmp_path, run_here):
    (tmp_path / "val").mkdir()
    draw(tmp_path / "val/a.png", 3)
    Image.new("RGB", (96, 96), (254, 30, 77)).save(tmp_path / "val/flat.png")
    code, out, err = run_here(flags(drawings, tmp_path / "run", val=tmp_path / "val", steps=1, val_every=1))
    assert code == 0 and "1 validation pictures" in out and "inf" not in out, err


def test_without_val_pictures_are_held_out(tmp_path, run_here):
    (tmp_path / "many").mkdir()
    for seed in range(12):
        draw(tmp_path / "many" / f"{seed}.png", seed)
    args = flags(tmp_path, tmp_path / "run", data=tmp_path / "many", val=None, steps=2, val_every=1)
    assert run_here(args)[0] == 0
    settings = json.loads((tmp_path / "run/args.json").read_text())
    assert len(settings["held_out"]) == 1
    assert run_here(args)[0] == 0       # resumed with the same pictures


def test_seed_does_not_change_validation(drawings, tmp_path, run_here):
    psnr = []
    for seed in (1, 2):
        run_here(flags(drawings, tmp_path / f"{seed}", seed=seed, recipe="web", steps=1, val_every=1, lr=1e-9))
        psnr.append(float(rows(tmp_path / f"{seed}")[0]["psnr_y"]))
    assert abs(psnr[0] - psnr[1]) < 0.01        # the warm start interpolates, whatever the seed


def test_pairs_validate_on_their_own_lr(drawings, tmp_path, run_here):
    """The LR pictures are gray, so the bicubic score of validation differs from that of any recipe."""
    for path in (drawings / "val").iterdir():
        for side in ("hr", "lr"):
            (tmp_path / "val" / side).mkdir(parents=True, exist_ok=True)
        with Image.open(path) as picture:
            picture.save(tmp_path / "val/hr" / path.name)
            Image.new("RGB", (picture.width // 2, picture.height // 2), "gray").save(tmp_path / "val/lr" / path.name)
    scores = {}
    for val in (drawings / "val", tmp_path / "val"):
        out = run_here(flags(drawings, tmp_path / f"run{len(scores)}", steps=1, val=val))[1]
        scores[val] = float(out.partition("bicubic ")[2].split()[0])
    assert scores[tmp_path / "val"] < scores[drawings / "val"] - 1 and "--lr-dir" in out


def test_shares_and_patch_files(drawings, tmp_path, run_here):
    (tmp_path / "more").mkdir()
    draw(tmp_path / "more" / "a.png", 20)
    data = [str(drawings / "train") + "@0.25", str(tmp_path / "more")]
    args = [s for s in flags(drawings, tmp_path / "run", steps=1, val_every=1) if s != str(drawings / "train")]
    args[args.index("--data"):args.index("--data") + 1] = ["--data", *data]
    code, _, err = run_here(args)
    assert code == 0, err
    packed = next((tmp_path / "patches").glob("train-*.safetensors"))
    assert run_here(flags(drawings, tmp_path / "run2", data=packed, steps=1, val_every=1))[0] == 0


def test_bad_pictures_are_named_and_skipped(drawings, tmp_path, run_here):
    (tmp_path / "some").mkdir()
    for path in (drawings / "train").iterdir():
        (tmp_path / "some" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "some" / "broken.png").write_bytes(b"no picture")
    code, out, err = run_here(flags(drawings, tmp_path / "run", data=tmp_path / "some", steps=1, val_every=1))
    assert code == 0 and "broken.png" in out + err


# ---- the discriminator, the clock


def test_discriminator_learns_before_the_term_adv(drawings, tmp_path, run_here):
    run = tmp_path / "run"
    assert run_here(flags(drawings, run, loss="rmse,adv", gan_after=6))[0] == 0
    assert [bool(r["d"]) for r in rows(run)] == [False, True, True, True, True]
    assert [bool(r["adv"]) for r in rows(run)] == [False, False, False, True, True]


def test_minutes_end_the_run(drawings, tmp_path, run_here, monkeypatch):
    """The learning rate falls by the clock, which is simulated here: each look at it takes 0.1 s."""
    looks = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(looks) / 10))
    run = tmp_path / "run"
    assert run_here(flags(drawings, run, minutes=0.2, steps=None, val_every=None))[0] == 0
    assert 10 <= len(rows(run)) <= 12
    rates = [float(r["lr"]) for r in rows(run)[1:]]
    assert rates[-1] < 0.1 * max(rates)


def test_each_patch_size_is_compiled_on_its_own(drawings, tmp_path, run_here, monkeypatch):
    """Inductor fails on graphs with symbolic sizes. Running the graphs uncompiled saves minutes here."""
    sizes, compile_module = [], torch.nn.Module.compile

    def backend(graph, inputs):
        sizes.append([x for x in inputs if isinstance(x, torch.SymInt)])
        return graph
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how))
    torch.compiler.reset()
    args = flags(drawings, tmp_path / "run", patch="8,16", batch=8, compile=True, steps=6, val_every=6)
    assert run_here(args)[0] == 0
    assert sizes == [[]] * 6        # two patch sizes; blocks with and without shift, overlapping blocks


# ---- several processes


def torchrun(args, cwd, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
               ROOT / "train.py", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_two_ranks_equal_one_with_twice_the_batch(drawings, tmp_path, run_here):
    more = dict(steps=3, val_every=3, optimizer="adam")
    torchrun(flags(drawings, tmp_path / "two", batch=2, **more), tmp_path)
    assert run_here(flags(drawings, tmp_path / "one", batch=4, **more))[0] == 0
    one, two = state_of(tmp_path / "one")["model"], state_of(tmp_path / "two")["model"]
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


# ---- mistakes


@pytest.mark.parametrize("more", [
    dict(data="nowhere"), dict(val="nowhere"), dict(weights="nowhere"),
    dict(loss="pixx"), dict(recipe="webb"), dict(freeze="hat"), dict(loss="rmse,adv", gan_after=12),
    dict(stage=2), dict(minutes=1), dict(loss="rmse,perc", vgg_weights="x")], ids=str)
def test_mistakes_are_one_line(drawings, tmp_path, run_here, more):
    code, _, err = run_here(flags(drawings, tmp_path / "run", **more))
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    assert not (tmp_path / "run" / "state.pt").exists()
