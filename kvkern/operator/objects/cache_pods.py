"""The Deployment of the cache pods: at most one on a node, on nodes where the workload runs.

Two pods never share a node: a new one is not scheduled while an old one is there, also while the old one
ends. The daemon's own lock on the socket holds should two ever meet.
"""

from __future__ import annotations

from ..kvcache import ArenaPlace, KVCache
from ..names import (
    ARENA_DIR,
    METRICS_PORT,
    RPC_PORT,
    SOCKET_DIR,
    SOCKET_NAME,
    host_arena_dir,
    host_socket_dir,
    identity,
    labels,
)
from ..quantities import format_memory
from .metadata import Manifest, locked_down

HOSTNAME = "kubernetes.io/hostname"
GPU_TAINTS = ("nvidia.com/gpu", "amd.com/gpu")
MIN_READY_S = 5
DEFAULT_DRAIN_S = 5.0
END_S = 25  # what a daemon may take to end beyond its drain
REMOTE_PASSWORD = "REMOTE_PASSWORD"  # variable of the pod


def deployment(cache: KVCache, num_pods: int, follow: dict[str, str], scraped: bool) -> Manifest:
    """Return the Deployment. `follow` are labels of the workload's pods; empty: it follows nobody."""
    annotations = dict(cache.extras.annotations)
    if scraped:
        annotations = {
            "prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS_PORT), "prometheus.io/path": "/metrics",
        } | annotations  # fmt: skip
    metadata: Manifest = {"labels": cache.extras.labels | labels(cache.name, "cache")}
    if annotations:
        metadata["annotations"] = annotations
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": cache.name},
        "spec": {
            "replicas": num_pods,
            "revisionHistoryLimit": 3,
            "minReadySeconds": MIN_READY_S,
            "selector": {"matchLabels": identity(cache.name, "cache")},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 0, "maxUnavailable": cache.max_unavailable},
            },
            "template": {"metadata": metadata, "spec": _pod(cache, follow)},
        },
    }


def _pod(cache: KVCache, follow: dict[str, str]) -> Manifest:
    said = cache.options | {str(each["name"]): each.get("value") for each in cache.env}
    drain_s = float(said.get("KVKERN_DRAIN") or DEFAULT_DRAIN_S)
    pod: Manifest = {
        "serviceAccountName": cache.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostPID": True,  # the daemon must see the processes of engines
        "securityContext": {"runAsUser": 0, "runAsGroup": 0, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": int(drain_s) + END_S,
        "affinity": _affinity(cache, follow),
        "tolerations": [
            *({"key": taint, "operator": "Exists", "effect": "NoSchedule"} for taint in GPU_TAINTS),
            *cache.extras.tolerations,
        ],
        "containers": [_container(cache)],
        "volumes": _volumes(cache),
    }
    if cache.extras.node_selector:
        pod["nodeSelector"] = cache.extras.node_selector
    if cache.extras.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in cache.extras.pull_secrets]
    if cache.extras.priority_class:
        pod["priorityClassName"] = cache.extras.priority_class
    return pod


def _container(cache: KVCache) -> Manifest:
    size = {"cpu": cache.cpu, "memory": cache.memory}
    return {
        "name": "kvcache",
        "image": cache.image,
        "imagePullPolicy": cache.pull_policy,
        "command": ["kvkern", "serve"],
        "env": environment(cache),
        "ports": [
            {"name": "rpc", "containerPort": RPC_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "resources": {"requests": size, "limits": size},
        "securityContext": locked_down(),
        "startupProbe": _probe("/livez", period_s=2, failures=90),
        "livenessProbe": _probe("/livez", period_s=20, failures=3),
        "readinessProbe": _probe("/readyz", period_s=5, failures=3),
        "volumeMounts": [
            {"name": "kvcache-socket", "mountPath": SOCKET_DIR},
            {"name": "arena", "mountPath": ARENA_DIR},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _probe(path: str, period_s: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": RPC_PORT},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def environment(cache: KVCache) -> list[Manifest]:
    """Return the variables of a daemon: the published ones, then kvkern's, then the user's."""

    def field(path: str) -> Manifest:
        return {"valueFrom": {"fieldRef": {"fieldPath": path}}}

    found: dict[str, Manifest] = {
        "VINEYARDD_NAME": {"value": cache.name},
        "VINEYARDD_NAMESPACE": {"value": cache.namespace},
        "MY_NODE_NAME": field("spec.nodeName"),
        "MY_POD_NAME": field("metadata.name"),
        "MY_POD_NAMESPACE": field("metadata.namespace"),
        "MY_UID": field("metadata.uid"),
        "MY_POD_IP": field("status.podIP"),
        "MY_HOST_NAME": field("status.podIP"),
        "USER": field("metadata.name"),
        "KVKERN_SOCKET": {"value": f"{SOCKET_DIR}/{SOCKET_NAME}"},
        "KVKERN_ARENA_DIR": {"value": ARENA_DIR},
        "KVKERN_CAPACITY": {"value": str(cache.capacity_nbytes)},
        "KVKERN_RPC": {"value": f":{RPC_PORT}"},
        "KVKERN_METRICS": {"value": f":{METRICS_PORT}"},
        "KVKERN_POLICY_STATE": {"value": f"{ARENA_DIR}/policy.state"},
    }
    if cache.uid:
        found = {"VINEYARDD_UID": {"value": cache.uid}} | found
    found |= _remote(cache) | {name: {"value": value} for name, value in cache.options.items()}
    variables: Manifest = {name: {"name": name} | source for name, source in found.items()}
    return list((variables | {each["name"]: each for each in cache.env}).values())


def _remote(cache: KVCache) -> dict[str, Manifest]:
    if cache.redis is not None:
        return {"KVKERN_REMOTE": {"value": f"redis://{cache.name}-redis.{cache.namespace}:6379"}}
    if cache.external_redis is not None:
        external, url = cache.external_redis, f"redis://{cache.external_redis.address}"
        if not external.secret_name:
            return {"KVKERN_REMOTE": {"value": url}}
        secret = {"secretKeyRef": {"name": external.secret_name, "key": external.secret_key}}
        return {
            REMOTE_PASSWORD: {"valueFrom": secret},
            "KVKERN_REMOTE": {"value": f"{url}?password_env={REMOTE_PASSWORD}"},
        }
    name, key = cache.remote_secret
    if name:
        return {"KVKERN_REMOTE": {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}}
    return {"KVKERN_REMOTE": {"value": cache.remote}} if cache.remote else {}


def _volumes(cache: KVCache) -> list[Manifest]:
    arena: Manifest
    if cache.arena is ArenaPlace.HOST:
        path = host_arena_dir(cache.namespace, cache.name)
        arena = {"hostPath": {"path": path, "type": "DirectoryOrCreate"}}
    else:
        arena = {"emptyDir": {"medium": "Memory", "sizeLimit": format_memory(cache.capacity_nbytes + (16 << 20))}}
    socket = {"path": host_socket_dir(cache.namespace, cache.name), "type": "DirectoryOrCreate"}
    return [
        {"name": "kvcache-socket", "hostPath": socket},
        {"name": "arena"} | arena,
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cache.shared_memory}},
    ]


def _affinity(cache: KVCache, follow: dict[str, str]) -> Manifest:
    alone = {"labelSelector": {"matchLabels": identity(cache.name, "cache")}, "topologyKey": HOSTNAME}
    affinity: Manifest = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [alone]}}
    if follow:
        near = [{"key": key, "operator": "In", "values": [value]} for key, value in follow.items()]
        term = {"labelSelector": {"matchExpressions": near}, "topologyKey": HOSTNAME}
        affinity["podAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    if cache.node_labels:
        wanted = [{"key": key, "operator": "In", "values": [value]} for key, value in cache.node_labels]
        terms = {"nodeSelectorTerms": [{"matchExpressions": wanted}]}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    return affinity
