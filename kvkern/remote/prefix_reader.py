"""What a request gets from the store: what its lease lacks of a prefix, as long as waiting for it is better than computing.

    takes    nothing is asked: the store fails, leaves others waiting, has just said no, or asking takes too long
    serve    known absent? -> exists -> worth it? -> windows: grant, get, verify, promote
             before each step the request says how long it waits for it (speeds.py); that over, it gets what has come

What is still being read then ends in DRAM. A key that the store could not answer for ends the prefix, and nothing is
concluded from it: it is not absent, not gone, not spoiled. Of the tier's loop, but for `takes`.
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
from ..metrics import CacheCounters
from ..tiers.base import ChunkShape, Reservation
from ..tiers.slot_headers import begin_slots
from .cache_side import CacheSide, FaultsAsMisses
from .cost_model import CostModel, WaitLimit
from .presence_cache import PresenceCache
from .store_calls import StoreCalls
from .stores.base import Got, RemoteError
from .value_format import accept, incoming_parts, new_headers
from .waiting_request import WaitingRequest

logger = logging.getLogger("kvkern")

FIRST_ASKED, ASKED_TIMES = 16, 4  # chunks of a prefix in the first call, and how that grows: some stores ask one by one
READS_AHEAD = 2  # windows of a request under way: one is verified, one is read. Stores have threads of their own
MAX_WAITING = 256  # requests that wait for the store; more are answered with what DRAM has
MAX_NAMESPACES = 1024  # whose tokens a chunk are known


class PrefixReader:
    """Of one store."""

    def __init__(
        self,
        arena: Arena,
        local: CacheSide,
        calls: StoreCalls,
        works: Callable[[], bool],  # whether the breaker lets a call through
        speeds: CostModel,
        known: PresenceCache,
        counters: CacheCounters,
        faults: FaultsAsMisses,
        window: Callable[[float | None], int],  # seconds a chunk -> chunks of a call
        chunk_tokens: Callable[[], int],  # of what an engine has stored here lately, of whatever namespace
    ) -> None:
        self._arena, self._local, self._calls, self._works = arena, local, calls, works
        self._speeds, self._known, self._counters, self._faults = speeds, known, counters, faults
        self._window, self._any_tokens = window, chunk_tokens
        self._tokens: BoundedDict[bytes, int] = BoundedDict(MAX_NAMESPACES)  # namespace -> tokens of a chunk, as read
        self._owner = (os.getpid(), process_start(os.getpid()))
        self._coming: dict[bytes, asyncio.Future[None]] = {}  # chunks that are being read
        self._lock = threading.Lock()  # of what follows
        self.waiting = 0  # requests that are served; some have been answered

    # -- a request -----------------------------------------------------------------------------------------------------

    def takes(self, asked: WaitingRequest) -> bool:
        """Whether to `serve` it: then it counts as waiting. From any thread; asks nobody."""
        (lease,) = asked.held
        missing = len(asked.keys) - len(lease.keys)
        if lease.slots:
            asked.chunk_tokens = int(self._arena.headers["chunk_tokens"][lease.slots[0]])
        else:
            asked.chunk_tokens = self._tokens.get(asked.use.namespace) or self._any_tokens()
        with self._lock:
            if not missing or not asked.use.namespace or self.waiting >= MAX_WAITING:
                return False
            self._counters.remote_lookup_chunks += missing
            if not self._works() or (asked.prefix and self._known.is_absent(asked.keys[len(lease.keys)])):
                return False
            if self._calls.stalled or not self._speeds.asks(missing, asked.chunk_tokens):
                self._counters.remote_unasked_chunks += missing
                return False
            self.waiting += 1
        return True

    async def serve(self, asked: WaitingRequest) -> None:
        """Answer it, soon, with what there is by then."""
        try:
            with self._faults.are_misses():
                try:
                    await self._fetch(asked, asked.missing())
                except RemoteError as error:
                    logger.debug("kvkern: a remote read failed: %s", error)  # counted and told by `StoreCalls`
        finally:
            with self._lock:
                self.waiting -= 1
            asked.rest()
            asked.reply()

    async def _fetch(self, asked: WaitingRequest, keys: list[bytes]) -> None:
        """Take in as many of `keys` as can be had, in their order; with `prefix` without a gap."""
        while keys and asked.waits():
            if (coming := self._coming.get(keys[0])) is not None:
                count = next((i for i, key in enumerate(keys) if self._coming.get(key) is not coming), len(keys))
                asked.wait(self._read_wait(asked, count, len(keys)).request_s)
                if asked.waits():
                    await asyncio.wait([coming])
                if not asked.waits() or len(left := self._take_read(asked, keys)) == len(keys):
                    return
                keys = left
                continue
            there = await self._which_are_there(asked, keys)
            if not asked.waits():
                return
            left = self._take_read(asked, keys)
            if len(left) < len(keys) or keys[0] in self._coming:
                keys = left  # another request has read of it, or does, since this one asked
                continue
            mine = there[: next((i for i, key in enumerate(there) if key in self._coming), len(there))]
            worth = self._speeds.worth(len(mine), asked.chunk_tokens)
            self._counters.remote_gated_chunks += len(mine) - worth
            if not worth or not await self._read_all(asked, mine[:worth]):
                return
            if worth == len(there) or worth < len(mine) or not asked.prefix:
                return  # that was all there is, or more than is worth it
            keys = keys[worth:]

    def _take_read(self, asked: WaitingRequest, keys: list[bytes]) -> list[bytes]:
        """Take what others have brought meanwhile. What is still missing."""
        found = self._local.lease(keys, asked.prefix, hit=True)
        if not found.keys:
            return keys
        asked.held.append(found)
        got = set(found.keys)
        return keys[len(found.keys) :] if asked.prefix else [key for key in keys if key not in got]

    async def _which_are_there(self, asked: WaitingRequest, keys: list[bytes]) -> list[bytes]:
        if asked.prefix:
            keys = keys[: next((i for i, key in enumerate(keys) if self._known.is_absent(key)), len(keys))]
        if not keys:
            return []
        wait = self._speeds.ask_wait(len(keys), asked.chunk_tokens)
        asked.wait(wait.request_s - asked.question_s)
        began = time.monotonic()
        count = FIRST_ASKED if asked.prefix else len(keys)
        there = list(await self._calls.exists(keys[:count], wait.late_s))
        while len(there) < len(keys) and all(there) and asked.waits():  # what is behind a gap need not be known
            count *= ASKED_TIMES
            late_s = max(0.0, wait.late_s - (time.monotonic() - began))
            there += await self._calls.exists(keys[len(there) : len(there) + count], late_s)
        asked.question_s += (took_s := time.monotonic() - began)
        if None not in there:
            self._speeds.note_ask(took_s)
        absent = next((i for i, is_there in enumerate(there) if not is_there and is_there is not None), None)
        if absent is not None:
            self._known.note_absent(keys[absent])
        if asked.prefix:
            return keys[: next((i for i, is_there in enumerate(there) if not is_there), len(there))]
        return [key for key, is_there in zip(keys, there, strict=True) if is_there]

    # -- its chunks ----------------------------------------------------------------------------------------------------

    async def _read_all(self, asked: WaitingRequest, keys: list[bytes]) -> bool:
        """Read these, window by window, the next one while one is being taken in. Whether all came."""
        began, at, whole = time.monotonic(), 0, True
        under_way: deque[tuple[list[bytes], asyncio.Task[Reservation], asyncio.Future[None]]] = deque()
        loop = asyncio.get_running_loop()
        try:
            while True:
                while whole and at < len(keys) and len(under_way) < READS_AHEAD and asked.waits():
                    usual, left = self._window(self._speeds.read_s), len(keys) - at
                    window = keys[at : at + (left if 2 * left < 3 * usual else usual)]  # no small one at the end
                    wait = self._read_wait(asked, len(window), len(keys) - at)
                    at += len(window)
                    over = loop.create_future()
                    self._coming.update(dict.fromkeys(window, over))
                    under_way.append((window, loop.create_task(self._read(window, asked, wait.late_s)), over))
                    if len(under_way) == 1:
                        asked.wait(wait.request_s)
                if not under_way:
                    break
                window, task, _ = under_way[0]
                read = await task
                began = self._note_read(asked, read, began)
                taken = self._take_in(asked, read, whole)
                whole = whole and (taken == len(window) or not asked.prefix)
                self._settle(*under_way.popleft())
                if not whole:
                    asked.reply()  # what is still under way is behind a gap
                elif under_way and asked.waits():
                    left = len(keys) - at + sum(len(window) for window, _, _ in under_way)
                    asked.wait(self._read_wait(asked, len(under_way[0][0]), left).request_s)
        finally:
            for window, task, over in under_way:  # one has failed: what the others have read is given back
                await asyncio.wait([task])
                if task.exception() is None:
                    self._local.give_back(task.result().slots)
                self._settle(window, task, over)
        return whole and at == len(keys)

    def _read_wait(self, asked: WaitingRequest, chunks: int, missing: int) -> WaitLimit:
        return self._speeds.read_wait(chunks, missing, asked.chunk_tokens)

    def _note_read(self, asked: WaitingRequest, read: Reservation, began: float) -> float:
        """A window has come, or nothing of it: from now on the next one does."""
        now = time.monotonic()
        if read.keys:
            self._speeds.note_read(len(read.keys), now - began)
            asked.chunk_tokens = int(self._arena.headers["chunk_tokens"][read.slots[0]])
            self._tokens.put(asked.use.namespace, asked.chunk_tokens)
        return now

    def _take_in(self, asked: WaitingRequest, read: Reservation, whole: bool) -> int:
        """Publish what was read. How much of it is the request's now: of a prefix nothing that is behind a gap."""
        if not read.keys:
            return 0
        self._known.note_there(read.keys)
        self._counters.remote_hit_chunks += len(read.keys)
        self._counters.remote_late_chunks += len(read.keys) * (not asked.waits())
        lease = self._local.promote(read, asked.use.namespace, asked.use, whole and asked.waits(), asked.prefix)
        if lease.keys:
            asked.held.append(lease)
        return len(lease.keys)

    def _settle(self, window: list[bytes], task: asyncio.Task[Reservation], over: asyncio.Future[None]) -> None:
        """A window is over: who waits for its chunks looks for them."""
        for key in window:
            if self._coming.get(key) is over:
                del self._coming[key]
        over.set_result(None)

    async def _read(self, keys: list[bytes], asked: WaitingRequest, late_s: float) -> Reservation:
        """Read a window into granted slots, and verify it: what is good, to be promoted or given back."""
        granted = self._local.grant(len(keys))
        keys = keys[: len(granted.slots)]
        if not keys:
            return Reservation((), (), ())
        good: list[int] = []
        try:
            shape = ChunkShape(asked.use.namespace, 0, 0)  # group and tokens come with the value
            slots, under = np.array(granted.slots, dtype=np.int64), np.array(granted.generations, dtype=np.uint64)
            begin_slots(self._arena, slots, under, keys, shape, asked.keys, self._owner)
            headers = new_headers(self._arena.spec.geometry, len(keys))
            into = incoming_parts(self._arena, headers, granted.slots)
            async with asked.turn:
                got = await self._calls.get(keys, into, late_s)
            good = await self._verified(keys, asked, slots, headers, list(got))
        finally:
            kept = set(good)
            self._local.give_back([slot for row, slot in enumerate(granted.slots) if row not in kept])
        return Reservation(
            tuple(keys[row] for row in good), tuple(granted.slots[row] for row in good),
            tuple(granted.generations[row] for row in good), chain=tuple(asked.keys),
        )  # fmt: skip

    async def _verified(
        self,
        keys: list[bytes],
        asked: WaitingRequest,
        slots: npt.NDArray[np.int64],
        headers: npt.NDArray[np.uint8],
        got: list[Got],
    ) -> list[int]:
        """Rows that are what was asked for; with `prefix` those before the first that is not. What is spoiled is deleted."""
        hits = [row for row, outcome in enumerate(got) if outcome is Got.HIT]
        at = np.array(hits, dtype=np.int64)
        named = np.frombuffer(b"".join(keys), dtype="V32")
        fine = await asyncio.to_thread(accept, self._arena, headers[at], slots[at], named[at], asked.use.namespace)
        good = [row for row, ok in zip(hits, fine.tolist(), strict=True) if ok]
        spoiled = [row for row, outcome in enumerate(got) if outcome is Got.WRONG_SIZE]
        spoiled += [row for row, ok in zip(hits, fine.tolist(), strict=True) if not ok]
        if Got.MISS in got:
            self._known.note_absent(keys[got.index(Got.MISS)])  # what is behind it the store has perhaps not looked for
        if spoiled:
            self._counters.remote_bad_chunks += len(spoiled)
            logger.warning("kvkern: %d chunk(s) of the remote store did not verify and are deleted there", len(spoiled))
            await self._delete([keys[row] for row in spoiled])
        unbroken = next((count for count, row in enumerate(good) if count != row), len(good))
        return good[:unbroken] if asked.prefix else good

    async def _delete(self, keys: list[bytes]) -> None:
        try:
            await self._calls.delete(keys)
        except RemoteError as error:
            logger.debug("kvkern: spoiled chunks stay in the remote store: %s", error)  # what came with them is good
