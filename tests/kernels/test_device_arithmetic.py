"""Kernels stay within their error budgets where plain division and reciprocal roots are as inexact as a GPU's.

Triton's interpreter rounds both to the nearest. On a GPU `/` of float32 becomes div.full.f32, two units in the last
place off at most, and tl.rsqrt becomes rsqrt.approx (PTX ISA). The error belongs to the divisor: all that is divided by
the same count errs alike, and no sum averages it out. Here every divisor has that error, up or down by its bits.
"""

import numpy as np
import pytest
import torch

from fastfuse.kernels import _triton
from fastfuse.testing import assert_within_budget
from tests.kernels.op_cases import CASES
from tests.kernels.test_backends_agree import eagerly, moved, run

# Seen over their budgets when they divided plainly: by counts of values, one channel at a time.
AT_ONCE = (
    "concat_conv1x1 with statistics",
    "batch_norm_act of a block's end, a batch of one",
)
ROWS = [pytest.param(case, marks=() if case.reason in AT_ONCE else pytest.mark.long, id=case.reason) for case in CASES]


def off_by(x, size):
    """1 plus or minus a relative error; the sign depends on the bits of x alone."""
    bits = np.atleast_1d(np.asarray(x, np.float32)).view(np.uint32).astype(np.uint64)
    up = (bits * np.uint64(2654435761) >> np.uint64(31)) & np.uint64(1)
    return (1 + size * (2.0 * up - 1)).reshape(np.shape(x))


def divide(x, by):
    """x times the reciprocal, which is exact for powers of two, as the hardware's."""
    if np.asarray(x).dtype != np.float32:
        return np.divide(x, by)
    with np.errstate(all="ignore"):
        power_of_two = np.abs(np.frexp(by)[0]) == 0.5
        reciprocal = (1 / np.asarray(by, np.float64) * np.where(power_of_two, 1, off_by(by, 2.0**-23))).astype(by.dtype)
        found = np.asarray(x * reciprocal, np.float32)
        return np.where(np.isfinite(reciprocal) & (reciprocal != 0), found, np.divide(x, by)).astype(np.float32)


def reciprocal_root(x):
    with np.errstate(all="ignore"):
        return (1 / np.sqrt(np.asarray(x, np.float64)) * off_by(x, 2.0**-22.9)).astype(x.dtype)


@pytest.fixture
def inexact(monkeypatch):
    """The interpreter with a GPU's plain division; tl.div_rn and tl.sqrt_rn are exact there too."""
    if not _triton.interpreting():
        pytest.skip("a GPU divides as it divides: its own tests are in test_backends_agree.py")
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", lambda self, x, by: self.binary_op(x, by, divide))
    monkeypatch.setattr(InterpreterBuilder, "create_rsqrt", lambda self, x: self.unary_op(x, reciprocal_root))


def test_what_is_tested_against_is_inexact(inexact):
    x, by = np.ones(1000, np.float32), np.arange(1, 1001, dtype=np.float32)
    off = np.abs(divide(x, by).astype(np.float64) * by - 1) * 2**23
    assert 0.9 < off.max() <= 2 and off[[0, 1, 3, 511]].max() == 0
    assert 0.5 < (np.abs(reciprocal_root(by).astype(np.float64) ** 2 * by - 1) * 2**22).max() < 2


@pytest.mark.parametrize("case", ROWS)
def test_inexact_division_stays_within_the_budget(case, inexact, monkeypatch):
    tensors = moved(case.tensors(torch.float32), "cpu")
    ours = run(case, tensors, "triton", monkeypatch)
    eager = eagerly(case, tensors, monkeypatch)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    truth = run(case, exact, "reference", monkeypatch)
    for i, (a, t, *e) in enumerate(zip(ours, truth, *eager, strict=True)):
        assert_within_budget(a, t, e, what=f"{case.reason}, result {i}")
