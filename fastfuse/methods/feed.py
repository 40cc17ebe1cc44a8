"""FEED: Factor Transfer from several teachers at once or one after another (Park and Kwak, arXiv 1909.10754)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastfuse.losses import feed
from fastfuse.methods.factor_transfer import FactorTransfer


class FeedSequential(FactorTransfer):
    """One stage of sFEED: Factor Transfer from one teacher, the student of the stage before.

    Args:
        make_networks, num_classes, teachers, hyperparameters: see `FactorTransfer`; targets are raw without a word.
    """

    name = "feed-sequential"
    defaults = feed.SEQUENTIAL_DEFAULTS

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        factor_targets: str = "raw",
        **hyperparameters: Any,
    ) -> None:
        super().__init__(make_networks, num_classes, factor_targets=factor_targets, **hyperparameters)


class FeedParallel(FeedSequential):
    """pFEED: a translator for each of N teachers, and the sum of their terms.

    Args:
        make_networks, num_classes, hyperparameters: see `FactorTransfer`.
    """

    name = "feed-parallel"
    teacher_count = 5
    maximum_teachers = None
    defaults = feed.PARALLEL_DEFAULTS
