"""Which rows make up global batch k, as a pure function of the row groups' sizes, a seed and k. Nothing is stored to resume.

An epoch's rows, shuffled, are cut into `lanes` (msclip/data/lanes.py), and global batch k is the next few rows of every lane,
in the same order of lanes. So a batch mixes rows of `lanes` places that are far apart, a worker needs only the lanes in its
slice of the batch, and the number of workers decides who reads a row, never when it comes. A reader works in `Unit`s: at
most `unit_rows` rows, all out of one window of one lane.

How far apart the rows of one file land: with w = global_batch // lanes, the rows of a row group that are in one lane come
within ceil(window_rows / w) + 1 consecutive batches, at most w + 1 of them to a batch; the file's next row group comes in any
lane at any time, a third of an epoch away on average. Defaults (`default_lanes`, `default_window`): a small data set is
shuffled as a whole, so neighbours too are a third of an epoch apart; a large one has w from 16 to 31 and windows of one row
group, which is then used over rows / w batches.

Sources with weights each have lanes of their own: a fixed part of every batch, and epochs of their own. Or, resampled, all
share the lanes, and an epoch's row groups are drawn from them with replacement.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from msclip.data.lanes import UNIT_ROWS, Lanes, default_lanes, default_window
from msclip.errors import UserError


class Rows(NamedTuple):
    """Rows in the order of a batch. The same row comes again in every epoch."""

    epoch: Int64[np.ndarray, " rows"]
    """Which pass over its data (with weights, over its source) each row belongs to; two values where a pass ends inside the
    batch."""
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


class Portion(NamedTuple):
    """A source that gives its part of every batch."""

    name: str
    row_groups: int
    """How many of the row groups are its; the next portion's follow."""
    weight: float


class Plan:
    """The sample order.

    Every row comes exactly once in each epoch, and no tail is dropped: where an epoch ends inside a batch, the batch goes on
    with the next epoch (so such a batch can hold a row twice). All lanes reach the end of an epoch within one row of
    each other.

    With portions that holds inside each source: it gives the same number of rows to every batch, its weight's part of
    `global_batch` rounded so that nobody is a whole row off, and begins its next epoch whenever its rows are used up.

    Memory: that of `Lanes`, once a source.

    Args:
        row_group_sizes: rows in each row group, in manifest order.
        global_batch: rows of a batch over all workers.
        seed: not negative.
        lanes: contiguous segments of an epoch that each batch draws from, shared among the portions by their parts of the
            batch, each at least one; `None`: `default_lanes` of each.
        window: row groups of a lane whose rows are shuffled together; `None`: `default_window`.
        unit_rows: the most rows a `Unit` has.
        portions: sources to draw from by weight; none for all rows as one.
        resample: row groups are drawn from all portions with replacement, a row of a portion in proportion to its weight. So a
            portion has its part of the pairs in the long run, however small, and no row is promised in an epoch.
        skip: ids of rows that never come.

    Raises:
        UserError: a setting out of range, fewer rows than one global batch, or a weight too small or too large for a source.
    """

    def __init__(
        self,
        row_group_sizes: Sequence[int] | Int64[np.ndarray, " groups"],
        global_batch: int,
        seed: int = 0,
        lanes: int | None = None,
        window: int | None = None,
        unit_rows: int = UNIT_ROWS,
        portions: Sequence[Portion] = (),
        skip: Sequence[int] | Int64[np.ndarray, " skipped"] = (),
        resample: bool = False,
    ):
        sizes = np.asarray(row_group_sizes, dtype=np.int64)
        skipped = np.unique(np.asarray(skip, dtype=np.int64))
        self._arguments = sizes, global_batch, seed, lanes, window, unit_rows, tuple(portions), skipped, resample
        self.sizes, self.skip, self.portions, self.resample = sizes, skipped, tuple(portions), resample
        self.global_batch, self.seed, self.unit_rows = global_batch, seed, unit_rows
        self.rows = int(sizes.sum()) - len(skipped)
        if global_batch < 1 or seed < 0 or unit_rows < 1:
            raise UserError(
                f"training.global_batch and unit_rows must be at least 1 and training.seed at least 0, "
                f"got {global_batch}, {unit_rows} and {seed}"
            )
        if resample and not portions:
            raise UserError("data.resample draws sources by their weights, and data.train has none; give each source one")
        if self.rows < global_batch and (resample or not portions):
            raise UserError(
                f"global_batch must not exceed the rows of the data, got {global_batch} for {self.rows} rows: "
                "a batch would hold the same pair twice"
            )
        if lanes is not None and not 1 <= lanes <= global_batch:
            raise UserError(f"data.lanes must be from 1 to global_batch ({global_batch}), got {lanes}")
        if window is not None and window < 1:
            raise UserError(f"data.window must be at least 1, got {window}")
        ends = np.cumsum(sizes)
        self._kept = sizes = sizes - np.bincount(np.searchsorted(ends, skipped, side="right"), minlength=len(sizes))
        parts = [(len(sizes), global_batch)]
        odds = None
        if resample:
            window = window or 1
            odds = self._odds(sizes)
        elif portions:
            widths = batch_parts([portion.weight for portion in portions], global_batch)
            _check_portions(portions, widths, sizes, global_batch)
            parts = [(portion.row_groups, width) for portion, width in zip(portions, widths, strict=True)]
        self.sources: list[Lanes] = []
        """One of each portion; one where there are none."""
        first = 0
        for index, (groups, width) in enumerate(parts):
            own = sizes[first : first + groups]
            rows = int(own.sum())
            count = default_lanes(rows, width, unit_rows) if lanes is None else max(1, round(lanes * width / global_batch))
            row_groups = default_window(rows, groups, count, unit_rows) if window is None else window
            begin, end = (int(ends[i - 1]) if i else 0 for i in (first, first + groups))
            left_out = skipped[np.searchsorted(skipped, begin) : np.searchsorted(skipped, end)]
            # Sources of equal sizes must not be shuffled alike; the first one is as it would be alone.
            key = (index,) if index else ()
            self.sources.append(Lanes(own, begin, left_out, width, seed, key, count, row_groups, odds))
            first += groups
        # Sources are spread over the batch, so that each worker's slice has something of each.
        order = [
            ((lane + 0.5) / source.lanes, s, lane) for s, source in enumerate(self.sources) for lane in range(source.lanes)
        ]
        self._lanes = [(self.sources[s], lane) for _, s, lane in sorted(order)]
        # Batch columns [edge[l], edge[l + 1]) belong to lane l.
        self._edge = [0, *itertools.accumulate(source.columns(lane) for source, lane in self._lanes)]

    def __reduce__(self) -> tuple[type["Plan"], tuple[object, ...]]:
        return Plan, self._arguments

    @property
    def lanes(self) -> int:
        """Of all sources."""
        return len(self._lanes)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that use as many pairs as there are; with portions some are used more often than others."""
        return self.rows / self.global_batch

    def epoch(self, step: int) -> float:
        """Passes over the data that are done before batch `step`: its pairs so far, over the pairs there are."""
        return step * self.global_batch / self.rows

    def passes(self, step: int) -> dict[str, float]:
        """Passes over the rows of each portion that are done before batch `step`; resampled, those to be expected."""
        if self.resample:
            ends = np.cumsum([p.row_groups for p in self.portions])
            pairs = step * self.global_batch * self._odds(self._kept)[ends - 1]
            return {p.name: float(passes) for p, passes in zip(self.portions, pairs, strict=True)}
        return {p.name: step * source.width / source.rows for p, source in zip(self.portions, self.sources, strict=False)}

    def _odds(self, kept: Int64[np.ndarray, " groups"]) -> Float64[np.ndarray, " groups"]:
        """The probability of each row group's rows: a portion's part of the weights, over its rows that are kept."""
        groups = [portion.row_groups for portion in self.portions]
        rows = np.add.reduceat(kept, np.cumsum([0, *groups[:-1]]))
        if not rows.all():
            raise UserError(f"data.train: {self.portions[int(np.argmin(rows))].name} has no rows; leave the source out")
        weights = np.array([portion.weight for portion in self.portions])
        return np.repeat(weights / weights.sum() / rows, groups)

    def batch(self, step: int) -> Rows:
        """The rows of global batch `step`."""
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, world_size: int) -> Rows:
        """The contiguous slice of global batch `step` that `rank` trains on."""
        epochs, rows = [], []
        for index, first, last in self.columns(rank, world_size):
            source, lane = self._lanes[index]
            base = step * source.columns(lane)
            for epoch, _, begin, shuffled in source.windows(lane, base + first, base + last):
                part = shuffled[max(0, base + first - begin) : base + last - begin]
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

    def _lane_units(self, index: int, first: int, last: int, start_step: int, stop_step: int | None) -> Iterator[Unit]:
        source, lane = self._lanes[index]
        width = source.columns(lane)
        start = start_step * width
        stop = None if stop_step is None else stop_step * width
        for epoch, window, begin, rows in source.windows(lane, start, stop):
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
                yield Unit(index, epoch, window, int(at[0]) // width, part)


def batch_parts(weights: Sequence[float], global_batch: int) -> list[int]:
    """How many rows of every batch each weight means, by largest remainder: none is a whole row off its exact part."""
    exact = [global_batch * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    first = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for i in first[: global_batch - sum(parts)]:
        parts[i] += 1
    return parts


def _check_portions(portions: Sequence[Portion], widths: Sequence[int], sizes: np.ndarray, global_batch: int) -> None:
    groups = np.cumsum([0, *(portion.row_groups for portion in portions)])
    assert groups[-1] == len(sizes)
    for (name, _, weight), width, begin, end in zip(portions, widths, groups, groups[1:], strict=False):
        rows = int(sizes[begin:end].sum())
        if not width:
            raise UserError(
                f"data.train: by its weight {weight:g} {name} has no row in a batch of {global_batch}; raise the weight or "
                "training.global_batch, or leave the source out"
            )
        if rows < width:
            raise UserError(
                f"data.train: by its weight {weight:g} {name} has {width} rows in every batch of {global_batch}, and only "
                f"{rows} in all: a batch would hold the same pair twice; lower the weight or training.global_batch"
            )
