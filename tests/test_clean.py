"""clean.py: measurements of pictures, decisions, the cleaned folder, smaller copies, and mining."""
import csv
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from safetensors.torch import load_file

import clean
import data
import demo
import images

ROOT = Path(__file__).parent.parent
QUIET = {"log": lambda _: None, "workers": 0}


def painting(seed=0, h=320, w=384):
    """Draw a sharp picture, uint8 (H, W, 3): shapes at twice the size, averaged down."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (2 * w, 2 * h), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, r = rng.integers(0, 2 * w), rng.integers(0, 2 * h), rng.integers(8, 120)
        color = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x - r, y - r // 2, x + r, y + r), color, 0, 3)
        draw.line((x, y, *rng.integers(0, 2 * h, 2).tolist()), color, int(rng.integers(2, 9)))
    return np.array(image.resize((w, h), Image.Resampling.BOX))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def jpeg(pixels, quality):
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "JPEG", quality=quality)
    return np.asarray(Image.open(memory))


def upscaled(pixels, factor=2, kernel=Image.Resampling.BICUBIC):
    h, w = pixels.shape[:2]
    return np.asarray(Image.fromarray(pixels[:int(h / factor), :int(w / factor)]).resize((w, h), kernel))


def measure(pixels):
    squares = clean.detailed_squares(pixels)
    return clean.sharpness(squares), clean.blockiness(squares)


def report_of(out):
    with open(out / "report.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def tree(folder):
    return {str(p.relative_to(folder)): (os.readlink(p) if p.is_symlink() else p.read_bytes())
            for p in folder.rglob("*") if not p.is_dir()}


def linear_profile(gray=False):
    """Make an ICC profile, version 2, for linear samples: sRGB primaries (adapted to D50) or gray, gamma 1."""
    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))
    desc = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + b"\0" * 78
    tags = {b"desc": desc + b"\0" * (-len(desc) % 4), b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    if gray:
        tags[b"kTRC"] = b"curv\0\0\0\0" + struct.pack(">I", 0)
    else:
        primaries = {b"rXYZ": (0.43607, 0.22249, 0.01392), b"gXYZ": (0.38515, 0.71687, 0.09708),
                     b"bXYZ": (0.14307, 0.06061, 0.71410)}
        tags |= {name: b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in primaries.items()}
        tags |= {name: b"curv\0\0\0\0" + struct.pack(">I", 0) for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"none", 0x02100000, b"mntr",
                       b"GRAY" if gray else b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


def encode_srgb(linear):
    """Convert 8-bit linear samples to sRGB samples (IEC 61966-2-1)."""
    x = np.asarray(linear) / 255.0
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


# ------------------------------------------------------------------ measurements

@pytest.mark.parametrize("seed", range(2))
def test_sharpness_finds_upscaled_pictures(seed):
    pixels = painting(seed, 400, 400)
    sharp, blocks = measure(pixels)
    assert sharp > clean.MIN_SHARPNESS + 3 and blocks < 0.3
    for kernel in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR):
        assert measure(upscaled(pixels, 2, kernel))[0] < clean.MIN_SHARPNESS
    mixed = np.concatenate([pixels[:, :256], upscaled(pixels)[:, :256]], 1)      # a sharp quarter is enough
    assert measure(mixed)[0] > clean.MIN_SHARPNESS


@pytest.mark.parametrize("seed", range(2))
def test_blockiness_finds_the_jpeg_grid_at_any_offset(seed):
    pixels = painting(seed, 400, 400)
    found = [measure(jpeg(pixels, q)[y:, x:])[1] for q in (95, 60, 30) for y, x in ((0, 0), (3, 5), (7, 0))]
    assert max(found[:3]) < clean.MAX_BLOCKS < min(found[3:6]) < min(found[6:])
    for quality in (88, 95):        # a JPEG file may show its own grid, but not too strongly
        once = jpeg(pixels, quality)
        own = clean.blockiness(clean.detailed_squares(once), jpeg=True)
        assert own < min(clean.MAX_BLOCKS, measure(once)[1])
    for crop in (0, 3):
        twice = jpeg(jpeg(pixels, 30)[crop:, crop:], 95)
        assert clean.blockiness(clean.detailed_squares(twice), jpeg=True) > clean.MAX_BLOCKS


def test_plain_and_tiny_pictures_are_not_measured():
    for pixels in (np.full((300, 300, 3), 255, np.uint8), painting(0, 100, 400), painting(0, 400, 127)):
        assert len(clean.detailed_squares(pixels)) == 0
    assert clean.detailed_squares(painting(), count=3).shape == (3, 128, 128)
    pixels = np.full((256, 384, 3), 9, np.uint8)
    pixels[128:, 128:256] = painting(1, 128, 128)
    luma = pixels[None, 128:, 128:256] @ np.float32([0.299, 0.587, 0.114])
    assert np.allclose(clean.detailed_squares(pixels), luma)


def test_jpeg_quality_is_read_from_the_table(tmp_path):
    for quality in (20, 50, 75, 88, 95):
        path = save(tmp_path / "a.jpg", painting(), quality=quality, subsampling=quality % 3)
        assert clean.jpeg_quality(path) == quality
    assert clean.jpeg_quality(save(tmp_path / "a.png", painting())) is None


def measured(pixels, name="a"):
    layout, texture = clean.thumbnails(np.asarray(pixels))
    return clean.Measured(Path(name), name, content=name, layout=layout, texture=texture)


def is_copy(pixels, other):
    verdicts = clean.decide([measured(other, "a"), measured(pixels, "b")], min_side=0)
    return verdicts["b"][0] == "duplicate"


def draw_sparse(kind, seed):
    """Draw a picture with little in it, uint8 (H, W, 3). Pictures of one kind have the same layout."""
    rng, (w, h) = np.random.default_rng(seed), (960, 720)
    image = Image.new("RGB", (2 * w, 2 * h), "white" if kind in ("logo", "line art", "figure") else "black")
    draw = ImageDraw.Draw(image)
    words = "night sky moon over river city lights rain garden winter episode final story dream".split()
    if kind == "logo":
        shape = [(700, 900), (960, 500), (1220, 900)] if seed % 2 else [(760, 540), (1160, 540), (1160, 900), (760, 900)]
        draw.polygon(shape, (200, 30, 40))
        draw.ellipse((500, 250, 1420, 1170), None, (200, 30, 40), 40)
    elif kind == "title":
        text = " ".join(rng.choice(words, 3))
        draw.text((w, h), text, "white", ImageFont.load_default(110), "mm")
    elif kind == "credits":
        for i in range(8):
            text = " ".join(rng.choice(words, 3))
            draw.text((w, 180 + 150 * i), text, "white", ImageFont.load_default(70), "mm")
    elif kind in ("line art", "figure"):
        spread = 1 if kind == "line art" else 0.25
        for x, y, rx, ry, angle in zip(*rng.uniform(-1, 1, (5, 25))):
            x, y, rx, ry = w + w * spread * x, h + h * spread * y, 40 + 300 * spread * rx**2, 40 + 300 * spread * ry**2
            draw.arc((x - rx, y - ry, x + rx, y + ry), 180 * angle, 180 * angle + 200, "black", 6)
    pixels = np.array(image.resize((w, h), Image.Resampling.BOX))
    if "stars" in kind:
        if kind == "stars and moon":
            pixels[:] = np.linspace((8, 12, 40), (60, 80, 140), h)[:, None]
            pixels[90:200, 640:750], pixels[640:] = (240, 240, 220), (4, 6, 12)
        y, x = rng.integers(0, 640, 700), rng.integers(0, w, 700)
        pixels[y, x] = rng.uniform(80, 255, (700, 1))
    return pixels


SPARSE = ("logo", "title", "credits", "line art", "figure", "stars", "stars and moon")


@pytest.mark.parametrize("kind", SPARSE)
def test_different_sparse_pictures_are_kept_and_their_copies_are_found(kind):
    first, second = draw_sparse(kind, 0), draw_sparse(kind, 1)
    assert not is_copy(first, second)
    for pixels in (first, second):
        image, (h, w) = Image.fromarray(pixels), pixels.shape[:2]
        for factor in (0.5, 0.75):
            assert is_copy(image.resize((int(w * factor), int(h * factor)), Image.Resampling.LANCZOS), pixels)
        quality = 85 if kind == "stars and moon" else 60        # JPEG of quality 60 removes most stars on a gradient
        assert is_copy(jpeg(pixels, quality), pixels)


def test_copies_of_a_painting_are_found():
    for seed in range(3):
        pixels = painting(seed)
        image = Image.fromarray(pixels)
        copies = [jpeg(pixels, 40), image.resize((200, 170), Image.Resampling.LANCZOS), np.uint8(pixels * 0.9),
                  image.resize((700, 583), Image.Resampling.BICUBIC), pixels[3:-3, 4:-4], pixels[:, :-7]]
        assert all(is_copy(copy, pixels) for copy in copies)
        others = [painting(100 + seed), pixels[:, ::-1].copy(), 255 - pixels]
        assert not any(is_copy(other, pixels) for other in others)
    assert is_copy(np.full((300, 300, 3), 1, np.uint8), np.full((400, 300, 3), 255, np.uint8))
    assert not is_copy(np.full((300, 300, 3), 255, np.uint8), draw_sparse("figure", 0))


def test_sparse_pictures_in_a_folder(tmp_path):
    for kind in ("logo", "line art", "stars"):
        for seed in (0, 1):
            pixels = draw_sparse(kind, seed)
            half = Image.fromarray(pixels).resize((480, 360), Image.Resampling.LANCZOS)
            save(tmp_path / f"in/{kind} {seed}.png", pixels)
            save(tmp_path / f"in/{kind} {seed} half.png", half)
            save(tmp_path / f"in/{kind} {seed} 60.jpg", pixels, quality=60)
    verdicts = clean.clean([tmp_path / "in"], tmp_path / "out", **QUIET)
    for name, (verdict, reason) in verdicts.items():
        if name.endswith("half.png"):
            assert verdict == "duplicate" and reason.endswith(name.replace(" half", "")), (name, reason)
        else:
            assert verdict == ("jpeg" if name.endswith("jpg") else "kept"), (name, reason)


def write(pixels, lines, size, fill="white", y=20, vertical=False):
    """Draw lines of text on a copy of uint8 (H, W, 3), with a black outline if they are white."""
    image = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for i, line in enumerate(lines):
        place = (image.width / 2, y + 1.4 * size * i)
        draw.text(place, line, fill, font, "mt", stroke_width=2 * (fill == "white"), stroke_fill="black")
    return np.asarray(image.rotate(90, expand=True) if vertical else image)


def test_text_is_found():
    scene, plain = painting(3, 720, 960), np.full((720, 960, 3), 230, np.uint8)
    words = ["The night was long, and nobody answered.", "Then she saw the lights of the city again."]
    for vertical in (False, True):
        assert clean.text_share(write(scene, words * 3, 34, vertical=vertical)) > 2 * clean.MAX_TEXT
        assert clean.text_share(write(plain, words * 8, 18, "black", vertical=vertical)) > 10 * clean.MAX_TEXT
    assert clean.text_share(write(plain // 10, ["A Winter Story", "Episode Seven"], 60)) > clean.MAX_TEXT


def test_drawings_and_textures_are_not_text(tmp_path):
    for seed in range(3):
        assert clean.text_share(painting(seed, 720, 960)) < clean.MAX_TEXT
    for kind in ("line art", "figure", "stars", "logo"):
        assert clean.text_share(draw_sparse(kind, 0)) < clean.MAX_TEXT, kind
    demo.draw_textures(tmp_path / "textures", len(demo.TEXTURES), seed=5)
    for path in (tmp_path / "textures").iterdir():
        share = clean.text_share(np.array(Image.open(path).convert("RGB")))
        assert (share > clean.MAX_TEXT) == path.stem.endswith("text"), (path.name, share)
    assert clean.text_share(np.zeros((300, 300, 3), np.uint8)) == 0


def test_pictures_with_text_are_dropped_or_kept(tmp_path):
    lines = ["The night was long, and nobody answered."] * 4
    save(tmp_path / "in/subtitles.png", write(painting(3, 720, 960), lines, 34))
    save(tmp_path / "in/plain.png", painting(4, 720, 960))
    verdicts = clean.clean([tmp_path / "in"], tmp_path / "out", **QUIET)
    assert verdicts["0/plain.png"][0] == "kept" and verdicts["0/subtitles.png"][0] == "text"
    assert "% of the area, above 0.5%" in verdicts["0/subtitles.png"][1]
    verdicts = clean.clean([tmp_path / "in"], tmp_path / "kept", keep_text=True, **QUIET)
    assert {verdict for verdict, _ in verdicts.values()} == {"kept"}


def test_components_are_those_of_a_plain_search():
    mask = np.random.default_rng(0).random((40, 50)) < 0.35
    expected, left = set(), {tuple(p) for p in np.argwhere(mask).tolist()}
    while left:
        stack, found = [left.pop()], []
        while stack:
            y, x = stack.pop()
            found.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        ys, xs = np.array(found).T.tolist()
        expected.add((min(ys), max(ys) + 1, min(xs), max(xs) + 1, len(found)))
    assert {tuple(c) for c in clean.connected_components(mask).T.tolist()} == expected
    assert clean.connected_components(mask & False).shape == (5, 0)


def test_transparent_parts_are_not_measured(tmp_path):
    path = save(tmp_path / "a.png", np.dstack([painting(), np.zeros((320, 384), np.uint8)]))
    assert clean.examine((path, "a"))[0].sharpness == 0


# ------------------------------------------------------------------ clean

@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """A folder with pictures of all kinds, and their verdicts."""
    folder, expected = tmp_path_factory.mktemp("collection") / "in", {}
    for i in range(3):
        save(folder / "good" / f"{1000 + i} 壁紙, the \"{i}\".png", painting(i))
        expected[f"0/good/{1000 + i} 壁紙, the \"{i}\".png"] = "kept"
    copy = Image.fromarray(painting(0)).resize((352, 293), Image.Resampling.LANCZOS)
    save(folder / "copy, smaller.png", copy)
    save(folder / "copy, the same.webp", painting(1), lossless=True)
    # An upscaled copy is larger than the original, but not better.
    save(folder / "upscaled.png", Image.fromarray(painting(2)).resize((960, 800), Image.Resampling.BICUBIC))
    save(folder / "jpeg 60.jpg", painting(4), quality=60)
    save(folder / "jpeg 95.jpg", painting(5), quality=95, subsampling=0)
    save(folder / "was a jpeg.png", jpeg(painting(6), 50)[3:, 3:])
    save(folder / "twice a jpeg.jpg", jpeg(painting(7), 30)[3:, 3:], quality=95)
    save(folder / "small.png", painting(8, 255, 400))
    (folder / "empty.png").write_bytes(b"")
    (folder / "text\nof two lines.jpg").write_text("not a picture")
    whole = (folder / "good" / "1002 壁紙, the \"2\".png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:9999])
    (folder / os.fsdecode(b"wrong \xff.png")).symlink_to(folder / os.fsdecode(b"wrong \xff.png"))
    (folder / "dangling.png").symlink_to(folder / "nowhere")
    (folder / "round").symlink_to(folder)
    frames = [Image.fromarray(painting(10 + i)) for i in range(2)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    save(folder / "clear.png", np.dstack([painting(13), np.full((320, 384), 128, np.uint8)]))
    save(folder / "really webp.png", painting(14), format="WEBP", lossless=True)
    expected |= {"0/copy, smaller.png": "duplicate", "0/copy, the same.webp": "kept", "0/upscaled.png": "upscaled",
                 "0/jpeg 60.jpg": "jpeg", "0/jpeg 95.jpg": "kept", "0/was a jpeg.png": "jpeg",
                 "0/twice a jpeg.jpg": "jpeg", "0/small.png": "small",
                 "0/empty.png": "broken", "0/cut.png": "broken", "0/text\\nof two lines.jpg": "broken",
                 "0/wrong \\udcff.png": "broken", "0/dangling.png": "broken", 
                 "0/moving.webp": "kept", "0/clear.png": "kept", "0/really webp.png": "kept",
                 "0/good/1001 壁紙, the \"1\".png": "duplicate"}
    return folder, expected


@pytest.fixture(scope="module")
def cleaned(collection, tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("cleaned") / "set", []
    before = {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in collection[0].rglob("*")}
    # text_share() is wrong about painting(2): it takes its ellipses and lines for text.
    clean.clean([collection[0]], out, log=lines.append, workers=2, keep_text=True)
    assert before == {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in collection[0].rglob("*")}
    return out, lines


def test_every_file_has_its_verdict_and_reason(collection, cleaned):
    (_, expected), (out, lines) = collection, cleaned
    report = report_of(out)
    assert {name: row["verdict"] for name, row in report.items()} == expected
    why = {name.removeprefix("0/"): row["reason"] for name, row in report.items()}
    assert "0 bytes" in why["empty.png"]
    assert "400x255" in why["small.png"]
    assert "quality 60" in why["jpeg 60.jpg"] and "blocks" in why["was a jpeg.png"]
    assert '0/good/1000 壁紙, the "0".png' in why["copy, smaller.png"]
    assert "0/copy, the same.webp" in why['good/1001 壁紙, the "1".png']
    assert "7 kept" in lines[-1] and "5 broken" in lines[-1] and not any("\n" in line for line in lines)


def test_kept_pictures_and_report(collection, cleaned):
    folder, out = collection[0], cleaned[0]
    for name, row in report_of(out).items():
        if row["verdict"] == "kept":
            target = out / row["reason"]
            assert target.parent.name == "pictures" and len(target.stem) == 16 and int(target.stem, 16)
            assert target.samefile(folder / name[2:])
    assert len(list((out / "pictures").iterdir())) == 7
    assert sorted(p.name for p in out.iterdir()) == ["pictures", "report.csv"]


def test_a_decompression_bomb_is_broken(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    (tmp_path / "in").mkdir()
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "in/bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    (verdict, reason), = clean.clean([tmp_path / "in"], tmp_path / "out", **QUIET).values()
    assert verdict == "broken" and "bomb" in reason


def test_the_largest_good_one_of_near_duplicates_is_kept():
    first, second = (measured(painting(seed)) for seed in range(2))

    def row(name, width, like=first, content=None, sharpness=-9.0, blocks=0.1):
        return clean.Measured(Path(name), name, "", None, width, 900, content or name, like.layout, like.texture,
                              sharpness, blocks)
    rows = [row("a", 1000), row("b", 2000, sharpness=-30), row("c", 1500),
            row("d", 1500, blocks=0.9, content="0"), row("e", 1200, second)]
    expected = {"a": "duplicate", "b": "upscaled", "c": "kept", "d": "duplicate", "e": "kept"}
    for seed in range(5):       # the order does not matter
        random.Random(seed).shuffle(rows)
        assert {name: verdict for name, (verdict, _) in clean.decide(rows).items()} == expected


def test_equal_samples_are_duplicates(tmp_path):
    """This includes pictures with weak texture, and pictures with another color description."""
    weak = np.uint8(100 + (np.random.default_rng(0).random((256, 256, 1)) < 0.05)).repeat(3, 2)
    info = PngImagePlugin.PngInfo()
    info.add(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))      # P3
    for pixels, name in ((painting(), "sharp"), (weak, "weak")):
        save(tmp_path / f"in/{name}.png", pixels)
        save(tmp_path / f"in/{name} 2.webp", pixels, lossless=True)
    save(tmp_path / "in/sharp 3.png", painting(), pnginfo=info)
    before, lines = tree(tmp_path / "in"), []
    verdicts = clean.clean(tmp_path / "in", tmp_path / "out", workers=0, log=lines.append)
    assert sorted(verdict for verdict, _ in verdicts.values()) == ["duplicate"] * 3 + ["kept"] * 2
    assert any("sharp 3.png: color treated as sRGB" in line for line in lines) and tree(tmp_path / "in") == before


def test_kept_pictures_are_hard_links_or_copies(tmp_path, monkeypatch):
    source = save(tmp_path / "in/a.png", painting())
    clean.clean([tmp_path / "in"], tmp_path / "linked", **QUIET)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    clean.clean([tmp_path / "in"], tmp_path / "copied", **QUIET)
    linked, copied = (next((tmp_path / name / "pictures").iterdir()) for name in ("linked", "copied"))
    assert linked.samefile(source) and not copied.samefile(source)
    assert copied.read_bytes() == source.read_bytes()


def test_wrong_folders(tmp_path):
    save(tmp_path / "in/a.png", painting())
    (tmp_path / "none").mkdir()
    for folder in ("none", "absent"):
        with pytest.raises(images.UserError, match=folder):
            clean.clean([tmp_path / folder], tmp_path / "out", **QUIET)
    (tmp_path / "out/pictures").mkdir(parents=True)
    with pytest.raises(images.UserError, match="exists"):
        clean.clean([tmp_path / "in"], tmp_path / "out", **QUIET)


def test_damaged_metadata_does_not_stop_the_others(tmp_path):
    save(tmp_path / "in/a.png", painting(0, 300, 300))
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    path = save(tmp_path / "in/b.png", painting(1, 300, 300), pnginfo=text)
    path.write_bytes(path.read_bytes().replace(b"tEXta\0b", b"tEXta\0c"))        # a wrong checksum
    verdicts = clean.clean([tmp_path / "in"], tmp_path / "out", **QUIET)
    assert [verdict for verdict, _ in verdicts.values()] == ["kept", "kept"]


# ------------------------------------------------------------------ smaller copies

def test_copies_of_equal_names_and_sizes_are_made_once(tmp_path):
    for folder in "ab":
        save(tmp_path / folder / "x.png", painting(0, 800, 900))
    lines = []
    count = clean.multiscale([tmp_path / "a", tmp_path / "b"], tmp_path / "out", workers=0, log=lines.append)
    assert count == 3 == len(list((tmp_path / "out").iterdir()))       # half of 800 is the copy of 400, too
    assert "3 copies of 1 pictures" in lines[-1] and "1 with the name of another" in lines[-1]


def test_copies_are_smaller_antialiased_and_named(tmp_path):
    save(tmp_path / "in/sub/wide 壁.webp", painting(0, 600, 901), lossless=True)
    checker = np.indices((450, 450)).sum(0) % 2 * 255
    save(tmp_path / "in/checker.png", np.uint8(checker))
    save(tmp_path / "in/small.png", painting(1, 200, 250))
    (tmp_path / "in/broken.png").write_text("no")
    lines, out = [], tmp_path / "out"
    assert clean.multiscale([tmp_path / "in"], out, workers=2, log=lines.append) == 4 + 4 + 1
    sizes = {p.relative_to(out).as_posix(): Image.open(p).size for p in out.rglob("*.png")}
    assert sizes == {"sub/wide 壁_075.png": (676, 450), "sub/wide 壁_050.png": (450, 300),
                     "sub/wide 壁_033.png": (300, 200), "sub/wide 壁_400.png": (601, 400),
                     "checker_075.png": (338, 338), "checker_050.png": (225, 225),
                     "checker_033.png": (150, 150), "checker_400.png": (400, 400), "small_075.png": (188, 150)}
    for name in ("050", "033"):
        flat = np.asarray(Image.open(out / f"checker_{name}.png")).astype(int)[9:-9, 9:-9]
        assert np.abs(flat - 127.5).max() < 12, name           # without antialiasing it would be black or white
    half = np.asarray(Image.open(out / "sub/wide 壁_050.png")).astype(int)
    boxes = painting(0, 600, 901)[:, :900].reshape(300, 2, 450, 2, 3).mean((1, 3))
    assert np.abs(half - boxes).mean() < 8
    assert "broken.png" in lines[0] and "1 unreadable" in lines[-1] and len(lines) == 2


def test_copies_keep_transparency_and_convert_profiles(tmp_path):
    clear = np.zeros((400, 400, 4), np.uint8)
    clear[:, 201:] = 200, 100, 50, 255              # the black behind the transparent half must not show
    save(tmp_path / "in/clear.png", clear)
    save(tmp_path / "in/linear.png", np.full((400, 400, 3), 60, np.uint8), icc_profile=linear_profile())
    Image.fromarray(np.full((400, 400, 4), 60, np.uint8), "CMYK").save(tmp_path / "in/print.jpg")
    lines = []
    clean.multiscale([tmp_path / "in"], tmp_path / "out", log=lines.append, workers=0)
    assert len(lines) == 2 and "print.jpg: CMYK converted to RGB" in lines[0]
    half = np.asarray(Image.open(tmp_path / "out/clear_050.png"))
    assert half.shape == (200, 200, 4) and (half[:, :90, 3] == 0).all() and (half[:, 110:, 3] == 255).all()
    edge = half[..., :3][half[..., 3] > 20].astype(int)
    assert np.abs(edge - (200, 100, 50)).max() <= 20
    linear = Image.open(tmp_path / "out/linear_050.png")
    assert "icc_profile" not in linear.info and abs(int(np.asarray(linear)[5, 5, 0]) - encode_srgb(60)) < 2


# ------------------------------------------------------------------ mining

def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


@pytest.fixture(scope="module")
def skies(tmp_path_factory):
    """Six pictures of 8 x 8 squares of 32 pixels: some are busy, most are calm, one is plain."""
    folder = tmp_path_factory.mktemp("skies") / "in"
    for i in range(6):
        rng = np.random.default_rng(i)
        pixels = np.empty((256, 256, 3), np.uint8)
        pixels[:] = (200 + np.arange(256) // 8)[:, None, None]
        for k in rng.choice(64, 24 if i < 2 else 4, replace=False):
            y, x = k // 8 * 32, k % 8 * 32
            pixels[y:y + 32, x:x + 32] = noise(32, 32, seed=100 * i + int(k)) // 2
        pixels[:32, :32] = 255
        save(folder / f"{i}.png", pixels)
    return folder


def test_selection_takes_busy_patches_and_a_share_of_calm_ones():
    details = np.random.default_rng(0).permutation(100) * 0.1       # one is plain
    chosen = clean.select_patches(details, 40, np.random.default_rng(1))
    assert (np.diff(chosen) > 0).all() and len(chosen) == 40
    ranks = 99 - np.round(details[chosen] * 10).astype(int)         # 0 has most detail
    high, low = ranks[ranks < 36], ranks[ranks >= 36]
    assert len(high) == 36 and len(low) == 4 and low.min() >= 36 + 31 and 99 not in ranks
    other = clean.select_patches(details, 40, np.random.default_rng(2))
    assert (other != chosen).any()
    rng = np.random.default_rng(0)
    assert len(clean.select_patches(details, 1000, rng)) == 99
    assert len(clean.select_patches([0, 0], 2, rng)) == 0
    assert sorted(details[clean.select_patches(details, 4, rng)]) == sorted(details)[-4:]


def test_mining_takes_detail_from_all_pictures(skies, tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "MAX_PER_PICTURE", 16)
    monkeypatch.setattr(clean, "LOW_DETAIL_SHARE", 0.125)
    packed = data.pack(skies, tmp_path / "p.safetensors", 32, min_side=32, **QUIET)
    clean.mine(packed, tmp_path / "mined.safetensors", keep=0.5, log=print)
    mined = load_file(tmp_path / "mined.safetensors")
    busy = mined["detail"] > 20
    assert len(busy) == 48 and (~busy).sum() >= 6 and mined["detail"].min() > clean.MIN_DETAIL
    counts = np.bincount(mined["picture"][busy], minlength=6)
    assert counts.max() <= 14 and counts.min() >= 2         # 23 squares of one picture are busy
    names = mined["names"].numpy().tobytes().decode().rstrip("\n").split("\n")
    whole = {name: np.asarray(Image.open(skies / name[2:])) for name in names}
    for patch, k in zip(mined["patches"].numpy(), mined["picture"]):
        squares = whole[names[k]].reshape(8, 32, 8, 32, 3).swapaxes(1, 2).reshape(64, 32, 32, 3)
        assert (squares == patch).all((1, 2, 3)).any()


def test_mining_pairs(skies, tmp_path):
    for path in skies.iterdir():
        small = np.asarray(Image.open(path)).astype(float).reshape(128, 2, 128, 2, 3).mean((1, 3)).round()
        save(tmp_path / "lr" / path.name, np.uint8(small))
    pairs = data.pack([skies], tmp_path / "pairs.safetensors", size=64, lr_dir=[tmp_path / "lr"], **QUIET)
    clean.mine(pairs, tmp_path / "m.safetensors", keep=0.9, log=print)
    mined = load_file(tmp_path / "m.safetensors")
    means = mined["patches"].float().reshape(-1, 32, 2, 32, 2, 3).mean((2, 4))
    assert (means - mined["lr"].float()).abs().max() < 0.51 and len(means) > 20
    assert data.Batches(tmp_path / "m.safetensors", 3, 4, 16, 2, "none", 0)[0][0].shape == (4, 3, 16, 16)


# ------------------------------------------------------------------ the command

def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["clean.py", *map(str, args)])
    clean.main()


def test_commands(skies, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clean, "MIN_LAYOUT", 2)
    monkeypatch.setattr(clean, "MAX_BLOCKS", np.inf)
    monkeypatch.setattr(clean, "MIN_SHARPNESS", -np.inf)
    cleaned, smaller, mined = tmp_path / "set", tmp_path / "smaller", tmp_path / "m.safetensors"
    run(monkeypatch, "clean", skies, "-o", cleaned, "--workers", 0)
    assert len(list((cleaned / "pictures").iterdir())) == 6
    run(monkeypatch, "multiscale", cleaned / "pictures", "-o", smaller, "--workers", 0, "--min-side", 64)
    assert len(list(smaller.iterdir())) == 18
    packed = data.pack([cleaned / "pictures", smaller], tmp_path / "p.safetensors", 64, 64, **QUIET)
    run(monkeypatch, "mine", packed, "-o", mined, "--keep", 0.25)
    assert len(data.open_patch_file(mined)[1]["patches"]) > 10
    for wrong in (("clean", tmp_path / "nowhere", "-o", tmp_path / "other"), ("clean", skies, "-o", cleaned),
                  ("mine", tmp_path / "nowhere", "-o", mined)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *wrong)
        assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_names_that_the_console_cannot_show(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "壁紙.png").write_bytes(b"broken")
    save(tmp_path / "in" / "空.png", noise(300, 300))
    command = [sys.executable, ROOT / "clean.py", "clean", tmp_path / "in", "-o", tmp_path / "set", "--workers", "0"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"\\u58c1" in done.stdout, done.stderr
