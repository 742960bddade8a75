"""Redis and Valkey as a remote store: a value is one string, read and written without a copy of its own.

    redis://user:password@host:6379/0        valkey:// is the same
    rediss://...                             with TLS, as is valkeys://
    redis+cluster://host:7000                a cluster, by any of its servers; rediss+cluster://, valkey+cluster:// ...

    option                           default  meaning
    password_file=PATH                        the password, instead of in the URL
    connections=N                    2        per server, for gets and again for puts, 1..16; in a cluster 1
    prefix=TEXT                               in front of every key
    ttl=SECONDS                               values go away by themselves; none: when the server evicts them
    socket=PATH                               a Unix socket, `redis:///0?socket=/run/redis.sock`
    seeds=HOST:PORT,HOST:PORT                 more servers of the cluster, should the first be gone at the start
    ca_file=PATH                     system   who signs the server's certificate
    cert_file=PATH, key_file=PATH             ours, if the server wants one
    verify=yes|no                    yes      no: any certificate will do

The server should evict: `maxmemory 64gb`, `maxmemory-policy allkeys-lru`, no persistence. Full and told not to evict, it
takes no value and `put` says so. A value may have 512 MiB (its proto-max-bulk-len). Rights needed: +get +set +exists
+unlink ~PREFIXkvkern*, in a cluster +cluster|slots.

Of a server that fails, in a cluster or in the middle of a call, the keys are UNKNOWN, or None; what others, or it before,
have answered is good. RemoteError is for calls that nobody has answered, and for a `delete` that is not done.
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
from .connection import Address, Dialer, RefusedError
from .servers import Cluster, OneServer, RedisServer, RedisServers

_PORT = 6379
_OPEN_S = 5.0
_CLUSTER_THREADS = 16
_WORTH_NBYTES = 2 << 20  # what is worth a connection of its own
_TLS_OPTIONS = ("ca_file", "cert_file", "key_file", "verify")
_OPTIONS = ("connections", "prefix", "ttl", "socket", "seeds", *_TLS_OPTIONS)

T = TypeVar("T")
Job = tuple[RedisServer, ConnectionShare]


class RedisStore:
    """`RemoteStore` over servers of either kind."""

    def __init__(self, nodes: RedisServers, prefix: str, ttl_s: int, connections: int, threads: int) -> None:
        self._nodes = nodes
        self._prefix = prefix
        self._ttl_s = ttl_s
        self._connections = connections
        # Each has its own, so that a question never waits behind gigabytes, nor a read behind writes.
        self._gets = BlockingCalls(threads, "redis-get")
        self._puts = BlockingCalls(threads, "redis-put")
        self._asks = BlockingCalls(threads, "redis-ask")

    async def open(self) -> None:
        try:
            await self._asks.run(partial(self._open, time.monotonic() + _OPEN_S))
        except RefusedError as error:
            raise ConfigError(str(error)) from error

    async def close(self) -> None:
        for threads in (self._gets, self._puts, self._asks):
            threads.close()
        self._nodes.close()

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
        self._nodes.refresh(deadline)
        name = self._names([secrets.token_bytes(32)])[0]
        for server, _ in self._nodes.parts([name]):
            server.probe(name, self._nodes.cluster, deadline)

    async def _call(self, threads: BlockingCalls, batch: KeyBatch[T], connections: int, timeout_s: float) -> list[T]:
        deadline = time.monotonic() + timeout_s
        if not batch.names:
            return []
        batch.cluster = self._nodes.cluster
        if self._nodes.stale():
            await threads.run(partial(self._nodes.refresh, deadline))
        jobs = [
            job
            for server, indices in self._nodes.parts(batch.names)
            for job in _jobs(server, batch, indices, connections, deadline)
        ]
        errors = await self._run(threads, jobs)
        if batch.redirects:
            self._nodes.failed(None)
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
            for job in _jobs(self._nodes.server(address), batch, indices, 1, deadline, asking)
        ]

    async def _run(self, threads: BlockingCalls, jobs: Sequence[Job]) -> list[RemoteError]:
        """Do all, also after one has failed: the caller's memory is in use until the last has ended."""
        calls = [threads.run(partial(server.work, share)) for server, share in jobs]
        errors = []
        for (server, _), end in zip(jobs, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(end, RemoteError):
                errors.append(end)
                self._nodes.failed(server.address)
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
    """A server's keys as one share, and as many connections on it as are worth it."""
    nbytes = sum(map(batch.cost, indices))
    count = max(1, min(connections, len(indices), nbytes // _WORTH_NBYTES))
    window_nbytes = max(1, min(WINDOW_NBYTES, nbytes // count))  # so that the first one does not take all
    return [(server, ConnectionShare(batch, deque(indices), window_nbytes, deadline, asking))] * count


# -- URL ---------------------------------------------------------------------------------------------------------------


def make(url: RemoteUrl) -> RemoteStore:
    """Of a URL. Raises ConfigError."""
    url.check_options(*_OPTIONS)
    base, _, kind = url.scheme.partition("+")
    cluster, tls = kind == "cluster", base in ("rediss", "valkeys")
    prefix = url.text("prefix")
    if cluster and "{" in prefix:
        raise ConfigError(f"prefix of {url} is {prefix!r}: with a brace in it one server would get all; leave it out")
    address = _address(url)
    dialer = Dialer(url.user, url.password, _database(url, cluster), url.text("socket"), _tls(url) if tls else None)
    if not tls and (given := [name for name in _TLS_OPTIONS if name in url.options]):
        raise ConfigError(f"{given[0]} of {url} is for TLS; say {base}s{url.scheme[len(base) :]}://")
    if dialer.socket_path and (url.host or cluster or tls):
        raise ConfigError(f"socket of {url} is another place than its host; say redis:///0?socket=PATH")
    seeds = _seeds(url)
    if seeds and not cluster:
        raise ConfigError(f"seeds of {url} is for clusters; say {url.scheme}+cluster://")
    connections = url.integer("connections", 1 if cluster else 2, 1, 16)
    nodes = Cluster(dialer, [address, *seeds]) if cluster else OneServer(dialer, address)
    threads = max(_CLUSTER_THREADS, connections) if cluster else connections
    return RedisStore(nodes, prefix, url.integer("ttl", 0, 1, 1 << 31), connections, threads)


def _address(url: RemoteUrl) -> Address:
    if not url.host and "socket" not in url.options:
        raise ConfigError(f"remote URL {url} names no host; say {url.scheme}://HOST:{_PORT}")
    return url.host, url.port or _PORT


def _seeds(url: RemoteUrl) -> list[Address]:
    seeds = []
    for text in filter(None, url.text("seeds").split(",")):
        host, _, port = text.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise ConfigError(f"seeds of {url} holds {text!r}; expected HOST:PORT,HOST:PORT")
        seeds.append((host.strip("[]"), int(port)))
    return seeds


def _database(url: RemoteUrl, cluster: bool) -> int:
    text = url.path.strip("/") or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise ConfigError(f"remote URL {url} names the database {text!r}; expected a number, most often /0")
    if cluster and int(text):
        raise ConfigError(f"remote URL {url} names the database {text}; a cluster has only /0")
    return int(text)


def _tls(url: RemoteUrl) -> dict[str, Any]:
    files = {name: url.text(name) for name in ("ca_file", "cert_file", "key_file")}
    for name, path in files.items():
        if path and not Path(path).is_file():
            raise ConfigError(f"{name} of {url} is {path!r}, which is no file; name one in PEM format")
    if files["key_file"] and not files["cert_file"]:
        raise ConfigError(f"key_file of {url} has no cert_file beside it; give both, or neither")
    verify = url.flag("verify", True)
    return {
        "ssl_cert_reqs": "required" if verify else "none", "ssl_check_hostname": verify,
        "ssl_ca_certs": files["ca_file"] or None, "ssl_certfile": files["cert_file"] or None,
        "ssl_keyfile": files["key_file"] or None,
    }  # fmt: skip
