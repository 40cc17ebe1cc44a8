"""peer_kl_ce and peer_kl through their Triton kernels: against the reference, torch and the recordings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError
from fastfuse.functional import ENSEMBLE
from fastfuse.testing import assert_within_budget, relative_l2
from tests.kernels.peer_cases import evaluate, heads, run

# The interpreter computes the lanes beyond the last class too, where -inf meets -inf, before they are masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


FFSD = {"teachers": [[1], [0], [ENSEMBLE], [2]], "ensemble": [0, 1]}
TWICE = {"teachers": [[1, 1, ENSEMBLE], [], [0, 1]]}


def fits_budget(rows, labels, **options):
    (ours, own), (eager, other) = (evaluate(rows, labels, backend, **options) for backend in ("triton", "reference"))
    assert ours.correct.dtype == torch.int64 and ours.correct.tolist() == eager.correct.tolist()
    truth = run([row.double() for row in rows], labels, "reference", **options)
    for i, (a, t, e) in enumerate(zip((*ours[:2], *own), truth, (*eager[:2], *other), strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    return [*ours[:2], *own]


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
    pytest.param((3, 4, 7), {"label_smoothing": 0.1}, {}, id="smoothed labels"),
    pytest.param((1, 4, 7), {"label_smoothing": 1.0}, {}, id="labels smoothed away"),
    pytest.param(
        (2, 2, 2500),
        {**FFSD, "teachers": [[1], [ENSEMBLE]], "label_smoothing": 0.1, "weights": torch.tensor(0.3)},
        {"rise": 9.0},
        id="smoothed, one weight for all edges, classes beyond one block",
    ),
    pytest.param(
        (2, 3, 50), {"label_smoothing": 0.1}, {"rise": 1e-3, "spread": 1e-2, "offset": 500.0}, id="logits far from zero"
    ),
    pytest.param(
        (4, 3, 10),
        {**FFSD, "target_epsilon": 1e-3, "weights": torch.linspace(-0.5, 2, 20).view(4, 5)},
        {},
        id="a weight for every edge, targets with an offset",
    ),
    pytest.param((3, 2, 6), {**TWICE, "weights": torch.tensor([[1.0], [3.0], [0.0]])}, {}, id="a weight for each head"),
    pytest.param(
        (3, 2, 6),
        {**TWICE, "weights": torch.linspace(0, 1, 8).half()[::2]},
        {},
        id="a weight for each teacher, strided",
    ),
]


@pytest.mark.parametrize(("shape", "options", "draw"), CASES)
def test_equals_the_reference(shape, options, draw, nan_filled):
    labels = torch.randint(0, shape[2], (shape[1],))
    fits_budget(heads(*shape, **draw), labels, temperature=3.0, **options)


@pytest.mark.parametrize(
    "transposed",
    [pytest.param(False, id="contiguous"), pytest.param(True, id="transposed", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_the_reference(dtype, transposed, nan_filled):
    rows = heads(4, 3, 10, dtype, transposed=transposed)
    options = {"target_epsilon": 1e-3, "label_smoothing": 0.2, "weights": torch.rand(4, 5)}
    fits_budget(rows, torch.tensor([9, 0, 4]), temperature=3.0, **FFSD, **options)


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
    (ours, own), (eager, other) = (evaluate(rows, labels, backend, **options) for backend in ("triton", "reference"))
    for a, e in zip((*ours, *own), (*eager, *other), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)
    assert ours.divergence.isnan().tolist() == [True, True, False], "a head without teachers has divergence 0"
    assert ours.correct.tolist() == [0, 0, 0]


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
    rows[0].detach()[:, 0] = 9.0
    for smoothing in (0.0, 0.1):
        found, gradients = evaluate(
            rows, torch.tensor([0, label, 4]), "triton", temperature=2.0, label_smoothing=smoothing
        )
        assert found.cross_entropy.isnan().all() and found.divergence.isfinite().all()
        assert found.correct[0] == 1, "no answer is right where the label is no class"
        for gradient in gradients:
            assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", ["triton", "reference", "closed form"])
def test_right_answers_are_those_of_argmax(backend, monkeypatch):
    """The first of equal logits; a NaN is above all, the first of several is taken."""
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([
        [1, 3, 3, 0], [1, 3, 3, 0], [5, 5, 5, 5], [-inf, -inf, -inf, -inf], [inf, 0, inf, 0],
        [9, nan, 3, nan], [9, nan, 3, nan], [9, nan, 3, nan], [inf, 2, 3, nan], [1, 2, 3, 4],
    ])  # fmt: skip
    labels = torch.tensor([1, 2, 0, 0, 0, 1, 3, 0, 3, 3])
    right = [1, 0, 1, 1, 1, 1, 0, 0, 1, 1]
    assert (rows.argmax(1) == labels).int().tolist() == right
    if backend == "closed form":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        counts = [
            torch.ops.fastfuse.peer_kl_ce_fwd([z], y, None, 2.0, [], [0], [], 0.0, 0.0, "mean")[2].item()
            for z, y in zip(rows.split(1), labels.split(1), strict=True)
        ]
    else:
        options = {"temperature": 2.0, "backend": backend}
        found = [functional.peer_kl_ce([z], y, **options) for z, y in zip(rows.split(1), labels.split(1), strict=True)]
        counts = [one.correct.item() for one in found]
        assert not any(one.correct.requires_grad for one in found)
        both = functional.peer_kl_ce([rows, rows.flip(1)], labels, **options).correct
        assert both.tolist() == [sum(right), int((rows.flip(1).argmax(1) == labels).sum())]
    assert counts == right


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_cross_entropy_is_torchs(smoothing):
    """The kernel, without our reference in between."""
    row, labels = heads(1, 4, 6)[0], torch.tensor([0, 5, 2, 2])
    exact = row.detach().double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(exact, labels, label_smoothing=smoothing)
    ours = functional.peer_kl_ce([row], labels, temperature=2.0, label_smoothing=smoothing, backend="triton")
    assert relative_l2(ours.cross_entropy[0], truth) < 1e-6
    pair = [torch.autograd.grad(x, z)[0] for x, z in ((ours.cross_entropy[0], row), (truth, exact))]
    assert relative_l2(*pair) < 1e-6


def test_weights_count_each_edge():
    """Each divergence is the sum of those from single teachers, by first principles of float64."""
    rows, labels, temperature = heads(3, 4, 5), torch.tensor([0, 4, 2, 2]), 2.0
    weights = torch.tensor([[9.0, 0.5, 9, 2], [9, 9, 9, 9], [0.25, 4, 9, 9]])
    teachers = [[1, ENSEMBLE, 1], [], [0, 1]]
    exact = [row.detach().double() for row in rows]
    sources = [(z / temperature).log_softmax(1) for z in (*exact, sum(exact) / 3)]

    def divergence(i, j):
        log_q, log_p = sources[j], sources[i]
        return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1).mean()

    truth = torch.stack([
        2 * 0.5 * divergence(0, 1) + 2 * divergence(0, 3), torch.zeros(()).double(),
        0.25 * divergence(2, 0) + 4 * divergence(2, 1),
    ])  # fmt: skip
    for backend in ("triton", "reference"):
        found = functional.peer_kl_ce(
            rows, labels, temperature=temperature, teachers=teachers, weights=weights, backend=backend
        )
        assert relative_l2(found.divergence, truth) < 1e-6


def test_a_weight_of_one_over_the_teachers_is_the_mean():
    rows, labels = heads(3, 4, 5), torch.tensor([0, 4, 2, 2])
    ours, plain = (
        run(rows, labels, "triton", temperature=2.0, **more) for more in ({"weights": torch.tensor(0.5)}, {})
    )
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


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
        result = functional.peer_kl_ce(leaf, labels, temperature=case["temperature"], backend=backend)
        found = torch.stack(result[:2], 1)
        found.sum().backward()
        return found, leaf.grad

    for ours, truth, eager in zip(both("triton"), (losses, grad), both("reference"), strict=True):
        assert_within_budget(ours, truth, eager)


def test_float64_is_refused_with_the_reason():
    with pytest.raises(BackendUnavailableError, match=r"peer_kl_ce cannot run on backend 'triton': .*float64"):
        functional.peer_kl_ce(heads(2, 2, 3, torch.float64), torch.tensor([0, 1]), temperature=2.0, backend="triton")
