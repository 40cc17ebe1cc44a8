"""Which backend serves a call: explicit requests never fall back, FASTFUSE_BACKEND replaces `auto`, with reasons."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

import fastfuse.kernels  # noqa: F401 - registers every op
from fastfuse import functional, info
from fastfuse.errors import BackendUnavailableError, InputError
from fastfuse.kernels import _dispatch

X, LOGITS = torch.ones(2, 3, 4, 4), torch.ones(2, 4, 5)
NORMS = [functional.BatchNorm(*[torch.ones(c)] * 4, False) for c in (3, 2)]
IMAGES = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
# op as registered -> calls that it serves
CALLS = {
    "attention_mse": [
        lambda **b: functional.attention_mse(X, X, **b),
        lambda **b: functional.attention_map(X, **b),
    ],
    "aggregate_distance": [lambda **b: functional.aggregate_distance([X], torch.ones(1), X, **b)],
    "normalized_lp": [
        lambda **b: functional.normalized_lp(X, X, **b),
        lambda **b: functional.normalized_lp_joint(X, X, **b),
    ],
    "diversity_target": [
        lambda **b: functional.diversity_loss(X, X, **b),
        lambda **b: functional.diversity_target(X, **b),
        lambda **b: functional.diversity(X, X, **b),
    ],
    "peer_kl_ce": [
        lambda **b: functional.peer_kl_ce(LOGITS, torch.zeros(4, dtype=torch.long), temperature=2.0, **b),
        lambda **b: functional.peer_kl(LOGITS[0], LOGITS, temperature=2.0, **b),
    ],
    "concat_conv1x1": [lambda **b: functional.concat_conv1x1([X], torch.ones(2, 3, 1, 1), **b)],
    "concat_fuse": [
        lambda **b: functional.concat_fuse(
            [X], torch.ones(3, 1, 3, 3), NORMS[0], torch.ones(2, 3, 1, 1), NORMS[1], **b
        ),
        lambda **b: functional.concat_fuse_all(
            [functional.Fusion([X], torch.ones(3, 1, 3, 3), NORMS[0], torch.ones(2, 3, 1, 1), NORMS[1])], **b
        ),
    ],
    "deep_to_shallow": [
        lambda **b: functional.deep_to_shallow(X, [functional.Stage(torch.ones(3, 2, 3, 3), NORMS[1])], **b)
    ],
    "batch_norm_act": [lambda **b: functional.batch_norm_act(X, NORMS[0], **b)],
    "feature_mse": [lambda **b: functional.feature_mse([X], X, **b)],
    "grouped_conv": [lambda **b: functional.grouped_conv(X, torch.ones(2, 3, 3, 3), groups=1, **b)],
    "feature_kl": [lambda **b: functional.feature_kl([X], X, temperature=2.0, **b)],
    "augment": [
        lambda **b: functional.augment(
            IMAGES, torch.tensor([0]), torch.tensor([[0, 0]]), torch.tensor([False]),
            mean=torch.ones(3), std=torch.ones(3), padding=0, **b,
        )
    ],
}  # fmt: skip
each_call = pytest.mark.parametrize(
    ("op", "call"),
    [pytest.param(op, call, id=f"{op}-{i}") for op, calls in CALLS.items() for i, call in enumerate(calls)],
)


@pytest.fixture
def unusable(monkeypatch):
    """Every op has a Triton kernel that cannot run here, preferred to the reference, and no CUDA kernel."""
    registered = {op: {"triton": lambda tensor: "there is no GPU", "reference": None} for op in _dispatch.ops()}
    monkeypatch.setattr(_dispatch, "_ops", registered)
    monkeypatch.setattr(_dispatch, "_process_default", "auto")


def test_every_op_is_called_here():
    assert set(CALLS) == set(_dispatch.ops())
    functions = [f for f in map(functional.__dict__.get, functional.__all__) if inspect.isfunction(f)]
    with_backend = [f for f in functions if "backend" in inspect.signature(f).parameters]
    assert len(with_backend) == sum(map(len, CALLS.values()))


@each_call
def test_explicit_backend_never_falls_back(op, call, unusable):
    with pytest.raises(BackendUnavailableError, match=f"{op} cannot run on backend 'triton': there is no GPU; use"):
        call(backend="triton")
    with pytest.raises(BackendUnavailableError, match=f"'cuda': this version has no cuda kernel for {op}; use"):
        call(backend="cuda")


@each_call
def test_auto_takes_the_first_usable(op, call, unusable):
    assert _dispatch.resolve(op, "auto") == "reference"
    assert call(backend="auto") is not None
    assert call(backend="reference") is not None
    _dispatch.register(op, {"triton": lambda tensor: None, "reference": None})
    assert _dispatch.resolve(op) == "triton"
    assert _dispatch.resolve(op, "auto", torch.ones(1)) == "reference", "tensors on a CPU take the reference"
    assert _dispatch.resolve(op, "auto", torch.ones(1, device="meta")) == "triton"


@each_call
def test_unknown_backend_lists_the_known_ones(op, call):
    with pytest.raises(InputError, match="unknown backend 'tritn': did you mean triton") as caught:
        call(backend="tritn")
    assert all(name in str(caught.value) for name in (*_dispatch.BACKENDS, "auto"))


def test_unknown_op_lists_the_known_ones():
    with pytest.raises(InputError, match="unknown op 'concat_fus': did you mean concat_fuse") as caught:
        _dispatch.why_not("concat_fus", "reference")
    assert all(op in str(caught.value) for op in _dispatch.ops())


def test_info_tells_the_same_reason(unusable):
    assert info.info()["ops"]["concat_fuse"] == {
        "reference": "usable",
        "triton": "there is no GPU",
        "cuda": "this version has no cuda kernel for concat_fuse",
    }


PROGRAM = """
from fastfuse.kernels import _dispatch
absent = lambda tensor: "there is no GPU"
_dispatch.register("augment", {"cuda": absent, "triton": lambda tensor: None, "reference": None})
print(_dispatch.resolve("augment", "reference"), _dispatch.resolve("augment", "auto"))
"""


@pytest.mark.parametrize(
    ("value", "served"),
    [
        pytest.param("", "reference triton", id="empty counts as unset: auto is the first usable"),
        pytest.param("reference", "reference reference", id="named"),
        pytest.param(
            "cuda",
            "BackendUnavailableError: augment cannot run on backend 'cuda': there is no GPU; unset FASTFUSE_BACKEND",
            id="a backend named for the process does not fall back either",
        ),
        pytest.param("cudda", "InputError: unknown backend 'cudda': did you mean cuda? known: auto, cuda", id="typo"),
    ],
)
def test_environment_variable_replaces_auto_and_nothing_else(value, served):
    environment = {**os.environ, "FASTFUSE_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == (1 if "Error" in served else 0), done.stderr
    assert served in (done.stderr if "Error" in served else done.stdout)


def test_a_constant_to_the_compiler_is_one_of_torchs():
    """And the package is imported without the compiler, which takes longer than all the rest."""

    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    _dispatch.constant_to_the_compiler(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
    code = "import sys, fastfuse.train.report, fastfuse.train.loop; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
