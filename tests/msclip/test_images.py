"""Bytes to pixels: every kind of file, honest reasons for bad ones, and the same view whatever shortcut decoding took."""

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms

from msclip.data.images import Augment, BadImage, Preprocess, open_image, random_box
from msclip.errors import UserError


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, blue is a wave: every turn and shift of it shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    blue = np.sin(6 * x + 3 * y) / 2 + 0.5
    return Image.fromarray((np.stack([x, y, blue], 2) * 255).astype(np.uint8))


def reference(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side to size, centre crop, in two plain steps at full resolution."""
    width, height = image.size
    short = min(width, height)
    image = image.convert("RGB").resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def written(preprocess: Preprocess, data: bytes) -> np.ndarray:
    """The centre as training has it."""
    out = np.empty((preprocess.image_size, preprocess.image_size, 3), np.uint8)
    preprocess.write_view(data, out)
    return out


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("size", [(64, 64), (90, 61), (61, 90), (20, 20), (300, 7), (7, 300)])
def test_the_evaluation_view_is_shorter_side_bicubic_then_centre(size: tuple[int, int]) -> None:
    pixels = Preprocess(32).pixels(encoded(smooth(*size), "PNG"))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    # One level: the crop is cut out before resizing, where its corner is a rounded float.
    assert difference(pixels, reference(smooth(*size), 32)).max() <= 1


@pytest.mark.parametrize("size", [(1000, 750), (375, 501), (641, 479), (257, 257)])
@pytest.mark.parametrize("image_size", [32, 64, 160])
def test_scaled_decoding_stays_close_to_full_decoding(size: tuple[int, int], image_size: int) -> None:
    data = encoded(smooth(*size), "JPEG", quality=95)
    full = reference(Image.open(io.BytesIO(data)), image_size)
    assert difference(Preprocess(image_size).pixels(data), full).max() <= 1  # evaluation decodes in full
    assert difference(written(Preprocess(image_size), data), full).mean() < 0.5
    # Training at the whole image's box may decode down to the target itself; no half pixel may slip.
    whole = Augment(scale=(1, 1), ratio=(size[0] / size[1], size[0] / size[1]))
    trained = Preprocess(image_size).train_pixels(data, whole, np.random.default_rng(0))
    squeezed = Image.open(io.BytesIO(data)).resize((image_size, image_size), Image.Resampling.BICUBIC)
    assert difference(trained, np.asarray(squeezed)).mean() < 0.7


def test_scaled_decoding_stays_close_on_photographs(shared_data: Path) -> None:
    photos = pq.read_table(shared_data / "flickr8k_val.parquet", columns=["image"]).slice(0, 8)["image"].to_pylist()
    for data in photos:
        full = reference(Image.open(io.BytesIO(data)), 64)
        assert difference(Preprocess(64).pixels(data), full).max() <= 1
        assert difference(written(Preprocess(64), data), full).mean() < 0.5
        small = reference(Image.open(io.BytesIO(data)), 32)
        assert difference(written(Preprocess(32), data), small).mean() < 1


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation_is_undone_in_every_view(turn: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that a camera held this way applied
    upright = smooth(301, 203)
    stored = upright.transpose(Image.Transpose(undo[turn])) if turn > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    data, plain = encoded(stored, "JPEG", quality=95, exif=exif), encoded(upright, "JPEG", quality=95)
    assert open_image(data).size == (301, 203)
    assert difference(np.asarray(open_image(data)), np.asarray(open_image(plain))).mean() < 1
    for size in (48, 128):
        preprocess = Preprocess(size)
        assert difference(preprocess.pixels(data), preprocess.pixels(plain)).mean() < 1
        views = [preprocess.train_pixels(d, Augment(scale=(0.2, 0.5)), np.random.default_rng(1)) for d in (data, plain)]
        assert difference(views[0], views[1]).mean() < 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", [3, 6, 8])
def test_exif_rotation_is_undone_in_other_kinds_of_file(kind: str, turn: int) -> None:
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    upright, exif = smooth(60, 41), Image.Exif()
    exif[0x0112] = turn
    data = encoded(upright.transpose(undo[turn]), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(upright))
    assert difference(Preprocess(32).pixels(data), Preprocess(32).pixels(encoded(upright, "PNG"))).max() <= 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
    ],
)
def test_kinds_of_file_that_lose_nothing_give_their_pixels(kind: str, options: dict[str, Any]) -> None:
    image = smooth(37, 23)
    assert np.array_equal(np.asarray(open_image(encoded(image, kind, **options))), np.asarray(image))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((3, 3)) == (255, 0, 0)


def test_an_icc_profile_changes_no_pixel() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for kind in ("PNG", "TIFF", "JPEG"):
        plain, profiled = encoded(smooth(40, 30), kind), encoded(smooth(40, 30), kind, icc_profile=profile)
        assert plain != profiled
        assert np.array_equal(Preprocess(16).pixels(plain), Preprocess(16).pixels(profiled))


def test_colours_of_sixteen_bits_become_eight() -> None:
    rows = b"".join(b"\0" + struct.pack(">12H", *([65535, 32768, 0] * 4)) for _ in range(4))
    assert open_image(png(struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0), rows)).getpixel((1, 1)) == (255, 128, 0)


def test_cmyk_tiff_has_its_colours() -> None:
    data = encoded(Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK"), "TIFF")
    assert open_image(data).getpixel((2, 2)) == (200, 30, 60)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_the_pixel_limit_is_checked_before_anything_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (60, 50)), kind)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="too many pixels: 60 x 50"):
        open_image(data, max_pixels=2999)


def test_the_random_crop_is_the_fields_to_the_bit() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    augment = Augment(scale=(0.2, 1.0))
    for seed in range(20):
        left, top, right, bottom = random_box(120, 90, augment, np.random.default_rng(seed))
        part = noise.crop((round(left * 120), round(top * 90), round(right * 120), round(bottom * 90)))
        field = np.asarray(part.resize((48, 48), Image.Resampling.BICUBIC))
        ours = Preprocess(48).train_pixels(encoded(noise, "PNG"), augment, np.random.default_rng(seed))
        assert np.array_equal(ours, field)


def test_cmyk_jpeg_has_its_colours() -> None:
    data = encoded(Image.new("RGB", (40, 40), (200, 30, 60)).convert("CMYK"), "JPEG", quality=95)
    assert difference(np.asarray(open_image(data))[20, 20], np.array([200, 30, 60])).max() < 8


def test_transparency_shows_the_background_in_every_mode() -> None:
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([1, 2, 3, 9, 9, 9])
    files = {
        "rgba": encoded(clear, "PNG"),
        "grey and alpha": encoded(clear.convert("LA"), "PNG"),
        "palette": encoded(palette, "PNG", transparency=0),
        "gif": encoded(palette, "GIF", transparency=0),
        "rgb with a clear colour": encoded(Image.new("RGB", (8, 8), (5, 6, 7)), "PNG", transparency=(5, 6, 7)),
        "webp": encoded(clear, "WEBP", lossless=True),
    }
    for name, data in files.items():
        image = open_image(data, background=(250, 120, 0))
        assert image.mode == "RGB"
        assert (np.asarray(image) == (250, 120, 0)).all(), name
    half = open_image(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"))
    assert half.getpixel((3, 3)) == (127, 127, 127)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = np.asarray(open_image(encoded(Image.fromarray(ramp), "PNG")))
    assert (image[..., 0].ravel() == np.arange(256)).all()
    whole = Image.fromarray(ramp.astype(np.int32))
    assert (np.asarray(open_image(whole))[..., 1].ravel() == np.arange(256)).all()
    share = Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    assert np.asarray(open_image(encoded(share, "TIFF")))[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert Preprocess(16).pixels(smooth(20, 30).convert(mode)).shape == (16, 16, 3)


def png_of_claimed_size(width: int, height: int) -> bytes:
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"")


def png(header: bytes, rows: bytes) -> bytes:
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"a text file\n" * 40, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),  # a program, for Ghostscript
        (half(encoded(smooth(90, 90), "JPEG")), "truncated"),
        (encoded(smooth(90, 90), "JPEG")[:20], "not an image"),
        (half(encoded(smooth(90, 90), "PNG")), "truncated"),
        (encoded(smooth(90, 90), "PNG").replace(b"IDAT", b"IDAT" + b"\xff" * 40), "broken"),
        (half(encoded(smooth(90, 90), "WEBP")), "broken"),
        (encoded(smooth(90, 90), "GIF")[:60], "not an image"),
        (half(encoded(smooth(90, 90), "GIF")), "truncated"),
        (png_of_claimed_size(9000, 9000), "too many pixels: 9000 x 9000"),
        (png_of_claimed_size(60000, 60000), "too many pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_image_has_a_short_reason(data: bytes, reason: str) -> None:
    for view in (open_image, Preprocess(32).pixels):
        with pytest.raises(BadImage) as caught:
            view(data)
        assert str(caught.value).startswith(reason)
        assert len(str(caught.value)) < 120


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_bytes_are_a_picture_or_a_bad_image_and_never_another_error() -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = [encoded(smooth(50, 40), kind) for kind in ("PNG", "GIF", "WEBP", "TIFF", "BMP")]
    good.append(encoded(smooth(50, 40), "JPEG", exif=exif))
    bad = 0
    for data in good:
        for _ in range(60):
            damaged = bytearray(data)
            for at in rng.integers(len(data), size=4):
                damaged[at] = rng.integers(256)
            try:
                assert Preprocess(16).pixels(bytes(damaged)).shape == (16, 16, 3)
            except BadImage:
                bad += 1
    assert 0 < bad < 360


def test_a_callers_own_image_is_left_alone() -> None:
    image = Image.open(io.BytesIO(encoded(smooth(400, 300), "JPEG")))
    Preprocess(16).pixels(image)
    Preprocess(16).train_pixels(image, Augment(), np.random.default_rng(0))
    assert image.size == (400, 300)


def test_random_boxes_have_the_asked_area_and_ratio() -> None:
    rng = np.random.default_rng(0)
    augment = Augment(scale=(0.3, 0.5), ratio=(0.5, 2.0))  # each fits: at most 400 of 400 pixels wide
    areas, ratios = [], []
    for _ in range(2000):
        left, top, right, bottom = random_box(400, 400, augment, rng)
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        areas.append((right - left) * (bottom - top))
        ratios.append((right - left) / (bottom - top))
    assert 0.29 < min(areas) < 0.31
    assert 0.49 < max(areas) < 0.51
    assert 0.49 < min(ratios) < 0.52
    assert 1.9 < max(ratios) < 2.02
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.04)  # log-uniform; 4 sigma of 2,000 draws is 0.036


def test_a_box_that_never_fits_becomes_the_largest_centred_one() -> None:
    box = random_box(1000, 100, Augment(scale=(1, 1), ratio=(0.5, 2.0)), np.random.default_rng(0))
    assert box == pytest.approx((0.4, 0, 0.6, 1))


def test_the_same_state_of_the_generator_gives_the_same_view() -> None:
    data = encoded(smooth(200, 150), "JPEG")
    augment = Augment(scale=(0.3, 1), flip=0.5, color_jitter=0.4, grayscale=0.3)
    views = [Preprocess(32).train_pixels(data, augment, np.random.default_rng((3, 1, s))) for s in (7, 7, 8)]
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_flip_and_grey_do_what_they_say() -> None:
    image = smooth(64, 64)
    whole: dict[str, Any] = {"scale": (1, 1), "ratio": (1, 1)}
    plain, mirrored, grey, jittered = (
        Preprocess(64).train_pixels(image, augment, np.random.default_rng(0))
        for augment in (
            Augment(**whole),
            Augment(**whole, flip=1),
            Augment(**whole, grayscale=1),
            Augment(**whole, color_jitter=0.4),
        )
    )
    assert np.array_equal(plain, np.asarray(image))
    assert np.array_equal(mirrored, plain[:, ::-1])
    assert np.ptp(grey.astype(int), axis=2).max() == 0
    assert difference(jittered, plain).mean() > 3


def test_images_are_normalised_per_channel() -> None:
    preprocess = Preprocess(4, mean=(0.5, 0.25, 0), std=(0.5, 0.25, 1))
    pixels = torch.tensor([255, 0, 51], dtype=torch.uint8).expand(2, 4, 4, 3)
    images = preprocess.images(pixels)
    assert images.shape == (2, 3, 4, 4)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[1, :, 2, 3], torch.tensor([1.0, -1.0, 0.2]))
    data = encoded(smooth(9, 9), "PNG")
    torch.testing.assert_close(preprocess(data), preprocess.images(torch.from_numpy(preprocess.pixels(data))[None])[0])


def test_preprocessing_survives_json_and_pickle() -> None:
    preprocess = Preprocess(96, std=(0.1, 0.2, 0.3), background=(0, 0, 0))
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess
    assert Preprocess.from_dict({}) == Preprocess()
    assert isinstance(preprocess.to_dict()["std"], list)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: Augment(scale=(0, 1)), "augment.scale"),
        (lambda: Augment(ratio=(2, 1)), "augment.ratio"),
        (lambda: Augment(flip=1.5), "augment.flip"),
        (lambda: Preprocess(0), "image_size"),
        (lambda: Preprocess(std=(1, 0, 1)), "std"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Any, setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        make()
