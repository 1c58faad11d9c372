"""What counts as a data set, and what is said about one that is not."""

import json
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msclip.data.parquet import checksum, find, read_footer
from msclip.data.shards import CHECKED, FORMAT, MANIFEST, SCHEMA, Manifest, Shard, newest, pinned, versions
from msclip.errors import UserError
from msclip.storage import Folder


def write(path: Path, rows: int, row_group_size: int = 4, **columns: object) -> None:
    content = {
        "image": [f"{path.stem}-{i}".encode() for i in range(rows)],
        "captions": [[f"caption {i}"] for i in range(rows)],
        "key": [f"{path.stem}/{i}" for i in range(rows)],
    }
    table = pa.table({k: v for k, v in (content | columns).items() if v is not None})
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Three shards of 10, 5 and 1 rows in row groups of at most 4."""
    for name, rows in (("a", 10), ("b", 5), ("c", 1)):
        write(tmp_path / f"{name}.parquet", rows)
    return Folder(tmp_path)


def with_manifest(folder: Folder) -> Manifest:
    shards = tuple(Shard.read(folder, name) for name in folder.names("*.parquet"))
    manifest = Manifest(folder, shards, quarantined=2, sources={"here": 16}, created="2026-01-02T03:04:05Z")
    manifest.write()
    return manifest


def test_a_manifest_survives_writing_and_loading(folder: Folder) -> None:
    written = with_manifest(folder)
    loaded = Manifest.load(folder.url)
    assert loaded == written
    assert loaded.digest == written.digest
    content = json.loads(folder.read_text(MANIFEST))
    assert content["format"] == FORMAT
    assert content["rows"] == 16
    assert content["shards"][0] == {
        "file": "a.parquet",
        "rows": 10,
        "row_groups": [4, 4, 2],
        "bytes": (folder.local / "a.parquet").stat().st_size if folder.local else 0,
        "sha256": "",
        "footer": written.shards[0].footer,
    }


def test_rows_are_numbered_through_files_in_order(folder: Folder) -> None:
    manifest = Manifest.load(folder.url)
    assert manifest.files == ("a.parquet", "b.parquet", "c.parquet")
    assert [(g.shard, g.row_group, g.first_row, g.rows) for g in manifest.row_groups] == [
        (0, 0, 0, 4),
        (0, 1, 4, 4),
        (0, 2, 8, 2),
        (1, 0, 10, 4),
        (1, 1, 14, 1),
        (2, 0, 15, 1),
    ]
    assert manifest.locate([0, 3, 4, 9, 10, 14, 15]).tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert manifest.read(4)["key"].to_pylist() == ["b/4"]


def test_an_empty_row_group_moves_no_row(tmp_path: Path) -> None:
    schema = pa.schema([SCHEMA.field(name) for name in ("image", "captions", "key")])
    with pq.ParquetWriter(tmp_path / "x.parquet", schema) as writer:
        for rows in (1, 0, 2):
            keys = [str(i) for i in range(rows)]
            writer.write_table(pa.table([[b""] * rows, [["c"]] * rows, keys], schema=schema))
    manifest = Manifest.load(str(tmp_path))
    assert manifest.sizes.tolist() == [1, 0, 2]
    assert manifest.locate([0, 1, 2]).tolist() == [0, 2, 2]


def test_a_file_a_glob_and_a_folder_are_data_without_a_manifest(folder: Folder) -> None:
    assert Manifest.load(f"{folder.url}/b.parquet").rows == 5
    assert Manifest.load(f"{folder.url}/[ab].parquet").rows == 15
    assert Manifest.load(f"{folder.url}/*").rows == 16
    assert Manifest.load(folder.url).rows == 16
    assert Manifest.load(f"file://{folder.url}/?.parquet").rows == 16


def test_the_digest_is_of_the_layout_wherever_it_lies(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("copy")
    for name in folder.names("*.parquet"):
        (elsewhere / name).write_bytes(folder.read_bytes(name))
    digest = Manifest.load(folder.url).digest
    assert Manifest.load(str(elsewhere)).digest == digest
    write(elsewhere / "a.parquet", 10, row_group_size=5)
    assert Manifest.load(str(elsewhere)).digest != digest


def test_a_pickled_manifest_still_reads(folder: Folder) -> None:
    manifest = Manifest.load(folder.url)
    assert len(manifest.row_groups) == 6  # cached, and not to travel
    copy = pickle.loads(pickle.dumps(manifest))
    assert set(vars(copy)) == {field.name for field in fields(Manifest)}
    assert copy.read(3, keep=True)["image"].to_pylist() == [b"b-0", b"b-1", b"b-2", b"b-3"]
    assert copy.read(3).num_columns == 3


def test_versions_are_all_readable_and_the_newest_is_what_the_folder_means(folder: Folder) -> None:
    shards = [replace(Shard.read(folder, name), sha256=name) for name in folder.names("*.parquet")]
    for number in (1, 2, 3):
        Manifest(folder, tuple(shards[:number]), version=number, ingests=({"input": "x"},) * number).publish()
    assert versions(folder) == [1, 2, 3]
    for number, rows in ((1, 10), (2, 15), (3, 16)):
        manifest = Manifest.load(f"{folder.url}/manifest-00000{number}.json")
        assert (manifest.version, manifest.rows, len(manifest.ingests)) == (number, rows, number)
    assert Manifest.load(folder.url) == manifest == newest(folder) == Manifest.load(f"{folder.url}/manifest.json")
    assert find(f"{folder.url}/manifest-000002.json") == (folder, ["a.parquet", "b.parquet"])
    assert json.loads(folder.read_text(MANIFEST))["digest"] == manifest.digest
    with pytest.raises(UserError, match=r"versions in that folder: manifest-000001\.json, manifest-000002"):
        Manifest.load(f"{folder.url}/manifest-000009.json")
    with pytest.raises(FileExistsError):
        Manifest(folder, tuple(shards[:1]), version=3).publish()
    assert newest(folder) == manifest
    # A run keeps to the version that it began with; what has no versions is named as it is.
    assert pinned(folder.url) == f"{folder.url}/manifest-000003.json" == pinned(pinned(folder.url))
    assert pinned(f"{folder.url}/*.parquet") == f"{folder.url}/*.parquet"
    folder.delete(MANIFEST)
    assert pinned(folder.url) == folder.url


def test_writers_at_the_same_time_lose_no_version(folder: Folder) -> None:
    shards = tuple(Shard.read(folder, name) for name in folder.names("*.parquet"))

    def publish(writer: int) -> int:
        while True:
            known = newest(folder)
            earlier = known.ingests if known else ()
            version = known.version + 1 if known else 1
            try:
                Manifest(folder, shards, version=version, ingests=(*earlier, {"writer": writer})).publish()
            except FileExistsError:
                continue
            return version

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(publish, range(12))) == list(range(1, 13))
    last = Manifest.load(folder.url)
    assert last.version == 12
    assert sorted(ingest["writer"] for ingest in last.ingests) == list(range(12))


def test_a_versions_digest_is_of_the_contents_and_not_of_the_names(folder: Folder) -> None:
    shards = tuple(replace(Shard.read(folder, name), sha256=f"content of {name}") for name in folder.names("*.parquet"))
    manifest = Manifest(folder, shards, version=1)
    renamed = replace(manifest, shards=tuple(replace(shard, file=f"other/{shard.file}") for shard in shards), version=2)
    assert renamed.digest == manifest.digest
    assert replace(manifest, shards=(replace(shards[0], sha256="other"), *shards[1:])).digest != manifest.digest
    assert replace(manifest, shards=shards[::-1]).digest != manifest.digest


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: (path / "c.parquet").unlink(), r"shard .*/c\.parquet is missing"),
        (
            lambda path: write(path / "c.parquet", 3),
            r"c\.parquet has 3 rows in 1 row groups, but manifest\.json .* says 1 in 1",
        ),
        (lambda path: (path / "c.parquet").write_bytes(b"PAR1 not"), r"c\.parquet is not a whole Parquet file"),
        (lambda path: write(path / "c.parquet", 1, captions=None), r"caption_column is 'captions', but .*/c\.parquet has only"),
        (lambda path: write(path / "c.parquet", 1, image=[7]), r"image_column: 'image' in .*/c\.parquet is of type int64"),
        (lambda path: (path / MANIFEST).write_text("{}"), r"manifest\.json is not a manifest of shards"),
        (lambda path: (path / MANIFEST).write_text('{"format": "x/2"}'), r"has format 'x/2'; this version reads"),
    ],
)
def test_a_damaged_data_set_is_named_file_by_file(folder: Folder, break_it, message: str) -> None:
    with_manifest(folder)
    break_it(folder.local)
    with pytest.raises(UserError, match=message):
        Manifest.load(folder.url)


def test_what_is_not_there_is_said(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    write(empty / "none.parquet", 0, image=pa.array([], pa.binary()), captions=pa.array([], pa.string()))
    for spec, message in (
        ("", r"data\.train is empty"),
        ("/no/such/place", "'/no/such/place' do not exist"),
        (f"{folder.url}/*.tar", r"no Parquet file \(\*\.parquet\) matches"),
        (str(empty / "none.parquet"), "hold no rows"),
        ("/no/*/place/x.parquet", "wildcards may stand in the last part only"),
    ):
        with pytest.raises(UserError, match=message):
            Manifest.load(spec)


def test_a_shard_that_changes_under_a_job_is_noticed(folder: Folder) -> None:
    manifest = Manifest.load(folder.url)
    write(Path(folder.url) / "c.parquet", 2)
    with pytest.raises(UserError, match=r"row group 0 of .*/c\.parquet has 2 rows and had 1 when the job began"):
        manifest.read(5)
    (Path(folder.url) / "b.parquet").unlink()
    with pytest.raises(UserError, match=r"cannot read row group 0 of .*b\.parquet"):
        manifest.read(3)


def with_checksums(folder: Folder, file: str, sizes: list[int]) -> Manifest:
    """A manifest of one file, as ingest writes it."""
    table = pq.read_table(f"{folder.url}/{file}")
    groups = np.split(np.arange(len(table)), np.cumsum(sizes)[:-1])
    columns = [name for name in CHECKED if name in table.column_names]
    checksums = tuple(checksum(table.take(group).select(columns)) for group in groups)
    Manifest(folder, (replace(Shard.read(folder, file), checksums=checksums),), version=1).publish()
    return Manifest.load(folder.url)


def test_a_file_written_anew_with_as_many_bytes_is_refused_by_its_footer(folder: Folder) -> None:
    with_checksums(folder, "a.parquet", [4, 4, 2])
    size = (Path(folder.url) / "a.parquet").stat().st_size
    write(Path(folder.url) / "a.parquet", 10, key=[f"b/{i}" for i in range(10)])
    assert (Path(folder.url) / "a.parquet").stat().st_size == size
    with pytest.raises(UserError, match=r"/a\.parquet has another footer than manifest-000001\.json beside it says, though as"):
        Manifest.load(folder.url)
    assert Manifest.load(f"{folder.url}/*.parquet").rows == 16  # what the message advises


def test_an_image_replaced_in_its_place_is_refused_when_it_is_read(folder: Folder) -> None:
    path = Path(folder.url) / "a.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=4, compression="none")
    manifest = with_checksums(folder, "a.parquet", [4, 4, 2])
    footer, data = read_footer(folder, "a.parquet"), path.read_bytes()
    assert data.count(b"a-5") == 1  # neither an extreme of its row group, which the footer holds, nor anywhere else
    path.write_bytes(data.replace(b"a-5", b"a-X"))
    assert read_footer(folder, "a.parquet") == footer
    assert Manifest.load(folder.url) == manifest
    assert manifest.read(0)["image"].to_pylist() == [b"a-0", b"a-1", b"a-2", b"a-3"]
    for keep in (True, False):
        with pytest.raises(UserError, match=r"/a\.parquet has other images or captions in row group 1 than manifest-000001"):
            manifest.read(1, keep=keep)
    assert manifest.read(2, keep=True).column_names == ["image", "captions", "key"]
    # From before there were checksums: readable as ever, and nothing to compare with.
    content = json.loads(folder.read_text(MANIFEST))
    for shard in content["shards"]:
        del shard["footer"], shard["checksums"]
    folder.write_text(MANIFEST, json.dumps(content))
    old = Manifest.load(folder.url)
    assert (old.digest, old.shards[0].checksums) == (manifest.digest, ())
    assert old.read(1)["image"].to_pylist()[1] == b"a-X"


def test_a_checksum_is_of_the_values_in_their_places() -> None:
    kinds = pa.schema([("image", pa.binary()), ("captions", pa.list_(pa.string()))])

    def of(images: Sequence[bytes | None], captions: list[list[str]], schema: pa.Schema = kinds) -> int:
        return checksum(pa.table([images, captions], schema=schema))

    images, captions = [b"ab", b"c", b""], [["x", "y"], ["z"], []]
    same = of(images, captions)
    table = pa.table([[b"!", *images, b"!"], [["!"], *captions, ["!"]]], schema=kinds)
    assert checksum(pa.concat_tables([table.slice(1, 1), table.slice(2, 2)])) == same
    large = pa.schema([("image", pa.large_binary()), ("captions", pa.large_list(pa.large_string()))])
    assert of(images, captions, large) == same
    assert checksum(table.slice(1, 0)) == of([], [])
    others = [
        of([b"a", b"bc", b""], captions),
        of([b"c", b"ab", b""], captions),
        of([b"ab", b"c", None], captions),
        of(images, [["x"], ["y", "z"], []]),
        of(images, [["y", "x"], ["z"], []]),
        of(images, [["xy"], ["z"], []]),
    ]
    assert len({same, *others}) == 7


def test_real_files_load(shared_data: Path) -> None:
    manifest = Manifest.load(f"{shared_data}/flickr8k_train*.parquet")
    assert manifest.rows == 6089
    assert np.sum(manifest.sizes) == 6089
