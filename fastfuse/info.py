"""What this installation is and can do: versions, commit, devices, and every op's backends."""

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any


@cache
def commit() -> str:
    """The commit: FASTFUSE_COMMIT, else that of the checkout, else the one it was built from, else "unknown"."""
    if given := os.environ.get("FASTFUSE_COMMIT"):
        return given
    package = Path(__file__).resolve().parent
    if (package.parent / ".git").exists():
        command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found = ""
        if found:
            return found
    recorded = package / "_commit.txt"
    return recorded.read_text().strip() if recorded.exists() else "unknown"


def versions() -> dict[str, str | None]:
    """Versions of this package and of what it stands on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("fastfuse", "torch", "torchvision", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: Any) -> str:
    """A GPU's name, or the processor's and the number of threads."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def info() -> dict[str, Any]:
    """Everything, as plain values."""
    import torch

    from fastfuse.kernels import _dispatch, _extension

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "commit": commit(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "devices": {device: device_name(device) for device in devices},
        "extension": _extension.state(),
        "ops": {op: {b: _dispatch.why_not(op, b) or "usable" for b in _dispatch.BACKENDS} for op in _dispatch.ops()},
    }
