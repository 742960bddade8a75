"""How a reply ended, as far as its tokens tell: with a call of a tool, whose result comes back soon, or with a human's turn.

vLLM parses tool calls in its front end, which the scheduler never hears from. But models begin a call with a token made
for it, and the tokenizer's own file names that token.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from ...policy.base import Stop
from . import shim

# As the chat templates of these families write them; a tokenizer has one or two of them, or none.
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
    """The tokens with which this model's tokenizer begins a tool call; none if its file is not here or names none."""
    if (path := _tokenizer_file(vllm_config.model_config)) is None:
        return frozenset()
    try:
        tokenizer = msgspec.json.decode(path.read_bytes(), type=_Tokenizer)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        shim.logger.info("kvkern: %s says nothing of tool calls: %s", path, error)
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
    except ValueError:  # the name of no repository
        return None
    return Path(found) if isinstance(found, str) else None


def stop_of(
    request: shim.Request,  # that has ended
    tool_calls: Collection[int],  # tokens, see tool_call_ids; without any nothing is told apart
) -> Stop:
    """How its reply ended; unknown too if it was cut off or aborted."""
    if not tool_calls:
        return Stop.UNKNOWN
    if any(token in tool_calls for token in request.output_token_ids):
        return Stop.TOOL_CALL
    return Stop.END_TURN if request.status == shim.RequestStatus.FINISHED_STOPPED else Stop.UNKNOWN
