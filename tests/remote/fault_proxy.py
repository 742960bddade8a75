"""A TCP proxy with network faults that tests switch on and off while connections last, and a server behind it."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.remote.required_servers import free_port
from tests.remote.stores.redis.servers import RedisServer, redis_server

Garble = Callable[[bytes], bytes]


class FaultProxy:
    """A proxy between clients and a server on 127.0.0.1, in a thread of its own. Attributes may be set at any time."""

    def __init__(self, to_port: int) -> None:
        self.silent = False  # a partition: nothing passes, either way
        self.delay_s = 0.0  # before each piece is passed on
        self.nbytes_s = 0.0  # per connection and direction; 0: no limit
        self.garble_requests: Garble | None = None
        self.garble_replies: Garble | None = None
        self.port = 0
        self._to_port = to_port
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy")
        self._thread.start()
        assert self._ready.wait(30)

    def heal(self) -> None:
        """Let everything pass again. Connections that have lost bytes stay as they are."""
        self.silent, self.delay_s, self.nbytes_s = False, 0.0, 0.0
        self.garble_requests = self.garble_replies = None

    def close(self) -> None:
        """End all connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.CancelledError):
            while self.silent:
                await asyncio.sleep(0.02)
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
            try:
                ends = {
                    self._loop.create_task(self._pipe(reader, server_writer, lambda: self.garble_requests)),
                    self._loop.create_task(self._pipe(server_reader, writer, lambda: self.garble_replies)),
                }
                try:
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for end in ends:
                        end.cancel()
                    await asyncio.wait(ends)
            finally:
                server_writer.transport.abort()
        writer.transport.abort()

    async def _pipe(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, garble: Callable[[], Garble | None]
    ) -> None:
        with suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 16):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.nbytes_s:
                    await asyncio.sleep(len(data) / self.nbytes_s)
                if self.silent:
                    continue
                change = garble()
                writer.write(data if change is None else change(data))
                await writer.drain()


def flips(rng: random.Random, chance: float, least_nbytes: int = 0) -> Garble:
    """Make a Garble that now and then flips one bit of a piece of at least `least_nbytes`."""

    def garble(data: bytes) -> bytes:
        if len(data) < least_nbytes or rng.random() >= chance:
            return data
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]

    return garble


class Redis:
    """A server that can be killed and restarted. It finds its old values if it was told to save them."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        self.port = free_port()
        self._stack = ExitStack()
        self.server: RedisServer
        self.start()

    def start(self) -> None:
        self.server = self._stack.enter_context(redis_server(self._folder, *self._options, port=self.port))

    def kill(self, save: bool = False) -> None:
        """Kill it with SIGKILL."""
        if save:
            with self.client() as client:
                client.save()
        self._stack.close()

    def pause(self) -> None:
        self.server.stop()

    def go_on(self) -> None:
        with suppress(ProcessLookupError):
            self.server.go_on()

    def client(self, **options: Any) -> Any:
        return self.server.client(**options)

    @property
    def alive(self) -> bool:
        return self.server.process.poll() is None

    def close(self) -> None:
        self._stack.close()


@contextmanager
def redis_behind_proxy(folder: Path, *options: str) -> Iterator[tuple[Redis, FaultProxy]]:
    redis = Redis(folder, *options)
    try:
        proxy = FaultProxy(redis.port)
        try:
            yield redis, proxy
        finally:
            proxy.close()
    finally:
        redis.close()
