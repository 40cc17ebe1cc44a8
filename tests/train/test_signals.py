"""SIGTERM and SIGUSR1: the machine is wanted back, so the run saves and ends with a status of its own."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from fastfuse import cli
from fastfuse.train import loop, teachers
from fastfuse.train.checkpoint import load
from fastfuse.train.step import TrainStep
from tests.data import jpegs
from tests.train.started import LIMIT, assert_nobody_is_left, started
from tests.train.test_resume import assert_same_run

PREEMPTIONS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)


def signalled(monkeypatch, number, *, at, times=1):
    """Have this process hear a signal before a step is taken."""
    steps, take = [], TrainStep.__call__

    def step(self, *arguments):
        steps.append(1)
        if len(steps) == at:
            for _ in range(times):
                signal.raise_signal(number)
        return take(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", step)
    return steps


@PREEMPTIONS
def test_it_finishes_the_step_saves_and_has_a_status_of_its_own(tiny, tmp_path, capsys, monkeypatch, number):
    options = [*tiny, "--method", "dml"]
    out, before = tmp_path / "stopped", signal.getsignal(number)
    assert cli.main([*options, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        steps = signalled(patch, number, at=2, times=3)  # told again and again, it still finishes its step
        capsys.readouterr()
        assert cli.main([*options, "--out", str(out)]) == 75
    assert len(steps) == 2 and signal.getsignal(number) is before
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"fastfuse train --resume --out {out}" in message
    assert load(out / "checkpoint.pt")["position"]["step"] == 2
    assert cli.main(["train", "--resume", "--quiet", "--out", str(out)]) == 0
    assert_same_run(out, tmp_path / "whole")


def test_while_the_last_checkpoint_is_written_it_waits_for_it(tiny, tmp_path, monkeypatch):
    # Stopped by --max-time inside an epoch, so that the last checkpoint is no epoch's.
    out, save = tmp_path / "run", loop.Trainer._save

    def signalled_save(self):
        signal.raise_signal(signal.SIGTERM)
        save(self)

    monkeypatch.setattr(loop.Trainer, "_save", signalled_save)
    assert cli.main([*tiny, "--method", "dml", "--max-time", "0.00001", "--out", str(out)]) == 75
    assert load(out / "checkpoint.pt")["position"]["step"] == 1


def test_in_a_run_that_comes_first_and_between_the_runs(tiny, tmp_path, capsys, monkeypatch):
    options = [*tiny, "--method", "kd"]
    assert cli.main([*options, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, at=2)
        capsys.readouterr()
        assert cli.main([*options, "--out", str(out)]) == 75
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.rstrip().endswith(f"fastfuse train --resume --out {out}")
    assert load(out / "teachers" / "checkpoint.pt")["position"]["step"] == 2

    read = teachers.read_weights

    def signalled_read(*arguments):
        signal.raise_signal(signal.SIGUSR1)
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(teachers, "read_weights", signalled_read)
        assert cli.main(["train", "--resume", "--quiet", "--out", str(out)]) == 75
    assert capsys.readouterr().err.startswith("fastfuse: stopped by SIGUSR1 outside of the training steps; go on with")
    assert (out / "teachers" / "summary.json").exists() and not (out / "checkpoint.pt").exists()
    assert cli.main(["train", "--resume", "--quiet", "--out", str(out)]) == 0
    whole, again = (load_file(tmp_path / name / "student0.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(x, whole[key]) for key, x in again.items())


@PREEMPTIONS
def test_a_process_and_its_workers_are_told(tmp_path, number):
    """As batch systems do it: the signal reaches the workers as well, which leave the end to the run."""
    folder, out = jpegs.write(tmp_path / "images"), tmp_path / "run"
    options = f"--method dml --model resnet8 --image-size 16 --data imagenet --data-root {folder} --workers 1"
    options += " --epochs 5000 --batch-size 8 --device cpu --quiet"
    process = started(options.split(), out)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, errors
    assert errors.count("\n") == 1 and f"fastfuse train --resume --out {out}" in errors
    assert load(out / "checkpoint.pt")["position"]["steps_done"] > 0
    assert_nobody_is_left(process)
