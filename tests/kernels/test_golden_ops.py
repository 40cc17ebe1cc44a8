"""Every recorded value of the published programs' operators: losses, gradients, running statistics, eval outputs.

Each case is checked through the stateless operator and, where there is one, through the module that holds the recorded
parameters. A case counts only when all of its arrays have been read.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.nn.fusion import FusionHead
from fastfuse.nn.transforms import DeepToShallow
from fastfuse.testing import relative_l2

BOUND = 1e-10
FOLDER = Path(__file__).parents[1] / "golden"
CASES = json.loads((FOLDER / "ops.json").read_text())["cases"]


class Arrays:
    """The arrays of one case; floating ones in float64. Remembers which were read."""

    def __init__(self, case):
        prefix = f"{case}/"
        with np.load(FOLDER / "ops.npz", allow_pickle=False) as file:
            found = {key.removeprefix(prefix): torch.from_numpy(file[key]) for key in file if key.startswith(prefix)}
        self._arrays = {key: x.double() if x.is_floating_point() else x for key, x in found.items()}
        self.unread = set(self._arrays)

    def __getitem__(self, name):
        self.unread.discard(name)
        return self._arrays[name]

    def under(self, folder):
        return {k.removeprefix(folder): self[k] for k in self._arrays if k.startswith(folder)}

    def check(self, name, ours):
        assert ours.dtype == torch.float64
        assert relative_l2(ours, self[name]) <= BOUND, name


def leaf(x, memory_format=torch.contiguous_format):
    x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
    return x.clone(memory_format=torch.preserve_format).requires_grad_()


def norm(parameters, name, training):
    fields = (parameters[f"{name}.{field}"] for field in ("weight", "bias", "running_mean", "running_var"))
    return functional.BatchNorm(*fields, training)


def trained(parameters):
    """Recorded parameters as leaves that take gradients; buffers are left alone."""
    return {k: x if "running" in k or "tracked" in k else leaf(x) for k, x in parameters.items()}


def check_feature(case, arrays, memory_format):
    losses = {
        "attention_mse": functional.attention_mse,
        "feature_mse": lambda x, y: functional.normalized_lp(x, y, p=2),
        "diversity_loss": functional.diversity_loss,
    }
    joint = functional.normalized_lp_joint(arrays["x"], arrays["y"], p=2)
    arrays.check("feature_mse/loss", joint.feature)
    arrays.check("attention_mse/loss", joint.attention)
    y = arrays["y"].contiguous(memory_format=memory_format)
    for name, function in losses.items():
        x = leaf(arrays["x"], memory_format)
        loss = function(x, y)
        arrays.check(f"{name}/loss", loss)
        loss.backward()
        arrays.check(f"{name}/grad_x", x.grad)
    arrays.check("diversity_target", functional.diversity_target(y))
    if case["ties"]:
        attention = functional.attention_map(y).flatten(1)
        threshold = attention.kthvalue(attention.shape[1] // 3).values
        assert ((attention == threshold[:, None]).sum(1) > 1).any(), "the case is meant to hold ties at the threshold"


def check_peer_kl_ce(case, arrays, _):
    logits = leaf(arrays["logits"])
    found = functional.peer_kl_ce(logits, arrays["labels"], temperature=case["temperature"])
    losses = torch.stack([found.cross_entropy, found.divergence], 1)
    arrays.check("ce_and_kl", losses)
    losses.sum().backward()
    arrays.check("grad", logits.grad)


def check_peer_kl(case, arrays, _):
    """The single-head form and torch's own cross-entropy must give the same terms."""
    heads = [leaf(row) for row in arrays["logits"]]
    terms = []
    for i, head in enumerate(heads):
        divergence = functional.peer_kl(head, heads[:i] + heads[i + 1 :], temperature=case["temperature"])
        terms.append(torch.stack([torch.nn.functional.cross_entropy(head, arrays["labels"]), divergence]))
    arrays.check("ce_and_kl", torch.stack(terms))
    torch.stack(terms).sum().backward()
    arrays.check("grad", torch.stack([head.grad for head in heads]))


def check_fusion_operator(case, arrays, memory_format):
    features = [leaf(x, memory_format) for x in arrays["xs"]]
    parameters = trained(arrays.under("param/"))

    def fuse(training):
        norms = [norm(parameters, name, training) for name in ("norm1", "norm2")]
        depthwise, pointwise = parameters["depthwise.weight"], parameters["pointwise.weight"]
        found = functional.concat_fuse(features, depthwise, norms[0], pointwise, norms[1])
        classifier = parameters["classifier.weight"], parameters["classifier.bias"]
        return torch.nn.functional.linear(found.pooled, *classifier), found.fused

    check_fusion(arrays, features, parameters, fuse(True))
    arrays.check("eval_logits", fuse(False)[0])


def check_fusion_module(case, arrays, memory_format):
    students, classes = case["students"], case["classes"]
    channels = case["shape"][1]
    head = FusionHead([channels] * students, channels, classes).double()
    head.load_state_dict(arrays.under("param/"), strict=True)
    features = [leaf(x, memory_format) for x in arrays["xs"]]
    found = head.train()(features)
    assert relative_l2(found.attention, found.fused.square().mean(1)) <= BOUND
    check_fusion(arrays, features, head.state_dict(keep_vars=True), (found.logits, found.fused))
    assert head.norm1.num_batches_tracked.item() == head.norm2.num_batches_tracked.item() == 1
    arrays.check("eval_logits", head.eval()(features).logits)


def check_fusion(arrays, features, state, outputs):
    logits, fused = outputs
    arrays.check("logits", logits)
    arrays.check("fused", fused)
    ((logits * arrays["cotangent_logits"]).sum() + (fused * arrays["cotangent_fused"]).sum()).backward()
    arrays.check("grad_xs", torch.stack([x.grad for x in features]))
    check_state(arrays, state)


def check_state(arrays, state):
    """Gradients of all parameters and running statistics after one training forward."""
    gradients, buffers = arrays.under("grad/"), arrays.under("after/")
    assert set(gradients) == {k for k, x in state.items() if x.requires_grad}
    assert set(buffers) == {k for k in state if "running" in k}
    for name in gradients:
        arrays.check(f"grad/{name}", state[name].grad)
    for name in buffers:
        arrays.check(f"after/{name}", state[name])


def check_transform_operator(case, arrays, memory_format):
    parameters = trained(arrays.under("param/"))
    x = arrays["x"].contiguous(memory_format=memory_format)

    def transform(training):
        stages = [
            functional.Stage(parameters[f"stages.{j}.deconv.weight"], norm(parameters, f"stages.{j}.norm", training))
            for j in range(case["stages"])
        ]
        return functional.deep_to_shallow(x, stages)

    check_transform(case, arrays, parameters, transform)


def check_transform_module(case, arrays, memory_format):
    recorded = arrays.under("param/")
    weights = [recorded[f"stages.{j}.deconv.weight"] for j in range(case["stages"])]
    channels = [w.shape[1] for w in reversed(weights)] + [weights[0].shape[0]]
    module = DeepToShallow(channels).double()
    module.load_state_dict(recorded, strict=True)
    x = arrays["x"].contiguous(memory_format=memory_format)

    def transform(training):
        return module(x) if training else module(x, training=False)

    check_transform(case, arrays, module.state_dict(keep_vars=True), transform)
    assert [stage.norm.num_batches_tracked.item() for stage in module.stages] == [1] * case["stages"]
    for given, made in zip(module(x, training=False), module.eval()(x), strict=True):
        assert torch.equal(given, made)


def check_transform(case, arrays, state, transform):
    # Recorded with stage 0, the deepest, first; the operator gives the shallowest map first.
    maps = transform(True)[::-1]
    sides = [m.shape[-1] for m in maps]
    assert sides == [case["shape"][-1] * 2 ** (j + 1) for j in range(case["stages"])]
    for j, found in enumerate(maps):
        arrays.check(f"train_map{j}", found)
    sum((m * arrays[f"cotangent{j}"]).sum() for j, m in enumerate(maps)).backward()
    check_state(arrays, state)
    for j, found in enumerate(transform(False)[::-1]):
        arrays.check(f"eval_map{j}", found)


CHECKS = {
    "feature": (check_feature,),
    "peer_kl_ce": (check_peer_kl_ce, check_peer_kl),
    "fusion_module": (check_fusion_operator, check_fusion_module),
    "deep_to_shallow": (check_transform_operator, check_transform_module),
}


# A kind that nobody checks fails the collection.
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("case", "check"),
    [
        pytest.param(case, check, id=f"{case['case']}-{case['kind']}-{check.__name__}")
        for case in CASES
        for check in CHECKS[case["kind"]]
    ],
)
def test_recorded_case(case, check, memory_format):
    arrays = Arrays(case["case"])
    check(case, arrays, memory_format)
    assert arrays.unread == set(), "recorded, but not checked"


def test_every_array_belongs_to_a_case():
    with np.load(FOLDER / "ops.npz", allow_pickle=False) as file:
        owners = {int(key.partition("/")[0]) for key in file}
    assert owners == {case["case"] for case in CASES}
