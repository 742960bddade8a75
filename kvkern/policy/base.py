"""What a tier asks of an eviction policy. Policies see keys in prefix order; they own no memory and take no locks.

    a request:  access(chain)  ->  insert(what is written of it)  ->  victims(what no longer fits)  ->  remove or evict

A policy decides admission in the same breath: `victims` may name what has just been inserted, and a tier that asks
before it copies then writes nothing. Time comes with the call, never from a clock, so that a trace has one outcome.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Keys = Sequence[bytes]  # 32 bytes each; keys[i] is an ancestor of keys[i + 1]


class Stop(enum.IntEnum):
    """Why a reply ended: what comes next is a tool's result, or a human's answer."""

    UNKNOWN = 0
    TOOL_CALL = 1
    END_TURN = 2


STOPS = {"tool_call": Stop.TOOL_CALL, "end_turn": Stop.END_TURN}  # as traces and clients call them


@dataclass(frozen=True, slots=True)
class Use:
    """What is known of the request that uses a chain. All but the time may be unknown."""

    now_s: float = 0.0  # seconds of any clock that does not run backwards, the same for all calls
    request: int = 0  # calls with the same number belong to one request and count once; 0: each is one of its own
    namespace: bytes = b""  # whose share of the tier this is; empty: the chain's known chunks say it
    output_tokens: int = -1  # of the reply; known at its end
    stop: Stop = Stop.UNKNOWN  # known at its end
    session: int = 0  # equal numbers: one conversation; 0: the chain itself has to tell


class EvictionPolicy(Protocol):
    """Orders the chunks of a tier. Called with the tier's lock held; never blocks. Amortised O(1) a chunk.

    A policy offers a tail before its head, so that what stays is a prefix.
    """

    def access(self, chain: Keys, use: Use) -> None:
        """A request uses this sequence, from its first chunk on; resident or not, pinned or not.

        Called again with the same `use.request` when more is known: a longer chain, or (with an empty one) how it ended.
        """

    def insert(self, keys: Keys, use: Use) -> None:
        """These are resident and evictable from now on. `access` came first, but for what a restart has found: that comes
        in the order of its depth, many sequences mixed."""

    def pin(self, keys: Keys) -> None:
        """Not evictable until `unpin`, and no use. Each is resident and evictable before this call."""

    def unpin(self, keys: Keys) -> None:
        """Evictable again. Each is resident and pinned before this call; ancestors may come with what was written."""

    def remove(self, keys: Keys) -> None:
        """Gone for another reason than eviction; pinned or not. Unknown keys are ignored."""

    def victims(self, count: int) -> list[bytes]:
        """Up to `count` evictable chunks to evict, the first to go first, and forget them; what was inserted last too."""
