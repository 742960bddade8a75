"""Headers of the arena's slots: writes them for new chunks, and verifies them after a restart. Knows no index."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..arena.file import Slots
from ..arena.slots import HEAD, MAX_GENERATION, SlotState, fingerprints, seal
from ..kernels.checksum import ROW_NBYTES
from ..policy.base import Keys

if TYPE_CHECKING:
    from .base import ChunkShape
    from .slot_records import SlotRecords

_NO_POSITION = (1 << 32) - 1
_VERIFY_SLOTS = 256  # slots verified at a time: bounds memory, not work


def begin_slots(
    arena: Slots,
    slots: npt.NDArray[np.int64],  # [n] int64, reserved or granted to the caller
    generations: npt.NDArray[np.uint64],  # [n] uint64
    keys: Keys,  # n
    shape: ChunkShape,
    chain: Keys,  # the sequence the chunks belong to, from its first chunk on
    owner: tuple[int, int],  # pid and start time of the writer
) -> npt.NDArray[np.void]:  # [n] of slots.HEAD: what was written
    """Write the headers of chunks whose payload is written next."""
    positions = dict(zip(chain, range(len(chain)), strict=True))
    values = {
        "identity": arena.spec.geometry.identities(np.frombuffer(b"".join(keys), "V32"), np.void(shape.namespace)),
        "generation": generations, "owner_pid": owner[0], "owner_start": owner[1],
        "state": SlotState.WRITING, "codec": 0, "group": shape.group, "chunk_tokens": shape.chunk_tokens,
        "position": [positions.get(key, _NO_POSITION) for key in keys], "private": shape.private,
    }  # fmt: skip
    heads = np.empty(len(slots), dtype=HEAD)
    for name, value in values.items():
        heads[name] = value
    arena.heads[slots] = heads.view(arena.heads.dtype)
    return heads


def find_left_slots(
    arena: Slots,
    alive: Callable[[int, int], bool],  # True if the process with this pid and start time is alive
    records: SlotRecords,  # gets the slots that verify
) -> tuple[int, list[tuple[bytes, int]], dict[int, tuple[int, int]], list[int]]:
    """Find the slots that a former daemon left in the arena.

    Returns the number of READY slots, key and slot of those that verify (heads first, as policies expect), and the slots of
    living writers: the unfinished ones with their writer, and the others, which are complete or BAD.
    """
    headers = arena.headers
    state = headers["state"].copy()  # a copy, because living readers may still mark slots BAD
    ready = np.flatnonzero(state == SlotState.READY)
    ready = ready[np.argsort(headers["position"][ready], kind="stable")]
    heads = arena.heads[ready].view(HEAD)  # a copy: living processes may change the headers while they are verified
    verified = verify_slots(arena, ready, heads, records)
    good = [(bytes(key), slot) for key, slot in zip(heads["key"][verified], ready[verified].tolist(), strict=True)]
    unfinished, unserved = {}, []
    for slot in np.flatnonzero((state == SlotState.WRITING) | (state == SlotState.BAD)).tolist():
        owner = int(headers["owner_pid"][slot]), int(headers["owner_start"][slot])
        if not alive(*owner):
            continue
        if state[slot] == SlotState.BAD or (headers["written"][slot] == headers["generation"][slot]).all():
            unserved.append(slot)
        else:
            unfinished[slot] = owner
    return len(ready), good, unfinished, unserved


def load_checksums() -> Callable[..., npt.NDArray[np.uint64]]:
    """Return the kernel of `verify_slots`. The first call on a machine compiles it, which takes long on a busy one."""
    from ..kernels.paged_copy_numba import checksum_planes

    return checksum_planes


def verify_slots(
    arena: Slots,
    slots: npt.NDArray[np.int64],  # [n] int64
    heads: npt.NDArray[np.void] | None = None,  # [n] of slots.HEAD, copies of these slots'; None: copy them now
    records: SlotRecords | None = None,  # gets what was verified
) -> npt.NDArray[np.bool_]:
    """Return [n] bool: True if the slot's header is complete and its payload has the header's checksums on every rank."""
    good = np.zeros(len(slots), dtype=np.bool_)
    if not len(slots):
        return good  # a daemon with a new arena does not need numba and its 125 MB
    checksum_planes = load_checksums()
    geometry = arena.spec.geometry
    ranks, planes = geometry.world_size, geometry.max_planes
    tail_words = geometry.tail_words(arena.headers)
    for begin in range(0, len(slots), _VERIFY_SLOTS):
        rows = slice(begin, begin + _VERIFY_SLOTS)
        at = slots[rows]
        head = arena.heads[at].view(HEAD) if heads is None else heads[rows]
        tails = tail_words[at]
        written, sealed = tails[:, :ranks], tails[:, ranks : ranks * (1 + planes)].reshape(-1, ranks, planes)
        sizes = tails[:, ranks * (1 + planes) :].copy().view(np.uint32)[:, : ranks * planes].reshape(-1, ranks, planes)
        ok = head["identity"] == geometry.identities(head["key"], head["namespace"])
        ok &= (head["codec"] == 0) & (head["generation"] <= MAX_GENERATION)
        ok &= (written == head["generation"][:, None]).all(axis=1)
        totals = sizes.sum(axis=2, dtype=np.uint64)
        ok &= ((totals > 0) & (totals <= geometry.part_nbytes)).all(axis=1)
        ok &= (sizes.reshape(len(at), -1) % ROW_NBYTES == 0).all(axis=1)
        sizes = np.where(ok[:, None, None], sizes, np.uint32(0))
        seals = seal(head["key"], head["generation"])[:, None]
        for rank in range(ranks):
            sums = checksum_planes(arena.parts(rank), at, sizes[:, rank]) ^ seals
            ok &= ((sealed[:, rank] == sums) | (sizes[:, rank] == 0)).all(axis=1)
        if records is not None:
            records.note_heads(at[ok], head[ok])
            records.fingerprints[at[ok]] = fingerprints(tails[ok])
        good[rows] = ok
    return good
