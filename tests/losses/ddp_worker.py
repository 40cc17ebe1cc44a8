"""One rank of the two-process check: gradients of the same global batch through both ways of wrapping."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastfuse import FusionLoss, models
from tests.losses import published

CLASSES, BATCH, METHODS = 5, 6, ("ffsd", "ffl")


class System(nn.Module):
    """Networks and their loss in one module, whose forward is the whole step; the first wrapping wraps this."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.networks = nn.ModuleList(models.build("resnet8", CLASSES) for _ in range(3 if method == "ffsd" else 2))
        channels = self.networks[0].feature_channels
        leader = {"leader_channels": channels} if method == "ffsd" else {}
        self.loss = FusionLoss([channels] * 2, CLASSES, method=method, feature="attention", **leader)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return step(self.networks, self.loss, images, labels)


def step(networks: list[nn.Module] | nn.ModuleList, loss: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    outputs = [network(images) for network in networks]
    leader = {}
    if len(outputs) == 3:
        leader = {"leader_features": outputs[2].features, "leader_logits": outputs[2].logits}
    students = outputs[:2]
    return loss([s.features for s in students], [s.logits for s in students], labels, **leader, progress=2).loss


def system(method: str, *, frozen: bool = True) -> System:
    """The same on every rank: float64, and norms in eval mode unless statistics of the shards are wanted."""
    torch.manual_seed(11)
    built = published.scramble(System(method).double()).train()
    for module in built.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()
    return built


def global_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    images = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


def whole(method: str) -> dict[str, Tensor | None]:
    """One wrapper around everything."""
    built = system(method)
    wrapped = DistributedDataParallel(built)
    wrapped(*shard()).backward()
    return gradients(built)


def separate(method: str, *, bypass: bool = False) -> dict[str, Tensor | None]:
    """One wrapper around each network and one around the loss; `bypass` calls the loss inside it, the control."""
    built = system(method)
    networks = [DistributedDataParallel(network) for network in built.networks]
    loss = DistributedDataParallel(built.loss)
    step(networks, loss.module if bypass else loss, *shard()).backward()
    return gradients(built)


def trained(method: str) -> dict[str, Tensor]:
    """Parameters after two steps with batch statistics, each rank on its own shard."""
    built = system(method, frozen=False)
    wrapped = DistributedDataParallel(built)
    groups = built.loss.parameter_groups()
    optimizers = [torch.optim.SGD([{"params": list(built.networks.parameters())}, *groups.sgd], lr=0.1)]
    optimizers += [torch.optim.Adam(groups.adam)] if groups.adam else []
    for _ in range(2):
        built.zero_grad()
        wrapped(*shard()).backward()
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach() for name, p in built.named_parameters()}


def shard() -> tuple[Tensor, Tensor]:
    images, labels = global_batch()
    return images.chunk(dist.get_world_size())[dist.get_rank()], labels.chunk(dist.get_world_size())[dist.get_rank()]


def work(rank: int, world: int, folder: Path) -> None:
    """Write what every way gives on this rank. The ranks meet over a file, so that no port has to be free."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = {"init_method": f"file://{folder / 'meeting'}", "timeout": timedelta(minutes=30)}
    dist.init_process_group("gloo", rank=rank, world_size=world, **meeting)
    try:
        found = {
            method: {
                "whole": whole(method),
                "separate": separate(method),
                "bypassed": separate(method, bypass=True),
                "trained": trained(method),
            }
            for method in METHODS
        }
        torch.save(found, folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
