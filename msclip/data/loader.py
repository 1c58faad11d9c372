"""Batches of training pairs: decoded units put together into exactly what the plan says, or an error.

Whoever decodes (this process, or Ray Data on a cluster) hands over units in the plan's order. Every unit and every batch is
compared with the plan, row id by row id: a loader that loses, repeats or swaps rows stops the job instead of training on
something else.

Memory of a rank: one decoded unit for each lane in its slice of the batch, with the plan's defaults at most 16 of the rank's
batches (512 pairs at 224 pixels: 16 * 74 MiB), and `prefetch` + 1 finished batches.
"""

import contextlib
import itertools
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from msclip.data.decode import BadRow, Decoded, decode_unit, local_units
from msclip.data.images import Augment
from msclip.data.plan import Plan, Unit
from msclip.errors import UserError

__all__ = ["BadRow", "Batch", "Batches", "DataConfig", "Decoded", "assemble", "decode_unit", "local_units"]


@dataclass(frozen=True)
class DataConfig:
    """Which pairs to train on, in what order, and how they are decoded."""

    train: str = ""
    """A folder of shards from `pipelines.ingest`, or a Parquet file, a glob or a folder of files; local or a URL."""
    image_column: str = "image"
    """The column of encoded images: binary, or struct{bytes, path} as Hugging Face writes it."""
    caption_column: str = "captions"
    """The column of captions: string, or list of string, of which consecutive epochs take different ones."""
    lanes: int | None = None
    """Places far apart in the shuffled data that every batch draws from; part of the sample order. Null: a power of two, at
    most one for 16 pairs of global_batch, fewer for small data. More mix better and take more memory."""
    window: int | None = None
    """Row groups of a lane whose rows are shuffled together; part of the sample order. Null: all for up to 32,768 pairs, else
    1. More mix better where neighbours in the shards are alike; every row group is then read up to this many times."""
    augment: Augment = field(default_factory=Augment)
    """How training images are varied."""
    max_bad_fraction: float = 0.01
    """Training stops when more than this share of the rows read so far could not be used; the first thousand may have as many
    as a thousand."""
    decode_cpus: float = 1.0
    """Logical CPUs that one decoding task occupies. Workers that train hold CPUs too; at least this many must be left."""
    prefetch: int = 2
    """Finished batches that wait for the training step, on each worker."""

    def __post_init__(self) -> None:
        for name in ("lanes", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1 or null, got {value}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction must be from 0 to 1, got {self.max_bad_fraction}")
        if self.decode_cpus <= 0:
            raise UserError(f"data.decode_cpus must be positive, got {self.decode_cpus}")
        if self.prefetch < 1:
            raise UserError(f"data.prefetch must be at least 1, got {self.prefetch}")


@dataclass(frozen=True, eq=False)
class Batch:
    """A rank's share of one global batch."""

    step: int
    """From 0: the batch that optimiser step `step` + 1 trains on."""
    epoch: float
    """Passes over the data that this batch completes."""
    rows: Int64[np.ndarray, " batch"]
    """Row ids, as `Plan.share` gives them."""
    pixels: UInt8[Tensor, "batch size size 3"]
    token_ids: Int64[Tensor, "batch context"]
    bad: list[BadRow]
    """Rows replaced in the units that were opened for this batch: each once an epoch, perhaps before its own batch."""
    opened: int
    """Rows of those units, of which `bad` is a part."""


def assemble(
    plan: Plan,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int | None,
    units: Iterable[Decoded],
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches start_step to stop_step of a rank out of its decoded units, which must come as `Plan.units` lists them.

    Raises:
        RuntimeError: a unit is missing, another one came in its place, or one is left over.
    """
    lanes = [(lane, last - first) for lane, first, last in plan.columns(rank, world_size)]
    held: dict[int, deque[_Open]] = {lane: deque() for lane, _ in lanes}
    arriving = iter(units)
    expected = plan.units(rank, world_size, start_step, stop_step)
    upcoming = next(expected, None)
    for step in itertools.count(start_step):
        if step == stop_step:
            break
        bad: list[BadRow] = []
        opened = 0
        while upcoming is not None and upcoming.first_step <= step:
            decoded = next(arriving, None)
            _check(decoded, upcoming)
            assert decoded is not None
            held[upcoming.lane].append(_Open(decoded))
            bad += decoded.bad
            opened += len(decoded.row)
            upcoming = next(expected, None)
        yield _batch(plan, rank, world_size, step, lanes, held, bad, opened, pin_memory)
    extra = next(arriving, None)
    if extra is not None:
        raise RuntimeError(f"the data stream holds a unit after the last of step {stop_step}: rows {_short(extra.row)}")


@dataclass
class _Open:
    """A unit of which the first `used` rows are in earlier batches."""

    unit: Decoded
    used: int = 0


def _check(decoded: Decoded | None, unit: Unit) -> None:
    if decoded is None:
        raise RuntimeError(f"the data stream ended before {unit}")
    if decoded.epoch != unit.epoch or not np.array_equal(decoded.row, unit.row):
        raise RuntimeError(
            f"the data stream brought rows {_short(decoded.row)} of epoch {decoded.epoch} where the plan has {unit} with rows "
            f"{_short(unit.row)}"
        )
    if not len(decoded.pixels) == len(decoded.token_ids) == len(unit.row):
        raise RuntimeError(
            f"the data stream brought {len(decoded.pixels)} images and {len(decoded.token_ids)} captions for the "
            f"{len(unit.row)} rows of {unit}"
        )


def _short(rows: np.ndarray) -> str:
    return f"{rows[:4].tolist()}{'...' if len(rows) > 4 else ''} ({len(rows)})"


def _batch(
    plan: Plan,
    rank: int,
    world_size: int,
    step: int,
    lanes: list[tuple[int, int]],
    held: dict[int, deque[_Open]],
    bad: list[BadRow],
    opened: int,
    pin_memory: bool,
) -> Batch:
    planned = plan.share(step, rank, world_size)
    sample = next(units[0].unit for units in held.values() if units)
    count = len(planned.row)
    rows = np.empty(count, dtype=np.int64)
    # Pinned memory comes from PyTorch's cache, which gives a block out again only when its copy to the GPU is done.
    pixels = torch.empty((count, *sample.pixels.shape[1:]), dtype=torch.uint8, pin_memory=pin_memory)
    token_ids = torch.empty((count, sample.token_ids.shape[1]), dtype=torch.int64, pin_memory=pin_memory)
    into = rows, pixels.numpy(), token_ids.numpy()
    at = 0
    for lane, width in lanes:
        until = at + width
        while at < until:
            first = held[lane][0]
            part = slice(first.used, first.used + until - at)
            taken = len(first.unit.row[part])
            for target, source in zip(into, (first.unit.row, first.unit.pixels, first.unit.token_ids), strict=True):
                target[at : at + taken] = source[part]
            at, first.used = at + taken, first.used + taken
            if first.used == len(first.unit.row):
                held[lane].popleft()
    if not np.array_equal(rows, planned.row):
        raise RuntimeError(f"batch {step} of rank {rank} has rows {_short(rows)} where the plan has {_short(planned.row)}")
    return Batch(step, plan.epoch(step + 1), rows, pixels, token_ids, bad, opened)


_Queue = queue.Queue[Batch | BaseException | None]


class Batches:
    """`assemble` in a background thread, `prefetch` batches ahead.

    An iterator. Errors of the units or their decoding are raised where the batch would have come. `close` it when stopping
    early; at interpreter exit it closes itself.

    Args:
        stop_step: `None` for a stream without end.
        units: what `assemble` takes; a generator is closed together with the batches.
        pin_memory: put batches where a GPU can copy them from without waiting.
    """

    wait_seconds: float
    """Time spent in `next` so far, waiting for data: over the run's time, the share that more decoding CPUs would win."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        world_size: int,
        start_step: int,
        stop_step: int | None,
        units: Iterable[Decoded],
        *,
        pin_memory: bool = False,
        prefetch: int = 2,
    ):
        self.wait_seconds = 0.0
        self._ready: _Queue = queue.Queue(prefetch)
        self._done = False
        stop = threading.Event()
        source = assemble(plan, rank, world_size, start_step, stop_step, units, pin_memory)
        # Neither the thread nor the finalizer knows self, so a forgotten loader is collected and its thread ends.
        thread = threading.Thread(target=_produce, args=(source, units, self._ready, stop), name="batches", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, thread, self._ready, stop)
        thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._done:
            raise StopIteration
        began = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(item, Batch):
            return item
        self.close()
        raise StopIteration if item is None else item

    def close(self) -> None:
        """Ends the stream; waits until the unit being read has come, at most 10 s."""
        self._done = True
        self._finalizer()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(source: Iterator[Batch], units: Iterable[Decoded], ready: _Queue, stop: threading.Event) -> None:
    end: BaseException | None = None
    try:
        for batch in source:
            ready.put(batch)
            if stop.is_set():
                break
    except BaseException as error:
        end = error
    # Only the thread that runs a generator may close it.
    close = getattr(units, "close", None)
    if close:
        close()
    ready.put(end)


def _stop(thread: threading.Thread, ready: _Queue, stop: threading.Event) -> None:
    stop.set()
    deadline = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):  # makes room, so that a thread in `put` goes on and sees `stop`
            while True:
                ready.get_nowait()
        thread.join(0.05)
