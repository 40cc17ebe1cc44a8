import pytest
import torch


@pytest.fixture
def nan_filled():
    """Memory that torch.empty gives is filled with NaN: a kernel that leaves an element unwritten is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
