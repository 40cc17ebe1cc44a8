"""The baseline of the speed claims computes what the published program computes, and waits for the host as it does."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import report, run
from benchmarks.counting import count_step
from benchmarks.programs import Start
from benchmarks.published import PublishedFFSD, cross_network_kl, diversity_target, warmup
from benchmarks.timing import Timing, measure_in_turn
from fastfuse.methods import build_method
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

GOLDEN = Path(__file__).parent / "golden" / "ffsd_resnet20_s2"
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def replayed():
    """The recording, the terms of a run from its initial state in float64, and the networks after it."""
    recording = json.loads(GOLDEN.with_suffix(".json").read_text())
    arrays = np.load(GOLDEN.with_suffix(".npz"))
    config = recording["config"]
    optimizer_options = ("lr", "momentum", "weight_decay")
    loss_options = ("temperature", "lambda_diversity", "lambda_fusion", "lambda_self_distillation")
    baseline = PublishedFFSD(
        config["model"],
        students=config["num_students"],
        num_classes=arrays["init/leader/fc.bias"].size,
        dtype=torch.float64,
        **{name: config[name] for name in optimizer_options + loss_options},
    )
    baseline.load(arrays)
    terms = []
    for step in recording["steps"]:
        images = torch.from_numpy(arrays[f"x{step['batch']}"]).double()
        labels = torch.from_numpy(arrays[f"y{step['batch']}"])
        terms.append(baseline.step(images, labels, epoch=step["epoch"]))
    return recording, terms, baseline


def test_every_term_of_every_step_is_the_recorded_one(replayed):
    recording, steps, _ = replayed
    for number, (recorded, ours) in enumerate(zip(recording["steps"], steps, strict=True)):
        assert set(ours) == set(recorded["terms"])
        for name, wanted in recorded["terms"].items():
            got, wanted = np.atleast_1d(ours[name]), np.atleast_1d(wanted)
            assert got.shape == wanted.shape, name
            # A recorded 0 leaves no room: there the bound is 0 too.
            assert (np.abs(got - wanted) <= TOLERANCE * np.abs(wanted)).all(), f"step {number}, {name}: {got} {wanted}"


def test_every_parameter_and_buffer_ends_at_the_recorded_one(replayed):
    recording, _, baseline = replayed
    states = {name: network.state_dict() for name, network in baseline.networks.items()}
    ours = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
    assert set(ours) == set(recording["final_state"])
    for key, (wanted_sum, wanted_norm) in recording["final_state"].items():
        tensor = ours[key].double()
        assert abs(tensor.norm().item() - wanted_norm) <= TOLERANCE * wanted_norm, key
        assert abs(tensor.sum().item() - wanted_sum) <= TOLERANCE * tensor.numel() ** 0.5 * wanted_norm, key


@pytest.mark.parametrize(
    ("model", "students", "size"),
    [
        pytest.param("resnet8", 2, 16, id="the-published-number-of-students"),
        pytest.param("resnet8", 3, 16, id="a-chain-of-references-and-a-mean-over-two-peers"),
        pytest.param("wrn10_1", 2, 16, id="signed-maps-and-biased-convolutions"),
        pytest.param("resnet18", 2, 64, id="imagenet-four-stages"),
    ],
)
def test_a_step_moves_every_network_and_waits_for_every_term(model, students, size):
    torch.manual_seed(0)
    baseline = PublishedFFSD(model, students=students, num_classes=7)
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in baseline.networks.items()}
    images, labels = torch.randn(4, 3, size, size), torch.randint(7, (4,))
    terms = baseline.step(images, labels, epoch=1)
    for name, net in baseline.networks.items():
        assert all(not torch.equal(old, new) for old, new in zip(before[name], net.parameters(), strict=True)), name
    assert len(terms["student_total"]) == students and len(terms["transform_feature"]) == students - 1
    assert np.isfinite(np.hstack([np.atleast_1d(value) for value in terms.values()])).all()

    counts = count_step(lambda: baseline.step(images, labels, epoch=1), device=images.device)
    # Student 0 has three terms and the others five; fusion 3, leader 6, and two for each of the S transforms.
    assert counts.waits == 3 + 5 * (students - 1) + 3 + 6 + 2 * students
    assert counts.waits >= 10


@pytest.mark.parametrize(
    ("model", "students", "size"),
    [
        pytest.param("resnet18", 2, 64, id="imagenet-four-stages"),
        pytest.param("resnet8", 3, 16, id="cifar-three-stages"),
    ],
)
def test_engine_and_published_program_have_the_same_terms(model, students, size):
    """Two steps in float64, the second after an update of every network: two programs that share the networks alone."""
    torch.manual_seed(0)
    baseline = PublishedFFSD(model, students=students, num_classes=7, lr=0.01, dtype=torch.float64)
    method = build_method("ffsd", model=model, students=students, num_classes=7).double().train()
    states = {name: network.state_dict() for name, network in baseline.networks.items()}
    Start.load(SimpleNamespace(states=states), method)
    step = TrainStep(method, build_optimizers(method, lr=0.01))
    images, labels = torch.randn(3, 3, size, size, dtype=torch.float64), torch.randint(7, (3,))
    for number in range(2):
        wanted = by_network(baseline.step(images, labels, epoch=2))
        found = step(images, labels, torch.tensor(1.0, dtype=torch.float64)).terms
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            assert found[name].item() == pytest.approx(value, rel=TOLERANCE, abs=0), f"step {number}, {name}"


def by_network(terms):
    """The terms of the published program under the engine's names: one value each, and without sums."""
    found = {}
    for name, value in terms.items():
        kind, _, term = name.partition("_")
        if isinstance(value, list):
            first = 0 if kind == "student" else 1
            found |= {f"{kind}{i}_{term}": own for i, own in enumerate(value, first)}
        else:
            found[name] = value
    absent = ("student0_diversity", "student0_self_distillation")
    return {name: value for name, value in found.items() if not name.endswith("_total") and name not in absent}


@pytest.mark.parametrize(("model", "waits"), [("resnet18", 3 + 3 + 3 + 6 + 4), ("resnet8", 3 + 5 + 3 + 6 + 4)])
def test_imagenets_trainer_leaves_out_what_weighs_nothing(model, waits):
    baseline = PublishedFFSD(model, students=2, num_classes=7, lambda_diversity=0.0)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(7, (2,))
    assert count_step(lambda: baseline.step(images, labels, epoch=1), device=images.device).waits == waits


def test_networks_learn_from_nobody_but_their_own_loss():
    torch.manual_seed(0)
    baseline = PublishedFFSD("resnet8", students=2, num_classes=5, lr=0.0)
    images, labels = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
    baseline.step(images, labels, epoch=6)
    # With the leader's optimizer at rest the students' gradients must still be those of the students' own losses.
    wanted = [p.grad.clone() for p in baseline.networks["student0"].parameters()]
    logits = [baseline.networks[f"student{i}"](images).logits for i in range(2)]
    loss = torch.nn.functional.cross_entropy(logits[0], labels) + cross_network_kl(logits[0], logits[1], 2.0)
    got = torch.autograd.grad(loss, list(baseline.networks["student0"].parameters()))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_diversity_target_leaves_the_weakest_positions_alone():
    torch.manual_seed(0)
    feature = torch.rand(2, 4, 4, 4, dtype=torch.float64) + 0.1
    moved = (diversity_target(feature) - feature).abs().amax(1).flatten(1) > 1e-12
    # k = floor(16 / 3) = 5: four positions lie below the threshold, one on it.
    assert moved.sum(1).tolist() == [12, 12]


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [
        pytest.param(1, 0.0408, id="first-epoch"),
        pytest.param(3, 0.4493, id="half-way"),
        pytest.param(5, 1.0, id="last-of-the-ramp"),
        pytest.param(200, 1.0, id="long-after"),
    ],
)
def test_warmup_is_the_published_ramp(epoch, factor):
    assert warmup(epoch) == pytest.approx(factor, abs=5e-5)


def test_the_faster_baseline_is_the_same_program_in_bfloat16():
    torch.manual_seed(0)
    published = PublishedFFSD("resnet8", students=2, num_classes=7, lr=0.01)
    faster = PublishedFFSD("resnet8", students=2, num_classes=7, lr=0.01, amp=True)
    for name, network in published.networks.items():
        faster.networks[name].load_state_dict(network.state_dict())
    seen = set()

    def note(layer, inputs, output):
        seen.add((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))
        # A backward belongs outside autocast, where its own operations keep the dtypes of the forward.
        output.register_hook(lambda gradient: seen.add(torch.is_autocast_enabled("cpu")))

    faster.networks["student0"].conv1.register_forward_hook(note)
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(7, (8,))
    slow, fast = (
        [program.step(x, labels, epoch=10) for _ in range(2)]
        for program, x in ((published, images), (faster, images.contiguous(memory_format=torch.channels_last)))
    )
    assert seen == {(torch.bfloat16, True), False}
    assert all(p.dtype == torch.float32 for network in faster.networks.values() for p in network.parameters())
    for ours, theirs in zip(fast, slow, strict=True):
        for name, wanted in theirs.items():
            # A rounding is 2^-8; distances between nearly equal logits keep little of their value, and are small.
            np.testing.assert_allclose(ours[name], wanted, rtol=2e-2, atol=2e-2, err_msg=name)


def test_one_student_is_refused():
    with pytest.raises(ValueError, match="at least 2, not 1"):
        PublishedFFSD("resnet8", students=1, num_classes=5)


def test_a_recording_that_lacks_a_key_is_refused(replayed):
    arrays = dict(np.load(GOLDEN.with_suffix(".npz")))
    del arrays["init/fusion/classifier.bias"]
    baseline = PublishedFFSD("resnet20", students=2, num_classes=100)
    with pytest.raises(RuntimeError, match=r"classifier\.bias"):
        baseline.load(arrays)


def test_counts_are_those_of_a_step_that_can_be_counted_by_hand():
    x = torch.ones(3, requires_grad=True)
    # Forward: mul, sum. Backward: ones_like for the root, mul. Views launch nothing; one value is read.
    counts = count_step(lambda: (x * 2.0).sum().backward() or x.detach()[0].item(), device=x.device)
    assert (counts.ops, counts.waits) == (4, 1)


def test_providers_take_turns_after_their_warmup():
    called = []
    providers = {name: lambda name=name: called.append(name) for name in "AB"}
    timings = measure_in_turn(providers, repeats=2, calls=1, warmup=2, device=torch.device("cpu"))
    assert "".join(called) == "AABB" + "ABAB"
    assert [len(timing.samples_ms) for timing in timings.values()] == [2, 2]
    assert all(t.quantile(0.2) <= t.median <= t.quantile(0.8) for t in timings.values())


@pytest.mark.parametrize(
    ("other", "overlap"),
    [
        pytest.param((5.0, 5.5, 6.0), False, id="slower-by-more-than-the-spread"),
        pytest.param((1.0, 1.5, 30.0), True, id="one-disturbed-turn"),
        pytest.param((1.1, 1.2, 1.3), True, id="within-the-other-range"),
    ],
)
def test_ranges_that_overlap_are_told(other, overlap):
    timing, other = Timing((1.0, 1.2, 1.4)), Timing(other)
    assert timing.overlaps(other) is overlap and other.overlaps(timing) is overlap


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        pytest.param(["--suite", "stepp"], "unknown suite 'stepp': did you mean step", id="unknown-suite"),
        pytest.param(["--suite", "step", "--model", "resnet33"], "resnet33", id="impossible-model"),
        pytest.param(["--suite", "step", "--students", "1"], "--students must be at least 2", id="too-few-students"),
        pytest.param(["--suite", "step", "--repeats", "many"], "invalid int value", id="not-a-number"),
        pytest.param(["--suite", "step", "--students", "2;4"], "whole numbers with commas", id="not-a-list"),
        pytest.param(["--suite", "step", "--device", "tpu"], "must be auto, cpu, cuda or cuda:N", id="unknown-device"),
        pytest.param(["--suite", "step", "--device", "cuda"], "has 0 CUDA devices", id="cuda-where-there-is-none"),
        pytest.param(
            ["--suite", "step", "--out", "/dev/null/x"], "cannot write to /dev/null/x", id="unwritable-results"
        ),
    ],
)
def test_a_bad_option_is_one_line_and_a_failure(arguments, line, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([*arguments, "--quick"]) == 2
    printed = capsys.readouterr()
    assert line in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_results_are_kept_whole(tmp_path):
    rows = [{"provider": name, "median_ms": ms, "note": "a, b"} for name, ms in (("published", 3.0), ("fastfuse", 1.5))]
    ratios = report.ratios({"published": 3.0, "fastfuse": 1.5}, "published")
    finished = report.Report(
        "name", {"suite": "step"}, {"device": "cpu"}, {"provider": "provider"}, rows, ratios, {}, []
    )
    report.save(finished, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name.csv", "name.json"]
    kept = json.loads((tmp_path / "name.json").read_text())
    assert kept["rows"] == rows and kept["ratios"] == {"published/fastfuse": 2.0}
    lines = list(csv.DictReader((tmp_path / "name.csv").open()))
    assert [(line["provider"], line["device"], line["note"]) for line in lines] == [
        ("published", "cpu", "a, b"),
        ("fastfuse", "cpu", "a, b"),
    ]
