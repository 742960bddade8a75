"""Shares of an arena: every namespace has its own policy, and the largest share loses chunks first.

    policy of a share: any EvictionPolicy
    victims(n):        from the largest share until another share is as large, then from both by turns, and so on

    heap:              entries (-size, tick, share), the least first. Of equal shares that is the share whose size changed
                       longest ago. When a size changes, its old entry becomes stale. A stale entry is dropped when it
                       reaches the top, or when half of all entries are stale

A tenant that scans through new prompts evicts its own chunks once it holds more than any other. A small tenant keeps its
chunks. The tier enforces caps, with `victims_of`.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence

from ..bounded_dict import BoundedDict
from .base import EvictionPolicy, Keys, Use

_Entry = tuple[int, int, bytes]
_MIN_STALE = 64  # fewer stale entries are not worth a sweep
_MAX_EMPTY = 64  # shares without chunks that keep their policy and what it has learnt
_OPEN_REQUESTS = 4096  # requests whose share is remembered until their end


class NamespaceShares:
    """An `EvictionPolicy` over one policy a share.

    A call costs O(1) a chunk, and O(log shares) for each share that it changes or exhausts.
    """

    def __init__(self, make: Callable[[], EvictionPolicy]) -> None:
        self._make = make
        self._shares: dict[bytes, bytes] = {}  # key -> share, of every chunk that is resident
        self._policies: dict[bytes, EvictionPolicy] = {}
        self._empty: OrderedDict[bytes, None] = OrderedDict()  # shares without chunks, least recently used first
        self._requests: BoundedDict[int, bytes] = BoundedDict(_OPEN_REQUESTS)  # number -> share
        self._sizes: Counter[bytes] = Counter()
        self._heap: list[_Entry] = []
        self._ticks: dict[bytes, int] = {}  # share -> tick of its entry in the heap that is not stale
        self._tick = 0
        self._last_victims: dict[bytes, bytes] = {}  # key -> share, of the victims that the last call returned

    def size(self, share: bytes) -> int:
        """Number of resident chunks of a share, pinned chunks included."""
        return self._sizes[share]

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy.

        The share is `use.namespace`, else that of the first known chunk, else that of the request's number. The call is
        ignored if none of these gives a share.
        """
        share = use.namespace or next((s for key in chain if (s := self._shares.get(key)) is not None), None)
        if share is None:
            share = self._requests.get(use.request)
        if share is None:
            return
        if use.request:
            self._requests.put(use.request, share)
        self._policy_of(share).access(chain, use)

    def insert(self, keys: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        share = use.namespace
        self._policy_of(share).insert(keys, use)
        self._shares.update(dict.fromkeys(keys, share))
        self._change_size(share, len(keys))

    def pin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        for share, mine in self._by_share(keys):
            self._policies[share].pin(mine)

    def unpin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        for share, mine in self._by_share(keys):
            self._policies[share].unpin(mine)

    def remove(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        for share, mine in self._by_share(keys):
            self._policies[share].remove(mine)
            self._forget(share, mine)

    def victims(self, count: int) -> list[bytes]:
        """See EvictionPolicy."""
        self._last_victims = {}
        chosen: list[bytes] = []
        exhausted: list[_Entry] = []
        while len(chosen) < count and (largest := self._largest_share()) is not None:
            heapq.heappop(self._heap)
            size, _, share = largest
            second = self._largest_share()
            step = max(1, second[0] - size) if second is not None else -size
            found = self._victims_of(share, min(step, count - len(chosen)))
            if not found:
                exhausted.append(largest)
            chosen += found
        for entry in exhausted:
            heapq.heappush(self._heap, entry)
        return chosen

    def victims_of(self, share: bytes, count: int) -> list[bytes]:
        """Choose up to `count` chunks of one share to evict, forget them, and return them."""
        self._last_victims = {}
        return self._victims_of(share, count)

    def _victims_of(self, share: bytes, count: int) -> list[bytes]:
        policy = self._policies.get(share)
        found = policy.victims(count) if policy is not None and count > 0 else []
        if found:
            self._forget(share, found)
            self._last_victims.update(dict.fromkeys(found, share))
        return found

    def chances(self, keys: Keys, horizon_s: float) -> list[float]:
        """Return the probability of each chunk to be used within `horizon_s` seconds.

        The victims of the last call still count. The probability is 0 for other chunks that are not resident, and in shares
        whose policy predicts nothing.
        """
        groups: dict[bytes, list[bytes]] = {}
        for key in keys:
            share = self._shares.get(key, self._last_victims.get(key))
            if share is not None:
                groups.setdefault(share, []).append(key)
        result: dict[bytes, float] = {}
        for share, mine in groups.items():
            chances = getattr(self._policies.get(share), "chances", None)
            if chances is not None:
                result.update(zip(mine, chances(mine, horizon_s), strict=True))
        return [result.get(key, 0.0) for key in keys]

    def _policy_of(self, share: bytes) -> EvictionPolicy:
        """Return the policy of a share; make one for a new share.

        Only `_MAX_EMPTY` shares without chunks keep their policy: the least recently used of them loses it.
        """
        policy = self._policies.get(share)
        if policy is None:
            policy = self._policies[share] = self._make()
        if not self._sizes[share]:
            self._keep_empty(share)
        return policy

    def _keep_empty(self, share: bytes) -> None:
        self._empty[share] = None
        self._empty.move_to_end(share)
        if len(self._empty) > _MAX_EMPTY:
            del self._policies[self._empty.popitem(last=False)[0]]

    def _by_share(self, keys: Keys) -> Iterator[tuple[bytes, list[bytes]]]:
        """Group the known keys by share, each group in the given order. Unknown keys are left out."""
        groups: dict[bytes, list[bytes]] = {}
        for key in keys:
            if (share := self._shares.get(key)) is not None:
                groups.setdefault(share, []).append(key)
        yield from groups.items()

    def _forget(self, share: bytes, keys: Sequence[bytes]) -> None:
        self._change_size(share, -sum(self._shares.pop(key, None) is not None for key in keys))

    def _change_size(self, share: bytes, count: int) -> None:
        self._sizes[share] += count
        if self._sizes[share]:
            self._tick += 1
            self._ticks[share] = self._tick
            heapq.heappush(self._heap, (-self._sizes[share], self._tick, share))
            self._empty.pop(share, None)
        else:
            del self._sizes[share]
            self._ticks.pop(share, None)
            self._keep_empty(share)
        if len(self._heap) > 2 * len(self._ticks) + _MIN_STALE:
            self._heap = [entry for entry in self._heap if self._is_fresh(entry)]
            heapq.heapify(self._heap)

    def _largest_share(self) -> _Entry | None:
        """Return the first heap entry that is not stale and leave it in the heap. Drops the stale entries before it."""
        while self._heap and not self._is_fresh(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def _is_fresh(self, entry: _Entry) -> bool:
        return self._ticks.get(entry[2]) == entry[1]
