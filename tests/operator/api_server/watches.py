"""Watches: streams of changes from a revision on, bookmarks, and the ends of streams."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator

from aiohttp import web

from .calls import Call
from .errors import ApiError, Cause, invalid
from .json_values import Json
from .objects import Change
from .selectors import field_selector, label_selector
from .store import Store

Present = Callable[[Json], Json]


class Watches:
    """The open watches. Runs in the server's event loop."""

    def __init__(self, store: Store) -> None:
        self.bookmark_s = 1.0
        self._store = store
        self._open: dict[int, web.Request] = {}

    async def break_all(self) -> int:
        """Close the connections, as a load balancer does that restarts."""
        requests = list(self._open.values())
        for request in requests:
            if request.transport is not None:
                request.transport.abort()
        return len(requests)

    async def serve(self, request: web.Request, call: Call, present: Present) -> web.StreamResponse:
        """Stream changes until the client goes, its timeout passes, or its revision is compacted."""
        if "sendInitialEvents" in call.query:
            text = "Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
            raise invalid(call.resource, "", [Cause("sendInitialEvents", text, "FieldValueForbidden")])
        stream = _Stream(self._store, call)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        self._open[id(request)] = request
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._store.lock:
            self._store.objects.listeners.add(notify)
        try:
            await self._run(stream, response, changed, present)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client or the test closed the connection
        finally:
            with self._store.lock:
                self._store.objects.listeners.discard(notify)
            self._open.pop(id(request), None)
        return response

    async def _run(
        self, stream: _Stream, response: web.StreamResponse, changed: asyncio.Event, present: Present
    ) -> None:
        end = time.monotonic() + float(stream.call.query.get("timeoutSeconds") or 1800)
        bookmark = time.monotonic() + self.bookmark_s
        while True:
            changed.clear()
            try:
                events = list(stream.events())
            except ApiError as error:
                await _send(response, "ERROR", error.body())
                return
            for kind, obj in events:
                await _send(response, kind, present(obj))
            now = time.monotonic()
            if stream.bookmarks and (now >= bookmark or now >= end):
                await _send(response, "BOOKMARK", stream.bookmark())
                bookmark = now + self.bookmark_s
            if now >= end:
                return
            until = min(end, bookmark) if stream.bookmarks else end
            try:
                await asyncio.wait_for(changed.wait(), max(until - now, 0.001))
            except TimeoutError:
                continue


async def _send(response: web.StreamResponse, kind: str, obj: Json) -> None:
    await response.write(json.dumps({"type": kind, "object": obj}).encode() + b"\n")


class _Stream:
    """The changes that one watch shows: those of its objects, and of objects that begin or cease to match its selectors."""

    def __init__(self, store: Store, call: Call) -> None:
        self.call = call
        self.bookmarks = call.query.get("allowWatchBookmarks") in ("1", "true")
        self._store = store
        self._labels = label_selector(call.query.get("labelSelector", ""))
        self._fields = field_selector(call.query.get("fieldSelector", ""))
        asked = call.query.get("resourceVersion", "")
        self._initial = asked in ("", "0")
        self._after = 0 if self._initial else int(asked)

    def events(self) -> Iterator[tuple[str, Json]]:
        """Yield (type, object) of what happened since the last call. Raises 410 if it is not known any more."""
        key = self.call.resource.key
        with self._store.lock:
            objects = self._store.objects
            if self._initial:
                self._initial, self._after = False, objects.revision
                initial = [obj for obj in objects.all(key) if self._matches(obj)]
                changes: list[Change] = []
            else:
                initial, changes = [], objects.changes(key, self._after)
                self._after = max(self._after, objects.revision)
        for obj in initial:
            yield "ADDED", self._versioned(obj)
        for change in changes:
            matches = self._matches(change.object) and change.kind != "DELETED"
            matched = change.old is not None and self._matches(change.old)
            if matches:
                yield "MODIFIED" if matched else "ADDED", self._versioned(change.object)
            elif matched:
                meta = {**(change.old or {})["metadata"], "resourceVersion": str(change.revision)}
                last = change.object if change.kind == "DELETED" else {**(change.old or {}), "metadata": meta}
                yield "DELETED", self._versioned(last)

    def bookmark(self) -> Json:
        resource = self.call.resource
        meta = {"resourceVersion": str(self._after), "creationTimestamp": None}
        return {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": meta}

    def _matches(self, obj: Json) -> bool:
        meta = obj["metadata"]
        if self.call.namespace and meta.get("namespace") != self.call.namespace:
            return False
        return (not self.call.name or meta["name"] == self.call.name) and self._labels(obj) and self._fields(obj)

    def _versioned(self, obj: Json) -> Json:
        return {**obj, "apiVersion": self.call.resource.api_version}
