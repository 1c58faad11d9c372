"""Memory of the data path over data sets of growing size: does anything grow with the data?

    python benchmarks/data_memory.py --rows 10000 100000 --output benchmarks/results/data_memory.json

Each size has a process and a Ray of its own, whose object store is smaller than the larger data sets. One training worker
takes one epoch of batches, read by Ray Data and decoded beside the worker as in training, and throws them away. Sampled 20
times a second: resident memory of the worker (all of it, and without pages that others share, as those of the object store), of
its decoding processes, and bytes in use in the object store. Images are small drawings with noise behind the JPEG's end, so
that they are as large as real files and cheap to decode. `--place` may be a URL.
"""

import argparse
import datetime
import gc
import io
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from msclip.data.decode import Recipe
from msclip.data.images import Preprocess
from msclip.data.loader import Batches
from msclip.data.plan import Plan
from msclip.data.shards import Manifest
from msclip.data.tokenizer import Tokenizer
from msclip.s3_requests import repeated
from msclip.storage import Folder
from pipelines.stream import ray_units

SHARD_ROWS, ROW_GROUP_ROWS = 1000, 128
CAPTION = "a drawing of nothing in particular, number {}"


def write_shards(folder: Folder, rows: int, image_bytes: int) -> None:
    """Parquet files with `rows` images of so many bytes."""
    random = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(random.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
    with tempfile.TemporaryDirectory() as scratch:
        for shard, first in enumerate(range(0, rows, SHARD_ROWS)):
            numbers = range(first, min(first + SHARD_ROWS, rows))
            noise = image_bytes - file.tell()
            images = [file.getvalue() + random.bytes(noise) for _ in numbers]
            columns = {"image": images, "captions": [[CAPTION.format(number)] for number in numbers]}
            pq.write_table(pa.table(columns), f"{scratch}/x", row_group_size=ROW_GROUP_ROWS, compression="none")
            folder.upload(f"{scratch}/x", f"{shard:05d}.parquet")


class Sampler(threading.Thread):
    """MiB that this process, its own children that decode, and Ray's object store hold, 20 times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, ...]] = []
        self.done = threading.Event()

    def run(self) -> None:
        import ray
        from ray._private.internal_api import node_stats

        node = ray.nodes()[0]
        worker = psutil.Process()
        while not self.done.wait(0.05):
            decoding = 0
            for child in worker.children(recursive=True):
                try:
                    decoding += child.memory_info().rss if "msclip.data.pool" in " ".join(child.cmdline()) else 0
                except psutil.Error:
                    continue
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
            store = stats.store_stats.object_store_bytes_used
            memory = worker.memory_info()
            self.samples.append(tuple(size / 2**20 for size in (memory.rss, memory.rss - memory.shared, decoding, store)))


def measure(url: str, options: argparse.Namespace, results: Any) -> None:
    """One epoch in this process."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # nobody else is to join
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray_folder:
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            object_store_memory=options.store_mib * 2**20,
            log_to_driver=False,
            _temp_dir=ray_folder,
        )
        manifest = Manifest.load(url)
        plan = Plan(manifest.sizes, options.batch, seed=0, window=1)
        tokenizer = Tokenizer.train([CAPTION.format(number) for number in range(1000)], 600, 32)
        recipe = Recipe.of(manifest, Preprocess(image_size=options.image_size), None, tokenizer, seed=0)
        steps = plan.steps_per_epoch
        place = (0, 1, 0, int(steps))
        sampler = Sampler()
        seen: list[np.ndarray] = []
        began = time.monotonic()
        with Batches(plan, *place, ray_units(manifest, plan, *place), recipe, processes=options.processes) as batches:
            sampler.start()
            for batch in batches:
                seen.append(batch.rows)
        seconds = time.monotonic() - began
        sampler.done.set()
        sampler.join()
        ray.shutdown()
        gc.collect()
    columns = np.array(sampler.samples)
    rows = np.concatenate(seen)
    names = ("worker_mib", "worker_private_mib", "decoding_processes_mib", "object_store_mib")
    half = columns[len(columns) // 2 :]
    results.put(
        {
            "rows": manifest.rows,
            "data_mib": round(sum(shard.size for shard in manifest.shards) / 2**20),
            "distinct_rows_trained_on": len(np.unique(rows)),
            "seconds": round(seconds, 1),
            "storage_retries": repeated.take(),
            "peak": dict(zip(names, columns.max(0).round().tolist(), strict=True)),
            "median_of_second_half": dict(zip(names, np.median(half, 0).round().tolist(), strict=True)),
        }
    )


def main() -> int:
    """Measures the sizes asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="*", type=int, default=[10_000, 100_000])
    parser.add_argument("--image_bytes", type=int, default=16_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--processes", type=int, default=1, help="that decode")
    parser.add_argument("--store_mib", type=int, default=200, help="memory of Ray's object store")
    parser.add_argument("--place", help="a folder or URL for the data; a temporary folder by default")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    head = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "device": f"CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "settings": {n: getattr(options, n) for n in ("image_bytes", "batch", "image_size", "processes", "store_mib")},
    }
    records = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        for rows in options.rows:
            folder = Folder(options.place or scratch) / f"{rows}"
            write_shards(folder, rows, options.image_bytes)
            results = context.Queue()
            process = context.Process(target=measure, args=(folder.url, options, results))
            process.start()
            process.join()
            if process.exitcode:
                return 1
            records.append(results.get())
            folder.delete()
            print(json.dumps(records[-1]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**head, "cases": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
