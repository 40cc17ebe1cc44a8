"""The package is typed: clean itself, and a user's mistakes are found where it is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RIGHT = """
import torch
import fastfuse
from fastfuse import functional

loss = fastfuse.FusionLoss([64, 64], num_classes=10, method="ffl")
maps = [torch.randn(2, 64, 4, 4) for _ in range(2)]
result: fastfuse.FusionLossOutput = loss(maps, [torch.randn(2, 10)] * 2, torch.zeros(2, dtype=torch.long))
distance: torch.Tensor = functional.attention_mse(maps, maps)
tapped = fastfuse.extract(torch.nn.Sequential(torch.nn.ReLU()), ["0"])
groups: list[dict[str, object]] = loss.parameter_groups(lr=0.1).sgd
"""
WRONG = {
    "method=3": ("fastfuse.FusionLoss([64, 64], num_classes=10, method=3)", "arg-type"),
    "no classes": ("fastfuse.FusionLoss([64, 64])", "call-arg"),
    "no such option": ("fastfuse.FusionLoss([64, 64], num_classes=10, tau=2.0)", "call-arg"),
    "no such name": ("fastfuse.FusionLos", "attr-defined"),
    "an operator's option": ("fastfuse.functional.attention_mse([], [], reduction=1)", "arg-type"),
    "taps by number": ("fastfuse.extract(torch.nn.ReLU(), [4])", "list-item"),
}


def mypy(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    cache = ROOT / ".mypy_cache" if cwd == ROOT else cwd / ".mypy_cache"
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *arguments]
    environment = {**os.environ, "MYPYPATH": "", "PYTHONPATH": "" if cwd == ROOT else str(cwd / "site")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder like a user's, and the package where installed ones are found, by its py.typed."""
    folder = tmp_path_factory.mktemp("user")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", ".build_*")
    shutil.copytree(ROOT / "fastfuse", folder / "site" / "fastfuse", ignore=unwanted)
    (folder / "right.py").write_text(RIGHT)
    for i, (line, _) in enumerate(WRONG.values()):
        (folder / f"wrong{i}.py").write_text(f"import torch\nimport fastfuse\n{line}\n")
    return folder


@pytest.mark.long
def test_the_package_is_clean():
    done = mypy(cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "no issues found" in done.stdout


@pytest.mark.long
def test_users_are_told_of_wrong_types(installed):
    done = mypy(*(file.name for file in installed.glob("*.py")), cwd=installed)
    assert "import-untyped" not in done.stdout and "import-not-found" not in done.stdout, done.stdout
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("right.py")] == []
    for i, (name, (_, code)) in enumerate(WRONG.items()):
        own = [line for line in lines if line.startswith(f"wrong{i}.py") and "error:" in line]
        assert len(own) == 1 and f"[{code}]" in own[0], f"{name}: {own}"
