"""Ray Tune as a pool for (checkpoint, task) pairs: every pair is tried, an error stays with its own pair.

Tune retries what raises, so only what may pass raises; an error that would come again is returned as one line instead.
"""

import errno
import logging
import os
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayTaskError

from msclip.errors import UserError
from msclip.eval import Task
from msclip.storage import Folder

# A GPU's share of one trial where none is set: four ViT-B/32 at batch 128 in bfloat16 fit any data-centre GPU.
GPU_SHARE = 0.25


@dataclass(frozen=True)
class Pair:
    """One trial's work."""

    checkpoint: str
    task: Task
    output: str
    """the folder of the checkpoint's results"""

    @property
    def title(self) -> str:
        return f"{Folder(self.output).name} {self.task.name}"


def run_trials(
    pairs: Sequence[Pair],
    measure: Callable[[Pair], None],
    report: Callable[[Pair, bool], None],
    *,
    resources: Mapping[str, float],
    max_concurrent: int | None = None,
) -> dict[Pair, str]:
    """One Tune trial a pair; transient errors and lost workers are tried once more.

    Args:
        measure: evaluates a pair and stores its result; runs in a worker.
        report: called here with each pair as it ends, and whether it went well.
        resources: of one trial, `cpu` and `gpu`.
        max_concurrent: trials at a time; None for as many as fit.

    Returns:
        The pairs without a result, each with one line on why.
    """

    def trial(config: dict[str, int]) -> dict[str, str]:
        return attempt(pairs[config["pair"]], measure)

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints a banner at verbose=0, too
    # Tune logs every failed attempt with its traceback; the caller shows the reasons.
    log = logging.getLogger("ray.tune")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="msclip-tune-") as scratch:
            grid = tune.Tuner(
                tune.with_resources(trial, dict(resources)),
                param_space={"pair": tune.grid_search(list(range(len(pairs))))},
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=max_concurrent, trial_dirname_creator=lambda trial: str(trial.trial_id)
                ),
                run_config=tune.RunConfig(
                    name="evaluate",
                    storage_path=scratch,  # results are in the run's storage; of Tune's own records nothing is needed
                    failure_config=tune.FailureConfig(max_failures=1),
                    callbacks=[Progress(pairs, report)],
                    verbose=0,
                ),
            ).fit()
    finally:
        log.setLevel(level)
    errors = dict.fromkeys(pairs, "the trial did not run to its end; start the job again")
    for i in range(len(grid)):
        outcome = grid[i]
        assert outcome.config is not None
        pair = pairs[outcome.config["pair"]]
        error = reason(outcome.error) if outcome.error else (outcome.metrics or {}).get("error", errors[pair])
        if error:
            errors[pair] = error
        else:
            del errors[pair]
    return errors


def trial_resources(num_cpus: float, num_gpus: float | None, autoscaling: bool) -> dict[str, float]:
    """What one trial takes of the cluster; without `num_gpus` a quarter of a GPU where there is one.

    Raises:
        UserError: no node has so much and nothing will add one.
    """
    gpus = num_gpus if num_gpus is not None else GPU_SHARE * ("GPU" in ray.cluster_resources())
    wanted = {"cpu": num_cpus, "gpu": gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not autoscaling and not any(all(wanted[name] <= node.get(name.upper(), 0) for name in wanted) for node in nodes):
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes[:4])
        raise UserError(
            f"num_cpus {num_cpus:g} and num_gpus {gpus:g} are more than any node has ({have}); lower them, or set "
            "autoscaling true if nodes are to be added"
        )
    return wanted


def room(num_cpus: float) -> int | None:
    """Trials at a time on a single machine, whose logical CPUs may outnumber the real ones; None for a cluster."""
    return max(1, int((os.cpu_count() or 1) // max(num_cpus, 1))) if len(ray.nodes()) == 1 else None


def attempt(pair: Pair, measure: Callable[[Pair], None]) -> dict[str, str]:
    """One attempt at a pair, in a Tune worker.

    Returns:
        `error`: empty, or one line on an error that another attempt would meet again. The traceback of an unexpected
        one goes to `<task>.error.txt` beside the results.

    Raises:
        Exception: anything that may pass, for Tune to try again.
    """
    output, record = Folder(pair.output), f"{pair.task.name}.error.txt"
    try:
        measure(pair)
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:
        if is_transient(error):
            raise
        output.write_text(record, traceback.format_exc())
        return {"error": f"{one_line(error)}; the traceback is in {output.url}/{record}"}
    output.delete(record)
    return {"error": ""}


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: storage that stutters, or a GPU whose other tenants took the memory."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError):
        return False
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
    return isinstance(error, torch.OutOfMemoryError)


def reason(error: BaseException) -> str:
    """One line of what Ray tells at length."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return one_line(cause or error)


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Progress(tune.Callback):
    """Tells of each pair as it ends."""

    def __init__(self, pairs: Sequence[Pair], report: Callable[[Pair, bool], None]):
        self.pairs, self.report = pairs, report

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.report(self.pairs[trial.config["pair"]], not trial.last_result.get("error", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.report(self.pairs[trial.config["pair"]], False)
