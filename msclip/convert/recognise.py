"""Which of the known layouts a file or folder has, by its contents; its name and ending say nothing.

A stem or a branch is official MS-CLIP's alone. A lone state dict of two plain towers is OpenAI's where it has OpenAI's marks
and MS-CLIP's where it has ours, and taken for open_clip's otherwise: then its activation has to be said. That its towers share
tells nothing, because any model that only shares can be written in every layout.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from msclip.convert import huggingface, ms_clip, open_clip, openai
from msclip.convert.archive import Archive, read_archive
from msclip.convert.ms_clip import NORM_EPS
from msclip.convert.weights import Weights, said_truncation
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer, Truncation
from msclip.errors import UserError

INDEX = "model.safetensors.index.json"
FOLDER_FILES = (
    open_clip.CONFIG,
    *open_clip.WEIGHTS,
    huggingface.CONFIG,
    *huggingface.WEIGHTS,
    INDEX,
    huggingface.PREPROCESSOR,
    huggingface.PROCESSOR,
    huggingface.TOKENIZER,
    huggingface.MERGES,
)
"""All that is read of another program's folder, besides the parts that an index names."""
MAX_CONFIG_BYTES = 2**24


def read(path: Path, overrides: Mapping[str, Any]) -> Weights:
    """The model in a local file or folder that another program wrote.

    Args:
        overrides: fields of `ModelConfig` that it does not tell, or tells wrongly.

    Raises:
        UserError: damaged, of an unknown kind, or of an architecture that this library does not have.
    """
    try:
        if path.is_dir():
            return _read_folder(path, overrides)
        if path.name in open_clip.WEIGHTS and (path.parent / open_clip.CONFIG).is_file():
            return _read_folder(path.parent, overrides)
        archive = read_archive(path)
        if huggingface.recognise(archive.tensors):
            return _read_huggingface(path.parent, archive, overrides)
        return _read_lone(archive, overrides)
    except UserError as error:
        message = str(error)
        raise UserError(message if str(path) in message else f"cannot read {path}: {message}") from error


def _read_lone(archive: Archive, overrides: Mapping[str, Any]) -> Weights:
    tensors = archive.tensors
    own = any(name.startswith("visual.transformer.resblocks.0.conv1.") or ".parallel_branch_v." in name for name in tensors)
    if own or archive.metadata.get("layout") == "ms_clip":
        return _read_ms_clip(archive, overrides)
    if archive.kind == "torchscript" or openai.recognise(tensors):
        return openai.read(tensors, overrides)
    if open_clip.recognise(tensors):
        return open_clip.read(tensors, None, overrides)
    shares = "visual.class_embedding" in tensors and ms_clip.agreeing(tensors).anything
    if shares and overrides.get("norm_eps") == NORM_EPS:
        return _read_ms_clip(archive, overrides)
    if shares and "activation" not in overrides:
        raise UserError(
            "its two towers share, and nothing in it tells whose they are; with the wrong activation, epsilon and pixels all "
            'features would be wrong. Of a model for open_clip say activation="gelu" or "quick_gelu" to msclip.load, or '
            "--activation to the commands (training: --model.activation); of official MS-CLIP without stem and branch, "
            f"norm_eps={NORM_EPS:g} to msclip.load"
        )
    if "token_embedding.weight" in tensors:
        return open_clip.read(tensors, None, overrides)
    raise UserError(
        f"it holds {len(tensors)} tensors, the first {next(iter(tensors))}, and no layout known here: "
        "msclip, official MS-CLIP, OpenAI CLIP, open_clip (CLIP class) or a Hugging Face CLIPModel"
    )


def _read_ms_clip(archive: Archive, overrides: Mapping[str, Any]) -> Weights:
    model = ms_clip.from_state_dict(archive.tensors, **overrides)
    return Weights("ms_clip", model, Preprocess(model.config.image_size), None)


def _read_folder(folder: Path, overrides: Mapping[str, Any]) -> Weights:
    if (folder / open_clip.CONFIG).is_file():
        file = _first(folder, open_clip.WEIGHTS)
        config = _json(folder / open_clip.CONFIG)
        weights = open_clip.read(read_archive(file).tensors, config, overrides)
        return replace(weights, tokenizer=_tokenizer(folder, weights.model.config.context_length, said_truncation(config)))
    if not (folder / huggingface.CONFIG).is_file():
        raise UserError(
            f"it is a folder with neither a model.safetensors of msclip's nor {open_clip.CONFIG} or {huggingface.CONFIG}"
        )
    if (folder / INDEX).is_file() and not any((folder / name).is_file() for name in huggingface.WEIGHTS):
        parts = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
        if not parts or any(Path(part).name != part for part in parts):
            raise UserError(f"its {INDEX} must name files of the same folder")
        tensors = {}
        for part in parts:
            tensors.update(read_archive(_first(folder, (part,))).tensors)
        return _read_huggingface(folder, Archive("safetensors", tensors), overrides)
    return _read_huggingface(folder, read_archive(_first(folder, huggingface.WEIGHTS)), overrides)


def _read_huggingface(folder: Path, archive: Archive, overrides: Mapping[str, Any]) -> Weights:
    if not (folder / huggingface.CONFIG).is_file():
        raise UserError(f"its names are those of a Hugging Face CLIPModel, which needs its {huggingface.CONFIG} beside it")
    config = _json(folder / huggingface.CONFIG)
    preprocessor: dict[str, Any] = {}
    if (folder / huggingface.PREPROCESSOR).is_file():
        preprocessor = _json(folder / huggingface.PREPROCESSOR)
    elif (folder / huggingface.PROCESSOR).is_file():
        preprocessor = _json(folder / huggingface.PROCESSOR).get("image_processor") or {}
    context = archive.tensors.get("text_model.embeddings.position_embedding.weight")
    tokenizer = None if context is None else _tokenizer(folder, len(context), said_truncation(config))
    return huggingface.read(archive.tensors, config, preprocessor, tokenizer, overrides)


def _tokenizer(folder: Path, context_length: int, truncation: Truncation) -> Tokenizer | None:
    for name in (huggingface.TOKENIZER, huggingface.MERGES):
        if (folder / name).is_file():
            return Tokenizer.load(str(folder / name), context_length, truncation)
    return None


def _first(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"it has a configuration, but none of {', '.join(names)} beside it")


def _json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"its {file.name} is {file.stat().st_size} bytes long, which no configuration is")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"its {file.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"its {file.name} must hold a JSON object")
    return values
