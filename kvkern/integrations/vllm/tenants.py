"""Names the namespaces of an engine's tenants: one root for each cache salt, and for each content of a LoRA adapter.

Knows nothing of requests. A root follows from the engine's namespace, the salt, the adapter and the last reset alone. So roots
that were not used for long are forgotten, and a tenant that returns gets the root it had, and finds its chunks.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from blake3 import blake3

from ...cache.base import ChunkCache
from ...keys import Namespace

MAX_KNOWN_ROOTS = 4096  # as many as a daemon keeps descriptions of; those used longest ago are forgotten


class Tenants:
    """The roots of one engine. `namespace` is called at the first request, when the engine's hash seed is known."""

    def __init__(self, cache: ChunkCache, namespace: Callable[[], Namespace]) -> None:
        self._cache = cache
        self._namespace = namespace
        # (hash of the cache salt, adapter) -> namespace root, the last used at the end
        self._roots: OrderedDict[tuple[str | None, str | None], bytes] = OrderedDict()
        self._epoch = ""

    @property
    def private(self) -> bool:
        """True from the first reset on: no other engine has the roots of this one."""
        return bool(self._epoch)

    def root_of(
        self,
        salt: str | None,
        adapter: str | None = None,  # names the content of the request's LoRA adapter and its settings
    ) -> bytes:
        """Return the root of a tenant. Every tenant has keys and a quota of its own, whatever vLLM hashes."""
        tenant = (None if salt is None else blake3(salt.encode()).hexdigest(), adapter)
        root = self._roots.get(tenant)
        if root is None:
            namespace = self._named(*tenant)
            root = self._roots[tenant] = namespace.root
            self._cache.describe_namespace(root, namespace.public_fields())
            if len(self._roots) > MAX_KNOWN_ROOTS:
                self._roots.popitem(last=False)
        self._roots.move_to_end(tenant)
        return root

    def _named(self, salt_hash: str | None, adapter: str | None) -> Namespace:
        namespace = self._namespace()
        if salt_hash is not None:
            namespace = replace(namespace, salt=f"{namespace.salt or ''}/{salt_hash}")
        if adapter is not None:
            namespace = replace(namespace, adapter=adapter)
        if self._epoch:
            namespace = replace(namespace, weights=f"{namespace.weights}@{self._epoch}")
        return namespace

    def reset(self) -> None:
        """Forget all chunks of this engine, and use roots that no engine has had.

        On a daemon, chunks from before the first reset stay: other engines use them. Chunks of forgotten roots are evicted
        in time, because nobody can name them any more.
        """
        if not self._cache.shared:
            self._cache.clear()
        elif self._epoch:
            for root in self._roots.values():
                self._cache.clear_soon(root)
        self._epoch, self._roots = uuid.uuid4().hex, OrderedDict()
