"""`fastfuse` in a process that is struck by a real signal at chosen moments.

    python killable.py FAULT MOMENTS OPTIONS...

FAULT: process (SIGKILL), term (SIGTERM), usr1 (SIGUSR1), worker (SIGKILL of one that decodes images), rank (SIGKILL of
one of several processes).
MOMENTS: MOMENT:COUNT with commas between them, one for each time that torchrun starts the processes. MOMENT: step
(within the COUNT-th training step, between backward and update), write (half-way through the COUNT-th checkpoint),
rename (written but not yet renamed), metrics (between epochs, half-way through the COUNT-th metrics file), any (COUNT
milliseconds after the start, before fastfuse and torch are imported, or in the fifth step, whichever comes first: no
machine is so fast that the run ends before), never.

Where STEPS names a file, every step that is done is a line of it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

SIGNALS = {"term": signal.SIGTERM, "usr1": signal.SIGUSR1}
LAST_OF_ANY = 5


def strike(fault: str) -> None:
    """Now; where there is no worker yet, as soon as there is one."""
    victim = os.getpid()
    if fault == "worker":
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        victim = workers[0].pid
    os.kill(victim, SIGNALS.get(fault, signal.SIGKILL))


def arrange(fault: str, moment: str, count: int) -> None:
    """Have this process struck when a moment has come so many times."""
    from fastfuse.train import checkpoint, record
    from fastfuse.train.optim import Optimizers

    if moment == "any":
        moment, count = "step", LAST_OF_ANY
    seen = 0

    def due() -> None:
        nonlocal seen
        if fault == "worker" and not multiprocessing.active_children():
            return  # the records are written once before the first step
        seen += 1
        if seen == count:
            strike(fault)

    if moment == "step":
        update = Optimizers.step

        def step(self, *arguments):
            due()
            return update(self, *arguments)

        Optimizers.step = step
    elif moment in ("write", "metrics"):
        module, suffix = (checkpoint, "checkpoint.pt") if moment == "write" else (record, "metrics.jsonl")
        write_whole = module.write_atomic

        def write(path, write_bytes, **options):
            if not path.name.endswith(suffix):
                return write_whole(path, write_bytes, **options)

            def half(file):
                write_bytes(file)
                file.flush()
                file.truncate(file.tell() // 2)
                due()
                file.seek(0)
                file.truncate()
                write_bytes(file)

            return write_whole(path, half, **options)

        module.write_atomic = write
    elif moment == "rename":
        replace = Path.replace

        def rename(self, target):
            if Path(target).name == "checkpoint.pt":
                due()
            return replace(self, target)

        Path.replace = rename


def count_steps(path: str) -> None:
    """Note the place of every step in a file, whose lines outlive this process."""
    from fastfuse.train.terms import TermLog

    file, count = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), TermLog.count

    def noted(self, *, epoch, step, images):
        count(self, epoch=epoch, step=step, images=images)
        os.write(file, f"{epoch} {step}\n".encode())

    TermLog.count = noted


def main() -> int:
    fault, moments, options = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
    attempt, rank = (int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    moment, count = (moments[attempt] if attempt < len(moments) else "never:0").split(":")
    # The first process writes; in a step or anywhere, the second one falls.
    doomed = "RANK" not in os.environ or rank == (0 if moment in ("write", "rename", "metrics") else 1)
    if moment == "any" and doomed:
        timer = threading.Timer(int(count) / 1000, strike, [fault])
        timer.daemon = True
        timer.start()
    from fastfuse import cli

    if doomed:
        arrange(fault, moment, int(count))
    if "STEPS" in os.environ and rank == 0:
        count_steps(os.environ["STEPS"])
    return cli.main(options)


if __name__ == "__main__":
    sys.exit(main())
