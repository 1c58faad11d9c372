"""Ingest meets what nobody meant to give it: it goes on where it can, and says what is wrong where it cannot."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msclip.data.shards import Manifest
from pipelines import ingest
from pipelines.ingest_run import Cluster
from pipelines.ingest_tasks import Place, Written
from tests.pipelines.test_ingest import captions, jpeg, reasons, run, write_parquet


def test_an_evaluation_set_may_have_images_that_cannot_be_read(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = b"no image, but in both"
    pq.write_table(pa.table({"image": [None, broken, b"", jpeg(1)]}), tmp_path / "evaluation.parquet")
    data = write_parquet(tmp_path / "data.parquet", [(jpeg(0), "zero"), (jpeg(1), "one"), (broken, "two")])
    options = ("--input", data, "--output", tmp_path / "out", "--decontaminate", tmp_path / "evaluation.parquet")
    assert run(capsys, *options)[0] == 0
    assert captions(tmp_path / "out") == [["zero"]]
    assert reasons(tmp_path / "out") == {"in an evaluation set": 1, "not an image": 1}


def test_an_evaluation_set_of_paths_is_refused_with_the_types_of_its_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_parquet(tmp_path / "data.parquet", [(jpeg(0), "zero")])
    pq.write_table(pa.table({"image": ["a.jpg"], "label": [3]}), tmp_path / "paths.parquet")
    status, _, error = run(capsys, "--input", data, "--output", tmp_path / "out", "--decontaminate", tmp_path / "paths.parquet")
    assert status == 2
    assert "paths.parquet has the bytes of images in none of the usual columns" in error
    assert "but has image (string), label (int64)" in error


def test_overwriting_with_nothing_usable_keeps_what_is_there(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_parquet(tmp_path / "data.parquet", [(jpeg(0), "zero"), (jpeg(1), "one")])
    bad = write_parquet(tmp_path / "bad.parquet", [(b"no image", "words")])
    output = tmp_path / "out"
    assert run(capsys, "--input", data, "--output", output)[0] == 0
    status, _, error = run(capsys, "--input", bad, "--output", output, "--overwrite", "true")
    assert status == 2
    assert "none of the 1 rows" in error
    assert captions(output) == [["one"], ["zero"]]
    assert run(capsys, "--input", bad, "--output", output, "--deduplicate", "exact")[0] == 0  # nothing to add
    assert captions(output) == [["one"], ["zero"]]


def test_what_replaces_all_versions_comes_after_them_and_before_they_go(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (write_parquet(tmp_path / f"{name}.parquet", [(jpeg(0), name)]) for name in ("first", "second"))
    output = tmp_path / "out"
    assert run(capsys, "--input", first, "--output", output)[0] == 0

    def fails(manifest: Manifest) -> None:
        raise OSError("the storage is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "publish", fails)
        assert run(capsys, "--input", second, "--output", output, "--overwrite", "true")[0] == 1
    assert captions(output) == [["first"]]
    assert run(capsys, "--input", second, "--output", output, "--overwrite", "true")[0] == 0
    assert captions(output) == [["second"]]
    assert [path.name for path in output.glob("manifest*")] == ["manifest-000002.json", "manifest.json"]
    assert len(list((output / "shards").iterdir())) == len(list(output.glob("quarantine-*.jsonl"))) == 1


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_overwriting_leaves_the_shards_of_an_ingest_that_began_meanwhile(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overwrite: str
) -> None:
    output = tmp_path / "out"
    old, one, two = (write_parquet(tmp_path / f"{name}.parquet", [(jpeg(0), name)]) for name in ("old", "one", "two"))
    assert run(capsys, "--input", old, "--output", output)[0] == 0
    publish = Manifest.publish
    raced: list[bool] = []

    def race(manifest: Manifest) -> None:
        if not raced:  # this ingest's shards are written; before it publishes, another replaces everything
            raced.append(True)
            monkeypatch.setattr(ingest, "check_output", lambda *_: None)  # where it looked before this one had begun
            assert ingest.main(["--input", str(two), "--output", str(output), "--overwrite", "true"]) == 0
        publish(manifest)

    monkeypatch.setattr(Manifest, "publish", race)
    assert run(capsys, "--input", one, "--output", output, "--overwrite", overwrite)[0] == 0
    monkeypatch.undo()
    assert captions(output) == ([["one"]] if overwrite == "true" else [["one"], ["two"]])
    assert Manifest.load(str(output)).version == 3


def test_an_ingest_whose_shards_were_deleted_publishes_nothing(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_parquet(tmp_path / "data.parquet", [(jpeg(0), "zero")])
    write = Cluster.write

    def deleted(cluster: Cluster, shards: list[list[list[Place]]]) -> list[Written]:
        written = write(cluster, shards)
        (tmp_path / "out" / written[0].shard.file).unlink()
        return written

    monkeypatch.setattr(Cluster, "write", deleted)
    status, _, error = run(capsys, "--input", data, "--output", tmp_path / "out")
    assert status == 1
    assert "00000.parquet was deleted before it was published" in error
    assert not list(tmp_path.glob("out/manifest*"))
