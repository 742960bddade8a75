"""What this vLLM has that another known release lacks. Found in the classes themselves, never in version strings.

kvkern's methods for a feature exist always. vLLM without the feature does not call them.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any


@dataclass(frozen=True, slots=True)
class Features:
    """The features that kvkern asks for. Comments name the first release that has each."""

    load_limit: bool  # 0.31: a request's `max_load_tokens`
    hit_sources: bool  # 0.32: metrics say which tier served a hit
    sync_loads: bool  # 0.33: small loads within a step, which vLLM takes for verified
    reset_fence: bool  # 0.33: tells the manager when no worker touches memory from before a reset any more
    sleep_hooks: bool  # 0.33: tells workers before it frees the KV cache's memory, and when it is back
    window_sizes: bool  # 0.33: says of each KV group how far its attention reaches back


def find_features(
    connector: Any,  # vLLM's OffloadingConnector
    manager: Any,  # OffloadingManager
    worker: Any,  # OffloadingWorker
    group: Any,  # OffloadingGroupConfig
    request_state: Any,  # the scheduler side's RequestOffloadState
) -> Features:
    """Look for each feature in vLLM's classes."""
    return Features(
        load_limit=_has_field(request_state, "max_load_tokens"),
        hit_sources=hasattr(manager, "get_load_source"),
        sync_loads="expedited" in signature(worker.submit_load).parameters,
        reset_fence=hasattr(manager, "on_reset_flushed"),
        sleep_hooks=hasattr(connector, "unregister_kv_caches"),
        window_sizes=_has_field(group, "sliding_window_size_in_chunks"),
    )


def _has_field(dataclass_type: Any, name: str) -> bool:
    return name in dataclass_type.__dataclass_fields__
