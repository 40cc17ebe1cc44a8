"""Exact counts of one training step: operations that launch work, and waits of the host for the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

# Operations without device work that the schema does not already mark as views: allocation, metadata, aliases.
WITHOUT_WORK = frozenset(
    {
        "_unsafe_view",
        "_reshape_alias",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "is_same_size",
        "set_",
        "record_stream",
        "as_strided_",
        "promote_types",
        "_record_function_enter_new",
        "_record_function_exit",
    }
)
HOST_READ = "_local_scalar_dense"


@dataclass(frozen=True)
class StepCounts:
    """What one step asked of the device.

    Attributes:
        ops: dispatched operations that do work, a lower bound of the kernels launched (one operation is one or more).
        waits: values that the host read from the device and waited for.
    """

    ops: int
    waits: int


class _Counter(TorchDispatchMode):
    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.ops = 0
        self.waits = 0
        self.in_optimizer = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name == HOST_READ:
            # torch.optim reads its own step counters and rates, which live on the host whatever the device. Where
            # the device is the host too, a read inside an optimizer is one of those: nobody waits.
            own = self.in_optimizer and self.device_type == "cpu"
            self.waits += args[0].device.type == self.device_type and not own
        elif not func.is_view and name not in WITHOUT_WORK and func.namespace != "prim":
            self.ops += 1
        return func(*args, **(kwargs or {}))


def count_step(step: Callable[[], object], *, device: torch.device) -> StepCounts:
    """Run `step` once, forward, backward and update, and count what it dispatches.

    Work replayed from a captured graph or inside a compiled region is not dispatched and therefore not seen.

    Args:
        step: the whole step.
        device: where it computes; reading a value from elsewhere is no wait.
    """
    counter = _Counter(device.type)

    def enter(*_: Any) -> None:
        counter.in_optimizer = True

    def leave(*_: Any) -> None:
        counter.in_optimizer = False

    hooks = (register_optimizer_step_pre_hook(enter), register_optimizer_step_post_hook(leave))
    try:
        with counter:
            step()
    finally:
        for hook in hooks:
            hook.remove()
    return StepCounts(ops=counter.ops, waits=counter.waits)
