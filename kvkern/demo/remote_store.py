"""The demo's use of the remote store: check that it answers before an engine starts, and delete the demo's values at the end.

Knows URLs and keys; knows nothing of engines and daemons.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ..errors import ConfigError
from ..remote.stores.base import RemoteError
from ..remote.stores.registry import opened_store
from ..remote.stores.url import RemoteUrl
from .preconditions import NotReadyError

LIMIT_S = 20.0


def without_password(url: str) -> str:
    """Return the URL without its password, for messages. Raises NotReadyError if `url` is not a store's URL."""
    try:
        return str(RemoteUrl.parse(url))
    except ConfigError as error:
        raise NotReadyError(f"--remote: {error}") from error


def check(url: str) -> None:
    """Open the store and close it. Raises NotReadyError if the URL is wrong, a package is missing or no store answers."""
    _run(url, ())


def delete(url: str, keys: Sequence[bytes]) -> None:
    """Delete these values from the store. Raises NotReadyError if that fails."""
    _run(url, keys)


def _run(url: str, delete: Sequence[bytes]) -> None:
    called = without_password(url)
    try:
        asyncio.run(_use(url, delete))
    except ConfigError as error:
        raise NotReadyError(f"--remote: {error}") from error
    except (RemoteError, TimeoutError) as error:
        reason = str(error) or f"no answer within {LIMIT_S:.0f} s"
        raise NotReadyError(
            f"--remote: {called} cannot be used: {reason}. Start the store, or give another URL."
        ) from error


async def _use(url: str, delete: Sequence[bytes]) -> None:
    async with opened_store(RemoteUrl.parse(url), LIMIT_S) as store:
        if delete:
            await store.delete(delete, LIMIT_S)
