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
_FEW_NODES, _SOME_NODES = 8, 256  # what a new cache has room for, and what it grows to at least
_FEW_ROWS, _SOME_ROWS = 4, 64
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
        self._member = next(self.model.numbers)
        self._ghosts = [0]  # as the model has counted them
        weakref.finalize(self, self.model.leave, self._ghosts).atexit = False
        self._max_ghosts = max_ghosts or max(_GHOSTS_PER_SLOT * capacity, _MIN_GHOSTS)
        self._state = np.zeros(store.NUM_STATE, dtype=np.int64)
        self._state[[store.FREE_NODE, store.FREE_ROW, store.HEAP]] = -1
        self._nodes = np.zeros(0, dtype=store.NODE)
        self._rows = np.zeros(0, dtype=store.ROW)
        self._serial = 0
        self._next_fit = _FIRST_FIT
        self._last_scan = -1
        self._now = 0.0
        self._leaves = np.empty(0, dtype=np.int32)
        self._resize_nodes(_FEW_NODES)
        self._resize_rows(_FEW_ROWS)

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        self._now = now = max(use.now_s, self._now)
        keys = self._room_for(chain)  # may forget ghosts, and with them the request's row
        requests = self.model.requests
        row, serial = requests.get((self._member, use.request), _NEW) if use.request else _NEW
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
            requests.put((self._member, use.request), (row, serial))

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
        self._remember(len(keys))
        trie.remove(
            self._nodes, self._heads, self._rows, self._state, self._leaves, self._heap, self.model.index,
            _words(keys), self._now,
        )  # fmt: skip
        self._remember(0)

    def victims(self, count: int) -> list[bytes]:
        """See EvictionPolicy."""
        self._remember(max(min(count, int(self._state[store.EVICTABLE])), 0))
        scan = (self._serial - self._last_scan) * _LEAVES_PER_REQUEST >= self._state[store.LEAVES]
        if scan:
            self._last_scan = self._serial
        found = trie.victims(
            self._nodes, self._rows, self._state, self._leaves, self._heap, self.model.index, count, self._now, scan
        )
        blob = self._keys[found].tobytes()
        self._remember(0)
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
        if (last := self.model.sessions.get((self._member, number))) is not None:
            turn, gap = min(last[0] + 1, 255), now - last[1]
            rhythm = gap if last[2] < 0 else (max(gap, 1e-3) * last[2]) ** 0.5
        self.model.sessions.put((self._member, number), (turn, now, rhythm))
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
        self._remember(n)
        if state[store.NODES] + n > len(self._nodes):
            self._resize_nodes(max(int(state[store.NODES]) + n, len(self._nodes) * 3 // 2, _SOME_NODES))
        if state[store.ROWS] + n + 1 > len(self._rows):
            self._resize_rows(max(int(state[store.ROWS]) + n + 1, len(self._rows) * 3 // 2, _SOME_ROWS))
        return _words(keys)

    def _remember(self, n: int) -> None:
        """Room for n ghosts, of those that have been used longest ago; tells the model how many there are.

        One of many that share a model gives up none below half of an even share.
        """
        ghosts = self._count_ghosts()
        if self.model.ghosts + n <= self._max_ghosts:
            return
        spare = ghosts - self._max_ghosts // (2 * self.model.members) if self.model.members > 1 else ghosts
        count = min(spare, self.model.ghosts + n - self._max_ghosts + ghosts // 8)
        if count > 0:
            count = max(count, ghosts // 8)
            store.forget(self._nodes, self._heads, self._rows, self._state, self.model.exposure, count, self._now)
            self._count_ghosts()
            needed = self.num_chunks + n
            if len(self._nodes) > 4 * max(needed, _FEW_NODES):
                self._compact(2 * max(needed, _FEW_NODES))

    def _count_ghosts(self) -> int:
        ghosts = int(self._state[store.GHOSTS])
        self.model.ghosts += ghosts - self._ghosts[0]
        self._ghosts[0] = ghosts
        return ghosts

    def _compact(self, num_nodes: int) -> None:
        """Smaller arrays, for what was forgotten; nothing changes its order."""
        moved = store.compact(self._nodes, self._rows, self._state, self._leaves)
        for key, (row, serial) in self.model.requests.items():
            if key[0] == self._member and row >= 0:
                self.model.requests[key] = int(moved[row]), serial
        self._resize_nodes(num_nodes)
        self._resize_rows(2 * max(int(self._state[store.ROWS]), _FEW_ROWS))

    def _resize_nodes(self, size: int) -> None:
        used, num_leaves = int(self._state[store.NODES]), int(self._state[store.LEAVES])
        nodes = np.zeros(size, dtype=store.NODE)
        nodes[:used] = self._nodes[:used]
        self._nodes = nodes
        self._keys = _keys_of(nodes)
        self._heads = np.empty(1 << max(size - 1, 1).bit_length(), dtype=np.int32)
        store.rehash(nodes, self._heads, used)
        leaves = np.empty(size, dtype=np.int32)
        leaves[:num_leaves] = self._leaves[:num_leaves]
        self._leaves = leaves
        self._heap = np.empty(size + 64, dtype=store.ENTRY)
        self._state[store.HEAP] = -1

    def _resize_rows(self, size: int) -> None:
        used = int(self._state[store.ROWS])
        rows = np.zeros(size, dtype=store.ROW)
        rows[:used] = self._rows[:used]
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
