"""Same and nearly same: the banded index finds what comparing all with all finds."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from msclip.data.hashes import _near_pairs, content_hash, leaders, perceptual_hash
from msclip.data.images import open_image


def brute_force(hashes: list[int], distance: int, fixed: int) -> list[int]:
    found: list[int] = []
    for j, value in enumerate(hashes):
        near = (i for i in range(j) if found[i] < 0 and (hashes[i] ^ value).bit_count() <= distance)
        found.append(-1 if j < fixed else next(near, -1))
    return found


words = st.integers(0, 2**64 - 1)


@st.composite
def crowded(draw: st.DrawFn) -> list[int]:
    """Hashes around a few centres, so that near ones, chains and repetitions are common."""
    centres = draw(st.lists(words, min_size=1, max_size=3))
    bits = st.lists(st.integers(0, 63), max_size=7)
    flips = draw(st.lists(st.tuples(st.sampled_from(centres), bits), max_size=40))
    return [centre ^ sum(1 << bit for bit in set(bits)) for centre, bits in flips]


@given(crowded(), st.integers(0, 16), st.integers(0, 6))
@settings(deadline=None, max_examples=300)
def test_the_index_finds_what_comparing_all_with_all_finds(hashes: list[int], distance: int, fixed: int) -> None:
    found = leaders(np.array(hashes, np.uint64), distance, min(fixed, len(hashes)))
    assert found.tolist() == brute_force(hashes, distance, min(fixed, len(hashes)))


def test_a_chain_of_near_rows_does_not_go_as_a_whole() -> None:
    assert leaders(np.array([0b0, 0b11, 0b1111], np.uint64), 2).tolist() == [-1, 0, -1]


@pytest.mark.parametrize("distance", [9, 10, 16])  # by bands, and each with each
def test_of_many_hashes_all_near_pairs_are_found(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = np.unique(rng.integers(0, 2**64, 1000, dtype=np.uint64))
    flipped = [sum(1 << int(bit) for bit in rng.permutation(64)[:bits]) for bits in rng.integers(1, 20, 200)]
    hashes = np.unique(np.concatenate([hashes, hashes[:200] ^ np.array(flipped, np.uint64)]))
    near = np.triu(np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance, 1)
    found = np.zeros_like(near)
    one, other = _near_pairs(hashes, distance)
    assert len(one) == near.sum() > 50
    found[np.minimum(one, other), np.maximum(one, other)] = True
    assert np.array_equal(found, near)


def test_many_hashes_take_no_quadratic_time() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 200_000, dtype=np.uint64)  # all pairs would be 20 billion: minutes
    hashes[150_000] = hashes[7] ^ np.uint64(0b1001001)
    found = leaders(hashes, 3)
    assert np.flatnonzero(found >= 0).tolist() == [150_000]
    assert found[150_000] == 7


@pytest.fixture
def picture() -> Image.Image:
    image = Image.new("RGB", (300, 200), (210, 225, 240))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 40, 140, 150), fill=(200, 40, 30))
    draw.polygon([(170, 180), (220, 60), (290, 170)], fill=(20, 120, 60))
    return image.filter(ImageFilter.GaussianBlur(1))


def distance(one: Image.Image, other: Image.Image) -> int:
    a, b = perceptual_hash(one), perceptual_hash(other)
    assert a is not None
    assert b is not None
    return (a ^ b).bit_count()


def test_the_same_picture_stored_otherwise_is_near_and_another_is_far(picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.resize((150, 100), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=40)
    assert distance(picture, Image.open(buffer)) <= 4
    assert distance(picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 12
    assert distance(picture, picture.rotate(90)) > 12


def test_flat_pictures_have_no_hash_to_be_near_by() -> None:
    assert perceptual_hash(Image.new("RGB", (50, 40), (200, 10, 10))) is None


def test_the_cosines_are_those_of_scipy(picture: Image.Image) -> None:
    fft = pytest.importorskip("scipy.fft")
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX), float)
    low = fft.dctn(grey, norm="ortho")[:8, :8]
    expected = int.from_bytes(np.packbits(low > np.median(low)).tobytes())
    assert perceptual_hash(picture) == expected


def test_the_content_hash_is_of_every_byte() -> None:
    assert content_hash(b"one") == content_hash(b"one") != content_hash(b"one ")


def test_photographs_are_known_again_and_never_taken_for_others(shared_data: Path) -> None:
    column = pq.read_table(shared_data / "flickr8k_val.parquet", columns=["image"])["image"]
    photos = [open_image(data) for data in column.to_pylist()]
    hashes = np.array([perceptual_hash(photo) for photo in photos], np.uint64)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None]) + 64 * np.eye(len(photos), dtype=int)
    assert apart.min() > 8

    def stored(photo: Image.Image, size: tuple[int, int], quality: int) -> Image.Image:
        photo.resize(size, Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), "JPEG", quality=quality)
        return Image.open(buffer)

    for size, quality in (((112, 112), 75), ((224, 224), 30), ((160, 200), 90)):
        moved = np.array([perceptual_hash(stored(photo, size, quality)) for photo in photos[:300]], np.uint64)
        assert (np.bitwise_count(moved ^ hashes[:300]) <= 4).mean() > 0.98
