"""FFL as a task of timm, whose one optimizer is enough for one map a student. Labels are classes: leave mixup out."""

from typing import Any

import timm
import torch
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

import fastfuse
from fastfuse.data import digits


class Together(nn.Module):
    """Students and loss as one module, so that one wrapper serves all of them."""

    def __init__(self, networks: list[nn.Module], tap: str, channels: list[int], num_classes: int) -> None:
        super().__init__()
        self.students = nn.ModuleList([fastfuse.extract(network, [tap]) for network in networks])
        self.criterion = fastfuse.FusionLoss(channels, num_classes, method="ffl", rampup_epochs=0)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, the kept network's logits, and all terms."""
        outputs = [student(images) for student in self.students]
        features = [output.features[0] for output in outputs]
        result = self.criterion(features, [output.logits for output in outputs], labels)
        return {"loss": result.loss, "output": outputs[0].logits, **result.terms}


class FusionTask(TrainingTask):
    """In place of ClassificationTask; validation sees the first student alone."""

    def __init__(self, module: Together, **options: Any) -> None:
        super().__init__(**options)
        self.trainable_module: nn.Module = module.to(self.device)

    def prepare_distributed(self, device_ids: list[int] | None = None, **options: Any) -> "FusionTask":
        """One wrapper around everything that learns."""
        self.trainable_module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids, **options)
        return self

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module:
        """The plain network, as it is deployed."""
        return unwrap_model(module or self.get_trainable_module(ema=ema)).students[0].network

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """All that a resumed run needs."""
        return unwrap_model(self.get_trainable_module(ema=ema)).state_dict()

    def load_task_state(self, state: Any, strict: bool = True, module: Any = None, ema: bool = False) -> None:
        """The other way."""
        unwrap_model(self.get_trainable_module(ema=ema)).load_state_dict(state, strict=strict)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One batch."""
        return self.trainable_module(input, target)


def main(steps: int = 30) -> tuple[list[float], dict[str, nn.Module]]:
    """Train; the losses, and what was trained."""
    torch.manual_seed(0)
    task = FusionTask(Together([timm.create_model("resnet10t", num_classes=10) for _ in "ab"], "layer3", [256] * 2, 10))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.02, momentum=0.9)
    train, losses = digits.load().train, []
    images = nn.functional.interpolate(train.images.permute(0, 3, 1, 2) / 255, scale_factor=2)
    for chosen in torch.randint(len(images), (steps, 32)):
        result = task(images[chosen], train.labels[chosen])
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result["loss"].item())
    return losses, {"task": task, "kept": task.get_eval_model()}


if __name__ == "__main__":
    losses, _ = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
