"""Everything that only a GPU can tell, in one call and within a time: `make gpu-check [OUT=DIR] [COMMIT=...]`.

    python benchmarks/gpu_check.py                                   # tests, sanitizer, short times: no limit of time
    python benchmarks/gpu_check.py --parts all --max-time 540 --pack --out first
    python benchmarks/gpu_check.py --parts all --max-time 540 --pack --out second --after first

Each part (`gpu_parts.py`) is a process with a time of its own, and its results are saved as it ends. A part that fails
costs the others nothing. Operators with a red test are left out of what times operators. With `--after` what is done
already is left out, and what was not finished goes on. Uses the running interpreter, installs nothing, needs neither
network nor git. Without a GPU it writes nothing. Exit status 0 only if every part asked for is done and right.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

# Run as a script, Python looks in this folder only: the package and its neighbour fastfuse lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_tests
from benchmarks.command import one_line_on_error
from benchmarks.gpu_parts import CHECK, NAMES, PARTS, TIMES_OPERATORS, Part, allotted
from benchmarks.gpu_summary import summary
from fastfuse.errors import InputError, unknown_name
from fastfuse.train.files import write_atomic

ARCHIVE, STATE, SUMMARY = "results.tar.gz", "state.json", "summary.txt"
OVER = "the time was over"


class Check:
    """The parts of one call, and what earlier calls have left.

    Args:
        work: folder for the results, a folder for each part.
        end: when the time is over, as of time.monotonic; None: never.
        where: device, versions and commit.
        ops: all operators.
        launches: which operator each launch belongs to that can be tuned.
    """

    def __init__(
        self, work: Path, end: float | None, where: dict[str, Any], ops: Sequence[str], launches: dict[str, str]
    ) -> None:
        self.work, self.end, self.where, self.ops, self.launches = work, end, where, ops, launches
        self.parts: dict[str, dict[str, Any]] = {}
        self.red: list[str] = []
        self.before: Path | None = None

    def after(self, folder: Path) -> None:
        """Go on where an earlier call stopped.

        Raises:
            InputError: there is none, or it was of another commit or device.
        """
        archive = folder / ARCHIVE
        if archive.exists():
            place = Path(tempfile.mkdtemp(prefix="gpu_check_"))
            with tarfile.open(archive) as packed:
                packed.extractall(place, filter="data")
            folder = place
        try:
            state = json.loads((folder / STATE).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"--after {folder} holds no earlier check: {error}") from error
        for key in ("device", "commit"):
            if state["where"][key] != self.where[key]:
                raise InputError(
                    f"--after {folder} was measured with {key} {state['where'][key]}, here it is {self.where[key]}: "
                    "begin anew, without --after"
                )
        done = {name: part for name, part in state["parts"].items() if part["status"] in ("ok", "before")}
        self.parts |= {name: {**part, "status": "before"} for name, part in done.items()}
        self.red = state["red"] if "tests" in state["parts"] else []
        self.before = folder

    def run(self, part: Part) -> None:
        """One part; what became of it goes into `parts`."""
        if self.parts.get(part.name, {}).get("status") == "before":
            return
        left = None if self.end is None else self.end - time.monotonic()
        seconds, began = allotted(part, left), time.monotonic()
        if seconds == 0:
            self.parts[part.name] = {"status": "no time", "seconds": 0.0, "said": []}
            return
        print(f"== {part.name}" + ("" if seconds is None else f", {seconds:.0f} s at most"), flush=True)
        found = self._program(part, seconds) if part.command else self._tests(part, seconds)
        self.parts[part.name] = {"seconds": round(time.monotonic() - began, 1), **found}
        print("\n".join([*found["said"], f"== {part.name}: {found['status']}"]), flush=True)

    def _program(self, part: Part, seconds: float | None) -> dict[str, Any]:
        out = self.work / part.name
        out.mkdir(parents=True, exist_ok=True)
        more = self._kept_from_before(part, out)
        if part.name in TIMES_OPERATORS:
            names = self._left(part, out)
            if not names:
                return {"status": "refused", "said": ["every operator is red or done"]}
            more += [TIMES_OPERATORS[part.name], ",".join(names)]
        log = out / "log.txt"
        status = gpu_tests.limited(part.argv(str(out), seconds, more), log, seconds)
        text = log.read_text(errors="replace")
        said = [line.rstrip() for line in text.splitlines() if line.strip()][-part.shown :]
        word = "cut off" if status is None else "failed" if status else "partial" if OVER in text else "ok"
        return {"status": word, "said": said}

    def _kept_from_before(self, part: Part, out: Path) -> list[str]:
        """What an earlier call measured of this part; options that leave it out."""
        own = None if self.before is None else self.before / part.name
        if own is None or not own.exists():
            return []
        if part.name == "kernels" and (files := sorted(own.glob("kernels_*.json"))):
            for file in files:
                shutil.copy(file, out)
            return ["--after", *map(str, files)]
        if part.name == "tune":
            for file in own.glob("*.json"):
                shutil.copy(file, out)
        return []

    def _left(self, part: Part, out: Path) -> list[str]:
        """The operators or launches that are not red, of launches those that are not tuned."""
        if part.name != "tune":
            return [op for op in self.ops if op not in self.red]
        log = out / "tune.json"
        tuned = {row["launch"] for row in json.loads(log.read_text())["searches"]} if log.exists() else set()
        if log.exists():
            log.rename(out / f"tune_{len(tuned)}.json")
        return [launch for launch, op in self.launches.items() if op not in self.red and launch not in tuned]

    def _tests(self, part: Part, seconds: float | None) -> dict[str, Any]:
        tool = None if part.name == "tests" else part.name
        if tool and (reason := gpu_tests.missing_tool()):
            return {"status": "failed", "said": [reason]}
        began = time.monotonic()
        try:
            tests = gpu_tests.collected()
        except RuntimeError as error:
            self.red = list(self.ops)
            return {"status": "failed", "said": [str(error)]}
        if tool:
            tests = [test for test in tests if gpu_tests.SHORT.search(test)]
        left = None if seconds is None else seconds - (time.monotonic() - began)
        jobs = max(1, min(12, (os.cpu_count() or 2) - 2))
        result = gpu_tests.run(tests, self.ops, self.work / part.name, seconds=left, jobs=jobs, tool=tool)
        self.red = sorted({*self.red, *result.red})
        said = [f"{result.passed} of {len(tests)} passed; red operators: {', '.join(sorted(result.red)) or 'none'}"]
        said += [f"{test}: {why}" for test, why in list(result.bad.items())[:25]]
        return {"status": "failed" if result.bad else "ok", "said": said, "bad": result.bad}

    def save(self) -> str:
        """Write what is known so far; the summary."""
        self.work.mkdir(parents=True, exist_ok=True)
        state = {"where": self.where, "parts": self.parts, "red": self.red}
        (self.work / STATE).write_text(json.dumps(state, indent=1) + "\n")
        text = summary(state, self.work)
        (self.work / SUMMARY).write_text(text)
        return text


def pack(work: Path, out: Path) -> None:
    """All results as one file beside the summary, replaced as a whole."""
    out.mkdir(parents=True, exist_ok=True)

    def write(file: IO[bytes]) -> None:
        with tarfile.open(fileobj=file, mode="w:gz") as packed:
            for path in sorted(work.iterdir()):
                packed.add(path, path.name)

    write_atomic(out / ARCHIVE, write)
    shutil.copy(work / SUMMARY, out / SUMMARY)


def chosen(text: str | None) -> list[Part]:
    """The parts that are named, in their own order.

    Raises:
        InputError: an unknown one.
    """
    names = list(CHECK) if text is None else list(NAMES) if text == "all" else text.split(",")
    for name in names:
        if name not in NAMES:
            raise unknown_name("part", name, NAMES)
    return [part for part in PARTS if part.name in names and not (text == "all" and part.name == "short")]


def surroundings() -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Device, versions and commit; all operators; the operator of every launch that can be tuned."""
    import torch

    from benchmarks.launch_space import SEARCHES
    from benchmarks.report import environment
    from fastfuse.kernels import _dispatch

    ops, launches = list(_dispatch.ops()), {search.launch: search.op for search in SEARCHES}
    return environment(torch.device("cuda", torch.cuda.current_device())), ops, launches


@one_line_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if everything was done and right."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help=f"names with commas, or all ({','.join(CHECK)}): {', '.join(NAMES)}")
    parser.add_argument("--max-time", type=float, help="seconds for all of it (no limit)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results/<gpu>)")
    parser.add_argument("--pack", action="store_true", help=f"leave two files there, {ARCHIVE} and {SUMMARY}")
    parser.add_argument("--after", type=Path, help="folder of an earlier call with the same commit, to go on from")
    options = parser.parse_args(arguments)
    parts = chosen(options.parts)
    import torch

    if not torch.cuda.is_available():
        raise InputError("gpu-check needs an NVIDIA GPU: torch.cuda.is_available() is False; nothing was run")
    where, ops, launches = surroundings()
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = options.out or gpu_tests.ROOT / "benchmarks" / "results" / name
    work = Path(tempfile.mkdtemp(prefix="gpu_check_")) if options.pack else out
    end = None if options.max_time is None else began + options.max_time
    check = Check(work, end, where, ops, launches)
    if options.after is not None:
        check.after(options.after)
    return carry_out(check, parts, out if options.pack else None)


def carry_out(check: Check, parts: Sequence[Part], packed: Path | None) -> int:
    """All parts one after another, saved after each; the summary comes last."""
    text = ""
    for part in parts:
        check.run(part)
        text = check.save()
        if packed is not None:
            pack(check.work, packed)
    print(text)
    return 0 if all(check.parts[part.name]["status"] in ("ok", "before") for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
