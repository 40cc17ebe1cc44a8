"""deep_to_shallow as registered operators: schemas, closed form, graphs, and what is refused."""

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError, InputError
from fastfuse.kernels.deep_to_shallow import closed_form, outputs
from fastfuse.testing import relative_l2
from tests.kernels.deep_to_shallow_cases import FIELDS, LAYOUTS, SHAPES, chain, draw, leaves
from tests.kernels.op_cases import FORMATS


def detached(x, tensors):
    return x.detach(), [t.detach() for t in tensors]


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shape", "channels", "sizes"), [pytest.param(*case[:-1], id=case[-1]) for case in SHAPES])
def test_closed_form_equals_autograd(shape, channels, sizes, memory_format, training):
    """One stage, the first: its own gradient and one carried from the next stage are added."""
    x, [tensors, *_] = draw(shape, channels, torch.float64, [memory_format] * 3)
    size = None if sizes is None else sizes[-1:]
    eager = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    (out,) = functional.deep_to_shallow(x, chain([eager], training), sizes=size, backend="reference")
    grads = [torch.randn_like(out) for _ in range(2)]
    expected = torch.autograd.grad(out, [x, *eager[:3]], sum(grads))
    x, tensors = detached(x, tensors)
    padding = [s - 2 * n + 1 for s, n in zip(out.shape[2:], x.shape[2:], strict=True)]
    for keep in {True, training}:
        given = [[t] for t in (x, *tensors[:3], *(t.clone() for t in tensors[3:]))]
        found = outputs.stage_outputs(*given[:2], padding, keep, torch.float64)
        closed_form.stage_fwd(*given, *found, training, 0.1, 1e-5)
        assert relative_l2(found.out[0], out) <= 1e-12 and found.out[0].stride() == out.stride()
        for [ours], after in zip(given[4:], eager[3:], strict=True):
            assert relative_l2(ours, after) <= 1e-12
        needed = [True, True, keep, True]
        kept = found.normed if keep else found.out
        gradients = closed_form.stage_bwd(
            *([g] for g in grads), *given[:4], kept, found.mean, found.rstd, training, keep, needed
        )
        for ours, truth in zip(gradients, [g for g, n in zip(expected, needed, strict=True) if n], strict=True):
            assert relative_l2(ours, truth) <= 1e-12


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("last", [False, True])
def test_closed_form_of_the_attention_equals_the_reference(last, memory_format):
    x, [tensors] = detached_chain((2, 3, 3, 4), (5,), [memory_format] * 3)
    shift = torch.randn(2, 3, 4, dtype=torch.float64)
    expected, moved = (
        functional.deep_to_shallow(x, chain([tensors], False), sizes=[(5, 8)], attention=True, shift=s)[0]
        for s in (None, shift)
    )
    for shifts, truth in (([], expected), ([shift], moved)):
        found = closed_form.stage_attention([x], shifts, *([t] for t in tensors), (0, 1), last, 1e-5, torch.float64)
        assert relative_l2(found[0], truth) <= 1e-12
        assert [y.shape for y in found[1:]] == [] if last else [(2, 5, 5, 8)]
        for y in found[1:]:
            assert relative_l2(y.square().mean(1), truth) <= 1e-12 and y.is_contiguous(memory_format=memory_format)


def detached_chain(shape, channels, formats, dtype=torch.float64):
    x, tensors = draw(shape, channels, dtype, formats)
    return x.detach(), [[t.detach() for t in stage] for stage in tensors]


@pytest.mark.long
@pytest.mark.parametrize("interpreter", ["1", "0"], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [LAYOUTS["contiguous"], LAYOUTS["channels_last"]], ids=["plain", "last"])
def test_schemas_hold(formats, interpreter, monkeypatch):
    """Two transforms; the fakes of the forward have nothing to say, since its results are given."""
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    drawn = [detached_chain((2, 2, 2, 2), (3,), formats, torch.float32) for _ in range(2)]
    given = [list(column) for column in zip(*((x, *stage) for x, [stage] in drawn), strict=True)]
    modes = [
        (True, True, [True] * 4),
        (False, True, [False, False, True, False]),
        (False, False, [True, False, False, True]),
    ]
    for training, keep, needed in modes[:1] if interpreter == "1" else modes:
        found = outputs.stage_outputs(*given[:2], (0, 1), keep, torch.float32)
        for empty in (t for own in found for t in own):
            empty.zero_()
        forward = (*given, *found, training, 0.1, 1e-5)
        torch.library.opcheck(torch.ops.fastfuse.deep_to_shallow_fwd.default, forward)
        torch.ops.fastfuse.deep_to_shallow_fwd(*forward)
        kept, grads = found.normed if keep else found.out, [torch.randn_like(y) for y in found.out]
        backward = (grads, [], *given[:4], kept, found.mean, found.rstd, training, keep, needed)
        torch.library.opcheck(torch.ops.fastfuse.deep_to_shallow_bwd.default, backward)
        assert len(torch.ops.fastfuse.deep_to_shallow_bwd(*backward)) == 2 * sum(needed)
    for shifts, last in (([], True), ([torch.ones(2, 2, 2)] * 2, False)):
        arguments = (given[0], shifts, *given[1:], (0, 1), last, 1e-5, torch.float32)
        torch.library.opcheck(torch.ops.fastfuse.deep_to_shallow_attention_fwd.default, arguments)


@pytest.mark.long
def test_compiled_equals_eager():
    """Two transforms at once; the running statistics change inside the graph too, after targets were made of them."""
    torch.compiler.reset()

    def run(function):
        drawn = [draw((2, 2, 2, 2), (3, 2), torch.float32, LAYOUTS["channels_last"], seed) for seed in (1, 2)]
        targets, maps = function(drawn)
        maps = [y for own in maps for y in own]
        wanted = [t for x, tensors in drawn for t in leaves(x, tensors)]
        gradients = torch.autograd.grad(sum(y.square().sum() for y in maps), wanted)
        running = [t for _, tensors in drawn for stage in tensors for t in stage[3:]]
        return [*maps, *gradients, *running, *(y for own in targets for y in own)]

    def call(drawn):
        xs, size = [x for x, _ in drawn], [[(7, 8), (4, 4)]] * 2
        chains = [[*chain(tensors[:1], True), *chain(tensors[1:], False)] for _, tensors in drawn]
        frozen = [chain(tensors, False) for _, tensors in drawn]
        targets = functional.deep_to_shallow(xs, frozen, sizes=size, attention=True, backend="triton")
        return targets, functional.deep_to_shallow(xs, chains, sizes=size, backend="triton")

    for ours, expected in zip(run(torch.compile(call, fullgraph=True, backend="aot_eager")), run(call), strict=True):
        assert torch.equal(ours, expected) and ours.stride() == expected.stride()


def test_what_the_kernels_cannot_take_is_refused():
    x, tensors = draw((1, 3, 2, 2), (4,))

    def call(x=x, **replaced):
        stage = [replaced.get(field.replace(" ", "_"), t) for field, t in zip(FIELDS, tensors[0], strict=True)]
        size = [(1, 1)] if x.shape[2] == 1 else None
        return functional.deep_to_shallow(x, chain([stage], True), sizes=size, backend="triton")

    with pytest.raises(TypeError, match=r"stages\[0\].weight is torch.float32, x is torch.float16; convert one"):
        call(x.half())
    with pytest.raises(InputError, match=r"stages\[0\].norm takes batch statistics, which one value per channel"):
        call(x[:, :, :1, :1])
    with pytest.raises(InputError, match=r"stages\[0\].norm.running_var must be contiguous"):
        call(running_variance=torch.ones(8)[::2])
    with pytest.raises(InputError, match=r"stages\[0\].norm.weight is on meta, x on cpu"):
        call(gamma=torch.ones(4, device="meta"))
    with pytest.raises(BackendUnavailableError, match="float64"):
        call(x.double())


BAD = {
    "x must hold at least one map": lambda x, c: functional.deep_to_shallow([], []),
    r"stages must hold one entry for each of 2 maps, not 1": lambda x, c: functional.deep_to_shallow([x, x], [c]),
    r"sizes must hold one entry for each of 1 maps, not 2": lambda x, c: functional.deep_to_shallow(
        [x], [c], sizes=[None, None]
    ),
    r"stages\[1\]\[0\].weight must be \[2, C_out": lambda x, c: functional.deep_to_shallow([x, x[:, :2]], [c, c]),
    r"share their running statistics": lambda x, c: functional.deep_to_shallow([x, x], [c, c]),
    r"stages\[0\].norm is in training mode: attention=True": lambda x, c: functional.deep_to_shallow(
        x, c, attention=True
    ),
    r"shift is only for attention=True": lambda x, c: functional.deep_to_shallow(x, c, shift=torch.ones(1, 2, 2)),
    r"shift\[0\] must be \[1, 2, 2\]": lambda x, c: functional.deep_to_shallow(
        [x], [[c[0]._replace(norm=c[0].norm._replace(training=False))]], attention=True, shift=[torch.ones(1, 2, 3)]
    ),
}


@pytest.mark.parametrize("text", BAD)
def test_lists_that_do_not_fit_are_refused(text):
    x, tensors = draw((1, 3, 2, 2), (4,))
    with pytest.raises(InputError, match=text):
        BAD[text](x, chain(tensors, True))
