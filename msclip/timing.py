"""Where the time of a training step goes, and what to do about it.

Storage, decode and queue are what the loop waited for (`msclip.data.loader.Waits`). Copy is the batch's way to the GPU.
Communication is what `msclip.distributed` exchanges, with the wait for slower workers in it. Compute is the rest of the step:
it also holds what cannot be told apart from outside, DeepSpeed's reductions, most of which run while the backward pass does.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

PARTS = ("storage", "decode", "queue", "copy", "communication", "compute")
"""Of a step, as `train/storage_seconds` and so on: means over the steps since the last record, which add up to a step."""
NOTICEABLE = 0.05
"""Share of a step from which waiting for data is called the bottleneck."""

_events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=1000)  # if nobody reads them
_seconds = dict.fromkeys(("copy", "communication"), 0.0)


@contextmanager
def measured(part: str, device: torch.device) -> Iterator[None]:
    """Adds what is done inside to a part of the step; on a GPU by its own clock, without waiting for it."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        _events.append((part, begin, end))
    else:
        began = time.perf_counter()
        yield
        _seconds[part] += time.perf_counter() - began


def take_measured() -> dict[str, float]:
    """Seconds of each measured part since the last call; what a GPU has not done yet is left for the next."""
    while _events and _events[0][2].query():
        part, begin, end = _events.popleft()
        _seconds[part] += begin.elapsed_time(end) / 1000
    taken = dict(_seconds)
    _seconds.update(dict.fromkeys(_seconds, 0.0))
    return taken


def more_processes(processes: int, waited: float) -> int:
    """How many more decoding processes would end a wait for decoding of this share of the time."""
    return math.ceil(processes * waited / (1 - waited)) if waited < 1 else processes


def bottleneck(record: Mapping[str, float]) -> str:
    """The part that a record's steps would gain most from, in words; empty where the record does not tell."""
    parts = {part: record.get(f"train/{part}_seconds", 0.0) for part in PARTS}
    total = sum(parts.values())
    if not total:
        return ""
    share = {part: seconds / total for part, seconds in parts.items()}
    if share["storage"] + share["decode"] + share["queue"] < NOTICEABLE:
        largest = max(("copy", "communication", "compute"), key=lambda part: share[part])
        return f"{largest} {share[largest]:.0%}"
    largest = max(("storage", "decode", "queue"), key=lambda part: share[part])
    text = f"{largest} {share[largest]:.0%}"
    if largest == "decode":
        text += f": {record.get('train/decode_processes_lacking', 0):,.0f} more decode CPUs would remove it"
    return text
