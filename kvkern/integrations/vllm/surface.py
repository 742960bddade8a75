"""Describes the part of vLLM that kvkern touches, as plain data: names, methods with their parameters, attributes, fields.

A parameter is written as in its signature: `key`, `expedited=` (has a default), `*args`, `**kwargs`, `*` (by name from here).
Knows nothing of kvkern. contract.py says what to describe; tests/data/vllm has the descriptions of the known releases.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

_BY_NAME = inspect.Parameter.KEYWORD_ONLY


@dataclass(frozen=True)
class Surface:
    """A description. A module or class that does not exist has no entry."""

    names: dict[str, list[str]]  # module -> names that it has
    functions: dict[str, list[str]]  # "module:name" or "module:Class.method" -> parameters
    bases: dict[str, dict[str, list[str]]]  # "module:Class" -> method -> parameters, also inherited ones
    abstract: dict[str, list[str]]  # "module:Class" -> methods that a subclass must implement
    attributes: dict[str, list[str]]  # "module:Class" -> attributes that it has, of those that were asked for
    configuration: dict[str, list[str]]  # configuration class -> its fields


def describe(
    names: Mapping[str, Iterable[str]],
    functions: Iterable[str],
    bases: Iterable[str],
    attributes: Mapping[str, Iterable[str]],
    configuration: str,  # "module:Class" of the outermost configuration
) -> Surface:
    """Look at the vLLM that is imported."""
    found_functions = {path: resolve(path) for path in sorted(functions)}
    found_bases = {path: resolve(path) for path in sorted(bases)}
    found_classes = {path: resolve(path) for path in sorted(attributes)}
    return Surface(
        names={m: sorted(n for n in wanted if resolve(f"{m}:{n}") is not None) for m, wanted in sorted(names.items())},
        functions={path: parameters_of(found) for path, found in found_functions.items() if found is not None},
        bases={path: methods_of(found) for path, found in found_bases.items() if found is not None},
        abstract={p: sorted(getattr(c, "__abstractmethods__", ())) for p, c in found_bases.items() if c is not None},
        attributes={
            path: sorted(attributes_of(found) & set(attributes[path]))
            for path, found in found_classes.items()
            if found is not None
        },
        configuration={
            name: sorted(field.name for field in fields(found))
            for name, found in sorted(reached_classes(resolve(configuration), {}).items())
        },
    )


def resolve(path: str) -> Any:
    """Return what "module:name" or "module:Class.name" names. None: it does not exist."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module + ".").startswith(error.name + "."):
            return None
        raise
    for part in name.split("."):
        if (found := getattr(found, part, None)) is None:
            return None
    return found


def parameters_of(function: Any) -> list[str]:
    """Return the parameters, in their order."""
    shown, by_name = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            shown.append(f"*{parameter.name}")
            by_name = True
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            shown.append(f"**{parameter.name}")
            continue
        if parameter.kind is _BY_NAME and not by_name:
            shown.append("*")
            by_name = True
        shown.append(parameter.name + ("=" if parameter.default is not parameter.empty else ""))
    return shown


def methods_of(of: Any) -> dict[str, list[str]]:
    """Return a class's own and inherited methods with their parameters. The first is `self`, or of class methods `cls`."""
    found: dict[str, list[str]] = {}
    for base in of.__mro__:
        if not base.__module__.startswith(of.__module__.split(".")[0]):
            continue  # object, ABC
        for name, value in vars(base).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if inspect.isfunction(function) and not (name.startswith("__") and name != "__init__"):
                found.setdefault(name, parameters_of(function))
    return dict(sorted(found.items()))


def attributes_of(of: Any) -> set[str]:
    """Return what instances of a class have, as far as its source shows: fields, properties, what methods assign to self."""
    found: set[str] = set()
    for base in of.__mro__[:-1]:
        found |= {*vars(base), *getattr(base, "__annotations__", {})}
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # a class without source
            continue
        found |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value)
        }
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def reached_classes(config_class: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Return all dataclasses that can be inside `config_class`, by name. Adds them to `found`."""
    found[config_class.__name__] = config_class
    hints = typing.get_type_hints(config_class, vars(sys.modules[config_class.__module__]))
    for field in fields(config_class):
        for inner in dataclasses_in(hints[field.name]):
            if inner.__name__ not in found:
                reached_classes(inner, found)
    return found


def dataclasses_in(hint: Any) -> list[Any]:
    """Return the dataclasses that a type names, at any depth."""
    inner = [found for argument in typing.get_args(hint) for found in dataclasses_in(argument)]
    return [hint, *inner] if is_dataclass(hint) else inner
