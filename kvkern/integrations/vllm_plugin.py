"""What vLLM calls in each of its processes before it reads its options: the entry point `vllm.general_plugins`.

It registers the connector's name, so that `"kv_connector": "KvkernConnector"` is enough, also inside MultiConnector, whose
front end knows connectors by name alone. It lets the published deployment's variables switch the cache on
(vllm_variables.py). And it keeps salts and the passwords of remote stores out of vLLM's log. It imports nothing of the
adapter: every vLLM of this environment calls it, whether it uses kvkern or not.
"""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

from ..remote.stores.url import hide_password
from .vllm_variables import CONNECTOR, MODULE, wrap_engine_args


def register() -> None:
    """Register the connector, and hide secrets in the text of vLLM's options. Idempotent."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
    wrap_engine_args()
    original = KVTransferConfig.__repr__
    if getattr(original, "hides_passwords", False):
        return

    @wraps(original)
    def hiding(config: Any) -> str:
        shown = copy.copy(config)
        shown.kv_connector_extra_config = without_passwords(config.kv_connector_extra_config)
        return str(original(shown))

    hiding.hides_passwords = True  # type: ignore[attr-defined]
    KVTransferConfig.__repr__ = hiding


def without_passwords(options: Any) -> Any:
    """Return a copy of the options without passwords of remote URLs and without salts. Includes options of child connectors."""
    if isinstance(options, dict):
        return {name: _shown(name, value) for name, value in options.items()}
    return [without_passwords(value) for value in options] if isinstance(options, list) else options


def _shown(name: Any, value: Any) -> Any:
    if isinstance(value, str) and name in ("remote", "salt"):
        return hide_password(value) if name == "remote" else "***"
    return without_passwords(value)
