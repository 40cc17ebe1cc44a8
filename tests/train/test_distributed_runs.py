"""Whole runs by several processes: records, interruptions, resumes, restarts (gloo, CPU)."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastfuse import cli
from fastfuse.errors import InterruptedRun
from fastfuse.train.checkpoint import load
from fastfuse.train.distributed import current
from fastfuse.train.evaluate_run import evaluate_run
from fastfuse.train.run import train
from fastfuse.train.step import TrainStep
from tests.train.conftest import Run
from tests.train.ranks import together
from tests.train.started import LIMIT, assert_nobody_is_left, started

FFL = ("--method", "ffl", "--sync-batchnorm", "--lr", "0.01")


def in_processes(count, tiny, out, *options, hook=lambda: None):
    """A run by several processes: its summary, or how it was interrupted, in each."""

    def own():
        hook()
        config = cli.parse_train([*tiny[1:], *map(str, options), "--out", str(out)])
        try:
            return train(config)
        except InterruptedRun as error:
            return str(error)

    return together(count, own)


def state_of(run):
    return load(run.path / "checkpoint.pt")["method"]


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses_agree(ours, truth, bound):
    assert len(ours.metrics) == len(truth.metrics)
    for mine, line in zip(ours.metrics, truth.metrics, strict=True):
        assert mine["losses"].keys() == line["losses"].keys()
        for name, expected in line["losses"].items():
            assert mine["losses"][name] == pytest.approx(expected, rel=bound), name


class Hooked:
    """Does something before the step of a number, in the process of a rank."""

    def __init__(self, rank, number, action):
        self.rank, self.number, self.action, self.seen = rank, number, action, 0

    def __call__(self):
        hook, take = self, TrainStep.__call__

        def step(own, *arguments):
            hook.seen += 1
            if current().share.rank == hook.rank and hook.seen == hook.number:
                hook.action()
            return take(own, *arguments)

        TrainStep.__call__ = step  # in a forked process: nobody else sees it


def test_the_records_are_those_of_one_process(tiny, train, tmp_path, capfd):
    # 60 images in batches of 25, 25 and 10, which two processes do not divide.
    one = train(*FFL, "--batch-size", 25, "--val-fraction", 0.2, "--ema", 0.9)
    path = tmp_path / "two"
    options = (*FFL, "--batch-size", 25, "--val-fraction", 0.2, "--ema", 0.9)
    in_processes(2, tiny, path, *options)
    # Sums are rounded in another order, in float32, over six steps.
    losses_agree(Run(path), one, 1e-4)
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in one.path.iterdir())
    # Counted by two processes, and by one from the same weights.
    assert Run(path).metrics[-1]["accuracy"]["student0"] == evaluate_run(path)["accuracy"]["student0"]
    assert Run(path).metrics[-1]["images_per_second"] > 0
    assert load(path / "checkpoint.pt")["processes"] == 2


def test_fewer_test_images_than_processes(tiny_npz, tiny, tmp_path):
    with np.load(tiny_npz) as arrays:
        # The same image three times, of another class each time: one is right, and counting one twice would show.
        few = {"test_images": arrays["test_images"][[0, 0, 0]], "test_labels": arrays["test_labels"][:3]}
        np.savez(tmp_path / "few.npz", **{**arrays, **few})
    options = ("--method", "independent", "--epochs", 1, "--data-path", tmp_path / "few.npz")
    in_processes(4, tiny, tmp_path / "run", *options)
    accuracy = Run(tmp_path / "run").metrics[0]["accuracy"]["student0"]
    assert accuracy == {"top1": pytest.approx(100 / 3), "top5": 100.0}


def test_a_signal_to_one_process_stops_all_at_one_step(tiny, tmp_path, capfd):
    whole = tmp_path / "whole"
    in_processes(2, tiny, whole, *FFL)
    path = tmp_path / "stopped"
    terminated = Hooked(1, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    said = in_processes(2, tiny, path, *FFL, hook=terminated)
    assert said[0] == said[1] and said[0].startswith("interrupted at epoch 1, step ")
    state = load(path / "checkpoint.pt")
    assert state["position"]["epoch"] == 0 and state["position"]["step"] >= 2
    (tmp_path / "copy").mkdir()
    for file in path.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    capfd.readouterr()
    in_processes(2, tiny, path, *FFL, "--resume")
    assert "process" not in capfd.readouterr().err
    assert same_bits(state_of(Run(path)), state_of(Run(whole)))
    losses_agree(Run(path), Run(whole), 1e-12)
    # One process takes it up as well, and says what it cannot promise.
    assert cli.main([*tiny, *FFL, "--resume", "--out", str(tmp_path / "copy")]) == 0
    assert "2 processes took the steps so far, 1 goes on" in capfd.readouterr().err
    losses_agree(Run(tmp_path / "copy"), Run(whole), 1e-4)
    assert not same_bits(state_of(Run(tmp_path / "copy")), state_of(Run(whole)))


@pytest.mark.long
def test_max_time_stops_all(tiny, tmp_path):
    found = in_processes(2, tiny, tmp_path / "run", *FFL, "--epochs", 100_000, "--max-time", 0.03)
    assert found[0]["completed"] is found[1]["completed"] is False
    assert found[0]["epochs"] == found[1]["epochs"] < 100_000


@pytest.mark.long
def test_what_is_trained_first_is_trained_together(tiny, tmp_path, train):
    options = ("--method", "kd", "--sync-batchnorm", "--lr", "0.01", "--epochs", 1)
    one = train(*options)
    in_processes(2, tiny, tmp_path / "two", *options)
    losses_agree(Run(tmp_path / "two"), one, 1e-4)
    losses_agree(Run(tmp_path / "two" / "teachers"), Run(one.path / "teachers"), 1e-4)


@pytest.mark.long
def test_replicas_in_several_processes(tiny, tmp_path, train):
    options = (*FFL, "--replicas", 2, "--epochs", 1)
    one = train(*options)
    in_processes(2, tiny, tmp_path / "two", *options)
    losses_agree(Run(tmp_path / "two" / "seed1"), Run(one.path / "seed1"), 1e-4)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*options, extra=(), program=("-m", "fastfuse"), **environment):
    given = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    command = [*TORCHRUN, *extra, *program, *map(str, options)]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=900)


@pytest.mark.long
def test_torchrun_writes_what_one_process_writes(tiny, train, tmp_path):
    one = train(*FFL)
    done = torchrun(*tiny, *FFL, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1  # one speaks for all
    losses_agree(Run(tmp_path / "two"), one, 1e-4)
    refused = torchrun(*tiny, *FFL, "--mode", "compiled", "--out", tmp_path / "three")
    assert refused.returncode != 0
    assert "fastfuse: --mode compiled cannot take --sync-batchnorm" in refused.stderr
    assert not (tmp_path / "three").exists()


@pytest.mark.long
def test_sigterm_to_torchrun_stops_all_and_the_run_goes_on(tiny, tmp_path):
    """As batch systems do it: torchrun passes the signal on, and has an exit status of its own."""
    out = tmp_path / "run"
    process = started([*tiny[1:], *FFL, "--epochs", "5000"], out, launcher=TORCHRUN)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode not in (0, None), errors
    assert_nobody_is_left(process)
    done = load(out / "checkpoint.pt")["position"]["steps_done"]
    assert done > 0 and f"fastfuse train --resume --out {out}" in errors
    again = torchrun("train", "--resume", "--max-time", "0.00001", "--out", out)
    assert again.returncode == 0, again.stderr
    assert load(out / "checkpoint.pt")["position"]["steps_done"] > done
