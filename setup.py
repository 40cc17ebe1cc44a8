"""What pyproject.toml cannot say: a wheel or source archive built from a checkout carries its commit."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent


def write_commit(tree: str) -> None:
    """Write fastfuse/_commit.txt below `tree`, the folder being built, if this checkout or source archive knows it."""
    packed = ROOT / "fastfuse" / "_commit.txt"
    commit = packed.read_text() if packed.exists() else ""
    if (ROOT / ".git").exists():  # else git would answer for a checkout around an unpacked source archive
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout
        except OSError:
            print("no git on this machine: the package will not know its commit")
    if commit:
        (Path(tree) / "fastfuse" / "_commit.txt").write_text(commit)


class BuildWithCommit(build_py):
    """An editable install needs no file: it runs from the checkout."""

    def run(self) -> None:
        """Copy the modules, then add the commit."""
        super().run()
        if not self.editable_mode:
            write_commit(self.build_lib)


class SourceWithCommit(sdist):
    """A source archive leaves the history behind."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Collect the files, then add the commit."""
        super().make_release_tree(base_dir, files)
        write_commit(base_dir)


setup(cmdclass={"build_py": BuildWithCommit, "sdist": SourceWithCommit})
