"""Two tiers: DRAM by a policy, and a remote store that evicts the least recently used, tail first.

hit       the longest prefix that lies in DRAM or the remote; what only the remote has is promoted to DRAM
written   chunks that go to the remote, by a `Persist` mode; what lies there is not written again
oracle    what DRAM evicts is offered to a remote that knows when everything is used next: what writing less could come to
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..policy import make_policy
from ..policy.base import Keys
from ..policy.grit import Grit
from ..policy.persist_modes import Persist, persist_mode
from .policy_driver import Progress, requests
from .remote_models import NEVER, LRURemote, OracleRemote
from .trace import Trace

ORACLE = "oracle"  # beside the modes


@dataclass(frozen=True, slots=True)
class TwoTier:
    """Chunks."""

    dram_hits: int
    remote_hits: int
    written: int


def checked_mode(mode: str, policy_name: str) -> Persist | None:
    """The mode, None for the oracle. Raises ConfigError for one that the policy cannot do, too."""
    if mode == ORACLE:
        return None
    return persist_mode(mode, policy_name)


def modes_of(policy_name: str) -> list[str]:
    """All that the policy can do."""
    return [*(mode for mode in Persist if mode is not Persist.PREDICTED or policy_name == "grit"), ORACLE]


def replay(
    trace: Trace,
    policy_name: str,
    capacity: int,  # chunks of DRAM
    remote_capacity: int,  # chunks
    persist: Persist | None,  # None: the oracle
    threshold: float,  # of `Persist.PREDICTED`
    hints: bool = True,
    progress: Progress = lambda done: None,
) -> TwoTier:
    """Hits by tier, and what was written."""
    policy = make_policy(policy_name, capacity)
    upcoming: dict[bytes, int] = {}
    remote = LRURemote(remote_capacity) if persist is not None else OracleRemote(remote_capacity, upcoming)
    following = _next_uses(trace) if persist is None else None
    resident: set[bytes] = set()
    hit_once: set[bytes] = set()  # since they came to DRAM
    dram_hits = remote_hits = position = 0
    for chain, use in requests(trace, hints, progress):
        near, hit = _longest(chain, resident, remote)
        dram_hits += near
        remote_hits += hit - near
        if following is not None:
            upcoming.update(zip(chain, following[position : position + len(chain)].tolist(), strict=True))
            position += len(chain)
        remote.use(reversed(chain), use.now_s)
        policy.access(chain, use)
        missing = [key for key in dict.fromkeys(chain) if key not in resident]
        if persist is Persist.ALL:
            remote.write(reversed(missing), use.now_s)
        elif persist is Persist.HOT:
            again = [key for key in reversed(chain[:hit]) if key in resident and key not in hit_once]
            remote.write(again, use.now_s)
            hit_once.update(again)
        policy.insert(missing, use)
        resident.update(missing)
        over = len(resident) - capacity
        if over <= 0:
            continue
        gone = policy.victims(over)
        resident.difference_update(gone)
        hit_once.difference_update(gone)
        if persist is Persist.PREDICTED:
            assert isinstance(policy, Grit)
            assert isinstance(remote, LRURemote)
            new = [key for key in gone if key not in remote]
            chances = policy.chances(new, remote.residency_s)
            remote.write([key for key, chance in zip(new, chances, strict=True) if chance > threshold], use.now_s)
        elif persist is Persist.EVICTED or persist is None:
            remote.write(gone, use.now_s)
    return TwoTier(dram_hits, remote_hits, remote.written)


def _longest(chain: Keys, resident: set[bytes], remote: LRURemote | OracleRemote) -> tuple[int, int]:
    """Of the longest prefix that one of the two has: chunks in DRAM, and all."""
    near = 0
    for i, key in enumerate(chain):
        if key in resident:
            near += 1
        elif key not in remote:
            return near, i
    return near, len(chain)


def _next_uses(trace: Trace) -> npt.NDArray[np.int64]:
    """[chunk refs] position in `chunks` at which the same chunk is used next, or NEVER."""
    order = np.argsort(trace.chunks, kind="stable")
    same = trace.chunks[order[1:]] == trace.chunks[order[:-1]]
    found = np.full(trace.num_refs, NEVER, dtype=np.int64)
    found[order[:-1][same]] = order[1:][same]
    return found
