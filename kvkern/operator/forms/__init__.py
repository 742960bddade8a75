"""Reads the three forms of a KVCache. Every field acts, or a finding says that it does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import ConfigError
from ..findings import Finding, Level
from ..kvcache import KVCache
from ..names import KIND, OTHER_IMAGE, OWN_API, OWN_GROUP, PUBLISHED_API, PUBLISHED_GROUP
from .own import read_own
from .published import read_published


def read_kvcache(
    manifest: Mapping[str, Any],
    image: str = "",  # of the daemon, where it names none
    replacement: str = "",  # of the daemon, where it names the image of the program that it was written for
) -> KVCache:
    """Return what a KVCache asks for. Its `errors` say what is wrong with it.

    Raises ConfigError if it is no KVCache, or of a version that this operator does not know.
    """
    api, kind = manifest.get("apiVersion"), manifest.get("kind")
    if kind != KIND or not isinstance(api, str) or api.split("/")[0] not in (OWN_GROUP, PUBLISHED_GROUP):
        raise ConfigError(f"{api} {kind} is no {KIND} of {OWN_GROUP} or {PUBLISHED_GROUP}")
    if api not in (OWN_API, PUBLISHED_API):
        raise ConfigError(f"apiVersion is {api}; this operator knows {OWN_API} and {PUBLISHED_API}")
    cache = (read_own if api == OWN_API else read_published)(manifest, image)
    if not re.search(OTHER_IMAGE, cache.image):
        return cache
    if replacement:
        etcd = cache.etcd
        if etcd is not None and etcd.image == cache.image:
            etcd = replace(etcd, image=replacement)
        return replace(cache, image=replacement, etcd=etcd)
    finding = Finding(
        Level.ERROR,
        "spec",
        f"image is {cache.image}, which has another program in it; put kvkern's image there, or have such images replaced: "
        "--replace-images",
    )
    return replace(cache, findings=(*cache.findings, finding))
