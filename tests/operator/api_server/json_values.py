"""JSON values: copies, and the patches of RFC 7386 and RFC 6902. Knows nothing of Kubernetes' objects."""

from __future__ import annotations

from typing import Any

from .errors import bad_request, unprocessable

Json = dict[str, Any]


def clone(value: Any) -> Any:
    """Return a deep copy of a JSON value."""
    if isinstance(value, dict):
        return {k: clone(v) if isinstance(v, dict | list) else v for k, v in value.items()}
    if isinstance(value, list):
        return [clone(v) if isinstance(v, dict | list) else v for v in value]
    return value


def without_nulls(value: Any) -> Any:
    """Return a deep copy without the keys whose value is null, which Go does not tell from absent keys."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value


def merge_patch(target: Any, patch: Any) -> Any:
    """Return the result of a JSON merge patch. Shares parts with both arguments."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def json_patch(target: Any, operations: Any) -> Any:
    """Return the result of a JSON patch on a copy. A `test` that fails or a path that is absent is a 422 Invalid."""
    if not isinstance(operations, list):
        raise bad_request("a JSON patch is a list of operations")
    document = {"": clone(target)}
    for operation in operations:
        kind, path = operation.get("op"), _pointer(operation.get("path"))
        if kind == "add":
            _add(document, path, clone(operation["value"]))
        elif kind == "remove":
            _remove(document, path)
        elif kind == "replace":
            _remove(document, path)
            _add(document, path, clone(operation["value"]))
        elif kind == "test":
            if _find(document, path) != operation["value"]:
                raise unprocessable(f"testing value {operation['path']} failed")
        elif kind in ("move", "copy"):
            value = clone(_find(document, _pointer(operation["from"])))
            if kind == "move":
                _remove(document, _pointer(operation["from"]))
            _add(document, path, value)
        else:
            raise bad_request(f"Unexpected kind: {kind}")
    return document[""]


def _pointer(text: Any) -> list[str]:
    if not isinstance(text, str) or (text and not text.startswith("/")):
        raise bad_request(f"{text!r} is not a JSON pointer")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")]


def _find(document: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(document, dict) and part in document:
            document = document[part]
        elif isinstance(document, list) and part.isdigit() and int(part) < len(document):
            document = document[int(part)]
        else:
            raise unprocessable(f"path {'/'.join(path)} does not exist: missing {part!r}")
    return document


def _add(document: Any, path: list[str], value: Any) -> None:
    parent, last = _find(document, path[:-1]), path[-1]
    if isinstance(parent, dict):
        parent[last] = value
    elif isinstance(parent, list) and (last == "-" or (last.isdigit() and int(last) <= len(parent))):
        parent.insert(len(parent) if last == "-" else int(last), value)
    else:
        raise unprocessable(f"add operation does not apply: doc is missing path: {'/'.join(path)}")


def _remove(document: Any, path: list[str]) -> None:
    _find(document, path)
    parent, last = _find(document, path[:-1]), path[-1]
    if isinstance(parent, dict):
        del parent[last]
    else:
        del parent[int(last)]
