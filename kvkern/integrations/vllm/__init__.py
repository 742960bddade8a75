"""vLLM adapter. In production it is one option:

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvkernConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "kvkern.integrations.vllm", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kvkern": {"capacity": "8GiB"}}}'

Read in this order: connector (vLLM calls it), manager (scheduler side), worker, transfer_metadata (between the two), spec,
namespace, options, shim (everything taken from vLLM). For the eviction policy: request_hints, stop_reasons, prefill_speed.
"""

from .connector import KvkernConnector
from .options import kv_transfer_config
from .spec import KvkernSpec

__all__ = ["KvkernConnector", "KvkernSpec", "kv_transfer_config"]
