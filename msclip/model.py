"""MS-CLIP and MS-CLIP-S (arXiv 2207.12661) and CLIP (arXiv 2103.00020), as values of one config.

Training goes through `forward`, which sends images and packed captions through the encoder in one joint stream;
`encode_image` and `encode_text` send one modality through the same modules and give the same numbers.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from msclip.blocks import Block
from msclip.branch import ParallelBranch
from msclip.errors import UserError
from msclip.sharing import SEPARATE, Modality, Paired, Sharing
from msclip.stem import Stem
from msclip.tokens import PackedText, Tokens, pack


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and sharing of a model; the defaults are MS-CLIP-S B/32."""

    image_size: int = 224
    """Side of the square input, pixels."""
    patch_size: int = 32
    """Side of the square that becomes one token, pixels; strides and kernels of stem and branch follow from it."""
    width: int = 768
    """Channels of an image token."""
    layers: int = 12
    """Depth of the image encoder; with `stem` the first of these is the stem."""
    num_heads: int = 12
    """Attention heads of the image encoder."""
    text_width: int = 768
    """Channels of a text token; where anything is shared it must equal `width`."""
    text_layers: int = 12
    """Depth of the text encoder."""
    text_heads: int = 12
    """Attention heads of the text encoder."""
    embed_dim: int = 512
    """Size of the common embedding space."""
    vocab_size: int = 49408
    """Ids the token table has; the tokenizer's must not exceed it."""
    context_length: int = 77
    """Longest caption in tokens, start and end included."""
    stem: bool = True
    """Early specialisation: a residual CNN instead of patch embedding and image layer 0."""
    branch_layers: tuple[int, ...] = (2, 4, 6, 8, 10)
    """The five layers before which the parallel branch is fused in, ascending; empty for no branch."""
    sharing: Sharing = field(default_factory=lambda: Sharing(layers="last:11"))
    """Which parts serve both modalities."""
    norm_eps: float = 1e-12
    """LayerNorm epsilon; 1e-12 in MS-CLIP, 1e-5 in OpenAI's CLIP."""
    dropout: float = 0.0
    """Probability of dropping a channel of a residual branch in training; 0 in the paper."""
    logit_scale_init: float = 1.0
    """Logarithm of the first temperature: 1.0 in MS-CLIP, ln(1/0.07) = 2.659 in CLIP."""
    token_std: float = 1.0
    """Standard deviation of fresh token embeddings: 1.0 in MS-CLIP, 0.02 in CLIP."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise UserError(
                f"model.image_size must be a multiple of model.patch_size, got {self.image_size} and {self.patch_size}"
            )
        for width, heads, name in (
            (self.width, self.num_heads, "model.num_heads"),
            (self.text_width, self.text_heads, "model.text_heads"),
        ):
            if heads < 1 or width % heads:
                raise UserError(f"{name} must divide its encoder's width {width}, got {heads}")
        if self.sharing.anything and self.width != self.text_width:
            raise UserError(
                f"model.sharing needs equal widths, got model.width {self.width} and model.text_width {self.text_width}; "
                "set model.sharing.layers none or make them equal"
            )
        if self.sharing.anything and self.num_heads != self.text_heads:
            raise UserError(
                f"model.sharing needs equal heads, got model.num_heads {self.num_heads} and model.text_heads {self.text_heads}"
            )
        if (self.stem or self.branch_layers) and (self.patch_size not in (4, 8, 16, 32) or self.width % 32):
            raise UserError(
                "model.stem and model.branch_layers need model.patch_size 4, 8, 16 or 32 and a model.width that is a "
                f"multiple of 32, got {self.patch_size} and {self.width}"
            )
        first = 1 if self.stem else 0
        ordered = list(self.branch_layers) == sorted(set(self.branch_layers))
        inside = all(first <= i < self.layers for i in self.branch_layers)
        if self.branch_layers and not (len(self.branch_layers) == 5 and ordered and inside):
            raise UserError(
                f"model.branch_layers must be five ascending layers between {first} and {self.layers - 1}, "
                f"got {list(self.branch_layers)}"
            )
        shared = self.shared_layers
        if self.stem and 0 in shared:
            raise UserError(
                "model.sharing.layers must leave out layer 0, which model.stem makes the image's own; "
                f"last:{self.layers - 1} does, got {self.sharing.layers!r}"
            )
        if shared and max(shared) >= min(self.layers, self.text_layers):
            raise UserError(
                f"model.sharing.layers must exist in both encoders, which have {self.layers} and {self.text_layers} "
                f"layers, got {self.sharing.layers!r}"
            )

    @property
    def shared_layers(self) -> frozenset[int]:
        """Depths at which something is shared."""
        return self.sharing.depths(max(self.layers, self.text_layers)) if self.sharing.anything else frozenset()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a YAML."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["branch_layers"] = list(self.branch_layers)
        values["sharing"] = {f.name: getattr(self.sharing, f.name) for f in fields(self.sharing)}
        return values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`."""
        values = dict(values, branch_layers=tuple(values["branch_layers"]), sharing=Sharing(**values["sharing"]))
        return ModelConfig(**values)


MS_CLIP = Sharing(layers="all")
CLIP_LOGIT_SCALE = 2.6592600369327779  # ln(1/0.07)

PRESETS: dict[str, ModelConfig] = {
    "ms_clip_s_b32": ModelConfig(),
    "ms_clip_s_b16": ModelConfig(patch_size=16),
    "ms_clip_b32": ModelConfig(stem=False, branch_layers=(), sharing=MS_CLIP),
    "clip_b32": ModelConfig(
        stem=False,
        branch_layers=(),
        sharing=SEPARATE,
        text_width=512,
        text_heads=8,
        norm_eps=1e-5,
        logit_scale_init=CLIP_LOGIT_SCALE,
        token_std=0.02,
    ),
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


class ImageInput(nn.Module):
    """Images to tokens: stem or patch projection, class token, positions, LayerNorm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, patch = config.width, config.patch_size
        self.image_size = config.image_size
        self.patches = Stem(width, patch) if config.stem else nn.Conv2d(3, width, patch, patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        positions = (config.image_size // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.norm_eps)

    def forward(self, images: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images grid width"]:
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be (B, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        grid = self.patches(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(grid.dtype).expand(len(grid), 1, -1)
        return self.ln_pre(torch.cat([first, grid], dim=1) + self.positional_embedding)


class TextInput(nn.Module):
    """Packed ids to tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.text_width))

    def forward(self, text: PackedText) -> Float[Tensor, "tokens width"]:
        return self.token_embedding(text.ids) + self.positional_embedding[text.positions]


class Model(nn.Module):
    """Two encoders that share what `config.sharing` says, and a temperature."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        widths: dict[Modality, int] = {"image": config.width, "text": config.text_width}
        num_heads: dict[Modality, int] = {"image": config.num_heads, "text": config.text_heads}
        self.image_input = ImageInput(config)
        self.text_input = TextInput(config)
        image_layers = range(1 if config.stem else 0, config.layers)
        sharing, shared_layers = config.sharing, config.shared_layers
        parts = frozenset(name for name in ("attn", "ffn", "ln1", "ln2") if getattr(sharing, name))
        blocks = []
        for layer in range(max(config.layers, config.text_layers)):
            modalities: tuple[Modality, ...] = (
                *(("image",) if layer in image_layers else ()),
                *(("text",) if layer < config.text_layers else ()),
            )
            shared = parts if layer in shared_layers else frozenset()
            blocks.append(Block(widths, num_heads, shared, modalities, config.norm_eps, config.dropout))
        self.blocks = nn.ModuleList(blocks)
        self.branch = ParallelBranch(config.width, config.patch_size, config.norm_eps) if config.branch_layers else None
        self.final_norm = Paired(lambda m: nn.LayerNorm(widths[m], eps=config.norm_eps), sharing.final_norm)
        self.projection = Paired(lambda m: nn.Linear(widths[m], config.embed_dim, bias=False), sharing.out_proj)
        # One element, not none: DeepSpeed cannot broadcast a parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.full((1,), config.logit_scale_init))
        initialise(self)

    def _run(self, images: Tensor | None, text: PackedText | None) -> tuple[Tensor | None, Tensor | None]:
        image = None if images is None else self.image_input(images)
        tokens = Tokens.join(image, None if text is None else self.text_input(text), text)
        features = [] if images is None or self.branch is None else self.branch(images)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if features and self.branch is not None and layer in self.config.branch_layers:
                stage = self.config.branch_layers.index(layer)
                tokens = tokens.with_image(self.branch.adapters[stage](tokens.image, features[stage]))
            if any(m in tokens.modalities for m in block.modalities):
                tokens = block(tokens)
        pooled = []
        if images is not None:
            pooled.append(tokens.image[:, 0])
        if text is not None:
            pooled.append(tokens.rows[tokens.split :][text.ends])
        rows, split = torch.cat(pooled), 0 if images is None else len(images)
        embedded = self.projection(self.final_norm(rows, split), split)
        return (None if images is None else embedded[:split]), (None if text is None else embedded[split:])

    def encode_image(self, images: Float[Tensor, "images 3 size size"], normalize: bool = True) -> Float[Tensor, "images dim"]:
        """Embeds normalised images (see `Preprocess`); unit length unless `normalize` is false."""
        features, _ = self._run(images, None)
        assert features is not None
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(
        self, token_ids: Int[Tensor, "captions length"] | PackedText, normalize: bool = True
    ) -> Float[Tensor, "captions dim"]:
        """Embeds captions given as ids, each row up to its largest id, the end token.

        Raises:
            ValueError: rows longer than the context, or ids beyond the vocabulary.
        """
        text = token_ids if isinstance(token_ids, PackedText) else self._pack(token_ids)
        _, features = self._run(None, text)
        assert features is not None
        return F.normalize(features.float(), dim=-1) if normalize else features

    def _pack(self, token_ids: Int[Tensor, "captions length"]) -> PackedText:
        context, vocabulary = self.config.context_length, self.config.vocab_size
        if token_ids.ndim != 2 or token_ids.shape[1] > context:
            raise ValueError(f"token_ids must be (B, L) with L at most {context}, got {tuple(token_ids.shape)}")
        if len(token_ids) and int(token_ids.max()) >= vocabulary:
            raise ValueError(f"token_ids must be below vocab_size {vocabulary}, got {int(token_ids.max())}")
        return pack(token_ids)

    @property
    def joint(self) -> bool:
        """Whether image and text tokens have the same width, so that they can travel in one matrix."""
        return self.config.width == self.config.text_width

    def forward(
        self, images: Float[Tensor, "images 3 size size"], text: PackedText
    ) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "captions dim"], Float[Tensor, "1"]]:
        """Unit image and caption embeddings, and the temperature exp(logit_scale)."""
        if self.joint:
            image_features, text_features = self._run(images, text)
        else:
            image_features, text_features = self._run(images, None)[0], self._run(None, text)[1]
        assert image_features is not None
        assert text_features is not None
        return (
            F.normalize(image_features.float(), dim=-1),
            F.normalize(text_features.float(), dim=-1),
            self.logit_scale.exp(),
        )

    def parameter_groups(self) -> dict[str, list[str]]:
        """Names of the parameters by how they are decayed: `shared`, `own`, `no_decay`; each exactly once.

        No decay for vectors (biases, norms, temperature) and the embedding tables, as the official config lists them.
        """
        shared = {
            f"{path}.shared.{name}"
            for path, module in self.named_modules()
            if isinstance(module, Paired) and module.is_shared
            for name, _ in module.shared.named_parameters()
        }
        groups: dict[str, list[str]] = {"shared": [], "own": [], "no_decay": []}
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or name.endswith(("positional_embedding", "token_embedding.weight")):
                groups["no_decay"].append(name)
            else:
                groups["shared" if name in shared else "own"].append(name)
        return groups


@torch.no_grad()
def initialise(model: Model) -> None:
    """Fresh weights by the laws of the official code (`norm` layers start as identity, biases at zero)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in model.blocks:
        assert isinstance(block, Block)
        in_proj = block.attn.in_proj
        for projection in in_proj.children():
            assert isinstance(projection, nn.Linear)
            nn.init.xavier_uniform_(projection.weight)
    image_projection = model.projection.part("image")
    assert isinstance(image_projection, nn.Linear)
    nn.init.normal_(image_projection.weight, std=model.config.width**-0.5)
    nn.init.trunc_normal_(model.text_input.positional_embedding, std=0.02)
    nn.init.normal_(model.text_input.token_embedding.weight, std=model.config.token_std)


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
    if isinstance(overrides.get("sharing"), dict):
        overrides["sharing"] = replace(PRESETS[name].sharing, **overrides["sharing"])
    return replace(PRESETS[name], **overrides)


def create_model(name: str, device: torch.device | str | None = None, **overrides: Any) -> Model:
    """A model with fresh weights: `create_model("ms_clip_s_b32", image_size=64)`; on `meta`, only its shapes.

    Raises:
        UserError: an unknown name or setting, or settings that contradict each other.
    """
    return build(preset(name, **overrides), device)


def build(config: ModelConfig, device: torch.device | str | None = None) -> Model:
    """The model that `config` describes, with fresh weights."""
    with torch.device(device or "cpu"):
        return Model(config)
