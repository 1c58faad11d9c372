"""The `flickr8k` recipe from shards to table: train, evaluate, and record the numbers that docs/results.md quotes.

    python benchmarks/flickr8k.py --train 'data/flickr8k_train-*.parquet' --tasks retrieval:data/flickr8k_val.parquet \\
        zeroshot:data/cifar10_test.parquet --output benchmarks/results/flickr8k.json

Options after `--` go to the training job. With `--run`, a finished run is only summed up. The data are the user's own;
nothing of them is kept in the result.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import yaml

import msclip
from msclip import metrics_log
from msclip.config import ModelConfig
from msclip.storage import Folder
from pipelines import cli, evaluate, session, train
from pipelines.jobs import ClusterConfig


def commit() -> str:
    """The commit of this tree; empty outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def summarise(run: Folder, code: str) -> dict[str, Any]:
    """What a finished, evaluated run amounts to."""
    records = metrics_log.read(run)
    settled = records[len(records) // 10 :]
    config = yaml.safe_load(run.read_text(train.CONFIG))
    results = [
        json.loads((run / "evaluation" / step).read_text(name))
        for step in (run / "evaluation").names("step_*")
        for name in (run / "evaluation" / step).names("*.json")
    ]
    model = msclip.build(ModelConfig.from_dict(config["model"]), device="meta")
    return {
        "what": "the flickr8k recipe, from scratch",
        "date": datetime.datetime.fromtimestamp(records[-1]["time"], datetime.UTC).date().isoformat(),
        "commit": code,
        "device": results[-1]["device"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": {key: config[key] for key in ("model", "optim", "training")} | {"augment": config["data"]["augment"]},
        "steps": records[-1]["step"],
        "epochs": round(records[-1]["epoch"], 1),
        "seconds_between_first_and_last_record": round(records[-1]["time"] - records[0]["time"], 1),
        "pairs_per_second_median": round(statistics.median(r["train/pairs_per_second"] for r in settled)),
        "data_wait_median": round(statistics.median(r["train/data_wait"] for r in settled), 4),
        "last_record": records[-1],
        "results": [
            {key: r[key] for key in ("step", "dataset", "task", "metrics", "chance", "rows", "skipped_rows")} for r in results
        ],
    }


def draw(run: Folder, summary: dict[str, Any], path: Path) -> None:
    """Training loss, and recall on the validation set over steps."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "msclip"  # the same curves, the same file
    import matplotlib.pyplot as plt

    records = metrics_log.read(run)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([r["epoch"] for r in records], [r["train/loss"] for r in records], color="#4269d0")
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    found = [r for r in summary["results"] if r["task"] == "zeroshot_retrieval"]
    per_epoch = summary["epochs"] / summary["steps"]
    for way, name, colour in (("image", "text to image", "#4269d0"), ("text", "image to text", "#efb118")):
        values = [100 * r["metrics"][f"{way}_retrieval_recall@10"] for r in found]
        right.plot([r["step"] * per_epoch for r in found], values, marker="o", color=colour, label=name)
    right.axhline(100 * found[0]["chance"]["image_retrieval_recall@10"], color="grey", linestyle="--", label="chance")
    right.set(xlabel="epoch", ylabel="R@10 on 1,000 images, %", ylim=(0, None))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Runs the recipe; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", help="sum up this finished run instead of making one")
    parser.add_argument("--train", help="shards, a Parquet file or a glob")
    parser.add_argument("--tasks", nargs="+", default=[], help="as for pipelines.evaluate")
    parser.add_argument("--storage", default="runs", help="where the run goes")
    parser.add_argument("--commit", default=commit(), help="recorded with the result")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write; curves go beside it as SVG")
    parser.add_argument("rest", nargs="*", help="options of pipelines.train, after --")
    options = parser.parse_args()
    if not options.run:
        with session.cluster(ClusterConfig(address="local")):
            arguments = ["--config", "flickr8k", "--data.train", options.train, "--run.storage", options.storage]
            status = train.main([*arguments, *options.rest])
            if not status:
                run_url = (Folder(options.storage) / "flickr8k").url
                status = evaluate.main(["--run", run_url, "--tasks", *options.tasks])
            if status:
                return status
    run = Folder(options.run) if options.run else Folder(options.storage) / "flickr8k"
    summary = summarise(run, options.commit)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(summary, indent=1) + "\n")
    draw(run, summary, options.output.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(cli.guard(main))
