"""Which devices the Triton kernels are built for, and where they run now. The only file here that reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .errors import LayoutError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Target:
    """An architecture that kernels are compiled for ahead of time."""

    name: str  # "sm_90", "gfx942"
    backend: str  # Triton's: "cuda" or "hip"
    arch: int | str
    warp_size: int


TARGETS = (
    Target("sm_80", "cuda", 80, 32),  # A100
    Target("sm_89", "cuda", 89, 32),  # L4, L40S, RTX 4090
    Target("sm_90", "cuda", 90, 32),  # H100, H200
    Target("sm_100", "cuda", 100, 32),  # B200
    Target("gfx942", "hip", "gfx942", 64),  # MI300
)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on host tensors. Decided by Triton when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def require_device() -> str:
    """Where Triton kernels can run: "cuda" (also ROCm's name), or "cpu" in its interpreter. Raises LayoutError if nowhere."""
    import torch

    if interpreted():
        return "cpu"
    if not torch.cuda.is_available():
        raise LayoutError(
            "backend 'triton' needs a GPU, or TRITON_INTERPRET=1 set before the start; this host has no GPU"
        )
    return "cuda"


def require_current(device: torch.device) -> None:
    """Raise LayoutError unless `device` is where Triton launches: the current device, on its current stream."""
    import torch

    if device.type == "cuda" and device.index != torch.cuda.current_device():
        current = torch.cuda.current_device()
        raise LayoutError(
            f"the tensors are on {device}, the current device is cuda:{current}: use torch.cuda.device({device.index})"
        )


@cache
def warp_size() -> int:
    """Threads per warp of the device kernels are launched on."""
    import torch

    return 64 if torch.version.hip else 32


def register_limit(registers: int, backend: str | None = None) -> dict[str, int]:
    """Compile options that let a thread have so many registers. `backend`: of a compilation ahead; None: here and now.

    Without it ptxas aims for more resident blocks than a capped grid has, and spills for them.
    """
    if backend is None:
        backend = "none" if interpreted() else "hip" if warp_size() == 64 else "cuda"
    return {"maxnreg": registers} if backend == "cuda" else {}
