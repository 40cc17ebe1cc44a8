"""The examples run, learn, and train every part of what they claim to train."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDS = {"plain_loop": None, "timm_task": "timm", "lightning_module": "lightning", "accelerate_loop": "accelerate"}
STEPS = 18


def load(name: str):
    if (needed := NEEDS[name]) and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'fastfuse[examples]'")
    specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_example_is_listed_here_and_in_their_readme():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(NEEDS)
    assert set(re.findall(r"\((\w+)\.py\)", (EXAMPLES / "README.md").read_text())) == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_short_and_uses_the_drop_in_parts(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80
    assert "fastfuse.FusionLoss(" in text and "fastfuse.extract(" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if needed else []) for name, needed in NEEDS.items()]
)
def test_an_example_learns_and_trains_every_part(name):
    example = load(name)
    untrained = {key: dict(part.named_parameters()) for key, part in example.main(steps=0)[1].items()}
    losses, parts = example.main(steps=STEPS)
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    third = STEPS // 3
    assert sum(losses[-third:]) < sum(losses[:third])
    for key, part in parts.items():
        before = untrained[key]
        same = [name for name, weight in part.named_parameters() if torch.equal(weight, before[name])]
        assert same == [], f"{key} did not train {same}"


@pytest.mark.long
def test_the_timm_task_keeps_what_timm_asks_for():
    example = load("timm_task")
    import timm

    task = example.FusionTask(
        example.Together([timm.create_model("resnet10t", num_classes=10) for _ in "ab"], "layer3", [256, 256], 10)
    )
    kept = task.get_eval_model()
    timm.create_model("resnet10t", num_classes=10).load_state_dict(kept.state_dict(), strict=True)
    task.setup_ema(decay=0.5)
    task.update_ema()
    averaged = task.get_eval_model(ema=True)
    assert averaged is not kept and set(averaged.state_dict()) == set(kept.state_dict())
    state = task.get_checkpoint_state()
    other = example.FusionTask(
        example.Together([timm.create_model("resnet10t", num_classes=10) for _ in "ab"], "layer3", [256, 256], 10)
    )
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    mine, theirs = task.trainable_module.state_dict(), other.trainable_module.state_dict()
    assert set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
