"""peer_kl_ce and peer_kl through their Triton kernels: against the reference, the recordings and the closed form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError
from fastfuse.functional import ENSEMBLE
from fastfuse.kernels.peer_kl_ce import closed_form, reference
from fastfuse.testing import assert_within_budget, relative_l2

# The interpreter computes the lanes beyond the last class too, where -inf meets -inf, before they are masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

FFSD = {"teachers": [[1], [0], [ENSEMBLE], [2]], "ensemble": [0, 1]}
TWICE = {"teachers": [[1, 1, ENSEMBLE], [], [0, 1]]}


def heads(count, batch, classes, dtype=torch.float32, spread=1.0, rise=0.0, transposed=False):
    """Rows that take gradients, around a common one that rises; transposed: classes lie a batch apart in memory."""
    common = torch.randn(batch, classes, dtype=torch.float64) + torch.linspace(0, rise, classes)
    rows = [(common + spread * torch.randn(batch, classes, dtype=torch.float64)).to(dtype) for _ in range(count)]
    rows = [row.t().contiguous().t() for row in rows] if transposed else rows
    return [row.requires_grad_() for row in rows]


def run(rows, labels, backend, **options):
    """Both losses and all gradients, each head's two losses weighted differently."""
    rows = [row.detach().requires_grad_() for row in rows]
    found = functional.peer_kl_ce(rows, labels, backend=backend, **options)
    weights = torch.arange(1, len(rows) + 1) / 4
    loss = (found.cross_entropy * weights).sum() + (found.divergence * weights.flip(0)).sum()
    return [*found, *torch.autograd.grad(loss, rows)]


def fits_budget(rows, labels, **options):
    ours, eager = (run(rows, labels, backend, **options) for backend in ("triton", "reference"))
    truth = run([row.double() for row in rows], labels, "reference", **options)
    for i, (a, t, e) in enumerate(zip(ours, truth, eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    return ours


CASES = [
    pytest.param((1, 3, 5), {}, {}, id="one head has nobody to learn from"),
    pytest.param((3, 4, 7), {}, {}, id="everyone from all others; classes fill no block"),
    pytest.param((4, 3, 10), FFSD, {}, id="FFSD: peers, fused head from the ensemble, leader"),
    pytest.param((3, 2, 6), TWICE, {}, id="a teacher named twice, a head without, an ensemble of all"),
    pytest.param((3, 3, 8), {"target_epsilon": 1e-3}, {}, id="targets with an offset; classes fill a block"),
    pytest.param((2, 3, 100), {"target_epsilon": 1e-7}, {}, id="FFL's offset"),
    pytest.param((2, 1, 4), {}, {}, id="a batch of one"),
    pytest.param(
        (2, 2, 2500),
        {**FFSD, "teachers": [[1], [ENSEMBLE]]},
        {"rise": 9.0},
        id="classes beyond one block, the highest last",
    ),
    pytest.param((3, 4, 50), {}, {"spread": 1e-2}, id="heads that almost agree: separate sums would cancel"),
    pytest.param((2, 3, 9), {}, {"spread": 30.0}, id="logits whose exponentials overflow without their maximum"),
    pytest.param((2, 5, 6), {}, {"transposed": True}, id="classes not adjacent in memory"),
]


@pytest.mark.parametrize(("shape", "options", "draw"), CASES)
def test_equals_the_reference(shape, options, draw, nan_filled):
    labels = torch.randint(0, shape[2], (shape[1],))
    fits_budget(heads(*shape, **draw), labels, temperature=3.0, **options)


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_the_reference(dtype, transposed, nan_filled):
    rows = heads(4, 3, 10, dtype, transposed=transposed)
    fits_budget(rows, torch.tensor([9, 0, 4]), temperature=3.0, target_epsilon=1e-3, **FFSD)


def test_more_samples_than_are_added_at_a_time(monkeypatch, nan_filled):
    monkeypatch.setattr("fastfuse.kernels.peer_kl_ce.triton_kernels.REDUCE_BLOCK", 2)
    fits_budget(heads(2, 5, 3), torch.tensor([2, 0, 1, 1, 0]), temperature=3.0)


def test_divergence_of_heads_that_agree_keeps_its_digits():
    """Each element is computed so that it does not cancel; eager float32 is 10 to 70 % off here."""
    common = torch.randn(2, 20)
    rows = [common, common + 1e-3 * torch.randn(2, 20)]
    options = {"temperature": 2.0, "reduction": "sum"}
    truth = functional.peer_kl(rows[0].double(), [rows[1].double()], **options)
    assert relative_l2(functional.peer_kl(*rows[:1], rows[1:], backend="triton", **options), truth) < 1e-4


def test_gradients_have_the_memory_format_of_their_rows():
    rows = heads(2, 5, 6, transposed=True)
    *_, first, second = run(rows, torch.zeros(5, dtype=torch.int64), "triton", temperature=2.0)
    assert first.stride() == second.stride() == rows[0].stride() == (1, 5)


def test_rows_of_different_strides_in_one_launch():
    rows = [heads(1, 4, 6)[0], heads(1, 4, 6, transposed=True)[0], torch.randn(4, 12)[:, ::2]]
    fits_budget(rows, torch.tensor([0, 5, 3, 3]), temperature=2.0)


def test_rows_of_different_dtype_are_computed_in_the_wider_one():
    rows = [heads(1, 4, 6)[0], heads(1, 4, 6, torch.float16)[0]]
    *_, first, second = fits_budget(rows, torch.tensor([0, 5, 3, 3]), temperature=2.0)
    assert (first.dtype, second.dtype) == (torch.float32, torch.float16)


def test_more_teachers_than_one_integer_has_bits(nan_filled):
    """A teacher named four times takes three bits for every source, and 12 sources do not fit into 31 bits."""
    teachers = [[3, 3, 3, 3, 10, ENSEMBLE], *[[] for _ in range(10)]]
    fits_budget(heads(11, 1, 3), torch.tensor([2]), temperature=2.0, teachers=teachers, ensemble=[1, 10])


def test_a_batch_of_none():
    rows = heads(3, 0, 4)
    labels = torch.zeros(0, dtype=torch.int64)
    options = {"temperature": 2.0, "teachers": [[1], [2], []]}
    ours, eager = (run(rows, labels, backend, **options) for backend in ("triton", "reference"))
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)
    assert ours[1].isnan().tolist() == [True, True, False], "a head without teachers has divergence 0"


def test_an_excluded_class_adds_nothing():
    """A probability of 0 in teacher and student: 0 log 0 = 0, as without that class."""
    rows = heads(2, 3, 5)
    labels = torch.tensor([0, 2, 1])
    short = run(rows, labels, "triton", temperature=2.0)
    excluded = torch.full((3, 1), -torch.inf)
    long = run([torch.cat([row, excluded], 1) for row in rows], labels, "triton", temperature=2.0)
    for a, b in zip(short[:2], long[:2], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(short[2:], long[2:], strict=True):
        torch.testing.assert_close(torch.cat([a, torch.zeros(3, 1)], 1), b)


@pytest.mark.parametrize("label", [5, -1, -100, 2**40], ids=lambda label: f"label {label}")
def test_a_label_that_is_no_class_gives_nan_and_reads_nothing(label):
    rows = heads(2, 3, 5)
    ce, kl, *gradients = run(rows, torch.tensor([0, label, 4]), "triton", temperature=2.0)
    assert ce.isnan().all() and kl.isfinite().all()
    for gradient in gradients:
        assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [2.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("peers", [1, 3])
def test_peer_kl(peers, reduction, temperature, nan_filled):
    rows = heads(1 + peers, 3, 7)
    weights = torch.tensor([1.0, -2.0, 0.5])

    def both(dtype, backend):
        z, *others = [row.detach().to(dtype).requires_grad_() for row in rows]
        loss = functional.peer_kl(z, others, temperature=temperature, reduction=reduction, backend=backend)
        (loss * weights if reduction == "none" else 3 * loss).sum().backward()
        assert all(other.grad is None for other in others)
        return loss, z.grad

    found = both(torch.float32, "triton"), both(torch.float64, "reference"), both(torch.float32, "reference")
    for a, t, e in zip(*found, strict=True):
        assert_within_budget(a, t, e)


FOLDER = Path(__file__).parents[1] / "golden"
RECORDED = [c for c in json.loads((FOLDER / "ops.json").read_text())["cases"] if c["kind"] == "peer_kl_ce"]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"recorded {case['shape']}")
def test_equals_the_recording(case, nan_filled):
    with np.load(FOLDER / "ops.npz") as file:
        names = ("logits", "labels", "ce_and_kl", "grad")
        logits, labels, losses, grad = (torch.from_numpy(file[f"{case['case']}/{name}"]) for name in names)

    def both(backend):
        leaf = logits.float().requires_grad_()
        found = torch.stack(functional.peer_kl_ce(leaf, labels, temperature=case["temperature"], backend=backend), 1)
        found.sum().backward()
        return found, leaf.grad

    for ours, truth, eager in zip(both("triton"), (losses, grad), both("reference"), strict=True):
        assert_within_budget(ours, truth, eager)


CLOSED = [
    pytest.param({"teachers": [[1, 2], [0, 2], [0, 1]]}, id="everyone from all others"),
    pytest.param({"teachers": [[3], [], [0, 0, 1]], "ensemble": [0, 2]}, id="ensemble, a head without, one twice"),
    pytest.param({"teachers": [[1], [0], [3]], "ensemble": [0, 1], "epsilon": 1e-2}, id="offset targets"),
]


@pytest.mark.parametrize("options", CLOSED)
def test_closed_form_is_the_derivative(options):
    rows, labels = heads(3, 4, 6, torch.float64), torch.tensor([0, 5, 2, 2])
    teachers, ensemble, epsilon = options["teachers"], options.get("ensemble", []), options.get("epsilon", 0.0)
    ce, kl = reference.peer_kl_ce(rows, labels, 3.0, teachers, ensemble, epsilon)
    cotangents = torch.randn(2, 3, dtype=torch.float64)
    truth = torch.autograd.grad([ce, kl], rows, list(cotangents))
    flat = [j for own in teachers for j in own]
    arguments = (3.0, flat, [len(own) for own in teachers], ensemble, epsilon, "mean")
    with torch.no_grad():
        ours = closed_form.forward(rows, labels, *arguments)
        gradients = closed_form.backward(*cotangents, rows, labels, ours[2], [0, 1, 2], *arguments)
    for a, t in zip([*ours[:2], *gradients], [ce, kl, *truth], strict=True):
        assert relative_l2(a, t) <= 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_closed_form_of_one_head_is_the_derivative(reduction):
    rows = heads(3, 4, 6, torch.float64)
    per_sample = reference.peer_kl(rows[0], rows[1:], 2.0)
    kl = {"mean": per_sample.mean(), "sum": per_sample.sum(), "none": per_sample}[reduction]
    cotangent = torch.randn_like(kl)
    (truth,) = torch.autograd.grad(kl, rows[0], cotangent)
    arguments = (2.0, [1, 2], [2], [], 0.0, reduction)
    with torch.no_grad():
        ce, ours, stats = closed_form.forward(rows, None, *arguments)
        (gradient,) = closed_form.backward(None, cotangent[None], rows, None, stats, [0], *arguments)
    assert ce.numel() == 0 and relative_l2(ours[0], kl) <= 1e-12 and relative_l2(gradient, truth) <= 1e-12


@pytest.mark.parametrize("labelled", [True, False], ids=["with labels", "without labels, per sample"])
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed: fakes must mirror strides"])
def test_schemas(transposed, labelled):
    rows = [row.detach() for row in heads(2, 3, 4, transposed=transposed)]
    labels = torch.tensor([0, 3, 1]) if labelled else None
    options = (2.0, [1, 2], [2], [0, 1], 1e-3, "mean" if labelled else "none")
    torch.library.opcheck(torch.ops.fastfuse.peer_kl_ce_fwd, (rows, labels, *options))
    ce, kl, stats = torch.ops.fastfuse.peer_kl_ce_fwd(rows, labels, *options)
    backward = (ce if labelled else None, kl, rows, labels, stats, [0], *options)
    torch.library.opcheck(torch.ops.fastfuse.peer_kl_ce_bwd, backward)


def test_compiles_whole():
    rows, labels = heads(3, 4, 6), torch.tensor([0, 5, 2, 2])

    def losses(*rows):
        found = functional.peer_kl_ce(
            rows, labels, temperature=2.0, teachers=[[1], [ENSEMBLE], [0]], ensemble=[0, 1], backend="triton"
        )
        single = functional.peer_kl(rows[0], rows[1:], temperature=2.0, backend="triton")
        return found.cross_entropy.sum() + 2 * found.divergence.sum() + single

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
    assert [arguments[5] for arguments in calls.arguments] == [[1, 2], [1]]


def test_second_derivatives_are_refused():
    rows = heads(2, 2, 3)
    loss = functional.peer_kl(rows[0], rows[1:], temperature=2.0, backend="triton")
    (gradient,) = torch.autograd.grad(loss, rows[0], torch.ones((), requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_float64_is_refused_with_the_reason():
    with pytest.raises(BackendUnavailableError, match=r"peer_kl_ce cannot run on backend 'triton': .*float64"):
        functional.peer_kl_ce(heads(2, 2, 3, torch.float64), torch.tensor([0, 1]), temperature=2.0, backend="triton")
