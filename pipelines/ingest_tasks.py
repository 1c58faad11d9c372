"""What ingest does on the workers: verify rows, write shards, count. Apart from the job, so that tasks find it by name."""

import errno
import hashlib
import io
import json
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from msclip.data.captions import Refused
from msclip.data.images import BadImage, open_image
from msclip.data.shards import SCHEMA, Shard
from msclip.data.sources import Row, Source
from msclip.errors import TrainingError, UserError
from msclip.storage import Folder

SHARDS = "shards"
_BLOCK_ROWS, _BLOCK_BYTES = 256, 32 * 2**20  # what a task hands on, or counts, at a time
_JPEG_QUALITY = 92

# A verified row: SCHEMA's columns, where it goes, and for a bad one, whose image is null, its quarantine record.
_VERIFIED = pa.schema([*SCHEMA, ("position", pa.int64()), ("shard", pa.int64()), ("refused", pa.string())])


class Tally:
    """An actor that counts rows verified, rows refused and shards written. Retried tasks count once."""

    def __init__(self) -> None:
        self.verified: dict[int, tuple[int, int]] = {}
        self.shards: set[int] = set()
        self.error: UserError | None = None

    def count(self, first: int, rows: int, refused: int) -> None:
        """A stretch of rows that begins at a position of its own."""
        self.verified[first] = rows, refused

    def wrote(self, shard: int) -> None:
        self.shards.add(shard)

    def fail(self, error: UserError) -> None:
        """Why a task is about to fail: what Ray hands on of its exception is only text."""
        self.error = self.error or error

    def failure(self) -> UserError | None:
        return self.error

    def totals(self) -> tuple[int, int, int]:
        """Rows verified, of those refused, shards written."""
        rows, refused = np.sum(list(self.verified.values()), axis=0) if self.verified else (0, 0)
        return int(rows), int(refused), len(self.shards)


class Written(NamedTuple):
    """What became of the rows of one shard."""

    number: int
    shard: Shard | None
    """None where no row was good."""
    sources: dict[str, int]
    refused: list[Refused]


@dataclass(frozen=True)
class Work:
    """What every task of one ingest knows."""

    source: Source
    output: Folder
    shard_rows: int
    row_group_rows: int
    short_side: int | None
    tally: Any
    """Handle of the `Tally` actor."""

    def read(self, unit: pa.Table) -> Iterator[pa.Table]:
        """Verified rows of some places, in blocks of bounded size."""
        with self._failures():
            for block in self._verified(unit):
                yield pa.Table.from_pylist(block, _VERIFIED)

    def write(self, rows: pa.Table) -> pa.Table:
        """One shard from its verified rows in any order."""
        order = np.argsort(rows["position"].to_numpy())
        # Row by row: `take` may fail where a shard's images exceed the 2 GiB of one Arrow array.
        lines = ({name: rows[name][int(i)].as_py() for name in _VERIFIED.names} for i in order)
        return self._write(rows["shard"][0].as_py(), lines)

    def read_and_write(self, unit: pa.Table) -> pa.Table:
        """One shard from its places, in their order; at no time all of it in memory."""
        number = unit["position"][0].as_py() // self.shard_rows
        return self._write(number, (line for block in self._verified(unit) for line in block))

    def _verified(self, unit: pa.Table) -> Iterator[list[dict[str, Any]]]:
        block: list[dict[str, Any]] = []
        size = 0
        for position, row in zip(unit["position"].to_pylist(), self.source.read(unit), strict=True):
            image, reason = verify(row, self.short_side)
            place = {"position": position, "shard": position // self.shard_rows}
            if reason:
                record = asdict(row.refused) | {"reason": reason}
                block.append({"image": None, "refused": json.dumps(record, ensure_ascii=False), **place})
            else:
                content = {"image": image, "captions": row.captions, "key": row.key, "source": row.source}
                block.append({**content, "refused": None, **place})
                size += len(image)
            if len(block) >= _BLOCK_ROWS or size >= _BLOCK_BYTES:
                yield self._counted(block)
                block, size = [], 0
        if block:
            yield self._counted(block)

    def _counted(self, block: list[dict[str, Any]]) -> list[dict[str, Any]]:
        bad = sum(line["refused"] is not None for line in block)
        self.tally.count.remote(block[0]["position"], len(block), bad)
        return block

    def _write(self, number: int, lines: Iterable[dict[str, Any]]) -> pa.Table:
        with self._failures():
            file = f"{SHARDS}/{number:05d}.parquet"
            shard, sources, refused = write_shard(lines, file, self.output, self.row_group_rows)
        self.tally.wrote.remote(number)
        written = Written(number, shard, dict(sources), refused)
        return pa.table({"written": [pickle.dumps(written)]})

    @contextmanager
    def _failures(self) -> Iterator[None]:
        import ray

        try:
            yield
        except UserError as error:
            ray.get(self.tally.fail.remote(error))
            raise
        except OSError as error:
            where = f"from input or to {self.output.url}"
            cure = "no space is left; free some" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to the storage"
            told = TrainingError(f"cannot copy {where}: {error}; {cure} and ingest again")
            ray.get(self.tally.fail.remote(told))
            raise


def verify(row: Row, short_side: int | None = None) -> tuple[bytes, str]:
    """The bytes to store, or why there are none.

    Args:
        short_side: a longer shorter side is scaled down to this, bicubic, and stored as JPEG over white.
    """
    if row.image is None or row.refused.reason:
        return b"", row.refused.reason
    try:
        image = open_image(row.image)
    except BadImage as error:
        return b"", str(error)
    least = min(image.size)
    if short_side is None or least <= short_side:
        return row.image, ""
    width, height = (max(1, round(side * short_side / least)) for side in image.size)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue(), ""


def write_shard(
    lines: Iterable[dict[str, Any]], file: str, output: Folder, row_group_rows: int
) -> tuple[Shard | None, Counter[str], list[Refused]]:
    """Writes the good ones of the lines, row group by row group; no file where there are none.

    Returns:
        the shard, how many rows each source has, and the records of the bad ones.
    """
    refused: list[Refused] = []
    sources: Counter[str] = Counter()
    group: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "shard.parquet"
        # Image files hardly compress; the other columns do.
        compression = {name: "NONE" if name == "image" else "ZSTD" for name in ("image", "key", "source")}
        compression["captions.list.element"] = "ZSTD"
        with pq.ParquetWriter(local, SCHEMA, compression=compression, use_dictionary=["source"]) as writer:
            for line in lines:
                if line["refused"] is not None:
                    refused.append(Refused(**json.loads(line["refused"])))
                    continue
                sources[line["source"]] += 1
                group.append({name: line[name] for name in SCHEMA.names})
                if len(group) == row_group_rows:
                    writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=row_group_rows)
                    group = []
            if group:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=row_group_rows)
        if not sources:
            return None, sources, refused
        with local.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        output.upload(local, file)
    return Shard.read(output, file, digest), sources, refused
