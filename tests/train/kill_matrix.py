"""What a run survives: real signals at random moments, and the same weights at the end.

    python -m tests.train.kill_matrix --moments 5

Every fault has a run of its own, started from the command line, struck, resumed and struck again at random moments of
four kinds, so many of each kind, until it may end. Its weights, states and records must then be, bit for bit, those of
a run that nobody struck. Prints a table; exit status 1 if a run did not survive.
"""

import argparse
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

KILLABLE = str(Path(__file__).with_name("killable.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Bit-equality is promised for equal thread counts, so every process has one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "GLOO_SOCKET_IFNAME": "lo"}

# What each kind of moment is in `killable`.
KINDS = {"in a step": ["step"], "while saving": ["write", "rename"], "between epochs": ["metrics"], "any time": ["any"]}
SMALL = "train --method ffsd --model resnet8 --lr 0.02 --device cpu --quiet --checkpoint-minutes 0 --log-interval 3"
DIGITS = "--data npz --crop-padding 1 --batch-size 12 --ema 0.9"
JPEGS = "--data imagefolder --stream True --workers 2 --image-size 16 --batch-size 8"


class Fault(NamedTuple):
    """One kind of fault.

    Attributes:
        what: for the table.
        options: of the run that suffers it.
        statuses: that the struck process may end with.
        processes: that train together.
    """

    what: str
    options: str
    statuses: tuple[int, ...]
    processes: int = 1


FAULTS = {
    "process": Fault("SIGKILL of the process", DIGITS, (-signal.SIGKILL,)),
    # Before the command line listens, while Python starts, SIGTERM is what it always is.
    "term": Fault("SIGTERM", DIGITS, (75, -signal.SIGTERM)),
    "worker": Fault("SIGKILL of one of two data workers", JPEGS, (1,)),
    "rank": Fault("SIGKILL of one of two processes", DIGITS, (0,), processes=2),
}


class Row(NamedTuple):
    """What became of a run.

    Attributes:
        fault: name in FAULTS.
        tried: kinds of the moments at which it was struck.
        survived: how many of them left a run that went on, to the right end; none if the end was another.
        lost: steps that had to be taken again, after each.
        problem: what went wrong, or "".
    """

    fault: str
    tried: list[str]
    survived: int
    lost: list[int]
    problem: str


def write_data(folder: Path) -> dict[str, list[str]]:
    """The options that name the data of each fault: small images of three classes."""
    from tests.data import jpegs

    generator = np.random.default_rng(0)
    sizes = {"train": 60, "test": 30}
    arrays = {f"{s}_images": generator.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for s, n in sizes.items()}
    arrays |= {f"{split}_labels": np.arange(count) % 3 for split, count in sizes.items()}
    np.savez(folder / "tiny.npz", **arrays)
    images = jpegs.write(
        folder / "images", {f"{s}/{c}": 10 if s == "train" else 3 for s in ("train", "val") for c in "abc"}
    )
    where = {DIGITS: ["--data-path", str(folder / "tiny.npz")], JPEGS: ["--data-root", str(images)]}
    return {name: [*SMALL.split(), *fault.options.split(), *where[fault.options]] for name, fault in FAULTS.items()}


def drawn(kinds: Sequence[str], draw: random.Random) -> list[str]:
    """Moments of these kinds, for `killable`."""
    found = []
    for kind in kinds:
        moment = draw.choice(KINDS[kind])
        most = {"any": (100, 8000), "metrics": (1, 1)}.get(moment, (1, 4))
        found.append(f"{moment}:{draw.randint(*most)}")
    return found


def started(name: str, moments: list[str], options: list[str], steps: Path) -> tuple[int, str]:
    """Exit status and standard error of a run that is struck at these moments, the last of which may be `never`."""
    several = FAULTS[name].processes > 1
    launcher = [*TORCHRUN, "--max-restarts", str(len(moments))] if several else [sys.executable]
    command = [*launcher, KILLABLE, name, ",".join(moments), *options]
    environment = {**ENVIRONMENT, "STEPS": str(steps)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stderr


def again(steps: list[tuple[int, int]]) -> list[int]:
    """How many steps had to be taken again, wherever some had."""
    epoch = max((step for _, step in steps), default=0) + 1
    places = [epoch * e + s for e, s in steps]
    return [before + 1 - place for before, place in itertools.pairwise(places) if place <= before]


def suffer(name: str, kinds: Sequence[str], options: list[str], folder: Path, seed: int = 0) -> Row:
    """One run that is struck at a moment of each kind, in this order, beside one that is not.

    Args:
        name: of the fault.
        options: of the run, without --epochs and --out.
        folder: where the runs go.
    """
    from tests.train.test_resume import assert_same_run

    fault, draw = FAULTS[name], random.Random(f"{seed} {name}")
    # Between two strokes lie about five steps, an epoch; more where a thread is slow to write them.
    options = [*options, "--epochs", str(4 + 6 * len(kinds))]
    whole, struck, log = folder / f"{name}-whole", folder / f"{name}-struck", folder / f"{name}-steps"
    log.touch()
    status, errors = started(name, ["never:0"], [*options, "--out", str(whole)], folder / f"{name}-whole-steps")
    assert status == 0, errors
    moments = drawn(kinds, draw)
    resume, tried, problem = [*options, "--resume", "--out", str(struck)], [], ""
    attempts = [[*moments, "never:0"]] if fault.processes > 1 else [[moment] for moment in moments]
    for kind, attempt in zip(kinds, attempts, strict=False):
        status, errors = started(name, attempt, resume, log)
        if status == 0 and fault.processes == 1:
            break  # it came to its end first
        tried += kinds if fault.processes > 1 else [kind]
        if status not in fault.statuses:
            problem = f"status {status} after {attempt}: {errors.strip()[-300:]}"
            break
    if not problem and fault.processes == 1:
        status, errors = started(name, ["never:0"], resume, log)
        problem = f"status {status} when resumed: {errors.strip()[-300:]}" if status else ""
    if not problem:
        try:
            assert_same_run(struck, whole)
        except AssertionError as error:
            problem = f"another end: {error}"
    steps = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    return Row(name, tried, 0 if problem else len(tried), again(steps), problem)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        f"| fault | {' | '.join(KINDS)} | survived | steps lost, mean | most |",
        "| --- |" + " --- |" * (len(KINDS) + 3),
    ]
    for row in rows:
        counts = " | ".join(str(row.tried.count(kind)) for kind in KINDS)
        mean = sum(row.lost) / max(len(row.tried), 1)
        ends = f"{row.survived} of {len(row.tried)} | {mean:.2f} | {max(row.lost, default=0)}"
        lines.append(f"| {FAULTS[row.fault].what} | {counts} | {ends} |")
    return "\n".join([*lines, *(f"\n{FAULTS[row.fault].what}: {row.problem}" for row in rows if row.problem)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=5, help="of each kind, for each fault (5)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        options = write_data(Path(folder))
        for name in given.faults:
            kinds = [*KINDS] * given.moments
            random.Random(given.seed).shuffle(kinds)
            rows.append(suffer(name, kinds, options[name], Path(folder), given.seed))
            print(f"{name}: {rows[-1].survived} of {len(rows[-1].tried)}", file=sys.stderr, flush=True)
    print(table(rows))
    return int(any(row.problem or not row.tried for row in rows))


if __name__ == "__main__":
    sys.exit(main())
