"""The panels of a report, each drawn once and given as SVG for the page and as PNG beside it."""

import base64
import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfuse.errors import InputError
from fastfuse.train.report.material import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Says in a PNG that it is ours to overwrite.
SOFTWARE = "fastfuse report"
# All that is not a curve has this colour, for which the page's own takes its place: light and dark are one drawing.
INK = "#1b1c1d"
# Readable on white and on black; twelve, for eight students, head, leader, ensemble and oracle.
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#b0713f", "#e377c2", "#7f8c8d", "#a8ad1b", "#17becf")
# More bands than these hide one another; the tables have all deviations.
BANDS = 4
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": SOFTWARE,
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # names of classes and folders are no formulas
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """One panel: `name` of its PNG, what it shows in words, and both drawings."""

    name: str
    title: str
    svg: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve of a panel; `index` decides its colour: within a group, a network has one in all panels."""

    label: str
    curve: Curve
    index: int
    thick: bool = False


def check_installed() -> None:
    """See that there is something to draw with.

    Raises:
        InputError: matplotlib is not installed.
    """
    if not installed():
        raise InputError(
            "a report needs matplotlib, which is not installed: pip install 'fastfuse[plot]'; fastfuse compare prints "
            "tables without it"
        )


def installed() -> bool:
    """Whether there is something to draw with."""
    try:
        from matplotlib.backends import backend_agg, backend_svg  # noqa: F401
    except ImportError:
        return False
    return True


def curves(name: str, title: str, epochs: Sequence[int], lines: Sequence[Line], *, unit: str) -> Picture:
    """Curves over epochs of what `unit` says, with a band of one deviation around a mean over seeds.

    A curve may have fewer epochs than there are; values that are positive and span more than two decades get a
    logarithmic axis.
    """

    def draw(axes: Any) -> None:
        for line in lines:
            own = epochs[: len(line.curve.mean)]
            color, style = COLORS[line.index % len(COLORS)], "--" if line.index >= len(COLORS) else "-"
            marker = "o" if len(own) == 1 else None
            axes.plot(
                own, line.curve.mean, style, color=color, label=line.label, lw=2.4 if line.thick else 1.3, marker=marker
            )
            if line.curve.sd is not None and len(lines) <= BANDS:
                mean, sd = np.array(line.curve.mean), np.array(line.curve.sd)
                axes.fill_between(own, mean - sd, mean + sd, color=color, alpha=0.15, lw=0)
        values = [value for line in lines for value in line.curve.mean]
        if values and min(values) > 0 and max(values) > 100 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(lambda value, place: "")
        else:
            axes.yaxis.get_major_locator().set_params(nbins=6)
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)

    return _picture(name, title, draw, legend=[line.label for line in lines], left=0.92)


def bars(
    name: str,
    title: str,
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    kinds: Sequence[str],
    *,
    unit: str,
    signed: bool = False,
) -> Picture:
    """Horizontal bars of what `unit` says, the first at the top; one row of `values` for each kind.

    `signed`: of one kind, a bar's colour says whether its value is positive.
    """

    def draw(axes: Any) -> None:
        height = 0.8 / len(kinds)
        for k, (kind, row) in enumerate(zip(kinds, values, strict=True)):
            places = [i + (k + 0.5) * height - 0.4 for i in range(len(labels))]
            signs = [COLORS[2] if value >= 0 else COLORS[3] for value in row]
            axes.barh(places, row, height, color=signs if signed else COLORS[k], label=kind)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.axvline(0, color=INK, lw=0.8)
        axes.grid(visible=False, axis="y")
        whole = all(float(value).is_integer() for row in values for value in row)
        axes.xaxis.get_major_locator().set_params(integer=whole, nbins=6)
        axes.set_xlabel(unit)

    legend = kinds if len(kinds) > 1 else []
    left = 0.18 + 0.062 * max(map(len, labels), default=0)
    width, height = max(4.4, left + 2.6), 1.0 + 0.19 * len(labels)
    return _picture(name, title, draw, legend=legend, width=width, height=height, left=left)


def tiles(name: str, title: str, rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str]) -> Picture:
    """Small images side by side, each uint8 [h, w, 3] of any size; as PNG alone, for the page arranges its own."""
    side, gap = 64, 6
    canvas = np.full((len(rows) * (side + gap), len(columns) * (side + gap), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (side + gap), j * (side + gap)
            canvas[top : top + side, left : left + side] = resized(image, (side, side), smooth=False)

    def draw(axes: "Axes") -> None:
        axes.imshow(canvas, interpolation="none", aspect="auto")
        axes.set_xticks([j * (side + gap) + side / 2 for j in range(len(columns))], columns, rotation=30)
        axes.tick_params(length=0)
        axes.set_yticks([])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return _picture(name, title, draw, width=0.85 * len(columns) + 0.4, height=0.85 * len(rows), left=0.2, svg=False)


def heat(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """An attention map [h, w], scaled to its maximum, laid over its grey image: uint8 [H, W, 3]."""
    from matplotlib import colormaps

    largest = float(attention.max())
    scaled = resized(attention / largest if largest > 0 else attention, image.shape[:2], smooth=True)
    grey = image.astype(np.float64).mean(2, keepdims=True)
    colored = 255 * colormaps["inferno"](scaled)[..., :3]
    return (0.3 * grey + 0.7 * colored).round().clip(0, 255).astype(np.uint8)


def resized(values: np.ndarray, size: tuple[int, int], *, smooth: bool) -> np.ndarray:
    """[h, w] or [h, w, C] at another size: by the nearest value, or between the values (of [h, w] alone)."""
    places = [(np.arange(n) + 0.5) * old / n - 0.5 for n, old in zip(size, values.shape[:2], strict=True)]
    if not smooth:
        rows, columns = (np.floor(place + 0.5).astype(int) for place in places)
        return values[rows[:, None].clip(0, values.shape[0] - 1), columns.clip(0, values.shape[1] - 1)]
    tall = np.stack([np.interp(places[0], np.arange(values.shape[0]), column) for column in values.T], 1)
    return np.stack([np.interp(places[1], np.arange(values.shape[1]), row) for row in tall])


def png_uri(image: np.ndarray) -> str:
    """A small image uint8 [H, W, 3] as the source of an <img>."""
    from matplotlib.image import imsave

    data = io.BytesIO()
    imsave(data, image, format="png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _picture(
    name: str,
    title: str,
    draw: Callable[[Any], None],
    *,
    legend: Sequence[str] = (),
    width: float = 4.4,
    height: float = 2.3,
    left: float = 0.62,
    svg: bool = True,
) -> Picture:
    """Sizes are inches: `height` and `width - left` are those of the axes, whose labels and legend come besides."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in another script: PNGs have boxes
        # A character of its text is 0.075 inches wide, the line before it and the gap behind it 0.3.
        per_row = int(max(1, min(4, width / (0.3 + 0.075 * max(map(len, legend), default=0)))))
        above, below = 0.34, 0.5 + 0.19 * -(-len(legend) // per_row)
        whole = height + above + below
        figure = Figure(figsize=(width, whole))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((left / width, below / whole, (width - left - 0.12) / width, height / whole))
        draw(axes)
        figure.text(left / width, 1 - 0.1 / whole, title, va="top", weight="bold")
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="lower center", ncols=per_row, frameon=False, fontsize=8, borderpad=0.1,
                columnspacing=1.0, handlelength=1.4, labelspacing=0.25,
            )  # fmt: skip
        return Picture(name, title, _svg(figure, name, title) if svg else "", _png(figure))


def _png(figure: "Figure") -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": SOFTWARE})
    return data.getvalue()


def _svg(figure: "Figure", name: str, title: str) -> str:
    """The drawing as an element of the page: in its colours, with ids of its own, and no address in it."""
    data = io.BytesIO()
    figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    text = data.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # the page decides
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
