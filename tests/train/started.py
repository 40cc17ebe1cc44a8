"""`fastfuse train` in a process group of its own, as a shell or a batch system starts it.

What is waited for is a condition; the limits are for what never comes, however busy the machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

# Seconds.
LIMIT = 300


def started(options: list[str], out: Path, *, launcher: Sequence[str] = (sys.executable,)) -> subprocess.Popen:
    """A run in progress: its first epoch is done."""
    command = [*launcher, "-m", "fastfuse", "train", *options, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    metrics, end = out / "metrics.jsonl", time.monotonic() + LIMIT
    while not (metrics.exists() and metrics.stat().st_size):  # it is there, empty, before signals are listened to
        assert process.poll() is None, process.stderr.read()
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no epoch has ended within {LIMIT} s")
        time.sleep(0.05)
    return process


def assert_nobody_is_left(process: subprocess.Popen) -> None:
    """Its workers end when it has ended: torch's look for their parent every five seconds."""
    end = time.monotonic() + LIMIT
    while left := _running(process.pid):
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"processes {left} outlived the run")
        time.sleep(0.1)


def _running(group: int) -> list[int]:
    """The processes of a group; not those that have ended, which the first process of a container may never collect."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just gone
            # pid (name) state parent group ...; the name may hold anything.
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found
