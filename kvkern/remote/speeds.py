"""What moving and computing costs here and now: whether a load is worth its wait, and what a write has to earn.

    load or recompute:   chunks * read_s(chunk) < LOAD_MARGIN * chunks * tokens(chunk) / prefill_tokens_s
    predicted:           policy.persist.Costs with the same figures

Seconds a chunk are smoothed over what was moved; large batches count more. Prefill speed is the engines' own word. What
has not been measured refuses nothing: the first load is the measurement. What was measured PROBE_S ago gives way at once
to what is faster, and what is too slow to pay is tried so often: a store that has hung is soon used again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..policy.persist import Costs

LOAD_MARGIN = 0.9
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 20.0  # for a load of unknown worth, and of any
PROBE_S, PROBE_CHUNKS = 10.0, 2  # a store that is too slow is measured anew so often, with so few
_MEMORY_CHUNKS = 64.0  # how many chunks the mean of seconds looks back on
_PREFILL_WEIGHT = 0.2
_AGE_WEIGHT = 0.05
FOREVER_S = 1e6  # residency until something that was written has been found gone


class Speeds:
    """Figures of one remote. Written by the tier's loop and `note_prefill`, read by anybody."""

    def __init__(self, slot_nbytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slot_nbytes, self._clock = slot_nbytes, clock
        self.read_s: float | None = None  # a chunk
        self.write_s: float | None = None
        self.prefill_tokens_s: float | None = None
        self.residency_s = FOREVER_S
        self._read_at = self._written_at = -PROBE_S

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
        if self.read_s is None or not chunk_tokens or self.prefill_tokens_s is None:
            return chunks
        if self.read_s < LOAD_MARGIN * chunk_tokens / self.prefill_tokens_s:
            return chunks
        return min(chunks, PROBE_CHUNKS) if self._is_old(self._read_at) else 0

    def patience_s(self, chunks: int, chunk_tokens: int) -> float:
        """How long a request may wait for so many: as long as computing them would take."""
        if not chunk_tokens or self.prefill_tokens_s is None:
            return FIRST_WAIT_S
        return min(chunks * chunk_tokens / self.prefill_tokens_s, LONGEST_WAIT_S)

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
