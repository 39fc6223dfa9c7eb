"""The pages: every command is parsed by its script, files and links exist, and three commands run."""
import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import degrade
import losses
import metrics

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), ROOT / "weights/README.md", ROOT / "CONTRIBUTING.md"])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


class Parsed(Exception):
    """The arguments of a command fit its parser. args[0]: the namespace."""


def read(page):
    return page.read_text(encoding="utf8")


def commands(page):
    """Yield the commands in the code blocks that run a script of ours, as lists of words: script, arguments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", read(page), re.S | re.M)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if re.match(r"(\$ )?(python|torchrun) ", line) else []
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if scripts:     # not `python -m pytest`
            yield words[scripts[0]:]


def parse(words, monkeypatch):
    """Parse a command with the parser of its script -> namespace. A wrong flag raises SystemExit."""
    original, path = argparse.ArgumentParser.parse_args, ROOT / words[0]

    def parse_args(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(path.parent)
        module = importlib.import_module(path.stem)
        with pytest.raises(Parsed) as parsed:
            (module.parse if hasattr(module, "parse") else module.main)()
    return parsed.value.args[0]


@each_page
def test_commands(page, monkeypatch, capsys):
    for words in commands(page):
        for word in words:
            path = word.partition("=")[2] or word
            ours = word == words[0] or path.startswith(("weights/", "docs/", "tests/"))
            assert not ours or (ROOT / path).exists(), f"{path} does not exist"
        try:
            args = parse(words, monkeypatch)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")
        degrade.parse_recipe(getattr(args, "recipe", None) or "bicubic")
        losses.parse_loss(getattr(args, "loss", "rmse"))
        metrics.parse_metrics(getattr(args, "metrics", None) or "psnr_y", metrics.METRICS | {"seconds": None})


@each_page
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if path.startswith(("http://", "https://")):
            continue
        assert target.exists(), f"{link} does not exist"
        headings = re.findall(r"^#+ (.*)", read(target), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}, link
    for path in re.findall(r"`((?:weights|docs|tests)/[\w./-]+)`", read(page)):
        assert (ROOT / path).exists() or (ROOT / f"{path}.safetensors").exists(), f"{path} does not exist"


def test_readme_is_short_and_the_chinese_one_says_the_same():
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    assert len(read(english).splitlines()) <= 170 and len([*commands(english)]) >= 4
    assert [*commands(english)] == [*commands(chinese)]
    assert re.findall(r"\d+\.\d+", read(english)) == re.findall(r"\d+\.\d+", read(chinese))


@pytest.mark.parametrize("words", [
    "train", "tile", "evaluate", "scrape", "runs", "demo", "degrade", "data", "clean", "clean clean", "clean multiscale",
    "clean mine", "detect", "detect train", "detect measure", "detect inspect", "convert", "convert info", "convert export",
    "convert blend"])
def test_help(words, monkeypatch, capsys):
    script, *command = words.split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *command, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main()
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.slow
def test_three_commands_of_the_readme(tmp_path):
    for path in [*ROOT.glob("*.py"), ROOT / "weights"]:
        shutil.copytree(path, tmp_path / path.name) if path.is_dir() else shutil.copy(path, tmp_path)
    for command, more, result in (
            ("python demo.py drawn", [], "drawn/val/000.png"),
            ("python tile.py wallpaper.png", [], "wallpaper-2x.png"),
            ("python train.py --stage 1 --patch 64", ["--steps", "2", "--out", "runs/stage3-low-2x"],
             "runs/stage3-low-2x/curves.png"),
            ("python convert.py export runs/stage3-low-2x/best.safetensors mine.safetensors", [], "mine.safetensors")):
        assert command in read(ROOT / "README.md") or "demo.py" in command
        done = subprocess.run([sys.executable, *command.split()[1:], *more], cwd=tmp_path, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=900)
        assert done.returncode == 0 and (tmp_path / result).exists(), done.stderr
        if "demo.py" in command:
            Image.open(tmp_path / result).crop((0, 0, 160, 96)).save(tmp_path / "wallpaper.png")
