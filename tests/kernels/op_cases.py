"""One catalogue of small calls of every differentiable operator, for the tests that hold for all of them.

A call takes its tensors in order: those of `shapes`, which take gradients, then those of `constants`, which the
operator detaches or which are left out of the derivative on purpose.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse import functional


class OpCase(NamedTuple):
    reason: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    constants: tuple[tuple[int, ...], ...] = ()
    is_loss: bool = True

    def tensors(self, dtype=torch.float64, memory_format=torch.contiguous_format, *, draw=0):
        """The same numbers whatever the dtype and the format; the first len(shapes) take gradients."""
        generator = torch.Generator().manual_seed(len(self.reason) + 1000 * draw)
        found = []
        for i, shape in enumerate((*self.shapes, *self.constants)):
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
            found.append(x.requires_grad_(i < len(self.shapes)))
        return found

    def outputs(self, tensors):
        """What the call gives, always as a tuple."""
        found = self.call(*tensors)
        return (found,) if isinstance(found, Tensor) else tuple(found)


def batch_norm(weight, bias, training):
    """Running statistics that differ per channel, new for every call: a call in training mode changes them."""
    steps = torch.arange(weight.shape[0], dtype=weight.dtype, device=weight.device)
    return functional.BatchNorm(1 + weight / 2, bias, 0.1 * steps - 0.2, 0.5 + 0.25 * steps, training)


def fuse(first, second):
    """concat_fuse of maps of widths 2 and 3 with norms in the given modes (True: batch statistics)."""

    def call(a, b, depthwise, weight1, bias1, pointwise, weight2, bias2):
        norms = batch_norm(weight1, bias1, first), batch_norm(weight2, bias2, second)
        return functional.concat_fuse([a, b], depthwise, norms[0], pointwise, norms[1])

    return call


FUSED = ((2, 2, 5, 3), (2, 3, 5, 3), (5, 1, 3, 3), (5,), (5,), (4, 5, 1, 1), (4,), (4,))


def transform(training, sizes=None):
    def call(x, weight1, scale1, bias1, weight2, scale2, bias2):
        stages = [
            functional.Stage(weight1, batch_norm(scale1, bias1, training)),
            functional.Stage(weight2, batch_norm(scale2, bias2, training)),
        ]
        return functional.deep_to_shallow(x, stages, sizes=sizes)

    return call


def norm_act(training, shortcut=True, **options):
    """batch_norm_act of maps of two networks; attention maps as [S N, H, W]."""

    def call(x, weight, bias, *rest):
        norm = batch_norm(weight, bias, training)
        found = functional.batch_norm_act(x, norm, residual=rest[0] if shortcut else None, **options)
        return found.out if found.attention is None else (found.out, found.attention.flatten(0, 1))

    return call


NORMED = ((2, 4, 3, 5), (4,), (4,), (2, 4, 3, 5))
CHAIN = ((4, 3, 3, 3), (3,), (3,), (3, 2, 3, 3), (2,), (2,))


def two_transforms(x, y, weight1, scale1, bias1, weight2, scale2, bias2):
    """Each of one stage, to sizes of its own."""
    chains = [
        [functional.Stage(weight1, batch_norm(scale1, bias1, True))],
        [functional.Stage(weight2, batch_norm(scale2, bias2, True))],
    ]
    first, second = functional.deep_to_shallow([x, y], chains, sizes=[[(5, 4)], None])
    return *first, *second


def one_head(index, weighted=False, **options):
    """peer_kl_ce's terms of one head; the others are constants, since a teacher's gradient is cut on purpose."""

    def call(head, *others):
        rows = [*others[:index], head, *others[index:]]
        labels = torch.arange(head.shape[0], device=head.device) % head.shape[1]
        count = len(rows)
        weights = torch.linspace(-1, 2, count * (count + 1), device=head.device).view(count, -1) if weighted else None
        found = functional.peer_kl_ce(rows, labels, weights=weights, **options)
        return found.cross_entropy[index], found.divergence[index]

    return call


attention, lp, kl = functional.attention_mse, functional.normalized_lp, functional.feature_kl
joint = functional.normalized_lp_joint
X, Y = (2, 3, 5, 4), (2, 2, 5, 4)
CASES = [
    OpCase("attention_map of one map", functional.attention_map, ((3, 4, 5, 3),)),
    OpCase("attention_map of two widths", lambda a, b: functional.attention_map([a, b]), (X, (2, 4, 5, 4))),
    OpCase("attention_mse: maps of different width", attention, (X, Y)),
    OpCase(
        "attention_mse: a batch of one, prime sides, summed",
        lambda x, y: attention(x, y, reduction="sum"),
        ((1, 4, 7, 3), (1, 4, 7, 3)),
    ),
    OpCase("attention_mse: features against a ready map", attention, (X, (2, 5, 4))),
    OpCase(
        "attention_mse: two pairs of different shape",
        lambda a, b, x, y: attention([a, b], [x, y]),
        (X, (1, 2, 3, 3), Y, (1, 3, 3, 3)),
    ),
    OpCase(
        "attention_mse: two pairs, a loss per sample",
        lambda a, b, x, y: attention([a, b], [x, y], reduction="none"),
        (X, (2, 2, 3, 3), Y, (2, 3, 3, 3)),
    ),
    OpCase("normalized_lp, p = 2", lp, (X, X)),
    OpCase("normalized_lp, p = 1", lambda x, y: lp(x, y, p=1), (X, X)),
    OpCase("normalized_lp, p = 1: a batch of one, odd", lambda x, y: lp(x, y, p=1), ((1, 3, 5, 7), (1, 3, 5, 7))),
    OpCase("normalized_lp of rows, a loss per sample", lambda x, y: lp(x, y, reduction="none"), ((3, 7), (3, 7))),
    OpCase(
        "normalized_lp of two pairs of different shape",
        lambda a, b, x, y: lp([a, b], [x, y], p=1),
        (X, (1, 2, 3), X, (1, 2, 3)),
    ),
    OpCase("normalized_lp_joint, p = 2", joint, (X, X)),
    OpCase("normalized_lp_joint, p = 1", lambda x, y: joint(x, y, p=1), (X, X)),
    OpCase(
        "normalized_lp_joint: a batch of one, odd, summed",
        lambda x, y: joint(x, y, reduction="sum"),
        ((1, 3, 5, 7), (1, 3, 5, 7)),
    ),
    OpCase(
        "normalized_lp_joint of two pairs, a loss per sample",
        lambda a, b, x, y: joint([a, b], [x, y], reduction="none"),
        (X, (2, 6, 3, 1), X, (2, 6, 3, 1)),
    ),
    OpCase("diversity_loss as published", functional.diversity_loss, (X,), (Y,)),
    OpCase(
        "diversity_loss normalized, summed",
        lambda x, y: functional.diversity_loss(x, y, mode="normalized", reduction="sum"),
        (X,),
        (X,),
    ),
    OpCase("diversity_loss of a ready map, a batch of one", functional.diversity_loss, ((1, 5, 3),), ((1, 4, 5, 3),)),
    OpCase(
        "diversity: two pairs of different shape, together with their targets",
        lambda a, b, x, y: functional.diversity([a, b], [x, y])[0],
        (X, (1, 2, 3, 3)),
        (Y, (1, 3, 3, 3)),
    ),
    OpCase("peer_kl_ce: the middle one of three heads", one_head(1, temperature=2.0), ((3, 5),), ((3, 5), (3, 5))),
    OpCase(
        "peer_kl_ce: taught by an ensemble of others, with an offset",
        one_head(0, temperature=3.0, teachers=[[functional.ENSEMBLE], [0], []], ensemble=[1, 2], target_epsilon=1e-3),
        ((4, 7),),
        ((4, 7), (4, 7)),
    ),
    OpCase(
        "peer_kl_ce: smoothed labels, a weight for every edge",
        one_head(2, weighted=True, temperature=2.0, label_smoothing=0.1),
        ((3, 5),),
        ((3, 5), (3, 5)),
    ),
    OpCase(
        "peer_kl from two peers",
        lambda z, a, b: functional.peer_kl(z, [a, b], temperature=4.0),
        ((3, 5),),
        ((3, 5), (3, 5)),
    ),
    OpCase(
        "peer_kl, a batch of one, per sample",
        lambda z, a: functional.peer_kl(z, [a], temperature=0.5, reduction="none"),
        ((1, 6),),
        ((1, 6),),
    ),
    OpCase("feature_mse: two students, one target", lambda a, b, t: functional.feature_mse([a, b], t), (X, X, X)),
    OpCase(
        "feature_mse: a target each, of different shapes",
        lambda a, b, s, t: functional.feature_mse([a, b], [s, t]),
        (X, (1, 5, 3, 3), X, (1, 5, 3, 3)),
    ),
    OpCase("feature_kl over positions", lambda a, b, t: kl([a, b], t, temperature=2.0), (X, X, X)),
    OpCase("feature_kl over channels", lambda a, t: kl([a], t, temperature=0.7, over="channels"), (X, X)),
    OpCase(
        "feature_kl: a target each, of different shapes",
        lambda a, b, s, t: kl([a, b], [s, t], temperature=4.0),
        (X, (1, 5, 3, 3), X, (1, 5, 3, 3)),
    ),
    OpCase(
        "aggregate_distance of two maps",
        lambda a, b, w, t: functional.aggregate_distance([a, b], w, t),
        (X, X, (2,), X),
    ),
    OpCase(
        "aggregate_distance of one map, a batch of one, summed",
        lambda a, w, t: functional.aggregate_distance([a], w, t, reduction="sum"),
        ((1, 3, 5, 7), (1,), (1, 3, 5, 7)),
    ),
    OpCase(
        "concat_conv1x1 of two widths",
        lambda a, b, w: functional.concat_conv1x1([a, b], w),
        (X, Y, (4, 5, 1, 1)),
        is_loss=False,
    ),
    OpCase(
        "concat_conv1x1 of one map, a batch of one",
        lambda a, w: functional.concat_conv1x1([a], w),
        ((1, 3, 5, 7), (2, 3, 1, 1)),
        is_loss=False,
    ),
    OpCase(
        "concat_conv1x1 of slices of a stacked map",
        lambda x, w: functional.concat_conv1x1(x.split([1, 4], 1), w),
        ((2, 5, 3, 4), (4, 5, 1, 1)),
        is_loss=False,
    ),
    OpCase(
        "concat_conv1x1 of scaled and shifted maps",
        lambda a, b, w, scale, shift: functional.concat_conv1x1([a, b], w, scale=scale, shift=shift),
        (X, Y, (4, 5, 1, 1), (5,), (5,)),
        is_loss=False,
    ),
    OpCase(
        "concat_conv1x1 with statistics",
        lambda a, b, w: functional.concat_conv1x1([a, b], w, statistics=True)[:3],
        (X, Y, (4, 5, 1, 1)),
        is_loss=False,
    ),
    OpCase(
        "concat_conv1x1 of scaled and shifted maps with statistics, a batch of one",
        lambda a, w, scale, shift: functional.concat_conv1x1([a], w, scale=scale, shift=shift, statistics=True)[:3],
        ((1, 3, 5, 7), (2, 3, 1, 1), (3,), (3,)),
        is_loss=False,
    ),
    OpCase(
        "grouped_conv of two networks",
        lambda x, w: functional.grouped_conv(x, w, groups=2, stride=2),
        ((2, 6, 5, 4), (4, 3, 3, 3)),
        is_loss=False,
    ),
    OpCase(
        "grouped_conv of a shortcut, a batch of one",
        lambda x, w: functional.grouped_conv(x, w, groups=3, stride=2),
        ((1, 6, 5, 3), (3, 2, 1, 1)),
        is_loss=False,
    ),
    OpCase("concat_fuse on batch statistics", fuse(True, True), FUSED, is_loss=False),
    OpCase("concat_fuse on running statistics", fuse(False, False), FUSED, is_loss=False),
    OpCase("concat_fuse, the first norm frozen", fuse(False, True), FUSED, is_loss=False),
    OpCase("concat_fuse of a batch of one", fuse(True, True), ((1, 2, 3, 7), (1, 3, 3, 7), *FUSED[2:]), is_loss=False),
    OpCase("batch_norm_act on batch statistics", norm_act(True, shortcut=False), NORMED[:3], is_loss=False),
    OpCase(
        "batch_norm_act of a block's end, a batch of one",
        norm_act(True),
        ((1, *X[1:]), (3,), (3,), (1, *X[1:])),
        is_loss=False,
    ),
    OpCase("batch_norm_act with attention maps", norm_act(True, attention_groups=2), NORMED, is_loss=False),
    OpCase("batch_norm_act on running statistics", norm_act(False, attention_groups=2), NORMED, is_loss=False),
    OpCase("batch_norm_act without a ReLU", norm_act(True, relu=False), NORMED, is_loss=False),
    OpCase("deep_to_shallow on batch statistics", transform(True), ((2, 4, 3, 2), *CHAIN), is_loss=False),
    OpCase("deep_to_shallow on running statistics", transform(False), ((2, 4, 3, 2), *CHAIN), is_loss=False),
    OpCase(
        "deep_to_shallow: two transforms at once, for different sizes",
        two_transforms,
        ((2, 4, 3, 2), (2, 4, 3, 2), *CHAIN[:3], *CHAIN[:3]),
        is_loss=False,
    ),
    OpCase(
        "deep_to_shallow to odd sizes, a batch of one",
        transform(True, sizes=[(9, 8), (5, 4)]),
        ((1, 4, 3, 2), *CHAIN),
        is_loss=False,
    ),
]
FORMATS = [torch.contiguous_format, torch.channels_last]
