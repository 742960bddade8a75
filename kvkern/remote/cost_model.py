"""What moving and computing costs here and now: whether a load is worth its wait, and what a write has to earn.

    compute(chunks)      chunks * tokens(chunk) / prefill_tokens_s
    ask or recompute:    ask_s < min(5 s, compute(missing) / 5)
    load or recompute:   chunks * read_s(chunk) < LOAD_MARGIN * compute(chunks)
    predicted:           policy.persist.Costs with the same figures

    waits of a request   to ask:           min(max(0.05 s, 4 * ask_s), 5 s, compute(missing) / 5)
                         for a window:     min(max(0.05 s, 3 * chunks * read_s), compute(chunks), 20 s)
                         not measured yet: min(1 s, compute(missing) / 5 to ask, / 2 for a window)

So it waits for a window no longer than computing that would take, and once it has waited in vain it waits for nothing
more: its answer comes at most one question and one window later than without a store.

Seconds a chunk are smoothed over what was moved; large batches count more. Prefill speed is the engines' own word. What
has not been measured refuses nothing: the first load is the measurement. What was measured PROBE_S ago gives way at once
to what is faster, and what is too slow to pay is tried so often, with nobody waiting for it: a store that has hung is
soon used again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from ..policy.persist_modes import Costs

LOAD_MARGIN = 0.9
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 20.0  # for what was never measured, and for anything
LEAST_WAIT_S = 0.05  # for what is fast as a rule: less than this is the machine's doing as likely as the store's
ASK_TIMES, ASK_SHARE, LONGEST_ASK_S = 4.0, 0.2, 5.0  # of what asking takes; of what computing takes
READ_TIMES, FIRST_READ_SHARE = 3.0, 0.5  # of what reading takes; of what computing takes, before that is known
PROBE_S, PROBE_CHUNKS = 10.0, 2  # a store that is too slow is measured anew so often, with so few
_MEMORY_CHUNKS = 64.0  # how many chunks the mean of seconds looks back on
_PREFILL_WEIGHT = 0.2
_ASK_WEIGHT = 0.1
_AGE_WEIGHT = 0.05
FOREVER_S = 1e6  # residency until something that was written has been found gone


class WaitLimit(NamedTuple):
    """What a call to the store is given."""

    request_s: float  # so long a request waits for it; 0: computing is faster
    late_s: float  # from then on the store is held to be stalled, whoever asked


class CostModel:
    """Figures of one remote. Written by the tier's loop and `note_prefill`, read by anybody."""

    def __init__(self, slot_nbytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slot_nbytes, self._clock = slot_nbytes, clock
        self.ask_s: float | None = None  # a question, of however many chunks
        self.read_s: float | None = None  # a chunk
        self.write_s: float | None = None
        self.prefill_tokens_s: float | None = None
        self.residency_s = FOREVER_S
        self._asked_at = self._read_at = self._written_at = -PROBE_S
        self._ask_probed_at = self._read_probed_at = -PROBE_S  # one at a time, however many requests there are

    def note_ask(self, seconds: float) -> None:
        """So long it took to learn what is there."""
        known, old = self.ask_s, self._is_old(self._asked_at)
        self.ask_s = seconds if known is None or (old and seconds < known) else known + _ASK_WEIGHT * (seconds - known)
        self._asked_at = self._clock()

    def note_read(self, chunks: int, seconds: float) -> None:
        """So many chunks came in that time."""
        self.read_s = _smooth(self.read_s, chunks, seconds, self._is_old(self._read_at))
        self._read_at = self._clock()

    def note_write(self, chunks: int, seconds: float) -> None:
        """Likewise."""
        self.write_s = _smooth(self.write_s, chunks, seconds, self._is_old(self._written_at))
        self._written_at = self._clock()

    def note_prefill(self, tokens_s: float) -> None:
        """An engine computes that fast."""
        if tokens_s > 0:
            known = self.prefill_tokens_s
            self.prefill_tokens_s = tokens_s if known is None else known + _PREFILL_WEIGHT * (tokens_s - known)

    def note_gone(self, age_s: float) -> None:
        """What was written so long ago is not there any more."""
        known = self.residency_s < FOREVER_S
        self.residency_s = self.residency_s + _AGE_WEIGHT * (age_s - self.residency_s) if known else age_s

    def note_there(self, age_s: float) -> None:
        """What was written so long ago is there still: a store that was emptied once keeps things again."""
        self.residency_s += _AGE_WEIGHT * max(0.0, age_s - self.residency_s)

    def worth(self, chunks: int, chunk_tokens: int) -> int:
        """How many of these chunks to load rather than compute: all, few to measure, or none."""
        if self._pays(chunk_tokens):
            return chunks
        if not self._is_old(max(self._read_at, self._read_probed_at)):
            return 0
        self._read_probed_at = self._clock()
        return min(chunks, PROBE_CHUNKS)

    def asks(self, chunks: int, chunk_tokens: int) -> bool:
        """Whether to ask for so many: it costs little, as far as that is known, or it is time to measure it anew."""
        if self.ask_wait(chunks, chunk_tokens).request_s > 0:
            return True
        if not self._is_old(max(self._asked_at, self._ask_probed_at)):
            return False
        self._ask_probed_at = self._clock()
        return True

    def ask_wait(self, chunks: int, chunk_tokens: int) -> WaitLimit:
        """For a question about so many."""
        compute_s = self._compute_s(chunks, chunk_tokens)
        most_s = LONGEST_ASK_S if compute_s is None else min(ASK_SHARE * compute_s, LONGEST_ASK_S)
        if self.ask_s is None:
            request_s = min(FIRST_WAIT_S, most_s)
            return WaitLimit(request_s, max(LEAST_WAIT_S, request_s))
        usual_s = max(LEAST_WAIT_S, min(ASK_TIMES * self.ask_s, LONGEST_WAIT_S))
        return WaitLimit(min(usual_s, most_s) if self.ask_s < most_s else 0.0, usual_s)

    def read_wait(self, chunks: int, missing: int, chunk_tokens: int) -> WaitLimit:
        """For a window of so many, of a prefix that lacks `missing`."""
        if self.read_s is None:
            compute_s = self._compute_s(missing, chunk_tokens)
            request_s = FIRST_WAIT_S if compute_s is None else min(FIRST_WAIT_S, FIRST_READ_SHARE * compute_s)
            return WaitLimit(request_s, max(LEAST_WAIT_S, request_s))
        compute_s = self._compute_s(chunks, chunk_tokens)
        most_s = LONGEST_WAIT_S if compute_s is None else min(compute_s, LONGEST_WAIT_S)
        usual_s = max(LEAST_WAIT_S, min(READ_TIMES * chunks * self.read_s, LONGEST_WAIT_S))
        return WaitLimit(min(usual_s, most_s) if self._pays(chunk_tokens) else 0.0, usual_s)

    def _compute_s(self, chunks: int, chunk_tokens: int) -> float | None:
        return chunks * chunk_tokens / self.prefill_tokens_s if chunk_tokens and self.prefill_tokens_s else None

    def _pays(self, chunk_tokens: int) -> bool:
        compute_s = self._compute_s(1, chunk_tokens)
        return self.read_s is None or compute_s is None or self.read_s < LOAD_MARGIN * compute_s

    def probes_write(self) -> bool:
        """Whether it is time to find out if writing is still too slow to pay."""
        return self._is_old(self._written_at)

    def threshold(self, chunk_tokens: int, hoped: bool = False) -> float:
        """Of `Persist.PREDICTED`: the probability of use from which on a write pays, or would if the store were fast."""
        defaults = Costs()
        token_nbytes = self._slot_nbytes // chunk_tokens if chunk_tokens else defaults.token_nbytes
        return Costs(
            token_nbytes=token_nbytes,
            prefill_tokens_s=self.prefill_tokens_s or defaults.prefill_tokens_s,
            write_nbytes_s=self._slot_nbytes / self.write_s if self.write_s and not hoped else defaults.write_nbytes_s,
            read_nbytes_s=self._slot_nbytes / self.read_s if self.read_s and not hoped else defaults.read_nbytes_s,
        ).threshold

    def _is_old(self, at: float) -> bool:
        return self._clock() - at >= PROBE_S


def _smooth(mean_s: float | None, chunks: int, seconds: float, old: bool) -> float:
    each_s = seconds / max(chunks, 1)
    if mean_s is None or (old and each_s < mean_s):
        return each_s
    return mean_s + chunks / (chunks + _MEMORY_CHUNKS) * (each_s - mean_s)
