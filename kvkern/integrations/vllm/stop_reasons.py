"""Tells from a reply's tokens how it ended: with a tool call, whose result comes back soon, or with the user's turn.

vLLM parses tool calls in its front end, and the scheduler does not see the result. But models begin a tool call with a
special token, and the tokenizer's file names that token.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from ...policy.base import Stop
from . import shim

# The chat templates of these model families write these tokens. A tokenizer has one or two of them, or none.
TOOL_CALL_TOKENS = frozenset(
    {
        "<tool_call>",  # Qwen, Hermes, GLM, Granite, Ernie
        "<tool_calls>",  # Jamba, Hunyuan
        "<|tool_call|>",  # Granite 3, Phi 4
        "<|tool_call_start|>",  # LFM2
        "[TOOL_CALLS]",  # Mistral
        "<|python_tag|>",  # Llama 3
        "<|eom_id|>",  # Llama 3: the end of a message that expects a tool's result
        "<|call|>",  # gpt-oss
        "<|tool_calls_section_begin|>",  # Kimi
        "<｜tool▁calls▁begin｜>",  # DeepSeek  # noqa: RUF001
        "<｜tool_calls_begin｜>",  # Step  # noqa: RUF001
        "<seed:tool_call>",  # Seed-OSS
        "<minimax:tool_call>",  # MiniMax
        "<|START_ACTION|>",  # Command
        "<|action_start|>",  # InternLM
    }
)


class _Added(msgspec.Struct):
    id: int
    content: str


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_Added] = []


def tool_call_ids(vllm_config: shim.VllmConfig) -> frozenset[int]:
    """Return the tokens that begin a tool call; none if the tokenizer's file is missing or names no such token."""
    if (path := _tokenizer_file(vllm_config.model_config)) is None:
        return frozenset()
    try:
        tokenizer = msgspec.json.decode(path.read_bytes(), type=_Tokenizer)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        shim.logger.info(
            "kvkern: %(path)s cannot be read: %(error)s. Tool calls are not recognised; repair the file if the model has a "
            "token for them.",
            {"event": "tool_calls_unknown", "path": path, "error": error},
        )
        return frozenset()
    return frozenset(token.id for token in tokenizer.added_tokens if token.content in TOOL_CALL_TOKENS)


def _tokenizer_file(model: shim.ModelConfig) -> Path | None:
    folder = Path(model.tokenizer)
    if folder.is_dir():
        path = folder / "tokenizer.json"
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model.tokenizer, "tokenizer.json", revision=model.tokenizer_revision)
    except ValueError:  # the tokenizer's name is not a repository's name
        return None
    return Path(found) if isinstance(found, str) else None


def stop_reason(
    request: shim.Request,  # an ended request
    tool_calls: Collection[int],  # tokens, see tool_call_ids; if empty, every reply is UNKNOWN
) -> Stop:
    """Return how the reply ended. UNKNOWN also if it was cut off or aborted."""
    if not tool_calls:
        return Stop.UNKNOWN
    if any(token in tool_calls for token in request.output_token_ids):
        return Stop.TOOL_CALL
    return Stop.END_TURN if request.status == shim.RequestStatus.FINISHED_STOPPED else Stop.UNKNOWN
