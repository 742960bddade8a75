"""`kvkern record`: writes the requests that a daemon's engines had as a trace that `kvkern replay` reads.

A request is known when it has ended, and belongs where it began: lines are held back until what began before them has
most likely ended, and written in the order of their arrival. Keys become numbers in the order they are first met, so a
trace tells nothing of the prompts but which of them begin alike.
"""

from __future__ import annotations

import gzip
import heapq
import itertools
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO, cast

import msgspec

from ...errors import ConfigError
from ...policy.base import STOPS
from .. import protocol as p
from .admin_client import AdminClient

HOLD_S = 600.0  # a request that takes longer than that may be written behind later ones
MAX_HELD = 100_000  # requests
MAX_CHUNKS = 10_000_000  # distinct ones, at some 120 bytes each
_STOP_NAMES = {stop: name for name, stop in STOPS.items()}


class TraceWriter:
    """A trace file in the making. Use as a context manager; what is held back is written at its end."""

    def __init__(
        self,
        path: Path,  # .jsonl, or .jsonl.gz; must not exist
    ) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._held: list[tuple[float, int, p.Recorded]] = []
        self._serial = itertools.count()
        self._numbers: dict[bytes, int] = {}
        self._sessions: dict[int, int] = {}
        self._began_s: float | None = None
        self.requests = 0  # taken

    @property
    def chunks(self) -> int:
        """Distinct ones met."""
        return len(self._numbers)

    @property
    def full(self) -> bool:
        """Whether there are as many distinct chunks, or sessions, as are numbered."""
        return max(len(self._numbers), len(self._sessions)) >= MAX_CHUNKS

    def __enter__(self) -> TraceWriter:
        """Raises OSError, FileExistsError too."""
        zipped = self._path.suffix == ".gz"
        self._file = cast("BinaryIO", gzip.open(self._path, "xb")) if zipped else self._path.open("xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        with self._file:
            self._write_until(float("inf"), 0)

    def add(self, request: p.Recorded) -> None:
        """Take a request; it is written later."""
        heapq.heappush(self._held, (request.arrived_s, next(self._serial), request))
        self.requests += 1

    def write_old(self, now_s: float) -> None:
        """Write what began HOLD_S ago."""
        self._write_until(now_s - HOLD_S, MAX_HELD)

    def _write_until(self, until_s: float, most: int) -> None:
        assert self._file is not None
        while self._held and (self._held[0][0] <= until_s or len(self._held) > most):
            self._file.write(msgspec.json.encode(self._line(heapq.heappop(self._held)[2])) + b"\n")

    def _line(self, request: p.Recorded) -> dict[str, Any]:
        if self._began_s is None:
            self._began_s = request.arrived_s
        numbers = self._numbers
        line: dict[str, Any] = {
            "timestamp": max(0, round(1000 * (request.arrived_s - self._began_s))),
            "input_length": request.prompt_tokens,
            "hash_ids": [numbers.setdefault(key, len(numbers)) for key in p.cut_keys(request.keys)],
        }
        if request.output_tokens >= 0:
            line["output_length"] = request.output_tokens
        if request.session:
            line["session_id"] = self._sessions.setdefault(request.session, len(self._sessions))
        if request.stop in _STOP_NAMES:
            line["stop"] = _STOP_NAMES[request.stop]
        return line


def record(
    socket: Path,
    out: Path,
    requests: int | None = None,  # how many; None: until it is ended
    seconds: float | None = None,
) -> tuple[TraceWriter, str]:
    """Record until there are as many, the time is over, the daemon hangs up, or a signal comes: (writer, which of these).

    Raises ConfigError if no daemon answers or the file cannot be written.
    """
    stopped: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    end_s = time.monotonic() + seconds if seconds is not None else float("inf")
    try:
        with AdminClient(socket) as daemon, TraceWriter(out) as writer:
            for request in daemon.recorded():
                if request is not None:
                    writer.add(request)
                writer.write_old(time.time())
                if stopped:
                    return writer, "was ended"
                if time.monotonic() >= end_s:
                    return writer, "the time is over"
                if requests is not None and writer.requests >= requests:
                    return writer, "there are as many as wanted"
                if writer.full:
                    return writer, f"{MAX_CHUNKS:,} chunks are the most; record into another file"
            return writer, "the daemon has hung up: it has ended, or it was read too slowly"
    except FileExistsError as error:
        raise ConfigError(f"{out} exists; give another file") from error
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}; give another file") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
