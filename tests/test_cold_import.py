"""Importing fastfuse does nothing else, and what is missing on a machine is missed only by what needs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "triton", "numpy", "torchvision", "rich", "tyro", "safetensors", "matplotlib"}
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)
sys.meta_path.insert(0, Blocked())
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, run in the checkout so that `fastfuse` is the one under test."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def complaints(importtime: str) -> str:
    """Standard error without the output of `-X importtime`."""
    return "\n".join(line for line in importtime.splitlines() if not line.startswith("import time:"))


def imported(importtime: str) -> set[str]:
    """Top-level names in the output of `-X importtime`."""
    return {name.partition(".")[0] for name in re.findall(r"^import time:.*\|\s*(\S+)$", importtime, re.MULTILINE)}


def test_import_loads_nothing_heavy_and_prints_nothing():
    done = python("-X", "importtime", "-c", "import fastfuse")
    assert done.returncode == 0, complaints(done.stderr)
    assert "fastfuse" in imported(done.stderr)  # else the next line would prove nothing
    assert imported(done.stderr) & HEAVY == set()
    assert done.stdout == "" and complaints(done.stderr) == ""


@pytest.mark.parametrize(
    "names",
    [
        pytest.param({"triton"}, id="no triton: a CPU build of torch, or no Linux"),
        pytest.param({"torchvision", "matplotlib"}, id="no torchvision: it breaks beside a torch it was not built for"),
    ],
)
def test_every_public_name_loads_without(names):
    done = python(
        "-c",
        BLOCK.format(names=names) + "import fastfuse.functional\n"
        "for name in fastfuse.__all__: print(name, getattr(fastfuse, name) is not None)\n"
        f"print('loaded', {names!r} & set(sys.modules))",
    )
    assert done.returncode == 0, done.stderr
    *public, loaded = done.stdout.splitlines()
    assert len(public) > 1 and all(line.endswith(" True") for line in public), done.stdout
    assert loaded == "loaded set()"


def test_the_block_blocks():
    done = python("-c", BLOCK.format(names={"json"}) + "import json")
    assert done.returncode == 1 and "blocked by the test" in done.stderr


def test_public_names_are_listed_and_an_unknown_one_is_an_attribute_error():
    done = python(
        "-c",
        "import fastfuse\nassert set(fastfuse.__all__) <= set(dir(fastfuse))\n"
        "try: fastfuse.no_such_name\nexcept AttributeError as error: print(error)",
    )
    assert done.returncode == 0, done.stderr
    assert "no_such_name" in done.stdout


def test_help_answers_without_torch():
    done = python("-X", "importtime", "-m", "fastfuse", "--help")
    assert done.returncode == 0, complaints(done.stderr)
    assert "train" in done.stdout
    assert imported(done.stderr) & {"torch", "torchvision", "triton", "numpy", "matplotlib"} == set()
