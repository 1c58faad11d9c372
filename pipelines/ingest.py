"""Image-text pairs to shards: `python -m pipelines.ingest --input photos/ --captions captions.csv --output shards/`.

Every image is decoded once, in full, so that training meets only good ones; what is refused is listed with its reason in
quarantine.jsonl. Rows are shuffled over the whole data set, by a seed. An image folder is read in the shuffled order, a
task for each shard; Parquet is read in its own order, and Ray Data carries each row to its shard. The manifest is written
last: a folder without one is not a finished data set, which is why the shards lie in a folder of their own below it. A
file INGESTING stands there from the first write to the manifest, so that only what an ingest left is taken for it.
"""

import json
import logging
import pickle
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from msclip.data.captions import Refused
from msclip.data.shards import FORMAT, MANIFEST, Manifest
from msclip.data.sources import Source, open_source
from msclip.errors import UserError
from msclip.storage import Folder
from pipelines import cli, session
from pipelines.ingest_tasks import SHARDS, Tally, Work, Written
from pipelines.jobs import ClusterConfig

QUARANTINE = "quarantine.jsonl"
INGESTING = "INGESTING"
_WRITTEN = re.compile(r"\d{5,}\.parquet|\.tmp-\d+-[0-9a-f]{12}")  # a shard, or what a killed task left of its copy


@dataclass(frozen=True)
class IngestJob:
    """Turn a folder of images with captions, or Parquet with image bytes, into verified and shuffled shards."""

    input: str
    """A folder of images (with a table of captions), or Parquet with image bytes: a file, a folder or a glob; local or s3://."""
    output: str
    """Folder for the shards, manifest.json and quarantine.jsonl; local, or shared by all nodes."""
    captions: str | None = None
    """Table of captions for a folder of images: CSV, TSV, JSONL or Parquet; null for the only one inside the folder."""
    image_column: str | None = None
    """Column with the image's path (in captions) or bytes (in Parquet); null for usual names: image, file, path, ..."""
    caption_column: str | None = None
    """Column with a caption or a list of them; null for usual names: captions, caption, text, title."""
    key_column: str | None = None
    """Column of Parquet that identifies a row; null for key or id, else file and row."""
    source: str | None = None
    """Name recorded as the source of rows that have none; null for the input's own name."""
    shuffle_seed: int | None = 0
    """Rows are shuffled over the whole data set by this seed; null keeps the input's order."""
    image_short_side: int | None = None
    """Images with a longer shorter side are scaled down to this and stored as JPEG; null stores every file as it is."""
    shard_rows: int = 4096
    """Rows of a shard, bad ones included."""
    row_group_rows: int = 256
    """Rows of a row group, which is what training reads at a time."""
    overwrite: bool = False
    """Replace the data set that is in the output folder; files that no ingest wrote stay."""
    address: str | None = None
    """A Ray cluster to join; local for a new one on this machine; null for the one running here, else new."""

    def __post_init__(self) -> None:
        for name in ("shard_rows", "row_group_rows", "image_short_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise UserError(f"shuffle_seed must not be negative, got {self.shuffle_seed}")


def main(argv: Sequence[str] | None = None) -> int:
    """Ingests as the command line says; returns the exit status."""
    run(cli.parse(IngestJob, argv, prog="ingest"))
    return 0


def run(job: IngestJob) -> Manifest:
    """Ingests and returns the new data set's manifest.

    Raises:
        UserError: the input is missing or unusable, or the output folder holds something that is not to be replaced.
        TrainingError: the disk is full, or the storage fails.
    """
    output = Folder(job.output)
    if f"{Folder(job.input).path}/".startswith(f"{output.path}/"):
        raise UserError(f"output must not be or hold the input, got output {job.output!r} and input {job.input!r}")
    source = open_source(job.input, job.captions, job.image_column, job.caption_column, job.key_column, job.source)
    places, refused = source.places()
    if not len(places):
        raise UserError(f"nothing to ingest in {job.input!r}: no image has a caption. {_reasons(refused)}")
    _check_output(output, job.overwrite)
    with session.cluster(ClusterConfig(address=job.address)):
        output.write_text(INGESTING, "An ingest writes here, or was interrupted; the next one starts over.\n")
        _clear(output)
        written = _write(job, source, places, output)
    shards = [w.shard for w in written if w.shard]
    rows = sum(shard.rows for shard in shards)
    bad = [record for w in written for record in w.refused]
    if rows + len(bad) != len(places):
        raise RuntimeError(f"of {len(places)} rows {rows} were written and {len(bad)} refused")
    refused += bad
    output.write_text(QUARANTINE, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in refused))
    if not rows:
        raise UserError(f"none of the {len(places):,} images could be used; {output.url}/{QUARANTINE} says why")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    sources = sum((Counter(w.sources) for w in written), Counter[str]())
    manifest = Manifest(output, tuple(shards), quarantined=len(refused), sources=sources, created=created)
    manifest.write()
    output.delete(INGESTING)
    size = sum(shard.size for shard in shards) / 2**20
    print(f"ingested {rows:,} rows into {len(shards):,} shards ({size:,.1f} MiB): {output.url}")
    print(f"quarantined {len(refused):,}: {_reasons(refused)} ({output.url}/{QUARANTINE})" if refused else "quarantined 0")
    return manifest


def _reasons(refused: Iterable[Refused]) -> str:
    counts = Counter(r.reason.partition(":")[0] for r in refused)
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common())


def _check_output(output: Folder, overwrite: bool) -> None:
    """Raises `UserError` unless the folder is empty, holds what an interrupted ingest left, or may be overwritten."""
    if output.exists(MANIFEST):
        if not _is_manifest(output):
            raise UserError(f"output {output.url} has a {MANIFEST} that no ingest wrote; choose another folder")
        if not overwrite:
            raise UserError(f"output {output.url} holds a data set already; choose another folder, or --overwrite true")
    elif not overwrite and not output.exists(INGESTING) and (names := output.names()):
        raise UserError(
            f"output {output.url} must be empty, and it has {', '.join(names[:5])}; choose another folder, or --overwrite "
            f"true, which replaces {QUARANTINE} and {SHARDS}/00000.parquet, ... and leaves other files"
        )


def _is_manifest(output: Folder) -> bool:
    try:
        return str(json.loads(output.read_text(MANIFEST))["format"]).startswith(FORMAT.partition("/")[0])
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        return False


def _clear(output: Folder) -> None:
    """Deletes what an earlier ingest wrote and nothing else; the manifest first: what is left of a data set is none."""
    output.delete(MANIFEST)
    output.delete(QUARANTINE)
    shards = output / SHARDS
    for info in shards.filesystem.get_file_info(fs.FileSelector(shards.path, allow_not_found=True)):
        if info.type == fs.FileType.File and _WRITTEN.fullmatch(info.base_name):
            shards.delete(info.base_name)


def _write(job: IngestJob, source: Source, places: pa.Table, output: Folder) -> list[Written]:
    """Runs the pipeline on the cluster; what became of each shard, in order."""
    import ray
    import ray.data

    count = len(places)
    shuffled = job.shuffle_seed is not None
    position = np.random.default_rng(job.shuffle_seed).permutation(count) if shuffled else np.arange(count)
    places = places.append_column("position", pa.array(position))
    in_place = source.any_order or not shuffled
    if in_place:
        # Read in the order of the output: each unit is a shard, and no row has to travel.
        places = places.take(pa.array(np.argsort(position)))
        starts = np.arange(0, count, job.shard_rows)
    else:
        starts = np.flatnonzero(places["row"].to_numpy() == 0)  # each unit is a row group of the input
    units = [unit.combine_chunks() for unit in _cut(places, starts)]
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False  # ours says how many rows were refused
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come as exceptions
    tally = ray.remote(num_cpus=0)(Tally).remote()
    work = Work(source, output, job.shard_rows, job.row_group_rows, job.image_short_side, tally)
    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    shards = -(-count // job.shard_rows)
    with ray.data.DataContext.current(context), _progress(tally, count, shards), _explained(tally):
        blocks = ray.data.from_arrow(units)
        if in_place:
            results = blocks.map_batches(work.read_and_write, **whole)
        else:
            verified = blocks.map_batches(work.read, **whole)
            # A partition is a task; Ray's own number would be 200 for the smallest input.
            by_shard = verified.groupby("shard", num_partitions=min(shards, 1000))
            results = by_shard.map_groups(work.write, batch_format="pyarrow")
        written = [pickle.loads(row["written"]) for row in results.take_all()]
    return sorted(written, key=lambda w: w.number)


def _cut(table: pa.Table, starts: np.ndarray) -> Iterator[pa.Table]:
    for start, stop in pairwise([*starts.tolist(), len(table)]):
        yield table.slice(start, stop - start)


@contextmanager
def _progress(tally: Any, rows: int, shards: int) -> Iterator[None]:
    """A live line while the body runs; without a terminal, a plain line every ten seconds."""
    import ray

    terminal = sys.stdout.isatty()
    columns = (TextColumn("verify"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    stop = threading.Event()

    def show(bar: Progress, task: TaskID) -> None:
        done, refused, written = ray.get(tally.totals.remote())
        text = f"{refused:,} refused, {written:,}/{shards:,} shards"
        bar.update(task, completed=done, description=text)
        if not terminal:
            print(f"verified {done:,}/{rows:,} rows, {text}", flush=True)

    def watch(bar: Progress, task: TaskID) -> None:
        while not stop.wait(0.5 if terminal else 10):
            show(bar, task)

    with Progress(*columns, TimeRemainingColumn(), disable=not terminal) as bar:
        task = bar.add_task("", total=rows)
        thread = threading.Thread(target=watch, args=(bar, task), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        show(bar, task)


@contextmanager
def _explained(tally: Any) -> Iterator[None]:
    """A task's failure as what it told the tally, a mistake or a storage that failed; any other keeps its traceback."""
    import ray

    try:
        yield
    except ray.exceptions.RayError:
        if told := ray.get(tally.failure.remote()):
            raise told from None
        raise


if __name__ == "__main__":
    sys.exit(cli.guard(main))
