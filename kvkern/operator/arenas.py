"""Arenas on nodes: which nodes hold one, and who removes it when nobody needs it any more.

An arena in a node's shared memory outlives its pods on purpose, and so it would outlive its KVCache. No finalizer holds the
KVCache back. Instead a ConfigMap of the operator's namespace lists the nodes on which cache pods have been seen.
What is listed there and needed no more is removed by a pod that runs on the node once:

    the KVCache is gone, and so are its pods                   at once
    the KVCache is there, but has had no pod there for KEEP_S  the workload has left the node
    the node is gone                                           nothing is left to remove
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from .api import Api, ApiError
from .kinds import KVCACHES, NODE, POD, Kind
from .kvcache import KVCache
from .names import HOST_ARENAS, HOST_SOCKETS, MANAGED_BY, identity
from .objects.metadata import Manifest, locked_down
from .observed import Observed, has_ended

logger = logging.getLogger("kvkern")

CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
LEDGER = "kvkern-arenas"
KEEP_S = 900.0
REFRESH_S = 300.0  # how old a time in the ledger may get while a pod is there
ROLE = "arena-remover"
OF, ON = "kvkern.io/removes-arena-of", "kvkern.io/removes-arena-on"  # annotations of a remover
DEADLINE_S = 300  # of a remover
_PARENTS = (HOST_ARENAS, HOST_SOCKETS)

# namespace.name: parts of paths
_KEY = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\.[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_NODE = re.compile(r"[a-z0-9][-.a-z0-9]{0,252}")

Nodes = dict[str, str]  # name -> when a cache pod was last seen on it, RFC 3339


class Arenas:
    """The ledger. Use it from the operator that leads."""

    def __init__(self, api: Api, namespace: str, image: str, now: Callable[[], str]) -> None:
        self._api, self._namespace, self.image, self._now = api, namespace, image, now
        self._lock = asyncio.Lock()  # around reading and writing the ledger

    async def note(self, cache: KVCache, nodes: Iterable[str]) -> None:
        """Remember that cache pods are on these nodes. Raises ApiError."""
        now = self._now()
        async with self._lock:
            ledger = await self._read()
            entry: Nodes = _entries(ledger).get(_key(cache.namespace, cache.name), {})
            fresh = {node: now for node in nodes if _age_s(entry.get(node), now) > REFRESH_S}
            if fresh:
                await self._write(ledger, cache.namespace, cache.name, entry | fresh)

    async def sweep(self) -> None:
        """Remove arenas that nobody needs. Call it now and then. Raises ApiError if the ledger cannot be read."""
        for key in _entries(await self._read()):
            namespace, _, name = key.partition(".")
            try:
                async with self._lock:
                    await self._sweep(namespace, name)
            except ApiError as error:
                logger.warning(
                    "kvkern: the arena of %(namespace)s/%(name)s could not be removed; it is tried again: %(error)s",
                    {"event": "arena_not_removed", "namespace": namespace, "name": name, "error": error},
                )

    async def stop_removal(self, cache: KVCache, seen: Observed) -> bool:
        """End what removes this KVCache's folders where its pods are or will be. Returns True if nothing removes them there."""
        nodes = {*seen.workload_nodes, *(pod.node for pod in seen.pods)}
        found = [
            pod
            for place in {cache.namespace, self._namespace}
            for pod in await self._api.list(POD, place, identity(cache.name, ROLE))
            if pod["metadata"].get("annotations", {}).get(OF) == f"{cache.namespace}/{cache.name}"
            and not has_ended(pod)
            and (not cache.workload or pod["metadata"]["annotations"][ON] in nodes)
        ]
        for pod in found:
            await self._api.delete(POD, pod)
        return not found

    async def _sweep(self, namespace: str, name: str) -> None:
        ledger = await self._read()
        entry = _entries(ledger).get(_key(namespace, name), {})
        live = [found for kind in KVCACHES if (found := await self._get(kind, namespace, name)) is not None]
        pods = await self._api.list(POD, namespace, identity(name, "cache"))
        taken = {pod["spec"].get("nodeName") for pod in pods if not has_ended(pod)}
        kept: Nodes = {}
        for node, seen in entry.items():
            needed = node in taken or (live and _age_s(seen, self._now()) <= KEEP_S)
            if needed or not await self._removed(namespace, name, node):
                kept[node] = seen
        if kept != entry:
            await self._write(ledger, namespace, name, kept)

    # -- the ledger ----------------------------------------------------------------------------------------------------

    async def _read(self) -> Manifest | None:
        return await self._api.get(CONFIG_MAP, self._namespace, LEDGER)

    async def _write(self, ledger: Manifest | None, namespace: str, name: str, nodes: Nodes) -> Manifest:
        data = {_key(namespace, name): json.dumps(nodes, sort_keys=True) if nodes else None}
        if ledger is not None:
            return await self._api.patch(CONFIG_MAP, ledger, {"data": data})
        metadata = {
            "name": LEDGER,
            "namespace": self._namespace,
            "labels": {"app.kubernetes.io/managed-by": MANAGED_BY},
        }
        new = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
        return await self._api.create(CONFIG_MAP, new, record=False)

    async def _get(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        live = await self._api.get(kind, namespace, name)
        return None if live is None or live["metadata"].get("deletionTimestamp") else live

    # -- removal -------------------------------------------------------------------------------------------------------

    async def _removed(self, namespace: str, name: str, node: str) -> bool:
        """Start a pod that removes the folders, or look at it. Returns True if they are gone."""
        place = namespace if await self._is_usable(namespace) else self._namespace
        pod = remover(namespace, name, node, self.image, place)
        live = await self._api.get(POD, place, pod["metadata"]["name"])
        if await self._api.get(NODE, "", node) is None:
            if live is not None:
                await self._api.delete(POD, live)  # nobody would ever run it
            return True
        if live is None:
            await self._api.create(POD, pod, record=False)
            return False
        phase = (live.get("status") or {}).get("phase")
        if phase in ("Succeeded", "Failed"):
            await self._api.delete(POD, live)
        if phase == "Failed":
            logger.warning(
                "kvkern: the arena of %(namespace)s/%(name)s could not be removed; it is tried again: %(error)s",
                {
                    "event": "arena_not_removed",
                    "namespace": namespace,
                    "name": name,
                    "error": f"a pod on {node} failed",
                },
            )
        return phase == "Succeeded"

    async def _is_usable(self, namespace: str) -> bool:
        live = await self._api.get(NAMESPACE, "", namespace)
        return live is not None and not live["metadata"].get("deletionTimestamp")


def remover(namespace: str, name: str, node: str, image: str, place: str) -> Manifest:
    """Return the pod that removes arena and socket of a KVCache from a node. It sees the folders of its namespace alone.

    The socket's folder stays, and is empty: an engine that has mounted it finds a later KVCache's socket there.
    The scheduler puts the pod on no node that has a cache pod of the KVCache, and no cache pod beside it.
    """
    digest = hashlib.sha256(f"{namespace}/{name}/{node}".encode()).hexdigest()[:12]
    script = (
        f"rm -rf -- /remove/0/{name} && if [ -d /remove/1/{name} ]; then find /remove/1/{name} -mindepth 1 -delete; fi"
    )
    here = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    alone = {"labelSelector": {"matchLabels": identity(name, "cache")}, "topologyKey": "kubernetes.io/hostname"}
    size = {"cpu": "50m", "memory": "64Mi"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"kvkern-remove-{digest}",
            "namespace": place,
            "labels": identity(name, ROLE) | {"app.kubernetes.io/managed-by": MANAGED_BY},
            "annotations": {OF: f"{namespace}/{name}", ON: node},
        },
        "spec": {
            "affinity": {
                "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [here]}},
                "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [alone]},
            },
            "restartPolicy": "Never",
            "activeDeadlineSeconds": DEADLINE_S,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "tolerations": [{"operator": "Exists"}],
            "securityContext": {"runAsUser": 0, "runAsGroup": 0, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "remover",
                    "image": image,
                    "command": ["/bin/sh", "-c", script],
                    "resources": {"requests": size, "limits": size},
                    "securityContext": locked_down(),
                    "volumeMounts": [
                        {"name": f"folder-{number}", "mountPath": f"/remove/{number}"}
                        for number in range(len(_PARENTS))
                    ],
                }
            ],
            "volumes": [
                {
                    "name": f"folder-{number}",
                    "hostPath": {"path": f"{parent}/{namespace}", "type": "DirectoryOrCreate"},
                }
                for number, parent in enumerate(_PARENTS)
            ],
        },
    }


def _key(namespace: str, name: str) -> str:
    return f"{namespace}.{name}"  # no namespace has a dot in it


def _entries(ledger: Mapping[str, Any] | None) -> dict[str, Nodes]:
    found = {}
    for key, text in ((ledger or {}).get("data") or {}).items():
        try:
            nodes = json.loads(text)
        except (ValueError, RecursionError):
            continue  # somebody has written it; it names no node
        if isinstance(nodes, dict) and _KEY.fullmatch(key):
            found[key] = {node: str(seen) for node, seen in nodes.items() if _NODE.fullmatch(node)}
    return found


def _age_s(then: str | None, now: str) -> float:
    """Return the seconds since a time. A time that is none is long ago."""
    try:
        return (datetime.fromisoformat(now) - datetime.fromisoformat(then or "")).total_seconds()
    except (ValueError, TypeError):
        return float("inf")
