"""A daemon's sessions, measured: how long engines wait for answers, and what they say of their namespaces."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

from msgspec.structs import replace

from ...arena.file import Arena
from ...bounded_dict import BoundedDict
from ...cache.manager import Cache
from ...metrics import MAX_REQUESTS
from ...observability.daemon_meter import DaemonMeter
from ...policy.base import Use
from ...tiers.base import Lease, Reservation
from .quotas import Quotas
from .sessions import Session, Sessions


class ObservedSessions(Sessions):
    """`Sessions` that tell a meter of each request, in addition to what the cache tells it."""

    def __init__(self, cache: Cache, arena: Arena, quotas: Quotas, meter: DaemonMeter) -> None:
        super().__init__(cache, arena, quotas=quotas)
        self._meter, self._at_once = meter, meter.at_once
        self._first_chains: BoundedDict[int, bytes] = BoundedDict(MAX_REQUESTS)  # request -> see `_is_first_chain`
        meter.slot_nbytes = arena.spec.geometry.slot_nbytes

    def acquire_soon(
        self, session: Session, keys: Sequence[bytes], prefix: bool, use: Use | None = None
    ) -> Future[Lease]:
        """See Sessions. Measures the look-up, and the time until the lease is there."""
        began = time.perf_counter()
        if use is not None and not self._is_first_chain(use.request, keys):
            use = replace(use, counts_tokens=False)
        found = super().acquire_soon(session, keys, prefix, use)
        seconds = time.perf_counter() - began
        if found.done():
            self._at_once.observe(seconds)
        else:
            self._meter.before_wait.observe(seconds)
            found.add_done_callback(lambda _: self._meter.observe("acquire_seconds", time.perf_counter() - began))
        return found

    def _is_first_chain(self, request: int, keys: Sequence[bytes]) -> bool:
        """Return True if the request asks for the sequence that it asked for first, which holds all of its tokens.

        Engines ask for the sequence of the first KV group first. Those of other groups have the same tokens and other keys.
        """
        if not request or not keys:
            return True
        if (first := self._first_chains.get(request)) is None:
            self._first_chains.put(request, keys[0])
        return first is None or first == keys[0]

    def grant(self, session: Session, count: int) -> Reservation:
        """See Sessions. Counts the slots that were not granted."""
        granted = super().grant(session, count)
        if short := count - len(granted.slots):
            self._meter.add("ungranted_slots", short)
        return granted

    def publish(
        self,
        session: Session,
        namespace: bytes,
        slots: Sequence[int],
        generations: Sequence[int],
        keys: Sequence[bytes],
        chain: Sequence[bytes],
        use: Use | None = None,
    ) -> list[bool]:
        """See Sessions. Measures it."""
        began = time.perf_counter()
        done = super().publish(session, namespace, slots, generations, keys, chain, use)
        self._meter.observe("publish_seconds", time.perf_counter() - began)
        return done

    def describe(self, session: Session, root: bytes, fields: dict[str, str]) -> str:
        """See Sessions. The meter learns the namespace's model, tenant and tokens per chunk."""
        self._meter.describe(root, fields, session.number)
        return super().describe(session, root, fields)
