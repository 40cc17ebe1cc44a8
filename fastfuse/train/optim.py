"""The combined update: SGD for networks and fusion head, Adam for transforms."""

import warnings
from typing import Any

import torch
from torch import Tensor

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

    Learning rates are parts of one device vector written in place, so that a change needs no host wait, no
    recompilation and no new capture.

    Args:
        method: names the parameters, and says what a parameter of stacked networks is made of.
        optimizers: fused ones; each parameter belongs to exactly one.
        clip_norm: gradients are scaled down so that their norm over all parameters together is at most this.
        skip_bad: a gradient that is not finite leaves everything as it was; with a gradient scaler it always does.

    Attributes:
        bad: 0-d float32, above 0 if the last step had such a gradient; None where nobody looks.
    """

    def __init__(
        self,
        method: Method,
        optimizers: list[torch.optim.Optimizer],
        *,
        clip_norm: float | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.method = method
        self.optimizers = optimizers
        self.clip_norm, self.skip_bad = clip_norm, skip_bad
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        parameter = self._parameters[0]
        self.bad = torch.zeros((), device=parameter.device) if skip_bad else None
        self._one = torch.ones((), device=parameter.device)
        # The fused CUDA kernels read a float32 scalar; on the CPU float64 keeps the rate exact.
        dtype = torch.float32 if parameter.is_cuda else torch.float64
        self.initial = torch.tensor([float(g["lr"]) for g in groups], dtype=dtype, device=parameter.device)
        self.rates = self.initial.clone()
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate

    def create_state(self) -> None:
        """Make all state now, as zeros, where otherwise the first step would: a captured step must find it in place.

        Exact: with a momentum of zero a first update is what it would be without one. An optimizer that has taken a
        step keeps its state.
        """
        fresh = [optimizer for optimizer in self.optimizers if not optimizer.state]
        rates = self.rates.clone()
        self.rates.zero_()
        for optimizer in fresh:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            with warnings.catch_warnings():  # once: of a step outside of a capture, which is meant to be one
                warnings.filterwarnings("ignore", ".*capturable=True")
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.rates.copy_(rates)

    def set_factor(self, factor: float | Tensor) -> None:
        """Every learning rate becomes its initial value times the factor, a number or a 0-d device tensor."""
        torch.mul(self.initial, factor, out=self.rates)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """One update of everything; through the gradient scaler if there is one."""
        if scaler is not None:
            scaler._per_optimizer_states.clear()  # a capture that failed half-way leaves its own behind
            for optimizer in self.optimizers:
                scaler.unscale_(optimizer)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.clip_norm, foreach=True)
        if scaler is None:
            self._step()
        else:
            self._step_scaled(scaler)

    def _step_scaled(self, scaler: torch.amp.GradScaler) -> None:
        # The scaler looks at each optimizer alone: one would take its step where the other leaves it out.
        flags = [flag for optimizer in self.optimizers for flag in scaler._found_inf_per_device(optimizer).values()]
        found = torch.stack(flags).amax()  # 1 and no more: what the fused kernels look for
        for flag in flags:
            flag.copy_(found)
        for optimizer in self.optimizers:
            scaler.step(optimizer)
        if self.bad is not None:
            self.bad.copy_(found)
        scaler.update()

    def _step(self) -> None:
        if self.bad is not None:
            # What a gradient scaler does, with a scale of one.
            self.bad.zero_()
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.bad, self._one)
        fused: list[Any] = self.optimizers  # which look at the flag on the device
        for optimizer in fused:
            optimizer.grad_scale, optimizer.found_inf = None, self.bad
            optimizer.step()

    def state_dict(self) -> list[dict[str, dict[str, Tensor]]]:
        """The state of each optimizer by parameter, as of networks that stand alone, however they are run."""
        found: list[dict[str, dict[str, Tensor]]] = []
        for optimizer, names in zip(self.optimizers, self._names(), strict=True):
            own: dict[str, dict[str, Tensor]] = {}
            for parameter, name in names.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    for part, tensor in self.method.split(name, value).items():
                        own.setdefault(part, {})[key] = tensor
            found.append(own)
        return found

    @torch.no_grad()
    def load_state_dict(self, states: list[dict[str, dict[str, Tensor]]]) -> None:
        """Restore what `state_dict` gave, into the memory that `create_state` made.

        Raises:
            KeyError: the state of a parameter is missing.
        """
        for optimizer, names, state in zip(self.optimizers, self._names(), states, strict=True):
            for parameter, name in names.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    value.copy_(self.method.join(name, {part: own[key] for part, own in state.items() if key in own}))

    def _names(self) -> list[dict[torch.nn.Parameter, str]]:
        known = {parameter: name for name, parameter in self.method.named_parameters()}
        return [
            {parameter: known[parameter] for group in optimizer.param_groups for parameter in group["params"]}
            for optimizer in self.optimizers
        ]

    def tensors(self) -> list[Tensor]:
        """Everything that an update reads or writes besides parameters and gradients."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        bad = [] if self.bad is None else [self.bad]
        return [self.rates, *bad, *(value for state in states for value in state.values())]


def build_optimizers(
    method: Method, *, clip_norm: float | None = None, skip_bad: bool = False, **settings: Any
) -> Optimizers:
    """The published optimizers of a method.

    Args:
        method: gives its parameters in groups.
        clip_norm, skip_bad: see `Optimizers`.
        settings: what differs from `SETTINGS`.
    """
    groups = method.parameter_groups(**{**SETTINGS, **settings})
    # fused: one kernel per group of tensors, a learning rate on the device, loss scaling without a host wait.
    built: list[torch.optim.Optimizer] = [torch.optim.SGD(groups.sgd, lr=SETTINGS["lr"], fused=True)]
    if groups.adam:
        # capturable: without it Adam refuses to be captured, though the fused kernel is the same.
        built.append(torch.optim.Adam(groups.adam, fused=True, capturable=True))
    return Optimizers(method, built, clip_norm=clip_norm, skip_bad=skip_bad)
