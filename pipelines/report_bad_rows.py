"""The rows that ingest and training could not use: counted as they are read, however many there are, and the first shown."""

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from msclip import quarantine
from msclip.data.parquet import split
from msclip.data.shards import stated_in
from msclip.errors import UserError
from msclip.storage import Folder

INGEST_QUARANTINE = "quarantine.jsonl"
SHOWN_BAD_ROWS = 12
_MOST_SHARDS = 100_000
"""In a folder of images each is a shard of its own: beyond this many, those that came least are forgotten."""


@dataclass(frozen=True)
class BadRows:
    """The bad rows that one stage of the pipeline recorded."""

    stage: str
    """In the words of the page: "ingest", "training", ..."""
    count: int
    reasons: tuple[tuple[str, int], ...]
    """The most frequent, each without what stands behind its colon."""
    shards: tuple[tuple[str, int], ...]
    rows: tuple[Mapping[str, Any], ...]
    """The first, as recorded: shard, row, reason and what else there is."""


def read_bad_rows(run: Folder, config: Mapping[str, Any]) -> tuple[BadRows, ...]:
    """Of the stages that recorded any."""
    ingested = itertools.chain.from_iterable(_ingested(spec) for spec in _sources(config))
    stages: dict[str, Iterable[Mapping[str, Any]]] = {
        "ingest": ingested,
        "training": quarantine.read(run).to_pylist(),
        "earlier runs, left out of this one": quarantine.read_skipped(run).to_pylist(),
    }
    found = (_counted(stage, records) for stage, records in stages.items())
    return tuple(bad for bad in found if bad.count)


def _counted(stage: str, records: Iterable[Mapping[str, Any]]) -> BadRows:
    reasons, shards = Counter[str](), Counter[str]()
    first: list[Mapping[str, Any]] = []
    for record in records:
        reasons[str(record.get("reason") or "not recorded").partition(":")[0]] += 1
        shards[str(record.get("shard") or "not recorded")] += 1
        if len(shards) > 2 * _MOST_SHARDS:
            shards = Counter(dict(shards.most_common(_MOST_SHARDS)))
        if len(first) < SHOWN_BAD_ROWS:
            first.append(record)
    return BadRows(stage, reasons.total(), _most(reasons), _most(shards), tuple(first))


def _most(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(counts.most_common(SHOWN_BAD_ROWS), key=lambda pair: (-pair[1], pair[0])))


def _ingested(spec: str) -> Iterator[Mapping[str, Any]]:
    """What the ingests of a data set refused: those that its manifest names, else the one whose record lies there."""
    parent, name = split(spec)
    place = parent if name.startswith("manifest") or "*" in name else Folder(spec)
    files = [INGEST_QUARANTINE]
    with suppress(UserError):  # the data may have gone since
        stated = stated_in(spec)
        files = [each["quarantine"] for each in stated.ingests] if stated and stated.ingests else files
    for file in files:
        if place.exists(file):
            path = (place / file).path
            with place.filesystem.open_input_stream(path, compression=None) as stream:
                # Not splitlines: that also cuts at characters that a file's name may hold.
                for line in io.TextIOWrapper(stream, "utf-8", newline="\n"):
                    if line.strip():
                        yield json.loads(line)


def _sources(config: Mapping[str, Any]) -> list[str]:
    """The paths in `data.train`."""
    data = config.get("data")
    train = data.get("train") if isinstance(data, Mapping) else None
    if isinstance(train, Mapping):
        return [source["path"] for source in train.values()]
    return list(train) if isinstance(train, list) else [train] if train else []
