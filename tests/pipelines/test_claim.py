"""Who holds a folder is a process, and a process id comes again: in a container that restarts, and after a reboot."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msclip.errors import UserError
from msclip.storage import Folder
from pipelines import claim, ingest_folder
from pipelines.claim import CLAIM, claimed, started

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def left_by(pid: int, start: str | None) -> str:
    return json.dumps({"host": socket.gethostname(), "pid": pid} | ({"started": start} if start else {}))


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
    told = {"pid": os.getpid(), "started": "boot 1", "pids": ingest_folder._pid_space(), "time": time.time()}
    output.write_text(f"INGESTING-{dead}", json.dumps(told))
    output.write_text(f"shards/{dead}/00000.parquet", "half")
    with ingest_folder.ingesting(output) as own:
        assert output.names() == [f"INGESTING-{own}"]
        with ingest_folder.ingesting(output) as other:  # of this very process, which lives
            assert output.names() == sorted([f"INGESTING-{own}", f"INGESTING-{other}"])
