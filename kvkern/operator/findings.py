"""Reads an object that a user wrote, field by field, and keeps what is to be said about it. Nothing is ignored in silence."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class Level(enum.StrEnum):
    """What a finding means."""

    ERROR = "error"  # nothing is changed until the user has corrected it
    IGNORED = "ignored"  # the field has no effect
    ADJUSTED = "adjusted"  # the field acts in another way than it says


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to be said about one field."""

    level: Level
    field: str  # its path, such as spec.cacheSpec.memory
    text: str  # what is wrong and what to do, without the path

    def __str__(self) -> str:
        return f"{self.field}: {self.text}"


class Fields:
    """The fields of a mapping. `close` reports those that nobody has read.

    A value of a wrong type is an error and reads as absent.
    """

    def __init__(self, values: object, path: str, findings: list[Finding]) -> None:
        self.path, self.findings = path, findings
        if values is not None and not isinstance(values, Mapping):
            self.error(path, f"is {_shown(values)}; expected an object")
            values = None
        self._values: Mapping[str, Any] = values or {}
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def given(self, names: Iterable[str]) -> list[str]:
        """Return which of these fields are there."""
        return [name for name in names if name in self]

    def unread(self) -> list[str]:
        """Return the fields that nobody has read so far."""
        return [name for name in self._values if name not in self._read]

    def at(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self.path}.{name}"

    def error(self, field: str, text: str) -> None:
        """Note what the user has to correct."""
        self.findings.append(Finding(Level.ERROR, field, text))

    def ignored(self, name: str, text: str) -> None:
        """Note that a field has no effect, if it is there."""
        self._read.add(name)
        if name in self:
            self.findings.append(Finding(Level.IGNORED, self.at(name), text))

    def adjusted(self, name: str, text: str) -> None:
        """Note that a field acts in another way than it says."""
        self.findings.append(Finding(Level.ADJUSTED, self.at(name), text))

    def text(self, name: str, default: str = "", choices: tuple[str, ...] = ()) -> str:
        """Read a string."""
        value: str = self._typed(name, str, default)
        if choices and value not in choices:
            if value:
                self.error(self.at(name), f"is {value[:60]!r}; expected one of {', '.join(choices)}")
            return default
        return value

    def quantity(self, name: str, default: str) -> str:
        """Read a quantity: a string or a number."""
        value = self._typed(name, str | int | float, default)
        return str(value)

    def filled(self, name: str) -> bool:
        """Return True if a field is there and not an empty string."""
        return self._values.get(name) not in (None, "")

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Read an integer in low..high."""
        value: int = self._typed(name, int, default)
        if not low <= value <= high:
            self.error(self.at(name), f"is {value}; it must lie in {low}..{high}")
            return default
        return value

    def items(self, name: str) -> list[Any]:
        """Read a list."""
        return list(self._typed(name, list, []))

    def anything(self, name: str) -> Any:
        """Read a value of any type."""
        self._read.add(name)
        return self._values.get(name)

    def mapping(self, name: str) -> dict[str, Any]:
        """Read an object whose keys are the user's."""
        return dict(self._typed(name, Mapping, {}))

    def inside(self, name: str) -> Fields:
        """Read an object. Close it when it has been read."""
        self._read.add(name)
        return Fields(self._values.get(name), self.at(name), self.findings)

    def close(self) -> None:
        """Report the fields that nobody has read."""
        for name in self.unread():
            self.ignored(name, "kvkern does not know this field")

    def _typed(self, name: str, kind: Any, default: Any) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or isinstance(value, bool):
            self.error(self.at(name), f"is {_shown(value)}; expected {_KIND_NAMES.get(kind, 'a number or a string')}")
            return default
        return value


_KIND_NAMES: dict[Any, str] = {str: "a string", int: "an integer", list: "a list", Mapping: "an object"}


def _shown(value: object) -> str:
    return f"{str(value)[:60]!r} ({type(value).__name__})"
