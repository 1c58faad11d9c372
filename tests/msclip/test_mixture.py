"""Several data sets as one: whose rows are whose, and the same pixels and words as from each alone."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from msclip.data.decode import read_unit
from msclip.data.mixture import Mixture, SourceConfig, pinned
from msclip.data.plan import Plan, Unit
from msclip.data.shards import Manifest
from msclip.errors import UserError
from tests.drawn import captioned, labelled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flickr`: 2 files of 12 and 7 rows. `emoji`: 11 rows. `plain`: 10 rows whose one caption is in `class_name`."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("flickr", "emoji", "plain"):
        (folder / name).mkdir()
    captioned(folder / "flickr/0.parquet", [[f"flickr {i}"] for i in range(12)], [f"f{i}" for i in range(12)])
    captioned(folder / "flickr/1.parquet", [[f"flickr {i}"] for i in range(12, 19)], [f"f{i}" for i in range(12, 19)])
    captioned(folder / "emoji/0.parquet", [[f"emoji {i}"] for i in range(11)])
    labelled(folder / "plain/0.parquet", rows=10)
    return folder


def weighted(folder: Path) -> Mixture:
    return Mixture.load(
        {
            "flickr": SourceConfig(str(folder / "flickr"), 2),
            "plain": SourceConfig(str(folder / "plain"), 1, caption_column="class_name"),
            "emoji": SourceConfig(str(folder / "emoji"), 1),
        }
    )


def test_row_ids_run_on_from_source_to_source(folder: Path) -> None:
    data = Mixture.load([str(folder / "flickr"), str(folder / "emoji")])
    assert data.rows == 30
    assert data.portions == ()
    assert [shard.file for shard in data.shards] == ["0.parquet", "1.parquet", "0.parquet"]
    for row, home, shard, group, first in ((0, "flickr", 0, 0, 0), (18, "flickr", 1, 1, 17), (19, "emoji", 2, 0, 19)):
        index = int(data.locate([row])[0])
        place = data.row_groups[index]
        assert (place.shard, place.row_group, place.first_row) == (shard, group, first)
        assert data.home(index) == str(folder / home)


def test_every_row_reads_as_from_its_source_alone(folder: Path) -> None:
    data = pickle.loads(pickle.dumps(weighted(folder)))
    begin = 0
    for name, manifest, _ in data.sources:
        rows = np.random.default_rng(0).permutation(manifest.rows)
        theirs = read_unit(manifest, Unit(0, 0, 0, 0, rows), seed=0)
        ours = read_unit(data, Unit(0, 0, 0, 0, rows + begin), seed=0)
        assert ours.captions == theirs.captions
        np.testing.assert_array_equal(ours.files, theirs.files)
        assert name != "flickr" or set(ours.captions) == {f"flickr {i}" for i in range(19)}
        begin += manifest.rows


def test_weights_become_parts_of_a_batch(folder: Path) -> None:
    data = weighted(folder)
    plan = Plan(data.sizes, 8, portions=data.portions)
    assert [source.width for source in plan.sources] == [4, 2, 2]
    assert [source.rows for source in plan.sources] == [19, 10, 11]


def test_captions_come_from_all_sources_in_turn(folder: Path) -> None:
    said = list(Mixture.load([str(folder / "flickr"), str(folder / "emoji")]).captions())
    assert sorted(said) == sorted([f"flickr {i}" for i in range(19)] + [f"emoji {i}" for i in range(11)])
    assert {text.split()[0] for text in said[:10]} == {"flickr", "emoji"}  # row groups have five


def test_the_digest_knows_rows_and_their_order_but_no_place(folder: Path) -> None:
    flickr, emoji = str(folder / "flickr"), str(folder / "emoji")
    assert Mixture.load(flickr).digest == Manifest.load(flickr).digest
    digests = [Mixture.load(paths).digest for paths in (flickr, [flickr, emoji], [emoji, flickr])]
    assert len(set(digests)) == 3
    (folder / "moved").symlink_to(folder / "emoji")
    assert Mixture.load([flickr, str(folder / "moved")]).digest == digests[1]


def test_paths_become_pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert pinned("") == ""
    assert pinned("emoji") == str(folder / "emoji")
    assert pinned(["file:///x", "emoji"]) == ["/x", str(folder / "emoji")]
    assert pinned({"a": SourceConfig("emoji", 2, "i", "c")}) == {"a": SourceConfig(str(folder / "emoji"), 2, "i", "c")}


def test_row_groups_are_followed_by_those_of_their_own_source(folder: Path) -> None:
    data = Mixture.load([str(folder / "flickr"), str(folder / "emoji")])
    flickr, emoji = (len(source.manifest.sizes) for source in data.sources)
    assert data.following(flickr - 1, 2) == [flickr - 1, 0]
    assert data.following(flickr + 1, 99) == [*range(flickr + 1, flickr + emoji), flickr]


def test_what_cannot_be_a_mixture_is_refused_by_name(folder: Path) -> None:
    emoji = str(folder / "emoji")
    with pytest.raises(UserError, match="weight is missing for b, c"):
        Mixture.load({"a": SourceConfig(emoji, 1), "b": SourceConfig(emoji), "c": SourceConfig(emoji)})
    with pytest.raises(UserError, match=r"emoji/0\.parquet twice"):
        Mixture.load([emoji, f"{emoji}/*.parquet"])
    with pytest.raises(UserError, match="each source needs a path"):
        Mixture.load("{a: {pth: x}}")  # what a mistake on the command line arrives as
    with pytest.raises(UserError, match="names no source"):
        Mixture.load([])
    with pytest.raises(UserError, match=r"plain/0\.parquet has only the columns image, label, class_name"):
        Mixture.load([emoji, str(folder / "plain")])
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(UserError, match="weight of drawings must be positive, got"):
            Mixture.load({"drawings": SourceConfig(emoji, weight)})
