"""The composition root: the only place that knows which classes make up a cache. Constructors elsewhere only store."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from .arena import Arena, ArenaSpec, Progress, arena_prefix, create_or_attach, sweep_stale
from .cache import Cache
from .config import DEFAULT_POLICY, Config, RemoteConfig, format_nbytes, user_cache_dir
from .errors import LayoutError, UnsupportedError
from .policy import policy_maker
from .policy.persist import persist_mode
from .policy.shares import Shares
from .slots import SlotGeometry
from .tiers.dram import DramTier

if TYPE_CHECKING:  # a daemon assembles a cache without torch
    from .gpu.cuda import CudaDevice
    from .kernels.paged_copy import PagedTensors
    from .policy.grit_model import GritModel
    from .remote.opened import Opened
    from .remote.tier import RemoteTier
    from .stacked import HbmCache
    from .transfer import Copier

logger = logging.getLogger("kvkern")


def open_arena(
    config: Config,
    geometry: SlotGeometry,
    name: str,  # processes that give the same name share the arena
    expected: int,  # how many will attach; the last one unlinks the file's name
    identity: bytes = bytes(32),
    progress: Progress = logger.info,
) -> Arena:
    """Create or attach to the arena `name` of this user. Sweeps arenas that crashed processes left behind."""
    prefix = arena_prefix(os.getuid())
    for path in sweep_stale(config.arena_dir, prefix):
        progress(f"arena: removed {path}, which no process used any more")
    spec = ArenaSpec.for_capacity(geometry, config.capacity_nbytes, identity)
    return create_or_attach(spec, config.arena_dir / f"{prefix}{name}", expected, config.prefault, progress)


def build_cache(
    arena: Arena,
    shares: bool = False,
    policy: str = DEFAULT_POLICY,
    model: GritModel | None = None,  # what the policy has learned, see policy.make_model; None: nothing yet
) -> Cache:
    """A manager over the arena. One per arena: it alone allocates, evicts and publishes.

    With `shares` every namespace has a policy of its own, and the largest gives way first. Raises ConfigError for a
    policy that nobody knows.
    """
    make = policy_maker(policy, arena.spec.num_slots, model)
    return Cache(DramTier(arena, Shares(make) if shares else make()))


def back_with_remote(
    cache: Cache, arena: Arena, config: RemoteConfig | None, policy: str, opened: Opened | None = None
) -> RemoteTier | None:
    """Put a remote store behind the cache, and open it, unless it is given `opened`: it is the tier's from then on.

    Raises ConfigError for what the user has to mend; the store is closed then.
    """
    if config is None:
        return None
    from .remote.base import RemoteUrl, make_store
    from .remote.tier import RemoteTier

    url = RemoteUrl.parse(config.url)
    mode = persist_mode(config.persist, policy)
    tier = RemoteTier(
        make_store(url) if opened is None else opened.store,
        str(url),
        arena,
        cache,
        cache.counters,
        cache.faults,
        mode,
        config.queue_nbytes,
        config.timeout_s,
        opened,
    )
    tier.start()
    cache.back(tier, tier.outbox, tier.spare)
    return tier


def open_remote(config: RemoteConfig) -> Opened | None:
    """The store, for `back_with_remote`, before there is an arena. None: it does not answer, and is opened when it is needed.

    Raises ConfigError for what the user has to mend.
    """
    from .remote.base import RemoteUrl, make_store
    from .remote.opened import Opened

    url = RemoteUrl.parse(config.url)
    opened = Opened(make_store(url))
    opened.open(config.timeout_s)
    if not opened.failure:
        return opened
    logger.warning(
        "kvkern: remote %s does not answer (%s); until it does everything there is a miss", url, opened.failure
    )
    opened.close()
    return None


def put_hbm_above(
    config: Config, dram: Cache, arena: Arena, copier: Copier, group: PagedTensors, blocks_per_chunk: int
) -> tuple[HbmCache, Copier]:
    """(a cache over HBM and `dram`, a copier for both, which closes `copier` with it and before that the cache).

    Raises ConfigError if no chunk fits, UnsupportedError if the GPU has no room.
    """
    import numpy as np

    from .gpu.device import DeviceError
    from .gpu.hbm import DmaRows, StackedCopier, device_copier, device_slots
    from .stacked import HbmCache, HbmManager
    from .tiers.hbm import HbmSlots, HbmTier, HostRows, Rows, count_slots
    from .transfer import Transfer

    geometry = arena.spec.geometry
    count = count_slots(geometry, config.hbm_nbytes)
    rows: Rows
    above: Copier
    if group.device.startswith("cuda"):
        try:
            device = _cuda(group.device)
            slots = device_slots(geometry, count, device)
            rows, above = DmaRows(slots, arena, device), device_copier(group, slots, blocks_per_chunk, device)
        except DeviceError as error:
            wanted = format_nbytes(config.hbm_nbytes)
            raise UnsupportedError(f"hbm: kvkern cannot keep {wanted} of chunks on {group.device}: {error}") from error
    else:
        slots = HbmSlots(geometry, np.zeros((count, geometry.part_stride), dtype=np.uint8))
        rows, above = HostRows(slots, arena), Transfer([group], slots, 0, blocks_per_chunk, config.copy_threads)
    cache = HbmCache(HbmManager(HbmTier(slots)), slots, dram, arena, rows)
    return cache, StackedCopier(copier, above, cache.first_slot, cache.close)


def _cuda(name: str) -> CudaDevice:
    """The GPU of that name, made in the engine's thread."""
    import torch

    from .gpu.cuda import CudaDevice

    return CudaDevice(torch.device(name))


def build_transfer(
    config: Config, arena: Arena, groups: Sequence[PagedTensors], rank: int, blocks_per_chunk: int
) -> Copier:
    """The copier of one rank, proven on its tensors. Raises LayoutError if a layout does not round-trip.

    Of tensors on a GPU: call it in the engine's thread. Takes staging memory there and registers the arena; raises
    ArenaError or UnsupportedError where the host does not give that.
    """
    devices = {group.device for group in groups}
    if len(devices) != 1:
        raise LayoutError(f"the groups' tensors are on {', '.join(sorted(devices))}; one rank has one device")
    device = devices.pop()
    if device.startswith("cuda"):
        transfer = _gpu_transfer(device, arena, groups, rank, blocks_per_chunk)
    else:
        from .transfer import Transfer

        transfer = Transfer(groups, arena, rank, blocks_per_chunk, config.copy_threads)
    try:
        transfer.self_test()
    except BaseException:
        transfer.close()
        raise
    return transfer


def _gpu_transfer(name: str, arena: Arena, groups: Sequence[PagedTensors], rank: int, blocks_per_chunk: int) -> Copier:
    from .gpu.calibrate import calibrated
    from .gpu.device import DeviceError
    from .gpu.numa import process_nodes
    from .gpu.planner import choose
    from .gpu.saved import DeviceId
    from .gpu.stopwatch import Stopwatch
    from .gpu.table import Abilities, Link
    from .gpu.transfer import GpuTransfer

    logger.warning(
        "kvkern: the KV cache is on %s. This path is proven without a GPU and has not run on one yet: compare answers with and "
        "without kvkern before you rely on it, see docs/gpu.md", name,
    )  # fmt: skip
    try:
        device = _cuda(name)
        info = device.info
        unseen = DeviceId(device.name, "unknown", Link(0, 0), cpu_nodes=process_nodes())
        identity = unseen if info is None else DeviceId.here(info)
        able = Abilities(device.batch_api, device.host_pointers)
        watch = partial(Stopwatch, device, able.batch_api, able.host_pointers)
        table = calibrated(watch, identity, able, user_cache_dir())
        return GpuTransfer(groups, arena, rank, blocks_per_chunk, device, partial(choose, table), progress=logger.info)
    except DeviceError as error:
        raise UnsupportedError(f"kvkern cannot copy to and from {name}: {error}") from error
