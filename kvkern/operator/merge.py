"""What to change in an object so that it is as wanted, and what others have set in it stays.

    previous  what was last written, which the object itself keeps in an annotation
    wanted    what is to be there now
    live      what is there, with defaults and with what others have added

A field of `wanted` that differs is set. A field of `previous` that is not wanted any more is removed. A list is one value, but
entries that only have more fields than wanted, which are defaults, count as equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .quantities import parse_quantity

LAST_WRITTEN = "kvkern.io/last-written"
_QUANTITIES = ("limits", "requests", "sizeLimit", "cpu", "memory", "storage")  # fields whose values the API rewrites


def with_record(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object with the annotation that says what was written."""
    metadata = dict(wanted["metadata"])
    record = json.dumps(wanted, sort_keys=True, separators=(",", ":"))
    metadata["annotations"] = dict(metadata.get("annotations", {})) | {LAST_WRITTEN: record}
    return dict(wanted) | {"metadata": metadata}


def written(live: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was last written; empty if the annotation is missing or spoilt."""
    record = (live["metadata"].get("annotations") or {}).get(LAST_WRITTEN, "")
    try:
        found = json.loads(record)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def merge_patch(wanted: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON merge patch that makes `live`, and its record of what was written, as wanted; empty if they are."""
    patch = _patch(written(live), wanted, live, "")
    record = with_record(wanted)["metadata"]["annotations"][LAST_WRITTEN]
    if not patch and (live["metadata"].get("annotations") or {}).get(LAST_WRITTEN) == record:
        return {}
    patch.setdefault("metadata", {}).setdefault("annotations", {})[LAST_WRITTEN] = record
    return patch


def _patch(previous: Any, wanted: Mapping[str, Any], live: Mapping[str, Any], path: str) -> dict[str, Any]:
    previous = previous if isinstance(previous, Mapping) else {}
    patch: dict[str, Any] = {}
    for name, value in wanted.items():
        there, before = live.get(name), previous.get(name)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            if inside := _patch(before, value, there, name if name in _QUANTITIES else path):
                patch[name] = inside
        elif isinstance(value, list) and isinstance(there, list):
            if (name in previous and before != value) or not _covers(there, value, path):
                patch[name] = value
        elif not _equal(there, value, name, path):
            patch[name] = value
    for name in previous:
        if name not in wanted and live.get(name) is not None:
            patch[name] = None
    return patch


def _covers(live: Any, wanted: Any, path: str, name: str = "") -> bool:
    """Return True if `live` is as wanted, but for fields that are not wanted."""
    if isinstance(wanted, Mapping):
        inside = name if name in _QUANTITIES else path
        return isinstance(live, Mapping) and all(_covers(live.get(k), v, inside, k) for k, v in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(live, list) or len(live) != len(wanted):
            return live in (None, []) and not wanted
        return all(_covers(one, two, path) for one, two in zip(live, wanted, strict=True))
    return _equal(live, wanted, name, path)


def _equal(live: Any, wanted: Any, name: str, path: str) -> bool:
    if live == wanted and isinstance(live, bool) == isinstance(wanted, bool):
        return True
    if live is None and wanted in ("", False, {}):
        return True  # the API leaves out empty values
    if (name in _QUANTITIES or path in _QUANTITIES) and isinstance(live, str | int) and isinstance(wanted, str | int):
        try:
            return parse_quantity(live, name) == parse_quantity(wanted, name)
        except ConfigError:
            return False
    return False
