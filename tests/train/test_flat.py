"""Memory, file descriptors and threads of a long run stay as they are."""

import os
from pathlib import Path

import pytest

from fastfuse.train.step import TrainStep
from tests.data import jpegs

# Resident bytes that 1,500 steps may add: 2.8 kB a step, where a step's gradients alone are 300 kB.
GROWTH = 4 << 20
# Long after the first epoch. A checkpoint that is being written and batches that wait have files
# open for a moment: what is held is the least of so many steps.
WINDOWS = range(500, 520), range(2000, 2020)


def held():
    """(resident bytes, file descriptors, threads) of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: not Linux")
@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed by two workers"])
def test_flat_over_two_thousand_steps(train, tmp_path, monkeypatch, streamed):
    found, steps, take = [[], []], 0, TrainStep.__call__

    def step(self, *arguments):
        nonlocal steps
        steps += 1
        for window, seen in zip(WINDOWS, found, strict=True):
            if steps in window:
                seen.append(held())
        return take(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", step)
    options = ["--method", "independent", "--students", 1, "--epochs", 41, "--checkpoint-minutes", "0.01"]
    if streamed:
        counts = {f"{split}/{name}": 100 if split == "train" else 2 for split in ("train", "val") for name in "ab"}
        folder = jpegs.write(tmp_path / "images", counts)
        options += ["--data", "imagenet", "--data-root", folder, "--data-path", "None", "--image-size", 16]
        options += ["--crop-padding", "None", "--workers", 2, "--batch-size", 4]
    else:
        options += ["--epochs", 101, "--batch-size", 3]
    train(*options)
    before, after = ([min(values) for values in zip(*seen, strict=True)] for seen in found)
    assert len(found[1]) == len(WINDOWS[1])
    assert after[1:] == before[1:], "descriptors, threads"
    assert after[0] - before[0] < GROWTH
    print(f"resident: {before[0]:,} bytes, then {after[0] - before[0]:+,}")
