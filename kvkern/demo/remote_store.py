"""The remote store as the demo needs it: it answers before an engine starts, and nothing of the demo stays in it.

Knows URLs and keys; knows nothing of engines and daemons.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ..errors import ConfigError
from ..remote.stores.base import RemoteError
from ..remote.stores.registry import opened
from ..remote.stores.url import RemoteUrl
from .preconditions import NotReadyError

LIMIT_S = 20.0


def name(url: str) -> str:
    """What to call it: no password in it. Raises NotReadyError for what is no URL."""
    try:
        return str(RemoteUrl.parse(url))
    except ConfigError as error:
        raise NotReadyError(f"--remote: {error}") from error


def check(url: str) -> None:
    """Open it and close it again. Raises NotReadyError for a wrong URL, a missing package, a store that does not answer."""
    _run(url, ())


def delete(url: str, keys: Sequence[bytes]) -> None:
    """Delete what the demo has written. Raises NotReadyError if that cannot be had."""
    _run(url, keys)


def _run(url: str, delete: Sequence[bytes]) -> None:
    called = name(url)
    try:
        asyncio.run(_use(url, delete))
    except ConfigError as error:
        raise NotReadyError(f"--remote: {error}") from error
    except (RemoteError, TimeoutError) as error:
        reason = str(error) or f"no answer for {LIMIT_S:.0f} s"
        raise NotReadyError(f"--remote: {called} cannot be used ({reason}); is the store running there?") from error


async def _use(url: str, delete: Sequence[bytes]) -> None:
    async with opened(RemoteUrl.parse(url), LIMIT_S) as store:
        if delete:
            await store.delete(delete, LIMIT_S)
