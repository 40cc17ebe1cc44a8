"""A report in a real browser: the figures of the runs' files, nothing from outside, nothing that overflows."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastfuse import cli
from tests.train.report_runs import CLASSES, browse, kept, make_run

pytest.importorskip("matplotlib", reason="a report is drawn with matplotlib")
NETWORKS = ["student0", "student1", "fusion", "leader", "ensemble", "oracle"]


class Tables(HTMLParser):
    """Every table of a page by its id: a list of rows, each of (text, attributes) by cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[tuple[str, dict]]]] = {}
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.rows = self.found.setdefault(dict(attributes)["id"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(("", dict(attributes)))
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data):
        if self.cell:
            text, attributes = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, attributes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of ffsd and an independent run."""
    folder = tmp_path_factory.mktemp("runs")
    answering = NETWORKS[:-1]
    ours = [make_run(folder / f"s{s}", NETWORKS, seed=s, keep=kept(3, answering, seed=s)) for s in (0, 1)]
    alone = kept(3, ["student0"], seed=7)
    return [*ours, make_run(folder / "alone", ["student0"], method="independent", students=1, keep=alone)]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert cli.main(["report", *map(str, runs), "--html", str(path), "--quiet"]) == 0
    return path


@pytest.fixture(scope="module")
def tables(page, tmp_path_factory) -> dict[str, list[list[tuple[str, dict]]]]:
    return Tables(browse(page, tmp_path_factory.mktemp("browser"))).found


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("table", "part"), [("accuracy-0", "accuracy"), ("losses-0", "losses")], ids=["accuracy", "losses"]
)
def test_curves_are_the_mean_and_deviation_of_the_seeds(tables, runs, table, part):
    heading, *rows = tables[table]
    names = [text for text, _ in heading[1:]]
    each = [lines(run) for run in runs[:2]]
    assert names == list(each[0][0][part]) and [row[0][0] for row in rows] == ["1", "2", "3"]
    for i, row in enumerate(rows):
        for name, (text, _) in zip(names, row[1:], strict=True):
            values = [history[i][part][name] for history in each]
            values = [x["top1"] if part == "accuracy" else x for x in values]
            mean, _, deviation = text.partition(" ± ")
            assert float(mean) == pytest.approx(np.mean(values), rel=1e-5), (name, i)
            assert float(deviation) == pytest.approx(np.std(values, ddof=1), rel=0.06), (name, i)


def test_results_are_those_of_the_summaries(tables, runs):
    heading, *rows = tables["results-table"]
    assert [text for text, _ in heading] == [
        "network",
        "ffsd, best",
        "ffsd, last",
        "independent, best",
        "independent, last",
    ]
    results = [json.loads((run / "summary.json").read_text())["networks"] for run in runs]
    by_name = {row[0][0]: row[1:] for row in rows}
    assert by_name.keys() == {"deployed (leader, student0)", *NETWORKS}
    for name in NETWORKS:
        text, data = by_name[name][0]
        values = [result[name]["best_top1"] for result in results[:2]]
        assert float(data["data-mean"]) == pytest.approx(np.mean(values), rel=1e-12)
        assert float(data["data-sd"]) == pytest.approx(np.std(values, ddof=1), rel=1e-12)
        assert data["data-n"] == "2" and text == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    (alone, data) = by_name["deployed (leader, student0)"][2]
    assert float(data["data-mean"]) == results[2]["student0"]["best_top1"] and "±" not in alone


def test_rates_ramps_and_speed(tables, runs):
    history = lines(runs[0])
    rates = tables["learning-rate-table"][1:]
    assert [float(row[1][0]) for row in rates] == pytest.approx([x["learning_rate"] for x in history], rel=1e-5)
    ramps = [float(row[1][0]) for row in tables["ramps-table"][1:]]
    # FFSD: exp(-5 (1 - e / 5)^2) at its epochs 1, 2, 3.
    assert ramps == pytest.approx([np.exp(-5 * (1 - e / 5) ** 2) for e in (1, 2, 3)], rel=1e-5)
    assert [text for text, _ in tables["ramps-table"][0]] == ["epoch", "ffsd"]
    assert [float(row[1][0]) for row in tables["throughput-epochs"][1:]] == [x["images_per_second"] for x in history]


def test_classes_and_confused_pairs_are_those_of_the_answers(tables):
    ours = [kept(3, NETWORKS[:-1], seed=s) for s in (0, 1)]
    alone = kept(3, ["student0"], seed=7)
    heading, *rows = tables["classes-table"]
    assert [text for text, _ in heading] == ["class", "images", "ffsd", "independent", "ffsd - independent"]
    assert {row[0][0] for row in rows} == set(CLASSES)

    def share(one, name, k):
        return 100 * np.mean(one.predictions[name][one.labels == k] == k)

    for row in rows:
        k = CLASSES.index(row[0][0])
        mean, other = np.mean([share(one, "leader", k) for one in ours]), share(alone, "student0", k)
        assert [text for text, _ in row[1:]] == ["10", f"{mean:.2f}", f"{other:.2f}", f"{mean - other:+.2f}"]
    differences = []
    for row in tables["confusion-0"][1:]:
        true, taken = CLASSES.index(row[0][0]), CLASSES.index(row[1][0])
        assert true != taken
        counts = [np.sum((x.labels == true) & (x.predictions["leader"] == taken)) for x in ours]
        other = np.sum((alone.labels == true) & (alone.predictions["student0"] == taken))
        assert [float(text) for text, _ in row[2:]] == [np.mean(counts), other, np.mean(counts) - other]
        differences.append(abs(np.mean(counts) - other))
    assert differences == sorted(differences, reverse=True) and differences[0] > 0


def test_configuration_marks_what_differs(page, tables):
    rows = {row[0][0]: [text for text, _ in row[1:]] for row in tables["configuration-table"][1:]}
    assert rows["method"] == ["ffsd", "independent"] and rows["seeds"] == ["0, 1", "0"] and rows["epochs"] == ["3", "3"]
    marked = set(re.findall(r'<tr class="differs" data-name="(\w+)"', page.read_text()))
    assert {"method", "students", "seeds"} <= marked and "epochs" not in marked
    assert {row[0][0]: row[1][0] for row in tables["versions-table"][1:]}["torch"] == "2.15.0"


def test_attention_maps_are_there_with_their_likeness_to_the_fused_map(page):
    one = kept(3, NETWORKS[:-1], seed=0)
    found = re.findall(r'data-image="(\d)" data-network="(\w+)" data-cosine="([\d.]+)"', page.read_text())
    ours = found[: 4 * 3]  # the first group's: of all but the fused head itself
    assert {name for _, name, _ in ours} == {"student0", "student1", "leader"} and len(ours) == 12
    for image, name, cosine in ours:
        a, b = (one.maps[network][int(image)].ravel() for network in (name, "fusion"))
        assert float(cosine) == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=2e-6)


def test_the_page_needs_nothing_from_outside(page):
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]+\.|@import|<script|<link", text)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) > 20 and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))  # else one drawing would use another's parts
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(drawing.replace("xlink:href", "href"))


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_nothing_overflows(page, tmp_path, width):
    # A headless window is never narrower than 500 pixels: the page is laid out in a frame that is.
    inner = page.read_text().replace("<details>", "<details open>")
    (tmp_path / "inner.html").write_text(inner)
    script = (
        f'<iframe src="inner.html" style="width:{width}px;height:3000px;border:0"></iframe><script>onload = () => {{'
        "const d = document.querySelector('iframe').contentDocument.documentElement;"
        "document.body.dataset.found = d.scrollWidth + ' ' + d.clientWidth;}</script>"
    )
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!DOCTYPE html><body>{script}</body>")
    dom = browse(outer, tmp_path / "browser", "--allow-file-access-from-files", "--hide-scrollbars")
    found = re.search(r'data-found="(\d+) (\d+)"', dom)
    assert found and tuple(map(int, found.groups())) == (width, width)
