"""The transformer block, built from pairs.

Pre-norm blocks as in CLIP (arXiv 2103.00020). Every part is a `Paired`, so one class covers two separate encoders, one shared
encoder and everything between. Shared matrices see image and text rows in one product; only the attention scores and the
LayerNorms look at each modality by itself.
"""

from jaxtyping import Float
from torch import Tensor, nn

from msclip.config import ModelConfig
from msclip.layers import MLP, add_norm, attention
from msclip.parallel import beside
from msclip.sharing import Modality, Paired
from msclip.tokens import Tokens


class Attention(nn.Module):
    """Multi-head self-attention; its projections are shared together or not at all."""

    def __init__(
        self,
        widths: dict[Modality, int],
        num_heads: dict[Modality, int],
        shared: bool,
        modalities: tuple[Modality, ...],
        causal: bool,
    ):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.in_proj = Paired(lambda m: nn.Linear(widths[m], 3 * widths[m]), shared, modalities)
        self.out_proj = Paired(lambda m: nn.Linear(widths[m], widths[m]), shared, modalities)

    def forward(self, rows: Float[Tensor, "rows width"], tokens: Tokens) -> Float[Tensor, "rows width"]:
        qkv = self.in_proj(rows, tokens.split)
        return self.out_proj(attention(qkv, tokens, self.num_heads, self.causal), tokens.split)


class Block(nn.Module):
    """x + attention(ln1(x)), then x + mlp(ln2(x)), for the modalities with a layer at this depth; see also `parallel.py`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.modalities = modalities = config.modalities_at(layer)
        widths, sharing, here = config.widths, config.sharing, layer in config.shared_layers

        def norm(modality: Modality) -> nn.LayerNorm:
            return nn.LayerNorm(widths[modality], eps=config.norm_eps)

        self.ln1 = Paired(norm, here and sharing.ln1, modalities)
        self.attn = Attention(widths, config.heads, here and sharing.attn, modalities, config.causal)
        self.ln2 = Paired(norm, here and sharing.ln2, modalities)
        self.mlp = Paired(lambda m: MLP(widths[m], 4 * widths[m], config.activation), here and sharing.ffn, modalities)
        self.dropout = nn.Dropout(config.dropout)
        self.add_norm = add_norm
        self.parallel, self.after = beside(config, "parallel", layer), beside(config, "after", layer)

    def forward(self, rows: Float[Tensor, "rows width"], tokens: Tokens) -> Float[Tensor, "rows width"]:
        """The rows of `tokens` after this layer; a tensor in and a tensor out, which is where DeepSpeed's hooks find them."""
        tokens = tokens.with_rows(rows)
        if len(self.modalities) >= len(tokens.modalities):
            return self._changed(tokens)
        (modality,) = self.modalities  # the other modality has its own kind of layer here
        changed = self._changed(tokens.only(modality))
        if modality == "text":
            return tokens.with_text(changed).rows
        return tokens.with_image(changed.view(tokens.images, tokens.grid, -1)).rows

    def _changed(self, tokens: Tokens) -> Float[Tensor, "rows width"]:
        rows, normed = self.add_norm(tokens.rows, None, self.ln1, tokens.split)
        rows, normed = self.add_norm(rows, self.dropout(self.attn(normed, tokens)), self.ln2, tokens.split)
        rows = rows + self.dropout(self.mlp(normed, tokens.split))
        for module in self.parallel.values():
            rows = rows + self.dropout(module(tokens))
        for module in self.after.values():
            rows = rows + self.dropout(module(tokens.with_rows(rows)))
        return rows
