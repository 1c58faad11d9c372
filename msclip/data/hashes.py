"""What tells that two image files are the same, or nearly: a hash of the bytes, and one of the picture.

The perceptual hash has a bit for each of the 64 lowest frequencies of a small grey version: whether it is above their
median (known as pHash). Scaling, stretching and harder compression move a photograph by 4 bits at most, while different
photographs are dozens apart; tests/msclip/test_hashes.py measures both. Cropping, mirroring and turning are not recognised.
"""

import hashlib
from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Int64, UInt64
from PIL import Image

BITS = 64
_SIDE = 32  # of the grey version
_FREQUENCIES = 8  # in each direction
# Grey levels that the small version must vary by (standard deviation): a flat picture's frequencies are only noise.
_LEAST_DETAIL = 2.0
# A pair found by its bands costs as much as 40 that are simply compared; above, more than one in 40 are found.
_MOST_BANDED = 9
_COMPARED = 2**16  # at once: they stay in the processor's cache

_angle = np.pi * (np.arange(_SIDE) + 0.5) * np.arange(_FREQUENCIES)[:, None] / _SIDE
_COSINES = np.cos(_angle) * np.sqrt(np.where(np.arange(_FREQUENCIES) == 0, 1, 2) / _SIDE)[:, None]  # orthonormal DCT-II


def content_hash(data: bytes) -> bytes:
    """32 bytes that no two different files share: SHA-256."""
    return hashlib.sha256(data).digest()


def perceptual_hash(image: Image.Image) -> int | None:
    """64 bits, of which similar pictures differ in few; None for a picture too flat to be told from others."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
    if grey.std() < _LEAST_DETAIL:
        return None
    low = _COSINES @ grey @ _COSINES.T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


def leaders(hashes: UInt64[np.ndarray, " rows"], distance: int, fixed: int = 0) -> Int64[np.ndarray, " rows"]:
    """For each row the first of the rows before it that stays and is near, or -1 where there is none: such a row stays.

    So of near rows the first stays, and a chain of rows that are each near the next does not go as a whole.

    Args:
        hashes: in the order that decides who stays.
        distance: rows are near when their hashes differ in at most this many bits.
        fixed: as many of the first rows stay, near each other or not.
    """
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    # Of equal hashes the first decides for all.
    near = np.full(len(hashes), -1, np.int64)
    one, other = (first[index] for index in _near_pairs(distinct, distance))
    earlier, later = np.minimum(one, other), np.maximum(one, other)
    order = np.lexsort((earlier, later))
    for i, j in zip(earlier[order].tolist(), later[order].tolist(), strict=True):
        # All pairs with a smaller `later` are done: whether row i stays is settled.
        if near[j] < 0 and (i < fixed or near[i] < 0):
            near[j] = i
    rows, kind = np.arange(len(hashes)), first[which]
    found = np.where((rows != kind) & (near[kind] < 0), kind, near[kind])
    found[:fixed] = -1
    return found


def _near_pairs(
    hashes: UInt64[np.ndarray, " distinct"], distance: int
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Index pairs of distinct hashes within a distance, each once."""
    return _banded_pairs(hashes, distance) if distance <= _MOST_BANDED else _all_pairs(hashes, distance)


def _all_pairs(
    hashes: UInt64[np.ndarray, " distinct"], distance: int
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """By comparing each with each, about a nanosecond a pair: a few at a time with all that come after."""
    one, other = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    start = 0
    while left := len(hashes) - start:
        some = min(left, max(1, _COMPARED // left))
        bits = np.bitwise_count(hashes[start : start + some, None] ^ hashes[None, start:])
        i, j = np.divmod(np.flatnonzero(bits <= distance), left)
        one.append(i[i < j] + start)
        other.append(j[i < j] + start)
        start += some
    return np.concatenate(one), np.concatenate(other)


def _banded_pairs(
    hashes: UInt64[np.ndarray, " distinct"], distance: int
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """By comparing those that agree in part.

    Cut into distance + 2 bands, two such hashes agree in at least two bands: there are two more bands than differing bits. So
    only pairs that share two bands are compared; with one band less and one to share they would be a hundred times as many
    at a distance of 4.
    """
    edges = np.linspace(0, BITS, distance + 3).astype(int)
    bands = [(hashes >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1) for low, high in pairwise(edges)]
    one, other = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    pairs_of_bands = list(combinations(bands, 2))
    for number, (band, second) in enumerate(pairs_of_bands):
        shared = band << np.uint64(BITS // 2) | second  # no band is wider
        order = np.argsort(shared, kind="stable")
        ordered = shared[order]
        left = np.arange(len(order))
        shift = 0
        while len(left):  # neighbours in that order, then those two apart, as long as any share both bands
            shift += 1
            left = left[left + shift < len(order)]
            left = left[ordered[left] == ordered[left + shift]]
            i, j = order[left], order[left + shift]
            near = np.bitwise_count(hashes[i] ^ hashes[j]) <= distance
            i, j = i[near], j[near]
            new = np.ones(len(i), bool)
            for before, beside in pairs_of_bands[:number]:
                new &= (before[i] != before[j]) | (beside[i] != beside[j])
            one.append(i[new])
            other.append(j[new])
    return np.concatenate(one), np.concatenate(other)
