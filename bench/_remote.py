"""Servers for bench/remote.py, and the best plain loop of each server's client. Prints nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.request import Request, urlopen

import numpy as np

from kvkern.arena.file import Arena
from kvkern.kernels.paged_copy_numba import checksum_planes
from kvkern.remote.value_format import slot_parts

GIVE_UP_S = 60.0
CONCURRENCY = 64  # requests at a time to an object store, for kvkern and raw
VALUES_NBYTES = 4 << 30  # capacity of a server: all values of a run


class MissingError(RuntimeError):
    """A server or a client is not installed. The message names its package."""


class RawClient(Protocol):
    """A client used plainly, the way its users would use it. Names are any strings."""

    verifies: bool  # True: `read` sums what it has read

    def variants(self) -> Sequence[str]:
        """Return the ways to do it; the best one counts."""

    def write(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        """Write the values of these slots as whole objects."""

    def finish_writes(self) -> None:
        """Finish the work that earlier writes left behind; by default none. Called before every timed call, kvkern's too."""
        return

    def prepare_read(self, names: Sequence[str]) -> None:
        """Prepare values for reading; by default nothing. Not timed."""
        return

    def read(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        """Read values back, into the slots where the client can; verified if `verifies`."""

    def delete(self, names: Sequence[str]) -> None:
        """Delete values."""


# -- servers -----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def run_server(program: str, package: str, arguments: Sequence[str], port: int) -> Iterator[None]:
    """Run a server until the end of the block; the block begins when it listens."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(program, path=beside)
    if found is None:
        raise MissingError(f"{program} is not installed; install {package}")
    process = subprocess.Popen([found, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + GIVE_UP_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{program} does not listen on port {port} after {GIVE_UP_S:.0f} s, or has ended")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@contextmanager
def start_store(kind: str, arena: Arena) -> Iterator[tuple[str, RawClient]]:
    """Yield (URL of a store of that kind, its plain client). Raises MissingError."""
    with tempfile.TemporaryDirectory(prefix="kvkern-bench-") as folder:
        if kind in ("file", "file_cached"):
            direct = "auto" if kind == "file" else "no"
            url = f"file://{folder}/values?capacity={VALUES_NBYTES}&direct={direct}"
            yield url, RawFiles(arena, Path(folder), cold=kind == "file")
        elif kind == "redis":
            port = free_port()
            arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
            arguments += ["--maxmemory", str(VALUES_NBYTES), "--maxmemory-policy", "allkeys-lru", "--dir", folder]
            with run_server("redis-server", "the Debian package redis-server", arguments, port):
                yield f"redis://127.0.0.1:{port}", RawRedis(arena, port)
        elif kind == "mooncake":
            port, metrics = free_port(), free_port()
            arguments = [f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={metrics}"]
            arguments += ["--metrics_host=127.0.0.1", "--enable_metric_reporting=false"]
            with (
                run_server("mooncake_master", "mooncake-transfer-engine-non-cuda", arguments, port),
                run_segment_node(port),
            ):
                raw = RawMooncake(arena, port)
                try:
                    yield f"mooncake://127.0.0.1:{port}?segment=0", raw
                finally:
                    raw.close()
        elif kind == "s3":
            port = free_port()
            with run_server(
                "moto_server", "moto[s3], flask and flask-cors", ["-H", "127.0.0.1", "-p", str(port)], port
            ):
                url = f"http://127.0.0.1:{port}"
                with urlopen(Request(f"{url}/bucket", b"", {"Content-Type": "text/plain"}, method="PUT")):
                    yield f"s3://me:hush@bucket?endpoint={url}&concurrency={CONCURRENCY}", RawObjects(arena, url)
        else:
            raise ValueError(kind)


_SEGMENT = """
import sys
from mooncake.store import MooncakeDistributedStore
host, nbytes, master = sys.argv[1:]
store = MooncakeDistributedStore()
assert store.setup(host, "P2PHANDSHAKE", int(nbytes), 16 << 20, "tcp", "", master) == 0
print("up", flush=True)
sys.stdin.read()
store.close()
"""


@contextmanager
def run_segment_node(port: int) -> Iterator[None]:
    """Run another node that contributes the memory. In the same process nothing would go over the wire."""
    command = [sys.executable, "-c", _SEGMENT, f"127.0.0.1:{free_port()}", str(VALUES_NBYTES), f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"up":
            raise MissingError(
                "mooncake.store cannot be used; pip install 'kvkern[mooncake]', apt-get install libibverbs1"
            )
        try:
            yield
        finally:
            process.kill()


# -- plain loops -------------------------------------------------------------------------------------------------------


class RawFiles(RawClient):
    """One file per value: write; readinto, then the verification that a reader of a disk needs."""

    verifies = True

    def __init__(self, arena: Arena, folder: Path, cold: bool) -> None:
        self._arena, self._folder, self._cold = arena, folder, cold

    def variants(self) -> Sequence[str]:
        return ("plain",)

    def write(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        for name, slot in zip(names, slots, strict=True):
            with (self._folder / name).open("wb", buffering=0) as file:
                for part in slot_parts(self._arena, slot):
                    file.write(part)
                if self._cold:
                    os.fdatasync(file.fileno())  # O_DIRECT leaves no dirty pages either

    def finish_writes(self) -> None:
        os.sync()  # otherwise one side waits for the dirty pages of the other

    def prepare_read(self, names: Sequence[str]) -> None:
        """If cold: move values to the disk and out of the page cache."""
        for name in names if self._cold else ():
            with (self._folder / name).open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        for name, slot in zip(names, slots, strict=True):
            with (self._folder / name).open("rb", buffering=0) as file:
                for part in slot_parts(self._arena, slot):
                    file.readinto(part)
        verify(self._arena, slots)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            (self._folder / name).unlink()


class RawRedis(RawClient):
    """redis-py with hiredis: pipelines of several depths, on one connection or two."""

    verifies = False

    def __init__(self, arena: Arena, port: int) -> None:
        try:
            import hiredis  # noqa: F401
            import redis
        except ImportError as error:
            raise MissingError(f"{error}; pip install redis hiredis") from error
        self._arena = arena
        self._clients = [redis.Redis(port=port) for _ in range(2)]
        self._pool = ThreadPoolExecutor(2)

    def variants(self) -> Sequence[str]:
        return ("1x4", "1x16", "2x4", "2x16")

    def write(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        def one(pipe: Any, row: int) -> None:
            header, payload = slot_parts(self._arena, slots[row])
            whole = np.frombuffer(header, dtype=np.uint8)  # header and payload are adjacent
            view = np.lib.stride_tricks.as_strided(whole, (len(header) + len(payload),), (1,))
            pipe.set(names[row], memoryview(view))

        self._run(len(names), variant, one)

    def read(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        for value in self._run(len(names), variant, lambda pipe, row: pipe.get(names[row])):
            if value is None:
                raise RuntimeError("a value is gone: the server has evicted it")

    def delete(self, names: Sequence[str]) -> None:
        self._clients[0].unlink(*names)

    def _run(self, count: int, variant: str, add: Callable[[Any, int], object]) -> list[Any]:
        connections, depth = map(int, variant.split("x"))

        def share(client: int) -> list[Any]:
            rows, results = range(client, count, connections), []
            for begin in range(0, len(rows), depth):
                pipe = self._clients[client].pipeline(transaction=False)
                for row in rows[begin : begin + depth]:
                    add(pipe, row)
                results += pipe.execute()
            return results

        if connections == 1:
            return share(0)
        return [value for part in self._pool.map(share, range(connections)) for value in part]


class RawMooncake(RawClient):
    """The library's own batch calls on registered memory. All values lie in the segment of `run_segment_node`."""

    verifies = False

    def __init__(self, arena: Arena, port: int) -> None:
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise MissingError(
                f"{error}; pip install mooncake-transfer-engine-non-cuda, apt-get install libibverbs1"
            ) from error
        self._store = MooncakeDistributedStore()
        host = f"127.0.0.1:{free_port()}"
        if self._store.setup(host, "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", f"127.0.0.1:{port}"):
            raise RuntimeError("mooncake's client cannot be set up")
        self._arena, self._start = arena, arena.bytes.ctypes.data
        if self._store.register_buffer(self._start, arena.bytes.nbytes):
            raise RuntimeError("mooncake does not register the arena")

    def variants(self) -> Sequence[str]:
        return ("16", "64")

    def write(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        self._run(self._store.batch_put_from, names, slots, int(variant), 0)

    def read(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        self._run(self._store.batch_get_into, names, slots, int(variant), self._arena.spec.geometry.slot_nbytes)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._store.remove(name, True)

    def close(self) -> None:
        self._store.close()

    def _run(self, call: Any, names: Sequence[str], slots: Sequence[int], batch: int, expected: int) -> None:
        size = self._arena.spec.geometry.slot_nbytes
        for begin in range(0, len(names), batch):
            part = slice(begin, begin + batch)
            starts = [self._start + 4096 + slot * size for slot in slots[part]]
            done = call(list(names[part]), starts, [size] * len(starts))
            if any(code != expected for code in done):
                raise RuntimeError(f"mooncake answered {done}")


class RawObjects(RawClient):
    """obstore alone, with several requests at a time. What it reads stays in its own memory."""

    verifies = False

    def __init__(self, arena: Arena, url: str) -> None:
        try:
            from obstore.store import S3Store
        except ImportError as error:
            raise MissingError(f"{error}; pip install obstore") from error
        credentials = {"access_key_id": "me", "secret_access_key": "hush"}
        self._arena = arena
        self._store: Any = S3Store(
            "bucket", endpoint=url, region="us-east-1", unsigned_payload=True, client_options={"allow_http": True},
            **credentials,
        )  # fmt: skip
        self._runner = asyncio.Runner()

    def variants(self) -> Sequence[str]:
        return (str(CONCURRENCY),)

    def write(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        import obstore

        async def one(row: int) -> None:
            await obstore.put_async(
                self._store, names[row], list(slot_parts(self._arena, slots[row])), use_multipart=False
            )

        self._run(len(names), int(variant), one)

    def read(self, names: Sequence[str], slots: Sequence[int], variant: str) -> None:
        import obstore

        async def one(row: int) -> None:
            body = await (await obstore.get_async(self._store, names[row])).bytes_async()
            if len(body) != self._arena.spec.geometry.slot_nbytes:
                raise RuntimeError(f"an object has {len(body)} bytes")

        self._run(len(names), int(variant), one)

    def delete(self, names: Sequence[str]) -> None:
        import obstore

        obstore.delete(self._store, list(names))

    def _run(self, count: int, at_a_time: int, call: Callable[[int], Awaitable[None]]) -> None:
        async def all_of_them() -> None:
            limit = asyncio.Semaphore(at_a_time)

            async def one(row: int) -> None:
                async with limit:
                    await call(row)

            await asyncio.gather(*map(one, range(count)))

        self._runner.run(all_of_them())


def verify(arena: Arena, slots: Sequence[int]) -> None:
    """Sum every byte of these slots on one thread, as the tier does. All slots have the same payload."""
    at = np.array(slots, dtype=np.int64)
    sizes = np.full((len(at), 1), arena.spec.geometry.part_nbytes, dtype=np.uint32)
    if len(np.unique(checksum_planes(arena.parts(0), at, sizes))) != 1:
        raise RuntimeError("the values that were read do not verify")
