"""The policy's statistics outlive the daemon and serve another daemon as a file. A lost file never stops a daemon."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from kvkern.arena.slots import SlotGeometry
from kvkern.errors import ConfigError
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon import policy_state_file
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.policy_state_file import MAX_NBYTES, PolicyStateFile
from kvkern.node.daemon.server import Server
from kvkern.policy.base import Use
from kvkern.policy.grit_model import GritModel
from tests.node.conftest import GEOMETRY, Daemon, MakeDaemon, eventually, served, store
from tests.support import chain_keys


def events_in(path: Path) -> float:
    """Return how many events the model in a file has learned from."""
    model = GritModel()
    model.load(path.read_bytes())
    return float(model.events.sum())


def teach(daemon: Daemon, rounds: int = 3) -> None:
    """Send the same request again and again."""
    with closing(daemon.client()) as client:
        chain = chain_keys("a", 8)
        store(client, chain)
        for number in range(1, rounds + 1):
            client.release(client.acquire(chain, use=Use(request=number)))


def test_a_restarted_daemon_goes_on_with_what_was_learned(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    state = tmp_path / "state"
    daemon = make_daemon(options=["--policy-state", str(state)]).start()
    assert events_in(state) == 0.0  # written at start, to find out that it can be written
    teach(daemon)
    assert daemon.stop() == 0
    learned = events_in(state)
    assert learned > 0
    daemon.start()
    assert f"the policy starts with the statistics in {state}" in daemon.log
    daemon.kill()  # a killed daemon writes nothing
    assert events_in(state) == pytest.approx(learned)
    other = make_daemon(options=["--policy-state", str(state)]).start()  # as on another node
    teach(other)
    assert other.stop() == 0
    assert events_in(state) > learned
    assert sorted(path.name for path in tmp_path.iterdir() if "state" in path.name) == [".state.lock", "state"]


def test_written_now_and_then(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_state_file, "SAVE_S", 0.0)
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False, policy_state=tmp_path / "state")
    with served(config), closing(NodeClient.open(config.socket, "e", GEOMETRY, prefault=False)):
        first = (tmp_path / "state").stat().st_ino
        eventually(lambda: (tmp_path / "state").stat().st_ino != first, "another file")


def test_nothing_is_learned_while_it_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's lock is held during a dump, because a remote store's thread uses the policy too."""
    monkeypatch.setattr(policy_state_file, "SAVE_S", 0.0)
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False, policy_state=tmp_path / "state")
    with served(config) as server, closing(NodeClient.open(config.socket, "e", GEOMETRY, prefault=False)):
        held: list[bool] = []
        state, model = server.sessions, server._policy_state.model
        assert state is not None
        assert model is not None
        dump = model.dump
        monkeypatch.setattr(model, "dump", lambda: (held.append(state.cache._lock.locked()), dump())[1])
        eventually(lambda: held, "a dump")
    assert all(held)


def test_one_model_for_every_arena_of_a_daemon(folder: Path, tmp_path: Path) -> None:
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False)
    with served(config) as server:
        models = []
        for geometry in (GEOMETRY, SlotGeometry(part_nbytes=512, max_planes=2, world_size=1)):
            with closing(NodeClient.open(config.socket, "e", geometry, index=False, prefault=False)):
                models.append(server._policy_state.model)
            eventually(server._arena_unused, "an arena that nobody uses")
        assert models[0] is models[1] is not None


@pytest.mark.parametrize(
    ("policy", "data", "message"),
    [
        ("lru", b"", "policy lru learns nothing to keep in .*/state; leave out --policy-state, or use --policy grit"),
        ("grit", b"x" * 99, "state: policy state of 99 bytes: its checksum does not match; delete the file"),
        (
            "grit",
            bytes(MAX_NBYTES + 1),
            f"state: the file is above {MAX_NBYTES} bytes, so it is no policy state; give another --policy-state",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_at_start(
    folder: Path, tmp_path: Path, policy: str, data: bytes, message: str
) -> None:
    state = tmp_path / "state"
    state.write_bytes(data)
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, policy=policy, policy_state=state)
    with pytest.raises(ConfigError, match=message):
        asyncio.run(Server(config).run())
    assert state.read_bytes() == data


def test_a_file_that_cannot_be_written_is_an_error_at_start(folder: Path, tmp_path: Path) -> None:
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path)
    with pytest.raises(ConfigError, match="create the folder"):
        asyncio.run(Server(replace(config, policy_state=tmp_path / "gone" / "state")).run())
    (tmp_path / "state").mkdir()
    with pytest.raises(ConfigError, match="which is a folder"):
        asyncio.run(Server(replace(config, policy_state=tmp_path / "state")).run())


@pytest.mark.parametrize("plant", ["fifo", "link"])
def test_what_another_user_put_in_its_place(tmp_path: Path, plant: str) -> None:
    """Nothing blocks, and nothing is read or written through a link."""
    others = tmp_path / "others"
    others.write_bytes(b"theirs")
    if plant == "fifo":
        os.mkfifo(tmp_path / "state")
    else:
        (tmp_path / "state").symlink_to(others)
    kind = {"fifo": "a FIFO", "link": "a symbolic link"}[plant]
    with pytest.raises(ConfigError, match=f"policy state {tmp_path}/state: it is {kind}, not a regular file"):
        PolicyStateFile("grit", tmp_path / "state").load()
    (tmp_path / "state").unlink()
    (tmp_path / ".state.new").symlink_to(others)
    PolicyStateFile("grit", tmp_path / "state").load()
    assert events_in(tmp_path / "state") == 0.0
    assert others.read_bytes() == b"theirs"
    assert not (tmp_path / ".state.new").exists()


def test_two_daemons_do_not_have_the_same_file(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    options = ["--policy-state", str(tmp_path / "state")]
    make_daemon(options=options).start()
    other = make_daemon(options=[*options, "--name", "other"])
    assert other.launch().wait() == 2
    assert "another daemon already has" in other.log
    assert "--policy-state" in other.log


def test_a_disk_that_fails_later_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    learned = PolicyStateFile("grit", folder / "state")
    learned.load()
    before = (folder / "state").read_bytes()
    folder.rename(tmp_path / "away")

    async def twice() -> None:
        await learned.close()
        await learned.close()

    with caplog.at_level(logging.WARNING, logger="kvkern"):
        asyncio.run(twice())
    assert [record.getMessage() for record in caplog.records] == [
        f"kvkern: policy state {folder / 'state'} cannot be written (No such file or directory) and is tried again every 60 s; "
        "make room on its disk, or make the folder writable"
    ]
    (tmp_path / "away").rename(folder)
    asyncio.run(learned.close())
    assert (folder / "state").read_bytes() == before
