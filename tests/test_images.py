"""Finding, reading, and saving pictures."""
import errno
import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

import images
from images import Picture, PictureError, read_picture, save_picture

RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (70, 9, 4), dtype=np.uint16)


def pixels(picture):
    """Picture -> integer array (H, W, C) as a file stores it."""
    planes = [picture.rgb[:1] if picture.gray else picture.rgb] + ([] if picture.alpha is None else [picture.alpha])
    x = torch.cat(planes) * (2**picture.depth - 1)
    assert torch.allclose(x, x.round(), atol=0.01) and picture.rgb.dtype == torch.float32
    return x.round().permute(1, 2, 0).numpy().astype(np.int64)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png16(array, extra=b""):
    """A 16-bit PNG without filters, written independently of images.py. extra: chunks before the pixels."""
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
    assert got.gray == (mode in ("L", "LA", "1")) and got.depth == 8
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


def test_one_transparent_color(tmp_path):
    Image.fromarray(np.uint8([[7, 9]])).save(tmp_path / "gray.png", transparency=9)
    assert pixels(read_picture(tmp_path / "gray.png")).tolist() == [[[7, 255], [9, 0]]]
    Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]])).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert pixels(read_picture(tmp_path / "rgb.png")).tolist() == [[[1, 2, 3, 0], [4, 5, 6, 255]]]


def test_32_bits_are_refused(tmp_path):
    Image.fromarray(np.int32([[0, 70000], [2**30, 5]])).save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match="a.tif"):
        read_picture(tmp_path / "a.tif")


def test_cmyk(tmp_path):
    flat = np.zeros((8, 8, 4), np.uint8)
    flat[..., 0] = 255  # all cyan
    Image.fromarray(flat, "CMYK").save(tmp_path / "a.tif")
    assert (pixels(read_picture(tmp_path / "a.tif")) == (0, 255, 255)).all()
    Image.fromarray(flat, "CMYK").save(tmp_path / "a.jpg", quality=100, icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 200)
    got = read_picture(tmp_path / "a.jpg")
    assert abs(pixels(got) - (0, 255, 255)).max() <= 2 and got.icc is None
    assert "CMYK" in got.note


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit(tmp_path, channels):
    """Reading and saving are exact; Pillow reads the same high bytes."""
    array = DEEP[..., :channels]
    (tmp_path / "a.png").write_bytes(png16(array))
    got = read_picture(tmp_path / "a.png")
    assert got.depth == 16 and got.gray == (channels < 3) and (pixels(got) == array).all()
    save_picture(tmp_path / "b.png", got)
    again = read_picture(tmp_path / "b.png")
    assert again.depth == 16 and (pixels(again) == array).all()
    if channels > 2:
        assert (np.asarray(Image.open(tmp_path / "b.png")) == array >> 8).all()
    save_picture(tmp_path / "c.jpg", got)
    assert read_picture(tmp_path / "c.jpg").depth == 8


def test_what_is_lost_of_16_bit_files_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png16(DEEP[..., :2]))          # Pillow has no mode for 16-bit gray + alpha
    (tmp_path / "b.png").write_bytes(png16(DEEP[..., :3], chunk(b"tRNS", DEEP[0, 0, :3].astype(">u2").tobytes())))
    assert "16 bit reduced to 8" in read_picture(tmp_path / "a.png").note
    assert read_picture(tmp_path / "b.png").note == "transparent color left behind"


@pytest.mark.parametrize("suffix, side", ((".avif", 66000), (".webp", 16384), (".jpg", 65501)))
def test_a_side_that_the_format_cannot_hold(tmp_path, suffix, side):
    """The error comes before the strips are computed."""
    with pytest.raises(PictureError, match=f"cannot hold {side}x2 pixels; use PNG"):
        images.save_strips(tmp_path / f"a{suffix}", None, (2, side), Picture(torch.zeros(3, 1, 1)))


def test_16_bit_noise_and_gradients_roundtrip(tmp_path):
    ramp = torch.linspace(0, 1, 300).expand(3, 200, 300).clone()
    ramp[1] = torch.rand(200, 300)
    save_picture(tmp_path / "a.png", Picture(ramp, depth=16))
    assert (read_picture(tmp_path / "a.png").rgb - ramp).abs().max() < 0.51 / 65535


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[images.ORIENTATION], exif[0x010E] = orientation, "by moonlight"
    Image.fromarray(RGBA[..., :3]).save(tmp_path / f"a.{suffix}", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}")))
    got = read_picture(tmp_path / f"a.{suffix}")
    assert expected.shape[:2] == ((7, 5) if orientation > 4 else (5, 7)) and (pixels(got) == expected).all()
    if suffix == "png":
        for out in ("b.png", "b.jpg", "b.webp"):
            save_picture(tmp_path / out, got)
            kept = Image.open(tmp_path / out).getexif()
            assert kept.get(images.ORIENTATION, 1) == 1 and kept[0x010E] == "by moonlight"
            assert read_picture(tmp_path / out).rgb.shape == got.rgb.shape


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif"])
def test_exif_survives_from_webp(tmp_path, suffix):
    """Pillow reads EXIF of WebP without the prefix that JPEG needs."""
    tags = Image.Exif()
    tags[0x010E] = "a title"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=tags)
    save_picture(tmp_path / f"b.{suffix}", read_picture(tmp_path / "a.webp"))
    with Image.open(tmp_path / f"b.{suffix}") as im:
        assert im.getexif()[0x010E] == "a title"


@pytest.mark.parametrize("suffix", ["jpg", "avif"])
def test_thin_colored_lines_keep_their_color(tmp_path, suffix):
    rgb = torch.full((3, 64, 64), 0.9)
    rgb[1:, ::4] = 0.1  # red lines, one pixel wide
    save_picture(tmp_path / f"a.{suffix}", Picture(rgb))
    assert (read_picture(tmp_path / f"a.{suffix}").rgb - rgb).abs().mean() < 0.015  # 0.05 and more at half resolution


def test_postscript_is_refused_whatever_its_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(PictureError, match="a.png"):
        read_picture(tmp_path / "a.png")


def test_invalid_exif_is_dropped(tmp_path):
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x63")
    assert read_picture(tmp_path / "a.jpg").rgb.shape == (3, 5, 7)


def test_orientation_beside_a_tag_that_cannot_be_written(tmp_path):
    """ResolutionUnit as text."""
    entries = struct.pack(">H HHIHxx HHI4s I", 2, images.ORIENTATION, 3, 1, 6, 0x0128, 2, 2, b"x", 0)
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08" + entries)
    got = read_picture(tmp_path / "a.jpg")
    assert got.rgb.shape == (3, 7, 5) and images.picture_size(tmp_path / "a.jpg") == (7, 5)


def test_orientation_out_of_range(tmp_path):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 9
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.jpg", exif=exif)
    assert images.picture_size(tmp_path / "a.jpg") == read_picture(tmp_path / "a.jpg").rgb.shape[1:]


def test_profiles_of_the_wrong_kind_are_dropped(tmp_path):
    Image.fromarray(RGBA, "CMYK").save(tmp_path / "a.jpg", icc_profile=display_p3())
    got = read_picture(tmp_path / "a.jpg")
    assert got.icc is None
    for broken in (b"\0" * 200, b"\0" * 16 + b"RGB " + b"\0" * 200, linear_gray()):
        Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.png", icc_profile=broken)
        got = read_picture(tmp_path / "a.png", srgb=True)
        assert got.icc is None and "profile" in got.note and (pixels(got) == RGBA[..., :3]).all()


def test_srgb_profile_is_dropped_without_conversion(tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save_picture(tmp_path / "deep.png", Picture(torch.rand(3, 4, 4), depth=16, icc=icc))
    Image.fromarray(RGBA).save(tmp_path / "a.png", icc_profile=icc)
    for name in ("a.png", "deep.png"):
        kept, converted = read_picture(tmp_path / name), read_picture(tmp_path / name, srgb=True)
        assert kept.icc == icc and converted.icc is None and not converted.note
        assert converted.depth == kept.depth and (pixels(converted) == pixels(kept)).all()


def test_color_profile_is_kept(tmp_path):
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
    """Display P3 with gamma 2.2, by the matrices of its definition."""
    colors = np.uint8([[[200, 100, 50], [90, 140, 120], [128, 128, 128], [60, 90, 160]]])
    to_srgb = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    linear = (colors / 255.0)**2.2 @ to_srgb.T
    expected = 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear**(1 / 2.4) - 0.055)
    alpha = np.uint8([[[255], [255], [7], [0]]])
    Image.fromarray(np.concatenate([colors, alpha], -1)).save(tmp_path / "a.png", icc_profile=display_p3())
    kept, converted = read_picture(tmp_path / "a.png"), read_picture(tmp_path / "a.png", srgb=True)
    assert kept.icc == display_p3() and (pixels(kept)[..., :3] == colors).all() and not kept.note
    assert abs(pixels(converted)[..., :3] - expected).max() < 2 and (pixels(converted)[..., 3:] == alpha).all()
    assert converted.icc is None and not converted.note
    deep = np.concatenate([colors, alpha], -1) * np.uint16(257)
    (tmp_path / "deep.png").write_bytes(png16(deep, chunk(b"iCCP", b"ICC\0\0" + zlib.compress(display_p3()))))
    assert (pixels(read_picture(tmp_path / "deep.png", srgb=True)) == pixels(converted)).all()


def linear_gray():
    """An ICC profile for gray with linear levels."""
    profile = bytearray(display_p3())
    profile[16:20] = b"GRAY"
    return bytes(profile).replace(b"rTRC", b"kTRC").replace(struct.pack(">IH", 1, round(2.2 * 256)), struct.pack(">IH", 1, 256))


def test_gray_profiles(tmp_path):
    gray = np.uint8([[0, 100], [180, 255]])
    expected = [[0, 168], [218, 255]]     # 255 * (1.055 * (x / 255)**(1 / 2.4) - 0.055)
    Image.fromarray(gray).save(tmp_path / "a.png", icc_profile=linear_gray())
    kept, converted = read_picture(tmp_path / "a.png"), read_picture(tmp_path / "a.png", srgb=True)
    assert kept.icc == linear_gray() and (pixels(kept)[..., 0] == gray).all()
    assert converted.icc is None and converted.gray and abs(pixels(converted)[..., 0] - expected).max() < 2
    kept.depth = 16
    save_picture(tmp_path / "b.png", kept)
    assert (pixels(read_picture(tmp_path / "b.png", srgb=True)) == pixels(converted)).all()
    kept.depth = 8
    assert read_picture(tmp_path / "b.png").icc == linear_gray() and images.split_metadata(kept, "b.png")[1] == []
    assert images.split_metadata(kept, "b.webp")[1] == ["ICC profile left behind"]


def test_color_profile_of_a_gray_picture_is_kept(tmp_path):
    """Gray files cannot hold it, so the file becomes RGB."""
    Image.fromarray(RGBA[..., 0]).save(tmp_path / "a.png", icc_profile=display_p3())
    for name in ("b.png", "b.jpg"):
        save_picture(tmp_path / name, read_picture(tmp_path / "a.png"))
        assert read_picture(tmp_path / name).icc == display_p3()
    converted = read_picture(tmp_path / "a.png", srgb=True)
    assert converted.icc is None and converted.gray


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
    for name, reason in (("text.jpg", "not a picture"), ("missing.png", "No such file"),
                         ("cut.png", "truncated"), ("cut.jpeg", "truncated"), ("float.tif", "32 bits")):
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
    assert images.find_pictures(tmp_path) == [tmp_path / name] and (pixels(read_picture(tmp_path / name)) == 51).all()


def test_find_pictures(tmp_path, capsys):
    for name in ("b/2.PNG", "b/10.jpg", "a.webp", "note.txt", ".hidden.png", "b/c/d.tiff", "b/e.jfif", ".thumbnails/a.png",
                 "Thumbs.db", "b/desktop.ini", "__MACOSX/a.png", "x\ny.psd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/c/loop").symlink_to(tmp_path)
    for name, kind in (("b/photo", "JPEG"), ("c.jpg_large", "PNG")):
        Image.new("RGB", (4, 4)).save(tmp_path / name, kind)
    expected = [tmp_path / n for n in ("a.webp", "b/10.jpg", "b/2.PNG", "b/c/d.tiff", "b/e.jfif", "b/photo", "c.jpg_large")]
    assert images.find_pictures(tmp_path) == expected
    assert capsys.readouterr().err == f"2 left out, not pictures that can be read: {tmp_path}/note.txt, {tmp_path}/x\\ny.psd\n"
    assert images.find_pictures([str(tmp_path / "b/photo"), tmp_path / "note.txt"]) == [tmp_path / "b/photo"]
    with pytest.raises(PictureError, match="no such file"):
        images.find_pictures([tmp_path / "missing"])


# ------------------------------------------------------------------ PNG text, XMP, damaged metadata

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TOO_LARGE = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 2**20))
TEXT = {"Author": "A. Painter", "parameters": "Seed: 7", "Title": "\u58c1\u7d19"}


@pytest.mark.parametrize("deep", [False, True])
def test_text_and_xmp_are_kept(tmp_path, deep):
    info = PngImagePlugin.PngInfo()
    for keyword, value in TEXT.items():
        info.add_itxt(keyword, value, zip=True)
    info.add_itxt(images.PNG_XMP, XMP.decode())
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.png", pnginfo=info)
    picture = read_picture(tmp_path / "a.png")
    assert picture.text == TEXT and picture.xmp == XMP.replace(b'tiff:Orientation="6"', b"")
    assert picture.rgb.shape == (3, 7, 5)           # turned by the XMP, once
    picture.depth = 16 if deep else 8
    for name in ("b.png", "b.jpg", "b.webp", "b.avif"):
        save_picture(tmp_path / name, picture)
        again = read_picture(tmp_path / name)
        assert again.xmp == picture.xmp and again.rgb.shape == picture.rgb.shape
        assert again.text == (TEXT if name == "b.png" else {})
        assert any("Author" in phrase for phrase in images.split_metadata(picture, name)[1]) == (name != "b.png")


def test_metadata_too_large_for_jpeg_is_named(tmp_path):
    picture = Picture(torch.rand(3, 8, 8), xmp=b"x" * 70000, exif=b"Exif\0\0MM\0*\0\0\0\x08" + b"\0" * 70000)
    save_picture(tmp_path / "a.jpg", picture)
    assert read_picture(tmp_path / "a.jpg").xmp is None
    assert images.split_metadata(picture, "a.jpg")[1] == ["EXIF left behind", "XMP left behind"]
    assert images.split_metadata(picture, "a.png")[1] == []


def test_large_text_and_profiles_are_kept(tmp_path):
    icc = display_p3() + bytes(2**21)
    info = PngImagePlugin.PngInfo()
    info.add_text("notes", "x" * 2**21, zip=True)
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.png", icc_profile=icc, pnginfo=info)
    picture = read_picture(tmp_path / "a.png")
    assert picture.icc == icc and len(picture.text["notes"]) == 2**21 and not picture.note


@pytest.mark.parametrize("damage", ["text", "profile", "checksum", "short", "after"])
@pytest.mark.parametrize("deep", [False, True])
def test_damaged_metadata_does_not_hide_the_pixels(tmp_path, damage, deep):
    broken = {"text": chunk(b"zTXt", b"a\0\0" + TOO_LARGE),
              "profile": chunk(b"iCCP", b"ICC\0\0" + TOO_LARGE),
              "checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"?", "short": chunk(b"gAMA", b"1"),
              "after": chunk(b"zTXt", b"a\0\0" + TOO_LARGE)}[damage]
    if deep:
        data, expected = png16(DEEP[..., :3]), DEEP[..., :3]
    else:
        memory = io.BytesIO()
        Image.fromarray(RGBA[..., :3]).save(memory, "PNG")
        data, expected = memory.getvalue(), RGBA[..., :3]
    at = len(data) - 12 if damage == "after" else 33
    (tmp_path / "a.png").write_bytes(data[:at] + broken + data[at:])
    picture = read_picture(tmp_path / "a.png")
    assert (pixels(picture) == expected).all() and "metadata" in picture.note


# ------------------------------------------------------------------ color without ICC, old sizes

GAMA = struct.pack(">I", 45455)
P3_CHRM = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB_CHRM = struct.pack(">8I", 31269, 32899, 63999, 33001, 30000, 60000, 15000, 5999)      # as Photoshop rounds it


@pytest.mark.parametrize("chunks, kept", [
    ({"gAMA": GAMA, "cHRM": P3_CHRM}, True), ({"gAMA": struct.pack(">I", 100000)}, True), ({"cICP": b"\x09\x10\0\1"}, True),
    ({"gAMA": GAMA, "cHRM": SRGB_CHRM}, False), ({"sRGB": b"\0", "cHRM": P3_CHRM}, False), ({"cICP": b"\1\x0d\0\1"}, False)])
def test_color_of_png_is_kept_or_named(tmp_path, chunks, kept):
    data = b"".join(chunk(name.encode(), contents) for name, contents in chunks.items())
    (tmp_path / "a.png").write_bytes(png16(DEEP[..., :3], data))
    picture = read_picture(tmp_path / "a.png")
    assert picture.color == (chunks if kept else {}) and picture.note == ""
    save_picture(tmp_path / "b.png", picture)
    assert (data in (tmp_path / "b.png").read_bytes()) == kept and read_picture(tmp_path / "b.png").color == picture.color
    names = ", ".join(chunks)
    assert (f"color description left behind: {names}" in images.split_metadata(picture, "b.jpg")[1]) == kept
    assert read_picture(tmp_path / "a.png", srgb=True).note == (f"color treated as sRGB, but described by {names}" if kept else "")


def test_clean_tells_pictures_of_different_color_apart(tmp_path):
    import clean
    for name, data in (("p3", chunk(b"cHRM", P3_CHRM)), ("srgb", chunk(b"cHRM", SRGB_CHRM)), ("plain", b"")):
        (tmp_path / name).write_bytes(png16(DEEP[..., :3], data))
    p3, srgb, plain = (clean.examine((tmp_path / name, name))[0].content for name in ("p3", "srgb", "plain"))
    assert p3 != plain and srgb == plain


def test_color_of_avif_is_kept(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "srgb.avif")
    data = (tmp_path / "srgb.avif").read_bytes()
    assert data.count(b"colrnclx\0\x01\0\x0d") == 1 and read_picture(tmp_path / "srgb.avif").color == {}
    (tmp_path / "p3.avif").write_bytes(data.replace(b"colrnclx\0\x01", b"colrnclx\0\x0c"))
    save_picture(tmp_path / "b.png", read_picture(tmp_path / "p3.avif"))
    assert chunk(b"cICP", b"\x0c\x0d\0\1") in (tmp_path / "b.png").read_bytes()


def exif_with_sizes(order):
    """EXIF with sizes, orientation 6, a name in Japanese, a comment, and a thumbnail."""
    def ifd(start, entries, following):
        """entries: {tag: number or bytes}. The IFD and its data as bytes."""
        table, data = struct.pack(order + "H", len(entries)), b""
        for tag, value in sorted(entries.items()):
            if isinstance(value, int):
                table += struct.pack(order + "HHII", tag, 4, 1, value)
                continue
            table += struct.pack(order + "HHII", tag, 7, len(value), start + 6 + 12 * len(entries) + len(data))
            data += value
        return table + struct.pack(order + "I", following) + data
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    first = ifd(8, {0x100: 7, 0x101: 5, images.ORIENTATION: 6, 0x13B: "\u521d\u97f3".encode(), 0x8769: 200}, 300)
    exif = ifd(200, {0x9286: b"ASCII\0\0\0Seed: 7", 0xA002: 7, 0xA003: 5}, 0)
    thumbnail = ifd(300, {0x201: 350, 0x202: 4}, 0)
    return b"Exif\0\0" + ((head + first).ljust(200, b"\0") + exif).ljust(300, b"\0") + thumbnail.ljust(50, b"\0") + b"\xff\xd8\xff\xd9"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif"])
def test_metadata_for_the_old_size_is_removed(tmp_path, order, suffix):
    xmp = b'<x:xmpmeta><rdf:Description dc:creator="A" tiff:ImageWidth="7" exif:PixelXDimension = \'7\'><tiff:Orientation>6' \
          b"</tiff:Orientation><xmp:Thumbnails>\n<rdf:li/></xmp:Thumbnails></rdf:Description></x:xmpmeta>"
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.jpg", exif=exif_with_sizes(order), xmp=xmp)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.rgb.shape == (3, 7, 5) and picture.note == ""
    picture.rgb = torch.rand(3, 14, 10)
    save_picture(tmp_path / f"b.{suffix}", picture)
    again = read_picture(tmp_path / f"b.{suffix}")
    assert again.xmp == b'<x:xmpmeta><rdf:Description dc:creator="A"  ></rdf:Description></x:xmpmeta>'
    with Image.open(tmp_path / f"b.{suffix}") as im:
        exif = im.getexif()
        assert set(exif) == {0x13B, 0x8769} and set(exif.get_ifd(0x8769)) == {0x9286} and not exif.get_ifd(1)
    assert "\u521d\u97f3".encode() in again.exif and b"Seed: 7" in again.exif and again.rgb.shape == (3, 14, 10)


def test_exif_in_png_text(tmp_path):
    """Older files hold EXIF as hexadecimal text. The orientation is applied once."""
    data = exif_with_sizes(">")
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n")
    Image.fromarray(RGBA[..., :3]).save(tmp_path / "a.png", pnginfo=info)
    save_picture(tmp_path / "b.png", read_picture(tmp_path / "a.png"))
    again = read_picture(tmp_path / "b.png")
    assert again.rgb.shape == (3, 7, 5) and b"Seed: 7" in again.exif and again.text == {}


# ------------------------------------------------------------------ writing

def test_alpha_over_a_background(tmp_path):
    picture = Picture(torch.zeros(3, 8, 8), torch.full((1, 8, 8), 0.6))
    assert torch.allclose(images.composite(picture, 0.5), torch.full((3, 8, 8), 0.2))
    assert torch.allclose(images.composite(picture, torch.ones(3, 8, 8)), torch.full((3, 8, 8), 0.4))
    save_picture(tmp_path / "a.jpg", picture)
    got = read_picture(tmp_path / "a.jpg")
    assert got.alpha is None and abs(pixels(got) - 102).max() <= 1
    for name in ("a.png", "a.webp"):
        save_picture(tmp_path / name, picture)
        assert (pixels(read_picture(tmp_path / name))[..., 3] == 153).all()


def test_gray_stays_gray(tmp_path):
    for suffix in ("png", "jpg"):
        save_picture(tmp_path / f"a.{suffix}", Picture(torch.full((3, 4, 4), 0.2), gray=True))
        assert Image.open(tmp_path / f"a.{suffix}").mode == "L" and read_picture(tmp_path / f"a.{suffix}").gray
    save_picture(tmp_path / "a.png", Picture(torch.rand(3, 4, 4), torch.rand(1, 4, 4), gray=True))
    assert Image.open(tmp_path / "a.png").mode == "LA"


def test_what_cannot_be_saved(tmp_path):
    for name, rgb, reason in (("a.gif", torch.zeros(3, 1, 1), "gif"),
                              ("a", torch.zeros(3, 1, 1), "suffix"),
                              ("a.webp", torch.zeros(3, 1, 16384), "WEBP"),
                              ("a.jpg", torch.zeros(3, 65501, 1), "JPEG")):
        with pytest.raises(PictureError, match=reason):
            save_picture(tmp_path / name, Picture(rgb))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["old.png", "new.png", "old.webp", "new.webp"])
def test_a_full_disk_leaves_what_was_there(tmp_path, name):
    """A limit of 4 KiB per file stands for a full disk."""
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
    """8-bit PNG from strips of any height: Pillow reads the same pixels, and the file is about as small as that of Pillow."""
    ramp = np.add.outer(np.arange(150), np.arange(90))[..., None] * np.array([1, 0.5, 0.2, 1.4])
    array = (ramp + RNG.integers(0, 3, (150, 90, 4))).clip(0, 255).astype(np.uint8)
    array = np.array(Image.fromarray(array).convert(mode)).reshape(150, 90, -1)
    x = torch.from_numpy(array).permute(2, 0, 1) / 255
    gray, alpha = mode in ("L", "LA"), x[-1:] if "A" in mode else None
    rgb = x[:1].expand(3, -1, -1) if gray else x[:3]
    save_picture(tmp_path / "a.png", Picture(rgb, alpha, gray))
    whole = torch.cat([rgb] if alpha is None else [rgb, alpha])
    images.save_strips(tmp_path / "b.png", iter(whole.split([1, 63, 17, 69], 1)), (150, 90), Picture(rgb, alpha, gray))
    for name in ("a.png", "b.png"):
        im = Image.open(tmp_path / name)
        assert im.mode == mode and (np.asarray(im).reshape(array.shape) == array).all()
    Image.fromarray(array.squeeze()).save(tmp_path / "pillow.png")
    assert (tmp_path / "a.png").stat().st_size < 1.2 * (tmp_path / "pillow.png").stat().st_size


def test_picture_size(tmp_path, monkeypatch):
    """From the header alone, with the orientation; (0, 0) for a file that is not a picture."""
    for kind in ("jpg", "png", "tif", "webp"):
        for orientation in (1, 3, 6):
            exif = Image.Exif()
            exif[images.ORIENTATION] = orientation
            Image.new("RGB", (40, 20)).save(tmp_path / f"x.{kind}", exif=exif)
            assert images.picture_size(tmp_path / f"x.{kind}") == read_picture(tmp_path / f"x.{kind}").rgb.shape[1:]
    (tmp_path / "text.png").write_bytes(b"nothing")
    (tmp_path / "empty.png").touch()
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    assert images.picture_size(tmp_path / "x.png") == (40, 20)
    assert [images.picture_size(tmp_path / f"{n}.png") for n in ("text", "empty", "missing")] == [(0, 0)] * 3


def test_write_atomic(tmp_path):
    images.write_atomic(tmp_path / "new/a.bin", b"1")
    with pytest.raises(KeyboardInterrupt), images.atomic_path(tmp_path / "new/a.bin") as temporary:
        temporary.write_bytes(b"2")
        raise KeyboardInterrupt
    assert [p.read_bytes() for p in (tmp_path / "new").iterdir()] == [b"1"]


def test_progress(capsys):
    line = images.ProgressLine()
    line.start, line.last_time = line.start - 2, 0
    line.step("tiles", "a.png", 4)
    assert capsys.readouterr().err == "1/4 tiles  0.50 tiles/s  0:06 left  a.png\n"
    line.step("tiles", "a.png", 4)      # not again within 30 seconds
    assert capsys.readouterr().err == ""
