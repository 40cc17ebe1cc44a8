"""Schemas, fakes and autograd function of peer_kl_ce; torch only, the kernels are loaded when first executed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfuse.kernels import _library
from fastfuse.kernels._autograd import first_derivatives_only
from fastfuse.kernels.peer_kl_ce import closed_form


class Options(NamedTuple):
    """What is no tensor, in the schemas' order; see `closed_form.forward`."""

    temperature: float
    teachers: tuple[int, ...]
    counts: tuple[int, ...]
    ensemble: tuple[int, ...]
    target_epsilon: float
    label_smoothing: float
    reduction: str


_OPTIONS = (
    "float temperature, int[] teachers, int[] counts, int[] ensemble, float target_epsilon, float label_smoothing, "
    "str reduction"
)


def _fwd_fake(
    logits: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    teachers: Sequence[int],
    counts: Sequence[int],
    ensemble: Sequence[int],
    target_epsilon: float,
    label_smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, sources = logits[0].shape[0], len(logits) + bool(ensemble)
    kept = {"dtype": torch.promote_types(logits[0].dtype, torch.float32), "device": logits[0].device}
    shape = (len(counts), batch) if reduction == "none" else (len(counts),)
    labelled = (0,) if labels is None else shape
    return (
        torch.empty(labelled, **kept),
        torch.empty(shape, **kept),
        torch.empty(labelled, dtype=torch.int64, device=logits[0].device),
        torch.empty(2 if labels is None else 4, sources, batch, **kept),
    )


def _bwd_fake(
    grad_ce: Tensor | None,
    grad_kl: Tensor | None,
    logits: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    stats: Tensor,
    heads: Sequence[int],
    *options: Any,
) -> list[Tensor]:
    return [torch.empty_like(logits[i]) for i in heads]


_library.define(
    "peer_kl_ce_fwd",
    f"(Tensor[] logits, Tensor? labels, Tensor? weights, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    closed_form=closed_form.forward,
    launcher="fastfuse.kernels.peer_kl_ce.triton_kernels:launch_fwd",
)
_library.define(
    "peer_kl_ce_bwd",
    "(Tensor? grad_ce, Tensor? grad_kl, Tensor[] logits, Tensor? labels, Tensor? weights, Tensor stats, int[] heads, "
    f"{_OPTIONS}) -> Tensor[]",
    fake=_bwd_fake,
    closed_form=closed_form.backward,
    launcher="fastfuse.kernels.peer_kl_ce.triton_kernels:launch_bwd",
)


class PeerKlCeFunction(torch.autograd.Function):
    """Losses and right answers of all rows; saves the logits and 4 numbers per source and sample."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, labels: Tensor, weights: Tensor | None, *logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, divergence and right answers, [heads] each."""
        ce, kl, correct, stats = torch.ops.fastfuse.peer_kl_ce_fwd(logits, labels, weights, *options)
        ctx.save_for_backward(labels, weights, stats, *logits)
        ctx.options = options
        ctx.mark_non_differentiable(correct)
        # No kernel that fills a gradient with zeros where only one of the two losses is used.
        ctx.set_materialize_grads(False)
        return ce, kl, correct

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad_ce: Tensor | None, grad_kl: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Gradients of the rows that need one."""
        labels, weights, stats, *logits = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        heads = [i for i, needed in enumerate(needs) if needed]
        if not heads or (grad_ce is None and grad_kl is None):
            return (None,) * len(ctx.needs_input_grad)
        found = iter(
            torch.ops.fastfuse.peer_kl_ce_bwd(grad_ce, grad_kl, logits, labels, weights, stats, heads, *ctx.options)
        )
        return None, None, None, *[next(found) if needed else None for needed in needs]


class PeerKlFunction(torch.autograd.Function):
    """Divergence of a prediction from peers that get no gradient; saves the logits and 2 numbers per row and sample."""

    @staticmethod
    def forward(ctx: Any, options: Options, prediction: Tensor, *peers: Tensor) -> Tensor:
        """0-d, or [B] for the reduction "none"."""
        _, kl, _, stats = torch.ops.fastfuse.peer_kl_ce_fwd((prediction, *peers), None, None, *options)
        ctx.save_for_backward(stats, prediction, *peers)
        ctx.options = options
        return kl[0]

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the prediction."""
        stats, *logits = ctx.saved_tensors
        (found,) = torch.ops.fastfuse.peer_kl_ce_bwd(None, grad[None], logits, None, None, stats, [0], *ctx.options)
        return None, found, *[None for _ in logits[1:]]
