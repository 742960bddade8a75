"""GRIT's prefix tree of resident chunks and ghosts, and the choice of victims. Compiled; grit.py calls it.

    leaf    a node that can be evicted now: resident, not pinned, without a resident child
    heap    leaves by their Gittins index; a stale entry is dropped when it reaches the top

A parent counts its resident children, so it is neither a leaf nor forgotten before they are gone. A child lies deeper than
its parent when the two are joined, and depths do not change while they are joined. So chains that contradict each other
form no cycle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .grit_model import NUM_BINS, UNIT_S, ensure_index, main_class, njit, return_probability, trunk_class
from .grit_store import (
    EPOCH,
    EVICTABLE,
    GHOSTS,
    HEAP,
    LEAVES,
    NODES,
    PINNED,
    RESIDENT,
    RESIDENTS,
    add_node,
    add_row,
    find_node,
    is_shared,
    record_return,
    release_row,
)  # fmt: skip

_TIE = 1e-13  # relative bonus of the index per request serial, to break ties

# -- leaves -----------------------------------------------------------------------------------------------------------


@njit
def _score(rows: Any, index: Any, row: int, now: float) -> float:
    """Return the index now. Among equal indexes that of the older request is lower."""
    r = rows[row]
    age = now - r.time
    if age < UNIT_S:
        value = index[r.cls, 0]
    else:
        position = 2.0 * np.log2(age / UNIT_S)
        b = int(position)
        value = index[r.cls, min(b, NUM_BINS - 1)]
        if b < NUM_BINS - 1:
            value += (position - b) * (index[r.cls, b + 1] - value)
    return float(value * (1.0 + _TIE * r.serial))


@njit
def _goes_before(score: float, node: int, other: Any) -> bool:
    return bool(score < other.score or (score == other.score and node > other.node))


@njit
def _sift_down(heap: Any, size: int, i: int) -> None:
    score, node, row = heap[i].score, heap[i].node, heap[i].row
    while True:
        j = 2 * i + 1
        if j >= size:
            break
        if j + 1 < size and _goes_before(heap[j + 1].score, heap[j + 1].node, heap[j]):
            j += 1
        if _goes_before(score, node, heap[j]):
            break
        heap[i].score, heap[i].node, heap[i].row = heap[j].score, heap[j].node, heap[j].row
        i = j
    heap[i].score, heap[i].node, heap[i].row = score, node, row


@njit
def _push_leaf(nodes: Any, rows: Any, state: Any, heap: Any, index: Any, i: int, now: float) -> None:
    """Push a leaf onto the heap, if the heap is in use."""
    size = state[HEAP]
    if size < 0:
        return
    if size == len(heap):
        state[HEAP] = -1  # full, mostly of stale entries: `victims` rebuilds it when it needs it
        return
    row = nodes[i].row
    score = _score(rows, index, row, now)
    state[HEAP] += 1
    k = size
    while k > 0:
        up = (k - 1) // 2
        if not _goes_before(score, i, heap[up]):
            break
        heap[k].score, heap[k].node, heap[k].row = heap[up].score, heap[up].node, heap[up].row
        k = up
    heap[k].score, heap[k].node, heap[k].row = score, i, row


@njit
def _add_leaf(nodes: Any, rows: Any, state: Any, leaves: Any, heap: Any, index: Any, i: int, now: float) -> None:
    nodes[i].leaf = state[LEAVES]
    leaves[state[LEAVES]] = i
    state[LEAVES] += 1
    _push_leaf(nodes, rows, state, heap, index, i, now)


@njit
def _remove_leaf(nodes: Any, state: Any, leaves: Any, i: int) -> None:
    at = nodes[i].leaf
    if at >= 0:
        state[LEAVES] -= 1
        last = leaves[state[LEAVES]]
        leaves[at] = last
        nodes[last].leaf = at
        nodes[i].leaf = -1


@njit
def _is_leaf(n: Any) -> bool:
    """Return whether a node is resident, not pinned, and without a resident child."""
    return bool(n.flags == RESIDENT and n.children == 0)


@njit
def _make_ghost(nodes: Any, rows: Any, state: Any, leaves: Any, heap: Any, index: Any, i: int, now: float) -> None:
    """Turn a resident node into a ghost. Its parent may become a leaf."""
    n = nodes[i]
    _remove_leaf(nodes, state, leaves, i)
    if not n.flags & PINNED:
        state[EVICTABLE] -= 1
    n.flags = 0
    state[RESIDENTS] -= 1
    state[GHOSTS] += 1
    p = n.parent
    n.parent = -1
    if p >= 0:
        nodes[p].children -= 1
        if _is_leaf(nodes[p]):
            _add_leaf(nodes, rows, state, leaves, heap, index, p, now)


# -- called by grit.py ------------------------------------------------------------------------------------------------


@njit
def access(
    nodes: Any, heads: Any, rows: Any, state: Any, leaves: Any, heap: Any,  # the tree
    e: Any, x: Any, base: Any, rho: Any, hazard: Any, index: Any, fitted: Any,  # the model
    keys: Any,  # [n, 4] uint64
    now: float, serial: int,
    row: int,  # the row that an earlier call of this request made; -1: none
    output_tokens: int, stop: int,
    turn: int, gap: float, rhythm: float,  # of the session that the caller named; turn 0: none
) -> int:  # fmt: skip
    """A request uses a chain. The caller must have made room for n nodes and n + 1 rows.

    Returns the request's row, or -1 if it has no chunks.
    """
    n, epoch = len(keys), state[EPOCH]
    ids = np.empty(n, dtype=np.int32)
    known = n
    for i in range(n):
        ids[i] = find_node(nodes, heads, keys[i])
        if ids[i] < 0 and known == n:
            known = i
    if row < 0:
        if turn == 0:
            turn, gap, rhythm = 1, -1.0, -1.0
            last = nodes[ids[known - 1]] if known > 0 else nodes[0]
            if known > 0 and not is_shared(last.count, last.turn):
                turn = min(last.turn + 1, 255)
                gap = max(now - rows[last.row].time, 0.0)
                rhythm = last.gap if last.gap > 0.0 else gap
        cls = main_class(turn, n - known, gap, rhythm, n, output_tokens, stop)
        row = add_row(rows, state, now, serial, 2.4 / max(n, 2) ** 0.75, cls)
        r = rows[row]
        r.known, r.length, r.turn, r.gap, r.rhythm = known, n, turn, gap, rhythm
    else:
        r = rows[row]
        r.length = max(n, r.length)
        r.cls = main_class(r.turn, r.length - r.known, r.gap, r.rhythm, r.length, output_tokens, stop)
        turn, cls = r.turn, r.cls
    ensure_index(e, x, base, rho, cls, hazard, index, fitted, epoch)
    rows[row].refs += 1  # keep the row alive until the end of this call
    weight = rows[row].weight
    trunk_row, trunk_cls = -1, -1
    run_row, run = -1, 0
    for i in range(n):
        j = ids[i]
        if j < 0:
            j = find_node(nodes, heads, keys[i])  # a key may be twice in a chain
        if j < 0:
            j = add_node(nodes, heads, state, keys[i], i)
            node = nodes[j]
            node.count, node.turn, node.row = 1, turn, row
            rows[row].refs += 1
        else:
            node = nodes[j]
            old = node.row
            if rows[old].serial == serial:
                ids[i] = j
                continue
            if old != run_row:
                if run:
                    record_return(rows, state, e, x, run_row, run, now)
                run_row, run = old, 0
            run += 1
            age = max(now - rows[old].time, 1e-3)
            node.gap = age if node.gap == 0.0 else np.sqrt(node.gap * age)
            node.count = min(node.count + 1, 65535)
            node.turn = turn
            mine = row
            if is_shared(node.count, turn):
                shared = trunk_class(node.gap)
                if shared != trunk_cls:
                    trunk_cls = shared
                    trunk_row = add_row(rows, state, now, serial, weight, shared)
                    ensure_index(e, x, base, rho, shared, hazard, index, fitted, epoch)
                mine = trunk_row
            node.row = mine
            rows[mine].refs += 1
            if node.leaf >= 0:
                _push_leaf(nodes, rows, state, heap, index, j, now)
        ids[i] = j
        if not node.flags & RESIDENT and node.children == 0:
            node.depth = i
            node.parent = ids[i - 1] if i > 0 else -1
    if run:
        record_return(rows, state, e, x, run_row, run, now)
    alive = rows[row].refs > 1
    release_row(rows, state, row, 1)
    return row if alive else -1


@njit
def insert(
    nodes: Any, heads: Any, rows: Any, state: Any, leaves: Any, heap: Any, index: Any, keys: Any, now: float, cls: int
) -> None:
    """Make chunks resident. The caller must have made room for n nodes and a row.

    `cls` is the class of chunks that no request has accessed.
    """
    lost = -1
    for i in range(len(keys)):
        j = find_node(nodes, heads, keys[i])
        if j < 0:
            if lost < 0:
                lost = add_row(rows, state, now, -1, 0.0, cls)
            j = add_node(nodes, heads, state, keys[i], i)
            nodes[j].row, nodes[j].count = lost, 1
            rows[lost].refs += 1
        node = nodes[j]
        if node.flags & RESIDENT:
            continue
        node.flags = RESIDENT
        state[RESIDENTS] += 1
        state[EVICTABLE] += 1
        state[GHOSTS] -= 1
        p = node.parent
        if p >= 0:
            if nodes[p].row >= 0 and nodes[p].depth < node.depth:
                nodes[p].children += 1
                _remove_leaf(nodes, state, leaves, p)
            else:
                node.parent = -1
        if node.children == 0:
            _add_leaf(nodes, rows, state, leaves, heap, index, j, now)


@njit
def pin(nodes: Any, heads: Any, state: Any, leaves: Any, keys: Any) -> None:
    """Pin resident nodes: they cannot be evicted."""
    for i in range(len(keys)):
        j = find_node(nodes, heads, keys[i])
        if j >= 0 and nodes[j].flags == RESIDENT:
            nodes[j].flags = RESIDENT | PINNED
            state[EVICTABLE] -= 1
            _remove_leaf(nodes, state, leaves, j)


@njit
def unpin(
    nodes: Any, heads: Any, rows: Any, state: Any, leaves: Any, heap: Any, index: Any, keys: Any, now: float
) -> None:
    """Unpin nodes: they can be evicted again."""
    for i in range(len(keys)):
        j = find_node(nodes, heads, keys[i])
        if j >= 0 and nodes[j].flags & PINNED:
            nodes[j].flags = RESIDENT
            state[EVICTABLE] += 1
            if nodes[j].children == 0:
                _add_leaf(nodes, rows, state, leaves, heap, index, j, now)


@njit
def remove(
    nodes: Any, heads: Any, rows: Any, state: Any, leaves: Any, heap: Any, index: Any, keys: Any, now: float
) -> None:
    """Turn resident nodes into ghosts."""
    for i in range(len(keys)):
        j = find_node(nodes, heads, keys[i])
        if j >= 0 and nodes[j].flags & RESIDENT:
            _make_ghost(nodes, rows, state, leaves, heap, index, j, now)


@njit
def _rebuild_heap(nodes: Any, rows: Any, state: Any, leaves: Any, heap: Any, index: Any, now: float) -> None:
    """Fill the heap with all leaves, by their index now."""
    size = state[LEAVES]
    for i in range(size):
        j = leaves[i]
        heap[i].node, heap[i].row = j, nodes[j].row
        heap[i].score = _score(rows, index, nodes[j].row, now)
    state[HEAP] = size
    for i in range(size // 2 - 1, -1, -1):
        _sift_down(heap, size, i)


@njit
def victims(
    nodes: Any, rows: Any, state: Any, leaves: Any, heap: Any, index: Any, count: int, now: float, scan: bool
) -> Any:
    """Evict up to `count` nodes. Returns them in the order of eviction, int32. `scan`: rebuild the heap, it is too old."""
    count = max(min(count, state[EVICTABLE]), 0)
    out = np.empty(count, dtype=np.int32)
    found = 0
    if scan or state[HEAP] < 0:
        _rebuild_heap(nodes, rows, state, leaves, heap, index, now)
    fresh = False
    while found < count and state[LEAVES] > 0:
        if state[HEAP] <= 0:
            if fresh:
                break
            _rebuild_heap(nodes, rows, state, leaves, heap, index, now)
            fresh = True
            continue
        j, row = heap[0].node, heap[0].row
        state[HEAP] -= 1
        size = state[HEAP]
        heap[0].score, heap[0].node, heap[0].row = heap[size].score, heap[size].node, heap[size].row
        if size > 1:
            _sift_down(heap, size, 0)
        if nodes[j].leaf < 0 or nodes[j].row != row:
            continue
        fresh = False
        _make_ghost(nodes, rows, state, leaves, heap, index, j, now)
        out[found] = j
        found += 1
    if found < count:  # all others have a pinned chunk behind them: evict the deepest
        rest = np.array([i for i in range(state[NODES]) if nodes[i].row >= 0 and nodes[i].flags == RESIDENT])
        order = np.argsort(np.array([-float(nodes[i].depth) for i in rest]))
        for k in order[: count - found]:
            _make_ghost(nodes, rows, state, leaves, heap, index, rest[k], now)
            out[found] = rest[k]
            found += 1
    return out[:found]


@njit
def refresh_indexes(
    rows: Any, num_rows: int, e: Any, x: Any, base: Any, rho: Any, hazard: Any, index: Any, fitted: Any, epoch: int
) -> None:
    """Compute the index of every class that a cohort is in."""
    for i in range(num_rows):
        ensure_index(e, x, base, rho, rows[i].cls, hazard, index, fitted, epoch)


@njit
def return_probabilities(nodes: Any, heads: Any, rows: Any, hazard: Any, keys: Any, now: float, horizon: float) -> Any:
    """Return [n] float64: the probability of each chunk to be used within `horizon` seconds; 0 for unknown chunks."""
    out = np.zeros(len(keys))
    for i in range(len(keys)):
        j = find_node(nodes, heads, keys[i])
        if j >= 0:
            r = rows[nodes[j].row]
            out[i] = return_probability(hazard, r.cls, max(now - r.time, 0.0), horizon)
    return out
