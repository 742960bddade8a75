"""Builds the optional CUDA sources of kernels/csrc. All other build settings are in pyproject.toml.

It builds nothing unless KVKERN_BUILD_CUDA=1 is set and there are sources. The Triton and numba kernels need no build.
    kernels/csrc/*.cu -> nvcc -shared -> kvkern/kernels/_cuda.*.so   (a plain C interface, loaded by ctypes; no torch headers)
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_extensions() -> list[Extension]:
    if os.environ.get("KVKERN_BUILD_CUDA") != "1":
        return []
    sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "kernels" / "csrc").glob("*.cu"))]
    return [Extension("kvkern.kernels._cuda", sources)] if sources else []


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    if nvcc is None:
        where = f"CUDA_HOME={home}" if home else "PATH"
        raise SystemExit(
            f"KVKERN_BUILD_CUDA=1 is set, but there is no nvcc in {where}. Install the CUDA toolkit, or set CUDA_HOME, "
            "or unset KVKERN_BUILD_CUDA: the Triton kernels need no build."
        )
    return nvcc


class BuildCuda(build_ext):
    """Compiles each extension with one nvcc call. nvcc chooses the host compiler."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        arch = os.environ.get("KVKERN_CUDA_ARCH", "all-major")
        flags = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-arch={arch}"]
        subprocess.run([find_nvcc(), *flags, "-o", str(out), *ext.sources], cwd=ROOT, check=True)


setup(ext_modules=cuda_extensions(), cmdclass={"build_ext": BuildCuda})
