"""`fastfuse report`: what it refuses, where it writes, and what it says about runs that lack something."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from fastfuse import cli
from fastfuse.errors import InputError
from fastfuse.methods import METHODS
from fastfuse.train import keepsakes
from fastfuse.train.report import figures, render, report
from fastfuse.train.report.classes import differing, mistakes, per_class
from fastfuse.train.report.material import RAMPS, Curve, gather
from fastfuse.train.report.seen import cosine
from fastfuse.train.report.training import by_kind, headline
from tests.train.report_runs import kept, make_run

NETWORKS = ["student0", "student1", "fusion", "leader", "ensemble"]
needs_matplotlib = pytest.mark.skipif(not figures.installed(), reason="a report is drawn with matplotlib")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the drawing, which takes most of the time."""

    def no_drawing(name: str, title: str, draw: object, **sizes: object) -> figures.Picture:
        return figures.Picture(
            name, title, f"<svg><title>{name}</title></svg>", b"\x89PNG " + figures.SOFTWARE.encode()
        )

    monkeypatch.setattr(figures, "_picture", no_drawing)


def refused(*arguments: object, capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert cli.main(["report", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@needs_matplotlib
def test_the_page_and_its_pictures_lie_in_the_first_run_or_where_they_are_asked_for(tmp_path, capsys, undrawn):
    run = make_run(tmp_path / "a", NETWORKS, keep=kept(3, NETWORKS))
    assert cli.main(["report", str(run)]) == 0
    page = run / "report" / "report.html"
    said = capsys.readouterr().out.splitlines()
    pictures = sorted((run / "report").glob("report-*.png"))
    assert said == [str(page), f"{len(pictures)} PNG files beside it"] and len(pictures) > 5
    other = tmp_path / "new" / "folder" / "my page.html"
    assert cli.main(["report", str(run), "--html", str(other), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert {p.name for p in other.parent.iterdir()} == {
        p.name.replace("report", "my page", 1) for p in (page, *pictures)
    }
    before = page.read_bytes()
    assert cli.main(["report", str(run)]) == 0 and page.read_bytes() == before


@needs_matplotlib
@pytest.mark.parametrize("name", ["report.html", "report-accuracy-0.png"], ids=["the page", "a picture"])
def test_files_of_others_are_not_replaced(tmp_path, capsys, name, undrawn):
    run = make_run(tmp_path / "a", NETWORKS)
    (run / "report").mkdir()
    (run / "report" / name).write_text("mine")
    line = refused(run, capsys=capsys)
    assert f"{name} is there and no report's: move it away, or name another file with --html" in line
    assert [p.name for p in (run / "report").iterdir()] == [name] and (run / "report" / name).read_text() == "mine"


@needs_matplotlib
def test_bad_input_is_one_line(tmp_path, capsys, undrawn):
    run = make_run(tmp_path / "a", NETWORKS)
    assert "needs at least one run folder" in refused(capsys=capsys)
    assert "is no name for a page" in refused(run, "--html", tmp_path, capsys=capsys)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(run, "--html", tmp_path / "file" / "a.html", capsys=capsys)
    (tmp_path / "empty").mkdir()
    assert "is not a run folder: config.json is missing" in refused(tmp_path / "empty", capsys=capsys)
    early = make_run(tmp_path / "early", NETWORKS, ended=0)
    assert "has no results yet, for no epoch has ended" in refused(run, early, capsys=capsys)
    assert not (run / "report").exists()


@needs_matplotlib
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", b"{"),
        ("summary.json", b"{"),
        ("metrics.jsonl", b'{"epoch": 1'),
        ("metrics.jsonl", b'{"epoch": 1, "accuracy": {"leader": 3}}\n'),
        ("keepsakes.npz", b"PK\x03\x04 and no more"),
        ("keepsakes.npz", None),
    ],
    ids=["configuration", "results", "half a line", "another content", "answers cut off", "answers of other images"],
)
def test_damaged_files_are_named(tmp_path, capsys, file, damage):
    run = make_run(tmp_path / "a", NETWORKS, keep=kept(3, NETWORKS))
    if damage is None:
        found = dict(np.load(run / file))
        np.savez(run / file, **{**found, "labels": found["labels"][:-1]})
    else:
        (run / file).write_bytes(damage)
    line = refused(run, capsys=capsys)
    assert str(run / file) in line and "damaged" in line and not (run / "report").exists()


@needs_matplotlib
def test_a_run_that_goes_on_is_reported_as_such(tmp_path, undrawn):
    run = make_run(tmp_path / "a", NETWORKS, epochs=5, ended=2)
    text, _ = render(gather([run]))
    assert f'<p class="unfinished">{run} is not finished: epoch 2 of 5; this is how far it is.</p>' in text
    assert f"{run}: it has no keepsakes.npz, which a run writes when it ends" in text
    assert 'id="accuracy-0"' in text and 'id="classes-table"' not in text


@needs_matplotlib
def test_a_finished_run_from_before_says_how_to_get_the_rest(tmp_path, undrawn):
    run = make_run(tmp_path / "a", NETWORKS)
    text, _ = render(gather([run]))
    assert text.count(f"write it with fastfuse train --resume --out {run}") == 3
    assert "There is no part about attention maps:" in text


@needs_matplotlib
def test_answers_of_another_epoch_or_another_format_are_not_shown(tmp_path, undrawn):
    old = make_run(tmp_path / "old", NETWORKS, keep=kept(2, NETWORKS))
    text, _ = render(gather([old]))
    assert "its keepsakes.npz is of epoch 2, and the run has 3" in text and 'id="classes-table"' not in text
    new = make_run(tmp_path / "new", NETWORKS, keep=kept(3, NETWORKS))
    found = dict(np.load(new / "keepsakes.npz"))
    np.savez(new / "keepsakes.npz", **{**found, "format": np.array(9)})
    text, _ = render(gather([new]))
    assert "its keepsakes.npz is of format 9, and this version reads 1" in text


@needs_matplotlib
def test_a_run_of_another_version_is_reported_as_far_as_it_goes(tmp_path, undrawn):
    run = make_run(tmp_path / "a", NETWORKS)
    values = json.loads((run / "config.json").read_text()) | {"new_option": "<b>"}
    (run / "config.json").write_text(json.dumps(values))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["losses"], line["learning_rate"], line["images_per_second"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, _ = render(gather([run]))
    assert "No run has noted its loss terms." in text and "Learning rate: none of these runs has one." in text
    assert '<th scope="row">new_option</th><td>&lt;b&gt;</td>' in text


@needs_matplotlib
def test_without_an_independent_run_the_most_frequent_mistakes_are_shown(tmp_path, undrawn):
    one = kept(3, NETWORKS)
    text, pictures = render(gather([make_run(tmp_path / "a", NETWORKS, keep=one)]))
    assert "No run of the method independent is among these" in text
    expected = max(mistakes([one], "leader").values())
    assert f"<td>{expected:g}</td>" in text.split('id="confusion-0"')[1]
    assert "confusion-0" in {p.name for p in pictures} and "classes-0" not in {p.name for p in pictures}


@needs_matplotlib
def test_the_baseline_in_a_runs_folder_comes_with_it_once_it_has_results(tmp_path, undrawn):
    ours = make_run(tmp_path / "a", NETWORKS, keep=kept(3, NETWORKS))
    baseline = ours / "independent"
    make_run(baseline, ["student0"], method="independent", students=1, keep=kept(3, ["student0"]))
    assert [group.label for group in gather([ours])] == ["ffsd", "independent"]
    assert [len(group.runs) for group in gather([ours, baseline])] == [1, 1]  # named as well, it counts once
    assert "classes-0" in {p.name for p in render(gather([ours]))[1]}
    (baseline / "summary.json").unlink()
    (baseline / "metrics.jsonl").write_text("")
    assert [group.label for group in gather([ours])] == ["ffsd"]


@needs_matplotlib
def test_the_headline_says_what_came_out_and_when_that_means_nothing(tmp_path):
    def group(name: str, top1: list[float], **options) -> list[Path]:
        runs = [make_run(tmp_path / f"{name}{s}", ["student0"], seed=s, **options) for s in range(len(top1))]
        for run, value in zip(runs, top1, strict=True):
            summary = json.loads((run / "summary.json").read_text())
            summary |= {"deployed": "student0"}
            summary["networks"]["student0"]["last_top1"] = value
            (run / "summary.json").write_text(json.dumps(summary))
        return runs

    alone = group("alone", [90.0, 92.0], method="independent", students=1)
    near = group("near", [91.0, 92.0], method="dml", students=2)
    far = group("far", [95.0, 97.0], method="ffl", students=2)
    said = headline(gather([*near, *far, *alone]))
    assert "dml: student0 91.50 ± 0.71 %, +0.50 points against independent, no more than the deviation" in said
    assert "ffl: student0 96.00 ± 1.41 %, +5.00 points against independent.<" in said
    assert "independent: student0 91.00 ± 1.41 %.<" in said
    assert "+1.00 points against independent; one seed does not say" in headline(gather([near[0], alone[0]]))
    assert headline(gather([near[0]])) == '<p class="headline">dml: student0 91.00 %.</p>'


@needs_matplotlib
@pytest.mark.parametrize("label", ["student0", "ffsd (runs/2026-12-01_ffsd_resnet32_cifar100): leader"])
def test_nothing_of_a_drawing_is_cut_off(label, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_svg", lambda figure, *more: drawn.append(figure))
    lines = [figures.Line(f"{label}{i}", Curve([1.5e-4, 1.25e-4], None), i) for i in range(6)]
    figures.curves("a", "A title", [1, 2], lines, unit="loss")
    figures.bars(
        "b", "A title", ["eighteen letters w", "b"], [[1.0, 2.0], [0.5, 1.0]], [label, "b"], unit="test images"
    )
    for figure in drawn:
        (axes,), (legend,) = figure.axes, figure.legends
        assert axes.get_xlabel() and (axes.get_ylabel() or axes.get_yticklabels()[0].get_text())
        for part in (axes.get_tightbbox(), legend.get_window_extent()):
            assert part.x0 >= 0 and part.y0 >= 0
            assert part.x1 <= figure.bbox.x1 and part.y1 <= figure.bbox.y1
        assert legend.get_window_extent().y1 <= axes.get_tightbbox().y0


@needs_matplotlib
def test_runs_tested_on_other_images_are_not_held_against_each_other(tmp_path, undrawn):
    ours = make_run(tmp_path / "a", NETWORKS, keep=kept(3, NETWORKS))
    alone = make_run(
        tmp_path / "b", ["student0"], method="independent", students=1, keep=kept(3, ["student0"], images=44)
    )
    text, pictures = render(gather([ours, alone]))
    assert "ffsd was tested on other images than independent: not compared." in text
    assert "classes-0" not in {p.name for p in pictures}
    third = make_run(tmp_path / "c", NETWORKS, method="dml", keep=kept(3, NETWORKS, images=44))
    text, pictures = render(gather([ours, third, alone]))
    assert "ffsd was tested on other images" in text and '<th scope="col">dml - independent</th>' in text
    text, _ = render(gather([ours, third]))
    assert "Tested on other images than ffsd, and left out: dml." in text


@needs_matplotlib
def test_a_long_run_of_eight_networks_stays_small(tmp_path):
    networks = [*(f"student{i}" for i in range(8)), "fusion", "leader", "ensemble", "oracle"]
    runs = []
    for seed in (0, 1):
        keep = kept(300, networks[:-1], images=10_000, seed=seed)
        runs.append(make_run(tmp_path / f"s{seed}", networks, epochs=300, terms=4, students=8, seed=seed, keep=keep))
    page, *pictures = report(runs, tmp_path / "a.html")
    assert len(pictures) > 8 and all(picture.read_bytes().startswith(b"\x89PNG\r\n") for picture in pictures)
    assert 100_000 < page.stat().st_size < 3_000_000
    assert page.read_text().count("<tr") > 600  # all epochs are there


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "a", NETWORKS)
    monkeypatch.setitem(sys.modules, "matplotlib.backends", None)
    line = refused(run, capsys=capsys)
    assert "a report needs matplotlib, which is not installed: pip install 'fastfuse[plot]'" in line


def test_groups_have_mean_deviation_and_labels_of_their_own(tmp_path):
    runs = [make_run(tmp_path / f"s{seed}", NETWORKS, seed=seed) for seed in (0, 1, 2)]
    other = make_run(tmp_path / "slow", NETWORKS, lr=0.01)
    groups = gather([*runs, other, runs[0]])  # named twice, it counts once
    assert [(group.label, group.seeds) for group in groups] == [("ffsd (s0)", [0, 1, 2]), ("ffsd (slow)", [0])]
    values = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[1])["accuracy"]["fusion"]["top1"] for run in runs
    ]
    curve = groups[0].accuracy["fusion"]
    assert curve.mean[1] == pytest.approx(statistics.fmean(values), rel=1e-12)
    assert curve.sd[1] == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert groups[1].accuracy["fusion"].sd is None


def test_every_method_with_a_ramp_has_its_curve():
    assert set(RAMPS) == {name for name, method in METHODS.items() if "rampup_epochs" in method.defaults}


def test_terms_are_ordered_by_what_they_are():
    names = ["loss", "student0_ce", "student10_ce", "leader_trans_fusion", "transform_leader_feature", "reconstruction"]
    found = by_kind({name: Curve([1.0], None) for name in names})
    assert {kind: list(terms) for kind, terms in found.items()} == {
        "ce": ["student0", "student10"],
        "trans_fusion": ["leader"],
        "feature": ["transform_leader"],
        "reconstruction": ["reconstruction"],
    }


def test_classes_without_images_have_no_accuracy():
    one = kept(1, ["leader"], images=3)  # the fourth class has none
    found = per_class([one], "leader")
    assert np.isnan(found[3]) and not np.isnan(found[:3]).any()


def test_mistakes_are_means_over_seeds_and_differences_are_in_order():
    ours = {(0, 1): 3.0, (1, 2): 1.0, (2, 0): 2.0}
    pairs = differing(ours, {(0, 1): 3.0, (2, 1): 1.5, (1, 2): 4.0}, most=2)
    assert [tuple(pair) for pair in pairs] == [(1, 2, 1.0, 4.0), (2, 0, 2.0, 0.0)]
    both = [kept(1, ["leader"], seed=seed) for seed in (0, 1)]
    wrong = statistics.fmean(float(np.sum(x.predictions["leader"] != x.labels)) for x in both)
    assert sum(mistakes(both, "leader").values()) == pytest.approx(wrong, rel=1e-12)


def test_likeness_of_maps():
    a = np.array([[1.0, 0], [0, 1]], np.float32)
    assert cosine(a, 7 * a) == pytest.approx(1) and cosine(a, 1 - a) == 0 and cosine(a, 0 * a) == 0


def test_maps_are_resized_between_their_centres():
    found = figures.resized(np.array([[0.0, 1.0]]), (1, 4), smooth=True)
    assert found.tolist() == [[0, 0.25, 0.75, 1]]  # centres of four pixels between those of two, 1/4 and 3/4
    assert figures.resized(np.array([[1, 2]]), (2, 4), smooth=False).tolist() == [[1, 1, 2, 2]] * 2


@pytest.mark.parametrize("folder", [Path("nowhere"), Path("nowhere/run")])
def test_no_folder_no_keepsakes(folder):
    assert "it has no keepsakes.npz" in keepsakes.read(folder)


def test_a_report_wants_a_run():
    with pytest.raises(InputError, match="needs at least one run folder"):
        report([])
