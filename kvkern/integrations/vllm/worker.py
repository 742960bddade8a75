"""Worker side: copies between vLLM's canonical KV pages and this rank's parts of the slots."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ...transfer.base import Copier, Job
from . import shim
from .transfer_metadata import SlotSpec, batches


class KvkernWorker(shim.OffloadingWorker):
    """Runs jobs on the transfer's threads. A load that does not verify is reported failed, never raised."""

    def __init__(self, transfer: Copier, blocks_per_chunk: int, on_close: Callable[[], None]) -> None:
        self._transfer = transfer
        self._blocks_per_chunk = blocks_per_chunk
        self._on_close = on_close
        self._jobs: dict[int, Job] = {}
        self._loads: set[int] = set()
        self._failed: set[int] = set()

    def submit_store(self, job_id: int, src_spec: shim.GPULoadStoreSpec, dst_spec: shim.LoadStoreSpec) -> bool:
        """Start engine blocks -> slots. Chunks whose copy fails stay unpublished."""
        assert isinstance(dst_spec, SlotSpec)
        paired = batches(src_spec, dst_spec, self._blocks_per_chunk, whole=True)
        self._jobs[job_id] = self._transfer.store(paired or ())
        return True

    def submit_load(self, job_id: int, src_spec: shim.LoadStoreSpec, dst_spec: shim.GPULoadStoreSpec) -> bool:
        """Start slots -> engine blocks."""
        assert isinstance(src_spec, SlotSpec)
        paired = batches(dst_spec, src_spec, self._blocks_per_chunk, whole=False)
        slots = np.concatenate([group.slots for group in src_spec.groups])
        self._jobs[job_id] = self._transfer.reject(slots) if paired is None else self._transfer.load(paired)
        self._loads.add(job_id)
        return True

    def get_finished(self) -> list[shim.TransferResult]:
        """Jobs that ended since the last call. `success` is always True: stock vLLM asserts on it; see `take_failed`."""
        results = []
        for job_id in [job_id for job_id, job in self._jobs.items() if job.done()]:
            job = self._jobs.pop(job_id)
            if job.error is not None:
                shim.logger.error("kvkern: transfer job %d failed: %s", job_id, job.error)
            if job_id in self._loads:
                self._loads.discard(job_id)
                if not job.ok.all():
                    self._failed.add(job_id)
            results.append(shim.TransferResult(job_id, True, job.nbytes, job.seconds))
        return results

    def take_failed(self) -> set[int]:
        """Load jobs among the finished whose blocks hold nothing usable, each reported once."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_loads(self, seconds: float) -> None:
        """Block until the loads under way have ended, at most `seconds`. The copy threads get the CPU meanwhile."""
        deadline = time.perf_counter() + seconds
        for job_id in self._loads & self._jobs.keys():
            self._jobs[job_id].wait(max(0.0, deadline - time.perf_counter()))

    def wait(self, job_ids: set[int]) -> None:
        """Block until these jobs have ended; unknown ids have ended long ago."""
        for job_id in job_ids:
            if job_id in self._jobs:
                self._jobs[job_id].wait()

    def shutdown(self) -> None:
        """End the threads and let the arena go."""
        self._transfer.close()
        self._on_close()
