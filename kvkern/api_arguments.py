"""Checks what an engine passes to the API, and names the engine's part of the KV. Knows no cache.

What cannot be named is refused: two parts of one name would be loaded for each other, with checksums that match.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .config import launched_processes
from .errors import ConfigError

if TYPE_CHECKING:
    import torch

BlockTable = npt.NDArray[np.integer] | Sequence[int]


def as_count(name: str, value: Any) -> int:
    """Return a whole number as int. Raises ConfigError for anything else, such as 7.0 and True."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); expected a whole number")
    return operator.index(value)


def as_block_ids(block_table: BlockTable) -> npt.NDArray[np.int64]:
    """Return the block ids of one sequence as [n] int64. Raises ConfigError for anything but whole numbers in one dimension."""
    try:
        table = np.asarray(block_table)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"block_table is no list of block ids ({error}); pass one in host memory") from error
    if table.ndim != 1:
        raise ConfigError(
            f"block_table has the shape {table.shape}; pass the block ids of one sequence, in one dimension"
        )
    if table.size and table.dtype.kind not in "iu":
        raise ConfigError(f"block_table holds {table.dtype}; expected block ids, which are whole numbers")
    return table.astype(np.int64)


def check_salt(salt: object) -> None:
    """Raise ConfigError for a salt that is no text, or empty. The message does not show it."""
    if not isinstance(salt, str) or not salt:
        what = "empty" if salt == "" else f"of the type {type(salt).__name__}"
        raise ConfigError(
            f"the salt is {what}; give every tenant its own text, or leave `salt` out if all tenants may share"
        )


def part_of_kv(tp_size: int | None, pp_size: int, rank: int | None, shared: bool) -> dict[str, int | None]:
    """Return the fields of a namespace that name this process's part of the KV.

    Raises ConfigError if the part has no name: two ranks of one name would load each other's heads or layers, and every
    checksum would match.
    """
    tp, pp = as_count("tp_size", 1 if tp_size is None else tp_size), as_count("pp_size", pp_size)
    if min(tp, pp) < 1:
        raise ConfigError(f"tp_size is {tp} and pp_size is {pp}; both must be at least 1")
    if tp * pp > 1 and rank is None:
        raise ConfigError(f"tp_size={tp} and pp_size={pp} split the KV into {tp * pp} parts, but `rank` is missing; name this "
                          f"process's part, from 0 to {tp * pp - 1}")  # fmt: skip
    if tp_size is None and pp == 1:
        if rank is not None:
            raise ConfigError(f"rank is {rank!r}, but tp_size is missing; say into how many parts the heads are split")
        if shared and (processes := _num_processes()) > 1:
            raise ConfigError(
                f"this process is one of {processes}, and nothing says which part of the KV it has. A cache that others read "
                f"must know: set tp_size, pp_size and rank, or tp_size=1 if every process has whole KV"
            )
    if rank is not None and not 0 <= as_count("rank", rank) < tp * pp:
        raise ConfigError(f"rank is {rank}; tp_size={tp} and pp_size={pp} make ranks 0 to {tp * pp - 1}")
    return {"tp_size": tp, "pp_size": pp, "rank": as_count("rank", rank) if tp * pp > 1 else None}


def _num_processes() -> int:
    """Return how many processes compute together, as far as torch or the launcher says."""
    import torch.distributed as distributed

    joined = distributed.is_available() and distributed.is_initialized()
    return max(distributed.get_world_size() if joined else 1, launched_processes())


def dtype_of(tensors: Sequence[torch.Tensor], dtype: str | None, shared: bool) -> str:
    """Return the namespace's dtype. Raises ConfigError if nobody says what tensors of bytes mean, and others read them."""
    name = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    if dtype is None and shared and name in ("int8", "uint8"):
        raise ConfigError(
            f"the tensors are {name}, and a cache that others read must know what the bytes mean; set dtype, for example "
            f"'float8_e4m3fn', and name in it how your engine packs a page"
        )
    return name if dtype is None else dtype
