"""Label and field selectors, in the query string and in objects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .errors import bad_request
from .json_values import Json

_SET = re.compile(r"(!?)([\w./-]+)(?:\s+(in|notin)\s*\(([^)]*)\))?")
_EQUAL = re.compile(r"([\w./-]+)\s*(==|=|!=)\s*([\w.-]*)")
FIELDS = ("metadata.name", "metadata.namespace", "spec.nodeName", "status.phase", "type", "reason", "source",
          "involvedObject.name", "involvedObject.namespace", "involvedObject.kind", "involvedObject.uid")  # fmt: skip


def label_selector(text: str) -> Callable[[Json], bool]:
    """Return a test of an object's labels. Raises 400 for a selector that cannot be parsed."""
    tests = [_label_test(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()]

    def matches(obj: Json) -> bool:
        labels = obj["metadata"].get("labels") or {}
        return all(test(labels) for test in tests)

    return matches


def _label_test(text: str) -> Callable[[Json], bool]:
    equal = _EQUAL.fullmatch(text)
    if equal:
        name, operator, value = equal.groups()
        return lambda labels: (labels.get(name) == value) is (operator != "!=")
    some = _SET.fullmatch(text)
    if some is None:
        raise bad_request(f"unable to parse requirement: {text!r}")
    absent, name, operator, values = some.groups()
    if operator is None:
        return lambda labels: (name in labels) is not bool(absent)
    wanted = {value.strip() for value in values.split(",")}
    return lambda labels: (labels.get(name) in wanted) is (operator == "in")


def field_selector(text: str) -> Callable[[Json], bool]:
    """Return a test of an object's fields. Raises 400 for a field that no server can select by."""
    tests = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([\w.]+)(==|=|!=)(.*)", part)
        if match is None or match[1] not in FIELDS:
            raise bad_request(f'Unable to find "{part}": field label not supported: {part.partition("=")[0]}')
        tests.append((match[1].split("."), match[2] != "!=", match[3]))

    def matches(obj: Json) -> bool:
        return all((_field(obj, path) == value) is equal for path, equal, value in tests)

    return matches


def _field(obj: Any, path: list[str]) -> str:
    for part in path:
        obj = obj.get(part) if isinstance(obj, dict) else None
    return "" if obj is None else str(obj)


def selects(selector: Json | None, labels: Json | None) -> bool:
    """Whether a LabelSelector object matches. None selects nothing, and {} everything."""
    if selector is None:
        return False
    labels = labels or {}
    if any(labels.get(name) != value for name, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(meets(e, labels) for e in selector.get("matchExpressions") or [])


def meets(expression: Json, values: Json) -> bool:
    """Whether labels, or a node's fields, meet one expression of a selector or of a node affinity."""
    name, operator = expression["key"], expression["operator"]
    if operator in ("Exists", "DoesNotExist"):
        return (name in values) is (operator == "Exists")
    if operator in ("In", "NotIn"):
        return (values.get(name) in expression["values"]) is (operator == "In")
    if name not in values:
        return False
    number, limit = int(values[name]), int(expression["values"][0])
    return number > limit if operator == "Gt" else number < limit
