"""Mooncake Store: values lie in memory that the nodes contribute, and move from node to node without a copy.

    mooncake://master-host:50051?segment=64GiB&protocol=rdma&devices=mlx5_0,mlx5_1

    option            default       meaning
    segment=SIZE      1GiB          memory this node contributes; 0: it only uses memory of other nodes
    protocol=NAME     tcp           or rdma
    devices=A,B       all           RDMA devices
    host=ADDRESS                    of this node, for the others; by default that of the route to the master
    metadata=URL      P2PHANDSHAKE  how nodes find each other: directly, or by a metadata server, http://host:8080/metadata
    buffer=SIZE       0             memory the library needs to read values that the master moved to disk
    replicas=N        1             copies of each value this node writes
    threads=N         4             for reads, as many again for writes; the library keeps a core busy in each thread that
                                    waits for a peer
    logs=yes|no       no            no: mute the library's log, which goes to the process's stderr, errors included

Whoever reaches the port of a node can read and write the segment that the node contributes: Mooncake has no passwords. Use
it in closed networks only. The tier verifies values. Over TCP, kvkern's own memory is never open to others.

Before each call the store checks that the master is alive, over its own connection: the library notices a dead master after
4 s and a frozen one after 30 s. A call ends soon after its timeout, with one exception, since the library owns the memory
until it returns: if the peer of a `get` or `put` freezes, or the master freezes during it, the call ends after 30 to 60 s.
(MC_RPC_TIMEOUT_MS and MC_TCP_STATUS_TIMEOUT_SEC in the environment shorten most of that.) When every thread hangs like that,
further calls fail at once. A call that took all of the 60 s costs this node its segment, see client.py.

A master that restarts has forgotten everything: the values are gone, and the nodes contribute their segments again within
seconds. A node that leaves takes its values with it. Until the master notices, after its client_ttl, these values exist but
cannot be read, and some writes fail. Keys that fail are UNKNOWN or None. A call raises only if no key was answered.
"""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import md5
from typing import TypeVar

from ....errors import ConfigError
from ..base import Got, Parts, RemoteError, value_name
from ..blocking_calls import BlockingCalls
from ..url import RemoteUrl, format_address
from .client import MooncakeClient, RefusedError, Settings, own_address

_PORT = 50051
_OPEN_S = 10.0
_RETRY_S = 1.0  # seconds between two attempts to connect
_REFUSED_RETRY_S = 30.0  # added after a refusal by the library, which stops the whole process for a second
_ASK_THREADS = 2  # for exists and delete
_SEGMENT_NBYTES = 1 << 30
_PEER_TO_PEER = "P2PHANDSHAKE"
_MAX_REPLICAS, _MAX_THREADS = 64, 64
_OPTIONS = ("segment", "protocol", "devices", "host", "metadata", "buffer", "replicas", "threads", "logs")

# Mooncake's RPC (coro_rpc). A request: magic, version, serialisation, kind, number, hash of the function's name, lengths.
_MAGIC = 21
_READY = md5(b"mooncake::WrappedMasterService::ServiceReady", usedforsecurity=False).digest()
_READY_REQUEST = struct.pack("<BBBBIIII", _MAGIC, 0, 0, 0, 1, int.from_bytes(_READY[:4], "big"), 0, 0)
_REPLY = struct.Struct("<BBBBIII")  # magic, version, error, kind, number, lengths
_MAX_REPLY_NBYTES = 4096

T = TypeVar("T")


def make(url: RemoteUrl) -> MooncakeStore:
    """Make the store of a URL. Raises ConfigError for a wrong URL or option."""
    url.check_options(*_OPTIONS)
    if not url.host or url.user or url.password or url.path.strip("/"):
        raise ConfigError(f"{url} does not name a Mooncake master. Say mooncake://host:{_PORT}?options")
    protocol = url.text("protocol", "tcp")
    if protocol not in ("tcp", "rdma"):
        raise ConfigError(f"protocol of {url} is {protocol!r}. Give tcp or rdma")
    if url.text("devices") and protocol != "rdma":
        raise ConfigError(f"devices of {url} are only for protocol=rdma. Say protocol=rdma, or leave devices out")
    metadata = url.text("metadata", _PEER_TO_PEER)
    if metadata != _PEER_TO_PEER and not metadata.startswith(("http://", "https://")):
        # Another value may make the library end the process.
        raise ConfigError(f"metadata of {url} is {metadata!r}. Give {_PEER_TO_PEER} or http://host:8080/metadata")
    master = MooncakeMaster(url.host, url.port or _PORT)
    threads = url.integer("threads", 4, 1, _MAX_THREADS)
    settings = Settings(
        master=str(master),
        host=url.text("host"),
        metadata=metadata,
        protocol=protocol,
        devices=url.text("devices"),
        segment_nbytes=0 if url.text("segment") == "0" else url.nbytes("segment", _SEGMENT_NBYTES),
        buffer_nbytes=0 if url.text("buffer", "0") == "0" else url.nbytes("buffer", 0),
        replicas=url.integer("replicas", 1, 1, _MAX_REPLICAS),
        logs=url.flag("logs", False),
        calls=2 * threads,
    )
    return MooncakeStore(master, settings, threads)


class MooncakeStore:
    """`RemoteStore` over a cluster of nodes. Use `make`."""

    def __init__(self, master: MooncakeMaster, settings: Settings, threads: int) -> None:
        self._master = master
        self._settings = settings
        self._gets = ClientLane("get", threads)
        self._puts = ClientLane("put", threads)
        self._asks = ClientLane("ask", _ASK_THREADS)
        self._setup = BlockingCalls(1, "mooncake-setup")
        self._client: MooncakeClient | None = None
        self._connecting: asyncio.Task[MooncakeClient] | None = None
        self._retry_at = 0.0
        self._memories: list[memoryview] = []
        self._stop_waiting = threading.Event()

    async def open(self) -> None:
        try:
            await self._connected(asyncio.get_running_loop().time() + _OPEN_S)
        except RefusedError as error:
            raise ConfigError(str(error)) from error

    async def close(self) -> None:
        self._stop_waiting.set()
        if self._connecting is not None:
            await asyncio.wait({self._connecting})
        for lane in (self._gets, self._puts, self._asks):
            await lane.close()
        if self._client is not None:
            await self._setup.run(self._client.close)
        self._setup.close()
        self._master.close()

    async def register(self, memory: memoryview) -> None:
        self._memories.append(memory)
        if self._client is not None:
            try:
                await self._register(self._client)
            except RefusedError as error:
                raise ConfigError(str(error)) from error

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool | None]:
        names = [value_name(key) for key in keys]
        return await self._call(self._asks, lambda client, _: client.exists(names), timeout_s)

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        names = [value_name(key) for key in keys]
        return await self._call(self._gets, lambda client, end: client.get(names, into, end), timeout_s, True)

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool | None]:
        names = [value_name(key) for key in keys]
        return await self._call(self._puts, lambda client, end: client.put(names, values, end), timeout_s, True)

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        names = [value_name(key) for key in keys]
        await self._call(self._asks, lambda client, _: client.delete(names), timeout_s)

    async def _call(
        self,
        lane: ClientLane,
        work: Callable[[MooncakeClient, float], T],  # gets the time (monotonic) after which it begins nothing
        timeout_s: float,
        memory: bool = False,
    ) -> T:
        deadline, end = asyncio.get_running_loop().time() + timeout_s, time.monotonic() + timeout_s
        client = await self._connected(deadline)
        await self._master.check_alive(deadline)
        return await lane.run(partial(work, client, end), deadline, memory)

    async def _connected(self, deadline: float) -> MooncakeClient:
        """Return the client; connect if there is none. One attempt at a time, at most one per second."""
        if self._client is not None and not self._client.closing:
            return self._client
        loop = asyncio.get_running_loop()
        if self._connecting is None:
            if loop.time() < self._retry_at:
                wait_s = self._retry_at - loop.time()
                raise RemoteError(f"{self._master} could not be reached; the next attempt is in {wait_s:.0f} s")
            self._retry_at = loop.time() + _RETRY_S
            self._connecting = loop.create_task(self._connect())
            self._connecting.add_done_callback(self._has_connected)
        connecting = self._connecting
        await asyncio.wait({connecting}, timeout=max(0.0, deadline - loop.time()))
        if not connecting.done():
            raise RemoteError(f"{self._master} is not connected yet")
        return connecting.result()

    def _has_connected(self, task: asyncio.Task[MooncakeClient]) -> None:
        self._connecting = None
        if not task.cancelled() and isinstance(task.exception(), RefusedError):
            self._retry_at += _REFUSED_RETRY_S

    async def _connect(self) -> MooncakeClient:
        await self._master.check_alive(asyncio.get_running_loop().time() + _OPEN_S)
        host = self._settings.host or await self._setup.run(self._master.own_address)
        client = await self._setup.run(partial(MooncakeClient, replace(self._settings, host=host), self._stop_waiting))
        try:
            await self._register(client)
        except RemoteError:
            await self._setup.run(client.close)
            raise
        self._client = client
        return client

    async def _register(self, client: MooncakeClient) -> None:
        while (done := len(client.memories)) < len(self._memories):
            await self._setup.run(partial(client.register, self._memories[done]))


class ClientLane:
    """Threads for calls of one kind. A late call is not waited for, unless it uses the caller's memory."""

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count
        self._threads = BlockingCalls(count, f"mooncake-{name}")
        self._free = asyncio.Semaphore(count)
        self._ends: dict[object, float] = {}  # call under way -> when it should end
        self._tasks: set[asyncio.Task[object]] = set()

    async def run(self, work: Callable[[], T], deadline: float, memory: bool) -> T:
        """Run `work` in a thread; with `memory` wait for its end in any case.

        Raises RemoteError if no thread gets free by `deadline`, or if `work` has not ended by then.
        """
        loop = asyncio.get_running_loop()
        if self._free.locked() and max(self._ends.values(), default=deadline) < loop.time():
            raise RemoteError(
                f"Mooncake: all {self._count} threads of {self._name} hang until the library ends their calls"
            )
        try:
            async with asyncio.timeout_at(deadline):
                await self._free.acquire()
        except TimeoutError as error:
            raise RemoteError(f"Mooncake: all {self._count} threads of {self._name} are busy") from error
        if memory:
            return await self._run(work, deadline)
        task = loop.create_task(self._run(work, deadline))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait({task}, timeout=max(0.0, deadline - loop.time()))
        if not task.done():
            raise RemoteError(f"Mooncake has not answered in time ({self._name})")
        return task.result()

    async def close(self) -> None:
        """Wait for the calls under way, then end the threads."""
        for _ in range(self._count):
            await self._free.acquire()
        self._threads.close()

    async def _run(self, work: Callable[[], T], deadline: float) -> T:
        token = object()
        self._ends[token] = deadline
        try:
            return await self._threads.run(work)
        finally:
            del self._ends[token]
            self._free.release()

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # read it, so that asyncio does not report it


class MooncakeMaster:
    """A connection to the master, to check that it is alive: `ServiceReady` of its RPC, 20 bytes."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def __str__(self) -> str:
        return format_address(self._host, self._port)

    def own_address(self) -> str:
        return own_address(self._host, self._port)

    async def check_alive(self, deadline: float) -> None:
        """Wait until the master answers. Raises RemoteError, or RefusedError if another server answers."""
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                if self._streams is not None:
                    with suppress(OSError, EOFError):  # the master was restarted, or the connection was idle for long
                        await self._exchange()
                        return
                await self._exchange()
        except TimeoutError as error:
            raise RemoteError(f"the Mooncake master {self} does not answer") from error
        except (OSError, EOFError) as error:
            raise RemoteError(f"the Mooncake master {self} cannot be reached: {error}") from error

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()

    async def _exchange(self) -> None:
        streams, self._streams = self._streams, None
        reader, writer = streams or await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(_READY_REQUEST)
            magic, _, _, _, _, length, more = _REPLY.unpack(await reader.readexactly(_REPLY.size))
            if magic != _MAGIC or length + more > _MAX_REPLY_NBYTES:
                raise RefusedError(
                    f"{self} answers, but is not a Mooncake master. Give the master's RPC port, by default {_PORT}"
                )
            await reader.readexactly(length + more)
            self._streams = reader, writer
        finally:
            if self._streams is None:
                writer.close()
