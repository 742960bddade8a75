"""Namespaces and keys. A namespace lists what must be equal for KV to be reusable. Its root is a hash of that list, 32 bytes.

The formulas are a fixed contract (key version 1). kernels/chunk_keys_ref.py has the chain of keys. This module knows no
tensors and no tiers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from .errors import ConfigError

KEY_NBYTES = 32
_ROOT_CONTEXT = "kvkern chunk key v1"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SAMPLE_NBYTES = 64 << 10
_SAMPLES_PER_FILE = 8
_TENSOR_SAMPLE_NBYTES = 4 << 10
_MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors format


def canonical(fields: Mapping[str, str]) -> bytes:
    """Encode the fields, sorted by name. Each is u32le length, name, u32le length, value, in UTF-8."""
    parts = []
    for name in sorted(fields):
        for text in (name, fields[name]):
            data = text.encode()
            parts += [struct.pack("<I", len(data)), data]
    return b"".join(parts)


def derive_root(fields: Mapping[str, str]) -> bytes:
    """Return the 32-byte root of a namespace, the key under which its chains start."""
    return blake3(canonical(fields), derive_key_context=_ROOT_CONTEXT).digest()


@dataclass(frozen=True, slots=True)
class Namespace:
    """The fields that must be equal for two engines to read each other's KV.

    The rank is not one of them, because a slot holds the parts of all ranks.
    """

    model: str
    dtype: str  # of the KV cache, "bfloat16"
    layout: str  # order of a chunk's bytes in a slot: `PagedLayout.fingerprint`
    chunk_tokens: int
    weights: str  # resolved revision, or `weights_fingerprint`
    group: int | None = 0  # KV group; None if the keys come from the engine and carry the group
    tp_size: int = 1
    pp_size: int = 1
    salt: str | None = None  # tenant; None: all tenants share
    engine_hash: str | None = None  # for keys from the engine's hashes: its hash name, seed and tokens per hash

    def __post_init__(self) -> None:
        if not self.model or not self.weights or not self.dtype or not self.layout:
            raise ConfigError(
                f"the namespace {self} has an empty field; set model, weights, dtype and layout: they must not be empty"
            )
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}; it must be at least 1")

    def fields(self) -> dict[str, str]:
        """Return the fields that are not None, as text."""
        names = ("chunk_tokens", "dtype", "group", "layout", "model", "pp_size", "salt", "tp_size", "weights")
        values = {name: getattr(self, name) for name in (*names, "engine_hash")}
        return {name: str(value) for name, value in values.items() if value is not None}

    def public_fields(self) -> dict[str, str]:
        """Return the fields for logs and operators. The salt is a secret, so 16 hex digits of its hash replace it.

        These digits show only whether two salts are equal.
        """
        fields = self.fields()
        if "salt" in fields:
            fields["salt"] = blake3(fields["salt"].encode()).hexdigest()[:16]
        return fields

    @property
    def root(self) -> bytes:
        """The namespace's 32-byte root."""
        return derive_root(self.fields())


def split_keys(
    keys: npt.NDArray[np.uint8],  # [n, 32] uint8, contiguous
) -> list[bytes]:
    """Return the n keys as bytes objects, the form that indexes use."""
    return keys.view(f"V{KEY_NBYTES}").reshape(-1).tolist() if len(keys) else []


def weights_fingerprint(
    path: str | Path,  # of a model directory or one weight file
) -> str:
    """Return 32 hex digits: BLAKE3 over the name, size and samples of each weight file. Reads megabytes, not the model.

    It takes eight samples of 64 KiB from each file. From a safetensors file it also takes the header and two samples of
    4 KiB from every tensor. So two models differ even if only a few tensors do, for example after merging an adapter.
    Raises ConfigError if there is no weight file. Then name the weights yourself.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.glob("*") if p.suffix in _WEIGHT_SUFFIXES)
    if not files:
        raise ConfigError(f"{str(path)!r} holds no weight file ({', '.join(_WEIGHT_SUFFIXES)}); set `weights` yourself")
    digest = blake3()
    for file in files:
        size = file.stat().st_size
        digest.update(struct.pack("<I", len(file.name)) + file.name.encode() + struct.pack("<Q", size))
        with file.open("rb") as handle:
            spread = [max(0, size - _SAMPLE_NBYTES) * i // (_SAMPLES_PER_FILE - 1) for i in range(_SAMPLES_PER_FILE)]
            samples = [(at, _SAMPLE_NBYTES) for at in spread]
            if file.suffix == ".safetensors":
                samples += _tensor_samples(handle, size)
            for at, nbytes in samples:
                handle.seek(at)
                digest.update(handle.read(nbytes))
    return digest.hexdigest()[:32]


def _tensor_samples(handle: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Return (offset, bytes) of a safetensors file's header, and of the start and the middle of each of its tensors."""
    header_nbytes = int.from_bytes(handle.read(8), "little")
    if not 0 < header_nbytes <= min(size - 8, _MAX_HEADER_NBYTES):
        return []
    try:
        tensors = json.loads(handle.read(header_nbytes))
        found = [tensor["data_offsets"] for name, tensor in tensors.items() if name != "__metadata__"]
        spans = sorted((int(begin), int(end)) for begin, end in found)
    except (ValueError, TypeError, KeyError, AttributeError):
        return []  # the file is no safetensors file despite its name: only the other samples count
    data = 8 + header_nbytes
    starts = [data + at for begin, end in spans for at in (begin, (begin + end) // 2)]
    return [(0, data), *((at, _TENSOR_SAMPLE_NBYTES) for at in starts if 0 <= at < size)]
