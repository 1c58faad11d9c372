"""What a checkpoint holds, and when it counts.

A checkpoint is a folder: `model.safetensors` (the export, all that evaluation needs: float32 weights with config, tokenizer
and preprocessing in its header), `ema.safetensors` (a second export, the moving average of the weights, where a run keeps
one), `optimizer.safetensors` and `state.json` for resuming, and `COMPLETE`, written last. A folder without that marker is the
remains of a crash and is never read. Tensors carry our parameter names and are whole, so a run goes on under another ZeRO
stage and another number of workers.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msclip.config import ModelConfig
from msclip.convert.archive import read_metadata
from msclip.convert.recognise import read as read_foreign
from msclip.convert.weights import Weights
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer, Truncation
from msclip.errors import TrainingError, UserError
from msclip.exports import export, read_export
from msclip.fetch import local_copy
from msclip.model import Model
from msclip.storage import Folder

SCRATCH = ".checkpoint-"
MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE, COMPLETE = "state.json", "COMPLETE"


class Loaded(NamedTuple):
    """Everything needed to encode raw images and captions."""

    model: Model
    tokenizer: Tokenizer
    preprocess: Preprocess
    config: ModelConfig


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    tokenizer: str | Tokenizer | None = None,
    **overrides: Any,
) -> Loaded:
    """Reads a model with its tokenizer and preprocessing, whichever program wrote it.

    What a file is, is told by its contents: an export of this library, official MS-CLIP, OpenAI's CLIP, open_clip or a
    Hugging Face `CLIPModel`. No code in a file is ever run.

    Args:
        path: the file, or a folder that holds one (a checkpoint, an open_clip or a Hugging Face folder); local or a URL.
        device: where the model goes; it comes in evaluation mode.
        tokenizer: what `Tokenizer.load` takes, or a tokenizer; instead of the file's own, and needed where it has none, as
            those of MS-CLIP, OpenAI and lone open_clip files do. A name is loaded with the model's context length, and for
            MS-CLIP with its way of cutting captions that are too long.
        overrides: fields of `ModelConfig` that another program's file does not tell, such as `activation="quick_gelu"` of
            open_clip's and OpenAI's models saved as nothing but a state dict.

    Raises:
        UserError: there is no such file or device, or the file is damaged, of an unknown kind, or lacks a tokenizer.
    """
    _check_device(device)
    weights = read(path, overrides)
    config = weights.model.config
    chosen = with_tokenizer(weights, tokenizer, str(path)).tokenizer
    if chosen is None:
        raise UserError(
            f"{path} holds a model ({weights.layout}), but no tokenizer; say which with tokenizer=, for CLIP's and MS-CLIP's "
            "own models the merges file bpe_simple_vocab_16e6.txt.gz that OpenAI publishes beside its code"
        )
    return Loaded(weights.model.to(device), chosen, weights.preprocess, config)


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"device must be one that torch has here, such as cpu or cuda:0, got {device}: {reason}") from None


def with_tokenizer(weights: Weights, tokenizer: str | Tokenizer | None, source: str) -> Weights:
    """The same with the tokenizer that a user named, if any.

    Raises:
        UserError: it cannot be read, or has more tokens than the model's table or longer captions than its context.
    """
    config = weights.model.config
    if isinstance(tokenizer, str):
        truncation: Truncation = "official" if weights.layout == "ms_clip" else "end"
        tokenizer = Tokenizer.load(tokenizer, config.context_length, truncation)
    chosen = tokenizer or weights.tokenizer
    if chosen is not None and (chosen.vocab_size > config.vocab_size or chosen.context_length > config.context_length):
        raise UserError(
            f"the tokenizer must fit the model of {source}, which knows {config.vocab_size} tokens and captions of "
            f"{config.context_length}; got one with {chosen.vocab_size} and {chosen.context_length}"
        )
    return replace(weights, tokenizer=chosen)


def read(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Weights:
    """What `load` reads, in float32 and evaluation mode, where a tokenizer may be missing.

    Raises:
        UserError: as `load`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        local = local_copy(str(path), Path(scratch))
        file = local / MODEL if local.is_dir() else local
        header = read_metadata(file) if file.is_file() else None
        if header is None or "format" not in header or not header["format"].startswith("msclip"):
            return read_foreign(local, overrides or {})
        if overrides:
            raise UserError(
                f"{path} says itself what its model is; it cannot be read with other {', '.join(sorted(overrides))}"
            )
        return read_export(file, header, str(path))


def folder_name(step: int) -> str:
    """The name of a step's checkpoint; sorts by step."""
    return f"step_{step:08d}"


def finished(run: Folder) -> list[Folder]:
    """Complete checkpoints of a run, oldest first."""
    root = run / "checkpoints"
    return [root / name for name in root.names("step_*") if root.exists(f"{name}/{COMPLETE}")]


def newest(run: Folder) -> Folder | None:
    """The last checkpoint that training can go on from."""
    resumable = [folder for folder in finished(run) if folder.exists(OPTIMIZER)]
    return resumable[-1] if resumable else None


def read_state(checkpoint: Folder) -> dict[str, Any]:
    """Step, settings, data identity and versions of a checkpoint."""
    try:
        state = json.loads(checkpoint.read_text(STATE))
        if not (isinstance(state, dict) and isinstance(state["step"], int)):
            raise ValueError("it has no step")
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{checkpoint.url}/{STATE} is damaged ({error}); delete that folder to go on from the checkpoint before it"
        ) from None
    return state


def save(
    run: Folder,
    state: Mapping[str, Any],
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    averaged_state: Mapping[str, Tensor] | None = None,
) -> Folder:
    """Writes a checkpoint of `state["step"]`; nothing that looks finished stays behind if it fails.

    Args:
        averaged_state: the moving average of the weights, if the run keeps one.

    Raises:
        TrainingError: the storage refused (full, gone, no permission).
    """
    folder = run / "checkpoints" / folder_name(state["step"])
    try:
        _remove(folder)
        _sweep(run)
        with tempfile.TemporaryDirectory(**_beside(run)) as scratch:
            file = Path(scratch) / "tensors"
            export(file, model_state, config, tokenizer, preprocess, provenance=state)
            _move(file, folder, MODEL)
            if averaged_state:
                export(file, averaged_state, config, tokenizer, preprocess, provenance={**state, "weights": "ema"})
                _move(file, folder, EMA)
            save_file({name: t.contiguous() for name, t in optimizer_state.items()}, str(file))
            _move(file, folder, OPTIMIZER)
        folder.write_text(STATE, json.dumps(dict(state), indent=1))
        folder.write_text(COMPLETE, json.dumps({"step": state["step"]}))
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # without its marker the remains are never read
            folder.delete()
        raise TrainingError(
            f"the checkpoint of step {state['step']} could not be written to {folder.url}: {error}. Earlier checkpoints "
            "are intact; make room or change run.storage, then continue with --resume"
        ) from error
    return folder


def _beside(run: Folder) -> dict[str, Any]:
    """Scratch space on the file system of a local run, so that the finished file is moved and not copied."""
    if run.local is None:
        return {}
    run.local.mkdir(parents=True, exist_ok=True)
    return {"dir": run.local, "prefix": SCRATCH}


def _move(file: Path, folder: Folder, name: str) -> None:
    if folder.local is None:
        folder.upload(file, name)
        return
    folder.local.mkdir(parents=True, exist_ok=True)
    with file.open("rb+") as opened:  # on the disk before the marker says so, and readable like every other file of the run
        os.fsync(opened.fileno())
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
    file.replace(folder.local / name)


def _remove(checkpoint: Folder) -> None:
    """Deletes a checkpoint; its marker first, so that an interrupted deletion leaves nothing that looks whole."""
    checkpoint.delete(COMPLETE)
    checkpoint.delete()


def _sweep(run: Folder) -> None:
    """Deletes the scratch space of a process that died while it wrote."""
    for name in run.names(f"{SCRATCH}*") if run.local else []:
        run.delete(name)


def prune(run: Folder, keep: int | None, keep_optimizer: int) -> None:
    """Deletes old checkpoints beyond the newest `keep`, and optimiser states beyond the newest `keep_optimizer`."""
    checkpoints = finished(run)
    for folder in checkpoints[: -keep if keep else 0]:
        _remove(folder)
    for folder in checkpoints[-keep if keep else 0 : -keep_optimizer]:
        folder.delete(OPTIMIZER)


def load_optimizer(checkpoint: Folder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Model and optimiser tensors of a checkpoint, on the CPU."""
    return _load_tensors(checkpoint, MODEL), _load_tensors(checkpoint, OPTIMIZER)


def load_average(checkpoint: Folder) -> dict[str, Tensor]:
    """The moving average of a checkpoint's weights, on the CPU; empty where it holds none."""
    return _load_tensors(checkpoint, EMA) if checkpoint.exists(EMA) else {}


def _load_tensors(checkpoint: Folder, name: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        file = checkpoint.local / name if checkpoint.local else Path(scratch) / name
        if checkpoint.local is None:
            checkpoint.download(name, file)
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{checkpoint.url}/{name} cannot be read: {error}; delete that folder to use the one before"
            ) from None
