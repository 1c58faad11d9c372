"""One page on a run: `python -m pipelines.report --run runs/demo`.

Reads the run's folder alone and writes `report/index.html` (self-contained: pictures inside, no script or font from elsewhere,
light and dark) and the same pictures as PNG files. The gallery looks into the newest checkpoint.
"""

import datetime
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

import msclip
from msclip.checkpoint import EMA, MODEL
from msclip.errors import UserError
from msclip.eval.results import metric_names
from msclip.eval.tasks import Task
from msclip.storage import Folder
from pipelines import cli, report_gallery
from pipelines.report_charts import evaluation_charts, training_charts
from pipelines.report_gallery import Gallery
from pipelines.report_run import RunRecord, read_run
from pipelines.report_style import PALETTE, Chart, share

WAYS = {"image_retrieval": "text → image", "text_retrieval": "image → text"}
KINDS = {"zeroshot_classification": "zeroshot", "zeroshot_retrieval": "retrieval"}


@dataclass(frozen=True)
class Report:
    """Writes one HTML page, and PNG files, on a training run."""

    run: str
    """the run's folder, local or a URL"""
    data: str | None = None
    """captioned Parquet for the gallery (a file, a folder or a pattern); by default what retrieval was evaluated on"""
    output: str | None = None
    """where the page goes; by default the folder `report` of the run"""
    queries: int = 6
    """questions of the gallery each way; 0 for no gallery"""
    seed: int = 0
    """chooses the gallery's questions"""

    def __post_init__(self) -> None:
        if self.queries < 0:
            raise UserError(f"queries must be 0 or more, got {self.queries}")


@dataclass(frozen=True)
class Number:
    """A number large enough to be read from afar."""

    value: str
    unit: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Results of one task: a row a checkpoint, newest first, and one for chance."""

    name: str
    about: str
    groups: tuple[tuple[str, int], ...]
    """Titles over several columns, and how many."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...], tuple[bool, ...]], ...]
    """Step, cells, and whether each is its column's best."""
    chance: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    return write(cli.parse(Report, argv, prog="python -m pipelines.report"))


def write(job: Report) -> int:
    """Writes the page and prints where it is."""
    run = read_run(job.run)
    output = Folder(job.output) if job.output else run.folder / "report"
    gallery, why_none = make_gallery(job, run)
    training, evaluation = training_charts(run), evaluation_charts(run)
    for chart in training + evaluation:
        output.write_bytes(f"{chart.name}.png", chart.png)
    page = render(run, training, evaluation, gallery, why_none)
    output.write_text("index.html", page)
    print(f"report: {(output / 'index.html').url} ({len(page.encode()) / 1e6:.1f} MB)")
    return 0


def make_gallery(job: Report, run: RunRecord) -> tuple[Gallery | None, str]:
    """The gallery of the newest checkpoint, or why there is none."""
    if job.queries == 0:
        return None, "It was not asked for."
    if not run.checkpoints:
        return None, "The run has no finished checkpoint yet."
    evaluated: list[dict[str, Any]] = [result["definition"] for result in run.results if result["task"] == "zeroshot_retrieval"]
    if job.data:
        task = Task(name="gallery", kind="retrieval", data=job.data)
    elif evaluated:
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in evaluated[-1].items()}
        task = Task(**settings)
    else:
        return None, "Retrieval has not been evaluated; --data names a captioned set to look into."
    newest = run.checkpoints[-1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        averaged = newest.exists(EMA)  # what evaluation measures, too
        loaded = msclip.load((newest / (EMA if averaged else MODEL)).url)
        title = f"{newest.name}-ema" if averaged else newest.name
        return report_gallery.fill(loaded, task, title, job.queries, job.seed, device), ""
    except UserError as error:
        if job.data:
            raise
        return None, f"It could not be made: {error}"  # the evaluated data may have moved since


def render(
    run: RunRecord, training: Sequence[Chart], evaluation: Sequence[Chart], gallery: Gallery | None, why_none: str
) -> str:
    """The page as one string of HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    tables = {name: table(name, results) for name, results in run.tasks().items()}
    return environment.get_template("report.html").render(
        run=run,
        palette=PALETTE,
        subtitle=subtitle(run),
        numbers=numbers(run),
        training=training,
        evaluation=[(chart, tables[chart.title]) for chart in evaluation],
        gallery=gallery,
        why_no_gallery=why_none,
        facts=facts(run),
        versions=run.state.get("versions", {}),
        written=datetime.datetime.now().strftime("%-d %B %Y, %H:%M"),
        msclip_version=msclip.__version__,
    )


def subtitle(run: RunRecord) -> str:
    """What was trained on what, in one line."""
    parts = []
    if run.setting("model.patch_size"):
        parts.append(
            f"{run.setting('model.width')} wide, {run.setting('model.layers')} layers, patch {run.setting('model.patch_size')} "
            f"at {run.setting('model.image_size')} px"
        )
    if workers := run.state.get("world_size"):
        device = run.state.get("device", "")
        parts.append(f"{workers} worker{'s' * (workers > 1)} on {'CPU' if device == 'cpu' else device}")
    parts.append(datetime.datetime.fromtimestamp(run.metrics["time"][-1]).strftime("%-d %B %Y"))
    return " · ".join(parts)


def numbers(run: RunRecord) -> list[Number]:
    """The page's first numbers: what was measured last, then what it took."""
    made = []
    for name, results in run.tasks().items():
        last = results[-1]
        for key, title in (
            ("acc1", "top-1"),
            ("image_retrieval_recall@1", "text → image R@1"),
            ("text_retrieval_recall@1", "image → text R@1"),
        ):
            if key in last["metrics"]:
                value, chance = last["metrics"][key], last.get("chance", {}).get(key)
                note = f"{value / chance:,.3g} times chance ({share(chance)})" if chance else ""
                digits, unit = share(value).split(" ")
                made.append(Number(digits, unit, f"{name}, {title}", note))
    step = int(run.metrics["step"][-1])
    pairs = pairs_seen(run)
    epoch = run.metrics["epoch"][-1] if "epoch" in run.metrics else math.nan
    made.append(Number(f"{step:,}", "", "steps", f"{epoch:.1f} epochs" if math.isfinite(epoch) else ""))
    if pairs:
        made.append(Number(*big(pairs), "image-text pairs", "each counted as often as seen"))
    if seconds := training_seconds(run):
        rate = f"{pairs / seconds:,.0f} pairs a second" if pairs else ""
        made.append(Number(*duration(seconds), "in training steps", rate))
    return made


def pairs_seen(run: RunRecord) -> int | None:
    """Pairs of all steps so far; None where the config does not say how many a step has."""
    batch = run.setting("training.global_batch")
    return int(run.metrics["step"][-1]) * batch if isinstance(batch, int) else None


def training_seconds(run: RunRecord) -> float | None:
    """Seconds in training steps, over all attempts: interruptions, checkpoints and start-up do not count."""
    rate, batch = run.metrics.get("train/pairs_per_second"), run.setting("training.global_batch")
    if rate is None or not isinstance(batch, int):
        return None
    steps = np.diff(run.metrics["step"], prepend=0)
    known = np.isfinite(rate) & (rate > 0)
    return float((steps[known] * batch / rate[known]).sum() * steps.sum() / max(steps[known].sum(), 1))


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """What ran, on what and for how long; unknown things are left out."""
    plan, times = run.state.get("plan", {}), run.metrics.get("time", np.array([]))
    retries = run.metrics.get("train/storage_retries", np.array([]))
    seconds, pairs = training_seconds(run), pairs_seen(run)
    batch, workers = run.setting("training.global_batch"), run.state.get("world_size")
    stage = None if workers == 1 else run.setting("training.zero_stage")  # one worker has nobody to spread anything over
    listed = [
        ("Steps", f"{int(run.metrics['step'][-1]):,}"),
        ("Pairs seen", f"{pairs:,}" if pairs else None),
        ("Global batch", f"{batch:,}" if batch else None),
        ("Time in steps", " ".join(duration(seconds)) if seconds else None),
        ("First to last record", " ".join(duration(times[-1] - times[0])) if len(times) > 1 else None),
        ("Storage requests repeated", f"{int(retries[-1]):,}" if len(retries) and retries[-1] > 0 else None),
        ("Workers", workers),
        ("Device", run.state.get("device")),
        ("Precision", run.setting("training.precision")),
        ("DeepSpeed ZeRO", "none" if run.config and stage is None else f"stage {stage}" if run.config else None),
        ("Data digest", plan.get("data")),
        ("Finished checkpoints", len(run.checkpoints)),
        ("Seed", run.setting("training.seed")),
        ("Folder", run.folder.url),
    ]
    return [(name, str(value)) for name, value in listed if value is not None]


def table(name: str, results: Sequence[Mapping[str, Any]]) -> Table:
    """Results of one task as text; columns that no result has are left out."""
    last = results[-1]
    kind = KINDS.get(last["task"])
    known = metric_names(Task(name="titles", kind=kind, data="-")) if kind else {key: key for key in last["metrics"]}
    keys = [key for key in known if any(key in result["metrics"] for result in results)]
    ways = [next((way for way in WAYS if key.startswith(way)), "") for key in keys]
    titles = [known[key] if not way else short_title(key) for key, way in zip(keys, ways, strict=True)]
    best = {
        key: (min if "median" in key else max)(result["metrics"][key] for result in results if key in result["metrics"])
        for key in keys
    }

    def cell(values: Mapping[str, float], key: str) -> str:
        if key not in values:
            return ""
        return f"{values[key]:.1f}".removesuffix(".0") if "median" in key else f"{100 * values[key]:.1f}"

    about = [
        f"{last['rows']:,} images" if "rows" in last else "",
        f"{last['captions']:,} captions" if "captions" in last else "",
    ]
    about += [f"{last['classes']:,} classes" if "classes" in last else ""]
    if skipped := last.get("skipped_rows"):
        about.append(f"{skipped:,} left out")
    return Table(
        name=name,
        about=", ".join(part for part in about if part),
        groups=tuple((WAYS[way], ways.count(way)) for way in dict.fromkeys(ways) if way),
        columns=tuple(titles),
        rows=tuple(
            (
                f"{result['step']:,}",
                tuple(cell(result["metrics"], key) for key in keys),
                tuple(len(results) > 1 and result["metrics"].get(key) == best[key] for key in keys),
            )
            for result in reversed(results)
        ),
        chance=tuple(f"{100 * last['chance'][key]:.3g}" if key in last.get("chance", {}) else "" for key in keys),
    )


def short_title(key: str) -> str:
    """ "R@5" of "image_retrieval_recall@5", "median" of "image_retrieval_median_rank"."""
    return "R@" + key.rpartition("@")[2] if "@" in key else "median"


def big(count: float) -> tuple[str, str]:
    """Three digits and a word."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e5, "thousand")):
        if count >= size:
            size = min(size, 1e3) if word == "thousand" else size
            return f"{count / size:.3g}", word
    return f"{count:,.0f}", ""


def duration(seconds: float) -> tuple[str, str]:
    """A number and its unit, in words that fit."""
    if seconds < 90:
        return f"{seconds:.0f}", "s"
    if seconds < 5400:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}", "min"
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}", "h"


if __name__ == "__main__":
    sys.exit(cli.guard(main))
