"""Pieces of structural schemas. Patterns and bounds are enforced by API servers from 1.20 on, CEL rules by newer ones."""

from __future__ import annotations

from typing import Any

from ..forms.common import MEMBERS, PULL_POLICIES, SERVICE_TYPES
from ..quantities import PATTERN

Schema = dict[str, Any]
MAX_PORT = 65535
LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"


def text(description: str, default: str | None = None, **more: Any) -> Schema:
    """Return the schema of a string."""
    return _with_default({"type": "string", "description": description, **more}, default)


def choice(description: str, choices: tuple[str, ...], default: str | None = None) -> Schema:
    """Return the schema of one of several strings."""
    return text(description, default, enum=[str(each) for each in choices])


def integer(description: str, low: int, high: int, default: int | None = None) -> Schema:
    """Return the schema of an integer in low..high."""
    kind = {"type": "integer", "format": "int32", "minimum": low, "maximum": high, "description": description}
    return _with_default(kind, default)


def flag(description: str) -> Schema:
    """Return the schema of a truth value."""
    return {"type": "boolean", "description": description}


def quantity(description: str, default: str | None = None, empty: bool = False) -> Schema:
    """Return the schema of a quantity. `empty` allows an empty string."""
    pattern = f"^$|{PATTERN}" if empty else PATTERN
    kind: Schema = {
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "x-kubernetes-int-or-string": True,
        "pattern": pattern,
        "description": description,
    }
    return _with_default(kind, default)


def thing(description: str, properties: Schema, **more: Any) -> Schema:
    """Return the schema of an object with these fields."""
    return {"type": "object", "description": description, "properties": properties, **more}


def texts(description: str) -> Schema:
    """Return the schema of an object from strings to strings."""
    return {"type": "object", "description": description, "additionalProperties": {"type": "string"}}


def anything(description: str) -> Schema:
    """Return the schema of an object that another schema describes: Kubernetes checks it where it is used."""
    return {"type": "object", "description": description, "x-kubernetes-preserve-unknown-fields": True}


def array(description: str, items: Schema, max_items: int = 256) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "description": description, "items": items, "maxItems": max_items}


def env(description: str) -> Schema:
    """Return the schema of a container's variables."""
    entry = thing(
        "A variable.",
        {
            "name": {"type": "string", "minLength": 1},
            "value": {"type": "string"},
            "valueFrom": anything("A secret's or a config map's entry, or a field of the pod."),
        },
        required=["name"],
    )
    return array(description, entry)


def resources() -> Schema:
    """Return the schema of a container's resources."""
    amounts = {"type": "object", "additionalProperties": quantity("An amount.")}
    return thing(
        "What the container requests and may use.",
        {
            "limits": amounts,
            "requests": amounts,
            "claims": array("Devices.", anything("A claim.")),
        },
    )


def pull_policy() -> Schema:
    """Return the schema of an image's pull policy."""
    return choice("When the image is pulled.", PULL_POLICIES, "IfNotPresent")


def service_type() -> Schema:
    """Return the schema of a service's type."""
    return choice("Type of the service N-rpc.", SERVICE_TYPES, "ClusterIP")


def members(description: str) -> Schema:
    """Return the schema of the number of an etcd's members."""
    return {"type": "integer", "format": "int32", "enum": [0, *MEMBERS], "description": description}


def _with_default(schema: Schema, default: Any) -> Schema:
    return schema if default is None else schema | {"default": default}
