"""OpenAI's CLIP files (arXiv 2103.00020): TorchScript archives, or the state dicts taken from them.

Half precision for matrices and full for the rest, and three numbers beside the weights that the shapes already say. Names are
those of `ms_clip`; epsilon and activation are not in the file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msclip.convert.ms_clip import from_state_dict, to_state_dict
from msclip.convert.weights import CLIP_MEAN, CLIP_STD, FRESH, Weights, require_implied, require_plain
from msclip.data.images import Preprocess
from msclip.errors import UserError

SCALARS = ("input_resolution", "context_length", "vocab_size")
IMPLIED = {"norm_eps": 1e-5, "activation": "quick_gelu"}


def recognise(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has a mark of OpenAI's: the three numbers, or half precision in matrices only."""
    types = [tensors[name].dtype for name in ("text_projection", "token_embedding.weight") if name in tensors]
    return any(name in tensors for name in SCALARS) or types == [torch.float16, torch.float32]


def read(tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> Weights:
    """The model of such tensors."""
    state = {name: tensor for name, tensor in tensors.items() if name not in SCALARS and not name.endswith("attn_mask")}
    model = from_state_dict(state, **{**IMPLIED, **FRESH, **overrides})
    said = tensors.get("input_resolution")
    if said is not None and (said.numel() != 1 or int(said) != model.config.image_size):
        raise UserError(
            f"its input_resolution is {said.tolist()}, but its positions are those of {model.config.image_size} pixels"
        )
    return Weights("openai", model, Preprocess(model.config.image_size, CLIP_MEAN, CLIP_STD), None)


def write(weights: Weights) -> dict[str, Tensor]:
    """The state dict, with the three numbers.

    Raises:
        UserError: the model has what the layout has no place for.
    """
    config = weights.model.config
    require_plain(config, "openai")
    require_implied(weights, "openai", IMPLIED, Preprocess(mean=CLIP_MEAN, std=CLIP_STD))
    numbers = dict(zip(SCALARS, (config.image_size, config.context_length, config.vocab_size), strict=True))
    return {**to_state_dict(weights.model), **{name: torch.tensor(value) for name, value in numbers.items()}}
