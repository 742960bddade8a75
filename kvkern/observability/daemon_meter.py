"""What a daemon counts for its engines, by model. Told by the cache and by the daemon's sessions; lives as long as the daemon.

Knows namespaces only by what engines have said of them. Chunks of a namespace that nobody has described count as the model
that the client has described last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

from ..bounded_dict import BoundedDict
from .catalogue import CATALOGUE, MAX_MODELS, MAX_TENANTS, OTHER, SECONDS, Kind, Labels
from .meters import BoundedNames, Histogram, Meters

MAX_NAMESPACES = 4096  # whose model is remembered, as many as a daemon keeps descriptions of
MAX_CLIENTS = 1024
MAX_CHUNK_TOKENS = 1 << 20
MAX_NAME = 64  # characters of a model's label


Sums = dict[str, list[float]]  # tier -> chunks, tokens, bytes


class ModelSums:
    """What is counted for one model."""

    __slots__ = ("hit", "lookup", "stored")

    def __init__(self) -> None:
        self.lookup, self.hit, self.stored = _no_sums(), _no_sums(), _no_sums()


@dataclass(frozen=True, slots=True)
class NamespaceLabels:
    """The labels of a namespace, what turns its chunks into tokens, and where its model is counted."""

    model: str
    tenant: str
    chunk_tokens: int  # 0: not known
    sums: ModelSums


class DaemonMeter(Meters):
    """Implements kvkern.metrics.CacheObserver and Meter. Thread-safe, apart from the histograms that are fields."""

    def __init__(self) -> None:
        counted = {metric: metric.daemon for metric in CATALOGUE if metric.daemon is not None}
        super().__init__({metric: labels for metric, labels in counted.items() if metric.kind is not Kind.GAUGE})
        self.slot_nbytes = 0  # set once there is an arena
        # An acquire is on the way of every request, so its time is counted once. Written by the daemon's thread alone:
        self.at_once = Histogram(SECONDS)  # answered at once: the look-up was the acquire
        self.before_wait = Histogram(SECONDS)  # the look-up of those that waited for the remote store
        self._models, self._tenants = BoundedNames(MAX_MODELS), BoundedNames(MAX_TENANTS)
        self._sums: dict[str, ModelSums] = {}  # by model
        self._unknown = NamespaceLabels(OTHER, OTHER, 0, self._sums_of(OTHER))
        self._labels: BoundedDict[bytes, NamespaceLabels] = BoundedDict(MAX_NAMESPACES)
        # (model, tenant) -> nothing; at most (MAX_MODELS + 1) * (MAX_TENANTS + 1)
        self._tenants_of_models: dict[tuple[str, str], None] = {}
        self._of_client: BoundedDict[int, NamespaceLabels] = BoundedDict(MAX_CLIENTS)
        self._speeds: BoundedDict[int, float] = BoundedDict(MAX_CLIENTS)  # client -> prefill tokens/s

    def _sums_of(self, model: str) -> ModelSums:
        return self._sums.setdefault(model, ModelSums())

    def describe(self, root: bytes, fields: Mapping[str, str], client: int = 0) -> None:
        """Note what an engine says of a namespace: its fields as in keys.Namespace."""
        model, tokens = fields.get("model", "")[:MAX_NAME], fields.get("chunk_tokens", "")
        number = int(tokens) if tokens.isascii() and tokens.isdigit() and len(tokens) < 8 else 0
        tenant = fields["salt"][:MAX_NAME] if "salt" in fields else "shared"
        name, tenant = self._models.name(model or OTHER), self._tenants.name(tenant)
        labels = NamespaceLabels(name, tenant, min(number, MAX_CHUNK_TOKENS), self._sums_of(name))
        self._tenants_of_models.setdefault((labels.model, labels.tenant))
        self._labels.put(root, labels)
        self._of_client.put(client, labels)

    def labels_of(self, root: bytes, client: int = 0) -> NamespaceLabels:
        """Return the labels of a namespace, or else those that the client has described last."""
        return self._labels.get(root) or self._of_client.get(client) or self._unknown

    def known_tenants(self) -> list[tuple[str, str]]:
        """Return the (model, tenant) labels that engines have described so far."""
        return list(self._tenants_of_models)

    # -- CacheObserver -------------------------------------------------------------------------------------------------

    def looked_up(self, tier: str, namespace: bytes, client: int, chunks: int, hits: int, tokens: bool = True) -> None:
        """See CacheObserver."""
        labels = self._labels.get(namespace) or self.labels_of(namespace, client)
        chunk_tokens, sums = (labels.chunk_tokens if tokens else 0), labels.sums
        with self._lock:
            row = sums.lookup[tier]
            row[0] += chunks
            row[1] += chunks * chunk_tokens
            if hits:
                row = sums.hit[tier]
                row[0] += hits
                row[1] += hits * chunk_tokens
                row[2] += hits * self.slot_nbytes

    def stored(self, tier: str, namespace: bytes, client: int, chunks: int, first_group: int) -> None:
        """See CacheObserver."""
        labels = self.labels_of(namespace, client)
        with self._lock:
            row = labels.sums.stored[tier]
            row[0] += chunks
            row[1] += first_group * labels.chunk_tokens
            row[2] += chunks * self.slot_nbytes

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

    # -- for exporters -------------------------------------------------------------------------------------------------

    def counter_series(self, name: str) -> dict[Labels, float]:
        """Return label values -> value of a counter. A model appears with its first engine."""
        event, _, unit = name.partition("_")
        if event in ("lookup", "hit", "stored") and unit in _COLUMNS:
            rows = ((model, getattr(sums, event)) for model, sums in self._shown())
            return {(tier, model): row[_COLUMNS[unit]] for model, sums in rows for tier, row in sums.items()}
        return self.counters.get(name, {})

    def histogram_series(self, name: str) -> dict[Labels, Histogram]:
        """Return label values -> histogram."""
        series = self.histograms[name]
        if name == "lookup_seconds":
            return {(): self.at_once.plus(self.before_wait)}
        return {(): self.at_once.plus(series[()])} if name == "acquire_seconds" else series

    def _shown(self) -> list[tuple[str, ModelSums]]:
        """Return the models that engines have named, and OTHER once it has counted anything."""
        with self._lock:
            found = list(self._sums.items())
        counted = (self._unknown.sums.lookup, self._unknown.sums.stored)
        hidden = not any(row[0] for sums in counted for row in sums.values())
        return [(model, sums) for model, sums in found if model != OTHER or not hidden]


_COLUMNS = {"chunks": 0, "tokens": 1, "bytes": 2}


def _no_sums() -> Sums:
    return {"dram": [0.0, 0.0, 0.0], "remote": [0.0, 0.0, 0.0]}
