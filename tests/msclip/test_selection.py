"""Which rows stay when all are known."""

from typing import get_args

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from msclip.data.selection import Deduplicate, Fate, Hashes, cap_queries, find_duplicates

Pair = tuple[int, int | None]


def rows(*pairs: Pair) -> Hashes:
    """Each row as the number of its content and its perceptual hash."""
    return Hashes(
        np.array([b"%031d." % content for content, _ in pairs], "S32"),
        np.array([phash or 0 for _, phash in pairs], np.uint64),
        np.array([phash is not None for _, phash in pairs], bool),
    )


A, A_NEAR, B, C = (1, 0xFF00), (2, 0xFF01), (3, 0x1234_5678_9ABC), (4, 0xFFFF_0000_FFFF)


def test_nothing_goes_unasked() -> None:
    assert find_duplicates(rows(A, A, A_NEAR), rows(A), rows()).fate.tolist() == [Fate.STAYS] * 3


def test_the_first_stays_and_present_rows_come_before_new_ones() -> None:
    found = find_duplicates(rows(A, B, A, A_NEAR, C), rows(C, C), rows(), "exact")
    assert found.fate.tolist() == [Fate.STAYS, Fate.STAYS, Fate.DUPLICATE, Fate.STAYS, Fate.DUPLICATE]
    assert found.because_of.tolist() == [-1, -1, 2, -1, 0]
    found = find_duplicates(rows(A, B, A, A_NEAR, C), rows(C), rows(), "near", 1)
    assert found.fate.tolist() == [Fate.STAYS, Fate.STAYS, Fate.DUPLICATE, Fate.NEAR, Fate.DUPLICATE]
    assert found.because_of.tolist() == [-1, -1, 1, 1, 0]


def test_repetitions_of_what_goes_as_near_go_too() -> None:
    found = find_duplicates(rows(A, A_NEAR, A_NEAR), rows(), rows(), "near", 1)
    assert found.fate.tolist() == [Fate.STAYS, Fate.NEAR, Fate.NEAR]
    assert found.because_of.tolist() == [-1, 0, 0]


def test_evaluation_rows_go_exactly_and_nearly_whether_or_not_duplicates_do() -> None:
    for how in get_args(Deduplicate):
        found = find_duplicates(rows(A, A_NEAR, B, C), rows(A), rows(B, A), how, 1)
        assert found.fate.tolist() == [Fate.EVALUATION, Fate.EVALUATION, Fate.EVALUATION, Fate.STAYS]
        assert found.because_of.tolist() == [1, 1, 0, -1]
    assert find_duplicates(rows(A_NEAR), rows(), rows(A), distance=0).fate.tolist() == [Fate.STAYS]


def test_flat_pictures_are_only_ever_exact_duplicates() -> None:
    flat, other = (8, None), (9, None)
    found = find_duplicates(rows(flat, other, flat), rows(), rows((7, None)), "near", 10)
    assert found.fate.tolist() == [Fate.STAYS, Fate.STAYS, Fate.DUPLICATE]


some = st.lists(st.integers(0, 5), max_size=12)
hashes = st.lists(st.sampled_from([None, 0, 1, 3, 7, 2**40]), min_size=6, max_size=6)


@given(some, some, some, hashes, st.sampled_from(["exact", "near"]))
def test_what_stays_repeats_nothing_and_what_goes_repeats_something(
    new_files: list[int], present_files: list[int], evaluation_files: list[int], phash: list[int | None], how: Deduplicate
) -> None:
    new, present, evaluation = ([(i, phash[i]) for i in files] for files in (new_files, present_files, evaluation_files))
    found = find_duplicates(rows(*new), rows(*present), rows(*evaluation), how, 1)
    every = [*evaluation, *present, *new]
    stays = [*([True] * (len(every) - len(new))), *(found.fate == Fate.STAYS)]

    def repeats(i: int, j: int) -> bool:
        one, other = every[i], every[j]
        close = one[1] is not None and other[1] is not None and (one[1] ^ other[1]).bit_count() <= 1
        return one[0] == other[0] or ((how == "near" or j < len(evaluation)) and close)

    for i in range(len(every) - len(new), len(every)):
        earlier = [j for j in range(i) if stays[j] and repeats(i, j)]
        assert bool(earlier) != stays[i]


def test_the_cap_counts_present_rows_and_what_duplicates_leave_behind() -> None:
    fates = find_duplicates(rows(A, B, C, A, (5, 9), (6, 10)), rows((7, 0)), rows(), "exact")
    assert fates.fate.tolist() == [0, 0, 0, Fate.DUPLICATE, 0, 0]
    # Query 0: present row, new rows 0, 1, 2. Query 1: row 3, whose place row 0 has taken, and row 4. Row 5 matches nothing.
    new = (np.array([0, 1, 2, 3, 4]), np.array([0, 0, 0, 1, 1]))
    present = (np.array([0]), np.array([0]))
    rank = np.array([5, 4, 3, 2, 1, 0])
    capped = cap_queries(fates, new, present, (0, 1), rank, 2)
    assert capped.fate.tolist() == [Fate.STAYS, Fate.CAP, Fate.STAYS, Fate.DUPLICATE, Fate.STAYS, Fate.NO_QUERY]
    capped = cap_queries(fates, new, present, (0, 1), rank, 1)
    assert capped.fate.tolist() == [Fate.CAP, Fate.CAP, Fate.CAP, Fate.DUPLICATE, Fate.STAYS, Fate.NO_QUERY]
