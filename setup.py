"""What pyproject.toml cannot say: builds carry their commit, and the CUDA extension where it can be compiled.

FASTFUSE_BUILD=auto (the default) compiles it if nvcc and a PyTorch with CUDA are found in the build environment, which
takes `pip install --no-build-isolation .`; 1 insists; 0 leaves it out. Without it the package is pure Python. Nothing
is downloaded and no GPU is needed; see fastfuse/kernels/_build.py for TORCH_CUDA_ARCH_LIST and MAX_JOBS.
"""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from setuptools import __version__ as setuptools_version
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.dist import Distribution

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # without build isolation pip does not look at pyproject.toml's requirement
    sys.exit(f"fastfuse is built with setuptools 77 or newer, not {setuptools_version}: pip install 'setuptools>=77'")

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


@cache
def builder() -> ModuleType:
    """fastfuse/kernels/_build.py, loaded alone: the package itself may lack what it needs."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / "fastfuse" / "kernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def builds_extension() -> bool:
    """Whether the CUDA extension is compiled.

    Raises:
        SystemExit: FASTFUSE_BUILD has another value, or it is 1 and something is missing.
    """
    mode = os.environ.get("FASTFUSE_BUILD") or "auto"
    if mode not in ("auto", "0", "1"):
        sys.exit(f"FASTFUSE_BUILD is auto, 0 or 1, not {mode!r}")
    reason = None if mode == "0" else builder().missing()
    if mode == "1" and reason is not None:
        sys.exit(f"FASTFUSE_BUILD=1, but the CUDA extension cannot be built: {reason}")
    return mode != "0" and reason is None


class Build(build_py):
    """An editable install needs no commit, it runs from the checkout; a library is put beside the modules."""

    def run(self) -> None:
        """Copy the modules, then add what is made here."""
        super().run()
        if not self.editable_mode:
            write_commit(self.build_lib)
        if builds_extension():
            tree = ROOT if self.editable_mode else Path(self.build_lib)
            try:
                builder().build(tree / "fastfuse" / "kernels" / builder().library_name())
            except builder().CannotBuildError as error:
                sys.exit(f"the CUDA extension cannot be built: {error}; FASTFUSE_BUILD=0 leaves it out")


class Wheel(bdist_wheel):
    """A library without Python's interface serves every Python, on one kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, interface and platform of the wheel's name."""
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if builds_extension() else tag


class WithExtension(Distribution):
    """Tells installers whether there is anything compiled."""

    def has_ext_modules(self) -> bool:
        """Asked when the kind of wheel and the place of an installation are chosen."""
        return builds_extension()


class SourceWithCommit(sdist):
    """A source archive leaves the history behind."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Collect the files, then add the commit."""
        super().make_release_tree(base_dir, files)
        write_commit(base_dir)


setup(cmdclass={"build_py": Build, "sdist": SourceWithCommit, "bdist_wheel": Wheel}, distclass=WithExtension)
