"""What tests do to a running server: faults, callbacks at writes, and records of what was asked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .errors import ApiError
from .json_values import Json

Status = int | Literal["close before", "close after"]
OnWrite = Callable[[int, str, Json], None]
_REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


@dataclass
class Fault:
    """`*` as verb or resource stands for all. "close after" writes and then closes the connection without an answer."""

    verb: str
    resource: str  # plural, plural.group or plural/subresource
    status: Status
    times: int
    retry_after_s: int

    def error(self) -> ApiError:
        assert isinstance(self.status, int)
        retry = self.retry_after_s if self.status in (429, 503) else None
        return ApiError(self.status, _REASONS.get(self.status, "Unknown"), "injected by the test", retry_after_s=retry)


@dataclass(frozen=True)
class Write:
    """One write that succeeded over HTTP, also if it changed nothing. Of a deletecollection the name is empty."""

    number: int
    user_agent: str
    verb: str
    resource: str
    namespace: str
    name: str


class Faults:
    """May be used from any thread."""

    def __init__(self) -> None:
        self.writes: list[Write] = []
        self.counts: Counter[tuple[str, str]] = Counter()  # (verb, resource) -> requests, also refused ones
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._callbacks: dict[str, list[tuple[str, OnWrite]]] = {"before": [], "after": []}

    def fail_next(
        self, verb: str, resource: str, status: Status, times: int = 1, retry_after_s: int = 1
    ) -> None:  # fmt: skip
        """Answer the next requests of a kind with an error."""
        with self._lock:
            self._faults.append(Fault(verb, resource, status, times, retry_after_s))

    def on_write(
        self, callback: OnWrite, when: Literal["before", "after"] = "after", user_agent: str = ""
    ) -> Callable[[], None]:
        """Call `callback(number, verb, object)` around each write by a client whose user agent contains `user_agent`.

        Called in a thread of the server without the lock: `before` the commit of a write that will succeed, `after` it and
        before the answer. A callback that raises ConnectionLost closes the connection, and prevents the write if `before`.
        Returns a function that takes the callback off.
        """
        entry = (user_agent, callback)
        self._callbacks[when].append(entry)
        return lambda: self._callbacks[when].remove(entry)

    def callbacks(self, when: str, user_agent: str) -> list[OnWrite]:
        return [callback for part, callback in self._callbacks[when] if part in user_agent]

    def take(self, verb: str, names: set[str]) -> Fault | None:
        """Count a request, and return the fault that is meant for it."""
        with self._lock:
            for fault in self._faults:
                if fault.verb in ("*", verb) and fault.resource in names | {"*"}:
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                    return fault
        return None

    def count(self, verb: str, resource: str) -> None:
        with self._lock:
            self.counts[verb, resource] += 1

    def next_number(self) -> int:
        with self._lock:
            return len(self.writes)

    def record(self, user_agent: str, verb: str, resource: str, namespace: str, name: str) -> int:
        """Return the number of the write; the first is 0."""
        with self._lock:
            number = len(self.writes)
            self.writes.append(Write(number, user_agent, verb, resource, namespace, name))
            return number
