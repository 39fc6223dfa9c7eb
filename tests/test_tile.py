"""Pictures in and out, tiles, the upscaling command. python -m pytest tests/test_tile.py"""
import errno
import io
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps

import convert
import model
import tile
from measure_tiles import psnr
from metrics import seam
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


def bicubic(scale):
    return lambda x: F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)


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


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_one_transparent_level_of_few(tmp_path, bits):
    """Pillow stretches pixels of 2 and 4 bits to 8; the transparent level, here the brightest, is one of the file's."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    most = 2**bits - 1
    row = sum(v << 8 - bits * (i + 1) for i, v in enumerate((0, most)))  # two pixels, black and white
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0))
                                     + chunk(b"tRNS", struct.pack(">H", most)) + chunk(b"IDAT", zlib.compress(bytes([0, row])))
                                     + chunk(b"IEND", b""))
    assert pixels(read_picture(tmp_path / "a.png")).tolist() == [[[0, 255], [255, 0]]]


def test_32_bits_are_refused(tmp_path):
    """They have no agreed white: taken for 16 bits they were white all over."""
    Image.fromarray(np.int32([[0, 70000], [2**30, 5]])).save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match="a.tif: 32-bit samples"):
        read_picture(tmp_path / "a.tif")


def test_who_drew_a_tiff_is_kept(tmp_path):
    tags = Image.Exif()
    tags[315], tags[33432], tags[tile.ORIENTATION] = "somebody", "CC0", 6
    Image.new("RGB", (8, 6)).save(tmp_path / "a.tif", exif=tags)
    save_picture(tmp_path / "b.png", read_picture(tmp_path / "a.tif"))
    with Image.open(tmp_path / "b.png") as im:
        assert dict(im.getexif()) == {315: "somebody", 33432: "CC0"} and im.size == (6, 8)


def test_cmyk(tmp_path):
    flat = np.zeros((8, 8, 4), np.uint8)
    flat[..., 0] = 255  # all cyan
    Image.fromarray(flat, "CMYK").save(tmp_path / "a.tif")
    assert (pixels(read_picture(tmp_path / "a.tif")) == (0, 255, 255)).all()
    Image.fromarray(flat, "CMYK").save(tmp_path / "a.jpg", quality=100, icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 200)
    got = read_picture(tmp_path / "a.jpg")
    assert abs(pixels(got) - (0, 255, 255)).max() <= 2 and got.icc is None
    assert got.note == "CMYK converted to sRGB without profile"  # that one made no sense


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


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif"])
def test_exif_survives_from_webp(tmp_path, suffix):
    """Pillow gives it without the head that JPEG wants."""
    tags = Image.Exif()
    tags[0x010E] = "a title"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=tags)
    save_picture(tmp_path / f"b.{suffix}", read_picture(tmp_path / "a.webp"))
    with Image.open(tmp_path / f"b.{suffix}") as im:
        assert im.getexif()[0x010E] == "a title"


@pytest.mark.parametrize("suffix", ["jpg", "avif"])
def test_thin_coloured_lines_keep_their_colour(tmp_path, suffix):
    rgb = torch.full((3, 64, 64), 0.9)
    rgb[1:, ::4] = 0.1  # red lines, one pixel wide
    save_picture(tmp_path / f"a.{suffix}", Picture(rgb), 95)
    assert (read_picture(tmp_path / f"a.{suffix}").rgb - rgb).abs().mean() < 0.015  # 0.05 and more at half resolution


def test_postscript_is_refused_whatever_its_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(PictureError, match="a.png: PostScript"):
        read_picture(tmp_path / "a.png")


def test_senseless_exif_is_dropped(tmp_path):
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x63")
    assert read_picture(tmp_path / "a.jpg").rgb.shape == (3, 5, 7)


def test_a_tag_that_cannot_be_written_does_not_turn_the_picture(tmp_path):
    """ResolutionUnit as text: the picture came out as it was stored, on its side."""
    entries = struct.pack(">H HHIHxx HHI4s I", 2, tile.ORIENTATION, 3, 1, 6, 0x0128, 2, 2, b"x", 0)
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08" + entries)
    got = read_picture(tmp_path / "a.jpg")
    assert got.rgb.shape == (3, 7, 5) and tile.size_of(tmp_path / "a.jpg") == (7, 5)


def test_an_orientation_there_is_not(tmp_path):
    exif = Image.Exif()
    exif[tile.ORIENTATION] = 9
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.jpg", exif=exif)
    assert tile.size_of(tmp_path / "a.jpg") == read_picture(tmp_path / "a.jpg").rgb.shape[1:]


def test_what_a_file_says_of_its_samples_and_we_leave_is_said(tmp_path):
    tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128),
            (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, 24)]
    body = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    body += struct.pack("<I", 0) + struct.pack("<3H", 16, 16, 16)
    (tmp_path / "deep.tif").write_bytes(body.ljust(128, b"\0") + struct.pack("<12H", *range(0, 60000, 5000)))
    deep = read_picture(tmp_path / "deep.tif")
    assert deep.rgb.shape == (3, 2, 2) and (deep.depth == 16) == (not deep.note) and "16-bit TIFF" in (deep.note or "16-bit TIFF")
    Image.fromarray(RGBA).save(tmp_path / "a.png")
    plain = (tmp_path / "a.png").read_bytes()
    for gamma, told in ((100000, True), (45455, False)):
        chunk = b"gAMA" + struct.pack(">I", gamma)
        (tmp_path / "a.png").write_bytes(plain[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:])
        assert ("gamma of the file left behind" in read_picture(tmp_path / "a.png").note) == told


def test_a_profile_of_colours_on_a_grey_picture_is_kept(tmp_path, command):
    Image.fromarray(RGBA[..., 0]).save(tmp_path / "a.png", icc_profile=display_p3())
    for name in ("b.png", "b.jpg"):
        assert command(tmp_path / "a.png", "-o", tmp_path / name)[0] == 0 and read_picture(tmp_path / name).icc == display_p3()
    converted = read_picture(tmp_path / "a.png", srgb=True)
    assert converted.icc is None and converted.grey and converted.note == "Display P3 converted to sRGB"


def test_profiles_that_fit_nothing_are_gone_and_not_called_kept(tmp_path):
    Image.fromarray(RGBA, "CMYK").save(tmp_path / "a.jpg", icc_profile=display_p3())
    got = read_picture(tmp_path / "a.jpg")
    assert got.icc is None and got.note == "CMYK converted to sRGB without profile"
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.png", icc_profile=b"\0" * 200)
    got = read_picture(tmp_path / "a.png", srgb=True)
    assert got.icc is None and not got.note


def test_colour_profile_is_kept(tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.png", icc_profile=icc)
    picture = read_picture(tmp_path / "a.png")
    for name in ("b.png", "b.jpg", "b.webp"):
        save_picture(tmp_path / name, picture)
        assert read_picture(tmp_path / name).icc == icc


def display_p3():
    """An ICC profile, version 2, with the primaries of Display P3 (adapted to D50) and gamma 2.2."""
    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))
    desc = b"desc\0\0\0\0" + struct.pack(">I", 11) + b"Display P3\0" + b"\0" * 78
    tags = {b"desc": desc + b"\0" * (-len(desc) % 4), b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    for name, xyz in (b"rXYZ", (0.51512, 0.24120, -0.00105)), (b"gXYZ", (0.29198, 0.69225, 0.04189)), (
            b"bXYZ", (0.15710, 0.06657, 0.78407)):
        tags[name] = b"XYZ \0\0\0\0" + fixed(*xyz)
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        tags[name] = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(2.2 * 256))
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


def test_conversion_to_srgb(tmp_path):
    """Display P3 (gamma 2.2 here) by the matrices of its definition, computed apart from Pillow."""
    colours = np.uint8([[[200, 100, 50], [90, 140, 120], [128, 128, 128], [60, 90, 160]]])
    to_srgb = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    linear = (colours / 255.0)**2.2 @ to_srgb.T
    expected = 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear**(1 / 2.4) - 0.055)
    alpha = np.uint8([[[255], [255], [7], [0]]])
    Image.fromarray(np.concatenate([colours, alpha], -1)).save(tmp_path / "a.png", icc_profile=display_p3())
    kept, converted = read_picture(tmp_path / "a.png"), read_picture(tmp_path / "a.png", srgb=True)
    assert kept.icc == display_p3() and (pixels(kept)[..., :3] == colours).all() and not kept.note
    assert abs(pixels(converted)[..., :3] - expected).max() < 2 and (pixels(converted)[..., 3:] == alpha).all()
    assert converted.icc is None and converted.note == "Display P3 converted to sRGB"
    save_picture(tmp_path / "deep.png", Picture(torch.rand(3, 4, 4), depth=16, icc=display_p3()))
    deep = read_picture(tmp_path / "deep.png", srgb=True)
    assert deep.icc == display_p3() and deep.note == "profile kept, 16 bit"


def linear_grey():
    """An ICC profile for grey whose levels are linear light."""
    profile = bytearray(display_p3())
    profile[16:20] = b"GRAY"
    return bytes(profile).replace(b"rTRC", b"kTRC").replace(struct.pack(">IH", 1, round(2.2 * 256)), struct.pack(">IH", 1, 256))


def test_grey_profiles(tmp_path, command):
    """Converted as those of colours, and where a format holds no grey, and so no profile of grey, without being asked."""
    grey = np.uint8([[0, 100], [180, 255]])
    expected = [[0, 168], [218, 255]]     # 255 * (1.055 * (x / 255)**(1 / 2.4) - 0.055)
    Image.fromarray(grey).resize((8, 8), 0).save(tmp_path / "a.png", icc_profile=linear_grey())
    kept, converted = read_picture(tmp_path / "a.png"), read_picture(tmp_path / "a.png", srgb=True)
    assert kept.icc == linear_grey() and (pixels(kept)[::4, ::4, 0] == grey).all()
    assert converted.icc is None and converted.grey and converted.note == "Display P3 converted to sRGB"
    assert abs(pixels(converted)[::4, ::4, 0].astype(int) - expected).max() < 2
    for name, profile in (("b.png", linear_grey()), ("b.webp", None)):
        code, shown, _ = command(tmp_path / "a.png", "-o", tmp_path / name, "--strength", "0")
        assert code == 0 and ("converted to sRGB" in shown) == (profile is None)
        made = read_picture(tmp_path / name)
        assert made.icc == profile and abs(pixels(made)[2, -2, 0].astype(int) - (168 if profile is None else 100)) < 4
    deep = np.uint16([[0, 65535], [30000, 5]])
    save_picture(tmp_path / "deep.png", Picture(torch.from_numpy(deep / 65535).float().expand(3, 2, 2), grey=True, depth=16,
                                                icc=linear_grey()))
    assert "grey profile left behind" in command(tmp_path / "deep.png", "-o", tmp_path / "deep.webp")[1]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    extra = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **extra)
    got = read_picture(tmp_path / f"a.{suffix}")
    assert (pixels(got)[..., :3] == (255, 0, 0)).all() and got.note == "first of 2 frames"


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
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails/a.png").touch()
    (tmp_path / "b/e.jfif").touch()
    expected = [tmp_path / n for n in ("a.webp", "b/10.jpg", "b/2.PNG", "b/c/d.tiff", "b/e.jfif")]
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
                              ("a.jpg", torch.zeros(3, 65501, 1), "65500")):
        with pytest.raises(PictureError, match=reason):
            save_picture(tmp_path / name, Picture(rgb))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["old.png", "new.png", "old.webp", "new.webp"])
def test_a_full_disk_leaves_what_was_there(tmp_path, name):
    """A file that may not grow beyond 4 KiB stands for the disk; PNG is written as it comes, the others at once."""
    resource = pytest.importorskip("resource")
    save_picture(tmp_path / "old.png", Picture(torch.zeros(3, 2, 2)))
    save_picture(tmp_path / "old.webp", Picture(torch.zeros(3, 2, 2)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as e:
            save_picture(tmp_path / name, Picture(torch.rand(3, 64, 64)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.errno == errno.EFBIG
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.png", "old.webp"]
    assert (pixels(read_picture(tmp_path / "old.png")) == 0).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_strips_make_the_same_file(tmp_path, mode):
    """PNG, 8 bit, in strips of any height: what Pillow reads is what was given, and no larger than Pillow's own."""
    ramp = np.add.outer(np.arange(150), np.arange(90))[..., None] * np.array([1, 0.5, 0.2, 1.4])
    array = (ramp + RNG.integers(0, 3, (150, 90, 4))).clip(0, 255).astype(np.uint8)
    array = np.array(Image.fromarray(array).convert(mode)).reshape(150, 90, -1)
    x = torch.from_numpy(array).permute(2, 0, 1) / 255
    grey, alpha = mode in ("L", "LA"), x[-1:] if "A" in mode else None
    rgb = x[:1].expand(3, -1, -1) if grey else x[:3]
    save_picture(tmp_path / "a.png", Picture(rgb, alpha, grey))
    whole = torch.cat([rgb] if alpha is None else [rgb, alpha])
    tile.save_strips(tmp_path / "b.png", iter(whole.split([1, 63, 17, 69], 1)), (150, 90), Picture(rgb, alpha, grey))
    for name in ("a.png", "b.png"):
        im = Image.open(tmp_path / name)
        assert im.mode == mode and (np.asarray(im).reshape(array.shape) == array).all()
    Image.fromarray(array.squeeze()).save(tmp_path / "pillow.png")
    assert (tmp_path / "a.png").stat().st_size < 1.1 * (tmp_path / "pillow.png").stat().st_size


def test_dither():
    """Right on average in every corner, whole levels untouched, the same whatever the strips."""
    ramp = torch.linspace(100, 104, 256).expand(3, 96, 256) / 255
    def wrong(x):  # in the mean of any 16x16 pixels
        return abs((x - ramp.permute(1, 2, 0).numpy() * 255).reshape(6, 16, 16, 16, 3).mean((1, 3))).max()

    got = tile.quantised(ramp, 8, 0)
    assert set(np.unique(got)) <= {100, 101, 102, 103, 104}
    assert wrong(got) < 0.06 and wrong(tile.quantised(ramp, 8)) > 0.3
    strips = [tile.quantised(ramp[:, a:b], 8, a) for a, b in ((0, 7), (7, 64), (64, 96))]
    assert (np.concatenate(strips) == got).all()
    assert len({got[..., c].tobytes() for c in range(3)}) == 3  # colours are not scattered alike
    levels = torch.arange(256).expand(3, 50, 256) / 255
    assert (tile.quantised(levels, 8, 13) == tile.quantised(levels, 8)).all()


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
            owned = torch.zeros(-(-side // align) * align)
            for read, start, stop in tiler.cores(side):
                width = tiler.spans(side, scale)[0]
                assert 0 <= start < stop <= width  # cut where neighbours' overlap is halved, away from their edges
                assert (start == 0 or start >= pad - 1) and (stop == width or width - stop >= pad - 1)
                owned[read + start:read + stop] += 1
            assert (owned == 1).all()
        if pad >= 4:
            whole = tile.window(tile.window(x, 2, 0, -(-h // align) * align), 3, 0, -(-w // align) * align)
            expected = bicubic(scale)(whole)[:, :, :h * scale, :w * scale]
            assert torch.allclose(tiler(bicubic(scale), x, scale), expected, rtol=0, atol=1e-6)


def test_tiles_are_equal_and_on_the_grid():
    seen = []

    def forward(x):
        seen.append(x.shape)
        return nearest(2)(x)

    Tiler(64, 32, batch=3)(forward, torch.rand(1, 3, 333, 450), 2)
    assert {s[1:] for s in seen} == {(3, 128, 128)} and max(s[0] for s in seen) == 3
    assert sum(s[0] for s in seen) == Tiler(64, 32).count(333, 450) == 5 * 7
    assert [s.read for s in Tiler(64, 32).spans(333, 2)[1]] == [0, 64, 128, 192, 208]
    for tile_size, side, width, reads in ((384, 1080, 384, [0, 352, 696]), (384, 400, 400, [0]),
                                          (64, 112, 72, [0, 40])):
        got, spans = Tiler(tile_size, 16, align=8).spans(side, 2)  # shared out evenly
        assert (got, [s.read for s in spans]) == (width, reads)


def test_mirroring_beyond_the_side():
    assert tile.window(torch.arange(4), 0, 0, 12).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1]
    assert tile.window(torch.tensor([7]), 0, 0, 4).tolist() == [7, 7, 7, 7]


@pytest.mark.parametrize("wrong", [dict(tile_size=0), dict(tile_size=40), dict(tile_pad=-8), dict(tile_pad=5),
                                   dict(batch=0)])
def test_wrong_tiles_are_refused(wrong):
    with pytest.raises(ValueError, match="does not work; use"):
        Tiler(**wrong)


def test_smaller_tiles_come_to_an_end():
    tiler, seen = Tiler(384, 16, 3, 8), []
    while tiler:
        seen.append((tiler.tile_size, tiler.batch))
        tiler = tiler.smaller()
    assert seen == [(384, 3), (384, 1), (192, 1), (96, 1), (48, 1), (24, 1)]


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
    assert tile.upscale(lambda x: x * 1.2 - 0.1, rgb, 1, Tiler()).aminmax() == (0, 1)
    strips = list(tile.upscaled(nearest(3), rgb, 3, Tiler(16, 8)))
    assert len(strips) > 3 and torch.equal(torch.cat(strips, 1), got)


def scene(height=96, width=128):
    """Shades, a checkerboard that grows stronger to the right, some noise: no two tiles alike."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))
    return noise * 0.05 + torch.stack([0.5 + 0.3 * torch.sin(x / 9 + y / 17), 0.2 + 0.6 * x / width,
                                       ((x // 8 + y // 8) % 2) * 0.5 * (x / width) + 0.2])


@pytest.fixture
def coupled(monkeypatch):
    """An untrained tiny model whose channel attention has a hand in the result, and a refiner that does something."""
    monkeypatch.setattr(model, "CONV_SCALE", 0.5)
    torch.manual_seed(0)
    net = model.HATRefiner.from_preset("tiny", scale=2).eval()
    with torch.no_grad():
        net.hat_model.conv_after_body.weight[:3].normal_(0, 0.005)
        net.out_conv.weight.normal_(0, 0.05)
        for m in net.modules():
            if isinstance(m, model.ChannelAttention):
                m.attention[1].weight *= 6
                m.attention[3].weight *= 6
    return net


def test_the_refiner_goes_over_the_joined_picture(coupled):
    lr, tiler = scene(70, 90), Tiler(16, 8, align=4)
    with torch.no_grad():
        expected, plain = coupled(lr[None], tiler)[0], tiler(coupled.hat_model, lr[None], 2)[0]
    got = tile.upscale(coupled, lr, 2, tiler)
    assert (got - expected.clamp(0, 1)).abs().max() < 1e-5 < 0.01 < (got - plain).abs().max()
    coupled.refine = False
    assert (tile.upscale(coupled, lr, 2, tiler) - plain.clamp(0, 1)).abs().max() < 1e-5
    whole = tile.upscale(coupled.hat_model, lr, 2, tiler)  # HAT by itself has no refiner to take off
    assert (whole - plain.clamp(0, 1)).abs().max() < 1e-5


@pytest.mark.parametrize("batch, tta", [(1, False), (4, False), (2, True)])
def test_synchronised_channel_attention(coupled, batch, tta):
    """Tiled against whole, and no seam: rough is far nearer than off, exact as good as equal. A picture that is no
    multiple of the window, so that its mirrored margin counts as it does in the whole."""
    lr, tiler = (scene(46, 63), Tiler(16, 16, batch, 4)) if tta else (scene(94, 127), Tiler(32, 16, batch, 4))
    whole = tile.upscale(coupled, lr, 2, Tiler(128, 0, align=4), tta=tta)
    if not tta:
        with torch.no_grad():
            assert (coupled(lr[None])[0].clamp(0, 1) - whole).abs().max() < 1e-5
    lines = tiler.seams(*lr.shape[1:], 2)
    found, calls = {}, []
    for sync in ("off", "rough", "exact"):
        sr = tile.upscale(coupled, lr, 2, tiler, sync=sync, tta=tta, progress=lambda *a: calls.append(a))
        found[sync] = psnr(sr, whole)
        assert 0.98 < seam(sr, whole, lines) < 1.02
        assert calls[-1][0] == calls[-1][1]
    assert found["off"] < 75 and found["rough"] > found["off"] + 25 and found["exact"] > max(found["rough"] + 10, 110)
    assert all(m.global_pool is None for m in coupled.modules() if isinstance(m, model.ChannelAttention))


def test_synchronised_means_are_those_of_the_whole(coupled):
    lr, tiler, seen = scene(), Tiler(32, 16, align=4), {}
    layers = [m for m in coupled.modules() if isinstance(m, model.ChannelAttention)]

    def watch(i, x):
        seen[0, i] = x.mean((1, 2))[0]
        return x.mean((1, 2))

    for i, layer in enumerate(layers):
        layer.global_pool = lambda x, i=i: watch(i, x)
    with torch.inference_mode():
        coupled(lr[None])
        for layer in layers:
            layer.global_pool = None
        pools = tile.SharedPools(coupled)

        def run(tiles, mask):
            pools.mask = mask
            with pools, pytest.raises(tile.Enough):  # it never gets to the upsampler
                coupled(tiles)

        list(pools.settle(run, lr[None], tiler, "exact"))
    assert pools.means.keys() == seen.keys() and len(seen) == 4
    for key, mean in seen.items():
        assert (pools.means[key] - mean).abs().max() < 1e-3 * mean.abs().max()


def test_rough_looks_at_some_of_many_tiles(coupled, monkeypatch):
    monkeypatch.setattr(tile.SharedPools, "ROUGH_TILES", 5)
    calls = []
    tile.upscale(coupled, scene(40, 40), 2, Tiler(8, 4, align=4), sync="rough", progress=lambda *a: calls.append(a))
    assert calls[-1] == (5 + 16, 5 + 16)


def test_sync_without_such_layers_is_none():
    rgb = torch.rand(3, 40, 50)
    for network in (nearest(2), torch.nn.Upsample(scale_factor=2)):
        for sync in ("rough", "exact"):
            got = tile.upscale(network, rgb, 2, Tiler(16, 8), sync=sync)
            assert torch.allclose(got, nearest(2)(rgb[None])[0], atol=1e-6)


def test_flips_and_turns():
    x = torch.rand(1, 3, 4, 6)
    every = [tile.turn(x, k) for k in range(8)]
    assert all(torch.equal(tile.turn_back(y, k), x) for k, y in enumerate(every))
    assert len({(y.shape, y.flatten().numpy().tobytes()) for y in every}) == 8
    kernel = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 13.5

    def lopsided(x):
        return nearest(2)(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel))

    got = tile.upscale(lopsided, x[0], 2, Tiler(16, 0), tta=True)
    expected = torch.stack([tile.turn_back(lopsided(tile.turn(x, k)), k) for k in range(8)]).mean(0)[0]
    # a tile is mirrored out to the window grid first, which a replicated edge does not see
    assert (got - expected)[:, 2:-2, 2:-2].abs().max() < 1e-5
    assert (expected - lopsided(x)[0]).abs().max() > 0.01


def test_halos():
    """Whatever the strips, a vertical box over 9 rows gives what it gives on the whole."""
    chance, x = random.Random(0), torch.rand(2, 60, 5)

    def box(x):
        return F.avg_pool2d(F.pad(x, (0, 0, 4, 4), mode="replicate"), (9, 1), stride=1)

    for _ in range(20):
        cuts = sorted(chance.sample(range(0, 30), chance.randint(0, 12)))
        strips = [x[:, 2 * a:2 * b] for a, b in zip([0, *cuts], [*cuts, 30]) if b > a]
        tops = []
        got = list(tile.with_halo(iter(strips), lambda part, top: tops.append(top) or box(part), 4, 60))
        assert torch.equal(torch.cat(got, 1), box(x)) and all(top % 2 == 0 for top in tops)


@pytest.mark.parametrize("size", [(60, 90), (45, 70), (31, 33), (8, 200), (200, 8), (1, 1), (77, 51)])
def test_resizing_in_strips(size):
    x = torch.rand(3, 60, 51)
    whole = tile.lanczos(x, size)
    pillow = Image.fromarray(x[1].numpy()).resize(size[::-1], Image.Resampling.LANCZOS)
    assert torch.allclose(whole[1], torch.from_numpy(np.array(pillow)).clamp(0, 1), atol=1e-6)
    for heights in ([60], [1, 2, 3, 54], [16, 16, 16, 12], [59, 1]):
        got = torch.cat(list(tile.resized(iter(x.split(heights, 1)), 60, size)), 1)
        assert got.shape == whole.shape and torch.allclose(got, whole, atol=1e-4)


def test_strength_goes_from_lanczos_to_the_model():
    rgb, tiler = torch.rand(3, 100, 60), Tiler(32, 8, align=8)
    plain, sr = tile.lanczos(rgb, (200, 120)), nearest(2)(rgb[None])[0]
    for strength in (0, 0.3, 1):
        got = tile.upscale(nearest(2), rgb, 2, tiler, strength=strength)
        assert torch.allclose(got, plain + strength * (sr - plain), atol=1e-4)


def test_low_frequencies_are_locked():
    """A model that shifts colours and sharpens: the shift goes, the sharpness stays; the same for any tiles."""
    rgb = scene(152, 96) * 0.6 + 0.1

    def drifting(x):
        up = bicubic(2)(x)
        soft = F.avg_pool2d(F.pad(up, (2,) * 4, mode="replicate"), 5, 1)
        return up + 1.5 * (up - soft) + torch.tensor([0.05, -0.03, 0.02]).view(3, 1, 1)

    tiler = Tiler(32, 16, align=8)
    free, held = (tile.upscale(drifting, rgb, 2, tiler, low_freq_lock=lock) for lock in (False, True))
    drift = [(F.avg_pool2d(x, 2) - rgb).mean((1, 2)).abs().min() for x in (free, held)]
    assert drift[0] > 0.015 and drift[1] < 1e-3
    assert (held.diff(dim=2).abs().mean() / free.diff(dim=2).abs().mean() - 1).abs() < 0.02
    other = tile.upscale(drifting, rgb, 2, Tiler(256, 0, align=2), low_freq_lock=True)
    assert (held - other).abs().max() < 1e-4


@pytest.mark.parametrize("alpha", ["lanczos", "model"])
@pytest.mark.parametrize("size", [None, (101, 77)])
def test_alpha_and_size(alpha, size):
    picture = Picture(torch.rand(3, 70, 60), torch.rand(1, 70, 60))
    got = tile.upscale_picture(nearest(2), picture, 2, Tiler(16, 8), size=size, alpha=alpha)
    large = nearest(2)(picture.alpha[None])[0]
    expected = large if alpha == "model" else picture.alpha
    expected = expected if size is None and alpha == "model" else tile.lanczos(expected, size or (140, 120))
    assert torch.allclose(got.alpha, expected, atol=1e-4)
    rgb = nearest(2)(picture.rgb[None])[0]
    assert torch.allclose(got.rgb, rgb if size is None else tile.lanczos(rgb, size), atol=1e-4)


def test_progress_with_alpha_by_the_model():
    """It went to and fro between the tiles of the colours and those of alpha."""
    picture, seen = Picture(torch.rand(3, 70, 60), torch.rand(1, 70, 60)), []
    tile.upscale_picture(nearest(2), picture, 2, Tiler(16, 8), alpha="model", progress=lambda *at: seen.append(at))
    total = Tiler(16, 8).count(70, 60)
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {of for _, of in seen} == {total}


def test_cropping():
    rgb = torch.full((3, 300, 100), 0.5)
    rgb[:, 200:260] = torch.rand(3, 60, 100)  # the detail
    portrait = Picture(rgb, torch.rand(1, 300, 100))
    assert tile.cropped(portrait, (50, 100), "top").rgb.equal(rgb[:, :50])
    assert tile.cropped(portrait, (50, 100)).rgb.equal(rgb[:, 125:175])
    focus = tile.cropped(portrait, (70, 100), "focus")
    assert focus.rgb.shape == (3, 70, 100) and (focus.rgb != 0.5).float().mean() > 0.8
    assert focus.alpha.shape == (1, 70, 100)
    landscape = Picture(rgb.transpose(1, 2))
    assert tile.cropped(landscape, (100, 50), "top").rgb.equal(landscape.rgb[:, :, 125:175])
    assert (tile.cropped(landscape, (100, 70), "focus").rgb != 0.5).float().mean() > 0.8
    for h, w in ((1, 1), (1, 300), (300, 1), (7, 5), (300, 100)):
        for where in ("center", "top", "focus"):
            assert tile.cropped(Picture(torch.rand(3, h, w)), (300, 100), where).rgb.numel() > 0
    assert tile.cropped(portrait, (600, 200), "focus").rgb.equal(rgb)  # the same aspect: all of it


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


def test_a_black_tile_is_done_again_and_never_kept():
    """Finite, but with nothing of the input in it. Noise that is smoothed away and dark pictures are in order."""
    x = torch.rand(3, 64, 64) * 0.5

    def black(x):
        return torch.zeros_like(x) if torch.is_autocast_enabled("cpu") else x

    got = tile.upscale(black, x, 1, Tiler(16, 8), amp=torch.bfloat16)
    assert torch.allclose(got, x, atol=1e-6)
    for how in (torch.zeros_like, torch.ones_like, lambda x: x + 0.3):
        with pytest.raises(FloatingPointError, match="little to do with it"):
            tile.upscale(how, x, 1, Tiler(16, 8))
    for fine in (lambda x: F.avg_pool2d(F.pad(x, (4,) * 4, mode="reflect"), 9, 1), lambda x: x * 1.05 + 0.01):
        tile.upscale(fine, x, 1, Tiler(16, 8))
        tile.upscale(fine, x * 0.02, 1, Tiler(16, 8))


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
    """command(*args) -> (exit code, stdout, stderr), in this process; weights None names none."""
    def call(*args, weights=weights):
        monkeypatch.setattr(sys, "argv", ["tile.py", *map(str, args)])
        if weights and "--weights" not in args:
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


def test_what_jpeg_cannot_hold_is_said(tmp_path, command):
    source = picture_file(tmp_path / "a.png", mode="RGBA")
    assert "transparency laid on white" in command(source, "-o", tmp_path / "a.jpg")[1]
    assert "laid on white" not in command(source, "-o", tmp_path / "b.webp")[1]
    save_picture(tmp_path / "deep.png", Picture(torch.rand(3, 8, 8), depth=16))
    assert "16 bit became 8" in command(tmp_path / "deep.png", "-o", tmp_path / "d.jpg")[1]
    assert "became" not in command(tmp_path / "deep.png", "-o", tmp_path / "d.png")[1]


@pytest.mark.parametrize("suffix", (".jxl", ".heic", ".jp2", ".bmp"))
def test_a_format_that_cannot_be_written_is_no_folder(tmp_path, command, suffix):
    code, _, err = command(picture_file(tmp_path / "a.png"), "-o", tmp_path / f"x{suffix}")
    assert code == 2 and "cannot save as" in err and not (tmp_path / f"x{suffix}").exists()


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


def test_a_source_under_another_name_is_not_overwritten(tmp_path, command):
    """As IMG.PNG and IMG.png are one file on a disk that ignores case; here by a hard link."""
    source = picture_file(tmp_path / "in/A.PNG")
    (tmp_path / "out").mkdir()
    os.link(source, tmp_path / "out/A.png")
    before = source.read_bytes()
    code, _, err = command(source, "-o", tmp_path / "out", "--format", "png", "--overwrite")
    assert code == 2 and "is itself one of the pictures" in err and source.read_bytes() == before


def test_captions_beside_pictures_are_passed_over(tmp_path, command):
    picture_file(tmp_path / "in/a.png")
    for name in ("a.caption", "a.json", "a.txt"):
        (tmp_path / "in" / name).write_text("1girl, starry sky")
    assert "1 done, 0 skipped, 0 failed" in command(*sorted((tmp_path / "in").iterdir()), "-o", tmp_path / "out")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_for_each_process_where_there_is_none(tmp_path, command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    code, _, err = command(picture_file(tmp_path / "a.png"), "-o", tmp_path / "out", "--device", "cuda")
    assert code == 2 and err.startswith("error: --device cuda") and err.count("\n") == 1


def test_users_mistakes(tmp_path, command, monkeypatch):
    one, out = picture_file(tmp_path / "in/a.png"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    for args, reason in (
            ((tmp_path / "empty", "-o", out), "no picture in"),
            ((tmp_path / "missing", "-o", out), "no such file or folder"),
            ((one, "-o", one), "choose another --out"),
            ((tmp_path / "in", "-o", tmp_path / "in"), "holds the pictures themselves; choose another --out"),
            ((one, picture_file(tmp_path / "other/c.png"), "-o", tmp_path / "big.png"), "is the name of a file"),
            ((tmp_path / "in", "-o", tmp_path / "big.png"), "is the name of a file"),
            ((one, "-o", "x" * 300), "name too long"),
            (("x" * 300, "-o", out), "no such file"),
            ((one, "-o", out / "a.bmp"), "cannot save as .bmp"),
            ((one, picture_file(tmp_path / "other/a.png"), "-o", out), "would both become"),
            ((one, "-o", out, "--tile-size", "102"), "use a multiple of 4"),
            ((one, "-o", out, "--tile-size", "0"), "use a multiple of 4"),
            ((one, "-o", out, "--tile-pad", "3"), "use 0 or a multiple of 2"),
            ((one, "-o", out, "--batch", "0"), "use 1 or more"),
            ((one, "-o", out, "--quality", "0"), "1 to 100"),
            ((one, "-o", out, "--strength", "1.5"), "use 0 to 1"),
            ((one, "-o", out, "--scale", "-2"), "--scale -2"),
            ((one, "-o", out, "--scale", "3", "--fit", "9x9"), "exclude each other"),
            ((one, "-o", out, "--skip-larger"), "go with --fit"),
            ((one, "-o", out, "--crop", "top"), "go with --fit"),
            ((one, "-o", out, "--overwrite", "--skip-existing"), "exclude each other"),
            ((one, "-o", out, "--depth", "16", "--format", "jpg"), "PNG only"),
            ((one, "-o", out / "a.webp", "--depth", "16"), "PNG only"),
            ((one, "-o", out, "--depth", "16", "--dither"), "--dither is for 8 bit"),
            ((one, "-o", out / "a.webp", "--format", "avif"), "says its own"),
            ((one, "-o", out, "--device", "abacus"), "--device abacus"),
            ((one, "-o", out, "--device", "meta"), "--device meta"),
            ((one, "-o", one / "below"), "choose another --out"),
            ((one, "-o", out, "--weights", tmp_path / "missing.safetensors"), "missing.safetensors"),
            ((one, "-o", out, "--weights", tmp_path / "cut.safetensors"), "cut.safetensors")):
        code, _, err = command(*args)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and reason in err, (args, err)
    for args, reason in ((("--fit", "4k"), "4k is no size; write it as 3840x2160"),
                         (("--tile", "big"), "pixels or auto")):
        code, _, err = command(one, "-o", out, *args)
        assert code == 2 and reason in err.splitlines()[-1]  # argparse puts the usage before it

    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as m:
        m.setattr(tile.tempfile, "TemporaryFile", read_only)
        code, _, err = command(one, "-o", out)
        assert code == 2 and err == f"error: cannot write to {out}: Read-only file system; choose another --out\n"

    def raises(error):
        def save(*args):
            raise error
        monkeypatch.setattr(tile, "save_strips", save)

    two = tmp_path / "in/b.png"
    shutil.copy(one, two)
    raises(OSError(errno.ENOSPC, "No space left on device"))
    code, _, err = command(one, two, "-o", out)
    assert code == 2 and err == (f"error: cannot write {out / 'a.png'}: No space left on device; 0 pictures done so "
                                 "far are kept\n")
    raises(OSError(errno.EACCES, "Permission denied"))  # of this file; others may be allowed
    code, shown, err = command(one, two, "-o", out)
    assert code == 1 and err == "".join(f"cannot write {out / p.name}: Permission denied\n" for p in (one, two))
    assert "0 done, 0 skipped, 2 failed" in shown
    raises(KeyboardInterrupt())
    code, _, err = command(one, "-o", out)
    assert code == 130 and "interrupted" in err and err.count("\n") == 1
    assert not list(out.rglob("*.*"))


def test_results_may_lie_above_the_pictures(tmp_path, command, monkeypatch):
    """`-o .` took every picture for a result of its own."""
    picture_file(tmp_path / "walls/raw/a.jpg")
    monkeypatch.chdir(tmp_path / "walls")
    assert "1 done" in command("raw", "-o", ".")[1] and (tmp_path / "walls/a.png").exists()
    assert "1 done" in command("raw", "-o", "..")[1] and (tmp_path / "a.png").exists()


def test_odd_names_do_not_stop_a_folder(tmp_path, command):
    folder = tmp_path / "in"
    picture_file(folder / "b.png")
    shutil.copy(picture_file(tmp_path / "a.jpg"), folder / ("x" * 251 + ".jpg"))
    (folder / "loop.png").symlink_to(folder / "loop.png")
    code, out, err = command(folder, "-o", tmp_path / "out", "--format", "webp")
    assert code == 1 and "1 done, 0 skipped, 2 failed" in out and err.count("\n") == 2
    assert "loop.png" in err and "too long" in err


def test_a_log_that_cannot_hold_japanese(tmp_path, weights):
    for name in ("壁.png", "紙.png"):
        picture_file(tmp_path / "in" / name)
    got = subprocess.run([sys.executable, tile.__file__, tmp_path / "in", "-o", tmp_path / "out", "--weights", weights,
                          "--device", "cpu"], capture_output=True, env=os.environ | dict(PYTHONIOENCODING="cp1252"))
    assert got.returncode == 0 and b"2 done" in got.stdout, got.stderr


def test_what_the_device_refuses_is_one_line(tmp_path, command, monkeypatch):
    one = picture_file(tmp_path / "a.png")

    def refuses(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    for where in ("load_any", "auto_tile_size"):
        with monkeypatch.context() as m:
            m.setattr(*((convert, "load_any") if where == "load_any" else (tile, where)), refuses)
            code, _, err = command(one, "-o", tmp_path / "out")
        assert code == 2 and err.count("\n") == 1 and "on cpu: CUDA error: no kernel image" in err
    with monkeypatch.context() as m:
        m.setattr(tile.torch, "zeros", refuses)
        with pytest.raises(ValueError, match="^--device (cpu|cuda|mps): CUDA error: no kernel image"):
            tile.device_of(SimpleNamespace(device=None, amp=None))
    monkeypatch.setattr(tile.Image, "SAVE", {"PNG": None})
    code, _, err = command(one, "-o", tmp_path / "out", "--format", "avif")
    assert code == 2 and "cannot write AVIF" in err and err.count("\n") == 1


def test_a_result_that_appears_meanwhile_is_kept(tmp_path, command, monkeypatch):
    """Cat.png and cat.png are one file on a disk that ignores case."""
    one, out, save = picture_file(tmp_path / "in/a.png"), tmp_path / "out", tile.save_strips
    picture_file(tmp_path / "in/b.png")

    def save_two(path, *how):
        save(path, *how)
        save(out / "b.png", iter([torch.zeros(3, 1, 1)]), (1, 1), Picture(torch.zeros(0)))

    monkeypatch.setattr(tile, "save_strips", save_two)
    code, said, err = command(tmp_path / "in", "-o", out)
    assert code == 1 and "1 done, 0 skipped, 1 failed" in said and "b.png is there by now" in err
    assert read_picture(out / "b.png").rgb.shape == (3, 1, 1)


def test_every_kind_of_picture(tmp_path, command):
    """What is read goes through the model and comes out at twice the size and of the same kind."""
    zoo = tmp_path / "the zoo"
    for name, size, mode in (("one.png", (1, 1), "RGB"), ("tower.png", (1, 1500), "L"), ("three.webp", (3, 3), "RGB"),
                             ("odd.jpg", (37, 23), "RGB"), ("grey.jpg", (9, 8), "L"), ("clear.png", (8, 9), "LA"),
                             ("cmyk.jpg", (10, 10), "CMYK"), ("壁紙 その一.png", (5, 6), "RGBA"),
                             ("line\nbreak.bmp", (7, 7), "RGB"), ("palette.gif", (12, 5), "P"),
                             ("bits.png", (9, 9), "1")):
        picture_file(zoo / name, size, mode)
    Image.fromarray(RGBA).quantize(16).save(zoo / "index.png", transparency=3)
    for channels in (1, 2, 3, 4):
        (zoo / f"deep{channels}.png").write_bytes(png16(np.ascontiguousarray(DEEP[:20, :, :channels])))
    exif = Image.Exif()
    exif[tile.ORIENTATION] = 6
    Image.fromarray(RGBA[..., :3]).save(zoo / "turned.jpg", exif=exif)
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(zoo / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(RGBA[..., :3]).save(zoo / "wide gamut.png", icc_profile=display_p3())
    (zoo / "text.png").write_text("no picture\n" * 9)
    (zoo / "empty.png").touch()
    (zoo / "cut.png").write_bytes(png16(DEEP)[:1500])
    code, shown, err = command(zoo, "-o", tmp_path / "out", "--tile-size", "64")
    assert code == 1 and "19 done, 0 skipped, 3 failed" in shown, err
    assert sorted(err.splitlines()) == [
        f"{zoo / 'cut.png'}: image file is truncated", f"{zoo / 'empty.png'}: an empty file (0 bytes)",
        f"{zoo / 'text.png'}: not a picture, or of a kind that Pillow cannot read"]
    assert not list((tmp_path / "out").glob(".*"))
    for path in tile.find_pictures(tmp_path / "out"):
        source = next(p for p in zoo.iterdir() if p.stem == path.stem)
        got, given = read_picture(path), read_picture(source)
        assert got.rgb.shape[1:] == tuple(2 * side for side in given.rgb.shape[1:]), path
        assert (got.grey, got.depth, got.icc, got.alpha is None) == (
            given.grey, given.depth, given.icc, given.alpha is None), path
        if min(got.rgb.shape[1:]) > 2:  # an untrained model interpolates
            assert (F.avg_pool2d(got.rgb, 2) - given.rgb).abs().mean() < 0.1 or given.alpha is not None, path
    assert read_picture(tmp_path / "out/turned.png").rgb.shape == (3, 14, 10)
    assert "(first of 2 frames)" in shown and "(CMYK converted to sRGB without profile)" in shown
    assert command(zoo / "wide gamut.png", "-o", tmp_path / "s.png", "--icc", "srgb")[1].count("converted to sRGB") == 1


def test_undamaged_pictures_go_to_the_sharp_weights(tmp_path, command, monkeypatch):
    """Only where no --weights are given: whoever names some gets them."""
    dark, bright = picture_file(tmp_path / "in/dark.png"), tmp_path / "in/bright.png"
    Image.fromarray(RNG.integers(225, 246, (14, 20, 3), dtype=np.uint8)).save(bright)
    shipped = {name: tmp_path / f"weights/{name}-tiny.safetensors" for name in ("web", "clean")}
    shipped["web"].parent.mkdir()
    for k, path in enumerate(shipped.values()):
        torch.manual_seed(k)
        network = model.HATRefiner.from_preset("tiny", scale=2)
        network.hat_model.conv_last.weight.data += 0.003 * torch.randn(network.hat_model.conv_last.weight.shape)
        model.save(network, path, {})
    monkeypatch.setattr(convert, "find_weights", lambda: shipped["web"])
    monkeypatch.setattr(convert, "undamaged", lambda network, plain, rgb: rgb.mean() > 0.9)
    code, shown, err = command(tmp_path / "in", "-o", tmp_path / "out", "--depth", "16", weights=None)
    assert code == 0 and not err and "undamaged pictures by clean-tiny" in shown
    told, = [line for line in shown.splitlines() if line.endswith("(undamaged: clean-tiny)")]
    assert told.startswith(str(tmp_path / "out/bright.png"))
    for name, path in shipped.items():
        assert "clean-tiny)" not in command(tmp_path / "in", "-o", tmp_path / name, "--depth", "16", weights=path)[1]

    def result(folder, path):
        return (tmp_path / folder / path.name).read_bytes()
    assert result("out", dark) == result("web", dark) != result("clean", dark)
    assert result("out", bright) == result("clean", bright) != result("web", bright)


def test_sizes_depth_and_formats(tmp_path, command):
    for i, size in enumerate(((20, 14), (14, 20), (33, 7), (5, 5), (64, 40))):
        picture_file(tmp_path / f"in/{i}.png", size)
    code, shown, err = command(tmp_path / "in", "-o", tmp_path / "fit", "--fit", "48x27", "--crop", "focus",
                               "--skip-larger", "--format", "webp")
    assert code == 0 and not err and "4 done, 1 skipped" in shown and "4.png is 64x40, skipped" in shown
    results = tile.find_pictures(tmp_path / "fit")
    assert [p.name for p in results] == ["0.webp", "1.webp", "2.webp", "3.webp"]
    assert {Image.open(p).size for p in results} == {(48, 27)}
    assert command(tmp_path / "in/0.png", "-o", tmp_path / "s.png", "--scale", "1.5", "--depth", "16")[0] == 0
    got, plain = read_picture(tmp_path / "s.png"), read_picture(tmp_path / "in/0.png")
    assert got.rgb.shape == (3, 21, 30) and got.depth == 16
    assert (got.rgb - tile.lanczos(plain.rgb, (21, 30))).abs().mean() < 0.05
    assert command(tmp_path / "in/0.png", "-o", tmp_path / "t.png", "--strength", "0")[0] == 0
    assert (read_picture(tmp_path / "t.png").rgb - tile.lanczos(plain.rgb, (28, 40))).abs().max() < 0.51 / 255
    code, shown, err = command(tmp_path / "in", "-o", tmp_path / "fit", "--format", "webp", "--skip-existing")
    assert code == 0 and "1 done, 4 skipped" in shown and "exists" not in shown
    sizes = []
    for quality in ("30", "95"):
        assert command(tmp_path / "in/4.png", "-o", tmp_path / f"{quality}.jpg", "--quality", quality)[0] == 0
        sizes.append((tmp_path / f"{quality}.jpg").stat().st_size)
    assert sizes[0] < sizes[1] / 2


def test_what_is_large_already_is_not_decoded(tmp_path, command, monkeypatch):
    """Its header tells, with its orientation; what cannot be read there is an error as without --skip-larger."""
    for kind in ("jpg", "png", "tif", "webp"):
        for orientation in (1, 3, 6):
            exif = Image.Exif()
            exif[tile.ORIENTATION] = orientation
            Image.new("RGB", (40, 20)).save(tmp_path / f"x.{kind}", exif=exif)
            assert tile.size_of(tmp_path / f"x.{kind}") == read_picture(tmp_path / f"x.{kind}").rgb.shape[1:]
    with monkeypatch.context() as patch:
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
        Image.new("RGB", (40, 20)).save(tmp_path / "x.png")
        assert tile.size_of(tmp_path / "x.png") == (20, 40)
    os.mkfifo(tmp_path / "x.png.pipe")
    assert tile.size_of(tmp_path / "x.png.pipe") == (0, 0)
    turned = Image.new("RGB", (27, 48))
    turned.getexif()[tile.ORIENTATION] = 6
    (tmp_path / "in").mkdir()
    turned.save(tmp_path / "in/a.jpg", exif=turned.getexif())
    picture_file(tmp_path / "in/b.png", (60, 60))
    cut = (tmp_path / "in/b.png").read_bytes()
    (tmp_path / "in/b.png").write_bytes(cut[:len(cut) // 2])
    (tmp_path / "in/c.png").write_bytes(b"nothing")
    assert [tile.size_of(tmp_path / "in" / n) for n in ("a.jpg", "b.png", "c.png", "d.png")] == [(27, 48), (60, 60), (0, 0), (0, 0)]
    code, shown, err = command(tmp_path / "in", "-o", tmp_path / "out", "--fit", "48x27", "--skip-larger")
    assert code == 1 and "a.jpg is 48x27, skipped" in shown and "b.png is 60x60, skipped" in shown
    assert "c.png: not a picture" in err and "2 skipped, 1 failed" in shown


class Faulty(torch.nn.Module):
    """Doubles pixels, but for what `fault` makes of some tiles."""
    scale = 2

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, x):
        y = self.fault(x)
        return nearest(2)(x) if y is None else y


def test_faults_on_some_tiles(tmp_path, command, monkeypatch):
    """Three pictures, of which the second has one red tile where the model fails: done again, halved, or named, and
    the third is done whatever happens."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        rgb = torch.rand(3, 96, 96) * 0.8
        if name == "b":
            rgb[:, 70:80, 70:80] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
        save_picture(tmp_path / f"in/{name}.png", Picture(rgb))
    names = [str(tmp_path / f"in/{n}.png") for n in "abc"]

    def red(x):
        return bool(((x[:, 0] == 1) & (x[:, 1] == 0)).any())

    def outcome(fault, *more):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        monkeypatch.setattr(convert, "load", lambda *_: Faulty(fault))
        code, shown, err = command(*names, "-o", out, "--tile-size", "64", "--tile-pad", "8", *more)
        for path in out.glob("*.png"):
            given = nearest(2)(read_picture(tmp_path / "in" / path.name).rgb[None])[0]
            assert (read_picture(path).rgb - given).abs().max() < 0.6 / 255
        return code, err, sorted(p.name for p in out.iterdir())

    everything, but_b = ["a.png", "b.png", "c.png"], ["a.png", "c.png"]
    wide = [0]

    def black_in_bf16(x):
        return nearest(2)(x) * 0 if red(x) and torch.is_autocast_enabled("cpu") else None

    def nan(x):
        return nearest(2)(x) * torch.nan if red(x) else None

    def nan_in_bf16(x):
        return nan(x) if torch.is_autocast_enabled("cpu") else None

    def hungry(x):
        wide[0] = max(wide[0], x.shape[-1])
        if red(x) and x.shape[-1] > 40:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    def starving(x):
        if red(x):
            raise MemoryError

    def broken(x):
        if red(x):
            raise RuntimeError("mat1 and mat2 shapes\ncannot be multiplied")

    assert outcome(nan_in_bf16, "--amp", "bf16") == (0, "", everything)
    assert outcome(black_in_bf16, "--amp", "bf16") == (0, "", everything)
    assert outcome(nan) == (1, f"{names[1]}: the model gives NaN or infinite values here, in fp32 too; nothing is "
                               "saved\n", but_b)
    assert outcome(black_in_bf16, "--amp", "off") == (0, "", everything)
    assert outcome(hungry) == (0, "out of memory; going on with tiles of 32, 1 at once\n"
                               "out of memory; going on with tiles of 16, 1 at once\n", everything)
    assert wide[0] == 64  # of the first picture, before the second ran out
    assert outcome(starving, "--batch", "2") == (1, "out of memory; going on with tiles of 64, 1 at once\n"
                                                    "out of memory; going on with tiles of 32, 1 at once\n"
                                                    "out of memory; going on with tiles of 16, 1 at once\n"
                                                    f"{names[1]}: MemoryError\n", but_b)
    assert outcome(broken) == (1, f"{names[1]}: RuntimeError: mat1 and mat2 shapes cannot be multiplied\n", but_b)


def test_tile_size_by_free_memory(monkeypatch):
    """A trial of a model that needs 10 KiB a pixel, on machines of all sizes."""
    peaks, sides = [0], []

    def forward(x):
        sides.append(x.shape[-1])
        peaks[0] = max(peaks[0], x.shape[-1]**2 * 10240)
        return x

    monkeypatch.setattr(tile, "memory_peak", lambda device: peaks[0])
    cpu, found = torch.device("cpu"), {}
    for gib in (0, 0.1, 0.5, 1, 4, 100):
        monkeypatch.setattr(tile, "free_memory", lambda device: gib * 2**30)
        found[gib], peaks[0] = tile.auto_tile_size(forward, cpu, None, Tiler(16, 16, 1, 16)), 0
    assert max(sides) == 128 and found[0] == 32 and found[100] == 384
    for gib in (0.5, 1, 4):
        size = found[gib]
        assert size % 16 == 0 and (size + 32)**2 * 10240 <= gib * 2**29
        assert size == 384 or (size + 16 + 32)**2 * 10300 > gib * 2**29

    def starving(x):
        raise MemoryError

    assert tile.auto_tile_size(starving, cpu, None, Tiler(16, 16, 1, 16)) == 32
    with pytest.raises(ZeroDivisionError):
        tile.auto_tile_size(lambda x: 1 / 0, cpu, None, Tiler(16, 16, 1, 16))


def test_free_memory_minds_the_limits(monkeypatch):
    resource = pytest.importorskip("resource")
    cpu = torch.device("cpu")
    free = tile.free_memory(cpu)
    assert 0 < free < 2**48
    if not Path("/proc/self/statm").exists():
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + 2**26, used + 2**26))
    assert tile.free_memory(cpu) <= 2**26 + 2**24
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert tile.free_memory(cpu) <= (2**26 + 2**24) / 4


def test_processes_share_a_folder(tmp_path, weights):
    """As torchrun starts them; each picture once, one of them bad, and both end with the folder's exit code."""
    for i in range(5):
        picture_file(tmp_path / f"in/{i}.png", (8, 8))
    (tmp_path / "in/bad.png").write_text("text")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    started = [subprocess.Popen(
        [sys.executable, tile.__file__, tmp_path / "in", "-o", tmp_path / "out", "--weights", weights, "--device",
         "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port, OMP_NUM_THREADS="1")) for rank in range(2)]
    said = [p.communicate(timeout=120) for p in started]
    assert [p.returncode for p in started] == [1, 1], said
    lines = "".join(out for out, _ in said)
    assert "5 done, 0 skipped, 1 failed" in said[0][0] and "failed" not in said[1][0]
    assert all(lines.count(f"{i}.png  8x8 -> 16x16") == 1 for i in range(5))
    assert all(out.count("->") >= 2 for out, _ in said)
    assert len(list((tmp_path / "out").iterdir())) == 5


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


def test_nobody_reads_the_lines(tmp_path, weights):
    picture_file(tmp_path / "a.png")
    at_work = subprocess.Popen([sys.executable, tile.__file__, tmp_path / "a.png", "-o", tmp_path / "out", "--weights", weights,
                                "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    at_work.stdout.close()
    said = at_work.stderr.read()
    assert at_work.wait() == 1 and "Traceback" not in said and "BrokenPipe" not in said


def test_alone_it_says_what_it_misses(tmp_path):
    shutil.copy(tile.__file__, tmp_path / "tile.py")
    picture_file(tmp_path / "a.png")
    got = subprocess.run([sys.executable, "tile.py", "a.png", "-o", "out"], cwd=tmp_path, capture_output=True,
                         text=True)
    assert got.returncode == 2 and "needs model.py and convert.py beside tile.py" in got.stderr and got.stderr.count("\n") == 1


def test_a_picture_larger_than_memory_is_named_at_once(tmp_path, monkeypatch):
    def full(*size):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    path = picture_file(tmp_path / "huge.png")
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(tile.PictureError, match=r"huge.png: \d+x\d+ is too large for the memory there is"):
        tile.read_picture(path)
