"""Sizes in bytes, as users write them and as messages show them."""

from __future__ import annotations

import re

from ..errors import ConfigError

_UNITS = {"": 1, "B": 1}
# 8G and 8GB are decimal, 8Gi and 8GiB binary. Kubernetes writes 8G and 8Gi.
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {_prefix: 10 ** (3 * _power), f"{_prefix}B": 10 ** (3 * _power)}
    _UNITS |= {f"{_prefix}I": 1 << (10 * _power), f"{_prefix}IB": 1 << (10 * _power)}
MAX_CAPACITY_NBYTES = 1 << 46  # 64 TiB
_MAX_DIGITS = 100
_MAX_BITS = 1000


def parse_nbytes(value: int | str, name: str = "capacity") -> int:
    """Convert `8GiB`, `8Gi`, `500 MB`, `8G` or a plain integer to bytes. Raises ConfigError for all else, 0 and below too."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{name} is {value!r}; expected a size such as '8GiB' or a number of bytes")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:  # Python does not show every such number
        raise ConfigError(
            f"{name} is a number of {value.bit_length()} bits; it must lie in 1..{MAX_CAPACITY_NBYTES} (64 TiB)"
        )
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(value).upper())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{name} is {value!r}; expected a size such as '8GiB', '500MB' or a number of bytes")
    if len(match[1]) > _MAX_DIGITS:
        raise ConfigError(f"{name} is {str(value)[:_MAX_DIGITS]}...; it must lie in 1..{MAX_CAPACITY_NBYTES} (64 TiB)")
    nbytes = int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]
    if not 0 < nbytes <= MAX_CAPACITY_NBYTES:
        raise ConfigError(f"{name} is {value!r} = {nbytes} bytes; it must lie in 1..{MAX_CAPACITY_NBYTES} (64 TiB)")
    return nbytes


def format_nbytes(nbytes: int) -> str:
    """Format a size for messages, such as `1.5 GiB`. The result is rounded."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"
