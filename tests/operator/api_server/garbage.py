"""The garbage collector: deletes what its owners left behind, as the controller manager does.

examine(object):
    terminating with `orphan`             -> take the reference out of its dependents, then let it go
    terminating with `foregroundDeletion` -> delete dependents; let it go when no blocking one is left
    no owner exists any more              -> delete it; some exist -> take the others' references out
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from .json_values import Json, clone
from .objects import Key

if TYPE_CHECKING:
    from .store import Store


class Collector:
    """Works through what changed. Call with the store's lock."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._uids: deque[str] = deque()
        self._busy = False

    def changed(self, obj: Json, removed: bool) -> None:
        """Remember an object that was written or removed, and whom that concerns."""
        uid = obj["metadata"]["uid"]
        if not removed and (obj["metadata"].get("ownerReferences") or obj["metadata"].get("deletionTimestamp")):
            self._uids.append(uid)
        if removed:
            self._uids.extend(dependent["metadata"]["uid"] for _, dependent in self._store.objects.dependents(uid))
            self._uids.extend(owner["uid"] for owner in obj["metadata"].get("ownerReferences") or [])

    def run(self) -> None:
        """Collect until nothing is left to do."""
        if self._busy:
            return
        self._busy = True
        try:
            while self._uids:
                entry = self._store.objects.by_uid(self._uids.popleft())
                if entry is not None:
                    self._examine(*entry)
        finally:
            self._busy = False

    def _examine(self, key: Key, obj: Json) -> None:
        meta = obj["metadata"]
        finalizers = meta.get("finalizers") or []
        if meta.get("deletionTimestamp"):
            dependents = self._store.objects.dependents(meta["uid"])
            if "orphan" in finalizers:
                for dependent_key, dependent in dependents:
                    self._disown(dependent_key, dependent, {meta["uid"]})
                self._drop(key, obj, "orphan")
            elif "foregroundDeletion" in finalizers:
                for dependent_key, dependent in dependents:
                    if not dependent["metadata"].get("deletionTimestamp"):
                        self._delete(dependent_key, dependent, foreground=True)
                if not any(_blocks(d, meta["uid"]) for _, d in self._store.objects.dependents(meta["uid"])):
                    self._drop(key, obj, "foregroundDeletion")
            return
        owners = meta.get("ownerReferences") or []
        absent = {owner["uid"] for owner in owners if not self._exists(owner, meta.get("namespace", ""))}
        if owners and len(absent) == len({owner["uid"] for owner in owners}):
            self._delete(key, obj, foreground=False)
        elif absent:
            self._disown(key, obj, absent)

    def _exists(self, owner: Json, namespace: str) -> bool:
        """Whether an owner exists. An owner of a kind that is not served counts as existing, because nobody can tell."""
        resource = self._store.registry.of_kind(owner["apiVersion"], owner["kind"])
        if resource is None or (resource.namespaced and not namespace):
            return True
        found = self._store.objects.get(resource.key, namespace if resource.namespaced else "", owner["name"])
        return found is not None and found["metadata"]["uid"] == owner["uid"]

    def _delete(self, key: Key, obj: Json, foreground: bool) -> None:
        dependents = self._store.objects.dependents(obj["metadata"]["uid"])
        propagation = "Foreground" if foreground and dependents else None
        self._store.delete_stored(key, obj, propagation=propagation)

    def _disown(self, key: Key, obj: Json, uids: set[str]) -> None:
        changed = clone(obj)
        owners = [o for o in changed["metadata"]["ownerReferences"] if o["uid"] not in uids]
        changed["metadata"]["ownerReferences"] = owners
        if not owners:
            del changed["metadata"]["ownerReferences"]
        self._store.replace_stored(key, changed)

    def _drop(self, key: Key, obj: Json, finalizer: str) -> None:
        changed = clone(obj)
        changed["metadata"]["finalizers"].remove(finalizer)
        self._store.replace_stored(key, changed)


def _blocks(dependent: Json, uid: str) -> bool:
    owners = dependent["metadata"].get("ownerReferences") or []
    return any(owner["uid"] == uid and owner.get("blockOwnerDeletion") for owner in owners)
