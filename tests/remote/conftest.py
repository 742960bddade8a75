"""Fixtures that several tests of the remote tier share."""

from __future__ import annotations

import pytest


class Clock:
    """A clock that stands still until a test moves it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()
