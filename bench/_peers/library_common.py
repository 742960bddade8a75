"""Shared by the library children: the shape, random pages, the loop that times a cache, the memcpy beside it. Knows no cache.

    once         fill the capacity, so that every page of the cache has been touched
    per size     (forget everything, store a new sequence, memcpy, clear the target pages, retrieve into them) x runs

Store and retrieve work on different random blocks. After each run the target's bytes must equal the source's.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Protocol

import torch

LAYERS, HEADS, HEAD_DIM, BLOCK_TOKENS = 32, 8, 128, 16  # Llama-3.1-8B
DTYPE = torch.bfloat16
BLOCK_NBYTES = 2 * LAYERS * BLOCK_TOKENS * HEADS * HEAD_DIM * DTYPE.itemsize
MEMCPY_NBYTES = 256 << 20
VOCABULARY = 128_256
IDLE_S = 0.02  # pause before each timed call, after which the last call's threads have stopped spinning for work


class Pages(Protocol):
    """An engine's KV blocks in host memory."""

    def clear(self, blocks: torch.Tensor) -> None: ...
    def equal(self, left: torch.Tensor, right: torch.Tensor) -> bool: ...


class Cache(Protocol):
    """One library behind three methods. Each raises RuntimeError if the library did less than asked."""

    def store(self, tokens: torch.Tensor, blocks: torch.Tensor) -> None: ...
    def retrieve(self, tokens: torch.Tensor, blocks: torch.Tensor) -> None: ...
    def forget(self) -> None: ...


def random_bytes(*shape: int) -> torch.Tensor:
    """Return a tensor of DTYPE with random bits, in which every bit pattern may occur, NaNs too."""
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16).view(DTYPE)


class LayerPages:
    """FlashAttention's layout: per layer [2, num_blocks, BLOCK_TOKENS, HEADS, HEAD_DIM]."""

    def __init__(self, num_blocks: int) -> None:
        self.layers = [random_bytes(2, num_blocks, BLOCK_TOKENS, HEADS, HEAD_DIM) for _ in range(LAYERS)]

    def clear(self, blocks: torch.Tensor) -> None:
        for layer in self.layers:
            layer[:, blocks] = 0

    def equal(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        bits = (layer.view(torch.int16) for layer in self.layers)
        return all(torch.equal(layer[:, left], layer[:, right]) for layer in bits)


class BlockPages:
    """Blocks that hold all their layers: [num_blocks, LAYERS, 2, BLOCK_TOKENS, HEADS, HEAD_DIM]."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = random_bytes(num_blocks, LAYERS, 2, BLOCK_TOKENS, HEADS, HEAD_DIM)

    def clear(self, blocks: torch.Tensor) -> None:
        self.blocks[blocks] = 0

    def equal(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        bits = self.blocks.view(torch.int16)
        return torch.equal(bits[left], bits[right])


PAGES = {"layers": LayerPages, "blocks": BlockPages}


@dataclass(frozen=True)
class Job:
    """The parent's job."""

    sizes: list[int]  # tokens, ascending
    runs: int
    threads: int
    capacity_gib: int
    pages: str  # "layers" or "blocks", a key of PAGES

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the pages: the longest sequence twice, once to store and once to retrieve."""
        return 2 * max(self.sizes) // BLOCK_TOKENS


class Loop:
    """Times one cache. Owns neither the cache nor the pages."""

    def __init__(self, job: Job, pages: Pages, cache: Cache) -> None:
        self._job, self._pages, self._cache = job, pages, cache
        self._source = torch.ones(MEMCPY_NBYTES, dtype=torch.uint8)
        self._target = torch.zeros_like(self._source)
        self._pool = ThreadPoolExecutor(job.threads)

    def warm(self) -> None:
        """Touch all of the cache's memory."""
        nbytes = max(self._job.sizes) // BLOCK_TOKENS * BLOCK_NBYTES
        for _ in range(-(-(self._job.capacity_gib << 30) // nbytes) + 1):
            source, _ = self._blocks(max(self._job.sizes))
            self._cache.store(_tokens(max(self._job.sizes)), source)

    def measure(self, num_tokens: int) -> dict[str, Any]:
        """Return the seconds of each run of store, retrieve and memcpy. One run before them does not count."""
        times: dict[str, list[float]] = {"store_s": [], "retrieve_s": [], "memcpy_s": []}
        for _ in range(self._job.runs + 1):
            self._run(num_tokens, times)
        return (
            {
                "case": "library",
                "tokens": num_tokens,
                "nbytes": num_tokens // BLOCK_TOKENS * BLOCK_NBYTES,
                "memcpy_nbytes": MEMCPY_NBYTES,
                "threads": self._job.threads,
                "round_trip_equal": True,  # else _run has raised
            }
            | {name: values[1:] for name, values in times.items()}
        )

    def _run(self, num_tokens: int, times: dict[str, list[float]]) -> None:
        tokens = _tokens(num_tokens)
        source, target = self._blocks(num_tokens)
        self._cache.forget()
        times["store_s"].append(_seconds(lambda: self._cache.store(tokens, source)))
        times["memcpy_s"].append(_seconds(self._memcpy))
        self._pages.clear(target)
        times["retrieve_s"].append(_seconds(lambda: self._cache.retrieve(tokens, target)))
        if not self._pages.equal(source, target):
            raise RuntimeError(
                f"{num_tokens} tokens came back with other bytes than were stored. The library is wrong here."
            )

    def _memcpy(self) -> None:
        """Run libc's memcpy on as many threads as the cache has. Each thread copies its share."""
        share = MEMCPY_NBYTES // self._job.threads
        source, target = self._source.data_ptr(), self._target.data_ptr()
        starts = range(0, share * self._job.threads, share)
        list(self._pool.map(lambda at: ctypes.memmove(target + at, source + at, share), starts))

    def _blocks(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = num_tokens // BLOCK_TOKENS
        order = torch.randperm(self._job.num_blocks)
        return order[:count], order[count : 2 * count]


def _tokens(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,))


def _seconds(act: Callable[[], object]) -> float:
    time.sleep(IDLE_S)
    started_s = time.perf_counter()
    act()
    return time.perf_counter() - started_s


def main(open_cache: Callable[[Job], tuple[Pages, Cache]]) -> None:
    """Read the job from stdin, time the cache, print one JSON line per size. The library's own output goes to stderr."""
    job = Job(**json.loads(sys.stdin.buffer.readline()))
    out = _take_stdout()
    torch.set_num_threads(job.threads)
    torch.manual_seed(20)
    pages, cache = open_cache(job)
    loop = Loop(job, pages, cache)
    loop.warm()
    for num_tokens in job.sizes:
        print(json.dumps(loop.measure(num_tokens)), file=out, flush=True)
    print(json.dumps({"case": "done"}), file=out, flush=True)


def _take_stdout() -> IO[str]:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out
