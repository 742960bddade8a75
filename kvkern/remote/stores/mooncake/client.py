"""A client of Mooncake's library: blocking calls, and guards against the library's traps. Knows names and memory, no loop.

The behaviour of the library (0.3.13), and what this module does about it:

- Whoever reaches the node's port can read and write memory that is registered over TCP, without a password. So nothing is
  registered over TCP, which does not need it. RDMA needs registered memory, for this node's own use only. Pieces outside
  the registered memory go through blocks of this client.
- A transfer that has not ended after 60 s is reported as failed, but still writes into the buffers when its peer wakes up.
  Only closing the client ends such a transfer. So the client is closed before the call returns.
- The same key twice in a `get` fills one of the buffers and reports both. So equal keys are read one after the other.
- More than 1024 pieces on their way to one peer fail or hang. So batches are cut.
- `setup` and `close` hold Python's GIL. So `setup` contributes no memory; a separate call does that without the GIL. The port
  is given, because the library otherwise tries twenty ports, each for seconds if the master is gone.
- A call after `close` crashes the process. So calls are counted, and `close` waits for them.
- Without an RDMA device, `rdma` silently becomes TCP. So this module checks the devices.
"""

from __future__ import annotations

import ctypes
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mooncake import store as library

from ....arena.slots import round_up
from ..base import Got, Parts, RemoteError
from ..url import format_address

Bytes = npt.NDArray[np.uint8]

REGISTERED_PROTOCOLS = {"rdma"}  # protocols that move only registered memory
GIVES_UP_S = 55.0  # a transfer that fails after this may still be under way: the library's own limit is 60 s
MAX_PIECES = 1024  # under way to one peer at a time
_RDMA_DEVICES = Path("/sys/class/infiniband")
_BLOCK_NBYTES = 1 << 20
_UNMOUNT_RETRY_S = 1.0
_GLOG_LEVEL = "_ZN3fLI17FLAGS_minloglevelE"  # fLI::FLAGS_minloglevel
_FATAL = 3

_NO_ROOM, _BAD_SIZE, _NOT_READY, _NOT_FOUND, _EXISTS = -200, -600, -703, -704, -705
_NO_REPLICA, _TRANSFER_FAILED, _NO_MASTER, _LATE_MASTER = -702, -800, -900, -901
_LATE = -1_000_000  # of this module, not of the library
_THROWN = (RuntimeError, MemoryError, ValueError)  # C++ exceptions arrive as these
_ABSENT = {_NO_REPLICA, _NOT_READY, _NOT_FOUND}
_MEANING = {
    _NO_ROOM: "no room", _BAD_SIZE: "bad parameters", -707: "the lease ran out", -714: "in use", _LATE: "out of time",
    _TRANSFER_FAILED: "the node that has it is gone, or has not answered", _NO_MASTER: "the master is gone",
    _LATE_MASTER: "the master has not answered",
}  # fmt: skip


class RefusedError(RemoteError):
    """The master is there, but the client cannot be set up. Waiting does not help."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a client."""

    master: str  # host:port
    host: str  # address of this node, for its peers
    metadata: str  # P2PHANDSHAKE, or a server's URL
    protocol: str
    devices: str  # RDMA devices, separated by commas; empty: all
    segment_nbytes: int  # contributed to the store
    buffer_nbytes: int  # memory of the library, for values on disk
    replicas: int
    logs: bool
    calls: int  # transfers at a time


class MooncakeClient:
    """A connected client. Calls may overlap; each blocks, and raises RemoteError."""

    def __init__(
        self,
        settings: Settings,
        stop_waiting: threading.Event,  # set: do not wait for the master any more
    ) -> None:
        """Connect. Check first that the master is alive: setup stops the process until it answers. Raises RefusedError."""
        if settings.protocol == "rdma":
            _check_rdma_devices(settings.devices)
        if not settings.logs:
            _mute_library_log()
        self.memories: list[memoryview] = []  # registered
        self._stop_waiting = stop_waiting
        self._registers = settings.protocol in REGISTERED_PROTOCOLS
        self._regions: list[tuple[int, int]] = []  # registered memory of the caller, as [start, stop)
        self._blocks: list[Bytes] = []  # registered memory of this client that is not in use
        self._window = max(1, MAX_PIECES // 2 // settings.calls)  # values at a time, of two pieces each
        self._config = library.ReplicateConfig()
        self._config.replica_num = settings.replicas
        self._state = threading.Condition()
        self._calls = 0
        self._closing = self._closed = False
        self._segments: list[str] = []
        # A client's address is its name in the store. Nobody connects to this port; it is held so that no other client gets it.
        self._port = socket.socket()
        self._port.bind(("", 0))
        self._library = library.MooncakeDistributedStore()
        if why := self._set_up(settings):
            self.close()
            raise RefusedError(f"Mooncake's library refuses the {why}. With logs=yes it says more on stderr")

    def _set_up(self, settings: Settings) -> str:
        """Set the library up. Returns what it refuses and what to do, or an empty string."""
        name = format_address(settings.host, self._port.getsockname()[1])
        try:
            code = self._library.setup(
                name, settings.metadata, 0, settings.buffer_nbytes, settings.protocol, settings.devices, settings.master,
            )  # fmt: skip
        except _THROWN as error:
            code = str(error)
        if code:
            return (
                f"setup ({code}) with the host {settings.host}, metadata={settings.metadata}, protocol={settings.protocol}, "
                f"devices={settings.devices} and buffer={settings.buffer_nbytes}. Run a master of the library's version"
            )
        if settings.segment_nbytes:
            mounted = self._library.allocate_and_mount_segment(settings.segment_nbytes, settings.protocol, "")
            self._segments = mounted["segment_ids"]
            if mounted["ret"]:
                return f"segment of {settings.segment_nbytes} bytes ({mounted['ret']}). Contribute less: segment=SIZE"
        return ""

    @property
    def closing(self) -> bool:
        """True if it is closed or being closed."""
        return self._closing

    def close(self) -> None:
        """Wait for calls under way, then give the segment, the memory and the threads back. Later calls wait for the first.

        The library's `close` needs the master, and stops the process while the master is silent. So the segment is taken
        back first, without the GIL. That is repeated until the master answers or `stop_waiting` is set.
        """
        with self._state:
            mine, self._closing = not self._closing, True
            self._state.wait_for(lambda: not self._calls)
            if not mine:
                self._state.wait_for(lambda: self._closed)
                return
        for start, _ in self._regions:
            self._library.unregister_buffer(start)
        for block in self._blocks:
            self._library.unregister_buffer(block.ctypes.data)
        while self._segments:
            code = self._library.unmount_and_free_segment(self._segments)
            if code not in (_NO_MASTER, _LATE_MASTER) or self._stop_waiting.wait(_UNMOUNT_RETRY_S):
                break
        self._library.close()
        self._port.close()
        with self._state:
            self._closed = True
            self._state.notify_all()

    def register(self, memory: memoryview) -> None:
        """Allow transfers from and into `memory`, until `close`."""
        if self._registers:
            view = np.frombuffer(memory, dtype=np.uint8)
            with self._library_in_use() as inner:
                code = inner.register_buffer(view.ctypes.data, view.nbytes)
            if code:
                raise RefusedError(
                    f"Mooncake cannot register {view.nbytes} bytes ({code}). Raise the limit of locked memory (ulimit -l)"
                )
            self._regions.append((view.ctypes.data, view.ctypes.data + view.nbytes))
        self.memories.append(memory)

    def exists(self, names: list[str]) -> list[bool | None]:
        """Return for each name whether it is there; None: not answered. Raises RemoteError if no name was answered."""
        with self._library_in_use() as inner:
            codes = _one_code_per_name(inner.batch_is_exist(names), names)
        if max(codes, default=0) < 0:
            _raise_if_fault(codes)
        return [None if code < 0 else code == 1 for code in codes]

    def delete(self, names: list[str]) -> None:
        """Delete values. A name that is not there is no error."""
        with self._library_in_use() as inner:
            codes = _one_code_per_name(inner.batch_remove(names, True), names)  # True: even if it is read
        _raise_if_fault({*codes} - {_NOT_FOUND})

    def get(self, names: list[str], into: Sequence[Parts], deadline: float) -> list[Got]:
        """Read values. Begins nothing after `deadline` (monotonic). Raises RemoteError if no name was answered."""
        result, faults = [Got.UNKNOWN] * len(names), set()
        for rows in self._windows(names, repeated=True):
            if time.monotonic() > deadline:
                faults.add(_LATE)
                break
            asked = [names[row] for row in rows]
            with self._placed([into[row] for row in rows]) as placed:
                codes = self._transfer("batch_get_into_multi_buffers", asked, placed)
                placed.copy_out()
            for row, code, size in zip(rows, codes, self._stored_sizes(asked, codes), strict=True):
                expected = sum(piece.nbytes for piece in into[row])
                if code == expected:
                    result[row] = Got.HIT
                elif code >= 0 or size not in (None, expected):
                    result[row] = Got.WRONG_SIZE
                elif code in _ABSENT:
                    result[row] = Got.MISS
                else:
                    faults.add(code)
        if set(result) == {Got.UNKNOWN}:
            _raise_if_fault(faults)
        return result

    def put(self, names: list[str], values: Sequence[Parts], deadline: float) -> list[bool | None]:
        """Write values. False: no room; None: not answered. Begins nothing after `deadline` (monotonic).

        Raises RemoteError if no name was answered.
        """
        taken: dict[str, bool] = {}
        faults: set[int] = set()
        for rows in self._windows(names, repeated=False):
            if time.monotonic() > deadline:
                faults.add(_LATE)
                break
            asked = [names[row] for row in rows]
            with self._placed([values[row] for row in rows]) as placed:
                placed.copy_in()
                codes = self._transfer("batch_put_from_multi_buffers", asked, placed, self._config)
            answered = {0: True, _EXISTS: True, _NO_ROOM: False}
            taken |= {name: answered[code] for name, code in zip(asked, codes, strict=True) if code in answered}
            faults |= {*codes} - {*answered}
        if not taken:
            _raise_if_fault(faults)
        return [taken.get(name) for name in names]

    def _windows(self, names: Sequence[str], repeated: bool) -> Iterator[list[int]]:
        """Yield windows of rows. No name is twice in a window; a name's further rows come only if `repeated`."""
        rounds: list[list[int]] = []
        seen: Counter[str] = Counter()
        for row, name in enumerate(names):
            if seen[name] == len(rounds):
                rounds.append([])
            rounds[seen[name]].append(row)
            seen[name] += 1
        for rows in rounds if repeated else rounds[:1]:
            for at in range(0, len(rows), self._window):
                yield rows[at : at + self._window]

    # -- the library ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _library_in_use(self) -> Iterator[Any]:
        """Yield the library; `close` waits until the block has ended."""
        with self._state:
            if self._closing:
                raise RemoteError("the connection to Mooncake is being renewed")
            self._calls += 1
        try:
            yield self._library
        except _THROWN as error:
            raise RemoteError(f"Mooncake's library failed: {error}") from error
        finally:
            with self._state:
                self._calls -= 1
                self._state.notify_all()

    def _transfer(self, call: str, names: list[str], placed: _Placement, *more: object) -> list[int]:
        """Run a transfer. After it returns, nothing reads or writes the memory any more."""
        began = time.monotonic()
        with self._library_in_use() as inner:
            codes = getattr(inner, call)(names, placed.pointers, placed.sizes, *more)
        if min(codes, default=0) < 0 and time.monotonic() - began >= GIVES_UP_S:
            self.close()
        return _one_code_per_name(codes, names)

    def _stored_sizes(self, names: list[str], codes: list[int]) -> list[int | None]:
        """Return the stored sizes of values whose codes may mean a wrong size or another fault; None: not known."""
        unclear = [name for name, code in zip(names, codes, strict=True) if code in (_BAD_SIZE, _TRANSFER_FAILED)]
        sizes: dict[str, int] = {}
        if unclear and not self._closing:
            with self._library_in_use() as inner:
                replicas = inner.batch_get_replica_desc(unclear)
            for name, found in replicas.items():
                in_memory = [one.get_memory_descriptor() for one in found if one.is_memory_replica()]
                if in_memory:
                    sizes[name] = in_memory[0].buffer_descriptor.size
        return [sizes.get(name) for name in names]

    # -- memory --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _placed(self, values: Sequence[Parts]) -> Iterator[_Placement]:
        """Yield values as the library wants them. Pieces that it cannot reach lie in a block of this client meanwhile."""
        placed = _Placement()
        for value in values:
            placed.add(value, self._is_reachable)
        if not placed.staged:
            yield placed
            return
        block = self._take_block(sum(view.nbytes for _, _, view in placed.staged))
        placed.stage_in(block)
        try:
            yield placed
        finally:
            with self._state:
                self._blocks.append(block)

    def _is_reachable(self, start: int, stop: int) -> bool:
        return not self._registers or any(first <= start and stop <= last for first, last in self._regions)

    def _take_block(self, nbytes: int) -> Bytes:
        """Return a registered block. There are at most as many blocks as calls at a time, each as large as the largest call."""
        with self._state:
            fitting = next((i for i, block in enumerate(self._blocks) if block.nbytes >= nbytes), None)
            if fitting is not None:
                return self._blocks.pop(fitting)
            small = self._blocks.pop() if self._blocks else None
        block = np.zeros(round_up(nbytes, _BLOCK_NBYTES), dtype=np.uint8)
        with self._library_in_use() as inner:
            if small is not None:
                inner.unregister_buffer(small.ctypes.data)
            code = inner.register_buffer(block.ctypes.data, block.nbytes)
        if code:
            raise RemoteError(
                f"Mooncake cannot register {block.nbytes} bytes ({code}). Raise the limit of locked memory"
            )
        return block


@dataclass(slots=True)
class _Placement:
    """Where the pieces of values lie: addresses and sizes, one list per value. Adjacent pieces are joined."""

    pointers: list[list[int]] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    staged: list[tuple[int, int, Bytes]] = field(default_factory=list)  # value, piece, the caller's memory
    _ours: list[Bytes] = field(default_factory=list)  # the block's memory for each staged piece

    def add(self, value: Parts, is_reachable: Callable[[int, int], bool]) -> None:
        """Add a value. Pieces that are not reachable are noted in `staged`."""
        pointers: list[int] = []
        sizes: list[int] = []
        end = 0  # end of the piece before, if the next one may be joined to it
        for piece in value:
            nbytes = piece.nbytes
            if not nbytes:
                continue
            view = np.frombuffer(piece, dtype=np.uint8)
            start = view.__array_interface__["data"][0]
            if not is_reachable(start, start + nbytes):
                self.staged.append((len(self.pointers), len(pointers), view))
                start, end = 0, 0
            elif start == end:
                sizes[-1] += nbytes
                end += nbytes
                continue
            else:
                end = start + nbytes
            pointers.append(start)
            sizes.append(nbytes)
        self.pointers.append(pointers)
        self.sizes.append(sizes)

    def stage_in(self, block: Bytes) -> None:
        """Place the staged pieces in `block`, one behind the other."""
        at = 0
        for value, piece, view in self.staged:
            ours = block[at : at + view.nbytes]
            self.pointers[value][piece] = ours.ctypes.data
            self._ours.append(ours)
            at += view.nbytes

    def copy_in(self) -> None:
        """Copy the staged pieces into the block, before a write."""
        for (_, _, view), ours in zip(self.staged, self._ours, strict=True):
            ours[:] = view

    def copy_out(self) -> None:
        """Copy the staged pieces out of the block, after a read."""
        for (_, _, view), ours in zip(self.staged, self._ours, strict=True):
            view[:] = ours


def own_address(master: str, port: int) -> str:
    """Return the address from which this node reaches the master. Blocks for the name server. Raises RemoteError."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as sock:
                sock.connect(address)
                return str(sock.getsockname()[0])
    except OSError as error:
        raise RemoteError(f"The Mooncake master {master} cannot be reached: {error}") from error
    raise RemoteError(f"The Mooncake master {master} has no address. Check its name")


def _check_rdma_devices(devices: str) -> None:
    here = {path.name for path in _RDMA_DEVICES.iterdir()} if _RDMA_DEVICES.is_dir() else set()
    wanted = {name.strip() for name in devices.split(",") if name.strip()}
    if not here or wanted - here:
        raise RefusedError(
            f"This node has no RDMA device {', '.join(sorted(wanted - here)) or 'at all'}; "
            f"{_RDMA_DEVICES} has {', '.join(sorted(here)) or 'none'}. Name one of these, or say protocol=tcp"
        )


def _mute_library_log() -> None:
    """Mute the library. It always logs to stderr and has no call to stop that, so this sets glog's level in memory."""
    with suppress(OSError, ValueError):
        level = ctypes.c_int.in_dll(ctypes.CDLL(library.__file__), _GLOG_LEVEL)
        if level.value == 0:  # nobody has chosen a level
            level.value = _FATAL


def _one_code_per_name(codes: list[int], names: list[str]) -> list[int]:
    if len(codes) != len(names):
        raise RemoteError(f"Mooncake gave {len(codes)} answers for {len(names)} names")
    return codes


def _raise_if_fault(codes: Collection[int]) -> None:
    worst = min(codes, default=0)
    if worst < 0:
        raise RemoteError(f"Mooncake answered {worst}: {_MEANING.get(worst, 'see its ErrorCode')}")
