"""The status of a KVCache, in both groups."""

from __future__ import annotations

from .parts import Schema, array, text, thing

_INTEGER = {"type": "integer", "format": "int64"}

CONDITION: Schema = thing(
    "One statement about the cache.",
    {
        "type": text("What it is about.", maxLength=316),
        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
        "reason": text("A word for programs.", maxLength=1024, minLength=1),
        "message": text("A sentence for people, with what to do.", maxLength=32768),
        "lastTransitionTime": {"type": "string", "format": "date-time"},
        "observedGeneration": _INTEGER | {"minimum": 0},
    },
    required=["type", "status", "reason", "message", "lastTransitionTime"],
)
NODE: Schema = thing(
    "The cache of one node.",
    {
        "node": text("Its name."),
        "pod": text("The cache pod on it; empty: none yet."),
        "endpoint": text("host:port that tells the daemon's health."),
        "ready": {"type": "boolean"},
        "capacityBytes": _INTEGER,
        "usedBytes": _INTEGER,
        "hitRatio": text("Chunks found of those looked up, since the daemon's start, in percent."),
    },
)
STATUS: Schema = thing(
    "What is. Written by the operator.",
    {
        "observedGeneration": _INTEGER,
        "current": _INTEGER | {"description": "Ready cache pods, under the published name."},
        "ready": _INTEGER | {"description": "Ready cache pods."},
        "desired": _INTEGER | {"description": "Cache pods that there should be: one for each node of the workload."},
        "capacity": text("Cache of all ready nodes."),
        "used": text("Of it in use."),
        "capacityPerNode": text("Cache of one node: what the pod's memory leaves for it."),
        "hitRatio": text("Chunks found of those looked up, since the daemons' start, in percent."),
        "reason": text("The first thing that is not as it should be."),
        "form": text("Which form of KVCache the operator has read: published, runtime or own."),
        "nodes": array("The nodes, the first 500 by name.", NODE, 500),
        "conditions": array("What holds and what does not.", CONDITION, 32)
        | {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    },
)
