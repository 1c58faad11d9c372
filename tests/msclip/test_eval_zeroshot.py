from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from msclip.checkpoint import Loaded
from msclip.errors import UserError
from msclip.eval import Task, build_classifier, zeroshot
from msclip.eval.rows import open_rows
from tests.drawn import COLOURS, labelled, png, tiny_parts, write_labelled

TEMPLATES = ("a photo of a {}.", "{}!", "the {} {}")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model, tokenizer, preprocess = tiny_parts()
    return Loaded(model.eval(), tokenizer, preprocess, model.config)


def measure(loaded: Loaded, task: Task, batch_size: int = 8) -> tuple[dict, list]:
    return zeroshot.evaluate(loaded, task, device=torch.device("cpu"), batch_size=batch_size, threads=1)


def test_a_class_is_the_direction_of_the_mean_of_its_filled_templates(loaded: Loaded) -> None:
    classifier = build_classifier(loaded.model, loaded.tokenizer, ["red", "{}"], TEMPLATES)
    for column, name in zip(classifier, ["red", "{}"], strict=True):
        texts = [f"a photo of a {name}.", f"{name}!", f"the {name} {name}"]
        with torch.inference_mode():
            features = [loaded.model.encode_text(loaded.tokenizer(text))[0].numpy() for text in texts]
        mean = np.mean([f / np.linalg.norm(f) for f in features], axis=0)
        np.testing.assert_allclose(column.numpy(), mean / np.linalg.norm(mean), atol=1e-6)


def test_the_result_is_what_scikit_learn_makes_of_the_scores(loaded: Loaded, tmp_path: Path) -> None:
    data = labelled(tmp_path / "set.parquet", rows=23)
    result, skipped = measure(loaded, Task(name="set", kind="zeroshot", data=str(data), templates=TEMPLATES))
    classes = sorted(COLOURS)
    classifier = build_classifier(loaded.model, loaded.tokenizer, classes, TEMPLATES).numpy()
    rows = [values for _, values in open_rows(str(data)).read(["image", "class_name"])]
    with torch.inference_mode():
        features = [loaded.model.encode_image(loaded.preprocess(row["image"])[None])[0].numpy() for row in rows]
    scores, truth = np.stack(features) @ classifier.T, np.array([classes.index(row["class_name"]) for row in rows])
    assert result["metrics"]["acc1"] == pytest.approx(top_k_accuracy_score(truth, scores, k=1))
    assert result["metrics"]["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(truth, scores.argmax(1)))
    assert result["metrics"]["acc5"] == 1
    assert (result["rows"], result["classes"], skipped) == (23, 5, [])
    assert result["chance"] == {"acc1": 0.2, "mean_per_class_recall": 0.2, "acc5": 1.0}


def test_labels_with_gaps_keep_their_names(loaded: Loaded, tmp_path: Path) -> None:
    colours = ["white", "red", "blue", "red", "white", "blue"]
    numbers = {"red": 3, "blue": 7, "white": 9}
    images = [png(colour, i) for i, colour in enumerate(colours)]
    data = write_labelled(tmp_path / "gaps.parquet", images, [numbers[c] for c in colours], colours)
    assert zeroshot.labels(Task(name="gaps", kind="zeroshot", data=str(data)), open_rows(str(data))).classes == (
        "red",
        "blue",
        "white",
    )
    dense = write_labelled(tmp_path / "dense.parquet", images, [list(numbers).index(c) for c in colours], colours)
    given = Task(name="dense", kind="zeroshot", data=str(dense), classes=("red", "blue", "white"))
    assert measure(loaded, Task(name="gaps", kind="zeroshot", data=str(data))) == measure(loaded, given)


def test_labels_may_be_the_class_names_themselves(loaded: Loaded, tmp_path: Path) -> None:
    data = str(labelled(tmp_path / "set.parquet"))
    named = Task(name="set", kind="zeroshot", data=data, label_column="class_name")
    assert measure(loaded, named) == measure(loaded, Task(name="set", kind="zeroshot", data=data))


def test_rows_without_image_or_label_are_reported_with_their_reason(loaded: Loaded, tmp_path: Path) -> None:
    images = [png("red", 0), b"broken", png("blue", 1), None, png("red", 2)]
    data = write_labelled(tmp_path / "bad.parquet", images, [0, 0, 1, 1, None], ["red", "red", "blue", "blue", "red"])
    result, skipped = measure(loaded, Task(name="bad", kind="zeroshot", data=str(data)))
    assert result["rows"] == 2
    assert [row.row for row in skipped] == [1, 3, 4]
    assert [row.reason for row in skipped[1:]] == ["no image", "no label"]


def test_a_limit_takes_rows_from_the_whole_set_and_leaves_the_classes(loaded: Loaded, tmp_path: Path) -> None:
    data = str(labelled(tmp_path / "set.parquet", rows=20))
    result, _ = measure(loaded, Task(name="set", kind="zeroshot", data=data, limit=4))
    assert (result["rows"], result["classes"]) == (4, 5)


def test_top_5_is_left_out_below_five_classes(loaded: Loaded, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "two.parquet", [png("red", 0), png("blue", 1)], [0, 1], ["red", "blue"])
    result, _ = measure(loaded, Task(name="two", kind="zeroshot", data=str(data)))
    assert "acc5" not in result["metrics"]


@pytest.mark.parametrize(
    ("labels", "names", "settings", "complaint"),
    [
        ([0, 0], ["red", "blue"], {}, "label 0 is called 'red', and in row 1 'blue'"),
        ([0, 0], ["red", "red"], {}, "two classes or more, and its data name 1"),
        ([0, 2], ["red", "blue"], {"classes": ("red", "blue")}, "row 1 has the label 2, which is none of the 2 classes"),
        ([0, 1], ["red", "blue"], {"class_column": "names"}, "class_column must be a column"),
        ([0, 1], ["red", "blue"], {"label_column": "image"}, "must hold whole numbers or texts, got binary"),
    ],
)
def test_labels_that_make_no_sense_are_explained(
    loaded: Loaded, tmp_path: Path, labels: list, names: list, settings: dict, complaint: str
) -> None:
    data = write_labelled(tmp_path / "set.parquet", [png("red", 0), png("blue", 1)], labels, names)
    with pytest.raises(UserError, match=complaint):
        measure(loaded, Task(name="set", kind="zeroshot", data=str(data), **settings))
