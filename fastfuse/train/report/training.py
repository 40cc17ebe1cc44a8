"""The parts of a report about training: results, accuracy over time, loss terms, rates, speed, configuration."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fastfuse.train.compare import compared
from fastfuse.train.report import figures, html
from fastfuse.train.report.figures import Line, Picture
from fastfuse.train.report.material import Curve, Group

Part = tuple[str, list[Picture]]
# Kinds of loss terms that nobody can guess from their name.
KINDS = {"ce": "cross-entropy (ce)", "kl": "KL divergence (kl)", "dml": "KL among students (dml)"}
# A loss term is its network's or transform's name and a kind, as student0_ce or transform_leader_feature.
_TERM = re.compile(r"(val_\w+?\d*|transform_[a-z]+|[a-z]+\d*)_(.+)")


def headline(groups: Sequence[Group]) -> str:
    """A sentence for each group: the accuracy of what it deploys, against `independent` on the same data."""
    found = compared([group.runs for group in groups])["accuracy"]["deployed"]["last"]
    both = [(group, value) for group, value in zip(groups, found, strict=True) if value is not None]
    plain = next((pair for pair in both if pair[0].method == "independent"), None)
    lines = []
    for group, value in both:
        line = f"{group.label}: {group.deployed} {_spread(value)}"
        if plain is not None and plain[0] is not group and _data(plain[0]) == _data(group):
            line += _difference(value, plain[1], plain[0].label)
        lines.append(html.paragraph(line + ".", "headline"))
    return "".join(lines)


def _difference(value: Mapping[str, Any], other: Mapping[str, Any], label: str) -> str:
    difference, deviations = value["mean"] - other["mean"], (value["sd"], other["sd"])
    text = f", {difference:+.2f} points against {label}"
    if None in deviations:
        return text + "; one seed does not say whether that is chance"
    return text + (", no more than the deviation over seeds" if abs(difference) <= max(deviations) else "")


def _data(group: Group) -> list[Any]:
    return [group.runs[0].told.get(name) for name in ("data", "data_path", "data_root")]


def _spread(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.2f} %" if value["sd"] is None else f"{value['mean']:.2f} ± {value['sd']:.2f} %"


def results(groups: Sequence[Group]) -> Part:
    """Best and last accuracy of every network of every group."""
    found = compared([group.runs for group in groups])["accuracy"]
    rows = []
    for name, kinds in found.items():
        cells = []
        for g, group in enumerate(groups):
            for kind in ("best", "last"):
                value = kinds[kind][g]
                shown = "" if value is None else html.percent(value["mean"], value["sd"])
                data = {"group": group.label, "kind": kind, **(value or {})}
                cells.append(html.cell(shown, data))
        kind = "deployed" if name == "deployed" else ""
        rows.append(html.row(_deployed_name(groups) if kind else name, cells, kind=kind, data={"network": name}))
    headings = ["network", *(f"{group.label}, {kind}" for group in groups for kind in ("best", "last"))]
    chosen = sorted({str(group.runs[0].results.get("best_chosen_on")) for group in groups})
    note = f"Top-1 accuracy on the test images, percent; best epoch chosen on the {' or '.join(chosen)} images"
    if any(len(group.seeds) > 1 for group in groups):
        note += "; mean ± sample deviation over seeds"
    table = html.table("results-table", headings, rows)
    return headline(groups) + html.paragraph(note + ".", "quiet") + table, []


def accuracy(groups: Sequence[Group]) -> Part:
    """Every network over time; where there are several groups, what they deploy in one panel."""
    pictures, tables = [], []
    longest = max((group.epochs for group in groups), key=len)
    lines = [
        Line(f"{group.label}: {group.deployed}", group.accuracy[group.deployed], g, thick=True)
        for g, group in enumerate(groups)
        if group.deployed in group.accuracy
    ]
    if len(lines) > 1:
        pictures.append(figures.curves("accuracy", "Deployed networks", longest, lines, unit="top-1 %"))
    for g, group in enumerate(groups):
        own = [
            Line(name, curve, i, thick=name == group.deployed) for i, (name, curve) in enumerate(group.accuracy.items())
        ]
        if len(own) > 1 or len(lines) < 2:  # else the panel before has it
            title = f"{group.label}: networks"
            pictures.append(figures.curves(f"accuracy-{g}", title, group.epochs, own, unit="top-1 %"))
        tables.append(
            html.details(
                f"{group.label}: accuracy by epoch", html.by_epoch(f"accuracy-{g}", group.epochs, group.accuracy)
            )
        )
    note = ""
    if any(name.endswith(("ensemble", "oracle")) for group in groups for name in group.accuracy):
        note = html.paragraph(
            "The ensemble is the students' mean logits; the oracle is right where any student is.", "quiet"
        )
    return note + html.panels(pictures, kind="large") + "".join(tables), pictures


def losses(groups: Sequence[Group]) -> Part:
    """The sum and, of each group, a panel for each kind of term."""
    with_sum = [(g, group) for g, group in enumerate(groups) if "loss" in group.losses]
    if not with_sum:
        return html.paragraph("No run has noted its loss terms.", "absent"), []
    longest = max((group.epochs for group in groups), key=len)
    lines = [Line(group.label, group.losses["loss"], g) for g, group in with_sum]
    pictures = [figures.curves("loss", "Whole loss", longest, lines, unit="loss")]
    tables = []
    for g, group in with_sum:
        for kind, terms in by_kind(group.losses).items():
            own = [Line(owner, curve, _index(group, owner, i)) for i, (owner, curve) in enumerate(terms.items())]
            file = f"loss-{g}-{re.sub(r'[^a-z0-9]+', '-', kind)}"
            title = f"{group.label}: {KINDS.get(kind, kind.replace('_', ' '))}"
            pictures.append(figures.curves(file, title, group.epochs, own, unit="loss"))
        tables.append(
            html.details(f"{group.label}: terms by epoch", html.by_epoch(f"losses-{g}", group.epochs, group.losses))
        )
    note = "Terms as they enter the sum, weights and ramps included; mean over the images of an epoch."
    return html.paragraph(note, "quiet") + html.panels(pictures) + "".join(tables), pictures


def by_kind(terms: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Terms without the sum by what they are, and by whose they are."""
    found: dict[str, dict[str, Curve]] = {}
    for name, curve in terms.items():
        if name != "loss":
            match = _TERM.fullmatch(name)
            owner, kind = match.groups() if match else (name, name)
            found.setdefault(kind, {})[owner] = curve
    return found


def _index(group: Group, owner: str, place: int) -> int:
    """The place of a network among all of them, also of the network whose transform it is; else that in its panel."""
    names = list(group.accuracy)
    network = (
        owner.removeprefix("transform_") if owner.startswith("transform_") else owner.replace("transform", "student")
    )
    return names.index(network) if network in names else place


def schedule(groups: Sequence[Group]) -> Part:
    """Learning rate at the end of each epoch, and the ramp of the distillation terms."""
    rates = {group.label: group.rate for group in groups if group.rate is not None}
    ramps = {group.label: Curve(group.ramp, None) for group in groups if group.ramp is not None}
    index = {group.label: g for g, group in enumerate(groups)}
    longest = max((group.epochs for group in groups), key=len)
    pictures, content = [], ""
    for name, title, unit, curves in (
        ("learning-rate", "Learning rate", "learning rate", rates),
        ("ramps", "Factor of the distillation terms (ramp)", "factor", ramps),
    ):
        if not curves:
            content += html.paragraph(f"{title}: none of these runs has one.", "quiet")
            continue
        lines = [Line(label, curve, index[label]) for label, curve in curves.items()]
        pictures.append(figures.curves(name, title, longest, lines, unit=unit))
        content += html.details(f"{title} by epoch", _overlaid(f"{name}-table", longest, curves))
    return html.panels(pictures) + content, pictures


def throughput(groups: Sequence[Group]) -> Part:
    """Images per second over time, and what each group took."""
    speeds = {group.label: group.speed for group in groups if group.speed is not None}
    longest = max((group.epochs for group in groups), key=len)
    pictures = []
    if speeds:
        lines = [Line(group.label, group.speed, g) for g, group in enumerate(groups) if group.speed is not None]
        pictures = [figures.curves("throughput", "Training", longest, lines, unit="images/s")]
    found = compared([group.runs for group in groups])["speed"]
    rows = []
    for name, title in (("images_per_second", "images/s"), ("step_ms", "step, ms"), ("seconds", "seconds, all")):
        cells = [html.cell("" if x is None else f"{x:.1f}", {"mean": x}) for x in found[name]]
        rows.append(html.row(title, cells, data={"name": name}))
    for name in ("device", "mode"):
        rows.append(html.row(name, [html.cell(_text(x)) for x in found[name]], data={"name": name}))
    table = html.table("throughput-table", ["", *(group.label for group in groups)], rows)
    by_epoch = html.details("Images per second by epoch", _overlaid("throughput-epochs", longest, speeds))
    note = "Without evaluation and saving; the seconds are with both. Of replicas, all of them together."
    return html.paragraph(note, "quiet") + html.panels(pictures) + table + by_epoch, pictures


def configuration(groups: Sequence[Group]) -> Part:
    """Every option that decides results, the seeds, and what the runs were made with; what differs is marked."""
    told = [group.runs[0].told for group in groups]
    names = dict.fromkeys(name for values in told for name in values)
    options = {name: [_text(values.get(name)) for values in told] for name in names}
    options = {"seeds": [_text(group.seeds) for group in groups], **options}
    made = {"commit": _said(groups, lambda results: results.get("commit"))}
    versions = dict.fromkeys(n for group in groups for run in group.runs for n in run.results.get("versions") or {})
    for name in versions:
        made[name] = _said(groups, partial(_version, name))
    folders = [_text([run.path for run in group.runs]) for group in groups]
    headings = ["", *(group.label for group in groups)]
    content = "<h3>What made them</h3>" + _compared("versions-table", headings, {"folders": folders, **made})
    return content + "<h3>Options</h3>" + _compared("configuration-table", headings, options), []


def _version(name: str, results: Mapping[str, Any]) -> Any:
    return (results.get("versions") or {}).get(name)


def _compared(name: str, headings: list[str], values: Mapping[str, list[str]]) -> str:
    rows = []
    for option, texts in values.items():
        kind = "differs" if len(set(texts)) > 1 and option != "folders" else ""
        rows.append(html.row(option, [html.cell(text) for text in texts], kind=kind, data={"name": option}))
    return html.table(name, headings, rows, kind="text")


def _overlaid(name: str, epochs: Sequence[int], curves: Mapping[str, Curve]) -> str:
    """One table of groups that may have different numbers of epochs."""

    def shown(curve: Curve, i: int) -> str:
        return f"<td>{html.number(curve.mean[i]) if i < len(curve.mean) else ''}</td>"

    rows = [html.row(str(epoch), [shown(curve, i) for curve in curves.values()]) for i, epoch in enumerate(epochs)]
    return html.table(name, ["epoch", *curves], rows, kind="tall")


def _deployed_name(groups: Sequence[Group]) -> str:
    names = dict.fromkeys(str(group.deployed) for group in groups)
    return f"deployed ({', '.join(names)})"


def _said(groups: Sequence[Group], get: Callable[[Mapping[str, Any]], Any]) -> list[str]:
    return [_text(sorted({str(x) for run in g.runs if (x := get(run.results)) is not None})) for g in groups]


def _text(value: Any) -> str:
    """Escaped, on one line."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value)) or None
    shown = f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)
    return html.escape(shown)
