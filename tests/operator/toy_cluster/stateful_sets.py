"""StatefulSets: pods with stable names, made and replaced in order.

for ordinal in 0 .. replicas - 1: make the pod if it is absent; OrderedReady waits until it is ready, and while it terminates
scale down: the highest ordinal first, one at a time unless Parallel
RollingUpdate: the highest ordinal of an old revision that is at least `partition`; one at a time. OnDelete: never
"""

from __future__ import annotations

from tests.operator.api_server.json_values import Json, clone

from .base import World, finished, owned, owner_reference, pod_from, ready, template_hash, terminating

SETS = ("apps", "statefulsets")
REVISION = "controller-revision-hash"


class StatefulSets:
    """The stateful set controller."""

    def __init__(self, world: World) -> None:
        self._world = world

    def sync(self) -> None:
        for stateful_set in self._world.view("statefulsets.apps"):
            if not terminating(stateful_set):
                self._sync_one(stateful_set)

    def _sync_one(self, stateful_set: Json) -> None:
        spec, meta = stateful_set["spec"], stateful_set["metadata"]
        newest = f"{meta['name']}-{template_hash(spec['template'])}"
        status = stateful_set["status"]
        settled = status.get("currentRevision", newest)
        templates = self._templates(stateful_set, newest)
        pods = {_ordinal(p): p for p in self._world.owned("pods", stateful_set)}
        self._act(stateful_set, pods, newest, settled if settled in templates else newest, templates)
        self._set_status(stateful_set, newest, settled)

    def _act(
        self, stateful_set: Json, pods: dict[int, Json], newest: str, settled: str, templates: dict[str, Json]
    ) -> None:
        spec = stateful_set["spec"]
        ordered = spec["podManagementPolicy"] == "OrderedReady"
        rolling = spec["updateStrategy"].get("rollingUpdate")
        partition = rolling.get("partition", 0) if rolling else 0
        for ordinal in range(spec["replicas"]):
            pod = pods.get(ordinal)
            if pod is not None and finished(pod) and not terminating(pod):
                self._world.delete_pod(pod, 0)
                return
            if pod is None:
                revision = settled if rolling and ordinal < partition else newest
                self._make(stateful_set, ordinal, revision, templates[revision])
            if ordered and (pod is None or terminating(pod) or not ready(pod)):
                return
        surplus = sorted((o for o in pods if o >= spec["replicas"]), reverse=True)
        for ordinal in surplus:
            if not terminating(pods[ordinal]):
                self._world.delete_pod(pods[ordinal])
            if ordered:
                return
        if surplus or rolling is None:
            return
        for ordinal in range(spec["replicas"] - 1, partition - 1, -1):
            pod = pods.get(ordinal)
            if pod is None or terminating(pod):
                return
            if pod["metadata"]["labels"].get(REVISION) != newest:
                self._world.delete_pod(pod)
                return
            if not ready(pod):
                return

    def _templates(self, stateful_set: Json, newest: str) -> dict[str, Json]:
        """Return the templates by revision. Keeps the newest one as a ControllerRevision."""
        namespace = stateful_set["metadata"]["namespace"]
        revisions = self._world.owned("controllerrevisions.apps", stateful_set)
        templates = {r["metadata"]["name"]: r["data"]["spec"]["template"] for r in revisions}
        if newest not in templates:
            templates[newest] = stateful_set["spec"]["template"]
            self._world.create(
                {
                    "apiVersion": "apps/v1",
                    "kind": "ControllerRevision",
                    "metadata": {
                        "name": newest,
                        "namespace": namespace,
                        "labels": dict(templates[newest]["metadata"].get("labels") or {}),
                        "ownerReferences": [owner_reference(stateful_set)],
                    },
                    "data": {"spec": {"template": clone(templates[newest])}},
                    "revision": len(templates),
                }
            )
        return templates

    def _make(self, stateful_set: Json, ordinal: int, revision: str, template: Json) -> None:
        meta, spec = stateful_set["metadata"], stateful_set["spec"]
        name = f"{meta['name']}-{ordinal}"
        numbers = {
            "statefulset.kubernetes.io/pod-name": name,
            "apps.kubernetes.io/pod-index": str(ordinal),
            REVISION: revision,
        }
        pod = pod_from(template, stateful_set, numbers, name=name)
        pod["spec"] |= {"hostname": name, "subdomain": spec["serviceName"]}
        for claim in spec.get("volumeClaimTemplates") or []:
            claim_name = f"{claim['metadata']['name']}-{name}"
            if self._world.store.find("persistentvolumeclaims", claim_name, meta["namespace"]) is None:
                made = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": clone(claim["spec"])}
                claim_meta = {
                    "name": claim_name,
                    "namespace": meta["namespace"],
                    "labels": clone(spec["selector"].get("matchLabels")),
                }
                if spec["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] == "Delete":
                    claim_meta["ownerReferences"] = [owner_reference(stateful_set)]
                self._world.create({**made, "metadata": claim_meta})
            volume = {"name": claim["metadata"]["name"], "persistentVolumeClaim": {"claimName": claim_name}}
            others = [v for v in pod["spec"].get("volumes") or [] if v["name"] != volume["name"]]
            pod["spec"]["volumes"] = [volume, *others]
        self._world.create(pod)

    def _set_status(self, stateful_set: Json, newest: str, settled: str) -> None:
        pods = owned(self._world.view("pods", stateful_set["metadata"]["namespace"]), stateful_set)
        living = [p for p in pods if not terminating(p)]
        updated = sum(p["metadata"]["labels"].get(REVISION) == newest for p in living)
        up = sum(ready(p) for p in living)
        done = updated == up == len(pods) == stateful_set["spec"]["replicas"]
        status: Json = {
            "observedGeneration": stateful_set["metadata"]["generation"],
            "replicas": len(pods),
            "availableReplicas": up,
            "collisionCount": 0,
            "currentRevision": newest if done else settled,
            "updateRevision": newest,
        }
        current = sum(p["metadata"]["labels"].get(REVISION) == status["currentRevision"] for p in living)
        counts = {"readyReplicas": up, "updatedReplicas": updated, "currentReplicas": current}
        status |= {name: count for name, count in counts.items() if count}
        self._world.set_status(SETS, stateful_set, status)


def _ordinal(pod: Json) -> int:
    return int(pod["metadata"]["name"].rpartition("-")[2])
