import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastfuse import config
from fastfuse.cli import parse_train
from fastfuse.methods import METHODS
from fastfuse.train.build import resolved

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_plain_loop_of_the_readme_runs(tmp_path):
    (program,) = blocks("python")
    script = tmp_path / "loop.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert [line[0] for line in lines] == ["0", "1"]
    for term in ("student0_ce", "student1_dml", "student1_diversity", "fusion_kl", "transform1_feature"):
        assert term in lines[0]
    assert "nan" not in done.stdout


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("fastfuse train") and "--resume" not in line]


@pytest.mark.parametrize("command", commands())
def test_the_training_commands_of_the_readme_are_valid(command):
    arguments = shlex.split(command)[2:]
    settings = resolved(parse_train(arguments))
    assert settings.method in METHODS
    assert all(str(getattr(settings, a[2:].replace("-", "_"))) for a in arguments if a.startswith("--"))


def test_the_readme_names_every_method_and_recipe():
    assert all(f"`{name}`" in README for name in (*METHODS, *config.recipes()))
    for name, method in METHODS.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"`{method.deployed}`" in row and row.endswith(f"| {method.minimum_students} |")


def test_make_verbs_of_the_readme_exist():
    verbs = set(re.findall(r"make ([a-z-]+)", README))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test", "test-all", "bench"} <= verbs <= targets
