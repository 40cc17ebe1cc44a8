import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: make gpu-check runs everything")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "results"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr
    assert not out.exists()


def test_the_commit_can_be_given():
    program = "from fastfuse.info import commit; print(commit())"
    environment = {**os.environ, "FASTFUSE_COMMIT": "abc123"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.strip() == "abc123"
