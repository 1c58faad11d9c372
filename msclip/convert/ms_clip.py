"""The official MS-CLIP key names, which are OpenAI CLIP's plus those of the stem and the branch.

There a shared tensor occurs twice, under its image and its text name; here once. Reading checks that the two copies agree,
because a file in which they do not is not the model it claims to be.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from msclip.config import ModelConfig
from msclip.errors import UserError
from msclip.model import Model, build
from msclip.sharing import Sharing

PREFIX = {"image": "visual.", "text": ""}
# Ours -> official, for what is not inside a transformer block. Order matters only for readability.
PLAIN = [
    (r"^logit_scale$", "logit_scale"),
    (r"^image_input\.patches\.weight$", "visual.conv1.weight"),
    (r"^image_input\.patches\.(conv1|bn1|last_conv)\.", r"visual.transformer.resblocks.0.\1."),
    (r"^image_input\.(class_embedding|positional_embedding|ln_pre)", r"visual.\1"),
    (r"^text_input\.(token_embedding|positional_embedding)", r"\1"),
]
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
    return tensor.reshape(()) if key == "logit_scale" else tensor


def to_state_dict(model: Model) -> dict[str, Tensor]:
    """The model under official names, each shared tensor twice."""
    state = model.state_dict()
    return {name: _to_official(key, state[key]) for key in state for name in official_names(key)}


def infer_config(state_dict: Mapping[str, Tensor]) -> ModelConfig:
    """The architecture that the shapes of an official state dict imply.

    Head counts are not in the shapes: 64 channels a head are assumed, as in every released model. Of two models without stem
    and branch that share differently, the one is taken whose shared tensors agree.
    """
    try:
        width, embed_dim = state_dict["visual.proj"].shape
        vocab_size, text_width = state_dict["token_embedding.weight"].shape
        context_length = len(state_dict["positional_embedding"])
        grid = round((len(state_dict["visual.positional_embedding"]) - 1) ** 0.5)
    except KeyError as error:
        raise UserError(f"this is not an MS-CLIP or CLIP (ViT) state dict: it has no {error}") from None
    stem = "visual.transformer.resblocks.0.conv1.weight" in state_dict
    branch = state_dict.get("visual.transformer.parallel_lateral_adapter.0.top2bottom_dw_conv.conv.weight")
    kernel = 16 if branch is None else branch.shape[-1]  # of the finest adapter: one patch, at half resolution
    patch_size = 2 * kernel if stem else state_dict["visual.conv1.weight"].shape[-1]

    def depth(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
        return 1 + max((int(m[1]) for key in state_dict if (m := pattern.match(key))), default=-1)

    layers = depth("visual.")
    sharing = Sharing(layers=f"last:{layers - 1}") if stem else _agreeing(state_dict, layers)
    return ModelConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        num_heads=max(1, width // 64),
        text_width=text_width,
        text_layers=depth(""),
        text_heads=max(1, text_width // 64),
        embed_dim=embed_dim,
        vocab_size=vocab_size,
        context_length=context_length,
        stem=stem,
        branch_layers=_default_branch_layers(layers) if branch is not None else (),
        sharing=sharing,
    )


def _default_branch_layers(layers: int) -> tuple[int, ...]:
    return (2, 4, 6, 8, 10) if layers > 10 else (1, 2, 3, 4, 5)


def _agreeing(state_dict: Mapping[str, Tensor], layers: int) -> Sharing:
    """The parts and layers whose image and text copies hold the same matrix."""

    def same(layer: int, inner: str) -> bool:
        a, b = (state_dict.get(f"{prefix}transformer.resblocks.{layer}.{inner}") for prefix in ("visual.", ""))
        return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)

    attn = [i for i in range(layers) if same(i, "attn.in_proj_weight")]
    ffn = [i for i in range(layers) if same(i, "mlp.c_fc.weight")]
    chosen = sorted({*attn, *ffn})
    if not chosen:
        return Sharing(layers="none", attn=False, ffn=False)
    spelled = "all" if len(chosen) == layers else ",".join(map(str, chosen))
    return Sharing(layers=spelled, attn=bool(attn), ffn=bool(ffn))


def from_state_dict(state_dict: Mapping[str, Tensor], **overrides: Any) -> Model:
    """A model from tensors under official names.

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
        tensor = tensor.T if key.startswith("projection.") else tensor.reshape(ours[key].shape)
        # float32 like the parameters here; OpenAI's files are half precision.
        loaded[key] = tensor.clone().to(ours[key].dtype).contiguous()
    model.load_state_dict(loaded, assign=True)
    return model.eval()
