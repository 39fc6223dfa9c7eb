"""demo.py: drawn scenes and textures."""
import hashlib
import sys

import numpy as np
import pytest
from PIL import Image

import demo


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "demo"
    demo.draw_demo(folder, train=4, val=1)
    return folder


def test_scenes_are_different_and_detailed(drawn):
    paths = sorted(drawn.glob("*/*.png"))
    assert [p.name for p in paths] == ["000_meadow.png", "001_portrait.png", "002_city.png", "003_page.png",
                                       "000_meadow.png"]
    assert len({p.read_bytes() for p in paths}) == 5
    for path in paths:
        image = Image.open(path)
        assert min(image.size) >= 384 and max(image.size) <= 768
        small = image.resize((image.width // 2, image.height // 2), Image.BICUBIC)
        again = np.asarray(small.resize(image.size, Image.BICUBIC), float)
        psnr = 10 * np.log10(255 ** 2 / ((again - np.asarray(image, float)) ** 2).mean())
        assert 14 < psnr < 34, path.name            # there are sharp lines and texture


def test_the_default_pictures_do_not_change(drawn):
    """Results on demo pictures are comparable only while the pixels are the same."""
    pixels = np.asarray(Image.open(drawn / "train/003_page.png"))
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "3ba3791a4cf0dc95"


def test_the_folder_is_complete_or_absent(drawn, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError):
        demo.draw_demo(drawn)

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(demo, "SCENES", (demo.page, stop))
    with pytest.raises(KeyboardInterrupt):
        demo.draw_demo(tmp_path / "stopped", train=2, val=0)
    assert not list(tmp_path.iterdir())


def test_textures(tmp_path):
    n = len(demo.TEXTURES)
    demo.draw_textures(tmp_path / "a", 2 * n, height=96, width=128)
    demo.draw_textures(tmp_path / "b", n, height=96, width=128)
    demo.draw_textures(tmp_path / "c", n, seed=1, height=96, width=128)
    a, b, c = ({p.name: np.asarray(Image.open(p)) for p in (tmp_path / k).iterdir()} for k in "abc")
    assert len(a) == 2 * n and all((a[name] == b[name]).all() for name in b)
    assert len({pixels.tobytes() for pixels in (*a.values(), *c.values())}) == 3 * n
    assert all(pixels.shape[:2] == (96, 128) and pixels.std() > 1 for pixels in a.values())
    line_art = [pixels for name, pixels in a.items() if "line_art" in name]
    assert all(set(np.unique(pixels)) == {0, 255} for pixels in line_art)


def test_the_pitch_of_screentone_is_2_to_6_pixels():
    u, v = demo.rotated_grid(64, 64, 4, 0)
    assert np.allclose(np.cos(u[0]), np.cos(2 * np.pi * np.arange(64) / 4)) and np.ptp(v[:, 0]) > 90
    pixels = demo.screentone(np.random.default_rng(0), 96, 144).astype(float)
    for area in demo.panels(96, 144):
        panel = pixels[area].mean(2)
        spectrum = np.abs(np.fft.fft2((panel - panel.mean()) * np.hanning(48)[:, None] * np.hanning(48)))
        spectrum[:5, :5] = spectrum[:5, -4:] = spectrum[-4:, :5] = spectrum[-4:, -4:] = 0      # the ramp
        y, x = np.unravel_index(spectrum.argmax(), spectrum.shape)
        frequency = np.hypot(min(y, 48 - y), min(x, 48 - x)) / 48
        assert 1 / 6.5 < frequency < 0.71


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path / "t"), "--textures", "2"])
    demo.main()
    assert [p.name for p in sorted((tmp_path / "t").iterdir())] == ["000_stars.png", "001_screentone.png"]
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")
