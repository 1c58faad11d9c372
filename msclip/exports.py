"""One file that holds a model with all it needs: float32 weights, and in the header config, tokenizer and preprocessing.

A header is text that anybody may have edited, so each value is held against the type of its setting, the settings against one
another and the tensors against the model that they describe, before anything of the claimed size is made.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from msclip.config import ModelConfig
from msclip.config_checks import check_kinds
from msclip.convert.weights import Weights
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError
from msclip.model import Model, build

FORMAT = "msclip/1"


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


def read_export(file: Path, header: Mapping[str, str], source: str) -> Weights:
    """What `export` wrote, in evaluation mode.

    Args:
        header: the file's own, as it was read to tell what the file is.
        source: what the user calls the file.

    Raises:
        UserError: of another version, or header and tensors contradict themselves or each other; the message names where.
    """
    tensors = load_file(file)
    try:
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}")
        config = ModelConfig.from_dict(json.loads(header["model"]))
        tokenizer = Tokenizer.from_json(header["tokenizer"])
        settings = json.loads(header["preprocess"])
        if missing := [f.name for f in fields(Preprocess) if f.name not in settings]:  # a default would be a guess
            raise UserError(f"it has no preprocess.{missing[0]}")
        preprocess = Preprocess.from_dict(settings)
        check_kinds(preprocess, "preprocess")
        if preprocess.image_size != config.image_size:
            raise UserError(f"preprocess.image_size is {preprocess.image_size} and model.image_size {config.image_size}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} was written by another version of msclip: {error!r} in its header") from error
    except UserError as error:
        raise UserError(f"{source} is refused: its header is not that of a model: {error}") from None
    if config.depth + sum(config.resnet_blocks) > len(tensors):  # before a model of that depth is laid out
        raise UserError(f"{source} is refused: its header claims {config.depth} layers, but it holds {len(tensors)} tensors")
    try:
        model = build(config, device="meta")
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source} is refused: no model has the sizes that its header claims ({reason})") from error
    load_weights(model, tensors, source)
    return Weights("msclip", model.eval(), preprocess, tokenizer)


def load_weights(model: Model, tensors: Mapping[str, Tensor], source: str) -> None:
    """Puts `tensors` into `model` (which may be on the meta device) after checking names, shapes and kinds of numbers.

    What is stored in fewer bits becomes float32 like every parameter here; BatchNorm's counters stay whole numbers.

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
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise UserError(f"{source} is refused: {name} must be of type {expected[name].dtype} or alike, got {tensor.dtype}")
    model.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}, assign=True)
