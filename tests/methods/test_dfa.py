"""DFA with given weights: its losses from the equations, what it trains, what it leaves alone, what it refuses."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.methods.dfa import DFA
from fastfuse.models.extract import extract
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests.losses import published

CLASSES, BATCH = 4, 3
SEARCHED = {"groups": [{"weights": [0.5, 0.25, 0.25]}, {"weights": [0.0, 0.0, 1.0]}, {"weights": [0.125, 0.625, 0.25]}]}
PAIRS = [("resnet8", "resnet20"), ("wrn10_1", "wrn22_2"), ("resnet8", "wrn22_1"), ("wrn10_2", "resnet20")]


def make(student: str = "resnet8", teacher: str = "resnet20", **options) -> DFA:
    torch.manual_seed(0)
    frozen = published.scramble(models.build(teacher, CLASSES))
    if options.get("aggregation", "searched") == "searched":
        options.setdefault("searched", SEARCHED)
    method = DFA([partial(models.build, student, CLASSES)], CLASSES, teachers=[frozen], **options)
    published.scramble(method.connectors)
    return method.double().train()


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, size, size, dtype=torch.float64), torch.randint(CLASSES, (BATCH,))


def step(method: DFA, images: Tensor, labels: Tensor):
    return method(images, labels, torch.tensor(0.0))


def connected(connector: nn.Module, x: Tensor) -> Tensor:
    """The 1x1 convolution and the norm of a batch, by hand."""
    x = torch.einsum("oi,bihw->bohw", connector.conv.weight[:, :, 0, 0], x)
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    scale, shift = (v[:, None, None] for v in (connector.norm.weight, connector.norm.bias))
    return scale * (x - mean) / (variance + connector.norm.eps).sqrt() + shift


def by_the_equations(method: DFA, images: Tensor, labels: Tensor, weights: list[list[float]]) -> dict[str, Tensor]:
    """Cross-entropy and, for each group, the squares of the difference, from hooks on the plain networks."""
    student, teacher = method.peers[0], method.teachers.plain(0).network
    ends = [blocks[-1] for blocks in student.stage_blocks]
    with torch.no_grad():
        theirs = extract(teacher.eval(), [path for stage in teacher.stage_blocks for path in stage])(images).features
    own = extract(student, ends)(images)
    wanted = {"student0_ce": published.cross_entropy(own.logits.logits, labels)}
    for i, alpha in enumerate(weights):
        aggregate = sum(a * theirs[3 * i + j] for j, a in enumerate(alpha))
        difference = connected(method.connectors[i], own.features[i]) - aggregate
        wanted[f"group{i}_dfa"] = method.dfa_weight * (difference * difference).mean()
    return wanted


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_terms_and_gradients_equal_the_equations(student: str, teacher: str) -> None:
    method = make(student, teacher, dfa_weight=0.3)
    images, labels = batch()
    again = copy.deepcopy(method)
    wanted = by_the_equations(again, images, labels, [group["weights"] for group in SEARCHED["groups"]])
    found = step(method, images, labels)
    assert {n: t.item() for n, t in found.terms.items()} == pytest.approx({n: t.item() for n, t in wanted.items()})
    assert found.loss.item() == pytest.approx(sum(t.item() for t in wanted.values()))
    found.loss.backward()
    sum(wanted.values()).backward()
    for ours, theirs in zip(method.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("teacher", ["wrn22_2", "resnet20"])
def test_the_margin_distance_halves_from_group_to_group(teacher: str) -> None:
    method = make("wrn10_1", teacher, distance="ofd", dfa_weight=0.5)
    images, labels = batch()
    own, theirs = copy.deepcopy(method).outputs(images)  # the teacher's maps alone
    terms = step(method, images, labels).terms
    for i, alpha in enumerate(torch.tensor(SEARCHED["groups"][i]["weights"]).double() for i in range(3)):
        target = connected(method.connectors[i], own.features[i])
        distance = method.margin_distances[i](theirs[3 * i : 3 * i + 3], alpha, target, group=i)
        assert terms[f"group{i}_dfa"].item() == pytest.approx(0.5 * distance.item() / 2 ** (2 - i), rel=1e-6)


def test_one_hot_weights_are_ordinary_feature_distillation() -> None:
    """aggregation="last" learns the teacher's own stage maps, which are its features."""
    method = make(aggregation="last")
    images, labels = batch()
    teacher, again = method.teachers.plain(0).network, copy.deepcopy(method)
    with torch.no_grad():
        maps = teacher.eval()(images).features
    own = again.peers[0](images)
    wanted = published.cross_entropy(own.logits, labels)
    for i in range(3):
        wanted = wanted + ((connected(again.connectors[i], own.features[i]) - maps[i]) ** 2).mean()
    found = step(method, images, labels).loss
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    found.backward()
    wanted.backward()
    for ours, theirs in zip(method.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


def test_aggregations() -> None:
    assert make(aggregation="uniform").weights.tolist() == pytest.approx([1 / 3] * 9)
    assert make(aggregation="last").weights.tolist() == [0, 0, 1] * 3
    assert make().weights.tolist() == pytest.approx([x for group in SEARCHED["groups"] for x in group["weights"]])
    drawn = make(aggregation="random")
    for group in drawn.weights.split(3):
        assert group.sum().item() == pytest.approx(1) and (group > 0).all() and group.std() > 0.01
    assert torch.equal(make(aggregation="random").weights, drawn.weights), "the same seed draws the same"
    other = make(aggregation="uniform")
    other.load_state_dict(drawn.state_dict())
    assert torch.equal(other.weights, drawn.weights), "a checkpoint has them"


def test_without_weight_the_teacher_teaches_nothing() -> None:
    """Connectors get zeros, and the student what cross-entropy alone gives it."""
    method, images_labels = make(dfa_weight=0.0), batch()
    plain = copy.deepcopy(method.peers[0])
    step(method, *images_labels).loss.backward()
    published.cross_entropy(plain(images_labels[0]).logits, images_labels[1]).backward()
    assert not any(p.grad.any() for p in method.connectors.parameters())
    for ours, theirs in zip(method.peers.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("distance", ["l2", "ofd"])
def test_steps_train_all_but_the_teacher(distance: str) -> None:
    method = make("wrn10_1", "wrn22_1", distance=distance)
    teacher = method.teachers.plain(0)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    frozen = {name: x.numpy().tobytes() for name, x in teacher.state_dict().items()}
    weights = method.weights.clone()
    train = TrainStep(method, build_optimizers(method, lr=0.05))
    images, labels = batch()
    losses = [train(images, labels, torch.tensor(0.0)).terms for _ in range(8)]
    assert [name for name, p in method.named_parameters() if torch.equal(p, before[name])] == []
    assert {name: x.numpy().tobytes() for name, x in teacher.state_dict().items()} == frozen
    assert torch.equal(method.weights, weights)
    assert sum(losses[-1].values()) < 0.75 * sum(losses[0].values())
    assert not any("teacher" in name or "margin" in name for name in method.state_dict())


@pytest.mark.parametrize("student", ["resnet8", "wrn10_1"])
def test_the_deployed_network_is_its_plain_self(student: str) -> None:
    method = make(student)
    images, labels = batch()
    TrainStep(method, build_optimizers(method))(images, labels, torch.tensor(0.0))
    plain = models.build(student, CLASSES).double()
    plain.load_state_dict(method.deployed_state(), strict=True)
    method.eval()
    torch.testing.assert_close(plain.eval()(images).logits, method.predict(images)["student0"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(step(method, images, labels).logits["student0"], method.predict(images)["student0"])


def test_every_strategy_gives_the_same_step() -> None:
    images, labels = batch()
    wanted = step(make("wrn10_1", "wrn22_1"), images, labels)
    for strategy in ("loop", "grouped"):
        method = make("wrn10_1", "wrn22_1")
        state = method.state_dict()
        assert method.arrange(strategy) == strategy
        found = step(method, images, labels)
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-9, atol=0)
        assert list(method.state_dict()) == list(state)


@pytest.mark.parametrize(
    ("distance", "backend"),
    [("l2", "eager"), *(pytest.param(d, "aot_eager", marks=pytest.mark.long) for d in ("l2", "ofd"))],
)
def test_the_step_compiles_whole(distance: str, backend: str) -> None:
    method = make("wrn10_1", "wrn16_1", distance=distance, aggregation="uniform")
    images, labels = batch()
    wanted = step(copy.deepcopy(method), images, labels)
    found = torch.compile(method, fullgraph=True, backend=backend)(images, labels, torch.tensor(0.0))
    torch.testing.assert_close(found.loss, wanted.loss)
    found.loss.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_weights_of_another_data_set_fit_by_their_numbers_alone() -> None:
    """Names of candidates and the text about the teacher are for readers."""
    groups = [{"candidates": [f"other.{j}" for j in range(3)], **group} for group in SEARCHED["groups"]]
    method = make("wrn10_1", "wrn22_2", searched={"groups": groups, "teacher": "another"})
    assert torch.equal(method.weights, make().weights)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dfa_weight": -1.0}, "--dfa-weight must be a finite number of at least 0, not -1.0"),
        ({"distance": "l3"}, "unknown --distance 'l3': did you mean l2"),
        ({"aggregation": "lasts"}, "unknown --aggregation 'lasts': did you mean last"),
        ({"aggregation": "searched", "searched": None}, "needs the weights of a search: give --aggregation-file"),
        ({"aggregation": "uniform", "searched": SEARCHED}, "--aggregation uniform takes no searched weights"),
        ({"searched": {"weights": []}}, "aggregation.json"),
        ({"searched": {"groups": [{"weights": [1.0]}] * 3}}, r"of 1 \+ 1 \+ 1 candidates .* has 3 \+ 3 \+ 3 in its"),
        ({"searched": {"groups": SEARCHED["groups"][:2]}}, r"of 3 \+ 3 candidates do not fit"),
        ({"searched": {"groups": [{"weights": [1.0, 1.0, 0.0]}] * 3}}, "group 1 must be finite and sum to 1"),
        ({"searched": {"groups": [{"weights": [1.0, float("nan"), 0.0]}] * 3}}, "must be finite and sum to 1"),
    ],
)
def test_unusable_options_are_refused(wrong: dict, said: str) -> None:
    teacher = models.build("resnet20", CLASSES)
    with pytest.raises(InputError, match=said):
        DFA([partial(models.build, "resnet8", CLASSES)], CLASSES, teachers=[teacher], **{"searched": SEARCHED, **wrong})


class FourStages(models.build("resnet8", CLASSES).__class__):
    """A network with one stage more."""

    feature_channels = (16, 16, 32, 64)
    stage_modules = (("layer1",), ("layer1",), ("layer2",), ("layer3",))


@pytest.mark.parametrize(
    ("teachers", "said"),
    [
        ([], "dfa needs trained teachers and has none: name them with --teachers"),
        (["resnet8", "resnet8"], "dfa learns from 1 teacher, not 2"),
        ([nn.Flatten()], r"the teacher \(Flatten\) has no stages of blocks"),
        ([FourStages(8, CLASSES)], "the teacher has 4 groups of maps and the student 3"),
    ],
)
def test_unusable_teachers_are_refused(teachers: list, said: str) -> None:
    built = [models.build(t, CLASSES) if isinstance(t, str) else t for t in teachers]
    with pytest.raises(InputError, match=said):
        DFA([partial(models.build, "resnet8", CLASSES)], CLASSES, teachers=built, aggregation="uniform")


def test_a_student_without_stages_is_refused() -> None:
    with pytest.raises(InputError, match=r"the student \(Flatten\) has no stages"):
        DFA([nn.Flatten], CLASSES, teachers=[models.build("resnet8", CLASSES)], aggregation="uniform")


def test_maps_of_another_resolution_are_refused() -> None:
    method = make("resnet8", "resnet20")
    method.peers[0].conv1.stride = (2, 2)
    with pytest.raises(InputError, match=r"group 1: the teacher's maps are \[8, 8\] and the student's \[4, 4\]"):
        step(method, *batch())
