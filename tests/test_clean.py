"""clean.py: what is found in pictures, what is decided, what ends up on the disk; smaller copies."""
import csv
import io
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw

import clean as room
import tile
from clean import clean, decide, multiscale

HERE = Path(__file__).parent.parent


def painting(seed=0, h=320, w=384):
    """A sharp drawing, uint8 (H, W, 3): shapes drawn at twice the size and averaged down."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (2 * w, 2 * h), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, r = rng.integers(0, 2 * w), rng.integers(0, 2 * h), rng.integers(8, 120)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x - r, y - r // 2, x + r, y + r), colour, 0, 3)
        draw.line((x, y, *rng.integers(0, 2 * h, 2).tolist()), colour, int(rng.integers(2, 9)))
    return np.array(image.resize((w, h), Image.Resampling.BOX))


def save(path, pixels, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **how)
    return path


def jpeg(pixels, quality):
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "JPEG", quality=quality)
    return np.asarray(Image.open(memory))


def enlarged(pixels, factor=2, kernel=Image.Resampling.BICUBIC):
    h, w = pixels.shape[:2]
    return np.asarray(Image.fromarray(pixels[:int(h / factor), :int(w / factor)]).resize((w, h), kernel))


def figures(pixels):
    squares = room.busiest(pixels)
    return room.sharpness(squares), room.blockiness(squares)


def verdicts(out):
    with open(out / "report.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def tree(folder):
    return {str(p.relative_to(folder)): (os.readlink(p) if p.is_symlink() else p.read_bytes())
            for p in folder.rglob("*") if not p.is_dir() and p.name != "scan.csv"}


def linear_profile(grey=False):
    """An ICC profile, version 2, of linear samples: sRGB's primaries (adapted to D50) or grey, gamma 1."""
    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))
    desc = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + b"\0" * 78
    tags = {b"desc": desc + b"\0" * (-len(desc) % 4), b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    if grey:
        tags[b"kTRC"] = b"curv\0\0\0\0" + struct.pack(">I", 0)
    else:
        for name, xyz in (b"rXYZ", (0.43607, 0.22249, 0.01392)), (b"gXYZ", (0.38515, 0.71687, 0.09708)), (
                b"bXYZ", (0.14307, 0.06061, 0.71410)):
            tags[name] = b"XYZ \0\0\0\0" + fixed(*xyz)
        tags |= {name: b"curv\0\0\0\0" + struct.pack(">I", 0) for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"none", 0x02100000, b"mntr",
                       b"GRAY" if grey else b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


def encoded(linear):
    """8-bit linear samples -> sRGB ones (IEC 61966-2-1)."""
    x = np.asarray(linear) / 255.0
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


# ---- what is found in a picture

@pytest.mark.parametrize("seed", range(4))
def test_upscaled_pictures_are_told_from_sharp_ones(seed):
    pixels = painting(seed, 400, 400)
    sharp, blocks = figures(pixels)
    assert sharp > room.SHARPNESS + 3 and blocks < 0.3
    for kernel in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR):
        assert figures(enlarged(pixels, 2, kernel))[0] < room.SHARPNESS
    # Sharp in a quarter of its busy places is enough: a painting is mostly soft.
    soft = enlarged(pixels)
    mixed = np.concatenate([pixels[:, :256], soft[:, :256]], 1)
    assert figures(mixed)[0] > room.SHARPNESS > figures(soft)[0]


@pytest.mark.parametrize("seed", range(4))
def test_jpeg_leaves_its_grid_wherever_it_begins(seed):
    pixels = painting(seed, 400, 400)
    worst = [figures(jpeg(pixels, q)[y:, x:])[1] for q in (95, 60, 30) for y, x in ((0, 0), (3, 5), (7, 0))]
    assert max(worst[:3]) < room.BLOCKS < min(worst[3:6]) < min(worst[6:])
    for quality in (88, 95):        # in a JPEG file the grid is no news, unless it shows too much or lies elsewhere
        once = jpeg(pixels, quality)
        assert room.blockiness(room.busiest(once), jpeg=True) < min(room.BLOCKS, figures(once)[1])
    for crop in (0, 3):
        assert room.blockiness(room.busiest(jpeg(jpeg(pixels, 30)[crop:, crop:], 95)), jpeg=True) > room.BLOCKS
    assert np.ptp(worst[:3]) < 0.5 and figures(jpeg(pixels, 60).swapaxes(0, 1))[1] > room.BLOCKS
    lying = jpeg(pixels, 60)        # both directions count alike
    assert abs(figures(lying)[1] - figures(np.ascontiguousarray(lying.swapaxes(0, 1)))[1]) < 1e-4


def test_plain_and_tiny_pictures_have_no_figures():
    for pixels in (np.full((300, 300, 3), 255, np.uint8), painting(0, 100, 400), painting(0, 400, 127)):
        assert figures(pixels) == (None, None)
    assert room.busiest(painting(), count=3).shape == (3, 128, 128)
    pixels = np.full((256, 384, 3), 9, np.uint8)
    pixels[128:, 128:256] = painting(1, 128, 128)
    assert np.allclose(room.busiest(pixels), pixels[None, 128:, 128:256] @ np.float32([0.299, 0.587, 0.114]))


def test_quality_of_a_jpeg_is_read_from_its_table(tmp_path):
    for quality in (20, 50, 75, 88, 95):
        path = save(tmp_path / "a.jpg", painting(), quality=quality, subsampling=quality % 3)
        assert room.look(path) == ("JPEG", 384, 320, quality)
    assert room.look(save(tmp_path / "a.png", painting()))[3] is None


def test_hash_survives_what_copies_go_through():
    for seed in range(6):
        pixels = painting(seed)
        code, image = room.perceptual_hash(pixels), Image.fromarray(pixels)
        copies = [jpeg(pixels, 40), np.asarray(image.resize((200, 170), Image.Resampling.LANCZOS)),
                  np.asarray(image.resize((700, 583), Image.Resampling.BICUBIC)), np.uint8(pixels * 0.9)]
        assert max((room.perceptual_hash(c) ^ code).bit_count() for c in copies) <= 4
        others = [room.perceptual_hash(painting(100 + seed)), room.perceptual_hash(pixels[:, ::-1].copy())]
        assert min((o ^ code).bit_count() for o in others) > 10
        assert abs(code.bit_count() - 32) <= 1


def test_near_hashes_are_all_found_and_no_others():
    rng = random.Random(0)
    codes = [rng.getrandbits(64) for _ in range(300)]
    near = room.Near()
    for i, code in enumerate(codes):
        near.add(code, i)
    for i, code in enumerate(codes):
        for distance in range(12):
            flipped = code
            for bit in rng.sample(range(64), distance):
                flipped ^= 1 << bit
            for most in (0, 4, 7):
                assert near.find(flipped, most) == (i if distance <= most else None)
    # As many as can share a band without matching: only a few are compared.
    assert max(len(v) for v in near.bands.values()) < 5


def test_profiles_are_followed_and_srgb_stays_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 300, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile, expected in (("linear", linear_profile(), encoded(pixels)), ("srgb", srgb, pixels),
                                    ("none", None, pixels), ("rubbish", b"\0" * 16 + b"RGB " + b"\0" * 200, pixels),
                                    ("of grey", linear_profile(grey=True), pixels)):
        path = save(tmp_path / f"{name}.png", pixels, icc_profile=profile)
        picture = room.read(path)
        assert np.abs(room.eight_bit(picture.rgb) - expected).max() <= (1.5 if name == "linear" else 0), name
        assert picture.icc is None
    grey = save(tmp_path / "grey.png", pixels[..., 0], icc_profile=linear_profile(grey=True))
    error = np.abs(room.eight_bit(room.read(grey).rgb) - encoded(pixels[..., :1]))
    assert error[pixels[..., 0] >= 8].max() <= 1.5          # lcms is coarse in the deepest shadows of grey
    tall = np.repeat(np.uint8(np.arange(600) % 256)[:, None, None], 3, 2)
    error = np.abs(room.eight_bit(room.read(save(tmp_path / "tall.png", tall, icc_profile=linear_profile())).rgb) - encoded(tall))
    assert error.max() <= 1.5
    rgb = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)
    tile.save_picture(tmp_path / "deep.png", tile.Picture(rgb, depth=16, icc=linear_profile()))
    assert np.abs(room.eight_bit(room.read(tmp_path / "deep.png").rgb) - encoded(pixels)).max() <= 1.5


# ---- clean

@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """A folder with some of everything, and what is to become of each."""
    folder, expected = tmp_path_factory.mktemp("collection") / "in", {}
    for i in range(3):
        save(folder / "good" / f"{1000 + i} 壁紙, the \"{i}\".png", painting(i))
        expected[f"0/good/{1000 + i} 壁紙, the \"{i}\".png"] = "kept"
    save(folder / "copy, smaller.png", Image.fromarray(painting(0)).resize((352, 293), Image.Resampling.LANCZOS))
    save(folder / "copy, the same.webp", painting(1), lossless=True)
    # An enlarged copy is larger than the true one, but not better.
    save(folder / "enlarged.png", Image.fromarray(painting(2)).resize((960, 800), Image.Resampling.BICUBIC))
    save(folder / "jpeg 60.jpg", painting(4), quality=60)
    save(folder / "jpeg 95.jpg", painting(5), quality=95, subsampling=0)
    save(folder / "was a jpeg.png", jpeg(painting(6), 50)[3:, 3:])
    save(folder / "twice a jpeg.jpg", jpeg(painting(7), 30)[3:, 3:], quality=95)
    save(folder / "twice, same grid.jpg", jpeg(painting(14), 30), quality=95)
    save(folder / "small.png", painting(8, 255, 400))
    save(folder / "large.png", painting(9, 900, 1000))
    (folder / "empty.png").write_bytes(b"")
    (folder / "text\nof two lines.jpg").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "good" / "1002 壁紙, the \"2\".png").read_bytes()[:9999])
    (folder / os.fsdecode(b"wrong \xff.png")).symlink_to(folder / os.fsdecode(b"wrong \xff.png"))
    (folder / "dangling.png").symlink_to(folder / "nowhere")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    frames = [Image.fromarray(painting(10 + i)) for i in range(2)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[1].save(folder / "moving.png", save_all=True, append_images=frames[:1])
    save(folder / "page.gif", Image.fromarray(painting(12)).quantize(), save_all=True, append_images=frames)
    clear = np.dstack([painting(13), np.full((320, 384), 128, np.uint8)])
    save(folder / "clear.png", clear)
    expected |= {"0/copy, smaller.png": "duplicate", "0/copy, the same.webp": "kept", "0/enlarged.png": "upscaled",
                 "0/jpeg 60.jpg": "jpeg", "0/jpeg 95.jpg": "kept", "0/was a jpeg.png": "jpeg",
                 "0/twice a jpeg.jpg": "jpeg",
                 "0/twice, same grid.jpg": "jpeg",
                 "0/small.png": "small", "0/large.png": "large", "0/empty.png": "broken", "0/cut.png": "broken",
                 "0/text\\nof two lines.jpg": "broken", "0/wrong \\udcff.png": "broken", "0/dangling.png": "broken",
                 "0/pipe.png": "broken", "0/moving.webp": "kept", "0/moving.png": "kept", "0/page.gif": "kept",
                 "0/clear.png": "kept", "0/good/1001 壁紙, the \"1\".png": "duplicate"}
    return folder, expected


@pytest.fixture(scope="module")
def cleaned(collection, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("cleaned") / "set", []
    before = {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in collection[0].rglob("*")}
    clean([collection[0]], out, max_mp=0.8, log=said.append)
    assert before == {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in collection[0].rglob("*")}
    return out, said


def test_each_gets_its_verdict(collection, cleaned):
    (folder, expected), (out, said) = collection, cleaned
    report = verdicts(out)
    assert {name: row["verdict"] for name, row in report.items()} == expected
    why = {name.removeprefix("0/"): row["why"] for name, row in report.items()}
    assert "0 bytes" in why["empty.png"] and "not a file" in why["pipe.png"] and "No such" in why["dangling.png"]
    assert "symbolic links" in why["wrong \\udcff.png"] and "400x255" in why["small.png"]
    assert "0.9 mega" in why["large.png"]
    assert "quality 60" in why["jpeg 60.jpg"] and "blocks" in why["was a jpeg.png"]
    assert "blocks" in why["twice a jpeg.jpg"]
    assert why["copy, smaller.png"] == 'nearly the same as 0/good/1000 壁紙, the "0".png'
    assert why['good/1001 壁紙, the "1".png'] == "same pixels as 0/copy, the same.webp"
    assert f"8 of {len(expected)} pictures" in said[-1] and "6 broken" in said[-1]
    assert sum("first of 2 frames" in line for line in said) >= 2 and not any("\n" in line for line in said)


def test_what_stays_is_linked_and_the_broken_lie_apart(collection, cleaned):
    folder, out = collection[0], cleaned[0]
    for name, row in verdicts(out).items():
        if row["verdict"] == "kept":
            target = out / row["kept_as"]
            assert target.parent.name == "pictures" and len(target.stem) == 16 and int(target.stem, 16)
            assert os.readlink(target) == str(folder / name[2:])
        elif row["verdict"] == "broken":
            assert row["kept_as"].startswith("quarantine/") and (out / row["kept_as"]).is_symlink()
        else:
            assert not row["kept_as"]
    assert len(list((out / "pictures").iterdir())) == 8 and len(list((out / "quarantine").iterdir())) == 6
    assert sorted(p.name for p in out.iterdir()) == ["pictures", "quarantine", "report.csv", "scan.csv"]


def test_what_was_too_large_is_never_decoded(collection, tmp_path, monkeypatch):
    seen, read = [], tile.read_picture
    monkeypatch.setattr(tile, "read_picture", lambda path: seen.append(path.name) or read(path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "large.png").symlink_to(collection[0] / "large.png")
    clean([tmp_path / "in"], tmp_path / "out", max_mp=0.8, log=lambda _: None)
    assert not seen and not list((tmp_path / "out/pictures").iterdir())
    clean([tmp_path / "in"], tmp_path / "out", max_mp=0.9, log=lambda _: None)        # a new limit: now it is
    assert seen == ["large.png"] and len(list((tmp_path / "out/pictures").iterdir())) == 1
    clean([tmp_path / "in"], tmp_path / "out", max_mp=0.8, log=lambda _: None)        # and gone again
    assert seen == ["large.png"] and not list((tmp_path / "out/pictures").iterdir())


def test_a_bomb_is_broken_and_harmless(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    head = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    (tmp_path / "in").mkdir()
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "in/bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    start = time.time()
    (row,) = clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)
    assert row["verdict"] == "broken" and "bomb" in row["why"] and time.time() - start < 2


def test_decisions_do_not_depend_on_the_order(cleaned):
    with open(cleaned[0] / "scan.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = decide(rows, max_mp=0.8)
    for seed in range(20):
        random.Random(seed).shuffle(rows)
        assert decide(rows, max_mp=0.8) == first
    rows = [row for row in rows if row["content"] or row["problem"]]
    for distance, doubled in ((-1, 1), (6, 3)):
        loose = decide(rows, min_side=0, min_sharpness=-np.inf, max_blocks=np.inf, min_quality=0, distance=distance)
        assert {d["verdict"] for d in loose} == {"kept", "broken", "duplicate"}
        assert sum(d["verdict"] == "duplicate" for d in loose) == doubled


def test_the_largest_good_one_of_near_duplicates_stays():
    def row(name, width, **more):
        usual = dict(width=str(width), height="900", hash="00000000000000ff", sharpness="-9", blocks="0.1")
        return dict.fromkeys(room.FIELDS, "") | dict(name=name, format="PNG", content=name) | usual | more
    rows = [row("a", 1000), row("b", 2000, sharpness="-30"), row("c", 1500, hash="00000000000000f0"),
            row("d", 1500, blocks="0.9", content="0"), row("e", 1200, hash="0000000000ffff00")]
    expected = dict(a="duplicate", b="upscaled", c="kept", d="duplicate", e="kept")
    assert {d["name"]: d["verdict"] for d in decide(rows)} == expected


def test_names_by_number(tmp_path):
    for name, seed in (("12 a.png", 0), ("12 b.jpg", 1), ("x 12.png", 2), ("0012_c.png", 3)):
        save(tmp_path / "in" / name, painting(seed), quality=97)
    decisions = clean([tmp_path / "in"], tmp_path / "out", naming="id", log=lambda _: None)
    kept = {d["name"]: d["kept_as"].removeprefix("pictures/") for d in decisions}
    with open(tmp_path / "out/scan.csv", newline="") as file:
        content = {row["name"]: row["content"] for row in csv.DictReader(file)}
    assert kept == {"0/12 a.png": "12.png", "0/12 b.jpg": f"12_{content['0/12 b.jpg']}.jpg", "0/0012_c.png": "0012.png",
                    "0/x 12.png": f"{content['0/x 12.png']}.png"}


def test_a_wrong_ending_is_put_right(tmp_path):
    save(tmp_path / "in" / "a.png", painting(), format="WEBP", lossless=True)
    (row,) = clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)
    assert row["kept_as"].endswith(".webp")


def test_stopped_anywhere_it_goes_on_and_ends_the_same(collection, cleaned, tmp_path, monkeypatch):
    out, examine, seen = tmp_path / "set", room.examine, []

    def stopping(job, max_pixels):
        seen.append(job[1])
        if len(seen) in (5, 12):
            raise KeyboardInterrupt
        return examine(job, max_pixels)

    monkeypatch.setattr(room, "examine", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            clean([collection[0]], out, max_mp=0.8, log=lambda _: None)
        with open(out / "scan.csv", "ab") as file:      # a kill in the middle of a line
            file.write(b"0/small.png,12")
    place, placed = room.place, []

    def stop_placing(*args):
        placed.append(args)
        if len(placed) == 4:
            raise KeyboardInterrupt
        place(*args)

    monkeypatch.setattr(room, "place", stop_placing)
    with pytest.raises(KeyboardInterrupt):
        clean([collection[0]], out, max_mp=0.8, log=lambda _: None)
    clean([collection[0]], out, max_mp=0.8, log=lambda _: None)
    assert tree(out) == tree(cleaned[0])
    broken = [n for n, row in verdicts(out).items() if row["verdict"] == "broken"]
    looked = sorted(n for n in seen if n not in broken)
    assert len(looked) - len(set(looked)) <= 2          # nothing twice but what was being looked at
    lines = (out / "scan.csv").read_text().splitlines()
    assert len(lines) == len(set(lines)) and (out / "scan.csv").read_bytes() == (cleaned[0] / "scan.csv").read_bytes()


def test_workers_find_the_same(collection, cleaned, tmp_path):
    clean([collection[0]], tmp_path / "set", max_mp=0.8, workers=2, log=lambda _: None)
    assert (tmp_path / "set/scan.csv").read_bytes() == (cleaned[0] / "scan.csv").read_bytes()
    assert tree(tmp_path / "set") == tree(cleaned[0])


def test_changes_are_followed_and_strangers_left_alone(tmp_path):
    quiet, out = dict(log=lambda _: None), tmp_path / "set"
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", painting(i))
    (tmp_path / "in/3.png").write_bytes(b"")
    clean([tmp_path / "in"], out, naming="id", **quiet)
    (out / "pictures/mine.txt").write_text("years of work")
    save(tmp_path / "in/0.png", painting(20, 200, 200))             # too small now
    save(tmp_path / "in/3.png", painting(3))                        # repaired
    (tmp_path / "in/1.png").unlink()                                # gone
    save(tmp_path / "in/4.png", painting(4))                        # new
    clean([tmp_path / "in"], out, naming="id", **quiet)
    assert sorted(p.name for p in (out / "pictures").iterdir()) == ["2.png", "3.png", "4.png", "mine.txt"]
    assert not list((out / "quarantine").iterdir())
    clean([tmp_path / "in"], out, naming="id", copy=True, **quiet)
    assert not any(p.is_symlink() for p in (out / "pictures").iterdir())
    assert (out / "pictures/2.png").read_bytes() == (tmp_path / "in/2.png").read_bytes()
    made = (out / "pictures/2.png").stat()
    clean([tmp_path / "in"], out, naming="id", copy=True, **quiet)
    assert (out / "pictures/2.png").stat().st_ino == made.st_ino
    (out / "pictures/5.png").write_text("years of work")
    save(tmp_path / "in/5.png", painting(5))
    with pytest.raises(ValueError, match="5.png is not from here"):
        clean([tmp_path / "in"], out, naming="id", **quiet)
    assert (out / "pictures/5.png").read_text() == "years of work"


def test_copies_of_what_is_not_given_again_stay(tmp_path):
    """They may be the last; links go, as what they led to is elsewhere."""
    for i in range(2):
        save(tmp_path / f"in{i}" / f"{i}.png", painting(i))
    said = []
    clean([tmp_path / "in0"], tmp_path / "links", naming="id", log=said.append)
    clean([tmp_path / "in1"], tmp_path / "links", naming="id", log=said.append)
    assert [p.name for p in (tmp_path / "links/pictures").iterdir()] == ["1.png"] and "1 pictures of an earlier run go" in str(said)
    clean([tmp_path / "in0"], tmp_path / "copies", naming="id", copy=True, log=said.append)
    with pytest.raises(ValueError, match="0.png is a copy of a picture that is not given this time"):
        clean([tmp_path / "in1"], tmp_path / "copies", naming="id", copy=True, log=said.append)
    assert [p.name for p in (tmp_path / "copies/pictures").iterdir()] == ["0.png"]
    save(tmp_path / "in2/0 of another board.png", painting(2))
    content = (tmp_path / "copies/pictures/0.png").read_bytes()
    with pytest.raises(ValueError, match="0.png is a copy of a picture that is not given this time"):
        clean([tmp_path / "in2"], tmp_path / "copies", naming="id", copy=True, log=said.append)
    assert (tmp_path / "copies/pictures/0.png").read_bytes() == content
    (tmp_path / "in0/0.png").rename(tmp_path / "in0/0 renamed.png")
    clean([tmp_path / "in0"], tmp_path / "copies", naming="id", copy=True, log=said.append)
    for i in range(2):          # under one name
        save(tmp_path / f"same{i}" / "a.png", painting(i))
    clean([tmp_path / "same0"], tmp_path / "hashed", copy=True, log=said.append)
    only, = (tmp_path / "hashed/pictures").iterdir()
    with pytest.raises(ValueError, match="perhaps the last"):
        clean([tmp_path / "same1"], tmp_path / "hashed", copy=True, log=said.append)
    assert only.exists()


def broken(job):
    raise MemoryError("boom") if job == 2 else ValueError("bang")


@pytest.mark.parametrize("job, kind", ((2, MemoryError), (3, ValueError)))
def test_what_a_worker_raises_ends_the_command(job, kind):
    """It was raised in the worker; the message came, and the process hung at its end on workers that nobody had told."""
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(Path(room.__file__).parent), str(Path(__file__).parent)]!r}
        import clean, test_clean
        try:
            for _ in clean.in_parallel(test_clean.broken, [{job}] * 20, 2, "breaking"):
                pass
        except {kind.__name__} as e:
            print("caught", e)
        """)
    p = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert p.returncode == 0 and p.stdout.strip() == f"caught {'boom' if job == 2 else 'bang'}", p.stderr


def test_a_disk_without_locks(tmp_path, monkeypatch):
    import fcntl

    def refuses(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "lockf", refuses)
    with room.alone(tmp_path / "a") as file:
        file.write(b"x")


@pytest.mark.parametrize("table", ("my,own,file\n1,2,3\n", "name,price\nlamp,7\n", "name\nlamp\n", "\nmy,own\n1,2\n"))
@pytest.mark.parametrize("name", ("scan.csv", "report.csv"))
def test_a_strangers_table_is_left_alone(tmp_path, name, table):
    save(tmp_path / "in/a.png", painting())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(table)
    with pytest.raises(ValueError, match=f"{name} is not from here"):
        clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)
    assert (tmp_path / "out" / name).read_text() == table


@pytest.mark.parametrize("copy", (False, True))
def test_what_was_edited_among_the_pictures_stays(tmp_path, copy):
    """An editor that renames its result over the file makes a file of the link."""
    source, out = save(tmp_path / "in/1.png", painting(1)), tmp_path / "set"
    os.utime(source, (1e9, 1e9))
    (tmp_path / "in/2.png").write_bytes(b"broken")
    os.utime(tmp_path / "in/2.png", (1e9, 1e9))
    clean([tmp_path / "in"], out, naming="id", copy=copy, log=lambda _: None)
    edited = [out / "pictures/1.png", *(out / "quarantine").iterdir()]
    for path in edited:
        content = save(tmp_path / "edited.png", painting(2)).read_bytes()
        before = tree(out)
        os.replace(tmp_path / "edited.png", path)
        for copying in (False, True):
            with pytest.raises(ValueError, match="edited since"):
                clean([tmp_path / "in"], out, naming="id", copy=copying, log=lambda _: None)
        assert tree(out) == before | {str(path.relative_to(out)): content}
        path.unlink()
        clean([tmp_path / "in"], out, naming="id", copy=copy, log=lambda _: None)
        assert tree(out) == before
    for n in range(2):      # a picture that itself has changed is followed
        save(source, painting(3 + n))
        os.utime(source, (1e9 - n, 1e9 - n))
        clean([tmp_path / "in"], out, naming="id", copy=copy, log=lambda _: None)
        assert (out / "pictures/1.png").read_bytes() == source.read_bytes()


def test_users_mistakes(tmp_path, monkeypatch):
    save(tmp_path / "in/a.png", painting())
    (tmp_path / "none").mkdir()
    for folder, out, words in (("in", "in", "folder of the pictures themselves"), ("none", "out", "no picture in"),
                               ("absent", "out", "no such file"), ("out/pictures", "out", "where the results go")):
        with pytest.raises(ValueError, match=words) as caught:
            (tmp_path / "out/pictures").mkdir(parents=True, exist_ok=True)
            clean([tmp_path / folder], tmp_path / out, log=lambda _: None)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="-1 to 7"):
        clean([tmp_path / "in"], tmp_path / "out", distance=8)
    clean([tmp_path / "in"], tmp_path / "in/deeper/set", log=lambda _: None)
    assert len(clean([tmp_path / "in"], tmp_path / "in/deeper/set", log=lambda _: None)) == 1     # its own are no input
    locked, scandir = tmp_path / "in/locked", os.scandir
    locked.mkdir()

    def refusing(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refusing)        # (root may read everything)
    with pytest.raises(ValueError, match="locked: Permission denied"):
        clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)


def test_full_disk_is_one_line_and_the_rest_is_done_later(tmp_path):
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", painting(i))
    arguments = ["clean", str(tmp_path / "in"), "-o", str(tmp_path / "set"), "--copy", "--workers", "0"]
    line = [sys.executable, str(HERE / "data.py"), *arguments]
    full = subprocess.run(["bash", "-c", 'ulimit -f 8; "$0" "$@"', *line], capture_output=True, text=True)
    assert full.returncode == 2 and full.stderr.startswith("error: cannot write") and full.stderr.count("\n") == 1
    assert not [p for p in (tmp_path / "set").rglob("*.part")]
    clean([tmp_path / "in"], tmp_path / "set", copy=True, log=lambda _: None)
    assert len(list((tmp_path / "set/pictures").iterdir())) == 3


def test_two_at_once_wait_for_each_other(tmp_path):
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import clean\n"
            "with clean.alone(sys.argv[2]) as file:\n    print('in', flush=True); time.sleep(1); file.write(b'done')")
    other = subprocess.Popen([sys.executable, "-c", code, HERE, tmp_path / "a"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with room.alone(tmp_path / "a") as file:
        file.seek(0)
        assert file.read() == b"done"
    other.wait()
    # One that was removed while we waited is not taken for the new one.
    with room.alone(tmp_path / "b") as file:
        (tmp_path / "b").unlink()
        with room.alone(tmp_path / "b") as again:
            assert not os.path.samestat(os.fstat(file.fileno()), os.fstat(again.fileno()))
    assert threading.active_count() < 20


# ---- smaller copies

def test_copies_are_smaller_antialiased_and_named(tmp_path):
    save(tmp_path / "in/sub/wide 壁.webp", painting(0, 600, 901), lossless=True)
    checker = np.indices((450, 450)).sum(0) % 2 * 255
    save(tmp_path / "in/checker.png", np.uint8(checker))
    save(tmp_path / "in/small.png", painting(1, 200, 250))
    (tmp_path / "in/broken.png").write_text("no")
    said = []
    assert multiscale([tmp_path / "in"], tmp_path / "out", log=said.append) == 4 + 4 + 1
    sizes = {p.relative_to(tmp_path / "out").as_posix(): Image.open(p).size for p in (tmp_path / "out").rglob("*.png")}
    assert sizes == {"sub/wide 壁_075.png": (676, 450), "sub/wide 壁_050.png": (450, 300),
                     "sub/wide 壁_033.png": (300, 200), "sub/wide 壁_400.png": (601, 400),
                     "checker_075.png": (338, 338), "checker_050.png": (225, 225),
                     "checker_033.png": (150, 150), "checker_400.png": (400, 400), "small_075.png": (188, 150)}
    for name in ("050", "033"):
        flat = np.asarray(Image.open(tmp_path / "out" / f"checker_{name}.png")).astype(int)[9:-9, 9:-9]
        assert np.abs(flat - 127.5).max() < 12, name           # every other pixel would be black or white
    half = np.asarray(Image.open(tmp_path / "out/sub/wide 壁_050.png")).astype(int)
    boxes = painting(0, 600, 901)[:, :900].reshape(300, 2, 450, 2, 3).mean((1, 3))
    assert np.abs(half - boxes).mean() < 8
    assert "broken.png" in said[0] and "9 copies made of 4" in said[-1]
    (tmp_path / "in/checker.png").unlink()          # as clean does with what a stricter rule drops
    assert multiscale([tmp_path / "in"], tmp_path / "out", log=said.append) == 0
    assert "4 pictures" in said[-1] and "copies of none of these" in said[-1] and "checker_" in said[-1]


def test_copies_of_pictures_with_names_as_long_as_they_may_be(tmp_path):
    for last in "ab":
        save(tmp_path / "in" / ("壁" * 80 + f"{last}.png"), painting(0, 200, 200))      # 240 bytes and 5, of 255
    assert multiscale(tmp_path / "in", tmp_path / "out", log=lambda _: None) == 2
    assert multiscale(tmp_path / "in", tmp_path / "out", log=lambda _: None) == 0
    assert all(p.name.startswith("壁" * 40) and p.name.endswith("_075.png") for p in (tmp_path / "out").iterdir())


def test_copies_are_made_once_and_after_changes_again(tmp_path):
    quiet = dict(log=lambda _: None)
    source = save(tmp_path / "in/a.png", painting(0, 500, 500))
    os.utime(source, ns=(10 ** 18, 10 ** 18))
    assert multiscale([tmp_path / "in"], tmp_path / "in/smaller", **quiet) == 4
    (tmp_path / "in/smaller/a_050.png").unlink()                    # as if it had been killed
    kept = (tmp_path / "in/smaller/a_075.png").stat().st_ino
    assert multiscale([tmp_path / "in"], tmp_path / "in/smaller", **quiet) == 1
    assert (tmp_path / "in/smaller/a_075.png").stat().st_ino == kept
    save(source, painting(1, 500, 500))
    os.utime(source, ns=(2 * 10 ** 18, 2 * 10 ** 18))
    assert multiscale([tmp_path / "in"], tmp_path / "in/smaller", workers=2, **quiet) == 4
    os.utime(save(tmp_path / "older.png", painting(3, 500, 500)), ns=(10 ** 18, 10 ** 18))
    os.utime(source, ns=(10 ** 18, 10 ** 18))
    multiscale([tmp_path / "in"], tmp_path / "in/smaller", **quiet)
    os.replace(tmp_path / "older.png", source)
    tick = os.lstat(source).st_ctime_ns             # a copy of the old one, made within the same tick of the clock
    os.utime(tmp_path / "in/smaller/a_400.png", ns=(tick, tick))
    time.sleep(0.05)
    assert multiscale([tmp_path / "in"], tmp_path / "in/smaller", **quiet) == 4
    assert multiscale([tmp_path / "in"], tmp_path / "in/smaller", **quiet) == 0
    source.unlink()
    source.symlink_to(os.fspath(tmp_path / "other.png"))
    os.utime(save(tmp_path / "other.png", painting(4, 500, 500)), ns=(10 ** 18, 10 ** 18))
    assert multiscale([tmp_path / "in"], tmp_path / "in/smaller", **quiet) == 4
    save(tmp_path / "in/a.webp", painting(2, 500, 500))
    with pytest.raises(ValueError, match="copies of the same name"):
        multiscale([tmp_path / "in"], tmp_path / "in/smaller", **quiet)


def test_copies_keep_transparency_and_follow_profiles(tmp_path):
    clear = np.zeros((400, 400, 4), np.uint8)
    clear[:, 201:] = 200, 100, 50, 255              # behind the transparent half lies black, which must not show
    save(tmp_path / "in/clear.png", clear)
    save(tmp_path / "in/linear.png", np.full((400, 400, 3), 60, np.uint8), icc_profile=linear_profile())
    multiscale([tmp_path / "in"], tmp_path / "out", log=lambda _: None)
    half = np.asarray(Image.open(tmp_path / "out/clear_050.png"))
    assert half.shape == (200, 200, 4) and (half[:, :90, 3] == 0).all() and (half[:, 110:, 3] == 255).all()
    edge = half[..., :3][half[..., 3] > 20].astype(int)
    assert np.abs(edge - (200, 100, 50)).max() <= 20
    linear = Image.open(tmp_path / "out/linear_050.png")
    assert "icc_profile" not in linear.info and abs(int(np.asarray(linear)[5, 5, 0]) - encoded(60)) < 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_workers_of_a_killed_process_end(tmp_path):
    """Also those whose results, larger than a pipe takes, nobody fetches any more."""
    code = """
        import sys, time; import numpy as np; from clean import in_parallel
        def made(job): return np.zeros(1 << 22, np.uint8)
        for job, result in in_parallel(made, list(range(100)), 2, "making"):
            time.sleep(0.5); print("one", flush=True); time.sleep(100)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "one\n"
    workers = [int(pid) for task in Path(f"/proc/{process.pid}/task").iterdir()
               for pid in (task / "children").read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.wait()
    until = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < until:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_nothing_lies_in_pictures_that_the_report_does_not_name(tmp_path, monkeypatch):
    """Wherever it is stopped, or the next run would take it for a stranger's."""
    for i in range(2):
        save(tmp_path / "in" / f"{i}.png", painting(i))
    clean([tmp_path / "in"], tmp_path / "out", naming="id", log=lambda _: None)
    unlink = Path.unlink

    def stopped(path, **how):
        if path.parent.name == "pictures" and path.suffix == ".png":
            raise KeyboardInterrupt
        unlink(path, **how)
    monkeypatch.setattr(Path, "unlink", stopped)
    with pytest.raises(KeyboardInterrupt):
        clean([tmp_path / "in/1.png"], tmp_path / "out", naming="id", log=lambda _: None)
    named = {row["kept_as"] for row in verdicts(tmp_path / "out").values()}
    assert {f"pictures/{p.name}" for p in (tmp_path / "out/pictures").iterdir()} <= named


def deaf(_):
    return [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == [signal.SIG_IGN] * 2


def test_workers_leave_ctrl_c_to_the_main_process():
    assert [result for _, result in room.in_parallel(deaf, [0], 1, "listening")] == [True]


def test_what_cannot_be_read_need_not_be_put_apart(tmp_path, monkeypatch):
    save(tmp_path / "in/a.png", painting())
    (tmp_path / "in/b.png").write_bytes(b"")
    place, refused = room.place, "quarantine"

    def refusing(source, target, copy):
        if target.parent.name == refused:
            raise PermissionError(13, "Permission denied")
        place(source, target, copy)
    monkeypatch.setattr(room, "place", refusing)
    assert len(clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)) == 2
    refused = "pictures"
    with pytest.raises(PermissionError):
        clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)


def test_links_follow_a_folder_that_was_moved(tmp_path):
    save(tmp_path / "in/a.png", painting())
    for folder in ("b", "c"):       # two of one name
        (tmp_path / "in" / folder).mkdir()
        (tmp_path / "in" / folder / "broken.png").write_bytes(folder.encode())
    clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)
    (tmp_path / "in").rename(tmp_path / "moved")
    (row, *broken) = clean([tmp_path / "moved"], tmp_path / "out", log=lambda _: None)
    assert os.readlink(tmp_path / "out" / row["kept_as"]) == str(tmp_path / "moved/a.png")
    assert {p.read_text() for p in (tmp_path / "out/quarantine").iterdir()} == {"b", "c"}


def test_a_table_of_an_older_version_is_begun_anew(tmp_path):
    save(tmp_path / "in/a.png", painting())
    clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)
    table = tmp_path / "out/scan.csv"
    whole = table.read_bytes()
    table.write_bytes(b"name,bytes,animated\n0/a.png,1,2\n")
    clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)
    assert table.read_bytes() == whole
    table.write_bytes(whole + b'0/x,"' + b"x" * 200000 + b"\n")
    with pytest.raises(ValueError, match="scan.csv is damaged"):
        clean([tmp_path / "in"], tmp_path / "out", log=lambda _: None)


def test_what_transparency_hides_does_not_count(tmp_path):
    path = save(tmp_path / "a.png", np.dstack([painting(), np.zeros((320, 384), np.uint8)]))
    assert room.examine((path, "a"))["sharpness"] == ""
    plain = {room.perceptual_hash(np.full((300, 300, 3), v, np.uint8)) for v in (1, 77, 130, 254, 255)}
    assert len(plain) == 1          # and no rounding error is a feature
