"""A live line on the driver's console, read from the run's own metrics: it needs no channel to the workers."""

import json
import sys
import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from msclip import metrics_log
from msclip.storage import Folder
from msclip.timing import bottleneck
from msclip.training import WAITING

POLL_SECONDS = {True: 0.5, False: 10.0}  # local, remote


class Progress:
    """Shows step, loss, speed and data wait while the body runs; plain lines where there is no terminal."""

    def __init__(self, run: Folder, total_steps: int, line_seconds: float = 10.0):
        self.run, self.total_steps, self.line_seconds = run, total_steps, line_seconds
        self.stop = threading.Event()
        self.terminal = sys.stdout.isatty()
        self.printed = (0, 0.0)
        self.since, self.patience = time.time(), 60.0
        self.told = self.since
        self.bar = Bar(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=Console(),
        )
        self.task = self.bar.add_task("starting workers", total=total_steps)
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        if self.terminal:
            self.bar.start()
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop.set()
        self.thread.join()
        self._show(final=True)
        if self.terminal:
            self.bar.stop()

    def _watch(self) -> None:
        while not self.stop.wait(POLL_SECONDS[self.run.local is not None]):
            self._show()

    def _say_waiting(self) -> None:
        waited = time.time() - self.since
        if waited > self.patience:
            print(f"no step yet after {waited:.0f} s: workers start, or wait for CPUs, GPUs or data", flush=True)
            self.patience *= 2

    def _say_why(self, last: dict[str, Any] | None) -> None:
        """Passes on what a worker has told since the last step, once."""
        if not self.run.exists(WAITING):
            return
        note = json.loads(self.run.read_text(WAITING))
        if note["time"] > max(self.told, last["time"] if last else 0.0):
            self.told = note["time"]
            print(note["text"], flush=True)

    def _show(self, final: bool = False) -> None:
        try:
            last = metrics_log.newest(self.run)
            self._say_why(last)
        except OSError:
            return  # the storage may be slow to answer; the next look will do
        if last is None or last["time"] < self.since:  # of an earlier start
            self._say_waiting()
            return
        text = (
            f"epoch {last['epoch']:.1f}  loss {last['train/loss']:.3f}  "
            f"accuracy {last['train/image_to_text_accuracy']:.1%}/{last['train/text_to_image_accuracy']:.1%}  "
            f"temperature {last['train/temperature']:.1f}  {last['train/pairs_per_second']:,.0f} pairs/s  "
            f"data wait {last['train/data_wait']:.0%}  {bottleneck(last)}"
        )
        if last["train/bad_rows"]:
            text += f"  bad rows {last['train/bad_rows']:,}"
        if self.terminal:
            self.bar.update(self.task, completed=last["step"], description=text)
            return
        step, printed_at = self.printed
        if last["step"] != step and (final or time.monotonic() - printed_at >= self.line_seconds):
            print(f"step {last['step']:,}/{self.total_steps:,}  {text}", flush=True)
            self.printed = (last["step"], time.monotonic())
