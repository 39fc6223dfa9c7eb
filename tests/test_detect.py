"""detect.py: faults that can be seen, training, measuring; and the detector that ships."""
import csv
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import degrade
import demo
import detect
import train
from losses import CLASSES, ArtifactDetector, dirt, load_detector, save_detector

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("描 いた")
    demo.draw_demo(folder / "all", train=2, val=3)
    for name in ("train", "val"):       # a part of each is enough
        for path in (folder / "all" / name).glob("*.png"):
            picture = Image.open(path)
            (folder / name).mkdir(exist_ok=True)
            w, h = picture.size
            picture.crop((w // 2 - 160, h // 2 - 128, w // 2 + 160, h // 2 + 128)).save(folder / name / path.name)
    return folder


def read(folder):
    return [detect.composite(detect.read_picture(p), 1.0) for p in detect.find_pictures([folder])]


class Batches:
    """Stands for data.Batches: what is drawn into these crops is looked at."""
    def __init__(self, hr, seed=0):
        self.hr, self.seed = hr, seed

    def __len__(self):
        return 1000

    def __getitem__(self, step):
        return None, self.hr


class Says(torch.nn.Module):
    """A detector whose logits are a function of the pictures."""
    def __init__(self, f):
        super().__init__()
        self.p, self.f = torch.nn.Parameter(torch.zeros(1)), f

    def forward(self, x):
        return self.f(x)


def test_classes_are_clean_and_the_faults():
    assert CLASSES == ("clean", *degrade.ARTIFACTS)


def test_visible_is_what_an_eye_would_see(drawn):
    flat = torch.full((3, 64, 64), 0.4)
    assert detect.visible(flat, flat) == 0
    assert detect.visible(flat, flat + 9 / 255) < 1e-3, "another flat colour is no fault"
    assert detect.visible(flat, degrade.artifact(flat[None], "blur", 1.0, [0])[0]) < detect.SEEN
    step = flat.clone()
    step[:, 20:] += 4 / 255
    assert detect.visible(flat, step) == pytest.approx(4 / 16, rel=1e-3)        # one step in a window of 16
    rough = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    hidden = rough.clone()
    hidden[:, 20:] += 4 / 255
    assert detect.visible(rough, hidden) < 0.1 * detect.visible(flat, step)
    x = read(drawn / "val")[0]
    for kind in degrade.ARTIFACTS:
        seen = [detect.visible(x, degrade.artifact(x[None], kind, s, [3])[0]) for s in (0.1, 0.4, 1.0)]
        assert seen[2] > detect.SEEN and (seen[0] < seen[2] or kind == "blocking"), kind   # whose blocks end up flat


def recoloured(clean, shown):
    """-> (the order of clean's channels in shown, the contrast that is left, whether shown is sharper as well)."""
    def fine(x):
        return (x - degrade.gaussian_blur(x, 1.2)).square().mean()
    found = []
    for order in itertools.permutations(range(3)):
        x = clean[list(order)]
        a, b = x.double() - x.mean(), shown.double() - shown.mean()
        contrast = (a * b).mean() / (a * a).mean()
        found.append(((contrast * a - b).abs().max() < 1 / 255, (a * b).mean() / (a.std() * b.std()), order, contrast.item()))
    exact, alike, order, contrast = max(found)
    assert exact or alike > 0.97 and fine(shown) > 1.02 * contrast ** 2 * fine(clean), "another picture"
    return order, contrast, not exact


def test_four_versions_of_every_crop(drawn):
    hr = torch.stack([x[:, 40:136, 40:136] for x in read(drawn / "val")])
    faults, kinds, orders, contrasts, sharpened = detect.Faults(Batches(hr, seed=4)), set(), set(), set(), 0
    for step in range(6):
        x, targets = faults[step]
        assert x.shape == (12, 3, 96, 96) and targets.shape == (12, 8)
        assert torch.allclose(targets.sum(1), torch.ones(12))
        assert (targets[::4, 0] == 1).all()
        for clean, shown in zip(hr, x[::4]):
            order, contrast, sharper = recoloured(clean, shown)
            assert 0.39 < contrast < (1.03 if sharper else 1.01)
            orders, sharpened = orders | {order}, sharpened + sharper
            contrasts |= set() if sharper else {contrast > 0.999}
        for i in range(0, 12, 4):
            assert targets[i + 1].argmax() in (0, targets[i + 2].argmax()), "less of the same fault"
            weak, strong = ((x[i + k] - x[i]).square().mean() for k in (1, 2))
            # two nearly equal strengths of banding may be the other way round; none of these are
            assert strong >= weak or targets[i + 2].argmax() == CLASSES.index("seam")
            kinds |= set(targets[i + 2:i + 4].argmax(1).tolist())
    assert kinds >= set(range(1, 8)) and len(orders) > 1 and contrasts == {True, False} and 2 <= sharpened <= 9
    again, other = detect.Faults(Batches(hr, seed=4))[5], detect.Faults(Batches(hr, seed=1))[5]
    assert torch.equal(again[0], x) and torch.equal(again[1], targets) and not torch.equal(other[0], x)
    blank = detect.Faults(Batches(torch.full((1, 3, 96, 96), 1.0)))[0]
    unseen = (blank[0] - 1).abs().amax((1, 2, 3)) == 0
    assert unseen.sum() >= 1 and (blank[1][unseen, 0] == 1).all(), "a fault that changes nothing is clean"


def test_the_loss_of_a_batch():
    logits = torch.zeros(4, 8, requires_grad=True)
    targets = torch.eye(8)[[0, 2, 2, 5]]
    loss = detect.learn(Says(lambda x: logits), torch.zeros(4, 3, 8, 8), targets)
    assert loss.item() == pytest.approx(math.log(8) + 0.5 * math.log(2))
    slope, = torch.autograd.grad(loss, logits)
    assert slope[0, 0] < 0 < slope[0, 2] and slope[1, 2] < 0 and slope[3, 5] < 0
    slope, = torch.autograd.grad(detect.learn(Says(lambda x: logits), torch.zeros(4, 3, 8, 8), torch.full((4, 8), 1 / 8)), logits)
    assert slope[0, 1] > 0 > slope[2, 1] and slope[3, 1] < 0       # nothing but the order pulls there
    right, wrong = torch.eye(8)[[0, 0, 2, 5]] * 9, torch.eye(8)[[2, 0, 0, 0]] * 9
    losses = [detect.learn(Says(lambda x: r), torch.zeros(4, 3, 8, 8), targets).item() for r in (right, wrong)]
    assert losses[1] > losses[0] + 5
    assert dirt(torch.tensor([[math.log(3.0), 0, 0, 0] + [-math.inf] * 4])).item() == pytest.approx(0, abs=1e-6)


def test_tables_count_what_is_said(drawn, capsys):
    pictures = read(drawn / "val")
    table = detect.confusion(Says(lambda x: torch.eye(8)[[4] * len(x)]), pictures)
    assert table[:, 4].sum() == table.sum() and table[0, 4] == 3 and table.sum() > 20
    right, recall = detect.shares(table)
    assert right == pytest.approx(table[4, 4].item() / table.sum().item()) and recall == 0
    assert "100.0%" in detect.shown(table).splitlines()[5]
    blank = detect.confusion(Says(lambda x: torch.eye(8)[[0] * len(x)]), [torch.ones(3, 64, 64)])
    assert blank[4].sum() == 0 and detect.shares(blank)[1] == 1, "blur of nothing is not counted"
    soft = Says(lambda x: torch.eye(8)[[0] * len(x)] * (x.diff().abs().mean() * 100))
    found = detect.scores(soft, pictures[0])
    assert found["blur"] == sorted(found["blur"]) and len(found["jpeg"]) == 3


def test_crops_are_busy_and_known_by_their_seed(drawn):
    paths = detect.find_pictures([drawn / "val"])
    crops = detect.held_out(paths, 64, 2)
    assert len(crops) == 6 and all(c.shape == (3, 64, 64) for c in crops)
    assert all(torch.equal(a, b) for a, b in zip(crops, detect.held_out(paths, 64, 2)))
    plain = np.mean([data.detail((x[:, :64, :64] * 255).byte().permute(1, 2, 0).numpy()) for x in read(drawn / "val")])
    assert np.mean([data.detail((c * 255).byte().permute(1, 2, 0).numpy()) for c in crops]) > plain
    with pytest.raises(ValueError, match="no picture to measure on has 999"):
        detect.held_out(paths, 999)


def run(monkeypatch, capsys, main, *args):
    monkeypatch.setattr(sys, "argv", ["it", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_it_is_trained_resumed_and_used(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    held_out = detect.held_out
    monkeypatch.setattr(detect, "held_out", lambda paths, count: held_out(paths, 64, 1))    # it is measured often here
    args = ["--detector", "--data", drawn / "train", "--val", drawn / "val", "--batch", "8", "--every", "2",
            "--workers", "0", "--amp", "off", "--steps", "4"]
    code, said, err = run(monkeypatch, capsys, train.main, *args, "--out", "once")
    assert code == 0 and "clean recall" in said and "oversharp" in said and "step 4/4" in said, err
    assert "crops of 128, 256, 3 held-out" in said     # what the patches hold
    table = list(csv.reader(open("once/confusion.csv")))
    assert len(table) == 9 and sum(map(int, table[1][1:])) == 3 and table[1][0] == "clean"
    once = Path("once/detector.safetensors").read_bytes()
    code, said, err = run(monkeypatch, capsys, train.main, *args, "--out", "once")       # a finished run, again
    assert code == 0 and Path("once/detector.safetensors").read_bytes() == once and "step 4" not in said
    reports, shares = [], detect.shares

    def pulled_plug(table):
        reports.append(1)
        if len(reports) == 2:
            raise KeyboardInterrupt
        return shares(table)
    with monkeypatch.context() as m:
        m.setattr(detect, "shares", pulled_plug)
        assert run(monkeypatch, capsys, train.main, *args, "--out", "twice")[0] == 130
    assert run(monkeypatch, capsys, train.main, *args, "--out", "twice")[0] == 0
    assert Path("twice/detector.safetensors").read_bytes() == once, "stopped and resumed is unbroken"
    assert run(monkeypatch, capsys, train.main, *args, "--out", "again", "--weights", "once/detector.safetensors")[0] == 0
    one, two = (load_detector(f"{name}/detector.safetensors").state_dict() for name in ("once", "again"))
    moved = {k for k in one if not torch.equal(one[k], two[k])}
    assert moved and not any("running" in k for k in moved), "batch norms stay as they are in what is learned further"
    more = ["--stage", "1", "--preset", "tiny", "--patch", "16", "--batch", "2", "--steps", "2", "--every", "2",
            "--workers", "0", "--amp", "off", "--device", "cpu", "--data", drawn / "train", "--val", drawn / "val",
            "--out", "sr", "--loss", "pix,art_cls,art_feat", "--detector", "once/detector.safetensors"]
    code, said, err = run(monkeypatch, capsys, train.main, *more)
    assert code == 0, err
    row = list(csv.DictReader(open("sr/log.csv")))[-1]
    assert float(row["art_cls_grad"]) > 0 and float(row["art_feat_grad"]) > 0
    assert Path("once/detector.safetensors").read_bytes() == once


def test_it_is_resumed_on_demo_pictures(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawn, tmp_path / "demo")       # as if drawn before
    held_out = detect.held_out
    monkeypatch.setattr(detect, "held_out", lambda paths, count: held_out(paths, 64, 1))
    for _ in range(2):
        code, _, err = run(monkeypatch, capsys, train.main, "--detector", "--batch", "8", "--every", "1", "--steps", "1",
                           "--workers", "0", "--amp", "off", "--out", "d")
        assert code == 0, err


def test_no_picture_to_measure_on_is_one_line(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, err = run(monkeypatch, capsys, train.main, "--detector", "--data", drawn / "train", "--val", "empty")
    assert code == 2 and "no picture to measure on" in err.splitlines()[-1]


def test_a_small_picture_is_left_out(drawn, tmp_path, monkeypatch, capsys):
    shutil.copytree(drawn / "val", tmp_path / "val")
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "icon.png")
    (tmp_path / "val" / "broken.png").write_bytes(b"nothing")
    save_detector(ArtifactDetector(2).eval(), tmp_path / "d.safetensors")
    code, said, err = run(monkeypatch, capsys, detect.main, tmp_path / "val", "--detector", tmp_path / "d.safetensors")
    assert code == 0 and " of 3 pictures" in said and "icon.png is smaller than 32x32" in err
    assert err.count("broken.png") == 1

    def stopped(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(detect, "confusion", stopped)
    assert run(monkeypatch, capsys, detect.main, tmp_path / "val", "--detector", tmp_path / "d.safetensors")[0] == 130


def test_command(drawn, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    save_detector(ArtifactDetector(2).eval(), "d.safetensors")
    code, said, err = run(monkeypatch, capsys, detect.main, drawn / "val", "--detector", "d.safetensors")
    assert code == 0, err
    assert said.count("called") > 3 and "12 crops of 128x128" in said and " of 3 pictures" in said
    asked, confusion = [], detect.confusion
    with monkeypatch.context() as m:
        m.setattr(detect, "confusion", lambda *a: asked.append(a[2:]) or confusion(*a))
        code, _, err = run(monkeypatch, capsys, detect.main, drawn / "val", "--detector", "d.safetensors", "--strength", "0.3",
                           "--seed", "7")
    assert code == 0 and asked == [(0.3, 7), (0.3, 8), (0.3, 9), (0.3, 7)], err
    for args, what in (((drawn / "val", "--detector", "gone"), "no detector gone"),
                       (("gone", "--detector", "d.safetensors"), "gone"),
                       ((drawn / "val", "--detector", "d.safetensors", "--device", "xpu"), "not compiled"),
                       ((drawn / "val", "--detector", "d.safetensors", "--strength", "2"), "of 0 to 1"),
                       ((drawn / "val", "--detector", "d.safetensors", "--device", "gpu9"), "gpu9")):
        code, said, err = run(monkeypatch, capsys, detect.main, *args)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and what in err, err
    done = subprocess.run([sys.executable, ROOT / "detect.py", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "held_out" in done.stdout


def test_the_shipped_detector_knows_more_from_less(drawn):
    """On drawings of a kind it never saw."""
    detector = load_detector(ROOT / "weights" / "detector.safetensors")
    for x in read(drawn / "val"):
        for kind, found in detect.scores(detector, x).items():
            assert found == sorted(found), kind
