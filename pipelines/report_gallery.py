"""The report's retrieval gallery: what the model finds for captions and for images that were drawn by lot, not picked.

Rendering needs only what was asked, what was found and which of it is right; `fill` gets that from a checkpoint.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from msclip.checkpoint import Loaded
from msclip.data.images import BadImage, open_image
from msclip.eval.retrieval import Embedded, Hits, answer, embed
from msclip.eval.rows import image_bytes, open_rows
from msclip.eval.tasks import Task

SHOWN = 5
THUMBNAIL = 144  # pixels of the shorter side at most: twice what the page shows, for sharp screens


@dataclass(frozen=True)
class Found:
    """One answer."""

    caption: str
    score: float
    """Cosine of image and text."""
    right: bool
    image: str = ""
    """A data URI; empty where captions were sought."""


@dataclass(frozen=True)
class Query:
    """A question, the best answers, and the place of the best right one."""

    caption: str
    """What was asked; for an image, its first caption."""
    found: tuple[Found, ...]
    rank: int | None
    """From 1; None where no answer is right."""
    candidates: int
    image: str = ""
    """A data URI, where an image asks."""
    missed: Found | None = None
    """The best right answer, where it is not among `found`."""


@dataclass(frozen=True)
class Gallery:
    """Questions both ways over one captioned set."""

    data: str
    checkpoint: str
    images: int
    captions: int
    text_to_image: tuple[Query, ...]
    image_to_text: tuple[Query, ...]


def fill(loaded: Loaded, task: Task, checkpoint: str, queries: int, seed: int, device: torch.device) -> Gallery:
    """Asks `queries` captions and as many images of the task's data, chosen by `seed` alone.

    Raises:
        UserError: the data are missing or lack a column.
    """
    loaded.model.to(device).eval()
    data = embed(loaded, task, device=device, batch_size=128, threads=2)
    lot = np.random.default_rng(seed).permutation(len(data.rows))
    owners = data.owners.tolist()
    asked = [int(image) for image in lot[:queries]]
    asking = [int(image) for image in lot[queries : 2 * queries]] or asked
    texts = [data.captions[owners.index(image)] for image in asked]
    by_text = answer(loaded, data, texts, k=len(data.rows))
    by_image = answer(loaded, data, [data.rows[image] for image in asking], k=len(data.captions))
    shown = {row for hits in by_text for row in (*hits.indices[:SHOWN], *_first_right(hits))}
    pictures = thumbnails(task, sorted(shown | {data.rows[image] for image in asking}))
    return Gallery(
        data=task.data,
        checkpoint=checkpoint,
        images=len(data.rows),
        captions=len(data.captions),
        text_to_image=tuple(
            _query(hits, hits_caption, pictures, True) for hits, hits_caption in zip(by_text, texts, strict=True)
        ),
        image_to_text=tuple(
            replace(_query(hits, _caption_of(data, image), pictures, False), image=pictures[data.rows[image]])
            for hits, image in zip(by_image, asking, strict=True)
        ),
    )


def _caption_of(data: Embedded, image: int) -> str:
    return data.captions[data.owners.tolist().index(image)]


def _first_right(hits: Hits) -> list[int]:
    return [row for row, right in zip(hits.indices, hits.right, strict=True) if right][:1]


def _query(hits: Hits, caption: str, pictures: dict[int, str], with_images: bool) -> Query:
    def found(place: int) -> Found:
        image = pictures[hits.indices[place]] if with_images else ""
        return Found(hits.captions[place], hits.scores[place], hits.right[place], image)

    first = hits.right.index(True) if True in hits.right else None
    return Query(
        caption=caption,
        found=tuple(found(place) for place in range(min(SHOWN, len(hits.scores)))),
        rank=None if first is None else first + 1,
        candidates=len(hits.scores),
        missed=found(first) if first is not None and first >= SHOWN else None,
    )


def thumbnails(task: Task, rows: Sequence[int]) -> dict[int, str]:
    """Data URIs of the images in these rows; small ones as they are, larger ones scaled down."""
    wanted = open_rows(task.data).read([task.image_column], rows)
    return {row: thumbnail(image_bytes(values[task.image_column]) or b"") for row, values in wanted}


def thumbnail(data: bytes) -> str:
    """A data URI; a grey square where the bytes are no image."""
    try:
        picture = open_image(data, (255, 255, 255))
    except BadImage:
        picture = Image.new("RGB", (THUMBNAIL, THUMBNAIL), (128, 128, 128))
    file, shorter = io.BytesIO(), min(picture.size)
    if shorter > THUMBNAIL:
        scale = THUMBNAIL / shorter
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    # Drawings survive PNG better and are smaller so; photographs the other way round.
    few_colours = picture.getcolors(4096) is not None
    picture.save(file, "PNG" if few_colours and shorter <= THUMBNAIL else "JPEG", quality=82)
    kind = "png" if file.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
