"""Compile fastfuse/csrc with nvcc; standard library only, so that setup.py can use it before anything is installed.

    python fastfuse/kernels/_build.py     builds into this folder, for a checkout (`make build`)

Needs nvcc and a PyTorch with CUDA, but no GPU; downloads nothing. The library uses PyTorch's stable interface and no
Python at all: one file serves every supported PyTorch and every Python. Its name carries a fingerprint of the sources,
so a file built from others is never loaded. TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
# Device code of A100 and H100/H200, and PTX from which later GPUs compile their own.
ARCHITECTURES = "8.0;9.0+PTX"
# The oldest supported PyTorch; Python's limited interface is named in case one of PyTorch's headers asks for Python.
FLAGS = [
    "-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030b0000",
    "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror",
]  # fmt: skip


class CannotBuildError(RuntimeError):
    """What is missing, or what nvcc said, in one line."""


@cache
def fingerprint() -> str:
    """12 hexadecimal digits that change with the sources and the flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def library_name() -> str:
    """The file that a build from these sources is kept in."""
    return f"_cuda_{fingerprint()}.so"


def toolkit() -> Path:
    """The CUDA toolkit's own folder: CUDA_HOME, CUDA_PATH, or that of the nvcc on the PATH.

    The nvcc on the PATH may be a link or a script elsewhere, so it is asked for its folder.

    Raises:
        CannotBuildError: none of them holds an nvcc.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if named := os.environ.get(variable):
            if (Path(named) / "bin" / "nvcc").exists():
                return Path(named)
            raise CannotBuildError(f"{variable}={named} holds no bin/nvcc")
    if (nvcc := shutil.which("nvcc")) is None:
        raise CannotBuildError("there is no nvcc, neither on the PATH nor named by CUDA_HOME")
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return (Path(top[1]) if top else Path(nvcc).resolve().parents[1]).resolve()


def torch_folder() -> Path:
    """The installed PyTorch's package folder, found without importing it.

    Raises:
        CannotBuildError: no PyTorch, or one without CUDA.
    """
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise CannotBuildError("torch cannot be found in this environment (pip install --no-build-isolation shows it)")
    folder = Path(spec.origin).parent
    if not (folder / "lib" / "libtorch_cuda.so").exists():
        raise CannotBuildError("the PyTorch in this environment is built without CUDA")
    return folder


def architectures() -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", or for the default.

    Raises:
        CannotBuildError: an entry that is no compute capability.
    """
    found = []
    for entry in re.split(r"[;\s]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES).strip()):
        if not (match := re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)):
            raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST takes entries such as 9.0 or 9.0+PTX, not {entry!r}")
        number = match[1] + match[2]
        codes = [f"sm_{number}", *([f"compute_{number}"] if match[3] else [])]
        found += ["-gencode", f"arch=compute_{number},code=[{','.join(codes)}]"]
    return found


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    try:
        toolkit(), torch_folder(), architectures()
    except CannotBuildError as error:
        return str(error)
    return None


def jobs() -> int:
    """How many files are compiled at once: MAX_JOBS, or one for each processor."""
    named = os.environ.get("MAX_JOBS", "")
    return max(1, int(named)) if named.isdigit() else os.cpu_count() or 1


def build(target: Path) -> None:
    """Compile all sources and put the library at `target`, whole or not at all.

    Raises:
        CannotBuildError: something is missing, or nvcc refuses a file.
    """
    cuda, torch = toolkit(), torch_folder()
    nvcc = [str(cuda / "bin" / "nvcc"), *architectures()]
    include = ["-isystem", str(torch / "include")]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build_") as folder:
        sources = [path for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".cpp")]
        objects = [str(Path(folder) / f"{path.name}.o") for path in sources]
        commands = [
            [*nvcc, *FLAGS, *include, "-c", str(path), "-o", out] for path, out in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(jobs()) as pool:
            list(pool.map(_run, commands))
        out = Path(folder) / "library.so"
        libraries = ["-L", str(torch / "lib"), "-lc10", "-ltorch_cpu", "-ltorch_cuda", "-L", str(cuda / "lib64")]
        _run([*nvcc, "-shared", "-cudart", "shared", *objects, *libraries, "-o", str(out)])
        os.replace(out, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = done.stdout.splitlines() or ["no word"]
        lines = [line for line in said if "error" in line] or said
        raise CannotBuildError(f"nvcc exits with {done.returncode}: {lines[0].strip()}")


if __name__ == "__main__":
    place = Path(__file__).with_name(library_name())
    try:
        build(place)
    except CannotBuildError as failure:
        sys.exit(f"the CUDA extension cannot be built: {failure}")
    for stale in place.parent.glob("_cuda_*.so"):
        if stale != place:
            stale.unlink()
    print(f"built {place}")
