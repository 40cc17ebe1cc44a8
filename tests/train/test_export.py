"""Exported networks: the same logits and the same cost, files that stand alone, and what is refused."""

import importlib
import io
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastfuse import cli, models
from fastfuse.config import TrainConfig
from fastfuse.methods import METHODS
from fastfuse.train import build, formats, preliminary
from fastfuse.train.cost import cost
from fastfuse.train.deployable import networks_of, plain_network
from fastfuse.train.export import ExportError, check_equal
from fastfuse.train.predict import DESCRIPTION
from fastfuse.train.stopping import Decision, Stopping
from tests.train.exported import labelled_images, trained

DEPLOYING = [name for name in METHODS if METHODS[name].deployed in ("student0", "leader")]


@pytest.fixture
def export(capsys):
    """Run `fastfuse export` and give what it prints as JSON."""

    def export(path, *options):
        capsys.readouterr()
        assert cli.main(["export", str(path), *map(str, options), "--device", "cpu", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return export


def top1(network, tiny_npz) -> float:
    images, labels = labelled_images(tiny_npz)
    with torch.no_grad():
        return 100 * (network(images).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("name", DEPLOYING)
def test_the_deployed_network_of_every_method_costs_what_the_plain_one_costs(name, tiny_npz):
    config = build.resolved(TrainConfig(method=name, model="resnet8", data="npz", data_path=tiny_npz))
    config, given = preliminary.stand_in(config, 3)
    method = build.make_method(config, 3, given, image_size=(8, 8)).eval()
    for buffer_name, buffer in method.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):  # as after training: no norm does nothing
            buffer.uniform_(0.5, 1.5)
    model = networks_of(config)[method.deployed]
    deployed = plain_network(config, model, 3)
    deployed.load_state_dict(method.deployed_state(), strict=True)
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(deployed(images).logits, method.predict(images)[method.deployed])
    data = formats.encode(deployed, "safetensors", (8, 8), {})
    exported = formats.decode(data, "safetensors", lambda: models.build(model, 3))
    assert cost(exported, (8, 8)) == cost(models.build("resnet8", 3).eval(), (8, 8))


def test_the_cost_is_that_of_a_network_counted_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 6, 7))
    assert cost(network, (5, 6)) == (4 * 27 + 4 + 120 * 7 + 7, 5 * 6 * 4 * 27 + 120 * 7)


@pytest.mark.parametrize("name", ["safetensors", "torch", "torch-export"])
def test_each_format_gives_the_logits_of_the_last_epoch(finished, name, export, tmp_path):
    suffix = formats.SUFFIXES[name]
    found = export(finished, "--format", name, "--out", tmp_path / f"net{suffix}")
    data = (tmp_path / f"net{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"net{suffix}", "net.md"])
    network = formats.decode(data, name, lambda: models.build("resnet8", 3).eval())
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(network(images), trained(finished)(images).logits, rtol=1e-5, atol=1e-5)
    assert found["costs"][0] == found["costs"][1] and found["completed"] and found["epoch"] == 2


def test_the_default_place_is_in_the_run_and_the_best_weights_are_another_file(train, export):
    run = train("--method", "independent", "--students", "1").path
    found = export(run, "--best")
    assert found["file"] == str(run / "export" / "student0_best.safetensors")
    wanted, got = load_file(run / "student0_best.safetensors"), load_file(found["file"])
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert export(run, "--format", "torch")["file"] == str(run / "export" / "student0.pt")


@pytest.mark.parametrize("options", [["--method", "ffl"], ["--method", "one", "--ema", "0.5"], ["--method", "ffcl"]])
def test_other_networks_come_from_the_checkpoint(options, train, export, tmp_path, tiny_npz):
    run = train(*options)
    name = {"ffcl": "teacher"}.get(options[1], "student1")
    file = tmp_path / "net.safetensors"
    assert export(run.path, "--network", name, "--out", file)["source"].endswith("checkpoint.pt")
    network = models.build("resnet8", 3).eval()
    network.load_state_dict(load_file(file), strict=True)
    evaluated = run.metrics[-1]["accuracy"][name]["top1"]
    assert top1(lambda images: network(images).logits, tiny_npz) == pytest.approx(evaluated)
    state = torch.load(run.path / "checkpoint.pt", weights_only=True)
    evaluated_weights = list((state["ema"] or state["method"]).values())
    for weights in network.state_dict().values():
        assert any(torch.equal(weights, value) for value in evaluated_weights), "the average, where there is one"
    deployed = load_file(run.path / "student0.safetensors")
    assert any(not torch.equal(deployed[key], value) for key, value in network.state_dict().items())


def test_imagenet_resnets_load_into_plain_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="no torchvision, whose networks these are")
    network = plain_network(TrainConfig(), "resnet18", 5)
    plain = torchvision.models.resnet18(num_classes=5).eval()
    images = torch.randn(2, 3, 40, 40)
    for name in ("safetensors", "torch"):
        data = formats.encode(network, name, (40, 40), {})
        own = formats.decode(data, name, lambda: plain)
        assert own.network is plain, "loaded with strict=True"
        with torch.no_grad():
            torch.testing.assert_close(plain(images), network(images).logits)


def test_a_program_keeps_what_it_needs_to_know(program):
    extra = {DESCRIPTION: ""}
    torch.export.load(io.BytesIO(program.read_bytes()), extra_files=extra)
    facts = json.loads(extra[DESCRIPTION])
    assert (facts["model"], facts["network"], facts["image_size"]) == ("resnet8", "leader", [8, 8])
    assert len(facts["classes"]) == len(facts["mean"]) == len(facts["std"]) == 3


def test_folded_norms_are_gone_and_the_logits_remain(finished, export, tmp_path, refused):
    found = export(finished, "--format", "torch-export", "--fold-batchnorm", "--out", tmp_path / "net.pt2")
    folded = torch.export.load(tmp_path / "net.pt2")
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        truth = trained(finished).double()(images.double()).logits
        own = (trained(finished)(images).logits - truth).abs().max()
        allowed = 10 * (own + torch.finfo(torch.float32).eps * truth.abs().max())
        assert (folded.module()(images) - truth).abs().max() <= allowed
    own, plain = found["costs"]
    assert own["multiply_adds"] == plain["multiply_adds"] and own["parameters"] < plain["parameters"]
    assert "--format torch-export or onnx" in refused(command=["export", str(finished), "--fold-batchnorm"])


@pytest.mark.parametrize("name", ["plain", "folded"])
def test_onnx_takes_any_batch_and_gives_the_same_logits(name, finished, export, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"no {package}, which the conversion to ONNX needs")
    runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime, which runs ONNX files")
    fold = ["--fold-batchnorm"] if name == "folded" else []
    export(finished, "--format", "onnx", "--out", tmp_path / "net.onnx", *fold)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert "classes" in session.get_modelmeta().custom_metadata_map[DESCRIPTION]
    for batch in (1, 4):
        images = torch.randn(batch, 3, 8, 8)
        got = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(got, trained(finished)(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package, finished, refused, monkeypatch):
    def without(name):
        if name == package:
            raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", without)
    line = refused(command=["export", str(finished), "--format", "onnx"])
    assert f"needs {package}," in line and "pip install 'fastfuse[export]'" in line


def test_a_file_that_would_differ_is_not_written(finished, refused, monkeypatch, tmp_path):
    encode = formats.encode

    def wrong(network, *others):
        network.fc.bias.data += 1e-3
        try:
            return encode(network, *others)
        finally:
            network.fc.bias.data -= 1e-3

    monkeypatch.setattr(formats, "encode", wrong)
    line = refused(command=["export", str(finished), "--device", "cpu", "--out", str(tmp_path / "net.safetensors")])
    assert "differ by 0.001" in line and list(tmp_path.iterdir()) == []


def test_a_weight_file_that_is_not_the_checkpoints_is_found(finished, refused, tmp_path):
    copied = shutil.copytree(finished, tmp_path / "copied")
    weights = load_file(finished / "leader.safetensors")
    save_file({**weights, "fc.bias": weights["fc.bias"] + 0.01}, copied / "leader.safetensors")
    assert "does not give the logits of the trained one" in refused(command=["export", str(copied)])
    assert not (copied / "export").exists()


def test_the_check_sees_every_batch_size_and_what_is_no_number(finished):
    from fastfuse.train.deployable import load_deployable

    found = load_deployable(finished)
    assert check_equal(found, lambda images: found.network(images).logits) == 0
    for wrong in (
        lambda images: found.network(images[:1]).logits,
        lambda images: found.network(images).logits * float("nan"),
    ):
        with pytest.raises(ExportError, match="does not give the logits"):
            check_equal(found, wrong)


def test_a_program_of_a_fixed_batch_is_not_written(finished, refused, monkeypatch, tmp_path):
    static = torch.export.Dim.STATIC
    monkeypatch.setattr(torch.export, "Dim", lambda *_, **__: static)
    options = ["--format", "torch-export", "--device", "cpu", "--out", str(tmp_path / "net.pt2")]
    command = ["export", str(finished), *options]
    assert "does not run on a batch of 1" in refused(command=command) and list(tmp_path.iterdir()) == []


def test_the_card_tells_what_the_network_is(finished, export, tmp_path):
    found = export(finished, "--out", tmp_path / "net.safetensors")
    text = (tmp_path / "net.md").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    accuracy = summary["networks"]["leader"]
    assert f"last epoch {accuracy['last_top1']:.2f} %, best {accuracy['best_top1']:.2f} %" in text
    assert f"(epoch {accuracy['best_epoch']}, chosen on test images)" in text
    assert f"commit {summary['commit']}" in text and "`ffsd`" in text and "8x8" in text
    counted = f"| {found['costs'][0]['parameters']:,} | {found['costs'][0]['multiply_adds']:,} |"
    assert text.count(counted) == 2, "the network and the plain one"
    assert "both networks in turn, eager, on " in text


def test_an_unfinished_run_is_said_to_be_one(train, export, capsys, tmp_path, monkeypatch):
    asked = itertools.count(1)  # after each of three steps, before the epoch's end, and after the first one of the next
    monkeypatch.setattr(Stopping, "decide", lambda self: Decision(stop=next(asked) >= 5, save=False))
    path = train("--method", "ffsd").path
    (path / "leader.safetensors").write_bytes(b"of an earlier epoch: a run that goes on has written none since")
    capsys.readouterr()
    file = tmp_path / "net.safetensors"
    assert cli.main(["export", str(path), "--device", "cpu", "--out", str(file)]) == 0
    assert "has not ended yet" in capsys.readouterr().out and file.exists()
    assert "the run had not ended (epoch 1 of 2)" in (tmp_path / "net.md").read_text()
    found = export(path, "--network", "student1", "--format", "torch")
    assert (found["completed"], found["epoch"]) == (False, 1) and found["source"].endswith("checkpoint.pt")


def test_weights_alone_are_enough(finished, export, tmp_path):
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("config.json", "leader.safetensors"):
        shutil.copy(finished / name, copied)
    found = export(copied)
    assert found["epoch"] is None and "not evaluated" in (copied / "export" / "leader.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--network", "studnet1"], "did you mean student1"),
        (["--network", "fusion"], "networks of this run: student0, student1, leader"),
        (["--network", "ensemble"], "networks of this run: student0, student1, leader"),
        (["--format", "safetensor"], "did you mean safetensors?"),
        (["--network", "student0", "--best"], "kept of leader alone"),
        (["--out", "net.bin"], "must be a file named *.safetensors"),
        (["--device", "gpu"], "--device must be auto"),
    ],
)
def test_a_wrong_option_is_refused(finished, refused, options, message):
    assert message in refused(command=["export", str(finished), *options])


def test_a_folder_that_cannot_serve_is_refused(finished, tiny_npz, refused, tmp_path):
    assert "needs one run folder, not 0" in refused(command=["export"])
    assert "is not a run folder" in refused(command=["export", str(tmp_path)])
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(finished / "config.json", broken)
    assert "has no weights of leader yet" in refused(command=["export", str(broken)])
    assert "no leader_best.safetensors" in refused(command=["export", str(broken), "--best"])
    (broken / "leader.safetensors").write_bytes(b"damaged")
    assert "cannot be read as weights" in refused(command=["export", str(broken)])
    shutil.copy(finished / "leader.safetensors", broken)
    (broken / "summary.json").write_text("{}")
    assert "cannot be read as a run's results" in refused(command=["export", str(broken)])
    (broken / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes()[:1000])
    assert "truncated, damaged" in refused(command=["export", str(broken)])
    config = json.loads((finished / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "replicas": 2}))
    assert f"name one of them, such as {broken}/seed0" in refused(command=["export", str(broken)])
    (broken / "config.json").write_text(json.dumps({**config, "method": "paraphraser"}))
    assert "no network that classifies" in refused(command=["export", str(broken)])
    arrays = dict(np.load(tiny_npz))
    np.savez(tmp_path / "other.npz", **{**arrays, "test_labels": 2 - arrays["test_labels"]})
    options = ["--data-path", str(tmp_path / "other.npz")]
    assert "was trained on other data" in refused(command=["export", str(finished), *options])
    assert not (finished / "export").exists()
