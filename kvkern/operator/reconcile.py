"""One pass for one KVCache: read, look, write what differs, say how it is. Level-triggered: it remembers nothing that it needs.

It can end after any write, and the next pass goes on from there. It writes only objects of which the KVCache is the owner.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from .api import Api, ApiError
from .arenas import Arenas
from .conditions import status_of
from .daemons import ask_daemons
from .forms import read_kvcache
from .kinds import DEPLOYMENT, EVENT, MADE, MONITORS, OLD_BUDGET, POD, STATEFUL_SET, Kind
from .kvcache import KVCache
from .merge import merge_patch
from .names import MANAGED_BY, NAME_LABEL, ROLE_LABEL, identity
from .objects import Cluster, Manifest, render
from .observed import DELETION_COST, Observed, cache_pod, has_ended, store_state, workload_nodes

logger = logging.getLogger("kvkern")

WORKLOADS = (DEPLOYMENT, STATEFUL_SET)  # kinds whose pods may be followed
HOLD_S = 300.0
HARMLESS = (
    "Ready", "NoPods", "Rolling", "Moving", "NotMade", "FoundByName", "PartlyReady", "NothingToServe", "StoreNotReady",
)  # fmt: skip
MAX_EVENT_TEXT = 1000
FIXED_FIELD = (
    "field is immutable",
    "updates to statefulset spec",
    "may not change once set",
)  # in the server's refusals
MAX_LEFT = 1000  # objects of which something did not stay


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator was started with."""

    image: str = ""  # for KVCaches that name none
    replacement: str = ""  # for those that name the image of the program that they were written for
    ask_pods: bool = True  # ask daemons for their figures
    take_over: bool = False  # look after KVCaches whose definition is another program's


class Reconciler:
    """Passes over KVCaches. Use it in one event loop, one pass at a time for a KVCache."""

    def __init__(self, api: Api, settings: Settings, now: Callable[[], str], arenas: Arenas | None = None) -> None:
        self._api, self._settings, self._now, self._arenas = api, settings, now, arenas
        self.image = settings.image  # of the daemon, for KVCaches that name none
        self.kinds: tuple[Kind, ...] = ()  # of what it makes, as this API server has them
        # uid -> what the server did not keep of the last write: an older server drops fields, a webhook changes some
        self._left: dict[str, Manifest] = {}
        self._follows: dict[
            tuple[Kind, str, str], Mapping[str, str]
        ] = {}  # KVCache -> labels of the pods that it follows

    def learn(self, groups: set[str]) -> None:
        """Note which groups and versions the API server has."""
        made = [OLD_BUDGET if kind.kind == OLD_BUDGET.kind and kind.api not in groups else kind for kind in MADE]
        self.kinds = (*made, *(MONITORS if MONITORS[0].api in groups else ()))

    def followers(self, namespace: str, labels: Mapping[str, str]) -> list[tuple[Kind, str, str]]:
        """Return the KVCaches that follow a pod with these labels."""
        return [
            key
            for key, wanted in self._follows.items()
            if key[1] == namespace and wanted and wanted.items() <= labels.items()
        ]

    async def run(self, kind: Kind, namespace: str, name: str) -> None:
        """Make a pass. Raises ApiError if something could not be read or written; the status says what."""
        if not self.kinds:
            self.learn(await self._api.groups())
        live = await self._api.get(kind, namespace, name)
        if live is None or live["metadata"].get("deletionTimestamp"):
            self._follows.pop((kind, namespace, name), None)
            return
        cache = read_kvcache(live, self.image, self._settings.replacement)
        seen = await self._look(cache)
        waits = self._arenas is not None and not await self._arenas.stop_removal(cache, seen)
        self._follows[kind, namespace, name] = seen.follow
        desired = _num_pods(cache, seen, live, self._now())
        faults: list[str] = []
        if not cache.errors and not waits:
            seen, faults = await self._write(cache, seen, desired)
        if self._settings.ask_pods:
            seen = replace(seen, daemons=await ask_daemons(pod for pod in seen.pods if not pod.ending))
        await self._tell(kind, live, status_of(cache, seen, desired, faults, live.get("status") or {}, self._now()))
        if waits:
            raise ApiError(409, "Waiting", "what removes the arena of an earlier KVCache of this name has to end first")
        if faults:
            raise ApiError(0, "Unfinished", "; ".join(faults))

    # -- look ----------------------------------------------------------------------------------------------------------

    async def _look(self, cache: KVCache) -> Observed:
        deployment = await self._deployment(cache)
        pods = await self._api.list(POD, cache.namespace, identity(cache.name, "cache")) if deployment else []
        mine = tuple(cache_pod(pod) for pod in pods if not has_ended(pod) and _is_of(pod, cache.name))
        if not cache.workload:
            return Observed(pods=mine, deployment=deployment)
        follow, by_name = {cache.workload_label: cache.workload}, False
        found = await self._engines(cache.namespace, follow)
        if not found and (real := await self._labels_of(cache)):
            follow, by_name = real, True
            found = await self._engines(cache.namespace, follow)
        nodes, waiting = workload_nodes(found)
        return Observed(tuple(nodes), follow, by_name, waiting, mine, deployment)

    async def _engines(self, namespace: str, labels: Mapping[str, str]) -> list[Manifest]:
        """Return the workload's pods. A cache pod is none, whatever labels its user gives it."""
        pods = await self._api.list(POD, namespace, labels)
        return [pod for pod in pods if ROLE_LABEL not in pod["metadata"]["labels"]]

    async def _deployment(self, cache: KVCache) -> Manifest | None:
        """Return the KVCache's own Deployment. Somebody else's of this name, and its pods, are not touched."""
        live = await self._api.get(DEPLOYMENT, cache.namespace, cache.name)
        return live if live is not None and _owned(live, cache) else None

    async def _labels_of(self, cache: KVCache) -> dict[str, str]:
        """Return the labels of the pods of the workload with this metadata.name; empty if the KVCache's label is among them."""
        for kind in WORKLOADS:
            workload = await self._api.get(kind, cache.namespace, cache.workload)
            if workload is None or cache.workload == cache.name:
                continue
            labels = dict((workload["spec"].get("selector") or {}).get("matchLabels") or {})
            template = workload["spec"]["template"].get("metadata", {}).get("labels") or {}
            if labels and template.get(cache.workload_label) != cache.workload:
                return labels
        return {}

    # -- write ---------------------------------------------------------------------------------------------------------

    async def _write(self, cache: KVCache, seen: Observed, desired: int) -> tuple[Observed, list[str]]:
        """Write what differs. Returns what there is then, and what failed."""
        monitors = any(kind.kind == MONITORS[0].kind for kind in self.kinds)
        wanted = render(cache, Cluster(desired, dict(seen.follow), monitors))
        kinds = {kind.kind: kind for kind in self.kinds}
        faults: list[str] = []
        try:
            there = await self._there(cache)
        except ApiError as error:
            return seen, [str(error)]
        try:
            if self._arenas is not None:
                await self._arenas.note(cache, {pod.node for pod in seen.pods if pod.node})
            await self._mark(cache, seen)
        except ApiError as error:
            faults.append(str(error))
        for manifest in wanted:
            kind = kinds[manifest["kind"]]
            key = kind, manifest["metadata"]["name"]
            try:
                there[key] = await self._apply(kind, manifest | {"apiVersion": kind.api}, there.get(key), cache)
            except ApiError as error:
                faults.append(f"{manifest['kind']} {manifest['metadata']['name']}: {error}")
        try:
            await self._prune(there, wanted)
            await self._move(cache, seen)
        except ApiError as error:
            faults.append(str(error))
        stores = tuple(store_state(live) for (kind, _), live in there.items() if kind == STATEFUL_SET)
        return replace(seen, deployment=there.get((DEPLOYMENT, cache.name)), stores=stores), faults

    async def _there(self, cache: KVCache) -> dict[tuple[Kind, str], Manifest]:
        """Return what the KVCache owns: what a pass has made, and what the published operator has."""
        return {
            (kind, live["metadata"]["name"]): {"apiVersion": kind.api, "kind": kind.kind} | live
            for kind in (*self.kinds, POD)
            for live in await self._api.list(kind, cache.namespace, {NAME_LABEL: cache.name})
            if _owned(live, cache)
        }

    async def _apply(self, kind: Kind, wanted: Manifest, live: Manifest | None, cache: KVCache) -> Manifest:
        """Make or change an object. Returns what is there then."""
        if live is None:  # nobody has it, or somebody else, or it has lost its labels
            live = await self._api.get(kind, cache.namespace, wanted["metadata"]["name"])
        if live is None:
            return await self._api.create(kind, wanted)
        if not _owned(live, cache):
            raise ApiError(409, "NameTaken", "exists and belongs to somebody else; delete it, or rename the KVCache")
        if live["metadata"].get("deletionTimestamp"):
            raise ApiError(409, "Ending", "is being deleted; it is made again when it is gone")
        patch = merge_patch(wanted, live)
        uid = live["metadata"]["uid"]
        if not patch or self._left.get(uid) == patch:
            return live
        try:
            after = await self._api.patch(kind, live, patch)
        except ApiError as error:
            if error.status == 422 and any(word in str(error) for word in FIXED_FIELD):
                # A StatefulSet's pods stay, and the new one takes them over.
                await self._api.delete(kind, live, "Orphan" if kind == STATEFUL_SET else "Background")
                raise ApiError(409, "Remade", "is made anew, because one of its fields cannot be changed") from error
            raise
        if left := merge_patch(wanted, after):
            if len(self._left) >= MAX_LEFT:
                self._left.clear()
            self._left[uid] = left
        return after

    async def _prune(self, there: dict[tuple[Kind, str], Manifest], wanted: Iterable[Manifest]) -> None:
        """Delete what the KVCache does not want (any more)."""
        keep = {(each["kind"], each["metadata"]["name"]) for each in wanted}
        for kind, name in [key for key in there if (key[0].kind, key[1]) not in keep]:
            await self._api.delete(kind, there[kind, name])
            del there[kind, name]

    async def _mark(self, cache: KVCache, seen: Observed) -> None:
        """Tell Kubernetes which cache pods to end first if there are to be fewer."""
        surplus = seen.surplus
        for pod in seen.pods:
            goes = pod in surplus
            if goes == pod.goes_first or pod.ending:
                continue
            if (live := await self._api.get(POD, cache.namespace, pod.name)) is not None:
                cost = {DELETION_COST: "-100" if goes else None}
                await self._api.patch(POD, live, {"metadata": {"annotations": cost}})

    async def _move(self, cache: KVCache, seen: Observed) -> None:
        """End cache pods on nodes that the workload has left, if other nodes wait for one, which the Deployment makes."""
        covered = {pod.node for pod in seen.pods}
        missing = len(set(seen.workload_nodes) - covered)
        for pod in seen.surplus[:missing]:
            live = await self._api.get(POD, cache.namespace, pod.name)
            if live is not None and not live["metadata"].get("deletionTimestamp"):
                await self._api.delete(POD, live)

    # -- tell ----------------------------------------------------------------------------------------------------------

    async def _tell(self, kind: Kind, live: Manifest, status: dict[str, Any]) -> None:
        if status == live.get("status"):
            return
        reason, before = status["reason"], (live.get("status") or {}).get("reason", "")
        if reason != before:
            logger.info(
                "kvkern: KVCache %(namespace)s/%(name)s: %(reason)s, before %(before)s",
                {
                    "event": "kvcache", "namespace": live["metadata"]["namespace"], "name": live["metadata"]["name"],
                    "reason": reason, "before": before or "new",
                },
            )  # fmt: skip
            await self._announce(kind, live, status)
        removed = {name: None for name in live.get("status") or {} if name not in status}
        await self._api.patch(kind, live, {"status": status | removed}, status=True)

    async def _announce(self, kind: Kind, live: Manifest, status: Mapping[str, Any]) -> None:
        """Write an Event that says how the KVCache is now. Nothing depends on it."""
        metadata, now = live["metadata"], self._now()
        about = {
            "apiVersion": kind.api,
            "kind": kind.kind,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
        }
        by_reason = {each["reason"]: each["message"] for each in status["conditions"]}
        event = {
            "apiVersion": EVENT.api,
            "kind": EVENT.kind,
            "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
            "involvedObject": about | {"uid": metadata["uid"]},
            "reason": status["reason"],
            "message": by_reason.get(status["reason"], "")[:MAX_EVENT_TEXT],
            "type": "Normal" if status["reason"] in HARMLESS else "Warning",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": MANAGED_BY},
        }
        with contextlib.suppress(ApiError):
            await self._api.create(EVENT, event, record=False)


def _num_pods(cache: KVCache, seen: Observed, live: Manifest, now: str) -> int:
    """Return how many cache pods there should be: one for each node of the workload.

    While the workload has pods without a node, and for HOLD_S after it has lost all pods, what is there stays: a restart of the
    engines must not end their cache.
    """
    if seen.workload_nodes:
        return len(seen.workload_nodes)
    there = int((live.get("status") or {}).get("desired") or 0)
    if there <= cache.min_pods or not cache.workload:
        return cache.min_pods
    for condition in (live.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "WorkloadFound" and condition.get("status") == "False" and not seen.num_unscheduled:
            gone = datetime.fromisoformat(now) - datetime.fromisoformat(condition["lastTransitionTime"])
            return cache.min_pods if gone.total_seconds() > HOLD_S else there
    return there


def _is_of(pod: Mapping[str, Any], deployment: str) -> bool:
    """Return True if a ReplicaSet of this Deployment has made the pod."""
    owners = pod["metadata"].get("ownerReferences") or ()
    return any(each["kind"] == "ReplicaSet" and each["name"].rpartition("-")[0] == deployment for each in owners)


def _owned(live: Mapping[str, Any], cache: KVCache) -> bool:
    return any(owner.get("uid") == cache.uid for owner in live["metadata"].get("ownerReferences") or ())
