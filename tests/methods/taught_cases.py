"""Methods with frozen teachers, in float64."""

import torch
from torch import Tensor, nn

from fastfuse import models
from fastfuse.methods import Method, build_method
from fastfuse.nn.factor import Paraphraser
from tests.nn.stacking import untidy

CLASSES, BATCH = 6, 4
ZERO = torch.tensor(0.0)
# The teachers and options of each method that are tried.
CASES = {
    "kd": ("kd", ["resnet14"], {}),
    "kd, three teachers": ("kd", ["resnet8", "wrn10_1", "resnet8"], {"temperature": 2.5, "kd_weight": 0.6}),
    "at": ("at", ["resnet14"], {}),
    "at, a wider teacher": ("at", ["wrn10_2"], {"at_weight": 50.0}),
    "ft": ("ft", ["resnet14"], {}),
    "ft, a wider teacher": ("ft", ["wrn10_2"], {"factor_ratio": 0.25, "factor_weight": 20.0}),
    "feed-sequential": ("feed-sequential", ["resnet8"], {}),
    "feed-sequential, paraphrased": ("feed-sequential", ["resnet8"], {"factor_targets": "paraphrased"}),
    "feed-parallel": ("feed-parallel", ["resnet8"] * 5, {}),
    "feed-parallel, mean": ("feed-parallel", ["resnet8"] * 3, {"teacher_reduction": "mean"}),
    "feed-parallel, paraphrased": ("feed-parallel", ["resnet8"] * 2, {"factor_targets": "paraphrased"}),
    "feed-parallel, widths": ("feed-parallel", ["resnet8", "wrn10_2", "resnet14"], {"translator_norm": True}),
}


def batch(dtype: torch.dtype = torch.float64, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, size, size, dtype=dtype), torch.randint(CLASSES, (BATCH,))


def trained(*names: str) -> list[nn.Module]:
    return [untidy(models.build(name, CLASSES)) for name in names]


def paraphrasers(teachers: list[nn.Module], ratio: float = 0.5) -> list[dict[str, Tensor]]:
    channels = [teacher.feature_channels[-1] for teacher in teachers]
    return [Paraphraser(c, round(c * ratio)).double().state_dict() for c in channels]


def make(name: str, teachers: list[nn.Module], **options: object) -> Method:
    if name == "ft" or options.get("factor_targets") == "paraphrased":
        options.setdefault("paraphrasers", paraphrasers(teachers, options.get("factor_ratio", 0.5)))
    return build_method(
        name, model="resnet8", students=1, num_classes=CLASSES, teachers=teachers, **options
    ).double().train()  # fmt: skip
