"""The learning rate as a pure function of the position in the run: there is no scheduler state to save."""

import math

from fastfuse.config import TrainConfig


def milestones(config: TrainConfig) -> tuple[int, ...]:
    """Decay epochs; without a word from the user, 50 % and 75 % of the run."""
    if config.milestones is not None:
        return config.milestones
    # A run of very few epochs may have both at the same epoch: it then decays twice there.
    return (math.ceil(config.epochs * 0.5), math.ceil(config.epochs * 0.75))


def learning_rate_factor(config: TrainConfig, epoch: int, step: int, steps_per_epoch: int) -> float:
    """What every initial learning rate is multiplied by.

    Args:
        config: schedule, milestones, gamma, warm-up and epochs.
        epoch: epochs done, 0 in the first.
        step: steps done in this epoch.
        steps_per_epoch: number of batches.
    """
    done = epoch + step / steps_per_epoch
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * done / config.epochs))
    else:
        factor = config.gamma ** sum(epoch >= m for m in milestones(config))
    if done < config.warmup_epochs:
        factor *= (epoch * steps_per_epoch + step + 1) / (config.warmup_epochs * steps_per_epoch)
    return min(factor, 1.0)
