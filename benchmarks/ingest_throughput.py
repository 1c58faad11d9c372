"""Rows a second through `python -m pipelines.ingest`: a folder of images with a table and a tar, and what near duplicates cost.

    python benchmarks/ingest_throughput.py --output benchmarks/results/ingest_throughput.json

Pictures of 500 x 375 pixels, each of its own (coarse noise under fine noise, about as many bytes as a photo of that size), go
through the command as a user starts it, with its defaults: each is decoded in full, hashed, shuffled and written. Starting
Python and Ray takes seconds whatever the input, so each case runs with a few rows too, and `rows_per_second` is of the rows and
the time that the whole has beyond those; it is null where other work on the machine took longer than that. `pillow` is a bare
loop that only decodes the same files, a process a core: the limit. `near_search` is the driver's search among hashes
alone, a fifth of which are near to another.
"""

import argparse
import csv
import datetime
import io
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msclip.data.hashes import leaders

SIZE, COARSE, FEW = (500, 375), (8, 6), 64
HASHES, DISTANCES = 100_000, (4, 9, 16)
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def picture(number: int) -> bytes:
    """A JPEG that no other is near to."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(256, size=(*COARSE[::-1], 3), dtype=np.uint8)).resize(
        SIZE, Image.Resampling.BICUBIC
    )
    fine = np.asarray(coarse) + random.normal(0, 6, (*SIZE[::-1], 3))
    file = io.BytesIO()
    Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_inputs(place: Path, images: list[bytes]) -> dict[str, Path]:
    """The same pairs as a folder with a table, and as a tar."""
    folder, tar = place / "folder", place / "pairs.tar"
    folder.mkdir(parents=True)
    with tarfile.open(tar, "w") as archive, (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption"))
        for number, image in enumerate(images):
            name, caption = f"{number:07d}", f"picture {number} of nothing in particular"
            (folder / f"{name}.jpg").write_bytes(image)
            table.writerow((f"{name}.jpg", caption))
            for suffix, data in (("jpg", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return {"folder": folder, "tar": tar}


def ingest(source: Path, rows: int, deduplicate: str) -> float:
    """Seconds of the whole command."""
    with tempfile.TemporaryDirectory(dir=source.parent) as output:
        command = [sys.executable, "-m", "pipelines.ingest", "--input", str(source), "--output", f"{output}/shards"]
        start = time.perf_counter()
        options = ["--deduplicate", deduplicate, "--address", "local"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        kept = json.loads(Path(output, "shards", "manifest.json").read_text())["rows"]
    if kept != rows:
        raise RuntimeError(f"{kept} of {rows} rows were kept")
    return seconds


def decode(image: bytes) -> None:
    Image.open(io.BytesIO(image)).convert("RGB").load()


def bare_pillow(images: list[bytes], cores: int) -> float:
    """Images a second."""
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        pool.map(decode, images[: 8 * cores])
        start = time.perf_counter()
        pool.map(decode, images, chunksize=64)
        return len(images) / (time.perf_counter() - start)


def near_search(distance: int) -> float:
    """Seconds."""
    random = np.random.default_rng(0)
    hashes = random.integers(2**64, size=HASHES, dtype=np.uint64)
    fifth = HASHES // 5
    hashes[-fifth:] = hashes[:fifth] ^ (np.uint64(1) << random.integers(64, size=fifth, dtype=np.uint64))
    start = time.perf_counter()
    found = leaders(hashes, distance)
    seconds = time.perf_counter() - start
    if np.count_nonzero(found >= 0) < fifth:
        raise RuntimeError("near hashes were missed")
    return seconds


def rate(rows: int, few: float, whole: float) -> int | None:
    """Rows a second beyond the few, from the seconds of both."""
    return round((rows - FEW) / (whole - few)) if whole > few else None


def measure(rows: int, rounds: int, cores: int) -> dict[str, Any]:
    """All cases, the best of some rounds each."""
    with tempfile.TemporaryDirectory() as scratch:
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            images = pool.map(picture, range(rows), chunksize=64)
        few, whole = (write_inputs(Path(scratch, str(count)), images[:count]) for count in (FEW, rows))
        cases = {f"{kind}, deduplicate {how}": (kind, how) for kind in whole for how in ("none", "near")}
        seconds: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        pillow = []
        for _ in range(rounds):
            pillow.append(bare_pillow(images, cores))
            for case, (kind, how) in cases.items():
                seconds[case].append((ingest(few[kind], FEW, how), ingest(whole[kind], rows, how)))
    size = sum(map(len, images))
    return {
        "bytes_per_image": size // rows,
        "pillow_images_per_second": round(max(pillow)),
        "cases": {
            case: {
                "rows_per_second": rate(rows, min(t for t, _ in times), min(t for _, t in times)),
                "seconds": round(min(t for _, t in times), 1),
                "seconds_of_few_rows": round(min(t for t, _ in times), 1),
            }
            for case, times in seconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    cores = len(os.sched_getaffinity(0))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    load = [round(os.getloadavg()[0], 1)]  # others may be at work on the machine
    measured = measure(options.rows, options.rounds, cores)
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "device": f"CPU, {cores} cores",
        "python": platform.python_version(),
        "load_average_before_and_over_15_minutes": [*load, round(os.getloadavg()[2], 1)],
        "settings": {"rows": options.rows, "rounds": options.rounds, "pixels": list(SIZE)},
        **measured,
        "near_search": {
            "hashes": HASHES,
            "seconds_by_distance": {str(distance): round(near_search(distance), 2) for distance in DISTANCES},
        },
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
