"""What the operators refuse: one line that names the argument at fault, before anything is computed."""

import re

import pytest
import torch

from fastfuse import functional as ff
from fastfuse.errors import InputError


def maps(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


X = maps(2, 3, 4, 4)
ELSEWHERE = maps(2, 3, 4, 4, device="meta")
INTEGERS = maps(2, 3, 4, 4, dtype=torch.int64)
LOGITS, LABELS = maps(2, 4, 5), torch.zeros(4, dtype=torch.long)


def norm(channels, **fields):
    parts = {name: maps(channels) for name in ("weight", "bias", "running_mean", "running_var")}
    return ff.BatchNorm(**parts | fields, training=False)


def fuse(features=(X, X), depthwise=(6, 1, 3, 3), norm1=None, pointwise=(2, 6, 1, 1), norm2=None):
    return ff.concat_fuse(features, maps(*depthwise), norm1 or norm(6), maps(*pointwise), norm2 or norm(2))


def product(scale=None, shift=None, **options):
    return ff.concat_conv1x1([X, X], maps(2, 6, 1, 1), scale=scale, shift=shift, **options)


def stage(deep=3, shallow=2, kernel=3, norm_channels=None):
    return ff.Stage(maps(deep, shallow, kernel, kernel), norm(norm_channels or shallow))


def norm_act(x=X, channels=3, training=False, **options):
    return ff.batch_norm_act(x, norm(channels)._replace(training=training), **options)


def convolve(x=X, weight=None, groups=1, **options):
    return ff.grouped_conv(x, maps(2, 3, 3, 3) if weight is None else weight, groups=groups, **options)


def peers(logits=LOGITS, labels=LABELS, temperature=2.0, **options):
    return ff.peer_kl_ce(logits, labels, temperature=temperature, **options)


def kl(features=(X,), target=X, temperature=2.0, **options):
    return ff.feature_kl(features, target, temperature=temperature, **options)


def aggregate(features, weights=None, target=X):
    return ff.aggregate_distance(features, maps(2) if weights is None else weights, target)


def refused(reason, call, message, error=InputError):
    return pytest.param(call, message, error, id=reason)


ATTENTION = [
    refused("no map", lambda: ff.attention_map([]), "features must hold at least one"),
    refused("a map of other size", lambda: ff.attention_map([X, maps(2, 3, 4, 5)]), "features[1] [2, 3, 4, 5]"),
    refused("a map of another batch", lambda: ff.attention_map([X, maps(1, 3, 4, 4)]), "features[1] [1, 3, 4, 4]"),
    refused("a map elsewhere", lambda: ff.attention_map([X, ELSEWHERE]), "features[1] is on meta"),
    refused("a ready map", lambda: ff.attention_map(maps(2, 4, 4)), "features[0] must have 4 dimensions"),
    refused("integers", lambda: ff.attention_map(INTEGERS), "features[0] must be a floating-point", TypeError),
    refused("no pair", lambda: ff.attention_mse([], []), "as many targets as inputs"),
    refused("a target missing", lambda: ff.attention_mse([X, X], [X]), "as many targets as inputs"),
    refused("one target for a list", lambda: ff.attention_mse([X, X], X), "as many targets as inputs"),
    refused("no such reduction", lambda: ff.attention_mse(X, X, reduction="batchmean"), "reduction is"),
    refused("not a tensor", lambda: ff.attention_mse([None], X), "inputs[0] must be a tensor, not NoneType", TypeError),
    refused("integer target", lambda: ff.attention_mse(X, INTEGERS), "targets[0] must be a floating", TypeError),
    refused("rows", lambda: ff.attention_mse(maps(2, 4), X), "inputs[0] must have 3 or 4 dimensions"),
    refused("sides swapped", lambda: ff.attention_mse(maps(2, 3, 4, 5), maps(2, 3, 5, 4)), "targets[0] [2, 3, 5, 4]"),
    refused("target elsewhere", lambda: ff.attention_mse(X, ELSEWHERE), "targets[0] is on meta"),
    refused(
        "losses per sample of different batches",
        lambda: ff.attention_mse([X, X[:1]], [X, X[:1]], reduction="none"),
        "reduction='none' needs inputs of one batch size",
    ),
]
NORMALIZED_LP = [
    refused("no pair", lambda: ff.normalized_lp([], []), "as many targets as inputs"),
    refused("p = 3", lambda: ff.normalized_lp(X, X, p=3), "p is 1 or 2, not 3"),
    refused("no such reduction", lambda: ff.normalized_lp(X, X, reduction="max"), "reduction is"),
    refused("one dimension", lambda: ff.normalized_lp(maps(4), maps(4)), "inputs[0] must have 2 or 3"),
    refused("integers", lambda: ff.normalized_lp(X, INTEGERS), "targets[0] must be a floating-point", TypeError),
    refused("target elsewhere", lambda: ff.normalized_lp(X, ELSEWHERE), "targets[0] is on meta"),
    refused(
        "joint: a ready map", lambda: ff.normalized_lp_joint(X, maps(2, 4, 4)), "targets[0] must have 4 dimensions"
    ),
    refused("joint: rows", lambda: ff.normalized_lp_joint([X, maps(2, 4)], [X, X]), "inputs[1] must have 4 dimensions"),
    refused("joint: p = 0", lambda: ff.normalized_lp_joint(X, X, p=0), "p is 1 or 2, not 0"),
    refused("joint: channels differ", lambda: ff.normalized_lp_joint(X, maps(2, 5, 4, 4)), "targets[0] [2, 5, 4, 4]"),
    refused("joint: no such reduction", lambda: ff.normalized_lp_joint(X, X, reduction="max"), "reduction is"),
    refused("joint: target elsewhere", lambda: ff.normalized_lp_joint(X, ELSEWHERE), "targets[0] is on meta"),
    refused("a shape that broadcasts", lambda: ff.normalized_lp(X, maps(2, 1, 4, 4)), "targets[0] [2, 1, 4, 4]"),
    refused(
        "losses per sample of different batches",
        lambda: ff.normalized_lp([X, X[:1]], [X, X[:1]], reduction="none"),
        "reduction='none' needs inputs of one batch size",
    ),
]
DIVERSITY = [
    refused("no such mode", lambda: ff.diversity_loss(X, X, mode="code"), "mode is 'published' or 'normalized'"),
    refused("no such mode of the target", lambda: ff.diversity_target(X, mode=""), "mode is 'published'"),
    refused("no such reduction", lambda: ff.diversity_loss(X, X, reduction=None), "reduction is"),
    refused("two positions", lambda: ff.diversity_loss(X[..., :2, :1], X[..., :2, :1]), "y [2, 3, 2, 1]"),
    refused("one position", lambda: ff.diversity_target(X[..., :1, :1]), "y [2, 3, 1, 1]"),
    refused("another size", lambda: ff.diversity_loss(X, maps(2, 3, 4, 5)), "x [2, 3, 4, 4] and y [2, 3, 4, 5]"),
    refused("y elsewhere", lambda: ff.diversity_loss(X, ELSEWHERE), "y is on meta"),
    refused("rows", lambda: ff.diversity_loss(maps(2, 4), X), "x must have 3 or 4 dimensions"),
    refused("a ready map has no channels to shift", lambda: ff.diversity_target(maps(2, 4, 4)), "y must have 4 dim"),
    refused("integers", lambda: ff.diversity_target(INTEGERS), "y must be a floating-point", TypeError),
]
PEERS = [
    refused("no head", lambda: peers([]), "logits must hold at least one"),
    refused("heads of other classes", lambda: peers([LOGITS[0], maps(4, 6)]), "logits[1] [4, 6]"),
    refused("a single head unstacked", lambda: peers(LOGITS[0]), "logits[0] must have 2 dimensions"),
    refused("integer logits", lambda: peers(LOGITS.long()), "logits[0] must be a floating-point", TypeError),
    refused("a head elsewhere", lambda: peers([LOGITS[0], LOGITS[1].to("meta")]), "logits[1] is on meta"),
    refused("labels elsewhere", lambda: peers(labels=LABELS.to("meta")), "labels is on meta"),
    refused("labels of type int32", lambda: peers(labels=LABELS.int()), "labels must be a tensor of int64", TypeError),
    refused("labels as a list", lambda: peers(labels=[0, 0, 0, 0]), "labels must be a tensor of int64", TypeError),
    refused("labels one-hot", lambda: peers(labels=torch.eye(4, 5).long()), "labels must have shape [4]"),
    refused("temperature 0", lambda: peers(temperature=0), "temperature must be positive, not 0"),
    refused("temperature NaN", lambda: peers(temperature=float("nan")), "temperature must be positive, not nan"),
    refused("its own teacher", lambda: peers(teachers=[[0], []]), "head 0 cannot learn from head 0: teachers"),
    refused("no such teacher", lambda: peers(teachers=[[2], []]), "head 0 cannot learn from head 2: teachers"),
    refused("a negative teacher", lambda: peers(teachers=[[-2], []]), "head 0 cannot learn from head -2: teachers"),
    refused("teachers of one head only", lambda: peers(teachers=[[1]]), "teachers must name the teachers of each of 2"),
    refused("an empty ensemble", lambda: peers(ensemble=[]), "ensemble must hold heads 0..1"),
    refused("no such head in the ensemble", lambda: peers(ensemble=[0, 2]), "ensemble must hold heads 0..1"),
    refused("smoothing above 1", lambda: peers(label_smoothing=1.5), "label_smoothing must be between 0 and 1"),
    refused("smoothing NaN", lambda: peers(label_smoothing=float("nan")), "label_smoothing must be between 0 and 1"),
    refused("weights as a number", lambda: peers(weights=0.5), "weights must be a tensor, not float", TypeError),
    refused("integer weights", lambda: peers(weights=torch.tensor(1)), "weights must be a floating-point", TypeError),
    refused("weights elsewhere", lambda: peers(weights=maps(2, 3, device="meta")), "weights is on meta"),
    refused("no weight for the ensemble", lambda: peers(weights=maps(2, 2)), "weights must broadcast to [2, 3]"),
    refused("weights of other heads", lambda: peers(weights=maps(3, 3)), "weights must broadcast to [2, 3]"),
    refused("weights of three dimensions", lambda: peers(weights=maps(1, 2, 3)), "weights must have 0 or 1 or 2"),
    refused(
        "weights to be learned", lambda: peers(weights=maps(2, 3).requires_grad_()), "weights get no gradient; give"
    ),
    refused("no peer", lambda: ff.peer_kl(LOGITS[0], [], temperature=2.0), "peers must hold at least one"),
    refused("a peer unstacked", lambda: ff.peer_kl(LOGITS[0], LOGITS[1], temperature=2.0), "peers[0] must have 2"),
    refused("other classes", lambda: ff.peer_kl(LOGITS[0], [maps(4, 6)], temperature=2.0), "peers[0] [4, 6]"),
    refused("a bad prediction", lambda: ff.peer_kl(LOGITS, LOGITS, temperature=2.0), "prediction must have 2"),
    refused("temperature -1", lambda: ff.peer_kl(LOGITS[0], LOGITS, temperature=-1), "temperature must be"),
    refused(
        "no such reduction",
        lambda: ff.peer_kl(LOGITS[0], LOGITS, temperature=2.0, reduction="batchmean"),
        "reduction is",
    ),
]
FUSION = [
    refused("no map", lambda: fuse(features=[]), "features must hold at least one map"),
    refused("another size", lambda: fuse(features=[X, maps(2, 3, 4, 5)]), "features[1] [2, 3, 4, 5]"),
    refused("another batch", lambda: fuse(features=[X, X[:1]]), "features[1] [1, 3, 4, 4]"),
    refused("another dtype", lambda: fuse(features=[X, X.double()]), "features[1] is torch.float64", TypeError),
    refused("elsewhere", lambda: fuse(features=[X, ELSEWHERE]), "features[1] is on meta"),
    refused("integers", lambda: fuse(features=[INTEGERS]), "features[0] must be a floating-point", TypeError),
    refused("depthwise of other width", lambda: fuse(depthwise=(3, 1, 3, 3)), "depthwise must have shape [6, 1, 3, 3]"),
    refused("depthwise 5x5", lambda: fuse(depthwise=(6, 1, 5, 5)), "depthwise must have shape [6, 1, 3, 3]"),
    refused("pointwise of other width", lambda: fuse(pointwise=(2, 3, 1, 1)), "pointwise must have shape [2, 6, 1, 1]"),
    refused("norm1 of other width", lambda: fuse(norm1=norm(3)), "norm1.weight must have shape [6]"),
    refused("norm2 of other width", lambda: fuse(norm2=norm(6)), "norm2.weight must have shape [2]"),
    refused("one odd buffer", lambda: fuse(norm2=norm(2, running_var=maps(1))), "norm2.running_var must have"),
    refused("1x1: no map", lambda: ff.concat_conv1x1([], maps(2, 6, 1, 1)), "features must hold at least one map"),
    refused("1x1: weight", lambda: ff.concat_conv1x1([X], maps(2, 6, 1, 1)), "weight must have shape [2, 3, 1, 1]"),
    refused("1x1: a 3x3 weight", lambda: ff.concat_conv1x1([X], maps(2, 3, 3, 3)), "weight must have shape"),
    refused("1x1: one map unstacked", lambda: ff.concat_conv1x1(X, maps(2, 3, 1, 1)), "features[0] must have 4 dim"),
    refused("1x1: a scale alone", lambda: product(scale=maps(6)), "given together, shift is missing; give both or"),
    refused("1x1: a shift alone", lambda: product(shift=maps(6)), "given together, scale is missing; give both or"),
    refused("1x1: scale of one map", lambda: product(maps(3), maps(6)), "scale must have shape [6] for these features"),
    refused("1x1: shift that broadcasts", lambda: product(maps(6), maps(1)), "shift must have shape [6]"),
    refused("1x1: scale as a map", lambda: product(maps(6, 1, 1), maps(6)), "scale must have 1 dimensions"),
    refused("1x1: scale as a number", lambda: product(1.0, maps(6)), "scale must be a tensor, not float", TypeError),
    refused("1x1: integers", lambda: product(maps(6), maps(6).long()), "shift must be a floating-point", TypeError),
    refused("1x1: shift elsewhere", lambda: product(maps(6), maps(6, device="meta")), "shift is on meta"),
]
TRANSFORM = [
    refused("no stage", lambda: ff.deep_to_shallow(X, []), "stages must hold at least one"),
    refused("three dimensions", lambda: ff.deep_to_shallow(X[0], [stage()]), "x must have 4 dimensions"),
    refused("integers", lambda: ff.deep_to_shallow(INTEGERS, [stage()]), "x must be a floating-point", TypeError),
    refused("channels do not fit x", lambda: ff.deep_to_shallow(X, [stage(4)]), "stages[0].weight must be [3,"),
    refused("no chain", lambda: ff.deep_to_shallow(X, [stage(), stage()]), "stages[1].weight must be [2,"),
    refused("kernel of 4", lambda: ff.deep_to_shallow(X, [stage(kernel=4)]), "stages[0].weight must be"),
    refused("norm", lambda: ff.deep_to_shallow(X, [stage(norm_channels=3)]), "stages[0].norm.weight must have"),
    refused("a size too many", lambda: ff.deep_to_shallow(X, [stage()], sizes=[(16, 16), (8, 8)]), "sizes must hold 1"),
    refused("rows too high", lambda: ff.deep_to_shallow(X, [stage()], sizes=[(9, 8)]), "sizes: a map of size 4"),
    refused("columns too few", lambda: ff.deep_to_shallow(X, [stage()], sizes=[(8, 6)]), "sizes: a map of size 4"),
]
NORMED = [
    refused("three dimensions", lambda: norm_act(X[0]), "x must have 4 dimensions"),
    refused("integers", lambda: norm_act(INTEGERS), "x must be a floating-point", TypeError),
    refused("norm of other width", lambda: norm_act(channels=4), "norm.weight must have shape [3]"),
    refused("one value per channel", lambda: norm_act(X[:1, :, :1, :1], training=True), "norm takes batch statistics"),
    refused("a shape that broadcasts", lambda: norm_act(residual=X[:1]), "residual must have the shape of x, [2, 3, 4"),
    refused("a residual elsewhere", lambda: norm_act(residual=ELSEWHERE), "residual is on meta"),
    refused("a residual of other dtype", lambda: norm_act(residual=X.half()), "residual is torch.float16", TypeError),
    refused("no network", lambda: norm_act(attention_groups=0), "attention_groups must divide the 3 channels"),
    refused("networks of other width", lambda: norm_act(attention_groups=2), "attention_groups must divide the 3"),
]
CONVOLUTION = [
    refused("a map of integers", lambda: convolve(INTEGERS), "x must be a floating-point", TypeError),
    refused("rows", lambda: convolve(maps(2, 3)), "x must have 4 dimensions"),
    refused("a weight elsewhere", lambda: convolve(weight=maps(2, 3, 3, 3, device="meta")), "weight is on meta"),
    refused("no group", lambda: convolve(groups=0), "groups must be at least 1, not 0"),
    refused("no stride", lambda: convolve(stride=0), "stride must be at least 1, not 0"),
    refused("an even kernel", lambda: convolve(weight=maps(2, 3, 2, 2)), "a square kernel of odd size"),
    refused("an oblong kernel", lambda: convolve(weight=maps(2, 3, 3, 1)), "a square kernel of odd size"),
    refused("channels that do not divide", lambda: convolve(groups=2), "does not fit x [2, 3, 4, 4] in 2 groups"),
    refused("a weight of other channels", lambda: convolve(weight=maps(2, 4, 3, 3)), "in 1 groups: it must be"),
    refused(
        "outputs that do not divide", lambda: convolve(maps(2, 6, 4, 4), maps(3, 3, 3, 3), groups=2), "in 2 groups"
    ),
    refused(
        "another dtype without autocast",
        lambda: convolve(weight=maps(2, 3, 3, 3, dtype=torch.float16), backend="triton"),
        "weight is torch.float16, x torch.float32; convert one of them or use autocast",
        TypeError,
    ),
]
FEATURES = [
    refused("no student", lambda: ff.feature_mse([], X), "features must hold at least one"),
    refused("a target missing", lambda: ff.feature_mse([X, X, X], [X, X]), "one target, or one for each of 3"),
    refused(
        "channels differ", lambda: ff.feature_mse([X], maps(2, 4, 4, 4)), "features[0] [2, 3, 4, 4] and its target"
    ),
    refused("a stack missing", lambda: ff.feature_mse(X, X), "features[0] must have 4 dimensions"),
    refused("integers", lambda: ff.feature_mse([X], INTEGERS), "target of student 0 must be a floating", TypeError),
    refused("target elsewhere", lambda: ff.feature_mse([X], ELSEWHERE), "target of student 0 is on meta"),
    refused("aggregate: no map", lambda: aggregate([]), "maps must hold 1 to 24 maps, not 0"),
    refused("aggregate: too many", lambda: aggregate([X] * 25), "maps must hold 1 to 24 maps, not 25"),
    refused("aggregate: channels differ", lambda: aggregate([X, maps(2, 4, 4, 4)]), "maps[1] [2, 4, 4, 4] must"),
    refused("aggregate: integers", lambda: aggregate([INTEGERS, X]), "maps[0] must be a floating-point", TypeError),
    refused("aggregate: a map elsewhere", lambda: aggregate([X, ELSEWHERE]), "maps[1] is on meta"),
    refused("aggregate: a single map", lambda: aggregate(X), "maps[0] must have 4 dimensions"),
    refused("aggregate: target rows", lambda: aggregate([X, X], target=maps(2, 4)), "target must have 4 dimensions"),
    refused("aggregate: a weight missing", lambda: aggregate([X, X, X]), "weights must have shape [3]"),
    refused("aggregate: one weight", lambda: aggregate([X], torch.ones(())), "weights must have 1 dimensions"),
    refused("aggregate: weights as a list", lambda: aggregate([X], [1.0]), "weights must be a tensor", TypeError),
    refused("aggregate: weights elsewhere", lambda: aggregate([X], maps(1, device="meta")), "weights is on meta"),
    refused(
        "aggregate: losses per sample",
        lambda: ff.aggregate_distance([X], maps(1), X, reduction="none"),
        "reduction is 'mean' or 'sum', not 'none'",
    ),
    refused("KL: no student", lambda: kl([]), "features must hold at least one"),
    refused("KL: another size", lambda: kl(target=maps(2, 3, 4, 5)), "features[0] [2, 3, 4, 4] and its target"),
    refused("KL: temperature 0", lambda: kl(temperature=0.0), "temperature must be positive, not 0.0"),
    refused("KL: over nothing known", lambda: kl(over="samples"), "over is 'positions' or 'channels', not 'samples'"),
]


@pytest.mark.parametrize(
    ("call", "message", "error"),
    [*ATTENTION, *NORMALIZED_LP, *DIVERSITY, *PEERS, *FUSION, *TRANSFORM, *CONVOLUTION, *NORMED, *FEATURES],
)
def test_refused_with_the_argument_named(call, message, error):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
