"""Measures how fast an engine computes prompts, from the times at which steps are scheduled and end. Knows no vLLM.

    duration of a step  = its end - max(the time it was scheduled, the end of the step before it)
    a step counts       if it computes many tokens, and nearly all of them belong to prompts
    speed               = median of the last steps that counted; the first ones are the engine's warm-up and left out

With asynchronous scheduling a step is scheduled while the step before it computes, and the first two steps of a busy period
are scheduled at once. The time between two schedules is therefore not the duration of a step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

LEAST_TOKENS = 256  # a step with fewer tokens does not count
PROMPT_SHARE = 0.9  # a step with a lower share of prompt tokens does not count
WARM_UP_STEPS = 2  # left out: kernels are compiled, and memory is touched for the first time
LEAST_STEPS, KEPT_STEPS = 3, 9  # how many steps the median needs, and how many it covers
MAX_UNDER_WAY = 64  # steps; an engine has one or two


class PrefillSpeed:
    """The prefill speed of one engine. Steps end in the order in which they were scheduled. One thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._under_way: deque[tuple[float, int]] = (
            deque()
        )  # (time it was scheduled, its tokens, or 0 if it does not count)
        self._ended_s = 0.0
        self._to_skip = WARM_UP_STEPS
        self._speeds: deque[float] = deque(maxlen=KEPT_STEPS)
        self.tokens_per_s = 0.0  # 0: not known yet

    def step_scheduled(
        self,
        tokens: int,  # that the step computes; 0: it computes nothing
        prompt_tokens: int,  # those of them that belong to prompts
    ) -> None:
        """Note that a step was scheduled."""
        if len(self._under_way) >= MAX_UNDER_WAY:
            self._under_way.clear()  # their ends were never reported
        counts = tokens >= LEAST_TOKENS and prompt_tokens >= PROMPT_SHARE * tokens
        self._under_way.append((self._clock(), tokens if counts else 0))

    def step_ended(self) -> None:
        """Note that the oldest scheduled step has ended, and update the speed."""
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
            self.tokens_per_s = median(self._speeds)
