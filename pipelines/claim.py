"""One driver a run: a file in the run's folder says who trains there, as long as it does.

The file is created exclusively, on a disk and in S3, so of two drivers that start together one is refused. Other object
stores can only be asked whether it is there. What a killed driver left behind on this host is recognised and taken over.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from msclip.errors import UserError
from msclip.storage import Folder

CLAIM = "RUNNING"


@contextmanager
def claimed(run: Folder) -> Iterator[None]:
    """Holds the run's folder while the body runs.

    Raises:
        UserError: another driver holds it, or the folder cannot be written to.
    """
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    try:
        if run.exists(CLAIM):
            if not _abandoned(run):
                raise _taken(run)
            run.delete(CLAIM)
        run.write_new(CLAIM, owner.encode())
    except FileExistsError:
        if run.local and not run.local.is_dir():
            raise UserError(f"run.storage must be a folder, got {run.url}, of which a part is a file") from None
        raise _taken(run) from None
    except OSError as error:
        raise UserError(f"run.storage cannot be written to: {run.url}: {error.strerror or error}") from None
    try:
        yield
    finally:
        run.delete(CLAIM)


def _taken(run: Folder) -> UserError:
    return UserError(
        f"another process trains in {run.url}: {run.read_text(CLAIM)}; wait for it, choose another run.name, or, if it is "
        f"gone, delete {CLAIM} there"
    )


def _abandoned(run: Folder) -> bool:
    try:
        owner = json.loads(run.read_text(CLAIM))
        if owner["host"] != socket.gethostname():
            return False
        os.kill(owner["pid"], 0)  # signal 0 only asks whether the process is there
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False
