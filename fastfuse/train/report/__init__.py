"""`fastfuse report`: runs as one HTML page that needs nothing else, and its figures as PNGs beside it."""

from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path

from fastfuse import info
from fastfuse.errors import InputError
from fastfuse.train.files import WriteError, write_atomic
from fastfuse.train.report import figures, html, seen, training
from fastfuse.train.report.figures import Picture
from fastfuse.train.report.material import Group, gather
from fastfuse.train.report.style import CSS

# By these a page and a PNG are known as a report's, which the next one may replace.
GENERATOR = f'<meta name="generator" content="{figures.SOFTWARE}">'

_PARTS = (
    ("results", "Results", training.results),
    ("accuracy", "Accuracy over time", training.accuracy),
    ("losses", "Loss terms", training.losses),
    ("schedule", "Learning rate and ramps", training.schedule),
    ("throughput", "Throughput", training.throughput),
    ("attention", "Attention maps", seen.attention),
    ("classes", "Accuracy by class", seen.classes),
    ("confusion", "Confused classes", seen.confusion),
    ("configuration", "Configuration and versions", training.configuration),
)


def report(paths: Sequence[Path], page: Path | None = None) -> list[Path]:
    """Write a page about runs; finished ones that differ in nothing but the seed are one curve, with deviation.

    Args:
        paths: at least one run folder; a run that goes on counts as far as it is.
        page: where to; None: report/report.html in the first run's folder. Its PNGs lie beside it, with the name of
            the page before their own.

    Returns:
        The page, and its PNGs.

    Raises:
        InputError: no run, no results yet, damaged files, no matplotlib, or a file that is there and no report's.
    """
    if not paths:
        raise InputError("fastfuse report needs at least one run folder: fastfuse report RUN [RUN ...]")
    figures.check_installed()
    page = Path(paths[0]) / "report" / "report.html" if page is None else Path(page)
    if page.suffix not in (".html", ".htm") or page.is_dir():
        raise InputError(f"{page} is no name for a page: give --html a file, as report.html")
    text, pictures = render(gather(paths))
    files = {page: text.encode()} | {page.with_name(f"{page.stem}-{p.name}.png"): p.png for p in pictures}
    for file in files:
        _check_ours(file)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_atomic(file, methodcaller("write", content))
    except (OSError, WriteError) as error:
        raise InputError(f"{page} cannot be written ({error}): name another file with --html") from error
    return list(files)


def render(groups: Sequence[Group]) -> tuple[str, list[Picture]]:
    """The page of groups of runs, and its pictures."""
    sections, pictures = [], []
    for name, title, make in _PARTS:
        content, own = make(groups)
        sections.append(html.section(name, title, content))
        pictures += own
    links = "".join(f'<a href="#{name}">{html.escape(title)}</a> ' for name, title, _ in _PARTS)
    title = "fastfuse report: " + ", ".join(group.label for group in groups)
    notes = "".join(
        html.paragraph(f"{run.path} is {run.state}; this is how far it is.", "unfinished")
        for group in groups
        for run in group.runs
        if run.state != "finished"
    )
    versions = info.versions()
    made = f"Made by fastfuse {versions.get('fastfuse', '')} at commit {info.commit()}.".replace("  ", " ")
    text = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{CSS}\n</style></head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1>{_what(groups)}{notes}<nav>{links}</nav></header>\n"
        + "\n".join(sections)
        + f"\n<footer>{html.paragraph(made, 'quiet')}</footer>\n</body></html>\n"
    )
    return text, pictures


def _what(groups: Sequence[Group]) -> str:
    lines = []
    for group in groups:
        told, run = group.runs[0].told, group.runs[0]
        seeds = "seed" if len(group.seeds) == 1 else "seeds"
        lines.append(
            f"{group.label}: {told.get('model') or told.get('students')} on {told.get('data')}, "
            f"{run.epochs} of {run.of} epochs, {seeds} {', '.join(map(str, sorted(group.seeds)))}"
        )
    return "".join(html.paragraph(line, "quiet") for line in lines)


def _check_ours(file: Path) -> None:
    """Refuse to replace what no report has written."""
    try:
        with file.open("rb") as opened:
            start = opened.read(2048)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise InputError(f"{file} cannot be replaced ({error.strerror}): name another file with --html") from error
    if figures.SOFTWARE.encode() not in start:
        raise InputError(f"{file} is there and no report's: move it away, or name another file with --html")
