"""FFL in all its forms: branches from any stage, separate networks of any architectures, widths and map sizes."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.methods import Method, build_method
from fastfuse.methods.ffl import FFL
from fastfuse.models._blocks import NetworkOutput, pooled
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests import replay
from tests.losses import published
from tests.losses.batches import differing, error
from tests.methods.making import replicas_differing

CLASSES, BATCH = 6, 4


class Coarse(nn.Module):
    """A network of others without stages: one map of an eighth of the extent, rounded up."""

    feature_channels = (12,)

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 7, stride=8, padding=3)
        self.norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, images: Tensor) -> NetworkOutput:
        deep = torch.relu(self.norm(self.conv(images)))
        return NetworkOutput(self.fc(pooled(deep)), (deep,))


def maker(name: str) -> Callable[[], nn.Module]:
    return Coarse if name == "coarse" else lambda: models.build(name, CLASSES)


def separate(*names: str, image_size: int | tuple[int, int] | None = None, **options: object) -> FFL:
    makers = [maker(name) for name in names]
    return FFL(makers, CLASSES, sharing="separate", image_size=image_size, **options).double().train()


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, size, size, dtype=torch.float64), torch.randint(CLASSES, (BATCH,))


@pytest.fixture(scope="module")
def recording(golden: Path) -> replay.Recording:
    return replay.Recording(golden / "ffl_resnet20.npz", golden / "ffl_resnet20.json")


def of_recording(recording: replay.Recording, form: str) -> Method:
    """The recorded method with its initial state, in other forms that compute the same."""
    method, networks, _ = replay.build(recording)
    config = recording.config
    hyper = {
        "temperature": config["temperature"],
        "rampup_epochs": config["consistency_rampup"],
        "kl_target_epsilon": config["kl_target_epsilon"],
    }
    classes = networks["fusion"].classifier.out_features
    if form == "branch_stage=2":
        other = build_method("ffl", model="resnet20", students=2, num_classes=classes, branch_stage=2, **hyper)
        other.load_state_dict(method.state_dict(), strict=True)
        return other.double().train()
    # Separate networks, in both of which the modules of one trunk stand.
    both = [models.build("resnet20", classes).double() for _ in range(2)]
    for i, network in enumerate(both):
        network.load_state_dict(method.peers.state_of(i), strict=True)
    for name, _ in method.peers.trunk[0].named_children():
        both[1].add_module(name, getattr(both[0], name))
    other = FFL([lambda own=own: own for own in both], classes, sharing="separate", image_size=32, **hyper).double()
    other.criterion.load_state_dict(method.criterion.state_dict(), strict=True)
    return other.train()


@pytest.mark.parametrize("form", ["branch_stage=2", "separate networks that hold one trunk"])
def test_every_form_that_reduces_to_the_recorded_one_reproduces_it(form: str, recording: replay.Recording) -> None:
    _, _, settings = replay.build(recording)
    method = of_recording(recording, form)
    step = TrainStep(method, build_optimizers(method, **settings))
    for recorded in recording.steps:
        output = step(*recording.batch(recorded["batch"]), torch.tensor(float(recorded["epoch"]), dtype=torch.float64))
        wanted = replay.recorded_terms("ffl", recorded)
        errors = replay.term_errors(replay.our_terms(output.loss, output.terms), wanted)
        assert {name: e for name, e in errors.items() if not e <= replay.BOUND} == {}


@pytest.mark.parametrize(
    ("names", "size", "regressors"),
    [
        pytest.param(("resnet8", "resnet8"), 16, 0, id="one architecture"),
        pytest.param(("resnet8", "wrn10_1", "resnet14"), 16, 0, id="three architectures"),
        pytest.param(("resnet8", "wrn10_2"), 12, 0, id="other widths"),
        pytest.param(("resnet8", "coarse"), 16, 1, id="other widths and map sizes: 4 to 2"),
        pytest.param(("coarse", "resnet8", "densenet10_4"), 20, 2, id="5 to 3, two regressors"),
    ],
)
def test_separate_networks_train_by_the_equations(names: tuple[str, ...], size: int, regressors: int) -> None:
    method = separate(*names, image_size=size, kl_target_epsilon=1e-7)
    assert len(method.criterion.regressors) == regressors
    alone = copy.deepcopy(list(method.peers))
    state = published.trainable_copy(method.criterion)
    images, labels = batch(size)
    outputs = [network(images) for network in alone]
    maps = [output.features[-1] for output in outputs]
    for name, regressor in method.criterion.regressors.items():
        i = int(name.removeprefix("student"))
        weight = state[f"regressors.{name}.conv.weight"]
        maps[i] = nn.functional.conv2d(maps[i], weight, stride=regressor.conv.stride)
        maps[i] = published.batch_norm(maps[i], state, f"regressors.{name}.norm", True)
    hyper = {"temperature": 3.0, "kl_target_epsilon": 1e-7}
    factor = math.exp(-5 * (1 - 7 / 80) ** 2)
    wanted = published.flat(published.ffl(state, hyper, maps, [o.logits for o in outputs], labels, factor=factor))
    output = method(images, labels, torch.tensor(7.0, dtype=torch.float64))
    assert differing(output.terms, {name: term.detach() for name, term in wanted.items()}, 1e-9) == {}
    output.loss.backward()
    sum(wanted.values()).backward()
    off = {}
    for i, (ours, theirs) in enumerate(zip(method.peers, alone, strict=True)):
        own = dict(theirs.named_parameters())
        off |= {f"{i}.{name}": error(p.grad, own[name].grad) for name, p in ours.named_parameters()}
    off |= {name: error(p.grad, state[name].grad) for name, p in method.criterion.named_parameters()}
    # A bias ahead of a batch norm has no gradient but rounding.
    assert {name: e for name, e in off.items() if e > 1e-8 and not ("conv" in name and name.endswith("bias"))} == {}


def made(form: str) -> Method:
    if form == "ffsd":
        return build_method("ffsd", model="resnet8", students=2, num_classes=CLASSES).double().train()
    if form == "separate":
        return separate("resnet8", "coarse", image_size=16)
    return build_method("ffl", model="resnet8", students=2, num_classes=CLASSES).double().train()


@pytest.mark.parametrize(("form", "reached"), [("shared", True), ("separate", True), ("ffsd", False)])
def test_the_fused_heads_gradient_reaches_the_networks_in_ffl_and_not_in_ffsd(form: str, reached: bool) -> None:
    """What the networks get with the fusion head's input as it is, and with a detached one."""
    method = made(form)
    detached = copy.deepcopy(method)
    given = detached.criterion.fusion.given
    detached.criterion.fusion.given = lambda features, *counters: given([x.detach() for x in features], *counters)
    images, labels = batch()
    for each in (method, detached):
        each(images, labels, torch.tensor(3.0)).loss.backward()
    pairs = zip(method.peers.named_parameters(), detached.peers.parameters(), strict=True)
    # Classifiers of the networks themselves do not lie below the fused map.
    changed = {name: not torch.equal(own.grad, other.grad) for (name, own), other in pairs if "fc." not in name}
    assert len(changed) > 10 and set(changed.values()) == {reached}


@pytest.mark.parametrize("students", [2, 3, 4, 5])
@pytest.mark.parametrize("sharing", ["shared", "separate"])
def test_any_number_of_students(students: int, sharing: str) -> None:
    method = build_method("ffl", model="resnet8", students=students, num_classes=CLASSES, sharing=sharing).train()
    images, labels = torch.randn(BATCH, 3, 8, 8), torch.randint(CLASSES, (BATCH,))
    output = method(images, labels, torch.tensor(0.0))
    assert set(output.logits) == {*(f"student{i}" for i in range(students)), "fusion"}
    assert len(output.terms) == 2 * (students + 1)
    assert method.criterion.fusion.depthwise.weight.shape[0] == 64 * students


@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param("resnet8", {"branch_stage": 1}, id="resnet8 from stage 1"),
        pytest.param("wrn10_1", {}, id="wrn10_1"),
        pytest.param("densenet10_4", {"branch_stage": 1}, id="densenet10_4 from stage 1"),
        pytest.param("googlenet", {}, id="googlenet"),
        pytest.param("wrn10_1", {"sharing": "separate"}, id="separate wrn10_1"),
        pytest.param(f"{__name__}:Coarse", {"sharing": "separate"}, id="separate networks of others"),
    ],
)
def test_after_training_the_deployed_network_is_its_plain_self(model: str, options: dict) -> None:
    method = build_method("ffl", model=model, students=2, num_classes=CLASSES, **options).double().train()
    before = copy.deepcopy(method.state_dict())
    step = TrainStep(method, build_optimizers(method, lr=0.02))
    for _ in range(2):
        step(*batch(8), torch.tensor(0.0, dtype=torch.float64))
    assert [name for name, p in method.named_parameters() if torch.equal(p, before[name])] == []
    plain = models.build(model, CLASSES).double()
    plain.load_state_dict(method.deployed_state(), strict=True)
    images, _ = batch(8)
    with torch.no_grad():
        found, wanted = plain.eval()(images).logits, method.eval().predict(images)["student0"]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_grouped_separate_networks_are_those_of_the_loop() -> None:
    method = separate("resnet8", "resnet8", "resnet8")
    grouped = copy.deepcopy(method)
    assert grouped.arrange("grouped") == "grouped"
    steps = [TrainStep(each, build_optimizers(each, lr=0.02)) for each in (method, grouped)]
    for _ in range(2):
        images, labels = batch(8)
        ours, wanted = [step(images, labels, torch.tensor(9.0, dtype=torch.float64)) for step in steps[::-1]]
        assert differing(ours.terms, wanted.terms, 1e-9) == {}
    assert differing(grouped.state_dict(), method.state_dict(), 1e-8) == {}
    assert differing(grouped.deployed_state(), method.deployed_state(), 1e-8) == {}


def test_networks_of_several_architectures_run_one_after_another() -> None:
    method = separate("resnet8", "coarse", image_size=16)
    with pytest.raises(InputError, match="--strategy loop"):
        method.arrange("grouped")
    assert method.arrange("auto") == "loop"


@pytest.mark.parametrize("names", [("resnet8", "resnet8"), ("resnet8", "coarse")], ids=str)
def test_replicas_are_runs_of_their_own(names: tuple[str, ...]) -> None:
    methods = [separate(*names, image_size=16) for _ in range(2)]
    strategy = "grouped" if len(set(names)) == 1 else "loop"
    assert replicas_differing(methods, strategy, [batch() for _ in methods]) == {}


def test_heads_of_evaluation_read_regressed_maps() -> None:
    method = separate("resnet8", "coarse", image_size=16).eval()
    images, labels = batch()
    with torch.no_grad():
        predicted = method.predict(images)
        trained = method(images, labels, torch.tensor(0.0)).logits
    assert differing(predicted, trained, 1e-12) == {} and set(predicted) == {"student0", "student1", "fusion"}


def test_a_step_with_regressors_is_one_graph() -> None:
    method = separate("resnet8", "coarse", image_size=16)
    images, labels = batch()
    progress = torch.tensor(5.0, dtype=torch.float64)
    wanted = copy.deepcopy(method)(images, labels, progress).loss
    torch._dynamo.reset()
    found = torch.compile(method, fullgraph=True, backend="eager")(images, labels, progress).loss
    assert error(found.detach(), wanted.detach()) <= 1e-12


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_steps_with_regressors_train_everything(amp: str) -> None:
    method = separate("resnet8", "coarse", image_size=16).float()
    step = TrainStep(method, build_optimizers(method), amp=amp)
    images, labels = batch()
    output = step(images.float(), labels, torch.tensor(3.0))
    assert output.loss.isfinite() and output.loss.dtype == torch.float32
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("makers", "options", "says"),
    [
        pytest.param(["resnet8"], {}, "ffl needs at least 2 students, not 1", id="one"),
        pytest.param(["resnet8"] * 2, {"sharing": "seperate"}, "--sharing .*did you mean separate", id="misspelt"),
        pytest.param(
            ["resnet8"] * 2,
            {"sharing": "separate", "branch_stage": 2},
            "--branch-stage .*leave it out with --sharing separate",
            id="a stage without a trunk",
        ),
        pytest.param(["resnet8"] * 2, {"branch_stage": 3}, "--branch-stage must be 1 to 2", id="no branch left"),
        pytest.param(
            ["resnet8", "resnet14"], {}, "one architecture.*--sharing separate", id="two architectures, shared"
        ),
        pytest.param(["coarse"] * 2, {}, "Coarse has no stages .*--sharing separate", id="no stages, shared"),
        pytest.param(
            ["resnet8", "coarse"],
            {"sharing": "separate", "image_size": 0},
            "images of 0x0 do not suit",
            id="images that no network takes",
        ),
    ],
)
def test_refusals_say_what_to_do(makers: list[str], options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        FFL([maker(name) for name in makers], CLASSES, **options)


def test_map_sizes_that_nobody_looked_up_are_refused_in_the_first_batch() -> None:
    with pytest.raises(InputError, match=r"features\[1\].* must have the height and width"):
        separate("resnet8", "coarse")(*batch(), torch.tensor(0.0))


def test_finding_the_sizes_changes_nothing() -> None:
    """Neither a statistic, nor a mode, nor a random number."""
    torch.manual_seed(3)
    blind = separate("resnet8", "resnet8")
    after = torch.rand(1)
    torch.manual_seed(3)
    method = separate("resnet8", "resnet8", image_size=(16, 12))
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(x, blind.state_dict()[name]) for name, x in method.state_dict().items())
    assert all(module.training for module in method.modules())
