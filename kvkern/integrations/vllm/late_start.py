"""An engine that started without a daemon gets its copier when there is one: a worker's side.

A thread waits for the arena, builds the copier there, self-test and registration included, and hands it to the worker. Until
then the worker copies nothing: stores are not published, loads are computed. The scheduler does not ask for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ...arena.file import Arena
from ...errors import KvkernError
from ...node.client.cache_client import NodeClient
from ...transfer.base import ChunkBatch, Copier, Job
from . import shim

LOOK_S = 0.5  # between two looks whether the worker has ended


class NoCopier:
    """Takes the place of a copier where there is no arena. Every job has failed."""

    def store(self, batches: Sequence[ChunkBatch]) -> Job:
        """Write nothing, so that the slots are never published."""
        return _failed(sum(len(batch.slots) for batch in batches))

    def load(self, batches: Sequence[ChunkBatch]) -> Job:
        """Read nothing, so that the request is computed."""
        return _failed(sum(len(batch.slots) for batch in batches))

    def reject(self, slots: npt.NDArray[np.int64]) -> Job:
        """Mark nothing."""
        return _failed(len(slots))

    def close(self) -> None:
        """Nothing to end."""


def _failed(chunks: int) -> Job:
    job = Job(0, np.zeros(max(1, chunks), dtype=np.bool_))  # never empty: `all()` of an empty array is True
    job.finished = job.started
    return job


class LateStart:
    """The thread. Call `stop` before the client is closed."""

    def __init__(
        self,
        client: NodeClient,
        build: Callable[[Arena], Copier],  # called in the thread
        hand_over: Callable[[Copier, Arena], None],  # called in the thread
    ) -> None:
        self._client, self._build, self._hand_over = client, build, hand_over
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._held = self._building = False
        self._thread = threading.Thread(target=self._run, name="kvkern-late-start", daemon=True)

    def go_on(self) -> None:
        """Start the thread, or end a `hold`. Call it in every step."""
        if self._held:
            with self._changed:
                self._held = False
                self._changed.notify_all()
        if self._thread.ident is None:
            self._thread.start()

    def hold(self) -> None:
        """Build nothing until the next step. Returns when no copier is being built."""
        with self._changed:
            self._held = True
            self._changed.wait_for(lambda: not self._building)

    def stop(self) -> None:
        """End the thread. Returns when it touches the arena no more."""
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        arena = None
        while arena is None:
            if self._stopped.is_set():
                return
            arena = self._client.wait_for_arena(LOOK_S)
        with self._changed:
            self._changed.wait_for(lambda: self._stopped.is_set() or not self._held)
            if self._stopped.is_set():
                return
            self._building = True
        try:
            self._build_on(arena)
        finally:
            with self._changed:
                self._building = False
                self._changed.notify_all()

    def _build_on(self, arena: Arena) -> None:
        try:
            copier = self._build(arena)
        except (KvkernError, RuntimeError, OSError, MemoryError) as error:  # also no memory on the GPU
            shim.logger.error(
                "kvkern: the daemon is there, but this worker cannot use it: %(error)s. The engine goes on without a cache; "
                "restart it when that is mended",
                {"event": "late_start_failed", "error": error if isinstance(error, KvkernError) else repr(error)},
            )
            return
        if self._stopped.is_set():
            copier.close()
            return
        self._hand_over(copier, arena)
        shim.logger.info("kvkern: this worker uses the daemon's cache from now on", {"event": "late_start"})
