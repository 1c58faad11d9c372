"""Ingest meets what nobody meant to give it: it goes on where it can, and says what is wrong where it cannot."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
