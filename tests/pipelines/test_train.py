"""The training job on two Ray Train workers: faults, resuming on other workers, and mistakes of a user."""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from msclip import checkpoint, metrics_log
from msclip.errors import TrainingError, UserError
from msclip.storage import Folder
from msclip.training import WAITING
from pipelines import claim, cli, failures, train
from pipelines.claim import CLAIM, claimed
from tests.drawn import TEXTS, captioned
from tests.pipelines.without_ray import without_ray

STEPS, EVERY = 60, 20
CONFIG: dict[str, Any] = {
    # No BatchNorm, so that one worker computes what two do.
    "model": {
        "image_size": 32,
        "patch_size": 16,
        "stem": False,
        "branch_layers": [],
        "sharing": {"layers": "all"},
        "embed_dim": 16,
        "vocab_size": 600,
        "context_length": 16,
        **dict.fromkeys(("width", "text_width"), 32),
        **dict.fromkeys(("layers", "text_layers", "num_heads", "text_heads"), 2),
    },
    "data": {"augment": {"flip": 0.5}},
    "optim": {"lr": 1e-3, "warmup_steps": 5, "clip_grad_norm": 1.0},
    "training": {"global_batch": 16, "epochs": None, "steps": STEPS, "precision": "fp32", "log_every_steps": 1},
    "checkpoint": {"every_steps": EVERY, "every_minutes": None, "keep_optimizer": 9},
    "cluster": {"num_workers": 2, "use_gpu": False, "max_failures": 2},
}


FROZEN = ("--model.freeze_image", "all", "--model.freeze_text", "all", "--model.logit_scale_learned", "false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pairs, and the config beside them."""
    folder = tmp_path_factory.mktemp("train")
    captioned(folder / "pairs.parquet", [[TEXTS[i % 10], TEXTS[(i + 3) % 10]] for i in range(96)])
    data = {**CONFIG["data"], "train": str(folder / "pairs.parquet")}
    (folder / "job.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data, "run": {"storage": str(folder / "runs")}}))
    return folder


def start(folder: Path, *arguments: str) -> int:
    """The job as the command line runs it; returns the exit status."""
    return cli.guard(lambda: train.main(["--config", str(folder / "job.yaml"), *arguments]))


@pytest.fixture(scope="module")
def unbroken(folder: Path, ray_session: None) -> Folder:
    """A run that nothing disturbed."""
    assert start(folder, "--run.name", "unbroken") == 0
    return Folder(folder / "runs" / "unbroken")


def copied(unbroken: Folder, name: str, until: int) -> Folder:
    """The run as it was when its checkpoint of step `until` had just been written."""
    assert unbroken.local is not None
    target = unbroken.local.parent / name
    shutil.copytree(unbroken.local, target)
    for later in checkpoint.finished(Folder(target)):
        if checkpoint.read_state(later)["step"] > until:
            later.delete()
    return Folder(target)


def curve(run: Folder) -> list[dict[str, Any]]:
    """All records, without what measures time."""
    timed = re.compile("time|.*_(second|seconds|wait|lacking)")
    return [{k: v for k, v in record.items() if not timed.fullmatch(k)} for record in metrics_log.read(run)]


def kill_a_worker_after(run: Folder, step: int, killed: list[int]) -> None:
    """SIGKILL to one training process of this test's own Ray, as soon as `step` is in the log."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        records = metrics_log.read(run)
        if records and records[-1]["step"] > step:
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(records[-1]["step"])
                    return
        time.sleep(0.05)


def test_after_a_worker_is_killed_every_later_batch_and_loss_is_the_unbroken_runs(
    folder: Path, unbroken: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    run, killed = Folder(folder / "runs" / "killed"), list[int]()
    killer = threading.Thread(target=kill_a_worker_after, args=(run, EVERY + 3, killed))
    killer.start()
    assert start(folder, "--run.name", "killed") == 0
    killer.join()
    assert killed
    assert EVERY < killed[0] < STEPS
    assert [record["step"] for record in curve(run)] == list(range(1, STEPS + 1))
    assert curve(run) == curve(unbroken)
    assert len(checkpoint.finished(run)) == STEPS // EVERY
    assert re.search(r"^worker \d failed with \w+: ", capfd.readouterr().out, re.MULTILINE)


def test_an_error_that_would_come_again_is_told_at_once_and_not_tried_again(
    folder: Path, ray_session: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_worker = train.train_worker
    monkeypatch.setattr(train, "train_worker", lambda config: train_worker({"prepared": ()}))
    assert start(folder, "--run.name", "senseless", "--cluster.num_workers", "1") == 1
    error = capfd.readouterr().err
    assert "training failed with AttributeError: 'tuple' object has no attribute 'job' (before the first step, so it" in error
    assert "Traceback" not in error
    assert str(folder / "runs" / "senseless") in error


def test_only_what_would_come_again_stops_retries(tmp_path: Path) -> None:
    watch = failures.Watch(Folder(tmp_path))
    watch.after_exception(None, {1: RuntimeError("connection reset\nat frame 3"), 2: OSError("no route")})
    assert json.loads((tmp_path / WAITING).read_text())["text"] == "worker 1 failed with RuntimeError: connection reset"
    with pytest.raises(failures.Repeated, match="ValueError: empty") as raised, failures.marked():
        raise ValueError("empty")
    with pytest.raises(TrainingError, match=r"ValueError: empty .*not tried again"):
        watch.after_exception(None, {0: RuntimeError("aborted"), 1: raised.value})
    with pytest.raises(RuntimeError), failures.marked():
        raise RuntimeError("connection reset")


def test_data_that_one_worker_cannot_use_stop_both_in_one_paragraph(
    folder: Path, ray_session: None, capfd: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(folder / "pairs.parquet")
    images = [b"broken" if 40 <= i < 80 else image for i, image in enumerate(table["image"].to_pylist())]
    broken = table.set_column(table.schema.get_field_index("image"), "image", pa.array(images))
    pq.write_table(broken, folder / "broken.parquet", row_group_size=5)
    # One lane, so that the rows of a row group come one after another; the eighth is followed by seven that are as bad.
    arguments = ["--data.train", str(folder / "broken.parquet"), "--data.lanes", "1", "--data.window", "1"]
    began = time.monotonic()
    assert start(folder, "--run.name", "broken", *arguments) == 2
    assert time.monotonic() - began < 90
    error = capfd.readouterr().err
    assert "no row of row group 8 " in error
    assert "Traceback" not in error


def test_a_run_of_two_workers_under_zero_goes_on_with_one_that_needs_none(unbroken: Folder) -> None:
    run = copied(unbroken, "fewer", until=EVERY)
    with without_ray():
        assert cli.guard(lambda: train.main(["--resume", run.url, "--training.zero_stage", "2"])) == 0
    ours, theirs = curve(run), curve(unbroken)
    assert [record["batch"] for record in ours] == [record["batch"] for record in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)
        assert a["train/lr"] == b["train/lr"]


def test_a_checkpoint_of_another_architecture_ends_in_one_paragraph(
    unbroken: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copied(unbroken, "wider", until=EVERY)
    before = sorted(path for path in Path(run.url).rglob("*.safetensors"))
    with without_ray():
        assert cli.guard(lambda: train.main(["--resume", run.url, "--model.embed_dim", "24"])) == 2
    error = capfd.readouterr().err
    assert "projection" in error
    assert "Traceback" not in error
    assert sorted(path for path in Path(run.url).rglob("*.safetensors")) == before


def test_a_loss_that_is_not_finite_ends_in_one_paragraph(
    folder: Path, ray_session: None, capfd: pytest.CaptureFixture[str]
) -> None:
    wild = ["--optim.lr", "1e30", "--optim.warmup_steps", "0", "--optim.clip_grad_norm", "null", "--cluster.num_workers", "1"]
    assert start(folder, "--run.name", "wild", *wild) == 1
    error = capfd.readouterr().err
    assert "optim.lr" in error
    assert "Traceback" not in error
    assert not checkpoint.finished(Folder(folder / "runs" / "wild"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data.train", "/no/such/place"), "/no/such/place"),
        (("--data.caption_column", "text"), "captions"),
        (("--data.image_column", "picture"), "picture"),
        (("--cluster.num_workers", "3"), "num_workers"),
        (("--cluster.num_workers", "16"), "CPU"),
        (("--training.global_batch", "128"), "global_batch"),
        (("--model.vocab_size", "500"), "vocab_size"),
        (("--tokenizer.source", "/no/tokenizer.json"), "tokenizer"),
        (("--model.patch_size", "15"), "patch_size"),
        (FROZEN, "nothing is left to learn"),
        ((*FROZEN, "--model.loss", "sigmoid"), "nothing is left to learn"),
        (("--resume", "/no/such/run"), "--resume"),
    ],
)
def test_a_users_mistake_is_one_paragraph_and_status_2(
    folder: Path, ray_session: None, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    status = start(folder, "--run.name", "mistaken", *arguments)
    error = capfd.readouterr().err
    assert status == 2
    assert words in error
    assert "Traceback" not in error
    assert not (folder / "runs" / "mistaken" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model.widht", "32"), "did you mean model.width"),
        (("--training.steps", "many"), "training.steps"),
        (("--model.image_size", "big"), "Got value: big; --help lists"),
        (("--training.precision", "fp8"), "training.precision"),
        (("--config", "nope"), "nope"),
        (("--model.patch_size", "0"), "model.patch_size"),
        (("--optim.betas", "[1.5,0.9]"), "optim.betas"),
        (("--training.seed", "-1"), "training.seed"),
        (("--run.name", "../escaped"), "run.name"),
        (("--optim.warmup_steps", "60"), "optim.warmup_steps"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_and_status_2(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert start(folder, *arguments) == 2
    error = capfd.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_an_empty_folder_is_refused(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(folder, "--data.train", str(tmp_path)) == 2
    assert str(tmp_path) in capfd.readouterr().err


def test_a_run_is_never_overwritten(folder: Path, unbroken: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    before = curve(unbroken)
    assert start(folder, "--run.name", "unbroken") == 2
    assert "--resume" in capfd.readouterr().err
    assert curve(unbroken) == before


def test_a_damaged_checkpoint_stops_all_workers_and_is_named(unbroken: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    run = copied(unbroken, "damaged", until=EVERY)
    newest = checkpoint.newest(run)
    assert newest is not None
    assert newest.local is not None
    file = newest.local / checkpoint.OPTIMIZER
    file.write_bytes(file.read_bytes()[:1000])
    assert cli.guard(lambda: train.main(["--resume", run.url])) == 2
    error = capfd.readouterr().err
    assert newest.name in error
    assert "Traceback" not in error


def test_a_finished_run_has_nothing_to_do(unbroken: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.guard(lambda: train.main(["--resume", unbroken.url])) == 0
    assert "nothing to do" in capfd.readouterr().out


def test_of_two_drivers_in_one_folder_one_is_refused(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    with claimed(run), pytest.raises(UserError, match="another process"), claimed(run):
        pass
    assert not run.exists(CLAIM)


def test_what_a_killed_driver_left_is_taken_over(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    run.write_text(CLAIM, json.dumps({"host": socket.gethostname(), "pid": gone.pid}))
    with claimed(run):
        assert json.loads(run.read_text(CLAIM))["pid"] == os.getpid()
    run.write_text(CLAIM, json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(UserError, match="elsewhere"), claimed(run):
        pass


def test_of_two_drivers_that_find_a_killed_one_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Folder(tmp_path)
    dead = json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1})
    run.write_text(CLAIM, dead)
    abandoned = claim._abandoned
    with ExitStack() as faster:

        def slow(owner: str) -> bool:
            found = abandoned(owner)
            monkeypatch.undo()
            faster.enter_context(claimed(run))
            return found

        monkeypatch.setattr(claim, "_abandoned", slow)
        with pytest.raises(UserError, match=f'another process trains .*"pid": {os.getpid()}'), claimed(run):
            pass
        assert json.loads(run.read_text(CLAIM))["pid"] == os.getpid()
    assert run.names() == []
    with monkeypatch.context() as patch:  # one that is only about to go on
        run.write_text(CLAIM, dead)
        patch.setattr(Folder, "delete", lambda *_: None)
        claim._clear(run, dead)
    with pytest.raises(UserError, match="another process"), claimed(run):
        pass
    assert run.read_text(CLAIM) == dead


@pytest.mark.parametrize("content", ["model: {", "- 1\n", "model:\n  widht: 3\n"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, content: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    assert cli.guard(lambda: train.main(["--config", str(path)])) == 2
    error = capfd.readouterr().err
    assert "mine.yaml" in error or "widht" in error
    assert len(error.strip().splitlines()) == 1
