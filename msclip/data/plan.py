"""Which rows make up global batch k, as a pure function of the row groups' sizes, a seed and k. Nothing is stored to resume.

An epoch is all row groups in random order, cut into `lanes` contiguous segments. A lane's stream is its segments of epochs
0, 1, 2, ..., shuffled inside windows of a few row groups; global batch k is the next few rows of every lane, in lane order.
So a batch mixes rows of `lanes` places that are far apart, a worker needs only the lanes in its slice of the batch, and the
number of workers decides who reads a row, never when it comes. A reader works in `Unit`s: at most `unit_rows` rows, all out
of one window.

How far rows of one file spread: a window's rows are used over window_rows / (global_batch / lanes) consecutive batches, and
the file's next row group comes in any lane at any time. Defaults (`default_lanes`, `default_window`): a small data set is
shuffled as a whole; a large one gives at most 16 to 31 rows of one row group to a batch, over as many batches as that takes.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from msclip.errors import UserError

UNIT_ROWS = 256
"""Decoded at 224 pixels a side, 37 MiB: small enough to be one block of Ray Data, large enough to be one task."""

_WHOLE_SHUFFLE_ROWS = 32_768
"""Up to here all rows of a lane are shuffled together. Its row groups are read again for every unit (at most 8 times), from
the memory cache of a reader that holds 1 to 2 GB of photos."""


class Rows(NamedTuple):
    """Rows in the order of a batch. The same row comes again in every epoch."""

    epoch: Int64[np.ndarray, " rows"]
    """Which pass over the data each row belongs to; two values where a pass ends inside the batch."""
    row: Int64[np.ndarray, " rows"]
    """Global row ids: positions in the concatenation of all row groups in manifest order."""


@dataclass(frozen=True, eq=False)
class Unit:
    """What one reading task does for one rank: rows of one window of one lane, in the order of use."""

    lane: int
    epoch: int
    window: int
    """Position of the first row group of the window in the epoch's order of row groups."""
    first_step: int
    """The step whose batch needs the first of these rows."""
    row: Int64[np.ndarray, " rows"]
    """Global row ids."""

    def __str__(self) -> str:
        return f"unit of lane {self.lane}, epoch {self.epoch}, window {self.window}, from step {self.first_step}"


def default_lanes(rows: int, global_batch: int, unit_rows: int = UNIT_ROWS) -> int:
    """A power of two, so that the usual numbers of workers cut no lane.

    At least 16 rows a step for each lane: a rank holds one unit a lane, then at most 16 of its batches, decoded. And at
    least 4 units an epoch in each lane: on a few thousand rows more lanes would only mean smaller reads.
    """
    most = min(global_batch // 16, rows // (4 * unit_rows))
    return 1 << (most.bit_length() - 1) if most else 1


def default_window(rows: int, row_groups: int, lanes: int, unit_rows: int = UNIT_ROWS) -> int:
    """Every row group of a lane's segment for a small data set, else 1: then a row group is read about once an epoch."""
    small = rows <= min(_WHOLE_SHUFFLE_ROWS, lanes * 8 * unit_rows)
    return row_groups if small else 1


class Plan:
    """The sample order.

    Every row comes exactly once in each epoch, and no tail is dropped: where an epoch ends inside a batch, the batch goes on
    with the next epoch (so such a batch can hold a row twice). All lanes reach the end of an epoch within one row of
    each other.

    Memory: three int64 a row group for each of the four last used epochs (40 MB for 400,000 row groups), and the shuffled
    rows of the windows in use, 8 bytes a row.

    Args:
        row_group_sizes: rows in each row group, in manifest order.
        global_batch: rows of a batch over all workers.
        seed: not negative.
        lanes: contiguous segments of an epoch that each batch draws from; `None`: `default_lanes`.
        window: row groups of a lane whose rows are shuffled together; `None`: `default_window`.
        unit_rows: the most rows a `Unit` has.

    Raises:
        UserError: a setting out of range, or fewer rows than one global batch.
    """

    def __init__(
        self,
        row_group_sizes: Sequence[int] | Int64[np.ndarray, " groups"],
        global_batch: int,
        seed: int = 0,
        lanes: int | None = None,
        window: int | None = None,
        unit_rows: int = UNIT_ROWS,
    ):
        self.sizes = np.asarray(row_group_sizes, dtype=np.int64)
        self.rows = int(self.sizes.sum())
        self.global_batch, self.seed, self.unit_rows = global_batch, seed, unit_rows
        if global_batch < 1 or seed < 0 or unit_rows < 1:
            raise UserError(
                f"training.global_batch and unit_rows must be at least 1 and training.seed at least 0, "
                f"got {global_batch}, {unit_rows} and {seed}"
            )
        if self.rows < global_batch:
            raise UserError(
                f"global_batch must not exceed the rows of the data, got {global_batch} for {self.rows} rows: "
                "a batch would hold the same pair twice"
            )
        self.lanes = default_lanes(self.rows, global_batch, unit_rows) if lanes is None else lanes
        if not 1 <= self.lanes <= global_batch:
            raise UserError(f"data.lanes must be from 1 to global_batch ({global_batch}), got {lanes}")
        groups = len(self.sizes)
        self.window = default_window(self.rows, groups, self.lanes, unit_rows) if window is None else window
        if self.window < 1:
            raise UserError(f"data.window must be at least 1, got {window}")
        self._first_row = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        # Batch columns [edge[l], edge[l + 1]) belong to lane l.
        self._edge = [global_batch * lane // self.lanes for lane in range(self.lanes + 1)]
        self._epoch_order = lru_cache(maxsize=4)(self._make_epoch_order)
        self._window_rows = lru_cache(maxsize=4 * self.lanes)(self._make_window_rows)

    def __reduce__(self) -> tuple[type["Plan"], tuple[object, ...]]:
        return Plan, (self.sizes, self.global_batch, self.seed, self.lanes, self.window, self.unit_rows)

    @property
    def steps_per_epoch(self) -> float:
        return self.rows / self.global_batch

    def epoch(self, step: int) -> float:
        """Passes over the data that are done before batch `step`."""
        return step * self.global_batch / self.rows

    def batch(self, step: int) -> Rows:
        """The rows of global batch `step`."""
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, world_size: int) -> Rows:
        """The contiguous slice of global batch `step` that `rank` trains on."""
        epochs, rows = [], []
        for lane, first, last in self.columns(rank, world_size):
            base = step * self._width(lane)
            for epoch, _, position, shuffled in self._windows(lane, base + first, base + last):
                part = shuffled[max(0, base + first - position) : base + last - position]
                epochs.append(np.full(len(part), epoch, dtype=np.int64))
                rows.append(part)
        return Rows(np.concatenate(epochs), np.concatenate(rows))

    def units(self, rank: int = 0, world_size: int = 1, start_step: int = 0, stop_step: int | None = None) -> Iterator[Unit]:
        """What `rank` must read for steps start_step to stop_step (`None`: without end), in the order of first need.

        Lazy: memory is that of one window a lane. Within a lane, units come in the order of use.
        """
        streams = [
            self._lane_units(lane, first, last, start_step, stop_step) for lane, first, last in self.columns(rank, world_size)
        ]
        return heapq.merge(*streams, key=lambda unit: (unit.first_step, unit.lane))

    def columns(self, rank: int, world_size: int) -> Iterator[tuple[int, int, int]]:
        """The lanes in a rank's slice of every batch: (lane, first, last), last not included, within the lane's columns.

        Raises:
            UserError: the batch cannot be cut into equal slices.
        """
        if self.global_batch % world_size:
            raise UserError(f"global_batch must be a multiple of num_workers, got {self.global_batch} and {world_size}")
        share = self.global_batch // world_size
        start, stop = rank * share, (rank + 1) * share
        for lane, (left, right) in enumerate(itertools.pairwise(self._edge)):
            if left < stop and start < right:
                yield lane, max(start, left) - left, min(stop, right) - left

    def _lane_units(self, lane: int, first: int, last: int, start_step: int, stop_step: int | None) -> Iterator[Unit]:
        width = self._width(lane)
        start = start_step * width
        stop = None if stop_step is None else stop_step * width
        for epoch, window, begin, rows in self._windows(lane, start, stop):
            position = np.arange(begin, begin + len(rows))
            column = position % width
            mine = (first <= column) & (column < last) & (position >= start)
            if stop is not None:
                mine &= position < stop
            if not mine.any():
                continue
            position, rows = position[mine], rows[mine]
            pieces = math.ceil(len(rows) / self.unit_rows)
            for at, part in zip(np.array_split(position, pieces), np.array_split(rows, pieces), strict=True):
                yield Unit(lane, epoch, window, int(at[0]) // width, part)

    def _windows(self, lane: int, start: int, stop: int | None) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """The windows that hold positions start to stop of a lane's stream: (epoch, window, first position, rows)."""
        position = start
        while stop is None or position < stop:
            epoch = self._epoch_at(lane, position)
            begin = self._stream_start(lane, epoch)
            left, right = self._segment_edge(lane, epoch), self._segment_edge(lane + 1, epoch)
            _, ends = self._epoch_order(epoch)
            group_of_left, group = np.searchsorted(ends, [left, left + position - begin], side="right")
            window = int(group_of_left + (group - group_of_left) // self.window * self.window)
            until = min(window + self.window, len(ends))
            low = max(left, int(ends[window - 1]) if window else 0)
            high = min(right, int(ends[until - 1]))
            yield epoch, window, begin + low - left, self._window_rows(epoch, window, until, low, high)
            position = begin + high - left

    def _make_epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's row groups in order, and where in the concatenation of their rows each ends."""
        order = _permutation(len(self.sizes), self.seed, 0, epoch)
        return order, np.cumsum(self.sizes[order])

    def _make_window_rows(self, epoch: int, window: int, until: int, low: int, high: int) -> np.ndarray:
        """Positions low to high of the epoch's order, which lie in its row groups window to until, shuffled."""
        order, ends = self._epoch_order(epoch)
        pieces = []
        for group, end in zip(order[window:until], ends[window:until], strict=True):
            begin = end - self.sizes[group]
            shift = self._first_row[group] - begin
            pieces.append(np.arange(max(low, begin) + shift, min(high, end) + shift))
        rows = np.concatenate(pieces)
        rows = rows[_permutation(len(rows), self.seed, 1, epoch, low)]
        rows.flags.writeable = False  # it is cached
        return rows

    # An epoch's segment of a lane is in proportion to the lane's part of the batch. The part of a row that rounding leaves
    # over is carried to the next epoch, so that lanes never drift apart: after e epochs lane l has given
    # floor(e * rows * edge[l + 1] / global_batch) - floor(e * rows * edge[l] / global_batch) rows.

    def _width(self, lane: int) -> int:
        return self._edge[lane + 1] - self._edge[lane]

    def _given(self, edge: int, epochs: int) -> int:
        return epochs * self.rows * self._edge[edge] // self.global_batch

    def _segment_edge(self, edge: int, epoch: int) -> int:
        return self._given(edge, epoch + 1) - self._given(edge, epoch)

    def _stream_start(self, lane: int, epoch: int) -> int:
        return self._given(lane + 1, epoch) - self._given(lane, epoch)

    def _epoch_at(self, lane: int, position: int) -> int:
        epoch = position * self.global_batch // (self.rows * self._width(lane))
        while self._stream_start(lane, epoch) > position:
            epoch -= 1
        while self._stream_start(lane, epoch + 1) <= position:
            epoch += 1
        return epoch


def _permutation(n: int, *key: int) -> np.ndarray:
    """A random order of range(n).

    By sorting raw bits: NumPy keeps those equal over its versions, but not `Generator.permutation`.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(n), kind="stable")
