"""Payload checksum, version 1: 64-bit, position-sensitive, linear, so tiles of one plane can be summed in any order.

A plane is read as rows of 64 bytes, a row as 16 little-endian uint32 lanes; the last row is padded with zeros.

    checksum = nbytes * R + sum over rows i, lanes l of  lane[i, l] * (P[l] + i * Q[l])      (mod 2^64)

P is odd, Q is twice an odd number, and both come from splitmix64. So every weight is odd, and any single changed lane
changes the sum. Rows that are swapped, shifted or torn also change it, unless 2^32 rows lie between them. The checksum guards
against faults of memory, files and software. It does not guard against a forger: a process that can write an arena can also
write its checksums.

With A = sum lane[i] and B = sum of the running A, one pass with two additions per lane is enough:
sum i * lane[i] = n * A - B for rows 0..n-1. GPU tiles add their parts atomically, in any order.
"""

import numpy as np
import numpy.typing as npt

ROW_NBYTES = 64
LANES = 16
_MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """Return the x-th output of the splitmix64 generator (Steele, Lea, Flood, OOPSLA 2014) seeded with 0."""
    z = ((x + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


LANE_WEIGHT = np.array([splitmix64(lane) | 1 for lane in range(LANES)], dtype=np.uint64)  # P
ROW_WEIGHT = np.array([((splitmix64(LANES + lane) | 1) << 1) & _MASK for lane in range(LANES)], dtype=np.uint64)  # Q
LENGTH_WEIGHT = splitmix64(2 * LANES) | 1  # R


def checksum(
    data: npt.NDArray[np.uint8],  # [nbytes] uint8, one plane of one rank, as it lies in the slot
) -> int:
    """Return the checksum of one plane, straight from the formula. 0 <= result < 2^64."""
    data = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    nbytes = data.size
    rows = -(-nbytes // ROW_NBYTES)
    padded = np.zeros(rows * ROW_NBYTES, dtype=np.uint8)
    padded[:nbytes] = data
    lanes = padded.view("<u4").reshape(rows, LANES).astype(np.uint64)
    index = np.arange(rows, dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        total = (lanes * (LANE_WEIGHT + index * ROW_WEIGHT)).sum(dtype=np.uint64)
    return (int(total) + nbytes * LENGTH_WEIGHT) & _MASK
