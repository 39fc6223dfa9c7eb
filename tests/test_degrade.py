"""degrade.py: resampling against Pillow, PyTorch and plain sums; operations against plain sums; draws against their
tables; the same bits in any batch, thread and process; the command."""
import errno
import io
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import degrade
import tile

ROOT = Path(__file__).resolve().parent.parent
PILLOW = dict(bicubic=Image.Resampling.BICUBIC, lanczos=Image.Resampling.LANCZOS, bilinear=Image.Resampling.BILINEAR)


def smooth(*shape, seed=0):
    """Something picture-like in [0, 1]: soft shapes and some hard edges."""
    g = torch.Generator().manual_seed(seed)
    b, c, h, w = shape
    x = F.interpolate(torch.rand(b, c, h // 8 + 2, w // 8 + 2, generator=g), (h, w), mode="bicubic")
    return degrade.to_8_bit(torch.where(x > 0.7, x, x * 0.8))


# ---------------------------------------------------------------------------------------------------------------------
# Resampling
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", PILLOW)
@pytest.mark.parametrize("size", [(50, 75), (31, 77), (202, 300), (140, 40)])
def test_resize_is_pillows_away_from_the_border(kernel, size):
    x = smooth(1, 3, 101, 150)[0]
    theirs = np.stack([Image.fromarray(c.numpy()).resize(size[::-1], PILLOW[kernel]) for c in x])
    ours = degrade.resize(x, size, kernel).numpy()
    my, mx = (math.ceil(4 * max(1, out / n, n / out)) for out, n in zip(size, (101, 150)))
    assert abs(ours - theirs)[:, my:-my, mx:-mx].max() < 2e-6


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_resize_is_pytorchs_away_from_the_border(kernel):
    x = smooth(2, 3, 90, 70)
    for size in ((45, 35), (30, 50), (180, 210)):
        theirs = F.interpolate(x, size, mode=kernel, antialias=True)
        assert (degrade.resize(x, size, kernel) - theirs)[..., 12:-12, 12:-12].abs().max() < 2e-5


def test_area_is_the_mean_over_the_footprint():
    x = smooth(1, 3, 60, 84)
    assert torch.allclose(degrade.resize(x, (20, 21), "area"), F.avg_pool2d(x, (3, 4)), atol=1e-6)
    assert torch.equal(degrade.resize(x, (120, 84), "area"), x.repeat_interleave(2, -2))
    # 5 -> 2: each output pixel covers two whole pixels and half of the middle one
    row = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert torch.allclose(degrade.resize(row, (1, 2), "area"), torch.tensor([[4.5, 10.5]]) / 2.5)


@pytest.mark.parametrize("kernel", degrade.KERNELS)
def test_the_border_is_symmetric(kernel):
    x = smooth(1, 1, 24, 36)[0]
    mirrored = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (24, 24), (36, 36)), "symmetric"))
    for n, d in ((1, 2), (1, 3), (2, 1), (3, 4)):
        size = 24 * n // d, 36 * n // d
        big = degrade.resize(mirrored, (3 * size[0], 3 * size[1]), kernel)
        ours = degrade.resize(x, size, kernel)
        assert torch.allclose(ours, big[:, size[0]:2 * size[0], size[1]:2 * size[1]], atol=1e-6)


def test_bicubic_halving_by_hand():
    # MATLAB's weights for a half: kernel at 0.25, 0.75, 1.25, 1.75, over two
    def keys(t):
        return 1.5 * t ** 3 - 2.5 * t ** 2 + 1 if t < 1 else -0.5 * t ** 3 + 2.5 * t ** 2 - 4 * t + 2
    half = [keys(t) / 2 for t in (1.75, 1.25, 0.75, 0.25)]
    row = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = sum(w * row[5 + i] for i, w in enumerate(half + half[::-1]))
    assert abs(degrade.resize(row.float()[None], (1, 8))[0, 4] - expected) < 1e-6


@pytest.mark.parametrize("kernel", degrade.KERNELS)
@pytest.mark.parametrize("sizes", [((1, 1), (7, 3)), ((7, 3), (1, 1)), ((1, 40), (2, 5)), ((5, 5), (5, 5))])
def test_resize_of_any_size_keeps_flat_colour(kernel, sizes):
    x = torch.tensor([0.2, 0.5, 0.9])[:, None, None].expand(3, *sizes[0])
    y = degrade.resize(x, sizes[1], kernel)
    assert y.shape == (3, *sizes[1])
    assert torch.allclose(y, x[:, :1, :1].expand_as(y), atol=1e-6)


def test_resize_passes_gradients():
    x = smooth(1, 3, 20, 30).requires_grad_()
    degrade.resize(x, (10, 45)).sum().backward()
    assert x.grad.shape == x.shape and (x.grad[..., 4:-4, 4:-4] - 0.75).abs().max() < 1e-3   # area ratio: 450 / 600


def test_resize_errors():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="bicubic, lanczos, bilinear, area"):
        degrade.resize(x, (2, 2), "sinc")
    with pytest.raises(ValueError, match="at least 1 pixel"):
        degrade.resize(x, (0, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------------------


def test_gaussian_blur_by_plain_sums_with_a_sigma_per_picture():
    x = smooth(3, 3, 9, 11)
    sigmas = [0.0, 0.4, 0.8]
    y = degrade.gaussian_blur(x, sigmas)
    assert torch.equal(y[0], x[0])
    for n in (1, 2):
        r = math.ceil(4 * sigmas[n])
        g = np.exp(-0.5 * (np.arange(-r, r + 1) / sigmas[n]) ** 2)
        kernel = np.outer(g, g) / g.sum() ** 2
        padded = np.pad(x[n].double().numpy(), ((0, 0), (r, r), (r, r)), "edge")
        expected = sum(kernel[i, j] * padded[:, i:i + 9, j:j + 11]
                       for i in range(2 * r + 1) for j in range(2 * r + 1))
        assert abs(y[n].numpy() - expected).max() < 1e-6


def test_compress_is_pillows_codec_on_a_shifted_grid():
    x = smooth(1, 3, 37, 50)[0]
    pixels = x.mul(255).round().byte().permute(1, 2, 0).numpy()
    for codec, kind, how in (("jpeg", "JPEG", dict(subsampling="4:2:0")), ("webp", "WEBP", {})):
        for dy, dx in ((0, 0), (5, 13)):
            shifted = np.pad(pixels, ((dy, 0), (dx, 0), (0, 0)), "symmetric")
            file = io.BytesIO()
            Image.fromarray(shifted).save(file, kind, quality=85, **how)
            expected = np.array(Image.open(file).convert("RGB"))[dy:, dx:]
            ours = degrade.compress(x, codec, 85, offset=(dy, dx))
            assert np.array_equal(ours.mul(255).round().byte().permute(1, 2, 0).numpy(), expected)
    colourful = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    error = {c: (degrade.compress(colourful, "jpeg", 95, c) - colourful).abs().mean() for c in ("4:2:0", "4:4:4")}
    assert error["4:4:4"] < 0.3 * error["4:2:0"]
    assert degrade.compress(torch.full((3, 1, 1), 0.5), "jpeg", 90, offset=(15, 15)).shape == (3, 1, 1)
    with pytest.raises(ValueError, match="jpeg, webp"):
        degrade.compress(x, "gif", 90)


def test_downscale_uses_each_pictures_kernel():
    x = smooth(4, 3, 16, 24)
    y = degrade.downscale(x, 2, ["area", "bicubic", "area", "lanczos"])
    for n, kernel in enumerate(["area", "bicubic", "area", "lanczos"]):
        assert torch.equal(y[n], degrade.resize(x[n], (8, 12), kernel).clamp(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


def test_web_draws_what_its_table_says():
    drawn = [degrade.draw_web(np.random.default_rng(i)) for i in range(6000)]
    plain = [d for d in drawn if d == dict(kernel="bicubic", sigma=0.0, compress=None)]
    spoilt_chance = 1 - degrade.WEB["clean"]

    def share(test):
        return sum(map(test, drawn)) / len(drawn)

    near = 0.025
    nothing = degrade.WEB["downscale"]["bicubic"] * (1 - degrade.WEB["blur"]["p"]) * (1 - degrade.WEB["compress"]["p"])
    assert abs(len(plain) / len(drawn) - degrade.WEB["clean"] - spoilt_chance * nothing) < near
    for kernel in ("lanczos", "bilinear", "area"):
        assert abs(share(lambda d: d["kernel"] == kernel) - spoilt_chance * degrade.WEB["downscale"][kernel]) < near
    sigmas = [d["sigma"] for d in drawn if d["sigma"]]
    low, high = degrade.WEB["blur"]["sigma"]
    assert abs(len(sigmas) / len(drawn) - spoilt_chance * degrade.WEB["blur"]["p"]) < near
    assert low <= min(sigmas) < low + 0.01 and high - 0.01 < max(sigmas) <= high
    table, codes = degrade.WEB["compress"], [d["compress"] for d in drawn if d["compress"]]
    assert abs(len(codes) / len(drawn) - spoilt_chance * table["p"]) < near
    for codec in ("jpeg", "webp"):
        mine = [c for c in codes if c["codec"] == codec]
        assert abs(len(mine) / len(codes) - table["codec"][codec]) < near
        low, high = table["quality"][codec]
        assert {c["quality"] for c in mine} == set(range(low, high + 1))
    jpegs = [c for c in codes if c["codec"] == "jpeg"]
    assert abs(sum(c["chroma"] == "4:4:4" for c in jpegs) / len(jpegs) - table["chroma"]["4:4:4"]) < near
    assert {c["offset"][0] for c in codes} == {c["offset"][1] for c in codes} == set(range(16))


def test_web_does_what_it_draws_in_order():
    hr = smooth(12, 3, 32, 48)
    seeds = list(range(100, 112))
    lr = degrade.degrade(hr, "web", 2, seeds)
    for n, seed in enumerate(seeds):
        d = degrade.draw_web(np.random.default_rng(seed))
        x = degrade.to_8_bit(degrade.downscale(hr[n:n + 1], 2, [d["kernel"]]))
        x = degrade.gaussian_blur(x, [d["sigma"]])[0]
        x = degrade.compress(x, **d["compress"]) if d["compress"] else x
        assert torch.equal(lr[n], degrade.to_8_bit(x))


def test_bicubic_is_pillows_to_a_level():
    hr = smooth(1, 3, 64, 96)
    ours = degrade.degrade(hr, "bicubic", 2, [0])[0].mul(255).round().permute(1, 2, 0).numpy()
    picture = Image.fromarray(hr[0].mul(255).round().byte().permute(1, 2, 0).numpy())
    theirs = np.array(picture.resize((48, 32), Image.Resampling.BICUBIC), dtype=float)
    assert abs(ours - theirs)[4:-4, 4:-4].max() <= 1
    assert (abs(ours - theirs)[4:-4, 4:-4] == 0).mean() > 0.8


@pytest.mark.parametrize("recipe", [*degrade.RECIPES, "web:0.5,bicubic:0.5"])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_size_range_and_levels(recipe, scale):
    hr = smooth(5, 3, 7 * scale, 11 * scale)
    before = hr.clone()
    lr = degrade.degrade(hr, recipe, scale, range(5))
    assert lr.shape == (5, 3, 7, 11) and lr.dtype == torch.float32 and torch.equal(hr, before)
    assert lr.min() >= 0 and lr.max() <= 1 and torch.equal(lr, degrade.to_8_bit(lr))
    assert (lr * 255 - (lr * 255).round()).abs().max() < 1e-4


@pytest.mark.parametrize("recipe", [*degrade.RECIPES, "web:0.5,bicubic:0.5"])
def test_a_picture_does_not_depend_on_its_batch(recipe):
    hr = torch.rand(9, 3, 62, 50, generator=torch.Generator().manual_seed(3))
    seeds = [5, 2 ** 63, 7, -1, 123456789, 0, 1, 2, 3]
    whole = degrade.degrade(hr, recipe, 2, seeds)
    order = [4, 0, 8, 2, 6, 1, 3, 7, 5]
    assert torch.equal(degrade.degrade(hr[order], recipe, 2, [seeds[i] for i in order]), whole[order])
    for i in range(9):
        assert torch.equal(degrade.degrade(hr[i:i + 1], recipe, 2, seeds[i:i + 1])[0], whole[i])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert torch.equal(degrade.degrade(hr, recipe, 2, seeds), whole)
    finally:
        torch.set_num_threads(threads)


class Degraded(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return degrade.degrade(smooth(1, 3, 64, 64, seed=i), "web", 2, [i])[0]


def test_any_number_of_workers_gives_the_same_bits():
    alone = [Degraded()[i] for i in range(6)]
    for workers in (1, 2):
        batches = list(torch.utils.data.DataLoader(Degraded(), batch_size=3, num_workers=workers))
        assert torch.equal(torch.cat(batches), torch.stack(alone))


def test_seeds_differ():
    hr = smooth(1, 3, 64, 64).expand(8, -1, -1, -1)
    lr = degrade.degrade(hr, "web", 2, range(8))
    assert len({x.numpy().tobytes() for x in lr}) >= 7          # a clean pair may be equal
    assert len({x.numpy().tobytes() for x in degrade.degrade(hr, "web", 2, [4] * 8)}) == 1


def test_a_mix_draws_one_part_per_picture():
    hr = smooth(400, 3, 16, 16)
    seeds = range(400)
    mixed, web, bicubic = (degrade.degrade(hr, r, 2, seeds) for r in ("web:0.7,bicubic:0.3", "web", "bicubic"))
    is_web, is_bicubic = ((mixed == x).flatten(1).all(1) for x in (web, bicubic))
    assert bool((is_web | is_bicubic).all())
    also = (web == bicubic).flatten(1).all(1)                   # web's own clean share
    assert abs((is_web & ~also).sum() / (~also).sum() - 0.7) < 0.08
    assert degrade.shares(" web : 3 , bicubic:1") == dict(web=0.75, bicubic=0.25)
    assert degrade.shares("web") == dict(web=1.0)
    assert torch.equal(degrade.degrade(hr[:9], "web:1,bicubic:0", 2, range(9)), web[:9])


def test_degrade_errors():
    hr = torch.zeros(2, 3, 8, 8)
    for recipe in ("wep", "web:0.5,soft:0.5", ""):
        with pytest.raises(ValueError, match="there are bicubic, web"):
            degrade.degrade(hr, recipe, 2, [0, 1])
    for recipe in ("web:x", "web:-1", "web:nan", "web:inf", "web:0"):
        with pytest.raises(ValueError, match="share"):
            degrade.degrade(hr, recipe, 2, [0, 1])
    with pytest.raises(ValueError, match="8x7 does not divide"):
        degrade.degrade(hr[:, :, :7], "web", 2, [0, 1])
    with pytest.raises(ValueError, match="1 seeds for 2 pictures"):
        degrade.degrade(hr, "web", 2, [0])
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        degrade.degrade(hr[:, :1], "web", 2, [0, 1])
    with pytest.raises(ValueError, match="scale"):
        degrade.degrade(hr, "web", 0, [0, 1])


def test_copied_alone_it_works(tmp_path):
    shutil.copy(ROOT / "degrade.py", tmp_path)
    code = "import torch, degrade; print(degrade.degrade(torch.rand(2, 3, 8, 8), 'web', 2, [0, 1]).shape)"
    out = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); {code}"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == "torch.Size([2, 3, 4, 4])", out.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *args):
    """(exit code, stdout, stderr) of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["degrade.py", *map(str, args)])
    code = 0
    try:
        degrade.main()
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def folder(tmp_path):
    """Five good pictures, odd sizes and names, and two bad ones."""
    hr = tmp_path / "hr"
    (hr / "空 と 海").mkdir(parents=True)

    def save(name, mode="RGB", size=(33, 26), **how):
        channels = dict(RGB=3, RGBA=4, L=1)[mode]
        x = smooth(1, channels, size[1], size[0], seed=len(name))[0].mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(x.squeeze(-1) if channels == 1 else x).save(hr / name, **how)

    save("a b.png")
    save("空 と 海/壁紙.PNG")
    save("photo.jpg", quality=95)
    save("seen through.png", "RGBA")
    save("grey.png", "L", (40, 40))
    (hr / "cut.png").write_bytes((hr / "a b.png").read_bytes()[:300])
    (hr / "text.jpg").write_text("not a picture")
    return hr


def test_command(folder, tmp_path, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, folder, tmp_path / "lr", "--recipe", "web", "--seed", 3)
    assert code == 0 and "5 pictures" in out and "4 cropped" in out and "2 skipped" in out
    assert err.count("skipped:") == 2 and "cut.png" in err and "text.jpg" in err
    names = {p.relative_to(tmp_path / "lr").as_posix() for p in (tmp_path / "lr").rglob("*") if p.is_file()}
    assert names == {"a b.png", "空 と 海/壁紙.PNG", "photo.png", "seen through.png", "grey.png"}
    for name in ("a b.png", "空 と 海/壁紙.PNG", "photo.jpg", "seen through.png", "grey.png"):
        picture = tile.read_picture(folder / name)
        hr = picture.rgb if picture.alpha is None else picture.rgb * picture.alpha + 1 - picture.alpha
        hr = hr[:, :hr.shape[1] // 2 * 2, :hr.shape[2] // 2 * 2]
        expected = degrade.degrade(hr[None], "web", 2, [degrade.picture_seed(name, 3)])[0]
        written = tile.read_picture(tmp_path / "lr" / name.replace(".jpg", ".png"))
        assert torch.equal(written.rgb, expected) and written.alpha is None


def test_adding_a_picture_changes_no_other(folder, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, capsys, folder, tmp_path / "one")[0] == 0
    Image.new("RGB", (20, 20), "red").save(folder / "0 first.png")
    assert command(monkeypatch, capsys, folder, tmp_path / "two")[0] == 0
    for path in (tmp_path / "one").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_nothing_is_overwritten_unasked(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr" / "photo.png").write_bytes(b"mine")
    code, _, err = command(monkeypatch, capsys, folder, tmp_path / "lr")
    assert code == 2 and err.startswith("error: ") and "photo.png exists already (1 of 7 do)" in err
    assert [p.name for p in (tmp_path / "lr").iterdir()] == ["photo.png"]
    assert (tmp_path / "lr" / "photo.png").read_bytes() == b"mine"
    assert command(monkeypatch, capsys, folder, tmp_path / "lr", "--overwrite")[0] == 0
    assert (tmp_path / "lr" / "photo.png").read_bytes() != b"mine"


def test_users_mistakes(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    lr = tmp_path / "lr"
    for args, says in (((folder, lr, "--recipe", "wep"), "there are bicubic, web"),
                       ((folder, lr, "--scale", "0"), "--scale"),
                       ((tmp_path / "none", lr), "not a folder"),
                       ((tmp_path / "empty", lr), "no picture"),
                       ((folder, folder / "lr"), "inside"),
                       ((folder, folder), "inside"),
                       ((folder, lr, "--scale", "100"), "none of the 7 pictures")):
        code, _, err = command(monkeypatch, capsys, *args)
        assert code == 2 and err.splitlines()[-1].startswith("error: ") and says in err.splitlines()[-1]
    assert not lr.exists()
    shutil.copy(folder / "photo.jpg", folder / "photo.webp")
    code, _, err = command(monkeypatch, capsys, folder, lr)
    assert code == 2 and "photo.jpg and photo.webp would both become photo.png" in err


def test_full_disk(folder, tmp_path, monkeypatch, capsys):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    monkeypatch.setattr(tile.os, "replace", full)
    code, _, err = command(monkeypatch, capsys, folder, tmp_path / "lr")
    assert code == 2 and "No space left on device" in err.splitlines()[-1] and "Traceback" not in err
    assert not [p for p in (tmp_path / "lr").rglob("*") if p.is_file()]


def test_interrupted(folder, tmp_path, monkeypatch, capsys):
    real, calls = tile.read_picture, []

    def stop_at_third(path):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path)
    monkeypatch.setattr(tile, "read_picture", stop_at_third)
    code, _, err = command(monkeypatch, capsys, folder, tmp_path / "lr")
    assert code == 130 and err.strip().splitlines()[-1].startswith("stopped")
    assert all(tile.read_picture(p).rgb.shape[0] == 3 for p in (tmp_path / "lr").rglob("*") if p.is_file())
