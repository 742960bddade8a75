"""What a worker reports after a step, beyond what vLLM's own connector reports: adapters, arenas, each transfer by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import shim
from .rank_arenas import ArenaId

Transfer = tuple[bool, int, float]  # is it a load, bytes, seconds


@dataclass
class WorkerReport(shim.OffloadingWorkerMetadata):
    """See OffloadingWorkerMetadata."""

    adapters: dict[int, str | None] = field(
        default_factory=dict
    )  # loaded since the last report: number -> digest; None: not known
    transfers: list[Transfer] = field(default_factory=list)  # ended since the last report
    arenas: dict[int, ArenaId] = field(default_factory=dict)  # rank -> arena, if it is new since the last report

    def aggregate(self, other: Any) -> WorkerReport:
        """Merge two workers' reports. An adapter whose content differs between workers is not known."""
        merged = super().aggregate(other)
        adapters, others = dict(self.adapters), getattr(other, "adapters", {})
        for adapter_id, digest in others.items():
            adapters[adapter_id] = digest if adapters.get(adapter_id, digest) == digest else None
        transfers = [*self.transfers, *getattr(other, "transfers", ())]
        arenas = self.arenas | getattr(other, "arenas", {})
        return WorkerReport(merged.completed_jobs, merged.transfer_stats, adapters, transfers, arenas)
