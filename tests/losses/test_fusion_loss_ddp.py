"""Two processes over gloo: both ways of wrapping give the gradients of one process with the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing

from tests.losses import batches, ddp_worker

BOUND = 1e-10
WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank found."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch was built without torch.distributed and gloo")
    folder: Path = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(ddp_worker.work, args=(WORLD, folder), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(params=ddp_worker.METHODS)
def method(request) -> str:
    return request.param


def alone(method: str) -> dict[str, Tensor | None]:
    """The gradients of one process."""
    built = ddp_worker.system(method)
    built(*ddp_worker.global_batch()).backward()
    return ddp_worker.gradients(built)


def off(ours: dict, wanted: dict) -> dict[str, float]:
    assert set(ours) == set(wanted)
    return batches.differing(ours, wanted, BOUND)


@pytest.mark.parametrize("wrapping", ["whole", "separate"])
def test_gradients_are_those_of_the_global_batch(ranks, method: str, wrapping: str) -> None:
    wanted = alone(method)
    assert all(g is not None and g.any() for g in wanted.values())
    for rank in ranks:
        assert off(rank[method][wrapping], wanted) == {}


@pytest.mark.parametrize("wrapping", ["whole", "separate"])
def test_ranks_agree_bit_for_bit(ranks, method: str, wrapping: str) -> None:
    first, second = (rank[method][wrapping] for rank in ranks)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_loss_called_past_its_wrapper_is_not_synchronised(ranks, method: str) -> None:
    """The control: were the comparisons above blind, they would pass here too."""
    wanted = alone(method)
    first, second = (rank[method]["bypassed"] for rank in ranks)
    own = {name for name in wanted if name.startswith("loss.")}
    assert own
    for rank in (first, second):
        assert set(off(rank, wanted)) == own, "the networks are wrapped and stay right, the loss's own are wrong"
    assert all(not torch.equal(first[name], second[name]) for name in own)


def test_training_with_batch_statistics_keeps_the_ranks_together(ranks, method: str) -> None:
    first, second = (rank[method]["trained"] for rank in ranks)
    start = dict(ddp_worker.system(method).named_parameters())
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [name for name in first if torch.equal(first[name], start[name])] == []
    assert all(p.isfinite().all() for p in first.values())
