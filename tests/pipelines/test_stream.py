"""Ray Data hands over exactly what decoding in one process gives: the same units, words for errors, and nothing left behind."""

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from msclip.data.decode import Encoded, Recipe, read_units
from msclip.data.images import Augment, Preprocess
from msclip.data.loader import Batches
from msclip.data.plan import Plan, Unit
from msclip.data.shards import Manifest
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError

ROWS, PREPROCESS, AUGMENT = 60, Preprocess(image_size=8), Augment(flip=0.5)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, good: range) -> Manifest:
    images = [picture(i) if i in good else b"broken" for i in range(ROWS)]
    table = pa.table(
        {"image": images, "captions": [f"picture {i}" for i in range(ROWS)], "key": [f"k{i}" for i in range(ROWS)]}
    )
    pq.write_table(table, path, row_group_size=10)
    return Manifest.load(str(path))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["picture one"], vocab_size=600, context_length=8)


def stream(manifest: Manifest, plan: Plan, *where: Any, **settings: Any) -> Iterator[Encoded]:
    from pipelines.stream import ray_units

    return ray_units(manifest, plan, *where, **settings)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("task_bytes", [1, 3000])  # one unit a task, and several
def test_ray_data_brings_what_one_process_reads(tmp_path: Path, task_bytes: int) -> None:
    manifest = write(tmp_path / "x.parquet", range(1, ROWS))
    plan = Plan(manifest.sizes, 16, seed=3, lanes=2, unit_rows=12)
    where = 1, 2, 1, 9  # the second of two workers, resumed at step 1, more than two epochs
    listed = list(plan.units(*where))
    found = list(stream(manifest, plan, *where, task_bytes=task_bytes, span_tasks=1))  # read here too: the first task's
    for mine, theirs in zip(read_units(manifest, listed, plan.seed), found, strict=True):
        assert (mine.epoch, mine.captions) == (theirs.epoch, theirs.captions)
        for name in ("row", "files", "ends"):
            left, right = getattr(mine, name), getattr(theirs, name)
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


@pytest.mark.usefixtures("ray_session")
def test_what_was_read_until_ray_data_was_ready_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import stream as module

    manifest = write(tmp_path / "x.parquet", range(ROWS))
    plan = Plan(manifest.sizes, 16, seed=3, lanes=2, unit_rows=12)
    given, begun = 0, []

    class Span(module._Span):
        def __init__(self, units: list[Unit], *others: Any):
            begun.append((given, [tuple(unit.row) for unit in units[:1]]))
            super().__init__(units, *others)

    monkeypatch.setattr(module, "_Span", Span)
    monkeypatch.setattr(module, "_SPAN_SECONDS", 1.0)
    listed = [tuple(unit.row) for unit in plan.units(0, 1, 0, 3000)]
    for unit in stream(manifest, plan, 0, 1, 0, 3000, task_bytes=1, span_tasks=2000):
        assert tuple(unit.row) == listed[given]
        given += 1
        if len(begun) < 2:
            time.sleep(0.02)  # as a training step takes
        elif given > begun[1][0] + 150:
            break
    (first, nothing), (second, rows) = begun[:2]
    assert first < second
    assert not nothing
    assert rows[0] in listed[second + 20 : second + 20 + 50]  # read ahead, and to be read in that second


@pytest.mark.usefixtures("ray_session")
def test_batches_through_ray_and_processes_are_those_of_one_process(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = write(tmp_path / "x.parquet", range(1, ROWS))
    plan = Plan(manifest.sizes, 16, seed=3, lanes=2, unit_rows=12)
    where = 1, 2, 1, 9
    recipe = Recipe.of(manifest, PREPROCESS, AUGMENT, tokenizer, plan.seed)
    local = Batches(plan, *where, read_units(manifest, plan.units(*where), plan.seed), recipe)
    units = stream(manifest, plan, *where, task_bytes=1, span_tasks=1)
    remote = Batches(plan, *where, units, recipe, processes=2)
    bad = []
    with local, remote:
        for mine, theirs in zip(local, remote, strict=True):
            assert mine.bad == theirs.bad
            bad += mine.bad
            assert torch.equal(mine.pixels, theirs.pixels)
            assert torch.equal(mine.token_ids, theirs.token_ids)
    assert {row.key for row in bad} == {"k0"}


@pytest.mark.usefixtures("ray_session")
def test_a_mistake_in_the_data_reaches_the_loop_in_its_own_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = write(tmp_path / "x.parquet", range(0))
    plan = Plan(manifest.sizes, 16, seed=3)
    recipe = Recipe.of(manifest, PREPROCESS, AUGMENT, tokenizer, plan.seed)
    with (
        pytest.raises(UserError, match=r"^no row of row group \d of .*x\.parquet can be used, nor .*; row \d+: not an image\."),
        Batches(plan, 0, 1, 0, None, stream(manifest, plan, 0, 1, 0, None), recipe, processes=1) as batches,
    ):
        list(batches)


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_disappears_is_named(tmp_path: Path) -> None:
    manifest = write(tmp_path / "x.parquet", range(ROWS))
    plan = Plan(manifest.sizes, 16, seed=3, unit_rows=4)
    units = stream(manifest, plan, 0, 1, 0, None, task_bytes=1)
    next(units)
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(UserError, match=r"x\.parquet"):
        list(units)


@pytest.mark.usefixtures("ray_session")
def test_a_local_disk_is_read_by_a_quarter_of_the_cores_and_far_storage_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from pipelines.stream import _context

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "object_store_memory": 1e11})

    def readers(world_size: int, local: bool) -> float:
        return _context(1000, world_size, local).execution_options.resource_limits.cpu

    assert [readers(1, local=True), readers(4, local=True), readers(32, local=True)] == [16, 4, 1]
    assert readers(4, local=False) == float("inf")

    def ahead(task_bytes: int, world_size: int, local: bool) -> float:
        return _context(task_bytes, world_size, local).execution_options.resource_limits.object_store_memory / 2**20

    assert [ahead(1000, world_size, local=True) for world_size in (1, 4, 32)] == [512, 320, 128]
    assert [ahead(size * 2**20, 32, local=True) for size in (40, 400)] == [160, 512]
    assert ahead(1000, 32, local=False) == 512
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "object_store_memory": 100 * 2**20})
    assert ahead(1000, 1, local=False) == pytest.approx(40)  # it has to fit


def test_the_files_of_a_task_are_not_copied() -> None:
    from pipelines.stream import _array, _as_cell

    files = np.arange(100, dtype=np.uint8)
    block = pa.table({"files": pa.concat_arrays([_as_cell(files)]), "none": _as_cell(files[:0])})
    lies = block["files"].chunk(0).buffers()[2].address
    found = _array(block, "files", np.uint8)
    assert found.ctypes.data == lies
    np.testing.assert_array_equal(found, files)
    np.testing.assert_array_equal(_array(block, "files", np.int32), files.view(np.int32))
    assert len(_array(block, "none", np.int64)) == 0


def test_the_longer_what_is_read_waits_the_longer_ray_data_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from pipelines import stream

    slept: list[float] = []
    monkeypatch.setattr(stream, "time", SimpleNamespace(sleep=slept.append))
    for waiting in (0, 1, 50):
        stream._Pause().on_execution_step(SimpleNamespace(_output_node=(None, SimpleNamespace(output_queue=[None] * waiting))))
    assert slept[0] < slept[1] < slept[2] < 0.5
