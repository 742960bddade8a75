"""The composition root: the only module that knows which classes make up a cache.

Constructors in other modules only store their arguments.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from .arena.file import Arena, ArenaSpec, create_or_attach
from .arena.folder import arena_folder, arena_prefix, sweep_stale
from .arena.room import Progress
from .arena.slots import SlotGeometry
from .cache.manager import Cache
from .config import DEFAULT_POLICY, Config, RemoteConfig, format_nbytes, user_cache_dir
from .errors import LayoutError, UnsupportedError
from .metrics import CacheCounters, CacheObserver, Meter
from .policy import policy_factory
from .policy.namespace_shares import NamespaceShares
from .policy.persist_modes import persist_mode
from .tiers.dram import DramTier

if TYPE_CHECKING:  # a daemon assembles a cache without torch
    from .cache.hbm_over_dram import HbmCache
    from .kernels.paged_tensors import PagedTensors
    from .policy.grit_model import GritModel
    from .remote.store_thread import StoreThread
    from .remote.tier import RemoteTier
    from .transfer.base import Copier
    from .transfer.gpu.cuda_device import CudaDevice

logger = logging.getLogger("kvkern")


def open_arena(
    config: Config,
    geometry: SlotGeometry,
    name: str,  # processes that give the same name share the arena
    expected: int,  # how many processes will attach; the last one unlinks the file's name
    identity: bytes = bytes(32),
    progress: Progress = logger.info,
    seat: int | None = None,  # this process's place among the expected ones, in [0, expected); None: they take no seats
) -> Arena:
    """Create this user's arena `name`, or attach to it. Removes the arenas that crashed processes left behind."""
    prefix, folder = arena_prefix(os.getuid()), arena_folder(config.arena_dir)
    for directory in {folder, config.arena_dir}:  # earlier versions put arenas into a folder that all users share
        for path in sweep_stale(directory, prefix):
            progress(f"arena: removed {path}, because no process has it open")
    spec = ArenaSpec.for_capacity(geometry, config.capacity_nbytes, identity)
    return create_or_attach(
        spec, folder / f"{prefix}{name}", expected, config.prefault, progress, seat, config.dump_arena
    )


def build_cache(
    arena: Arena,
    shares: bool = False,
    policy: str = DEFAULT_POLICY,
    model: GritModel | None = None,  # what the policy has learned, see policy.make_model; None: nothing yet
    counters: CacheCounters | None = None,  # of an earlier cache that this one replaces; None: all start at 0
    observer: CacheObserver | None = None,
) -> Cache:
    """Build the manager of the arena. An arena has one manager, and only the manager allocates, evicts and publishes.

    With `shares` every namespace has its own policy, and the largest namespace gives up slots first. Raises ConfigError
    for an unknown policy.
    """
    make = policy_factory(policy, arena.spec.num_slots, model)
    return Cache(DramTier(arena, NamespaceShares(make) if shares else make()), counters=counters, observer=observer)


def attach_remote_tier(
    cache: Cache,
    arena: Arena,
    config: RemoteConfig | None,
    policy: str,
    opened: StoreThread | None = None,
    meter: Meter | None = None,  # measures every call to the store
) -> RemoteTier | None:
    """Put a remote store behind the cache. Returns None if `config` is None: then there is no remote store.

    Opens the store, or takes over `opened`, a store that is open already. The tier owns the store from then on. Raises
    ConfigError for a mistake of the user, and closes the store then.
    """
    if config is None:
        return None
    from .remote.observed_store import observed_store
    from .remote.stores.registry import make_store
    from .remote.stores.url import RemoteUrl
    from .remote.tier import RemoteTier

    url = RemoteUrl.parse(config.url)
    mode = persist_mode(config.persist, policy)
    store = make_store(url) if opened is None else opened.store
    tier = RemoteTier(
        store if meter is None else observed_store(store, meter),
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
    cache.attach_remote(tier, tier.outbox, tier.spare)
    return tier


def open_remote_store(config: RemoteConfig) -> StoreThread | None:
    """Open the store for `attach_remote_tier`, before there is an arena.

    Returns None if the store does not answer. The tier then opens it when it is needed. Raises ConfigError for a mistake
    of the user.
    """
    from .remote.store_thread import StoreThread
    from .remote.stores.registry import make_store
    from .remote.stores.url import RemoteUrl

    url = RemoteUrl.parse(config.url)
    opened = StoreThread(make_store(url))
    opened.open(config.timeout_s)
    if not opened.open_failure:
        return opened
    logger.warning(
        "kvkern: the remote store %(remote)s does not answer (%(error)s); until it answers, every lookup in it is a miss. "
        "Check the store and the URL in `remote`",
        {"event": "remote_not_open", "remote": url, "error": opened.open_failure},
    )
    opened.close()
    return None


def add_hbm_tier(
    config: Config, dram: Cache, arena: Arena, copier: Copier, group: PagedTensors, blocks_per_chunk: int
) -> tuple[HbmCache, Copier]:
    """Put a tier in HBM above the DRAM cache. Returns a cache over both tiers and a copier for both.

    The copier owns `copier`: its close ends the cache first, then `copier`. Raises ConfigError if no chunk fits, and
    UnsupportedError if the GPU has too little free memory.
    """
    import numpy as np

    from .cache.hbm_over_dram import HbmCache, HbmManager
    from .tiers.hbm import HbmSlots, HbmTier, HostSlotMover, SlotMover, count_slots
    from .transfer.gpu.device import DeviceError
    from .transfer.gpu.hbm_over_dram_copier import DmaSlotMover, HbmOverDramCopier, device_copier, device_slots
    from .transfer.host import HostCopier

    geometry = arena.spec.geometry
    count = count_slots(geometry, config.hbm_nbytes)
    mover: SlotMover
    above: Copier
    if group.device.startswith("cuda"):
        try:
            device = _cuda_device(group.device)
            slots = device_slots(geometry, count, device)
            mover, above = DmaSlotMover(slots, arena, device), device_copier(group, slots, blocks_per_chunk, device)
        except DeviceError as error:
            wanted = format_nbytes(config.hbm_nbytes)
            raise UnsupportedError(
                f"hbm: kvkern cannot keep {wanted} of chunks on {group.device}: {error}; lower `hbm`, or leave it out"
            ) from error
    else:
        slots = HbmSlots(geometry, np.zeros((count, geometry.part_stride), dtype=np.uint8))
        mover, above = HostSlotMover(slots, arena), HostCopier([group], slots, 0, blocks_per_chunk, config.copy_threads)
    cache = HbmCache(HbmManager(HbmTier(slots)), slots, dram, arena, mover)
    return cache, HbmOverDramCopier(copier, above, cache.first_slot, cache.close)


def _cuda_device(name: str) -> CudaDevice:
    """Open the GPU of that name. Call it in the engine's thread."""
    import torch

    from .transfer.gpu.cuda_device import CudaDevice

    return CudaDevice(torch.device(name))


def choose_device(name: str) -> None:
    """Make a GPU the present one of the calling thread. Does nothing for a CPU."""
    if name.startswith("cuda"):
        import torch

        torch.cuda.set_device(torch.device(name))


def build_copier(
    config: Config, arena: Arena, groups: Sequence[PagedTensors], rank: int, blocks_per_chunk: int
) -> Copier:
    """Build the copier of one rank and prove it on the rank's tensors. Raises LayoutError if a layout does not round-trip.

    If the tensors are on a GPU, call it in the engine's thread. It then allocates staging memory on the GPU and registers
    the arena. It raises ArenaError or UnsupportedError if the host does not allow that.
    """
    devices = {group.device for group in groups}
    if len(devices) != 1:
        raise LayoutError(
            f"the KV groups' tensors are on {len(devices)} devices: {', '.join(sorted(devices))}; "
            f"give each rank tensors of one device"
        )
    device = devices.pop()
    if device.startswith("cuda"):
        transfer = _build_gpu_copier(device, arena, groups, rank, blocks_per_chunk)
    else:
        from .transfer.host import HostCopier

        transfer = HostCopier(groups, arena, rank, blocks_per_chunk, config.copy_threads)
    try:
        transfer.self_test()
    except BaseException:
        transfer.close()
        raise
    return transfer


def _build_gpu_copier(
    name: str, arena: Arena, groups: Sequence[PagedTensors], rank: int, blocks_per_chunk: int
) -> Copier:
    from .transfer.gpu.calibrate import load_or_calibrate
    from .transfer.gpu.calibration_file import DeviceId
    from .transfer.gpu.copier import GpuCopier
    from .transfer.gpu.device import DeviceError
    from .transfer.gpu.link_table import Abilities, HostLink
    from .transfer.gpu.numa import process_nodes
    from .transfer.gpu.planner import choose_method
    from .transfer.gpu.stopwatch import Stopwatch

    logger.warning(
        "kvkern: the KV cache is on %(device)s. This path was tested without a GPU and has not run on one yet. Compare answers "
        "with and without kvkern before you rely on it, see docs/gpu.md", {"event": "gpu_untested", "device": name},
    )  # fmt: skip
    try:
        device = _cuda_device(name)
        info = device.info
        unseen = DeviceId(device.name, "unknown", HostLink(0, 0), cpu_nodes=process_nodes())
        identity = unseen if info is None else DeviceId.for_this_process(info)
        able = Abilities(device.batch_api, device.host_pointers)
        watch = partial(Stopwatch, device, able.batch_api, able.host_pointers)
        table = load_or_calibrate(watch, identity, able, user_cache_dir())
        return GpuCopier(
            groups, arena, rank, blocks_per_chunk, device, partial(choose_method, table), progress=logger.info
        )
    except DeviceError as error:
        raise UnsupportedError(f"kvkern cannot copy to and from {name}: {error}; see docs/gpu.md") from error
