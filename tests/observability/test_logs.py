"""Every log line is one line, parses, and cannot be forged; a storm of lines stays small."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.observability import logs

HOSTILE = [
    "a\nkvkern: 0 chunks are lost",
    "a\r\nERROR forged",
    "\x1b[2J\x1b[31mred",
    "a\u2028b\u2029c\x85d\x0be",
    "\u202etxt.exe",
    "\ud800 alone",
    '", "event": "forged',
    "nul\0",
    "x" * 100_000,
]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Log:
    """A logger of its own with a handler over a buffer."""

    def __init__(self, log_format: logs.LogFormat, clock: Clock) -> None:
        self.stream = io.StringIO()
        self.handler = logs.LogHandler(log_format, self.stream, clock)
        self.logger = logging.Logger("kvkern.test")
        self.logger.addHandler(self.handler)

    def lines(self) -> list[str]:
        return self.stream.getvalue().split("\n")[:-1]

    def rows(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines()]


def test_a_line_of_text_is_the_message_alone(clock: Clock) -> None:
    log = Log("text", clock)
    log.logger.warning("kvkern: remote %(remote)s works again", {"event": "remote_back", "remote": "redis://a"})
    log.logger.warning("kvkern: %d of %r", 3, "x\ny")
    assert log.lines() == ["kvkern: remote redis://a works again", r"kvkern: 3 of 'x\ny'"]


def test_a_line_of_json_has_time_level_event_message_and_fields(clock: Clock) -> None:
    log = Log("json", clock)
    log.logger.warning(
        "kvkern: %(chunks)d of %(ratio)s", {"event": "chunks_bad", "chunks": 2, "ratio": math.inf, "request": "r1"}
    )
    log.logger.error("kvkern: plain %s", "x", extra={"request": "r2"})
    first, second = log.rows()
    assert first["event"] == "chunks_bad"
    assert first["level"] == "warning"
    assert first["message"] == "kvkern: 2 of inf"
    assert first["fields"] == {"chunks": 2, "ratio": "inf", "request": "r1"}
    assert str(first["time"]).endswith("Z")
    assert datetime.fromisoformat(str(first["time"])).tzinfo is not None
    assert second["event"] == "test_logs.test_a_line_of_json_has_time_level_event_message_and_fields"
    assert second["fields"] == {"request": "r2"}


@pytest.mark.parametrize("log_format", logs.FORMATS)
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_forges_no_line(log_format: logs.LogFormat, name: str, clock: Clock) -> None:
    log = Log(log_format, clock)
    log.logger.warning("kvkern: engine %(engine)s", {"event": "engine_named", "engine": name})
    log.logger.warning("kvkern: engine %s", name)
    log.logger.warning("kvkern: engine " + name.replace("%", "%%"))
    lines = log.lines()
    assert len(lines) == 3
    assert all(line.isprintable() and len(line) < 3 * logs.MAX_CHARS for line in lines)
    if log_format == "json":
        assert next(row["event"] for row in log.rows()) == "engine_named"
        assert {row["level"] for row in log.rows()} == {"warning"}
    else:
        assert all(line.startswith("kvkern: engine ") for line in lines)


@pytest.mark.parametrize("log_format", logs.FORMATS)
def test_a_traceback_forges_no_line(log_format: logs.LogFormat, clock: Clock) -> None:
    log = Log(log_format, clock)
    try:
        raise ValueError("a\nkvkern: forged\x1b[0m")
    except ValueError:
        log.logger.exception("kvkern: %s in the cache", "ValueError")
    if log_format == "json":
        (row,) = log.rows()
        assert any("ValueError: a" in line for line in row["traceback"])  # type: ignore[attr-defined]
    else:
        first, *rest = log.lines()
        assert first == "kvkern: ValueError in the cache"
        assert rest
        assert all(line.startswith("    ") for line in rest)
    assert "\x1b" not in log.stream.getvalue()


@given(st.text(), st.text(min_size=1))
def test_whatever_is_logged_is_one_line_that_parses(name: str, value: str) -> None:
    for log_format in logs.FORMATS:
        log = Log(log_format, Clock())
        log.logger.warning("%(value)s", {"event": name, "value": value, name: value})
        (line,) = log.lines()
        assert "".join(line.splitlines()) == line
        assert log_format == "text" or json.loads(line)["message"] == logs.one_line(value)


def test_a_storm_is_a_few_lines_and_a_count(clock: Clock) -> None:
    log = Log("json", clock)
    for i in range(60_000):  # a minute of a thousand a second
        clock.now_s = i / 1000
        log.logger.warning("kvkern: client %(pid)d", {"event": "client_left", "pid": i})
    log.handler.close()
    rows = log.rows()
    counts = [row for row in rows if row["event"] == "log_lines_left_out"]
    lines = [row for row in rows if row["event"] == "client_left"]
    assert len(lines) <= logs.BURST + 60 / logs.REFILL_S
    assert len(counts) <= 60 / logs.REFILL_S + 1
    told = sum(row["fields"]["count"] for row in counts)  # type: ignore[index]
    assert told + len(lines) == 60_000
    assert {row["fields"]["kind"] for row in counts} == {"client_left"}  # type: ignore[index]


def test_a_storm_of_one_kind_leaves_room_for_the_others(clock: Clock) -> None:
    log = Log("text", clock)
    for _ in range(100):
        log.logger.warning("kvkern: storm", extra={"event": "storm"})
    log.logger.warning("kvkern: calm", extra={"event": "calm"})
    assert log.lines() == ["kvkern: storm"] * logs.BURST + ["kvkern: calm"]
    clock.now_s = logs.REFILL_S
    log.logger.warning("kvkern: calm", extra={"event": "calm"})
    assert log.lines()[-2:] == ["kvkern: 90 more lines of storm were left out", "kvkern: calm"]
    log.handler.close()


def test_the_end_of_a_storm_is_told_without_another_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "REFILL_S", 0.01)
    log = Log("text", clock)
    for _ in range(logs.BURST + 3):
        log.logger.warning("kvkern: storm", extra={"event": "storm"})
    timer = log.handler._timer
    assert timer is not None
    clock.now_s = 1.0
    timer.join(10)
    assert log.lines()[-1] == "kvkern: 3 more lines of storm were left out"


def test_kinds_take_bounded_memory(clock: Clock) -> None:
    storms = logs.StormLimit(clock)
    for i in range(10 * logs.MAX_KINDS):
        assert storms.admit(str(i))
    assert len(storms) == logs.MAX_KINDS


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, left as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_set_up_replaces_the_one_before(root_logger: logging.Logger) -> None:
    logs.set_up("json", stream=io.StringIO())
    stream = io.StringIO()
    logs.set_up("text", verbose=True, stream=stream)
    logging.getLogger("kvkern").info("kvkern: %s", "here")
    assert stream.getvalue() == "kvkern: here\n"
    assert sum(isinstance(handler, logs.LogHandler) for handler in root_logger.handlers) == 1


@pytest.fixture
def engine_loggers() -> Iterator[list[logging.Logger]]:
    """kvkern's loggers in an engine's process, left as they were."""
    loggers = [logging.getLogger("kvkern"), logging.getLogger("vllm.kvkern")]
    before = [(logger.handlers[:], logger.filters[:], logger.level, logger.propagate) for logger in loggers]
    yield loggers
    for logger, (handlers, filters, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.filters[:], logger.propagate = handlers, filters, propagate
        logger.setLevel(level)


def test_an_engine_keeps_its_own_log_unless_it_asks_for_json(
    engine_loggers: list[logging.Logger], capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [logger.handlers[:] for logger in engine_loggers]
    logs.set_up_engine("text")
    assert [logger.handlers for logger in engine_loggers] == handlers
    logs.set_up_engine("json")
    logs.set_up_engine("json")
    engine_loggers[1].info("kvkern: a %s", "line")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "kvkern: a line"


def test_a_storm_in_an_engine_is_a_few_lines_and_a_count(clock: Clock) -> None:
    log = Log("text", Clock())  # its own limit never acts: its clock stands, and it gets few lines
    log.logger.addFilter(logs.StormFilter(clock))
    for i in range(1000):
        log.logger.warning("kvkern: load %(request)s failed", {"event": "load_failed", "request": i})
    assert len(log.lines()) == logs.BURST
    clock.now_s = logs.REFILL_S
    log.handler._storms = logs.StormLimit()
    log.logger.warning("kvkern: load %(request)s failed", {"event": "load_failed", "request": "r"})
    assert log.lines()[-1] == "kvkern: load r failed (990 more such lines were left out)"
