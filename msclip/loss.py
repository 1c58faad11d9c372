"""Contrastive losses over the global batch: CLIP's softmax (arXiv 2103.00020) and SigLIP's sigmoid (arXiv 2303.15343).

Each rank scores its own images against all captions and its own captions against all images, so logits cost
batch x global batch instead of global batch squared. Averaged over ranks, as data-parallel training averages gradients, this
is exactly the one-process loss over the whole batch. No more than `LOGITS_AT_ONCE` of the logits exist at a time: the gradient
of a few rows is taken while their logits are there, so that the backward pass needs none of them again, and memory grows with
the features alone. The MS-CLIP release contains no loss.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from msclip.distributed import gather_with_grad, rank

LOGITS_AT_ONCE = 2**24
"""64 MiB in float32: a matrix product long enough to hide its launch, and all logits of 4096 pairs on one device."""


class ContrastiveResult(NamedTuple):
    """Of this rank's rows; the mean over ranks is the global batch's."""

    loss: Float[Tensor, ""]
    image_to_text_accuracy: Float[Tensor, ""]
    """Share of images whose most similar caption of the global batch is their own."""
    text_to_image_accuracy: Float[Tensor, ""]


def contrastive_loss(
    image_features: Float[Tensor, "batch dim"],
    text_features: Float[Tensor, "batch dim"],
    temperature: Float[Tensor, "1"],
    bias: Float[Tensor, "1"] | None = None,
    *,
    gather: bool = True,
) -> ContrastiveResult:
    """The softmax loss, or with a `bias` the sigmoid loss; row i of images belongs to row i of texts.

    With logits l_ij = temperature * cosine(image i, text j) + bias over a global batch of B pairs, the softmax loss is the
    mean cross-entropy of both directions, -1/2B sum_i [log softmax_j(l_ij) + log softmax_j(l_ji)] at j = i, where a bias
    would cancel out. The sigmoid loss takes every pair for itself, matching or not: -1/B sum_ij log sigmoid(z_ij l_ij) with
    z_ij 1 for i = j and -1 elsewhere; the sum over all B^2 pairs is divided by B, as in the paper.

    Features are unit length. With `gather`, the other side of each comparison is collected from all ranks, which must hold
    equally many rows. Computed in float32 whatever the input type.
    """
    if image_features.shape != text_features.shape:
        raise ValueError(f"features must pair up, got {tuple(image_features.shape)} and {tuple(text_features.shape)}")
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts, temperature = image_features.float(), text_features.float(), temperature.float()
        if gather:  # one collective for both sides
            all_images, all_texts = gather_with_grad(torch.cat([images, texts], dim=1)).chunk(2, dim=1)
        else:
            all_images, all_texts = images, texts
        first = rank() * len(images) if gather else 0
        own = torch.arange(first, first + len(images), device=images.device)
        affine = temperature, None if bias is None else bias.float()
        compare = _compare if len(images) * len(all_texts) <= LOGITS_AT_ONCE else _InChunks.apply
        by_image, image_to_text = compare(own, images, all_texts, *affine)
        by_text, text_to_image = compare(own, texts, all_images, *affine)
        # A pair of the sigmoid loss is counted from both its sides, with half its weight each: then a rank's rows are enough.
        return ContrastiveResult((by_image + by_text) / 2, image_to_text, text_to_image)


def _compare(
    own: Int[Tensor, "rows"],
    rows: Float[Tensor, "rows dim"],
    others: Float[Tensor, "all_rows dim"],
    temperature: Float[Tensor, "1"],
    bias: Float[Tensor, "1"] | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Loss of one direction, and the share of rows whose own partner scores highest; `own` is each partner's place."""
    logits = temperature * rows @ others.T
    if bias is None:
        loss = F.cross_entropy(logits, own)
    else:
        logits, columns = logits + bias, own[:, None]
        signed = logits.scatter(1, columns, -logits.gather(1, columns))  # -z_ij l_ij, and -log sigmoid(x) is softplus(-x)
        loss = F.softplus(signed).sum(dim=1).mean()
    return loss, (logits.argmax(dim=1) == own).float().mean()


class _InChunks(torch.autograd.Function):
    """`_compare` for a few rows after another, each with its gradient at once."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, rows: Tensor, others: Tensor, temperature: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        inputs = zip((rows, others, temperature, bias), ctx.needs_input_grad[1:], strict=True)
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_(needed) for x, needed in inputs]
        size = max(1, LOGITS_AT_ONCE // len(others))
        sums = rows.new_zeros(2)
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            share = len(own[chunk]) / len(own)
            with torch.enable_grad():
                loss, accuracy = _compare(own[chunk], leaves[0][chunk], *leaves[1:])
                loss = share * loss
            if loss.requires_grad:
                loss.backward()
            sums += torch.stack([loss.detach(), share * accuracy])
        ctx.save_for_backward(*(None if leaf is None else leaf.grad for leaf in leaves))
        loss, accuracy = sums
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else to_loss * gradient for gradient in ctx.saved_tensors)
