"""What ingest does on the workers: prepare rows, hash known ones, write shards. Apart from the job: tasks find it by name.

Prepared rows wait in the output's scratch folder, one file for each unit of the input, until the driver has seen what is
said of all of them and decided where each goes. So an image is read and decoded once, no matter what is decided, and at no
time is more than a row group of images in a process's memory.
"""

import errno
import hashlib
import pickle
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msclip.data.captions import texts
from msclip.data.hashes import content_hash, perceptual_hash
from msclip.data.images import BadImage, open_image
from msclip.data.parquet import checksum
from msclip.data.prepare import CaptionRules, ImageRules
from msclip.data.queries import Queries
from msclip.data.shards import CHECKED, SCHEMA, Shard
from msclip.data.sources import Row, Source
from msclip.data.statistics import Statistics
from msclip.errors import TrainingError, UserError
from msclip.s3_requests import repeated
from msclip.storage import Folder

_COUNTED_ROWS = 128  # between two words to the tally
_ROW_GROUP_BYTES = 64 * 2**20  # a row group ends here too: it is what a process holds
_OPEN_FILES = 128
_READERS = 16
MOST_CAPTIONS = 32  # of a row that takes those of its duplicates: some pictures stand under thousands of texts

_HASHES = [("sha256", pa.binary(32)), ("phash", pa.uint64()), ("queries", pa.list_(pa.int32())), ("key", pa.string())]
# Of each row of a unit: its hashes, where it stood, why it cannot be stored, else where it waits.
_PLACE = [("file", pa.string()), ("row", pa.int64()), ("row_group", pa.int64())]
_OUTCOME = [("reason", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
PREPARED = pa.schema([("unit", pa.int32()), ("item", pa.int32()), *_HASHES, *_PLACE, *_OUTCOME])
KNOWN = pa.schema([("unit", pa.int32()), *_HASHES])


class Waiting(NamedTuple):
    """A prepared row in the scratch folder: a row of a shard in all but the place."""

    image: bytes
    captions: list[str]
    key: str
    source: str
    width: int
    height: int
    sha256: bytes
    phash: int | None


class Place(NamedTuple):
    """Where a row waits."""

    unit: int
    offset: int
    size: int


class Written(NamedTuple):
    """A finished shard."""

    number: int
    shard: Shard
    sources: dict[str, int]
    statistics: dict[str, Any]


class Known(NamedTuple):
    """A row group of which only hashes are wanted."""

    folder: Folder
    file: str
    row_group: int
    image_column: str


class Tally:
    """An actor that counts rows read, rows refused and rows written. Retried tasks count once."""

    def __init__(self) -> None:
        self.units: dict[int, tuple[int, int]] = {}
        self.shards: dict[int, int] = {}
        self.repeated = 0
        self.error: UserError | None = None

    def count(self, unit: int, rows: int, refused: int) -> None:
        """What a unit has come to."""
        self.units[unit] = rows, refused

    def wrote(self, shard: int, rows: int) -> None:
        self.shards[shard] = rows

    def repeat(self, count: int) -> int:
        """So many requests to the storage had to be repeated; returns how many in all."""
        self.repeated += count
        return self.repeated

    def rewrite(self) -> None:
        """Forgets the shards: they will be written again."""
        self.shards.clear()

    def fail(self, error: UserError) -> None:
        """Why a task is about to fail: what Ray hands on of its exception is only text."""
        self.error = self.error or error

    def failure(self) -> UserError | None:
        return self.error

    def totals(self) -> tuple[int, int, int]:
        """Rows read, of those refused, rows written."""
        rows, refused = np.sum(list(self.units.values()), axis=0) if self.units else (0, 0)
        return int(rows), int(refused), sum(self.shards.values())


@dataclass(frozen=True)
class Work:
    """What every task of one ingest knows."""

    source: Source
    output: Folder
    id: str
    """Of the ingest: its shards and its scratch folder are named by it."""
    row_group_rows: int
    images: ImageRules
    captions: CaptionRules
    queries: Queries | None
    tally: Any
    """Handle of the `Tally` actor."""

    @property
    def scratch(self) -> Folder:
        """Where prepared rows wait."""
        return self.output / f"scratch-{self.id}"

    def prepare(self, block: pa.Table) -> pa.Table:
        """Reads a unit, leaves its good rows in the scratch folder, and says of all rows what `PREPARED` has."""
        number, unit = pickle.loads(block["work"][0].as_py())
        lines: list[dict[str, Any]] = []
        refused = 0
        with self._failures(), self.scratch.open_output(_name(number)) as stream:
            offset = 0
            for row in self.source.read(unit):
                line, data = self._prepared(row)
                if data:
                    stream.write(data)
                    line |= {"offset": offset, "size": len(data)}
                    offset += len(data)
                else:
                    refused += 1
                lines.append(line | {"unit": number, "item": len(lines)})
                if len(lines) % _COUNTED_ROWS == 0:
                    self.tally.count.remote(number, len(lines), refused)
        self.tally.count.remote(number, len(lines), refused)
        return pa.Table.from_pylist(lines, PREPARED)

    def _prepared(self, row: Row) -> tuple[dict[str, Any], bytes]:
        place = row.refused
        line: dict[str, Any] = {"key": row.key, "file": place.shard, "row": place.row, "row_group": place.row_group}
        captions, reason = self.captions.apply(row.captions)
        if row.image is None or place.reason or reason:
            return line | {"reason": place.reason or reason}, b""
        try:
            image = self.images.apply(row.image)
        except BadImage as error:
            return line | {"reason": str(error)}, b""
        line |= {"sha256": image.sha256, "phash": image.phash}
        line["queries"] = self.queries.matches(captions) if self.queries else []
        waiting = Waiting(image.data, captions, row.key, row.source, *image[1:])
        return line, pickle.dumps(tuple(waiting), protocol=5)

    def hash_known(self, block: pa.Table) -> pa.Table:
        """The hashes of a row group's images: out of its columns where ingest wrote it, else out of the images."""
        number, known = pickle.loads(block["work"][0].as_py())
        with self._failures():
            return self._hash_known(number, known)

    def _hash_known(self, number: int, known: Known) -> pa.Table:
        place = known.folder / known.file
        with place.filesystem.open_input_file(place.path) as stream:
            file = pq.ParquetFile(stream, pre_buffer=True)
            there = set(file.schema_arrow.names)
            hashed = {"sha256", "phash"} <= there
            wanted = {"sha256", "phash"} if hashed else {known.image_column}
            wanted |= {"captions"} if self.queries else set()
            table = file.read_row_group(known.row_group, [*(wanted & there), *({"key"} & there)], use_threads=False)
        lines = []
        for index in range(len(table)):
            cells = {name: table[name][index].as_py() for name in table.column_names}
            if not hashed:
                image = cells[known.image_column]
                data = image.get("bytes") if isinstance(image, dict) else image
                if not data:
                    continue  # nothing that a row could repeat
                cells |= {"sha256": content_hash(data), "phash": None}
                with suppress(BadImage):  # then only the very same file is found again
                    cells["phash"] = perceptual_hash(open_image(data))
            found = self.queries.matches(texts(cells.get("captions"))) if self.queries else []
            key = cells.get("key") or f"{known.file}/{known.row_group}/{index}"
            line = {"unit": number, "queries": found, "key": str(key)}
            lines.append(line | {name: cells[name] for name in ("sha256", "phash")})
        return pa.Table.from_pylist(lines, KNOWN)

    def write(self, block: pa.Table) -> pa.Table:
        """A shard of waiting rows; each of them comes with those whose captions it takes."""
        number, places = pickle.loads(block["work"][0].as_py())
        with self._failures():
            written = self._write(number, places)
        self.tally.wrote.remote(number, written.shard.rows)
        return pa.table({"written": [pickle.dumps(written)]})

    def _write(self, number: int, places: list[list[Place]]) -> Written:
        name = f"shards/{self.id}/{number:05d}.parquet"
        sources: Counter[str] = Counter()
        statistics = Statistics()
        checksums = []
        with tempfile.TemporaryDirectory() as scratch, _Scratch(self.scratch) as waiting:
            local = Path(scratch) / "shard.parquet"
            # Image files and hashes hardly compress; the other columns do.
            plain = dict.fromkeys(("image", "sha256", "phash"), "NONE")
            compression = {name: plain.get(name, "ZSTD") for name in SCHEMA.names if name != "captions"}
            compression["captions.list.element"] = "ZSTD"
            with pq.ParquetWriter(local, SCHEMA, compression=compression, use_dictionary=["source"]) as writer:
                for group in self._row_groups(waiting.rows(places)):
                    for row in group:
                        sources[row.source] += 1
                        statistics.add(row.image, row.width, row.height, row.captions)
                    table = pa.Table.from_pylist([row._asdict() for row in group], SCHEMA)
                    writer.write_table(table, row_group_size=len(group))
                    checksums.append(checksum(table.select(CHECKED)))
            with local.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            self.output.upload(local, name)
        shard = replace(Shard.read(self.output, name), sha256=digest, checksums=tuple(checksums))
        return Written(number, shard, dict(sources), statistics.to_dict())

    def _row_groups(self, rows: Iterator[Waiting]) -> Iterator[list[Waiting]]:
        group: list[Waiting] = []
        size = 0
        for row in rows:
            group.append(row)
            size += len(row.image)
            if len(group) == self.row_group_rows or size >= _ROW_GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    @contextmanager
    def _failures(self) -> Iterator[None]:
        import ray

        try:
            yield
        except UserError as error:
            ray.get(self.tally.fail.remote(error))
            raise
        except PermissionError as error:
            ray.get(self.tally.fail.remote(told := refused(error)))
            raise told from error
        except OSError as error:
            where = f"from input or to {self.output.url}"
            cure = "no space is left; free some" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to the storage"
            what = " ".join(str(error).replace("[Errno None] ", "").split())  # pyarrow's have no number, and several lines
            told = TrainingError(f"cannot copy {where}: {what}; {cure} and ingest again")
            ray.get(self.tally.fail.remote(told))
            raise
        finally:
            if count := repeated.take():
                ray.get(self.tally.repeat.remote(count))


def refused(error: PermissionError) -> UserError:
    """What to do about storage that no longer lets this ingest in."""
    return UserError(
        f"access to {error.filename or 'the storage'} was refused ({error.strerror or error}). If a credential has expired, "
        "renew it: sign in to AWS_PROFILE or set new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN for S3, "
        "give the new URL for the web; else see to the permissions. Then start the same ingest again: nothing has been "
        "published, and no row counted as bad for it"
    )


def _name(unit: int) -> str:
    return f"{unit:06d}.rows"


class _Scratch:
    """Reads waiting rows, a few at a time at once; the files used last stay open."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self.files: OrderedDict[int, pa.NativeFile] = OrderedDict()

    def __enter__(self) -> "_Scratch":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()

    def rows(self, places: list[list[Place]]) -> Iterator[Waiting]:
        """Of each list of places the first row, with the captions of all."""
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(places), 2 * _READERS):
                some = places[start : start + 2 * _READERS]
                self._open({place.unit for each in some for place in each})
                for first, *others in pool.map(lambda each: [self._read(place) for place in each], some):
                    captions = list(dict.fromkeys(text for row in (first, *others) for text in row.captions))
                    most = max(MOST_CAPTIONS, len(first.captions))
                    yield first._replace(captions=captions[:most]) if others else first

    def _open(self, units: set[int]) -> None:
        for unit in units:
            if unit not in self.files:
                place = self.folder / _name(unit)
                self.files[unit] = place.filesystem.open_input_file(place.path)
            self.files.move_to_end(unit)
        while len(self.files) > max(_OPEN_FILES, len(units)):
            self.files.popitem(last=False)[1].close()

    def _read(self, place: Place) -> Waiting:
        return Waiting(*pickle.loads(self.files[place.unit].read_at(place.size, place.offset)))
