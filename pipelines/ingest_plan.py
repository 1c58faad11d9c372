"""What the driver decides when all rows are known: which stay, in what order, in which shard, and what is said of the rest."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from msclip.data.captions import Refused
from msclip.data.selection import Deduplicate, Fate, Hashes, cap_queries, find_duplicates
from pipelines.ingest_tasks import MOST_CAPTIONS, Place

_WORDS = {
    Fate.EVALUATION: "in an evaluation set: {}",
    Fate.DUPLICATE: "duplicate: of {}",
    Fate.NEAR: "near duplicate: of {}",
    Fate.NO_QUERY: "matches no query",
    Fate.CAP: "over the cap of its queries",
}


class Decision:
    """What becomes of every row read.

    Args:
        rows: all of them, as `PREPARED`, in source order.
        present: rows of the data set that these are added to, as `KNOWN`; only as far as the settings ask for them.
        evaluation: rows that none of these may repeat, likewise.
        cap: rows of each query; None where there are no queries.
    """

    def __init__(
        self,
        rows: pa.Table,
        present: pa.Table,
        evaluation: pa.Table,
        deduplicate: Deduplicate,
        distance: int,
        cap: int | None,
        seed: int | None,
    ):
        self.rows, self.seed = rows, seed
        self.good = np.flatnonzero(rows["offset"].is_valid().to_numpy())
        self.others = [*evaluation["key"].to_pylist(), *present["key"].to_pylist()]
        new = rows.take(pa.array(self.good))
        self.fates = find_duplicates(_hashes(new), _hashes(present), _hashes(evaluation), deduplicate, distance)
        if cap is not None:
            lot = np.random.default_rng([seed or 0, 1]).permutation(len(self.good))
            counts = len(evaluation), len(present)
            self.fates = cap_queries(self.fates, _matches(new), _matches(present), counts, lot, cap)

    def order(self) -> Int64[np.ndarray, " staying"]:
        """Indices of the rows that stay, in the order of the shards: shuffled over the whole input by the seed."""
        count = len(self.rows)
        order = np.argsort(np.random.default_rng(self.seed).permutation(count)) if self.seed is not None else np.arange(count)
        stays = np.zeros(count, bool)
        stays[self.good[self.fates.fate == Fate.STAYS]] = True
        return order[stays[order]]

    def shards(self, most_rows: int, most_bytes: int) -> list[list[list[Place]]]:
        """The places of each shard's rows; with each the places of its exact duplicates, whose captions it takes."""
        duplicates: dict[int, list[int]] = {}
        for index in np.flatnonzero(self.fates.fate == Fate.DUPLICATE).tolist():
            stays = int(self.fates.because_of[index]) - len(self.others)
            if stays >= 0 and len(duplicates.setdefault(int(self.good[stays]), [])) < MOST_CAPTIONS:
                duplicates[int(self.good[stays])].append(int(self.good[index]))
        units, offsets, sizes = (self.rows[name].to_numpy() for name in ("unit", "offset", "size"))
        shards: list[list[list[Place]]] = []
        size = most_bytes
        for index in self.order().tolist():
            size += int(sizes[index])
            if size > most_bytes or len(shards[-1]) == most_rows:
                shards.append([])
                size = int(sizes[index])
            shards[-1].append(
                [Place(int(units[i]), int(offsets[i]), int(sizes[i])) for i in (index, *duplicates.get(index, ()))]
            )
        return shards

    def refused(self) -> Iterator[Refused]:
        """A record of every row that does not stay, in source order."""
        fate = np.full(len(self.rows), -1, np.int64)
        fate[self.good] = self.fates.fate
        because_of = np.full(len(self.rows), -1, np.int64)
        because_of[self.good] = self.fates.because_of
        for index in np.flatnonzero(fate != Fate.STAYS).tolist():
            file, row, group, key, reason = (
                self.rows[name][index].as_py() for name in ("file", "row", "row_group", "key", "reason")
            )
            other = int(because_of[index])
            yield Refused(file, row, group, key, reason or _WORDS[Fate(fate[index])].format(self._key(other)))

    def _key(self, other: int) -> str:
        if other < len(self.others):
            return str(self.others[other]) if other >= 0 else ""
        return str(self.rows["key"][int(self.good[other - len(self.others)])].as_py())


def write_records(records: Iterator[Refused], path: Path) -> Counter[str]:
    """Writes records as JSON Lines; how many there are for each reason."""
    counts: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            counts[record.reason.partition(":")[0]] += 1
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
    return counts


def _hashes(table: pa.Table) -> Hashes:
    sha256 = np.array(table["sha256"].to_pylist(), "S32") if len(table) else np.zeros(0, "S32")
    phash = table["phash"]
    return Hashes(sha256, phash.fill_null(0).to_numpy(), phash.is_valid().to_numpy())


def _matches(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    lists = table["queries"].combine_chunks()
    counts = np.diff(lists.offsets.to_numpy()) if len(table) else np.zeros(0, np.int64)
    return np.repeat(np.arange(len(table)), counts), lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
