"""`fastfuse train` in a process that kills itself with SIGKILL at a chosen moment.

    python killable.py MOMENT COUNT OPTIONS...

MOMENT: step (after the COUNT-th training step), write (half-way through the COUNT-th checkpoint), rename (written
but not yet renamed), metrics (half-way through the COUNT-th metrics file), never.
"""

import os
import signal
import sys
from pathlib import Path

from fastfuse import cli
from fastfuse.train import checkpoint, record
from fastfuse.train.step import TrainStep


def main() -> int:
    moment, count, options = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    seen = 0

    def die_if_due() -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "step":
        run_step = TrainStep.__call__

        def step(self, *arguments):
            output = run_step(self, *arguments)
            die_if_due()
            return output

        TrainStep.__call__ = step
    elif moment in ("write", "metrics"):
        module, suffix = (checkpoint, "checkpoint.pt") if moment == "write" else (record, "metrics.jsonl")
        write_whole = module.write_atomic

        def write(path, write_bytes):
            if not path.name.endswith(suffix):
                return write_whole(path, write_bytes)

            def half(file):
                write_bytes(file)
                file.flush()
                file.truncate(file.tell() // 2)
                die_if_due()
                file.seek(0)
                file.truncate()
                write_bytes(file)

            return write_whole(path, half)

        module.write_atomic = write
    elif moment == "rename":
        replace = Path.replace

        def rename(self, target):
            if Path(target).name == "checkpoint.pt":
                die_if_due()
            return replace(self, target)

        Path.replace = rename
    return cli.main(options)


if __name__ == "__main__":
    sys.exit(main())
