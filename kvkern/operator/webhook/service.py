"""The webhook as the operator runs it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ...node.web.endpoint import Endpoint
from ..api import Api
from .certificates import Lifetimes
from .inject import InjectSettings
from .keeper import Keeper
from .known import KnownCaches
from .registration import Place
from .review import answer
from .server import HttpsServer

logger = logging.getLogger("kvkern")


@dataclass(frozen=True, slots=True)
class WebhookSettings:
    """What the operator was started with."""

    endpoint: Endpoint
    place: Place
    inject: InjectSettings = field(default_factory=InjectSettings)
    lifetimes: Lifetimes = field(default_factory=Lifetimes)


def utc_now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


class Webhook:
    """Answers from what `caches` holds, which the operator fills. Use it in one event loop."""

    def __init__(
        self,
        api: Api,
        settings: WebhookSettings,
        caches: KnownCaches,
        leads: Callable[[], bool],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._settings = settings
        self._server = HttpsServer(
            settings.endpoint, lambda body: answer(body, caches.of, settings.inject), lambda: caches.complete
        )
        self._keeper = Keeper(api, settings.place, leads, self._server.use, clock, settings.lifetimes)

    def listen(self) -> None:
        """Take the port. Raises ConfigError if it is taken."""
        self._server.listen()

    async def run(self) -> None:
        """Serve and keep certificates until it is cancelled. Call `listen` before."""
        logger.info(
            "kvkern: the webhook listens on port %(port)s for %(service)s",
            {"event": "webhook", "port": self._settings.endpoint.port, "service": self._settings.place.dns_names[0]},
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._server.run())
            tasks.create_task(self._keeper.keep())
