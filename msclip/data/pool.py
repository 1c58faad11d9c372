"""Decoding processes beside a training worker: files go in and pixels come out in memory that both share.

The training process spends a few microseconds of Python on sixty images: it says through a pipe where their files are, and is
told when pixels and token ids are in their places. One process is started; it imports and builds what
all need and forks them, so sixteen take the time and nearly the memory of one. The memory has no name in the file system and
pipes end with their owner: whoever is killed, nothing is left behind.
"""

import contextlib
import gc
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from msclip.data.decode import Recipe, Replaced
from msclip.data.memory import FileMemory
from msclip.errors import TrainingError, UserError

_NICENESS = 4
"""Decoding takes the time that training leaves. Ray runs its workers at 15, and the scale ends at 19."""

_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}
"""For glibc: the memory of an image is kept for the next one. It would be given back to the system and come anew, page by page,
for each image: up to a third of decoding."""


class Layout(NamedTuple):
    """Memory for a few batches, cut into slots."""

    slots: int
    rows: int
    image_size: int
    context_length: int

    @property
    def bytes(self) -> int:
        """Size of the whole."""
        return self.slots * self.rows * (8 * self.context_length + 3 * self.image_size**2)

    def arrays(self, memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (slots, rows, size, size, 3) in uint8 and token ids (slots, rows, context) in int64."""
        ids = 8 * self.slots * self.rows * self.context_length
        pixels = memory[ids:].reshape(self.slots, self.rows, self.image_size, self.image_size, 3)
        return pixels, memory[:ids].view(np.int64).reshape(self.slots, self.rows, self.context_length)


class Work(NamedTuple):
    """Rows of one batch to decode together."""

    slot: int
    first: int
    """Of the slot's rows."""
    epoch: np.ndarray
    row: np.ndarray
    sizes: np.ndarray
    """Bytes of each file, or 0."""
    captions: Sequence[str]
    files: Sequence[np.ndarray]
    """All files' bytes, in a few pieces, none empty; no file spans two."""


class Decoded(NamedTuple):
    """The rows of some work, made where the slots are not."""

    pixels: np.ndarray
    """(rows, size, size, 3) in uint8."""
    token_ids: np.ndarray
    """(rows, context) in int64."""
    replaced: list[Replaced]


class Decoder(Protocol):
    """Somebody who decodes one piece of work at a time, into the slots that it was made for."""

    def decode(self, work: Work) -> list[Replaced]:
        """Fills the work's rows; their `place` counts from its first.

        Raises:
            UserError, OSError: see `Recipe.decode`; among them `TrainingError`: whoever decoded has died.
        """
        ...


class Inline:
    """Decodes in the calling thread."""

    def __init__(self, recipe: Recipe, layout: Layout, memory: np.ndarray):
        self.recipe, self.arrays = recipe, layout.arrays(memory)

    def decode(self, work: Work) -> list[Replaced]:
        return decode_into(self.recipe, work, *self.arrays)


def decode_into(recipe: Recipe, work: Work, pixels: np.ndarray, token_ids: np.ndarray) -> list[Replaced]:
    """Decodes into the arrays of a `Layout`."""
    rows = slice(work.first, work.first + len(work.row))
    files = _cut(work.sizes, work.files)
    return recipe.decode(work.epoch, work.row, files, work.captions, pixels[work.slot, rows], token_ids[work.slot, rows])


def decode_apart(recipe: Recipe, work: Work) -> Decoded:
    """Decodes into arrays of its own."""
    layout = Layout(1, len(work.row), recipe.preprocess.image_size, recipe.context_length)
    pixels, token_ids = layout.arrays(np.empty(layout.bytes, np.uint8))
    replaced = decode_into(recipe, work._replace(slot=0, first=0), pixels, token_ids)
    return Decoded(pixels[0], token_ids[0], replaced)


def _cut(sizes: np.ndarray, pieces: Sequence[Any]) -> Iterator[memoryview]:
    """The files, of these sizes, that the pieces hold."""
    rest = iter(pieces)
    view, at = memoryview(b""), 0
    for size in sizes.tolist():
        if size and at == len(view):
            view, at = memoryview(next(rest)), 0
        yield view[at : at + size]
        at += size


def cores() -> int:
    """Cores that this process may use: of its affinity, and of its control group's quota, as containers have one."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))  # "max" is no number
    return count


class Pool:
    """`count` decoding processes that fill `memory`, which lies as `layout` says."""

    def __init__(self, recipe: Recipe, layout: Layout, count: int):
        descriptor, files = os.memfd_create("msclip-batches"), os.memfd_create("msclip-files")
        os.ftruncate(descriptor, layout.bytes)
        self.memory = np.frombuffer(mmap.mmap(descriptor, layout.bytes), np.uint8)
        self.files = FileMemory(files)
        pairs = [socket.socketpair() for _ in range(count + 1)]
        theirs = [descriptor, files, *(pair[1].detach() for pair in pairs)]
        # -P: the working folder is no place for modules. What this process can import, the other can.
        paths = os.pathsep.join(p for p in sys.path if p)
        environment = {**_ALLOCATION, **os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", "from msclip.data.pool import serve; serve()", *map(str, theirs)]
        self._process = subprocess.Popen(command, pass_fds=theirs, env=environment, stdin=subprocess.DEVNULL)
        for number in theirs:
            os.close(number)
        self._control, *own = (Connection(pair[0].detach()) for pair in pairs)
        self.decoders = [_Process(connection, self) for connection in own]
        with contextlib.suppress(OSError):  # whoever hands out work is told how they died
            self._control.send_bytes(pickle.dumps((recipe, layout)))

    def say_why(self) -> NoReturn:
        """Raises what is known about processes that are gone."""
        reason = "it ended before it could say why"
        with contextlib.suppress(OSError, EOFError):
            if self._control.poll(5):
                reason = self._control.recv_bytes().decode()
        raise TrainingError(
            f"a decoding process on {socket.gethostname()} has died: {reason}. Signal 9 without anybody's doing is mostly the "
            "system's answer to a lack of memory: lower data.decode_processes or data.prefetch. Go on with --resume"
        )

    def close(self) -> None:
        """Ends the processes, at once."""
        self._control.close()
        for decoder in self.decoders:
            decoder.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Process:
    """One decoding process."""

    def __init__(self, connection: Connection, pool: Pool):
        self._connection, self._pool = connection, pool

    def decode(self, work: Work) -> list[Replaced]:
        places = [self._pool.files.place(piece) for piece in work.files]
        try:
            self._connection.send_bytes(pickle.dumps((work._replace(files=()), places), 5))
            for place, piece in zip(places, work.files, strict=True):
                if place is None:
                    self._connection.send_bytes(piece.data)
            answer = self._connection.recv_bytes()
        except (OSError, EOFError):
            self._pool.say_why()
        replaced = pickle.loads(answer) if answer else []
        if isinstance(replaced, BaseException):
            raise replaced
        return replaced

    def close(self) -> None:
        """A thread that is in `decode` meets an error."""
        # Only shut down: a descriptor that is closed here may be another file's while a thread still reads from it.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as connection:
            connection.shutdown(socket.SHUT_RDWR)


def serve() -> NoReturn:
    """The first process: forks a decoder for each connection, tells of their deaths, and ends them with its owner."""
    memory_number, files_number, control_number, *numbers = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, with whom this ends
    os.nice(_NICENESS)
    control = Connection(control_number)
    children: list[int] = []
    with contextlib.suppress(OSError, EOFError):
        recipe, layout = pickle.loads(control.recv_bytes())
        arrays = layout.arrays(np.frombuffer(mmap.mmap(memory_number, layout.bytes), np.uint8))
        files = memoryview(mmap.mmap(files_number, 0, prot=mmap.PROT_READ))
        _ = recipe.tokenizer  # built once for all
        gc.freeze()  # what there is by now stays: nobody needs to look through it again and again
        for number in numbers:
            child = os.fork()
            if not child:
                for other in {control_number, *numbers} - {number}:
                    os.close(other)
                _decode_all(Connection(number), recipe, arrays, files)
            children.append(child)
        for number in numbers:
            os.close(number)
        while not select.select([control], [], [], 0.5)[0]:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                reason = f"signal {-code}" if code < 0 else f"status {code}"
                control.send_bytes(f"process {ended} ended with {reason}".encode())
                break
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    os._exit(0)


def _decode_all(connection: Connection, recipe: Recipe, arrays: tuple[np.ndarray, np.ndarray], memory: memoryview) -> NoReturn:
    """A forked decoder: work after work, until its owner is gone."""
    with contextlib.suppress(OSError, EOFError):
        while True:
            work, places = pickle.loads(connection.recv_bytes())
            files = [memory[p.begin : p.begin + p.size] if p else connection.recv_bytes() for p in places]
            answer: Any
            try:
                answer = decode_into(recipe, work._replace(files=files), *arrays)
            except (UserError, OSError) as error:
                answer = error
            except Exception:
                answer = RuntimeError(f"decoding failed:\n{traceback.format_exc()}")
            connection.send_bytes(pickle.dumps(answer) if answer else b"")
    os._exit(0)
