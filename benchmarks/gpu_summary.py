"""What the check on a GPU has found, as text: every part's end, and the operators that fall short of their targets."""

import json
from pathlib import Path
from typing import Any

LARGE = 100e6  # bytes; from here on a kernel should reach the bandwidth of a copy
BANDWIDTH = 0.85  # of it


def summary(state: dict[str, Any], work: Path) -> str:
    """A few lines for each part, in the order of their runs, and where nothing was measured."""
    where = state["where"]
    lines = [", ".join(f"{key} {where[key]}" for key in ("device", "torch", "triton", "python", "commit", "date"))]
    for name, part in state["parts"].items():
        lines += ["", f"== {name}: {part['status']}, {part['seconds']:.0f} s"]
        if part["status"] != "before":
            lines += [line[:300] for line in part["said"]]
    if state["red"]:
        lines += ["", f"no speed of these, their tests are red: {', '.join(state['red'])}"]
    rows = [row for path in sorted(work.glob("*/kernels_*.json")) for row in json.loads(path.read_text())["rows"]]
    return "\n".join([*lines, *kernel_lines(rows), ""])


def kernel_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Per operator the least share of a copy's bandwidth on large maps and the least ratio to `compile`, and where."""
    ours = [row for row in rows if row["provider"].startswith("fastfuse")]
    if not ours:
        return []
    large = [row for row in ours if row["bytes"] >= LARGE]
    low = [row for row in large if row["of_copy"] < BANDWIDTH]
    slow = [row for row in ours if row["compile_ratio"] < 1]
    lines = [
        "",
        f"== operators: {len(ours)} rows; {len(low)} of {len(large)} over 100 MB below {BANDWIDTH} of the copy, "
        f"{len(slow)} slower than compile",
    ]
    for op in dict.fromkeys(row["op"] for row in ours):
        for mode in ("forward", "backward"):
            own = [row for row in ours if row["op"] == op and row["mode"] == mode]
            if own:
                lines.append(f"{op} {mode}: {_least(own, large)}")
    return lines


def _least(own: list[dict[str, Any]], large: list[dict[str, Any]]) -> str:
    slowest = min(own, key=lambda row: row["compile_ratio"])
    said = [f"x compile at least {slowest['compile_ratio']:.2f} ({_place(slowest)})"]
    if big := [row for row in own if row in large]:
        lowest = min(big, key=lambda row: row["of_copy"])
        said.insert(0, f"of copy at least {lowest['of_copy']:.2f} ({_place(lowest)})")
    return ", ".join(said)


def _place(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row['dtype']} {row['provider'].removeprefix('fastfuse ')} {row['median_us']:.0f} us"
