"""Memory for image files: what is held stays as it was, what is let go is used again."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest

from msclip.data.memory import FileMemory

PAGE = 4096


@pytest.fixture
def memory() -> Iterator[FileMemory]:
    descriptor = os.memfd_create("test")
    yield FileMemory(descriptor, 16 * PAGE)
    os.close(descriptor)


def filled(value: int, size: int) -> np.ndarray:
    return np.full(size, value, np.uint8)


def test_files_stay_as_they_were_while_anything_refers_to_them(memory: FileMemory) -> None:
    draw = random.Random(0)
    held: list[tuple[int, np.ndarray]] = []
    for value in range(500):
        array = memory.keep(filled(value % 251, draw.randrange(1, 5 * PAGE)))
        held.append((value % 251, array[len(array) // 2 :]))  # a view keeps the whole
        if len(held) > 3 or draw.random() < 0.3:
            del held[draw.randrange(len(held))]
        del array
        assert all((view == number).all() for number, view in held)
    assert memory.place(held[0][1]) is not None
    held.clear()
    assert memory.place(memory.keep(filled(1, 16 * PAGE))) == (0, 16 * PAGE)  # all holes are one again


def test_the_lowest_free_memory_is_used_again(memory: FileMemory) -> None:
    first, second = memory.keep(filled(1, 3 * PAGE - 5)), memory.keep(filled(2, PAGE))
    assert (memory.place(first), memory.place(second)) == ((0, 3 * PAGE - 5), (3 * PAGE, PAGE))
    assert memory.place(second[10:20]) == (3 * PAGE + 10, 10)
    del first
    third = memory.keep(filled(3, 2 * PAGE))
    assert memory.place(third) == (0, 2 * PAGE)
    assert (second == 2).all()


def test_files_without_room_are_kept_elsewhere(memory: FileMemory) -> None:
    first = memory.keep(filled(1, 15 * PAGE))
    second = memory.keep(filled(2, 2 * PAGE))
    assert memory.place(second) is None
    assert (second == 2).all()
    assert (first == 1).all()
    assert memory.place(memory.keep(filled(3, 0))) is None


def test_another_process_sees_the_files_where_they_are_said_to_be() -> None:
    descriptor = os.memfd_create("test")
    memory = FileMemory(descriptor)  # of this machine's size
    memory.keep(filled(1, 10))
    kept = memory.keep(filled(7, 10_000))
    place = memory.place(kept)
    assert place
    assert os.pread(descriptor, place.size, place.begin) == bytes([7]) * 10_000
    os.close(descriptor)
