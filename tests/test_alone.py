"""Each leaf file, copied alone into an empty folder, imports and does its job there."""
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JOBS = {
    "model": """
        model = HATRefiner.from_preset("tiny", scale=2).eval()
        save(model, "w.safetensors")
        sr = load("w.safetensors")(torch.rand(1, 3, 5, 7))
        assert sr.shape == (1, 3, 10, 14)
    """,
    "losses": """
        sr = torch.rand(1, 3, 8, 8, requires_grad=True)
        Charbonnier()(sr, torch.rand(1, 3, 8, 8)).backward()
        assert sr.grad.abs().min() > 0
    """,
    "degrade": """
        hr = torch.rand(2, 3, 32, 48)
        for recipe in RECIPES:
            assert degrade(hr, recipe, 2, [1, 2]).shape == (2, 3, 16, 24)
    """,
    "tile": """
        from PIL import Image
        Image.new("RGBA", (40, 30), (200, 100, 50, 128)).save("a.png")
        picture = read_picture("a.png")
        up = Tiler(16, 8)(torch.nn.Upsample(scale_factor=2), picture.rgb[None], 2)
        assert up.shape == (1, 3, 60, 80)
        save_picture("b.png", Picture(rgb=up[0]))
        assert Image.open("b.png").size == (80, 60) and Image.open("b.png").getpixel((3, 3)) == (200, 100, 50)
    """,
    "demo": """
        draw_demo("drawn", train=1, val=1)
        assert len(list(Path("drawn").glob("*/*.png"))) == 2
    """,
    "metrics": """
        hr = torch.rand(3, 200, 200)
        assert psnr(hr, hr) == math.inf and ms_ssim(hr, hr) > 0.99 and ssim((hr + 0.1).clamp(0, 1), hr) < 1
        try:
            METRICS["niqe"].run(hr, None, None, 2, 0)
            raise SystemExit("a NIQE model out of nowhere")
        except ValueError as e:
            assert "no NIQE model" in str(e)
        save_niqe(fit_niqe([torch.rand(3, 672, 672)]), "m.safetensors")
        assert niqe(hr, load_niqe("m.safetensors")) < 20
    """,
    "report": """
        import numpy as np
        page = Report("page", "t", [Column("psnr", "PSNR")])
        page.add("a", {"x": np.zeros((9, 9, 3), np.uint8)}, {"x": {"psnr": 1}})
        assert page.finish().exists()
    """,
    "scrape": "",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """All of them at once: each waits for its own imports."""
    found = {}
    for name, job in JOBS.items():
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(ROOT / f"{name}.py", folder)
        job = f"from {name} import *\n" + textwrap.dedent(job)
        found[name] = subprocess.Popen([sys.executable, "-c", job], cwd=folder, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True)
    yield found
    for p in found.values():
        p.kill()
        p.wait()


@pytest.mark.parametrize("name", JOBS)
def test_alone(name, running):
    out, _ = running[name].communicate()
    assert running[name].returncode == 0, out


def test_nothing_imports_torchvision_at_the_top():
    done = subprocess.run([sys.executable, "-c", "import train, sys; sys.exit('torchvision' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0
