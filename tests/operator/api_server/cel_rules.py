"""`x-kubernetes-validations`: rules in CEL over custom resources, with Kubernetes' own functions where they are simple.

Not there: the cost budget, types of dates and durations, `optionalOldSelf`, and the syntax `.?` of optional fields.
"""

from __future__ import annotations

import functools
import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import cel

from .errors import Cause
from .json_values import Json
from .quantity import is_quantity, quantity

_RESERVED = {
    "true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if", "import", "let",
    "loop", "package", "namespace", "return",
}  # fmt: skip


def _sign(a: Any, b: Any) -> int:
    return int(a > b) - int(a < b)


def _is(parse: Callable[[Any], object]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        try:
            parse(value)
        except ValueError:
            return False
        return True

    return check


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "quantity": lambda text: float(quantity(text)),
    "isQuantity": is_quantity,
    "compareTo": _sign,
    "isGreaterThan": lambda a, b: a > b,
    "isLessThan": lambda a, b: a < b,
    "asInteger": int,
    "isURL": lambda text: bool(urlsplit(text).scheme),
    "url": lambda text: text,
    "getHost": lambda text: urlsplit(text).netloc,
    "getHostname": lambda text: urlsplit(text).hostname or "",
    "getPort": lambda text: str(urlsplit(text).port or ""),
    "getScheme": lambda text: urlsplit(text).scheme,
    "getEscapedPath": lambda text: urlsplit(text).path,
    "isIP": _is(ipaddress.ip_address),
    "isCIDR": _is(ipaddress.ip_network),
    "find": lambda text, pattern: (re.search(pattern, text) or [""])[0],
    "findAll": lambda text, pattern: [m[0] for m in re.finditer(pattern, text)],
    "split": lambda text, by, *most: text.split(by, *(m - 1 for m in most)),
    "join": lambda items, by="": by.join(items),
    "replace": lambda text, old, new: text.replace(old, new),
    "lowerAscii": lambda text: text.lower(),
    "upperAscii": lambda text: text.upper(),
    "trim": lambda text: text.strip(),
    "substring": lambda text, start, end=None: text[start:end],
    "indexOf": lambda where, what: where.find(what) if isinstance(where, str) else where.index(what),
    "isSorted": lambda items: all(a <= b for a, b in itertools.pairwise(items)),
    "sum": sum,
    "charAt": lambda text, i: text[i],
}


@functools.lru_cache(maxsize=1024)
def _program(rule: str) -> tuple[cel.Program, bool]:
    """Return the compiled rule and whether it needs functions that CEL itself lacks. Raises ValueError."""
    program = cel.compile(rule)
    return program, not FUNCTIONS.keys().isdisjoint(program.functions())


def evaluate(rule: str, variables: Json) -> Any:
    """Return the value of an expression. Raises ValueError, also for missing keys and unknown functions."""
    program, extended = _program(rule)
    try:
        return program.execute(cel.Context(variables, FUNCTIONS if extended else None))
    except (RuntimeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(str(error)) from error


def escape(name: str) -> str | None:
    """Return the name by which CEL knows a property, or None if it cannot be reached."""
    if name in _RESERVED:
        return f"__{name}__"
    for sign, word in (("__", "__underscores__"), (".", "__dot__"), ("-", "__dash__"), ("/", "__slash__")):
        name = name.replace(sign, word)
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else None


def _value(schema: Json, value: Any) -> Any:
    """Return a value as CEL sees it: escaped names, and floats where the schema says number."""
    if isinstance(value, dict):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        below = rest if isinstance(rest, dict) else {}
        return {
            escape(name) if name in properties else name: _value(properties.get(name, below), item)
            for name, item in value.items()
            if name not in properties or escape(name)
        }
    if isinstance(value, list):
        return [_value(schema.get("items", {}), item) for item in value]
    if schema.get("type") == "number" and isinstance(value, int):
        return float(value)
    return value


class Rules:
    """All rules of a schema."""

    def __init__(self, schema: Json) -> None:
        self._schema = schema
        self._any = _has_rules(schema)

    def check(self, obj: Json, old: Json | None) -> list[Cause]:
        if not self._any:
            return []
        meta = {k: v for k, v in obj["metadata"].items() if k in ("name", "generateName")}
        seen = {**obj, "metadata": meta}
        return list(_check(self._schema, seen, old, ""))


def _has_rules(schema: Json) -> bool:
    below = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    return "x-kubernetes-validations" in schema or any(_has_rules(s) for s in below if isinstance(s, dict))


def _check(schema: Json, value: Any, old: Any, path: str) -> Iterator[Cause]:
    if value is None:
        return
    for rule in schema.get("x-kubernetes-validations", ()):
        yield from _apply(rule, schema, value, old, path)
    if isinstance(value, dict):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        for name, item in value.items():
            known = properties.get(name, rest)
            if isinstance(known, dict):
                before = old.get(name) if isinstance(old, dict) else None
                yield from _check(known, item, before, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        keys = schema.get("x-kubernetes-list-map-keys", ())
        before_of = {tuple(o.get(k) for k in keys): o for o in old} if keys and isinstance(old, list) else {}
        for i, item in enumerate(value):
            before = before_of.get(tuple(item.get(k) for k in keys)) if keys else None
            yield from _check(schema["items"], item, before, f"{path}[{i}]")


def _apply(rule: Json, schema: Json, value: Any, old: Any, path: str) -> Iterator[Cause]:
    text = rule["rule"]
    variables = {"self": _value(schema, value)}
    if re.search(r"\boldSelf\b", text):
        if old is None:
            return
        variables["oldSelf"] = _value(schema, old)
    shown = (
        '"object"'
        if isinstance(value, dict)
        else '"array"'
        if isinstance(value, list)
        else repr(value).replace("'", '"')
    )
    where = path + rule.get("fieldPath", "") if path else rule.get("fieldPath", "").lstrip(".") or "<nil>"
    reason = rule.get("reason", "FieldValueInvalid")
    try:
        if evaluate(text, variables) is True:
            return
        message = rule.get("message") or f"failed rule: {text.strip()}"
        if "messageExpression" in rule:
            message = str(evaluate(rule["messageExpression"], variables))
    except ValueError as error:
        message = f"rule evaluation error: {text.strip()}: {error}"
    prefix = {"FieldValueForbidden": "Forbidden", "FieldValueRequired": "Required value"}.get(reason)
    yield Cause(where, f"{prefix}: {message}" if prefix else f"Invalid value: {shown}: {message}", reason)


def compile_errors(schema: Json, path: str, root: bool = True) -> Iterator[Cause]:
    """Yield the rules that cannot be compiled, or that name a field of `self` that the schema lacks."""
    for i, rule in enumerate(schema.get("x-kubernetes-validations", ())):
        where = f"{path}.x-kubernetes-validations[{i}].rule"
        try:
            _program(rule.get("rule", ""))
        except ValueError as error:
            yield Cause(where, f"Invalid value: {rule.get('rule')!r}: compilation failed: {error}")
            continue
        known = {escape(name) for name in schema.get("properties", {})} | (
            {"metadata", "apiVersion", "kind"} if root else set()
        )
        if schema.get("properties") and not schema.get("x-kubernetes-preserve-unknown-fields"):
            for name in re.findall(r"(?<![.\w])(?:self|oldSelf)\.([A-Za-z_]\w*)\b(?!\s*\()", rule["rule"]):
                if name not in known:
                    yield Cause(where, f"Invalid value: {rule['rule']!r}: compilation failed: undefined field '{name}'")
    for name, below in schema.get("properties", {}).items():
        yield from compile_errors(below, f"{path}.properties[{name}]", root=False)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from compile_errors(schema[name], f"{path}.{name}", root=False)
