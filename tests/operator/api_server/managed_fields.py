"""Who owns which field: server-side apply, and the record of other writers.

A field is a path of parts as in `fieldsV1`: `f:spec`, `k:{"name":"a"}` for an item of a keyed list, `v:"x"` for one of a set.
Lists that have neither are one field. Not there: conversion between versions, and ownership of nulls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .errors import apply_conflict
from .json_values import Json, clone
from .resources import Resource
from .strategic import SETS, merge_key

Path = tuple[str, ...]
_NEVER = {("f:apiVersion",), ("f:kind",), ("f:metadata", "f:name"), ("f:metadata", "f:namespace")}
_SERVER_SET = ("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "managedFields",
               "deletionGracePeriodSeconds", "selfLink")  # fmt: skip


def _keys(resource: Resource, names: Path, items: list[Any]) -> tuple[str, ...] | str:
    if names[:1] == ("metadata",) or resource.schema is None:
        if names[-1] in SETS:
            return "set"
        key = merge_key(names[-1], items)
        with_protocol = key in ("containerPort", "port") and all("protocol" in item for item in items)
        return "atomic" if key is None else (key, "protocol") if with_protocol else (key,)
    return resource.schema.list_keys(names)


def _mark(item: Json, keys: tuple[str, ...]) -> str:
    return "k:" + json.dumps({k: item.get(k) for k in sorted(keys)}, separators=(",", ":"))


def _children(resource: Resource, names: Path, value: Any) -> list[tuple[str, Path, Any]] | None:
    """Return (part, names, value) of what is below a value, or None for a leaf."""
    if isinstance(value, dict) and value:
        return [(f"f:{name}", (*names, name), item) for name, item in value.items()]
    if isinstance(value, list) and value:
        keys = _keys(resource, names, value)
        if keys == "set":
            return [(f"v:{json.dumps(item)}", (*names, "[]"), None) for item in value]
        if keys != "atomic" and all(isinstance(item, dict) for item in value):
            return [(_mark(item, tuple(keys)), (*names, "[]"), item) for item in value]
    return None


def leaves(resource: Resource, obj: Json) -> dict[Path, Any]:
    """Return every field that somebody may own, with its value."""
    found: dict[Path, Any] = {}

    def walk(path: Path, names: Path, value: Any) -> None:
        below = _children(resource, names, value)
        if below is None:
            found[path] = value
        else:
            for part, names_below, item in below:
                walk((*path, part), names_below, item)

    body = {k: v for k, v in obj.items() if k != "metadata"}
    body["metadata"] = {k: v for k, v in obj.get("metadata", {}).items() if k not in _SERVER_SET}
    walk((), (), body)
    return {path: value for path, value in found.items() if path not in _NEVER}


def encode(paths: set[Path]) -> Json:
    """Return `fieldsV1`."""
    root: Json = {}
    for path in sorted(paths):
        node = root
        for part in path:
            node = node.setdefault(part, {})
    return root


def decode(fields: Json) -> set[Path]:
    def walk(node: Json, path: Path) -> Iterator[Path]:
        if not node:
            yield path
        for part, below in node.items():
            yield from walk(below, (*path, part))

    return set(walk(fields, ())) - {()}


def _entry(resource: Resource, manager: str, operation: str, subresource: str, paths: set[Path], now: str) -> Json:
    entry: Json = {
        "manager": manager,
        "operation": operation,
        "apiVersion": resource.api_version,
        "time": now,
        "fieldsType": "FieldsV1",
        "fieldsV1": encode(paths),
    }
    return {**entry, "subresource": subresource} if subresource else entry


def _others(entries: list[Json], manager: str, operation: str, subresource: str) -> tuple[list[Json], set[Path]]:
    """Return the entries of others, and the fields of this writer."""
    mine: set[Path] = set()
    others = []
    for entry in entries:
        if (entry["manager"], entry["operation"], entry.get("subresource", "")) == (manager, operation, subresource):
            mine |= decode(entry.get("fieldsV1", {}))
        else:
            others.append(entry)
    return others, mine


def record_update(resource: Resource, old: Json | None, new: Json, manager: str, subresource: str, now: str) -> None:
    """Give the fields that a create, update or patch changed to its writer, and take them from others. In place."""
    before = leaves(resource, old) if old else {}
    after = leaves(resource, new)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    gone = before.keys() - after.keys()
    if not changed and not gone:
        return
    entries = new["metadata"].get("managedFields") or []
    others, mine = _others(entries, manager, "Update", subresource)
    kept = []
    for entry in others:
        fields = decode(entry.get("fieldsV1", {})) - changed - gone
        if fields:
            kept.append({**entry, "fieldsV1": encode(fields)})
    paths = (mine | changed) - gone
    if paths:
        kept.append(_entry(resource, manager, "Update", subresource, paths, now))
    new["metadata"]["managedFields"] = kept


def server_side_apply(
    resource: Resource,
    live: Json | None,  # None creates
    applied: Json,
    manager: str,
    force: bool,
    subresource: str,
    now: str,
) -> Json:
    """Return the object after the apply. Raises 409 with one cause per field that another manager set to another value."""
    base: Json = clone(live) if live else {"metadata": {}}
    wanted = leaves(resource, applied)
    current = leaves(resource, base)
    entries = base["metadata"].get("managedFields") or []
    others, mine = _others(entries, manager, "Apply", subresource)
    conflicts, kept, owned_by_others = [], [], set()
    for entry in others:
        fields = decode(entry.get("fieldsV1", {}))
        lost = {p for p in fields & wanted.keys() if p in current and current[p] != wanted[p]}
        conflicts += [(entry["manager"], _shown(path)) for path in sorted(lost)]
        owned_by_others |= fields - lost
        if fields - lost:
            kept.append({**entry, "fieldsV1": encode(fields - lost)})
    if conflicts and not force:
        raise apply_conflict(conflicts)
    result: Json = _merge(resource, (), base, applied)
    keep = wanted.keys() | owned_by_others
    for path in mine - keep:
        target = _to_remove(path, keep)
        if target:
            _remove(result, target)
    kept.append(_entry(resource, manager, "Apply", subresource, set(wanted), now))
    result["metadata"]["managedFields"] = kept
    return result


def _shown(path: Path) -> str:
    text = ""
    for part in path:
        if part.startswith("f:"):
            text += f".{part[2:]}"
        else:
            pairs = json.loads(part[2:])
            text += (
                f"[{','.join(f'{k}={json.dumps(v)}' for k, v in pairs.items())}]"
                if part[0] == "k"
                else f"[={part[2:]}]"
            )
    return text


def _merge(resource: Resource, names: Path, old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        result = dict(old)
        for name, value in new.items():
            result[name] = _merge(resource, (*names, name), old.get(name), value)
        return result
    if isinstance(old, list) and isinstance(new, list) and old and new:
        keys = _keys(resource, names, new)
        if keys == "set":
            return old + [item for item in new if item not in old]
        if keys != "atomic":
            items = {_mark(item, tuple(keys)): item for item in old}
            for item in new:
                mark = _mark(item, tuple(keys))
                items[mark] = _merge(resource, (*names, "[]"), items.get(mark), item)
            return list(items.values())
    return clone(new)


def _to_remove(path: Path, keep: set[Path]) -> Path | None:
    """Return the field to remove, or the item of a keyed list if nobody owns anything else in it. None keeps an item's key."""
    for n in range(1, len(path)):
        if path[n - 1].startswith("k:") and not any(other[:n] == path[:n] for other in keep):
            return path[:n]
    if len(path) > 1 and path[-2].startswith("k:") and path[-1][2:] in json.loads(path[-2][2:]):
        return None
    return path


def _remove(value: Any, path: Path) -> bool:
    """Remove a field, and the parents that become empty by that. Returns whether the value is empty now."""
    part, rest = path[0], path[1:]
    if isinstance(value, dict):
        name = part[2:]
        if name in value and (not rest or _remove(value[name], rest)):
            del value[name]
    elif isinstance(value, list):
        if part.startswith("v:"):
            value[:] = [item for item in value if item != json.loads(part[2:])]
        else:
            keys = tuple(json.loads(part[2:]))
            for item in [i for i in value if isinstance(i, dict) and _mark(i, keys) == part]:
                if not rest or _remove(item, rest):
                    value.remove(item)
    else:
        return False
    return not value
