"""The structure of the project: who imports whom, which files work alone, what an editor can change in one place."""
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
LEAF = ()
MAY_IMPORT = {      # at the top of a file; imports inside main() or a command's functions are free
    "images": LEAF, "model": LEAF, "losses": LEAF, "degrade": LEAF, "metrics": LEAF, "demo": LEAF, "optim": LEAF,
    "choose": LEAF, "scrape": LEAF, "fast": ("model",), "tile": ("images",), "report": ("images",),
    "convert": ("model",), "runs": ("images",), "pairs": ("images", "degrade"),
    "data": ("images", "degrade", "pairs"), "clean": ("images", "data"),
    "detect": ("losses", "degrade", "data", "images"),
    "evaluate": ("images", "pairs", "model", "fast", "convert", "tile", "degrade", "losses", "metrics", "report"),
    "train": ("images", "pairs", "model", "fast", "losses", "degrade", "data", "optim", "runs", "tile", "metrics",
              "demo"),
}


def imports_of(path):
    """Names of the modules that a file imports outside of functions."""
    names, nodes = set(), list(ast.parse(path.read_text(encoding="utf8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
        elif isinstance(node, (ast.Try, ast.If, ast.With)):
            nodes += ast.iter_child_nodes(node)
        elif isinstance(node, ast.ExceptHandler):
            nodes += node.body
    return names


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("train/0", "train/1", "val/0"):
        (folder / name).parent.mkdir(exist_ok=True)
        blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        blocks.resize((96, 96), Image.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def project(tmp_path):
    """A copy of the project that a test may edit."""
    for path in [*ROOT.glob("*.py"), ROOT / "report.html"]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "weights", tmp_path / "weights")
    return tmp_path


def run(project, *args, timeout=120):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=project, env=ENV, text=True, capture_output=True,
                          timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def train(project, pictures, *args):
    return run(project, "train.py", "--preset", "tiny", "--patch", 16, "--batch", 2, "--steps", 2, "--workers", 0,
               "--data", pictures / "train", "--val", pictures / "val", "--out", "runs/a", *args)


def edit(path, old, new):
    text = path.read_text(encoding="utf8")
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} places for this edit"
    path.write_text(text.replace(old, new), encoding="utf8")


# ---- who imports whom


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_imports(path):
    ours = {p.stem for p in ROOT.glob("*.py")}
    assert imports_of(path) & ours <= set(MAY_IMPORT[path.stem])


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_packages(path):
    """Only the packages of requirements.txt at the top, and torchvision nowhere at the top."""
    ours = {p.stem for p in ROOT.glob("*.py")}
    packages = imports_of(path) - ours - set(sys.stdlib_module_names)
    assert packages <= {"torch", "numpy", "PIL", "einops", "safetensors"}


# ---- files that work alone


LEAF_JOBS = {
    "images": """
        Image.new("RGBA", (40, 30), (200, 100, 50, 128)).save("a.png")
        picture = read_picture("a.png")
        save_picture("b.png", Picture(rgb=picture.rgb))
        assert Image.open("b.png").getpixel((3, 3)) == (200, 100, 50)
    """,
    "model": """
        save(HATRefiner.from_preset("tiny"), "w.safetensors")
        assert load("w.safetensors")(torch.rand(1, 3, 5, 7)).shape == (1, 3, 10, 14)
    """,
    "losses": """
        sr = torch.rand(1, 3, 32, 32, requires_grad=True)
        total, values = SRLoss("pix,edge")(sr, torch.rand(1, 3, 32, 32))
        total.backward()
        assert sr.grad.abs().max() > 0 and set(values) == {"pix", "edge"}
    """,
    "degrade": """
        for recipe in RECIPES:
            assert degrade(torch.rand(2, 3, 32, 48), recipe, 2, [1, 2]).shape == (2, 3, 16, 24)
    """,
    "metrics": """
        hr = torch.rand(3, 64, 64)
        assert psnr(hr, hr) == math.inf and ssim((hr + 0.1).clamp(0, 1), hr) < 1
    """,
    "demo": """
        draw_demo("drawn", train=1, val=1)
        assert len(list(Path("drawn").glob("*/*.png"))) == 2
    """,
    "optim": """
        p = torch.nn.Linear(20, 20)
        p.weight.grad = torch.rand(20, 20)
        Muon([p.weight]).step()
    """,
    "choose": "",
    "scrape": "",
    "tile": """
        up = Tiler(16, 8)(torch.nn.Upsample(scale_factor=2), torch.rand(1, 3, 30, 40), 2)
        assert up.shape == (1, 3, 60, 80)
    """,
}


@pytest.fixture(scope="module")
def leaf_processes(tmp_path_factory):
    """All of them at once, since each spends its time on importing torch."""
    processes = {}
    for name, job in LEAF_JOBS.items():
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(ROOT / f"{name}.py", folder)
        lines = [line[8:] for line in job.splitlines()]
        code = "\n".join(["import math", "import torch", "from PIL import Image", "from pathlib import Path",
                          f"from {name} import *", *lines])
        processes[name] = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=ENV, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield processes
    for p in processes.values():
        p.kill()
        p.wait()


@pytest.mark.parametrize("name", LEAF_JOBS)
def test_leaf_works_alone(name, leaf_processes):
    out, _ = leaf_processes[name].communicate()
    assert leaf_processes[name].returncode == 0, out


# ---- fast.py is optional, and steps aside for an edited model


def test_everything_works_without_fast(project, pictures):
    (project / "fast.py").unlink()
    code, out = train(project, pictures)
    assert code == 0, out
    code, out = run(project, "tile.py", pictures / "val/0.png", "-o", "sr.png", "--weights", "runs/a/best.safetensors")
    assert code == 0 and Image.open(project / "sr.png").size == (192, 192), out
    code, out = run(project, "evaluate.py", "--data", pictures / "val", "--recipe", "bicubic", "--weights",
                    "runs/a/best.safetensors")
    assert code == 0, out


def test_edited_model_changes_the_result(project, pictures):
    """An activation inside HAT.upsample would be lost in the merged upsampler; fast.py has to step aside."""
    tile = ("tile.py", pictures / "val/0.png", "--weights", "weights/clean-low.safetensors", "--amp", "off", "-o")
    code, out = run(project, *tile, "before.png")
    assert code == 0, out
    edit(project / "model.py", "        self.conv_last = ", "        self.upsample.append(nn.Tanh())\n        self.conv_last = ")
    code, out = run(project, *tile, "after.png")
    assert code == 0, out
    before, after = (np.asarray(Image.open(project / f"{n}.png")).astype(int) for n in ("before", "after"))
    assert abs(before - after).mean() > 1


# ---- one place to edit


def test_new_loss_term_takes_a_function_and_an_entry(project, pictures):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    function, entry = snippet(text, "loss function"), snippet(text, "loss entry")
    edit(project / "losses.py", "TERMS = {\n", f"{function}\n\nTERMS = {{\n{entry}")
    code, out = train(project, pictures, "--loss", "rmse,green=0.5")
    assert code == 0 and "green" in out, out


def test_new_recipe_takes_an_entry(project, pictures):
    entry = snippet((ROOT / "CONTRIBUTING.md").read_text(), "recipe entry")
    edit(project / "degrade.py", "RECIPES = {\n", "RECIPES = {\n" + entry)
    code, out = train(project, pictures, "--recipe", "blurry:0.5,bicubic:0.5")
    assert code == 0, out


def snippet(text, name):
    """The code block of CONTRIBUTING.md behind the comment <!-- name -->."""
    return text.split(f"<!-- {name} -->\n```python\n")[1].split("```")[0]
