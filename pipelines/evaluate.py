"""Evaluate a run: `python -m pipelines.evaluate --run RUN --tasks zeroshot:cifar10.parquet retrieval:val.parquet`.

One Ray Tune trial for each (finished checkpoint, task), off the training path. A trial stores its result as
RUN/evaluation/<checkpoint>/<task>.json; what is stored is not measured again, so the job may be started after every new
checkpoint, and after a crash. One failed trial loses nothing else.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from msclip.checkpoint import EMA, finished
from msclip.errors import UserError
from msclip.eval import Task, checkpoint_digest, evaluate_checkpoint, is_current, parse_tasks, task_digest
from msclip.eval.results import metric_names, read_result, weights_of, write_result
from msclip.storage import Folder
from pipelines import cli

if TYPE_CHECKING:
    from pipelines.trials import Pair


@dataclass(frozen=True)
class Evaluation:
    """Evaluate checkpoints of a run on zero-shot and retrieval tasks, each pair as one Ray Tune trial."""

    run: str
    """The run's folder, local or a URL, or one exported .safetensors file."""
    tasks: list[str]
    """Each zeroshot:DATA or retrieval:DATA (Parquet), or a YAML or JSON file of tasks."""
    checkpoints: str = "all"
    """all, last, every:N (each N-th finished one, counted back from the last) or steps such as 100,200."""
    weights: Literal["auto", "model", "ema", "both"] = "auto"
    """Which of a checkpoint's weights: `model`, the last step's; `ema`, their moving average, whose results are those of
    `step_...-ema`; `both`; or `auto`, the average where there is one (optim.ema_decay), else the last step's."""
    output: str | None = None
    """Where results go; by default the folder `evaluation` of the run, or beside the exported file."""
    limit: int = 0
    """Rows of each task that sets no limit itself, spread evenly over the data; 0 for all."""
    batch_size: int = 128
    """Images or texts encoded at a time."""
    num_cpus: float = 1
    """CPUs of a trial; each whole one is a decoding thread."""
    num_gpus: float | None = None
    """GPUs of a trial, a fraction to share one; null for 0.25 where the cluster has any, else 0."""
    max_concurrent: int | None = None
    """Trials at a time; null for as many as fit."""
    address: str | None = None
    """A Ray cluster; `local` for a new one on this machine; null for RAY_ADDRESS or the one running here, else new."""
    autoscaling: bool = False
    """Wait for nodes that the autoscaler will add, instead of refusing trials larger than any node."""
    logs: bool = False
    """Show the workers' own output on this console."""

    def __post_init__(self) -> None:
        for name, least in (("limit", 0), ("num_cpus", 0), ("num_gpus", 0), ("max_concurrent", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be {least} or more, got {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates as the command line says; returns the exit status: 1 if a trial failed, 2 for wrong settings."""
    arguments = gather(sys.argv[1:] if argv is None else argv)
    return cli.guard(lambda: evaluate(cli.parse(Evaluation, arguments, prog="evaluate")))


def evaluate(job: Evaluation) -> int:
    """Measures what is missing and prints a table for each task. Raises `UserError` for what the user can mend."""
    console = Console() if Console().is_terminal else Console(width=120)
    tasks = parse_tasks(job.tasks, job.limit)
    task_digests = {task.name: task_digest(task) for task in tasks}
    chosen = [(checkpoint, output, checkpoint_digest(checkpoint)) for checkpoint, output in places(job)]
    from pipelines.trials import Pair

    pairs: list[Pair] = []
    missing: list[Pair] = []
    for task in tasks:
        for checkpoint, output, digest in chosen:
            pairs.append(Pair(checkpoint, task, output.url))
            if not is_current(read_result(output, task), digest, task_digests[task.name]):
                missing.append(pairs[-1])
    if len(missing) < len(pairs):
        console.print(f"{len(pairs) - len(missing)} of {len(pairs)} results are there already")
    errors = measure_all(missing, job) if missing else {}
    for task in tasks:
        console.print(table(task, [pair for pair in pairs if pair.task == task], errors))
    for pair, error in errors.items():
        console.print(f"failed: {pair.title}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if errors else 0


def measure_all(pairs: Sequence["Pair"], job: Evaluation) -> dict["Pair", str]:
    """Runs the trials on the cluster; returns the pairs that failed, each with its reason."""
    from pipelines import session, trials
    from pipelines.jobs import ClusterConfig

    with session.cluster(ClusterConfig(address=job.address, autoscaling=job.autoscaling, logs=job.logs)):
        return trials.run_trials(
            pairs,
            measure(job),
            progress(len(pairs)),
            resources=trials.trial_resources(job.num_cpus, job.num_gpus, job.autoscaling),
            max_concurrent=job.max_concurrent or trials.room(job.num_cpus),
        )


def measure(job: Evaluation) -> Callable[["Pair"], None]:
    """What a trial does: evaluate on the device it was given, and store the result."""
    threads, batch_size = max(1, int(job.num_cpus)), job.batch_size

    def evaluate_and_store(pair: "Pair") -> None:
        import ray
        import torch

        torch.set_num_threads(threads)
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        result = evaluate_checkpoint(pair.checkpoint, pair.task, device=device, batch_size=batch_size, threads=threads)
        write_result(Folder(pair.output), pair.task, result)

    return evaluate_and_store


def places(job: Evaluation) -> list[tuple[str, Folder]]:
    """(checkpoint, folder of its results) of what `run`, `checkpoints` and `weights` choose.

    Raises:
        UserError: no such run, no finished checkpoint, a step that is not among them, or no average where one is asked for.
    """
    if job.run.partition("?")[0].endswith(".safetensors"):
        if job.weights != "auto":
            raise UserError(f"weights chooses among those of a run's checkpoints, got {job.weights} and the one file {job.run}")
        folder, name = weights_of(job.run)
        output = Folder(job.output) if job.output else folder / "evaluation"
        return [((folder / name).url, output / name.removesuffix(".safetensors"))]
    run = Folder(job.run)
    found = finished(run)
    if not found and not run.exists():
        raise UserError(f"run must be a run's folder or an exported .safetensors file, and nothing is at {job.run!r}")
    if not found:
        raise UserError(f"run {job.run!r} has no finished checkpoint: no checkpoints/step_* in it holds the file COMPLETE")
    output = Folder(job.output) if job.output else run / "evaluation"
    return [
        (weights.url, output / f"{folder.name}{'-ema' * (weights != folder)}")
        for folder in select(found, job.checkpoints)
        for weights in weights_chosen(folder, job.weights)
    ]


def weights_chosen(checkpoint: Folder, choice: str) -> list[Folder]:
    """What `--weights` means of a checkpoint: the folder for the last step's weights, the file inside for their average."""
    average = checkpoint.exists(EMA)
    if choice in ("ema", "both") and not average:
        raise UserError(
            f"weights {choice} needs a moving average, and {checkpoint.url} has no {EMA}: it was trained with optim.ema_decay "
            "null. --weights auto measures the average where there is one, else the last step's weights"
        )
    wanted = choice if choice != "auto" else "ema" if average else "model"
    return [*([checkpoint] if wanted != "ema" else []), *([checkpoint / EMA] if wanted != "model" else [])]


def select(found: Sequence[Folder], choice: str) -> list[Folder]:
    """The checkpoints that `--checkpoints` names, in the order of their steps."""
    if choice == "all":
        return list(found)
    if choice == "last":
        return [found[-1]]
    word, _, number = choice.partition(":")
    if word == "every" and number.isdecimal() and int(number):
        return list(found[:: -int(number)][::-1])
    steps = {int(folder.name.removeprefix("step_")): folder for folder in found}
    wanted = [step.strip() for step in choice.split(",")]
    if not all(step.isdecimal() for step in wanted):
        raise UserError(f"checkpoints must be all, last, every:N or steps such as 100,200, got {choice!r}")
    if missing := [step for step in wanted if int(step) not in steps]:
        known = ", ".join(map(str, sorted(steps)))
        raise UserError(f"checkpoints asks for step {missing[0]}, and the finished checkpoints are {known}")
    return [steps[step] for step in sorted({int(step) for step in wanted})]


def progress(total: int) -> Callable[["Pair", bool], None]:
    """Prints a line for each pair that ends."""
    done: list[str] = []

    def say(pair: "Pair", fine: bool) -> None:
        done.append(pair.title)
        result = read_result(Folder(pair.output), pair.task) if fine else None
        print(f"[{len(done)}/{total}] {pair.title}: {summary(pair.task, result) if result else 'failed'}", flush=True)

    return say


def summary(task: Task, result: Mapping[str, Any]) -> str:
    """First metrics of a result, in percent, beside chance."""
    keys = ["acc1"] if task.kind == "zeroshot" else ["image_retrieval_recall@1", "text_retrieval_recall@1"]
    metrics, chance, titles = result["metrics"], result["chance"], metric_names(task)
    shown = [f"{titles[key]} {100 * metrics[key]:.1f} (chance {100 * chance[key]:.1f})" for key in keys]
    return f"{', '.join(shown)} in {result['seconds']:.1f} s"


def table(task: Task, pairs: Sequence["Pair"], errors: Mapping["Pair", str]) -> Table:
    """Steps as rows, metrics as columns, below what blind guesses give."""
    titles = metric_names(task)
    results = {pair: None if pair in errors else read_result(Folder(pair.output), task) for pair in pairs}
    some = next((result for result in results.values() if result), None)
    sizes = [f"{some[key]} {key}" for key in ("rows", "classes", "captions") if key in some] if some else []
    view = Table(title=f"{task.name}: {', '.join([task.kind, *sizes])}; percent", title_justify="left")
    view.add_column("checkpoint", no_wrap=True)
    for title in (*titles.values(), "skipped", "seconds"):
        view.add_column(title, justify="right")
    if some:
        view.add_row("chance", *cells(titles, some["chance"]), style="dim", end_section=True)
    for pair, result in results.items():
        name = Folder(pair.output).name
        if result:
            tail = (str(result["skipped_rows"]), f"{result['seconds']:.1f}")
            view.add_row(name, *cells(titles, result["metrics"]), *tail)
        else:
            view.add_row(name, "failed", style="red")
    return view


def cells(titles: Mapping[str, str], values: Mapping[str, float]) -> list[str]:
    """Shares in percent, ranks as they are, a dash for what was not measured."""
    texts = {key: f"{value:.1f}" if key.endswith("rank") else f"{100 * value:.1f}" for key, value in values.items()}
    return [texts.get(key, "-") for key in titles]


def gather(arguments: Sequence[str]) -> list[str]:
    """The command line with `--tasks A B` as the one value that the parser takes for a list."""
    gathered: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--tasks" or (argument.startswith("--tasks=") and not argument.startswith("--tasks=[")):
            values = [argument.removeprefix("--tasks=")] if "=" in argument else []
            while rest and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            argument = f"--tasks={json.dumps(values)}"
        gathered.append(argument)
    return gathered


if __name__ == "__main__":
    sys.exit(main())
