"""Decoding and batches: deterministic to the bit, exactly the plan's, and never a silent loss."""

import gc
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from msclip.data import parquet
from msclip.data.decode import Encoded, Recipe, Replaced, caption_turns, read_unit, read_units
from msclip.data.images import Augment, Preprocess
from msclip.data.loader import Batch, Batches, DataConfig
from msclip.data.plan import Plan, Unit
from msclip.data.pool import Inline, Work
from msclip.data.shards import Manifest
from msclip.data.tokenizer import Tokenizer
from msclip.errors import TrainingError, UserError

ROOT = Path(__file__).resolve().parents[2]
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


def plan_of(manifest: Manifest) -> Plan:
    return Plan(manifest.sizes, GLOBAL_BATCH, seed=5, lanes=3, window=2, unit_rows=5)


def recipe_of(manifest: Manifest, tokenizer: Tokenizer, augment: Augment | None = VARIED) -> Recipe:
    return Recipe.of(manifest, PREPROCESS, augment, tokenizer, seed=5)


def read(manifest: Manifest, plan: Plan, *place: int) -> Iterator[Encoded]:
    return read_units(manifest, plan.units(*place), plan.seed)


def kept(loader: Iterable[Batch]) -> list[Batch]:
    """All batches, out of the memory that the loader uses again."""
    return [replace(batch, pixels=batch.pixels.clone(), token_ids=batch.token_ids.clone()) for batch in loader]


def batches(
    manifest: Manifest,
    tokenizer: Tokenizer,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    stop: int = 12,
    processes: int = 0,
) -> list[Batch]:
    plan = plan_of(manifest)
    place = rank, world_size, start, stop
    units = read(manifest, plan, *place)
    with Batches(plan, *place, units, recipe_of(manifest, tokenizer), processes=processes) as loader:
        return kept(loader)


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


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_change_nothing(manifest: Manifest, tokenizer: Tokenizer, processes: int) -> None:
    assert same(batches(manifest, tokenizer, processes=processes), batches(manifest, tokenizer))


def decoded(manifest: Manifest, unit: Unit, recipe: Recipe) -> np.ndarray:
    """The pixels of one unit."""
    encoded, count = read_unit(manifest, unit, recipe.seed), len(unit.row)
    files = [part.tobytes() for part in np.split(encoded.files, encoded.ends[:-1])]
    pixels, ids = np.empty((count, SIZE, SIZE, 3), np.uint8), np.empty((count, 12), np.int64)
    recipe.decode(np.full(count, unit.epoch), unit.row, files, encoded.captions, pixels, ids)
    return pixels


def test_augmentation_differs_between_epochs_and_not_between_runs(manifest: Manifest, tokenizer: Tokenizer) -> None:
    unit = next(plan_of(manifest).units())
    recipe = recipe_of(manifest, tokenizer)
    first, again = (decoded(manifest, unit, recipe) for _ in range(2))
    later = decoded(manifest, replace(unit, epoch=1), recipe)
    plain = decoded(manifest, unit, recipe_of(manifest, tokenizer, None))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, later)
    np.testing.assert_array_equal(plain[0], PREPROCESS.pixels(picture(int(unit.row[0]))))


def test_consecutive_epochs_use_every_caption_once() -> None:
    rows, counts = np.arange(2000), np.full(2000, 5)
    for start in (0, 3):
        turns = np.stack([caption_turns(counts, seed=1, epoch=start + e, rows=rows) for e in range(5)])
        assert (np.sort(turns, axis=0) == np.arange(5)[:, None]).all()
    # Not all rows the same: each caption is first in a fifth of them, within five standard deviations.
    assert np.bincount(turns[0], minlength=5) == pytest.approx(400, abs=5 * 18)
    mixed = caption_turns(np.arange(2000) % 4 + 1, seed=1, epoch=7, rows=rows)
    assert all(turn == caption_turns(np.array([i % 4 + 1]), 1, 7, np.array([i]))[0] for i, turn in enumerate(mixed[:40]))
    assert (mixed < np.arange(2000) % 4 + 1).all()


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
    assert asdict(bad["k8"]) == {
        "source": damaged.folder.url,
        "shard": "0.parquet",
        "shard_bytes": damaged.shards[0].size,
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


def test_a_row_group_without_a_good_row_takes_the_first_of_the_next_one_that_has_some(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    sizes = write(tmp_path, [picture(i) for i in range(ROWS)], good_captions()).sizes.tolist()
    last = ROWS - sizes[-1]  # the last row group, after which comes the first, and the first are bad
    images: list[bytes | None] = [picture(i) if sizes[0] < i < last else b"broken" for i in range(ROWS)]
    manifest = write(tmp_path, images, good_captions())
    found = batches(manifest, tokenizer)
    for batch in found:
        wanted = [row if sizes[0] < row < last else sizes[0] + 1 for row in batch.rows.tolist()]
        assert numbers(tokenizer, batch.token_ids) == wanted
    assert len({(bad.shard, bad.row_group, bad.row) for batch in found for bad in batch.bad}) == sizes[0] + 1 + sizes[-1]
    ranks = [batches(manifest, tokenizer, rank, 4) for rank in range(4)]
    assert same(joined(ranks), found)


def test_rows_without_a_good_one_near_are_an_error_that_names_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = write(tmp_path, [b"broken"] * ROWS, good_captions())
    with pytest.raises(UserError, match=r"no row of row group \d of .*\.parquet can be used, nor .*; row \d: not an image"):
        batches(manifest, tokenizer)


def test_row_groups_of_a_unit_are_not_in_memory_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_cache", parquet._TableCache(0))
    size, groups = 2**20, 8
    images = [np.full(size, i, np.uint8).tobytes() for i in range(groups)]
    pq.write_table(pa.table({"image": images, "captions": ["said"] * groups}), tmp_path / "x.parquet", row_group_size=1)
    data = Manifest.load(str(tmp_path))
    held: list[int] = []

    class Watched(Manifest):
        def read(self, group: int, keep: bool = False) -> pa.Table:
            held.append(pa.total_allocated_bytes())
            return super().read(group, keep)

    order = np.arange(groups)[::-1].copy()
    found = read_unit(Watched(data.folder, data.shards), Unit(0, 0, 0, 0, order), 0)
    assert held[-1] - held[0] < 3 * size
    np.testing.assert_array_equal(found.files[::size], order)


def test_a_lost_a_swapped_and_an_extra_unit_stop_the_stream(manifest: Manifest, tokenizer: Tokenizer) -> None:
    plan = plan_of(manifest)
    units = list(read(manifest, plan, 0, 1, 0, 6))
    short = replace(units[4], ends=units[4].ends[:-1])
    for stream, message in (
        (units[:-1], "ended before unit of lane"),
        ([units[1], units[0], *units[2:]], "where the plan has unit of lane 0, epoch 0"),
        ([*units[:3], *units[4:]], r"brought rows .* of epoch 0 where the plan has"),
        ([replace(units[0], epoch=1), *units[1:]], "of epoch 1 where the plan has"),
        ([*units[:4], short, *units[5:]], r"brought \d images in \d+ bytes and \d captions for the \d rows of unit"),
        ([*units[:4], replace(units[4], files=units[4].files[:-1]), *units[5:]], r"brought \d images in \d+ bytes"),
        ([*units, units[0]], "a unit after the last of step 6"),
    ):
        loader = Batches(plan, 0, 1, 0, 6, stream, recipe_of(manifest, tokenizer))
        with pytest.raises(RuntimeError, match=message):
            list(loader)
        assert list(loader) == []  # and it stays ended


def left_behind() -> list[object]:
    """Threads and processes of loaders."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    return [*threads, *psutil.Process().children(recursive=True)]


@pytest.mark.parametrize("processes", [0, 2])
def test_stopping_early_ends_threads_processes_and_the_source(manifest: Manifest, tokenizer: Tokenizer, processes: int) -> None:
    plan = plan_of(manifest)
    closed = threading.Event()

    def endless() -> Iterator[Encoded]:
        try:
            yield from read_units(manifest, plan.units(), 0)
        finally:
            closed.set()

    recipe = recipe_of(manifest, tokenizer)
    with Batches(plan, 0, 1, 0, None, endless(), recipe, processes=processes) as loader:
        assert next(loader).step == 0
        assert next(loader).step == 1
    assert closed.is_set()
    assert not left_behind()

    forgotten = Batches(plan, 0, 1, 0, None, endless(), recipe, processes=processes)
    next(forgotten)
    del forgotten
    gc.collect()
    assert not left_behind()


class Slow(Preprocess):
    """Takes 50 ms an image."""

    def train_view(self, data: Any, augment: Augment, rng: np.random.Generator) -> Image.Image:
        time.sleep(0.05)
        return super().train_view(data, augment, rng)


def test_files_are_fetched_for_little_more_than_is_being_decoded(
    manifest: Manifest, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, go, fetched = plan_of(manifest), threading.Event(), 0
    place = 0, 1, 0, 12

    def units() -> Iterator[Encoded]:
        nonlocal fetched
        for unit in read(manifest, plan, *place):
            fetched += 1
            yield unit

    decode = Inline.decode

    def patiently(self: Inline, work: Work) -> list[Replaced]:
        go.wait(30)
        return decode(self, work)

    monkeypatch.setattr(Inline, "decode", patiently)
    with Batches(plan, *place, units(), recipe_of(manifest, tokenizer), prefetch=8) as loader:
        time.sleep(0.5)
        # One batch is being decoded and two may wait when the next one's files are fetched.
        assert fetched == sum(unit.first_step < 4 for unit in plan.units(*place))
        go.set()
        assert [batch.step for batch in loader] == list(range(12))


def test_what_a_batch_waited_for_is_told_apart(manifest: Manifest, tokenizer: Tokenizer) -> None:
    plan = plan_of(manifest)
    units = list(read(manifest, plan, 0, 1, 0, 2))

    def slow() -> Iterator[Encoded]:
        time.sleep(0.3)
        yield from units

    with Batches(plan, 0, 1, 0, 2, slow(), recipe_of(manifest, tokenizer)) as loader:
        next(loader)
        assert loader.waits.storage > 0.25
        time.sleep(0.3)
        before = sum(loader.waits)
        next(loader)
        assert sum(loader.waits) - before < 0.25
    recipe = replace(recipe_of(manifest, tokenizer), preprocess=Slow(image_size=SIZE))
    with Batches(plan, 0, 1, 0, 2, units, recipe) as loader:
        next(loader)
        assert loader.waits.decode > 0.25
        assert loader.waits.storage < 0.25


def test_a_dead_decoding_process_ends_the_batches_with_its_signal(manifest: Manifest, tokenizer: Tokenizer) -> None:
    plan = plan_of(manifest)
    units = read_units(manifest, plan.units(), 0)
    with Batches(plan, 0, 1, 0, None, units, recipe_of(manifest, tokenizer), processes=2) as loader:
        next(loader)
        psutil.Process().children(recursive=True)[-1].kill()
        with pytest.raises(TrainingError, match=r"process \d+ ended with signal 9.*data\.decode_processes"):
            list(loader)
    assert not left_behind()


OWNER = """
import sys, time
from msclip.data.decode import Recipe, read_units
from msclip.data.images import Preprocess
from msclip.data.loader import Batches
from msclip.data.plan import Plan, Unit
from msclip.data.shards import Manifest
manifest = Manifest.load(sys.argv[1])
plan = Plan(manifest.sizes, 8)
recipe = Recipe.of(manifest, Preprocess(image_size=8), None, open(sys.argv[2]).read(), 0)
batches = Batches(plan, 0, 1, 0, None, read_units(manifest, plan.units(), 0), recipe, processes=2)
next(batches)
print("ready", flush=True)
time.sleep(60)
"""


def test_nothing_is_left_when_the_owner_is_killed(manifest: Manifest, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    shared = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", OWNER, manifest.folder.url, str(tmp_path / "tokenizer.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        processes = psutil.Process(owner.pid).children(recursive=True)
        assert len(processes) == 3  # the one that was started, and two that decode
        owner.kill()
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive
    assert set(os.listdir("/dev/shm")) <= shared


def test_a_decoding_process_is_light() -> None:
    code = "import sys, msclip.data.pool; print([m for m in ('torch', 'ray', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_hugging_face_columns_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    images = [{"bytes": picture(i) if i != 2 else None, "path": None} for i in range(8)]
    table = pa.table({"picture": images, "text": [f"picture {i}" if i != 5 else "" for i in range(8)]})
    pq.write_table(table, tmp_path / "x.parquet")
    manifest = Manifest.load(str(tmp_path), "picture", "text")
    unit = next(Plan(manifest.sizes, 8).units())
    units, recipe = read_units(manifest, [unit], 0), Recipe.of(manifest, PREPROCESS, None, tokenizer, 0)
    with Batches(Plan(manifest.sizes, 8), 0, 1, 0, 1, units, recipe) as loader:
        batch = next(loader)
        wanted = [{2: 3, 5: 6}.get(row, row) for row in unit.row.tolist()]
        assert numbers(tokenizer, batch.token_ids) == wanted
        assert sorted((row.row, row.key, row.reason) for row in batch.bad) == [(2, "", "no image"), (5, "", "no caption")]


def test_settings_out_of_range_are_named() -> None:
    for settings, message in (
        ({"lanes": 0}, r"data\.lanes"),
        ({"max_bad_fraction": 1.5}, r"data\.max_bad_fraction"),
        ({"decode_processes": 0}, r"data\.decode_processes"),
        ({"remote_decode_processes": -1}, r"data\.remote_decode_processes"),
        ({"prefetch": 0}, r"data\.prefetch"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(**settings)
