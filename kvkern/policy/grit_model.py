"""GRIT's statistics: how soon chunks of a class come back, and how much a slot spent on them is worth.

    observe   e[class, bin] += w            a chunk came back at this age
              x[class, bin] += w * seconds  time spent waiting at this age, ended by a return or not
              w = 2.4 / n^(3/4)             weight of each of a request's n chunks: they return together,
                                            so n chunks count as 2.4 n^(1/4)
    fit       l0[bin]      = (sum e + k) / (sum x + k * age / 0.2)                   the prior 0.2 / age is LRU
              r_f[level, band]  by iterative proportional fitting of   l(class, bin) = l0[bin] * prod_f r_f[level, band]
              lambda(class, bin) = (e + K) / (x + K / l(class, bin))                 shrunk to the model
    index     G(class, age) = max_H  P(return within H | age) / (E[min(return, H) | age] + 1 s)

A MAIN class is a product of coarse features of a request. A TRUNK class is for chunks that many sessions share: the octave
of the chunk's own smoothed gap. G is the Gittins index of a slot: the most returns per chunk-second that keeping the chunk
can buy.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ..bounded_dict import BoundedDict
from ..errors import ConfigError
from ..kernels.jit import compiled

F = TypeVar("F", bound=Callable[..., Any])


def njit(function: F) -> F:
    """Compile on first use and keep the result on disk if that is possible; see kernels.jit.

    The function runs without the GIL. Its callers still hold the tier's lock.
    """
    return compiled(nogil=True)(function)  # type: ignore[no-any-return]


UNIT_S = 0.25  # unit of the bins' edges
NUM_BINS = 38  # half octaves of age: [0, sqrt 2), [sqrt 2, 2), ... units; the last is open above 26 h
EDGES = UNIT_S * np.concatenate([[0.0], 2.0 ** (np.arange(1, NUM_BINS + 1) / 2)])
NUM_BANDS = 6
BAND = np.searchsorted([20.0, 60.0, 120.0, 240.0, 600.0], EDGES[1:])  # [NUM_BINS] age band of a bin, by its end in s

SIZES = np.array([4, 4, 5, 4, 3, 6, 3])  # levels of turn, new, gap, rhythm, length, output, stop: see main_class
NUM_MAIN = int(SIZES.prod())
NUM_TRUNK = 18  # octaves of a chunk's own gap
NUM_CLASSES = NUM_MAIN + NUM_TRUNK
LEVELS = np.stack(np.unravel_index(np.arange(NUM_MAIN), tuple(SIZES)), axis=1).astype(np.int64)  # [NUM_MAIN, 7]

VERSION = 1  # of `GritModel.dump`
_LAYOUT = [NUM_BINS, NUM_TRUNK, *SIZES.tolist()]

HALF_LIFE_S = 86400.0  # of all that was learned
PRIOR = 0.2  # hazard * age before anything is known
BASE_WEIGHT = 1.0  # k: events that the prior is worth in a bin
CLASS_WEIGHT = 30.0  # K: events that the model is worth in a class and bin
LEVEL_WEIGHT = 8.0  # events that a factor of 1 is worth in a level and band
SWEEPS = 3
OPEN_REQUESTS = 4096  # requests that are remembered, so that their later calls are recognised
OPEN_SESSIONS = 16384  # sessions named by callers that are remembered, so that their turns are counted
LEAST_S = 1.0  # least cost of a decision to keep a chunk: without it a burst within a second would look too valuable


@njit
def bin_of(age: float) -> int:
    """Return the bin of an age in seconds."""
    if age < EDGES[1]:
        return 0
    return min(int(2.0 * np.log2(age / UNIT_S)), NUM_BINS - 1)


@njit
def add_exposure(x: Any, cls: int, begin: float, end: float, weight: float) -> None:
    """Add the time between two ages, in seconds, to the exposure of a class."""
    b = bin_of(begin)
    while begin < end:
        stop = end if b == NUM_BINS - 1 else min(end, EDGES[b + 1])
        x[cls, b] += weight * (stop - begin)
        begin = stop
        b += 1


@njit
def _octaves(ratio: float) -> int:
    """Return 0 for a ratio below 2, 1 below 4, and so on."""
    return int(np.log2(max(ratio, 1.0)))


@njit
def main_class(
    turn: int,  # of the session, from 1
    new: int,  # chunks that were not known
    gap_s: float,  # since the session's last turn; -1: none
    rhythm_s: float,  # of the session's turns, smoothed; -1: none
    length: int,  # chunks
    output_tokens: int,  # of the reply; -1: unknown
    stop: int,  # `Stop`
) -> int:
    """Return the class of a request."""
    t = 0 if turn <= 1 else 1 if turn == 2 else 2 if turn <= 4 else 3
    n = 0 if new <= 1 else 1 if new <= 4 else 2 if new <= 15 else 3
    g = 0 if gap_s < 0 else 1 if gap_s < 15 else 2 if gap_s < 60 else 3 if gap_s < 300 else 4
    r = 0 if rhythm_s < 0 else 1 if rhythm_s < 15 else 2 if rhythm_s < 60 else 3
    m = 0 if length < 12 else 1 if length < 64 else 2
    o = 0 if output_tokens < 0 else min(1 + _octaves(output_tokens / 50.0), 5)
    s = min(max(stop, 0), 2)
    return (((((t * 4 + n) * 5 + g) * 4 + r) * 3 + m) * 6 + o) * 3 + s


@njit
def trunk_class(gap_s: float) -> int:
    """Return the class of a chunk that many sessions share, from its own smoothed gap in seconds."""
    return NUM_MAIN + min(max(int(np.log2(max(gap_s, 1e-3)) + 1.0), 0), NUM_TRUNK - 1)


@njit
def _fit_factors_once(e: Any, x: Any, base: Any, rho: Any, active: Any) -> None:
    """Do one round of iterative proportional fitting of `rho` [features, levels, bands] to the active classes."""
    num = np.zeros(rho.shape[1:])
    den = np.zeros(rho.shape[1:])
    for f in range(len(SIZES)):
        num[:] = 0.0
        den[:] = 0.0
        for c in active:
            level = LEVELS[c, f]
            for band in range(NUM_BANDS):
                factor = 1.0
                for other in range(len(SIZES)):
                    if other != f:
                        factor *= rho[other, LEVELS[c, other], band]
                for b in range(NUM_BINS):
                    if BAND[b] == band:
                        num[level, band] += e[c, b]
                        den[level, band] += x[c, b] * base[b] * factor
        for level in range(SIZES[f]):
            for band in range(NUM_BANDS):
                rho[f, level, band] = (num[level, band] + LEVEL_WEIGHT) / (den[level, band] + LEVEL_WEIGHT)


@njit
def _model_hazard(base: Any, rho: Any, cls: int, out: Any) -> None:
    """Write the hazard of a class before its own events count to `out`: [NUM_BINS], 1/s."""
    for b in range(NUM_BINS):
        age = 0.5 * (EDGES[b] + EDGES[b + 1])
        if cls < NUM_MAIN:
            out[b] = base[b]
            for f in range(len(SIZES)):
                out[b] *= rho[f, LEVELS[cls, f], BAND[b]]
        else:
            gap = 2.0 ** (cls - NUM_MAIN - 0.5)
            out[b] = 1.0 / gap if age < 2.0 * gap else 0.5 / age


@njit
def index_class(e: Any, x: Any, base: Any, rho: Any, cls: int, hazard: Any, index: Any) -> None:
    """Compute hazard[cls], lambda in every bin, and index[cls], G at the begin of every bin. Both in 1/s."""
    rate = np.empty(NUM_BINS)
    _model_hazard(base, rho, cls, rate)
    miss = np.empty(NUM_BINS)  # probability of no return in a bin
    wait = np.empty(NUM_BINS)  # expected seconds of waiting in a bin
    for b in range(NUM_BINS):
        l = max((e[cls, b] + CLASS_WEIGHT) / (x[cls, b] + CLASS_WEIGHT / rate[b]), 1e-12)
        hazard[cls, b] = l
        miss[b] = np.exp(-l * (EDGES[b + 1] - EDGES[b]))
        wait[b] = (1.0 - miss[b]) / l
    for b in range(NUM_BINS):
        alive, returns, seconds, best = 1.0, 0.0, 0.0, 0.0
        for h in range(b, NUM_BINS):
            returns += alive * (1.0 - miss[h])
            seconds += alive * wait[h]
            alive *= miss[h]
            best = max(best, returns / (seconds + LEAST_S))
        index[cls, b] = best


@njit
def ensure_index(
    e: Any, x: Any, base: Any, rho: Any, cls: int, hazard: Any, index: Any, fitted: Any, epoch: int
) -> None:
    """Call `index_class`, unless the index of the class already is of this epoch."""
    if fitted[cls] != epoch:
        index_class(e, x, base, rho, cls, hazard, index)
        fitted[cls] = epoch


@njit
def return_probability(hazard: Any, cls: int, age: float, horizon: float) -> float:
    """P(return within `horizon` seconds | no return until `age`)."""
    risk, end, b = 0.0, age + horizon, bin_of(age)
    while age < end:
        stop = end if b == NUM_BINS - 1 else min(end, EDGES[b + 1])
        risk += hazard[cls, b] * (stop - age)
        age = stop
        b += 1
    return float(1.0 - np.exp(-risk))


@njit
def _fit(e: Any, x: Any, base: Any, rho: Any, active: Any, keep: float) -> None:
    for b in range(NUM_BINS):
        age = 0.5 * (EDGES[b] + EDGES[b + 1])
        events, seconds = BASE_WEIGHT, BASE_WEIGHT * age / PRIOR
        for c in active:
            e[c, b] *= keep
            x[c, b] *= keep
            if c < NUM_MAIN:
                events += e[c, b]
                seconds += x[c, b]
        base[b] = events / seconds
    main = active[active < NUM_MAIN]
    for _ in range(SWEEPS):
        _fit_factors_once(e, x, base, rho, main)


class GritModel:
    """The tables e (events) and x (exposure), and what is fitted to them. Several caches may share one. Not thread-safe."""

    def __init__(self) -> None:
        self.events: npt.NDArray[np.float64] = np.zeros((NUM_CLASSES, NUM_BINS))
        self.exposure: npt.NDArray[np.float64] = np.zeros((NUM_CLASSES, NUM_BINS))
        self.base: npt.NDArray[np.float64] = np.zeros(NUM_BINS)
        self.rho: npt.NDArray[np.float64] = np.ones((len(SIZES), int(SIZES.max()), NUM_BANDS))
        self.hazard: npt.NDArray[np.float64] = np.zeros((NUM_CLASSES, NUM_BINS))
        self.index: npt.NDArray[np.float64] = np.zeros((NUM_CLASSES, NUM_BINS))
        self.fitted: npt.NDArray[np.int64] = np.full(NUM_CLASSES, -1)  # epoch of each class's index; -1: never used
        self.epoch = 0
        self.num_ghosts = 0  # ghosts of all caches that share this model
        self.num_members = 0  # caches that share this model
        self.member_numbers = count(1)  # numbers for new members
        # (member, request number) -> row, serial; (member, session number) -> turn, time in s, rhythm in s
        self.requests: BoundedDict[tuple[int, int], tuple[int, int]] = BoundedDict(OPEN_REQUESTS)
        self.sessions: BoundedDict[tuple[int, int], tuple[int, float, float]] = BoundedDict(OPEN_SESSIONS)
        self._now: float | None = None
        self.fit(0.0)

    def fit(self, now_s: float) -> None:
        """Let old statistics fade and fit the tables anew. A class gets its new index when it is next used."""
        elapsed = max(now_s - (now_s if self._now is None else self._now), 0.0)
        self._now = now_s
        active = np.flatnonzero(self.fitted >= 0)
        _fit(self.events, self.exposure, self.base, self.rho, active, 0.5 ** (elapsed / HALF_LIFE_S))
        self.epoch += 1

    def remove_member(self, ghosts: list[int]) -> None:
        """Take out a cache that shared this model and its `ghosts[0]` ghosts. Called when the cache is finalized."""
        self.num_members -= 1
        self.num_ghosts -= ghosts[0]

    def dump(self) -> bytes:
        """Return what was learned as bytes for `load`: some 600 bytes for each class that was ever used."""
        used = np.flatnonzero(self.fitted >= 0)
        tables = _Tables(
            VERSION, _LAYOUT, used.astype("<i4").tobytes(),
            self.events[used].astype("<f8").tobytes(), self.exposure[used].astype("<f8").tobytes(),
        )  # fmt: skip
        body = msgspec.msgpack.encode(tables)
        return blake3(body).digest() + body

    def load(self, data: bytes) -> None:
        """Start from what another model learned.

        Raises ConfigError and changes nothing if the data is damaged or has another version or layout.
        """
        what = f"policy state of {len(data)} bytes"
        if len(data) < 32 or blake3(data[32:]).digest() != data[:32]:
            raise ConfigError(f"{what}: its checksum does not match; delete the file or copy it again")
        try:
            tables = msgspec.msgpack.decode(data[32:], type=_Tables)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{what} cannot be decoded: {error}; delete the file") from error
        if tables.version != VERSION or tables.layout != _LAYOUT:
            raise ConfigError(
                f"{what} has version {tables.version} and layout {tables.layout}; this kvkern reads version {VERSION} and "
                f"layout {_LAYOUT}; delete the file: the policy learns again within some hundred requests"
            )
        used = np.frombuffer(tables.classes, dtype="<i4")
        parts = [np.frombuffer(part, dtype="<f8") for part in (tables.events, tables.exposure)]
        shaped = all(
            part.size == used.size * NUM_BINS and np.isfinite(part).all() and (part >= 0).all() for part in parts
        )
        if not shaped or ((used < 0) | (used >= NUM_CLASSES)).any():
            raise ConfigError(f"{what}: its tables have impossible sizes or values; delete the file")
        self.events[used], self.exposure[used] = (part.reshape(-1, NUM_BINS) for part in parts)
        self.fitted[used] = 0
        self.fit(0.0)
        self._now = None


class _Tables(msgspec.Struct, array_like=True):
    version: int
    layout: list[int]
    classes: bytes  # [n] int32
    events: bytes  # [n, NUM_BINS] float64
    exposure: bytes
