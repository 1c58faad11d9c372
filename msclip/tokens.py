"""The joint stream: image tokens and caption tokens as the rows of one matrix.

Every part that is shared then costs one matrix product for both modalities. Images are dense (each has the same number of
tokens); captions are packed end to end without padding: no token after a caption's end token can change its embedding, by the
causal mask or, without it, because attention is told where captions end.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msclip.sharing import Modality


@dataclass(frozen=True)
class PackedText:
    """Captions without padding.

    Index tensors are made once for a batch, where the lengths are known without waiting for a device.
    """

    ids: Int[Tensor, "tokens"]
    positions: Int[Tensor, "tokens"]
    """Place of each token in its caption, from 0."""
    padded: Int[Tensor, "tokens"]
    """Where each token stands in the flattened (captions, max_length) matrix."""
    offsets: Int[Tensor, "captions+1"]
    """First token of each caption and the total, int32, as variable-length attention wants them."""
    max_length: int
    context: int
    """Tokens that a caption may have at most: unlike `max_length` the same for every batch."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def starts(self) -> Int[Tensor, "captions"]:
        """Row of each caption's first token."""
        return self.offsets[:-1].long()

    @property
    def ends(self) -> Int[Tensor, "captions"]:
        """Row of each caption's last token."""
        return self.offsets[1:].long() - 1

    @property
    def captions(self) -> Int[Tensor, "tokens"]:
        """Which caption each token belongs to."""
        return self.padded // self.max_length

    @property
    def inside(self) -> Bool[Tensor, "captions length"]:
        """Where the (captions, max_length) matrix has tokens and no padding."""
        return torch.arange(self.max_length, device=self.ids.device) < self.offsets.diff()[:, None]

    def only(self, rows: Int[Tensor, "captions"]) -> "PackedText":
        """One token of each caption."""
        count = torch.arange(len(self) + 1, device=self.ids.device)
        return PackedText(self.ids[rows], self.positions[rows], count[:-1], count.int(), max_length=1, context=1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedText":
        """A copy on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("ids", "positions", "padded", "offsets")
        }
        return replace(self, **moved)


def pack(token_ids: Int[Tensor, "captions length"]) -> PackedText:
    """Drops what follows each caption's end token, the largest id of its row.

    A caption that was cut without an end token keeps its start token alone: its largest id stands first, and that is the
    position the official MS-CLIP code pools.
    """
    lengths = token_ids.argmax(dim=1) + 1
    max_length = int(lengths.max())
    positions = torch.arange(max_length, device=token_ids.device)
    inside = positions < lengths[:, None]  # (captions, max_length)
    zero = lengths.new_zeros(1)
    return PackedText(
        ids=token_ids[:, :max_length][inside],
        positions=positions.expand_as(inside)[inside],
        padded=inside.flatten().nonzero().squeeze(1),
        offsets=torch.cat([zero, lengths.cumsum(0)]).int(),
        max_length=max_length,
        context=token_ids.shape[1],
    )


@dataclass(frozen=True)
class Tokens:
    """Activations of a batch of images, a batch of captions, or both: image rows first."""

    rows: Float[Tensor, "rows width"]
    images: int
    """How many images."""
    grid: int
    """Tokens of one image, the class token included."""
    text: PackedText | None

    @staticmethod
    def join(image: Float[Tensor, "images grid width"] | None, text_rows: Tensor | None, text: PackedText | None) -> "Tokens":
        """The stream of whichever modalities are given."""
        images, grid = (image.shape[0], image.shape[1]) if image is not None else (0, 0)
        parts = [x for x in (None if image is None else image.flatten(0, 1), text_rows) if x is not None]
        return Tokens(parts[0] if len(parts) == 1 else torch.cat(parts), images, grid, text)

    @property
    def split(self) -> int:
        """The first caption row."""
        return self.images * self.grid

    @property
    def image(self) -> Float[Tensor, "images grid width"]:
        """Image tokens."""
        return self.rows[: self.split].view(self.images, self.grid, -1)

    def with_rows(self, rows: Float[Tensor, "rows width"]) -> "Tokens":
        """The same layout with other activations."""
        return replace(self, rows=rows)

    def with_image(self, image: Float[Tensor, "images grid width"]) -> "Tokens":
        """The same captions with other image tokens."""
        return Tokens.join(image, None if self.text is None else self.rows[self.split :], self.text)

    def with_text(self, text_rows: Float[Tensor, "tokens width"]) -> "Tokens":
        """The same images with other caption tokens."""
        return Tokens.join(self.image if self.images else None, text_rows, self.text)

    def only(self, modality: Modality) -> "Tokens":
        """One modality's part of the stream."""
        if modality == "image":
            return Tokens(self.rows[: self.split], self.images, self.grid, None)
        return Tokens(self.rows[self.split :], 0, 0, self.text)

    def pooled(self, text_pool: Literal["end", "cls"]) -> "Tokens":
        """The stream of one token a sample: an image's class token, and a caption's end token, or its first for `cls`."""
        rows = self.image[:, 0] if self.images else self.rows[:0]
        if self.text is None:
            return Tokens(rows, self.images, 1, None)
        chosen = self.text.ends if text_pool == "end" else self.text.starts
        rows = torch.cat([rows, self.rows[self.split :][chosen]])
        return Tokens(rows, self.images, 1, self.text.only(chosen))

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What is in the stream."""
        return (*(("image",) if self.images else ()), *(("text",) if self.text is not None else ()))
