"""Forks vLLM's workers from one process that has imported vLLM. A start then costs 2 s of CPU time instead of 15.

Tests of `vllm serve` start their workers as vLLM does.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from typing import Any

# Not numba: vLLM looks for kernels in every module that was imported before a worker starts, and fails at llvmlite's.
PRELOADED = ["vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner"]


class ForkedWorkers:
    """Stands for a multiprocessing context. Its processes get the environment and the output that the test has by then."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def Process(
        self,
        *,
        target: Callable[..., object],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Return a process that has not started."""
        output = reduction.DupFd(1), reduction.DupFd(2)
        started = (dict(os.environ), output, target, args, dict(kwargs or {}))
        return self._context.Process(target=_run, args=started, **more)


def _run(
    environment: dict[str, str],
    output: tuple[Any, Any],
    target: Callable[..., object],
    args: Any,
    kwargs: dict[str, Any],
) -> None:
    for number, handle in enumerate(output, 1):
        taken = handle.detach()
        os.dup2(taken, number)
        os.close(taken)
    os.environ.clear()
    os.environ.update(environment)
    target(*args, **kwargs)
