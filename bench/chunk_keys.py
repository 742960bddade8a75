"""Chunk keys on one thread: the cost of naming a sequence, compared with vLLM's block hashing in the same process.

    numba, ref:    a whole call of chunk_keys(root, tokens, 16), with a uint32 array or a list of ints
    vLLM:          hash_block_tokens over a list of ints, block by block, each keyed by the previous hash; sha256, sha256_cbor
    adopted keys:  adopt_keys(root, keys of 36 bytes): vLLM's hash and the KV group

A ratio is vLLM's time over ours for the same tokens. It is absent if vLLM is not installed. Times are medians of
repetitions that take turns. Each turn begins with a call that does not count, because the previous one emptied the caches.

Targets: 131,072 uint32 tokens at 2.4 ns/token, 25 times as fast as sha256, 50 times as sha256_cbor; 8,192 keys adopted in 1 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import numpy as np
from _common import option_parser, print_row, write_json

from kvkern.kernels.chunk_keys import Backend, adopt_keys, chunk_keys
from kvkern.kernels.chunk_keys_ref import adopt_keys as adopt_keys_ref

CHUNK_TOKENS = 16
ENGINE_KEY_NBYTES = 36
ROOT = bytes(range(32))
VOCABULARY = 151_936

Row = dict[str, object]
Work = Callable[[], object]


def vllm_hashers() -> dict[str, Callable[[list[int]], object]]:
    """Return name -> function that hashes a text sequence as vLLM's request hasher does. Empty if vLLM is not installed."""
    try:
        from vllm.utils.hashing import sha256, sha256_cbor
        from vllm.v1.core.kv_cache_utils import hash_block_tokens, init_none_hash
    except ImportError:
        return {}

    def hasher(function: Callable[[object], bytes]) -> Callable[[list[int]], object]:
        init_none_hash(function)  # NONE_HASH has 32 bytes with either function, so the choice does not change the time

        def run(tokens: list[int]) -> object:
            hashes: list[bytes] = []
            parent = None
            for start in range(0, len(tokens) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
                parent = hash_block_tokens(function, parent, tokens[start : start + CHUNK_TOKENS], None)
                hashes.append(parent)
            return hashes

        return run

    return {"sha256": hasher(sha256), "sha256_cbor": hasher(sha256_cbor)}


def median_call_s(works: Mapping[str, Work], runs: int, calls: int) -> dict[str, float]:
    """Return the median seconds per call of each work. They take turns, so that other load on the machine meets all of them."""
    times_s: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            work()
            start = time.perf_counter()
            for _ in range(calls):
                work()
            times_s[name].append((time.perf_counter() - start) / calls)
    return {name: median(column) for name, column in times_s.items()}


def hashing_rows(num_tokens: int, cases: list[tuple[Backend, str]], runs: int) -> list[Row]:
    """Measure chunk_keys. Returns one row per (backend, input)."""
    array = np.random.default_rng(0).integers(0, VOCABULARY, num_tokens, dtype=np.uint32)
    ids = array.tolist()
    inputs = {"uint32": array, "list": ids}
    works: dict[str, Work] = {
        f"{backend} {kind}": (lambda b=backend, k=kind: chunk_keys(ROOT, inputs[k], CHUNK_TOKENS, backend=b))
        for backend, kind in cases
    }
    works |= {name: (lambda h=hasher: h(ids)) for name, hasher in vllm_hashers().items()}
    times_s = median_call_s(works, runs, calls=max(1, 50_000 // num_tokens))
    rows: list[Row] = []
    for backend, kind in cases:
        own_s = times_s[f"{backend} {kind}"]
        ratios = {
            f"ratio_vllm_{name}": times_s[name] / own_s if name in times_s else None
            for name in ("sha256", "sha256_cbor")
        }
        rows.append({
            "backend": backend, "tokens": num_tokens, "chunk_tokens": CHUNK_TOKENS, "input": kind,
            "ns_per_token": 1e9 * own_s / num_tokens, **ratios,
        })  # fmt: skip
    return rows


def adoption_rows(count: int, runs: int) -> list[Row]:
    """Measure adopt_keys. Returns one row per backend."""
    random = np.random.default_rng(1)
    keys = [random.bytes(ENGINE_KEY_NBYTES) for _ in range(count)]
    works: dict[str, Work] = {"numba": lambda: adopt_keys(ROOT, keys), "ref": lambda: adopt_keys_ref(ROOT, keys)}
    times_s = median_call_s(works, runs, calls=1)
    return [{"backend": name, "adopted_keys": count, "ms": 1e3 * seconds} for name, seconds in times_s.items()]


def main() -> None:
    args = option_parser(
        __doc__, quick="fewer tokens and runs, takes seconds: for smoke tests, not for figures"
    ).parse_args()
    long, runs = (8192, 2) if args.quick else (131_072, 11)
    rows = hashing_rows(long, [("numba", "uint32"), ("numba", "list"), ("ref", "uint32")], runs)
    rows += hashing_rows(2048, [("numba", "uint32"), ("numba", "list")], runs)
    rows += adoption_rows(512 if args.quick else 8192, runs)
    for row in rows:
        print_row(row)
    print(str(__doc__).strip().splitlines()[-1])
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
