"""Image-text retrieval both ways over a captioned Parquet set, with one or several captions an image.

A hit is any of the image's own captions. Equal captions of different images are ties, and count against us.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msclip.checkpoint import Loaded
from msclip.errors import UserError
from msclip.eval.metrics import best_positive_ranks, median_rank, recall_at_k, recall_by_chance
from msclip.eval.rows import Rows, Skipped, encode_images, encode_texts, image_bytes, open_rows, spread
from msclip.eval.tasks import Task

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class Embedded:
    """Features of a captioned set, images and captions each in the order kept; `rows` and `keys` lead to the data."""

    images: Float[Tensor, "images dim"]
    texts: Float[Tensor, "captions dim"]
    owners: Int[Tensor, " captions"]
    """the image of each caption"""
    captions: tuple[str, ...]
    rows: tuple[int, ...]
    """the row number of each image"""
    keys: tuple[str, ...]
    """the key of each image; its row number where the data have no column `key`"""
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Hits:
    """What one query found, best first."""

    query: str | int
    """the query's text, or the row number of its image"""
    indices: tuple[int, ...]
    """row numbers in the data: of the images found, or of the images whose captions were found"""
    keys: tuple[str, ...]
    """the keys of those rows"""
    captions: tuple[str, ...]
    """the captions found; for a text query the first caption of each image"""
    scores: tuple[float, ...]
    """cosines"""
    right: tuple[bool, ...]
    """whether image and text belong together; all false for a text that is none of the data's captions"""


def embed(loaded: Loaded, task: Task, *, device: torch.device, batch_size: int, threads: int) -> Embedded:
    """Encodes every image that decodes and has a caption, and its captions.

    Raises:
        UserError: a missing column, a caption column that holds no text, or no usable row.
    """
    rows = open_rows(task.data)
    rows.column_type(task.image_column, "image_column")
    rows.column_type(task.caption_column, "caption_column")
    key_column = ["key"] if has_keys(rows) else []
    captions: dict[int, list[str]] = {}
    keys: dict[int, str] = {}
    speechless: list[Skipped] = []

    def images() -> Iterator[tuple[int, bytes | None]]:
        columns = [task.image_column, task.caption_column, *key_column]
        for number, values in rows.read(columns, spread(len(rows), task.limit)):
            captions[number] = _captions(values[task.caption_column], task)
            keys[number] = str(values["key"]) if key_column else str(number)
            if captions[number]:
                yield number, image_bytes(values[task.image_column])
            else:
                speechless.append(Skipped(number, "no caption"))

    features, kept, skipped = encode_images(
        loaded.model, loaded.preprocess, images(), device=device, batch_size=batch_size, threads=threads
    )
    texts = [text for number in kept for text in captions[number]]
    owners = [image for image, number in enumerate(kept) for _ in captions[number]]
    return Embedded(
        images=features,
        texts=encode_texts(loaded.model, loaded.tokenizer, texts, device=device, batch_size=batch_size),
        owners=torch.tensor(owners, device=device),
        captions=tuple(texts),
        rows=tuple(kept),
        keys=tuple(keys[number] for number in kept),
        skipped=tuple(sorted(skipped + speechless)),
    )


def evaluate(
    loaded: Loaded, task: Task, *, device: torch.device, batch_size: int, threads: int
) -> tuple[dict[str, Any], list[Skipped]]:
    """Measures recall at 1, 5 and 10 and the median rank (from 1) in both directions.

    `image_retrieval_*`: an image sought by each caption; `text_retrieval_*`: any caption sought by each image.

    Returns:
        `metrics`, `chance`, `rows`, `captions` of the result, and the rows left out: undecodable, or without a caption.
    """
    data = embed(loaded, task, device=device, batch_size=batch_size, threads=threads)
    owner = torch.arange(len(data.images), device=device)
    found = {
        "image_retrieval": best_positive_ranks(data.texts, data.images, data.owners, owner),
        "text_retrieval": best_positive_ranks(data.images, data.texts, owner, data.owners),
    }
    positives = {"image_retrieval": torch.ones_like(data.owners), "text_retrieval": torch.bincount(data.owners)}
    candidates = {"image_retrieval": len(data.images), "text_retrieval": len(data.texts)}
    metrics, chance = {}, {}
    for way, ranks in found.items():
        for k in CUTOFFS:
            metrics[f"{way}_recall@{k}"] = recall_at_k(ranks, k)
            chance[f"{way}_recall@{k}"] = recall_by_chance(positives[way], candidates[way], k)
        metrics[f"{way}_median_rank"] = median_rank(ranks)
    result = {"metrics": metrics, "chance": chance, "rows": len(data.images), "captions": len(data.texts)}
    return result, list(data.skipped)


def retrieve(
    loaded: Loaded,
    data: Task | str,
    queries: Sequence[str | int],
    k: int = 5,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    threads: int = 1,
) -> list[Hits]:
    """The k best answers to each query: images for a text, captions for an image given by its row number.

    Args:
        data: a retrieval task, or the data alone with columns `image` and `captions`.

    Raises:
        UserError: a row number that the task does not hold, or whose image was left out.
    """
    task = Task(name="queries", kind="retrieval", data=data) if isinstance(data, str) else data
    device = torch.device(device)
    loaded.model.to(device).eval()
    embedded = embed(loaded, task, device=device, batch_size=batch_size, threads=threads)
    return answer(loaded, embedded, queries, k, batch_size=batch_size)


def answer(loaded: Loaded, data: Embedded, queries: Sequence[str | int], k: int = 5, *, batch_size: int = 128) -> list[Hits]:
    """`retrieve` over features that are there already."""
    place = {row: image for image, row in enumerate(data.rows)}
    owners = data.owners.tolist()
    first_caption = {owner: caption for caption, owner in reversed(list(enumerate(owners)))}
    hits = []
    for query in queries:
        if isinstance(query, str):
            text = encode_texts(loaded.model, loaded.tokenizer, [query], device=data.texts.device, batch_size=batch_size)
            scores, order = _best(data.images @ text[0], k)
            images, captions = order, [first_caption[image] for image in order]
            right = [any(data.captions[i] == query for i, owner in enumerate(owners) if owner == image) for image in order]
        else:
            if query not in place:
                raise UserError(f"queries must be row numbers of images that were decoded and have captions, got {query}")
            scores, order = _best(data.texts @ data.images[place[query]], k)
            images, captions = [owners[caption] for caption in order], order
            right = [image == place[query] for image in images]
        hits.append(
            Hits(
                query=query,
                indices=tuple(data.rows[image] for image in images),
                keys=tuple(data.keys[image] for image in images),
                captions=tuple(data.captions[caption] for caption in captions),
                scores=tuple(scores),
                right=tuple(right),
            )
        )
    return hits


def has_keys(rows: Rows) -> bool:
    """Whether every file names its rows in a column `key`."""
    try:
        rows.column_type("key", "key")
    except UserError:
        return False
    return True


def _best(scores: Float[Tensor, " candidates"], k: int) -> tuple[list[float], list[int]]:
    top = scores.topk(min(k, len(scores)))
    return top.values.tolist(), top.indices.tolist()


def _captions(value: Any, task: Task) -> list[str]:
    """The texts of a cell that holds one or a list of them; empty ones do not count."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
        raise UserError(f"caption_column {task.caption_column!r} of task {task.name!r} must hold texts or lists of texts")
    return [text for text in texts if text and text.strip()]
