"""A training that starts from existing weights: what it takes from their file, and what it may say otherwise.

What a user does not write of `model`, `tokenizer` and `pixels` is the file's. What a user does write of `model` must be the
file's too, apart from the input sizes, to which positions are interpolated, the loss, and settings that concern training
alone, which are always the job's own. The weights, as the job's model has them, are copied into the run's folder: every node
reads them there, and the run does not depend on a file that may move.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from msclip import checkpoint
from msclip.config import ModelConfig
from msclip.convert.weights import FRESH, TRAINING_ONLY, Weights
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError
from msclip.exports import export, load_weights
from msclip.model import Model
from msclip.resize import resize_positions
from msclip.storage import Folder
from pipelines import cli
from pipelines.jobs import TrainJob

INIT = "init.safetensors"
TRAINING = TRAINING_ONLY - FRESH.keys()
FREE = {"image_size", "context_length", "loss"} | TRAINING
SHOWN = 3


def read(source: str, activation: str | None = None) -> Weights:
    """The weights that `init` names.

    Args:
        activation: what the user says of it, if anything; a lone state dict does not tell it.

    Raises:
        UserError: they cannot be read.
    """
    try:
        return checkpoint.read(source)
    except UserError as error:
        if activation is not None:
            with contextlib.suppress(UserError):
                return checkpoint.read(source, {"activation": activation})
        raise UserError(f"init must name weights to start from: {error}") from error


def said_activation(arguments: list[str]) -> str | None:
    """`model.activation` where the user writes it: what no default changes."""
    found = {
        cli.values(TrainJob, arguments, prog="train", defaults=f"{{model: {{activation: {value}}}}}")["model"]["activation"]
        for value in get_args(ModelConfig.__annotations__["activation"])
    }
    return found.pop() if len(found) == 1 else None


def defaults(weights: Weights) -> str:
    """The settings of a training job that the file decides where its user says nothing, as YAML."""
    usual = ModelConfig()
    model = weights.model.config.to_dict() | {name: getattr(usual, name) for name in TRAINING}
    preprocess = {name: value for name, value in weights.preprocess.to_dict().items() if name != "image_size"}
    official = weights.layout == "ms_clip" or (weights.tokenizer is not None and weights.tokenizer.truncation == "official")
    tokenizer = {"source": "init", "truncation": "official" if official else "end"}
    return yaml.safe_dump(json.loads(json.dumps({"model": model, "tokenizer": tokenizer, "pixels": preprocess})))


def check_architecture(weights: Weights, arguments: list[str], source: str) -> None:
    """Compares the architecture that the command line describes, by way of `defaults`, with the file's.

    Raises:
        UserError: it says otherwise; the message names the first differing settings.
    """
    job = dict(settings(cli.values(TrainJob, arguments, prog="train", defaults=defaults(weights))["model"]))
    file = dict(settings(weights.model.config.to_dict()))
    differing = [name for name, value in file.items() if name not in FREE and job[name] != value]
    if differing:
        listed = "; ".join(f"model.{name} is {file[name]} there and {job[name]} here" for name in differing[:SHOWN])
        more = f"; {len(differing) - SHOWN} more differ" if len(differing) > SHOWN else ""
        raise UserError(
            f"the weights of init {source} are of another architecture: {listed}{more}. Leave these settings out to take the "
            f"file's; of model, only {', '.join(sorted(FREE))} may differ"
        )


def settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names, and lists for tuples."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple | list) else value


def tokenizer(weights: Weights, job: TrainJob) -> Tokenizer:
    """The file's tokenizer, for captions as long as the job's.

    Raises:
        UserError: it has none.
    """
    if weights.tokenizer is None:
        raise UserError(
            f"the weights of init {job.init} ({weights.layout}) hold no tokenizer: set tokenizer.source to theirs, for CLIP's "
            "and MS-CLIP's own models the merges file bpe_simple_vocab_16e6.txt.gz that OpenAI publishes beside its code"
        )
    changed = {"context_length": job.model.context_length, "truncation": job.tokenizer.truncation}
    return Tokenizer.from_json(json.dumps(json.loads(weights.tokenizer.to_json()) | changed))


def write(weights: Weights, job: TrainJob, tokenizer: Tokenizer, preprocess: Preprocess, folder: Folder) -> None:
    """Copies the weights, resized to the job's model and with the bias that its loss has or has not, into the run's folder."""
    resized = resize_positions(weights.model, job.model.image_size, job.model.context_length)
    state = resized.state_dict()
    bias = state.pop("logit_bias", torch.tensor([job.model.logit_bias_init]))
    if job.model.loss == "sigmoid":
        state["logit_bias"] = bias
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / INIT
        export(file, state, job.model, tokenizer, preprocess, {"init": job.init, "layout": weights.layout})
        folder.upload(file, INIT)


def load_into(model: Model, folder: Folder) -> None:
    """Puts the copy in the run's folder into `model`.

    Raises:
        UserError: it is gone, or of another architecture than the job has by now.
    """
    source = (folder / INIT).url
    load_weights(model, checkpoint.read(source).model.state_dict(), source)
