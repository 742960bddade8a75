"""How many chunks of the arena each namespace has, counted a slice of the slots at a time, so that no call takes long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

SLICE = 4096  # slots; about 1 ms


class NamespaceSizes:
    """Call `step` regularly. An arena of up to SLICE slots is counted at once, a larger one in several steps."""

    def __init__(self) -> None:
        self.chunks: Counter[bytes] = Counter()  # by root; of the last complete count
        self._counting: Counter[bytes] = Counter()
        self._next = 0

    def step(
        self,
        slots: int,
        namespaces_of: Callable[[range], Iterable[bytes]],  # of the READY chunks in these slots
    ) -> None:
        """Count the next slice."""
        part = range(self._next, min(slots, self._next + SLICE))
        self._counting.update(namespaces_of(part))
        self._next = part.stop
        if self._next >= slots:
            self.chunks, self._counting, self._next = self._counting, Counter(), 0

    def reset(self) -> None:
        """There is another arena, or none."""
        self.chunks, self._counting, self._next = Counter(), Counter(), 0
