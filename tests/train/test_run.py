import json

import pytest
import torch
from safetensors.torch import load_file

from fastfuse import cli, data, models
from fastfuse.methods import METHODS, build_method
from fastfuse.train.checkpoint import load
from fastfuse.train.evaluate import Evaluator

HEADS = {
    "ffsd": {"student0", "student1", "fusion", "leader", "ensemble"},
    "ffl": {"student0", "student1", "fusion", "ensemble"},
    "ffcl": {"student0", "teacher", "fusion"},
    "one": {"student0", "student1", "student2", "gated", "ensemble"},
    "independent": {"student0", "student1", "ensemble"},
    "dml": {"student0", "student1", "ensemble"},
    "paraphraser": {"teacher"},
    "dfa-search": {"group0", "group1", "group2", "ensemble"},
} | {name: {"student0"} for name in ("kd", "at", "ft", "feed-parallel", "feed-sequential", "dfa")}
# What a run folder holds besides: runs of what is trained first, and what is found besides weights.
BESIDES = {"ft": {"teachers", "paraphrasers"}, "feed-sequential": {"teachers", "stages"}, "dfa": {"teachers", "search"}}
BESIDES |= {"dfa-search": {"teachers", "aggregation.json"}}
BESIDES |= {name: {"teachers"} for name in ("kd", "at", "feed-parallel", "paraphraser")}


def test_all_methods_are_covered():
    assert HEADS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_folder_holds_what_is_promised(train, method):
    run = train("--method", method)
    deployed = METHODS[method].deployed
    names = {"config.json", "metrics.jsonl", "metrics.csv", "summary.json", "checkpoint.pt", f"{deployed}.safetensors"}
    names |= {"checkpoint-1.pt", "keepsakes.npz"}
    if deployed in HEADS[method]:
        names.add(f"{deployed}_best.safetensors")
    found = {path.name for path in run.path.iterdir()} - {"aggregation.png"}  # where there is matplotlib
    assert found == names | BESIDES.get(method, set())
    summary = run.summary
    assert (summary["method"], summary["model"], summary["seed"]) == (method, "resnet8", 0)
    assert summary["networks"].keys() == HEADS[method]
    for name, network in summary["networks"].items():
        assert network.keys() == {"best_top1", "last_top1", "best_epoch"}
        history = [line["accuracy"][name]["top1"] for line in run.metrics]
        assert network["last_top1"] == history[-1]
        assert network["best_top1"] == max(history) == history[network["best_epoch"] - 1]
    for key in ("images_per_second", "step_ms", "seconds"):
        assert summary[key] > 0
    assert summary["commit"] and summary["device"]
    assert torch.__version__.startswith(summary["versions"]["torch"])
    assert [line["epoch"] for line in run.metrics] == [1, 2]
    for line in run.metrics:
        assert line["losses"]["loss"] == pytest.approx(
            sum(v for k, v in line["losses"].items() if k != "loss"), rel=1e-5
        )
        assert line["accuracy"].keys() == HEADS[method] | ({"oracle"} if "ensemble" in HEADS[method] else set())
    assert [line["learning_rate"] for line in run.metrics] == pytest.approx([0.02, 0.002])


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].deployed in HEADS[name]])
def test_the_deployed_network_is_the_plain_network(train, tiny_npz, method):
    deployed = METHODS[method].deployed
    run = train("--method", method)
    dataset = data.load("npz", path=tiny_npz, padding=1)
    for file, expected in (("", "last_top1"), ("_best", "best_top1")):
        plain = models.build("resnet8", 3)
        plain.load_state_dict(load_file(run.path / f"{deployed}{file}.safetensors"), strict=True)
        plain.eval()
        batches = data.EvaluationBatches(dataset.test, mean=dataset.mean, std=dataset.std, batch_size=100)
        images, labels = batches.draw(30)
        assert batches.counts == [30]
        with torch.no_grad():
            right = (plain(images).logits.argmax(1) == labels).float().mean().item()
        assert 100 * right == pytest.approx(run.summary["networks"][deployed][expected], abs=1e-4)


def test_the_best_epoch_is_chosen_on_validation_images_where_there_are_any(train):
    run = train("--val-fraction", "0.3", "--epochs", "5", "--method", "independent", "--students", "1")
    assert run.summary["best_chosen_on"] == "validation"
    chosen = [line["validation"]["student0"]["top1"] for line in run.metrics]
    best_epoch = chosen.index(max(chosen)) + 1
    network = run.summary["networks"]["student0"]
    assert network["best_epoch"] == best_epoch
    assert network["best_top1"] == run.metrics[best_epoch - 1]["accuracy"]["student0"]["top1"]
    assert train(out="without").summary["best_chosen_on"] == "test"


def test_eval_agrees_with_the_run(train, capsys):
    run = train("--ema", "0.5", "--epochs", "3")
    capsys.readouterr()
    assert cli.main(["eval", str(run.path), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epoch"] == 3
    best = found["accuracy"].pop("leader (best)")
    assert found["accuracy"] == run.metrics[-1]["accuracy"]
    assert best["top1"] == run.summary["networks"]["leader"]["best_top1"]
    assert cli.main(["eval", str(run.path), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "leader (best)" in table and f"{best['top1']:.2f}" in table


def test_eval_takes_data_that_have_moved(train, tiny_npz, tmp_path, capsys):
    moved = tmp_path / "moved.npz"
    moved.write_bytes(tiny_npz.read_bytes())
    own = tmp_path / "own.npz"
    own.write_bytes(tiny_npz.read_bytes())
    run = train("--data-path", own)
    own.unlink()
    assert cli.main(["eval", str(run.path), "--device", "cpu"]) != 0
    assert "own.npz" in capsys.readouterr().err
    assert cli.main(["eval", str(run.path), "--device", "cpu", "--data-path", str(moved)]) == 0


def test_info_lists_every_operator_with_the_reason_why_a_backend_is_missing(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert "cpu" in found["devices"]
    expected = {
        "grouped_conv",
        "attention_mse",
        "augment",
        "concat_conv1x1",
        "concat_fuse",
        "deep_to_shallow",
        "diversity_target",
    }
    expected |= {"aggregate_distance", "batch_norm_act", "feature_kl", "feature_mse", "normalized_lp", "peer_kl_ce"}
    assert expected == found["ops"].keys()
    for op, backends in found["ops"].items():
        assert backends.keys() == {"reference", "triton", "cuda"}
        assert backends["reference"] == "usable"
        assert all(r == "usable" or op in r or "no CUDA device" in r for r in backends.values())
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in expected)


class Fixed(torch.nn.Module):
    """Heads whose predictions are given, to check how they are counted."""

    def __init__(self, logits: dict[str, torch.Tensor], students: list[str]) -> None:
        super().__init__()
        self.logits, self.names = logits, students

    def predict(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: row[images.long()] for name, row in self.logits.items()}

    def ensembles(self) -> dict[str, list[str]]:
        return {"": self.names}


class Numbers(data.EvaluationBatches):
    """Batches of ten whose images are their own numbers."""

    def __init__(self, labels: torch.Tensor) -> None:
        split = data.Split(torch.arange(len(labels)), labels)
        super().__init__(split, mean=torch.zeros(3), std=torch.ones(3), batch_size=10)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._rows[:count] + self._next
        self._next += count
        return self.split.images[rows], self.split.labels[rows]


def test_accuracies_ensemble_and_oracle_are_counted_right():
    from contextlib import nullcontext

    generator = torch.Generator().manual_seed(3)
    rows = {name: torch.randn(41, 7, generator=generator) for name in ("student0", "student1", "leader")}
    labels = torch.randint(0, 7, (41,), generator=generator)
    evaluator = Evaluator(Fixed(rows, ["student0", "student1"]), Numbers(labels), nullcontext)
    assert evaluator() == (found := evaluator())  # counts start at zero each time

    def top(row, k):
        return [int(label) in row[i].argsort(descending=True)[:k].tolist() for i, label in enumerate(labels)]

    def percent(hits):
        return pytest.approx(100 * sum(hits) / 41)

    mean = (rows["student0"] + rows["student1"]) / 2
    for name, row in {**rows, "ensemble": mean}.items():
        assert found[name] == {"top1": percent(top(row, 1)), "top5": percent(top(row, 5))}
    either = [a or b for a, b in zip(top(rows["student0"], 1), top(rows["student1"], 1), strict=True)]
    assert found["oracle"]["top1"] == percent(either)


def test_top5_of_few_classes_is_the_best_k_and_one_student_has_no_ensemble():
    from contextlib import nullcontext

    rows = {"student0": torch.randn(9, 3)}
    found = Evaluator(Fixed(rows, ["student0"]), Numbers(torch.arange(9) % 3), nullcontext)()
    assert found.keys() == {"student0"} and found["student0"]["top5"] == 100.0


@pytest.mark.long
def test_ffsd_learns_the_digits(tmp_path, capsys):
    command = "train --method ffsd --model resnet20 --data digits --epochs 6 --batch-size 32 --device cpu --quiet"
    assert cli.main([*command.split(), "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["networks"]["leader"]["last_top1"] > 80
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["losses"]["leader_ce"] < 0.5 * lines[0]["losses"]["leader_ce"]


def test_a_fresh_method_depends_on_the_seed_alone(train):
    first = load(train("--lr", "1e-30", "--weight-decay", "0", out="a").path / "checkpoint.pt")["method"]
    torch.manual_seed(0)
    method = build_method("ffsd", model="resnet8", students=2, num_classes=3)
    assert torch.equal(first["peers.2.conv1.weight"], method.peers[-1].conv1.weight)
