"""Reads from the store the part of a prefix that a request's lease lacks, as long as waiting is better than computing.

    admits   False if the store fails, is stalled, has just said that the next chunk is absent, or if asking takes too long
    serve    known absent? -> exists -> worth it? -> windows: grant, get, verify, promote
             before each step cost_model.py says how long the request waits for it; then it gets the chunks that have come

Reads that are under way at that time end in DRAM. A key that the store could not answer for ends the prefix. Nothing is
concluded from such a key: it is not absent, not gone, not spoiled. Used on the tier's loop; `admits` from any thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..arena.file import Arena
from ..arena.process_identity import process_start
from ..bounded_dict import BoundedDict
from ..metrics import CacheCounters, CountedRequests
from ..tiers.base import ChunkShape, Reservation, slot_array
from ..tiers.slot_headers import begin_slots
from ..tiers.slot_records import MAX_CHUNK_TOKENS
from .cache_interface import CacheSide, FaultsAsMisses
from .cost_model import CostModel, WaitLimit
from .presence_cache import PresenceCache
from .store_calls import StoreCalls
from .stores.base import Got, RemoteError
from .value_format import accept_values, allocate_headers, incoming_parts
from .waiting_request import WaitingRequest

logger = logging.getLogger("kvkern")

FIRST_ASKED, ASKED_TIMES = 16, 4  # chunks of a prefix in the first question, and its growth: some stores ask key by key
READS_AHEAD = 2  # windows of a request under way: one is verified, one is read. Stores have their own threads
MAX_WAITING = 256  # requests that wait for the store; further ones get only what DRAM has
MAX_NAMESPACES = 1024  # for which the tokens per chunk are remembered


class PrefixReader:
    """The reader of one store."""

    def __init__(
        self,
        arena: Arena,
        cache: CacheSide,
        calls: StoreCalls,
        store_works: Callable[[], bool],  # False: the breaker lets no call through
        costs: CostModel,
        presence: PresenceCache,
        counters: CacheCounters,
        faults: FaultsAsMisses,
        window_chunks: Callable[[float | None], int],  # seconds a chunk -> chunks of a call
        chunk_tokens: Callable[[], int],  # of the chunks an engine stored here last, in any namespace
    ) -> None:
        self._arena, self._cache, self._calls, self._store_works = arena, cache, calls, store_works
        self._costs, self._presence, self._counters, self._faults = costs, presence, counters, faults
        self._window_chunks, self._latest_chunk_tokens = window_chunks, chunk_tokens
        self._chunk_tokens: BoundedDict[bytes, int] = BoundedDict(MAX_NAMESPACES)  # by namespace, from values read
        self._owner = (os.getpid(), process_start(os.getpid()))
        self._being_read: dict[bytes, asyncio.Future[None]] = {}  # key -> the end of the window that reads it
        self._lock = threading.Lock()  # protects the lines below
        self._counted = CountedRequests()
        self.num_waiting = 0  # requests in `serve`; some may be answered already

    # -- a request -----------------------------------------------------------------------------------------------------

    def admits(self, request: WaitingRequest) -> bool:
        """Return True if `serve` must follow; the request counts as waiting then. Any thread. Makes no call to the store."""
        (lease,) = request.leases
        missing = len(request.keys) - len(lease.keys)
        if lease.slots:
            request.chunk_tokens = int(self._cache.records.rows["chunk_tokens"][lease.slots[0]])
        else:
            request.chunk_tokens = self._chunk_tokens.get(request.use.namespace) or self._latest_chunk_tokens()
        with self._lock:
            if not missing:
                return False
            new = request.num_new = min(missing, self._counted.num_new(request.use.request, request.keys))
            if not request.use.namespace or self.num_waiting >= MAX_WAITING:
                return self._refused(request, "unasked" if request.use.namespace else "not_found")
            self._counters.remote_lookup_chunks += new
            use = request.use
            self._cache.observer.looked_up("remote", use.namespace, use.client, new, 0, use.counts_tokens)
            if not self._store_works():
                return self._refused(request, "store_failed")
            if request.prefix and self._presence.is_absent(request.keys[len(lease.keys)]):
                return self._refused(request, "not_found")
            if self._calls.stalled or not self._costs.worth_asking(missing, request.chunk_tokens, request.use.client):
                self._counters.remote_unasked_chunks += new
                return self._refused(request, "unasked")
            self.num_waiting += 1
        return True

    def _refused(self, request: WaitingRequest, why: str) -> bool:
        self._cache.observer.not_loaded(why, request.use.request, request.num_new)
        return False

    async def serve(self, request: WaitingRequest) -> None:
        """Answer the request within its wait limits, with the chunks that have come by then."""
        try:
            with self._faults.are_misses():
                try:
                    await self._fetch(request, request.missing())
                except RemoteError as error:
                    request.why_not = "store_failed"
                    # `StoreCalls` has counted it, and the breaker logs it.
                    logger.debug(
                        "kvkern: a remote read failed: %(error)s", {"event": "remote_read_failed", "error": error}
                    )
        finally:
            with self._lock:
                self.num_waiting -= 1
            request.stop_timer()
            self._answer(request)

    def _answer(self, request: WaitingRequest) -> None:
        """Answer the request. Tell the observer what it has not got, and why."""
        request.reply()
        why = "late" if request.timed_out and request.why_not == "not_found" else request.why_not
        missing = max(0, request.num_new - request.num_answered)
        self._cache.observer.not_loaded(why, request.use.request, missing)

    async def _fetch(self, request: WaitingRequest, keys: list[bytes]) -> None:
        """Bring as many of `keys` as possible, in their order; with `prefix` without a gap."""
        while keys and request.is_waiting():
            if (coming := self._being_read.get(keys[0])) is not None:
                count = next((i for i, key in enumerate(keys) if self._being_read.get(key) is not coming), len(keys))
                request.wait_at_most(self._read_limit(request, count, len(keys)).request_s)
                if request.is_waiting():
                    await asyncio.wait([coming])
                if not request.is_waiting() or len(left := self._lease_cached(request, keys)) == len(keys):
                    return
                keys = left
                continue
            there = await self._find_present(request, keys)
            if not request.is_waiting():
                return
            left = self._lease_cached(request, keys)
            if len(left) < len(keys) or keys[0] in self._being_read:
                keys = left  # since this request asked, another one has read some of them, or reads them now
                continue
            mine = there[: next((i for i, key in enumerate(there) if key in self._being_read), len(there))]
            worth = self._costs.chunks_worth_reading(len(mine), request.chunk_tokens, request.use.client)
            self._counters.remote_gated_chunks += len(mine) - worth
            if worth < len(mine):
                request.why_not = "gated"
            if not worth or not await self._read_windows(request, mine[:worth]):
                return
            if worth == len(there) or worth < len(mine) or not request.prefix:
                return  # the store has no more, or the rest is not worth reading
            keys = keys[worth:]

    def _lease_cached(self, request: WaitingRequest, keys: list[bytes]) -> list[bytes]:
        """Lease chunks that other requests have brought meanwhile. Returns the keys that are still missing."""
        found = self._cache.lease(keys, request.prefix, hit=not request.use.counts_itself)
        if not found.keys:
            return keys
        request.leases.append(found)
        if not request.use.counts_itself:
            use = request.use
            self._cache.observer.looked_up("dram", use.namespace, use.client, 0, len(found.keys), use.counts_tokens)
        got = set(found.keys)
        return keys[len(found.keys) :] if request.prefix else [key for key in keys if key not in got]

    async def _find_present(self, request: WaitingRequest, keys: list[bytes]) -> list[bytes]:
        """Return the keys that the store has; with `prefix` those before the first gap."""
        if request.prefix:
            keys = keys[: next((i for i, key in enumerate(keys) if self._presence.is_absent(key)), len(keys))]
        if not keys:
            return []
        wait = self._costs.ask_limit(len(keys), request.chunk_tokens, request.use.client)
        request.wait_at_most(wait.request_s - request.question_s)
        began = time.monotonic()
        count = FIRST_ASKED if request.prefix else len(keys)
        there = list(await self._calls.exists(keys[:count], wait.stalled_after_s))
        while len(there) < len(keys) and all(there) and request.is_waiting():  # keys behind a gap need no answer
            count *= ASKED_TIMES
            stalled_after_s = max(0.0, wait.stalled_after_s - (time.monotonic() - began))
            there += await self._calls.exists(keys[len(there) : len(there) + count], stalled_after_s)
        request.question_s += (took_s := time.monotonic() - began)
        if None not in there:
            self._costs.note_ask(took_s)
        absent = next((i for i, is_there in enumerate(there) if not is_there and is_there is not None), None)
        if absent is not None:
            self._presence.note_absent(keys[absent])
        if request.prefix:
            return keys[: next((i for i, is_there in enumerate(there) if not is_there), len(there))]
        return [key for key, is_there in zip(keys, there, strict=True) if is_there]

    # -- its chunks ----------------------------------------------------------------------------------------------------

    async def _read_windows(self, request: WaitingRequest, keys: list[bytes]) -> bool:
        """Read `keys` window by window; one window is verified while the next is read. Returns True if all came."""
        began, at, whole = time.monotonic(), 0, True
        under_way: deque[tuple[list[bytes], asyncio.Task[Reservation], asyncio.Future[None]]] = deque()
        loop = asyncio.get_running_loop()
        try:
            while True:
                while whole and at < len(keys) and len(under_way) < READS_AHEAD and request.is_waiting():
                    usual, left = self._window_chunks(self._costs.read_s), len(keys) - at
                    window = keys[at : at + (left if 2 * left < 3 * usual else usual)]  # no small window at the end
                    wait = self._read_limit(request, len(window), len(keys) - at)
                    at += len(window)
                    over = loop.create_future()
                    self._being_read.update(dict.fromkeys(window, over))
                    task = loop.create_task(self._read_window(window, request, wait.stalled_after_s))
                    under_way.append((window, task, over))
                    if len(under_way) == 1:
                        request.wait_at_most(wait.request_s)
                if not under_way:
                    break
                window, task, _ = under_way[0]
                read = await task
                began = self._note_read(request, read, began)
                taken = self._publish(request, read, whole)
                whole = whole and (taken == len(window) or not request.prefix)
                self._end_window(*under_way.popleft())
                if not whole:
                    request.reply()  # the windows under way are behind a gap
                elif under_way and request.is_waiting():
                    left = len(keys) - at + sum(len(window) for window, _, _ in under_way)
                    request.wait_at_most(self._read_limit(request, len(under_way[0][0]), left).request_s)
        finally:
            for window, task, over in under_way:  # one has failed: give back the slots of the others
                await asyncio.wait([task])
                if task.exception() is None:
                    self._cache.give_back(task.result().slots)
                self._end_window(window, task, over)
        return whole and at == len(keys)

    def _read_limit(self, request: WaitingRequest, chunks: int, missing: int) -> WaitLimit:
        return self._costs.read_limit(chunks, missing, request.chunk_tokens, request.use.client)

    def _note_read(self, request: WaitingRequest, read: Reservation, began: float) -> float:
        """Note how long a window took. Returns the time at which the next window begins."""
        now = time.monotonic()
        if read.keys:
            self._costs.note_read(len(read.keys), now - began)
            request.chunk_tokens = min(int(self._arena.headers["chunk_tokens"][read.slots[0]]), MAX_CHUNK_TOKENS)
            self._chunk_tokens.put(request.use.namespace, request.chunk_tokens)
        return now

    def _publish(self, request: WaitingRequest, read: Reservation, whole: bool) -> int:
        """Publish a window. Returns how many chunks the request leases now; with `prefix` none behind a gap."""
        if not read.keys:
            return 0
        self._presence.note_found(read.keys)
        self._counters.remote_hit_chunks += len(read.keys)
        use = request.use
        self._cache.observer.looked_up("remote", use.namespace, use.client, 0, len(read.keys), use.counts_tokens)
        self._counters.remote_late_chunks += len(read.keys) * (not request.is_waiting())
        lease = self._cache.promote(
            read, request.use.namespace, request.use, whole and request.is_waiting(), request.prefix
        )
        if lease.keys:
            request.leases.append(lease)
        return len(lease.keys)

    def _end_window(self, window: list[bytes], task: asyncio.Task[Reservation], over: asyncio.Future[None]) -> None:
        """Tell the requests that wait for chunks of this window that it is over."""
        for key in window:
            if self._being_read.get(key) is over:
                del self._being_read[key]
        over.set_result(None)

    async def _read_window(self, keys: list[bytes], request: WaitingRequest, stalled_after_s: float) -> Reservation:
        """Read a window into granted slots and verify it. Returns the good chunks; the caller promotes or frees them."""
        granted = self._cache.grant(len(keys))
        keys = keys[: len(granted.slots)]
        if not keys:
            return Reservation((), (), ())
        good: list[int] = []
        try:
            shape = ChunkShape(request.use.namespace, 0, 0)  # the value brings group and tokens
            slots, under = slot_array(granted.slots), np.array(granted.generations, dtype=np.uint64)
            begin_slots(self._arena, slots, under, keys, shape, request.keys, self._owner)
            headers = allocate_headers(self._arena.spec.geometry, len(keys))
            into = incoming_parts(self._arena, headers, granted.slots)
            async with request.read_lock:
                got = await self._calls.get(keys, into, stalled_after_s)
            good = await self._verified(keys, request, slots, headers, list(got))
        finally:
            kept = set(good)
            self._cache.give_back([slot for row, slot in enumerate(granted.slots) if row not in kept])
        return Reservation(
            tuple(keys[row] for row in good), tuple(granted.slots[row] for row in good),
            tuple(granted.generations[row] for row in good), chain=tuple(request.keys),
        )  # fmt: skip

    async def _verified(
        self,
        keys: list[bytes],
        request: WaitingRequest,
        slots: npt.NDArray[np.int64],
        headers: npt.NDArray[np.uint8],
        got: list[Got],
    ) -> list[int]:
        """Return the rows that verify; with `prefix` those before the first bad one. Deletes spoiled values in the store."""
        hits = [row for row, outcome in enumerate(got) if outcome is Got.HIT]
        at = np.array(hits, dtype=np.int64)
        named = np.frombuffer(b"".join(keys), dtype="V32")
        fine = await asyncio.to_thread(
            accept_values, self._arena, headers[at], slots[at], named[at], request.use.namespace
        )
        good = [row for row, ok in zip(hits, fine.tolist(), strict=True) if ok]
        spoiled = [row for row, outcome in enumerate(got) if outcome is Got.WRONG_SIZE]
        spoiled += [row for row, ok in zip(hits, fine.tolist(), strict=True) if not ok]
        if Got.MISS in got:
            self._presence.note_absent(keys[got.index(Got.MISS)])  # the store may not have looked for keys behind it
        if spoiled:
            self._counters.remote_bad_chunks += len(spoiled)
            request.why_not = "failed_verification"
            logger.warning(
                "kvkern: %(chunks)d of %(all_chunks)d chunks from the remote store did not verify; they count as "
                "misses and are deleted there. If this goes on, check the store's disks, memory and network",
                {
                    "event": "remote_chunks_bad",
                    "chunks": len(spoiled),
                    "all_chunks": len(keys),
                    "request": request.use.request,
                },
            )  # fmt: skip
            await self._delete([keys[row] for row in spoiled])
        unbroken = next((count for count, row in enumerate(good) if count != row), len(good))
        return good[:unbroken] if request.prefix else good

    async def _delete(self, keys: list[bytes]) -> None:
        try:
            await self._calls.delete(keys)
        except RemoteError as error:
            logger.debug(  # the other chunks are good
                "kvkern: spoiled chunks stay in the remote store: %(error)s",
                {"event": "remote_not_deleted", "error": error},
            )
