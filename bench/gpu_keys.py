"""Measures chunk keys on a GPU and on the CPU in the same process: the time to hash the keys of a batch of sequences.

    device   tokens are on the GPU already and keys stay there: three launches (what the kernel is for)
    round    tokens come from the host and keys go back: `extend_keys_batch` with the triton backend, everything included
    cpu      `extend_keys_batch` with the numba backend, one thread, from uint32 arrays

`ratio_cpu` is the CPU's time over the row's time: above 1 the GPU is faster.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from _gpu import Rig, Row, arguments, in_turns, open_rig, print_row, write_json

from kvkern.kernels.chain_state import ChainState
from kvkern.kernels.chunk_keys import Backend, extend_keys_batch

CHUNK_TOKENS = 16
BATCHES = ((1, 2048), (1, 131_072), (64, 2048), (256, 8192))  # sequences, tokens each
ROOT = bytes(range(32))


def measure(rig: Rig, sequences: int, tokens: int, runs: int) -> list[Row]:
    """Measure all three ways, one row each. In a dry run all three hash on the CPU."""
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 151_936, tokens, dtype=np.uint32) for _ in range(sequences)]
    states = [ChainState.start(ROOT)] * sequences
    gpu: Backend = "numba" if rig.dry else "triton"

    def host(backend: Backend) -> float:
        rig.synchronize()
        start = time.perf_counter()
        extend_keys_batch(states, arrays, CHUNK_TOKENS, backend=backend)
        rig.synchronize()
        return time.perf_counter() - start

    walls: dict[str, list[float]] = {"round": [], "cpu": []}
    for turn in range(runs + 1):
        for name, backend in (("round", gpu), ("cpu", "numba")):
            seconds = host(backend)
            if turn:
                walls[name].append(seconds)
    found = {name: float(np.median(times)) for name, times in walls.items()}
    found["device"] = _device_seconds(rig, arrays, states, runs)
    total = sequences * tokens
    return [
        {
            "where": name, "sequences": sequences, "tokens": total, "chunk_tokens": CHUNK_TOKENS,
            "ms": found[name] * 1e3, "ns_per_token": found[name] * 1e9 / total, "ratio_cpu": found["cpu"] / found[name],
        }
        for name in ("device", "round", "cpu")
    ]  # fmt: skip


def _device_seconds(rig: Rig, arrays: list[np.ndarray], states: list[ChainState], runs: int) -> float:
    if rig.dry:
        return rig.time(lambda: extend_keys_batch(states, arrays, CHUNK_TOKENS))
    from kvkern.kernels import chunk_keys_triton as kernels

    tokens = rig.upload(torch.from_numpy(np.concatenate(arrays).view(np.int32)))
    cu_tokens = rig.upload(torch.from_numpy(np.cumsum([0, *map(len, arrays)])))
    keys = torch.empty((len(tokens) // CHUNK_TOKENS, 32), dtype=torch.uint8, device=rig.name)
    before = kernels.DeviceStates.upload(states, rig.name)
    work = {"device": lambda: kernels.extend_keys(before, tokens, cu_tokens, CHUNK_TOKENS, keys)}
    return in_turns(rig, work, runs)["device"]


def main() -> None:
    args = arguments(__doc__).parse_args()
    rig = open_rig(args.device)
    batches, runs = (BATCHES, args.runs) if not (rig.dry or args.quick) else (((1, 2048), (4, 512)), 2)
    rows: list[Row] = []
    for sequences, tokens in batches:
        for row in measure(rig, sequences, tokens, runs):
            rows.append(row)
            print_row(rig, row)
    write_json(rig, args.json, rows)


if __name__ == "__main__":
    main()
