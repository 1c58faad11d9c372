"""One row on its way into a shard: what is let in, what is scaled, what stays to the byte."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from msclip.data.images import BadImage, open_image
from msclip.data.prepare import CaptionRules, ImageRules
from msclip.errors import UserError


def photo(size: tuple[int, int], kind: str = "JPEG", **options: object) -> bytes:
    """A smooth picture with a bright corner at the top left."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    grey = 255 * np.exp(-3 * (x / size[0]) - 2 * (y / size[1]))
    image = Image.fromarray(np.stack([grey, grey / 2, 255 - grey], -1).astype(np.uint8))
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def test_only_larger_images_are_scaled_and_others_stay_to_the_byte() -> None:
    rules = ImageRules(short_side=40)
    for size in ((40, 90), (30, 20), (41, 40)):
        for kind in ("JPEG", "PNG"):
            data = photo(size, kind)
            assert rules.apply(data)[:3] == (data, *size)
    for size, scaled in (((80, 200), (40, 100)), ((333, 41), (325, 40)), ((2000, 1500), (53, 40))):
        for kind in ("JPEG", "PNG"):
            data = photo(size, kind)
            stored = rules.apply(data)
            image = Image.open(io.BytesIO(stored.data))
            assert (image.format, image.size) == ("JPEG", scaled)
            assert (stored.width, stored.height) == scaled
            assert stored.sha256 == hashlib.sha256(data).digest()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_photo_is_upright_and_looks_like_the_whole(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photo((1200, 900), exif=exif, quality=95)
    stored = ImageRules(short_side=60).apply(data)
    whole = open_image(data)
    small = Image.open(io.BytesIO(stored.data))
    assert small.size == ((80, 60) if orientation < 5 else (60, 80))
    assert 0x0112 not in small.getexif()
    expected = np.asarray(whole.resize(small.size, Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(small, float) - expected).mean() < 2


def test_every_image_may_be_stored_in_one_format_without_a_second_loss() -> None:
    webp = ImageRules(form="webp", quality=80)
    stored = webp.apply(photo((50, 40)))
    image = Image.open(io.BytesIO(stored.data))
    assert (image.format, image.size) == ("WEBP", (50, 40))
    assert webp.apply(stored.data).data == stored.data
    clear = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(clear, "PNG")
    jpeg = ImageRules(form="jpeg").apply(clear.getvalue())
    assert Image.open(io.BytesIO(jpeg.data)).getpixel((3, 3)) == (255, 255, 255)
    best, worst = (ImageRules(form="jpeg", quality=q).apply(photo((50, 40), "PNG")) for q in (95, 5))
    assert len(best.data) > len(worst.data)


def test_size_and_shape_are_looked_at_before_anything_is_decoded() -> None:
    rules = ImageRules(min_side=32, max_aspect=3)
    good, small, long = photo((96, 32)), photo((31, 500)), photo((200, 40))
    assert rules.apply(good).data == good
    refused = ((small, "too small: 31 x 500"), (small[:-200], "too small"), (long, "aspect ratio too large: 200 x 40"))
    for data, reason in refused:
        with pytest.raises(BadImage, match=reason):
            rules.apply(data)


def test_what_no_file_of_the_format_can_hold_is_refused() -> None:
    long = photo((20, 17_000), "PNG")
    assert ImageRules().apply(long).data == long
    for rules, reason in (
        (ImageRules(form="webp"), "too long for webp: 20 x 17000"),
        (ImageRules(form="webp", short_side=20), "too long for webp: 20 x 17000"),
        (ImageRules(form="jpeg"), "too long for jpeg: 1 x 65501"),
    ):
        with pytest.raises(BadImage, match=reason):
            rules.apply(long if rules.form == "webp" else photo((1, 65_501), "PNG"))
    assert ImageRules(form="webp", short_side=10).apply(long)[1:3] == (10, 8500)


def test_a_progressive_jpeg_is_not_unpacked_beyond_the_limit_whatever_is_kept_of_it() -> None:
    large = Image.new("L", (8200, 8200))
    large.save(plain := io.BytesIO(), "JPEG")
    large.save(progressive := io.BytesIO(), "JPEG", progressive=True)
    rules = ImageRules(short_side=64)
    assert rules.apply(plain.getvalue())[1:3] == (64, 64)
    with pytest.raises(BadImage, match="too many pixels: 8200 x 8200, progressive"):
        rules.apply(progressive.getvalue())


@pytest.mark.parametrize("short_side", [None, 16])
def test_a_truncated_image_is_refused_whether_or_not_it_would_be_scaled(short_side: int | None) -> None:
    with pytest.raises(BadImage, match="truncated"):
        ImageRules(short_side=short_side).apply(photo((400, 300), quality=95)[:-500])
    for data, reason in ((b"", "empty"), (b"words", "not an image")):
        with pytest.raises(BadImage, match=reason):
            ImageRules(short_side=short_side).apply(data)


def test_captions_are_let_in_one_by_one() -> None:
    rules = CaptionRules(min_chars=3, max_chars=6)
    assert rules.apply(["ab", "three", "too long"]) == (["three"], "")
    assert rules.apply(["ab"]) == ([], "caption too short: 2 characters")
    assert rules.apply(["too long"]) == ([], "caption too long: 8 characters")
    assert rules.apply([]) == ([], "no caption")
    assert CaptionRules().apply(["a" * 1000]) == (["a" * 1000], "")


@pytest.mark.parametrize(
    ("rules", "settings", "message"),
    [
        (ImageRules, {"short_side": 0}, "image_short_side must be at least 1"),
        (ImageRules, {"min_side": 0}, "min_image_side must be at least 1"),
        (ImageRules, {"quality": 101}, "image_quality must be from 1 to 100"),
        (ImageRules, {"max_aspect": 0.5}, "max_aspect_ratio must be at least 1"),
        (CaptionRules, {"min_chars": 9, "max_chars": 8}, "min_caption_chars must be .* got 9 and 8"),
    ],
)
def test_senseless_rules_are_the_users_mistake(rules: type, settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rules(**settings)
