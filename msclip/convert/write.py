"""Any model to any layout that has room for it; what is there is never overwritten, and nothing half-written stays."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from msclip.convert import huggingface, ms_clip, open_clip, openai
from msclip.convert.archive import marked
from msclip.convert.weights import Layout, Weights, require_implied, require_settings
from msclip.data.images import Preprocess
from msclip.errors import UserError
from msclip.exports import export
from msclip.model import build

MS_CLIP_IMPLIED = {"norm_eps": ms_clip.NORM_EPS, "activation": "quick_gelu"}


def write(weights: Weights, path: Path, layout: Layout) -> None:
    """Writes a model.

    Args:
        path: what is made: a folder for open_clip and huggingface, a file for the others.

    Raises:
        UserError: the path exists, the storage refuses, or the layout has no place for this model.
    """
    if path.exists():
        raise UserError(f"{path} exists already; it is not overwritten")
    try:
        # In the nearest folder that is there: missing ones are made for a finished model alone.
        scratch = Path(tempfile.mkdtemp(prefix=".convert-", dir=next(p for p in path.parents if p.exists())))
        try:
            _write(weights, scratch / "model", layout)
            path.parent.mkdir(parents=True, exist_ok=True)
            (scratch / "model").rename(path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be written: {error}") from error


def _write(weights: Weights, target: Path, layout: Layout) -> None:
    config = weights.model.config
    if layout == "msclip":
        if weights.tokenizer is None:
            raise UserError("an msclip export holds its tokenizer, and the input has none; name it with --tokenizer")
        export(target, weights.model.state_dict(), config, weights.tokenizer, weights.preprocess, {"from": weights.layout})
    elif layout == "ms_clip":
        _save(marked(_ms_clip(weights), layout="ms_clip"), target)
    elif layout == "openai":
        _save(openai.write(weights), target)
    elif layout == "open_clip":
        settings, tensors = open_clip.write(weights)
        files = {open_clip.CONFIG: settings}
        if weights.tokenizer is not None:
            files |= huggingface.tokenizer_files(weights.tokenizer)
        _save_folder(target, files, tensors, open_clip.WEIGHTS[0])
    else:
        files, tensors = huggingface.write(weights)
        _save_folder(target, files, tensors, huggingface.WEIGHTS[0])


def _ms_clip(weights: Weights) -> dict[str, Tensor]:
    config = weights.model.config
    require_settings(config, "ms_clip", {"stem", "branch_layers"})
    if not (config.stem or config.branch_layers or config.sharing.anything):
        raise UserError(
            "the ms_clip layout is for models with a stem, a branch or sharing, and this one has none: read back, it would be "
            "taken for another program's. --to openai, open_clip and huggingface hold models like it"
        )
    if config.stem and not config.branch_layers and config.patch_size != 32:
        raise UserError(
            "the ms_clip layout holds tensors alone, and those of a stem are the same for every patch size: without a branch, "
            f"whose tensors tell it, model.patch_size 32 would be read instead of {config.patch_size}. --to msclip holds "
            "every model"
        )
    require_implied(weights, "ms_clip", MS_CLIP_IMPLIED, Preprocess())
    tensors = ms_clip.to_state_dict(weights.model)
    told = ms_clip.infer_config(tensors)
    if build(told, device="meta").state_dict().keys() != weights.model.state_dict().keys():
        raise UserError(
            "the ms_clip layout holds tensors alone: equal copies tell what is shared, of a LayerNorm once trained. Those "
            f"of this model would tell {told.sharing}, and it has {config.sharing}. --to msclip holds every model"
        )
    return tensors


def _save(tensors: dict[str, Tensor], target: Path) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().cpu().contiguous()
    torch.save(tensors, target)


def _save_folder(target: Path, files: dict[str, dict[str, Any]], tensors: dict[str, Tensor], name: str) -> None:
    target.mkdir()
    for file, values in files.items():
        (target / file).write_text(json.dumps(values, indent=1, ensure_ascii=False))
    save_file(tensors, str(target / name), metadata={"format": "pt"})
