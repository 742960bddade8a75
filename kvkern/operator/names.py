"""Names that users, dashboards and other programs rely on: groups, annotations, labels, objects, paths, ports."""

from __future__ import annotations

from ..version import VERSION

OWN_GROUP = "kvkern.io"
PUBLISHED_GROUP = "orchestration.aibrix.ai"
VERSION_NAME = "v1alpha1"
OWN_API = f"{OWN_GROUP}/{VERSION_NAME}"
PUBLISHED_API = f"{PUBLISHED_GROUP}/{VERSION_NAME}"
KIND, PLURAL = "KVCache", "kvcaches"

ANNOTATIONS = "kvcache.orchestration.aibrix.ai/"  # prefix of the published annotations and labels
NAME_LABEL, ROLE_LABEL = f"{ANNOTATIONS}name", f"{ANNOTATIONS}role"
WORKLOAD_ANNOTATION = f"{ANNOTATIONS}pod-affinity-workload"
GPU_TYPE_ANNOTATION, GPU_KEY_ANNOTATION = f"{ANNOTATIONS}node-affinity-gpu-type", f"{ANNOTATIONS}node-affinity-key"
DEFAULT_GPU_KEY = "machine.cluster.vke.volcengine.com/gpu-name"
ANTI_AFFINITY_ANNOTATION, BACKEND_ANNOTATION, MODE_ANNOTATION = (
    f"{ANNOTATIONS}{name}" for name in ("pod-anti-affinity", "backend", "mode")
)
WORKLOAD_LABEL = "model.aibrix.ai/name"  # of an engine's pods
MANAGED_BY = "kvkern-operator"

RPC_PORT, METRICS_PORT, ETCD_PORT, ETCD_PEER_PORT, REDIS_PORT = 9600, 8080, 2379, 2380, 6379
ENGINE_METRICS_PORT = 8080  # on which an engine with the published variables serves its metrics again
SOCKET_DIR, SOCKET_NAME = "/run/kvkern", "vineyard.sock"  # in the cache's pod; engines see it as /var/run/vineyard.sock
ARENA_DIR = "/var/lib/kvkern/arena"  # in the cache's pod
HOST_SOCKETS = "/var/run/vineyard-kubernetes"  # on the node
HOST_ARENAS = "/dev/shm/kvkern-kubernetes"  # on the node: memory that outlives a pod
IMAGE = f"kvkern:{VERSION}"
OTHER_IMAGE = r"(^|/)aibrix/(vineyardd|kvcache)(:|@|$)"  # of the published files: another program, without `kvkern`


def host_socket_dir(namespace: str, name: str) -> str:
    """Return the folder on the node that holds the socket. Engines mount it."""
    return f"{HOST_SOCKETS}/{namespace}/{name}"


def host_arena_dir(namespace: str, name: str) -> str:
    """Return the folder on the node that holds the arena."""
    return f"{HOST_ARENAS}/{namespace}/{name}"


def identity(name: str, role: str) -> dict[str, str]:
    """Return the labels that select the pods of one role."""
    return {NAME_LABEL: name, ROLE_LABEL: role}


def labels(name: str, role: str) -> dict[str, str]:
    """Return all labels of an object."""
    return identity(name, role) | {
        "app.kubernetes.io/name": "kvkern",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": role,
        "app.kubernetes.io/managed-by": MANAGED_BY,
    }
