"""A layout bound to an engine's tensors. Every backend of `paged_copy` reads and writes through it. Moves no byte itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import LayoutError
from .layout import PagedLayout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PagedTensors:
    """A layout bound to the tensors it describes. Keeps the tensors alive. The engine still owns their memory."""

    layout: PagedLayout
    tensors: tuple[torch.Tensor, ...]
    bases: npt.NDArray[np.int64]  # [planes] int64 addresses
    _plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def cached_plan(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` works out for this layout and `key`. A backend makes it once; it is kept here."""
        found = self._plans.get(key)
        return self._plans.setdefault(key, make()) if found is None else found

    @property
    def device(self) -> str:
        """The tensors' device as text, for example "cpu" or "cuda:0"."""
        return str(self.tensors[0].device)

    @classmethod
    def bind(cls, layout: PagedLayout, tensors: Sequence[torch.Tensor]) -> PagedTensors:
        """Bind `layout` to `tensors`. Raises LayoutError if it can address a byte outside the tensors' storages."""
        for i, plane in enumerate(layout.planes):
            if plane.tensor >= len(tensors):
                raise LayoutError(
                    f"plane {i} is in tensor {plane.tensor}, but only {len(tensors)} tensors were given: "
                    f"pass the tensors that the layout was made from"
                )
            tensor = tensors[plane.tensor]
            last = (
                (layout.num_blocks - 1) * plane.stride_block
                + (plane.num_tokens - 1) * plane.stride_token
                + (plane.num_heads - 1) * plane.stride_head
                + plane.head_nbytes
            )
            room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size() - plane.offset
            if last > room:
                raise LayoutError(
                    f"plane {i} reaches byte {last} of tensor {plane.tensor}, which has {room} bytes: "
                    f"pass the tensors that the layout was made from"
                )
        return cls(layout, tuple(tensors), layout.bases(tensors))
