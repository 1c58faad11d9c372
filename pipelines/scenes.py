"""The data set of `make demo`: captioned pictures of coloured shapes, drawn, so that nothing has to be downloaded.

Twelve pairings of colour and shape are never drawn for training, alone or inside a scene, and never named in a
caption, although every colour and every shape is. They form a full block (four colours, three shapes), so that a model
that reads only colours scores 1/3 on them and one that reads only shapes 1/4: what is over that is composition.

Scene i of a split depends on (seed, split, i) alone: asking for more scenes leaves the first ones as they were.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.shapes import COLOURS, SHAPES, Colour, Pairing, Placed, draw

BACKGROUNDS: dict[str, tuple[Colour, ...]] = {
    "light": ((240, 241, 244), (246, 240, 228), (228, 237, 246), (231, 243, 235)),
    "dark": ((30, 36, 54), (40, 41, 45), (22, 46, 43), (46, 32, 54)),
}
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
RADIUS = {"small": (0.15, 0.18), "": (0.21, 0.25), "large": (0.32, 0.37)}  # of the picture's side

HELD_OUT: tuple[Pairing, ...] = tuple(product(("red", "green", "blue", "purple"), ("triangle", "ring", "crescent")))
# Texts for zero-shot classification, as training captions speak; no held-out colour begins with a vowel.
TEMPLATES = ("a {}", "a picture of a {}", "there is a {}")
TRAINING: tuple[Pairing, ...] = tuple(pair for pair in product(COLOURS, SHAPES) if pair not in HELD_OUT)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _phrase(pairing: Pairing, count: int = 1, size: str = "") -> str:
    """For example "an orange star", "two small red circles"."""
    colour, shape = pairing
    words = " ".join(word for word in (size, colour, _plural(shape) if count > 1 else shape) if word)
    return f"{COUNTS[count]} {words}" if count > 1 else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """What is drawn and what may be said of it: `detailed` captions tell it from others, `plain` and `loose` ones need not."""

    objects: tuple[Placed, ...]
    background: Colour
    loose: tuple[str, ...]
    plain: tuple[str, ...]
    detailed: tuple[str, ...]

    def captions(self, random: Random) -> list[str]:
        """Three of the ways to say it, from loose to detailed."""
        return [random.choice(ways) for ways in (self.loose, self.plain, self.detailed)]


@dataclass(frozen=True)
class DemoData:
    """Where `draw_dataset` has put everything."""

    images: Path
    """Folder of PNG files for training."""
    captions: Path
    """CSV with columns image, caption: one line a caption, several lines an image."""
    heldout: Path
    """Labelled Parquet (image, label, class_name, key): single objects of the held-out pairings."""
    val: Path
    """Captioned Parquet (image, captions, key, source): new scenes of training pairings, no two described alike."""
    classes: tuple[str, ...]
    """Class names of `heldout`, by label."""
    train_images: int
    """Good images in the folder; the broken ones come on top."""
    broken_images: int


def single(random: Random, pairings: tuple[Pairing, ...]) -> Scene:
    """One object: small or middling ones anywhere, large ones in the middle."""
    size = random.choice(("small", "", "", "large"))
    column, row = (0, 0) if size == "large" else (random.choice((-1, 0, 1)), random.choice((-1, 0, 1)))
    places = {
        (-1, -1): "in the top left corner",
        (0, -1): "at the top",
        (1, -1): "in the top right corner",
        (-1, 0): "on the left",
        (0, 0): "in the middle",
        (1, 0): "on the right",
        (-1, 1): "in the bottom left corner",
        (0, 1): "at the bottom",
        (1, 1): "in the bottom right corner",
    }
    step = 0.28 if size == "small" else 0.21
    pairing = random.choice(pairings)
    placed = _place(random, pairing, 0.5 + step * column, 0.5 + step * row, random.uniform(*RADIUS[size]), shift=0.04)
    tone, background = _background(random)
    what, plain, where = _phrase(pairing, 1, size), _phrase(pairing), places[column, row]
    return Scene(
        (placed,),
        background,
        loose=(_phrase(("", pairing[1])), _phrase((pairing[0], "shape"))),
        plain=(plain, f"a picture of {plain}", f"there is {plain}", f"the {pairing[1]} is {pairing[0]}"),
        detailed=(
            f"{what} {where}, {tone} background",
            f"{what} {where} on a {tone} background",
            f"{where}, on a {tone} background, {what}",
        ),
    )


def several(random: Random, pairings: tuple[Pairing, ...]) -> Scene:
    """Two to four of the same, in a row, in a column or scattered."""
    count, pairing = random.choice((2, 3, 3, 4)), random.choice(pairings)
    radius = random.uniform(*{2: (0.17, 0.20), 3: (0.13, 0.15), 4: (0.105, 0.115)}[count])
    line = [0.5 + (i - (count - 1) / 2) * (0.94 / count) for i in range(count)]
    across = random.uniform(0.3, 0.7)
    arrangement = random.choice(("in a row", "in a column", "scattered"))
    if arrangement == "in a row":
        centres = [(x, across) for x in line]
    elif arrangement == "in a column":
        centres = [(across, y) for y in line]
    else:
        radius = max(radius, 0.125)
        cells = [(0.26, 0.26), (0.74, 0.28), (0.28, 0.74), (0.73, 0.73)]
        centres = random.sample(cells, count) if count != 2 else random.choice((cells[::3], cells[1:3]))
    tone, background = _background(random)
    what = _phrase(pairing, count)
    return Scene(
        tuple(_place(random, pairing, x, y, radius, shift=0.015) for x, y in centres),
        background,
        loose=(_phrase(("", pairing[1]), count), _phrase((pairing[0], "shape"), count)),
        plain=(what, f"there are {what}", f"a picture of {what}"),
        detailed=(
            f"{what} {arrangement} on a {tone} background",
            f"{what} {arrangement}, {tone} background",
            f"on a {tone} background, {what} {arrangement}",
        ),
    )


def relation(random: Random, pairings: tuple[Pairing, ...]) -> Scene:
    """One or two objects beside, above or below another one."""
    first, second = random.sample(pairings, 2)
    count = random.choice((1, 1, 1, 2))
    vertical = random.random() < 0.5
    near, far = random.uniform(0.25, 0.29), random.uniform(0.71, 0.75)  # the subject comes first or last along its line
    before = random.random() < 0.5
    subject, other = (near, far) if before else (far, near)
    radius = random.uniform(0.18, 0.21)
    across = [random.uniform(0.38, 0.62)] if count == 1 else [0.26, 0.74]
    ends = [(first, subject, c, radius) for c in across] + [(second, other, random.uniform(0.38, 0.62), radius)]
    placed = (
        _place(random, pairing, *((c, along) if vertical else (along, c)), r, shift=0.01) for pairing, along, c, r in ends
    )
    words, reverse = (("above", "below") if vertical else ("to the left of", "to the right of"))[:: 1 if before else -1]
    _, background = _background(random)
    a, b = _phrase(first, count), _phrase(second)
    side = ("at the top", "at the bottom") if vertical else ("on the left", "on the right")
    here, there = side if before else side[::-1]
    return Scene(
        tuple(placed),
        background,
        loose=(f"{a} and {b}", f"{b} and {a}"),
        plain=(f"a picture of {a} and {b}", f"a picture of {b} and {a}"),
        detailed=(f"{a} {words} {b}", f"{b} {reverse} {a}", f"{a} {here} and {b} {there}"),
    )


def enclosed(random: Random, pairings: tuple[Pairing, ...]) -> Scene:
    """A small object inside a large ring."""
    rings = [pair for pair in pairings if pair[1] == "ring"]
    inside = [pair for pair in pairings if pair[1] not in ("ring", "crescent")]
    ring, inner = random.choice(rings), random.choice(inside)
    while inner[0] == ring[0]:
        inner = random.choice(inside)
    x, y = (random.uniform(0.46, 0.54) for _ in range(2))
    placed = (_place(random, ring, x, y, 0.42), _place(random, inner, x, y, 0.20))
    tone, background = _background(random)
    a, b = _phrase(inner, 1, "small"), _phrase(ring, 1, "large")
    return Scene(
        placed,
        background,
        loose=(f"{_phrase(ring)} and {_phrase(inner)}", f"{_phrase(inner)} and {_phrase(ring)}"),
        plain=(f"{_phrase(inner)} inside {_phrase(ring)}", f"{_phrase(ring)} around {_phrase(inner)}"),
        detailed=(f"{a} inside {b}, {tone} background", f"{b} around {a} on a {tone} background"),
    )


KINDS: tuple[tuple[Callable[[Random, tuple[Pairing, ...]], Scene], float], ...] = (
    (single, 0.42),
    (several, 0.20),
    (relation, 0.30),
    (enclosed, 0.08),
)


def scenes(seed: int, split: str) -> Iterator[tuple[Scene, Random]]:
    """Endless scenes of training pairings; the generator that comes with each one goes on to choose its captions."""
    makers, weights = zip(*KINDS, strict=True)
    i = 0
    while True:
        random = Random(f"{seed}/{split}/{i}")
        yield random.choices(makers, weights)[0](random, TRAINING), random
        i += 1


def draw_dataset(
    folder: Path | str, train: int = 4000, seed: int = 0, image_size: int = 64, heldout: int = 600, val: int = 400
) -> DemoData:
    """Draws all that `make demo` needs: `train` good images and three broken ones, `heldout` labelled, `val` captioned.

    The same arguments give the same bytes.
    """
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("image", "caption"))
        for i, (scene, random) in zip(range(train), scenes(seed, "train"), strict=False):
            name = f"scene_{i:05d}.png"
            (images / name).write_bytes(_png(draw(scene.objects, _lit(scene.background, random), image_size)))
            rows.writerows((name, caption) for caption in scene.captions(random))
        broken = _broken_files((images / "scene_00000.png").read_bytes())
        for name, content in broken.items():
            (images / name).write_bytes(content)
            rows.writerow((name, "a blue circle"))
    data = DemoData(
        images=images,
        captions=folder / "captions.csv",
        heldout=folder / "heldout.parquet",
        val=folder / "val.parquet",
        classes=tuple(" ".join(pairing) for pairing in HELD_OUT),
        train_images=train,
        broken_images=len(broken),
    )
    _write(data.heldout, _heldout_rows(seed, heldout, image_size))
    _write(data.val, _val_rows(seed, val, image_size))
    return data


def _heldout_rows(seed: int, count: int, image_size: int) -> Iterator[dict[str, object]]:
    for i in range(count):
        random = Random(f"{seed}/heldout/{i}")
        label = i % len(HELD_OUT)
        scene = single(random, (HELD_OUT[label],))
        name = " ".join(HELD_OUT[label])
        image = _png(draw(scene.objects, _lit(scene.background, random), image_size))
        yield {"image": image, "label": label, "class_name": name, "key": f"heldout_{i:04d}"}


def _val_rows(seed: int, count: int, image_size: int) -> Iterator[dict[str, object]]:
    said: set[str] = set()
    found = 0
    for scene, random in scenes(seed, "val"):
        if found == count:
            return
        if said.isdisjoint(scene.detailed):
            said.update(scene.detailed)
            captions = random.sample(scene.detailed, 2)
            image = _png(draw(scene.objects, _lit(scene.background, random), image_size))
            yield {"image": image, "captions": captions, "key": f"val_{found:04d}", "source": "drawn"}
            found += 1


def _place(random: Random, pairing: Pairing, x: float, y: float, radius: float, shift: float = 0.0) -> Placed:
    x, y = x + random.uniform(-shift, shift), y + random.uniform(-shift, shift)
    return Placed(pairing, x, y, radius, random.uniform(-10, 10))


def _background(random: Random) -> tuple[str, Colour]:
    tone = random.choice(tuple(BACKGROUNDS))
    return tone, random.choice(BACKGROUNDS[tone])


def _lit(colour: Colour, random: Random) -> Colour:
    """Slightly brighter or darker."""
    light = random.uniform(0.92, 1.04)
    r, g, b = (min(255, int(light * c)) for c in colour)
    return r, g, b


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _broken_files(good: bytes) -> dict[str, bytes]:
    """What downloads leave behind: half a file, an error page, nothing."""
    page = b"<!doctype html><title>404 Not Found</title><h1>Not Found</h1>"
    return {"broken_truncated.png": good[: len(good) // 2], "broken_error_page.png": page, "broken_empty.png": b""}


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=256, compression="zstd")
