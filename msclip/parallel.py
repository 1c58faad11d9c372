"""Light modules of one modality's own beside what the two share: a parallel feed-forward network, a parallel attention.

Each has a LayerNorm of its own and adds M(LN(x)) to the stream, where x is a layer's output (`after`), a layer's input
(`parallel`), or the pooled vector (`pooled`). The last matrix starts at zero, so that a fresh model with such modules equals
the one without. They are not the paper's convolutional branch (`branch.py`), and stand beside it where both are wanted.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from msclip.config import ModelConfig, ParallelAttention, ParallelFFN
from msclip.layers import MLP, dense_attention, packed_attention
from msclip.sharing import Modality
from msclip.tokens import PackedText, Tokens


class FFNBeside(nn.Module):
    """MLP(LN(x)), `hidden` channels inside."""

    def __init__(self, width: int, hidden: int, activation: str, norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, hidden, activation)

    @property
    def last(self) -> nn.Linear:
        """The matrix that starts at zero."""
        return self.mlp.proj

    def forward(self, x: Float[Tensor, "*rows width"], text: PackedText | None) -> Float[Tensor, "*rows width"]:
        return self.mlp(self.norm(x))


class AttentionBeside(nn.Module):
    """Attention(LN(x)) in `hidden` channels; over one token, as on a pooled vector, it is a linear map."""

    def __init__(self, width: int, hidden: int, num_heads: int, causal: bool, norm_eps: float):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.in_proj = nn.Linear(width, 3 * hidden)
        self.out_proj = nn.Linear(hidden, width)

    @property
    def last(self) -> nn.Linear:
        """The matrix that starts at zero."""
        return self.out_proj

    def forward(self, x: Float[Tensor, "*rows width"], text: PackedText | None) -> Float[Tensor, "*rows width"]:
        qkv = self.in_proj(self.norm(x))
        if text is None:
            return self.out_proj(dense_attention(qkv, self.num_heads))
        return self.out_proj(packed_attention(qkv, text, self.num_heads, self.causal))


class Beside(nn.Module):
    """One module for each modality that has one at this place; the other modality gets zeros."""

    def __init__(self, setting: ParallelFFN, config: ModelConfig, modalities: tuple[Modality, ...]):
        super().__init__()
        for modality in modalities:
            width = config.widths[modality]
            if isinstance(setting, ParallelAttention):
                part: nn.Module = AttentionBeside(width, setting.hidden, setting.num_heads, config.causal, config.norm_eps)
            else:
                part = FFNBeside(width, setting.hidden, config.activation, config.norm_eps)
            self.add_module(modality, part)

    def forward(self, tokens: Tokens) -> Float[Tensor, "rows width"]:
        """What is to be added to `tokens.rows`."""
        parts = []
        for modality in tokens.modalities:
            x = tokens.image if modality == "image" else tokens.rows[tokens.split :]
            module = self._modules.get(modality)
            y = torch.zeros_like(x) if module is None else module(x, tokens.text if modality == "text" else None)
            parts.append(y.flatten(0, -2))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def beside(config: ModelConfig, placement: str, layer: int | None = None) -> nn.ModuleDict:
    """The modules of one placement beside one layer (attention before feed-forward), or on the pooled vector for None."""
    here = config.transformers if layer is None else config.modalities_at(layer)
    modules = {}
    for name, setting in (("attention", config.parallel_attention), ("ffn", config.parallel_ffn)):
        modalities = tuple(m for m in here if m in setting.modalities)
        chosen = layer is None or layer in config.layers_beside(setting)
        if setting.placement == placement and chosen and modalities:
            modules[name] = Beside(setting, config, modalities)
    return nn.ModuleDict(modules)
