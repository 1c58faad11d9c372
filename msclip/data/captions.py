"""Tables of captions as people keep them: CSV, TSV, JSON Lines or Parquet, one caption or several in a row.

Nothing is lost silently: a row that cannot be used is returned with its reason.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from msclip.errors import UserError
from msclip.storage import Folder

IMAGE_NAMES = ("image", "file", "filename", "file_name", "path", "image_path", "filepath", "img")
CAPTION_NAMES = ("captions", "caption", "text", "title")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Refused:
    """Something of the input that does not become a row: a line of quarantine.jsonl."""

    shard: str
    """The file it stands in, or the image itself, by its path in the input."""
    row: int | None
    """Position in the file, for Parquet in the row group, from 0; null for what is not in a table."""
    row_group: int | None
    key: str
    reason: str


class CaptionRow(NamedTuple):
    """One row of a table of captions."""

    row: int
    row_group: int | None
    image: str
    captions: list[str]


def column(names: Sequence[str], given: str | None, usual: Sequence[str], setting: str, where: str) -> str:
    """The column that a setting names, or the first of the usual names that the file has, in any case.

    Raises:
        UserError: no such column; the message lists those that exist.
    """
    if given is not None:
        if given in names:
            return given
        raise UserError(f"{setting} is {given!r}, but {where} has only the columns {', '.join(names)}")
    lower = {name.lower().strip(): name for name in reversed(names)}
    for name in usual:
        if name in lower:
            return lower[name]
    raise UserError(f"{where} has none of the usual columns {', '.join(usual)}; set {setting} to one of: {', '.join(names)}")


def texts(value: Any) -> list[str]:
    """The captions in a cell, whether it holds one, several or none; blank ones are none."""
    values = value if isinstance(value, list) else [value]
    # JSON also holds records, lists of lists and true: none of them is a caption, least of all by its Python name.
    found = (str(text).strip() for text in values if isinstance(text, str | int | float) and not isinstance(text, bool))
    return [whole(text) for text in found if text]


def whole(text: str) -> str:
    """The text with a question mark for each half of a character pair: JSON can hold such, and no UTF-8 file can."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def json_object(data: str | bytes) -> dict[str, Any] | None:
    """What a JSON text holds; None unless that is an object."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_captions(
    file: Folder, image_column: str | None = None, caption_column: str | None = None
) -> tuple[list[CaptionRow], list[Refused]]:
    """Every row of a table of captions, and those that cannot be read.

    Raises:
        UserError: no such file, of no known kind, not in UTF-8, malformed, empty, or without these columns.
    """
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"captions must be a file of kind {', '.join(SUFFIXES)}, got {file.url!r}")
    kind = file.filesystem.get_file_info(file.path).type
    if kind != fs.FileType.File:
        what = "a folder" if kind == fs.FileType.Directory else "a file that does not exist"
        raise UserError(f"captions names {what}: {file.url}")
    data = file.filesystem.open_input_file(file.path).read()
    if file.name.endswith(".parquet"):
        return _parquet(data, file, image_column, caption_column), []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.url} is not in UTF-8 ({error}); convert it, for example with iconv") from None
    refused: list[Refused] = []
    is_json = file.name.endswith(".jsonl")
    records = _json(text, file.name, refused) if is_json else _delimited(text, file, refused)
    names: list[str] = []
    rows = []
    for number, record in records:
        if not names:
            names = _fields(text) if is_json else list(record)
            image = column(names, image_column, IMAGE_NAMES, "image_column", file.url)
            caption = column(names, caption_column, CAPTION_NAMES, "caption_column", file.url)
        if not record.get(image):
            refused.append(Refused(file.name, number, None, "", f"no value in column {image}"))
            continue
        rows.append(CaptionRow(number, None, whole(str(record[image])), texts(record.get(caption))))
    if not rows and not refused:
        raise UserError(f"{file.url} has no rows")
    return rows, refused


def _delimited(text: str, file: Folder, refused: list[Refused]) -> Iterator[tuple[int, dict[str, Any]]]:
    # A tab-separated file has no quoting: a lone quotation mark belongs to the caption.
    tabs = file.name.endswith(".tsv")
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # else 131,072
    # Strict: otherwise a quotation mark that is never closed takes all lines after it for one caption.
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, **options)
    header: list[str] | None = None
    number = 0
    while True:
        first_line = lines.line_num + 1
        try:
            values = next(lines, None)
        except csv.Error as error:
            raise UserError(
                f"{file.url} is not a well-formed table: in the row that begins in line {first_line}, {error}; check its "
                "quotation marks"
            ) from None
        if values is None:
            return
        if header is None:
            if not values:
                continue  # blank lines above the table
            header = values
            _check_distinct(header, f"line {first_line} of {file.url}")
        elif values:
            if len(values) == len(header):
                yield number, dict(zip(header, values, strict=True))
            else:
                reason = f"{len(values)} values for {len(header)} columns"
                refused.append(Refused(file.name, number, None, values[0], reason))
            number += 1


def _check_distinct(names: Sequence[str], where: str) -> None:
    """Raises `UserError` for two columns of one name. Columns without a name, which spreadsheets append, are no matter."""
    for name, times in Counter(name.strip() for name in names).items():
        if name and times > 1:
            raise UserError(f"{where} names {times} columns {name!r}; give each column a name of its own")


def _fields(text: str) -> list[str]:
    """All fields of all lines, which need not have the same."""
    records = (json_object(line) for line in text.split("\n"))
    return list(dict.fromkeys(name for record in records if record for name in record))


def _json(text: str, name: str, refused: list[Refused]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        if (record := json_object(line)) is not None:
            yield number, record
        else:
            refused.append(Refused(name, number, None, "", "not a JSON object"))


def _parquet(data: bytes, file: Folder, image_column: str | None, caption_column: str | None) -> list[CaptionRow]:
    try:
        source = pq.ParquetFile(io.BytesIO(data))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file.url} is not a whole Parquet file: {error}") from error
    names = source.schema_arrow.names
    _check_distinct(names, file.url)
    image = column(names, image_column, IMAGE_NAMES, "image_column", file.url)
    caption = column(names, caption_column, CAPTION_NAMES, "caption_column", file.url)
    rows = []
    for group in range(source.num_row_groups):
        table = source.read_row_group(group, [image, caption])
        for number, (name, value) in enumerate(zip(table[image].to_pylist(), table[caption].to_pylist(), strict=True)):
            rows.append(CaptionRow(number, group, str(name or ""), texts(value)))
    return rows
