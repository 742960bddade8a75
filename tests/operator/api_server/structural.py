"""Structural schemas of custom resources: pruning, defaults and validation. Rules in CEL are in cel_rules.py."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft7Validator, FormatChecker  # type: ignore[import-untyped]
from jsonschema.exceptions import ValidationError  # type: ignore[import-untyped]

from .cel_rules import Rules
from .errors import Cause
from .json_values import Json, clone

_PLAIN = (
    "type", "enum", "pattern", "format", "required", "multipleOf", "uniqueItems", "minimum", "maximum", "minLength",
    "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
)  # fmt: skip
_META = ("apiVersion", "kind", "metadata")


def _int32(value: Any) -> bool:
    return not isinstance(value, int) or -(2**31) <= value < 2**31


def _int64(value: Any) -> bool:
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _date_time(value: Any) -> bool:
    return not isinstance(value, str) or bool(datetime.datetime.fromisoformat(value.replace("Z", "+00:00")))


def _cidr(value: Any) -> bool:
    return not isinstance(value, str) or bool(ipaddress.ip_network(value, strict=False))


def _duration(value: Any) -> bool:
    return not isinstance(value, str) or bool(re.fullmatch(r"-?(\d+(\.\d+)?(ns|us|µs|ms|s|m|h))+", value))


FORMATS = FormatChecker(formats=())
for _name, _check in (
    ("int32", _int32),
    ("int64", _int64),
    ("date-time", _date_time),
    ("cidr", _cidr),
    ("duration", _duration),
):
    FORMATS.checks(_name, raises=ValueError)(_check)


def json_schema(schema: Json) -> Json:
    """Return the JSON schema of draft 7 that accepts what a structural schema accepts."""
    result: Json = {name: schema[name] for name in _PLAIN if name in schema}
    for limit, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if schema.get(exclusive) is True:
            result[exclusive] = result.pop(limit)
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    for name in ("allOf", "anyOf", "oneOf"):
        if name in schema:
            result[name] = [json_schema(part) for part in schema[name]]
    for name in ("not", "items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            result[name] = json_schema(schema[name])
    if "properties" in schema:
        result["properties"] = {name: json_schema(part) for name, part in schema["properties"].items()}
    if schema.get("nullable"):
        result = {"anyOf": [{"type": "null"}, result]}
    return result


class StructuralSchema:
    """The schema of one version of a custom resource. Works on objects in place. Immutable, usable from any thread."""

    def __init__(self, schema: Json) -> None:
        self.schema = schema
        plain = json_schema(schema)
        for name in _META:  # the server itself checks these
            plain.get("properties", {}).pop(name, None)
        self._validator = Draft7Validator(plain, format_checker=FORMATS)
        self._rules = Rules(schema)

    def prune(self, obj: Json) -> list[str]:
        """Remove unknown fields and nulls. Returns the paths of the unknown fields."""
        unknown: list[str] = []
        _prune(self.schema, obj, "", unknown, root=True)
        return unknown

    def set_defaults(self, obj: Json) -> None:
        _default(self.schema, obj)

    def validate(self, obj: Json, old: Json | None) -> list[Cause]:
        """Return what is wrong. `old` is the object before an update; transition rules need it."""
        errors = sorted(self._validator.iter_errors(obj), key=lambda e: [str(p) for p in e.absolute_path])
        causes = [cause for error in errors for cause in _causes(error)] + list(_duplicates(self.schema, obj, ""))
        return causes or self._rules.check(obj, old)

    def list_keys(self, path: tuple[str, ...]) -> tuple[str, ...] | str:
        """Return how the list at a path merges: its keys, "set" or "atomic"."""
        schema: Any = self.schema
        for part in path:
            schema = schema.get("items", {}) if part == "[]" else _property(schema, part)
        kind = schema.get("x-kubernetes-list-type", "atomic")
        return tuple(schema["x-kubernetes-list-map-keys"]) if kind == "map" else kind


def _property(schema: Json, name: str) -> Json:
    found = schema.get("properties", {}).get(name)
    if found is None and isinstance(schema.get("additionalProperties"), dict):
        found = schema["additionalProperties"]
    return found if found is not None else {}


def _prune(schema: Json, value: Any, path: str, unknown: list[str], root: bool = False) -> None:
    if isinstance(value, list):
        for i, item in enumerate(value):
            _prune(schema.get("items", {}), item, f"{path}[{i}]", unknown)
    if not isinstance(value, dict):
        return
    properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
    keep = schema.get("x-kubernetes-preserve-unknown-fields") or rest is True
    embedded = root or schema.get("x-kubernetes-embedded-resource")
    for name in list(value):
        below = f"{path}.{name}" if path else name
        if embedded and name in _META:
            continue
        known = properties.get(name, rest if isinstance(rest, dict) else None)
        if known is None:
            if not keep:
                unknown.append(below)
                del value[name]
        elif value[name] is None and not known.get("nullable"):
            del value[name]
        else:
            _prune(known, value[name], below, unknown)


def _default(schema: Json, value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _default(schema.get("items", {}), item)
    elif isinstance(value, dict):
        for name, known in schema.get("properties", {}).items():
            if "default" in known and name not in value:
                value[name] = clone(known["default"])
            if name in value:
                _default(known, value[name])
        if isinstance(schema.get("additionalProperties"), dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                _default(schema["additionalProperties"], value[name])


def path_text(path: Any) -> str:
    """Return `spec.env[0].name` for (spec, env, 0, name)."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return '"object"' if isinstance(value, dict) else '"array"'
    return json.dumps(value)


def _causes(error: ValidationError) -> Iterator[Cause]:
    path, value, limit = path_text(error.absolute_path), error.instance, error.validator_value
    kind = str(error.validator)
    if kind == "anyOf" and error.context and limit and limit[0] == {"type": "null"}:  # a nullable value
        for inner in error.context:
            if list(inner.relative_schema_path)[:1] != [0]:
                yield from _causes(inner)
        return
    shown = _shown(value)
    if kind == "required":
        for name in limit:
            if name not in value:
                yield Cause(f"{path}.{name}" if path else name, "Required value", "FieldValueRequired")
        return
    if kind == "type":
        wanted = limit if isinstance(limit, str) else "integer,string"
        found = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
        name = found.get(type(value), "null")
        text = f'Invalid value: "{name}": {path} in body must be of type {wanted}: "{name}"'
        yield Cause(path, text, "FieldValueTypeInvalid")
    elif kind == "enum":
        allowed = ", ".join(json.dumps(v) for v in limit)
        yield Cause(path, f"Unsupported value: {shown}: supported values: {allowed}", "FieldValueNotSupported")
    elif kind in _LIMITS:
        yield Cause(path, f"Invalid value: {shown}: {path} in body {_LIMITS[kind].format(limit)}")
    else:
        yield Cause(path, f"Invalid value: {shown}: {error.message}")


_LIMITS = {
    "pattern": "should match '{}'",
    "format": "must be of type {}",
    "minimum": "should be greater than or equal to {}",
    "maximum": "should be less than or equal to {}",
    "exclusiveMinimum": "should be greater than {}",
    "exclusiveMaximum": "should be less than {}",
    "minLength": "should be at least {} chars long",
    "maxLength": "should be at most {} chars long",
    "minItems": "should have at least {} items",
    "maxItems": "should have at most {} items",
    "minProperties": "should have at least {} properties",
    "maxProperties": "should have at most {} properties",
}


def _duplicates(schema: Json, value: Any, path: str) -> Iterator[Cause]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _duplicates(_property(schema, name), item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        kind, seen = schema.get("x-kubernetes-list-type"), []
        for i, item in enumerate(value):
            yield from _duplicates(schema.get("items", {}), item, f"{path}[{i}]")
            if kind in ("map", "set"):
                mark = [item.get(k) for k in schema["x-kubernetes-list-map-keys"]] if kind == "map" else item
                if mark in seen:
                    yield Cause(f"{path}[{i}]", f"Duplicate value: {json.dumps(mark)}", "FieldValueDuplicate")
                seen.append(mark)
