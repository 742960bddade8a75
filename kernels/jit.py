"""`numba.njit` that works on every file system: it keeps compiled functions on disk if it can, else in memory.

    the first folder that can be written     NUMBA_CACHE_DIR, the source's own __pycache__, the user's cache folder
    else the first that can be read          NUMBA_CACHE_DIR, the source's own __pycache__: compiled at installation
    else, and what is not there              memory, with one warning per process: every start compiles anew

numba's own `cache=True` raises at import if it can write none of the folders, and at a call if a folder fills up or goes away.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core import caching, config
from numba.misc.appdirs import AppDirs

logger = logging.getLogger("kvkern")

_warned = False


class _ReadOnly:
    """A locator's folder that this process may read but not write."""

    def ensure_cache_path(self) -> None:
        os.listdir(self.get_cache_path())  # type: ignore[attr-defined]  # an OSError sends numba to the next locator


class _ReadOnlyProvided(_ReadOnly, caching.UserProvidedCacheLocator):  # type: ignore[misc]
    pass


class _ReadOnlyInTree(_ReadOnly, caching.InTreeCacheLocator):  # type: ignore[misc]
    pass


_READ_ONLY = [_ReadOnlyProvided, _ReadOnlyInTree]
_WRITABLE = [caching.UserProvidedCacheLocator, caching.InTreeCacheLocator, caching.UserWideCacheLocator]
# Without a home the user's folder would be "~" below the working directory, where anybody may have put code.
if not os.path.isabs(AppDirs(appname="numba", appauthor=False).user_cache_dir):
    _WRITABLE.pop()


class _Implementation(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = _WRITABLE + _READ_ONLY


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    """A disk cache whose faults cost time and nothing else."""

    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except OSError as error:
            _warn_once(f"{self.cache_path} cannot be read: {error}")
        except EOFError:  # the machine stopped while the index was written
            with suppress(OSError):
                self.flush()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(f"{self.cache_path} cannot be written: {error}")


def cache_folders(source: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders for compiled code of a source file: those tried if they can be written, then those tried to read."""

    def folders(classes: list[Any]) -> list[Path]:
        given = [c for c in classes if config.CACHE_DIR or not issubclass(c, caching.UserProvidedCacheLocator)]
        return [Path(c(cache_folders, str(source)).get_cache_path()) for c in given]

    return folders(_WRITABLE), folders(_READ_ONLY)


def _warn_once(why: str) -> None:
    """Log that compiled functions stay in memory. Only the first call in a process logs."""
    global _warned
    if not _warned:
        _warned = True
        logger.warning(
            "kvkern: compiles in memory, which every start repeats for up to half a minute: numba's cache %(why)s. Set "
            "NUMBA_CACHE_DIR to a folder that can be written and survives restarts, or run `python -m kvkern.doctor.warm` as "
            "the owner of the installation",
            {"event": "compiles_in_memory", "why": why},
        )


def compiled(signature: Any = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator like `numba.njit(signature, cache=True, **options)`, which never fails for want of a folder.

    With a signature the function is compiled at once, otherwise at its first call.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        if not hasattr(dispatcher, "enable_caching"):
            return function  # NUMBA_DISABLE_JIT
        try:
            dispatcher._cache = _Cache(function)
        except (RuntimeError, OSError) as error:
            _warn_once(f"has no folder: {error}")
        if signature is not None:
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        return dispatcher

    return decorate
