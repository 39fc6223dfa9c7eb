"""pairs.py: matching by name, cropping to matching sizes, LR pictures by a recipe, bad pictures."""
import sys
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_clean import linear_profile

import degrade
import images
import pairs


def save(path, h=24, w=32, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = degrade.to_8_bit(torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)))
    images.save_picture(path, images.Picture(rgb=rgb))
    return rgb


def read(jobs, **options):
    return list(pairs.read_pairs(jobs, 2, **options))


def test_names_are_relative_to_their_folder(tmp_path):
    for name in ("b/c d.png", "a.png"):
        save(tmp_path / "hr" / name)
    save(tmp_path / "空.png")
    found = pairs.list_pictures(tmp_path / "hr") + pairs.list_pictures(tmp_path / "空.png")
    assert [name for name, _ in found] == ["a.png", "b/c d.png", "空.png"]
    assert all(path.is_file() for _, path in found)


def test_pairs_match_by_name_without_suffix(tmp_path):
    a, b = save(tmp_path / "hr/a.png"), save(tmp_path / "hr/x/b c.png", seed=1)
    save(tmp_path / "lr/a.webp", 12, 16)
    small = save(tmp_path / "lr/x/b c.png", 12, 16, seed=2)
    jobs, notes = pairs.match_pairs({"HR": tmp_path / "hr", "LR": tmp_path / "lr"})
    assert [name for name, _ in jobs] == ["a.png", "x/b c.png"] and not notes
    (_, lr_a, hr_a, results), (_, lr_b, hr_b, _) = read(jobs)
    assert torch.equal(hr_a, a) and torch.equal(hr_b, b) and torch.equal(lr_b, small) and lr_a.shape == (3, 12, 16)
    assert results == {}


def test_names_of_div2k(tmp_path):
    """An LR picture may end in xN. It belongs to the HR picture without it, unless one has the whole name."""
    for name in ("0001", "fox2", "fox2x2"):
        save(tmp_path / "hr" / f"{name}.png")
    for name in ("0001x2", "fox2", "fox2x2"):
        save(tmp_path / "lr" / f"{name}.png", 12, 16)
    jobs, _ = pairs.match_pairs({"HR": tmp_path / "hr", "LR": tmp_path / "lr"})
    assert [(name, paths["LR"].name) for name, paths in jobs] == [
        ("0001.png", "0001x2.png"), ("fox2.png", "fox2.png"), ("fox2x2.png", "fox2x2.png")]
    save(tmp_path / "lr/0001x4.png", 6, 8)
    with pytest.raises(images.UserError, match="0001x2.*0001x4"):
        pairs.match_pairs({"HR": tmp_path / "hr", "LR": tmp_path / "lr"})


def test_accents_of_one_or_two_characters_match(tmp_path):
    save(tmp_path / "hr" / (unicodedata.normalize("NFC", "café") + ".png"))
    save(tmp_path / "lr" / (unicodedata.normalize("NFD", "café") + ".png"), 12, 16)
    assert len(pairs.match_pairs({"HR": tmp_path / "hr", "LR": tmp_path / "lr"})[0]) == 1


def test_results_may_be_incomplete_but_lr_may_not(tmp_path):
    for name in "abc":
        save(tmp_path / "hr" / f"{name}.png")
        save(tmp_path / "lr" / f"{name}.png", 12, 16)
    other = save(tmp_path / "other/b.jpg")
    jobs, notes = pairs.match_pairs(dict(HR=tmp_path / "hr", LR=tmp_path / "lr", other=tmp_path / "other"))
    assert [name for name, _ in jobs] == ["b.png"] and len(notes) == 1 and "a, c" in notes[0]
    (_, _, _, results), = read(jobs)
    assert results["other"].shape == other.shape
    (tmp_path / "lr/c.png").unlink()
    save(tmp_path / "lr/d.png", 12, 16)
    with pytest.raises(images.UserError, match="c, d"):
        pairs.match_pairs({"HR": tmp_path / "hr", "LR": tmp_path / "lr"})
    save(tmp_path / "stranger/z.png")
    with pytest.raises(images.UserError, match="stranger"):
        pairs.match_pairs(dict(HR=tmp_path / "hr", stranger=tmp_path / "stranger"))


def test_what_cannot_match_is_named(tmp_path):
    save(tmp_path / "hr/a.png")
    save(tmp_path / "lr/a.png", 12, 16)
    save(tmp_path / "lr/a.jpg", 12, 16)
    with pytest.raises(images.UserError, match=r"a\.jpg.*a\.png"):
        pairs.match_pairs({"HR": tmp_path / "hr", "LR": tmp_path / "lr"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(images.UserError, match="empty"):
        pairs.match_pairs({"HR": tmp_path / "hr", "LR": tmp_path / "empty"})
    with pytest.raises(images.UserError, match="absent"):
        pairs.match_pairs({"HR": tmp_path / "absent"})


def test_single_files_match_whatever_their_names_are(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "z.png", 12, 16)
    (name, paths), = pairs.match_pairs({"HR": tmp_path / "a.png", "LR": tmp_path / "z.png"})[0]
    assert name == "a.png" and paths["LR"].name == "z.png"


def test_sizes(tmp_path, capsys):
    hr = save(tmp_path / "hr.png", 25, 33)
    jobs = [("a.png", dict(HR=tmp_path / "hr.png", LR=tmp_path / "lr.png", other=tmp_path / "other.png"))]
    save(tmp_path / "lr.png", 12, 16)
    save(tmp_path / "other.png", 24, 32)
    (_, lr, cropped, results), = read(jobs)
    assert torch.equal(cropped, hr[:, :24, :32]) and lr.shape == (3, 12, 16) and results["other"].shape == (3, 24, 32)
    del jobs[0][1]["LR"]
    (_, _, cropped, results), = read(jobs)
    assert torch.equal(cropped, hr[:, :24, :32]) and results["other"].shape == (3, 24, 32)
    jobs[0][1]["LR"] = tmp_path / "lr.png"
    save(tmp_path / "other.png", 22, 30)
    skipped = []
    assert read(jobs, skipped=skipped) == [] and "30x22" in skipped[0] and "32x24" in skipped[0]
    assert "a.png" in capsys.readouterr().err


def test_a_pair_of_different_content_is_named(tmp_path, capsys):
    """The LR folder begins one frame later: a.png, b.png, c.png show frames 1, 2, 3 instead of 0, 1, 2."""
    grids = torch.rand(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    frames = [degrade.to_8_bit(F.interpolate(grid[None], (48, 64), mode="nearest")[0]) for grid in grids]
    for name, hr, lr in zip("abc", frames, frames[1:]):
        for folder, rgb in (("hr", hr), ("lr", hr[:, ::2, ::2]), ("shifted", lr[:, ::2, ::2])):
            (tmp_path / folder).mkdir(exist_ok=True)
            images.save_picture(tmp_path / folder / f"{name}.png", images.Picture(rgb=rgb.contiguous()))
    jobs, _ = pairs.match_pairs({"HR": tmp_path / "hr", "LR": tmp_path / "lr"})
    assert len(read(jobs)) == 3
    jobs, _ = pairs.match_pairs({"HR": tmp_path / "hr", "LR": tmp_path / "shifted"})
    skipped = []
    assert read(jobs, skipped=skipped) == [] and len(skipped) == 3
    assert "b.png" in skipped[1] and "different content" in skipped[1] and "b.png" in capsys.readouterr().err


def test_both_sides_of_a_pair_have_the_same_colors_and_orientation(tmp_path):
    """The HR picture has a profile with swapped curves and is stored rotated; the LR picture is plain sRGB."""
    ramp = np.linspace(0, 255, 64)[None, :, None] * np.ones((48, 1, 3))
    linear = np.uint8(255 * (ramp / 255) ** 2.2 + 0.5)
    rotated = Image.Exif()
    rotated[0x0112] = 6                 # the stored picture has to be rotated by 90 degrees clockwise
    stored = Image.fromarray(np.rot90(linear).copy())
    stored.save(tmp_path / "hr.png", icc_profile=linear_profile(), exif=rotated)
    Image.fromarray(np.uint8(ramp[::2, ::2] + 0.5)).save(tmp_path / "lr.png")
    jobs = [("a.png", {"HR": tmp_path / "hr.png", "LR": tmp_path / "lr.png"})]
    (_, lr, hr, _), = read(jobs)
    assert hr.shape == (3, 48, 64) and (hr[:, ::2, ::2] - lr)[..., 4:].abs().max() < 0.03


def test_recipe_gives_the_pictures_of_degrade(tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b/空.png"):
        save(tmp_path / "hr" / name, 25, 32)
    (tmp_path / "hr/cut.png").write_bytes((tmp_path / "hr/a.png").read_bytes()[:200])
    monkeypatch.setattr(sys, "argv", ["degrade.py", str(tmp_path / "hr"), str(tmp_path / "lr"), "--seed", "5"])
    degrade.main()
    skipped = []
    jobs, _ = pairs.match_pairs({"HR": tmp_path / "hr"})
    done = read(jobs, recipe="web", seed=5, skipped=skipped)
    assert [name for name, *_ in done] == ["a.png", "b/空.png"] and len(skipped) == 1 and "cut.png" in skipped[0]
    for name, lr, hr, _ in done:
        assert hr.shape == (3, 24, 32) and torch.equal(lr, images.read_picture(tmp_path / "lr" / name).rgb)
    assert len(read(jobs, recipe="web", limit=1)) == 1


def test_a_mistake_in_the_code_shows_its_traceback(tmp_path, monkeypatch):
    save(tmp_path / "a.png")

    def broken(*_):
        raise ValueError("shapes differ")
    monkeypatch.setattr(degrade, "degrade", broken)
    with pytest.raises(ValueError, match="shapes differ"):
        read([("a.png", {"HR": tmp_path / "a.png"})], recipe="web")
