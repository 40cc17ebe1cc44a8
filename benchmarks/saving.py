"""How long a checkpoint keeps the training loop waiting: FFSD's state is copied, its file is written beside the steps.

python benchmarks/saving.py --model resnet32 --students 4
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# Run as a script, Python looks in this folder only: the package lies one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> int:
    """Train a few steps with a checkpoint after each; the loop's own words are what is timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--students", default="4")
    parser.add_argument("--batch-size", default="32")
    parser.add_argument("--minutes", type=float, default=0.5, help="how long to train (0.5)")
    given = parser.parse_args()
    from fastfuse import cli
    from fastfuse.train.loop import Trainer

    blocked, save = [], Trainer._save

    def timed(self: Trainer) -> None:
        began = time.perf_counter()
        save(self)
        blocked.append(time.perf_counter() - began)

    Trainer._save = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        options = f"--method ffsd --data digits --epochs 1000 --checkpoint-minutes 0 --quiet --out {folder}/run"
        own = f"--model {given.model} --students {given.students} --batch-size {given.batch_size}"
        cli.main(["train", *options.split(), *own.split(), "--max-time", str(given.minutes)])
        size = (Path(folder) / "run" / "checkpoint.pt").stat().st_size
    times = sorted(blocked)
    median = times[len(times) // 2]
    print(
        f"{given.model}, {given.students} students, {size / 1e6:.1f} MB: {len(times)} checkpoints, each keeps the loop "
        f"for {1000 * median:.1f} ms (median; {1000 * times[0]:.1f} to {1000 * times[-1]:.1f}), "
        f"{100 * median / 300:.4f} % of five minutes (most: {100 * times[-1] / 300:.4f} %)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
