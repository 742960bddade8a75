"""Drives a production policy with a trace, as a tier would.

hits       length of the resident prefix, counted before the request changes anything
access     the whole chain
insert     the chunks that are not resident
victims    as many chunks as are over capacity, at the request's end; they may include chunks just inserted
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import compress
from operator import not_

from ..policy.base import EvictionPolicy, Stop, Use
from .trace import Trace

REPORT_EVERY = 500  # requests

Progress = Callable[[int], object]  # called with the number of requests done since the last call


def trace_requests(trace: Trace, hints: bool, progress: Progress) -> Iterator[tuple[list[bytes], Use]]:
    """Yield (chain, use) of each request. Without `hints`, `use` has no session and no stop reason."""
    stops = list(Stop)
    begin = 0
    for number, (end, now_s, output_tokens, stop, session) in enumerate(
        zip(
            trace.ends.tolist(), trace.times_s.tolist(), trace.output_tokens.tolist(), trace.stops.tolist(),
            trace.sessions.tolist(), strict=True,
        ),
        1,
    ):  # fmt: skip
        chain = list(map(trace.keys.__getitem__, trace.chunks[begin:end].tolist()))
        begin = end
        if hints:
            yield chain, Use(now_s, number, b"", output_tokens, stops[stop], session)
        else:
            yield chain, Use(now_s, number, b"", output_tokens)
        if number % REPORT_EVERY == 0:
            progress(REPORT_EVERY)
    progress(len(trace) % REPORT_EVERY)


def replay(
    trace: Trace,
    policy: EvictionPolicy,
    capacity: int,  # chunks
    hints: bool = True,
    progress: Progress = lambda done: None,
) -> int:
    """Replay a trace through a new policy of the same capacity. Returns the number of chunks that hit."""
    resident: set[bytes] = set()
    hits = 0
    for chain, use in trace_requests(trace, hints, progress):
        held = list(map(resident.__contains__, chain))
        policy.access(chain, use)
        if all(held):
            hits += len(chain)
            continue
        hits += held.index(False)
        missing = list(dict.fromkeys(compress(chain, map(not_, held))))
        policy.insert(missing, use)
        resident.update(missing)
        over = len(resident) - capacity
        if over > 0:
            resident.difference_update(policy.victims(over))
    return hits
