"""What all objects have: namespace, labels, an owner."""

from __future__ import annotations

from typing import Any

from ..kvcache import KVCache
from ..names import KIND, ROLE_LABEL, labels

Manifest = dict[str, Any]


def owned(manifest: Manifest, cache: KVCache) -> Manifest:
    """Return the object with its namespace, its labels and its owner, so that it goes when the KVCache goes."""
    metadata = manifest["metadata"]
    role = metadata.get("labels", {}).get(ROLE_LABEL, "cache")
    complete = {"name": metadata["name"], "namespace": cache.namespace}
    complete["labels"] = labels(cache.name, role) | metadata.get("labels", {})
    if metadata.get("annotations"):
        complete["annotations"] = metadata["annotations"]
    if cache.uid:
        complete["ownerReferences"] = [owner(cache) | {"controller": True, "blockOwnerDeletion": True}]
    return manifest | {"metadata": complete}


def owner(cache: KVCache) -> dict[str, str]:
    """Return the reference that makes an object go with the KVCache."""
    return {"apiVersion": cache.api, "kind": KIND, "name": cache.name, "uid": cache.uid}


def locked_down(run_as: int | None = None) -> Manifest:
    """Return the security context of a container: no rights, no writes outside its volumes."""
    context: Manifest = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
    }
    return (
        context
        if run_as is None
        else context | {"runAsUser": run_as, "runAsGroup": run_as, "runAsNonRoot": run_as != 0}
    )
