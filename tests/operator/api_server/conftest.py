"""Fixtures: a server of one's own, a client, and a client of a server with the custom resource Widget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .client import DEFINITIONS, Client, definition
from .server import ApiServer, running_api_server


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with running_api_server() as running:
        yield running


@pytest.fixture
def call(server: ApiServer) -> Client:
    return Client(server)


@pytest.fixture
def widgets(call: Client) -> Client:
    call.ok("POST", DEFINITIONS, definition())
    return call
