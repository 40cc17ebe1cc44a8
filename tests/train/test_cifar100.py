import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.train.test_resume import assert_same_run, run_process

FILE = os.environ.get("FASTFUSE_CIFAR100", "")


@pytest.mark.long
@pytest.mark.skipif(not FILE, reason="FASTFUSE_CIFAR100 names no npz file with CIFAR-100 under MedMNIST's keys")
def test_ffsd_on_cifar100_learns_and_resumes_bit_for_bit(tmp_path):
    with np.load(Path(FILE)) as file:
        arrays = {key: file[key] for key in file.files}
    order = np.argsort(arrays["train_labels"], kind="stable").reshape(100, -1)[:, :20].ravel()
    arrays |= {"train_images": arrays["train_images"][order], "train_labels": arrays["train_labels"][order]}
    arrays |= {"test_images": arrays["test_images"][::20], "test_labels": arrays["test_labels"][::20]}
    path = tmp_path / "small.npz"
    np.savez(path, **arrays)
    options = f"train --method ffsd --model resnet20 --data npz --data-path {path} --epochs 2 --batch-size 64 --quiet"
    options = [*options.split(), "--checkpoint-minutes", "0", "--device", "cpu"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_process("never", 0, [*options, "--out", str(whole)]) == 0
    assert run_process("step", 20, [*options, "--out", str(killed)]) != 0
    assert (killed / "checkpoint.pt").exists()
    assert run_process("never", 0, [*options, "--resume", "--out", str(killed)]) == 0
    assert_same_run(killed, whole)
    first, second = (json.loads(line)["losses"]["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines())
    assert second < first
