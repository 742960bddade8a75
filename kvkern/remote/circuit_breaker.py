"""Keeps calls from a store that fails: open after failures in a row, then one trial now and then until it works again.

    closed --FAILURES in a row--> open --pause--> one call tries --works--> closed
                                   ^---fails, the pause doubles---'

A call that was answered in part, soon, is neither: it adds nothing to the row and does not end it. If it was the one that
tried, the store is asked again, and one failure more opens it for as long as the next pause would have been.
Pauses are drawn between half and the whole, so that nodes do not come back to a store all at once.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

logger = logging.getLogger("kvkern")

FAILURES = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class CircuitBreaker:
    """Of one store. Thread-safe as far as `allows` goes; the rest is the tier's loop's."""

    def __init__(
        self, name: str, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random
    ) -> None:
        self._name, self._clock, self._draw = name, clock, draw
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._until: float | None = None  # open until then; None: closed
        self._trying = False

    @property
    def is_open(self) -> bool:
        """Whether calls fail; one of them may be a trial."""
        return self._until is not None

    def allows(self) -> bool:
        """Whether a call would be made now. Changes nothing."""
        return self._until is None or (self._clock() >= self._until and not self._trying)

    def begin(self) -> bool:
        """Whether the caller may call now, and then says how it went: of those that wait for an open one the first."""
        if not self.allows():
            return False
        self._trying = self._until is not None
        return True

    def succeeded(self) -> None:
        """A call has worked."""
        if self._until is not None:
            logger.warning("kvkern: remote %s works again", self._name)
        self._failures, self._pause_s, self._until, self._trying = 0, FIRST_PAUSE_S, None, False

    def partly(self) -> None:
        """A call was answered for some of its keys, soon: one server of many has failed."""
        if self._trying:
            logger.warning("kvkern: remote %s works again, in part", self._name)
            self._until, self._trying = None, False

    def failed(self, why: object) -> None:
        """A call has not. Said once until it works again. While it is open only the one that tries counts."""
        if self._until is not None and not self._trying:
            return  # begun before: as many as there were would double the pause as often
        self._failures += 1
        if self._until is None and self._failures < FAILURES:
            return
        if self._until is None:
            logger.warning(
                "kvkern: remote %s fails (%s); until it works again everything there is a miss", self._name, why
            )
        self._trying = False
        self._until = self._clock() + self._pause_s * (1 + self._draw()) / 2
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def trip(self, why: object) -> None:
        """It fails, without a doubt: nobody has answered at the start."""
        self._failures = FAILURES
        self.failed(why)
