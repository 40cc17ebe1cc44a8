"""Replay a recording of a published algorithm through the trainer's own method and optimizers.

    python tests/replay.py NPZ JSON [--backend triton [--steps N]]

Everything is taken from the recording's `config` and arrays. Prints the largest error of every term and of the final
tensors, and exits 1 if any lies above its bound. Measure (float64): terms |ours - recorded| <= 1e-9 |recorded|, a
recorded 0 exactly 0; final state, per tensor: |norm - recorded| <= 1e-9 recorded norm and
|sum - recorded| <= 1e-9 sqrt(elements) recorded norm.

With --backend the recording is replayed in float64, and every step is also computed in float32 from the float64 run's
state, by the references and by that backend: each term and each parameter's gradient must lie within the error budget
(twice the references' own error against float64, plus one rounding). Later steps of a free float32 run are not
compared: training amplifies rounding.
"""

import argparse
import copy
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastfuse.kernels import _dispatch
from fastfuse.methods import Method, build_method
from fastfuse.testing import relative_l2
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

BOUND = 1e-9


class Recording:
    """The arrays and values of one recording."""

    def __init__(self, npz: Path, values: Path) -> None:
        with np.load(npz, allow_pickle=False) as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        recorded = json.loads(Path(values).read_text())
        self.config = recorded["config"]
        self.steps = recorded["steps"]
        self.final_state = recorded["final_state"]

    def initial(self, network: str) -> dict[str, Tensor]:
        """The initial parameters and buffers of one network, in float64."""
        prefix = f"init/{network}/"
        found = {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}
        return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Images in float64 and labels of one mini-batch."""
        return self.arrays[f"x{index}"].double(), self.arrays[f"y{index}"].long()


def build(recording: Recording) -> tuple[Method, dict[str, nn.Module], dict[str, Any]]:
    """The method in float64 with the recorded initial state, its networks by recorded name, and optimizer settings."""
    config = recording.config
    settings = {"lr": config["lr"], "momentum": config["momentum"]}
    if config["method"] == "ffsd":
        classes = recording.arrays["init/leader/fc.bias"].shape[0]
        names = ("temperature", "lambda_diversity", "lambda_fusion", "lambda_self_distillation")
        method = build_method(
            "ffsd",
            model=config["model"],
            students=config["num_students"],
            num_classes=classes,
            **{name: config[name] for name in names},
        ).double()
        settings["weight_decay"] = config["weight_decay"]
        networks = _ffsd_networks(method)
    elif config["method"] == "ffl":
        classes = recording.arrays["init/network/classifiers.0.bias"].shape[0]
        students = sum(k.startswith("init/network/classifiers.") and k.endswith("bias") for k in recording.arrays)
        method = build_method(
            "ffl",
            model=f"resnet{config['depth']}",
            students=students,
            num_classes=classes,
            temperature=config["temperature"],
            rampup_epochs=config["consistency_rampup"],
            kl_target_epsilon=config["kl_target_epsilon"],
        ).double()
        settings["weight_decay"] = config["weight_decay_network"]
        settings["fusion_weight_decay"] = config["weight_decay_fusion"]
        networks = {"network": as_recorded(method.peers), "fusion": method.networks()["fusion"]}
    else:
        raise SystemExit(f"unknown method {config['method']!r} in the recording's config: ffsd or ffl expected")
    for name, network in networks.items():
        network.load_state_dict(recording.initial(name), strict=True)
    return method.train(), networks, settings


def as_recorded(branched: nn.Module) -> nn.Module:
    """Branches on the first two stages of a CIFAR ResNet under the recorded names."""
    network = nn.Module()
    for name, child in branched.trunk[0].named_children():
        network.add_module(name, child)
    network.branches = nn.ModuleList(branch.layer3 for branch in branched.branches)
    network.classifiers = nn.ModuleList(branch.fc for branch in branched.branches)
    return network


def _ffsd_networks(method: Method) -> dict[str, nn.Module]:
    networks = {name: n for name, n in method.networks().items() if name != "leader"}
    # Recorded as one network: the leader with its trans-fusion inside.
    leader = nn.Module()
    for name, child in method.networks()["leader"].named_children():
        leader.add_module(name, child)
    leader.add_module("trans_fusion", method.criterion.trans_fusion)
    networks["leader"] = leader
    for name, transform in method.criterion.transforms.items():
        networks["transform_leader" if name == "leader" else name.replace("student", "transform")] = transform
    return networks


def recorded_terms(method: str, step: Mapping[str, Any]) -> dict[str, float]:
    """The recorded values under our names and as they enter the sum."""
    flat = {}
    for name, value in step["terms"].items():
        if isinstance(value, list):
            head, _, rest = name.partition("_")
            first = 1 if head == "transform" else 0
            flat |= {f"{head}{i}_{rest}": v for i, v in enumerate(value, first)}
        else:
            flat[name] = value
    if method == "ffsd":
        return flat
    weight = step["consistency_weight"]
    renamed = {
        "loss": flat["loss"],
        "fusion_ce": flat["ce_fused"],
        "fusion_kl": weight * flat["kl_fused_from_ensemble"],
    }
    for i in range(sum(name.startswith("ce_sub") for name in flat)):
        renamed[f"student{i}_ce"] = flat[f"ce_sub{i + 1}"]
        renamed[f"student{i}_kl"] = weight * flat[f"kl_sub{i + 1}_from_fused"]
    return renamed


def our_terms(loss: Tensor, terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Our terms, the total of every head, and the whole loss."""
    values = {name: term.item() for name, term in terms.items()}
    totals: dict[str, float] = defaultdict(float)
    for name, value in values.items():
        head = name.partition("_")[0]
        if not head.startswith("transform"):
            totals[f"{head}_total"] += value
    return values | totals | {"loss": loss.item()}


def term_errors(ours: Mapping[str, float], recorded: Mapping[str, float]) -> dict[str, float]:
    """Relative error per recorded term; a recorded 0 must be 0, or not exist, in ours."""
    errors = {}
    for name, value in recorded.items():
        if value == 0:
            errors[name] = 0.0 if ours.get(name, 0.0) == 0 else float("inf")
        else:
            errors[name] = abs(ours[name] - value) / abs(value) if name in ours else float("inf")
    unrecorded = [n for n in ours if n not in recorded and n != "loss" and not n.endswith("_total")]
    return errors | dict.fromkeys(unrecorded, float("inf"))


def state_errors(networks: Mapping[str, nn.Module], final_state: Mapping[str, list[float]]) -> dict[str, float]:
    """Error per final tensor, the larger of the norm's and the sum's."""
    errors = dict.fromkeys(final_state, float("inf"))
    for network, module in networks.items():
        for key, tensor in module.state_dict().items():
            total, norm = final_state.get(f"{network}/{key}", (float("nan"), float("nan")))
            x = tensor.double()
            off_norm = abs(x.norm().item() - norm)
            off_sum = abs(x.sum().item() - total) / max(x.numel(), 1) ** 0.5
            scale = norm if norm else 1.0
            error = 0.0 if off_norm == off_sum == 0 else max(off_norm, off_sum) / scale if norm else float("inf")
            errors[f"{network}/{key}"] = error if error == error else float("inf")
    return errors


def replay(npz: Path, values: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Largest error of every term over all steps, and the error of every final tensor."""
    recording = Recording(npz, values)
    method, networks, settings = build(recording)
    step = TrainStep(method, build_optimizers(method, **settings))
    # The FFSD program counts its epochs from 1, FFL's from 0; progress counts epochs done.
    first_epoch = 1 if recording.config["method"] == "ffsd" else 0
    largest: dict[str, float] = defaultdict(float)
    for recorded in recording.steps:
        progress = torch.tensor(float(recorded["epoch"] - first_epoch), dtype=torch.float64)
        output = step(*recording.batch(recorded["batch"]), progress)
        wanted = recorded_terms(recording.config["method"], recorded)
        for name, error in term_errors(our_terms(output.loss, output.terms), wanted).items():
            largest[name] = max(largest[name], error)
    return dict(largest), state_errors(networks, recording.final_state)


def step_in_float32(
    exact: Method, batch: tuple[Tensor, Tensor], progress: Tensor, backend: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and gradients of one forward and backward in float32 from the state of the float64 method."""
    method = copy.deepcopy(exact).float()
    before, _dispatch._process_default = _dispatch._process_default, backend
    try:
        output = method(batch[0].float(), batch[1], progress.float())
    finally:
        _dispatch._process_default = before
    output.loss.backward()
    return dict(output.terms), {name: p.grad for name, p in method.named_parameters()}


def replay_stepwise(npz: Path, values: Path, backend: str, steps: int | None = None) -> dict[str, tuple[float, float]]:
    """Largest share of its budget that each term and gradient uses, with the error there."""
    recording = Recording(npz, values)
    method, _, settings = build(recording)
    step = TrainStep(method, build_optimizers(method, **settings))
    first_epoch = 1 if recording.config["method"] == "ffsd" else 0
    used: dict[str, tuple[float, float]] = {}
    for recorded in recording.steps[:steps]:
        progress = torch.tensor(float(recorded["epoch"] - first_epoch), dtype=torch.float64)
        batch = recording.batch(recorded["batch"])
        ours, eager = (step_in_float32(method, batch, progress, name) for name in (backend, "reference"))
        exact = step(*batch, progress)
        truth = (exact.terms, {name: p.grad for name, p in method.named_parameters()})
        for a, e, t in zip(ours, eager, truth, strict=True):
            for name in t:
                error = relative_l2(a[name], t[name])
                budget = 2 * (relative_l2(e[name], t[name]) + torch.finfo(torch.float32).eps)
                used[name] = max(used.get(name, (0.0, 0.0)), (error / budget, error))
    return used


def main() -> int:
    """Print the errors; 1 if any is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", type=Path)
    parser.add_argument("json", type=Path)
    parser.add_argument("--backend", help="compare this backend's float32 steps with the references'")
    parser.add_argument("--steps", type=int, help="with --backend: only the first steps")
    arguments = parser.parse_args()
    if arguments.backend:
        used = replay_stepwise(arguments.npz, arguments.json, arguments.backend, arguments.steps)
        for name, (share, error) in sorted(used.items(), key=lambda item: item[1]):
            print(f"{share:6.2f} of the budget, error {error:.2e}  {name}")
        passed = max(used.values())[0] <= 1
        print("passed" if passed else "FAILED")
        return 0 if passed else 1
    terms, state = replay(arguments.npz, arguments.json)
    for name, error in sorted(terms.items()):
        print(f"term   {error:9.2e}  {name}")
    for name, error in sorted(state.items()):
        print(f"state  {error:9.2e}  {name}")
    worst_term, worst_state = max(terms, key=terms.get), max(state, key=state.get)
    print(f"largest term error  {terms[worst_term]:.2e}  {worst_term}  (bound {BOUND:.0e})")
    print(f"largest state error {state[worst_state]:.2e}  {worst_state}  (bound {BOUND:.0e})")
    passed = max(terms[worst_term], state[worst_state]) <= BOUND
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
