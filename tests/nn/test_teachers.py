"""Frozen teachers: folded and stacked they give what they gave alone, and nobody sees or changes them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.models.extract import extract
from fastfuse.nn.folding import folded
from fastfuse.nn.teachers import Teachers
from tests.nn.stacking import CLASSES, same, tensors, untidy

IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32, dtype=torch.float64).sin().view(2, 3, 32, 32)
# Norms that follow no convolution directly, of one network.
LEFT = {"resnet8": 0, "resnet14": 0, "resnet18": 0, "wrn10_1": 4, "wrn10_2": 4}


def networks(*names: str) -> list[nn.Module]:
    return [untidy(models.build(name, CLASSES)).train() for name in names]


def alone(given: list[nn.Module], images: Tensor = IMAGES) -> list[Tensor]:
    """What each gives in evaluation, from copies."""
    with torch.no_grad():
        return tensors([copy.deepcopy(network).eval()(images) for network in given])


def bytes_of(network: nn.Module) -> dict[str, bytes]:
    return {name: x.numpy().tobytes() for name, x in network.state_dict().items()}


def norms(running: list[nn.Module]) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for network in running for layer in network.modules())


@pytest.mark.parametrize("strategy", ["loop", "grouped"])
@pytest.mark.parametrize(
    ("names", "running"),
    [
        pytest.param(["resnet8"], 1, id="one"),
        pytest.param(["resnet8"] * 2, 1, id="two"),
        pytest.param(["resnet14"] * 5, 1, id="five"),
        pytest.param(["wrn10_2"] * 2, 1, id="biased convolutions; norms that follow no convolution"),
        pytest.param(["resnet18"] * 2, 1, id="ImageNet"),
        pytest.param(["resnet8", "wrn10_1", "resnet8", "resnet14", "wrn10_1"], 3, id="architectures in turn"),
    ],
)
def test_outputs_are_those_of_the_plain_networks_in_their_order(names, running, strategy):
    given = networks(*names)
    teachers = Teachers(given)
    assert teachers.arrange(strategy) == teachers.strategy == strategy
    same(tensors(teachers(IMAGES)), alone(given))
    assert len(teachers._running) == (running if strategy == "grouped" else len(names))
    assert norms(teachers._running) == sum(LEFT[name] for name in (set(names) if strategy == "grouped" else names))


def test_a_cpu_runs_them_one_after_another_if_it_may_choose():
    teachers = Teachers(networks("resnet8", "resnet8"))
    for strategy in ("auto", "branches"):
        teachers.arrange("grouped")
        assert teachers.arrange(strategy) == teachers.strategy == "loop"
        assert len(teachers._running) == 2 and norms(teachers._running) == 0


def off_the_cpu(teachers: Teachers, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were on a GPU, where those who leave the choice have them grouped."""
    monkeypatch.setattr(teachers, "_on_cpu", lambda: False)


@pytest.mark.parametrize(("name", "left"), [("googlenet", 0), ("densenet10_4", 9)])
def test_concatenating_networks_are_folded_and_not_stacked(name, left, monkeypatch):
    given = networks(name, name)
    teachers = Teachers(given)
    with pytest.raises(InputError, match=r"teacher 0 cannot run grouped with others like it: .*cat.*--strategy loop"):
        teachers.arrange("grouped")
    off_the_cpu(teachers, monkeypatch)
    teachers.arrange("auto")
    same(tensors(teachers(IMAGES[:1])), alone(given, IMAGES[:1]))
    assert (norms(teachers._running), len(teachers._running)) == (2 * left, 2)


class Untraceable(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x)).mean((2, 3))
        return out if out.sum() > 0 else -out


class Twice(nn.Module):
    """One convolution before two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x)))).mean((2, 3))


class Hooked(nn.Module):
    """A norm whose result is doubled by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.register_forward_hook(lambda layer, args, result: 2 * result)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


class ByTheBatch(nn.Module):
    """A norm without statistics of its own, and a map that is read before its norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
        self.other, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        read_twice = self.other(x)
        return (self.norm(self.conv(x)) + self.last(read_twice) * read_twice).mean((2, 3))


@pytest.mark.parametrize("kind", [Untraceable, Twice, Hooked, ByTheBatch])
@pytest.mark.parametrize("strategy", ["loop", "auto"])
def test_what_cannot_be_folded_runs_as_it_is(kind, strategy, monkeypatch):
    given = [kind().double() for _ in range(2)]
    for norm in (
        layer for network in given for layer in network.modules() if layer._buffers.get("running_var") is not None
    ):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
    teachers = Teachers(given)
    off_the_cpu(teachers, monkeypatch)
    teachers.arrange(strategy)
    for found, network in zip(teachers(IMAGES), given, strict=True):
        torch.testing.assert_close(found, copy.deepcopy(network).eval()(IMAGES), rtol=0, atol=0)


def test_a_network_with_its_maps_taken_by_hooks_is_a_teacher():
    given = [untidy(extract(models.build("resnet8", CLASSES), ["layer1", "layer3"])) for _ in range(2)]
    teachers = Teachers(given)
    with pytest.raises(InputError, match=r"teacher 0 cannot run grouped with others like it: .*Extracted.*traced"):
        teachers.arrange("grouped")
    teachers.arrange("loop")
    wanted = [copy.deepcopy(network).eval()(IMAGES) for network in given]
    same([m for output in teachers(IMAGES) for m in output.features], [m for w in wanted for m in w.features])


def test_folding_is_done_on_copies():
    (network,) = networks("resnet8")
    before, mode = bytes_of(network), network.training
    found = folded(network)
    assert norms([found]) == 0 and norms([network]) == 9
    assert bytes_of(network) == before and network.training is mode
    teachers = Teachers([network])
    teachers.arrange("grouped")
    assert bytes_of(teachers.plain(0)) == before
    assert all(parameter.requires_grad for parameter in network.parameters())
    with torch.no_grad():
        network.fc.weight.add_(1.0)
    assert bytes_of(teachers.plain(0)) == before


@pytest.mark.parametrize("strategy", [None, "loop", "grouped"])
def test_training_around_them_neither_reaches_nor_changes_them(strategy):
    given = networks("resnet8", "resnet8")
    method = nn.ModuleDict({"student": models.build("resnet8", CLASSES).double(), "teachers": Teachers(given)})
    teachers = method["teachers"]
    if strategy:
        teachers.arrange(strategy)
    held = [x.clone() for network in teachers._running for x in network.state_dict().values()]
    wanted = tensors(teachers(IMAGES))
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    for _ in range(2):
        method.train()
        loss = sum((ours - theirs).abs().mean() for ours in method["student"](IMAGES)[:1]
                   for theirs in [output.logits for output in teachers(IMAGES)])  # fmt: skip
        loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors(teachers(IMAGES)), wanted, strict=True))
    found = [x for network in teachers._running for x in network.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(found, held, strict=True))
    assert not any(x.requires_grad for x in wanted)
    assert [bytes_of(teachers.plain(i)) for i in range(2)] == [bytes_of(network) for network in given]
    assert not any(network.training for network in teachers._running)


def test_they_are_in_no_state_dict_and_no_list_of_parameters():
    holder = nn.ModuleDict({"own": nn.Linear(2, 2), "teachers": Teachers(networks("resnet8"))})
    assert set(holder.state_dict()) == set(dict(holder.named_parameters())) == {"own.weight", "own.bias"}
    assert list(holder.buffers()) == []
    holder.load_state_dict(nn.ModuleDict({"own": nn.Linear(2, 2)}).state_dict(), strict=True)


@pytest.mark.parametrize("strategy", ["loop", "grouped"])
def test_copies_stand_alone_and_follow_another_dtype_and_format(strategy):
    teachers = Teachers(networks("resnet8", "resnet8"))
    teachers.arrange(strategy)
    wanted = tensors(teachers(IMAGES))
    copied = copy.deepcopy(teachers)
    nn.ModuleList([copied]).to(torch.float32).to(memory_format=torch.channels_last)
    for network in [*copied._running, copied.plain(0)]:
        weights = [p for p in network.parameters() if p.dim() == 4]
        assert all(w.dtype == torch.float32 and w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert all(torch.equal(a, b) for a, b in zip(tensors(teachers(IMAGES)), wanted, strict=True))
    for found, want in zip(tensors(copied(IMAGES.float())), wanted, strict=True):
        torch.testing.assert_close(found, want.float(), rtol=1e-3, atol=1e-3)


def test_no_teachers_give_nothing():
    teachers = Teachers([])
    assert [teachers.arrange(strategy) for strategy in ("grouped", "auto")] == ["grouped", "loop"]
    assert teachers(IMAGES) == [] and len(teachers) == 0


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["loop", "grouped"])
def test_they_compile_as_part_of_one_graph(strategy):
    teachers = Teachers(networks("resnet8", "wrn10_1", "resnet8"))
    teachers.arrange(strategy)
    same(tensors(torch.compile(teachers, fullgraph=True)(IMAGES)), tensors(teachers(IMAGES)))


def test_refusals():
    teachers = Teachers(networks("resnet8"))
    with pytest.raises(InputError, match="teacher 1 does not exist: there are teachers 0 to 0"):
        teachers.plain(1)
    with pytest.raises(InputError, match="unknown strategy 'group': did you mean grouped"):
        teachers.arrange("group")
