"""Named models, each the value of one config.

The sharing spectrum differs in nothing but what is shared, so that a comparison along it means something; the rows named
`clip` also take CLIP's narrower text encoder, epsilon, temperature and token scale (arXiv 2103.00020).
"""

from dataclasses import fields, replace
from typing import Any

from msclip.config import SECTIONS, ModelConfig
from msclip.errors import UserError
from msclip.sharing import SEPARATE, Sharing

CLIP_LOGIT_SCALE = 2.6592600369327779  # ln(1/0.07)
BASE = ModelConfig(stem=False, branch_layers=(), sharing=SEPARATE)
CLIP = replace(BASE, text_width=512, text_heads=8, norm_eps=1e-5, logit_scale_init=CLIP_LOGIT_SCALE, token_std=0.02)
CLIP_LARGE = replace(CLIP, patch_size=14, width=1024, layers=24, num_heads=16, text_width=768, text_heads=12, embed_dim=768)


def _resnet(image_size: int, blocks: tuple[int, ...], width: int, embed_dim: int, text_width: int) -> ModelConfig:
    return replace(
        CLIP,
        image_tower="modified_resnet",
        image_size=image_size,
        resnet_blocks=blocks,
        width=width,
        layers=0,
        num_heads=width // 2,  # of 64 channels: the last map has 32 times the stem's
        embed_dim=embed_dim,
        text_width=text_width,
        text_heads=text_width // 64,
    )


EVERYTHING = Sharing(layers="all", ln1=True, ln2=True, final_norm=True, out_proj=True)
BRANCH = (2, 4, 6, 8, 10)
SPECTRUM: dict[str, ModelConfig] = {
    # Two encoders of equal width, so that the rows below differ from this one only in what they share.
    "separate": BASE,
    "mixed": replace(BASE, sharing=Sharing(layers="all", attn=False)),
    "hybrid": replace(BASE, sharing=Sharing(layers="all", ffn=False)),
    # All but the input embeddings. The paper finds modality-specific norms better, which is `ms_clip`.
    "shared": replace(BASE, sharing=EVERYTHING),
    "shared_ln": replace(BASE, sharing=replace(EVERYTHING, final_norm=False, out_proj=False)),
    "ms_clip": replace(BASE, sharing=Sharing(layers="all")),
    **{f"ms_clip_last{n}": replace(BASE, sharing=Sharing(layers=f"last:{n}")) for n in (11, 10, 8, 6, 4, 2)},
    "ms_clip_stem": replace(BASE, stem=True, sharing=Sharing(layers="last:11")),
    "ms_clip_branch": replace(BASE, branch_layers=BRANCH, sharing=Sharing(layers="all")),
    "ms_clip_s": ModelConfig(),
    "clip": CLIP,
}
PRESETS: dict[str, ModelConfig] = {
    **{f"{name}_b{size}": replace(config, patch_size=size) for name, config in SPECTRUM.items() for size in (32, 16)},
    "clip_l14": CLIP_LARGE,
    "clip_l14_336": replace(CLIP_LARGE, image_size=336),
    "clip_rn50": _resnet(224, (3, 4, 6, 3), 64, 1024, 512),
    "clip_rn101": _resnet(224, (3, 4, 23, 3), 64, 512, 512),
    "clip_rn50x4": _resnet(288, (4, 6, 10, 6), 80, 640, 640),
    "clip_rn50x16": _resnet(384, (6, 8, 18, 8), 96, 768, 768),
    "clip_rn50x64": _resnet(448, (3, 15, 36, 10), 128, 1024, 1024),
    "ms_clip_s_tiny": ModelConfig(
        image_size=64,
        width=64,
        layers=6,
        num_heads=2,
        text_width=64,
        text_layers=6,
        text_heads=2,
        embed_dim=32,
        vocab_size=1024,
        context_length=16,
        branch_layers=(1, 2, 3, 4, 5),
        sharing=Sharing(layers="last:5"),
    ),
}


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return sorted(PRESETS)


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The config of a named model with some of its fields replaced.

    Raises:
        UserError: an unknown name or field.
    """
    if name not in PRESETS:
        raise UserError(f"model must be one of {', '.join(list_models())}, got {name!r}")
    known = {f.name for f in fields(ModelConfig)}
    if unknown := sorted(set(overrides) - known):
        raise UserError(f"unknown model setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    for section in SECTIONS.keys() & overrides.keys():
        if isinstance(overrides[section], dict):
            overrides[section] = replace(getattr(PRESETS[name], section), **overrides[section])
    return replace(PRESETS[name], **overrides)
