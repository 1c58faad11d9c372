"""What becomes of an error in a training process: a mistake ends the job at once, anything else is told and tried again.

Ray Train retries whatever a worker raises. That is right for a lost node and wrong for an error which the same settings bring
about again: a worker marks such a one, met before its first step, and Ray's controller passes it on instead of retrying.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from ray.train import UserCallback

from msclip.errors import TrainingError, UserError
from msclip.storage import Folder
from msclip.training import WAITING

REPEATED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""What comes again with the same settings. Storage, GPUs and lost workers show as OSError, RayError or RuntimeError."""


class Repeated(Exception):
    """An error that another try would meet again; its message has the kind and the message of that error."""


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Turns an error inside that another try would meet again into a `Repeated`."""
    try:
        yield
    except REPEATED as error:
        raise Repeated(described(error)) from error


def described(error: BaseException) -> str:
    """Kind of an error and first line of its message."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0] if isinstance(error, Repeated | UserError) else f"{type(error).__name__}: {lines[0]}"


def causes(failures: dict[int, Exception]) -> dict[int, BaseException]:
    """What workers raised, by rank, out of what Ray wraps it in."""
    return {rank: getattr(failure, "_base_exc", failure) for rank, failure in sorted(failures.items())}


class Watch(UserCallback):
    """Runs in Ray's controller: tells the console of a failure when it happens, and ends the job where it would repeat."""

    def __init__(self, run: Folder):
        self.run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Leaves a note for the driver in the run's folder.

        Raises:
            TrainingError: another try would end the same way. What a callback raises Ray does not retry.
        """
        errors = causes(worker_exceptions)
        if repeated := next((error for error in errors.values() if isinstance(error, Repeated)), None):
            raise TrainingError(f"{described(repeated)} (before the first step, so it is not tried again)")
        rank, first = next(iter(errors.items()))
        note = {"time": time.time(), "text": f"worker {rank} failed with {described(first)}"}
        with contextlib.suppress(OSError):  # a note is not worth the job
            self.run.write_text(WAITING, json.dumps(note))


def explain(error: Exception, run: Folder) -> str:
    """One paragraph on why the workers could not go on."""
    failed = list(causes(getattr(error, "worker_failures", {})).values())
    failed = failed or [getattr(error, "controller_failure", None) or error.__cause__ or error]
    first = next((e for e in failed if isinstance(e, UserError)), failed[0])
    return (
        f"training failed with {described(first)}. Workers' logs are in Ray's session folder (cluster.logs true shows them "
        f"here); go on from the newest checkpoint with --resume {run.url}"
    )
