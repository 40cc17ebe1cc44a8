"""The kill matrix with few moments: whatever is killed or stopped, whenever, the run goes on to the same bits."""

import pytest

from tests.train import kill_matrix

PLANS = {
    "process": ["any time", "in a step", "while saving", "between epochs", "while saving"],
    "term": ["while saving"],
    "worker": ["in a step", "between epochs"],
    "rank": ["in a step", "while saving"],
}


@pytest.mark.long
@pytest.mark.parametrize("fault", PLANS)
def test_a_run_survives(tmp_path, fault):
    row = kill_matrix.suffer(fault, PLANS[fault], kill_matrix.write_data(tmp_path)[fault], tmp_path)
    assert not row.problem
    assert row.tried == PLANS[fault] and row.survived == len(row.tried)
    # A checkpoint is written beside the next steps, and waits for the one before it: after every step, and of several
    # processes at the end of every epoch at least, which has five.
    assert len(row.lost) <= len(row.tried) and max(row.lost, default=0) <= 10
    if fault == "term":
        assert row.lost == []


def test_steps_taken_again_are_counted():
    taken = [(0, 0), (0, 1), (0, 2), (0, 1), (0, 2), (1, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert kill_matrix.again(taken) == [2, 1]
    assert kill_matrix.again([]) == []
