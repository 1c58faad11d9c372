"""The cluster's part of an ingest: Ray Data over units, row groups and shards, with a live line for both passes."""

import logging
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import pyarrow as pa
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from msclip.data.sources import Unit
from msclip.s3_requests import repeated
from pipelines.ingest_tasks import KNOWN, PREPARED, Known, Place, Tally, Work, Written


class Cluster:
    """Runs what `Work` can do, as many at a time as the cluster has CPUs; inside a Ray session."""

    def __init__(self, work: Work, units: list[Unit]):
        import ray
        import ray.data

        self.units = units
        self.tally: Any = ray.remote(num_cpus=0)(Tally).remote()
        self.work = replace(work, tally=self.tally)
        self.context = ray.data.DataContext.get_current().copy()
        self.context.enable_progress_bars = self.context.print_on_execution_start = False  # ours counts what was refused
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come as exceptions

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import ray

        if count := ray.get(self.tally.repeat.remote(repeated.take())):
            print(f"the storage failed {count:,} requests, which were repeated", flush=True)
        ray.kill(self.tally)

    def prepare(self) -> pa.Table:
        """Every row of the input as `PREPARED`, in the input's order."""
        counts = [unit.rows for unit in self.units]
        total = sum(rows for rows in counts if rows is not None) if None not in counts else None
        with self._progress("read", total, 0):
            tables = list(self._map(self.work.prepare, enumerate(self.units)))
        return pa.concat_tables([PREPARED.empty_table(), *tables]).sort_by([("unit", "ascending"), ("item", "ascending")])

    def hash_known(self, known: list[Known]) -> pa.Table:
        """The hashes of row groups as `KNOWN`, in their order."""
        tables = self._map(self.work.hash_known, enumerate(known)) if known else ()
        return pa.concat_tables([KNOWN.empty_table(), *sorted(tables, key=lambda table: table["unit"][0].as_py())])

    def write(self, shards: Iterable[list[list[Place]]]) -> list[Written]:
        """Writes shards; what became of each, in order."""
        work = list(enumerate(shards))
        with self._progress("write", sum(len(places) for _, places in work), 2):
            tables = list(self._map(self.work.write, work))
        return sorted((pickle.loads(table["written"][0].as_py()) for table in tables), key=lambda written: written.number)

    def rewrite(self) -> None:
        """Before shards are written another time."""
        import ray

        ray.get(self.tally.rewrite.remote())

    def _map(self, task: Callable[[pa.Table], pa.Table], work: Iterable[tuple[int, Any]]) -> Iterator[pa.Table]:
        """What a task makes of each piece of work, as it gets done."""
        import ray
        import ray.data

        with ray.data.DataContext.current(self.context), self._explained():
            blocks = ray.data.from_arrow([pa.table({"work": [pickle.dumps(piece)]}) for piece in work])
            done = blocks.map_batches(task, batch_size=None, batch_format="pyarrow")
            for table in done.iter_batches(batch_size=None, batch_format="pyarrow"):
                if len(table):
                    yield table

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A task's failure as what it told the tally, a mistake or a storage that failed; any other keeps its traceback."""
        import ray

        try:
            yield
        except ray.exceptions.RayError:
            if told := ray.get(self.tally.failure.remote()):
                raise told from None
            raise

    @contextmanager
    def _progress(self, verb: str, total: int | None, counted: int) -> Iterator[None]:
        """A live line while the body runs; without a terminal, a plain line every ten seconds.

        Args:
            total: rows to come; None where nobody knows.
            counted: which of the tally's totals is the progress.
        """
        import ray

        terminal = sys.stdout.isatty()
        columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        stop = threading.Event()
        of = f"/{total:,}" if total is not None else ""

        def show() -> None:
            totals = ray.get(self.tally.totals.remote())
            bar.update(task, completed=totals[counted], description=f"{totals[1]:,} refused")
            if not terminal:
                print(f"{verb} {totals[counted]:,}{of} rows, {totals[1]:,} refused", flush=True)

        def watch() -> None:
            while not stop.wait(0.5 if terminal else 10):
                show()

        with Progress(*columns, TimeRemainingColumn(), disable=not terminal) as bar:
            task = bar.add_task("", total=total)
            thread = threading.Thread(target=watch, daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
            show()
