"""A continuous bag of words: the mean of a caption's word vectors, a LayerNorm and a linear map.

CLIP's pseudo-code (arXiv 2103.00020) names it beside the text transformer. Packed captions have no padding to leave out; the
start and end tokens are found by their place. A caption of nothing else has the zero vector as its mean.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from msclip.tokens import PackedText


class CBOW(nn.Module):
    """Captions to embeddings, whatever the order of their words."""

    def __init__(self, vocab_size: int, width: int, embed_dim: int, norm_eps: float, token_std: float, ends: bool):
        super().__init__()
        self.ends = ends
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=token_std)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, text: PackedText) -> Float[Tensor, "captions dim"]:
        vectors = self.token_embedding(text.ids)
        counted = torch.ones_like(text.ids, dtype=torch.bool)
        if not self.ends:
            counted[text.starts] = False
            counted[text.ends] = False
        weights = counted.to(vectors.dtype)
        totals = vectors.new_zeros(len(text), vectors.shape[-1]).index_add(0, text.captions, vectors * weights[:, None])
        counts = weights.new_zeros(len(text)).index_add(0, text.captions, weights)
        return self.projection(self.norm(totals / counts.clamp(min=1)[:, None]))
