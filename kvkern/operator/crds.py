"""The two CustomResourceDefinitions, one for each group, far below what client-side `kubectl apply` can hold."""

from __future__ import annotations

from typing import Any

from .forms.common import MAX_NAME
from .names import KIND, OWN_GROUP, PLURAL, PUBLISHED_GROUP, VERSION_NAME
from .schemas.own import OWN_SPEC
from .schemas.published import PUBLISHED_SPEC
from .schemas.status import STATUS

MANAGED_ANNOTATION = "kvkern.io/crd"  # tells our definition of the published group from anybody else's
SHORT_NAMES = {OWN_GROUP: ["kvc"], PUBLISHED_GROUP: ["kvcache-aibrix"]}
RULES = "x-kubernetes-validations"
COLUMNS = [
    {"name": "Available", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Available")].status'},
    {"name": "Ready", "type": "integer", "jsonPath": ".status.ready"},
    {"name": "Desired", "type": "integer", "jsonPath": ".status.desired"},
    {"name": "Capacity", "type": "string", "jsonPath": ".status.capacity"},
    {"name": "Used", "type": "string", "jsonPath": ".status.used"},
    {"name": "Hits", "type": "string", "jsonPath": ".status.hitRatio"},
    {"name": "Reason", "type": "string", "jsonPath": ".status.reason"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]


def crd(group: str, rules: bool = True) -> dict[str, Any]:
    """Return the definition of a group: OWN_GROUP or PUBLISHED_GROUP.

    `rules`: with rules in CEL, which API servers know from 1.25 on, and which kubectl refuses to send to those before 1.23.
    What they refuse, the operator refuses too.
    """
    spec = OWN_SPEC if group == OWN_GROUP else PUBLISHED_SPEC
    if not rules:
        spec = _without_rules(spec)
    schema = {
        "type": "object",
        "description": "The cache of the nodes on which a workload runs: one daemon on each, which all its engines share.",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": MAX_NAME}
                },
            },
            "spec": spec,
            "status": STATUS,
        },
    }
    version = {
        "name": VERSION_NAME,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
        "additionalPrinterColumns": COLUMNS,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{group}", "annotations": {MANAGED_ANNOTATION: "kvkern"}},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": SHORT_NAMES[group],
                "categories": ["kvkern"],  # kubectl get kvkern: KVCaches of both groups
            },
            "versions": [version],
        },
    }


def _without_rules(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _without_rules(value) for key, value in schema.items() if key != RULES}
    return [_without_rules(each) for each in schema] if isinstance(schema, list) else schema
