"""Decoders on other machines: when they are hired, what they get to do, and when they are let go.

Decoders are ranked: first those beside the training process, then helpers in the order in which they were hired. One takes
work only if there is more of it than the idle ones ahead of it can take, and a helper only while too few finished batches
wait. So helpers do nothing while the decoders here suffice, and where fewer helpers would do, the last ones get nothing.
Who has had nothing to do for a while is let go. How many are hired follows from how long training has waited for decoding.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from msclip.data.pool import Decoded, Work
from msclip.timing import NOTICEABLE, more_processes

T = TypeVar("T")
STRETCH_SECONDS = 20.0
"""Over which it is measured what training waits for: many steps, and few beside the minute that a node takes to start."""
IDLE_SECONDS = 120.0
"""After which a helper goes: longer than a checkpoint's pause, shorter than an autoscaler's patience with an idle node."""

logger = logging.getLogger(__name__)


class Helper(Protocol):
    """A decoder on another machine. Whatever it raises, it is let go, and its work is done here."""

    def start(self) -> None:
        """Waits until it has a place to work at."""
        ...

    def decode(self, work: Work) -> Decoded:
        """Decodes, or raises in limited time."""
        ...

    def close(self) -> None:
        """Lets it go. A thread that is in `start` or `decode` meets an error."""
        ...


class Helpers(Protocol):
    """Where helpers come from."""

    def hire(self, wanted: int, working: int, coming: int) -> Sequence[Helper]:
        """At most `wanted`, as there is room for, beside those that are `working` and those that are in `start`."""
        ...


class Queue(Generic[T]):
    """What decoders have to do, in order."""

    def __init__(self, enough: int):
        """Helpers get nothing while `enough` finished batches wait."""
        self._enough, self._finished, self._ended = enough, 0, False
        self._parts: deque[T] = deque()
        self._returned: deque[T] = deque()
        """For the decoders here alone."""
        self._idle: list[int] = []
        """Ranks of those that wait."""
        lock = threading.Lock()
        self._here, self._elsewhere, self._room = (threading.Condition(lock) for _ in range(3))

    def put(self, parts: Sequence[T]) -> None:
        with self._here:
            self._parts.extend(parts)
            self._here.notify(len(parts))
            self._elsewhere.notify_all()

    def wait_for_room(self, most: int) -> None:
        """Until no more than `most` parts wait, or the end."""
        with self._here:
            self._room.wait_for(lambda: self._ended or len(self._parts) <= most)

    def give_back(self, part: T) -> None:
        """A helper could not do this."""
        with self._here:
            self._returned.append(part)
            self._here.notify()

    def count_finished(self, change: int) -> None:
        """Finished batches have come (or gone, if negative)."""
        with self._here:
            self._finished += change
            if change < 0:
                self._elsewhere.notify_all()

    def end(self) -> None:
        with self._here:
            self._ended = True
            self._room.notify_all()
            self._here.notify_all()
            self._elsewhere.notify_all()

    def take(self) -> T | None:
        """For a decoder here; `None` at the end."""
        return self._take(self._here, 0, None)

    def take_elsewhere(self, rank: int, seconds: float) -> T | None:
        """For the helper of this rank, from 1; `None` at the end, or if there was nothing for so long."""
        return self._take(self._elsewhere, rank, seconds)

    def _take(self, condition: threading.Condition, rank: int, seconds: float | None) -> T | None:
        with condition:
            self._idle.append(rank)
            found = condition.wait_for(lambda: self._ended or self._any_for(rank), seconds)
            self._idle.remove(rank)
            if self._ended or not found:
                return None
            self._room.notify()
            return (self._parts if rank or not self._returned else self._returned).popleft()

    def _any_for(self, rank: int) -> bool:
        if not rank:
            return bool(self._parts or self._returned)
        ahead = sum(other < rank for other in self._idle)
        return bool(self._parts) and len(self._parts) + len(self._returned) > ahead and self._finished < self._enough


class Crew:
    """The helpers of a loader."""

    def __init__(self) -> None:
        self.waited: float | None = None
        """Seconds for which training has waited for decoding so far, less those for files: where files are late, decoding
        them shows as a wait too, and more decoders would not help. `None` before the first batch."""
        self._working: set[Helper] = set()
        self._coming: set[Helper] = set()

    @property
    def size(self) -> int:
        """Helpers at work."""
        return len(self._working)

    def watch(self, helpers: Helpers, own: int, stop: threading.Event, employ: Callable[[Helper, int], None]) -> None:
        """Until `stop`, hires whenever training has waited for its `own` decoders. `employ` starts a helper's `work`."""
        rank, before, then = 0, self.waited, self.size
        while not stop.wait(STRETCH_SECONDS):
            waited, size = self.waited, self.size
            share = (waited - before) / STRETCH_SECONDS if before is not None and waited is not None else 0.0
            changed = size != then  # what was measured no longer holds
            before, then = waited, size
            wanted = more_processes(own + size, share) - len(self._coming)
            if changed or share < NOTICEABLE or wanted <= 0:
                continue
            try:
                hired = helpers.hire(wanted, size, len(self._coming))
            except Exception as error:  # a cluster that does not answer is no reason to end a run
                logger.warning("no decoders could be had on other nodes: %s", error)
                continue
            self._coming.update(hired)
            for helper in hired:
                rank += 1
                employ(helper, rank)
        self.close()  # who was hired while others were let go

    def work(self, helper: Helper, rank: int, parts: Queue[T], do: Callable[[T], None], stop: threading.Event) -> None:
        """A helper's thread, from its coming to its going."""
        part = None
        try:
            helper.start()
            self._working.add(helper)
            self._coming.discard(helper)
            while (part := parts.take_elsewhere(rank, IDLE_SECONDS)) is not None:
                do(part)
        except Exception as error:
            if part is not None:
                parts.give_back(part)
            if not stop.is_set():
                what = str(error).partition("\n")[0] or type(error).__name__
                logger.warning("a decoder on another node is lost (its work is done here): %s", what)
        finally:
            self._coming.discard(helper)
            self._working.discard(helper)
            helper.close()

    def close(self) -> None:
        """Lets all go."""
        for helper in [*self._coming, *self._working]:
            helper.close()
