"""Images a second from shards into a training worker: this pipeline, what bounds it, and the loaders it competes with.

`python benchmarks/data_throughput.py --data 'flickr8k_train*.parquet' --output benchmarks/results/data_throughput.json`

On the same files and cores, one after another and in several rounds, so that a busy machine disturbs all alike:

- `pillow`: a bare Pillow loop, a process a core, files already in memory. The limit.
- `msclip`: this pipeline, through Ray Data into a worker of Ray Train.
- `webdataset`: the stages of open_clip's loader (tar shards, shuffle, decode, normalise, collate) with a worker a core.
- `mosaic`: Mosaic Streaming (MDS shards) in PyTorch's DataLoader with a worker a core.
- `ray_data`: `read_parquet().map_batches(decode).iter_batches()`, as Ray Data's documentation shows it, epoch after epoch.

All make 224-pixel views of the same kind, for a consumer that does nothing with them. `images_per_second` counts from the
moment at which a loader may begin to read, so what it prepares before its first batch comes has taken its time too: counted
from the first batch, Ray Data hands over for half a minute what lay ready in its store. Not counted are imports and the start
of Ray and of the training worker. Ray still starts reading processes, for seconds of CPU, while this pipeline delivers already:
`images_per_second_later_half` is its rate in a training that lasts. `images_per_second_by_tenth` shows what came when, and
`cpu_microseconds_per_image` which processes did what for an image in the later half (of this benchmark's processes alone).

Each run ends after `--seconds`, or when it has failed to begin or to end within two minutes more; no round begins after
`--minutes`. So all takes at most that, one round, and the writing of shards (on the disk the same again for tars and for MDS).
A loader that is not installed is recorded as absent. Nothing is downloaded.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

VIEW, BATCH, TAR = 224, 512, 1000
SHARD_BYTES, ROW_GROUP = 256 * 2**20, 256
START_SECONDS = 120
ROOT = "MSCLIP_BENCHMARK_PROCESS"
"""The variable with the id of a run's first process."""
KINDS = {
    "msclip.data.pool": "decode",
    "RayTrainWorker": "training worker",
    "ray::IDLE": "read",
    "ray::": "ray",
    "raylet": "ray",
}
"""What a process is for, by what its command line holds."""
MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # as where a job starts its own Ray
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def rows_of(data: str) -> Iterator[tuple[bytes, list[str]]]:
    """Images and captions of the files that a glob names."""
    from msclip.data.captions import texts
    from msclip.data.shards import Manifest

    manifest = Manifest.load(data)
    for group in range(len(manifest.row_groups)):
        table = manifest.read(group)
        for image, captions in zip(table["image"].to_pylist(), table["captions"].to_pylist(), strict=True):
            yield image, texts(captions)


def enlarged(image: bytes, size: int) -> bytes:
    """The image with `size` pixels a side, as a camera might have stored it."""
    opened, file = Image.open(io.BytesIO(image)), io.BytesIO()
    if opened.size == (size, size):
        return image
    opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_shards(data: str, size: int, rows: int, distinct: int, cores: int, folder: Path) -> None:
    """`rows` rows in Parquet as `pipelines.ingest` writes it: the first `distinct` images of `data`, again and again."""
    found = list(itertools.islice(rows_of(data), min(rows, distinct)))
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        images = pool.map(functools.partial(enlarged, size=size), [image for image, _ in found], chunksize=16)
    shards = max(2, math.ceil(rows * sum(map(len, images)) / len(images) / SHARD_BYTES))
    for shard in range(shards):
        mine = range(shard, rows, shards)
        captions = [found[i % len(found)][1] for i in mine]
        table = pa.table({"image": pa.array([images[i % len(found)] for i in mine], pa.binary()), "captions": captions})
        compression = {"image": "none", "captions.list.element": "zstd"}
        place = folder / f"{shard:04d}.parquet"
        pq.write_table(table, place, row_group_size=ROW_GROUP, compression=compression, use_dictionary=False)


def shard_rows(folder: str, columns: list[str]) -> Iterator[list[Any]]:
    """Row groups of the shards, column by column."""
    for path in sorted(Path(folder).glob("*.parquet")):
        source = pq.ParquetFile(path)
        for group in range(source.num_row_groups):
            yield [column.to_pylist() for column in source.read_row_group(group, columns=columns)]


def bare(file: bytes) -> np.ndarray:
    """The least that Pillow needs for the view: scaled decoding, then bicubic."""
    image = Image.open(io.BytesIO(file))
    image.draft("RGB", (2 * VIEW, 2 * VIEW))
    return np.asarray(image.convert("RGB").resize((VIEW, VIEW), Image.Resampling.BICUBIC))


def processor_times() -> dict[int, tuple[str, float]]:
    """What each process of this run is for, and its CPU seconds so far."""
    root = psutil.Process(int(os.environ[ROOT]))
    times = {}
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            line, used = " ".join(process.cmdline()), process.cpu_times()
            kind = next((kind for mark, kind in KINDS.items() if mark in line), "other")
            times[process.pid] = "read" if line.startswith("ray::Read") else kind, used.user + used.system
    return times


def counted(batches: Iterable[int], seconds: float, began: float) -> dict[str, Any]:
    """Speed of a loader that yields numbers of images, over `seconds` since it began, or fewer where its batches end."""
    stamps: list[tuple[float, int]] = []
    total, middle, at_middle = 0, 0, processor_times()
    for count in batches:
        total += count
        stamps.append((time.perf_counter() - began, total))
        if not middle and stamps[-1][0] > seconds / 2:
            middle, at_middle = total, processor_times()
        if stamps[-1][0] > seconds:
            break
    spent: Counter[str] = Counter()
    for pid, (kind, used) in processor_times().items():
        spent[kind] += used - at_middle.get(pid, ("", 0.0))[1]
    last = stamps[-1][0]
    until = [max((done for at, done in stamps if at <= last * tenth / 10), default=0) for tenth in range(11)]
    return {
        "first_batch_seconds": stamps[0][0],
        "images_per_second": total / last,
        "images_per_second_later_half": (total - until[5]) / last * 2,
        "images_per_second_by_tenth": [round((b - a) / last * 10) for a, b in itertools.pairwise(until)],
        "cpu_microseconds_per_image": {kind: round(used / max(1, total - middle) * 1e6) for kind, used in spent.most_common()},
    }


def run_pillow(folder: str, cores: int, seconds: float) -> dict[str, Any]:
    files = next(shard_rows(folder, ["image"]))[0]
    context = multiprocessing.get_context("fork")
    counts = context.Queue()

    def work() -> None:
        for file in files[:50]:
            bare(file)
        done, began, used = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            bare(files[done % len(files)])
            done += 1
        counts.put((done, time.perf_counter() - began, time.process_time() - used))

    processes = [context.Process(target=work) for _ in range(cores)]
    for process in processes:
        process.start()
    found = [counts.get() for _ in processes]
    images = sum(done for done, _, _ in found)
    return {
        "images_per_second": sum(done / elapsed for done, elapsed, _ in found),
        "cpu_microseconds_per_image": {"decode": round(sum(used for _, _, used in found) / images * 1e6)},
    }


def start_ray(cores: int) -> Any:
    import ray

    ray.init(
        address="local",
        num_cpus=cores + 2,  # reading holds a logical CPU while it waits, and so does the training worker
        include_dashboard=False,
        object_store_memory=min(4 * 2**30, int(0.9 * shutil.disk_usage("/dev/shm").free)),
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {**ENVIRONMENT, ROOT: os.environ[ROOT]}},
    )
    return ray


def run_msclip(folder: str, cores: int, seconds: float) -> dict[str, Any]:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    ray = start_ray(cores)
    settings = {"folder": folder, "cores": cores, "seconds": seconds}
    scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1})
    result: Any = TorchTrainer(msclip_worker, train_loop_config=settings, scaling_config=scaling).fit()
    ray.shutdown()
    return result.return_value


def msclip_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What a training worker does with its batches, without the training."""
    import torch

    from msclip.data.decode import Recipe
    from msclip.data.images import Preprocess
    from msclip.data.loader import Batches
    from msclip.data.plan import Plan
    from msclip.data.shards import Manifest
    from pipelines.stream import ray_units

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)  # a GPU needs seconds to be ready
    began = time.perf_counter()
    manifest = Manifest.load(settings["folder"])
    plan = Plan(manifest.sizes, BATCH, window=1)
    recipe = Recipe.of(manifest, Preprocess(VIEW), None, tokenizer_json(), plan.seed)
    moved, rows = 0, 0

    def units() -> Iterator[Any]:
        nonlocal moved, rows
        for unit in ray_units(manifest, plan, 0, 1, 0, None):
            moved, rows = moved + unit.files.nbytes, rows + len(unit.row)
            yield unit

    with Batches(plan, 0, 1, 0, None, units(), recipe, processes=settings["cores"], device=device) as batches:

        def counts() -> Iterator[int]:
            for batch in batches:
                batch.pixels.to(device, non_blocking=True)
                yield len(batch.rows)

        found = counted(counts(), settings["seconds"], began)
        found |= {f"waited_for_{part}_seconds": seconds for part, seconds in batches.waits._asdict().items()}
    return found | {"object_store_bytes_per_image": moved / rows}


def tokenizer_json() -> str:
    """A tokenizer of CLIP's size costs what CLIP's own does; its merges are not at hand on every machine."""
    from msclip.data.tokenizer import Tokenizer

    words = [
        f"a {a} {b} near the {c}" for a in ("red", "small", "old") for b in ("dog", "boat", "child") for c in ("sea", "road")
    ]
    return Tokenizer.train(words, 1000).to_json()


def normalised(file: bytes) -> Any:
    """open_clip's preprocessing: a float32 tensor, channels first."""
    import torch

    return torch.from_numpy(((bare(file).astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1).copy())


def write_tars(folder: str) -> None:
    """The shards once more, as open_clip reads them."""
    tars = Path(folder) / "tar"
    tars.mkdir()
    groups = shard_rows(folder, ["image", "captions"])
    samples = (pair for images, captions in groups for pair in zip(images, captions, strict=True))
    for number in itertools.count():
        if not (part := list(itertools.islice(samples, TAR))):
            break
        with tarfile.open(tars / f"{number:05d}.tar", "w") as archive:
            for i, (image, captions) in enumerate(part):
                for suffix, content in (("jpg", image), ("txt", captions[0].encode())):
                    entry = tarfile.TarInfo(f"{number:05d}{i:04d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def run_webdataset(folder: str, cores: int, seconds: float) -> dict[str, Any]:
    import webdataset

    from msclip.data.tokenizer import Tokenizer

    began = time.perf_counter()
    tokenizer = Tokenizer.from_json(tokenizer_json())
    urls = sorted(map(str, (Path(folder) / "tar").glob("*.tar")))
    dataset = webdataset.DataPipeline(
        webdataset.ResampledShards(urls),
        webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue),
        webdataset.shuffle(bufsize=5000, initial=1000),
        webdataset.rename(image="jpg", text="txt"),
        webdataset.map_dict(image=normalised, text=lambda text: tokenizer(text.decode())[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH, partial=False),
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=cores, persistent_workers=True)
    return counted((len(images) for images, _ in loader), seconds, began)


def write_mds(folder: str) -> None:
    """The shards once more, as Mosaic Streaming reads them."""
    import streaming

    with streaming.MDSWriter(out=str(Path(folder) / "mds"), columns={"image": "bytes", "text": "str"}) as writer:
        for images, captions in shard_rows(folder, ["image", "captions"]):
            for image, said in zip(images, captions, strict=True):
                writer.write({"image": image, "text": said[0]})


def run_mosaic(folder: str, cores: int, seconds: float) -> dict[str, Any]:
    import streaming
    import torch

    from msclip.data.tokenizer import Tokenizer

    began = time.perf_counter()
    tokenizer = Tokenizer.from_json(tokenizer_json())

    class Pairs(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return normalised(sample["image"]), tokenizer(sample["text"])[0]

    dataset = Pairs(local=str(Path(folder) / "mds"), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=cores, drop_last=True)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    return counted((len(images) for images, _ in epochs), seconds, began)


def run_ray_data(folder: str, cores: int, seconds: float) -> dict[str, Any]:
    from ray.data import read_parquet

    ray = start_ray(cores)
    began = time.perf_counter()

    def decode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"pixels": np.stack([bare(file) for file in batch["image"]]), "captions": batch["captions"]}

    paths = sorted(str(path) for path in Path(folder).glob("*.parquet"))
    dataset = read_parquet(paths).map_batches(decode)
    epochs = (batch for _ in itertools.count() for batch in dataset.iter_batches(batch_size=BATCH))
    found = counted((len(batch["pixels"]) for batch in epochs), seconds, began)
    ray.shutdown()
    return found | {"object_store_bytes_per_image": float(3 * VIEW**2)}


RUNS = {
    "pillow": run_pillow,
    "msclip": run_msclip,
    "webdataset": run_webdataset,
    "mosaic": run_mosaic,
    "ray_data": run_ray_data,
}
NEEDED = {"msclip": "ray", "webdataset": "webdataset", "mosaic": "streaming", "ray_data": "ray"}
PREPARED: dict[str, tuple[str, Callable[[str], None]]] = {"webdataset": ("tar", write_tars), "mosaic": ("mds", write_mds)}
"""The folder of a loader's own shards, and what writes them."""


def measure(name: str, folder: str, cores: int, seconds: float) -> dict[str, Any]:
    """One run in a process of its own, and the memory that it and its children needed."""
    needed = NEEDED.get(name)
    if needed and importlib.util.find_spec(needed) is None:
        return {"absent": f"no package {needed} is installed"}
    own, write = PREPARED.get(name, ("", None))
    if write and not (Path(folder) / own).exists():
        try:
            write(folder)
        except Exception as error:
            shutil.rmtree(Path(folder) / own, ignore_errors=True)
            return {"skipped": f"its shards could not be written: {error}"}
    command = [sys.executable, __file__, "--run", name, "--folder", folder, "--cores", str(cores), "--seconds", str(seconds)]
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(5.0):  # seldom: to count all pages takes 0.1 s
            used = 0
            with contextlib.suppress(psutil.Error):
                for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        used += each.memory_full_info().pss
            peak[0] = max(peak[0], used)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        output, errors = process.communicate(timeout=seconds + START_SECONDS)
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait()
        return {"skipped": f"not done after {seconds + START_SECONDS:.0f} s"}
    finally:
        stop.set()
        watcher.join()
    if process.returncode:
        lines = errors.strip().splitlines() or ["no message"]
        return {"skipped": lines[-1]}
    return {**json.loads(output.strip().splitlines()[-1]), "peak_memory_mib": round(peak[0] / 2**20)}


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of several runs, with the speeds of all."""
    done = [run for run in runs if "images_per_second" in run]
    if not done:
        return runs[0]
    fastest = max(done, key=lambda run: run["images_per_second"])
    return {**{key: rounded(value) for key, value in fastest.items()}, "all": [round(run["images_per_second"]) for run in done]}


def rounded(value: Any) -> Any:
    return (round(value, 3) if value < 100 else round(value)) if isinstance(value, float) else value


def main() -> int:
    """Measures and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="Parquet files with images and captions: a file, a glob or a folder")
    parser.add_argument("--size", type=int, default=VIEW, help="pixels a side of the stored images")
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the data set, made of those that there are")
    parser.add_argument("--distinct", type=int, default=6000, help="different images among them")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="how many of this machine's to use")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, for each loader and round")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no round begins")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="LOADER")
    parser.add_argument("--folder", help="where shards are written, and used again if they are there; else a temporary one")
    parser.add_argument("--commit", default="", help="recorded with the result where there is no git")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        os.environ[ROOT] = str(os.getpid())
        print(json.dumps(RUNS[options.run](options.folder, options.cores, options.seconds)))
        return 0
    os.nice(19)  # all at one priority, also those that would lower their own: on a busy machine it decides
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # of every process that comes of this one
    with contextlib.ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob("*.parquet")):
            make_shards(options.data, options.size, options.rows, options.distinct, options.cores, folder)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
        ends = time.monotonic() + 60 * options.minutes
        for number in range(options.rounds):
            if number and time.monotonic() > ends:
                break
            for name, found in runs.items():
                if not found or "images_per_second" in found[-1]:
                    found.append(measure(name, str(folder), options.cores, options.seconds))
                    print(name, json.dumps(found[-1]), flush=True)
        stored = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    result = {
        "what": f"images/s at {VIEW} px from stored images of {options.size} px, {options.rows:,} rows",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": options.commit or git.stdout.strip(),
        "python": platform.python_version(),
        "seconds": options.seconds,
        "cores": options.cores,
        "processor": processor(),
        "gpu": gpu(),
        "load_at_end": round(os.getloadavg()[0], 1),
        "stored_bytes_per_image": round(stored / options.rows),
        "loaders": {name: best(found) for name, found in runs.items()},
    }
    limit = result["loaders"].get("pillow", {}).get("images_per_second")
    for name, figures in result["loaders"].items():
        if limit and "images_per_second" in figures:
            speed = figures["images_per_second"]
            later = figures.get("images_per_second_later_half", speed)
            figures |= {"share_of_limit": round(speed / limit, 3), "share_of_limit_later_half": round(later / limit, 3)}
            print(f"{name:12} {speed:>9,.0f} images/s  {speed / limit:.0%} of the limit, in the later half {later / limit:.0%}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def processor() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def gpu() -> str:
    """The name of the first GPU, if there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


if __name__ == "__main__":
    sys.exit(main())
