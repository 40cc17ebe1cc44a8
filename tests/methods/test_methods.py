"""What every method promises the loop: students, heads, groups, the deployed network; and the terms of DML."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.methods import METHODS, Method, build_method
from fastfuse.methods.dml import DML
from fastfuse.methods.independent import Independent
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests.losses import published
from tests.losses.batches import differing
from tests.methods import making

CLASSES, BATCH = 6, 4
MINIMUM = {"ffsd": 2, "ffl": 2, "one": 2, "dml": 2}  # of all others one
DEPLOYED = {"ffsd": "leader", "paraphraser": "paraphraser", "dfa-search": "aggregation"}  # of all others student0
EXTRA_HEADS = {"ffsd": {"fusion", "leader"}, "ffl": {"fusion"}, "ffcl": {"fusion", "teacher"}, "one": {"gated"}}
EXTRA_HEADS |= {"paraphraser": {"teacher"}}


def make(name: str, students: int = 2, **options: float) -> Method:
    return making.make(name, students, num_classes=CLASSES, **options)


def batch(dtype: torch.dtype = torch.float32, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, size, size, dtype=dtype), torch.randint(CLASSES, (BATCH,))


@pytest.fixture(params=METHODS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=making.WITH_STUDENTS)
def student_name(request) -> str:
    return request.param


def test_all_methods_are_known_by_their_names() -> None:
    assert {*MINIMUM, *DEPLOYED, *EXTRA_HEADS} <= set(METHODS)
    assert all(cls.name == name for name, cls in METHODS.items())


def test_too_few_and_too_many_students_are_refused(name: str) -> None:
    least, most = MINIMUM.get(name, 1), METHODS[name].maximum_students
    make(name, least)
    with pytest.raises(InputError, match=f"{name} needs at least {least} students, not {least - 1}"):
        make(name, least - 1)
    if most is not None:
        with pytest.raises(InputError, match=f"{name} trains at most {most} student, not {most + 1}"):
            build_method(name, model="resnet8", students=most + 1, num_classes=CLASSES)


@pytest.mark.parametrize(("method", "students"), [(DML, 1), (Independent, 0)])
def test_too_few_students_are_refused_without_the_builder_too(method: type[Method], students: int) -> None:
    with pytest.raises(InputError, match="needs at least"):
        method([lambda: models.build("resnet8", CLASSES)] * students, CLASSES)


def test_unknown_method_lists_the_near_ones() -> None:
    with pytest.raises(InputError, match="unknown method 'ffsdd': did you mean ffsd"):
        build_method("ffsdd", model="resnet8", students=2, num_classes=CLASSES)


def test_unknown_hyperparameter_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InputError) as caught:
        make(name, lambda_fusio=1.0)
    text = str(caught.value)
    assert name in text and "lambda_fusio" in text
    assert all(known in text for known in METHODS[name].defaults) and (METHODS[name].defaults or "none" in text)


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        ("ffsd", {"lambda_fusion": -1.0}, "lambda_fusion"),
        ("ffsd", {"diversity_mode": "shifted"}, "diversity_mode"),
        ("ffl", {"temperature": 0.0}, "temperature"),
        ("dml", {"temperature": 0.0}, "temperature"),
    ],
)
def test_unusable_hyperparameters_are_refused_before_training(method: str, wrong: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(method, **wrong)


@pytest.mark.parametrize("method", ["ffl", "one"])
@pytest.mark.parametrize("model", ["resnet9", "resnet8x"])
def test_branches_of_an_unknown_model_are_refused(method: str, model: str) -> None:
    with pytest.raises(InputError, match=model):
        build_method(method, model=model, students=2, num_classes=CLASSES)


def test_defaults_are_what_a_method_runs_with() -> None:
    # What is no hyper-parameter of the loss decides which networks there are.
    networks = {"sharing": "shared", "branch_stage": None}
    for name in ("ffsd", "ffl"):
        defaults = METHODS[name].defaults
        assert {key: defaults[key] for key in networks if key in defaults} == (networks if name == "ffl" else {})
        own = {key: value for key, value in defaults.items() if key not in networks}
        assert make(name).criterion.hyperparameters == own
        assert make(name, temperature=5.0).criterion.hyperparameters == own | {"temperature": 5.0}
    assert make("ffl").peers.stage == 2
    assert make("dml").temperature == METHODS["dml"].defaults["temperature"] == 2.0


@pytest.mark.parametrize("students", [2, 3, 4])
def test_heads_of_training_and_prediction(student_name: str, students: int) -> None:
    name = student_name
    method = make(name, students)
    images, labels = batch()
    common = [f"student{i}" for i in range(making.students_of(name, students))]
    assert method.students() == common
    output = method(images, labels, torch.tensor(0.0))
    assert set(output.logits) == {*common, *EXTRA_HEADS.get(name, ())}
    assert all(row.shape == (BATCH, CLASSES) and not row.requires_grad for row in output.logits.values())
    assert output.loss.item() == pytest.approx(sum(t.item() for t in output.terms.values()), rel=1e-5)
    assert not any(term.requires_grad for term in output.terms.values())
    method.eval()
    with torch.no_grad():
        predicted = method.predict(images)
    assert set(predicted) == {*common, *EXTRA_HEADS.get(name, ())}
    assert method.deployed in predicted
    rows = list(predicted.values())
    assert not any(torch.equal(rows[0], row) for row in rows[1:]), "heads are networks of their own"


def test_prediction_leaves_the_method_as_it_was(name: str) -> None:
    method = make(name).eval()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with torch.no_grad():
        method.predict(batch()[0])
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_prediction_in_training_heads(name: str) -> None:
    """The rows of a training step and of `predict` under one name belong to the same network."""
    method = make(name, 3).double()
    images, labels = batch(torch.float64)
    frozen = published.scramble(method).eval()
    trained = frozen(images, labels, torch.tensor(0.0)).logits
    predicted = frozen.predict(images)
    for head, row in trained.items():
        torch.testing.assert_close(predicted[head], row, msg=head)


@pytest.mark.parametrize("model", ["resnet8", "wrn10_1"])
def test_the_deployed_network_is_an_ordinary_one(student_name: str, model: str) -> None:
    name = student_name
    method = making.make(name, 3, model=model, num_classes=CLASSES).double()
    images, labels = batch(torch.float64)
    TrainStep(method, build_optimizers(method))(images, labels, torch.tensor(0.0))
    assert method.deployed == DEPLOYED.get(name, "student0")
    plain = models.build(model, CLASSES).double()
    plain.load_state_dict(method.deployed_state(), strict=True)
    method.eval()
    with torch.no_grad():
        # Not bit for bit: the convolution's kernel may follow the alignment of its weights.
        torch.testing.assert_close(
            plain.eval()(images).logits, method.predict(images)[method.deployed], rtol=1e-10, atol=1e-10
        )


def test_networks_are_the_methods_own(student_name: str) -> None:
    """What is loaded into one of them is loaded into the method."""
    method = make(student_name).eval()
    images, _ = batch()
    before = method.predict(images)[method.deployed]
    for network in method.networks().values():
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.1)
    assert not torch.equal(method.predict(images)[method.deployed], before)
    own = {id(p) for p in method.parameters()}
    assert all(id(p) in own for network in method.networks().values() for p in network.parameters())


@pytest.mark.parametrize("given", [{}, {"lr": 0.3, "weight_decay": 5e-4}], ids=["published", "others"])
def test_each_parameter_is_in_exactly_one_group(name: str, given: dict) -> None:
    method = make(name, 3)
    sgd, adam = method.parameter_groups(**given)
    grouped = Counter(id(p) for group in (*sgd, *adam) for p in group["params"])
    assert set(grouped.values()) == {1}
    assert set(grouped) == {id(p) for p in method.parameters()}
    for key, parameter in method.named_parameters():
        group = next(g for g in (*sgd, *adam) if any(parameter is p for p in g["params"]))
        if key == "betas":
            assert (group["lr"], group["weight_decay"], "momentum" in group) == (3e-4, 1e-3, False), key
        elif ".transforms." in key:
            assert (group["lr"], group["weight_decay"], "momentum" in group) == (1e-3, 1e-4, False), key
        elif key == "betas":
            assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-4, 1e-3, (0.5, 0.999))
        else:
            decay = 1e-5 if ".fusion." in key else given.get("weight_decay", 1e-4)
            assert (group["lr"], group["weight_decay"]) == (given.get("lr", 0.1), decay), key
            assert (group["momentum"], group["nesterov"]) == (0.9, True), key


def test_progress_reaches_the_ramps() -> None:
    images, labels = batch(torch.float64)
    for name, term, factor in (("ffsd", "leader_fusion", 0.0408), ("ffl", "student0_kl", 0.0067)):
        method = published.scramble(make(name).double()).eval()
        early, late = (method(images, labels, torch.tensor(p, dtype=torch.float64)).terms for p in (0.0, 80.0))
        assert (early[term] / late[term]).item() == pytest.approx(factor, abs=5e-5)


@pytest.mark.parametrize("students", [2, 3])
def test_dml_terms_equal_the_formulas(students: int) -> None:
    method = make("dml", students, temperature=2.5).double()
    images, labels = batch(torch.float64)
    rows = [peer(images).logits for peer in copy.deepcopy(method).peers]
    output = method(images, labels, torch.tensor(0.0))
    wanted = {f"student{i}_ce": published.cross_entropy(row, labels) for i, row in enumerate(rows)}
    for i, row in enumerate(rows):
        peers = [published.kl(row, rows[j].detach(), 2.5) for j in range(students) if j != i]
        wanted[f"student{i}_dml"] = sum(peers) / (students - 1)
    assert {n: t.item() for n, t in output.terms.items()} == pytest.approx({n: t.item() for n, t in wanted.items()})


def test_dml_gradients_come_from_the_own_loss_alone() -> None:
    method = make("dml", 3).double()
    images, labels = batch(torch.float64)
    alone = copy.deepcopy(method)
    method(images, labels, torch.tensor(0.0)).loss.backward()
    rows = [peer(images).logits for peer in alone.peers]
    for i, peer in enumerate(alone.peers):
        own = published.cross_entropy(rows[i], labels)
        own = own + sum(published.kl(rows[i], rows[j].detach(), 2.0) for j in range(3) if j != i) / 2
        wanted = torch.autograd.grad(own, list(peer.parameters()), retain_graph=True)
        for ours, theirs in zip(method.peers[i].parameters(), wanted, strict=True):
            torch.testing.assert_close(ours.grad, theirs, rtol=1e-9, atol=1e-12)


def test_independent_networks_do_not_see_each_other() -> None:
    """Three trained together end as each of them trained alone."""
    together = make("independent", 3).double()
    alone = [make("independent", 1).double() for _ in range(3)]
    for i, single in enumerate(alone):
        single.peers[0].load_state_dict(together.peers[i].state_dict())
    steps = [TrainStep(method, build_optimizers(method)) for method in (together, *alone)]
    for _ in range(3):
        images, labels = batch(torch.float64)
        for step in steps:
            step(images, labels, torch.tensor(0.0))
    for i, single in enumerate(alone):
        # The convolution's kernel may follow the alignment of its weights: equal but for the last bits.
        assert differing(together.peers[i].state_dict(), single.peers[0].state_dict(), 1e-10) == {}, f"student{i}"


def test_dml_and_independent_differ_by_the_peers_alone() -> None:
    images, labels = batch(torch.float64)
    dml, independent = make("dml").double(), make("independent").double()
    independent.load_state_dict(dml.state_dict(), strict=True)
    ours, plain = dml(images, labels, torch.tensor(0.0)).terms, independent(images, labels, torch.tensor(0.0)).terms
    assert {n: ours[n].item() for n in plain} == pytest.approx({n: t.item() for n, t in plain.items()}, rel=1e-12)
    assert set(ours) - set(plain) == {"student0_dml", "student1_dml"}
