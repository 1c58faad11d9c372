"""Who holds a folder is a process, and a process id comes again: in a container that restarts, and after a reboot."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from msclip.errors import UserError
from msclip.storage import Folder
from pipelines import claim, ingest_folder
from pipelines.claim import CLAIM, claimed, started

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def left_by(pid: int, start: str | None) -> str:
    return json.dumps(
        {"host": socket.gethostname(), "pid": pid, "pids": claim.pid_space()} | ({"started": start} if start else {})
    )


@linux
def test_the_start_of_a_process_stays_and_is_its_own() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        first, own = started(sleeper.pid), started(os.getpid())
        time.sleep(0.05)
        assert first is not None
        assert first == started(sleeper.pid) != own == started(os.getpid())
    finally:
        sleeper.kill()
        sleeper.communicate()
    assert started(sleeper.pid) is None


@linux
@pytest.mark.parametrize("earlier", ["the same boot", "another boot"])
def test_a_restarted_container_takes_over_what_its_own_process_id_left(tmp_path: Path, earlier: str) -> None:
    run, now = Folder(tmp_path), started(os.getpid())
    assert now is not None
    boot, ticks = now.split()
    run.write_text(CLAIM, left_by(os.getpid(), f"{boot} {int(ticks) - 1}" if earlier == "the same boot" else f"other {ticks}"))
    with claimed(run):
        assert json.loads(run.read_text(CLAIM))["started"] == now
    assert not run.exists(CLAIM)


def test_where_process_ids_may_mean_others_an_hour_of_silence_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers with one name, each with a process of this id; one machine before and after it started anew; two machines."""
    run = Folder(tmp_path)
    there = {"host": socket.gethostname(), "pid": os.getpid(), "started": "boot 1", "pids": "boot pid:[1]"}
    for told in (there, there | {"pids": "other pid:[2]"}, there | {"host": "elsewhere", "pids": "boot pid:[2]"}):
        monkeypatch.setattr(claim, "pid_space", lambda: "boot pid:[2]")
        run.write_text(CLAIM, json.dumps(told | {"time": time.time() - 3500}))
        with pytest.raises(UserError, match=r"another process trains .*boot 1"), claimed(run):
            pass
        run.write_text(CLAIM, json.dumps(told))  # without a time nobody knows
        with pytest.raises(UserError, match=r"another process trains .*boot 1"), claimed(run):
            pass
        run.write_text(CLAIM, json.dumps(told | {"time": time.time() - 3700}))
        with claimed(run):
            own = json.loads(run.read_text(CLAIM))
            assert (own["pids"], own["started"]) == ("boot pid:[2]", started(os.getpid()))
            assert abs(own["time"] - time.time()) < 60
            monkeypatch.setattr(claim, "pid_space", lambda: "boot pid:[3]")
            with pytest.raises(UserError, match="another process trains"), claimed(run):  # seen from the next container
                pass
        assert not run.exists(CLAIM)


def test_a_driver_says_that_it_lives_as_long_as_the_claim_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Folder(tmp_path)
    monkeypatch.setattr(claim, "_REFRESH_SECONDS", 0.01)
    write, failed = Folder.write_text, list[str]()

    def write_and_fail_once(self: Folder, name: str, text: str) -> None:
        write(self, name, text)
        if not failed:
            failed.append(text)
            raise OSError("the answer was lost")

    def wait_for_another(than: str) -> str:
        end = time.monotonic() + 30
        while (now := run.read_text(CLAIM)) == than:
            assert time.monotonic() < end
            time.sleep(0.01)
        return now

    monkeypatch.setattr(Folder, "write_text", write_and_fail_once)
    with claimed(run):
        first = run.read_text(CLAIM)
        last = wait_for_another(wait_for_another(wait_for_another(first)))
        assert failed
        assert json.loads(first)["time"] < json.loads(last)["time"]
        assert json.loads(first) | {"time": 0} == json.loads(last) | {"time": 0}
    assert not run.exists(CLAIM)


def test_a_driver_that_was_taken_for_dead_leaves_the_other_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Folder(tmp_path)
    words: list[Callable[[], None]] = []

    def by_hand(say_alive: Callable[[], None]) -> AbstractContextManager[None]:
        words.append(say_alive)
        return nullcontext()

    monkeypatch.setattr(claim, "repeated", by_hand)
    with claimed(run):
        run.write_text(CLAIM, "another's")
        words[0]()
        assert run.read_text(CLAIM) == "another's"
    assert run.read_text(CLAIM) == "another's"


@linux
def test_a_process_that_lives_keeps_its_claim_whoever_asks(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    for pid in (os.getpid(), os.getppid()):
        run.write_text(CLAIM, left_by(pid, started(pid)))
        with pytest.raises(UserError, match=f'another process trains .*"pid": {pid}'), claimed(run):
            pass


def test_without_a_start_the_process_id_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Folder(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    run.write_text(CLAIM, left_by(os.getppid(), None))  # of a version that did not write it
    with pytest.raises(UserError, match="another process trains"), claimed(run):
        pass
    monkeypatch.setattr(claim, "started", lambda pid: None)  # no /proc here
    run.write_text(CLAIM, left_by(os.getppid(), "boot 1"))
    with pytest.raises(UserError, match="another process trains"), claimed(run):
        pass
    run.write_text(CLAIM, left_by(gone.pid, "boot 1"))
    with claimed(run):
        assert json.loads(run.read_text(CLAIM))["pid"] == os.getpid()


@linux
def test_what_an_ingest_left_whose_process_id_came_again_is_cleared_at_once(tmp_path: Path) -> None:
    output, dead = Folder(tmp_path), "20260101-000000-aaaaaa"
    told = {"pid": os.getpid(), "started": "boot 1", "pids": claim.pid_space(), "time": time.time()}
    output.write_text(f"INGESTING-{dead}", json.dumps(told))
    output.write_text(f"shards/{dead}/00000.parquet", "half")
    with ingest_folder.ingesting(output) as own:
        assert output.names() == [f"INGESTING-{own}"]
        with ingest_folder.ingesting(output) as other:  # of this very process, which lives
            assert output.names() == sorted([f"INGESTING-{own}", f"INGESTING-{other}"])
