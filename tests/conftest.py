"""What every test gets: fixed seeds, few threads, and a stated reason where a GPU is missing."""

import os
import random
from pathlib import Path

# Before torch is loaded: OpenMP threads that spin while they wait slow a busy machine down a hundredfold.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels are tested in the interpreter; the variable must be set before triton is loaded.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Memory filled with NaN comes with deterministic operators, and there cuBLAS refuses to run without it on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The tensors are small: more threads only wait for each other.
torch.set_num_threads(1)

# Autograd settles at its first backward whether its threads forbid a fork, as tests of several processes need one;
# after torch._dynamo's import it would say so, and these tests would depend on what ran before them.
torch.ones((), requires_grad=True).backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs a GPU is skipped, with the reason, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in a test whether it runs alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded values (tests/golden)."""
    return Path(__file__).parent / "golden"
