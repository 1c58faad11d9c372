"""The main job on one small machine, on data it makes itself: draw, ingest, train, evaluate every checkpoint, report.

The drawn scenes hold some pairings of colour and shape out of training (a red triangle, say, where red things and triangles
both occur), so the zero-shot accuracy at the end is on combinations the model has never seen.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from msclip import checkpoint
from msclip.errors import UserError
from msclip.storage import Folder
from pipelines import cli, evaluate, ingest, report, session, train
from pipelines.jobs import ClusterConfig
from pipelines.scenes import TEMPLATES, DemoData, draw_dataset

MARKER = ".msclip-demo"
BATCH = 256  # training.global_batch of the shipped config


@dataclass(frozen=True)
class DemoJob:
    """Draw a small data set and run the whole workflow on it."""

    output: str = "demo"
    """Folder for everything; what an earlier demo left there is replaced."""
    images: int = 4000
    """Training images to draw."""
    epochs: float = 16
    """Passes over them."""
    workers: int = 2
    """Training processes."""
    seed: int = 0
    """Of the drawings and of training."""

    def __post_init__(self) -> None:
        if self.images < BATCH or self.epochs <= 0 or self.seed < 0:
            raise UserError(
                f"--images must be at least {BATCH}, --epochs positive and --seed not negative, got {self.images}, "
                f"{self.epochs} and {self.seed}"
            )
        if self.workers < 1 or BATCH % self.workers or self.workers > (os.cpu_count() or 1):
            raise UserError(
                f"--workers must divide {BATCH} and not exceed this machine's {os.cpu_count()} CPUs, got {self.workers}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    job = cli.parse(DemoJob, argv, prog="demo")
    started, folder = time.monotonic(), fresh_folder(job.output)

    def say(text: str) -> None:
        print(f"\n[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    say(f"Drawing {job.images:,} captioned scenes")
    data = draw_dataset(folder / "data", train=job.images, seed=job.seed)
    print(f"held out of training: {', '.join(data.classes)}")
    with session.cluster(ClusterConfig(num_workers=job.workers, address="local")):
        say("Ingesting them into shards")
        shards, run = str(folder / "shards"), str(folder / "runs" / "demo")
        status = ingest.main(["--input", str(data.images), "--captions", str(data.captions), "--output", shards])
        if status:
            return status
        say("Training a small MS-CLIP-S")
        warmup = min(40, int(job.epochs * job.images / BATCH / 8))
        status = train.main(
            [
                *("--config", "demo", "--data.train", shards, "--run.storage", str(folder / "runs")),
                *("--cluster.num_workers", str(job.workers), "--training.epochs", str(job.epochs)),
                *("--training.seed", str(job.seed), "--optim.warmup_steps", str(warmup)),
            ]
        )
        if status:
            return status
        say("Evaluating every checkpoint")
        status = evaluate.main(["--run", run, "--tasks", str(task_file(folder, data))])
        if status:
            return status
        say("Writing the report")
        status = report.main(["--run", run, "--data", str(data.val)])
    result = zero_shot(Folder(run))
    accuracy, chance = result["metrics"]["acc1"], result["chance"]["acc1"]
    say(
        f"Zero-shot accuracy on {len(data.classes)} combinations never seen in training: {accuracy:.1%} "
        f"(chance {chance:.1%}, {accuracy / chance:.1f} times)"
    )
    print(f"report: {Path(run) / 'report' / 'index.html'}")
    return status


def fresh_folder(output: str) -> Path:
    """An empty folder of the demo's own.

    Raises:
        UserError: the folder holds something that no demo put there.
    """
    folder = Path(output).resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise UserError(f"--output must be a new folder or that of an earlier demo, got {output!r}, which holds other things")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def task_file(folder: Path, data: DemoData) -> Path:
    """What to measure: zero-shot on the held-out combinations, in the captions' own words, and retrieval on new scenes."""
    heldout = {"name": "heldout", "kind": "zeroshot", "data": str(data.heldout), "templates": list(TEMPLATES)}
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump([heldout, {"name": "val", "kind": "retrieval", "data": str(data.val)}]))
    return path


def zero_shot(run: Folder) -> dict[str, dict[str, float]]:
    """The last checkpoint's result on the held-out combinations."""
    last = checkpoint.finished(run)[-1].name
    result = json.loads((run / "evaluation" / last).read_text("heldout.json"))
    assert isinstance(result, dict)
    return result


if __name__ == "__main__":
    sys.exit(cli.guard(main))
