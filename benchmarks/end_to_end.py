"""Pairs a second of a training job on JPEG shards, beside the same model's on random pixels in the same run.

    python benchmarks/end_to_end.py --train 'data/flickr8k_train-*.parquet' --model ms_clip_s_b32 --batch 2048 --steps 60 \\
        --output benchmarks/results/end_to_end.json

The job is `pipelines.train` with one worker: Ray Data reads, processes decode beside the GPU, the loop trains. Its rate is the
median of its records behind the first fifth, in which kernels are compiled and queues fill; its report of where the time went
comes with it. The rate on random pixels is `train_throughput.py`'s, of the same batch and precision.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import train_throughput

from msclip import metrics_log
from msclip.storage import Folder
from msclip.timing import PARTS, bottleneck
from msclip.training import TrainingConfig
from pipelines import cli, session, train
from pipelines.jobs import ClusterConfig


def job(options: argparse.Namespace, storage: str) -> list[dict[str, Any]]:
    """The records of a finished training run."""
    arguments = {
        "--config": options.model,
        "--data.train": options.train,
        "--run.storage": storage,
        "--run.name": "end_to_end",
        "--cluster.num_workers": "1",
        "--cluster.autoscaling": "false",
        "--training.global_batch": str(options.batch),
        "--training.steps": str(options.steps),
        "--training.log_every_steps": "5",
        "--optim.warmup_steps": "1",
        "--checkpoint.every_steps": str(options.steps),
    }
    with session.cluster(ClusterConfig(address="local")):
        status = train.main([word for pair in arguments.items() for word in pair] + options.rest)
    if status:
        sys.exit(status)
    return metrics_log.read(Folder(storage) / "end_to_end")


def main() -> int:
    """Measures both; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", required=True, help="shards, a Parquet file or a glob")
    parser.add_argument("--model", default="ms_clip_s_b32", help="a configuration and preset")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--commit", help="recorded with the result, where there is no checkout to ask")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    parser.add_argument("rest", nargs="*", help="options of pipelines.train, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        records = job(options, storage)
    settled = records[len(records) // 5 :]
    rate = statistics.median(r["train/pairs_per_second"] for r in settled)
    seconds = {part: statistics.median(r[f"train/{part}_seconds"] for r in settled) for part in PARTS}
    compiled = TrainingConfig().compiles(train_throughput.device_of(0))
    case = train_throughput.Case("train", options.model, options.batch, compiled=compiled, steps=20, warmup=8)
    alone = train_throughput.run(case)
    result = {
        **train_throughput.machine(),
        **({"commit": options.commit} if options.commit else {}),
        "cores": len(os.sched_getaffinity(0)),
        "model": options.model,
        "batch": options.batch,
        "steps": options.steps,
        "job_pairs_per_second": round(rate, 1),
        "random_pixels_pairs_per_second": alone.get("pairs_per_second"),
        "share": round(rate / alone["pairs_per_second"], 4) if "pairs_per_second" in alone else alone,
        "seconds_of_a_step": {part: round(value, 5) for part, value in seconds.items()},
        "bottleneck": bottleneck(settled[-1]),
        "decode_processes": settled[-1]["train/decode_processes"],
        "records": records,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"job {rate:,.0f} pairs/s, random pixels {alone.get('pairs_per_second')}: {result['share']}; {result['bottleneck']}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.guard(main))
