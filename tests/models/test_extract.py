"""`extract` gives what the network gives and what its layers made, and leaves the network as it is."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import fastfuse
from fastfuse.errors import InputError
from fastfuse.models.extract import extract, last_maps
from fastfuse.nn import Networks

TAPS = {"deep": "body.1", "shallow": "stem"}


class Net(nn.Module):
    """Two convolutions, a norm and a classifier, and one thing that stands in the way of a tap."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind, self.stem = kind, nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(inplace=kind == "inplace"))
        self.unused = nn.Conv2d(6, 6, 1)
        self.several, self.twice, self.many = nn.MaxPool2d(2, return_indices=True), nn.Tanh(), nn.ModuleList([nn.ELU()])
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.body(self.stem(x) * scale)
        self.several(x)
        if self.kind == "fails":
            raise ArithmeticError
        return self.fc(self.twice(self.twice(x)).mean((2, 3)))


def written_out(state: dict[str, Tensor], x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and both maps of `Net` in training, from its parameters alone."""
    shallow = F.conv2d(x, state["stem.weight"], state["stem.bias"], padding=1)
    y = shallow * scale
    y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = y * state["body.0.weight"][:, None, None] + state["body.0.bias"][:, None, None]
    deep = F.conv2d(y, state["body.1.weight"], state["body.1.bias"], stride=2)
    return F.linear(deep.relu().tanh().tanh().mean((2, 3)), state["fc.weight"], state["fc.bias"]), deep, shallow


def net(kind: str = "") -> Net:
    return Net(kind).double()


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_it_is_a_public_name():
    assert fastfuse.extract is extract and "extract" in fastfuse.__all__


def test_a_mapping_gives_a_dict_and_a_list_a_tuple_with_the_same_maps():
    network = net()
    wanted = written_out(dict(network.named_parameters()), images(), 0.5)
    named = extract(network, TAPS)(images(), scale=0.5)
    listed = extract(network, list(TAPS.values()))(images(), 0.5)
    assert list(named.features) == ["deep", "shallow"] and isinstance(listed.features, tuple)
    for found in ((named.logits, *named.features.values()), (listed.logits, *listed.features)):
        for mine, right in zip(found, wanted, strict=True):
            close(mine, right)


def test_gradients_through_the_maps_reach_the_network():
    network = net()
    own = {name: p for name, p in network.named_parameters() if not name.startswith("unused")}
    output = extract(network, TAPS)(images())
    outputs = [(output.logits, *output.features.values()), written_out(own, images())]
    weights = [torch.randn_like(x) for x in outputs[0]]
    found, wanted = (torch.autograd.grad(list(given), list(own.values()), weights) for given in outputs)
    for mine, right in zip(found, wanted, strict=True):
        close(mine, right)


def test_the_network_gives_what_it_gave_and_nothing_is_kept():
    network = net().eval()
    before = network(images())
    module = extract(network, TAPS)
    assert not module.training and module.network is network
    module(images())
    assert torch.equal(network(images()), before) and isinstance(network(images()), Tensor)
    assert module._notes.calls == [] and not module._notes.open


def test_after_a_forward_that_failed_nothing_is_kept():
    module = extract(net("fails"), TAPS)
    with pytest.raises(ArithmeticError):
        module(images())
    assert module._notes.calls == [] and not module._notes.open


def test_state_dicts_have_the_networks_own_keys():
    network = net()
    pair = nn.ModuleList([extract(network, TAPS), net()])
    assert list(pair[0].state_dict()) == list(network.state_dict())
    assert list(pair.state_dict()) == [f"{i}.{key}" for i in (0, 1) for key in network.state_dict()]
    plain, other = net(), extract(net(), TAPS)
    plain.load_state_dict(pair[0].state_dict(), strict=True)
    other.load_state_dict(network.state_dict(), strict=True)
    nn.ModuleList([other, net()]).load_state_dict(pair.state_dict(), strict=True)
    assert torch.equal(plain.eval()(images()), other.eval()(images()).logits)
    state = network.state_dict()
    state["stray"] = state.pop("fc.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*fc\.weight.*Unexpected.*stray"):
        other.load_state_dict(state, strict=True)


def test_a_deep_copy_listens_to_its_own_layers():
    first = extract(net(), TAPS)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(2.0)
    for module in (first, second):
        logits, features = module(images())
        wanted = written_out(dict(module.network.named_parameters()), images())
        for mine, right in zip((logits, *features.values()), wanted, strict=True):
            close(mine, right)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_into_one_graph(backend):
    torch._dynamo.reset()
    plain = extract(net(), TAPS)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend=backend)
    for seed in (0, 1):  # the second call reads no maps of the first
        results = [module(images(seed)) for module in (plain, compiled)]
        for mine, right in zip(*((r.logits, *r.features.values()) for r in results), strict=True):
            close(mine, right)
        for result in results:
            (result.logits.sum() + result.features["deep"].square().sum()).backward()
    for mine, right in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (right.grad is None)
        if right.grad is not None:
            close(mine.grad, right.grad)


def test_it_trains_under_distributed_data_parallel():
    plain = extract(net(), TAPS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain), find_unused_parameters=True)
        for module in (plain, wrapped):
            output = module(images())
            (output.logits.square().sum() + sum(x.square().sum() for x in output.features.values())).backward()
        pairs = [*zip(wrapped.parameters(), plain.parameters(), strict=True)]
        trained = [(mine.grad, right.grad) for mine, right in pairs if right.grad is not None]
        assert len(trained) == len(pairs) - 2  # all but `unused`
        for mine, right in trained:
            close(mine, right)
    finally:
        dist.destroy_process_group()


def test_it_runs_without_versions_in_inference_mode():
    module = extract(net().eval(), TAPS)
    with torch.inference_mode():
        found = module(images())
    close(found.features["deep"], module(images()).features["deep"])


def submodule_compiled() -> nn.Module:
    network = net()
    network.body.compile(backend="eager")
    return network


NETWORKS = {
    "compiled": (
        lambda: torch.compile(net(), backend="eager"),
        r"\(OptimizedModule\) is compiled already.*then compile",
    ),
    "a compiled part": (submodule_compiled, r"body \(Sequential\) is compiled already"),
    "traced": (lambda: torch.jit.trace(nn.Sequential(nn.ReLU()), torch.ones(1)), "TorchScript"),
    "wrapped": (lambda: nn.DataParallel(net()), r"\(DataParallel\) is wrapped.*extract first"),
    "no module": (lambda: net().forward, "needs a torch.nn.Module, not a method"),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_that_cannot_be_tapped_are_refused_with_the_reason(kind):
    make, said = NETWORKS[kind]
    with pytest.raises(InputError, match=said) as raised:
        extract(make(), ["0"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("taps", "says"),
    [
        pytest.param({"a": "body.11"}, "unknown layer of Net 'body.11': did you mean body.1", id="no such layer"),
        pytest.param(["stm"], "did you mean stem", id="misspelt"),
        pytest.param([""], "unknown layer", id="the network itself"),
        pytest.param(["many"], "many is a ModuleList, which never runs; tap one of its members", id="a container"),
        pytest.param([], "at least one", id="none"),
        pytest.param("stem", "list of them", id="one path that is no list"),
    ],
)
def test_taps_that_do_not_exist_are_refused(taps, says):
    network = net()
    with pytest.raises(InputError, match=says) as raised:
        extract(network, taps)
    assert "\n" not in str(raised.value)
    assert not any(layer._forward_hooks for layer in network.modules())


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        pytest.param("twice", "", "layer twice ran 2 times in this forward, and must run once", id="called again"),
        pytest.param("unused", "", "layer unused ran 0 times", id="not called"),
        pytest.param("several", "", "layer several gives a tuple, not a tensor", id="two results"),
        pytest.param(
            "body.1", "inplace", "body.1 is overwritten in place by what follows", id="in-place ReLU after it"
        ),
    ],
)
def test_taps_that_show_to_be_useless_are_refused_in_the_forward(path, kind, says):
    network = net(kind)
    module = extract(network, [path])
    with pytest.raises(InputError, match=says):
        module(images())
    assert network(images()).shape == (3, 5)  # the network itself goes on working
    close(extract(network, ["stem"])(images()).logits, network(images()))


def test_replicas_of_data_parallel_are_refused():
    module = extract(net(), TAPS)
    replica = module._replicate_for_data_parallel()
    with pytest.raises(InputError, match="use DistributedDataParallel"):
        replica(images())


def test_it_runs_in_a_loop_and_says_that_it_cannot_be_stacked():
    own = Networks(extract(net(), TAPS) for _ in range(2))
    with pytest.raises(InputError, match=r"cannot be stacked.*use --strategy loop$"):
        own.arrange("grouped")
    assert own.arrange("auto") == "loop" and len(own(images())) == 2


class Stages(nn.Module):
    """Maps of 12 (twice), 6 and 3 positions a side; inside the second stage still one of 12."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Sequential(nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 2, stride=2), nn.ReLU())
        self.third = nn.Conv2d(6, 7, 2, stride=2)
        self.last = nn.Identity()
        self.fixed, self.pool = nn.AdaptiveAvgPool2d(5), nn.AvgPool2d(3)
        self.flat = nn.Unflatten(1, (1, 2, 12))  # channels last: no map of 12

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.third(self.second(self.relu(self.stem(x)))))
        self.fixed(x)
        self.flat(x.flatten(1)[:, :24])
        return self.pool(x).flatten(1)


def test_the_last_map_of_each_resolution():
    output, maps = last_maps(Stages(), torch.zeros(2, 3, 12, 12))
    assert output.shape == (2, 7)
    assert list(maps.items()) == [("relu", (4, 12, 12)), ("second", (6, 6, 6)), ("last", (7, 3, 3))]


def test_of_layers_that_are_overwritten_or_run_twice_none_is_the_last():
    network = Stages()
    network.last = network.relu  # runs twice, and overwrites both what the stem and what the third made
    _, maps = last_maps(network, torch.zeros(2, 3, 12, 12))
    assert list(maps.items()) == [("second.0", (5, 12, 12)), ("second", (6, 6, 6))]
    assert not any(layer._forward_hooks for layer in network.modules())
