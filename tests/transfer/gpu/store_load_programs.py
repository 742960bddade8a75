"""Small programs for a fake device: a store or a load by one method, beside an engine that uses every moment it is allowed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvkern.arena.file import Arena
from kvkern.arena.slots import SlotState
from kvkern.cache.manager import Cache
from kvkern.errors import KvkernError
from kvkern.kernels import layout as L
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.policy.lru import LRU
from kvkern.tiers.dram import DramTier
from kvkern.transfer.base import ChunkBatch, Job
from kvkern.transfer.gpu.copier import GpuCopier
from kvkern.transfer.gpu.device import DeviceError
from kvkern.transfer.gpu.planner import Choice, Method
from kvkern.transfer.gpu.staging_rings import RingDepths
from kvkern.transfer.gpu.stream_lanes import Lane
from kvkern.transfer.host import HostCopier
from tests.support import NAMESPACE, SHAPE, chain_keys, make_arena
from tests.transfer.gpu.fake_device import FakeDevice, blocks
from tests.transfer.gpu.orders import Program, Step
from tests.transfer.gpu.vector_clocks import Span

BLOCK = (2, 1, 16)  # tokens, heads, elements of two bytes: 64 bytes a block and plane
PART = 2 * 64
NUM_BLOCKS = 32
JUNK, LATE = 0x55, 0x33


class Manual(Executor):
    """An executor that runs its tasks when `run` is called, in the caller's thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._tasks: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._tasks.append(fn)
        return Future()

    def run(self) -> None:
        """Run all tasks. Drops errors of kvkern and of the device, as a thread pool does. Raises a test's own errors."""
        while self._tasks:
            try:
                self._tasks.pop(0)()
            except (KvkernError, DeviceError):
                continue

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.run()


def choosing(*methods: Method, piece_nbytes: int = 32 << 20) -> Callable[..., Choice]:
    """Return a planner that gives these methods in turn."""
    turns = cycle(methods)
    return lambda direction, run_nbytes, count, nbytes: Choice(next(turns), 4, piece_nbytes)


@dataclass
class World:
    """An arena and paged tensors: their bytes before a run, and the bytes they must have after it."""

    arena: Arena
    cache: Cache
    paged: PagedTensors
    batch: ChunkBatch
    arena_before: npt.NDArray[np.uint8]
    tensor_before: npt.NDArray[np.uint8]
    arena_after: npt.NDArray[np.uint8]
    loaded: npt.NDArray[np.uint8]  # for loads: the tensor as the host copier loads it
    ok: list[bool]
    observed: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """The bytes of the whole tensor."""
        return self.paged.tensors[0].view(torch.uint8).numpy().reshape(-1)

    def cut(self) -> list[ChunkBatch]:
        """Split the batch into one batch per chunk, so that each chunk has its own method."""
        b = self.batch
        one = [slice(i, i + 1) for i in range(len(b.slots))]
        return [
            replace(b, block_ids=b.block_ids[i], slots=b.slots[i], generations=b.generations[i], keys=b.keys[i])
            for i in one
        ]

    def reset(self) -> None:
        self.arena.bytes[:] = self.arena_before
        self.bytes[:] = self.tensor_before
        self.observed = np.zeros(len(self.bytes), dtype=np.uint8)

    def spans(self, write: bool, rows: slice = slice(None)) -> list[Span]:
        """Return the memory of the batch's blocks."""
        return list(blocks(self.paged, self.batch.block_ids[rows], write))

    def put(self, values: npt.NDArray[np.uint8] | int, rows: slice = slice(None)) -> None:
        """Set the batch's blocks: from the bytes of a whole tensor, or every byte to one value."""
        start, flat = self.bytes.ctypes.data, self.bytes
        for span in self.spans(True, rows):
            at = slice(span.address - start, span.address - start + span.nbytes)
            flat[at] = values if isinstance(values, int) else values[at]


def world(folder: Path, direction: str, chunks: int, corrupt: bool = False) -> World:
    """Make `chunks` chunks of one block each. The result of the host copier is the expected one."""
    arena = make_arena(folder, slots=chunks, part_nbytes=PART, planes=2)
    cache = Cache(DramTier(arena, LRU()))
    noise = torch.randint(0, 256, (2 * NUM_BLOCKS * 64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensor = noise.view(torch.bfloat16).view(2, NUM_BLOCKS, *BLOCK)
    paged = PagedTensors.bind(L.flash_attention([tensor]), [tensor])
    cpu = HostCopier([paged], arena, 0, 1, threads=1)
    keys = chain_keys("a", chunks)
    reserved = cache.reserve(keys, keys, SHAPE)
    batch = ChunkBatch(
        group=0,
        block_ids=np.arange(chunks, dtype=np.int32)[::-1].reshape(-1, 1).copy(),
        slots=np.array(reserved.slots, dtype=np.int64),
        generations=np.array(reserved.generations, dtype=np.uint64),
        keys=np.frombuffer(b"".join(keys), dtype="V32"),
        namespace=NAMESPACE,
    )
    made = World(arena, cache, paged, batch, arena.bytes.copy(), noise.numpy().copy(), arena.bytes, noise.numpy(), [])
    assert cpu.store([batch]).wait().ok.all()
    if direction == "load":
        assert cache.commit(reserved) == chunks
        if corrupt:
            arena.parts(0)[batch.slots[0], 5] ^= 1
        made.arena_before = arena.bytes.copy()
        made.put(JUNK)
        made.tensor_before = made.bytes.copy()
        made.ok = cpu.load([batch]).wait().ok.tolist()
        made.loaded = made.bytes.copy()
    else:
        made.ok = [True] * chunks
    made.arena_after = arena.bytes.copy()
    cpu.close()
    return made


def gpu(
    made: World, device: FakeDevice, methods: tuple[Method, ...], depths: RingDepths
) -> tuple[GpuCopier, dict[str, Manual]]:
    """Make a GPU copier whose lanes the caller drives."""
    lanes: dict[str, Manual] = {}
    copier = GpuCopier(
        [made.paged],
        made.arena,
        0,
        1,
        device,
        choosing(*methods, piece_nbytes=PART),
        depths,
        executor=lambda name, attach: lanes.setdefault(name, Manual(name)),
    )
    return copier, lanes


TIGHT = RingDepths(staging_nbytes=PART, staging=1, tables=1, window=2)


def _drive(device: FakeDevice, lane: Lane, manual: Manual, jobs: list[Job], late: bool) -> None:
    """Run a lane's turns. With `late` a second job may arrive at any time: before, between or after them."""
    device.agent = lane.name
    device.arrived = lambda: bool(lane._queued)
    manual.run()
    if late:
        device.point(f"{lane.name}: idle", lambda: len(jobs) > 1)
        manual.run()


def _all(jobs: list[Job], late: bool, asked: Callable[[Job], bool]) -> Callable[[], bool]:
    return lambda: len(jobs) == 1 + late and all(asked(job) for job in jobs)


def _verdict(jobs: list[Job], want: list[bool]) -> list[str]:
    ok, errors = [bool(ok) for job in jobs for ok in job.ok], [job.error for job in jobs]
    return [f"ok is {ok}, errors {errors}"] if ok != want or any(errors) else []


def store_program(
    made: World,
    *methods: Method,
    depths: RingDepths = TIGHT,
    late: bool = False,  # all chunks but the first are a second job, which may arrive at any time
) -> Callable[[FakeDevice], Program]:
    """The engine writes the blocks late, and overwrites them as soon as the job says that they are free."""

    def build(device: FakeDevice) -> Program:
        made.reset()
        made.put(LATE)
        copier, lanes = gpu(made, device, methods, depths)
        jobs: list[Job] = []
        batches = made.cut()
        first = 1 if late else len(batches)

        def main() -> None:
            fresh = made.tensor_before
            device.compute.push("writes blocks", lambda: made.put(fresh), lambda: made.spans(True))
            jobs.append(copier.store(batches[:first]))
            _drive(device, copier._store, lanes["store"], jobs, late)

        def submit() -> None:
            jobs.append(copier.store(batches[first:]))

        def overwrite() -> None:
            if any(future.done() for job in jobs for future in job.futures):
                device.watch.join("engine", device.watch.now("store"))
            device.compute.push("reuses blocks", lambda: made.put(JUNK), lambda: made.spans(True))

        def look() -> None:
            device.watch.join("engine", device.watch.now("store"))
            rows = made.arena.parts(0)
            spans = [Span(rows[slot].ctypes.data, PART, False) for slot in made.batch.slots]
            device.watch.host("engine", "reads slots", spans)

        return Program(
            main,
            [
                *([Step("submits more", lambda: bool(jobs), submit)] if late else []),
                Step("reuses blocks", _all(jobs, late, lambda job: job.released()), overwrite),
                Step("publishes slots", _all(jobs, late, lambda job: job.done()), look),
            ],
            lambda end: _store_complaints(made, jobs, end),
            [made.arena.bytes, made.bytes],
        )

    return build


def _store_complaints(made: World, jobs: list[Job], end: bool) -> list[str]:
    slots, headers = made.batch.slots, made.arena.headers
    out = []
    written = slots[headers["written"][slots, 0] == made.batch.generations]
    right = made.arena_after
    for slot in written:
        begin = made.arena.parts(0)[slot].ctypes.data - made.arena.bytes.ctypes.data
        if not np.array_equal(made.arena.bytes[begin : begin + PART], right[begin : begin + PART]):
            out.append("a WRITTEN slot has wrong bytes")
    if end:
        if not np.array_equal(made.arena.bytes, right):
            out.append("slots or headers differ from the CPU's")
        out += _verdict(jobs, made.ok)
    return out


def load_program(
    made: World, *methods: Method, depths: RingDepths = TIGHT, late: bool = False
) -> Callable[[FakeDevice], Program]:
    """The engine writes other data into the blocks late, and reads the blocks as soon as they are loaded."""

    def build(device: FakeDevice) -> Program:
        made.reset()
        copier, lanes = gpu(made, device, methods, depths)
        jobs: list[Job] = []
        batches = made.cut()
        first = 1 if late else len(batches)

        def main() -> None:
            device.compute.push("writes blocks", lambda: made.put(LATE), lambda: made.spans(True))
            jobs.append(copier.load(batches[:first]))
            _drive(device, copier._load, lanes["load"], jobs, late)

        def submit() -> None:
            jobs.append(copier.load(batches[first:]))

        def see() -> None:
            device.watch.join("engine", device.watch.now("load"))

            def run() -> None:
                made.observed[:] = made.bytes

            device.compute.push("reads blocks", run, lambda: made.spans(False))

        return Program(
            main,
            [
                *([Step("submits more", lambda: bool(jobs), submit)] if late else []),
                Step("reads blocks", _all(jobs, late, lambda job: job.done()), see),
            ],
            lambda end: _load_complaints(made, jobs) if end else [],
            [made.arena.bytes, made.bytes, made.observed],
        )

    return build


def _load_complaints(made: World, jobs: list[Job]) -> list[str]:
    out = []
    if not np.array_equal(made.observed, made.loaded):
        out.append("the engine read wrong blocks")
    if not np.array_equal(made.bytes, made.loaded):
        out.append("blocks are wrong")
    out += _verdict(jobs, made.ok)
    states = made.arena.headers["state"][made.batch.slots]
    if ((states == SlotState.BAD) == made.ok).any():
        out.append("the wrong slots are BAD")
    if not np.array_equal(made.arena.bytes, made.arena_after):
        out.append("slots or headers differ from the CPU's")
    return out


def _failing_program(
    made: World,
    direction: str,
    method: Method,
    at: tuple[str, int],  # the operation that fails, see FakeDevice.fail_at
    reuse: Callable[[FakeDevice], None],  # what the engine does once the job is done
    complaints: Callable[[], list[str]],  # what is wrong at the end, beside the job's verdict
) -> Callable[[FakeDevice], Program]:
    """The last of two pieces fails, and the engine reuses its memory once the job is done."""

    def build(device: FakeDevice) -> Program:
        made.reset()
        copier, lanes = gpu(made, device, (method,), TIGHT)
        device.fail_at = at
        jobs: list[Job] = []

        def main() -> None:
            jobs.append((copier.store if direction == "store" else copier.load)(made.cut()))
            device.agent = direction
            lanes[direction].run()

        def act() -> None:
            device.watch.join("engine", device.watch.now(direction))
            reuse(device)

        def complaints_at_end(end: bool) -> list[str]:
            if not end:
                return []
            out = complaints()
            if not isinstance(jobs[0].error, DeviceError) or jobs[0].ok.tolist() != [True, False]:
                out.append(f"ok is {jobs[0].ok.tolist()}, error {jobs[0].error!r}")
            return out

        step = Step("reuses memory", lambda: bool(jobs) and jobs[0].done(), act)
        return Program(main, [step], complaints_at_end, [made.arena.bytes, made.bytes])

    return build


def failing_store(made: World, method: Method, at: tuple[str, int]) -> Callable[[FakeDevice], Program]:
    """The last piece fails. Once the job is done, the engine reuses all blocks, and the last slot belongs to another chunk."""
    last = made.batch.slots[-1:]

    def reuse(device: FakeDevice) -> None:
        made.arena.headers["generation"][last] += 1
        part = made.arena.parts(0)[last[0]]
        device.watch.host("engine", "reuses slot", [Span(part.ctypes.data, PART, True)])
        part[:PART] = JUNK
        device.compute.push("reuses blocks", lambda: made.put(JUNK), lambda: made.spans(True))

    def complaints() -> list[str]:
        out = []
        if not (made.arena.parts(0)[last, :PART] == JUNK).all():
            out.append("the last slot was written after it had a new owner")
        if not np.array_equal(made.arena.parts(0)[made.batch.slots[0], :PART], _parts_of(made, made.arena_after)[0]):
            out.append("the piece before it has wrong bytes")
        return out

    return _failing_program(made, "store", method, at, reuse, complaints)


def _parts_of(made: World, file: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return [n, PART]: the batch's parts in a copy of the arena's bytes."""
    rows = made.arena.parts(0)
    begins = [rows[slot].ctypes.data - made.arena.bytes.ctypes.data for slot in made.batch.slots]
    return np.stack([file[begin : begin + PART] for begin in begins])


def failing_load(made: World, method: Method, at: tuple[str, int]) -> Callable[[FakeDevice], Program]:
    """The last piece fails. Once the job is done, the engine writes other data into the blocks of that piece."""
    last = slice(len(made.batch.slots) - 1, None)

    def reuse(device: FakeDevice) -> None:
        device.compute.push("reuses blocks", lambda: made.put(LATE, last), lambda: made.spans(True, last))

    def complaints() -> list[str]:
        now, want = made.bytes.copy(), made.loaded.copy()
        made.bytes[:] = want
        made.put(LATE, last)
        want[:], made.bytes[:] = made.bytes, now
        out = [] if np.array_equal(now, want) else ["blocks are wrong"]
        if (made.arena.headers["state"][made.batch.slots] == SlotState.BAD).tolist() != [False, True]:
            out.append("the wrong slots are BAD")
        return out

    return _failing_program(made, "load", method, at, reuse, complaints)
