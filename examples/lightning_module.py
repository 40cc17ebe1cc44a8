"""FFSD as a LightningModule. Its two optimizers step together, hence manual optimisation.

python examples/lightning_module.py
"""

from typing import Any

import lightning
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import fastfuse
from fastfuse.data import digits


class Fusion(lightning.LightningModule):
    """Two students with their fused head; `networks[0]` is what you keep."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr = lr
        self.networks = nn.ModuleList([ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10) for _ in range(2)])
        self.students = [fastfuse.extract(network, ["layer2", "layer3"]) for network in self.networks]
        self.criterion = fastfuse.FusionLoss([(128, 256)] * 2, num_classes=10, method="ffsd")
        self.losses: list[float] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """SGD for networks and fusion head, Adam for the transforms."""
        groups = self.criterion.parameter_groups(lr=self.lr)
        own = {"params": list(self.networks.parameters()), "weight_decay": 1e-4}
        sgd = torch.optim.SGD([own, *groups.sgd], lr=self.lr, momentum=0.9, nesterov=True)
        return [sgd, torch.optim.Adam(groups.adam)]

    def training_step(self, batch: Any, index: int) -> None:
        """One backward, then both optimizers."""
        images, labels = batch
        outputs = [student(images) for student in self.students]
        features = [output.features for output in outputs]
        logits = [output.logits for output in outputs]
        result = self.criterion(features, logits, labels, progress=float(self.current_epoch))  # for the ramp-ups
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(result.loss)
        for optimizer in optimizers:
            optimizer.step()
        self.log_dict(result.terms)
        self.losses.append(result.loss.item())


def main(steps: int = 40) -> tuple[list[float], dict[str, nn.Module]]:
    """Train; the losses, and what was trained."""
    torch.manual_seed(0)
    train = digits.load().train
    images = nn.functional.interpolate(train.images.permute(0, 3, 1, 2) / 255, scale_factor=2)
    pairs = torch.utils.data.TensorDataset(images, train.labels)
    module = Fusion()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    # Not max_steps: it counts the steps of both optimizers.
    trainer = lightning.Trainer(max_epochs=1, limit_train_batches=steps, enable_model_summary=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(pairs, batch_size=32, shuffle=True, drop_last=True))
    return module.losses, {"networks": module.networks, "criterion": module.criterion}


if __name__ == "__main__":
    losses, _ = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
