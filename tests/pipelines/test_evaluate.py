import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from msclip.errors import UserError
from msclip.eval import Task
from msclip.storage import Folder
from pipelines import evaluate
from pipelines.trials import Pair, attempt, is_transient, run_trials, trial_resources
from tests.drawn import captioned, labelled, png, tiny_run, write_labelled


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


def results(run: Folder) -> dict[str, dict]:
    root = run / "evaluation"
    return {
        f"{step}/{name}": json.loads((root / step).read_text(name)) for step in root.names() for name in (root / step).names()
    }


def test_what_is_new_is_measured_and_what_is_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tiny_run(tmp_path / "run", [1])
    squares, val = labelled(tmp_path / "squares.parquet"), captioned(tmp_path / "val.parquet", [["a"], ["b", "c"], ["d"]])
    command = ["--run", run.url, "--tasks", f"zeroshot:{squares}", f"retrieval:{val}", "--batch_size", "8"]
    assert evaluate.main(command) == 0
    output = capsys.readouterr().out
    assert "[2/2]" in output
    assert "squares: zeroshot, 20 rows, 5 classes; percent" in output
    assert "val: retrieval, 3 rows, 4 captions; percent" in output
    first = results(run)
    assert first.keys() == {"step_00000001/squares.json", "step_00000001/val.json"}

    tiny_run(tmp_path / "run", [2])
    assert evaluate.main([*command[:3], *command[4:]]) == 0  # retrieval alone
    output = capsys.readouterr().out
    assert "1 of 2 results are there already" in output
    assert "[1/1] step_00000002 val" in output
    second = results(run)
    assert second.keys() - first.keys() == {"step_00000002/val.json"}
    assert {name: second[name] for name in first} == first
    assert second["step_00000002/val.json"]["step"] == 2


def test_a_task_that_cannot_be_measured_leaves_the_others_alone(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run = tiny_run(tmp_path / "run", [1])
    squares = labelled(tmp_path / "squares.parquet")
    torn = write_labelled(tmp_path / "torn.parquet", [png("red", 0), png("blue", 0)], [0, 0], ["red", "blue"])
    assert evaluate.main(["--run", run.url, "--tasks", f"zeroshot:{torn}", f"zeroshot:{squares}"]) == 1
    output, errors = capfd.readouterr()
    assert "failed: step_00000001 torn: task 'torn': label 0 is called 'red', and in row 1 'blue'" in output
    assert "Traceback" not in output + errors
    assert results(run).keys() == {"step_00000001/squares.json"}


def test_only_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    def measure(pair: Pair) -> None:
        attempts = tmp_path / pair.task.name
        with attempts.open("a") as file:
            file.write("x")
        if pair.task.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if pair.task.name == "wrong":
            raise ValueError("always\nthe same")
        if pair.task.name == "stutters" and len(attempts.read_text()) == 1:
            raise OSError("connection reset")

    names = ["killed", "wrong", "stutters", "fine"]
    tasks = [Task(name=name, kind="zeroshot", data="/d/a.parquet") for name in names]
    pairs = [Pair("/run/checkpoints/step_1", task, str(tmp_path / "evaluation")) for task in tasks]
    ended: list[tuple[str, bool]] = []
    errors = run_trials(pairs, measure, lambda pair, fine: ended.append((pair.task.name, fine)), resources={"cpu": 1, "gpu": 0})
    assert {name: len((tmp_path / name).read_text()) for name in names} == {"killed": 2, "wrong": 1, "stutters": 2, "fine": 1}
    assert {pair.task.name for pair in errors} == {"killed", "wrong"}
    assert "ValueError: always; the traceback is in" in errors[pairs[1]]
    assert "ValueError: always" in (tmp_path / "evaluation/wrong.error.txt").read_text()
    assert all("\n" not in error for error in errors.values())
    assert sorted(ended) == [("fine", True), ("killed", False), ("stutters", True), ("wrong", False)]


def test_a_traceback_goes_once_its_cause_has_gone(tmp_path: Path) -> None:
    pair = Pair("/c", Task(name="val", kind="retrieval", data="/d"), str(tmp_path))

    def fail(pair: Pair) -> None:
        raise KeyError("weights")

    assert "KeyError" in attempt(pair, fail)["error"]
    assert (tmp_path / "val.error.txt").exists()
    assert attempt(pair, lambda pair: None) == {"error": ""}
    assert not (tmp_path / "val.error.txt").exists()


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError("slow down"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (OSError(28, "No space left on device"), False),
        (ValueError(), False),
    ],
)
def test_storage_that_stutters_is_transient(error: Exception, again: bool) -> None:
    assert is_transient(error) is again


@pytest.mark.parametrize(
    ("choice", "steps"),
    [("all", [1, 2, 3, 4, 5]), ("last", [5]), ("every:2", [1, 3, 5]), ("every:3", [2, 5]), ("4, 2,2", [2, 4])],
)
def test_checkpoints_are_chosen_in_the_order_of_their_steps(tmp_path: Path, choice: str, steps: list[int]) -> None:
    found = [Folder(tmp_path / f"step_{step:08d}") for step in range(1, 6)]
    assert evaluate.select(found, choice) == [found[step - 1] for step in steps]


@pytest.mark.parametrize(
    ("weights", "measured"),
    [
        ("auto", ["1", "2-ema"]),
        ("model", ["1", "2"]),
    ],
)
def test_the_average_is_measured_where_there_is_one(tmp_path: Path, weights: Any, measured: list[str]) -> None:
    tiny_run(tmp_path, [1])
    run = tiny_run(tmp_path, [2], averaged=True)
    found = evaluate.places(evaluate.Evaluation(run=run.url, tasks=[], weights=weights))
    assert [output.name for _, output in found] == [f"step_0000000{name}" for name in measured]
    for checkpoint, output in found:
        assert checkpoint.endswith("/ema.safetensors") == output.name.endswith("-ema")


def test_results_of_both_kinds_of_weights_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, data = tiny_run(tmp_path / "run", [1], averaged=True), labelled(tmp_path / "squares.parquet")
    command = ["--run", run.url, "--tasks", f"zeroshot:{data}"]
    assert evaluate.main(command) == 0
    assert results(run).keys() == {"step_00000001-ema/squares.json"}
    assert evaluate.main([*command, "--weights", "both"]) == 0
    output = capsys.readouterr().out
    assert "1 of 2 results are there already" in output
    assert all(f"│ {name} " in output for name in ("step_00000001", "step_00000001-ema"))
    measured = results(run)
    model, average = measured["step_00000001/squares.json"], measured["step_00000001-ema/squares.json"]
    assert model["digest"]["checkpoint"] != average["digest"]["checkpoint"]
    assert (model["pretrained"], average["pretrained"]) == ("run/step_00000001", "run/step_00000001-ema")
    assert model["step"] == average["step"] == 1


@pytest.mark.parametrize("choice", ["first", "every:0", "every:x", "", "3,x"])
def test_a_choice_of_checkpoints_that_is_none_says_what_would_do(tmp_path: Path, choice: str) -> None:
    with pytest.raises(UserError, match="all, last, every:N or steps"):
        evaluate.select([Folder(tmp_path / "step_1")], choice)


def test_an_exported_file_is_a_run_of_one_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tiny_run(tmp_path / "run", [1])
    (tmp_path / "best.safetensors").symlink_to(Path(run.path) / "checkpoints/step_00000001/model.safetensors")
    job = evaluate.Evaluation(run=str(tmp_path / "best.safetensors"), tasks=[])
    assert [(c, o.path) for c, o in evaluate.places(job)] == [
        (str(tmp_path / "best.safetensors"), str(tmp_path / "evaluation/best"))
    ]


def test_mistakes_end_with_status_2_and_one_paragraph_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tiny_run(tmp_path / "run", [1, 2])
    (tmp_path / "empty").mkdir()
    good = f"zeroshot:{labelled(tmp_path / 'squares.parquet')}"
    for arguments, complaint in [
        (["--run", "/nowhere/run", "--tasks", good], "nothing is at '/nowhere/run'"),
        (["--run", str(tmp_path / "empty"), "--tasks", good], "has no finished checkpoint"),
        (["--run", "/nowhere/m.safetensors", "--tasks", good], "there is none at /nowhere/m.safetensors"),
        (["--run", run.url, "--tasks", "zeroshot:/nowhere/a.parquet"], "'/nowhere/a.parquet' do not exist"),
        (["--run", run.url, "--tasks", good, "--checkpoints", "7"], "asks for step 7, and the finished checkpoints are 1, 2"),
        (["--run", run.url, "--tasks", good.replace("zeroshot", "retrieval")], "caption_column of task 'squares' must be"),
        (
            ["--run", run.url, "--tasks", good, "--weights", "ema"],
            "no ema.safetensors: it was trained with optim.ema_decay",
        ),
        (["--run", f"{run.url}/m.safetensors", "--tasks", good, "--weights", "ema"], "got ema and the one file"),
        (["--run", run.url, "--tasks", good, "--weights", "last"], "weights"),
        (["--run", run.url, "--tasks", "cifar10"], "--tasks must be zeroshot:DATA"),
        (["--run", run.url, "--tasks"], "names no task"),
        (["--run", run.url, "--tasks", good, "--num_gpus", "-1"], "num_gpus must be 0 or more, got -1"),
        (["--run", run.url, "--tasks", good, "--num_cpus", "999"], "num_cpus 999 and num_gpus 0 are more than any node has"),
    ]:
        assert evaluate.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
    assert not run.exists("evaluation")


def test_a_node_that_may_still_come_is_waited_for() -> None:
    assert trial_resources(999, 8, autoscaling=True) == {"cpu": 999, "gpu": 8}


@pytest.mark.parametrize("tasks", [["--tasks", "a", "b"], ["--tasks=a", "b"], ['--tasks=["a", "b"]']])
def test_tasks_may_be_written_one_after_the_other(tasks: list[str]) -> None:
    assert evaluate.gather(["--run", "r", *tasks, "--limit", "3"]) == ["--run", "r", '--tasks=["a", "b"]', "--limit", "3"]


def test_an_unknown_option_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--run", "r", "--tasks", "zeroshot:a", "--batchsize", "3"]) == 2
    assert "did you mean batch_size" in capsys.readouterr().err
