"""The output folder of ingest: who writes there now, what dead ones left, and what may be cleared.

Everything an ingest writes before its manifest lies in folders named by its id, and a file INGESTING-<id> stands beside them
from before the first write until after the last. So ingests do not meet until they publish, and what one left that was
killed can be told from what another is writing.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime

from pyarrow import fs

from msclip.data.shards import MANIFEST, Manifest, is_data_set, newest, read_manifest, version_file, versions
from msclip.errors import TrainingError, UserError
from msclip.storage import Folder
from pipelines.claim import DEAD_SECONDS, owner, pid_space, repeated, started

INGESTING = "INGESTING-"
SHARDS = "shards"
QUARANTINE = "quarantine.jsonl"

_ID = r"\d{8}-\d{6}-[0-9a-f]{6}"
_QUARANTINE = re.compile(rf"quarantine-({_ID})\.jsonl")
_OLD_SHARD = re.compile(r"\d{5,}\.parquet")  # of manifests from before there were versions


@contextmanager
def ingesting(output: Folder) -> Iterator[str]:
    """An id of the ingest's own while the body runs.

    Its scratch folder goes afterwards, and its shards too unless a manifest names them. What dead ingests left goes first.

    Raises:
        UserError: the folder cannot be written to.
    """
    for name in output.names(f"{INGESTING}*"):
        if _is_dead(output, name):
            _discard(output, name.removeprefix(INGESTING))
    own = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"

    def say_alive() -> None:
        output.write_text(f"{INGESTING}{own}", owner() + "\n")

    try:
        say_alive()
    except OSError as error:
        raise UserError(f"output cannot be written to: {output.url}: {error.strerror or error}") from None
    failed = True
    try:
        with repeated(say_alive):
            yield own
        failed = False
    finally:
        with suppress(OSError) if failed else nullcontext():  # perhaps why it failed; then the next ingest clears up
            _discard(output, own)


def _is_dead(output: Folder, name: str) -> bool:
    try:
        told = json.loads(output.read_text(name))
        if told.get("pids") == pid_space():
            os.kill(told["pid"], 0)  # signal 0 only asks whether the process is there
            if told.get("started") and started(told["pid"]) != told["started"]:
                return True  # a later process of that id: containers give everybody the same, and their numbers come again
        return bool(time.time() - told["time"] > DEAD_SECONDS)
    except (ProcessLookupError, ValueError, KeyError, TypeError):
        return True
    except OSError:
        return False  # gone meanwhile, or another user's


def _discard(output: Folder, ingest: str) -> None:
    """Deletes what an ingest left that has not been published; the marker last."""
    if re.fullmatch(_ID, ingest):
        output.delete(f"scratch-{ingest}")
        discard_shards(output, ingest)
    output.delete(f"{INGESTING}{ingest}")


def discard_shards(output: Folder, ingest: str) -> None:
    """Deletes an ingest's shards, unless a manifest names them."""
    place = f"{SHARDS}/{ingest}"
    known = (read_manifest(output, version_file(v)) for v in reversed(versions(output)))
    if output.exists(place) and not any(file.startswith(f"{place}/") for manifest in known for file in manifest.files):
        output.delete(place)
        if not (output / SHARDS).names():
            output.delete(SHARDS)


def check_output(output: Folder, overwrite: bool) -> None:
    """Raises `UserError` unless the folder is empty, holds a data set, or may be overwritten."""
    if output.filesystem.get_file_info(output.path).type == fs.FileType.File:
        raise UserError(f"output must be a folder, got {output.url}, which is a file")
    if output.exists(MANIFEST) and not is_data_set(output):
        raise UserError(f"output {output.url} has a {MANIFEST} that no ingest wrote; choose another folder")
    alive = [name for name in output.names(f"{INGESTING}*") if not _is_dead(output, name)]
    if overwrite and alive:
        told = output.read_text(alive[0]).strip()
        raise UserError(
            f"output {output.url} cannot be overwritten while another ingest writes there ({told}); wait for it, or, if it is "
            f"gone, delete {alive[0]}"
        )
    if overwrite or newest(output) or output.names(f"{INGESTING}*"):
        return
    names = output.names()
    if any(_QUARANTINE.fullmatch(name) for name in names):  # left by an ingest that could use nothing
        names = [name for name in names if name != QUARANTINE and not _QUARANTINE.fullmatch(name)]
    if names:
        raise UserError(
            f"output {output.url} must be empty or hold a data set, and it has {', '.join(names[:5])}; choose another folder, "
            f"or --overwrite true, which replaces what ingests wrote and leaves other files"
        )


def check_shards(output: Folder, ingest: str, manifest: Manifest) -> None:
    """Raises `TrainingError` unless all of an ingest's shards that a manifest is to name are still there."""
    there = {f"{SHARDS}/{ingest}/{name}" for name in (output / SHARDS / ingest).names()}
    if gone := [file for file in manifest.files if file.startswith(f"{SHARDS}/{ingest}/") and file not in there]:
        raise TrainingError(
            f"{output.url}/{gone[0]} was deleted before it was published: this ingest had not been heard of for an hour, and "
            "another took it for dead; nothing was published, ingest again"
        )


def clear(output: Folder, manifest: Manifest) -> None:
    """Deletes what other ingests wrote before this version, and nothing else."""
    for version in versions(output):
        if version < manifest.version:
            output.delete(version_file(version))
    # First what is there, then who is at work, then what is published: so what others are about to publish is among these.
    shards = output / SHARDS
    there = shards.filesystem.get_file_info(fs.FileSelector(shards.path, allow_not_found=True))
    names = output.names()
    known = {name.removeprefix(INGESTING) for name in names if name.startswith(INGESTING)}
    for version in versions(output):
        known |= {ingest["id"] for ingest in read_manifest(output, version_file(version)).ingests}
    for info in there:
        old = info.type == fs.FileType.File and _OLD_SHARD.fullmatch(info.base_name)
        if old or (re.fullmatch(_ID, info.base_name) and info.base_name not in known):
            shards.delete(info.base_name)
    for name in names:
        if (match := _QUARANTINE.fullmatch(name)) and match[1] not in known:
            output.delete(name)
