"""`python -m kvkern.doctor.warm`: compiles what runs on a CPU into numba's disk cache, so that no start waits for it.

Run it at installation, or while an image is built, as the owner of the files. A process that may only read them then loads
what was compiled. See kernels/jit.py for the folders.
"""

from __future__ import annotations

import time

from ..kernels.warm import compile_cpu_kernels
from ..policy.grit import compile_kernels as compile_policy


def main() -> None:
    """Compile, and print what it took."""
    compile_cpu_kernels(verbose=True)
    begin = time.perf_counter()
    print("kvkern: compiling the policy grit ...", end=" ", flush=True)
    compile_policy()
    print(f"{time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
