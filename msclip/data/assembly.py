"""Which rows of which unit make up each batch of a rank, checked against the plan, and the work that is in them."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from msclip.data.decode import Encoded
from msclip.data.plan import Plan, Unit
from msclip.data.pool import Work


class Piece(NamedTuple):
    """Rows `first` to `last` of a unit, which follow each other in a batch."""

    unit: Encoded
    first: int
    last: int

    @property
    def begin(self) -> int:
        """Where its first file begins."""
        return int(self.unit.ends[self.first - 1]) if self.first else 0

    @property
    def files(self) -> np.ndarray:
        """Its files' bytes."""
        return self.unit.files[self.begin : self.unit.ends[self.last - 1]]

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each file."""
        return np.diff(self.unit.ends[self.first : self.last], prepend=self.begin)


def pieces_of_batches(
    plan: Plan, rank: int, world_size: int, start_step: int, stop_step: int | None, units: Iterable[Encoded]
) -> Iterator[tuple[int, list[Piece]]]:
    """What each batch of a rank is made of, in the order of its rows.

    Raises:
        RuntimeError: a unit is missing, another one came in its place, or one is left over.
    """
    lanes = [(lane, last - first) for lane, first, last in plan.columns(rank, world_size)]
    held: dict[int, deque[Piece]] = {lane: deque() for lane, _ in lanes}
    arriving = iter(units)
    expected = plan.units(rank, world_size, start_step, stop_step)
    upcoming = next(expected, None)
    for step in itertools.count(start_step):
        if step == stop_step:
            break
        while upcoming is not None and upcoming.first_step <= step:
            encoded = next(arriving, None)
            _check(encoded, upcoming)
            assert encoded is not None
            held[upcoming.lane].append(Piece(encoded, 0, len(encoded.row)))
            upcoming = next(expected, None)
        pieces = []
        for lane, width in lanes:
            while width:
                unit, first, last = held[lane].popleft()
                cut = min(last, first + width)
                pieces.append(Piece(unit, first, cut))
                width -= cut - first
                if cut < last:
                    held[lane].appendleft(Piece(unit, cut, last))
        yield step, pieces
    extra = next(arriving, None)
    if extra is not None:
        raise RuntimeError(f"the data stream holds a unit after the last of step {stop_step}: rows {short(extra.row)}")


def _check(encoded: Encoded | None, unit: Unit) -> None:
    if encoded is None:
        raise RuntimeError(f"the data stream ended before {unit}")
    if encoded.epoch != unit.epoch or not np.array_equal(encoded.row, unit.row):
        raise RuntimeError(
            f"the data stream brought rows {short(encoded.row)} of epoch {encoded.epoch} where the plan has {unit} with rows "
            f"{short(unit.row)}"
        )
    if not len(encoded.ends) == len(encoded.captions) == len(unit.row) or len(encoded.files) != encoded.ends[-1]:
        raise RuntimeError(
            f"the data stream brought {len(encoded.ends)} images in {len(encoded.files)} bytes and {len(encoded.captions)} "
            f"captions for the {len(unit.row)} rows of {unit}"
        )


def short(rows: np.ndarray) -> str:
    """A few of many row ids, for a message."""
    return f"{rows[:4].tolist()}{'...' if len(rows) > 4 else ''} ({len(rows)})"


def check_rows(plan: Plan, step: int, rank: int, world_size: int, pieces: list[Piece]) -> np.ndarray:
    """The row ids of a batch.

    Raises:
        RuntimeError: they are not the plan's.
    """
    planned = plan.share(step, rank, world_size)
    rows = np.concatenate([unit.row[first:last] for unit, first, last in pieces])
    if not np.array_equal(rows, planned.row):
        raise RuntimeError(f"batch {step} of rank {rank} has rows {short(rows)} where the plan has {short(planned.row)}")
    return rows


def works_of_batch(slot: int, pieces: list[Piece], most_rows: int) -> list[Work]:
    """A batch, to be decoded in `slot`, cut into works of at most `most_rows` rows."""
    groups: list[list[Piece]] = [[]]
    room = most_rows
    for unit, first, last in pieces:
        while first < last:
            if not room:
                groups.append([])
                room = most_rows
            cut = min(last, first + room)
            groups[-1].append(Piece(unit, first, cut))
            room, first = room - (cut - first), cut
    works, at = [], 0
    for group in groups:
        work = Work(
            slot,
            at,
            np.concatenate([np.full(last - first, unit.epoch, np.int64) for unit, first, last in group]),
            np.concatenate([unit.row[first:last] for unit, first, last in group]),
            np.concatenate([piece.sizes for piece in group]),
            [caption for unit, first, last in group for caption in unit.captions[first:last]],
            [piece.files for piece in group if len(piece.files)],
        )
        works.append(work)
        at += len(work.row)
    return works
