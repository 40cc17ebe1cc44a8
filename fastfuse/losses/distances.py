"""Single losses as modules, in torch's conventions: prediction first, target second, `reduction=`."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastfuse import functional


class AttentionLoss(nn.Module):
    """Squared distance of L2-normalised attention maps (FFSD); see `fastfuse.functional.attention_mse`.

    The target is detached; no weight, no temperature, no cross-entropy is added.

    Args:
        reduction: over samples: "mean", "sum" or "none".
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[B, C, H, W] maps (channels may differ) or ready attention maps [B, H, W] to 0-d, or [B] for "none"."""
        return functional.attention_mse(prediction, target.detach(), reduction=self.reduction)


class NormalizedLpLoss(nn.Module):
    """Mean |x/|x| - y/|y||^p over each sample (FFSD p = 2, Factor Transfer and FEED p = 1); the target is detached.

    Args:
        p: 1 or 2.
        reduction: over samples: "mean", "sum" or "none".
    """

    def __init__(self, *, p: int = 2, reduction: str = "mean") -> None:
        super().__init__()
        self.p = p
        self.reduction = reduction

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Two tensors [B, ...] of one shape to 0-d, or [B] for "none"."""
        return functional.normalized_lp(prediction, target.detach(), p=self.p, reduction=self.reduction)


class PeerDistillationLoss(nn.Module):
    """Temperature KL from one or several peers: T^2 mean_j KL(softmax(z_j / T) || softmax(z / T)); peers are detached.

    There is no cross-entropy in it. Source: deep mutual learning (arXiv 1706.00384), FFSD (arXiv 2103.14473).

    Args:
        temperature: T > 0; has no default, since methods differ.
        reduction: over samples: "mean", "sum" or "none".
    """

    def __init__(self, *, temperature: float, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, prediction: Tensor, target: Tensor | Sequence[Tensor]) -> Tensor:
        """Logits [B, K] and one peer's [B, K], a stack [P, B, K] or a list, to 0-d, or [B] for "none"."""
        peers = list(target.unbind(0)) if isinstance(target, Tensor) and target.dim() == 3 else target
        peers = [peers] if isinstance(peers, Tensor) else list(peers)
        return functional.peer_kl(prediction, peers, temperature=self.temperature, reduction=self.reduction)
