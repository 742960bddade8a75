"""kvkern's lines in a real engine's log as JSON: events, request ids, no prompt."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from tests.integrations.vllm.engine import Engine, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _loggers_stay_as_they_are() -> Iterator[None]:
    loggers = [logging.getLogger("kvkern"), logging.getLogger("vllm.kvkern")]
    before = [(logger.handlers[:], logger.filters[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, filters, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.filters[:], logger.propagate = handlers, filters, propagate
        logger.setLevel(level)


def test_a_load_that_fails_is_a_line_of_json_with_its_request(llama: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Engine(llama, kvkern_options={"log_format": "json"}) as engine:
        tokens = prompt(300, 11)
        first = engine.one(tokens)
        engine.reset_native()
        assert engine.flip_bytes()
        assert engine.one(tokens).tokens == first.tokens
    said = capfd.readouterr().err
    rows = [json.loads(line) for line in said.splitlines() if line.startswith('{"time"')]
    events = {row["event"]: row for row in rows}
    assert {"load_failed", "chunks_bad"} <= events.keys()
    assert events["load_failed"]["fields"]["request"]
    assert events["chunks_bad"]["fields"]["chunks"] >= 1
    assert str(tokens[:4])[1:-1] not in said
