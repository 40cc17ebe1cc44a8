import dataclasses

import pytest
import torch

from fastfuse.cli import parse_train
from fastfuse.config import METHOD_FIELDS, TrainConfig, adapted, from_recipe, recipes
from fastfuse.errors import InputError
from fastfuse.methods import METHODS
from fastfuse.train.build import make_method, resolved
from fastfuse.train.schedule import learning_rate_factor
from tests.methods import making

FFSD_ROWS = [
    *("cifar100-resnet20", "cifar100-resnet32", "cifar100-resnet56", "cifar100-wrn16_2", "cifar100-wrn40_2"),
    *("cifar100-densenet40_12", "cifar100-googlenet"),
]
FFL_ROWS = ["cifar100-ffl-resnet32", "cifar10-ffl-resnet32", "cifar100-ffl-separate-resnet32"]
BRANCH_ROWS = [*FFL_ROWS, "cifar100-one-resnet32"]
TAUGHT_ROWS = ["cifar100-feed-resnet56"]
DFA_ROWS = [f"cifar100-dfa-{model}" for model in ("wrn16_4", "wrn28_2", "wrn16_2", "resnet56")]


IMAGENET_ROWS = [f"imagenet-{name}" for name in ("resnet18", "resnet34", "ffl-resnet34", "feed-resnet18")]


def test_there_is_a_recipe_for_every_row_whose_model_exists():
    assert set(recipes()) == {*FFSD_ROWS, *BRANCH_ROWS, *TAUGHT_ROWS, *DFA_ROWS, *IMAGENET_ROWS}


IMAGENET = {
    "data": "imagenet",
    "image_size": 224,
    "epochs": 90,
    "batch_size": 256,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "gamma": 0.1,
}


@pytest.mark.parametrize("name", ["imagenet-resnet18", "imagenet-resnet34"])
def test_ffsd_recipes_of_imagenet_hold_the_published_values(name):
    recipe = resolved(from_recipe(name))
    published = IMAGENET | {
        "method": "ffsd",
        "model": name.removeprefix("imagenet-"),
        "students": 2,
        "nesterov": True,
        "fusion_weight_decay": 1e-5,
        "transform_lr": 1e-3,
        "transform_weight_decay": 1e-4,
        "milestones": (30, 60, 80),
        "warmup_epochs": 5,
        "temperature": 2.0,
        "rampup_epochs": 5,
        "lambda_diversity": 1e-5,
        "lambda_fusion": 10.0,
        "lambda_self_distillation": 1000.0,
        "diversity_mode": "published",
    }
    assert {key: getattr(recipe, key) for key in published} == published
    # As the program warms up: after s of n steps of an epoch the rate is (1 + s + epoch n) / (5 n) of the first.
    factors = [learning_rate_factor(recipe, epoch, step, 10) for epoch in range(90) for step in range(10)]
    assert factors[:50] == pytest.approx([(1 + i) / 50 for i in range(50)])
    assert [factors[10 * e] for e in (5, 29, 30, 59, 60, 79, 80, 89)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_the_other_recipes_of_imagenet_hold_the_values_of_their_page():
    ffl, feed = (resolved(from_recipe(f"imagenet-{name}")) for name in ("ffl-resnet34", "feed-resnet18"))
    shared = IMAGENET | {"milestones": (30, 60)}
    own = {"method": "ffl", "model": "resnet34", "students": 2, "nesterov": True, "temperature": 3.0}
    own |= {"sharing": "shared", "rampup_epochs": 24.0, "kl_target_epsilon": 1e-7, "fusion_weight_decay": 1e-5}
    assert {key: getattr(ffl, key) for key in shared | own} == shared | own
    own = {"method": "feed-parallel", "model": "resnet18", "students": 1, "nesterov": False, "teacher_epochs": 90}
    own |= {"teacher_model": "resnet18", "teacher_count": 3, "factor_weight": 500.0, "factor_targets": "raw"}
    own |= {"teacher_reduction": "sum", "translator_norm": False}
    assert {key: getattr(feed, key) for key in shared | own} == shared | own


@pytest.mark.parametrize("name", FFSD_ROWS)
def test_ffsd_recipes_hold_the_published_values(name):
    recipe = resolved(from_recipe(name))
    published = {
        "method": "ffsd",
        "model": name.removeprefix("cifar100-"),
        "students": 2,
        "data": "cifar100",
        "epochs": 300,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "fusion_weight_decay": 1e-5,
        "transform_lr": 1e-3,
        "transform_weight_decay": 1e-4,
        "milestones": (150, 225),
        "gamma": 0.1,
        "temperature": 2.0,
        "rampup_epochs": 5,
        "lambda_diversity": 1e-5,
        "lambda_fusion": 10.0,
        "lambda_self_distillation": 1000.0,
        "diversity_mode": "published",
    }
    assert {key: getattr(recipe, key) for key in published} == published


def test_the_feed_recipe_holds_the_values_of_its_page():
    recipe = resolved(from_recipe("cifar100-feed-resnet56"))
    wanted = {
        "method": "feed-parallel",
        "model": "resnet56",
        "students": 1,
        "teacher_model": "resnet56",
        "teacher_count": 5,
        "teacher_epochs": 200,
        "data": "cifar100",
        "epochs": 200,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 5e-4,
        "milestones": (100, 150),
        "gamma": 0.1,
        "factor_weight": 500.0,
        "factor_targets": "raw",
        "teacher_reduction": "sum",
        "translator_norm": False,
    }
    assert {key: getattr(recipe, key) for key in wanted} == wanted


@pytest.mark.parametrize("name", DFA_ROWS)
def test_dfa_recipes_hold_the_values_of_their_page(name):
    recipe = resolved(from_recipe(name))
    wanted = {
        "method": "dfa",
        "model": name.removeprefix("cifar100-dfa-"),
        "students": 1,
        "teacher_model": "wrn28_4",
        "teacher_count": 1,
        "teacher_epochs": 200,
        "search_epochs": 25,
        "data": "cifar100",
        "epochs": 200,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "milestones": (100, 150),
        "gamma": 0.1,
        "dfa_weight": 1.0,
        "distance": "l2",
        "aggregation": "searched",
    }
    assert {key: getattr(recipe, key) for key in wanted} == wanted


@pytest.mark.parametrize("name", FFL_ROWS)
def test_ffl_recipes_hold_the_published_values(name):
    recipe = resolved(from_recipe(name))
    values = (recipe.method, recipe.model, recipe.students, recipe.epochs, recipe.temperature, recipe.rampup_epochs)
    assert values == ("ffl", "resnet32", 2, 301, 3.0, 80)
    assert (recipe.kl_target_epsilon, recipe.milestones, recipe.seed) == (1e-7, (150, 225), 1)
    assert (recipe.weight_decay, recipe.fusion_weight_decay, recipe.nesterov) == (1e-4, 1e-5, True)
    assert recipe.data == name.partition("-")[0]
    assert recipe.sharing == ("separate" if "separate" in name else "shared")


def test_one_recipe_holds_the_values_of_its_program():
    recipe = resolved(from_recipe("cifar100-one-resnet32"))
    values = (recipe.method, recipe.model, recipe.students, recipe.epochs, recipe.temperature, recipe.rampup_epochs)
    assert values == ("one", "resnet32", 3, 300, 3.0, 80)
    assert (recipe.kl_target_epsilon, recipe.milestones, recipe.nesterov) == (1e-7, (151, 225), False)
    assert (recipe.lr, recipe.weight_decay, recipe.batch_size) == (0.1, 1e-4, 128)


@pytest.mark.parametrize("name", [n for n in FFSD_ROWS if "wrn" in n])
def test_wide_resnet_recipes_have_the_published_quirks(name):
    leader = make_method(resolved(from_recipe(name)), 100).networks()["leader"]
    assert leader.bn1.momentum == 0.9
    assert leader.conv1.bias is not None
    assert leader.layer2[0].conv1.stride == (1, 1) and leader.layer2[0].conv2.stride == (2, 2)


def test_densenet_and_googlenet_recipes_have_the_published_quirks():
    densenet, googlenet = (
        make_method(resolved(from_recipe(f"cifar100-{name}")), 100).networks()["leader"]
        for name in ("densenet40_12", "googlenet")
    )
    assert densenet.conv1.out_channels == 24 and densenet.feature_channels == (168, 312, 456)
    convolutions = [layer for layer in googlenet.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert all(layer.bias is not None and layer.kernel_size != (5, 5) for layer in convolutions)
    assert googlenet.dropout.p == 0 and googlenet.feature_channels == (480, 832, 1024)


def test_without_a_recipe_the_published_ffsd_values_hold():
    ours = dataclasses.asdict(resolved(TrainConfig(model="resnet32", data="cifar100")))
    recipe = dataclasses.asdict(resolved(from_recipe("cifar100-resnet32")))
    assert {k: v for k, v in ours.items() if k != "recipe"} == {k: v for k, v in recipe.items() if k != "recipe"}


def test_the_command_line_wins_over_the_recipe():
    config = parse_train("--recipe cifar100-resnet32 --epochs 7 --lr 0.3 --temperature 4 --milestones 3 5".split())
    assert (config.epochs, config.lr, config.temperature, config.milestones) == (7, 0.3, 4.0, (3, 5))
    assert (config.model, config.data, config.lambda_fusion) == ("resnet32", "cifar100", 10.0)


def test_a_recipe_serves_the_baselines_too():
    config = parse_train("--recipe cifar100-wrn16_2 --method independent --students 1".split())
    assert all(getattr(config, name) is None for name in METHOD_FIELDS)
    assert (config.epochs, config.weight_decay, config.wrn_last_norm_momentum) == (300, 1e-4, 0.9)
    other = parse_train("--recipe cifar100-wrn16_2 --model resnet20".split())
    assert other.wrn_last_norm_momentum is None and other.temperature == 2.0


def test_adapting_to_the_same_method_changes_nothing():
    recipe = from_recipe("cifar100-resnet32")
    assert adapted(recipe, method="ffsd", model="resnet32") == recipe


def test_an_unknown_recipe_names_the_near_ones():
    with pytest.raises(InputError, match="cifar100-resnet32"):
        parse_train(["--recipe", "cifar100-resnet3"])


def test_every_method_default_is_a_field_of_the_configuration():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for method in METHODS.values():
        assert set(method.defaults) <= set(METHOD_FIELDS) <= fields


@pytest.mark.parametrize("name", sorted(METHODS))
def test_resolving_fills_in_each_methods_own_values(name):
    config = resolved(TrainConfig(method=name, model="resnet8"))
    for field in METHOD_FIELDS:
        assert getattr(config, field) == METHODS[name].defaults.get(field)
    method = making.make(name, num_classes=3, **METHODS[name].defaults)
    assert method.name == name
