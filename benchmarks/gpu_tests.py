"""The tests marked `gpu`: processes for each operator, many at once, and which operators are red after them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# What tests call operators of another name by.
ALIASES = {"attention_map": "attention_mse", "diversity": "diversity_target", "peer_kl": "peer_kl_ce"}
# One call of every kernel is enough for the sanitizer, which makes each a hundred times slower.
SHORT = re.compile(r"(triton_equals|on_a_gpu).*\[(?=.*float32)(?=.*channels_last)")
# By name of the shard, and at most so many at once beside nothing else: tens of GB of GPU memory, or a measurement.
APART = {"large": (re.compile("beyond_32_bits"), 3), "alone": (re.compile("test_benchmarks_gpu"), 1)}
NO_TIME = "no time"
MOST = 24  # tests of a process: one that takes long must not be the last


@dataclass
class Result:
    """What processes of tests gave.

    Attributes:
        passed: how many tests.
        bad: tests that failed, were skipped, or of which nothing was heard, with the reason.
        red: operators with such a test, but for those that were skipped or never began: nothing says that these are
            wrong.
    """

    passed: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    red: set[str] = field(default_factory=set)


def op_of(test: str, ops: Sequence[str]) -> str | None:
    """The operator that a test's parameters begin with; None for a test of something else."""
    given = test.partition("[")[2]
    names = {**{op: op for op in ops}, **ALIASES}
    found = [name for name in names if given.startswith(name)]
    return names[max(found, key=len)] if found else None


def shards(tests: Sequence[str], ops: Sequence[str]) -> dict[str, list[str]]:
    """Tests by operator, those of something else by file, in pieces "NAME-1", "NAME-2" of MOST tests at most.

    Those of `APART` are "large-1", "alone-1" and so on.
    """
    found: dict[str, list[str]] = {}
    for test in tests:
        own = [name for name, (tests_of, _) in APART.items() if tests_of.search(test)]
        name = own[0] if own else op_of(test, ops) or Path(test.partition("::")[0]).stem
        found.setdefault(name, []).append(test)
    return {
        f"{name}-{i // MOST + 1}": own[i : i + MOST] for name, own in found.items() for i in range(0, len(own), MOST)
    }


def kind_of(shard: str) -> str:
    """The name of a shard without its number."""
    return shard.rpartition("-")[0]


def collected() -> list[str]:
    """All tests marked `gpu`.

    Raises:
        RuntimeError: pytest finds none.
    """
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    done = subprocess.run([*PYTEST, "--collect-only", "-m", "gpu", *files], cwd=ROOT, capture_output=True, text=True)
    tests = [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    if done.returncode or not tests:
        raise RuntimeError(f"pytest collects no gpu tests: {done.stdout[-500:]}")
    return tests


def heard(report: Path, log: Path, tests: Sequence[str]) -> dict[str, str]:
    """Outcomes of tests: "passed", or what went wrong.

    Args:
        report: of pytest's --junitxml, which is written at the end.
        log: what pytest said; of a process that was cut off it is all there is.
        tests: that it was to run.
    """
    if not report.exists():
        return from_log(log.read_text(errors="replace"), tests) if log.exists() else {}
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        word = f"{bad[0].tag}: {bad[0].get('message', '')[:200]}" if bad else "passed"
        outcomes[f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"] = word
    return outcomes


def from_log(text: str, tests: Sequence[str]) -> dict[str, str]:
    """Outcomes of tests in what `pytest -v` said before it ended too early; nothing of tests that had not begun."""
    words = {"PASSED": "passed", "FAILED": "failure", "ERROR": "error", "SKIPPED": "skipped"}
    found = {}
    for test in tests:
        _, begun, rest = text.partition(f"{test} ")
        if begun:
            found[test] = words.get(rest.split(maxsplit=1)[0] if rest.strip() else "", "it was running at the end")
    return found


def run(
    tests: Sequence[str], ops: Sequence[str], out: Path, *, seconds: float | None, jobs: int, tool: str | None = None
) -> Result:
    """Run tests, perhaps under a tool of compute-sanitizer; a log for each process goes to `out`."""
    end = None if seconds is None else time.monotonic() + seconds
    # Operators first: what is timed later depends on them, and the time may be over before the end.
    groups = sorted(shards(tests, ops).items(), key=lambda entry: (kind_of(entry[0]) not in ops, -len(entry[1])))
    out.mkdir(parents=True, exist_ok=True)

    def one(entry: tuple[str, list[str]]) -> tuple[str, int | None]:
        name, own = entry
        # Without PyTorch's own cache every tensor has bounds that the sanitizer knows.
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"] if tool == "memcheck" else []
        prefix = [*uncached, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] if tool else []
        left = None if end is None else end - time.monotonic()
        command = [*prefix, *PYTEST, "-vv", f"--junitxml={out / name}.xml", *own]
        return name, None if left is not None and left < 5 else limited(command, out / f"{name}.log", left)

    with ThreadPoolExecutor(jobs) as pool:
        statuses = dict(pool.map(one, [entry for entry in groups if kind_of(entry[0]) not in APART]))
    for kind, (_, most) in APART.items():
        with ThreadPoolExecutor(min(most, jobs)) as pool:
            statuses |= dict(pool.map(one, [entry for entry in groups if kind_of(entry[0]) == kind]))
    given = dict(groups)
    return judged(given, ops, statuses, lambda name: heard(out / f"{name}.xml", out / f"{name}.log", given[name]))


def judged(
    groups: dict[str, list[str]],
    ops: Sequence[str],
    statuses: dict[str, int | None],
    outcomes_of: Callable[[str], dict[str, str]],
) -> Result:
    """One result of all processes; None is the status of one that was cut off or never began.

    Args:
        groups: the tests of each.
        ops: all operators.
        statuses: exit statuses.
        outcomes_of: what was heard of the tests of one.
    """
    result = Result()
    for name, tests in groups.items():
        outcomes, status = outcomes_of(name), statuses[name]
        nothing = NO_TIME if status is None else f"nothing was heard (exit status {status})"
        said = {test: outcomes.get(test, nothing) for test in tests}
        result.passed += sum(what == "passed" for what in said.values())
        bad = {test: what for test, what in said.items() if what != "passed"}
        if status and not bad:  # the sanitizer says so at the end of a process, not of a test
            bad[name] = f"exit status {status}"
        result.bad |= bad
        result.red |= {
            op for test, what in bad.items() if not what.startswith(("skipped", NO_TIME))
            if (op := op_of(test, ops) or kind_of(name)) in ops
        }  # fmt: skip
    return result


def limited(command: Sequence[str], log: Path, seconds: float | None) -> int | None:
    """Exit status of a command, its output in a file; None if the time was over: then all that it started is ended."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # the checkout need not be installed
    # Triton's own folder; named, because torch.compile would take another one for all kernels of its processes.
    caches = {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **caches, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path)},
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def missing_tool() -> str | None:
    """Why nothing can be sanitized here, or None."""
    return None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on the PATH"
