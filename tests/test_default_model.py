"""The shipped default model on drawn textures, on flat areas, and in other programs."""
import statistics

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import choose
import convert
import tile
from measure_textures import draw, gain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return convert.load_any(choose.SHIPPED[0])


def test_textures_are_not_worse_than_lanczos(model):
    """Stars, lines, and text: far better. Grain and dithering of single pixels: about equal."""
    pictures = draw(14, seed=4711)
    for quality in (None, 95, 90):
        gains = {}
        for kind, hr in pictures:
            gains.setdefault(kind, []).append(gain(model, hr, quality))
        means = {kind: statistics.fmean(values) for kind, values in gains.items()}
        assert min(min(values) for values in gains.values()) > -0.3, (quality, means)
        assert min(means["stars"], means["line_art"], means["text"]) > (2 if quality is None else 1.5), (quality, means)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("tile_size", [64, 384])
def test_ground_of_line_art_stays_exact(model, amp, tile_size):
    for ground, ink in ((255, 0), (0, 255)):
        picture = Image.new("L", (200, 160), ground)
        pen = ImageDraw.Draw(picture)
        for i in range(5):
            pen.ellipse([20 + 30 * i, 20 + 5 * i, 60 + 30 * i, 110], outline=ink, width=2)
        level = torch.tensor(list(picture.tobytes())).view(1, 160, 200).float() / 255
        sr = tile.upscale(model, level.repeat(3, 1, 1), 2, tile.Tiler(tile_size, 16, align=8), amp=amp)
        far = F.max_pool2d((level != ground / 255).float(), 9, 1, 4) == 0
        far = far.repeat_interleave(2, 1).repeat_interleave(2, 2).expand(3, -1, -1)
        assert far.sum() > 50_000 and (sr[far] == ground / 255).float().mean() >= 0.999


def test_other_programs_open_the_file(model):
    spandrel = pytest.importorskip("spandrel")
    theirs = spandrel.ModelLoader().load_from_file(choose.SHIPPED[0]).model.eval()
    x = torch.rand(1, 3, 40, 48)
    with torch.no_grad():
        assert (theirs(x) - model(x)).abs().max() < 1e-5
