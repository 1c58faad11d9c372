"""A training that starts from existing weights: what it takes from their file, and what it may say otherwise.

What a user does not write of `model`, `tokenizer` and `pixels` is the file's. What a user does write of `model` must mean what
the file's settings mean, apart from `FREE`. A configuration may be one of another run, so pixels and tokenizer of its own are
held against the file's; what stands on the command line itself is meant. The weights, as the job's model has them, are copied
into the run's folder: every node reads them there, and the run does not depend on a file that may move.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from msclip import checkpoint
from msclip.config import ModelConfig
from msclip.convert.open_clip import UNTOLD
from msclip.convert.weights import FRESH_ONLY, TRAINING, Weights
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError
from msclip.exports import export, load_weights
from msclip.model import Model
from msclip.presets import PRESETS
from msclip.resize import resize_positions
from msclip.storage import Folder
from pipelines.jobs import TrainJob

INIT = "init.safetensors"
SIZES = ("image_size", "context_length")
FREE = {*SIZES, "loss"} | TRAINING
"""Settings of `model` that a training may have otherwise than the weights it starts from."""
SHOWN = 3


def read(source: str, activation: str | None = None) -> Weights:
    """The weights that `init` names.

    Args:
        activation: what the user says of it, if anything; a lone state dict does not tell it.

    Raises:
        UserError: they cannot be read.
    """
    try:
        try:
            return checkpoint.read(source)
        except UserError as error:
            if activation is None or UNTOLD not in str(error):
                raise
            return checkpoint.read(source, {"activation": activation})
    except UserError as error:
        raise UserError(f"init must name weights to start from: {error}") from error


def defaults(weights: Weights) -> str:
    """The settings of a training job that the file decides where its user says nothing, as YAML."""
    usual = ModelConfig()
    # The bias is the file's or fresh; a default of the file's own would stand in the way of another loss.
    model = weights.model.config.to_dict() | {name: getattr(usual, name) for name in (*TRAINING, "logit_bias_init")}
    preprocess = {name: value for name, value in weights.preprocess.to_dict().items() if name != "image_size"}
    official = weights.layout == "ms_clip" or (weights.tokenizer is not None and weights.tokenizer.truncation == "official")
    tokenizer = {"source": "init", "truncation": "official" if official else "end"}
    return yaml.safe_dump(json.loads(json.dumps({"model": model, "tokenizer": tokenizer, "pixels": preprocess})))


def check_model(file: ModelConfig, said: Mapping[str, Any], source: str) -> None:
    """Compares what the user writes of `model` with the file's.

    Args:
        said: all that the user writes, by dotted name.

    Raises:
        UserError: they describe another architecture, or how fresh weights begin; the message names the first settings.
    """
    theirs = dict(flat(file.to_dict()))
    mine = {name.removeprefix("model."): value for name, value in flat(said) if name.startswith("model.")}
    differing = [name for name, value in theirs.items() if name not in FREE and mine.get(name, value) != value]
    fresh = [name for name in differing if name in FRESH_ONLY and (name != "logit_bias_init" or file.loss == "sigmoid")]
    differing = [name for name in differing if name not in FRESH_ONLY]
    if differing and not means(file, {name: mine[name] for name in differing}):
        listed = "; ".join(f"model.{name} is {theirs[name]} there and {mine[name]} here" for name in differing[:SHOWN])
        more = f"; {len(differing) - SHOWN} more differ" if len(differing) > SHOWN else ""
        raise UserError(
            f"the weights of init {source} are of another architecture: {listed}{more}. Leave these settings out to take the "
            f"file's; of model, only {', '.join(sorted(FREE))} may differ"
        )
    if fresh:
        raise UserError(
            f"model.{fresh[0]} says how fresh weights begin, and those of init {source} have been trained; leave it out, got "
            f"{mine[fresh[0]]}"
        )


def flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names, and lists for tuples."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple | list) else value


def changed(config: ModelConfig, settings: Mapping[str, Any]) -> ModelConfig:
    """The config with some settings replaced, which are called by their dotted names."""
    values = config.to_dict()
    for name, value in settings.items():
        section, _, inner = name.rpartition(".")
        (values[section] if section else values)[inner] = value
    return ModelConfig.from_dict(values)


def means(file: ModelConfig, settings: Mapping[str, Any]) -> bool:
    """Whether the file's architecture stays the same with such settings: a section can be said in other words."""
    try:
        return architecture(changed(file, settings)) == architecture(file)
    except UserError:  # they contradict what else the file has
        return False


def architecture(config: ModelConfig) -> dict[str, Any]:
    """What must be equal for weights to go on as they were meant, whichever way sharing and parallel modules are written."""
    values = {name: value for name, value in vars(config).items() if name not in FREE | FRESH_ONLY}
    sharing = config.sharing
    parts = {part for part in ("attn", "ffn", "ln1", "ln2") if getattr(sharing, part)}
    inside = {(part, layer) for part in parts for layer in config.shared_layers}
    values["sharing"] = inside, sharing.final_norm, sharing.out_proj
    for name in ("parallel_ffn", "parallel_attention"):
        values[name] = replace(values[name], layers="shared"), config.layers_beside(values[name])
    return values


def settled(weights: Weights, job: TrainJob, typed: Mapping[str, Any]) -> TrainJob:
    """The job, with the file's tokenizer where it has one and a configuration asks for a new one.

    A run that trained its tokenizer says so in its own configuration; started from the weights of that run, the configuration
    means this tokenizer.

    Args:
        typed: what stands on the command line itself.

    Raises:
        UserError: the tokenizer is missing or would give the embeddings other tokens, or a configuration has other pixels.
    """
    source, theirs = job.tokenizer.source, weights.tokenizer
    if source == "train" and theirs is not None:
        if "tokenizer.source" in typed:
            raise UserError(
                f"tokenizer.source train would give other tokens to the embeddings that the weights of init {job.init} have "
                "learned for theirs; leave it out to take their tokenizer"
            )
        job = replace(job, tokenizer=replace(job.tokenizer, source="init"))
    elif source == "init":
        tokenizer(weights, job)  # that it has none shows before anything starts
    elif theirs is not None:
        other = Tokenizer.load(source, job.model.context_length, job.tokenizer.truncation)
        if other.vocab_size != theirs.vocab_size:
            raise UserError(
                f"tokenizer.source {source} has {other.vocab_size} ids and the tokenizer of init {job.init} "
                f"{theirs.vocab_size}, so it cannot be the one that the weights have learned; leave it out to take theirs"
            )
    for name, mine, file in other_pixels(weights, job):
        if name not in typed:
            raise UserError(
                f"{name} is {mine} in the configuration and {file} in init {job.init}; leave it out there to take the "
                f"weights', or write --{name} on the command line if it is meant"
            )
    return job


def other_pixels(weights: Weights, job: TrainJob) -> list[tuple[str, Any, Any]]:
    """Settings of `pixels` that differ from the file's: name, the job's value, the file's."""
    pairs = [(f"pixels.{name}", value, getattr(weights.preprocess, name)) for name, value in vars(job.pixels).items()]
    return [(name, list(mine), list(file)) for name, mine, file in pairs if mine != file]


def summary(weights: Weights, job: TrainJob) -> str:
    """One line on what a run takes from the file and what it has otherwise."""
    file, source = weights.model.config, job.tokenizer.source
    name = next((name for name, config in PRESETS.items() if same(config, file)), "no named model")
    parts = [f"{name}, layout {weights.layout}, {sum(p.numel() for p in weights.model.parameters()):,} parameters"]
    sizes = [(size, getattr(file, size), getattr(job.model, size)) for size in SIZES]
    if resized := ", ".join(f"{size} {old} to {new}" for size, old, new in sizes if old != new):
        parts.append(f"positions resized ({resized})")
    if job.model.loss != file.loss:
        parts.append(f"loss {job.model.loss} instead of {file.loss}")
    if source == "init":
        parts.append("its tokenizer")
    else:
        chosen = "a tokenizer learned from these captions" if source == "train" else f"tokenizer {source}"
        parts.append(chosen + (" instead of its own" if weights.tokenizer is not None else ", as it holds none"))
    parts += [f"{name} {mine} instead of {theirs}" for name, mine, theirs in other_pixels(weights, job)]
    return f"starts from {job.init}: {'; '.join(parts)}"


def same(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two models are the same but for how they are trained."""
    return architecture(one) == architecture(other) and all(getattr(one, size) == getattr(other, size) for size in SIZES)


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
