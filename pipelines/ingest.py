"""Image-text pairs to shards: `python -m pipelines.ingest --input photos/ --captions captions.csv --output shards/`.

Ray Data reads the input once, unit by unit: every image is decoded in full, hashed and, if asked, scaled, and waits in a
scratch folder of the output. Only the rows' hashes and places come to this process, which decides what stays (evaluation
sets, duplicates, the cap per query), in what order, and in which shard; then each shard is a task. What does not stay is
listed with its reason in quarantine.jsonl.

A data set has versions. An ingest into a folder that holds one adds shards and publishes the next version; if another ingest
published meanwhile, this one decides again with the other's rows in view, and comes after it.
"""

import contextlib
import hashlib
import itertools
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msclip
from msclip.data.captions import Refused
from msclip.data.parquet import find, read_footer
from msclip.data.prepare import CaptionRules, Format, ImageRules
from msclip.data.queries import Queries
from msclip.data.selection import Deduplicate
from msclip.data.shards import Manifest, newest, versions
from msclip.data.sources import BYTES_NAMES, Source, holds_bytes, open_source
from msclip.data.statistics import Statistics
from msclip.errors import UserError, without_queries
from msclip.storage import Folder
from pipelines import cli, data_page, session
from pipelines.ingest_folder import QUARANTINE, check_output, check_shards, clear, discard_shards, ingesting
from pipelines.ingest_plan import Decision, write_records
from pipelines.ingest_run import Cluster
from pipelines.ingest_tasks import Known, Work, Written, refused
from pipelines.jobs import ClusterConfig


@dataclass(frozen=True)
class IngestJob:
    """Turn image-text pairs into verified and shuffled shards: a new data set, or the next version of one."""

    input: str
    """A folder of images (with a table of captions, or .txt and .json beside them); Parquet with image bytes, or tars as of
    webdataset and img2dataset: a file, a folder or a glob; local, s3:// or any URL that fsspec knows."""
    output: str
    """Folder for the shards, manifest.json and quarantine.jsonl; local, or shared by all nodes. Where it holds a data set,
    the new rows are added as its next version."""
    captions: str | None = None
    """Table of captions for a folder of images: CSV, TSV, JSONL or Parquet; null for the only one inside the folder, else
    the files beside the images."""
    image_column: str | None = None
    """Column with the image's path (in captions) or bytes (in Parquet); null for usual names: image, file, path, ..."""
    caption_column: str | None = None
    """Column, or in JSON beside an image the field, with a caption or a list of them; null for usual names: captions, caption,
    text, title."""
    key_column: str | None = None
    """Column of Parquet that identifies a row; null for key or id, else file and row."""
    source: str | None = None
    """Name recorded as the source of rows that have none; null for the input's own name."""
    image_short_side: int | None = None
    """Images with a longer shorter side are scaled down to this; null scales none. None is ever enlarged."""
    image_format: Format | None = None
    """`jpeg` or `webp`: every image is stored so; null: what is scaled becomes JPEG, and other files stay as they are."""
    image_quality: int = 92
    """Of what is encoded anew, 1 to 100."""
    min_image_side: int = 1
    """Images with a shorter side below this many pixels are left out."""
    max_aspect_ratio: float | None = None
    """Images whose longer side is more than this many times the shorter are left out; null for no limit."""
    min_caption_chars: int = 1
    """Shorter captions are left out, and with its last caption the row."""
    max_caption_chars: int | None = None
    """Longer captions likewise; null for no limit."""
    deduplicate: Deduplicate = "none"
    """`exact` leaves out images whose file has come before, and gives their captions to the one that stays; `near` also those
    that look like one before. What is in the output already comes first."""
    near_distance: int = 4
    """Perceptual hashes of 64 bits that differ in at most this many look alike: for deduplicate near and decontaminate."""
    decontaminate: list[str] = field(default_factory=list)
    """Parquet files, folders or globs of evaluation sets: rows whose image is in one of them, or looks alike, are left out."""
    queries: str | None = None
    """A text file with a query in each line: only rows with a caption that includes one stay, see pairs_per_query."""
    pairs_per_query: int = 20_000
    """Of the rows that match a query at most this many, drawn by lot, are taken for it; CLIP's own cap is the default."""
    shuffle_seed: int | None = 0
    """Rows are shuffled over the whole input by this seed; null keeps the input's order."""
    shard_rows: int = 4096
    """Rows of a shard."""
    shard_mib: int = 1024
    """A shard ends before its images exceed this many MiB."""
    row_group_rows: int = 256
    """Rows of a row group, which is what training reads at a time; also ended by 64 MiB of images."""
    overwrite: bool = False
    """Replace the data set in the output folder and all its versions, once the new rows are written; files that no ingest
    wrote stay."""
    address: str | None = None
    """A Ray cluster to join; local for a new one on this machine; null for the one running here, else new."""

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            if not getattr(self, name):  # "$UNSET" of a shell; it would mean the working folder
                raise UserError(f"{name} is empty; give a path or a URL")
        for name in ("shard_rows", "shard_mib", "row_group_rows", "pairs_per_query"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise UserError(f"shuffle_seed must not be negative, got {self.shuffle_seed}")
        if not 0 <= self.near_distance <= 16:
            raise UserError(f"near_distance must be from 0 to 16 of the 64 bits, got {self.near_distance}")
        encodes = self.image_short_side is not None or self.image_format is not None
        used = {
            "image_quality": (encodes, "image_short_side or image_format"),
            "near_distance": (self.deduplicate == "near" or self.decontaminate, "deduplicate near or decontaminate"),
            "pairs_per_query": (self.queries is not None, "queries"),
        }
        for field_ in fields(self):
            if field_.name in used and getattr(self, field_.name) != field_.default and not used[field_.name][0]:
                raise UserError(f"{field_.name} is only used with {used[field_.name][1]}, which is not set")

    @property
    def image_rules(self) -> ImageRules:
        """Which images are let in, and how they are stored."""
        return ImageRules(
            self.image_short_side, self.image_format, self.image_quality, self.min_image_side, self.max_aspect_ratio
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Ingests as the command line says; returns the exit status."""
    arguments = cli.gather(sys.argv[1:] if argv is None else argv, "--decontaminate")
    run(cli.parse(IngestJob, arguments, prog="ingest"))
    return 0


def run(job: IngestJob) -> Manifest:
    """Ingests and returns the data set's new version.

    Raises:
        UserError: the input is missing or unusable, or the output folder holds something that is not to be replaced.
        TrainingError: the disk is full, or the storage fails.
    """
    output = Folder(job.output)
    if f"{Folder(job.input).path}/".startswith(f"{output.path}/"):
        raise UserError(f"output must not be or hold the input, got output {job.output!r} and input {job.input!r}")
    rules = job.image_rules, CaptionRules(job.min_caption_chars, job.max_caption_chars)
    try:
        check_output(output, job.overwrite)
        queries = Queries.read(job.queries) if job.queries else None
        evaluation = [known for spec in job.decontaminate for known in _evaluation_groups(spec)]
        source = open_source(job.input, job.captions, job.image_column, job.caption_column, job.key_column, job.source)
        units, unread = source.units()
    except PermissionError as error:
        raise refused(error) from error
    if not units:
        told = _reasons(Counter(record.reason.partition(":")[0] for record in unread))
        raise UserError(f"nothing to ingest in {job.input!r}: no image has a caption. {told}")
    if not job.overwrite:
        _check_new(job, newest(output))
    # In this order, so that no task writes any more when what it wrote is deleted.
    with ingesting(output) as own, session.cluster(ClusterConfig(address=job.address)):
        with Cluster(Work(source, output, own, job.row_group_rows, *rules, queries, None), units) as cluster:
            manifest = _Ingest(job, source, output, own, unread, cluster, evaluation).run()
        if manifest.ingests and manifest.ingests[-1]["id"] == own:
            data_page.write(manifest)
            _say(manifest)
    return manifest


def _check_new(job: IngestJob, present: Manifest | None) -> None:
    """Raises `UserError` for an input that would be in the data set twice."""
    for ingest in present.ingests if present else ():
        known = {name: ingest[name] for name in ("input", "address_sha256") if name in ingest}
        if known == _address(job.input) and job.deduplicate == "none":
            raise UserError(
                f"input {job.input!r} is in {job.output!r} already, since version {ingest['version']} of {ingest['created']}, "
                "and its rows would be there twice; --deduplicate exact adds only new ones, --overwrite true starts over"
            )


def _address(spec: str) -> dict[str, str]:
    """How a manifest names an input: where its query may be a key, by a digest of the whole address, which tells none."""
    folder = Folder(spec)
    whole = folder.full_url
    return {"input": folder.url} | (
        {"address_sha256": hashlib.sha256(whole.encode()).hexdigest()[:16]} if whole != folder.url else {}
    )


def _evaluation_groups(spec: str) -> list[Known]:
    folder, files = find(spec)
    known = []
    for file in files:
        footer = read_footer(folder, file).metadata
        columns = {field.name: field.type for field in footer.schema.to_arrow_schema()}
        column = next((name for name in BYTES_NAMES if name in columns and holds_bytes(columns[name])), None)
        if column is None:
            raise UserError(
                f"decontaminate {spec!r}: {file} has the bytes of images in none of the usual columns "
                f"{', '.join(BYTES_NAMES)}, but has {', '.join(f'{name} ({kind})' for name, kind in columns.items())}"
            )
        known += [Known(folder, file, group, column) for group in range(footer.num_row_groups)]
    return known


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in Counter(counts).most_common())


@dataclass
class _Ingest:
    """One ingest on a cluster, from the input to the published version."""

    job: IngestJob
    source: Source
    output: Folder
    id: str
    unread: list[Refused]
    """What is refused without being opened."""
    cluster: Cluster
    evaluation: list[Known]

    def run(self) -> Manifest:
        """Reads once, then decides and writes until a version is published."""
        job = self.job
        rows = self.cluster.prepare()
        evaluation = self.cluster.hash_known(self.evaluation)
        while True:
            base = None if job.overwrite else self._base()
            looked_at = base and (job.deduplicate != "none" or job.queries)
            present = self.cluster.hash_known(_row_groups(base) if base and looked_at else [])
            cap = job.pairs_per_query if job.queries else None
            decision = Decision(rows, present, evaluation, job.deduplicate, job.near_distance, cap, job.shuffle_seed)
            shards = decision.shards(job.shard_rows, job.shard_mib * 2**20)
            dropped = self._quarantine(itertools.chain(self.unread, decision.refused()))
            if not shards:
                return self._nothing(base, dropped)
            manifest = self._manifest(base, self.cluster.write(shards), dropped, len(rows) + len(self.unread))
            check_shards(self.output, self.id, manifest)
            try:
                manifest.publish()
            except FileExistsError:
                print(f"another ingest has published version {manifest.version}: deciding again", flush=True)
                discard_shards(self.output, self.id)
                self.cluster.rewrite()
            else:
                if job.overwrite:
                    clear(self.output, manifest)
                return manifest

    def _base(self) -> Manifest | None:
        """The version to add to; a data set from before there were versions becomes the first."""
        base = newest(self.output)
        if base and not base.version:
            with contextlib.suppress(FileExistsError):  # another ingest did it
                replace(base, version=1).publish()
            return newest(self.output)
        return base

    def _quarantine(self, records: Iterator[Refused]) -> Counter[str]:
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / QUARANTINE
            counts = write_records(records, local)
            for name in (f"quarantine-{self.id}.jsonl", QUARANTINE):
                self.output.upload(local, name)
        return counts

    def _nothing(self, base: Manifest | None, dropped: Counter[str]) -> Manifest:
        told = f"{_reasons(dropped)} ({(self.output / QUARANTINE).url})"
        if base is None:
            raise UserError(f"none of the {sum(dropped.values()):,} rows of {self.job.input!r} could be used: {told}")
        print(f"nothing to add: {told}; version {base.version} of {base.rows:,} rows stays the newest")
        return base

    def _manifest(self, base: Manifest | None, written: list[Written], dropped: Counter[str], read: int) -> Manifest:
        kept = sum(each.shard.rows for each in written)
        # Also what replaces all versions comes after them: so it is there before they go.
        number = 1 + (base.version if base else max(versions(self.output), default=0))
        if kept + sum(dropped.values()) != read:
            raise RuntimeError(f"of {read} rows {kept} were written and {sum(dropped.values())} refused")
        base = base or Manifest(self.output, ())
        statistics = Statistics.from_dict(base.statistics)
        for each in written:
            statistics.merge(Statistics.from_dict(each.statistics))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        settings = {name: value for name, value in asdict(self.job).items() if name not in ("overwrite", "address")}
        ingest = {
            "version": number,
            "id": self.id,
            "created": created,
            **_address(self.job.input),
            "source": self.source.name,
            "read": read,
            "kept": kept,
            "dropped": dict(dropped.most_common()),
            "quarantine": f"quarantine-{self.id}.jsonl",
            "settings": {name: _public(value) for name, value in settings.items()},
            "software": {
                "msclip": msclip.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("pillow", "pyarrow", "ray")},
            },
        }
        return Manifest(
            self.output,
            (*base.shards, *(each.shard for each in written)),
            quarantined=base.quarantined + sum(dropped.values()),
            sources=sum((Counter(each.sources) for each in written), Counter(base.sources)),
            created=created,
            version=number,
            statistics=statistics.to_dict(),
            ingests=(*base.ingests, ingest),
        )


def _public(setting: Any) -> Any:
    """A setting as it may be written down: of addresses of the web without the query."""
    if isinstance(setting, list):
        return [_public(each) for each in setting]
    return without_queries(setting) if isinstance(setting, str) else setting


def _row_groups(manifest: Manifest) -> list[Known]:
    places = ((shard.file, group) for shard in manifest.shards for group in range(len(shard.row_groups)))
    return [Known(manifest.folder, file, group, manifest.image_column) for file, group in places]


def _say(manifest: Manifest) -> None:
    ingest = manifest.ingests[-1]
    shards = [shard for shard in manifest.shards if f"/{ingest['id']}/" in shard.file]
    size, output = sum(shard.size for shard in shards) / 2**20, manifest.folder
    print(f"ingested {ingest['kept']:,} rows into {len(shards):,} shards ({size:,.1f} MiB): {output.url}")
    if manifest.version > 1:
        print(f"version {manifest.version} of the data set has {manifest.rows:,} rows in {len(manifest.shards):,} shards")
    said = f"quarantined {sum(ingest['dropped'].values()):,}"
    print(f"{said}: {_reasons(ingest['dropped'])} ({(output / QUARANTINE).url})" if ingest["dropped"] else said)
    print(f"look at it: {(output / data_page.PAGE).url} and {data_page.SHEET}")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
