"""feature_mse's kernels, in the interpreter where there is no GPU, and the closed form that CPU tensors take."""

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError
from fastfuse.kernels.feature_mse import closed_form, triton_kernels
from fastfuse.testing import assert_within_budget, relative_l2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
X, Y = (2, 3, 5, 4), (1, 5, 3, 3)


def maps(*shapes, dtype=torch.float64, formats=(), gradient=True):
    """Random maps; formats[i] is that of map i, contiguous if there is none."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
    formats = (*formats, *[torch.contiguous_format] * (len(shapes) - len(formats)))
    pairs = zip(found, formats, strict=True)
    return [x.contiguous(memory_format=f).requires_grad_(gradient) for x, f in pairs]


def evaluate(tensors, students, backend, call=functional.feature_mse, cotangent=0.75):
    """Loss and gradients of all tensors: the first ones are students, the others their target or targets."""
    features, targets = tensors[:students], tensors[students:]
    loss = call(features, targets[0] if len(targets) == 1 else targets, backend=backend)
    return [loss, *torch.autograd.grad(loss, [x for x in tensors if x.requires_grad], torch.full_like(loss, cotangent))]


def agree(tensors, students):
    """Kernel and reference on the same tensors, within the error budget."""
    ours, eager = (evaluate(tensors, students, backend) for backend in ("triton", "reference"))
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    for i, (a, t, e) in enumerate(zip(ours, evaluate(exact, students, "reference"), eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shapes", "students", "formats"),
    [
        pytest.param([X, X], 1, (), id="one student"),
        pytest.param([X, X, X, X], 3, (LAST,) * 4, id="three students share a target, all channels-last: a flat walk"),
        pytest.param([X, X, X], 2, (LAST,), id="formats mixed among students that share a target: tiles"),
        pytest.param([X, X], 1, (torch.contiguous_format, LAST), id="target channels-last, student not"),
        pytest.param([X, Y, X, Y], 2, (), id="pairs of different shapes: one launch"),
        pytest.param([X, Y, X, Y], 2, (LAST, LAST, LAST), id="formats mixed in one pair of two: tiles for both"),
        pytest.param([(1, 1, 1, 1)] * 2, 1, (), id="a single element"),
        pytest.param([(3, 7, 41, 5)] * 2, 1, (), id="more elements than one tile"),
        pytest.param([(2, 1, 9, 7)] * 2, 1, (LAST,), id="one channel: both formats are one"),
    ],
)
def test_equals_the_reference(shapes, students, formats, dtype, nan_filled):
    tensors = maps(*shapes, dtype=dtype, formats=formats)
    gradients = agree(tensors, students)[1:]
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in tensors]


def test_blocks_that_come_to_several_tiles(monkeypatch, nan_filled):
    """Nine tiles on four blocks: a block takes every fourth tile, and the last turn finds only one."""
    monkeypatch.setattr(triton_kernels, "TILE", 16)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 4)
    agree(maps((1, 3, 9, 5), (1, 3, 9, 5), dtype=torch.float32), 1)
    agree(maps((3, 3, 5, 3), (3, 3, 5, 3), dtype=torch.float32, formats=(LAST,)), 1)


def test_more_partial_sums_than_the_last_kernel_takes_at_once(monkeypatch, nan_filled):
    monkeypatch.setattr(triton_kernels, "TILE", 16)
    monkeypatch.setattr(triton_kernels, "FINISH_BLOCK", 4)
    agree(maps((1, 3, 9, 5), (1, 3, 9, 5), dtype=torch.float32), 1)


def views():
    """Views that are neither contiguous nor channels-last, in the shape of X."""
    channels = maps((2, 8, 5, 4), dtype=torch.float32, gradient=False)[0]
    return {
        "a student's channels in a stack of students": channels[:, 3:6],
        "the same, channels-last": channels.contiguous(memory_format=LAST)[:, 3:6],
        "cropped: height and width do not collapse": maps((2, 3, 8, 4), dtype=torch.float32)[0].detach()[:, :, 1:6],
        "height and width swapped": maps((2, 3, 4, 5), dtype=torch.float32)[0].detach().transpose(2, 3),
        "every other sample": maps((4, 3, 5, 4), dtype=torch.float32)[0].detach()[::2],
        "one sample for all": maps((1, 3, 5, 4), dtype=torch.float32)[0].detach().expand(2, 3, 5, 4),
        "not aligned to 16 bytes": torch.randn(121, device=DEVICE)[1:].view(X),
    }


@pytest.mark.parametrize("view", views())
def test_views(view, nan_filled):
    agree([views()[view].requires_grad_(), *maps(X, dtype=torch.float32)], 1)
    agree([*maps(X, dtype=torch.float32), views()[view].requires_grad_()], 1)


def test_dtypes_mixed_between_students_and_targets(nan_filled):
    half, single = maps(X, X, dtype=torch.float16), maps(X, X, dtype=torch.float32)
    agree([half[0], single[0]], 1)
    agree([half[0], single[0], half[1]], 2)
    agree([half[0], single[0], single[1], half[1]], 2)


@pytest.mark.parametrize("shapes", [[(0, 3, 4, 4)] * 3, [(0, 3, 4, 4), X, (0, 3, 4, 4), X]], ids=["all", "one of two"])
def test_empty_batch(shapes, nan_filled):
    """The mean over nothing is not a number, and what has elements still gets its gradient."""
    students = 2
    tensors = maps(*shapes, dtype=torch.float32)
    ours, eager = (evaluate(tensors, students, backend) for backend in ("triton", "reference"))
    assert ours[0].isnan() and eager[0].isnan()
    for a, e in zip(ours[1:], eager[1:], strict=True):
        torch.testing.assert_close(a, e)


def test_a_stack_of_students():
    stack, target = maps((3, *X), X, dtype=torch.float32)
    ours, eager = (functional.feature_mse(stack, target, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, eager)
    for a, e in zip(*(torch.autograd.grad(loss, (stack, target)) for loss in (ours, eager)), strict=True):
        torch.testing.assert_close(a, e)


def test_recorded_values(golden):
    """Squared distance of the recorded maps once normalised: what the published programs call feature loss."""
    with np.load(golden / "ops.npz", allow_pickle=False) as file:
        names = [key.removesuffix("/feature_mse/loss") for key in file if key.endswith("feature_mse/loss")]
        assert names
        for name in names:
            x, y = (torch.from_numpy(file[f"{name}/{k}"]).to(DEVICE) for k in "xy")
            unit = [v.flatten(1).div(v.flatten(1).norm(dim=1, keepdim=True)).view_as(v) for v in (x, y)]
            truth = torch.from_numpy(file[f"{name}/feature_mse/loss"])
            single = [v.float() for v in unit]
            ours, eager = (functional.feature_mse(single[:1], single[1], backend=b) for b in ("triton", "reference"))
            assert_within_budget(ours, truth.view(()), eager, what=name)


@pytest.mark.parametrize("students", [1, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_closed_form_equals_autograd(students, shared):
    tensors = maps(*[X] * students, *[X] * (1 if shared else students), formats=(LAST,))
    expected = evaluate(tensors, students, "reference")
    features, targets = ([x.detach() for x in part] for part in (tensors[:students], tensors[students:]))
    cotangent = torch.tensor(0.75, dtype=torch.float64, device=DEVICE)
    found = [
        closed_form.forward(features, targets),
        *closed_form.backward(cotangent, features, targets, [True] * len(tensors)),
    ]
    for a, e in zip(found, expected, strict=True):
        assert relative_l2(a, e) <= 1e-12


@pytest.mark.parametrize("interpreted", [True, False], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [(), (LAST,) * 3, (LAST,)], ids=["contiguous", "channels_last", "mixed"])
def test_schemas(formats, interpreted, monkeypatch):
    """Shapes, dtypes and strides of the fakes are those of the real outputs."""
    if not interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    maps_ = maps(X, X, X, dtype=torch.float16, formats=formats, gradient=False)
    ops = torch.ops.fastfuse
    torch.library.opcheck(ops.feature_mse_fwd.default, (maps_[:2], maps_[2:]))
    torch.library.opcheck(ops.feature_mse_fwd.default, (maps_[:1], maps_[2:]))
    gradient = torch.ones((), device=DEVICE)
    torch.library.opcheck(ops.feature_mse_bwd.default, (gradient, maps_[:2], maps_[2:], [True, False, True]))


@pytest.mark.parametrize("shared", [True, False], ids=["one target", "one each"])
def test_compiles_in_one_graph(shared):
    torch.compiler.reset()
    tensors = maps(X, X, X, *([] if shared else [X]), dtype=torch.float32, formats=(LAST,))
    compiled = torch.compile(functional.feature_mse, fullgraph=True, backend="aot_eager")
    found, eager = (evaluate(tensors, 2, "triton", call) for call in (compiled, functional.feature_mse))
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
    found = evaluate(tensors, 2, "triton")
    monkeypatch.undo()
    assert len(written) == sum(x.requires_grad for x in tensors), "memory for gradients that nobody asked for"
    for a, e in zip(found, evaluate(tensors, 2, "reference"), strict=True):
        torch.testing.assert_close(a, e)


def test_same_bits_every_time():
    tensors = maps((3, 7, 41, 5), (3, 7, 41, 5), dtype=torch.float32)
    first, second = (evaluate(tensors, 1, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused():
    tensors = maps(X, X, dtype=torch.float32)
    loss = functional.feature_mse(tensors[:1], tensors[1], backend="triton").square()
    (slope,) = torch.autograd.grad(loss, tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["first student", "second student", "target"])
def test_float64_is_refused_wherever_it_stands(which):
    tensors = maps(X, X, X, dtype=torch.float32)
    tensors[which] = tensors[which].double()
    with pytest.raises(BackendUnavailableError, match=r"feature_mse cannot run on backend 'triton': .* torch\.float64"):
        functional.feature_mse(tensors[:2], tensors[2], backend="triton")
    assert functional.feature_mse(tensors[:2], tensors[2]).dtype == torch.float64
