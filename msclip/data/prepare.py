"""What becomes of one row before it is stored: which images and captions are let in, and how an image is stored.

Every image is decoded once, in full. A JPEG that will be shrunk is decoded at a fraction of its size, never below twice what
is kept of it; all of its data is read for that, so a truncated file shows all the same. So what will be shrunk may be larger
than what training would decode.
"""

import io
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

from msclip.data.hashes import content_hash, perceptual_hash
from msclip.data.images import MAX_PIXELS, BadImage, open_image, read_header
from msclip.errors import UserError

Format = Literal["jpeg", "webp"]

_MARGIN = 2  # msclip/data/images.py says what it was chosen by
_LONGEST_SIDE: dict[Format, int] = {"jpeg": 65_500, "webp": 16_383}  # that can be written, in pixels


class Stored(NamedTuple):
    """An image as it goes into a shard."""

    data: bytes
    width: int
    """Pixels, of the upright image."""
    height: int
    sha256: bytes
    """Of the file before it was changed."""
    phash: int | None
    """`perceptual_hash` of the picture, once it is scaled."""


@dataclass(frozen=True)
class ImageRules:
    """Which images are let in, and how they are stored."""

    short_side: int | None = None
    """Pixels; a longer shorter side is scaled down to this, bicubic. None: no image is scaled."""
    form: Format | None = None
    """Every image is stored in this format. None: what is scaled becomes JPEG, and the rest stays as it is."""
    quality: int = 92
    """Of what is encoded anew, 1 to 100."""
    min_side: int = 1
    """Pixels of the shorter side, before scaling."""
    max_aspect: float | None = None
    """Longer over shorter side."""

    def __post_init__(self) -> None:
        for name, value in (("image_short_side", self.short_side), ("min_image_side", self.min_side)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"image_quality must be from 1 to 100, got {self.quality}")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise UserError(f"max_aspect_ratio must be at least 1, got {self.max_aspect}")

    def apply(self, data: bytes) -> Stored:
        """The image as it is to be stored.

        Raises:
            BadImage: it cannot be decoded in full, or is not let in; the message is a short reason.
        """
        header = _header(data)
        least, most = sorted(header.size)
        if least < self.min_side:
            raise BadImage(f"too small: {header.width} x {header.height}")
        if self.max_aspect is not None and most > self.max_aspect * least:
            raise BadImage(f"aspect ratio too large: {header.width} x {header.height}")
        if header.width * header.height > MAX_PIXELS and "progressive" in header.info:
            # At an eighth too, every coefficient is held until the last has come: 1 GiB, out of a file of 2 MB.
            raise BadImage(f"too many pixels: {header.width} x {header.height}, progressive")
        shrink = self.short_side is not None and least > self.short_side
        full = header.size
        if shrink and self.short_side and header.format == "JPEG":
            across, down = (max(1, side * _MARGIN * self.short_side // least) for side in full)
            header.draft(None, (across, down))
        # What is not decoded smaller goes in as bytes, of which no copy is made.
        image = open_image(data if header.size == full else header)
        # Upright, the image may lie across what the header said.
        width, height = full if (full[0] > full[1]) == (image.width > image.height) else full[::-1]
        if shrink and self.short_side:
            width, height = (round(side * self.short_side / least) for side in (width, height))
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        phash = perceptual_hash(image)
        target: Format = self.form or "jpeg"
        if not shrink and (self.form is None or header.format == target.upper()):
            return Stored(data, width, height, content_hash(data), phash)
        if max(width, height) > _LONGEST_SIDE[target]:
            raise BadImage(f"too long for {target}: {width} x {height}")
        image.save(buffer := io.BytesIO(), target, quality=self.quality)
        return Stored(buffer.getvalue(), width, height, content_hash(data), phash)


def _header(data: bytes) -> Image.Image:
    try:
        return read_header(data)
    except Exception:
        open_image(data)  # says in a few words what is wrong
        raise


@dataclass(frozen=True)
class CaptionRules:
    """Which captions are let in."""

    min_chars: int = 1
    max_chars: int | None = None

    def __post_init__(self) -> None:
        most = self.max_chars
        if self.min_chars < 1 or (most is not None and most < self.min_chars):
            raise UserError(
                f"min_caption_chars must be at least 1 and at most max_caption_chars, got {self.min_chars} and {most}"
            )

    def apply(self, captions: list[str]) -> tuple[list[str], str]:
        """The captions that stay, and where none does the reason why the first was not let in."""
        kept = [text for text in captions if self.min_chars <= len(text) <= (self.max_chars or len(text))]
        if kept or not captions:
            return kept, "" if kept else "no caption"
        short = len(captions[0]) < self.min_chars
        return [], f"caption too {'short' if short else 'long'}: {len(captions[0])} characters"
