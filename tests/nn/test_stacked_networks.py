"""Networks: one interface and the same state dicts whatever the strategy, copies, and branches."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.nn import Networks, networks, unstack
from tests.nn.stacking import CLASSES, members, same, step, tensors


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 9, 9, dtype=torch.float64)


def both(model: str = "resnet8", count: int = 3) -> tuple[Networks, Networks]:
    loop = members(model, count)
    grouped = copy.deepcopy(loop)
    grouped.arrange("grouped")
    return loop, grouped


def plain_state(loop: Networks) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": x for i, network in enumerate(loop) for name, x in network.state_dict().items()}


@pytest.mark.parametrize("channels_last", [False, True])
def test_state_dicts_do_not_depend_on_the_strategy(channels_last):
    loop = members("wrn10_1", 3)
    if channels_last:
        loop = loop.to(memory_format=torch.channels_last)
    grouped = copy.deepcopy(loop)
    grouped.arrange("grouped")
    ours, theirs = (nn.ModuleDict({"peers": each}).state_dict() for each in (grouped, loop))
    assert list(ours) == list(theirs) and ours._metadata == theirs._metadata
    assert "peers.2.conv1.weight" in ours
    assert all(torch.equal(ours[name], x) and ours[name].stride() == x.stride() for name, x in theirs.items())
    assert not any(x.requires_grad for x in ours.values())


@pytest.mark.parametrize("into", ["loop", "grouped"])
@pytest.mark.parametrize("source", ["loop", "grouped"])
def test_either_strategy_loads_what_the_other_has_saved(tmp_path, source, into):
    trained = nn.ModuleDict({"peers": both()[source == "grouped"]})
    step(trained["peers"], images())
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    fresh = nn.ModuleDict({"peers": both()[into == "grouped"]})
    before = {name: p.data_ptr() for name, p in fresh.named_parameters()}
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)
    assert all(torch.equal(x, trained.state_dict()[name]) for name, x in fresh.state_dict().items())
    assert {name: p.data_ptr() for name, p in fresh.named_parameters()} == before, "optimizers see these tensors"


def spoil(state: dict, what: str) -> None:
    if what == "missing":
        del state["peers.1.layer1.0.bn1.weight"]
    elif what == "unexpected":
        state["peers.1.layer1.0.bn9.weight"] = torch.zeros(())
    elif what == "another network":
        state["peers.3.fc.bias"] = torch.zeros(CLASSES)
    else:
        state["peers.2.fc.bias"] = torch.zeros(CLASSES + 1)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "Missing key.*peers.1.layer1.0.bn1.weight"),
        ("unexpected", "Unexpected key.*peers.1.layer1.0.bn9.weight"),
        ("another network", "Unexpected key.*peers.3.fc.bias"),
        ("size", "size mismatch for peers.2.fc.bias"),
    ],
)
def test_what_does_not_fit_is_named_as_in_the_loop(what, said):
    for own in both():
        holder = nn.ModuleDict({"peers": own})
        state = dict(holder.state_dict())
        spoil(state, what)
        with pytest.raises(RuntimeError, match=said) as caught:
            holder.load_state_dict(state, strict=True)
        assert "stacked" not in str(caught.value)
        if what != "size":
            found = holder.load_state_dict(state, strict=False)
            assert len(found.missing_keys) + len(found.unexpected_keys) == 1


def test_there_and_back_changes_nothing():
    loop, other = both()
    other.arrange("loop")
    assert [type(network) for network in other] == [type(network) for network in loop]
    assert all(torch.equal(x, loop.state_dict()[name]) for name, x in other.state_dict().items())
    x = images()
    for _ in range(2):
        assert other.arrange("grouped") == other.strategy == "grouped"
        same(step(other, x), step(loop, x))
    assert other.arrange("loop") == "loop"
    same(tensors(other(x)), tensors(loop(x)))
    for network, own in zip(other, loop, strict=True):
        plain = models.build("resnet8", CLASSES).double()
        plain.load_state_dict(network.state_dict(), strict=True)
        same(tensors([plain(x)]), tensors([own(x)]))


@pytest.mark.parametrize("strategy", ["loop", "grouped"])
def test_the_state_of_one_network_is_that_of_the_plain_one(strategy):
    loop, own = both()
    own.arrange(strategy)
    for i in (0, 2, -1):
        state = own.state_of(i)
        assert list(state) == list(loop[i].state_dict())
        assert all(torch.equal(x, loop[i].state_dict()[name]) for name, x in state.items())
        # Saved alone, it takes the room of one network.
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in state.values())
    with pytest.raises(InputError, match="network 3 does not exist: there are networks 0 to 2"):
        own.state_of(3)


def test_split_and_join_take_what_belongs_to_a_parameter_apart():
    loop, grouped = both()
    step(loop, images())
    found = {}
    for name, p in grouped.named_parameters():
        parts = grouped.split(name, p.detach() * 2)
        assert torch.equal(grouped.join(name, parts), p * 2)
        assert all(part.untyped_storage().data_ptr() != p.data_ptr() for part in parts.values())
        found |= parts
    before = {name: x * 2 for name, x in grouped.state_dict().items() if name in found}
    assert set(found) == {name for name, _ in loop.named_parameters()}
    assert all(torch.equal(x, before[name]) for name, x in found.items())
    own = dict(loop.named_parameters())
    assert all(loop.split(name, p) == {name: p} and loop.join(name, {name: p}) is p for name, p in own.items())


def test_copies_and_conversions():
    loop, grouped = both()
    x = images()
    wanted = tensors(loop(x))
    copied = copy.deepcopy(grouped)
    same(tensors(copied(x)), wanted)
    step(copied, x)  # the copy's own weights
    assert all(torch.equal(y, loop.state_dict()[n]) for n, y in grouped.state_dict().items() if "weight" in n)
    single = grouped.float().to(memory_format=torch.channels_last)
    assert all(y.dtype == torch.float32 for y in tensors(single(x.float())))
    assert unstack(single.stacked, 1).conv1.weight.dtype == torch.float32
    back = single.double().arrange("loop")
    assert back == "loop" and all(p.dtype == torch.float64 for p in single.parameters())


def test_a_moving_average_follows_either_strategy():
    x = images()
    states = []
    for own in both():
        averaged = AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        for _ in range(2):
            step(own, x)
            averaged.update_parameters(own)
        states.append(averaged.module.state_dict())
        assert not torch.equal(states[-1]["0.conv1.weight"], own.state_dict()["0.conv1.weight"])
    same(dict(states[1]), dict(states[0]))


def test_stacked_networks_are_no_members():
    _, grouped = both()
    assert len(grouped) == 3 and "Stacked" in repr(grouped)
    for use in (lambda: grouped[0], lambda: list(grouped)):
        with pytest.raises(InputError, match="no members; take state_of"):
            use()


def test_one_network_is_stacked_too():
    loop, grouped = both(count=1)
    x = images()
    same(step(grouped, x), step(loop, x))
    same(dict(grouped.state_dict()), dict(loop.state_dict()))


def test_branches_need_a_gpu():
    own = members("resnet8", 2)
    with pytest.raises(
        InputError, match="branches needs CUDA streams, and the networks are on cpu; use --strategy loop"
    ):
        own.arrange("branches")
    assert own.strategy == "loop"


class Stream:
    """Writes down what a CUDA stream is told."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: "Stream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")


def test_branches_fork_from_the_current_stream_and_join_it(monkeypatch):
    """Only the order, without a GPU: every network runs inside its own stream, between the fork and the join."""
    events: list[str] = []
    current = Stream("current", events)

    @contextlib.contextmanager
    def inside(stream):
        events.append(f"enter {stream.name}")
        yield
        events.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(networks, "_stream", lambda device, i: Stream(f"stream{i}", events))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: events.append(f"{tuple(x.shape)} on {s.name}"))
    own = members("resnet8", 2)
    own.strategy = "branches"
    x = images()
    wanted = tensors([network(x) for network in own])
    own.train()
    assert all(torch.equal(a, b) for a, b in zip(tensors(own(x)), wanted, strict=True))
    outputs = [f"{tuple(y.shape)} on current" for y in wanted]
    assert events == [
        "stream0 waits for current", "enter stream0", "leave stream0", f"{tuple(x.shape)} on stream0",
        "stream1 waits for current", "enter stream1", "leave stream1", f"{tuple(x.shape)} on stream1",
        "current waits for stream0", "current waits for stream1", *outputs,
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["branches", "grouped"])
def test_strategies_agree_on_a_gpu(strategy):
    loop = members("resnet8", 3).cuda()
    own = copy.deepcopy(loop)
    own.arrange(strategy)
    x = images().cuda()
    same([y.cpu() for y in step(own, x)], [y.cpu() for y in step(loop, x)])
    same({n: y.cpu() for n, y in own.state_dict().items()}, {n: y.cpu() for n, y in loop.state_dict().items()})


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["branches", "grouped"])
def test_strategies_replay_in_a_graph(strategy):
    own = members("resnet8", 3).cuda()
    own.arrange(strategy)
    x = images().cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        own(x)
    torch.cuda.current_stream().wait_stream(side)
    eager, graph = copy.deepcopy(own), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            found = tensors(own(x))
        graph.replay()
        wanted = tensors(eager(x))
    same([y.cpu() for y in found], [y.cpu() for y in wanted])
    same({n: y.cpu() for n, y in own.state_dict().items()}, {n: y.cpu() for n, y in eager.state_dict().items()})
