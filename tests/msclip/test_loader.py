"""Decoding and batches: deterministic to the bit, exactly the plan's, and never a silent loss."""

import gc
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from msclip.data.decode import Decoded, caption_index, decode_unit, local_units
from msclip.data.images import Augment, Preprocess
from msclip.data.loader import Batch, Batches, DataConfig, assemble
from msclip.data.plan import Plan
from msclip.data.shards import Manifest
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError

ROWS, GLOBAL_BATCH, SIZE = 37, 8, 8
PREPROCESS = Preprocess(image_size=SIZE)
VARIED = Augment(scale=(0.3, 1.0), flip=0.5)


def picture(number: int) -> bytes:
    """A gradient in a colour of its own, so that crops and mirrors of it differ."""
    ramp = np.linspace(0, 255, 12, dtype=np.uint8)
    pixels = np.stack([np.tile(ramp, (10, 1)), np.full((10, 12), number * 5 % 256), np.tile(ramp[:10, None], (1, 12))], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def numbers(tokenizer: Tokenizer, token_ids: torch.Tensor) -> list[int]:
    """The n of each caption "picture n word w"; the tokenizer sets digits apart."""
    texts = [tokenizer.decode(ids.tolist()).split("word")[0] for ids in token_ids]
    return [int("".join(filter(str.isdigit, text))) for text in texts]


def write(folder: Path, images: list[bytes | None], captions: list[list[str] | None]) -> Manifest:
    keys = [f"k{i}" for i in range(len(images))]
    for part, rows in enumerate((slice(0, 20), slice(20, None))):
        table = pa.table(
            {
                "image": pa.array(images[rows], pa.binary()),
                "captions": pa.array(captions[rows], pa.list_(pa.string())),
                "key": keys[rows],
            }
        )
        if len(table):
            pq.write_table(table, folder / f"{part}.parquet", row_group_size=6)
    return Manifest.load(str(folder))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"picture {i} of three words" for i in range(40)], vocab_size=600, context_length=12)


def good_captions() -> list[list[str] | None]:
    return [[f"picture {i} word {c}" for c in range(1 + i % 3)] for i in range(ROWS)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write(tmp_path_factory.mktemp("shards"), [picture(i) for i in range(ROWS)], good_captions())


def plan_of(manifest: Manifest, **settings: int) -> Plan:
    return Plan(manifest.sizes, GLOBAL_BATCH, seed=5, **({"lanes": 3, "window": 2, "unit_rows": 5} | settings))


def decoded(
    manifest: Manifest, plan: Plan, tokenizer: Tokenizer, rank: int, world_size: int, start: int, stop: int, threads: int = 0
) -> Iterator[Decoded]:
    units = plan.units(rank, world_size, start, stop)
    return local_units(manifest, units, PREPROCESS, tokenizer, VARIED, plan.seed, threads)


def batches(
    manifest: Manifest, tokenizer: Tokenizer, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 12
) -> list[Batch]:
    plan = plan_of(manifest)
    stream = decoded(manifest, plan, tokenizer, rank, world_size, start, stop)
    with Batches(plan, rank, world_size, start, stop, stream) as loader:
        return list(loader)


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a.step == b.step and torch.equal(a.pixels, b.pixels) and torch.equal(a.token_ids, b.token_ids) for a, b in pairs)


def joined(ranks: list[list[Batch]]) -> list[Batch]:
    return [
        replace(
            shares[0],
            pixels=torch.cat([share.pixels for share in shares]),
            token_ids=torch.cat([share.token_ids for share in shares]),
        )
        for shares in zip(*ranks, strict=True)
    ]


def test_batches_are_the_plan_s(manifest: Manifest, tokenizer: Tokenizer) -> None:
    plan = plan_of(manifest)
    found = batches(manifest, tokenizer)
    assert [batch.step for batch in found] == list(range(12))
    for batch in found:
        np.testing.assert_array_equal(batch.rows, plan.batch(batch.step).row)
        assert batch.pixels.shape == (GLOBAL_BATCH, SIZE, SIZE, 3)
        assert batch.pixels.dtype == torch.uint8
        assert batch.token_ids.shape == (GLOBAL_BATCH, 12)
        assert batch.token_ids.dtype == torch.int64
        # The green of a picture and the number in its caption are the row's own.
        assert batch.pixels[:, 0, 0, 1].tolist() == [row * 5 % 256 for row in batch.rows]
        assert numbers(tokenizer, batch.token_ids) == batch.rows.tolist()
    assert found[-1].epoch == pytest.approx(12 * GLOBAL_BATCH / ROWS)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_more_workers_see_the_same_pixels_and_words(manifest: Manifest, tokenizer: Tokenizer, world_size: int) -> None:
    ranks = [batches(manifest, tokenizer, rank, world_size) for rank in range(world_size)]
    assert same(joined(ranks), batches(manifest, tokenizer))


def test_a_resumed_stream_continues_to_the_bit(manifest: Manifest, tokenizer: Tokenizer) -> None:
    unbroken = batches(manifest, tokenizer)
    for start in (1, 4, 5, 11):
        assert same(batches(manifest, tokenizer, start=start), unbroken[start:])


def test_threads_change_nothing(manifest: Manifest, tokenizer: Tokenizer) -> None:
    plan = plan_of(manifest)
    stream = decoded(manifest, plan, tokenizer, 0, 1, 0, 12, threads=3)
    assert same(list(assemble(plan, 0, 1, 0, 12, stream)), batches(manifest, tokenizer))


def test_augmentation_differs_between_epochs_and_not_between_runs(manifest: Manifest, tokenizer: Tokenizer) -> None:
    unit = next(plan_of(manifest).units())
    first, again = (decode_unit(manifest, unit, PREPROCESS, tokenizer, VARIED, seed=5).pixels for _ in range(2))
    later = decode_unit(manifest, replace(unit, epoch=1), PREPROCESS, tokenizer, VARIED, seed=5).pixels
    plain = decode_unit(manifest, unit, PREPROCESS, tokenizer, None, seed=5).pixels
    assert np.array_equal(first, again)
    assert not np.array_equal(first, later)
    np.testing.assert_array_equal(plain[0], PREPROCESS.pixels(picture(int(unit.row[0]))))


def test_consecutive_epochs_use_every_caption_once() -> None:
    for row in range(20):
        for start in (0, 3):
            assert sorted(caption_index(5, seed=1, epoch=start + e, row=row) for e in range(5)) == list(range(5))
    assert len({caption_index(5, seed=1, epoch=0, row=row) for row in range(40)}) == 5  # not all rows the same


BAD = {3: "no image", 8: "not an image", 9: "no caption", 10: "no caption", 36: "empty"}


@pytest.fixture
def damaged(tmp_path: Path) -> Manifest:
    images: list[bytes | None] = [picture(i) for i in range(ROWS)]
    images[3], images[8], images[36] = None, b"GIF? no", b""
    captions = good_captions()
    captions[9], captions[10] = None, [" ", ""]
    return write(tmp_path, images, captions)


def test_a_bad_row_is_replaced_and_recorded(damaged: Manifest, tokenizer: Tokenizer) -> None:
    stop = 5  # 40 rows: one epoch, 3 rows of the next
    found = batches(damaged, tokenizer, stop=stop)
    plan = plan_of(damaged)
    bad = {row.key: row for batch in found for row in batch.bad}
    assert {int(key[1:]): row.reason for key, row in bad.items()} == BAD
    assert json.loads(bad["k8"].to_json()) == {
        "shard": "0.parquet",
        "row_group": 1,
        "row": 2,
        "key": "k8",
        "reason": "not an image",
    }
    instead = {3: 4, 8: 11, 9: 11, 10: 11, 36: 32}  # the next good row of its row group; after its last comes its first
    for batch in found:
        np.testing.assert_array_equal(batch.rows, plan.batch(batch.step).row)
        wanted = [instead.get(row, row) for row in batch.rows.tolist()]
        assert batch.pixels[:, 0, 0, 1].tolist() == [row * 5 % 256 for row in wanted]
        assert numbers(tokenizer, batch.token_ids) == wanted


def test_bad_rows_are_replaced_alike_on_any_number_of_workers(damaged: Manifest, tokenizer: Tokenizer) -> None:
    whole = batches(damaged, tokenizer)
    ranks = [batches(damaged, tokenizer, rank, 4) for rank in range(4)]
    assert same(joined(ranks), whole)
    assert sum(len(b.bad) for share in ranks for b in share) == sum(len(b.bad) for b in whole)


def test_a_row_group_without_a_good_row_is_an_error_that_names_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    images: list[bytes | None] = [picture(i) if i >= 6 else b"broken" for i in range(ROWS)]
    manifest = write(tmp_path, images, good_captions())
    with pytest.raises(UserError, match=r"no row of row group 0 of .*/0\.parquet can be used; row \d: not an image"):
        batches(manifest, tokenizer)


def test_a_lost_a_swapped_and_an_extra_unit_stop_the_stream(manifest: Manifest, tokenizer: Tokenizer) -> None:
    plan = plan_of(manifest)
    units = list(decoded(manifest, plan, tokenizer, 0, 1, 0, 6))
    short = replace(units[4], pixels=units[4].pixels[:-1])
    for stream, message in (
        (units[:-1], "ended before unit of lane"),
        ([units[1], units[0], *units[2:]], "where the plan has unit of lane 0, epoch 0"),
        ([*units[:3], *units[4:]], r"brought rows .* of epoch 0 where the plan has"),
        ([replace(units[0], epoch=1), *units[1:]], "of epoch 1 where the plan has"),
        ([*units[:4], short, *units[5:]], r"brought \d images and \d captions for the \d rows of unit"),
        ([*units, units[0]], "a unit after the last of step 6"),
    ):
        loader = Batches(plan, 0, 1, 0, 6, stream)
        with pytest.raises(RuntimeError, match=message):
            list(loader)
        assert list(loader) == []  # and it stays ended


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_stopping_early_ends_the_thread_and_the_source(manifest: Manifest, tokenizer: Tokenizer) -> None:
    plan = plan_of(manifest)
    closed = threading.Event()

    def endless() -> Iterator[Decoded]:
        try:
            yield from local_units(manifest, plan.units(), PREPROCESS, tokenizer, None, 0)
        finally:
            closed.set()

    with Batches(plan, 0, 1, 0, None, endless()) as loader:
        assert next(loader).step == 0
        assert next(loader).step == 1
    assert closed.is_set()
    assert not loader_threads()

    forgotten = Batches(plan, 0, 1, 0, None, endless())
    next(forgotten)
    del forgotten
    gc.collect()
    assert not loader_threads()


def test_waiting_is_counted(manifest: Manifest, tokenizer: Tokenizer) -> None:
    plan = plan_of(manifest)
    units = list(decoded(manifest, plan, tokenizer, 0, 1, 0, 2))

    def slow() -> Iterator[Decoded]:
        time.sleep(0.3)
        yield from units

    with Batches(plan, 0, 1, 0, 2, slow()) as loader:
        next(loader)
        assert loader.wait_seconds > 0.25
        time.sleep(0.3)
        before = loader.wait_seconds
        next(loader)
        assert loader.wait_seconds - before < 0.25


def test_hugging_face_columns_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    images = [{"bytes": picture(i) if i != 2 else None, "path": None} for i in range(8)]
    table = pa.table({"picture": images, "text": [f"picture {i}" if i != 5 else "" for i in range(8)]})
    pq.write_table(table, tmp_path / "x.parquet")
    manifest = Manifest.load(str(tmp_path), "picture", "text")
    unit = next(Plan(manifest.sizes, 8).units())
    result = decode_unit(manifest, unit, PREPROCESS, tokenizer, None, seed=0)
    wanted = [{2: 3, 5: 6}.get(row, row) for row in unit.row.tolist()]
    assert numbers(tokenizer, torch.from_numpy(result.token_ids)) == wanted
    assert sorted((row.row, row.key, row.reason) for row in result.bad) == [(2, "", "no image"), (5, "", "no caption")]


def test_settings_out_of_range_are_named() -> None:
    for settings, message in (
        ({"lanes": 0}, r"data\.lanes"),
        ({"max_bad_fraction": 1.5}, r"data\.max_bad_fraction"),
        ({"decode_cpus": 0.0}, r"data\.decode_cpus"),
        ({"prefetch": 0}, r"data\.prefetch"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(**settings)
