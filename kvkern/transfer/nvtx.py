"""Names pieces of work in an Nsight Systems trace: `with span("kvkern store"): ...`. Off unless KVKERN_NVTX=1.

Off, every span is one shared context that does nothing. On, it needs a torch built for CUDA, whose NVTX it calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ..config import nvtx_requested

logger = logging.getLogger("kvkern")

Span = Callable[[str], AbstractContextManager[None]]
_NOTHING: AbstractContextManager[None] = nullcontext()


def make_span(asked: bool) -> Span:
    """A range of that name in the calling thread, or nothing; where it cannot be had, nothing and a warning."""
    if not asked:
        return lambda name: _NOTHING
    import torch

    if torch.version.cuda is None:
        logger.warning("kvkern: KVKERN_NVTX is set, but torch %s is built without CUDA: no NVTX", torch.__version__)
        return lambda name: _NOTHING
    ranges: Span = torch.cuda.nvtx.range
    return ranges


span = make_span(nvtx_requested())
