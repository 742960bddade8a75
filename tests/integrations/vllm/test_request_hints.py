"""Hints of clients: which ones are understood, and that no other input does harm."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvkern.integrations.vllm.request_hints import with_hints
from kvkern.policy.base import Stop, Use

pytestmark = pytest.mark.vllm
USE = Use(request=7)


def test_session_and_stop() -> None:
    said = with_hints(USE, {"kvkern": {"session": "a", "stop": "tool_call"}, "other": 1}, b"t")
    assert (said.request, said.stop) == (7, Stop.TOOL_CALL)
    assert 0 < said.session < 1 << 53
    assert with_hints(USE, {"kvkern": {"session": "a"}}, b"t").session == said.session
    assert with_hints(USE, {"kvkern": {"session": "a"}}, b"u").session != said.session
    assert (
        with_hints(USE, {"kvkern": {"session": 5}}, b"t").session
        == with_hints(USE, {"kvkern": {"session": "5"}}, b"t").session
    )


def test_the_session_that_vllm_knows() -> None:
    known = with_hints(USE, None, b"t", "a")
    assert known.session == with_hints(USE, {"kvkern": {"session": "a"}}, b"t").session
    assert with_hints(USE, {"kvkern": {"stop": "end_turn"}}, b"t", "a").session == known.session
    assert with_hints(USE, {"kvkern": {"session": "b"}}, b"t", "a").session != known.session


BAD: list[Any] = [
    None,
    3,
    [],
    {},
    *({"kvkern": hints} for hints in (3, {"session": [1]}, {"stop": "x"}, {"stop": []}, {3: 4})),
]


@pytest.mark.parametrize("params", BAD)
def test_unknown_hints_are_ignored(params: Any) -> None:
    assert with_hints(USE, params, b"t") == USE
