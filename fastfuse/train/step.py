"""One training step: forward, one backward over the sum of all losses, one combined update."""

from contextlib import nullcontext

import torch
from torch import Tensor

from fastfuse.methods.base import Method, MethodOutput
from fastfuse.train.optim import Optimizers

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Runs a method's step; nothing in it waits for the device.

    Args:
        method: in training mode.
        optimizers: over all its parameters.
        amp: "off", "bf16", or "fp16" (with gradient scaling).
    """

    def __init__(self, method: Method, optimizers: Optimizers, *, amp: str = "off") -> None:
        self.method = method
        self.optimizers = optimizers
        self.amp_dtype = AMP_DTYPES[amp]
        self.device_type = next(method.parameters()).device.type
        self.scaler = torch.amp.GradScaler(self.device_type) if amp == "fp16" else None

    def autocast(self) -> torch.autocast | nullcontext:
        """The context that networks run in, also for evaluation."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.amp_dtype)

    def __call__(self, images: Tensor, labels: Tensor, progress: Tensor) -> MethodOutput:
        """Train on one batch.

        Args:
            images: [B, 3, H, W]; labels: [B] int64; progress: 0-d, see `Method.forward`.
        """
        self.optimizers.zero_grad()
        with self.autocast():
            output = self.method(images, labels, progress)
        loss = output.loss if self.scaler is None else self.scaler.scale(output.loss)
        loss.backward()
        self.optimizers.step(self.scaler)
        return output
