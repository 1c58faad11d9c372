"""What a model is, as a value: sizes, towers, and how much the two sides share.

Every combination that cannot be built is refused, by the names a user wrote; see `config_checks.py`.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from msclip.config_checks import check
from msclip.errors import UserError
from msclip.sharing import Modality, Sharing, chosen_layers

AdapterNorm = Literal["after_dw", "after_pw"]


@dataclass(frozen=True)
class ParallelFFN:
    """Feed-forward networks beside the layers, one for each of them and for each modality; see `parallel.py`."""

    placement: Literal["none", "after", "parallel", "pooled"] = "none"
    """`after` a layer, `parallel` to it, or once on the `pooled` vector; `none` for no such module."""
    layers: str = "shared"
    """Beside which layers: `shared` for those that share something, or as in `sharing.layers`; `pooled` has no layers."""
    modalities: tuple[Modality, ...] = ("image", "text")
    """Who has such modules."""
    hidden: int = 64
    """Channels inside: a bottleneck, or as many as in the layer's own part (4 times the width; for attention, the width)."""


@dataclass(frozen=True)
class ParallelAttention(ParallelFFN):
    """Self-attention beside the layers, one for each of them and for each modality; see `parallel.py`."""

    num_heads: int = 1
    """Heads, which must divide `hidden`."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and sharing of a model; the defaults are MS-CLIP-S B/32."""

    image_size: int = 224
    """Side of the square input, pixels."""
    patch_size: int = 32
    """Side of the square that becomes one token, pixels; strides and kernels of stem and branch follow from it. 32 for
    `modified_resnet`, a cell of whose last map it is."""
    width: int = 768
    """Channels of an image token; for `modified_resnet`, of its stem, a 32nd of those of its last map."""
    layers: int = 12
    """Transformer layers of the image encoder; with `stem` the first of these is the stem. 0 for `modified_resnet`."""
    num_heads: int = 12
    """Attention heads of the image encoder; for `modified_resnet`, of its pooling."""
    text_width: int = 768
    """Channels of a text token; where anything is shared it must equal `width`."""
    text_layers: int = 12
    """Transformer layers of the text encoder. 0 for `cbow`."""
    text_heads: int = 12
    """Attention heads of the text encoder. 0 for `cbow`."""
    embed_dim: int = 512
    """Size of the common embedding space."""
    vocab_size: int = 49408
    """Ids the token table has; the tokenizer's must not exceed it."""
    context_length: int = 77
    """Longest caption in tokens, start and end included."""
    image_tower: Literal["vit", "modified_resnet"] = "vit"
    """A vision transformer, or CLIP's ResNet with attention pooling, which can share nothing."""
    resnet_blocks: tuple[int, ...] = ()
    """Bottlenecks in each of the four stages of `modified_resnet`: 3,4,6,3 in RN50; empty for `vit`."""
    text_tower: Literal["transformer", "cbow"] = "transformer"
    """A transformer, or the mean of word vectors (a continuous bag of words), which can share nothing."""
    cbow_ends: bool = False
    """Whether the mean of `cbow` counts the start and end tokens, which every caption has."""
    stem: bool = True
    """Early specialisation: a residual CNN instead of patch embedding and image layer 0."""
    branch_layers: tuple[int, ...] = (2, 4, 6, 8, 10)
    """The five layers before which the parallel branch is fused in, ascending; empty for no branch."""
    adapter_bn: AdapterNorm = "after_dw"
    """Where an adapter of the branch normalises the branch's map: after its depth-wise convolution, as in the released
    models, or after the point-wise one, as the method is also written down."""
    sharing: Sharing = field(default_factory=lambda: Sharing(layers="last:11"))
    """Which parts serve both modalities."""
    parallel_ffn: ParallelFFN = field(default_factory=ParallelFFN)
    """Feed-forward networks of one modality's own beside what is shared."""
    parallel_attention: ParallelAttention = field(default_factory=ParallelAttention)
    """Attention of one modality's own beside what is shared."""
    causal: bool = True
    """Whether a token of a caption sees only those before it, as in CLIP and MS-CLIP, or its whole caption."""
    text_pool: Literal["end", "cls"] = "end"
    """Which token stands for the caption: its end token, or its first, as a class token, which needs `causal` false."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Of every feed-forward network: x * sigmoid(1.702 x) in CLIP and MS-CLIP, the exact GELU in most open_clip models."""
    norm_eps: float = 1e-12
    """LayerNorm epsilon; 1e-12 in MS-CLIP, 1e-5 in OpenAI's CLIP."""
    dropout: float = 0.0
    """Probability of dropping a channel of a residual branch in training; 0 in the paper."""
    patch_dropout: float = 0.0
    """Share of an image's patches left out in training, drawn anew each time (FLIP, arXiv 2212.00794), in whole patches: at
    least one goes and one stays, and the class token. Not with a branch, which needs the whole grid."""
    checkpoint_blocks: bool = False
    """Compute each layer a second time in the backward pass instead of keeping what is inside it: less memory, a third more
    arithmetic, the same numbers."""
    freeze_image: str = "none"
    """What of the image encoder is not learned: `none`, `all`, or `first:N` for its input and N first layers (of
    `modified_resnet`, its stem and N of four stages). What it shares freezes with it; BatchNorm keeps its statistics."""
    freeze_text: str = "none"
    """What of the text encoder is not learned, likewise."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """What training minimises: CLIP's softmax over the pairs of a batch, or SigLIP's sigmoid of each pair for itself, which
    gives the model one more parameter, a bias beside the temperature."""
    logit_scale_init: float = 1.0
    """Logarithm of the first temperature: 1.0 in MS-CLIP, ln(1/0.07) = 2.659 in CLIP, ln 10 = 2.303 in SigLIP."""
    logit_scale_learned: bool = True
    """Whether the temperature is learned; else it stays what it was first."""
    logit_bias_init: float = -10.0
    """First bias of the `sigmoid` loss, learned from there; SigLIP's -10 at first holds every pair for a mismatch, as nearly
    every one is."""
    token_std: float = 1.0
    """Standard deviation of fresh token embeddings: 1.0 in MS-CLIP, 0.02 in CLIP."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def freezes(self) -> dict[Modality, int | None]:
        """How many first layers of an encoder are not learned, its input included; None for all of it."""
        image = 4 if self.image_tower == "modified_resnet" else self.layers
        return {
            "image": _first_layers(self.freeze_image, image, "model.freeze_image"),
            "text": _first_layers(self.freeze_text, self.text_layers, "model.freeze_text"),
        }

    def layers_beside(self, setting: ParallelFFN) -> frozenset[int]:
        """The layers that `setting` puts modules beside."""
        if setting.placement not in ("after", "parallel"):
            return frozenset()
        if setting.layers == "shared":
            return self.shared_layers
        kind = "parallel_attention" if isinstance(setting, ParallelAttention) else "parallel_ffn"
        return chosen_layers(setting.layers, self.depth, f"model.{kind}.layers")

    @property
    def shared_layers(self) -> frozenset[int]:
        """Depths at which something is shared."""
        return self.sharing.depths(self.depth) if self.sharing.anything else frozenset()

    @property
    def dropped_patches(self) -> int:
        """How many patches of an image `patch_dropout` comes to."""
        return round(self.patch_dropout * (self.image_size // self.patch_size) ** 2)

    @property
    def depth(self) -> int:
        """Layers of the deeper transformer; 0 where there is none."""
        return max(self.layers, self.text_layers)

    @property
    def transformers(self) -> tuple[Modality, ...]:
        """The modalities whose tower is a transformer."""
        return (
            *(("image",) if self.image_tower == "vit" else ()),
            *(("text",) if self.text_tower == "transformer" else ()),
        )

    def modalities_at(self, layer: int) -> tuple[Modality, ...]:
        """The modalities that have a transformer block at this depth."""
        return (
            *(("image",) if (1 if self.stem else 0) <= layer < self.layers else ()),
            *(("text",) if layer < self.text_layers else ()),
        )

    @property
    def widths(self) -> dict[Modality, int]:
        """Channels of a token."""
        return {"image": self.width, "text": self.text_width}

    @property
    def heads(self) -> dict[Modality, int]:
        """Attention heads."""
        return {"image": self.num_heads, "text": self.text_heads}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a YAML."""
        return {name: _listed(value) for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; what an older version did not write has its default."""
        plain = _tupled(values)
        for name, section in SECTIONS.items():
            if isinstance(plain.get(name), dict):
                plain[name] = section(**plain[name])
        return ModelConfig(**plain)


def _first_layers(setting: str, num_layers: int, name: str) -> int | None:
    if setting in ("none", "all"):
        return None if setting == "all" else 0
    kind, _, count = setting.partition(":")
    if kind != "first" or not count.isdecimal() or not 1 <= int(count) <= num_layers:
        possible = f"none, all, or first:N with N from 1 to {num_layers}" if num_layers else "none or all"
        raise UserError(f"{name} must be {possible}, got {setting!r}")
    return int(count)


SECTIONS: dict[str, Any] = {"sharing": Sharing, "parallel_ffn": ParallelFFN, "parallel_attention": ParallelAttention}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tupled(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value
