"""Messages about a name that nobody knows: they suggest the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ConfigError


def nearest(name: str, known: Collection[str]) -> str:
    """Return "did you mean 'x'? ", or an empty string if nothing known is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def reject_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise ConfigError for the first unknown key. The message suggests the nearest known name."""
    for key in given:
        if key not in known:
            hint = nearest(str(key), known)
            raise ConfigError(f"unknown key {key!r} in {where}; {hint}known keys: {', '.join(sorted(known))}")
