"""What blocks are made of: activations, the feed-forward network, and attention over each kind of token.

Images are dense and captions are packed, so attention is one function for each; everything else takes rows of either.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from msclip.tokens import PackedText


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of CLIP and MS-CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702  # one saved tensor and one backward kernel instead of three


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class MLP(nn.Module):
    """width -> hidden -> width."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.proj = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        return self.proj(self.act(self.fc(x)))


def dense_attention(qkv: Float[Tensor, "images grid three_width"], num_heads: int) -> Float[Tensor, "images grid width"]:
    """Every token of an image sees every other."""
    # (images, grid, 3*width) -> q, k, v, each (images, heads, grid, head)
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def packed_attention(
    qkv: Float[Tensor, "tokens three_width"], text: PackedText, num_heads: int, causal: bool
) -> Float[Tensor, "tokens width"]:
    """Every token of a caption sees itself and those before it, or, if not `causal`, all of its caption.

    Scores are computed on a padded copy. The padding follows each caption, so the causal mask alone keeps it out.
    """
    shape = (len(text) * text.max_length, qkv.shape[-1])
    padded = qkv.new_zeros(shape).index_copy(0, text.padded, qkv)
    # (captions*length, 3*width) -> q, k, v, each (captions, heads, length, head)
    q, k, v = padded.view(len(text), text.max_length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    inside = None if causal else text.inside[:, None, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=inside, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, text.padded)
