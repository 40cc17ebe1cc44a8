"""ONE: a whole step against the equations, what each term trains, and what is deployed."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.methods import METHODS, build_method
from fastfuse.methods.one import ONE
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests.losses import published
from tests.losses.batches import differing, error
from tests.methods.making import replicas_differing

CLASSES, BATCH = 6, 5


def make(students: int = 3, model: str = "resnet8", **options: object) -> ONE:
    method = build_method("one", model=model, students=students, num_classes=CLASSES, **options).double().train()
    with torch.no_grad():  # a gate that is no mean
        method.gate.norm.weight.uniform_(0.5, 2.0)
        method.gate.norm.bias.uniform_(-0.5, 0.5)
    return method


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, size, size, dtype=torch.float64), torch.randint(CLASSES, (BATCH,))


def written_out(
    method: ONE, images: Tensor, labels: Tensor, progress: float
) -> tuple[dict[str, Tensor], nn.ModuleList]:
    """The terms from whole networks, and these; the gate and the loss once more from the equations."""
    plain = nn.ModuleList(models.build("resnet8", CLASSES).double() for _ in method.peers.branches)
    for i, network in enumerate(plain):
        network.load_state_dict(method.peers.state_of(i), strict=True)
    outputs = [network(images) for network in plain]
    gate = published.trainable_copy(method.gate)
    shared = outputs[0].features[method.branch_stage - 1]
    scores = shared.mean((2, 3)) @ gate["linear.weight"].T + gate["linear.bias"]
    centred = scores - scores.mean(0)
    normed = centred / ((centred**2).mean(0) + 1e-5).sqrt() * gate["norm.weight"] + gate["norm.bias"]
    weights = normed.clamp_min(0).exp()
    weights = weights / weights.sum(1, keepdim=True)
    ensemble = sum(weights[:, i : i + 1] * output.logits for i, output in enumerate(outputs))
    ramp = math.exp(-5 * (1 - min(progress, 80) / 80) ** 2)
    terms = {"gated_ce": published.cross_entropy(ensemble, labels)}
    for i, output in enumerate(outputs):
        terms[f"student{i}_ce"] = published.cross_entropy(output.logits, labels)
        terms[f"student{i}_kl"] = ramp * published.kl(output.logits, ensemble, 3.0)
    plain.gate = gate
    return terms, plain


@pytest.mark.parametrize("stage", [None, 1])
@pytest.mark.parametrize("students", [2, 3, 5])
def test_a_step_equals_the_equations(students: int, stage: int | None) -> None:
    method = make(students, branch_stage=stage)
    images, labels = batch()
    wanted, plain = written_out(method, images, labels, 30.0)
    output = method(images, labels, torch.tensor(30.0, dtype=torch.float64))
    assert set(output.terms) == set(wanted)
    assert differing(output.terms, {name: term.detach() for name, term in wanted.items()}, 1e-10) == {}
    output.loss.backward()
    sum(wanted.values()).backward()
    off = {}
    for name, parameter in method.peers.trunk[0].named_parameters():
        off[name] = error(parameter.grad, sum(network.get_parameter(name).grad for network in plain))
    for i, branch in enumerate(method.peers.branches):
        off |= {f"{i}.{n}": error(p.grad, plain[i].get_parameter(n).grad) for n, p in branch.named_parameters()}
    for name, parameter in method.gate.named_parameters():
        if name != "linear.bias":  # ahead of a batch norm it has no gradient but rounding
            off[name] = error(parameter.grad, plain.gate[name].grad)
    assert {name: e for name, e in off.items() if not e <= 1e-8} == {}


@pytest.mark.parametrize(
    ("term", "trained"),
    [
        ("student1_ce", {"trunk", "branches.1"}),
        ("student1_kl", {"trunk", "branches.1"}),
        ("gated_ce", {"trunk", "branches.0", "branches.1", "branches.2", "gate"}),
    ],
)
def test_each_term_trains_what_it_should(term: str, trained: set[str], monkeypatch) -> None:
    """With all other terms left out of the sum."""
    from fastfuse.losses import one

    whole = one.terms
    monkeypatch.setattr(one, "terms", lambda *args, **kwargs: {term: whole(*args, **kwargs)[term]})
    method = make()
    method(*batch(), torch.tensor(3.0, dtype=torch.float64)).loss.backward()
    found = set()
    for name, parameter in method.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            own = name.removeprefix("peers.").split(".")
            found.add(".".join(own[:2]) if own[0] == "branches" else own[0])
    assert found == trained


def test_steps_train_everything_and_deploy_the_plain_network() -> None:
    method = make(model="wrn10_1", branch_stage=1)
    before = copy.deepcopy(method.state_dict())
    step = TrainStep(method, build_optimizers(method, lr=0.02))
    for _ in range(2):
        step(*batch(), torch.tensor(3.0, dtype=torch.float64))
    assert [name for name, p in method.named_parameters() if torch.equal(p, before[name])] == []
    plain = models.build("wrn10_1", CLASSES).double()
    assert list(plain.state_dict()) != [] and set(method.deployed_state()) == set(plain.state_dict())
    plain.load_state_dict(method.deployed_state(), strict=True)
    images, _ = batch()
    with torch.no_grad():
        found, wanted = plain.eval()(images).logits, method.eval().predict(images)
    torch.testing.assert_close(found, wanted["student0"], rtol=1e-10, atol=1e-10)
    assert list(wanted) == ["student0", "student1", "student2", "gated"]


def test_published_numbers() -> None:
    assert METHODS["one"].default_students == 3
    assert METHODS["one"].defaults == {
        "temperature": 3.0,
        "rampup_epochs": 80,
        "kl_target_epsilon": 0.0,
        "branch_stage": None,
    }
    method = make()
    assert method.branch_stage == 2 and method.gate.linear.weight.shape == (3, 32)


@pytest.mark.parametrize(
    ("students", "options", "says"),
    [
        pytest.param(1, {}, "one needs at least 2 students, not 1", id="one branch"),
        pytest.param(3, {"temperature": 0.0}, "--temperature must be .*above 0, not 0.0", id="no temperature"),
        pytest.param(3, {"rampup_epochs": -1}, "--rampup-epochs must be", id="a ramp below 0"),
        pytest.param(3, {"kl_target_epsilon": math.nan}, "--kl-target-epsilon must be .*nan", id="no number"),
        pytest.param(3, {"branch_stage": 0}, "--branch-stage must be 1 to 2", id="nothing shared"),
    ],
)
def test_refusals_say_what_to_do(students: int, options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make(students, **options)


@pytest.mark.parametrize("model", ["resnet8", "wrn10_1"])
def test_replicas_in_one_pass_are_runs_of_their_own(model: str) -> None:
    methods = [make(2, model) for _ in range(2)]
    assert replicas_differing(methods, "grouped", [batch() for _ in methods]) == {}
