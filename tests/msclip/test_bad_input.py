"""One row in a hundred is bad, in eight ways: each is counted with its reason, and every worker has its whole share. And data
that are not what they were are refused before anything starts, with the file's name."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from msclip import quarantine
from msclip.data.decode import Recipe, read_units
from msclip.data.images import Augment, Preprocess
from msclip.data.loader import Batches
from msclip.data.mixture import Mixture
from msclip.data.plan import Plan
from msclip.data.shards import MANIFEST, Manifest
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError
from msclip.quarantine import Quarantine
from msclip.storage import Folder
from tests.drawn import captioned
from tests.msclip.bad_rows import KINDS, with_bad_rows

ROWS, GLOBAL_BATCH, WORKERS = 1600, 32, 2


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mixture, dict[int, str]]:
    """16 bad rows in 1,600, two of each kind, in two shards."""
    folder = tmp_path_factory.mktemp("damaged")
    table, expected = with_bad_rows(ROWS, every=100)
    pq.write_table(table.slice(0, 900), folder / "0.parquet", row_group_size=40)
    pq.write_table(table.slice(900), folder / "1.parquet", row_group_size=40)
    return Mixture.load(str(folder)), expected


def train(run: Folder, data: Mixture, epochs: int, skip: np.ndarray) -> list[np.ndarray]:
    """What the loop does with batches, on each worker in turn; returns the rows of every global batch."""
    plan = Plan(data.sizes, GLOBAL_BATCH, seed=1, skip=skip)
    tokenizer = Tokenizer.train(["a picture, a number"], vocab_size=600, context_length=8)
    recipe = Recipe.of(data, Preprocess(image_size=8), Augment(flip=0.5), tokenizer, plan.seed)
    steps = int(epochs * plan.steps_per_epoch)
    shares = [list[np.ndarray]() for _ in range(steps)]
    record = Quarantine(run, most=0.02)
    for rank in range(WORKERS):
        place = rank, WORKERS, 0, steps
        with Batches(plan, *place, read_units(data, plan.units(*place), plan.seed), recipe) as batches:
            for batch in batches:
                assert len(batch.pixels) == len(batch.token_ids) == len(batch.rows) == GLOBAL_BATCH // WORKERS
                assert (batch.token_ids != 0).any(dim=1).all()
                shares[batch.step].append(batch.rows)
                record.add([(batch.step + 1, row) for row in batch.bad], len(batch.rows))
    record.write()
    assert [len(share) for share in shares] == [WORKERS] * steps
    return [np.concatenate(share) for share in shares]


def test_eight_kinds_of_bad_rows_are_counted_exactly_and_nobody_is_short(
    damaged: tuple[Mixture, dict[int, str]], tmp_path: Path
) -> None:
    data, expected = damaged
    run = Folder(tmp_path / "run")
    run.write_text("config.yaml", "{}")
    found = train(run, data, epochs=2, skip=np.array([], dtype=np.int64))
    plan = Plan(data.sizes, GLOBAL_BATCH, seed=1)
    for step, rows in enumerate(found):  # the plan's rows, bad ones too: others stand in their places
        np.testing.assert_array_equal(rows, plan.batch(step).row)

    recorded = quarantine.read(run).to_pylist()
    assert len(recorded) == len(expected) == 2 * len(KINDS)  # in two epochs, each once
    reasons = {int(row["key"][1:]): row["reason"] for row in recorded}
    assert reasons.keys() == expected.keys()
    assert all(reasons[row].startswith(reason) for row, reason in expected.items())
    assert Counter(reason.partition(":")[0] for reason in reasons.values()) == {
        "truncated": 2,
        "not an image": 2,
        "empty": 2,
        "no image": 2,
        "no caption": 4,
        "too many pixels": 2,
        "broken": 2,
    }
    for row in recorded:
        number = int(row["key"][1:])
        file, first = ("0.parquet", 0) if number < 900 else ("1.parquet", 900)
        place = (row["shard"], row["row_group"], row["row"])
        assert place == (file, (number - first) // 40, (number - first) % 40)

    # A later run leaves them out, and meets every other row.
    rows, elsewhere = quarantine.skippable(run.url, data)
    skip = quarantine.row_ids(rows, data)
    assert (skip.tolist(), elsewhere) == (sorted(expected), 0)
    again = Folder(tmp_path / "again")
    seen = np.concatenate(train(again, data, epochs=1, skip=skip))
    assert len(quarantine.read(again)) == 0
    assert len(seen) == len(np.unique(seen)) == (ROWS - len(skip)) // GLOBAL_BATCH * GLOBAL_BATCH
    assert not np.isin(seen, skip).any()


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
