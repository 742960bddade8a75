"""Kubernetes' quantities: `2000m`, `4Gi`, `1e9`. Exact numbers, no floats."""

from __future__ import annotations

import re
from fractions import Fraction

from ..errors import ConfigError

# What the API server accepts, less an exponent beside a suffix. CRDs check it with the same expression.
PATTERN = r"^[+]?([0-9]+|[0-9]+\.[0-9]*|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]{1,2}))?$"
_SUFFIXES = {"": Fraction(1), "n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000)}
_SUFFIXES |= {suffix: Fraction(10 ** (3 * power)) for power, suffix in enumerate("kMGTPE", start=1)}
_SUFFIXES |= {f"{suffix}i": Fraction(1 << (10 * power)) for power, suffix in enumerate("KMGTPE", start=1)}
MAX_DIGITS = 30


def parse_quantity(text: str | int | float, name: str) -> Fraction:
    """Return the number that a quantity means. Raises ConfigError, which names the field."""
    text = str(text)
    match = re.fullmatch(PATTERN, text) if len(text) <= MAX_DIGITS and text.isprintable() else None
    if match is None:
        raise ConfigError(f"{name} is {text[:MAX_DIGITS]!r}; expected a quantity such as 500m, 2, 4Gi or 4G")
    number, suffix = Fraction(match[1].rstrip(".") if match[1] != "." else "0"), match[2] or ""
    if suffix[:1] in ("e", "E") and len(suffix) > 1:
        return number * Fraction(10) ** int(suffix[1:])
    return number * _SUFFIXES[suffix]


def parse_memory(text: str | int | float, name: str) -> int:
    """Return a number of bytes. Raises ConfigError."""
    return int(parse_quantity(text, name))


def format_memory(nbytes: int) -> str:
    """Return the quantity as the API server writes it: the largest binary unit that divides it."""
    for suffix in ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki"):
        unit = int(_SUFFIXES[suffix])
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit}{suffix}"
    return str(nbytes)
