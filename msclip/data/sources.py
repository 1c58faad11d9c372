"""What ingest reads: images with a table or files of captions, Parquet that holds the images themselves, or tars of both.

A source first lists its units, pieces of work for one task, without opening an image; then any process reads some of them.
"""

import errno
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from msclip.data.captions import CAPTION_NAMES, SUFFIXES, CaptionRow, Refused, column, read_captions, texts
from msclip.data.image_paths import Finder, files_below, is_image
from msclip.data.parquet import find, find_files, read_footer, read_row_group, split
from msclip.data.shards import is_data_set
from msclip.data.tars import Sample, captions_beside, captions_of, is_caption, read_samples
from msclip.errors import UserError
from msclip.storage import Folder

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
BYTES_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
KEY_NAMES = ("key", "__key__", "id", "image_id")
SOURCE_NAMES = ("source",)
_READERS = 16  # threads: an object store takes as long for one small file as for many at once
_UNIT_ROWS = 512  # enough that starting a task does not count


class Row(NamedTuple):
    """One row as the source has it, and where it stood."""

    image: bytes | None
    """None where the place holds no bytes; `refused.reason` then says why."""
    captions: list[str]
    key: str
    source: str
    refused: Refused
    """The quarantine record that this row would get; its reason is empty if it was read."""


class Unit(NamedTuple):
    """What one task reads."""

    rows: int | None
    """None where only reading tells."""
    content: Any
    """The source knows what it is."""


class Source(Protocol):
    """An input of ingest. Pickles without its units."""

    @property
    def name(self) -> str:
        """Recorded as the source of rows that name none themselves."""
        ...

    def units(self) -> tuple[list[Unit], list[Refused]]:
        """All there is to read, in the input's order, and what is refused without being opened."""
        ...

    def read(self, unit: Unit) -> Iterator[Row]:
        """The rows of a unit, in its order."""
        ...


def open_source(
    spec: str,
    captions: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    key_column: str | None = None,
    name: str | None = None,
) -> Source:
    """The source that a path means.

    Args:
        spec: a folder of images; Parquet with image bytes, or tars: a file, a folder or a glob; local or a URL.
        captions: the table of a folder of images; None for the only one directly inside, else files beside the images.
        image_column: in that table the image's path, in Parquet its bytes; None to go by the usual names.
        caption_column: one caption or a list; None likewise. In tars and in files beside images, the field of their JSON.
        key_column: for Parquet; None for the usual names, else file and row.
        name: recorded as the source of rows that name none themselves; None for the input's own name.

    Raises:
        UserError: nothing there, or it has not these columns.
    """
    folder, last = Folder(spec), split(spec)[1]  # the query of a URL belongs to neither
    is_folder = folder.filesystem.get_file_info(folder.path).type == fs.FileType.Directory
    if captions is None and is_folder and is_data_set(folder):  # which has a picture in it too, its contact sheet
        return ParquetSource.open(spec, image_column, caption_column, key_column, name)
    tars = any(folder.names(f"*{suffix}") for suffix in TAR_SUFFIXES) if is_folder else last.endswith(TAR_SUFFIXES)
    if captions is None and tars:
        if key_column is not None or image_column is not None:
            setting = "key_column" if key_column is not None else "image_column"
            raise UserError(f"{setting} is for Parquet; in a tar the members' names say which is the image and what its key is")
        place, files = find_files(spec, TAR_SUFFIXES)
        return TarSource(place, tuple(files), caption_column, name or _own_name(place, files))
    if captions is not None or (is_folder and _has_images(folder)):
        if not is_folder:
            raise UserError(f"with captions, input must be a folder of images, got {spec!r}")
        if key_column is not None:
            raise UserError("key_column is for Parquet; the key of an image in a folder is its path")
        table = _caption_file(folder, captions)
        if table is None:
            if image_column is not None:
                raise UserError("image_column needs a table of captions; here each image's caption is in a file beside it")
            return ImageFiles(folder, caption_column, name or folder.name)
        return ImageFolder(folder, table, image_column, caption_column, name or folder.name)
    if is_folder and not folder.names("*.parquet"):
        raise UserError(
            f"input {spec!r} holds neither images nor Parquet files nor tars; give a folder of images, of tars or of shards"
        )
    if not is_folder and not last.endswith((".parquet", ".json")):
        raise UserError(f"input must be a folder of images, or Parquet or tars (file, folder or glob), got {spec!r}: not found")
    return ParquetSource.open(spec, image_column, caption_column, key_column, name)


def _own_name(folder: Folder, files: list[str]) -> str:
    return folder.name if len(files) > 1 else PurePosixPath(files[0]).name.partition(".")[0]


def _has_images(folder: Folder) -> bool:
    return any(is_image(path) for path in files_below(folder)[0])


def _caption_file(folder: Folder, given: str | None) -> Folder | None:
    """The table of captions; None where the captions are in files beside the images."""
    if given is not None:
        outside = "://" in given or given.startswith("/") or ".." in given.split("/")
        return folder / given if not outside and folder.exists(given) else Folder(given)
    names = folder.names()
    # Beside each of its folders of images img2dataset puts a table of the same name, and captions beside the images too.
    tables = [name for name in names if name.endswith(SUFFIXES) and PurePosixPath(name).stem not in names]
    tables = [name for name in tables if PurePosixPath(name).stem in ("captions", "metadata")] or tables
    if len(tables) == 1:
        return folder / tables[0]
    if not tables and any(PurePosixPath(path).suffix in (".txt", ".json") for path in files_below(folder)[0]):
        return None
    raise UserError(
        f"captions must name the table of captions for the images in {folder.url}: "
        + (f"it could be any of {', '.join(tables)}" if tables else f"there is none ({', '.join(SUFFIXES)}) in the folder")
        + ("" if tables else ", and no .txt or .json beside the images")
    )


def _cut(lines: list[Any]) -> list[Unit]:
    parts = (lines[start : start + _UNIT_ROWS] for start in range(0, len(lines), _UNIT_ROWS))
    return [Unit(len(part), part) for part in parts]


@dataclass(frozen=True)
class ImageFolder:
    """Image files at any depth below a folder; rows of the table that name the same image become one row."""

    folder: Folder
    captions: Folder
    image_column: str | None
    caption_column: str | None
    name: str

    def units(self) -> tuple[list[Unit], list[Refused]]:
        files, unnamed = files_below(self.folder)
        rows, refused = read_captions(self.captions, self.image_column, self.caption_column)
        refused += unnamed
        find_file = Finder(self.folder, files)
        named: dict[str, list[CaptionRow]] = {}
        for row in rows:
            matches = find_file(row.image)
            if len(matches) == 1:
                named.setdefault(matches[0], []).append(row)
            else:
                reason = f"ambiguous image name: {', '.join(matches[:3])}" if matches else "no such image"
                refused.append(Refused(self.captions.name, row.row, row.row_group, row.image, reason))
        refused += [Refused(path, None, None, path, "no caption") for path in files if is_image(path) and path not in named]
        lines = []
        for path, mentions in named.items():
            captions = [caption for row in mentions for caption in row.captions]
            first = mentions[0]
            if captions:
                lines.append((path, captions, first.row, first.row_group))
            else:
                refused.append(Refused(self.captions.name, first.row, first.row_group, path, "no caption"))
        return _cut(lines), refused

    def read(self, unit: Unit) -> Iterator[Row]:
        return _read_many(self._read, unit.content)

    def _read(self, place: tuple[str, list[str], int, int | None]) -> Row:
        file, captions, row, row_group = place
        data, reason = _read_file(self.folder, file)
        # The image is what is wrong, so it is what the record names.
        return Row(data, captions, file, self.name, Refused(file, row, row_group, file, reason))


@dataclass(frozen=True)
class ImageFiles:
    """Image files with a .txt or .json of the same name beside each, as img2dataset's format `files` has them."""

    folder: Folder
    caption_field: str | None
    """Of the JSON; None for the text, else the JSON's usual fields."""
    name: str

    def units(self) -> tuple[list[Unit], list[Refused]]:
        files, refused = files_below(self.folder)
        there = set(files)
        lines = []
        for path in filter(is_image, files):
            beside = [path for path in captions_beside(path) if path in there]
            if beside:
                lines.append((path, beside))
            else:
                refused.append(Refused(path, None, None, path, "no caption"))
        said = {path for _, beside in lines for path in beside}
        alone = (path for path in files if is_caption(path) and path not in said)  # such as that of an x.heic
        refused += [Refused(path, None, None, path, "no image") for path in alone]
        return _cut(lines), refused

    def read(self, unit: Unit) -> Iterator[Row]:
        return _read_many(self._read, unit.content)

    def _read(self, place: tuple[str, list[str]]) -> Row:
        file, beside = place
        data, reason = _read_file(self.folder, file)
        read = {path: _read_file(self.folder, path) for path in beside}
        captions, trouble = captions_of({path: text or b"" for path, (text, _) in read.items()}, self.caption_field)
        unread = next((why for _, why in read.values() if why), "") if not captions else ""
        return Row(data, captions, file, self.name, Refused(file, None, None, file, reason or unread or trouble))


def _read_many(read: Any, places: list[Any]) -> Iterator[Row]:
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(places), 4 * _READERS):
            yield from pool.map(read, places[start : start + 4 * _READERS])


def _read_file(folder: Folder, file: str) -> tuple[bytes | None, str]:
    try:
        return folder.read_bytes(file), ""
    except OSError as error:
        return None, _unreadable(folder, error)


def _unreadable(folder: Folder, error: OSError) -> str:
    """The reason that a row gets whose file cannot be read.

    Raises:
        OSError: it is not for this file alone: the storage failed, or the input is gone or no longer open to us, as it is when
            a credential has expired.
    """
    if not isinstance(error, FileNotFoundError | PermissionError) and error.errno != errno.ELOOP:
        raise error
    if not folder.url.startswith(("http://", "https://")):
        try:
            there = folder.exists()
        except PermissionError:
            raise error from None  # says more: an answer to this question has no body
        if not there:
            raise OSError(errno.ENOENT, "the input is gone", folder.url) from error
    elif isinstance(error, PermissionError):  # the web has no folder to ask: there the key is of one file or of all
        raise error
    return f"unreadable: {type(error).__name__}"


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files with the image files' bytes in a column."""

    folder: Folder
    row_groups: Mapping[str, tuple[int, ...]]
    """Rows of each row group, by file."""
    image_column: str
    caption_column: str
    key_column: str | None
    source_column: str | None
    name: str

    @classmethod
    def open(
        cls,
        spec: str,
        image_column: str | None = None,
        caption_column: str | None = None,
        key_column: str | None = None,
        name: str | None = None,
    ) -> "ParquetSource":
        """Reads all footers. Raises `UserError` where a file is broken or has not these columns in a fitting type."""
        folder, files = find(spec)
        footers = {file: read_footer(folder, file).metadata for file in files}
        schemas = {file: footer.schema.to_arrow_schema() for file, footer in footers.items()}
        first, where = schemas[files[0]], f"{folder.url}/{files[0]}"
        image = column(first.names, image_column, BYTES_NAMES, "image_column", where)
        caption = column(first.names, caption_column, CAPTION_NAMES, "caption_column", where)
        key = key_column and column(first.names, key_column, KEY_NAMES, "key_column", where)
        key = key or next((name for name in KEY_NAMES if name in first.names), None)
        for file, schema in schemas.items():
            _check_types(schema, image, caption, f"{folder.url}/{file}")
        return cls(
            folder,
            {file: tuple(f.row_group(i).num_rows for i in range(f.num_row_groups)) for file, f in footers.items()},
            image,
            caption,
            key,
            next((name for name in SOURCE_NAMES if name in first.names and name not in (image, caption)), None),
            name or _own_name(folder, files),
        )

    def units(self) -> tuple[list[Unit], list[Refused]]:
        units: list[Unit] = []
        for file, sizes in self.row_groups.items():
            groups: list[int] = []
            rows = 0
            for group, size in enumerate(sizes):
                groups.append(group)
                rows += size
                if rows >= _UNIT_ROWS or group + 1 == len(sizes):
                    units.append(Unit(rows, (file, groups)))
                    groups, rows = [], 0
        if not any(unit.rows for unit in units):
            raise UserError(f"the Parquet files of input in {self.folder.url} hold no rows")
        return units, []

    def read(self, unit: Unit) -> Iterator[Row]:
        file, groups = unit.content
        wanted = (self.image_column, self.caption_column, self.key_column, self.source_column)
        for group in groups:
            table = read_row_group(self.folder, file, group, [name for name in wanted if name])
            before = sum(self.row_groups[file][:group])
            for row in range(len(table)):
                cells = {name: table[name][row].as_py() for name in table.column_names}
                image = cells[self.image_column]
                image = image.get("bytes") if isinstance(image, dict) else image
                given = cells.get(self.key_column) if self.key_column else None
                key = str(given) if given is not None else f"{PurePosixPath(file).stem}/{before + row}"
                source = (cells.get(self.source_column) if self.source_column else None) or self.name
                captions = texts(cells[self.caption_column])
                reason = "no image bytes" if image is None else "" if captions else "no caption"
                yield Row(image, captions, key, str(source), Refused(file, row, group, key, reason))


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold image files: binary, or a struct with `bytes` as Hugging Face writes it."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _check_types(schema: pa.Schema, image: str, caption: str, where: str) -> None:
    for setting, name in (("image_column", image), ("caption_column", caption)):
        if name not in schema.names:
            raise UserError(f"{setting} is {name!r}, but {where} has only the columns {', '.join(schema.names)}")
    if not holds_bytes(kind := schema.field(image).type):
        raise UserError(
            f"image_column {image!r} of {where} is of type {kind}; it must hold the bytes of image files "
            "(binary, or a struct with bytes)"
        )
    kind = schema.field(caption).type
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"caption_column {caption!r} of {where} is of type {kind}; it must be string or list of string")


@dataclass(frozen=True)
class TarSource:
    """Tars as webdataset and img2dataset write them; a key is the tar's name and the sample's."""

    folder: Folder
    files: tuple[str, ...]
    caption_field: str | None
    """Of a sample's JSON; None for its text, else the JSON's usual fields."""
    name: str

    def units(self) -> tuple[list[Unit], list[Refused]]:
        return [Unit(None, file) for file in self.files], []

    def read(self, unit: Unit) -> Iterator[Row]:
        file: str = unit.content
        stem = next(file.removesuffix(suffix) for suffix in sorted(TAR_SUFFIXES, key=len)[::-1] if file.endswith(suffix))
        sidecar = cache(lambda: self._sidecar(f"{stem}.parquet"))  # read only if a sample lacks its captions
        place = self.folder / file
        try:
            stream = place.filesystem.open_input_stream(place.path, compression=None, buffer_size=2**20)
        except OSError as error:
            yield self._row(file, "", None, Sample("", None, [], _unreadable(self.folder, error)))
            return
        with stream:  # what fails from here on is no property of the tar
            for number, sample in enumerate(read_samples(stream, self.caption_field, lambda key: sidecar().get(key, []))):
                yield self._row(file, f"{stem}/", number, sample)

    def _row(self, file: str, prefix: str, number: int | None, sample: Sample) -> Row:
        key = prefix + sample.key
        return Row(sample.image, sample.captions, key, self.name, Refused(file, number, None, sample.key, sample.reason))

    def _sidecar(self, name: str) -> dict[str, list[str]]:
        """Captions by key out of the table that img2dataset puts beside a tar; none where there is no such table."""
        try:
            place = self.folder / name
            with place.filesystem.open_input_file(place.path) as stream:
                source = pq.ParquetFile(stream)
                names = source.schema_arrow.names
                caption = column(names, self.caption_field, CAPTION_NAMES, "caption_column", name)
                table = source.read([column(names, None, KEY_NAMES, "key", name), caption])
        except (FileNotFoundError, PermissionError, UserError, pa.ArrowException):
            return {}  # refused: a key may be of the tar alone, and the tar's own next bytes tell if it has expired
        return {str(key): texts(value) for key, value in zip(*(column.to_pylist() for column in table.columns), strict=True)}
