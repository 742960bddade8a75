"""The API server, as far as the operator needs it: read, list, create, patch, delete. Over kr8s, of the extra `operator`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
import kr8s
import kr8s.asyncio

from ..errors import KvkernError
from ..version import VERSION
from .kinds import Kind
from .merge import with_record
from .objects.metadata import Manifest

PAGE = 500
TIMEOUT_S = 30.0
_MERGE = "application/merge-patch+json"


class ApiError(KvkernError, RuntimeError):
    """The API server refuses, fails or cannot be reached. `status` is that of HTTP; 0: no answer."""

    def __init__(self, status: int, reason: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s


class Api:
    """A connection to an API server. Use it in one event loop."""

    def __init__(self, api: Any) -> None:
        self._api = api

    @classmethod
    async def connect(cls, kubeconfig: str | None = None) -> Api:
        """Connect as a pod's service account or as the kubeconfig says. Raises ApiError."""
        try:
            return cls(await kr8s.asyncio.api(kubeconfig=kubeconfig))
        except (OSError, ValueError, httpx.HTTPError, kr8s.ServerError) as error:
            raise ApiError(0, "Unreachable", f"no Kubernetes API: {error}") from error

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        """Return an object; None: there is none."""
        try:
            return await self._ask("GET", kind, namespace, name)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None) -> list[Manifest]:
        """Return objects with these labels, of one namespace or of all, in pages."""
        found: list[Manifest] = []
        query = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = ",".join(f"{key}={value}" for key, value in labels.items())
        while True:
            page = await self._ask("GET", kind, namespace, "", params=query)
            found += page.get("items") or []
            if not (more := (page.get("metadata") or {}).get("continue")):
                return found
            query["continue"] = more

    async def create(self, kind: Kind, manifest: Manifest, record: bool = True) -> Manifest:
        """Make an object. `record`: it keeps what was written, for a later merge."""
        body = with_record(manifest) if record else manifest
        return await self._ask("POST", kind, str(manifest["metadata"].get("namespace", "")), "", body=body)

    async def patch(self, kind: Kind, live: Manifest, patch: Manifest, status: bool = False) -> Manifest:
        """Change an object, unless it has changed since it was read: then ApiError 409."""
        metadata = live["metadata"]
        version = {"resourceVersion": metadata["resourceVersion"]}
        body = patch | {"metadata": dict(patch.get("metadata", {})) | version}
        name = f"{metadata['name']}/status" if status else metadata["name"]
        return await self._ask("PATCH", kind, metadata.get("namespace", ""), name, body=body, content_type=_MERGE)

    async def replace(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Write an object with the resourceVersion that it names."""
        metadata = manifest["metadata"]
        return await self._ask("PUT", kind, metadata.get("namespace", ""), metadata["name"], body=manifest)

    async def delete(self, kind: Kind, live: Manifest, propagation: str = "Background") -> None:
        """Delete this very object; one that took its name meanwhile stays."""
        metadata = live["metadata"]
        body = {"propagationPolicy": propagation, "preconditions": {"uid": metadata["uid"]}}
        try:
            await self._ask("DELETE", kind, metadata.get("namespace", ""), metadata["name"], body=body)
        except ApiError as error:
            if error.status != 404:
                raise

    async def groups(self) -> set[str]:
        """Return the groups and versions that the server has, such as apps/v1."""
        found = await self._call("GET", base="/apis", url="")
        return {
            version["groupVersion"] for group in found.get("groups") or () for version in group.get("versions") or ()
        }

    async def _ask(
        self,
        method: str,
        kind: Kind,
        namespace: str,
        name: str,
        body: Manifest | None = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Manifest:
        url = f"{kind.plural}/{name}" if name else kind.plural
        return await self._call(
            method,
            version=kind.api,
            namespace=(namespace or None) if kind.namespaced else None,
            url=url,
            content=None if body is None else json.dumps(body),
            params=params,
            content_type=content_type,
        )

    async def _call(self, method: str, **more: Any) -> Manifest:
        try:
            response = await self._send(method, **more)
            if response.status_code == 401:  # the token has expired: a kubelet writes the pod a new one in time
                await self._api.reauthenticate()
                response = await self._send(method, **more)
            found = response.json() if response.content else {}
            if response.is_success:
                return dict(found)
        except (httpx.HTTPError, OSError, ValueError, kr8s.ServerError, kr8s.APITimeoutError) as error:
            raise ApiError(
                0, "Unreachable", f"the API server does not answer: {str(error) or type(error).__name__}"
            ) from error
        found = found if isinstance(found, dict) else {}
        after = response.headers.get("Retry-After", "")
        raise ApiError(
            response.status_code,
            str(found.get("reason") or response.reason_phrase),
            str(found.get("message") or f"HTTP {response.status_code}"),
            float(after) if after.isdigit() else 0.0,
        )

    async def _send(
        self, method: str, base: str = "", version: str = "", content_type: str = "application/json", **more: Any
    ) -> httpx.Response:
        headers = {"Content-Type": content_type, "User-Agent": f"kvkern-operator/{VERSION}"}
        if token := self._api.auth.token:
            headers["Authorization"] = f"Bearer {token}"  # kr8s keeps the first one for the life of its session
        response: httpx.Response
        async with self._api.call_api(
            method, base=base, version=version, raise_for_status=False, timeout=TIMEOUT_S, headers=headers, **more
        ) as response:
            return response
