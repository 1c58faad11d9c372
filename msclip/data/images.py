"""From the bytes of any image file to uint8 pixels of one size, and from pixels to the model's normalised input.

A JPEG that will shrink is decoded at 1/2, 1/4 or 1/8 of its size (Pillow's draft mode), which halves the time of the
whole pipeline for photographs; the decoded image is never smaller than what is kept of it, for evaluation never under
twice that. Pixels stay uint8 until they
reach the model's device, a quarter of the bytes to move. Evaluation geometry is the field's: shorter side bicubic, then
the centre square. Decoding processes import this file, so PyTorch is imported only by what makes tensors.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageEnhance, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from msclip.data.bicubic import resized
from msclip.data.jpeg import Jpeg
from msclip.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

MAX_PIXELS = 2**26
"""Larger images are refused by their header: 192 MiB once decoded."""

# Pillow would also try forty others, among them EPS, for which it starts Ghostscript on whatever the file says.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

# Scaled decoding stays this many times above what a centre crop keeps. Over photographs of five sizes scaled to 32, 64,
# 160 and 224: at 1, the mean difference from a full decode was up to 1.6 of 255 and the largest 24; at 2, 0.4 and 7.
_CENTRE_MARGIN = 2

_ORIENTATION = 0x0112  # the EXIF tag; its values 2..8 are undone by these
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Background = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in shares of an image's sides, so that it fits the image at any resolution."""


class BadImage(ValueError):
    """An image that cannot be used; the message is a short reason, such as "truncated" or "too many pixels"."""


def open_image(
    data: bytes | Image.Image, background: Background = (255, 255, 255), max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The whole image, upright and in RGB; transparent parts show the background. Of an animation, the first frame.

    Raises:
        BadImage: not an image, truncated, larger than max_pixels, or of a kind that has no RGB form.
    """
    with _short_reasons():
        image, turn = _opened(data, max_pixels)
        image.load()
        image = _rgb(image, background)
        return image.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else image


@contextmanager
def _short_reasons() -> Iterator[None]:
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise BadImage("too many pixels") from None
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    # Pillow's readers meet hostile bytes with errors of many types (struct.error, SyntaxError, IndexError, ...).
    except Exception as error:
        text = str(error)
        raise BadImage("truncated" if "truncated" in text.lower() else f"broken: {text[:100]}") from error


def read_header(data: bytes | memoryview) -> Image.Image:
    """An image of which only the header has been read, of one of the formats that data sets have.

    Raises:
        Exception: whatever Pillow raises on bytes that are none.
    """
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _opened(data: bytes | memoryview | Image.Image, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, int]:
    """An image, and its EXIF orientation (1 to 8). Of a JPEG only the header has been read."""
    if isinstance(data, Image.Image):
        image = data.copy()  # loads it: the caller's own stays as it is
    elif not data:
        raise BadImage("empty")
    else:
        image = read_header(data)
    if image.width * image.height > max_pixels:
        raise BadImage(f"too many pixels: {image.width} x {image.height}")
    if isinstance(image, TiffImageFile):  # Pillow turns these itself
        return image, 1
    if not isinstance(image, JpegImageFile):
        image.load()  # as a PNG's getexif would do, whose failure at the pixels must not pass for damaged EXIF
    try:
        return image, int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return image, 1


def _quickly_opened(data: bytes | memoryview | Image.Image) -> tuple[Image.Image | Jpeg, int]:
    """`_opened`, with less to do for ordinary JPEGs."""
    jpeg = Jpeg.of(data, MAX_PIXELS)
    return (jpeg, 1) if jpeg else _opened(data)


def _upright_size(image: Image.Image | Jpeg, turn: int) -> tuple[int, int]:
    return (image.height, image.width) if turn >= 5 else image.size


def _view(
    image: Image.Image | Jpeg, turn: int, box: Box, size: int, margin: int | None, background: Background, cut: bool
) -> Image.Image:
    """The part of an upright image inside box as a square, bicubic with anti-aliasing.

    Args:
        margin: a JPEG is decoded just large enough for box to have margin * size pixels a side; `None` for all of it.
        cut: box lies on whole pixels of the full image, beyond which the filter shall not see: the field's random crop. Else
            box is a window on the whole image resized: the field's centre crop.
    """
    left, top, right, bottom = _stored(box, turn)
    whole = image.size
    extent: tuple[float, float] = whole
    least = None
    if margin is not None:
        least = math.ceil(margin * size / (right - left)), math.ceil(margin * size / (bottom - top))
    if isinstance(image, Jpeg):
        if decoded := image.decode(least):
            image, extent = Image.fromarray(decoded[0]), decoded[1]
        else:
            image, _ = _opened(image.data)
    if least and isinstance(image, JpegImageFile):
        # At 1/2, 375 rows become 188, of which the picture fills 187.5: draft tells.
        drafted = image.draft(None, least)
        extent = drafted[1][2:] if drafted else extent
    image.load()
    # Resizing only what the box keeps is the same picture, and a strip of 10,000 x 1 stays small.
    right, bottom = min(right * extent[0], image.width), min(bottom * extent[1], image.height)
    kept = left * extent[0], top * extent[1], right, bottom
    square = _rgb(image, background)
    if cut and extent == square.size:
        square = square.crop((round(kept[0]), round(kept[1]), round(right), round(bottom)))
        kept = 0.0, 0.0, float(square.width), float(square.height)
    if extent != whole:
        square = resized(square, size, kept)
    elif square.size != (size, size) or kept != (0, 0, size, size):
        square = square.resize((size, size), Image.Resampling.BICUBIC, box=kept)
    return square.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else square


def _stored(box: Box, turn: int) -> Box:
    """Where a box of the upright image lies in the image as it is stored."""
    left, top, right, bottom = box
    if turn >= 5:
        left, top, right, bottom = top, left, bottom, right
    if turn in (2, 3, 7, 8):
        left, right = 1 - right, 1 - left
    if turn in (3, 4, 6, 7):
        top, bottom = 1 - bottom, 1 - top
    return left, top, right, bottom


def _rgb(image: Image.Image, background: Background) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (modes I;16 and I) or of floats (mode F: from 0 to 1, else from 0 to 255) in 8 bits."""
    grey = np.asarray(image)
    if image.mode == "F":
        finite = np.nan_to_num(grey.astype(np.float32))
        grey = finite * 255 if finite.max(initial=0) <= 1 else finite
    else:
        grey = grey.astype(np.int64) // 257  # 65535 / 255
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Augment:
    """How a training image is varied. The defaults are CLIP's: a crop of nearly the whole image, nothing else."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Share of the area that the random crop keeps, least and most."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop before it is made square, least and most."""
    flip: float = 0.0
    """Probability of a mirror image."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are each multiplied by a number from 1 - this to 1 + this."""
    grayscale: float = 0.0
    """Probability that all colour goes."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"augment.scale must be 0 < least <= most <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"augment.ratio must be 0 < least <= most, got {self.ratio}")
        for name in ("flip", "color_jitter", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} must be from 0 to 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Preprocess:
    """What turns an image into the model's input; it travels with every checkpoint."""

    image_size: int = 224
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from red, green and blue (0 to 1). The default is ImageNet's, as MS-CLIP uses it; CLIP's differs."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """What red, green and blue are then divided by."""
    background: Background = (255, 255, 255)
    """Colour behind transparent images, 0 to 255."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")
        if min(self.std) <= 0:
            raise UserError(f"std must be positive, got {self.std}")

    def view(self, data: bytes | memoryview | Image.Image) -> Image.Image:
        """The evaluation view: shorter side to `image_size`, bicubic, then the centre square.

        Raises:
            BadImage: see `open_image`.
        """
        return self._centre(data, margin=None)

    def _centre(self, data: bytes | memoryview | Image.Image, margin: int | None) -> Image.Image:
        with _short_reasons():
            image, turn = _quickly_opened(data)
            box = centre_box(*_upright_size(image, turn), self.image_size)
            return _view(image, turn, box, self.image_size, margin, self.background, cut=False)

    def train_view(self, data: bytes | memoryview | Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
        """A random view for training: crop, then mirror, colours and grey as `augment` says.

        The same bytes and the same state of rng give the same pixels.

        Raises:
            BadImage: see `open_image`.
        """
        with _short_reasons():
            image, turn = _quickly_opened(data)
            box = random_box(*_upright_size(image, turn), augment, rng)
            return _varied(_view(image, turn, box, self.image_size, 1, self.background, cut=True), augment, rng)

    def write_view(self, data: bytes | memoryview, out: UInt8[np.ndarray, "size size 3"]) -> None:
        """Puts the centre where training wants it. A JPEG of that size is decoded right there, a large one at a fraction of
        its size, so that it differs a little from `view`.

        Raises:
            BadImage: see `open_image`.
        """
        jpeg = Jpeg.of(data, MAX_PIXELS)
        if not (jpeg and jpeg.size == (self.image_size, self.image_size) and jpeg.decode(out=out)):
            out[:] = np.asarray(self._centre(data, _CENTRE_MARGIN))

    def pixels(self, data: bytes | Image.Image) -> UInt8[np.ndarray, "size size 3"]:
        """`view` as an array."""
        return np.array(self.view(data))

    def train_pixels(
        self, data: bytes | Image.Image, augment: Augment, rng: np.random.Generator
    ) -> UInt8[np.ndarray, "size size 3"]:
        """`train_view` as an array."""
        return np.array(self.train_view(data, augment, rng))

    def images(self, pixels: UInt8[Tensor, "batch size size 3"]) -> Float[Tensor, "batch 3 size size"]:
        """Normalised float32 on the tensor's device, in channels-last memory order."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)

    def __call__(self, data: bytes | Image.Image) -> Float[Tensor, "3 size size"]:
        """The evaluation view, normalised."""
        import torch

        return self.images(torch.from_numpy(self.pixels(data))[None])[0]

    def to_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**settings)


def centre_box(width: int, height: int, size: int) -> Box:
    """What a centre crop of size keeps after the shorter side became size; both roundings are the field's."""
    short = min(width, height)
    wide, high = size * width // short, size * height // short
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return left / wide, top / high, (left + size) / wide, (top + size) / high


def random_box(width: int, height: int, augment: Augment, rng: np.random.Generator) -> Box:
    """A random crop.

    Area uniform, ratio log-uniform; after ten tries that do not fit, the largest centred crop of an allowed ratio. The
    crop lies on whole pixels of the full-size image.
    """
    low, high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*augment.scale)
        ratio = math.exp(rng.uniform(low, high))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
            break
    else:
        ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
        wide, tall = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        left, top = (width - wide) // 2, (height - tall) // 2
    return left / width, top / height, (left + wide) / width, (top + tall) / height


def _varied(image: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    if rng.random() < augment.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.color_jitter:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for i in rng.permutation(3):
            factor = rng.uniform(1 - augment.color_jitter, 1 + augment.color_jitter)
            image = enhancers[i](image).enhance(factor)
    if rng.random() < augment.grayscale:
        image = image.convert("L").convert("RGB")
    return image
