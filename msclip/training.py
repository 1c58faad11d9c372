"""The training loop, and the protocol of whoever runs it.

Fetch, step, report. The loop knows neither Ray nor DeepSpeed: a `Run` says who and where this process is, an `Engine` does a
step, and batches come ready from a loader that has already proved them to be the plan's.
"""

import json
import math
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from msclip import kernels
from msclip.data.loader import BadRow, Batch, Batches, Waits
from msclip.distributed import all_gather_objects, any_rank, first_ranks_object
from msclip.engine import Engine, MicroBatch, Prepared, read_metrics
from msclip.errors import UserError
from msclip.metrics_log import MetricsLog
from msclip.quarantine import Quarantine
from msclip.s3_requests import repeated
from msclip.storage import Folder
from msclip.timing import more_processes, take_measured
from msclip.tokens import pack

WAITING = "waiting.json"


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how exactly to train."""

    global_batch: int = 4096
    """Pairs of one optimiser step over all workers; every pair is every other's negative."""
    epochs: float | None = 32
    """Passes over the data, where `steps` is null; the paper's configs hint at 32."""
    steps: int | None = None
    """Optimiser steps; null to count in epochs."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the encoders; parameters, loss and optimiser are always float32."""
    zero_stage: Literal[0, 1, 2, 3] | None = 1
    """What DeepSpeed ZeRO spreads over the workers: 0 nothing, 1 optimiser, 2 gradients too, 3 parameters too; null for
    plain PyTorch, which also serves a single worker. On the GPUs of one machine 0 is the fastest; between machines 1 sends
    gradients during the backward pass."""
    compiled: bool | None = None
    """Whether torch.compile makes the model faster, for about a minute's wait at the start. Null: yes on GPUs from Ampere on
    where there is a C compiler with Python's header files."""
    save_memory: bool = False
    """Of a compiled model: compute again in the backward pass, instead of keeping, what takes no matrix product. See also
    `model.checkpoint_blocks`."""
    seed: int = 0
    """Of weights, sample order, augmentation and dropout."""
    log_every_steps: int = 10
    """How often metrics are written."""

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None:
            raise UserError("training needs training.epochs or training.steps, got null for both")
        # A batch of one has no negatives: its loss is zero whatever the model.
        for name, least in (("global_batch", 2), ("log_every_steps", 1), ("seed", 0), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"training.{name} must be at least {least}, got {value}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserError(f"training.epochs must be positive, got {self.epochs}")
        if self.save_memory and self.compiled is False:
            raise UserError(
                "training.save_memory is for a compiled model: training.compiled must be true or null, got false. For any "
                "model there is model.checkpoint_blocks"
            )

    def compiles(self, device: torch.device) -> bool:
        """Whether this device's part of the training is compiled.

        Raises:
            UserError: it is to be, and this machine's GPUs lack what that takes.
        """
        if self.compiled and device.type == "cuda" and not kernels.BUILDABLE:
            raise UserError(
                "training.compiled true needs a C compiler (gcc, clang, or what CC names) with Python's header files on every "
                f"machine that trains on GPUs, and {socket.gethostname()} lacks one or the other. Install them, on Debian as "
                "gcc and python3-dev, or set training.compiled to null"
            )
        return kernels.usable(device) if self.compiled is None else self.compiled

    def total_steps(self, rows: int) -> int:
        """Steps of the whole run over `rows` pairs an epoch."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * rows / self.global_batch))


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how long they are kept; the last step always writes one."""

    every_steps: int | None = 1000
    """Steps between two checkpoints; null to count in minutes alone."""
    every_minutes: float | None = 30
    """Minutes between two checkpoints; null to count in steps alone."""
    keep: int | None = None
    """How many of the newest to keep; null for all, since each is evaluated."""
    keep_optimizer: int = 2
    """How many of the newest keep their optimiser state (two thirds of the bytes), which only resuming needs."""

    def __post_init__(self) -> None:
        if self.every_steps is None and self.every_minutes is None:
            raise UserError("checkpoint needs checkpoint.every_steps or checkpoint.every_minutes, got null for both")
        for name in ("every_steps", "every_minutes", "keep", "keep_optimizer"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"checkpoint.{name} must be positive, got {value}")


class Run(Protocol):
    """Who this process is among the workers, and where the run keeps its files."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def folder(self) -> Folder: ...


@dataclass(frozen=True)
class LocalRun:
    """A run of this process alone: a laptop, a notebook, a test."""

    folder: Folder
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1


def micro_batches(batch: Batch, count: int) -> Sequence[MicroBatch]:
    """Splits a worker's share into `count` equal parts and packs their captions."""
    rows = len(batch.pixels) // count
    parts = zip(batch.pixels.split(rows), batch.token_ids.split(rows), strict=True)
    return [MicroBatch(pixels, pack(token_ids)) for pixels, token_ids in parts]


def prepared_ahead(engine: Engine, batches: Iterable[Batch], accumulation_steps: int) -> Iterator[tuple[Batch, Prepared]]:
    """Each batch on its way to the device, one step before it is needed.

    An error instead of a batch comes after the step before it, which may be one that writes a checkpoint.
    """
    last: tuple[Batch, Prepared] | None = None
    try:
        for batch in batches:
            this = batch, engine.prepare(micro_batches(batch, accumulation_steps))
            if last:
                yield last
            last = this
    except Exception:
        if last:
            yield last
        raise
    if last:
        yield last


def train(
    run: Run,
    engine: Engine,
    batches: Iterable[Batch],
    *,
    start_step: int,
    total_steps: int,
    config: TrainingConfig,
    checkpoints: CheckpointConfig,
    save: Callable[[int], None],
    accumulation_steps: int = 1,
    max_bad_fraction: float = 0.05,
    passes: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> dict[str, Any]:
    """Trains from `start_step` to `total_steps` and returns the last record.

    Every worker calls this with its own batches. Steps are numbered from 1 in what is reported: a checkpoint of step k has
    seen k global batches. A record's `batch` is a checksum of the global batch's row ids, whatever the number of workers.

    Args:
        save: called on every worker after the step it is given; writes a checkpoint.
        passes: how often a step has seen each source, by name, where they differ.

    Raises:
        TrainingError: on every worker at the same step, when the loss is not finite, too many rows are bad, or a checkpoint
            could not be written.
    """
    reporter = Reporter(run, config.global_batch, max_bad_fraction, start_step)
    record: dict[str, Any] = {}
    step, saved_at = start_step, time.monotonic()
    try:
        for step, (batch, prepared) in enumerate(
            prepared_ahead(engine, reporter.timed(batches), accumulation_steps), start_step + 1
        ):
            metrics = engine.train_step(prepared)
            reporter.count(batch)
            due = step == total_steps or (checkpoints.every_steps is not None and step % checkpoints.every_steps == 0)
            if due or step % config.log_every_steps == 0:
                engine.settle()  # before: a step that failed has no record
                record = reporter.report(step, batch, metrics, passes(step))
                late = checkpoints.every_minutes is not None and time.monotonic() - saved_at > 60 * checkpoints.every_minutes
                if first_ranks_object(due or late):
                    reporter.flush()  # before: whoever goes on from the checkpoint finds its records
                    save(step)
                    saved_at = time.monotonic()
                reporter.restart()
    finally:
        if isinstance(batches, Batches):
            batches.close()
        reporter.close()
    assert step == total_steps, f"the batches ended at step {step} of {total_steps}"
    return record


class Reporter:
    """Turns what the workers did since the last report into one record, and bad rows into the run's quarantine.

    Collective: all workers report at the same steps; rank 0 writes.
    """

    def __init__(self, run: Run, global_batch: int, max_bad_fraction: float, start_step: int):
        self.run, self.global_batch = run, global_batch
        self.log = MetricsLog(run.folder, start_step + 1) if run.rank == 0 else None
        self.quarantine = Quarantine(run.folder, max_bad_fraction, writes=run.rank == 0)
        self.bad_rows = int(self.log.last.get("train/bad_rows", 0)) if self.log else 0
        self.retries = int(self.log.last.get("train/storage_retries", 0)) if self.log else 0
        self.processes = self.remote_processes = 0
        self.restart()

    def restart(self) -> None:
        """Begins a new stretch of steps, from now."""
        self.started, self.steps = time.perf_counter(), 0
        self.waits, self.measured = Waits(), Counter[str]()
        take_measured()  # a checkpoint's exchanges are no step's
        self.bad: list[tuple[int, BadRow]] = []

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with what they were waited for counted. An error of one worker's batches is raised on all."""
        iterator = iter(batches)
        if isinstance(batches, Batches):
            self.processes, batches.on_wait = batches.processes, self.say_waiting
        while True:
            began, before = time.perf_counter(), batches.waits if isinstance(batches, Batches) else Waits()
            batch, error = None, None
            try:
                batch = next(iterator, None)
            except Exception as raised:
                error = raised
            waited = batches.waits - before if isinstance(batches, Batches) else Waits(queue=time.perf_counter() - began)
            self.waits += waited
            self.remote_processes = batches.remote_processes if isinstance(batches, Batches) else 0
            # Else the others would wait for this worker in their next exchange.
            if any_rank(error is not None):
                raise next(e for e in all_gather_objects(error) if e is not None)
            if batch is None:
                return
            yield batch

    def say_waiting(self, seconds: float, what: str) -> None:
        """Tells the driver, through the run's folder, why there is no step."""
        text = f"worker {self.run.rank} has waited {seconds:.0f} s for data: {what}"
        self.run.folder.write_text(WAITING, json.dumps({"time": time.time(), "text": text}))

    def count(self, batch: Batch) -> None:
        """One more step, made with `batch`."""
        self.steps += 1
        self.measured.update(take_measured())
        self.bad += ((batch.step + 1, row) for row in batch.bad)

    def report(
        self, step: int, batch: Batch, metrics: Mapping[str, Tensor | float], passes: Mapping[str, float]
    ) -> dict[str, Any]:
        """The record of the steps since `restart`; its times are those of the worker that waited longest for data.

        Raises:
            TrainingError: more rows were bad than the run allows.
        """
        elapsed = time.perf_counter() - self.started
        mine = {
            "bad": self.bad,
            "times": self.times(elapsed),
            "rows": batch.rows,
            "bad_rows": self.bad_rows,
            "processes": self.processes,
            "remote": self.remote_processes,
            "retries": (self.retries, repeated.take()),
        }
        reports = all_gather_objects(mine)
        bad = [row for report in reports for row in report["bad"]]
        # Rank 0 alone knows of the rows before a resumption.
        self.bad_rows = reports[0]["bad_rows"] + len(bad)
        self.retries = reports[0]["retries"][0] + sum(report["retries"][1] for report in reports)
        times = max((report["times"] for report in reports), key=lambda each: sum(each[name] for name in Waits._fields))
        waited = sum(times[name] for name in Waits._fields) / elapsed
        processes, remote = (sum(report[kind] for report in reports) for kind in ("processes", "remote"))
        record = {
            "step": step,
            "epoch": float(batch.epoch),
            "time": time.time(),
            "batch": f"{zlib.crc32(b''.join(report['rows'].tobytes() for report in reports)):08x}",
            **read_metrics(metrics),
            "train/pairs_per_second": self.steps * self.global_batch / elapsed,
            "train/data_wait": waited,
            **{f"train/{part}_seconds": seconds / self.steps for part, seconds in times.items()},
            "train/decode_processes": processes,
            "train/remote_decode_processes": remote,
            "train/decode_processes_lacking": more_processes(processes + remote, times["decode"] / elapsed),
            "train/bad_rows": self.bad_rows,
            **{f"epoch/{name}": done for name, done in passes.items()},
            "train/storage_retries": self.retries,
        }
        if self.log:
            self.log.write(record)
        self.quarantine.add(bad, self.steps * self.global_batch)
        return record

    def times(self, elapsed: float) -> dict[str, float]:
        """Seconds that this worker spent on each part of the steps since `restart`."""
        known = self.waits._asdict() | dict(self.measured)
        return known | {"compute": max(0.0, elapsed - sum(known.values()))}

    def flush(self) -> None:
        """Makes the log and the quarantine visible to others."""
        self.quarantine.write()
        if self.log:
            self.log.flush()

    def close(self) -> None:
        """Ends the log and the quarantine."""
        self.quarantine.write()
        if self.log:
            self.log.close()


def agree(action: Callable[[], Any]) -> Any:
    """Runs `action` on every worker; if it ends in a `UserError` on any, the same error is raised on all.

    Without this a worker that fails alone would leave the others waiting in their next exchange.
    """
    error: UserError | None = None
    result = None
    try:
        result = action()
    except UserError as raised:
        error = raised
    first = next((e for e in all_gather_objects(error) if e is not None), None)
    if first is not None:
        raise first
    return result
