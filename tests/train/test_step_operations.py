"""What one step asks of a device besides convolutions and the project's own kernels: each is a node of its CUDA graph.

Kernels are counted where Triton's interpreter would run them. Nothing is computed by them: the numbers do not depend
on values.
"""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counting import WITHOUT_WORK
from fastfuse.kernels import _dispatch
from tests.train.engines import make

# Of ResNet-8s in groups; of deeper ones as many, and a sum of gradients for every further block. In bfloat16 besides:
# casts of all weights and of all their gradients, and those of the images and of the fusion head's classifier.
LIMITS = {"off": 57, "bf16": 64}


class Others(TorchDispatchMode):
    """How often each operator that works runs, but for convolutions and the project's own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        own = func.namespace in ("fastfuse", "prim") or func.is_view or "convolution" in name
        self.calls[name] += not own and name not in WITHOUT_WORK
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels(monkeypatch):
    """The Triton kernels in place of the eager references, launched into nothing."""
    if torch.cuda.is_available():
        pytest.skip("counts launches of Triton's interpreter, which is not used on a machine with a GPU")
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(_dispatch, "_process_default", "triton")


def operations(students, amp, strategy="grouped"):
    engine = make("ffsd", strategy=strategy, students=students, amp=amp)
    engine.start_epoch(seed=0, epoch=3, step=0, factors=[1.0] * 3)
    engine.run(0)
    with Others() as seen:
        engine.run(1)
    return +seen.calls


@pytest.mark.parametrize("amp", LIMITS)
def test_few_operations_remain_and_no_more_for_more_students(amp, kernels):
    two, four = operations(2, amp), operations(4, amp)
    assert two == four
    assert sum(two.values()) <= LIMITS[amp], two
    assert two["select_backward"] == 0 and two["_foreach_copy_"] == (2 if amp == "bf16" else 0)


def test_networks_in_a_loop_count_their_batches_in_one_operation(kernels):
    two, four, stacked = operations(2, "off", "loop"), operations(4, "off", "loop"), operations(2, "off")
    assert four["native_batch_norm"] > two["native_batch_norm"] > 20
    for name in ("add_", "_foreach_add_"):  # what a counter's own launch is, and what serves for all
        assert two[name] == four[name] == stacked[name], name
