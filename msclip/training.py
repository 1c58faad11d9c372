"""The training loop, and the protocol of whoever runs it.

Fetch, step, report. The loop knows neither Ray nor DeepSpeed: a `Run` says who and where this process is, an `Engine` does a
step, and batches come ready from a loader that has already proved them to be the plan's.
"""

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from msclip.data.loader import BadRow, Batch, Batches
from msclip.distributed import all_gather_objects
from msclip.engine import Engine, MicroBatch, read_metrics
from msclip.errors import TrainingError, UserError
from msclip.metrics_log import MetricsLog
from msclip.storage import Folder
from msclip.tokens import pack


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how exactly to train."""

    global_batch: int = 4096
    """Pairs of one optimiser step over all workers; every pair is every other's negative."""
    epochs: float | None = 32
    """Passes over the data; the paper's configs hint at 32. Ignored where `steps` is given, so give one of the two."""
    steps: int | None = None
    """Optimiser steps; null to count in epochs."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the encoders; parameters, loss and optimiser are always float32."""
    zero_stage: Literal[0, 1, 2, 3] | None = 1
    """What DeepSpeed ZeRO spreads over the workers: 0 nothing, 1 optimiser, 2 gradients too, 3 parameters too; null for
    plain PyTorch."""
    seed: int = 0
    """Of weights, sample order, augmentation and dropout."""
    log_every_steps: int = 10
    """How often metrics are written."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UserError(
                "training needs exactly one of training.epochs and training.steps (set the other to null), "
                f"got {self.epochs} and {self.steps}"
            )
        for name in ("global_batch", "log_every_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        if (self.steps is not None and self.steps < 1) or (self.epochs is not None and self.epochs <= 0):
            raise UserError(f"training.steps and training.epochs must be positive, got {self.steps} and {self.epochs}")

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


@dataclass
class Progress:
    """What has happened since the last report, of this worker."""

    started: float
    waited: float = 0.0
    steps: int = 0
    bad: list[BadRow] = field(default_factory=list)


def micro_batches(batch: Batch, count: int) -> Sequence[MicroBatch]:
    """Splits a worker's share into `count` equal parts and packs their captions."""
    rows = len(batch.pixels) // count
    parts = zip(batch.pixels.split(rows), batch.token_ids.split(rows), strict=True)
    return [MicroBatch(pixels, pack(token_ids)) for pixels, token_ids in parts]


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
    max_bad_fraction: float = 0.01,
) -> dict[str, Any]:
    """Trains from `start_step` to `total_steps` and returns the last metrics.

    Every worker calls this with its own batches. Steps are numbered from 1 in what is reported: a checkpoint of step k has
    seen k global batches. A record's `batch` is a checksum of the global batch's row ids, whatever the number of workers.

    Args:
        save: called on every worker after the step it is given; writes a checkpoint.

    Raises:
        TrainingError: on every worker at the same step, when the loss is not finite, too many rows are bad, or a checkpoint
            could not be written.
    """
    log = MetricsLog(run.folder, start_step + 1) if run.rank == 0 else None
    bad_rows = int(log.last.get("train/bad_rows", 0)) if log else 0
    seen_rows = start_step * config.global_batch
    saved_at, record = time.monotonic(), dict[str, Any]()
    window = Progress(time.perf_counter())
    iterator = iter(batches)
    try:
        for step in range(start_step + 1, total_steps + 1):
            fetching = time.perf_counter()
            batch = next(iterator)
            window.waited += time.perf_counter() - fetching
            assert batch.step == step - 1, f"batch {batch.step} came where {step - 1} was due"
            metrics = engine.train_step(micro_batches(batch, accumulation_steps))
            window.steps += 1
            window.bad += batch.bad
            last = step == total_steps
            due = last or (checkpoints.every_steps is not None and step % checkpoints.every_steps == 0)
            if last or due or step % config.log_every_steps == 0:
                elapsed = time.perf_counter() - window.started
                every_minutes = checkpoints.every_minutes
                late = every_minutes is not None and time.monotonic() - saved_at > 60 * every_minutes
                reports = all_gather_objects({"bad": window.bad, "waited": window.waited, "late": late, "rows": batch.rows})
                bad = [row for report in reports for row in report["bad"]]
                bad_rows, seen_rows = bad_rows + len(bad), seen_rows + window.steps * config.global_batch
                record = {
                    "step": step,
                    "epoch": float(batch.epoch),
                    "time": time.time(),
                    "batch": f"{zlib.crc32(b''.join(report['rows'].tobytes() for report in reports)):08x}",
                    **read_metrics(metrics),
                    "train/pairs_per_second": window.steps * config.global_batch / elapsed,
                    "train/data_wait": max(report["waited"] for report in reports) / elapsed,
                    "train/bad_rows": bad_rows,
                }
                if log:
                    _quarantine(run.folder, bad)
                    log.write(record)
                _stop_if_too_bad(run, bad_rows, seen_rows, max_bad_fraction, bad)
                if due or reports[0]["late"]:
                    save(step)
                    saved_at = time.monotonic()
                    if log:
                        log.flush()
                window = Progress(time.perf_counter())
    finally:
        if isinstance(batches, Batches):
            batches.close()
        if log:
            log.__exit__(None, None, None)
    return record


def _stop_if_too_bad(run: Run, bad_rows: int, seen_rows: int, limit: float, bad: list[BadRow]) -> None:
    # Rank 0 alone remembers the rows of earlier attempts, so its count decides for all.
    bad_rows = all_gather_objects(bad_rows)[0]
    if bad_rows > max(1.0, limit * seen_rows):
        worst = max({row.shard for row in bad}, key=lambda s: sum(row.shard == s for row in bad), default="(earlier)")
        raise TrainingError(
            f"{bad_rows} of {seen_rows} rows so far could not be used, more than data.max_bad_fraction {limit} allows; most "
            f"of the latest are in {worst}. {run.folder.url}/quarantine.jsonl lists each with its reason. Repair or remove "
            "them, or raise the limit, and continue with --resume"
        )


def _quarantined(folder: Folder) -> list[str]:
    return folder.read_text("quarantine.jsonl").splitlines() if folder.exists("quarantine.jsonl") else []


def _quarantine(folder: Folder, bad: list[BadRow]) -> None:
    if not bad:
        return
    known = _quarantined(folder)
    new = [line for line in dict.fromkeys(row.to_json() for row in bad) if line not in set(known)]
    folder.write_text("quarantine.jsonl", "\n".join([*known, *new]) + "\n")


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
