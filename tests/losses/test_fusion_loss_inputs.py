"""What `FusionLoss` refuses, and that the text names the argument and says how to mend it."""

import math

import pytest
import torch

from fastfuse import FusionLoss
from fastfuse.errors import InputError
from tests.losses import batches

STAGED = [4, 6, 8]
# arguments of the constructor, what the text must hold
CONSTRUCTION = {
    "no such method": ({"method": "ffds"}, ["method", "ffds", "ffsd"]),
    "no such feature term": ({"feature": "atention"}, ["feature", "atention", "attention"]),
    "one student": ({"feature_channels": [8]}, ["ffsd", "at least 2 students", "1 given"]),
    "one sub-network": ({"feature_channels": [8], "method": "ffl"}, ["ffl", "at least 2"]),
    "no student": ({"feature_channels": []}, ["at least 2", "0 given"]),
    "no channels": ({"feature_channels": [[], []]}, ["channels", "positive integers"]),
    "zero channels": ({"feature_channels": [0, 8]}, ["channels", "0"]),
    "channels that are no integers": ({"feature_channels": [8.0, 8.0]}, ["channels", "8.0"]),
    "zero channels of the leader": ({"leader_channels": [4, -6, 8]}, ["channels", "-6"]),
    "students of other depths": ({"feature_channels": [8, STAGED]}, ["equally many stages", "[1, 3]"]),
    "a leader of another depth": ({"leader_channels": STAGED}, ["equally many stages", "[1, 1, 3]"]),
    "ffl with a leader": ({"method": "ffl", "leader_channels": 8}, ["ffl", "leader_channels", "ffsd"]),
    "no class": ({"num_classes": 0}, ["num_classes", "at least 1", "0"]),
    "ffl has no lambda": ({"method": "ffl", "lambda_fusion": 10.0}, ["ffl", "lambda_fusion", "temperature"]),
    "ffl has no diversity": ({"method": "ffl", "diversity_mode": "published"}, ["ffl", "diversity_mode"]),
    "ffsd has no target offset": ({"kl_target_epsilon": 1e-7}, ["ffsd", "kl_target_epsilon", "lambda_diversity"]),
    "temperature 0": ({"temperature": 0.0}, ["temperature", "above 0", "0.0"]),
    "negative temperature": ({"temperature": -1.0}, ["temperature", "-1.0"]),
    "temperature nan": ({"temperature": math.nan}, ["temperature", "nan"]),
    "negative weight": ({"lambda_fusion": -10.0}, ["lambda_fusion", "-10.0"]),
    "infinite weight": ({"lambda_diversity": math.inf}, ["lambda_diversity", "finite", "inf"]),
    "negative ramp": ({"rampup_epochs": -5}, ["rampup_epochs", "-5"]),
    "negative offset": ({"method": "ffl", "kl_target_epsilon": -1e-7}, ["kl_target_epsilon", "-1e-07"]),
    "no such diversity": ({"diversity_mode": "normalised"}, ["diversity_mode", "normalised", "normalized"]),
    "negative feature weight": ({"feature": "mse", "feature_weight": -1.0}, ["feature_weight", "-1.0"]),
    "feature temperature 0": ({"feature": "kl", "feature_temperature": 0.0}, ["feature_temperature", "above 0"]),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_refused_at_construction(case: str) -> None:
    arguments, wanted = CONSTRUCTION[case]
    with pytest.raises(InputError) as caught:
        FusionLoss(**({"feature_channels": [8, 8], "num_classes": 5} | arguments))
    _names(caught, wanted)


def _names(caught: pytest.ExceptionInfo, wanted: list[str]) -> None:
    text = str(caught.value)
    assert "\n" not in text
    assert [part for part in wanted if part not in text] == [], text


def x(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def _replace(given: dict, key: str, index: int, value: object) -> None:
    given[key] = [value if i == index else v for i, v in enumerate(given[key])]


def _with(key: str, value: object, index: int | None = None):
    return lambda given: given.update({key: value}) if index is None else _replace(given, key, index, value)


# what is changed in a good batch of 4 (students and leader [4, 6, 8] channels, maps of 8, 4 and 2), error, text
FORWARD = {
    "too few features": (lambda g: g.update(features=g["features"][:1]), InputError, ["2 students", "1", "features"]),
    "too many logits": (lambda g: g.update(logits=[*g["logits"], x(4, 5)]), InputError, ["3 of logits"]),
    "no leader": (
        lambda g: [g.pop(k) for k in ("leader_features", "leader_logits")],
        InputError,
        ["leader_features", "leader_logits", "needed"],
    ),
    "leader without logits": (lambda g: g.pop("leader_logits"), InputError, ["leader_logits", "needed"]),
    "leader without maps": (lambda g: g.pop("leader_features"), InputError, ["leader_features", "needed"]),
    "too few stages": (
        lambda g: _replace(g, "features", 1, g["features"][1][-1]),
        InputError,
        ["features[1]", "3 maps", "1"],
    ),
    "leader's stages": (
        lambda g: g.update(leader_features=g["leader_features"][1:]),
        InputError,
        ["leader_features", "3 maps", "2"],
    ),
    "stages deep to shallow": (
        lambda g: _replace(g, "features", 0, g["features"][0][::-1]),
        InputError,
        ["features[0], stage 0", "4", "8"],
    ),
    "channels": (
        _with("features", [x(4, 4, 8, 8), x(4, 6, 4, 4), x(4, 9, 2, 2)], 1),
        InputError,
        ["features[1], stage 2", "9"],
    ),
    "pooled features": (
        _with("leader_features", [x(4, 4, 8, 8), x(4, 6, 4, 4), x(4, 8)]),
        InputError,
        ["leader_features, stage 2", "[B, 8, H, W]", "[4, 8]"],
    ),
    "no tensor": (
        _with("features", [None, x(4, 6, 4, 4), x(4, 8, 2, 2)], 0),
        TypeError,
        ["features[0], stage 0", "NoneType"],
    ),
    "integer maps": (
        _with("features", [x(4, 4, 8, 8), x(4, 6, 4, 4), torch.ones(4, 8, 2, 2, dtype=torch.int64)], 0),
        TypeError,
        ["features[0], stage 2", "int64"],
    ),
    "another dtype than the parameters": (
        _with("features", [m.float() for m in (x(4, 4, 8, 8), x(4, 6, 4, 4), x(4, 8, 2, 2))], 1),
        TypeError,
        ["features[1], stage 0", "float32", "float64", "autocast"],
    ),
    "another device than the parameters": (
        _with("leader_features", [x(4, 4, 8, 8, device="meta"), x(4, 6, 4, 4), x(4, 8, 2, 2)]),
        InputError,
        ["leader_features", "meta", "cpu"],
    ),
    "batch of a deep map": (
        _with("features", [x(4, 4, 8, 8), x(4, 6, 4, 4), x(3, 8, 2, 2)], 1),
        InputError,
        ["features[1]", "[3, 8, 2, 2]", "4"],
    ),
    "batch of a shallow map": (
        _with("leader_features", [x(5, 4, 8, 8), x(4, 6, 4, 4), x(4, 8, 2, 2)]),
        InputError,
        ["leader_features", "[5, 4, 8, 8]", "4"],
    ),
    "resolution of a student's last map": (
        _with("features", [x(4, 4, 16, 16), x(4, 6, 8, 8), x(4, 8, 4, 4)], 1),
        InputError,
        ["features[1]", "[4, 8, 4, 4]", "features[0]", "[4, 8, 2, 2]", "resize"],
    ),
    "resolution of the leader's last map": (
        _with("leader_features", [x(4, 4, 16, 16), x(4, 6, 8, 8), x(4, 8, 4, 4)]),
        InputError,
        ["leader_features", "[4, 8, 4, 4]", "features[0]"],
    ),
    "stages that are no halving": (
        _with("leader_features", [x(4, 4, 16, 16), x(4, 6, 4, 4), x(4, 8, 2, 2)]),
        InputError,
        ["16", "half"],
    ),
    "classes": (_with("logits", x(4, 6), 1), InputError, ["logits[1]", "[B, 5]", "[4, 6]"]),
    "leader's classes": (_with("leader_logits", x(4, 4)), InputError, ["leader_logits", "[B, 5]", "[4, 4]"]),
    "logits of one sample": (_with("logits", x(5), 0), InputError, ["logits[0]", "[5]"]),
    "batch of logits": (_with("logits", x(3, 5), 1), InputError, ["logits[1]", "[3, 5]", "4"]),
    "integer logits": (
        _with("leader_logits", torch.ones(4, 5, dtype=torch.int64)),
        TypeError,
        ["leader_logits", "floating-point", "int64"],
    ),
    "dtype of logits": (_with("logits", x(4, 5).float(), 1), TypeError, ["logits[1]", "float32", "float64"]),
    "dtype of leader's logits": (_with("leader_logits", x(4, 5).half()), TypeError, ["leader_logits", "float16"]),
    "logits that are no tensor": (_with("logits", [0.0] * 5, 1), TypeError, ["logits[1]", "list"]),
    "logits elsewhere": (_with("logits", x(4, 5, device="meta"), 1), InputError, ["logits[1]", "meta"]),
    "batch of labels": (_with("labels", torch.zeros(3, dtype=torch.int64)), InputError, ["labels", "[3]", "4"]),
    "a single label": (_with("labels", torch.tensor(1)), InputError, ["labels", "[]"]),
    "one-hot labels": (_with("labels", torch.zeros(4, 5, dtype=torch.int64)), InputError, ["labels", "[4, 5]", "[4]"]),
    "floating-point labels": (_with("labels", torch.zeros(4)), TypeError, ["labels", "int64", "float32"]),
    "labels elsewhere": (
        _with("labels", torch.zeros(4, dtype=torch.int64, device="meta")),
        InputError,
        ["labels", "meta", "cpu"],
    ),
}


@pytest.mark.parametrize("case", FORWARD)
def test_refused_batches(case: str) -> None:
    change, error, wanted = FORWARD[case]
    loss = FusionLoss([STAGED] * 2, batches.CLASSES, leader_channels=STAGED).double()
    given = batches.arguments([STAGED] * 2, STAGED)
    loss(**given)
    change(given)
    with pytest.raises(error) as caught:
        loss(**given)
    _names(caught, wanted)


@pytest.mark.parametrize("name", ["leader_features", "leader_logits"])
@pytest.mark.parametrize("method", ["ffsd", "ffl"])
def test_a_leader_is_refused_where_none_was_built(method: str, name: str) -> None:
    loss = FusionLoss([8, 8], batches.CLASSES, method=method).double()
    given = batches.arguments([8, 8])
    loss(**given)
    with pytest.raises(InputError, match="takes no leader"):
        loss(**given, **{name: x(4, 8, 2, 2) if name == "leader_features" else x(4, 5)})


def test_maps_too_small_for_diversity() -> None:
    loss = FusionLoss([8, 8], batches.CLASSES).double()
    with pytest.raises(InputError, match="at least 3 positions; use larger images"):
        loss(**batches.arguments([8, 8], deep=1))


def test_maps_of_another_dtype_run_under_autocast() -> None:
    """The dtype check is for forgotten conversions; autocast converts."""
    loss = FusionLoss([8, 8], batches.CLASSES)
    given = batches.arguments([8, 8])
    given = {k: [m.bfloat16() for (m,) in v] if k == "features" else v for k, v in given.items()}
    given["logits"] = [row.bfloat16() for row in given["logits"]]
    with pytest.raises(TypeError, match="autocast"):
        loss(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(**given).loss.isfinite()


def test_stacks_of_students_are_sequences_too() -> None:
    """[S, B, C, H, W] maps and [S, B, K] logits, as a batched pass over students gives them."""
    loss = FusionLoss([8, 8], batches.CLASSES).double().eval()
    given = batches.arguments([8, 8])
    stacked = given | {
        "features": torch.stack([m for (m,) in given["features"]]),
        "logits": torch.stack(given["logits"]),
    }
    assert loss(**stacked).loss.item() == pytest.approx(loss(**given).loss.item(), rel=1e-12)
