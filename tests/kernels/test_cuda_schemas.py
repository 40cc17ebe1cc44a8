"""opcheck of every schema in CUDA C++, with the arguments that the public functions call them with."""

from functools import partial

import pytest
import torch
from torch.utils import _pytree as pytree

from fastfuse import functional
from fastfuse.kernels import _library
from tests.kernels.op_cases import CASES, FORMATS, OpCase
from tests.kernels.test_backends_agree import run

CHECKED = (
    "attention_map of two widths",
    "attention_mse: features against a ready map",
    "attention_mse: two pairs, a loss per sample",
    "diversity_loss normalized, summed",
    "concat_fuse on batch statistics",
    "concat_fuse on running statistics",
)
# Of one shape: where shapes differ, what the kernels keep for the backward has places that nobody writes or reads.
PAIRS = OpCase(
    "diversity: two pairs, together with their targets",
    lambda a, b, x, y: functional.diversity([a, b], [x, y])[0],
    ((2, 3, 5, 4),) * 2,
    ((2, 2, 5, 4),) * 2,
)
ROWS = [PAIRS, *(case for case in CASES if case.reason in CHECKED)]


@pytest.fixture
def calls(emulated, monkeypatch):
    """Name and arguments of every call, in their order, as they are before the call changes them."""
    found = []

    def recorded(name, called, *arguments):
        found.append((name, pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(), arguments)))
        return called(*arguments)

    for name in _library.cuda_names():
        called = getattr(torch.ops.fastfuse_cuda, name)
        monkeypatch.setattr(torch.ops.fastfuse_cuda, name, partial(recorded, name, called))
    return found


def test_every_schema_is_called(calls, monkeypatch):
    for case in ROWS:
        run(case, case.tensors(torch.float32), "cuda", monkeypatch)
    assert {name for name, _ in calls} == set(_library.cuda_names())


@pytest.mark.parametrize(
    ("memory_format", "dtype"),
    list(zip(FORMATS, (torch.float32, torch.bfloat16), strict=True)),
    ids=["contiguous", "channels_last"],
)
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.reason)
def test_schemas_hold(case, memory_format, dtype, calls, monkeypatch):
    """What is declared to change does and nothing else; fakes give the shapes, dtypes and strides of the kernels."""
    run(case, case.tensors(dtype, memory_format), "cuda", monkeypatch)
    monkeypatch.undo()
    assert calls, "the case calls no kernel in CUDA C++"
    for name, arguments in calls:
        schema = getattr(torch.ops.fastfuse_cuda, name).default
        if hasattr(torch.ops.fastfuse, name):
            torch.library.opcheck(schema, arguments)
        else:  # a piece that a launcher joins with others: never traced, it has no fake
            torch.library.opcheck(schema, arguments, test_utils="test_schema")
