"""How much of the encoder serves both modalities, as a value.

MS-CLIP (arXiv 2207.12661) studies a spectrum between two separate encoders and one: which parts of a block are shared
(attention, feed-forward, each LayerNorm) and at which depths. `Sharing` names a point on it and `Paired` builds it: a shared
part is one module from the start, so nothing is tied, copied or compared afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from msclip.errors import UserError

Modality = Literal["image", "text"]


def chosen_layers(layers: str, num_layers: int, setting: str) -> frozenset[int]:
    """What `all`, `none`, `last:N`, `first:N` or indices such as `3,4,5` mean in an encoder `num_layers` deep.

    Raises:
        UserError: another form, or a layer that does not exist; the message calls the text `setting`.
    """
    kind, _, count = layers.partition(":")
    if layers == "all":
        return frozenset(range(num_layers))
    if layers == "none":
        return frozenset()
    try:
        if kind in ("last", "first"):
            n = int(count)
            chosen = set(range(num_layers - n, num_layers) if kind == "last" else range(n))
        else:
            chosen = {int(i) for i in layers.split(",")}
            n = len(chosen)
        if n < 0:
            raise ValueError(n)
    except ValueError:
        raise UserError(f"{setting} must be all, none, last:N, first:N or indices like 3,4,5, got {layers!r}") from None
    if not chosen <= set(range(num_layers)):
        raise UserError(f"{setting} names layers beyond the encoder's {num_layers}, got {layers!r}")
    return frozenset(chosen)


@dataclass(frozen=True)
class Sharing:
    """Which parts of which layers serve both modalities; input embeddings never do."""

    layers: str = "all"
    """`all`, `none`, `last:N`, `first:N`, or indices such as `3,4,5`; layer 0 is the first."""
    attn: bool = True
    """Query, key, value and output projections of attention."""
    ffn: bool = True
    """Both matrices of the feed-forward network."""
    ln1: bool = False
    """The LayerNorm before attention."""
    ln2: bool = False
    """The LayerNorm before the feed-forward network."""
    final_norm: bool = False
    """The LayerNorm after the last block."""
    out_proj: bool = False
    """The linear map into the common embedding space."""

    def depths(self, num_layers: int) -> frozenset[int]:
        """The shared layers of an encoder that is `num_layers` deep.

        Raises:
            UserError: `layers` is not of the documented form, or names a layer that does not exist.
        """
        return chosen_layers(self.layers, num_layers, "model.sharing.layers")

    @property
    def anything(self) -> bool:
        """Whether any part at all is shared, so that the two widths must agree."""
        inside = self.layers != "none" and (self.attn or self.ffn or self.ln1 or self.ln2)
        return inside or self.final_norm or self.out_proj


SEPARATE = Sharing(layers="none", attn=False, ffn=False)


class Paired(nn.Module):
    """One part of the encoder for two modalities: a single module where it is shared, else one for each.

    The state-dict key says which: `...attn.in_proj.shared.weight` or `.image.weight` and `.text.weight`.
    """

    def __init__(
        self,
        make: Callable[[Modality], nn.Module],
        shared: bool,
        modalities: tuple[Modality, ...] = ("image", "text"),
    ):
        super().__init__()
        self.is_shared = shared
        if shared:
            self.shared = make("image")
        else:
            for modality in modalities:
                self.add_module(modality, make(modality))

    def part(self, modality: Modality) -> nn.Module:
        """The module that serves `modality`."""
        part = self.shared if self.is_shared else getattr(self, modality)
        assert isinstance(part, nn.Module)
        return part

    def forward(self, rows: Float[Tensor, "rows width"], split: int) -> Float[Tensor, "rows out"]:
        """Maps rows of which the first `split` belong to images and the others to text."""
        if self.is_shared:
            return self.shared(rows)
        if split == len(rows):
            return self.part("image")(rows)
        if split == 0:
            return self.part("text")(rows)
        return torch.cat([self.part("image")(rows[:split]), self.part("text")(rows[split:])])
