"""The kernels of attention_mse and attention_map, in the interpreter where there is no GPU, and their closed form."""

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError
from fastfuse.kernels.attention_mse import closed_form, op, triton_kernels, triton_maps
from fastfuse.testing import assert_within_budget, relative_l2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
REDUCTIONS = ["mean", "sum", "none"]
X, Y, MAP = (2, 3, 5, 4), (2, 7, 5, 4), (2, 5, 4)
DEEP, DEEP_MAP = (2, 9, 3, 3), (2, 3, 3)


def maps(*shapes, dtype=SINGLE, formats=(), gradient=True):
    """Random maps; formats[i] is that of map i, contiguous if there is none."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        x = x.abs() if len(shape) == 3 else x
        last = i < len(formats) and formats[i] == LAST and len(shape) == 4
        found.append((x.contiguous(memory_format=LAST) if last else x).requires_grad_(gradient))
    return found


def evaluate(tensors, backend, reduction="mean", call=functional.attention_mse):
    """Losses of pairs (first half: inputs, second half: targets) and gradients of those tensors that take one."""
    pairs = len(tensors) // 2
    losses = call(tensors[:pairs], tensors[pairs:], reduction=reduction, backend=backend)
    cotangent = torch.linspace(0.5, 2, losses.numel(), device=DEVICE).view(losses.shape).to(losses)
    wanted = [x for x in tensors if x.requires_grad]
    return [losses, *(torch.autograd.grad(losses, wanted, cotangent) if wanted else ())]


def exactly(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def agree(tensors, reduction="mean"):
    """Kernels and reference on the same tensors, within the error budget."""
    ours, eager = (evaluate(tensors, backend, reduction) for backend in ("triton", "reference"))
    for i, (a, t, e) in enumerate(zip(ours, evaluate(exactly(tensors), "reference", reduction), eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    return ours


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize(
    ("inputs", "targets", "formats", "reduction"),
    [
        pytest.param([X], [X], (), "mean", id="one pair"),
        pytest.param([X], [Y], (LAST, LAST), "sum", id="another width, channels-last"),
        pytest.param([X], [Y], (LAST,), "none", id="formats mixed in a pair"),
        pytest.param([X], [MAP], (LAST,), "mean", id="features against a ready map"),
        pytest.param([MAP], [MAP], (), "none", id="ready maps alone"),
        pytest.param([X, DEEP], [Y, DEEP], (), "none", id="pairs of different shapes: one launch, a loss per sample"),
        pytest.param([X, DEEP], [Y, DEEP], (LAST,) * 4, "mean", id="the same, channels-last"),
        pytest.param([X, DEEP_MAP], [MAP, DEEP], (), "mean", id="ready maps on either side of a list"),
        pytest.param([X, (1, 4, 3, 3)], [Y, (1, 2, 3, 3)], (), "sum", id="batches of two sizes"),
        pytest.param([(1, 1, 1, 1)], [(1, 1, 1, 1)], (), "mean", id="one element: the distance is 0"),
        pytest.param(
            [(1, 5, 13, 11)], [(1, 3, 13, 11)], (), "mean", id="odd extents, more positions than a tile's side"
        ),
        pytest.param([(1, 1, 7, 5)], [(1, 2, 7, 5)], (LAST,), "mean", id="one channel: both formats are one"),
    ],
)
def test_equals_the_reference(inputs, targets, formats, reduction, dtype, nan_filled):
    tensors = maps(*inputs, *targets, dtype=dtype, formats=formats)
    gradients = agree(tensors, reduction)[1:]
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in tensors]


@pytest.mark.parametrize("formats", [(), (LAST,) * 4], ids=["contiguous", "channels_last"])
def test_several_tiles_of_channels_and_positions(formats, monkeypatch, nan_filled):
    monkeypatch.setattr(triton_kernels, "TILE", 16)
    monkeypatch.setattr(triton_maps, "LONG_SIDE", 4)
    monkeypatch.setattr(triton_kernels, "REDUCE_BLOCK", 2)
    agree(maps((3, 7, 3, 3), (3, 5, 4, 4), (3, 9, 3, 3), (3, 2, 4, 4), formats=formats))


def views():
    """Views that are neither contiguous nor channels-last, in the shape of X."""
    wide = maps((2, 8, 5, 4), gradient=False)[0]
    return {
        "a student's channels in a stack of students": wide[:, 3:6],
        "the same, channels-last": wide.contiguous(memory_format=LAST)[:, 3:6],
        "cropped: height and width do not collapse": maps((2, 3, 8, 4), gradient=False)[0][:, :, 1:6],
        "cropped across: neither": maps((2, 3, 5, 8), gradient=False)[0][..., 1:5],
        "height and width swapped": maps((2, 3, 4, 5), gradient=False)[0].transpose(2, 3),
        "every other sample": maps((4, 3, 5, 4), gradient=False)[0][::2],
        "one sample for all": maps((1, 3, 5, 4), gradient=False)[0].expand(2, 3, 5, 4),
        "not aligned to 16 bytes": torch.randn(121, device=DEVICE)[1:].view(X),
    }


@pytest.mark.parametrize("view", views())
def test_views(view, nan_filled):
    agree([views()[view].requires_grad_(), *maps(Y)])
    agree([*maps(Y, formats=(LAST,)), views()[view].requires_grad_()])


def launches(monkeypatch):
    """Reductions of the calls of the forward launcher from now on."""
    seen = []
    forward = triton_kernels.forward
    monkeypatch.setattr(triton_kernels, "forward", lambda *a: seen.append(len(a[0])) or forward(*a))
    return seen


def test_half_precision_features_and_float32_maps_share_a_launch(monkeypatch, nan_filled):
    """What an autocast step holds: features in half precision, attention maps in float32, on either side."""
    seen = launches(monkeypatch)
    half, single = maps(X, DEEP, X, dtype=HALF), maps(MAP, DEEP_MAP)
    agree([half[0], half[1], single[0], single[1]])
    assert seen == [2]
    agree([half[0], single[1], half[2], half[1]])
    assert seen == [2, 2]


def test_inputs_and_targets_of_two_dtypes_share_a_launch(monkeypatch, nan_filled):
    seen = launches(monkeypatch)
    (x, deep), (y, goal) = maps(X, DEEP, dtype=HALF), maps(Y, DEEP)
    agree([x, deep, y, goal], "none")
    assert seen == [2]


def test_dtypes_that_cannot_share_a_launch_take_several(monkeypatch, nan_filled):
    seen = launches(monkeypatch)
    half, single = maps(X, Y, dtype=HALF), maps(X, Y, DEEP, DEEP)
    ours = agree([half[0], single[0], single[2], half[1], single[1], single[3]], "none")
    assert seen == [1, 2]
    assert ours[0].shape == (3, 2)


def test_more_pairs_than_one_launch_takes(monkeypatch, nan_filled):
    monkeypatch.setattr(op, "MAX_PAIRS", 2)
    seen = launches(monkeypatch)
    agree(maps(X, DEEP, X, Y, DEEP, Y))
    assert seen == [2, 1]


def test_a_single_pair_gives_no_list():
    x, y = maps(X, Y)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (2,))):
        ours, eager = (functional.attention_mse(x, y, reduction=reduction, backend=b) for b in ("triton", "reference"))
        assert ours.shape == shape
        torch.testing.assert_close(ours, eager)
        (own,), (other,) = (torch.autograd.grad(loss.sum(), x) for loss in (ours, eager))
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    ("shapes", "reduction"),
    [
        *[pytest.param([(0, 3, 5, 4)], reduction, id=f"no samples, {reduction}") for reduction in REDUCTIONS],
        pytest.param([X, (0, 3, 5, 4)], "sum", id="no samples in one pair of two"),
        pytest.param([(2, 3, 0, 4)], "none", id="no positions"),
    ],
)
def test_nothing_to_add(shapes, reduction, nan_filled):
    """No samples: nan, 0 or no losses, as eager has it; no positions: nan. Pairs with samples are not disturbed."""
    tensors = maps(*shapes, *shapes)
    ours, eager = (evaluate(tensors, backend, reduction) for backend in ("triton", "reference"))
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


def test_maps_that_nearly_agree(nan_filled):
    """1 - cos between 1e-8 and 1e-4, where 2 - 2 cos keeps no digit in float32; scales differ by 3."""
    x = maps((4, 4, 12, 12), gradient=False)[0]
    for angle in (1e-2, 1e-3):
        y = 3 * x + angle * torch.randn_like(x)
        agree([x.clone().requires_grad_(), y.requires_grad_()], "none")


@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 1)], ids=["input", "target", "both"])
def test_zero_maps(zeros, nan_filled):
    """One zero map: distance 1 / N; two: 0. The gradient of a zero map is exactly 0, eager's too for features.

    The other map's gradient is 0 but for rounding: its length does not matter, its direction has nothing to turn to.
    """
    tensors = [torch.zeros_like(x) if i in zeros else x.detach() for i, x in enumerate(maps(X, Y))]
    tensors = [x.requires_grad_() for x in tensors]
    losses, *gradients = evaluate(tensors, "triton", "none")
    torch.testing.assert_close(losses, torch.full_like(losses, 1 / 20 if len(zeros) == 1 else 0.0), atol=0, rtol=1e-6)
    assert not any(gradients[i].any() for i in zeros)
    for a, e in zip(gradients, evaluate(tensors, "reference", "none")[1:], strict=True):
        torch.testing.assert_close(a, e, atol=1e-8, rtol=0)


def test_a_ready_zero_map_gets_no_gradient(nan_filled):
    """Eager sends it the other map's direction times 1e12; the README says that kernels do not."""
    zero = torch.zeros(MAP, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(functional.attention_mse(zero, maps(MAP)[0], backend="triton"), zero)
    assert torch.equal(gradient, torch.zeros_like(zero))


def test_recorded_values(golden):
    with np.load(golden / "ops.npz", allow_pickle=False) as file:
        names = [key.removesuffix("/attention_mse/loss") for key in file if key.endswith("attention_mse/loss")]
        assert len(names) == 5
        for name in names:
            x, y = (torch.from_numpy(file[f"{name}/{k}"]).to(DEVICE, SINGLE) for k in "xy")
            found = []
            for backend in ("triton", "reference"):
                leaf = x.clone().requires_grad_()
                loss = functional.attention_mse(leaf, y, backend=backend)
                found.append([loss, *torch.autograd.grad(loss, leaf)])
            truth = [torch.from_numpy(file[f"{name}/attention_mse/{k}"]) for k in ("loss", "grad_x")]
            for a, t, e in zip(found[0], truth, found[1], strict=True):
                assert_within_budget(a, t.view(a.shape), e, what=name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_closed_form_equals_autograd(reduction):
    tensors = maps(X, DEEP, MAP, Y, DEEP_MAP, X, dtype=torch.float64, formats=(LAST,))
    expected = evaluate(tensors, "reference", reduction)
    plain = [x.detach() for x in tensors]
    losses, attention, stats = closed_form.forward(plain[:3], plain[3:], reduction)
    cotangent = torch.linspace(0.5, 2, losses.numel(), device=DEVICE).view(losses.shape).to(losses)
    starts = [0, 40, 58]
    gradients = closed_form.backward(cotangent, attention, stats, plain, range(6), [*starts, *starts], reduction)
    for a, e in zip([losses, *gradients], expected, strict=True):
        assert relative_l2(a, e) <= 1e-12


@pytest.mark.parametrize("interpreted", [True, False], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [(), (LAST,) * 4, (LAST,)], ids=["contiguous", "channels_last", "mixed"])
def test_schemas(formats, interpreted, monkeypatch):
    """Shapes, dtypes and strides of the fakes are those of the real outputs."""
    if not interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    ops = torch.ops.fastfuse
    tensors = maps(X, DEEP, Y, DEEP_MAP, dtype=HALF, formats=formats, gradient=False)
    for reduction in ("mean", "none"):
        torch.library.opcheck(ops.attention_mse_fwd.default, (tensors[:2], tensors[2:], reduction))
    losses, attention, stats = ops.attention_mse_fwd(tensors[:2], tensors[2:], "none")
    arguments = (torch.ones_like(losses), attention, stats, tensors[:3], [0, 1, 2], [0, 40, 0], "none")
    torch.library.opcheck(ops.attention_mse_bwd.default, arguments)
    torch.library.opcheck(ops.attention_map_fwd.default, (tensors[::2],))
    torch.library.opcheck(ops.attention_map_bwd.default, (torch.ones(MAP, device=DEVICE), tensors[::2], 10))


def test_gradients_of_a_view_whose_format_kernels_cannot_address():
    """The fake of its gradient's memory is the real one's: height and width swapped in memory."""
    x = maps((2, 3, 4, 5), gradient=False)[0].transpose(2, 3)
    losses, attention, stats = torch.ops.fastfuse.attention_mse_fwd([x.contiguous()], [x.contiguous()], "mean")
    torch.library.opcheck(
        torch.ops.fastfuse.attention_mse_bwd.default, (torch.ones_like(losses), attention, stats, [x], [0], [0], "mean")
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction):
    torch.compiler.reset()
    tensors = maps(X, DEEP, MAP, DEEP, formats=(LAST,))
    tensors[3].requires_grad_(False)
    compiled = torch.compile(functional.attention_mse, fullgraph=True, backend="aot_eager")
    found, eager = (evaluate(tensors, "triton", reduction, call) for call in (compiled, functional.attention_mse))
    for a, e in zip(found, eager, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()


@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 0, 1), (0, 0, 0, 0)], ids=str)
def test_only_wanted_gradients(wanted, nan_filled, monkeypatch):
    """Memory is taken for the gradients that are asked for, and only the maps that they need are kept."""
    tensors = maps(X, DEEP, Y, DEEP)
    for x, asked in zip(tensors, wanted, strict=True):
        x.requires_grad_(bool(asked))
    written = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: written.append(x) or empty_like(x, **k))
    found = evaluate(tensors, "triton")
    assert len(written) == sum(wanted)
    monkeypatch.undo()
    for a, e in zip(found, evaluate(tensors, "reference"), strict=True):
        torch.testing.assert_close(a, e)
    losses = functional.attention_mse(tensors[:2], tensors[2:], backend="triton")
    if any(wanted):
        assert len(losses.grad_fn.saved_tensors) == 2 + sum(wanted)


def test_expanded_cotangents():
    """The sum over pairs sends every pair the same number, at stride 0."""
    tensors = maps(X, DEEP, Y, DEEP)
    for reduction in ("mean", "none"):
        ours, eager = (
            torch.autograd.grad(
                functional.attention_mse(tensors[:2], tensors[2:], reduction=reduction, backend=backend).sum(), tensors
            )
            for backend in ("triton", "reference")
        )
        for a, e in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "formats"),
    [
        pytest.param([X], [SINGLE], (), id="one map"),
        pytest.param([X, Y], [HALF, HALF], (LAST, LAST), id="two widths, channels-last"),
        pytest.param([X, Y, X], [SINGLE, BF16, HALF], (LAST,), id="three dtypes and both formats in one launch"),
        pytest.param([(1, 5, 13, 11)], [SINGLE], (), id="odd extents, more positions than a tile's side"),
        pytest.param([(0, 3, 2, 2)], [SINGLE], (), id="no samples"),
    ],
)
def test_attention_map_equals_the_reference(shapes, dtypes, formats, nan_filled):
    tensors = [
        maps(s, dtype=d, formats=formats[i : i + 1])[0] for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]

    def run(features, backend):
        found = functional.attention_map(features, backend=backend)
        cotangent = torch.linspace(-1, 1, found.numel(), device=DEVICE).view(found.shape).to(found)
        return [found, *torch.autograd.grad(found, features, cotangent)]

    ours, eager = (run(tensors, backend) for backend in ("triton", "reference"))
    for i, (a, t, e) in enumerate(zip(ours, run(exactly(tensors), "reference"), eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    assert [g.stride() for g in ours[1:]] == [torch.empty_like(x).stride() for x in tensors]


def test_attention_map_compiles_and_takes_wanted_gradients_alone():
    torch.compiler.reset()
    x, y = maps(X, Y, formats=(LAST,))
    y.requires_grad_(False)
    compiled = torch.compile(functional.attention_map, fullgraph=True, backend="aot_eager")
    (found, own), (eager, other) = (
        (a := call([x, y], backend="triton"), *torch.autograd.grad(a.square().sum(), x))
        for call in (compiled, functional.attention_map)
    )
    assert torch.equal(found, eager) and torch.equal(own, other)
    assert own.stride() == x.stride()


def test_closed_form_of_attention_map_equals_autograd():
    tensors = maps(X, Y, dtype=torch.float64, formats=(LAST,))
    found = functional.attention_map(tensors, backend="reference")
    cotangent = torch.linspace(-1, 1, found.numel(), device=DEVICE, dtype=torch.float64).view(found.shape)
    expected = torch.autograd.grad(found, tensors, cotangent)
    assert relative_l2(closed_form.map_forward(tensors), found) <= 1e-12
    for a, e in zip(closed_form.map_backward(cotangent, [x.detach() for x in tensors], 10), expected, strict=True):
        assert relative_l2(a, e) <= 1e-12


def test_same_bits_every_time():
    tensors = maps((3, 7, 13, 11), (3, 5, 13, 11))
    first, second = (evaluate(tensors, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused():
    x, y = maps(X, Y)
    (slope,) = torch.autograd.grad(functional.attention_mse(x, y, backend="triton").square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("which", range(4), ids=["first input", "second input", "first target", "second target"])
def test_float64_is_refused_wherever_it_stands(which):
    tensors = maps(X, DEEP, Y, DEEP)
    tensors[which] = tensors[which].double()
    with pytest.raises(
        BackendUnavailableError, match=r"attention_mse cannot run on backend 'triton': .*torch\.float64"
    ):
        functional.attention_mse(tensors[:2], tensors[2:], backend="triton")
    assert functional.attention_mse(tensors[:2], tensors[2:]).dtype == torch.float64
    with pytest.raises(BackendUnavailableError, match=r"torch\.float64"):
        functional.attention_map([tensors[which]], backend="triton")
