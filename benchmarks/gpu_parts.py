"""What the check on a GPU consists of, in the order of value: programs of this folder, each with a time of its own."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

_RUN = ("benchmarks/run.py", "--out", "{out}", "--suite")
_STEP = (*_RUN, "step", "--providers", "published,published-amp,networks-only,fastfuse", "--modes")


@dataclass(frozen=True)
class Part:
    """One program.

    Attributes:
        name: of the part, its log and its files.
        seconds: at most, where its time is limited.
        command: of Python; empty for the tests. {out} is the part's folder, {seconds} its time.
        timed: options that need a limited time.
        shown: lines of its output for the summary, from the end.
    """

    name: str
    seconds: int
    command: tuple[str, ...] = ()
    timed: tuple[str, ...] = ()
    shown: int = 12

    def argv(self, out: str, seconds: float | None, more: Sequence[str] = ()) -> list[str]:
        """The command as a process takes it."""
        words = [*self.command, *(self.timed if seconds is not None else ()), *more]
        # Ends by itself before it would be ended.
        given = {"out": out, "seconds": str(int((seconds or 0) * 0.85))}
        return [sys.executable, *(word.format(**given) for word in words)]


LIMIT = ("--max-time", "{seconds}")
KERNELS = (*_RUN, "kernels", "--repeats", "5", "--jobs", "12")
PARTS = (
    Part("build", 150, ("fastfuse/kernels/_build.py",), shown=2),
    Part("tests", 200),
    Part("probe", 75, ("benchmarks/probe.py", "--out", "{out}/probe.json"), LIMIT, shown=30),
    Part("step", 120, (*_STEP, "eager,graphed"), shown=16),
    Part("kernels", 200, KERNELS, LIMIT),
    Part("profile", 60, ("benchmarks/profile_step.py", "--out", "{out}/profile.json"), shown=30),
    Part("imagenet", 150, (*_STEP, "graphed", "--model", "resnet18"), shown=10),
    Part("scaling", 120, (*_RUN, "scaling", "--modes", "graphed", "--replicas", "4"), shown=16),
    Part(
        "profile-imagenet", 120,
        ("benchmarks/profile_step.py", "--model", "resnet18", "--out", "{out}/profile_imagenet.json"), shown=30,
    ),
    Part("tune", 240, ("benchmarks/tune.py", "--table", "{out}/table.json", "--log", "{out}/tune.json"), LIMIT, 40),
    Part(
        "compiled", 240,
        (*_RUN, "step", "--providers", "published,compile,fastfuse", "--modes", "graphed,compiled",
         "--strategies", "loop,grouped"), shown=10,
    ),
    Part("students", 240, (*_STEP, "graphed", "--students", "4,8"), shown=20),
    Part("imagenet-students", 300, (*_STEP, "graphed", "--model", "resnet18", "--students", "4,8"), shown=20),
    Part("epoch", 90, (*_RUN, "epoch", "--modes", "graphed"), shown=6),
    Part("memcheck", 240),
    Part("racecheck", 240),
    Part("short", 240, (*_RUN, "kernels", "--quick", "--repeats", "5")),
)  # fmt: skip
NAMES = tuple(part.name for part in PARTS)
# What `make gpu-check` runs: whether the kernels are right, and the short list of their times.
CHECK = ("build", "tests", "memcheck", "racecheck", "short")
# What tests decide on: a part that times operators leaves red ones out.
TIMES_OPERATORS = {"kernels": "--ops", "short": "--ops", "tune": "--launches"}
LEAST = 25  # seconds: in less nothing useful begins
RESERVE = 8  # seconds, for packing


def allotted(part: Part, left: float | None) -> float | None:
    """Seconds for a part when so many are left of the check; 0: it must wait for another one. None: no limit."""
    if left is None:
        return None
    seconds = min(part.seconds, left - RESERVE)
    return seconds if seconds >= LEAST else 0.0
