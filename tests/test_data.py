"""data.py: packing odd folders, exact batches, the drawn demo pictures, the command line."""
import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clean
import data
import degrade
import demo as room
from demo import draw_demo
import pairs as pairing
from test_clean import encoded, linear_profile
import tile

HERE = Path(__file__).parent.parent


def noise(h, w, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, channels), np.uint8)


def save(path, pixels, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path, **how)
    return path


def command(*args, before="", cwd=None):
    line = before + '"$0" "$@"'
    return subprocess.run(["bash", "-c", line, sys.executable, str(HERE / "data.py"), *map(str, args)],
                          capture_output=True, text=True, cwd=cwd)


def one_line_error(result):
    return (result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
            and "Traceback" not in result.stdout + result.stderr)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    save(folder / "plain one.png", noise(100, 150))
    save(folder / "深い/壁紙 その1.png", noise(64, 64))
    save(folder / "photo.JPG", noise(70, 90), format="JPEG")
    save(folder / "web.webp", noise(64, 65), lossless=True)
    save(folder / "grey.png", noise(80, 64, 1))
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
    (folder / "notes.txt").write_text("passed over")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    return folder


@pytest.fixture(scope="module")
def packed(zoo, tmp_path_factory):
    said = []
    out = data.pack([zoo], tmp_path_factory.mktemp("packed") / "p.safetensors", size=64, min_side=32, log=said.append)
    return out, said


# ---- packing

def test_pack_reads_the_zoo(packed):
    out, said = packed
    meta, n, size = data.read_header(out)
    patches = load_file(out)["patches"]         # the public library reads our header
    assert patches.shape == (n, 64, 64, 3) and size == 64 and patches.dtype == torch.uint8
    # 2x3, 1, 2x2, 1x2, 2x1, 1x2, 1x2, 1, 1x4 and twice 1
    assert n == 6 + 1 + 4 + 2 + 2 + 2 + 2 + 1 + 4 + 2
    assert (meta["pictures"], meta["too_small"], meta["unreadable"]) == ("11", "1", "4")
    skipped = [line for line in said if line.startswith("skipped")]
    for name in ("text.jpg", "empty.png", "cut.png", "dangling.png", "tiny.png"):
        assert sum(name in line for line in skipped) == 1
    assert len(skipped) == 5 and "4 unreadable and 1 small" in said[-1]
    assert not list(out.parent.glob("*.part"))


def test_hold_out_takes_the_busiest_square_and_the_same_pictures_again(tmp_path):
    for i in range(30):
        (tmp_path / f"in/{i % 3}").mkdir(parents=True, exist_ok=True)
        pixels = np.full((100, 100, 3), 8 * i, np.uint8)
        pixels[40:, 60:] = np.random.default_rng(i).integers(0, 255, (60, 40, 3))
        Image.fromarray(pixels).save(tmp_path / f"in/{i % 3}/{i}.png")
    (tmp_path / "in/0/bad.png").write_bytes(b"no picture")
    folder, held = data.hold_out([tmp_path / "in"], tmp_path / "p", side=50)
    assert len(held) == 3 and data.hold_out([tmp_path / "in"], tmp_path / "p", side=50) == (folder, held)
    for i, path in enumerate(held):
        assert np.array_equal(np.asarray(Image.open(folder / f"{i}.png")), np.asarray(Image.open(path))[50:, 50:])
    assert data.hold_out([tmp_path / "in"], tmp_path / "p", count=2)[1] == held[:2]
    packed = data.pack([tmp_path / "in"], tmp_path / "p.safetensors", 64, min_side=64, without=held)
    names = set(data.read_tensor(packed, "names").tobytes().decode().split())
    assert len(names) == 28 and not names & {f"0/{p.relative_to(tmp_path / 'in').as_posix()}" for p in held}   # 28: the bad one
    with pytest.raises(ValueError, match="--val"):
        data.hold_out([tmp_path / "in/1"], tmp_path / "p", count=0)


def test_what_is_held_out_is_opaque_and_no_icon(tmp_path):
    clear = noise(100, 100, 4)
    clear[:, :50, 3] = 0
    clear[:, :50, :3] = 0
    for i in range(12):
        save(tmp_path / "in" / f"{i}.png", clear)
        for k in range(4):
            save(tmp_path / "in" / f"icon {i} {k}.png", noise(40, 40))
    folder, held = data.hold_out([tmp_path / "in"], tmp_path / "p", side=100)
    assert len(held) == 6 and not any("icon" in p.name for p in held)
    grounds = [np.asarray(Image.open(p))[:, :50] for p in folder.iterdir()]
    assert {g.shape for g in grounds} == {(100, 50, 3)} and len({g.tobytes() for g in grounds}) > 1
    assert any(g.max() > 0 for g in grounds)


def test_smaller_copies_are_set_aside_with_their_picture(tmp_path):
    """Or else what a run is judged by is among what it learned from."""
    for i in range(20):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(tmp_path / f"in/{i}.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "in/icon.png")
    clean.multiscale(tmp_path / "in", tmp_path / "smaller", log=lambda *a: None)
    for folders in ([tmp_path / "in", tmp_path / "smaller"], [tmp_path / "smaller", tmp_path / "in"]):
        held = data.hold_out(folders, tmp_path / "p")[1]
        whole = [p for p in held if p.parent.name == "in"]
        assert len(whole) == 2 and {p.stem for p in held} == {p.stem + end for p in whole for end in ("", "_075", "_050")}


def test_pack_keeps_every_pixel(tmp_path):
    pixels = noise(150, 210)
    save(tmp_path / "in" / "a.png", pixels)
    out = data.pack(tmp_path / "in", tmp_path / "p.safetensors", size=64, min_side=64, log=lambda _: None)
    patches = load_file(out)["patches"].numpy()
    assert len(patches) == 3 * 4
    ys, xs = np.linspace(0, 150 - 64, 3).round().astype(int), np.linspace(0, 210 - 64, 4).round().astype(int)
    again = np.zeros_like(pixels)
    seen = np.zeros(pixels.shape[:2], bool)
    for patch, (y, x) in zip(patches, [(y, x) for y in ys for x in xs]):
        again[y:y + 64, x:x + 64] = patch
        seen[y:y + 64, x:x + 64] = True
    assert seen.all() and (again == pixels).all()


def test_small_pictures_are_mirrored_out(tmp_path):
    pixels = noise(40, 50)
    save(tmp_path / "in" / "a.png", pixels)
    out = data.pack(tmp_path / "in", tmp_path / "p.safetensors", size=64, min_side=32, log=lambda _: None)
    patch = load_file(out)["patches"].numpy()[0]
    assert (patch[:40, :50] == pixels).all()
    assert (patch[40:64, :50] == pixels[:15:-1]).all() and (patch[:40, 50:64] == pixels[:, :35:-1]).all()


def test_16_bit_is_rounded_not_cut():
    rgb = torch.tensor([100.4, 100.6, 255.0]).reshape(3, 1, 1).expand(3, 8, 8) / 255
    assert data.cut(rgb, 8)[0, 0, 0].tolist() == [100, 101, 255]


def test_transparency_gets_smooth_grounds_of_its_own(zoo, tmp_path):
    grounds = [data.ground(f"0/{i}.png", 96, 128) for i in range(40)]
    assert all(g.shape == (3, 96, 128) and 0 <= g.min() and g.max() <= 1 for g in grounds)
    assert torch.equal(grounds[3], data.ground("0/3.png", 96, 128))
    means = torch.stack([g.mean((1, 2)) for g in grounds])
    assert means.std(0).min() > 0.1                                               # varied
    assert max(float(g.diff(dim=2).abs().max()) for g in grounds) < 0.1           # no edges, no checker
    kinds = [float(g.std((1, 2)).max()) > 0 for g in grounds]
    assert 5 < sum(kinds) < 38                                                    # some plain, some not
    for name in ("clear.png", "clear too.png"):
        (tmp_path / name).symlink_to(zoo / name)
    out = data.pack(tmp_path, tmp_path / "p.safetensors", size=64, min_side=32, log=lambda _: None)
    both = load_file(out)["patches"]
    shown = [(data.ground(f"0/0/{name}", 64, 64) * 255).round().byte().permute(1, 2, 0)
             for name in ("clear too.png", "clear.png")]
    assert sorted(torch.equal(b, s) for b in both for s in shown) == [False, False, True, True]


def test_reused_and_rebuilt(tmp_path):
    say, said = (lambda line: said.append(line)), []
    one = save(tmp_path / "in" / "a.png", noise(64, 64))
    out = data.pack(tmp_path / "in", tmp_path / "p.safetensors", size=64, min_side=32, log=say)
    first = out.stat()
    data.pack(tmp_path / "in", out, size=64, min_side=32, log=say)
    assert out.stat().st_ino == first.st_ino and "packed before" in said[-1]
    save(tmp_path / "in" / "b.png", noise(64, 64, seed=1))                        # one more
    data.pack(tmp_path / "in", out, size=64, min_side=32, log=say)
    assert data.read_header(out)[1] == 2
    save(one, noise(64, 64, seed=2))                                              # one changed
    os.utime(one, ns=(1, 1))
    data.pack(tmp_path / "in", out, size=64, min_side=32, log=say)
    assert (load_file(out)["patches"][0].numpy() == noise(64, 64, seed=2)).all()
    data.pack(tmp_path / "in", out, size=32, min_side=32, log=say)                # another size
    assert data.read_header(out)[1:3] == (8, 32)
    (tmp_path / "in").rename(tmp_path / "elsewhere")                              # the folder moved: nothing changed
    data.pack(tmp_path / "elsewhere", out, size=32, min_side=32, log=say)
    assert "packed before" in said[-1]
    with open(out, "r+b") as file:
        file.truncate(out.stat().st_size - 1)
    data.pack(tmp_path / "elsewhere", out, size=32, min_side=32, log=say)         # damaged: made anew
    assert data.read_header(out)[1] == 8


def test_no_picture_is_one_line(zoo, tmp_path):
    quiet = dict(size=64, min_side=32, log=lambda _: None)
    (tmp_path / "none").mkdir()
    save(tmp_path / "tiny" / "a.png", noise(8, 8))
    for folder, words in (("none", "no picture"), ("tiny", "none of 1 pictures is usable"), ("absent", "no such")):
        with pytest.raises(ValueError, match=words) as caught:
            data.pack(tmp_path / folder, tmp_path / "p.safetensors", **quiet)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="raise the size"):
        data.pack(zoo, tmp_path / "p.safetensors", size=64, min_side=128)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none", "tiny"]


def pairs(zoo, folder, scale=2):
    """An LR folder for the zoo: what can be read, made `scale` times smaller, under the same names as PNG."""
    for path in tile.find_pictures([zoo]):
        with contextlib.suppress(tile.PictureError):
            picture = tile.read_picture(path)
            h, w = picture.rgb.shape[1:]
            whole = picture.rgb[None, :, :h // scale * scale, :w // scale * scale]
            small = degrade.resize(whole, (h // scale, w // scale), "area")
            target = folder / path.relative_to(zoo).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            tile.save_picture(target, tile.Picture(small[0]))
    return folder


@pytest.mark.parametrize("paired", [False, True])
def test_stopped_anywhere_it_goes_on_and_ends_the_same(zoo, tmp_path, monkeypatch, paired):
    more = dict(lr=[pairs(zoo, tmp_path / "lr")]) if paired else {}
    how = dict(size=64, min_side=32, **more)
    whole = data.pack(zoo, tmp_path / "whole.safetensors", log=lambda _: None, **how)
    save(tmp_path / "in" / "a.png", noise(64, 64))
    out = data.pack(tmp_path / "in", tmp_path / "p.safetensors", size=64, min_side=32, log=lambda _: None)
    before, read, seen, said = out.read_bytes(), tile.read_picture, [], []

    def stop_at_fifth(path):
        if len(seen) in (4, 9):
            seen.append("stop")
            raise KeyboardInterrupt
        seen.append(str(path))
        return read(path)

    monkeypatch.setattr(tile, "read_picture", stop_at_fifth)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            data.pack(zoo, out, log=said.append, **how)
        assert out.read_bytes() == before
        for ending in (".part", ".rows.part", ".lr.part")[:2 + paired]:        # a kill in the middle of writing
            with open(f"{out}{ending}", "ab") as file:
                file.write(b"[half a line")
    data.pack(zoo, out, log=said.append, **how)
    assert out.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.part"))
    assert sum("going on after" in line for line in said) == 2
    seen = [s for s in seen if s != "stop"]
    assert len(seen) - len(set(seen)) <= 2 * paired         # of a pair stopped between the two one is read again
    # What was done for other pictures, or is not all there, is not gone on with.
    for spoil in (lambda part, rows: rows.write_text("fingerprint of something else\n" + rows.read_text()),
                  lambda part, rows: os.truncate(part, 30000)):
        seen[:] = [0] * 10
        (tmp_path / "new.safetensors.part").write_bytes(whole.read_bytes()[:-9])
        rows = [[str(i), [1.0], ""] for i in range(4)]
        first = data.planned([zoo], 64, 0, 32, more.get("lr"), 0, 0.1, ())[-1]
        (tmp_path / "new.safetensors.rows.part").write_text("\n".join([first, *map(json.dumps, rows), ""]))
        spoil(tmp_path / "new.safetensors.part", tmp_path / "new.safetensors.rows.part")
        data.pack(zoo, tmp_path / "new.safetensors", log=lambda _: None, **how)
        assert (tmp_path / "new.safetensors").read_bytes() == whole.read_bytes()
        (tmp_path / "new.safetensors").unlink()


def test_workers_pack_the_same(zoo, packed, tmp_path):
    out = data.pack([zoo], tmp_path / "p.safetensors", size=64, min_side=32, log=lambda _: None, workers=2)
    assert out.read_bytes() == packed[0].read_bytes()


def test_patches_know_their_picture(zoo, packed):
    tensors = load_file(packed[0])
    names = tensors["names"].numpy().tobytes().decode().rstrip("\n").split("\n")
    assert len(names) == 16 and "0/深い/壁紙 その1.png" in names and "0/cut.png" in names
    for patch, k, busy in zip(tensors["patches"].numpy(), tensors["picture"].tolist(), tensors["detail"].tolist()):
        assert abs(data.detail(patch) - busy) < 0.001
        picture = tile.read_picture(zoo / names[k][2:])
        if picture.alpha is None and min(picture.rgb.shape[1:]) >= 64:
            pixels = (picture.rgb * 255).round().byte().permute(1, 2, 0).numpy()
            assert any((pixels[y:y + 64, x:x + 64] == patch).all() for y in range(pixels.shape[0] - 63)
                       for x in range(pixels.shape[1] - 63) if (pixels[y, x] == patch[0, 0]).all())
    assert (tensors["picture"].diff() >= 0).all() and len(set(tensors["picture"].tolist())) == 11


def older(path, n=6, size=64):
    """A patch file as it was written before there were names and details."""
    patches = np.stack([noise(size, size, seed=i) // (1 + i) for i in range(n)])
    head = {"__metadata__": dict(fingerprint="x", pictures="1"),
            "patches": dict(dtype="U8", shape=[n, size, size, 3], data_offsets=[0, patches.size])}
    path.write_bytes((16384).to_bytes(8, "little") + json.dumps(head).encode().ljust(16384) + patches.tobytes())
    return path


def test_older_patch_files_are_read(tmp_path):
    file, said = older(tmp_path / "old.safetensors"), []
    assert data.read_header(file)[1:] == (6, 64) and data.read_tensor(file, "picture") is None
    assert data.Batches(file, 3, 4, 16, 2, "bicubic", 0)[0][1].shape == (4, 3, 32, 32)
    data.mine([file], tmp_path / "m.safetensors", keep=0.5, soft=0, log=said.append)
    assert (load_file(tmp_path / "m.safetensors")["patches"].numpy() == data.read_tensor(file, "patches")[:3]).all()
    data.stats([file], log=said.append)
    assert "6 patches of 64x64" in "".join(said)


def test_a_patch_file_is_taken_as_it_is(packed, tmp_path):
    assert data.pack([packed[0]], tmp_path / "p.safetensors", log=lambda _: None) == packed[0]
    assert not list(tmp_path.iterdir())


def test_profiles_and_animations_are_packed_right(tmp_path):
    pixels = noise(64, 64)
    save(tmp_path / "in" / "a.png", pixels, icc_profile=linear_profile())
    frames = [Image.fromarray(noise(64, 64, seed=i)) for i in (1, 2)]
    frames[0].save(tmp_path / "in" / "b.webp", save_all=True, append_images=frames[1:], lossless=True)
    said = []
    out = data.pack(tmp_path / "in", tmp_path / "p.safetensors", size=64, min_side=32, log=said.append)
    patches = load_file(out)["patches"].numpy()
    assert np.abs(patches[0] - encoded(pixels)).max() <= 1.5 and (patches[1] == noise(64, 64, seed=1)).all()
    assert "b.webp" in said[0] and "first of 2 frames" in said[0]


# ---- pairs

@pytest.mark.parametrize("scale", [2, 4])
def test_pairs_stay_together_whatever_is_done_to_them(zoo, tmp_path, scale):
    """The LR is the mean of scale x scale HR pixels, so each crop tells by itself whether its LR is the right one."""
    lr, said = pairs(zoo, tmp_path / "lr", scale), []
    save(lr / "plain one.png", noise(30, 30))                            # of another size
    save(lr / "web.webp", np.asarray(Image.open(lr / "web.png")), lossless=True)
    save(lr / "web.png", noise(32, 32))                                  # the one with the same ending is meant
    (lr / "photo.png").unlink()
    out = data.pack([zoo], tmp_path / "p.safetensors", size=64, min_side=32, lr=[lr], log=said.append)
    tensors, meta = load_file(out), data.read_header(out)[0]
    assert tensors["lr"].shape == (len(tensors["patches"]), 64 // scale, 64 // scale, 3) and meta["scale"] == str(scale)
    means = tensors["patches"].float().reshape(-1, 64 // scale, scale, 64 // scale, scale, 3).mean((2, 4))
    names = tensors["names"].numpy().tobytes().decode().split("\n")
    solid = [k for k, p in enumerate(tensors["picture"].tolist()) if "clear" not in names[p]]
    assert len(solid) > 10 and (means - tensors["lr"].float())[solid].abs().max() < 0.51
    assert any("30x30" in line for line in said)
    assert any("5 pictures without a partner" in line for line in said)

    for busiest in (1, 2):
        batches = data.Batches(out, 6, 8, 32 // scale, scale, "there is no such recipe", 0, busiest)
        for small, hr in (batches[i] for i in range(6)):
            close = (torch.nn.functional.avg_pool2d(hr, scale) - small).abs().flatten(1).max(1)[0] < 0.51 / 255
            assert small.shape == (8, 3, 32 // scale, 32 // scale) and close.sum() >= 5     # some are transparent
    with pytest.raises(ValueError, match=f"pairs of scale {scale}, not 3"):
        data.Batches(out, 6, 8, 8, 3, "bicubic", 0)


def test_pairs_of_transparent_and_grey_pictures_made_by_degrade(tmp_path, monkeypatch):
    """What degrade.py lays on white is packed beside white, and a grey profile goes along."""
    hr = np.full((64, 64, 4), 200, np.uint8)
    hr[:, :32, 3] = 0
    save(tmp_path / "hr" / "clear.png", hr)
    linear = tile.Picture(torch.full((3, 64, 64), 0.3), icc=linear_profile(grey=True), grey=True)
    tile.save_picture(tmp_path / "hr" / "linear.png", linear)
    monkeypatch.setattr(sys, "argv", ["degrade.py", *map(str, (tmp_path / "hr", tmp_path / "lr")), "--recipe", "bicubic"])
    degrade.main()
    out = data.pack(tmp_path / "hr", tmp_path / "p.safetensors", size=64, min_side=32, lr=tmp_path / "lr", log=lambda _: None)
    for large, small in zip(load_file(out)["patches"].float(), load_file(out)["lr"].float()):
        for x in (4, 28):
            assert (large[32, 2 * x] - small[16, x]).abs().max() <= 1
    assert load_file(out)["patches"][0, 0, 0].tolist() == [255] * 3 and load_file(out)["patches"][1, 0, 0, 0] > 130


def test_names_pair_however_their_accents_are_written(tmp_path):
    save(tmp_path / "hr" / "caf\u00e9.png", noise(64, 64))
    save(tmp_path / "lr" / "cafe\u0301.png", noise(32, 32))
    out = data.pack(tmp_path / "hr", tmp_path / "p.safetensors", size=64, min_side=32, lr=tmp_path / "lr", log=lambda _: None)
    assert len(load_file(out)["lr"]) == 1
    (jobs, _) = pairing.paired(dict(HR=tmp_path / "hr", LR=tmp_path / "lr"))
    assert len(jobs) == 1


def test_pairs_mix_with_others(zoo, packed, tmp_path):
    lr = tmp_path / "lr"
    for path in tile.find_pictures([zoo]):
        with contextlib.suppress(tile.PictureError):
            h, w = tile.read_picture(path).rgb.shape[1:]
            save((lr / path.relative_to(zoo)).with_suffix(".png"), np.zeros((h // 2, w // 2, 3), np.uint8))
    black = data.pack([zoo], tmp_path / "p.safetensors", size=64, min_side=32, lr=[lr], log=lambda _: None)
    shares = []
    for lr, hr in (data.Batches([packed[0], black], 12, 10, 16, 2, "web", 0, shares=(0.7, 0.3))[i] for i in range(12)):
        dark = lr.flatten(1).max(1)[0] == 0
        shares.append(dark.float().mean().item())
        alone = degrade.degrade(hr, "bicubic", 2, [0] * 10)
        assert ((lr - alone).abs().flatten(1).mean(1)[~dark] < 0.15).all()
    assert 0.15 < np.mean(shares) < 0.45


def test_pairs_that_are_none(zoo, tmp_path):
    save(tmp_path / "in" / "a.png", noise(64, 64))
    save(tmp_path / "lr" / "b.png", noise(32, 32))
    quiet = dict(min_side=32, log=lambda _: None)
    with pytest.raises(ValueError, match="pairs go by their names"):
        data.pack(tmp_path / "in", tmp_path / "p.safetensors", size=64, lr=[tmp_path / "lr"], **quiet)
    save(tmp_path / "lr" / "a.png", noise(21, 21))
    with pytest.raises(ValueError, match="multiple of 3"):
        data.pack(tmp_path / "in", tmp_path / "p.safetensors", size=64, lr=[tmp_path / "lr"], **quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "lr"]


def test_a_file_that_cannot_be_read_is_not_called_one_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "p.safetensors").mkdir()
    with pytest.raises(ValueError, match="p.safetensors: cannot be read: Is a directory"):
        data.read_header(tmp_path / "p.safetensors")


def test_someone_elses_file_is_left_alone(tmp_path):
    save(tmp_path / "in" / "a.png", noise(64, 64))
    for name in ("hair cut short.txt", "thesis.txt"):
        out = tmp_path / name
        out.write_text("years of work")
        with pytest.raises(ValueError, match="not a patch file"):
            data.pack(tmp_path / "in", out, size=64, min_side=32)
        assert out.read_text() == "years of work"
    data.pack(tmp_path / "in", out, size=64, min_side=32, log=lambda _: None, overwrite=True)
    assert data.read_header(out)[1] == 1


def test_header_holds_long_strange_names(tmp_path):
    for i in range(40):
        (tmp_path / ("🎨" * 50 + f"{i}.png")).write_bytes(b"")
    (tmp_path / os.fsdecode(b"broken \xff.png")).write_bytes(b"")
    save(tmp_path / "a.png", noise(32, 32))
    out = data.pack(tmp_path, tmp_path / "p.safetensors", size=32, min_side=32, log=lambda _: None)
    assert (load_file(out)["patches"][0].numpy() == noise(32, 32)).all()


# ---- batches

def batches(out, steps=6, batch=5, patch=16, recipe="web", seed=3):
    return data.Batches(out, steps, batch, patch, 2, recipe, seed)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x, y))


def test_batches_are_the_same_with_any_workers_and_after_a_restart(packed):
    ds = batches(packed[0])
    direct = [ds[i] for i in range(6)]
    lr, hr = direct[0]
    assert lr.shape == (5, 3, 16, 16) and hr.shape == (5, 3, 32, 32) and lr.dtype == hr.dtype == torch.float32
    assert hr.is_contiguous() and 0 <= hr.min() and hr.max() <= 1 and 0 <= lr.min() and lr.max() <= 1
    assert same(direct, list(data.loader(batches(packed[0]), 0, 0)))
    assert same(direct, list(data.loader(batches(packed[0]), 0, 2)))
    assert same(direct[4:], list(data.loader(batches(packed[0]), 4, 2)))
    assert not same(direct, [batches(packed[0], seed=4)[i] for i in range(6)])
    assert not torch.equal(direct[0][1], direct[1][1])
    with pytest.raises(IndexError):
        ds[6]


def test_batches_travel_without_their_open_files(packed):
    ds = batches(packed[0])
    first = ds[0]
    sent = pickle.dumps(ds)
    assert len(sent) < 5000 and same([first], [pickle.loads(sent)[0]])


def test_every_patch_once_an_epoch_from_several_files(tmp_path):
    files = []
    for k, count in enumerate((3, 4)):      # each picture of one colour that tells which it is
        for i in range(count):
            save(tmp_path / str(k) / f"{i}.png", np.full((32, 32, 3), 10 * (3 * k + i) + 5, np.uint8))
        files.append(tmp_path / f"{k}.safetensors")
        data.pack(tmp_path / str(k), files[k], size=32, min_side=32, log=lambda _: None)
    ds = data.Batches(files, 14, 3, 16, 2, "bicubic", 0)
    colours = torch.cat([ds[i][1][:, 0, 0, 0] for i in range(14)]).mul(255).round().int().tolist()
    epochs = [colours[i:i + 7] for i in range(0, 42, 7)]
    assert all(sorted(e) == [5, 15, 25, 35, 45, 55, 65] for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1
    others = {tuple(data.Batches(files, 3, 3, 16, 2, "bicubic", seed).shuffled(0)) for seed in range(4)}
    assert len(others) > 1


def test_crops_are_true_and_turned_all_eight_ways(tmp_path):
    pixels = noise(40, 40)
    save(tmp_path / "in" / "a.png", pixels)
    out = data.pack(tmp_path / "in", tmp_path / "p.safetensors", size=40, min_side=32, log=lambda _: None)
    ds = data.Batches(out, 20, 8, 16, 2, "bicubic", 0)
    ways, places = set(), set()
    turned = [np.rot90(pixels, k)[:, ::f] for k in range(4) for f in (1, -1)]
    index = [{np.ascontiguousarray(t[y, x:x + 4]).tobytes(): (y, x) for y in range(9) for x in range(9)}
             for t in turned]
    for lr, hr in (ds[i] for i in range(20)):
        assert torch.equal(lr, degrade.degrade(hr, "bicubic", 2, [0] * 8))
        for crop in (hr.permute(0, 2, 3, 1) * 255).round().byte().numpy():
            found = [(way, at[crop[0, :4].tobytes()]) for way, at in enumerate(index) if crop[0, :4].tobytes() in at]
            way, (y, x) = found[0]
            assert (turned[way][y:y + 32, x:x + 32] == crop).all()
            ways.add(way), places.add((y, x))
    assert len(ways) == 8 and len(places) > 40 and {y for y, _ in places} == set(range(9))


def test_broken_patch_files_are_one_line(packed, tmp_path):
    whole = packed[0].read_bytes()
    for name, content, words in (("short", whole[:-5], "cut short"), ("head", whole[:100], "not a patch file"),
                                 ("empty", b"", "not a patch file"), ("text", b"hello, hello", "not a patch file"),
                                 ("list", (2).to_bytes(8, "little") + b"[]", "not a patch file")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            batches(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="larger size"):
        batches(packed[0], patch=48)


# ---- demo

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "demo"
    draw_demo(folder, train=5, val=4)
    return folder


def test_demo_pictures_are_many_and_detailed(demo):
    paths = sorted(demo.glob("*/*.png"))
    assert len(list((demo / "train").iterdir())) == 5 and len(paths) == 9
    assert len({p.read_bytes() for p in paths}) == 9
    for path in paths:
        rgb = tile.read_picture(path).rgb
        assert min(rgb.shape[1:]) >= 384 and max(rgb.shape[1:]) <= 768
        small = degrade.resize(rgb[None], (rgb.shape[1] // 2, rgb.shape[2] // 2))
        back = degrade.resize(small, rgb.shape[1:])
        loss = -10 * torch.log10(((back - rgb) ** 2).mean())
        assert 14 < loss < 34, (path.name, loss)            # halving hurts: there are sharp lines and texture
        colours = len(np.unique((rgb.numpy() * 255).round().astype(np.uint8).reshape(3, -1), axis=1).T)
        assert colours > (150 if "page" in path.name else 5000)


def test_demo_is_drawn_from_its_seed_and_complete_or_absent(demo, tmp_path, monkeypatch):
    draw_demo(tmp_path / "again", train=1, val=1)
    draw_demo(tmp_path / "other", seed=1, train=1, val=0)
    assert (tmp_path / "again/train/000_meadow.png").read_bytes() == (demo / "train/000_meadow.png").read_bytes()
    assert (tmp_path / "other/train/000_meadow.png").read_bytes() != (demo / "train/000_meadow.png").read_bytes()
    with pytest.raises(FileExistsError):
        draw_demo(tmp_path / "again")

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(room, "portrait", stop)
    with pytest.raises(KeyboardInterrupt):
        draw_demo(tmp_path / "stopped", train=2, val=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]


# ---- the command

def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    data.main()


def test_command(zoo, tmp_path, monkeypatch, capsys):
    drawn = command("demo", "demo", "--train", 1, "--val", 1, cwd=tmp_path)
    assert drawn.returncode == 0 and len(list((tmp_path / "demo").glob("*/*.png"))) == 2
    assert one_line_error(command("demo", "demo", cwd=tmp_path))
    done = command("pack", zoo, "demo", "-o", "a/p.safetensors", "--size", 64, "--min-side", 32, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("skipped: ") == 5
    assert data.read_header(tmp_path / "a/p.safetensors")[0]["pictures"] == "13"
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "pack", zoo, "demo", "-o", "a/p.safetensors", "--size", 64, "--min-side", 32)
    assert "packed before" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--help")
    assert stopped.value.code == 0 and "example" in capsys.readouterr().out


def test_no_room_keeps_what_was_done(zoo, packed, tmp_path, monkeypatch, capsys):
    full = command("pack", zoo, "-o", tmp_path / "p.safetensors", "--size", 64, "--min-side", 32, "--workers", 0,
                   before="ulimit -f 64; ")
    assert one_line_error(full) and "cannot write" in full.stderr and not (tmp_path / "p.safetensors").exists()
    said = []
    out = data.pack(zoo, tmp_path / "p.safetensors", size=64, min_side=32, log=said.append)
    assert "going on after" in said[0] and out.read_bytes() == packed[0].read_bytes()
    out.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "pack", zoo, "-o", tmp_path / "file/p.safetensors", "--size", 64, "--min-side", 32)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: cannot write")
    full = command("demo", tmp_path / "demo", "--train", 1, "--val", 0, before="ulimit -f 8; ")
    assert one_line_error(full) and [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- batches of several kinds

def test_ranks_share_one_batch(packed):
    whole = data.Batches(packed[0], 3, 6, 16, 2, "web", 5, busiest=2)
    parts = [data.Batches(packed[0], 3, 2, 16, 2, "web", 5, busiest=2, rank=r, ranks=3) for r in range(3)]
    for step in range(3):
        assert same([whole[step]], [tuple(map(torch.cat, zip(*(p[step] for p in parts))))])


def test_busiest_prefers_detail(tmp_path):
    flat, busy = np.full((64, 64, 3), 200, np.uint8), noise(64, 64)
    for i, pixels in enumerate((flat, flat, flat, busy)):
        save(tmp_path / "in" / f"{i}.png", pixels)
    out = data.pack(tmp_path / "in", tmp_path / "p.safetensors", size=64, min_side=32, log=lambda _: None)

    def share(n):
        ds = data.Batches(out, 10, 8, 16, 2, "bicubic", 0, busiest=n)
        return np.mean([(ds[i][1].flatten(1).std(1) > 0.05).float().mean().item() for i in range(10)])
    assert abs(share(1) - 0.25) < 0.02 and share(4) > 0.6
    assert data.detail(busy) > data.detail(flat) == 0


def test_patches_of_mixed_size(packed):
    ds = data.Batches(packed[0], 40, 8, (24, 8, 16), 2, "bicubic", 0)
    shapes = {tuple(ds[i][0].shape) for i in range(40)}
    assert shapes == {(8, 3, 8, 8), (2, 3, 16, 16), (1, 3, 24, 24)}
    assert all(ds[i][1].shape[-1] == 2 * ds[i][0].shape[-1] for i in range(5)) and same([ds[7]], [ds[7]])


def test_shares_of_files(tmp_path):
    files = []
    for k, count in enumerate((1, 9)):
        for i in range(count):
            save(tmp_path / str(k) / f"{i}.png", np.full((32, 32, 3), 250 * k, np.uint8))
        files.append(tmp_path / f"{k}.safetensors")
        data.pack(tmp_path / str(k), files[k], size=32, min_side=32, log=lambda _: None)
    for busiest in (1, 4):      # the busiest is chosen within a folder: its share stays
        ds = data.Batches(files, 20, 20, 16, 2, "bicubic", 0, busiest, shares=(0.7, 0.3))
        dark = np.mean([(ds[i][1][:, 0, 0, 0] < 0.5).float().mean().item() for i in range(20)])
        assert 0.63 < dark < 0.77


# ---- mining

def test_choose_takes_the_busy_and_a_share_of_the_calm():
    rng = np.random.default_rng(0)
    details = rng.permutation(100) * 0.1                        # one of them is plain
    chosen = data.choose(details, 40, 0.25, np.random.default_rng(1))
    assert (np.diff(chosen) > 0).all() and len(chosen) == 40
    ranks = 99 - np.round(details[chosen] * 10).astype(int)     # 0 is the busiest
    busy, calm = ranks[ranks < 30], ranks[ranks >= 30]
    assert len(busy) == 30 and len(calm) == 10 and calm.min() >= 30 + 34 and 99 not in ranks
    draws = [data.choose(details, 40, 0.25, np.random.default_rng(s)) for s in (1, 2)]
    assert (draws[0] == chosen).all() and (draws[1] != chosen).any()
    assert len(data.choose(details, 1000, 0.25, rng)) == 99 and len(data.choose([0, 0], 2, 0, rng)) == 0
    assert sorted(details[data.choose(details, 5, 0, rng)]) == sorted(details)[-5:]


@pytest.fixture(scope="module")
def skies(tmp_path_factory):
    """Six pictures of 8 x 8 squares of 32, each busy in some and calm in most; two have more busy ones."""
    folder = tmp_path_factory.mktemp("skies") / "in"
    for i in range(6):
        rng = np.random.default_rng(i)
        pixels = np.empty((256, 256, 3), np.uint8)
        pixels[:] = (200 + np.arange(256) // 8)[:, None, None]
        for k in rng.choice(64, 24 if i < 2 else 4, replace=False):
            y, x = k // 8 * 32, k % 8 * 32
            pixels[y:y + 32, x:x + 32] = noise(32, 32, seed=100 * i + int(k)) // 2
        pixels[:32, :32] = 255                                  # and one square is plain
        save(folder / f"{i}.png", pixels)
    return folder


def test_mining_takes_detail_from_all_pictures(skies, tmp_path):
    how = dict(size=32, min_side=32, log=lambda _: None)
    packed = data.pack(skies, tmp_path / "p.safetensors", **how)
    for inputs in (skies, packed):
        out = tmp_path / f"{Path(inputs).stem}-mined.safetensors"
        data.mine(inputs, out, keep=0.5, per_picture=16, soft=0.125, **how)
        mined = load_file(out)
        busy = mined["detail"] > 20
        assert len(busy) == 48 and (~busy).sum() >= 6 and mined["detail"].min() > data.PLAIN
        counts = np.bincount(mined["picture"][busy], minlength=6)
        assert counts.max() <= 14 and counts.min() >= 2         # 23 of one picture's squares are busy
        names = mined["names"].numpy().tobytes().decode().rstrip("\n").split("\n")
        whole = {name: tile.read_picture(skies / name[2:]).rgb for name in names}
        for patch, k in zip(mined["patches"], mined["picture"]):
            rgb = (whole[names[k]] * 255).round().byte().permute(1, 2, 0)
            squares = [rgb[y:y + 32, x:x + 32] for y in range(0, 256, 32) for x in range(0, 256, 32)]
            assert any(torch.equal(square, patch) for square in squares)
    first, second = (load_file(tmp_path / f"{name}-mined.safetensors") for name in ("in", "p"))
    assert len(first) == 4 and all(torch.equal(first[k], second[k]) for k in first)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["in-mined.safetensors", "p-mined.safetensors", "p.safetensors"]
    lr, hr = data.Batches(tmp_path / "in-mined.safetensors", 3, 4, 16, 2, "bicubic", 0)[0]
    assert hr.shape == (4, 3, 32, 32)


def test_mining_is_done_once_and_goes_on(skies, tmp_path, monkeypatch):
    how, said, read, seen = dict(size=32, min_side=32), [], tile.read_picture, []

    def stop_at_third(path):
        seen.append(path)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(path)
    monkeypatch.setattr(tile, "read_picture", stop_at_third)
    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        data.mine([skies], out, log=said.append, **how)
    data.mine([skies], out, log=said.append, **how)
    assert len(seen) == 7 and any("going on after 2 of 6" in line for line in said)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    data.mine([skies], out, log=said.append, **how)
    assert "packed before" in said[-1] and len(seen) == 7
    made = out.read_bytes()
    data.mine([skies], out, log=said.append, seed=1, **how)
    assert out.read_bytes() != made
    out.write_text("years of work")
    with pytest.raises(ValueError, match="not a patch file"):
        data.mine([skies], out, log=said.append, **how)


def test_mining_twice_at_once_takes_turns(skies, tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "m.safetensors"
    mining = [sys.executable, str(HERE / "data.py"), "mine", str(skies), "-o", str(out), "--workers", "0"]
    with clean.alone(tmp_path / "m.safetensors.mine.part"):
        second = subprocess.Popen(mining, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert "another process is at work here, waiting" in second.stderr.readline()
        assert not out.exists() and not list(tmp_path.glob("*.candidates*"))
    said, errors = second.communicate(timeout=60)
    assert second.returncode == 0 and "patches, from" in said, errors
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_mining_pairs_and_several_files(zoo, skies, tmp_path):
    quiet = dict(min_side=32, log=lambda _: None)
    files = [data.pack([zoo], tmp_path / f"{k}.safetensors", size=64, lr=[pairs(zoo, tmp_path / "lr")], seed=k, **quiet)
             for k in range(2)]
    mined = load_file(data.mine(files, tmp_path / "m.safetensors", keep=0.9, soft=0, **quiet))
    means = mined["patches"].float().reshape(-1, 32, 2, 32, 2, 3).mean((2, 4))
    names = mined["names"].numpy().tobytes().decode().rstrip("\n").split("\n")
    solid = [k for k, p in enumerate(mined["picture"].tolist()) if "clear" not in names[p]]
    assert (means - mined["lr"].float())[solid].abs().max() < 0.51 and len(solid) > 20
    assert data.Batches(tmp_path / "m.safetensors", 3, 4, 16, 2, "none", 0)[0][0].shape == (4, 3, 16, 16)
    plain = data.pack([skies], tmp_path / "plain.safetensors", size=64, **quiet)
    with pytest.raises(ValueError, match="only some holds pairs"):
        data.mine([files[0], plain], tmp_path / "n.safetensors", **quiet)
    with pytest.raises(ValueError, match="differs in the size"):
        data.mine([plain, skies], tmp_path / "n.safetensors", size=32, **quiet)
    for wrong in (dict(keep=0), dict(soft=2), dict(per_picture=0)):
        with pytest.raises(ValueError, match="do not work"):
            data.mine([plain], tmp_path / "n.safetensors", **wrong)
    assert not (tmp_path / "n.safetensors").exists()


# ---- figures

def test_stats_say_what_is_there(zoo, skies, packed, tmp_path, capsys):
    data.stats([skies, packed[0]], sheet=tmp_path / "sheets/a.png")
    said = capsys.readouterr().out
    assert "6 pictures, 0 unreadable; 6 PNG" in said and "shorter side     256  256  256  256  256" in said
    assert f"{data.read_header(packed[0])[1]} patches of 64x64 from 11 pictures" in said
    assert "megapixels       0.07  0.07  0.07  0.07  0.07   0 altogether" in said
    sheet = np.asarray(Image.open(tmp_path / "sheets/a.png"))
    cells = data.read_header(packed[0])[1] + 6
    assert sheet.shape == (-(-cells // 8) * 184, 8 * 168, 3)
    assert [p.name for p in (tmp_path / "sheets").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="ends in .png"):
        data.stats([skies], sheet=tmp_path / "sheets/a.jpg")
    corners = [(k // 8 * 184 + 4, k % 8 * 168 + 4) for k in range(cells - 6)]
    shown = [sheet[y:y + 64, x:x + 64] for y, x in corners]
    busy = [data.detail(s) for s in shown]
    assert np.allclose(busy, sorted(busy), atol=1e-3) and busy[-1] > 100
    data.stats([zoo], log=print)
    said = capsys.readouterr().out
    assert "13 pictures, 3 unreadable" in said and "11 PNG" not in said and "detail of 12" in said
    with pytest.raises(ValueError, match="no such file"):
        data.stats([tmp_path / "absent.safetensors"])


def test_nothing_is_written_over_unasked(skies, packed, tmp_path, monkeypatch, capsys):
    precious = tmp_path / "precious.png"
    precious.write_text("years of work")
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, "stats", skies, "--workers", 0, "--sheet", precious)
    assert e.value.code == 2 and "--overwrite" in capsys.readouterr().err and precious.read_text() == "years of work"
    run(monkeypatch, "stats", skies, "--workers", 0, "--sheet", precious, "--overwrite")
    assert Image.open(precious).format == "PNG"
    before = packed[0].read_bytes()
    with pytest.raises(ValueError, match="what the patches are taken from"):
        data.mine([packed[0]], packed[0])
    assert packed[0].read_bytes() == before


@pytest.mark.parametrize("args", (("demo", "x", "--train", -3), ("clean", "in", "-o", "x", "--max-mp", -1), ("clean", "in", "-o", "x",
                                  "--max-mp", "nan"), ("multiscale", "in", "-o", "x", "--min-side", -5)))
def test_counts_below_nothing(skies, tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, *(skies if a == "in" else a for a in args))
    assert e.value.code == 2 and "does not work" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_every_command_by_its_words(skies, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "clean", skies, "-o", tmp_path / "set", "--workers", 0, "--min-sharpness=-inf", "--name", "id",
        "--distance", -1, "--max-blocks", "inf")
    assert sorted(p.name for p in (tmp_path / "set/pictures").iterdir()) == [f"{i}.png" for i in range(6)]
    run(monkeypatch, "multiscale", tmp_path / "set/pictures", "-o", tmp_path / "set/smaller", "--workers", 0,
        "--min-side", 64)
    assert len(list((tmp_path / "set/smaller").iterdir())) == 18
    run(monkeypatch, "pack", tmp_path / "set/pictures", tmp_path / "set/smaller", "-o", tmp_path / "p.safetensors",
        "--size", 64, "--min-side", 64, "--workers", 0)
    run(monkeypatch, "mine", tmp_path / "p.safetensors", "-o", tmp_path / "m.safetensors", "--keep", 0.25)
    run(monkeypatch, "stats", tmp_path / "m.safetensors", "--workers", 0)
    assert data.read_header(tmp_path / "p.safetensors")[1] > data.read_header(tmp_path / "m.safetensors")[1] > 10
    capsys.readouterr()
    for wrong in (("pack", tmp_path, "-o", tmp_path / "q.safetensors", "--workers", -1),
                  ("mine", tmp_path / "p.safetensors", "-o", tmp_path / "m.safetensors", "--keep", 3),
                  ("stats", tmp_path / "nowhere"), ("clean", tmp_path / "nowhere", "-o", tmp_path / "set"),
                  ("stats", skies, "--workers", 0, "--sheet", "/proc/no.png")):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *wrong)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    for name in ("clean", "multiscale", "pack", "mine", "stats", "demo"):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, name, "--help")
        assert stopped.value.code == 0 and f"example: python data.py {name}" in capsys.readouterr().out


def test_names_a_console_cannot_show(tmp_path):
    """A console or a log in cp1252, a picture with a Japanese name: it stopped the run."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "壁紙.png").write_bytes(b"broken")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(tmp_path / "in" / "空.png")
    p = subprocess.run([sys.executable, Path(data.__file__), "clean", tmp_path / "in", "-o", tmp_path / "set", "--workers", "0"],
                       capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert p.returncode == 0 and b"\\u58c1" in p.stdout, p.stderr
