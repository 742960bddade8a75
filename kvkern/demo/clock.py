"""Prints the demo's lines with the seconds since its start, and a line of its own where nothing else was printed for a while.

Knows time and a terminal; knows nothing of what is measured.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console

SILENCE_S = 12.0  # longest silence


class PhaseClock:
    """Use it in a `with` block: then a thread breaks silences."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started_s = self._said_s = time.monotonic()
        self._doing = "still working"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._break_silences, name="progress", daemon=True)

    def __enter__(self) -> PhaseClock:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def say(self, text: str) -> None:
        self._said_s = time.monotonic()
        self.console.print(f"[dim]\\[{self.elapsed_s():5.0f} s][/dim] {text}", highlight=False, soft_wrap=True)

    def now(self, doing: str) -> None:
        """Say this at the next silence."""
        self._doing = doing

    def fail(self, failure: Exception) -> None:
        self.console.print(f"kvkern demo: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)

    def _break_silences(self) -> None:
        while not self._ended.wait(max(0.05, self._said_s + SILENCE_S - time.monotonic())):
            if time.monotonic() - self._said_s >= SILENCE_S:
                self.say(f"  {self._doing}")
