"""The recorded trajectories of the published algorithms, and that replaying them can fail."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests import replay

RECORDINGS = {"ffsd": "ffsd_resnet20_s2", "ffl": "ffl_resnet20"}


def files(golden: Path, method: str) -> tuple[Path, Path]:
    return golden / f"{RECORDINGS[method]}.npz", golden / f"{RECORDINGS[method]}.json"


@pytest.fixture(scope="module")
def replayed(golden: Path) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Errors of terms and of final tensors, for each full recording."""
    return {method: replay.replay(*files(golden, method)) for method in RECORDINGS}


@pytest.mark.parametrize("method", RECORDINGS)
def test_every_recorded_term_is_reproduced(method: str, replayed, golden: Path) -> None:
    terms, _ = replayed[method]
    steps = json.loads(files(golden, method)[1].read_text())["steps"]
    assert len(steps) == 6
    assert set(terms) == {name for step in steps for name in replay.recorded_terms(method, step)}
    assert {name: e for name, e in terms.items() if not e <= replay.BOUND} == {}


@pytest.mark.parametrize("method", RECORDINGS)
def test_every_final_tensor_is_reproduced(method: str, replayed, golden: Path) -> None:
    _, state = replayed[method]
    assert set(state) == set(json.loads(files(golden, method)[1].read_text())["final_state"])
    assert {name: e for name, e in state.items() if not e <= replay.BOUND} == {}


@pytest.fixture(scope="module")
def first_steps(golden: Path) -> dict[str, dict[str, Any]]:
    """Each recording cut after its first step, with the final state that this program has there."""
    cut = {}
    for method in RECORDINGS:
        npz, values = files(golden, method)
        cut[method] = json.loads(values.read_text())
        cut[method]["steps"] = cut[method]["steps"][:1]
        recording = replay.Recording(npz, values)
        built, networks, settings = replay.build(recording)
        progress = cut[method]["steps"][0]["epoch"] - (1 if method == "ffsd" else 0)
        step = TrainStep(built, build_optimizers(built, **settings))
        step(*recording.batch(0), torch.tensor(float(progress), dtype=torch.float64))
        cut[method]["final_state"] = {
            f"{network}/{key}": [tensor.double().sum().item(), tensor.double().norm().item()]
            for network, module in networks.items()
            for key, tensor in module.state_dict().items()
        }
    return cut


def written(recorded: dict[str, Any], folder: Path, change: Callable[[dict], object] | None = None) -> Path:
    """A copy of a recording's values as a file, changed."""
    copied = json.loads(json.dumps(recorded))
    if change:
        change(copied)
    path = folder / "recording.json"
    path.write_text(json.dumps(copied))
    return path


def term(name: str, factor: float, index: int | None = None) -> Callable[[dict], None]:
    def change(recorded: dict) -> None:
        values = recorded["steps"][0]["terms"]
        if index is None:
            values[name] *= factor
        else:
            values[name][index] *= factor

    return change


def add_term(name: str, value: float) -> Callable[[dict], None]:
    return lambda recorded: recorded["steps"][0]["terms"].update({name: value})


def drop_term(name: str) -> Callable[[dict], None]:
    return lambda recorded: recorded["steps"][0]["terms"].pop(name)


def setting(name: str, value: float) -> Callable[[dict], None]:
    def change(recorded: dict) -> None:
        assert recorded["config"][name] != value
        recorded["config"][name] = value

    return change


def epoch(value: int) -> Callable[[dict], None]:
    return lambda recorded: recorded["steps"][0].update(epoch=value)


def tensor(key: str, *, total: float = 0.0, norm: float = 0.0) -> Callable[[dict], None]:
    """Change a final tensor's sum and norm by parts of its norm."""

    def change(recorded: dict) -> None:
        entry = recorded["final_state"][key]
        recorded["final_state"][key] = [entry[0] + total * entry[1], entry[1] * (1 + norm)]

    return change


def drop_tensor(key: str) -> Callable[[dict], None]:
    return lambda recorded: recorded["final_state"].pop(key)


def add_tensor(key: str) -> Callable[[dict], None]:
    return lambda recorded: recorded["final_state"].update({key: [0.0, 1.0]})


# The recorded leader's, since it holds parts of two of our modules; FFL's trunk.
TENSORS = {"ffsd": "leader/trans_fusion.pointwise.weight", "ffl": "network/layer1.0.conv1.weight"}
# method, change, whether the terms or the final state must show it
TAMPERED = {
    "ffsd: a term of 4.7 by 1e-8": ("ffsd", term("fusion_ce", 1 + 1e-8), "terms"),
    "ffsd: a term of 4e-9 by 1e-8": ("ffsd", term("student_self_distillation", 1 + 1e-8, 1), "terms"),
    "ffsd: a transform's term by 1e-8": ("ffsd", term("transform_feature", 1 + 1e-8, 0), "terms"),
    "ffsd: a head's total by 1e-8": ("ffsd", term("leader_total", 1 - 1e-8), "terms"),
    "ffsd: a term that is 0 for us": ("ffsd", add_term("student_diversity", [1e-12, 4.6e-4]), "terms"),
    "ffsd: a term that we do not have": ("ffsd", add_term("leader_extra", 1.0), "terms"),
    "ffsd: a term that was not recorded": ("ffsd", drop_term("leader_trans_fusion"), "terms"),
    "ffsd: temperature": ("ffsd", setting("temperature", 2.02), "terms"),
    "ffsd: lambda_diversity": ("ffsd", setting("lambda_diversity", 1.01e-5), "terms"),
    "ffsd: lambda_fusion": ("ffsd", setting("lambda_fusion", 10.1), "terms"),
    "ffsd: lambda_self_distillation": ("ffsd", setting("lambda_self_distillation", 1010.0), "terms"),
    "ffsd: epoch of the warm-up": ("ffsd", epoch(3), "terms"),
    "ffsd: lr": ("ffsd", setting("lr", 0.101), "state"),
    "ffsd: momentum": ("ffsd", setting("momentum", 0.91), "state"),
    "ffsd: weight decay": ("ffsd", setting("weight_decay", 1.01e-4), "state"),
    "ffl: a term by 1e-8": ("ffl", term("kl_sub2_from_fused", 1 + 1e-8), "terms"),
    "ffl: the whole loss by 1e-8": ("ffl", term("loss", 1 - 1e-8), "terms"),
    "ffl: temperature": ("ffl", setting("temperature", 3.03), "terms"),
    "ffl: ramp-up": ("ffl", setting("consistency_rampup", 81), "terms"),
    "ffl: offset of the targets": ("ffl", setting("kl_target_epsilon", 0.0), "terms"),
    "ffl: weight decay of the trunk": ("ffl", setting("weight_decay_network", 1.01e-4), "state"),
    "ffl: weight decay of the fusion head": ("ffl", setting("weight_decay_fusion", 1.01e-5), "state"),
} | {
    f"{method}: {name}": (method, change, "state")
    for method, key in TENSORS.items()
    for name, change in {
        "a final norm by 1e-8": tensor(key, norm=1e-8),
        "a final sum by 1e-6 of the norm": tensor(key, total=1e-6),
        "a final tensor that was not recorded": drop_tensor(key),
        "a final tensor that we do not have": add_tensor(f"{key}.other"),
    }.items()
}


@pytest.mark.parametrize("method", RECORDINGS)
def test_a_first_step_passes(method: str, first_steps, golden: Path, tmp_path: Path) -> None:
    """The control of the tampering below."""
    terms, state = replay.replay(files(golden, method)[0], written(first_steps[method], tmp_path))
    assert max(terms.values()) <= replay.BOUND and max(state.values()) <= replay.BOUND


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_noticed(case: str, first_steps, golden: Path, tmp_path: Path) -> None:
    method, change, where = TAMPERED[case]
    path = written(first_steps[method], tmp_path, change)
    terms, state = replay.replay(files(golden, method)[0], path)
    assert max((terms if where == "terms" else state).values()) > replay.BOUND


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        pytest.param(None, 0, "passed", id="untouched"),
        pytest.param(term("ce_sub1", 1 + 1e-8), 1, "FAILED", id="a term"),
        pytest.param(tensor(TENSORS["ffl"], norm=1e-8), 1, "FAILED", id="a final norm"),
        pytest.param(setting("temperature", 3.03), 1, "FAILED", id="a hyper-parameter"),
    ],
)
def test_main_tells_by_its_status(
    change, status: int, word: str, first_steps, golden: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    path = written(first_steps["ffl"], tmp_path, change)
    monkeypatch.setattr(sys, "argv", ["replay.py", str(files(golden, "ffl")[0]), str(path)])
    assert replay.main() == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == word
    assert any(line.startswith("largest term error") for line in lines)
    assert any(line.startswith("largest state error") for line in lines)


def test_an_unknown_method_is_named(first_steps, golden: Path, tmp_path: Path) -> None:
    path = written(first_steps["ffl"], tmp_path, setting("method", "feed"))
    with pytest.raises(SystemExit, match="unknown method 'feed'"):
        replay.replay(files(golden, "ffl")[0], path)


def test_it_runs_as_a_program_from_anywhere(first_steps, golden: Path, tmp_path: Path) -> None:
    """As its documentation says, without the tests being installed."""
    path = written(first_steps["ffl"], tmp_path, term("ce_sub1", 1 + 1e-8))
    program = [sys.executable, replay.__file__, str(files(golden, "ffl")[0]), str(path)]
    run = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1] == "FAILED"
