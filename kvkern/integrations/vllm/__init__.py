"""vLLM adapter. In production it is one option:

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvkernConnector", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"kvkern": {"capacity": "8GiB"}}}'

vLLM finds the name through the plugin ../vllm_plugin.py. Where plugins are switched off (VLLM_PLUGINS), add
"kv_connector_module_path": "kvkern.integrations.vllm".

Read in this order: connector (vLLM calls it), manager (scheduler side), worker, transfer_metadata (between the two), spec,
namespace, options, shim (everything taken from vLLM). For the eviction policy: request_hints, stop_reasons, prefill_speed.
"""

from ..vllm_plugin import register
from .connector import KvkernConnector
from .derived import refuse_unfit
from .options import kv_transfer_config
from .spec import KvkernSpec

__all__ = ["KvkernConnector", "KvkernSpec", "kv_transfer_config"]

refuse_unfit()
register()  # MultiConnector looks the class up by name, also where vLLM's plugins are switched off
