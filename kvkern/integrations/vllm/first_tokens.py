"""Measures how long a request takes from its arrival at the scheduler to its first token, with and without a load."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ...metrics import Meter
from .request_state import RequestState


class FirstTokens:
    """The requests that were scheduled and have no token yet. Scheduler's thread."""

    def __init__(self, requests: Mapping[str, RequestState]) -> None:
        self._requests = requests
        self._waiting: set[str] = set()

    def note_scheduled(self, req_id: str) -> None:
        """Note that a request was scheduled for the first time."""
        self._waiting.add(req_id)

    def look(self, meter: Meter) -> None:
        """Measure the requests that have got a token since the last call. Call it once a step."""
        for req_id in list(self._waiting):
            state = self._requests.get(req_id)
            if state is None or state.request is None:
                self._waiting.discard(req_id)
            elif state.request.num_output_tokens:
                self.end(req_id, state, meter)

    def end(self, req_id: str, state: RequestState, meter: Meter) -> None:
        """Measure a request that has its first token, or has ended. One that ended without a token does not count."""
        if req_id in self._waiting:
            self._waiting.discard(req_id)
            if state.request is not None and state.request.num_output_tokens:
                seconds = time.monotonic() - state.arrived_s
                meter.observe("first_token_seconds", seconds, "yes" if state.has_loaded else "no")
