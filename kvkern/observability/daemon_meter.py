"""What a daemon counts for its engines, by model. Told by the cache and by the daemon's sessions; lives as long as the daemon.

Knows namespaces only by what engines have said of them. Chunks of a namespace that nobody has described count as the model
that the client has described last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

from ..bounded_dict import BoundedDict
from .catalogue import CATALOGUE, MAX_MODELS, MAX_TENANTS, OTHER, Kind
from .meters import BoundedNames, Meters

MAX_NAMESPACES = 4096  # whose model is remembered, as many as a daemon keeps descriptions of
MAX_CLIENTS = 1024
MAX_CHUNK_TOKENS = 1 << 20
MAX_NAME = 64  # characters of a model's label


@dataclass(frozen=True)
class NamespaceLabels:
    """The labels of a namespace, and what turns its chunks into tokens."""

    model: str
    tenant: str
    chunk_tokens: int  # 0: not known


UNKNOWN = NamespaceLabels(OTHER, OTHER, 0)


class DaemonMeter(Meters):
    """Implements kvkern.metrics.CacheObserver and Meter. Thread-safe."""

    def __init__(self) -> None:
        counted = {metric: metric.daemon for metric in CATALOGUE if metric.daemon is not None}
        super().__init__({metric: labels for metric, labels in counted.items() if metric.kind is not Kind.GAUGE})
        self.slot_nbytes = 0  # set once there is an arena
        self._models, self._tenants = BoundedNames(MAX_MODELS), BoundedNames(MAX_TENANTS)
        self._labels: BoundedDict[bytes, NamespaceLabels] = BoundedDict(MAX_NAMESPACES)
        self._tenants_of_models: dict[tuple[str, str], None] = {}  # at most (MAX_MODELS + 1) * (MAX_TENANTS + 1)
        self._of_client: BoundedDict[int, NamespaceLabels] = BoundedDict(MAX_CLIENTS)
        self._speeds: BoundedDict[int, float] = BoundedDict(MAX_CLIENTS)  # client -> prefill tokens/s

    def describe(self, root: bytes, fields: Mapping[str, str], client: int = 0) -> None:
        """Note what an engine says of a namespace: its fields as in keys.Namespace."""
        model, tokens = fields.get("model", "")[:MAX_NAME], fields.get("chunk_tokens", "")
        number = int(tokens) if tokens.isascii() and tokens.isdigit() and len(tokens) < 8 else 0
        tenant = fields["salt"][:MAX_NAME] if "salt" in fields else "shared"
        labels = NamespaceLabels(
            self._models.name(model or OTHER), self._tenants.name(tenant), min(number, MAX_CHUNK_TOKENS)
        )
        self._tenants_of_models.setdefault((labels.model, labels.tenant))
        self._labels.put(root, labels)
        self._of_client.put(client, labels)

    def labels_of(self, root: bytes, client: int = 0) -> NamespaceLabels:
        """Return the labels of a namespace, or else those that the client has described last."""
        return self._labels.get(root) or self._of_client.get(client) or UNKNOWN

    def known_tenants(self) -> list[tuple[str, str]]:
        """Return the (model, tenant) labels that engines have described so far."""
        return list(self._tenants_of_models)

    # -- CacheObserver -------------------------------------------------------------------------------------------------

    def counted(self, event: str, tier: str, namespace: bytes, client: int, chunks: int) -> None:
        """See CacheObserver."""
        if not chunks:
            return
        labels = self.labels_of(namespace, client)
        tokens = chunks * labels.chunk_tokens
        self.add(f"{event}_chunks", chunks, tier, labels.model)
        self.add(f"{event}_tokens", tokens, tier, labels.model)
        if event != "lookup":
            self.add(f"{event}_bytes", chunks * self.slot_nbytes, tier, labels.model)
        if event == "hit" and (speed := self._speeds.get(client)):
            self.add("prefill_seconds_avoided", tokens / speed, labels.model)

    def not_loaded(self, reason: str, request: int, chunks: int) -> None:
        """See CacheObserver."""
        if chunks:
            self.add("not_loaded_chunks", chunks, reason)

    def prefill(self, tokens_s: float, client: int) -> None:
        """See CacheObserver."""
        if tokens_s > 0:
            self._speeds.put(client, tokens_s)
        else:
            self._speeds.pop(client, None)
            self._of_client.pop(client, None)

    def prefill_speeds(self) -> dict[str, float]:
        """Return model -> the median prefill speed of its engines, tokens/s."""
        found: dict[str, list[float]] = {}
        for client, speed in list(self._speeds.items()):
            found.setdefault(self.labels_of(b"", client).model, []).append(speed)
        return {model: median_low(speeds) for model, speeds in found.items()}
