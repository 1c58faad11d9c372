"""Data that are not what they were are refused before anything starts, with the file's name."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from msclip.data.shards import MANIFEST, Manifest
from msclip.errors import UserError
from tests.drawn import captioned


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of ten rows with a manifest."""
    for i in range(3):
        captioned(tmp_path / f"{i}.parquet", [[f"{i} {j}"] for j in range(10)])
    Manifest.load(str(tmp_path)).write()
    return tmp_path


def test_a_shard_that_does_not_match_the_manifest_is_named(shards: Path) -> None:
    captioned(shards / "1.parquet", [["too few"] for _ in range(9)])
    with pytest.raises(UserError, match=rf"1\.parquet has 9 rows in 2 row groups, but {MANIFEST}"):
        Manifest.load(str(shards))
    (shards / "1.parquet").unlink()
    with pytest.raises(UserError, match=r"1\.parquet is missing"):
        Manifest.load(str(shards))


def test_a_shard_rewritten_under_its_name_is_named(shards: Path) -> None:
    captioned(shards / "1.parquet", [[f"as many rows, other words {j}"] for j in range(10)])
    with pytest.raises(UserError, match=r"1\.parquet has [\d,]+ bytes, but manifest\.json beside it says [\d,]+"):
        Manifest.load(str(shards))


def test_a_column_missing_in_the_third_shard_is_named(shards: Path) -> None:
    table = pq.read_table(shards / "2.parquet")
    pq.write_table(table.rename_columns(["image", "texts"]), shards / "2.parquet", row_group_size=5)
    with pytest.raises(
        UserError, match=r"data\.caption_column is 'captions', but .*2\.parquet has only the columns image, texts"
    ):
        Manifest.load(str(shards))
