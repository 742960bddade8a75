"""Who may connect and who may operate, how much one user may take, and what the kernel says of a peer."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvkern.errors import ConfigError
from kvkern.node.daemon import admission
from kvkern.node.daemon.admission import Admission, Users, connections_within_file_limit, unmapped_uid
from kvkern.node.peer_credentials import Peer, peer_of
from tests.node.conftest import ROOT

ENGINES, OPERATORS = Users(frozenset({7001}), frozenset({7002})), Users(frozenset({7101}), frozenset({7102}))


@pytest.mark.parametrize(
    ("peer", "engine", "operator"),
    [
        (Peer(1, os.getuid(), 1), True, True),
        (Peer(1, 0, 1), True, True),
        (Peer(1, 7001, 1), True, False),
        (Peer(1, 1, 7002), True, False),
        (Peer(1, 1, 1, frozenset({3, 7002})), True, False),
        (Peer(1, 7101, 1), False, True),
        (Peer(1, 1, 7102), False, True),
        (Peer(1, 1, 1, frozenset({7102, 7002})), True, True),
        (Peer(1, 7002, 7001), False, False),
        (Peer(1, 1, 1, frozenset({7001, 7101})), False, False),
    ],
)
def test_who_may_connect(peer: Peer, engine: bool, operator: bool) -> None:
    rules = Admission(ENGINES, OPERATORS)
    assert (rules.is_engine(peer), rules.is_operator(peer)) == (engine, operator)
    assert (rules.refusal(peer) == "") is (engine or operator)


def test_one_user_cannot_take_all_connections() -> None:
    rules, own = Admission(Users(gids=frozenset({7002})), OPERATORS), Peer(1, os.getuid(), 0)
    one, two, three = (Peer(1, uid, 7002) for uid in (8001, 8002, 8003))
    for _ in range(256):
        assert rules.refusal(one) == ""
        rules.enter(one)
    assert rules.refusal(one) == (
        "uid 8001 has 256 connections open already, the limit of a user; close some, or run another daemon"
    )
    for _ in range(192):
        assert rules.refusal(two) == ""
        rules.enter(two)
    for peer in (two, three):
        assert rules.refusal(peer) == (
            "448 connections are open already, and the last 64 of 512 are kept for operators; close some, or run another daemon"
        )
    for _ in range(64):
        assert rules.refusal(own) == rules.refusal(Peer(1, 7101, 1)) == ""
        rules.enter(own)
    assert rules.refusal(own) == "512 connections are open already, the limit; close some, or run another daemon"
    rules.leave(one)
    assert rules.refusal(own) == ""
    assert "256" not in rules.refusal(one)


def test_strangers_are_told_the_remedy() -> None:
    assert "run a daemon of your own" in Admission(Users(), Users()).refusal(Peer(1, 7003, 1)).lower()
    assert "--allow-uid 7003" in Admission(Users(), Users()).refusal(Peer(1, 7003, 1))


# -- what the kernel says ------------------------------------------------------------------------------------------------


def test_the_peer_of_a_socket() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert peer_of(one) == Peer(os.getpid(), os.geteuid(), os.getegid(), frozenset(os.getgroups()))


MANY_GROUPS = """
import os, socket
from kvkern.node.peer_credentials import peer_of
for groups in ([], [7002], list(range(7000, 7000 + 1000))):
    os.setgroups(groups)
    one, other = socket.socketpair()
    os.setgroups([])
    assert peer_of(one).groups == set(groups), groups
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to change its groups")
def test_the_groups_are_those_of_the_moment_of_connecting() -> None:
    """All of them, however many there are."""
    subprocess.run([sys.executable, "-c", MANY_GROUPS], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("uid_map", "found"),
    [("0 0 4294967295", -1), ("", -1), (None, -1), ("65534 1000 1", 4711), ("0 100000 65536\n70000 0 1", 4711)],
)
def test_users_that_a_namespace_does_not_know(tmp_path: Path, uid_map: str | None, found: int) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/overflowuid").write_text("4711\n")
    if uid_map is not None:
        (tmp_path / "self/uid_map").write_text(uid_map)
    assert unmapped_uid(tmp_path) == found


def test_all_users_that_a_namespace_does_not_know_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the daemon has the same uid: then every stranger would be its own user."""
    monkeypatch.setattr(admission, "unmapped_uid", os.getuid)
    assert "in the same user namespace" in Admission(ENGINES, OPERATORS).refusal(Peer(1, os.getuid(), 0))


# -- open files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to", "connections"),
    [
        (1024, 4096, 4096, 512),
        (1024, 1 << 20, 1 << 19, 512),
        (1 << 20, 1 << 20, None, 512),
        (640, 640, None, 512),
        (256, 4096, 4096, 512),
        (256, 640, 640, 512),
        (256, resource.RLIM_INFINITY, 1 << 19, 512),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 512),
        (256, 600, 600, 472),
        (300, 300, 300, 172),
        (144, 144, 144, 16),
    ],
)
def test_the_limit_on_open_files(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised_to: int | None, connections: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(admission.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(admission.resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert connections_within_file_limit() == connections
    assert limits[-1] == (soft if raised_to is None else raised_to, hard)


def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(admission.resource, "getrlimit", lambda _: (64, 143))
    monkeypatch.setattr(admission.resource, "setrlimit", lambda *_: None)
    with pytest.raises(
        ConfigError, match=r"limit on open files is 143, too few for a daemon; raise it to 640 \(ulimit"
    ):
        connections_within_file_limit()
