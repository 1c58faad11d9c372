"""What ingest reads: a folder of images with a table of captions, or Parquet files that hold the images themselves.

A source first lists its places, one for each row to come, without opening an image; then any process reads some of them.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import fs

from msclip.data.captions import CAPTION_NAMES, SUFFIXES, CaptionRow, Refused, column, read_captions, texts
from msclip.data.parquet import find, read_footer, read_row_group
from msclip.data.shards import MANIFEST
from msclip.errors import UserError
from msclip.storage import Folder

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")
)
BYTES_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
KEY_NAMES = ("key", "__key__", "id", "image_id")
SOURCE_NAMES = ("source",)
_READERS = 16  # threads: an object store takes as long for one small file as for many at once


class Row(NamedTuple):
    """One row as the source has it, and where it stood."""

    image: bytes | None
    """None where the place holds no bytes; `refused.reason` then says why."""
    captions: list[str]
    key: str
    source: str
    refused: Refused
    """The quarantine record that this row would get; its reason is empty if it was read."""


class Source(Protocol):
    """An input of ingest. Pickles without its places."""

    @property
    def any_order(self) -> bool:
        """Whether rows cost the same in any order; Parquet is read a row group at a time."""
        ...

    def places(self) -> tuple[pa.Table, list[Refused]]:
        """A table with one line for each row, in the input's order, and what is refused without being opened."""
        ...

    def read(self, places: pa.Table) -> Iterator[Row]:
        """The rows of some of the places, in their order."""
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
        spec: a folder of images, or Parquet with image bytes: a file, a folder or a glob; local or a URL.
        captions: the table of a folder of images; None for the only one directly inside.
        image_column: in that table the image's path, in Parquet its bytes; None to go by the usual names.
        caption_column: one caption or a list; None likewise.
        key_column: for Parquet; None for the usual names, else file and row.
        name: recorded as the source of rows that name none themselves; None for the input's own name.

    Raises:
        UserError: nothing there, or it has not these columns.
    """
    folder = Folder(spec)
    is_folder = folder.filesystem.get_file_info(folder.path).type == fs.FileType.Directory
    if captions is not None or (is_folder and _has_images(folder)):
        if not is_folder:
            raise UserError(f"with captions, input must be a folder of images, got {spec!r}")
        if key_column is not None:
            raise UserError("key_column is for Parquet; the key of an image in a folder is its path")
        return ImageFolder(folder, _caption_file(folder, captions), image_column, caption_column, name or folder.name)
    if is_folder and not (folder.exists(MANIFEST) or folder.names("*.parquet")):
        raise UserError(f"input {spec!r} holds neither images nor Parquet files; give a folder of images or of shards")
    if not is_folder and not spec.endswith(".parquet"):
        raise UserError(f"input must be a folder of images, or Parquet (file, folder or glob), got {spec!r}: not found")
    return ParquetSource.open(spec, image_column, caption_column, key_column, name)


def _has_images(folder: Folder) -> bool:
    return any(_is_image(path) for path in _files(folder))


def _is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def _files(folder: Folder) -> list[str]:
    """Paths of all files below, relative, sorted; what starts with a dot is left out."""
    found = folder.filesystem.get_file_info(fs.FileSelector(folder.path, recursive=True))
    below = sorted(info.path[len(folder.path) :].lstrip("/") for info in found if info.type == fs.FileType.File)
    return [path for path in below if not any(part.startswith(".") for part in path.split("/"))]


def _caption_file(folder: Folder, given: str | None) -> Folder:
    if given is not None:
        outside = "://" in given or given.startswith("/") or ".." in given.split("/")
        return folder / given if not outside and folder.exists(given) else Folder(given)
    tables = [name for name in folder.names() if name.endswith(SUFFIXES)]
    tables = [name for name in tables if PurePosixPath(name).stem == "captions"] or tables
    if len(tables) == 1:
        return folder / tables[0]
    raise UserError(
        f"captions must name the table of captions for the images in {folder.url}: "
        + (f"it could be any of {', '.join(tables)}" if tables else f"there is none ({', '.join(SUFFIXES)}) in the folder")
    )


@dataclass(frozen=True)
class ImageFolder:
    """Image files at any depth below a folder; rows of the table that name the same image become one row."""

    folder: Folder
    captions: Folder
    image_column: str | None
    caption_column: str | None
    name: str
    any_order: bool = field(default=True, init=False)

    def places(self) -> tuple[pa.Table, list[Refused]]:
        files = _files(self.folder)
        rows, refused = read_captions(self.captions, self.image_column, self.caption_column)
        find_file = _Finder(self.folder, files)
        named: dict[str, list[CaptionRow]] = {}
        for row in rows:
            matches = find_file(row.image)
            if len(matches) == 1:
                named.setdefault(matches[0], []).append(row)
            else:
                reason = f"ambiguous image name: {', '.join(matches[:3])}" if matches else "no such image"
                refused.append(Refused(self.captions.name, row.row, row.row_group, row.image, reason))
        refused += [Refused(path, None, None, path, "no caption") for path in files if _is_image(path) and path not in named]
        lines = []
        for path, mentions in named.items():
            captions = [caption for row in mentions for caption in row.captions]
            first = mentions[0]
            if captions:
                lines.append({"file": path, "row": first.row, "row_group": first.row_group, "captions": captions})
            else:
                refused.append(Refused(self.captions.name, first.row, first.row_group, path, "no caption"))
        kinds = {"file": pa.string(), "row": pa.int64(), "row_group": pa.int64(), "captions": pa.list_(pa.string())}
        return pa.Table.from_pylist(lines, pa.schema(kinds.items())), refused

    def read(self, places: pa.Table) -> Iterator[Row]:
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(places), 4 * _READERS):
                yield from pool.map(self._read, places.slice(start, 4 * _READERS).to_pylist())

    def _read(self, place: dict[str, Any]) -> Row:
        data, reason = None, ""
        try:
            data = self.folder.read_bytes(place["file"])
        except (FileNotFoundError, PermissionError) as error:
            reason = f"unreadable: {type(error).__name__}"
        # The image is what is wrong, so it is what the record names.
        refused = Refused(place["file"], place["row"], place["row_group"], place["file"], reason)
        return Row(data, place["captions"], place["file"], self.name, refused)


class _Finder:
    """From an image's name in a table to the files it may mean.

    The name is a file's path below the folder or the end of one, in whole parts: `train/0.jpg` is never `val/0.jpg`. Where
    no file fits, the same without the file's suffix.
    """

    def __init__(self, folder: Folder, files: list[str]):
        self.root = folder.path.rstrip("/") + "/"
        self.paths = set(files)
        self.names: dict[str, list[str]] = {}
        self.stems: dict[str, list[str]] = {}
        for path in files:
            self.names.setdefault(PurePosixPath(path).name, []).append(path)
            if _is_image(path):
                self.stems.setdefault(PurePosixPath(path).stem, []).append(path)

    def __call__(self, name: str) -> list[str]:
        path = str(PurePosixPath(name.strip().replace("\\", "/").removeprefix(self.root)))
        if path in self.paths:
            return [path]
        last = PurePosixPath(path).name
        found = [file for file in self.names.get(last, []) if _ends_with(file, path)]
        if found or _is_image(last):
            return found
        return [file for file in self.stems.get(last, []) if _ends_with(str(PurePosixPath(file).with_suffix("")), path)]


def _ends_with(path: str, end: str) -> bool:
    return f"/{path}".endswith(f"/{end}")


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
    any_order: bool = field(default=False, init=False)

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
        footers = {file: read_footer(folder, file)[0] for file in files}
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
            name or (folder.name if len(files) > 1 else PurePosixPath(files[0]).stem),
        )

    def places(self) -> tuple[pa.Table, list[Refused]]:
        groups = [(i, g, rows) for i, sizes in enumerate(self.row_groups.values()) for g, rows in enumerate(sizes)]
        sizes = np.array([rows for _, _, rows in groups], np.int64)
        if not sizes.sum():
            raise UserError(f"the Parquet files of input in {self.folder.url} hold no rows")
        file = pa.array(np.repeat([i for i, _, _ in groups], sizes), pa.int32())
        columns = {
            "file": pa.DictionaryArray.from_arrays(file, pa.array(list(self.row_groups))),
            "row": np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes),
            "row_group": np.repeat([g for _, g, _ in groups], sizes).astype(np.int64),
        }
        return pa.table(columns), []

    def read(self, places: pa.Table) -> Iterator[Row]:
        wanted = (self.image_column, self.caption_column, self.key_column, self.source_column)
        lines = zip(*(places[name].to_pylist() for name in ("file", "row_group", "row")), strict=True)
        for (file, group), rows in groupby(lines, key=lambda line: line[:2]):
            table = read_row_group(self.folder, file, group, [name for name in wanted if name])
            before = sum(self.row_groups[file][:group])
            for _, _, row in rows:
                cells = {name: table[name][row].as_py() for name in table.column_names}
                image = cells[self.image_column]
                image = image.get("bytes") if isinstance(image, dict) else image
                captions = texts(cells[self.caption_column])
                given = cells.get(self.key_column) if self.key_column else None
                key = str(given) if given is not None else f"{PurePosixPath(file).stem}/{before + row}"
                reason = "no image bytes" if image is None else "" if captions else "no caption"
                source = (cells.get(self.source_column) if self.source_column else None) or self.name
                yield Row(image, captions, key, str(source), Refused(file, row, group, key, reason))


def _check_types(schema: pa.Schema, image: str, caption: str, where: str) -> None:
    for setting, name in (("image_column", image), ("caption_column", caption)):
        if name not in schema.names:
            raise UserError(f"{setting} is {name!r}, but {where} has only the columns {', '.join(schema.names)}")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"image_column {image!r} of {where} is of type {kind}; it must hold the bytes of image files "
            "(binary, or a struct with bytes)"
        )
    kind = schema.field(caption).type
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"caption_column {caption!r} of {where} is of type {kind}; it must be string or list of string")
