"""The status of a KVCache: figures and conditions, each with a reason for programs and a sentence for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config.sizes import format_nbytes
from .findings import Finding
from .kvcache import KVCache
from .names import RPC_PORT
from .observed import Observed

MAX_NODES = 500
MAX_TEXT = 1000
ORDER = (
    "ConfigValid",
    "Degraded",
    "WorkloadFound",
    "NodesCovered",
    "Progressing",
    "Available",
)  # what `reason` looks at first
_BAD = {"ConfigValid": "False", "Degraded": "True", "WorkloadFound": "False", "NodesCovered": "False", "Progressing": "True",
        "Available": "False"}  # fmt: skip


def status_of(
    cache: KVCache,
    seen: Observed,
    desired: int,  # cache pods that there should be
    faults: Sequence[str],  # what could not be written, and why
    before: Mapping[str, Any],  # the status so far
    now: str,  # RFC 3339
) -> dict[str, Any]:
    """Return the new status. A condition keeps the time of its last transition until its status changes."""
    ready = seen.ready_nodes
    found = [
        _config_valid(cache, seen),
        _workload_found(cache, seen),
        _nodes_covered(cache, seen),
        _progressing(seen, desired),
        _degraded(seen, faults),
        _available(cache, seen, desired),
    ]
    old = {each.get("type"): each for each in before.get("conditions") or () if isinstance(each, Mapping)}
    conditions = []
    for kind, holds, reason, message in found:
        same = old.get(kind, {}).get("status") == holds
        since = old[kind].get("lastTransitionTime") or now if same else now
        conditions.append(
            {
                "type": kind,
                "status": holds,
                "reason": reason,
                "message": message[:MAX_TEXT],
                "lastTransitionTime": since,
                "observedGeneration": cache.generation,
            }
        )
    status: dict[str, Any] = {
        "observedGeneration": cache.generation,
        "form": str(cache.form),
        "current": len(ready),
        "ready": len(ready),
        "desired": desired,
        "reason": _first_reason(conditions),
        "nodes": _nodes(seen),
        "conditions": conditions,
    }
    return status | _figures(cache, seen)


def _first_reason(conditions: Sequence[Mapping[str, Any]]) -> str:
    by_kind = {each["type"]: each for each in conditions}
    for kind in ORDER:
        if by_kind[kind]["status"] == _BAD[kind]:
            return str(by_kind[kind]["reason"])
    return "Ready"


def _figures(cache: KVCache, seen: Observed) -> dict[str, Any]:
    """Return the figures that are known. Old API servers turn an empty text of a new status into a null, and refuse that."""
    daemons = seen.daemons.values()
    lookups = sum(each.lookups for each in daemons)
    figures: dict[str, Any] = {}
    if cache.capacity_nbytes:
        figures["capacityPerNode"] = format_nbytes(cache.capacity_nbytes)
    if daemons:
        figures["capacity"] = format_nbytes(sum(each.capacity_nbytes for each in daemons))
        figures["used"] = format_nbytes(sum(each.used_nbytes for each in daemons))
    if lookups:
        figures["hitRatio"] = f"{sum(each.hits for each in daemons) / lookups:.0%}"
    return figures


def _nodes(seen: Observed) -> list[dict[str, Any]]:
    of_node = {pod.node: pod for pod in sorted(seen.pods, key=lambda pod: (not pod.ending, pod.ready)) if pod.node}
    found = []
    for node in sorted({*seen.workload_nodes, *of_node})[:MAX_NODES]:
        entry: dict[str, Any] = {"node": node, "ready": False}
        if (pod := of_node.get(node)) is not None:
            entry |= {"pod": pod.name, "ready": pod.ready and not pod.ending}
            if pod.ip:
                entry["endpoint"] = f"{pod.ip}:{RPC_PORT}"
            if (daemon := seen.daemons.get(pod.name)) is not None:
                entry |= {"capacityBytes": daemon.capacity_nbytes, "usedBytes": daemon.used_nbytes}
                if daemon.lookups:
                    entry["hitRatio"] = f"{daemon.hits / daemon.lookups:.0%}"
        found.append(entry)
    return found


def _joined(findings: Sequence[Finding]) -> str:
    return "; ".join(map(str, findings))


def _config_valid(cache: KVCache, seen: Observed) -> tuple[str, str, str, str]:
    if cache.errors:
        return "ConfigValid", "False", "Invalid", f"Nothing is changed until this is corrected: {_joined(cache.errors)}"
    if cache.notes:
        return "ConfigValid", "True", "PartlyWithoutEffect", _joined(cache.notes)
    asked = [(pod.node, seen.daemons[pod.name]) for pod in seen.pods if pod.name in seen.daemons]
    if kept := [node for node, daemon in asked if daemon.capacity_nbytes != daemon.asked_nbytes]:
        return (
            "ConfigValid", "True", "MemoryWithoutEffect",
            f"On {', '.join(kept[:10])} the arena keeps its size, as engines there use it: to change it and lose its chunks, "
            "set KVKERN_RESIZE_ARENA (options.resizeArena) to true and restart the engines.",
        )  # fmt: skip
    return "ConfigValid", "True", "Valid", "Every field has its effect."


def _workload_found(cache: KVCache, seen: Observed) -> tuple[str, str, str, str]:
    if not cache.workload:
        return "WorkloadFound", "Unknown", "NotAsked", "The KVCache names no workload, so its pods go to any node."
    label = f"{cache.workload_label}={cache.workload}"
    if seen.by_name and (seen.workload_nodes or seen.num_unscheduled):
        real = ", ".join(f"{key}={value}" for key, value in seen.follow.items())
        return (
            "WorkloadFound", "True", "FoundByName",
            f"No pod has the label {label}. A workload of that name exists, and its pods with {real} are followed; correct "
            "the annotation or the label.",
        )  # fmt: skip
    if seen.workload_nodes or seen.num_unscheduled:
        return "WorkloadFound", "True", "FoundByLabel", f"Pods with {label} run on {len(seen.workload_nodes)} node(s)."
    return (
        "WorkloadFound", "False", "NoPods",
        f"No pod in this namespace has the label {label}. Cache pods wait for one; deploy the engine, or correct the name.",
    )  # fmt: skip


def _nodes_covered(cache: KVCache, seen: Observed) -> tuple[str, str, str, str]:
    if not cache.workload or not seen.workload_nodes:
        return "NodesCovered", "Unknown", "NoNodes", "No pod of the workload has a node yet."
    missing = sorted(set(seen.workload_nodes) - seen.ready_nodes)
    if missing:
        shown = ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
        return (
            "NodesCovered",
            "False",
            "NodesWithoutCache",
            f"Engines on {shown} have no ready cache pod and compute everything.",
        )
    return "NodesCovered", "True", "AllNodes", "Every node of the workload has a ready cache pod."


def _progressing(seen: Observed, desired: int) -> tuple[str, str, str, str]:
    if seen.deployment is None:
        return "Progressing", "True", "NotMade", "The Deployment does not exist yet."
    spec, status = seen.deployment["spec"], seen.deployment.get("status") or {}
    if int(status.get("observedGeneration") or 0) < int(seen.deployment["metadata"].get("generation") or 0):
        return "Progressing", "True", "Rolling", "Kubernetes has not seen the last change of the Deployment yet."
    replicas, updated = int(spec.get("replicas") or 0), int(status.get("updatedReplicas") or 0)
    if updated < replicas or int(status.get("replicas") or 0) > replicas:
        return "Progressing", "True", "Rolling", f"{updated} of {replicas} cache pods are as the KVCache says now."
    if seen.surplus:
        shown = ", ".join(pod.node for pod in seen.surplus[:10])
        return "Progressing", "True", "Moving", f"Cache pods leave {shown}, where no pod of the workload runs."
    return "Progressing", "False", "Settled", f"{desired} cache pod(s), all as the KVCache says."


def _degraded(seen: Observed, faults: Sequence[str]) -> tuple[str, str, str, str]:
    if faults:
        return "Degraded", "True", "CannotWrite", "; ".join(faults)
    broken = [f"{pod.name}: {pod.problem}" for pod in seen.pods if pod.problem and pod.node and not pod.ending]
    if broken:
        return "Degraded", "True", "PodFails", "; ".join(broken[:5])
    waiting = [f"{pod.name}: {pod.problem}" for pod in seen.pods if pod.problem and not pod.node and not pod.ending]
    if waiting and seen.workload_nodes:
        return "Degraded", "True", "PodNotScheduled", "; ".join(waiting[:5])
    if short := [f"{each.name}: {each.ready} of {each.wanted}" for each in seen.stores if each.ready < each.wanted]:
        return "Degraded", "True", "StoreNotReady", f"Members ready of {'; '.join(short)}. See their pods."
    return "Degraded", "False", "AsExpected", "Nothing fails."


def _available(cache: KVCache, seen: Observed, desired: int) -> tuple[str, str, str, str]:
    ready = len(seen.ready_nodes & set(seen.workload_nodes) if seen.workload_nodes else seen.ready_nodes)
    if ready and ready >= desired:
        return "Available", "True", "Ready", f"{ready} cache pod(s) serve."
    if ready:
        return "Available", "True", "PartlyReady", f"{ready} of {desired} cache pods serve."
    if not desired:
        why = "the workload has no pods" if cache.workload else "the KVCache names no workload, and no number of pods"
        return "Available", "False", "NothingToServe", f"No cache pod is wanted: {why}."
    return "Available", "False", "NotReady", f"None of {desired} cache pod(s) is ready."
