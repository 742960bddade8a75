"""The conformance suite over `memory://`, as the test file of a new store holds it."""

from __future__ import annotations

import pytest

from kvkern.remote.stores.registry import make_store
from kvkern.remote.stores.url import RemoteUrl
from tests.remote.stores.conformance import Conformance, MakeStore


class TestMemoryStore(Conformance):
    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> MakeStore:
        url = RemoteUrl.parse(f"memory://{abs(hash(request.node.name))}")
        return lambda: make_store(url)
