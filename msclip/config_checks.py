"""What a model's configuration may not be: every combination that cannot be built, by the names a user wrote."""

import math
from dataclasses import is_dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from msclip.errors import UserError

if TYPE_CHECKING:
    from msclip.config import ModelConfig

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
RESNET_REDUCTION = 32  # input pixels a cell of a ResNet's last map


def check(config: "ModelConfig") -> None:
    """Refuses what contradicts itself or cannot be built.

    Raises:
        UserError: which settings, what they were, what would do.
    """
    check_kinds(config, "model")
    for name in ("image_size", "patch_size", "width", "text_width", "embed_dim", "vocab_size", "context_length"):
        if getattr(config, name) < 1:
            raise UserError(f"model.{name} must be at least 1, got {getattr(config, name)}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout must be from 0 to below 1, got {config.dropout}")
    if not 0 < config.norm_eps < math.inf or not 0 <= config.token_std < math.inf:
        raise UserError(
            f"model.norm_eps must be positive and model.token_std not negative, got {config.norm_eps} and {config.token_std}"
        )
    for name in ("logit_scale_init", "logit_bias_init"):
        if not math.isfinite(getattr(config, name)):
            raise UserError(f"model.{name} must be finite, got {getattr(config, name)}")
    if config.loss != "sigmoid" and config.logit_bias_init != type(config).logit_bias_init:
        raise UserError(
            f"model.logit_bias_init is a setting of model.loss sigmoid, got {config.logit_bias_init} with {config.loss}, "
            "where a bias would cancel out"
        )
    if config.image_size % config.patch_size:
        raise UserError(
            f"model.image_size must be a multiple of model.patch_size, got {config.image_size} and {config.patch_size}"
        )
    _check_towers(config)
    _check_specialisation(config)
    _check_sharing(config)
    _check_parallel(config)
    _check_finetuning(config)
    if config.text_tower == "transformer" and config.text_pool == "cls" and config.causal:
        raise UserError(
            "model.text_pool cls needs model.causal false: under the causal mask the first token sees nothing but itself"
        )
    if config.text_tower == "cbow" and (config.text_pool != "end" or not config.causal):
        raise UserError("model.text_pool and model.causal are settings of model.text_tower transformer, got cbow")


def check_kinds(section: Any, name: str) -> None:
    """Refuses values of another kind than their field's: a file's header is read without the parser that would."""
    for field, hint in get_type_hints(type(section)).items():
        value, setting = getattr(section, field), f"{name}.{field}"
        if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, hint):
            check_kinds(value, setting)
        elif not _is(value, hint):
            raise UserError(f"{setting} must be {_wanted(hint)}, got {value!r}")


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        kind, *others = get_args(hint)
        length = len(value) if others == [...] and isinstance(value, tuple | list) else 1 + len(others)
        return isinstance(value, tuple | list) and len(value) == length and all(_is(each, kind) for each in value)
    return isinstance(value, {int: Integral, float: Real}.get(hint, hint)) and (hint is bool or not isinstance(value, bool))


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is tuple:
        kind, *others = get_args(hint)
        return f"a list{'' if others == [...] else f' of {1 + len(others)}'}, each {_wanted(kind)}"
    return KINDS.get(hint, "a section of settings")


def _check_towers(config: "ModelConfig") -> None:
    resnet, cbow = config.image_tower == "modified_resnet", config.text_tower == "cbow"
    blocks = config.resnet_blocks
    if resnet != (len(blocks) == 4) or resnet != bool(blocks) or min((1, *blocks)) < 1:
        raise UserError(
            "model.resnet_blocks must be four positive numbers for model.image_tower modified_resnet and empty for vit, "
            f"got {list(blocks)} for {config.image_tower}"
        )
    if resnet and (config.layers or config.patch_size != RESNET_REDUCTION or config.stem or config.branch_layers):
        raise UserError(
            "model.image_tower modified_resnet needs model.layers 0, patch_size 32, stem false and branch_layers [], got "
            f"{config.layers}, {config.patch_size}, {config.stem} and {list(config.branch_layers)}"
        )
    if cbow and (config.text_layers or config.text_heads):
        raise UserError(
            "model.text_tower cbow needs model.text_layers 0 and model.text_heads 0, got "
            f"{config.text_layers} and {config.text_heads}"
        )
    if config.cbow_ends and not cbow:
        raise UserError("model.cbow_ends is a setting of model.text_tower cbow, got transformer")
    pooled = config.width * RESNET_REDUCTION if resnet else config.width
    for width, heads, name in ((pooled, config.num_heads, "num_heads"), (config.text_width, config.text_heads, "text_heads")):
        if not (cbow and name == "text_heads") and (heads < 1 or width % heads):
            raise UserError(f"model.{name} must divide its encoder's width {width}, got {heads}")


def _check_specialisation(config: "ModelConfig") -> None:
    if (config.stem or config.branch_layers) and (config.patch_size not in (4, 8, 16, 32) or config.width % 32):
        raise UserError(
            "model.stem and model.branch_layers need model.patch_size 4, 8, 16 or 32 and a model.width that is a "
            f"multiple of 32, got {config.patch_size} and {config.width}"
        )
    if config.adapter_bn != "after_dw" and not config.branch_layers:
        raise UserError("model.adapter_bn is a setting of the parallel branch, got after_pw with model.branch_layers []")
    first = 1 if config.stem else 0
    ordered = list(config.branch_layers) == sorted(set(config.branch_layers))
    inside = all(first <= i < config.layers for i in config.branch_layers)
    if config.branch_layers and not (len(config.branch_layers) == 5 and ordered and inside):
        raise UserError(
            f"model.branch_layers must be five ascending layers between {first} and {config.layers - 1}, "
            f"got {list(config.branch_layers)}"
        )


def _check_sharing(config: "ModelConfig") -> None:
    if not config.sharing.anything:
        return
    if config.image_tower != "vit" or config.text_tower != "transformer":
        raise UserError(
            "model.sharing needs two transformers, got model.image_tower "
            f"{config.image_tower} and model.text_tower {config.text_tower}; set model.sharing.layers none"
        )
    if config.width != config.text_width:
        raise UserError(
            f"model.sharing needs equal widths, got model.width {config.width} and model.text_width {config.text_width}; "
            "set model.sharing.layers none or make them equal"
        )
    if config.num_heads != config.text_heads:
        raise UserError(
            f"model.sharing needs equal heads, got model.num_heads {config.num_heads} and model.text_heads {config.text_heads}"
        )
    shared = config.shared_layers
    if config.stem and 0 in shared:
        raise UserError(
            "model.sharing.layers must leave out layer 0, which model.stem makes the image's own; "
            f"last:{config.layers - 1} does, got {config.sharing.layers!r}"
        )
    if shared and max(shared) >= min(config.layers, config.text_layers):
        raise UserError(
            f"model.sharing.layers must exist in both encoders, which have {config.layers} and {config.text_layers} "
            f"layers, got {config.sharing.layers!r}"
        )


def _check_parallel(config: "ModelConfig") -> None:
    for name, setting in (("parallel_ffn", config.parallel_ffn), ("parallel_attention", config.parallel_attention)):
        if setting.placement == "none":
            continue
        name = f"model.{name}"
        heads = getattr(setting, "num_heads", 1)  # of attention
        if setting.hidden < 1 or heads < 1 or setting.hidden % heads:
            raise UserError(
                f"{name}.hidden must be positive and a multiple of its positive number of heads, "
                f"got {setting.hidden} and {heads}"
            )
        if not setting.modalities or not set(setting.modalities) <= set(config.transformers):
            raise UserError(
                f"{name}.modalities must be some of those with a transformer, {list(config.transformers)}, "
                f"got {list(setting.modalities)}"
            )
        if setting.placement == "pooled":
            if setting.layers != "shared":
                raise UserError(f"{name}.layers has no meaning with {name}.placement pooled, got {setting.layers!r}")
            continue
        present = {modality for layer in config.layers_beside(setting) for modality in config.modalities_at(layer)}
        if lacking := set(setting.modalities) - present:
            raise UserError(
                f"{name}.layers {setting.layers!r} holds no layer of the {' and '.join(sorted(lacking))} encoder; "
                "name some, such as all"
            )


def _check_finetuning(config: "ModelConfig") -> None:
    if not 0 <= config.patch_dropout < 1:
        raise UserError(f"model.patch_dropout must be at least 0 and below 1, got {config.patch_dropout}")
    if config.patch_dropout and (config.branch_layers or config.image_tower != "vit"):
        raise UserError(
            "model.patch_dropout needs model.image_tower vit and model.branch_layers [], got "
            f"{config.image_tower} and {list(config.branch_layers)}"
        )
    patches = (config.image_size // config.patch_size) ** 2
    if config.patch_dropout and not 1 <= config.dropped_patches < patches:
        raise UserError(
            f"model.patch_dropout must leave out at least one of an image's {patches} patches and leave one, got "
            f"{config.patch_dropout}, which comes to {config.dropped_patches}"
        )
    if config.checkpoint_blocks and not config.depth:
        raise UserError("model.checkpoint_blocks needs a transformer, got a ResNet and a bag of words")
    _ = config.freezes  # refuses what it cannot read
