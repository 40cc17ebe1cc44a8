"""One training step: forward, one backward over the sum of all losses, one combined update."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from fastfuse.methods.base import Method, MethodOutput
from fastfuse.train.optim import Optimizers

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Runs a method's step; nothing in it waits for the device, and all that lives on stays at its address.

    Args:
        method: in training mode.
        optimizers: over all its parameters.
        amp: "off", "bf16", or "fp16" (with gradient scaling).
        channels_last: memory format of convolution weights and, through them, of all maps. On a CPU a ResNet-32 step
            takes 0.78 of the time (docs/LOG.md), and augmented batches come in this format without a copy.
        compiled: whether torch.compile takes forward and backward.
    """

    def __init__(
        self,
        method: Method,
        optimizers: Optimizers,
        *,
        amp: str = "off",
        channels_last: bool = True,
        compiled: bool = False,
    ) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.method = method.to(memory_format=self.memory_format)
        self.optimizers = optimizers
        optimizers.create_state()
        self.amp_dtype = AMP_DTYPES[amp]
        device = next(method.parameters()).device
        self.device_type = device.type
        self.scaler = torch.amp.GradScaler(self.device_type) if amp == "fp16" else None
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=device))  # makes the scale, which otherwise the first step would
        self._forward = _compiled(method) if compiled else method

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
        images = images.contiguous(memory_format=self.memory_format)
        with self.autocast():
            output = self._forward(images, labels, progress)
        loss = output.loss if self.scaler is None else self.scaler.scale(output.loss)
        loss.backward()
        self.optimizers.step(self.scaler)
        return output

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes and that lives on."""
        scaler = [] if self.scaler is None else [self.scaler._scale, self.scaler._growth_tracker]
        return [*self.method.parameters(), *self.method.buffers(), *self.optimizers.tensors(), *scaler]


def _compiled(method: Method) -> Callable[..., MethodOutput]:
    # Every run of a process compiles the same forward for networks of its own, and twice where the last batch is
    # smaller: the compiler's limit of eight is one for all of them.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 256)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 1024)
    return torch.compile(method, dynamic=False, fullgraph=True)
