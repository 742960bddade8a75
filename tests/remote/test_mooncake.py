"""Mooncake Store against the real master, with nodes in other processes, and with whatever can fail failing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkern.remote.base import RemoteStore, RemoteUrl, make_store
from tests.remote import mooncake_servers as servers
from tests.remote.conformance import Conformance, MakeStore
from tests.remote.need import need


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    need("mooncake", program=servers.MASTER or "mooncake_master", module="mooncake")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mooncake")


@pytest.fixture(scope="module")
def master(folder: Path) -> Iterator[Any]:
    with servers.mooncake_master(folder) as master:
        yield master


@pytest.fixture(scope="module")
def shared_node(master: servers.MooncakeMaster) -> Iterator[Any]:
    with servers.node(master, "1GiB") as node:
        yield node


@pytest.fixture
def node(shared_node: servers.Node) -> servers.Node:
    """Of the shared master, and nothing in it."""
    shared_node.forget_all()
    return shared_node


def store_of(url: str) -> RemoteStore:
    return make_store(RemoteUrl.parse(url))


class TestFromNodeToNode(Conformance):
    """Values lie in another process."""

    @pytest.fixture
    def make(self, master: servers.MooncakeMaster, node: servers.Node) -> MakeStore:
        return lambda: store_of(master.url())
