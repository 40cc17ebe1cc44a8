"""FFL with last maps of different sizes: learned regressors bring them together before anything reads them."""

import copy
import math

import pytest
import torch
from torch import Tensor

from fastfuse import FusionLoss
from fastfuse.errors import InputError
from tests.losses import batches, published

HYPER = {"temperature": 3.0, "kl_target_epsilon": 0.0}
# channels, sizes, which students have a regressor
CASES = {
    "half": ([6, 9], [8, 4], {"student0"}),
    "the smallest of three": ([4, 4, 5], [4, 3, 7], {"student0", "student2"}),
    "two alike and one larger": ([6, 6, 6], [4, 8, 4], {"student1"}),
    "neither is the smallest": ([5, 6], [(4, 2), (2, 4)], {"student0", "student1"}),
}


def prepared(case: str, **options: object) -> tuple[FusionLoss, dict]:
    channels, sizes, _ = CASES[case]
    torch.manual_seed(2)
    loss = FusionLoss(channels, batches.CLASSES, method="ffl", feature_sizes=sizes, **options).double()
    given = batches.arguments(channels)
    given["features"] = [batches.maps(4, c, size) for c, size in zip(channels, sizes, strict=True)]
    return published.scramble(loss), given


def gradients(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("feature", [None, "mse"])
@pytest.mark.parametrize("case", CASES)
def test_terms_gradients_and_statistics_equal_the_equations(case: str, feature: str | None) -> None:
    loss, given = prepared(case, feature=feature)
    assert set(loss.regressors) == CASES[case][2]
    state = published.trainable_copy(loss)
    maps = published.regress([own[-1] for own in given["features"]], state)
    frozen = dict(state)
    factor = math.exp(-5 * (1 - 30 / 80) ** 2)
    terms = published.flat(published.ffl(state, HYPER, maps, given["logits"], given["labels"], factor=factor))
    if feature:
        fused = published.fuse([m.detach() for m in maps], frozen, "fusion").detach()
        connected = []
        for i, x in enumerate(maps):
            prefix = f"connectors.student{i}"
            if f"{prefix}.conv.weight" in state:
                x = torch.einsum("oc,bchw->bohw", state[f"{prefix}.conv.weight"][:, :, 0, 0], x)
                x = published.batch_norm(x, state, f"{prefix}.norm", True)
            connected.append(x)
        terms["feature"] = sum(((x - fused) ** 2).sum() / x.numel() for x in connected)
    output = loss(**given, progress=30)
    assert set(output.terms) == set(terms)
    assert batches.differing(output.terms, {name: term.detach() for name, term in terms.items()}) == {}
    leaves = batches.leaves(given)
    ours = gradients(output.loss, leaves | dict(loss.named_parameters()))
    wanted = gradients(sum(terms.values()), leaves | {n: t for n, t in state.items() if t.requires_grad})
    assert set(ours) == set(wanted) and batches.differing(ours, wanted) == {}
    assert all(ours[f"regressors.{name}.conv.weight"].any() for name in loss.regressors)
    buffers = dict(loss.named_buffers())
    assert batches.differing(buffers, {name: t for name, t in state.items() if "running" in name}) == {}


@pytest.mark.parametrize("sizes", [None, [4, 4], [(4, 4), 4]], ids=str)
def test_where_sizes_agree_nothing_is_added(sizes) -> None:
    torch.manual_seed(7)
    plain = FusionLoss([6, 9], batches.CLASSES, method="ffl").double()
    torch.manual_seed(7)
    loss = FusionLoss([6, 9], batches.CLASSES, method="ffl", feature_sizes=sizes).double()
    assert list(loss.state_dict()) == list(plain.state_dict()) and not list(loss.regressors)
    given = batches.arguments([6, 9], deep=5)  # agreeing sizes bind nobody: maps may be of another size
    assert torch.equal(loss(**given).loss, plain(**given).loss)


def test_regressors_are_trained_as_connectors_are() -> None:
    loss, _ = prepared("half")
    sgd, adam = loss.parameter_groups(weight_decay=3e-4)
    own = {id(p) for p in loss.regressors.parameters()}
    groups = [group for group in sgd if own & {id(p) for p in group["params"]}]
    assert [group["weight_decay"] for group in groups] == [3e-4]
    assert sorted(id(p) for group in (*sgd, *adam) for p in group["params"]) == sorted(map(id, loss.parameters()))


def test_evaluation_leaves_the_statistics_alone() -> None:
    loss, given = prepared("half")
    before = {name: b.clone() for name, b in loss.eval().named_buffers()}
    assert loss(**given).loss.item() == loss(**given).loss.item()
    assert all(torch.equal(b, before[name]) for name, b in loss.named_buffers())


def test_compiles_as_one_graph() -> None:
    loss, given = prepared("the smallest of three")
    eager = copy.deepcopy(loss)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert batches.error(compiled(**given).loss.detach(), eager(**given).loss.detach()) <= 1e-12


CONSTRUCTION = {
    "too few sizes": ({"feature_sizes": [4]}, ["feature_sizes", "1 sizes for 2 students"]),
    "no size": ({"feature_sizes": [4, 0]}, ["feature_sizes", "at least 1", "0"]),
    "three extents": ({"feature_sizes": [4, (4, 4, 4)]}, ["feature_sizes", "(height, width)"]),
    "no integer": ({"feature_sizes": [4.0, (2.5, 2)]}, ["feature_sizes"]),
    "a leader with a larger map than a student's": (
        {"feature_sizes": [8, 4], "leader_size": 8, "leader_channels": 8, "method": "ffsd"},
        ["student 1 is 4x4", "leader's 8x8", "choose a leader"],
    ),
    "ffsd with a further term": (
        {"feature_sizes": [8, 4], "feature": "mse", "method": "ffsd"},
        ["ffsd has no feature='mse'", "several sizes"],
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_refused_at_construction(case: str) -> None:
    arguments, wanted = CONSTRUCTION[case]
    with pytest.raises(InputError) as caught:
        FusionLoss(**({"feature_channels": [8, 8], "num_classes": 5, "method": "ffl"} | arguments))
    assert [part for part in wanted if part not in str(caught.value)] == [], str(caught.value)


def test_a_map_of_another_size_than_was_said_is_refused() -> None:
    loss, given = prepared("half")
    given["features"][1] = batches.maps(4, 9, (4, 5))
    with pytest.raises(InputError, match=r"last map of features\[1\] is \[4, 9, 4, 5\]; feature_sizes says 4x4"):
        loss(**given)


def test_maps_that_differ_without_a_word_say_how_to_mend_it() -> None:
    loss = FusionLoss([8, 8], batches.CLASSES, method="ffl").double()
    given = batches.arguments([8, 8])
    given["features"][1] = batches.maps(4, 8, 4)
    with pytest.raises(InputError, match="give the loss the feature_sizes, or resize it first"):
        loss(**given)


def test_ffsd_takes_equal_sizes() -> None:
    assert FusionLoss([8, 8], 5, method="ffsd", feature_sizes=[4, (4, 4)]).feature_sizes is None
