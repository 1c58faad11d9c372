"""Memory for image files that a training process and its decoding processes share.

A file is copied once, from where it was read to here, and decoded from here: the pipes carry its place. Freed memory is used
again, lowest places first, so what is touched is little more than what was ever held at a time: memory that is touched for the
first time costs the system as much as several copies.
"""

import bisect
import mmap
import os
from collections import deque
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

_ALIGNED = 4096


class Place(NamedTuple):
    """Bytes in the memory of a `FileMemory`."""

    begin: int
    size: int


class FileMemory:
    """Arrays that live until nobody refers to them.

    One thread puts them in; any may let go of them.

    Args:
        descriptor: of the file in memory that this is, which other processes map too. It is made as large as the machine's
            memory, and takes what is used of it.
    """

    def __init__(self, descriptor: int, size: int | None = None):
        size = size or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        os.ftruncate(descriptor, size)
        self._memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        self._begin = self._memory.ctypes.data
        self._holes = [Place(0, size)]
        """What is free, by its begin; no two touch."""
        self._freed: deque[Place] = deque()
        """What is to become holes again: an array can go at any moment of any thread, so nothing else may be done then."""

    def keep(self, files: UInt8[np.ndarray, " bytes"]) -> UInt8[np.ndarray, " bytes"]:
        """A copy of the files in this memory; in memory of its own if they have no room here."""
        while self._freed:
            self._free(self._freed.popleft())
        needed = -(-files.nbytes // _ALIGNED) * _ALIGNED
        found = next((i for i, hole in enumerate(self._holes) if hole.size >= needed), None)
        if found is None or not needed:
            return files.copy()
        begin, size = self._holes[found]
        self._holes[found : found + 1] = [Place(begin + needed, size - needed)] if size > needed else []
        array = np.asarray(_Held(self._memory[begin : begin + files.nbytes], self._freed, Place(begin, needed)))
        array[:] = files
        return array

    def place(self, array: UInt8[np.ndarray, " bytes"]) -> Place | None:
        """Where an array lies, if it lies here."""
        begin = array.ctypes.data - self._begin
        return Place(begin, array.nbytes) if 0 <= begin < len(self._memory) else None

    def _free(self, place: Place) -> None:
        at = bisect.bisect(self._holes, place)
        before, after = self._holes[max(0, at - 1) : at], self._holes[at : at + 1]
        begin, end = place.begin, place.begin + place.size
        if before and before[0].begin + before[0].size == begin:
            at, begin = at - 1, before[0].begin
        else:
            before = []
        if after and after[0].begin == end:
            end += after[0].size
        else:
            after = []
        self._holes[at : at + len(before) + len(after)] = [Place(begin, end - begin)]


class _Held:
    """What the arrays of one place refer to: NumPy keeps it as long as there is a view of it."""

    def __init__(self, array: np.ndarray, freed: deque[Place], place: Place):
        self.__array_interface__ = array.__array_interface__
        self._memory, self._freed, self._place = array, freed, place

    def __del__(self) -> None:
        self._freed.append(self._place)
