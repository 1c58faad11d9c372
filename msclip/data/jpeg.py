"""Ordinary JPEGs straight to an array, to the same bits as Pillow's and in two thirds of its time.

Both stand on libjpeg-turbo. What is saved is what Pillow does around it: it reads headers in Python, has four bytes a pixel,
packs them to three and copies twice. Whatever is not ordinary is left to Pillow: metadata that may turn the picture, other
colours than YCbCr, and files that are damaged in any way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

try:
    import simplejpeg
except ImportError:  # not built for this platform: Pillow decodes all
    simplejpeg = None

if TYPE_CHECKING:
    from jaxtyping import UInt8

_START, _SCAN = b"\xff\xd8\xff", b"\xff\xda"
_SEGMENTS = frozenset((0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE))
"""Second bytes of what may come before the first scan: frames, tables, applications' own but the first's, comments."""
_LEAST_SIDE = 16
"""In smaller ones, scaled sizes coincide."""


def _is_plain(data: bytes) -> bool:
    """Whether only known segments come before the first scan, and neither EXIF nor XMP."""
    at = 2
    while (marker := data[at : at + 2]) != _SCAN:
        if len(marker) < 2 or marker[0] != 0xFF or marker[1] not in _SEGMENTS:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return True


class Jpeg:
    """An ordinary JPEG whose header has been read."""

    def __init__(self, data: bytes, width: int, height: int):
        self.data, self.size = data, (width, height)
        self.width, self.height = width, height

    @classmethod
    def of(cls, data: object, max_pixels: int) -> Jpeg | None:
        """The file as one, if it is one and not too large."""
        if simplejpeg is None or not isinstance(data, bytes | memoryview) or data[:3] != _START:
            return None
        data = bytes(data)
        if not _is_plain(data):
            return None
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return None
        ordinary = colours == "YCbCr" and min(width, height) >= _LEAST_SIDE and width * height <= max_pixels
        return cls(data, width, height) if ordinary else None

    def decode(
        self, least: tuple[int, int] | None = None, out: UInt8[np.ndarray, "height width 3"] | None = None
    ) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[float, float]] | None:
        """The pixels in RGB, and how many of them the picture fills in width and height; `None` if anything is wrong with it.

        Args:
            least: the picture is decoded at 1/2, 1/4 or 1/8 if it stays so wide and high; as Pillow's draft mode does.
            out: where to, for a whole picture of that size.
        """
        scale = 1
        if least:
            most = min(self.width // least[0], self.height // least[1])
            scale = next((each for each in (8, 4, 2) if most >= each), 1)
        wide, high = -(-self.width // scale), -(-self.height // scale)
        try:
            pixels = simplejpeg.decode_jpeg(self.data, min_height=high, min_width=wide, buffer=out)
        except ValueError:
            return None
        assert pixels.shape == (high, wide, 3)
        return pixels, (self.width / scale, self.height / scale)
