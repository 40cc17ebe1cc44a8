"""FFCL's terms and gradients against its equations, written down once more; which weight moves which gradient."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastfuse import FusionLoss
from fastfuse.errors import InputError
from fastfuse.losses.ffcl import own_knowledge, positive_knowledge
from tests.losses import batches, published

HYPER = {
    "temperature": 3.0,
    "response_weight": 0.7,
    "peer_weight": 0.3,
    "fused_stages": 1,
    "feature_distance": "attention",
    "feature_temperature": 1.0,
    "attention_weight": 10.0,
    "regularization": "virtual",
    "regularization_weight": 0.1,
    "regularization_temperature": 20.0,
    "detach_fusion": False,
}
# channels of the peers' maps, size of their last map, deviations of hyper-parameters
CASES = {
    "a student and a wider teacher": ([4, 9], 3, {}),
    "two students of one teacher: the mean over two peers": ([4, 5, 9], 2, {}),
    "the regularisation of Tf-KD's program": ([4, 9], 3, {"regularization": "published"}),
    "without regularisation cross-entropy is whole": ([4, 9], 3, {"regularization": "off"}),
    "the fused head does not reach the peers": ([4, 9], 3, {"detach_fusion": True}),
    "another temperature and share": ([8, 8], 2, {"regularization_temperature": 2.5, "regularization_weight": 0.4}),
    "squared differences, a connector for the narrow one": ([4, 9], 3, {"feature_distance": "mse"}),
    "KL over positions": ([9, 9], 3, {"feature_distance": "kl", "feature_temperature": 2.5}),
    "two stages": ([[3, 4], [5, 9], [3, 9]], 2, {"fused_stages": 2}),
    "two of three stages, detached": ([[2, 3, 4], [2, 5, 4]], 2, {"fused_stages": 2, "detach_fusion": True}),
    "three stages through connectors": ([[3, 4, 8], [3, 6, 5]], 2, {"fused_stages": 3, "feature_distance": "mse"}),
    "two stages, KL": ([[3, 4], [5, 4]], 2, {"fused_stages": 2, "feature_distance": "kl"}),
    "each one's own copy": ([4, 9], 3, {"regularization": "self"}),
    "copies, a low temperature": ([8, 8, 4], 2, {"regularization": "self", "regularization_temperature": 1.5}),
}


def prepared(case: str, **deviations: object) -> tuple[FusionLoss, dict, dict]:
    peers, deep, changed = CASES[case]
    hyper = HYPER | changed | deviations
    loss = FusionLoss(peers, batches.CLASSES, method="ffcl", **hyper)
    given = batches.arguments(peers, deep=deep)
    if hyper["regularization"] == "self":
        given["copy_logits"] = [batches.logits(4) for _ in peers]
    return published.scramble(loss.double()), given, hyper


def virtual_teacher(labels: Tensor, classes: int) -> Tensor:
    """Probabilities [B, K]: 0.99 for the label, the rest shared by the others."""
    u = torch.full((len(labels), classes), 0.01 / (classes - 1), dtype=torch.float64)
    u[torch.arange(len(labels)), labels] = 0.99
    return u


def regularization(logits: Tensor, labels: Tensor, temperature: float, form: str) -> Tensor:
    u = virtual_teacher(labels, logits.shape[1])
    if form == "published":
        q = torch.exp(u / temperature)
        log_p = logits - torch.logsumexp(logits, 1, keepdim=True)
    else:
        q = u ** (1 / temperature)
        log_p = logits / temperature - torch.logsumexp(logits / temperature, 1, keepdim=True)
    q = q / q.sum(1, keepdim=True)
    elements = q * (q.log() - log_p)
    return 100 * elements.mean() if form == "published" else temperature**2 * elements.sum() / len(logits)


def far(feature: Tensor, fused: Tensor, hyper: dict) -> Tensor:
    """The distance of a map, behind its connector, from the fused one."""
    fused = fused.detach()
    if hyper["feature_distance"] == "attention":
        return published.distance(published.attention(feature), published.attention(fused))
    if hyper["feature_distance"] == "mse":
        return ((feature - fused) ** 2).sum() / feature.numel()
    return published.kl(*(x.flatten(0, 1).flatten(1) for x in (feature, fused)), hyper["feature_temperature"])


def equations(
    state: dict, hyper: dict, given: dict, factor: float, together: Callable = lambda maps, depth: maps
) -> dict[str, Tensor]:
    """All terms; `together` brings the maps of a stage to one size."""
    logits, labels, ensemble = given["logits"], given["labels"], sum(given["logits"]) / len(given["logits"])
    peers, t, terms = range(len(logits)), hyper["temperature"], {}
    for depth in range(hyper["fused_stages"], 0, -1):  # the deepest last, whose logits the peers learn from
        number = "" if depth == 1 else str(depth)
        maps = together([own[-depth] for own in given["features"]], depth)
        head = "fusion" if depth == 1 else f"shallow_fusions.fusion{depth}"
        fused = published.fuse([m.detach() for m in maps] if hyper["detach_fusion"] else maps, state, head)
        fused_logits = published.classify(fused, state, head)
        terms[f"fusion{number}_ce"] = published.cross_entropy(fused_logits, labels)
        terms[f"fusion{number}_kl"] = factor * published.kl(fused_logits, ensemble, t)
        for i in peers:
            own = f"connectors.student{i}" + (f"_{depth}" if number else "")
            close = far(published.connect(maps[i], state, own), fused, hyper)
            terms[f"student{i}_feature{number}"] = factor * hyper["attention_weight"] * close
    share = 0.0 if hyper["regularization"] == "off" else hyper["regularization_weight"]
    for i in peers:
        others = [published.kl(logits[i], logits[j], t) for j in peers if j != i]
        terms[f"student{i}_ce"] = (1 - share) * published.cross_entropy(logits[i], labels)
        terms[f"student{i}_response"] = factor * hyper["response_weight"] * published.kl(logits[i], fused_logits, t)
        terms[f"student{i}_peers"] = factor * hyper["peer_weight"] * sum(others) / len(others)
        if hyper["regularization"] == "self":
            copy = given["copy_logits"][i]
            own = published.kl(logits[i], copy, hyper["regularization_temperature"])
            terms[f"student{i}_regularization"] = share * own
        elif share:
            own = (hyper["regularization_temperature"], hyper["regularization"])
            terms[f"student{i}_regularization"] = share * regularization(logits[i], labels, *own)
    return terms


def gradients(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_terms_gradients_and_statistics_equal_the_equations(case: str) -> None:
    loss, given, hyper = prepared(case)
    state = published.trainable_copy(loss)
    terms = equations(state, hyper, given, math.exp(-5 * (1 - 30 / 80) ** 2))
    output = loss(**given, progress=30)
    assert set(output.terms) == set(terms)
    assert batches.differing(output.terms, {name: term.detach() for name, term in terms.items()}) == {}
    copies = given.get("copy_logits", [])
    assert not copies or set(gradients(output.loss, {str(i): row for i, row in enumerate(copies)}).values()) == {None}
    ours = gradients(output.loss, batches.leaves(given) | dict(loss.named_parameters()))
    wanted = batches.leaves(given) | {name: t for name, t in state.items() if t.requires_grad}
    assert set(ours) == set(wanted)
    assert batches.differing(ours, gradients(sum(terms.values()), wanted)) == {}
    buffers = dict(loss.named_buffers())
    assert batches.differing(buffers, {name: t for name, t in state.items() if "running" in name}) == {}


@pytest.mark.parametrize("form", ["virtual", "published"])
def test_a_student_that_says_what_the_virtual_teacher_says_has_no_regularisation(form: str) -> None:
    """KL is 0 there, and positive everywhere else."""
    labels, temperature = torch.tensor([0, 3, 2]), 2.5
    u = virtual_teacher(labels, 5)
    same = u.log() if form == "virtual" else u / temperature
    assert positive_knowledge([same], labels, temperature, form).abs().item() < 1e-12
    assert positive_knowledge([same + torch.randn_like(same)], labels, temperature, form).item() > 1e-4


def test_the_regularisation_is_exact_in_float32_and_compiled() -> None:
    """T^2 multiplies its rounding; mixed with float64, PyTorch 2.11 compiled another gradient."""
    logits, labels = torch.randn(2, 16, 100) * 3, torch.arange(16)

    def value_and_gradient(function, rows):
        rows = rows.requires_grad_()
        value = function([*rows.unbind()], labels, 20.0, "virtual")
        return value.detach(), torch.autograd.grad(value.sum(), rows)[0]

    truth = value_and_gradient(positive_knowledge, logits.double())
    for function in (positive_knowledge, torch.compile(positive_knowledge, fullgraph=True, dynamic=False)):
        for ours, exact in zip(value_and_gradient(function, logits.clone()), truth, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=1e-7)


def test_knowledge_of_a_copy_is_exact_in_float32_and_nothing_where_both_agree() -> None:
    logits, copies = torch.randn(2, 16, 100) * 3, torch.randn(2, 16, 100) * 3

    def value_and_gradient(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.clone().requires_grad_()
        value = own_knowledge([*rows], [*others], 20.0)
        return value.detach(), torch.autograd.grad(value.sum(), rows)[0]

    truth = value_and_gradient(logits.double(), copies.double())
    for ours, exact in zip(value_and_gradient(logits, copies), truth, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=1e-7)
    shifted = logits.double() + 7.0  # the same probabilities
    assert own_knowledge([*shifted], [*logits.double()], 2.5).abs().max().item() < 1e-12
    assert own_knowledge([*copies.double()], [*logits.double()], 2.5).min().item() > 0.1


@pytest.mark.parametrize("form", ["virtual", "self"])
def test_networks_that_are_worlds_apart_have_a_finite_regularisation(form: str) -> None:
    """exp of such a difference is infinite in float32, its logarithm is not."""
    logits = torch.zeros(1, 4, 6)
    logits[0, torch.arange(4), torch.arange(4)] = torch.tensor([50.0, 130.0, 400.0, 3000.0])
    labels, copy = torch.full((4,), 5), torch.zeros(4, 6)
    copy[:, 4] = 250.0

    def value_and_gradient(rows: Tensor, function: Callable) -> tuple[Tensor, Tensor]:
        rows = rows.clone().requires_grad_()
        value = function(rows.unbind())
        return value.detach(), torch.autograd.grad(value.sum(), rows)[0]

    def ours(rows: Sequence[Tensor]) -> Tensor:
        if form == "virtual":
            return positive_knowledge([*rows], labels, 2.0, form)
        return own_knowledge([*rows], [copy], 2.0)

    def equation(rows: Sequence[Tensor]) -> Tensor:
        if form == "virtual":
            return regularization(rows[0], labels, 2.0, form)[None]
        return published.kl(rows[0], copy.double(), 2.0)[None]

    truth = value_and_gradient(logits.double(), equation)
    for found, wanted in zip(value_and_gradient(logits, ours), truth, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "kinds", "heads"),
    [
        ("response_weight", ("logits",), ("response",)),
        ("peer_weight", ("logits",), ("peers",)),
        ("attention_weight", ("maps",), ("feature",)),
    ],
)
def test_a_weight_of_zero_takes_its_term_and_nothing_else(weight: str, kinds: tuple, heads: tuple) -> None:
    case = "a student and a wider teacher"
    torch.manual_seed(0)
    loss, given, hyper = prepared(case)
    torch.manual_seed(0)
    without, _, _ = prepared(case, **{weight: 0.0})
    without.load_state_dict(loss.state_dict())
    leaves = batches.leaves(given)
    state = published.trainable_copy(loss)
    terms = equations(state, hyper, given, 1.0)
    own = gradients(sum(t for name, t in terms.items() if name.endswith(heads)), leaves)
    whole, less = gradients(loss(**given).loss, leaves), gradients(without(**given).loss, leaves)
    for name in leaves:
        touched = own[name] is not None
        assert touched == any(kind in name for kind in kinds), name
        wanted = whole[name] - own[name] if touched else whole[name]
        assert batches.error(less[name], wanted) <= 1e-10, name


def test_the_fused_head_reaches_the_peers_unless_it_is_detached() -> None:
    loss, given, _ = prepared("a student and a wider teacher", attention_weight=0.0)
    cut, _, _ = prepared("a student and a wider teacher", attention_weight=0.0, detach_fusion=True)
    maps = {name: x for name, x in batches.leaves(given).items() if "maps" in name}
    assert all(g.any() for g in gradients(loss(**given).loss, maps).values())
    assert all(g is None or not g.any() for g in gradients(cut(**given).loss, maps).values())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"regularization": "virtuel"}, "did you mean virtual.*known: off, published, self, virtual"),
        ({"feature_distance": "l2"}, "unknown feature_distance 'l2'.*attention, kl, mse"),
        ({"feature_distance": "mse", "feature": "kl"}, "same connectors: leave feature out"),
        ({"feature_temperature": 0.0}, "feature_temperature"),
        ({"fused_stages": 0}, "fused_stages must be a whole number of at least 1, not 0"),
        ({"fused_stages": 1.5}, "fused_stages must be a whole number"),
        ({"fused_stages": 2}, "fused_stages 2 needs the maps of 2 stages of every network, and has 1"),
        ({"regularization_temperature": 0.0}, "regularization_temperature"),
        ({"peer_weight": -1.0}, "peer_weight"),
        ({"regularization_weight": 1.5}, "regularization_weight must be between 0 and 1, not 1.5"),
        ({"lambda_fusion": 1.0}, "ffcl has no lambda_fusion"),
        ({"leader_channels": 8}, "ffcl has no leader"),
    ],
)
def test_unusable_values_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        FusionLoss([8, 8], 5, method="ffcl", **wrong)
