"""One driver a run: a file in the run's folder says who trains there, as long as it does.

The file is created exclusively, on a disk and in S3, so of two drivers that start together one is refused. Other object
stores can only be asked whether it is there. What a killed driver left behind on this host is recognised and taken over, by
one of those that find it: the slower one would otherwise delete the faster one's own. A process id alone would not tell: in a
container that starts again, and after a reboot, another process has it, perhaps the one that asks.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msclip.errors import UserError
from msclip.storage import Folder

CLAIM = "RUNNING"


@contextmanager
def claimed(run: Folder) -> Iterator[None]:
    """Holds the run's folder while the body runs.

    Raises:
        UserError: another driver holds it, or the folder cannot be written to.
    """
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid())})
    try:
        if (found := _read(run)) is not None:
            if not _abandoned(found):
                raise _taken(run, found)
            _clear(run, found)
        run.write_new(CLAIM, owner.encode())
    except FileExistsError:
        if run.local and not run.local.is_dir():
            raise UserError(f"run.storage must be a folder, got {run.url}, of which a part is a file") from None
        raise _taken(run, _read(run)) from None
    except OSError as error:
        raise UserError(f"run.storage cannot be written to: {run.url}: {error.strerror or error}") from None
    try:
        yield
    finally:
        run.delete(CLAIM)


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
        if told["host"] != socket.gethostname():
            return False
        now = started(int(told["pid"]))
        if now and told.get("started"):
            return bool(now != told["started"])
        os.kill(told["pid"], 0)  # signal 0 only asks whether the process is there
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False
