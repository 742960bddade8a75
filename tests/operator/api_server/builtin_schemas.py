"""Types and unknown fields of built-in objects, by the JSON schemas of Kubernetes 1.30 in the package kubernetes-validate.

Those schemas use few words, and jsonschema takes 100 ms for a Deployment, so this walks them itself.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

from .errors import Cause, bad_request
from .json_values import Json

_FOLDER = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / "v1.30.0-local-strict"
_DEFAULTED = ("roleRef.apiGroup", "spec.serviceName")  # required in the schemas, and filled in by the server
_FREE = ("JSONSchemaProps", "CustomResourceSubresourceStatus", "FieldsV1")  # crds.py looks into schemas
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


@functools.cache
def _definitions() -> Json:
    definitions: Json = json.loads((_FOLDER / "_definitions.json").read_text())["$defs"]
    return definitions


@functools.cache
def _schema(kind: str, api_version: str) -> Json | None:
    found = {"group": api_version.rpartition("/")[0], "version": api_version.rpartition("/")[2], "kind": kind}
    for schema in _definitions().values():
        if found in schema.get("x-kubernetes-group-version-kind", ()):
            return schema  # type: ignore[no-any-return]
    return None


def check(obj: Json) -> tuple[list[str], list[Cause]]:
    """Remove unknown fields in place. Returns their paths, and required fields that lack. Raises 400 for a wrong type."""
    unknown: list[str] = []
    missing: list[Cause] = []

    def walk(schema: Json, value: Any, path: str) -> None:
        while "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name.endswith(_FREE):
                return
            schema = _definitions()[name]
        allowed = schema.get("type")
        if allowed is not None and not _fits(value, [allowed] if isinstance(allowed, str) else allowed):
            kind = obj["kind"]
            raise bad_request(
                f'{kind} in version "{obj["apiVersion"].rpartition("/")[2]}" cannot be handled as a {kind}: json: cannot '
                f"unmarshal {type(value).__name__} into Go struct field {kind}.{path} of type {allowed}"
            )
        if isinstance(value, list):
            for i, item in enumerate(value):
                walk(schema.get("items", {}), item, f"{path}[{i}]")
        elif isinstance(value, dict):
            properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
            for name in list(value):
                below = f"{path}.{name}" if path else name
                known = properties.get(name, rest if isinstance(rest, dict) else None)
                if known is not None:
                    walk(known, value[name], below)
                elif properties and name not in ("apiVersion", "kind", "metadata"):
                    unknown.append(below)
                    del value[name]
            lacking = [f"{path}.{name}".lstrip(".") for name in schema.get("required", ()) if name not in value]
            lacking = [field for field in lacking if not field.startswith("status") and field not in _DEFAULTED]
            missing.extend(Cause(field, "Required value", "FieldValueRequired") for field in lacking)

    schema = _schema(obj["kind"], obj["apiVersion"])
    if schema is not None:
        walk(schema, obj, "")
    return unknown, missing


def _fits(value: Any, allowed: list[str]) -> bool:
    if isinstance(value, bool):
        return "boolean" in allowed
    return any(isinstance(value, _TYPES[name]) for name in allowed)
