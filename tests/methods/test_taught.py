"""kd, at, ft, feed and paraphraser: losses and gradients from the equations in float64; what becomes of teachers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse import models
from fastfuse.methods import METHODS, Method, build_method
from fastfuse.nn.factor import Paraphraser
from fastfuse.nn.teachers import Teachers
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests.losses import published
from tests.losses.batches import differing
from tests.methods.taught_cases import CASES, CLASSES, ZERO, batch, make, paraphrasers, trained


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution and LeakyReLU(0.1), as sums over shifted maps."""
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[-2:]
    out = bias[None, :, None, None].expand(len(x), -1, height, width)
    for i in range(3):
        for j in range(3):
            out = out + torch.einsum("bchw,oc->bohw", padded[..., i : i + height, j : j + width], weight[..., i, j])
    return torch.maximum(out, 0.1 * out)


def encoded(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    for i in (1, 2, 3):
        x = convolved(x, state[f"conv{i}.weight"], state[f"conv{i}.bias"])
    return x


def translated(method: Method, x: Tensor, index: int) -> Tensor:
    """What translator `index` makes of a map; all of one width."""
    (together,) = method.translators.together
    count = together.conv3.groups
    state = {key: value.chunk(count)[index] for key, value in together.named_parameters()}
    return encoded(x, state)


def wanted_terms(
    method: Method, teachers: list[nn.Module], states: list[dict[str, Tensor]], images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The equations, with the method's own student and translators."""
    student = method.peers[0](images)
    with torch.no_grad():
        taught = [copy.deepcopy(teacher).double().eval()(images) for teacher in teachers]
    cross_entropy = published.cross_entropy(student.logits, labels)
    if method.name == "kd":
        t, w = method.temperature, method.kd_weight
        divergences = [published.kl(student.logits, output.logits, t) for output in taught]
        return {"student0_ce": (1 - w) * cross_entropy, "student0_kd": w * sum(divergences) / len(divergences)}
    if method.name == "at":
        pairs = zip(student.features, taught[0].features, strict=True)
        each = [published.distance(published.attention(x), published.attention(y)) for x, y in pairs]
        return {"student0_ce": cross_entropy, "student0_attention": method.at_weight * sum(each)}
    distances = []
    for i, output in enumerate(taught):
        target = output.features[-1]
        if states:
            own = {key.removeprefix("encoder."): value for key, value in states[i].items() if "encoder" in key}
            target = encoded(target, own)
        ours = translated(method, student.features[-1], i)
        distances.append((published.unit(ours) - published.unit(target)).abs().mean())
    total = sum(distances) / (len(distances) if method.teacher_reduction == "mean" else 1)
    return {"student0_ce": cross_entropy, "student0_factor": method.factor_weight * total}


@pytest.mark.parametrize("strategy", ["loop", "grouped"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "feed-parallel, widths"])
def test_terms_and_gradients_are_those_of_the_equations(case, strategy):
    name, networks, options = CASES[case]
    teachers = trained(*networks)
    states = []
    if name == "ft" or options.get("factor_targets") == "paraphrased":
        states = paraphrasers(teachers, options.get("factor_ratio", 0.5))
        options = options | {"paraphrasers": states}
    method = make(name, teachers, **options)
    method.teachers.arrange(strategy)
    images, labels = batch()
    twin = copy.deepcopy(method)
    output = method(images, labels, ZERO)
    wanted = wanted_terms(twin, teachers, states, images, labels)
    assert {n: t.item() for n, t in output.terms.items()} == pytest.approx(
        {n: t.item() for n, t in wanted.items()}, rel=1e-9
    )
    assert all(term.item() > 0 for term in wanted.values())
    output.loss.backward()
    sum(wanted.values()).backward()
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (method, twin)]
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    assert differing(*gradients, 1e-8) == {}


@pytest.mark.parametrize(
    ("name", "weight", "term"),
    [
        ("kd", "kd_weight", "student0_kd"),
        ("at", "at_weight", "student0_attention"),
        ("ft", "factor_weight", "student0_factor"),
        ("feed-parallel", "factor_weight", "student0_factor"),
    ],
)
def test_without_its_weight_a_term_gives_no_gradient(name, weight, term):
    """The student then learns from its labels alone, and what only that term reaches learns nothing."""
    teachers = trained("resnet8")
    method = make(name, teachers, **{weight: 0.0})
    alone = build_method("independent", model="resnet8", students=1, num_classes=CLASSES).double().train()
    alone.peers.load_state_dict(method.peers.state_dict())
    images, labels = batch()
    output = method(images, labels, ZERO)
    assert output.terms[term].item() == 0
    output.loss.backward()
    alone(images, labels, ZERO).loss.backward()
    for (n, ours), theirs in zip(method.peers.named_parameters(), alone.peers.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=n)
    others = [p for n, p in method.named_parameters() if not n.startswith("peers.")]
    assert len(others) == (6 if term == "student0_factor" else 0)
    assert all(p.grad is None or not p.grad.any() for p in others)


def test_kd_of_weight_one_does_not_see_the_labels():
    method = make("kd", trained("resnet8"), kd_weight=1.0)
    images, labels = batch()
    found = [copy.deepcopy(method)(images, own, ZERO).loss for own in (labels, (labels + 1) % CLASSES)]
    assert found[0] == found[1]


def test_feed_of_one_paraphrased_teacher_is_factor_transfer_exactly():
    teachers = trained("resnet8")
    states = paraphrasers(teachers)
    found = []
    images, labels = batch()
    for name, options in (("ft", {}), ("feed-parallel", {"factor_targets": "paraphrased"}),
                          ("feed-sequential", {"factor_targets": "paraphrased"})):  # fmt: skip
        torch.manual_seed(5)
        method = make(name, teachers, paraphrasers=states, **options)
        step = TrainStep(method, build_optimizers(method))
        losses = [step(images, labels, ZERO).loss for _ in range(3)]
        found.append([*losses, *method.state_dict().values()])
    for others in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], others, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_teachers_do_not_change_by_a_bit(case):
    name, networks, options = CASES[case]
    teachers = trained(*networks)
    given = [{n: x.numpy().tobytes() for n, x in t.state_dict().items()} for t in teachers]
    method = make(name, teachers, **options)
    method.arrange("grouped")

    def held() -> list[bytes]:
        modules = [*method.teachers._running, *(method.teachers.plain(i) for i in range(len(teachers)))]
        return [x.numpy().tobytes() for module in modules for x in module.state_dict().values()]

    step = TrainStep(method, build_optimizers(method))
    before = held()
    student = copy.deepcopy(method.state_dict())
    for _ in range(3):
        step(*batch(), ZERO)
    assert held() == before
    changed = {n for n, x in method.state_dict().items() if not torch.equal(x, student[n])}
    assert changed == set(student), "everything else learns"
    assert not any("teacher" in n for n in [*student, *dict(method.named_parameters())])
    assert [{n: x.numpy().tobytes() for n, x in t.state_dict().items()} for t in teachers] == given


@pytest.mark.parametrize("case", CASES)
def test_the_student_alone_is_deployed(case):
    name, networks, options = CASES[case]
    method = make(name, trained(*networks), **options)
    step = TrainStep(method, build_optimizers(method))
    images, labels = batch()
    step(images, labels, ZERO)
    plain = models.build("resnet8", CLASSES).double()
    fresh = {n: x.shape for n, x in plain.state_dict().items()}
    state = method.deployed_state()
    assert {n: x.shape for n, x in state.items()} == fresh
    plain.load_state_dict(state, strict=True)
    method.eval()
    with torch.no_grad():
        predicted = method.predict(images)
        torch.testing.assert_close(predicted["student0"], plain.eval()(images).logits, rtol=1e-10, atol=1e-10)
    assert set(predicted) == {"student0"} and method.students() == ["student0"]


@pytest.mark.parametrize("case", CASES)
def test_prediction_leaves_the_teachers_alone(case, monkeypatch):
    name, networks, options = CASES[case]
    method = make(name, trained(*networks), **options).eval()
    wanted = method(*batch(), ZERO).loss
    assert wanted.isfinite()

    def refuse(self: nn.Module, images: Tensor) -> None:
        raise AssertionError("the teachers were asked")

    monkeypatch.setattr(Teachers, "forward", refuse)
    assert set(method.predict(batch()[0])) == {"student0"}


@pytest.mark.parametrize("case", CASES)
def test_each_parameter_is_in_exactly_one_group(case):
    name, networks, options = CASES[case]
    method = make(name, trained(*networks), **options)
    groups = method.parameter_groups(lr=0.3, nesterov=False)
    assert groups.adam == [] and all((g["lr"], g["nesterov"], g["momentum"]) == (0.3, False, 0.9) for g in groups.sgd)
    grouped = [id(p) for group in groups.sgd for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters())
    assert {id(p) for p in groups.sgd[0]["params"]} == {id(p) for p in method.peers.parameters()}


def test_paraphraser_learns_to_give_the_teachers_map():
    teachers = trained("resnet8")
    method = make("paraphraser", teachers)
    images, labels = batch()
    feature = copy.deepcopy(teachers[0]).eval()(images).features[-1].detach()
    module = copy.deepcopy(method.paraphraser)
    output = method(images, labels, ZERO)
    decoder = module.decoder
    rebuilt = encoded(feature, module.encoder.state_dict())
    for conv in (decoder.conv1, decoder.conv2, decoder.conv3):
        rebuilt = convolved(rebuilt, conv.weight.transpose(0, 1).flip(2, 3), conv.bias)
    wanted = (rebuilt - feature).abs().mean()
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert output.terms["reconstruction"] == output.loss
    torch.testing.assert_close(output.logits["teacher"], copy.deepcopy(teachers[0]).eval()(images).logits)

    assert method.arrange("auto") == "loop"
    step = TrainStep(method, build_optimizers(method))
    losses = [step(images, labels, ZERO).loss.item() for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    (deployed,) = method.deployed_states().items()
    assert deployed[0] == "paraphraser"
    Paraphraser(64, 32).double().load_state_dict(deployed[1], strict=True)
    assert set(method.predict(images)) == {"teacher"}


@pytest.mark.parametrize("name", ["kd", "at", "ft", "feed-parallel", "feed-sequential", "paraphraser"])
def test_published_values_are_the_defaults(name):
    assert METHODS[name].defaults == {
        "kd": {"temperature": 4.0, "kd_weight": 0.9},
        "at": {"at_weight": 1000.0},
        "ft": {"factor_weight": 500.0, "factor_ratio": 0.5, "translator_norm": False},
        "feed-sequential": {
            "factor_weight": 500.0, "factor_ratio": 0.5, "translator_norm": False, "factor_targets": "raw",
        },
        "feed-parallel": {
            "factor_weight": 500.0, "factor_ratio": 0.5, "translator_norm": False, "factor_targets": "raw",
            "teacher_reduction": "sum",
        },
        "paraphraser": {"factor_ratio": 0.5},
    }[name]  # fmt: skip
    assert METHODS[name].teacher_count == (5 if name == "feed-parallel" else 1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("kd", "loop"), ("at", "grouped"), ("ft", "grouped"), ("feed-parallel", "loop"), ("paraphraser", "auto")],
)
def test_a_step_compiles_as_one_graph(name, strategy):
    method = make(name, trained("resnet8"))
    method.arrange(strategy)
    images, labels = batch()
    steps = [TrainStep(own, build_optimizers(own), compiled=own is method) for own in (copy.deepcopy(method), method)]
    wanted, found = ([step(images, labels, ZERO).loss for _ in range(2)] for step in steps)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strategy", ["loop", "grouped"])
@pytest.mark.parametrize("case", ["kd", "at", "ft", "feed-parallel, widths"])
def test_low_precision_stays_near_float32(case, strategy):
    name, networks, options = CASES[case]
    method = make(name, trained(*networks), **options).float()
    method.arrange(strategy)
    images, labels = batch(torch.float32)
    wanted = copy.deepcopy(method)(images, labels, ZERO)
    found = TrainStep(method, build_optimizers(method), amp="bf16")(images, labels, ZERO)
    assert found.loss.dtype == torch.float32
    for term, value in wanted.terms.items():
        assert found.terms[term].item() == pytest.approx(value.item(), rel=0.05, abs=1e-3), term
