"""The KVCache of orchestration.aibrix.ai/v1alpha1: the fields of 0.2 and those of 0.3 and later, in one schema.

Fields of both together are refused. No whole object has a default, so that the fields tell which form was written.
"""

from __future__ import annotations

from ..forms.common import MAX_REPLICAS
from .parts import (
    MAX_PORT,
    Schema,
    anything,
    array,
    choice,
    env,
    integer,
    members,
    pull_policy,
    quantity,
    resources,
    service_type,
    text,
    thing,
)

EXTERNAL = thing(
    "A server that runs elsewhere.",
    {
        "address": text("host:port.", pattern=r"^([A-Za-z0-9._\[\]:-]+:[0-9]{1,5})?$"),
        "passwordSecretRef": text("A secret as name/key; the key is password if left out."),
    },
)


def _runtime(description: str) -> Schema:
    return thing(
        description,
        {
            "replicas": integer("How many.", 0, MAX_REPLICAS),
            "image": text("Its image."),
            "imagePullPolicy": pull_policy(),
            "env": env("Variables."),
            "resources": resources(),
            "template": anything("A pod's template, of which labels, annotations, node selector, tolerations, pull secrets and "
                                 "priority class act."),
        },
    )  # fmt: skip


def _store(description: str, num: Schema) -> Schema:
    return thing(
        description,
        {
            "image": text("Its image."),
            "replicas": num,
            "resources": resources(),
            "storage": thing("A volume for each member.", {"size": quantity("Its size.")}),
            "runtime": _runtime("As 0.3 and later write it."),
            "externalConnection": EXTERNAL,
        },
    )


PUBLISHED_SPEC: Schema = thing(
    "What the cache should be.",
    {
        "replicas": integer("Cache pods before the workload has any; then one for each of its nodes.", 0, MAX_REPLICAS),
        "etcdReplicas": members("Members of the etcd."),
        "metadata": thing(
            "Servers beside the cache.",
            {
                "etcd": _store("etcd. kvkern itself keeps nothing in it.", members("Members.")),
                "redis": _store("Redis: the remote store that the nodes share.", integer("How many.", 0, MAX_REPLICAS)),
            },
        ),
        "cacheSpec": thing(
            "The cache pods, as 0.2 writes them.",
            {
                "replicas": integer("Has no effect.", 0, MAX_REPLICAS),
                "image": text("Image of the daemon."),
                "imagePullPolicy": pull_policy(),
                "cpu": quantity("CPUs of a pod.", "1"),
                "memory": quantity("Memory of a pod, most of it cache.", "2Gi"),
                "sharedMemorySize": quantity("Size of the pod's /dev/shm.", empty=True),
                "env": env("Variables of the daemon."),
            },
        ),
        "mode": text("Has no effect."),
        "cache": _runtime("The cache pods, as 0.3 and later write them."),
        "watcher": _runtime("Has no effect: the operator watches."),
        "service": thing(
            "The service N-rpc, which tells health.",
            {
                "type": service_type(),
                "port": integer("Its port.", 1, MAX_PORT),
                "nodePort": integer("Its port on the nodes.", 0, MAX_PORT),
                "ports": array(
                    "Its ports.",
                    thing(
                        "A port.",
                        {
                            "name": text("Its name."),
                            "port": integer("Its number.", 1, MAX_PORT),
                            "targetPort": {"x-kubernetes-int-or-string": True},
                            "nodePort": integer("On the nodes.", 0, MAX_PORT),
                            "protocol": choice("TCP.", ("TCP", "UDP", "SCTP"), "TCP"),
                            "appProtocol": text("Has no effect."),
                        },
                        required=["port"],
                    ),
                    16,
                ),
            },
            **{"x-kubernetes-validations": [
                {"rule": "!(has(self.ports) && (has(self.port) || has(self.nodePort)))",
                 "message": "give ports, or port and nodePort, not both"}]},
        ),
    },
    **{"x-kubernetes-validations": [
        {"rule": "!((has(self.replicas) || has(self.etcdReplicas) || has(self.cacheSpec)) && (has(self.mode) || "
                 "has(self.cache) || has(self.watcher)))",
         "message": "replicas, etcdReplicas and cacheSpec are of 0.2; mode, cache and watcher are of 0.3 and later: keep those "
                    "of one"}]},
)  # fmt: skip
