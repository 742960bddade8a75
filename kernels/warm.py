"""`python -m kvkern.kernels.warm`: compile the CPU kernels into numba's disk cache, so that no engine waits for it."""

import importlib
import time

MODULES = ("chunk_keys_numba", "paged_copy_numba")


def warm(verbose: bool = False) -> float:
    """Compile, or load from the cache, every CPU kernel. Returns the seconds it took; idempotent."""
    start = time.perf_counter()
    for name in MODULES:
        if verbose:
            print(f"kvkern: compiling {name} ...", end=" ", flush=True)
        begin = time.perf_counter()
        importlib.import_module(f"{__package__}.{name}")
        if verbose:
            print(f"{time.perf_counter() - begin:.1f} s", flush=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    warm(verbose=True)
