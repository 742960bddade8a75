"""Helpers of several test files: arenas in a temporary folder, distinct keys, guarded memory, threads. Asserts nothing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from kvkern.arena.file import Arena, ArenaSpec, create_or_attach
from kvkern.arena.slots import SlotGeometry
from kvkern.cache.manager import Cache
from kvkern.tiers.base import ChunkShape, Reservation
from kvkern.tiers.dram import DramTier

GUARD = 0xA5
NAMESPACE = bytes(range(32))
SHAPE = ChunkShape(NAMESPACE, group=0, chunk_tokens=16)


def key(*parts: object) -> bytes:
    """Return a 32-byte key, a different one for every tuple of parts."""
    return hashlib.sha256(repr(parts).encode()).digest()


def chain_keys(name: object, count: int, start: int = 0) -> list[bytes]:
    """Return the keys of chunks [start, start + count) of one sequence."""
    return [key(name, i) for i in range(start, start + count)]


def make_arena(
    directory: Path, slots: int = 8, part_nbytes: int = 256, planes: int = 2, world_size: int = 1, name: str = "arena"
) -> Arena:
    spec = ArenaSpec(SlotGeometry(part_nbytes, planes, world_size), slots)
    return create_or_attach(spec, directory / name)


def write(arena: Arena, reservation: Reservation, ranks: Iterable[int] | None = None) -> None:
    """Mark the reserved slots written by these ranks (default: all), as `Copier.store` does. Writes no payload."""
    slots = np.array(reservation.slots, dtype=np.int64)
    for rank in range(arena.spec.geometry.world_size) if ranks is None else ranks:
        arena.headers["written"][slots, rank] = np.array(reservation.generations, dtype=np.uint64)


def put(cache: Cache | DramTier, arena: Arena, chain: Sequence[bytes]) -> int:
    """Reserve, write and commit all of a sequence. Returns the number of chunks published."""
    reservation = cache.reserve(chain, chain, SHAPE)
    write(arena, reservation)
    return cache.commit(reservation)


def run_in_threads(work: Callable[[int], None], count: int) -> None:
    """Run `work(i)` in a thread of its own for each i in [0, count), and wait for all of them."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Threads:
    """Threads that work until the context is left: in a loop, until `stop` is set."""

    def __init__(self, works: Iterable[Callable[[], None]]) -> None:
        self.stop = threading.Event()
        self._threads = [threading.Thread(target=work) for work in works]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join()


def guarded(
    nbytes: int,
    seed: int,
    guard: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [nbytes] uint8 noise and the whole buffer: the noise has `guard` bytes of GUARD on both sides."""
    whole = torch.full((nbytes + 2 * guard,), GUARD, dtype=torch.uint8)
    inner = whole[guard : guard + nbytes]
    inner.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return inner, whole


def twin(tensors: Sequence[torch.Tensor], device: str = "cpu") -> list[torch.Tensor]:
    """Copy the tensors' storages to `device` and return the same views of them. Tensors that share a storage still do."""
    copies: dict[int, torch.UntypedStorage] = {}
    out = []
    for t in tensors:
        storage = t.untyped_storage()
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = storage.clone() if device == "cpu" else storage.to(device=device)
        copy = copies[storage.data_ptr()]
        empty = torch.empty(0, dtype=t.dtype, device=device)
        out.append(empty.set_(copy, t.storage_offset(), t.shape, t.stride()))
    return out


def storage_bytes(tensors: Sequence[torch.Tensor]) -> list[npt.NDArray[np.uint8]]:
    """Copy the whole storages behind some tensors, guards included."""
    return [
        torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone().cpu().numpy()
        for t in tensors
    ]
