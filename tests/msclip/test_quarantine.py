"""The record of bad rows: each once, added to and never rewritten, and what a later run makes of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from msclip import quarantine
from msclip.data.decode import BadRow
from msclip.data.mixture import Mixture
from msclip.errors import TrainingError, UserError
from msclip.quarantine import QUARANTINE, Quarantine
from msclip.storage import Folder
from tests.drawn import captioned


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A run's folder on a disk or in an object store."""
    if request.param == "local":
        return Folder(tmp_path / "run")
    return Folder(request.getfixturevalue("s3_url")) / request.node.name.partition("[")[0]


def bad(row: int, shard: str = "a.parquet", reason: str = "truncated") -> BadRow:
    return BadRow("/data", shard, 1000, row // 5, row % 5, f"k{row}", reason)


def at(step: int, rows: Sequence[BadRow]) -> list[tuple[int, BadRow]]:
    return [(step, row) for row in rows]


def test_each_row_is_recorded_once_in_parts_that_are_never_rewritten(run: Folder) -> None:
    record = Quarantine(run, most=1)
    record.add(at(1, [bad(3), bad(4)]), 100)
    first = (run / QUARANTINE).read_bytes("000001.parquet")  # the first report with bad rows writes at once
    record.add(at(9, [bad(4), bad(5), bad(3, "b.parquet")]), 100)
    assert (run / QUARANTINE).names() == ["000001.parquet"]  # later ones once a minute, and before each checkpoint
    record.write()
    resumed = Quarantine(run, most=1)
    resumed.add(at(9, [bad(5), bad(6, reason="empty")]), 100)
    resumed.write()
    resumed.write()
    assert (run / QUARANTINE).names() == ["000001.parquet", "000002.parquet", "000003.parquet"]
    assert (run / QUARANTINE).read_bytes("000001.parquet") == first
    rows = quarantine.read(run).to_pylist()
    assert [(row["shard"], row["key"], row["reason"], row["step"]) for row in rows] == [
        ("a.parquet", "k3", "truncated", 1),
        ("a.parquet", "k4", "truncated", 1),
        ("a.parquet", "k5", "truncated", 9),
        ("b.parquet", "k3", "truncated", 9),
        ("a.parquet", "k6", "empty", 9),
    ]
    assert (rows[0]["source"], rows[0]["shard_bytes"], rows[0]["row_group"], rows[0]["row"]) == ("/data", 1000, 0, 3)


def test_any_reader_of_parquet_reads_the_folder(tmp_path: Path) -> None:
    record = Quarantine(Folder(tmp_path), most=1)
    for row in range(3):
        record.add(at(row, [bad(row)]), 1)
        record.write()
    assert pq.read_table(tmp_path / QUARANTINE)["key"].to_pylist() == ["k0", "k1", "k2"]


def test_of_several_workers_one_writes(tmp_path: Path) -> None:
    record = Quarantine(Folder(tmp_path), most=1, writes=False)
    record.add(at(1, [bad(1)]), 10)
    record.write()
    assert not list(tmp_path.iterdir())


def test_past_the_limit_the_run_stops_and_names_the_worst_shards(tmp_path: Path) -> None:
    record = Quarantine(Folder(tmp_path), most=0.02)
    record.add(at(1, [bad(i, f"{i % 7}.parquet") for i in range(20)]), 500)  # 20 of what counts as 1,000
    with pytest.raises(TrainingError) as stopped:
        record.add(at(2, [bad(90 + i, "6.parquet") for i in range(21)]), 1500)
    message = str(stopped.value)
    assert "41 of 2,000 rows" in message
    assert "data.max_bad_fraction 0.02" in message
    assert "the worst shards: /data/6.parquet (23), /data/0.parquet (3), " in message
    assert message.count("(3)") == 4
    assert "and 2 more" in message
    assert f"--data.skip_quarantined {tmp_path}" in message
    record.write()
    assert len(quarantine.read(Folder(tmp_path))) == 41


@pytest.fixture
def data(tmp_path: Path) -> Mixture:
    """Two sources that both have a `0.parquet`, of 12 and of 7 rows in row groups of 5."""
    for name, rows in (("one", 12), ("two", 7)):
        (tmp_path / name).mkdir()
        captioned(tmp_path / name / "0.parquet", [[f"{name} {i}"] for i in range(rows)])
    return Mixture.load([str(tmp_path / "one"), str(tmp_path / "two")])


def refused(run: Folder, data: Mixture, rows: Sequence[int]) -> None:
    """As if `run` had met these row ids and could not use them."""
    run.write_text("config.yaml", "{}")
    record = Quarantine(run, most=1)
    for row in rows:
        group = int(data.locate([row])[0])
        place = data.row_groups[group]
        shard = data.shards[place.shard]
        found = BadRow(data.home(group), shard.file, shard.size, place.row_group, row - place.first_row, "", "empty")
        record.add([(1, found)], 1)
    record.write()


def test_a_later_run_finds_the_same_rows_and_keeps_them(run: Folder, data: Mixture, tmp_path: Path) -> None:
    refused(run, data, [18, 3, 11])
    rows, elsewhere = quarantine.skippable(run.url, data)
    assert elsewhere == 0
    np.testing.assert_array_equal(quarantine.row_ids(rows, data), [3, 11, 18])
    later = Folder(tmp_path / "later")
    quarantine.write_skipped(later, rows)
    refused(later, data, [0])
    assert quarantine.read_skipped(later) == rows
    # A third run leaves out what both of them could not use; and a mixture may have other sources in another order.
    other = Mixture(data.sources[::-1])
    rows, elsewhere = quarantine.skippable(later.url, other)
    np.testing.assert_array_equal(quarantine.row_ids(rows, other), [6, 7, 10, 18])
    rows, elsewhere = quarantine.skippable(later.url, Mixture(data.sources[1:]))
    np.testing.assert_array_equal(quarantine.row_ids(rows, Mixture(data.sources[1:])), [6])
    assert elsewhere == 3


def test_rows_of_a_shard_that_changed_are_met_again_and_a_run_that_left_them_out_stops(tmp_path: Path, data: Mixture) -> None:
    run = Folder(tmp_path / "run")
    refused(run, data, [2, 13])
    before, _ = quarantine.skippable(run.url, data)
    captioned(tmp_path / "one" / "0.parquet", [[f"another {i}"] for i in range(12)])
    changed = Mixture.load([str(tmp_path / "one"), str(tmp_path / "two")])
    rows, elsewhere = quarantine.skippable(run.url, changed)
    assert (quarantine.row_ids(rows, changed).tolist(), elsewhere) == ([13], 1)
    with pytest.raises(UserError, match=r"one/0\.parquet, of which this run leaves out rows, has changed"):
        quarantine.row_ids(before, changed)


def test_what_is_no_run_is_refused(tmp_path: Path, data: Mixture) -> None:
    with pytest.raises(UserError, match=r"data\.skip_quarantined must be the folder of an earlier run"):
        quarantine.skippable(str(tmp_path / "nothing"), data)


def test_a_digest_tells_sets_of_rows_apart() -> None:
    assert quarantine.digest(np.array([], dtype=np.int64)) is None
    assert quarantine.digest(np.array([5, 3])) == quarantine.digest(np.array([3, 5])) != quarantine.digest(np.array([3, 6]))
