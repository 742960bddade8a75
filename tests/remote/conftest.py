"""What several tests of the remote tier's parts share."""

from __future__ import annotations

import pytest


class Clock:
    """Stands still until a test moves it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()
