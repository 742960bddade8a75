"""Devices that the Triton kernels are compiled for, and the device they run on. No other file here reads the environment."""

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
    """An architecture that the kernels are compiled for ahead of time."""

    name: str  # "sm_90", "gfx942"
    backend: str  # Triton's name: "cuda" or "hip"
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
    """Return True if Triton interprets the kernels on host tensors. Triton decides this when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def require_triton_device() -> str:
    """Return the device type that Triton kernels can run on: "cuda" (also on ROCm), or "cpu" in the interpreter.

    Raises LayoutError if there is none.
    """
    import torch

    if interpreted():
        return "cpu"
    if not torch.cuda.is_available():
        raise LayoutError(
            "backend 'triton' cannot run: torch finds no GPU on this host. It needs a GPU, or TRITON_INTERPRET=1 set before "
            "the start; on the CPU use backend 'numba'"
        )
    return "cuda"


def require_current_device(device: torch.device) -> None:
    """Raise LayoutError unless `device` is the current one: Triton launches on the current stream of the current device."""
    import torch

    if device.type == "cuda" and device.index != torch.cuda.current_device():
        current = torch.cuda.current_device()
        raise LayoutError(
            f"the tensors are on {device}, but the current device is cuda:{current}: call this inside "
            f"`with torch.cuda.device({device.index})`"
        )


@cache
def warp_size() -> int:
    """Return the threads per warp of the device that the kernels run on."""
    import torch

    return 64 if torch.version.hip else 32


def register_limit(registers: int, backend: str | None = None) -> dict[str, int]:
    """Return the compile options that let a thread use this many registers.

    `backend` is the one of an ahead-of-time compilation; None means the device at hand. Without the limit ptxas aims at more
    resident thread blocks than a capped grid has, and spills for them.
    """
    if backend is None:
        backend = "none" if interpreted() else "hip" if warp_size() == 64 else "cuda"
    return {"maxnreg": registers} if backend == "cuda" else {}
