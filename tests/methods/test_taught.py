"""kd, at, ft, feed and paraphraser: losses and gradients from the equations in float64; what becomes of teachers."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.methods import METHODS, Method, build_method
from fastfuse.nn.factor import Paraphraser
from fastfuse.nn.teachers import Teachers
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests.losses import published
from tests.losses.batches import differing
from tests.nn.stacking import untidy

CLASSES, BATCH = 6, 4
ZERO = torch.tensor(0.0)
# The teachers and options of each method that are tried.
CASES = {
    "kd": ("kd", ["resnet14"], {}),
    "kd, three teachers": ("kd", ["resnet8", "wrn10_1", "resnet8"], {"temperature": 2.5, "kd_weight": 0.6}),
    "at": ("at", ["resnet14"], {}),
    "at, a wider teacher": ("at", ["wrn10_2"], {"at_weight": 50.0}),
    "ft": ("ft", ["resnet14"], {}),
    "ft, a wider teacher": ("ft", ["wrn10_2"], {"factor_ratio": 0.25, "factor_weight": 20.0}),
    "feed-sequential": ("feed-sequential", ["resnet8"], {}),
    "feed-sequential, paraphrased": ("feed-sequential", ["resnet8"], {"factor_targets": "paraphrased"}),
    "feed-parallel": ("feed-parallel", ["resnet8"] * 5, {}),
    "feed-parallel, mean": ("feed-parallel", ["resnet8"] * 3, {"teacher_reduction": "mean"}),
    "feed-parallel, paraphrased": ("feed-parallel", ["resnet8"] * 2, {"factor_targets": "paraphrased"}),
    "feed-parallel, widths": ("feed-parallel", ["resnet8", "wrn10_2", "resnet14"], {"translator_norm": True}),
}


def batch(dtype: torch.dtype = torch.float64, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, size, size, dtype=dtype), torch.randint(CLASSES, (BATCH,))


def trained(*names: str) -> list[nn.Module]:
    return [untidy(models.build(name, CLASSES)) for name in names]


def paraphrasers(teachers: list[nn.Module], ratio: float = 0.5) -> list[dict[str, Tensor]]:
    channels = [teacher.feature_channels[-1] for teacher in teachers]
    return [Paraphraser(c, round(c * ratio)).double().state_dict() for c in channels]


def make(name: str, teachers: list[nn.Module], **options: object) -> Method:
    if name == "ft" or options.get("factor_targets") == "paraphrased":
        options.setdefault("paraphrasers", paraphrasers(teachers, options.get("factor_ratio", 0.5)))
    return build_method(
        name, model="resnet8", students=1, num_classes=CLASSES, teachers=teachers, **options
    ).double().train()  # fmt: skip


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


def small(channels: int = 64, size: int = 2) -> nn.Module:
    """A teacher whose maps have another size."""

    class Small(nn.Module):
        feature_channels = (channels,)

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 3, padding=1)

        def forward(self, x: Tensor) -> models._blocks.NetworkOutput:
            deep = F.adaptive_avg_pool2d(self.conv(x), size)
            return models._blocks.NetworkOutput(deep.mean((2, 3))[:, :CLASSES], (deep,))

    return Small()


def others() -> list[nn.Module]:
    return [models.build("resnet8", CLASSES + 1)]


@pytest.mark.parametrize(
    ("name", "teachers", "options", "said"),
    [
        ("kd", list, {}, "kd needs trained teachers and has none: name them with --teachers"),
        ("feed-parallel", list, {}, "feed-parallel needs trained teachers"),
        ("paraphraser", list, {}, "paraphraser needs trained teachers"),
        ("at", lambda: trained("resnet8", "resnet8"), {}, "at learns from 1 teacher, not 2: .*--teacher-count"),
        ("ft", lambda: trained("resnet8", "resnet8"), {}, "ft learns from 1 teacher, not 2"),
        ("feed-sequential", lambda: trained("resnet8", "resnet8"), {}, "learns from 1 teacher, not 2"),
        ("paraphraser", lambda: trained("resnet8", "resnet8"), {}, "learns from 1 teacher, not 2"),
        ("kd", lambda: trained("resnet8"), {"kd_weight": 1.5}, "--kd-weight must be between 0 and 1, not 1.5"),
        ("kd", lambda: trained("resnet8"), {"temperature": 0.0}, "--temperature must be a finite number above 0"),
        ("at", lambda: trained("resnet8"), {"at_weight": -1.0}, "--at-weight must be"),
        ("feed-parallel", lambda: trained("resnet8"), {"factor_weight": -1.0}, "--factor-weight must be"),
        ("paraphraser", lambda: trained("resnet8"), {"factor_ratio": 0.0}, "--factor-ratio must be"),
        ("paraphraser", lambda: trained("resnet8"), {"factor_ratio": 0.001}, "raise --factor-ratio"),
        ("feed-parallel", lambda: trained("resnet8"), {"factor_targets": "row"}, "--factor-targets 'row'.*raw"),
        ("feed-parallel", lambda: trained("resnet8"), {"teacher_reduction": "max"}, "--teacher-reduction 'max'"),
        ("ft", lambda: trained("resnet8"), {"paraphrasers": []}, "1 teachers with 0 paraphrasers: .*for each teacher"),
        (
            "ft",
            lambda: trained("resnet8"),
            {"paraphrasers": [Paraphraser(64, 16).state_dict()]},
            "paraphraser 0 does not fit a map of 64 channels and --factor-ratio 0.5: train it",
        ),
        (
            "feed-parallel",
            lambda: trained("resnet8"),
            {"paraphrasers": [Paraphraser(64, 32).state_dict()]},
            "--factor-targets raw uses no paraphrasers",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, teachers: Callable, options: dict, said: str):
    with pytest.raises(InputError, match=said):
        make(name, teachers(), **options)


@pytest.mark.parametrize(
    ("name", "teachers", "size", "said"),
    [
        ("kd", others, 8, "teacher 0 tells 7 classes apart and the student 6: kd compares logits"),
        ("at", lambda: [small()], 8, "maps of 1 stages and the student of 3: .*--taps as many"),
        ("at", lambda: trained("resnet18"), 32, "maps of 4 stages and the student of 3"),
        ("feed-parallel", lambda: [small(size=3)], 8, r"teacher 0 is \[3, 3\] and the student's \[2, 2\]: .*family"),
        ("ft", lambda: [small(size=3)], 8, r"teacher 0 is \[3, 3\] and the student's \[2, 2\]"),
    ],
)
def test_teachers_that_do_not_suit_are_refused_at_the_first_batch(name, teachers, size, said):
    method = make(name, teachers())
    with pytest.raises(InputError, match=said):
        method(*batch(size=size), ZERO)


def test_attention_of_other_sizes_is_refused():
    from fastfuse.losses import at

    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
    with pytest.raises(InputError, match=r"stage 2: the teacher's map is \[2, 2\] and the student's \[4, 4\]"):
        at.term(maps, [maps[0], torch.randn(2, 8, 2, 2)], at_weight=1.0)


def test_factor_transfer_does_not_compare_classes():
    method = make("feed-parallel", others())
    assert method(*batch(), ZERO).loss.isfinite()


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
