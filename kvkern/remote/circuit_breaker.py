"""Keeps calls away from a store that fails. It opens after FAILURES failures in a row. Then it lets one trial call through at
a time, until one works.

    closed --FAILURES in a row--> open --pause--> one trial call --works--> closed
                                   ^---fails, the pause doubles---'

A call that was soon answered in part is neither a success nor a failure: it adds nothing to the row and does not end it.
If the trial call was answered in part, calls are let through again, and one more failure opens the breaker for the next,
doubled pause. Pauses are drawn between half and the whole, so that the nodes do not all come back to a store at once.
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
    """The breaker of one store. Call `allows_call` from any thread, and everything else on the tier's loop."""

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
        """True while the store fails. A trial call may be under way."""
        return self._until is not None

    def allows_call(self) -> bool:
        """Return True if a call may be made now. Changes nothing."""
        return self._until is None or (self._clock() >= self._until and not self._trying)

    def begin_call(self) -> bool:
        """Return True if the caller may call now; the caller then reports how the call went.

        While the breaker is open, only the first caller after the pause gets True.
        """
        if not self.allows_call():
            return False
        self._trying = self._until is not None
        return True

    def succeeded(self) -> None:
        """Report that a call has worked."""
        if self._until is not None:
            logger.warning("kvkern: remote %(remote)s works again", {"event": "remote_back", "remote": self._name})
        self._failures, self._pause_s, self._until, self._trying = 0, FIRST_PAUSE_S, None, False

    def partly_answered(self) -> None:
        """Report that a call was soon answered for some of its keys: one server of many has failed."""
        if self._trying:
            logger.warning(
                "kvkern: remote %(remote)s works again, but not for all keys: one of its servers fails. Check its servers",
                {"event": "remote_partly_back", "remote": self._name},
            )
            self._until, self._trying = None, False

    def failed(self, why: object) -> None:
        """Report that a call has failed. Logged once until a call works. While it is open, only the trial call counts."""
        if self._until is not None and not self._trying:
            return  # it began before the breaker opened: each such call would double the pause again
        self._failures += 1
        if self._until is None and self._failures < FAILURES:
            return
        if self._until is None:
            logger.warning(
                "kvkern: remote %(remote)s fails (%(error)s). Every lookup there is a miss until it works again. "
                "Check the store and the network",
                {"event": "remote_fails", "remote": self._name, "error": why},
            )
        self._trying = False
        self._until = self._clock() + self._pause_s * (1 + self._draw()) / 2
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def trip(self, why: object) -> None:
        """Open the breaker at once. Called if the store does not answer at the start."""
        self._failures = FAILURES
        self.failed(why)
