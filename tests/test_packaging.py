"""Source archive and wheel: what is in them, and that the wheel works where nothing else of the checkout is."""

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# Pure Python, whatever compilers this machine has; what is built from a copy knows no commit.
ENVIRONMENT = {**os.environ, "FASTFUSE_BUILD": "0", "PYTHONPATH": ""}


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**ENVIRONMENT, **environment}
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=900)


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """A copy of the checkout, as git sees it, and what `python -m build` makes of it."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    # Without isolation nothing is downloaded. Both kinds, the wheel from the source archive, then a wheel of the tree.
    for options in ([], ["--wheel", "-o", str(dist / "direct")]):
        done = run(sys.executable, "-m", "build", "--no-isolation", *(options or ["-o", str(dist)]), cwd=tree)
        assert done.returncode == 0, done.stdout + done.stderr
    (archive,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    (direct,) = (dist / "direct").glob("*.whl")
    return {"archive": archive, "wheel": wheel, "direct": direct}


@pytest.mark.long
def test_the_wheel_is_pure_and_complete(built):
    assert built["wheel"].name.endswith("-py3-none-any.whl")
    files = set(files_of(built["wheel"]))
    listed = subprocess.run(["git", "ls-files", "fastfuse"], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = {name for name in listed.stdout.split() if (ROOT / name).exists()} - files
    assert missing == set(), "files of the package that the wheel leaves behind"
    for one in (
        "py.typed",
        "data/digits.npz",
        "nn/strategies.json",
        "csrc/concat_fuse.cuh",
        "csrc/concat_fuse_forward.cu",
        "recipes/cifar100-wrn16_2.toml",
    ):
        assert f"fastfuse/{one}" in files
    assert "fastfuse/kernels/concat_fuse/README.md" in files
    strange = [n for n in files if not n.startswith(("fastfuse/", "fastfuse-")) or n.endswith((".so", ".pyc", ".o"))]
    assert strange == [], "tests, examples and compiled files have no place in a wheel"


@pytest.mark.long
def test_the_source_archive_builds_the_same_wheel(built):
    assert files_of(built["wheel"]) == files_of(built["direct"])
    with tarfile.open(built["archive"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "setup.py", "fastfuse/csrc/common.cuh"} <= names
    assert not any(name.endswith(".so") or name.startswith(("tests/", ".venv")) for name in names)


@pytest.mark.long
def test_the_installed_wheel_works_alone(built, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target))
    done = run(*pip, str(built["wheel"]), cwd=empty)
    assert done.returncode == 0, done.stderr
    path = {"PYTHONPATH": str(target)}
    where = run(sys.executable, "-c", "import fastfuse; print(fastfuse.__file__)", cwd=empty, **path)
    assert Path(where.stdout.strip()).is_relative_to(target)
    script = str(target / "bin" / "fastfuse")
    help_text = run(script, "--help", cwd=empty, **path)
    assert help_text.returncode == 0 and "fastfuse train --recipe" in help_text.stdout
    info = run(script, "info", "--json", cwd=empty, **path)
    assert info.returncode == 0, info.stderr
    found = json.loads(info.stdout)
    assert found["versions"]["torch"] and "reference" in found["ops"]["concat_fuse"]
    recipes = run(sys.executable, "-c", "from fastfuse import config; print(len(config.recipes()))", cwd=empty, **path)
    assert int(recipes.stdout) == len(list((ROOT / "fastfuse" / "recipes").glob("*.toml")))
    short = "--model resnet20 --data digits --epochs 1 --batch-size 256 --max-time 0.0001 --device cpu --quiet".split()
    trained = run(script, "train", *short, "--out", str(tmp_path / "run"), cwd=empty, **path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "checkpoint.pt").exists() and list(empty.iterdir()) == []


def test_the_citation_is_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "fastfuse"
    assert citation["authors"] == [{"name": "The fastfuse developers"}]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(citation[field] == project[field] for field in ("version", "license", "authors", "keywords"))
    assert citation["abstract"] == f"{project['description']}."
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_the_changelog_has_its_form():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert lines[0] == "# Changelog" and any("keepachangelog.com" in line for line in lines)
    assert [line for line in lines if line.startswith("## ")] == ["## [0.1.0] - unreleased"]
    parts = [line[4:] for line in lines if line.startswith("### ")]
    assert parts and set(parts) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
