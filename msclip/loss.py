"""Symmetric contrastive loss over the global batch (CLIP, arXiv 2103.00020; the MS-CLIP release contains no loss).

Each rank scores its own images against all captions and its own captions against all images, so logits cost
batch x global batch instead of global batch squared. Averaged over ranks, as data-parallel training averages gradients, this
is exactly the one-process loss over the whole batch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from msclip.distributed import gather_with_grad, rank


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
    *,
    gather: bool = True,
) -> ContrastiveResult:
    """Mean cross-entropy of both directions; row i of images belongs to row i of texts.

    Features are unit length; `temperature` multiplies their cosines. With `gather`, the other side of each comparison is
    collected from all ranks, which must hold equally many rows. Computed in float32 whatever the input type.
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
        by_image = temperature * images @ all_texts.T  # (batch, global batch)
        by_text = temperature * texts @ all_images.T
        loss = (F.cross_entropy(by_image, own) + F.cross_entropy(by_text, own)) / 2
        return ContrastiveResult(
            loss,
            (by_image.argmax(dim=1) == own).float().mean(),
            (by_text.argmax(dim=1) == own).float().mean(),
        )
