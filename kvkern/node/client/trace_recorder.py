"""`kvkern record`: writes the requests of a daemon's engines as a trace that `kvkern replay` reads.

A request is reported when it ends, but the trace is in order of arrival. So a request is held back for HOLD_S: by then the
requests that arrived before it have most likely ended. Arrivals are counted by this process's monotonic clock, so a wall clock
that is set meanwhile neither holds requests back nor reorders them. Keys become numbers in the order in which they first occur,
so a trace shows which prompts begin alike and nothing else about them.
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
from .. import framing
from .. import protocol as p
from .admin_client import AdminClient

HOLD_S = 600.0  # a request that takes longer may be written behind requests that arrived later
MAX_AGE_S = 3600.0  # no request takes longer: if one seems to, the wall clock was set just then
MAX_HELD = 100_000  # requests held back
MAX_CHUNKS = 10_000_000  # distinct chunks that are numbered, at some 120 bytes each
_STOP_NAMES = {stop: name for name, stop in STOPS.items()}


class TraceWriter:
    """Writes a trace file. Use as a context manager; requests that are still held back are written at its end."""

    def __init__(
        self,
        path: Path,  # .jsonl or .jsonl.gz; must not exist
    ) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._held: list[tuple[float, int, p.Recorded]] = []
        self._serial = itertools.count()  # orders requests that arrived at the same time
        self._chunk_numbers: dict[bytes, int] = {}
        self._session_numbers: dict[int, int] = {}
        self._began_s: float | None = None
        self.requests = 0  # added so far

    @property
    def chunks(self) -> int:
        """The number of distinct chunks so far."""
        return len(self._chunk_numbers)

    @property
    def full(self) -> bool:
        """Return True if MAX_CHUNKS distinct chunks, or sessions, have been numbered."""
        return max(len(self._chunk_numbers), len(self._session_numbers)) >= MAX_CHUNKS

    def __enter__(self) -> TraceWriter:
        """Create the file. Raises OSError; FileExistsError if the file exists."""
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
        """Add a request. It is written later."""
        heapq.heappush(self._held, (request.arrived_s, next(self._serial), request))
        self.requests += 1

    def write_due(self, now_s: float) -> None:
        """Write the requests that arrived at least HOLD_S before `now_s`, and the oldest above MAX_HELD."""
        self._write_until(now_s - HOLD_S, MAX_HELD)

    def _write_until(self, until_s: float, max_held: int) -> None:
        assert self._file is not None
        while self._held and (self._held[0][0] <= until_s or len(self._held) > max_held):
            self._file.write(msgspec.json.encode(self._line(heapq.heappop(self._held)[2])) + b"\n")

    def _line(self, request: p.Recorded) -> dict[str, Any]:
        if self._began_s is None:
            self._began_s = request.arrived_s
        numbers = self._chunk_numbers
        line: dict[str, Any] = {
            "timestamp": max(0, round(1000 * (request.arrived_s - self._began_s))),
            "input_length": request.prompt_tokens,
            "hash_ids": [numbers.setdefault(key, len(numbers)) for key in framing.split_keys(request.keys)],
        }
        if request.output_tokens >= 0:
            line["output_length"] = request.output_tokens
        if request.session:
            line["session_id"] = self._session_numbers.setdefault(request.session, len(self._session_numbers))
        if request.stop in _STOP_NAMES:
            line["stop"] = _STOP_NAMES[request.stop]
        return line


def on_steady_clock(request: p.Recorded) -> p.Recorded:
    """Return a request that came just now, with its arrival by this process's monotonic clock."""
    age_s = min(max(0.0, time.time() - request.arrived_s), MAX_AGE_S)
    return msgspec.structs.replace(request, arrived_s=time.monotonic() - age_s)


def record(
    socket: Path,
    out: Path,
    requests: int | None = None,  # end after this many; None: no limit
    seconds: float | None = None,  # end after this long; None: no limit
    daemon_uid: int = -1,  # a user that may serve, beside root and this process's own; negative: none
) -> tuple[TraceWriter, str]:
    """Record until `requests` or `seconds` are reached, the daemon hangs up, or SIGINT or SIGTERM arrives.

    Returns (the writer, why the recording ended). Call in the main thread, because signal handlers are set meanwhile.

    Raises ConfigError if no daemon answers, it refuses, or the file cannot be written.
    """
    stopped: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    end_s = time.monotonic() + seconds if seconds is not None else float("inf")
    try:
        with AdminClient(socket, daemon_uid) as daemon, TraceWriter(out) as writer:
            for request in daemon.recorded_requests():
                if request is not None:
                    writer.add(on_steady_clock(request))
                writer.write_due(time.monotonic())
                if stopped:
                    return writer, "a signal ended it"
                if time.monotonic() >= end_s:
                    return writer, f"{seconds:g} seconds are over"
                if requests is not None and writer.requests >= requests:
                    return writer, f"{requests:,} requests are recorded"
                if writer.full:
                    return (
                        writer,
                        f"the limit of {MAX_CHUNKS:,} distinct chunks or sessions is reached; record into another file",
                    )
            return writer, "the daemon hung up: it has ended, or this recorder read too slowly"
    except FileExistsError as error:
        raise ConfigError(f"{out} exists; give another file") from error
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}; give another file") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
