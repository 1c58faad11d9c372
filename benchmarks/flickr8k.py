"""The `flickr8k` recipe from shards to table: train, evaluate, and record the numbers that docs/results.md quotes.

    python benchmarks/flickr8k.py --train 'data/flickr8k_train-*.parquet' --tasks retrieval:data/flickr8k_val.parquet \\
        zeroshot:data/cifar10_test.parquet --output benchmarks/results/flickr8k.json

Options after `--` go to the training job. The data are the user's own; nothing of them is kept in the result.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from msclip import checkpoint, metrics_log
from msclip.storage import Folder
from pipelines import cli, evaluate, report, session, train
from pipelines.jobs import ClusterConfig


def hardware() -> dict[str, Any]:
    """What ran it."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": gpus,
        "cpus": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
    }


def commit() -> str:
    """The commit of this tree; empty outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def main() -> int:
    """Runs the recipe; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="shards, a Parquet file or a glob")
    parser.add_argument("--tasks", required=True, nargs="+", help="as for pipelines.evaluate")
    parser.add_argument("--storage", default="runs", help="where the run goes")
    parser.add_argument("--gallery", help="captioned Parquet for the report's gallery")
    parser.add_argument("--checkpoints", default="all", help="as for pipelines.evaluate")
    parser.add_argument("--commit", default=commit(), help="recorded with the result")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("rest", nargs="*", help="options of pipelines.train, after --")
    options = parser.parse_args()
    run = Folder(options.storage) / "flickr8k"
    with session.cluster(ClusterConfig(address="local")):
        started = time.monotonic()
        status = train.main(
            ["--config", "flickr8k", "--data.train", options.train, "--run.storage", options.storage, *options.rest]
        )
        trained = time.monotonic()
        if status:
            return status
        status = evaluate.main(["--run", run.url, "--checkpoints", options.checkpoints, "--tasks", *options.tasks])
    evaluated = time.monotonic()
    last = checkpoint.finished(run)[-1]
    results = [
        json.loads((run / "evaluation" / last.name).read_text(name))
        for name in (run / "evaluation" / last.name).names("*.json")
    ]
    records = metrics_log.read(run)
    settled = records[len(records) // 10 :]
    summary = {
        "what": "flickr8k recipe, from scratch",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": options.commit,
        "hardware": hardware(),
        "versions": train.versions(),
        "command": " ".join(["pipelines.train", "--config", "flickr8k", *options.rest]),
        "parameters": sum(t.numel() for t in checkpoint.load(last.url).model.parameters()),
        "steps": records[-1]["step"],
        "epochs": round(records[-1]["epoch"], 2),
        "seconds_training": round(trained - started, 1),
        "seconds_evaluation": round(evaluated - trained, 1),
        "pairs_per_second_median": sorted(r["train/pairs_per_second"] for r in settled)[len(settled) // 2],
        "data_wait_median": sorted(r["train/data_wait"] for r in settled)[len(settled) // 2],
        "last_record": records[-1],
        "results": [{k: r[k] for k in ("dataset", "task", "metrics", "chance", "rows") if k in r} for r in results],
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(summary, indent=1) + "\n")
    report.main(["--run", run.url, *(["--data", options.gallery] if options.gallery else [])])
    print(json.dumps(summary["results"], indent=1))
    return status


if __name__ == "__main__":
    sys.exit(cli.guard(main))
