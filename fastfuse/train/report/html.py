"""Pieces of the page: text in, HTML out; whatever a run's files say is escaped here."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape as escape
from typing import Any

from fastfuse.train.report.figures import Picture
from fastfuse.train.report.material import Curve


def number(value: float | None) -> str:
    """Six digits, as many as anyone reads; nothing for no number."""
    return "" if value is None or value != value else f"{value:.6g}"


def percent(mean: float, sd: float | None) -> str:
    """A percentage, with the deviation over seeds if there is one."""
    return f"{mean:.2f}" + ("" if sd is None else f" <i>± {sd:.2f}</i>")


def cell(content: str, data: Mapping[str, Any] | None = None) -> str:
    """A cell of ready HTML; `data` are values that a program can read, with all their digits."""
    return f"<td{attributes(data)}>{content}</td>"


def attributes(data: Mapping[str, Any] | None) -> str:
    """As data-NAME="VALUE"; those that are None stay out."""
    known = {name: value for name, value in (data or {}).items() if value is not None}
    return "".join(f' data-{name}="{escape(str(value))}"' for name, value in known.items())


def row(heading: str, cells: Iterable[str], *, kind: str = "", data: Mapping[str, Any] | None = None) -> str:
    """A row: a heading in plain text, and ready cells."""
    own = f' class="{kind}"' if kind else ""
    return f'<tr{own}{attributes(data)}><th scope="row">{escape(heading)}</th>{"".join(cells)}</tr>'


def table(name: str, headings: Sequence[str], rows: Iterable[str], *, kind: str = "") -> str:
    """A table with an id, that scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(rows)
    outer = "scroll tall" if kind == "tall" else "scroll"
    inner = f' class="{kind}"' if kind and kind != "tall" else ""
    return (
        f'<div class="{outer}" tabindex="0"><table id="{escape(name)}"{inner}><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def by_epoch(name: str, epochs: Sequence[int], curves: Mapping[str, Curve]) -> str:
    """Curves as a table, an epoch a row: means to six digits, and deviations."""

    def one(curve: Curve, i: int) -> str:
        sd = "" if curve.sd is None else f" <i>± {curve.sd[i]:.2g}</i>"
        return f"<td>{number(curve.mean[i])}{sd}</td>"

    rows = [row(str(epoch), [one(curve, i) for curve in curves.values()]) for i, epoch in enumerate(epochs)]
    return table(name, ["epoch", *curves], rows, kind="tall")


def details(title: str, content: str) -> str:
    """Content that shows when asked for."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def panels(pictures: Iterable[Picture], *, kind: str = "") -> str:
    """Drawings, as many side by side as there is room for; `kind` "large": fewer."""
    return (
        f'<div class="{f"panels {kind}".strip()}">'
        + "".join(f"<figure>{picture.svg}</figure>" for picture in pictures)
        + "</div>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Plain text."""
    own = f' class="{kind}"' if kind else ""
    return f"<p{own}>{escape(text)}</p>"


def section(name: str, title: str, content: str) -> str:
    """A part of the page."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n{content}\n</section>'
