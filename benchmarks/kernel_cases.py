"""Every operator at the shapes of real training: what the kernels are timed at, and what they are compiled for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfuse import functional

# (channels, height) of the stages of ResNet-32 on 32x32 and of ResNet-18 on 224x224, and their batches.
NETWORKS = {
    "cifar": (((16, 32), (32, 16), (64, 8)), 128),
    "imagenet": (((64, 56), (128, 28), (256, 14), (512, 7)), 256),
}
CLASSES = {"cifar": 100, "imagenet": 1000}
STUDENTS = (2, 4, 8)

Call = Callable[[Sequence[Tensor], str], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class KernelCase:
    """One operator at one shape.

    Attributes:
        op: the operator's folder.
        shape: what it is called in tables.
        make: fresh random tensors on a device in a dtype; those that require a gradient get one in the backward.
        call: runs the operator on them through a backend.
        quick: part of the short list.
    """

    op: str
    shape: str
    make: Callable[[torch.device, torch.dtype], list[Tensor]]
    call: Call
    quick: bool


def cases(*, batch: int | None = None) -> list[KernelCase]:
    """All cases; `batch` replaces the training batches where only the kind of launch matters."""
    found: list[KernelCase] = []
    for network, (stages, own) in NETWORKS.items():
        found += _network_cases(network, stages, own if batch is None else batch)
    return found


def _network_cases(network: str, stages: Sequence[tuple[int, int]], batch: int) -> list[KernelCase]:
    found: list[KernelCase] = []
    deep, shallow = stages[-1], stages[0]

    def add(op: str, shape: str, make: Callable, call: Call, quick: bool) -> None:
        found.append(KernelCase(op, f"{network} {shape}", make, call, quick))

    for last in (False, True):
        layout = "channels_last" if last else "contiguous"
        both = _maps([*stages, *stages], batch, last, gradients=len(stages))
        half = len(stages)
        add(
            "attention_mse",
            f"all stages {layout}",
            both,
            lambda t, b, n=half: functional.attention_mse(t[:n], t[n:], backend=b),
            last,
        )
        for p in (2, 1):
            add(
                "normalized_lp",
                f"all stages p={p} {layout}",
                both,
                lambda t, b, n=half, p=p: functional.normalized_lp(t[:n], t[n:], p=p, backend=b),
                last and p == 2,
            )
            add(
                "normalized_lp",
                f"with attention p={p} {layout}",
                both,
                lambda t, b, n=half, p=p: functional.normalized_lp_joint(t[:n], t[n:], p=p, backend=b),
                last and p == 2,
            )
        for students in STUDENTS:
            several = _maps([*[deep] * students, deep], batch, last, gradients=students)
            add(
                "feature_mse",
                f"deepest S={students} {layout}",
                several,
                lambda t, b: functional.feature_mse(t[:-1], t[-1], backend=b),
                last and students == 2,
            )
            for over in ("positions", "channels"):
                add(
                    "feature_kl",
                    f"deepest S={students} over {over} {layout}",
                    several,
                    lambda t, b, o=over: functional.feature_kl(t[:-1], t[-1], temperature=2.0, over=o, backend=b),
                    last and students == 2 and over == "positions",
                )
            add(
                "concat_conv1x1",
                f"deepest S={students} {layout}",
                _with_weight(deep, students, batch, last),
                lambda t, b: functional.concat_conv1x1(t[:-1], t[-1], backend=b),
                last and students == 2,
            )
            add(
                "concat_fuse",
                f"deepest S={students} {layout}",
                _fusion(deep, students, batch, last),
                _fuse,
                last and students == 2,
            )
            # The norms of a residual block, first and second, and of the last block of a stage.
            for stage, name in ((shallow, "shallowest"), (deep, "deepest"))[: 2 if students == 2 else 1]:
                for what in ("", " + x", " + x, attention") if students == 2 else (" + x",):
                    add(
                        "batch_norm_act",
                        f"{name} S={students}{what} {layout}",
                        _normed(stage, students, "x" in what, batch, last),
                        _norm_act(students if "attention" in what else None),
                        last and students == 2 and what == " + x",
                    )
        wide = _maps([shallow, shallow], batch, last, gradients=1)
        add(
            "feature_mse",
            f"shallowest S=1 {layout}",
            wide,
            lambda t, b: functional.feature_mse(t[:1], t[1], backend=b),
            False,
        )
        # As many maps as a group has blocks in WRN-28, ResNet-56 and ResNet-110.
        for count, stage, name in ((4, shallow, "shallowest"), (9, deep, "deepest"), (18, deep, "deepest")):
            add(
                "aggregate_distance",
                f"{name} N={count} {layout}",
                _aggregate(stage, count, batch, last),
                lambda t, b: functional.aggregate_distance(t[1:-1], t[-1], t[0], backend=b),
                last and count == 4,
            )
        two = _maps([deep, deep], batch, last, gradients=1)
        add(
            "diversity_target",
            f"loss {layout}",
            two,
            lambda t, b: functional.diversity_loss(t[0], t[1], backend=b),
            last,
        )
        add(
            "diversity_target",
            f"target {layout}",
            _maps([deep], batch, last, gradients=0),
            lambda t, b: functional.diversity_target(t[0], backend=b),
            False,
        )
        for students in STUDENTS:
            add(
                "diversity_target",
                f"loss and target S={students} {layout}",
                _maps([deep] * (2 * students - 2), batch, last, gradients=students - 1),
                lambda t, b, n=students - 1: functional.diversity(t[:n], t[n:], backend=b)[0],
                last and students == 2,
            )
        chains = _chains(stages, 2, batch, last)
        add("deep_to_shallow", f"two transforms, all stages {layout}", chains, _transforms(2), last)
        add("deep_to_shallow", f"two transforms, attention {layout}", chains, _transforms(2, attention=True), last)
        shifted = _transforms(2, attention=True, shifted=True)
        add("deep_to_shallow", f"two transforms, attention of shifted maps {layout}", chains, shifted, False)
        add("augment", layout, _images(network, batch), _augment(last), last)
    for students in STUDENTS:
        logits = _logits(CLASSES[network], students + 2, batch)
        add("peer_kl_ce", f"S={students}", logits, _heads, students == 2)
        add("peer_kl_ce", f"S={students} smoothed and weighted", logits, _weighted_heads, False)
    return found


def _normal(shape: Sequence[int], device: torch.device, dtype: torch.dtype, gradient: bool) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_(gradient)


def _maps(shapes: Sequence[tuple[int, int]], batch: int, channels_last: bool, *, gradients: int) -> Callable:
    """Feature maps, rectified as networks give them; the first ones require gradients."""

    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        made = [torch.randn(batch, c, n, n, device=device).relu().to(dtype) for c, n in shapes]
        if channels_last:
            made = [x.contiguous(memory_format=torch.channels_last) for x in made]
        return [x.requires_grad_(i < gradients) for i, x in enumerate(made)]

    return make


def _with_weight(shape: tuple[int, int], students: int, batch: int, channels_last: bool) -> Callable:
    maps = _maps([shape] * students, batch, channels_last, gradients=students)
    weight = (shape[0], students * shape[0], 1, 1)
    return lambda device, dtype: [*maps(device, dtype), _normal(weight, device, dtype, True)]


def _aggregate(shape: tuple[int, int], count: int, batch: int, channels_last: bool) -> Callable:
    """A student's map, frozen teacher maps, and their weights."""
    maps = _maps([shape] * (count + 1), batch, channels_last, gradients=1)
    return lambda device, dtype: [
        *maps(device, dtype),
        torch.rand(count, device=device).softmax(0).requires_grad_(),
    ]


def _norm(channels: int, device: torch.device) -> list[Tensor]:
    affine = [torch.rand(channels, device=device).add(0.5).requires_grad_() for _ in range(2)]
    return [*affine, torch.zeros(channels, device=device), torch.ones(channels, device=device)]


def _fusion(shape: tuple[int, int], students: int, batch: int, channels_last: bool) -> Callable:
    maps = _maps([shape] * students, batch, channels_last, gradients=0)
    channels = shape[0]

    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        depthwise = _normal((students * channels, 1, 3, 3), device, dtype, True)
        pointwise = _normal((channels, students * channels, 1, 1), device, dtype, True)
        norms = [*_norm(students * channels, device), *_norm(channels, device)]
        return [*maps(device, dtype), depthwise, pointwise, *norms]

    return make


def _fuse(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    *maps, depthwise, pointwise = tensors[:-8]
    first, second = (functional.BatchNorm(*four, True) for four in (tensors[-8:-4], tensors[-4:]))
    return tuple(functional.concat_fuse(maps, depthwise, first, pointwise, second, backend=backend))


def _normed(shape: tuple[int, int], students: int, residual: bool, batch: int, channels_last: bool) -> Callable:
    """A stacked map, perhaps a residual, and a norm."""
    channels, height = students * shape[0], shape[1]
    maps = _maps([(channels, height)] * (1 + residual), batch, channels_last, gradients=2)
    return lambda device, dtype: [*maps(device, dtype), *_norm(channels, device)]


def _norm_act(attention_groups: int | None) -> Call:
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


def _chains(stages: Sequence[tuple[int, int]], count: int, batch: int, channels_last: bool) -> Callable:
    """Deep maps, then, transform after transform, what its stages hold."""
    deep = _maps([stages[-1]] * count, batch, channels_last, gradients=0)

    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        made = deep(device, dtype)
        for _ in range(count):
            for (wide, _), (narrow, _) in zip(stages[::-1], stages[-2::-1], strict=False):
                made += [_normal((wide, narrow, 3, 3), device, dtype, True), *_norm(narrow, device)]
        return made

    return make


def _transforms(count: int, *, attention: bool = False, shifted: bool = False) -> Call:
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


def _logits(classes: int, heads: int, batch: int) -> Callable:
    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        labels = torch.randint(classes, (batch,), device=device)
        weights = torch.rand(heads, heads + 1, device=device)
        return [*(_normal((batch, classes), device, dtype, True) for _ in range(heads)), labels, weights]

    return make


def _heads(tensors: Sequence[Tensor], backend: str, **options: Any) -> tuple[Tensor, ...]:
    """FFSD's heads: peers, the fused head from the ensemble, the leader from the fused head."""
    *logits, labels, _ = tensors
    students = len(logits) - 2
    teachers = [[j for j in range(students) if j != i] for i in range(students)]
    teachers += [[functional.ENSEMBLE], [students]]
    found = functional.peer_kl_ce(
        logits, labels, temperature=2.0, teachers=teachers, ensemble=range(students), backend=backend, **options
    )
    return tuple(found)


def _weighted_heads(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
    return _heads(tensors, backend, weights=tensors[-1], label_smoothing=0.1)


def _images(network: str, batch: int) -> Callable:
    size = 32 if network == "cifar" else 224

    def make(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        images = torch.randint(256, (2 * batch, size, size, 3), device=device, dtype=torch.uint8)
        draws = [torch.randint(2 * batch, (batch,), device=device), torch.randint(9, (batch, 2), device=device)]
        statistics = [torch.rand(3, device=device), torch.rand(3, device=device) + 0.1]
        return [images, *draws, torch.rand(batch, device=device) < 0.5, *statistics, torch.empty(0, dtype=dtype)]

    return make


def _augment(channels_last: bool) -> Call:
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
