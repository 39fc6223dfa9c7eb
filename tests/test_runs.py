import sys

import pytest

import runs
from images import UserError
from runs import Progress, Run, clock, draw_curves, newest_run


def make_run(folder, psnr, **settings):
    run = Run(folder)
    run.start({"stage": 1, "preset": "tiny", "scale": 2, **settings})
    rows = [dict(step=i, rmse=0.1, lr=1e-3, seconds=i, psnr_y=p, ssim_y=0.9) for i, p in enumerate(psnr)]
    run.save_log(rows)
    run.save_state({"x": 1}, Progress(step=len(psnr), rows=rows))
    return run


def test_state_and_settings_come_back(tmp_path):
    run = make_run(tmp_path / "a", [30.0, 31.0], lr=0.1)
    state = run.load_state()
    assert state["progress"].step == 2 and state["progress"].rows[1]["psnr_y"] == 31.0 and state["x"] == 1
    run.check_settings({"stage": 1, "a_flag_of_tomorrow": 3, "device": "cuda"})
    with pytest.raises(UserError, match="--lr 0.1"):
        run.check_settings({"lr": 0.2})


def test_overwrite_forgets_the_older_run(tmp_path):
    make_run(tmp_path / "a", [30.0])
    for name in "best", "last", "mine":
        (tmp_path / "a" / f"{name}.safetensors").write_bytes(b"")
    run = Run(tmp_path / "a", overwrite=True)
    assert run.settings() == {} and run.load_state() is None
    run.start({"stage": 2})
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"args.json", "samples", "mine.safetensors"}
    assert not {"state.pt", "best.safetensors", "last.safetensors"} & {p.name for p in (tmp_path / "a").iterdir()}
    assert run.settings() == {}     # no state yet


def test_progress_counts_finite_steps_only():
    progress = Progress()
    progress.record({"rmse": 1.0}, finite=True)
    progress.record({"rmse": 3.0}, finite=True)
    progress.record({"rmse": float("nan")}, finite=False)
    assert progress.mean_losses() == {"rmse": 2.0} and progress.skipped_steps == 1


def test_newest_run_of_a_stage(tmp_path):
    for name in ("old", "new"):
        make_run(tmp_path / name, [30.0])
        (tmp_path / name / "best.safetensors").write_bytes(b"")
    make_run(tmp_path / "other", [30.0], stage=2)
    assert newest_run(1, "tiny", 2, tmp_path).endswith("new/best.safetensors")
    with pytest.raises(UserError, match="stage 3"):
        newest_run(3, "tiny", 2, tmp_path)


def test_curves_have_a_panel_for_each_loss(tmp_path):
    rows = [dict(step=0, psnr_y=30.0), dict(step=5, psnr_y=31.0, rmse=0.1, edge=0.2, rmse_grad=1.0)]
    assert draw_curves({"絵": rows, "b": rows}).size == (runs.PANEL_WIDTH, 3 * runs.PANEL_HEIGHT)


def test_compare_command(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "a", [30.0, 32.5, 32.0], lr=0.1)
    make_run(tmp_path / "b", [30.0, 31.0], lr=0.2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["runs.py", "a", "b"])
    runs.main()
    lines = capsys.readouterr().out.splitlines()
    assert "32.50" in lines[1] and "lr=0.1" in lines[1] and "31.00" in lines[2] and "lr=0.2" in lines[2]
    assert (tmp_path / "curves.png").exists()
    monkeypatch.setattr(sys, "argv", ["runs.py", "a", "nowhere"])
    with pytest.raises(SystemExit):
        runs.main()
    assert "nowhere has no log.csv" in capsys.readouterr().err


def test_clock():
    assert clock(65) == "1m05s" and clock(3700) == "1h01m"
