"""data.py: packing unusual folders, pairs, exact batches, and the command."""
import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clean
import data
import degrade
import images
from test_clean import encode_srgb, linear_profile

ROOT = Path(__file__).parent.parent
QUIET = {"log": lambda _: None, "workers": 0}


def noise(h, w, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, channels), np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path, **options)
    return path


def patches_of(path):
    return data.open_patch_file(path)[1]["patches"]


def pack(folders, out, size=64, min_side=32, **options):
    return data.pack(folders, out, size, min_side=min_side, **(QUIET | options))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    save(folder / "plain one.png", noise(100, 150))
    save(folder / "深い/壁紙 その1.png", noise(64, 64))
    save(folder / "photo.JPG", noise(70, 90), format="JPEG")
    save(folder / "web.webp", noise(64, 65), lossless=True)
    save(folder / "gray.png", noise(80, 64, 1))
    Image.fromarray(noise(64, 70)).quantize(16).save(folder / "palette.png")
    Image.fromarray(noise(64, 70, 4), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray((noise(64, 64, 1).squeeze().astype(np.uint16) * 257)).save(folder / "deep.png")
    save(folder / "small.png", noise(40, 200))
    save(folder / "tiny.png", noise(31, 200))
    clear = noise(64, 64, 4)
    clear[..., 3] = 0
    save(folder / "clear.png", clear)
    save(folder / "clear too.png", clear)
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    whole = save(folder / "cut.png", noise(90, 90)).read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    (folder / "notes.txt").write_text("not a picture file")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    return folder


@pytest.fixture(scope="module")
def packed(zoo, tmp_path_factory):
    lines = []
    out = pack([zoo], tmp_path_factory.mktemp("packed") / "p.safetensors", log=lines.append)
    return out, lines


# ------------------------------------------------------------------ packing

def test_pack_reads_the_zoo(packed):
    out, lines = packed
    tensors = load_file(out)            # the public library reads our header
    n = 6 + 1 + 4 + 2 + 2 + 2 + 2 + 1 + 4 + 2       # 2x3, 1, 2x2, 1x2, 2x1, 1x2, 1x2, 1, 1x4, and twice 1
    assert tensors["patches"].shape == (n, 64, 64, 3) and tensors["patches"].dtype == torch.uint8
    assert len(tensors["picture"].unique()) == 11 and "11 pictures" in lines[-1]
    skipped = [line for line in lines if line.startswith("skipped")]
    for name in ("text.jpg", "empty.png", "cut.png", "dangling.png", "tiny.png"):
        assert sum(name in line for line in skipped) == 1
    assert len(skipped) == 5 and [p.name for p in out.parent.iterdir()] == ["p.safetensors"]


def test_pack_keeps_every_pixel(tmp_path):
    pixels = noise(150, 210)
    save(tmp_path / "in" / "a.png", pixels)
    patches = load_file(pack(tmp_path / "in", tmp_path / "p.safetensors"))["patches"].numpy()
    assert len(patches) == 3 * 4
    ys, xs = np.linspace(0, 150 - 64, 3).round().astype(int), np.linspace(0, 210 - 64, 4).round().astype(int)
    again = np.zeros_like(pixels)
    for patch, (y, x) in zip(patches, [(y, x) for y in ys for x in xs]):
        again[y:y + 64, x:x + 64] = patch
    assert (again == pixels).all()


def test_small_pictures_are_extended_by_reflection(tmp_path):
    pixels = noise(40, 50)
    save(tmp_path / "in" / "a.png", pixels)
    patch = load_file(pack(tmp_path / "in", tmp_path / "p.safetensors"))["patches"].numpy()[0]
    assert (patch[:40, :50] == pixels).all()
    assert (patch[40:64, :50] == pixels[:15:-1]).all() and (patch[:40, 50:64] == pixels[:, :35:-1]).all()


def test_patches_are_rounded_to_8_bit():
    rgb = torch.tensor([100.4, 100.6, 255.0]).reshape(3, 1, 1).expand(3, 8, 8) / 255
    assert data.cut_patches(rgb, 8)[0, 0, 0].tolist() == [100, 101, 255]


def test_transparent_areas_become_white(tmp_path):
    pixels = noise(64, 64, 4)
    pixels[..., 3] = 0
    save(tmp_path / "in" / "a.png", pixels)
    assert (load_file(pack(tmp_path / "in", tmp_path / "p.safetensors"))["patches"] == 255).all()


def test_a_patch_file_is_reused_or_rebuilt(tmp_path):
    lines, one = [], save(tmp_path / "in" / "a.png", noise(64, 64))
    out = pack(tmp_path / "in", tmp_path / "p.safetensors")
    inode = out.stat().st_ino
    pack(tmp_path / "in", out, log=lines.append)
    assert out.stat().st_ino == inode and "already" in lines[-1]
    save(tmp_path / "in" / "b.png", noise(64, 64, seed=1))                          # a new picture
    pack(tmp_path / "in", out)
    assert len(patches_of(out)) == 2
    save(one, noise(64, 64, seed=2))                                                # a changed picture
    os.utime(one, ns=(1, 1))
    pack(tmp_path / "in", out)
    assert (load_file(out)["patches"][0].numpy() == noise(64, 64, seed=2)).all()
    pack(tmp_path / "in", out, size=32)                                             # another size
    assert patches_of(out).shape == (8, 32, 32, 3)
    (tmp_path / "in").rename(tmp_path / "elsewhere")                                # a moved folder is the same
    pack(tmp_path / "elsewhere", out, size=32, log=lines.append)
    assert "already" in lines[-1]
    pack(tmp_path / "elsewhere", out, size=32, without=[tmp_path / "elsewhere/a.png"])
    assert len(patches_of(out)) == 4


def test_folders_without_usable_pictures(tmp_path):
    (tmp_path / "none").mkdir()
    save(tmp_path / "tiny" / "a.png", noise(8, 8))
    for folder in ("none", "tiny", "absent"):
        with pytest.raises(images.UserError) as caught:
            pack(tmp_path / folder, tmp_path / "p.safetensors")
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none", "tiny"]


def test_workers_pack_the_same(zoo, packed, tmp_path):
    assert pack([zoo], tmp_path / "p.safetensors", workers=2).read_bytes() == packed[0].read_bytes()


def test_an_interrupted_pack_leaves_no_file(zoo, packed, tmp_path, monkeypatch):
    count, read = [], images.read_picture

    def stop_at_fifth(path, srgb):
        count.append(path)
        if len(count) == 5:
            raise KeyboardInterrupt
        return read(path, srgb)
    monkeypatch.setattr(images, "read_picture", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        pack([zoo], tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert pack([zoo], tmp_path / "p.safetensors").read_bytes() == packed[0].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_two_packs_at_once_do_not_mix(zoo, packed, tmp_path, monkeypatch):
    out, read = tmp_path / "p.safetensors", images.read_picture

    def read_and_pack_again(path, srgb):
        monkeypatch.setattr(images, "read_picture", read)
        pack([zoo], out)
        return read(path, srgb)
    monkeypatch.setattr(images, "read_picture", read_and_pack_again)
    assert pack([zoo], out, overwrite=True).read_bytes() == packed[0].read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_profiles_and_animations(tmp_path):
    pixels = noise(64, 64)
    save(tmp_path / "in" / "a.png", pixels, icc_profile=linear_profile())
    frames = [Image.fromarray(noise(64, 64, seed=i)) for i in (1, 2)]
    frames[0].save(tmp_path / "in" / "b.webp", save_all=True, append_images=frames[1:], lossless=True)
    lines = []
    patches = load_file(pack(tmp_path / "in", tmp_path / "p.safetensors", log=lines.append))["patches"].numpy()
    assert np.abs(patches[0] - encode_srgb(pixels)).max() <= 1.5 and (patches[1] == noise(64, 64, seed=1)).all()
    assert "b.webp" in lines[0] and "2 frames" in lines[0]


def test_another_kind_of_file_is_left_alone(tmp_path):
    save(tmp_path / "in" / "a.png", noise(64, 64))
    out = tmp_path / "thesis.txt"
    out.write_text("years of work")
    with pytest.raises(images.UserError, match="thesis.txt"):
        pack(tmp_path / "in", out)
    assert out.read_text() == "years of work"
    pack(tmp_path / "in", out, overwrite=True)
    assert len(patches_of(out)) == 1


def test_the_header_holds_long_names(tmp_path):
    for i in range(40):
        (tmp_path / ("🎨" * 50 + f"{i}.png")).write_bytes(b"")
    (tmp_path / os.fsdecode(b"broken \xff.png")).write_bytes(b"")
    save(tmp_path / "a.png", noise(32, 32))
    out = pack(tmp_path, tmp_path / "p.safetensors", size=32)
    assert (load_file(out)["patches"][0].numpy() == noise(32, 32)).all()


# ------------------------------------------------------------------ pictures set aside for validation

def test_hold_out_takes_the_most_detailed_square_of_the_same_pictures(tmp_path):
    for i in range(30):
        pixels = np.full((100, 100, 3), 8 * i, np.uint8)
        pixels[40:, 60:] = noise(60, 40, seed=i)
        save(tmp_path / f"in/{i % 3}/{i}.png", pixels)
    (tmp_path / "in/0/bad.png").write_bytes(b"no picture")
    folder, held = data.hold_out([tmp_path / "in"], tmp_path / "p", side=50)
    assert len(held) == 3 and data.hold_out([tmp_path / "in"], tmp_path / "p", side=50) == (folder, held)
    for i, path in enumerate(held):
        assert np.array_equal(np.asarray(Image.open(folder / f"{i}.png")), np.asarray(Image.open(path))[50:, 50:])
    assert data.hold_out([tmp_path / "in"], tmp_path / "p", count=2)[1] == held[:2]
    out = pack([tmp_path / "in"], tmp_path / "p.safetensors", without=held)
    names = set(data.open_patch_file(out)[1]["names"].tobytes().decode().split())
    assert len(names) == 27 and not names & {f"0/{p.relative_to(tmp_path / 'in').as_posix()}" for p in held}
    with pytest.raises(images.UserError, match="--val"):
        data.hold_out([tmp_path / "in/1"], tmp_path / "p", count=0)


def test_hold_out_takes_smaller_copies_too_but_no_icons(tmp_path):
    for i in range(20):
        save(tmp_path / f"in/{i}.png", noise(300, 300, seed=i))
        save(tmp_path / f"in/icon {i}.png", noise(40, 40))
    clean.multiscale(tmp_path / "in", tmp_path / "smaller", **QUIET)
    for folders in ([tmp_path / "in", tmp_path / "smaller"], [tmp_path / "smaller", tmp_path / "in"]):
        held = data.hold_out(folders, tmp_path / "p")[1]
        whole = [p for p in held if p.parent.name == "in"]
        assert len(whole) == 4 and not any("icon" in p.name for p in held)
        assert {p.stem for p in held} == {p.stem + end for p in whole for end in ("", "_075", "_050")}


# ------------------------------------------------------------------ pairs

def make_lr(zoo, folder, scale=2):
    """Copy the readable pictures of the zoo to folder/hr, and make them `scale` times smaller in folder/lr."""
    for path in images.find_pictures([zoo]):
        with contextlib.suppress(images.PictureError):
            picture = images.read_picture(path)
            h, w = (side // scale for side in picture.rgb.shape[1:])
            small = degrade.resize(picture.rgb[None, :, :h * scale, :w * scale], (h, w), "area")
            name = path.relative_to(zoo)
            target = (folder / "lr" / name).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / "hr" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "hr" / name).symlink_to(path)
            images.save_picture(target, images.Picture(small[0]))
    return folder / "hr", folder / "lr"


@pytest.mark.parametrize("scale", [2, 4])
def test_pairs_stay_aligned(zoo, tmp_path, scale):
    """Each LR pixel is the mean of scale x scale HR pixels, so every crop shows whether it has the right LR."""
    (hr, lr), lines = make_lr(zoo, tmp_path, scale), []
    save(lr / "plain one.png", noise(30, 30))                            # a wrong size
    out = pack([hr], tmp_path / "p.safetensors", lr_dir=[lr], log=lines.append)
    tensors, metadata = load_file(out), data.open_patch_file(out)[0]
    assert tensors["lr"].shape == (len(tensors["patches"]), 64 // scale, 64 // scale, 3)
    assert metadata["scale"] == str(scale) and any("30x30" in line for line in lines)
    means = tensors["patches"].float().reshape(-1, 64 // scale, scale, 64 // scale, scale, 3).mean((2, 4))
    names = tensors["names"].numpy().tobytes().decode().split("\n")
    opaque = [k for k, p in enumerate(tensors["picture"].tolist()) if "clear" not in names[p]]
    assert len(opaque) > 10 and (means - tensors["lr"].float())[opaque].abs().max() < 0.51
    for candidates in (1, 2):
        batches = data.Batches(out, 4, 8, 32 // scale, scale, "no such recipe", 0, candidates)
        for lr, hr in (batches[i] for i in range(4)):
            difference = (torch.nn.functional.avg_pool2d(hr, scale) - lr).abs().flatten(1).max(1)[0]
            assert lr.shape == (8, 3, 32 // scale, 32 // scale)
            assert (difference < 0.51 / 255).sum() >= 4          # the others are transparent
    with pytest.raises(images.UserError, match=f"scale {scale}"):
        data.Batches(out, 6, 8, 8, 3, "bicubic", 0)


def test_pairs_share_background_profile_and_orientation(tmp_path):
    transparent = np.full((64, 64, 4), 200, np.uint8)
    transparent[:, :32, 3], transparent[:, 32:, 3] = 0, 255
    save(tmp_path / "hr/clear.png", transparent)
    white = np.full((32, 32, 3), 255, np.uint8)
    white[:, 16:] = 200
    save(tmp_path / "lr/clear.png", white)
    profile = linear_profile(gray=True)
    for folder, side in (("hr", 64), ("lr", 32)):
        picture = images.Picture(torch.full((3, side, side), 0.3), icc=profile, gray=True)
        images.save_picture(tmp_path / folder / "linear.png", picture)
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = np.zeros((side, 2 * side, 3), np.uint8)
        pixels[:, :side] = 200
        save(tmp_path / folder / "turned.png", pixels, exif=exif.tobytes())
    out = load_file(pack(tmp_path / "hr", tmp_path / "p.safetensors", lr_dir=tmp_path / "lr"))
    for hr, lr in zip(out["patches"].float(), out["lr"].float()):
        for x in (4, 28):
            assert (hr[32, 2 * x] - lr[16, x]).abs().max() <= 1
    assert out["patches"][0, 0, 0].tolist() == [255] * 3 and out["patches"][1, 0, 0, 0] > 130
    assert len(out["patches"]) == 4 and out["patches"][2].min() == 200 and out["patches"][3].max() == 0


def test_lr_names(tmp_path):
    save(tmp_path / "hr/0001.png", noise(64, 64))
    save(tmp_path / "hr/caf\u00e9.png", noise(64, 64))
    save(tmp_path / "lr/0001x2.png", noise(32, 32))         # as in DIV2K
    save(tmp_path / "lr/cafe\u0301.webp", noise(32, 32))    # another encoding of the same name
    assert len(load_file(pack(tmp_path / "hr", tmp_path / "p.safetensors", lr_dir=tmp_path / "lr"))["lr"]) == 2
    save(tmp_path / "hr/lonely.png", noise(64, 64))
    with pytest.raises(images.UserError, match="lonely"):
        pack(tmp_path / "hr", tmp_path / "q.safetensors", lr_dir=tmp_path / "lr")
    with pytest.raises(images.UserError, match="--lr-dir"):
        pack([tmp_path / "hr", tmp_path / "lr"], tmp_path / "q.safetensors", lr_dir=tmp_path / "lr")
    with pytest.raises(images.UserError, match="multiple"):
        (tmp_path / "hr/lonely.png").unlink()
        pack(tmp_path / "hr", tmp_path / "q.safetensors", size=63, lr_dir=tmp_path / "lr")
    assert not (tmp_path / "q.safetensors").exists()


def test_pairs_mix_with_other_files(zoo, packed, tmp_path):
    hr, lr = make_lr(zoo, tmp_path)
    for path in lr.rglob("*.png"):
        save(path, np.zeros_like(np.asarray(Image.open(path).convert("RGB"))))
    black = pack([hr], tmp_path / "p.safetensors", lr_dir=[lr])
    batches, shares = data.Batches([packed[0], black], 12, 10, 16, 2, "web", 0, 1, shares=(0.7, 0.3)), []
    for lr, hr in (batches[i] for i in range(12)):
        dark = lr.flatten(1).max(1)[0] == 0
        shares.append(dark.float().mean().item())
        expected = degrade.degrade(hr, "bicubic", 2, [0] * 10)
        assert ((lr - expected).abs().flatten(1).mean(1)[~dark] < 0.15).all()
    assert 0.15 < np.mean(shares) < 0.45


# ------------------------------------------------------------------ batches

def make_batches(out, steps=6, batch=5, patch=16, recipe="web", seed=3, **options):
    return data.Batches(out, steps, batch, patch, 2, recipe, seed, **({"crop_candidates": 1} | options))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x, y))


def test_batches_are_the_same_with_any_workers_and_after_a_restart(packed):
    batches = make_batches(packed[0])
    direct = [batches[i] for i in range(6)]
    lr, hr = direct[0]
    assert lr.shape == (5, 3, 16, 16) and hr.shape == (5, 3, 32, 32) and lr.dtype == hr.dtype == torch.float32
    assert hr.is_contiguous() and 0 <= hr.min() and hr.max() <= 1 and 0 <= lr.min() and lr.max() <= 1
    assert same(direct, list(data.make_loader(make_batches(packed[0]), 0, 0)))
    assert same(direct[4:], list(data.make_loader(make_batches(packed[0]), 4, 2)))
    assert not same(direct, [make_batches(packed[0], seed=4)[i] for i in range(6)])
    assert not torch.equal(direct[0][1], direct[1][1])
    with pytest.raises(IndexError):
        batches[6]


def test_batches_do_not_change_between_versions(tmp_path):
    """A run must continue with the same batches after an update. The hashes are those of the first release."""
    for i in range(3):
        save(tmp_path / f"in/{i}.png", noise(64, 96, seed=i))
    out = pack(tmp_path / "in", tmp_path / "p.safetensors")
    hashes = []
    for options in ({}, {"crop_candidates": 3, "patch": (8, 16)}, {"shares": (0.4, 0.6), "rank": 1, "ranks": 2}):
        files = [out, out] if "shares" in options else out
        _, hr = make_batches(files, recipe="bicubic", **options)[4]
        hashes.append(hashlib.sha256(hr.numpy().tobytes()).hexdigest()[:16])
    assert hashes == ["1776f9464bc94411", "538b38c9915a3fec", "7a9d0bf0667ee159"]


def test_pickled_batches_hold_no_patches(packed):
    batches = make_batches(packed[0])
    first = batches[0]
    pickled = pickle.dumps(batches)
    assert len(pickled) < 5000 and same([first], [pickle.loads(pickled)[0]])


def test_every_patch_is_equally_likely(tmp_path):
    files = []
    for k, count in enumerate((3, 4)):      # each picture has a color of its own
        for i in range(count):
            save(tmp_path / str(k) / f"{i}.png", np.full((32, 32, 3), 10 * (3 * k + i) + 5, np.uint8))
        files.append(pack(tmp_path / str(k), tmp_path / f"{k}.safetensors", size=32))
    batches = make_batches(files, 20, 35, recipe="bicubic")
    colors = torch.cat([batches[i][1][:, 0, 0, 0] for i in range(20)]).mul(255).round().int()
    values, counts = colors.unique(return_counts=True)
    assert values.tolist() == [5, 15, 25, 35, 45, 55, 65] and 65 < counts.min() and counts.max() < 140     # 100 each


def test_crops_are_exact_and_have_all_orientations(tmp_path):
    pixels = noise(40, 40)
    save(tmp_path / "in" / "a.png", pixels)
    batches = make_batches(pack(tmp_path / "in", tmp_path / "p.safetensors", size=40), 20, 8, recipe="bicubic")
    orientations, corners = set(), set()
    turned = [np.rot90(pixels, k)[:, ::f] for k in range(4) for f in (1, -1)]
    index = [{np.ascontiguousarray(t[y, x:x + 4]).tobytes(): (y, x) for y in range(9) for x in range(9)}
             for t in turned]
    for lr, hr in (batches[i] for i in range(20)):
        assert torch.equal(lr, degrade.degrade(hr, "bicubic", 2, [0] * 8))
        for crop in (hr.permute(0, 2, 3, 1) * 255).round().byte().numpy():
            key = crop[0, :4].tobytes()
            k = next(k for k, corner_of in enumerate(index) if key in corner_of)
            y, x = index[k][key]
            assert (turned[k][y:y + 32, x:x + 32] == crop).all()
            orientations.add(k)
            corners.add((y, x))
    assert len(orientations) == 8 and len(corners) > 40 and {y for y, _ in corners} == set(range(9))


def test_broken_patch_files(packed, tmp_path):
    whole = packed[0].read_bytes()
    contents = {"short": whole[:-5], "head": whole[:100], "empty": b"", "text": b"hello, hello",
                "list": (2).to_bytes(8, "little") + b"[]"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(images.UserError, match=name):
            make_batches(tmp_path / name)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(images.UserError, match="cannot read"):
            data.open_patch_file(path)
    with pytest.raises(images.UserError, match="larger --size"):
        make_batches(packed[0], patch=48)


def test_ranks_share_one_batch(packed):
    whole = make_batches(packed[0], 3, 6, crop_candidates=2)
    parts = [make_batches(packed[0], 3, 2, crop_candidates=2, rank=r, ranks=3) for r in range(3)]
    for step in range(3):
        joined = tuple(map(torch.cat, zip(*(part[step] for part in parts))))
        assert same([whole[step]], [joined])


def test_crop_candidates_prefer_detail(tmp_path):
    flat, busy = np.full((64, 64, 3), 200, np.uint8), noise(64, 64)
    for i, pixels in enumerate((flat, flat, flat, busy)):
        save(tmp_path / "in" / f"{i}.png", pixels)
    out = pack(tmp_path / "in", tmp_path / "p.safetensors")

    def busy_share(n):
        batches = make_batches(out, 200, 16, recipe="bicubic", crop_candidates=n)
        return np.mean([(batches[i][1].flatten(1).std(1) > 0.05).float().mean().item() for i in range(200)])
    assert abs(busy_share(1) - 0.25) < 0.02 and busy_share(4) > 0.6
    assert data.detail(busy) > data.detail(flat) == 0


def test_patches_of_mixed_size(packed):
    batches = make_batches(packed[0], 40, 8, (24, 8, 16), "bicubic")
    shapes = {tuple(batches[i][0].shape) for i in range(40)}
    assert shapes == {(8, 3, 8, 8), (2, 3, 16, 16), (1, 3, 24, 24)}
    assert [batches.batch_size(side) for side in batches.patches] == [8, 2, 1]
    assert all(batches[i][1].shape[-1] == 2 * batches[i][0].shape[-1] for i in range(5))


def test_shares_of_files(tmp_path):
    files = []
    for k, count in enumerate((1, 9)):
        for i in range(count):
            save(tmp_path / str(k) / f"{i}.png", np.full((32, 32, 3), 250 * k, np.uint8))
        files.append(pack(tmp_path / str(k), tmp_path / f"{k}.safetensors", size=32))
    for candidates in (1, 4):       # candidates of one crop come from one file, so the shares stay
        batches = make_batches(files, 20, 20, recipe="bicubic", crop_candidates=candidates, shares=(0.7, 0.3))
        dark = np.mean([(batches[i][1][:, 0, 0, 0] < 0.5).float().mean().item() for i in range(20)])
        assert 0.63 < dark < 0.77


# ------------------------------------------------------------------ worker processes

def fail_at_three(job):
    if job == 3:
        raise ValueError("bang")
    if job == 1:
        raise images.PictureError("a bad picture")
    return job, f"note {job}"


def large_result(job):
    return np.zeros(1 << 22, np.uint8), ""


def test_an_error_in_a_worker_is_raised_with_its_traceback():
    with pytest.raises(ValueError, match="bang") as caught:
        list(data.run_parallel(fail_at_three, list(range(20)), 2, "testing", print))
    assert "fail_at_three" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_in_order_and_notes_are_logged(workers):
    lines, random_state = [], torch.get_rng_state()
    assert list(data.run_parallel(fail_at_three, [2, 0, 1], workers, "testing", lines.append)) == [2, 0, None]
    assert lines == ["note 2", "note 0", "skipped: a bad picture"]
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_workers_end_with_a_killed_main_process():
    code = ("import sys, time; sys.path[:0] = sys.argv[1:]; import data, test_data\n"
            "for _ in data.run_parallel(test_data.large_result, list(range(100)), 2, 'testing', print):\n"
            "    print('one', flush=True); time.sleep(100)")
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(ROOT / "tests")],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "one\n"
    workers = [int(pid) for task in Path(f"/proc/{process.pid}/task").iterdir()
               for pid in (task / "children").read_text().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    until = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < until:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


# ------------------------------------------------------------------ the command

def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    data.main()


def test_command(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = "pack", zoo, "-o", "a/p.safetensors", "--size", 64, "--min-side", 32, "--workers", 0
    run(monkeypatch, *command)
    assert capsys.readouterr().out.count("skipped: ") == 5
    assert len(patches_of("a/p.safetensors")) == 26
    run(monkeypatch, *command)
    assert "already" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "pack", "nowhere", "-o", "p.safetensors")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_an_editors_mistake_is_not_hidden(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "detail", lambda pixels: int("three"))
    with pytest.raises(ValueError, match="three"):
        run(monkeypatch, "pack", zoo, "-o", tmp_path / "p.safetensors", "--workers", 0, "--min-side", 32)
    assert not list(tmp_path.iterdir())
