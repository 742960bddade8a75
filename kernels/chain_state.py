"""The state of a sequence's key chain. Every backend of `chunk_keys` takes it and returns the next one."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import LayoutError


@dataclass(frozen=True, slots=True)
class ChainState:
    """State of a key chain after some chunks: enough to hash the next chunk."""

    root: bytes  # 32 bytes, the key of the namespace
    num_chunks: int
    chain: bytes  # 32 bytes, c of the last chunk; unused if num_chunks is 0
    segment_end: bytes  # 32 bytes, key of the last chunk of the last whole segment; the root in segment 0

    @classmethod
    def start(cls, root: bytes) -> ChainState:
        """Return the state before the first chunk. Raises LayoutError if `root` is not 32 bytes long."""
        if len(root) != 32:
            raise LayoutError(f"root has {len(root)} bytes, expected 32: pass the root key of a namespace")
        return cls(root, 0, bytes(32), root)
