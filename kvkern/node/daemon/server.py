"""The daemon: one per node and trust domain. Owns the arena, the index and the policy; answers on a Unix socket.

One asyncio thread; a request is decoded, carried out and answered where its bytes arrive, so requests of one client are
in order and no lock is needed. A client that does not read is disconnected before its answers fill the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from ...arena.file import Arena, ArenaSpec, create_or_attach, is_unfinished_arena, read_spec
from ...arena.process_identity import process_alive, process_start
from ...arena.slots import SlotGeometry
from ...assemble import attach_remote_tier, build_cache, open_remote_store
from ...cache.manager import Cache
from ...config import DEFAULT_POLICY, RemoteConfig, format_nbytes
from ...errors import ArenaError, ConfigError
from ...policy import checked_policy
from ...policy.persist_modes import persist_mode
from ...remote.store_thread import StoreThread
from ...remote.stores.url import RemoteUrl
from ...remote.tier import RemoteTier
from ...tiers.base import Lease
from .. import protocol as p
from .client_connection import ClientConnection
from .peer_credentials import groups_of
from .policy_state_file import PolicyStateFile
from .sessions import Quotas, Session, Sessions
from .socket_path import bind, only_one

logger = logging.getLogger("kvkern")

SWEEP_S = 0.25
PAGE_KEYS = p.MAX_KEYS // 2  # of either kind in one Changed


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What a daemon needs to know."""

    socket: Path
    capacity_nbytes: int
    name: str = "default"  # of the trust domain: part of the arena's file name
    arena_dir: Path = Path("/dev/shm")
    prefault: bool = True
    uids: frozenset[int] = frozenset()  # that may connect, beside the daemon's own
    gids: frozenset[int] = frozenset()  # whose members may connect
    quotas: Quotas = field(default_factory=Quotas)
    policy: str = DEFAULT_POLICY  # of eviction
    policy_state: Path | None = None  # file of what the policy has learned; None: it starts anew
    remote: RemoteConfig | None = None  # a store that the node shares with others
    drain_s: float = 5.0  # how long transfers under way, and what waits for the store, may take after SIGTERM

    def __post_init__(self) -> None:
        if not self.name.replace("-", "").replace("_", "").isalnum() or len(self.name) > 64:
            raise ConfigError(f"name is {self.name!r}; use up to 64 letters, digits, '-' and '_'")
        p.checked_path(self.socket)
        checked_policy(self.policy)
        if self.remote is not None:
            RemoteUrl.parse(self.remote.url)
            persist_mode(self.remote.persist, self.policy)
        if not self.arena_dir.is_dir():
            raise ConfigError(f"arena_dir is {str(self.arena_dir)!r}, which is no directory; mount a tmpfs or name one")
        if not 0 <= self.drain_s <= 3600:
            raise ConfigError(f"drain_s is {self.drain_s}; it must lie in 0..3600 seconds")

    @property
    def arena_path(self) -> Path:
        """One file per uid and trust domain. Not among the names that embedded engines sweep."""
        return self.arena_dir / f"kvkern-node-{os.getuid()}-{self.name}"


class Server:
    """Run with `await run()`; `stop` ends it gracefully."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.connections: set[ClientConnection] = set()
        self.sessions: Sessions | None = None  # None: no arena yet, its slots' size is the first engine's
        self.bad_frames = 0
        self.started = time.time()
        self._arena: Arena | None = None
        self._learned = PolicyStateFile(config.policy, config.policy_state)
        self._making = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._draining = False
        self._opened: StoreThread | None = None  # the store, until there is an arena
        self._remote: RemoteTier | None = None
        self._waiting: dict[
            Future[Lease], tuple[ClientConnection, int]
        ] = {}  # requests whose chunks come from the remote

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop it runs in."""
        return asyncio.get_running_loop()

    # -- life ------------------------------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`. Raises ConfigError or ArenaError if the socket or the arena cannot be had."""
        with contextlib.ExitStack() as locks:
            locks.enter_context(only_one(self.config.socket, "--socket"))
            locks.enter_context(only_one(self.config.arena_path, "--name or --arena-dir"))
            if self.config.policy_state is not None:
                locks.enter_context(only_one(self.config.policy_state, "--policy-state"))
                await asyncio.to_thread(self._learned.load)
            if self.config.remote is not None:
                locks.callback(self._close_unused)
                self._opened = await asyncio.to_thread(open_remote_store, self.config.remote)
            await self._take_over()
            listener = await asyncio.get_running_loop().create_unix_server(
                lambda: ClientConnection(self), sock=bind(self.config.socket)
            )
            logger.info("kvkern: serving on %s", self.config.socket)
            ready()
            try:
                while not self._stopping.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), SWEEP_S)
                    self._hang_up_on_the_dead()
                    for connection, number in self._waiting.values():
                        connection.send(p.Working(number))
                    if self.sessions is not None:
                        self.sessions.sweep()
                        self._publish_changes()
                        self._learned.save_when_due()
            finally:
                listener.close()
                self.config.socket.unlink(missing_ok=True)
                await self._drain()

    def _hang_up_on_the_dead(self) -> None:
        """A process that was killed has ended its connection, unless a child it had forked still has the socket."""
        for connection in list(self.connections):
            if connection.session is not None and not process_alive(*connection.session.process):
                connection.close("is gone; a child of it has the socket")

    def stop(self) -> None:
        """End gracefully: no new clients, transfers under way may finish."""
        self._draining = True
        self._stopping.set()

    async def _drain(self) -> None:
        for connection in list(self.connections):
            if connection.session is not None:
                connection.send(p.Draining())
        deadline = time.monotonic() + self.config.drain_s
        while self._busy() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.close("is let go: the daemon ends")
        await asyncio.sleep(0)
        async with self._making:  # an engine that was let in just before may be getting its arena still
            await asyncio.to_thread(self._end_remote, max(0.0, deadline - time.monotonic()))
            await self._learned.close()
            if self._arena is not None:
                self._arena.close()

    def _end_remote(self, drain_s: float = 0.0) -> None:
        if self._remote is not None:
            self._remote.close(drain_s)
            self._remote = None

    def _close_unused(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _busy(self) -> bool:
        sessions = self.sessions.sessions.values() if self.sessions is not None else ()
        return bool(self._waiting) or any(session.leases or session.granted for session in sessions)

    # -- clients ---------------------------------------------------------------------------------------------------------

    async def open(self, connection: ClientConnection, hello: p.Hello) -> Session:
        """Let a client in. Raises KvkernError with the reason if not."""
        pid, uid, gid = connection.peer
        if hello.version != p.VERSION:
            raise ConfigError(
                f"protocol version {hello.version} is not the daemon's {p.VERSION}; upgrade the older side"
            )
        if not self._may(uid, gid, pid):
            raise ConfigError(
                f"uid {uid} may not use this cache: who maps its arena reads all of it. Run a daemon of your own, "
                f"or let it in with --allow-uid {uid}"
            )
        process = (pid, process_start(pid))
        if not process[1]:
            raise ConfigError(
                f"process {pid} cannot be seen from the daemon, so its end cannot be told; share the pid namespace "
                f"(hostPID or shareProcessNamespace in Kubernetes)"
            )
        if self._draining:
            raise ConfigError("the daemon is ending; try again when it is back")
        if hello.geometry is not None:
            await self._ensure_arena(hello.geometry.slots())
            if connection.gone:
                raise ConfigError("the client has ended meanwhile")
        if self.sessions is None or self._arena is None:
            if hello.geometry is None:
                connection.send_welcome(p.Welcome(p.VERSION, os.getpid()), None)
                return Session(0, process, hello.engine, writer=False)
            raise ArenaError("the arena could not be made")
        session = self.sessions.attach(process, hello.engine, writer=hello.index and hello.geometry is not None)
        if session.writer:
            self._tell_limits()
        try:
            self._welcome(connection, hello, self.sessions, self._arena)
        except BaseException:
            self.detach(session)
            raise
        return session

    def _tell_limits(self) -> None:
        """Everybody's share is less now: those who have more in stock give it back."""
        for other in list(self.connections):
            if self.sessions is not None and other.session is not None and other.session.writer:
                other.send(p.Granted(0, [], [], self.sessions.limit(other.session)))

    def _welcome(self, connection: ClientConnection, hello: p.Hello, sessions: Sessions, arena: Arena) -> None:
        geometry, num_slots = p.Geometry.of(arena.spec.geometry), arena.spec.num_slots
        remote = self._remote is not None
        descriptor = arena.descriptor() if hello.geometry is not None else None
        try:
            connection.send_welcome(
                p.Welcome(p.VERSION, os.getpid(), geometry, num_slots, str(arena.path), remote), descriptor
            )
        finally:
            if descriptor is not None:
                os.close(descriptor)
        if hello.index:
            self._publish_changes()
            connection.index = True
            for fresh, keys in _pages(sessions.cache.all_keys()):
                connection.send(p.Changed(keys, b"", fresh))

    def detach(self, session: Session) -> None:
        """A client is gone."""
        if self.sessions is not None:
            self.sessions.detach(session)
            self._publish_changes()

    def _may(self, uid: int, gid: int, pid: int) -> bool:
        if uid in (0, os.getuid()) or uid in self.config.uids or gid in self.config.gids:
            return True
        return bool(self.config.gids & groups_of(pid))

    async def _ensure_arena(self, wanted: SlotGeometry) -> None:
        async with self._making:
            if self._arena is not None and self._arena.spec.geometry != wanted and self._replaceable():
                await asyncio.to_thread(self._end_remote)
                self._arena.path.unlink(missing_ok=True)
                self._arena.close()
                self._arena = self.sessions = None
            if self._arena is None:
                await self._make_arena(ArenaSpec.for_capacity(wanted, self.config.capacity_nbytes))
            found = self._arena.spec.geometry if self._arena is not None else wanted
            if found != wanted:
                raise ArenaError(
                    f"this cache holds chunks of {found.part_nbytes} bytes in {found.max_planes} planes on "
                    f"{found.world_size} rank(s); the engine needs {wanted.part_nbytes} bytes in {wanted.max_planes} planes "
                    f"on {wanted.world_size}. Run another daemon for this model, or end the other engines and "
                    f"`kvkern clear`"
                )

    def _replaceable(self) -> bool:
        """Nobody holds anything of the arena, and nothing is in it."""
        state = self.sessions
        return state is None or not (state.sessions or state.quarantines or state.cache.all_keys())

    async def _take_over(self) -> None:
        """Go on with the arena of an earlier daemon; remove one that it had not finished when it was killed.

        Raises ArenaError, before any engine is let in, if it is of another version of the file.
        """
        path, capacity_nbytes = self.config.arena_path, self.config.capacity_nbytes
        try:
            spec = read_spec(path)
            if spec is None and is_unfinished_arena(path):
                path.unlink()
        except OSError as error:
            raise ArenaError(
                f"arena {path} cannot be opened: {error.strerror}; remove it, or use another --name or --arena-dir"
            ) from error
        if spec is None:
            return
        await self._make_arena(spec)
        if not spec.nbytes <= capacity_nbytes < spec.nbytes + spec.geometry.slot_nbytes:
            logger.warning(
                "kvkern: %s has %s and keeps this size, though the capacity is %s now; to change it end the daemon and "
                "remove the file", path, format_nbytes(spec.nbytes), format_nbytes(capacity_nbytes),
            )  # fmt: skip

    async def _make_arena(self, spec: ArenaSpec) -> None:
        path = self.config.arena_path
        try:
            arena = await asyncio.to_thread(create_or_attach, spec, path, 0, self.config.prefault, logger.info)
        except OSError as error:
            raise ArenaError(f"arena {path} cannot be made: {error.strerror}; see to it, then restart") from error
        try:
            await self._serve_arena(arena)
        except BaseException:
            await asyncio.to_thread(self._end_remote)
            arena.close()
            raise

    async def _serve_arena(self, arena: Arena) -> None:
        cache, path = await asyncio.to_thread(self._build_cache, arena), self.config.arena_path
        opened, self._opened = self._opened, None
        self._remote = await asyncio.to_thread(
            attach_remote_tier, cache, arena, self.config.remote, self.config.policy, opened
        )
        sessions = Sessions(cache, arena, quotas=self.config.quotas)
        ready, torn = await asyncio.to_thread(sessions.adopt)
        if ready or torn:
            logger.info("kvkern: %d chunks of %s are served again, %d did not verify", ready, path, torn)
        sessions.cache.track_changes()
        self._arena, self.sessions = arena, sessions

    def _build_cache(self, arena: Arena) -> Cache:
        """What has been learned in an arena before this one counts here too."""
        if self._learned.model is None:
            self._learned.load()
        cache = build_cache(arena, self.config.quotas.shares, self.config.policy, self._learned.model)
        self._learned.still = cache.locked
        return cache

    # -- requests --------------------------------------------------------------------------------------------------------

    def handle(self, connection: ClientConnection, session: Session, request: p.Request) -> None:
        """Carry out a request and answer it. Raises ProtocolError for what this client may not say."""
        state = self.sessions
        if isinstance(request, p.Hello):
            raise p.ProtocolError("says Hello twice")
        if isinstance(request, p.Stat | p.List | p.Evict | p.Clear):
            answer = p.Answer(request.id, self._operate(session, request))
            self._publish_changes()  # before the answer: who has been answered stores again what it forgot
            connection.send(answer)
        elif isinstance(request, p.Record):
            connection.recording = True
        elif state is None or not session.number:
            raise p.ProtocolError(f"says {type(request).__name__}, but was given no arena")
        elif isinstance(request, p.Acquire):
            keys = p.cut_keys(request.keys)
            found = state.acquire_soon(session, keys, request.prefix, p.use_of(request, session.number))
            if found.done():
                self._lend(state, connection, session, request, found.result())
            else:
                self._wait(state, connection, session, request, found)
        elif isinstance(request, p.Release):
            state.release(session, request.leases)
        elif isinstance(request, p.Grant):
            granted = state.grant(session, 0 if self._draining else request.count)
            self._publish_changes()
            limit = 0 if self._draining else state.limit(session)
            connection.send(p.Granted(request.id, list(granted.slots), list(granted.generations), limit))
        elif isinstance(request, p.Publish):
            keys, chain = p.cut_keys(request.keys), p.cut_keys(request.chain)
            use = p.use_of(request, session.number)
            done = state.publish(session, request.namespace, request.slots, request.generations, keys, chain, use)
            self._publish_changes()  # before the acknowledgement: what is acknowledged, every client has been told of
            connection.send(p.Published(request.id, done))
        elif isinstance(request, p.GiveBack):
            state.give_back(session, request.slots)
        elif isinstance(request, p.Finish):
            if request.prefill_tokens_s:
                state.cache.note_prefill(request.prefill_tokens_s)
            if request.request:
                state.cache.finish(p.use_of(request, session.number))
                self._record(request)
        elif isinstance(request, p.Settle):
            state.settle(session)
        else:
            connection.send(p.Described(request.id, state.describe(session, request.root, request.fields)))
        self._publish_changes()

    def _wait(
        self, state: Sessions, connection: ClientConnection, session: Session, request: p.Acquire, found: Future[Lease]
    ) -> None:
        """Lend when the remote store has answered, and say meanwhile that this daemon is alive."""
        self._waiting[found] = connection, request.id
        loop = self.loop

        def answered(found: Future[Lease]) -> None:
            loop.call_soon_threadsafe(lend)

        def lend() -> None:
            self._waiting.pop(found, None)
            self._lend(state, connection, session, request, found.result())
            self._publish_changes()

        found.add_done_callback(answered)

    def _lend(
        self, state: Sessions, connection: ClientConnection, session: Session, request: p.Acquire, lease: Lease
    ) -> None:
        number, lease = state.lend(session, lease)
        rows = list(range(len(lease.slots)))
        if not request.prefix:
            at = {key: row for row, key in enumerate(p.cut_keys(request.keys))}
            rows = [at[key] for key in lease.keys]
        connection.send(p.Acquired(request.id, number, rows, list(lease.slots)))

    def _record(self, ended: p.Finish) -> None:
        """Tell who records."""
        listeners = [connection for connection in self.connections if connection.recording]
        if not listeners:
            return
        recorded = p.Recorded(
            time.time() - ended.age_s, ended.keys, ended.prompt_tokens, ended.output_tokens, ended.stop, ended.session
        )
        frame = p.encode(recorded)
        for connection in listeners:
            connection.send_frame(frame)

    def _operate(
        self, session: Session, request: p.Stat | p.List | p.Evict | p.Clear
    ) -> list[dict[str, int | float | str]]:
        state = self.sessions
        if isinstance(request, p.Stat):
            return [self._stat()]
        if state is None:
            return [] if isinstance(request, p.List) else [{"chunks": 0}]
        if isinstance(request, p.Clear):
            return [{"chunks": state.clear(session, request.namespace, request.begun)}]
        found = [key for key in state.cache.all_keys() if key.startswith(request.prefix)]
        if isinstance(request, p.List):
            return [dict(row) for row in state.cache.describe_chunks(found[: request.limit])]
        return [{"chunks": state.cache.drop(found)}]

    def _stat(self) -> dict[str, int | float | str]:
        row: dict[str, int | float | str] = {
            "pid": os.getpid(), "uptime_s": time.time() - self.started, "connections": len(self.connections),
            "capacity_nbytes": self.config.capacity_nbytes, "arena": str(self.config.arena_path), "bad_frames": self.bad_frames,
        }  # fmt: skip
        if self.sessions is not None:
            row |= self.sessions.usage()
        if self._remote is not None:
            row |= self._remote.usage()
        return row

    def _publish_changes(self) -> None:
        if self.sessions is None:
            return
        changes = self.sessions.cache.take_changes()
        if not changes.ready:
            return
        there, gone = changes.added, changes.removed
        for begin in range(0, max(len(there), len(gone)), PAGE_KEYS):
            page = slice(begin, begin + PAGE_KEYS)
            frame = p.encode(p.Changed(p.join_keys(there[page]), p.join_keys(gone[page])))
            for connection in list(self.connections):
                if connection.index:
                    connection.send_frame(frame)


def _pages(keys: list[bytes]) -> list[tuple[bool, bytes]]:
    return [(at == 0, p.join_keys(keys[at : at + PAGE_KEYS])) for at in range(0, max(1, len(keys)), PAGE_KEYS)]


def serve(config: NodeConfig, ready: Callable[[], None] = lambda: None) -> None:
    """Run a daemon until SIGTERM or SIGINT; `ready` is called when engines can connect. Raises ConfigError or ArenaError."""

    async def main() -> None:
        server = Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        await server.run(ready)

    asyncio.run(main())
