"""Namespaces and keys. A namespace lists what must be equal for KV to be reusable. Its root is a hash of that list, 32 bytes.

The formulas are a fixed contract (key version 1). kernels/chunk_keys_ref.py has the chain of keys. This module knows no
tensors and no tiers.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from .config import user_cache_dir
from .errors import ConfigError
from .file_digests import FileDigests

KEY_NBYTES = 32
_ROOT_CONTEXT = "kvkern chunk key v1"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
PROGRESS_S = 5.0  # between two lines of progress


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
    """The fields that must be equal for two engines to read each other's KV. Raises ConfigError for a field that names nothing.

    vLLM's ranks write their parts into one slot, so a slot of vLLM names no rank. A slot of `open_cache` holds the part of one
    rank, and names it.
    """

    model: str
    dtype: str  # of the KV cache, "bfloat16"
    layout: str  # order of a chunk's bytes in a slot: `PagedLayout.fingerprint`
    chunk_tokens: int
    weights: str  # resolved revision, or `weights_fingerprint`
    group: int | None = 0  # KV group; None if the keys come from the engine and carry the group
    tp_size: int = 1
    pp_size: int = 1
    rank: int | None = None  # whose part a slot holds, in [0, tp_size * pp_size); None: the parts of all ranks
    salt: str | None = field(default=None, repr=False)  # tenant, a secret; None: all tenants share
    adapter: str | None = None  # LoRA: digest of the adapter's files and of the settings that load them
    engine_hash: str | None = None  # for keys from the engine's hashes: its hash name, seed and tokens per hash

    def __post_init__(self) -> None:
        for found in fields(self):
            _check_field(found.name, getattr(self, found.name), str(found.type))
        if not self.model or not self.weights or not self.dtype or not self.layout:
            raise ConfigError(
                f"the namespace {self} has an empty field; set model, weights, dtype and layout: they must not be empty"
            )
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {self.chunk_tokens}; it must be at least 1")
        if self.tp_size < 1 or self.pp_size < 1:
            raise ConfigError(f"tp_size is {self.tp_size} and pp_size is {self.pp_size}; both must be at least 1")
        if self.rank is not None and not 0 <= self.rank < self.tp_size * self.pp_size:
            raise ConfigError(
                f"rank is {self.rank}, but tp_size={self.tp_size} and pp_size={self.pp_size} make ranks 0 to "
                f"{self.tp_size * self.pp_size - 1}; set all three"
            )

    def fields(self) -> dict[str, str]:
        """Return the fields that are not None, as text."""
        names = ("chunk_tokens", "dtype", "group", "layout", "model", "pp_size", "rank", "salt", "tp_size", "weights")
        values = {name: getattr(self, name) for name in (*names, "adapter", "engine_hash")}
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


def _check_field(
    name: str,
    value: object,
    kind: str,  # the field's type as it is written: "str", "int", or one of them "| None"
) -> None:
    """Raise ConfigError unless the value has the field's type. 5 and "5" would give equal roots. Never shows the value."""
    if value is None and "None" in kind:
        return
    if not isinstance(value, int if "int" in kind else str) or isinstance(value, bool):
        raise ConfigError(f"{name} of a namespace has the type {type(value).__name__}; expected {kind}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{name} of a namespace is no valid Unicode text ({error.reason}); use other text"
            ) from None


def split_keys(
    keys: npt.NDArray[np.uint8],  # [n, 32] uint8, contiguous
) -> list[bytes]:
    """Return the n keys as bytes objects, the form that indexes use."""
    return keys.view(f"V{KEY_NBYTES}").reshape(-1).tolist() if len(keys) else []


def weights_fingerprint(
    path: str | Path,  # of a model directory or one weight file
    progress: Callable[[str], None] = lambda line: None,  # told what takes long, and what the next start must repeat
    side_file: Path | None = None,  # keeps the files' digests; the default is in `user_cache_dir`
) -> str:
    """Return 32 hex digits: BLAKE3 over the name, size and content of each weight file.

    Every byte counts, so the first call reads the whole model, on all cores. The side file keeps the digests for as long as
    inode, size, mtime and ctime of a file stay the same. Raises ConfigError if there is no weight file. Then name the weights
    yourself.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.glob("*") if p.suffix in _WEIGHT_SUFFIXES)
    if not files:
        raise ConfigError(f"{str(path)!r} holds no weight file ({', '.join(_WEIGHT_SUFFIXES)}); set `weights` yourself")
    side_file = side_file or user_cache_dir() / "file-digests.json"
    digests = FileDigests(side_file)
    lines = _ProgressLines(sum(file.stat().st_size for file in files if not digests.is_known(file)), root, progress)
    fingerprint = blake3()
    for file in files:
        digest = digests.digest(file, lines.advance)
        size = struct.pack("<Q", file.stat().st_size)
        fingerprint.update(struct.pack("<I", len(file.name)) + file.name.encode() + size + digest)
    try:
        digests.save()
    except OSError as error:
        progress(
            f"{side_file} cannot be written: {error}. So every start reads all weights once more. Set XDG_CACHE_HOME to a "
            f"folder that this user may write to, or give the weights a name (`weights`)."
        )
    return fingerprint.hexdigest()[:32]


class _ProgressLines:
    """Turns the bytes hashed so far into a line every few seconds."""

    def __init__(self, total_nbytes: int, root: Path, progress: Callable[[str], None]) -> None:
        self._total, self._done = total_nbytes, 0
        self._root, self._progress = root, progress
        self._last_s = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        self._done += nbytes
        now_s = time.monotonic()
        if now_s - self._last_s >= PROGRESS_S:
            self._last_s = now_s
            self._progress(
                f"hashed {self._done / 2**30:.1f} of {self._total / 2**30:.1f} GiB of weights in {self._root}"
            )
