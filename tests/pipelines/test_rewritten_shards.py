"""A shard that somebody rewrote under its name, with as many bytes and rows: training refuses it and names it."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from msclip.data.mixture import Mixture
from msclip.data.parquet import read_footer
from msclip.data.plan import Plan
from msclip.data.shards import SCHEMA
from msclip.errors import UserError
from msclip.storage import Folder
from pipelines import cli, ingest, train
from pipelines.stream import ray_units

ROWS, GROUP = 24, 8


@pytest.fixture(scope="module")
def original(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards by ingest."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "photos").mkdir()
    for i in range(ROWS):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i:02}.png")
        (folder / "photos" / f"{i:02}.txt").write_text(f"picture {i:02}")
    arguments = ["--input", str(folder / "photos"), "--output", str(folder / "shards")]
    assert ingest.main([*arguments, "--shard_rows", str(ROWS // 2), "--row_group_rows", str(GROUP)]) == 0
    return folder / "shards"


@pytest.fixture
def shards(original: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(original, tmp_path / "shards"))


def second(shards: Path) -> Path:
    return sorted(shards.glob("shards/*/*.parquet"))[1]


def reordered(table: pa.Table, column: str, order: np.ndarray) -> pa.Table:
    index = table.column_names.index(column)
    return table.set_column(index, table.schema.field(index), table[column].take(order))


def rewritten(shards: Path, table: pa.Table) -> bytes:
    """The second shard as ingest would have written these rows."""
    compression = dict.fromkeys(("key", "source", "width", "height"), "ZSTD") | {"captions.list.element": "ZSTD"}
    compression |= dict.fromkeys(("image", "sha256", "phash"), "NONE")
    path = shards / "other.parquet"
    with pq.ParquetWriter(path, SCHEMA, compression=compression, use_dictionary=["source"]) as writer:
        for start in range(0, len(table), GROUP):
            writer.write_table(table.slice(start, GROUP).cast(SCHEMA))
    data = path.read_bytes()
    path.unlink()
    return data


def read_all(shards: Path) -> None:
    """What the workers of a training do that has started."""
    data = Mixture.load(str(shards))
    for _ in ray_units(data, Plan(data.sizes, 8), 0, 1, 0, data.rows // 8):
        pass


def test_an_unchanged_copy_is_read(shards: Path) -> None:
    read_all(shards)


def test_a_rewritten_shard_that_shows_in_its_footer_is_refused_before_anything_starts(
    shards: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    size, table = second(shards).stat().st_size, pq.read_table(second(shards))
    second(shards).write_bytes(rewritten(shards, reordered(table, "sha256", np.roll(np.arange(len(table)), GROUP // 2))))
    assert second(shards).stat().st_size == size
    arguments = ["--data.train", str(shards), "--run.storage", str(tmp_path / "runs"), "--run.name", "refused"]
    assert cli.guard(lambda: train.main(arguments)) == 2
    error = capfd.readouterr().err
    assert f"{second(shards)} has another footer than manifest-000001.json beside it says" in error
    assert not (tmp_path / "runs").exists()


def test_an_image_replaced_by_one_of_equal_length_is_refused_when_it_comes(shards: Path) -> None:
    path = second(shards)
    footer, data, image = (
        read_footer(Folder(path.parent), path.name),
        path.read_bytes(),
        pq.read_table(path)["image"][9].as_py(),
    )
    assert data.count(image) == 1
    path.write_bytes(data.replace(image, image[:-40] + bytes(40)))
    assert read_footer(Folder(path.parent), path.name) == footer
    with pytest.raises(UserError, match=rf"{path} has other images or captions in row group 1 than manifest-000001\.json"):
        read_all(shards)


def test_captions_that_changed_places_are_refused_when_they_come(shards: Path) -> None:
    path = second(shards)
    footer, table = read_footer(Folder(path.parent), path.name), pq.read_table(path)
    assert rewritten(shards, table) == path.read_bytes()
    for one, other in itertools.combinations(range(GROUP), 2):  # some exchange leaves the compressed bytes as many
        order = np.arange(len(table))
        order[[one, other]] = other, one
        path.write_bytes(rewritten(shards, reordered(table, "captions", order)))
        if read_footer(Folder(path.parent), path.name) == footer:
            break
    else:
        pytest.fail("every exchange of two captions shows in the footer")
    with pytest.raises(UserError, match=rf"{path} has other images or captions in row group 0 than manifest-000001\.json"):
        read_all(shards)
