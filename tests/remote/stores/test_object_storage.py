"""Object stores: the conformance suite on moto's S3 server and on a stand-in for the others, and faults on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.remote.stores.base import RemoteError
from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from tests.remote.required_servers import answers, free_port, need, running
from tests.remote.stores.conformance import (
    HIT,
    MISS,
    TIMEOUT_S,
    UNKNOWN,
    WRONG_SIZE,
    Bench,
    Conformance,
    MakeStore,
    key_of,
)
from tests.remote.stores.object_server import ObjectServer

need_obstore = pytest.mark.usefixtures("obstore_alone")


@pytest.fixture
def obstore_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    need("objects", module="obstore")
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)  # credentials of the user who runs the tests


def makes(url: str) -> MakeStore:
    return lambda: make_store(RemoteUrl.parse(url))


def moto(port: int, folder: Path) -> Any:
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    return running(command, folder / "moto.log", lambda: answers(port))


def ask(port: int, method: str, path: str, body: bytes = b"") -> None:
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", body, headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    need("objects", module="obstore")
    need("objects", module="moto")
    need("objects", module="flask_cors")  # moto's server needs it
    port = free_port()
    with moto(port, tmp_path_factory.mktemp("moto")):
        ask(port, "PUT", "bucket")
        yield port


def s3(port: int, bucket: str = "bucket", more: str = "") -> str:
    return f"s3://me:hush@{bucket}/a/{uuid.uuid4().hex}?endpoint=http://127.0.0.1:{port}{more}"


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer() as server:
        yield server


@need_obstore
class TestS3(Conformance):
    @pytest.fixture
    def make(self, s3_port: int) -> MakeStore:
        return makes(s3(s3_port, more="&region=eu-central-1"))


@need_obstore
class TestGoogle(Conformance):
    @pytest.fixture
    def make(self, server: ObjectServer, tmp_path: Path) -> MakeStore:
        account = {"gcs_base_url": server.url, "disable_oauth": True}
        account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        (tmp_path / "account").write_text(json.dumps(account))
        return makes(f"gs://bucket/prefix?service_account={tmp_path}/account")


@need_obstore
class TestAzure(Conformance):
    @pytest.fixture
    def make(self, server: ObjectServer) -> MakeStore:
        return makes(f"az://me:aHVzaA==@container?endpoint={server.url}&concurrency=4")


@pytest.fixture
def bench(server: ObjectServer, obstore_alone: None) -> Iterator[Bench]:
    bench = Bench(makes(f"s3://me:hush@bucket?endpoint={server.url}"))
    server.requests.clear()
    yield bench
    bench.close()


# -- opening -----------------------------------------------------------------------------------------------------------


@need_obstore
@pytest.mark.parametrize(("url", "message"), [
    ("s3:///x", r"does not name a bucket\. Say s3://bucket/prefix"), ("s3://b:80/x", "does not name a bucket"),
    ("s3://me@b", r"s3://b has only a user or only a password\. Give both"),
    ("s3://b?regin=x", "unknown key 'regin'.*did you mean 'region'"), ("gs://b?region=x", "unknown key 'region'"),
    ("gs://me:p@b", "has a user and a password, which gs:// does not use"), ("az://b?region=x", "unknown key 'region'"),
    ("s3://b?concurrency=0", "concurrency of s3://b is '0'"), ("s3://b?virtual_hosted=1", "virtual_hosted of s3://b is '1'"),
    ("az://b", "az://b cannot be used: .*[Aa]ccount"),
    ("gs://b?service_account=/no/such", "service_account of gs://b is '/no/such', which is not a file"),
    ("gs://b?service_account=/dev/null", "service_account of gs://b is '/dev/null', which is not a file"),
])  # fmt: skip
def test_urls_that_are_none(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_store(RemoteUrl.parse(url))


def open_and_close(url: str) -> None:
    async def main() -> None:
        store = make_store(RemoteUrl.parse(url))
        try:
            await store.open()
        finally:
            await store.close()

    asyncio.run(main())


@need_obstore
def test_no_such_bucket(s3_port: int) -> None:
    with pytest.raises(
        ConfigError, match=r"s3://none/a/.* cannot be used: .*NoSuchBucket.*\. Check the bucket, its region"
    ):
        open_and_close(s3(s3_port, "none"))


@need_obstore
def test_wrong_credentials(s3_port: int) -> None:
    ask(s3_port, "POST", "moto-api/reset-auth", b"0")
    try:
        with pytest.raises(ConfigError, match=r"cannot be used: .*InvalidAccessKeyId.*\. Check") as caught:
            open_and_close(s3(s3_port))
    finally:
        ask(s3_port, "POST", "moto-api/reset-auth", b"inf")
    assert "hush" not in str(caught.value)


@need_obstore
@pytest.mark.parametrize(("method", "status", "code", "expected"), [
    ("GET", 403, "AccessDenied", ConfigError), ("PUT", 403, "AccessDenied", ConfigError),
    ("GET", 401, "Unauthorized", ConfigError), ("PUT", 400, "AuthorizationHeaderMalformed", ConfigError),
    ("GET", 301, "PermanentRedirect", ConfigError), ("PUT", 404, "NoSuchBucket", ConfigError),
    ("GET", 400, "Strange", RemoteError),
])  # fmt: skip
def test_refused(server: ObjectServer, method: str, status: int, code: str, expected: type[Exception]) -> None:
    server.faults = [(method, status, code)]
    with pytest.raises(expected, match=r"s3://bucket.*" if status == 301 else str(status)):
        open_and_close(f"s3://me:hush@bucket?endpoint={server.url}")


@need_obstore
def test_nobody_there() -> None:
    start = time.monotonic()
    with pytest.raises(RemoteError, match=r"s3://bucket/a/.*: Generic S3 error: .*error sending request"):
        open_and_close(s3(free_port()))
    assert time.monotonic() - start < 5


@need_obstore
def test_nothing_is_left_behind(server: ObjectServer) -> None:
    open_and_close(f"s3://me:hush@bucket/p?endpoint={server.url}")
    assert server.objects == {}


# -- objects -----------------------------------------------------------------------------------------------------------


def test_names(server: ObjectServer, bench: Bench) -> None:
    bench.put([key_of(1)], bench.values()[:1])
    assert list(server.objects) == [f"/bucket/kvkern1/{key_of(1).hex()}"]
    assert server.objects[f"/bucket/kvkern1/{key_of(1).hex()}"] == b"".join(bench.memory.parts(0))


@need_obstore
def test_requests_are_bounded(server: ObjectServer) -> None:
    bench = Bench(makes(f"s3://me:hush@bucket?endpoint={server.url}&concurrency=3"), count=20, payload_nbytes=100)
    server.delay_s = 0.01
    keys = [key_of(i) for i in range(20)]

    async def together() -> None:
        into, values = bench.into(), bench.values()
        await asyncio.gather(*(bench.store.put(keys[i : i + 5], values[i : i + 5], TIMEOUT_S) for i in range(0, 20, 5)))
        assert server.most_at_once == 3
        await asyncio.gather(*(bench.store.get(keys[i : i + 5], into[i : i + 5], TIMEOUT_S) for i in range(0, 20, 5)))

    bench.run(together())
    assert server.most_at_once == 3
    bench.close()


def test_who_asks_does_not_wait_for_who_reads(server: ObjectServer, bench: Bench) -> None:
    few = Bench(makes(f"s3://me:hush@bucket?endpoint={server.url}&concurrency=1"), count=20, payload_nbytes=100)
    keys, into = [key_of(i) for i in range(20)], few.into()
    few.put(keys, few.values())
    server.requests.clear()
    server.delay_s = 0.02

    async def both() -> None:
        read = asyncio.ensure_future(few.store.get(keys, into, TIMEOUT_S))
        await asyncio.sleep(0)
        assert list(await few.store.exists(keys[:3], TIMEOUT_S)) == [True] * 3
        assert server.requests.count("GET") < 15
        assert list(await read) == [HIT] * 20

    few.run(both())
    few.close()


def test_behind_a_miss_little_is_asked(server: ObjectServer, bench: Bench) -> None:
    few = Bench(makes(f"s3://me:hush@bucket?endpoint={server.url}&concurrency=2"), count=20, payload_nbytes=100)
    few.put([key_of(i) for i in range(1, 20)], few.values()[1:])
    server.requests.clear()
    assert few.get([key_of(i) for i in range(20)], few.into())[0] == MISS
    assert server.requests.count("GET") <= 4
    few.close()


def test_deletes_are_one_request(server: ObjectServer, bench: Bench) -> None:
    bench.put([key_of(i) for i in range(8)], bench.values())
    server.requests.clear()
    bench.run(bench.store.delete([key_of(i) for i in range(8)], TIMEOUT_S))
    assert (server.requests, server.objects) == (["POST"], {})


def test_objects_that_were_changed(server: ObjectServer, bench: Bench) -> None:
    keys = [key_of(i) for i in range(4)]
    bench.put(keys, bench.values()[:4])
    names = [f"/bucket/kvkern1/{key.hex()}" for key in keys]
    server.objects[names[0]] = server.objects[names[0]][:-1]
    server.objects[names[1]] += b"x"
    server.objects[names[2]] = b""
    assert bench.get(keys, bench.into()[:4]) == [WRONG_SIZE] * 3 + [HIT]
    assert bench.read(3)


# -- faults ------------------------------------------------------------------------------------------------------------


def test_no_room(server: ObjectServer, bench: Bench) -> None:
    server.faults = [("PUT", 403, "QuotaExceeded"), ("PUT", 400, "XMinioAdminBucketQuotaExceeded")]
    assert bench.put([key_of(i) for i in range(8)], bench.values()).count(False) == 2
    assert len(server.objects) == 6


def test_a_server_that_is_busy_is_asked_again(server: ObjectServer, bench: Bench) -> None:
    server.faults = [("PUT", 503, "SlowDown"), ("GET", 500, "InternalError")]
    assert bench.put([key_of(1)], bench.values()[:1]) == [True]
    assert bench.get([key_of(1)], bench.into()[:1]) == [HIT]
    assert server.requests == ["PUT", "PUT", "GET", "GET"]
    server.faults = [("PUT", 503, "SlowDown")] * 50
    with pytest.raises(RemoteError, match=r"503 Service Unavailable.*SlowDown"):
        bench.put([key_of(2)], bench.values()[:1])
    assert server.requests.count("PUT") <= 6


def test_forbidden_meanwhile(server: ObjectServer, bench: Bench) -> None:
    bench.put([key_of(1)], bench.values()[:1])
    calls = {
        "GET": lambda: bench.get([key_of(1)], bench.into()[:1]),
        "PUT": lambda: bench.put([key_of(2)], bench.values()[:1]),
        "HEAD": lambda: bench.exists([key_of(1)]),
        "POST": lambda: bench.run(bench.store.delete([key_of(1)], TIMEOUT_S)),
    }
    for method, call in calls.items():
        server.faults = [(method, 403, "AccessDenied")]
        with pytest.raises(RemoteError, match=r"s3://bucket: .*403"):
            call()
    server.faults = [("GET", 404, "NoSuchBucket")]
    with pytest.raises(RemoteError, match="NoSuchBucket"):
        bench.get([key_of(1)], bench.into()[:1])


def test_a_body_that_ends_early(server: ObjectServer, bench: Bench) -> None:
    bench.put([key_of(1)], bench.values()[:1])
    server.cut = 1000
    with pytest.raises(RemoteError):
        bench.get([key_of(1)], bench.into()[:1])
    server.cut = 0
    assert bench.get([key_of(1)], bench.into()[:1]) == [HIT]


def test_one_object_that_fails_says_nothing_of_the_others(server: ObjectServer, bench: Bench) -> None:
    keys = [key_of(i) for i in range(8)]
    server.faults = [("PUT", 400, "Strange")]
    taken = bench.put(keys, bench.values())
    assert sorted(taken, key=str) == [None, *[True] * 7]
    assert sorted(bench.exists(keys), key=str) == [False, *[True] * 7]
    assert bench.put(keys, bench.values()) == [True] * 8
    server.faults = [("HEAD", 400, "Strange"), ("GET", 400, "Strange")]
    assert sorted(bench.exists(keys), key=str) == [None, *[True] * 7]
    got = bench.get(keys, bench.into())
    assert sorted(got) == [*[HIT] * 7, UNKNOWN]
    assert [bench.read(row) for row in range(8)] == [outcome == HIT for outcome in got]


def test_behind_an_object_that_fails_nothing_is_asked(server: ObjectServer, bench: Bench) -> None:
    few = Bench(makes(f"s3://me:hush@bucket?endpoint={server.url}&concurrency=1"), count=8, payload_nbytes=100)
    keys = [key_of(i) for i in range(8)]
    few.put(keys, few.values())
    server.requests.clear()
    server.faults = [("GET", 200, "")]  # a body of another size
    server.faults += [("GET", 400, "Strange")]
    assert few.get(keys, few.into()) == [WRONG_SIZE, *[UNKNOWN] * 7]
    assert server.requests == ["GET", "GET"]
    few.close()


@need_obstore
def test_killed_and_stopped(tmp_path: Path, s3_port: int) -> None:
    """s3_port skips this test, with its reason, if moto is missing."""
    port = free_port()
    url = s3(port)
    with moto(port, tmp_path) as process:
        ask(port, "PUT", "bucket")
        bench = Bench(makes(url), payload_nbytes=2 << 20)
        keys, values = [key_of(i) for i in range(8)], bench.values()
        assert bench.put(keys, values) == [True] * 8
        os.kill(process.pid, signal.SIGSTOP)
        for call in (
            lambda: bench.store.put(keys, values, 0.5),
            lambda: bench.store.get(keys, bench.into(), 0.5),
            lambda: bench.store.exists(keys, 0.5),
            lambda: bench.store.delete(keys, 0.5),
        ):
            start = time.monotonic()
            with pytest.raises(RemoteError, match=r"objects not done in 0\.5 s"):
                bench.run(call())
            assert time.monotonic() - start < 2.0
        os.kill(process.pid, signal.SIGCONT)
        for _ in range(20):  # deletes that were given up may still be carried out
            assert bench.put(keys, values) == [True] * 8
            if bench.get(keys, bench.into()) == [HIT] * 8:
                break
            time.sleep(0.1)
        assert bench.read(7)
    start = time.monotonic()
    with pytest.raises(RemoteError):
        bench.get(keys, bench.into())
    assert time.monotonic() - start < 5.0
    with moto(port, tmp_path):
        ask(port, "PUT", "bucket")  # the server has forgotten its buckets
        assert bench.exists(keys) == [False] * 8
        assert bench.put(keys, values) == [True] * 8
        assert bench.get(keys, bench.into()) == [HIT] * 8
        assert bench.read(7)
    bench.close()


def test_memory_is_given_back_before_a_put_ends(server: ObjectServer, bench: Bench) -> None:
    """With a slow server: nothing reads what the caller writes after the call, however the call ended."""
    import obstore

    given: list[memoryview] = []
    real = obstore.put_async

    def note(store: Any, name: str, views: list[memoryview], **options: Any) -> Any:
        given.extend(views)
        return real(store, name, views, **options)

    server.delay_s = 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "put_async", note)
        with pytest.raises(RemoteError, match="not done in"):
            bench.run(bench.store.put([key_of(i) for i in range(8)], bench.values(), 0.05))

        async def cancelled() -> None:
            call = asyncio.ensure_future(bench.store.put([key_of(9)], bench.values()[:1], TIMEOUT_S))
            for _ in range(3):
                await asyncio.sleep(0.02)
                call.cancel()
            await asyncio.wait({call})

        bench.run(cancelled())
    assert len(given) == 18
    for view in given:
        with pytest.raises(ValueError, match="released"):
            view.tobytes()
