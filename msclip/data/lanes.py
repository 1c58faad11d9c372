"""One set of row groups as an endless shuffled stream, read in lanes side by side; `msclip.data.plan` puts batches together.

An epoch is all row groups in random order, cut into `lanes` contiguous segments. A lane's stream is its segments of epochs
0, 1, 2, ..., shuffled inside windows of a few row groups. Any place of it is found without what came before.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

UNIT_ROWS = 256
"""Decoded at 224 pixels a side, 37 MiB: small enough to be one block of Ray Data, large enough to be one task."""

_WHOLE_SHUFFLE_ROWS = 32_768
"""Up to here all rows of a lane are shuffled together. Its row groups are read again for every unit (at most 8 times), from
the memory cache of a reader that holds 1 to 2 GB of photos."""


class Window(NamedTuple):
    """Rows of a lane that are shuffled together."""

    epoch: int
    """With `odds` a number of the window's own, at least 2**32 * the epoch."""
    first_group: int
    """Position of its first row group in the epoch's order of row groups."""
    begin: int
    """Where in the lane's stream its first row is."""
    row: Int64[np.ndarray, " rows"]
    """Row ids, in the order of use."""


def default_lanes(rows: int, width: int, unit_rows: int = UNIT_ROWS) -> int:
    """A power of two, so that the usual numbers of workers cut no lane.

    At least 16 rows a step for each lane: a rank holds one unit a lane, then at most 16 of its batches. And at least 4 units
    an epoch in each lane: on a few thousand rows more lanes would only mean smaller reads.
    """
    most = min(width // 16, rows // (4 * unit_rows))
    return 1 << (most.bit_length() - 1) if most else 1


def default_window(rows: int, row_groups: int, lanes: int, unit_rows: int = UNIT_ROWS) -> int:
    """Every row group of a lane's segment for a small data set, else 1: then a row group is read about once an epoch."""
    small = rows <= min(_WHOLE_SHUFFLE_ROWS, lanes * 8 * unit_rows)
    return row_groups if small else 1


class Lanes:
    """The lanes of one set of rows.

    Each row comes once in each epoch, and all lanes reach the end of an epoch within one row of each other.

    Memory: three int64 a row group for each of the four last used epochs (40 MB for 400,000 row groups), and the shuffled
    rows of the windows in use, 8 bytes a row.

    Args:
        sizes: rows in each row group, the ones to be left out not counted.
        first_row: id of the first row, if none were left out.
        skipped: sorted ids of the rows that are left out.
        width: rows that all lanes together give to a batch.
        key: of the random numbers, after the seed and the purpose.
        odds: draws the row groups of an epoch with replacement, each as often as its number says in proportion to the others'.
            An epoch is then as many rows as there are, of which some come several times and others not at all. None: each
            row group comes once.
    """

    def __init__(
        self,
        sizes: Int64[np.ndarray, " groups"],
        first_row: int,
        skipped: Int64[np.ndarray, " skipped"],
        width: int,
        seed: int,
        key: tuple[int, ...],
        lanes: int,
        window: int,
        odds: Float64[np.ndarray, " groups"] | None = None,
    ):
        self.sizes, self.width, self.lanes, self.window = sizes, width, lanes, window
        self.rows = int(sizes.sum())
        self._id, self._seed, self._key = first_row, seed, key
        # How many of the rows that are kept precede each one that is left out.
        self._kept_before = skipped - first_row - np.arange(len(skipped))
        self._first_row = np.cumsum(sizes) - sizes
        self._odds = None if odds is None else np.cumsum(odds * (sizes > 0)) / np.sum(odds * (sizes > 0))
        # Of `width` columns, [edge[l], edge[l + 1]) belong to lane l.
        self._edge = [width * lane // lanes for lane in range(lanes + 1)]
        self._epoch_order = lru_cache(maxsize=4)(self._make_epoch_order)
        self._window_rows = lru_cache(maxsize=4 * lanes)(self._make_window_rows)

    def columns(self, lane: int) -> int:
        """Rows that a lane gives to each batch."""
        return self._edge[lane + 1] - self._edge[lane]

    def windows(self, lane: int, start: int, stop: int | None) -> Iterator[Window]:
        """The windows that hold positions start to stop of a lane's stream (`None`: without end)."""
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
            # Of a row group that is drawn twice in an epoch, crops and captions are drawn twice too.
            turn = epoch if self._odds is None else epoch << 32 | window
            yield Window(turn, window, begin + low - left, self._window_rows(epoch, window, until, low, high))
            position = begin + high - left

    def _make_epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's row groups in order, and where in the concatenation of their rows each ends."""
        if self._odds is None:
            order = _permutation(len(self.sizes), self._seed, 0, epoch, *self._key)
            return order, np.cumsum(self.sizes[order])
        bits = _bits(self._seed, 0, epoch, *self._key)
        order, ends = np.zeros(0, np.int64), np.zeros(1, np.int64)
        while ends[-1] < self.rows:
            drawn = np.searchsorted(self._odds, bits.random_raw(len(self.sizes)) / 2.0**64, side="right")
            order = np.append(order, np.minimum(drawn, len(self.sizes) - 1))
            ends = np.cumsum(self.sizes[order])
        count = int(np.searchsorted(ends, self.rows)) + 1
        return order[:count], ends[:count]

    def _make_window_rows(self, epoch: int, window: int, until: int, low: int, high: int) -> np.ndarray:
        """Positions low to high of the epoch's order, which lie in its row groups window to until, shuffled."""
        order, ends = self._epoch_order(epoch)
        pieces = []
        for group, end in zip(order[window:until], ends[window:until], strict=True):
            begin = end - self.sizes[group]
            shift = self._first_row[group] - begin
            pieces.append(np.arange(max(low, begin) + shift, min(high, end) + shift))
        rows = np.concatenate(pieces)
        rows = rows[_permutation(len(rows), self._seed, 1, epoch, low, *self._key)]
        rows += self._id + np.searchsorted(self._kept_before, rows, side="right")
        rows.flags.writeable = False  # it is cached
        return rows

    # An epoch's segment of a lane is in proportion to the lane's part of the width. The part of a row that rounding leaves
    # over is carried to the next epoch, so that lanes never drift apart: after e epochs lane l has given
    # floor(e * rows * edge[l + 1] / width) - floor(e * rows * edge[l] / width) rows.

    def _given(self, edge: int, epochs: int) -> int:
        return epochs * self.rows * self._edge[edge] // self.width

    def _segment_edge(self, edge: int, epoch: int) -> int:
        return self._given(edge, epoch + 1) - self._given(edge, epoch)

    def _stream_start(self, lane: int, epoch: int) -> int:
        return self._given(lane + 1, epoch) - self._given(lane, epoch)

    def _epoch_at(self, lane: int, position: int) -> int:
        epoch = position * self.width // (self.rows * self.columns(lane))
        while self._stream_start(lane, epoch) > position:
            epoch -= 1
        while self._stream_start(lane, epoch + 1) <= position:
            epoch += 1
        return epoch


def _permutation(n: int, *key: int) -> np.ndarray:
    """A random order of range(n).

    By sorting raw bits: NumPy keeps those equal over its versions, but not `Generator.permutation`.
    """
    return np.argsort(_bits(*key).random_raw(n), kind="stable")


def _bits(*key: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(key))
