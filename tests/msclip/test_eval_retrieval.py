from pathlib import Path

import numpy as np
import pytest
import torch

from msclip.checkpoint import Loaded
from msclip.errors import UserError
from msclip.eval import Task, retrieval, retrieve
from msclip.eval.rows import open_rows
from tests.drawn import TEXTS, captioned, tiny_parts

CAPTIONS = [[TEXTS[i % 10], f"number {i}", f"picture {i} of nine"][: 1 + i % 3] for i in range(9)]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model, tokenizer, preprocess = tiny_parts()
    return Loaded(model.eval(), tokenizer, preprocess, model.config)


def measure(loaded: Loaded, task: Task) -> tuple[dict, list]:
    return retrieval.evaluate(loaded, task, device=torch.device("cpu"), batch_size=4, threads=1)


def scores(loaded: Loaded, data: Path, captions: list[str]) -> np.ndarray:
    """Cosines of every image with every caption, each encoded alone."""
    with torch.inference_mode():
        images = [
            loaded.model.encode_image(loaded.preprocess(v["image"])[None]) for _, v in open_rows(str(data)).read(["image"])
        ]
        texts = [loaded.model.encode_text(loaded.tokenizer(text)) for text in captions]
    return (torch.cat(images) @ torch.cat(texts).T).numpy()


def test_recalls_and_ranks_are_those_of_the_whole_score_matrix(loaded: Loaded, tmp_path: Path) -> None:
    data = captioned(tmp_path / "val.parquet", CAPTIONS)
    result, skipped = measure(loaded, Task(name="val", kind="retrieval", data=str(data)))
    flat = [text for texts in CAPTIONS for text in texts]
    owners = np.array([image for image, texts in enumerate(CAPTIONS) for _ in texts])
    matrix = scores(loaded, data, flat)
    text_to_image = np.array([(matrix[:, c] > matrix[owner, c]).sum() for c, owner in enumerate(owners)])
    image_to_text = np.array([(matrix[i] > matrix[i, owners == i].max()).sum() for i in range(9)])
    for k in (1, 5, 10):
        assert result["metrics"][f"image_retrieval_recall@{k}"] == pytest.approx((text_to_image < k).mean())
        assert result["metrics"][f"text_retrieval_recall@{k}"] == pytest.approx((image_to_text < k).mean())
    assert result["metrics"]["image_retrieval_median_rank"] == np.median(text_to_image) + 1
    assert result["metrics"]["text_retrieval_median_rank"] == np.median(image_to_text) + 1
    assert (result["rows"], result["captions"], skipped) == (9, 18, [])
    assert result["chance"]["image_retrieval_recall@5"] == pytest.approx(5 / 9)
    assert result["chance"]["text_retrieval_recall@1"] == pytest.approx(np.mean([1 / 18, 2 / 18, 3 / 18]))


def test_images_without_captions_are_reported(loaded: Loaded, tmp_path: Path) -> None:
    data = captioned(tmp_path / "val.parquet", [["one"], [], ["two", " "], ["three"]])
    result, skipped = measure(loaded, Task(name="val", kind="retrieval", data=str(data)))
    assert (result["rows"], result["captions"]) == (3, 3)
    assert [tuple(row) for row in skipped] == [(1, "no caption")]


def test_one_caption_for_two_images_helps_neither(loaded: Loaded, tmp_path: Path) -> None:
    data = captioned(tmp_path / "val.parquet", [["the same"], ["the same"]])
    result, _ = measure(loaded, Task(name="val", kind="retrieval", data=str(data)))
    assert result["metrics"]["text_retrieval_recall@1"] == 0


def test_queries_find_their_best_images_and_captions(loaded: Loaded, tmp_path: Path) -> None:
    keys = [f"photo-{i}" for i in range(9)]
    data = captioned(tmp_path / "val.parquet", CAPTIONS, keys)
    flat = [text for texts in CAPTIONS for text in texts]
    owners = [image for image, texts in enumerate(CAPTIONS) for _ in texts]
    matrix = scores(loaded, data, flat)
    by_text, by_image, unknown = retrieve(loaded, str(data), [flat[4], 7, "never written"], k=3, batch_size=4)
    best = np.argsort(-matrix[:, 4])[:3]
    assert by_text.indices == tuple(best)
    assert by_text.keys == tuple(keys[i] for i in best)
    assert by_text.right == tuple(owners[4] == i for i in best)
    np.testing.assert_allclose(by_text.scores, matrix[best, 4], atol=1e-5)
    best = np.argsort(-matrix[7])[:3]
    assert by_image.captions == tuple(flat[i] for i in best)
    assert by_image.indices == tuple(owners[i] for i in best)
    assert by_image.right == tuple(owners[i] == 7 for i in best)
    assert unknown.right == (False, False, False)


def test_an_image_that_is_not_there_cannot_be_a_query(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 99"):
        retrieve(loaded, str(captioned(tmp_path / "val.parquet", CAPTIONS)), [99])
