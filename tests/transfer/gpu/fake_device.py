"""A device whose streams are queues of closures over host memory. An `Order` decides which one runs next.

Gathers and scatters really run (numba), and copies are memory moves, so a wrong order gives wrong bytes. `drop` removes edges:
(event, who waits), or (operation, the next operation on its stream). Each access to memory is reported to `watch`; see
vector_clocks.py.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvkern.errors import LayoutError
from kvkern.kernels.paged_copy import Backend, checksum_chunks, gather_chunks, scatter_chunks
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.transfer.gpu.device import COMPUTED, DeviceError
from kvkern.transfer.gpu.dma_runs import Runs
from kvkern.transfer.gpu.link_table import Direction
from tests.transfer.gpu.vector_clocks import Clock, Span, Watch

POISON = 0xEE
# (event, who waits): a stream, "host" (blocks), "engine" (queries) or "drain". Or two operations in a row on one stream
Edge = tuple[str, str]


class Order(Protocol):
    """Decides what runs next."""

    def point(self, device: FakeDevice, label: str, ready: Callable[[], bool]) -> None:
        """Called before the host touches memory or queries the device. Run any streams; return when `ready()` is True."""


@dataclass
class Op:
    name: str
    run: Callable[[], object]
    spans: Callable[[], list[Span]]  # the memory that it reads and writes; called when it runs
    clock: Clock
    held: Sequence[ctypes.Array[ctypes.c_char]] = ()


@dataclass(eq=False)
class FakeEvent:
    device: FakeDevice
    name: str
    clock: Clock
    done: bool = False

    def query(self) -> bool:
        if self.device.agent != "engine":
            return self._poll()
        with self.device.lock:
            found = self.device.kept(self.name, "engine") is False or self.done
            if found and self.device.kept(self.name, "engine"):
                self.device.watch.join(self.device.agent, self.clock)
            return found

    def _poll(self) -> bool:
        """A query of a lane's thread, which would query again."""
        kept, arrived = self.device.kept(self.name, "host"), self.device.arrived
        self.device.point(f"ask {self.name}", lambda: arrived is None or self.done or not kept or arrived())
        with self.device.lock:
            found = self.done or not kept
            self.device.seen.append(bytes([found]))
            if found and kept:
                self.device.watch.join(self.device.agent, self.clock)
            return found

    def synchronize(self) -> None:
        kept = self.device.kept(self.name, "host")
        self.device.point(f"wait {self.name}", lambda: self.done or not kept)
        if kept:
            self.device.watch.join(self.device.agent, self.clock)


@dataclass(eq=False)
class FakeStream:
    device: FakeDevice
    name: str
    queue: deque[Op | FakeEvent | tuple[str, FakeEvent]] = field(default_factory=deque)  # op, record, wait
    ran: int = 0
    last: str = ""  # the operation that was enqueued last
    before_last: FakeEvent | None = None
    since_last: list[FakeEvent] = field(default_factory=list)  # events that the stream waits for since `last`
    closed: bool = False

    def record(self, name: str) -> FakeEvent:
        with self.device.lock:
            self.device.inject(f"{self.name}: record {name}")
            assert not self.closed, f"{self.name} is closed"
            event = FakeEvent(self.device, name, self.device.watch.enqueue(self.device.agent, self.name))
            self.queue.append(event)
            self.device.settle()
            return event

    def wait(self, event: FakeEvent) -> None:  # type: ignore[override]
        with self.device.lock:
            if self.device.kept(event.name, self.name):
                self.since_last.append(event)
                self._wait(event)

    def _wait(self, event: FakeEvent) -> None:
        self.queue.append(("wait", event))
        self.device.watch.join(self.name, event.clock)

    def _mark(self) -> FakeEvent:
        """Record an internal event."""
        event = FakeEvent(self.device, "mark", self.device.watch.now(self.name))
        self.queue.append(event)
        return event

    def close(self) -> None:
        with self.device.lock:
            if self.closed:
                return
            if self.queue:
                self.device.faults.append(f"{self.name} is destroyed with work on it")
            self.device.unattached(f"{self.name} is destroyed")
            self.closed = True

    def synchronize(self) -> None:
        kept = self.device.kept(self.name, "drain")
        self.device.point(f"drain {self.name}", lambda: not self.queue or not kept)
        if kept:
            self.device.watch.join(self.device.agent, self.device.watch.now(self.name))

    def seconds(self, work: Callable[[], None], behind_wait: bool) -> float:
        """Time the work by the host's clock, in place of a device's clock."""
        begin = time.perf_counter()
        work()
        self.record("timed").synchronize()
        return time.perf_counter() - begin

    def copy(self, runs: Runs, direction: Direction) -> None:
        """Enqueue copies. H2D may read its sources at any time from the call on, in an operation that waits for nothing."""
        moves = [(int(d), int(s), int(n)) for d, s, n in zip(runs.dst, runs.src, runs.nbytes, strict=True)]
        seen = [ctypes.create_string_buffer(nbytes) for _, _, nbytes in moves]
        reads, writes = [Span(s, n, False) for _, s, n in moves], [Span(d, n, True) for d, _, n in moves]

        def read() -> None:
            for (dst, src, nbytes), held in zip(moves, seen, strict=True):
                self.device.check_host(dst if direction is Direction.D2H else src, nbytes)
                ctypes.memmove(held, src, nbytes)

        def write() -> None:
            for (dst, _, nbytes), held in zip(moves, seen, strict=True):
                ctypes.memmove(dst, held, nbytes)

        if direction is Direction.D2H or not self.device.early_reads:
            self.push(f"copy {direction}", lambda: (read(), write()), lambda: [*reads, *writes])
        else:
            with self.device.lock:
                self.device.inject(f"{self.name}: copy h2d")
                early = self.device.stream(f"{self.name}, reads")
                early.push("read", read, lambda: reads, seen)
                self.push("copy h2d", write, lambda: writes, after=early)

    def gather(self, paged, block_ids, rows, row_ids, sums, max_ctas) -> None:  # type: ignore[no-untyped-def]
        self._kernel("gather", gather_chunks, paged, block_ids, rows, row_ids, sums, max_ctas)

    def scatter(self, paged, block_ids, rows, row_ids, sums, max_ctas) -> None:  # type: ignore[no-untyped-def]
        self._kernel("scatter", scatter_chunks, paged, block_ids, rows, row_ids, sums, max_ctas)

    def _kernel(self, name, copy, paged, block_ids, rows, row_ids, sums, max_ctas) -> None:  # type: ignore[no-untyped-def]
        ids, to, row = block_ids.numpy(), rows.numpy(), row_ids.numpy()
        assert 0 < max_ctas <= 32
        assert all(tensor.data_ptr() % 16 == 0 for tensor in (block_ids, rows, row_ids, sums))  # one compilation
        gathers = name == "gather"

        def spans() -> list[Span]:
            size, stride = paged.layout.part_nbytes(ids.shape[1]), to.strides[0]
            parts = [Span(to.ctypes.data + int(r) * stride, size, gathers) for r in row]
            return [*_array(ids, False), *_array(row, False), *parts, *blocks(paged, ids, not gathers), *_sums(sums)]

        self.push(name, lambda: copy(paged, ids, to, row, sums.numpy()), spans)

    def checksum(self, paged: PagedTensors, block_ids: torch.Tensor, sums: torch.Tensor, max_ctas: int) -> None:
        ids = block_ids.numpy()
        assert 0 < max_ctas <= 32
        assert block_ids.data_ptr() % 16 == sums.data_ptr() % 16 == 0  # as a kernel that gathers wants them
        self.push(
            "checksum",
            lambda: checksum_chunks(paged, ids, sums.numpy()),
            lambda: [*_array(ids, False), *blocks(paged, ids, False), *_sums(sums)],
        )

    def push(
        self,
        name: str,
        run: Callable[[], object],
        spans: Callable[[], list[Span]],
        held: Sequence[ctypes.Array[ctypes.c_char]] = (),  # bytes that it leaves for another operation
        after: FakeStream | None = None,  # a stream with the operation's first half, which must run before this half
    ) -> None:
        """Enqueue a closure and the memory that it touches."""
        with self.device.lock:
            label = f"{self.name}: {name}"
            assert not self.closed, f"{self.name} is closed"
            if after is None:
                self.device.inject(label)
            beside = (self.last, label) in self.device.drop
            stream = self.device.stream(f"{self.name}, beside") if beside else self
            if beside:  # after everything that the last operation was after, but not after that operation itself
                assert self.before_last is not None
                for event in (self.before_last, *self.since_last):
                    stream._wait(event)
            else:
                self.before_last = self._mark()
            if after is not None:
                stream._wait(after._mark())
            stream.queue.append(Op(label, run, spans, self.device.watch.enqueue(self.device.agent, stream.name), held))
            if beside:
                self._wait(stream._mark())
            self.last, self.since_last = label, []
            self.device.settle()


class FakeDevice:
    """A fake device for one thread or several.

    `agent` names the calling thread. In the clocks of vector_clocks.py it is the host agent.
    """

    backend: Backend = "numba"

    def __init__(
        self, order: Order, drop: Iterable[Edge] = (), watch: Watch | None = None, early_reads: bool = True
    ) -> None:
        self.order, self.drop, self.early_reads = order, frozenset(drop), early_reads
        self.watch = watch or Watch()
        self.lock = threading.RLock()
        self.edges: set[Edge] = set()  # all edges that were requested, dropped or not
        self.faults: list[str] = []  # accesses and calls that a real device would have refused
        self.streams: dict[str, FakeStream] = {}
        self.memories: list[npt.NDArray[np.uint8]] = []  # all memory of the device, which is part of its state
        self.registered: dict[int, int] = {}
        self.refuse_after: int | None = None  # the driver refuses registrations after this many
        self.shifts: Callable[[int], int] = lambda address: 0
        self.node: int | None = None
        self.fail_at: tuple[str, int] | None = None  # (name of an operation, n): the n-th such operation fails
        # What ends a thread's polling, besides the event. Until then another query changes nothing, so a search treats the
        # polling as one wait. None: every query is answered at once.
        self.arrived: Callable[[], bool] | None = None
        self.points = 0
        self.seen: list[bytes] = []  # all bytes and answers that the host has read
        self.held: list[ctypes.Array[ctypes.c_char]] = []  # bytes that copies have read but not written yet
        self._agent, self._maker = threading.local(), threading.get_ident()
        self.compute = self.stream("compute")

    @property
    def agent(self) -> str:
        return getattr(self._agent, "name", "engine")

    @agent.setter
    def agent(self, name: str) -> None:
        self._agent.name = name

    def attach(self) -> None:
        self.agent = threading.current_thread().name

    def unattached(self, what: str) -> None:
        """Note a fault if this thread has no context. The thread that made the device has one."""
        if not hasattr(self._agent, "name") and threading.get_ident() != self._maker:
            self.faults.append(f"{what} by a thread without a context")

    def stream(self, name: str) -> FakeStream:
        return self.streams.setdefault(name, FakeStream(self, name))

    def record_computed(self) -> FakeEvent:
        return self.compute.record(COMPUTED)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.from_numpy(self.allocate_pinned(nbytes))

    def allocate_pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        raw = np.full(nbytes + 256, POISON, dtype=np.uint8)
        memory = raw[-raw.ctypes.data % 256 :][:nbytes]
        self.memories.append(memory)
        return memory

    def write_pinned(self, out: npt.NDArray[np.uint8], values: npt.NDArray[np.uint8]) -> None:
        self.point("fill", lambda: True)
        with self.lock:
            self.watch.host(self.agent, "fill", _array(out, True))
            out[:] = values

    def read_pinned(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        self.point("fetch", lambda: True)
        with self.lock:
            self.watch.host(self.agent, "fetch", _array(values, False))
            self.seen.append(values.tobytes())
            return values.copy()

    def register(self, address: int, nbytes: int) -> None:
        if self.refuse_after is not None and len(self.registered) >= self.refuse_after:
            raise DeviceError("out of memory")
        assert address % 4096 == nbytes % 4096 == 0
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        self.unattached("memory is unregistered")
        del self.registered[address]

    def device_address(self, address: int) -> int:
        return address + self.shifts(address)

    def numa_node(self) -> int | None:
        return self.node

    def check_host(self, address: int, nbytes: int) -> None:
        """Note a fault if a copy leaves pinned or registered memory, or crosses two registrations."""
        regions = [*self.registered.items(), *((m.ctypes.data, len(m)) for m in self.memories)]
        if not any(start <= address and address + nbytes <= start + size for start, size in regions):
            self.faults.append(f"a copy of {nbytes} bytes leaves registered memory")

    # used by an Order

    def kept(self, event: str, who: str) -> bool:
        """Note that this edge was requested. Returns False if it is dropped."""
        self.edges.add((event, who))
        return (event, who) not in self.drop

    def inject(self, label: str) -> None:
        if self.fail_at is not None and self.fail_at[0] == label:
            self.fail_at = (label, self.fail_at[1] - 1)
            if self.fail_at[1] == 0:
                raise DeviceError(f"{label}: launch failed")

    def point(self, label: str, ready: Callable[[], bool]) -> None:
        self.order.point(self, label, ready)
        self.points += 1

    def settle(self) -> None:
        """Run the waits and records at the heads of queues, as far as possible: they touch no memory."""
        moved = True
        while moved:
            moved = False
            for stream in self.streams.values():
                while stream.queue and not isinstance(head := stream.queue[0], Op):
                    if isinstance(head, FakeEvent):
                        head.done = True
                    elif not head[1].done:
                        break
                    stream.queue.popleft()
                    moved = True

    def enabled(self) -> list[FakeStream]:
        return [s for s in self.streams.values() if s.queue and isinstance(s.queue[0], Op)]

    def run(self, stream: FakeStream) -> None:
        """Run the operation at a stream's head."""
        op = stream.queue.popleft()
        assert isinstance(op, Op)
        stream.ran += 1
        try:
            spans = op.spans()
            op.run()
        except LayoutError as error:
            self.faults.append(f"{op.name}: {error}")
        else:
            self.watch.device(stream.name, op.name, spans, op.clock)
            self.held += op.held
        self.settle()

    def idle(self) -> bool:
        return not any(stream.queue for stream in self.streams.values())


def _array(array: npt.NDArray[np.generic], write: bool) -> list[Span]:
    return [Span(array.ctypes.data, array.nbytes, write)]


def _sums(sums: torch.Tensor) -> list[Span]:
    return [Span(sums.data_ptr(), sums.numel() * 8, True)]


def blocks(paged: PagedTensors, ids: npt.NDArray[np.int32], write: bool) -> Iterator[Span]:
    """Return the memory of these blocks, by the layout's formula."""
    for plane, base in zip(paged.layout.planes, paged.bases, strict=True):
        outer, stride_outer, inner, stride_inner, run = plane.runs
        for block in ids[ids >= 0]:
            for o in range(outer):
                for i in range(inner):
                    at = int(base) + int(block) * plane.stride_block + o * stride_outer + i * stride_inner
                    yield Span(at, run, write)
