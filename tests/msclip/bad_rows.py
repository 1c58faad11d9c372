"""Rows of eight kinds that cannot be used, and the reason that each must get."""

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
from PIL import Image


def photo(number: int, kind: str) -> bytes:
    """A small noisy picture."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a hundred bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def broken_png() -> bytes:
    """A PNG whose compressed pixels begin with something else."""
    data = bytearray(photo(0, "PNG"))
    begin = data.index(b"IDAT") + 4
    data[begin : begin + 50] = b"\xff" * 50
    return bytes(data)


Cell = tuple[bytes | None, list[str | None] | None]
"""Image and captions of a row."""

SAID: list[str | None] = ["something"]
KINDS: dict[str, tuple[Cell, str]] = {
    "truncated JPEG": ((photo(1, "JPEG")[:300], SAID), "truncated"),
    "text called .jpg": ((b"<html>404 Not Found</html>", SAID), "not an image"),
    "no bytes": ((b"", SAID), "empty"),
    "no image": ((None, SAID), "no image"),
    "no captions": ((photo(2, "JPEG"), None), "no caption"),
    "captions that say nothing": ((photo(3, "JPEG"), ["", None, " \n"]), "no caption"),
    "decompression bomb": ((bomb(), SAID), "too many pixels"),
    "broken PNG": ((broken_png(), SAID), "broken: "),
}
"""By name, and the beginning of the reason."""


def with_bad_rows(rows: int, every: int) -> tuple[pa.Table, dict[int, str]]:
    """Good rows with one of the kinds, in turn, at every `every`-th; and the reason by row."""
    cells: list[Cell] = [(photo(i, ("JPEG", "PNG")[i % 2]), [f"picture {i}", f"number {i}"]) for i in range(rows)]
    expected = {}
    for i, row in enumerate(range(every // 2, rows, every)):
        cells[row], expected[row] = list(KINDS.values())[i % len(KINDS)]
    images, captions = zip(*cells, strict=True)
    columns = {"image": pa.array(images, pa.binary()), "captions": pa.array(captions, pa.list_(pa.string()))}
    return pa.table(columns | {"key": [f"k{i}" for i in range(rows)]}), expected
