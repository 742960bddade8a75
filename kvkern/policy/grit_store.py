"""GRIT's memory: nodes and cohorts in flat arrays, and a hash table from keys to nodes. Compiled.

    node    one chunk: 64 bytes with its key. A ghost is a node that is not resident
    row     a cohort: chunks that one request used and that are in one class; they age together

The functions do not grow the arrays: callers must make room first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .grit_model import add_exposure, bin_of, njit

NODE = np.dtype(
    [
        ("k0", "u8"), ("k1", "u8"), ("k2", "u8"), ("k3", "u8"),  # key
        ("parent", "i4"),  # -1: none; the parent counts this node while it is resident
        ("row", "i4"),  # -1: the node is free
        ("leaf", "i4"),  # position in `leaves`; -1: not a leaf
        ("children", "i4"),  # resident children
        ("next", "i4"),  # next node of the hash chain, or of the list of free nodes
        ("gap", "f4"),  # s, smoothed; 0: used once
        ("depth", "u4"), ("count", "u2"),
        ("turn", "u1"),  # turn of the session that used it last
        ("flags", "u1"),
    ]
)  # fmt: skip
ROW = np.dtype(
    [
        ("time", "f8"),  # of the request, s
        ("counted", "f8"),  # age in s up to which its exposure is in the tables
        ("serial", "i8"),  # of the request; -1: no request, or the row is free
        ("weight", "f4"), ("cls", "i4"), ("refs", "i4"), ("known", "i4"), ("turn", "i4"),
        ("gap", "f4"), ("rhythm", "f4"), ("length", "i4"),
    ]
)  # fmt: skip
ENTRY = np.dtype([("score", "f8"), ("node", "i4"), ("row", "i4")])
RESIDENT, PINNED = 1, 2

# state: [NUM_STATE] int64
NODES, FREE_NODE, ROWS, FREE_ROW, LEAVES, HEAP, RESIDENTS, EVICTABLE, GHOSTS, EPOCH, NUM_STATE = range(11)

_MIN_SHARED_USES = 4  # a chunk with fewer uses does not count as shared


@njit
def find_node(nodes: Any, heads: Any, key: Any) -> int:
    """Return the node of a key [4] uint64, or -1."""
    i = heads[key[0] & np.uint64(len(heads) - 1)]
    while i >= 0:
        n = nodes[i]
        if n.k0 == key[0] and n.k1 == key[1] and n.k2 == key[2] and n.k3 == key[3]:
            return int(i)
        i = n.next
    return -1


@njit
def add_node(nodes: Any, heads: Any, state: Any, key: Any, depth: int) -> int:
    """Add a ghost for a key [4] uint64 that has no node yet. Returns the node; the caller sets its row."""
    i = state[FREE_NODE]
    if i >= 0:
        state[FREE_NODE] = nodes[i].next
    else:
        i = state[NODES]
        state[NODES] += 1
    n = nodes[i]
    n.k0, n.k1, n.k2, n.k3 = key[0], key[1], key[2], key[3]
    n.parent, n.leaf, n.children, n.gap, n.depth, n.count, n.turn, n.flags = -1, -1, 0, 0.0, depth, 0, 0, 0
    bucket = key[0] & np.uint64(len(heads) - 1)
    n.next = heads[bucket]
    heads[bucket] = i
    state[GHOSTS] += 1
    return int(i)


@njit
def drop_node(nodes: Any, heads: Any, state: Any, i: int) -> None:
    """Take a ghost out of the hash table and put its node on the free list."""
    n = nodes[i]
    bucket = n.k0 & np.uint64(len(heads) - 1)
    j = heads[bucket]
    if j == i:
        heads[bucket] = n.next
    else:
        while nodes[j].next != i:
            j = nodes[j].next
        nodes[j].next = n.next
    n.row = -1
    n.next = state[FREE_NODE]
    state[FREE_NODE] = i
    state[GHOSTS] -= 1


@njit
def rehash(nodes: Any, heads: Any, num_nodes: int) -> None:
    """Fill a new hash table `heads` with the nodes in use. Free nodes stay on their list."""
    heads[:] = -1
    for i in range(num_nodes):
        if nodes[i].row >= 0:
            bucket = nodes[i].k0 & np.uint64(len(heads) - 1)
            nodes[i].next = heads[bucket]
            heads[bucket] = i


@njit
def add_row(rows: Any, state: Any, time: float, serial: int, weight: float, cls: int) -> int:
    """Add a cohort without chunks and return its row."""
    i = state[FREE_ROW]
    if i >= 0:
        state[FREE_ROW] = rows[i].refs
    else:
        i = state[ROWS]
        state[ROWS] += 1
    r = rows[i]
    r.time, r.counted, r.serial, r.weight, r.cls, r.refs = time, 0.0, serial, weight, cls, 0
    r.known, r.length, r.turn, r.gap, r.rhythm = 0, 0, 0, -1.0, -1.0
    return int(i)


@njit
def release_row(rows: Any, state: Any, i: int, count: int) -> None:
    """Take `count` references off a row. A row without references goes on the free list."""
    r = rows[i]
    r.refs -= count
    if r.refs == 0:
        r.serial = -1
        r.refs = state[FREE_ROW]
        state[FREE_ROW] = i


@njit
def record_return(rows: Any, state: Any, e: Any, x: Any, row: int, count: int, now: float) -> None:
    """Count that `count` chunks of a cohort came back now: as events, with their exposure. They leave the cohort."""
    r = rows[row]
    age = max(now - r.time, 0.0)
    e[r.cls, bin_of(age)] += r.weight * count
    add_exposure(x, r.cls, r.counted, age, r.weight * count)
    release_row(rows, state, row, count)


@njit
def is_shared(count: int, turn: int) -> bool:
    """Return whether a chunk with `count` uses, last used in this turn of a session, belongs to many sessions."""
    return count >= _MIN_SHARED_USES and count > turn + 1


@njit
def flush_exposure(rows: Any, num_rows: int, x: Any, now: float) -> None:
    """Add the exposure up to now of all cohorts that are still waiting."""
    for i in range(num_rows):
        r = rows[i]
        if r.serial != -1 and r.refs > 0:
            age = now - r.time
            if age > r.counted:
                add_exposure(x, r.cls, r.counted, age, r.weight * r.refs)
                r.counted = age


@njit
def forget_ghosts(nodes: Any, heads: Any, rows: Any, state: Any, x: Any, count: int, now: float) -> None:
    """Drop about `count` ghosts, the least recently used first. A ghost with a resident child is kept."""
    times = np.array(
        [rows[nodes[i].row].time for i in range(state[NODES]) if nodes[i].row >= 0 and nodes[i].flags == 0]
    )
    if len(times) == 0:
        return
    times.sort()
    cutoff = times[min(count, len(times)) - 1]
    done = 0
    for i in range(state[NODES]):
        if done == count:
            break
        n = nodes[i]
        if n.row < 0 or n.flags != 0 or n.children or rows[n.row].time > cutoff:
            continue
        r = rows[n.row]
        if r.serial != -1:
            age = max(now - r.time, 0.0)
            add_exposure(x, r.cls, r.counted, age, r.weight)
        release_row(rows, state, n.row, 1)
        drop_node(nodes, heads, state, i)
        done += 1


@njit
def compact(nodes: Any, rows: Any, state: Any, leaves: Any) -> Any:
    """Move the nodes and rows in use to the front of their arrays.

    Returns [rows] int32: the new place of each row, or -1 for a free row. The caller must fill the hash table anew.
    """
    num_nodes, num_rows = state[NODES], state[ROWS]
    node_to, row_to = np.full(num_nodes, -1, np.int32), np.full(num_rows, -1, np.int32)
    at = 0
    for i in range(num_nodes):
        if nodes[i].row >= 0:
            row_to[nodes[i].row] = 0
            node_to[i] = at
            at += 1
    state[NODES], state[FREE_NODE] = at, -1
    at = 0
    for i in range(num_rows):
        if row_to[i] == 0:
            row_to[i] = at
            rows[at] = rows[i]
            at += 1
    state[ROWS], state[FREE_ROW] = at, -1
    for i in range(num_nodes):
        at = node_to[i]
        if at >= 0:
            nodes[at] = nodes[i]
            nodes[at].row = row_to[nodes[at].row]
            if nodes[at].parent >= 0:
                nodes[at].parent = node_to[nodes[at].parent]
    for i in range(state[LEAVES]):
        leaves[i] = node_to[leaves[i]]
    state[HEAP] = -1
    return row_to
