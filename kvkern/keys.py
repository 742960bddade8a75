"""Namespaces and keys: what must be equal for KV to be reusable, folded into 32 bytes. Knows no tensors and no tiers.

The formulas are a fixed contract (key version 1): see kernels/chunk_keys_ref.py for the chain.
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
_MAX_HEADER_NBYTES = 100_000_000  # the format's own limit


def canonical(fields: Mapping[str, str]) -> bytes:
    """For each field in sorted order of its name: u32le length, name, u32le length, value, in UTF-8."""
    parts = []
    for name in sorted(fields):
        for text in (name, fields[name]):
            data = text.encode()
            parts += [struct.pack("<I", len(data)), data]
    return b"".join(parts)


def derive_root(fields: Mapping[str, str]) -> bytes:
    """32-byte root of a namespace: the key under which its chains start."""
    return blake3(canonical(fields), derive_key_context=_ROOT_CONTEXT).digest()


@dataclass(frozen=True, slots=True)
class Namespace:
    """What two engines must agree on to read each other's KV. The rank is not part of it: a slot holds all ranks."""

    model: str
    dtype: str  # of the KV cache, "bfloat16"
    layout: str  # how a chunk lies in a slot: `PagedLayout.fingerprint`
    chunk_tokens: int
    weights: str  # resolved revision, or `weights_fingerprint`
    group: int | None = 0  # KV group; None where adopted keys carry it
    tp_size: int = 1
    pp_size: int = 1
    salt: str | None = None  # tenant; None: shared by all
    engine_hash: str | None = None  # adopted keys: hash name, seed and tokens per hash of the engine

    def __post_init__(self) -> None:
        if not self.model or not self.weights or not self.dtype or not self.layout:
            raise ConfigError(f"namespace {self}: model, weights, dtype and layout must not be empty")
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}; it must be at least 1")

    def fields(self) -> dict[str, str]:
        """The fields that are present, as text."""
        names = ("chunk_tokens", "dtype", "group", "layout", "model", "pp_size", "salt", "tp_size", "weights")
        values = {name: getattr(self, name) for name in (*names, "engine_hash")}
        return {name: str(value) for name, value in values.items() if value is not None}

    def public_fields(self) -> dict[str, str]:
        """The fields for people and logs: a salt is a secret, only whether two are equal may be seen."""
        fields = self.fields()
        if "salt" in fields:
            fields["salt"] = blake3(fields["salt"].encode()).hexdigest()[:16]
        return fields

    @property
    def root(self) -> bytes:
        """32 bytes."""
        return derive_root(self.fields())


def split_keys(
    keys: npt.NDArray[np.uint8],  # [n, 32] uint8, contiguous
) -> list[bytes]:
    """n keys as bytes objects, which is what indexes are looked up with."""
    return keys.view(f"V{KEY_NBYTES}").reshape(-1).tolist() if len(keys) else []


def weights_fingerprint(
    path: str | Path,  # of a model directory or one weight file
) -> str:
    """32 hex digits: BLAKE3 over the name, size and samples of each weight file. Reads megabytes, not the model.

    Samples are eight of 64 KiB a file and, in safetensors files, the header and two of 4 KiB in every tensor: models that
    differ in a few tensors only, a merged adapter for example, differ too. Raises ConfigError if there is no weight file:
    then name the weights yourself.
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
    """(offset, bytes) of a safetensors file's header, and of the start and the middle of each of its tensors."""
    header_nbytes = int.from_bytes(handle.read(8), "little")
    if not 0 < header_nbytes <= min(size - 8, _MAX_HEADER_NBYTES):
        return []
    try:
        tensors = json.loads(handle.read(header_nbytes))
        found = [tensor["data_offsets"] for name, tensor in tensors.items() if name != "__metadata__"]
        spans = sorted((int(begin), int(end)) for begin, end in found)
    except (ValueError, TypeError, KeyError, AttributeError):
        return []  # not what its name says: the other samples must do
    data = 8 + header_nbytes
    starts = [data + at for begin, end in spans for at in (begin, (begin + end) // 2)]
    return [(0, data), *((at, _TENSOR_SAMPLE_NBYTES) for at in starts if 0 <= at < size)]
