"""The API for any engine: match a prompt, load the hit into paged tensors by block table, store the computed chunks.

cache = kvkern.open_cache(layout, tensors, model="my-model", weights=revision, capacity="8GiB")
with cache.match(tokens) as hit:                       # longest cached prefix, pinned
    num_loaded = cache.load(hit, block_table)          # tokens that were verified and are now in the engine's blocks
...                                                    # the engine computes tokens[num_loaded:]
cache.store(tokens, block_table, match=hit)            # whole chunks that are not cached yet
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .arena.file import Arena
from .arena.slots import SlotGeometry
from .assemble import add_hbm_tier, attach_remote_tier, build_cache, build_copier, open_arena
from .cache.base import ChunkCache
from .cache.manager import Cache
from .config import Config
from .errors import ConfigError, KvkernError, LayoutError
from .kernels.chunk_keys import Tokens, chunk_keys
from .kernels.layout import PagedLayout
from .kernels.paged_tensors import PagedTensors
from .keys import Namespace, split_keys
from .node.client.cache_client import NodeClient
from .policy.base import Use
from .tiers.base import ChunkShape, Lease
from .transfer.base import ChunkBatch, Copier, Job

if TYPE_CHECKING:
    import torch

STORE_WAIT_S = 1.0  # a store waits so long for the daemon's slots, then stores as many chunks as it has slots for
_requests = itertools.count(1)  # request numbers, unique in this process: several caches may share one manager
BlockTable = npt.NDArray[np.integer] | Sequence[int]


class Match:
    """A cached prefix of a prompt. Its chunks stay readable until `release` or the end of the `with` block."""

    def __init__(self, cache: ChunkCache, lease: Lease, chunk_tokens: int, request: int) -> None:
        self._cache = cache
        self._released = False
        self.lease = lease
        self.request = request  # number of the request, which `store` reads; valid after the release too
        self.num_tokens = len(lease.slots) * chunk_tokens

    def release(self) -> None:
        """Unpin the chunks, so that they can be evicted. Safe to call twice."""
        if not self._released:
            self._released = True
            self._cache.release(self.lease)

    def __enter__(self) -> Match:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        if not self._released:
            self._cache.release_later(self.lease)

    @property
    def released(self) -> bool:
        """Whether `release` was called. Then the chunks may be evicted."""
        return self._released


class PagedCache:
    """A cache for one engine's paged tensors. Thread-safe if concurrent calls use distinct blocks."""

    def __init__(
        self, cache: ChunkCache, transfer: Copier, close: Callable[[], None], namespace: Namespace, shape: ChunkShape
    ) -> None:
        self._cache = cache
        self._transfer = transfer
        self._close = close
        self._shape = shape
        self.namespace = namespace
        self.chunk_tokens = namespace.chunk_tokens

    def keys(self, tokens: Tokens, extras: Mapping[int, bytes] | None = None) -> list[bytes]:
        """Return the chunk keys of a sequence. A partial last chunk has no key.

        `extras` maps a chunk's index to a 32-byte hash of what the tokens do not show, for example of its images.
        """
        return split_keys(chunk_keys(self._shape.namespace, tokens, self.chunk_tokens, extras))

    def match(self, tokens: Tokens, extras: Mapping[int, bytes] | None = None) -> Match:
        """Find and pin the longest cached prefix of `tokens`. Always returns a Match. Its `num_tokens` may be 0.

        An engine that needs the logits of the last token passes `tokens[:-1]`, or recomputes the last token after loading.
        """
        use = Use(request=next(_requests), namespace=self._shape.namespace)
        lease = self._cache.acquire(self.keys(tokens, extras), use=use)
        return Match(self._cache, lease, self.chunk_tokens, use.request)

    def load(self, match: Match, block_table: BlockTable, start: int = 0) -> int:
        """Copy the matched chunks into the blocks of `block_table` and verify them.

        Returns the length, in tokens from 0 on, of the prefix that is now valid in the blocks. Tokens [0, start) are in
        their blocks already and stay untouched. `start` is a multiple of the block size. If a chunk fails its checksum,
        the valid prefix ends before that chunk and the cache forgets the chunk. The blocks behind it hold no valid KV.
        """
        lease = match.lease
        if match.released:
            raise ConfigError(
                f"the match of {match.num_tokens} tokens was released, so its chunks may have been evicted; "
                f"call load before release, or call match again"
            )
        table = self._table_rows(block_table, len(lease.slots))
        if start % self._block_tokens or not 0 <= start <= match.num_tokens:
            raise ConfigError(
                f"start is {start}; it must be a multiple of the block size {self._block_tokens}, "
                f"from 0 to the {match.num_tokens} tokens of the match"
            )
        first = start // self.chunk_tokens
        table = table.copy()
        table.reshape(-1)[: start // self._block_tokens] = -1
        job = self._transfer.load([self._chunk_batch(table[first:], lease.keys[first:], lease.slots[first:], ())])
        self._wait_for_copies(job)
        good = int(job.ok.cumprod().sum())
        return start if good == 0 else (first + good) * self.chunk_tokens

    def store(
        self,
        tokens: Tokens,
        block_table: BlockTable,
        extras: Mapping[int, bytes] | None = None,
        start: int = 0,
        match: Match | None = None,  # of the same request, released or not; a request may store several times
    ) -> int:
        """Copy the whole chunks of `tokens[start:]` that are not cached yet. Returns how many chunks were published.

        The KV of every whole chunk must be in its blocks. The cache stores fewer chunks if all other slots are in use.
        With `match`, the match and the store count as one use of the sequence. Without it, the eviction policy counts two
        requests.
        """
        keys = self.keys(tokens, extras)
        table = self._table_rows(block_table, len(keys))
        if start < 0:
            raise ConfigError(f"start is {start}; it must be at least 0")
        use = Use(request=match.request if match is not None else next(_requests))
        reservation = self._cache.reserve(keys, keys[start // self.chunk_tokens :], self._shape, use)
        if not reservation.slots:
            return 0
        at = {key: i for i, key in enumerate(keys)}
        rows = table[[at[key] for key in reservation.keys]]
        batch = self._chunk_batch(rows, reservation.keys, reservation.slots, reservation.generations)
        try:
            self._wait_for_copies(self._transfer.store([batch]))
        finally:  # commit frees the slots that were not written
            stored = self._cache.commit(reservation)
        return stored

    def clear(self) -> int:
        """Forget all chunks of this model and salt, for example after a change of weights. Returns how many chunks.

        Chunks in a remote store stay there, and later matches load them again. If you have a remote store, open a new
        cache with other `weights` instead.
        """
        return self._cache.clear(self.namespace.root)

    def stats(self) -> dict[str, int | float]:
        """Return counters and usage. CacheCounters explains each counter."""
        return {**self._cache.counters.snapshot(), **self._cache.usage()}

    def close(self) -> None:
        """End the copy threads and unmap the arena. Call it when no other call is running."""
        self._transfer.close()
        self._close()

    def _wait_for_copies(self, job: Job) -> None:
        """Help with the copies, then wait for them. Bad input is raised; any other error counts as a miss."""
        try:
            with self._cache.faults.are_misses():
                job.run_unclaimed()
            job.wait()
        except BaseException:
            job.wait()  # after an interrupt too, the copies end before the lease or reservation does
            raise
        error = job.error
        if isinstance(error, KvkernError):
            raise error

    @property
    def _block_tokens(self) -> int:
        return self.chunk_tokens // self._transfer.blocks_per_chunk

    def _table_rows(self, block_table: BlockTable, chunks: int) -> npt.NDArray[np.int32]:
        """Return the table's first block ids as [chunks, blocks_per_chunk] int32. Raises ConfigError or LayoutError."""
        per_chunk = self._transfer.blocks_per_chunk
        table = np.asarray(block_table, dtype=np.int64).reshape(-1)
        if len(table) < chunks * per_chunk:
            raise ConfigError(
                f"block_table has {len(table)} blocks; {chunks} chunks need {chunks * per_chunk}; "
                f"pass the block ids of all whole chunks"
            )
        used = table[: chunks * per_chunk]
        num_blocks = self._transfer.num_blocks
        if used.size and not (0 <= int(used.min()) and int(used.max()) < num_blocks):
            bad = used[(used < 0) | (used >= num_blocks)][0]
            raise LayoutError(
                f"block id {bad} is outside [0, {num_blocks}), the blocks of the tensors given to open_cache; "
                f"check block_table"
            )
        return used.astype(np.int32).reshape(chunks, per_chunk)

    def _chunk_batch(
        self, rows: npt.NDArray[np.int32], keys: Sequence[bytes], slots: Sequence[int], generations: Sequence[int]
    ) -> ChunkBatch:
        return ChunkBatch(
            group=0,
            block_ids=np.ascontiguousarray(rows),
            slots=np.array(slots, dtype=np.int64),
            generations=np.array(generations, dtype=np.uint64),
            keys=np.frombuffer(b"".join(keys), dtype="V32"),
            namespace=self._shape.namespace,
        )


def _open_embedded(arena: Arena, config: Config) -> tuple[Cache, Callable[[], None]]:
    """Build a cache that only this process uses. Returns the cache and the function that closes cache and arena."""
    cache = build_cache(arena, policy=config.policy)

    def close() -> None:
        cache.close()
        arena.close()

    try:
        attach_remote_tier(cache, arena, config.remote_config, config.policy)
    except BaseException:
        arena.close()
        raise
    return cache, close


def open_cache(
    layout: PagedLayout,  # from kvkern.layout: flash_attention, split_kv, fused_kv, token_pool, mla, from_pages
    tensors: Sequence[torch.Tensor],  # the tensors the layout was made from, in the same order
    *,
    model: str,
    weights: str,  # a resolved revision, or kvkern.weights_fingerprint(path)
    blocks_per_chunk: int = 1,
    salt: str | None = None,  # tenant: caches with different salts never share
    prefill_tokens_s: float | None = None,  # tokens/s that the engine prefills, see docs/remote.md; None: unknown
    **options: Any,  # fields of kvkern.config.Config; `capacity`, or `socket` of the node's daemon, is required
) -> PagedCache:
    """Open a cache embedded in this process, or connect to the node's cache through its daemon.

    Before it returns, it proves the layout: it writes random blocks through the tensors, moves them out and back, and
    compares them. Raises LayoutError, ConfigError or ArenaError, and then leaves nothing behind.
    """
    if blocks_per_chunk < 1:
        raise ConfigError(f"blocks_per_chunk is {blocks_per_chunk}; it must be at least 1")
    if prefill_tokens_s is not None and not 0 < prefill_tokens_s < math.inf:
        raise ConfigError(f"prefill_tokens_s is {prefill_tokens_s}; it must be above 0 and finite, or left out")
    config = Config.parse(options, "open_cache")
    paged = PagedTensors.bind(layout, tensors)
    namespace = Namespace(
        model=model, weights=weights, dtype=str(tensors[0].dtype).removeprefix("torch."), layout=layout.fingerprint,
        chunk_tokens=blocks_per_chunk * layout.block_tokens, salt=salt or config.salt or None,
    )  # fmt: skip
    geometry, name = SlotGeometry(layout.part_nbytes(blocks_per_chunk), len(layout.planes)), uuid.uuid4().hex
    cache: ChunkCache
    if config.socket:
        client = NodeClient.open(
            Path(config.socket),
            name,
            geometry,
            patience_s=STORE_WAIT_S,
            timeout_s=config.connect_s,
            prefault=config.prefault,
        )
        cache, arena, close = client, client.arena, client.close
        client.describe_namespace(namespace.root, namespace.public_fields())
    else:
        arena = open_arena(config, geometry, name, expected=1)
        cache, close = _open_embedded(arena, config)
    transfer: Copier | None = None
    try:
        transfer = build_copier(config, arena, [paged], rank=0, blocks_per_chunk=blocks_per_chunk)
        if isinstance(cache, Cache) and config.hbm_nbytes:
            cache, transfer = add_hbm_tier(config, cache, arena, transfer, paged, blocks_per_chunk)
    except BaseException:
        if transfer is not None:
            transfer.close()
        close()
        raise
    if prefill_tokens_s is not None:
        cache.note_prefill(prefill_tokens_s)
    shape = ChunkShape(namespace.root, group=0, chunk_tokens=namespace.chunk_tokens)
    return PagedCache(cache, transfer, close, namespace, shape)
