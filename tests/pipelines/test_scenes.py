import csv
import io
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.scenes import HELD_OUT, TRAINING, DemoData, draw_dataset, scenes
from pipelines.shapes import COLOURS, SHAPES, Placed, draw


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return draw_dataset(tmp_path_factory.mktemp("demo"), train=120, heldout=60, val=40)


def captions_by_image(data: DemoData) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    with data.captions.open(newline="") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    return captions


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_held_out_pairings_never_occur_in_training_scenes() -> None:
    for scene, _ in islice(scenes(0, "train"), 3000):
        assert not {thing.pairing for thing in scene.objects} & set(HELD_OUT)


def test_held_out_pairings_are_never_named_in_training_captions() -> None:
    for scene, _ in islice(scenes(0, "train"), 3000):
        for caption in (*scene.loose, *scene.plain, *scene.detailed):
            assert not any(f"{colour} {shape}" in caption for colour, shape in HELD_OUT), caption
            assert not any(f"{shape} is {colour}" in caption for colour, shape in HELD_OUT), caption


def test_every_colour_and_every_shape_is_seen_in_training() -> None:
    assert {colour for colour, _ in TRAINING} == set(COLOURS)
    assert {shape for _, shape in TRAINING} == set(SHAPES)
    seen = {thing.pairing for scene, _ in islice(scenes(0, "train"), 3000) for thing in scene.objects}
    assert seen == set(TRAINING)


def test_neither_colour_nor_shape_alone_solves_the_held_out_task() -> None:
    for part, share in ((0, 1 / 3), (1, 1 / 4)):
        values = [pairing[part] for pairing in HELD_OUT]
        assert {1 / values.count(value) for value in values} == {share}


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_dataset(tmp_path / name, train=5, seed=seed, heldout=12, val=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["images/scene_00000.png"] != contents(tmp_path / "c")["images/scene_00000.png"]


def test_more_images_leave_the_first_ones_as_they_were(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "few", train=3, heldout=12, val=2)
    draw_dataset(tmp_path / "many", train=6, heldout=12, val=2)
    few, many = contents(tmp_path / "few" / "images"), contents(tmp_path / "many" / "images")
    assert few.items() <= many.items()


def test_every_image_has_two_or_three_different_captions(drawn: DemoData) -> None:
    captions = captions_by_image(drawn)
    good = {name: said for name, said in captions.items() if not name.startswith("broken")}
    assert len(good) == drawn.train_images == 120
    assert all(len(set(said)) == len(said) == 3 for said in good.values())
    assert all((drawn.images / name).is_file() for name in captions)


def test_exactly_three_image_files_are_broken(drawn: DemoData) -> None:
    broken = []
    for path in sorted(drawn.images.iterdir()):
        try:
            Image.open(path).load()
        except OSError:
            broken.append(path.name)
    assert len(broken) == drawn.broken_images == 3
    assert set(broken) < set(captions_by_image(drawn))


def test_the_labelled_set_holds_each_held_out_pairing_equally_often(drawn: DemoData) -> None:
    rows = pq.read_table(drawn.heldout).to_pylist()
    assert {row["class_name"] for row in rows} == set(drawn.classes) == {" ".join(pairing) for pairing in HELD_OUT}
    assert all(drawn.classes[row["label"]] == row["class_name"] for row in rows)
    labels = [row["label"] for row in rows]
    assert {labels.count(label) for label in range(12)} == {5}
    assert Image.open(io.BytesIO(rows[0]["image"])).size == (64, 64)


def test_no_two_validation_images_share_a_caption(drawn: DemoData) -> None:
    rows = pq.read_table(drawn.val).to_pylist()
    said = [caption for row in rows for caption in row["captions"]]
    assert len(rows) == 40
    assert len(set(said)) == len(said) == 80
    assert not any(" ".join(pairing) in caption for pairing in HELD_OUT for caption in said)


def test_relations_in_captions_are_those_of_the_picture() -> None:
    checked = 0
    for scene, _ in islice(scenes(1, "train"), 2000):
        for relation, along in ((" to the left of ", "x"), (" above ", "y")):
            for caption in scene.detailed:
                if relation not in caption:
                    continue
                places = [
                    [getattr(thing, along) for thing in scene.objects if " ".join(thing.pairing) in part]
                    for part in caption.split(relation)
                ]
                assert max(places[0]) < min(places[1]), caption
                checked += 1
    assert checked > 500


def test_the_number_named_is_the_number_drawn() -> None:
    words = {"two": 2, "three": 3, "four": 4}
    checked = 0
    for scene, _ in islice(scenes(1, "train"), 1000):
        if len({thing.pairing for thing in scene.objects}) == 1 and len(scene.objects) > 1:
            assert words[scene.plain[0].split()[0]] == len(scene.objects)
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_large_and_inside_the_picture(shape: str) -> None:
    picture = draw([Placed(("red", shape), 0.5, 0.5, 0.37, 0.0)], (240, 240, 240), 64)
    painted = picture.getchannel("B").point(lambda v: 255 * (v < 100))
    left, top, right, bottom = painted.getbbox() or (0, 0, 0, 0)
    assert painted.histogram()[255] > 400, "a tenth of the picture"
    assert min(left, top) > 2
    assert max(right, bottom) < 62
