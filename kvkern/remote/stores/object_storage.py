"""Object stores: a value is an object. Amazon S3 and whatever speaks its protocol, Google Cloud Storage, Azure Blob Storage.

    s3://bucket/prefix?region=eu-central-1&endpoint=http://minio:9000&virtual_hosted=no&concurrency=64
    gs://bucket/prefix?service_account=PATH      az://container/prefix?account=NAME      s3://key_id:secret@bucket

    put     one PUT of header and payload, sent from the caller's memory    get     GET; the size is known before the body
    exists  HEADs side by side                                             delete  bulk where there is a request for that

Credentials are what obstore finds by itself (environment, instance role, workload identity) or those of the URL: user and
password are S3's access key id and secret, Azure's account and its key. The rights needed are to get, put, list and
delete: without the right to list, S3 says "forbidden" of an object that is not there.

A body comes in pieces, which obstore joins and this copies to where the caller wants it, on a thread. Bodies are sent
unsigned, which spares a SHA-256: TLS guards them on the way, and the tier verifies the checksums of all it gets.
Requests are repeated a few times within seconds. An object that fails after that is UNKNOWN, or None, and nothing more is
begun; what is not done by the end of a call is cancelled. A cancelled PUT may read the caller's memory for some moments
more, so the call waits until every view that it gave away has come back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, S3Store

from ...errors import ConfigError
from .base import Got, Parts, RemoteError, answered, answered_get, value_name
from .blocking_calls import BlockingCalls
from .url import RemoteUrl

_CLIENT = {"allow_http": True, "connect_timeout": "3s", "timeout": "60s"}  # http: only where an endpoint says so
_BACKOFF = {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2}
_RETRY = {"max_retries": 3, "retry_timeout": timedelta(seconds=10), "backoff": _BACKOFF}
_OPEN_S = 15.0
_COPY_THREADS = 2
_RELEASE_POLL_S = 0.001
_FAULTS = (BaseError, OSError, ValueError, NotImplementedError)  # what obstore raises
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_MISCONFIGURED = (
    *_NO_BUCKET, "InvalidBucketName", "InvalidAccessKeyId", "SignatureDoesNotMatch", "PermanentRedirect",
    "AuthorizationHeaderMalformed", "incorrectly configured region",
)  # fmt: skip
_FULL = ("QuotaExceeded", "StorageFull", "507 Insufficient Storage")


def make(url: RemoteUrl) -> ObjectStore:
    """Raises ConfigError for an option that is none, or where obstore lacks something that it cannot guess."""
    if not url.host or url.port:
        raise ConfigError(
            f"{url} names no bucket; expected s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
        )
    if bool(url.user) != bool(url.password):
        raise ConfigError(f"{url} has a user or a password only; give both, or leave credentials to the environment")
    maker: Any = {"s3": _s3, "gs": _gs, "az": _az}[url.scheme]
    try:
        store = maker(url, prefix=url.path.strip("/") or None, client_options=_CLIENT, retry_config=_RETRY)
    except _FAULTS as error:
        raise ConfigError(f"{url} cannot be used: {_said(error)}") from error
    return ObjectStore(str(url), store, url.integer("concurrency", 64, 1, 1024), bulk_delete=url.scheme == "s3")


def _s3(url: RemoteUrl, **common: object) -> Any:
    url.check_options("region", "endpoint", "virtual_hosted", "concurrency")
    config = {name: url.text(name) for name in ("region", "endpoint") if url.text(name)}
    if url.user:
        config |= {"access_key_id": url.user, "secret_access_key": url.password}
    if "virtual_hosted" in url.options:
        common["virtual_hosted_style_request"] = url.flag("virtual_hosted", False)
    return S3Store(url.host, unsigned_payload=True, **config, **common)


def _gs(url: RemoteUrl, **common: object) -> Any:
    url.check_options("service_account", "endpoint", "concurrency")
    if url.user:
        raise ConfigError(
            f"{url} has no use for user and password; give service_account=PATH or leave it to the environment"
        )
    names = {"service_account": "service_account", "endpoint": "base_url"}
    return GCSStore(url.host, **{to: url.text(name) for name, to in names.items() if url.text(name)}, **common)


def _az(url: RemoteUrl, **common: object) -> Any:
    url.check_options("account", "endpoint", "concurrency")
    config = {
        to: url.text(name) for name, to in (("account", "account_name"), ("endpoint", "endpoint")) if url.text(name)
    }
    if url.user:
        config |= {"account_name": url.user, "account_key": url.password}
    return AzureStore(url.host, **config, **common)


class ObjectStore:
    """`RemoteStore` over a bucket. Made by `make`."""

    def __init__(
        self,
        url: str,
        store: Any,  # of obstore
        concurrency: int,  # requests at a time, of reads, of writes and of questions
        bulk_delete: bool,
    ) -> None:
        self._url = url
        self._store = store
        self._concurrency = concurrency
        self._bulk_delete = bulk_delete
        self._reads, self._writes = asyncio.Semaphore(concurrency), asyncio.Semaphore(concurrency)
        self._looks = asyncio.Semaphore(concurrency)  # who asks does not wait for who reads, nor the other way round
        self._copiers = BlockingCalls(_COPY_THREADS, "objects-copy")

    async def open(self) -> None:
        try:
            await asyncio.wait_for(self._probe(), _OPEN_S)
        except TimeoutError as error:
            raise RemoteError(f"{self._url}: no answer in {_OPEN_S:.0f} s") from error
        except _FAULTS as error:
            refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
            if refused or any(word in str(error) for word in _MISCONFIGURED):
                raise ConfigError(
                    f"{self._url} cannot be used: {_said(error)}; check the bucket, its region, the credentials, and their "
                    f"rights to get, put, list and delete"
                ) from error
            raise RemoteError(f"{self._url}: {_said(error)}") from error

    async def _probe(self) -> None:
        name = value_name(b"") + "probe"
        try:
            await obstore.get_async(self._store, name)
        except FileNotFoundError as error:
            if any(word in str(error) for word in _NO_BUCKET):
                raise
        await obstore.put_async(self._store, name, [b"kvkern"], use_multipart=False)
        with suppress(FileNotFoundError):  # another node's is gone already
            await obstore.delete_async(self._store, name)

    async def close(self) -> None:
        self._copiers.close()

    async def register(self, memory: memoryview) -> None:
        pass

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[bool | None]:
        there: list[bool | None] = [None] * len(keys)

        async def look(row: int) -> None:
            try:
                await obstore.head_async(self._store, value_name(keys[row]))
                there[row] = True
            except FileNotFoundError:
                there[row] = False

        return answered(there, await self._each(len(keys), look, self._looks, timeout_s))

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        got: list[Got | None] = [None] * len(keys)
        end = len(keys)  # the first miss

        async def read(row: int) -> None:
            nonlocal end
            if row < end:
                got[row] = await self._get(value_name(keys[row]), into[row])
                if got[row] == Got.MISS:
                    end = min(end, row)

        return answered_get(got, await self._each(len(keys), read, self._reads, timeout_s))

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool | None]:
        taken: list[bool | None] = [None] * len(keys)

        async def write(row: int) -> None:
            taken[row] = await self._put(value_name(keys[row]), values[row])

        return answered(taken, await self._each(len(keys), write, self._writes, timeout_s))

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        names = [value_name(key) for key in keys]

        async def one(row: int) -> None:
            with suppress(FileNotFoundError):
                await obstore.delete_async(self._store, names[row])

        async def many(_: int) -> None:
            await obstore.delete_async(self._store, names)

        count, call = (min(1, len(keys)), many) if self._bulk_delete else (len(keys), one)
        for error in await self._each(count, call, self._writes, timeout_s):
            raise error

    # -- one object ----------------------------------------------------------------------------------------------------

    async def _get(self, name: str, into: Parts) -> Got:
        nbytes = len(into[0]) + len(into[1])
        try:
            found = await obstore.get_async(self._store, name)
        except FileNotFoundError as error:
            if any(word in str(error) for word in _NO_BUCKET):
                raise
            return Got.MISS
        if found.meta["size"] != nbytes:
            return Got.WRONG_SIZE
        body = await found.bytes_async()
        if len(body) != nbytes:
            return Got.WRONG_SIZE
        await self._copiers.run(lambda: _copy(memoryview(body), into))
        return Got.HIT

    async def _put(self, name: str, value: Parts) -> bool:
        views = [memoryview(part) for part in value if len(part)]  # of our own: they tell when obstore has dropped them
        try:
            await obstore.put_async(self._store, name, views, use_multipart=False)
        except _FAULTS as error:
            if any(word in str(error) for word in _FULL):
                return False
            raise
        finally:
            await _given_back(views)
        return True

    # -- many of them --------------------------------------------------------------------------------------------------

    async def _each(
        self,
        count: int,
        call: Callable[[int], Awaitable[None]],
        limit: asyncio.Semaphore,
        timeout_s: float,
    ) -> list[RemoteError]:
        """`call` for each row, in order, many at a time, until one fails. Returns when none is under way any more."""
        rows = deque(range(count))

        async def work() -> None:
            while rows:
                async with limit:
                    if rows:
                        try:
                            await call(rows.popleft())
                        except _FAULTS as error:
                            rows.clear()
                            raise RemoteError(f"{self._url}: {_said(error)}") from error

        tasks = [asyncio.ensure_future(work()) for _ in range(min(count, self._concurrency))]
        if not tasks:
            return []
        try:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
        finally:
            await _ended(tasks)
        errors = []
        for error in [task.exception() for task in tasks if not task.cancelled()]:
            if isinstance(error, RemoteError):
                errors.append(error)
            elif error is not None:
                raise error
        if late:
            errors.append(RemoteError(f"{self._url}: {count} objects not done in {timeout_s:.1f} s"))
        return errors


def _said(error: BaseException) -> str:
    """The first paragraph of what obstore says, without its dump of the request."""
    return " ".join(str(error).partition("\n\nDebug source")[0].split())[:400] or type(error).__name__


def _copy(body: memoryview, into: Parts) -> None:
    whole, at = np.frombuffer(body, dtype=np.uint8), 0
    for part in into:
        if len(part):
            np.copyto(np.frombuffer(part, dtype=np.uint8), whole[at : at + len(part)])  # without the GIL
            at += len(part)


async def _given_back(views: Sequence[memoryview]) -> None:
    """Wait until nobody reads the views any more, and nobody can."""

    def held() -> bool:
        for view in views:
            try:
                view.release()
            except BufferError:
                return True
        return False

    await _until(lambda: not held(), lambda: asyncio.sleep(_RELEASE_POLL_S))


async def _ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel them and wait for their end."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    await _until(lambda: all(task.done() for task in pending), lambda: asyncio.wait(pending))


async def _until(done: Callable[[], bool], wait: Callable[[], Awaitable[object]]) -> None:
    """Like Threads.run: cancelled, it still waits."""
    cancelled: asyncio.CancelledError | None = None
    while not done():
        try:
            await wait()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
