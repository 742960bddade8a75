"""The KVCaches that the operator has seen: what a watch reports and a list returns. An answer then needs no call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import ConfigError
from ..forms import read_kvcache
from ..kinds import Kind
from ..kvcache import KVCache


class KnownCaches:
    """Use it in one event loop."""

    def __init__(
        self,
        image: str = "",  # of the daemon, as in Settings
        replacement: str = "",
    ) -> None:
        self._image, self._replacement = image, replacement
        self._found: dict[Kind, dict[tuple[str, str], KVCache]] = {}
        self.complete = False  # all KVCaches have been listed once

    def of(self, namespace: str) -> list[KVCache]:
        """Return the KVCaches of a namespace that are not being deleted."""
        return [each for found in self._found.values() for key, each in found.items() if key[0] == namespace]

    def changed(self, kind: Kind, live: Mapping[str, Any], gone: bool) -> None:
        """Note what a watch reports. `gone`: it was deleted."""
        found, key = self._found.setdefault(kind, {}), (live["metadata"]["namespace"], live["metadata"]["name"])
        cache = None if gone else self._read(live)
        if cache is None:
            found.pop(key, None)
        else:
            found[key] = cache

    def listed(self, kind: Kind, lives: Iterable[Mapping[str, Any]]) -> None:
        """Note all KVCaches of a kind."""
        read = (self._read(live) for live in lives)
        self._found[kind] = {(each.namespace, each.name): each for each in read if each is not None}

    def _read(self, live: Mapping[str, Any]) -> KVCache | None:
        if live["metadata"].get("deletionTimestamp"):
            return None
        try:
            return read_kvcache(live, self._image, self._replacement)
        except ConfigError:
            return None
