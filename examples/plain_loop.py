"""FFSD as published, in a plain loop, on networks of your own: two students teach a leader, which is what you keep.

python examples/plain_loop.py
"""

from itertools import cycle, islice

import torch
from torch import nn

import fastfuse
from fastfuse.data import digits


def stage(before: int, after: int, stride: int) -> nn.Module:
    """Half the size, twice the channels: what FFSD's transforms undo."""
    convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


class Network(nn.Module):
    """Images [B, 3, H, W] to logits [B, 10]; knows nothing of distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow, self.middle, self.deep = stage(3, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.head(self.deep(self.middle(self.shallow(images))).mean(dim=(2, 3)))


def main(steps: int = 100) -> tuple[list[float], dict[str, nn.Module]]:
    """Train; the losses, and what was trained."""
    torch.manual_seed(0)
    networks = {name: Network() for name in ("student0", "student1", "leader")}
    tapped = {name: fastfuse.extract(network, ["middle", "deep"]) for name, network in networks.items()}
    criterion = fastfuse.FusionLoss([(32, 64)] * 2, num_classes=10, method="ffsd", leader_channels=(32, 64))

    groups = criterion.parameter_groups(lr=0.05)
    own = [{"params": network.parameters(), "weight_decay": 1e-4} for network in networks.values()]
    sgd = torch.optim.SGD([*own, *groups.sgd], lr=0.05, momentum=0.9, nesterov=True)
    adam = torch.optim.Adam(groups.adam)  # trains the transforms of self-distillation

    train = digits.load().train
    images = train.images.permute(0, 3, 1, 2) / 255
    pairs = torch.utils.data.TensorDataset(images, train.labels)
    loader = torch.utils.data.DataLoader(pairs, batch_size=64, shuffle=True, drop_last=True)

    losses = []
    for batch, labels in islice(cycle(loader), steps):
        outputs = {name: network(batch) for name, network in tapped.items()}
        students, leader = [outputs["student0"], outputs["student1"]], outputs["leader"]
        result = criterion(
            [student.features for student in students],
            [student.logits for student in students],
            labels,
            leader_features=leader.features,
            leader_logits=leader.logits,
        )
        sgd.zero_grad()
        adam.zero_grad()
        result.loss.backward()  # once, for students, leader, fusion head and transforms
        sgd.step()
        adam.step()
        losses.append(result.loss.item())
    return losses, {**networks, "criterion": criterion}


if __name__ == "__main__":
    losses, _ = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
