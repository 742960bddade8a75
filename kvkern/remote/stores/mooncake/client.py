"""One client of Mooncake's library: blocking calls, and what they need not to hurt. Knows names and memory, no loop.

What the library (0.3.13) does, and what is done about it here:

- Memory registered over TCP is open to whoever reaches the node's port, to read and to write, without a password. So
  over TCP nothing is registered, which it does not need. RDMA needs it, for this node's own use only; pieces outside of
  what is registered go through memory of our own.
- A transfer that has not ended after 60 s is reported as failed, and still writes into the buffers when its peer wakes
  up. Such a client is taken down before the call returns: only that ends what it has begun.
- The same key twice in a `get` fills one of the buffers and reports both. So equal keys are read one after the other.
- More than 1024 pieces on their way to one peer fail, or hang. So batches are cut.
- `setup` and `close` hold Python's lock. Setup contributes no memory, which is done in a call of its own, without the
  lock. The port is given: otherwise it tries twenty of them, each for seconds if the master is gone.
- A call after `close` crashes the process. So calls are counted, and `close` waits for them.
- Without an RDMA device, `rdma` quietly becomes TCP. So devices are looked for.
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

Bytes = npt.NDArray[np.uint8]

REGISTERED_PROTOCOLS = {"rdma"}  # those that move only registered memory
GIVES_UP_S = 55.0  # a transfer that fails after this long has perhaps not ended: the library's own limit is 60
MAX_PIECES = 1024  # under way to one peer
_RDMA_DEVICES = Path("/sys/class/infiniband")
_BLOCK_NBYTES = 1 << 20
_UNMOUNT_RETRY_S = 1.0
_GLOG_LEVEL = "_ZN3fLI17FLAGS_minloglevelE"  # fLI::FLAGS_minloglevel
_FATAL = 3

_NO_ROOM, _BAD_SIZE, _NOT_READY, _NOT_FOUND, _EXISTS = -200, -600, -703, -704, -705
_NO_REPLICA, _TRANSFER_FAILED, _NO_MASTER, _LATE_MASTER = -702, -800, -900, -901
_LATE = -1_000_000  # ours
_THROWN = (RuntimeError, MemoryError, ValueError)  # what becomes of C++ exceptions
_ABSENT = {_NO_REPLICA, _NOT_READY, _NOT_FOUND}
_MEANING = {
    _NO_ROOM: "no room", _BAD_SIZE: "bad parameters", -707: "the lease ran out", -714: "in use", _LATE: "out of time",
    _TRANSFER_FAILED: "the node that has it is gone, or has not answered", _NO_MASTER: "the master is gone",
    _LATE_MASTER: "the master has not answered",
}  # fmt: skip


class RefusedError(RemoteError):
    """The master is there and the client cannot be set up: no waiting will mend that."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a client is set up with."""

    master: str  # host:port
    host: str  # of this node, for its peers
    metadata: str  # P2PHANDSHAKE, or a server's URL
    protocol: str
    devices: str  # of RDMA, separated by commas; none: all
    segment_nbytes: int  # contributed to the store
    buffer_nbytes: int  # the library's, for values on disk
    replicas: int
    logs: bool
    calls: int  # transfers at once


class MooncakeClient:
    """Made, it is connected. Calls may overlap; each blocks. They raise RemoteError."""

    def __init__(
        self,
        settings: Settings,
        hurry: threading.Event,  # set: do not wait for the master any more
    ) -> None:
        """Raises RefusedError. Ask the master for a sign of life first: setup stops the whole process until it answers."""
        if settings.protocol == "rdma":
            _look_for_devices(settings.devices)
        if not settings.logs:
            _mute()
        self.memories: list[memoryview] = []  # registered
        self._hurry = hurry
        self._registers = settings.protocol in REGISTERED_PROTOCOLS
        self._regions: list[tuple[int, int]] = []  # [start, stop) that is registered, and the caller's
        self._blocks: list[Bytes] = []  # ours, registered, not in use
        self._window = max(1, MAX_PIECES // 2 // settings.calls)  # values of two pieces
        self._config = library.ReplicateConfig()
        self._config.replica_num = settings.replicas
        self._state = threading.Condition()
        self._calls = 0
        self._leaving = self._closed = False
        self._segments: list[str] = []
        # An address is a client's name in the store. Nobody connects to this port: it is held so that no other has it.
        self._port = socket.socket()
        self._port.bind(("", 0))
        self._library = library.MooncakeDistributedStore()
        if why := self._set_up(settings):
            self.close()
            raise RefusedError(f"Mooncake's library takes no {why}; with logs=yes it says more on stderr")

    def _set_up(self, settings: Settings) -> str:
        """What it does not take, if anything."""
        name = address(settings.host, self._port.getsockname()[1])
        try:
            code = self._library.setup(
                name, settings.metadata, 0, settings.buffer_nbytes, settings.protocol, settings.devices, settings.master,
            )  # fmt: skip
        except _THROWN as error:
            code = str(error)
        if code:
            return (
                f"setup ({code}) with the host {settings.host}, metadata={settings.metadata}, protocol={settings.protocol}, "
                f"devices={settings.devices} and buffer={settings.buffer_nbytes}; the master has to be of its version"
            )
        if settings.segment_nbytes:
            mounted = self._library.allocate_and_mount_segment(settings.segment_nbytes, settings.protocol, "")
            self._segments = mounted["segment_ids"]
            if mounted["ret"]:
                return f"segment of {settings.segment_nbytes} bytes ({mounted['ret']}): contribute less"
        return ""

    @property
    def gone(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._leaving

    def close(self) -> None:
        """Wait for calls under way; give the segment, the memory and the threads back. Once, whoever calls.

        `close` of the library needs the master, and stops the process for as long as that is silent. So the segment is
        taken back first, without the lock, as often as it takes until the master answers, or there is hurry.
        """
        with self._state:
            mine, self._leaving = not self._leaving, True
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
            if code not in (_NO_MASTER, _LATE_MASTER) or self._hurry.wait(_UNMOUNT_RETRY_S):
                break
        self._library.close()
        self._port.close()
        with self._state:
            self._closed = True
            self._state.notify_all()

    def register(self, memory: memoryview) -> None:
        """For transfers from and into it. Until `close`."""
        if self._registers:
            view = np.frombuffer(memory, dtype=np.uint8)
            with self._inside() as inner:
                code = inner.register_buffer(view.ctypes.data, view.nbytes)
            if code:
                raise RefusedError(
                    f"Mooncake cannot register {view.nbytes} bytes ({code}): the limit of locked memory must allow it"
                )
            self._regions.append((view.ctypes.data, view.ctypes.data + view.nbytes))
        self.memories.append(memory)

    def exists(self, names: list[str]) -> list[bool | None]:
        """None: not answered. Raises RemoteError if nothing was."""
        with self._inside() as inner:
            codes = _checked(inner.batch_is_exist(names), names)
        if max(codes, default=0) < 0:
            _raise_if_fault(codes)
        return [None if code < 0 else code == 1 for code in codes]

    def delete(self, names: list[str]) -> None:
        with self._inside() as inner:
            codes = _checked(inner.batch_remove(names, True), names)  # True: whoever may still be reading it
        _raise_if_fault({*codes} - {_NOT_FOUND})

    def get(self, names: list[str], into: Sequence[Parts], deadline: float) -> list[Got]:
        """Raises RemoteError if nothing was answered. Nothing is begun after `deadline` (monotonic)."""
        result, faults = [Got.UNKNOWN] * len(names), set()
        for rows in self._windows(names, repeated=True):
            if time.monotonic() > deadline:
                faults.add(_LATE)
                break
            asked = [names[row] for row in rows]
            with self._placed([into[row] for row in rows]) as placed:
                codes = self._move("batch_get_into_multi_buffers", asked, placed)
                placed.bring_back()
            for row, code, size in zip(rows, codes, self._sizes(asked, codes), strict=True):
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
        """None: not answered. Raises RemoteError if nothing was. Nothing is begun after `deadline` (monotonic)."""
        taken: dict[str, bool] = {}
        faults: set[int] = set()
        for rows in self._windows(names, repeated=False):
            if time.monotonic() > deadline:
                faults.add(_LATE)
                break
            asked = [names[row] for row in rows]
            with self._placed([values[row] for row in rows]) as placed:
                placed.take_along()
                codes = self._move("batch_put_from_multi_buffers", asked, placed, self._config)
            answered = {0: True, _EXISTS: True, _NO_ROOM: False}
            taken |= {name: answered[code] for name, code in zip(asked, codes, strict=True) if code in answered}
            faults |= {*codes} - {*answered}
        if not taken:
            _raise_if_fault(faults)
        return [taken.get(name) for name in names]

    def _windows(self, names: Sequence[str], repeated: bool) -> Iterator[list[int]]:
        """Rows, not too many at once, and no name twice in them; a name's second and further rows only if `repeated`."""
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
    def _inside(self) -> Iterator[Any]:
        """The library, which is not closed meanwhile."""
        with self._state:
            if self._leaving:
                raise RemoteError("the connection to Mooncake is being made anew")
            self._calls += 1
        try:
            yield self._library
        except _THROWN as error:
            raise RemoteError(f"Mooncake's library: {error}") from error
        finally:
            with self._state:
                self._calls -= 1
                self._state.notify_all()

    def _move(self, call: str, names: list[str], placed: _Placed, *more: object) -> list[int]:
        """A transfer. When this returns, nothing reads or writes the memory any more."""
        began = time.monotonic()
        with self._inside() as inner:
            codes = getattr(inner, call)(names, placed.pointers, placed.sizes, *more)
        if min(codes, default=0) < 0 and time.monotonic() - began >= GIVES_UP_S:
            self.close()
        return _checked(codes, names)

    def _sizes(self, names: list[str], codes: list[int]) -> list[int | None]:
        """Of those values whose codes may mean that the size is wrong, and may not; None if that is not known."""
        unclear = [name for name, code in zip(names, codes, strict=True) if code in (_BAD_SIZE, _TRANSFER_FAILED)]
        sizes: dict[str, int] = {}
        if unclear and not self._leaving:
            with self._inside() as inner:
                replicas = inner.batch_get_replica_desc(unclear)
            for name, found in replicas.items():
                in_memory = [one.get_memory_descriptor() for one in found if one.is_memory_replica()]
                if in_memory:
                    sizes[name] = in_memory[0].buffer_descriptor.size
        return [sizes.get(name) for name in names]

    # -- memory --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _placed(self, values: Sequence[Parts]) -> Iterator[_Placed]:
        """Values as the library wants them. What it could not reach itself lies in a block of ours meanwhile."""
        placed = _Placed()
        for value in values:
            placed.add(value, self._reaches)
        if not placed.aside:
            yield placed
            return
        block = self._take_block(sum(view.nbytes for _, _, view in placed.aside))
        placed.settle(block)
        try:
            yield placed
        finally:
            with self._state:
                self._blocks.append(block)

    def _reaches(self, start: int, stop: int) -> bool:
        return not self._registers or any(first <= start and stop <= last for first, last in self._regions)

    def _take_block(self, nbytes: int) -> Bytes:
        """Registered memory. There are never more blocks than calls at once, and each is as large as the largest call."""
        with self._state:
            fitting = next((i for i, block in enumerate(self._blocks) if block.nbytes >= nbytes), None)
            if fitting is not None:
                return self._blocks.pop(fitting)
            small = self._blocks.pop() if self._blocks else None
        block = np.zeros(round_up(nbytes, _BLOCK_NBYTES), dtype=np.uint8)
        with self._inside() as inner:
            if small is not None:
                inner.unregister_buffer(small.ctypes.data)
            code = inner.register_buffer(block.ctypes.data, block.nbytes)
        if code:
            raise RemoteError(f"Mooncake cannot register {block.nbytes} bytes ({code})")
        return block


@dataclass(slots=True)
class _Placed:
    """Where the pieces of values lie: addresses and sizes, a list a value. Pieces that touch are one."""

    pointers: list[list[int]] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    aside: list[tuple[int, int, Bytes]] = field(default_factory=list)  # value, piece, the caller's memory
    _ours: list[Bytes] = field(default_factory=list)  # of each aside

    def add(self, value: Parts, reaches: Callable[[int, int], bool]) -> None:
        pointers: list[int] = []
        sizes: list[int] = []
        end = 0  # of the piece before, if the next one may be joined to it
        for piece in value:
            nbytes = piece.nbytes
            if not nbytes:
                continue
            view = np.frombuffer(piece, dtype=np.uint8)
            start = view.__array_interface__["data"][0]
            if not reaches(start, start + nbytes):
                self.aside.append((len(self.pointers), len(pointers), view))
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

    def settle(self, block: Bytes) -> None:
        """What is aside lies there, one behind the other."""
        at = 0
        for value, piece, view in self.aside:
            ours = block[at : at + view.nbytes]
            self.pointers[value][piece] = ours.ctypes.data
            self._ours.append(ours)
            at += view.nbytes

    def take_along(self) -> None:
        for (_, _, view), ours in zip(self.aside, self._ours, strict=True):
            ours[:] = view

    def bring_back(self) -> None:
        for (_, _, view), ours in zip(self.aside, self._ours, strict=True):
            view[:] = ours


def own_address(master: str, port: int) -> str:
    """The address of this node from which it reaches the master. Blocks for a name server. Raises RemoteError."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as sock:
                sock.connect(address)
                return str(sock.getsockname()[0])
    except OSError as error:
        raise RemoteError(f"{master} cannot be reached: {error}") from error
    raise RemoteError(f"{master} has no address")


def address(host: str, port: int) -> str:
    """As the library and its peers write one."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _look_for_devices(devices: str) -> None:
    here = {path.name for path in _RDMA_DEVICES.iterdir()} if _RDMA_DEVICES.is_dir() else set()
    wanted = {name.strip() for name in devices.split(",") if name.strip()}
    if not here or wanted - here:
        raise RefusedError(
            f"this node has no RDMA device {', '.join(sorted(wanted - here)) or 'at all'}; "
            f"{_RDMA_DEVICES} has {', '.join(sorted(here)) or 'none'}"
        )


def _mute() -> None:
    """The library logs to stderr, errors or not, and has no call to stop that: glog's own level is set where it lies."""
    with suppress(OSError, ValueError):
        level = ctypes.c_int.in_dll(ctypes.CDLL(library.__file__), _GLOG_LEVEL)
        if level.value == 0:  # nobody has chosen one
            level.value = _FATAL


def _checked(codes: list[int], names: list[str]) -> list[int]:
    if len(codes) != len(names):
        raise RemoteError(f"Mooncake has answered {len(codes)} times to {len(names)} names")
    return codes


def _raise_if_fault(codes: Collection[int]) -> None:
    worst = min(codes, default=0)
    if worst < 0:
        raise RemoteError(f"Mooncake's answer is {worst}: {_MEANING.get(worst, 'see its ErrorCode')}")
