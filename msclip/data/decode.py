"""Rows of a reading unit: image files and captions out of Parquet, then pixels and token ids out of those.

Both are pure functions of (seed, epoch, row). Neither the augmentation nor the caption nor what replaces a bad row depends
on how rows were grouped into units: a batch is the same to the bit on any number of workers and after any resume.

Reading and decoding are apart because they want different places: a file is a tenth of its pixels, so files travel, and
whoever needs the pixels decodes.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from msclip.data.images import Augment, BadImage, Preprocess
from msclip.errors import UserError

if TYPE_CHECKING:  # a decoding process needs these only to replace a bad row
    from jaxtyping import Int64, UInt8

    from msclip.data.mixture import Mixture
    from msclip.data.plan import Unit
    from msclip.data.shards import Manifest
    from msclip.data.tokenizer import Tokenizer

# What random numbers are for, after the seed in their key; 0 and 1 are the plan's.
_AUGMENT, _CAPTION = 2, 3

_SEARCHED_GROUPS = 8
"""For a good row in the place of a bad one: row groups may have a single row, and a whole one may be bad."""


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used. Another row, of its row group if that has a good one, took its place."""

    source: str
    """The folder of shards, as `Manifest.home` has it."""
    shard: str
    """File name inside it."""
    shard_bytes: int
    """Size of that file."""
    row_group: int
    row: int
    """Position inside the row group."""
    key: str
    """Empty where the data have no key column."""
    reason: str


@dataclass(frozen=True, eq=False)
class Encoded:
    """What was read for a `Unit`."""

    epoch: int
    row: Int64[np.ndarray, " rows"]
    """The plan's row ids."""
    files: UInt8[np.ndarray, " bytes"]
    """The image files as they are, one after another."""
    ends: Int64[np.ndarray, " rows"]
    """Where each file ends. One of no bytes is a row to be replaced: it has no image, or no caption."""
    captions: tuple[str, ...]
    """Of each row the one that is this epoch's turn."""


def read_unit(manifest: Manifest | Mixture, unit: Unit, seed: int) -> Encoded:
    """Reads the rows of a unit.

    Raises:
        UserError: a file is gone, damaged or has changed.
        OSError: the storage failed.
    """
    groups = manifest.locate(unit.row)
    files, captions = [np.empty(0, np.uint8)] * len(unit.row), [[""]] * len(unit.row)
    read = np.unique(groups).tolist()
    for group in read:
        places = np.flatnonzero(groups == group)
        of = manifest.row_groups[group]
        rows = unit.row[places] - of.first_row
        table = manifest.read(group, keep=len(rows) < of.rows)
        cells = table[manifest.caption_column].take(rows).to_pylist()
        for i, file, cell in zip(places.tolist(), _views(_image_files(table, manifest.image_column), rows), cells, strict=True):
            captions[i] = _captions(cell)
            file = file if captions[i] else file[:0]
            files[i] = file if len(read) == 1 else file.copy()  # else all row groups of a window would stay in memory
    counts = np.array([max(1, len(texts)) for texts in captions])
    turns = caption_turns(counts, seed, unit.epoch, unit.row)
    said = tuple(texts[turn] if texts else "" for texts, turn in zip(captions, turns.tolist(), strict=True))
    return Encoded(unit.epoch, unit.row, np.concatenate(files), np.cumsum([len(file) for file in files]), said)


def _image_files(table, column: str):  # type: ignore[no-untyped-def]
    import pyarrow as pa
    import pyarrow.compute as pc

    images = table[column]
    if pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")
    return images.cast(pa.large_binary())  # offsets of 32 bits end at 2 GB


def _views(files, rows: np.ndarray) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
    """Files of some rows where they lie: `take` would copy them, and again to where those of all row groups are together."""
    import pyarrow.compute as pc

    array = files.chunk(0) if files.num_chunks == 1 else files.combine_chunks()
    _, offsets, values = array.buffers()
    begins = np.frombuffer(offsets, np.int64)[array.offset :][rows]
    ends = begins + pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)[rows]
    data = np.frombuffer(values or b"", np.uint8)
    return [data[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]


def _captions(cell: str | Sequence[str | None] | None) -> list[str]:
    """The captions that say something."""
    return [text for text in ([cell] if isinstance(cell, str) else cell or []) if text and text.strip()]


def caption_turns(
    counts: Int64[np.ndarray, " rows"], seed: int, epoch: int, rows: Int64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " rows"]:
    """Which of a row's captions an epoch trains on: any `count` consecutive epochs use each once."""
    turns = np.zeros(len(rows), np.int64)
    salt = np.random.SeedSequence((seed, _CAPTION)).generate_state(1, np.uint64)
    for count in np.unique(counts[counts > 1]).tolist():
        mine = counts == count
        keys = rows[mine, None].astype(np.uint64) * np.uint64(count) + np.arange(count, dtype=np.uint64)
        turns[mine] = np.argsort(_mixed(keys ^ salt), axis=1, kind="stable")[:, epoch % count]
    return turns


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over whole arrays: seeding a NumPy generator a row would cost 4 % of decoding."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(31))


class Replaced(NamedTuple):
    """What stands in for a bad row."""

    place: int
    """Of the row among those decoded together."""
    bad: BadRow
    caption: str


@dataclass(frozen=True)
class Recipe:
    """How rows become what a model trains on; whoever decodes has one."""

    pickled_manifest: bytes
    """Opened only to replace a bad row: the shards' storage would start threads in a process that is about to fork."""
    preprocess: Preprocess
    augment: Augment | None
    """`None` for the evaluation view."""
    tokenizer_json: str
    seed: int

    @classmethod
    def of(
        cls,
        manifest: Manifest | Mixture,
        preprocess: Preprocess,
        augment: Augment | None,
        tokenizer: Tokenizer | str,
        seed: int,
    ) -> Recipe:
        """The recipe for these data; a tokenizer may be given as its JSON."""
        text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
        return cls(pickle.dumps(manifest), preprocess, augment, text, seed)

    @cached_property
    def manifest(self) -> Manifest | Mixture:
        return pickle.loads(self.pickled_manifest)

    @cached_property
    def context_length(self) -> int:
        """Token ids of a caption."""
        return int(json.loads(self.tokenizer_json)["context_length"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from msclip.data.tokenizer import Tokenizer

        return Tokenizer.from_json(self.tokenizer_json)

    def decode(
        self,
        epoch: Int64[np.ndarray, " rows"],
        row: Int64[np.ndarray, " rows"],
        files: Iterable[bytes | memoryview],
        captions: Sequence[str],
        pixels: UInt8[np.ndarray, "rows size size 3"],
        token_ids: Int64[np.ndarray, "rows context"],
    ) -> list[Replaced]:
        """Fills `pixels` and `token_ids`; returns what had to stand in for bad rows.

        A bad row is replaced by the next good row of its row group (after the last row comes the first), else the first good
        one of the row groups after it, with the augmentation and the turn of caption that are the bad row's.

        Raises:
            UserError: not one row of eight row groups can be used, or a file is gone or has changed.
            OSError: the storage failed.
        """
        replaced = []
        for place, (when, which, file) in enumerate(zip(epoch.tolist(), row.tolist(), files, strict=True)):
            try:
                if not file:
                    raise BadImage("empty")
                self._view(file, when, which, pixels[place])
            except BadImage:
                replaced.append(self._replace(place, when, which, pixels[place]))
        captions = list(captions)
        for place, _, caption in replaced:
            captions[place] = caption
        token_ids[:] = self.tokenizer.encode_numpy(captions)
        return replaced

    def _view(self, file: bytes | memoryview, epoch: int, row: int, out: UInt8[np.ndarray, "size size 3"]) -> None:
        """Writes the view of an image file that a row has in an epoch."""
        if self.augment is None:
            self.preprocess.write_view(file, out)
        else:
            rng = np.random.default_rng((self.seed, _AUGMENT, epoch, row))
            out[:] = np.asarray(self.preprocess.train_view(file, self.augment, rng))

    def _replace(self, place: int, epoch: int, row: int, out: UInt8[np.ndarray, "size size 3"]) -> Replaced:
        group = int(self.manifest.locate([row])[0])
        where = self.manifest.row_groups[group]
        home, shard, offset = self.manifest.home(group), self.manifest.shards[where.shard], row - where.first_row
        for candidate, file, captions in self._near(group, row):
            if candidate in self._reasons:
                continue
            if file is None or not captions:
                self._reasons[candidate] = "no image" if file is None else "no caption"
                continue
            try:
                self._view(file, epoch, row, out)
                break
            except BadImage as error:
                self._reasons[candidate] = str(error)
        else:
            raise UserError(
                f"no row of row group {where.row_group} of {home}/{shard.file} can be used, nor of the {_SEARCHED_GROUPS - 1} "
                f"after it; row {offset}: {self._reasons[row]}. Remove the file or ingest it again: ingest leaves bad rows out"
            )
        assert candidate != row, f"row {row} could not be decoded, and then could"
        table = self.manifest.read(group, keep=True)
        key = table["key"][offset].as_py() if "key" in table.column_names else None
        key = "" if key is None else str(key)
        bad = BadRow(home, shard.file, shard.size, where.row_group, offset, key, self._reasons[row])
        turn = caption_turns(np.array([len(captions)]), self.seed, epoch, np.array([row]))[0]
        return Replaced(place, bad, captions[turn])

    def _near(self, own: int, row: int) -> Iterator[tuple[int, bytes | None, list[str]]]:
        """A row, then those that may stand in for it: of its row group, then of the row groups that follow it in its source."""
        for group in self.manifest.following(own, _SEARCHED_GROUPS):
            where = self.manifest.row_groups[group]
            table = self.manifest.read(group, keep=True)
            files, cells = _image_files(table, self.manifest.image_column), table[self.manifest.caption_column]
            first = row - where.first_row if group == own else 0
            for at in [*range(first, where.rows), *range(first)]:
                yield where.first_row + at, files[at].as_py(), _captions(cells[at].as_py())

    @cached_property
    def _reasons(self) -> dict[int, str]:
        """Why rows cannot be used, as far as this process has met them: in a bad row group each is asked for by all."""
        return {}


def read_units(manifest: Manifest | Mixture, units: Iterable[Unit], seed: int) -> Iterator[Encoded]:
    """Reads units in this process, in order."""
    for unit in units:
        yield read_unit(manifest, unit, seed)
