"""Ingest: every row of the input ends in a shard or in the quarantine, in an order that a seed decides."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from msclip.data.shards import Manifest
from msclip.errors import UserError
from msclip.eval.rows import open_rows
from pipelines import cli, ingest


def picture(shade: int, size: tuple[int, int] = (20, 16), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 90, 40)).save(buffer, kind)
    return buffer.getvalue()


def shard_rows(output: Path) -> list[dict[str, Any]]:
    return [row for file in Manifest.load(str(output)).files for row in pq.read_table(output / file).to_pylist()]


def quarantine(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.guard(lambda: ingest.main([str(a) for a in arguments]))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty good images with two captions each, and one of every kind of trouble."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rows = []
    for i in range(40):
        name = f"more/{i:02}.jpg" if i % 2 else f"{i:02}.jpg"
        (folder / name).write_bytes(picture(i * 6, (90, 60) if i == 3 else (20, 16)))
        rows += [(name, f"image {i}, first"), (name, f'image {i}, "second"')]
    (folder / "broken.jpg").write_bytes(picture(1)[:-200])
    (folder / "text.png").write_text("no picture")
    (folder / "alone.jpg").write_bytes(picture(2))
    rows += [("broken.jpg", "cut off"), ("text.png", "words"), ("gone.jpg", "not there"), ("00.jpg", " ")]
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])
    return folder


def test_a_folder_of_images_becomes_shuffled_shards_and_nothing_is_lost(
    ray_session: None, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "shards"
    options = ("--input", photos, "--output", output, "--shard_rows", 16, "--row_group_rows", 5)
    status, printed, _ = run(capsys, *options, "--image_short_side", 30)
    assert status == 0
    rows = shard_rows(output)
    assert {row["key"] for row in rows} == {f"more/{i:02}.jpg" if i % 2 else f"{i:02}.jpg" for i in range(40)}
    assert [row["key"] for row in rows] != sorted(row["key"] for row in rows)
    by_key = {row["key"]: row for row in rows}
    assert by_key["00.jpg"]["captions"] == ["image 0, first", 'image 0, "second"']
    assert by_key["00.jpg"]["image"] == (photos / "00.jpg").read_bytes()
    assert by_key["00.jpg"]["source"] == "photos"
    assert Image.open(io.BytesIO(by_key["more/03.jpg"]["image"])).size == (45, 30)
    assert {(line["shard"], line["reason"]) for line in quarantine(output)} == {
        ("broken.jpg", "truncated"),
        ("text.png", "not an image"),
        ("alone.jpg", "no caption"),
        ("captions.csv", "no such image"),
    }
    manifest = Manifest.load(str(output))
    assert (manifest.rows, manifest.quarantined, dict(manifest.sources)) == (40, 4, {"photos": 40})
    assert len(manifest.shards) == 3
    assert max(group.rows for group in manifest.row_groups) == 5
    assert "ingested 40 rows into 3 shards" in printed
    assert "quarantined 4" in printed
    # Again: refused, then on request the same rows in the same places.
    status, _, error = run(capsys, *options)
    assert status == 2
    assert "--overwrite true" in error
    assert run(capsys, *options, "--image_short_side", 30, "--overwrite", "true")[0] == 0
    assert Manifest.load(str(output)).digest == manifest.digest
    assert [s.sha256 for s in Manifest.load(str(output)).shards] == [s.sha256 for s in manifest.shards]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Two files, 30 rows in row groups of 7: images as Hugging Face stores them, one broken, one without a caption."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    rows = [{"image": {"bytes": picture(i), "path": f"{i}.jpg"}, "text": f"image {i}"} for i in range(30)]
    rows[9]["image"]["bytes"] = b"nothing"  # type: ignore[index]
    rows[22]["text"] = None  # type: ignore[assignment]
    for part in (0, 1):
        table = pa.Table.from_pylist(rows[part * 15 : part * 15 + 15])
        pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=7)
    return folder


def test_parquet_is_shuffled_over_all_files(
    ray_session: None, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "shards"
    assert run(capsys, "--input", parquet, "--output", output, "--shard_rows", 8, "--shuffle_seed", 5)[0] == 0
    rows = shard_rows(output)
    order = np.argsort(np.random.default_rng(5).permutation(30))
    assert [row["captions"] for row in rows] == [[f"image {i}"] for i in order if i not in (9, 22)]
    assert [row["image"] for row in rows] == [picture(i) for i in order if i not in (9, 22)]
    assert rows[0]["key"] == f"part-{order[0] // 15}/{order[0] % 15}"
    assert sorted(quarantine(output), key=lambda line: line["shard"]) == [
        {"shard": "part-0.parquet", "row": 2, "row_group": 1, "key": "part-0/9", "reason": "not an image"},
        {"shard": "part-1.parquet", "row": 0, "row_group": 1, "key": "part-1/7", "reason": "no caption"},
    ]
    assert len(Manifest.load(str(output)).shards) == 4


def test_without_a_seed_parquet_keeps_its_order(
    ray_session: None, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "shards"
    (output / "shards").mkdir(parents=True)
    (output / "INGESTING").touch()
    for name in ("00099.parquet", ".tmp-12-0123456789ab"):
        (output / "shards" / name).write_text("left by an ingest that was interrupted")
    options = ("--input", f"{parquet}/*.parquet", "--output", output, "--shard_rows", 8, "--shuffle_seed", "null")
    assert run(capsys, *options, "--source", "mine")[0] == 0
    rows = shard_rows(output)
    assert [row["captions"] for row in rows] == [[f"image {i}"] for i in range(30) if i not in (9, 22)]
    assert {row["source"] for row in rows} == {"mine"}
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "quarantine.jsonl", "shards"]
    assert sorted(path.name for path in (output / "shards").iterdir()) == [f"{i:05}.parquet" for i in range(4)]


OWN = ("notes.txt", "shards/cats.parquet", "shards/00000.parquet.bak", "shards/more/00000.parquet")


def add_own_files(output: Path) -> None:
    for name in OWN:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("mine")


@pytest.mark.parametrize("name", ["shards/cats.parquet", "shards/00000.parquet", "quarantine.jsonl", "notes.txt"])
def test_files_that_no_ingest_left_are_not_taken_for_one(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    status, _, error = run(capsys, "--input", parquet, "--output", tmp_path / "out")
    assert status == 2
    assert f"must be empty, and it has {name.split('/')[0]}; choose another folder, or --overwrite true" in error
    assert [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["mine"]


def test_a_manifest_of_something_else_is_never_overwritten(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "a web page"}')
    status, _, error = run(capsys, "--input", parquet, "--output", tmp_path / "out", "--overwrite", "true")
    assert status == 2
    assert "has a manifest.json that no ingest wrote" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_overwriting_leaves_files_that_no_ingest_wrote(
    ray_session: None, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    add_own_files(output)
    options = ("--input", parquet, "--output", output, "--overwrite", "true")
    assert run(capsys, *options, "--shard_rows", 8)[0] == 0
    assert run(capsys, *options, "--shard_rows", 16)[0] == 0
    written = {"manifest.json", "quarantine.jsonl", "shards/00000.parquet", "shards/00001.parquet"}
    assert {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()} == written | set(OWN)
    assert {(output / name).read_text() for name in OWN} == {"mine"}


def test_the_output_of_ingest_is_an_input_of_ingest_and_of_evaluation(
    ray_session: None, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(capsys, "--input", parquet, "--output", first, "--shard_rows", 8)[0] == 0
    assert run(capsys, "--input", first, "--output", second, "--shuffle_seed", "null")[0] == 0
    assert shard_rows(second) == shard_rows(first)
    assert quarantine(second) == []
    rows = [row for _, row in open_rows(str(first)).read(["image", "captions", "key", "source"])]
    assert rows == shard_rows(first)


def test_an_input_without_one_good_image_leaves_a_quarantine_and_no_data_set(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"jpg": [b"x", None], "caption": ["a", "b"]}), tmp_path / "bad.parquet")
    status, _, error = run(capsys, "--input", tmp_path / "bad.parquet", "--output", tmp_path / "out")
    assert status == 2
    assert "none of the 2 images could be used" in error
    assert [line["reason"] for line in quarantine(tmp_path / "out")] == ["not an image", "no image bytes"]
    with pytest.raises(UserError):
        Manifest.load(str(tmp_path / "out"))
    # The next attempt needs no leave to replace it.
    pq.write_table(pa.table({"jpg": [picture(1)], "caption": ["a"]}), tmp_path / "good.parquet")
    assert run(capsys, "--input", tmp_path / "good.parquet", "--output", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "INGESTING").exists()


def test_a_damaged_file_ends_the_job_with_its_name_and_no_data_set(
    ray_session: None, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = parquet / "part-1.parquet"
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + 300] = bytes(300)
    file.write_bytes(data)
    status, _, error = run(capsys, "--input", parquet, "--output", tmp_path / "out")
    assert status in (1, 2)  # which of them depends on where in the page the damage shows
    assert "cannot read row group 1 of" in error
    assert "part-1.parquet" in error
    assert "Traceback" not in error
    assert (tmp_path / "out" / "INGESTING").exists()
    with pytest.raises(UserError):
        Manifest.load(str(tmp_path / "out"))


def test_shards_without_a_manifest_are_no_data_set(photos: Path, tmp_path: Path) -> None:
    interrupted = tmp_path / "out" / "shards"
    interrupted.mkdir(parents=True)
    pq.write_table(pa.table({"image": [b"x"], "captions": [["a"]]}), interrupted / "00000.parquet")
    with pytest.raises(UserError):
        Manifest.load(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{}/nowhere"], "not found"),
        (["--input", "{}/nowhere.parquet"], "do not exist"),
        (["--input", "{}/empty"], "neither images nor Parquet"),
        (["--input", "{}/photos", "--caption_column", "prose"], "has only the columns file_name, text"),
        (["--input", "{}/photos", "--captions", "missing.csv"], "does not exist"),
        (["--input", "{}/parquet", "--image_column", "text"], "must hold the bytes of image files"),
        (["--input", "{}/parquet", "--image_column", "picture"], "has only the columns image, text"),
        (["--input", "{}/photos", "--shard_rows", "0"], "shard_rows must be at least 1"),
        (["--input", "{}/photos", "--output", "{}/photos"], "output must not be or hold the input"),
        (["--input", "{}/parquet/part-*.parquet", "--output", "{}"], "output must not be or hold the input"),
        (["--input", "{}/photos", "--output", "{}/parquet"], "must be empty"),
    ],
)
def test_a_mistake_is_one_paragraph_and_writes_nothing(
    arguments: list[str],
    message: str,
    photos: Path,
    parquet: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    given = [argument.format(tmp_path) for argument in arguments]
    status, _, error = run(capsys, *(given if "--output" in given else [*given, "--output", str(tmp_path / "out")]))
    assert status == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
