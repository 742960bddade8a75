"""A vLLM engine with kvkern, small enough for a test: builds models, runs prompts, looks into the cache."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import torch

from kvkern.node.client.cache_client import NodeClient

BLOCK_TOKENS = 32
VOCAB = 512
TOOL_CALL_TOKEN = 511  # the token that the models' tokenizer file gives


def _llama(config_class: Any, **extra: Any) -> Any:
    return config_class(
        vocab_size=VOCAB, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=256, max_position_embeddings=4096, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **extra,
    )  # fmt: skip


def _config(kind: str) -> Any:
    import transformers as hf

    match kind:
        case "llama":
            return _llama(hf.LlamaConfig)
        case "sliding":  # alternating full attention and sliding window: two KV groups
            layers = ["sliding_attention", "full_attention"]
            return _llama(
                hf.Gemma3TextConfig, sliding_window=64, layer_types=layers, query_pre_attn_scalar=32,
                architectures=["Gemma3ForCausalLM"],
            )  # fmt: skip
        case "mla":
            return hf.DeepseekV2Config(
                vocab_size=VOCAB, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32,
                intermediate_size=256, first_k_dense_replace=2, n_routed_experts=2, n_shared_experts=1,
                moe_intermediate_size=64, num_experts_per_tok=1, max_position_embeddings=4096,
                initializer_range=0.1, bos_token_id=1, eos_token_id=2, topk_method="greedy", n_group=1, topk_group=1,
            )  # fmt: skip
        case "recurrent":  # alternating short convolutions and attention: a state beside the KV
            return _llama(
                hf.Lfm2Config,
                layer_types=["conv", "full_attention"],
                conv_L_cache=3,
                conv_dim=128,
                conv_dim_out=128,
                block_dim=128,
                block_ff_dim=256,
                block_auto_adjust_ff_dim=False,
            )
        case _:
            raise ValueError(kind)


def _skip_without_short_convolutions() -> None:
    """Skip the test if vLLM packs the weights of every convolution for a kernel that takes a width of 4 and bfloat16."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(32, 1, 3), requires_grad=False)
    try:
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    except RuntimeError as error:
        pytest.skip(f"this vLLM has no short convolutions in float32 on this CPU: {error}")


def _skip_without_rejection_sampler() -> None:
    """Skip the test if vLLM's rejection sampler has no way around Triton: wrapped kernels, which it does not call."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.utils import cpu_triton_utils

    if not HAS_TRITON and hasattr(cpu_triton_utils, "_FuncWrapper"):
        pytest.skip("this vLLM has no rejection sampler without Triton, which speculation needs")


def build_model(kind: str, path: Path) -> str:
    """Write a random model of `kind` to `path` and return it."""
    import transformers as hf

    if kind == "recurrent":
        _skip_without_short_convolutions()
    torch.manual_seed(0)
    config = _config(kind)
    model = hf.AutoModelForCausalLM.from_config(config).to(torch.float32)
    model.save_pretrained(path)
    added = [{"id": TOOL_CALL_TOKEN, "content": "<tool_call>"}]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))  # kvkern reads it; vLLM does not
    return str(path)


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


@dataclass(frozen=True)
class Reply:
    """The reply to one prompt."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int


class Engine:
    """`vllm.LLM` with an embedded kvkern cache, or a daemon's (`kvkern_options={"socket": ...}`), or none (`capacity=None`)."""

    def __init__(self, model: str, capacity: str | None = "64MiB", blocks_per_chunk: int = 1, **options: Any) -> None:
        from vllm import LLM

        from kvkern.integrations.vllm import kv_transfer_config

        if options.get("speculative_config"):
            _skip_without_rejection_sampler()
        defaults = {
            "dtype": "float32",
            "block_size": BLOCK_TOKENS,
            "num_gpu_blocks_override": 40,
            "kv_cache_memory_bytes": 64 << 20,
            "max_model_len": 1024,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 8,
            "scheduling_policy": "priority",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "distributed_executor_backend": "mp",  # a second worker in one process fails
            "seed": 0,
        }
        kvkern_options = options.pop("kvkern_options", {})
        own = capacity if "socket" not in kvkern_options else None
        cached = own is not None or "socket" in kvkern_options
        transfer = kv_transfer_config(own, blocks_per_chunk, **kvkern_options) if cached else None
        if transfer is not None and (engine_id := options.pop("engine_id", None)):
            transfer.engine_id = engine_id
        self.llm = LLM(model, **({"kv_transfer_config": transfer} | defaults | options))

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def cache(self) -> Any:
        """The scheduler's kvkern cache, without its meter."""
        return self.scheduler.connector._manager._cache.inner

    @property
    def dram(self) -> Any:
        return self.cache._dram

    def params(self, tokens: int = 4) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=tokens, temperature=0, logprobs=1, detokenize=False, ignore_eos=True)

    def run(self, prompts: Sequence[list[int]], tokens: int = 4, **kwargs: Any) -> list[Reply]:
        """Return the greedy replies."""
        inputs = [{"prompt_token_ids": p} for p in prompts]
        outputs = self.llm.generate(inputs, self.params(tokens), use_tqdm=False, **kwargs)
        return [_reply(output) for output in outputs]

    def one(self, tokens_in: list[int], tokens: int = 4) -> Reply:
        return self.run([tokens_in], tokens)[0]

    def session(self, name: str, parts: Sequence[tuple[list[int], int]], **params: Any) -> list[list[int]]:
        """Run a streaming-input session of (tokens, reply's length) and return the replies.

        Requests go to the engine's core, as AsyncLLM sends them. `params` are SamplingParams of every part.
        """
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        core, replies = self.llm.llm_engine.engine_core, []

        def send(tokens: list[int], length: int, resumable: bool) -> None:
            sampling = SamplingParams(max_tokens=length, temperature=0, detokenize=False, ignore_eos=True, **params)
            core.add_request(
                EngineCoreRequest(
                    request_id=name,
                    prompt_token_ids=list(tokens),
                    mm_features=None,
                    sampling_params=sampling,
                    pooling_params=None,
                    arrival_time=time.time(),
                    lora_request=None,
                    cache_salt=None,
                    data_parallel_rank=None,
                    resumable=resumable,
                )
            )

        for tokens, length in parts:
            send(tokens, length, resumable=True)
            reply, ended = [], False
            while not ended:
                for output in core.get_output().outputs:
                    reply += output.new_token_ids
                    ended = output.finish_reason is not None
            replies.append(reply)
        send([0], 1, resumable=False)
        while name in self.scheduler.requests:
            core.get_output()
        return replies

    def steps(self, condition: Callable[[], bool], limit: int = 2000) -> None:
        """Step the engine until `condition()` holds."""
        for _ in range(limit):
            if condition():
                return
            self.llm.llm_engine.step()
        raise AssertionError(f"the condition did not hold after {limit} steps")

    def settle(self) -> None:
        """Step until no transfer is running and a daemon has acknowledged all stores."""
        self.steps(lambda: not self.scheduler.connector.has_pending_push_work())
        deadline = time.monotonic() + 30
        while isinstance(self.cache, NodeClient) and self.cache._unanswered_publishes:
            assert time.monotonic() < deadline, "the daemon did not acknowledge the stores within 30 s"
            time.sleep(0.005)

    def three_ways(self, tokens_in: list[int], tokens: int = 4) -> tuple[Reply, Reply, Reply]:
        """Return (recompute, native hit, kvkern hit) of a prompt that no cache has yet."""
        recompute, native = self.one(tokens_in, tokens), self.one(tokens_in, tokens)
        self.reset_native()
        return recompute, native, self.one(tokens_in, tokens)

    def flip_bytes(self) -> int:
        """Flip a byte in every cached chunk, in the first rank's part. Return how many there are."""
        self.settle()
        slots = list(self.dram._index.values())
        parts = self.dram._arena.parts(0)
        for slot in slots:
            parts[slot, 99] ^= np.uint8(4)
        return len(slots)

    def reset_native(self) -> None:
        """Empty vLLM's own prefix cache, not kvkern's."""
        self.settle()
        assert self.llm.reset_prefix_cache()

    def reset_everything(self) -> None:
        self.settle()
        assert self.llm.reset_prefix_cache(reset_connector=True)

    def accounted(self) -> bool:
        """Return True if every slot is free, or READY and unpinned: no slot has leaked."""
        dram = self.dram
        return dram.num_free + len(dram) == dram.num_slots and not any(dram._pins) and not dram._doomed

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def _reply(output: Any) -> Reply:
    completion = output.outputs[0]
    chosen = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    return Reply(tuple(completion.token_ids), tuple(chosen), output.num_cached_tokens or 0)
