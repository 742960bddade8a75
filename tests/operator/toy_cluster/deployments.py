"""Deployments and ReplicaSets.

Deployment, RollingUpdate: the new set grows while all sets together have at most replicas + maxSurge pods, then old sets shrink
    while at least replicas - maxUnavailable pods are available.
Deployment, Recreate: old sets shrink to 0; the new one is made when none of their pods exists, not even a terminating one.
ReplicaSet: pods that are marked for deletion do not count, so they are replaced while they still run.
Not there: proportional scaling in the middle of a rollout, rollback, progress deadlines, release of pods whose labels change.
"""

from __future__ import annotations

import re

from tests.operator.api_server.json_values import Json, clone

from .base import World, active, finished, owned, owner_reference, pod_from, ready, share, template_hash, terminating

DEPLOYMENTS = ("apps", "deployments")
SETS = ("apps", "replicasets")
HASH = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"
COST = "controller.kubernetes.io/pod-deletion-cost"


class Deployments:
    """The deployment controller."""

    def __init__(self, world: World) -> None:
        self._world = world

    def sync(self) -> None:
        for deployment in self._world.view("deployments.apps"):
            if not terminating(deployment):
                self._sync_one(deployment)

    def _sync_one(self, deployment: Json) -> None:
        sets = self._world.owned("replicasets.apps", deployment)
        name = f"{deployment['metadata']['name']}-{template_hash(deployment['spec']['template'])}"
        new = next((s for s in sets if s["metadata"]["name"] == name), None)
        old = [s for s in sets if s is not new]
        if not deployment["spec"].get("paused"):
            if deployment["spec"]["strategy"]["type"] == "Recreate":
                self._recreate(deployment, new, old)
            else:
                self._roll(deployment, new, old)
        sets = self._world.owned("replicasets.apps", deployment)
        new = next((s for s in sets if s["metadata"]["name"] == name), None)
        self._set_status(deployment, new, sets)
        self._forget(deployment, [s for s in sets if s is not new])

    def _recreate(self, deployment: Json, new: Json | None, old: list[Json]) -> None:
        for replica_set in old:
            self._scale(replica_set, 0)
        pods = self._world.view("pods", deployment["metadata"]["namespace"])
        if new is None and any(not finished(pod) for s in old for pod in owned(pods, s)):
            return
        self._scale(new or self._make(deployment, old), deployment["spec"]["replicas"])

    def _roll(self, deployment: Json, new: Json | None, old: list[Json]) -> None:
        wanted = deployment["spec"]["replicas"]
        surge, unavailable = limits(deployment)
        new = new or self._make(deployment, old)
        if new is None:
            return
        room = wanted + surge - sum(_replicas(s) for s in [new, *old])
        if _replicas(new) > wanted:
            self._scale(new, wanted)
        elif room > 0 and _replicas(new) < wanted:
            self._scale(new, _replicas(new) + min(room, wanted - _replicas(new)))
        new = self._world.current(SETS, new) or new
        least = wanted - unavailable
        spare = sum(_replicas(s) for s in [new, *old]) - least - (_replicas(new) - _available(new))
        for replica_set in sorted(old, key=lambda s: s["metadata"]["creationTimestamp"]):  # unhealthy ones first
            drop = min(spare, _replicas(replica_set) - _available(replica_set))
            if drop > 0:
                self._scale(replica_set, _replicas(replica_set) - drop)
                spare -= drop
        old = [self._world.current(SETS, s) or s for s in old]
        spare = min(spare, sum(_available(s) for s in [new, *old]) - least)
        for replica_set in old:
            drop = min(spare, _replicas(replica_set))
            if drop > 0:
                self._scale(replica_set, _replicas(replica_set) - drop)
                spare -= drop

    def _make(self, deployment: Json, old: list[Json]) -> Json | None:
        meta, template = deployment["metadata"], clone(deployment["spec"]["template"])
        mark = template_hash(deployment["spec"]["template"])
        labels = template["metadata"].setdefault("labels", {})
        labels[HASH] = mark
        selector = clone(deployment["spec"]["selector"])
        selector.setdefault("matchLabels", {})[HASH] = mark
        revision = 1 + max((int(s["metadata"].get("annotations", {}).get(REVISION, 0)) for s in old), default=0)
        made = self._world.create(
            {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "metadata": {
                    "name": f"{meta['name']}-{mark}",
                    "namespace": meta["namespace"],
                    "labels": dict(labels),
                    "annotations": {REVISION: str(revision)},
                    "ownerReferences": [owner_reference(deployment)],
                },
                "spec": {"replicas": 0, "selector": selector, "template": template},
            }
        )

        def note(new: Json) -> None:
            new["metadata"].setdefault("annotations", {})[REVISION] = str(revision)

        self._world.edit(DEPLOYMENTS, deployment, note)
        return made

    def _scale(self, replica_set: Json | None, replicas: int) -> None:
        def change(new: Json) -> None:
            new["spec"]["replicas"] = replicas

        if replica_set is not None:
            self._world.edit(SETS, replica_set, change)

    def _set_status(self, deployment: Json, new: Json | None, sets: list[Json]) -> None:
        wanted, (_, unavailable) = deployment["spec"]["replicas"], limits(deployment)
        total, available = (sum(s["status"].get(field, 0) for s in sets) for field in ("replicas", "availableReplicas"))
        updated = new["status"].get("replicas", 0) if new else 0
        enough = available >= wanted - unavailable
        done = updated == wanted == total == available
        status: Json = {"observedGeneration": deployment["metadata"]["generation"]}
        counts = {
            "replicas": total,
            "updatedReplicas": updated,
            "readyReplicas": sum(s["status"].get("readyReplicas", 0) for s in sets),
            "availableReplicas": available,
            "unavailableReplicas": max(total, wanted) - available if wanted > available else 0,
        }
        status |= {name: count for name, count in counts.items() if count}  # Go omits zeros
        status["conditions"] = [
            {
                "type": "Available",
                "status": str(enough),
                "reason": f"MinimumReplicas{'Available' if enough else 'Unavailable'}",
                "message": f"Deployment {'has' if enough else 'does not have'} minimum availability.",
            },
            {
                "type": "Progressing",
                "status": "True",
                "reason": "NewReplicaSetAvailable" if done else "ReplicaSetUpdated",
                "message": "",
            },
        ]
        current = self._world.current(DEPLOYMENTS, deployment)
        if current is not None and current["metadata"]["generation"] == deployment["metadata"]["generation"]:
            self._world.set_status(DEPLOYMENTS, deployment, status)

    def _forget(self, deployment: Json, old: list[Json]) -> None:
        idle = [s for s in old if not _replicas(s) and not s["status"].get("replicas")]
        idle.sort(key=lambda s: int(s["metadata"]["annotations"][REVISION]))
        for replica_set in idle[: max(0, len(idle) - deployment["spec"]["revisionHistoryLimit"])]:
            self._world.store.delete(
                "replicasets.apps", replica_set["metadata"]["name"], replica_set["metadata"]["namespace"]
            )


class ReplicaSets:
    """The replica set controller."""

    def __init__(self, world: World) -> None:
        self._world = world

    def sync(self) -> None:
        for replica_set in self._world.view("replicasets.apps"):
            if terminating(replica_set):
                continue
            pods = self._world.owned("pods", replica_set)
            living = [pod for pod in pods if active(pod)]
            missing = _replicas(replica_set) - len(living)
            for _ in range(missing):
                generate = f"{replica_set['metadata']['name']}-"
                self._world.create(pod_from(replica_set["spec"]["template"], replica_set, generateName=generate))
            for pod in sorted(living, key=_worth)[: max(0, -missing)]:
                self._world.delete_pod(pod)
            self._set_status(replica_set)

    def _set_status(self, replica_set: Json) -> None:
        pods = owned(self._world.view("pods", replica_set["metadata"]["namespace"]), replica_set)
        living = [pod for pod in pods if active(pod)]
        up = sum(ready(pod) for pod in living)
        status: Json = {"observedGeneration": replica_set["metadata"]["generation"], "replicas": len(living)}
        if living:
            status["fullyLabeledReplicas"] = len(living)
        if up:
            status |= {"readyReplicas": up, "availableReplicas": up}
        self._world.set_status(SETS, replica_set, status)


def limits(deployment: Json) -> tuple[int, int]:
    """Return how many pods a rollout may have too many and too few."""
    wanted, rolling = deployment["spec"]["replicas"], deployment["spec"]["strategy"].get("rollingUpdate")
    if rolling is None:
        return 0, 0
    surge = share(rolling["maxSurge"], wanted, up=True)
    unavailable = share(rolling["maxUnavailable"], wanted, up=False)
    return (surge, unavailable) if surge or unavailable else (0, 1)


def _replicas(replica_set: Json) -> int:
    replicas: int = replica_set["spec"]["replicas"]
    return replicas


def _available(replica_set: Json) -> int:
    available: int = replica_set["status"].get("availableReplicas", 0)
    return available


def _worth(pod: Json) -> tuple[bool, bool, bool, int, int]:
    """Order pods so that those come first whose deletion costs least."""
    cost = int((pod["metadata"].get("annotations") or {}).get(COST, 0))
    scheduled, running = bool(pod["spec"].get("nodeName")), pod["status"].get("phase") == "Running"
    made = re.sub(r"\D", "", pod["metadata"]["creationTimestamp"])
    return scheduled, running, ready(pod), cost, -int(made)
