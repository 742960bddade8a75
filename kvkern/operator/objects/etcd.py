"""etcd with one, three or five real members: one cluster, which a member without data joins again."""

from __future__ import annotations

from ..kvcache import KVCache, Store
from ..names import ETCD_PEER_PORT, ETCD_PORT, identity, labels
from .metadata import Manifest, locked_down, owner

DATA_DIR = "/var/lib/etcd"
USER = 10001
DEFAULT_SIZE = {"cpu": "100m", "memory": "256Mi"}
# A member with data goes on. One without data asks the others: if they are a cluster, it takes its old place there or a new
# one; if not, all begin one together. A cluster that has just lost a member answers no or nothing for some seconds.
SCRIPT = """set -eu
me=http://$MY_POD_NAME.$PEERS_DOMAIN
state=new
ask() { etcdctl --endpoints="$OTHERS" --command-timeout=5s member "$@"; }
join() {
  old=$(ask list | grep -F "$me:2380" | cut -d, -f1)
  if [ -n "$old" ]; then ask remove "$old" || return; fi
  ask add "$MY_POD_NAME" --peer-urls="$me:2380"
}
if [ ! -d "$DATA_DIR/member" ] && [ -n "$OTHERS" ]; then
  if ask list; then
    tries=0
    until joined=$(join); do
      tries=$((tries + 1))
      [ "$tries" -lt 30 ]
      sleep 2
    done
    INITIAL_CLUSTER=$(printf '%s\\n' "$joined" | sed -n 's/^ETCD_INITIAL_CLUSTER="\\(.*\\)"$/\\1/p')
    state=existing
  fi
fi
alone=
if [ -d "$DATA_DIR/member" ] && [ -z "$OTHERS" ]; then alone=--force-new-cluster; fi  # it may have had others
exec etcd $alone --name="$MY_POD_NAME" --data-dir="$DATA_DIR" \\
  --listen-client-urls=http://0.0.0.0:2379 --advertise-client-urls="$me:2379" \\
  --listen-peer-urls=http://0.0.0.0:2380 --initial-advertise-peer-urls="$me:2380" \\
  --initial-cluster="$INITIAL_CLUSTER" --initial-cluster-state="$state" --initial-cluster-token="$CLUSTER_TOKEN"
"""


def etcd_objects(cache: KVCache) -> list[Manifest]:
    """Return services, budget and StatefulSet of the etcd, if the KVCache has one."""
    if (etcd := cache.etcd) is None:
        return []
    name, role = f"{cache.name}-etcd", {"labels": identity(cache.name, "metadata")}
    client = {"name": "etcd-for-vineyard-port", "port": ETCD_PORT, "targetPort": ETCD_PORT, "protocol": "TCP"}
    peer = {"name": "peer", "port": ETCD_PEER_PORT, "targetPort": ETCD_PEER_PORT, "protocol": "TCP"}
    selector = identity(cache.name, "metadata")
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"{name}-service"} | role,
            "spec": {"type": "ClusterIP", "selector": selector, "ports": [client]},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name} | role,
            "spec": {
                "type": "ClusterIP", "clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector,
                "ports": [client | {"name": "client"}, peer],
            },
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": name} | role,
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector}},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": name} | role,
            "spec": _stateful_set(cache, etcd, name),
        },
    ]  # fmt: skip


def _stateful_set(cache: KVCache, etcd: Store, name: str) -> Manifest:
    domain = f"{name}.{cache.namespace}"
    members = [f"{name}-{number}" for number in range(etcd.replicas)]
    variables = {
        "DATA_DIR": DATA_DIR,
        "PEERS_DOMAIN": domain,
        "CLUSTER_TOKEN": f"{cache.namespace}.{name}",
        "OTHERS": ",".join(f"http://{member}.{domain}:{ETCD_PORT}" for member in members) if len(members) > 1 else "",
        "INITIAL_CLUSTER": ",".join(f"{member}=http://{member}.{domain}:{ETCD_PEER_PORT}" for member in members),
    }
    me = {"name": "MY_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    probe = {"httpGet": {"path": "/health", "port": ETCD_PORT}, "timeoutSeconds": 5, "periodSeconds": 10}
    container: Manifest = {
        "name": "etcd",
        "image": etcd.image,
        "imagePullPolicy": etcd.pull_policy,
        "command": ["/bin/sh", "-c", SCRIPT],
        "env": [me, *({"name": key, "value": value} for key, value in variables.items()), *etcd.env],
        "ports": [{"name": "client", "containerPort": ETCD_PORT}, {"name": "server", "containerPort": ETCD_PEER_PORT}],
        "resources": etcd.resources or {"requests": DEFAULT_SIZE, "limits": DEFAULT_SIZE},
        "securityContext": locked_down(USER),
        "readinessProbe": probe,
        "livenessProbe": {"tcpSocket": {"port": ETCD_PORT}, "periodSeconds": 20, "failureThreshold": 3},
        "volumeMounts": [{"name": "data", "mountPath": DATA_DIR}],
    }
    pod: Manifest = {
        "serviceAccountName": cache.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"fsGroup": USER, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "affinity": {"podAntiAffinity": _apart(cache)},
        "containers": [container],
    }
    spec: Manifest = {
        "replicas": etcd.replicas,
        "serviceName": name,
        "podManagementPolicy": "Parallel",  # members of a new cluster wait for each other
        "selector": {"matchLabels": identity(cache.name, "metadata")},
        "template": {"metadata": {"labels": labels(cache.name, "metadata")}, "spec": pod},
    }
    if etcd.storage:
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": etcd.storage}}}
        spec["persistentVolumeClaimRetentionPolicy"] = {"whenDeleted": "Delete", "whenScaled": "Delete"}
        metadata: Manifest = {"name": "data"}
        if cache.uid:
            metadata["ownerReferences"] = [owner(cache)]  # clusters before 1.27 know no retention policy
        spec["volumeClaimTemplates"] = [{"metadata": metadata, "spec": claim}]
    else:
        pod["volumes"] = [{"name": "data", "emptyDir": {}}]
    return spec


def _apart(cache: KVCache) -> Manifest:
    term = {
        "labelSelector": {"matchLabels": identity(cache.name, "metadata")},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
