"""What moving and computing chunks costs at the moment: whether a load is worth its wait, and whether a write pays.

    compute(chunks)      chunks * tokens(chunk) / prefill_tokens_s
    ask or recompute:    ask_s < min(5 s, compute(missing) / 5)
    load or recompute:   chunks * read_s(chunk) < LOAD_MARGIN * compute(chunks)
    predicted:           Costs of policy/persist_modes.py with the same figures

    waits of a request   to ask:           min(max(0.05 s, 4 * ask_s), 5 s, compute(missing) / 5)
                         for a window:     min(max(0.05 s, 3 * chunks * read_s), compute(chunks), 20 s)
                         not measured yet: min(1 s, compute(missing) / 5 to ask, / 2 for a window)

A request waits for a window no longer than computing its chunks would take. Once it has waited in vain, it waits for
nothing more. So its answer comes at most one question and one window later than without a store.

Seconds per chunk are smoothed over the chunks that were moved; large batches count more. The engines report the prefill
speed. A client's own figure decides what its own requests wait for. So no client can make the store look worthless to others,
or worth any wait. The median over the clients stands for a client that has reported none, and decides on writes. A figure that
was never measured refuses nothing: the first load is the measurement. A figure older than PROBE_S is replaced at once by a
faster one. A step that is too slow to pay is tried again every PROBE_S, and no request waits for it. So a store that has hung
is soon used again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median_low
from typing import NamedTuple

from ..bounded_dict import BoundedDict
from ..policy.persist_modes import Costs

LOAD_MARGIN = 0.9
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 20.0  # before the first measurement; and at most, for anything
LEAST_WAIT_S = 0.05  # a shorter delay may be the fault of this machine as well as of the store
ASK_TIMES, ASK_SHARE, LONGEST_ASK_S = 4.0, 0.2, 5.0  # times ask_s; share of the time to compute; at most
READ_TIMES, FIRST_READ_SHARE = 3.0, 0.5  # times read_s; share of the time to compute, before read_s is known
PROBE_S, PROBE_CHUNKS = 10.0, 2  # how often a store that is too slow is measured anew, and with how many chunks
_MEMORY_CHUNKS = 64.0  # how many chunks the mean of seconds looks back on
_PREFILL_WEIGHT = 0.2
_ASK_WEIGHT = 0.1
_AGE_WEIGHT = 0.05
MAX_CLIENTS = 1024  # whose prefill speed is known
FOREVER_S = 1e6  # residency_s until a written chunk has been found gone


class WaitLimit(NamedTuple):
    """How long a call to the store may take."""

    request_s: float  # the request waits so long for it; 0: computing is faster
    stalled_after_s: float  # a call that takes longer marks the store as stalled, for every request


class CostModel:
    """Figures of one store. The tier's loop and `note_prefill` write them; any thread may read them."""

    def __init__(self, slot_nbytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slot_nbytes, self._clock = slot_nbytes, clock
        self.ask_s: float | None = None  # seconds for one question, for any number of chunks
        self.read_s: float | None = None  # seconds to read one chunk
        self.write_s: float | None = None
        self.prefill_tokens_s: float | None = None  # median over the clients
        self._speed_of: BoundedDict[int, float] = BoundedDict(MAX_CLIENTS)  # client -> prefill tokens/s
        self.residency_s = FOREVER_S
        self._asked_at = self._read_at = self._written_at = -PROBE_S
        self._ask_probed_at = self._read_probed_at = -PROBE_S  # only one request at a time measures

    def note_ask(self, seconds: float) -> None:
        """Note that one question took `seconds`."""
        known, old = self.ask_s, self._is_old(self._asked_at)
        self.ask_s = seconds if known is None or (old and seconds < known) else known + _ASK_WEIGHT * (seconds - known)
        self._asked_at = self._clock()

    def note_read(self, chunks: int, seconds: float) -> None:
        """Note that reading `chunks` took `seconds`."""
        self.read_s = _smooth(self.read_s, chunks, seconds, self._is_old(self._read_at))
        self._read_at = self._clock()

    def note_write(self, chunks: int, seconds: float) -> None:
        """Note that writing `chunks` took `seconds`."""
        self.write_s = _smooth(self.write_s, chunks, seconds, self._is_old(self._written_at))
        self._written_at = self._clock()

    def note_prefill(self, tokens_s: float, client: int = 0) -> None:
        """Note that an engine computes `tokens_s` prompt tokens per second. `client` is its number; 0: the only one."""
        if tokens_s > 0:
            known = self._speed_of.get(client)
            self._speed_of.put(client, tokens_s if known is None else known + _PREFILL_WEIGHT * (tokens_s - known))
            self.prefill_tokens_s = median_low(list(self._speed_of.values()))

    def forget_client(self, client: int) -> None:
        """Forget the prefill speed of a client that is gone."""
        if self._speed_of.pop(client, None) is not None:
            speeds = list(self._speed_of.values())
            self.prefill_tokens_s = median_low(speeds) if speeds else None

    def note_gone(self, age_s: float) -> None:
        """Note that the store has lost a chunk that was written `age_s` ago."""
        known = self.residency_s < FOREVER_S
        self.residency_s = self.residency_s + _AGE_WEIGHT * (age_s - self.residency_s) if known else age_s

    def note_still_there(self, age_s: float) -> None:
        """Note that the store still has a chunk written `age_s` ago. So an emptied store is trusted to keep chunks again."""
        self.residency_s += _AGE_WEIGHT * max(0.0, age_s - self.residency_s)

    def chunks_worth_reading(self, chunks: int, chunk_tokens: int, client: int = 0) -> int:
        """Return how many of `chunks` to read instead of computing them: all, a few to measure, or none."""
        if self._reading_pays(chunk_tokens, client):
            return chunks
        if not self._is_old(max(self._read_at, self._read_probed_at)):
            return 0
        self._read_probed_at = self._clock()
        return min(chunks, PROBE_CHUNKS)

    def worth_asking(self, chunks: int, chunk_tokens: int, client: int = 0) -> bool:
        """Return True if kvkern should ask for `chunks`: the question is cheap as far as known, or it has to be measured."""
        if self.ask_limit(chunks, chunk_tokens, client).request_s > 0:
            return True
        if not self._is_old(max(self._asked_at, self._ask_probed_at)):
            return False
        self._ask_probed_at = self._clock()
        return True

    def ask_limit(self, chunks: int, chunk_tokens: int, client: int = 0) -> WaitLimit:
        """Return the wait limit of a question for `chunks`."""
        compute_s = self._compute_s(chunks, chunk_tokens, client)
        most_s = LONGEST_ASK_S if compute_s is None else min(ASK_SHARE * compute_s, LONGEST_ASK_S)
        if self.ask_s is None:
            request_s = min(FIRST_WAIT_S, most_s)
            return WaitLimit(request_s, max(LEAST_WAIT_S, request_s))
        usual_s = max(LEAST_WAIT_S, min(ASK_TIMES * self.ask_s, LONGEST_WAIT_S))
        return WaitLimit(min(usual_s, most_s) if self.ask_s < most_s else 0.0, usual_s)

    def read_limit(self, chunks: int, missing: int, chunk_tokens: int, client: int = 0) -> WaitLimit:
        """Return the wait limit of a window of `chunks`, of a prefix that lacks `missing` chunks."""
        if self.read_s is None:
            compute_s = self._compute_s(missing, chunk_tokens, client)
            request_s = FIRST_WAIT_S if compute_s is None else min(FIRST_WAIT_S, FIRST_READ_SHARE * compute_s)
            return WaitLimit(request_s, max(LEAST_WAIT_S, request_s))
        compute_s = self._compute_s(chunks, chunk_tokens, client)
        most_s = LONGEST_WAIT_S if compute_s is None else min(compute_s, LONGEST_WAIT_S)
        usual_s = max(LEAST_WAIT_S, min(READ_TIMES * chunks * self.read_s, LONGEST_WAIT_S))
        return WaitLimit(min(usual_s, most_s) if self._reading_pays(chunk_tokens, client) else 0.0, usual_s)

    def _compute_s(self, chunks: int, chunk_tokens: int, client: int) -> float | None:
        tokens_s = self._speed_of.get(client) or self.prefill_tokens_s
        return chunks * chunk_tokens / tokens_s if chunk_tokens and tokens_s else None

    def _reading_pays(self, chunk_tokens: int, client: int) -> bool:
        compute_s = self._compute_s(1, chunk_tokens, client)
        return self.read_s is None or compute_s is None or self.read_s < LOAD_MARGIN * compute_s

    def write_probe_is_due(self) -> bool:
        """Return True if the last write is so old that a new one should measure whether writing pays."""
        return self._is_old(self._written_at)

    def write_threshold(self, chunk_tokens: int, as_if_fast: bool = False) -> float:
        """Return the least probability of use at which a write pays (`Persist.PREDICTED`).

        With `as_if_fast` the store's measured speeds are left out, and the defaults of `Costs` count.
        """
        defaults = Costs()
        token_nbytes = self._slot_nbytes // chunk_tokens if chunk_tokens else defaults.token_nbytes
        return Costs(
            token_nbytes=token_nbytes,
            prefill_tokens_s=self.prefill_tokens_s or defaults.prefill_tokens_s,
            write_nbytes_s=self._slot_nbytes / self.write_s
            if self.write_s and not as_if_fast
            else defaults.write_nbytes_s,
            read_nbytes_s=self._slot_nbytes / self.read_s if self.read_s and not as_if_fast else defaults.read_nbytes_s,
        ).threshold

    def _is_old(self, at: float) -> bool:
        return self._clock() - at >= PROBE_S


def _smooth(mean_s: float | None, chunks: int, seconds: float, old: bool) -> float:
    each_s = seconds / max(chunks, 1)
    if mean_s is None or (old and each_s < mean_s):
        return each_s
    return mean_s + chunks / (chunks + _MEMORY_CHUNKS) * (each_s - mean_s)
