"""Ingest: every row of the input ends in a shard or in the quarantine, in an order that a seed decides."""

import csv
import hashlib
import io
import json
import re
import socket
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from msclip.data.prepare import CaptionRules, ImageRules
from msclip.data.shards import SCHEMA, Manifest, Shard
from msclip.data.sources import TarSource
from msclip.errors import UserError
from msclip.eval.rows import open_rows
from msclip.storage import Folder
from pipelines import claim, cli, contact_sheet, ingest
from pipelines.ingest_tasks import Waiting, Work


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
    options = ("--input", f"{parquet}/*.parquet", "--output", output, "--shard_rows", 8, "--shuffle_seed", "null")
    assert run(capsys, *options, "--source", "mine")[0] == 0
    rows = shard_rows(output)
    assert [row["captions"] for row in rows] == [[f"image {i}"] for i in range(30) if i not in (9, 22)]
    assert {row["source"] for row in rows} == {"mine"}
    assert len(Manifest.load(str(output)).shards) == 4
    assert written(output) == {"manifest.json", "manifest-000001.json", "quarantine.jsonl", "quarantine-ID.jsonl", *PAGES} | {
        f"shards/ID/{i:05}.parquet" for i in range(4)
    }


PAGES = ("statistics.html", "contact_sheet.png")


def written(output: Path) -> set[str]:
    """All files, with the ingests' ids left out of their names."""
    files = (str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    return {re.sub(r"\d{8}-\d{6}-[0-9a-f]{6}", "ID", file) for file in files}


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
    assert f"must be empty or hold a data set, and it has {name.split('/')[0]}; choose another folder, or --overw" in error
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
    ours = {"manifest.json", "manifest-000002.json", "quarantine.jsonl", "quarantine-ID.jsonl", *PAGES}
    assert written(output) == ours | {"shards/ID/00000.parquet", "shards/ID/00001.parquet"} | set(OWN)
    assert len(list((output / "shards").iterdir())) == 4  # the first ingest's folder is gone
    assert {(output / name).read_text() for name in OWN} == {"mine"}


def test_the_output_of_ingest_is_an_input_of_ingest_and_of_evaluation(
    ray_session: None, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(capsys, "--input", parquet, "--output", first, "--shard_rows", 8)[0] == 0
    assert run(capsys, "--input", first, "--output", second, "--shuffle_seed", "null")[0] == 0
    assert shard_rows(second) == shard_rows(first)
    assert quarantine(second) == []
    rows = [row for _, row in open_rows(str(first)).read(SCHEMA.names)]
    assert rows == shard_rows(first)


def test_an_input_without_one_good_image_leaves_a_quarantine_and_no_data_set(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"jpg": [b"x", None], "caption": ["a", "b"]}), tmp_path / "bad.parquet")
    status, _, error = run(capsys, "--input", tmp_path / "bad.parquet", "--output", tmp_path / "out")
    assert status == 2
    assert "none of the 2 rows" in error
    assert "1 not an image, 1 no image bytes" in error
    assert [line["reason"] for line in quarantine(tmp_path / "out")] == ["not an image", "no image bytes"]
    with pytest.raises(UserError):
        Manifest.load(str(tmp_path / "out"))
    # The next attempt needs no leave to replace it.
    pq.write_table(pa.table({"jpg": [picture(1)], "caption": ["a"]}), tmp_path / "good.parquet")
    assert run(capsys, "--input", tmp_path / "good.parquet", "--output", tmp_path / "out")[0] == 0
    assert Manifest.load(str(tmp_path / "out")).rows == 1


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
    assert "Errno" not in error
    assert error.count("\n") == 1
    assert written(tmp_path / "out") == set()


def jpeg(number: int, size: tuple[int, int] = (64, 48), quality: int = 90) -> bytes:
    """A picture of its own for each number: coarse noise, so that no two are near."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)
    image.save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[tuple[bytes, str]]) -> Path:
    pq.write_table(pa.table({"image": [i for i, _ in rows], "caption": [c for _, c in rows]}), path, row_group_size=7)
    return path


def captions(output: Path) -> list[list[str]]:
    return sorted(row["captions"] for row in shard_rows(output))


def reasons(output: Path) -> Counter[str]:
    return Counter(line["reason"].partition(":")[0] for line in quarantine(output))


def test_dirty_tars_become_shards_and_every_member_is_accounted_for(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()

    def pack(name: str, members: list[tuple[str, bytes]], mode: str = "w") -> None:
        with tarfile.open(folder / name, mode) as file:  # type: ignore[call-overload]
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))

    def pair(i: int) -> list[tuple[str, bytes]]:
        return [(f"d/{i:03}.jpg", jpeg(i)), (f"d/{i:03}.txt", f"picture {i}".encode())]

    pack("0.tar", [*pair(0), ("README", b"hello"), *pair(1), *pair(0), ("d/alone.jpg", jpeg(99)), ("d/words.txt", b"x")])
    pack("1.tar.gz", [m for i in range(2, 12) for m in pair(i)] + [("d/bad.jpg", b"no image"), ("d/bad.txt", b"y")], "w:gz")
    pack("2.tar", [m for i in range(12, 22) for m in pair(i)])
    whole = (folder / "2.tar").read_bytes()
    (folder / "2.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "3.tar").write_bytes(b"")
    output = tmp_path / "out"
    status, printed, _ = run(capsys, "--input", folder, "--output", output, "--image_short_side", 32)
    assert status == 0
    rows = shard_rows(output)
    kept = {int(row["captions"][0].split()[1]) for row in rows}
    assert kept >= set(range(15))
    assert 21 not in kept
    assert {(row["width"], row["height"]) for row in rows} == {(43, 32)}
    assert {row["sha256"] for row in rows} == {hashlib.sha256(jpeg(i)).digest() for i in kept}
    assert {row["key"] for row in rows if row["captions"] == ["picture 2"]} == {"1/d/002"}
    found = reasons(output)
    assert found.pop("truncated tar") == 1
    cut = found.pop("no caption") + found.pop("no image") - 2  # the pair that the end of 2.tar may have divided
    assert 0 <= cut <= 1
    assert found == {"foreign file": 1, "duplicate key": 2, "not an image": 1, "damaged tar": 1}
    ingest_ = Manifest.load(str(output)).ingests[0]
    assert ingest_["read"] == len(rows) + len(quarantine(output)) == ingest_["kept"] + sum(ingest_["dropped"].values())
    assert f"ingested {len(rows)} rows" in printed


def test_running_again_adds_a_version_and_old_ones_stay(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    first = write_parquet(tmp_path / "first.parquet", [(jpeg(i), f"first {i}") for i in range(10)])
    second = write_parquet(
        tmp_path / "second.parquet",
        [(jpeg(3), "again"), (jpeg(4, (32, 24), 60), "smaller"), (jpeg(20), "new"), (jpeg(20), "twice"), (b"x", "bad")],
    )
    assert run(capsys, "--input", first, "--output", output)[0] == 0
    before = {path: path.read_bytes() for path in output.rglob("*.parquet")}
    old = Manifest.load(str(output))
    status, _, error = run(capsys, "--input", first, "--output", output)
    assert status == 2
    assert "already, since version 1 of" in error
    status, printed, _ = run(capsys, "--input", second, "--output", output, "--deduplicate", "near")
    assert status == 0
    assert "version 2 of the data set has 11 rows in 2 shards" in printed
    assert captions(output) == sorted([*([f"first {i}"] for i in range(10)), ["new", "twice"]])
    assert reasons(output) == {"duplicate": 2, "near duplicate": 1, "not an image": 1}
    assert {line["key"]: line["reason"] for line in quarantine(output)}["second/1"] == "near duplicate: of first/4"
    # The first version is as it was, by its own name.
    again = Manifest.load(f"{output}/manifest-000001.json")
    assert (again.rows, again.digest, again.shards) == (10, old.digest, old.shards)
    assert {path: path.read_bytes() for path in before} == before
    new = Manifest.load(str(output))
    assert (new.version, new.sources, new.quarantined) == (2, {"first": 10, "second": 1}, 4)
    assert (new.statistics["rows"], new.statistics["captions"]) == (11, 12)
    assert [ingest_["kept"] for ingest_ in new.ingests] == [10, 1]
    # Nothing new is no failure, and no version.
    status, printed, _ = run(capsys, "--input", second, "--output", output, "--deduplicate", "exact", "--min_image_side", 30)
    assert status == 0
    assert "nothing to add" in printed
    assert Manifest.load(str(output)) == new


def test_a_data_set_from_before_versions_becomes_the_first_and_is_hashed_anew(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    (output / "shards").mkdir(parents=True)
    table = pa.table({"image": [jpeg(1), jpeg(2)], "captions": [["a"], ["b"]], "key": ["1", "2"]})
    pq.write_table(table, output / "shards" / "00000.parquet")
    Manifest(Folder(output), (Shard.read(Folder(output), "shards/00000.parquet"),)).write()
    more = write_parquet(tmp_path / "more.parquet", [(jpeg(2), "again"), (jpeg(3), "c")])
    assert run(capsys, "--input", more, "--output", output, "--deduplicate", "exact")[0] == 0
    assert Manifest.load(f"{output}/manifest-000001.json").rows == 2
    assert Manifest.load(str(output)).version == 2
    assert [line["reason"] for line in quarantine(output)] == ["duplicate: of 2"]


def test_evaluation_images_queries_and_small_images_stay_out(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = [write_parquet(tmp_path / f"eval-{i}.parquet", [(jpeg(i), "-"), (jpeg(90 + i), "-")]) for i in range(2)]
    rows = [(jpeg(0), "dog"), (jpeg(1, (32, 24), 70), "dog"), (jpeg(2, (20, 10)), "dog"), (jpeg(3, (90, 20)), "dog")]
    rows += [(jpeg(10 + i), f"a dog, number {i}") for i in range(12)] + [(jpeg(40), "Red car"), (jpeg(41), "redcar")]
    rows += [(jpeg(42), "dog" * 40)]
    data = write_parquet(tmp_path / "data.parquet", rows)
    queries = tmp_path / "queries.txt"
    queries.write_text("dog\nred car\n")
    output = tmp_path / "out"
    options = ["--decontaminate", *evaluation, "--queries", queries, "--pairs_per_query", 5, "--max_caption_chars", 100]
    options += ["--min_image_side", 16, "--max_aspect_ratio", 4, "--input", data, "--output", output]
    assert run(capsys, *options)[0] == 0
    assert reasons(output) == {
        "in an evaluation set": 2,
        "too small": 1,
        "aspect ratio too large": 1,
        "over the cap of its queries": 7,
        "matches no query": 1,
        "caption too long": 1,
    }
    kept = captions(output)
    assert len(kept) == 6
    assert ["Red car"] in kept
    # The lot is drawn by the seed.
    assert run(capsys, *options, "--overwrite", "true")[0] == 0
    assert captions(output) == kept
    # Rows that are there already count for the cap.
    more = write_parquet(tmp_path / "more.parquet", [(jpeg(60), "dog"), (jpeg(61), "red car")])
    assert run(capsys, *options[2 + 1 :], "--input", more)[0] == 0
    assert reasons(output) == {"over the cap of its queries": 1}


def test_shards_end_by_rows_or_by_bytes(ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (500, 400, 3), np.uint8)
    Image.fromarray(noise).save(large := io.BytesIO(), "PNG")  # 600 kB
    rows = [(large.getvalue(), f"large {i}") for i in range(4)] + [(jpeg(i), f"small {i}") for i in range(11)]
    data = write_parquet(tmp_path / "data.parquet", rows)
    options = ("--input", data, "--output", tmp_path / "out", "--shuffle_seed", "null", "--shard_rows", 5, "--shard_mib", 1)
    assert run(capsys, *options)[0] == 0
    assert [shard.rows for shard in Manifest.load(str(tmp_path / "out")).shards] == [1, 1, 1, 5, 5, 2]


def test_a_picture_under_many_texts_keeps_some_of_them(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_parquet(tmp_path / "data.parquet", [(jpeg(0), f"text {i % 50}") for i in range(100)])
    options = ("--input", data, "--output", tmp_path / "out", "--deduplicate", "exact")
    assert run(capsys, *options)[0] == 0
    assert captions(tmp_path / "out") == [[f"text {i}" for i in range(32)]]
    assert reasons(tmp_path / "out") == {"duplicate": 99}


def test_a_row_group_ends_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipelines.ingest_tasks._ROW_GROUP_BYTES", 1000)
    folder = Folder(tmp_path)
    source = TarSource(folder, (), None, "none")
    work = Work(source, folder, "id", 4, ImageRules(), CaptionRules(), None, None)
    rows = [Waiting(bytes(size), [], "", "", 1, 1, b"", None) for size in (400, 400, 400, 10, 10, 10, 10, 2000, 5)]
    assert [len(group) for group in work._row_groups(iter(rows))] == [3, 4, 1, 1]


def test_two_ingests_at_once_both_arrive(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    one = write_parquet(tmp_path / "one.parquet", [(jpeg(i), f"one {i}") for i in range(4)])
    two = write_parquet(tmp_path / "two.parquet", [(jpeg(i), f"two {i}") for i in range(2, 6)])
    publish = Manifest.publish
    raced: list[bool] = []

    def race(manifest: Manifest) -> None:
        if not raced:  # just before the first ingest publishes, the other one begins, publishes and ends
            raced.append(True)
            ingest.main(["--input", str(two), "--output", str(output), "--deduplicate", "exact"])
            assert (output / "shards").is_dir()
        publish(manifest)

    monkeypatch.setattr(Manifest, "publish", race)
    status, printed, _ = run(capsys, "--input", one, "--output", output, "--deduplicate", "exact")
    assert status == 0
    assert "another ingest has published version 1: deciding again" in printed
    assert captions(Path(output)) == [["one 0"], ["one 1"], ["two 2"], ["two 3"], ["two 4"], ["two 5"]]
    assert [ingest_["kept"] for ingest_ in Manifest.load(str(output)).ingests] == [4, 2]
    assert Manifest.load(f"{output}/manifest-000001.json").rows == 4
    assert not [name for name in written(output) if "INGESTING" in name or "scratch" in name]


def test_tars_in_an_object_store_become_versions_in_an_object_store(
    ray_session: None, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Folder(s3_url) / "ingest"
    for number in (0, 1):
        with tarfile.open(tmp_path / "part.tar", "w") as file:
            for i in range(number * 3, number * 3 + 4):  # the last of the first is the first of the second
                for name, data in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", f"picture {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
        (store / f"in-{number}").upload(tmp_path / "part.tar", "part.tar")
        arguments = ["--input", f"{(store / f'in-{number}').url}", "--output", (store / "out").url, "--deduplicate", "exact"]
        assert run(capsys, *arguments)[0] == 0
    out = store / "out"
    assert Manifest.load((out / "manifest-000001.json").url).rows == 4
    manifest = Manifest.load(out.url)
    assert (manifest.version, manifest.rows) == (2, 7)
    keys = [key for group in range(len(manifest.row_groups)) for key in manifest.read(group)["key"].to_pylist()]
    assert sorted(keys) == [f"part/{i}" for i in range(7)]
    assert [name for name in out.names() if name.startswith(("INGESTING", "scratch"))] == []
    assert {"contact_sheet.png", "statistics.html"} <= set(out.names())
    assert manifest.ingests[1]["input"] == (store / "in-1").url
    assert run(capsys, *arguments, "--overwrite", "true")[0] == 0
    replaced = Manifest.load(out.url)
    assert (replaced.version, replaced.rows) == (3, 4)
    assert out.names("manifest*") == ["manifest-000003.json", "manifest.json"]
    assert (out / "shards").names() == [replaced.ingests[0]["id"]]


DEAD, ALIVE = "20260101-000000-aaaaaa", "20260101-000000-bbbbbb"


def test_what_a_killed_ingest_left_goes_and_what_another_writes_stays(
    ray_session: None, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    for name, owner in (
        (DEAD, {"host": "here", "pid": 2**22 + 1, "pids": claim.pid_space(), "time": time.time()}),
        # A container that has this one's name, and the process ids of its own.
        (ALIVE, {"host": socket.gethostname(), "pid": 2**22 + 1, "pids": "of its own", "time": time.time() - 60}),
    ):
        for file in (f"shards/{name}/00000.parquet", f"scratch-{name}/000000.rows"):
            (output / file).parent.mkdir(parents=True)
            (output / file).write_text("in part")
        (output / f"INGESTING-{name}").write_text(json.dumps(owner))
    status, _, error = run(capsys, "--input", parquet, "--output", output, "--overwrite", "true")
    assert status == 2
    assert "another ingest writes there" in error
    assert run(capsys, "--input", parquet, "--output", output)[0] == 0
    left = {path.name for path in output.rglob("*")}
    assert not any(DEAD in name for name in left)
    assert {ALIVE, f"scratch-{ALIVE}", f"INGESTING-{ALIVE}"} <= left
    # An hour without a word, and it counts as dead.
    (output / f"INGESTING-{ALIVE}").write_text(json.dumps({"host": "elsewhere", "pid": 1, "time": time.time() - 4000}))
    assert run(capsys, "--input", parquet, "--output", output, "--deduplicate", "exact")[0] == 0
    assert not any(ALIVE in path.name for path in output.rglob("*"))
    assert Manifest.load(str(output)).rows == 28


def test_the_page_and_the_sheet_show_what_there_is(
    ray_session: None, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "shards"
    assert run(capsys, "--input", photos, "--output", output)[0] == 0
    page = (output / "statistics.html").read_text()
    for text in ("<h1>shards</h1>", "manifest-000001.json", "80", "no such image", "Caption length", "data:image/jpeg;base64,"):
        assert text in page
    assert "http" not in re.sub(r"http://www\.w3\.org/[\w/]*", "", page)  # self-contained
    sheet = Image.open(output / "contact_sheet.png")
    assert sheet.width > 1000
    samples = contact_sheet.sample(Manifest.load(str(output)))
    assert len(samples) == 40
    assert contact_sheet.sample(Manifest.load(str(output)), 4) == contact_sheet.sample(Manifest.load(str(output)), 4)
    assert {s.more for s in samples} == {1}
    assert sheet.tobytes() == contact_sheet.draw(samples, "shards, version 1: 40 images").tobytes()


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
        (["--input", "{}/empty"], "neither images nor Parquet files nor tars"),
        (["--input", "{}/photos", "--caption_column", "prose"], "has only the columns file_name, text"),
        (["--input", "{}/photos", "--captions", "missing.csv"], "does not exist"),
        (["--input", "{}/parquet", "--image_column", "text"], "must hold the bytes of image files"),
        (["--input", "{}/parquet", "--image_column", "picture"], "has only the columns image, text"),
        (["--input", "{}/photos", "--shard_rows", "0"], "shard_rows must be at least 1"),
        (["--input", "{}/photos", "--shard_mib", "0"], "shard_mib must be at least 1"),
        (["--input", "{}/photos", "--image_short_side", "0"], "image_short_side must be at least 1"),
        (["--input", "{}/photos", "--image_quality", "50"], "image_quality is only used with image_short_side or image_format"),
        (["--input", "{}/photos", "--image_format", "gif"], "image_format"),
        (["--input", "{}/photos", "--near_distance", "3"], "near_distance is only used with deduplicate near or decontaminate"),
        (["--input", "{}/photos", "--deduplicate", "near", "--near_distance", "30"], "near_distance must be from 0 to 16"),
        (["--input", "{}/photos", "--pairs_per_query", "9"], "pairs_per_query is only used with queries"),
        (["--input", "{}/photos", "--queries", "{}/none.txt"], "none.txt': not found"),
        (["--input", "{}/photos", "--queries", "{}/photos"], "photos': a folder"),
        (["--input", "{}/photos", "--decontaminate", "{}/none.parquet"], "none.parquet' do not exist"),
        (["--input", "{}/photos", "--decontaminate", "{}/parquet", "{}/texts.parquet"], "in none of the usual columns"),
        (["--input", "{}/photos", "--output", "{}/photos"], "output must not be or hold the input"),
        (["--input", "{}/parquet/part-*.parquet", "--output", "{}"], "output must not be or hold the input"),
        (["--input", "{}/photos", "--output", "{}/parquet"], "must be empty"),
        (["--input", "{}/photos", "--output", "{}/texts.parquet"], "output must be a folder"),
        (["--input", "{}/photos", "--output", "{}/texts.parquet/below"], "output cannot be written to"),
        (["--input", "{}/photos", "--output", ""], "output is empty"),
        (["--input", ""], "input is empty"),
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
    pq.write_table(pa.table({"text": ["words"]}), tmp_path / "texts.parquet")
    before = sorted(tmp_path.rglob("*"))
    given = [argument.format(tmp_path) for argument in arguments]
    status, _, error = run(capsys, *(given if "--output" in given else [*given, "--output", str(tmp_path / "out")]))
    assert status == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
