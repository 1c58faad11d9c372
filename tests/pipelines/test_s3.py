"""The whole workflow on S3, on a good day and on a bad one, against the same on a local disk."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from msclip import checkpoint, metrics_log
from msclip.data.shards import Manifest
from msclip.errors import UserError
from msclip.eval import evaluate_checkpoint, parse_tasks
from msclip.storage import Folder
from pipelines import evaluate, ingest, report, train
from pipelines.claim import claimed
from tests.drawn import TEXTS, captioned
from tests.faulty_proxy import Faults, FaultyProxy, at_port
from tests.pipelines.without_ray import without_ray

ROWS, STEPS, EVERY = 96, 24, 8
CONFIG: dict[str, Any] = {
    "model": {
        "image_size": 32,
        "patch_size": 16,
        "embed_dim": 16,
        "vocab_size": 600,
        "context_length": 16,
        **dict.fromkeys(("width", "text_width"), 32),
        **dict.fromkeys(("layers", "text_layers", "num_heads", "text_heads"), 2),
        "branch_layers": [],
        "sharing": {"layers": "all"},
        "stem": False,
    },
    "data": {"augment": {"flip": 0.5}, "decode_processes": 1},
    "optim": {"lr": 1e-3, "warmup_steps": 5},
    "training": {
        "global_batch": 16,
        "epochs": None,
        "steps": STEPS,
        "precision": "fp32",
        "log_every_steps": 1,
        "zero_stage": None,
    },
    "checkpoint": {"every_steps": EVERY, "every_minutes": None, "keep_optimizer": 9},
    "cluster": {"num_workers": 1, "use_gpu": False, "max_failures": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s3")
    captioned(folder / "pairs.parquet", [[TEXTS[i % 10], TEXTS[(i + 3) % 10]] if i % 20 else [] for i in range(ROWS)])
    return folder


def prepare_and_train(folder: Path, place: str, name: str) -> None:
    """Ingests to a place and trains from it, checkpoints beside the data."""
    root = Folder(place)
    assert (
        ingest.main(["--input", str(folder / "pairs.parquet"), "--output", (root / "data").url, "--row_group_rows", "8"]) == 0
    )
    job = CONFIG | {
        "data": CONFIG["data"] | {"train": (root / "data").url},
        "run": {"storage": (root / "runs").url, "name": "run"},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(job))
    assert train.main(["--config", str(folder / f"{name}.yaml")]) == 0


def rows(root: Folder) -> list[dict[str, Any]]:
    """All that ingest wrote, in order."""
    data = root / "data"
    tables = (pq.read_table((data / f).path, filesystem=data.filesystem) for f in Manifest.load(data.url).files)
    return [row for table in tables for row in table.to_pylist()]


def curve(root: Folder) -> list[dict[str, Any]]:
    """Step, batch checksum and what was learnt of every record."""
    kept = ("step", "batch", "epoch", "train/loss", "train/lr", "train/temperature", "train/bad_rows")
    return [{name: record[name] for name in kept} for record in metrics_log.read(root / "runs" / "run")]


def kill_the_worker_after_a_checkpoint(root: Folder, killed: list[int]) -> None:
    run, deadline = root / "runs" / "run", time.monotonic() + 90
    while time.monotonic() < deadline:
        if found := checkpoint.finished(run):
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(len(found))
                    return
        time.sleep(0.2)


@pytest.fixture(scope="module")
def local(folder: Path, ray_session: None) -> Folder:
    """The same on a local disk, trained without Ray."""
    with without_ray():
        prepare_and_train(folder, str(folder / "local"), "local")
    return Folder(folder / "local")


def test_of_drivers_that_start_together_one_holds_the_run(s3_port: int) -> None:
    with FaultyProxy(s3_port, Faults(lost=0.3, seed=1)) as proxy:
        run = Folder(at_port("s3://bucket/claimed", proxy.port))
        start, done = threading.Barrier(4), threading.Barrier(4)

        def drive(_: int) -> str:
            start.wait()
            try:
                with claimed(run):
                    done.wait(60)
                    return "drove"
            except UserError as error:
                done.wait(60)
                return str(error)

        with ThreadPoolExecutor(4) as pool:
            told = list(pool.map(drive, range(4)))
        assert not run.names()
    assert told.count("drove") == 1
    assert sum("another process" in text for text in told) == 3


def same_data_and_training(ours: Folder, theirs: Folder) -> None:
    assert rows(ours) == rows(theirs)
    assert (ours / "data").read_text("quarantine.jsonl") == (theirs / "data").read_text("quarantine.jsonl")
    assert curve(ours) == curve(theirs)
    names = [[folder.name for folder in checkpoint.finished(root / "runs" / "run")] for root in (ours, theirs)]
    assert names[0] == names[1]


def test_on_s3_ingest_and_training_are_what_a_disk_gives(folder: Path, local: Folder, s3_port: int) -> None:
    place = at_port("s3://bucket/good", s3_port)
    prepare_and_train(folder, place, "good")
    same_data_and_training(Folder(place), local)
    assert metrics_log.read(Folder(place) / "runs" / "run")[-1]["train/storage_retries"] == 0


def test_on_a_bad_day_and_killed_and_resumed_all_is_still_the_same_and_the_report_says_what_happened(
    folder: Path, local: Folder, s3_port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    faults = Faults(slow_down=0.1, cut=0.03, lost=0.02, stall=0.01, stall_seconds=2.0)
    direct, killed = Folder(at_port("s3://bucket/bad", s3_port)), list[int]()
    killer = threading.Thread(target=kill_the_worker_after_a_checkpoint, args=(direct, killed))
    with FaultyProxy(s3_port, faults) as proxy:
        place = Folder(at_port("s3://bucket/bad", proxy.port))
        killer.start()
        prepare_and_train(folder, place.url, "bad")
        killer.join()
        url = (place / "runs" / "run").url
        task = f"retrieval:{(place / 'data').url}"
        assert evaluate.main(["--run", url, "--checkpoints", "last", "--tasks", task]) == 0
        assert report.main(["--run", url, "--queries", "0"]) == 0
    assert killed[0] < STEPS // EVERY
    assert {"slow_down", "cut", "stall"} <= proxy.done.keys()
    same_data_and_training(direct, local)
    run = direct / "runs" / "run"
    retries = metrics_log.read(run)[-1]["train/storage_retries"]
    assert retries > 0
    assert f"{retries:,}" in run.read_text("report/index.html").partition("Storage requests repeated")[2][:50]
    assert "requests, which were repeated" in capfd.readouterr().out
    (folder_name,) = (run / "evaluation").names()
    (file,) = (run / "evaluation" / folder_name).names()
    measured = evaluate_checkpoint(
        checkpoint.finished(local / "runs" / "run")[-1], parse_tasks([f"retrieval:{(local / 'data').url}"])[0], device="cpu"
    )
    assert json.loads((run / "evaluation" / folder_name).read_text(file))["metrics"] == measured["metrics"]
