"""Makes the store of a URL. To add a store of kvkern, add the line of its scheme to `_BUILT_IN`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.metadata import entry_points

from ...errors import ConfigError
from .base import RemoteStore
from .url import RemoteUrl

ENTRY_POINTS = "kvkern.remotes"  # of another package; name: a URL scheme; object: `make(url: RemoteUrl) -> RemoteStore`

Maker = Callable[[RemoteUrl], RemoteStore]

_REDIS = ("redis.store", "redis")
_BUILT_IN: dict[str, tuple[str, str]] = {  # scheme -> (module of this package with a function `make(url)`, extra it needs)
    "file": ("file.store", ""),
    "redis": _REDIS, "rediss": _REDIS, "valkey": _REDIS, "valkeys": _REDIS,
    "redis+cluster": _REDIS, "rediss+cluster": _REDIS, "valkey+cluster": _REDIS, "valkeys+cluster": _REDIS,
    "mooncake": ("mooncake.store", "mooncake"),
    "s3": ("object_storage", "objects"), "gs": ("object_storage", "objects"), "az": ("object_storage", "objects"),
}  # fmt: skip


def built_in_schemes() -> list[str]:
    """Return the schemes of the stores that kvkern has itself."""
    return sorted(_BUILT_IN)


def make_store(url: RemoteUrl) -> RemoteStore:
    """Make the store of a URL, not connected. Raises ConfigError for an unknown scheme or option, or a missing package."""
    return _maker_of(url.scheme)(url)


@asynccontextmanager
async def opened_store(url: RemoteUrl, timeout_s: float) -> AsyncIterator[RemoteStore]:
    """Yield the opened store of a URL, and close it after the block.

    Raises the exceptions of `open`, and TimeoutError after `timeout_s`; the store is closed then too.
    """
    store = make_store(url)
    try:
        async with asyncio.timeout(timeout_s):
            await store.open()
        yield store
    finally:
        await store.close()


def _maker_of(scheme: str) -> Maker:
    if scheme in _BUILT_IN:
        module, extra = _BUILT_IN[scheme]
        try:
            maker: Maker = import_module(f"{__package__}.{module}").make
        except ModuleNotFoundError as error:
            package = f"kvkern[{extra}]" if extra else "kvkern"
            raise ConfigError(
                f"{scheme}:// needs a package that is not installed ({error}). Install it: pip install '{package}'"
            ) from error
        except ImportError as error:  # it is there, and a system library that it uses is not
            raise ConfigError(
                f"{scheme}:// cannot load its package ({error}). Install the library that is named; see docs/remote.md"
            ) from error
        return maker
    others = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if scheme not in others:
        known = ", ".join(sorted({*_BUILT_IN, *others}))
        raise ConfigError(f"No remote store has the scheme {scheme!r}. Use one of: {known}")
    try:
        other: Maker = others[scheme].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{scheme}:// is registered, but its package cannot be loaded ({error}). Repair or remove the package"
        ) from error
    return other
