"""A picture of a data set: some of its images, each with its first caption, because people look.

Which ones is a function of the manifest: rows at equal distances, from few row groups, so that little is read.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from msclip.data.captions import texts
from msclip.data.images import BadImage, open_image
from msclip.data.shards import Manifest

COLUMNS, ROWS = 8, 6
_SIDE, _GAP, _LINES, _FONT = 180, 14, 3, 13  # pixels; lines of a caption
_LINE = 17
_PAPER, _CARD, _INK, _MUTED = "#fbfbfa", "#f2f4f5", "#1b1f24", "#68727d"


class Sample(NamedTuple):
    """A row of the sheet."""

    image: Image.Image | None
    """None where it cannot be read, which a shard of ingest has none of."""
    caption: str
    more: int
    """How many further captions it has."""


def sample(manifest: Manifest, count: int = COLUMNS * ROWS) -> list[Sample]:
    """Rows at equal distances, out of at most a quarter as many row groups."""
    groups = [i for i, size in enumerate(manifest.sizes.tolist()) if size]
    picked = [groups[i] for i in _spread(len(groups), max(1, count // 4))]
    shares = np.diff(np.linspace(0, min(count, manifest.rows), len(picked) + 1).astype(int))
    samples = []
    for group, share in zip(picked, shares.tolist(), strict=True):
        table = manifest.read(group)
        for row in _spread(len(table), share):
            cell = table[manifest.image_column][row].as_py()
            captions = texts(table[manifest.caption_column][row].as_py())
            samples.append(_sample(cell.get("bytes") if isinstance(cell, dict) else cell, captions))
    return samples


def _spread(length: int, count: int) -> list[int]:
    """`count` of the numbers below length, or all of them, at equal distances."""
    count = min(count, length)
    return [int((i + 0.5) * length / count) for i in range(count)]


def _sample(data: bytes | None, captions: Sequence[str]) -> Sample:
    try:
        image = open_image(data or b"")
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    except BadImage:
        image = None
    return Sample(image, captions[0] if captions else "", max(0, len(captions) - 1))


def draw(samples: Sequence[Sample], title: str) -> Image.Image:
    """The sheet: images as wide or as high as their cell, whole, and captions cut after three lines."""
    columns = min(COLUMNS, max(4, len(samples)))
    rows = -(-len(samples) // columns)
    cell = _SIDE + _LINES * _LINE + _GAP
    sheet = Image.new("RGB", (columns * (_SIDE + _GAP) + _GAP, rows * (cell + _GAP) + 44 + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = _font(_FONT)
    pen.text((_GAP, 14), title, fill=_INK, font=_font(17))
    for index, each in enumerate(samples):
        left, top = _GAP + index % columns * (_SIDE + _GAP), 44 + index // columns * (cell + _GAP)
        pen.rounded_rectangle((left, top, left + _SIDE, top + _SIDE), 6, fill=_CARD)
        if each.image:
            sheet.paste(each.image, (left + (_SIDE - each.image.width) // 2, top + (_SIDE - each.image.height) // 2))
        lines = _lines(each.caption, font)
        below = top + _SIDE + 6
        for number, line in enumerate(lines):
            pen.text((left, below + number * _LINE), line, fill=_INK, font=font)
        end = pen.textlength(f"{lines[-1]}  ", font)
        if each.more and end + pen.textlength(more := f"+{each.more}", font) <= _SIDE:
            pen.text((left + end, below + (len(lines) - 1) * _LINE), more, fill=_MUTED, font=font)
    return sheet


def _lines(caption: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """At most three lines that fit."""
    width = 40
    while True:  # by characters, fewer until the widest line fits
        lines = textwrap.wrap(" ".join(caption.split()), width, max_lines=_LINES, placeholder=" …") or [""]
        if width == 5 or all(font.getlength(line) <= _SIDE for line in lines):
            return lines
        width -= 1


def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib's own copy: many scripts, and the same letters on every machine.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
