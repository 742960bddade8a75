"""What Prometheus' operator reads, where its kinds exist. Elsewhere the pods' annotations say the same."""

from __future__ import annotations

from ..kvcache import KVCache
from ..names import ENGINE_METRICS_PORT, identity
from .metadata import Manifest

API = "monitoring.coreos.com/v1"
INTERVAL = "15s"


def monitors(cache: KVCache, follow: dict[str, str]) -> list[Manifest]:
    """Return a ServiceMonitor of the daemons, and a PodMonitor of the engines that they follow."""
    endpoint = {"port": "metrics", "path": "/metrics", "interval": INTERVAL}
    found: list[Manifest] = [
        {
            "apiVersion": API,
            "kind": "ServiceMonitor",
            "metadata": {"name": cache.name},
            "spec": {
                "selector": {"matchLabels": identity(cache.name, "cache")},
                "endpoints": [endpoint],
            },
        }
    ]
    if follow:
        # An engine as published declares no port, and a monitor finds by number only what is declared.
        to_port = {
            "sourceLabels": ["__meta_kubernetes_pod_ip"], "targetLabel": "__address__",
            "replacement": f"$1:{ENGINE_METRICS_PORT}",
        }  # fmt: skip
        engine = {"path": "/metrics", "interval": INTERVAL, "relabelings": [to_port]}
        found.append(
            {
                "apiVersion": API,
                "kind": "PodMonitor",
                "metadata": {"name": f"{cache.name}-engines"},
                "spec": {"selector": {"matchLabels": follow}, "podMetricsEndpoints": [engine]},
            }
        )
    return found
