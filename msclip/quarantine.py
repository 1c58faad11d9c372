"""Rows that a run could not use: `quarantine/` in its folder, Parquet parts that are only ever added, each row in one of them.

A later run can leave those rows out from its first step. What it leaves out is then part of its sample order, so it keeps a
copy, `skipped.parquet`: the record that it was given may grow or go.
"""

import hashlib
import io
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from msclip.errors import TrainingError, UserError
from msclip.storage import Folder

if TYPE_CHECKING:
    from msclip.data.decode import BadRow
    from msclip.data.mixture import Mixture

QUARANTINE, SKIPPED = "quarantine", "skipped.parquet"
WORST_SHARDS = 5
"""That a run names when it stops."""
WRITE_EVERY_SECONDS = 60.0
"""More often would leave thousands of small files where many rows are bad."""
SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # the folder of shards, without scheme or keys of a URL
        ("shard", pa.string()),  # name inside it
        ("shard_bytes", pa.int64()),
        ("row_group", pa.int64()),
        ("row", pa.int64()),  # inside the row group
        ("key", pa.string()),
        ("reason", pa.string()),
        ("step", pa.int64()),  # whose batch needed it first
    ]
)


class Quarantine:
    """The record of a run, and its limit. All workers have one and add the same rows; one of them writes.

    Memory: some hundred bytes a bad row.

    Args:
        most: of the rows read, the share that may be bad; a thousand rows are taken for read from the start.
    """

    def __init__(self, run: Folder, most: float, writes: bool = True):
        self._run, self._most, self._writes = run, most, writes
        self._bad, self._read = Counter[str](), 0  # since this start
        self._known = {_place(row) for row in read(run).to_pylist()} if writes else set()
        self._unwritten: list[dict[str, Any]] = []
        self._written_at = -math.inf

    def add(self, bad: Sequence[tuple[int, "BadRow"]], rows_read: int) -> None:
        """Takes note of bad rows, each with its step, among rows that were read. Those on record already are not added again.

        Raises:
            TrainingError: too many were bad.
        """
        self._bad.update(f"{row.source}/{row.shard}" for _, row in bad)
        self._read += rows_read
        for step, row in bad if self._writes else ():
            record = asdict(row) | {"step": step}
            if _place(record) not in self._known:
                self._known.add(_place(record))
                self._unwritten.append(record)
        if time.monotonic() - self._written_at >= WRITE_EVERY_SECONDS:
            self.write()
        if self._bad.total() > self._most * max(1000, self._read):
            worst = ", ".join(f"{shard} ({count:,})" for shard, count in self._bad.most_common(WORST_SHARDS))
            others = f" and {len(self._bad) - WORST_SHARDS:,} more" if len(self._bad) > WORST_SHARDS else ""
            raise TrainingError(
                f"{self._bad.total():,} of {self._read:,} rows read so far could not be used, more than data.max_bad_fraction "
                f"{self._most:g} allows; the worst shards: {worst}{others}. {self._run.url}/{QUARANTINE} has each row with its "
                "reason. Raise the limit and continue with --resume; or start a new run, with the shards repaired or with "
                f"--data.skip_quarantined {self._run.url}"
            )

    def write(self) -> None:
        """Writes what is new, as one more part."""
        if self._unwritten:
            folder = self._run / QUARANTINE
            last = folder.names("*.parquet")[-1:]
            number = 1 + int(last[0].partition(".")[0]) if last else 1
            _write(folder, f"{number:06d}.parquet", pa.Table.from_pylist(self._unwritten, SCHEMA))
            self._unwritten, self._written_at = [], time.monotonic()


def read(run: Folder) -> pa.Table:
    """All rows that a run refused."""
    return _read_parts(run / QUARANTINE)


def skippable(run: str, data: "Mixture") -> tuple[pa.Table, int]:
    """The rows that a run refused or left out and that are in `data`, and how many it has that are not: their shard is
    elsewhere, or has changed since.

    Raises:
        UserError: there is no run.
    """
    folder = Folder(run)
    if not folder.exists("config.yaml"):
        raise UserError(f"data.skip_quarantined must be the folder of an earlier run, got {run!r}, which has no config.yaml")
    record = pa.concat_tables([read_skipped(folder), read(folder)])
    fits = np.array([place is not None for place in _row_ids(record, data)], dtype=bool)
    return record.filter(pa.array(fits)), int((~fits).sum())


def write_skipped(run: Folder, rows: pa.Table) -> None:
    """Keeps what a run leaves out."""
    _write(run, SKIPPED, rows)


def read_skipped(run: Folder) -> pa.Table:
    """What a run leaves out."""
    return pq.read_table(io.BytesIO(run.read_bytes(SKIPPED)), schema=SCHEMA) if run.exists(SKIPPED) else SCHEMA.empty_table()


def row_ids(rows: pa.Table | None, data: "Mixture") -> Int64[np.ndarray, " rows"]:
    """The ids in `data` of recorded rows, sorted; none for `None`.

    Raises:
        UserError: a row is not there.
    """
    ids = _row_ids(rows, data) if rows else []
    if rows and None in ids:
        row = rows.slice(ids.index(None), 1).to_pylist()[0]
        raise UserError(
            f"{row['source']}/{row['shard']}, of which this run leaves out rows, has changed or is no longer in data.train; "
            "start a new run"
        )
    return np.unique(np.array(ids, dtype=np.int64))


def digest(ids: Int64[np.ndarray, " rows"]) -> str | None:
    """Identifies a set of rows; `None` for none."""
    return hashlib.sha256(np.unique(ids).tobytes()).hexdigest() if len(ids) else None


def _row_ids(rows: pa.Table, data: "Mixture") -> list[int | None]:
    first = {}
    for group, place in enumerate(data.row_groups):
        shard = data.shards[place.shard]
        first[data.home(group), shard.file, shard.size, place.row_group] = place.first_row, place.rows
    ids = list[int | None]()
    for row in rows.to_pylist():
        begin, count = first.get((row["source"], row["shard"], row["shard_bytes"], row["row_group"]), (0, 0))
        ids.append(begin + row["row"] if row["row"] < count else None)
    return ids


def _place(row: dict[str, Any]) -> tuple[str, str, int, int, int]:
    return row["source"], row["shard"], row["shard_bytes"], row["row_group"], row["row"]


def _read_parts(folder: Folder) -> pa.Table:
    parts = [pq.read_table(io.BytesIO(folder.read_bytes(name)), schema=SCHEMA) for name in folder.names("*.parquet")]
    return pa.concat_tables(parts) if parts else SCHEMA.empty_table()


def _write(folder: Folder, name: str, table: pa.Table) -> None:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    folder.write_bytes(name, file.getvalue())
