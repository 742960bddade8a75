"""The KVCache of kvkern.io/v1alpha1."""

from __future__ import annotations

from ...config.options import Kind, Option
from ...policy import POLICIES
from ...policy.persist_modes import Persist
from ..forms.common import MAX_REPLICAS
from ..forms.own import camel
from ..kvcache import ArenaPlace
from ..names import RPC_PORT, WORKLOAD_LABEL
from ..options import OPTIONS
from .parts import (
    LABEL_KEY,
    LABEL_VALUE,
    MAX_PORT,
    Schema,
    anything,
    array,
    choice,
    env,
    flag,
    integer,
    pull_policy,
    quantity,
    resources,
    service_type,
    text,
    texts,
    thing,
)

_CHOICES = {"policy": tuple(POLICIES), "persist": tuple(Persist), "log_format": ("text", "json")}


def _option(option: Option) -> Schema:
    """Return the schema of a daemon's option."""
    if option.name in _CHOICES:
        return choice(option.help, _CHOICES[option.name])
    if option.kind is Kind.BOOL:
        return flag(option.help)
    if option.kind is Kind.INTS:
        return array(option.help, {"type": "integer", "minimum": 0, "maximum": 2**32 - 2})
    if option.kind is Kind.TEXTS:
        return array(option.help, {"type": "string", "minLength": 1})
    if option.kind is Kind.FLOAT:
        return {"type": "number", "minimum": 0, "maximum": 3600, "description": option.help}
    if option.kind is Kind.INT:
        return {"type": "integer", "description": option.help}
    if option.kind is Kind.SIZE:
        return text(option.help, pattern=r"^[0-9]+(\.[0-9]+)? ?[KMGTkmgt]?i?B?$")
    return text(option.help)


REDIS = thing(
    "A Redis that the operator runs: the remote store of all nodes.",
    {
        "image": text("Image of Redis or Valkey."),
        "replicas": integer("0: none.", 0, 1),
        "resources": resources(),
        "runtime": anything("The same fields inside."),
        "storage": thing("Not used: what it holds may be lost.", {"size": quantity("Its size.")}),
    },
)
OWN_SPEC: Schema = thing(
    "What the cache should be.",
    {
        "image": text("Image of the daemon; left out: the operator's own, or its --image.", minLength=1),
        "imagePullPolicy": pull_policy(),
        "imagePullSecrets": array("For pulling it.", thing("A secret.", {"name": text("Its name.")}, required=["name"]), 16),
        "cpu": quantity("CPUs of a cache pod.", "1"),
        "memory": quantity("Memory of a cache pod: requested and the limit. Most of it is cache; see the status.", "2Gi"),
        "sharedMemorySize": quantity("Size of the pod's own /dev/shm, which the arena is not in.", empty=True),
        "env": env("Variables of the daemon."),
        "workload": thing(
            "Whose pods the cache follows: each of their nodes gets one cache pod.",
            {
                "name": text("Value of the label.", minLength=1, maxLength=63, pattern=LABEL_VALUE),
                "labelKey": text("The label of the workload's pods.", WORKLOAD_LABEL, maxLength=317, pattern=LABEL_KEY),
            },
            required=["name"],
        ),
        "minPods": integer("Cache pods before the workload has any.", 0, MAX_REPLICAS, 0),
        "maxUnavailable": integer("Nodes whose cache is replaced at one time.", 1, MAX_REPLICAS, 1),
        "arena": choice(
            "Host: chunks are in the node's shared memory and outlive the pod. Pod: they end with it.",
            tuple(ArenaPlace),
            ArenaPlace.HOST.value,
        ),
        "nodeSelector": texts("Labels that a node must have."),
        "tolerations": array("Taints that the cache pods tolerate, beside those of GPUs.", anything("A toleration."), 64),
        "priorityClassName": text("Priority of the cache pods."),
        "podLabels": texts("Labels of the cache pods, beside the operator's."),
        "podAnnotations": texts("Annotations of the cache pods."),
        "service": thing(
            "The service N-rpc, which tells health.",
            {
                "type": service_type(),
                "port": integer("Its port.", 1, MAX_PORT, RPC_PORT),
                "nodePort": integer("Its port on the nodes.", 0, MAX_PORT),
            },
        ),
        "options": thing("Options of the daemon.", {camel(option): _option(option) for option in OPTIONS}),
        "remote": thing(
            "The store that nodes share. One of the three.",
            {
                "url": text("Its URL, without a password."),
                "urlSecretRef": thing(
                    "A secret with its URL.",
                    {"name": text("The secret."), "key": text("Its entry.", "url")},
                    required=["name"],
                ),
                "redis": REDIS,
            },
            **{"x-kubernetes-validations": [
                {"rule": "[has(self.url), has(self.urlSecretRef), has(self.redis)].filter(x, x).size() <= 1",
                 "message": "give one of url, urlSecretRef and redis"}]},
        ),
    },
)  # fmt: skip
