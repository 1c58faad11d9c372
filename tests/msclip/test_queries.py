"""Queries in captions, and the cap on what is taken for each."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msclip.data.queries import Queries, within_cap
from msclip.errors import UserError


def test_a_query_is_found_as_whole_words_in_any_case() -> None:
    queries = Queries(["cat", "New York", "élan", "cat", "  ", "york city"])
    assert len(queries) == 4
    assert queries.matches(["A category."]) == []
    assert queries.matches(["Cat, asleep"]) == [0]
    assert queries.matches(["a street in new  york: rain"]) == [1]
    assert queries.matches(["new in york"]) == []
    assert queries.matches(["ÉLAN in New York City", "my cat's bed"]) == [0, 1, 2, 3]


def test_a_file_of_queries_must_hold_some(tmp_path: Path) -> None:
    file = tmp_path / "queries.txt"
    file.write_text("\ufeffdog\n\nred car\r\n", encoding="utf-8")
    assert Queries.read(str(file)).matches(["a red car", "dog"]) == [0, 1]
    file.write_text("\n ,\n")
    with pytest.raises(UserError, match="holds no query"):
        Queries.read(str(file))
    file.write_bytes("Bär\n".encode("latin-1"))
    with pytest.raises(UserError, match="not in UTF-8"):
        Queries.read(str(file))
    with pytest.raises(UserError, match="not found"):
        Queries.read(str(tmp_path / "none.txt"))


def test_a_rare_query_keeps_what_a_frequent_one_would_drop() -> None:
    # Rows 0 to 4 match query 0; row 4, last by lot, matches query 1 too.
    row, query = np.array([0, 1, 2, 3, 4, 4]), np.array([0, 0, 0, 0, 0, 1])
    rank = np.array([3, 0, 1, 2, 5, 4])
    assert within_cap(row, query, rank, 2).tolist() == [False, True, True, False, True, False]


@given(st.lists(st.sets(st.integers(0, 4)), max_size=30), st.integers(1, 8), st.integers(0, 9))
def test_each_query_keeps_its_cap_of_rows_and_no_row_stays_without_one(rows: list[set[int]], cap: int, seed: int) -> None:
    pairs = [(i, q) for i, queries in enumerate(rows) for q in sorted(queries)]
    row, query = (np.array([pair[part] for pair in pairs], np.int64) for part in (0, 1))
    rank = np.random.default_rng(seed).permutation(len(rows))
    stays = within_cap(row, query, rank, cap)
    chosen = set()
    for number in range(5):
        chosen |= set(sorted((i for i, q in pairs if q == number), key=lambda i: rank[i])[:cap])
    assert set(np.flatnonzero(stays).tolist()) == chosen
