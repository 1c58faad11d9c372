"""What a checkpoint holds, and when it counts.

A checkpoint is a folder: `model.safetensors` (the export, all that evaluation needs: float32 weights with config, tokenizer
and preprocessing in its header), `optimizer.safetensors` and `state.json` for resuming, and `COMPLETE`, written last. A folder
without that marker is the remains of a crash and is never read. Tensors carry our parameter names and are whole, so a run
goes on under another ZeRO stage and another number of workers.
"""

import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from msclip.config import ModelConfig
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.errors import TrainingError, UserError
from msclip.model import Model, build
from msclip.storage import Folder

FORMAT = "msclip/1"
MODEL, OPTIMIZER, STATE, COMPLETE = "model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"


class Loaded(NamedTuple):
    """Everything needed to encode raw images and captions."""

    model: Model
    tokenizer: Tokenizer
    preprocess: Preprocess
    config: ModelConfig


def export(
    path: str | Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes one self-contained safetensors file.

    Args:
        path: a local file.
        state: the model's state dict; floating-point tensors are stored as they are.
        provenance: plain values on where the weights come from (step, data, versions); shown, never interpreted.
    """
    header = {
        "format": FORMAT,
        "model": json.dumps(config.to_dict()),
        "tokenizer": tokenizer.to_json(),
        "preprocess": json.dumps(preprocess.to_dict()),
        "provenance": json.dumps(dict(provenance or {})),
    }
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, str(path), metadata=header)


def load(path: str | Path, device: torch.device | str = "cpu") -> Loaded:
    """Reads an exported file.

    Args:
        path: the file, or a checkpoint folder that holds one; local or a URL.
        device: where the model goes; it comes in evaluation mode.

    Raises:
        UserError: there is no such file, or it is damaged or of another kind.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = _local_copy(str(path), Path(scratch))
        header, tensors = _read(file)
        try:
            config = ModelConfig.from_dict(json.loads(header["model"]))
            tokenizer = Tokenizer.from_json(header["tokenizer"])
            preprocess = Preprocess.from_dict(json.loads(header["preprocess"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} was written by another version of msclip: {error!r} in its header") from error
        model = build(config, device="meta")
        load_weights(model, tensors, str(path))
    return Loaded(model.to(device).eval(), tokenizer, preprocess, config)


def load_weights(model: Model, tensors: Mapping[str, Tensor], source: str) -> None:
    """Puts `tensors` into `model` (which may be on the meta device) after checking names and shapes.

    Raises:
        UserError: they belong to another architecture; the message names the first difference.
    """
    expected = model.state_dict()
    if names := sorted(expected.keys() ^ tensors.keys()):
        side = "lacks" if names[0] in expected else "has, but the configured model does not,"
        raise UserError(f"{source} is of another architecture: it {side} {names[0]} ({len(names)} names differ)")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{source} is of another architecture: {name} is {tuple(tensor.shape)} there "
                f"and {tuple(expected[name].shape)} in the configured model"
            )
    model.load_state_dict(dict(tensors), assign=True)


def _local_copy(path: str, scratch: Path) -> Path:
    if "://" not in path:
        local = Path(path)
        local = local / MODEL if local.is_dir() else local
        if not local.is_file():
            raise UserError(f"there is no exported model at {path}; give a {MODEL} or a checkpoint folder that holds one")
        return local
    location, mark, query = path.partition("?")
    folder, name = Folder(path), MODEL
    if location.endswith(".safetensors"):
        parent, _, name = location.rpartition("/")
        folder = Folder(parent + mark + query)
    try:
        folder.download(name, scratch / MODEL)
    except FileNotFoundError:
        raise UserError(f"there is no exported model at {path}") from None
    return scratch / MODEL


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable safetensors file (damaged or cut short?): {error}") from None
    if header.get("format") != FORMAT:
        raise UserError(f"{file} is a safetensors file, but not one exported by msclip ({FORMAT})")
    return header, load_file(file)


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
    state = json.loads(checkpoint.read_text(STATE))
    assert isinstance(state, dict)
    return state


def save(
    run: Folder,
    state: Mapping[str, Any],
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    preprocess: Preprocess,
) -> Folder:
    """Writes a checkpoint of `state["step"]`; nothing that looks finished stays behind if it fails.

    Raises:
        TrainingError: the storage refused (full, gone, no permission).
    """
    folder = run / "checkpoints" / folder_name(state["step"])
    try:
        folder.delete()
        with tempfile.TemporaryDirectory(**_beside(run)) as scratch:
            file = Path(scratch) / "tensors"
            export(file, model_state, config, tokenizer, preprocess, provenance=state)
            _move(file, folder, MODEL)
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
    return {"dir": run.local, "prefix": ".checkpoint-"}


def _move(file: Path, folder: Folder, name: str) -> None:
    if folder.local is None:
        folder.upload(file, name)
        return
    folder.local.mkdir(parents=True, exist_ok=True)
    file.replace(folder.local / name)


def prune(run: Folder, keep: int | None, keep_optimizer: int) -> None:
    """Deletes old checkpoints beyond the newest `keep`, and optimiser states beyond the newest `keep_optimizer`."""
    checkpoints = finished(run)
    for folder in checkpoints[: -keep if keep else 0]:
        folder.delete(COMPLETE)  # first, so that an interrupted deletion leaves nothing that looks whole
        folder.delete()
    for folder in checkpoints[-keep if keep else 0 : -keep_optimizer]:
        folder.delete(OPTIMIZER)


def load_optimizer(checkpoint: Folder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Model and optimiser tensors of a checkpoint, on the CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        tensors = []
        for name in (MODEL, OPTIMIZER):
            file = checkpoint.local / name if checkpoint.local else Path(scratch) / name
            if checkpoint.local is None:
                checkpoint.download(name, file)
            try:
                tensors.append(load_file(file))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{checkpoint.url}/{name} cannot be read: {error}; delete that folder to use the one before"
                ) from None
    return tensors[0], tensors[1]
