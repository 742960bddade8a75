"""Subresources that are more than a part of the object: scale, eviction and binding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .deletion import Deletion
from .errors import ApiError, Cause, bad_request, conflict, internal
from .json_values import Json, clone
from .resources import Resource
from .selectors import selects

if TYPE_CHECKING:
    from .store import Options, Store

_NO_BUDGET = "Cannot evict pod as it would violate the pod's disruption budget."


def scale_of(obj: Json) -> Json:
    """Return the Scale of a workload."""
    selector = (obj["spec"].get("selector") or {}).get("matchLabels") or {}
    names = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {name: obj["metadata"][name] for name in names if name in obj["metadata"]},
        "spec": {"replicas": obj["spec"].get("replicas", 0)},
        "status": {
            "replicas": obj.get("status", {}).get("replicas", 0),
            "selector": ",".join(f"{k}={v}" for k, v in sorted(selector.items())),
        },
    }


def set_scale(store: Store, resource: Resource, name: str, namespace: str, scale: Any, options: Options) -> Json:
    """Set the replicas. A resourceVersion in the Scale must be the current one."""
    patch: Json = {"spec": {"replicas": int((scale.get("spec") or {}).get("replicas", 0))}}
    revision = (scale.get("metadata") or {}).get("resourceVersion")
    if revision:
        patch["metadata"] = {"resourceVersion": revision}
    options.subresource = ""
    return scale_of(store.patch(resource, name, patch, namespace, "merge", options))


def bind(store: Store, name: str, namespace: str, node: str) -> Json:
    """Put a pod on a node, as a scheduler does. Raises 409 if it is on one."""
    with store.lock:
        pod = clone(store.get("pods", name, namespace))
        if pod["spec"].get("nodeName"):
            raise conflict(
                store.resource("pods"), name, f"pod {name} is already assigned to node {pod['spec']['nodeName']!r}"
            )
        pod["spec"]["nodeName"] = node
        others = [c for c in pod["status"].get("conditions") or [] if c["type"] != "PodScheduled"]
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": store.now()}
        pod["status"]["conditions"] = [*others, scheduled]
        return store.replace_stored(("", "pods"), pod)


def evict(store: Store, name: str, namespace: str, deletion: Deletion, options: Options) -> Json:
    """Delete a pod if its disruption budget allows. Raises 429 if not. The budget's status is a controller's work."""
    if not name:
        raise bad_request("the eviction names no pod")
    with store.lock:
        pod = store.get("pods", name, namespace)
        status = pod["status"]
        if status.get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp"):
            budgets = [
                b
                for b in store.view("poddisruptionbudgets", namespace)
                if selects(b["spec"].get("selector"), pod["metadata"].get("labels"))
            ]
            if len(budgets) > 1:
                raise internal(
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support."
                )
            for budget in budgets:
                _spend(store, budget, pod, options)
    store.delete("pods", name, namespace, deletion, options)
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}


def _spend(store: Store, budget: Json, pod: Json, options: Options) -> None:
    status, name = budget["status"], budget["metadata"]["name"]
    if status.get("observedGeneration", 0) < budget["metadata"]["generation"]:
        cause = Cause("", f"The disruption budget {name} is still being processed by the server.", "DisruptionBudget")
        raise ApiError(429, "TooManyRequests", _NO_BUDGET, {"causes": [cause.body()]}, 10)
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions") or [])
    always = budget["spec"].get("unhealthyPodEvictionPolicy") == "AlwaysAllow"
    if not ready and (always or status["currentHealthy"] >= status["desiredHealthy"]):
        return
    if status["disruptionsAllowed"] <= 0:
        needs, has = status["desiredHealthy"], status["currentHealthy"]
        text = f"The disruption budget {name} needs {needs} healthy pods and has {has} currently"
        raise ApiError(429, "TooManyRequests", _NO_BUDGET, {"causes": [Cause("", text, "DisruptionBudget").body()]})
    if not options.dry_run:
        changed = clone(budget)
        changed["status"]["disruptionsAllowed"] -= 1
        changed["status"].setdefault("disruptedPods", {})[pod["metadata"]["name"]] = store.now()
        store.replace_stored(("policy", "poddisruptionbudgets"), changed)
