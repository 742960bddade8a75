"""CustomResourceDefinitions: what is refused in one, the resources it makes, and its status."""

from __future__ import annotations

from collections.abc import Iterator

from .cel_rules import compile_errors
from .errors import Cause
from .json_values import Json, clone
from .resources import Resource
from .structural import StructuralSchema

_VALUE_TYPES = ("array", "boolean", "integer", "number", "object", "string")


def definition_errors(definition: Json) -> list[Cause]:
    """Return why a real server would refuse the definition."""
    spec = definition.get("spec", {})
    names, versions = spec.get("names", {}), spec.get("versions") or []
    causes = [
        Cause(f"spec.{field}", "Required value", "FieldValueRequired")
        for field, value in (
            ("group", spec.get("group")),
            ("scope", spec.get("scope")),
            ("names.plural", names.get("plural")),
            ("names.kind", names.get("kind")),
            ("versions", versions),
        )
        if not value
    ]
    if causes:
        return causes
    name = f"{names['plural']}.{spec['group']}"
    if definition["metadata"]["name"] != name:
        text = f'Invalid value: "{definition["metadata"]["name"]}": must be spec.names.plural+"."+spec.group'
        causes.append(Cause("metadata.name", text))
    if spec["scope"] not in ("Namespaced", "Cluster"):
        text = f'Unsupported value: "{spec["scope"]}": supported values: "Cluster", "Namespaced"'
        causes.append(Cause("spec.scope", text, "FieldValueNotSupported"))
    if sum(bool(v.get("storage")) for v in versions) != 1:
        causes.append(Cause("spec.versions", "Invalid value: must have exactly one version marked as storage version"))
    approved = "api-approved.kubernetes.io" in (definition["metadata"].get("annotations") or {})
    if spec["group"].endswith((".k8s.io", ".kubernetes.io")) and not approved:
        text = "Required value: protected groups must have approval annotation"
        causes.append(Cause("metadata.annotations[api-approved.kubernetes.io]", text, "FieldValueRequired"))
    for i, version in enumerate(versions):
        path = f"spec.versions[{i}].schema.openAPIV3Schema"
        schema = (version.get("schema") or {}).get("openAPIV3Schema")
        if schema is None:
            causes.append(Cause(path, "Required value: schemas are required", "FieldValueRequired"))
            continue
        causes += _schema_errors(schema, path)
        causes += compile_errors(schema, path)
        for k, column in enumerate(version.get("additionalPrinterColumns") or []):
            if not str(column.get("jsonPath", "")).startswith("."):
                where = f"spec.versions[{i}].additionalPrinterColumns[{k}].jsonPath"
                causes.append(Cause(where, "Invalid value: must be a simple json path starting with ."))
    return causes


def _schema_errors(schema: Json, path: str) -> Iterator[Cause]:
    if "$ref" in schema:
        yield Cause(f"{path}.$ref", "Forbidden: $ref is not supported", "FieldValueForbidden")
    free = schema.get("x-kubernetes-int-or-string") or schema.get("x-kubernetes-preserve-unknown-fields")
    if not schema.get("type"):
        if not free:
            yield Cause(
                f"{path}.type", "Required value: must not be empty for specified object fields", "FieldValueRequired"
            )
    elif schema["type"] not in _VALUE_TYPES:
        text = f'Unsupported value: "{schema["type"]}": supported values: {_VALUE_TYPES}'
        yield Cause(f"{path}.type", text, "FieldValueNotSupported")
    elif schema.get("x-kubernetes-int-or-string"):
        yield Cause(
            f"{path}.type", "Forbidden: must be empty if x-kubernetes-int-or-string is true", "FieldValueForbidden"
        )
    if schema.get("type") == "array" and not isinstance(schema.get("items"), dict):
        yield Cause(f"{path}.items", "Required value: must be specified", "FieldValueRequired")
    if schema.get("uniqueItems"):
        yield Cause(f"{path}.uniqueItems", "Forbidden: uniqueItems cannot be set to true", "FieldValueForbidden")
    rest = schema.get("additionalProperties")
    if rest is not None and schema.get("properties"):
        yield Cause(
            f"{path}.additionalProperties", "Forbidden: mutually exclusive with properties", "FieldValueForbidden"
        )
    if rest is False:
        yield Cause(f"{path}.additionalProperties", "Forbidden: must not be false", "FieldValueForbidden")
    if "default" in schema:
        whole = StructuralSchema({"type": "object", "properties": {"value": schema}})
        value = {"value": clone(schema["default"])}
        unknown = whole.prune(value)
        for cause in whole.validate({**value, "metadata": {}}, None):
            yield Cause(f"{path}.default", cause.message, cause.reason)
        for field in unknown:
            yield Cause(f"{path}.default.{field}", "Invalid value: must be a known field of the schema")
    if isinstance(schema.get("items"), dict):
        yield from _schema_errors(schema["items"], f"{path}.items")
    if isinstance(rest, dict):
        yield from _schema_errors(rest, f"{path}.additionalProperties")
    for name, below in schema.get("properties", {}).items():
        yield from _schema_errors(below, f"{path}.properties[{name}]")


def resources_of(definition: Json) -> list[Resource]:
    """Return one resource per served version."""
    spec = definition["spec"]
    names, result = spec["names"], []
    for version in spec["versions"]:
        if version.get("served"):
            subresources = version.get("subresources") or {}
            resource = Resource(
                spec["group"],
                version["name"],
                names["kind"],
                names["plural"],
                spec["scope"] == "Namespaced",
                tuple(names.get("shortNames") or ()),
                tuple(names.get("categories") or ()),
                status="status" in subresources,
                scale="scale" in subresources,
                generation=True,
                unconditional_update=False,
                schema=StructuralSchema(version["schema"]["openAPIV3Schema"]),
                columns=tuple(version.get("additionalPrinterColumns") or ()),
                list_kind=names.get("listKind") or f"{names['kind']}List",
            )
            result.append(resource)
    return result


def established(definition: Json, now: str) -> Json:
    """Return the status of a definition that is served."""
    spec = definition["spec"]
    conditions = [
        {"type": "NamesAccepted", "status": "True", "lastTransitionTime": now, "reason": "NoConflicts",
         "message": "no conflicts found"},
        {"type": "Established", "status": "True", "lastTransitionTime": now, "reason": "InitialNamesAccepted",
         "message": "the initial names have been accepted"},
    ]  # fmt: skip
    before = {c["type"]: c for c in definition.get("status", {}).get("conditions") or []}
    return {
        "conditions": [before.get(c["type"], c) for c in conditions],
        "acceptedNames": clone(spec["names"]),
        "storedVersions": [v["name"] for v in spec["versions"] if v.get("storage")],
    }
