"""Eviction policies: one file each, behind the protocol in base.py. No I/O, no tensors, deterministic given the trace.

`make_policy` makes one by name, and imports no other: only those that compile load numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .base import EvictionPolicy
    from .grit_model import GritModel


def _lru(capacity: int) -> EvictionPolicy:
    from .lru import LRU

    return LRU()


def _arc(capacity: int) -> EvictionPolicy:
    from .arc import Arc

    return Arc(capacity)


def _s3fifo(capacity: int) -> EvictionPolicy:
    from .s3fifo import S3Fifo

    return S3Fifo(capacity)


def _lirs(capacity: int) -> EvictionPolicy:
    from .lirs import Lirs

    return Lirs(capacity)


def _grit(capacity: int) -> EvictionPolicy:
    from .grit import Grit

    return Grit(capacity)


_CREATORS: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": _lru, "arc": _arc, "s3fifo": _s3fifo, "lirs": _lirs, "grit": _grit,
}  # fmt: skip
POLICIES = tuple(_CREATORS)


def checked_policy(name: str) -> str:
    """`name`, if a policy has it. Raises ConfigError."""
    if name not in _CREATORS:
        raise ConfigError(f"policy is {name!r}; expected one of {', '.join(POLICIES)}")
    return name


def make_policy(
    name: str,
    capacity: int,  # chunks that the tier has room for
) -> EvictionPolicy:
    """A new policy of that name. Raises ConfigError."""
    return _CREATORS[checked_policy(name)](capacity)


def make_model(name: str) -> GritModel | None:
    """What policies of that name learn, for `policy_maker`; None if they learn nothing that outlives them."""
    if checked_policy(name) != "grit":
        return None
    from .grit_model import GritModel

    return GritModel()


def policy_maker(
    name: str,
    capacity: int,  # chunks that the tier has room for
    model: GritModel | None = None,  # of `make_model`, to go on with; None: a new one
) -> Callable[[], EvictionPolicy]:
    """Makes policies for the shares of one tier, which learn together. What has to be compiled is, now. Raises ConfigError."""
    if checked_policy(name) != "grit":
        return lambda: make_policy(name, capacity)
    from .grit import Grit, compile_kernels

    compile_kernels()
    shared = model or make_model(name)
    return lambda: Grit(capacity, shared)
