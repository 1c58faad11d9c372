"""The transformer block, built from pairs.

Pre-norm blocks as in CLIP (arXiv 2103.00020). Every part is a `Paired`, so one class covers two separate encoders, one shared
encoder and everything between. Shared matrices see image and text rows in one product; only the attention scores and the
LayerNorms look at each modality by itself.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from msclip.config import ModelConfig
from msclip.sharing import Modality, Paired
from msclip.tokens import PackedText, Tokens


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of CLIP and MS-CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702  # one saved tensor and one backward kernel instead of three


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class MLP(nn.Module):
    """width -> 4 width -> width."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.fc = nn.Linear(width, 4 * width)
        self.act = ACTIVATIONS[activation]()
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return self.proj(self.act(self.fc(x)))


def dense_attention(qkv: Float[Tensor, "images grid three_width"], num_heads: int) -> Float[Tensor, "images grid width"]:
    """Every token of an image sees every other."""
    # (images, grid, 3*width) -> q, k, v, each (images, heads, grid, head)
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def packed_causal_attention(
    qkv: Float[Tensor, "tokens three_width"], text: PackedText, num_heads: int
) -> Float[Tensor, "tokens width"]:
    """Every token of a caption sees itself and those before it.

    Scores are computed on a padded copy. The padding follows each caption, so the causal mask alone keeps it out.
    """
    shape = (len(text) * text.max_length, qkv.shape[-1])
    padded = qkv.new_zeros(shape).index_copy(0, text.padded, qkv)
    # (captions*length, 3*width) -> q, k, v, each (captions, heads, length, head)
    q, k, v = padded.view(len(text), text.max_length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, text.padded)


class Attention(nn.Module):
    """Multi-head self-attention; its projections are shared together or not at all."""

    def __init__(
        self,
        widths: dict[Modality, int],
        num_heads: dict[Modality, int],
        shared: bool,
        modalities: tuple[Modality, ...],
    ):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = Paired(lambda m: nn.Linear(widths[m], 3 * widths[m]), shared, modalities)
        self.out_proj = Paired(lambda m: nn.Linear(widths[m], widths[m]), shared, modalities)

    def forward(self, rows: Float[Tensor, "rows width"], tokens: Tokens) -> Float[Tensor, "rows width"]:
        split = tokens.split
        qkv = self.in_proj(rows, split)
        mixed = []
        if tokens.images:
            dense = qkv[:split].unflatten(0, (tokens.images, tokens.grid))
            mixed.append(dense_attention(dense, self.num_heads["image"]).flatten(0, 1))
        if tokens.text is not None:
            mixed.append(packed_causal_attention(qkv[split:], tokens.text, self.num_heads["text"]))
        return self.out_proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed), split)


class Block(nn.Module):
    """x + attention(ln1(x)), then x + mlp(ln2(x)), for the modalities that have a layer at this depth."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.modalities = modalities = config.modalities_at(layer)
        widths, sharing, here = config.widths, config.sharing, layer in config.shared_layers

        def norm(modality: Modality) -> nn.LayerNorm:
            return nn.LayerNorm(widths[modality], eps=config.norm_eps)

        self.ln1 = Paired(norm, here and sharing.ln1, modalities)
        self.attn = Attention(widths, config.heads, here and sharing.attn, modalities)
        self.ln2 = Paired(norm, here and sharing.ln2, modalities)
        self.mlp = Paired(lambda m: MLP(widths[m], config.activation), here and sharing.ffn, modalities)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        if len(self.modalities) < len(tokens.modalities):  # the other modality has its own kind of layer here
            (modality,) = self.modalities
            rows = self(tokens.only(modality)).rows
            if modality == "text":
                return tokens.with_text(rows)
            return tokens.with_image(rows.view(tokens.images, tokens.grid, -1))
        rows, split = tokens.rows, tokens.split
        rows = rows + self.dropout(self.attn(self.ln1(rows, split), tokens))
        rows = rows + self.dropout(self.mlp(self.ln2(rows, split), split))
        return tokens.with_rows(rows)
