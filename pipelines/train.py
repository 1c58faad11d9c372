"""Train on a Ray cluster: `python -m pipelines.train --config flickr8k --data.train shards/`.

The driver prepares what all workers must agree on (manifest, tokenizer, config in the run's folder) and starts Ray Train;
each worker reads its share of every global batch through Ray Data. The run's folder is the only memory: a worker that
starts, for the first time or after a crash, goes on from the newest complete checkpoint there. Runs as a module and, for
`ray submit`, as a lone script.
"""

import itertools
import platform
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from jaxtyping import Int64

import msclip
from msclip import checkpoint, quarantine
from msclip.convert.weights import Weights
from msclip.data.images import Preprocess
from msclip.data.mixture import Mixture, pinned
from msclip.data.plan import Plan
from msclip.data.tokenizer import Tokenizer
from msclip.errors import TrainingError, UserError, without_queries
from msclip.storage import Folder
from pipelines import cli, starting
from pipelines.jobs import TrainJob

CONFIG, TOKENIZER = "config.yaml", "tokenizer.json"
CAPTIONS_FOR_TOKENIZER = 1_000_000  # more change a vocabulary of 49,408 ids little


@dataclass(frozen=True)
class Prepared:
    """What the driver settles once for all workers."""

    job: TrainJob
    run: str
    data: Mixture
    skip: Int64[np.ndarray, " rows"]
    """Ids of the rows that are left out."""
    tokenizer: str = ""
    use_gpu: bool = False

    @property
    def plan(self) -> Plan:
        """Which rows make up which global batch."""
        data, training = self.job.data, self.job.training
        return Plan(
            self.data.sizes,
            training.global_batch,
            training.seed,
            lanes=data.lanes,
            window=data.window,
            portions=self.data.portions,
            skip=self.skip,
            resample=data.resample,
        )

    @property
    def preprocess(self) -> Preprocess:
        """From image files to the model's input."""
        return Preprocess(image_size=self.job.model.image_size, **asdict(self.job.pixels))

    def check(self) -> None:
        """Builds the plan, the preprocessing and, without memory, the model; raises `UserError` for what cannot be."""
        _ = self.plan, self.preprocess
        model = msclip.build(self.job.model, device="meta")
        if not any(parameter.requires_grad for name, parameter in model.named_parameters() if name != "logit_bias"):
            raise UserError(
                f"nothing is left to learn with model.freeze_image {self.job.model.freeze_image}, model.freeze_text "
                f"{self.job.model.freeze_text} and model.logit_scale_learned false; free some layers with none or first:N"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    resume = cli.take_option(arguments, "--resume")
    if resume is not None:
        return run(*resumed(resume, arguments), resume=True)
    job, start = new(arguments)
    return run(job, Folder(job.run.storage) / job.run.name, start=start)


def new(arguments: list[str]) -> tuple[TrainJob, Weights | None]:
    """The job of a new run, and the weights that it starts from, if any."""
    said = cli.written(TrainJob, arguments, prog="train")
    source, start, defaults = said.get("init"), None, None
    if source is not None:
        start = starting.read(source, said.get("model.activation"))
        starting.check_model(start.model.config, said, source)
        defaults = starting.defaults(start)
    job = cli.parse(TrainJob, arguments, prog="train", defaults=defaults)
    if start is not None:
        job = starting.settled(start, job, cli.written(TrainJob, arguments, prog="train", files=False))
    # As every node sees it, and as a later --resume does, from another place or after more data were added.
    earlier = job.data.skip_quarantined
    earlier = Folder(earlier).url if earlier else None
    job = replace(job, data=replace(job.data, train=pinned(job.data.train), skip_quarantined=earlier))
    return (replace(job, init=Folder(source).url) if source is not None else job), start


def resumed(resume: str, arguments: list[str]) -> tuple[TrainJob, Folder]:
    """The job and the folder of a run that goes on: `--resume RUN` takes the config from that folder."""
    folder = Folder(resume)
    if not folder.exists(CONFIG):
        raise UserError(f"--resume must be the folder of a run, got {resume!r}, which has no {CONFIG}")
    saved = folder.read_text(CONFIG)
    job, was = cli.parse(TrainJob, arguments, prog="train", defaults=saved), yaml.safe_load(saved) or {}
    if job.init != was.get("init"):
        raise UserError(
            f"init is for new runs, and {folder.url} goes on from its own checkpoints; leave out --init {job.init}, or leave "
            "out --resume and choose another run.name"
        )
    if job.data.skip_quarantined != was.get("data", {}).get("skip_quarantined"):
        raise UserError(
            f"data.skip_quarantined is for new runs, and {folder.url} goes on in the order of rows that it began; leave out "
            f"--data.skip_quarantined {job.data.skip_quarantined}, or leave out --resume and choose another run.name"
        )
    return job, folder


def run(job: TrainJob, folder: Folder, resume: bool = False, start: Weights | None = None) -> int:
    """Prepares and trains in `folder`, a new run from `start` if given. Raises `UserError` for what the user can mend."""
    if not resume and folder.exists(CONFIG):
        raise UserError(
            f"run.name {job.run.name!r} exists in {job.run.storage}; continue it with --resume {folder.url}, or choose another"
        )
    data = Mixture.load(job.data.train, job.data.image_column, job.data.caption_column)
    skipped = rows_to_skip(job, data, folder, resume)
    # Also builds what the workers will build, so that a mistake shows before any of them starts.
    prepared = Prepared(job, folder.url, data, quarantine.row_ids(skipped, data))
    prepared.check()
    total = total_steps(job, prepared.plan.rows)
    newest = checkpoint.newest(folder) if resume else None
    state = checkpoint.read_state(newest) if newest else {"step": 0}
    if newest and state["step"] >= total:
        print(f"nothing to do: {newest.url} is the last of {total:,} steps; raise training.epochs or training.steps to go on")
        return 0
    from pipelines import session, worker
    from pipelines.claim import claimed

    if newest:
        worker.check_same_data(prepared, state, newest)
    with claimed(folder), session.cluster(job.cluster) as started:
        use_gpu = session.uses_gpu(job.cluster, started)
        tokenizer = prepare_tokenizer(job, data, folder, resume, start)
        if start is not None:
            starting.write(start, job, tokenizer, prepared.preprocess, folder)
        if not resume:
            if skipped:
                quarantine.write_skipped(folder, skipped)
            folder.write_text(CONFIG, yaml.safe_dump(plain(job), sort_keys=False))
        prepared = replace(prepared, tokenizer=tokenizer.to_json(), use_gpu=use_gpu)
        print(
            f"run {folder.url}: {prepared.plan.rows:,} pairs, {total:,} steps of {job.training.global_batch:,}, "
            f"{job.cluster.num_workers} worker{'s' * (job.cluster.num_workers > 1)} on {'GPU' if use_gpu else 'CPU'}",
            flush=True,
        )
        if start is not None:
            print(starting.summary(start, job), flush=True)
        return fit(prepared, folder, total)


def rows_to_skip(job: TrainJob, data: Mixture, folder: Folder, resume: bool) -> pa.Table | None:
    """The rows that an earlier run quarantined and this one leaves out, `None` if it was not asked to; once it has begun,
    those that it has left out."""
    earlier = job.data.skip_quarantined
    if earlier is None:
        return None
    if resume:
        return quarantine.read_skipped(folder)
    rows, elsewhere = quarantine.skippable(earlier, data)
    note = f"; {elsewhere:,} more are of shards that have changed or are not in data.train" if elsewhere else ""
    print(f"leaving out {len(rows):,} rows that {earlier} could not use{note}", flush=True)
    return rows


def total_steps(job: TrainJob, rows: int) -> int:
    """Steps of the whole run over so many pairs an epoch.

    Raises:
        UserError: too few steps to get past the warm-up.
    """
    total = job.training.total_steps(rows)
    if job.optim.warmup_steps >= total:
        raise UserError(
            f"optim.warmup_steps must be less than the run's {total} steps, got {job.optim.warmup_steps}: the learning rate "
            "would never reach its peak; lower it, or train longer"
        )
    return total


def prepare_tokenizer(job: TrainJob, data: Mixture, folder: Folder, resume: bool, start: Weights | None = None) -> Tokenizer:
    """The run's tokenizer, from its folder when it continues, from the file of the weights it starts with if so set."""
    context, vocabulary = job.model.context_length, job.model.vocab_size
    if resume and folder.exists(TOKENIZER):
        return Tokenizer.from_json(folder.read_text(TOKENIZER))
    if job.tokenizer.source == "init":
        tokenizer = starting.tokenizer(start or starting.read((folder / starting.INIT).url), job)
    elif job.tokenizer.source == "train":
        captions = itertools.islice(data.captions(), CAPTIONS_FOR_TOKENIZER)
        tokenizer = Tokenizer.train(captions, vocabulary, context)
    else:
        tokenizer = Tokenizer.load(job.tokenizer.source, context, job.tokenizer.truncation)
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"model.vocab_size must be at least the {tokenizer.vocab_size} ids of tokenizer.source "
            f"{job.tokenizer.source!r}, got {vocabulary}"
        )
    folder.write_text(TOKENIZER, tokenizer.to_json())
    return tokenizer


def fit(prepared: Prepared, folder: Folder, total_steps: int) -> int:
    """Runs Ray Train to the end and reports how it went."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipelines import failures
    from pipelines.progress import Progress

    cluster = prepared.job.cluster
    watch: Any = failures.Watch(folder)  # the annotations of RunConfig know the callbacks of Tune alone
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"prepared": prepared},
        torch_config=TorchConfig(backend="nccl" if prepared.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=prepared.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if prepared.use_gpu else {})},
        ),
        # Ray's own records go apart: its checkpoint registry would be a second truth beside the markers in the folder.
        run_config=RunConfig(
            name="ray",
            storage_path=folder.path,
            storage_filesystem=folder.filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[watch],
        ),
    )
    handler = signal.getsignal(signal.SIGINT)
    with Progress(folder, total_steps):
        try:
            result: Any = trainer.fit()  # Train V2's Result, which the annotation of fit() does not name
            outcome = result.return_value
        except (KeyboardInterrupt, SystemExit):  # Ray stops the workers at Ctrl-C and then leaves without a word
            print(f"\ninterrupted; go on with --resume {folder.url}", file=sys.stderr)
            return 130
        except TrainingFailedError as error:
            raise TrainingError(failures.explain(error, folder)) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)
    if outcome and "error" in outcome:
        print(f"error: {outcome['error']}", file=sys.stderr)
        return int(outcome["exit_status"])
    newest = checkpoint.finished(folder)[-1]
    print(f"finished: {(newest / checkpoint.MODEL).url}")
    return 0


def train_worker(config: dict[Any, Any]) -> Any:
    """Runs in each training process. An error that all workers agree on is returned, so that it is not retried."""
    from msclip.training import agree, train
    from pipelines import failures, worker

    prepared: Prepared = config["prepared"]
    try:
        with failures.marked():
            setup = agree(lambda: worker.prepare(prepared))
        return train(**setup)
    except UserError as error:
        return {"error": str(error), "exit_status": error.exit_status}


def plain(value: Any) -> Any:
    """A config as YAML has it: mappings, lists and scalars. Of addresses of the web without the query, which may be a key."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, str):
        return without_queries(value)
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def versions() -> dict[str, str]:
    """What ran: the packages whose behaviour shows in the numbers."""
    names = ("msclip", "torch", "ray", "deepspeed", "pillow", "tokenizers", "pyarrow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # run from a source tree
            continue
    return found


if __name__ == "__main__":
    sys.exit(cli.guard(main))
