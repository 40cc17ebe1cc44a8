"""Public form of deep_to_shallow, and which transforms share launches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _across, _dispatch, _limits, _triton
from fastfuse.kernels.deep_to_shallow import checks, outputs, reference
from fastfuse.kernels.deep_to_shallow.autograd import DeepToShallow, StageOptions, attention_chain
from fastfuse.kernels.deep_to_shallow.checks import Stage, Transform

_dispatch.register("deep_to_shallow", {"triton": _triton.why_not, "reference": None})

# Addresses travel as kernel parameters, of which there may be 4 KiB: at most 80 bytes a transform.
MAX_TRANSFORMS = 32


def deep_to_shallow(
    x: Tensor | Sequence[Tensor],
    stages: Sequence[Stage] | Sequence[Sequence[Stage]],
    *,
    sizes: Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]] | None] | None = None,
    attention: bool = False,
    shift: Tensor | Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...] | list[tuple[Tensor, ...]]:
    """Shallow-looking maps from a deep one: a chain of transposed convolution (3x3, stride 2) + batch norm + ReLU.

    For one transform, or for T transforms at once: those of equal shapes, dtypes and options share their launches.
    Source: FFSD (arXiv 2103.14473), self-distillation transform.

    Args:
        x: the deep map [B, C, H, W]; or a list of T deep maps.
        stages: the chain, the first acts on x; for a list a chain for each.
        sizes: (height, width) of the maps to give, shallow to deep; each is twice the next deeper one or one less.
            None: exactly twice. For a list one such entry for each, or None.
        attention: give, in place of every map, its attention map (channel mean of squares), without gradients; all
            norms must be on running statistics. The shallowest map is then never written.
        shift: [B, H, W], added to all channels of x as it is read (only with attention=True), as of a diversity
            target; for a list one for each. Detached.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        One map per stage, shallow to deep: the last stage's output comes first, as in a network's features. Attention
        maps are [B, H, W], float32 for half precision. For a list a list of T such tuples.

    Raises:
        InputError, TypeError: no stage, channels that do not chain, norms of other widths, sizes that a stride of 2
            cannot reach, lists of unequal length, transforms in training mode that share running statistics,
            attention maps of norms in training mode, a shift without attention maps.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    single = isinstance(x, Tensor)
    xs = [x] if single else list(x)
    if not xs:
        raise InputError("x must hold at least one map")
    names = [""] if single else [f"[{t}]" for t in range(len(xs))]
    chains, wanted, shifts = (
        _one_each(field, [given] if single else given, len(xs))
        for field, given in (("stages", stages), ("sizes", sizes), ("shift", shift))
    )
    transforms = [
        checks.checked(name, *given, attention) for name, *given in zip(names, xs, chains, wanted, shifts, strict=True)
    ]
    checks.check_statistics(transforms)
    norms = [norm for one in transforms for _, norm in one.stages]
    backend = _across.backend_for("deep_to_shallow", backend, norms)
    if {_dispatch.resolve("deep_to_shallow", backend, one.x) for one in transforms} == {"triton"}:
        found = _fused(names, transforms, attention)
    elif attention:
        found = [reference.attention(one.x, one.shift, one.stages, one.paddings) for one in transforms]
    elif any(map(_across.asks, norms)):
        found = _across.in_step(reference.walk(one.x, one.stages, one.paddings) for one in transforms)
    else:
        found = [reference.deep_to_shallow(one.x, one.stages, one.paddings) for one in transforms]
    shallow_first = [tuple(maps[::-1]) for maps in found]
    return shallow_first[0] if single else shallow_first


def _one_each(name: str, given: Sequence | None, count: int) -> list:
    found = [None] * count if given is None else list(given)
    if len(found) != count:
        raise InputError(f"{name} must hold one entry for each of {count} maps, not {len(found)}")
    return found


def _fused(names: Sequence[str], transforms: Sequence[Transform], attention: bool) -> list[list[Tensor]]:
    """The chains through their kernels; maps in the order of the stages."""
    options = [_options(name, one, attention) for name, one in zip(names, transforms, strict=True)]
    tensors = [
        [
            t
            for weight, norm in one.stages
            for t in (weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        ]
        for one in transforms
    ]
    keys = []
    for one, option, own in zip(transforms, options, tensors, strict=True):
        x, shift = one.x, one.shift
        keys.append(
            (x.shape, x.device, None if shift is None else shift.dtype, option, [(t.shape, t.dtype) for t in (x, *own)])
        )
    found: list[list[Tensor]] = [[] for _ in transforms]
    for group in outputs.alike(keys):
        for first in range(0, len(group), MAX_TRANSFORMS):
            members = group[first : first + MAX_TRANSFORMS]
            xs = [transforms[t].x for t in members]
            lists = [list(column) for column in zip(*(tensors[t] for t in members), strict=True)]
            if attention:
                shifts = [transforms[t].shift for t in members if transforms[t].shift is not None]
                maps = [y for own in attention_chain(options[members[0]], xs, shifts, lists) for y in own]
            else:
                flat = [t for own in lists for t in own]
                maps = DeepToShallow.apply(options[members[0]], *xs, *flat)
            for place, t in enumerate(members):
                found[t] = list(maps[place :: len(members)])
    return found


def _options(name: str, transform: Transform, attention: bool) -> tuple[StageOptions, ...]:
    """What each stage of a transform is told; refuses what the kernels cannot take."""
    x = transform.x
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    options = []
    height, width = x.shape[2:]
    for j, ((weight, norm), padding) in enumerate(zip(transform.stages, transform.paddings, strict=True)):
        # Of the map that the stage takes in: kernels number through these.
        _limits.check_count(f"x{name}", x, f"positions before stage {j}", x.shape[0] * height * width)
        height, width = 2 * height - 1 + padding[0], 2 * width - 1 + padding[1]
        checks.check_stage(f"stages{name}[{j}]", weight, norm, x)
        if norm.training and x.shape[0] * height * width == 1:
            raise InputError(
                f"stages{name}[{j}].norm takes batch statistics, which one value per channel does not have: "
                "give more samples or larger maps, or training=False"
            )
        # A norm that does not learn gets its gradient by the output alone; so do the maps that make targets.
        learns = torch.is_grad_enabled() and norm.weight.requires_grad and not attention
        options.append(StageOptions(padding, norm.training, norm.training or learns, norm.momentum, norm.eps, dtype))
    return tuple(options)
