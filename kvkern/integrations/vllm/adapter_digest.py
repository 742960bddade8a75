"""Digests of LoRA adapters: what names the KV that an engine computes with one.

    digest = BLAKE3(is_3d_lora_weight, then name, size and content of each .json and weight file of the adapter's folder)

vLLM names an adapter by name and path, so an adapter that was trained anew in place would be given the old one's KV.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from blake3 import blake3

from ...errors import ConfigError
from ...file_digests import FileDigests
from . import shim

_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".tensors")
# fields of vLLM's LoRAConfig that say how many adapters there is room for, not what they compute
_CAPACITY = {"max_loras", "max_cpu_loras", "specialize_active_lora", "default_mm_loras"}


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """The adapter under which a request's KV is named. Every worker checks it before it stores or loads that KV."""

    request_id: str
    request: shim.LoRARequest
    digest: str
    since_step: int = 0  # the first step that computed some of the request's KV

    @property
    def adapter_id(self) -> int:
        """The number under which the engine holds the adapter."""
        return int(self.request.lora_int_id)


class AdapterDigests:
    """Digests of the folders that requests name. A file that has not changed is read once."""

    def __init__(self) -> None:
        self._files = FileDigests(mapped=False)  # an adapter may be cut short while the engine runs

    def digest(self, request: shim.LoRARequest) -> str | None:
        """Return 32 hex digits. None: the content cannot be known, because it is not in a local folder or is being written."""
        folder = Path(os.path.expanduser(request.lora_path))
        if getattr(request, "tensorizer_config_dict", None):
            return None  # the weights are elsewhere
        digest = blake3(b"3d" if getattr(request, "is_3d_lora_weight", False) else b"")
        try:
            files = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())
            for file in files:
                content = self._files.digest(file)
                digest.update(struct.pack("<I", len(file.name)) + file.name.encode() + content)
        except (OSError, ConfigError):
            return None
        return digest.hexdigest()[:32] if files else None


def lora_settings(
    lora_config: Any,  # vLLM's LoRAConfig
) -> str:
    """Return 16 hex digits of the engine's settings that change what an adapter computes."""
    values = {f.name: str(getattr(lora_config, f.name)) for f in fields(lora_config) if f.name not in _CAPACITY}
    return blake3(repr(sorted(values.items())).encode()).hexdigest()[:16]
