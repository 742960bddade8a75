"""What a cluster holds around a KVCache: the workload's pods, cache pods, the Deployment. Plain data from the API's objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .objects.metadata import Manifest

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
FINAL_PHASES = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class CachePod:
    """A cache pod."""

    name: str
    node: str  # empty: it is not scheduled
    ip: str
    ready: bool
    ending: bool
    goes_first: bool  # Kubernetes ends it before others if there are to be fewer
    problem: str  # why it does not run; empty: nothing says so


@dataclass(frozen=True, slots=True)
class Daemon:
    """What a daemon says of itself over HTTP."""

    capacity_nbytes: int = 0
    asked_nbytes: int = 0  # the capacity that it was started with; an arena that was there before keeps its size
    used_nbytes: int = 0
    lookups: float = 0.0
    hits: float = 0.0


@dataclass(frozen=True, slots=True)
class StoreState:
    """An etcd or a Redis of the KVCache."""

    name: str
    ready: int  # members
    wanted: int


@dataclass(frozen=True, slots=True)
class Observed:
    """What is there."""

    workload_nodes: tuple[str, ...] = ()  # of the workload's pods, sorted
    follow: Mapping[str, str] = field(default_factory=dict)  # labels that the workload's pods have
    by_name: bool = False  # the workload was found by its metadata.name, not by the label that the KVCache names
    num_unscheduled: int = 0  # pods of the workload that have no node yet
    pods: tuple[CachePod, ...] = ()
    deployment: Manifest | None = None
    stores: tuple[StoreState, ...] = ()
    daemons: Mapping[str, Daemon] = field(default_factory=dict)  # by pod

    @property
    def ready_nodes(self) -> set[str]:
        """The nodes whose cache pod is ready."""
        return {pod.node for pod in self.pods if pod.ready and not pod.ending}

    @property
    def surplus(self) -> list[CachePod]:
        """The cache pods on nodes without a pod of the workload."""
        if not self.workload_nodes:
            return []
        return [pod for pod in self.pods if pod.node and pod.node not in self.workload_nodes and not pod.ending]


def workload_nodes(pods: Iterable[Mapping[str, Any]]) -> tuple[list[str], int]:
    """Return the nodes of pods that run or will, and how many pods have none yet."""
    live = [pod for pod in pods if not has_ended(pod) and not _ending(pod)]
    nodes = sorted({pod["spec"]["nodeName"] for pod in live if pod["spec"].get("nodeName")})
    return nodes, sum(not pod["spec"].get("nodeName") for pod in live)


def cache_pod(pod: Mapping[str, Any]) -> CachePod:
    """Return what a pod's object says."""
    status = pod.get("status") or {}
    conditions = {each.get("type"): each for each in status.get("conditions") or ()}
    return CachePod(
        name=pod["metadata"]["name"],
        node=pod["spec"].get("nodeName") or "",
        ip=status.get("podIP") or "",
        ready=conditions.get("Ready", {}).get("status") == "True",
        ending=_ending(pod),
        goes_first=DELETION_COST in (pod["metadata"].get("annotations") or {}),
        problem=_problem(status, conditions),
    )


def has_ended(pod: Mapping[str, Any]) -> bool:
    """Return True if a pod is done, was evicted or has failed: what it ran is gone, and another pod takes its place."""
    return (pod.get("status") or {}).get("phase") in FINAL_PHASES


def store_state(stateful_set: Mapping[str, Any]) -> StoreState:
    """Return how an etcd or a Redis is."""
    wanted = int(stateful_set["spec"].get("replicas") or 0)
    ready = int((stateful_set.get("status") or {}).get("readyReplicas") or 0)
    return StoreState(stateful_set["metadata"]["name"], min(ready, wanted), wanted)


def _ending(pod: Mapping[str, Any]) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def _problem(status: Mapping[str, Any], conditions: Mapping[Any, Mapping[str, Any]]) -> str:
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return f"not scheduled: {scheduled.get('message') or scheduled.get('reason') or 'no reason given'}"
    for each in status.get("containerStatuses") or ():
        state = each.get("state") or {}
        waiting = state.get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            ended = ((each.get("lastState") or {}).get("terminated") or {}).get("reason")
            return f"{waiting['reason']}{f' after {ended}' if ended else ''}: {waiting.get('message') or 'no message'}"
        if state.get("terminated"):
            return f"ended: {state['terminated'].get('reason') or 'no reason given'}"
    return ""
