"""Stop reasons read from a reply's tokens: from the tool-call tokens of the tokenizer's file, and from vLLM's own request."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams

from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.stop_reasons import stop_reason, tool_call_ids
from kvkern.policy.base import Stop

pytestmark = pytest.mark.vllm
CALLS = frozenset({7, 9})
STATUS = shim.RequestStatus


def config(tokenizer: str) -> Any:
    return SimpleNamespace(model_config=SimpleNamespace(tokenizer=tokenizer, tokenizer_revision=None))


def ended(tokens: list[int], status: shim.RequestStatus) -> shim.Request:
    """Return vLLM's own request with this reply."""
    request = shim.Request("r", [1, 2, 3], SamplingParams(max_tokens=9), None)
    request.append_output_token_ids(tokens)
    request.status = status
    return request


def test_tokens_that_the_tokenizer_has_for_tool_calls(tmp_path: Path) -> None:
    added = [
        {"id": 1, "content": "<s>", "special": True}, {"id": 7, "content": "<tool_call>", "special": False},
        {"id": 8, "content": "</tool_call>", "special": False}, {"id": 9, "content": "[TOOL_CALLS]", "special": True},
    ]  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": {}}))
    assert tool_call_ids(config(str(tmp_path))) == CALLS


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"added_tokens": 3}', '{"added_tokens": [{"id": "7"}]}', "\xff"]
)
def test_a_file_without_tool_call_tokens(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    assert tool_call_ids(config(str(tmp_path))) == frozenset()


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    assert tool_call_ids(config(str(tmp_path))) == frozenset()
    for name in ("nobody/has-this", str(tmp_path / "gone" / "far" / "away"), ""):
        assert tool_call_ids(config(name)) == frozenset()


@pytest.mark.parametrize(
    ("tokens", "status", "stop"),
    [
        ([3, 7, 4], STATUS.FINISHED_STOPPED, Stop.TOOL_CALL),
        ([3, 9], STATUS.FINISHED_ABORTED, Stop.TOOL_CALL),  # the front end aborts at a stop string
        ([3, 4], STATUS.FINISHED_STOPPED, Stop.END_TURN),
        ([3, 4], STATUS.FINISHED_LENGTH_CAPPED, Stop.UNKNOWN),
        ([3, 4], STATUS.FINISHED_ABORTED, Stop.UNKNOWN),
        ([], STATUS.FINISHED_ABORTED, Stop.UNKNOWN),
    ],
)
def test_how_a_reply_ended(tokens: list[int], status: shim.RequestStatus, stop: Stop) -> None:
    assert stop_reason(ended(tokens, status), CALLS) == stop
    assert stop_reason(ended(tokens, status), frozenset()) == Stop.UNKNOWN
