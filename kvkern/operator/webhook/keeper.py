"""Keeps certificates and registration. The leader writes; every replica takes what the Secret holds.

The order is that of trust: a CA is in the Secret, then in the registration, then used. A step can end anywhere, and the next
goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime

from ..api import Api, ApiError
from ..merge import merge_patch
from ..names import MANAGED_BY
from ..objects.metadata import Manifest
from .certificates import Keys, Lifetimes, Pair, turn
from .registration import REGISTRATION, SECRET, Place, bundle_of, registration

logger = logging.getLogger("kvkern")

PAUSE_S, FIRST_PAUSE_S = 10.0, 0.5  # between steps; before there is a good certificate


class Keeper:
    """Use it in one event loop."""

    def __init__(
        self,
        api: Api,
        place: Place,
        leads: Callable[[], bool],  # may this operator write?
        use: Callable[[Pair], None],  # called with the certificate to serve, again and again
        clock: Callable[[], datetime],
        lifetimes: Lifetimes,
    ) -> None:
        self._api, self._place, self._leads, self._use = api, place, leads, use
        self._clock, self._lifetimes = clock, lifetimes
        self._settled = False
        self._left: Manifest = {}  # what the server did not keep of the last write

    async def keep(self) -> None:
        """Make a step now and then, until it is cancelled."""
        while True:
            try:
                await self.step()
            except ApiError as error:
                logger.warning(
                    "kvkern: certificates of the webhook: %(error)s", {"event": "webhook_certificates", "error": error}
                )
            await asyncio.sleep(PAUSE_S if self._settled else FIRST_PAUSE_S)

    async def step(self) -> None:
        """Read, write what is due, use what is there. Raises ApiError."""
        live = await self._api.get(SECRET, self._place.namespace, self._place.service)
        keys = Keys.from_data((live or {}).get("data") or {})
        if not self._leads():
            self._serve(keys)
            return
        told = await self._api.get(REGISTRATION, "", self._place.registration)
        now = self._clock()
        trusted = keys.next is not None and keys.next.authority in bundle_of(told)
        due = turn(keys, self._place.dns_names, now, trusted, self._lifetimes)
        if due != keys or live is None:
            await self._write(live, due)
            logger.info(
                "kvkern: certificates of the webhook: %(what)s",
                {"event": "webhook_renewed", "what": "the next one is made" if due.next else "a new one serves"},
            )
        self._serve(due)
        await self._tell(told, registration(self._place, due.bundle(now)))

    def _serve(self, keys: Keys) -> None:
        if keys.current is not None:
            self._use(keys.current)
            self._settled = keys.current.serves(self._place.dns_names, self._clock())

    async def _write(self, live: Manifest | None, keys: Keys) -> None:
        data = keys.to_data()
        if live is not None:
            gone = {name: None for name in live.get("data") or {} if name not in data}
            await self._api.patch(SECRET, live, {"data": data | gone})
            return
        metadata = {
            "name": self._place.service,
            "namespace": self._place.namespace,
            "labels": {"app.kubernetes.io/name": "kvkern", "app.kubernetes.io/managed-by": MANAGED_BY},
        }
        secret = {"apiVersion": SECRET.api, "kind": SECRET.kind, "metadata": metadata, "type": "kubernetes.io/tls"}
        await self._api.create(SECRET, secret | {"data": data}, record=False)

    async def _tell(self, live: Manifest | None, wanted: Manifest) -> None:
        if live is None:
            await self._api.create(REGISTRATION, wanted)
            return
        patch = merge_patch(wanted, live)
        if patch and patch != self._left:  # clusters add to it what stays whoever writes
            self._left = merge_patch(wanted, await self._api.patch(REGISTRATION, live, patch))
