"""What holds for feature_mse and feature_kl alike: kernels (in the interpreter where there is no GPU), closed form."""

import pytest
import torch

from fastfuse.errors import BackendUnavailableError
from fastfuse.testing import relative_l2
from tests.kernels.students import DEVICE, LAST, X, Y, agree, each_loss, evaluate, maps, single_maps, value, views

shared_or_not = pytest.mark.parametrize("shared", [True, False], ids=["one target", "one each"])


@each_loss
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
        pytest.param([(1, 1, 1, 1)] * 2, 1, (), id="a single element"),
        pytest.param([(3, 7, 41, 5)] * 2, 1, (), id="more elements than one tile"),
        pytest.param([(2, 1, 9, 7)] * 2, 1, (LAST,), id="one channel: both formats are one"),
        pytest.param([(2, 33, 9, 7)] * 2, 1, (), id="rows longer than a piece, none a power of two"),
    ],
)
def test_equals_the_reference(loss, shapes, students, formats, dtype, nan_filled):
    tensors = maps(*shapes, dtype=dtype, formats=formats)
    gradients = agree(loss, tensors, students)[1:]
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in tensors]


@each_loss
@pytest.mark.parametrize("view", views())
def test_views(loss, view, nan_filled):
    agree(loss, [views()[view].requires_grad_(), *single_maps(X)], 1)
    agree(loss, [*single_maps(X), views()[view].requires_grad_()], 1)


@each_loss
def test_a_stack_of_students(loss, nan_filled):
    stack, target = single_maps((3, *X), X)
    ours, eager = (loss.call(stack, target, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, eager)
    for a, e in zip(*(torch.autograd.grad(found, (stack, target)) for found in (ours, eager)), strict=True):
        torch.testing.assert_close(a, e)


@each_loss
def test_dtypes_mixed_between_students_and_targets(loss, nan_filled):
    half, single = maps(X, X, dtype=torch.float16), single_maps(X, X)
    agree(loss, [half[0], single[1]], 1)
    agree(loss, [half[0], single[0], half[1]], 2)
    agree(loss, [half[0], single[0], single[1], half[1]], 2)


@each_loss
@pytest.mark.parametrize("shapes", [[(0, 3, 4, 4)] * 3, [(0, 3, 4, 4), X, (0, 3, 4, 4), X]], ids=["all", "one of two"])
def test_empty_batch(loss, shapes, nan_filled):
    """The mean over nothing is not a number, and what has elements still gets its gradient."""
    tensors = single_maps(*shapes)
    ours, eager = (evaluate(loss, tensors, 2, backend) for backend in ("triton", "reference"))
    assert ours[0].isnan() and eager[0].isnan()
    for a, e in zip(ours[1:], eager[1:], strict=True):
        torch.testing.assert_close(a, e)


@each_loss
@pytest.mark.parametrize("students", [1, 2, 3])
@shared_or_not
def test_closed_form_equals_autograd(loss, students, shared):
    tensors = maps(*[X] * students, *[X] * (1 if shared else students), formats=(LAST,))
    expected = evaluate(loss, tensors, students, "reference")
    features, targets = ([x.detach() for x in part] for part in (tensors[:students], tensors[students:]))
    cotangent = torch.tensor(0.75, dtype=torch.float64, device=DEVICE)
    found = [
        loss.closed_form.forward(features, targets, *loss.form),
        *loss.closed_form.backward(cotangent, features, targets, *loss.form, [True] * len(tensors)),
    ]
    for a, e in zip(found, expected, strict=True):
        assert relative_l2(a, e) <= 1e-12


@each_loss
@pytest.mark.parametrize("interpreted", [True, False], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [(), (LAST,) * 3, (LAST,)], ids=["contiguous", "channels_last", "mixed"])
def test_schemas(loss, formats, interpreted, monkeypatch):
    """Shapes, dtypes and strides of the fakes are those of the real outputs."""
    if not interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = maps(X, X, X, dtype=torch.float16, formats=formats, gradient=False)
    forward, backward = (getattr(torch.ops.fastfuse, f"{loss.op}_{way}").default for way in ("fwd", "bwd"))
    torch.library.opcheck(forward, (found[:2], found[2:], *loss.form))
    torch.library.opcheck(forward, (found[:1], found[2:], *loss.form))
    gradient = torch.ones((), device=DEVICE)
    torch.library.opcheck(backward, (gradient, found[:2], found[2:], *loss.form, [True, False, True]))


@each_loss
@shared_or_not
def test_compiles_in_one_graph(loss, shared):
    torch.compiler.reset()
    tensors = single_maps(X, X, X, *([] if shared else [X]), formats=(LAST,))

    def call(features, target, backend):
        return loss.call(features, target, backend=backend)

    compiled = loss._replace(call=torch.compile(call, fullgraph=True, backend="aot_eager"))
    found, eager = (evaluate(each, tensors, 2, "triton") for each in (compiled, loss))
    for a, e in zip(found, eager, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()


@each_loss
@shared_or_not
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
def test_only_wanted_gradients(loss, wanted, shared, nan_filled, monkeypatch):
    tensors = single_maps(X, X, X, *([] if shared else [X]))
    for x, asked in zip(tensors, wanted if shared else (*wanted, wanted[2]), strict=True):
        x.requires_grad_(bool(asked))
    written = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: written.append(x) or empty_like(x, **k))
    found = evaluate(loss, tensors, 2, "triton")
    monkeypatch.undo()
    assert len(written) == sum(x.requires_grad for x in tensors), "memory for gradients that nobody asked for"
    for a, e in zip(found, evaluate(loss, tensors, 2, "reference"), strict=True):
        torch.testing.assert_close(a, e)


@each_loss
@pytest.mark.parametrize("shape", [(3, 7, 41, 5), (1, 33, 9, 7)], ids=str)
def test_same_bits_every_time(loss, shape):
    tensors = single_maps(shape, shape)
    first, second = (evaluate(loss, tensors, 1, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_loss
@pytest.mark.parametrize("which", [0, 1, 2], ids=["first student", "second student", "target"])
def test_float64_is_refused_wherever_it_stands(loss, which):
    tensors = single_maps(X, X, X)
    tensors[which] = tensors[which].double()
    refusal = rf"{loss.op} cannot run on backend 'triton': .* torch\.float64"
    with pytest.raises(BackendUnavailableError, match=refusal):
        value(loss, tensors, 2, "triton")
    assert value(loss, tensors, 2, "auto").dtype == torch.float64
