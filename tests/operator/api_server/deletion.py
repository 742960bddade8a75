"""What a deletion does to an object, and the end of namespaces and of custom resources' definitions."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import conflict
from .json_values import Json, clone
from .objects import Key
from .resources import Resource

if TYPE_CHECKING:
    from .store import Store

_DEFINITIONS = ("apiextensions.k8s.io", "customresourcedefinitions")
_CLEANUP = "customresourcecleanup.apiextensions.k8s.io"


@dataclass(frozen=True)
class Deletion:
    """DeleteOptions. A pod on a node keeps running for its grace period; who plays the kubelet deletes it with grace 0."""

    grace_s: int | None = None
    propagation: str | None = None
    uid: str | None = None
    revision: str | None = None

    def marked(self, key: Key, obj: Json, now: datetime.datetime) -> Json:
        """Return the object with deletionTimestamp and with the finalizers that the propagation asks for."""
        changed: Json = clone(obj)
        meta = changed["metadata"]
        grace_s = _grace_s(key, obj, self.grace_s)
        if not meta.get("deletionTimestamp"):
            finalizer = {"Foreground": "foregroundDeletion", "Orphan": "orphan"}.get(self.propagation or "")
            others = [f for f in meta.get("finalizers") or [] if f not in ("foregroundDeletion", "orphan")]
            finalizers = [*others, *([finalizer] if finalizer else [])]
            if key == _DEFINITIONS:
                finalizers.append(_CLEANUP)
            if finalizers:
                meta["finalizers"] = finalizers
            if "generation" in meta:
                meta["generation"] += 1
        elif grace_s >= (meta.get("deletionGracePeriodSeconds") or 0):
            return changed  # a deletion may be hastened, never put off
        meta["deletionTimestamp"] = (now + datetime.timedelta(seconds=grace_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
        meta["deletionGracePeriodSeconds"] = grace_s
        if key == ("", "namespaces"):
            changed["status"] = {**changed.get("status", {}), "phase": "Terminating"}
        return changed


def _grace_s(key: Key, obj: Json, asked_s: int | None) -> int:
    if key != ("", "pods") or not obj["spec"].get("nodeName") or obj["status"].get("phase") in ("Succeeded", "Failed"):
        return 0
    if asked_s is not None:
        return max(asked_s, 0)
    grace_s: int = obj["spec"]["terminationGracePeriodSeconds"]
    return grace_s


def check_preconditions(resource: Resource, obj: Json, deletion: Deletion) -> None:
    """Raise 409 if the object is not the one that was meant."""
    meta = obj["metadata"]
    for word, wanted, found in (
        ("UID", deletion.uid, meta["uid"]),
        ("ResourceVersion", deletion.revision, meta["resourceVersion"]),
    ):
        if wanted not in (None, "", found):
            why = f"Precondition failed: {word} in precondition: {wanted}, {word} in object meta: {found}"
            raise conflict(resource, meta["name"], why)


def finish_namespaces(store: Store, key: Key, obj: Json, removed: bool) -> None:
    """Delete what is in a terminating namespace or of a terminating definition, and let it go when that is empty."""
    meta = obj["metadata"]
    if not removed and key == ("", "namespaces"):
        for inner, name in store.objects.keys_in(meta["name"]):
            held = store.objects.get(inner, meta["name"], name)
            if held is not None and not held["metadata"].get("deletionTimestamp"):
                store.delete_stored(inner, held)
        return
    if not removed and key == _DEFINITIONS:
        inner = (obj["spec"]["group"], obj["spec"]["names"]["plural"])
        for held in store.objects.all(inner):
            if not held["metadata"].get("deletionTimestamp"):
                store.delete_stored(inner, held)
        _let_go(store, inner)
        return
    if removed:
        namespace = store.objects.get(("", "namespaces"), "", meta.get("namespace", ""))
        ends = namespace is not None and bool(namespace["metadata"].get("deletionTimestamp"))
        if ends and not store.objects.keys_in(meta["namespace"]):
            store.replace_stored(("", "namespaces"), clone(namespace))
        _let_go(store, key)


def _let_go(store: Store, key: Key) -> None:
    """Remove the finalizer of a terminating definition without objects."""
    definition = store.objects.get(_DEFINITIONS, "", f"{key[1]}.{key[0]}")
    if definition is None or not definition["metadata"].get("deletionTimestamp") or store.objects.all(key):
        return
    if _CLEANUP in (definition["metadata"].get("finalizers") or []):
        changed = clone(definition)
        changed["metadata"]["finalizers"].remove(_CLEANUP)
        store.replace_stored(_DEFINITIONS, changed)
