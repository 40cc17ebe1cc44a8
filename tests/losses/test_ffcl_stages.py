"""FFCL with several fused stages and with copies in a loop of one's own: sizes that differ, groups, what is refused."""

import copy
import math

import pytest
import torch

from fastfuse import FusionLoss
from fastfuse.errors import InputError
from tests.losses import batches, published
from tests.losses.test_ffcl_terms import HYPER, equations, gradients

CHANNELS = [[3, 4], [5, 9]]
# Sizes of each peer's two maps, shallow to deep; where there is a regressor.
SIZES = {
    "both stages differ": ([[8, 4], [4, 2]], {"student0", "student0_2"}),
    "the shallow one differs": ([[(8, 6), 2], [(4, 6), 2]], {"student0_2"}),
    "the deep one differs": ([[4, 2], [4, 4]], {"student1"}),
}


def built(**options: object) -> FusionLoss:
    torch.manual_seed(2)
    loss = FusionLoss(CHANNELS, batches.CLASSES, method="ffcl", **{**HYPER, "fused_stages": 2, **options})
    return published.scramble(loss.double())


@pytest.mark.parametrize("case", SIZES)
def test_maps_of_each_stage_meet_at_their_smallest_size(case: str) -> None:
    sizes, regressors = SIZES[case]
    loss = built(feature_sizes=sizes, feature_distance="mse")
    assert set(loss.regressors) == regressors
    assert set(loss.connectors) == {"student0", "student0_2"}
    given = batches.arguments(CHANNELS)
    given["features"] = [
        [batches.maps(4, c, size)[0] for c, size in zip(channels, own, strict=True)]
        for channels, own in zip(CHANNELS, sizes, strict=True)
    ]
    state = published.trainable_copy(loss)
    hyper = {**HYPER, "fused_stages": 2, "feature_distance": "mse"}
    factor = math.exp(-5 * (1 - 30 / 80) ** 2)
    terms = equations(state, hyper, given, factor, together=lambda maps, depth: published.regress(maps, state, depth))
    output = loss(**given, progress=30)
    assert set(output.terms) == set(terms)
    assert batches.differing(output.terms, {name: term.detach() for name, term in terms.items()}) == {}
    ours = gradients(output.loss, batches.leaves(given) | dict(loss.named_parameters()))
    wanted = batches.leaves(given) | {name: t for name, t in state.items() if t.requires_grad}
    assert set(ours) == set(wanted) and batches.differing(ours, gradients(sum(terms.values()), wanted)) == {}
    given["features"][1][0] = batches.maps(4, 5, 7)[0]
    with pytest.raises(InputError, match=r"features\[1\], stage -2, is \[4, 5, 7, 7\]"):
        loss(**given)


def test_every_head_has_logits_and_a_group() -> None:
    loss, given = built(feature_distance="mse"), batches.arguments(CHANNELS)
    loss.eval()  # as in training, where they would move statistics twice
    output, shown = loss(**given), loss.fused_heads(given["features"])
    assert list(shown) == list(loss.fusions()) == ["fusion", "fusion2"]
    given_out = dict(zip(shown, (output.fused_logits, *output.shallow_logits), strict=True))
    assert all(row.shape == (4, batches.CLASSES) and not row.requires_grad for row in given_out.values())
    assert batches.differing(given_out, shown, 1e-12) == {}
    assert batches.error(given_out["fusion2"], given_out["fusion"]) > 1e-3
    groups = loss.parameter_groups(weight_decay=3e-4).sgd
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == len(list(loss.parameters()))
    for name, p in loss.named_parameters():
        assert decays[id(p)] == (3e-4 if name.startswith("connectors") else 1e-5), name


@pytest.mark.parametrize(("feature", "distance", "connected"), [("attention", "mse", 2), ("mse", "attention", 1)])
def test_the_further_term_is_one_of_the_last_stage(feature: str, distance: str, connected: int) -> None:
    loss, given = built(feature=feature, feature_distance=distance), batches.arguments(CHANNELS)
    without = built(feature_distance=distance)
    assert len(loss.connectors) == connected
    output = loss(**given)
    assert set(output.terms) - set(without(**given).terms) == {"feature"}
    found = gradients(output.loss, dict(loss.named_parameters()))
    assert [name for name, g in found.items() if g is None or not g.any()] == []


def test_the_last_stage_alone_is_what_it_was_without_the_option() -> None:
    """The same draws, names and numbers, bit for bit, whether shallower maps are given or not."""
    torch.manual_seed(3)
    plain = FusionLoss([4, 9], batches.CLASSES, method="ffcl")
    torch.manual_seed(3)
    listed = FusionLoss(CHANNELS, batches.CLASSES, method="ffcl", fused_stages=1, feature_distance="attention")
    assert list(plain.state_dict()) == list(listed.state_dict())
    assert all(torch.equal(x, listed.state_dict()[key]) for key, x in plain.state_dict().items())
    given = batches.arguments(CHANNELS)
    last = {**given, "features": [maps[-1] for maps in given["features"]]}
    assert torch.equal(plain.double()(**last).loss, listed.double()(**given).loss)


def test_compiles_as_one_graph() -> None:
    loss, given = built(feature_distance="mse", regularization="self"), batches.arguments(CHANNELS)
    given["copy_logits"] = [batches.logits(4) for _ in CHANNELS]
    eager = copy.deepcopy(loss)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert batches.error(compiled(**given).loss.detach(), eager(**given).loss.detach()) <= 1e-12


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        ({"regularization": "self"}, {}, "needs copy_logits, those of each student's trained copy"),
        ({}, {"copy_logits": [torch.zeros(4, 5)] * 2}, "read with regularization='self' alone"),
        ({"regularization": "self"}, {"copy_logits": [torch.zeros(4, 5)]}, "1 entries for 2 students"),
        ({"regularization": "self"}, {"copy_logits": [torch.zeros(4, 6)] * 2}, r"copy_logits\[0\] must be \[B, 5\]"),
    ],
)
def test_copies_that_do_not_fit_are_refused(options: dict, given: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        built(**options)(**batches.arguments(CHANNELS), **given)


@pytest.mark.parametrize("sizes", [[8, 4], [[8, 4], [8]], [[8, 4, 2], [8, 4, 2]]])
def test_sizes_are_those_of_every_fused_stage(sizes: list) -> None:
    with pytest.raises(InputError, match="feature_sizes must have the sizes of the 2 fused stages of each student"):
        built(feature_sizes=sizes)


def test_other_methods_have_none_of_it() -> None:
    for option in ({"fused_stages": 1}, {"feature_distance": "mse"}):
        with pytest.raises(InputError, match=f"ffl has no {next(iter(option))}"):
            FusionLoss([8, 8], 5, method="ffl", **option)
