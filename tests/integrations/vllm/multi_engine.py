"""An engine with kvkern inside vLLM's MultiConnector, beside another connector."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vllm.config import KVTransferConfig

from tests.integrations.vllm.engine import Engine, Reply
from tests.integrations.vllm.server import transfer_config


class MultiEngine(Engine):
    """An engine with kvkern and a connector of other_connectors.py, which keeps prompts in `folder`."""

    def __init__(
        self,
        model: str,
        folder: Path,
        kvkern_first: bool,
        connector: str = "FailingConnector",
        policy: str = "recompute",
        kvkern: dict[str, Any] | None = None,  # its options
        **options: Any,
    ) -> None:
        self.folder = folder
        other = {
            "kv_connector": connector, "kv_role": "kv_both",
            "kv_connector_module_path": "tests.integrations.vllm.other_connectors",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        }  # fmt: skip
        ours = transfer_config(**kvkern or {"capacity": "64MiB"})
        children = [ours, other] if kvkern_first else [other, ours]
        outer = KVTransferConfig(
            kv_connector="MultiConnector", kv_role="kv_both", kv_load_failure_policy=policy,
            kv_connector_extra_config={"connectors": children},
        )  # fmt: skip
        # the other connector keeps a prompt cut off if it is computed in several steps
        super().__init__(model, capacity=None, kv_transfer_config=outer, max_num_batched_tokens=1024, **options)

    @property
    def manager(self) -> Any:
        (kvkern,) = (child for child in self.scheduler.connector.sub_connectors if hasattr(child, "_manager"))
        return kvkern._manager

    @property
    def cache(self) -> Any:
        return self.manager._cache.inner

    def forget_other(self) -> None:
        """Delete all that the other connector holds, and let its loads succeed."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def without_native(self, text: list[int], tokens: int = 4) -> Reply:
        """Return the reply to a prompt of which vLLM's own cache has nothing."""
        self.reset_native()
        return self.one(text, tokens)


def same(reply: Reply, other: Reply) -> bool:
    """Return True if tokens and log-probabilities are equal."""
    return (reply.tokens, reply.logprobs) == (other.tokens, other.logprobs)
