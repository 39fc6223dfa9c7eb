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
    demo.draw_demo(folder, train=3, val=1)
    return folder


def test_scenes_are_different_and_detailed(drawn):
    paths = sorted(drawn.glob("*/*.png"))
    assert [p.name for p in paths] == ["000.png", "001.png", "002.png", "000.png"]
    assert len({p.read_bytes() for p in paths}) == 4
    for path in paths:
        image = Image.open(path)
        assert image.size == demo.SIZE
        small = image.resize((image.width // 2, image.height // 2), Image.BICUBIC)
        again = np.asarray(small.resize(image.size, Image.BICUBIC), float)
        psnr = 10 * np.log10(255 ** 2 / ((again - np.asarray(image, float)) ** 2).mean())
        assert 14 < psnr < 34, path.name            # there are sharp lines and texture


def test_the_default_pictures_do_not_change(drawn):
    """Results on demo pictures are comparable only while the pixels are the same."""
    pixels = np.asarray(Image.open(drawn / "train/001.png"))
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "e60c8889bed16226"


def test_the_folder_is_complete_or_absent(drawn, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError):
        demo.draw_demo(drawn)

    draw = demo.meadow

    def stop(canvas, rng, calls=[]):
        calls.append(rng)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(canvas, rng)
    monkeypatch.setattr(demo, "meadow", stop)
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


@pytest.mark.parametrize("pitch", (3, 4.5, 8))
def test_the_screen_has_its_pitch_and_coverage(pitch):
    for shape in ("dots", "lines", "crossed"):
        pixels = demo.screen(np.random.default_rng(0), 96, 96, pitch, shape, 0.4)
        assert pixels.min() >= 0 and pixels.max() <= 1 and pixels[-48:, -48:].mean() > pixels[:48, :48].mean() + 0.2
        spectrum = np.abs(np.fft.fft2((pixels - pixels.mean()) * np.outer(np.hanning(96), np.hanning(96))))
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(96), np.fft.fftfreq(96)))
        spectrum[frequency < 0.07] = 0          # the ramp
        assert frequency.ravel()[spectrum.argmax()] == pytest.approx(1 / pitch, rel=0.1)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path / "t"), "--textures", "2"])
    demo.main()
    assert [p.name for p in sorted((tmp_path / "t").iterdir())] == ["000_stars.png", "001_screentone.png"]
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2 and "error: cannot write" in capsys.readouterr().err
