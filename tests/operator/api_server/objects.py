"""The objects, one counter of revisions, and the changes that watches replay. Knows nothing of verbs or of defaults."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

from .errors import expired
from .json_values import Json

Key = tuple[str, str]  # group, plural


class Change(NamedTuple):
    revision: int
    kind: str  # ADDED, MODIFIED or DELETED
    object: Json
    old: Json | None


class Objects:
    """All objects. What it holds is never changed in place, so it may be read without a copy. Call with the store's lock."""

    def __init__(self) -> None:
        self.revision = 1000
        self.compacted = 1000  # revisions below cannot be watched from
        self.generation_of_log = 0  # counts compactions
        self.listeners: set[Callable[[], None]] = set()
        self._tables: dict[Key, dict[tuple[str, str], Json]] = {}
        self._log: dict[Key, list[Change]] = {}
        self._by_uid: dict[str, tuple[Key, str, str]] = {}
        self._dependents: dict[str, set[str]] = {}  # uid of the owner -> uids

    def get(self, key: Key, namespace: str, name: str) -> Json | None:
        return self._tables.get(key, {}).get((namespace, name))

    def all(self, key: Key, namespace: str = "") -> list[Json]:
        """Return the objects of a resource, sorted by namespace and name."""
        table = self._tables.get(key, {})
        return [table[at] for at in sorted(table) if not namespace or at[0] == namespace]

    def keys_in(self, namespace: str) -> list[tuple[Key, str]]:
        """Return (resource, name) of everything in a namespace."""
        return [(key, at[1]) for key, table in self._tables.items() for at in sorted(table) if at[0] == namespace]

    def by_uid(self, uid: str) -> tuple[Key, Json] | None:
        at = self._by_uid.get(uid)
        return None if at is None else (at[0], self._tables[at[0]][at[1], at[2]])

    def dependents(self, uid: str) -> list[tuple[Key, Json]]:
        """Return the objects with an ownerReference to a uid."""
        found = [self.by_uid(dependent) for dependent in sorted(self._dependents.get(uid, ()))]
        return [entry for entry in found if entry is not None]

    def put(self, key: Key, obj: Json) -> Json:
        """Store an object under the next revision, which becomes its resourceVersion."""
        at = (obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        table = self._tables.setdefault(key, {})
        old = table.get(at)
        self.revision += 1
        obj["metadata"]["resourceVersion"] = str(self.revision)
        table[at] = obj
        uid = obj["metadata"]["uid"]
        self._by_uid[uid] = (key, *at)
        self._index_owners(uid, old, obj)
        self._record(key, Change(self.revision, "MODIFIED" if old else "ADDED", obj, old))
        return obj

    def remove(self, key: Key, obj: Json) -> Json:
        """Remove an object. Returns its last state, which has a revision of its own."""
        at = (obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        old = self._tables[key].pop(at)
        self.revision += 1
        last = {**old, "metadata": {**old["metadata"], "resourceVersion": str(self.revision)}}
        del self._by_uid[old["metadata"]["uid"]]
        self._index_owners(old["metadata"]["uid"], old, None)
        self._record(key, Change(self.revision, "DELETED", last, old))
        return last

    def changes(self, key: Key, after: int) -> list[Change]:
        """Return the changes of a resource after a revision. Raises 410 if they are not known any more."""
        if after < self.compacted:
            raise expired(f"too old resource version: {after} ({self.compacted})")
        log = self._log.get(key, [])
        return log[bisect_right(log, after, key=lambda change: change.revision) :]

    def compact(self) -> None:
        """Forget all changes so far."""
        self.revision += 1
        self.compacted = self.revision
        self.generation_of_log += 1
        self._log.clear()
        self._notify()

    def _index_owners(self, uid: str, old: Json | None, new: Json | None) -> None:
        for obj, present in ((old, False), (new, True)):
            for owner in (obj or {"metadata": {}})["metadata"].get("ownerReferences") or []:
                owned = self._dependents.setdefault(owner["uid"], set())
                if present:
                    owned.add(uid)
                else:
                    owned.discard(uid)

    def _record(self, key: Key, change: Change) -> None:
        self._log.setdefault(key, []).append(change)
        self._notify()

    def _notify(self) -> None:
        for listener in tuple(self.listeners):
            listener()
