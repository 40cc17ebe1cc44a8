import re
from pathlib import Path

import pytest

from fastfuse import config
from fastfuse.cli import parse_train
from fastfuse.methods import METHODS
from fastfuse.train.build import resolved
from tests.guides import blocks, run_block, training_arguments

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_plain_loop_of_the_readme_runs(tmp_path):
    (program,) = blocks(README, "python")
    done = run_block(*program, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert [line[0] for line in lines] == ["0", "1"]
    for term in ("student0_ce", "student1_dml", "student1_diversity", "fusion_kl", "transform1_feature"):
        assert term in lines[0]
    assert "nan" not in done.stdout


@pytest.mark.parametrize("arguments", training_arguments(README), ids=" ".join)
def test_the_training_commands_of_the_readme_are_valid(arguments):
    settings = resolved(parse_train(arguments))
    assert settings.method in METHODS
    assert all(str(getattr(settings, a[2:].replace("-", "_"))) for a in arguments if a.startswith("--"))


def test_the_readme_names_every_method_and_recipe():
    assert all(f"`{name}`" in README for name in (*METHODS, *config.recipes()))
    for name, method in METHODS.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        fewest = method.minimum_students if method.has_students else 0
        assert f"`{method.deployed}`" in row and row.endswith(f"| {fewest} |")


def test_make_verbs_of_the_readme_exist():
    verbs = set(re.findall(r"make ([a-z-]+)", README))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test", "test-all", "bench"} <= verbs <= targets
