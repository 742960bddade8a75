"""Names how an engine packs its pages: the attention backend of every layer and, on CPUs, the instruction set.

kvkern copies a page as opaque bytes. Which backend a layer gets is often decided by vLLM, by the machine that it runs on: an
engine with AMX packs keys otherwise than one without. Only workers know what was decided. They report it to the scheduler at
start, through vLLM's handshake. MultiConnector lets only one connector use it, which may need it more. There, and on CPUs, the
scheduler names the packing of a CPU itself, and an engine on another device shares with no other.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from blake3 import blake3

from ...errors import UnsupportedError
from . import shim
from .rank_arenas import ArenaId


@dataclass
class PackingReport(shim.KVConnectorHandshakeMetadata):
    """What one worker reports."""

    packing: str
    rank: int = -1
    arena: ArenaId = ()  # empty: this worker has no copier yet, because no daemon answered at its start


def packing_of_worker(vllm_config: shim.VllmConfig, kv_cache_config: shim.KVCacheConfig) -> str:
    """Return the name of this process's packing. Call in a worker whose layers exist."""
    if (packing := _packing_of_cpu(vllm_config, kv_cache_config)) is not None:
        return packing
    return _name(vllm_config, sorted(f"{layer}={kind}" for layer, kind in shim.attention_backends(vllm_config).items()))


def packing_of_scheduler(vllm_config: shim.VllmConfig, kv_cache_config: shim.KVCacheConfig) -> str:
    """Return the name where no worker has reported any: on CPUs the true one, elsewhere one that no other engine has."""
    if (packing := _packing_of_cpu(vllm_config, kv_cache_config)) is not None:
        return packing
    shim.logger.warning(
        "kvkern: no worker has reported its attention backends, so this engine shares its KV with no other engine. To share, "
        "run KvkernConnector without MultiConnector."
    )
    return f"private:{uuid.uuid4().hex}"


def agreed_packing(reports: Iterable[object]) -> str | None:
    """Return the packing that all workers report. None: they report none. Raises UnsupportedError if they differ."""
    found = {report.packing for report in reports if isinstance(report, PackingReport)}
    if len(found) > 1:
        raise UnsupportedError(
            f"The workers of this engine pack their KV pages in {len(found)} ways, and a slot holds the parts of all. Run them "
            f"on equal devices, or run the engine without kvkern."
        )
    return next(iter(found), None)


def reported_arenas(reports: Iterable[object]) -> dict[int, ArenaId]:
    """Return rank -> arena, of the workers that report."""
    return {report.rank: report.arena for report in reports if isinstance(report, PackingReport)}


def _packing_of_cpu(vllm_config: shim.VllmConfig, kv_cache_config: shim.KVCacheConfig) -> str | None:
    if vllm_config.device_config.device_type != "cpu":
        return None
    sets = shim.cpu_instruction_sets(vllm_config, kv_cache_config)
    return _name(vllm_config, [str(vllm_config.attention_config.backend), *sorted(sets)])


def _name(vllm_config: shim.VllmConfig, parts: list[str]) -> str:
    parts = [
        vllm_config.device_config.device_type,
        *parts,
        *(f"{k}={v}" for k, v in shim.packing_environment().items()),
    ]
    return blake3("\n".join(parts).encode()).hexdigest()[:16]
