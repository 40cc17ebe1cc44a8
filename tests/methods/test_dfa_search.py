"""The search of DFA's weights: both levels' gradients, what each half of a batch may touch, and what it finds."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fastfuse import data, models
from fastfuse.data.dataset import Dataset, Split
from fastfuse.errors import InputError
from fastfuse.methods.dfa import DFA
from fastfuse.methods.dfa_search import DFASearch
from fastfuse.models._blocks import Staged
from fastfuse.models.extract import extract
from fastfuse.train.engine import Engine
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from fastfuse.train.terms import TermLog
from tests.losses import published
from tests.methods.test_dfa import CLASSES, connected

BATCH = 6
PAIRS = [("resnet8", "resnet20"), ("wrn10_1", "wrn22_2"), ("resnet8", "wrn22_1")]
PROGRESS = torch.tensor(0.0)


def make(student: str = "resnet8", teacher: str = "resnet20", **options) -> DFASearch:
    torch.manual_seed(0)
    frozen = published.scramble(models.build(teacher, CLASSES))
    method = DFASearch([partial(models.build, student, CLASSES)], CLASSES, teachers=[frozen], **options)
    published.scramble(method.bridges)
    with torch.no_grad():
        method.betas.normal_()
    return method.double().train()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, 8, 8, dtype=torch.float64), torch.randint(CLASSES, (BATCH,))


def softmax(beta: Tensor) -> Tensor:
    return torch.exp(beta) / torch.exp(beta).sum()


def bridge_loss(method: DFASearch, betas: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The bridge loss of every group from its equations; both paths at the weights of `betas`."""
    teacher = method.teachers.plain(0).network
    with torch.no_grad():
        maps = extract(teacher.eval(), [path for stage in teacher.stage_blocks for path in stage])(images).features
    found = {}
    for i, bridge in enumerate(method.bridges):
        alpha, student = softmax(betas[3 * i : 3 * i + 3]), bridge.student
        aggregate = sum(alpha[j] * maps[3 * i + j] for j in range(3))
        x = images
        for names in student.stage_modules[: i + 1]:
            for name in names:
                x = student.get_submodule(name)(x)
        difference = aggregate - connected(bridge.from_student, x)
        x = connected(bridge.from_teacher, aggregate)
        for names in student.stage_modules[i + 1 :]:
            for name in names:
                x = student.get_submodule(name)(x)
        found[f"group{i}_ts"] = method.gamma_ts * published.cross_entropy(student.head(x)[0], labels)
        found[f"group{i}_st"] = method.gamma_st * (difference * difference).mean()
    return found


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_each_half_trains_its_own_level(student: str, teacher: str) -> None:
    """Terms of both halves; w's gradient is that of the first half alone, beta's that of the second alone."""
    method = make(student, teacher, gamma_st=0.7, gamma_ts=1.3)
    images, labels = batch()
    again, half = copy.deepcopy(method), BATCH // 2
    lower = bridge_loss(again, again.betas.detach(), images[:half], labels[:half])
    upper = bridge_loss(copy.deepcopy(method), again.betas, images[half:], labels[half:])
    found = method(images, labels, PROGRESS)
    wanted = lower | {f"val_{name}": term for name, term in upper.items()}
    assert {n: t.item() for n, t in found.terms.items()} == pytest.approx({n: t.item() for n, t in wanted.items()})
    assert found.loss.item() == pytest.approx(sum(t.item() for t in wanted.values()))
    found.loss.backward()
    sum(lower.values()).backward()
    (slope,) = torch.autograd.grad(sum(upper.values()), again.betas)
    torch.testing.assert_close(method.betas.grad, slope, rtol=1e-8, atol=1e-12)
    for ours, theirs in zip(method.bridges.parameters(), again.bridges.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)


def test_the_slope_of_the_weights_by_finite_differences() -> None:
    """Of the second half's loss in beta, students and connectors as they are."""
    method = make("wrn10_1", "wrn22_1")
    images, labels = batch()

    def upper(betas: Tensor) -> float:
        moved = copy.deepcopy(method)
        with torch.no_grad():
            moved.betas.copy_(betas)
            terms = moved(images, labels, PROGRESS).terms
        return sum(term.item() for name, term in terms.items() if name.startswith("val_"))

    method(images, labels, PROGRESS).loss.backward()
    step = 1e-5
    for j in range(len(method.betas)):
        move = torch.zeros_like(method.betas)
        move[j] = step
        slope = (upper(method.betas + move) - upper(method.betas - move)) / (2 * step)
        assert method.betas.grad[j].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)
    assert method.betas.grad.abs().min() > 1e-6, "each weight has a slope to be compared"


def test_the_second_half_leaves_no_trace_in_students_and_connectors() -> None:
    """Other images there: the same running statistics and gradients; beta's gradient is another."""
    images, labels = batch()
    others = torch.cat((images[: BATCH // 2], torch.randn_like(images[BATCH // 2 :])))
    states = []
    for given in (images, others):
        method = make()
        method(given, labels, PROGRESS).loss.backward()
        states.append((dict(method.bridges.named_buffers()), [p.grad for p in method.bridges.parameters()], method))
    for name, buffer in states[0][0].items():
        assert torch.equal(buffer, states[1][0][name]), name
    assert all(torch.equal(a, b) for a, b in zip(states[0][1], states[1][1], strict=True))
    assert not torch.equal(states[0][2].betas.grad, states[1][2].betas.grad)
    before = dict(make().bridges.named_buffers())
    changed = [name for name, buffer in states[0][0].items() if not torch.equal(buffer, before[name])]
    assert set(changed) == set(before), "the first half moves all statistics, each norm once"
    counts = [buffer for name, buffer in states[0][0].items() if name.endswith("num_batches_tracked")]
    assert counts and all(count == 1 for count in counts)


@pytest.mark.parametrize(("option", "path"), [("gamma_st", "_st"), ("gamma_ts", "_ts")])
def test_a_path_without_weight_trains_nothing(option: str, path: str) -> None:
    """Without ST the first stages and Fs get nothing, without TS the last ones and Ft."""
    method = make(**{option: 0.0})
    found = method(*batch(), PROGRESS)
    found.loss.backward()
    assert all(not term for name, term in found.terms.items() if name.endswith(path))
    for i, bridge in enumerate(method.bridges):
        first = {f"student.{name}." for names in bridge.student.stage_modules[: i + 1] for name in names}
        first = (*first, "from_student.")
        for name, p in bridge.named_parameters():
            idle = name.startswith(first) == (path == "_st")
            assert (p.grad is None or not p.grad.any()) == idle, name


def test_a_step_trains_everything_but_the_teacher() -> None:
    method = make("wrn10_1", "wrn22_1")
    frozen = {name: x.numpy().tobytes() for name, x in method.teachers.plain(0).state_dict().items()}
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    train = TrainStep(method, build_optimizers(method, lr=0.02))
    images, labels = batch()
    found = [train(images, labels, PROGRESS).terms for _ in range(10)]
    assert [name for name, p in method.named_parameters() if torch.equal(p, before[name])] == []
    assert {n: x.numpy().tobytes() for n, x in method.teachers.plain(0).state_dict().items()} == frozen
    lower = [sum(t for n, t in terms.items() if not n.startswith("val_")) for terms in (found[0], found[-1])]
    assert lower[1] < 0.7 * lower[0]
    assert not any("teacher" in name.split(".")[0] for name in method.state_dict())


def test_weights_have_the_optimizer_of_architecture_search() -> None:
    sgd, adam = make(alpha_lr=0.01, alpha_weight_decay=0.1).parameter_groups(lr=0.3)
    assert [group["lr"] for group in sgd] == [0.3]
    (group,) = adam
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.5, 0.999), 0.1)
    assert DFASearch.defaults == {"gamma_st": 1.0, "gamma_ts": 1.0, "alpha_lr": 3e-4, "alpha_weight_decay": 1e-3}


def test_results_are_what_distillation_takes() -> None:
    method = make("resnet8", "wrn22_2")
    found = json.loads(json.dumps(method.results()))["aggregation"]
    assert found["teacher"] == "WideResNet of 3+3+3 blocks, 32+64+128 channels"
    assert found["groups"][1]["candidates"] == ["layer2.0", "layer2.1", "layer2.2"]
    for i, group in enumerate(found["groups"]):
        assert sum(group["weights"]) == pytest.approx(1, abs=1e-12)
        assert group["weights"] == pytest.approx(softmax(method.betas[3 * i : 3 * i + 3]).tolist())
    teacher = models.build("wrn22_2", CLASSES)
    student = DFA([partial(models.build, "resnet8", CLASSES)], CLASSES, teachers=[teacher], searched=found)
    assert student.weights.tolist() == pytest.approx([x for g in found["groups"] for x in g["weights"]], rel=1e-6)


def test_it_starts_from_uniform_weights() -> None:
    teacher = models.build("resnet20", CLASSES)
    method = DFASearch([partial(models.build, "resnet8", CLASSES)], CLASSES, teachers=[teacher])
    assert all(alpha.tolist() == pytest.approx([1 / 3] * 3) for alpha in method.alphas())


def test_students_are_fresh_ones_and_heads_are_their_last_stages() -> None:
    method = make().eval()
    images, labels = batch()
    networks = method.networks()
    assert list(networks) == method.students() == ["group0", "group1", "group2"]
    assert not any(
        torch.equal(networks["group0"].conv1.weight, networks[name].conv1.weight) for name in ("group1", "group2")
    )
    with torch.no_grad():
        found = method.predict(images)
        assert method(images, labels, PROGRESS).logits.keys() == found.keys() == networks.keys()
        features = method.teachers(images)[0].features
        for i, (bridge, alpha) in enumerate(zip(method.bridges, method.alphas(), strict=True)):
            aggregate = sum(alpha[j] * features[3 * i + j] for j in range(3))
            wanted = bridge.student.resume(bridge.from_teacher(aggregate), i + 1).logits
            torch.testing.assert_close(found[f"group{i}"], wanted)


def test_what_it_deploys_is_beta() -> None:
    method = make()
    (name, state), *others = method.deployed_states().items()
    assert name == "aggregation" and not others
    assert torch.equal(torch.cat(list(state.values())), method.betas.detach())


class Tiny(Staged):
    """Two stages of two blocks, each a convolution and a norm."""

    feature_channels = (4, 6)
    stage_modules = (("layer1",), ("layer2",))

    def __init__(self) -> None:
        super().__init__()
        pairs = [(3, 4), (4, 4), (4, 6), (6, 6)]
        blocks = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)) for a, b in pairs]
        self.layer1, self.layer2 = nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:])
        self.fc = nn.Linear(6, CLASSES)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_the_step_compiles_whole(backend: str) -> None:
    short = backend == "eager"
    method = DFASearch([Tiny], CLASSES, teachers=[Tiny()]).double() if short else make("resnet8", "resnet8")
    images, labels = batch()
    eager = copy.deepcopy(method)
    wanted = eager(images, labels, PROGRESS)
    found = torch.compile(method, fullgraph=True, backend=backend)(images, labels, PROGRESS)
    torch.testing.assert_close(found.loss, wanted.loss)
    found.loss.backward()
    wanted.loss.backward()
    for ours, theirs in zip(method.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(method.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("strategy", ["grouped", "branches"])
def test_other_strategies_are_refused(strategy: str) -> None:
    assert make().arrange("auto") == "loop"
    with pytest.raises(InputError, match=f"dfa-search cannot run as {strategy}: each of its students runs in two"):
        make().arrange(strategy)


@pytest.mark.parametrize("count", [0, 3])
def test_a_batch_without_two_halves_is_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"a batch of the search has two halves, and {count} images have none"):
        make()(torch.zeros(count, 3, 8, 8, dtype=torch.float64), torch.zeros(count, dtype=torch.int64), PROGRESS)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gamma_st": -1.0}, "--gamma-st must"),
        ({"gamma_ts": float("inf")}, "--gamma-ts must"),
        ({"alpha_lr": 0.0}, "--alpha-lr must be a finite number above 0"),
        ({"alpha_weight_decay": -1.0}, "--alpha-weight-decay must"),
        ({"teachers": []}, "dfa-search needs trained teachers and has none"),
    ],
)
def test_unusable_options_are_refused(wrong: dict, said: str) -> None:
    given = {"teachers": [models.build("resnet8", CLASSES)], **wrong}
    with pytest.raises(InputError, match=said):
        DFASearch([partial(models.build, "resnet8", CLASSES)], CLASSES, **given)


def test_a_student_of_another_resolution_is_refused() -> None:
    method = make()
    for bridge in method.bridges:
        bridge.student.conv1.stride = (2, 2)
    with pytest.raises(InputError, match=r"group 1: the teacher's maps are \[8, 8\] and the student's \[4, 4\]"):
        method(*batch(), PROGRESS)


class Source(nn.Module):
    """Keeps the images, which blocks read."""

    def forward(self, x: Tensor) -> Tensor:
        self.images = x
        return x


class Planted(nn.Module):
    """A block that gives the images' own pattern, or noise that says nothing of them, at one level of the pyramid."""

    def __init__(self, source: Source, channels: int, scale: int, *, informative: bool) -> None:
        super().__init__()
        self.source, self.scale, self.informative = (source,), scale, informative
        self.lift = nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        images = nn.functional.avg_pool2d(self.source[0].images, self.scale)
        return self.lift(images if self.informative else 2 * torch.randn_like(images))


class PlantedTeacher(Staged):
    """Three stages of three blocks, of which one is informative: the last, the middle and the first."""

    feature_channels = (16, 32, 64)
    stage_modules = (("source", "layer1"), ("layer2",), ("layer3",))
    informative = (2, 1, 0)

    def __init__(self) -> None:
        super().__init__()
        self.source = Source()
        for i, channels in enumerate(self.feature_channels):
            blocks = (Planted(self.source, channels, 2**i, informative=j == self.informative[i]) for j in range(3))
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, CLASSES)


def patterned() -> Dataset:
    """Images of one coarse pattern per class in noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % CLASSES
    patterns = torch.randint(0, 2, (CLASSES, 2, 2, 3), generator=generator) * 60.0
    coarse = patterns[labels].repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = (coarse + torch.randint(0, 96, (256, 8, 8, 3), generator=generator)).clamp(0, 255).to(torch.uint8)
    split = Split(images, labels)
    half = torch.full((3,), 0.5)
    return Dataset("patterns", split, split, None, tuple("abcd"), half, half / 2, 0, False)


def test_the_search_finds_the_planted_blocks() -> None:
    """Through the engine, with images of two fixed halves: more than half the weight on what is informative."""
    torch.manual_seed(0)
    make_student = partial(models.build, "resnet8", CLASSES)
    method = DFASearch([make_student], CLASSES, teachers=[PlantedTeacher()], alpha_lr=0.05).train()
    step = TrainStep(method, build_optimizers(method, lr=0.05))
    batches = data.TrainingBatches(
        patterned(), batch_size=32, parts=method.image_parts, memory_format=step.memory_format
    )
    engine = Engine(step, batches, TermLog(1000, "cpu"))
    for epoch in range(8):
        engine.start_epoch(seed=0, epoch=epoch, step=0, factors=[1.0] * batches.steps)
        for number in range(batches.steps):
            engine.run(number)
    groups = method.results()["aggregation"]["groups"]
    found = [group["weights"][place] for group, place in zip(groups, PlantedTeacher.informative, strict=True)]
    assert all(weight > 0.5 for weight in found), found
