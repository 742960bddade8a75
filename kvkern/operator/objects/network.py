"""Services, and who may connect to which pod."""

from __future__ import annotations

from ..kvcache import KVCache
from ..names import ETCD_PEER_PORT, ETCD_PORT, METRICS_PORT, REDIS_PORT, RPC_PORT, identity
from .metadata import Manifest

DNS_PORT = 53


def services(cache: KVCache) -> list[Manifest]:
    """Return `N-rpc`, which leads to the daemon of the same node, and `N-metrics`, which names all daemons."""
    rpc: Manifest = {
        "type": cache.service_type,
        "selector": identity(cache.name, "cache"),
        "ports": [
            {"name": each.name, "port": each.port, "targetPort": each.target, "protocol": each.protocol}
            | ({"nodePort": each.node_port} if each.node_port else {})
            for each in cache.ports
        ],
    }
    rpc["internalTrafficPolicy"] = "Local"
    metrics = {
        "type": "ClusterIP",
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": identity(cache.name, "cache"),
        "ports": [{"name": "metrics", "port": METRICS_PORT, "targetPort": METRICS_PORT, "protocol": "TCP"}],
    }
    return [_service(f"{cache.name}-rpc", rpc), _service(f"{cache.name}-metrics", metrics)]


def _service(name: str, spec: Manifest) -> Manifest:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def network_policies(cache: KVCache) -> list[Manifest]:
    """Return a policy for each role. Kubelets may always probe."""
    namespace: Manifest = {"podSelector": {}}
    rpc = _allow([RPC_PORT], None if cache.service_type != "ClusterIP" else namespace)
    metrics = _allow([METRICS_PORT], {"namespaceSelector": {}})
    policies = [_policy(cache, "cache", [rpc, metrics], _cache_egress(cache))]
    if cache.etcd is not None:
        members = {"podSelector": {"matchLabels": identity(cache.name, "metadata")}}
        clients = _allow([ETCD_PORT], namespace)
        peers = _allow([ETCD_PORT, ETCD_PEER_PORT], members)
        policies.append(
            _policy(cache, "metadata", [clients, peers], [_dns(), _to([ETCD_PORT, ETCD_PEER_PORT], members)])
        )
    if cache.redis is not None:
        caches = {"podSelector": {"matchLabels": identity(cache.name, "cache")}}
        policies.append(_policy(cache, "redis", [_allow([REDIS_PORT], caches)], []))
    return policies


def _cache_egress(cache: KVCache) -> list[Manifest] | None:
    """Return where a daemon may connect to. None: anywhere, because its remote store is elsewhere."""
    if cache.has_remote_elsewhere:
        return None
    if cache.redis is None:
        return []
    return [_dns(), _to([REDIS_PORT], {"podSelector": {"matchLabels": identity(cache.name, "redis")}})]


def _policy(cache: KVCache, role: str, ingress: list[Manifest], egress: list[Manifest] | None) -> Manifest:
    spec: Manifest = {
        "podSelector": {"matchLabels": identity(cache.name, role)},
        "policyTypes": ["Ingress"] if egress is None else ["Ingress", "Egress"],
        "ingress": ingress,
    }
    if egress:
        spec["egress"] = egress
    name = cache.name if role == "cache" else f"{cache.name}-{role}"
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": identity(cache.name, role)},
        "spec": spec,
    }


def _ports(ports: list[int], protocol: str = "TCP") -> list[Manifest]:
    return [{"protocol": protocol, "port": port} for port in ports]


def _allow(ports: list[int], peer: Manifest | None) -> Manifest:
    rule: Manifest = {"ports": _ports(ports)}
    return rule if peer is None else rule | {"from": [peer]}


def _to(ports: list[int], peer: Manifest) -> Manifest:
    return {"ports": _ports(ports), "to": [peer]}


def _dns() -> Manifest:
    return {"ports": [*_ports([DNS_PORT], "UDP"), *_ports([DNS_PORT])]}
