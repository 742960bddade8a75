"""kvkern's classes that derive from vLLM's, and the second half of the self-test: vLLM can call them."""

from __future__ import annotations

from . import shim
from .connector import KvkernConnector
from .contract import describe_vllm, differences
from .manager import KvkernManager
from .packing import PackingReport
from .spec import KvkernSpec
from .transfer_metadata import SlotSpec, StepMetadata
from .versions import is_known, refusal
from .worker import KvkernWorker
from .worker_report import WorkerReport

DERIVED = (
    KvkernConnector, KvkernManager, KvkernSpec, KvkernWorker, PackingReport, SlotSpec, StepMetadata, WorkerReport
)  # fmt: skip


def refuse_unfit() -> None:
    """Raise UnsupportedError if a vLLM that no test has seen would call kvkern's classes in a way that they do not take."""
    if not is_known(shim.VLLM_VERSION) and (found := differences(describe_vllm(), DERIVED)):
        raise refusal(shim.VLLM_VERSION, found)
