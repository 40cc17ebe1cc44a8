"""The combined update: SGD for networks and fusion head, Adam for transforms."""

from typing import Any

import torch
from torch import nn

from fastfuse.methods.base import Method

SETTINGS = {
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "fusion_weight_decay": 1e-5,
    "transform_lr": 1e-3,
    "transform_weight_decay": 1e-4,
}


class Optimizers:
    """The optimizers of a step as one.

    Learning rates are device scalars written in place, so that a change needs no host wait and no recompilation.

    Args:
        optimizers: each parameter belongs to exactly one.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self._base = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _device_scalar(group["lr"], group["params"][0])

    def set_factor(self, factor: float) -> None:
        """Every learning rate becomes its initial value times the factor."""
        for optimizer, base in zip(self.optimizers, self._base, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"].fill_(lr * factor)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """One update of everything; through the gradient scaler if there is one."""
        for optimizer in self.optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each optimizer."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what `state_dict` gave, keeping the learning rates' own tensors."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            scalars = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, scalar in zip(optimizer.param_groups, scalars, strict=True):
                scalar.copy_(torch.as_tensor(group["lr"]))
                group["lr"] = scalar


def build_optimizers(method: Method, **settings: Any) -> Optimizers:
    """The published optimizers of a method.

    Args:
        method: gives its parameters in groups.
        settings: what differs from `SETTINGS`.
    """
    groups = method.parameter_groups(**{**SETTINGS, **settings})
    # fused: one kernel per group of tensors, a learning rate on the device, loss scaling without a host wait.
    built: list[torch.optim.Optimizer] = [torch.optim.SGD(groups.sgd, lr=SETTINGS["lr"], fused=True)]
    if groups.adam:
        built.append(torch.optim.Adam(groups.adam, fused=True))
    return Optimizers(built)


def _device_scalar(value: float, parameter: nn.Parameter) -> torch.Tensor:
    # The fused CUDA kernels read a float32 scalar; on the CPU float64 keeps the rate exact.
    dtype = torch.float32 if parameter.is_cuda else torch.float64
    return torch.tensor(float(value), dtype=dtype, device=parameter.device)
