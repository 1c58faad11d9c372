"""Several data sets as one. Row ids run on from source to source, in the order in which the sources are named.

Without weights the sources are one set of rows, each of which comes once an epoch. With weights every batch has a fixed part
of each source, and each has epochs of its own: a small source repeats, a large one with a small weight is not used up.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from msclip.data import shards
from msclip.data.captions import texts
from msclip.data.parquet import read_row_group
from msclip.data.plan import Portion
from msclip.data.shards import Manifest, RowGroup, Shard
from msclip.errors import UserError


@dataclass(frozen=True)
class SourceConfig:
    """One of several data sets to train on."""

    path: str
    """As `data.train` alone would be."""
    weight: float | None = None
    """Its part of every batch, in proportion to the other weights; null in all sources to take every pair once an epoch."""
    image_column: str | None = None
    """Null: `data.image_column`."""
    caption_column: str | None = None
    """Null: `data.caption_column`."""


Sources = dict[str, SourceConfig] | list[str] | str
"""What `data.train` may be: sources by name, or paths, or one path."""


class Source(NamedTuple):
    """A data set among others."""

    name: str
    manifest: Manifest
    weight: float | None


@dataclass(frozen=True)
class Mixture:
    """What a run trains on. Immutable; a process that has its pickle needs nothing else to read rows."""

    sources: tuple[Source, ...]
    image_column: ClassVar[str] = "image"
    caption_column: ClassVar[str] = "captions"

    @classmethod
    def load(cls, train: Sources, image_column: str = "image", caption_column: str = "captions") -> "Mixture":
        """Finds all shards and reads every footer.

        Raises:
            UserError: as `Manifest.load`; or only some of the sources have weights; or one is named twice.
        """
        configs = _named(train)
        sources = [
            Source(name, Manifest.load(c.path, c.image_column or image_column, c.caption_column or caption_column), c.weight)
            for name, c in configs.items()
        ]
        places = [(s.manifest.folder.path, file) for s in sources for file in s.manifest.files]
        twice = next((place for i, place in enumerate(sorted(places)[1:]) if place == sorted(places)[i]), None)
        if twice:
            raise UserError(
                f"data.train has {'/'.join(twice)} twice; name every source once, and give it a weight if it should come more "
                "often than others"
            )
        return cls(tuple(sources))

    @property
    def portions(self) -> tuple[Portion, ...]:
        """What `Plan` takes: the sources where they have weights."""
        return tuple(Portion(name, len(m.sizes), weight) for name, m, weight in self.sources if weight is not None)

    @cached_property
    def sizes(self) -> Int64[np.ndarray, " groups"]:
        """Rows of each row group: what `Plan` takes."""
        return np.concatenate([source.manifest.sizes for source in self.sources])

    @cached_property
    def rows(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Of all sources."""
        return tuple(shard for source in self.sources for shard in source.manifest.shards)

    @cached_property
    def row_groups(self) -> tuple[RowGroup, ...]:
        """Of all sources, each with its place among all shards."""
        shard, row, found = 0, 0, list[RowGroup]()
        for _, manifest, _ in self.sources:
            found += (g._replace(shard=g.shard + shard, first_row=g.first_row + row) for g in manifest.row_groups)
            shard, row = shard + len(manifest.shards), row + manifest.rows
        return tuple(found)

    @cached_property
    def digest(self) -> str:
        """Identifies the rows and their order; a lone source's is its manifest's."""
        digests = [source.manifest.digest for source in self.sources]
        return digests[0] if len(digests) == 1 else hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def locate(self, rows: Sequence[int] | Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """The index in `row_groups` of each row id."""
        return np.searchsorted(self._end_row, rows, side="right")

    def following(self, group: int, count: int) -> list[int]:
        """As `Manifest.following`, inside the row group's own source."""
        source = int(self._source_of[group])
        first = self._first_group[source]
        return [first + each for each in self.sources[source].manifest.following(group - first, count)]

    def home(self, group: int) -> str:
        """The folder in which the shard of a row group is named: its path or bucket, without what else a URL may hold."""
        return self.sources[self._source_of[group]].manifest.folder.path

    def read(self, group: int, keep: bool = False) -> pa.Table:
        """As `Manifest.read`, with this class's names for the columns."""
        source = int(self._source_of[group])
        manifest = self.sources[source].manifest
        table = manifest.read(int(group) - self._first_group[source], keep)
        names = {manifest.image_column: self.image_column, manifest.caption_column: self.caption_column}
        return table.rename_columns([names.get(name, name) for name in table.column_names])

    def captions(self) -> Iterator[str]:
        """All captions, without the images beside them: of each source one row group, then of each the next."""
        for group in itertools.chain.from_iterable(itertools.zip_longest(*(_captions(s.manifest) for s in self.sources))):
            yield from group or ()

    @cached_property
    def _end_row(self) -> Int64[np.ndarray, " groups"]:
        return np.cumsum(self.sizes)

    @cached_property
    def _first_group(self) -> list[int]:
        return [0, *np.cumsum([len(source.manifest.sizes) for source in self.sources]).tolist()]

    @cached_property
    def _source_of(self) -> Int64[np.ndarray, " groups"]:
        return np.repeat(np.arange(len(self.sources)), [len(source.manifest.sizes) for source in self.sources])

    def __reduce__(self) -> tuple[type["Mixture"], tuple[object, ...]]:
        return Mixture, tuple(getattr(self, f.name) for f in fields(self))  # without what is only cached


def pinned(train: Sources) -> Sources:
    """The same sources, as every node finds them and as a resumption does, from another place or after data were added.

    Raises:
        UserError: they are no mixture; see `Mixture.load`.
    """
    if train:
        _named(train)  # while they are as the user wrote them
    if isinstance(train, str):
        return shards.pinned(train) if train else ""
    if isinstance(train, list):
        return [shards.pinned(path) for path in train]
    return {name: replace(config, path=shards.pinned(config.path)) for name, config in train.items()}


def _captions(manifest: Manifest) -> Iterator[list[str]]:
    for group in manifest.row_groups:
        file = manifest.shards[group.shard].file
        column = read_row_group(manifest.folder, file, group.row_group, (manifest.caption_column,))[0]
        yield [text for value in column.to_pylist() for text in texts(value)]


def _named(train: Sources) -> Mapping[str, SourceConfig]:
    if isinstance(train, str):
        if train.startswith("{"):
            raise UserError(f"data.train: each source needs a path, and may have weight, image_column, caption_column: {train}")
        return {train: SourceConfig(train)}
    if not train:
        raise UserError("data.train names no source; give at least one")
    if isinstance(train, list):
        if len(set(train)) < len(train):
            raise UserError(f"data.train names a source twice: {', '.join(train)}")
        return {path: SourceConfig(path) for path in train}
    without = [name for name, config in train.items() if config.weight is None]
    if 0 < len(without) < len(train):
        raise UserError(
            f"data.train: a weight is missing for {', '.join(without)}; give every source one, or none to take every pair once "
            "an epoch"
        )
    for name, config in train.items():
        if config.weight is not None and not 0 < config.weight < math.inf:
            raise UserError(
                f"data.train: the weight of {name} must be positive, got {config.weight:g}; leave a source out instead"
            )
    return train
