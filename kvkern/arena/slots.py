"""The memory format of a slot: header, then the payload of every rank. A remote value has the same header.

    offset  field
    0       magic u64, version u32, header bytes u32, key 32 B, namespace root 32 B
    80      payload bytes u64, part bytes u64, world size u32, planes u32, generation u64, owner pid u64, owner start u64
    128     state u32, codec u32, group u32, chunk tokens u32, position of the chunk in its sequence u32, private u32 (1: only
            one engine uses it, so it goes to no store); reserved up to 256
    256     written u64[world_size]: the generation a rank has completed
    ...     checksum u64[world_size][planes], plane bytes u32[world_size][planes]; the header ends at a multiple of 4 KiB

A checksum is sealed with the chunk's key and the slot's generation. A late writer of another chunk, or of the same chunk
before a reset, may leave payload or checksums in the slot. These do not verify, whatever the order of the writer's stores.
The header also has the plane sizes. So a process that knows no layout can verify a slot: a daemon after a crash, or the
reader of a remote store.

Every process that maps the arena can write all of it. So a manager keeps a record of its own (tiers/slot_records.py): what the
header says, and a fingerprint of the header's *tail*, which is everything from `written` on.

All integers are little-endian. This module knows bytes and offsets, and no files, indexes or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
import numpy.typing as npt

from ..kernels.checksum import splitmix64

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
IDENTITY = np.dtype("V104")  # a header's first bytes, up to and including `planes`, compared as one value
# the fields that a reservation writes, as one value; key and namespace are parts of the identity
HEAD = _structure([("identity", IDENTITY, 0), ("key", "V32", 16), ("namespace", "V32", 48), *_STATE_FIELDS], 152)
MAX_GENERATION = (1 << 62) - 1  # a slot's generations never come near it


def seal(
    keys: npt.NDArray[np.void],  # [n] V32
    generations: npt.NDArray[np.uint64],  # [n] uint64
) -> npt.NDArray[np.uint64]:
    """Return [n] uint64, the values that checksums are XORed with in the header.

    Each depends on the key and the generation. Another key or generation gives another value.
    """
    words: npt.NDArray[np.uint64] = np.ascontiguousarray(keys).view("<u8").reshape(-1, 4)[:, 0]
    return words ^ (generations * np.uint64(_GOLDEN))


def fingerprints(
    tails: npt.NDArray[np.uint64],  # [n, words] uint64, copies of rows of `SlotGeometry.tail_words`
) -> npt.NDArray[np.uint64]:
    """Return [n] uint64: sum over words w of (tail[w] ^ tail[w] >> 32) * weight[w] mod 2^64. The weights are odd.

    Every single changed word changes it. It is no secret and no proof against a forger who computes.
    """
    mixed = tails >> np.uint64(32)
    mixed ^= tails
    found: npt.NDArray[np.uint64] = np.einsum(
        "ij,j->i", mixed, _tail_weights(tails.shape[1])
    )  # 10 times as fast as a sum
    return found


@cache
def _tail_weights(words: int) -> npt.NDArray[np.uint64]:
    return np.array([splitmix64(word) | 1 for word in range(words)], dtype=np.uint64)


class SlotState(IntEnum):
    """FREE -> WRITING -> READY -> FREE. BAD: a worker read the slot and its checksum failed; the manager frees it."""

    FREE = 0
    WRITING = 1
    READY = 2
    BAD = 3


def round_up(value: int, to: int) -> int:
    """Return the smallest multiple of `to` that is at least `value`."""
    return -(-value // to) * to


@dataclass(frozen=True, slots=True)
class SlotGeometry:
    """The sizes of a slot. They must be equal in all processes that map an arena."""

    part_nbytes: int  # payload of one rank in the largest KV group
    max_planes: int  # number of checksums per rank
    world_size: int = 1

    @property
    def header_nbytes(self) -> int:
        """Header size: 4 KiB, or a larger multiple of it if the checksums need more."""
        return round_up(_FIXED_NBYTES + self.world_size * (8 + 12 * self.max_planes), PAGE)

    @property
    def part_stride(self) -> int:
        """Bytes from one rank's part to the next. Page-aligned, so that each part can be registered and copied alone."""
        return round_up(self.part_nbytes, PAGE)

    @property
    def slot_nbytes(self) -> int:
        """Slot size: the header and all ranks' parts."""
        return self.header_nbytes + self.world_size * self.part_stride

    def identities(
        self,
        keys: npt.NDArray[np.void],  # [n] V32
        namespaces: npt.NDArray[np.void] | np.void,  # [n] V32, or one for all
    ) -> npt.NDArray[np.void]:
        """Return [n] V104, the first bytes of these chunks' headers: the format, the chunk and its sizes."""
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
    def tail_nbytes(self) -> int:
        """Bytes of a header from `written` on, up to its last field; a multiple of 8."""
        return round_up(self.world_size * (8 + 12 * self.max_planes), 8)

    def tail_words(
        self,
        headers: npt.NDArray[np.void],  # [n] of `dtype`
    ) -> npt.NDArray[np.uint64]:
        """Return [n, tail_nbytes / 8] uint64, a view of the headers' tails. `written` of all ranks comes first."""
        written: npt.NDArray[np.uint64] = headers["written"]
        shape, strides = (len(headers), self.tail_nbytes // 8), (headers.strides[0], 8)
        return np.lib.stride_tricks.as_strided(written, shape, strides)

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The structured dtype of a header."""
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
