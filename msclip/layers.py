"""What blocks are made of: activations, the feed-forward network, and attention over each kind of token.

Images are dense and captions are packed, so attention is one function for each; everything else takes rows of either. On a GPU
one kernel serves both (`kernels/attention.py`).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from msclip import kernels
from msclip.sharing import Modality, Paired
from msclip.tokens import PackedText, Tokens


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


def add_norm(
    rows: Float[Tensor, "rows width"], delta: Float[Tensor, "rows width"] | None, norm: Paired, split: int
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
    """The stream with `delta` added, and its LayerNorm, each modality by its own if `norm` is not shared.

    On a GPU by one kernel, which gives the LayerNorm in the type that autocast has for the matrix product after it.
    """
    if not kernels.usable(rows.device) or rows.shape[1] > kernels.WIDEST or rows.dtype == torch.float64 or not len(rows):
        return plain_add_norm(rows, delta, norm, split)
    from msclip.kernels import norm as kernel  # Triton comes with PyTorch for GPUs alone

    image, text = norm.part("image" if split else "text"), norm.part("text" if split < len(rows) else "image")
    assert isinstance(image, nn.LayerNorm)
    assert isinstance(text, nn.LayerNorm)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else rows.dtype
    return kernel.add_norm(rows, delta, image.weight, image.bias, text.weight, text.bias, split, image.eps, dtype)


def plain_add_norm(
    rows: Float[Tensor, "rows width"], delta: Float[Tensor, "rows width"] | None, norm: Paired, split: int
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
    """`add_norm` of PyTorch's operators."""
    rows = rows if delta is None else rows + delta
    return rows, norm(rows, split)


def attention(
    qkv: Float[Tensor, "rows three_width"], tokens: Tokens, num_heads: dict[Modality, int], causal: bool
) -> Float[Tensor, "rows width"]:
    """Attention inside each image and inside each caption of a stream."""
    if _kernel_serves(qkv, tokens, num_heads):
        from msclip.kernels.attention import joint_attention  # Triton comes with PyTorch for GPUs alone

        (heads,) = {num_heads[modality] for modality in tokens.modalities}
        offsets = tokens.text.offsets if tokens.text else torch.zeros(1, dtype=torch.int32, device=qkv.device)
        context = tokens.text.context if tokens.text else 0
        return joint_attention(qkv, offsets, tokens.images, tokens.grid, context, heads, causal)
    mixed = []
    if tokens.images:
        dense = qkv[: tokens.split].unflatten(0, (tokens.images, tokens.grid))
        mixed.append(dense_attention(dense, num_heads["image"]).flatten(0, 1))
    if tokens.text is not None:
        mixed.append(packed_attention(qkv[tokens.split :], tokens.text, num_heads["text"], causal))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _kernel_serves(qkv: Tensor, tokens: Tokens, num_heads: dict[Modality, int]) -> bool:
    """Whether `joint_attention` can serve these."""
    heads = {num_heads[modality] for modality in tokens.modalities}
    if not kernels.usable(qkv.device) or qkv.dtype not in (torch.bfloat16, torch.float16) or len(heads) > 1:
        return False
    context = tokens.text.context if tokens.text else 0
    if tokens.grid > kernels.LONGEST and torch.cuda.get_device_capability(qkv.device) < (9, 0):
        return False
    return context <= kernels.LONGEST and qkv.shape[1] // (3 * max(heads)) in (16, 32, 64)


def dense_attention(qkv: Float[Tensor, "images grid three_width"], num_heads: int) -> Float[Tensor, "images grid width"]:
    """Every token of an image sees every other."""
    # (images, grid, 3*width) -> q, k, v, each (images, heads, grid, head)
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, num_heads, -1)).unbind(2))
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
