"""deep_to_shallow of several transforms at once, and of attention maps alone: the Triton kernels in the interpreter."""

import pytest
import torch

from fastfuse import functional
from fastfuse.kernels.deep_to_shallow import op
from tests.kernels.deep_to_shallow_cases import (
    CHAIN,
    LAYOUTS,
    SHAPES,
    chain,
    compare,
    cotangents,
    count_launches,
    draw,
    evaluate,
    leaves,
    named,
    three,
)  # fmt: skip

ONE_STAGE = (2, 3, 2, 2), (4,)
TWO_STAGES = (2, 3, 2, 2), (4, 2)
FORWARD = {"fwd_phases": 1, "fwd_statistics": 1, "fwd_normalise": 1}
BACKWARD = {"bwd_sums": 1, "bwd_norm": 1, "bwd_weight": 1, "bwd_gradients": 1}


def times(launches, count):
    return {name: count * number for name, number in launches.items()}


def together(drawn, training, used=None):
    """All transforms in one call: the results of each by name."""
    found = functional.deep_to_shallow(
        [x for x, _ in drawn], [chain(tensors, training) for _, tensors in drawn], backend="triton"
    )
    outputs = [y for t, maps in enumerate(found) for y in (maps if used is None or t in used else ())]
    given = [g for t, maps in enumerate(found) for g in (cotangents(maps) if used is None or t in used else ())]
    wanted = [leaves(x, tensors) for x, tensors in drawn]
    gradients = iter(torch.autograd.grad(outputs, [t for own in wanted for t in own], given, allow_unused=True))
    return [
        named(x, tensors, maps, [next(gradients) for _ in own])
        for (x, tensors), maps, own in zip(drawn, found, wanted, strict=True)
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.long)])
def test_transforms_at_once_give_the_bits_of_each_alone_in_as_many_launches_as_one(
    count, training, monkeypatch, nan_filled
):
    shape = TWO_STAGES if count > 2 else ONE_STAGE
    alone = [evaluate("triton", *draw(*shape, seed=t), training) for t in range(count)]
    ran = count_launches(monkeypatch)
    found = together([draw(*shape, seed=t) for t in range(count)], training)
    for ours, expected in zip(found, alone, strict=True):
        assert ours.keys() == expected.keys()
        assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    stages = len(shape[1])
    assert ran == times((FORWARD if training else {"fwd_phases": 1}) | BACKWARD, stages)


@pytest.mark.long
def test_unlike_transforms_have_launches_of_their_own(monkeypatch, nan_filled):
    """Another shape, layout of the map, layout of the weight, dtype, mode and depth."""
    drawn = [
        draw(*ONE_STAGE),
        draw((2, 3, 2, 3), (4,)),
        draw(*ONE_STAGE, formats=LAYOUTS["channels_last"], seed=1),
        draw(*ONE_STAGE, formats=[*LAYOUTS["mixed otherwise"]], seed=2),
        draw(*ONE_STAGE, dtype=torch.float16, seed=3),
        draw((2, 3, 2, 2), (4, 2), seed=4),
        draw(*ONE_STAGE, seed=5),
    ]
    ran = count_launches(monkeypatch)
    found = together(drawn, True)
    assert ran == times(FORWARD | BACKWARD, 7), "the first and the last share theirs; one has two stages"
    for (x, tensors), ours in zip(drawn, found, strict=True):
        fresh = x.detach().requires_grad_(), [[t.detach().requires_grad_(t.requires_grad) for t in s] for s in tensors]
        alone = evaluate("triton", *fresh, True)
        assert all(torch.equal(ours[n], alone[n]) for n in ours if not n.startswith("running"))


@pytest.mark.long
def test_only_what_is_used_and_needed_gets_a_gradient(monkeypatch):
    """Of three transforms one is not used, and one has a frozen weight."""
    drawn = [draw(*ONE_STAGE, seed=t) for t in range(3)]
    drawn[2][1][0][0] = drawn[2][1][0][0].detach()
    ran = count_launches(monkeypatch)
    found = together(drawn, True, used=(0, 2))
    assert ran == FORWARD | times(BACKWARD, 2) | {"bwd_weight": 1}
    assert all(value is None for name, value in found[1].items() if name.startswith("gradient"))
    for t in (0, 2):
        x, tensors = draw(*ONE_STAGE, seed=t)
        expected = evaluate("triton", x, tensors, True)
        gradients = [name for name in found[t] if name.startswith("gradient")]
        assert ("gradient of weight of stage 0" in gradients) == (t == 0)
        assert all(torch.equal(found[t][name], expected[name]) for name in gradients)


def test_more_transforms_than_a_launch_takes_are_split(monkeypatch):
    monkeypatch.setattr(op, "MAX_TRANSFORMS", 2)
    ran = count_launches(monkeypatch)
    drawn = [draw((1, 1, 1, 1), (1,), seed=t) for t in range(3)]
    with torch.no_grad():
        found = functional.deep_to_shallow([x for x, _ in drawn], [chain(t, False) for _, t in drawn], backend="triton")
    assert ran == {"fwd_phases": 2}
    for (x, tensors), maps in zip(drawn, found, strict=True):
        (expected,) = functional.deep_to_shallow(x, chain(tensors, False), backend="reference")
        torch.testing.assert_close(maps[0], expected)


def attentions(drawn, sizes=None, shifts=None, backend="triton"):
    shift = None if shifts is None else [s.to(x.dtype) for s, (x, _) in zip(shifts, drawn, strict=True)]
    found = functional.deep_to_shallow(
        [x for x, _ in drawn], [chain(tensors, False) for _, tensors in drawn], sizes=sizes,
        attention=True, shift=shift, backend=backend,
    )  # fmt: skip
    return [y for maps in found for y in maps]


# dtype and layout of each shape; the shift is tried with two of them
ATTENTION = [
    pytest.param(*case[:-1], dtype, layout, id=case[-1], marks=[] if i == 0 else [pytest.mark.long])
    for i, (case, dtype, layout) in enumerate(
        zip(SHAPES, 3 * (torch.float32, torch.float16), [*LAYOUTS, *list(LAYOUTS)[:2]], strict=True)
    )
]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("shape", "channels", "sizes", "dtype", "layout"), ATTENTION)
def test_attention_maps_alone(shape, channels, sizes, dtype, layout, shifted, nan_filled):
    shift = torch.randn(2, shape[0], *shape[2:], generator=torch.Generator().manual_seed(0)).half()

    def run(backend, dtype):
        drawn = [draw(shape, channels, dtype, LAYOUTS[layout], seed) for seed in (1, 2)]
        return attentions(drawn, [sizes] * 2, shift if shifted else None, backend)

    found, truth, eager = three(run, dtype)
    compare(found, truth, eager)
    assert all(y.dtype == torch.float32 and not y.requires_grad for y in found)


def test_attention_maps_are_those_of_the_maps():
    """What FFSD compares with: the channel mean of squares of each map."""
    x, tensors = draw(*CHAIN, torch.float64)
    found = functional.deep_to_shallow(x, chain(tensors, False), attention=True, backend="reference")
    maps = functional.deep_to_shallow(x, chain(tensors, False), backend="reference")
    for ours, y in zip(found, maps, strict=True):
        torch.testing.assert_close(ours, y.square().mean(1))


def test_attention_maps_take_a_launch_a_stage_and_the_last_map_is_never_made(monkeypatch):
    ran, made = count_launches(monkeypatch), []
    forward = torch.ops.fastfuse.deep_to_shallow_attention_fwd

    def spy(*arguments):
        made.append([tuple(y.shape) for y in forward(*arguments)])
        return forward(*arguments)

    monkeypatch.setattr(torch.ops.fastfuse, "deep_to_shallow_attention_fwd", spy)
    drawn = [draw((1, 2, 1, 1), (2, 1), seed=t) for t in range(3)]
    before = [t.clone() for _, tensors in drawn for stage in tensors for t in stage[3:]]
    attentions(drawn)
    assert made == [[(1, 2, 2)] * 3 + [(1, 2, 2, 2)] * 3, [(1, 4, 4)] * 3]
    assert ran == {"fwd_attention": 4}, "two stages, and the spy runs each twice"
    assert all(map(torch.equal, before, [t for _, tensors in drawn for stage in tensors for t in stage[3:]]))


@pytest.mark.long
def test_attention_maps_of_no_sample_and_under_autocast(nan_filled):
    assert [y.shape for y in attentions([draw((0, 5, 3, 2), (4, 3))])] == [(0, 12, 8), (0, 6, 4)]

    def run(backend, dtype):
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
            return attentions([draw(*CHAIN, dtype)], backend=backend)

    results = three(run)
    assert all(y.dtype == torch.float32 for y in results[0])
    compare(*results)
