"""Reads request traces in the Mooncake format: one JSON object a line, plain or gzipped.

    timestamp (ms), hash_ids (prefix-chained chunk ids), and where known output_length, session_id, stop

Equal ids must name equal chunks with equal prefixes. This is not checked: a trace that breaks the rule gets meaningless hit
ratios, but no crash. Lines without ids are skipped. If a request's time is earlier than the one before, it is replayed at
the latest time so far, and counted.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, BinaryIO, cast

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3
from msgspec import Meta

from ..errors import ConfigError
from ..policy.base import STOPS, Stop

_MAX_CHAIN = 1 << 20  # chunks of one request


class _Line(msgspec.Struct):
    timestamp: Annotated[float, Meta(ge=0)]
    hash_ids: Annotated[list[Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]], Meta(max_length=_MAX_CHAIN)]
    output_length: Annotated[int, Meta(ge=-1, lt=1 << 31)] = -1
    session_id: int | str | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Trace:
    """Requests in order of time, with their chunks as indexes into `keys`."""

    name: str
    times_s: npt.NDArray[np.float64]  # [requests], from 0
    ends: npt.NDArray[np.int64]  # [requests]; request i has chunks [ends[i - 1], ends[i])
    chunks: npt.NDArray[np.int32]  # [chunk refs]
    output_tokens: npt.NDArray[np.int32]  # [requests], -1: unknown
    stops: npt.NDArray[np.int8]  # [requests]
    sessions: npt.NDArray[np.int64]  # [requests], 0: unknown
    num_unique: int
    num_backwards: int  # requests with an earlier time than the request above them

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def num_refs(self) -> int:
        """Number of chunks of all requests together."""
        return len(self.chunks)

    @cached_property
    def keys(self) -> list[bytes]:
        """A 32-byte key for every distinct chunk, derived from its index."""
        return [blake3(b"%d" % number).digest() for number in range(self.num_unique)]


def trace_name(path: Path) -> str:
    """Return the name that results use for a trace: the file name without its endings."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def read_trace(path: Path) -> Trace:
    """Read a whole trace. Raises ConfigError with file, line and fault."""
    times, stops, outputs, sessions, lengths = [], [], [], [], []
    ids: list[npt.NDArray[np.int64]] = []
    numbers: dict[int | str, int] = {}
    decoder = msgspec.json.Decoder(_Line)
    try:
        with _open(path) as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    line = decoder.decode(text)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise ConfigError(
                        f"{path}:{number}: {error}; expected one request in the Mooncake format"
                    ) from error
                if line.hash_ids:
                    times.append(line.timestamp / 1000)
                    outputs.append(line.output_length)
                    stops.append(STOPS.get(line.stop or "", Stop.UNKNOWN))
                    known = line.session_id is not None
                    sessions.append(numbers.setdefault(line.session_id, len(numbers) + 1) if known else 0)  # type: ignore[arg-type]
                    lengths.append(len(line.hash_ids))
                    ids.append(np.array(line.hash_ids, dtype=np.int64))
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read {path}: {error}; give a .jsonl or .jsonl.gz file") from error
    if not ids:
        raise ConfigError(f"{path} has no request with hash_ids, so there is nothing to replay; give another trace")
    unique, chunks = np.unique(np.concatenate(ids), return_inverse=True)
    raw = np.array(times)
    forward = np.maximum.accumulate(raw)
    return Trace(
        name=trace_name(path),
        times_s=forward - forward[0],
        ends=np.cumsum(lengths),
        chunks=chunks.astype(np.int32),
        output_tokens=np.array(outputs, dtype=np.int32),
        stops=np.array(stops, dtype=np.int8),
        sessions=np.array(sessions, dtype=np.int64),
        num_unique=len(unique),
        num_backwards=int((raw[1:] < forward[:-1]).sum()),
    )


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
