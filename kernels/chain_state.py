"""Where a sequence's chunk keys stand: what every backend of `chunk_keys` takes and returns."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import LayoutError


@dataclass(frozen=True, slots=True)
class ChainState:
    """Where a sequence's keys stand: enough to go on with its next chunk."""

    root: bytes  # 32 bytes, of the namespace
    num_chunks: int
    chain: bytes  # c of the last chunk, 32 bytes; unused when num_chunks is 0
    segment_end: bytes  # key of the last chunk of the last whole segment; the root in segment 0

    @classmethod
    def start(cls, root: bytes) -> ChainState:
        """State before the first chunk."""
        if len(root) != 32:
            raise LayoutError(f"root has {len(root)} bytes, expected 32")
        return cls(root, 0, bytes(32), root)
