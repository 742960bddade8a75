"""The server: HTTP over a real socket in a thread of its own, watches, and the handles that tests hold."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from aiohttp import web

from . import authorization, tables
from .calls import Call, Performer, parse_path
from .errors import ApiError, ConnectionLost, unknown_path
from .faults import Faults, OnWrite, Status, Write
from .json_values import Json
from .store import Store
from .watches import Watches

_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


class ApiServer:
    """A running server. Every method may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.faults = Faults()
        self.url = ""
        self.kubeconfig = Path()
        self._performer = Performer(store, self.faults)
        self._watches = Watches(store)
        self._pool = ThreadPoolExecutor(8, "api-server")
        self._loop = asyncio.new_event_loop()

    # What tests do

    @property
    def writes(self) -> list[Write]:
        """Every write over HTTP that was committed, in order."""
        return self.faults.writes

    @property
    def requests(self) -> dict[tuple[str, str], int]:
        """(verb, resource) -> how often a client asked, also if that was refused."""
        return self.faults.counts

    def fail_next(self, verb: str, resource: str, status: Status, times: int = 1, retry_after_s: int = 1) -> None:
        """Answer the next requests of a kind with an error, or close their connection; see `Fault`."""
        self.faults.fail_next(verb, resource, status, times, retry_after_s)

    def on_write(
        self, callback: OnWrite, when: Literal["before", "after"] = "after", user_agent: str = ""
    ) -> Callable[[], None]:  # fmt: skip
        """Call `callback(number, verb, object)` around writes over HTTP; see `Faults.on_write`."""
        return self.faults.on_write(callback, when, user_agent)

    def break_watches(self) -> int:
        """Close the connections of all watches. Returns how many there were."""
        return asyncio.run_coroutine_threadsafe(self._watches.break_all(), self._loop).result(10)

    def compact(self) -> None:
        """Forget old revisions: who watches from one, or continues a list, gets 410."""
        with self.store.lock:
            self.store.objects.compact()

    def route_service(self, namespace: str, name: str, address: tuple[str, int]) -> None:
        """Say where a Service listens that a webhook configuration names."""
        self.store.admission.services[namespace, name] = address

    @property
    def watch_interval_s(self) -> float:
        """How often a watch that asked for bookmarks gets one."""
        return self._watches.bookmark_s

    @watch_interval_s.setter
    def watch_interval_s(self, interval_s: float) -> None:
        self._watches.bookmark_s = interval_s

    # HTTP

    async def handle(self, request: web.Request) -> web.StreamResponse:
        warnings: list[str] = []
        try:
            document = self._document(request.path)
            if document is not None:
                return web.json_response(document)
            user = authorization.user_of(request.headers.get("Authorization", ""))
            if request.method == "POST" and request.path == _REVIEWS:
                return web.json_response(authorization.review(self.store, user, await request.json()), status=201)
            resource, namespace, name, subresource = parse_path(self.store, request.path)
            call = Call(
                request.method,
                resource,
                namespace,
                name,
                subresource,
                dict(request.query),
                request.headers.get("Content-Type", ""),
                await request.read(),
                request.headers.get("User-Agent", ""),
                warnings,
            )
            action = authorization.Action(call.verb, resource.group, call.label, namespace, name)
            authorization.check(self.store, user, action)
            self.faults.count(call.verb, call.label)
            fault = self.faults.take(call.verb, call.names)
            if fault and isinstance(fault.status, int):
                raise fault.error()
            if fault and fault.status == "close before":
                raise ConnectionLost
            accept = request.headers.get("Accept", "")
            if call.verb == "watch":
                return await self._watches.serve(request, call, lambda obj: self._presented(call, obj, accept))
            code, body = await self._loop.run_in_executor(self._pool, self._performer.perform, call)
            if fault:
                raise ConnectionLost
            return self._answer(code, self._presented(call, body, accept), warnings)
        except ApiError as error:
            retry = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
            return web.json_response(error.body(), status=error.code, headers=retry)
        except ConnectionLost:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)

    @staticmethod
    def _answer(code: int, body: Json, warnings: list[str]) -> web.Response:
        response = web.json_response(body, status=code)
        for warning in warnings:
            response.headers.add("Warning", f"299 - {json.dumps(warning)}")
        return response

    def _presented(self, call: Call, body: Json, accept: str) -> Json:
        """Return a body in the form that the client asked for."""
        if "as=Table" not in accept or body.get("kind") in ("Status", "Scale") or call.method != "GET":
            return body
        objects = body.get("items", [body])
        objects = [{"kind": call.resource.kind, **obj} for obj in objects]
        meta = body["metadata"] if "items" in body else {"resourceVersion": body["metadata"].get("resourceVersion", "")}
        return tables.table(call.resource, objects, meta, self.store.clock())

    def _document(self, path: str) -> Any:
        """Return what is served beside resources, or None."""
        parts = [part for part in path.split("/") if part]
        registry = self.store.registry
        if parts in (["healthz"], ["livez"], ["readyz"]):
            return "ok"
        if parts == ["version"]:
            return tables.VERSION
        if parts == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        if parts == ["api", "v1"]:
            return tables.resource_list(registry, "", "v1")
        if parts == ["apis"]:
            return tables.groups(registry)
        if parts[:1] == ["apis"] and len(parts) in (2, 3):
            found = tables.group(registry, parts[1]) if len(parts) == 2 else tables.resource_list(registry, *parts[1:])
            if found is None:
                raise unknown_path()
            return found
        if parts == ["openapi", "v3"]:
            roots = sorted({f"apis/{r.api_version}" if r.group else "api/v1" for r in registry})
            return {"paths": {root: {"serverRelativeURL": f"/openapi/v3/{root}?hash=0"} for root in roots}}
        if parts[:2] == ["openapi", "v3"]:
            group, version = (parts[3], parts[4]) if parts[2] == "apis" else ("", "v1")
            return tables.open_api(registry, group, version)
        return None

    # Life

    async def _start(self) -> web.AppRunner:
        application = web.Application(client_max_size=8 << 20)
        application.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return runner

    def kubeconfig_of(self, namespace: str, service_account: str) -> Path:
        """Return a configuration whose client is a service account, and may do what its roles allow."""
        path = self.kubeconfig.with_name(f"kubeconfig-{namespace}-{service_account}")
        user = {"token": authorization.token_of(namespace, service_account)}
        return self.write_kubeconfig(path, namespace, user)

    def write_kubeconfig(self, path: Path, namespace: str = "default", user: Json | None = None) -> Path:
        """Write a configuration that leads to this server."""
        context = {"cluster": "double", "user": "tester", "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "double",
            "clusters": [{"name": "double", "cluster": {"server": self.url}}],
            "contexts": [{"name": "double", "context": context}],
            "users": [{"name": "tester", "user": user or {}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path


@contextmanager
def running_api_server(store: Store | None = None) -> Iterator[ApiServer]:
    """Serve a store, by default a new one, on a free port of 127.0.0.1 until the context is left."""
    server = ApiServer(store or Store())
    loop = server._loop
    thread = threading.Thread(target=loop.run_forever, name="api-server", daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(server._start(), loop).result(10)
    with tempfile.TemporaryDirectory(prefix="api-server-") as folder:
        server.kubeconfig = server.write_kubeconfig(Path(folder) / "kubeconfig")
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server._watches.break_all(), loop).result(10)
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()
            server._pool.shutdown()
