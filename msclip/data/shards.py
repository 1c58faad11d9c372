"""Image-text data as Parquet: what a folder of shards holds.

`python -m pipelines.ingest` writes shards with the columns of `SCHEMA` and a `manifest.json` in the folder above them. Each
ingest into a folder makes a version, `manifest-000001.json` and so on, which never changes and names all its shards, those of
earlier ingests too; `manifest.json` is a copy of the newest. Any other Parquet file, glob or folder of files with an image
and a caption column is read just as well: footers are all that is needed. A row's id is its position in the concatenation
of all row groups, files in order.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from msclip.data.parquet import check_columns, checksum, find_files, read_footer, read_row_group, split
from msclip.errors import UserError
from msclip.storage import Folder

FORMAT = "msclip-shards/1"
MANIFEST = "manifest.json"
SCHEMA = pa.schema(
    [
        ("image", pa.binary()),  # an encoded image file
        ("captions", pa.list_(pa.string())),
        ("key", pa.string()),  # names the row in its source
        ("source", pa.string()),
        ("width", pa.int32()),  # pixels of the upright image
        ("height", pa.int32()),
        ("sha256", pa.binary(32)),  # of the image file as the source had it
        ("phash", pa.uint64()),  # msclip.data.hashes.perceptual_hash
    ]
)

CHECKED = ("image", "captions", "key", "source")
"""Columns of `SCHEMA` whose values a row group's checksum covers: those that training can be told to read."""

_FOOTER_THREADS = 16
_VERSION = re.compile(r"manifest-(\d{6,})\.json")


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    file: str
    """Its name inside the manifest's folder."""
    row_groups: tuple[int, ...]
    """Rows in each."""
    size: int
    """Bytes."""
    sha256: str = ""
    """Of the file; empty where nobody computed it."""
    footer: str = ""
    """SHA-256 of the footer; empty in manifests from before there were checksums."""
    checksums: tuple[int, ...] = ()
    """Of the columns `CHECKED` of each row group; likewise."""

    @property
    def rows(self) -> int:
        return sum(self.row_groups)

    @classmethod
    def read(cls, folder: Folder, file: str, columns: tuple[str, str] | None = None) -> "Shard":
        """From the file's footer.

        Args:
            columns: the image and the caption column that the file must have.

        Raises:
            UserError: no such file, not a Parquet file, or a column is missing or of a wrong type.
        """
        footer, size, digest = read_footer(folder, file)
        if columns:
            check_columns(folder, file, footer, *columns)
        rows = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        return cls(file, rows, size, footer=digest)


class RowGroup(NamedTuple):
    """Where a row group lies in the data."""

    shard: int
    """Index into `Manifest.shards`."""
    row_group: int
    """Which of the shard's row groups."""
    first_row: int
    """Row id of its first row."""
    rows: int


@dataclass(frozen=True)
class Manifest:
    """All shards of a data set. Immutable; a process that has its pickle needs nothing else to read rows."""

    folder: Folder
    shards: tuple[Shard, ...]
    image_column: str = "image"
    """binary, or a struct with `bytes` as Hugging Face writes it."""
    caption_column: str = "captions"
    """string, or a list of strings."""
    quarantined: int = 0
    """Rows that ingest refused."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """Rows of each source."""
    created: str = ""
    """ISO 8601."""
    version: int = 0
    """From 1; 0 for what no version was made of: Parquet without a manifest, and manifests before there were versions."""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """Of the rows' content; see msclip/data/statistics.py."""
    ingests: tuple[Mapping[str, Any], ...] = ()
    """Where the rows are from: of each ingest the input, the settings, what became of every row, and the software."""

    @classmethod
    def load(cls, spec: str, image_column: str = "image", caption_column: str = "captions") -> "Manifest":
        """Finds the shards and reads every footer, 16 at a time.

        Args:
            spec: a folder with `manifest.json`, one of its `manifest-000001.json`, or a Parquet file, a glob of files in one
                folder, or a folder of files; local or a URL.

        Raises:
            UserError: nothing there; a file missing or other than the manifest says; a column missing or of a wrong type.
        """
        if not spec:
            raise UserError("data.train is empty; give a folder of shards, a Parquet file or a glob of them")
        stated = stated_in(spec)
        folder, names = (stated.folder, list(stated.files)) if stated else find_files(spec)
        columns = (image_column, caption_column)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            shards = tuple(pool.map(lambda name: Shard.read(folder, name, columns=columns), names))
        for shard, recorded in zip(shards, stated.shards if stated else (), strict=bool(stated)):
            if stated and (told := _difference(shard, recorded, stated.file)):
                raise stated._changed(recorded, told)
        if not any(shard.rows for shard in shards):
            raise UserError(f"the data {spec!r} hold no rows ({len(shards)} Parquet files)")
        if stated:
            return replace(stated, image_column=image_column, caption_column=caption_column)
        return cls(folder, shards, *columns)

    def write(self) -> None:
        """Writes `manifest.json`: last of all, because a folder that has one is taken for complete."""
        self.folder.write_text(MANIFEST, self.to_json())

    def publish(self) -> None:
        """Makes this the version after the newest, which must be one less, and lets `manifest.json` follow.

        Raises:
            FileExistsError: another ingest published this version first.
        """
        assert self.file != MANIFEST
        self.folder.write_new(self.file, self.to_json().encode())
        # Another ingest may be doing the same with the next version: whoever writes last has looked again since.
        newest = None
        while newest != (now := max(versions(self.folder))):
            newest = now
            self.folder.write_bytes(MANIFEST, self.folder.read_bytes(version_file(newest)))

    def to_json(self) -> str:
        """What the file of this manifest holds."""
        content = {
            "format": FORMAT,
            "shards": [
                {"file": s.file, "rows": s.rows, "row_groups": s.row_groups, "bytes": s.size, "sha256": s.sha256}
                | ({"footer": s.footer} if s.footer else {})
                | ({"checksums": s.checksums} if s.checksums else {})
                for s in self.shards
            ],
            "rows": self.rows,
            "quarantined": self.quarantined,
            "sources": dict(self.sources),
            "created": self.created,
        }
        if self.version:
            content |= {
                "version": self.version,
                "digest": self.digest,
                "statistics": dict(self.statistics),
                "ingests": list(self.ingests),
            }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @property
    def file(self) -> str:
        """Name of the manifest's own file, which for a version never changes."""
        return version_file(self.version) if self.version else MANIFEST

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(shard.file for shard in self.shards)

    @cached_property
    def sizes(self) -> Int64[np.ndarray, " groups"]:
        """Rows of each row group: what `Plan` takes."""
        return np.fromiter((rows for shard in self.shards for rows in shard.row_groups), dtype=np.int64)

    @cached_property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def row_groups(self) -> tuple[RowGroup, ...]:
        places = ((s, i) for s, shard in enumerate(self.shards) for i in range(len(shard.row_groups)))
        extents = zip(self._first_row.tolist(), self.sizes.tolist(), strict=True)
        return tuple(RowGroup(*place, *extent) for place, extent in zip(places, extents, strict=True))

    @cached_property
    def digest(self) -> str:
        """Identifies the rows and their order, wherever they lie: by the shards' contents where the manifest is a version,
        else by the files' names, bytes and row groups."""
        layout = [[s.sha256 if self.version else s.file, s.size, s.row_groups] for s in self.shards]
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()

    def locate(self, rows: Sequence[int] | Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """The index in `row_groups` of each row id."""
        return np.searchsorted(self._first_row, rows, side="right") - 1

    def following(self, group: int, count: int) -> list[int]:
        """A row group and those after it, at most `count`; after the last comes the first."""
        groups = len(self.row_groups)
        return [(group + i) % groups for i in range(min(count, groups))]

    def home(self, group: int) -> str:
        """The folder in which the shard of a row group is named: its path or bucket, without what else a URL may hold."""
        return self.folder.path

    def read(self, group: int, keep: bool = False) -> pa.Table:
        """The image, caption and, where there is one, key column of a row group; `keep` as in `read_row_group`.

        Raises:
            UserError: the file is gone, damaged or has changed, with its name.
            OSError: the storage failed.
        """
        place = self.row_groups[group]
        wanted = [self.image_column, self.caption_column, "key"]
        columns = [*dict.fromkeys((*CHECKED, *wanted) if self.shards[place.shard].checksums else wanted)]
        file, check = self.shards[place.shard].file, partial(self._check, place)
        table = read_row_group(self.folder, file, place.row_group, columns, keep, check)
        return table.select([name for name in dict.fromkeys(wanted) if name in table.column_names])

    def _check(self, place: RowGroup, table: pa.Table) -> None:
        """Raises `UserError` unless a row group holds what it held when the job began and, where that is known, at ingest."""
        shard = self.shards[place.shard]
        if len(table) != place.rows:
            raise UserError(
                f"row group {place.row_group} of {self.folder.url}/{shard.file} has {len(table)} rows and had {place.rows} "
                "when the job began: shards must not change under a job"
            )
        there = [name for name in CHECKED if name in table.column_names]
        if shard.checksums and checksum(table.select(there)) != shard.checksums[place.row_group]:
            raise self._changed(
                shard, f"has other images or captions in row group {place.row_group} than {self.file} was made of"
            )

    def _changed(self, shard: Shard, told: str) -> UserError:
        beside = (self.folder / str(PurePosixPath(shard.file).parent / "*.parquet")).url
        return UserError(
            f"{(self.folder / shard.file).url} {told}: the file changed after ingest; put back what was there, ingest again, "
            f"or give {unquote(beside)!r} as the data to read such files as they are"
        )

    @cached_property
    def _first_row(self) -> Int64[np.ndarray, " groups"]:
        return np.cumsum(self.sizes) - self.sizes

    def __reduce__(self) -> tuple[type["Manifest"], tuple[object, ...]]:
        return Manifest, tuple(getattr(self, f.name) for f in fields(self))  # without what is only cached


def _difference(found: Shard, recorded: Shard, manifest: str) -> str:
    """How a shard's footer is not what the manifest says; empty if it is."""
    if found.row_groups != recorded.row_groups:
        return (
            f"has {found.rows} rows in {len(found.row_groups)} row groups, but {manifest} beside it says {recorded.rows} in "
            f"{len(recorded.row_groups)}"
        )
    if found.size != recorded.size:
        return f"has {found.size:,} bytes, but {manifest} beside it says {recorded.size:,}"
    if recorded.footer and found.footer != recorded.footer:
        return f"has another footer than {manifest} beside it says, though as many bytes"
    return ""


def version_file(version: int) -> str:
    """The name of a version's manifest."""
    return f"manifest-{version:06d}.json"


def versions(folder: Folder) -> list[int]:
    """The versions in a folder, ascending."""
    return sorted(int(match[1]) for name in folder.names("manifest-*.json") if (match := _VERSION.fullmatch(name)))


def stated_in(spec: str) -> Manifest | None:
    """What the manifest says that a spec names, or that lies in the folder it names; `None` where there is none.

    Nothing else is looked at.

    Raises:
        UserError: a file of that name is not a manifest.
    """
    parent, name = split(spec)
    if name == MANIFEST or _VERSION.fullmatch(name):
        if not parent.exists(name):
            there = ", ".join(version_file(v) for v in versions(parent)) or "none"
            raise UserError(f"the data {spec!r} do not exist; versions in that folder: {there}")
        return read_manifest(parent, name)
    folder = Folder(spec)
    try:
        return read_manifest(folder) if folder.exists(MANIFEST) else None
    except PermissionError:  # below a file of the web: many servers refuse to say that something is not there
        return None


def is_data_set(folder: Folder) -> bool:
    """Whether the folder has a `manifest.json` of shards, of whatever version; people have others of that name."""
    try:
        return str(json.loads(folder.read_text(MANIFEST))["format"]).startswith(FORMAT.partition("/")[0])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError, KeyError, TypeError):
        return False


def pinned(spec: str) -> str:
    """The spec as a URL; for a folder with versions, that of the newest version's own file, whatever is added later.

    With the query that a URL of the web may have, which is not to be written down.
    """
    folder = Folder(spec)
    stated = read_manifest(folder) if is_data_set(folder) else None
    return (folder / stated.file if stated and stated.version else folder).full_url


def newest(folder: Folder) -> Manifest | None:
    """The folder's newest version, else its `manifest.json` from before there were versions, else `None`."""
    if numbers := versions(folder):
        return read_manifest(folder, version_file(numbers[-1]))
    return read_manifest(folder) if folder.exists(MANIFEST) else None


def _shard(record: Mapping[str, Any]) -> Shard:
    checksums = tuple(record.get("checksums", ()))
    return Shard(
        record["file"], tuple(record["row_groups"]), record["bytes"], record["sha256"], record.get("footer", ""), checksums
    )


def read_manifest(folder: Folder, name: str = MANIFEST) -> Manifest:
    """A manifest as its file has it, without a look at the shards.

    Raises:
        UserError: the file is not such a manifest.
    """
    try:
        content = json.loads(folder.read_text(name))
        if content["format"] != FORMAT:
            raise UserError(f"{folder.url}/{name} has format {content['format']!r}; this version reads {FORMAT!r}")
        return Manifest(
            folder,
            tuple(_shard(record) for record in content["shards"]),
            quarantined=content["quarantined"],
            sources=content["sources"],
            created=content["created"],
            version=content.get("version", 0),
            statistics=content.get("statistics", {}),
            ingests=tuple(content.get("ingests", ())),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.url}/{name} is not a manifest of shards ({error!r}); ingest again") from error
