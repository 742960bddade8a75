"""GRIT, the Gittins Reuse-Interval Trie: keep what will return soonest for the room and time it takes.

    access(chain):   each chunk that was here before is an event of its cohort: it returned at this age
                     the request's chunks become a new cohort, in a class of coarse features of the request
    every so often:  fit how soon chunks of a class return at what age (grit_model.py)
    victims(n):      of all leaves (resident, nothing resident behind them) the one with the least Gittins index;
                     then its parent is a leaf; and so on. A chunk just inserted is a leaf too: eviction is admission

The request stream itself is the label: ghosts, remembered chunks that are not resident, teach as much as hits. The theory
is in docs/policy.md.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from . import grit_store as store
from . import grit_trie as trie
from .base import Keys, Use
from .grit_model import GritModel, main_class

_GHOSTS_PER_SLOT = 16
_MIN_GHOSTS = 1 << 18
_FIRST_FIT, _FIT_EVERY = 10, 200  # requests
_ROWS_PER_REQUEST = 64  # what a fit may cost: cohorts it looks at, a request
_LEAVES_PER_REQUEST = 256  # likewise for a scan of the leaves: up to so many are looked at on every request
_OPEN_REQUESTS = 4096  # requests whose later calls are recognised
_OPEN_SESSIONS = 16384  # sessions that callers named and whose turns are counted
_NO_SESSION = (0, -1.0, -1.0)
_NEW = (-1, 0)  # no row, no serial


class Grit:
    """`EvictionPolicy` over flat arrays, by GritModel's tables."""

    def __init__(
        self,
        capacity: int,  # chunks
        model: GritModel | None = None,  # may be shared with other caches that the same lock guards
        max_ghosts: int | None = None,  # chunks remembered though not resident; of all that share the model
    ) -> None:
        self.model = model or GritModel()
        self.model.members += 1
        self._ghosts = [0]  # as the model has counted them
        weakref.finalize(self, self.model.leave, self._ghosts).atexit = False
        self._max_ghosts = max_ghosts or max(_GHOSTS_PER_SLOT * capacity, _MIN_GHOSTS)
        self._state = np.zeros(store.NUM_STATE, dtype=np.int64)
        self._state[[store.FREE_NODE, store.FREE_ROW, store.HEAP]] = -1
        self._nodes = np.zeros(0, dtype=store.NODE)
        self._rows = np.zeros(0, dtype=store.ROW)
        self._requests: OrderedDict[int, tuple[int, int]] = OrderedDict()  # number -> its row and serial
        self._sessions: OrderedDict[int, tuple[int, float, float]] = OrderedDict()  # number -> turn, time, rhythm
        self._serial = 0
        self._next_fit = _FIRST_FIT
        self._last_scan = -1
        self._now = 0.0
        self._leaves = np.empty(0, dtype=np.int32)
        self._grow_nodes(256)
        self._grow_rows(64)

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        self._now = now = max(use.now_s, self._now)
        keys = self._room_for(chain)  # may forget ghosts, and with them the request's row
        row, serial = self._requests.get(use.request, _NEW) if use.request else _NEW
        if row >= 0 and self._rows[row]["serial"] != serial:
            row = -1  # its chunks have been used by others since
        if row < 0 and not len(chain):
            return
        session = _NO_SESSION
        if not serial:
            self._serial = serial = self._serial + 1
            if serial >= self._next_fit:
                self._fit()
            session = self._session(use.session, now)
        model = self.model
        self._state[store.EPOCH] = model.epoch
        row = trie.access(
            self._nodes, self._heads, self._rows, self._state, self._leaves, self._heap,
            model.events, model.exposure, model.base, model.rho, model.hazard, model.index, model.fitted,
            keys, now, serial, row, use.output_tokens, int(use.stop), *session,
        )  # fmt: skip
        if use.request:
            self._requests[use.request] = row, serial
            self._requests.move_to_end(use.request)
            if len(self._requests) > _OPEN_REQUESTS:
                self._requests.popitem(last=False)

    def insert(self, keys: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        words = self._room_for(keys)
        trie.insert(
            self._nodes, self._heads, self._rows, self._state, self._leaves, self._heap, self.model.index,
            words, self._now, main_class(1, 0, -1.0, -1.0, 0, -1, 0),
        )  # fmt: skip

    def pin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        trie.pin(self._nodes, self._heads, self._state, self._leaves, _words(keys))

    def unpin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        trie.unpin(
            self._nodes, self._heads, self._rows, self._state, self._leaves, self._heap, self.model.index,
            _words(keys), self._now,
        )  # fmt: skip

    def remove(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        trie.remove(
            self._nodes, self._heads, self._rows, self._state, self._leaves, self._heap, self.model.index,
            _words(keys), self._now,
        )  # fmt: skip

    def victims(self, count: int) -> list[bytes]:
        """See EvictionPolicy."""
        scan = (self._serial - self._last_scan) * _LEAVES_PER_REQUEST >= self._state[store.LEAVES]
        if scan:
            self._last_scan = self._serial
        found = trie.victims(
            self._nodes, self._rows, self._state, self._leaves, self._heap, self.model.index, count, self._now, scan
        )
        blob = self._keys[found].tobytes()
        return [blob[i : i + 32] for i in range(0, len(blob), 32)]

    def chances(self, keys: Keys, horizon_s: float) -> list[float]:
        """The probability of each chunk to be used within so many seconds; remembered chunks count, resident or not."""
        found = trie.chances(
            self._nodes, self._heads, self._rows, self.model.hazard, _words(keys), self._now, horizon_s
        )
        return found.tolist()  # type: ignore[no-any-return]

    @property
    def num_chunks(self) -> int:
        """Chunks that are remembered, resident or not."""
        return int(self._state[store.RESIDENTS] + self._state[store.GHOSTS])

    @property
    def nbytes(self) -> int:
        """Memory that grows with the chunks; the tables beside it are bounded, and are the model's."""
        return sum(part.nbytes for part in (self._nodes, self._heads, self._rows, self._leaves, self._heap))

    def _session(self, number: int, now: float) -> tuple[int, float, float]:
        """Turn, gap and rhythm of a session that the caller knows."""
        if not number:
            return _NO_SESSION
        turn, gap, rhythm = 1, -1.0, -1.0
        if (last := self._sessions.pop(number, None)) is not None:
            turn, gap = min(last[0] + 1, 255), now - last[1]
            rhythm = gap if last[2] < 0 else (max(gap, 1e-3) * last[2]) ** 0.5
        self._sessions[number] = turn, now, rhythm
        if len(self._sessions) > _OPEN_SESSIONS:
            self._sessions.popitem(last=False)
        return turn, gap, rhythm

    def _fit(self) -> None:
        """Bring the tables up to date and fit them; due again when that is worth its cost."""
        num_rows = int(self._state[store.ROWS])
        store.flush(self._rows, num_rows, self.model.exposure, self._now)
        self.model.fit(self._now)
        trie.reindex(
            self._rows, num_rows, self.model.events, self.model.exposure, self.model.base, self.model.rho,
            self.model.hazard, self.model.index, self.model.fitted, self.model.epoch,
        )  # fmt: skip
        self._next_fit = self._serial + max(min(_FIT_EVERY, self._serial), num_rows // _ROWS_PER_REQUEST)

    def _room_for(self, keys: Keys) -> npt.NDArray[np.uint64]:
        """[n, 4] words of the keys, and room for as many nodes and rows."""
        n, state = len(keys), self._state
        ghosts = int(state[store.GHOSTS])
        self.model.ghosts += ghosts - self._ghosts[0]
        self._ghosts[0] = ghosts
        if self.model.ghosts + n > self._max_ghosts:
            self._forget(ghosts, n)
        if state[store.NODES] + n > len(self._nodes):
            self._grow_nodes(int(state[store.NODES]) + n)
        if state[store.ROWS] + n + 1 > len(self._rows):
            self._grow_rows(int(state[store.ROWS]) + n + 1)
        return _words(keys)

    def _forget(self, ghosts: int, n: int) -> None:
        """Make room for n ghosts; one of many that share a model gives up none below half of an even share."""
        spare = ghosts - self._max_ghosts // (2 * self.model.members) if self.model.members > 1 else ghosts
        count = min(spare, self.model.ghosts + n - self._max_ghosts + ghosts // 8)
        if count > 0:
            count = max(count, ghosts // 8)
            store.forget(self._nodes, self._heads, self._rows, self._state, self.model.exposure, count, self._now)

    def _grow_nodes(self, needed: int) -> None:
        size = max(needed, len(self._nodes) * 3 // 2)
        nodes = np.zeros(size, dtype=store.NODE)
        nodes[: len(self._nodes)] = self._nodes
        self._nodes = nodes
        self._keys = _keys_of(nodes)
        self._heads = np.empty(1 << max(size - 1, 1).bit_length(), dtype=np.int32)
        store.rehash(nodes, self._heads, int(self._state[store.NODES]))
        leaves = np.empty(size, dtype=np.int32)
        num_leaves = int(self._state[store.LEAVES])
        leaves[:num_leaves] = self._leaves[:num_leaves]
        self._leaves = leaves
        self._heap = np.empty(size + 64, dtype=store.ENTRY)
        self._state[store.HEAP] = -1

    def _grow_rows(self, needed: int) -> None:
        rows = np.zeros(max(needed, len(self._rows) * 3 // 2), dtype=store.ROW)
        rows[: len(self._rows)] = self._rows
        self._rows = rows


def compile_kernels() -> None:
    """Compile what a `Grit` calls, some 8 s, or load it from numba's disk cache; better not under a tier's lock."""
    policy = Grit(2, max_ghosts=1)  # so that it forgets, too
    keys = [bytes([i]) * 32 for i in range(4)]
    for number in range(1, 2 * _FIRST_FIT):
        policy.access(keys, Use(float(number), number))
        policy.access((), Use(float(number), number, output_tokens=1))
    policy.insert(keys, Use())
    policy.pin(keys[:1])
    policy.unpin(keys[:1])
    policy.remove(keys[3:])
    policy.chances(keys, 1.0)
    policy.victims(4)


def _words(keys: Keys) -> npt.NDArray[np.uint64]:
    """[n, 4] uint64 of 32-byte keys."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 4)


def _keys_of(nodes: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """[n] V32, a view of the keys in nodes."""
    return np.ndarray(len(nodes), dtype="V32", buffer=nodes, strides=(nodes.dtype.itemsize,))
