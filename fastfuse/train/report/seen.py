"""The parts of a report about the trained networks: attention maps, classes, and what is taken for what."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastfuse.train.keepsakes import Keepsakes
from fastfuse.train.report import figures, html
from fastfuse.train.report.classes import differing, mistakes, per_class, same_images
from fastfuse.train.report.figures import Picture
from fastfuse.train.report.material import Group

Part = tuple[str, list[Picture]]
# As many as a chart can hold; the tables of classes have all.
CLASSES, PAIRS = 30, 20
_FUSED = "fusion"


def attention(groups: Sequence[Group]) -> Part:
    """The same test images as each network looks at them; of a group the first seed that kept them."""
    content, pictures = [], []
    for g, group in enumerate(groups):
        seed, kept = next(((s, k) for s, k in group.kept.items() if k.maps), (None, None))
        if kept is None:
            if group.kept:
                content.append(html.paragraph(f"{group.label}: its networks have no attention maps.", "quiet"))
            continue
        content.append(f"<h3>{html.escape(group.label)}, seed {seed}</h3>" + _gallery(kept, group.label))
        rows = [
            [image, *(figures.heat(image, own[i]) for own in kept.maps.values())] for i, image in enumerate(kept.images)
        ]
        pictures.append(figures.tiles(f"attention-{g}", f"{group.label}, seed {seed}", rows, ["image", *kept.maps]))
    if not pictures:
        return "".join(content) + _why_not(groups, "attention maps"), []
    note = (
        "Where the energy of each network's last map lies: the channel mean of its squares, scaled to its maximum, "
        "over the image in grey. Beneath each map, what the network takes the image for and, where there is a fused "
        "map, the cosine between the two maps, which is 1 where they are the same up to a factor."
    )
    return html.paragraph(note, "quiet") + "".join(content) + _some_absent(groups), pictures


def classes(groups: Sequence[Group]) -> Part:
    """Accuracy of what each group deploys, class by class; against `independent` where that is one of the groups."""
    ready = [group for group in groups if group.kept and _has_deployed(group)]
    if not ready:
        return _why_not(groups, "accuracy by class"), []
    other, ours, content = _against(ready)
    first = list((other or ready[0]).kept.values())
    alike = [group for group in ready if same_images(first, list(group.kept.values()))]
    if other is None and len(alike) < len(ready):
        left_out = ", ".join(group.label for group in ready if group not in alike)
        content += html.paragraph(f"Tested on other images than {ready[0].label}, and left out: {left_out}.", "absent")
    names, count = first[0].class_names, np.bincount(first[0].labels, minlength=len(first[0].class_names))
    shares = {group.label: per_class(list(group.kept.values()), str(group.deployed)) for group in alike}
    against = other.label if other is not None else ""  # else there are none of ours
    differences = {group.label: shares[group.label] - shares[against] for group in ours}
    pictures = [
        _differences(f"classes-{g}", f"{group.label} {group.deployed} against {against}", names, own)
        for g, (group, own) in enumerate(zip(ours, differences.values(), strict=True))
    ]
    order = list(range(len(names)))
    if differences:
        order.sort(key=lambda k: -np.nan_to_num(next(iter(differences.values()))[k]))
    rows = []
    for k in order:
        cells = [str(count[k]), *("" if np.isnan(own[k]) else f"{own[k]:.2f}" for own in shares.values())]
        cells += ["" if np.isnan(own[k]) else f"{own[k]:+.2f}" for own in differences.values()]
        rows.append(html.row(names[k], map(html.cell, cells), data={"class": names[k]}))
    headings = ["class", "images", *shares, *(f"{label} - {against}" for label in differences)]
    table = html.table("classes-table", headings, rows, kind="tall")
    note = "Last epoch, percent of each class's test images, deployed networks, mean over seeds."
    return html.paragraph(note, "quiet") + content + html.panels(pictures) + table + _some_absent(groups), pictures


def _differences(file: str, title: str, names: Sequence[str], difference: np.ndarray) -> Picture:
    """A bar for each class, from the best for ours to the worst; of many classes those that differ most."""
    largest = sorted(np.flatnonzero(~np.isnan(difference)).tolist(), key=lambda k: -abs(difference[k]))[:CLASSES]
    largest.sort(key=lambda k: -difference[k])
    if len(names) > CLASSES:
        title += f": {CLASSES} classes that differ most"
    labels, unit = [_short(names[k]) for k in largest], "difference of accuracy, percentage points"
    return figures.bars(file, title, labels, [difference[largest].tolist()], [""], unit=unit, signed=True)


def confusion(groups: Sequence[Group]) -> Part:
    """The pairs of classes that are confused more, or less, than by another group; of one group, the most frequent."""
    ready = [group for group in groups if group.kept and _has_deployed(group)]
    if not ready:
        return _why_not(groups, "confused pairs"), []
    other, ours, content = _against(ready)
    pictures, tables = [], []
    for g, group in enumerate(ours or ready[:1]):
        kept = list(group.kept.values())
        names = kept[0].class_names
        theirs = {} if other is None else mistakes(list(other.kept.values()), str(other.deployed))
        pairs = differing(mistakes(kept, str(group.deployed)), theirs, PAIRS)
        kinds = [f"{group.label} {group.deployed}", *([] if other is None else [f"{other.label} {other.deployed}"])]
        title = "Most frequent mistakes" if other is None else f"{group.label} against {other.label}"
        if not pairs:
            tables.append(html.paragraph(f"{title}: there is no pair to show.", "quiet"))
            continue
        labels = [f"{_short(names[pair.true])} → {_short(names[pair.taken])}" for pair in pairs]
        values = [[pair.ours for pair in pairs], [pair.other for pair in pairs]][: len(kinds)]
        pictures.append(figures.bars(f"confusion-{g}", title, labels, values, kinds, unit="test images"))
        rows = []
        for pair in pairs:
            numbers = [pair.ours] if other is None else [pair.ours, pair.other, pair.ours - pair.other]
            data = {"true": names[pair.true], "taken": names[pair.taken]}
            cells = [html.cell(html.escape(names[pair.taken])), *(html.cell(html.number(x)) for x in numbers)]
            rows.append(html.row(names[pair.true], cells, data=data))
        headings = ["class", "taken for", *kinds, *([] if other is None else ["difference"])]
        tables.append(f"<h3>{html.escape(title)}</h3>" + html.table(f"confusion-{g}", headings, rows))
    note = "Test images of a class that are taken for another, number of images, mean over seeds, last epoch"
    note += "." if other is None else f"; the {PAIRS} pairs that differ most."
    return (
        html.paragraph(note, "quiet") + content + html.panels(pictures) + "".join(tables) + _some_absent(groups),
        pictures,
    )


def _against(ready: Sequence[Group]) -> tuple[Group | None, list[Group], str]:
    """An independent group, those that can be held against it, and what is to be said about the others."""
    other = next((group for group in ready if group.method == "independent"), None)
    if other is None:
        text = (
            "No run of the method independent is among these, or it has kept no answers: there is nothing to compare "
            "with. Train one with --baseline, or give its folder to fastfuse report too."
        )
        return None, [], html.paragraph(text, "quiet")
    theirs = list(other.kept.values())
    ours = [group for group in ready if group.method != "independent"]
    same = [group for group in ours if same_images(list(group.kept.values()), theirs)]
    said = [
        html.paragraph(f"{group.label} was tested on other images than {other.label}: not compared.", "absent")
        for group in ours
        if group not in same
    ]
    return other, same, "".join(said)


def _gallery(kept: Keepsakes, label: str) -> str:
    rows = []
    for i, image in enumerate(kept.images):
        true = int(kept.labels[kept.shown[i]])
        tiles = [
            _tile(figures.png_uri(image), "image", html.escape(kept.class_names[true]), f"test image {kept.shown[i]}")
        ]
        for name, maps in kept.maps.items():
            taken = int(kept.predictions[name][kept.shown[i]])
            text = html.escape(kept.class_names[taken])
            text = text if taken == true else f'<span class="wrong">{text}</span>'
            fused = kept.maps.get(_FUSED)
            data: dict[str, Any] = {"image": int(kept.shown[i]), "network": name}
            if fused is not None and name != _FUSED and fused.shape == maps.shape:
                data["cosine"] = f"{cosine(maps[i], fused[i]):.6f}"
                text += f"<br>cos {float(data['cosine']):.3f}"
            tiles.append(_tile(figures.png_uri(figures.heat(image, maps[i])), name, text, f"attention of {name}", data))
        rows.append(f'<div class="attention" data-group="{html.escape(label)}">' + "".join(tiles) + "</div>")
    return f'<div class="gallery">{"".join(rows)}</div>'


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of two attention maps [h, w]; 1 is the same up to a factor, 0 also where one is zero everywhere."""
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float((one.astype(np.float64) * other).sum()) / norms if norms > 0 else 0.0


def _tile(source: str, name: str, text: str, alt: str, data: Mapping[str, Any] | None = None) -> str:
    caption = f"<figcaption><b>{html.escape(name)}</b><br>{text}</figcaption>"
    return f'<figure{html.attributes(data)}><img src="{source}" alt="{html.escape(alt)}">{caption}</figure>'


def _has_deployed(group: Group) -> bool:
    return all(group.deployed in kept.predictions for kept in group.kept.values())


def _why_not(groups: Sequence[Group], what: str) -> str:
    reasons = [reason for group in groups for reason in group.absent]
    without = [group for group in groups if group.kept and not _has_deployed(group)]
    reasons += [f"{group.label}: its {group.deployed} classifies no images" for group in without]
    head = html.paragraph(f"There is no part about {what}:", "absent")
    return head + "".join(html.paragraph(reason, "absent") for reason in dict.fromkeys(reasons))


def _some_absent(groups: Sequence[Group]) -> str:
    return "".join(
        html.paragraph(f"Not counted here: {reason}.", "absent") for group in groups for reason in group.absent
    )


def _short(text: str) -> str:
    return text if len(text) <= 18 else text[:17] + "…"
