"""A chunk's value in a remote store, version 1: a slot as it lies in the arena, its header and then the parts of all ranks.

    offset            field
    0                 the slot's header (arena/slots.py): key, namespace, sizes, plane checksums sealed with key and generation
    240               in the header's reserved bytes: 16 bytes of BLAKE3 over the header without these, owner and state
    header_nbytes     part of rank 0, part of rank 1, ...; each at a multiple of 4 KiB

A value travels from slot to store and back without a copy. On the way back the header goes to separate memory, never into
the slot: the manager owns state, owner and generation there, and a stale writer must not find its generation again. The
slot's header takes the checksums from the header that came, sealed anew with the slot's generation. Then the whole payload
is summed. That covers all of it, because the header's own hash protects the sizes of its planes. Readers ignore state,
owner and process of a value's header. The bytes of a part behind its planes are whatever was in the slot: a remote store
belongs to the arena's trust domain. `codec` is 0, none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from ..arena.file import Arena
from ..arena.slots import PAGE, SlotGeometry, seal
from ..tiers.slot_headers import verify_slots
from ..tiers.slot_records import SlotRecords
from .stores.base import Parts

_HASH = slice(240, 256)


def slot_parts(arena: Arena, slot: int) -> Parts:
    """Return the memory of a slot as header and payload."""
    geometry = arena.spec.geometry
    start = PAGE + slot * geometry.slot_nbytes
    whole = arena.bytes.data[start : start + geometry.slot_nbytes]
    return whole[: geometry.header_nbytes], whole[geometry.header_nbytes :]


def outgoing_parts(
    arena: Arena,
    slots: npt.NDArray[np.int64],  # [n] complete; the caller leases or owns them until they are written
    records: SlotRecords,
    keys: Sequence[bytes],  # n, of the chunks in them
) -> tuple[list[Parts], npt.NDArray[np.bool_]]:
    """Return the values of those slots whose header is as it was published, ready to write, and [n] bool: which those are.

    Their headers are copies: what was checked is what is written.
    """
    geometry = arena.spec.geometry
    headers = allocate_headers(geometry, len(slots))
    here = [slot_parts(arena, slot) for slot in slots.tolist()]
    for row, (header, _) in enumerate(here):
        headers[row] = np.frombuffer(header, dtype=np.uint8)
    fields = headers.reshape(-1).view(geometry.dtype)
    good = records.agree(slots, fields)
    good &= fields["key"] == np.frombuffer(b"".join(keys), dtype="V32")
    parts: list[Parts] = []
    for row in np.flatnonzero(good).tolist():
        header = memoryview(headers[row])
        header[_HASH] = _hash_of(header)
        parts.append((header, here[row][1]))
    return parts, good


def _hash_of(header: memoryview | npt.NDArray[np.uint8]) -> bytes:
    """Hash a header without its own hash, owner and state: the last two may change while a value is sent."""
    return blake3(bytes(header[:112]) + bytes(header[132:240]) + bytes(header[256:])).digest(16)


def allocate_headers(
    geometry: SlotGeometry, count: int
) -> npt.NDArray[np.uint8]:  # [count, header_nbytes] uint8, page-aligned
    """Allocate memory for the headers of values that will be read."""
    raw = np.zeros(count * geometry.header_nbytes + PAGE, dtype=np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + count * geometry.header_nbytes].reshape(count, geometry.header_nbytes)


def incoming_parts(arena: Arena, headers: npt.NDArray[np.uint8], slots: Sequence[int]) -> list[Parts]:
    """Return where to read values: row i of `headers`, and the payload of `slots[i]`."""
    return [(memoryview(headers[row]), slot_parts(arena, slot)[1]) for row, slot in enumerate(slots)]


def accept_values(
    arena: Arena,
    headers: npt.NDArray[np.uint8],  # [n, header_nbytes] as they were read
    slots: npt.NDArray[np.int64],  # [n] granted; their headers are begun for these keys, their payload is read
    keys: npt.NDArray[np.void],  # [n] V32, the keys that were asked for
    namespace: bytes,  # 32-byte root
) -> npt.NDArray[np.bool_]:
    """Verify values. Returns [n] bool: True where a value is the chunk that was asked for, bit for bit.

    The slots of those values are complete then and can be published.
    """
    if not len(slots):
        return np.zeros(0, dtype=np.bool_)
    geometry, mine = arena.spec.geometry, arena.headers
    theirs = headers.reshape(-1).view(geometry.dtype)
    identities = np.ascontiguousarray(headers[:, :104]).view("V104").reshape(-1)
    good: npt.NDArray[np.bool_] = identities == geometry.identities(keys, np.void(namespace))
    good &= np.array([_hash_of(header) == header[_HASH].tobytes() for header in headers], dtype=np.bool_)
    good &= theirs["codec"] == 0
    good &= (theirs["written"] == theirs["generation"][:, None]).all(axis=1)
    generations: npt.NDArray[np.uint64] = mine["generation"][slots]
    anew = seal(keys, theirs["generation"]) ^ seal(keys, generations)
    mine["checksum"][slots] = theirs["checksum"] ^ anew[:, None, None]
    for name in ("plane_nbytes", "group", "chunk_tokens", "position"):
        mine[name][slots] = theirs[name]
    mine["written"][slots] = np.where(good, generations, np.uint64(0))[:, None]
    good[good] = verify_slots(arena, slots[good])
    return good
