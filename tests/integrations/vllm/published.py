"""The published deployment's command and variables, started as its Deployment starts them, with a small model."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.integrations.vllm.server import Server
from tests.remote.required_servers import free_port

ALIAS = "deepseek-coder-7b-instruct"
VARIABLES = {  # the page's, but for the paths of this machine
    "VLLM_USE_VINEYARD_CACHE": "1",
    "VINEYARD_CACHE_CPU_MEM_LIMIT_GB": "10",
    "AIBRIX_LLM_KV_CACHE": "1",
    "AIBRIX_LLM_KV_CACHE_KV_CACHE_NS": "aibrix",
    "AIBRIX_LLM_KV_CACHE_CHUNK_SIZE": "32",  # the page has 16; blocks are multiples of 32 on CPUs
    "VINEYARD_CACHE_ENABLE_ASYNC_UPDATE": "1",
    "VINEYARD_CACHE_METRICS_ENABLED": "1",
}
# what a machine without a GPU and with other users needs; none of it concerns kvkern
_MACHINE = {
    "VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCH_COMPILE_DISABLE": "1",
}  # fmt: skip


class PublishedServer(Server):
    """`python3 -m vllm.entrypoints.openai.api_server` with the page's options and no other; its environment says the rest."""

    def __init__(self, model: str, log: Path, *args: str, max_model_len: int = 1024, **env: str) -> None:
        self.log_path, self.model = log, ALIAS
        self.port = free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(self.port),
            "--uvicorn-log-level", "warning", "--model", model, "--served-model-name", ALIAS,
            "--max-model-len", str(max_model_len), "--enable-prefix-caching", "--disable-fastapi-docs",
        ]  # fmt: skip
        self._start([*command, *args], _MACHINE | env)
