"""The sources of fastfuse/csrc compiled for the host by g++, so that CUDA C++ kernels run without a GPU.

cuda_runtime.h beside this file takes the place of CUDA's. With FASTFUSE_SANITIZE=1, and the sanitizer's library loaded
before Python, AddressSanitizer watches all that kernels read and write:

    FASTFUSE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so) \
    $(g++ -print-file-name=libstdc++.so)" python -m pytest tests/kernels/test_cuda_kernels.py -m "not gpu"
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastfuse.kernels import _build

HERE = Path(__file__).parent
# Products and sums become fused multiply-adds where the processor has them, as nvcc makes them. Warnings about CUDA's
# pragmas and about what `if constexpr` leaves unused are nvcc's business.
FLAGS = [
    *["-march=native", "-ffp-contract=fast"],
    *["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-w"],
    *["-DFASTFUSE_EMULATED", "-DFASTFUSE_DEVICE=CPU", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-I", str(HERE)],
    # So that small maps already exceed it.
    "-DFASTFUSE_MOST_SHARED=4096",
]
if os.environ.get("FASTFUSE_SANITIZE") == "1":
    FLAGS += ["-fsanitize=address", "-g", "--param", "asan-stack=0"]  # fibers have stacks that it does not know


def missing() -> str | None:
    """Why the sources cannot be compiled here."""
    return None if shutil.which("g++") else "there is no g++"


def build(folder: Path) -> Path:
    """The library, whose kernels serve CPU tensors in the namespace fastfuse_cuda."""
    import torch

    root = Path(torch.__file__).parent
    sources = [path for path in sorted(_build.SOURCES.iterdir()) if path.suffix in (".cu", ".cpp")]
    objects = [folder / f"{path.name}.o" for path in sources]

    def compile_one(pair: tuple[Path, Path]) -> None:
        command = ["g++", *FLAGS, "-isystem", str(root / "include"), "-c", str(pair[0]), "-o", str(pair[1])]
        run(command)

    with ThreadPoolExecutor(_build.jobs()) as pool:
        list(pool.map(compile_one, zip(sources, objects, strict=True)))
    library = folder / "emulated.so"
    run(["g++", "-shared", *map(str, objects), "-L", str(root / "lib"), "-lc10", "-ltorch_cpu", "-o", str(library)])
    return library


def run(command: list[str]) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout
