"""Which of all rows stay, by what only a look at all of them tells: evaluation sets, duplicates, the cap per query.

A function of hashes and of the source order, so the same input gives the same selection wherever its parts were read.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt64

from msclip.data.hashes import leaders
from msclip.data.queries import within_cap

Deduplicate = Literal["none", "exact", "near"]


class Hashes(NamedTuple):
    """Of some rows, in their order."""

    sha256: Shaped[np.ndarray, " rows"]
    """dtype S32."""
    phash: UInt64[np.ndarray, " rows"]
    has_phash: Bool[np.ndarray, " rows"]
    """False for flat pictures, which are near to none."""


def _joined(parts: Sequence[Hashes]) -> Hashes:
    return Hashes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class Fate(IntEnum):
    """What becomes of a row."""

    STAYS = 0
    EVALUATION = 1
    DUPLICATE = 2
    NEAR = 3
    NO_QUERY = 4
    CAP = 5


class Fates(NamedTuple):
    """What becomes of the new rows."""

    fate: Int64[np.ndarray, " new"]
    """`Fate`s."""
    because_of: Int64[np.ndarray, " new"]
    """For the first three reasons to go, the row in evaluation, present and new rows together; else -1."""


def find_duplicates(
    new: Hashes, present: Hashes, evaluation: Hashes, deduplicate: Deduplicate = "none", distance: int = 4
) -> Fates:
    """Finds new rows that are in the evaluation sets, or that repeat a row.

    Of rows that repeat each other the first stays, where rows that are present already come before all new ones.

    Args:
        present: rows of the data set that the new ones are added to.
        evaluation: rows that no new row may repeat, exactly or nearly.
        distance: nearly means perceptual hashes that differ in at most this many of 64 bits.
    """
    known = _joined((evaluation, present))
    every = _joined((known, new))
    index = np.arange(len(every.sha256))
    _, first, which = np.unique(every.sha256, return_index=True, return_inverse=True)
    same = np.where(first[which] < index, first[which], -1)
    near = np.full(len(index), -1, np.int64)
    if deduplicate == "near" or len(evaluation.sha256):
        pictured = np.flatnonzero(every.has_phash)
        found = leaders(every.phash[pictured], distance, int(np.sum(pictured < len(known.sha256))))
        near[pictured] = np.where(found >= 0, pictured[found], -1)
    fate, because_of = np.full(len(index), Fate.STAYS, np.int64), np.full(len(index), -1, np.int64)
    if deduplicate == "near":
        fate[near >= 0], because_of[near >= 0] = Fate.NEAR, near[near >= 0]
    if deduplicate != "none":
        # The first of its kind may itself have gone as near to another row; then this row went with it, above.
        exact = (same >= 0) & ((fate[same] == Fate.STAYS) | (same < len(known.sha256)))
        fate[exact], because_of[exact] = Fate.DUPLICATE, same[exact]
    for found in (near, same):
        contaminated = (found >= 0) & (found < len(evaluation.sha256))
        fate[contaminated], because_of[contaminated] = Fate.EVALUATION, found[contaminated]
    return Fates(fate[len(known.sha256) :], because_of[len(known.sha256) :])


def cap_queries(
    fates: Fates,
    new: tuple[Int64[np.ndarray, " matches"], Int64[np.ndarray, " matches"]],
    present: tuple[Int64[np.ndarray, " others"], Int64[np.ndarray, " others"]],
    counts: tuple[int, int],
    rank: Int64[np.ndarray, " new"],
    cap: int,
) -> Fates:
    """Sends away what is over the cap of every query that it matches, or matches none.

    Args:
        new: row and query of each match of the new rows. What matched a row that goes as a duplicate counts for the row that
            stays in its place.
        present: the same of rows that are in the data set already, which were there first.
        counts: how many rows the evaluation sets and the present data have.
        rank: the place of each new row in an order drawn by lot.
    """
    evaluated, there = counts
    row, query = new
    heir = np.where(fates.fate == Fate.DUPLICATE, fates.because_of - evaluated - there, np.arange(len(rank)))
    row = heir[row]
    counted = (row >= 0) & (fates.fate[row] == Fate.STAYS)
    pairs = np.unique(np.stack([row[counted] + there, query[counted]]), axis=1)
    stays = within_cap(
        np.concatenate([present[0], pairs[0]]),
        np.concatenate([present[1], pairs[1]]),
        np.concatenate([np.arange(there), there + rank]),
        cap,
    )[there:]
    matched = np.zeros(len(rank), bool)
    matched[pairs[0] - there] = True
    left = fates.fate == Fate.STAYS
    fate = fates.fate.copy()
    fate[left & ~stays] = Fate.CAP
    fate[left & ~matched] = Fate.NO_QUERY
    return Fates(fate, fates.because_of)
