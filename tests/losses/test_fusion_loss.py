"""`FusionLoss` as a user drops it in: output, parameters, state, precision, compilation."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastfuse import FusionLoss, FusionLossOutput
from tests.losses import batches, published

STAGED = [4, 6, 8]
BUILDS = {
    "ffsd, all stages, leader": ("ffsd", [STAGED] * 2, STAGED),
    "ffsd, all stages, no leader": ("ffsd", [STAGED] * 2, None),
    "ffsd, last maps, leader": ("ffsd", [8, 8], 8),
    "ffsd, last maps, no leader": ("ffsd", [8, 8, 8], None),
    "ffsd, every network of other channels": ("ffsd", [[4, 6, 8], [3, 5, 9]], [5, 7, 6]),
    "ffl": ("ffl", [8, 8], None),
    "ffl, sub-networks of other channels": ("ffl", [6, 9, 4], None),
}


@pytest.fixture(params=BUILDS)
def built(request) -> tuple[FusionLoss, dict]:
    """A loss in float64 with every optional part that it can have, and a batch."""
    method, students, leader = BUILDS[request.param]
    loss = FusionLoss(students, batches.CLASSES, method=method, leader_channels=leader, feature="mse")
    return published.scramble(loss.double()), batches.arguments(students, leader)


def gradients(loss: FusionLoss, total: Tensor, given: dict) -> dict[str, Tensor | None]:
    leaves = batches.leaves(given) | dict(loss.named_parameters())
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))


def test_output(built) -> None:
    loss, given = built
    output = loss(**given)
    assert isinstance(output, FusionLossOutput)
    assert output.loss.dim() == 0 and output.loss.requires_grad
    for name, term in output.terms.items():
        assert term.dim() == 0 and not term.requires_grad, name
    assert output.loss.item() == pytest.approx(sum(t.item() for t in output.terms.values()), rel=1e-14)
    assert output.fused_logits.shape == (4, batches.CLASSES) and not output.fused_logits.requires_grad
    assert torch.isfinite(output.loss)


def test_every_parameter_and_logit_learns(built) -> None:
    loss, given = built
    unused = {f"student0.maps.{stage}" for stage in range(len(given["features"][0]) - 1)}
    found = gradients(loss, loss(**given).loss, given)
    assert {n for n, g in found.items() if g is None or not g.any()} == unused


def test_a_bare_map_equals_a_list_of_one() -> None:
    loss = FusionLoss([8, 8], batches.CLASSES, leader_channels=8).double()
    listed = FusionLoss([[8], [8]], batches.CLASSES, leader_channels=[8]).double()
    listed.load_state_dict(loss.state_dict())
    given = batches.arguments([8, 8], 8)
    bare = given | {"features": [m for (m,) in given["features"]], "leader_features": given["leader_features"][0]}
    assert loss(**bare).loss.item() == pytest.approx(listed(**given).loss.item(), rel=1e-12)


def test_last_maps_alone_leave_out_self_distillation_and_nothing_else() -> None:
    staged = published.scramble(FusionLoss([STAGED] * 2, batches.CLASSES, leader_channels=STAGED).double())
    last = FusionLoss([8, 8], batches.CLASSES, leader_channels=8).double()
    missing, unexpected = last.load_state_dict(staged.state_dict(), strict=False)
    assert not missing and all(key.startswith("transforms.") for key in unexpected)
    given = batches.arguments([STAGED] * 2, STAGED)
    everything = staged(**given).terms
    only_last = {
        "features": [maps[-1] for maps in given["features"]],
        "leader_features": given["leader_features"][-1],
    }
    terms = last(**(given | only_last)).terms
    left_out = set(everything) - set(terms)
    assert left_out == {
        "student1_self_distillation",
        "leader_self_distillation",
        "transform1_feature",
        "transform1_attention",
        "transform_leader_feature",
        "transform_leader_attention",
    }
    assert batches.differing(everything, terms, 1e-12) == {}


def test_parameter_groups_hold_each_parameter_once_with_the_published_settings(built) -> None:
    loss, _ = built
    sgd, adam = loss.parameter_groups()
    grouped = [id(p) for group in (*sgd, *adam) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in loss.parameters()}
    weight_decays = {}
    for name, parameter in loss.named_parameters():
        for group in sgd:
            if any(parameter is p for p in group["params"]):
                assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.9, True)
                weight_decays[name.partition(".")[0]] = group["weight_decay"]
        for group in adam:
            if any(parameter is p for p in group["params"]):
                assert name.startswith("transforms.")
                assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-4)
    published_decays = {"fusion": 1e-5, "trans_fusion": 1e-4, "connectors": 1e-4}
    assert weight_decays == {name: published_decays[name] for name in weight_decays}
    assert "fusion" in weight_decays
    torch.optim.SGD(sgd, lr=1.0)
    if adam:
        torch.optim.Adam(adam, lr=1.0)


def test_parameter_groups_take_other_settings() -> None:
    loss = FusionLoss([STAGED] * 2, 5, leader_channels=STAGED)
    settings = {
        "lr": 0.2,
        "momentum": 0.8,
        "nesterov": False,
        "weight_decay": 3e-4,
        "fusion_weight_decay": 4e-4,
        "transform_lr": 5e-4,
        "transform_weight_decay": 6e-4,
    }
    sgd, adam = loss.parameter_groups(**settings)
    values = [{k: v for k, v in group.items() if k != "params"} for group in (*sgd, *adam)]
    common = {"lr": 0.2, "momentum": 0.8, "nesterov": False}
    assert values == [
        common | {"weight_decay": 4e-4},
        common | {"weight_decay": 3e-4},
        {"lr": 5e-4, "weight_decay": 6e-4},
    ]


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _fusion_keys(prefix: str) -> set[str]:
    convolutions = {f"{prefix}.depthwise.weight", f"{prefix}.pointwise.weight"}
    return convolutions | {f"{prefix}.norm{i}.{key}" for i in (1, 2) for key in NORM}


def test_state_dict_keys_are_readable_and_stable() -> None:
    """Checkpoints carry these names: a change of them breaks every saved run."""
    loss = FusionLoss([STAGED, [4, 6, 5], STAGED], 5, leader_channels=STAGED, feature="mse")
    expected = _fusion_keys("fusion") | {"fusion.classifier.weight", "fusion.classifier.bias"}
    expected |= _fusion_keys("trans_fusion")
    for name in ("student1", "student2", "leader"):
        for stage in (0, 1):
            prefix = f"transforms.{name}.stages.{stage}"
            expected |= {f"{prefix}.deconv.weight"} | {f"{prefix}.norm.{key}" for key in NORM}
    expected |= {"connectors.student1.conv.weight"} | {f"connectors.student1.norm.{key}" for key in NORM}
    assert set(loss.state_dict()) == expected
    assert set(FusionLoss([8, 8], 5, method="ffl").state_dict()) == {
        *_fusion_keys("fusion"),
        "fusion.classifier.weight",
        "fusion.classifier.bias",
    }


def test_state_dict_restores_the_loss(built) -> None:
    loss, given = built
    loss(**given)
    restored = copy.deepcopy(loss)
    for p in restored.parameters():
        nn.init.normal_(p)
    restored.load_state_dict(loss.state_dict(), strict=True)
    assert restored(**given).loss.item() == pytest.approx(loss(**given).loss.item(), rel=1e-12)


def test_eval_mode_leaves_running_statistics_alone(built) -> None:
    loss, given = built
    loss.eval()
    before = {name: b.clone() for name, b in loss.named_buffers()}
    first, second = loss(**given).loss, loss(**given).loss
    assert first.item() == second.item()
    assert all(torch.equal(b, before[name]) for name, b in loss.named_buffers())


def test_bfloat16_autocast_trains_every_parameter_with_float32_losses(built) -> None:
    """Also the transforms, whose weights are used twice in one step, first without gradients."""
    loss, given = built
    loss.float()
    exact = {n: _converted(v, torch.float32) for n, v in given.items()}
    wanted = copy.deepcopy(loss)(**exact)
    half = {n: _converted(v, torch.bfloat16) for n, v in given.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loss(**half)
    assert output.loss.dtype == torch.float32
    assert {t.dtype for t in output.terms.values()} == {torch.float32}
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=0.02)
    output.loss.backward()
    missing = [n for n, p in loss.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    assert all(p.grad.any() for p in loss.parameters())
    assert all(leaf.grad.isfinite().all() for leaf in batches.leaves(half).values() if leaf.grad is not None)


def _converted(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.detach().to(dtype).requires_grad_() if value.is_floating_point() else value
    return [_converted(v, dtype) for v in value]


@pytest.mark.parametrize("case", ["ffsd, all stages, leader", "ffsd, every network of other channels", "ffl"])
def test_compiles_as_one_graph_for_any_progress(case: str) -> None:
    method, students, leader = BUILDS[case]
    torch.manual_seed(5)
    loss = FusionLoss(students, batches.CLASSES, method=method, leader_channels=leader, feature="kl").double()
    given = batches.arguments(students, leader)
    eager = copy.deepcopy(loss)
    # Settings of the process are read at the first call.
    copy.deepcopy(loss)(**given, progress=torch.tensor(0.0, dtype=torch.float64))
    counter = CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for progress in (0.0, 2.0, 100.0):
        progress = torch.tensor(progress, dtype=torch.float64)
        output, wanted = compiled(**given, progress=progress), eager(**given, progress=progress)
        assert batches.error(output.loss.detach(), wanted.loss.detach()) <= 1e-12
        ours, theirs = gradients(loss, output.loss, given), gradients(eager, wanted.loss, given)
        assert batches.differing(ours, theirs) == {}
    assert counter.frame_count == 1, "another progress must not compile again"
    for name, buffer in loss.named_buffers():
        assert batches.error(buffer.double(), dict(eager.named_buffers())[name].double()) <= 1e-12, name


def test_channels_last_maps_give_the_same_values(built) -> None:
    loss, given = built
    other = copy.deepcopy(loss)
    turned = given | {"features": [_channels_last(maps) for maps in given["features"]]}
    if "leader_features" in given:
        turned["leader_features"] = _channels_last(given["leader_features"])
    assert other(**turned).loss.item() == pytest.approx(loss(**given).loss.item(), rel=1e-12)


def _channels_last(maps: list[Tensor]) -> list[Tensor]:
    return [m.detach().contiguous(memory_format=torch.channels_last) for m in maps]
