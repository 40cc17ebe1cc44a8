"""Whole methods on stacked networks: loss, terms, gradients, statistics, one step; what leaves a method is the same."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastfuse import functional, models
from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch
from fastfuse.methods import METHODS, Method
from tests.methods import making
from tests.nn.stacking import same, untidy

CLASSES, BATCH = 6, 3
STACKED = making.SIDE_BY_SIDE


def make(name: str, students: int = 2, model: str = "resnet8") -> Method:
    return untidy(making.make(name, students, model=model, num_classes=CLASSES))


def batch(size: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(CLASSES, (BATCH,))
    return torch.randn(BATCH, 3, size, size, dtype=torch.float64), labels, torch.tensor(3.0, dtype=torch.float64)


def both(name: str, students: int = 2, model: str = "resnet8") -> tuple[Method, Method]:
    loop = make(name, students, model)
    grouped = copy.deepcopy(loop)
    assert grouped.arrange("grouped") == "grouped"
    return loop, grouped


def gradients(method: Method) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in method.named_parameters() if not name.startswith("peers.")}
    for name, p in method.peers.named_parameters():
        found |= {f"peers.{own}": part for own, part in method.peers.split(name, p.grad).items()}
    return found


def update(method: Method) -> None:
    groups = method.parameter_groups()
    torch.optim.SGD(groups.sgd).step()
    if groups.adam:
        torch.optim.Adam(groups.adam).step()


@pytest.mark.parametrize(
    ("name", "students", "model", "size"),
    [
        pytest.param("ffsd", 2, "resnet8", 13, id="ffsd: all terms, odd maps"),
        pytest.param("ffsd", 3, "wrn10_1", 13, id="ffsd, three students, signed maps"),
        pytest.param("ffsd", 2, "resnet18", 37, id="ffsd: four stages, max pooling", marks=pytest.mark.long),
        pytest.param("independent", 1, "resnet8", 13, id="a single network"),
        pytest.param("dml", 3, "resnet8", 13, id="dml"),
        pytest.param("ffl", 3, "resnet8", 13, id="ffl: branches on one trunk"),
        pytest.param("ffl", 2, "wrn10_1", 13, id="ffl: branches that begin with a norm of what they share"),
        pytest.param("one", 3, "resnet8", 13, id="one: a gate that reads the trunk"),
        pytest.param("ffcl", 2, "resnet8", 13, id="ffcl: gradients through the fused map"),
        pytest.param("ffcl in full", 2, "resnet8", 13, id="ffcl: three stages, a copy of each network"),
        pytest.param("feed-parallel", 1, "resnet8", 13, id="feed-parallel: teachers beside the student"),
        pytest.param("dfa", 1, "wrn10_1", 13, id="dfa: maps inside the network"),
    ],
)
def test_a_step_equals_the_loop(name, students, model, size):
    loop, grouped = both(name, students, model)
    given = batch(size)
    outputs = [method(*given) for method in (loop, grouped)]
    for output, method in zip(outputs, (loop, grouped), strict=True):
        output.loss.backward()
        assert list(output.terms) == list(outputs[0].terms)
        update(method)
    same({"loss": outputs[1].loss.detach()} | outputs[1].terms, {"loss": outputs[0].loss.detach()} | outputs[0].terms)
    same(outputs[1].logits, outputs[0].logits)
    same(gradients(grouped), gradients(loop))
    assert all(g.any() for g in gradients(grouped).values())
    same(dict(grouped.state_dict()), dict(loop.state_dict()))


@pytest.mark.parametrize("name", STACKED)
def test_what_leaves_a_method_is_the_same(name):
    loop, grouped = both(name)
    assert list(grouped.state_dict()) == list(loop.state_dict())
    assert grouped.students() == loop.students()
    images, *_ = batch()
    loop.eval(), grouped.eval()
    found, wanted = grouped.predict(images), loop.predict(images)
    assert list(found) == list(wanted)
    same(found, wanted)
    plain = models.build("resnet8", CLASSES).double().eval()
    plain.load_state_dict(grouped.deployed_state(), strict=True)
    same([plain(images).logits], [wanted[loop.deployed]])
    grouped.arrange("loop")
    assert list(grouped.networks()) == list(loop.networks())


@pytest.mark.parametrize("name", STACKED)
def test_stacked_parameters_are_each_in_one_group(name):
    _, grouped = both(name, 3)
    groups = grouped.parameter_groups()
    seen = Counter(id(p) for group in (*groups.sgd, *groups.adam) for p in group["params"])
    assert set(seen.values()) == {1} and set(seen) == {id(p) for p in grouped.parameters()}


def test_single_networks_are_gone_once_stacked():
    _, grouped = both("ffsd")
    with pytest.raises(InputError, match="stacked networks are no members"):
        grouped.networks()


@pytest.mark.parametrize("strategy", ["grouped", "branches"])
@pytest.mark.parametrize("name", making.LOOP_ONLY)
def test_what_runs_as_a_loop_alone_says_why(name, strategy):
    method = making.make(name, num_classes=CLASSES)
    assert method.arrange("auto") == method.arrange("loop") == "loop"
    with pytest.raises(InputError, match=f"{name} cannot run as {strategy}: (each|it) .*use --strategy loop"):
        method.arrange(strategy)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_strategies_are_refused(name):
    with pytest.raises(InputError, match="unknown strategy 'looop': did you mean loop"):
        make(name).arrange("looop")


def test_a_grouped_step_needs_no_values():
    """Tensors without storage cannot be read: nothing in the step waits for the device."""
    method = make("ffsd").float()
    method.arrange("grouped")
    images, labels, progress = (x.to("meta") for x in batch())
    output = method.to("meta")(images.float(), labels, progress)
    output.loss.backward()
    assert output.loss.is_meta and all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_fusion_head_reads_the_stacked_map_in_place(monkeypatch, memory_format):
    """What the fusion operator and its first kernel are given lies in the stacked map itself."""
    if torch.cuda.is_available():
        pytest.skip("looks into launches of Triton's interpreter, which is not used on a machine with a GPU")
    from triton.runtime import interpreter

    given, launched, maps = [], [], []
    fuse = functional.concat_fuse_all

    def watched_fuse(modules, **options):
        given.extend(list(module.features) for module in modules)
        monkeypatch.setattr(_dispatch, "_process_default", "triton")
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", note)
        return fuse(modules, **options)

    def watched_stack(networks, images):
        stacked = networks.stacked(images)
        maps.append(stacked.features[-1])
        return networks.stacked.apart(stacked)

    def note(executor, *arguments, **options):
        launched.append((executor.fn.__name__, list(tensors_in(arguments))))

    method = make("ffsd", 3).float()
    method.to(memory_format=memory_format).arrange("grouped")
    monkeypatch.setattr(functional, "concat_fuse_all", watched_fuse)
    monkeypatch.setattr(type(method.peers), "forward", watched_stack)
    images, labels, _ = batch()
    method(images.float().contiguous(memory_format=memory_format), labels, torch.tensor(3.0))

    (stacked,), (students, (leader,)) = maps, given
    assert stacked.is_contiguous(memory_format=memory_format)
    size, channels = stacked.element_size(), stacked.shape[1] // 4
    for i, feature in enumerate([*students, leader]):
        first = stacked.data_ptr() + i * channels * stacked.stride(1) * size
        assert (feature.data_ptr(), feature.stride()) == (first, stacked.stride()), f"network {i}"
    name, first_launch = next((n, t) for n, t in launched if n.startswith("concat_fuse_fwd"))
    read = {x.data_ptr() for x in first_launch}
    assert {feature.data_ptr() for feature in (*students, leader)} <= read, name


def tensors_in(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
