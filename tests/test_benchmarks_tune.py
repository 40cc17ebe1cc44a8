"""From trials of launch constants to the table that launchers read, without a GPU: in Triton's interpreter."""

import json

import pytest
import torch

from benchmarks import kernel_cases, tune, tuning
from benchmarks.launch_space import SEARCHES, Search
from benchmarks.timing import Timing
from fastfuse.kernels import _triton

CPU = torch.device("cpu")
SMALL = {"cifar": (((8, 8), (16, 4)), 2)}
LAUNCHES = {search.launch: search for search in SEARCHES}


def timing(milliseconds, spread=0.0):
    return Timing((milliseconds - spread, milliseconds, milliseconds + spread))


def comparing(cost, cifar=None, spread=0.0):
    """Timings of made-up launches: what a choice of constants costs on ImageNet's case and, perhaps, on CIFAR's."""

    def compare(taken, trial):
        cases = {"imagenet": cost} | ({} if cifar is None else {"cifar": cifar})
        return {f"{name} x": (timing(of(taken), spread), timing(of(trial), spread)) for name, of in cases.items()}

    return compare


def test_each_constant_is_chosen_beside_those_taken_before():
    best = {"TILE": 4, "WARPS": 8}
    cost = lambda own: 10 - sum(own.get(name) == value for name, value in best.items())  # noqa: E731
    taken, tried = tuning.descend({"TILE": (2, 4), "WARPS": (2, 8)}, comparing(cost))
    assert taken == best
    assert [note["constants"] for note in tried] == [
        {"TILE": 2}, {"TILE": 4}, {"TILE": 4, "WARPS": 2}, {"TILE": 4, "WARPS": 8}, best
    ]  # fmt: skip
    assert tried[-1]["microseconds"] == {"imagenet x": [10_000, 8_000]}, "the code's constants against those that won"


def once(compare):
    """The first comparison; none after it says that anything is faster."""
    calls = iter([compare])
    return lambda taken, trial: next(calls, comparing(lambda own: 1.0))(taken, trial)


FASTER = lambda own: 1.0 if own else 2.0  # noqa: E731


@pytest.mark.parametrize(
    "compare",
    [
        pytest.param(comparing(lambda own: 1.96 if own else 2.0), id="less than 3 %"),
        pytest.param(comparing(FASTER, spread=0.9), id="within the spread"),
        pytest.param(comparing(FASTER, cifar=lambda own: 1.1 if own else 1.0), id="slower on CIFAR's maps"),
        pytest.param(lambda taken, trial: "wrong: result 0", id="not right"),
        pytest.param(once(comparing(FASTER)), id="not confirmed"),
    ],
)  # fmt: skip
def test_what_is_no_clear_gain_stays_as_written(compare):
    taken, tried = tuning.descend({"TILE": (1,)}, compare)
    assert taken == {} and tried


class Asked(dict):
    """Constants to be tried; notes which ones a launcher asks for."""

    def __init__(self, constants):
        super().__init__(constants)
        self.names = set()

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("search", SEARCHES, ids=LAUNCHES)
def test_every_constant_is_one_that_the_launch_asks_for_and_changes_no_result(search, monkeypatch):
    monkeypatch.setattr(kernel_cases, "NETWORKS", SMALL)
    bench = tuning.Bench(search.cases("channels_last")[-1], torch.float32, CPU)
    asked = Asked({name: values[0] for name, values in search.values.items()})
    monkeypatch.setitem(_triton._tried, search.launch, asked)
    bench.check()
    assert set(search.values) <= asked.names
    if search is SEARCHES[0]:
        bench.truth[0], bench.eager[0] = bench.truth[0] + 1, bench.eager[0] + 1
        with pytest.raises(AssertionError, match="result 0"):
            bench.check()


def test_a_launch_reads_the_row_of_its_architecture_dtype_and_format(tmp_path, monkeypatch):
    table = tmp_path / "sm_90.json"
    tune.merged(table, "attention_mse_fwd", "float32 channels_last", {"constants": {"TILE": 64}})
    tune.merged(table, "attention_mse_fwd", "bfloat16 channels_last", {"constants": {"TILE": 32}})
    monkeypatch.setattr(_triton, "TABLES", tmp_path)
    monkeypatch.setattr(_triton, "architecture", lambda like: "sm_90")
    _triton.launch_table.cache_clear()
    plain = torch.ones(2, 3, 4, 4)
    last = plain.contiguous(memory_format=torch.channels_last)
    try:
        read = lambda like, **given: _triton.launch_constants("attention_mse_fwd", like, TILE=8, WARPS=4, **given)  # noqa: E731
        assert vars(read(last)) == {"TILE": 64, "WARPS": 4}
        assert read(last, dtype=torch.bfloat16).TILE == read(last.bfloat16()).TILE == 32
        assert read(plain).TILE == read(last.half()).TILE == 8
        with _triton.trying("attention_mse_fwd"):
            assert read(last).TILE == 8, "to be measured against, the written ones"
        tune.merged(table, "attention_mse_fwd", "float32 channels_last", None)
        assert json.loads(table.read_text())["attention_mse_fwd"].keys() == {"bfloat16 channels_last"}
    finally:
        _triton.launch_table.cache_clear()


def test_committed_tables_hold_constants_that_can_be_tuned():
    tables = list(_triton.TABLES.glob("sm_*.json"))
    assert tables
    for table in tables:
        for launch, rows in json.loads(table.read_text()).items():
            for kind, row in rows.items():
                assert kind in tune.KINDS
                assert len(row["constants"]) > 0 and row["constants"].keys() <= LAUNCHES[launch].values.keys()


def test_a_whole_search_ends_in_a_row(tmp_path, monkeypatch):
    small = Search("attention_mse_fwd", "attention_mse", "forward", ("all stages",), {"TILE": (1024,), "WARPS": (4,)})
    monkeypatch.setattr(kernel_cases, "NETWORKS", SMALL)
    case = small.cases("channels_last")[-1]
    monkeypatch.setattr(Search, "cases", lambda self, layout, batch=None: [case])
    monkeypatch.setattr(
        tuning, "measure_in_turn", lambda made, **_: {name: timing(1 + (name == "before")) for name in made}
    )
    options = tune.parser().parse_args(["--table", str(tmp_path / "t.json"), "--log", str(tmp_path / "log.json")])
    options.searches, options.kinds = [small], ["float32 channels_last"]
    lines = list(tune.run(options, CPU))
    assert lines[0].startswith(
        "attention_mse_fwd float32 channels_last: {'TILE': 1024, 'WARPS': 4} of 3 trials, 0 refused"
    )
    row = json.loads((tmp_path / "t.json").read_text())["attention_mse_fwd"]["float32 channels_last"]
    assert row["constants"] == {"TILE": 1024, "WARPS": 4} and row["microseconds"] == {case.shape: [2000, 1000]}
    assert len(json.loads((tmp_path / "log.json").read_text())["searches"][0]["tried"]) == 3
    options.max_time = -1
    assert list(tune.run(options, CPU)) == ["attention_mse_fwd float32 channels_last: not tuned, the time was over"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: tuning would begin")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert tune.main(["--table", str(tmp_path / "t.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert tune.main(["--launches", "warp_drive"]) == 2
    assert "warp_drive" in capsys.readouterr().err
