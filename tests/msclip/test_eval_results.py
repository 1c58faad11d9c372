import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from msclip import checkpoint
from msclip.checkpoint import finished
from msclip.errors import UserError
from msclip.eval import Task, checkpoint_digest, evaluate_checkpoint, is_current, task_digest
from msclip.eval.results import _definition, metric_names, read_result, write_result
from msclip.storage import Folder
from tests.drawn import captioned, labelled, tiny_parts, tiny_run


def zeroshot(path: Path) -> Task:
    return Task(name="squares", kind="zeroshot", data=str(labelled(path)))


def test_a_result_has_the_fields_of_clip_benchmark_and_says_what_it_is_of(tmp_path: Path) -> None:
    step = finished(tiny_run(tmp_path / "my_run", [40]))[0]
    task = zeroshot(tmp_path / "squares.parquet")
    result = evaluate_checkpoint(step, task, batch_size=8)
    assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= result.keys()
    assert (result["dataset"], result["task"]) == ("squares", "zeroshot_classification")
    assert result["pretrained"] == "my_run/step_00000040"
    assert (result["step"], result["rows"], result["skipped_rows"], result["device"]) == (40, 20, 0, "cpu")
    assert result["metrics"].keys() == set(metric_names(task))
    assert is_current(result, checkpoint_digest(step), task_digest(task))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_an_exported_file_alone_gives_the_same_numbers(tmp_path: Path) -> None:
    step = finished(tiny_run(tmp_path / "run", [1]))[0]
    task = Task(name="val", kind="retrieval", data=str(captioned(tmp_path / "val.parquet", [["a"], ["b", "c"], ["d"]])))
    shutil.copy(tmp_path / "run/checkpoints/step_00000001/model.safetensors", tmp_path / "mine.safetensors")
    alone = evaluate_checkpoint(tmp_path / "mine.safetensors", task)
    assert alone["metrics"] == evaluate_checkpoint(step, task)["metrics"]
    assert alone["metrics"].keys() == set(metric_names(task))
    assert alone["step"] is None


def test_a_checkpoint_is_known_again_after_a_move_and_changed_weights_are_not(tmp_path: Path) -> None:
    step = finished(tiny_run(tmp_path / "run", [1]))[0]
    digest = checkpoint_digest(step)
    moved = Path(shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")) / "checkpoints/step_00000001"
    assert checkpoint_digest(str(moved)) == checkpoint_digest(str(moved / "model.safetensors")) == digest
    model, tokenizer, preprocess = tiny_parts()
    weights = load_file(moved / "model.safetensors")
    longer = {name: tensor * 1.01 for name, tensor in weights.items()}
    checkpoint.export(moved / "model.safetensors", longer, model.config, tokenizer, preprocess, {"step": 1})
    assert checkpoint_digest(str(moved)) != digest


def test_a_task_digest_follows_settings_and_data_but_not_their_path(tmp_path: Path) -> None:
    task = zeroshot(tmp_path / "a.parquet")
    digest = task_digest(task)
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a.parquet", tmp_path / "b/moved.parquet")
    assert task_digest(replace(task, name="other", data=str(tmp_path / "b"))) == digest
    assert task_digest(replace(task, templates=("{}",))) != digest
    assert task_digest(replace(task, limit=3)) != digest
    assert task_digest(replace(task, data=str(labelled(tmp_path / "more.parquet", rows=21)))) != digest


def test_stored_results_come_back_and_damaged_ones_count_as_missing(tmp_path: Path) -> None:
    folder, task = Folder(tmp_path / "evaluation"), zeroshot(tmp_path / "a.parquet")
    assert read_result(folder, task) is None
    write_result(folder, task, {"digest": {"checkpoint": "c", "task": "t"}})
    stored = read_result(folder, task)
    assert is_current(stored, "c", "t")
    assert not is_current(stored, "c", "u")
    folder.write_text("squares.json", '{"digest": {"che')
    assert read_result(folder, task) is None
    assert not is_current(None, "c", "t")


def test_a_result_keeps_no_credentials_of_a_data_url() -> None:
    url = "s3://key:secret@bucket/val.parquet?endpoint_override=host"
    assert _definition(Task(name="val", kind="retrieval", data=url))["data"] == "s3://bucket/val.parquet"


def test_a_folder_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a folder with model"):
        evaluate_checkpoint(tmp_path, zeroshot(tmp_path / "a.parquet"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_agrees_with_the_cpu_within_bfloat16(tmp_path: Path) -> None:
    step = finished(tiny_run(tmp_path / "run", [1]))[0]
    task = zeroshot(tmp_path / "a.parquet")
    cpu, gpu = (evaluate_checkpoint(step, task, device=device) for device in ("cpu", "cuda"))
    assert gpu["device"] == torch.cuda.get_device_name()
    # Of 20 squares at most two sit so close to a boundary that eight bits of mantissa move them.
    assert gpu["metrics"]["acc1"] == pytest.approx(cpu["metrics"]["acc1"], abs=0.1)
