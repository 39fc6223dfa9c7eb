"""The artifact detector: visible artifacts, training and resuming, measuring, inspecting; and the shipped weights."""
import csv
import itertools
import json
import math
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
import images
from losses import CLASSES, ArtifactDetector, artifact_log_odds, load_detector

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("描 いた")
    demo.draw_demo(folder / "all", train=2, val=3)
    for name in ("train", "val"):       # the middle of each is enough
        for path in (folder / "all" / name).glob("*.png"):
            picture = Image.open(path)
            (folder / name).mkdir(exist_ok=True)
            w, h = picture.size
            picture.crop((w // 2 - 160, h // 2 - 128, w // 2 + 160, h // 2 + 128)).save(folder / name / path.name)
    return folder


def read(folder):
    return [rgb for _, _, rgb in detect.read_pictures(images.find_pictures([folder]))]


class Batches:
    """In place of data.Batches: always the same crops."""
    def __init__(self, hr, seed=0):
        self.hr, self.seed = hr, seed

    def __len__(self):
        return 1000

    def __getitem__(self, step):
        return None, self.hr


class Says(torch.nn.Module):
    """A detector whose logits are a given function of the pictures."""
    def __init__(self, f):
        super().__init__()
        self.p, self.f = torch.nn.Parameter(torch.zeros(1)), f

    def forward(self, x):
        return self.f(x)


def test_classes_are_clean_and_the_artifacts():
    assert CLASSES == ("clean", *degrade.ARTIFACTS)


def test_visibility(drawn):
    flat = torch.full((3, 64, 64), 0.4)
    assert detect.visibility(flat, flat) == 0
    assert detect.visibility(flat, flat + 9 / 255) < 1e-3, "another flat color is not an artifact"
    assert detect.visibility(flat, degrade.artifact(flat[None], "blur", 1.0, [0])[0]) < detect.VISIBLE
    step = flat.clone()
    step[:, 20:] += 4 / 255
    assert detect.visibility(flat, step) == pytest.approx(4 / 16, rel=1e-3)        # one step in a window of 16
    rough = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    hidden = rough.clone()
    hidden[:, 20:] += 4 / 255
    assert detect.visibility(rough, hidden) < 0.1 * detect.visibility(flat, step)
    x = read(drawn / "val")[0]
    for kind in degrade.ARTIFACTS:
        seen = [detect.visibility(x, degrade.artifact(x[None], kind, s, [3])[0]) for s in (0.1, 0.4, 1.0)]
        assert seen[2] > detect.VISIBLE and (seen[0] < seen[2] or kind == "blocking"), kind   # its blocks become flat


def find_changes(clean, shown):
    """Return (the channel order of shown, its contrast relative to clean, whether it is also sharper)."""
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
    faults, kinds, orders, contrasts, sharpened = detect.ArtifactBatches(Batches(hr, seed=4)), set(), set(), set(), 0
    for step in range(6):
        x, targets = faults[step]
        assert x.shape == (12, 3, 96, 96) and targets.shape == (12, 8)
        assert torch.allclose(targets.sum(1), torch.ones(12))
        assert (targets[::4, 0] == 1).all()
        for clean, shown in zip(hr, x[::4]):
            order, contrast, sharper = find_changes(clean, shown)
            assert 0.39 < contrast < (1.03 if sharper else 1.01)
            orders, sharpened = orders | {order}, sharpened + sharper
            contrasts |= set() if sharper else {contrast > 0.999}
        for i in range(0, 12, 4):
            assert targets[i + 1].argmax() in (0, targets[i + 2].argmax()), "the weak version has another class"
            weak, strong = ((x[i + k] - x[i]).square().mean() for k in (1, 2))
            # a weak seam at another place may differ more
            assert strong >= weak or targets[i + 2].argmax() == CLASSES.index("seam")
            kinds |= set(targets[i + 2:i + 4].argmax(1).tolist())
    assert kinds >= set(range(1, 8)) and len(orders) > 1 and contrasts == {True, False} and 2 <= sharpened <= 9
    again, other = detect.ArtifactBatches(Batches(hr, seed=4))[5], detect.ArtifactBatches(Batches(hr, seed=1))[5]
    assert torch.equal(again[0], x) and torch.equal(again[1], targets) and not torch.equal(other[0], x)
    blank = detect.ArtifactBatches(Batches(torch.full((1, 3, 96, 96), 1.0)))[0]
    unseen = (blank[0] - 1).abs().amax((1, 2, 3)) == 0
    assert unseen.sum() >= 1 and (blank[1][unseen, 0] == 1).all(), "an artifact that changes nothing is clean"


def test_detector_loss():
    logits = torch.zeros(4, 8, requires_grad=True)
    targets = torch.eye(8)[[0, 2, 2, 5]]
    loss = detect.detector_loss(Says(lambda x: logits), torch.zeros(4, 3, 8, 8), targets)
    assert loss.item() == pytest.approx(math.log(8) + 0.5 * math.log(2))
    slope, = torch.autograd.grad(loss, logits)
    assert slope[0, 0] < 0 < slope[0, 2] and slope[1, 2] < 0 and slope[3, 5] < 0
    slope, = torch.autograd.grad(detect.detector_loss(Says(lambda x: logits), torch.zeros(4, 3, 8, 8), torch.full((4, 8), 1 / 8)), logits)
    assert slope[0, 1] > 0 > slope[2, 1] and slope[3, 1] < 0       # only the order has a gradient there
    right, wrong = torch.eye(8)[[0, 0, 2, 5]] * 9, torch.eye(8)[[2, 0, 0, 0]] * 9
    losses = [detect.detector_loss(Says(lambda x: r), torch.zeros(4, 3, 8, 8), targets).item() for r in (right, wrong)]
    assert losses[1] > losses[0] + 5
    assert artifact_log_odds(torch.tensor([[math.log(3.0), 0, 0, 0] + [-math.inf] * 4])).item() == pytest.approx(0, abs=1e-6)


def test_confusion_counts_answers(drawn):
    pictures = read(drawn / "val")
    table = detect.confusion(Says(lambda x: torch.eye(8)[[4] * len(x)]), pictures)
    assert table[:, 4].sum() == table.sum() and table[0, 4] == 3 and table.sum() > 20
    right, recall = detect.accuracy(table)
    assert right == pytest.approx(table[4, 4].item() / table.sum().item()) and recall == 0
    assert "100.0%" in detect.format_confusion(table).splitlines()[5]
    blank = detect.confusion(Says(lambda x: torch.eye(8)[[0] * len(x)]), [torch.ones(3, 64, 64)])
    assert blank[4].sum() == 0 and detect.accuracy(blank)[1] == 1, "an invisible blur was counted"
    soft = Says(lambda x: torch.eye(8)[[0] * len(x)] * (x.diff().abs().mean() * 100))
    found = detect.score_damage(soft, pictures[0])
    assert found["blur"] == sorted(found["blur"]) and len(found["jpeg"]) == 3


def test_crops_are_detailed_and_fixed_by_their_seed(drawn):
    pictures = [*detect.read_pictures(images.find_pictures([drawn / "val"]))]
    crops = detect.cut_crops(pictures, 64, 2)
    assert len(crops) == 6 and all(c.shape == (3, 64, 64) for c in crops)
    assert all(torch.equal(a, b) for a, b in zip(crops, detect.cut_crops(pictures, 64, 2)))

    def mean_detail(crops):
        return np.mean([data.detail(images.to_uint8(c)) for c in crops])
    assert mean_detail(crops) > mean_detail([rgb[:, :64, :64] for _, _, rgb in pictures])
    assert detect.cut_crops(pictures, 999) == []


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["detect.py", *map(str, args)])
    code = 0
    try:
        detect.main()
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_training_resumes_to_the_bit(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cut_crops = detect.cut_crops
    monkeypatch.setattr(detect, "cut_crops", lambda pictures, count: cut_crops(pictures, 64, 1))    # quicker
    args = ["train", "--data", drawn / "train", "--val", drawn / "val", "--batch", "4", "--val-every", "2",
            "--workers", "0", "--steps", "4"]
    code, out, err = run(monkeypatch, capsys, *args, "--out", "once")
    assert code == 0 and "step 4/4" in out and "crops of 128, 256 pixels, 3 validation" in out, err
    table = list(csv.reader(open("once/confusion.csv")))
    assert len(table) == 9 and sum(map(int, table[1][1:])) == 3 and table[1][0] == "clean"
    log = list(csv.DictReader(open("once/log.csv")))
    assert [row["step"] for row in log] == ["2", "4"] and all(float(row["loss"]) > 0 for row in log)
    once = Path("once/detector.safetensors").read_bytes()
    code, out, err = run(monkeypatch, capsys, *args, "--out", "once")       # a finished run
    assert code == 0 and Path("once/detector.safetensors").read_bytes() == once and "step 4/4" not in out

    reports, accuracy = [], detect.accuracy

    def interrupt(table):
        reports.append(1)
        if len(reports) == 2:
            raise KeyboardInterrupt
        return accuracy(table)
    with monkeypatch.context() as m:
        m.setattr(detect, "accuracy", interrupt)
        assert run(monkeypatch, capsys, *args, "--out", "twice")[0] == 130
    assert not Path("twice/detector.safetensors").exists()
    settings = json.loads(Path("twice/args.json").read_text())
    del settings["lr"]          # as if that flag were new
    Path("twice/args.json").write_text(json.dumps(settings))
    assert run(monkeypatch, capsys, *args, "--out", "twice")[0] == 0
    assert Path("twice/detector.safetensors").read_bytes() == once
    assert Path("twice/log.csv").read_text() == Path("once/log.csv").read_text()

    code, _, err = run(monkeypatch, capsys, *args, "--out", "once", "--batch", "12")
    assert code == 2 and "--batch" in err
    code, _, err = run(monkeypatch, capsys, *args, "--out", "again", "--weights", "once/detector.safetensors")
    assert code == 0, err
    one, two = (load_detector(f"{name}/detector.safetensors").state_dict() for name in ("once", "again"))
    changed = {k for k in one if not torch.equal(one[k], two[k])}
    assert changed and not any("running" in k for k in changed), "batch norms stay fixed with --weights"


def test_a_part_of_the_data_is_set_aside_without_val(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (12, 140, 140, 3), dtype=np.uint8)
    for i, p in enumerate(pixels):
        Image.fromarray(p).resize((280, 280)).save(tmp_path / "data" / f"{i}.png")
    cut_crops = detect.cut_crops
    monkeypatch.setattr(detect, "cut_crops", lambda pictures, count: cut_crops(pictures, 64, 1))    # quicker
    code, out, err = run(monkeypatch, capsys, "train", "--data", "data", "--steps", "1", "--batch", "4",
                         "--workers", "0")
    assert code == 0 and "1 pictures are set aside" in out and "from 11 pictures" in out, err
    assert Path("runs/detector/detector.safetensors").exists()
    patches = next(Path("patches").glob("*.safetensors"))
    code, _, err = run(monkeypatch, capsys, "train", "--data", patches, "--out", "other")
    assert code == 2 and "--val" in err


def test_no_usable_picture_is_one_line(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    detect.save_detector(ArtifactDetector(2).eval(), tmp_path / "d.safetensors")
    for args in (("train", "--data", drawn / "train", "--val", "empty", "--workers", "0"),
                 ("measure", "empty", "--detector", "d.safetensors"),
                 ("measure", drawn / "val", "--detector", "absent.safetensors"),
                 ("inspect", "absent.png", "--detector", "d.safetensors")):
        code, _, err = run(monkeypatch, capsys, *args)
        assert code == 2 and err.splitlines()[-1].startswith("error: "), err


def test_measure(drawn, tmp_path, monkeypatch, capsys):
    for path in (drawn / "val").glob("*.png"):
        Image.open(path).crop((0, 0, 160, 140)).save(tmp_path / path.name)
    Image.new("RGB", (20, 20)).save(tmp_path / "icon.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    torch.manual_seed(0)
    detect.save_detector(ArtifactDetector(2).eval(), tmp_path / "d.safetensors")
    seeds, confusion = [], detect.confusion
    monkeypatch.setattr(detect, "confusion", lambda *args: seeds.append(args[2:]) or confusion(*args))
    code, out, err = run(monkeypatch, capsys, "measure", tmp_path, "--detector", tmp_path / "d.safetensors",
                         "--strength", "0.3", "--seed", "7")
    assert code == 0, err
    assert out.count(" called ") > 3 and "12 crops of 128x128" in out and " of 3 pictures" in out
    assert err.count("broken.png") == 1 and err.count("icon.png") == 1
    assert {strength for strength, _ in seeds} == {0.3} and seeds[-1] == (0.3, 7)
    code, _, err = run(monkeypatch, capsys, "measure", tmp_path, "--strength", "2")
    assert code == 2 and "between 0 and 1" in err


def test_inspect(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = (torch.rand(150, 300, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    Image.fromarray(pixels).save("壁 紙.png")
    detect.save_detector(ArtifactDetector(4).eval(), "d.safetensors")
    args = "inspect", "壁 紙.png", "--detector", "d.safetensors"
    code, out, err = run(monkeypatch, capsys, *args)
    assert code == 0, err
    assert "300x150, 6 patches" in out and all(f"\n{name}" in out for name in CLASSES)
    assert Image.open("壁 紙-artifacts.png").size == (300, 150)
    for more, named in (((), "壁 紙-artifacts.png"), (("-o", "壁 紙.png", "--overwrite"), "壁 紙.png"),
                        (("-o", "a.xyz"), "a.xyz"), (("-o", "absent/a.png"), "absent")):
        code, out, err = run(monkeypatch, capsys, *args, *more)
        assert code == 2 and err.startswith("error: ") and named in err, err
    assert run(monkeypatch, capsys, *args, "--overwrite")[0] == 0
    assert (np.asarray(Image.open("壁 紙.png")) == pixels).all()


def test_the_heat_map_covers_the_picture():
    class Even(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, return_features):
            places = torch.zeros(len(x), 8, 4, 4)
            places[:, 1] = x.mean((1, 2, 3)).view(-1, 1, 1) * 100
            return places.mean((2, 3)), places, []
    rgb = torch.zeros(3, 200, 130)
    rgb[:, 150:] = 1
    probabilities, corners, heat = detect.inspect_picture(Even(), rgb)
    assert sorted(corners) == [(0, 0), (0, 2), (72, 0), (72, 2)] and probabilities.shape == (4, 8)
    assert heat[:72].max() == pytest.approx(7 / 8) and heat[72:].min() > 0.99
    assert detect.inspect_picture(ArtifactDetector(2).eval(), torch.rand(3, 5, 9))[2].shape == (5, 9)


def test_a_detector_is_saved_completely_or_not_at_all(tmp_path, monkeypatch):
    detect.save_detector(ArtifactDetector(2), tmp_path / "d.safetensors", dict(steps=5))
    assert load_detector(tmp_path / "d.safetensors").header["steps"] == 5
    before = (tmp_path / "d.safetensors").read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(images.os, "replace", full_disk)
    with pytest.raises(OSError):
        detect.save_detector(ArtifactDetector(2), tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_the_shipped_detector_orders_growing_damage(drawn):
    """On drawings of a kind it was not trained on."""
    detector = load_detector(ROOT / "weights" / "detector.safetensors")
    for x in read(drawn / "val"):
        for kind, scores in detect.score_damage(detector, x).items():
            assert scores == sorted(scores), kind
