"""A real daemon and processes of other users: who gets in, what an engine may ask, and what nobody can keep from others."""

from __future__ import annotations

import os
import signal
from contextlib import closing, suppress

import pytest

from kvkern.errors import ConfigError
from kvkern.node import framing
from kvkern.node import protocol as p
from tests.node.conftest import PATIENCE_S, SIZES, Daemon, MakeDaemon, Peer, eventually, store
from tests.node.other_user import UID, needs_root, open_to_all, other_user, said
from tests.node.test_fuzz import resident_nbytes
from tests.support import NAMESPACE, chain_keys

pytestmark = needs_root
SAY_HELLO = "answer = Peer(path).greet()\nprint(type(answer).__name__, getattr(answer, 'reason', ''))\n"


@pytest.fixture
def shared(make_daemon: MakeDaemon) -> Daemon:
    """A daemon of root that lets the other user's engines in."""
    return open_to_all(make_daemon(options=["--allow-uid", str(UID)]).start())


def test_another_user_is_refused(daemon: Daemon) -> None:
    """Its group may open the socket, which is not enough."""
    with other_user(open_to_all(daemon).socket, SAY_HELLO + "print(AdminClient(path)._path)") as stranger:
        (line, _) = said(stranger)
    assert line.startswith(f"Refused uid {UID} may not use this cache")
    assert f"--allow-uid {UID}" in line
    assert daemon.stat()["connections"] == 1


def test_the_reason_reaches_every_client(daemon: Daemon) -> None:
    code = """
for connect in (lambda: AdminClient(path).__enter__(), lambda: NodeClient.open(path, "e", GEOMETRY)):
    try:
        connect()
    except KvkernError as error:
        print(error)
"""
    with other_user(open_to_all(daemon).socket, code) as stranger:
        lines = said(stranger)
    assert [line.startswith(f"the daemon refuses: uid {UID} may not use this cache") for line in lines] == [True, True]


def test_silent_strangers_lock_nobody_out(daemon: Daemon) -> None:
    code = "peers = [Peer(path) for _ in range(512)]\nfor peer in peers: peer.socket.setblocking(False)"
    with other_user(open_to_all(daemon).socket, code) as strangers, closing(daemon.client()) as client:
        said(strangers)
        assert store(client, chain_keys("a", 3)) == 3
        assert daemon.stat()["connections"] == 2
        assert len(os.listdir(f"/proc/{daemon.pid}/fd")) < 100


def test_silent_engines_of_one_user_lock_nobody_out(shared: Daemon) -> None:
    """Those who say no Hello, and those who say one, are at most half of all connections."""
    code = "peers = [Peer(path) for _ in range(300)]\nfor peer in peers[:20]: peer.say(p.Hello(p.VERSION, 'e', SIZES))"
    with other_user(shared.socket, code) as engines, closing(shared.client()) as client:
        said(engines)
        assert store(client, chain_keys("a", 3)) == 3
        assert shared.stat()["connections"] <= 258


def test_half_requests_do_not_fill_the_memory(shared: Daemon) -> None:
    """Half requests of 4 MiB on 60 connections would be 240 MiB."""
    code = """
half = (4 << 20).to_bytes(4, "little") + bytes((4 << 20) - 1)
peers = [Peer(path) for _ in range(60)]
for peer in peers:
    peer.greet()
for peer in peers:
    try:
        peer.socket.sendall(half)
    except OSError:
        continue
"""
    with closing(shared.client()) as client:
        before = resident_nbytes(shared.pid)
        with other_user(shared.socket, code) as engine:
            said(engine)
            assert store(client, chain_keys("a", 3)) == 3
            assert resident_nbytes(shared.pid) < before + (110 << 20)


MEMBER_LATER = """
os.setgroups([{before}])
os.setegid(7003)
os.seteuid(7003)
peer = Peer(path)
os.seteuid(0)
os.setegid(0)
os.setgroups([{later}])
print(type(peer.greet()).__name__)
"""


@pytest.mark.parametrize(("before", "later", "answer"), [("", "7002", "Refused"), ("7002", "", "Welcome")])
def test_groups_count_as_they_were_when_the_client_connected(
    make_daemon: MakeDaemon, before: str, later: str, answer: str
) -> None:
    """What /proc says later may be of another process: a socket can be passed on, and a pid used again."""
    daemon = open_to_all(make_daemon(options=["--allow-gid", "7002"]).start())
    with other_user(daemon.socket, MEMBER_LATER.format(before=before, later=later), uid=0) as client:
        assert said(client) == [answer]


NAMED = """
import ctypes
ctypes.CDLL(None).prctl(15, bytes.fromhex("{name}"), 0, 0, 0)
peer = Peer(path)
print(type(peer.greet(index=True)).__name__)
"""


@pytest.mark.parametrize("name", ["31d0bcd0bed0b4d0b5d0bbd18c2dd1", "fffe29205220"], ids=["cut", "bracket"])
def test_a_client_of_any_name(daemon: Daemon, name: str) -> None:
    """It is served, the daemon goes on, and so does the next daemon while the client lives."""
    with other_user(daemon.socket, NAMED.format(name=name), uid=0) as client:
        assert said(client) == ["Welcome"]
        assert daemon.stat()["sessions"] == 2
        daemon.kill()
        daemon.start()
        assert "sessions" in daemon.stat()
        with Peer(daemon.socket) as peer:
            assert isinstance(peer.greet(), p.Welcome)


def with_file_limit(daemon: Daemon, limit: int) -> Daemon:
    daemon.wrapper = ("sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh")
    return daemon


def test_a_daemon_with_few_open_files(make_daemon: MakeDaemon) -> None:
    """It says how many clients fit, and does not end when more come."""
    daemon = with_file_limit(make_daemon(), 200).start()
    assert "the limit on open files is 200, so at most 72 clients can connect, not 512" in daemon.log
    code = "peers = [Peer(path) for _ in range(250)]\nprint(peers[-1].hear().reason)"
    with other_user(daemon.socket, code, uid=0) as crowd:
        assert said(crowd) == ["72 connections are open already, the limit; close some, or run another daemon"]
        assert daemon.alive

    def all_are_gone() -> bool:
        with suppress(ConfigError):  # the daemon has not seen yet that they are
            return bool(daemon.stat()["connections"] == 1)
        return False

    eventually(all_are_gone)
    with closing(daemon.client()) as client:
        assert store(client, chain_keys("a", 3)) == 3


def test_too_few_open_files_to_start(make_daemon: MakeDaemon) -> None:
    daemon = with_file_limit(make_daemon(), 100)
    assert daemon.launch().wait(PATIENCE_S) == 2
    assert daemon.log.startswith("kvkern: the limit on open files is 100, too few for a daemon; raise it to 640")


# -- engines and operators -----------------------------------------------------------------------------------------------

TRY = """
def attempt(name, ask):
    try:
        print(name, ask())
    except KvkernError as error:
        print(name, error)
def admin(request):
    with AdminClient(path) as daemon:
        return daemon.ask(request)[:1]
def record():
    with AdminClient(path) as daemon:
        return next(daemon.recorded_requests())
attempt("stat", lambda: admin(p.Stat(1))[0]["chunks"])
attempt("list", lambda: len(admin(p.List(1, b"", 9))))
attempt("evict", lambda: admin(p.Evict(1, bytes(1))))
attempt("record", record)
attempt("clear", lambda: admin(p.Clear(1, bytes(32))))
attempt("clear all", lambda: admin(p.Clear(1, None)))
attempt("engine", lambda: NodeClient.open(path, "e", GEOMETRY).close())
"""


def outcomes(daemon: Daemon) -> dict[str, str]:
    with closing(daemon.client()) as client:
        assert store(client, chain_keys("a", 3)) == 3
        with other_user(daemon.socket, TRY) as process:
            lines = said(process)
    names = ["stat", "list", "evict", "record", "clear", "clear all", "engine"]
    return {name: line.removeprefix(f"{name} ") for name, line in zip(names, lines, strict=True)}


def test_what_an_engines_user_may_ask(shared: Daemon) -> None:
    found = outcomes(shared)
    assert (found["stat"], found["list"], found["engine"]) == ("3", "1", "None")
    for name, verb in [("evict", "Evict"), ("record", "Record"), ("clear all", "Clear")]:
        assert found[name].startswith(f"the daemon refuses: {verb} is for operators")
        assert "--operator-uid" in found[name]
    assert "an engine clears only namespaces that it has described" in found["clear"]
    assert shared.stat()["chunks"] == 3


@pytest.mark.parametrize("options", [["--operator-uid", str(UID)], ["--operator-gid", str(UID)]])
def test_an_operator_that_may_not_read(make_daemon: MakeDaemon, options: list[str]) -> None:
    daemon = open_to_all(make_daemon(options=options).start())
    found = outcomes(daemon)
    assert (found["stat"], found["evict"]) == ("3", "[{'chunks': 0}]")
    assert (found["record"], found["clear"], found["clear all"]) == ("None", "[{'chunks': 0}]", "[{'chunks': 3}]")
    assert f"uid {UID} may operate this cache, but not read it" in found["engine"]


CLEARS = """
client = NodeClient.open(path, "e", GEOMETRY, timeout_s=30)
root = bytes.fromhex("{root}")
client.describe_namespace(root, {{"model": "m"}})
print(client.clear(root))
client.describe_namespace(root, {{"model": "m"}})
print("described", flush=True)
os.read(0, 1)
print(client.clear(root))
"""


def test_an_engine_clears_its_own_namespace(shared: Daemon) -> None:
    """As vLLM does when it is reset. It may after it has lost the daemon, too."""
    with closing(shared.client()) as client:
        assert store(client, chain_keys("a", 3)) == 3
        with other_user(shared.socket, CLEARS.format(root=NAMESPACE.hex())) as engine:
            assert engine.stdout is not None
            assert engine.stdin is not None
            assert [engine.stdout.readline() for _ in range(2)] == ["3\n", "described\n"]
            shared.kill()
            shared.launch()
            eventually(shared._serves, "serving")
            open_to_all(shared)
            eventually(lambda: client.connected)
            eventually(lambda: store(client, chain_keys("b", 3)) == 3)
            engine.stdin.write("\n")
            engine.stdin.flush()

            def cleared() -> bool:
                return bool(shared.stat()["chunks"] == 0)

            eventually(cleared)


def test_a_clear_of_a_namespace_that_was_not_described(shared: Daemon) -> None:
    """It forgets nothing, and the engine stays connected: one of many tenants does not know its oldest any more."""
    code = """
peer = Peer(path)
peer.greet(index=True)
peer.say(p.Clear(1, bytes(32)), p.Stat(2))
while not isinstance(answer := peer.hear(), p.Answer): pass
print(answer.rows)
while not isinstance(answer := peer.hear(), p.Answer): pass
print(answer.id)
"""
    with other_user(shared.socket, code) as engine:
        assert said(engine) == ["[{'chunks': 0}]", "2"]
    assert "nothing was cleared" in shared.log


def test_settle_under_the_name_of_another_users_engine(shared: Daemon) -> None:
    """What the engine held stays in quarantine: another user's engine is another engine, whatever its name."""
    code = """
client = NodeClient.open(path, "victim", GEOMETRY, timeout_s=30)
print("attached", flush=True)
os.read(0, 1)
with client._lock:
    client._link.send(p.Settle())
    client._link.ask(lambda number: p.Stat(number), lambda answer: print("answered", flush=True))
"""
    with Peer(shared.socket) as victim:
        victim.greet(engine="victim", index=True)
        victim.say(p.Grant(1, 5))
        while not isinstance(victim.hear(), p.Granted):
            continue
        with other_user(shared.socket, code) as liar:
            assert liar.stdout is not None
            assert liar.stdin is not None
            assert liar.stdout.readline() == "attached\n"
            victim.socket.close()
            eventually(lambda: shared.stat()["quarantined_slots"] == 5)
            liar.stdin.write("\n")
            liar.stdin.flush()
            while liar.stdout.readline() != "answered\n":
                continue
            assert shared.stat()["quarantined_slots"] == 5


def test_sigterm_is_heard_while_requests_flood_in(make_daemon: MakeDaemon) -> None:
    """Whose answers nobody reads, and whose answers are read at once."""
    daemon = open_to_all(make_daemon(options=["--drain", "0"]).start())
    hello = framing.encode(p.Hello(p.VERSION, "flood", SIZES))
    flood = hello + framing.encode(p.List(1, b"", 1000)) * 27_000
    with closing(daemon.client()) as client:
        assert store(client, chain_keys("a", 40)) == 40
        with Peer(daemon.socket) as unread:
            unread.socket.settimeout(0.2)
            with suppress(TimeoutError):
                unread.socket.sendall(flood)
            assert daemon.stat()["chunks"] == 40
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
