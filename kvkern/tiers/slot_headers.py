"""Headers of the arena's slots: written when a chunk begins, verified when a restart finds them. Knows no index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..arena.file import Slots
from ..arena.slots import HEAD, SlotState, seal
from ..kernels.checksum import ROW_NBYTES
from ..policy.base import Keys

if TYPE_CHECKING:
    from .base import ChunkShape

_NO_POSITION = (1 << 32) - 1
_VERIFY_SLOTS = 256  # at a time: bounds memory, not work


def begin_slots(
    arena: Slots,
    slots: npt.NDArray[np.int64],  # [n] int64, reserved or granted to the caller
    generations: npt.NDArray[np.uint64],  # [n] uint64
    keys: Keys,  # n
    shape: ChunkShape,
    chain: Keys,  # the sequence the chunks belong to, from its first chunk on
    owner: tuple[int, int],  # pid and start time of who writes
) -> None:
    """Write the headers of chunks that are about to be written."""
    if not len(slots):
        return
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


def verify_slots(
    arena: Slots,
    slots: npt.NDArray[np.int64],  # [n] int64
) -> npt.NDArray[np.bool_]:
    """[n] bool: whose header is whole and whose payload has the checksums that the header says, on every rank."""
    good = np.zeros(len(slots), dtype=np.bool_)
    if not len(slots):
        return good  # a daemon with a new arena has no use for numba and its 125 MB
    from ..kernels.paged_copy_numba import checksum_planes

    headers, geometry = arena.headers, arena.spec.geometry
    for begin in range(0, len(slots), _VERIFY_SLOTS):
        rows = slice(begin, begin + _VERIFY_SLOTS)
        at = slots[rows]
        keys, generations = headers["key"][at], headers["generation"][at]
        ok = arena.identities[at] == geometry.identities(keys, headers["namespace"][at])
        ok &= headers["codec"][at] == 0
        ok &= (headers["written"][at] == generations[:, None]).all(axis=1)
        sizes: npt.NDArray[np.uint32] = headers["plane_nbytes"][at]  # [rows, world_size, planes]
        totals = sizes.sum(axis=2, dtype=np.uint64)
        ok &= ((totals > 0) & (totals <= geometry.part_nbytes)).all(axis=1)
        ok &= (sizes.reshape(len(at), -1) % ROW_NBYTES == 0).all(axis=1)
        sizes[~ok] = 0
        seals = seal(keys, generations)[:, None]
        for rank in range(geometry.world_size):
            sums = checksum_planes(arena.parts(rank), at, sizes[:, rank]) ^ seals
            ok &= ((headers["checksum"][at, rank] == sums) | (sizes[:, rank] == 0)).all(axis=1)
        good[rows] = ok
    return good
