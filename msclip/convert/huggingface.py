"""Hugging Face `CLIPModel` folders: config.json, the tensors, the preprocessing and the tokenizer.

Queries, keys and values are three matrices there, projections are transposed, and the vision tower's first LayerNorm is
misspelled. Old configurations say that the end token is 2: captions are pooled at their largest id whatever they say.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msclip.convert.ms_clip import to_state_dict
from msclip.convert.weights import (
    CLIP_MEAN,
    CLIP_STD,
    FRESH,
    MALFORMED,
    Weights,
    from_plain,
    own_copies,
    remark,
    require_plain,
)
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError

CONFIG = "config.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER, MERGES = "tokenizer.json", "merges.txt"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
BICUBIC = 3  # as Pillow numbers it
PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
"""Those whose defaults are CLIP's."""

PLAIN = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
TRANSPOSED = ("visual.proj", "text_projection")
BLOCK = re.compile(r"^(visual\.|)transformer\.resblocks\.(\d+)\.(.+)$")
TOWERS = {"visual.": "vision_model", "": "text_model"}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
PARTS = ("q", "k", "v")


def recognise(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has this layout's names."""
    return any(name.startswith(("vision_model.", "text_model.")) for name in tensors)


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names; what is not known keeps its own, for the error message."""
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    renamed = {ours: state.pop(theirs) for ours, theirs in PLAIN.items() if theirs in state}
    renamed |= {name: renamed[name].T for name in TRANSPOSED if name in renamed}
    for prefix, tower in TOWERS.items():
        pattern = re.compile(rf"^{tower}\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
        inner = {theirs: ours for ours, theirs in IN_BLOCK.items()}
        for name in list(state):
            if not (m := pattern.match(name)):
                continue
            layer, module, leaf = m.groups()
            block = f"{prefix}transformer.resblocks.{layer}."
            if module in inner:
                renamed[f"{block}{inner[module]}.{leaf}"] = state.pop(name)
            elif module == "self_attn.q_proj":
                names = [name.replace("q_proj", f"{part}_proj") for part in PARTS]
                if all(n in state for n in names):
                    renamed[f"{block}attn.in_proj_{leaf}"] = torch.cat([state.pop(n) for n in names])
    return {**renamed, **state}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_official`."""
    renamed = {}
    for name, tensor in state.items():
        if name in PLAIN:
            renamed[PLAIN[name]] = tensor.T if name in TRANSPOSED else tensor
            continue
        m = BLOCK.match(name)
        assert m, f"no name for {name} in this layout"
        block = f"{TOWERS[m[1]]}.encoder.layers.{m[2]}."
        if m[3].startswith("attn.in_proj_"):
            leaf = m[3].removeprefix("attn.in_proj_")
            for part, rows in zip(PARTS, tensor.chunk(3), strict=True):
                renamed[f"{block}self_attn.{part}_proj.{leaf}"] = rows
        else:
            module, _, leaf = m[3].rpartition(".")
            renamed[f"{block}{IN_BLOCK[module]}.{leaf}"] = tensor
    return renamed


def read(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    overrides: Mapping[str, Any],
) -> Weights:
    """The model of a folder.

    Args:
        config: the content of config.json.
        preprocessor: the content of preprocessor_config.json; empty for CLIP's own preprocessing.

    Raises:
        UserError: the configuration names what this library's towers do not do.
    """
    try:
        settings = _settings(config)
    except MALFORMED as error:
        raise UserError(f"its {CONFIG} is not that of a CLIPModel: {error!r}") from None
    model = from_plain(to_official(tensors), config, {**settings, **FRESH, **overrides})
    try:
        preprocess = _preprocess(preprocessor, model.config.image_size)
    except MALFORMED as error:
        raise UserError(f"its {PREPROCESSOR} is not that of a CLIPModel: {error!r}") from None
    return Weights("huggingface", model, preprocess, tokenizer)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("model_type") != "clip":
        raise UserError(f"its {CONFIG} has model_type {config.get('model_type')!r}; of Hugging Face models, clip can be read")
    # Where both are there, the library takes the second over the first.
    vision, text = ({**(config.get(f"{t}_config") or {}), **(config.get(f"{t}_config_dict") or {})} for t in ("vision", "text"))
    eps = {float(tower.get("layer_norm_eps", 1e-5)) for tower in (vision, text)}
    activations = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
    if len(eps) > 1 or len(activations) > 1:
        raise UserError(f"its {CONFIG} has other LayerNorm epsilons or activations for images than for text; here they are one")
    activation = activations.pop()
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"its {CONFIG} has hidden_act {activation!r}; this library has quick_gelu and gelu")
    return {
        "num_heads": int(vision.get("num_attention_heads", 12)),
        "text_heads": int(text.get("num_attention_heads", 8)),
        "norm_eps": eps.pop(),
        "activation": activation,
    }


def _preprocess(settings: Mapping[str, Any], image_size: int) -> Preprocess:
    settings = {name: value for name, value in settings.items() if value is not None}
    done: dict[str, tuple[Any, ...]] = {
        "image_processor_type": PROCESSORS,
        "feature_extractor_type": PROCESSORS,
        "resample": (BICUBIC,),
        "size": (image_size, {"shortest_edge": image_size}),  # both sides given, it would distort the image
        "crop_size": (image_size, {"height": image_size, "width": image_size}),
        "do_pad": (False,),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
    }
    for name, values in done.items():
        if name in settings and settings[name] not in values:
            does = " or ".join(map(str, values)) + " (bicubic)" * (name == "resample")
            raise UserError(f"its {PREPROCESSOR} has {name} {settings[name]!r}; this library does {does}")
    if not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise UserError(f"its {PREPROCESSOR} has rescale_factor {settings['rescale_factor']!r}; this library divides by 255")
    m0, m1, m2 = map(float, settings.get("image_mean", CLIP_MEAN))
    s0, s1, s2 = map(float, settings.get("image_std", CLIP_STD))
    return Preprocess(image_size, (m0, m1, m2), (s0, s1, s2))


def write(weights: Weights) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Files of JSON by name, and the tensors.

    Raises:
        UserError: the model has what the layout has no place for.
    """
    config = weights.model.config
    require_plain(config, "huggingface")
    if config.image_tower != "vit":
        raise UserError(
            "a model with model.image_tower modified_resnet cannot be written as huggingface: a CLIPModel has no ResNet. "
            "--to openai and open_clip hold it"
        )
    common = {"hidden_act": config.activation, "layer_norm_eps": config.norm_eps, "projection_dim": config.embed_dim}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.layers,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        **common,
    }
    tokenizer = weights.tokenizer
    text = {
        "model_type": "clip_text_model",
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "num_attention_heads": config.text_heads,
        "num_hidden_layers": config.text_layers,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": config.vocab_size - 2 if tokenizer is None else tokenizer.start_id,
        "eos_token_id": config.vocab_size - 1 if tokenizer is None else tokenizer.end_id,
        "pad_token_id": 0,
        **common,
    }
    files: dict[str, dict[str, Any]] = {
        CONFIG: {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.embed_dim,
            "logit_scale_init_value": config.logit_scale_init,
            "vision_config": vision,
            "text_config": text,
            **remark(weights),
        },
        PREPROCESSOR: {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": config.image_size},
            "resample": BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": config.image_size, "width": config.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(weights.preprocess.mean),
            "image_std": list(weights.preprocess.std),
        },
    }
    tensors = from_official(to_state_dict(weights.model))
    return {**files, **({} if tokenizer is None else tokenizer_files(tokenizer))}, own_copies(tensors)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """tokenizer.json and its companion.

    Lower case and single spaces become part of the file. The mending of mojibake and HTML entities cannot: do that before. Nor
    can cutting the end token off long captions: `remark` keeps it for us, and other programs keep the end token.
    """
    library = json.loads(tokenizer.to_json())["tokenizer"]
    library["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Lowercase"},
        ],
    }
    names = {i: token for token, i in library["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in library["added_tokens"]}
    return {
        TOKENIZER: library,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": tokenizer.context_length,
            "bos_token": names[tokenizer.start_id],
            "eos_token": names[tokenizer.end_id],
            "pad_token": names[0],
            "clean_up_tokenization_spaces": False,
        },
    }
