"""The shared measure: what it calls equal, and that nothing slips through it."""

import math

import pytest
import torch

from fastfuse.testing import relative_l2


@pytest.mark.parametrize(
    ("ours", "truth", "error"),
    [
        pytest.param([3.0, 4.0], [3.0, 4.0], 0.0, id="equal"),
        pytest.param([3.0, 4.5], [3.0, 4.0], 0.1, id="half a unit in five"),
        pytest.param([0.0], [0.0], 0.0, id="both zero"),
        pytest.param([1e-30], [0.0], math.inf, id="only the truth is zero"),
        pytest.param([], [], 0.0, id="empty"),
        pytest.param([math.nan], [math.nan], math.inf, id="NaN never agrees"),
        pytest.param([math.inf], [math.inf], math.inf, id="nor does infinity"),
    ],
)
def test_relative_l2(ours, truth, error):
    ours, truth = torch.tensor(ours), torch.tensor(truth, dtype=torch.float64)
    assert relative_l2(ours, truth) == pytest.approx(error, abs=0)


def test_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match="differ"):
        relative_l2(torch.ones(2, 1), torch.ones(2))
