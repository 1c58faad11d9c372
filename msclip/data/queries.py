"""The cap per query by which CLIP's own data set was balanced (arXiv 2103.00020, section 2.2): of the pairs whose text
includes a query, at most 20,000 are taken for it.

A query is in a caption when its words stand there one after another: whole words, whatever their case and the punctuation
around them, so that "cat" is neither in "category" nor missing from "Cat, asleep".
"""

import re
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int64
from pyarrow import fs

from msclip.errors import UserError
from msclip.storage import Folder

_WORD = re.compile(r"\w+")


class Queries:
    """A list of queries, ready to be looked for in captions in one pass over their words."""

    def __init__(self, queries: Iterable[str]):
        words = (tuple(_WORD.findall(query.casefold())) for query in queries)
        self._ids = {query: number for number, query in enumerate(dict.fromkeys(query for query in words if query))}
        self._lengths = sorted({len(query) for query in self._ids})

    @classmethod
    def read(cls, file: str) -> "Queries":
        """From a text file with a query in each line; the same query again, and blank lines, change nothing.

        Raises:
            UserError: no such file, not UTF-8, or no query in it.
        """
        place = Folder(file)
        kind = place.filesystem.get_file_info(place.path).type
        if kind != fs.FileType.File:
            what = "a folder" if kind == fs.FileType.Directory else "not found"
            raise UserError(f"queries must be a text file with a query in each line, got {file!r}: {what}")
        try:
            with place.filesystem.open_input_file(place.path) as stream:
                queries = cls(stream.read().decode("utf-8-sig").splitlines())
        except UnicodeDecodeError as error:
            raise UserError(f"queries {file!r} is not in UTF-8: {error}") from None
        if not len(queries):
            raise UserError(f"queries {file!r} holds no query; write one in each line")
        return queries

    def __len__(self) -> int:
        return len(self._ids)

    def matches(self, captions: Iterable[str]) -> list[int]:
        """Numbers of the queries that any of the captions includes, ascending."""
        found = set()
        for caption in captions:
            words = _WORD.findall(caption.casefold())
            for length in self._lengths:
                for start in range(len(words) - length + 1):
                    number = self._ids.get(tuple(words[start : start + length]))
                    if number is not None:
                        found.add(number)
        return sorted(found)


def within_cap(
    row: Int64[np.ndarray, " matches"],
    query: Int64[np.ndarray, " matches"],
    rank: Int64[np.ndarray, " rows"],
    cap: int,
) -> Bool[np.ndarray, " rows"]:
    """Which rows stay: those that are among the first `cap` rows, by rank, of at least one query that they match.

    Args:
        row: of each match of a row and a query.
        query: of each match likewise.
        rank: the place of each row in an order drawn by lot; no two rows share one.
    """
    order = np.lexsort((rank[row], query))
    ordered = query[order]
    first = np.searchsorted(ordered, ordered)  # where the query's run begins
    stays = np.zeros(len(rank), bool)
    stays[row[order][np.arange(len(order)) - first < cap]] = True
    return stays
