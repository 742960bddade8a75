"""The daemon: one per node and trust domain. Owns the arena, the index and the policy; answers on a Unix socket.

It has one asyncio thread. A request is decoded, carried out and answered where its bytes arrive. So the requests of one
client are carried out in order, and no lock is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial

from ...arena.file import Arena, ArenaSpec, create_or_attach
from ...arena.process_identity import process_alive
from ...arena.slots import SlotGeometry
from ...assemble import attach_remote_tier, build_cache, open_remote_store
from ...cache.manager import Cache
from ...errors import ArenaError, ConfigError
from ...metrics import CacheCounters
from ...observability.daemon_meter import DaemonMeter
from ...policy import load_policy
from ...remote.store_thread import StoreThread
from ...remote.tier import RemoteTier
from ...tiers.base import Lease
from ...tiers.slot_headers import load_checksums
from ...version import VERSION
from .. import framing
from .. import protocol as p
from ..web.endpoint import Endpoint
from ..web.start import http_files, serving_http
from .admission import Admission, Users, connections_within_file_limit
from .arena_file import SizeWatch, allocated_nbytes, claimed_arena_path, spec_of_earlier, taking_over
from .client_connection import ClientConnection
from .fair_turns import FairTurns
from .listener import Listener
from .namespace_sizes import NamespaceSizes
from .node_config import NodeConfig
from .observed_sessions import ObservedSessions
from .operator_requests import Row, rows, why_refused
from .overview import Overview
from .policy_state_file import PolicyStateFile
from .sessions import Session, Sessions
from .socket_path import exclusive_lock, listening_socket

logger = logging.getLogger("kvkern")

SWEEP_S = 0.25  # between two looks at clients, quarantine and slow requests


class Server:
    """Run it with `await run()`. `stop` ends it gracefully."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.daemon_id = secrets.token_hex(16)  # of this start; the socket and the HTTP ports show the same one
        self.connections: set[ClientConnection] = set()
        self.admission = Admission(Users(config.uids, config.gids), Users(config.operator_uids, config.operator_gids))
        self.turns = FairTurns(lambda turn: self.loop.call_soon(turn))
        self.sessions: Sessions | None = None  # None: there is no arena yet; the first engine decides the slot size
        self.bad_frames = 0
        self.endpoints: list[Endpoint] = []  # of HTTP, with the ports that the system chose
        self.meter, self.counters = DaemonMeter(), CacheCounters()  # they outlive an arena: no counter goes back
        self._started_s, self._started_at_s = time.monotonic(), time.time()
        self._arena: Arena | None = None
        self._size_watch = SizeWatch()
        self._sizes = NamespaceSizes()
        self._arena_path = config.arena_dir / config.arena_name  # until `run` has found the folder
        self._policy_state = PolicyStateFile(config.policy, config.policy_state)
        self._arena_lock = asyncio.Lock()  # held while the arena is made or replaced
        self._stopping = asyncio.Event()
        self._serving = self._draining = False
        self._limits_changed, self._limits_told_s = False, 0.0  # a writer has come, and not all are told yet
        self._unused_store: StoreThread | None = None  # the opened store, until there is an arena
        self._remote: RemoteTier | None = None
        self._waiting: dict[Future[Lease], tuple[ClientConnection, int]] = {}  # acquires that wait for the remote store
        self.overview = Overview(self)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the daemon's thread."""
        return asyncio.get_running_loop()

    @property
    def ready(self) -> bool:
        """True while engines are let in at once: not before the start is over, while an arena is made, or at the end."""
        return self._serving and not self._draining and not self._arena_lock.locked()

    # -- life ------------------------------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`. `ready` is called when engines can connect.

        Raises ConfigError or ArenaError if the socket, the policy state, the store or the arena cannot be used.
        """
        async with contextlib.AsyncExitStack() as locks:
            self.admission.max_connections = connections_within_file_limit(
                http_files(self.config.metrics, self.config.rpc)
            )
            locks.enter_context(exclusive_lock(self.config.socket, "--socket"))
            self._arena_path = locks.enter_context(claimed_arena_path(self.config.arena_dir, self.config.arena_name))
            self.endpoints = await locks.enter_async_context(serving_http(self))
            if self.config.policy_state is not None:
                locks.enter_context(exclusive_lock(self.config.policy_state, "--policy-state"))
                await asyncio.to_thread(self._policy_state.load)
            if self.config.remote is not None:
                locks.callback(self._close_unused_store)
                self._unused_store = await asyncio.to_thread(open_remote_store, self.config.remote)
                await asyncio.to_thread(load_checksums)
            await asyncio.to_thread(load_policy, self.config.policy)  # else the first engine would wait for it
            await self._take_over_arena()
            listener = Listener(
                listening_socket(self.config.socket), self.admission, lambda *who: ClientConnection(self, *who)
            )
            logger.info("kvkern: serving on %(socket)s", {"event": "serving", "socket": self.config.socket})
            self._serving = True
            ready()
            try:
                while not self._stopping.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), SWEEP_S)
                    # Each in a callback of its own: asyncio logs a fault in it, and the daemon goes on.
                    for look in (self._watch_clients, self._say_working, self._sweep, self.overview.tick):
                        self.loop.call_soon(look)
                    if self._arena is not None:
                        self._size_watch.look(self._arena)
            finally:
                listener.close()
                self.config.socket.unlink(missing_ok=True)
                await self._drain()

    def _watch_clients(self) -> None:
        """Hang up on clients that are gone or stuck. A connection outlives its process if a forked child has the socket."""
        for connection in list(self.connections):
            if connection.session is not None and not process_alive(*connection.session.process):
                connection.close("is gone, but a child of it has the socket")
            connection.watch(SWEEP_S)
        self.admission.bound_unsent(self.connections)

    def _say_working(self) -> None:
        for connection, number in self._waiting.values():
            connection.send(p.Working(number))

    def _sweep(self) -> None:
        if self.sessions is not None:
            self.sessions.sweep()
            self._send_new_limits(self.sessions)
            self._send_changes()
            self._policy_state.save_when_due()
            self._sizes.step(self.sessions.arena.spec.num_slots, self.sessions.cache.namespaces_of)

    def stop(self) -> None:
        """End gracefully: let no new clients in, and give transfers under way `drain_s` to finish."""
        self._draining = True
        self._stopping.set()

    async def _drain(self) -> None:
        for connection in list(self.connections):
            if connection.session is not None:
                connection.send(p.Draining())
        deadline = time.monotonic() + self.config.drain_s
        while self._has_transfers() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.close("was disconnected: the daemon ends")
        await asyncio.sleep(0)
        async with self._arena_lock:  # the arena may still be being made for an engine that was let in just before
            await asyncio.to_thread(self._end_remote, max(0.0, deadline - time.monotonic()))
            await self._policy_state.close()
            await self._size_watch.end()
            if self._arena is not None:
                self._arena.close()

    def _end_remote(self, drain_s: float = 0.0) -> None:
        if self._remote is not None:
            self._remote.close(drain_s)
            self._remote = None

    def _close_unused_store(self) -> None:
        if self._unused_store is not None:
            self._unused_store.close()
            self._unused_store = None

    def _has_transfers(self) -> bool:
        sessions = self.sessions.sessions.values() if self.sessions is not None else ()
        return bool(self._waiting) or any(session.leases or session.granted for session in sessions)

    # -- clients ---------------------------------------------------------------------------------------------------------

    async def open_session(self, connection: ClientConnection, hello: p.Hello) -> Session:
        """Let a client in and welcome it. Raises KvkernError with the reason if it is refused."""
        pid, uid = connection.peer.pid, connection.peer.uid
        if hello.version != p.VERSION:
            raise ConfigError(
                f"protocol version {hello.version} is not the daemon's {p.VERSION}; upgrade the older side"
            )
        if hello.geometry is not None and not self.admission.is_engine(connection.peer):
            raise ConfigError(
                f"uid {uid} may operate this cache, but not read it; let its engines in with --allow-uid {uid}"
            )
        process = connection.process
        if not process[1]:
            raise ConfigError(
                f"the daemon cannot see process {pid}, so it could not tell when the process ends; share the pid namespace "
                f"(hostPID or shareProcessNamespace in Kubernetes)"
            )
        if self._draining:
            raise ConfigError("the daemon is ending; try again when it is back")
        if hello.geometry is not None:
            await self._ensure_arena(hello.geometry.to_slots())
            if connection.closed:
                raise ConfigError("the client hung up while the arena was made; connect again")
        if self.sessions is None or self._arena is None:
            if hello.geometry is None:
                connection.send_welcome(p.Welcome(p.VERSION, os.getpid()), None)
                return Session(0, process, hello.engine, writer=False, uid=uid)
            raise ArenaError("the arena could not be made; look at the daemon's log, then restart it")
        writer = hello.index and hello.geometry is not None
        session = self.sessions.attach(process, hello.engine, writer, uid)
        if session.writer:
            self._limits_changed = True
            self._send_new_limits(self.sessions)
        try:
            self._send_welcome(connection, hello, self.sessions, self._arena)
        except BaseException:
            self.end_session(session)
            raise
        return session

    def _send_new_limits(self, state: Sessions) -> None:
        """Tell all writers that another has come: at once, but not again before the next sweep, however many come."""
        writers = [session for session in state.sessions.values() if session.writer]
        if self._limits_changed and time.monotonic() - self._limits_told_s >= SWEEP_S / 2:
            self._limits_changed, self._limits_told_s = False, time.monotonic() if writers[1:] else 0.0
            self._send_limits(writers)

    def _send_limits(self, sessions: Iterable[Session]) -> None:
        """Tell writers how many slots they may hold, now that it is less. They give back their stock above it."""
        if self.sessions is None:
            return
        told, shares = set(sessions), self.sessions.shares()
        for connection in list(self.connections):
            if connection.session in told:
                connection.session.told_limit = shares.limit(connection.session)
                connection.send(p.Granted(0, [], [], connection.session.told_limit))

    def _send_welcome(self, connection: ClientConnection, hello: p.Hello, sessions: Sessions, arena: Arena) -> None:
        geometry, num_slots = p.Geometry.from_slots(arena.spec.geometry), arena.spec.num_slots
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
            self._send_changes()
            connection.wants_index = True
            for frame in framing.changed_frames(sessions.cache.all_keys(), [], fresh=True):
                connection.send_frame(frame)

    def end_session(self, session: Session) -> None:
        """The client is gone. What it held goes into quarantine or is freed."""
        if self.sessions is not None:
            self.sessions.detach(session)
            self._send_changes()

    async def _ensure_arena(self, wanted: SlotGeometry) -> None:
        """Make the arena if there is none, or replace one that nobody uses. Raises ArenaError if its slots differ."""
        async with self._arena_lock:
            if self._arena is not None and self._arena.spec.geometry != wanted and self._arena_unused():
                await asyncio.to_thread(self._end_remote)
                self._arena.path.unlink(missing_ok=True)
                self._arena.close()
                self._arena = self.sessions = None
                self._sizes.reset()
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

    def _arena_unused(self) -> bool:
        """Return True if the arena has no clients, nothing in quarantine and no chunks."""
        state = self.sessions
        return state is None or not (state.sessions or state.quarantines or state.cache.all_keys())

    async def _take_over_arena(self) -> None:
        """Serve the arena of an earlier daemon, if there is one. Repair or remove one that is not whole.

        Raises ArenaError if the file cannot be opened or has another version. No engine has been let in by then.
        """
        spec = spec_of_earlier(self._arena_path, self.config.capacity_nbytes if self.config.resize_arena else None)
        if spec is not None:
            with taking_over(self._arena_path, spec, self.config.capacity_nbytes):
                await self._make_arena(spec)

    async def _make_arena(self, spec: ArenaSpec) -> None:
        make = partial(create_or_attach, prefault=self.config.prefault, dump=self.config.dump_arena, repair=True)
        arena = await asyncio.to_thread(make, spec, self._arena_path, progress=logger.info)
        try:
            await self._serve_arena(arena)
        except BaseException:
            await asyncio.to_thread(self._end_remote)
            arena.close()
            raise

    async def _serve_arena(self, arena: Arena) -> None:
        cache, path = await asyncio.to_thread(self._build_cache, arena), self._arena_path
        store, self._unused_store = self._unused_store, None
        self._remote = await asyncio.to_thread(
            attach_remote_tier, cache, arena, self.config.remote, self.config.policy, store, self.meter
        )
        sessions = ObservedSessions(cache, arena, self.config.quotas, self.meter)
        ready, torn = await asyncio.to_thread(sessions.adopt)
        if ready or torn:
            logger.info(
                "kvkern: %(chunks)d chunks of %(path)s are served again; %(torn)d did not verify and are freed",
                {"event": "arena_served_again", "chunks": ready, "path": path, "torn": torn},
            )
        sessions.cache.track_changes()
        self._arena, self.sessions = arena, sessions

    def _build_cache(self, arena: Arena) -> Cache:
        """Build the manager over the arena. What the policy learned in an earlier arena counts here too."""
        if self._policy_state.model is None:
            self._policy_state.load()
        cache = build_cache(
            arena, self.config.quotas.shares, self.config.policy, self._policy_state.model, self.counters, self.meter
        )
        self._policy_state.model_lock = cache.locked
        return cache

    # -- requests --------------------------------------------------------------------------------------------------------

    def handle(self, connection: ClientConnection, session: Session, request: p.Request) -> None:
        """Carry out a request and answer it. Raises ProtocolError if this client may not send it."""
        state = self.sessions
        if not connection.operator and (reason := why_refused(request, connection.described)):
            if isinstance(request, p.Clear) and session.writer:
                logger.warning(
                    "kvkern: nothing was cleared for client pid %(pid)d: %(why)s",
                    {"event": "not_cleared", "pid": connection.peer.pid, "why": reason, "request": request.id},
                )
                connection.send(p.Answer(request.id, [{"chunks": 0}]))
            else:
                connection.refuse(reason)
            return
        if isinstance(request, p.Hello):
            raise p.ProtocolError("the client sent Hello twice; open another connection")
        if isinstance(request, p.Stat | p.List | p.Evict | p.Clear):
            answer = p.Answer(request.id, rows(session, request, state, self.stat, self.overview.render))
            self._send_changes()  # before the answer, because a client may store again what it has cleared
            connection.send(answer)
        elif isinstance(request, p.Record):
            connection.wants_requests = True
        elif state is None or not session.number:
            raise p.ProtocolError(
                f"the client sent {type(request).__name__}, but has no arena; send a geometry in Hello"
            )
        elif isinstance(request, p.Acquire):
            keys = framing.split_keys(request.keys)
            found = state.acquire_soon(session, keys, request.prefix, p.to_use(request, session.number))
            if found.done():
                self._send_lease(state, connection, session, request, found.result())
            else:
                self._send_lease_later(state, connection, session, request, found)
        elif isinstance(request, p.Release):
            state.release(session, request.leases)
        elif isinstance(request, p.Grant):
            granted = state.grant(session, 0 if self._draining else request.count)
            self._send_changes()
            session.told_limit = 0 if self._draining else state.limit(session)
            connection.send(p.Granted(request.id, list(granted.slots), list(granted.generations), session.told_limit))
            if above := state.above_limit():
                self._send_limits(above)
        elif isinstance(request, p.Publish):
            keys, chain = framing.split_keys(request.keys), framing.split_keys(request.chain)
            use = p.to_use(request, session.number)
            done = state.publish(session, request.namespace, request.slots, request.generations, keys, chain, use)
            self._send_changes()  # before the acknowledgement: every client must have been sent the change by then
            connection.send(p.Published(request.id, done))
        elif isinstance(request, p.GiveBack):
            state.give_back(session, request.slots)
        elif isinstance(request, p.Finish):
            state.cache.note_prefill(request.prefill_tokens_s, session.number)
            if request.request:
                state.cache.finish(p.to_use(request, session.number))
                self._send_recorded(request)
        elif isinstance(request, p.Settle):
            state.settle(session)
        else:
            connection.described.put(request.root, None)
            connection.send(p.Described(request.id, state.describe(session, request.root, request.fields)))
        self._send_changes()

    def _send_lease_later(
        self, state: Sessions, connection: ClientConnection, session: Session, request: p.Acquire, found: Future[Lease]
    ) -> None:
        """Answer when the remote store has answered. Until then `run` sends Working, so the client does not give up."""
        self._waiting[found] = connection, request.id
        loop = self.loop

        def on_found(found: Future[Lease]) -> None:
            loop.call_soon_threadsafe(send_lease)

        def send_lease() -> None:
            self._waiting.pop(found, None)
            self._send_lease(state, connection, session, request, found.result())
            self._send_changes()

        found.add_done_callback(on_found)

    def _send_lease(
        self, state: Sessions, connection: ClientConnection, session: Session, request: p.Acquire, lease: Lease
    ) -> None:
        number, lease = state.lend(session, lease)
        if request.prefix:
            self.overview.hot.note(lease.keys)
        rows, slots, fingerprints = state.places(lease, [] if request.prefix else framing.split_keys(request.keys))
        connection.send(p.Acquired(request.id, number, rows, slots, fingerprints))

    def _send_recorded(self, ended: p.Finish) -> None:
        """Send a request that has ended to the clients that record."""
        if not (listeners := [connection for connection in self.connections if connection.wants_requests]):
            return
        recorded = p.Recorded(
            time.time() - ended.age_s, ended.keys, ended.prompt_tokens, ended.output_tokens, ended.stop, ended.session
        )
        frame = framing.encode(recorded)
        for connection in listeners:
            connection.send_frame(frame)

    def stat(self) -> Row:
        """Return the row that answers Stat."""
        row: Row = {
            "daemon": self.daemon_id, "name": self.config.name, "version": VERSION,
            "policy": self.config.policy, "started_s": self._started_at_s,
            "pid": os.getpid(), "uptime_s": time.monotonic() - self._started_s, "connections": len(self.connections),
            "capacity_nbytes": self.config.capacity_nbytes, "arena": str(self._arena_path), "bad_frames": self.bad_frames,
            "arena_nbytes": allocated_nbytes(self._arena_path), "waiting_acquires": len(self._waiting),
            **self.counters.snapshot(),  # they outlive an arena, and are there while another is made
        }  # fmt: skip
        if self.sessions is not None:
            row |= self.sessions.usage()
        if self._remote is not None:
            row |= self._remote.usage()
        return row

    def namespace_chunks(self) -> Mapping[bytes, int]:
        """Return the number of cached chunks of each namespace root, as of the last count."""
        return self._sizes.chunks

    def _send_changes(self) -> None:
        """Send every client with an index what the index has gained and lost since the last call."""
        if self.sessions is None:
            return
        changes = self.sessions.cache.take_changes()
        if not changes.ready:
            return
        for frame in framing.changed_frames(changes.added, changes.removed):
            for connection in list(self.connections):
                if connection.wants_index:
                    connection.send_frame(frame)


def serve(config: NodeConfig, ready: Callable[[], None] = lambda: None) -> None:
    """Run a daemon until SIGTERM, SIGINT, or the SIGHUP of a closed terminal, which nohup switches off.

    `ready` is called when engines can connect. Raises ConfigError or ArenaError.
    """
    ending = {signal.SIGTERM, signal.SIGINT}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ending.add(signal.SIGHUP)

    async def main() -> None:
        server = Server(config)
        for number in ending:
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        await server.run(ready)

    asyncio.run(main())
