"""One training step: forward, one backward over the sum of all losses, one combined update."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastfuse.methods.base import Method, MethodOutput
from fastfuse.nn import Networks, Teachers
from fastfuse.nn.sync_norm import synchronise
from fastfuse.train.buffers import Buffers
from fastfuse.train.distributed import ALONE, Processes, wrapped
from fastfuse.train.micro import Micro, plan, taken
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
        graphed: steps are to be captured; says of several processes where their wrapper is made.
        accumulate: forwards and backwards of a step, one after another, among which a process divides its images.
        processes: those that train together: each is given its rows of the batch, gradients are those of the whole.
        sync_batchnorm: of several processes, batch statistics are those of all; not together with `compiled`.

    Attributes:
        stream: where a step must be warmed up and captured; None: anywhere.
    """

    def __init__(
        self,
        method: Method,
        optimizers: Optimizers,
        *,
        amp: str = "off",
        channels_last: bool = True,
        compiled: bool = False,
        graphed: bool = False,
        accumulate: int = 1,
        processes: Processes = ALONE,
        sync_batchnorm: bool = False,
    ) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        movable: Any = method  # the types of older releases leave the memory format out
        self.method: Method = movable.to(memory_format=self.memory_format)
        self.optimizers = optimizers
        optimizers.create_state()
        self.amp_dtype = AMP_DTYPES[amp]
        device = next(method.parameters()).device
        self.device_type = device.type
        self.scaler = torch.amp.GradScaler(self.device_type) if amp == "fp16" else None
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=device))  # makes the scale, which otherwise the first step would
        self.accumulate, self.processes, self.share = accumulate, processes, processes.share
        together = processes.count > 1
        for networks in method.modules():
            if isinstance(networks, Networks):  # of several processes gradients travel as they arise
                networks.casts_together = not together
            if isinstance(networks, Networks | Teachers) and self.amp_dtype is not None:
                networks.cast_layers()
        self._across = synchronise(method) if together and sync_batchnorm else None
        self._forward: Any = _compiled(method) if compiled else method
        self.stream = torch.cuda.Stream() if together and graphed else None
        if together:
            self._forward = wrapped(self._forward, synchronised=sync_batchnorm, stream=self.stream)

    def autocast(self) -> torch.autocast | nullcontext:
        """The context that networks run in, also for evaluation."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.amp_dtype)

    def __call__(self, images: Tensor, labels: Tensor, progress: Tensor, count: int | None = None) -> MethodOutput:
        """Train on one batch.

        Args:
            images: [B, 3, H, W], of several processes this one's rows, see `Share.drawn`; labels: [B] int64.
            progress: 0-d, see `Method.forward`.
            count: images in the whole batch; None: B.

        Returns:
            What the method gave; of several processes, the means over this one's images; of several forwards, the
            means over all of them without logits.
        """
        self.optimizers.zero_grad()
        before = None if self.optimizers.bad is None else Buffers(self.method)
        images = images.contiguous(memory_format=self.memory_format)
        if self.accumulate == 1 and self.share.processes == 1:
            output = self._backward(images, labels, progress)
        else:
            output = self._in_parts(images, labels, progress, images.shape[0] if count is None else count)
        self.optimizers.step(self.scaler)
        if before is not None and self.optimizers.bad is not None:
            before.put_back(self.optimizers.bad)
        return output

    def own(self, count: int) -> int:
        """How many images of a batch of `count` count for this process."""
        parts = self.method.image_parts
        return parts * self.share.own(count // parts)

    def _backward(self, images: Tensor, labels: Tensor, progress: Tensor, weight: float | None = None) -> MethodOutput:
        with self.autocast():
            output = self._forward(images, labels, progress)
        loss = output.loss if weight is None else output.loss * weight
        if self.optimizers.bad is not None:
            # Times one, or times NaN: a loss that is not finite has no finite gradient then, in any process.
            loss = loss * (output.loss.detach() * 0 + 1)
        loss = loss if self.scaler is None else self.scaler.scale(loss)
        loss.backward()
        return output

    def _in_parts(self, images: Tensor, labels: Tensor, progress: Tensor, count: int) -> MethodOutput:
        """Forward and backward of every part of a batch, the gradients of all processes joined in the last one."""
        parts = self.method.image_parts
        micros = plan(count, self.share, accumulate=self.accumulate, parts=parts)
        outputs = []
        for micro in micros:
            if self._across is not None:
                self._across.counted = micro.weight > 0
            own = taken(images, labels, micro, parts=parts)
            wait = self.share.processes > 1 and micro is not micros[-1]
            with self._forward.no_sync() if wait else nullcontext():
                outputs.append(self._backward(*own, progress, micro.weight))
        return outputs[0] if len(outputs) == 1 else _mean(outputs, micros)

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes and that lives on."""
        scaler: list[Any] = [] if self.scaler is None else [self.scaler._scale, self.scaler._growth_tracker]
        return [*self.method.parameters(), *self.method.buffers(), *self.optimizers.tensors(), *scaler]


def _mean(outputs: Sequence[MethodOutput], micros: Sequence[Micro]) -> MethodOutput:
    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([x.detach() * micro.share for x, micro in zip(values, micros, strict=True)]).sum(0)

    terms = {name: mean([output.terms[name] for output in outputs]) for name in outputs[0].terms}
    return MethodOutput(mean([output.loss for output in outputs]), {}, terms)


def _compiled(method: Method) -> Any:
    # Every run of a process compiles the same forward for networks of its own, and twice where the last batch is
    # smaller: the compiler's limit of eight is one for all of them.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 256)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 1024)
    # Below DistributedDataParallel it would cut the graph where gradients' buckets end, so that their all-reduces begin
    # before the backward ends. Wrong gradients were seen once with it (docs/LOG.md, 2026-11-21): in one piece until it
    # is understood.
    limits.optimize_ddp = False
    return torch.compile(method, dynamic=False, fullgraph=True)
