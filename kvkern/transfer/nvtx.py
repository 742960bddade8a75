"""Names pieces of work in an Nsight Systems trace: `with span("kvkern store"): ...`. Off unless KVKERN_NVTX=1.

If off, every span is one shared context that does nothing. If on, spans call the NVTX of a torch built for CUDA.
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
    """Return what opens an NVTX range of a given name in the calling thread.

    If spans are not asked for, or torch has no CUDA, the result opens nothing. The latter logs a warning.
    """
    if not asked:
        return lambda name: _NOTHING
    import torch

    if torch.version.cuda is None:
        logger.warning(
            "kvkern: KVKERN_NVTX is set, but torch %(torch)s is built without CUDA, so there are no NVTX ranges. "
            "Install a torch built for CUDA, or unset KVKERN_NVTX.", {"event": "nvtx_without_cuda", "torch": torch.__version__},
        )  # fmt: skip
        return lambda name: _NOTHING
    ranges: Span = torch.cuda.nvtx.range
    return ranges


span = make_span(nvtx_requested())
