"""peer_kl_ce and peer_kl: the closed form, what a backward computes, and how they are traced and compiled."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse import functional
from fastfuse.functional import ENSEMBLE
from fastfuse.kernels.peer_kl_ce import closed_form, reference
from fastfuse.testing import relative_l2
from tests.kernels.peer_cases import heads

# The interpreter computes the lanes beyond the last class too, where -inf meets -inf, before they are masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

CLOSED = [
    pytest.param({"teachers": [[1, 2], [0, 2], [0, 1]]}, id="everyone from all others"),
    pytest.param({"teachers": [[3], [], [0, 0, 1]], "ensemble": [0, 2]}, id="ensemble, a head without, one twice"),
    pytest.param({"teachers": [[1], [0], [3]], "ensemble": [0, 1], "epsilon": 1e-2}, id="offset targets"),
    pytest.param({"teachers": [[1, 2], [], [0]], "smoothing": 0.1}, id="smoothed labels"),
    pytest.param(
        {
            "teachers": [[1, 1], [0, 3], [3]],
            "ensemble": [0, 1],
            "epsilon": 1e-2,
            "smoothing": 0.3,
            "weights": torch.linspace(-1, 2, 12).view(3, 4),
        },
        id="weighted edges and all the rest",
    ),
]


@pytest.mark.parametrize("options", CLOSED)
def test_closed_form_is_the_derivative(options):
    rows, labels = heads(3, 4, 6, torch.float64), torch.tensor([0, 5, 2, 2])
    teachers, ensemble, weights = options["teachers"], options.get("ensemble", []), options.get("weights")
    epsilon, smoothing = options.get("epsilon", 0.0), options.get("smoothing", 0.0)
    ce, kl, correct = reference.peer_kl_ce(rows, labels, 3.0, teachers, ensemble, epsilon, smoothing, weights)
    cotangents = torch.randn(2, 3, dtype=torch.float64)
    truth = torch.autograd.grad([ce, kl], rows, list(cotangents))
    flat = [j for own in teachers for j in own]
    arguments = (3.0, flat, [len(own) for own in teachers], ensemble, epsilon, smoothing, "mean")
    with torch.no_grad():
        ours = closed_form.forward(rows, labels, weights, *arguments)
        gradients = closed_form.backward(*cotangents, rows, labels, weights, ours[3], [0, 1, 2], *arguments)
    assert ours[2].tolist() == correct.tolist()
    for a, t in zip([*ours[:2], *gradients], [ce, kl, *truth], strict=True):
        assert relative_l2(a, t) <= 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_closed_form_of_one_head_is_the_derivative(reduction):
    rows = heads(3, 4, 6, torch.float64)
    per_sample = reference.peer_kl(rows[0], rows[1:], 2.0)
    kl = {"mean": per_sample.mean(), "sum": per_sample.sum(), "none": per_sample}[reduction]
    cotangent = torch.randn_like(kl)
    (truth,) = torch.autograd.grad(kl, rows[0], cotangent)
    arguments = (2.0, [1, 2], [2], [], 0.0, 0.0, reduction)
    with torch.no_grad():
        ce, ours, correct, stats = closed_form.forward(rows, None, None, *arguments)
        (gradient,) = closed_form.backward(None, cotangent[None], rows, None, None, stats, [0], *arguments)
    assert (
        ce.numel() == correct.numel() == 0
        and relative_l2(ours[0], kl) <= 1e-12
        and relative_l2(gradient, truth) <= 1e-12
    )


@pytest.mark.parametrize("labelled", [True, False], ids=["with labels", "without labels, per sample"])
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed: fakes must mirror strides"])
def test_schemas(transposed, labelled):
    rows = [row.detach() for row in heads(2, 3, 4, transposed=transposed)]
    labels = torch.tensor([0, 3, 1]) if labelled else None
    weights = torch.rand(1, 3) if labelled else None
    options = (2.0, [1, 2], [2], [0, 1], 1e-3, 0.1, "mean" if labelled else "none")
    torch.library.opcheck(torch.ops.fastfuse.peer_kl_ce_fwd, (rows, labels, weights, *options))
    ce, kl, _, stats = torch.ops.fastfuse.peer_kl_ce_fwd(rows, labels, weights, *options)
    backward = (ce if labelled else None, kl, rows, labels, weights, stats, [0], *options)
    torch.library.opcheck(torch.ops.fastfuse.peer_kl_ce_bwd, backward)


def test_compiles_whole():
    rows, labels, weights = heads(3, 4, 6), torch.tensor([0, 5, 2, 2]), torch.rand(3, 1)

    def losses(*rows):
        found = functional.peer_kl_ce(
            rows, labels, temperature=2.0, teachers=[[1], [ENSEMBLE], [0]], ensemble=[0, 1], label_smoothing=0.1,
            weights=weights, backend="triton",
        )  # fmt: skip
        single = functional.peer_kl(rows[0], rows[1:], temperature=2.0, backend="triton")
        return found.cross_entropy.sum() + 2 * found.divergence.sum() + found.correct.sum() + single

    eager, compiled = losses(*rows), torch.compile(losses, fullgraph=True, backend="aot_eager")(*rows)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    expected = torch.autograd.grad(eager, rows)
    for a, b in zip(torch.autograd.grad(compiled, rows), expected, strict=True):
        torch.testing.assert_close(a, b)


class Calls(TorchDispatchMode):
    """Arguments of every call of one operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.arguments = operator, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is self.operator.default:
            self.arguments.append(arguments)
        return function(*arguments, **(options or {}))


def test_only_needed_gradients_are_computed():
    rows, labels = heads(3, 2, 4), torch.tensor([0, 3])
    rows[0].requires_grad_(False)
    with Calls(torch.ops.fastfuse.peer_kl_ce_bwd) as calls:
        found = functional.peer_kl_ce(rows, labels, temperature=2.0, backend="triton")
        found.divergence.sum().backward()
        rows[2].requires_grad_(False)
        functional.peer_kl_ce(rows, labels, temperature=2.0, backend="triton").cross_entropy.sum().backward()
    (ce, kl, *_), (second_ce, second_kl, *_) = calls.arguments
    assert ce is None and kl is not None, "the unused loss has no gradient, not even zeros"
    assert second_ce is not None and second_kl is None
    assert [arguments[6] for arguments in calls.arguments] == [[1, 2], [1]]
