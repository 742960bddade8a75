"""Replays two tiers: DRAM with a policy, and a remote store that evicts the least recently used chunk, tail first.

hit       the longest prefix with each chunk in DRAM or in the remote; chunks that only the remote has are promoted to DRAM
written   chunks written to the remote, by a `Persist` mode; a chunk that the remote has is not written again
oracle    every chunk that DRAM evicts is offered to a remote that knows when each chunk is used next
          it shows how good a remote with fewer writes could be
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..policy import make_policy
from ..policy.base import Keys
from ..policy.grit import Grit
from ..policy.persist_modes import Persist, persist_mode
from .policy_driver import Progress, trace_requests
from .remote_models import NEVER, LRURemote, OracleRemote
from .trace import Trace

ORACLE = "oracle"  # the oracle, in lists of modes


@dataclass(frozen=True, slots=True)
class TwoTierCounts:
    """Numbers of chunks in a two-tier replay."""

    dram_hits: int
    remote_hits: int
    written: int


def checked_persist_mode(mode: str, policy_name: str) -> Persist | None:
    """Return the mode; None for the oracle. Raises ConfigError if it is unknown or the policy cannot do it."""
    if mode == ORACLE:
        return None
    return persist_mode(mode, policy_name)


def persist_modes_of(policy_name: str) -> list[str]:
    """Return all modes that the policy can do, and the oracle."""
    return [*(mode for mode in Persist if mode is not Persist.PREDICTED or policy_name == "grit"), ORACLE]


def replay(
    trace: Trace,
    policy_name: str,
    capacity: int,  # chunks of DRAM
    remote_capacity: int,  # chunks
    persist: Persist | None,  # None: the oracle
    threshold: float,  # probability above which `Persist.PREDICTED` writes
    hints: bool = True,
    progress: Progress = lambda done: None,
) -> TwoTierCounts:
    """Replay a trace through both tiers. Counts hits by tier and chunks written."""
    policy = make_policy(policy_name, capacity)
    upcoming: dict[bytes, int] = {}
    remote = LRURemote(remote_capacity) if persist is not None else OracleRemote(remote_capacity, upcoming)
    following = _next_uses(trace) if persist is None else None
    resident: set[bytes] = set()
    hit_once: set[bytes] = set()  # resident chunks that were hit since they came to DRAM
    dram_hits = remote_hits = position = 0
    for chain, use in trace_requests(trace, hints, progress):
        in_dram, hit = _longest_prefix(chain, resident, remote)
        dram_hits += in_dram
        remote_hits += hit - in_dram
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
    return TwoTierCounts(dram_hits, remote_hits, remote.written)


def _longest_prefix(chain: Keys, resident: set[bytes], remote: LRURemote | OracleRemote) -> tuple[int, int]:
    """Return (its chunks in DRAM, all its chunks) of the longest prefix with each chunk in DRAM or in the remote."""
    in_dram = 0
    for i, key in enumerate(chain):
        if key in resident:
            in_dram += 1
        elif key not in remote:
            return in_dram, i
    return in_dram, len(chain)


def _next_uses(trace: Trace) -> npt.NDArray[np.int64]:
    """Return [chunk refs]: the position in `trace.chunks` at which the same chunk is used next, or NEVER."""
    order = np.argsort(trace.chunks, kind="stable")
    same = trace.chunks[order[1:]] == trace.chunks[order[:-1]]
    found = np.full(trace.num_refs, NEVER, dtype=np.int64)
    found[order[:-1][same]] = order[1:][same]
    return found
