"""The losses of ONE (Lan et al., arXiv 1806.04606), as the published program computes them."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse import functional
from fastfuse.losses.ramps import sigmoid_rampup

DEFAULTS = {"temperature": 3.0, "rampup_epochs": 80, "kl_target_epsilon": 0.0}


def terms(
    logits: Sequence[Tensor],
    gated: Tensor,
    labels: Tensor,
    *,
    progress: float | Tensor | None = None,
    temperature: float = DEFAULTS["temperature"],
    rampup_epochs: float = DEFAULTS["rampup_epochs"],
    kl_target_epsilon: float = DEFAULTS["kl_target_epsilon"],
) -> dict[str, Tensor]:
    """CE of every branch and of the gated ensemble, and what every branch learns from that.

    Args:
        logits: of each branch, [B, K].
        gated: z_e [B, K]; as a teacher it is constant, its own cross-entropy trains gate and branches.
        labels: [B] int64.
        progress: epochs done so far, for the ramp of the KL terms; None takes their whole weight.
        temperature: T.
        rampup_epochs: length of the ramp; 0 switches it off.
        kl_target_epsilon: added to the targets' probabilities (the program adds 1e-7).

    Returns:
        0-d terms as they enter the sum: student{i}_ce, student{i}_kl, gated_ce.
    """
    count = len(logits)
    cross_entropy, divergence, _ = functional.peer_kl_ce(
        [*logits, gated],
        labels,
        temperature=temperature,
        teachers=[[count]] * count + [[]],
        target_epsilon=kl_target_epsilon,
    )
    weight = 1.0 if progress is None else sigmoid_rampup(progress, rampup_epochs)
    *own, of_gated = cross_entropy.unbind(0)
    *divergences, _ = (weight * divergence).unbind(0)
    found = {}
    for i, (single, shared) in enumerate(zip(own, divergences, strict=True)):
        found[f"student{i}_ce"] = single
        found[f"student{i}_kl"] = shared
    return found | {"gated_ce": of_gated}
