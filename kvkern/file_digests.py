"""BLAKE3 digests of whole files. A file that has not changed is not read again. Knows nothing of weights or adapters.

signature of a file    inode, size, mtime_ns and ctime_ns. A write changes ctime, which no program can set back
fresh file             may be written again within the same tick of its file system's clock, and keep its signature. Its
                       digest is not kept. A file is settled when its signature stays for SETTLE_S, or is CLOCKS_APART_S old:
                       the clock of a file server and this machine's differ by less
side file              JSON, so that the next process need not read the file either. Another user may not write it
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from .errors import ConfigError
from .regular_files import open_regular, write_regular

SETTLE_S = 2.0  # coarser than the clock of any file system in use
CLOCKS_APART_S = 3600.0
SIDE_FILE_VERSION = 1
_PIECE_NBYTES = 64 << 20
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Signature:
    """What tells that a file has not been written to."""

    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        """Return the signature in a file's status."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def text(self) -> str:
        """The form of the side file."""
        return f"{self.inode}:{self.nbytes}:{self.mtime_ns}:{self.ctime_ns}"

    def age_s(self) -> float:
        """Return how long ago the file changed, if its file system's clock agrees with this machine's."""
        return time.time() - max(self.mtime_ns, self.ctime_ns) / 1e9


class FileDigests:
    """Digests of files, by path. Not thread-safe."""

    def __init__(
        self,
        side_file: Path | None = None,  # None: digests live as long as this object
        mapped: bool = True,  # map files instead of reading them: twice as fast, but a file cut short ends the process
    ) -> None:
        self._side_file = side_file
        self._mapped = mapped
        self._known: dict[str, tuple[str, bytes]] = {}  # path -> (signature, digest)
        self._seen: dict[str, tuple[str, float]] = {}  # path -> (signature, monotonic seconds when it was first seen)
        self._changed = False
        if side_file is not None:
            self._known = _read_side_file(side_file)

    def is_known(self, path: Path) -> bool:
        """Return True if `digest` need not read the file."""
        return self._find(path, Signature.of(path.stat())) is not None

    def digest(
        self,
        path: Path,
        advance: Callable[[int], None] = lambda nbytes: None,  # told of every piece that was read, in bytes
    ) -> bytes:
        """Return the 32-byte digest of the file's present content.

        Raises OSError if it is no regular file or cannot be read, and ConfigError if others write it all the while.
        """
        for _ in range(_ATTEMPTS):
            with os.fdopen(open_regular(path, follow_links=True), "rb") as handle:  # hubs keep weights behind links
                before = Signature.of(os.fstat(handle.fileno()))
                if (found := self._find(path, before)) is not None:
                    return found
                first_seen_s = self._first_seen_s(path, before)
                digest = self._hash(handle.fileno(), before.nbytes, advance)
            if Signature.of(path.stat()) == before:
                if time.monotonic() - first_seen_s >= SETTLE_S or before.age_s() >= CLOCKS_APART_S:
                    self._known[str(path.resolve())] = before.text, digest
                    self._seen.pop(str(path.resolve()), None)
                    self._changed = True
                return digest
        raise ConfigError(
            f"{str(path)!r} changed {_ATTEMPTS} times while kvkern read it. Start the engine when the file is complete."
        )

    def save(self) -> None:
        """Write the side file. Raises OSError if it cannot be written; digests are then computed again next time."""
        if self._side_file is None or not self._changed:
            return
        self._side_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = _read_side_file(self._side_file) | self._known
        files = {path: [signature, digest.hex()] for path, (signature, digest) in known.items() if os.path.exists(path)}
        content = json.dumps({"version": SIDE_FILE_VERSION, "files": files}, indent=1).encode()
        write_regular(self._side_file, content, suffix=str(os.getpid()))
        self._changed = False

    def _find(self, path: Path, signature: Signature) -> bytes | None:
        kept, digest = self._known.get(str(path.resolve()), ("", b""))
        return digest if kept == signature.text else None

    def _first_seen_s(self, path: Path, signature: Signature) -> float:
        name, now_s = str(path.resolve()), time.monotonic()
        if self._seen.get(name, ("", 0.0))[0] != signature.text:
            self._seen[name] = signature.text, now_s
        return self._seen[name][1]

    def _hash(self, descriptor: int, nbytes: int, advance: Callable[[int], None]) -> bytes:
        hasher = blake3(max_threads=blake3.AUTO)
        if self._mapped and nbytes:
            with (
                mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ) as pages,
                memoryview(pages) as view,
            ):
                for at in range(0, nbytes, _PIECE_NBYTES):
                    ahead = min(2 * _PIECE_NBYTES, nbytes - at)
                    pages.madvise(mmap.MADV_WILLNEED, at, ahead)
                    with view[at : at + _PIECE_NBYTES] as piece:
                        hasher.update(piece)
                        advance(len(piece))
            return hasher.digest()
        with open(descriptor, "rb", buffering=0, closefd=False) as handle:
            buffer = bytearray(min(_PIECE_NBYTES, max(nbytes, 1)))
            while count := handle.readinto(buffer):
                hasher.update(memoryview(buffer)[:count])
                advance(count)
        return hasher.digest()


def _read_side_file(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return path -> (signature, digest). Empty if there is no side file, others may write it, or it is none of kvkern's."""
    try:
        with os.fdopen(open_regular(path), "rb") as handle:
            status = os.fstat(handle.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return {}
            content = json.load(handle)
        if content["version"] != SIDE_FILE_VERSION:
            return {}
        known = {str(name): (str(entry[0]), bytes.fromhex(entry[1])) for name, entry in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return {}
    return {name: entry for name, entry in known.items() if len(entry[1]) == blake3.digest_size}
