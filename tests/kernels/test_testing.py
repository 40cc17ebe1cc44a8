"""The shared measure: what it calls equal, and that nothing slips through it."""

import math

import pytest
import torch

from fastfuse.testing import assert_within_budget, in_other_orders, relative_l2


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


def test_the_budget_is_that_of_the_worst_order():
    truth = torch.ones(4, dtype=torch.float64)
    eager = [truth.float(), truth.float() * (1 + 1e-3)]
    assert_within_budget(truth.float() * (1 + 1.9e-3), truth, eager)
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(truth.float() * (1 + 2.1e-3), truth, eager)
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(truth.float() * (1 + 1.9e-3), truth, eager[0])


def test_other_orders_leave_the_settings_as_they_were():
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    seen = list(in_other_orders(lambda: [torch.get_num_threads(), torch.backends.mkldnn.enabled]))
    assert seen == [[1, True], [1, False], [2, True], [2, False]]
    orders = in_other_orders(lambda: [1 / 0])
    with pytest.raises(ZeroDivisionError):
        next(orders)
    assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == before
