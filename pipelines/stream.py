"""Decoded units through Ray Data: it reads, decodes and tokenises on any CPU of the cluster what the plan lists, in order.

Each training worker has its own stream. A unit is one task, and its result one row of one block (a row of large arrays), so
Ray Data can neither split nor join units; with `preserve_order` they arrive as listed. `streaming_split(1)` puts the executor
into a process of its own, away from the training step. A stream is cut into spans of at most 1,024 units because an
execution plans all its tasks at the start (5 ms each on two busy cores); the next span starts while the last units of the
previous one come.

A task carries two object references instead of the manifest, the tokenizer and the row ids: those are fetched once a process.
"""

import hashlib
import itertools
import json
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray
import ray.data
from ray.data import DataContext, Datasource, ExecutionResources, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from msclip.data.decode import BadRow, Decoded, decode_unit
from msclip.data.images import Augment, Preprocess
from msclip.data.plan import Plan, Unit
from msclip.data.shards import Manifest
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError

T = TypeVar("T")
SPAN_UNITS = 1024
_PREFETCH_UNITS = 4
_EARLY_UNITS = 256
_STORE_SHARE = 0.4
"""Of the cluster's object memory, for the finished units of all workers; two spans overlap for a while, hence under 1/2."""
_PATIENCE_SECONDS = 60
_NODES_COME_SECONDS = 15 * 60
"""Time for an autoscaler to add nodes, where the training workers hold every CPU."""
_ATTEMPTS = 5
"""At a unit whose storage fails, 15 s in all: a busy object store is no reason to lose a training run."""

logger = logging.getLogger(__name__)


class _Shared(NamedTuple):
    """What every task of a stream needs."""

    manifest: Manifest
    preprocess: Preprocess
    tokenizer: str
    augment: Augment | None
    seed: int


@dataclass(frozen=True)
class _Handle:
    """Where a `_Shared` is. Handles of equal content are equal: a process decodes for several training workers."""

    digest: str
    reference: ray.ObjectRef = field(compare=False)


class _Units(NamedTuple):
    """The units of a span in a few arrays: those stay in shared memory, Python objects would be copied to each process."""

    numbers: np.ndarray
    """(units, 4): lane, epoch, window, first step."""
    rows: np.ndarray
    """The row ids of all units, one after another."""
    ends: np.ndarray

    @classmethod
    def of(cls, units: Sequence[Unit]) -> "_Units":
        numbers = np.array([(unit.lane, unit.epoch, unit.window, unit.first_step) for unit in units])
        return cls(numbers, np.concatenate([unit.row for unit in units]), np.cumsum([len(unit.row) for unit in units]))

    def unit(self, index: int) -> Unit:
        lane, epoch, window, first_step = self.numbers[index].tolist()
        begin = self.ends[index - 1] if index else 0
        return Unit(lane, epoch, window, first_step, self.rows[begin : self.ends[index]])


def ray_units(
    manifest: Manifest,
    plan: Plan,
    preprocess: Preprocess,
    tokenizer_json: str,
    augment: Augment | None,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int | None,
    *,
    num_cpus: float = 1.0,
    span_units: int = SPAN_UNITS,
) -> Iterator[Decoded]:
    """The decoded units of a rank, as `Plan.units` lists them; call it inside the training worker.

    Nothing starts before the first `next`. Closing the generator stops what is still running.

    Args:
        num_cpus: logical CPUs a task occupies. At least this many must be left beside the training workers, or the stream
            waits for nodes: a warning after 1 minute, an error after 16.

    Raises:
        UserError: what `decode_unit` found, with its words; or no node came with CPUs for decoding.
        ray.exceptions.RayTaskError: any other failure of a task, with its traceback.
    """
    content = _Shared(manifest, preprocess, tokenizer_json, augment, plan.seed)
    shared = _Handle(hashlib.sha256(pickle.dumps(content)).hexdigest(), ray.put(content))
    units = plan.units(rank, world_size, start_step, stop_step)
    row_bytes = 3 * preprocess.image_size**2
    context = _context(plan.unit_rows * row_bytes, world_size)

    def start() -> _Span | None:
        listed = list(itertools.islice(units, span_units))
        return _Span(listed, row_bytes, shared, context, num_cpus) if listed else None

    idle = ray.available_resources().get("CPU", 0)
    spans = [_in_background(start)]  # the current one, and from its last units on the next
    try:
        if idle < num_cpus:
            _wait_for_nodes(spans[0], num_cpus, idle)
        while (span := spans[0].result()) is not None:
            for left in range(span.count - 1, -1, -1):
                if left <= _EARLY_UNITS and len(spans) == 1:
                    spans.append(_in_background(start))
                yield span.next()
            spans.pop(0)
            span.close()
    finally:
        for future in spans:
            future.add_done_callback(_close)


class _Span:
    """One execution of Ray Data, whose first unit is there."""

    def __init__(self, units: list[Unit], row_bytes: int, shared: _Handle, context: DataContext, num_cpus: float):
        self.count = len(units)
        self._listed = ray.put(_Units.of(units))
        source = _PlanSource([len(unit.row) * row_bytes for unit in units], shared, self._listed)
        with DataContext.current(context):
            decoded = ray.data.read_datasource(source, num_cpus=num_cpus, override_num_blocks=self.count)
            # One split for one consumer: for the sake of the executor's own process, not of splitting.
            stream = decoded.streaming_split(1)[0].iter_batches(batch_size=1, prefetch_batches=_PREFETCH_UNITS)
        self._blocks: Any = iter(stream)
        self._first = next(self._blocks, None)

    def next(self) -> Decoded:
        block, self._first = self._first or next(self._blocks, None), None
        if block is None:
            raise RuntimeError(f"Ray Data brought fewer than the {self.count} units it was given")
        notes = json.loads(block["notes"][0])
        if "error" in notes:
            raise UserError(notes["error"])
        # Copied out of shared memory: what is held there counts for nobody, and would stop the executor at its limit.
        arrays = {name: np.array(block[name][0]) for name in ("row", "pixels", "token_ids")}
        return Decoded(notes["epoch"], bad=tuple(BadRow(**row) for row in notes["bad"]), **arrays)

    def close(self) -> None:
        """Ends the execution if it still runs."""
        if ray.is_initialized():  # else there is none, and Ray would start a cluster to tell it so
            self._blocks.close()


def _wait_for_nodes(span: Future[_Span | None], num_cpus: float, idle: float) -> None:
    message = (
        f"no data after {{:.0f}} s: a decoding task needs {num_cpus:g} CPUs (data.decode_cpus), and of the cluster's "
        f"{ray.cluster_resources().get('CPU', 0):g} the training workers leave {idle:g}. Use fewer workers "
        "(cluster.num_workers) or fewer CPUs for each (cluster.cpus_per_worker), or add nodes"
    )
    if not wait([span], timeout=_PATIENCE_SECONDS).done:
        logger.warning(message.format(_PATIENCE_SECONDS))
        if not wait([span], timeout=_NODES_COME_SECONDS).done:
            raise UserError(message.format(_PATIENCE_SECONDS + _NODES_COME_SECONDS))


def _close(span: Future[_Span | None]) -> None:
    if span.exception() is None and (started := span.result()) is not None:
        started.close()


def _in_background(make: Callable[[], T]) -> Future[T]:
    """The result of a call on a daemon thread. (An executor's threads would be waited for at exit, for ever if need be.)"""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="next-span", daemon=True).start()
    return future


def _context(unit_bytes: int, world_size: int) -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.enable_operator_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = unit_bytes  # what Ray Data expects of a task before it has seen one
    options = context.execution_options
    options.preserve_order, options.verbose_progress = True, False
    # Each worker's execution would otherwise count on half of the cluster's memory for itself.
    store = ray.cluster_resources().get("object_store_memory", 0)
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=_STORE_SHARE * store / world_size)
    return context


class _PlanSource(Datasource):
    """The units of a span, one reading task each, which also decodes.

    Not `range(...).map_batches(...)`: that runs a second, empty task for each unit, which holds a CPU when all should decode.
    """

    def __init__(self, sizes: list[int], shared: _Handle, units: ray.ObjectRef):
        super().__init__()
        self._sizes, self._shared, self._units = sizes, shared, units

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._sizes)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(partial(_decode, index, self._shared, self._units), BlockMetadata(1, size, None, None))
            for index, size in enumerate(self._sizes)
        ]


def _decode(index: int, shared: _Handle, units: ray.ObjectRef) -> list[Block]:
    """The task: one unit, as one row of arrays and a note of what went wrong."""
    manifest, preprocess, tokenizer, augment, seed = _fetch_shared(shared)
    unit = _fetch_units(units).unit(index)
    try:
        decoded = _patiently(lambda: decode_unit(manifest, unit, preprocess, tokenizer, augment, seed))
        notes: dict[str, Any] = {"epoch": decoded.epoch, "bad": [asdict(row) for row in decoded.bad]}
        arrays = decoded.row, decoded.pixels, decoded.token_ids
    except UserError as error:  # raised in the training worker: Ray would wrap it in two tracebacks
        size = preprocess.image_size
        notes = {"error": str(error)}
        arrays = unit.row[:0], np.empty((0, size, size, 3), np.uint8), np.empty((0, tokenizer.context_length), np.int32)
    columns = {name: array[None] for name, array in zip(("row", "pixels", "token_ids"), arrays, strict=True)}
    return [BlockAccessor.batch_to_block({**columns, "notes": np.array([json.dumps(notes)], dtype=object)})]


def _patiently(action: Callable[[], T]) -> T:
    for attempt in range(_ATTEMPTS - 1):
        try:
            return action()
        except OSError:
            time.sleep(2**attempt)
    return action()


@lru_cache(maxsize=4)
def _fetch_shared(handle: _Handle) -> tuple[Manifest, Preprocess, Tokenizer, Augment | None, int]:
    shared: _Shared = ray.get(handle.reference)
    return shared.manifest, shared.preprocess, Tokenizer.from_json(shared.tokenizer), shared.augment, shared.seed


@lru_cache(maxsize=16)
def _fetch_units(reference: ray.ObjectRef) -> _Units:
    return ray.get(reference)
