"""Which of several operators works: the holder of a Lease. The others wait until it has not been renewed for its duration."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from .api import Api, ApiError
from .kinds import LEASE
from .objects.metadata import Manifest

logger = logging.getLogger("kvkern")

DURATION_S = 15
RENEW_S = 5.0
TIMEOUT_S = 10.0  # after which a holder that cannot renew stops working: before others may take over


def micro_time() -> str:
    """Return now as the API writes it in leases."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Leader:
    """Holds the lease, or waits for it. Other clocks are not trusted: what counts is how long a lease stays unchanged."""

    def __init__(
        self, api: Api, namespace: str, name: str, me: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api, self._namespace, self._name, self._me, self._clock = api, namespace, name, me, clock
        self._renewed_s = float("-inf")
        self._seen: tuple[str, str] = ("", "")  # holder and time of its last renewal, as the lease says
        self._seen_s = 0.0  # when that was new

    @property
    def leads(self) -> bool:
        """Return True if this operator may write."""
        return self._clock() - self._renewed_s < TIMEOUT_S

    async def try_once(self) -> bool:
        """Take or renew the lease if that is allowed. Returns `leads`."""
        began_s = self._clock()
        try:
            live = await self._api.get(LEASE, self._namespace, self._name)
            if live is None:
                metadata = {"name": self._name, "namespace": self._namespace}
                await self._api.create(
                    LEASE,
                    {"apiVersion": LEASE.api, "kind": LEASE.kind, "metadata": metadata, "spec": self._spec(None)},
                    False,
                )
                self._renewed_s = began_s
            elif self._may_take(live):
                await self._api.replace(LEASE, live | {"spec": self._spec(live)})
                self._renewed_s = began_s
        except ApiError as error:
            if error.status != 409:
                logger.warning(
                    "kvkern: the lease %(name)s: %(error)s", {"event": "lease", "name": self._name, "error": error}
                )
        return self.leads

    async def keep(self, on_change: Callable[[], None]) -> None:
        """Take and renew the lease until it is cancelled. `on_change` is called when this operator begins or ceases to lead."""
        led = False
        while True:
            leads = await self.try_once()
            if leads != led:
                led = leads
                on_change()
                text = "leads" if leads else "does not lead any more"
                logger.info("kvkern: operator %(me)s %(text)s", {"event": "leader", "me": self._me, "text": text})
            await asyncio.sleep(RENEW_S)

    async def give_up(self) -> None:
        """Leave the lease to the next operator at once."""
        if not self.leads:
            return
        self._renewed_s = float("-inf")
        live = await self._api.get(LEASE, self._namespace, self._name)
        if live is not None and live["spec"].get("holderIdentity") == self._me:
            await self._api.replace(
                LEASE, live | {"spec": dict(live["spec"]) | {"holderIdentity": "", "leaseDurationSeconds": 1}}
            )

    def _may_take(self, live: Manifest) -> bool:
        spec = live.get("spec") or {}
        holder, renewed = str(spec.get("holderIdentity") or ""), str(spec.get("renewTime") or "")
        if holder in ("", self._me):
            return True
        if (holder, renewed) != self._seen:
            self._seen, self._seen_s = (holder, renewed), self._clock()
        return self._clock() - self._seen_s > int(spec.get("leaseDurationSeconds") or DURATION_S)

    def _spec(self, live: Manifest | None) -> Manifest:
        spec = dict((live or {}).get("spec") or {})
        now = micro_time()
        if spec.get("holderIdentity") != self._me:
            spec |= {"acquireTime": now, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        return spec | {"holderIdentity": self._me, "leaseDurationSeconds": DURATION_S, "renewTime": now}
