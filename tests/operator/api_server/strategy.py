"""How a resource takes a new object and a change: defaults, status, allocated values, generation, and what is refused."""

from __future__ import annotations

from typing import Any

from . import validation
from .defaults import set_defaults
from .errors import Cause, bad_request, forbidden, invalid
from .json_values import Json, clone
from .objects import Objects
from .resources import Resource

SERVER_SET = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "selfLink")
_DAEMONS = ("currentNumberScheduled", "desiredNumberScheduled", "numberMisscheduled", "numberReady")
_KEEP_STATUS = ("Node",)  # whoever creates a node says how it is
_TOKEN_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"


def fill_in(resource: Resource, obj: Json, old: Json | None) -> list[str]:
    """Prune and default an object in place. Returns the unknown fields that a custom resource lost."""
    if resource.schema is not None:
        unknown = resource.schema.prune(obj)
        resource.schema.set_defaults(obj)
        return unknown
    if old is not None and resource.kind == "Service":
        _carry_over(obj.setdefault("spec", {}), old["spec"])
    set_defaults(obj)
    return []


def reset_status(resource: Resource, obj: Json) -> None:
    """Give a new object the status that it starts with."""
    if not resource.status or resource.kind in _KEEP_STATUS:
        return
    status: dict[str, Any] = {
        "Pod": {"phase": "Pending", "qosClass": _quality(obj)} if resource.kind == "Pod" else {},
        "Service": {"loadBalancer": {}},
        "Namespace": {"phase": "Active"},
        "PersistentVolumeClaim": {"phase": "Pending"},
        "StatefulSet": {"replicas": 0, "availableReplicas": 0},
        "ReplicaSet": {"replicas": 0},
        "DaemonSet": dict.fromkeys(
            ("currentNumberScheduled", "desiredNumberScheduled", "numberMisscheduled", "numberReady"), 0
        ),
        "PodDisruptionBudget": dict.fromkeys(
            ("currentHealthy", "desiredHealthy", "disruptionsAllowed", "expectedPods"), 0
        ),
    }
    obj.pop("status", None)
    if resource.schema is None:
        obj["status"] = status.get(resource.kind, {})


def _quality(pod: Json) -> str:
    resources = [c["resources"] for c in pod["spec"].get("containers") or []]
    if not any(r.get("limits") or r.get("requests") for r in resources):
        return "BestEffort"
    same = all(
        r.get("limits", {}).keys() >= {"cpu", "memory"} and r.get("limits") == r.get("requests") for r in resources
    )
    return "Guaranteed" if same else "Burstable"


def errors(resource: Resource, obj: Json, old: Json | None) -> list[Cause]:
    if resource.schema is None:
        return validation.errors(obj, old)
    return [*validation.metadata_errors(obj), *resource.schema.validate(obj, old)]


def _carry_over(spec: Json, old: Json) -> None:
    """Keep what the server allocated to a Service when an update leaves it out."""
    if spec.get("type", "ClusterIP") == "ExternalName":
        return
    for name in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
        if not spec.get(name) and old.get(name):
            spec[name] = clone(old[name])
    if spec.get("type") in ("NodePort", "LoadBalancer"):
        had = {(p.get("name"), p["port"], p["protocol"]): p.get("nodePort") for p in old.get("ports") or []}
        for port in spec.get("ports") or []:
            given = had.get((port.get("name"), port.get("port"), port.get("protocol", "TCP")))
            if given and not port.get("nodePort"):
                port["nodePort"] = given
    elif spec.get("type", "ClusterIP") == "ClusterIP" and old.get("type") != "ClusterIP":
        allocated = {p.get("nodePort") for p in old.get("ports") or []}
        for port in spec.get("ports") or []:
            if port.get("nodePort") in allocated:
                port.pop("nodePort", None)
        if spec.get("externalTrafficPolicy") == old.get("externalTrafficPolicy"):
            spec.pop("externalTrafficPolicy", None)
    if spec.get("type") != "LoadBalancer" and old.get("type") == "LoadBalancer":
        spec.pop("allocateLoadBalancerNodePorts", None)


def allocate(resource: Resource, obj: Json, objects: Objects) -> None:
    """Give a Service its address and ports, and a pod its token. Raises 422 for values in use, 403 without ServiceAccount."""
    if resource.kind == "Service":
        _allocate_service(resource, obj, objects)
    elif resource.kind == "Pod":
        name, namespace = obj["spec"]["serviceAccountName"], obj["metadata"]["namespace"]
        account = objects.get(("", "serviceaccounts"), namespace, name)
        if account is None:
            why = f'error looking up service account {namespace}/{name}: serviceaccount "{name}" not found'
            raise forbidden(resource, obj["metadata"]["name"], why)
        _mount_token(obj["spec"], account)


def _allocate_service(resource: Resource, obj: Json, objects: Objects) -> None:
    spec, meta = obj["spec"], obj["metadata"]
    others = [o for o in objects.all(resource.key) if o["metadata"]["uid"] != meta.get("uid")]
    used = {o["spec"].get("clusterIP") for o in others} - {None, "None"}
    if spec["type"] != "ExternalName" and spec.get("clusterIP") != "None":
        if not spec.get("clusterIP"):
            free = (f"10.96.{n // 250}.{n % 250 + 2}" for n in range(10, 60000))
            spec["clusterIP"] = next(ip for ip in free if ip not in used)
        elif spec["clusterIP"] in used:
            text = f'Invalid value: ["{spec["clusterIP"]}"]: failed to allocate IP: provided IP is already allocated'
            raise invalid(resource, meta["name"], [Cause("spec.clusterIPs", text)])
    if spec.get("clusterIP"):
        spec["clusterIPs"] = [spec["clusterIP"]]
    if spec["type"] in ("NodePort", "LoadBalancer"):
        ports = {p.get("nodePort") for o in others for p in o["spec"].get("ports") or []}
        for i, port in enumerate(spec.get("ports") or []):
            wanted = port.get("nodePort")
            if wanted in ports and wanted:
                text = f"Invalid value: {wanted}: provided port is already allocated"
                raise invalid(resource, meta["name"], [Cause(f"spec.ports[{i}].nodePort", text)])
            if wanted and not 30000 <= wanted <= 32767:
                text = f"Invalid value: {wanted}: provided port is not in the valid range 30000-32767"
                raise invalid(resource, meta["name"], [Cause(f"spec.ports[{i}].nodePort", text)])
            port["nodePort"] = wanted or next(n for n in range(30000, 32768) if n not in ports)
            ports.add(port["nodePort"])


def _mount_token(spec: Json, account: Json) -> None:
    wanted = spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True))
    containers = (spec.get("containers") or []) + (spec.get("initContainers") or [])
    without = [c for c in containers if all(m["mountPath"] != _TOKEN_PATH for m in c.get("volumeMounts") or [])]
    if not wanted or not without:
        return
    name = "kube-api-access-x7k2p"
    token = {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}}
    spec.setdefault("volumes", []).append({"name": name, "projected": {"sources": [token], "defaultMode": 0o644}})
    for container in without:
        container.setdefault("volumeMounts", []).append({"name": name, "readOnly": True, "mountPath": _TOKEN_PATH})


def restore(resource: Resource, old: Json, new: Json, subresource: str) -> Json:
    """Return the change without what its writer cannot set. Raises 400 if it is another object."""
    if subresource == "status":
        changed: Json = clone(old)
        changed.pop("status", None)
        if new.get("status") is not None:
            changed["status"] = new["status"]
        for name in ("resourceVersion", "uid", "managedFields"):
            if new["metadata"].get(name):
                changed["metadata"][name] = new["metadata"][name]
        return changed
    for name in ("name", "namespace"):
        had = old["metadata"].get(name)
        if new["metadata"].setdefault(name, had) != had:
            raise bad_request(
                f"the {name} of the object ({new['metadata'][name]}) does not match the {name} on the URL ({had})"
            )
        if had is None:
            del new["metadata"][name]
    if resource.status:
        new.pop("status", None)
        if "status" in old:
            new["status"] = clone(old["status"])
    for name in SERVER_SET:
        if name != "uid":
            new["metadata"].pop(name, None)
        if name in old["metadata"]:
            new["metadata"].setdefault(name, old["metadata"][name])
    if "managedFields" not in new["metadata"] and "managedFields" in old["metadata"]:
        new["metadata"]["managedFields"] = clone(old["metadata"]["managedFields"])
    return new


def count_generation(resource: Resource, old: Json, new: Json) -> None:
    """Raise the generation if more than metadata and status changed."""
    if resource.generation:
        skip = ("metadata", "apiVersion", "status") if resource.status else ("metadata", "apiVersion")
        before, after = ({k: v for k, v in o.items() if k not in skip} for o in (old, new))
        if before != after:
            new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1


def without_fields_owner(obj: Json) -> Json:
    meta = {k: v for k, v in obj["metadata"].items() if k not in ("managedFields", "resourceVersion")}
    return {**obj, "metadata": meta}
