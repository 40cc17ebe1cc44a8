"""Tensors at the shapes of real training, and the operators called on them: what kernel_cases.py is made of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse import functional

Call = Callable[[Sequence[Tensor], str], Tensor | tuple[Tensor, ...]]


def normal(shape: Sequence[int], device: torch.device, dtype: torch.dtype, gradient: bool) -> Tensor:
    """Random normal numbers."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_(gradient)


def maps(shapes: Sequence[tuple[int, int]], batch: int, channels_last: bool, *, gradients: int) -> Callable:
    """Feature maps, rectified as networks give them; the first ones require gradients."""

    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        made = [torch.randn(batch, c, n, n, device=device).relu().to(dtype) for c, n in shapes]
        if channels_last:
            made = [x.contiguous(memory_format=torch.channels_last) for x in made]
        return [x.requires_grad_(i < gradients) for i, x in enumerate(made)]

    return make


def with_weight(shape: tuple[int, int], students: int, batch: int, channels_last: bool) -> Callable:
    """Students' maps and the weight of a 1x1 product of them."""
    given = maps([shape] * students, batch, channels_last, gradients=students)
    weight = (shape[0], students * shape[0], 1, 1)
    return lambda device, dtype: [*given(device, dtype), normal(weight, device, dtype, True)]


def product(tensors: Sequence[Tensor], backend: str) -> Tensor:
    """The 1x1 product of maps."""
    return functional.concat_conv1x1(tensors[:-1], tensors[-1], backend=backend)


def stacked_weight(
    shape: tuple[int, int], outputs: int, kernel: int, networks: int, batch: int, channels_last: bool
) -> Callable:
    """The stacked map of several networks, and the weight of a convolution of each."""
    given = maps([(networks * shape[0], shape[1])], batch, channels_last, gradients=1)
    size = networks * outputs, shape[0], kernel, kernel
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        weight = normal(size, device, dtype, False).contiguous(memory_format=memory_format)
        return [*given(device, dtype), weight.requires_grad_()]

    return make


def convolution(networks: int, stride: int) -> Call:
    """Convolutions of networks side by side."""
    return lambda t, backend: functional.grouped_conv(t[0], t[1], groups=networks, stride=stride, backend=backend)


def affine(shape: tuple[int, int], students: int, batch: int, channels_last: bool) -> Callable:
    """Students' maps, the weight of a 1x1 product of them, and what a norm does to their channels."""
    given = with_weight(shape, students, batch, channels_last)
    return lambda device, dtype: [*given(device, dtype), *norm(students * shape[0], device)[:2]]


def affine_product(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    """The 1x1 product of maps that a norm and a ReLU are applied to, and the statistics of the next norm."""
    *maps, weight, scale, shift = tensors
    return functional.concat_conv1x1(maps, weight, scale=scale, shift=shift, statistics=True, backend=backend)[:3]


def aggregate(shape: tuple[int, int], count: int, batch: int, channels_last: bool) -> Callable:
    """A student's map, frozen teacher maps, and their weights."""
    given = maps([shape] * (count + 1), batch, channels_last, gradients=1)
    return lambda device, dtype: [
        *given(device, dtype),
        torch.rand(count, device=device).softmax(0).requires_grad_(),
    ]


def norm(channels: int, device: torch.device) -> list[Tensor]:
    """Weight, bias and running statistics of a batch norm."""
    affine = [torch.rand(channels, device=device).add(0.5).requires_grad_() for _ in range(2)]
    return [*affine, torch.zeros(channels, device=device), torch.ones(channels, device=device)]


def _modules(inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Weights and norms of a fusion module."""
    depthwise, pointwise = (normal(s, device, dtype, True) for s in ((inputs, 1, 3, 3), (outputs, inputs, 1, 1)))
    return [depthwise, *norm(inputs, device), pointwise, *norm(outputs, device)]


def _given(features: Sequence[Tensor], parameters: Sequence[Tensor], **asked: bool) -> functional.Fusion:
    first, second = (functional.BatchNorm(*parameters[i : i + 4], True) for i in (1, 6))
    return functional.Fusion(features, parameters[0], first, parameters[5], second, **asked)


def fusion(shape: tuple[int, int], students: int, batch: int, channels_last: bool) -> Callable:
    """Students' maps, detached as in a step, and a fusion module."""
    given = maps([shape] * students, batch, channels_last, gradients=0)
    channels = shape[0]
    return lambda device, dtype: [*given(device, dtype), *_modules(students * channels, channels, device, dtype)]


def fuse(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    """The fusion module on all maps."""
    return tuple(functional.concat_fuse(*_given(tensors[:-10], tensors[-10:])[:5], backend=backend))


def fusion_and_mirror(shape: tuple[int, int], students: int, batch: int, channels_last: bool) -> Callable:
    """The leader's map and the students', then what fusion and trans-fusion hold."""
    given = maps([shape] * (students + 1), batch, channels_last, gradients=1)
    narrow, wide = shape[0], students * shape[0]
    return lambda device, dtype: [
        *given(device, dtype),
        *_modules(wide, narrow, device, dtype),
        *_modules(narrow, wide, device, dtype),
    ]


def fuse_and_mirror(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    """Both modules in shared launches, as FFSD's step takes them: the fused map and its attention are targets."""
    leader, *students = tensors[:-20]
    modules = [
        _given(students, tensors[-20:-10]),
        _given([leader], tensors[-10:], fused=False, pooled=False),
    ]
    fused, mirrored = functional.concat_fuse_all(modules, backend=backend)
    return fused.fused.detach(), fused.attention.detach(), fused.pooled, mirrored.attention


def normed(shape: tuple[int, int], students: int, residual: bool, batch: int, channels_last: bool) -> Callable:
    """A stacked map, perhaps a residual, and a norm."""
    channels, height = students * shape[0], shape[1]
    given = maps([(channels, height)] * (1 + residual), batch, channels_last, gradients=2)
    return lambda device, dtype: [*given(device, dtype), *norm(channels, device)]


def norm_act(attention_groups: int | None) -> Call:
    """batch_norm_act, with attention maps where there are groups."""

    def call(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
        x, *residual = tensors[:-4]
        found = functional.batch_norm_act(
            x,
            functional.BatchNorm(*tensors[-4:], True),
            residual=residual[0] if residual else None,
            attention_groups=attention_groups,
            backend=backend,
        )
        return found[:1] if attention_groups is None else tuple(found)

    return call


def chains(stages: Sequence[tuple[int, int]], count: int, batch: int, channels_last: bool) -> Callable:
    """Deep maps, then, transform after transform, what its stages hold."""
    deep = maps([stages[-1]] * count, batch, channels_last, gradients=0)

    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        made = deep(device, dtype)
        for _ in range(count):
            for (wide, _), (narrow, _) in zip(stages[::-1], stages[-2::-1], strict=False):
                made += [normal((wide, narrow, 3, 3), device, dtype, True), *norm(narrow, device)]
        return made

    return make


def transforms(count: int, *, attention: bool = False, shifted: bool = False) -> Call:
    """FFSD's transforms in training, or as they make targets: on running statistics, attention maps alone.

    A shift is a channel of the deep map: as large as any other.
    """

    def call(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
        deep, rest = list(tensors[:count]), tensors[count:]
        stages = [
            functional.Stage(rest[i], functional.BatchNorm(*rest[i + 1 : i + 5], not attention))
            for i in range(0, len(rest), 5)
        ]
        length = len(stages) // count
        chains = [stages[t * length : (t + 1) * length] for t in range(count)]
        shift = [x[:, 0] for x in deep] if shifted else None
        found = functional.deep_to_shallow(deep, chains, attention=attention, shift=shift, backend=backend)
        return tuple(y for maps in found for y in maps)

    return call


def logits(classes: int, heads: int, batch: int) -> Callable:
    """Logits of all heads, labels, and a weight for every edge."""

    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        labels = torch.randint(classes, (batch,), device=device)
        weights = torch.rand(heads, heads + 1, device=device)
        return [*(normal((batch, classes), device, dtype, True) for _ in range(heads)), labels, weights]

    return make


def heads(tensors: Sequence[Tensor], backend: str, **options: Any) -> tuple[Tensor, ...]:
    """FFSD's heads: peers, the fused head from the ensemble, the leader from the fused head."""
    *logits, labels, _ = tensors
    students = len(logits) - 2
    teachers = [[j for j in range(students) if j != i] for i in range(students)]
    teachers += [[functional.ENSEMBLE], [students]]
    found = functional.peer_kl_ce(
        logits, labels, temperature=2.0, teachers=teachers, ensemble=range(students), backend=backend, **options
    )
    return tuple(found)


def weighted_heads(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    """The same with weights and smoothed labels."""
    return heads(tensors, backend, weights=tensors[-1], label_smoothing=0.1)


def images(size: int, batch: int) -> Callable:
    """A data set of square images, and the draws and statistics of a batch."""

    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        images = torch.randint(256, (2 * batch, size, size, 3), device=device, dtype=torch.uint8)
        draws = [torch.randint(2 * batch, (batch,), device=device), torch.randint(9, (batch, 2), device=device)]
        statistics = [torch.rand(3, device=device), torch.rand(3, device=device) + 0.1]
        return [images, *draws, torch.rand(batch, device=device) < 0.5, *statistics, torch.empty(0, dtype=dtype)]

    return make


def augmented(channels_last: bool) -> Call:
    """A batch in a memory format."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def call(tensors: Sequence[Tensor], backend: str) -> Tensor:
        images, indices, offsets, flips, mean, std, like = tensors
        return functional.augment(
            images,
            indices,
            offsets,
            flips,
            mean=mean,
            std=std,
            padding=4,
            dtype=like.dtype,
            memory_format=memory_format,
            backend=backend,
        )

    return call
