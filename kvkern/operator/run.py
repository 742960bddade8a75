"""The operator: kopf watches, a queue makes passes, a lease says who works."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import kopf

from .api import Api, ApiError
from .arenas import Arenas
from .crds import MANAGED_ANNOTATION
from .kinds import DEFINITION, KVCACHES, POD, Kind
from .leader import Leader
from .names import IMAGE, MANAGED_BY, NAME_LABEL
from .reconcile import Reconciler, Settings
from .webhook.known import KnownCaches
from .work_queue import WorkQueue

if TYPE_CHECKING:
    from .webhook.service import WebhookSettings

logger = logging.getLogger("kvkern")

RESYNC_S = 30.0
LEASE_NAME = "kvkern-operator"


@dataclass(frozen=True, slots=True)
class Key:
    """One KVCache."""

    kind: Kind
    namespace: str
    name: str


def now() -> str:
    """Return the time as the API writes it in a status."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Operator:
    """Connects what kopf reports with the passes."""

    def __init__(
        self,
        api: Api,
        settings: Settings,
        namespaces: tuple[str, ...] = (),  # that it looks after; empty: all
        lease_namespace: str = "",  # empty: no other operator runs, and there is no lease
        webhook: WebhookSettings | None = None,  # needs cryptography
    ) -> None:
        me = f"{socket.gethostname()}-{os.getpid()}"
        self._api, self._namespaces = api, namespaces
        self._leader = Leader(api, lease_namespace, LEASE_NAME, me) if lease_namespace else None
        self._arenas = Arenas(api, lease_namespace, settings.image or IMAGE, now) if lease_namespace else None
        self._reconciler = Reconciler(api, settings, now, self._arenas)
        self._queue = WorkQueue(self._pass)
        self._served: set[Kind] = set()  # kinds of KVCache that the API has, and whose definition is kvkern's
        self._left_alone: set[Kind] = set()  # kinds that are somebody else's, and of which that was said
        self._said: dict[str, object] = {}  # uid of a KVCache -> what its user last said
        self._image, self._lease_namespace = settings.image, lease_namespace
        self._take_over = settings.take_over
        self._resync_now = asyncio.Event()
        self._webhook = webhook
        self._known = None if webhook is None else KnownCaches(settings.image, settings.replacement)

    async def run(self, stop: asyncio.Event, ready: asyncio.Event | None = None) -> None:
        """Work until `stop` is set.

        Raises ApiError if the API server cannot be reached at the start, and ConfigError if the webhook's port is taken.
        """
        self._reconciler.learn(await self._api.groups())
        await self._learn_image()
        tasks = []
        if self._webhook is not None and self._known is not None:
            from .webhook.service import Webhook

            webhook = Webhook(self._api, self._webhook, self._known, lambda: self._leader is None or self._leader.leads)
            webhook.listen()
            tasks.append(asyncio.create_task(webhook.run()))
        tasks.append(asyncio.create_task(self._resync()))
        if self._leader is not None:
            tasks.append(asyncio.create_task(self._leader.keep(self._resync_now.set)))
        for task in tasks:
            task.add_done_callback(lambda _: stop.set())  # none ends by itself: the next operator does better
        try:
            await kopf.operator(
                registry=self._registry(),
                settings=self._settings(),
                clusterwide=not self._namespaces,
                namespaces=self._namespaces,
                standalone=True,
                stop_flag=stop,
                ready_flag=ready,
            )
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            await self._queue.close()
            if self._leader is not None:
                with contextlib.suppress(ApiError):
                    await self._leader.give_up()
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _learn_image(self) -> None:
        """Take the image of the operator's own pod for daemons, and for what removes arenas, if no other one is given."""
        if self._image or self._arenas is None:
            return
        pod = await self._api.get(POD, self._lease_namespace, socket.gethostname())
        if pod is not None and (container := pod["spec"]["containers"][0])["name"] == "operator":
            self._reconciler.image = self._arenas.image = container["image"]

    def _settings(self) -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.watching.server_timeout = 300
        return settings

    def _registry(self) -> kopf.OperatorRegistry:
        """Return what to watch. Handlers of events alone: kopf then writes nothing, no finalizer and no annotation."""
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry)
        def login(**about: Any) -> kopf.ConnectionInfo | None:
            return kopf.login_with_service_account(**about) or kopf.login_with_kubeconfig(**about)

        async def of_cache(event: Mapping[str, Any], **_: Any) -> None:
            body = event["object"]
            for kind in KVCACHES:
                if body.get("apiVersion") == kind.api:
                    if self._known is not None and kind in self._served:
                        self._known.changed(kind, body, gone=event["type"] == "DELETED")
                    if self._is_news(body["metadata"], gone=event["type"] == "DELETED"):
                        self._add(kind, body["metadata"]["namespace"], body["metadata"]["name"])

        async def of_owned(body: Mapping[str, Any], **_: Any) -> None:
            for owner in body["metadata"].get("ownerReferences") or ():
                for kind in KVCACHES:
                    if owner.get("kind") == kind.kind and owner.get("apiVersion") == kind.api:
                        self._add(kind, body["metadata"]["namespace"], owner["name"])

        async def of_pod(body: Mapping[str, Any], **_: Any) -> None:
            namespace, labels = body["metadata"]["namespace"], body["metadata"].get("labels") or {}
            for key in self._reconciler.followers(namespace, labels):
                self._queue.add(Key(*key))
            if name := labels.get(NAME_LABEL):
                for kind in self._served:
                    self._add(kind, namespace, name)

        for kind in KVCACHES:
            group, version = kind.api.split("/")
            kopf.on.event(group, version, kind.plural, registry=registry)(of_cache)
        for kind in self._reconciler.kinds:
            group, _, version = kind.api.rpartition("/")
            labels = {"app.kubernetes.io/managed-by": MANAGED_BY}
            kopf.on.event(group, version, kind.plural, labels=labels, registry=registry)(of_owned)
        kopf.on.event("", "v1", "pods", registry=registry)(of_pod)
        return registry

    def _is_news(self, metadata: Mapping[str, Any], gone: bool) -> bool:
        """Return False for changes of a status: they are the operator's own, and figures change all the time."""
        uid, said = (
            metadata["uid"],
            (metadata.get("generation"), metadata.get("annotations"), metadata.get("deletionTimestamp")),
        )
        if gone:
            self._said.pop(uid, None)
        elif self._said.get(uid) == said:
            return False
        else:
            self._said[uid] = said
        return True

    def _add(self, kind: Kind, namespace: str, name: str) -> None:
        if not self._namespaces or namespace in self._namespaces:
            self._queue.add(Key(kind, namespace, name))

    async def _resync(self) -> None:
        """Make a pass for every KVCache now and then: what a watch has missed, and figures."""
        while True:
            self._resync_now.clear()
            try:
                groups = await self._api.groups()
                self._served = {kind for kind in KVCACHES if kind.api in groups and await self._is_ours(kind)}
                self._reconciler.learn(groups)
                for kind in self._served:
                    lives = [live for place in self._namespaces or ("",) for live in await self._api.list(kind, place)]
                    if self._known is not None:
                        self._known.listed(kind, [{"apiVersion": kind.api, "kind": kind.kind} | live for live in lives])
                    for live in lives:
                        self._add(kind, live["metadata"]["namespace"], live["metadata"]["name"])
                if self._known is not None:
                    self._known.complete = True
                if self._arenas is not None and self._leader is not None and self._leader.leads:
                    await self._arenas.sweep()
            except ApiError as error:
                logger.warning("kvkern: cannot list KVCaches: %(error)s", {"event": "resync", "error": error})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._resync_now.wait(), RESYNC_S)

    async def _is_ours(self, kind: Kind) -> bool:
        """Return True if the definition of a kind is kvkern's. Another program that serves the group looks after its own."""
        group = kind.api.split("/")[0]
        definition = await self._api.get(DEFINITION, "", f"{kind.plural}.{group}")
        annotations = (definition or {"metadata": {}})["metadata"].get("annotations") or {}
        if self._take_over or MANAGED_ANNOTATION in annotations:
            self._left_alone.discard(kind)
            return True
        if kind not in self._left_alone:
            self._left_alone.add(kind)
            logger.warning(
                "kvkern: KVCaches of %(group)s are another program's here: their definition has no annotation %(annotation)s. "
                "They are left alone. Start the operator with --take-over, or apply kvkern's definition",
                {"event": "other_definition", "group": group, "annotation": MANAGED_ANNOTATION},
            )
        return False

    async def _pass(self, key: Key) -> float | None:
        if self._leader is not None and not self._leader.leads:
            return None  # the leader does it; whoever leads next begins with a resync
        if key.kind not in self._served:
            return None
        try:
            await self._reconciler.run(key.kind, key.namespace, key.name)
        except ApiError as error:
            if error.status != 409:  # somebody else has written, or will soon: the next pass sees it
                logger.warning(
                    "kvkern: KVCache %(namespace)s/%(name)s: %(error)s",
                    {"event": "pass_failed", "namespace": key.namespace, "name": key.name, "error": error},
                )
            return error.retry_after_s
        return None
