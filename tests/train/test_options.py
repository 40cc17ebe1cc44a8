"""Every option set off its default, with a check that fails if the option is ignored."""

import dataclasses
import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastfuse import cli, models
from fastfuse.config import TrainConfig
from fastfuse.train import checkpoint
from fastfuse.train.checkpoint import load
from fastfuse.train.terms import TermLog

# Options that change what is computed: (option, the base that it is compared with). The final weights must differ.
CHANGES_WEIGHTS = {
    "method": ("--method dml", ""),
    "model": ("--model resnet14", ""),
    "students": ("--students 3", ""),
    "leader": ("--leader resnet14", ""),
    "taps": ("--taps layer2 layer3", ""),
    "crop_padding": ("--crop-padding 2", ""),
    "flip": ("--flip False", ""),
    "epochs": ("--epochs 3", ""),
    "batch_size": ("--batch-size 20", ""),
    "accumulate": ("--accumulate 2", ""),
    "seed": ("--seed 1", ""),
    "lr": ("--lr 0.03", ""),
    "momentum": ("--momentum 0.8", ""),
    "clip_norm": ("--clip-norm 0.1", ""),
    "nesterov": ("--no-nesterov", ""),
    "weight_decay": ("--weight-decay 0.01", ""),
    "fusion_weight_decay": ("--fusion-weight-decay 0.01", ""),
    "transform_lr": ("--transform-lr 0.01", ""),
    "transform_weight_decay": ("--transform-weight-decay 0.01", ""),
    "schedule": ("--schedule cosine", ""),
    "milestones": ("--milestones 2", ""),
    "gamma": ("--gamma 0.5", ""),
    "warmup_epochs": ("--warmup-epochs 1", ""),
    "temperature": ("--temperature 3", ""),
    "rampup_epochs": ("--rampup-epochs 0", ""),
    "lambda_diversity": ("--lambda-diversity 0.1", ""),
    "lambda_fusion": ("--lambda-fusion 20", ""),
    "lambda_self_distillation": ("--lambda-self-distillation 1", ""),
    "diversity_mode": ("--diversity-mode normalized --lambda-diversity 0.1", "--lambda-diversity 0.1"),
    "kl_target_epsilon": ("--method ffl --rampup-epochs 0 --kl-target-epsilon 0.01", "--method ffl --rampup-epochs 0"),
    "sharing": ("--method ffl --sharing separate", "--method ffl"),
    "branch_stage": ("--method ffl --branch-stage 1", "--method ffl"),
    "kd_weight": ("--method kd --kd-weight 0.5", "--method kd"),
    "at_weight": ("--method at --at-weight 10", "--method at"),
    "factor_weight": ("--method ft --factor-weight 10", "--method ft"),
    "factor_ratio": ("--method ft --factor-ratio 0.25", "--method ft"),
    "factor_targets": ("--method feed-sequential --factor-targets paraphrased", "--method feed-sequential"),
    "teacher_reduction": ("--method feed-parallel --teacher-reduction mean", "--method feed-parallel"),
    "translator_norm": ("--method ft --translator-norm True", "--method ft"),
    "dfa_weight": ("--method dfa --dfa-weight 5", "--method dfa"),
    "distance": ("--method dfa --distance ofd", "--method dfa"),
    "aggregation": ("--method dfa --model resnet14 --aggregation last", "--method dfa --model resnet14"),
    "gamma_st": ("--method dfa-search --gamma-st 5", "--method dfa-search"),
    "gamma_ts": ("--method dfa-search --gamma-ts 5", "--method dfa-search"),
    "alpha_lr": ("--method dfa-search --model resnet14 --alpha-lr 0.1", "--method dfa-search --model resnet14"),
    "alpha_weight_decay": (
        "--method dfa-search --model resnet14 --alpha-lr 0.1 --alpha-weight-decay 1",
        "--method dfa-search --model resnet14 --alpha-lr 0.1",
    ),
    "response_weight": ("--method ffcl --rampup-epochs 0 --response-weight 5", "--method ffcl --rampup-epochs 0"),
    "peer_weight": ("--method ffcl --rampup-epochs 0 --peer-weight 5", "--method ffcl --rampup-epochs 0"),
    "attention_weight": ("--method ffcl --rampup-epochs 0 --attention-weight 50", "--method ffcl --rampup-epochs 0"),
    "fused_stages": ("--method ffcl --fused-stages 2", "--method ffcl"),
    "feature_distance": ("--method ffcl --rampup-epochs 0 --feature-distance mse", "--method ffcl --rampup-epochs 0"),
    "feature_temperature": (
        "--method ffcl --rampup-epochs 0 --feature-distance kl --feature-temperature 4",
        "--method ffcl --rampup-epochs 0 --feature-distance kl",
    ),
    "regularization": ("--method ffcl --regularization off", "--method ffcl"),
    "regularization_weight": ("--method ffcl --regularization-weight 0.5", "--method ffcl"),
    "regularization_temperature": ("--method ffcl --regularization-temperature 2", "--method ffcl"),
    "detach_fusion": ("--method ffcl --detach-fusion True", "--method ffcl"),
    "teacher_model": ("--method kd --teacher-model resnet14", "--method kd"),
    "teacher_count": ("--method feed-parallel --teacher-count 2", "--method feed-parallel"),
    "teacher_epochs": ("--method kd --teacher-epochs 1", "--method kd"),
    "paraphraser_epochs": ("--method ft --paraphraser-epochs 1", "--method ft"),
    "search_epochs": ("--method dfa --model resnet14 --search-epochs 1", "--method dfa --model resnet14"),
    "feed_stages": ("--method feed-sequential --feed-stages 2", "--method feed-sequential"),
    "wrn_conv_bias": ("--model wrn10_1 --wrn-conv-bias False", "--model wrn10_1"),
    "wrn_stride_on": ("--model wrn10_1 --wrn-stride-on conv1", "--model wrn10_1"),
    "wrn_shortcut_input": ("--model wrn10_1 --wrn-shortcut-input activated", "--model wrn10_1"),
    "wrn_last_norm_momentum": ("--model wrn10_1 --wrn-last-norm-momentum 0.1", "--model wrn10_1"),
    "amp": ("--amp bf16", ""),
    "val_fraction": ("--val-fraction 0.25", ""),
    "val_seed": ("--val-fraction 0.25 --val-seed 3", "--val-fraction 0.25"),
}
# Options with a test of their own below, or in the file named.
HAS_OWN_TEST = {
    "recipe": "test_recipes.py",
    "init": "below",
    "teachers": "test_preliminary.py",
    "aggregation_file": "test_preliminary.py",
    "data": "below",
    "data_root": "below",
    "data_path": "below",
    "download": "below",
    "image_size": "test_imagefolder.py",
    "stream": "test_streaming_run.py",
    "data_cache": "test_streaming_run.py",
    "workers": "test_streaming_run.py",
    "channels_last": "below",
    "ema": "below",
    "mode": "test_modes.py",
    "tf32": "test_modes.py",
    "sync_batchnorm": "test_distributed.py",
    "strategy": "test_strategies.py",
    "replicas": "test_replicas.py",
    "device": "below",
    "out": "test_run.py",
    "resume": "test_resume.py",
    "max_time": "below",
    "checkpoint_minutes": "below",
    "keep_checkpoints": "below",
    "max_bad_steps": "test_safety.py",
    "deterministic": "test_safety.py",
    "log_interval": "below",
    "log": "test_loggers.py",
    "baseline": "below",
    "quiet": "below",
}


def test_every_option_is_tested():
    assert {field.name for field in dataclasses.fields(TrainConfig)} == CHANGES_WEIGHTS.keys() | HAS_OWN_TEST.keys()


@pytest.fixture(scope="module")
def states(tiny: list[str], tmp_path_factory: pytest.TempPathFactory):
    """The final state of all networks for a set of options; each base is trained once."""
    known = {}

    def state(options: str) -> dict[str, torch.Tensor]:
        if options not in known:
            path = tmp_path_factory.mktemp("runs") / "run"
            assert cli.main([*tiny, "--method", "ffsd", *options.split(), "--out", str(path)]) == 0
            known[options] = load(path / "checkpoint.pt")["method"]
        return known[options]

    return state


@pytest.mark.parametrize("name", CHANGES_WEIGHTS)
def test_option_changes_what_is_trained(states, name):
    changed, base = CHANGES_WEIGHTS[name]
    ours, theirs = states(changed), states(base)
    # An option that a method or network honours changes keys, shapes or values.
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not same


def test_the_same_options_train_the_same_weights(states):
    # The control of the test above: without a change nothing differs.
    first, second = states(""), states("--log-interval 7")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_init_starts_one_network_or_all(train, tmp_path):
    torch.manual_seed(5)
    start = models.build("resnet8", 3).state_dict()
    save_file(start, tmp_path / "start.safetensors")
    torch.save(start, tmp_path / "start.pt")
    frozen = "--lr 1e-30 --weight-decay 0"

    def conv1(run, network):
        state = load(run.path / "checkpoint.pt")["method"]
        return state[f"{network}.conv1.weight"]

    leader = train(*frozen.split(), "--init", f"leader={tmp_path / 'start.pt'}", out="leader")
    assert torch.equal(conv1(leader, "peers.2"), start["conv1.weight"])
    assert not torch.equal(conv1(leader, "peers.0"), start["conv1.weight"])

    every = train(*frozen.split(), "--init", tmp_path / "start.safetensors", out="all")
    names = ("peers.2", "peers.0", "peers.1")  # the leader is the last one
    assert all(torch.equal(conv1(every, name), start["conv1.weight"]) for name in names)

    file = tmp_path / "start.pt"
    two = train(*frozen.split(), "--init", f"student1={file}", "--init", f"leader={file}", out="two")
    found = [torch.equal(conv1(two, name), start["conv1.weight"]) for name in names]
    assert found == [True, False, True]


def test_ema_is_evaluated_and_deployed(train):
    run = train("--ema", "0.9", "--epochs", "3")
    state = load(run.path / "checkpoint.pt")
    deployed = run.weights("leader")
    assert torch.equal(deployed["conv1.weight"], state["ema"]["peers.2.conv1.weight"])
    assert not torch.equal(deployed["conv1.weight"], state["method"]["peers.2.conv1.weight"])


def test_ema_follows_its_decay(train):
    # From the initial weights, after each of two steps: a <- d a + (1 - d) w.
    options = "--method independent --students 1 --lr 0.01 --epochs 1"
    start = train(*options.split(), "--lr", 1e-30, "--batch-size", 60, out="start").weights("student0")
    first = train(*options.split(), "--batch-size", 60, out="plain").weights("student0")
    both = train(*options.split(), "--epochs", 2, "--batch-size", 60, "--milestones", 9, out="two").weights("student0")
    ema = "--ema 0.75 --milestones 9"
    averaged = train(*options.split(), *ema.split(), "--epochs", 2, "--batch-size", 60, out="ema").weights("student0")
    after_one = 0.75 * start["fc.weight"] + 0.25 * first["fc.weight"]
    expected = 0.75 * after_one + 0.25 * both["fc.weight"]
    torch.testing.assert_close(averaged["fc.weight"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_runs_networks_in_half_precision_and_losses_in_float32(train, amp, monkeypatch):
    seen = set()
    original = models.build("resnet8", 3).__class__.forward

    def forward(self, images):
        output = original(self, images)
        if self.training and torch.is_grad_enabled() and isinstance(output.logits, torch.Tensor):
            seen.update((output.logits.dtype, output.features[-1].dtype))
        return output

    monkeypatch.setattr("fastfuse.models.cifar_resnet.CifarResNet.forward", forward)
    run = train("--amp", amp)
    assert seen == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert all(np.isfinite(list(line["losses"].values())).all() for line in run.metrics)
    assert (load(run.path / "checkpoint.pt")["scaler"] is not None) == (amp == "fp16")


@pytest.mark.parametrize("option", ["--channels-last", "--no-channels-last"])
def test_channels_last_decides_the_memory_format(train, option, monkeypatch):
    seen = set()
    original = models.build("resnet8", 3).__class__.forward

    def forward(self, images):
        output = original(self, images)
        if torch.is_grad_enabled():
            tensors = (images, self.layer2[0].conv1.weight, output.features[1])
            seen.update(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)
        return output

    monkeypatch.setattr("fastfuse.models.cifar_resnet.CifarResNet.forward", forward)
    run = train(option)
    assert seen == {option == "--channels-last"}
    assert all(weight.is_contiguous() for weight in run.weights("leader").values())


def test_data_and_its_path(train, tiny_npz, tmp_path):
    path = tmp_path / "other.npz"
    with np.load(tiny_npz) as arrays:
        np.savez(path, **{**arrays, "class_names": np.array(list("abcd"))})
    run = train("--data-path", path, out="npz")
    assert run.weights("leader")["fc.weight"].shape == (4, 64)
    digits = cli.main(
        "train --data digits --method independent --students 1 --model resnet8 --epochs 1 --batch-size 1000 --quiet "
        f"--device cpu --out {tmp_path / 'digits'}".split()
    )
    assert digits == 0
    assert json.loads((tmp_path / "digits" / "summary.json").read_text())["data"] == "digits"


@pytest.mark.parametrize("download", [False, True])
def test_cifar_root_and_download_reach_torchvision(tmp_path, monkeypatch, download):
    import torchvision

    asked = {}

    class Stand:
        def __init__(self, root, train, download):
            asked.update(root=str(root), download=asked.get("download", False) or download)
            self.data = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
            self.targets = [i % 100 for i in range(20)]
            self.classes = [str(i) for i in range(100)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Stand)
    options = "--data cifar100 --method independent --students 1 --model resnet8 --epochs 1 --batch-size 20 --quiet"
    extra = ["--download"] if download else []
    root = tmp_path / "root"
    arguments = ["train", *options.split(), "--device", "cpu", "--data-root", str(root), "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, *extra]) == 0
    assert asked == {"root": str(root), "download": download}


def test_device_is_honoured(train, refused, monkeypatch):
    assert train("--device", "cpu").summary["device"].endswith(("thread", "threads"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--device cuda:3" in refused("--device", "cuda:3", out="other")


def test_starts_that_are_stopped_at_once_come_to_an_end(train):
    """Each takes a step, or ends an epoch whose steps are done: two epochs of two steps need five."""
    options = ["--method", "independent", "--students", 1, "--batch-size", 30, "--max-time", 1e-9]
    reached = [
        (run.summary["epochs"], run.summary["completed"]) for run in (train(*options), *_again(train, options, 4))
    ]
    assert reached == [(0, False), (0, False), (1, False), (1, False), (2, True)]


def _again(train, options, times):
    return [train(*options, "--resume") for _ in range(times)]


def test_max_time_stops_with_a_checkpoint_and_goes_on(train, capsys):
    run = train("--epochs", "100000", "--max-time", "0.00001")
    assert run.summary["completed"] is False
    printed = capsys.readouterr().out
    assert "no epoch has finished yet" in printed
    assert "go on with: fastfuse train --resume" in printed
    epochs = run.summary["epochs"]
    assert epochs == 0, "the limit has passed before the first step, which every start takes"
    # Three steps an epoch, of which every start takes one; where none is left, it ends the epoch.
    for _ in range(3):
        again = train("--epochs", "100000", "--max-time", "0.00001", "--resume")
    assert epochs < again.summary["epochs"] < 100_000 and again.summary["completed"] is False


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_checkpoints_decides_how_many_stay(train, keep):
    run = train("--keep-checkpoints", keep, "--checkpoint-minutes", 0)
    names = [path.name for path in checkpoint.kept(run.path / "checkpoint.pt")]
    assert names == ["checkpoint.pt", "checkpoint-1.pt", "checkpoint-2.pt"][:keep]


def test_checkpoint_minutes_decides_how_often_an_epoch_is_saved(train, monkeypatch):
    saved = []
    original = checkpoint.save

    def save(path, state, *, keep):
        saved.append((state["position"]["epoch"], state["position"]["step"]))
        original(path, state, keep=keep)

    monkeypatch.setattr("fastfuse.train.checkpoint.save", save)
    train("--checkpoint-minutes", "0", out="often")
    assert saved == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    saved.clear()
    train("--checkpoint-minutes", "60", out="rarely")
    assert saved == [(1, 0), (2, 0)]


@pytest.mark.parametrize(
    ("interval", "reads"), [(1, 6), (2, 4), (50, 2)], ids=["every step", "every second", "epoch end"]
)
def test_log_interval_decides_how_often_the_device_is_waited_for(train, monkeypatch, interval, reads):
    counted = []
    original = TermLog.flush

    def flush(self):
        counted.append(len(self._positions))
        original(self)

    monkeypatch.setattr(TermLog, "flush", flush)
    train("--log-interval", interval)
    assert sum(1 for pending in counted if pending) == reads


def test_baseline_trains_the_network_alone_under_the_same_budget(train, capsys):
    run = train("--baseline", "--lambda-fusion", "5", "--seed", "3")
    alone = json.loads((run.path / "independent" / "config.json").read_text())
    assert (alone["method"], alone["students"], alone["epochs"], alone["seed"]) == ("independent", 1, 2, 3)
    table = capsys.readouterr().out
    assert "independent" in table and "leader" in table and str(run.path) in table


def test_quiet_prints_the_table_only(tiny, tmp_path, capsys):
    assert cli.main([*tiny, "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().err == ""
    loud = [option for option in tiny if option != "--quiet"]
    assert cli.main([*loud, "--out", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err.count("epoch ") == 2


def test_out_defaults_to_a_new_folder_each_time(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*tiny, "--epochs", "1"]) == 0
    time.sleep(1.1)
    assert cli.main([*tiny, "--epochs", "1"]) == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(names) == 2 and all(name.endswith("_ffsd_resnet8_npz") for name in names)
