"""Parquet files in a folder anywhere: finding them, checking their footers, reading one row group at a time.

Footers and recently read row groups are kept per process: a decoding process meets the same file again and again, and on an
object store a footer costs as much time as a row group.
"""

import hashlib
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from msclip.errors import UserError
from msclip.storage import Folder

_CACHE_BYTES = 256 * 2**20
_TAIL_BYTES = 64 * 2**10  # read at once: most footers are smaller


class Footer(NamedTuple):
    """The end of a Parquet file, which says where everything in it lies."""

    metadata: pq.FileMetaData
    file_bytes: int
    sha256: str
    """Of the footer alone. It holds sizes, places and extreme values, so a file that somebody wrote anew mostly has another;
    but not what lies between the extremes."""


def find(spec: str) -> tuple[Folder, list[str]]:
    """The Parquet files that a spec means: one file, a glob inside one folder, or a folder; and the folder they are in.

    A folder with a manifest, which is what ingest writes, means the files that the manifest lists, wherever below; a
    manifest's own file does too.

    Raises:
        UserError: there is none, with the spec and what was looked for; or the files are not what the manifest says.
    """
    from msclip.data.shards import Manifest, stated_in  # here, because that module finds its files by this one

    if stated_in(spec):
        manifest = Manifest.load(spec)
        return manifest.folder, list(manifest.files)
    return find_files(spec)


def find_files(spec: str, suffixes: tuple[str, ...] = (".parquet",)) -> tuple[Folder, list[str]]:
    """The files of some kind that a spec means: one file, a glob inside one folder, or a folder; and the folder they are in.

    Raises:
        UserError: there is none, with the spec and what was looked for.
    """
    kind = "Parquet file" if suffixes == (".parquet",) else "tar"
    pattern = "*" + suffixes[0]
    parent, last = split(spec)
    found = _kind(parent, last)
    if found == fs.FileType.File:
        return parent, [last]
    if found == fs.FileType.Directory or not last:
        folder = Folder(spec)
        names = [name for name in folder.names() if name.endswith(suffixes)]
        if not names:
            raise UserError(f"the folder {spec!r} holds no {kind} ({pattern}) directly inside")
        return folder, names
    if any(mark in last for mark in "*?["):
        names = [name for name in parent.names(last) if name.endswith(suffixes)]
        if not names:
            raise UserError(f"no {kind} ({pattern}) matches {spec!r}")
        return parent, names
    hint = "; wildcards may stand in the last part only" if any(mark in parent.path for mark in "*[") else ""
    raise UserError(f"the data {spec!r} do not exist; give a folder of shards, a {kind} or a glob of them{hint}")


def split(spec: str) -> tuple[Folder, str]:
    """A path or URL without its last part, and that part. The query of a URL stays with the folder."""
    scheme, mark, rest = spec.removeprefix("file://").partition("://")
    if not mark:
        path = Path(unquote(scheme) if spec.startswith("file://") else scheme)
        return (Folder(path.parent), path.name) if path.name not in ("", "..") else (Folder(path), "")
    place, query_mark, query = rest.partition("?")
    parent, _, name = place.rstrip("/").rpartition("/")
    if not parent:
        return Folder(spec), ""
    folder = Folder(f"{scheme}://{parent}{query_mark}{query}")
    return folder, unquote(name) if folder.quotes else name


def _kind(folder: Folder, name: str) -> fs.FileType:
    return folder.filesystem.get_file_info((folder / name).path if name else folder.path).type


def read_footer(folder: Folder, file: str) -> Footer:
    """A file's footer.

    Raises:
        UserError: the file is missing or not Parquet, with its name.
    """
    place = folder / file
    try:
        with place.filesystem.open_input_file(place.path) as stream:
            size = stream.size()
            tail = stream.read_at(min(size, _TAIL_BYTES), max(0, size - _TAIL_BYTES))
            length = 8 + int.from_bytes(tail[-8:-4], "little")  # it ends with its own length and four letters
            if len(tail) < length <= size:
                tail = stream.read_at(length, size - length)
        return Footer(pq.read_metadata(pa.BufferReader(tail)), size, hashlib.sha256(tail[-length:]).hexdigest())
    except FileNotFoundError:
        raise UserError(f"the shard {place.url} is missing") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{place.url} is not a whole Parquet file: {error}") from error


def check_columns(folder: Folder, file: str, footer: pq.FileMetaData, image_column: str, caption_column: str) -> None:
    """Raises `UserError` unless the file has both columns in a type that can be read."""
    schema = footer.schema.to_arrow_schema()
    wanted = (
        ("image", image_column, _holds_images, "binary or struct{bytes, path}"),
        ("caption", caption_column, _holds_captions, "string or list of string"),
    )
    for name, column, fits, kinds in wanted:
        if column not in schema.names:
            raise UserError(
                f"data.{name}_column is {column!r}, but {folder.url}/{file} has only the columns {', '.join(schema.names)}"
            )
        if not fits(schema.field(column).type):
            raise UserError(
                f"data.{name}_column: {column!r} in {folder.url}/{file} is of type {schema.field(column).type}; it must be "
                f"{kinds}"
            )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_captions(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def read_row_group(
    folder: Folder,
    file: str,
    index: int,
    columns: Sequence[str],
    keep: bool = False,
    check: Callable[[pa.Table], None] | None = None,
) -> pa.Table:
    """One row group, of `columns` those that the file has.

    Args:
        keep: for another reader of the same row group: the least recently used 256 MiB of this process stay in memory.
        check: looks at what was read, before anybody else does; not again at what has stayed in memory.

    Raises:
        UserError: the file is gone or damaged, with its name.
        OSError: the storage failed; another attempt may succeed.
    """
    key = (folder, file, index, *columns)  # by what follows a question mark too, which may say which file
    table = _cache.get(key)
    if table is None:
        try:
            table = _read(folder, file, index, columns)
            if check:
                check(table)
        except (FileNotFoundError, pa.ArrowException) as error:
            raise UserError(f"cannot read row group {index} of {folder.url}/{file}: {error}") from error
        except OSError as error:
            raise OSError(error.errno, f"cannot read row group {index} of {folder.url}/{file}: {error}") from error
        if keep:
            _cache.put(key, table)
    return table


def _read(folder: Folder, file: str, index: int, columns: Sequence[str]) -> pa.Table:
    place = folder / file
    with place.filesystem.open_input_file(place.path) as stream:
        # pre_buffer: one ranged read for the columns of the row group, not one for each page.
        source = pq.ParquetFile(stream, metadata=_cached_footer(folder, file), pre_buffer=True)
        # One thread: as many processes as cores do this already.
        return source.read_row_group(index, [c for c in columns if c in source.schema_arrow.names], use_threads=False)


@lru_cache(maxsize=1024)
def _cached_footer(folder: Folder, file: str) -> pq.FileMetaData:
    return read_footer(folder, file).metadata


def checksum(table: pa.Table) -> int:
    """CRC-32 of all values of binary columns, strings and lists of them, in order. It tells data that were changed by mistake,
    at a quarter of what SHA-256 would cost; it is no seal against somebody who means to deceive.
    """
    crc = 0
    for column in table.columns:
        crc = _checksum(column, crc)
    return crc


def _checksum(column: pa.ChunkedArray, crc: int) -> int:
    # Lengths and values apart: how they lie in memory differs between what is written and what is read.
    nested = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    lengths = pc.list_value_length(column) if nested else pc.binary_length(column)
    crc = zlib.crc32(lengths.cast(pa.int64()).fill_null(-1).to_numpy().astype("<i8"), crc)
    if nested:
        return _checksum(pc.list_flatten(column), crc)
    for chunk in column.chunks:
        _, offsets, values = chunk.buffers()
        wide = pa.types.is_large_binary(chunk.type) or pa.types.is_large_string(chunk.type)
        ends = np.frombuffer(offsets, np.int64 if wide else np.int32)
        if values is not None:
            crc = zlib.crc32(memoryview(values)[ends[chunk.offset] : ends[chunk.offset + len(chunk)]], crc)
    return crc


class _TableCache:
    """The least recently used tables, up to a number of bytes. Several threads may use it."""

    def __init__(self, most_bytes: int):
        self._most, self._held = most_bytes, 0
        self._tables: OrderedDict[tuple[object, ...], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...]) -> pa.Table | None:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def put(self, key: tuple[object, ...], table: pa.Table) -> None:
        with self._lock:
            if key in self._tables or table.nbytes > self._most:
                return
            self._tables[key] = table
            self._held += table.nbytes
            while self._held > self._most:
                self._held -= self._tables.popitem(last=False)[1].nbytes


_cache = _TableCache(_CACHE_BYTES)
