"""The artifact detector: visible artifacts, training and resuming, measuring, inspecting; and the shipped weights."""
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import degrade
import demo
import detect
from losses import CLASSES, artifact_log_odds, load_detector

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
    return [rgb for _, rgb in detect.read_pictures([folder])]


@pytest.fixture
def batches_of(monkeypatch):
    """ArtifactBatches that always get the same crops."""
    def make(hr, seed=0):
        batches = detect.ArtifactBatches.__new__(detect.ArtifactBatches)
        batches.seed, batches.steps = seed, 1000
        monkeypatch.setattr(data.Batches, "__getitem__", lambda self, step: (None, hr))
        return batches
    return make


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
    found = []
    for order in itertools.permutations(range(3)):
        x = clean[list(order)]
        a, b = x.double() - x.mean(), shown.double() - shown.mean()
        contrast = (a * b).mean() / (a * a).mean()
        found.append(((contrast * a - b).abs().max() < 1 / 255, (a * b).mean() / (a.std() * b.std()), order, contrast.item()))
    exact, alike, order, contrast = max(found)
    assert exact or alike > 0.97, "another picture"
    return order, contrast, not exact


def test_four_versions_of_every_crop(drawn, batches_of):
    hr = torch.stack([x[:, 40:136, 40:136] for x in read(drawn / "val")])
    faults, kinds, orders, contrasts, sharpened = batches_of(hr, seed=4), set(), set(), set(), 0
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
    again, other = batches_of(hr, seed=4)[5], batches_of(hr, seed=1)[5]
    assert torch.equal(again[0], x) and torch.equal(again[1], targets) and not torch.equal(other[0], x)
    blank = batches_of(torch.full((1, 3, 96, 96), 1.0))[0]
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


def test_confusion_counts_predictions(drawn, capsys):
    pictures = read(drawn / "val")
    table = detect.confusion(Says(lambda x: torch.eye(8)[[4] * len(x)]), pictures)
    assert table[:, 4].sum() == table.sum() and table[0, 4] == 3 and table.sum() > 20
    detect.print_confusion(table)
    out = capsys.readouterr().out.splitlines()
    assert "100.0%" in out[5] and f"{table[4, 4].item() / table.sum().item():.1%}" in out[-1]
    blank = detect.confusion(Says(lambda x: torch.eye(8)[[0] * len(x)]), [torch.ones(3, 64, 64)])
    assert blank[4].sum() == 0 and blank[0, 0] == 1, "an invisible blur was counted"


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
    monkeypatch.setattr(detect, "REPORTS", 2)
    monkeypatch.setattr(detect, "SIDES", (64, 128))     # quicker
    args = ["train", "--data", drawn / "train", "--val", drawn / "val", "--batch", "4", "--workers", "0"]
    code, out, err = run(monkeypatch, capsys, *args, "--steps", "4", "--out", "once")
    assert code == 0 and "step 2/4" in out and "step 4/4" in out, err
    once = Path("once/detector.safetensors").read_bytes()
    code, out, err = run(monkeypatch, capsys, *args, "--steps", "4", "--out", "once")       # a finished run
    assert code == 0 and Path("once/detector.safetensors").read_bytes() == once and "step 4/4" not in out

    reports, confusion = [], detect.confusion

    def interrupt(*args):
        reports.append(1)
        if len(reports) == 2:
            raise KeyboardInterrupt
        return confusion(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(detect, "confusion", interrupt)
        run(monkeypatch, capsys, *args, "--steps", "4", "--out", "twice")
    assert not Path("twice/detector.safetensors").exists()
    assert run(monkeypatch, capsys, *args, "--steps", "4", "--out", "twice")[0] == 0
    assert Path("twice/detector.safetensors").read_bytes() == once
    code, _, err = run(monkeypatch, capsys, *args, "--steps", "5", "--out", "once")
    assert code == 2 and "once" in err
    assert load_detector("once/detector.safetensors")(torch.rand(1, 3, 32, 32)).shape == (1, 8)


def test_measure_and_inspect(drawn, tmp_path, monkeypatch, capsys):
    for path in (drawn / "val").glob("*.png"):
        Image.open(path).crop((0, 0, 160, 140)).save(tmp_path / path.name)
    Image.new("RGB", (90, 70)).save(tmp_path / "壁 紙.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    code, out, err = run(monkeypatch, capsys, "measure", tmp_path)
    assert code == 0 and err.count("broken.png") == 1, err
    rows = out.splitlines()
    assert [row.split()[0] for row in rows[1:9]] == list(CLASSES) and sum(map(int, rows[1].split()[1:9])) == 4
    code, out, err = run(monkeypatch, capsys, "inspect", tmp_path)
    assert code == 0 and err.count("broken.png") == 1 and len(out.splitlines()) == 4, err
    line = next(line for line in out.splitlines() if "壁 紙.png: clean " in line)
    values = [float(word) for word in line.split("壁 紙.png: ")[1].split()[1::2]]
    assert sum(values) == pytest.approx(1, abs=0.05) and all(name in line for name in CLASSES)
    for wrong in (("inspect", "absent.png"), ("measure", tmp_path, "--detector", "absent.safetensors")):
        code, _, err = run(monkeypatch, capsys, *wrong)
        assert code == 2 and err.startswith("error: ") and "absent" in err


def test_the_shipped_detector_orders_growing_damage(drawn):
    """On drawings of a kind it was not trained on."""
    detector = load_detector(ROOT / "weights" / "detector.safetensors")
    for x in read(drawn / "val"):
        jpeg = [degrade.compress(x, "jpeg", quality) for quality in (90, 60, 30)]
        blur = [degrade.to_8_bit(degrade.gaussian_blur(x, sigma)) for sigma in (0.5, 1.0, 2.0)]
        for damaged in (jpeg, blur):
            scores = [artifact_log_odds(detector(picture[None])).item() for picture in damaged]
            assert scores == sorted(scores)
