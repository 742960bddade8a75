"""Worker side: copies between vLLM's canonical KV pages and this rank's parts of the slots. Reports failures, raises none."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ...arena.file import Arena
from ...errors import UnsupportedError
from ...node.client.cache_client import NodeClient
from ...transfer.base import Copier, Job
from . import shim
from .adapter_loads import AdapterLoads
from .late_start import LateStart, NoCopier
from .rank_arenas import ArenaId
from .transfer_metadata import SlotSpec, pair_blocks_with_slots
from .worker_report import Transfer

SYNC_LOADS = (
    "vLLM computes with the blocks of a synchronous load in the same step, and ignores that the load failed its checksum. "
    "Leave sync_load_budget_bytes out of kv_connector_extra_config, or set it to 0."
)


class KvkernWorker(shim.OffloadingWorker):
    """Runs jobs on the copier's threads. A load that does not verify is reported as failed and never raises."""

    def __init__(
        self, transfer: Copier | NoCopier, blocks_per_chunk: int, on_close: Callable[[], None], arena: ArenaId = ()
    ) -> None:
        self._transfer = transfer
        self._late: LateStart | None = None
        self.arena = arena  # its id; empty while there is no copier
        self._told_arena: ArenaId | None = None  # see take_arena
        self._blocks_per_chunk = blocks_per_chunk
        self._on_close = on_close
        self._jobs: dict[int, Job] = {}
        self._loads: set[int] = set()
        self._failed: set[int] = set()
        self._transfers: list[Transfer] = []
        self._refused: set[int] = set()  # loads under an adapter whose content is another one here
        self.adapters: AdapterLoads | None = None  # set if the engine serves LoRA

    @property
    def connected(self) -> bool:
        """Return True if the worker has a copier. Without one it copies nothing until `start_late` has brought it one."""
        return not isinstance(self._transfer, NoCopier)

    def start_late(self, client: NodeClient, build: Callable[[Arena], Copier]) -> None:
        """Get a copier as soon as there has been a step and the client has an arena, in a thread of its own."""
        self._late = LateStart(client, build, self._take_copier)

    def begin_step(self) -> None:
        """Let a late start begin or go on: vLLM captures no graph, and the memory of the KV cache is there."""
        if self._late is not None:
            self._late.go_on()

    def hold_late_start(self) -> None:
        """Return when no copier is being built. None will be before the next step."""
        if self._late is not None:
            self._late.hold()

    def _take_copier(self, transfer: Copier, arena: Arena) -> None:
        self._transfer = transfer
        self.arena = arena.file_id()

    def take_arena(self) -> ArenaId | None:
        """Return the arena's id, which is empty while there is no copier. None: it is what the last call has returned."""
        arena = self.arena
        if arena == self._told_arena:
            return None
        self._told_arena = arena
        return arena

    def submit_store(self, job_id: int, src_spec: shim.GPULoadStoreSpec, dst_spec: shim.LoadStoreSpec) -> bool:
        """Start to copy engine blocks -> slots. Chunks whose copy fails stay unpublished."""
        assert isinstance(dst_spec, SlotSpec)
        use, paired = dst_spec.adapter, None
        if use is None or (self.adapters is not None and self.adapters.holds(use)):
            paired = pair_blocks_with_slots(src_spec, dst_spec, self._blocks_per_chunk, whole=True)
        self._jobs[job_id] = self._transfer.store(paired or ())
        return True

    def submit_load(
        self, job_id: int, src_spec: shim.LoadStoreSpec, dst_spec: shim.GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """Start to copy slots -> engine blocks. Raises UnsupportedError if the step would not wait for the checksums."""
        if expedited:
            raise UnsupportedError(f"Load job {job_id} is synchronous. {SYNC_LOADS}")
        assert isinstance(src_spec, SlotSpec)
        if (use := src_spec.adapter) is not None and (self.adapters is None or not self.adapters.admits(use)):
            self._refused.add(job_id)
        paired = pair_blocks_with_slots(dst_spec, src_spec, self._blocks_per_chunk, whole=False)
        slots = np.concatenate([group.slots for group in src_spec.groups])
        if job_id in self._refused:
            self._jobs[job_id] = self._transfer.load(())
        else:
            self._jobs[job_id] = self._transfer.reject(slots) if paired is None else self._transfer.load(paired)
        self._loads.add(job_id)
        return True

    def get_finished(self) -> list[shim.TransferResult]:
        """Return jobs that ended since the last call. `success` is always True, because stock vLLM asserts it.

        `take_failed_loads` returns the loads that failed.
        """
        results = []
        for job_id in [job_id for job_id, job in self._jobs.items() if job.done()]:
            job = self._jobs.pop(job_id)
            if job.error is not None:
                shim.logger.error(
                    "kvkern: transfer job %(job)d failed: %(error)s. A load is computed instead, a store is dropped. Please "
                    "report this as a bug.",
                    {"event": "transfer_failed", "job": job_id, "error": job.error},
                )
            if job.nbytes:
                self._transfers.append((job_id in self._loads, job.nbytes, job.seconds))
            if job_id in self._loads:
                self._loads.discard(job_id)
                if job_id in self._refused or not job.ok.all():
                    self._refused.discard(job_id)
                    self._failed.add(job_id)
            results.append(shim.TransferResult(job_id, True, job.nbytes, job.seconds))
        return results

    def take_failed_loads(self) -> set[int]:
        """Return the finished load jobs whose blocks hold nothing usable. Each is returned once."""
        failed, self._failed = self._failed, set()
        return failed

    def take_transfers(self) -> list[Transfer]:
        """Return the transfers that have ended. Each is returned once."""
        ended, self._transfers = self._transfers, []
        return ended

    def wait_for_loads(self, seconds: float) -> None:
        """Block until the running loads have ended, for at most `seconds`. Meanwhile the copy threads get the CPU."""
        deadline = time.perf_counter() + seconds
        for job_id in self._loads & self._jobs.keys():
            self._jobs[job_id].wait(max(0.0, deadline - time.perf_counter()))

    def wait(self, job_ids: set[int]) -> None:
        """Block until these jobs have ended. An unknown id belongs to a job that has ended already."""
        for job_id in job_ids:
            if job_id in self._jobs:
                self._jobs[job_id].wait()

    def wait_for_all(self) -> None:
        """Block until every job has ended. Their results stay to be fetched."""
        self.wait(set(self._jobs))

    def shutdown(self) -> None:
        """End the copy threads and release the arena."""
        if self._late is not None:
            self._late.stop()
        self._transfer.close()
        self._on_close()
