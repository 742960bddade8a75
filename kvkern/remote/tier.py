"""The remote tier: chunks that DRAM lacks come from a store, and what DRAM has or evicts goes there, by write-behind.

    extend   what a lease lacks of a prefix:  known absent? -> exists -> worth it? -> windows: grant, get, verify, promote
    write    of the outbox the most worth:    exists -> put what is not there -> give the slots back

One thread with an event loop; stores are called there and nowhere else. A request waits for its chunks as long as it
would take to compute them, and gets what is there by then; what is still being read ends in DRAM later. Slots under a call
are the call's until it returns, however long that takes. While the breaker is open nothing is asked and nothing leaves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..arena import Arena, process_start
from ..errors import KvkernError
from ..metrics import CacheCounters
from ..policy.base import Use
from ..policy.persist import Persist
from ..policy.recent import Recent
from ..tiers.base import ChunkShape, Lease, Reservation
from ..tiers.headers import begin_slots, verify_slots
from .base import Got, Parts, RemoteError, RemoteStore
from .breaker import Breaker
from .local import Asked, Local, Misses
from .outbox import NO_SLOT, Entry, WriteBehind
from .speeds import Speeds
from .value import accept, incoming_parts, new_headers, outgoing_parts

logger = logging.getLogger("kvkern")

T = TypeVar("T")

WINDOW_S = 0.05  # what a call should take: a lease grows by so much at a time
FIRST_WINDOW_NBYTES, WINDOW_NBYTES = 32 << 20, (16 << 20, 256 << 20)  # of a call, before it is known and within limits
READS_AHEAD = 2  # windows of a request under way: one is verified, one is read. Stores have threads of their own
MAX_WAITING = 256  # requests that wait for the store; more are answered with what DRAM has
ABSENT_S = 1.0  # what was just not there is not asked for again so soon: others' writes take as long
MAX_ABSENT = 65_536
MAX_REMEMBERED = 65_536  # chunks whose time of writing is known
OPEN_S = 20.0
RETRY_S = 0.2


class RemoteTier:
    """`start`, then `extend` from any thread; `close` ends it."""

    def __init__(
        self,
        store: RemoteStore,
        name: str,  # for messages; no secrets
        arena: Arena,
        local: Local,
        counters: CacheCounters,
        faults: Misses,
        mode: Persist,
        queue_nbytes: int,  # of what may wait to be written
        timeout_s: float,  # of a call
    ) -> None:
        self._store, self._name, self._arena, self._local = store, name, arena, local
        self._counters, self._faults, self._timeout_s = counters, faults, timeout_s
        geometry = arena.spec.geometry
        self.breaker = Breaker(name)
        self.speeds = Speeds(geometry.slot_nbytes)
        limit = max(1, queue_nbytes // geometry.slot_nbytes)
        self.spare = 0 if mode is Persist.HOT else min(limit, max(1, arena.spec.num_slots // 8))
        self.outbox = WriteBehind(
            arena, mode, limit, self.speeds, counters, self.breaker.allows, self._wake_writers
        )  # fmt: skip
        self._owner = (os.getpid(), process_start(os.getpid()))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvkern-remote", daemon=True)
        self._wake = asyncio.Event()
        self._woken = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._coming: dict[bytes, asyncio.Future[None]] = {}  # chunks that are being read
        self._absent: Recent[bytes, float] = Recent(MAX_ABSENT)  # key -> until when it is not asked for
        self._written_at: Recent[bytes, float] = Recent(MAX_REMEMBERED)
        self._lock = threading.Lock()  # of `_closing`: what is given to the loop is there before the end of it
        self._closing = False
        self._waiting = 0  # requests
        self._writing = False  # set before chunks leave the outbox

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the store. Raises ConfigError for what the user has to mend; nobody there is a miss until somebody is."""
        verify_slots(self._arena, np.zeros(1, dtype=np.int64))  # numba is loaded now, not while a request waits
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except BaseException:
            asyncio.run_coroutine_threadsafe(self._close_store(), self._loop).result()
            self._stop()
            raise
        self._loop.call_soon_threadsafe(self._spawn, self._write())

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(OPEN_S):
                await self._store.open()
        except (RemoteError, TimeoutError) as error:
            self.breaker.trip(str(error) or f"no answer for {OPEN_S:.0f} s")
        try:
            await self._store.register(self._arena.bytes.data)
        except RemoteError as error:
            self.breaker.trip(error)

    def close(self, drain_s: float = 0.0) -> None:
        """Write what waits, for so long; then end calls under way and the thread."""
        if not self._thread.is_alive():
            return
        end = time.monotonic() + drain_s
        while not self.idle and not self.breaker.is_open and time.monotonic() < end:
            time.sleep(0.01)
        with self._lock:
            self._closing = True
        try:
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        finally:
            self._stop()

    def usage(self) -> dict[str, int | float | str]:
        """For operators: whether it works, what waits, and what moving a chunk has cost."""
        known = {
            "remote_read_ms_per_chunk": self.speeds.read_s and 1e3 * self.speeds.read_s,
            "remote_write_ms_per_chunk": self.speeds.write_s and 1e3 * self.speeds.write_s,
            "prefill_tokens_s": self.speeds.prefill_tokens_s,
        }
        return {
            "remote": self._name, "remote_works": int(not self.breaker.is_open), "remote_waiting_requests": self._waiting,
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

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

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
        asked = Asked(list(keys), use, prefix, [lease])
        missing = len(keys) - len(lease.keys)
        with self._lock:
            if missing and use.namespace and not self._closing and self._waiting < MAX_WAITING:
                self._counters.remote_lookup_chunks += missing
                if self.breaker.allows() and not (prefix and self._is_absent(keys[len(lease.keys)])):
                    self._waiting += 1
                    self._loop.call_soon_threadsafe(self._begin, asked)
                    return asked.answer
        asked.reply()
        return asked.answer

    def _begin(self, asked: Asked) -> None:
        self._spawn(self._serve(asked))

    async def _serve(self, asked: Asked) -> None:
        missing = asked.missing()
        patience_s = self.speeds.patience_s(len(missing), self.outbox.chunk_tokens)
        timer = self._loop.call_later(patience_s, asked.reply)
        try:
            with self._faults.are_misses():
                try:
                    await self._fetch(asked, missing)
                except RemoteError as error:
                    logger.debug("kvkern: a remote read failed: %s", error)  # counted and told by `_call`
        finally:
            with self._lock:
                self._waiting -= 1
            timer.cancel()
            asked.reply()

    async def _fetch(self, asked: Asked, keys: list[bytes]) -> None:
        """Take in as many of `keys` as can be had, in their order; with `prefix` without a gap."""
        while keys and not asked.answer.done():
            if (coming := self._coming.get(keys[0])) is not None:
                await asyncio.wait([coming])
                if asked.answer.done() or not (found := self._local.lease(keys, asked.prefix, hit=True)).keys:
                    return
                asked.held.append(found)
                got = set(found.keys)
                keys = keys[len(found.keys) :] if asked.prefix else [key for key in keys if key not in got]
                continue
            there = await self._which_are_there(keys, asked.prefix)
            if keys[0] in self._coming:
                continue  # since it was asked for
            there = there[: next((i for i, key in enumerate(there) if key in self._coming), len(there))]
            worth = self.speeds.worth(len(there), self.outbox.chunk_tokens)
            self._counters.remote_gated_chunks += len(there) - worth
            if not worth or not await self._read_all(asked, there[:worth]):
                return
            if worth < len(there) or not asked.prefix:
                return
            keys = keys[worth:]

    async def _which_are_there(self, keys: list[bytes], prefix: bool) -> list[bytes]:
        if prefix:
            keys = keys[: next((i for i, key in enumerate(keys) if self._is_absent(key)), len(keys))]
        if not keys:
            return []
        there = await self._call(lambda: self._store.exists(keys, self._timeout_s))
        count = next((i for i, is_there in enumerate(there) if not is_there), len(keys))
        if count < len(keys):
            self._note_absent(keys[count])
        if prefix:
            return keys[:count]
        return [key for key, is_there in zip(keys, there, strict=True) if is_there]

    async def _read_all(self, asked: Asked, keys: list[bytes]) -> bool:
        """Read these, window by window, the next one while one is being taken in. Whether all came."""
        began, at, came, whole = time.monotonic(), 0, 0, True
        under_way: deque[tuple[list[bytes], asyncio.Task[Reservation], asyncio.Future[None]]] = deque()
        try:
            while True:
                while whole and at < len(keys) and len(under_way) < READS_AHEAD and not asked.answer.done():
                    window = keys[at : at + self._window(self.speeds.read_s)]
                    at += len(window)
                    over = self._loop.create_future()
                    self._coming.update(dict.fromkeys(window, over))
                    under_way.append((window, self._loop.create_task(self._read(window, asked)), over))
                if not under_way:
                    break
                window, task, _ = under_way[0]
                read = await task
                came += len(read.keys)
                taken = self._take_in(asked, read, whole)
                whole = whole and (taken == len(window) or not asked.prefix)
                self._settle(*under_way.popleft())
        finally:
            for window, task, over in under_way:  # one has failed: what the others have read is given back
                await asyncio.wait([task])
                if task.exception() is None:
                    self._local.give_back(task.result().slots)
                self._settle(window, task, over)
        if came:
            self.speeds.note_read(came, time.monotonic() - began)
        return whole and at == len(keys)

    def _take_in(self, asked: Asked, read: Reservation, whole: bool) -> int:
        """Publish what was read. How much of it is the request's now: of a prefix nothing that is behind a gap."""
        if not read.keys:
            return 0
        late, now = asked.answer.done(), time.monotonic()
        self.speeds.note_there(now - min(self._written_at.get(key, now) for key in read.keys))
        self._counters.remote_hit_chunks += len(read.keys)
        self._counters.remote_late_chunks += len(read.keys) * late
        lease = self._local.promote(read, asked.use.namespace, asked.use, whole and not late, asked.prefix)
        if lease.keys:
            asked.held.append(lease)
        return len(lease.keys)

    def _settle(self, window: list[bytes], task: asyncio.Task[Reservation], over: asyncio.Future[None]) -> None:
        """A window is over: who waits for its chunks looks for them."""
        for key in window:
            if self._coming.get(key) is over:
                del self._coming[key]
        over.set_result(None)

    async def _read(self, keys: list[bytes], asked: Asked) -> Reservation:
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
                got = await self._call(lambda: self._store.get(keys, into, self._timeout_s))
            good = await self._verified(keys, asked, slots, headers, got)
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
        asked: Asked,
        slots: npt.NDArray[np.int64],
        headers: npt.NDArray[np.uint8],
        got: list[Got],
    ) -> list[int]:
        """Rows that are what was asked for; with `prefix` those before the first that is not. Others are deleted."""
        hits = [row for row, outcome in enumerate(got) if outcome is Got.HIT]
        at = np.array(hits, dtype=np.int64)
        named = np.frombuffer(b"".join(keys), dtype="V32")
        fine = await asyncio.to_thread(accept, self._arena, headers[at], slots[at], named[at], asked.use.namespace)
        good = [row for row, ok in zip(hits, fine.tolist(), strict=True) if ok]
        spoiled = [row for row, outcome in enumerate(got) if outcome is Got.WRONG_SIZE]
        spoiled += [row for row, ok in zip(hits, fine.tolist(), strict=True) if not ok]
        if Got.MISS in got:
            self._note_absent(keys[got.index(Got.MISS)])  # what is behind it the store has perhaps not looked for
        if spoiled:
            self._counters.remote_bad_chunks += len(spoiled)
            logger.warning("kvkern: %d chunk(s) of the remote store did not verify and are deleted there", len(spoiled))
            await self._delete([keys[row] for row in spoiled])
        unbroken = next((count for count, row in enumerate(good) if count != row), len(good))
        return good[:unbroken] if asked.prefix else good

    async def _delete(self, keys: list[bytes]) -> None:
        try:
            await self._call(lambda: self._store.delete(keys, self._timeout_s))
        except RemoteError as error:
            logger.debug("kvkern: spoiled chunks stay in the remote store: %s", error)  # what came with them is good

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

    async def _write_window(self, entries: list[Entry]) -> None:
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
        """How many were written. What fails is tried once more, a little later."""
        if not self.breaker.allows():
            self.outbox.dropped(len(keys))
            return 0
        for last in (False, True):
            try:
                there = await self._call(lambda: self._store.exists(keys, self._timeout_s))
                missing = [key for key, is_there in zip(keys, there, strict=True) if not is_there]
                if not missing:
                    return 0
                began = time.monotonic()
                taken = await self._put_parts(missing, outgoing_parts(self._arena, [slots[key] for key in missing]))
                self._note_written([key for key, ok in zip(missing, taken, strict=True) if ok], began)
                self.outbox.dropped(len(missing) - sum(taken))
                return sum(taken)
            except RemoteError:
                if last or self.breaker.is_open or self._closing:
                    break
                await asyncio.sleep(RETRY_S * (0.5 + random.random()))
        self.outbox.dropped(len(keys))
        return 0

    async def _put_parts(self, keys: list[bytes], values: list[Parts]) -> list[bool]:
        return await self._call(lambda: self._store.put(keys, values, self._timeout_s))

    def _note_written(self, keys: list[bytes], began: float) -> None:
        now = time.monotonic()
        if keys:
            self.speeds.note_write(len(keys), now - began)
        for key in keys:
            self._written_at.put(key, now)
            self._absent.pop(key, None)

    # -- what both do --------------------------------------------------------------------------------------------------

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        """What the store answers; the breaker hears of it."""
        if self._closing or not self.breaker.begin():
            raise RemoteError("the store is not asked any more, or not now")
        try:
            result = await call()
        except BaseException as error:
            self._counters.remote_failures += 1
            self.breaker.failed(error)
            if isinstance(error, KvkernError):  # it was good enough at the start
                raise RemoteError(str(error)) from error
            raise
        self.breaker.succeeded()
        return result

    def _window(
        self,
        chunk_s: float | None,  # what moving one has taken
    ) -> int:
        """Chunks of a call: as many as take WINDOW_S."""
        slot_nbytes = self._arena.spec.geometry.slot_nbytes
        least, most = (max(1, nbytes // slot_nbytes) for nbytes in WINDOW_NBYTES)
        wanted = FIRST_WINDOW_NBYTES // slot_nbytes if chunk_s is None else int(WINDOW_S / max(chunk_s, 1e-9))
        return min(max(wanted, least), most)

    def _is_absent(self, key: bytes) -> bool:
        until = self._absent.get(key)
        return until is not None and time.monotonic() < until

    def _note_absent(self, key: bytes) -> None:
        now = time.monotonic()
        if (written := self._written_at.pop(key, None)) is not None:
            self.speeds.note_gone(now - written)
        self._absent.put(key, now + ABSENT_S)
