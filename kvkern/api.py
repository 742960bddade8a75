"""The API for any engine: match a prompt, load the hit into paged tensors by block table, store the computed chunks.

cache = kvkern.open_cache(layout, tensors, model="my-model", weights=revision, capacity="8GiB")
with cache.match(tokens[:-1]) as hit:                  # longest cached prefix, pinned; the last token is left to compute
    num_loaded = cache.load(hit, block_table)          # tokens that were verified and are now in the engine's blocks
...                                                    # the engine computes tokens[num_loaded:], at least one token
cache.store(tokens, block_table, match=hit)            # whole chunks that are not cached yet
"""

from __future__ import annotations

import itertools
import math
import operator
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .api_arguments import BlockTable, as_block_ids, as_count, check_salt, dtype_of, part_of_kv
from .arena.file import Arena
from .arena.slots import SlotGeometry
from .assemble import add_hbm_tier, attach_remote_tier, build_cache, build_copier, open_arena
from .bounded_dict import BoundedDict
from .cache.base import ChunkCache, RequestEnd
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
MAX_TENANTS = 4096  # salts whose namespaces are kept; the namespace of another salt is made anew
_requests = itertools.count(1)  # request numbers, unique in this process: several caches may share one manager
Extras = Mapping[int, bytes]  # chunk index -> 32-byte hash of what the chunk's tokens do not show


class Match:
    """A cached prefix of a prompt. Its chunks stay readable until `release` or the end of the `with` block."""

    def __init__(self, owner: PagedCache, lease: Lease, request: int, shape: ChunkShape, extras: Extras) -> None:
        self.owner = owner
        self._released = False
        self.lease = lease
        self.request = request  # number of the request, which `store` reads; valid after the release too
        self.shape = shape  # names the tenant; `load` and `store` use it
        self.extras = dict(extras)

    @property
    def num_tokens(self) -> int:
        """Length of the cached prefix. It stays the same after the release, but is 0 once the cache is closed."""
        return 0 if self.owner.closed else len(self.lease.slots) * self.shape.chunk_tokens

    def release(self) -> None:
        """Unpin the chunks, so that they can be evicted. Safe to call twice, and after the cache is closed."""
        if not self._released:
            self._released = True
            self.owner.end_match(self.lease)

    def __enter__(self) -> Match:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        if not self._released:
            self.owner.end_match(self.lease, later=True)

    @property
    def released(self) -> bool:
        """Whether `release` was called. Then the chunks may be evicted."""
        return self._released


class PagedCache:
    """A cache for one engine's paged tensors, for all of its tenants. Thread-safe if concurrent calls use distinct blocks.

    `salt` names a tenant: chunks of different salts never meet. A call without a salt uses the salt of `open_cache`.
    """

    def __init__(self, cache: ChunkCache, transfer: Copier, close: Callable[[], None], namespace: Namespace) -> None:
        self._cache = cache
        self._transfer = transfer
        self._close = close
        self._shape = ChunkShape(namespace.root, namespace.group or 0, namespace.chunk_tokens)
        self._tenants: BoundedDict[str, ChunkShape] = BoundedDict(MAX_TENANTS)
        self._tenants_lock = threading.Lock()
        self.closed = False
        self.namespace = namespace
        self.chunk_tokens = namespace.chunk_tokens

    def keys(self, tokens: Tokens, extras: Extras | None = None, salt: str | None = None) -> list[bytes]:
        """Return the chunk keys of a sequence. A partial last chunk has no key.

        `extras` maps a chunk's index to a 32-byte hash of what the tokens do not show, for example of its images or of the
        request's LoRA adapter (at chunk 0).
        """
        return self._keys(self._tenant(salt), tokens, extras)

    def match(self, tokens: Tokens, extras: Extras | None = None, salt: str | None = None) -> Match:
        """Find and pin the longest cached prefix of `tokens`. Always returns a Match. Its `num_tokens` may be 0.

        An engine needs the logits of the last token, so it must compute at least this token. It therefore passes
        `tokens[:-1]`: a prompt of whole cached chunks would otherwise be loaded whole.
        """
        self._check_open()
        shape = self._tenant(salt)
        use = Use(request=next(_requests), namespace=shape.namespace)
        keys = self._keys(shape, tokens, extras)
        match = Match(self, self._cache.acquire(keys, use=use), use.request, shape, extras or {})
        self._cache.finish(use, RequestEnd(keys, len(tokens)))  # `kvkern record` writes a request when it has matched
        return match

    def load(self, match: Match, block_table: BlockTable, start: int = 0) -> int:
        """Copy the matched chunks into the blocks of `block_table` and verify them.

        Returns the length, in tokens from 0 on, of the prefix that is now valid in the blocks. Tokens [0, start) are in
        their blocks already and stay untouched. `start` is a multiple of the block size. If a chunk fails its checksum,
        the valid prefix ends before that chunk and the cache forgets the chunk. The blocks behind it hold no valid KV.
        """
        self._check_open()
        self._check_match(match)
        lease = match.lease
        if match.released:
            raise ConfigError(
                f"the match of {match.num_tokens} tokens was released, so its chunks may have been evicted; "
                f"call load before release, or call match again"
            )
        table = self._table_rows(block_table, len(lease.slots))
        start = as_count("start", start)
        if start % self._block_tokens or not 0 <= start <= match.num_tokens:
            raise ConfigError(
                f"start is {start}; it must be a multiple of the block size {self._block_tokens}, "
                f"from 0 to the {match.num_tokens} tokens of the match"
            )
        first = start // self.chunk_tokens
        table = table.copy()
        table.reshape(-1)[: start // self._block_tokens] = -1
        rest = slice(first, None)
        known = None if lease.fingerprints is None else lease.fingerprints[rest]
        batch = self._chunk_batch(match.shape, table[rest], lease.keys[rest], lease.slots[rest], (), known)
        job = self._transfer.load([batch])
        self._wait_for_copies(job)
        good = int(job.ok.cumprod().sum())
        return start if good == 0 else (first + good) * self.chunk_tokens

    def store(
        self,
        tokens: Tokens,
        block_table: BlockTable,
        extras: Extras | None = None,
        start: int = 0,  # a multiple of `chunk_tokens`, at most len(tokens)
        match: Match | None = None,  # of the same request, released or not; a request may store several times
        salt: str | None = None,
    ) -> int:
        """Copy the whole chunks of `tokens[start:]` that are not cached yet. Returns how many chunks were published.

        The KV of every whole chunk must be in its blocks. The cache stores fewer chunks if all other slots are in use.
        With `match`, the match and the store count as one use of the sequence, and the match's salt and extras count.
        Without it, the eviction policy counts two requests.
        """
        self._check_open()
        shape, extras = self._identity(match, extras, salt)
        keys = self._keys(shape, tokens, extras)
        if match is not None:
            _check_same_prompt(match, keys)
        table = self._table_rows(block_table, len(keys))
        start = as_count("start", start)
        if start % self.chunk_tokens or not 0 <= start <= len(tokens):
            raise ConfigError(
                f"start is {start}; it must be a multiple of the chunk size {self.chunk_tokens}, from 0 to the "
                f"{len(tokens)} tokens"
            )
        use = Use(request=match.request if match is not None else next(_requests))
        return self._store_rounds(shape, keys, table, start // self.chunk_tokens, use)

    def clear(self, salt: str | None = None) -> int:
        """Forget all chunks of this model and salt, for example after a change of weights. Returns how many chunks.

        Chunks in a remote store stay there, and later matches load them again. If you have a remote store, open a new
        cache with other `weights` instead.
        """
        self._check_open()
        root = self._tenant(salt).namespace
        count = self._cache.clear(root)
        self._describe(salt, root)  # a cleared namespace is forgotten, but this one lives on
        return count

    def stats(self) -> dict[str, int | float]:
        """Return counters and usage. CacheCounters explains each counter."""
        return {**self._cache.counters.snapshot(), **self._cache.usage()}

    def close(self) -> None:
        """End the copy threads and unmap the arena. Call it when no other call is running. Later calls are refused.

        The chunks of an embedded cache are gone afterwards. A remote store keeps what was written before: `close` gives the
        chunks that wait to be written about two seconds, and writes no others. So with `persist` at its default, which
        writes evicted chunks, it writes nothing of what DRAM holds. `persist="all"` writes every chunk soon after its store.
        """
        self.closed = True
        self._transfer.close()
        self._close()

    def end_match(self, lease: Lease, later: bool = False) -> None:
        """End the lease of a match. `later` is for finalizers, which may run while this thread holds the cache's lock."""
        if not self.closed:
            (self._cache.release_later if later else self._cache.release)(lease)

    # -- names -----------------------------------------------------------------------------------------------------------

    def _tenant(self, salt: str | None) -> ChunkShape:
        """Return the shape of a tenant's chunks, which has the tenant's namespace. Raises ConfigError, never with the salt."""
        if salt is None:
            return self._shape
        check_salt(salt)
        with self._tenants_lock:
            shape = self._tenants.get(salt)
        if shape is None:
            root = replace(self.namespace, salt=salt).root
            shape = replace(self._shape, namespace=root)
            self._describe(salt, root)
        with self._tenants_lock:
            self._tenants.put(salt, shape)
        return shape

    def _describe(self, salt: str | None, root: bytes) -> None:
        namespace = self.namespace if salt is None else replace(self.namespace, salt=salt)
        self._cache.describe_namespace(root, namespace.public_fields())

    def _keys(self, shape: ChunkShape, tokens: Tokens, extras: Extras | None) -> list[bytes]:
        return split_keys(chunk_keys(shape.namespace, tokens, self.chunk_tokens, extras))

    def _identity(self, match: Match | None, extras: Extras | None, salt: str | None) -> tuple[ChunkShape, Extras]:
        """Return the tenant and the extras of a store. Those of the match count, and others must not contradict them."""
        if match is None:
            return self._tenant(salt), extras or {}
        self._check_match(match)
        if salt is not None and self._tenant(salt) != match.shape:
            raise ConfigError(
                "the match was made with another salt; leave `salt` out, because the store takes the match's"
            )
        if extras is None:
            return match.shape, match.extras
        for chunk, extra in match.extras.items():
            if extras.get(chunk) != extra:
                raise ConfigError(
                    f"the match was made with another extra of chunk {chunk}; give `store` the extras of the match, or leave "
                    f"them out"
                )
        return match.shape, extras

    # -- checks ----------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise ConfigError("the cache is closed; open another one with open_cache")

    def _check_match(self, match: Match) -> None:
        if match.owner is not self:
            raise ConfigError("the match is of another cache; call match of this cache")

    # -- copies ----------------------------------------------------------------------------------------------------------

    def _store_rounds(
        self, shape: ChunkShape, keys: list[bytes], table: npt.NDArray[np.int32], first: int, use: Use
    ) -> int:
        """Store chunks [first, end) in rounds of the cache's size. A daemon grants an engine only some slots at a time.

        Ends when no slot is to be had, or when the cache evicts what an earlier round has stored.
        """
        at = {key: i for i, key in enumerate(keys)}
        done: list[bytes] = []
        stored = 0
        while first < len(keys):
            wanted = keys[first : first + self._cache.round_chunks]
            first += len(wanted)
            reservation = self._cache.reserve(keys, wanted, shape, use)
            if reservation.slots:
                rows = table[[at[key] for key in reservation.keys]]
                batch = self._chunk_batch(shape, rows, reservation.keys, reservation.slots, reservation.generations)
                try:
                    self._wait_for_copies(self._transfer.store([batch]))
                finally:  # commit frees the slots that were not written
                    stored += self._cache.commit(reservation)
            if reservation.dropped:
                if not (self._cache.shared and reservation.slots):
                    break
                first = at[reservation.keys[-1]] + 1  # the daemon lowered the limit meanwhile
            done += reservation.keys
            if first < len(keys) and self._cache.lookup(done) < len(done):
                break
        return stored

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
        table = as_block_ids(block_table)
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
        if len(np.unique(used)) < len(used):
            ids, counts = np.unique(used, return_counts=True)
            raise ConfigError(
                f"block_table names block {ids[counts > 1][0]} for {counts.max()} places of one sequence; a block holds the KV "
                f"of one place, so check block_table"
            )
        return used.astype(np.int32).reshape(chunks, per_chunk)

    def _chunk_batch(
        self,
        shape: ChunkShape,
        rows: npt.NDArray[np.int32],
        keys: Sequence[bytes],
        slots: Sequence[int],
        generations: Sequence[int],
        fingerprints: npt.NDArray[np.uint64] | None = None,  # of a lease of a daemon
    ) -> ChunkBatch:
        return ChunkBatch(
            group=0,
            block_ids=np.ascontiguousarray(rows),
            slots=np.array(slots, dtype=np.int64),
            generations=np.array(generations, dtype=np.uint64),
            keys=np.frombuffer(b"".join(keys), dtype="V32"),
            namespace=shape.namespace,
            fingerprints=fingerprints,
        )


def _check_same_prompt(match: Match, keys: Sequence[bytes]) -> None:
    if any(map(operator.ne, match.lease.keys, keys)):
        chunk = next(i for i, (a, b) in enumerate(zip(match.lease.keys, keys, strict=False)) if a != b)
        raise ConfigError(
            f"the match is of another sequence: chunk {chunk} differs from the tokens to store; pass the match of the same "
            f"request"
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
    model: str,  # its name, and all else that changes KV beside the weights: rope scaling, quantisation, scales
    weights: str,  # a resolved revision, or kvkern.weights_fingerprint(path)
    blocks_per_chunk: int = 1,
    salt: str | None = None,  # tenant of calls without a salt; None: all such calls share
    tp_size: int | None = None,  # ranks among which the heads are split; None: the tensors hold all heads
    pp_size: int = 1,  # ranks among which the layers are split
    rank: int | None = None,  # of these tensors, in [0, tp_size * pp_size); needed if there are several
    group: int = 0,  # number of the KV group, if the model has several, each with a cache of its own
    dtype: str | None = None,  # what tensors of bytes hold; None: the tensors' own dtype
    prefill_tokens_s: float | None = None,  # tokens/s that the engine prefills, see docs/remote.md; None: unknown
    **options: Any,  # see docs/configuration.md; `capacity`, or `socket` of the node's daemon, is required
) -> PagedCache:
    """Open a cache embedded in this process, or connect to the node's cache through its daemon.

    Before it returns, it proves the layout: see kernels/selftest.py. It only reads the tensors, so an engine may compute
    meanwhile. One cache serves all tenants; see `salt` of its calls. Everything that changes KV must be in `model`,
    `weights` or the other names: kvkern checks that the bytes are those that were stored, not that the name is right.
    Ranks that hold other tokens of one sequence (context parallelism) have no name here. Do not share a cache then.

    Raises LayoutError, ConfigError or ArenaError, and then leaves nothing behind.
    """
    blocks_per_chunk = as_count("blocks_per_chunk", blocks_per_chunk)
    if blocks_per_chunk < 1:
        raise ConfigError(f"blocks_per_chunk is {blocks_per_chunk}; it must be at least 1")
    if prefill_tokens_s is not None and not 0 < prefill_tokens_s < math.inf:
        raise ConfigError(f"prefill_tokens_s is {prefill_tokens_s}; it must be above 0 and finite, or left out")
    config = Config.resolve(options, "open_cache")
    salt = config.salt or None if salt is None else salt
    if salt is not None:
        check_salt(salt)
    shared = bool(config.socket or config.remote)
    paged = PagedTensors.bind(layout, tensors)
    part: Any = part_of_kv(tp_size, pp_size, rank, shared)
    namespace = Namespace(
        model=model, weights=weights, dtype=dtype_of(tensors, dtype, shared), layout=layout.fingerprint,
        chunk_tokens=blocks_per_chunk * layout.block_tokens, salt=salt, group=as_count("group", group), **part,
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
            daemon_uid=config.daemon_uid,
            dump_arena=config.dump_arena,
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
    if config.tracing:
        from .observability import tracing

        cache, transfer = tracing.traced_cache(cache), tracing.traced_copier(transfer)
    return PagedCache(cache, transfer, close, namespace)
