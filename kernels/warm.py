"""`python -m kvkern.kernels.warm`: compile the CPU kernels into numba's disk cache, so that no engine waits for it."""

import importlib
import time

MODULES = ("chunk_keys_numba", "paged_copy_numba")


def compile_cpu_kernels(verbose: bool = False) -> float:
    """Compile every CPU kernel, or load it from numba's cache. Returns the seconds it took. Idempotent."""
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
    compile_cpu_kernels(verbose=True)
