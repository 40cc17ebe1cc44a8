"""Networks that concatenate channels train like any other; they run one after another, since they cannot be stacked."""

import copy

import pytest
import torch

from fastfuse.errors import InputError
from fastfuse.methods import build_method
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

CLASSES = 5
MODELS = ["densenet10_4", "googlenet"]
REFUSAL = r"^the call of cat cannot be stacked: .*; use --strategy loop$"


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("googlenet", 8),
        pytest.param("densenet10_4", 8),
        pytest.param("densenet10_4", 11, id="densenet10_4, 11: maps that do not double"),
        pytest.param("densenet40_12", 8, id="densenet40_12, 8: the published widths"),
    ],
)
def test_ffsd_trains_with_transforms_of_the_taps_widths(model, size):
    torch.manual_seed(0)
    method = build_method("ffsd", model=model, students=2, num_classes=CLASSES).train()
    deep, middle, shallow = method.peers[0].feature_channels[::-1]
    stages = {name: [s.deconv.weight.shape[:2] for s in t.stages] for name, t in method.criterion.transforms.items()}
    assert stages == {name: [(deep, middle), (middle, shallow)] for name in ("student1", "leader")}
    before = copy.deepcopy(method.state_dict())
    step = TrainStep(method, build_optimizers(method, lr=0.01), amp="off")
    output = step(torch.randn(4, 3, size, size), torch.arange(4), torch.tensor(9.0))
    assert all(value.isfinite() and value > 0 for value in output.terms.values()), output.terms
    still = [name for name, value in method.state_dict().items() if torch.equal(value, before[name])]
    assert still == []


@pytest.mark.parametrize("model", MODELS)
def test_stacking_is_refused_by_name_and_nothing_is_changed(model):
    method = build_method("dml", model=model, students=2, num_classes=CLASSES)
    before = list(method.parameters())
    with pytest.raises(InputError, match=REFUSAL):
        method.arrange("grouped")
    assert method.peers.strategy == "loop"
    assert all(mine is own for mine, own in zip(method.parameters(), before, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_auto_falls_back_to_loop_where_a_measured_row_says_grouped(model, monkeypatch):
    """A row may stand in the table for an architecture of the same description that can be stacked."""
    method = build_method("dml", model=model, students=2, num_classes=CLASSES)
    assert method.arrange("auto") == "loop"
    monkeypatch.setattr("fastfuse.nn.networks.resolve_strategy", lambda strategy, members: "grouped")
    assert method.arrange("auto") == "loop"
