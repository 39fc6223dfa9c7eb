"""The upscaling command: alpha, sizes, files and folders, failures."""
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import convert
import choose
import images
import model
import tile
from images import Picture, read_picture, save_picture
from tile import Tiler

RNG = np.random.default_rng(0)


def nearest(scale):
    return lambda x: F.interpolate(x, scale_factor=scale, mode="nearest")


def upscale_picture(picture, size, forward=nearest(2), **options):
    x = torch.cat(list(tile.upscale_picture(forward, picture, 2, Tiler(16, 8), size, **options)), 1)
    return replace(picture, rgb=x[:3], alpha=None if picture.alpha is None else x[3:])


# ------------------------------------------------------------------ alpha, size, and crop

@pytest.mark.parametrize("size", [(60, 90), (45, 70), (31, 33), (8, 200), (200, 8), (1, 1), (77, 51)])
def test_resizing_in_bands(size):
    x = torch.rand(3, 60, 51)
    whole = tile.lanczos(x, size)
    pillow = Image.fromarray(x[1].numpy()).resize(size[::-1], Image.Resampling.LANCZOS)
    assert torch.allclose(whole[1], torch.from_numpy(np.array(pillow)).clamp(0, 1), atol=1e-6)
    bands = torch.cat([tile.lanczos(x, size, y, min(y + 16, size[0])) for y in range(0, size[0], 16)], 1)
    assert bands.shape == whole.shape and torch.allclose(bands, whole, atol=1e-4)


@pytest.mark.parametrize("size", [(140, 120), (101, 77)])
def test_alpha_and_size(size):
    picture = Picture(torch.rand(3, 70, 60), torch.rand(1, 70, 60).clamp(0.1))
    result = upscale_picture(picture, size)
    assert torch.allclose(result.alpha, tile.lanczos(picture.alpha, size), atol=1e-4)
    rgb = nearest(2)(picture.rgb[None])[0]
    assert torch.allclose(result.rgb, rgb if size == (140, 120) else tile.lanczos(rgb, size), atol=1e-3)


@pytest.mark.parametrize("depth, tolerance", [(8, 1e-3), (16, 1e-5)])
@pytest.mark.parametrize("size, passes", [((100, 140), 1), ((102, 143), 1), ((30, 42), 1), ((200, 280), 2), ((150, 210), 2),
                                          ((110, 110), 2), ((201, 280), 2), ((300, 420), 3)])
def test_model_runs_again_on_its_output(size, passes, depth, tolerance):
    """Above 2x: 3x is twice 2x, then Lanczos. Only a growth of less than 5% is left to Lanczos."""
    sides, progress = set(), []
    picture = Picture(torch.rand(3, 50, 70) * 0.8 + 0.1, depth=depth)

    def forward(x):
        sides.add(x.shape[-1])
        return nearest(2)(x)

    result = upscale_picture(picture, size, forward, progress=progress.append)
    expected = nearest(2**passes)(picture.rgb[None])[0]
    if size != expected.shape[1:]:
        expected = tile.lanczos(expected, size)
    assert result.rgb.dtype == torch.float32 and (result.rgb - expected).abs().max() < tolerance
    total = sum(Tiler(16, 8).count(50 * 2**k, 70 * 2**k) for k in range(passes))
    assert progress == [total] * total
    assert sides == {32}        # tiles have the same size in all passes


def test_alpha_leaves_no_fringe():
    alpha = torch.zeros(1, 40, 50)
    alpha[:, 10:30, 10:30] = 1
    red = torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1)
    result = upscale_picture(Picture(red * alpha, alpha), (80, 100))     # black in transparent pixels
    assert torch.allclose(result.rgb, red.expand(3, 80, 100), atol=1e-4)
    assert result.alpha.shape == (1, 80, 100) and result.alpha.min() == 0 and result.alpha.max() == 1
    assert 0 < result.alpha[0, 20, 30] < 1
    transparent = torch.rand(3, 3, 3)
    assert torch.equal(tile.bleed_colors(transparent, torch.zeros(1, 3, 3)), transparent)
    one_visible = torch.tensor([[[0.0, 0.5, 0.0]]])
    filled = tile.bleed_colors(torch.tensor([[[0.9, 0.3, 0.7]]]).expand(3, 1, 3), one_visible)
    assert torch.allclose(filled, torch.tensor(0.3))


def test_crop():
    rgb = torch.rand(3, 300, 100)
    portrait = tile.crop_to_aspect(Picture(rgb, rgb[:1]), (50, 100))
    assert portrait.rgb.equal(rgb[:, 125:175]) and portrait.alpha.equal(portrait.rgb[:1])
    assert tile.crop_to_aspect(Picture(rgb.transpose(1, 2)), (100, 50)).rgb.equal(rgb.transpose(1, 2)[:, :, 125:175])
    for h, w in ((1, 1), (1, 300), (300, 1), (7, 5), (300, 100)):
        assert tile.crop_to_aspect(Picture(torch.rand(3, h, w)), (300, 100)).rgb.numel() > 0


# ------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model.save(model.HATRefiner.from_preset("tiny", scale=2), path, {})
    return path


@pytest.fixture
def command(monkeypatch, capsys, weights):
    """command(*args) -> (exit code, stdout, stderr), in this process. weights=None passes no --weights."""
    def call(*args, weights=weights):
        args = [*args, "--device", "cpu"]
        if weights and "--weights" not in args:
            args += ["--weights", weights]
        monkeypatch.setattr(sys, "argv", ["tile.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            tile.main()
        return exit.value.code, *capsys.readouterr()
    return call


def picture_file(path, size=(20, 14), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size[::-1], 4), dtype=np.uint8)).convert(mode).save(path)
    return path


def test_out_is_optional(tmp_path, command, monkeypatch):
    """A picture becomes NAME-2x.png beside it, a folder NAME-2x; the results are no pictures of the next run."""
    picture_file(tmp_path / "a.jpg")
    picture_file(tmp_path / "b.png")
    picture_file(tmp_path / "walls/c.webp")
    for _ in range(2):
        inputs = [path for path in sorted(tmp_path.iterdir()) if path.name != "walls-2x"]
        assert command(*inputs, "--overwrite")[0] == 0
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["a-2x.png", "a.jpg", "b-2x.png", "b.png", "walls", "walls-2x"]
        assert read_picture(tmp_path / "walls-2x/c.png").rgb.shape == (3, 28, 40)
    command(tmp_path / "a.jpg", "--fit", "30x20")
    command(tmp_path / "a.jpg", "--scale", "1.5", "--format", "jpg")
    assert Image.open(tmp_path / "a-30x20.png").size == (30, 20)
    assert Image.open(tmp_path / "a-1.5x.jpg").size == (30, 21)
    monkeypatch.chdir(tmp_path / "walls")
    assert command(".")[0] == 0 and (tmp_path / "walls-2x/c.png").exists()


def test_folder_tree(tmp_path, command):
    picture_file(tmp_path / "in/a b.jpg")
    picture_file(tmp_path / "in/deep/壁紙.png", mode="LA")
    (tmp_path / "in/broken.png").write_text("text")
    code, out, err = command(tmp_path / "in", "-o", tmp_path / "in/out")
    assert code == 1 and err.count("\n") == 1 and "broken.png" in err and "2 done, 0 skipped, 1 failed" in out
    assert read_picture(tmp_path / "in/out/a b.png").rgb.shape == (3, 28, 40)
    gray = read_picture(tmp_path / "in/out/deep/壁紙.png")
    assert gray.gray and gray.alpha is not None
    (tmp_path / "in/broken.png").unlink()
    before = (tmp_path / "in/out/a b.png").stat().st_mtime_ns
    code, out, err = command(tmp_path / "in", "-o", tmp_path / "in/out")        # the results are no input
    assert code == 0 and "0 done, 2 skipped" in out and not err
    assert (tmp_path / "in/out/a b.png").stat().st_mtime_ns == before
    assert "2 done" in command(tmp_path / "in", "-o", tmp_path / "in/out", "--overwrite")[1]
    assert (tmp_path / "in/out/a b.png").stat().st_mtime_ns > before


def test_results_may_lie_above_the_pictures(tmp_path, command, monkeypatch):
    picture_file(tmp_path / "walls/raw/a.jpg")
    monkeypatch.chdir(tmp_path / "walls")
    assert "1 done" in command("raw", "-o", ".")[1] and (tmp_path / "walls/a.png").exists()


def test_a_name_clash_does_not_stop_the_others(tmp_path, command):
    for name in ("a.png", "a.jpg", "b.png", "sub/c.png"):
        picture_file(tmp_path / "in" / name)
    code, out, err = command(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 1 and "3 done, 0 skipped, 1 failed" in out and "a.jpg" in err and "a.png" in err
    before = (tmp_path / "in/b.png").read_bytes()
    code, _, err = command(tmp_path / "in/b.png", tmp_path / "in/a.jpg", "-o", tmp_path / "in", "--overwrite")
    assert code == 1 and (tmp_path / "in/b.png").read_bytes() == before and "b.png" in err
    code, _, err = command(tmp_path / "in/b.png", "-o", tmp_path / "in/b.png", "--overwrite")
    assert code == 2 and (tmp_path / "in/b.png").read_bytes() == before and "choose another --out" in err


def test_no_result_replaces_another_picture(tmp_path, command):
    a = picture_file(tmp_path / "in/a.png").read_bytes()
    picture_file(tmp_path / "in/a.jpg")
    code, _, err = command(tmp_path / "in", "-o", tmp_path / "in", "--overwrite")
    assert code == 2 and (tmp_path / "in/a.png").read_bytes() == a and "choose another --out" in err


def test_results_of_an_earlier_run_are_not_upscaled_again(tmp_path, command, monkeypatch):
    """Also if one path is relative and the other is absolute."""
    picture_file(tmp_path / "in/a.png")
    monkeypatch.chdir(tmp_path / "in")
    for summary in "1 done, 0 skipped", "0 done, 1 skipped":
        assert summary in command(tmp_path / "in", "-o", "out")[1]
    monkeypatch.chdir(tmp_path)
    picture_file(tmp_path / "walls/b.png")
    for inputs, summary in (["walls"], "1 done, 0 skipped"), (["walls", "walls-2x"], "0 done, 1 skipped"):
        assert summary in command(*inputs)[1]
    for inputs, summary in (["walls/b.png"], "1 done, 0 skipped"), (["walls/b.png", "walls/big"], "0 done, 1 skipped, 0 f"):
        assert summary in command(*inputs, "-o", "walls/big")[1]


def test_ctrl_c_prints_one_line(command, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(tile, "run", interrupt)
    assert command("a.png")[::2] == (2, "error: interrupted\n")


def test_captions_beside_pictures_are_skipped(tmp_path, command):
    picture_file(tmp_path / "in/a.png")
    for name in ("a.caption", "a.txt"):
        (tmp_path / "in" / name).write_text("1girl, starry sky")
    code, out, err = command(*sorted((tmp_path / "in").iterdir()), "-o", tmp_path / "out")
    assert code == 0 and not err and "1 done, 0 skipped, 0 failed" in out


def test_mistakes_of_the_user(tmp_path, command, monkeypatch):
    """One line and exit code 2; nothing is written."""
    one, out = picture_file(tmp_path / "in/a.png"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    for args, reason in (
            ((tmp_path / "empty", "-o", out), "no picture in"),
            ((tmp_path / "missing", "-o", out), "missing"),
            ((one, "-o", out, "--tile-size", "102"), "a multiple of 4"),
            ((one, "-o", out, "--tile-pad", "3"), "a multiple of 2"),
            ((one, "-o", out, "--weights", tmp_path / "missing.safetensors"), "missing.safetensors"),
            ((one, "-o", out, "--weights", tmp_path / "cut.safetensors"), "cut.safetensors")):
        code, _, err = command(*args)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and reason in err, (args, err)
    for size in ("--fit", "4k"), ("--fit", "0x5"), ("--scale", "-2"), ("--scale", "0"), ("--scale", "nan"):
        assert command(one, "-o", out, *size)[0] == 2
    code, _, err = command(one, "-o", out / "a.bmp")
    assert code == 1 and "a.bmp" in err and not list(out.rglob("*.*"))


def test_errors_while_saving(tmp_path, command, monkeypatch):
    """An error of the disk concerns one file; a mistake in the code shows its traceback."""
    one, two, out = picture_file(tmp_path / "in/a.png"), picture_file(tmp_path / "in/b.png"), tmp_path / "out"

    def save_raises(error):
        def save(*args):
            raise error
        monkeypatch.setattr(images, "save_strips", save)

    save_raises(PermissionError(13, "Permission denied"))
    code, shown, err = command(one, two, "-o", out)
    assert code == 1 and "0 done, 0 skipped, 2 failed" in shown and err.count("Permission denied") == 2
    assert "a.png" in err and "b.png" in err
    save_raises(TypeError("a mistake in the code"))
    monkeypatch.setattr(sys, "argv", ["tile.py", str(one), "-o", str(out)])
    with pytest.raises(TypeError):
        tile.main()


def test_odd_names_do_not_stop_a_folder(tmp_path, command):
    folder = tmp_path / "in"
    picture_file(folder / "b.png")
    picture_file(folder / ("x" * 251 + ".jpg"))
    (folder / "loop.png").symlink_to(folder / "loop.png")
    code, out, err = command(folder, "-o", tmp_path / "out", "--format", "webp")
    assert code == 1 and "1 done, 0 skipped, 2 failed" in out and err.count("\n") == 2 and "loop.png" in err


def test_all_kinds_of_pictures(tmp_path, command):
    """Results have twice the size and the same kind; notes say what was left behind."""
    for name, size, mode in (("one.png", (1, 1), "RGB"), ("tower.png", (1, 300), "L"), ("odd.jpg", (37, 23), "RGB"),
                             ("clear.png", (8, 9), "LA"), ("cmyk.jpg", (10, 10), "CMYK"), ("bits.png", (9, 9), "1"),
                             ("壁紙 その一.png", (5, 6), "RGBA"), ("line\nbreak.bmp", (7, 7), "RGB")):
        picture_file(tmp_path / "in" / name, size, mode)
    save_picture(tmp_path / "in/deep.png", Picture(torch.rand(3, 9, 8), torch.rand(1, 9, 8), depth=16))
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    Image.new("RGB", (7, 5)).save(tmp_path / "in/turned.jpg", exif=exif)
    code, shown, err = command(tmp_path / "in", "-o", tmp_path / "out", "--tile-size", "64")
    assert code == 0 and "10 done" in shown and not err and "CMYK converted" in shown
    for path in images.find_pictures(tmp_path / "out"):
        result, source = read_picture(path), read_picture(next((tmp_path / "in").glob(f"{path.stem}.*")))
        assert result.rgb.shape[1:] == tuple(2 * side for side in source.rgb.shape[1:]), path
        assert (result.gray, result.depth) == (source.gray, source.depth), path
        assert (result.alpha is None) == (source.alpha is None), path
    shown = command(tmp_path / "in/deep.png", "-o", tmp_path / "deep.jpg")[1]
    assert "transparency blended over white" in shown and "16 bit reduced to 8" in shown


def test_undamaged_pictures_use_the_plain_weights(tmp_path, command, monkeypatch):
    """But not with --weights."""
    dark, bright = picture_file(tmp_path / "in/dark.png"), tmp_path / "in/bright.png"
    Image.fromarray(RNG.integers(225, 246, (14, 20, 3), dtype=np.uint8)).save(bright)
    shipped = {name: tmp_path / f"weights/{name}-tiny.safetensors" for name in ("web", "clean")}
    for seed, path in enumerate(shipped.values()):
        torch.manual_seed(seed)
        network = model.HATRefiner.from_preset("tiny", scale=2)
        network.hat_model.conv_last.weight.data += 0.003 * torch.randn(network.hat_model.conv_last.weight.shape)
        path.parent.mkdir(exist_ok=True)
        model.save(network, path, {})
    monkeypatch.setattr(choose, "SHIPPED", [*shipped.values()])
    monkeypatch.setattr(choose, "is_undamaged", lambda repair_model, rgb: rgb.mean() > 0.9)
    assert command(tmp_path / "in", "-o", tmp_path / "out", weights=None)[0] == 0
    for name, path in shipped.items():
        command(tmp_path / "in", "-o", tmp_path / name, weights=path)

    def result(folder, path):
        return (tmp_path / folder / path.name).read_bytes()
    assert result("out", dark) == result("web", dark) != result("clean", dark)
    assert result("out", bright) == result("clean", bright) != result("web", bright)


def test_invisible_colors_do_not_choose_the_model(tmp_path, command, monkeypatch):
    pixels = np.full((20, 30, 4), 200, np.uint8)
    pixels[:, :15] = 0, 0, 0, 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen = []
    monkeypatch.setattr(choose, "is_undamaged", lambda repair_model, rgb: bool(seen.append(rgb)))
    assert command(tmp_path / "a.png", weights=None)[0] == 0 and torch.allclose(seen[0], torch.tensor(200 / 255))


def test_empty_or_truncated_result_is_made_again(tmp_path, command, monkeypatch):
    picture_file(tmp_path / "in/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"")
    assert command(tmp_path / "in", "-o", tmp_path / "out")[0] == 0
    result = (tmp_path / "out/a.png").read_bytes()
    (tmp_path / "out/a.png").write_bytes(result[:len(result) // 2])
    assert "1 done" in command(tmp_path / "in", "-o", tmp_path / "out")[1]
    assert (tmp_path / "out/a.png").read_bytes() == result
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)         # the result is above Pillow's limit
    assert "1 skipped" in command(tmp_path / "in", "-o", tmp_path / "out")[1]


def test_pictures_of_any_suffix_are_found(tmp_path, command):
    picture_file(tmp_path / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "in/a.download")
    (tmp_path / "in/notes.txt").write_text("notes")
    code, out, err = command(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 0 and "1 done" in out and (tmp_path / "out/a.png").exists() and "notes.txt" in err


def test_sizes_and_formats(tmp_path, command):
    for i, size in enumerate(((20, 14), (14, 20), (33, 7), (64, 40))):
        picture_file(tmp_path / f"in/{i}.png", size)
    assert command(tmp_path / "in", "-o", tmp_path / "fit", "--fit", "96x54", "--format", "webp")[0] == 0
    assert {Image.open(p).size for p in images.find_pictures(tmp_path / "fit")} == {(96, 54)}
    for scale, size in (("1.5", (30, 21)), ("3", (60, 42)), ("4", (80, 56))):
        assert command(tmp_path / "in/0.png", "-o", tmp_path / "s.png", "--scale", scale, "--overwrite")[0] == 0
        result, plain = read_picture(tmp_path / "s.png"), read_picture(tmp_path / "in/0.png")
        assert result.rgb.shape[:0:-1] == size
        assert (result.rgb - tile.lanczos(plain.rgb, size[::-1])).abs().mean() < 0.06


class Faulty(torch.nn.Module):
    """A model that doubles pixels; fault(x) may return another output or raise."""
    scale = 2

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, x):
        y = self.fault(x)
        return nearest(2)(x) if y is None else y


def test_faults_on_one_tile(tmp_path, command, monkeypatch):
    """The model fails on one red tile of the second of three pictures."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        rgb = torch.rand(3, 96, 96) * 0.8
        if name == "b":
            rgb[:, 70:80, 70:80] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
        save_picture(tmp_path / f"in/{name}.png", Picture(rgb))

    def red(x):
        return bool(((x[:, 0] == 1) & (x[:, 1] == 0)).any())

    def outcome(fault, *flags):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        monkeypatch.setattr(convert, "load_any", lambda *_: Faulty(fault))
        code, _, err = command(tmp_path / "in", "-o", out, "--tile-size", "64", "--tile-pad", "8", *flags)
        for path in out.glob("*.png"):
            expected = nearest(2)(read_picture(tmp_path / "in" / path.name).rgb[None])[0]
            assert (read_picture(path).rgb - expected).abs().max() < 0.6 / 255
        return code, err, "".join(sorted(p.stem for p in out.iterdir()))

    def nan(x):
        return nearest(2)(x) * torch.nan if red(x) else None

    def black_in_bf16(x):
        return nearest(2)(x) * 0 if red(x) and torch.is_autocast_enabled("cpu") else None

    def hungry(x):
        if red(x) and x.shape[-1] > 40:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    def starving(x):
        if red(x):
            raise MemoryError

    assert outcome(black_in_bf16, "--amp", "bf16") == (0, "", "abc")
    code, err, made = outcome(nan)
    assert (code, made) == (1, "ac") and "b.png" in err and err.count("\n") == 1
    code, err, made = outcome(hungry, "--amp", "off")
    assert (code, made) == (0, "abc") and err.count("out of memory") == 2
    code, err, made = outcome(starving)
    assert (code, made) == (1, "ac") and "b.png: out of memory" in err
