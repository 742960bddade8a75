"""A Redis or Valkey server beside the cache: the remote store that the nodes of a KVCache share. It persists nothing."""

from __future__ import annotations

from ..forms.common import memory_limit
from ..kvcache import KVCache, Store
from ..names import REDIS_PORT, identity, labels
from .metadata import Manifest, locked_down

IMAGE = "valkey/valkey:8.1"  # has the command redis-server too, as an image of Redis has
USER = 10001
DEFAULT_SIZE = {"cpu": "500m", "memory": "1Gi"}
VALUES_SHARE = 3, 4  # of the memory; the rest is for buffers and for what the allocator loses


def redis_objects(cache: KVCache) -> list[Manifest]:
    """Return service and StatefulSet of the Redis, if the KVCache has one."""
    if (redis := cache.redis) is None:
        return []
    name, role = f"{cache.name}-redis", {"labels": identity(cache.name, "redis")}
    port = {"name": "redis", "port": REDIS_PORT, "targetPort": REDIS_PORT, "protocol": "TCP"}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name} | role,
            "spec": {"type": "ClusterIP", "selector": identity(cache.name, "redis"), "ports": [port]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": name} | role,
            "spec": {
                "replicas": 1,
                "serviceName": name,
                "selector": {"matchLabels": identity(cache.name, "redis")},
                "template": {"metadata": {"labels": labels(cache.name, "redis")}, "spec": _pod(cache, redis)},
            },
        },
    ]


def _pod(cache: KVCache, redis: Store) -> Manifest:
    resources = redis.resources or {"requests": DEFAULT_SIZE, "limits": DEFAULT_SIZE}
    numerator, denominator = VALUES_SHARE
    values_nbytes = memory_limit(resources) * numerator // denominator
    limit = ["--maxmemory", str(values_nbytes), "--maxmemory-policy", "allkeys-lru"] if values_nbytes else []
    probe = {"tcpSocket": {"port": REDIS_PORT}, "periodSeconds": 10, "timeoutSeconds": 5}
    return {
        "serviceAccountName": cache.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"fsGroup": USER, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "redis",
                "image": redis.image or IMAGE,
                "imagePullPolicy": redis.pull_policy,
                # Only cache pods reach it: the network policy says so.
                "command": ["redis-server", "--save", "", "--appendonly", "no", "--protected-mode", "no", *limit],
                "env": list(redis.env),
                "ports": [{"name": "redis", "containerPort": REDIS_PORT}],
                "resources": resources,
                "securityContext": locked_down(USER),
                "readinessProbe": probe,
                "livenessProbe": probe | {"periodSeconds": 20},
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            }
        ],
        "volumes": [{"name": "data", "emptyDir": {}}],
    }
