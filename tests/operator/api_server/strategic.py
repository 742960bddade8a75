"""Strategic merge patches of built-in objects, with the merge keys of pods, services and workloads."""

from __future__ import annotations

from typing import Any

from .errors import bad_request
from .json_values import Json, clone

# field -> merge key, or candidates of which the items have one
MERGE_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "ephemeralContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "ports": ("containerPort", "port"),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "imagePullSecrets": ("name",),
    "secrets": ("name",),
    "hostAliases": ("ip",),
    "ownerReferences": ("uid",),
    "conditions": ("type",),
    "addresses": ("type",),
    "topologySpreadConstraints": ("topologyKey",),
    "resourceClaims": ("name",),
    "webhooks": ("name",),
}
SETS = ("finalizers",)


def merge_key(field: str, items: list[Any]) -> str | None:
    """Return the key by which lists of this name merge, or None if they are replaced."""
    for name in MERGE_KEYS.get(field, ()):
        if items and all(isinstance(item, dict) and (name in item or "$patch" in item) for item in items):
            return name
    return None


def strategic_merge(target: Any, patch: Json) -> Any:
    """Return the target with the patch applied. Shares parts with both arguments."""
    if patch.get("$patch") == "replace":
        return {k: v for k, v in patch.items() if k != "$patch"}
    if patch.get("$patch") == "delete":
        return {}
    result = dict(target) if isinstance(target, dict) else {}
    if "$retainKeys" in patch:
        result = {k: v for k, v in result.items() if k in patch["$retainKeys"]}
    for name, value in patch.items():
        directive, _, field = name.partition("/")
        if directive == "$deleteFromPrimitiveList":
            result[field] = [item for item in result.get(field) or [] if item not in value]
        elif name.startswith("$"):
            continue
        elif value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            result[name] = strategic_merge(result.get(name), value)
        elif isinstance(value, list):
            result[name] = _merge_list(name, result.get(name) or [], value)
        else:
            result[name] = value
    for name, order in patch.items():
        field = name.partition("/")[2]
        if name.startswith("$setElementOrder/") and result.get(field):
            result[field] = _ordered(field, result[field], order)
    return result


def _merge_list(field: str, old: list[Any], new: list[Any]) -> list[Any]:
    if field in SETS:
        return old + [item for item in new if item not in old]
    plain = [item for item in new if not (isinstance(item, dict) and list(item) == ["$patch"])]
    if len(plain) < len(new):  # [{"$patch": "replace"}, ...]
        return plain
    key = merge_key(field, new)
    if key is None:
        return new
    result = list(old)
    for item in new:
        if key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        at = next((i for i, o in enumerate(result) if o.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            if at is not None:
                del result[at]
        elif at is None:
            result.append(strategic_merge({}, item))
        else:
            result[at] = strategic_merge(result[at], item)
    return result


def _ordered(field: str, items: list[Any], order: list[Any]) -> list[Any]:
    """Return the items with those that the order names in that order, at the places that they have together."""
    key = merge_key(field, items)

    def rank(item: Any) -> int:
        marks = [o.get(key) for o in order] if key else order
        mark = item.get(key) if key else item
        return marks.index(mark) if mark in marks else -1

    named = iter(sorted((item for item in items if rank(item) >= 0), key=rank))
    return [next(named) if rank(item) >= 0 else item for item in items]


def copy_of(target: Any, patch: Json) -> Any:
    """Return a strategic merge that shares nothing with its arguments."""
    return clone(strategic_merge(target, patch))
