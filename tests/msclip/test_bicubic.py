"""The quick bicubic is Pillow's, as far as eight bits tell."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from msclip.data import bicubic

BOXES = [(0, 0, 1, 1), (0.061, 0.02, 0.977, 0.935), (0.5, 0.25, 0.875, 1)]
"""In shares of the sides."""


def noisy(width: int, height: int, seed: int = 0) -> Image.Image:
    """Edges everywhere, so that the filter overshoots black and white."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)).resize((width, height))
    return Image.fromarray(np.asarray(coarse) ^ rng.integers(0, 32, (height, width, 3), np.uint8))


def pillow(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """In two steps, because which one Pillow takes first depends on its version and on the picture."""
    left, top, right, bottom = box
    columns = image.resize((size, image.height), Image.Resampling.BICUBIC, box=(left, 0, right, image.height))
    return np.asarray(columns.resize((size, size), Image.Resampling.BICUBIC, box=(0, top, size, bottom))).astype(int)


def boxes(image: Image.Image) -> list[tuple[float, float, float, float]]:
    wide, high = image.size
    return [(left * wide, top * high, right * wide, bottom * high) for left, top, right, bottom in BOXES]


@pytest.mark.parametrize(
    "sides",
    [(512, 512, 224), (300, 187, 224), (640, 449, 64), (99, 140, 32), (48, 40, 64), (300, 400, 224), (66, 69, 64)],
    ids=str,
)
def test_few_values_differ_from_pillow_s_and_hardly_any_by_two_levels(sides: tuple[int, int, int]) -> None:
    pytest.importorskip("cykooz_resizer")
    image = noisy(*sides[:2])
    for box in boxes(image):
        found = np.asarray(bicubic.resized(image, sides[2], box)).astype(int)
        difference = np.abs(found - pillow(image, sides[2], box))
        assert (difference > 0).mean() < 0.01
        assert (difference > 1).mean() < 1e-4
        assert difference.max() <= 2


def test_threads_resize_at_once() -> None:
    pytest.importorskip("cykooz_resizer")
    images = [noisy(256, 200, seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: bicubic.resized(image, 64, (0, 0, 256, 200)).tobytes(), images))
    assert found == [bicubic.resized(image, 64, (0, 0, 256, 200)).tobytes() for image in images]


def test_without_the_package_pillow_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bicubic, "cykooz_resizer", None)
    image = noisy(130, 70)
    for box in boxes(image):
        expected = image.resize((32, 32), Image.Resampling.BICUBIC, box=box)
        np.testing.assert_array_equal(np.asarray(bicubic.resized(image, 32, box)), np.asarray(expected))
