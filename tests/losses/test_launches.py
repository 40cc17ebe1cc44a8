"""How many kernels the distillation of one FFSD step launches.

Counted where Triton's interpreter would run them. Nothing is computed: the launches do not depend on values.
"""

import collections

import pytest
import torch

from fastfuse.kernels import _dispatch
from fastfuse.losses import FusionLoss

LIMIT = 45
# Channels and sides of ResNet-32's three stages on 32x32 images, and its training batch.
STAGES = [(16, 32), (32, 16), (64, 8)]
BATCH, CLASSES = 128, 100


@pytest.fixture
def launches(monkeypatch):
    """Launches by kernel, counted in place of being run."""
    if torch.cuda.is_available():
        pytest.skip("counts launches of Triton's interpreter, which is not used on a machine with a GPU")
    from triton.runtime import interpreter

    counts = collections.Counter()

    def count(executor, *arguments, **options):
        counts[executor.fn.__name__] += 1

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    return counts


def network():
    shapes = [(BATCH, channels, side, side) for channels, side in STAGES]
    maps = [torch.rand(shape).contiguous(memory_format=torch.channels_last).requires_grad_() for shape in shapes]
    return maps, torch.randn(BATCH, CLASSES, requires_grad=True)


def test_launches_of_a_step_do_not_grow_with_the_students(launches, monkeypatch):
    """Forward and backward of all terms of FFSD: fusion, transforms, attention, diversity, cross-entropy and KL."""
    monkeypatch.setattr(_dispatch, "_process_default", "triton")
    channels = [c for c, _ in STAGES]
    totals = {}
    for students in (2, 8):
        launches.clear()
        criterion = FusionLoss([channels] * students, CLASSES, leader_channels=channels)
        maps, logits = zip(*(network() for _ in range(students)), strict=True)
        leader_maps, leader_logits = network()
        labels = torch.arange(BATCH)
        output = criterion(maps, logits, labels, leader_features=leader_maps, leader_logits=leader_logits, progress=9.0)
        output.loss.backward()
        assert all(p.grad is not None for p in criterion.parameters())
        totals[students] = dict(launches)
    assert totals[8] == totals[2]
    assert sum(totals[2].values()) <= LIMIT, totals[2]
