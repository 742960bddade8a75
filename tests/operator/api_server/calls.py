"""One HTTP request as a call of the store: parses the path and the body, and performs every verb but watch."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

import yaml

from . import subresources
from .deletion import Deletion
from .errors import bad_request, expired, not_allowed, unknown_path, unsupported_media_type
from .faults import Faults
from .json_values import Json
from .resources import Resource
from .selectors import field_selector, label_selector
from .store import Options, Store

_PATCHES = {
    "application/json-patch+json": "json",
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/apply-patch+yaml": "apply",
}
_RETURNS_OBJECT = ("Pod", "ServiceAccount", "PersistentVolumeClaim")  # where a deletion answers with the object


@dataclass
class Call:
    """What a client asks for. `name` is empty for a collection."""

    method: str
    resource: Resource
    namespace: str
    name: str
    subresource: str
    query: dict[str, str]
    content_type: str = ""
    content: bytes = b""
    user_agent: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def verb(self) -> str:
        if self.method == "GET":
            watch = self.query.get("watch") in ("1", "true")
            return "watch" if watch else "get" if self.name else "list"
        if self.method == "DELETE":
            return "delete" if self.name else "deletecollection"
        return {"POST": "create", "PUT": "update", "PATCH": "patch"}.get(self.method, self.method.lower())

    @property
    def label(self) -> str:
        return f"{self.resource.plural}/{self.subresource}" if self.subresource else self.resource.plural

    @property
    def names(self) -> set[str]:
        """The names by which a fault may mean this call."""
        return {self.label, f"{self.resource.label}/{self.subresource}" if self.subresource else self.resource.label}

    @property
    def writes(self) -> bool:
        return self.method != "GET" and self.query.get("dryRun") != "All"

    def body(self) -> Any:
        if not self.content:
            return {}
        if self.content.startswith(b"k8s\x00"):
            raise unsupported_media_type("protobuf")
        try:
            return yaml.safe_load(self.content) if "yaml" in self.content_type else json.loads(self.content)
        except (ValueError, yaml.YAMLError) as error:
            raise bad_request(f"the object provided is unrecognized: {error}") from error

    def options(self) -> Options:
        manager = self.query.get("fieldManager") or self.user_agent.partition("/")[0] or "unknown"
        if self.query.get("dryRun", "All") != "All":
            raise bad_request(f"Invalid value: {self.query['dryRun']!r}: dryRun must be All")
        if "apply-patch" in self.content_type:
            manager = self.query.get("fieldManager", "")
        return Options(
            self.subresource,
            "dryRun" in self.query,
            manager,
            self.query.get("force") == "true",
            self.query.get("fieldValidation", "Warn"),
            self.warnings,
        )


def parse_path(store: Store, path: str) -> tuple[Resource, str, str, str]:
    """Return (resource, namespace, name, subresource). Raises 404 for what is not served."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["api"] and len(parts) > 2:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[:1] == ["apis"] and len(parts) > 3:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        raise unknown_path()
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and (group or rest[2] not in ("status", "finalize")):
        namespace, rest = rest[1], rest[2:]
    resource = store.registry.find(group, version, rest[0])
    name, subresource = (rest[1:2] or [""])[0], (rest[2:3] or [""])[0]
    if len(rest) > 3 or (subresource and subresource not in resource.subresources):
        raise unknown_path()
    if (namespace and not resource.namespaced) or (name and resource.namespaced and not namespace):
        raise unknown_path()
    return resource, namespace, name, subresource


class Performer:
    """Performs calls on a store, with the faults of a test. May be used from any thread."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self.store = store
        self.faults = faults
        self._pages: dict[str, tuple[list[Json], int, int]] = {}  # token -> the rest of a list, its revision and log

    def perform(self, call: Call) -> tuple[int, Json]:
        """Return the status and the body. Raises ApiError, and ConnectionLost if a callback wants that."""
        if not call.writes:
            return self._once(call, call.options())
        for callback in self.faults.callbacks("before", call.user_agent):
            trial = call.options()
            trial.dry_run, trial.warnings = True, []
            callback(self.faults.next_number(), call.verb, self._once(call, trial)[1])
        code, body = self._once(call, call.options())
        name = call.name or body.get("metadata", {}).get("name", "")
        number = self.faults.record(call.user_agent, call.verb, call.label, call.namespace, name)
        for callback in self.faults.callbacks("after", call.user_agent):
            callback(number, call.verb, body)
        return code, body

    def _once(self, call: Call, options: Options) -> tuple[int, Json]:
        verb, store, resource = call.verb, self.store, call.resource
        if call.subresource in ("eviction", "binding", "scale"):
            return self._subresource(call, options)
        if verb == "get":
            return 200, store.get(resource, call.name, call.namespace)
        if verb == "list":
            return 200, self._list(call)
        if verb == "create" and not call.name:
            return 201, store.create(_located(call), resource, options)
        if verb == "update" and call.name:
            return 200, store.update(_located(call), resource, options)
        if verb == "patch" and call.name:
            kind = _PATCHES.get(call.content_type.partition(";")[0])
            if kind is None:
                raise unsupported_media_type(call.content_type)
            new = kind == "apply" and store.find(resource, call.name, call.namespace) is None
            return 201 if new else 200, store.patch(resource, call.name, call.body(), call.namespace, kind, options)
        if verb == "delete":
            return 200, self._delete(call, options)
        if verb == "deletecollection":
            deleted = self._selected(call)
            for obj in deleted:
                meta = obj["metadata"]
                store.delete(resource, meta["name"], meta.get("namespace", ""), deletion_of(call), options)
            return 200, self._as_list(resource, deleted, {"resourceVersion": str(store.objects.revision)})
        raise not_allowed()

    def _delete(self, call: Call, options: Options) -> Json:
        obj, gone = self.store.delete(call.resource, call.name, call.namespace, deletion_of(call), options)
        if not gone or call.resource.kind in _RETURNS_OBJECT:
            return obj
        details = {
            "name": call.name,
            "group": call.resource.group,
            "kind": call.resource.plural,
            "uid": obj["metadata"]["uid"],
        }
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def _subresource(self, call: Call, options: Options) -> tuple[int, Json]:
        store, at = self.store, (call.name, call.namespace)
        if call.subresource == "scale":
            if call.verb == "get":
                return 200, subresources.scale_of(store.get(call.resource, *at))
            return 200, subresources.set_scale(store, call.resource, *at, call.body(), options)
        if call.verb != "create":
            raise not_allowed()
        body = call.body()
        if call.subresource == "eviction":
            options.subresource = ""
            return 201, subresources.evict(store, *at, deletion_from(body.get("deleteOptions") or {}), options)
        if not options.dry_run:
            subresources.bind(store, *at, (body.get("target") or {}).get("name", ""))
        return 201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}

    def _selected(self, call: Call) -> list[Json]:
        labels = label_selector(call.query.get("labelSelector", ""))
        fields = field_selector(call.query.get("fieldSelector", ""))
        found = self.store.view(call.resource, call.namespace)
        if call.name:
            found = [obj for obj in found if obj["metadata"]["name"] == call.name]
        return [obj for obj in found if labels(obj) and fields(obj)]

    def _list(self, call: Call) -> Json:
        with self.store.lock:
            objects, log = self.store.objects, self.store.objects.generation_of_log
            asked = int(call.query.get("resourceVersion") or 0)
            if call.query.get("continue"):
                rest, revision, made_in = self._pages.pop(call.query["continue"], ([], 0, -1))
                if made_in != log:
                    raise expired("The provided continue parameter is too old to display a consistent list result.")
            elif call.query.get("resourceVersionMatch") == "Exact" and asked < objects.compacted:
                raise expired(f"The resourceVersion for the provided list is too old: {asked} ({objects.compacted})")
            else:
                rest, revision = self._selected(call), objects.revision
        meta: Json = {"resourceVersion": str(revision)}
        limit = int(call.query.get("limit") or 0)
        if limit and len(rest) > limit:
            token = secrets.token_hex(8)
            self._pages[token] = (rest[limit:], revision, log)
            meta |= {"continue": token, "remainingItemCount": len(rest) - limit}
            rest = rest[:limit]
        return self._as_list(call.resource, rest, meta)

    @staticmethod
    def _as_list(resource: Resource, objects: list[Json], meta: Json) -> Json:
        if resource.schema is None:  # a real server leaves these out of lists of built-in objects
            objects = [{k: v for k, v in obj.items() if k not in ("kind", "apiVersion")} for obj in objects]
        else:
            objects = [{**obj, "apiVersion": resource.api_version} for obj in objects]
        kind = resource.list_kind or f"{resource.kind}List"
        return {"kind": kind, "apiVersion": resource.api_version, "metadata": meta, "items": objects}


def _located(call: Call) -> Json:
    """Return the body with the namespace and the name of the URL. Raises 400 if it names others."""
    body = call.body()
    if not isinstance(body, dict):
        raise bad_request("the body of the request is not an object")
    meta = {**(body.get("metadata") or {})}
    for name, wanted in (("namespace", call.namespace), ("name", call.name)):
        if wanted and meta.setdefault(name, wanted) != wanted:
            raise bad_request(
                f"the {name} of the provided object does not match the {name} sent on the request ({meta[name]} and {wanted})"
            )
    return {**body, "metadata": meta}


def deletion_of(call: Call) -> Deletion:
    options = {**call.body()} if call.content else {}
    for name in ("propagationPolicy", "gracePeriodSeconds"):
        if name in call.query:
            options.setdefault(name, call.query[name])
    return deletion_from(options)


def deletion_from(options: Json) -> Deletion:
    before = options.get("preconditions") or {}
    grace = options.get("gracePeriodSeconds")
    propagation = options.get("propagationPolicy")
    if propagation is None and options.get("orphanDependents"):
        propagation = "Orphan"
    if propagation not in (None, "Background", "Foreground", "Orphan"):
        raise bad_request(f"invalid propagationPolicy: {propagation!r}")
    return Deletion(
        None if grace is None else int(grace), propagation, before.get("uid"), before.get("resourceVersion")
    )
