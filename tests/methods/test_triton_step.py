"""Whole steps of the methods on the Triton kernels, in the interpreter, against the recordings' float64 run."""

import pytest

from tests.replay import replay_stepwise


@pytest.mark.long
@pytest.mark.parametrize(("name", "steps"), [("ffsd_resnet20_s2", 1), ("ffl_resnet20", 2)])
def test_every_term_and_gradient_is_within_the_error_budget(golden, name, steps):
    used = replay_stepwise(golden / f"{name}.npz", golden / f"{name}.json", "triton", steps)
    assert len(used) > 100
    over = {what: found for what, found in used.items() if found[0] > 1}
    assert not over
