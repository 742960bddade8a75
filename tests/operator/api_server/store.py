"""The API server without HTTP: create, update, patch and delete with everything that a real one does to an object.

A write prepares the object (decode, defaults, webhooks, validation) without the lock, and commits it with the lock if the
object is still the one that it started from. Otherwise it begins anew, or is refused if it named a revision.
"""

from __future__ import annotations

import datetime
import random
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import builtin_schemas, strategy
from .admission import Admission, Request
from .crds import established, resources_of
from .deletion import Deletion, check_preconditions, finish_namespaces
from .errors import Cause, already_exists, bad_request, conflict, forbidden, internal, invalid, not_found
from .garbage import Collector
from .json_values import Json, clone, json_patch, merge_patch, without_nulls
from .managed_fields import record_update, server_side_apply
from .objects import Key, Objects
from .resources import Registry, Resource
from .selectors import field_selector, label_selector
from .strategic import strategic_merge

NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")


@dataclass
class Options:
    """Of one write. A write with `manager` is checked against the schemas of built-in objects, and owns its fields."""

    subresource: str = ""
    dry_run: bool = False
    manager: str = ""
    force: bool = False
    field_validation: str = "Warn"
    warnings: list[str] = field(default_factory=list)


class Store:
    """Objects and the verbs on them. Every method may be called from any thread.

    `resource` is a Resource, or its name as `pods` or `kvcaches.kvkern.io`. What `view` returns must not be changed; other
    methods return copies. Raises ApiError as a client would see it.
    """

    def __init__(self, seed: int = 0) -> None:
        self.lock = threading.RLock()
        self.objects = Objects()
        self.registry = Registry()
        self.admission = Admission(self)
        self.collect_at_once = True  # False: only `collect` deletes dependents
        self.clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)
        self._random = random.Random(seed)
        self._collector = Collector(self)
        for name in NAMESPACES:
            self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def now(self) -> str:
        return self.clock().strftime("%Y-%m-%dT%H:%M:%SZ")

    def resource(self, resource: Resource | str) -> Resource:
        return self.registry.named(resource) if isinstance(resource, str) else resource

    # Reads

    def view(self, resource: Resource | str, namespace: str = "") -> list[Json]:
        """Return the stored objects themselves, sorted by namespace and name. They must not be changed."""
        with self.lock:
            return self.objects.all(self.resource(resource).key, namespace)

    def list(self, resource: Resource | str, namespace: str = "", labels: str = "", fields: str = "") -> list[Json]:
        match_labels, match_fields = label_selector(labels), field_selector(fields)
        found = [o for o in self.view(resource, namespace) if match_labels(o) and match_fields(o)]
        return [clone(obj) for obj in found]

    def find(self, resource: Resource | str, name: str, namespace: str = "") -> Json | None:
        """Return an object, or None. It must not be changed."""
        with self.lock:
            return self.objects.get(self.resource(resource).key, namespace, name)

    def get(self, resource: Resource | str, name: str, namespace: str = "") -> Json:
        resource = self.resource(resource)
        obj = self.find(resource, name, namespace)
        if obj is None:
            raise not_found(resource, name)
        copy: Json = clone(obj)
        copy["apiVersion"] = resource.api_version
        return copy

    # Writes

    def create(self, obj: Json, resource: Resource | None = None, options: Options | None = None) -> Json:
        options = options or Options()
        resource = resource or self._resource_of(obj)
        obj = self._decoded(resource, obj, options)
        meta = obj["metadata"]
        if meta.pop("resourceVersion", ""):
            raise bad_request("resourceVersion should not be set on objects to be created")
        for name in strategy.SERVER_SET:
            meta.pop(name, None)
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"] + "".join(self._random.choices("bcdfghjklmnpqrstvwxz2456789", k=5))
        elif not meta.get("name"):
            text = "Required value: name or generateName is required"
            raise invalid(resource, "", [Cause("metadata.name", text, "FieldValueRequired")])
        if resource.namespaced:
            meta.setdefault("namespace", "default")
        self._check_namespace(resource, meta)
        unknown = strategy.fill_in(resource, obj, None)
        self._report_unknown(unknown, options)
        strategy.reset_status(resource, obj)
        obj = self._admitted("CREATE", resource, obj, None, options)
        with self.lock:
            self._check_namespace(resource, meta)
            if self.objects.get(resource.key, meta.get("namespace", ""), meta["name"]) is not None:
                raise already_exists(resource, meta["name"])
            strategy.allocate(resource, obj, self.objects)
            meta = obj["metadata"]
            meta["uid"] = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
            meta["creationTimestamp"] = self.now()
            if resource.generation:
                meta["generation"] = 1
            if options.manager and "managedFields" not in meta:
                record_update(resource, None, obj, options.manager, options.subresource, self.now())
            return self._committed(resource, obj, options)

    def update(self, obj: Json, resource: Resource | None = None, options: Options | None = None) -> Json:
        """Replace an object. Its resourceVersion, if any, must be the current one."""
        resource = resource or self._resource_of(obj)
        meta = obj.get("metadata") or {}
        if not resource.unconditional_update and not meta.get("resourceVersion"):
            text = "Invalid value: 0x0: must be specified for an update"
            raise invalid(resource, meta.get("name", ""), [Cause("metadata.resourceVersion", text)])

        def replaced(old: Json) -> Json:
            new: Json = clone(obj)
            new["metadata"].setdefault("resourceVersion", old["metadata"]["resourceVersion"])
            return new

        name, namespace = meta.get("name", ""), meta.get("namespace", "default") if resource.namespaced else ""
        return self._changed(resource, name, namespace, replaced, options or Options())

    def patch(
        self,
        resource: Resource | str,
        name: str,
        patch: Any,
        namespace: str = "",
        kind: str = "merge",  # or json, strategic, apply
        options: Options | None = None,
    ) -> Json:
        """Change an object. `apply` creates it if it is absent, and needs a manager."""
        resource, options = self.resource(resource), options or Options()
        if kind == "apply" and not options.manager:
            raise bad_request(
                "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value: is required for apply patch"
            )
        if kind == "strategic" and resource.schema is not None:
            raise bad_request("strategic merge patch is not supported for custom resources")

        def patched(old: Json) -> Json:
            if kind == "apply":
                return server_side_apply(
                    resource, old, self._decoded(resource, patch, options, partial=True), options.manager, options.force,
                    options.subresource, self.now(),
                )  # fmt: skip
            change = {"merge": merge_patch, "json": json_patch, "strategic": strategic_merge}[kind]
            changed: Json = change({**old, "apiVersion": resource.api_version}, patch)
            return changed

        if kind == "apply" and self.find(resource, name, namespace) is None:
            if options.subresource:
                raise not_found(resource, name)
            applied = {**patch, "metadata": {**(patch.get("metadata") or {}), "name": name, "namespace": namespace}}
            if not resource.namespaced:
                del applied["metadata"]["namespace"]
            new = server_side_apply(resource, None, applied, options.manager, options.force, "", self.now())
            return self.create(new, resource, options)
        return self._changed(resource, name, namespace, patched, options, owns=kind != "apply")

    def delete(
        self,
        resource: Resource | str,
        name: str,
        namespace: str = "",
        deletion: Deletion | None = None,
        options: Options | None = None,
        *,
        grace_s: int | None = None,
        propagation: str | None = None,
    ) -> tuple[Json, bool]:
        """Delete an object, or mark it if it has finalizers or is a pod on a node. Returns it, and whether it is gone."""
        deletion, options = deletion or Deletion(grace_s, propagation), options or Options()
        resource = self.resource(resource)
        old = self._existing(resource, name, namespace)
        self.admission.validate(self._request("DELETE", resource, None, old, options), options.warnings)
        with self.lock:
            obj = self._existing(resource, name, namespace)
            check_preconditions(resource, obj, deletion)
            if options.dry_run:
                return clone(obj), True
            last = self.delete_stored(resource.key, obj, deletion.grace_s, deletion.propagation)
            return clone(last), self.objects.by_uid(obj["metadata"]["uid"]) is None

    def collect(self) -> None:
        """Delete the dependents of what is gone, and let go what waits for its dependents."""
        with self.lock:
            self._collector.run()

    # Commits, with the lock

    def delete_stored(self, key: Key, obj: Json, grace_s: int | None = None, propagation: str | None = None) -> Json:
        """Mark an object for deletion, and remove it if nothing holds it. Returns its last state."""
        marked = Deletion(grace_s, propagation).marked(key, obj, self.clock())
        if key != ("", "namespaces") and not _is_held(marked):
            return self._settle(key, obj, removed=True)
        return self._settle(key, self.objects.put(key, marked) if marked != obj else obj)

    def replace_stored(self, key: Key, obj: Json) -> Json:
        """Store an object, and remove it if it waited for its last finalizer. Returns its last state."""
        return self._settle(key, self.objects.put(key, obj))

    def _settle(self, key: Key, obj: Json, removed: bool = False) -> Json:
        """Do what follows from a write, and remove the object if nothing holds it any more."""
        if obj["metadata"].get("deletionTimestamp") and not _is_held(obj):
            removed = key != ("", "namespaces") or not self.objects.keys_in(obj["metadata"]["name"])
        if removed:
            obj = self.objects.remove(key, obj)
        if key == ("apiextensions.k8s.io", "customresourcedefinitions"):
            self.registry.remove(obj["spec"]["group"], obj["spec"]["names"]["plural"])
            for resource in () if removed else resources_of(obj):
                self.registry.add(resource)
        self._collector.changed(obj, removed)
        if removed or obj["metadata"].get("deletionTimestamp"):
            finish_namespaces(self, key, obj, removed)
        if self.collect_at_once:
            self._collector.run()
        return obj

    def _committed(self, resource: Resource, obj: Json, options: Options) -> Json:
        if resource.kind == "CustomResourceDefinition":
            obj["status"] = established(obj, self.now())
        if options.dry_run:
            return {**clone(obj)}
        last = self.replace_stored(resource.key, obj)
        if resource.kind == "Namespace" and not obj["metadata"].get("deletionTimestamp"):
            account = {"apiVersion": "v1", "kind": "ServiceAccount"}
            account_meta = {"name": "default", "namespace": obj["metadata"]["name"]}
            if self.find("serviceaccounts", "default", account_meta["namespace"]) is None:
                self.create({**account, "metadata": account_meta})
        return {**clone(last), "apiVersion": resource.api_version}

    # Steps of a write, without the lock

    def _changed(
        self,
        resource: Resource,
        name: str,
        namespace: str,
        change: Callable[[Json], Json],
        options: Options,
        owns: bool = True,
    ) -> Json:
        """Commit a change of an object, from its newest state on if it names no revision."""
        for _ in range(20):
            old = self._existing(resource, name, namespace)
            new = self._decoded(resource, change(clone(old)), options)
            given = new["metadata"].get("resourceVersion")
            if given != old["metadata"]["resourceVersion"]:
                raise conflict(resource, name)
            had, wanted = old["metadata"]["uid"], new["metadata"].get("uid")
            if wanted not in (None, had):
                why = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {had}"
                raise conflict(resource, name, why)
            new = strategy.restore(resource, old, new, options.subresource)
            new = self._prepared(resource, old, new, options, owns)
            with self.lock:
                if self.find(resource, name, namespace) is not old:
                    continue
                if strategy.without_fields_owner(new) == strategy.without_fields_owner(old) and not _owners_differ(
                    old, new
                ):
                    return {**clone(old), "apiVersion": resource.api_version}
                return self._committed(resource, new, options)
        raise internal(f"{resource.label} {name!r} changed 20 times during one write")

    def _prepared(self, resource: Resource, old: Json, new: Json, options: Options, owns: bool) -> Json:
        unknown = strategy.fill_in(resource, new, old)
        self._report_unknown(unknown, options)
        new = self._admitted("UPDATE", resource, new, old, options)
        if old["metadata"].get("deletionTimestamp"):
            added = set(new["metadata"].get("finalizers") or []) - set(old["metadata"].get("finalizers") or [])
            if added:
                text = (
                    f"Forbidden: no new finalizers can be added if the object is being deleted, found {sorted(added)}"
                )
                cause = Cause("metadata.finalizers", text, "FieldValueForbidden")
                raise invalid(resource, new["metadata"]["name"], [cause])
        if resource.kind == "Service":
            with self.lock:
                strategy.allocate(resource, new, self.objects)
        if options.subresource != "status":
            strategy.count_generation(resource, old, new)
        if options.manager and owns and strategy.without_fields_owner(new) != strategy.without_fields_owner(old):
            record_update(resource, old, new, options.manager, options.subresource, self.now())
        return new

    def _admitted(self, operation: str, resource: Resource, obj: Json, old: Json | None, options: Options) -> Json:
        """Return the object after the webhooks. Raises if it is invalid or refused."""
        changed = self.admission.mutate(self._request(operation, resource, obj, old, options), options.warnings)
        if changed is not obj:
            strategy.fill_in(resource, changed, old)
        causes = strategy.errors(resource, changed, old)
        if causes:
            raise invalid(resource, changed["metadata"].get("name", ""), causes)
        self.admission.validate(self._request(operation, resource, changed, old, options), options.warnings)
        return changed

    def _request(
        self, operation: str, resource: Resource, obj: Json | None, old: Json | None, options: Options
    ) -> Request:
        meta = (obj or old or {"metadata": {}})["metadata"]
        namespace, name = meta.get("namespace", ""), meta.get("name", "")
        return Request(operation, resource, namespace, name, obj, old, options.subresource, options.dry_run)

    def _decoded(self, resource: Resource, obj: Any, options: Options, partial: bool = False) -> Json:
        """Return a copy as the server reads it. Raises 400 for another kind or a wrong type."""
        if not isinstance(obj, dict) or not isinstance(obj.get("metadata", {}), dict):
            raise bad_request("the body of the request is not an object with metadata")
        if resource.schema is None:
            obj = without_nulls(obj)
        else:
            obj = {**dict(clone(obj)), "metadata": without_nulls(obj.get("metadata", {}))}
        obj.setdefault("metadata", {})
        given = (obj.setdefault("apiVersion", resource.api_version), obj.setdefault("kind", resource.kind))
        if given != (resource.api_version, resource.kind):
            raise bad_request(
                f"{given[1]} in version {given[0]!r} cannot be handled as a {resource.kind} in {resource.api_version}"
            )
        if resource.schema is None and options.manager:
            unknown, missing = builtin_schemas.check(obj)
            self._report_unknown(unknown, options)
            if missing and not partial and resource.kind != "CustomResourceDefinition":
                raise invalid(resource, obj["metadata"].get("name", ""), missing)
        return dict(obj)

    def _report_unknown(self, paths: Sequence[str], options: Options) -> None:
        fields = [f'unknown field "{path}"' for path in paths]
        if fields and options.field_validation == "Strict":
            raise bad_request(f"strict decoding error: {', '.join(fields)}")
        if options.field_validation == "Warn":
            options.warnings.extend(fields)

    def _existing(self, resource: Resource, name: str, namespace: str) -> Json:
        obj = self.find(resource, name, namespace)
        if obj is None:
            raise not_found(resource, name)
        return obj

    def _check_namespace(self, resource: Resource, meta: Json) -> None:
        if not resource.namespaced:
            if meta.pop("namespace", ""):
                raise bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request"
                )
            return
        namespace = self.find("namespaces", meta["namespace"])
        if namespace is None:
            raise not_found(self.resource("namespaces"), meta["namespace"])
        if namespace["metadata"].get("deletionTimestamp"):
            why = f"unable to create new content in namespace {meta['namespace']} because it is being terminated"
            raise forbidden(resource, meta["name"], why)

    def _resource_of(self, obj: Json) -> Resource:
        found = self.registry.of_kind(obj.get("apiVersion", ""), obj.get("kind", ""))
        if found is None:
            raise bad_request(f"no kind {obj.get('kind')!r} is registered for {obj.get('apiVersion')!r}")
        return found


def _is_held(obj: Json) -> bool:
    """Whether finalizers or a grace period hold an object that is to be deleted."""
    return bool(obj["metadata"].get("finalizers") or obj["metadata"].get("deletionGracePeriodSeconds"))


def _owners_differ(old: Json, new: Json) -> bool:
    """Whether `managedFields` differ in more than their times."""
    plain = [
        [{k: v for k, v in entry.items() if k != "time"} for entry in o["metadata"].get("managedFields") or []]
        for o in (old, new)
    ]
    return plain[0] != plain[1]
