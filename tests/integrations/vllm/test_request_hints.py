"""Hints of clients: what is understood, and that nothing they send does harm."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvkern.integrations.vllm.request_hints import hinted
from kvkern.policy.base import Stop, Use

pytestmark = pytest.mark.vllm
USE = Use(request=7)


def test_session_and_stop() -> None:
    said = hinted(USE, {"kvkern": {"session": "a", "stop": "tool_call"}, "other": 1}, b"t")
    assert (said.request, said.stop) == (7, Stop.TOOL_CALL)
    assert 0 < said.session < 1 << 53
    assert hinted(USE, {"kvkern": {"session": "a"}}, b"t").session == said.session
    assert hinted(USE, {"kvkern": {"session": "a"}}, b"u").session != said.session
    assert (
        hinted(USE, {"kvkern": {"session": 5}}, b"t").session == hinted(USE, {"kvkern": {"session": "5"}}, b"t").session
    )


def test_the_session_that_vllm_knows() -> None:
    known = hinted(USE, None, b"t", "a")
    assert known.session == hinted(USE, {"kvkern": {"session": "a"}}, b"t").session
    assert hinted(USE, {"kvkern": {"stop": "end_turn"}}, b"t", "a").session == known.session
    assert hinted(USE, {"kvkern": {"session": "b"}}, b"t", "a").session != known.session


BAD: list[Any] = [
    None,
    3,
    [],
    {},
    *({"kvkern": hints} for hints in (3, {"session": [1]}, {"stop": "x"}, {"stop": []}, {3: 4})),
]


@pytest.mark.parametrize("params", BAD)
def test_what_is_not_understood_is_ignored(params: Any) -> None:
    assert hinted(USE, params, b"t") == USE
