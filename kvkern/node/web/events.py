"""Server-sent events: one overview every TICK_S, rendered once and sent to every open page.

A page that reads slowly misses overviews; they never queue up for it. Nothing is rendered while no page is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

TICK_S = 2.0
SPREAD_S = 0.003  # between the writes to two pages, so that an engine's request comes between them
MAX_STREAMS = 24
RETRY_MS = 2000  # after which a browser connects again


class Events:
    """An ASGI app. Runs in the event loop's thread."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._streams: list[_Stream] = []
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the page is gone or the daemon ends."""
        if self._closed or len(self._streams) >= MAX_STREAMS:
            refusal = PlainTextResponse("Too many pages are open.\n", 503, {"retry-after": "10"})
            await refusal(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        scope["state"]["connection"].streams = True
        stream = _Stream()
        watcher = asyncio.get_running_loop().create_task(_until_gone(receive, stream))
        self._streams.append(stream)
        self._tick_later()
        try:
            stream.put(b"retry: %d\n\n%s" % (RETRY_MS, self._event()))
            while (event := await stream.take()) is not None:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._streams.remove(stream)
            watcher.cancel()

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._streams:
            stream.end()

    def _event(self) -> bytes:
        return b"event: overview\ndata: " + self._render() + b"\n\n"

    def _tick_later(self) -> None:
        if self._timer is None and self._streams and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._tick_later()  # before the rest, so that a fault in it ends no page
        if self._streams:
            event, loop = self._event(), asyncio.get_running_loop()
            for number, stream in enumerate(self._streams):
                loop.call_later(number * SPREAD_S, stream.put, event)


class _Stream:
    """The next event of one page."""

    def __init__(self) -> None:
        self._next: bytes | None = None
        self._changed = asyncio.Event()
        self._ended = False

    def put(self, event: bytes) -> None:
        """Replace what has not been sent yet."""
        self._next = event
        self._changed.set()

    def end(self) -> None:
        """Send nothing more."""
        self._ended = True
        self._changed.set()

    async def take(self) -> bytes | None:
        """Wait for the next event. None: the stream has ended."""
        await self._changed.wait()
        self._changed.clear()
        return None if self._ended else self._next


async def _until_gone(receive: Receive, stream: _Stream) -> None:
    """End the stream when the page hangs up."""
    while (await receive())["type"] != "http.disconnect":
        continue
    stream.end()
