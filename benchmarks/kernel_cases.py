"""Every operator at the shapes of real training: what the kernels are timed at, and what they are compiled for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import kernel_inputs as inputs
from benchmarks.kernel_inputs import Call
from fastfuse import functional

# (channels, height) of the stages of ResNet-32 on 32x32 and of ResNet-18 on 224x224, and their batches.
NETWORKS = {
    "cifar": (((16, 32), (32, 16), (64, 8)), 128),
    "imagenet": (((64, 56), (128, 28), (256, 14), (512, 7)), 256),
}
CLASSES = {"cifar": 100, "imagenet": 1000}
STUDENTS = (2, 4, 8)


@dataclass(frozen=True)
class KernelCase:
    """One operator at one shape.

    Attributes:
        op: the operator's folder.
        shape: what it is called in tables.
        make: fresh random tensors on a device in a dtype; those that require a gradient get one in the backward.
        call: runs the operator on them through a backend.
        quick: part of the short list.
        kind: of the operator's calls, where each kind may have a fastest backend of its own.
    """

    op: str
    shape: str
    make: Callable[[torch.device, torch.dtype], list[Tensor]]
    call: Call
    quick: bool
    kind: str = ""


@dataclass(frozen=True)
class Network:
    """Where cases come from: a network's name, the maps (channels, height) of its stages, and its batch."""

    name: str
    stages: tuple[tuple[int, int], ...]
    batch: int

    @property
    def deep(self) -> tuple[int, int]:
        """Channels and height of the last stage's maps."""
        return self.stages[-1]

    @property
    def shallow(self) -> tuple[int, int]:
        """Channels and height of the first stage's maps."""
        return self.stages[0]

    def maps(self, shapes: Sequence[tuple[int, int]], last: bool, *, gradients: int) -> Callable:
        """Feature maps of this network's batch; the first ones require gradients."""
        return inputs.maps(shapes, self.batch, last, gradients=gradients)

    def case(
        self, op: str, shape: str, make: Callable, call: Call, quick: bool, *, last: bool | None = None,
        kind: str = "",
    ) -> KernelCase:  # fmt: skip
        """A case named after this network and, where it matters, after the memory format."""
        layout = [] if last is None else ["channels_last" if last else "contiguous"]
        return KernelCase(op, " ".join([self.name, *([shape] if shape else []), *layout]), make, call, quick, kind)


def cases(*, batch: int | None = None) -> list[KernelCase]:
    """All cases; `batch` replaces the training batches where only the kind of launch matters."""
    found: list[KernelCase] = []
    for name, (stages, own) in NETWORKS.items():
        network = Network(name, stages, own if batch is None else batch)
        for last in (False, True):
            for family in (
                _distances,
                _students,
                _norms,
                _fusion,
                _convolutions,
                _groups,
                _diversity,
                _transforms,
                _augment,
            ):
                found += family(network, last)
        found += _heads(network)
    return found


def _distances(network: Network, last: bool) -> Iterator[KernelCase]:
    """Students' maps of all stages against others of the same shapes."""
    n = len(network.stages)
    both = network.maps([*network.stages, *network.stages], last, gradients=n)

    def attention(t: Sequence[Tensor], b: str) -> Tensor:
        return functional.attention_mse(t[:n], t[n:], backend=b)

    yield network.case("attention_mse", "all stages", both, attention, last, last=last)
    for p in (2, 1):

        def lp(t: Sequence[Tensor], b: str, p: int = p) -> Tensor:
            return functional.normalized_lp(t[:n], t[n:], p=p, backend=b)

        def joint(t: Sequence[Tensor], b: str, p: int = p) -> tuple[Tensor, ...]:
            return functional.normalized_lp_joint(t[:n], t[n:], p=p, backend=b)

        yield network.case("normalized_lp", f"all stages p={p}", both, lp, last and p == 2, last=last)
        yield network.case("normalized_lp", f"with attention p={p}", both, joint, last and p == 2, last=last)


def _students(network: Network, last: bool) -> Iterator[KernelCase]:
    """All students' maps against one."""

    def mse(t: Sequence[Tensor], b: str) -> Tensor:
        return functional.feature_mse(t[:-1], t[-1], backend=b)

    for students in STUDENTS:
        quick = last and students == 2
        several = network.maps([network.deep] * (students + 1), last, gradients=students)
        yield network.case("feature_mse", f"deepest S={students}", several, mse, quick, last=last)
        for over in ("positions", "channels"):

            def kl(t: Sequence[Tensor], b: str, over: str = over) -> Tensor:
                return functional.feature_kl(t[:-1], t[-1], temperature=2.0, over=over, backend=b)

            name = f"deepest S={students} over {over}"
            yield network.case("feature_kl", name, several, kl, quick and over == "positions", last=last)
    wide = network.maps([network.shallow] * 2, last, gradients=1)
    yield network.case("feature_mse", "shallowest S=1", wide, mse, False, last=last)


def _norms(network: Network, last: bool) -> Iterator[KernelCase]:
    """The norms of a residual block, first and second, and of the last block of a stage."""
    for students in STUDENTS:
        for stage, name in ((network.shallow, "shallowest"), (network.deep, "deepest"))[: 2 if students == 2 else 1]:
            for what in ("", " + x", " + x, attention") if students == 2 else (" + x",):
                yield network.case(
                    "batch_norm_act",
                    f"{name} S={students}{what}",
                    inputs.normed(stage, students, "x" in what, network.batch, last),
                    inputs.norm_act(students if "attention" in what else None),
                    last and students == 2 and what == " + x",
                    last=last,
                )


def _fusion(network: Network, last: bool) -> Iterator[KernelCase]:
    """The fusion module, its 1x1 product alone, and fusion with trans-fusion as a step runs them."""
    deep, batch = network.deep, network.batch
    # A norm that is applied on load, and the statistics of the next one.
    normed = inputs.affine(deep, 2, batch, last)
    yield network.case(
        "concat_conv1x1", "deepest S=2 scale, shift, statistics", normed, inputs.affine_product, last, last=last
    )
    for students in STUDENTS:
        name, quick = f"deepest S={students}", last and students == 2
        weighted = inputs.with_weight(deep, students, batch, last)
        yield network.case("concat_conv1x1", name, weighted, inputs.product, quick, last=last)
        both = inputs.fusion_and_mirror(deep, students, batch, last)
        yield network.case("concat_fuse", f"{name} and mirror", both, inputs.fuse_and_mirror, quick, last=last)
        alone = inputs.fusion(deep, students, batch, last)
        yield network.case("concat_fuse", name, alone, inputs.fuse, quick, last=last)


def _convolutions(network: Network, last: bool) -> Iterator[KernelCase]:
    """Two students' and the leader's: inside of every stage, and from each stage to the next with its shortcut."""
    for i, stage in enumerate(network.stages if last else network.stages[:1]):
        layers = [(stage[0], 3, 1, 3)]
        if last and i == 0:
            layers.append((stage[0], 3, 1, 9))
        if last and i + 1 < len(network.stages):
            layers += [(network.stages[i + 1][0], 3, 2, 3), (network.stages[i + 1][0], 1, 2, 3)]
        for outputs, kernel, stride, students in layers:
            kind = f"{stage[0]} to {outputs}, {kernel}x{kernel}, stride {stride}"
            made = inputs.stacked_weight(stage, outputs, kernel, students, network.batch, last)
            call, quick = inputs.convolution(students, stride), last and i == 0 and (stride, students) == (1, 3)
            name = f"{kind} at {stage[1]}, S={students}"
            yield network.case("grouped_conv", name, made, call, quick, last=last, kind=kind)


def _groups(network: Network, last: bool) -> Iterator[KernelCase]:
    """As many maps as a group has blocks in WRN-28, ResNet-56 and ResNet-110."""

    def call(t: Sequence[Tensor], b: str) -> Tensor:
        return functional.aggregate_distance(t[1:-1], t[-1], t[0], backend=b)

    shallow, deep = (network.shallow, "shallowest"), (network.deep, "deepest")
    for count, (stage, name) in ((4, shallow), (9, deep), (18, deep)):
        made = inputs.aggregate(stage, count, network.batch, last)
        yield network.case("aggregate_distance", f"{name} N={count}", made, call, last and count == 4, last=last)


def _diversity(network: Network, last: bool) -> Iterator[KernelCase]:
    def loss(t: Sequence[Tensor], b: str) -> Tensor:
        return functional.diversity_loss(t[0], t[1], backend=b)

    def target(t: Sequence[Tensor], b: str) -> Tensor:
        return functional.diversity_target(t[0], backend=b)

    def both(t: Sequence[Tensor], b: str) -> Tensor:
        return functional.diversity(t[: len(t) // 2], t[len(t) // 2 :], backend=b)[0]

    two, one = (network.maps([network.deep] * n, last, gradients=n - 1) for n in (2, 1))
    yield network.case("diversity_target", "loss", two, loss, last, last=last)
    yield network.case("diversity_target", "target", one, target, False, last=last)
    for students in STUDENTS:
        made = network.maps([network.deep] * (2 * students - 2), last, gradients=students - 1)
        name = f"loss and target S={students}"
        yield network.case("diversity_target", name, made, both, last and students == 2, last=last)


def _transforms(network: Network, last: bool) -> Iterator[KernelCase]:
    chains = inputs.chains(network.stages, 2, network.batch, last)
    for name, options, quick in (
        ("all stages", {}, last),
        ("attention", {"attention": True}, last),
        ("attention of shifted maps", {"attention": True, "shifted": True}, False),
    ):
        call = inputs.transforms(2, **options)
        yield network.case("deep_to_shallow", f"two transforms, {name}", chains, call, quick, last=last)


def _augment(network: Network, last: bool) -> Iterator[KernelCase]:
    size = 32 if network.name == "cifar" else 224
    yield network.case("augment", "", inputs.images(size, network.batch), inputs.augmented(last), last, last=last)


def _heads(network: Network) -> Iterator[KernelCase]:
    for students in STUDENTS:
        made = inputs.logits(CLASSES[network.name], students + 2, network.batch)
        yield network.case("peer_kl_ce", f"S={students}", made, inputs.heads, students == 2)
        yield network.case("peer_kl_ce", f"S={students} smoothed and weighted", made, inputs.weighted_heads, False)


FAMILIES = (_distances, _students, _norms, _convolutions, _fusion, _groups, _diversity, _transforms, _augment)
