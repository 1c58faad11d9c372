"""Ordinary JPEGs are decoded to the same bits as by Pillow, and all others by Pillow."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from msclip.data import images, jpeg
from msclip.data.images import Augment, BadImage, Preprocess
from msclip.data.jpeg import Jpeg

pytest.importorskip("simplejpeg")
PREPROCESS, SIZES = Preprocess(image_size=32), [(32, 32), (33, 47), (64, 64), (129, 70), (257, 513), (17, 300)]
KINDS: list[dict[str, Any]] = [
    {"subsampling": "4:4:4"},
    {"subsampling": "4:2:2"},
    {"subsampling": "4:2:0", "quality": 20},
    {"progressive": True},
    {"optimize": True, "restart_marker_blocks": 3},
]


def photo(width: int, height: int, **options: Any) -> bytes:
    random = np.random.default_rng(width)
    small = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", **options)
    return file.getvalue()


def all_views(data: bytes) -> list[np.ndarray]:
    written = np.zeros((32, 32, 3), np.uint8)
    PREPROCESS.write_view(memoryview(data), written)
    augment = Augment(scale=(0.3, 1.0), flip=0.5, color_jitter=0.2)
    varied = [PREPROCESS.train_pixels(data, augment, np.random.default_rng(seed)) for seed in range(3)]
    return [written, PREPROCESS.pixels(data), *varied]


def views_or_reason(data: bytes) -> list[np.ndarray] | str:
    try:
        return all_views(data)
    except BadImage as error:
        return str(error)


def both_ways(data: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[list[np.ndarray] | str, list[np.ndarray] | str]:
    """With and without the package that decodes ordinary JPEGs."""
    quick = views_or_reason(data)
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "simplejpeg", None)
        return quick, views_or_reason(data)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_ordinary_jpeg_has_the_bits_that_pillow_gives_it(
    size: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = photo(*size, **options)
    assert Jpeg.of(data, images.MAX_PIXELS)
    np.testing.assert_array_equal(*both_ways(data, monkeypatch))


def test_photographs_have_the_bits_that_pillow_gives_them(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = pq.read_table(shared_data / "flickr8k_val.parquet", columns=["image"])["image"]
    photographs = [cell["bytes"] if isinstance(cell, dict) else cell for cell in column.slice(0, 50).to_pylist()]
    assert sum(Jpeg.of(data, images.MAX_PIXELS) is not None for data in photographs) > 25
    for data in photographs:
        np.testing.assert_array_equal(*both_ways(data, monkeypatch))


def saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.open(io.BytesIO(photo(40, 60))), exif=exif)


def test_what_is_not_ordinary_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.open(io.BytesIO(photo(40, 60)))
    png = io.BytesIO()
    picture.save(png, "PNG")
    for data in (turned(), saved(picture.convert("L")), saved(picture.convert("CMYK")), png.getvalue(), photo(15, 40)):
        assert Jpeg.of(data, images.MAX_PIXELS) is None
        np.testing.assert_array_equal(*both_ways(data, monkeypatch))
    assert Jpeg.of(photo(40, 60), 40 * 60 - 1) is None


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    """The file with one more segment, the first."""
    return data[:2] + bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


def test_what_looks_like_a_marker_inside_a_segment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, upright = with_segment(turned(), 0xE2, b"a scan? \xff\xda\0"), photo(40, 60)
    assert Jpeg.of(hidden, images.MAX_PIXELS) is None
    assert Jpeg.of(with_segment(upright, 0xFE, b"EXIF? \xff\xe1"), images.MAX_PIXELS)
    for data in (hidden, with_segment(upright, 0xFE, b"EXIF? \xff\xe1"), upright[:2] + b"\xff" + upright[2:]):
        np.testing.assert_array_equal(*both_ways(data, monkeypatch))
    assert views_or_reason(hidden)[1].tolist() == views_or_reason(turned())[1].tolist()  # type: ignore[union-attr]


def test_a_damaged_jpeg_is_judged_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = photo(64, 64)
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(whole)
        for at in random.integers(len(whole), size=2):
            damaged[at] = random.integers(256)
        data = bytes(damaged[: random.integers(len(whole) // 2, 2 * len(whole))])
        quick, slow = both_ways(data, monkeypatch)
        np.testing.assert_array_equal(quick, slow)
        outcomes.add(slow if isinstance(slow, str) else "picture")
    assert outcomes >= {"picture", "truncated"}
