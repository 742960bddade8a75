"""DaemonSets: one pod on every node that fits; RollingUpdate replaces `maxUnavailable` at a time. Not there: maxSurge.

It adopts only pods that a DaemonSet made.
"""

from __future__ import annotations

from tests.operator.api_server.json_values import Json

from .base import World, finished, owned, pod_from, ready, share, template_hash, terminating
from .scheduler import Scheduler

SETS = ("apps", "daemonsets")
REVISION = "controller-revision-hash"
_TOLERATED = ("not-ready", "unreachable", "unschedulable", "disk-pressure", "memory-pressure", "pid-pressure")


class DaemonSets:
    """The daemon set controller."""

    def __init__(self, world: World, scheduler: Scheduler) -> None:
        self._world = world
        self._scheduler = scheduler

    def sync(self) -> None:
        for daemon_set in self._world.view("daemonsets.apps"):
            if not terminating(daemon_set):
                self._sync_one(daemon_set)

    def _sync_one(self, daemon_set: Json) -> None:
        spec = daemon_set["spec"]
        revision = template_hash(spec["template"])
        nodes = self._world.view("nodes")
        wanted = [
            n["metadata"]["name"] for n in nodes if self._scheduler.tolerates(n, self._pod(daemon_set, n, revision))
        ]
        pods = self._world.owned("pods", daemon_set)
        on_node = {_target(pod): pod for pod in pods}
        for node in nodes:
            if node["metadata"]["name"] in wanted and node["metadata"]["name"] not in on_node:
                self._world.create(self._pod(daemon_set, node, revision))
        for name, pod in on_node.items():
            if (name not in wanted or finished(pod)) and not terminating(pod):
                self._world.delete_pod(pod)
        if spec["updateStrategy"]["type"] == "RollingUpdate":
            most = max(1, share(spec["updateStrategy"]["rollingUpdate"]["maxUnavailable"], len(wanted), up=True))
            out = [
                name for name in wanted if name not in on_node or terminating(on_node[name]) or not ready(on_node[name])
            ]
            old = [p for n, p in on_node.items() if n in wanted and p["metadata"]["labels"].get(REVISION) != revision]
            for pod in sorted((p for p in old if not terminating(p)), key=ready):
                if not ready(pod) or len(out) < most:
                    self._world.delete_pod(pod)
                    out.append(_target(pod))
        self._set_status(daemon_set, wanted, revision)

    def _pod(self, daemon_set: Json, node: Json, revision: str) -> Json:
        pod = pod_from(
            daemon_set["spec"]["template"],
            daemon_set,
            {REVISION: revision},
            generateName=f"{daemon_set['metadata']['name']}-",
        )
        name = {"key": "metadata.name", "operator": "In", "values": [node["metadata"]["name"]]}
        affinity = pod["spec"].setdefault("affinity", {}).setdefault("nodeAffinity", {})
        required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
        terms = [{**term, "matchFields": [name]} for term in required.get("nodeSelectorTerms") or [{}]]
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}
        tolerations = pod["spec"].setdefault("tolerations", [])
        for taint in _TOLERATED:
            effect = "NoExecute" if taint in ("not-ready", "unreachable") else "NoSchedule"
            tolerations.append({"key": f"node.kubernetes.io/{taint}", "operator": "Exists", "effect": effect})
        return pod

    def _set_status(self, daemon_set: Json, wanted: list[str], revision: str) -> None:
        pods = owned(self._world.view("pods", daemon_set["metadata"]["namespace"]), daemon_set)
        living = [p for p in pods if not terminating(p)]
        up = sum(ready(p) for p in living)
        status: Json = {
            "observedGeneration": daemon_set["metadata"]["generation"],
            "currentNumberScheduled": len({_target(p) for p in living if _target(p) in wanted}),
            "desiredNumberScheduled": len(wanted),
            "numberMisscheduled": len([p for p in living if _target(p) not in wanted]),
            "numberReady": up,
        }
        updated = sum(p["metadata"]["labels"].get(REVISION) == revision for p in living)
        counts = {"numberAvailable": up, "updatedNumberScheduled": updated, "numberUnavailable": len(wanted) - up}
        status |= {name: count for name, count in counts.items() if count}
        self._world.set_status(SETS, daemon_set, status)


def _target(pod: Json) -> str:
    """Return the node that a daemon's pod is for."""
    terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    name: str = terms[0]["matchFields"][0]["values"][0]
    return name
