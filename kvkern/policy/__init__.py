"""Eviction policies: one file each, behind the protocol in base.py. No I/O, no tensors, deterministic given the trace.

`make_policy` makes one by name and imports only that policy's module, so numba is loaded only for a policy that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .base import EvictionPolicy
    from .grit_model import GritModel


# name -> (module of this package, its class), made with the number of chunks that the tier has room for
_POLICIES: dict[str, tuple[str, str]] = {
    "lru": ("lru", "LRU"),
    "arc": ("arc", "Arc"),
    "s3fifo": ("s3fifo", "S3Fifo"),
    "lirs": ("lirs", "Lirs"),
    "grit": ("grit", "Grit"),
}
POLICIES = tuple(_POLICIES)


def checked_policy(name: str) -> str:
    """Return `name` if a policy has that name. Raises ConfigError otherwise."""
    if name not in _POLICIES:
        raise ConfigError(f"policy is {name!r}; expected one of {', '.join(POLICIES)}")
    return name


def make_policy(
    name: str,
    capacity: int,  # chunks that the tier has room for
) -> EvictionPolicy:
    """Make a new policy of that name. Raises ConfigError if the name is unknown."""
    module, class_name = _POLICIES[checked_policy(name)]
    policy: EvictionPolicy = getattr(import_module(f".{module}", __package__), class_name)(capacity)
    return policy


def load_policy(name: str) -> None:
    """Load what policies of that name need. On the first start of a machine it is compiled, which takes long.

    Raises ConfigError if the name is unknown.
    """
    if checked_policy(name) == "grit":
        from .grit import compile_kernels

        compile_kernels()


def make_model(name: str) -> GritModel | None:
    """Make an empty model for `policy_factory`. Returns None if policies of that name learn nothing that outlives them."""
    if checked_policy(name) != "grit":
        return None
    from .grit_model import GritModel

    return GritModel()


def policy_factory(
    name: str,
    capacity: int,  # chunks that the tier has room for
    model: GritModel | None = None,  # from `make_model`, to learn on from; None: a new one
) -> Callable[[], EvictionPolicy]:
    """Return a function that makes policies for the shares of one tier. Its policies learn together in one model.

    Compiles what the policy needs before it returns. Raises ConfigError if the name is unknown.
    """
    if checked_policy(name) != "grit":
        return lambda: make_policy(name, capacity)
    from .grit import Grit

    load_policy(name)
    shared = model or make_model(name)
    return lambda: Grit(capacity, shared)
