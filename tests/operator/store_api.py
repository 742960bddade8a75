"""kvkern.operator.api.Api over the store of the API server's double, without HTTP: for thousands of passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvkern.operator.api import Api, ApiError
from kvkern.operator.kinds import Kind
from kvkern.operator.merge import with_record
from tests.operator.api_server import ApiError as ServerError
from tests.operator.api_server import Deletion, Options, Store


class Crash(BaseException):
    """The operator ends here."""


class StoreApi(Api):
    """An operator's connection. `crash_after` counts down with each write; at 0 the operator ends, before or after it."""

    def __init__(self, store: Store, crash_after: int = -1, before: bool = True) -> None:
        self.store, self.crash_after, self.before = store, crash_after, before
        self.writes = 0

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.store.find(_name(kind), name, namespace)
        return found

    async def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        selector = ",".join(f"{key}={value}" for key, value in (labels or {}).items())
        found: list[dict[str, Any]] = self.store.list(_name(kind), namespace, selector)
        return found

    async def create(self, kind: Kind, manifest: dict[str, Any], record: bool = True) -> dict[str, Any]:
        return self._write(lambda: self.store.create(with_record(manifest) if record else manifest))

    async def patch(
        self, kind: Kind, live: dict[str, Any], patch: dict[str, Any], status: bool = False
    ) -> dict[str, Any]:
        metadata = live["metadata"]
        body = patch | {"metadata": dict(patch.get("metadata", {})) | {"resourceVersion": metadata["resourceVersion"]}}
        return self._write(
            lambda: self.store.patch(
                _name(kind), metadata["name"], body, metadata.get("namespace", ""),
                options=Options(subresource="status" if status else ""),
            )
        )  # fmt: skip

    async def delete(self, kind: Kind, live: dict[str, Any], propagation: str = "Background") -> None:
        metadata = live["metadata"]
        deletion = Deletion(None, propagation, metadata["uid"])
        try:
            self._write(
                lambda: self.store.delete(_name(kind), metadata["name"], metadata.get("namespace", ""), deletion)
            )
        except ApiError as error:
            if error.status != 404:
                raise

    async def groups(self) -> set[str]:
        return {"apps/v1", "policy/v1", "networking.k8s.io/v1"}

    def _write(self, write: Any) -> Any:
        if self.crash_after == 0 and self.before:
            raise Crash
        try:
            done = write()
        except ServerError as error:
            raise ApiError(error.code, error.reason, error.message) from error
        self.writes += 1
        if self.crash_after == 0:
            raise Crash
        self.crash_after -= 1
        return done


def _name(kind: Kind) -> str:
    group, _, _ = kind.api.rpartition("/")
    return f"{kind.plural}.{group}" if group else kind.plural
