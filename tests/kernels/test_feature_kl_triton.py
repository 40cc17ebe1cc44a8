"""feature_kl's kernels, in the interpreter where there is no GPU, and the closed form that CPU tensors take."""

from functools import partial

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError, InputError
from fastfuse.kernels.feature_kl import closed_form, triton_kernels
from fastfuse.testing import assert_within_budget, relative_l2

# The interpreter is slow: `make test` has this operator in test_backends_agree.py, the rest runs with the long tests.
pytestmark = pytest.mark.long

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
X, Y = (2, 3, 5, 4), (1, 5, 3, 3)
each_over = pytest.mark.parametrize("over", ["positions", "channels"])


def maps(*shapes, dtype=torch.float64, formats=(), gradient=True):
    """Random maps; formats[i] is that of map i, contiguous if there is none."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
    formats = (*formats, *[torch.contiguous_format] * (len(shapes) - len(formats)))
    pairs = zip(found, formats, strict=True)
    return [x.contiguous(memory_format=f).requires_grad_(gradient) for x, f in pairs]


def loss_of(tensors, students, backend, *, over, temperature=1.5, call=functional.feature_kl):
    """The first tensors are students, the others their target or targets."""
    features, targets = tensors[:students], tensors[students:]
    targets = targets[0] if len(targets) == 1 else targets
    return call(features, targets, temperature=temperature, over=over, backend=backend)


def evaluate(tensors, students, backend, **options):
    """Loss and gradients of all tensors."""
    loss = loss_of(tensors, students, backend, **options)
    return [loss, *torch.autograd.grad(loss, [x for x in tensors if x.requires_grad], torch.full_like(loss, 0.75))]


def usual_error(tensors, **options):
    """Root mean square of the eager loss's relative error when the tensors' elements are shuffled.

    A single number that eager gets right to the last bit by luck would leave no budget.
    """
    errors = []
    for _ in range(16):
        drawn = [x.detach().flatten()[torch.randperm(x.numel(), device=DEVICE)].view(x.shape) for x in tensors]
        eager = loss_of(drawn, backend="reference", **options)
        errors.append(relative_l2(eager, loss_of([x.double() for x in drawn], backend="reference", **options)))
    return sum(e**2 for e in errors) ** 0.5 / 4


def agree(tensors, students, **options):
    """Kernel and reference on the same tensors, within the error budget."""
    run = partial(evaluate, students=students, **options)
    ours, eager = (run(tensors, backend=backend) for backend in ("triton", "reference"))
    truth = run([x.detach().double().requires_grad_(x.requires_grad) for x in tensors], backend="reference")
    assert ours[0].dtype == eager[0].dtype
    budget = 2 * (usual_error(tensors, students=students, **options) + torch.finfo(ours[0].dtype).eps)
    assert relative_l2(ours[0], truth[0]) <= budget
    for i, (a, t, e) in enumerate(zip(ours[1:], truth[1:], eager[1:], strict=True)):
        assert_within_budget(a, t, e, what=f"gradient {i}")
    return ours


@each_over
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shapes", "students", "formats"),
    [
        pytest.param([X, X], 1, (), id="one student"),
        pytest.param([X, X, X, X], 3, (LAST,) * 4, id="three students share a target, all channels-last"),
        pytest.param([X, X, X], 2, (LAST,), id="formats mixed among students that share a target"),
        pytest.param([X, X], 1, (torch.contiguous_format, LAST), id="target channels-last, student not"),
        pytest.param([X, Y, X, Y], 2, (), id="pairs of different shapes: one launch"),
        pytest.param([X, Y, X, Y], 2, (LAST, LAST, LAST), id="formats mixed in one pair of two"),
        pytest.param([(2, 33, 9, 7)] * 2, 1, (), id="rows longer than a piece, none a power of two"),
    ],
)
def test_equals_the_reference(shapes, students, formats, dtype, over, nan_filled):
    tensors = maps(*shapes, dtype=dtype, formats=formats)
    gradients = agree(tensors, students, over=over)[1:]
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in tensors]


@pytest.mark.parametrize(
    ("over", "shape", "formats"),
    [
        pytest.param("positions", (1, 2, 56, 56), (), id="3136 positions of the first stage"),
        pytest.param("channels", (1, 2048, 1, 2), (LAST, LAST), id="2048 channels of the last stage"),
    ],
)
def test_the_longest_rows_of_imagenet_networks(over, shape, formats, nan_filled):
    agree(maps(shape, shape, dtype=torch.float32, formats=formats), 1, over=over)


@each_over
def test_distributions_over_one_element(over):
    """Each is certain, so loss and gradients are zero."""
    tensors = maps(*[(2, 3, 1, 1) if over == "positions" else (2, 1, 3, 2)] * 2, dtype=torch.float32)
    assert all((x == 0).all() for x in evaluate(tensors, 1, "triton", over=over))


@each_over
@pytest.mark.parametrize("students", [2, 5], ids=["few", "so many that tiles are smaller"])
def test_blocks_that_come_to_several_tiles(students, over, monkeypatch, nan_filled):
    """Small tiles on three blocks: the normaliser is met piece by piece, and the last turn finds few rows or none."""
    for name, value in {"TILE": 16, "PROGRAMS": 3, "LONGEST_PIECE": 8, "LONGEST_STRIDED_PIECE": 4}.items():
        monkeypatch.setattr(triton_kernels, name, value)
    monkeypatch.setattr(triton_kernels, "FINISH_BLOCK", 2)
    agree(maps(*[(2, 3, 3, 4)] * (students + 1), dtype=torch.float32, formats=(LAST,)), students, over=over)


# In elements that do not exist; they are not used.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@each_over
@pytest.mark.parametrize(
    ("scale", "temperature"),
    [
        pytest.param(300.0, 1.0, id="exp of a logit overflows, most probabilities vanish"),
        pytest.param(1.0, 0.05, id="a cold softmax"),
        pytest.param(1.0, 1000.0, id="almost uniform distributions"),
    ],
)
def test_extreme_logits(scale, temperature, over, monkeypatch, nan_filled):
    monkeypatch.setattr(triton_kernels, "LONGEST_PIECE", 4)
    tensors = [(scale * x).detach().requires_grad_() for x in maps(X, X, dtype=torch.float32)]
    ours = agree(tensors, 1, over=over, temperature=temperature)
    assert all(x.isfinite().all() for x in ours)


@each_over
def test_a_constant_added_to_all_logits_changes_nothing(over):
    x, y = maps(X, X, dtype=torch.float32)
    ours, shifted = (
        evaluate([v.detach().requires_grad_() for v in pair], 1, "triton", over=over)
        for pair in ((x, y), (x + 64, y - 32))
    )
    for a, b in zip(ours, shifted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def views():
    """Views that are neither contiguous nor channels-last, in the shape of X."""
    channels = maps((2, 8, 5, 4), dtype=torch.float32, gradient=False)[0]
    return {
        "a student's channels in a stack of students": channels[:, 3:6],
        "the same, channels-last": channels.contiguous(memory_format=LAST)[:, 3:6],
        "cropped: height and width do not collapse": maps((2, 3, 8, 4), dtype=torch.float32)[0].detach()[:, :, 1:6],
        "height and width swapped": maps((2, 3, 4, 5), dtype=torch.float32)[0].detach().transpose(2, 3),
        "one sample for all": maps((1, 3, 5, 4), dtype=torch.float32)[0].detach().expand(2, 3, 5, 4),
        "not aligned to 16 bytes": torch.randn(121, device=DEVICE)[1:].view(X),
    }


@each_over
@pytest.mark.parametrize("view", views())
def test_views(view, over, nan_filled):
    agree([views()[view].requires_grad_(), *maps(X, dtype=torch.float32)], 1, over=over)
    agree([*maps(X, dtype=torch.float32), views()[view].requires_grad_()], 1, over=over)


@each_over
def test_dtypes_mixed_between_students_and_targets(over, nan_filled):
    half, single = maps(X, X, dtype=torch.float16), maps(X, X, dtype=torch.float32)
    agree([half[0], single[0], half[1]], 2, over=over)
    agree([half[0], single[0], single[1], half[1]], 2, over=over)


@each_over
@pytest.mark.parametrize("shapes", [[(0, 3, 4, 4)] * 3, [(0, 3, 4, 4), X, (0, 3, 4, 4), X]], ids=["all", "one of two"])
def test_empty_batch(shapes, over, nan_filled):
    """The mean over nothing is not a number, and what has elements still gets its gradient."""
    tensors = maps(*shapes, dtype=torch.float32)
    ours, eager = (evaluate(tensors, 2, backend, over=over) for backend in ("triton", "reference"))
    assert ours[0].isnan() and eager[0].isnan()
    for a, e in zip(ours[1:], eager[1:], strict=True):
        torch.testing.assert_close(a, e)


@each_over
@pytest.mark.parametrize("students", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_closed_form_equals_autograd(students, shared, over):
    tensors = maps(*[X] * students, *[X] * (1 if shared else students), formats=(LAST,))
    expected = evaluate(tensors, students, "reference", over=over)
    features, targets = ([x.detach() for x in part] for part in (tensors[:students], tensors[students:]))
    form = 1.5, over == "channels"
    cotangent = torch.tensor(0.75, dtype=torch.float64, device=DEVICE)
    found = [
        closed_form.forward(features, targets, *form),
        *closed_form.backward(cotangent, features, targets, *form, [True] * len(tensors)),
    ]
    for a, e in zip(found, expected, strict=True):
        assert relative_l2(a, e) <= 1e-12


@pytest.mark.parametrize("interpreted", [True, False], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [(), (LAST,) * 3, (LAST,)], ids=["contiguous", "channels_last", "mixed"])
@each_over
def test_schemas(over, formats, interpreted, monkeypatch):
    """Shapes, dtypes and strides of the fakes are those of the real outputs."""
    if not interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = maps(X, X, X, dtype=torch.float16, formats=formats, gradient=False)
    form, ops = (2.0, over == "channels"), torch.ops.fastfuse
    torch.library.opcheck(ops.feature_kl_fwd.default, (found[:2], found[2:], *form))
    gradient = torch.ones((), device=DEVICE)
    torch.library.opcheck(ops.feature_kl_bwd.default, (gradient, found[:2], found[2:], *form, [True, False, True]))


@pytest.mark.parametrize("shared", [True, False], ids=["one target", "one each"])
def test_compiles_in_one_graph(shared):
    torch.compiler.reset()
    tensors = maps(X, X, X, *([] if shared else [X]), dtype=torch.float32, formats=(LAST,))
    compiled = torch.compile(functional.feature_kl, fullgraph=True, backend="aot_eager")
    calls = (compiled, functional.feature_kl)
    found, eager = (evaluate(tensors, 2, "triton", over="positions", call=call) for call in calls)
    for a, e in zip(found, eager, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()


@pytest.mark.parametrize("shared", [True, False], ids=["one target", "one each"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
def test_only_wanted_gradients(wanted, shared, nan_filled, monkeypatch):
    tensors = maps(X, X, X, *([] if shared else [X]), dtype=torch.float32)
    for x, asked in zip(tensors, wanted if shared else (*wanted, wanted[2]), strict=True):
        x.requires_grad_(bool(asked))
    written = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: written.append(x) or empty_like(x, **k))
    loss = functional.feature_kl(tensors[:2], tensors[2] if shared else tensors[2:], temperature=2.0, backend="triton")
    found = torch.autograd.grad(loss, [x for x in tensors if x.requires_grad])
    monkeypatch.undo()
    assert len(written) == len(found), "memory for gradients that nobody asked for"
    expected = evaluate(tensors, 2, "reference", over="positions", temperature=2.0)[1:]
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(0.75 * a, e)


@each_over
def test_same_bits_every_time(over):
    tensors = maps((1, 33, 9, 7), (1, 33, 9, 7), dtype=torch.float32)
    first, second = (evaluate(tensors, 1, "triton", over=over) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused():
    tensors = maps(X, X, dtype=torch.float32)
    loss = functional.feature_kl(tensors[:1], tensors[1], temperature=2.0, backend="triton").square()
    (slope,) = torch.autograd.grad(loss, tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["first student", "second student", "target"])
def test_float64_is_refused_wherever_it_stands(which):
    tensors = maps(X, X, X, dtype=torch.float32)
    tensors[which] = tensors[which].double()
    call = partial(functional.feature_kl, tensors[:2], tensors[2], temperature=2.0)
    with pytest.raises(BackendUnavailableError, match=r"feature_kl cannot run on backend 'triton': .* torch\.float64"):
        call(backend="triton")
    assert call().dtype == torch.float64


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "over": "samples"}], ids=str)
def test_refusals_are_those_of_the_reference(options):
    with pytest.raises(InputError, match=r"must be positive|is 'positions' or 'channels'"):
        functional.feature_kl(maps(X, dtype=torch.float32), maps(X, dtype=torch.float32), **options, backend="triton")
