"""Where each kind of object lives in the API."""

from __future__ import annotations

from dataclasses import dataclass

from .names import OWN_API, PLURAL, PUBLISHED_API


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind: `api` is its group and version."""

    api: str
    kind: str
    plural: str
    namespaced: bool = True


MADE = (  # what a KVCache becomes
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("v1", "Service", "services"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("apps/v1", "StatefulSet", "statefulsets"),
    Kind("apps/v1", "Deployment", "deployments"),
)
MONITORS = (
    Kind("monitoring.coreos.com/v1", "ServiceMonitor", "servicemonitors"),
    Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors"),
)
OLD_BUDGET = Kind("policy/v1beta1", "PodDisruptionBudget", "poddisruptionbudgets")  # before Kubernetes 1.21
POD = Kind("v1", "Pod", "pods")
NODE = Kind("v1", "Node", "nodes", namespaced=False)
EVENT = Kind("v1", "Event", "events")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
DEFINITION = Kind("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False)
STATEFUL_SET, DEPLOYMENT = MADE[-2:]
PUBLISHED, OWN = Kind(PUBLISHED_API, "KVCache", PLURAL), Kind(OWN_API, "KVCache", PLURAL)
KVCACHES = (PUBLISHED, OWN)
