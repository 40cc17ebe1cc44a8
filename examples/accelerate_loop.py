"""FFSD with Hugging Face Accelerate: the same file on a CPU, a GPU, or several.

accelerate launch examples/accelerate_loop.py        # or plain python
"""

from itertools import cycle, islice

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import fastfuse
from fastfuse.data import digits


def main(steps: int = 60) -> tuple[list[float], dict[str, nn.Module]]:
    """Train; the losses, and what was trained."""
    set_seed(0)
    accelerator = Accelerator()
    networks = [ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10) for _ in range(2)]
    # Tapped first and prepared after: hooks inside a wrapped network would be refused.
    students = [fastfuse.extract(network, ["layer2", "layer3"]) for network in networks]
    criterion = fastfuse.FusionLoss([(128, 256)] * 2, num_classes=10, method="ffsd")

    groups = criterion.parameter_groups(lr=0.02)
    own = [{"params": network.parameters(), "weight_decay": 1e-4} for network in networks]
    sgd = torch.optim.SGD([*own, *groups.sgd], lr=0.02, momentum=0.9, nesterov=True)
    adam = torch.optim.Adam(groups.adam)

    train = digits.load().train
    images = nn.functional.interpolate(train.images.permute(0, 3, 1, 2) / 255, scale_factor=2)
    pairs = torch.utils.data.TensorDataset(images, train.labels)
    loader = torch.utils.data.DataLoader(pairs, batch_size=32, shuffle=True, drop_last=True)

    # The criterion has weights of its own: it is prepared like a network.
    loader, sgd, adam, loss, *calls = accelerator.prepare(loader, sgd, adam, criterion, *students)

    losses = []
    for batch, labels in islice(cycle(loader), steps):
        outputs = [student(batch) for student in calls]
        features = [output.features for output in outputs]
        result = loss(features, [output.logits for output in outputs], labels)
        sgd.zero_grad()
        adam.zero_grad()
        accelerator.backward(result.loss)
        sgd.step()
        adam.step()
        losses.append(result.loss.item())
    return losses, {"student0": networks[0], "student1": networks[1], "criterion": criterion}


if __name__ == "__main__":
    losses, _ = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
