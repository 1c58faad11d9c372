"""Training on two workers from weighted sources with bad rows: what is read, recorded, resumed and left out."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from msclip import checkpoint, metrics_log, quarantine
from msclip.storage import Folder
from pipelines import cli, train
from tests.drawn import TEXTS, captioned
from tests.msclip.bad_rows import with_bad_rows
from tests.pipelines.test_train import CONFIG, EVERY
from tests.pipelines.without_ray import without_ray

STEPS = 40
ROWS, BAD = 240, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 pictures of which one of each bad kind, 40 drawn ones, and a job that takes 3 of the first to 1 of the second."""
    folder = tmp_path_factory.mktemp("data")
    table, _ = with_bad_rows(ROWS, every=ROWS // BAD)
    (folder / "photos").mkdir()
    pq.write_table(table.slice(0, 130), folder / "photos/0.parquet", row_group_size=20)
    pq.write_table(table.slice(130), folder / "photos/1.parquet", row_group_size=20)
    captioned(folder / "drawings.parquet", [[text] for text in TEXTS * 4])
    sources = {
        "photos": {"path": str(folder / "photos"), "weight": 3},
        "drawings": {"path": str(folder / "drawings.parquet"), "weight": 1},
    }
    changes: dict[str, Any] = {
        "data": {**CONFIG["data"], "train": sources, "max_bad_fraction": 0.05},
        "training": {**CONFIG["training"], "steps": STEPS},
        "run": {"storage": str(folder / "runs")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    return folder


def start(folder: Path, *arguments: str) -> int:
    return cli.guard(lambda: train.main(["--config", str(folder / "job.yaml"), *arguments]))


@pytest.fixture(scope="module")
def run(folder: Path, ray_session: None) -> Folder:
    assert start(folder, "--run.name", "first") == 0
    return Folder(folder / "runs" / "first")


def test_bad_rows_are_recorded_and_the_run_ends_well(run: Folder) -> None:
    records = metrics_log.read(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    rows = quarantine.read(run).to_pylist()
    assert len(rows) == len({row["key"] for row in rows}) == BAD  # 40 steps of 12 are two epochs of the photos
    assert records[-1]["train/bad_rows"] == 2 * BAD
    assert records[-1]["epoch/photos"] == pytest.approx(STEPS * 12 / ROWS)
    assert records[-1]["epoch/drawings"] == pytest.approx(STEPS * 4 / 40)


def test_the_progress_line_counts_bad_rows(folder: Path, run: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    from pipelines.progress import Progress

    with Progress(run, STEPS) as progress:
        progress.since = 0
    assert f"bad rows {2 * BAD}" in capfd.readouterr().out


def test_a_mixture_goes_on_with_one_worker(run: Folder) -> None:
    assert run.local is not None
    target = run.local.parent / "fewer"
    shutil.copytree(run.local, target)
    checkpoint.finished(Folder(target))[-1].delete()
    assert cli.guard(lambda: train.main(["--resume", str(target), "--cluster.num_workers", "1"])) == 0
    ours, theirs = metrics_log.read(Folder(target)), metrics_log.read(run)
    assert len(ours) == STEPS > EVERY
    assert [record["batch"] for record in ours] == [record["batch"] for record in theirs]
    assert quarantine.read(Folder(target)) == quarantine.read(run)  # nothing twice


def test_a_later_run_leaves_the_recorded_rows_out_and_resumes_so(folder: Path, run: Folder, tmp_path: Path) -> None:
    with without_ray():
        assert start(folder, "--run.name", "clean", "--data.skip_quarantined", run.url) == 0
    clean = Folder(folder / "runs" / "clean")
    records = metrics_log.read(clean)
    assert records[-1]["train/bad_rows"] == 0
    assert records[-1]["epoch/photos"] == pytest.approx(STEPS * 12 / (ROWS - BAD))
    assert not clean.exists(quarantine.QUARANTINE)
    assert len(quarantine.read_skipped(clean)) == BAD
    checkpoint.finished(clean)[-1].delete()
    assert run.local is not None
    run.local.rename(tmp_path / "gone")  # a run has its own copy of what it leaves out
    try:
        with without_ray():
            assert cli.guard(lambda: train.main(["--resume", clean.url])) == 0
    finally:
        (tmp_path / "gone").rename(run.local)
    assert [record["batch"] for record in metrics_log.read(clean)] == [record["batch"] for record in records]


def test_sources_may_be_drawn_with_replacement(folder: Path, run: Folder) -> None:
    with without_ray():
        assert start(folder, "--run.name", "drawn", "--data.resample", "true", "--training.steps", "8") == 0
    records = metrics_log.read(Folder(folder / "runs" / "drawn"))
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[-1]["epoch/drawings"] == pytest.approx(8 * 4 / 40)
    assert [record["batch"] for record in records] != [record["batch"] for record in metrics_log.read(run)[:8]]


OTHER_WEIGHTS = "{{drawings: {{path: {data}/drawings.parquet, weight: 1}}, photos: {{path: {data}/photos, weight: 1}}}}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data.skip_quarantined", "{run}"), "data.skip_quarantined is for new runs"),
        (("--data.train", OTHER_WEIGHTS), "was trained with rows of each source in a batch [4, 12], and this run has [8, 8]"),
        (("--data.train", "[{data}/photos, {data}/drawings.parquet]"), "was trained with"),
        (("--data.resample", "true"), "was trained with"),
    ],
)
def test_another_order_of_rows_is_refused_on_resuming(
    folder: Path, run: Folder, capfd: pytest.CaptureFixture[str], arguments: tuple[str, str], words: str
) -> None:
    name, value = arguments
    said = (name, value.format(run=run.url, data=folder))
    assert cli.guard(lambda: train.main(["--resume", run.url, "--training.steps", "60", *said])) == 2
    error = capfd.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("{{photos: {{path: {data}/photos, weight: 0}}}}", "weight of photos must be positive, got 0; leave"),
        ("{{photos: {{path: {data}/photos, wieght: 1}}}}", "data.train: each source needs a path, and may have weight"),
        ("{{photos: {{path: {data}/photos, weight: 1}}, more: {{path: {data}/photos}}}}", "a weight is missing for more"),
    ],
)
def test_a_mistake_in_the_sources_is_one_line_that_names_it(
    folder: Path, capfd: pytest.CaptureFixture[str], train: str, words: str
) -> None:
    assert start(folder, "--run.name", "mistaken", "--data.train", train.format(data=folder)) == 2
    error = capfd.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_shards_that_cannot_be_the_data_are_named_before_anything_starts(
    folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for i in range(3):
        captioned(tmp_path / f"{i}.parquet", [[f"{i} {j}"] for j in range(20)])
    table = pq.read_table(tmp_path / "2.parquet")
    pq.write_table(table.rename_columns(["image", "texts"]), tmp_path / "2.parquet")
    assert start(folder, "--run.name", "mistaken", "--data.train", str(tmp_path)) == 2
    assert "2.parquet has only the columns image, texts" in capfd.readouterr().err
    assert not (folder / "runs" / "mistaken").exists()
