"""A data set on one page: statistics.html, and the contact sheet that it shows. Written by ingest for the newest version."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from msclip.data.shards import Manifest
from pipelines import contact_sheet
from pipelines.report_style import PALETTE, STYLE, WIDTH, Chart, finish, share, short_count

PAGE, SHEET = "statistics.html", "contact_sheet.png"

_TITLES = {
    "short_side": ("Shorter side", "pixels of the images as they are stored"),
    "aspect_ratio": ("Aspect ratio", "width over height"),
    "image_bytes": ("Image size", "bytes of an image file in the shards"),
    "caption_words": ("Caption length", "words of each caption"),
    "captions_per_image": ("Captions of an image", "how many there are to take turns"),
}


def write(manifest: Manifest) -> None:
    """Writes both files beside the manifest."""
    samples = contact_sheet.sample(manifest)
    sheet = contact_sheet.draw(samples, f"{manifest.folder.name}, version {manifest.version}: {manifest.rows:,} images")
    sheet.save(buffer := io.BytesIO(), "PNG", optimize=True)
    manifest.folder.write_bytes(SHEET, buffer.getvalue())
    sheet.save(buffer := io.BytesIO(), "JPEG", quality=85)
    manifest.folder.write_text(PAGE, render(manifest, base64.b64encode(buffer.getvalue()).decode()))


def render(manifest: Manifest, sheet: str) -> str:
    """The page as one string of HTML.

    Args:
        sheet: the contact sheet, a JPEG in base64.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["share"] = share
    return environment.get_template("statistics.html").render(
        manifest=manifest,
        palette=PALETTE,
        numbers=_numbers(manifest),
        charts=charts(manifest.statistics),
        sheet=sheet,
        formats=", ".join(f"{count:,} {name}" for name, count in manifest.statistics["formats"].items()),
    )


def _numbers(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    """Value, unit, label, note of the page's first numbers."""
    content = manifest.statistics
    rows, captions, size = manifest.rows, content["captions"], sum(shard.size for shard in manifest.shards)
    counted = max(1, content["rows"])
    read, dropped = (sum(count) for count in zip(*(_counts(each) for each in manifest.ingests), strict=True))
    return [
        (f"{rows:,}", "", "images", f"in {len(manifest.shards):,} shards of {len(manifest.row_groups):,} row groups"),
        (f"{captions:,}", "", "captions", f"{captions / counted:.3g} for each image"),
        (
            *_bytes(size),
            "in the shards",
            f"{content['image_bytes'] / counted:,.0f} bytes an image",
        ),
        (share(dropped / read if read else 0), "", "left out", f"{dropped:,} of {read:,} that were read"),
    ]


def _counts(ingest: Mapping[str, Any]) -> tuple[int, int]:
    return ingest["read"], sum(ingest["dropped"].values())


def _bytes(size: float) -> tuple[str, str]:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g}" if size < 1000 else f"{size:,.0f}", unit


def charts(statistics: Mapping[str, Any]) -> list[Chart]:
    """A histogram for each of the statistics' own."""
    histograms = statistics["histograms"]
    with mpl.rc_context(STYLE):
        return [_histogram(name, *histograms[name].values()) for name in _TITLES if sum(histograms[name]["count"])]


def _histogram(name: str, edges: Sequence[float], counts: Sequence[int]) -> Chart:
    """Bars of equal width, a bin each, from the first that holds something to the last."""
    filled = np.flatnonzero(counts)
    first, last = max(0, int(filled[0]) - 1), min(len(counts) - 1, int(filled[-1]) + 1)
    shown = range(first, last + 1)
    figure = Figure(figsize=(WIDTH, 2.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.085, right=0.985, bottom=0.2, top=0.93)
    total = sum(counts)
    shares = [counts[i] / total for i in shown]
    bars = axes.bar(range(len(shown)), shares, width=0.9, align="edge", color=PALETTE["blue"][0])
    for bar, value in zip(bars, shares, strict=True):
        if value >= 0.005:
            place = (bar.get_x() + bar.get_width() / 2, value)
            axes.annotate(
                share(value), place, (0, 2), textcoords="offset points", ha="center", fontsize=8, color=PALETTE["muted"][0]
            )
    axes.set_ylim(0, max(shares) * 1.15)
    axes.set_xlim(-0.1, len(shown))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
    axes.set_xticks([i - 0.05 for i in range(len(shown))], [_edge(name, edges[i]) for i in shown])
    axes.spines["bottom"].set_color(PALETTE["grid"][0])
    axes.tick_params(pad=5)
    axes.set_xlabel("each bar from its number up to the next", loc="right", labelpad=3, fontsize=8.5)
    title, note = _TITLES[name]
    return finish(name, title, note, figure)


def _edge(name: str, value: float) -> str:
    if name == "aspect_ratio":
        return f"{value:.2g}"
    if name == "image_bytes":
        return f"{value / 1024:g}k" if value < 2**20 else f"{value / 2**20:g}M"
    return short_count(value)
