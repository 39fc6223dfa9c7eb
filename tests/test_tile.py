"""Pictures in and out, tiles, the upscaling command. python -m pytest tests/test_tile.py"""
import errno
import io
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps

import model
import tile
from tile import Picture, PictureError, Tiler, read_picture, save_picture

RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (70, 9, 4), dtype=np.uint16)


def pixels(picture):
    """Picture -> integer array (H, W, C) as it would be stored, to compare exactly."""
    planes = [picture.rgb[:1] if picture.grey else picture.rgb] + ([] if picture.alpha is None else [picture.alpha])
    x = torch.cat(planes) * (2**picture.depth - 1)
    assert torch.allclose(x, x.round(), atol=0.01) and picture.rgb.dtype == torch.float32
    return x.round().permute(1, 2, 0).numpy().astype(np.int64)


def nearest(scale):
    return lambda x: F.interpolate(x, scale_factor=scale, mode="nearest")


def png16(array, extra=b""):
    """A 16-bit PNG without filters, written by other code than ours."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    h, w, c = array.shape
    head = struct.pack(">IIBBBBB", w, h, 16, (0, 4, 2, 6)[c - 1], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ------------------------------------------------------------------ reading

@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("LA", "png"), ("RGB", "png"), ("RGBA", "png"), ("RGB", "bmp"),
                                          ("RGB", "tif"), ("RGBA", "webp"), ("1", "png")])
def test_lossless_modes(tmp_path, mode, suffix):
    im = Image.fromarray(RGBA).convert(mode)
    im.save(tmp_path / f"a.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    got = read_picture(tmp_path / f"a.{suffix}")
    expected = np.asarray(im.convert("L") if mode == "1" else im).reshape(5, 7, -1)
    assert got.grey == (mode in ("L", "LA", "1")) and got.depth == 8
    assert (got.alpha is not None) == (mode in ("LA", "RGBA"))
    assert (pixels(got) == expected).all()


def test_palette_with_transparency(tmp_path):
    im = Image.new("P", (2, 1))
    im.putpalette([10, 20, 30, 200, 100, 50])
    im.putdata([0, 1])
    im.save(tmp_path / "plain.png")
    im.save(tmp_path / "clear.png", transparency=1)
    assert pixels(read_picture(tmp_path / "plain.png")).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert pixels(read_picture(tmp_path / "clear.png")).tolist() == [[[10, 20, 30, 255], [200, 100, 50, 0]]]


def test_one_transparent_colour(tmp_path):
    Image.fromarray(np.uint8([[7, 9]])).save(tmp_path / "grey.png", transparency=9)
    assert pixels(read_picture(tmp_path / "grey.png")).tolist() == [[[7, 255], [9, 0]]]
    Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]])).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert pixels(read_picture(tmp_path / "rgb.png")).tolist() == [[[1, 2, 3, 0], [4, 5, 6, 255]]]
    key = struct.pack(">HHH", *DEEP[3, 4, :3].tolist())
    key = struct.pack(">I", 6) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
    (tmp_path / "deep.png").write_bytes(png16(DEEP[..., :3], key))
    alpha = pixels(read_picture(tmp_path / "deep.png"))[..., 3]
    assert alpha[3, 4] == 0 and (alpha == 65535).sum() == alpha.size - 1


def test_cmyk(tmp_path):
    flat = np.zeros((8, 8, 4), np.uint8)
    flat[..., 0] = 255  # all cyan
    Image.fromarray(flat, "CMYK").save(tmp_path / "a.tif")
    assert (pixels(read_picture(tmp_path / "a.tif")) == (0, 255, 255)).all()
    Image.fromarray(flat, "CMYK").save(tmp_path / "a.jpg", quality=100, icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 200)
    got = read_picture(tmp_path / "a.jpg")
    assert abs(pixels(got) - (0, 255, 255)).max() <= 2 and got.icc is None


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit(tmp_path, channels):
    """Read exactly; written by us and read again exactly; Pillow agrees on what we wrote, to its 8 bits."""
    array = DEEP[..., :channels] if channels > 2 else DEEP[..., 4 - channels:]
    (tmp_path / "a.png").write_bytes(png16(array))
    got = read_picture(tmp_path / "a.png")
    assert got.depth == 16 and got.grey == (channels < 3) and (pixels(got) == array).all()
    got.icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save_picture(tmp_path / "b.png", got)
    again = read_picture(tmp_path / "b.png")
    assert again.depth == 16 and (pixels(again) == array).all()
    assert again.icc == (got.icc if channels > 2 else None)  # an RGB profile does not fit grey
    if channels > 2:
        assert (np.asarray(Image.open(tmp_path / "b.png")) == array >> 8).all()
    save_picture(tmp_path / "c.jpg", got)
    assert read_picture(tmp_path / "c.jpg").depth == 8


def test_16_bit_noise_and_gradients_roundtrip(tmp_path):
    ramp = torch.linspace(0, 1, 300).expand(3, 200, 300).clone()
    ramp[1] = torch.rand(200, 300)
    save_picture(tmp_path / "a.png", Picture(ramp, depth=16))
    assert (read_picture(tmp_path / "a.png").rgb - ramp).abs().max() < 0.51 / 65535


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[tile.ORIENTATION], exif[0x010E] = orientation, "by moonlight"
    Image.fromarray(RGBA[..., :3]).save(tmp_path / f"a.{suffix}", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}")))
    got = read_picture(tmp_path / f"a.{suffix}")
    assert expected.shape[:2] == ((7, 5) if orientation > 4 else (5, 7)) and (pixels(got) == expected).all()
    if suffix == "png":
        for out in ("b.png", "b.jpg", "b.webp"):
            save_picture(tmp_path / out, got)
            kept = Image.open(tmp_path / out).getexif()
            assert kept.get(tile.ORIENTATION, 1) == 1 and kept[0x010E] == "by moonlight"
            assert read_picture(tmp_path / out).rgb.shape == got.rgb.shape


def test_senseless_exif_is_dropped(tmp_path):
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x63")
    assert read_picture(tmp_path / "a.jpg").rgb.shape == (3, 5, 7)


def test_colour_profile_is_kept(tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.png", icc_profile=icc)
    picture = read_picture(tmp_path / "a.png")
    for name in ("b.png", "b.jpg", "b.webp"):
        save_picture(tmp_path / name, picture)
        assert read_picture(tmp_path / name).icc == icc


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    extra = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **extra)
    assert (pixels(read_picture(tmp_path / f"a.{suffix}"))[..., :3] == (255, 0, 0)).all()


def test_bad_files_are_named_in_one_line(tmp_path, monkeypatch):
    noise = Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP"):
        memory = io.BytesIO()
        noise.save(memory, kind)
        (tmp_path / f"cut.{kind.lower()}").write_bytes(memory.getvalue()[:len(memory.getvalue()) // 2])
    (tmp_path / "cut16.png").write_bytes(png16(DEEP)[:1500])
    (tmp_path / "text.jpg").write_text("not a picture at all\n" * 20)
    (tmp_path / "nothing.png").touch()
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.float32([[0.5]])).save(tmp_path / "float.tif")
    (tmp_path / "line\nbreak 壁紙.png").write_text("text")
    for name in [p.name for p in tmp_path.iterdir()] + ["missing.png"]:
        with pytest.raises(PictureError) as e:
            read_picture(tmp_path / name)
        assert name.replace("\n", "\\n") in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300
    for name, reason in (("nothing.png", "empty"), ("text.jpg", "not a picture"), ("missing.png", "No such file"),
                         ("cut.png", "truncated"), ("cut.jpeg", "truncated"), ("float.tif", "8 or 16 bit")):
        with pytest.raises(PictureError, match=reason):
            read_picture(tmp_path / name)
    noise.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(PictureError, match="bomb.png: .*1600 pixels"):
        read_picture(tmp_path / "bomb.png")


def test_damaged_files_never_raise_anything_else(tmp_path):
    chance = random.Random(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        memory = io.BytesIO()
        Image.fromarray(RGBA).convert("RGB").save(memory, kind)
        whole = memory.getvalue()
        for _ in range(60):
            broken = bytearray(whole)
            for _ in range(4):
                broken[chance.randrange(len(broken))] = chance.randrange(256)
            (tmp_path / "a.png").write_bytes(broken)
            try:
                assert read_picture(tmp_path / "a.png").rgb.isfinite().all()
            except PictureError:
                pass


@pytest.mark.parametrize("name", ["with spaces.png", "壁紙 その一.png", "line\nbreak.png", "%s {x}.png",
                                  "x" * 250 + ".png"])
def test_names(tmp_path, name):
    save_picture(tmp_path / name, Picture(torch.full((3, 2, 2), 0.2)))
    assert tile.find_pictures(tmp_path) == [tmp_path / name] and (pixels(read_picture(tmp_path / name)) == 51).all()


def test_find_pictures(tmp_path):
    for name in ("b/2.PNG", "b/10.jpg", "a.webp", "note.txt", ".hidden.png", "b/c/d.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/c/loop").symlink_to(tmp_path)
    expected = [tmp_path / n for n in ("a.webp", "b/10.jpg", "b/2.PNG", "b/c/d.tiff")]
    assert tile.find_pictures(tmp_path) == expected
    assert tile.find_pictures([str(tmp_path / "note.txt"), tmp_path]) == expected + [tmp_path / "note.txt"]
    with pytest.raises(PictureError, match="no such file"):
        tile.find_pictures([tmp_path / "missing"])


# ------------------------------------------------------------------ writing

def test_alpha_on_a_ground(tmp_path):
    picture = Picture(torch.zeros(3, 8, 8), torch.full((1, 8, 8), 0.6))
    assert torch.allclose(tile.composite(picture, (1, 0, 0.5))[:, 0, 0], torch.tensor([0.4, 0, 0.2]))
    assert torch.allclose(tile.composite(picture, torch.ones(3, 8, 8)), torch.full((3, 8, 8), 0.4))
    save_picture(tmp_path / "a.jpg", picture)
    got = read_picture(tmp_path / "a.jpg")
    assert got.alpha is None and abs(pixels(got) - 102).max() <= 1
    for name in ("a.png", "a.webp"):
        save_picture(tmp_path / name, picture)
        assert (pixels(read_picture(tmp_path / name))[..., 3] == 153).all()


def test_grey_stays_grey(tmp_path):
    for suffix in ("png", "jpg"):
        save_picture(tmp_path / f"a.{suffix}", Picture(torch.full((3, 4, 4), 0.2), grey=True))
        assert Image.open(tmp_path / f"a.{suffix}").mode == "L" and read_picture(tmp_path / f"a.{suffix}").grey
    save_picture(tmp_path / "a.png", Picture(torch.rand(3, 4, 4), torch.rand(1, 4, 4), grey=True))
    assert Image.open(tmp_path / "a.png").mode == "LA"


def test_what_cannot_be_saved(tmp_path):
    for name, rgb, reason in (("a.gif", torch.zeros(3, 1, 1), "cannot save as .gif"),
                              ("a", torch.zeros(3, 1, 1), "without suffix"),
                              ("a.webp", torch.zeros(3, 1, 16384), "16383"),
                              ("a.jpg", torch.zeros(3, 65536, 1), "65535")):
        with pytest.raises(PictureError, match=reason):
            save_picture(tmp_path / name, Picture(rgb))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save_picture(tmp_path / "old.png", Picture(torch.zeros(3, 2, 2)))

    def full(path, data):
        with open(path, "wb") as file:
            file.write(bytes(data)[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    for name in ("old.png", "new.png"):
        with pytest.raises(OSError) as e:
            save_picture(tmp_path / name, Picture(torch.ones(3, 2, 2)))
        assert e.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["old.png"]
    assert (pixels(read_picture(tmp_path / "old.png")) == 0).all()


# ------------------------------------------------------------------ tiles

def test_resamplers_tile_exactly():
    """Any size, tile, pad, window grid, scale, batch: weights are positive and add up to one, every pixel is as if
    there were no tiles, as long as the forward reaches no further than half the pad."""
    chance = random.Random(1)
    torch.manual_seed(1)
    for _ in range(120):
        align, scale = chance.choice([1, 2, 4, 8, 16]), chance.choice([1, 2, 3, 4])
        pad = chance.randint(0, 64 // align) * align // 2
        pad += pad * 2 % align
        tiler = Tiler(align * chance.randint(1, max(1, 48 // align)), pad, chance.randint(1, 5), align)
        x = torch.rand(chance.choice([1, 2]), 3, chance.randint(1, 90), chance.randint(1, 90), dtype=torch.float64)
        h, w = x.shape[2:]
        assert torch.allclose(tiler(nearest(scale), x, scale), nearest(scale)(x), rtol=0, atol=1e-6)
        for side in (h, w):
            total = torch.zeros(side * scale)
            for span in tiler.spans(side, scale)[1]:
                assert span.read % align == 0 and (span.weight > 0).all()
                total[span.start:span.stop] += span.weight
            assert torch.allclose(total, torch.ones(side * scale))
        if pad >= 4:
            def bicubic(x):
                return F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)
            whole = tile.window(tile.window(x, 2, 0, -(-h // align) * align), 3, 0, -(-w // align) * align)
            expected = bicubic(whole)[:, :, :h * scale, :w * scale]
            assert torch.allclose(tiler(bicubic, x, scale), expected, rtol=0, atol=1e-6)


def test_tiles_are_equal_and_on_the_grid():
    seen = []

    def forward(x):
        seen.append(x.shape)
        return nearest(2)(x)

    Tiler(64, 32, batch=3)(forward, torch.rand(1, 3, 333, 450), 2)
    assert {s[1:] for s in seen} == {(3, 128, 128)} and max(s[0] for s in seen) == 3
    assert sum(s[0] for s in seen) == Tiler(64, 32).count(333, 450) == 5 * 7
    assert [s.read for s in Tiler(64, 32).spans(333, 2)[1]] == [0, 64, 128, 192, 208]


def test_mirroring_beyond_the_side():
    assert tile.window(torch.arange(4), 0, 0, 12).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1]
    assert tile.window(torch.tensor([7]), 0, 0, 4).tolist() == [7, 7, 7, 7]


@pytest.mark.parametrize("wrong", [dict(tile_size=0), dict(tile_size=40), dict(tile_pad=-8), dict(tile_pad=5),
                                   dict(batch=0)])
def test_wrong_tiles_are_refused(wrong):
    with pytest.raises(ValueError, match="does not work; use"):
        Tiler(**wrong)


def test_wrong_scale_is_noticed():
    with pytest.raises(ValueError, match="not 2 times"):
        Tiler()(nearest(3), torch.rand(1, 3, 20, 20), 2)


def test_gradients_reach_every_pixel_and_weight():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 12, 3, padding=1).double()
    x = torch.rand(2, 3, 70, 50, dtype=torch.float64, requires_grad=True)
    y = Tiler(16, 8, batch=4)(lambda x: F.pixel_shuffle(conv(x), 2), x, 2)
    y.sum().backward()
    tiled, conv.weight.grad = conv.weight.grad, None
    assert (x.grad != 0).all()
    inner, x.grad = x.grad[:, :, 2:60, 2:40].clone(), None
    F.pixel_shuffle(conv(x), 2).sum().backward()
    assert torch.allclose(inner, x.grad[:, :, 2:60, 2:40], atol=1e-5)
    assert torch.allclose(tiled, conv.weight.grad, rtol=0.05)  # but for the mirrored margin, the same


def test_hat_is_the_same_for_any_batch():
    torch.manual_seed(0)
    net = model.HATRefiner.from_preset("tiny", scale=2).eval()
    x = torch.rand(1, 3, 50, 90)
    with torch.no_grad():
        one, five = (net(x, tiler=Tiler(16, 8, batch)) for batch in (1, 5))
        assert one.shape == (1, 3, 100, 180) and (one - five).abs().max() < 1e-5
        assert torch.equal(net(x, tiler=Tiler(96, 32)), net(x, tiler=Tiler(128, 0)))  # one tile holds it all


# ------------------------------------------------------------------ whole pictures

def test_upscale_is_the_tiler_in_strips():
    rgb, calls = torch.rand(3, 75, 100), []
    got = tile.upscale(nearest(3), rgb, 3, Tiler(16, 8, 4), progress=lambda *a: calls.append(a))
    assert torch.allclose(got, nearest(3)(rgb[None])[0], atol=1e-6) and not got.requires_grad
    assert calls[-1] == (4 * 6, 4 * 6) and calls == sorted(calls) and calls[0][0] == 4
    assert tile.upscale(lambda x: x * 9 - 4, rgb, 1, Tiler()).aminmax() == (0, 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_tile_that_is_not_finite_is_done_again_in_fp32(batch):
    x, redone = torch.rand(3, 64, 64), []

    def overflowing(x):
        if torch.is_autocast_enabled("cpu"):
            hot = x[:, :1, :1, :1] > x[:, :1].amax((2, 3), keepdim=True) - 0.5
            return torch.where(hot, torch.nan, x).bfloat16()
        redone.append(len(x))
        return x

    x[0, 0, 0], x[0, 16, 16] = 0.0, 1.0
    got = tile.upscale(overflowing, x, 1, Tiler(16, 8, batch), amp=torch.bfloat16)
    assert got.isfinite().all() and (got - x).abs().max() < 0.01
    assert 0 < sum(redone) < Tiler(16, 8).count(64, 64)  # some, and only the bad ones
    with pytest.raises(FloatingPointError, match="NaN"):
        tile.upscale(lambda x: x / 0, x, 1, Tiler())


def test_alpha_does_not_fringe():
    alpha = torch.zeros(1, 40, 50)
    alpha[:, 10:30, 10:30] = 1
    red = torch.tensor([1.0, 0.2, 0.1]).view(3, 1, 1)
    picture = Picture(red * alpha, alpha, depth=16)  # black wherever it is transparent
    got = tile.upscale_picture(nearest(2), picture, 2, Tiler(16, 8))
    assert got.depth == 16 and torch.allclose(got.rgb, red.expand(3, 80, 100), atol=1e-4)
    assert got.alpha.shape == (1, 80, 100) and got.alpha.min() == 0 and got.alpha.max() == 1
    assert got.alpha[0, 40, 40] == 1 and 0 < got.alpha[0, 20, 30] < 1
    clear = Picture(torch.rand(3, 3, 3), torch.zeros(1, 3, 3))
    assert torch.equal(tile.bled(clear.rgb, clear.alpha), clear.rgb)
    one = torch.tensor([[[0.0, 0.5, 0.0]]])
    assert torch.allclose(tile.bled(torch.tensor([[[0.9, 0.3, 0.7]]]).expand(3, 1, 3), one), torch.tensor(0.3))


# ------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model.save(model.HATRefiner.from_preset("tiny", scale=2), path, {})
    return path


@pytest.fixture
def command(monkeypatch, capsys, weights):
    """command(*args) -> (exit code, stdout, stderr), in this process."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["tile.py", *map(str, args)])
        if "--weights" not in args:
            sys.argv += ["--weights", str(weights)]
        sys.argv += ["--device", "cpu"] if "--device" not in args else []
        with pytest.raises(SystemExit) as e:
            tile.main()
        return e.value.code, *capsys.readouterr()
    return call


def picture_file(path, size=(20, 14), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size[::-1], 4), dtype=np.uint8)).convert(mode).save(path)
    return path


def test_folder_tree(tmp_path, command):
    picture_file(tmp_path / "in/a b.jpg")
    picture_file(tmp_path / "in/deep/壁紙.png", mode="LA")
    (tmp_path / "in/broken.png").write_text("text")
    code, out, err = command(tmp_path / "in", "-o", tmp_path / "in/out")
    assert code == 1 and err.count("\n") == 1 and "broken.png" in err and "2 done, 0 skipped, 1 failed" in out
    assert read_picture(tmp_path / "in/out/a b.png").rgb.shape == (3, 28, 40)
    grey = read_picture(tmp_path / "in/out/deep/壁紙.png")
    assert grey.grey and grey.alpha is not None
    (tmp_path / "in/broken.png").unlink()
    before = (tmp_path / "in/out/a b.png").stat().st_mtime_ns
    code, out, err = command(tmp_path / "in", "-o", tmp_path / "in/out")  # its own results are no input
    assert code == 0 and "0 done, 2 skipped, 0 failed" in out and not err
    assert (tmp_path / "in/out/a b.png").stat().st_mtime_ns == before
    assert "2 done" in command(tmp_path / "in", "-o", tmp_path / "in/out", "--overwrite")[1]
    assert (tmp_path / "in/out/a b.png").stat().st_mtime_ns > before
    assert command(tmp_path / "in", "-o", tmp_path / "kept", "--format", "keep")[0] == 0
    assert (tmp_path / "kept/a b.jpg").exists()


def test_users_mistakes(tmp_path, command, monkeypatch):
    one, out = picture_file(tmp_path / "in/a.png"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    for args, reason in (
            ((tmp_path / "empty", "-o", out), "no picture in"),
            ((tmp_path / "missing", "-o", out), "no such file or folder"),
            ((one, "-o", one), "choose another --out"),
            ((tmp_path / "in", "-o", tmp_path / "in"), "choose another --out"),
            ((one, "-o", out / "a.bmp"), "cannot save as .bmp"),
            ((one, picture_file(tmp_path / "other/a.png"), "-o", out), "would both become"),
            ((one, "-o", out, "--tile-size", "100"), "use a multiple of 16"),
            ((one, "-o", out, "--quality", "0"), "1 to 100"),
            ((one, "-o", out, "--device", "abacus"), "--device abacus"),
            ((one, "-o", one / "below"), "choose another --out"),
            ((one, "-o", out, "--weights", tmp_path / "missing.safetensors"), "missing.safetensors"),
            ((one, "-o", out, "--weights", tmp_path / "cut.safetensors"), "cut.safetensors")):
        code, _, err = command(*args)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and reason in err, (args, err)

    def raises(error):
        def save(*args):
            raise error
        monkeypatch.setattr(tile, "save_picture", save)

    raises(OSError(errno.ENOSPC, "No space left on device"))
    code, _, err = command(one, "-o", out)
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    raises(KeyboardInterrupt())
    code, _, err = command(one, "-o", out)
    assert code == 130 and "interrupted" in err and err.count("\n") == 1
    assert not list(out.rglob("*.*"))


def test_from_the_shell(tmp_path, weights):
    """One picture, 16 bit, by the command as people call it: the result is what the tiler makes of it here."""
    save_picture(tmp_path / "a.png", Picture(torch.rand(3, 30, 41), depth=16))
    out = tmp_path / "new" / "b.png"
    got = subprocess.run([sys.executable, tile.__file__, tmp_path / "a.png", "-o", out, "--weights", weights,
                          "--device", "cpu", "--tile-size", "16", "--tile-pad", "8", "--amp", "off"],
                         capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    with torch.no_grad():
        lr = read_picture(tmp_path / "a.png").rgb[None]
        expected = Tiler(16, 8)(model.load(weights), lr, 2)[0].clamp(0, 1)
    result = read_picture(out)
    assert result.depth == 16 and (result.rgb - expected).abs().max() < 1e-4
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["b.png"]


def test_alone_it_says_what_it_misses(tmp_path):
    shutil.copy(tile.__file__, tmp_path / "tile.py")
    picture_file(tmp_path / "a.png")
    got = subprocess.run([sys.executable, "tile.py", "a.png", "-o", "out"], cwd=tmp_path, capture_output=True,
                         text=True)
    assert got.returncode == 2 and "needs model.py beside tile.py" in got.stderr and got.stderr.count("\n") == 1
