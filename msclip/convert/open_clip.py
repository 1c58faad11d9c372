"""open_clip's layouts: OpenAI's names, with the text tower's under `text.` in its custom-text models.

A folder has `open_clip_config.json` beside the tensors and says everything. A lone file says neither the activation nor the
heads. 64 channels a head are taken, as open_clip itself does; the activation has to be said, because the very same names and
shapes have GELU (most of open_clip's models) and QuickGELU (those named `quickgelu`, and OpenAI's saved in full precision).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msclip.config import ModelConfig
from msclip.convert.ms_clip import SCALARS, infer_config, to_state_dict
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
from msclip.errors import UserError

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
UNTOLD = "nothing in it tells its activation"
"""How the refusal of a lone file begins that could be read if its activation were said."""
HEAD_WIDTHS = {1280: 80}
"""Image towers by width whose heads do not have 64 channels: ViT-H."""

# Settings of open_clip's that change the result, with the one value that this library has.
VISION = {
    "head_width": None,
    "image_size": None,
    "layers": None,
    "width": None,
    "patch_size": None,
    "patch_dropout": None,
    "norm_kwargs": None,
    "mlp_ratio": 4.0,
    "pool_type": "tok",
}
TEXT = {
    "context_length": None,
    "vocab_size": None,
    "width": None,
    "heads": None,
    "layers": None,
    "norm_kwargs": None,
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,  # see TOKENIZER
    "pad_id": None,
    "eos_id": None,
    "mlp_ratio": 4.0,
    "pool_type": "argmax",
    "proj_type": "linear",
}
TOKENIZER = {"clean": "lower", "context_length": None}
MODEL = {
    "embed_dim": None,
    "vision_cfg": None,
    "text_cfg": None,
    "quick_gelu": None,
    "custom_text": None,
    "init_logit_scale": None,
    "init_logit_bias": None,
    "nonscalar_logit_scale": None,
}


def recognise(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of a custom-text model; the others have OpenAI's."""
    return "text.token_embedding.weight" in tensors


def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> Weights:
    """The model of such tensors.

    Args:
        config: the content of `open_clip_config.json`, where there is one; without it `overrides` must have `activation`.

    Raises:
        UserError: the configuration names what this library's towers do not do, or nothing tells the activation.
    """
    state = {name.removeprefix("text."): tensor for name, tensor in tensors.items() if not name.endswith("attn_mask")}
    state |= {name: state[name].reshape(()) for name in SCALARS if name in state and state[name].shape == (1,)}
    try:
        settings = _settings(infer_config(state), config)
        preprocess = _preprocess((config or {}).get("preprocess_cfg", {}))
    except MALFORMED as error:
        raise UserError(f"its {CONFIG} is not open_clip's: {error!r}") from None
    if config is None and "activation" not in overrides:
        raise UserError(
            f"{UNTOLD}, and with the wrong one all features would be wrong. OpenAI's models and those "
            "that open_clip names quickgelu have quick_gelu, open_clip's others gelu: say which to msclip.load, as "
            'activation="quick_gelu", or to the commands, as --activation quick_gelu (training: --model.activation)'
        )
    model = from_plain(state, config or {}, {**settings, **FRESH, **overrides})
    return Weights("open_clip", model, Preprocess(model.config.image_size, *preprocess), None)


def _settings(inferred: ModelConfig, config: Mapping[str, Any] | None) -> dict[str, Any]:
    channels = inferred.width * (32 if inferred.image_tower == "modified_resnet" else 1)
    if config is None:
        heads = max(1, channels // HEAD_WIDTHS.get(inferred.width, 64))
        return {"num_heads": heads, "norm_eps": 1e-5}
    model = config["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    parts = (
        (MODEL, model, "model_cfg"),
        (VISION, vision, "vision_cfg"),
        (TEXT, text, "text_cfg"),
        (TOKENIZER, text.get("tokenizer_kwargs") or {}, "text_cfg.tokenizer_kwargs"),
    )
    for known, part, name in parts:
        for key, value in part.items():
            wanted = known.get(key)
            if value not in (None, False, {}) and (key not in known or wanted not in (None, value)):
                raise UserError(f"its {CONFIG} has {name}.{key} {value!r}, which this library does not do")
    eps = {float((part.get("norm_kwargs") or {}).get("eps", 1e-5)) for part in (vision, text)}
    if len(eps) > 1:
        raise UserError(f"its {CONFIG} has two LayerNorm epsilons, {sorted(eps)}; this library has one for both towers")
    return {
        "num_heads": channels // int(vision.get("head_width", 64)),
        "text_heads": int(text.get("heads", 8)),
        "norm_eps": eps.pop(),
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
    }


def _preprocess(settings: Mapping[str, Any]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    settings = {name: value for name, value in settings.items() if value is not None}
    # Its size is the model's, whatever is written, and only the padding of resize_mode longest has a fill_color.
    for name, wanted in (("mode", "RGB"), ("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if settings.get(name, wanted) != wanted:
            raise UserError(f"its {CONFIG} has preprocess_cfg.{name} {settings[name]!r}; this library does {wanted}")
    mean, std = (tuple(map(float, settings.get(name, usual))) for name, usual in (("mean", CLIP_MEAN), ("std", CLIP_STD)))
    (m0, m1, m2), (s0, s1, s2) = mean, std
    return (m0, m1, m2), (s0, s1, s2)


def write(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Content of `open_clip_config.json`, and the tensors.

    Raises:
        UserError: the model has what the layout has no place for.
    """
    config = weights.model.config
    require_plain(config, "open_clip", {"loss"})
    norm = {} if config.norm_eps == 1e-5 else {"norm_kwargs": {"eps": config.norm_eps}}
    resnet = config.image_tower == "modified_resnet"
    vision = {
        "image_size": config.image_size,
        "layers": list(config.resnet_blocks) if resnet else config.layers,
        "width": config.width,
        "head_width": config.width * (32 if resnet else 1) // config.num_heads,
        "patch_size": None if resnet else config.patch_size,
        **({} if resnet else norm),
    }
    text: dict[str, Any] = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
        **norm,
    }
    if weights.tokenizer is not None:  # any name makes open_clip read the folder's own tokenizer.json
        text |= {"hf_tokenizer_name": "tokenizer.json", "tokenizer_kwargs": {"clean": "lower"}}
    model: dict[str, Any] = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
    if config.activation == "quick_gelu":
        model["quick_gelu"] = True
    if config.loss == "sigmoid":
        model["init_logit_bias"] = config.logit_bias_init  # open_clip's models have a bias where this is said
    preprocess = {
        "mean": list(weights.preprocess.mean),
        "std": list(weights.preprocess.std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess, **remark(weights)}, own_copies(to_state_dict(weights.model))
