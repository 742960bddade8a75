"""GRIT, the Gittins Reuse-Interval Trie: keep the chunks with the most expected hits per slot and second.

    access(chain):   each chunk that was seen before is an event of its cohort: it returned at this age
                     the request's chunks become a new cohort, in a class of coarse features of the request
    every so often:  fit how soon chunks of a class return at each age (grit_model.py)
    victims(n):      take the leaf with the least Gittins index; then its parent may be a leaf; and so on
                     a leaf is resident and has no resident chunk behind it
                     a chunk just inserted may be a leaf too: eviction is admission

GRIT learns from the request stream itself. Ghosts are remembered chunks that are not resident; they teach as much as hits.
The theory is in docs/policy.md.
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
_ROWS_PER_REQUEST = 64  # cost limit of a fit: cohorts that it visits, averaged over the requests between two fits
_LEAVES_PER_REQUEST = 256  # cost limit of a scan: leaves that it visits, averaged over the requests between two scans
_MIN_NODES, _MIN_GROWN_NODES = 8, 256  # room of a new cache, and the least it grows to
_MIN_ROWS, _MIN_GROWN_ROWS = 4, 64
_NO_SESSION = (0, -1.0, -1.0)
_NO_ROW = (-1, 0)  # no row, no serial


class Grit:
    """An `EvictionPolicy` over flat arrays. It ranks leaves by GritModel's tables."""

    def __init__(
        self,
        capacity: int,  # chunks
        model: GritModel | None = None,  # may be shared with other caches under the same lock; None: a new one
        max_ghosts: int | None = None,  # limit on ghosts of all caches that share the model
    ) -> None:
        self.model = model or GritModel()
        self.model.num_members += 1
        self._member = next(self.model.member_numbers)
        self._ghosts = [0]  # number of ghosts that this cache last reported to the model
        weakref.finalize(self, self.model.remove_member, self._ghosts).atexit = False
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
        self._resize_nodes(_MIN_NODES)
        self._resize_rows(_MIN_ROWS)

    def access(self, chain: Keys, use: Use) -> None:
        """See EvictionPolicy."""
        self._now = now = max(use.now_s, self._now)
        keys = self._reserve_room(chain)  # may forget ghosts, and the request's row with them
        requests = self.model.requests
        row, serial = requests.get((self._member, use.request), _NO_ROW) if use.request else _NO_ROW
        if row >= 0 and self._rows[row]["serial"] != serial:
            row = -1  # since then other requests have used its chunks
        if row < 0 and not len(chain):
            return
        session = _NO_SESSION
        if not serial:
            self._serial = serial = self._serial + 1
            if serial >= self._next_fit:
                self._fit_model()
            session = self._session_features(use.session, now)
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
        words = self._reserve_room(keys)
        trie.insert(
            self._nodes, self._heads, self._rows, self._state, self._leaves, self._heap, self.model.index,
            words, self._now, main_class(1, 0, -1.0, -1.0, 0, -1, 0),
        )  # fmt: skip

    def pin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        trie.pin(self._nodes, self._heads, self._state, self._leaves, _key_words(keys))

    def unpin(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        trie.unpin(
            self._nodes, self._heads, self._rows, self._state, self._leaves, self._heap, self.model.index,
            _key_words(keys), self._now,
        )  # fmt: skip

    def remove(self, keys: Keys) -> None:
        """See EvictionPolicy."""
        self._limit_ghosts(len(keys))
        trie.remove(
            self._nodes, self._heads, self._rows, self._state, self._leaves, self._heap, self.model.index,
            _key_words(keys), self._now,
        )  # fmt: skip
        self._limit_ghosts(0)

    def victims(self, count: int) -> list[bytes]:
        """See EvictionPolicy."""
        self._limit_ghosts(max(min(count, int(self._state[store.EVICTABLE])), 0))
        scan = (self._serial - self._last_scan) * _LEAVES_PER_REQUEST >= self._state[store.LEAVES]
        if scan:
            self._last_scan = self._serial
        found = trie.victims(
            self._nodes, self._rows, self._state, self._leaves, self._heap, self.model.index, count, self._now, scan
        )
        blob = self._keys[found].tobytes()
        self._limit_ghosts(0)
        return [blob[i : i + 32] for i in range(0, len(blob), 32)]

    def chances(self, keys: Keys, horizon_s: float) -> list[float]:
        """Return the probability of each chunk to be used within `horizon_s` seconds. It is 0 for unknown chunks.

        Ghosts are known chunks.
        """
        found = trie.return_probabilities(
            self._nodes, self._heads, self._rows, self.model.hazard, _key_words(keys), self._now, horizon_s
        )
        return found.tolist()  # type: ignore[no-any-return]

    @property
    def num_chunks(self) -> int:
        """Number of known chunks, resident chunks and ghosts."""
        return int(self._state[store.RESIDENTS] + self._state[store.GHOSTS])

    @property
    def nbytes(self) -> int:
        """Memory that grows with the chunks. The model's tables are bounded and not included."""
        return sum(part.nbytes for part in (self._nodes, self._heads, self._rows, self._leaves, self._heap))

    def _session_features(self, number: int, now: float) -> tuple[int, float, float]:
        """Return (turn, gap, rhythm) of the session that the caller named; `_NO_SESSION` if it named none."""
        if not number:
            return _NO_SESSION
        turn, gap, rhythm = 1, -1.0, -1.0
        if (last := self.model.sessions.get((self._member, number))) is not None:
            turn, gap = min(last[0] + 1, 255), now - last[1]
            rhythm = gap if last[2] < 0 else (max(gap, 1e-3) * last[2]) ** 0.5
        self.model.sessions.put((self._member, number), (turn, now, rhythm))
        return turn, gap, rhythm

    def _fit_model(self) -> None:
        """Bring the model's tables up to date, fit them, and set when the next fit is due."""
        num_rows = int(self._state[store.ROWS])
        store.flush_exposure(self._rows, num_rows, self.model.exposure, self._now)
        self.model.fit(self._now)
        trie.refresh_indexes(
            self._rows, num_rows, self.model.events, self.model.exposure, self.model.base, self.model.rho,
            self.model.hazard, self.model.index, self.model.fitted, self.model.epoch,
        )  # fmt: skip
        self._next_fit = self._serial + max(min(_FIT_EVERY, self._serial), num_rows // _ROWS_PER_REQUEST)

    def _reserve_room(self, keys: Keys) -> npt.NDArray[np.uint64]:
        """Make room for n nodes and n + 1 rows. Returns the keys as [n, 4] uint64."""
        n, state = len(keys), self._state
        self._limit_ghosts(n)
        if state[store.NODES] + n > len(self._nodes):
            self._resize_nodes(max(int(state[store.NODES]) + n, len(self._nodes) * 3 // 2, _MIN_GROWN_NODES))
        if state[store.ROWS] + n + 1 > len(self._rows):
            self._resize_rows(max(int(state[store.ROWS]) + n + 1, len(self._rows) * 3 // 2, _MIN_GROWN_ROWS))
        return _key_words(keys)

    def _limit_ghosts(self, n: int) -> None:
        """Make room for `n` more ghosts: forget the least recently used ghosts if there are too many.

        Reports the number of ghosts to the model. A cache that shares its model keeps at least half of an even share.
        """
        ghosts = self._report_ghosts()
        if self.model.num_ghosts + n <= self._max_ghosts:
            return
        spare = ghosts - self._max_ghosts // (2 * self.model.num_members) if self.model.num_members > 1 else ghosts
        count = min(spare, self.model.num_ghosts + n - self._max_ghosts + ghosts // 8)
        if count > 0:
            count = max(count, ghosts // 8)
            store.forget_ghosts(
                self._nodes, self._heads, self._rows, self._state, self.model.exposure, count, self._now
            )
            self._report_ghosts()
            needed = self.num_chunks + n
            if len(self._nodes) > 4 * max(needed, _MIN_NODES):
                self._compact(2 * max(needed, _MIN_NODES))

    def _report_ghosts(self) -> int:
        """Report the number of this cache's ghosts to the model and return it."""
        ghosts = int(self._state[store.GHOSTS])
        self.model.num_ghosts += ghosts - self._ghosts[0]
        self._ghosts[0] = ghosts
        return ghosts

    def _compact(self, num_nodes: int) -> None:
        """Shrink the arrays after ghosts were forgotten. Nodes and rows keep their order."""
        moved = store.compact(self._nodes, self._rows, self._state, self._leaves)
        for key, (row, serial) in self.model.requests.items():
            if key[0] == self._member and row >= 0:
                self.model.requests[key] = int(moved[row]), serial
        self._resize_nodes(num_nodes)
        self._resize_rows(2 * max(int(self._state[store.ROWS]), _MIN_ROWS))

    def _resize_nodes(self, size: int) -> None:
        used, num_leaves = int(self._state[store.NODES]), int(self._state[store.LEAVES])
        nodes = np.zeros(size, dtype=store.NODE)
        nodes[:used] = self._nodes[:used]
        self._nodes = nodes
        self._keys = _view_keys(nodes)
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
    """Compile all functions that a `Grit` calls, or load them from numba's disk cache.

    Compiling takes some 8 s, so do not call this under a tier's lock.
    """
    policy = Grit(2, max_ghosts=1)  # with one ghost it also calls `forget_ghosts`
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


def _key_words(keys: Keys) -> npt.NDArray[np.uint64]:
    """Return 32-byte keys as [n, 4] uint64."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 4)


def _view_keys(nodes: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return a view of the keys in `nodes`: [n] V32."""
    return np.ndarray(len(nodes), dtype="V32", buffer=nodes, strides=(nodes.dtype.itemsize,))
