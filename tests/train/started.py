"""`fastfuse train` in a process group of its own, as a shell or a batch system starts it."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest


def started(options: list[str], out: Path, *, launcher: Sequence[str] = (sys.executable,)) -> subprocess.Popen:
    """A run in progress: its first epoch is done."""
    command = [*launcher, "-m", "fastfuse", "train", *options, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):  # it is there, empty, before signals are listened to
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


def assert_nobody_is_left(process: subprocess.Popen, seconds: float = 15) -> None:
    """Its workers end when it has ended: torch's look for their parent every five seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, 9)
    pytest.fail("processes outlived the run")
