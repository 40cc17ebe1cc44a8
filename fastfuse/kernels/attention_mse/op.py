"""Public form of attention_mse and attention_map, and which pairs share a launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _extension, _limits, _numerics, _triton
from fastfuse.kernels.attention_mse import reference
from fastfuse.kernels.attention_mse.autograd import AttentionMap, AttentionMse

# Triton first as long as no measured row puts CUDA C++ before it.
_dispatch.register("attention_mse", {"triton": _triton.why_not, "cuda": _extension.why_not, "reference": None})

# Addresses and strides travel as kernel parameters, of which there may be 4 KiB: about 60 bytes a map.
MAX_PAIRS = 32
# Of a block in the backward of csrc/attention.cuh; its blocks are counted along the grid's second axis.
CUDA_POSITIONS = 256


def attention_map(features: Tensor | Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Attention map: the channel mean of squares, `att` in the FFSD equations.

    Args:
        features: [B, C, H, W] floating point, or several such maps of equal B, H, W, which stand for their channel
            concatenation (it is not built: att(cat) is the mean of the attentions weighted by channels).
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [B, H, W], float32 for half-precision input, else the input's dtype.
    """
    features = [features] if isinstance(features, Tensor) else list(features)
    if not features:
        raise InputError("features must hold at least one map")
    for s, feature in enumerate(features):
        _numerics.check_floating(f"features[{s}]", feature, (4,))
        _check_grid(f"features[{s}]", feature, "features[0]", features[0])
    backend = _served("features", backend, features)
    if backend == "reference":
        return reference.attention_map(features)
    return AttentionMap.apply(backend, *(_triton.map_strides(x)[0] for x in features))


def attention_mse(
    inputs: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Squared distance of L2-normalised attention maps, for one pair or a list of pairs of any shapes.

    D2(att(x), att(y)) = mean over B and H W of (att(x)/|att(x)| - att(y)/|att(y)|)^2, norms per sample, at least 1e-12.
    Source: FFSD (arXiv 2103.14473), fusion and self-distillation losses.

    Args:
        inputs: feature maps [B, C, H, W] or ready attention maps [B, H, W]; floating point.
        targets: the same, channel counts may differ from the inputs'; gradients flow wherever they are required.
        reduction: over the samples of a pair: "mean", "sum" or "none".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        For one pair 0-d (or [B] for "none"); for lists of P pairs [P] (or a stack [P, B] for "none",
            which needs equal B). float32 for half-precision input.

    Raises:
        InputError, TypeError: pairs that differ in batch, height, width or device; wrong dtype or dimensions.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    single = isinstance(inputs, Tensor)
    pairs = _numerics.as_pairs(inputs, targets)
    _numerics.check_reduction(reduction)
    for i, (x, y) in enumerate(pairs):
        _numerics.check_floating(f"inputs[{i}]", x, (3, 4))
        _numerics.check_floating(f"targets[{i}]", y, (3, 4))
        _check_grid(f"targets[{i}]", y, f"inputs[{i}]", x)
    _numerics.check_stackable(pairs, reduction)
    backend = _served("inputs", backend, [x for pair in pairs for x in pair])
    if backend == "reference":
        losses = [reference.attention_mse(x, y, reduction) for x, y in pairs]
        return losses[0] if single else torch.stack(losses)
    losses = _launches(pairs, reduction, backend)
    return losses.view(losses.shape[1:]) if single else losses


def _served(name: str, backend: str, maps: Sequence[Tensor]) -> str:
    """The backend that serves all maps; the reference where they would go different ways."""
    found = {_dispatch.resolve("attention_mse", backend, x) for x in maps}
    if found == {"cuda"}:
        for x in maps:
            _limits.grid(name, x, x.shape[0], -(-x.shape[-2] * x.shape[-1] // CUDA_POSITIONS))
    return found.pop() if len(found) == 1 else "reference"


def _launches(pairs: Sequence[tuple[Tensor, Tensor]], reduction: str, backend: str) -> Tensor:
    groups = _groups(pairs)
    rows: list[Tensor | None] = [None] * len(pairs)
    for members in groups:
        maps = [_triton.map_strides(pairs[i][side])[0] for side in (0, 1) for i in members]
        losses = AttentionMse.apply(backend, reduction, *maps)
        if len(groups) == 1:
            return losses
        for i, row in zip(members, losses.unbind(0), strict=True):
            rows[i] = row
    return torch.stack(rows)


def _groups(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Pairs that share a launch: on each side the feature maps have one dtype, and so have the ready maps."""
    groups: list[tuple[dict[tuple[int, int], torch.dtype], list[int]]] = []
    for i, pair in enumerate(pairs):
        kinds = {(side, x.dim()): x.dtype for side, x in enumerate(pair)}
        for dtypes, members in groups:
            if len(members) < MAX_PAIRS and all(dtypes.get(kind, dtype) == dtype for kind, dtype in kinds.items()):
                dtypes.update(kinds)
                members.append(i)
                break
        else:
            groups.append((kinds, [i]))
    return [members for _, members in groups]


def _check_grid(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    _numerics.check_same_device(other_name, other, **{name: x})
    if (x.shape[0], *x.shape[-2:]) != (other.shape[0], *other.shape[-2:]):
        raise InputError(
            f"{name} {list(x.shape)} and {other_name} {list(other.shape)} must agree in batch, height and width"
        )
