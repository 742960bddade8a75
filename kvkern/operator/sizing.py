"""How much of a cache pod's memory is cache.

    capacity = memory - BASE - memory / SHARE, in whole MiB

BASE is a daemon's own memory: interpreter, libraries, compiled code. SHARE covers what grows with the number of chunks: index,
policy, page tables. The pages of the arena count towards the limit of the pod that touched them.
"""

from __future__ import annotations

from ..errors import ConfigError
from .quantities import format_memory, parse_memory

BASE_NBYTES = 384 << 20
SHARE = 32
MIN_CAPACITY_NBYTES = 64 << 20
MIB = 1 << 20


def capacity_of(memory: str, name: str) -> int:
    """Return the bytes of cache in a pod of this memory. Raises ConfigError if it has room for none."""
    nbytes = parse_memory(memory, name)
    capacity = (nbytes - BASE_NBYTES - nbytes // SHARE) // MIB * MIB
    if capacity < MIN_CAPACITY_NBYTES:
        raise ConfigError(
            f"is {memory!r}, of which a daemon itself needs {format_memory(BASE_NBYTES)} and a {SHARE}nd; give at least 512Mi"
        )
    return capacity
