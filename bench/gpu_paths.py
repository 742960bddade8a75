"""Measures whole transfers between blocks and a real arena: staged, zero-copy and batch DMA side by side, both directions.

    staged      a kernel between blocks and staging in HBM, one DMA a chunk        zero_copy   one kernel over the link
    batch_dma   the copy engine moves every run; checksums by a kernel that only reads
    planned     the method that kvkern chooses with this device's own calibration; `chosen` names it
    vllm        vLLM's swap_blocks_batch over the same blocks and slots, without checksums; only if a CUDA vLLM is installed

Transfers go through GpuCopier as an engine calls it, headers and checksums included. Every load verifies the slots' bytes and
checksums. `percent_link` compares with a large plain pinned copy in the same run. `released_ms` is the time until a store's
blocks are free again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from statistics import median

import numpy as np
import torch
from _gpu import Rig, Row, arguments, ceilings, gb_s, open_rig, percent, print_row, write_json

from kvkern.arena.slots import SlotGeometry
from kvkern.assemble import build_cache, open_arena
from kvkern.config import Config
from kvkern.kernels.layout import from_pages
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.tiers.base import ChunkShape
from kvkern.transfer.base import ChunkBatch, Job
from kvkern.transfer.gpu import planner
from kvkern.transfer.gpu.calibrate import calibrate
from kvkern.transfer.gpu.copier import GpuCopier
from kvkern.transfer.gpu.device import Device
from kvkern.transfer.gpu.dma_runs import merged_runs
from kvkern.transfer.gpu.link_table import Abilities, Calibration, Direction, HostLink, seed_calibration
from kvkern.transfer.gpu.planner import Choice, Method

RUNS = (2 << 10, 8 << 10, 18 << 10, 32 << 10, 64 << 10, 128 << 10, 2 << 20)
BATCHES = (1, 8, 64)  # chunks of 2 MiB
CHUNK_NBYTES, LAYERS = 2 << 20, 8
PIECE_NBYTES = 32 << 20
CTAS = {Method.STAGED: 32, Method.ZERO_COPY: 8, Method.BATCH_DMA: 32}
NAMESPACE = bytes(range(32))
OPS = {Direction.D2H: "store", Direction.H2D: "load"}


class Copies:
    """Pages of one run length on the device, an arena for `chunks` chunks, and one copier whose method can be set."""

    def __init__(self, rig: Rig, device: Device, run_nbytes: int, chunks: int, table: Calibration) -> None:
        self._rig = rig
        layers = min(LAYERS, CHUNK_NBYTES // run_nbytes)
        per_chunk = max(1, CHUNK_NBYTES // (run_nbytes * layers))
        blocks = chunks * per_chunk + 1
        pages = [rig.memory(blocks * (run_nbytes + 64)).view(blocks, -1)[:, :run_nbytes] for _ in range(layers)]
        self.paged = PagedTensors.bind(from_pages(pages, block_tokens=16), pages)
        geometry = SlotGeometry(self.paged.layout.part_nbytes(per_chunk), layers)
        config = Config(4096 + chunks * geometry.slot_nbytes)
        self.arena = open_arena(config, geometry, f"bench-gpu-{time.time_ns()}", expected=1)
        self.how: Method | None = None  # None: as planned
        self.ctas = 0  # thread blocks of `how`; 0: its usual number
        self.chosen: Choice | None = None
        self._table = table
        self.copier = GpuCopier([self.paged], self.arena, 0, per_chunk, device, self._choose)
        cache = build_cache(self.arena)
        keys = [i.to_bytes(32, "little") for i in range(chunks)]
        reservation = cache.reserve(keys, keys, ChunkShape(NAMESPACE, 0, 16))
        order = np.random.default_rng(0).permutation(blocks)[: chunks * per_chunk]
        self.block_ids = order.astype(np.int32).reshape(chunks, per_chunk)
        self._whole = ChunkBatch(
            0, self.block_ids, np.array(reservation.slots), np.array(reservation.generations, dtype=np.uint64),
            np.frombuffer(b"".join(keys), dtype="V32"), NAMESPACE,
        )  # fmt: skip
        self.run_nbytes, self.chunk_nbytes = run_nbytes, per_chunk * layers * run_nbytes

    def close(self) -> None:
        self.copier.close()
        self.arena.close()

    def _choose(self, direction: Direction, run_nbytes: int, count: int, nbytes: int) -> Choice:
        if self.how is not None:
            return Choice(self.how, self.ctas or CTAS[self.how], PIECE_NBYTES)
        self.chosen = planner.choose_method(self._table, direction, run_nbytes, count, nbytes)
        return self.chosen

    def batch(self, chunks: int) -> ChunkBatch:
        """Return a batch of the first `chunks` chunks."""
        b = self._whole
        return ChunkBatch(0, b.block_ids[:chunks], b.slots[:chunks], b.generations[:chunks], b.keys[:chunks], NAMESPACE)

    def run(self, direction: Direction, chunks: int, how: Method | None) -> tuple[float, float]:
        """Return (seconds until done, seconds until a store's blocks are free). Raises if a chunk did not verify."""
        self.how = how
        self._rig.synchronize()
        job: Job = (self.copier.store if direction is Direction.D2H else self.copier.load)([self.batch(chunks)])
        while not job.released():
            time.sleep(2e-5)  # the copier's threads need the interpreter too
        released_s = time.perf_counter() - job.started
        if not job.wait().ok.all():
            raise RuntimeError(
                f"{OPS[direction]} by {how or 'plan'}: {int((~job.ok).sum())} of {chunks} chunks did not verify: {job.error}"
            )
        return job.seconds, released_s


def vllm_swap() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None:
    """Return vLLM's swap_blocks_batch (sources, destinations, sizes); None if no CUDA vLLM is installed."""
    try:
        from vllm import _custom_ops

        torch.ops._C_cache_ops.swap_blocks_batch  # noqa: B018  # the build for CPUs has none
    except (ImportError, AttributeError):
        return None
    return _custom_ops.swap_blocks_batch


def vllm_tables(copies: Copies, direction: Direction, chunks: int) -> list[torch.Tensor]:
    """Return [sources, destinations, sizes], each [n] int64 on the host, as swap_blocks_batch takes them."""
    batch = copies.batch(chunks)
    parts = copies.arena.parts(0)
    at = batch.slots * parts.strides[0] + parts.ctypes.data
    runs = merged_runs(copies.paged, batch.block_ids, at, to_slots=direction is Direction.D2H)
    return [torch.from_numpy(column.view(np.int64)) for column in (runs.src, runs.dst, runs.nbytes)]


def vllm_seconds(rig: Rig, copies: Copies, direction: Direction, chunks: int, swap: Callable[..., None]) -> float:
    """Time one call over the same runs and slots, until its bytes are copied. vLLM refuses the default stream."""
    tables = vllm_tables(copies, direction, chunks)
    rig.synchronize()
    start = time.perf_counter()
    with torch.cuda.stream(torch.cuda.Stream()):
        swap(*tables, is_src_access_order_any=direction is Direction.H2D)
    rig.synchronize()
    return time.perf_counter() - start


def measure(
    rig: Rig, copies: Copies, direction: Direction, chunks: int, ceiling: dict[str, float], runs: int
) -> list[Row]:
    """Measure all methods in turns, one row each. The first turn does not count."""
    swap = None if rig.dry else vllm_swap()
    methods: dict[str, Method | None] = {method.value: method for method in Method}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in [*methods, "planned", "vllm"]}
    for turn in range(runs + 1):
        for name in times:
            if name == "vllm":
                if swap is None:
                    continue
                pair = (vllm_seconds(rig, copies, direction, chunks, swap),) * 2
            else:
                pair = copies.run(direction, chunks, methods.get(name))
            if turn:
                times[name].append(pair)
    nbytes = chunks * copies.chunk_nbytes
    chosen = copies.chosen
    rows: list[Row] = []
    for name, pairs in times.items():
        if not pairs:
            continue
        seconds = median(pair[0] for pair in pairs)
        row: Row = {
            "op": OPS[direction], "method": name, "run_nbytes": copies.run_nbytes, "chunks": chunks, "nbytes": nbytes,
            "ms": seconds * 1e3, "gb_s": gb_s(nbytes, seconds),
            "percent_link": percent(rig, gb_s(nbytes, seconds), ceiling[direction.value]),
            "released_ms": median(pair[1] for pair in pairs) * 1e3 if direction is Direction.D2H else None,
        }  # fmt: skip
        if name == "planned" and chosen is not None:
            row |= {"chosen": chosen.method.value, "ctas": chosen.max_ctas}
        if times["vllm"] and name != "vllm":
            row["ratio_vllm"] = median(v[0] / own[0] for v, own in zip(times["vllm"], pairs, strict=True))
        rows.append(row)
    return rows


def calibration(rig: Rig, device: Device) -> Calibration:
    """Measure this device's calibration now. A dry run has seeds."""
    if rig.dry:
        return seed_calibration(HostLink())
    from kvkern.transfer.gpu.stopwatch import Stopwatch

    able = Abilities(device.batch_api, device.host_pointers)
    start = seed_calibration(HostLink() if device.info is None else device.info.link, able)
    return calibrate(Stopwatch(device, able.batch_api, able.host_pointers), start, budget_s=0.2)


def main() -> None:
    args = arguments(__doc__).parse_args()
    rig = open_rig(args.device)
    device = rig.device()
    lengths, batches, runs, ceiling_nbytes = RUNS, BATCHES, args.runs, 256 << 20
    if rig.dry or args.quick:
        lengths, batches, runs = (2 << 10, 32 << 10), (1, 4), 1 if rig.dry else 3
        ceiling_nbytes = (1 << 20) if rig.dry else (128 << 20)
    ceiling = ceilings(rig, ceiling_nbytes, runs)
    rows: list[Row] = [{"op": "ceiling", "method": name, "gb_s": rate} for name, rate in ceiling.items()]
    for row in rows:
        print_row(rig, row)
    table = calibration(rig, device)
    for run_nbytes in lengths:
        with closing(Copies(rig, device, run_nbytes, max(batches), table)) as copies:
            for direction in (Direction.D2H, Direction.H2D):  # stores first: the loads read what they wrote
                for chunks in sorted(batches, reverse=direction is Direction.D2H):
                    for row in measure(rig, copies, direction, chunks, ceiling, runs):
                        rows.append(row)
                        print_row(rig, row)
    if not rig.dry and vllm_swap() is None:
        print("vllm: not measured, no vLLM built for CUDA is installed")
    write_json(rig, args.json, rows)


if __name__ == "__main__":
    main()
