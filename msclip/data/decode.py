"""One reading unit, from Parquet bytes to pixels and token ids, as a pure function of (seed, epoch, row).

Neither the augmentation nor the caption nor what replaces a bad row depends on how rows were grouped into units: a batch is
the same to the bit on any number of workers and after any resume.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, UInt8

from msclip.data.images import Augment, BadImage, Preprocess
from msclip.data.plan import Unit
from msclip.data.shards import Manifest
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError

# What random numbers are for, after the seed in their key; 0 and 1 are the plan's.
_AUGMENT, _CAPTION = 2, 3


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used. Another row of its row group took its place."""

    shard: str
    """File name inside the data's folder."""
    row_group: int
    row: int
    """Position inside the row group."""
    key: str
    """Empty where the data have no key column."""
    reason: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True, eq=False)
class Decoded:
    """What became of a `Unit`."""

    epoch: int
    row: Int64[np.ndarray, " rows"]
    """The plan's row ids, also where another row had to stand in."""
    pixels: UInt8[np.ndarray, "rows size size 3"]
    token_ids: Int32[np.ndarray, "rows context"]
    bad: tuple[BadRow, ...] = ()


def decode_unit(
    manifest: Manifest, unit: Unit, preprocess: Preprocess, tokenizer: Tokenizer, augment: Augment | None, seed: int
) -> Decoded:
    """Reads and decodes the rows of a unit.

    A row without a usable image or caption is recorded, and replaced by the next good row of its row group (after the last
    row comes the first), with an augmentation and a caption of its own.

    Args:
        augment: `None` for the evaluation view.

    Raises:
        UserError: a file is gone, damaged or has changed, or not one row of a row group can be used.
        OSError: the storage failed.
    """
    size = preprocess.image_size
    pixels = np.empty((len(unit.row), size, size, 3), dtype=np.uint8)
    captions = [""] * len(unit.row)
    bad: list[BadRow] = []
    groups = manifest.locate(unit.row)
    for group in np.unique(groups):
        place = manifest.row_groups[group]
        wanted = np.flatnonzero(groups == group)
        rows = _RowGroup(manifest, int(group), keep=len(wanted) < place.rows)
        for i in wanted:
            row = int(unit.row[i])
            rng = np.random.default_rng((seed, _AUGMENT, unit.epoch, row))
            offset = row - place.first_row
            for candidate in [*range(offset, place.rows), *range(offset)]:
                reason = rows.use(candidate, pixels[i], preprocess, augment, rng)
                if reason is None:
                    break
                if candidate == offset:
                    file = manifest.shards[place.shard].file
                    bad.append(BadRow(file, place.row_group, offset, rows.key(offset), reason))
            else:
                raise UserError(
                    f"no row of row group {place.row_group} of {manifest.folder.url}/"
                    f"{manifest.shards[place.shard].file} can be used; row {offset}: {bad[-1].reason}. Remove the file or "
                    "ingest it again: ingest leaves bad rows out"
                )
            choices = rows.captions(candidate)
            captions[i] = choices[caption_index(len(choices), seed, unit.epoch, row)]
    return Decoded(unit.epoch, unit.row, pixels, tokenizer.encode_numpy(captions), tuple(bad))


def caption_index(count: int, seed: int, epoch: int, row: int) -> int:
    """Which of a row's captions an epoch trains on: any `count` consecutive epochs use each once."""
    if count == 1:
        return 0
    order = np.argsort(np.random.PCG64(np.random.SeedSequence((seed, _CAPTION, row))).random_raw(count))
    return int(order[epoch % count])


class _RowGroup:
    """The rows of one row group, and what is known to be wrong with them."""

    def __init__(self, manifest: Manifest, group: int, keep: bool):
        table = manifest.read(group, keep=keep)
        images = table[manifest.image_column]
        if pa.types.is_struct(images.type):
            images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks])
        self._images = images
        self._captions = table[manifest.caption_column]
        self._keys = table["key"] if "key" in table.column_names else None
        self._reasons: dict[int, str] = {}

    def key(self, offset: int) -> str:
        key = None if self._keys is None else self._keys[offset].as_py()
        return "" if key is None else str(key)

    def captions(self, offset: int) -> Sequence[str]:
        """The row's captions that say something."""
        found = self._captions[offset].as_py()
        return [text for text in ([found] if isinstance(found, str) else found or []) if text and text.strip()]

    def use(
        self,
        offset: int,
        out: UInt8[np.ndarray, "size size 3"],
        preprocess: Preprocess,
        augment: Augment | None,
        rng: np.random.Generator,
    ) -> str | None:
        """Writes the row's pixels to `out`; or says why it cannot."""
        if offset in self._reasons:
            return self._reasons[offset]
        data = self._images[offset].as_py()
        if data is None:
            return self._reasons.setdefault(offset, "no image")
        if not self.captions(offset):
            return self._reasons.setdefault(offset, "no caption")
        try:
            out[:] = preprocess.pixels(data) if augment is None else preprocess.train_pixels(data, augment, rng)
        except BadImage as error:
            return self._reasons.setdefault(offset, str(error))
        return None


def local_units(
    manifest: Manifest,
    units: Iterable[Unit],
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    augment: Augment | None,
    seed: int,
    threads: int = 0,
) -> Iterator[Decoded]:
    """Decodes units in this process, in order; with threads, as many units ahead (Pillow decodes outside the GIL)."""

    def decode(unit: Unit) -> Decoded:
        return decode_unit(manifest, unit, preprocess, tokenizer, augment, seed)

    if not threads:
        yield from map(decode, units)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    ahead: deque[Future[Decoded]] = deque()
    try:
        for unit in units:
            ahead.append(pool.submit(decode, unit))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
