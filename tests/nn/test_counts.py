"""Counters of norms advance together, to the values that each norm's own counting gives."""

import copy

import pytest
import torch
from torch import nn

from fastfuse import models
from fastfuse.nn import Networks
from fastfuse.nn import counts as counts_module
from tests.nn.test_casts import Counted

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Odd(nn.Module):
    """A norm that runs twice, one that never does, one that averages over all batches, a frozen and a derived one."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.averaging, self.frozen = nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3).eval()
        self.derived, self.without = Derived(3), nn.BatchNorm2d(3, track_running_stats=False)
        self.last = nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.averaging(self.twice(self.twice(x)))
        return self.last(self.without(self.derived(self.frozen(x))).mean((2, 3)))


class Derived(nn.BatchNorm2d):
    """Reads its counter."""

    def forward(self, x):
        return super().forward(x) * (1 + self.num_batches_tracked)


def made():
    torch.manual_seed(0)
    return Networks([Odd(), models.build("resnet8", 5), Odd()])


def test_counters_statistics_and_outputs_are_those_of_each_network_alone():
    together, alone = made(), made()
    own = dict(together.named_buffers())
    for _ in range(3):
        ours, theirs = together(IMAGES), [network(IMAGES) for network in alone]
        assert all(torch.equal(x, y) for x, y in zip(_tensors(ours), _tensors(theirs), strict=True))
        expected = alone.state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in together.state_dict().items())
    state = together.state_dict()
    found = {name: int(state[f"0.{name}.num_batches_tracked"]) for name in ("twice", "never", "averaging", "frozen")}
    assert found == {"twice": 6, "never": 0, "averaging": 3, "frozen": 0}
    assert {name: id(x) for name, x in together.named_buffers()} == {name: id(x) for name, x in own.items()}


def _tensors(outputs):
    odd, known, other = outputs
    return [odd, known.logits, *known.features, other]


def test_one_launch_counts_for_all_and_none_in_evaluation():
    peers = Networks(models.build("resnet8", 5) for _ in range(3))
    with Counted() as seen:
        peers(IMAGES)
    norms = [m for m in peers.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 27 and {int(norm.num_batches_tracked) for norm in norms} == {1}
    # What is added besides joins the blocks, and would be as many in evaluation.
    with Counted() as idle:
        peers.eval()(IMAGES)
    assert (seen.calls["_foreach_add_"], idle.calls["_foreach_add_"]) == (1, 0)
    assert seen.calls["add_"] == idle.calls["add_"] and {int(norm.num_batches_tracked) for norm in norms} == {1}


def test_after_an_error_the_norms_have_their_counters():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            self.norm(x)
            raise RuntimeError("out of memory")

    peers = Networks([Failing()])
    with pytest.raises(RuntimeError, match="out of memory"):
        peers(IMAGES)
    assert torch.is_tensor(peers[0].norm.num_batches_tracked)


@pytest.mark.parametrize("spoil", ["hook", "compiled"])
def test_who_may_look_at_a_counter_sees_it(spoil):
    peers, seen = made(), []
    norm = peers[0].twice
    if spoil == "hook":
        norm.register_forward_hook(lambda layer, *_: seen.append(int(layer.num_batches_tracked)))
    else:
        norm.compile(backend=lambda graph, inputs: graph.forward)
    peers(IMAGES)
    assert norm not in peers.counting_norms() and int(norm.num_batches_tracked) == 2
    assert seen == ([1, 2] if spoil == "hook" else [])


def test_copies_and_other_strategies_count_their_own_norms():
    peers = Networks(models.build("resnet8", 5) for _ in range(2))
    peers(IMAGES)
    other = copy.deepcopy(peers)
    other(IMAGES)
    other.arrange("grouped")
    other(IMAGES)
    other.arrange("loop")
    other(IMAGES)
    assert [int(networks[1].bn1.num_batches_tracked) for networks in (peers, other)] == [1, 4]


def test_a_compiler_takes_the_forward_in_one_piece_and_counts(monkeypatch):
    peers = Networks([models.build("resnet8", 5), Odd2()])
    monkeypatch.setattr(counts_module, "_Tally", None)
    torch.compile(peers, backend="eager", fullgraph=True)(IMAGES)
    assert int(peers[0].bn1.num_batches_tracked) == 1 and int(peers[1].norm.num_batches_tracked) == 2


class Odd2(nn.Module):
    """Calls its norm twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.norm(x))
