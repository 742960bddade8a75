"""The objects of the Kubernetes API that a KVCache becomes. Pure: the same KVCache always becomes the same objects."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..kvcache import KVCache
from ..names import identity
from .cache_pods import deployment
from .etcd import etcd_objects
from .metadata import Manifest, owned
from .monitoring import monitors
from .network import network_policies, services
from .redis import redis_objects

__all__ = ["Cluster", "Manifest", "render"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the objects depend on and only a cluster knows."""

    num_pods: int | None = None  # cache pods, one for each node of the workload; None: the workload has no pods yet
    follow: dict[str, str] = field(default_factory=dict)  # labels of the workload's pods; empty: what the KVCache says
    monitors: bool = False  # the API has ServiceMonitor and PodMonitor


def render(cache: KVCache, cluster: Cluster | None = None) -> list[Manifest]:
    """Return all objects in the order in which they are made. The KVCache has no errors."""
    cluster = cluster or Cluster()
    if not cluster.follow and cache.workload:
        cluster = replace(cluster, follow={cache.workload_label: cache.workload})
    num_pods = cache.min_pods if cluster.num_pods is None else cluster.num_pods
    objects = [
        service_account(cache),
        *network_policies(cache),
        *services(cache),
        disruption_budget(cache),
        *etcd_objects(cache),
        *redis_objects(cache),
        deployment(cache, num_pods, cluster.follow, scraped=not cluster.monitors),
        *(monitors(cache, cluster.follow) if cluster.monitors else ()),
    ]
    return [owned(each, cache) for each in objects]


def service_account(cache: KVCache) -> Manifest:
    """Return the account of all pods. It may do nothing: none of them asks the API."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": cache.name},
        "automountServiceAccountToken": False,
    }


def disruption_budget(cache: KVCache) -> Manifest:
    """Return the budget that a drain of nodes keeps to."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": cache.name},
        "spec": {"maxUnavailable": cache.max_unavailable, "selector": {"matchLabels": identity(cache.name, "cache")}},
    }
