"""How log lines are written: as text or as JSON, one line per record whatever a record holds, and few lines in a storm.

    logger.warning("kvkern: remote %(remote)s works again", {"event": "remote_back", "remote": name})

The event names what happened, for programs; docs/operations.md lists all events. The other entries are the fields. Plain calls
of `logging` work too: their event is the module and the function that logs. Knows records and streams, nothing of the cache.

    token bucket per kind of line:   tokens = min(BURST, tokens + seconds / REFILL_S);   a line takes one token
    no token left:                   count the line; when there is a token again, one line says how many were left out

The number of kinds is bounded: the kind that was quiet longest makes room for a new one. Standard library alone.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, cast

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = ("text", "json")
BURST = 10  # lines of one kind at once
REFILL_S = 5.0  # seconds after which one more line of the kind may be written
MAX_KINDS = 512
MAX_CHARS = 4096  # of a message, a field or a line of a traceback; the rest is cut off
_STORM = "kvkern: %(count)d more lines of %(kind)s were left out"
_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}  # attributes that every record has


def one_line(text: str) -> str:
    """Return the text without anything that could end a line or drive a terminal. Such characters become escapes: \\x1b."""
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS] + "..."
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of a record: its named arguments without the event, and what came as `extra`."""
    named = dict(record.args) if isinstance(record.args, Mapping) else {}
    named |= {name: value for name, value in vars(record).items() if name not in _OWN}
    named.pop("event", None)
    return named


def event_of(record: logging.LogRecord) -> str:
    """Return the name of what happened. A record that gives none has the module and function that logged it."""
    named = record.args if isinstance(record.args, Mapping) else {}
    event = cast(object, named.get("event") or getattr(record, "event", None))
    return str(event) if event else f"{record.module}.{record.funcName}"


class TextFormatter(logging.Formatter):
    """The message alone, on one line. A traceback follows, indented, so that nothing in it looks like a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line = one_line(record.getMessage())
        if record.exc_info:
            line += "".join(f"\n    {one_line(row)}" for row in _traceback(self, record))
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line, in ASCII: time (RFC 3339, UTC), level, event, message, fields; `traceback` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "event": one_line(event_of(record)),
            "message": one_line(record.getMessage()),
            "fields": {one_line(str(name)): _plain(value) for name, value in fields_of(record).items()},
        }
        if record.exc_info:
            line["traceback"] = [one_line(row) for row in _traceback(self, record)]
        return json.dumps(line)


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)  # JSON has neither infinities nor NaN
    return one_line(str(value))


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    return formatter.formatException(cast(Any, record.exc_info)).splitlines()


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float
    left_out: int = 0


class StormLimit:
    """Says which lines of a storm are written. Not thread-safe: a handler holds its lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def left_out(self, kind: str) -> int:
        """Return how many lines of this kind were left out and not told yet."""
        bucket = self._buckets.get(kind)
        return 0 if bucket is None else bucket.left_out

    def forget(self, kind: str) -> None:
        """Count the lines left out of this kind from zero: they have been told."""
        self._buckets[kind].left_out = 0

    @property
    def is_waiting(self) -> bool:
        """True if lines were left out that `ended` has not told yet."""
        return any(bucket.left_out for bucket in self._buckets.values())

    def admit(self, kind: str) -> bool:
        """Return whether a line of this kind is written now. If not, it is counted."""
        now_s = self._clock()
        bucket = self._buckets.get(kind)
        if bucket is None:
            if len(self._buckets) >= MAX_KINDS:
                self._buckets.popitem(last=False)
            bucket = self._buckets[kind] = _Bucket(BURST, now_s)
        self._buckets.move_to_end(kind)
        bucket.tokens = min(BURST, bucket.tokens + (now_s - bucket.at_s) / REFILL_S)
        bucket.at_s = now_s
        if bucket.tokens < 1:
            bucket.left_out += 1
            return False
        bucket.tokens -= 1
        return True

    def ended(self, all_of_them: bool = False) -> list[tuple[str, int]]:
        """Return (kind, lines left out) of storms whose kinds may be written again, or of all. They count from zero then."""
        now_s = self._clock()
        found = []
        for kind, bucket in self._buckets.items():
            if bucket.left_out and (all_of_them or bucket.tokens + (now_s - bucket.at_s) / REFILL_S >= 1):
                found.append((kind, bucket.left_out))
                bucket.left_out = 0
        return found


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes records to a stream, and of a storm its first lines and a count. Thread-safe, as every handler."""

    def __init__(
        self,
        log_format: LogFormat = "text",
        stream: TextIO | None = None,  # None: stderr
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(stream or sys.stderr)
        self.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
        self._storms = StormLimit(clock)
        self._timer: threading.Timer | None = None

    def announce(self, text: str, fields: dict[str, Any], level: int = logging.INFO) -> None:
        """Write a line whatever the level of the loggers is: what a process says of itself, once."""
        self.handle(logging.LogRecord("kvkern", level, __file__, 0, text, (fields,), None, "announce"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or count it. Called with the handler's lock held."""
        self._write_counts()
        if self._storms.admit(event_of(record)):
            super().emit(record)
        else:
            self._count_later()

    def flush(self) -> None:
        """Flush the stream."""
        if not getattr(self.stream, "closed", False):
            super().flush()

    def close(self) -> None:
        """Write how many lines were left out and not told yet."""
        with cast(threading.RLock, self.lock):
            if self._timer is not None:
                self._timer.cancel()
            if not getattr(self.stream, "closed", False):
                self._write_counts(all_of_them=True)
        super().close()

    def _count_later(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(REFILL_S, self._storm_may_have_ended)
            self._timer.daemon = True
            self._timer.start()

    def _storm_may_have_ended(self) -> None:
        with cast(threading.RLock, self.lock):
            self._timer = None
            self._write_counts()
            if self._storms.is_waiting:
                self._count_later()

    def _write_counts(self, all_of_them: bool = False) -> None:
        for kind, count in self._storms.ended(all_of_them):
            fields = {"event": "log_lines_left_out", "kind": kind, "count": count}
            super().emit(
                logging.LogRecord("kvkern", logging.WARNING, __file__, 0, _STORM, (fields,), None, "_write_counts")
            )


def set_up(log_format: LogFormat = "text", verbose: bool = False, stream: TextIO | None = None) -> LogHandler:
    """Log warnings of this process, with `verbose` information too, to `stream` or stderr. Replaces what was set up before."""
    root = logging.getLogger()
    handler = LogHandler(log_format, stream)
    for other in list(root.handlers):
        if isinstance(other, LogHandler):
            root.removeHandler(other)
            other.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    return handler


class StormFilter(logging.Filter):
    """Leaves out lines of a storm, for a logger with others' handlers. The next line of the kind says how many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._storms = StormLimit(clock)
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written."""
        kind = event_of(record)
        with self._lock:
            left_out = self._storms.left_out(kind)
            admitted = self._storms.admit(kind)
            if admitted and left_out:
                self._storms.forget(kind)
                record.msg = f"{record.msg} ({left_out} more such lines were left out)"
        return admitted


def set_up_engine(log_format: LogFormat = "text") -> None:
    """Limit storms of kvkern's lines in an engine's process. With `json` these lines are JSON on stderr.

    With `text` they go where the engine's logging sends them, and look as it says.
    """
    for name in ("kvkern", "vllm.kvkern"):
        logger = logging.getLogger(name)
        if not any(isinstance(f, StormFilter) for f in logger.filters):
            logger.addFilter(StormFilter())
        if log_format == "json" and not any(isinstance(handler, LogHandler) for handler in logger.handlers):
            logger.addHandler(LogHandler(log_format))
            logger.propagate = False
            logger.setLevel(logging.INFO)
