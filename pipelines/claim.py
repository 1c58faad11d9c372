"""One driver a run: a file in the run's folder says who trains there, as long as it does.

The file is created exclusively, on a disk and in S3, so of two drivers that start together one is refused. Other object
stores can only be asked whether it is there. What a killed driver left behind on this host is recognised and taken over, by
one of those that find it: the slower one would otherwise delete the faster one's own. A process id alone would not tell: in a
container that starts again another process has it, perhaps the one that asks; and containers that share a host's name each
have a process 1. So where the ids may mean other processes (another host, another container, since a reboot), a claim whose
driver has not written it anew for an hour counts as dead.
"""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msclip.errors import UserError
from msclip.storage import Folder

CLAIM = "RUNNING"
DEAD_SECONDS = 3600
_REFRESH_SECONDS = 60


@contextmanager
def claimed(run: Folder) -> Iterator[None]:
    """Holds the run's folder while the body runs.

    Raises:
        UserError: another driver holds it, or the folder cannot be written to.
    """
    own = owner()
    try:
        if (found := _read(run)) is not None:
            if not _abandoned(found):
                raise _taken(run, found)
            _clear(run, found)
        run.write_new(CLAIM, own.encode())
    except FileExistsError:
        if run.local and not run.local.is_dir():
            raise UserError(f"run.storage must be a folder, got {run.url}, of which a part is a file") from None
        raise _taken(run, _read(run)) from None
    except OSError as error:
        raise UserError(f"run.storage cannot be written to: {run.url}: {error.strerror or error}") from None
    said = {own}

    def say_alive() -> None:
        if _read(run) in said:  # else somebody took this driver for dead, and the claim is theirs
            said.add(now := owner())  # before the write, which may arrive and raise nevertheless
            run.write_text(CLAIM, now)
            said.intersection_update({now})

    try:
        with repeated(say_alive):
            yield
    finally:
        if _read(run) in said:
            run.delete(CLAIM)


def owner() -> str:
    """This process in JSON: host, id, start, what the id is one of, and the time now, in seconds since 1970."""
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid()), "pids": pid_space()}
    return json.dumps(own | {"time": time.time()})


@contextmanager
def repeated(say_alive: Callable[[], None]) -> Iterator[None]:
    """Calls this every minute in a thread while the body runs."""
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(_REFRESH_SECONDS):
            with suppress(OSError):  # the storage may be slow to answer; the next word will do
                say_alive()

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def pid_space() -> str:
    """Names where a process id means the same process: this container, since its machine was started.

    A host's name does not: containers and freshly installed machines share theirs.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # sandboxes may hide these
        return socket.gethostname()


def started(pid: int) -> str | None:
    """When a process of this host started: which boot of its machine, and how many ticks after. No two of one id share it.

    None where that is not to be seen: without /proc, as on macOS, or there is no such process.
    """
    try:
        # The second field is the program's name in brackets, and may hold any.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {ticks}"
    except (OSError, IndexError):
        return None


def _read(run: Folder) -> str | None:
    try:
        return run.read_text(CLAIM)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _taken(run: Folder, owner: str | None) -> UserError:
    return UserError(
        f"another process trains in {run.url}: {owner or 'it begins just now'}; wait for it, choose another run.name, or, if "
        f"it is gone, delete {CLAIM} there"
    )


def _clear(run: Folder, dead: str) -> None:
    """Deletes a dead driver's claim, as long as it stands there. Raises `FileExistsError` while another does the same."""
    clearing = f"{CLAIM}-{hashlib.sha256(dead.encode()).hexdigest()[:16]}"
    run.write_new(clearing, b"")
    try:
        if _read(run) == dead:
            run.delete(CLAIM)
    finally:
        run.delete(clearing)


def _abandoned(owner: str) -> bool:
    try:
        told = json.loads(owner)
        here = pid_space()
        # What an older version wrote names no space: the host's name must do.
        if told["host"] != socket.gethostname() or told.get("pids", here) != here:
            return bool(time.time() - told["time"] > DEAD_SECONDS)
        now = started(int(told["pid"]))
        if now and told.get("started"):
            return bool(now != told["started"])
        os.kill(told["pid"], 0)  # signal 0 only asks whether the process is there
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False
