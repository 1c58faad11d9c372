"""A node that reads and decodes for a training run on another node is taken away in the middle: nothing of the run changes."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from msclip import metrics_log
from msclip.storage import Folder
from pipelines import cli, train
from tests.drawn import COLOURS, TEXTS
from tests.pipelines.test_train import CONFIG
from tests.pipelines.without_ray import without_ray

ROWS, STEPS, CPUS = 48, 30, 3
SIZE = 800
"""Of images, in pixels: decoding one takes 10 ms and more, a thousand times what training on it does."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large pictures, and a job whose one worker takes all four CPUs of its node."""
    folder, images = tmp_path_factory.mktemp("nodes"), list[bytes]()
    for seed, colour in enumerate(list(COLOURS.values()) * 2):
        noise = np.random.default_rng(seed).integers(0, 4 + seed, (SIZE, SIZE, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(file, "png", compress_level=1)
        images.append(file.getvalue())
    columns = {"image": [images[i % 10] for i in range(ROWS)], "captions": [TEXTS[i % 10] for i in range(ROWS)]}
    pq.write_table(pa.table(columns), folder / "pairs.parquet", row_group_size=4)
    changes: dict[str, Any] = {
        "data": {**CONFIG["data"], "train": str(folder / "pairs.parquet"), "decode_processes": 1},
        "training": {**CONFIG["training"], "steps": STEPS, "zero_stage": None},
        "cluster": {**CONFIG["cluster"], "num_workers": 1, "cpus_per_worker": 4},
        "run": {"storage": str(folder / "runs")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    return folder


@pytest.fixture
def other_nodes(ray_session: None) -> Iterator[Any]:
    """The cluster of this process, with a second node on which no worker has room."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=False)
    cluster.head_node = ray._private.worker.global_worker.node
    cluster.add_node(wait=False, num_cpus=CPUS)
    try:
        until(lambda: ray.cluster_resources().get("CPU") == 4 + CPUS)
        yield cluster
    finally:
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node)
        until(lambda: ray.cluster_resources().get("CPU") == 4)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def start(folder: Path, name: str) -> tuple[list[str], list[float]]:
    """Runs the job; returns checksums of the rows, and losses, of all global batches."""
    assert cli.guard(lambda: train.main(["--config", str(folder / "job.yaml"), "--run.name", name])) == 0
    records = metrics_log.read(Folder(folder / "runs" / name))
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["batch"] for record in records], [record["train/loss"] for record in records]


def test_a_run_whose_data_another_node_reads_and_decodes_does_not_notice_its_death(
    folder: Path, other_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_ray():
        alone = start(folder, "alone")
    train_worker = train.train_worker

    def impatient(config: dict[Any, Any]) -> Any:
        from msclip.data import helpers

        helpers.STRETCH_SECONDS = 0.5
        return train_worker(config)

    run, killed = Folder(folder / "runs" / "killed"), list[int]()

    def kill() -> None:
        """As soon as the other node decodes; and another node comes in its place."""
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            time.sleep(0.1)
            records = metrics_log.read(run)
            if records and records[-1]["train/remote_decode_processes"]:
                (node,) = other_nodes.worker_nodes
                other_nodes.remove_node(node, allow_graceful=False)
                killed.append(records[-1]["step"])
                other_nodes.add_node(wait=False, num_cpus=CPUS)

    monkeypatch.setattr(train, "train_worker", impatient)
    killer = threading.Thread(target=kill)
    killer.start()
    rows, losses = start(folder, "killed")
    killer.join()
    assert killed, "no other node decoded"
    assert killed[0] < STEPS
    assert rows == alone[0]
    assert losses == alone[1]
