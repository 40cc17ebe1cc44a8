"""From profiles to parts of a step: made-up traces, and the marks of a real step on a CPU."""

import pytest
import torch

from benchmarks import profile_step, profiling
from benchmarks import trace_parts as parts
from benchmarks.cases import Case
from benchmarks.roofline import Rates
from fastfuse.train.terms import TermLog

CPU = torch.device("cpu")


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def launched(number, ts, name, tid=1):
    """A kernel 100 us later than its launch."""
    host = event("cuda_runtime", "cudaLaunchKernel", ts, 1, tid, correlation=number)
    return [host, event("kernel", name, ts + 100, 5, tid=7, correlation=number)]


SEQUENCE = "Sequence number"
TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "part: optimizer", -9, 5),
        event("cpu_op", "aten::zero_", -8, 2, **{SEQUENCE: 5}),  # has no gradient: the number of the next one
        event("user_annotation", "part: networks", 0, 20),
        event("cpu_op", "aten::conv2d", 1, 8, **{SEQUENCE: 5}),
        event("cpu_op", "aten::cudnn_convolution", 2, 6),
        *launched(1, 3, "sm90_xmma_fprop"),
        event("cpu_op", "aten::relu", 10, 4, **{SEQUENCE: 6}),
        *launched(2, 11, "elementwise"),
        event("user_annotation", "part: losses", 30, 20),
        event("cpu_op", "aten::mul", 31, 4, **{SEQUENCE: 7}),
        *launched(3, 32, "elementwise"),
        *launched(4, 40, "concat_fuse_fwd_hidden_kernel"),
        event("cpu_op", "fastfuse_cuda::attention_mse_fwd", 43, 4),
        *launched(5, 44, "Memset"),
        # Backward, on a thread of its own, which no mark covers.
        event("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 60, 9, 2, **{SEQUENCE: 7}),
        event("cpu_op", "aten::mul", 61, 5, 2),
        *launched(6, 62, "elementwise", tid=2),
        event("cpu_op", "ConvolutionBackward0", 71, 9, 2, **{SEQUENCE: 5}),
        event("cpu_op", "aten::convolution_backward", 72, 6, 2),
        *launched(7, 73, "sm90_xmma_dgrad", tid=2),
        *launched(8, 90, "multi_tensor_apply"),
        event("user_annotation", "part: optimizer", 89, 9),
        *launched(9, 110, "stray"),
    ]
}


def parts_of(trace):
    where = parts.places(trace)
    return [(k.name, parts.part_of(k.name, where.get(k.launch))) for k in parts.kernels(trace)]


EAGER = [
    ("sm90_xmma_fprop", "convolutions"),
    ("elementwise", "networks, other"),
    ("elementwise", "distillation, other"),
    ("concat_fuse_fwd_hidden_kernel", "fusion and trans-fusion"),
    ("Memset", "attention losses"),
    ("elementwise", "distillation, other"),
    ("sm90_xmma_dgrad", "convolutions"),
    ("multi_tensor_apply", "optimizer"),
    ("stray", "unassigned"),
]


def test_kernels_belong_to_the_phase_and_the_operator_of_their_launch():
    assert parts_of(TRACE) == EAGER


def test_a_replay_of_the_same_kernels_has_the_same_parts():
    names = [name for name, _ in EAGER]
    assert parts.assigned(EAGER, names) == [part for _, part in EAGER]
    # One more at the front, a stranger, and one gone: what follows keeps its place.
    changed = ["Memset", *names[:3], "attention_mse_bwd_kernel", *names[4:]]
    found = parts.assigned(EAGER, changed)
    assert found[0] == "attention losses", "what its name is elsewhere"
    assert found[1:4] == [part for _, part in EAGER[:3]]
    assert found[4] == "attention losses", "by its own name"
    assert found[5:] == [part for _, part in EAGER[4:]]
    assert parts.assigned(EAGER, ["a stranger"]) == ["unassigned"]


def test_overlapping_kernels_are_busy_once():
    run = [parts.Kernel("a", 0.0, 10.0, 0), parts.Kernel("b", 5.0, 2.0, 1), parts.Kernel("c", 8.0, 4.0, 2)]
    run.append(parts.Kernel("d", 20.0, 5.0, 3))
    assert parts.busy_us(run) == 17 and parts.span_us(run) == 25


def test_the_table_adds_up_and_gaps_are_what_is_left():
    replay = [parts.Kernel(name, 10.0 * i, 5.0, i) for i, (name, _) in enumerate(EAGER)]
    work = {"convolutions": [4_000_000, 0], "optimizer": [0, 3_000_000_000]}
    table = profile_step.rows(EAGER, replay, work, 0.1, Rates(1e12, 1e12), {"optimizer": 33.0})
    by = {row["part"]: row for row in table}
    assert by["convolutions"]["ms"] == pytest.approx(0.01) and by["convolutions"]["kernels"] == 2
    assert by["convolutions"]["least_ms"] == pytest.approx(4e-3) and by["optimizer"]["least_ms"] == pytest.approx(3)
    assert by["gaps, no kernel running"]["ms"] == pytest.approx(0.1 - 9 * 5e-3)
    assert table[-1]["ms"] == 0.1 and table[-1]["kernels"] == 9
    assert sum(row["ms"] for row in table[:-1]) == pytest.approx(0.1)
    text = profile_step.shown(table)
    assert "estimate MB" in text and "33.0" in text


@pytest.fixture(scope="module")
def engine():
    case = Case("resnet8", 2, 4, "off", CPU)
    return profiling.made(case, "loop", graphed=False, batches=3)


def test_a_real_step_is_marked_and_its_backward_found(engine):
    engine, start = engine
    start()
    with profiling.marked(engine):
        trace = profiling.traced(lambda: engine.run(0), CPU)
    where = parts.places(trace, ("cpu_op",))
    events = trace["traceEvents"]

    def phases(name):
        return {where[i].phase for i, e in enumerate(events) if e.get("cat") == "cpu_op" and e["name"] == name}

    assert phases("aten::convolution") == {parts.NETWORKS, parts.LOSSES}
    assert phases("aten::convolution_backward") == {parts.NETWORKS, parts.LOSSES}
    marks = {e["name"].removeprefix(parts.MARK) for e in events if e.get("cat") == "user_annotation"}
    assert set(parts.PHASES) <= marks
    assert "outputs" not in vars(engine.step.method), "the marks are gone"


def test_a_profile_takes_more_steps_than_terms_are_kept_of(monkeypatch):
    """A GPU says nothing of the place beyond the last one, and then nothing runs any more."""
    monkeypatch.setattr(profiling, "TermLog", lambda interval, device: TermLog(3, device))
    engine, start = profiling.made(Case("resnet8", 2, 4, "off", CPU), "loop", graphed=False, batches=3)
    assert profile_step.step_ms(engine, start, 3, CPU) > 0


def test_bytes_and_products_of_convolutions_are_counted(engine):
    engine, start = engine
    work = profile_step.counted(engine, start)
    # Of the networks' 3x3 convolutions forward and backward, three networks of eight layers: far below a part in ten.
    assert work["convolutions"][1] > 0 and work["convolutions"][0] > 0
    assert work["optimizer"][0] >= 3 * sum(p.nbytes for p in engine.step.method.peers[0].parameters())
    assert {"batch norm", "convolutions", "optimizer", "bookkeeping"} <= work.keys()


def test_counted_products_are_those_of_the_formula():
    counter = profiling.Counter()
    counter.phase = parts.NETWORKS
    x, weight = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)
    with counter:
        y = torch.nn.functional.conv2d(x, weight, padding=1)
    assert counter.work == {"convolutions": [x.nbytes + weight.nbytes + y.nbytes, 2 * y.numel() * 27]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: it would be profiled")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert profile_step.main(["--out", str(tmp_path / "profile.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
