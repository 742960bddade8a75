"""The last hour of a daemon's counters: a ring with one sample every SAMPLE_S. Knows no clock and no cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import pairwise

SAMPLE_S = 10.0
HOUR_S = 3600.0
MAX_SAMPLES = int(HOUR_S / SAMPLE_S) + 1  # an hour of differences
COUNTERS = (
    "lookup_chunks", "hit_chunks", "stored_chunks", "evicted_chunks", "dropped_chunks", "bad_chunks", "faults",
    "remote_lookup_chunks", "remote_hit_chunks", "remote_written_chunks", "remote_dropped_chunks", "remote_failures",
)  # fmt: skip

Number = int | float
Stat = Mapping[str, int | float | str]


class History:
    """Samples of counters that only grow, and of the slots in use."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[str, int], float]] = deque(maxlen=MAX_SAMPLES)

    def due(self, now_s: float) -> bool:
        """Return True if it is time for the next sample."""
        return not self._samples or now_s - self._samples[-1][0] >= SAMPLE_S

    def add(
        self,
        now_s: float,  # monotonic
        stat: Stat,  # the row that answers Stat
    ) -> None:
        """Take a sample."""
        counters = {name: int(stat.get(name, 0)) for name in COUNTERS}
        slots = float(stat.get("slots", 0))
        used = 1.0 - float(stat.get("free_slots", 0)) / slots if slots else 0.0
        self._samples.append((now_s, counters, used))

    def grown(self, stat: Stat) -> dict[str, int]:
        """Return by how much each counter has grown within the hour, up to now."""
        total = dict.fromkeys(COUNTERS, 0)
        samples = [counters for _, counters, _ in self._samples] + [{n: int(stat.get(n, 0)) for n in COUNTERS}]
        for before, after in pairwise(samples):
            for name in COUNTERS:
                total[name] += _growth(before[name], after[name])
        return total

    def series(
        self,
        chunk_nbytes: int,  # payload of a chunk, all ranks
        now_s: float,  # monotonic
    ) -> dict[str, list[Number | None]]:
        """Return one number for each interval between two samples, the oldest first.

        `ago_s` is the age of its end. `hit_ratio` is None where nothing was looked up. Rates are in bytes per second: what
        engines were given from DRAM, what they stored, what was read from and written to the remote store.
        """
        out: dict[str, list[Number | None]] = {
            name: [] for name in ("ago_s", "hit_ratio", "given", "stored", "remote_read", "remote_written", "used")
        }
        for (began_s, before, _), (ended_s, after, used) in pairwise(self._samples):
            if now_s - ended_s > HOUR_S:
                continue
            grown = {name: _growth(before[name], after[name]) for name in COUNTERS}
            looked_up, seconds = grown["lookup_chunks"], max(1e-3, ended_s - began_s)
            rate = chunk_nbytes / seconds
            out["ago_s"].append(round(now_s - ended_s))
            out["hit_ratio"].append(round(min(1.0, grown["hit_chunks"] / looked_up), 4) if looked_up else None)
            out["given"].append(round(grown["hit_chunks"] * rate))
            out["stored"].append(round(grown["stored_chunks"] * rate))
            out["remote_read"].append(round(grown["remote_hit_chunks"] * rate))
            out["remote_written"].append(round(grown["remote_written_chunks"] * rate))
            out["used"].append(round(used, 4))
        return out


def _growth(before: int, after: int) -> int:
    """Return what was added. A counter that is smaller than before began anew, with a new arena."""
    return after - before if after >= before else after
