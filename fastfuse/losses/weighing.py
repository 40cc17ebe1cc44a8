"""Terms of a loss as one vector of weighted values: a handful of launches, however many terms there are."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Weights:
    """The weight of every value, on the device of a module that lets it follow (`torch.nn.Module._apply`).

    No buffer: it is derived, so it is in no state dict, and a change of dtype back and forth loses nothing.

    Args:
        fixed: what each value weighs whatever the ramp.
        ramped: what each weighs besides, times the factor of the ramp.
    """

    def __init__(self, fixed: Sequence[float], ramped: Sequence[float]) -> None:
        self._numbers = [*fixed], [*ramped]
        self.follow(torch.empty(0))

    def follow(self, like: Tensor) -> None:
        """Go to a tensor's device, and to its dtype, float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        fixed, ramped = (torch.tensor(each, dtype=dtype, device=like.device) for each in self._numbers)
        self.fixed, self.ramped = fixed, ramped

    def at(self, factor: float | Tensor) -> Tensor:
        """All weights, [values], for a factor of the ramp, a number or 0-d."""
        if isinstance(factor, Tensor):
            return torch.addcmul(self.fixed, self.ramped, factor.to(self.ramped))
        return self.fixed + self.ramped * factor  # not as alpha: torch 2.11 would compile again for every number


class Weighed(NamedTuple):
    """`loss` (0-d), the sum of all values by their weights, and the detached 0-d `terms` by name."""

    loss: Tensor
    terms: dict[str, Tensor]


def weighed(values: Sequence[Tensor], weights: Tensor, names: Sequence[str], *, several: Sequence[str] = ()) -> Weighed:
    """The weighted sum of values, and the terms that they make up.

    Args:
        values: 1-d, one after another.
        weights: [values] of all.
        names: of the terms that are one value each; these values come first.
        several: of those that are the sums of equally many values, each of values that follow each other.
    """
    each = torch.cat(list(values)) * weights
    own = each.detach()
    terms = dict(zip(names, own[: len(names)].unbind(0), strict=True))
    if several:
        terms |= zip(several, own[len(names) :].view(len(several), -1).sum(1).unbind(0), strict=True)
    return Weighed(each.sum(), terms)


def summed(terms: Mapping[str, Tensor]) -> Weighed:
    """Of terms that are weighed already, each 0-d."""
    return Weighed(torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()})
