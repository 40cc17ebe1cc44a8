import dataclasses
import math

import pytest
import torch

from fastfuse.config import TrainConfig
from fastfuse.methods import build_method
from fastfuse.train.optim import build_optimizers
from fastfuse.train.schedule import learning_rate_factor, milestones

CONFIG = TrainConfig(epochs=300)


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0, 1.0), (149, 1.0), (150, 0.1), (224, 0.1), (225, 0.01), (299, 0.01)],
    ids=["first", "150th", "151st decays", "225th", "226th decays again", "last"],
)
def test_multistep_decays_after_epochs_150_and_225_as_published(epoch, factor):
    assert learning_rate_factor(CONFIG, epoch, 390, 391) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(300, (150, 225)), (90, (45, 68)), (2, (1, 2)), (1, (1, 1))],
    ids=["cifar", "odd", "2", "1"],
)
def test_milestones_default_to_half_and_three_quarters(epochs, expected):
    assert milestones(TrainConfig(epochs=epochs)) == expected


def test_given_milestones_and_gamma_win():
    config = dataclasses.replace(CONFIG, milestones=(2, 4, 5), gamma=0.5)
    assert [learning_rate_factor(config, e, 0, 10) for e in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.125]


def test_cosine_goes_from_one_to_nearly_nothing_step_by_step():
    config = dataclasses.replace(CONFIG, schedule="cosine", epochs=10)
    factors = [learning_rate_factor(config, e, s, 5) for e in range(10) for s in range(5)]
    expected = [0.5 * (1 + math.cos(math.pi * k / 50)) for k in range(50)]
    assert factors == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["multistep", "cosine"])
def test_warmup_grows_linearly_step_by_step_as_published(schedule):
    # lr * (1 + step + epoch * len) / (5 * len) while epoch < 5
    config = dataclasses.replace(CONFIG, schedule=schedule, warmup_epochs=5, milestones=(30, 60, 80))
    for epoch, step in [(0, 0), (0, 9), (1, 0), (4, 9)]:
        full = learning_rate_factor(dataclasses.replace(config, warmup_epochs=0), epoch, step, 10)
        assert learning_rate_factor(config, epoch, step, 10) == pytest.approx(full * (1 + step + epoch * 10) / 50)
    assert learning_rate_factor(config, 5, 0, 10) == learning_rate_factor(
        dataclasses.replace(config, warmup_epochs=0), 5, 0, 10
    )


def test_every_optimizer_follows_the_factor_without_changing_the_rate_tensors():
    method = build_method("ffsd", model="resnet8", students=2, num_classes=3)
    optimizers = build_optimizers(method, lr=0.2, transform_lr=0.003)
    groups = [group for optimizer in optimizers.optimizers for group in optimizer.param_groups]
    before = [group["lr"] for group in groups]
    optimizers.set_factor(0.1)
    assert all(group["lr"] is tensor for group, tensor in zip(groups, before, strict=True))
    assert [group["lr"].item() for group in groups] == pytest.approx([0.02, 0.02, 0.02, 0.0003], rel=1e-12)


def test_optimizers_have_the_published_settings():
    method = build_method("ffsd", model="resnet8", students=2, num_classes=3)
    sgd, adam = build_optimizers(method).optimizers
    assert isinstance(sgd, torch.optim.SGD) and isinstance(adam, torch.optim.Adam)
    assert {(g["momentum"], g["nesterov"], g["weight_decay"]) for g in sgd.param_groups} == {
        (0.9, True, 1e-4),
        (0.9, True, 1e-5),
    }
    fusion = next(g for g in sgd.param_groups if g["weight_decay"] == 1e-5)
    assert {id(p) for p in fusion["params"]} == {id(p) for p in method.criterion.fusion.parameters()}
    assert [(g["lr"].item(), g["betas"], g["weight_decay"]) for g in adam.param_groups] == [(1e-3, (0.9, 0.999), 1e-4)]
