"""Every op, forward and backward, at the shapes of real training: what the kernels are compiled for.

A case takes a dtype and runs the op on CPU tensors through `backend="triton"`. Batches are small, since launch
configurations do not depend on them.
"""

import torch
from torch import Tensor

from fastfuse import functional

# (channels, height) of ResNet-32's three stages on 32x32 and of ResNet-18's four on 224x224.
CIFAR = ((16, 32), (32, 16), (64, 8))
IMAGENET = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCH = 2


def maps(shapes, dtype, *, channels_last=False, grad=True) -> list[Tensor]:
    made = [torch.randn(BATCH, c, n, n, dtype=dtype) for c, n in shapes]
    if channels_last:
        made = [x.contiguous(memory_format=torch.channels_last) for x in made]
    return [x.requires_grad_(grad) for x in made]


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(
        [x for x in outputs if x.requires_grad], [torch.ones_like(x) for x in outputs if x.requires_grad]
    )


def pairs(operator, **options):
    def both(shapes, channels_last):
        def case(dtype):
            inputs, targets = (maps(shapes, dtype, channels_last=channels_last, grad=i == 0) for i in range(2))
            backward(operator(inputs, targets, backend="triton", **options))

        return case

    return [both(shapes, last) for shapes in (CIFAR, IMAGENET) for last in (False, True)]


def students(operator, **options):
    def case_of(shape, channels_last):
        def case(dtype):
            features = maps([shape] * 2, dtype, channels_last=channels_last)
            (target,) = maps([shape], dtype, channels_last=channels_last, grad=False)
            backward(operator(features, target, backend="triton", **options))

        return case

    return [case_of(shape, last) for shape in (CIFAR[-1], IMAGENET[-1], IMAGENET[0]) for last in (False, True)]


def diversity(dtype):
    for shape in (CIFAR[-1], IMAGENET[-1]):
        (x,) = maps([shape], dtype)
        (y,) = maps([shape], dtype, grad=False)
        backward(functional.diversity_loss(x, y, backend="triton"))
        functional.diversity_target(y, backend="triton")


def heads(dtype):
    for classes in (100, 1000):
        logits = [torch.randn(8, classes, dtype=dtype, requires_grad=True) for _ in range(4)]
        found = functional.peer_kl_ce(
            logits,
            torch.zeros(8, dtype=torch.int64),
            temperature=2.0,
            teachers=[[1], [0], [functional.ENSEMBLE], [2]],
            ensemble=[0, 1],
            backend="triton",
        )
        backward(*found)
        backward(functional.peer_kl(logits[0], logits[1:2], temperature=2.0, backend="triton"))


def pointwise(dtype):
    for channels, size in (CIFAR[-1], IMAGENET[-1]):
        for last in (False, True):
            features = maps([(channels, size)] * 2, dtype, channels_last=last)
            weight = torch.randn(channels, 2 * channels, 1, 1, dtype=dtype, requires_grad=True)
            backward(functional.concat_conv1x1(features, weight, backend="triton"))


def norm(channels, dtype):
    weight, bias = (torch.ones(channels, requires_grad=True) for _ in range(2))
    return functional.BatchNorm(weight, bias, torch.zeros(channels), torch.ones(channels), True)


def fuse(dtype):
    for channels, size in (CIFAR[-1], IMAGENET[-1]):
        features = maps([(channels, size)] * 2, dtype)
        depthwise = torch.randn(2 * channels, 1, 3, 3, dtype=dtype, requires_grad=True)
        weight = torch.randn(channels, 2 * channels, 1, 1, dtype=dtype, requires_grad=True)
        norms = norm(2 * channels, dtype), norm(channels, dtype)
        found = functional.concat_fuse(features, depthwise, norms[0], weight, norms[1], backend="triton")
        backward(*found)


def transform(dtype):
    for shapes in (CIFAR, IMAGENET):
        (deep,) = maps(shapes[-1:], dtype)
        chain = [(a[0], b[0]) for a, b in zip(shapes[::-1], shapes[-2::-1], strict=False)]
        stages = [
            functional.Stage(torch.randn(i, o, 3, 3, dtype=dtype, requires_grad=True), norm(o, dtype)) for i, o in chain
        ]
        backward(*functional.deep_to_shallow(deep, stages, backend="triton"))


def images(dtype):
    pixels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        functional.augment(
            pixels,
            torch.tensor([0, 1]),
            torch.zeros(2, 2, dtype=torch.int64),
            torch.tensor([True, False]),
            mean=torch.zeros(3),
            std=torch.ones(3),
            padding=4,
            dtype=dtype,
            memory_format=memory_format,
            backend="triton",
        )


CASES = {
    "attention_mse": pairs(functional.attention_mse),
    "augment": [images],
    "concat_conv1x1": [pointwise],
    "concat_fuse": [fuse],
    "deep_to_shallow": [transform],
    "diversity_target": [diversity],
    "feature_kl": students(functional.feature_kl, temperature=2.0)
    + students(functional.feature_kl, temperature=2.0, over="channels"),
    "feature_mse": students(functional.feature_mse),
    "normalized_lp": pairs(functional.normalized_lp, p=2) + pairs(functional.normalized_lp, p=1),
    "peer_kl_ce": [heads],
}
