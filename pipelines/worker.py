"""What a training process builds before its loop: model, engine, batches, and the newest checkpoint's state."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch

import msclip
from msclip import checkpoint, quarantine
from msclip.data.decode import Recipe
from msclip.data.loader import Batches
from msclip.data.pool import cores
from msclip.data.tokenizer import Tokenizer
from msclip.distributed import all_gather_objects
from msclip.engine import create_engine
from msclip.errors import TrainingError, UserError
from msclip.storage import Folder
from msclip.training import agree
from pipelines import starting
from pipelines.decoding import RayHelpers
from pipelines.session import RayRun
from pipelines.stream import ray_units
from pipelines.train import CONFIG, Prepared, plain, versions


def prepare(prepared: Prepared) -> dict[str, Any]:
    """The arguments of `msclip.training.train`, for this worker.

    Raises:
        UserError: the newest checkpoint is damaged, or of another architecture.
    """
    job, run = prepared.job, RayRun(Folder(prepared.run))
    training, optim = job.training, job.optim
    if run.world_size == 1:  # nobody to spread anything over
        training = replace(training, zero_stage=None)
    total_steps = training.total_steps(prepared.plan.rows)
    newest = checkpoint.newest(run.folder)
    state = checkpoint.read_state(newest) if newest else {"step": 0}
    start_step = int(state["step"])
    # Before the engine: rank 0 alone meets a damaged file, and the others must hear of it outside any other exchange.
    tensors = agree(lambda: read_tensors(newest, optim.ema_decay is not None) if newest and run.rank == 0 else ({}, {}, {}))
    # Reading starts at once, so that it is under way when the engine is ready.
    batches = read_batches(prepared, run, start_step, total_steps)
    torch.manual_seed(training.seed)
    model = msclip.build(job.model)
    if job.init is not None and not newest:  # rank 0's weights become all ranks'
        agree(lambda: starting.load_into(model, run.folder) if run.rank == 0 else None)
    engine = create_engine(
        model,
        optim,
        mean=job.pixels.mean,
        std=job.pixels.std,
        total_steps=total_steps,
        micro_batch_size=training.global_batch // run.world_size // optim.accumulation_steps,
        device=run.device,
        zero_stage=training.zero_stage,
        precision=training.precision,
        seed=training.seed,
        compiled=training.compiles(run.device),
        save_memory=training.save_memory,
    )
    if newest:
        engine.load_full_state(tensors[0], tensors[1], start_step, tensors[2])
    tokenizer = Tokenizer.from_json(prepared.tokenizer)
    return {
        "run": run,
        "engine": engine,
        "batches": batches,
        "start_step": start_step,
        "total_steps": total_steps,
        "config": training,
        "checkpoints": job.checkpoint,
        "save": saver(prepared, run, engine, tokenizer),
        "accumulation_steps": optim.accumulation_steps,
        "max_bad_fraction": job.data.max_bad_fraction,
        "passes": prepared.plan.passes,
    }


def read_tensors(newest: Folder, averaged: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Model, optimiser and, if wanted and there, the moving average of the weights."""
    return *checkpoint.load_optimizer(newest), checkpoint.load_average(newest) if averaged else {}


def read_batches(prepared: Prepared, run: RayRun, start_step: int, total_steps: int) -> Batches:
    """This worker's share of every global batch, read by the cluster and decoded beside the worker as far as its cores go.

    Collective.
    """
    data, place = prepared.job.data, (run.rank, run.world_size, start_step, total_steps)
    sources, plan = prepared.data, prepared.plan
    recipe = Recipe.of(sources, prepared.preprocess, data.augment, prepared.tokenizer, plan.seed)
    processes = data.decode_processes or max(1, cores() // run.local_world_size)
    helpers = None
    if data.remote_decode_processes != 0:
        nodes = all_gather_objects(ray.get_runtime_context().get_node_id())
        helpers = RayHelpers(recipe, nodes, data.remote_decode_processes, prepared.job.cluster.autoscaling)
    units = ray_units(sources, plan, *place)
    return Batches(plan, *place, units, recipe, processes=processes, prefetch=data.prefetch, device=run.device, helpers=helpers)


def check_same_data(prepared: Prepared, state: dict[str, Any], newest: Folder) -> None:
    """The plan counts rows of one manifest; on another it would mean other rows.

    Raises:
        UserError: data, batch or seed differ from the checkpoint's.
    """
    theirs = state.get("plan", {})
    for name, value in identity(prepared).items():
        if theirs.get(name) != value:
            raise UserError(
                f"{newest.url} was trained with {name} {theirs.get(name)!r}, and this run has {value!r}: its data order "
                "could not be continued. Use the same data and settings, or start a new run"
            )


def identity(prepared: Prepared) -> dict[str, Any]:
    """What decides which rows a global batch holds."""
    plan = prepared.plan
    lanes, windows, parts = zip(*((source.lanes, source.window, source.width) for source in plan.sources), strict=True)
    several = len(plan.sources) > 1
    return {
        "data": prepared.data.digest,
        "training.global_batch": plan.global_batch,
        "training.seed": plan.seed,
        "data.lanes": list(lanes) if several else lanes[0],
        "data.window": list(windows) if several else windows[0],
        "rows of each source in a batch": list(parts) if several else None,
        "weights of data.resample": [portion.weight for portion in plan.portions] if plan.resample else None,
        "data.skip_quarantined": quarantine.digest(prepared.skip),
    }


def saver(prepared: Prepared, run: RayRun, engine: Any, tokenizer: Tokenizer) -> Callable[[int], None]:
    """Writes the checkpoint of a step; called by every worker, since the state is gathered from all."""
    job = prepared.job

    def write(step: int, model_state: dict[str, Any], optimizer_state: dict[str, Any], average: dict[str, Any]) -> None:
        if run.rank:
            return
        if not run.folder.exists(CONFIG):
            raise TrainingError(
                f"the run's folder {run.folder.url} has lost its {CONFIG}: was it deleted or moved? Nothing more is written "
                "there; start a new run"
            )
        state = {
            "step": step,
            "plan": identity(prepared),
            "world_size": run.world_size,
            "job": json.loads(json.dumps(plain(job))),
            "versions": versions(),
            "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        }
        checkpoint.save(run.folder, state, model_state, optimizer_state, job.model, tokenizer, prepared.preprocess, average)
        checkpoint.prune(run.folder, job.checkpoint.keep, job.checkpoint.keep_optimizer)

    def save(step: int) -> None:
        model_state, optimizer_state = engine.full_state()
        average = engine.averaged_state()
        agree(lambda: write(step, model_state, optimizer_state, average))

    return save
