"""The daemon's arena as a file: its name, its lock, and what an earlier daemon left under the name. Knows no messages.

The file outlives the daemon. The next one finds it in the same folder (arena/folder.py), or where earlier versions of kvkern
put it, and moves it then. A file that is no whole arena any more is removed or repaired: it is only a cache.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...arena.file import Arena, ArenaSpec, is_broken_arena, is_whole, read_spec
from ...arena.folder import arena_folder, remove_if_empty
from ...config import format_nbytes
from ...errors import ArenaError
from .socket_path import exclusive_lock

logger = logging.getLogger("kvkern")

_OPTIONS = "--name or --arena-dir"


@contextmanager
def claimed_arena_path(
    arena_dir: Path,
    name: str,  # of the file
) -> Iterator[Path]:
    """Return the path of the daemon's arena, which no other daemon uses while the context is open. The file may not exist.

    Raises ConfigError if another daemon uses it, or ArenaError if another user has taken the folder's name.
    """
    path = arena_folder(arena_dir) / name
    try:
        with exclusive_lock(path, _OPTIONS):
            _move_earlier(arena_dir / name, path)
            yield path
    finally:
        remove_if_empty(path.parent)


def _move_earlier(earlier: Path, path: Path) -> None:
    """Move the arena of an earlier version of kvkern to `path`. Engines that map it keep it. Other users' files stay."""
    try:
        found = earlier.lstat()
    except OSError:
        return
    mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
    if earlier == path or not mine:
        return
    if os.path.lexists(path):
        logger.warning(
            "kvkern: %(path)s was left by an earlier version of kvkern and is not used; remove it",
            {"event": "earlier_arena_left", "path": earlier},
        )
        return
    with exclusive_lock(earlier, _OPTIONS):
        try:
            earlier.rename(path)
        except OSError as error:
            logger.warning(
                "kvkern: %(path)s cannot be moved to %(to)s (%(error)s) and is not used; remove it",
                {"event": "earlier_arena_not_moved", "path": earlier, "to": path, "error": error},
            )
        else:
            logger.info(
                "kvkern: moved the arena %(path)s to %(to)s, a folder that no other user can write",
                {"event": "earlier_arena_moved", "path": earlier, "to": path},
            )


def spec_of_earlier(path: Path, capacity_nbytes: int | None = None) -> ArenaSpec | None:
    """Return the spec of the arena that an earlier daemon left at `path`; None if there is none. Removes a broken one.

    With a capacity, also removes one of another size. Engines that have mapped it need a restart.
    Raises ArenaError if the file cannot be opened or has another version.
    """
    spec = read_spec(path)
    if spec is None and is_broken_arena(path):
        logger.warning(
            "kvkern: %(path)s is no whole arena: its daemon was killed while it made it, or a client has cut it. It "
            "is removed, and the next engine gets a new one", {"event": "broken_arena_removed", "path": path},
        )  # fmt: skip
        path.unlink(missing_ok=True)
    if spec is not None and capacity_nbytes is not None and not _has_size_of(spec, capacity_nbytes):
        logger.warning(
            "kvkern: %(path)s has %(size)s, and the capacity is %(capacity)s now. It is removed with its chunks, and the next "
            "engine gets a new one",
            {
                "event": "arena_replaced",
                "path": path,
                "size": format_nbytes(spec.nbytes),
                "capacity": format_nbytes(capacity_nbytes),
            },
        )
        path.unlink(missing_ok=True)
        return None
    return spec


def _has_size_of(spec: ArenaSpec, capacity_nbytes: int) -> bool:
    return spec.nbytes <= capacity_nbytes < spec.nbytes + spec.geometry.slot_nbytes


@contextmanager
def taking_over(path: Path, spec: ArenaSpec, capacity_nbytes: int) -> Iterator[None]:
    """Wrap what maps and serves the arena of an earlier daemon. Removes an arena that is not whole and cannot be repaired.

    Says so, and says if the size is not what the capacity gives. Lets other ArenaErrors pass.
    """
    whole = is_whole(path, spec)
    try:
        yield
    except ArenaError as error:
        if whole:
            raise
        logger.warning(
            "kvkern: %(path)s is not whole and cannot be repaired (%(error)s). It is removed, and the next engine "
            "gets a new one",
            {"event": "arena_beyond_repair", "path": path, "error": error},
        )  # fmt: skip
        path.unlink(missing_ok=True)
        return
    if not _has_size_of(spec, capacity_nbytes):
        logger.warning(
            "kvkern: %(path)s has %(size)s and keeps this size, though the capacity is %(capacity)s now; to change "
            "the size, start the daemon with --resize-arena",
            {
                "event": "arena_keeps_size",
                "path": path,
                "size": format_nbytes(spec.nbytes),
                "capacity": format_nbytes(capacity_nbytes),
            },
        )  # fmt: skip


class SizeWatch:
    """Gives an arena whose file a client has cut its size and its pages back, on a thread, one attempt at a time."""

    def __init__(self) -> None:
        self._attempt: asyncio.Future[None] | None = None
        self._said = ""  # why the last attempt has failed

    def look(self, arena: Arena) -> None:
        """Begin an attempt if one is needed and none is under way. Call it regularly, from the event loop.

        Also writes the file's header again: any client can change it, and the next daemon reads it.
        """
        if arena.has_its_size():
            arena.renew_header()
        elif self._attempt is None or self._attempt.done():
            self._attempt = asyncio.get_running_loop().run_in_executor(None, self._restore, arena)

    async def end(self) -> None:
        """Wait for an attempt that is under way. Call it before the arena is closed."""
        if self._attempt is not None:
            await self._attempt

    def _restore(self, arena: Arena) -> None:
        try:
            arena.restore()
            self._said = ""
        except ArenaError as error:
            if str(error) != self._said:  # the same reason is not said four times a second
                logger.error("kvkern: %(error)s", {"event": "arena_not_repaired", "error": error})
            self._said = str(error)


def allocated_nbytes(path: Path) -> int:
    """Return how many bytes of the arena have pages, also while it is being made. 0 if there is no file."""
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0
