"""Object stores: a value is an object. Amazon S3 and stores with its protocol, Google Cloud Storage, Azure Blob Storage.

    s3://bucket/prefix?region=eu-central-1&endpoint=http://minio:9000&virtual_hosted=no&concurrency=64
    gs://bucket/prefix?service_account=PATH      az://container/prefix?account=NAME      s3://key_id:secret@bucket

    put     one PUT of header and payload, sent from the caller's memory    get     GET; the size is known before the body
    exists  HEADs side by side                                             delete  in bulk where the store has a request for it

obstore finds the credentials (environment, instance role, workload identity), or the URL gives them: user and password are
S3's access key id and secret, or Azure's account and its key. The credentials need the rights to get, put, list and delete.
Without the right to list, S3 answers "forbidden" for an object that is not there.

A body comes in pieces. obstore joins them, and this module copies the body into the caller's memory, on a thread. Bodies are
sent unsigned, which saves a SHA-256: TLS protects them on the way, and the tier verifies the checksums of all it reads.
obstore repeats a request a few times within seconds. If it still fails, the object is UNKNOWN or None, and no further request
is begun. A server that sends far more than it was asked for ends the calls under way (received_bytes.py): obstore has no limit
for bodies. Requests that are not done at the end of a call are cancelled. A cancelled PUT may read the caller's memory for a
few moments more, so the call waits until every memoryview that it gave away is released.

A certificate that does not verify is an error by name, and nothing is sent. http is used only if the endpoint's URL says so.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, S3Store

from ...errors import ConfigError
from .base import Got, Parts, RemoteError, checked_answers, checked_get_answers, value_name
from .blocking_calls import BlockingCalls, wait_until
from .received_bytes import ReceiveGuard
from .url import RemoteUrl

_CLIENT = {"allow_http": True, "connect_timeout": "3s", "timeout": "60s"}  # http only if the endpoint's URL says so
_BACKOFF = {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2}
_RETRY = {"max_retries": 3, "retry_timeout": timedelta(seconds=10), "backoff": _BACKOFF}
_OPEN_S = 15.0
_COPY_THREADS = 2
_RELEASE_POLL_S = 0.001
_FAULTS = (BaseError, OSError, ValueError, NotImplementedError)  # raised by obstore
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_MISCONFIGURED = (
    *_NO_BUCKET, "InvalidBucketName", "InvalidAccessKeyId", "SignatureDoesNotMatch", "PermanentRedirect",
    "AuthorizationHeaderMalformed", "incorrectly configured region",
)  # fmt: skip
_CERTIFICATE = re.compile(
    r"InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?(\w+)"
)  # in obstore's dump of an error
_MEANING = {
    "Expired": "it has expired", "NotValidYet": "it is not valid yet", "UnknownIssuer": "no trusted authority has signed it",
    "NotValidForName": "it is for another name", "NotValidForNameContext": "it is for another name", "Revoked": "it is revoked",
    "CaUsedAsEndEntity": "it is signed by its own key",
}  # fmt: skip
_NO_TLS = "InvalidContentType"  # the answer to a handshake was no TLS
_FULL = ("QuotaExceeded", "StorageFull", "507 Insufficient Storage")


def make(url: RemoteUrl) -> ObjectStore:
    """Make the store of a URL. Raises ConfigError for a wrong URL or option, or if obstore misses something."""
    if not url.host or url.port:
        raise ConfigError(
            f"{url} does not name a bucket. Say s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
        )
    if bool(url.user) != bool(url.password):
        raise ConfigError(
            f"{url} has only a user or only a password. Give both, or leave the credentials to the environment"
        )
    maker: Any = {"s3": _s3, "gs": _gs, "az": _az}[url.scheme]
    try:
        store = maker(url, prefix=url.path.strip("/") or None, client_options=_CLIENT, retry_config=_RETRY)
    except _FAULTS as error:
        raise ConfigError(
            f"{url} cannot be used: {_short_message(error)}. Correct the URL's options or the environment"
        ) from error
    return ObjectStore(
        str(url),
        store,
        url.integer("concurrency", 64, 1, 1024),
        _port(url.text("endpoint")),
        bulk_delete=url.scheme == "s3",
    )


def _port(endpoint: str) -> int:
    """Return the port of an endpoint's URL."""
    try:
        parts = urlsplit(endpoint)
        return parts.port or (80 if parts.scheme == "http" else 443)
    except ValueError:
        return 443  # obstore has its own word for a URL that is none


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
            f"{url} has a user and a password, which gs:// does not use. Give service_account=PATH, or leave the "
            f"credentials to the environment"
        )
    account = url.text("service_account")
    if account and not Path(account).is_file():  # the library would wait for the other end of a FIFO
        raise ConfigError(f"service_account of {url} is {account!r}, which is not a file. Name the account's JSON")
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
    """`RemoteStore` over a bucket. Use `make`."""

    def __init__(
        self,
        url: str,
        store: Any,  # S3Store, GCSStore or AzureStore of obstore
        concurrency: int,  # requests at a time; separately for reads, writes and questions
        port: int,  # of the server
        bulk_delete: bool,
    ) -> None:
        self._url = url
        self._store = store
        self._concurrency = concurrency
        self._bulk_delete = bulk_delete
        self._reads, self._writes = asyncio.Semaphore(concurrency), asyncio.Semaphore(concurrency)
        self._questions = asyncio.Semaphore(concurrency)  # a question does not wait for reads, nor a read for questions
        self._copiers = BlockingCalls(_COPY_THREADS, "objects-copy")
        self._guard = ReceiveGuard(port)

    async def open(self) -> None:
        try:
            await self._probe_within(_OPEN_S)
        except _FAULTS as error:
            if _CERTIFICATE.search(str(error)):
                raise ConfigError(
                    f"{self._url} cannot be used: {_short_message(error)}. Give the server a certificate that is valid for the "
                    f"endpoint's host, or name the authority that signed it in SSL_CERT_FILE"
                ) from error
            refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
            if refused or any(word in str(error) for word in _MISCONFIGURED):
                raise ConfigError(
                    f"{self._url} cannot be used: {_short_message(error)}. Check the bucket, its region, the credentials, "
                    f"and their rights to get, put, list and delete"
                ) from error
            raise RemoteError(f"{self._url}: {_short_message(error)}") from error

    async def _probe_within(self, timeout_s: float) -> None:
        tasks = [asyncio.ensure_future(self._probe())]
        with self._guard.watched(tasks, requests=3, asked_nbytes=0):
            try:
                _, late = await asyncio.wait(tasks, timeout=timeout_s)
            finally:
                await _cancel_and_wait(tasks)
            if self._guard.has_tripped(tasks):
                raise self._too_much()
        if late:
            raise RemoteError(f"{self._url} gave no answer in {timeout_s:.0f} s. Check the endpoint and the network")
        tasks[0].result()

    def _too_much(self) -> RemoteError:
        return RemoteError(
            f"{self._url}: the server sends far more than it was asked for; its calls were ended. Check that the endpoint is "
            f"an object store"
        )

    async def _probe(self) -> None:
        name = value_name(b"") + "probe"
        try:
            await obstore.get_async(self._store, name)
        except FileNotFoundError as error:
            if any(word in str(error) for word in _NO_BUCKET):
                raise
        await obstore.put_async(self._store, name, [b"kvkern"], use_multipart=False)
        with suppress(FileNotFoundError):  # another node has deleted it already
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

        return checked_answers(there, await self._for_each_row(len(keys), look, self._questions, timeout_s))

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> list[Got]:
        got: list[Got | None] = [None] * len(keys)
        end = len(keys)  # row of the first miss

        async def read(row: int) -> None:
            nonlocal end
            if row < end:
                got[row] = await self._get(value_name(keys[row]), into[row])
                if got[row] == Got.MISS:
                    end = min(end, row)

        asked_nbytes = sum(len(part) for parts in into for part in parts)
        errors = await self._for_each_row(len(keys), read, self._reads, timeout_s, asked_nbytes)
        return checked_get_answers(got, errors)

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> list[bool | None]:
        taken: list[bool | None] = [None] * len(keys)

        async def write(row: int) -> None:
            taken[row] = await self._put(value_name(keys[row]), values[row])

        return checked_answers(taken, await self._for_each_row(len(keys), write, self._writes, timeout_s))

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        names = [value_name(key) for key in keys]

        async def one(row: int) -> None:
            with suppress(FileNotFoundError):
                await obstore.delete_async(self._store, names[row])

        async def many(_: int) -> None:
            await obstore.delete_async(self._store, names)

        count, call = (min(1, len(keys)), many) if self._bulk_delete else (len(keys), one)
        for error in await self._for_each_row(count, call, self._writes, timeout_s):
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
        await self._copiers.run(lambda: _copy_parts(memoryview(body), into))
        return Got.HIT

    async def _put(self, name: str, value: Parts) -> bool:
        views = [
            memoryview(part) for part in value if len(part)
        ]  # our own views: they show when obstore has dropped them
        try:
            await obstore.put_async(self._store, name, views, use_multipart=False)
        except _FAULTS as error:
            if any(word in str(error) for word in _FULL):
                return False
            raise
        finally:
            await _wait_until_unused(views)
        return True

    # -- many of them --------------------------------------------------------------------------------------------------

    async def _for_each_row(
        self,
        count: int,
        call: Callable[[int], Awaitable[None]],
        limit: asyncio.Semaphore,
        timeout_s: float,
        asked_nbytes: int = 0,  # of all bodies that are to come
    ) -> list[RemoteError]:
        """Run `call` for each row, in order, many at a time, until one fails. Returns when none is under way any more."""
        rows = deque(range(count))

        async def work() -> None:
            while rows:
                async with limit:
                    if rows:
                        try:
                            await call(rows.popleft())
                        except _FAULTS as error:
                            rows.clear()
                            raise RemoteError(f"{self._url}: {_short_message(error)}") from error

        tasks = [asyncio.ensure_future(work()) for _ in range(min(count, self._concurrency))]
        if not tasks:
            return []
        with self._guard.watched(tasks, count, asked_nbytes):
            try:
                _, late = await asyncio.wait(tasks, timeout=timeout_s)
            finally:
                await _cancel_and_wait(tasks)
            errors = [self._too_much()] if self._guard.has_tripped(tasks) else []
        for error in [task.exception() for task in tasks if not task.cancelled()]:
            if isinstance(error, RemoteError):
                errors.append(error)
            elif error is not None:
                raise error
        if late:
            errors.append(RemoteError(f"{self._url}: a call for {count} objects not done in {timeout_s:.1f} s"))
        return errors


def _short_message(error: BaseException) -> str:
    """Return the first paragraph of an error of obstore, without its dump of the request."""
    whole = str(error)
    said = " ".join(whole.partition("\n\nDebug source")[0].split())[:400] or type(error).__name__
    if found := _CERTIFICATE.search(whole):
        return f"the server's certificate does not verify: {_MEANING.get(found[1], found[1])} ({said})"
    return f"the server does not speak TLS ({said})" if _NO_TLS in whole else said


def _copy_parts(body: memoryview, into: Parts) -> None:
    whole, at = np.frombuffer(body, dtype=np.uint8), 0
    for part in into:
        if len(part):
            np.copyto(np.frombuffer(part, dtype=np.uint8), whole[at : at + len(part)])  # numpy copies without the GIL
            at += len(part)


async def _wait_until_unused(views: Sequence[memoryview]) -> None:
    """Release the views. Waits until obstore does not use them any more."""

    def held() -> bool:
        for view in views:
            try:
                view.release()
            except BufferError:
                return True
        return False

    await wait_until(lambda: not held(), lambda: asyncio.sleep(_RELEASE_POLL_S))


async def _cancel_and_wait(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel the tasks and wait for their end."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    await wait_until(lambda: all(task.done() for task in pending), lambda: asyncio.wait(pending))
