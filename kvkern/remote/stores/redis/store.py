"""Redis and Valkey as a remote store: a value is one string, read and written without an extra copy.

    redis://user:password@host:6379/0        valkey:// is the same
    rediss://...                             with TLS, as is valkeys://
    redis+cluster://host:7000                a cluster, named by any of its servers; rediss+cluster://, valkey+cluster:// ...

    option                           default  meaning
    password_file=PATH                        the password, instead of in the URL
    password_env=NAME                         the environment variable that has the password
    connections=N                    2        per server, for gets and again for puts, 1..16; in a cluster 1
    prefix=TEXT                               text in front of every key
    ttl=SECONDS                               values expire after this; none: when the server evicts them
    socket=PATH                               a Unix socket, `redis:///0?socket=/run/redis.sock`
    seeds=HOST:PORT,HOST:PORT                 more servers of the cluster, in case the first is gone at the start
    ca_file=PATH                     system   the authorities that may sign the server's certificate
    cert_file=PATH, key_file=PATH             the client's certificate, if the server wants one
    verify=yes|no                    yes      no: accept any certificate

Let the server evict: `maxmemory 64gb`, `maxmemory-policy allkeys-lru`, no persistence. A full server that does not evict
takes no value, and `put` reports that. A value may have 512 MiB (the server's proto-max-bulk-len). Rights needed: +get +set
+exists +unlink ~PREFIXkvkern*, in a cluster also +cluster|slots.

If a server fails, in a cluster or in the middle of a call, its unanswered keys are UNKNOWN or None. Answers that came from
it before, or from other servers, are valid. A call raises RemoteError if no key was answered, and a `delete` raises it if
any key was not deleted.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ....errors import ConfigError
from ..base import Got, Parts, RemoteError, RemoteStore, value_name
from ..blocking_calls import BlockingCalls
from ..url import RemoteUrl
from .batch import WINDOW_NBYTES, AskBatch, ConnectionShare, GetBatch, KeyBatch, PutBatch
from .connection import Address, Dialer, RefusedError, Tls
from .servers import Cluster, OneServer, RedisServer, RedisServers

_PORT = 6379
_OPEN_S = 5.0
_CLUSTER_THREADS = 16
_WORTH_NBYTES = 2 << 20  # bytes of a call that are worth one more connection
_TLS_OPTIONS = ("ca_file", "cert_file", "key_file", "verify")
_OPTIONS = ("connections", "prefix", "ttl", "socket", "seeds", *_TLS_OPTIONS)

T = TypeVar("T")
Job = tuple[RedisServer, ConnectionShare]


class RedisStore:
    """`RemoteStore` over one server or a cluster. Use `make`."""

    def __init__(self, servers: RedisServers, prefix: str, ttl_s: int, connections: int, threads: int) -> None:
        self._servers = servers
        self._prefix = prefix
        self._ttl_s = ttl_s
        self._connections = connections
        # Separate threads, so that a question never waits behind gigabytes, and a read never behind writes.
        self._gets = BlockingCalls(threads, "redis-get")
        self._puts = BlockingCalls(threads, "redis-put")
        self._asks = BlockingCalls(threads, "redis-ask")

    async def open(self) -> None:
        try:
            await self._asks.run(partial(self._open, time.monotonic() + _OPEN_S))
        except RefusedError as error:
            raise ConfigError(str(error)) from error

    def interrupt(self) -> None:
        self._servers.interrupt()

    async def close(self) -> None:
        for threads in (self._gets, self._puts, self._asks):
            threads.close()
        self._servers.close()

    async def register(self, memory: memoryview) -> None:
        pass

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool | None]:
        return await self._call(self._asks, AskBatch(self._names(keys), b"EXISTS"), 1, timeout_s)

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        return await self._call(self._gets, GetBatch(self._names(keys), into), self._connections, timeout_s)

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool | None]:
        batch = PutBatch(self._names(keys), values, self._ttl_s)
        return await self._call(self._puts, batch, self._connections, timeout_s)

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        await self._call(self._asks, AskBatch(self._names(keys), b"UNLINK"), 1, timeout_s)

    def _names(self, keys: Sequence[bytes]) -> list[bytes]:
        return [f"{self._prefix}{value_name(key)}".encode() for key in keys]

    def _open(self, deadline: float) -> None:
        self._servers.refresh(deadline)
        name = self._names([secrets.token_bytes(32)])[0]
        for server, _ in self._servers.keys_by_server([name]):
            server.probe(name, self._servers.cluster, deadline)

    async def _call(self, threads: BlockingCalls, batch: KeyBatch[T], connections: int, timeout_s: float) -> list[T]:
        deadline = time.monotonic() + timeout_s
        if not batch.names:
            return []
        batch.cluster = self._servers.cluster
        if self._servers.needs_refresh():
            await threads.run(partial(self._servers.refresh, deadline))
        jobs = [
            job
            for server, indices in self._servers.keys_by_server(batch.names)
            for job in _jobs(server, batch, indices, connections, deadline)
        ]
        errors = await self._run(threads, jobs)
        if batch.redirects:
            self._servers.note_failure(None)
            errors += await self._run(threads, self._redirected(batch, deadline))
        return batch.outcome(errors)

    def _redirected(self, batch: KeyBatch[Any], deadline: float) -> list[Job]:
        batch.redirected = True
        targets: dict[tuple[Address, bool], list[int]] = {}
        for redirect in sorted(batch.redirects, key=lambda redirect: redirect.index):
            targets.setdefault((redirect.address, redirect.asking), []).append(redirect.index)
        return [
            job
            for (address, asking), indices in targets.items()
            for job in _jobs(self._servers.server_at(address), batch, indices, 1, deadline, asking)
        ]

    async def _run(self, threads: BlockingCalls, jobs: Sequence[Job]) -> list[RemoteError]:
        """Run all jobs, also after one has failed. Returns their errors. The caller's memory is in use until the last ends."""
        calls = [threads.run(partial(server.run, share)) for server, share in jobs]
        errors = []
        for (server, _), end in zip(jobs, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(end, RemoteError):
                errors.append(end)
                self._servers.note_failure(server.address)
            elif end is not None:
                raise end
        return errors


def _jobs(
    server: RedisServer,
    batch: KeyBatch[Any],
    indices: list[int],
    connections: int,
    deadline: float,
    asking: bool = False,
) -> list[Job]:
    """Return a server's keys as one share, once for every connection that is worth opening."""
    nbytes = sum(map(batch.cost, indices))
    count = max(1, min(connections, len(indices), nbytes // _WORTH_NBYTES))
    window_nbytes = max(1, min(WINDOW_NBYTES, nbytes // count))  # so that the first connection does not take all keys
    return [(server, ConnectionShare(batch, deque(indices), window_nbytes, deadline, asking))] * count


# -- URL ---------------------------------------------------------------------------------------------------------------


def make(url: RemoteUrl) -> RemoteStore:
    """Make the store of a URL. Raises ConfigError."""
    url.check_options(*_OPTIONS)
    base, _, kind = url.scheme.partition("+")
    cluster, tls = kind == "cluster", base in ("rediss", "valkeys")
    prefix = url.text("prefix")
    if cluster and "{" in prefix:
        raise ConfigError(f"prefix of {url} is {prefix!r}. A brace would send every key to one server. Leave it out")
    address = _address(url)
    dialer = Dialer(url.user, url.password, _database(url, cluster), url.text("socket"), _tls(url) if tls else None)
    if not tls and (given := [name for name in _TLS_OPTIONS if name in url.options]):
        raise ConfigError(f"{given[0]} of {url} is only for TLS. Say {base}s{url.scheme[len(base) :]}://")
    if dialer.socket_path and (url.host or cluster or tls):
        raise ConfigError(
            f"{url} has a socket and also a host, a cluster or TLS. With a socket say redis:///0?socket=PATH"
        )
    seeds = _seeds(url)
    if seeds and not cluster:
        raise ConfigError(f"seeds of {url} is only for clusters. Say {url.scheme}+cluster://")
    connections = url.integer("connections", 1 if cluster else 2, 1, 16)
    servers = Cluster(dialer, [address, *seeds]) if cluster else OneServer(dialer, address)
    threads = max(_CLUSTER_THREADS, connections) if cluster else connections
    return RedisStore(servers, prefix, url.integer("ttl", 0, 1, 1 << 31), connections, threads)


def _address(url: RemoteUrl) -> Address:
    if not url.host and "socket" not in url.options:
        raise ConfigError(f"The remote URL {url} names no host. Say {url.scheme}://HOST:{_PORT}")
    return url.host, url.port or _PORT


def _seeds(url: RemoteUrl) -> list[Address]:
    seeds = []
    for text in filter(None, url.text("seeds").split(",")):
        host, _, port = text.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise ConfigError(f"seeds of {url} contains {text!r}. Give HOST:PORT,HOST:PORT")
        seeds.append((host.strip("[]"), int(port)))
    return seeds


def _database(url: RemoteUrl, cluster: bool) -> int:
    text = url.path.strip("/") or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise ConfigError(f"The remote URL {url} names the database {text!r}. Give a number, usually /0")
    if cluster and int(text):
        raise ConfigError(f"The remote URL {url} names the database {text}, but a cluster has only /0. Leave it out")
    return int(text)


def _tls(url: RemoteUrl) -> Tls:
    files = {name: url.text(name) for name in ("ca_file", "cert_file", "key_file")}
    for name, path in files.items():
        if path and not Path(path).is_file():
            raise ConfigError(f"{name} of {url} is {path!r}, which is not a file. Name a file in PEM format")
    if files["key_file"] and not files["cert_file"]:
        raise ConfigError(f"{url} has key_file but no cert_file. Give both or neither")
    return Tls(**files, verify=url.flag("verify", True))
