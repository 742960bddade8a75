"""The remote tier: chunks that DRAM lacks come from a store, and what DRAM has or evicts goes there, by write-behind.

    extend   what a lease lacks of a prefix:  known absent? -> exists -> worth it? -> windows: grant, get, verify, promote
    write    of the outbox the most worth:    exists -> put what is not there -> give the slots back

One thread with an event loop; stores are called there and nowhere else. How requests are served is fetch.py's. Slots under
a call are the call's until it returns, however long that takes. While the breaker is open nothing is asked and nothing
leaves.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..arena.file import Arena
from ..metrics import CacheCounters
from ..policy.base import Use
from ..policy.persist_modes import Persist
from ..tiers.base import Lease
from ..tiers.slot_headers import verify_slots
from .cache_side import CacheSide, FaultsAsMisses
from .circuit_breaker import CircuitBreaker
from .cost_model import CostModel
from .prefix_reader import PrefixReader
from .presence_cache import PresenceCache
from .store_calls import StoreCalls
from .store_thread import StoreThread
from .stores.base import RemoteError, RemoteStore
from .value_format import outgoing_parts
from .waiting_request import WaitingRequest
from .write_behind import NO_SLOT, PendingWrite, WriteBehind

WINDOW_S = 0.05  # what a call should take: a lease grows by so much at a time
FIRST_WINDOW_NBYTES, WINDOW_NBYTES = 32 << 20, (16 << 20, 256 << 20)  # of a call, before it is known and within limits
RETRY_S = 0.2


class RemoteTier:
    """`start`, then `extend` from any thread; `close` ends it."""

    def __init__(
        self,
        store: RemoteStore,
        name: str,  # for messages; no secrets
        arena: Arena,
        local: CacheSide,
        counters: CacheCounters,
        faults: FaultsAsMisses,
        mode: Persist,
        queue_nbytes: int,  # of what may wait to be written
        timeout_s: float,  # of a call
        opened: StoreThread | None = None,  # the store's thread, if it is open already; the tier's from `start` on
    ) -> None:
        self._store, self._name, self._arena, self._local = store, name, arena, local
        self._opened = opened or StoreThread(store)
        self._counters, self._faults = counters, faults
        geometry = arena.spec.geometry
        self.breaker = CircuitBreaker(name)
        self.speeds = CostModel(geometry.slot_nbytes)
        limit = max(1, queue_nbytes // geometry.slot_nbytes)
        self.spare = 0 if mode is Persist.HOT else min(limit, max(1, arena.spec.num_slots // 8))
        self.outbox = WriteBehind(
            arena, mode, limit, self.speeds, counters, self.breaker.allows, self._wake_writers
        )  # fmt: skip
        self._loop = self._opened.loop
        self._wake = asyncio.Event()
        self._woken = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls = StoreCalls(store, self.breaker, counters, timeout_s)
        self.known = PresenceCache(self.speeds)
        self.reader = PrefixReader(
            arena, local, self._calls, self.breaker.allows, self.speeds, self.known, counters, faults, self._window,
            lambda: self.outbox.chunk_tokens,
        )  # fmt: skip
        self._lock = threading.Lock()  # of `_closing`: what is given to the loop is there before the end of it
        self._closing = False
        self._writing = False  # set before chunks leave the outbox

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the store. Raises ConfigError for what the user has to mend; nobody there is a miss until somebody is."""
        self._opened.open()
        if self._opened.failure:
            self.breaker.trip(self._opened.failure)
        try:
            verify_slots(self._arena, np.zeros(1, dtype=np.int64))  # numba is loaded now, not while a request waits
            self._opened.run(self._register())
        except BaseException:
            self._opened.close()
            raise
        self._loop.call_soon_threadsafe(self._spawn, self._write())

    async def _register(self) -> None:
        try:
            await self._store.register(self._arena.bytes.data)
        except RemoteError as error:
            self.breaker.trip(error)

    def close(self, drain_s: float = 0.0) -> None:
        """Write what waits, for so long; then end calls under way and the thread."""
        if not self._opened.alive:
            return
        end = time.monotonic() + drain_s
        while not self.idle and not self.breaker.is_open and time.monotonic() < end:
            time.sleep(0.01)
        with self._lock:
            self._closing = self._calls.closed = True
        try:
            self._opened.run(self._finish())
        finally:
            self._opened.stop()

    def usage(self) -> dict[str, int | float | str]:
        """For operators: whether it works, what waits, and what moving a chunk has cost."""
        known = {
            "remote_read_ms_per_chunk": self.speeds.read_s and 1e3 * self.speeds.read_s,
            "remote_write_ms_per_chunk": self.speeds.write_s and 1e3 * self.speeds.write_s,
            "prefill_tokens_s": self.speeds.prefill_tokens_s,
        }
        return {
            "remote": self._name, "remote_works": int(not self.breaker.is_open), "remote_waiting_requests": self.reader.waiting,
            "remote_queue_chunks": len(self.outbox), **{name: value for name, value in known.items() if value is not None},
        }  # fmt: skip

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be written, and nothing is being written."""
        return not len(self.outbox) and not self._writing

    async def _finish(self) -> None:
        """Every call ends soon after its timeout: the memory is nobody's then."""
        self._wake.set()
        while self._tasks:
            await asyncio.wait(self._tasks)
        left = self.outbox.take(len(self.outbox))
        self.outbox.dropped(len(left))
        self._local.departed([entry.slot for entry in left if entry.slot != NO_SLOT])
        await self._close_store()

    async def _close_store(self) -> None:
        with self._faults.are_misses():
            await self._store.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def note_prefill(self, tokens_s: float) -> None:
        """An engine computes that fast."""
        self.speeds.note_prefill(tokens_s)

    # -- reading -------------------------------------------------------------------------------------------------------

    def extend(self, lease: Lease, keys: Sequence[bytes], prefix: bool, use: Use) -> Future[Lease]:
        """A lease of what this one has and the store adds to it. Done at once if that is sure to be nothing."""
        asked = WaitingRequest(list(keys), use, prefix, [lease])
        with self._lock:
            if not self._closing and self.reader.takes(asked):
                self._loop.call_soon_threadsafe(self._begin, asked)
                return asked.answer
        asked.reply()
        return asked.answer

    def _begin(self, asked: WaitingRequest) -> None:
        self._spawn(self.reader.serve(asked))

    # -- writing -------------------------------------------------------------------------------------------------------

    def _wake_writers(self) -> None:
        """From any thread, often."""
        with self._lock:
            if not self._woken and not self._closing:
                self._woken = True
                self._loop.call_soon_threadsafe(self._wake.set)

    async def _write(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            self._woken = False
            await self._write_all()

    async def _write_all(self) -> None:
        self._writing = True
        while not self._closing and (entries := self.outbox.take(self._window(self.speeds.write_s))):
            with self._faults.are_misses():
                await self._write_window(entries)
        self._writing = False

    async def _write_window(self, entries: list[PendingWrite]) -> None:
        """Write those that the store lacks, and give everything back."""
        lease = self._local.lease([entry.key for entry in entries if entry.slot == NO_SLOT], prefix=False)
        owned = {entry.key: entry.slot for entry in entries if entry.slot != NO_SLOT}
        slots = owned | dict(zip(lease.keys, lease.slots, strict=True))
        try:
            self.outbox.dropped(len(entries) - len(slots))  # evicted or cleared before their turn came
            keys = sorted(slots, key=lambda key: int(self._arena.headers["position"][slots[key]]))
            written = await self._put(keys, slots)
            self._counters.remote_written_chunks += written
        finally:
            self._local.departed(list(owned.values()))
            self._local.release(lease)

    async def _put(self, keys: list[bytes], slots: dict[bytes, int]) -> int:
        """How many were written. A call that fails is tried once more, a little later; a key that is not answered is not."""
        if not self.breaker.allows():
            self.outbox.dropped(len(keys))
            return 0
        for last in (False, True):
            try:
                there = await self._calls.exists(keys)
                missing = [
                    key for key, is_there in zip(keys, there, strict=True) if not is_there and is_there is not None
                ]
                written = await self._put_missing(missing, slots)
                self.outbox.dropped(there.count(None) + len(missing) - written)  # not answered, or no room
                return written
            except RemoteError:
                if last or self.breaker.is_open or self._closing:
                    break
                await asyncio.sleep(RETRY_S * (0.5 + random.random()))
        self.outbox.dropped(len(keys))
        return 0

    async def _put_missing(self, keys: list[bytes], slots: dict[bytes, int]) -> int:
        """How many of these the store has taken: those that it has said yes to."""
        if not keys:
            return 0
        began = time.monotonic()
        taken = await self._calls.put(keys, outgoing_parts(self._arena, [slots[key] for key in keys]))
        written = [key for key, ok in zip(keys, taken, strict=True) if ok]
        self.known.note_written(written)
        if written:
            self.speeds.note_write(len(written), time.monotonic() - began)
        return len(written)

    # -- what both do --------------------------------------------------------------------------------------------------

    def _window(
        self,
        chunk_s: float | None,  # what moving one has taken
    ) -> int:
        """Chunks of a call: as many as take WINDOW_S."""
        slot_nbytes = self._arena.spec.geometry.slot_nbytes
        least, most = (max(1, nbytes // slot_nbytes) for nbytes in WINDOW_NBYTES)
        wanted = FIRST_WINDOW_NBYTES // slot_nbytes if chunk_s is None else int(WINDOW_S / max(chunk_s, 1e-9))
        return min(max(wanted, least), most)
