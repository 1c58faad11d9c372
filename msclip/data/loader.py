"""Batches of training pairs: what was read is decoded straight into its place in the batch, exactly as the plan says.

Whoever reads (this process, or Ray Data on a cluster) hands over image files and captions, unit by unit in the plan's order.
Every unit and every batch is compared with the plan, row id by row id: a loader that loses, repeats or swaps rows stops the
job instead of training on something else. Image files wait, a tenth of their pixels in size, until their batch is decoded.

Memory of a rank: files of one unit for each lane in its slice of the batch, with the plan's defaults at most 16 of the rank's
batches (512 pairs at 224 pixels: 16 * 6 MB), and the pixels of `prefetch` + 4 batches (74 MiB each): those that are ready,
the one that is trained on, the next, and two that are being filled.
"""

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from msclip.data.assembly import check_rows, pieces_of_batches, works_of_batch
from msclip.data.decode import BadRow, Encoded, Recipe, Replaced
from msclip.data.helpers import Crew, Helper, Helpers, Queue
from msclip.data.images import Augment
from msclip.data.mixture import Sources
from msclip.data.plan import Plan
from msclip.data.pool import Decoder, Inline, Layout, Pool, Work
from msclip.errors import UserError

__all__ = ["BadRow", "Batch", "Batches", "DataConfig", "Waits"]

WORK_ROWS = 64
"""Most rows decoded together: 20 ms to a second of work, next to 0.1 ms to hand it over."""
PATIENCE_SECONDS = 5.0
_WAITING = 2
"""Pieces of work that wait for each decoder when the next batch's files are fetched. More files would only be more memory,
which at the start of a run takes the cores from those who decode: to touch it for the first time costs as much as reading."""
_FILLING = 2
"""Batches that decoders work on, beside those that are ready."""
_LENT = 2
"""Batches in the loop's hands: that of the running step, and the next, on its way to the GPU."""


@dataclass(frozen=True)
class DataConfig:
    """Which pairs to train on, in what order, and how they are decoded."""

    train: Sources = ""
    """A folder of shards from `pipelines.ingest`, or a Parquet file, a glob or a folder of files; local or a URL. A list of
    those for all their pairs together. Or sources by name, `{photos: {path: ..., weight: 2}, drawings: {path: ..., weight:
    1}}`: with weights every batch has that part of each, and small ones repeat."""
    resample: bool = False
    """Draw row groups with replacement, sources by their weights: right in the long run for the smallest weight, but no batch
    has a fixed part of each source, and no epoch has every pair. False: fixed parts, every pair once in its source's epochs."""
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
    max_bad_fraction: float = 0.05
    """Training stops when more than this share of the rows read so far could not be used; the first thousand may have as many
    as a thousand."""
    skip_quarantined: str | None = None
    """The folder of an earlier run: the rows that it could not use are left out from the start. Null: they are met again."""
    decode_processes: int | None = None
    """Processes that decode beside each training worker; null for one a core of its node, shared among the node's workers.
    They take what time training leaves."""
    remote_decode_processes: int | None = None
    """Most processes on nodes without training workers that decode for each worker, while its own keep training waiting; null
    for what CPUs those nodes have, 0 for none."""
    prefetch: int = 2
    """Finished batches that wait for the training step, on each worker."""

    def __post_init__(self) -> None:
        for name in ("lanes", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1 or null, got {value}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction must be from 0 to 1, got {self.max_bad_fraction}")
        if self.decode_processes is not None and self.decode_processes < 1:
            raise UserError(f"data.decode_processes must be at least 1 or null, got {self.decode_processes}")
        if self.remote_decode_processes is not None and self.remote_decode_processes < 0:
            raise UserError(f"data.remote_decode_processes must be at least 0 or null, got {self.remote_decode_processes}")
        if self.prefetch < 1:
            raise UserError(f"data.prefetch must be at least 1, got {self.prefetch}")


@dataclass(frozen=True, eq=False)
class Batch:
    """A rank's share of one global batch. Its tensors are overwritten after the next batch has been asked for."""

    step: int
    """From 0: the batch that optimiser step `step` + 1 trains on."""
    epoch: float
    """Passes over the data that this batch completes."""
    rows: Int64[np.ndarray, " batch"]
    """Row ids, as `Plan.share` gives them."""
    pixels: UInt8[Tensor, "batch size size 3"]
    token_ids: Int64[Tensor, "batch context"]
    bad: list[BadRow]
    """Rows of this batch in whose place others stand."""


class Waits(NamedTuple):
    """Seconds for which the loop waited for batches, by what a batch lacked."""

    storage: float = 0.0
    """Its image files had not come: storage, network, or no CPU to read with."""
    decode: float = 0.0
    """The files had come and were not decoded."""
    queue: float = 0.0
    """It was ready and had to be handed over."""

    def __add__(self, other: "Waits") -> "Waits":  # type: ignore[override]
        return Waits(*(mine + others for mine, others in zip(self, other, strict=True)))

    def __sub__(self, other: "Waits") -> "Waits":
        return Waits(*(mine - others for mine, others in zip(self, other, strict=True)))


class _Filling:
    """A batch that is being decoded."""

    def __init__(self, batch: Batch, slot: int, parts: int):
        self.batch, self.slot, self.left = batch, slot, parts
        self.fed_at = self.done_at = time.perf_counter()
        self.error: BaseException | None = None
        self.done, self._lock = threading.Event(), threading.Lock()

    def finish(self, result: list[Replaced] | BaseException) -> bool:
        """Counts one part; returns whether it was the last."""
        with self._lock:
            if isinstance(result, BaseException):
                self.error = result
            else:
                self.batch.bad.extend(replaced.bad for replaced in result)
            self.left -= 1
            if self.left == 0 or self.error:
                self.batch.bad.sort(key=lambda row: (row.shard, row.row_group, row.row))  # not by who was done first
                self.done_at = time.perf_counter()
                self.done.set()
            return self.left == 0


class _Pipeline:
    """What the threads of `Batches` share. It does not know `Batches`, so a forgotten one is collected and stops them."""

    def __init__(self, slots: int, prefetch: int):
        self.free: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        """Slots of the memory, each with the event after which it may be written, if any; `None` at the end."""
        for slot in range(slots):
            self.free.put((slot, None))
        self.parts: Queue[tuple[_Filling, Work]] = Queue(enough=prefetch)
        self.crew = Crew()
        self.ready: queue.SimpleQueue[_Filling | BaseException | None] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []

    def run(self, target: Callable[..., None], *arguments: Any, name: str) -> None:
        """Starts a thread, which ends with the pipeline."""
        thread = threading.Thread(target=target, args=(self, *arguments), name=name, daemon=True)
        self.threads.append(thread)
        thread.start()


def _read(
    pipeline: _Pipeline,
    plan: Plan,
    place: tuple[int, int, int, int | None],
    units: Iterable[Encoded],
    keep: Callable[[np.ndarray], np.ndarray],
    tensors: tuple[Tensor, Tensor],
    part_rows: int,
    own: int,
) -> None:
    """The thread that hands out what was read, batch by batch, as soon as there is room."""
    end: BaseException | None = None
    try:
        kept = (replace(unit, files=keep(unit.files)) for unit in units)
        for step, pieces in pieces_of_batches(plan, *place, kept):
            free = pipeline.free.get()
            if free is None:
                break
            slot, event = free
            if event is not None:
                event.synchronize()
            rows = check_rows(plan, step, *place[:2], pieces)
            pixels, token_ids = tensors
            works = works_of_batch(slot, pieces, part_rows)
            filling = _Filling(Batch(step, plan.epoch(step + 1), rows, pixels[slot], token_ids[slot], []), slot, len(works))
            pipeline.parts.put([(filling, work) for work in works])
            pipeline.ready.put(filling)
            pipeline.parts.wait_for_room(_WAITING * (own + pipeline.crew.size))
    except BaseException as error:
        end = error
    # Only the thread that runs a generator may close it.
    close = getattr(units, "close", None)
    if close:
        close()
    pipeline.ready.put(end)


def _decode(pipeline: _Pipeline, decoder: Decoder) -> None:
    """A decoder's thread, which mostly waits for it."""
    while (part := pipeline.parts.take()) is not None:
        filling, work = part
        result: list[Replaced] | BaseException
        try:
            result = decoder.decode(work)
        except BaseException as error:
            result = error
        if filling.finish(result):
            pipeline.parts.count_finished(1)


def _watch(pipeline: _Pipeline, helpers: Helpers, own: int) -> None:
    """The thread that has decoders on other machines hired when they are needed."""

    def employ(helper: Helper, rank: int) -> None:
        pipeline.run(_help, helper, rank, name="batches-help")

    pipeline.crew.watch(helpers, own, pipeline.stop, employ)


def _help(pipeline: _Pipeline, helper: Helper, rank: int) -> None:
    """A helper's thread, which mostly waits for it."""

    def do(part: tuple[_Filling, Work]) -> None:
        filling, work = part
        pixels, token_ids, replaced = helper.decode(work)
        rows = slice(work.first, work.first + len(work.row))
        filling.batch.pixels.numpy()[rows], filling.batch.token_ids.numpy()[rows] = pixels, token_ids
        if filling.finish(replaced):
            pipeline.parts.count_finished(1)

    pipeline.crew.work(helper, rank, pipeline.parts, do, pipeline.stop)


class Batches:
    """Batches start_step to stop_step of a rank, decoded ahead by `processes` processes.

    An iterator; a batch may be used until the next but one is asked for. Errors of reading or decoding are raised where the
    batch would have come. `close` it when stopping early; at interpreter exit it closes itself.

    Args:
        stop_step: `None` for a stream without end.
        units: what was read, as `Plan.units` lists it; a generator is closed together with the batches. The files are copied
            at once: they may lie where they must not stay.
        processes: 0 decodes in a thread of this process.
        prefetch: finished batches that wait for the loop.
        device: batches for a GPU lie where it can copy them from without waiting.
        helpers: where decoders on other machines come from, while those here keep the loop waiting.
    """

    waits: Waits
    """What `next` has waited for so far."""
    on_wait: Callable[[float, str], None]
    """Told every few seconds of a long wait how long it is, and what is missing."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        world_size: int,
        start_step: int,
        stop_step: int | None,
        units: Iterable[Encoded],
        recipe: Recipe,
        *,
        processes: int = 0,
        prefetch: int = 2,
        device: torch.device | None = None,
        helpers: Helpers | None = None,
    ):
        self.waits = Waits()
        self.on_wait, self.processes = _nothing, processes
        self._on_gpu = device is not None and device.type == "cuda"
        self._done = False
        self._lent: deque[_Filling] = deque()
        share = plan.global_batch // world_size
        slots = prefetch + _LENT + _FILLING
        layout = Layout(slots, share, recipe.preprocess.image_size, recipe.context_length)
        self._pipeline = pipeline = _Pipeline(slots, prefetch)
        pool = Pool(recipe, layout, processes) if processes else None
        memory = pool.memory if pool else np.empty(layout.bytes, np.uint8)
        if self._on_gpu:
            _pin(memory)
        keep = pool.files.keep if pool else np.copy
        pixels, token_ids = layout.arrays(memory)
        # Neither a thread nor the finalizer knows self, so a forgotten loader is collected and its threads end.
        self._finalizer = weakref.finalize(self, _stop, pipeline, pool)
        place = rank, world_size, start_step, stop_step
        part_rows = max(1, min(WORK_ROWS, 2 * share // max(1, processes)))
        tensors = torch.from_numpy(pixels), torch.from_numpy(token_ids)
        pipeline.run(_read, plan, place, units, keep, tensors, part_rows, max(1, processes), name="batches-read")
        for decoder in pool.decoders if pool else [Inline(recipe, layout, memory)]:
            pipeline.run(_decode, decoder, name="batches-decode")
        if helpers:
            pipeline.run(_watch, helpers, max(1, processes), name="batches-watch")

    @property
    def remote_processes(self) -> int:
        """Decoders on other machines that are at work now."""
        return self._pipeline.crew.size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._done:
            raise StopIteration
        self._release()
        began = time.perf_counter()
        filling = self._next(began)
        error = filling.error if isinstance(filling, _Filling) else filling
        if not isinstance(filling, _Filling) or error:
            self.close()
            raise StopIteration if error is None else error
        self.waits += _attributed(began, filling.fed_at, filling.done_at, time.perf_counter())
        self._pipeline.crew.waited = self.waits.decode - self.waits.storage
        self._pipeline.parts.count_finished(-1)
        self._lent.append(filling)
        return filling.batch

    def _next(self, began: float) -> _Filling | BaseException | None:
        while True:
            try:
                filling = self._pipeline.ready.get(timeout=PATIENCE_SECONDS)
                break
            except queue.Empty:
                self.on_wait(time.perf_counter() - began, "no image files have come (slow storage, or no free CPU to read)")
        while isinstance(filling, _Filling) and not filling.done.wait(PATIENCE_SECONDS):
            self.on_wait(time.perf_counter() - began, "image files have come and are not decoded (too few CPUs)")
        return filling

    def _release(self) -> None:
        """Memory of the batch before the last may be filled again; where a GPU copies from it, when it has."""
        if len(self._lent) == _LENT:
            event = None
            if self._on_gpu:
                event = torch.cuda.Event()
                event.record()
            self._pipeline.free.put((self._lent.popleft().slot, event))

    def close(self) -> None:
        """Ends the stream and the processes; waits until the unit being read has come, at most 10 s."""
        self._done = True
        self._finalizer()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nothing(seconds: float, what: str) -> None:
    """Nobody wants to know."""


def _attributed(began: float, fed_at: float, done_at: float, now: float) -> Waits:
    fed, done = max(began, fed_at), max(began, fed_at, done_at)
    return Waits(fed - began, done - fed, now - done)


def _pin(memory: np.ndarray) -> None:
    """Lets a GPU read this memory by itself, until the process ends."""
    status = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
    if int(status):
        raise RuntimeError(f"{memory.nbytes / 2**20:.0f} MiB for batches could not be pinned: CUDA error {int(status)}")


def _stop(pipeline: _Pipeline, pool: Pool | None) -> None:
    pipeline.stop.set()
    pipeline.free.put(None)
    pipeline.parts.end()
    pipeline.crew.close()
    if pool:
        pool.close()
    deadline = time.monotonic() + 10
    for thread in pipeline.threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
