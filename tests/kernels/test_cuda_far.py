"""Offsets beyond 32 bits in the kernels in CUDA C++, run on the host, and what their counters cannot hold.

Maps lie in files with holes: memory that is never touched costs nothing.
"""

import itertools
import re

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import InputError
from tests.kernels.op_cases import CASES, FORMATS
from tests.kernels.test_backends_agree import FAR, run
from tests.kernels.test_cuda_schemas import PAIRS

FAR_CASES = [
    PAIRS,
    *(
        case
        for case in CASES
        if case.reason
        in (
            "attention_map of two widths",
            "attention_mse: features against a ready map",
            "concat_fuse on batch statistics",
        )
    ),
]


@pytest.fixture
def sparse(tmp_path):
    """Gives a map's values with other strides."""
    names = itertools.count()

    def place(x, *strides):
        last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        memory = torch.from_file(str(tmp_path / str(next(names))), shared=True, size=last + 1, dtype=x.dtype)
        with torch.no_grad():
            found = memory.as_strided(x.shape, strides).copy_(x)
        return found.requires_grad_(x.requires_grad)

    return place


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", FAR_CASES, ids=lambda case: case.reason)
def test_samples_far_apart(case, memory_format, sparse, emulated, monkeypatch):
    near = case.tensors(torch.float16, memory_format)
    of_maps = [x.dim() >= 3 and x.shape[0] == 2 for x in near]
    assert sum(of_maps) > 1
    far = [sparse(x, FAR, *x.stride()[1:]) if chosen else x for x, chosen in zip(near, of_maps, strict=True)]
    for a, b in zip(*(run(case, tensors, "cuda", monkeypatch) for tensors in (far, near)), strict=True):
        assert torch.equal(a, b)


def test_channels_far_apart(sparse, emulated, monkeypatch):
    """Operators of which a sample may exceed 32 bits."""
    near = PAIRS.tensors(torch.float16)
    far = [sparse(x, 20, 2**31 // (x.shape[1] - 1) + 1, 4, 1) for x in near]
    for a, b in zip(*(run(PAIRS, tensors, "cuda", monkeypatch) for tensors in (far, near)), strict=True):
        torch.testing.assert_close(a, b)


def huge(*shape):
    return torch.zeros(()).expand(shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: functional.attention_map(huge(1, 1, 2**12, 2**12), backend="cuda"),
            "features [1, 1, 4096, 4096] makes a grid of 1 x 65,536 programs",
            id="attention_map",
        ),
        pytest.param(
            lambda: functional.attention_mse(huge(1, 2**12, 2**12), huge(1, 2**12, 2**12), backend="cuda"),
            "inputs [1, 4096, 4096] makes a grid of 1 x 65,536 programs",
            id="attention_mse",
        ),
        pytest.param(
            lambda: functional.diversity_target(huge(2**31, 1, 1, 3), backend="cuda"),
            "y [2147483648, 1, 1, 3] makes 2,147,483,648 samples",
            id="diversity_target",
        ),
    ],
)
def test_what_its_counters_cannot_hold_is_refused(call, message, emulated):
    with pytest.raises(InputError, match=re.escape(message)):
        call()
