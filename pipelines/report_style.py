"""How the report draws: every picture once, as a PNG with a light ground and as an SVG that takes its colours from the page.

Every colour comes from `PALETTE` and occurs there once, so the SVG's hex values can be replaced by CSS variables and the same
picture serves light and dark. Hues are Okabe and Ito's, which people with any kind of colour vision can tell apart.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.report_run import RunRecord

# name: (light, dark)
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e6e9ec"),
    "muted": ("#68727d", "#98a2ad"),
    "grid": ("#e4e7eb", "#2a3037"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f58b3c"),
    "green": ("#008a64", "#35c295"),
    "purple": ("#a3548c", "#dd92c6"),
    "blue_2": ("#2f8bc2", "#4a9dd2"),
    "blue_3": ("#5e9fcb", "#3f86ba"),
}
STYLE: Any = {  # not dict[str, Any]: newer matplotlib types each key
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": PALETTE["ink"][0],
    "axes.edgecolor": PALETTE["grid"][0],
    "axes.labelcolor": PALETTE["muted"][0],
    "xtick.color": PALETTE["muted"][0],
    "ytick.color": PALETTE["muted"][0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PALETTE["grid"][0],
    "grid.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "msclip",
    "path.simplify_threshold": 0.2,
}
WIDTH, PANEL = 6.6, 2.35  # inches
MOST_POINTS = 700  # of one raw curve: a picture has no more columns of pixels
Curve = Float[np.ndarray, " points"]
Label = tuple[float, str, str]  # height in data units, text, colour


@dataclass(frozen=True)
class Chart:
    """A finished picture."""

    name: str
    """Stem of its PNG file."""
    title: str
    note: str
    """One line under the title: what the lines are."""
    png: bytes
    svg: str
    """Inline, without a size of its own; colours are CSS variables."""


def smooth(values: Curve, share: float = 0.02) -> Curve:
    """Centred mean under a Gaussian whose standard deviation is `share` of the curve; gaps (NaN) stay out of it."""
    sigma = share * len(values)
    if sigma < 0.6:
        return values
    reach = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    known = np.isfinite(values)
    weight = np.convolve(known.astype(float), kernel, "full")[len(reach) // 2 :][: len(values)]
    total = np.convolve(np.where(known, values, 0.0), kernel, "full")[len(reach) // 2 :][: len(values)]
    return np.where(known, total / np.maximum(weight, 1e-12), np.nan)


def thin(steps: Curve, values: Curve, most: int = MOST_POINTS) -> tuple[Curve, Curve]:
    """At most about `most` points, keeping the lowest and the highest of every stretch, so that no spike is lost."""
    if len(values) <= most:
        return steps, values
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    kept: list[int] = [0]
    for start, stop in pairwise(edges.tolist()):
        part = values[start:stop]
        if np.isfinite(part).any():
            kept += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
    kept.append(len(values) - 1)
    index = np.unique(kept)
    return steps[index], values[index]


def stacked_axes(panels: int, heights: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """Panels over one axis of steps; the right margin is for labels, and equal in all pictures.

    Args:
        heights: of the panels, inches; one panel has its own.
    """
    inches = sum(heights) if heights and panels > 1 else PANEL
    gap = 0.34 * (panels - 1)
    figure = Figure(figsize=(WIDTH, inches + gap + (0.62 if panels == 1 else 0.74)))
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": list(heights or [1])})
    figure.subplots_adjust(
        left=0.085,
        right=0.77,
        bottom=0.44 / height,
        top=1 - (0.18 if panels == 1 else 0.3) / height,
        hspace=gap / max(1, panels - 1) / (inches / panels),
    )
    axes = [row[0] for row in grid]
    for each in axes:
        each.spines["bottom"].set_color(PALETTE["grid"][0])
        each.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        each.margins(x=0.0)
        each.tick_params(pad=5)
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(v)))
    axes[-1].set_xlabel("step", loc="right", labelpad=2)
    return figure, axes


def draw_curve(axes: Axes, run: RunRecord, name: str, colour: str, form: Callable[[float], str], raw: bool = True) -> Label:
    """Draws every record faintly and a running mean over it; the label says where the mean ends."""
    steps, values = run.metrics["step"], run.metrics[name]
    mean = smooth(values) if raw else values
    shade = PALETTE[colour][0]
    if raw and len(values) > 4:
        axes.plot(*thin(steps, values), color=shade, alpha=0.28, linewidth=0.8)
    axes.plot(*thin(steps, mean), color=shade, marker="o" if len(values) < 3 else None, markersize=4)
    known = mean[np.isfinite(mean)]
    return (float(known[-1]), form(float(known[-1])), colour) if len(known) else (0.0, "not finite", colour)


def draw_chance(axes: Axes, height: float, text: str) -> Label:
    """A dashed line at what a blind guess would reach, and its label."""
    axes.axhline(height, color=PALETTE["muted"][0], linewidth=1, linestyle=(0, (4, 3)))
    return height, text, "muted"


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes each label to the right of where its line ends, moved apart where they would overlap."""
    pixels = axes.get_window_extent().height
    apart = 13.0 * axes.figure.dpi / 72 / pixels
    wanted = sorted(((float(axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1]), text, colour)
                     for y, text, colour in labels), key=lambda label: label[0])  # fmt: skip
    heights = [min(max(y, 0.0), 1.0) for y, _, _ in wanted]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + apart)
    over = max(0.0, heights[-1] - 1.03) if heights else 0.0
    for i in reversed(range(len(heights))):  # push back down from the top, only as far as needed
        limit = heights[i + 1] - apart if i + 1 < len(heights) else heights[i] - over
        heights[i] = min(heights[i], limit)
    for height, (_, text, colour) in zip(heights, wanted, strict=True):
        weight = "normal" if colour == "muted" else "bold"
        axes.text(1.018, height, text, transform=axes.transAxes, va="center", color=PALETTE[colour][0], weight=weight)


def panel_title(axes: Axes, text: str) -> None:
    """A small heading over one panel."""
    axes.set_title(text, loc="left", fontsize=9.5, color=PALETTE["muted"][0], pad=5)


def percent_axis(axes: Axes, top: float | None = None) -> None:
    """From 0 to a round share that is over everything drawn."""
    highest = top if top is not None else axes.get_ylim()[1]
    ceiling = next(share for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if highest <= share or share == 1.0)
    axes.set_ylim(0, ceiling)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))


def share(value: float) -> str:
    """Per cent with as many digits as matter: "0.39 %", "8.3 %", "52.1 %"."""
    return f"{100 * value:.2g} %" if value < 0.0995 else f"{100 * value:.1f} %".replace("100.0", "100")


def named_share(name: str, value: float) -> str:
    """For example "top-1 52.1 %"."""
    return f"{name} {share(value)}"


def short_count(value: float) -> str:
    """For example "500", "2.5k", "10M"."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
            return f"{value / size:g}{letter}"
    return f"{value:,.6g}"


def finish(name: str, title: str, note: str, figure: Figure) -> Chart:
    """The figure as a chart; `name` becomes a file name and a prefix of ids."""
    name = re.sub(r"[^\w.-]+", "_", name)
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Chart(name, title, note, png.getvalue(), inline_svg(svg.getvalue(), name, title))


def inline_svg(svg: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: no size, no font and no colour of its own, ids that no other picture has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    for colour, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{colour})")
    svg = re.sub(
        r"font: (\w+ )?([\d.]+px) [^;\"]*", lambda m: f"font-size: {m[2]}" + ("; font-weight: 600" if m[1] else ""), svg
    )
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    head = re.search(r'viewBox="[^"]*"', svg)
    assert head, "matplotlib wrote no viewBox"
    return re.sub(
        r"<svg[^>]*>",
        f'<svg {head[0]} role="img" aria-label="{html.escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )
