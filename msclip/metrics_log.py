"""Where a run's numbers go: `metrics.jsonl` and TensorBoard events in the run's folder.

Object stores cannot append, so there both are kept on the local disk and copied up now and then. A resumed run first drops
the lines after the step it goes on from: every step occurs once.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from msclip.storage import Folder

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
UPLOAD_EVERY_SECONDS = 20.0


def read(run: Folder) -> list[dict[str, Any]]:
    """All records of a run, by step; a last line that a crash cut short is left out."""
    if not run.exists(METRICS):
        return []
    records = []
    for line in run.read_text(METRICS).splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def newest(run: Folder) -> dict[str, Any] | None:
    """The last record of a run; of a local one, without reading the whole log."""
    if run.local is None or not run.exists(METRICS):
        records = read(run)
        return records[-1] if records else None
    with (run.local / METRICS).open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 8192))
        for line in reversed(file.read().splitlines()):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # being written, or cut at the start of what was read
                continue
            if isinstance(record, dict):
                return record
    return None


class MetricsLog:
    """Appends records; used by rank 0 alone.

    Args:
        run: the run's folder.
        start_step: records of this step and later are dropped first.
    """

    def __init__(self, run: Folder, start_step: int):
        self.run = run
        self.scratch = None if run.local else Path(tempfile.mkdtemp(prefix="msclip-metrics-"))
        here = run.local or self.scratch
        assert here is not None
        self.here = here
        kept = [record for record in read(run) if record["step"] < start_step]
        self.last: dict[str, Any] = kept[-1] if kept else {}
        Folder(self.here).write_text(METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        # One folder an attempt: TensorBoard merges them and drops what a later one rewinds.
        self.events = f"{TENSORBOARD}/from_{start_step:08d}"
        self.board = SummaryWriter(str(self.here / self.events), purge_step=start_step)
        self.uploaded = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        """One line, and one point in each TensorBoard curve."""
        Folder(self.here).append_text(METRICS, json.dumps(record) + "\n")
        for name, value in record.items():
            if name.startswith("train/"):
                self.board.add_scalar(name, value, record["step"])
        if self.scratch and time.monotonic() - self.uploaded > UPLOAD_EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes everything written so far visible in the run's folder."""
        self.board.flush()
        self.uploaded = time.monotonic()
        if self.scratch:
            self.run.upload(self.scratch / METRICS, METRICS)
            for file in sorted((self.scratch / self.events).iterdir()):
                self.run.upload(file, f"{self.events}/{file.name}")

    def close(self) -> None:
        """Writes what is left; nothing may be written after."""
        self.flush()
        self.board.close()
        if self.scratch:
            shutil.rmtree(self.scratch)
