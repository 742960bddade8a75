"""The last hour of a daemon's counters: a ring with one sample every SAMPLE_S. Knows no clock and no cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

SAMPLE_S = 10.0
HOUR_S = 3600.0
MAX_SAMPLES = int(HOUR_S / SAMPLE_S) + 1  # an hour of differences
COUNTERS = (
    "lookup_chunks", "hit_chunks", "stored_chunks", "evicted_chunks", "dropped_chunks", "bad_chunks", "faults",
    "remote_lookup_chunks", "remote_hit_chunks", "remote_written_chunks", "remote_dropped_chunks", "remote_failures",
)  # fmt: skip
RATES = {  # series -> counter
    "given": "hit_chunks", "stored": "stored_chunks", "remote_read": "remote_hit_chunks",
    "remote_written": "remote_written_chunks",
}  # fmt: skip

Number = int | float
Stat = Mapping[str, int | float | str]


class History:
    """Samples of counters that only grow, from 0 on, and of the slots in use."""

    def __init__(
        self,
        began_s: float,  # monotonic
    ) -> None:
        self._samples: deque[tuple[float, dict[str, int]]] = deque([(began_s, dict.fromkeys(COUNTERS, 0))], MAX_SAMPLES)
        # of each interval between two samples: end, hit ratio, chunks per second of each of RATES, share of slots in use
        self._intervals: deque[tuple[float, float | None, tuple[float, ...], float]] = deque(maxlen=MAX_SAMPLES - 1)

    def due(self, now_s: float) -> bool:
        """Return True if it is time for the next sample."""
        return now_s - self._samples[-1][0] >= SAMPLE_S

    def add(
        self,
        now_s: float,  # monotonic
        stat: Stat,  # the row that answers Stat
    ) -> None:
        """Take a sample."""
        began_s, before = self._samples[-1]
        counters, seconds = _counters(stat), max(1e-3, now_s - began_s)
        grown = {name: counters[name] - before[name] for name in COUNTERS}
        looked_up, slots = grown["lookup_chunks"], float(stat.get("slots", 0))
        ratio = round(min(1.0, grown["hit_chunks"] / looked_up), 4) if looked_up else None
        used = round(1.0 - float(stat.get("free_slots", 0)) / slots, 4) if slots else 0.0
        self._intervals.append((now_s, ratio, tuple(grown[name] / seconds for name in RATES.values()), used))
        self._samples.append((now_s, counters))

    def grown(self, stat: Stat) -> dict[str, int]:
        """Return by how much each counter has grown within the hour, up to now."""
        now, (_, before) = _counters(stat), self._samples[0]
        return {name: now[name] - before[name] for name in COUNTERS}

    def series(
        self,
        chunk_nbytes: int,  # payload of a chunk, all ranks
        now_s: float,  # monotonic
    ) -> dict[str, list[Number | None]]:
        """Return one number for each interval between two samples, the oldest first.

        `ago_s` is the age of its end. `hit_ratio` is None where nothing was looked up. Rates are in bytes per second: what
        engines were given from DRAM, what they stored, what was read from and written to the remote store. O(samples).
        """
        shown = [interval for interval in self._intervals if now_s - interval[0] <= HOUR_S]
        out: dict[str, list[Number | None]] = {
            "ago_s": [round(now_s - ended_s) for ended_s, _, _, _ in shown],
            "hit_ratio": [ratio for _, ratio, _, _ in shown],
            "used": [used for _, _, _, used in shown],
        }
        for column, name in enumerate(RATES):
            out[name] = [round(rates[column] * chunk_nbytes) for _, _, rates, _ in shown]
        return out


def _counters(stat: Stat) -> dict[str, int]:
    return {name: int(stat.get(name, 0)) for name in COUNTERS}
