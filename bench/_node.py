"""Tools of bench/node.py: a daemon process, paged KV, and an engine's part. Measures one acquire; prints nothing."""

from __future__ import annotations

import hashlib
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvkern.arena.file import Arena
from kvkern.arena.slots import PAGE, SlotGeometry
from kvkern.cache.manager import Cache
from kvkern.kernels import layout as L
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.node import framing, protocol
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.client.cache_client import NodeClient
from kvkern.tiers.base import ChunkShape
from kvkern.transfer.base import ChunkBatch
from kvkern.transfer.host import HostCopier

CHUNKS = 128  # per sequence
BLOCK_TOKENS, HEADS, HEAD_DIM = 16, 8, 128  # Llama-3.1-8B; a chunk is a block, 64 KiB a layer
GIVE_UP_S = 60.0
SHAPE = ChunkShape(bytes(range(32)), group=0, chunk_tokens=BLOCK_TOKENS)
SPAWN = get_context("spawn")


def sequence(name: int | str, chunks: int = CHUNKS) -> list[bytes]:
    """Return the keys of a sequence. Sequences of different names share no chunk."""
    return [hashlib.blake2b(f"{name} {i}".encode(), digest_size=32).digest() for i in range(chunks)]


# -- a daemon ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Daemon:
    """A daemon that runs."""

    pid: int
    path: Path  # of its socket

    def cpu_s(self) -> float:
        """Return the CPU time of the daemon's only thread so far."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def stat(self) -> dict[str, Any]:
        with AdminClient(self.path) as admin:
            return admin.ask(protocol.Stat(1))[0]


@contextmanager
def daemon(geometry: SlotGeometry, slots: int, prefault: bool = True, options: Sequence[str] = ()) -> Iterator[Daemon]:
    """Run `kvkern serve` with an arena of its own. Both are gone afterwards."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix=f"kvkern-{os.getuid()}-bench-node-") as folder:
        path = Path(folder) / "socket"
        capacity = PAGE + slots * geometry.slot_nbytes
        command = [
            sys.executable, "-m", "kvkern", "serve", "--socket", str(path), "--capacity", str(capacity),
            "--arena-dir", folder, "--prefault" if prefault else "--no-prefault", *options,
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                if not process.stdout.readline().startswith("kvkern: serving"):
                    raise RuntimeError(f"the daemon on {path} did not start; its errors are above")
                yield Daemon(process.pid, path)
            finally:
                process.terminate()


def resident_nbytes(pid: int) -> int:
    """Return the resident memory of a process without its shared memory, which is the arena."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines if line.startswith("Rss"))}
    return (kib["RssAnon"] + kib["RssFile"]) << 10


REQUEST = framing.encode(protocol.Acquire(1, b"".join(sequence(0)), True))
ANSWER = framing.encode(protocol.Acquired(1, 1, [], bytes(4 * CHUNKS), bytes(8 * CHUNKS)))


def echo_main(path: Path) -> None:
    """Answer every REQUEST on a Unix socket with ANSWER, until terminated. Has one thread, like the daemon."""
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(str(path))
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        received: dict[object, int] = {}
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                assert isinstance(key.fileobj, socket.socket)
                got = len(key.fileobj.recv(1 << 16))
                received[key.fd] = received.get(key.fd, 0) + got
                if not got:
                    selector.unregister(key.fileobj)
                elif received[key.fd] % len(REQUEST) == 0:
                    key.fileobj.sendall(ANSWER)


@contextmanager
def echoes(path: Path) -> Iterator[Path]:
    process = SPAWN.Process(target=echo_main, args=(path,), daemon=True)
    process.start()
    try:
        while not path.exists():
            time.sleep(0.05)
        yield path
    finally:
        process.terminate()
        process.join()


# -- an engine's part ----------------------------------------------------------------------------------------------------


class Pages:
    """Paged KV of `layers` layers with room for one sequence. A number names its content."""

    def __init__(self, layers: int) -> None:
        self.tensors = [
            torch.zeros(2, CHUNKS, BLOCK_TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(layers)
        ]
        self.layout = L.flash_attention(self.tensors)
        self.paged = PagedTensors.bind(self.layout, self.tensors)
        self.nbytes = CHUNKS * self.layout.part_nbytes(1)

    @property
    def geometry(self) -> SlotGeometry:
        return SlotGeometry(self.layout.part_nbytes(1), len(self.layout.planes))

    def fill(self, name: int) -> None:
        random_bits = torch.Generator().manual_seed(name)
        for tensor in self.tensors:
            tensor.view(torch.int16).random_(-(1 << 15), 1 << 15, generator=random_bits)

    def holds(self, name: int) -> bool:
        random_bits = torch.Generator().manual_seed(name)
        return all(
            torch.equal(
                tensor.view(torch.int16),
                torch.empty_like(tensor, dtype=torch.int16).random_(-(1 << 15), 1 << 15, generator=random_bits),
            )
            for tensor in self.tensors
        )


class Engine:
    """Copies between pages and one cache, a daemon's or an embedded one."""

    def __init__(self, cache: Cache | NodeClient, arena: Arena, pages: Pages, threads: int) -> None:
        self.cache = cache
        self._copier = HostCopier([pages.paged], arena, 0, 1, threads)

    def close(self) -> None:
        self._copier.close()

    def load(self, keys: list[bytes]) -> float:
        """Load the whole sequence into the pages and verify it. Returns the seconds that the acquire took."""
        start = time.perf_counter()
        lease = self.cache.acquire(keys)
        acquired = time.perf_counter()
        if len(lease.slots) != len(keys):
            raise RuntimeError(f"{len(lease.slots)} of {len(keys)} chunks hit")
        unused = np.zeros(len(keys), dtype=np.uint64)
        job = self._copier.load([_batch(keys, lease.slots, unused, range(len(keys)), lease.fingerprints)])
        job.run_unclaimed()
        if not job.wait().ok.all():
            raise RuntimeError("a loaded chunk did not verify: its bytes in the arena are wrong")
        self.cache.release(lease)
        return acquired - start

    def store(self, keys: list[bytes]) -> int:
        """Store every chunk. Returns how many stores it took, because a daemon grants only some slots at a time."""
        at = {key: i for i, key in enumerate(keys)}
        left, stores, deadline = keys, 0, time.perf_counter() + GIVE_UP_S
        while left:
            reservation = self.cache.reserve(keys, left, SHAPE)
            generations = np.array(reservation.generations, dtype=np.uint64)
            rows = [at[key] for key in reservation.keys]
            job = self._copier.store([_batch(reservation.keys, reservation.slots, generations, rows)])
            job.run_unclaimed()
            job.wait()
            if self.cache.commit(reservation) != len(rows):
                raise RuntimeError("a chunk that was written was not published")
            left = left[len(rows) :]
            stores += bool(rows)
            if time.perf_counter() > deadline:
                raise RuntimeError(f"{len(left)} chunks could not be stored in {GIVE_UP_S:.0f} s")
        return stores


def _batch(
    keys: Sequence[bytes], slots: Sequence[int], generations: Any, rows: Sequence[int], fingerprints: Any = None
) -> ChunkBatch:
    blocks = np.array(rows, dtype=np.int32).reshape(-1, 1)
    at, names = np.array(slots, dtype=np.int64), np.frombuffer(b"".join(keys), "V32")
    return ChunkBatch(0, blocks, at, generations, names, SHAPE.namespace, fingerprints)
