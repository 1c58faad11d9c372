"""Parquet rows in their own order, each with its number, and image features computed from them.

Evaluation reads every row once, so there is no shuffling, no plan and no Ray Data here: threads decode (Pillow lets go
of the interpreter's lock while it decodes) a batch or two ahead of the device. A row that cannot be decoded is counted,
with its reason.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from pyarrow import fs
from torch import Tensor

from msclip.data.images import BadImage, Preprocess
from msclip.data.parquet import find
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError
from msclip.model import Model


class Skipped(NamedTuple):
    """A row that no metric saw."""

    row: int
    reason: str


@dataclass(frozen=True)
class Rows:
    """The rows of some Parquet files, numbered from 0 in the order of the files."""

    filesystem: fs.FileSystem
    files: tuple[str, ...]
    spec: str

    def __len__(self) -> int:
        return sum(self._open(file).metadata.num_rows for file in self.files)

    def _open(self, file: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.filesystem.open_input_file(file))
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"data {self.spec!r} must be Parquet, and {file} is not: {error}") from error

    def column_type(self, column: str, setting: str) -> pyarrow.DataType:
        """The type of a column, which every file must have.

        Raises:
            UserError: a file lacks it; names the setting that asked for it.
        """
        for file in self.files:
            schema = self._open(file).schema_arrow
            if column not in schema.names:
                raise UserError(
                    f"{setting} must be a column of {file}, got {column!r}; it has {', '.join(schema.names) or 'none'}"
                )
        return schema.field(column).type

    def read(self, columns: Sequence[str], chosen: Sequence[int] | np.ndarray | None = None) -> Iterator[tuple[int, dict]]:
        """(row number, values by column) of the chosen rows, ascending; of all by default. Skips whole row groups."""
        wanted = None if chosen is None else np.unique(np.asarray(chosen, dtype=np.int64))
        start = 0
        for file in self.files:
            parquet = self._open(file)
            for group in range(parquet.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                if wanted is None or wanted.searchsorted(start) < wanted.searchsorted(stop):
                    for batch in parquet.iter_batches(256, row_groups=[group], columns=list(columns)):
                        numbers = np.arange(start, start + len(batch))
                        inside = slice(None) if wanted is None else np.flatnonzero(np.isin(numbers, wanted))
                        rows = batch if wanted is None else batch.take(pyarrow.array(inside))
                        yield from zip(numbers[inside].tolist(), rows.to_pylist(), strict=True)
                        start += len(batch)
                start = stop

    def footers(self) -> str:
        """A digest of every file's Parquet footer: sizes, places and statistics of all columns, but not their path."""
        digest = hashlib.sha256()
        for file in self.files:
            with self.filesystem.open_input_file(file) as stream:
                size = stream.size()
                stream.seek(max(0, size - 8))
                length = int.from_bytes(stream.read(4), "little")
                stream.seek(max(0, size - 8 - length))
                digest.update(stream.read())
        return digest.hexdigest()


def open_rows(spec: str) -> Rows:
    """The rows of a Parquet file, a folder of them or of ingest, or a pattern in the last part of a path or URL.

    Raises:
        UserError: nothing is there, or a folder's files are not what its manifest says.
    """
    folder, names = find(spec)
    return Rows(folder.filesystem, tuple((folder / name).path for name in names), spec)


def spread(rows: int, limit: int) -> Int[np.ndarray, " chosen"]:
    """Up to `limit` row numbers, evenly over all (data are often sorted by class); 0 chooses every row."""
    count = min(limit, rows) if limit else rows
    return np.arange(count, dtype=np.int64) * rows // max(count, 1)


def image_bytes(value: bytes | dict[str, Any] | None) -> bytes | None:
    """The encoded image of a cell that is binary or a struct with a field `bytes`."""
    return value.get("bytes") if isinstance(value, dict) else value


def encode_images(
    model: Model,
    preprocess: Preprocess,
    images: Iterable[tuple[int, bytes | None]],
    *,
    device: torch.device,
    batch_size: int,
    threads: int,
) -> tuple[Float[Tensor, "kept dim"], list[int], list[Skipped]]:
    """Features of (row number, encoded image) pairs, unit length, float32, on the device.

    Returns:
        features, the row number of each, and the rows that could not be decoded.

    Raises:
        UserError: no image at all could be decoded, or the model's features are not finite.
    """
    features: list[Tensor] = []
    kept: list[int] = []
    skipped: list[Skipped] = []
    for numbers, pixels in _decoded(images, preprocess.pixels, skipped, batch_size, threads):
        batch = preprocess.images(torch.from_numpy(pixels).to(device))
        features.append(_encode(model.encode_image, batch, device))
        kept += numbers
    if not features:
        first = f"row {skipped[0].row}: {skipped[0].reason}" if skipped else "the data have no rows"
        raise UserError(f"no image could be decoded ({first}); check data and image_column")
    return _finite(torch.cat(features)), kept, skipped


def encode_texts(
    model: Model, tokenizer: Tokenizer, texts: Sequence[str], *, device: torch.device, batch_size: int
) -> Float[Tensor, "texts dim"]:
    """Features of texts, unit length, float32, on the device."""
    batches = [tokenizer(list(texts[i : i + batch_size])).to(device) for i in range(0, len(texts), batch_size)]
    return _finite(torch.cat([_encode(model.encode_text, batch, device) for batch in batches]))


def _encode(encode: Callable[..., Tensor], batch: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        features = encode(batch, normalize=False)
    # Normalised here, in float32: a bfloat16 vector is unit only to three digits.
    return F.normalize(features.float(), dim=-1)


def _finite(features: Tensor) -> Tensor:
    if not bool(features.isfinite().all()):
        raise UserError("the model's features are not finite; its weights are spoiled, evaluate an earlier checkpoint")
    return features


def _decoded(
    images: Iterable[tuple[int, bytes | None]],
    decode: Callable[[bytes], UInt8[np.ndarray, "size size 3"]],
    skipped: list[Skipped],
    batch_size: int,
    threads: int,
) -> Iterator[tuple[list[int], UInt8[np.ndarray, "batch size size 3"]]]:
    """Batches of good rows in order, decoded up to two batches ahead; bad ones go to `skipped`."""

    def decode_or_reason(data: bytes | None) -> np.ndarray | str:
        if not data:
            return "no image"
        try:
            return decode(data)
        except BadImage as error:
            return str(error)

    pending: deque[tuple[int, Future[np.ndarray | str]]] = deque()
    numbers: list[int] = []
    pixels: list[np.ndarray] = []

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        source = iter(images)
        more = True
        while more or pending:
            while more and len(pending) < 2 * batch_size:
                try:
                    number, data = next(source)
                except StopIteration:
                    more = False
                else:
                    pending.append((number, pool.submit(decode_or_reason, data)))
            while pending and len(pixels) < batch_size:
                number, future = pending.popleft()
                result = future.result()
                if isinstance(result, str):
                    skipped.append(Skipped(number, result))
                else:
                    numbers.append(number)
                    pixels.append(result)
            if len(pixels) == batch_size or (pixels and not more and not pending):
                yield numbers, np.stack(pixels)
                numbers, pixels = [], []
