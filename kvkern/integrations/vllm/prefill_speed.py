"""How fast an engine computes prompts, by when its steps were scheduled and when their results came. Knows no vLLM.

    a step takes      from when it was scheduled, or the one before it ended if that is later, to its own end
    it counts         if it computes many tokens, and nearly all of them of prompts
    speed             the median of the steps that counted last; the first ones are the engine's warm-up

With asynchronous scheduling a step is scheduled while the one before it computes, the first two of a busy time at once:
the time between two schedules is no step's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

LEAST_TOKENS = 256  # of a step that counts
PROMPT_SHARE = 0.9  # of its tokens
WARM_UP_STEPS = 2  # that count for nothing: kernels are compiled, memory is touched for the first time
LEAST_STEPS, KEPT_STEPS = 3, 9  # of the median
MAX_UNDER_WAY = 64  # steps; an engine has one or two


class PrefillSpeed:
    """Of one engine. Steps end in the order in which they were scheduled. One thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._under_way: deque[tuple[float, int]] = deque()  # (when it was scheduled, tokens if it counts)
        self._ended_s = 0.0
        self._to_skip = WARM_UP_STEPS
        self._speeds: deque[float] = deque(maxlen=KEPT_STEPS)
        self.tokens_s = 0.0  # 0: not known yet

    def began(
        self,
        tokens: int,  # of the step; 0: it computes nothing
        prompt_tokens: int,  # of these
    ) -> None:
        """A step was scheduled."""
        if len(self._under_way) >= MAX_UNDER_WAY:
            self._under_way.clear()  # whose ends nobody has told
        counts = tokens >= LEAST_TOKENS and prompt_tokens >= PROMPT_SHARE * tokens
        self._under_way.append((self._clock(), tokens if counts else 0))

    def ended(self) -> None:
        """The results of the step that was scheduled first have come."""
        if not self._under_way:
            return
        (began_s, tokens), now_s = self._under_way.popleft(), self._clock()
        seconds, self._ended_s = now_s - max(began_s, self._ended_s), now_s
        if not tokens:
            return
        if self._to_skip:
            self._to_skip -= 1
            return
        self._speeds.append(tokens / max(seconds, 1e-6))
        if len(self._speeds) >= LEAST_STEPS:
            self.tokens_s = median(self._speeds)
