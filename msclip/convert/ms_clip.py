"""The official MS-CLIP key names, which are OpenAI CLIP's plus those of the stem and the branch.

There a shared tensor occurs twice, under its image and its text name; here once. Reading checks that the two copies agree,
because a file in which they do not is not the model it claims to be. Other layouts are read and written
through these names.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from msclip.config import ModelConfig
from msclip.errors import UserError
from msclip.model import Model, build
from msclip.sharing import SEPARATE, Sharing

NORM_EPS = ModelConfig.norm_eps
"""Of official MS-CLIP, and of no other program's models."""
SCALARS = ("logit_scale", "logit_bias")
PREFIX = {"image": "visual.", "text": ""}
# Ours -> official, for what is not inside a transformer block. Order matters only for readability.
PLAIN = [
    (r"^(logit_scale|logit_bias)$", r"\1"),
    (r"^image_input\.patches\.weight$", "visual.conv1.weight"),
    (r"^image_input\.patches\.(conv1|bn1|last_conv)\.", r"visual.transformer.resblocks.0.\1."),
    (r"^image_input\.(class_embedding|positional_embedding|ln_pre)", r"visual.\1"),
    (r"^text_input\.(token_embedding|positional_embedding)", r"\1"),
    (r"^resnet\.(conv|bn)(\d)\.", r"visual.\1\2."),
    (r"^resnet\.pool\.out_proj\.", "visual.attnpool.c_proj."),
    (r"^resnet\.pool\.", "visual.attnpool."),
]
RESNET_BLOCK = re.compile(r"^resnet\.stages\.(\d)\.(\d+)\.(\w+)\.(\w+)$")
RESNET_NAMES = {"skip": "downsample.0", "skip_bn": "downsample.1"}
STEM_STAGE = re.compile(r"^image_input\.patches\.stages\.(\d)\.(\w+)\.(\w+)$")
STEM_NAMES = {"conv": "conv1", "bn": "bn1", "skip": "downsample.0", "skip_bn": "downsample.1"}
BRANCH_STAGE = re.compile(r"^branch\.stages\.(\d)\.(\w+)\.(\w+)$")
BRANCH_NAMES = {"skip": "residual_conv", "skip_bn": "residual_bn"}
ADAPTER = re.compile(r"^branch\.adapters\.(\d)\.(\w+)\.(\w+)$")
ADAPTER_NAMES = {
    "branch_conv": "top2bottom_dw_conv.conv",
    "branch_bn": "top2bottom_dw_conv.bn",
    "branch_proj": "top2bottom_pw_conv.conv",
    "grid_conv": "bottom_dw_conv.conv",
    "grid_bn": "bottom_dw_conv.bn",
    "norm": "ln_adapt",
}
PAIRED = re.compile(r"^(blocks\.\d+\.[\w.]+|final_norm|projection)\.(shared|image|text)\.([\w.]+)$")


def official_names(key: str) -> list[str]:
    """The official name of one of our state-dict keys; two, image first, for a shared tensor."""
    for pattern, name in PLAIN:
        if re.match(pattern, key):
            return [re.sub(pattern, name, key)]
    if m := RESNET_BLOCK.match(key):
        return [f"visual.layer{int(m[1]) + 1}.{m[2]}.{RESNET_NAMES.get(m[3], m[3])}.{m[4]}"]
    if m := STEM_STAGE.match(key):
        return [f"visual.transformer.resblocks.0.resnet_stage.conv_{m[1]}.{STEM_NAMES[m[2]]}.{m[3]}"]
    if m := BRANCH_STAGE.match(key):
        inner = "" if m[1] == "0" else "resnet_stage.conv_0."
        return [f"visual.transformer.parallel_branch_v.{m[1]}.{inner}{BRANCH_NAMES.get(m[2], m[2])}.{m[3]}"]
    if m := ADAPTER.match(key):
        return [f"visual.transformer.parallel_lateral_adapter.{m[1]}.{ADAPTER_NAMES[m[2]]}.{m[3]}"]
    m = PAIRED.match(key)
    assert m, f"no official name for {key}"
    part, owner, leaf = m.groups()
    return [_paired_name(part, leaf, side) for side in (("image", "text") if owner == "shared" else (owner,))]


def _paired_name(part: str, leaf: str, side: str) -> str:
    if part == "final_norm":
        return f"visual.ln_post.{leaf}" if side == "image" else f"ln_final.{leaf}"
    if part == "projection":
        return "visual.proj" if side == "image" else "text_projection"
    _, layer, *module = part.split(".")
    name = ".".join(module)
    if name == "attn.in_proj":
        inner = f"attn.in_proj_{leaf}"
    elif name == "mlp":
        inner = f"mlp.c_{leaf}"
    elif name in ("ln1", "ln2"):
        inner = f"ln_{name[-1]}.{leaf}"
    else:
        inner = f"{name}.{leaf}"
    return f"{PREFIX[side]}transformer.resblocks.{layer}.{inner}"


def _to_official(key: str, tensor: Tensor) -> Tensor:
    if key.startswith("projection."):
        return tensor.T  # the official projections multiply from the right
    return tensor.reshape(()) if key in SCALARS else tensor


def to_state_dict(model: Model) -> dict[str, Tensor]:
    """The model under official names, each shared tensor twice."""
    state = model.state_dict()
    return {name: _to_official(key, state[key]) for key in state for name in official_names(key)}


def infer_config(state_dict: Mapping[str, Tensor]) -> ModelConfig:
    """The architecture that the shapes of a state dict imply.

    Head counts are not in the shapes: 64 channels a head are assumed, as in every released model; nor is the patch size of a
    stem without branch, for which 32 is. Of two models that share differently, the one is taken whose shared tensors agree.

    Raises:
        UserError: these are no names and shapes of such a model.
    """
    try:
        return _inferred(state_dict)
    except KeyError as error:
        raise UserError(f"this is not an MS-CLIP or CLIP state dict: it has no {error}") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"this is not an MS-CLIP or CLIP state dict: its shapes fit no such model ({error})") from None


def _inferred(state: Mapping[str, Tensor]) -> ModelConfig:
    vocab_size, text_width = state["token_embedding.weight"].shape
    resnet = "visual.attnpool.positional_embedding" in state
    return ModelConfig(
        **(_resnet(state) if resnet else _transformer(state)),
        text_width=text_width,
        text_layers=_depth(state, ""),
        text_heads=max(1, text_width // 64),
        embed_dim=state["text_projection"].shape[1],
        vocab_size=vocab_size,
        context_length=len(state["positional_embedding"]),
        loss="sigmoid" if "logit_bias" in state else "softmax",
    )


def _resnet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    positions, channels = state["visual.attnpool.positional_embedding"].shape
    return {
        "image_tower": "modified_resnet",
        "image_size": _grid(positions) * 32,
        "resnet_blocks": tuple(1 + max(_indices(state, f"visual.layer{stage}.")) for stage in (1, 2, 3, 4)),
        "width": channels // 32,
        "layers": 0,
        "num_heads": max(1, channels // 64),
        "stem": False,
        "branch_layers": (),
        "sharing": SEPARATE,
    }


def _transformer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    positions, width = state["visual.positional_embedding"].shape
    stem = "visual.transformer.resblocks.0.conv1.weight" in state
    branch = state.get("visual.transformer.parallel_lateral_adapter.0.top2bottom_dw_conv.conv.weight")
    kernel = 16 if branch is None else branch.shape[-1]  # of the finest adapter: one patch, at half resolution
    patch_size = 2 * kernel if stem else state["visual.conv1.weight"].shape[-1]
    layers = _depth(state, "visual.")
    return {
        "image_size": _grid(positions) * patch_size,
        "patch_size": patch_size,
        "width": width,
        "layers": layers,
        "num_heads": max(1, width // 64),
        "stem": stem,
        "branch_layers": _default_branch_layers(layers) if branch is not None else (),
        "sharing": agreeing(state),
    }


def _indices(state: Mapping[str, Tensor], prefix: str) -> set[int]:
    pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
    found = {int(m[1]) for key in state if (m := pattern.match(key))}
    if found != set(range(len(found))):  # also keeps a single name from asking for a million layers
        raise UserError(f"the layers {prefix}N have gaps, up to {max(found)}")
    return found


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return len(_indices(state, f"{prefix}transformer.resblocks."))


def _grid(positions: int) -> int:
    side = round(max(0, positions - 1) ** 0.5)
    if side < 1 or side * side + 1 != positions:
        raise ValueError(f"{positions} image positions are not a square and one")
    return side


def _default_branch_layers(layers: int) -> tuple[int, ...]:
    return (2, 4, 6, 8, 10) if layers > 10 else (1, 2, 3, 4, 5)


def agreeing(state: Mapping[str, Tensor]) -> Sharing:
    """The sharing that two towers show: the parts whose image and text copies hold the same numbers.

    A LayerNorm that still is the identity says nothing and counts as the modality's own.
    """

    def same(image: str, text: str) -> bool:
        a, b = state.get(image), state.get(text)
        return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)

    def same_norm(image: str, text: str) -> bool:
        weight, bias = state.get(f"{image}.weight"), state.get(f"{image}.bias")
        trained = weight is not None and bias is not None and bool((weight != 1).any() or bias.any())
        return trained and all(same(f"{image}.{leaf}", f"{text}.{leaf}") for leaf in ("weight", "bias"))

    def block(layer: int, part: str) -> tuple[str, str]:
        return f"visual.transformer.resblocks.{layer}.{part}", f"transformer.resblocks.{layer}.{part}"

    layers = range(min(_depth(state, "visual."), _depth(state, "")))
    attn = {i for i in layers if same(*block(i, "attn.in_proj_weight"))}
    ffn = {i for i in layers if same(*block(i, "mlp.c_fc.weight"))}
    ln1, ln2 = ({i for i in layers if same_norm(*block(i, name))} for name in ("ln_1", "ln_2"))

    def common(a: set[int], b: set[int]) -> set[int]:
        return a & b if a and b else a | b

    chosen = common(attn, ffn) or common(ln1, ln2)
    ends = replace(
        SEPARATE, final_norm=same_norm("visual.ln_post", "ln_final"), out_proj=same("visual.proj", "text_projection")
    )
    if not chosen:
        return ends
    return replace(
        ends,
        layers=_named(chosen, max(_depth(state, "visual."), _depth(state, ""))),
        attn=chosen <= attn,
        ffn=chosen <= ffn,
        ln1=chosen <= ln1,
        ln2=chosen <= ln2,
    )


def _named(layers: Set[int], depth: int) -> str:
    """Layers in the words of `Sharing.layers`, the shortest that there are."""
    if len(layers) == depth:
        return "all"
    return f"last:{len(layers)}" if min(layers) == depth - len(layers) else ",".join(map(str, sorted(layers)))


def from_state_dict(state_dict: Mapping[str, Tensor], **overrides: Any) -> Model:
    """A model from tensors under official names, in evaluation mode.

    Args:
        state_dict: as the official code saves it, shared tensors twice.
        overrides: fields of `ModelConfig` that the shapes do not tell (`branch_layers`, `num_heads`, `norm_eps=1e-5` for
            OpenAI's weights, `sharing`).

    Raises:
        UserError: keys are missing or foreign, a shape differs, or the two copies of a shared tensor disagree.
    """
    try:
        config = replace(infer_config(state_dict), **overrides)
    except TypeError as error:
        raise UserError(f"from_state_dict overrides must be fields of ModelConfig: {error}") from None
    model = build(config, device="meta")
    ours = model.state_dict()
    names = {key: official_names(key) for key in ours}
    wanted = {name for group in names.values() for name in group}
    if missing := sorted(wanted - set(state_dict)):
        raise UserError(f"the state dict lacks {len(missing)} tensors of this architecture, the first: {missing[0]}")
    if foreign := sorted(set(state_dict) - wanted):
        raise UserError(f"the state dict has {len(foreign)} tensors that this architecture lacks, the first: {foreign[0]}")
    differing = [
        " and ".join(group)
        for group in names.values()
        if len(group) == 2 and not torch.equal(state_dict[group[0]], state_dict[group[1]])
    ]
    if differing:
        raise UserError(
            f"{len(differing)} shared tensors have two copies that differ, so this is not a model with sharing "
            f"{config.sharing.layers!r}: {'; '.join(differing[:3])}"
        )
    loaded = {}
    for key, group in names.items():
        tensor = state_dict[group[0]].detach()
        expected = _to_official(key, ours[key]).shape
        if tensor.shape != expected:
            raise UserError(f"{group[0]} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")
        if tensor.is_floating_point() != ours[key].is_floating_point():
            raise UserError(f"{group[0]} must be of type {ours[key].dtype} or alike, got {tensor.dtype}")
        tensor = tensor.T if key.startswith("projection.") else tensor.reshape(ours[key].shape)
        # float32 like the parameters here; OpenAI's files are half precision.
        loaded[key] = tensor.clone().to(ours[key].dtype).contiguous()
    model.load_state_dict(loaded, assign=True)
    return model.eval()
