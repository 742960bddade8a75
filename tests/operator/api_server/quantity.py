"""Quantities such as `1536Mi`: their value, and the form in which a real API server stores them."""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Any

_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
_DECIMAL = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_FORM = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(?:([KMGTPE]i)|([numkMGTPE]?)|[eE]([+-]?\d+))")


def _parse(text: Any) -> tuple[Fraction, str]:
    """Return the value and the family of its suffix: binary, decimal or exponent."""
    match = _FORM.fullmatch(str(text))
    if match is None:
        raise ValueError("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")
    sign, digits, binary, decimal, exponent = match.groups()
    value = Fraction(digits) * (-1 if sign == "-" else 1)
    if binary:
        return value * 1024 ** _BINARY[binary], "binary"
    if exponent:
        return value * Fraction(10) ** int(exponent), "exponent"
    return value * Fraction(1000) ** _DECIMAL[decimal or ""], "decimal"


@functools.lru_cache(maxsize=4096)
def quantity(text: Any) -> Fraction:
    """Return the value. Raises ValueError."""
    return _parse(text)[0]


def is_quantity(text: Any) -> bool:
    return isinstance(text, str | int | float) and _FORM.fullmatch(str(text)) is not None


def canonical(text: Any) -> str:
    """Return the quantity as a real server stores it: `2000m` is `2`, `1024Mi` is `1Gi`. Raises ValueError."""
    value, family = _parse(text)
    nano = value * 10**9
    value = Fraction(-(-nano.numerator // nano.denominator), 10**9)  # rounded up, as Kubernetes does
    if value == 0:
        return "0"
    if family == "binary" and abs(value) >= 1024 and value.denominator == 1:
        number, power = value.numerator, 0
        while number % 1024 == 0 and power < 6:
            number, power = number // 1024, power + 1
        return f"{number}{dict(zip(_BINARY.values(), _BINARY, strict=True)).get(power, '')}"
    power = -3
    while power < 6 and (value / Fraction(1000) ** (power + 1)).denominator == 1:
        power += 1
    number = (value / Fraction(1000) ** power).numerator
    if family == "exponent":
        return f"{number}e{3 * power}" if power else str(number)
    return f"{number}{dict(zip(_DECIMAL.values(), _DECIMAL, strict=True))[power]}"


def canonicalise(amounts: Any) -> None:
    """Replace the values of `requests`, `limits`, `allocatable` and the like. Leaves what is no quantity."""
    if isinstance(amounts, dict):
        for name, amount in amounts.items():
            if is_quantity(amount):
                amounts[name] = canonical(amount)
