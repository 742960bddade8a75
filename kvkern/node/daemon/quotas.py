"""How many bytes of the arena a namespace may hold: what the options --quota, --tenant-quota and --fair say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Quotas:
    """Limits on the bytes of the arena that a namespace may hold."""

    models: Mapping[str, int] = field(default_factory=dict)  # by model name; `*` and `?` match
    tenant: int | None = None  # for every namespace that has a salt
    fair: bool = False  # evict from the largest namespace first, also without quotas

    @property
    def shares(self) -> bool:
        """Return True if every namespace has an eviction policy of its own."""
        return self.fair or bool(self.models) or self.tenant is not None

    def limit_nbytes(self, fields: Mapping[str, str]) -> int | None:
        """Return the bytes that a namespace with these fields may hold; None: no limit."""
        limits = [nbytes for pattern, nbytes in self.models.items() if fnmatchcase(fields.get("model", ""), pattern)]
        if self.tenant is not None and "salt" in fields:
            limits.append(self.tenant)
        return min(limits, default=None)

    def smallest_nbytes(self) -> int | None:
        """Return the smallest of all quotas: the limit of a namespace that nobody has described. None: no quotas."""
        return min([*self.models.values(), *([] if self.tenant is None else [self.tenant])], default=None)
