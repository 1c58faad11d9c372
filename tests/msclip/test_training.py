"""The loop in one process, without Ray: resuming, stopping, and what it writes."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import msclip
from msclip import checkpoint, metrics_log, timing
from msclip.data.decode import Encoded, Recipe, read_units
from msclip.data.images import Augment, Preprocess
from msclip.data.loader import Batch, Batches
from msclip.data.plan import Plan
from msclip.data.shards import Manifest
from msclip.data.tokenizer import Tokenizer
from msclip.engine import create_engine
from msclip.optim import OptimConfig
from msclip.s3_requests import repeated
from msclip.storage import Folder
from msclip.training import WAITING, CheckpointConfig, LocalRun, Reporter, TrainingConfig, train
from pipelines.progress import Progress
from tests.drawn import TEXTS, captioned

STEPS, EVERY = 6, 2


def pairs(folder: Path, count: int = 40) -> Path:
    """`count` drawn pairs of two captions each."""
    return captioned(folder / "pairs.parquet", [[TEXTS[i % 10], TEXTS[(i + 3) % 10]] for i in range(count)])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest.load(str(pairs(tmp_path_factory.mktemp("data"))))


def run_to(folder: Path | Folder, manifest: Manifest, steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    """Trains a tiny model up to `steps`, from the newest checkpoint in `folder` if there is one."""
    torch.manual_seed(0)
    run = LocalRun(Folder(folder))
    optim = OptimConfig(**({"lr": 1e-3, "warmup_steps": 2, "clip_grad_norm": 1.0} | changes))
    config = TrainingConfig(global_batch=16, epochs=None, steps=STEPS, log_every_steps=1)
    tokenizer = Tokenizer.train(["a red circle", "two blue squares"], 600, context_length=16)
    preprocess, plan = Preprocess(image_size=64), Plan(manifest.sizes, 16)
    model = msclip.create_model("ms_clip_s_tiny", dropout=0.1)
    engine = create_engine(
        model, optim, mean=preprocess.mean, std=preprocess.std, total_steps=STEPS, micro_batch_size=16, device="cpu"
    )
    newest = checkpoint.newest(run.folder)
    start = checkpoint.read_state(newest)["step"] if newest else 0
    if newest:
        engine.load_full_state(*checkpoint.load_optimizer(newest), step=start)
    units = read_units(manifest, plan.units(start_step=start, stop_step=steps), config.seed)
    recipe = Recipe.of(manifest, preprocess, Augment(flip=0.5), tokenizer, config.seed)

    def save(step: int) -> None:
        checkpoint.save(run.folder, {"step": step}, *engine.full_state(), model.config, tokenizer, preprocess)

    batches = Batches(plan, 0, 1, start, steps, units, recipe)
    every = CheckpointConfig(every_steps=EVERY, every_minutes=None)
    settings: dict[str, Any] = {"config": config, "checkpoints": every, "save": save, "max_bad_fraction": 0.01}
    return train(run, engine, batches, start_step=start, total_steps=steps, **settings)


def curve(folder: Path) -> list[dict[str, Any]]:
    """All records, without what measures time or the storage."""
    timed = re.compile("time|.*_(second|seconds|wait|lacking|retries)")
    return [{k: v for k, v in record.items() if not timed.fullmatch(k)} for record in metrics_log.read(Folder(folder))]


def test_a_resumed_run_equals_the_unbroken_one_to_the_last_bit(tmp_path: Path, manifest: Manifest) -> None:
    run_to(tmp_path / "whole", manifest)
    run_to(tmp_path / "broken", manifest, steps=5)  # checkpoints at 2, 4 and, as its last, 5
    Folder(tmp_path / "broken/checkpoints" / checkpoint.folder_name(5)).delete()  # as if killed after step 5
    run_to(tmp_path / "broken", manifest)
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    assert [r["step"] for r in curve(tmp_path / "whole")] == list(range(1, STEPS + 1))
    ends = [checkpoint.finished(Folder(tmp_path / name))[-1] for name in ("whole", "broken")]
    a, b = (msclip.load(end.url).model.state_dict() for end in ends)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_loss_that_is_not_finite_stops_with_advice_and_keeps_the_checkpoints(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(msclip.TrainingError, match=r"optim\.lr"):
        run_to(tmp_path, manifest, lr=1e30, warmup_steps=0, clip_grad_norm=None, schedule="constant")
    for folder in checkpoint.finished(Folder(tmp_path)):
        assert all(t.isfinite().all() for t in msclip.load(folder.url).model.parameters())


def test_an_error_of_the_data_comes_after_the_step_before_it_and_its_checkpoint(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_ = Batches.__next__

    def faulty(batches: Batches) -> Batch:
        batch = next_(batches)
        if batch.step == 2 * EVERY:
            raise OSError("the storage is gone")
        return batch

    with monkeypatch.context() as patched:
        patched.setattr(Batches, "__next__", faulty)
        with pytest.raises(OSError, match="storage is gone"):
            run_to(tmp_path, manifest)
    assert [record["step"] for record in curve(tmp_path)] == list(range(1, 2 * EVERY + 1))
    newest = checkpoint.newest(Folder(tmp_path))
    assert newest is not None
    assert checkpoint.read_state(newest)["step"] == 2 * EVERY


def test_too_many_bad_rows_stop_the_run_and_are_listed(tmp_path: Path) -> None:
    path = pairs(tmp_path)
    table = pq.read_table(path)
    images = [b"broken" if i % 4 == 0 else image for i, image in enumerate(table["image"].to_pylist())]
    pq.write_table(table.set_column(table.schema.get_field_index("image"), "image", pa.array(images)), path)
    with pytest.raises(msclip.TrainingError, match="max_bad_fraction"):
        run_to(tmp_path / "run", Manifest.load(str(path)))
    rows = pq.read_table(tmp_path / "run" / "quarantine").to_pylist()
    assert {row["reason"] for row in rows} == {"not an image"}
    assert all(row["row"] % 4 == 0 for row in rows)


def test_the_parts_of_a_step_add_up_and_name_the_bottleneck(tmp_path: Path, manifest: Manifest) -> None:
    started = time.perf_counter()
    run_to(tmp_path, manifest)
    records = metrics_log.read(Folder(tmp_path))
    for record in records:
        parts = [record[f"train/{part}_seconds"] for part in timing.PARTS]
        assert all(seconds >= 0 for seconds in parts)
        assert sum(parts) == pytest.approx(16 / record["train/pairs_per_second"], rel=1e-6)
        assert sum(parts[:3]) == pytest.approx(record["train/data_wait"] * sum(parts), rel=1e-6)
        assert timing.bottleneck(record)
    assert sum(r[f"train/{part}_seconds"] for r in records for part in timing.PARTS) < time.perf_counter() - started


def test_the_bottleneck_says_how_many_decoding_processes_are_lacking() -> None:
    record = {"train/decode_seconds": 0.5, "train/storage_seconds": 0.1, "train/compute_seconds": 0.4}
    lacking = timing.more_processes(4, 0.5)
    assert lacking == 4
    text = timing.bottleneck({**record, "train/decode_processes_lacking": lacking})
    assert text == "decode 50%: 4 more decode CPUs would remove it"
    assert timing.bottleneck({"train/storage_seconds": 0.3, "train/compute_seconds": 0.7}) == "storage 30%"
    assert timing.bottleneck({"train/decode_seconds": 0.01, "train/compute_seconds": 0.99}) == "compute 99%"
    assert timing.bottleneck({}) == ""


def test_a_long_wait_is_told_in_the_run_folder(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("msclip.data.loader.PATIENCE_SECONDS", 0.1)
    plan = Plan(manifest.sizes, 16)
    recipe = Recipe.of(manifest, Preprocess(8), None, Tokenizer.train(["a red circle"], 600, 16), 0)

    def slow() -> Iterator[Encoded]:
        time.sleep(0.35)
        yield from read_units(manifest, plan.units(0, 1, 0, 1), 0)

    run = LocalRun(Folder(tmp_path))
    with Progress(run.folder, 1), Batches(plan, 0, 1, 0, 1, slow(), recipe) as batches:
        assert len(list(Reporter(run, 16, 0.1, 0).timed(batches))) == 1
    note = json.loads(run.folder.read_text(WAITING))
    assert note["text"].startswith("worker 0 has waited 0 s for data: no image files have come")
    assert note["text"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"seed": -1}, "seed"),
        ({"epochs": None}, "epochs or"),
        ({"global_batch": 1}, "global_batch"),
        ({"epochs": -1}, "positive"),
    ],
)
def test_a_contradictory_length_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(msclip.UserError, match=words):
        TrainingConfig(**config)


def test_a_checkpoint_in_an_object_store_is_never_ahead_of_its_records(
    s3_url: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, there, save = Folder(s3_url) / "ahead", list[int](), checkpoint.save

    def look_and_save(folder: Folder, state: dict[str, Any], *rest: Any) -> Folder:
        there.append(metrics_log.read(folder)[-1]["step"])
        return save(folder, state, *rest)

    monkeypatch.setattr(checkpoint, "save", look_and_save)
    run_to(run, manifest)
    assert there == [2, 4, 6]


def test_repeated_requests_to_the_storage_are_counted_over_a_whole_run(tmp_path: Path, manifest: Manifest) -> None:
    repeated.take()
    repeated.add(3)
    run_to(tmp_path, manifest, 2)
    repeated.add(4)
    run_to(tmp_path, manifest, 4)
    assert [record["train/storage_retries"] for record in metrics_log.read(Folder(tmp_path))] == [3, 3, 7, 7]
