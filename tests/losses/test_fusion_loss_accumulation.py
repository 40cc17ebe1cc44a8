"""Micro-batches: every term is a mean over samples, so that gradients of parts add up to those of the whole."""

import pytest
import torch
from torch import nn

from fastfuse import FusionLoss, models
from tests.losses import batches, published

PARTS = 4
BOUND = 1e-10


def frozen(module: nn.Module) -> nn.Module:
    """Batch norms in eval mode, so that no sample sees the others of its batch."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return module


def system(method: str, feature: str | None) -> tuple[nn.ModuleList, FusionLoss]:
    """Students (and a leader for ffsd, last) with their loss, in float64 with frozen norms."""
    networks = nn.ModuleList(models.build("resnet8", batches.CLASSES) for _ in range(3 if method == "ffsd" else 2))
    channels = networks[0].feature_channels
    if method == "ffsd":
        loss = FusionLoss([channels] * 2, batches.CLASSES, leader_channels=channels, feature=feature)
    else:
        loss = FusionLoss([channels[-1]] * 2, batches.CLASSES, method="ffl", feature=feature)
    return frozen(published.scramble(networks.double().train())), frozen(published.scramble(loss.double().train()))


def total(networks: nn.ModuleList, loss: FusionLoss, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    outputs = [network(images) for network in networks]
    logits = [output.logits for output in outputs[:2]]
    if loss.method == "ffl":
        return loss([output.features[-1] for output in outputs], logits, labels, progress=10).loss
    leader = {"leader_features": outputs[2].features, "leader_logits": outputs[2].logits}
    return loss([output.features for output in outputs[:2]], logits, labels, **leader, progress=2).loss


@pytest.mark.parametrize("feature", [None, "attention", "mse", "kl"])
@pytest.mark.parametrize("method", ["ffsd", "ffl"])
def test_micro_batches_equal_the_large_batch(method: str, feature: str | None) -> None:
    networks, loss = system(method, feature)
    everything = nn.ModuleDict({"networks": networks, "loss": loss})
    images = torch.randn(2 * PARTS, 3, 8, 8, dtype=torch.float64)
    labels = torch.randint(batches.CLASSES, (2 * PARTS,))

    whole = total(networks, loss, images, labels)
    whole.backward()
    wanted = {name: p.grad for name, p in everything.named_parameters()}
    everything.zero_grad()
    accumulated = 0.0
    for x, y in zip(images.chunk(PARTS), labels.chunk(PARTS), strict=True):
        part = total(networks, loss, x, y) / PARTS
        part.backward()
        accumulated += part.item()

    assert accumulated == pytest.approx(whole.item(), rel=BOUND)
    assert all(gradient is not None and gradient.any() for gradient in wanted.values())
    assert batches.differing({name: p.grad for name, p in everything.named_parameters()}, wanted, BOUND) == {}
