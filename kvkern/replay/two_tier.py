"""Two tiers: DRAM by a policy, and a remote store that evicts the least recently used, tail first.

hit       the longest prefix that lies in DRAM or the remote; what only the remote has is promoted to DRAM
written   chunks that go to the remote, by a `Persist` mode; what lies there is not written again
oracle    writes at eviction exactly what is used again before the remote would have dropped it, had it come then
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ConfigError
from ..policy import make_policy
from ..policy.grit import Grit
from ..policy.persist import Persist
from .drive import Progress, requests
from .trace import Trace

_FOREVER_S = 1e6  # residency of a remote that has evicted nothing yet
_SMOOTH = 0.05  # weight of a new eviction's age


@dataclass(frozen=True, slots=True)
class TwoTier:
    """Chunks."""

    dram_hits: int
    remote_hits: int
    written: int


class _Remote:
    """The remote store's index."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used: OrderedDict[bytes, float] = OrderedDict()  # key -> time, the oldest first
        self.residency_s = _FOREVER_S
        self.written = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._used

    def use(self, keys: Iterable[bytes], now_s: float) -> None:
        """Those it has count as used; call with tails first."""
        for key in keys:
            if key in self._used:
                self._used[key] = now_s
                self._used.move_to_end(key)

    def write(self, keys: Iterable[bytes], now_s: float) -> None:
        """Tails first."""
        for key in keys:
            if key not in self._used:
                self.written += 1
                self._used[key] = now_s
        while len(self._used) > self._capacity:
            _, then_s = self._used.popitem(last=False)
            age_s = now_s - then_s
            known = self.residency_s < _FOREVER_S
            self.residency_s = (1 - _SMOOTH) * self.residency_s + _SMOOTH * age_s if known else age_s


def replay(
    trace: Trace,
    policy_name: str,
    capacity: int,  # chunks of DRAM
    remote_capacity: int,  # chunks
    persist: Persist,
    threshold: float,  # of `Persist.PREDICTED`
    hints: bool = True,
    progress: Progress = lambda done: None,
) -> TwoTier:
    """Hits by tier, and what was written."""
    policy = make_policy(policy_name, capacity)
    if persist is Persist.PREDICTED and not isinstance(policy, Grit):
        raise ConfigError(f"persist is 'predicted', but policy {policy_name!r} predicts nothing; use grit")
    resident: set[bytes] = set()
    hit_once: set[bytes] = set()
    remote = _Remote(remote_capacity)
    dram_hits = remote_hits = 0
    for chain, use in requests(trace, hints, progress):
        begin = remote_hits + dram_hits
        for key in chain:
            if key in resident:
                dram_hits += 1
            elif key in remote:
                remote_hits += 1
            else:
                break
        hit = chain[: remote_hits + dram_hits - begin]
        remote.use(reversed(chain), use.now_s)
        policy.access(chain, use)
        missing = [key for key in dict.fromkeys(chain) if key not in resident]
        policy.insert(missing, use)
        resident.update(missing)
        if persist is Persist.ALL:
            remote.write(reversed(missing), use.now_s)
        elif persist is Persist.HOT:
            remote.write([key for key in reversed(hit) if key not in hit_once], use.now_s)
            hit_once.update(hit)
        over = len(resident) - capacity
        if over > 0:
            gone = policy.victims(over)
            resident.difference_update(gone)
            if persist is Persist.EVICTED:
                remote.write(gone, use.now_s)
            elif persist is Persist.PREDICTED:
                assert isinstance(policy, Grit)
                chances = policy.chances(gone, remote.residency_s)
                remote.write([key for key, chance in zip(gone, chances, strict=True) if chance > threshold], use.now_s)
    return TwoTier(dram_hits, remote_hits, remote.written)
