"""What a slot looks like in memory: header, then the payload of every rank. The header is also the remote value's header.

    offset  field
    0       magic u64, version u32, header bytes u32, key 32 B, namespace root 32 B
    80      payload bytes u64, part bytes u64, world size u32, planes u32, generation u64, owner pid u64, owner start u64
    128     state u32, codec u32, group u32, chunk tokens u32, position of the chunk in its sequence u32, private u32 (1: of an
            engine alone, not for a store); reserved up to 256
    256     written u64[world_size]: the generation a rank has completed
    ...     checksum u64[world_size][planes], plane bytes u32[world_size][planes]; the header ends at a multiple of 4 KiB

A checksum is sealed with the chunk's key and the slot's generation: payload or checksums that a late writer of another
chunk, or of the same chunk before a reset, leaves in the slot can not verify, whatever the order of its stores. With the
plane sizes beside them a slot can be verified by who knows no layout: a daemon after a crash, a remote store's reader.

All integers little-endian. Knows bytes and offsets; knows nothing of files, indexes or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

MAGIC = int.from_bytes(b"KVKERNS1", "little")
VERSION = 2
PAGE = 4096
_FIXED_NBYTES = 256
_GOLDEN = 0x9E3779B97F4A7C15  # odd: distinct generations give distinct products
_Fields = list[tuple[str, object, int]]  # name, format, offset
_IDENTITY_FIELDS: _Fields = [
    ("magic", "<u8", 0), ("version", "<u4", 8), ("header_nbytes", "<u4", 12),
    ("key", "V32", 16), ("namespace", "V32", 48),
    ("payload_nbytes", "<u8", 80), ("part_nbytes", "<u8", 88), ("world_size", "<u4", 96), ("planes", "<u4", 100),
]  # fmt: skip
_STATE_FIELDS: _Fields = [
    ("generation", "<u8", 104), ("owner_pid", "<u8", 112), ("owner_start", "<u8", 120),
    ("state", "<u4", 128), ("codec", "<u4", 132), ("group", "<u4", 136), ("chunk_tokens", "<u4", 140), ("position", "<u4", 144),
    ("private", "<u4", 148),
]  # fmt: skip


def _structure(fields: _Fields, nbytes: int) -> np.dtype[np.void]:
    names, formats, offsets = zip(*fields, strict=True)
    spec = {"names": list(names), "formats": list(formats), "offsets": list(offsets), "itemsize": nbytes}
    return np.dtype(spec)  # type: ignore[call-overload,no-any-return]  # numpy's stubs lack the offsets form


_IDENTITY = _structure(_IDENTITY_FIELDS, 104)
IDENTITY = np.dtype("V104")  # a header's first bytes, up to and with `planes`, compared as one value
HEAD = _structure([("identity", IDENTITY, 0), *_STATE_FIELDS], 152)  # what a reservation writes, as one value


def seal(
    keys: npt.NDArray[np.void],  # [n] V32
    generations: npt.NDArray[np.uint64],  # [n] uint64
) -> npt.NDArray[np.uint64]:
    """[n] uint64: what a checksum is XORed with in the header. Any other key or generation gives another value."""
    words: npt.NDArray[np.uint64] = np.ascontiguousarray(keys).view("<u8").reshape(-1, 4)[:, 0]
    return words ^ (generations * np.uint64(_GOLDEN))


class SlotState(IntEnum):
    """FREE -> WRITING -> READY -> FREE. BAD: a worker read it and it did not verify; the manager frees it."""

    FREE = 0
    WRITING = 1
    READY = 2
    BAD = 3


def round_up(value: int, to: int) -> int:
    """The least multiple of `to` that is not below `value`."""
    return -(-value // to) * to


@dataclass(frozen=True, slots=True)
class SlotGeometry:
    """Sizes every process that maps an arena must agree on."""

    part_nbytes: int  # payload of one rank, the largest of all KV groups
    max_planes: int  # checksums a rank has room for
    world_size: int = 1

    @property
    def header_nbytes(self) -> int:
        """4 KiB, or more where the checksums need it."""
        return round_up(_FIXED_NBYTES + self.world_size * (8 + 12 * self.max_planes), PAGE)

    @property
    def part_stride(self) -> int:
        """Bytes from one rank's part to the next: page-aligned, so that each can be registered and copied alone."""
        return round_up(self.part_nbytes, PAGE)

    @property
    def slot_nbytes(self) -> int:
        """Header and all parts."""
        return self.header_nbytes + self.world_size * self.part_stride

    def identities(
        self,
        keys: npt.NDArray[np.void],  # [n] V32
        namespaces: npt.NDArray[np.void] | np.void,  # [n] V32, or one for all
    ) -> npt.NDArray[np.void]:
        """[n] V104: what the headers of these chunks start with, the format, the chunk and its sizes."""
        headers = np.empty(len(keys), dtype=_IDENTITY)
        values = {
            "magic": MAGIC, "version": VERSION, "header_nbytes": self.header_nbytes, "key": keys,
            "namespace": namespaces, "payload_nbytes": self.world_size * self.part_nbytes,
            "part_nbytes": self.part_nbytes, "world_size": self.world_size, "planes": self.max_planes,
        }  # fmt: skip
        for name, value in values.items():
            headers[name] = value
        return headers.view(IDENTITY)

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Structured dtype of a header."""
        ranks, planes = self.world_size, (self.world_size, self.max_planes)
        checksums = _FIXED_NBYTES + 8 * ranks
        fields = [
            *_IDENTITY_FIELDS,
            *_STATE_FIELDS,
            ("written", ("<u8", (ranks,)), _FIXED_NBYTES),
            ("checksum", ("<u8", planes), checksums),
            ("plane_nbytes", ("<u4", planes), checksums + 8 * ranks * self.max_planes),
        ]  # fmt: skip
        return _structure(fields, self.header_nbytes)
