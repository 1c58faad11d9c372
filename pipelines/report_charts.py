"""The report's pictures: what metrics.jsonl and the evaluation results say, over the steps of the run."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator

from msclip.timing import PARTS, bottleneck
from pipelines.report_run import RunRecord
from pipelines.report_style import (
    PALETTE,
    STYLE,
    Chart,
    draw_chance,
    draw_curve,
    finish,
    label_ends,
    named_share,
    panel_title,
    percent_axis,
    share,
    short_count,
    smooth,
    stacked_axes,
    thin,
)

LEGIBLE = 0.03
"""Least share of a step whose name is written beside its band."""


def training_charts(run: RunRecord) -> list[Chart]:
    """Pictures of metrics.jsonl; one whose columns are missing is left out."""
    with mpl.rc_context(STYLE):
        made = [_loss(run), _accuracy(run), _throughput(run), _step_time(run), _health(run)]
    return [chart for chart in made if chart]


def evaluation_charts(run: RunRecord) -> list[Chart]:
    """One picture a task: its metrics over the checkpoints, with chance."""
    with mpl.rc_context(STYLE):
        return [_task(name, results) for name, results in run.tasks().items()]


def _loss(run: RunRecord) -> Chart | None:
    if "train/loss" not in run.metrics:
        return None
    figure, (axes,) = stacked_axes(1)
    labels = [draw_curve(axes, run, "train/loss", "blue", "{:.3g}".format)]
    batch = run.setting("training.global_batch")
    note = "symmetric cross-entropy over the global batch, in nats"
    if run.setting("model.loss") == "sigmoid":
        note = "sigmoid loss of all pairs of the global batch, divided by its size, in nats"
    elif isinstance(batch, int) and batch > 1:
        labels.append(draw_chance(axes, math.log(batch), f"guessing: ln {batch:,}"))
    axes.set_ylim(bottom=0)
    label_ends(axes, labels)
    return finish("loss", "Loss", note, figure)


def _accuracy(run: RunRecord) -> Chart | None:
    ways = {
        "train/image_to_text_accuracy": ("image → text", "blue"),
        "train/text_to_image_accuracy": ("text → image", "orange"),
    }
    if not ways.keys() & run.metrics.keys():
        return None
    figure, (axes,) = stacked_axes(1)
    labels = [
        draw_curve(axes, run, name, colour, partial(named_share, title))
        for name, (title, colour) in ways.items()
        if name in run.metrics
    ]
    batch = run.setting("training.global_batch")
    note = "how often the right partner of the global batch scores highest"
    if isinstance(batch, int) and batch > 1:
        labels.append(draw_chance(axes, 1 / batch, f"chance {share(1 / batch)}"))
    percent_axis(axes)
    label_ends(axes, labels)
    return finish("accuracy", "Accuracy within the batch", note, figure)


def _throughput(run: RunRecord) -> Chart | None:
    if "train/pairs_per_second" not in run.metrics:
        return None
    figure, (above, below) = stacked_axes(2, heights=(2, 1.15))
    label = draw_curve(above, run, "train/pairs_per_second", "green", "{:,.0f} /s".format)
    above.set_ylim(bottom=0)
    label_ends(above, [label])
    above.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short_count(v)))
    panel_title(above, "pairs per second")
    if "train/data_wait" in run.metrics:
        label = draw_curve(below, run, "train/data_wait", "orange", share)
        steps, mean = run.metrics["step"], smooth(run.metrics["train/data_wait"])
        below.fill_between(*thin(steps, mean), color=PALETTE["orange"][0], alpha=0.15, linewidth=0)
        percent_axis(below, top=max(0.05, float(np.nanmax(run.metrics["train/data_wait"]))))
        label_ends(below, [label])
    panel_title(below, "share of the step spent waiting for data")
    return finish("throughput", "Throughput", "pairs of all workers; waiting is that of the slowest worker", figure)


def _step_time(run: RunRecord) -> Chart | None:
    """Where a step's time goes, as shares; of the worker that waited longest for data."""
    names = [f"train/{part}_seconds" for part in PARTS]
    if not all(name in run.metrics for name in names):
        return None
    seconds = np.stack([smooth(run.metrics[name]) for name in names])
    shares = seconds / np.maximum(seconds.sum(axis=0), 1e-9)
    figure, (axes,) = stacked_axes(1)
    colours = ("orange", "purple", "muted", "blue_3", "green", "blue")
    steps, tops, labels = run.metrics["step"], np.cumsum(shares, axis=0), []
    for part, colour, share_of, top in zip(PARTS, colours, shares, tops, strict=True):
        axes.fill_between(steps, top - share_of, top, color=PALETTE[colour][0], linewidth=0)
        if share_of[-1] >= LEGIBLE:
            labels.append((float(top[-1] - share_of[-1] / 2), f"{part} {share_of[-1]:.0%}", colour))
    percent_axis(axes, 1.0)
    label_ends(axes, labels)
    last = {name: values[-1] for name, values in run.metrics.items()}
    return finish("step_time", "Where the time goes", f"share of a step, now: {bottleneck(last)}", figure)


def _health(run: RunRecord) -> Chart | None:
    panels = {
        "train/lr": ("learning rate", "blue", "{:.2g}".format),
        "train/grad_norm": ("gradient norm before clipping", "green", "{:.3g}".format),
        "train/temperature": ("temperature, exp(logit scale)", "purple", "{:.1f}".format),
        "train/logit_bias": ("bias of the sigmoid loss", "orange", "{:.2f}".format),
    }
    shown = [name for name in panels if name in run.metrics]
    if not shown:
        return None
    figure, all_axes = stacked_axes(len(shown), heights=(1,) * len(shown))
    for axes, name in zip(all_axes, shown, strict=True):
        title, colour, form = panels[name]
        label = draw_curve(axes, run, name, colour, form, raw=name == "train/grad_norm")
        values = run.metrics[name][np.isfinite(run.metrics[name]) & (run.metrics[name] > 0)]
        if name == "train/grad_norm" and len(values) and values.max() > 30 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        elif name not in ("train/temperature", "train/logit_bias"):
            axes.set_ylim(bottom=0)
        if name == "train/lr":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2g}" if v else "0"))
            label = (label[0], f"{label[1]}, peak {np.nanmax(run.metrics[name]):.2g}", colour)
        panel_title(axes, title)
        label_ends(axes, [label])
    return finish("optimisation", "Optimisation", "what the optimiser did, step by step", figure)


def _task(name: str, results: Sequence[Mapping[str, Any]]) -> Chart:
    steps = np.array([result["step"] for result in results], dtype=float)
    series: list[list[tuple[str, str, str]]]
    if any(key.startswith("image_retrieval") for key in results[-1]["metrics"]):
        shades = {1: "blue", 5: "blue_2", 10: "blue_3"}
        ways = {"image_retrieval": "text → image", "text_retrieval": "image → text"}
        series = [[(f"{way}_recall@{k}", f"R@{k}", colour) for k, colour in shades.items()] for way in ways]
        titles = [f"{title}: recall" for title in ways.values()]
        note = "how often a right answer is among the first 1, 5 and 10"
    else:
        series = [[("acc1", "top-1", "blue"), ("acc5", "top-5", "blue_3")]]
        titles = [""]
        note = "zero-shot classification: the class whose text is nearest"
    highest, labelled = 0.0, []
    figure, all_axes = stacked_axes(len(series), heights=(1.5,) * len(series) if len(series) > 1 else None)
    for axes, lines, title in zip(all_axes, series, titles, strict=True):
        labels = []
        for key, short, colour in lines:
            values = np.array([result["metrics"].get(key, np.nan) for result in results], dtype=float)
            known = values[np.isfinite(values)]
            if len(known):
                highest = max(highest, known.max())
                axes.plot(steps, values, "-o", color=PALETTE[colour][0], markersize=4.5, clip_on=False)
                labels.append((float(known[-1]), f"{short} {share(known[-1])}", colour))
        chance = results[-1].get("chance", {})
        if (first := lines[0][0]) in chance:
            labels.append(draw_chance(axes, chance[first], f"{lines[0][1]} chance {share(chance[first])}"))
            highest = max(highest, chance[first])
        if title:
            panel_title(axes, title)
        labelled.append(labels)
    for axes, labels in zip(all_axes, labelled, strict=True):  # both ways on one scale
        percent_axis(axes, highest)
        label_ends(axes, labels)
    return finish(f"evaluation_{name}", name, note, figure)
