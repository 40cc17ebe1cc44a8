"""What is computed from timings: ratios to each baseline, the share of distillation, the cost of more students."""

from collections.abc import Mapping

from benchmarks.report import MISSING, Value
from benchmarks.selection import Program
from benchmarks.timing import Timing

BASELINES = ("published", "published-amp", "compile")


def ratios(medians: Mapping[Program, float], program: Program) -> dict[str, Value]:
    """Each baseline's median over this program's, above 1 this one is faster; and its distillation share.

    The share is the step over that of the same networks, in the same mode and strategy, trained without distillation.
    """
    found: dict[str, Value] = {}
    for kind in BASELINES:
        baseline = medians.get(Program(kind))
        known = baseline is not None and program != Program(kind)
        found[f"{kind.replace('-', '_')}_ratio"] = baseline / medians[program] if known else MISSING
    floor = medians.get(Program("networks-only", program.form)) if program.kind == "fastfuse" else None
    found["distillation_share"] = MISSING if floor is None else medians[program] / floor
    return found


def costs(medians: Mapping[tuple[Program, int], float]) -> dict[tuple[Program, int], float]:
    """Median over that of the same program with the fewest students."""
    found = {}
    for program, students in medians:
        fewest = min(s for other, s in medians if other == program)
        found[program, students] = medians[program, students] / medians[program, fewest]
    return found


def spread(timing: Timing) -> dict[str, Value]:
    """Median and the range from p20 to p80, in ms."""
    return {"median_ms": timing.median, "p20_ms": timing.quantile(0.2), "p80_ms": timing.quantile(0.8)}


def doubts(timings: Mapping[Program, Timing]) -> list[str]:
    """Engine programs that noise may account for."""
    published = timings.get(Program("published"))
    overlapping = [
        str(p) for p, timing in timings.items() if p.kind == "fastfuse" and published and published.overlaps(timing)
    ]
    if not overlapping:
        return []
    return [
        f"the ranges p20 to p80 of published and of {', '.join(overlapping)} overlap: noise may explain this ratio; "
        "repeat on a quiet machine"
    ]


def epoch(whole: Timing, step: Timing, *, images: int, batch_size: int) -> dict[str, Value]:
    """An epoch beside as many bare steps as it has images for; the last batch counts as the part that it is."""
    steps_s = step.median / 1e3 * images / batch_size
    return {
        "epoch_s": whole.median / 1e3,
        "p20_s": whole.quantile(0.2) / 1e3,
        "p80_s": whole.quantile(0.8) / 1e3,
        "images_per_s": images / whole.median * 1e3,
        "step_ms": step.median,
        "steps_s": steps_s,
        "overhead": whole.median / 1e3 / steps_s,
    }
