"""Small captioned and labelled sets, drawn with Pillow, and a tiny model with random weights: real input for tests."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import msclip
from msclip import checkpoint
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.model import Model
from msclip.storage import Folder

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200), "white": (250, 250, 250), "grey": (90, 90, 90)}
TEXTS = [f"a {size} picture of something {colour}" for colour in COLOURS for size in ("big", "small")]


def png(colour: str, seed: int) -> bytes:
    """A noisy square of one colour."""
    noise = np.random.default_rng(seed).integers(-25, 25, (24, 24, 3))
    pixels = np.clip(np.asarray(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_labelled(path: Path, images: Sequence[bytes | None], labels: Sequence[int | None], names: Sequence[str]) -> Path:
    """A labelled Parquet set with row groups of five rows."""
    columns = {"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.int64()), "class_name": list(names)}
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return path


def labelled(path: Path, rows: int = 20) -> Path:
    """`rows` squares of all colours in turn, labelled 0..4 by the alphabet."""
    colours = [list(COLOURS)[i % len(COLOURS)] for i in range(rows)]
    labels = [sorted(COLOURS).index(colour) for colour in colours]
    return write_labelled(path, [png(colour, i) for i, colour in enumerate(colours)], labels, colours)


def captioned(path: Path, captions: Sequence[list[str]], keys: Sequence[str] | None = None) -> Path:
    """One square for each list of captions."""
    images = [png(list(COLOURS)[i % len(COLOURS)], i) for i in range(len(captions))]
    columns = {"image": images, "captions": pa.array(captions, pa.list_(pa.string()))}
    pq.write_table(pa.table(columns | ({"key": list(keys)} if keys else {})), path, row_group_size=5)
    return path


def tiny_parts(seed: int = 0) -> tuple[Model, Tokenizer, Preprocess]:
    """A model with random weights and what belongs to it."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(TEXTS, vocab_size=600, context_length=16)
    model = msclip.create_model("ms_clip_s_tiny", vocab_size=600)
    return model, tokenizer, Preprocess(image_size=model.config.image_size)


def tiny_run(folder: Path, steps: Sequence[int], averaged: bool = False) -> Folder:
    """A run with one finished checkpoint a step, each with its own weights, and an average that differs from them."""
    run = Folder(folder)
    for step in steps:
        model, tokenizer, preprocess = tiny_parts(step)
        average = tiny_parts(step + 1000)[0].state_dict() if averaged else None
        checkpoint.save(run, {"step": step}, model.state_dict(), {}, model.config, tokenizer, preprocess, average)
    return run
