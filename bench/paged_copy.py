"""Paged copies into and out of a real arena, as the transfer runs them, compared with a plain memcpy by as many threads.

    gather:   random blocks -> slots    payload copied, checksums computed and written into the headers
    scatter:  slots -> blocks           headers and checksums verified
    memcpy:   one large copy between a tensor and an arena, in the same direction, with the same threads, in the same turn
    index_select: torch's gather into a buffer, then a copy into the slots; back: a copy, then index_copy_; no checksum

A run is a contiguous piece of a block. GB/s count the payload once. Targets with two threads: 0.95 of memcpy for runs of
18 KiB and more, 0.50 at 2 KiB, and faster than index_select everywhere.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from _common import option_parser, print_row, write_json

from kvkern.arena.slots import SlotGeometry
from kvkern.assemble import build_cache, build_copier, open_arena
from kvkern.config import Config
from kvkern.kernels import layout as L
from kvkern.kernels.layout import PagedLayout
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.tiers.base import ChunkShape
from kvkern.transfer.base import ChunkBatch
from kvkern.transfer.host import HostCopier

MIN_RATIO_LONG, MIN_RATIO_SHORT, LONG_RUN_NBYTES = 0.95, 0.50, 18 << 10
MEMCPY_NBYTES = 256 << 20
NAMESPACE = bytes(range(32))

Row = dict[str, object]


@dataclass(frozen=True)
class LayoutCase:
    """A layout, its sizes, and the function that makes its tensors."""

    name: str
    layers: int
    blocks_per_chunk: int
    block_nbytes: int  # bytes of a block in all layers
    make: Callable[[int, int], tuple[PagedLayout, list[torch.Tensor]]]  # (layers, blocks)


def random_bf16(*shape: int) -> torch.Tensor:
    """Return a bfloat16 tensor of random bits. Every page of it is touched."""
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16).view(torch.bfloat16)


def vllm_cpu(layers: int, blocks: int) -> tuple[PagedLayout, list[torch.Tensor]]:
    """vLLM's CPU pages: K and V of 128 tokens of 4 heads of 128, as opaque bytes."""
    pages = [random_bf16(blocks, 128 << 10).view(torch.int8) for _ in range(layers)]
    return L.from_pages(pages, 128), pages


def flash_attention(layers: int, blocks: int) -> tuple[PagedLayout, list[torch.Tensor]]:
    """FlashAttention, separate K and V: 16 tokens of 8 heads of 128."""
    tensors = [random_bf16(2, blocks, 16, 8, 128) for _ in range(layers)]
    return L.flash_attention(tensors), tensors


def mla(layers: int, blocks: int) -> tuple[PagedLayout, list[torch.Tensor]]:
    """DeepSeek-V3's latent: 16 tokens of 576 values."""
    tensors = [random_bf16(blocks, 16, 576) for _ in range(layers)]
    return L.mla(tensors), tensors


def head_slice(layers: int, blocks: int) -> tuple[PagedLayout, list[torch.Tensor]]:
    """Half of the heads of every token: runs of 2 KiB in tokens of 4 KiB."""
    tensors = [random_bf16(2, blocks, 16, 16, 128)[..., :8, :] for _ in range(layers)]
    return L.flash_attention(tensors), tensors


CASES = (
    LayoutCase("vllm_cpu", 24, 1, 24 * (256 << 10), vllm_cpu),
    LayoutCase("flash_attention", 32, 4, 32 * (64 << 10), flash_attention),
    LayoutCase("mla", 61, 4, 61 * (18 << 10), mla),
    LayoutCase("head_slice", 32, 4, 32 * (64 << 10), head_slice),
)


class CopyRig:
    """One layout, its pages, and a real arena with a transfer. Pages and arena have about `nbytes` each."""

    def __init__(self, case: LayoutCase, nbytes: int, threads: int) -> None:
        per_chunk = case.block_nbytes * case.blocks_per_chunk
        self.num_chunks = max(2, nbytes // per_chunk)
        blocks = self.num_chunks * case.blocks_per_chunk + 1
        self.layout, tensors = case.make(case.layers, blocks)
        self.paged = PagedTensors.bind(self.layout, tensors)
        self.nbytes = self.num_chunks * per_chunk
        geometry = SlotGeometry(self.layout.part_nbytes(case.blocks_per_chunk), len(self.layout.planes))
        config = Config(4096 + self.num_chunks * geometry.slot_nbytes, threads=threads)
        self.arena = open_arena(config, geometry, f"bench-copy-{time.time_ns()}", expected=1)
        self.transfer: HostCopier = build_copier(config, self.arena, [self.paged], 0, case.blocks_per_chunk)
        keys = [i.to_bytes(32, "little") for i in range(self.num_chunks)]
        reservation = build_cache(self.arena).reserve(keys, keys, ChunkShape(NAMESPACE, 0, 16))
        order = np.random.default_rng(0).permutation(blocks)[: self.num_chunks * case.blocks_per_chunk]
        self.block_ids = order.astype(np.int32).reshape(self.num_chunks, case.blocks_per_chunk)
        self.batch = ChunkBatch(
            0, self.block_ids, np.array(reservation.slots), np.array(reservation.generations, dtype=np.uint64),
            np.frombuffer(b"".join(keys), dtype="V32"), NAMESPACE,
        )  # fmt: skip

    def close(self) -> None:
        self.transfer.close()
        self.arena.close()

    def gather(self) -> None:
        if not self.transfer.store([self.batch]).wait().ok.all():
            raise RuntimeError("a chunk was not stored: its slot has another owner, or the copy failed (see the log)")

    def scatter(self) -> None:
        if not self.transfer.load([self.batch]).wait().ok.all():
            raise RuntimeError(
                "a chunk did not verify: its header or checksum differs from what was stored (see the log)"
            )

    def index_select(self) -> None:
        for view, slots, ids in self._torch_pairs():
            slots.copy_(view.index_select(0, ids).view(slots.shape))

    def index_copy(self) -> None:
        for view, slots, ids in self._torch_pairs():
            view.index_copy_(0, ids, slots.reshape(len(ids), *view.shape[1:]))

    def _torch_pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (blocks [num_blocks, ...] int64, slots [chunks, words] int64, block ids) of every plane.

        Torch is fastest with words of 8 bytes.
        """
        offsets = self.layout.plane_offsets(self.block_ids.shape[1])
        parts = torch.from_numpy(self.arena.parts(0))[torch.from_numpy(self.batch.slots)[0] :]
        ids = torch.from_numpy(self.block_ids.reshape(-1).astype(np.int64))
        views = L.plane_views(self.layout.name, self.paged.tensors, self.layout.block_tokens)
        for view, plane, at in zip(views, self.layout.planes, offsets, strict=False):
            nbytes = plane.block_nbytes * self.block_ids.shape[1]
            slots = parts[: self.num_chunks, at : at + nbytes].view(torch.int64)
            yield _int64_rows(view), slots, ids


def _int64_rows(view: torch.Tensor) -> torch.Tensor:
    """Return a plane's view [blocks, tokens, heads, elements] as int64 rows, with contiguous dimensions merged."""
    rows = view.flatten(2) if view.stride(2) == view.shape[3] * view.stride(3) else view
    return (rows.flatten(1) if rows.stride(1) == rows.shape[2] else rows).view(torch.int64)


class MemcpyBaseline:
    """One large copy between a tensor and an arena. Each thread copies its share.

    The copy uses the same kinds of memory as the transfer: 4 KiB pages in the arena, and the allocator's choice in the tensor.
    A copy between huge pages would be up to half as fast again, but no copy into an arena can reach that. libc's memmove
    writes past the caches.
    """

    def __init__(self, nbytes: int, threads: int) -> None:
        geometry = SlotGeometry(nbytes, max_planes=1)
        config = Config(4096 + geometry.slot_nbytes)
        self._arena = open_arena(config, geometry, f"bench-memcpy-{time.time_ns()}", expected=1)
        self._tensor = torch.ones(nbytes, dtype=torch.uint8)
        self._ends = (self._tensor.data_ptr(), self._arena.parts(0).ctypes.data)
        self._share, self._threads = nbytes // threads, threads
        self._pool = ThreadPoolExecutor(threads)

    def close(self) -> None:
        self._pool.shutdown()
        self._arena.close()

    def to_arena(self) -> None:
        self._copy(*self._ends)

    def from_arena(self) -> None:
        self._copy(*self._ends[::-1])

    def _copy(self, source: int, target: int) -> None:
        def part(i: int) -> None:
            ctypes.memmove(target + i * self._share, source + i * self._share, self._share)

        for _ in self._pool.map(part, range(self._threads)):
            pass


def second_call_s(work: Callable[[], None]) -> float:
    """Return the seconds of the second of two calls. The first one runs while torch's threads still wait for work."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_layout(case: LayoutCase, nbytes: int, memcpy_nbytes: int, threads: int, runs: int) -> list[Row]:
    """Measure both directions of one layout. Every contender runs once per turn, after a call that does not count."""
    rows = []
    with closing(CopyRig(case, nbytes, threads)) as copies, closing(MemcpyBaseline(memcpy_nbytes, threads)) as plain:
        for op, ours, memcpy, torchs in (
            ("gather", copies.gather, plain.to_arena, copies.index_select),
            ("scatter", copies.scatter, plain.from_arena, copies.index_copy),
        ):
            turns = [[second_call_s(work) for work in (ours, memcpy, torchs)] for _ in range(runs)]
            rates = [(copies.nbytes / a, memcpy_nbytes / b, copies.nbytes / c) for a, b, c in turns]
            rows.append({
                "op": op, "backend": "numba", "layout": case.name, "run_nbytes": copies.layout.run_nbytes,
                "nbytes": copies.nbytes, "threads": threads,
                "gb_s": median(r[0] for r in rates) / 1e9, "memcpy_gb_s": median(r[1] for r in rates) / 1e9,
                "ratio_memcpy": median(r[0] / r[1] for r in rates),
                "ratio_index_select": median(r[0] / r[2] for r in rates),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = option_parser(__doc__, quick="small and short: for smoke tests, not for figures")
    parser.add_argument("--threads", type=int, default=2, help="threads that copy, for every contender (default 2)")
    parser.add_argument("--runs", type=int, default=9, help="number of turns that count (default 9)")
    parser.add_argument(
        "--mib", type=int, default=384, help="MiB of payload per layout, far more than any CPU cache (default 384)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    nbytes, memcpy_nbytes, runs = (16 << 20, 16 << 20, 2) if args.quick else (args.mib << 20, MEMCPY_NBYTES, args.runs)
    rows = []
    for case in CASES:
        for row in measure_layout(case, nbytes, memcpy_nbytes, args.threads, runs):
            rows.append(row)
            print_row(row)
    print(f"targets: ratio_memcpy >= {MIN_RATIO_LONG} for runs of {LONG_RUN_NBYTES} bytes and more, "
          f">= {MIN_RATIO_SHORT} below; ratio_index_select > 1", flush=True)  # fmt: skip
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
