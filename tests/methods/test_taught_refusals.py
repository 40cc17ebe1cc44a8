"""What kd, at, ft, feed and paraphraser refuse, when they are made and at the first batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.nn.factor import Paraphraser
from tests.methods.taught_cases import CLASSES, ZERO, batch, make, trained


def small(channels: int = 64, size: int = 2) -> nn.Module:
    """A teacher whose maps have another size."""

    class Small(nn.Module):
        feature_channels = (channels,)

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 3, padding=1)

        def forward(self, x: Tensor) -> models._blocks.NetworkOutput:
            deep = F.adaptive_avg_pool2d(self.conv(x), size)
            return models._blocks.NetworkOutput(deep.mean((2, 3))[:, :CLASSES], (deep,))

    return Small()


def others() -> list[nn.Module]:
    return [models.build("resnet8", CLASSES + 1)]


@pytest.mark.parametrize(
    ("name", "teachers", "options", "said"),
    [
        ("kd", list, {}, "kd needs trained teachers and has none: name them with --teachers"),
        ("feed-parallel", list, {}, "feed-parallel needs trained teachers"),
        ("paraphraser", list, {}, "paraphraser needs trained teachers"),
        ("at", lambda: trained("resnet8", "resnet8"), {}, "at learns from 1 teacher, not 2: .*--teacher-count"),
        ("ft", lambda: trained("resnet8", "resnet8"), {}, "ft learns from 1 teacher, not 2"),
        ("feed-sequential", lambda: trained("resnet8", "resnet8"), {}, "learns from 1 teacher, not 2"),
        ("paraphraser", lambda: trained("resnet8", "resnet8"), {}, "learns from 1 teacher, not 2"),
        ("kd", lambda: trained("resnet8"), {"kd_weight": 1.5}, "--kd-weight must be between 0 and 1, not 1.5"),
        ("kd", lambda: trained("resnet8"), {"temperature": 0.0}, "--temperature must be a finite number above 0"),
        ("at", lambda: trained("resnet8"), {"at_weight": -1.0}, "--at-weight must be"),
        ("feed-parallel", lambda: trained("resnet8"), {"factor_weight": -1.0}, "--factor-weight must be"),
        ("paraphraser", lambda: trained("resnet8"), {"factor_ratio": 0.0}, "--factor-ratio must be"),
        ("paraphraser", lambda: trained("resnet8"), {"factor_ratio": 0.001}, "raise --factor-ratio"),
        ("feed-parallel", lambda: trained("resnet8"), {"factor_targets": "row"}, "--factor-targets 'row'.*raw"),
        ("feed-parallel", lambda: trained("resnet8"), {"teacher_reduction": "max"}, "--teacher-reduction 'max'"),
        ("ft", lambda: trained("resnet8"), {"paraphrasers": []}, "1 teachers with 0 paraphrasers: .*for each teacher"),
        (
            "ft",
            lambda: trained("resnet8"),
            {"paraphrasers": [Paraphraser(64, 16).state_dict()]},
            "paraphraser 0 does not fit a map of 64 channels and --factor-ratio 0.5: train it",
        ),
        (
            "feed-parallel",
            lambda: trained("resnet8"),
            {"paraphrasers": [Paraphraser(64, 32).state_dict()]},
            "--factor-targets raw uses no paraphrasers",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, teachers: Callable, options: dict, said: str):
    with pytest.raises(InputError, match=said):
        make(name, teachers(), **options)


@pytest.mark.parametrize(
    ("name", "teachers", "size", "said"),
    [
        ("kd", others, 8, "teacher 0 tells 7 classes apart and the student 6: kd compares logits"),
        ("at", lambda: [small()], 8, "maps of 1 stages and the student of 3: .*--taps as many"),
        ("at", lambda: trained("resnet18"), 32, "maps of 4 stages and the student of 3"),
        ("feed-parallel", lambda: [small(size=3)], 8, r"teacher 0 is \[3, 3\] and the student's \[2, 2\]: .*family"),
        ("ft", lambda: [small(size=3)], 8, r"teacher 0 is \[3, 3\] and the student's \[2, 2\]"),
    ],
)
def test_teachers_that_do_not_suit_are_refused_at_the_first_batch(name, teachers, size, said):
    method = make(name, teachers())
    with pytest.raises(InputError, match=said):
        method(*batch(size=size), ZERO)


def test_attention_of_other_sizes_is_refused():
    from fastfuse.losses import at

    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
    with pytest.raises(InputError, match=r"stage 2: the teacher's map is \[2, 2\] and the student's \[4, 4\]"):
        at.term(maps, [maps[0], torch.randn(2, 8, 2, 2)], at_weight=1.0)


def test_factor_transfer_does_not_compare_classes():
    method = make("feed-parallel", others())
    assert method(*batch(), ZERO).loss.isfinite()
