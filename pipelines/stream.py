"""Image files and captions through Ray Data: on any CPU of the cluster it reads what the plan lists, in order.

Each training worker has its own stream. A task reads a few units, and its result is one row of one block (a row of large
arrays), so Ray Data can neither split nor join units; with `preserve_order` they arrive as listed. Images stay compressed on
their way: decoded they would be ten times the bytes for the object store, the network and the training process to move. A
stream is cut into spans of tasks because an execution plans all its tasks at the start (5 ms each on two busy cores); the
next span starts while the last tasks of the previous one come. Until Ray Data's processes have started, which takes seconds,
the training worker reads for itself. Then the first span is planned from where the worker will be when Ray Data has its full
pace; should the worker get further before the first task is done, that comes once more and is passed over.

A task carries two object references instead of the manifest and the row ids: those are fetched once a process.
"""

import collections
import hashlib
import itertools
import json
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Datasource, ExecutionResources, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import Block, BlockMetadata

from msclip.data.decode import Encoded, read_unit
from msclip.data.mixture import Mixture
from msclip.data.plan import Plan, Unit
from msclip.data.shards import Manifest
from msclip.errors import UserError
from msclip.s3_requests import repeated

T = TypeVar("T")
TASK_BYTES = 32 * 2**20
"""Of image files that a task reads, roughly: a tenth of a second's work or two, and as long until the next one starts."""
SPAN_TASKS = 256
"""Of one execution. Where two overlap, Ray starts another process."""
_EARLY_TASKS = 32
"""Left when the next span starts."""
_PREFETCH_TASKS = 4
_AHEAD_BYTES = 512 * 2**20
"""Most that a worker's stream holds in object memory: seconds of work, as far storage may pause. More would only be more memory
to touch for the first time, which costs as much as reading does."""
_LOCAL_AHEAD_BYTES = 64 * 2**20
"""The same for each reading task at a time, and once more, where nothing pauses; of larger tasks two."""
_STORE_SHARE = 0.4
"""Of the cluster's object memory, for what was read and not fetched, of all workers; two spans overlap for a while, hence
under 1/2."""
_LOCAL_SHARE = 4
"""From a disk of the nodes' own, one core reads what this many others decode. More tasks at a time would be more processes for
Ray to start, at seconds of CPU each, while the decoders want it; far storage is waited for, so there they are not limited."""
READ_CPUS = 1.0
"""Logical CPUs of a reading task. At least this many must be left beside the training workers."""
_HEAD_STEPS, _HEAD_SECONDS = 2, 3.0
"""Ray Data starts when the files of so many batches have been asked for, or after this time: on a small machine its start takes
all cores, and the first batches go before it."""
_SPAN_SECONDS = 6.0
"""That Ray Data, once it runs, takes to bring what it is asked for as fast as it will. As long the training worker reads on:
what both read is thrown away, and nothing comes meanwhile."""
_HEAD_THREADS = 8
_HEAD_BYTES = 64 * 2**20
"""That the training worker reads ahead from a local disk while it reads for itself: memory that is touched for the first time
costs more than reading does, and those who decode want the cores."""
_PAUSE_SECONDS = 0.05
_LONG_PAUSES = 4
"""More of them, one for each task that is read and not fetched."""
_NODES_COME_SECONDS = 15 * 60
"""Time for an autoscaler to add nodes, where the training workers hold every CPU."""
_ATTEMPTS = 5
"""At a unit whose storage fails, 15 s in all: a busy object store is no reason to lose a training run."""

logger = logging.getLogger(__name__)


class _Shared(NamedTuple):
    """What every task of a stream needs."""

    manifest: Manifest | Mixture
    seed: int


@dataclass(frozen=True)
class _Handle:
    """Where a `_Shared` is. Handles of equal content are equal: a process reads for several training workers."""

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
        rows = [np.empty(0, np.int64), *(unit.row for unit in units)]
        return cls(numbers, np.concatenate(rows), np.cumsum([len(unit.row) for unit in units]))

    def unit(self, index: int) -> Unit:
        lane, epoch, window, first_step = self.numbers[index].tolist()
        begin = self.ends[index - 1] if index else 0
        return Unit(lane, epoch, window, first_step, self.rows[begin : self.ends[index]])


def ray_units(
    manifest: Manifest | Mixture,
    plan: Plan,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int | None,
    *,
    task_bytes: int = TASK_BYTES,
    span_tasks: int = SPAN_TASKS,
) -> Iterator[Encoded]:
    """The units of a rank, read, as `Plan.units` lists them; call it inside the training worker.

    Nothing starts before the first `next`. Closing the generator stops what is still running.

    Raises:
        UserError: what `read_unit` found, with its words; or no node came with a CPU for reading.
        ray.exceptions.RayTaskError: any other failure of a task, with its traceback.
    """
    content = _Shared(manifest, plan.seed)
    shared = _Handle(hashlib.sha256(pickle.dumps(content)).hexdigest(), ray.put(content))
    place = rank, world_size, start_step, stop_step
    row_bytes = sum(shard.size for shard in manifest.shards) / manifest.rows
    unit_bytes = row_bytes * plan.unit_rows
    task_units = max(1, round(task_bytes / unit_bytes))
    local = _is_local(manifest)
    context = _context(round(unit_bytes * task_units), world_size, local)
    idle = ray.available_resources().get("CPU", 0)
    wanted, ended = threading.Event(), threading.Event()

    def span_of(units: list[Unit]) -> _Span:
        return _Span(units, task_units, row_bytes, shared, context)

    def warm_up() -> _Span | None:
        wanted.wait(_HEAD_SECONDS)
        return None if ended.is_set() else span_of([])

    def start(units: Iterator[Unit]) -> _Span | None:
        listed = list(itertools.islice(units, span_tasks * task_units))
        return span_of(listed) if listed and not ended.is_set() else None

    def follow(count: int) -> Callable[[], _Span | None]:
        """What starts the next span of those that follow after so many units."""
        return partial(start, itertools.islice(plan.units(*place), count, None))

    # Ray Data needs seconds to start. What the first batches need is read here, and what follows until Ray Data is ready.
    early = sum(1 for _ in plan.units(rank, world_size, start_step, start_step + _HEAD_STEPS))
    most = early + (span_tasks * task_units if idle >= READ_CPUS else 0)  # if nothing may ever come, that is to be said soon
    ahead = max(1, min(2 * _HEAD_THREADS, round(_HEAD_BYTES / unit_bytes))) if local else 2 * _HEAD_THREADS
    given = begin = 0
    began = time.monotonic()
    spans: list[Future[_Span | None]] = []  # the current one, and from its last tasks on the next
    warm = _in_background(warm_up)
    warm.add_done_callback(_close)
    pool = ThreadPoolExecutor(_HEAD_THREADS, thread_name_prefix="first-units")
    try:
        head = itertools.islice(plan.units(*place), most)
        for read in _mapped(pool, partial(_read_patiently, shared=content), head, ahead):
            yield read
            given += 1
            if given == early:
                wanted.set()
            if not spans and warm.done():
                # What comes before is being read here, or will have been when Ray Data brings its first.
                pace = given / (time.monotonic() - began)
                begin = min(given + ahead + round(pace * _SPAN_SECONDS), most)
                spans.append(_in_background(next_span := follow(begin)))
            if spans and spans[0].done() and given >= begin:
                break
        pool.shutdown(wait=False, cancel_futures=True)
        if not spans:
            begin = given
            spans.append(_in_background(next_span := follow(begin)))
        if idle < READ_CPUS:
            _wait_for_nodes(spans[0], idle)  # where all was read here, there is none to wait for
        twice = given - begin
        while (span := spans[0].result()) is not None:
            for left in range(span.count - 1, -1, -1):
                if left <= _EARLY_TASKS and len(spans) == 1:
                    spans.append(_in_background(next_span))
                for read in span.next():
                    if twice > 0:
                        twice -= 1
                    else:
                        yield read
            spans.pop(0)
            span.close()
    finally:
        ended.set()
        wanted.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for future in spans:
            future.add_done_callback(_close)


def _mapped(pool: ThreadPoolExecutor, action: Callable[[Unit], T], units: Iterator[Unit], ahead: int) -> Iterator[T]:
    """Like `pool.map`, no further ahead than so many units."""
    coming = collections.deque(pool.submit(action, unit) for unit in itertools.islice(units, ahead))
    while coming:
        yield coming.popleft().result()
        coming.extend(pool.submit(action, unit) for unit in itertools.islice(units, 1))


class _Pause(ExecutionCallback):
    """Ray Data's executor looks for work without a break while its consumer is the slower one: a whole core of training's."""

    def on_execution_step(self, executor: Any) -> None:
        waiting = len(executor._output_node[1].output_queue)
        time.sleep(_PAUSE_SECONDS * (1 + min(waiting, _LONG_PAUSES)))


class _Span:
    """One execution of Ray Data, whose first task is done; without units, a single task that only starts what others need."""

    def __init__(self, units: list[Unit], task_units: int, row_bytes: float, shared: _Handle, context: DataContext):
        self.units = units
        self._listed = ray.put(_Units.of(units))
        tasks = [range(at, min(at + task_units, len(units))) for at in range(0, max(1, len(units)), task_units)]
        self.count = len(tasks)
        sizes = [round(sum(len(units[i].row) for i in task) * row_bytes) for task in tasks]
        source = _PlanSource(tasks, sizes, shared, self._listed)
        with DataContext.current(context):
            read = ray.data.read_datasource(source, num_cpus=READ_CPUS, override_num_blocks=self.count)
            stream = read.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=_PREFETCH_TASKS)
        self._blocks: Any = iter(stream)
        self._first = next(self._blocks, None)

    def next(self) -> Iterator[Encoded]:
        """The units of one task."""
        block, self._first = self._first or next(self._blocks, None), None
        if block is None:
            raise RuntimeError(f"Ray Data brought fewer than the {self.count} blocks it was asked for")
        notes = json.loads(block["notes"][0].as_py())
        repeated.add(notes["repeated"])
        if "error" in notes:
            raise UserError(notes["error"])
        numbers = _array(block, "numbers", np.int64).copy()
        captions = block["captions"][0].as_py()
        at = 0
        for index, (epoch, count) in enumerate(notes["units"]):
            rows = slice(at, at + count)
            row, ends = numbers.reshape(2, -1)[:, rows]
            # The files stay in object memory, for as long as somebody refers to them.
            yield Encoded(epoch, row, _array(block, f"files{index}", np.uint8), ends, tuple(captions[rows]))
            at += count

    def close(self) -> None:
        """Ends the execution if it still runs."""
        if ray.is_initialized():  # else there is none, and Ray would start a cluster to tell it so
            self._blocks.close()


def _array(block: pa.Table, column: str, kind: type) -> np.ndarray:
    """The single cell of a column, where it lies; Arrow's own way, by a scalar, would copy it."""
    cell = block[column].chunk(0)
    _, offsets, values = cell.buffers()
    begin, end = np.frombuffer(offsets, np.int64)[cell.offset :][:2]
    return np.frombuffer(values or b"", np.uint8)[begin:end].view(kind)


def _wait_for_nodes(span: "Future[_Span | None]", idle: float) -> None:
    """Gives an autoscaler time.

    Raises:
        UserError: no CPU came.
    """
    if not wait([span], timeout=_NODES_COME_SECONDS).done:
        raise UserError(
            f"no data after {_NODES_COME_SECONDS:.0f} s: a reading task needs {READ_CPUS:g} CPU, and of the cluster's "
            f"{ray.cluster_resources().get('CPU', 0):g} the training workers leave {idle:g}. Use fewer workers "
            "(cluster.num_workers) or fewer CPUs for each (cluster.cpus_per_worker), or add nodes"
        )


def _close(span: "Future[_Span | None]") -> None:
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


def _is_local(manifest: Manifest | Mixture) -> bool:
    manifests = [source.manifest for source in manifest.sources] if isinstance(manifest, Mixture) else [manifest]
    return all("://" not in each.folder.url for each in manifests)


def _context(task_bytes: int, world_size: int, local: bool) -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.enable_operator_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = task_bytes  # what Ray Data expects of a task before it has seen one
    context.custom_execution_callback_classes = [_Pause]
    options = context.execution_options
    options.preserve_order, options.verbose_progress = True, False
    # Each worker's execution would otherwise count on half of the cluster's memory for itself.
    cluster = ray.cluster_resources()
    readers = max(1.0, cluster.get("CPU", 0) / world_size // _LOCAL_SHARE) if local else None
    ahead = min(_AHEAD_BYTES, max(_LOCAL_AHEAD_BYTES, 2 * task_bytes) * (1 + readers)) if readers else _AHEAD_BYTES
    store = min(ahead, _STORE_SHARE * cluster.get("object_store_memory", 0) / world_size)
    options.resource_limits = ExecutionResources.for_limits(cpu=readers and readers * READ_CPUS, object_store_memory=store)
    return context


class _PlanSource(Datasource):
    """The units of a span, a few to each reading task."""

    def __init__(self, tasks: list[range], sizes: list[int], shared: _Handle, units: ray.ObjectRef):
        super().__init__()
        self._tasks, self._sizes, self._shared, self._units = tasks, sizes, shared, units

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._sizes)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(partial(_read, task, self._shared, self._units), BlockMetadata(1, size, None, None))
            for task, size in zip(self._tasks, self._sizes, strict=True)
        ]


def _read(task: range, shared: _Handle, units: ray.ObjectRef) -> list[Block]:
    """The task: some units, as one row of arrays and a note on how to take them apart."""
    content = _fetch_shared(shared)
    listed = _fetch_units(units)
    notes: dict[str, Any]
    try:
        read = [_read_patiently(listed.unit(index), content) for index in task]
    except UserError as error:  # raised in the training worker: Ray would wrap it in two tracebacks
        read, notes = [], {"error": str(error)}
    else:
        notes = {"units": [(unit.epoch, len(unit.row)) for unit in read]}
    notes["repeated"] = repeated.take()
    numbers = np.concatenate([np.empty(0, np.int64), *(unit.row for unit in read), *(unit.ends for unit in read)])
    # A column for each unit's files: joined they would be copied once more.
    cells = {f"files{index}": _as_cell(unit.files) for index, unit in enumerate(read)}
    cells["numbers"] = _as_cell(numbers.astype(np.int64))
    captions = pa.array([[caption for unit in read for caption in unit.captions]], pa.list_(pa.string()))
    return [pa.table({**cells, "captions": captions, "notes": [json.dumps(notes)]})]


def _as_cell(array: np.ndarray) -> pa.Array:
    """One binary value, without a copy."""
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, array.nbytes])), pa.py_buffer(array)])


def _read_patiently(unit: Unit, shared: _Shared) -> Encoded:
    for attempt in range(_ATTEMPTS - 1):
        try:
            return read_unit(shared.manifest, unit, shared.seed)
        except OSError:
            time.sleep(2**attempt)
    return read_unit(shared.manifest, unit, shared.seed)


@lru_cache(maxsize=4)
def _fetch_shared(handle: _Handle) -> _Shared:
    return ray.get(handle.reference)


@lru_cache(maxsize=16)
def _fetch_units(reference: ray.ObjectRef) -> _Units:
    return ray.get(reference)
