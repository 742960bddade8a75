"""What a tier asks of an eviction policy. Policies see keys in prefix order; they own no memory and take no locks.

    a request:  access(chain)  ->  insert(its new chunks)  ->  victims(number of chunks over capacity)  ->  remove or evict

A policy also decides admission: `victims` may name chunks that were just inserted. A tier that asks before it copies then
never writes them. Time comes with the call, never from a clock, so that a trace always has the same outcome.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import msgspec

Keys = Sequence[bytes]  # 32 bytes each; keys[i] is an ancestor of keys[i + 1]


class Stop(enum.IntEnum):
    """Why a reply ended. A tool's result follows TOOL_CALL, a human's answer follows END_TURN."""

    UNKNOWN = 0
    TOOL_CALL = 1
    END_TURN = 2


STOPS = {"tool_call": Stop.TOOL_CALL, "end_turn": Stop.END_TURN}  # the names that traces and clients use


class Use(msgspec.Struct, frozen=True, gc=False):
    """What is known about the request that uses a chain. Everything but the time may be unknown."""

    now_s: float = 0.0  # seconds; any clock that does not run backwards, the same clock for all calls
    request: int = 0  # calls with the same number belong to one request and count once; 0: a request of its own
    namespace: bytes = b""  # whose share of the tier this is; empty: that of the chain's known chunks
    output_tokens: int = -1  # of the reply; known at its end
    stop: Stop = Stop.UNKNOWN  # known at its end
    session: int = 0  # equal numbers: one conversation; 0: unknown, the policy has to infer it from the chain
    client: int = 0  # of a daemon, the one that asks; 0: the only one; no policy reads it
    counts_itself: bool = False  # the caller counts lookups and hits, see ChunkCache.count_lookups; no policy reads it
    # False: the chain is of another KV group than the request's first one and holds the same tokens; no policy reads it
    counts_tokens: bool = True


class EvictionPolicy(Protocol):
    """Orders the chunks of a tier. Called with the tier's lock held; never blocks. Amortised O(1) a chunk.

    A policy evicts a tail before its head, so that the chunks that stay form a prefix.
    """

    def access(self, chain: Keys, use: Use) -> None:
        """A request uses this sequence from its first chunk on. The chunks may be resident or not, pinned or not.

        The tier calls it again with the same `use.request` when it knows more: a longer chain, or how the request ended
        (then with an empty chain).
        """

    def insert(self, keys: Keys, use: Use) -> None:
        """These chunks are resident and evictable from now on. `access` was called with them before.

        Chunks that a restart has found are the exception: they come without `access`, ordered by depth, with many
        sequences mixed.
        """

    def pin(self, keys: Keys) -> None:
        """Make chunks not evictable until `unpin`. Does not count as a use. Each is resident and evictable before the call."""

    def unpin(self, keys: Keys) -> None:
        """Make chunks evictable again. Each is resident and pinned before the call. Ancestors may come with new chunks."""

    def remove(self, keys: Keys) -> None:
        """Forget chunks that left for another reason than eviction, pinned or not. Unknown keys are ignored."""

    def victims(self, count: int) -> list[bytes]:
        """Choose up to `count` evictable chunks, forget them, and return them in the order of eviction.

        They may include chunks that were just inserted.
        """
