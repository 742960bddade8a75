"""What the toy controllers share: the store behind short calls, and the questions they ask of pods."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from math import ceil, floor
from typing import Any

from tests.operator.api_server import ApiError, Deletion, Options, Store
from tests.operator.api_server.json_values import Json, clone
from tests.operator.api_server.objects import Key
from tests.operator.api_server.selectors import selects
from tests.operator.api_server.subresources import evict

PODS: Key = ("", "pods")


class World:
    """The store, the number of the step, and one seeded source of chance. One thread at a time."""

    def __init__(self, store: Store, seed: int) -> None:
        self.store = store
        self.random = random.Random(seed)
        self.step = 0
        self.refused: list[tuple[int, str, str]] = []  # (step, pod, why) of pods that the server did not take

    def view(self, resource: str, namespace: str = "") -> list[Json]:
        return self.store.view(resource, namespace)

    def current(self, key: Key, obj: Json) -> Json | None:
        """Return an object as it is now, or None if it is gone."""
        found = self.by_uid(obj["metadata"]["uid"])
        return found[1] if found and found[0] == key else None

    def by_uid(self, uid: str) -> tuple[Key, Json] | None:
        with self.store.lock:
            return self.store.objects.by_uid(uid)

    def edit(self, key: Key, obj: Json, change: Callable[[Json], None]) -> Json | None:
        """Change an object as it is now, at once. Counts the generation if the spec changes."""
        with self.store.lock:
            current = self.current(key, obj)
            if current is None:
                return None
            new: Json = clone(current)
            change(new)
            if new == current:
                return current
            if new.get("spec") != current.get("spec") and "generation" in new["metadata"]:
                new["metadata"]["generation"] += 1
            return self.store.replace_stored(key, new)

    def set_status(self, key: Key, obj: Json, status: Json) -> None:
        """Replace the status. Conditions keep the time at which they became what they are."""
        with self.store.lock:
            current = self.current(key, obj)
            if current is None:
                return
            before = {c["type"]: c for c in (current.get("status") or {}).get("conditions") or []}
            for condition in status.get("conditions") or []:
                had = before.get(condition["type"], {})
                same = had.get("status") == condition["status"]
                condition["lastTransitionTime"] = (
                    had.get("lastTransitionTime", self.store.now()) if same else self.store.now()
                )
            if status != current.get("status"):
                self.store.replace_stored(key, {**current, "metadata": {**current["metadata"]}, "status": status})

    def owned(self, resource: str, owner: Json) -> list[Json]:
        """Return what an owner controls. It adopts what its selector means and nobody controls."""

        def adopt(new: Json) -> None:
            new["metadata"].setdefault("ownerReferences", []).append(owner_reference(owner))

        key = self.store.resource(resource).key
        selector = owner["spec"].get("selector")
        found = self.view(resource, owner["metadata"]["namespace"])
        for obj in found:
            meta = obj["metadata"]
            if (
                not controller_uid(obj)
                and not terminating(obj)
                and selects(selector, meta.get("labels"))
                and _fits(obj, owner)
            ):
                self.edit(
                    key,
                    obj,
                    lambda new: new["metadata"].setdefault("ownerReferences", []).append(owner_reference(owner)),
                )
        return owned(self.view(resource, owner["metadata"]["namespace"]), owner)

    def delete_pod(self, pod: Json, grace_s: int | None = None) -> None:
        """Mark a pod for deletion, or remove it with grace 0."""
        with self.store.lock:
            current = self.current(PODS, pod)
            if current is not None:
                self.store.delete_stored(PODS, current, grace_s)

    def create(self, obj: Json) -> Json | None:
        """Create an object. Returns None, and keeps why, if the server refuses."""
        try:
            return self.store.create(obj)
        except ApiError as error:
            meta = obj["metadata"]
            self.refused.append((self.step, meta.get("name") or meta.get("generateName", ""), error.message))
            return None

    def evict(self, namespace: str, name: str) -> bool:
        """Evict a pod. Returns whether its disruption budget allowed that."""
        try:
            evict(self.store, name, namespace, Deletion(), Options())
        except ApiError as error:
            if error.code not in (404, 429):
                raise
            return False
        return True


def _fits(obj: Json, owner: Json) -> bool:
    """Whether an object may be adopted: a StatefulSet takes only pods with its names."""
    name = owner["metadata"]["name"]
    return owner["kind"] != "StatefulSet" or bool(re.fullmatch(rf"{re.escape(name)}-\w+", obj["metadata"]["name"]))


def controller_uid(obj: Json) -> str:
    return next((o["uid"] for o in obj["metadata"].get("ownerReferences") or [] if o.get("controller")), "")


def owner_reference(owner: Json) -> Json:
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def owned(objects: Iterable[Json], owner: Json) -> list[Json]:
    return [obj for obj in objects if controller_uid(obj) == owner["metadata"]["uid"]]


def pod_from(template: Json, owner: Json, labels: Json | None = None, **meta: str) -> Json:
    """Return a pod of a template for `World.create`."""
    pod: Json = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": clone(template["spec"])}
    pod["metadata"] = {
        **meta,
        "namespace": owner["metadata"]["namespace"],
        "labels": {**(template["metadata"].get("labels") or {}), **(labels or {})},
        "annotations": dict(template["metadata"].get("annotations") or {}),
        "ownerReferences": [owner_reference(owner)],
    }
    return pod


def terminating(obj: Json) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def finished(pod: Json) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def active(pod: Json) -> bool:
    return not terminating(pod) and not finished(pod)


def condition(obj: Json, kind: str) -> str:
    conditions = (obj.get("status") or {}).get("conditions") or []
    return next((c["status"] for c in conditions if c["type"] == kind), "Unknown")


def ready(pod: Json) -> bool:
    return condition(pod, "Ready") == "True"


def template_hash(template: Json) -> str:
    """Return ten characters that name a pod template."""
    text = json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def share(value: Any, of: int, up: bool) -> int:
    """Return an int-or-percent of a number."""
    if isinstance(value, str) and value.endswith("%"):
        exact = Fraction(int(value[:-1]) * of, 100)
        return ceil(exact) if up else floor(exact)
    return int(value)
